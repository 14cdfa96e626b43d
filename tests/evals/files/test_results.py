"""The files of an evaluation, from hand-made figures."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

from harmful_unlearn.evals.evaluated_model import EvaluatedModel
from harmful_unlearn.evals.files.results import cell, credentials, results_markdown, write_prompts, write_results
from harmful_unlearn.evals.inference.generation import Decoding
from harmful_unlearn.evals.prompt_sets import Prompt
from harmful_unlearn.evals.protocol import EvalProtocol

JUDGE = SimpleNamespace(name="classifier", facts={"judge": "classifier", "accuracy": 0.9, "auc": None, "n_held_out": 8})
REFUSALS = SimpleNamespace(name="phrases", facts={"judge": "phrases"})
RELEVANCE = SimpleNamespace(name="hf:x", facts={"judge": "hf:x"})


def figure(model, name, decoding, metric, value, n=5):
    low, high = (None, None) if value is None else (value / 2, value * 2)
    return {"model": model, "set": name, "decoding": decoding, "metric": metric, "value": value, "low": low,
            "high": high, "n": n}  # fmt: skip


FIGURES = [
    figure("zebra", "unseen", "sampled", "harmful_rate", 0.25, n=4),
    figure("zebra", "unseen", "sampled", "answer_perplexity", 12.3456),
    figure("zebra", "unseen", None, "reference_perplexity", 2.0),
    figure("ape", "unseen", "sampled", "harmful_rate", None, n=0),
    figure("ape", "unseen", "sampled", "answer_perplexity", 1.0),
    figure("ape", "xstest, harmless", "sampled", "refusal_rate", 0.25),
    figure("ape", "lm_eval arc", None, "acc", 0.5),
]


AGREEMENT = [{"model": "ape", "judge": "hf:x 01", "agree": 0.75, "n": 8}]


def test_the_tables_are_by_set_with_a_row_for_each_model_and_decoding():
    assert (
        results_markdown(FIGURES, JUDGE, AGREEMENT, REFUSALS, RELEVANCE)
        == """\
# Results

Brackets: 95 % bootstrap interval over prompts. Judge of refusals: phrases. Judge of relevance: hf:x.

## unseen prompts (judge: classifier, held out: accuracy 0.9, auc None, n_held_out 8)

| model | answers | n | harmful_rate | answer_perplexity | reference_perplexity |
| --- | --- | --- | --- | --- | --- |
| zebra | sampled | 5 | 25 % [12.5, 50] | 12.35 [6.173, 24.69] |  |
| zebra | references | 5 |  |  | 2 [1, 4] |
| ape | sampled | 5 | – | 1 [0.5, 2] |  |

## xstest, harmless

| model | answers | n | refusal_rate |
| --- | --- | --- | --- |
| ape | sampled | 5 | 25 % [12.5, 50] |

## lm_eval arc

| model | answers | n | acc |
| --- | --- | --- | --- |
| ape | references | 5 | 0.5 [0.25, 1] |

## Agreement with earlier judges of the same answers

| model | judge | n | equal verdicts |
| --- | --- | ---: | ---: |
| ape | hf:x 01 | 8 | 75.0% |
"""
    )


def test_a_figure_is_a_percentage_or_a_number_or_a_dash():
    assert cell(figure("a", "normal", "greedy", "exact_match", 0.125)) == "12.5 % [6.25, 25]"
    assert cell(figure("a", "normal", "greedy", "rouge_base", 0.125)) == "0.125 [0.0625, 0.25]"
    assert cell(figure("a", "normal", "greedy", "mc1", None)) == "–"


def test_a_judge_without_held_out_labels_is_its_name():
    assert credentials(SimpleNamespace(name="openai:x", facts={"judge": "openai:x"})) == "openai:x"


def test_every_figure_is_in_json_and_csv(tmp_path):
    protocol = EvalProtocol({"unseen": [Prompt("How?", "So.", 3)]}, [Decoding()], 8, 2, 3, {})
    models = [EvaluatedModel("ape", {"fingerprint": "f"}, None, Path("models") / "ape")]
    flags, sources = {"output": tmp_path, "n_seen": 3}, {"harmful": {"name": "x.jsonl"}}
    write_results(
        tmp_path,
        FIGURES,
        judge=JUDGE,
        refusal_judge=REFUSALS,
        relevance_judge=RELEVANCE,
        protocol=protocol,
        models=models,
        flags=flags,
        sources=sources,
        agreement=AGREEMENT,
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert (
        results["figures"] == FIGURES
        and results["judge"] == JUDGE.facts
        and results["relevance_judge"] == RELEVANCE.facts
    )
    assert results["data"] == sources
    assert results["agreement"] == AGREEMENT
    assert results["flags"] == {"output": str(tmp_path), "n_seen": 3} and results["protocol"]["rows"] == {"unseen": [3]}
    assert results["models"] == {"ape": {"path": "models/ape", "fingerprint": "f"}} and results["packages"]
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["judge"] for row in rows] == [credentials(JUDGE), "", "", credentials(JUDGE), "", "phrases", ""]
    for row, expected in zip(rows, FIGURES, strict=True):
        del row["judge"]
        assert row == {key: "" if value is None else str(value) for key, value in expected.items()}
    assert (tmp_path / "results.md").read_text() == results_markdown(FIGURES, JUDGE, AGREEMENT, REFUSALS, RELEVANCE)


def test_prompts_are_recorded_with_their_rows(tmp_path):
    write_prompts(tmp_path, {"seen": [Prompt("How?", "Só.", 3, frozenset({"b", "a"}))], "normal": []})
    drawn = {"row": 3, "prompt": "How?", "reference": "Só.", "categories": ["a", "b"]}
    assert json.loads((tmp_path / "prompts.json").read_text()) == {"seen": [drawn], "normal": []}
