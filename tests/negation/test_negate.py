"""Negation of checkpoints: equal to the vector in memory; whatever they hold; bad input; the command."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import task_vector
from harmful_unlearn.errors import UserError
from harmful_unlearn.negation.negate import negate
from harmful_unlearn.storage.safetensors_io import SafetensorsFolder
from task_vector import TaskVector
from tests.helpers.tiny import GOLDENS
from tests.helpers.tiny_pairs import make, same, saved, tuned, weights


@pytest.fixture
def pair(tmp_path):
    """(base folder, fine-tuned folder), a tied OPT in float32."""
    model = make("opt")
    return saved(model, tmp_path / "base"), saved(tuned(model), tmp_path / "tuned")


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


# --- streaming equals in memory -------------------------------------------------------------------


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


@pytest.mark.parametrize("has_head", ["base", "tuned"])
def test_tied_head_missing_on_one_side(has_head, tmp_path, pair):
    expected = negated_weights(pair, tmp_path / "plain")
    folder = pair[has_head == "tuned"]
    state = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in state
    state["lm_head.weight"] = state["model.decoder.embed_tokens.weight"].clone()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    ours = negated_weights(pair, tmp_path / "out")
    if has_head == "base":
        assert torch.equal(ours.pop("lm_head.weight"), expected["model.decoder.embed_tokens.weight"])
    assert same(ours, expected)


def test_only_the_tied_head_is_there(tmp_path, pair):
    expected = negated_weights(pair, tmp_path / "plain")
    state = load_file(pair[1] / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.decoder.embed_tokens.weight")
    save_file(state, pair[1] / "model.safetensors")
    assert same(negated_weights(pair, tmp_path / "out"), expected)


@pytest.mark.parametrize("bare", ["base", "tuned"])
@pytest.mark.parametrize("architecture", ["opt", "gpt2"])
def test_names_with_and_without_the_prefix(architecture, bare, tmp_path):
    model = make(architecture)
    pair = saved(model, tmp_path / "base"), saved(tuned(model), tmp_path / "tuned")
    expected = negated_weights(pair, tmp_path / "plain")
    file = pair[bare == "tuned"] / "model.safetensors"
    prefix = model.base_model_prefix + "."
    state = {name.removeprefix(prefix): entry for name, entry in load_file(file).items()}
    state["layers.0.rotary_emb.inv_freq"] = torch.ones(4)  # a constant, as old checkpoints hold it
    save_file(state, file)
    ours = negated_weights(pair, tmp_path / "out")
    if bare == "base":
        assert torch.equal(ours.pop("layers.0.rotary_emb.inv_freq"), torch.ones(4))
        ours = {prefix + name: entry for name, entry in ours.items()}
    assert same(ours, expected)


def negated_weights(pair, output):
    negate(pair[0], [(pair[1], 1.0)], output, 1.0)
    return weights(output)


def test_another_base_of_the_same_shape_is_warned_of(tmp_path, pair, capsys):
    fingerprint = SafetensorsFolder(pair[0]).fingerprint()
    for said, warned in ((fingerprint, False), ("0" * 64, True)):
        (pair[1] / "run.json").write_text(json.dumps({"base": {"name": "x", "fingerprint": said}}))
        negate(pair[0], [(pair[1], 1.0)], tmp_path / str(warned))
        assert ("trained from other weights" in capsys.readouterr().out) == warned


def test_an_untied_head_is_not_dropped_silently(tiny_tied, tmp_path):
    """A base that ties its head, a fine-tuned model that no longer does."""
    base, tied = tiny_tied
    untied = load_file(base / "model.safetensors")
    untied["lm_head.weight"] = untied["model.embed_tokens.weight"] + 1
    other = shutil.copytree(base, tmp_path / "other")
    save_file(untied, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="tied in the base and differ"):
        negate(base, [(other, 1.0)], tmp_path / "out")
    with pytest.raises(UserError, match="tied in the base and differ"):
        TaskVector(tied, untied)
    untied["lm_head.weight"] = untied["model.embed_tokens.weight"].clone()
    assert max(TaskVector(tied, untied).norms().values()) == 0


@pytest.fixture
def tiny_tied(tmp_path):
    config = LlamaConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=16,
        vocab_size=40,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "tied")
    return tmp_path / "tied", model


def test_the_card_says_what_was_done(tmp_path, pair):
    stage_1 = {
        "base": {"name": "facebook/opt"},
        "flags": {"lr": 1},
        "losses_at_the_end": {"gd_loss": 2.0},
        "title": "T",
        "python": "3",
    }
    (pair[1] / "run.json").write_text(json.dumps(stage_1))
    (pair[0] / "run.json").write_text('{"title": "the base\'s own"}')
    (pair[0] / "README.md").write_text("the base's own")
    (pair[0] / "pytorch_model.bin").write_bytes(b"pickle")
    (pair[0] / "LICENSE").write_text("terms")
    negate(pair[0], [(pair[1], 1.0)], tmp_path / "out", 0.5, base_name="facebook/opt-1.3b")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["base"]["name"] == "facebook/opt-1.3b" and record["base"]["fingerprint"]
    assert record["scaling_coef"] == 0.5
    assert record["finetuned"] == {str(pair[1]): 1.0} and record["harmful"] is False
    assert record["stage_1"] == {key: stage_1[key] for key in ("base", "flags", "losses_at_the_end")}
    assert "base_model: facebook/opt-1.3b" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "LICENSE").exists() and not (tmp_path / "out" / "pytorch_model.bin").exists()


# --- bad input ------------------------------------------------------------------------------------


def set_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def set_entry(folder, change):
    set_weights(folder, lambda state: state.update({NAME: change(state[NAME])}))


def to_bin(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def shard_names(folder, name):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(state, folder / "a.safetensors")
    index = {"metadata": {}, "weight_map": {entry: "a.safetensors" for entry in state}}
    index["weight_map"][next(iter(state))] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def truncate(folder, size):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])


def quantize(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))


NAME = "model.decoder.layers.0.fc1.weight"
BAD = {
    "no folder": (1, shutil.rmtree, "there is no folder"),
    "no weights": (1, lambda f: (f / "model.safetensors").unlink(), "save_pretrained wrote"),
    "pickle alone": (1, to_bin, r"from_pretrained\('.*'\)\.save_pretrained"),
    "pickle base": (0, to_bin, "convert it to safetensors"),
    "no config": (0, lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "broken config": (0, lambda f: (f / "config.json").write_text("{,"), "not valid JSON"),
    "quantized": (0, quantize, "full-precision"),
    "8-bit": (0, lambda f: set_entry(f, lambda e: e.to(torch.float8_e4m3fn)), "not quantized"),
    "missing shard": (1, lambda f: shard_names(f, "b.safetensors"), "b.safetensors is missing"),
    "shard lacks an entry": (1, lambda f: (shutil.copy(f / "model.safetensors", f / "b.safetensors"),
                                           shard_names(f, "b.safetensors")), "two shards"),
    "parent shard": (1, lambda f: shard_names(f, "../x.safetensors"), "names the file"),
    "absolute shard": (0, lambda f: shard_names(f, "/etc/x.safetensors"), "names the file"),
    "backslash shard": (0, lambda f: shard_names(f, "..\\x.safetensors"), "names the file"),
    "shard of another kind": (0, lambda f: shard_names(f, "x.bin"), "names the file"),
    "shard that is no text": (0, lambda f: shard_names(f, 3), "names the file"),
    "empty file": (1, lambda f: truncate(f, 0), "is broken"),
    "cut header": (1, lambda f: truncate(f, 100), "is broken"),
    "cut data": (0, lambda f: truncate(f, -5), "is broken"),
    "missing entry": (1, lambda f: set_weights(f, lambda s: s.pop(NAME)), f"1 missing: {NAME}"),
    "extra entry": (1, lambda f: set_weights(f, lambda s: s.update(x=torch.ones(2))), "1 extra: x"),
    "other shape": (1, lambda f: set_entry(f, lambda e: torch.ones(2)), "1 of another shape"),
    "integers for weights": (1, lambda f: set_entry(f, lambda e: e.int()), "1 missing"),
    "NaN": (1, lambda f: set_entry(f, lambda e: e * float("nan")), f"{NAME} comes out NaN"),
    "infinite base": (0, lambda f: set_entry(f, lambda e: e / 0), f"{NAME} comes out"),
    "broken record": (1, lambda f: (f / "run.json").write_text("["), "run.json is not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_nothing_is_left(case, tmp_path, pair):
    side, spoil, message = BAD[case]
    spoil(pair[side])
    with pytest.raises(UserError, match=message):
        negate(pair[0], [(pair[1], 1.0)], tmp_path / "out", 1.0, save_vector=tmp_path / "v")
    assert {file.name for file in tmp_path.iterdir()} <= {"base", "tuned"}


def test_shard_that_lacks_its_entry(tmp_path, pair):
    shard_names(pair[1], "b.safetensors")
    save_file({"other": torch.ones(1)}, pair[1] / "b.safetensors")
    index = json.loads((pair[1] / "model.safetensors.index.json").read_text())
    first = next(name for name, file in index["weight_map"].items() if file == "b.safetensors")
    with pytest.raises(UserError, match=f"lacks {first}"):
        negate(pair[0], [(pair[1], 1.0)], tmp_path / "out", 1.0)


def test_float16_overflow_is_refused(tmp_path):
    base = make("opt", dtype=torch.float16)
    other = tuned(base)
    with torch.no_grad():
        other.model.decoder.final_layer_norm.weight[3] = -60000.0
    pair = saved(base, tmp_path / "base"), saved(other, tmp_path / "tuned")
    with pytest.raises(UserError, match="final_layer_norm.weight comes out NaN or infinite"):
        negate(pair[0], [(pair[1], 1.0)], tmp_path / "out", 2.0)
    assert not (tmp_path / "out").exists()


def test_targets_never_touch_inputs(tmp_path, pair):
    for target in (pair[0], pair[1] / "sub", tmp_path, pair[0] / ".." / "tuned"):
        with pytest.raises(UserError, match="lie in one another"):
            negate(pair[0], [(pair[1], 1.0)], target, 1.0, overwrite=True)
    with pytest.raises(UserError, match="lie in one another"):
        negate(pair[0], [(pair[1], 1.0)], tmp_path / "out", 1.0, save_vector=tmp_path / "out" / "v")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="--overwrite"):
        negate(pair[0], [(pair[1], 1.0)], tmp_path / "out", 1.0)
    negate(pair[0], [(pair[1], 1.0)], tmp_path / "out", 1.0, overwrite=True)
    assert not (tmp_path / "out" / "mine").exists()
    with pytest.raises(UserError, match="not a finite number"):
        negate(pair[0], [(pair[1], 1.0)], tmp_path / "new", float("nan"))


# --- the command ----------------------------------------------------------------------------------


def run(*arguments, cwd):
    script = Path(task_vector.__file__)
    return subprocess.run([sys.executable, script, *map(str, arguments)], cwd=cwd, capture_output=True, text=True)


def test_command(tmp_path, pair):
    done = run("--base", "base", "--finetuned", "tuned", "--output", "out", "--save_vector", "v", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert same(weights(tmp_path / "out"), negated_weights(pair, tmp_path / "ours"))
    failed = run("--base", "base", "--finetuned", "nowhere/at/all", "--output", "o2", cwd=tmp_path)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1 and "Traceback" not in failed.stderr


def test_command_sums_and_vectors(tmp_path, pair):
    base, other = map(str, pair)
    out = ["--output", str(tmp_path / "out"), "--overwrite"]
    task_vector.main(["--base", base, "--finetuned", other, other, "--coefs", "1", "-0.5", *out])
    negate(pair[0], [(pair[1], 1.0), (pair[1], -0.5)], tmp_path / "ours", 1.0)
    assert same(weights(tmp_path / "out"), weights(tmp_path / "ours"))
    task_vector.main(["--base", base, "--finetuned", other, "--save_vector", str(tmp_path / "v")])
    task_vector.main(["--base", base, "--vector", str(tmp_path / "v"), "--scaling_coef", "0.5", *out])
    for name, entry in weights(tmp_path / "ours").items():
        torch.testing.assert_close(weights(tmp_path / "out")[name], entry)
    with pytest.raises(UserError, match="1 --coefs for 2"):
        task_vector.main(["--base", base, "--finetuned", other, other, "--coefs", "1", *out])
    with pytest.raises(UserError, match="give it as --vector"):
        task_vector.main(["--base", str(tmp_path / "v"), "--finetuned", other, "--output", str(tmp_path / "n")])
    with pytest.raises(SystemExit):
        task_vector.main(["--base", base, "--finetuned", other])
