"""Task vectors against the released figures, against their own laws, and against bad input."""

import gc
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Qwen2Config,
)  # fmt: skip

import task_vector
from harmful_unlearn.checkpoints import Checkpoint
from harmful_unlearn.errors import UserError
from harmful_unlearn.negation import negate
from task_vector import TaskVector

GOLDENS = Path(__file__).parent / "goldens"
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
CONFIGS = {
    "opt": OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=32),
    "llama": LlamaConfig(**SMALL, intermediate_size=32, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL, intermediate_size=32, num_key_value_heads=2),
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=32),
}
IDS = torch.arange(3, 13)[None]


def make(architecture, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[architecture], dtype=dtype).eval()


def tuned(model, seed=1, size=0.02):
    """A copy of the model, every parameter moved a little."""
    other = type(model)(model.config).to(model.dtype).eval()
    other.load_state_dict(model.state_dict())
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return other


def saved(model, folder, **how):
    model.save_pretrained(folder, **how)
    return folder


def weights(folder):
    return {
        name: entry
        for file in sorted(folder.glob("*.safetensors"))
        for name, entry in load_file(file).items()
    }


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a
    )


@pytest.fixture
def pair(tmp_path):
    """(base folder, fine-tuned folder), a tied OPT in float32."""
    model = make("opt")
    return saved(model, tmp_path / "base"), saved(tuned(model), tmp_path / "tuned")


# --- the released figures -------------------------------------------------------------------------


def test_golden_in_memory():
    base = AutoModelForCausalLM.from_pretrained(GOLDENS / "model")
    unlearned = (-TaskVector(base, load_file(GOLDENS / "harmful_model.safetensors"))).apply_to(base)
    golden = load_file(GOLDENS / "unlearned_model.safetensors")
    state = unlearned.state_dict()
    assert all(torch.equal(state[name], golden[name]) for name in golden)
    assert unlearned.lm_head.weight is unlearned.model.decoder.embed_tokens.weight


def test_golden_streamed(tmp_path):
    harmful = tmp_path / "harmful"
    harmful.mkdir()
    shutil.copy(GOLDENS / "harmful_model.safetensors", harmful / "model.safetensors")
    negate(GOLDENS / "model", [(harmful, 1.0)], tmp_path / "out", 1.0)
    golden, ours = load_file(GOLDENS / "unlearned_model.safetensors"), weights(tmp_path / "out")
    assert all(torch.equal(ours[name], golden[name]) for name in golden)
    assert {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "run.json",
    } < {file.name for file in (tmp_path / "out").iterdir()}


# --- arithmetic -----------------------------------------------------------------------------------


def test_arithmetic_laws():
    base = make("opt")
    a, b = TaskVector(base, tuned(base, 1)), TaskVector(base, tuned(base, 2))
    name = "model.decoder.layers.0.fc1.weight"
    torch.testing.assert_close((a + b).vector[name], a.vector[name] + b.vector[name])
    assert same(sum([a, b]).vector, (a + b).vector)
    assert same((a - b).vector, (a + -b).vector)
    assert same((2 * a).vector, (a + a).vector) and same((a * 2).vector, (2 * a).vector)
    assert same((-1 * -a).vector, a.vector)
    assert not (a - a).vector[name].any() and a.vector[name].any()
    with pytest.raises(TypeError):
        a + 1
    with pytest.raises(TypeError):
        a * "2"


def test_apply_returns_a_copy_unless_asked():
    base = make("qwen2")
    other = tuned(base)
    before = {name: entry.clone() for name, entry in base.state_dict().items()}
    tau = TaskVector(base, other)
    there = tau.apply_to(base)
    assert same(base.state_dict(), before)
    for name, entry in other.state_dict().items():
        torch.testing.assert_close(there.state_dict()[name], entry)
    half = tau.apply_to(base, scaling_coef=0.5).state_dict()
    torch.testing.assert_close(
        half["model.norm.weight"], (before["model.norm.weight"] + other.model.norm.weight) / 2
    )
    assert tau.apply_to(base, in_place=True) is base
    assert same(base.state_dict(), there.state_dict())


@pytest.mark.parametrize("architecture", ["opt", "llama", "gpt2"])
def test_tied_weights_are_changed_once_and_stay_tied(architecture):
    base = make(architecture)
    other = tuned(base)
    there = TaskVector(base, other).apply_to(base)
    embeddings = there.get_input_embeddings().weight
    assert there.get_output_embeddings().weight is embeddings
    torch.testing.assert_close(embeddings, other.get_input_embeddings().weight)
    # State dicts whose two names share no storage any more, as files may hold them.
    apart = {name: entry.clone() for name, entry in other.state_dict().items()}
    again = TaskVector({name: entry.clone() for name, entry in base.state_dict().items()}, apart).apply_to(
        base
    )
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    torch.testing.assert_close(again.get_input_embeddings().weight, embeddings)


def test_integer_entries_are_left_alone():
    base, other = make("opt"), make("opt", seed=1)
    base.register_buffer("steps", torch.tensor([1, 2]))
    base.register_buffer("mask", torch.tensor([1], dtype=torch.uint8))
    other.register_buffer("steps", torch.tensor([5, 5]))
    tau = TaskVector(base, other)
    assert not {"steps", "mask"} & tau.vector.keys()
    assert tau.apply_to(base).steps.tolist() == [1, 2]


def test_16_bit_is_rounded_once():
    base = make("opt", dtype=torch.bfloat16)
    other = tuned(base)
    tau = TaskVector(base, other)
    name = "model.decoder.layers.1.fc2.weight"
    assert tau.vector[name].dtype == torch.float32
    b, f = base.state_dict()[name], other.state_dict()[name]
    exact = (b.double() - 0.7 * (f.double() - b.double())).bfloat16()
    ours = (-tau).apply_to(base, 0.7).state_dict()[name]
    assert ours.dtype == torch.bfloat16
    assert (ours != exact).float().mean() < 1e-3  # float32 may differ from float64 at a tie
    assert torch.equal(tau.apply_to(base).state_dict()[name], f)


def test_mismatches_are_listed():
    base = make("opt")
    state = dict(base.state_dict())
    state.pop("model.decoder.layers.0.fc1.weight")
    state["new.weight"] = torch.zeros(2)
    state["model.decoder.layers.1.fc1.bias"] = torch.zeros(3)
    with pytest.raises(UserError) as error:
        TaskVector(base, state)
    for part in ("1 missing: model.decoder.layers.0.fc1.weight", "1 extra: new.weight",
                 "1 of another shape: model.decoder.layers.1.fc1.bias ((3,), not (32,))"):  # fmt: skip
        assert part in str(error.value)
    before = {name: entry.clone() for name, entry in base.state_dict().items()}
    with pytest.raises(UserError, match="35 missing.*, \\.\\.\\."):
        TaskVector(vector={"model.decoder.layers.0.fc1.weight": torch.ones(32, 16)}).apply_to(
            base, in_place=True
        )
    assert same(base.state_dict(), before)
    a, b = (TaskVector(vector={name: torch.ones(1)}) for name in "ab")
    with pytest.raises(UserError, match="1 missing: a; 1 extra: b"):
        a + b


def test_save_and_load(tmp_path):
    base = make("llama", dtype=torch.float16)
    tau = TaskVector(base, tuned(base))
    tau.save(tmp_path / "v")
    again = TaskVector.load(tmp_path / "v")
    assert same(again.vector, tau.vector) and again.partial is False
    odd = TaskVector(
        vector={"a": torch.tensor(2.0), "b": torch.zeros(0, 3), "c": torch.ones(3, dtype=torch.float64)},
        partial=True,
    )
    odd.save(tmp_path / "odd")
    again = TaskVector.load(tmp_path / "odd")
    assert same(again.vector, odd.vector) and again.partial
    with pytest.raises(UserError, match="not empty"):
        tau.save(tmp_path / "odd")


def test_norms_by_layer():
    vector = {
        "model.layers.3.a.weight": torch.tensor([3.0]), "model.layers.3.b.bias": torch.tensor([4.0]),
        "lm_head.weight": torch.tensor([[2.0]]), "h.0.x.weight": torch.tensor([1.0]),
        "model.experts.1.up.2.weight": torch.tensor([6.0]),
    }  # fmt: skip
    assert TaskVector(vector=vector).norms() == {
        "model.layers.3": 5.0, "lm_head": 2.0, "h.0": 1.0, "model.experts.1": 6.0,
    }  # fmt: skip


# --- models dispatched over devices ---------------------------------------------------------------


def dispatched(model, how, folder):
    """The model's weights spread over CPU memory and disk by accelerate or transformers."""
    if how == "cpu_offload":
        return cpu_offload(model, execution_device=torch.device("cpu"))
    if how == "all on disk":
        path = saved(model, folder / "checkpoint")
        return AutoModelForCausalLM.from_pretrained(
            path, device_map={"": "disk"}, offload_folder=folder / "offload"
        )
    disk = "model.layers.1" if hasattr(model.model, "layers") else "model.decoder.layers.1"
    places = {name: "cpu" for name, module in model.named_modules() if not list(module.children())}
    places = {name: place for name, place in places.items() if not name.startswith(disk)}
    return dispatch_model(model, {**places, disk: "disk"}, main_device="cpu", offload_dir=folder / "offload")


@pytest.mark.parametrize("how", ["all on disk", "layer on disk", "cpu_offload"])
@pytest.mark.parametrize("architecture", ["opt", "qwen2"])
def test_dispatched_models(architecture, how, tmp_path):
    base = make(architecture)
    harmful = tuned(base)
    expected = (-TaskVector(base, harmful)).apply_to(base)(IDS).logits
    original = base(IDS).logits
    spread = dispatched(make(architecture), how, tmp_path / "base")
    spread_harmful = dispatched(tuned(make(architecture)), how, tmp_path / "harmful")
    assert any(parameter.is_meta for parameter in spread.parameters())
    files = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    tau = TaskVector(spread, spread_harmful)
    unlearned = (-tau).apply_to(spread)
    torch.testing.assert_close(unlearned(IDS).logits, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(spread(IDS).logits, original, rtol=0, atol=1e-6)
    third = tau.apply_to(unlearned)
    (-tau).apply_to(spread, in_place=True)
    torch.testing.assert_close(spread(IDS).logits, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(third(IDS).logits, original, rtol=0, atol=1e-5)
    one = next(name for name in tau.vector if "layers.1" in name)
    fourth = TaskVector(vector={one: 0 * tau.vector[one]}, partial=True).apply_to(unlearned)
    del unlearned, third
    gc.collect()  # the fourth still reads files that its parent wrote
    torch.testing.assert_close(fourth(IDS).logits, expected, rtol=0, atol=1e-6)
    assert all(file.read_bytes() == content for file, content in files.items())
    del spread, fourth
    gc.collect()
    assert not list(tmp_path.rglob("task-vector-*"))


def test_tied_head_on_disk_and_a_file_without_it(tmp_path):
    base = make("opt")
    state = tuned(base).state_dict()
    del state["lm_head.weight"]
    spread = dispatched(make("opt"), "all on disk", tmp_path)
    unlearned = (-TaskVector(spread, state)).apply_to(spread)
    expected = (-TaskVector(base, state)).apply_to(base)
    torch.testing.assert_close(unlearned(IDS).logits, expected(IDS).logits, rtol=0, atol=1e-6)


def test_copy_of_a_dispatched_model_has_no_strings_to_it():
    base = make("opt")
    places = {name: "cpu" for name, module in base.named_modules() if not list(module.children())}
    dispatch_model(base, places, force_hooks=True)
    there = TaskVector(base, base).apply_to(base)
    there.to(torch.float64)
    assert there.dtype == torch.float64 and base.dtype == torch.float32


def test_meta_without_values_is_refused():
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(CONFIGS["opt"])
    with pytest.raises(UserError, match="load the model's weights"):
        TaskVector(empty, make("opt"))
    with pytest.raises(UserError, match="not its state dict"):
        TaskVector(empty.state_dict(), make("opt"))


# --- LoRA adapters --------------------------------------------------------------------------------

LORA = {
    "plain": ("opt", {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}),
    "rslora": ("qwen2", {"r": 4, "lora_alpha": 6, "use_rslora": True,
                         "target_modules": ["q_proj", "down_proj"]}),
    "patterns": ("llama", {"r": 4, "target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"v_proj": 3},
                           "rank_pattern": {"layers.1.self_attn.q_proj": 2}}),
    "conv1d": ("gpt2", {"r": 2, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
}  # fmt: skip


def adapter(base, folder, **settings):
    """A saved adapter whose B is not zero; returns its folder and the merged model."""
    copy = type(base)(base.config).eval()
    copy.load_state_dict(base.state_dict())
    model = get_peft_model(copy, LoraConfig(**settings))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder, model.merge_and_unload()


@pytest.mark.parametrize("kind", LORA)
def test_adapter_equals_the_merged_model(kind, tmp_path):
    architecture, settings = LORA[kind]
    base = make(architecture)
    folder, merged = adapter(base, tmp_path / "adapter", **settings)
    tau, full = TaskVector.from_adapter(folder), TaskVector(base, merged)
    assert tau.partial and tau.vector.keys() <= full.vector.keys()
    for name, entry in full.vector.items():
        torch.testing.assert_close(tau.vector.get(name, torch.zeros_like(entry)), entry, rtol=1e-4, atol=1e-6)
    assert max(entry.abs().max() for entry in tau.vector.values()) > 1e-3
    torch.testing.assert_close(tau.apply_to(base)(IDS).logits, merged(IDS).logits, rtol=1e-4, atol=1e-5)
    assert (full + tau).partial is False and same((tau + full).vector, (full + tau).vector)

    negate(saved(base, tmp_path / "base"), [(folder, 1.0)], tmp_path / "out", 0.5, save_vector=tmp_path / "v")
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert same(streamed, (-tau).apply_to(base, 0.5).state_dict())
    assert (
        same(TaskVector.load(tmp_path / "v").vector, tau.vector) and TaskVector.load(tmp_path / "v").partial
    )
    negate(tmp_path / "base", [(folder, 1.0)], tmp_path / "merged", -1.0)
    card = json.loads((tmp_path / "merged" / "run.json").read_text())
    assert card["harmful"] is True and same(
        weights(tmp_path / "merged"), weights(saved(tau.apply_to(base), tmp_path / "m"))
    )


def test_adapter_on_a_tied_head(tmp_path):
    base = make("opt")
    folder, merged = adapter(base, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    state = load_file(folder / "adapter_model.safetensors")
    state["base_model.model.lm_head.lora_A.weight"] = torch.ones(2, 16)
    state["base_model.model.lm_head.lora_B.weight"] = torch.ones(64, 2)
    save_file(state, folder / "adapter_model.safetensors")
    negate(saved(base, tmp_path / "base"), [(folder, 1.0)], tmp_path / "out", 1.0)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(ours.lm_head.weight, base.lm_head.weight - 8 / 2 * 2)
    assert same(ours.state_dict(), (-TaskVector.from_adapter(folder)).apply_to(base).state_dict())


@pytest.mark.parametrize("settings", [
    {"use_dora": True}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]},
    {"init_lora_weights": "pissa"}, {"target_modules": ["embed_tokens"]}, {"trainable_token_indices": [1, 2]},
])  # fmt: skip
def test_adapters_that_are_more_than_lora_are_refused(settings, tmp_path):
    base = make("qwen2")
    folder, _ = adapter(base, tmp_path / "a", **{"r": 2, "target_modules": ["q_proj"], **settings})
    with pytest.raises(UserError, match="merge it with PEFT"):
        TaskVector.from_adapter(folder)


def test_broken_adapters_are_refused(tmp_path):
    folder, _ = adapter(make("opt"), tmp_path / "a", r=2, target_modules=["q_proj"])
    config = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        TaskVector.from_adapter(folder)
    (folder / "adapter_config.json").write_text(config.replace('"LORA"', '"IA3"'))
    with pytest.raises(UserError, match="peft_type IA3"):
        TaskVector.from_adapter(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="adapter_config.json is missing"):
        TaskVector.from_adapter(folder)


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
    assert (index in names) == (shards[0] == "4KB") and len(list(folder.glob("*.safetensors"))) > 3 * (
        index in names
    )
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
    other = {
        "a": torch.rand(3),
        "b": torch.rand(5),
        "i": torch.zeros(3, dtype=torch.int64),
        "e": torch.zeros(0, 2),
    }
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
    fingerprint = Checkpoint(pair[0]).fingerprint()
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
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=16, vocab_size=40, tie_word_embeddings=True,
    )  # fmt: skip
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
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)], cwd=cwd, capture_output=True, text=True
    )


def test_command(tmp_path, pair):
    done = run(
        "--base", "base", "--finetuned", "tuned", "--output", "out", "--save_vector", "v", cwd=tmp_path
    )
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
        task_vector.main(
            ["--base", str(tmp_path / "v"), "--finetuned", other, "--output", str(tmp_path / "n")]
        )
    with pytest.raises(SystemExit):
        task_vector.main(["--base", base, "--finetuned", other])
