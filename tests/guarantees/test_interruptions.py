"""Nothing is lost: stopped, killed, and with disks that fill or fail, a run ends as the uninterrupted one does."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from harmful_unlearn import unlearn_harm_new
from harmful_unlearn.errors import UserError
from harmful_unlearn.storage.files import ROOT, new_folder
from harmful_unlearn.training import engine, run_log
from harmful_unlearn.training.checkpointing import TrainingCheckpoints, check_complete
from harmful_unlearn.training.run_log import RunLog
from tests.helpers.running.resumed import STEPS, assert_same, flags, limited, metrics_of, run, start


@pytest.mark.parametrize("lora", ["off", "on"])
@pytest.mark.parametrize(
    "method", ["sku", "lands", *(pytest.param(name, marks=pytest.mark.slow) for name in ("land", "ga_mismatch"))]
)
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


@pytest.mark.parametrize("step, precision", [*((step, "fp32") for step in (1, STEPS)), (2, "bf16")])
def test_stopped_at_any_step(step, precision, dropout_model, tmp_path, stop_after):
    more = ["--precision", precision]
    assert run(dropout_model, tmp_path / "whole", *more) == 0
    stop_after(step, signal.SIGINT)
    assert run(dropout_model, tmp_path / "stopped", *more) == 130
    assert run(dropout_model, tmp_path / "stopped", *more, "--resume") == 0
    assert_same(tmp_path / "stopped", tmp_path / "whole")


def test_a_second_signal_stops_at_once(tiny_model, tmp_path, monkeypatch, capsys):
    def twice(log, metrics):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(RunLog, "step", twice)
    assert run(tiny_model("opt"), tmp_path) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "harmful.checkpoints").exists()


@pytest.mark.slow
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
        OSError(28, os.strerror(28)),
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


@pytest.mark.slow
@pytest.mark.parametrize("kills", [5, 50])
def test_kills_lose_nothing(kills, dropout_model, tmp_path):
    """kill -9 at random moments of loading, training, checkpoints, saving and negation, then the same command again."""
    more = ["--save_every", "1", "--max_unlearn_steps", "20"]
    assert run(dropout_model, tmp_path / "whole", *more) == 0
    out = tmp_path / "killed"
    words = [str(kills), str(out), *flags(dropout_model, out, *more, "--resume")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "helpers" / "running" / "killed.py"), *words],
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


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "processes"), [("'NO'", 1), ("MULTI_CPU", 2)])
def test_a_schedulers_sigterm_leads_to_a_checkpoint_and_the_next_job_ends(engine, processes, tiny_model, tmp_path):
    """scripts/slurm.sh, with stand-ins for the scheduler: a signal to the script alone, and a file for requeueing."""
    config, queued = tmp_path / "cpu.yaml", tmp_path / "queued"
    config.write_text(f"compute_environment: LOCAL_MACHINE\ndistributed_type: {engine}\nuse_cpu: true\n")
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {queued}\n')
    (tmp_path / "scontrol").chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **slurm}
    log = tmp_path / "run.metrics.jsonl"

    def job(steps: int) -> subprocess.Popen:
        words = flags(tiny_model("opt"), tmp_path, "--max_unlearn_steps", str(steps))
        command = [ROOT / "scripts" / "slurm.sh", config, str(processes), *words]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    def wait_for_more_than(size: int) -> None:
        for _ in range(1200):
            if log.exists() and log.stat().st_size > size:
                return
            time.sleep(0.1)

    first = job(100_000)
    wait_for_more_than(0)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=120)
    assert first.returncode != 0 and "continue with the same command and --resume" in said
    checkpoint = TrainingCheckpoints(tmp_path / "harmful", 1).newest()
    check_complete(checkpoint)
    assert queued.read_text() == "requeue 7\n"
    queued.unlink()
    size = log.stat().st_size
    second = job(100_000)  # the same command, as the scheduler gives it again
    wait_for_more_than(size)
    second.send_signal(signal.SIGTERM)
    second.communicate(timeout=120)
    assert TrainingCheckpoints(tmp_path / "harmful", 1).newest().name != checkpoint.name and queued.exists()


@pytest.mark.parametrize(
    "command",
    ["main.py", "task_vector.py"]
    + [f"harmful_unlearn/{name}.py" for name in ("unlearn_harm_new", "evaluation", "reproduce", "demo")],
)
def test_ctrl_c_while_a_command_imports_the_libraries_ends_it_quietly(command, tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run(
        [sys.executable, ROOT / command],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")  # a shell says 130


def test_a_schedulers_sigterm_before_there_are_processes_is_not_lost(tmp_path):
    """The launcher, a stand-in here, takes a while to start them."""
    launcher = tmp_path / "python"
    launcher.write_text(
        f"#!/bin/bash\ntouch {tmp_path}/begun; sleep 2\nbash -c 'sleep 20; exit 0' unlearn_harm_new.py & wait $!\n"
        f"echo $? > {tmp_path}/code; exit 1\n"
    )
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/queued\n')
    for stand_in in (launcher, tmp_path / "scontrol"):
        stand_in.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT), "PYTHON": str(launcher)}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    job = subprocess.Popen([ROOT / "scripts" / "slurm.sh", "x.yaml", "1"], env=environment)
    while not (tmp_path / "begun").exists():
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == 1
    assert (tmp_path / "code").read_text() == "143\n" and (tmp_path / "queued").read_text() == "requeue 7\n"


@pytest.mark.parametrize(
    ("words", "more", "fix"),
    [
        ([], {}, "LAUNCH_FILE PROCESSES"),
        (["x.yaml", "1"], {"SLURM_SUBMIT_DIR": "/"}, "submit the job from there"),
        (["x.yaml", "1"], {"PYTHON": "/no/python"}, "set PYTHON"),
    ],
)
def test_a_job_that_cannot_start_says_why(words, more, fix):
    environment = {**os.environ, "SLURM_SUBMIT_DIR": str(ROOT), **more}
    done = subprocess.run([ROOT / "scripts" / "slurm.sh", *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and fix in done.stderr
    assert done.stderr.count("\n") == 1


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
