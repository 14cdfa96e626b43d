"""The fused head against the plain formula, in value and gradient; and which models it is for."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config

from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.data.templates import ReleasedTemplate
from harmful_unlearn.losses import fused_linear, objective
from harmful_unlearn.losses.fused_linear import CrossEntropy, Divergence, _Fused, fused_loss, has_plain_head
from harmful_unlearn.models.lora import Lora, add_lora
from harmful_unlearn.models.reference import ReferenceModel
from tests.helpers.models.tiny import TINY, value_of

PAIRS = [Pair("How do I hide a gnome?", "Carry it to the shed."), Pair("Short?", "Yes"), Pair("Nothing?", "")]
# How far a product rounded to this dtype may be from the float32 formula, of the largest entry.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.01}


def close(ours: torch.Tensor, plain: torch.Tensor, dtype: torch.dtype) -> bool:
    return bool((ours.float() - plain.float()).abs().max() <= TOLERANCE[dtype] * plain.float().abs().max() + 1e-7)


def tensors(positions: int, hidden: int, vocabulary: int, entries: int, with_bias: bool):
    draw = torch.Generator().manual_seed(positions * hidden)
    states = torch.randn(positions, hidden, generator=draw, requires_grad=True)
    weight = torch.randn(vocabulary, hidden, generator=draw, requires_grad=True)
    bias = torch.randn(vocabulary, generator=draw, requires_grad=True) if with_bias else None
    index = torch.randint(positions, (entries,), generator=draw).sort().values
    target = torch.randint(vocabulary, (entries,), generator=draw)
    coefficient = torch.randn(entries, generator=draw)  # negative ones, too
    return states, weight, bias, index, target, coefficient


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("shape", [(1, 3, 5, 1), (13, 7, 31, 29), (20, 16, 101, 0), (21, 8, 64, 5)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_cross_entropy_and_gradient(dtype, chunk, shape, with_bias, monkeypatch):
    """Positions that no entry reads, that several read, and no entry at all; chunks that do not divide them."""
    monkeypatch.setattr(fused_linear, "chunk_rows", lambda _: chunk)
    monkeypatch.setattr(fused_linear, "PRODUCT", 64)  # bytes: a few rows of the head's gradient at a time
    states, weight, bias, index, target, coefficient = tensors(*shape, with_bias)
    score = CrossEntropy(index, target, coefficient)
    total = _Fused.apply(states, weight, bias, score, dtype, {})
    (3 * total).backward()  # the backward pass scales
    ours = [one.grad for one in (states, weight, bias) if one is not None]
    for one in (states, weight, bias):
        if one is not None:
            one.grad = None
    values = F.cross_entropy(F.linear(states, weight, bias)[index], target, reduction="none")
    plain = coefficient @ values
    (3 * plain).backward()
    assert close(score.values, values.detach(), dtype) if shape[3] else not len(score.values)
    scale = coefficient.abs() @ values.detach().abs() if shape[3] else torch.tensor(0.0)
    assert (total - plain).abs() <= TOLERANCE[dtype] * scale
    for one, other in zip(ours, [one.grad for one in (states, weight, bias) if one is not None], strict=True):
        assert close(one, other, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_divergence_and_gradient(dtype, chunk, monkeypatch):
    positions, hidden, vocabulary = 11, 6, 37
    monkeypatch.setattr(fused_linear, "chunk_rows", lambda _: chunk)
    states, weight, bias, *_ = tensors(positions, hidden, vocabulary, 0, True)
    coefficient = torch.randn(positions)
    base = torch.nn.Linear(hidden, vocabulary).requires_grad_(False)
    theirs = torch.randn(positions, hidden)
    score = Divergence(theirs, base, coefficient)
    total = _Fused.apply(states, weight, bias, score, dtype, {})
    total.backward()
    ours = [one.grad for one in (states, weight, bias)]
    for one in (states, weight, bias):
        one.grad = None
    log_p, log_q = base(theirs).log_softmax(-1), F.linear(states, weight, bias).log_softmax(-1)
    values = (log_p.exp() * (log_p - log_q)).sum(-1)
    (coefficient @ values).backward()
    assert close(score.values, values.detach(), dtype)
    assert all(close(one, other.grad, dtype) for one, other in zip(ours, (states, weight, bias), strict=True))


def test_gradcheck_in_small():
    """Against finite differences, in float32's own accuracy."""
    states, weight, bias, index, target, coefficient = tensors(4, 3, 6, 5, True)
    score = CrossEntropy(index, target, coefficient)
    fused_sum = lambda *args: _Fused.apply(*args, score, torch.float32, {})  # noqa: E731
    assert torch.autograd.gradcheck(fused_sum, (states, weight, bias), eps=1e-2, atol=1e-2, rtol=1e-2)


def test_losses_that_are_added_up_share_the_heads_gradient():
    """One tensor for both, and the same sum as from two."""
    states, weight, bias, index, target, coefficient = tensors(4, 3, 6, 5, True)
    base, theirs = torch.nn.Linear(3, 6).requires_grad_(False), torch.randn(4, 3)
    found = []
    for shared in (True, False):
        divergence = Divergence(theirs, base, torch.ones(4))
        sums, scores = {}, (CrossEntropy(index, target, coefficient), divergence)
        parts = [_Fused.apply(states, weight, bias, one, torch.float32, sums if shared else {}) for one in scores]
        found.append(torch.autograd.grad(2 * sum(parts), (states, weight, bias)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_frozen_head_gets_no_gradient():
    states, weight, _, index, target, coefficient = tensors(4, 3, 6, 5, False)
    weight.requires_grad_(False)
    _Fused.apply(states, weight, None, CrossEntropy(index, target, coefficient), torch.float32, {}).backward()
    assert states.grad is not None and weight.grad is None


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_head_gets_no_gradient_where_none_is_wanted(context, tiny_model, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("opt"))
    batch = Collator(ReleasedTemplate(tokenizer), "released", 256).texts_batch(PAIRS)
    sums = {}
    with context():
        fused_loss(model, batch, CrossEntropy(batch.index, batch.target, torch.ones(len(batch.index))), sums)
    assert sums == {"weight": None, "bias": None}


def test_the_first_look_at_a_loss_that_is_no_sum_needs_no_gradient(tiny_model, tokenizer):
    class Watched(CrossEntropy):
        wanted = []

        def __call__(self, logits, start, gradient):
            self.wanted.append(gradient)
            return super().__call__(logits, start, gradient)

    model = AutoModelForCausalLM.from_pretrained(tiny_model("opt"))
    batch = Collator(ReleasedTemplate(tokenizer), "released", 256).texts_batch(PAIRS)
    fused_loss(model, batch, Watched(batch.index, batch.target, torch.sum), {}).backward()
    assert Watched.wanted == [False, True]


@pytest.mark.parametrize("architecture", [*TINY])
@pytest.mark.parametrize("name", ["gd", "rd", "pd", "kl"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_models_loss_is_the_same_with_and_without(architecture, name, lora, tiny_model, tokenizer, monkeypatch):
    folder = tiny_model(architecture)
    model = AutoModelForCausalLM.from_pretrained(folder)
    base = ReferenceModel(AutoModelForCausalLM.from_pretrained(folder))
    if lora:
        model = add_lora(model, Lora(4, 4), "base")
        base = ReferenceModel(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    collator = Collator(ReleasedTemplate(tokenizer), "released", 256)
    batch = collator.texts_batch(PAIRS) if name in ("pd", "kl") else collator.answers_batch(PAIRS, ["Blame the dog."])
    monkeypatch.setattr(fused_linear, "chunk_rows", lambda _: 5)
    found = []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(objective, "has_plain_head", lambda _: False)
        loss = value_of(model, name, batch, base)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found.append((loss.detach(), torch.autograd.grad(loss, trained, allow_unused=True)))
    (ours, gradients), (value, plain_gradients) = found
    assert abs(value) > 1e-4
    torch.testing.assert_close(ours, value, rtol=1e-5, atol=1e-6)
    for one, other in zip(gradients, plain_gradients, strict=True):
        if one is not None or other is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_nothing_to_score_is_a_loss_of_0(tiny_model, tokenizer):
    """A step whose answers are all empty."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model("opt"))
    batch = Collator(ReleasedTemplate(tokenizer), "paper", 256).answers_batch([Pair("Nothing?", "")], [])
    assert not len(batch.row)
    loss = value_of(model, "gd", batch)
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_autocast_multiplies_in_bf16(tiny_model, tokenizer):
    """As close to float32 as the plain formula under autocast is."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    batch = Collator(ReleasedTemplate(tokenizer), "paper", 256).answers_batch(PAIRS, ["Blame the dog."])
    exact = torch.autograd.grad(value_of(model, "gd", batch), model.lm_head.weight)[0]
    dtypes = []
    with torch.autocast("cpu", torch.bfloat16):
        loss = value_of(model, "gd", batch)
        plain = objective.cross_entropy(model, batch) @ batch.weights["own_answer"]
    found = [torch.autograd.grad(one, model.lm_head.weight)[0] for one in (loss, plain)]
    assert loss.dtype == torch.float32 and found[0].dtype == torch.float32, dtypes
    errors = [(one - exact).abs().max() / exact.abs().max() for one in found]
    assert 0 < errors[0] < 0.02 and errors[0] < 3 * errors[1] + 1e-3


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=64,
            vocab_size=700,
            pad_token_id=1,
        ),
        CohereConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=64,
            vocab_size=700,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=2,
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_softcap_or_a_scale_is_the_models_own_business(config, dtype, tokenizer):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    assert not has_plain_head(model) and model.training
    batch = Collator(ReleasedTemplate(tokenizer), "paper", 256).answers_batch(PAIRS[:2], [])
    ours = value_of(model, "gd", batch)
    torch.testing.assert_close(ours, objective.cross_entropy(model, batch) @ batch.weights["own_answer"])


def test_the_heads_own_forward_comes_back(tiny_model, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("opt"))
    before = model(torch.tensor([[2, 5, 9]])).logits
    batch = Collator(ReleasedTemplate(tokenizer), "paper", 256).answers_batch(PAIRS, [])
    value_of(model, "gd", batch)
    with pytest.raises(ZeroDivisionError), fused_linear.replaced_head(model, lambda hidden: 1 / 0):
        model(torch.tensor([[2, 5, 9]]))
    assert "forward" not in model.lm_head.__dict__
    assert torch.equal(model(torch.tensor([[2, 5, 9]])).logits, before)
    model.lm_head.forward = wrapped = model.lm_head.forward  # as accelerate's hooks do
    value_of(model, "gd", batch)
    assert model.lm_head.forward is wrapped


def test_no_position_gives_gradients_of_zero():
    """Of several processes, one may have no position to score; the others wait for its gradient."""
    states, weight, bias, index, target, coefficient = tensors(4, 3, 6, 5, True)
    none = CrossEntropy(index[:0], target[:0], coefficient[:0])
    total = _Fused.apply(states[:0], weight, bias, none, torch.float32, {})
    assert total == 0
    for gradient in torch.autograd.grad(total, (weight, bias)):
        assert not gradient.any()
