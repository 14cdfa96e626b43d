"""The values of negated models: the goldens, and the task vector in memory, for any dtype, shards and chunks."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from harmful_unlearn.errors import UserError
from harmful_unlearn.negation.negate import negate
from task_vector import TaskVector
from tests.helpers.models.tiny import GOLDENS
from tests.helpers.models.tiny_pairs import adapter, make, same, saved, tuned, weights


def test_golden_streamed(tmp_path):
    harmful = tmp_path / "harmful"
    harmful.mkdir()
    shutil.copy(GOLDENS / "harmful_model.safetensors", harmful / "model.safetensors")
    negate(GOLDENS / "model", [(harmful, 1.0)], tmp_path / "out", 1.0)
    golden, ours = load_file(GOLDENS / "unlearned_model.safetensors"), weights(tmp_path / "out")
    assert all(torch.equal(ours[name], golden[name]) for name in golden)
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "run.json"} < {
        file.name for file in (tmp_path / "out").iterdir()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shards", [("1GB", "1GB"), ("4KB", "1GB"), ("4KB", "7KB")])
@pytest.mark.parametrize("architecture", ["opt", "qwen2"])
def test_streaming_equals_in_memory(architecture, shards, dtype, tmp_path):
    base = make(architecture, dtype=dtype)
    a, b = tuned(base, 1), tuned(base, 2)
    folder = saved(base, tmp_path / "base", max_shard_size=shards[0])
    parts = [(saved(a, tmp_path / "a", max_shard_size=shards[1]), 1.0), (saved(b, tmp_path / "b"), -0.3)]
    negate(folder, parts, tmp_path / "out", 0.7, save_vector=tmp_path / "v")
    tau = TaskVector(base, a) + -0.3 * TaskVector(base, b)
    expected = (-tau).apply_to(base, 0.7)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert ours.dtype == dtype and same(ours.state_dict(), expected.state_dict())
    assert same(TaskVector.load(tmp_path / "v").vector, tau.vector)

    names = {file.name for file in folder.iterdir()}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names | {"README.md", "run.json"}
    index = "model.safetensors.index.json"
    assert (index in names) == (shards[0] == "4KB") and len(list(folder.glob("*.safetensors"))) > 3 * (index in names)
    if index in names:
        assert json.loads((tmp_path / "out" / index).read_text()) == json.loads((folder / index).read_text())
        assert len(list((tmp_path / "v").glob("*.safetensors"))) > 3
    negate(folder, [(tmp_path / "v", 1.0)], tmp_path / "again", 0.7)
    assert same(weights(tmp_path / "again"), weights(tmp_path / "out"))


def test_vectors_are_one_format(tmp_path, pair):
    base, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in pair)
    TaskVector(base, other).save(tmp_path / "v")
    negate(pair[0], [(tmp_path / "v", 1.0)], tmp_path / "from_vector", 1.0)
    negate(pair[0], [(pair[1], 1.0)], tmp_path / "from_model", 1.0)
    assert same(weights(tmp_path / "from_vector"), weights(tmp_path / "from_model"))


def test_mixed_dtypes_and_integers_stream(tmp_path):
    base = {
        "a": torch.rand(3, dtype=torch.float64),
        "b": torch.rand(5).half(),
        "i": torch.arange(3),
        "e": torch.zeros(0, 2),
    }
    other = {"a": torch.rand(3), "b": torch.rand(5), "i": torch.zeros(3, dtype=torch.int64), "e": torch.zeros(0, 2)}
    for name, state in (("base", base), ("other", other)):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    negate(tmp_path / "base", [(tmp_path / "other", 1.0)], tmp_path / "out", 1.0, save_vector=tmp_path / "v")
    ours = weights(tmp_path / "out")
    assert torch.equal(ours["i"], base["i"])
    assert torch.equal(ours["a"], base["a"] - (other["a"].double() - base["a"]))
    assert torch.equal(ours["b"], (base["b"].float() - (other["b"] - base["b"].float())).half())
    assert same(TaskVector.load(tmp_path / "v").vector, TaskVector(base, other).vector)


def test_many_threads_and_chunks_equal_in_memory(chunked_pair, threads, tmp_path):
    base, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in chunked_pair)
    negate(chunked_pair[0], [(chunked_pair[1], 0.7)], tmp_path / "out", 0.9, save_vector=tmp_path / "v")
    tau = 0.7 * TaskVector(base, other)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert same(ours, (-tau).apply_to(base, 0.9).state_dict())
    assert same(TaskVector.load(tmp_path / "v").vector, tau.vector)
    assert torch.get_num_threads() == threads  # as it was


def test_an_adapter_leaves_other_entries_as_they_are(chunked_pair, threads, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(chunked_pair[0])
    folder, _ = adapter(base, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    negate(chunked_pair[0], [(folder, 1.0)], tmp_path / "out", 1.0)
    before, after = weights(chunked_pair[0]), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "q_proj.weight" in name}


def test_float16_overflow_is_refused(tmp_path):
    base = make("opt", dtype=torch.float16)
    other = tuned(base)
    with torch.no_grad():
        other.model.decoder.final_layer_norm.weight[3] = -60000.0
    pair = saved(base, tmp_path / "base"), saved(other, tmp_path / "tuned")
    with pytest.raises(UserError, match="final_layer_norm.weight comes out NaN or infinite"):
        negate(pair[0], [(pair[1], 1.0)], tmp_path / "out", 2.0)
    assert not (tmp_path / "out").exists()


def test_large_sums_are_not_taken_for_infinite(tmp_path):
    """The quick check adds all values up, which overflows where none of them does."""
    for name, value in (("base", 60000.0), ("tuned", 59000.0)):
        (tmp_path / name).mkdir()
        save_file({"a": torch.full((100,), value).half()}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    negate(tmp_path / "base", [(tmp_path / "tuned", 1.0)], tmp_path / "out", 1.0)
    assert weights(tmp_path / "out")["a"].tolist() == [60992.0] * 100
