"""The log of a run, and the files beside it."""

import json

from harmful_unlearn.training.flags import parse_flags
from harmful_unlearn.training.run_log import RunLog, beside


def step(number: int, pd: float = -0.1) -> dict:
    return {
        "step": number,
        "gd_loss": 1.0,
        "rd_loss": None,
        "pd_loss": pd,
        "total_loss": 2.0,
        "lr": 1e-4,
        "grad_norm": 1.0,
        "tokens": 10,
    }


def test_run_log(tmp_path, capsys):
    settings = parse_flags(["--log_file", str(tmp_path / "new" / "opt-2.7b.log"), "--max_unlearn_steps", "3"])
    log = RunLog(settings)
    assert not (tmp_path / "new").exists()  # nothing is written before the first line
    log.say("hello")
    for metrics in (step(1), step(2, -1.5), step(3, -2.5)):
        log.step(metrics)
    log.close()
    text = (tmp_path / "new" / "opt-2.7b.log").read_text()
    assert "hello" in text and "step 3/3" in text and text.count("WARNING") == 1
    lines = (tmp_path / "new" / "opt-2.7b.metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in lines.splitlines()] == [1, 2, 3]
    assert lines == log.metrics_text
    assert (tmp_path / "new" / "opt-2.7b.losses.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    RunLog(settings).say("again")
    text = (tmp_path / "new" / "opt-2.7b.log").read_text()
    assert "hello" in text and "again" in text  # an earlier run's log is not lost


def test_files_beside_the_log(tmp_path):
    assert beside(tmp_path / "opt-2.7b.log", ".png") == tmp_path / "opt-2.7b.png"
    assert beside(tmp_path / "opt-2.7b", ".png") == tmp_path / "opt-2.7b.png"
