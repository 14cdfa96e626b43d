"""LoRA adapters as task vectors, and negated themselves."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import task_vector
from harmful_unlearn.errors import UserError
from harmful_unlearn.negation.negate import negate, negate_adapter
from harmful_unlearn.storage import safetensors_io
from task_vector import TaskVector
from tests.helpers.tiny_pairs import IDS, LORA, adapter, make, same, saved, tuned, weights


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
    assert same(TaskVector.load(tmp_path / "v").vector, tau.vector) and TaskVector.load(tmp_path / "v").partial
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


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
        {"target_modules": ["embed_tokens"]},
        {"trainable_token_indices": [1, 2]},
    ],
)
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


# --- the unlearning adapter -----------------------------------------------------------------------


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

    theirs, ours = products(folder), products(tmp_path / "out")
    assert all(torch.equal(ours[name], -alpha * theirs[name]) and theirs[name].any() for name in theirs)
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


def test_the_command_writes_adapters(tmp_path):
    base = saved(make("opt"), tmp_path / "base")
    folder, _ = adapter(make("opt"), tmp_path / "adapter", **LORA["plain"][1])
    given = ["--base", str(base), "--finetuned", str(folder)]
    out, both = ["--adapter_output", str(tmp_path / "a")], ["--output", str(tmp_path / "o")]
    task_vector.main([*given, *out, *both, "--scaling_coef", "0.5", "2"])
    for alpha in ("0.5", "2"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "o" / f"alpha-{alpha}")(IDS).logits
        untouched = AutoModelForCausalLM.from_pretrained(base)
        ours = PeftModel.from_pretrained(untouched, tmp_path / "a" / f"alpha-{alpha}").eval()(IDS).logits
        torch.testing.assert_close(ours, model, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="not empty"):
        task_vector.main([*given, *out])
    (tmp_path / "full").mkdir()
    full = str(saved(tuned(make("opt")), tmp_path / "full"))
    new = ["--adapter_output", str(tmp_path / "new"), "--output", str(tmp_path / "model")]
    for finetuned, message in (([str(folder)] * 2, "2 models make no one adapter"), ([full], "is no LoRA adapter")):
        with pytest.raises(UserError, match=f"{message}.*--output"):
            task_vector.main(["--base", str(base), "--finetuned", *finetuned, *new])
        assert not (tmp_path / "new").exists() and not (tmp_path / "model").exists()
    with pytest.raises(UserError, match="lie in one another"):
        same_place = ["--output", str(tmp_path / "x"), "--adapter_output", str(tmp_path / "x" / "y")]
        task_vector.main([*given, *same_place])


@pytest.mark.parametrize("kind", LORA)
def test_stretches_of_an_adapter_equal_the_vector_in_memory(kind, tmp_path, monkeypatch):
    """A delta is computed some rows at a time, on disk and in memory alike."""
    monkeypatch.setattr(safetensors_io, "CHUNK_ELEMENTS", 100)
    architecture, settings = LORA[kind]
    base = make(architecture)
    folder, _ = adapter(base, tmp_path / "adapter", **settings)
    negate(saved(base, tmp_path / "base"), [(folder, 0.7)], tmp_path / "out", 0.3)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert same(ours, (-(0.7 * TaskVector.from_adapter(folder))).apply_to(base, 0.3).state_dict())
