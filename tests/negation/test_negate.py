"""How models are written: every alpha from one read, on several threads, completely or not at all, in little memory."""

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from harmful_unlearn.cli import exit_code
from harmful_unlearn.errors import UserError
from harmful_unlearn.negation import negate as negate_module
from harmful_unlearn.negation.negate import negate
from harmful_unlearn.storage.files import ROOT
from harmful_unlearn.storage.safetensors_io import SafetensorsFolder, ShardWriter
from tests.helpers.tiny_pairs import same, weights

# --- several alphas -------------------------------------------------------------------------------


def test_one_read_many_alphas(chunked_pair, threads, tmp_path, monkeypatch):
    reads = []
    plain = SafetensorsFolder.read_into
    monkeypatch.setattr(SafetensorsFolder, "read_into", lambda self, *args: reads.append(1) or plain(self, *args))
    negate(chunked_pair[0], [(chunked_pair[1], 1.0)], tmp_path / "one", 1.0)
    once = len(reads)
    alphas = (0.5, 1.0, -1.5, 0.0, 1e-7)
    negate(chunked_pair[0], [(chunked_pair[1], 1.0)], tmp_path / "many", *alphas, save_vector=tmp_path / "v")
    assert len(reads) == 2 * once
    named = ["alpha--1.5", "alpha-0", "alpha-0.5", "alpha-1", "alpha-1e-07"]
    assert sorted(folder.name for folder in (tmp_path / "many").iterdir()) == named
    for alpha in alphas:
        folder = tmp_path / "many" / f"alpha-{alpha:g}"
        negate(chunked_pair[0], [(chunked_pair[1], 1.0)], tmp_path / "alone", alpha, overwrite=True)
        assert same(weights(folder), weights(tmp_path / "alone"))
        assert {file.name for file in folder.iterdir()} == {file.name for file in (tmp_path / "alone").iterdir()}
        record = json.loads((folder / "run.json").read_text())
        assert record["scaling_coef"] == alpha and record["harmful"] == (alpha < 0)
    negate(chunked_pair[0], [(tmp_path / "v", 1.0)], tmp_path / "from_v", 1.0)
    assert same(weights(tmp_path / "from_v"), weights(tmp_path / "many" / "alpha-1"))


# --- completely or not at all ---------------------------------------------------------------------


def test_targets_never_touch_inputs(tmp_path, pair):
    for target in (pair[0], pair[1] / "sub", tmp_path, pair[0] / ".." / "tuned"):
        with pytest.raises(UserError, match="folder of its own"):
            negate(pair[0], [(pair[1], 1.0)], target, 1.0, overwrite=True)
    with pytest.raises(UserError, match="folder of its own"):
        negate(pair[0], [(pair[1], 1.0)], tmp_path / "out", 1.0, save_vector=tmp_path / "out" / "v")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="--overwrite"):
        negate(pair[0], [(pair[1], 1.0)], tmp_path / "out", 1.0)
    negate(pair[0], [(pair[1], 1.0)], tmp_path / "out", 1.0, overwrite=True)
    assert not (tmp_path / "out" / "mine").exists()
    with pytest.raises(UserError, match="not a finite number"):
        negate(pair[0], [(pair[1], 1.0)], tmp_path / "new", float("nan"))


def stopped(pair, tmp_path, kind):
    """Negation of the pair must end with the error `kind`, soon, and leave nothing behind, no thread either."""
    before = threading.active_count()
    with pytest.raises(kind) as error:
        negate(pair[0], [(pair[1], 1.0)], tmp_path / "out", 0.5, 1.0, save_vector=tmp_path / "v")
    assert {file.name for file in tmp_path.iterdir()} == {"base", "tuned"}
    assert threading.active_count() == before
    return error.value


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_a_worker_stops_all(error, chunked_pair, threads, tmp_path, monkeypatch):
    written = []
    plain = ShardWriter.write

    def write(self, values, name, start=0):
        written.append(name)
        if len(written) == 20:
            raise error("a worker's")
        plain(self, values, name, start)

    monkeypatch.setattr(ShardWriter, "write", write)
    number = torch.get_num_threads()
    assert "a worker's" in str(stopped(chunked_pair, tmp_path, error))
    assert len(written) < 400  # of some 2,000
    assert torch.get_num_threads() == number


def test_ctrl_c_stops_all(chunked_pair, threads, tmp_path, monkeypatch):
    """In the main thread, which waits for the workers."""

    class Bar(negate_module.tqdm):
        def update(self, count=1):
            if self.n > 1000:
                raise KeyboardInterrupt
            return super().update(count)

    monkeypatch.setattr(negate_module, "tqdm", Bar)
    stopped(chunked_pair, tmp_path, KeyboardInterrupt)


def test_a_full_disk_is_said_before_the_work(chunked_pair, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(negate_module, "_fill", None)  # is not reached
    assert stopped(chunked_pair, tmp_path, OSError).errno == errno.ENOSPC
    assert exit_code(lambda: negate(chunked_pair[0], [(chunked_pair[1], 1.0)], tmp_path / "out")) == 2
    assert "No space left on device: free some" in capsys.readouterr().err


def test_a_disk_that_fills_up_meanwhile(chunked_pair, threads, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "write", full)
    assert stopped(chunked_pair, tmp_path, OSError).errno == errno.ENOSPC


@pytest.mark.parametrize("side", [0, 1])
def test_a_file_that_shrinks_while_it_is_read(side, chunked_pair, threads, tmp_path, monkeypatch):
    last = max(chunked_pair[side].glob("*.safetensors"))
    plain = negate_module._fill

    def shrink_and_fill(*args):
        with last.open("r+b") as file:
            file.truncate(last.stat().st_size - 20)
        plain(*args)

    monkeypatch.setattr(negate_module, "_fill", shrink_and_fill)
    assert f"{last} became shorter" in str(stopped(chunked_pair, tmp_path, UserError))


# --- memory ---------------------------------------------------------------------------------------

PEAK = """
import os, sys, threading
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from harmful_unlearn.negation.negate import negate

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) // 1024 for line in file if line.startswith("RssAnon"))

before, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
base, tuned, out = map(Path, sys.argv[2:])
negate(base, [(tuned, 1.0)], out, 0.5, 1.0)
done.set()
watcher.join()
print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """Two entries that would take 300 MB each in float32, the fine-tuned model's in another dtype."""
    torch.manual_seed(0)
    for name, dtype in (("base", torch.float16), ("tuned", torch.bfloat16)):
        (tmp_path / name).mkdir()
        state = {entry: torch.randn(300, 250_000).to(dtype) for entry in "ab"}
        save_file(state, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, ROOT, *(tmp_path / name for name in ("base", "tuned", "out"))],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100  # MB
