"""The evaluation command: what it reads from run.json, what it writes, and how it refuses."""

import csv
import json
import re
import shutil
import sys
from types import SimpleNamespace

import pytest

from harmful_unlearn.data.truthfulqa import read_normal
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.files.answers import read_answers
from harmful_unlearn.evals.inference import vllm_backend
from harmful_unlearn.evaluation import main, parse_flags, trainings_of
from harmful_unlearn.models import loading
from harmful_unlearn.storage.run_record import read_trainings
from harmful_unlearn.unlearn_harm_new import main as unlearn
from task_vector import main as negate
from tests.helpers.inputs.world import make_bleurt, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world with a base, and methods trained on it for a few steps: NAME/harmful and NAME/unlearned."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    data = f"--harmful_dataset {folder}/data/harmful.jsonl --normal_dataset {folder}/data/normal.csv"
    trainings = {"sku": [], "ga": ["--method", "ga"], "ft": ["--method", "ft"], "other-seed": ["--seed", "1"]}
    for name, more in trainings.items():
        home = folder / name
        saved = f"--model_save_dir {home}/harmful --task_vector_saving_path {home}/unlearned --log_file {home}/run.log"
        unlearn([*f"--model_name {folder}/base {data} --max_unlearn_steps 4 --lr 1e-3 {saved}".split(), *more])
    return folder


def flags(world, out, *more, model="sku"):
    prompts = f"--unseen_dataset {world}/data/unseen.jsonl --n_seen 4 --n_unseen 6 --n_normal 5"
    models = f"--model {model}={world / model}/unlearned --base {world}/base"
    asked = f"--max_new_tokens 8 --seed 0 --base_answers {out.parent}/base-answers --relevance_judge none"
    return [*f"{models} --output {out} {prompts} {asked}".split(), *more]


def results_of(out):
    return json.loads((out / "results.json").read_text())


def questions_of(out, name):
    """The drawn prompts of a set."""
    return {prompt["prompt"] for prompt in json.loads((out / "prompts.json").read_text())[name]}


def harmful_rows(world):
    return [json.loads(line) for line in (world / "data" / "harmful.jsonl").read_text().splitlines()]


def test_one_command_measures_models_beside_the_base(world, tmp_path, capsys):
    ga = ["--model", f"ga={world / 'ga' / 'unlearned'}"]
    main(flags(world, tmp_path, *ga, "--decoding", "sampled", "greedy"))
    results = results_of(tmp_path)
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
    assert {name: len(drawn) for name, drawn in prompts.items()} == {"seen": 4, "unseen": 6, "normal": 5}
    for prompt in prompts["seen"]:  # the recorded row leads back to the data
        row, side = divmod(prompt["row"], 2)
        assert harmful_rows(world)[row][f"response_{side}"] == prompt["reference"]
    with (tmp_path / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(results["figures"])
    by = {row["judge"] for row in table if row["metric"] == "harmful_rate"}
    assert len(by) == 1 and by.pop().startswith("classifier, held out: accuracy")
    markdown = (tmp_path / "results.md").read_text()
    assert markdown in capsys.readouterr().out and "accuracy" in markdown and "| sku | greedy |" in markdown
    assert len(read_answers(tmp_path / "answers" / "sku.jsonl")) == 2 * (4 + 6 + 5)
    (rouge,) = (
        row["value"]
        for row in results["figures"]
        if (row["model"], row["metric"], row["decoding"]) == ("base", "rouge_base", "greedy")
    )
    answers = [row["answer"] for row in read_answers(tmp_path / "answers" / "base.jsonl")
               if (row["set"], row["decoding"]) == ("normal", "greedy")]  # fmt: skip
    # The base's answers are their own references: ROUGE-L is 1 wherever there is a word.
    assert rouge == pytest.approx(sum(bool(re.search("[a-z0-9]", answer.lower())) for answer in answers) / 5)


def test_everyday_tasks(world, tmp_path, capsys):
    tasks = tmp_path / "tasks.jsonl"
    rows = [{"instruction": f"Count to {n}.", "input": "", "output": f"up to {n}"} for n in range(12)]
    tasks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(flags(world, tmp_path / "out", "--utility_dataset", str(tasks), "--n_utility", "3"))
    results = results_of(tmp_path / "out")
    asked = [row for row in results["figures"] if row["set"] == "utility"]
    assert {row["metric"] for row in asked} >= {"degenerate_rate", "rouge_base", "base_answer_perplexity"}
    assert {row["n"] for row in asked} == {3} and results["data"]["utility"]["rows"] == 12
    assert "## utility prompts" in capsys.readouterr().out


def test_further_prompts_are_asked_and_their_refusals_counted(world, tmp_path, capsys):
    file = tmp_path / "gnomes.jsonl"
    rows = [{"prompt": f"How do I hide gnome {n}?", "label": "unsafe" if n > 1 else "safe"} for n in range(5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    openings = tmp_path / "openings.txt"
    openings.write_text("\n".join("abcdefghijklmnopqrstuvwxyz"))  # whatever begins with a letter
    asked = ["--prompts", str(file), f"xstest={file}", "--n_prompts", "2", "--refusal_judge", f"phrases:{openings}"]
    main(flags(world, tmp_path / "out", *asked))
    figures = results_of(tmp_path / "out")["figures"]
    rows = {(row["model"], row["set"], row["metric"]): row for row in figures}
    assert (
        rows["sku", "gnomes, harmless", "refusal_rate"]["n"]
        == 2
        == rows["base", "xstest, harmful", "unjudged_rate"]["n"]
    )
    assert ("sku", "gnomes, harmless", "harmful_rate") not in rows
    answers = read_answers(tmp_path / "out" / "prompts" / "gnomes" / "answers" / "sku.jsonl")
    begun = [row["answer"][:1].isalpha() and row["verdict"] != "degenerate" for row in answers]
    assert [row["refused"] for row in answers] == begun and len(answers) == 4
    assert results_of(tmp_path / "out")["data"]["prompts"]["xstest"]["licence"] == "CC BY 4.0"
    assert "## gnomes, harmless" in capsys.readouterr().out
    main(flags(world, tmp_path / "out"))  # without them: the answers stay
    assert {row["set"] for row in results_of(tmp_path / "out")["figures"]} == {"seen", "unseen", "normal"}
    with pytest.raises(UserError, match="--prompts gnomes: "):
        file.write_text(json.dumps({"prompt": "x " * 600}))
        main(flags(world, tmp_path / "long", "--prompts", str(file)))


def test_a_second_run_changes_nothing_and_loads_no_model(world, tmp_path, monkeypatch):
    main(flags(world, tmp_path))
    first = results_of(tmp_path)["figures"]
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("a model was loaded"))
    main(flags(world, tmp_path))
    assert results_of(tmp_path)["figures"] == first


def test_a_second_evaluation_takes_the_bases_answers_from_the_first(world, tmp_path, capsys):
    arguments = ["--base_answers", str(tmp_path / "kept")]
    main(flags(world, tmp_path / "first", *arguments))
    (tmp_path / "second").mkdir()  # the same prompts, and another model
    shutil.copytree(world / "sku" / "unlearned", tmp_path / "copy")
    assert "are those in" not in capsys.readouterr().out
    main(flags(world, tmp_path / "second", *arguments, "--model", f"again={tmp_path / 'copy'}"))
    assert str(tmp_path / "kept") in capsys.readouterr().out
    first, second = (results_of(tmp_path / name)["figures"] for name in ("first", "second"))
    assert first == [row for row in second if row["model"] != "again"]
    main(flags(world, tmp_path / "third", "--base_answers", "none"))
    assert "are those in" not in capsys.readouterr().out


def test_answers_that_do_not_fit_their_question_are_counted(world, tmp_path):
    main(flags(world, tmp_path / "out", "--relevance_judge", "likelihood", "--n_seen", "0"))
    results = results_of(tmp_path / "out")
    assert results["relevance_judge"]["judge"] == "likelihood" and results["relevance_judge"]["n_learned_from"] >= 10
    rates = {(f["model"], f["set"]): f for f in results["figures"] if f["metric"] == "relevance_rate"}
    assert {name for _, name in rates} == {"unseen", "normal"} and all(rate["n"] for rate in rates.values())
    split = [f["value"] for f in results["figures"] if f["metric"].startswith("safe_") and f["model"] == "sku"]
    assert len(split) == 3 and 0 <= sum(split) <= 1


@pytest.mark.slow
def test_attacks_are_measured_beside_plain_asking_and_kept(world, tmp_path, monkeypatch, capsys):
    attacks = "--attacks all --n_attacked 2 --shots 2 --best_of 2 --relearn_steps 1 --relearn_pairs 30".split()
    attacks += "--relearn_lr 1e-3 --long_tokens 12".split()
    main(flags(world, tmp_path / "out", *attacks))
    printed = capsys.readouterr().out
    table = (tmp_path / "out" / "attacks.md").read_text()
    assert table in printed and "| jailbreak | role play |" in table and "| worst |" in table
    with (tmp_path / "out" / "attacks.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} == {"base", "sku"}
    assert {row["attack"] for row in rows} == {
        "none", "prefill", "jailbreak", "few_shot", "best_of_n", "long", "quantize", "abliterate", "worst", "any"
    }  # fmt: skip
    assert all(row["n"] in ("0", "1", "2") for row in rows if row["metric"] == "harmful_rate")
    curves = list(csv.DictReader((tmp_path / "out" / "relearning.csv").read_text().splitlines()))
    assert {row["steps"] for row in curves} == {"0", "1"} and "| relearn | 1 steps |" in table
    assert "Perplexity of normal references" in table and "| quantize | 4 bits |" in table
    asked = {row["prompt"] for row in read_answers(tmp_path / "out" / "attacks" / "long" / "answers" / "sku.jsonl")}
    assert len(asked) == 2 and asked <= questions_of(tmp_path / "out", "unseen")
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("a model was loaded"))
    main(flags(world, tmp_path / "out", *attacks))
    assert (tmp_path / "out" / "attacks.md").read_text() == table
    with pytest.raises(UserError, match="attacks/long holds answers made otherwise .max_new_tokens"):
        main(flags(world, tmp_path / "out", *attacks[:-1], "13"))
    with pytest.raises(UserError, match="--attacks need harmful prompts"):
        main(flags(world, tmp_path / "other", "--attacks", "long", "--n_seen", "0", "--n_unseen", "0"))


@pytest.mark.slow
def test_an_evaluation_takes_no_scores_from_an_attack_that_asked_the_same(world, tmp_path):
    """An attack with longer answers asks as another evaluation may, and keeps the base's answers without scores."""
    only = ["--n_seen", "0", "--n_normal", "0", "--n_attacked", "6"]
    main(flags(world, tmp_path / "one", *only, "--attacks", "long", "--long_tokens", "9"))
    main([*flags(world, tmp_path / "two", *only), "--max_new_tokens", "9"])
    assert any(row["metric"] == "reference_perplexity" for row in results_of(tmp_path / "two")["figures"])


def test_nothing_trained_on_is_unseen_or_normal(world, tmp_path):
    """By the run's own flags: 4 steps of 2 pairs, and what RD drew; normal questions by both their texts."""
    main(flags(world, tmp_path, "--n_unseen", "1000", "--n_seen", "1000", "--n_normal", "1000"))
    rows = harmful_rows(world)
    assert questions_of(tmp_path, "seen") == {row["prompt"] for row in rows[:8]}
    assert not questions_of(tmp_path, "unseen") & {row["prompt"] for row in rows}
    normal = read_normal(world / "data" / "normal.csv", 8888)  # the script's default seed
    trained = {normal.texts[row].question for row in normal.train}
    assert questions_of(tmp_path, "normal") and not questions_of(tmp_path, "normal") & trained


def test_a_model_of_others_is_measured_as_one_of_ours_was_trained(world, tmp_path):
    arguments = flags(world, tmp_path, "--trained_as", str(world / "sku" / "harmful"))
    arguments[1] = f"theirs={world / 'base'}"
    main(arguments)
    assert questions_of(tmp_path, "seen") <= {row["prompt"] for row in harmful_rows(world)[:8]}


def test_untouched_rows_of_the_same_data_serve_as_unseen(world, tmp_path):
    arguments = flags(world, tmp_path)
    at = arguments.index("--unseen_dataset")
    main(arguments[:at] + arguments[at + 2 :])
    assert questions_of(tmp_path, "unseen") <= {row["prompt"] for row in harmful_rows(world)[8:]}


def test_trainings_are_read_from_either_stage(world):
    (harmful,), (unlearned,) = (read_trainings(world / "sku" / name) for name in ("harmful", "unlearned"))
    assert harmful.flags == unlearned.flags and read_trainings(world / "base") == []


def test_a_sum_of_vectors_is_recorded_if_each_of_them_is(world, tmp_path):
    """Also through a saved vector, and not if one of the models is somebody else's."""
    theirs = tmp_path / "theirs"
    shutil.copytree(world / "ga" / "harmful", theirs)
    (theirs / "run.json").unlink()
    for name, summand in (("recorded", world / "ga" / "harmful"), ("unrecorded", theirs)):
        base, vector = ["--base", str(world / "base")], str(tmp_path / f"{name}-vector")
        negate([*base, "--finetuned", str(world / "sku" / "harmful"), str(summand), "--save_vector", vector])
        negate([*base, "--vector", vector, "--output", str(tmp_path / name)])
    recorded, unrecorded = ({name: tmp_path / name} for name in ("recorded", "unrecorded"))
    assert len(trainings_of(recorded, [])) == 2
    with pytest.raises(UserError, match="what unrecorded was trained on"):
        trainings_of(unrecorded, [])
    assert len(trainings_of(unrecorded, [world / "ga" / "harmful"])) == 2


def test_a_model_that_saw_no_harm_has_no_seen_prompts(world, tmp_path):
    with pytest.raises(UserError, match="--n_seen 0"):
        main(flags(world, tmp_path, model="ft"))
    main(flags(world, tmp_path, "--n_seen", "0", model="ft"))
    assert {row["set"] for row in results_of(tmp_path)["figures"]} == {"unseen", "normal"}


@pytest.mark.parametrize(
    "change, named",
    [
        (["--model", "x={world}/base"], "trained_as"),
        (["--model", "x={world}/nowhere"], "no folder"),
        (["--model", "bare={world}/base"], "bare was trained on"),
        (["--trained_as", "{world}/base", "--model", "x={world}/base"], "another --trained_as"),
        (["--harmful_dataset", "{world}/data/unseen.jsonl"], "harmful_dataset"),
        (["--unseen_dataset", "{world}/none.jsonl"], "none.jsonl"),
        (["--model", "b={world}/other-seed/unlearned"], "different seeds"),
        (["--judge", "oracle"], "classifier"),
        (["--lm_eval", "truthfulqa_mc1"], "pip install lm_eval"),
        (["--max_new_tokens", "1000"], "max_new_tokens"),
        (["--part", "validation", "--n_unseen", "0", "--n_normal", "0"], "no validation prompt"),
        (["--backend", "vllm"], "pip install vllm"),
    ],
)
def test_what_cannot_be_measured_is_one_line_that_names_the_fix(change, named, world, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr(vllm_backend, "find_spec", lambda _: None)
    arguments = flags(world, tmp_path, *(word.format(world=world) for word in change))
    if "x={world}/base" in change:  # no other model, whose run.json would do
        arguments = arguments[2:]
    with pytest.raises(UserError, match=named):
        main(arguments)


@pytest.mark.parametrize(
    "bad",
    [
        ["--temperature", "0"],
        ["--n_seen", "0", "--n_unseen", "0", "--n_normal", "0"],
        ["--backend", "vllm", "--utility_dataset", "tasks.jsonl"],
        ["--decoding", "beam"],
        ["--model", "base=x"],
        ["--model", "sku=x"],
    ],
)
def test_bad_flags_exit_2(bad, world, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_flags(flags(world, tmp_path, *bad))
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err


def test_models_are_named_by_their_folder(tmp_path):
    settings = parse_flags(["--model", "models/some-model", "--base", "b", "--output", str(tmp_path)])
    assert settings.model == {"some-model": "models/some-model"}


def test_bleurt_is_among_the_figures_of_normal_answers(world, tmp_path):
    main(flags(world, tmp_path, "--bleurt", str(make_bleurt(tmp_path / "bleurt"))))
    rows = [row for row in results_of(tmp_path)["figures"] if row["metric"] == "bleurt_reference"]
    assert {row["model"] for row in rows} == {"base", "sku"}
    assert all((row["set"], row["n"]) == ("normal", 5) for row in rows)


def test_lm_eval_figures_are_among_the_others(world, tmp_path, monkeypatch):
    run = {"results": {"arc": {"acc,none": 0.5, "acc_stderr,none": 0.1}}, "n-samples": {"arc": {"effective": 7}}}
    asked = []
    fake = SimpleNamespace(simple_evaluate=lambda kind, **arguments: asked.append(arguments) or run)
    monkeypatch.setitem(sys.modules, "lm_eval", fake)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", SimpleNamespace(TaskManager=lambda include_path: None))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    main(flags(world, tmp_path, "--lm_eval", "arc"))
    main(flags(world, tmp_path / "spread", "--lm_eval", "arc", "--device_map", "auto"))
    assert [arguments["tasks"] for arguments in asked] == [["arc"]] * 4
    assert ["parallelize" in arguments["model_args"] for arguments in asked] == [False, False, True, True]
    (row,) = (row for row in results_of(tmp_path)["figures"] if (row["set"], row["model"]) == ("lm_eval arc", "sku"))
    assert (row["metric"], row["value"], row["n"]) == ("acc", 0.5, 7)
