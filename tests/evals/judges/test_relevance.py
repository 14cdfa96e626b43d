"""Does an answer fit its question: what the judge learns, how it is told, and how answers to harm are split by it."""

from types import SimpleNamespace

import pytest

from harmful_unlearn.data.pku_saferlhf import Response
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.evaluated_model import EvaluatedModel
from harmful_unlearn.evals.judges import relevance
from harmful_unlearn.evals.judges.hub import RELEVANCE_JUDGES
from harmful_unlearn.evals.judges.registry import make_relevance_judge, relevance_judge_name
from harmful_unlearn.evals.judges.relevance import LikelihoodJudge
from harmful_unlearn.evals.judges.server import RELEVANCE, read_verdict
from harmful_unlearn.evals.metrics.figures import _rates

THINGS = [
    "kite",
    "pond",
    "lamp",
    "rope",
    "cake",
    "door",
    "boat",
    "fern",
    "coat",
    "drum",
    "sled",
    "vase",
    "wall",
    "yarn",
]
RESPONSES = [Response(f"What of the {thing}?", f"Take the {thing} by hand.", True) for thing in THINGS]
ASKED = ["What of the moon?", "What of the sun?", "What of the sky?"]


@pytest.fixture
def base(monkeypatch):
    """A model that finds an answer likely if it is about what was asked for; counts how often it is loaded."""
    loaded = []

    def nll(_model, _collator, pairs, _title):
        told = [pair.question.split()[-1].strip("?") in pair.answer for pair in pairs]
        return [(1.0 if is_told else 3.0, len(pair.answer.split())) for is_told, pair in zip(told, pairs, strict=True)]

    def load():
        loaded.append(1)
        return SimpleNamespace(config=None), None

    monkeypatch.setattr(relevance, "answer_nll", nll)
    monkeypatch.setattr(relevance, "context_length", lambda _: 100)
    model = EvaluatedModel("base", {"sha256": "x"}, load)
    return SimpleNamespace(model=model, loaded=loaded)


def judge_of(base, tmp_path, responses=RESPONSES, sets=(ASKED,)):
    return LikelihoodJudge(base.model, list(responses), list(sets), 0, tmp_path / "relevance.json")


def test_an_answer_fits_if_it_is_likelier_there_than_elsewhere(base, tmp_path):
    judge = judge_of(base, tmp_path)
    assert judge.facts["auc"] == judge.facts["accuracy"] == 1.0 and judge.facts["n_learned_from"] == len(THINGS)
    pairs = [Pair(ASKED[0], "See the moon rise."), Pair(ASKED[0], "Take a kite."), Pair(ASKED[1], "The sun is up.")]
    assert [verdict.yes for verdict in judge.judge(pairs)] == [True, False, True]
    assert [verdict.yes for verdict in judge.judge(pairs[1:])] == [False, True]  # whatever else is asked


def test_the_threshold_is_learned_once_and_never_from_what_is_judged(base, tmp_path):
    assert judge_of(base, tmp_path).facts == judge_of(base, tmp_path).facts
    assert len(base.loaded) == 1
    assert judge_of(base, tmp_path, RESPONSES[1:]).facts["n_learned_from"] == len(THINGS) - 1
    assert len(base.loaded) == 2  # other answers: learned anew
    sets = [[response.question for response in RESPONSES[:3]]]
    assert judge_of(base, tmp_path, sets=sets).facts["n_learned_from"] == len(THINGS) - 3


def test_with_nothing_to_compare_there_is_no_verdict(base, tmp_path):
    alone = judge_of(base, tmp_path, sets=[["What of the moon?"]])
    assert [verdict.yes for verdict in alone.judge([Pair("What of the moon?", "The moon.")])] == [None]
    untaught = judge_of(base, tmp_path, RESPONSES[:3])
    assert [verdict.yes for verdict in untaught.judge([Pair(ASKED[0], "The moon.")])] == [None]


def test_kinds_of_judges(base, tmp_path):
    common = {
        "base": base.model,
        "responses": RESPONSES,
        "sets": [ASKED],
        "seed": 0,
        "folder": tmp_path,
        "device": "cpu",
    }
    assert make_relevance_judge("none", **common) is None
    assert make_relevance_judge("likelihood", **common).facts["auc"] == 1.0
    with pytest.raises(UserError, match=next(iter(RELEVANCE_JUDGES))):
        make_relevance_judge("hf:some/model", **common)
    with pytest.raises(UserError, match="likelihood"):
        relevance_judge_name("guess")
    replies = {"ON TOPIC": True, "off topic.": False, "Verdict: OFF TOPIC": False, "TOPIC": None, "": None}
    assert {reply: read_verdict(reply, RELEVANCE) for reply in replies} == replies


def test_answers_to_harmful_prompts_are_split_without_a_rest():
    row = {"score": None}
    rows = [
        {**row, "verdict": "harmful", "refused": False, "relevant": True},
        {**row, "verdict": "degenerate", "refused": False, "relevant": False},
        {**row, "verdict": "safe", "refused": True, "relevant": False},
        {**row, "verdict": "safe", "refused": False, "relevant": True},
        {**row, "verdict": "safe", "refused": False, "relevant": False},
        {**row, "verdict": "safe", "refused": False, "relevant": False},
    ]
    rates = {name: estimate.value for name, estimate in _rates(rows, True, 0).items()}
    parts = ("harmful_rate", "degenerate_rate", "safe_refused_rate", "safe_relevant_rate", "safe_irrelevant_rate")
    assert [round(6 * rates[part]) for part in parts] == [1, 1, 1, 1, 2] and rates["relevance_rate"] == 2 / 6
    assert "safe_refused_rate" not in _rates(rows, False, 0)
    unknown = [{**rows[3], "relevant": None}, *rows]
    assert _rates(unknown, True, 0)["safe_relevant_rate"].n == 6
    assert "relevance_rate" not in _rates([{**row, "verdict": "safe", "refused": True}], True, 0)
