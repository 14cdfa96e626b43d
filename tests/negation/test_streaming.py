"""How checkpoints are streamed: by stretches and threads, at many scales, in little memory, whole or not at all."""

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
from transformers import AutoModelForCausalLM

import harmful_unlearn.negation.negate as streaming
import task_vector
from harmful_unlearn.cli import exit_code
from harmful_unlearn.errors import UserError
from harmful_unlearn.negation.negate import negate
from harmful_unlearn.storage import safetensors_io
from harmful_unlearn.storage.files import ROOT
from harmful_unlearn.storage.safetensors_io import SafetensorsFolder, ShardWriter, TensorSpec
from task_vector import TaskVector
from tests.helpers.tiny_pairs import adapter, make, same, saved, tuned, weights


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """(base folder, fine-tuned folder), OPT in float16, of many stretches and several shards each."""
    monkeypatch.setattr(safetensors_io, "CHUNK_ELEMENTS", 37)
    model = make("opt", dtype=torch.float16)
    return (
        saved(model, tmp_path / "base", max_shard_size="6KB"),
        saved(tuned(model), tmp_path / "tuned", max_shard_size="9KB"),
    )


@pytest.fixture(params=[1, 4])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_stretches_are_whole_rows_and_all_of_the_entry(monkeypatch):
    monkeypatch.setattr(safetensors_io, "CHUNK_ELEMENTS", 10)
    for shape in ((), (1,), (25,), (7, 3), (2, 50), (3, 2, 2), (0, 3), (3, 0)):
        spans = list(TensorSpec("F32", shape).chunks())
        size, row = torch.empty(shape).numel(), shape[-1] if len(shape) > 1 else 1
        assert [index for span in spans for index in range(span.start, span.stop)] == list(range(size))
        assert all(span.start % row == 0 and span.stop - span.start <= max(10, row) for span in spans)


def test_many_threads_and_stretches_equal_in_memory(pair, threads, tmp_path):
    base, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in pair)
    negate(pair[0], [(pair[1], 0.7)], tmp_path / "out", 0.9, save_vector=tmp_path / "v")
    tau = 0.7 * TaskVector(base, other)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert same(ours, (-tau).apply_to(base, 0.9).state_dict())
    assert same(TaskVector.load(tmp_path / "v").vector, tau.vector)
    assert torch.get_num_threads() == threads  # as it was


# --- several scales -------------------------------------------------------------------------------


def test_one_read_many_scales(pair, threads, tmp_path, monkeypatch):
    reads = []
    plain = SafetensorsFolder.read_into
    monkeypatch.setattr(SafetensorsFolder, "read_into", lambda self, *args: reads.append(1) or plain(self, *args))
    negate(pair[0], [(pair[1], 1.0)], tmp_path / "one", 1.0)
    once = len(reads)
    alphas = (0.5, 1.0, -1.5, 0.0, 1e-7)
    negate(pair[0], [(pair[1], 1.0)], tmp_path / "many", *alphas, save_vector=tmp_path / "v")
    assert len(reads) == 2 * once
    named = ["alpha--1.5", "alpha-0", "alpha-0.5", "alpha-1", "alpha-1e-07"]
    assert sorted(folder.name for folder in (tmp_path / "many").iterdir()) == named
    for alpha in alphas:
        folder = tmp_path / "many" / f"alpha-{alpha:g}"
        negate(pair[0], [(pair[1], 1.0)], tmp_path / "alone", alpha, overwrite=True)
        assert same(weights(folder), weights(tmp_path / "alone"))
        assert {file.name for file in folder.iterdir()} == {file.name for file in (tmp_path / "alone").iterdir()}
        record = json.loads((folder / "run.json").read_text())
        assert record["scaling_coef"] == alpha and record["harmful"] == (alpha < 0)
    negate(pair[0], [(tmp_path / "v", 1.0)], tmp_path / "from_v", 1.0)
    assert same(weights(tmp_path / "from_v"), weights(tmp_path / "many" / "alpha-1"))


def test_scales_of_the_command(pair, tmp_path):
    given = ["--base", str(pair[0]), "--finetuned", str(pair[1]), "--output", str(tmp_path / "o"), "--scaling_coef"]
    task_vector.main([*given, "0.5", "1.0"])
    assert sorted(folder.name for folder in (tmp_path / "o").iterdir()) == ["alpha-0.5", "alpha-1"]
    for twice in (["1", "1.0"], ["0", "-0.0", "2"]):
        with pytest.raises(UserError, match="given twice"):
            task_vector.main([*given, *twice, "--overwrite"])
    with pytest.raises(UserError, match="not empty"):
        task_vector.main([*given, "2"])


# --- whole or not at all --------------------------------------------------------------------------


def stopped(pair, tmp_path, kind, **more):
    """Negation of the pair must end in `kind`, soon, and leave nothing behind, no thread either."""
    before = threading.active_count()
    with pytest.raises(kind) as error:
        negate(pair[0], [(pair[1], 1.0)], tmp_path / "out", 0.5, 1.0, save_vector=tmp_path / "v", **more)
    assert {file.name for file in tmp_path.iterdir()} == {"base", "tuned"}
    assert threading.active_count() == before
    return error.value


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_a_worker_stops_all(error, pair, threads, tmp_path, monkeypatch):
    written = []
    plain = ShardWriter.write

    def write(self, values, name, start=0):
        written.append(name)
        if len(written) == 20:
            raise error("a worker's")
        plain(self, values, name, start)

    monkeypatch.setattr(ShardWriter, "write", write)
    number = torch.get_num_threads()
    assert "a worker's" in str(stopped(pair, tmp_path, error))
    assert len(written) < 400  # of some 2,000
    assert torch.get_num_threads() == number


def test_ctrl_c_stops_all(pair, threads, tmp_path, monkeypatch):
    """In the main thread, which waits for the workers."""

    class Bar(streaming.tqdm):
        def update(self, count=1):
            if self.n > 1000:
                raise KeyboardInterrupt
            return super().update(count)

    monkeypatch.setattr(streaming, "tqdm", Bar)
    stopped(pair, tmp_path, KeyboardInterrupt)


def test_a_full_disk_is_said_before_the_work(pair, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(streaming, "_fill", None)  # is not reached
    assert stopped(pair, tmp_path, OSError).errno == errno.ENOSPC
    assert exit_code(lambda: negate(pair[0], [(pair[1], 1.0)], tmp_path / "out")) == 2
    assert "No space left on device: free some" in capsys.readouterr().err


def test_a_disk_that_fills_up_meanwhile(pair, threads, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "write", full)
    assert stopped(pair, tmp_path, OSError).errno == errno.ENOSPC


@pytest.mark.parametrize("side", [0, 1])
def test_a_file_that_shrinks_while_it_is_read(side, pair, threads, tmp_path, monkeypatch):
    last = max(pair[side].glob("*.safetensors"))
    plain = streaming._fill

    def shrink_and_fill(*args):
        with last.open("r+b") as file:
            file.truncate(last.stat().st_size - 20)
        plain(*args)

    monkeypatch.setattr(streaming, "_fill", shrink_and_fill)
    assert f"{last} became shorter" in str(stopped(pair, tmp_path, UserError))


def test_large_sums_are_not_taken_for_infinite(tmp_path):
    """The quick check adds all values up, which overflows where none of them does."""
    for name, value in (("base", 60000.0), ("tuned", 59000.0)):
        (tmp_path / name).mkdir()
        save_file({"a": torch.full((100,), value).half()}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    negate(tmp_path / "base", [(tmp_path / "tuned", 1.0)], tmp_path / "out", 1.0)
    assert weights(tmp_path / "out")["a"].tolist() == [60992.0] * 100


# --- memory ---------------------------------------------------------------------------------------

PEAK = """
import os, sys, threading
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from harmful_unlearn.negation.negate import negate
from harmful_unlearn.storage.files import ROOT

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


def test_an_adapter_on_a_checkpoint_leaves_other_entries_as_they_are(pair, threads, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(pair[0])
    folder, _ = adapter(base, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    negate(pair[0], [(folder, 1.0)], tmp_path / "out", 1.0)
    before, after = weights(pair[0]), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "q_proj.weight" in name}
