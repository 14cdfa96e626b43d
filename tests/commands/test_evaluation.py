"""The evaluation command: what it reads from run.json, what it writes, and how it refuses."""

import csv
import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from harmful_unlearn.errors import UserError
from harmful_unlearn.evals import evaluated_model, lm_harness
from harmful_unlearn.evaluation import main, parse_flags
from harmful_unlearn.models import loading
from harmful_unlearn.storage.run_record import has_training_record, trainings_of
from harmful_unlearn.unlearn_harm_new import main as unlearn
from task_vector import main as negate
from tests.helpers.world import make_world

SMALL = ["--n_seen", "4", "--n_unseen", "6", "--n_normal", "5", "--max_new_tokens", "8", "--seed", "0"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world with a base, and three methods trained on it for a few steps."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    trainings = {"sku": [], "ga": ["--method", "ga"], "ft": ["--method", "ft"], "other-seed": ["--seed", "1"]}
    for name, more in trainings.items():
        unlearn(
            [
                "--model_name",
                str(folder / "base"),
                "--harmful_dataset",
                str(folder / "data" / "harmful.jsonl"),
                "--normal_dataset",
                str(folder / "data" / "normal.csv"),
                "--max_unlearn_steps",
                "4",
                "--lr",
                "1e-3",
                "--model_save_dir",
                str(folder / name / "copy"),
                "--log_file",
                str(folder / name / "run.log"),
                "--task_vector_saving_path",
                str(folder / name / "unlearned"),
                *more,
            ]
        )
    return folder


def flags(world, out, *more, model="sku"):
    return [
        "--model",
        f"{model}={world / model / 'unlearned'}",
        "--base",
        str(world / "base"),
        "--output",
        str(out),
        "--unseen_dataset",
        str(world / "data" / "unseen.jsonl"),
        *SMALL,
        *more,
    ]


def test_one_command_measures_models_beside_the_base(world, tmp_path, capsys):
    ga = ["--model", f"ga={world / 'ga' / 'unlearned'}"]
    main(flags(world, tmp_path, *ga, "--decoding", "sampled", "greedy"))
    results = json.loads((tmp_path / "results.json").read_text())
    assert {row["model"] for row in results["figures"]} == {"base", "sku", "ga"}
    assert {row["set"] for row in results["figures"]} == {"seen", "unseen", "normal"}
    assert {row["metric"] for row in results["figures"]} >= {
        "harmful_rate",
        "unjudged_rate",
        "degenerate_rate",
        "answer_perplexity",
        "reference_perplexity",
        "exact_match",
        "rouge_reference",
        "rouge_base",
        "mc1",
        "mc2",
    }
    assert all({"value", "low", "high", "n"} <= row.keys() for row in results["figures"])
    assert results["judge"] and results["models"]["sku"]["fingerprint"] and results["packages"]["torch"]
    prompts = json.loads((tmp_path / "prompts.json").read_text())
    assert {name: len(found) for name, found in prompts.items()} == {"seen": 4, "unseen": 6, "normal": 5}
    harmful = (world / "data" / "harmful.jsonl").read_text().splitlines()
    for prompt in prompts["seen"]:  # the recorded row leads back to the data
        row, side = divmod(prompt["row"], 2)
        assert json.loads(harmful[row])[f"response_{side}"] == prompt["reference"]
    with (tmp_path / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(results["figures"])
    by = {row["judge"] for row in table if row["metric"] == "harmful_rate"}
    assert len(by) == 1 and by.pop().startswith("classifier, held out: accuracy")
    markdown = (tmp_path / "results.md").read_text()
    assert markdown in capsys.readouterr().out and "accuracy" in markdown and "| sku | greedy |" in markdown
    answers = [json.loads(line) for line in (tmp_path / "answers" / "sku.jsonl").read_text().splitlines()]
    assert len(answers) == 2 * (4 + 6 + 5)
    base_rouge = [r for r in results["figures"] if r["model"] == "base" and r["metric"] == "rouge_base"]
    assert all(row["value"] in (1.0, pytest.approx(1.0)) or row["n"] for row in base_rouge)


def test_a_second_run_changes_nothing_and_loads_no_model(world, tmp_path, monkeypatch):
    main(flags(world, tmp_path))
    first = json.loads((tmp_path / "results.json").read_text())["figures"]
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("a model was loaded"))
    main(flags(world, tmp_path))
    assert json.loads((tmp_path / "results.json").read_text())["figures"] == first


def test_nothing_trained_on_is_unseen_or_normal(world, tmp_path):
    """By the run's own flags: 4 steps of 2 pairs, and what RD drew; normal questions by both their texts."""
    main(flags(world, tmp_path)[:-2] + ["--n_unseen", "1000", "--n_seen", "1000", "--n_normal", "1000", "--seed", "0"])
    prompts = json.loads((tmp_path / "prompts.json").read_text())
    rows = [json.loads(line) for line in (world / "data" / "harmful.jsonl").read_text().splitlines()]
    assert {p["prompt"] for p in prompts["seen"]} == {row["prompt"] for row in rows[:8]}
    assert not {p["prompt"] for p in prompts["unseen"]} & {row["prompt"] for row in rows}
    from harmful_unlearn.data.truthfulqa import read_normal

    normal = read_normal(world / "data" / "normal.csv", 8888)  # the script's default seed
    trained = {normal.texts[row].question for row in normal.train}
    assert prompts["normal"] and not {p["prompt"] for p in prompts["normal"]} & trained


def test_an_adapter_is_refused_with_the_command_that_merges_it(world, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="scaling_coef -1"):
        evaluated_model.evaluated_model("a", tmp_path / "adapter", None)


def test_a_model_of_others_is_measured_as_one_of_ours_was_trained(world, tmp_path):
    arguments = flags(world, tmp_path, "--trained_as", str(world / "sku" / "copy"))
    arguments[1] = f"theirs={world / 'base'}"
    main(arguments)
    prompts = json.loads((tmp_path / "prompts.json").read_text())
    rows = [json.loads(line)["prompt"] for line in (world / "data" / "harmful.jsonl").read_text().splitlines()]
    assert {p["prompt"] for p in prompts["seen"]} <= set(rows[:8])


def test_untouched_rows_of_the_same_data_serve_as_unseen(world, tmp_path):
    arguments = flags(world, tmp_path)
    at = arguments.index("--unseen_dataset")
    main(arguments[:at] + arguments[at + 2 :])
    prompts = json.loads((tmp_path / "prompts.json").read_text())
    rows = [json.loads(line)["prompt"] for line in (world / "data" / "harmful.jsonl").read_text().splitlines()]
    assert {p["prompt"] for p in prompts["unseen"]} <= set(rows[8:])


def test_trainings_are_read_from_either_stage(world):
    (copy,), (unlearned,) = trainings_of(world / "sku" / "copy"), trainings_of(world / "sku" / "unlearned")
    assert copy["flags"] == unlearned["flags"] and trainings_of(world / "base") == []


def test_a_sum_of_vectors_is_told_if_each_of_them_is(world, tmp_path):
    """Also through a saved vector, and not where one of the models is somebody else's."""
    base, theirs = str(world / "base"), str(tmp_path / "theirs")
    shutil.copytree(world / "ga" / "copy", theirs)
    (tmp_path / "theirs" / "run.json").unlink()
    for name, other in (("told", str(world / "ga" / "copy")), ("untold", theirs)):
        made = ["--base", base, "--finetuned", str(world / "sku" / "copy"), other]
        negate(made + ["--save_vector", str(tmp_path / f"{name}-vector")])
        negate(["--base", base, "--vector", str(tmp_path / f"{name}-vector"), "--output", str(tmp_path / name)])
    assert has_training_record(tmp_path / "told") and not has_training_record(tmp_path / "untold")
    assert [len(trainings_of(tmp_path / name)) for name in ("told", "untold")] == [2, 1]


def test_a_model_that_saw_no_harm_has_no_seen_prompts(world, tmp_path):
    with pytest.raises(UserError, match="--n_seen 0"):
        main(flags(world, tmp_path, model="ft"))
    main(flags(world, tmp_path, "--n_seen", "0", model="ft"))
    results = json.loads((tmp_path / "results.json").read_text())["figures"]
    assert {row["set"] for row in results} == {"unseen", "normal"}


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda w: ["--model", f"x={w / 'base'}"], "trained_as"),
        (lambda w: ["--model", f"x={w / 'nowhere'}"], "no folder"),
        (lambda w: ["--model", f"bare={w / 'base'}"], "bare was trained on"),
        (lambda w: ["--trained_as", str(w / "base"), "--model", f"x={w / 'base'}"], "another --trained_as"),
        (lambda w: ["--harmful_dataset", str(w / "data" / "unseen.jsonl")], "harmful_dataset"),
        (lambda w: ["--unseen_dataset", str(w / "none.jsonl")], "none.jsonl"),
        (lambda w: ["--model", f"b={w / 'other-seed' / 'unlearned'}"], "different seeds"),
        (lambda w: ["--judge", "oracle"], "classifier"),
        (lambda w: ["--lm_eval", "truthfulqa_mc1"], "pip install lm_eval"),
        (lambda w: ["--max_new_tokens", "1000"], "max_new_tokens"),
    ],
)
def test_what_cannot_be_measured_is_one_line_that_names_the_fix(change, named, world, tmp_path, monkeypatch):
    monkeypatch.setattr(lm_harness.importlib.util, "find_spec", lambda _: None)
    arguments = flags(world, tmp_path, *change(world))
    if "x=" in str(change(world)) and "nowhere" not in str(change(world)):
        arguments = arguments[2:]
    with pytest.raises(UserError, match=named):
        main(arguments)


@pytest.mark.parametrize(
    "bad",
    [
        ["--temperature", "0"],
        ["--n_seen", "0", "--n_unseen", "0", "--n_normal", "0"],
        ["--decoding", "beam"],
        ["--model", "base=x"],
        ["--model", "sku=x"],
    ],
)
def test_bad_flags_exit_2(bad, world, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_flags(flags(world, tmp_path, *bad))
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err


def test_models_are_named_by_their_folder(world, tmp_path):
    args = parse_flags(["--model", "models/some-model", "--base", "b", "--output", str(tmp_path)])
    assert args.model == {"some-model": "models/some-model"}


def test_bleurt_is_any_regression_model_of_transformers(world, tmp_path):
    bleurt = tmp_path / "bleurt"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    bleurt.mkdir()
    (bleurt / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(vocab_file=str(bleurt / "vocab.txt")).save_pretrained(bleurt)
    torch.manual_seed(0)
    settings = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForSequenceClassification(
        BertConfig(**settings, intermediate_size=16, max_position_embeddings=64, num_labels=1)
    ).save_pretrained(bleurt)
    main(flags(world, tmp_path / "out", "--bleurt", str(bleurt)))
    results = json.loads((tmp_path / "out" / "results.json").read_text())["figures"]
    found = [row for row in results if row["metric"] == "bleurt_reference"]
    assert {row["model"] for row in found} == {"base", "sku"} and all(row["n"] == 5 for row in found)
    BertForSequenceClassification(
        BertConfig(**settings, intermediate_size=16, max_position_embeddings=64, num_labels=2)
    ).save_pretrained(bleurt)
    with pytest.raises(UserError, match="2 outputs"):
        main(flags(world, tmp_path / "out2", "--bleurt", str(bleurt)))


def test_lm_eval_figures_stand_with_the_others(world, tmp_path, monkeypatch):
    """The harness is not installed with the project: its result is the layout of lm_eval 0.4."""
    asked, spread = [], []

    def simple_evaluate(model, model_args, tasks, device):
        asked.append((model, model_args["pretrained"], tasks))
        spread.append((model_args.get("parallelize"), Path(model_args.get("offload_folder", "none")).is_dir()))
        values = {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1}
        return {"results": {"arc": values}, "n-samples": {"arc": {"original": 9, "effective": 7}}}

    monkeypatch.setitem(sys.modules, "lm_eval", types.SimpleNamespace(simple_evaluate=simple_evaluate))
    monkeypatch.setattr(lm_harness.importlib.util, "find_spec", lambda _: True)
    for _ in range(2):  # the second time from lm_eval.json
        main(flags(world, tmp_path, "--lm_eval", "arc"))
    assert [one[0] for one in asked] == ["hf", "hf"] and asked[1][1] == str(world / "sku" / "unlearned")
    results = json.loads((tmp_path / "results.json").read_text())["figures"]
    (row,) = [row for row in results if row["set"] == "lm_eval arc" and row["model"] == "sku"]
    assert (row["metric"], row["value"], row["n"]) == ("acc", 0.5, 7)
    assert row["low"] == pytest.approx(0.304) and row["high"] == pytest.approx(0.696)
    main(flags(world, tmp_path / "spread", "--lm_eval", "arc", "--device_map", "auto"))
    assert spread == [(None, False)] * 2 + [(True, True)] * 2
