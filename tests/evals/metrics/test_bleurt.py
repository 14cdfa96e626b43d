"""BLEURT of normal answers, by any regression model of transformers."""

import json

import pytest
import torch
from transformers import AutoTokenizer, BertForSequenceClassification

from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.metrics import bleurt
from harmful_unlearn.evals.metrics.bleurt import add_bleurt, bleurt_scores
from tests.helpers.inputs.world import make_bleurt

CPU = torch.device("cpu")


def test_scores_are_the_models_output_for_each_pair(tmp_path, monkeypatch):
    monkeypatch.setattr(bleurt, "BLEURT_BATCH", 2)
    folder = make_bleurt(tmp_path)
    references, answers = ["a bear", "a long reference of words", "b"], ["a deer", "short", "an answer"]
    scores = bleurt_scores(references, answers, str(folder), CPU)
    model, tokenizer = (
        BertForSequenceClassification.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    with torch.no_grad():
        pairs = zip(references, answers, strict=True)
        by_hand = [model(**tokenizer(*pair, return_tensors="pt")).logits.item() for pair in pairs]
    assert scores == pytest.approx(by_hand, abs=1e-5) and len(set(scores)) == 3


def test_a_model_that_does_not_score_is_refused(tmp_path):
    with pytest.raises(UserError, match="2 outputs"):
        bleurt_scores(["a"], ["b"], str(make_bleurt(tmp_path / "two", outputs=2)), CPU)
    (tmp_path / "two" / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(UserError, match="not a BLEURT model"):
        bleurt_scores(["a"], ["b"], str(tmp_path / "two"), CPU)


def test_normal_answers_are_scored_once_against_reference_and_base(tmp_path, monkeypatch):
    asked = []

    def scores_of(references, answers, name, device):
        asked.append((references, answers, name))
        return [float(len(reference)) for reference in references]

    monkeypatch.setattr(bleurt, "bleurt_scores", scores_of)
    normal = {"set": "normal", "decoding": "greedy", "index": 0, "reference": "four"}
    harmful = {"set": "seen", "decoding": "greedy", "index": 0, "answer": "harm"}
    rows = {"base": [{**normal, "answer": "threes"}], "sku": [harmful, {**normal, "answer": "sku's"}]}
    add_bleurt(rows, "first", tmp_path, CPU)
    assert rows["sku"][0] == harmful
    assert rows["sku"][1] == {**normal, "answer": "sku's"} | {
        "bleurt_model": "first", "bleurt_reference": 4.0, "bleurt_base": 6.0,
    }  # fmt: skip
    assert asked[2:] == [(["four"], ["sku's"], "first"), (["threes"], ["sku's"], "first")]
    kept = [json.loads(line) for line in (tmp_path / "answers" / "sku.jsonl").read_text().splitlines()]
    assert kept == rows["sku"]
    add_bleurt(rows, "first", tmp_path, CPU)
    assert len(asked) == 4
    add_bleurt(rows, "second", tmp_path, CPU)
    assert len(asked) == 8 and rows["base"][0]["bleurt_model"] == "second"
