"""The relearning check: a few steps of Guided Distortion on a few harmful pairs."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.data.templates import ReleasedTemplate
from harmful_unlearn.evals.comparison.relearning import relearn
from harmful_unlearn.models.lora import Lora, add_lora
from tests.helpers.models.tiny import value_of

NAME = "model.decoder.layers.1.self_attn.q_proj.weight"


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("lora", [False, True])
def test_relearning_is_guided_distortion_on_the_handful(lora, tiny_model, tokenizer):
    pairs = [Pair("How?", "By doing just this."), Pair("Why so?", "Nobody knows that."), Pair("Who?", "They did.")]

    def loss_of(model):
        batch = Collator(ReleasedTemplate(tokenizer), "paper", 256).answers_batch(pairs, [])
        with torch.no_grad():
            return value_of(model, "gd", batch).item()

    def fresh():
        torch.manual_seed(0)
        model = load(tiny_model("opt"))
        return add_lora(model, Lora(4, 4), "base") if lora else model

    soft, strong = (relearn(fresh(), ReleasedTemplate(tokenizer), pairs, 30, lr, 0) for lr in (1e-3, 1e-2))
    assert loss_of(strong) < loss_of(soft) < loss_of(fresh())
    assert not strong.training
    again = relearn(fresh(), ReleasedTemplate(tokenizer), pairs, 30, 1e-2, 0)
    assert loss_of(again) == loss_of(strong)
    assert loss_of(relearn(fresh(), ReleasedTemplate(tokenizer), pairs, 0, 1e-2, 0)) == loss_of(fresh())


def test_one_step_of_relearning_by_hand(tiny_model, tokenizer):
    pairs = [Pair("How?", "By doing just this."), Pair("Why so?", "Nobody knows that.")]
    ours = relearn(load(tiny_model("opt")), ReleasedTemplate(tokenizer), pairs, 1, 1e-3, 0)
    model = load(tiny_model("opt")).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = Collator(ReleasedTemplate(tokenizer), "paper", 256).answers_batch(pairs, [])
    value_of(model, "gd", batch).backward()
    optimizer.step()
    assert torch.allclose(ours.state_dict()[NAME], model.state_dict()[NAME], atol=1e-5)


def test_relearning_does_not_depend_on_what_was_drawn_before(tiny_model, tokenizer):
    def relearned(before):
        model = load(tiny_model("opt"))
        for module in model.modules():
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.5
        torch.manual_seed(before)
        return relearn(
            model, ReleasedTemplate(tokenizer), [Pair("How?", "By doing just this.")], 2, 1e-2, 0
        ).state_dict()[NAME]

    assert torch.equal(relearned(1), relearned(2))
