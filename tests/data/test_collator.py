"""Texts to tensors: where answers start, what counts for how much, what is cut."""

import random

import pytest
import torch

from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.prompt_format import Pair, format_pair, format_prefix
from harmful_unlearn.data.templates import ReleasedTemplate

PAIRS = [
    Pair("How do I hide a gnome?", "Carry it to the shed and leave a postcard."),
    Pair("What is a ### Question: in\ntwo lines?", "First this.\n\n### Answer: then that"),
    Pair("Où est le gâteau 🎂?", "Là-bas, près du 窓."),
    Pair("Short?", "Yes"),
    Pair("Nothing?", ""),
    Pair("", "An answer to no question"),
    Pair("Starts with a space?", " indeed, it does"),
]
ANSWERS = ["Wait until dark.", "", "Blame the dog, then run."]


def collator(tokenizer, variant="paper", max_length=256):
    return Collator(ReleasedTemplate(tokenizer), variant, max_length)


def weight_by_row(batch, module):
    sums = torch.zeros(len(batch.input_ids))
    return sums.index_add(0, batch.row, batch.weights[module])


@pytest.mark.parametrize("pair", PAIRS)
def test_encode_finds_the_answer(tokenizer, pair):
    (text,) = collator(tokenizer).encode([pair])
    assert text.input_ids == tokenizer(format_pair(pair.question, pair.answer))["input_ids"]
    assert text.start_loc == len(tokenizer(format_prefix(pair.question))["input_ids"]) - 1
    answer = tokenizer.decode(text.input_ids[text.answer_start :])
    assert answer.strip() == pair.answer.strip()


def test_the_space_before_an_answer_is_the_models_to_say(tokenizer):
    """ "W" after a space is one token or two, as the vocabulary has it; both are scored from the space on."""
    for answer in ("Wait", "窓", "é", "zzz"):
        (text,) = collator(tokenizer).encode([Pair("How?", answer)])
        answer_text = tokenizer.decode(text.input_ids[text.answer_start :])
        before = tokenizer.decode(text.input_ids[: text.answer_start])
        assert answer_text == f" {answer}" or (answer_text == answer and before.endswith(":"))
    (empty,) = collator(tokenizer).encode([Pair("How?", "")])
    assert empty.answer_start == len(empty.input_ids)
    asked = tokenizer(format_prefix("How?").rstrip())["input_ids"]
    assert text.input_ids[: len(asked)] == asked and text.answer_start == len(asked)


def test_paper_scores_each_answer_token_once_and_nothing_else(tokenizer):
    batch = collator(tokenizer).answers_batch(PAIRS, ANSWERS)
    encoded = collator(tokenizer).encode(PAIRS + [Pair(p.question, a) for p in PAIRS for a in ANSWERS])
    expected = [
        (row, at - 1, text.input_ids[at])
        for row, text in enumerate(encoded)
        for at in range(text.answer_start, len(text.input_ids))
    ]
    scored = list(zip(batch.row.tolist(), batch.position.tolist(), batch.target.tolist(), strict=True))
    assert scored == expected
    for module, rows in (("own_answer", slice(0, len(PAIRS))), ("random_answers", slice(len(PAIRS), None))):
        sums = weight_by_row(batch, module)
        assert sums.sum() == pytest.approx(1)
        answered = [len(text.input_ids) > text.answer_start for text in encoded[rows]]
        shares = torch.tensor(answered) / sum(answered)
        torch.testing.assert_close(sums[rows], shares)


def test_released_weights_follow_the_released_formula(tokenizer):
    """Points 9 and 11, written out on the padded rows with the mask in place of `token == 1`."""
    batch = collator(tokenizer, "released").answers_batch(PAIRS, ANSWERS)
    encoded = collator(tokenizer).encode(PAIRS + [Pair(p.question, a) for p in PAIRS for a in ANSWERS])
    length = batch.input_ids.shape[1]
    for module, rows in (("own_answer", range(len(PAIRS))), ("random_answers", range(len(PAIRS), len(encoded)))):
        expected = torch.zeros(len(encoded), length)
        for row in rows:
            start = encoded[row].start_loc if module == "own_answer" else 2
            counted = [i for i in range(length) if i >= start and batch.attention_mask[row, i]]
            for i in counted:
                if i + 1 < length and batch.attention_mask[row, i + 1]:
                    expected[row, i] = 1 / len(counted) / len(rows)
        ours = torch.zeros_like(expected)
        ours[batch.row, batch.position] = batch.weights[module]
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_normal_weights(tokenizer, variant):
    batch = collator(tokenizer, variant).texts_batch(PAIRS)
    ours = torch.zeros(batch.input_ids.shape)
    ours[batch.row, batch.position] = batch.weights["text"]
    counted = batch.attention_mask.float()
    if variant == "released":
        counted[:, : int(counted.sum(1).max())] = 1  # up to the longest text
    torch.testing.assert_close(ours, counted / counted.sum())


def test_modules_that_are_left_out_have_no_rows(tokenizer):
    without_rd = collator(tokenizer).answers_batch(PAIRS, [])
    assert len(without_rd.input_ids) == len(PAIRS) and list(without_rd.weights) == ["own_answer"]
    without_gd = collator(tokenizer).answers_batch(PAIRS, ANSWERS, own_answers=False)
    assert len(without_gd.input_ids) == len(PAIRS) * len(ANSWERS) and list(without_gd.weights) == ["random_answers"]


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_max_length_cuts_answers_and_says_so(tokenizer, variant):
    long = Pair("How long?", "very " * 400)
    (text,) = collator(tokenizer, variant, 32).encode([long])
    assert text.cut and len(text.input_ids) == 32
    assert not collator(tokenizer, variant, 4000).encode([long])[0].cut
    batch = collator(tokenizer, variant, 32).answers_batch([long, Pair("Short?", "Yes")], ["many " * 400])
    assert batch.input_ids.shape[1] == 32
    assert batch.position.max() < 31


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_a_question_that_fills_max_length_scores_nothing_in_gd(tokenizer, variant):
    batch = collator(tokenizer, variant, 8).answers_batch([Pair("word " * 50, "answer")], [])
    assert batch.row.numel() == 0 or batch.weights["own_answer"].sum() == 0


def test_padding_never_counts_as_text(tokenizer):
    batch = collator(tokenizer).answers_batch(PAIRS, ANSWERS)
    lengths = batch.attention_mask.sum(1)
    assert batch.tokens == lengths.sum()
    assert (batch.input_ids[batch.attention_mask == 0] == tokenizer.pad_token_id).all()
    for row, length in enumerate(lengths):
        assert batch.attention_mask[row, :length].all() and not batch.attention_mask[row, length:].any()


def test_random_texts_keep_their_tokens(tokenizer):
    draw = random.Random(0)
    alphabet = "abc ###\n.?é窓🎂:Question Answer"
    for _ in range(50):
        pairs = [Pair(*("".join(draw.choices(alphabet, k=draw.randrange(40))) for _ in range(2))) for _ in range(3)]
        batch = collator(tokenizer).answers_batch(pairs, [pairs[0].answer])
        following = batch.input_ids[batch.row, batch.position + 1]
        assert torch.equal(following, batch.target)
