"""The offline classifier: what it learns from, and what is known of it on held-out labels."""

import json

import numpy as np
import pytest

from harmful_unlearn.data.pku_saferlhf import Response
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.errors import UserError
from tests.helpers.judges import make


def world(prompts=40, noise=0):
    """Each prompt has a harmful and a safe answer with a word of its own; the first `noise` are labelled wrongly."""
    responses = []
    for i in range(prompts):
        wrong = i < noise
        responses.append(Response(f"q{i}", f"put the wicked poison{i % 3} in the house word{i}", safe=wrong))
        responses.append(Response(f"q{i}", f"I cannot help with that request word{i}", safe=not wrong))
    return responses


NORMAL = [Pair(f"n{i}", f"put the kettle in the kitchen spoon{i}") for i in range(20)]


def knows(judge, word):
    """Whether the training data had this word: an answer of unknown words alone is unjudged."""
    return judge.judge([Pair("?", word)])[0].yes is not None


def test_the_classifier_tells_harmful_from_safe_in_order():
    judge = make("classifier", responses=world(), normal=NORMAL)
    answers = ["I cannot help", "a wicked poison1", "qqq www", "", "the kettle in the kitchen"]
    verdicts = judge.judge([Pair("?", answer) for answer in answers])
    assert [verdict.yes for verdict in verdicts] == [False, True, None, None, False]
    assert verdicts[0].score < 0.5 < verdicts[1].score and verdicts[2].score is None and verdicts[2].note
    assert judge.name == judge.facts["judge"] == "classifier" and judge.judge([]) == []


def test_normal_answers_are_in_the_safe_class():
    everyday = [Pair("?", "put the kettle in the kitchen")]
    assert make("classifier", responses=world()).judge(everyday)[0].yes  # harmful answers against refusals alone
    assert make("classifier", responses=world(), normal=NORMAL).judge(everyday)[0].yes is False


@pytest.mark.parametrize("seed", range(5))  # the planted prompt falls into either part
def test_it_never_learns_from_or_is_tested_on_judged_prompts(seed):
    responses = [*world(), Response("asked", "wicked zyzzyva", False), Response("asked", "quokka request", True)]
    normal = [*NORMAL, Pair("asked too", "wombat spoon"), Pair("asked", "numbat spoon")]
    judged = {"asked", "asked too", "elsewhere"}
    judge = make("classifier", responses=responses, normal=normal, judged=judged, seed=seed)
    assert not any(knows(judge, word) for word in ("zyzzyva", "quokka", "wombat", "numbat"))
    facts = judge.facts
    assert facts["prompts_left_out"] == 2 and facts["n_train"] + facts["n_held_out"] == len(world()) + len(NORMAL)


def test_without_judged_prompts_all_rows_are_used():
    responses = [*world(), Response("asked", "wicked zyzzyva", False)]
    assert any(knows(make("classifier", responses=responses, seed=seed), "zyzzyva") for seed in range(3))


def test_facts_are_the_figures_of_the_held_out_prompts():
    responses = world(noise=16)
    judge = make("classifier", responses=responses, normal=NORMAL, seed=3)
    facts = judge.facts
    trained = {f"q{i}" for i in range(40) if knows(judge, f"word{i}")}
    trained |= {f"n{i}" for i in range(20) if knows(judge, f"spoon{i}")}
    assert len(trained) == 48  # of 60 prompts: both rows of a prompt are on one side
    rows = [(response.question, response.answer, not response.safe) for response in responses]
    rows += [(pair.question, pair.answer, False) for pair in NORMAL]
    assert facts["n_train"] == sum(row[0] in trained for row in rows)
    assert facts["harmful_in_train"] == sum(row[2] for row in rows if row[0] in trained)
    for suffix, prefixes in (("", "qn"), ("_on_harmful_data", "q")):
        held_out = [row for row in rows if row[0] not in trained and row[0][0] in prefixes]
        scores = [verdict.score for verdict in judge.judge([Pair(*row[:2]) for row in held_out])]
        right = [(score > 0.5) == row[2] for score, row in zip(scores, held_out, strict=True)]
        bad = [score for score, row in zip(scores, held_out, strict=True) if row[2]]
        good = [score for score, row in zip(scores, held_out, strict=True) if not row[2]]
        wins = [(a > b) + 0.5 * (a == b) for a in bad for b in good]
        assert facts[f"accuracy{suffix}"] == pytest.approx(np.mean(right), abs=1e-4)
        assert facts[f"auc{suffix}"] == pytest.approx(np.mean(wins), abs=1e-4)
        assert facts[f"n_held_out{suffix}"] == len(held_out) and facts[f"harmful_held_out{suffix}"] == len(bad)
        assert 0 < facts[f"accuracy{suffix}"] < 1
    assert facts["accuracy"] != facts["accuracy_on_harmful_data"]
    json.dumps(facts)


def test_it_is_a_function_of_data_and_seed():
    pairs = [Pair("?", response.answer) for response in world()]
    first, shuffled, other = (
        make("classifier", responses=responses, normal=NORMAL, seed=seed)
        for responses, seed in ((world(), 0), (world(), 0), (world(), 1))
    )
    assert first.facts == shuffled.facts and first.judge(pairs) == shuffled.judge(pairs) != other.judge(pairs)


def test_large_data_are_capped_and_the_facts_say_so(monkeypatch):
    monkeypatch.setattr("harmful_unlearn.evals.judges.labelled.MOST_ROWS", 30)
    facts = make("classifier", responses=world(), normal=NORMAL).facts
    assert facts["rows_over_the_cap"] == 50 and facts["n_train"] + facts["n_held_out"] == 50
    assert 0.7 < facts["n_train"] / 50 < 0.9  # the cap leaves the split as it is


@pytest.mark.parametrize(
    "responses, judged, normal",
    [
        ([response for response in world() if response.safe], (), NORMAL),
        ([response for response in world() if not response.safe], (), ()),
        (world(), {f"q{i}" for i in range(38)}, NORMAL),
        ((), (), ()),
        ([Response(f"q{i}", "?!", bool(i % 2)) for i in range(40)], (), ()),
    ],
)
def test_too_little_to_learn_from(responses, judged, normal):
    with pytest.raises(UserError, match="--judge"):
        make("classifier", responses=responses, judged=judged, normal=normal)


def test_figures_that_a_missing_class_leaves_open_are_none():
    responses = [Response(f"q{i % 4}", response.answer, response.safe) for i, response in enumerate(world(8))]
    facts = make("classifier", responses=responses).facts
    assert facts["n_held_out"] == 0 and facts["accuracy"] is None and facts["auc"] is None
