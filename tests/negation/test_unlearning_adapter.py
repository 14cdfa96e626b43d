"""LoRA adapters that are negated themselves."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from harmful_unlearn.negation.negate import negate
from harmful_unlearn.negation.unlearning_adapter import negate_adapter
from tests.helpers.tiny_pairs import IDS, LORA, adapter, make, same, saved, weights


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
