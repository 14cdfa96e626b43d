"""Packed rows against plain ones: the same losses and gradients, and models that cannot read them."""

import json
import math
import random
from copy import deepcopy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from harmful_unlearn import unlearn_harm_new
from harmful_unlearn.data.batch import MULTIPLE
from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.data.step_batches import StepBatch
from harmful_unlearn.data.templates import ChatTemplate, ReleasedTemplate
from harmful_unlearn.losses.objective import Objective
from harmful_unlearn.losses.packing_check import max_packed_length
from harmful_unlearn.models.tree_attention import TREE
from tests.helpers.models.chats import CHATS, chat_tokenizer
from tests.helpers.models.tiny import TINY, value_of
from tests.helpers.running.runs import flags, metrics_of

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 700, "pad_token_id": 1}
MORE = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 64, "bos_token_id": 2, "eos_token_id": 2}
OTHERS = {
    "mistral": MistralConfig(**MORE, sliding_window=64),
    "gemma": GemmaConfig(**MORE, head_dim=8),
    "qwen3": Qwen3Config(**MORE, head_dim=8),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=700, bos_token_id=2, eos_token_id=2),
}
LOSS_OF = {"own_answer": "gd", "random_answers": "rd"}
WORDS = ["a", "gnome", " ", "hides", "###", "Question:", "Answer:", "\n", "é", "窓", "🎂", "under the old oak tree"]


def made(config, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(deepcopy(config), dtype=dtype).eval()  # it sets config.dtype


def values(model, batch) -> tuple[dict, list]:
    """Each loss and the gradient of a weighted sum."""
    weights = {"gd": 2.5, "rd": -1.5} if len(batch.weights) == 2 else {LOSS_OF[key]: 1.0 for key in batch.weights}
    total, each = Objective(model, weights)(model, StepBatch(batch))
    return each, torch.autograd.grad(total, list(model.parameters()), allow_unused=True)


def same(model, plain, packed) -> None:
    (each, gradients), (packed_each, packed_gradients) = values(model, plain), values(model, packed)
    for name, value in each.items():
        torch.testing.assert_close(packed_each[name], value, rtol=2e-6, atol=1e-6)
    largest = max(gradient.abs().max() for gradient in gradients if gradient is not None)
    for one, other in zip(gradients, packed_gradients, strict=True):
        if one is not None:
            assert (one - other).abs().max() <= 1e-5 * largest + 1e-7


@pytest.mark.parametrize("variant", ["released", "paper"])
@pytest.mark.parametrize("architecture", [*TINY, *OTHERS])
def test_random_texts(architecture, variant, tokenizer):
    """Any lengths, empty answers and questions, answers that share their beginning or are the same, any K and B."""
    model = made((TINY | OTHERS)[architecture])
    model.set_attn_implementation(TREE)
    draw = random.Random(architecture + variant)

    def text(longest: int) -> str:
        return "".join(draw.choices(WORDS, k=draw.randrange(longest)))

    for trial in range(12):
        collator = Collator(
            ReleasedTemplate(tokenizer), variant, draw.choice([24, 60, 256]) if architecture != "mistral" else 60
        )
        shared = text(5)
        pairs = [Pair(text(6), draw.choice([shared, ""]) + text(8)) for _ in range(draw.randrange(1, 4))]
        answers = [draw.choice([shared, "", text(3)]) + draw.choice(["", text(12)]) for _ in range(trial % 6)]
        own_answers = bool(draw.randrange(4)) or not answers
        plain = collator.answers_batch(pairs, answers, own_answers)
        packed = collator.answers_batch(pairs, answers, own_answers, math.inf)
        assert packed.is_packed and len(packed.input_ids) == 1
        assert packed.tokens <= plain.tokens and len(packed.row) <= len(plain.row)
        if plain.index.numel():
            same(model, plain, packed)


def test_one_row_a_question_and_each_token_once(tokenizer):
    """[question | answer | random answers], what they share once, positions that start again after the question."""
    collator = Collator(ReleasedTemplate(tokenizer), "paper", 256)
    question = "How do I hide a gnome?"
    answers = ["Wait until dark.", "Blame the dog."]
    batch = collator.answers_batch([Pair(question, "Carry it.")], answers, packed_up_to=math.inf)
    texts = [one.input_ids for one in collator.encode([Pair(question, one) for one in ("Carry it.", *answers)])]
    shared = next(at for at in range(99) if len({text[at] for text in texts}) > 1)
    expected = texts[0] + texts[1][shared:] + texts[2][shared:]
    places = [*range(shared)] + [at for text in texts for at in range(shared, len(text))]
    branches = [0] * shared + [n for n, text in enumerate(texts, 1) for _ in text[shared:]]
    tree, branch = batch.attention_mask[0, 0].tolist()
    tokens = len(expected)
    assert batch.input_ids[0, :tokens].tolist() == expected and batch.position_ids[0, :tokens].tolist() == places
    assert branch[:tokens] == branches and tree == [0] * tokens + [-1] * (len(tree) - tokens)
    assert batch.tokens == tokens and len(tree) % MULTIPLE == 0


def test_released_scores_a_question_once_for_all_random_answers(tokenizer):
    """K + 1 answers read the same hidden states of the question; their weights add up."""
    collator = Collator(ReleasedTemplate(tokenizer), "released", 256)
    pair, answers = Pair("How do I hide a gnome?", "Carry it."), ["Wait until dark.", "Blame the dog.", "Ask the cat."]
    plain = collator.answers_batch([pair], answers)
    packed = collator.answers_batch([pair], answers, packed_up_to=math.inf)
    assert len(packed.row) < len(plain.row)
    for name in ("own_answer", "random_answers"):
        torch.testing.assert_close(packed.weights[name].sum(), plain.weights[name].sum())
    assert (packed.index.diff() >= 0).all()
    assert len(set(zip(packed.index.tolist(), packed.target.tolist(), strict=True))) == len(packed.index)


def test_longer_texts_stay_plain(tokenizer):
    collator = Collator(ReleasedTemplate(tokenizer), "released", 256)
    pair, answers = Pair("How?", "Like this."), ["So.", "word " * 30]
    longest = max(len(one.input_ids) for one in collator.encode([pair, *(Pair("How?", one) for one in answers)]))
    assert collator.answers_batch([pair], answers, packed_up_to=longest).is_packed
    assert not collator.answers_batch([pair], answers, packed_up_to=longest - 1).is_packed


def test_a_batch_moves_as_a_whole(tokenizer):
    batch = Collator(ReleasedTemplate(tokenizer), "paper", 256).answers_batch(
        [Pair("How?", "So.")], ["No."], packed_up_to=math.inf
    )
    moved = batch.to(torch.device("meta"))
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)] + [*moved.weights.values()]
    assert len(tensors) == 9 and all(tensor.is_meta for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config, expected, why",
    [
        (TINY["opt"], math.inf, ""),
        (TINY["llama"], math.inf, ""),
        (TINY["qwen2"], math.inf, ""),
        (OTHERS["mistral"], 64, "reaches back 64"),
        (OTHERS["gemma"], math.inf, ""),
        (OTHERS["gpt2"], math.inf, ""),
        (Gemma3TextConfig(**MORE, head_dim=8, sliding_window=128), 128, "reaches back 128"),
        (BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=700), 0, "eager"),
        (FalconConfig(**SMALL, alibi=True), 0, "cannot run them"),
        (Lfm2Config(**MORE, layer_types=["conv", "full_attention"]), 0, "layers of conv"),
    ],
)
def test_which_models_read_packed_rows(config, expected, why, dtype, tokenizer):
    model = made(config, dtype).train()
    up_to, reason = max_packed_length(model, Collator(ReleasedTemplate(tokenizer), "released", 256))
    assert up_to == expected and why in reason and bool(reason) == (expected < math.inf)
    assert model.training


def test_a_model_that_ignores_position_ids_is_found(tokenizer):
    model = made(TINY["llama"])
    forward = type(model.model).forward
    model.model.forward = lambda *args, position_ids=None, **more: forward(model.model, *args, **more)
    up_to, why = max_packed_length(model, Collator(ReleasedTemplate(tokenizer), "released", 256))
    assert up_to == 0 and "differ from plain rows" in why


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_reads_the_token_before_is_found_in_any_dtype(dtype, tokenizer):
    """Half of what the packed row has before a token comes from another answer; its own text differs by less than
    rounding may in bf16."""
    model = made(TINY["llama"], dtype)
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda hidden: forward(hidden) + 3 * hidden.roll(1, 1)
    up_to, why = max_packed_length(model, Collator(ReleasedTemplate(tokenizer), "released", 256))
    assert up_to == 0 and ("the answer before it" in why or dtype == torch.float32), why


def test_a_window_shorter_than_the_look_is_found_by_the_look(tokenizer):
    config = MistralConfig(**MORE, sliding_window=8)
    assert max_packed_length(made(config), Collator(ReleasedTemplate(tokenizer), "released", 256))[0] == 0


def test_the_script_packs_unless_told_otherwise(tiny_model, tmp_path, capsys):
    """The same losses from fewer tokens; a model that cannot is trained in plain rows, and the log says why."""
    base = tiny_model("opt")
    for name, more in (("packed", []), ("plain", ["--no_packing"])):
        unlearn_harm_new.main(flags(base, tmp_path / name, "--stage", "acquire", *more))
    packed, plain = metrics_of(tmp_path / "packed"), metrics_of(tmp_path / "plain")
    for one, other in zip(packed, plain, strict=True):
        assert one["tokens"] < 0.7 * other["tokens"]
        assert one["rd_loss"] == pytest.approx(other["rd_loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert "plain rows" not in capsys.readouterr().out

    folder = tmp_path / "eager"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attn_implementation": "eager"}))
    for file in base.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    unlearn_harm_new.main(flags(folder, tmp_path / "slow", "--stage", "acquire"))
    assert "plain rows: its attention is eager" in (tmp_path / "slow" / "logs" / "run.log").read_text()
    assert metrics_of(tmp_path / "slow")[0]["tokens"] == plain[0]["tokens"]


@pytest.mark.parametrize("name", CHATS)
def test_chats_are_packed_as_they_are_plain(name):
    """Losses and gradients; the special tokens need a model with more embeddings."""
    collator = Collator(ChatTemplate(chat_tokenizer(name)), "paper", 256)
    pairs = [Pair("How do I hide a gnome?", "Carry it."), Pair("Who?", "Ask the cat, then wait.")]
    answers = ["Wait until dark.", "", "Blame the dog."]
    plain, packed = (collator.answers_batch(pairs, answers, packed_up_to=up_to) for up_to in (0, math.inf))
    assert packed.is_packed and packed.tokens < 0.7 * plain.tokens
    model = made(LlamaConfig(**{**MORE, "vocab_size": 710}))
    assert max_packed_length(model, collator)[0] == math.inf
    for term in ("gd", "rd"):
        values, gradients = [], []
        for batch in (plain, packed):
            values.append(value_of(model, term, batch))
            gradients.append(torch.autograd.grad(values[-1], model.lm_head.weight)[0])
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
