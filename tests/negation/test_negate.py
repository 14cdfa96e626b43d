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
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from harmful_unlearn.cli.running import exit_code
from harmful_unlearn.errors import UserError
from harmful_unlearn.negation import negate as negate_module
from harmful_unlearn.negation.negate import negate, negate_adapter
from harmful_unlearn.storage.files import ROOT
from harmful_unlearn.storage.safetensors_io import SafetensorsFolder, ShardWriter
from tests.helpers.models.tiny_pairs import IDS, LORA, adapter, make, same, saved, weights

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


# --- unlearning adapters ---------------------------------------------------------------------------


def products(folder):
    """B @ A of each adapted weight, in float64."""
    state = {name: entry.double() for name, entry in load_file(folder / "adapter_model.safetensors").items()}
    return {name: entry @ state[name.replace("lora_B", "lora_A")] for name, entry in state.items() if "lora_B" in name}


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("kind", LORA)
def test_the_unlearning_adapter_is_the_negated_model(kind, alpha, tmp_path):
    architecture, settings = LORA[kind]
    base = saved(make(architecture), tmp_path / "base")
    folder, _ = adapter(make(architecture), tmp_path / "adapter", **settings)
    (folder / "tokenizer.json").write_text("{}")
    negate_adapter(base, [(folder, 1.0)], tmp_path / "out", alpha)
    negate(base, [(folder, 1.0)], tmp_path / "full", alpha)

    given, negated = products(folder), products(tmp_path / "out")
    assert all(torch.equal(negated[name], -alpha * given[name]) and given[name].any() for name in given)
    for name, entry in load_file(folder / "adapter_model.safetensors").items():
        written = load_file(tmp_path / "out" / "adapter_model.safetensors")[name]
        assert torch.equal(written, -alpha * entry if "lora_B" in name else entry) and written.dtype == entry.dtype
    untouched = AutoModelForCausalLM.from_pretrained(base)
    before = untouched(IDS).logits
    unlearned = PeftModel.from_pretrained(untouched, tmp_path / "out").eval()(IDS).logits
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full")(IDS).logits
    torch.testing.assert_close(unlearned, full, rtol=0, atol=1e-5)
    assert (before - full).abs().max() > 1e-2
    for name in ("adapter_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_the_unlearning_adapter_is_a_source_itself(tmp_path):
    base = saved(make("opt"), tmp_path / "base")
    folder, _ = adapter(make("opt"), tmp_path / "adapter", **LORA["plain"][1])
    (folder / "run.json").write_text(json.dumps({"harmful": True, "losses_at_the_end": {"gd_loss": 1.0}}))
    negate_adapter(base, [(folder, 1.0)], tmp_path / "negated", 1.0)
    negate(base, [(folder, 1.0)], tmp_path / "unlearned", 1.0)
    negate(base, [(tmp_path / "negated", 1.0)], tmp_path / "again", -1.0)
    assert same(weights(tmp_path / "again"), weights(tmp_path / "unlearned"))

    def record(name):
        return json.loads((tmp_path / name / "run.json").read_text())

    assert record("negated")["harmful"] is False and record("again")["harmful"] is False
    assert record("negated")["scaling_coef"] == 1.0 and record("negated")["stage_1"]["losses_at_the_end"]
    # What it takes away it gives back when it is taken away itself.
    negate(base, [(tmp_path / "negated", 1.0)], tmp_path / "back", 1.0)
    negate_adapter(base, [(folder, 1.0)], tmp_path / "added", -1.0)
    assert record("back")["harmful"] is True and record("added")["harmful"] is True
    assert "Deliberately harmful" in (tmp_path / "added" / "README.md").read_text()


def test_adapters_keep_their_dtype_and_take_coefs(tmp_path):
    base = saved(make("opt"), tmp_path / "base")
    folder, _ = adapter(make("opt"), tmp_path / "adapter", **LORA["plain"][1])
    state = {name: entry.bfloat16() for name, entry in load_file(folder / "adapter_model.safetensors").items()}
    save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})
    negate_adapter(base, [(folder, 0.3)], tmp_path / "out", 1.5)
    for name, entry in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        exact = (state[name].float() * (-1.5 * 0.3)).bfloat16() if "lora_B" in name else state[name]
        assert torch.equal(entry, exact) and entry.dtype == torch.bfloat16


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
@pytest.mark.slow
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
