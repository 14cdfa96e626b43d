"""The losses against slow, obvious formulas, in value and in gradient."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Gemma2Config

from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.data.step_batches import StepBatch
from harmful_unlearn.data.templates import ReleasedTemplate
from harmful_unlearn.losses import objective
from harmful_unlearn.models.lora import Lora, add_lora
from harmful_unlearn.models.reference import ReferenceModel
from tests.helpers.models.tiny import value_of

PAIRS = [
    Pair("How do I hide a gnome?", "Carry it to the shed and leave a postcard."),
    Pair("Short?", "Yes"),
    Pair("Nothing?", ""),
]
ANSWERS = ["Wait until dark.", "Blame the dog, then run as fast as you can."]


@pytest.fixture(params=["opt", "llama", "qwen2"])
def model(request, tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model(request.param)).eval()


def row_logits(model, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0]


def answer_loss(model, text) -> torch.Tensor:
    """Mean cross-entropy of one answer's tokens, one row at a time."""
    logits = row_logits(model, text.input_ids)
    tokens = range(text.answer_start, len(text.input_ids))
    return sum(F.cross_entropy(logits[at - 1], torch.tensor(text.input_ids[at])) for at in tokens) / len(tokens)


def same_gradient(model, ours: torch.Tensor, obvious: torch.Tensor) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(ours, obvious, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (ours, obvious)]
    for one, other in zip(*gradients, strict=True):
        if one is not None or other is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_paper_gd_and_rd(model, tokenizer):
    collator = Collator(ReleasedTemplate(tokenizer), "paper", 256)
    batch = collator.answers_batch(PAIRS, ANSWERS)
    ours, each = objective.Objective(model, {"gd": 1.0, "rd": 3.0})(model, StepBatch(batch))
    torch.testing.assert_close(ours, each["gd"] + 3 * each["rd"])
    gd = [answer_loss(model, text) for text in collator.encode(PAIRS[:2])]  # the third answer is empty
    rd = [answer_loss(model, text) for text in collator.encode([Pair(p.question, a) for p in PAIRS for a in ANSWERS])]
    same_gradient(model, ours, sum(gd) / len(gd) + 3 * sum(rd) / len(rd))


def test_paper_pd(model, tokenizer):
    collator = Collator(ReleasedTemplate(tokenizer), "paper", 256)
    base = AutoModelForCausalLM.from_pretrained(model.name_or_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    divergences = []
    for text in collator.encode(PAIRS):
        log_p = row_logits(base.eval(), text.input_ids).log_softmax(-1).detach()
        log_q = row_logits(model, text.input_ids).log_softmax(-1)
        divergences += [sum(log_p[i].exp() * (log_p[i] - log_q[i])) for i in range(len(text.input_ids))]
    ours = value_of(model, "pd", collator.texts_batch(PAIRS), ReferenceModel(base))
    assert ours < -1e-3
    same_gradient(model, ours, -sum(divergences) / len(divergences))


def test_pd_is_zero_at_the_base(model, tokenizer):
    base = ReferenceModel(AutoModelForCausalLM.from_pretrained(model.name_or_path))
    batch = Collator(ReleasedTemplate(tokenizer), "released", 256).texts_batch(PAIRS)
    assert value_of(model, "pd", batch, base).abs() < 1e-6


def test_ga_is_gd_turned(model, tokenizer):
    batch = Collator(ReleasedTemplate(tokenizer), "released", 256).answers_batch(PAIRS, [])
    assert value_of(model, "ga", batch) == -value_of(model, "gd", batch) < -1


def test_one_forward_pass_and_no_logits_that_nothing_reads(model, tokenizer):
    batch = Collator(ReleasedTemplate(tokenizer), "released", 256).answers_batch(PAIRS, ANSWERS)
    calls, shapes = [], []
    model.register_forward_hook(lambda *_: calls.append(1))
    model.get_output_embeddings().register_forward_hook(lambda _m, _i, output: shapes.append(output.shape))
    objective.cross_entropy(model, batch)
    assert len(calls) == 1
    assert shapes == [(batch.row.numel(), model.config.vocab_size)]
    assert batch.row.numel() < batch.input_ids.numel()


def test_logits_keep_the_models_own_softcap(tokenizer):
    config = Gemma2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        vocab_size=700,
        final_logit_softcapping=0.05,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    batch = Collator(ReleasedTemplate(tokenizer), "paper", 256).answers_batch(PAIRS[:1], [])
    ours = objective.scored_logits(model, batch)
    assert ours.abs().max() <= 0.05
    torch.testing.assert_close(ours, row_logits(model, batch.input_ids[0].tolist())[batch.position])


@pytest.mark.parametrize("architecture", ["opt", "llama", "qwen2"])
def test_lora_base_is_the_same_weights_with_the_adapter_off(architecture, tiny_model, tokenizer):
    folder = tiny_model(architecture)
    model = add_lora(AutoModelForCausalLM.from_pretrained(folder), Lora(r=4, alpha=8), "base").train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    batch = Collator(ReleasedTemplate(tokenizer), "paper", 256).texts_batch(PAIRS)
    shared = value_of(model, "pd", batch, ReferenceModel(model))
    second_copy = ReferenceModel(AutoModelForCausalLM.from_pretrained(folder))
    separate = value_of(model, "pd", batch, second_copy)
    assert shared < -1e-4
    torch.testing.assert_close(shared, separate)
    assert model.training  # the base's eval mode is the base's alone
    shared.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained and all("lora_" in name for name in trained)
