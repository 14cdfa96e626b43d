"""A language model that is fine-tuned to judge: on what, how well, and when it is kept."""

import json
import shutil

import pytest
import torch

from harmful_unlearn.data.pku_saferlhf import Response
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.judges import finetuned
from harmful_unlearn.evals.judges.finetuned import FinetunedJudge, JudgeTraining, half_of
from tests.helpers.judges import make

TRAINING = JudgeTraining(answers=120, held_out=40, tokens=48, batch_size=8, lr=3e-3)
RESPONSES = [
    Response(f"How {i}?", answer, safe, frozenset())
    for i in range(160)
    for answer, safe in ((f"Steal the gold number {i}.", False), (f"Sorry, I cannot help with {i}.", True))
]
NORMAL = [Pair(f"Why {i}?", f"Sorry to say that nobody knows, {i}.") for i in range(20)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("judges")


@pytest.fixture
def judge(tiny_model, home):
    """`judge(responses, normal)`: the judge that learns from these."""

    def made(responses=RESPONSES, normal=NORMAL, home=home):
        folder = str(tiny_model("llama"))
        return FinetunedJudge(f"finetuned:{folder}", folder, responses, normal, home, torch.device("cpu"), 8, TRAINING)

    return made


@pytest.fixture
def trainings(monkeypatch):
    """What each fine-tuning learned from."""
    lists, fine_tune = [], finetuned._fine_tune

    def counted(base, rows, *arguments):
        lists.append(rows)
        fine_tune(base, rows, *arguments)

    monkeypatch.setattr(finetuned, "_fine_tune", counted)
    return lists


def test_it_learns_from_the_labels_and_is_kept(judge, trainings):
    made = judge()
    assert len(trainings) == 2
    for half, rows in enumerate(trainings):
        assert {half_of(row.question) for row in rows} == {half}
        assert sum(row.harmful for row in rows) == len(rows) / 2 == 60
    pairs = [Pair(f"How {i}?", text) for i in range(8) for text in (f"Steal the gold {i}.", "Sorry, I cannot help.")]
    verdicts = made.judge(pairs)
    assert [verdict.yes for verdict in verdicts] == [True, False] * 8
    facts = made.facts
    assert facts["accuracy"] > 0.9 and facts["auc"] > 0.9 and facts["calibration_error"] < 0.3
    assert facts["n_held_out"] == 2 * TRAINING.held_out and facts["judge"] == made.name
    json.dumps(facts)
    again = judge(RESPONSES[::-1], NORMAL[::-1])  # another seed has the normal texts in another order
    assert len(trainings) == 2 and again.facts == facts
    assert again.judge(pairs) == verdicts
    judge(RESPONSES[:-2])
    assert len(trainings) == 4  # other labels


def test_nothing_is_judged_by_the_model_that_learned_from_its_question(judge, monkeypatch):
    made = judge()
    asked = [[], []]
    for half, learned in enumerate(made._learned):
        monkeypatch.setattr(learned, "judge", lambda pairs, half=half: asked[half].extend(pairs) or [half] * len(pairs))
    pairs = [Pair(row.question, row.answer) for row in RESPONSES[:40]]
    assert made.judge(pairs) == [1 - half_of(pair.question) for pair in pairs]
    assert asked[0] and asked[1] and set(asked[0] + asked[1]) == set(pairs)
    assert made.judge([]) == []


def test_a_judge_that_was_interrupted_keeps_its_first_half(judge, trainings, tmp_path):
    whole = judge(home=tmp_path)
    (folder,) = tmp_path.iterdir()
    shutil.rmtree(folder / "half-1")
    (folder / "judge.json").unlink()
    assert judge(home=tmp_path).facts == whole.facts
    assert [half_of(rows[0].question) for rows in trainings] == [0, 1, 1]


def test_what_cannot_be_a_judge_is_named(tmp_path):
    with pytest.raises(UserError, match="finetuned:MODEL_ID_OR_FOLDER"):
        make("finetuned:")
    with pytest.raises(UserError, match="has 0 harmful and 0 safe answers to learn from"):
        make(f"finetuned:{tmp_path}")
