"""The log of a run, and the files beside it."""

import json
import re
import shlex
from concurrent.futures import ThreadPoolExecutor

import pytest

from harmful_unlearn.cli.running import exit_code
from harmful_unlearn.storage.files import ROOT
from harmful_unlearn.training import run_log
from harmful_unlearn.training.flags import parse_flags
from harmful_unlearn.training.run_log import RunLog, beside, new_log
from harmful_unlearn.unlearn_harm_new import main
from tests.helpers.running.resumed import STEPS, flags, metrics_of, run


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


def test_the_log_goes_on_and_a_torn_line_is_mended(stopped, tiny_model):
    metrics, log = stopped / "run.metrics.jsonl", stopped / "run.log"
    with metrics.open("a") as file:
        file.write('{"step": 4, "gd_loss": 6.1')
    with log.open("a") as file:
        file.write("2026-01-01 00:00:00,000 INFO step 4/6  GD 6.")
    before = metrics.read_text().splitlines()[:3], log.read_text()
    assert run(tiny_model("opt"), stopped, "--resume") == 0
    assert metrics.read_text().splitlines()[:3] == before[0]
    assert [step["step"] for step in metrics_of(stopped)] == [1, 2, 3, 4, 5, 6]
    after = log.read_text()
    assert after.startswith(before[1] + "\n")
    assert len(re.findall(r"^\S+ \S+ INFO step \d/6 ", after, re.MULTILINE)) == 7  # the torn one among them


def test_the_default_log_is_found_again(tiny_model, tmp_path, stop_after, monkeypatch):
    monkeypatch.setattr(run_log, "ROOT", tmp_path)
    words = flags(tiny_model("opt"), tmp_path)
    while "--log_file" in words:
        del words[words.index("--log_file") : words.index("--log_file") + 2]
    (tmp_path / "logs" / tiny_model("opt").name).mkdir(parents=True)  # an earlier run's
    stop_after(2)
    assert exit_code(lambda: main(words)) == 143
    assert exit_code(lambda: main([*words, "--resume"])) == 0
    folder = tmp_path / "logs" / f"{tiny_model('opt').name}-2"
    names = {file.name for file in folder.iterdir()}
    assert names == {"run.log", "run.metrics.jsonl", "run.losses.png", "run.flags.json"}
    assert len((folder / "run.metrics.jsonl").read_text().splitlines()) == STEPS
    assert json.loads((folder / "run.flags.json").read_text())["flags"]["lr"] == 1e-3
    assert len(list((tmp_path / "logs").iterdir())) == 2


def test_the_end_says_what_it_came_to(tiny_model, tmp_path, capsys):
    assert run(tiny_model("opt"), tmp_path) == 0
    said = capsys.readouterr().out
    summary = said[said.index("stage 1        ") :].splitlines()
    assert re.match(r"stage 1 +0 min \d+ s, 6 steps, [\d,]+ tokens \([\d,]+ a second\)", summary[0])
    for word in ("stage 2", "stage 1 model", "peak memory", "unlearned", "log"):
        assert any(line.startswith(word) for line in summary)
    assert summary[-1].endswith(f"main.py --base {tiny_model('opt')} --unlearned {tmp_path / 'unlearned'}")


@pytest.mark.parametrize(
    ("folder", "script"),
    [(ROOT, "harmful_unlearn/unlearn_harm_new.py"), (ROOT / "harmful_unlearn", "unlearn_harm_new.py")],
)
def test_the_next_command_after_stage_1_alone_is_stage_2(folder, script, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert run(tiny_model("opt"), tmp_path, "--stage", "acquire") == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words[:3] == ["next", "python", script]
    assert exit_code(lambda: main([*words[3:], "--log_file", str(tmp_path / "2.log")])) == 0
    assert (tmp_path / "unlearned" / "model.safetensors").exists()


def test_a_model_folder_without_a_name(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = flags(tiny_model("opt"), tmp_path, "--resume", "--model_save_dir", ".", "--log_file", f"{tmp_path}.log")
    assert exit_code(lambda: main(words)) == 2
    assert "folder of its own" in capsys.readouterr().err


def test_runs_that_begin_together_have_logs_of_their_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        logs = list(pool.map(lambda _: new_log(tmp_path / "logs", "opt"), range(8)))
    assert len(set(logs)) == 8 and {log.parent.name for log in logs} >= {"opt", "opt-2", "opt-8"}
