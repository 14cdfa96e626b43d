"""LoRA adapters as task vectors."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from harmful_unlearn.errors import UserError
from harmful_unlearn.negation.lora_adapter import LoraAdapter
from harmful_unlearn.negation.negate import negate
from harmful_unlearn.storage import safetensors_io
from task_vector import TaskVector
from tests.helpers.models.tiny_pairs import IDS, LORA, adapter, adapter_vector, make, same, saved, weights


@pytest.mark.parametrize("kind", LORA)
def test_adapter_equals_the_merged_model(kind, tmp_path):
    architecture, settings = LORA[kind]
    base = make(architecture)
    folder, merged = adapter(base, tmp_path / "adapter", **settings)
    tau, full = adapter_vector(folder), TaskVector(base, merged)
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
    assert same(ours.state_dict(), (-adapter_vector(folder)).apply_to(base).state_dict())


@pytest.mark.parametrize("kind", LORA)
def test_chunks_of_an_adapter_equal_the_vector_in_memory(kind, tmp_path, monkeypatch):
    """A delta is computed some rows at a time, on disk and in memory alike."""
    monkeypatch.setattr(safetensors_io, "CHUNK_ELEMENTS", 100)
    architecture, settings = LORA[kind]
    base = make(architecture)
    folder, _ = adapter(base, tmp_path / "adapter", **settings)
    negate(saved(base, tmp_path / "base"), [(folder, 0.7)], tmp_path / "out", 0.3)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert same(ours, (-(0.7 * adapter_vector(folder))).apply_to(base, 0.3).state_dict())


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
        LoraAdapter(folder)


def test_broken_adapters_are_refused(tmp_path):
    folder, _ = adapter(make("opt"), tmp_path / "a", r=2, target_modules=["q_proj"])
    config = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        LoraAdapter(folder)
    (folder / "adapter_config.json").write_text(config.replace('"LORA"', '"IA3"'))
    with pytest.raises(UserError, match="peft_type IA3"):
        LoraAdapter(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="adapter_config.json is missing"):
        LoraAdapter(folder)
