"""The likelihood of answers: by hand, whatever the layout of the rows."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig

from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.prompt_format import Pair, format_pair, format_prefix
from harmful_unlearn.data.templates import ReleasedTemplate
from harmful_unlearn.evals.inference import likelihood
from harmful_unlearn.evals.inference.likelihood import answer_nll

PAIRS = [
    Pair("Why?", "Because it is so."),
    Pair("What is the longest of questions?", "No"),
    Pair("And?", ""),
    Pair("Why?", "Because it is."),
    Pair("Why?", ""),
    Pair("Why?", "Because it is so."),
    Pair("Why?", "Nobody knows why, and nobody asks."),
]


def by_hand(model, tokenizer, pair: Pair) -> tuple[float, int]:
    ids = tokenizer(format_pair(pair.question, pair.answer)).input_ids
    prefix = tokenizer(format_prefix(pair.question).rstrip()).input_ids
    start = next((at for at, (a, b) in enumerate(zip(ids, prefix, strict=False)) if a != b), len(prefix))
    start = start if pair.answer else len(ids)
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return -sum(logs[at - 1, ids[at]].item() for at in range(start, len(ids))), len(ids) - start


@pytest.mark.parametrize("tokens", [2048, 40, 1])
@pytest.mark.parametrize("architecture", ["opt", "llama", "qwen2", "bloom"])
def test_by_hand(architecture, tokens, tiny_model, tokenizer, monkeypatch):
    """Packed behind their question, in several passes, and plain where the model cannot read packed rows (BLOOM)."""
    monkeypatch.setattr(likelihood, "TOKENS", tokens)
    if architecture == "bloom":
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=700))
    else:
        model = AutoModelForCausalLM.from_pretrained(tiny_model(architecture))
    model.eval()
    scored = answer_nll(model, Collator(ReleasedTemplate(tokenizer), "paper", 256), PAIRS, "")
    for pair, (nll, count) in zip(PAIRS, scored, strict=True):
        expected, expected_count = by_hand(model, tokenizer, pair)
        assert count == expected_count and nll == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert scored[2] == scored[4] == (0.0, 0)


def test_a_question_is_read_once_for_all_its_answers(tiny_model, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()
    read = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: read.append(args[0].shape))
    collator = Collator(ReleasedTemplate(tokenizer), "paper", 256)
    answer_nll(model, collator, PAIRS, "")
    separate = sum(len(text.input_ids) for text in collator.encode(PAIRS))
    assert read[-1][0] == 1 and read[-1][1] < 0.75 * separate


def test_a_broken_model_has_finite_figures(tiny_model, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    (nll, tokens), *_ = answer_nll(model, Collator(ReleasedTemplate(tokenizer), "paper", 256), PAIRS, "")
    assert nll == likelihood.WORST * tokens
