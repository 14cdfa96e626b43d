"""Locks of output folders and logs: a second run is refused by name, and what a dead process left is taken over."""

import signal
import subprocess
import sys

import pytest

from harmful_unlearn import demo, evaluation, unlearn_harm_new
from harmful_unlearn.errors import UserError
from harmful_unlearn.negation.negate import negate
from harmful_unlearn.storage.files import ROOT
from harmful_unlearn.storage.lock import locked
from tests.helpers.running.runs import flags

HOLD = """
import sys, time
from pathlib import Path
from harmful_unlearn.storage.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_dead_one_is_replaced(tmp_path):
    folder = tmp_path / "models" / "out"
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=rf"process {process.pid} on .*this machine"), locked(folder):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with locked(folder):
        assert str(process.pid) not in (tmp_path / "models" / ".out.lock").read_text()
    assert not list((tmp_path / "models").iterdir())


def test_a_process_may_lock_its_folder_again_and_leaves_nothing(tmp_path):
    folder, other = tmp_path / "new" / "parents" / "out", tmp_path / "other"
    with pytest.raises(KeyboardInterrupt), locked(folder, other):
        with locked(folder):
            pass
        assert (folder.parent / ".out.lock").exists() and (tmp_path / ".other.lock").exists()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.fixture
def held(tmp_path):
    """Folders in `tmp_path` that a process of another machine holds."""

    def hold(*names: str) -> None:
        for name in names:
            (tmp_path / f".{name}.lock").write_text("4242\nanother-machine\n1\n")

    return hold


def test_the_lock_of_another_machine_is_never_broken(held, tmp_path):
    held("out")
    message = r"process 4242 on another-machine; if that has died, remove .*\.out\.lock"
    with pytest.raises(UserError, match=message), locked(tmp_path / "out"):
        pass
    assert (tmp_path / ".out.lock").exists()


@pytest.mark.parametrize("content", [b"\xff", b"", b"42"])
def test_a_lock_that_says_nothing_is_named(content, tmp_path):
    (tmp_path / ".out.lock").write_bytes(content)
    with (
        pytest.raises(UserError, match=r"another process; if none runs.*remove .*\.out\.lock"),
        locked(tmp_path / "out"),
    ):
        pass


@pytest.mark.parametrize("folder", ["harmful", "unlearned"])
def test_training_waits_for_nobody(folder, held, tiny_model, tmp_path):
    held(folder)
    with pytest.raises(UserError, match=f"{folder} is being written"):
        unlearn_harm_new.main(flags(tiny_model("opt"), tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {f".{folder}.lock"}
    unlearn_harm_new.main(flags(tiny_model("opt"), tmp_path, "--check"))  # which writes nothing


@pytest.mark.parametrize("log", ["run.log", "run"])
def test_a_log_is_not_shared_either(log, held, tiny_model, tmp_path):
    """Nor are the metrics beside it, which have one name with and without .log."""
    held("run.log")
    with pytest.raises(UserError, match="run.log is being written"):
        unlearn_harm_new.main(flags(tiny_model("opt"), tmp_path, "--log_file", str(tmp_path / log)))
    assert {path.name for path in tmp_path.iterdir()} == {".run.log.lock"}


def test_other_commands_wait_for_nobody(held, tiny_model, tmp_path):
    held("out")
    out, base = tmp_path / "out", tiny_model("opt")
    with pytest.raises(UserError, match="being written"):
        demo.main(["--output", str(out), "--worlds_only"])
    with pytest.raises(UserError, match="being written"):
        evaluation.main(["--base", str(base), "--model", f"m={base}", "--output", str(out)])
    with pytest.raises(UserError, match="being written"):
        negate(base, [(base, 1.0)], out)
    assert not out.exists()
