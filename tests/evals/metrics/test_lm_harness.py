"""EleutherAI's harness. It is not installed with the project: its result has the layout of lm_eval 0.4."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.evaluated_model import EvaluatedModel
from harmful_unlearn.evals.metrics.lm_harness import check_usable, lm_eval_figures

CPU = torch.device("cpu")
VALUES = {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1, "exact,strict": 1, "exact_stderr,strict": "N/A"}
RUN = {"results": {"arc": VALUES}, "n-samples": {"arc": {"original": 9, "effective": 7}}}
MODELS = [EvaluatedModel(label, {"fingerprint": label}, None, Path("models") / label) for label in ("base", "sku")]


def harness(monkeypatch, simple_evaluate):
    """A stand-in for the package; a task manager is the folders that it looks into."""
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=simple_evaluate))
    tasks = SimpleNamespace(TaskManager=lambda include_path: include_path)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)


@pytest.fixture
def calls(monkeypatch):
    """The arguments of each call of the harness."""
    calls = []

    def simple_evaluate(kind, model_args, tasks, device, task_manager, limit):
        offload = Path(model_args.pop("offload_folder", "none")).is_dir()
        calls.append((kind, model_args, tasks, device, offload, task_manager, limit))
        return RUN

    harness(monkeypatch, simple_evaluate)
    return calls


def test_figures_have_an_interval_by_standard_errors(calls, tmp_path):
    figures = lm_eval_figures(MODELS, ["arc"], tmp_path, CPU)
    assert [(row["model"], row["metric"]) for row in figures] == [
        ("base", "acc"), ("base", "exact"), ("sku", "acc"), ("sku", "exact"),
    ]  # fmt: skip
    assert figures[2] | {"low": None, "high": None} == {
        "model": "sku", "set": "lm_eval arc", "decoding": None, "metric": "acc", "value": 0.5, "low": None,
        "high": None, "n": 7,
    }  # fmt: skip
    assert figures[2]["low"] == pytest.approx(0.304) and figures[2]["high"] == pytest.approx(0.696)
    assert (figures[3]["low"], figures[3]["value"], figures[3]["high"]) == (1, 1, 1)  # without a standard error
    assert calls == [
        ("hf", {"pretrained": f"models/{label}"}, ["arc"], "cpu", False, None, None) for label in ("base", "sku")
    ]


def test_what_was_measured_is_not_measured_again(calls, tmp_path):
    figures = lm_eval_figures(MODELS, ["arc"], tmp_path, CPU)
    assert lm_eval_figures(MODELS, ["arc"], tmp_path, CPU) == figures and len(calls) == 2
    lm_eval_figures(MODELS[:1], ["arc", "mmlu"], tmp_path, CPU)
    assert len(calls) == 3 and len(json.loads((tmp_path / "lm_eval.json").read_text())) == 3


def test_a_model_may_be_spread_over_devices(calls, tmp_path):
    lm_eval_figures(MODELS[:1], ["arc"], tmp_path, CPU, dispatch=True)
    assert calls == [("hf", {"pretrained": "models/base", "parallelize": True}, ["arc"], "cpu", True, None, None)]


def test_a_task_of_ones_own_is_a_file_and_samples_may_be_limited(calls, tmp_path):
    file = tmp_path / "mine" / "task.yaml"
    file.parent.mkdir()
    file.write_text("task: choices\ndataset_path: json\n")
    lm_eval_figures(MODELS[:1], ["arc", str(file)], tmp_path, CPU, limit=5)
    assert [call[2:] for call in calls] == [(["arc", "choices"], "cpu", False, [str(file.parent)], 5)]
    lm_eval_figures(MODELS[:1], ["arc", str(file)], tmp_path, CPU, limit=6)
    assert len(calls) == 2
    with pytest.raises(UserError, match="no.yaml"):
        check_usable([str(tmp_path / "no.yaml")])
    file.write_text("include: other.yaml\ntask: 'choices'\nscore: !function utils.score\n")
    lm_eval_figures(MODELS[:1], ["arc", str(file)], tmp_path, CPU, limit=6)
    assert len(calls) == 3 and calls[2][2] == ["arc", "choices"]  # the file has changed
    file.write_text("include: other.yaml\n")
    with pytest.raises(UserError, match='no line "task: NAME"'):
        check_usable(["arc", str(file)])


def test_a_failure_of_the_harness_names_the_tasks(monkeypatch, tmp_path):
    def fails(*_, **__):
        raise KeyError("no such task\nwith details")

    harness(monkeypatch, fails)
    with pytest.raises(UserError, match="lm_eval failed on arc, x .*no such task.*: check the tasks' names"):
        lm_eval_figures(MODELS, ["arc", "x"], tmp_path, CPU)


def test_a_missing_harness_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install lm_eval"):
        check_usable([])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    check_usable([])
