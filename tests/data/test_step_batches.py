"""The batches of a step: what each loss reads, ahead of time, and for one of several processes."""

import math
from dataclasses import replace

import pytest
import torch

from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.pku_saferlhf import read_harmful
from harmful_unlearn.data.step_batches import StepBatches, answer_pool, run_sampler
from harmful_unlearn.data.templates import ReleasedTemplate
from harmful_unlearn.data.truthfulqa import read_normal
from harmful_unlearn.losses.terms import reads
from tests.helpers.inputs.tables import TODAY, TRUTHFUL, error_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data():
    return {"harmful": read_harmful(str(TODAY)), "normal": read_normal(TRUTHFUL, 0)}


def sampler_of(data, losses, **changes):
    usual = {"batch_size": 4, "k_random": 3, "seed": 5, "all_harmful": False}
    return run_sampler({**usual, **changes}, 1, **data, reads=reads(losses))


def batches_of(data, tokenizer, losses, **more) -> StepBatches:
    collator = Collator(ReleasedTemplate(tokenizer), "paper", 256)
    return StepBatches(collator, sampler_of(data, losses), **data, reads=reads(losses), **more)


def same(batch, expected) -> bool:
    if batch is None or expected is None:
        return batch is expected
    ids = torch.equal(batch.input_ids, expected.input_ids) and torch.equal(batch.target, expected.target)
    return ids and all(torch.equal(batch.weights[key], weight) for key, weight in expected.weights.items())


@pytest.mark.parametrize(
    "losses, weights",
    [
        ({"gd", "rd", "pd"}, ({"own_answer", "random_answers"}, {"text"})),
        ({"gd"}, ({"own_answer"}, None)),
        ({"rd", "pd"}, ({"random_answers"}, {"text"})),
        ({"ga", "rm", "kl"}, ({"own_answer", "random_answers"}, {"text"})),
        ({"ft"}, (None, None, {"own_answer"})),
        ({"ft", "kl"}, (None, {"text"}, {"own_answer"})),
        ({"lp"}, (None, {"text"})),
    ],
)
def test_a_step_has_what_its_losses_read_and_no_more(losses, weights, data, tokenizer):
    (batch,) = batches_of(data, tokenizer, losses)(0, CPU)
    rows = (batch.harmful, batch.normal, batch.normal_answers)[: len(weights)]
    assert tuple(part and set(part.weights) for part in rows) == weights
    assert batch.safe is None and (len(weights) == 3 or batch.normal_answers is None)


def test_batches_ahead_are_those_of_the_steps(data, tokenizer):
    batches = batches_of(data, tokenizer, {"gd", "rd", "pd", "sa"}, packed_up_to=math.inf)
    for steps in (range(0), range(1), range(2, 7)):
        ahead = list(batches.ahead(steps, CPU))
        assert len(ahead) == len(steps)
        for step, prepared in zip(steps, ahead, strict=True):
            assert len(prepared) == 1 and all(map(same, prepared[0], batches(step, CPU)[0]))


def test_processes_share_a_step(data, tokenizer):
    (complete,) = batches_of(data, tokenizer, {"gd", "rd", "pd"})(1, CPU)
    shares = [batches_of(data, tokenizer, {"gd", "rd", "pd"}, share=(process, 2))(1, CPU)[0] for process in (0, 1)]
    for batch, *parts in zip(complete, *shares, strict=True):
        if batch:
            assert sum(part.tokens for part in parts) == batch.tokens
            for key, weight in batch.weights.items():
                torch.testing.assert_close(sum(part.weights[key].sum() for part in parts), weight.sum())


def entries(batch) -> list[tuple]:
    """What is scored, with what weights, after which tokens of the same text."""
    found = []
    columns = (column.tolist() for column in (batch.index, batch.target, *batch.weights.values()))
    for index, target, *weights in zip(*columns, strict=True):
        if not any(weights):
            continue
        row, position = batch.row[index], batch.position[index]
        ids = batch.input_ids[row]
        seen = torch.arange(len(ids)) <= position
        if batch.is_packed:
            tree, branch = batch.attention_mask[0, 0]
            seen &= (tree == tree[position]) & ((branch == 0) | (branch == branch[position]))
        found.append((ids[seen].tolist(), target, [round(weight, 6) for weight in weights]))
    return sorted(found)


@pytest.mark.parametrize("variant", ["released", "paper"])
@pytest.mark.parametrize("packed_up_to", [0, math.inf])
@pytest.mark.parametrize("tokens_per_pass", [math.inf, 90, 1])
@pytest.mark.parametrize("processes", [1, 2, 3, 20])
def test_passes_of_all_processes_are_the_step(variant, packed_up_to, tokens_per_pass, processes, data, tokenizer):
    """Each text counts once, with the same weight, in as many passes for each process."""
    complete = batches_of(data, tokenizer, {"gd", "rd", "pd", "sa"}, packed_up_to=0)
    complete = replace(complete, collator=replace(complete.collator, variant=variant))
    split = replace(complete, packed_up_to=packed_up_to, tokens_per_pass=tokens_per_pass)
    for step in range(3):
        (whole,) = complete(step, CPU)
        passes = [replace(split, share=(process, processes))(step, CPU) for process in range(processes)]
        assert len({len(own) for own in passes}) == 1
        assert len(passes[0]) == 1 if tokens_per_pass == math.inf else len(passes[0]) > 1
        for name, batch in whole._asdict().items():
            parts = [part for own in passes for part in (getattr(each, name) for each in own) if part]
            shape = [[getattr(each, name) is None for each in own] for own in passes]
            assert shape == [shape[0]] * processes
            if batch is None:
                assert not parts
                continue
            found: dict[tuple, list[float]] = {}
            for before, target, weights in (entry for part in parts for entry in entries(part)):
                total = found.setdefault((tuple(before), target), [0.0] * len(weights))
                found[tuple(before), target] = [a + b for a, b in zip(total, weights, strict=True)]
            expected: dict[tuple, list[float]] = {}
            for before, target, weights in entries(batch):
                total = expected.setdefault((tuple(before), target), [0.0] * len(weights))
                expected[tuple(before), target] = [a + b for a, b in zip(total, weights, strict=True)]
            assert found.keys() == expected.keys()
            for key, weights in expected.items():
                assert found[key] == pytest.approx(weights, abs=1e-5)


def test_a_row_is_no_longer_than_a_pass_if_its_texts_are_not(data, tokenizer):
    batches = batches_of(data, tokenizer, {"gd", "rd"}, packed_up_to=math.inf, tokens_per_pass=120)
    lengths = [part.harmful.tokens for step in range(4) for part in batches(step, CPU)]
    assert max(lengths) <= 120 and len(lengths) > 4


@pytest.mark.parametrize("processes", [1, 2])
def test_padding_counts_in_a_pass(processes, data, tokenizer):
    """Rounding lengths up adds less than 32 tokens; a single row may be longer than a pass."""
    batches = batches_of(data, tokenizer, {"gd", "rd", "pd"}, tokens_per_pass=200, share=(0, processes))
    for part in (part for step in range(4) for part in batches(step, CPU)):
        shapes = [batch.input_ids.shape for batch in part if batch]
        assert sum(map(math.prod, shapes)) < 200 + 32 * len(shapes) or shapes[0][0] == len(shapes) == 1


def test_no_row_is_padded_beyond_what_the_model_reads(data, tokenizer):
    batches = batches_of(data, tokenizer, {"gd", "rd", "pd"})
    batches = replace(batches, collator=replace(batches.collator, max_length=25))
    for part in (part for step in range(4) for part in batches(step, CPU)):
        assert max(batch.input_ids.shape[1] for batch in part if batch) == 25


def test_random_answers_come_from_the_pool_of_the_losses(data, tokenizer):
    harmful, normal = data["harmful"], data["normal"]
    assert answer_pool(reads({"gd", "rd"}), harmful, normal) == harmful.answers
    assert answer_pool(reads({"ga", "rm"}), harmful, normal) == [normal.texts[row].answer for row in normal.train]
    for losses in ({"rd"}, {"rm"}):
        batches = batches_of(data, tokenizer, losses)
        pairs = batches.random_pairs(2)
        asked = [harmful.pairs[row].question for row in batches.sampler[2].harmful_rows]
        assert [pair.question for pair in pairs] == [question for question in asked for _ in range(3)]
        assert {pair.answer for pair in pairs} <= set(batches.pool)


def test_k_counts_only_where_answers_are_drawn(data):
    assert len(sampler_of(data, {"gd", "rd"})[0].answer_rows) == 3
    assert sampler_of(data, {"gd", "pd"}, k_random=999)[0].answer_rows == []
    assert "--k_random" in error_of(sampler_of, data, {"rd"}, k_random=999)


def test_two_pools_at_once_are_refused():
    with pytest.raises(ValueError, match="different pools"):
        reads({"rd", "rm"})
