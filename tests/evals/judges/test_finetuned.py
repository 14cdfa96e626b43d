"""A language model that is fine-tuned to judge: on what, how well, and when it is kept."""

import json

import pytest
import torch

from harmful_unlearn.data.pku_saferlhf import Response
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.judges import finetuned
from harmful_unlearn.evals.judges.finetuned import JudgeTraining, finetuned_judge
from harmful_unlearn.evals.judges.labelled import split_labelled
from tests.helpers.judges import make

TRAINING = JudgeTraining(answers=160, held_out=40, tokens=48, batch_size=8, lr=3e-3)
RESPONSES = [
    Response(f"How {i}?", answer, safe, frozenset())
    for i in range(120)
    for answer, safe in ((f"Steal the gold number {i}.", False), (f"Sorry, I cannot help with {i}.", True))
]
NORMAL = [Pair(f"Why {i}?", f"Sorry to say that nobody knows, {i}.") for i in range(20)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("judges")


@pytest.fixture
def judge(tiny_model, home):
    """`judge(judged)`: the judge for answers to these questions."""

    def made(judged=frozenset(), model="llama", seed=0):
        data = split_labelled(RESPONSES, NORMAL, set(judged), seed)
        folder = str(tiny_model(model))
        return finetuned_judge(f"finetuned:{folder}", folder, data, set(judged), home, torch.device("cpu"), 8, TRAINING)

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


def test_it_learns_from_the_labels_and_is_kept(judge, trainings, home):
    asked = {"How 3?", "How 50?"}
    made = judge(asked)
    (rows,) = trainings
    assert sum(row.harmful for row in rows) == len(rows) / 2 == 80
    assert not asked & {row.question for row in rows}
    verdicts = made.judge(
        [Pair("How 3?", "Steal the gold number 3."), Pair("How 50?", "Sorry, I cannot help with 50.")]
    )
    assert [verdict.harmful for verdict in verdicts] == [True, False]
    facts = made.facts
    assert facts["accuracy"] > 0.9 and facts["auc"] > 0.9 and facts["calibration_error"] < 0.3
    assert (
        facts["n_held_out"] - facts["n_held_out_on_harmful_data"] in range(1, 11)
        and facts["prompts_left_out"] == 2
        and facts["judge"] == made.name
    )
    json.dumps(facts)
    again = judge(asked)
    assert len(trainings) == 1 and again.facts == facts
    assert again.judge([Pair("How 3?", "Steal it.")]) == made.judge([Pair("How 3?", "Steal it.")])


def test_it_serves_all_prompts_that_it_was_not_trained_on(judge, trainings, home):
    judge({"How 3?"}, seed=7)
    (rows,) = trainings
    (kept,) = (folder for folder in home.iterdir() if '"seed": 7' in (folder / "judge.json").read_text())
    known = json.loads((kept / "judge.json").read_text())
    assert all(len(digest) == 64 for digest in known["trained_on"]) and "How" not in json.dumps(known)
    judge({"asked elsewhere"}, seed=7)
    assert len(trainings) == 1
    second = judge({rows[0].question}, seed=7)
    assert len(trainings) == 2 and rows[0].question not in {row.question for row in trainings[1]}
    assert second.facts["prompts_left_out"] == 1 and (kept / "judge.json").is_file()
    assert judge({"How 3?"}, seed=7).facts["prompts_left_out"] in (0, 1) and len(trainings) == 2  # both are kept
    for folder in home.iterdir():
        (folder / "config.json").unlink()
    judge({"How 3?"}, seed=7)
    assert len(trainings) == 3  # what is no longer complete is made again


def test_what_cannot_be_a_judge_is_named(tmp_path):
    with pytest.raises(UserError, match="finetuned:MODEL_ID_OR_FOLDER"):
        make("finetuned:")
    with pytest.raises(UserError, match="has 0 harmful and 0 safe answers to learn from"):
        make(f"finetuned:{tmp_path}")
