"""The reference model."""

from transformers import AutoModelForCausalLM

from harmful_unlearn.models.reference import ReferenceModel


def test_frozen_base_is_frozen(tiny_model):
    base = ReferenceModel(AutoModelForCausalLM.from_pretrained(tiny_model("opt")).train())
    with base.active() as model:
        assert not model.training and not any(p.requires_grad for p in model.parameters())
