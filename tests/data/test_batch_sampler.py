"""The order of batches: a function of the seed and the step, as in the released code."""

import numpy as np
import pytest

from harmful_unlearn.data.batch_sampler import BatchSampler
from tests.helpers.inputs.tables import error_of


def order_of(**changes) -> BatchSampler:
    usual = {"harmful": range(14), "normal": range(100, 116), "answers": 14, "batch_size": 2, "k_random": 5, "seed": 7}
    return BatchSampler(**{**usual, **changes})


def test_harmful_rows_equal_golden(goldens):
    order = order_of()
    assert order.batches_per_epoch == 7
    for recorded in goldens["trajectory"]:
        draw = order[recorded["step"]]
        assert draw.harmful_rows == recorded["harmful_rows"]
        assert len(draw.normal_rows) == len(recorded["normal_rows"])
        assert len(draw.answer_rows) == len(recorded["random_answer_rows"])


@pytest.mark.parametrize("all_harmful", [False, True])
def test_order_is_a_function_of_the_step(all_harmful):
    forwards = [order_of(all_harmful=all_harmful)[step] for step in range(60)]
    order = order_of(all_harmful=all_harmful)
    backwards = [order[step] for step in reversed(range(60))][::-1]
    assert forwards == backwards and order[33] == forwards[33]
    for draw in forwards:
        assert all(type(index) is int for rows in draw for index in rows)


def test_released_epochs():
    """The full TruthfulQA file: 572 batches, of which the last has one text (points 6 and 7)."""
    order = order_of(harmful=range(5000), normal=range(1143), answers=5000)
    assert order.batches_per_epoch == 572
    epochs = [[order[epoch * 572 + batch] for batch in range(572)] for epoch in range(3)]
    shuffles = []
    for epoch in epochs:
        assert [index for draw in epoch for index in draw.harmful_rows] == list(range(1144))
        shuffles.append([index for draw in epoch for index in draw.normal_rows])
        assert sorted(shuffles[-1]) == list(range(1143)), "each training text once an epoch"
        assert [len(draw.normal_rows) for draw in epoch] == [2] * 571 + [1]
    assert shuffles[0] != shuffles[1] != shuffles[2] and shuffles[0] != sorted(shuffles[0])


def test_fewer_harmful_than_normal():
    order = order_of(harmful=range(5), normal=range(40))
    assert order.batches_per_epoch == 3
    assert [order[step].harmful_rows for step in range(4)] == [[0, 1], [2, 3], [4], [0, 1]]
    epochs = [[i for b in range(3) for i in order[3 * e + b].normal_rows] for e in range(200)]
    assert all(len(set(epoch)) == 6 for epoch in epochs)
    assert set(sum(epochs, [])) == set(range(40)), "a new shuffle each epoch reaches every text"


def test_all_harmful_cycles_each_side_by_itself():
    order = order_of(harmful=range(7), normal=[3, 1, 4, 15, 9], batch_size=2, all_harmful=True)
    assert order.batches_per_epoch == 4
    draws = [order[step] for step in range(24)]
    assert sum((draw.harmful_rows for draw in draws), []) == list(range(7)) * 6
    for start in range(0, 24, 3):
        rows = sum((draw.normal_rows for draw in draws[start : start + 3]), [])
        assert sorted(rows) == [1, 3, 4, 9, 15]
    assert order_of(harmful=range(5000), normal=range(11), all_harmful=True)[2499].harmful_rows == [4998, 4999]


def test_one_batch_holds_all():
    order = order_of(harmful=range(3), normal=[8, 9], batch_size=10)
    assert order[5].harmful_rows == [0, 1, 2] and sorted(order[5].normal_rows) == [8, 9]


def test_answers_are_distinct_uniform_and_anew_each_step():
    order = order_of(answers=14, k_random=5)
    draws = [order[step].answer_rows for step in range(4000)]
    assert all(len(set(rows)) == 5 and set(rows) <= set(range(14)) for rows in draws)
    counts = np.bincount(np.concatenate(draws), minlength=14)
    assert abs(counts / (4000 * 5 / 14) - 1).max() < 0.1
    assert len({tuple(rows) for rows in draws}) > 3900
    assert sorted(order_of(answers=5)[0].answer_rows) == [0, 1, 2, 3, 4]


def test_seed_changes_shuffles_and_answers():
    a, b = order_of(seed=1)[0], order_of(seed=2)[0]
    assert a.harmful_rows == b.harmful_rows
    assert a.normal_rows != b.normal_rows and a.answer_rows != b.answer_rows


def test_too_few_answers():
    message = error_of(order_of, answers=4)
    assert "--k_random" in message and "at most 4" in message
