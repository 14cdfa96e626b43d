"""Nothing is lost: checkpoints, going on from them to the bit, being stopped and killed, and a full disk."""

import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from harmful_unlearn import unlearn_harm_new
from harmful_unlearn.cli import exit_code
from harmful_unlearn.errors import UserError
from harmful_unlearn.storage.files import ROOT, new_folder
from harmful_unlearn.training import checkpointing, engine, run_log, setup
from harmful_unlearn.training.checkpointing import TrainingCheckpoints, check_complete
from harmful_unlearn.training.run_log import RunLog, new_log
from harmful_unlearn.unlearn_harm_new import main
from tests.helpers.tiny import GOLDENS

SCRIPT = ROOT / "harmful_unlearn" / "unlearn_harm_new.py"
STEPS = 6


def flags(model: Path, out: Path, *more: str) -> list[str]:
    return [
        "--model_name",
        str(model),
        "--harmful_dataset",
        str(GOLDENS / "pku_saferlhf_current_schema.jsonl"),
        "--normal_dataset",
        str(GOLDENS / "TruthfulQA.csv"),
        "--max_unlearn_steps",
        str(STEPS),
        "--lr",
        "1e-3",
        "--model_save_dir",
        str(out / "harmful"),
        "--task_vector_saving_path",
        str(out / "unlearned"),
        "--log_file",
        str(out / "run.log"),
        *more,
    ]


def run(model: Path, out: Path, *more: str) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    return exit_code(lambda: main(flags(model, out, *more)))


def metrics_of(out: Path) -> list[dict]:
    lines = (out / "run.metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


def assert_same(ours: Path, theirs: Path) -> None:
    """The weights of both stages to the bit, and the metrics."""
    for stage in ("harmful", "unlearned"):
        files = [sorted(folder.glob("*.safetensors")) for folder in (ours / stage, theirs / stage)]
        assert [file.name for file in files[0]] == [file.name for file in files[1]] != []
        for one, other in zip(*map(lambda found: map(load_file, found), files), strict=True):
            assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert metrics_of(ours) == metrics_of(theirs)
    assert not list(ours.glob(".*")) and not (ours / "harmful.checkpoints").exists()


@pytest.fixture
def stop_after(monkeypatch):
    """`stop_after(n, signal)`: the process gets the signal, once, when its n-th step is logged."""

    def stop(step: int, number: int = signal.SIGTERM) -> None:
        logged = RunLog.step

        def then_signal(log, metrics):
            logged(log, metrics)
            if metrics["step"] == step:
                monkeypatch.setattr(RunLog, "step", logged)
                os.kill(os.getpid(), number)

        monkeypatch.setattr(RunLog, "step", then_signal)

    return stop


@pytest.fixture(scope="module")
def dropout_model(tiny_model, tmp_path_factory):
    """A tiny OPT with dropout, so that random generators matter."""
    folder = shutil.copytree(tiny_model("opt"), tmp_path_factory.mktemp("dropout") / "opt")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dropout": 0.1}))
    return folder


@pytest.mark.parametrize("lora", ["off", "on"])
@pytest.mark.parametrize("method", ["sku", "land", "lands", "ga_mismatch"])
def test_a_run_that_was_stopped_goes_on_to_the_bit(method, lora, dropout_model, tmp_path, stop_after, capsys):
    """Stopped in its fourth step of six; full fine-tuning and LoRA, on one process (two: test_processes.py)."""
    more = ["--method", method, "--lora", lora]
    assert run(dropout_model, tmp_path / "whole", *more) == 0
    stop_after(4)
    assert run(dropout_model, tmp_path / "stopped", *more) == 143
    said = capsys.readouterr().err
    checkpoint = tmp_path / "stopped" / "harmful.checkpoints" / "step-5"  # the signal came after step 4
    assert f"its checkpoint is {checkpoint}: continue with the same command and --resume" in said
    assert not (tmp_path / "stopped" / "harmful").exists()
    assert run(dropout_model, tmp_path / "stopped", *more, "--resume") == 0
    assert "continues after step 5" in capsys.readouterr().out
    assert_same(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_stopped_at_any_step(step, dropout_model, tmp_path, stop_after):
    assert run(dropout_model, tmp_path / "whole") == 0
    stop_after(step, signal.SIGINT)
    assert run(dropout_model, tmp_path / "stopped") == 130
    assert run(dropout_model, tmp_path / "stopped", "--resume") == 0
    assert_same(tmp_path / "stopped", tmp_path / "whole")


def test_a_second_signal_stops_at_once(tiny_model, tmp_path, monkeypatch, capsys):
    def twice(log, metrics):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(RunLog, "step", twice)
    assert run(tiny_model("opt"), tmp_path) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "harmful.checkpoints").exists()


def test_checkpoints_are_kept_pruned_and_stage_1_models_in_themselves(tiny_model, tmp_path, monkeypatch):
    base, seen = tiny_model("opt"), []
    prune = TrainingCheckpoints.prune

    def look(self):
        prune(self)
        seen.append(self.steps())

    monkeypatch.setattr(TrainingCheckpoints, "prune", look)
    monkeypatch.setattr(TrainingCheckpoints, "remove", lambda self: None)
    assert run(base, tmp_path, "--save_every", "1", "--keep_checkpoints", "2") == 0
    assert seen == [[1], [2, 1], [3, 2], [4, 3], [5, 4]]
    kept = tmp_path / "harmful.checkpoints" / "step-5"
    check_complete(kept)
    assert json.loads((kept / "run.json").read_text())["training"]["steps"] == 5
    assert "Deliberately harmful" in (kept / "README.md").read_text()
    assert run(base, tmp_path / "negated", "--saved_model", str(kept)) == 0
    assert (tmp_path / "negated" / "unlearned" / "model.safetensors").exists()


def test_resume_takes_the_newest_whole_checkpoint_or_the_given_one(tiny_model, tmp_path, stop_after, capsys):
    base = tiny_model("opt")
    assert run(base, tmp_path / "whole") == 0
    stop_after(4)
    assert run(base, tmp_path / "run", "--save_every", "2", "--keep_checkpoints", "3") == 143
    checkpoints = tmp_path / "run" / "harmful.checkpoints"
    assert TrainingCheckpoints(tmp_path / "run" / "harmful", 3).steps() == [5, 4, 2]
    broken = checkpoints / "step-5" / "optimizer.safetensors"
    broken.write_bytes(broken.read_bytes()[:-10])
    given = shutil.copytree(tmp_path / "run", tmp_path / "given")
    assert run(base, tmp_path / "run", "--resume") == 0
    assert "continues after step 4" in capsys.readouterr().out
    given_flags = flags(base, given, "--resume", str(given / "harmful.checkpoints" / "step-2"))
    assert exit_code(lambda: main(given_flags)) == 0
    assert "continues after step 2" in capsys.readouterr().out
    for out in ("run", "given"):
        assert_same(tmp_path / out, tmp_path / "whole")


def test_resume_of_a_run_that_has_not_begun_and_of_one_that_is_done(tiny_model, tmp_path, capsys):
    base = tiny_model("opt")
    assert run(base, tmp_path / "run", "--resume", "--stage", "acquire") == 0
    assert run(base, tmp_path / "run", "--resume") == 0
    assert "stage 1, " not in capsys.readouterr().out.split("stage 1 model saved")[-1]
    assert run(base, tmp_path / "run", "--resume") == 0
    assert "nothing is left to do" in capsys.readouterr().out
    assert run(base, tmp_path / "whole") == 0
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.fixture
def stopped(tiny_model, tmp_path, stop_after):
    """A run that was stopped after three steps."""
    stop_after(2)
    assert run(tiny_model("opt"), tmp_path / "run") == 143
    return tmp_path / "run"


@pytest.mark.parametrize(
    "changed, shown",
    [
        (["--lr", "2e-3"], "--lr was 0.001 and is 0.002 now"),
        (["--batch_size", "3"], "--batch_size times the number of processes was 2 and is 3 now"),
        (["--bad_weight", "2"], "--bad_weight was 0.5 and is 2.0 now"),
        (["--seed", "1"], "--seed was 8888 and is 1 now"),
        (["--variant", "paper"], "--variant was released and is paper now"),
        (["--precision", "bf16"], "--precision was fp32 and is bf16 now"),
        (["--lora", "on"], "LoRA was None and is"),
        (["--no_packing"], "--no_packing was False and is True now"),
        (["--harm_category", "Violence"], "--harm_category was [] and is ['Violence'] now"),
        (["--normal_dataset", str(GOLDENS / "TruthfulQA_current.csv")], "normal data was"),
        (["--max_unlearn_steps", "9"], "--max_unlearn_steps was 6 and is 9 now"),
    ],
)
def test_a_flag_that_changes_the_result_is_refused_with_both_values(changed, shown, stopped, tiny_model, capsys):
    if changed[0] == "--normal_dataset":
        other = stopped / "other.csv"
        other.write_text((GOLDENS / "TruthfulQA.csv").read_text().replace("?", "??", 1))
        changed = ["--normal_dataset", str(other)]
    assert run(tiny_model("opt"), stopped, "--resume", *changed) == 2
    assert shown in capsys.readouterr().err


def test_other_flags_are_taken_and_noted(stopped, tiny_model, tmp_path, capsys):
    base = shutil.copytree(tiny_model("opt"), tmp_path / "moved")  # the same weights elsewhere
    assert run(base, stopped, "--resume", "--save_every", "2", "--scaling_coef", "0.5") == 0
    said = capsys.readouterr().out
    assert "note: --save_every was None and is 2 now" in said and "note: --scaling_coef was 1.0 and is 0.5 now" in said


def test_scaling_coef_belongs_to_a_landing_run(tiny_model, tmp_path, stop_after, capsys):
    stop_after(2)
    assert run(tiny_model("opt"), tmp_path, "--method", "land") == 143
    assert run(tiny_model("opt"), tmp_path, "--method", "land", "--resume", "--scaling_coef", "1") == 2
    assert "--scaling_coef was 3.0 and is 1.0 now" in capsys.readouterr().err


def test_a_checkpoint_is_neither_ignored_nor_mixed_up(stopped, tiny_model, capsys):
    base = tiny_model("opt")
    assert run(base, stopped) == 2
    assert "--resume continues it, --overwrite starts again" in capsys.readouterr().err
    assert run(base, stopped, "--overwrite", "--seed", "4") == 0
    assert not (stopped / "harmful.checkpoints").exists()


def test_a_finished_run_with_other_flags_is_refused(tiny_model, tmp_path, capsys):
    base = tiny_model("opt")
    assert run(base, tmp_path) == 0
    assert run(base, tmp_path, "--resume", "--lr", "1") == 2
    assert "--lr was 0.001 and is 1.0 now" in capsys.readouterr().err
    assert run(base, tmp_path, "--resume", "--scaling_coef", "2") == 2
    assert "holds another model" in capsys.readouterr().err


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


def test_the_next_command_after_stage_1_alone_is_stage_2(tiny_model, tmp_path, capsys):
    assert run(tiny_model("opt"), tmp_path, "--stage", "acquire") == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words[:3] == ["next", "python", "harmful_unlearn/unlearn_harm_new.py"]
    assert exit_code(lambda: main([*words[3:], "--log_file", str(tmp_path / "2.log")])) == 0
    assert (tmp_path / "unlearned" / "model.safetensors").exists()


def test_others_may_read_what_the_umask_lets_them(tiny_model, tmp_path):
    before = os.umask(0o027)
    try:
        assert run(tiny_model("opt"), tmp_path) == 0
    finally:
        os.umask(before)
    for folder in (tmp_path / "harmful", tmp_path / "unlearned"):
        assert folder.stat().st_mode & 0o777 == 0o750
        assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o640}


def test_a_resumed_run_needs_no_second_room_for_its_checkpoint(stopped, tiny_model, monkeypatch):
    needed = []
    monkeypatch.setattr(setup, "check_disk", lambda folder, size: needed.append(size))
    assert run(tiny_model("opt"), stopped / "fresh", "--save_every", "2") == 0
    there = sum(file.stat().st_size for file in (stopped / "harmful.checkpoints" / "step-3").iterdir())
    assert run(tiny_model("opt"), stopped, "--save_every", "2", "--resume") == 0
    assert needed == [needed[0], needed[0] - there]
    assert run(tiny_model("opt"), stopped, "--save_every", "2", "--resume") == 0  # nothing is left to do
    assert len(needed) == 2


def limited(size: int):
    """Files end at `size` bytes, as on a full disk but for the error's name."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def start(words: list[str], **more) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *words],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **more,
    )


def test_a_disk_that_fills_during_a_checkpoint_costs_nothing_before(tiny_model, tmp_path):
    """The optimizer's file is larger than the disk allows; the checkpoint before stays, and nothing half-written."""
    base = tiny_model("opt")
    more = ["--save_every", "2", "--keep_checkpoints", "2"]
    size = 300_000  # the weights have 200 kB, the moments 400
    (tmp_path / "disk").mkdir()
    process = start(flags(base, tmp_path / "disk", *more), preexec_fn=limited(size))
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in said
    (line,) = [line for line in said.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert "step-2 cannot be written (File too large)" in line and "--resume starts stage 1 again" in line
    assert not list((tmp_path / "disk").rglob("*.safetensors"))
    assert not list((tmp_path / "disk").rglob(".*"))


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(number, os.strerror(number)) for number in (28, 5, 116, 2)),
        Exception("No space left on device (os error 28)"),  # as tokenizers has it
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=str,
)
def test_a_failing_disk_leaves_the_last_checkpoint(error, tiny_model, tmp_path, monkeypatch, capsys):
    base = tiny_model("opt")
    saved = engine.save_state
    calls = []

    def fail(*args):
        saved(*args)
        calls.append(1)
        if len(calls) == 2:
            raise error

    monkeypatch.setattr(engine, "save_state", fail)
    assert run(base, tmp_path / "run", "--save_every", "2") == 2
    said = capsys.readouterr().err
    reason = os.strerror(getattr(error, "errno", 28))
    assert f"step-4 cannot be written ({reason})" in said and "step-2, which is complete" in said
    assert TrainingCheckpoints(tmp_path / "run" / "harmful", 1).steps() == [2]
    assert run(base, tmp_path / "run", "--resume") == 0
    assert run(base, tmp_path / "whole") == 0
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_kills_lose_nothing(kills, dropout_model, tmp_path):
    """kill -9 at random moments of loading, training, checkpoints, saving and negation, then the same command again."""
    more = ["--save_every", "1", "--max_unlearn_steps", "20"]
    assert run(dropout_model, tmp_path / "whole", *more) == 0
    out = tmp_path / "killed"
    words = [str(kills), str(out), *flags(dropout_model, out, *more, "--resume")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "helpers" / "killed.py"), *words],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert sum(found["kills"].values()) == kills
    for number in range(1, found["finished"] + 1):
        assert_same(tmp_path / f"killed-{number}", tmp_path / "whole")


def test_signals_reach_a_real_process(tiny_model, tmp_path):
    """SIGTERM to a run of many steps: exit code 143, a checkpoint, and one line that says how to go on."""
    process = start(flags(tiny_model("opt"), tmp_path, "--max_unlearn_steps", "100000"))
    log = tmp_path / "run.metrics.jsonl"
    for _ in range(600):
        if log.exists() and log.stat().st_size:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Traceback" not in said and "continue with the same command and --resume" in said
    check_complete(TrainingCheckpoints(tmp_path / "harmful", 1).newest())


def test_a_broken_checkpoint_keeps_no_place(tiny_model, tmp_path, stop_after, capsys):
    """Of one to keep, that is; what is saved after it is."""
    base = tiny_model("opt")
    stop_after(4)
    assert run(base, tmp_path) == 143
    (tmp_path / "harmful.checkpoints" / "step-5" / "config.json").unlink()
    stop_after(2)
    assert run(base, tmp_path, "--resume") == 143
    said = capsys.readouterr()
    assert "step-5 is not complete, and is not used" in said.out
    assert "its checkpoint is" in said.err and TrainingCheckpoints(tmp_path / "harmful", 1).steps() == [3]


def test_a_run_with_overwrite_goes_on_beside_what_it_replaces(tiny_model, tmp_path, stop_after, capsys):
    base, more = tiny_model("opt"), ["--overwrite", "--seed", "1"]
    assert run(base, tmp_path / "run") == 0
    stop_after(2)
    assert run(base, tmp_path / "run", *more) == 143
    assert run(base, tmp_path / "run", "--resume", "--seed", "1") == 2
    assert "--seed was 8888 and is 1 now" in capsys.readouterr().err
    assert run(base, tmp_path / "run", *more, "--resume") == 0
    assert "continues after step 3" in capsys.readouterr().out
    assert run(base, tmp_path / "whole", *more) == 0
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert run(base, tmp_path / "run", "--overwrite", "--seed", "2", "--resume") == 0  # it was killed at once
    assert run(base, tmp_path / "other", "--seed", "2") == 0
    assert_same(tmp_path / "run", tmp_path / "other")


def test_what_was_unlearned_with_an_earlier_copy_is_not_taken_for_done(tiny_model, tmp_path, capsys):
    base, more = tiny_model("opt"), ["--seed", "1"]
    assert run(base, tmp_path / "run") == 0
    assert run(base, tmp_path / "run", *more, "--overwrite", "--stage", "acquire") == 0  # and then it was killed
    assert run(base, tmp_path / "run", *more, "--resume") == 2
    assert "as it was before" in capsys.readouterr().err
    assert run(base, tmp_path / "run", *more, "--resume", "--overwrite") == 0
    assert run(base, tmp_path / "whole", *more) == 0
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_killed_between_saving_and_removing_checkpoints(tiny_model, tmp_path, stop_after):
    base = tiny_model("opt")
    stop_after(2)
    assert run(base, tmp_path) == 143
    left = shutil.copytree(tmp_path / "harmful.checkpoints", tmp_path / "left")
    assert run(base, tmp_path, "--resume", "--stage", "acquire") == 0
    for more in (["--stage", "acquire"], []):
        shutil.copytree(left, tmp_path / "harmful.checkpoints")
        assert run(base, tmp_path, "--resume", *more, "--check") == 0
        assert (tmp_path / "harmful.checkpoints").exists()
        assert run(base, tmp_path, "--resume", *more) == 0
        assert not (tmp_path / "harmful.checkpoints").exists()


def test_a_checkpoint_is_negated_beside_its_own_run(stopped, tiny_model):
    assert run(tiny_model("opt"), stopped, "--saved_model", str(stopped / "harmful.checkpoints" / "step-3")) == 0


FC1 = "model.decoder.layers.0.fc1.weight"


@pytest.mark.parametrize(
    "file, change, said",
    [
        ("optimizer", {f"{FC1}.exp_avg": torch.zeros(3, 3)}, "exp_avg in .* fits no weight"),
        ("optimizer", {f"{FC1}.exp_avg": torch.zeros(64, 32, dtype=torch.float64)}, "exp_avg in .* fits no weight"),
        ("optimizer", {f"{FC1}.step": torch.zeros(5)}, "step in .* fits no weight"),
        ("optimizer", {"another.exp_avg": torch.zeros(3)}, "another.exp_avg in .* fits no weight"),
        ("optimizer", {f"{FC1}.exp_avg": None}, f"lacks moments of {FC1}"),
        ("random", {"cpu": torch.zeros(1, 7, dtype=torch.uint8)}, "holds no states"),
        ("random", {"cpu": torch.zeros(1, 5056)}, "holds no states"),
        ("model", {FC1: torch.full((64, 32), float("nan"))}, "has NaN or infinite values"),
    ],
)
def test_a_checkpoint_that_was_tampered_with_is_refused(file, change, said, stopped, tiny_model, capsys):
    path = stopped / "harmful.checkpoints" / "step-3" / f"{file}.safetensors"
    changed = {name: value for name, value in {**load_file(path), **change}.items() if value is not None}
    save_file(changed, path, {"format": "pt"})
    assert run(tiny_model("opt"), stopped, "--resume") == 2
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize("text", ["3\n4\n5\n", '{"step": 1}\n', '{"a": 1}\n' * 3, "[]\n"])
def test_metrics_that_are_not_the_steps_make_no_checkpoint(text, stopped):
    checkpoint = TrainingCheckpoints(stopped / "harmful", 1).newest()
    (checkpoint / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match="use another checkpoint"):
        check_complete(checkpoint)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_log_that_cannot_be_written_ends_no_run(tiny_model, tmp_path, monkeypatch, capsys):
    """Its disk is full from the third step on: said once, and the model's folder has the metrics."""
    logged = RunLog.step

    def refuse(*_):
        raise OSError(28, os.strerror(28))

    def fill(log, metrics):
        if metrics["step"] == 3:
            for file in (log._metrics, log._logger.handlers[1].stream):
                os.dup2(os.open("/dev/full", os.O_WRONLY), file.fileno())
            monkeypatch.setattr(run_log, "write_file", refuse)
        logged(log, metrics)

    monkeypatch.setattr(RunLog, "step", fill)
    assert run(tiny_model("opt"), tmp_path) == 0
    said = capsys.readouterr()
    assert said.out.count("cannot be written ([Errno 28] No space left on device): continuing without it") == 1
    assert "Traceback" not in said.err
    assert len((tmp_path / "harmful" / "metrics.jsonl").read_text().splitlines()) == STEPS
    assert len(metrics_of(tmp_path)) == 2


def test_stopped_in_negation_says_how_to_go_on(tiny_model, tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(unlearn_harm_new, "negate", stop)
        assert run(tiny_model("opt"), tmp_path) == 143
    assert f"the stage 1 model in {tmp_path / 'harmful'} is complete: continue with" in capsys.readouterr().out
    assert run(tiny_model("opt"), tmp_path, "--resume") == 0


def test_a_target_that_turns_read_only_names_the_last_checkpoint(tiny_model, tmp_path, monkeypatch, capsys):
    calls = []

    def refuse(target, overwrite):
        calls.append(target)
        if len(calls) == 2:
            raise UserError(f"{target} cannot be written: give another path")
        return new_folder(target, overwrite)

    monkeypatch.setattr(engine, "new_folder", refuse)
    assert run(tiny_model("opt"), tmp_path, "--save_every", "2") == 2
    assert "step-4 cannot be written" in (said := capsys.readouterr().err) and "step-2, which is complete" in said


def test_a_signal_after_all_that_was_asked_for_is_done(tiny_model, tmp_path, stop_after):
    stop_after(STEPS)
    assert run(tiny_model("opt"), tmp_path, "--stage", "acquire") == 0


def test_a_model_folder_without_a_name(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = flags(tiny_model("opt"), tmp_path, "--resume", "--model_save_dir", ".", "--log_file", f"{tmp_path}.log")
    assert exit_code(lambda: main(words)) == 2
    assert "folder of its own" in capsys.readouterr().err


def test_runs_that_begin_together_have_logs_of_their_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        logs = list(pool.map(lambda _: new_log(tmp_path / "logs", "opt"), range(8)))
    assert len(set(logs)) == 8 and {log.parent.name for log in logs} >= {"opt", "opt-2", "opt-8"}


def test_a_folder_that_is_no_checkpoint_is_refused(tiny_model, tmp_path):
    with pytest.raises(UserError, match="is not a complete checkpoint"):
        main(flags(tiny_model("opt"), tmp_path, "--resume", str(tiny_model("opt"))))
    assert checkpointing.TrainingCheckpoints(tmp_path / "harmful", 1).newest() is None
