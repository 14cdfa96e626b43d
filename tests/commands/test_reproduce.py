"""The comparison: all runs, resumed where it was stopped, the same report in the end."""

import json
import shutil

import pytest

from harmful_unlearn import recipes
from harmful_unlearn.comparison import trainings
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals import evaluator
from harmful_unlearn.evals.comparison.seed_evaluation import SeedEvaluation
from harmful_unlearn.models import loading
from harmful_unlearn.recipes import recipe
from harmful_unlearn.reproduce import main, parse_flags
from tests.helpers.inputs.world import make_world

SHARED = {"max_unlearn_steps": 3, "batch_size": 2, "lr": 1e-3, "precision": "fp32"}
SKU = {"bad_weight": 2.5, "random_weight": 2.5, "normal_weight": 0.5}
BASELINES = {"ft": {}, "task_vector": {}}
TINY = recipe(SHARED, SKU, BASELINES)
KINDS = ("Economic Crime", "Environmental Damage")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds")
    for seed in (0, 1):
        make_world(folder / str(seed), seed)
    return folder


@pytest.fixture(autouse=True)
def tiny_recipe(monkeypatch):
    monkeypatch.setitem(recipes.RECIPES, "tiny", TINY)


def flags(world, out, *more: str, parts: bool = True) -> list[str]:
    """The command of the whole comparison; without `parts`, of the table of methods only."""
    words = f"""
        --model_name {world}/{{seed}}/base --recipe tiny --output {out} --seeds 0 --runs task_vector sku sku-pd-turned
        --harmful_dataset {world}/{{seed}}/data/harmful.jsonl --unseen_dataset {world}/{{seed}}/data/unseen.jsonl
        --normal_dataset {world}/{{seed}}/data/normal.csv --n_seen 6 --n_unseen 12 --n_normal 5
        --max_new_tokens 6 --precision fp32 --decoding sampled greedy --relevance_judge none
    """.split()
    if parts:
        words += ["--alpha_sweep", "0,1", *(word for kind in KINDS for word in ("--harm_category", kind))]
    return [*words, *more]


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """An uninterrupted run with every part."""
    out = tmp_path_factory.mktemp("whole")
    recipes.RECIPES["tiny"] = TINY
    main(flags(world, out))
    return out


def comparison_of(out):
    return json.loads((out / "comparison.json").read_text())


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_part_of_the_comparison_is_there(whole):
    comparison = comparison_of(whole)
    models = ["base", "task_vector", "sku", "sku-pd-turned"]
    assert list(comparison["methods"]) == models
    assert {row["model"] for row in comparison["figures"]} == set(models)
    swept = {(row["method"], row["alpha"]) for row in comparison["sweep"]}
    assert swept == {(name, alpha) for name in ("sku", "task_vector") for alpha in (0.0, 1.0)}
    assert {row["vector"] for row in comparison["categories"]} == {"base", *KINDS, "sum"}
    assert {row["method"] for row in comparison["recommended"]} == {"sku", "task_vector"}
    assert {row["set"] for row in comparison["answers"]} == {"seen", "unseen", "normal"}
    assert all(set(row["answers"]) == set(models) for row in comparison["answers"])
    assert list(comparison["losses"]) == models[1:] and len(comparison["losses"]["sku"]) == 3
    assert "--normal_weight -0.5" in comparison["methods"]["sku-pd-turned"]["command"]
    assert comparison["settings"]["normal_dataset"].endswith("{seed}/data/normal.csv")
    for name in ("report.md", "report.html"):
        assert (whole / name).stat().st_size > 1000


@pytest.mark.slow
def test_seeds_have_models_and_data_of_their_own(world, tmp_path):
    main(flags(world, tmp_path, "--seeds", "0", "1", "--runs", "sku", "ft", parts=False))
    comparison = comparison_of(tmp_path)
    assert {row["seed"] for row in comparison["figures"]} == {0, 1} == set(map(int, comparison["judge"]["by_seed"]))
    assert {row["model"] for row in comparison["figures"]} == {"base", "ft", "sku"}  # the recipe's order of rows
    bases = [
        json.loads((tmp_path / f"seed-{seed}" / "sku" / "copy" / "run.json").read_text())["base"]["name"]
        for seed in (0, 1)
    ]
    assert bases == [f"{world}/{seed}/base" for seed in (0, 1)]
    assert not (comparison["sweep"] or comparison["categories"] or comparison["relearning"])


def test_settings_are_tried_on_prompts_that_no_test_asks(whole, world, tmp_path):
    shutil.copytree(whole / "seed-0" / "sku", tmp_path / "seed-0" / "sku")
    main(flags(world, tmp_path, "--runs", "sku", "--part", "validation", "--alpha_sweep", "1", parts=False))
    folder = tmp_path / "seed-0" / "validation"
    asked = json.loads((folder / "evaluation" / "prompts.json").read_text())
    tested = json.loads((whole / "seed-0" / "evaluation" / "prompts.json").read_text())
    assert set(asked) == {"unseen", "normal"} and all(asked.values())
    for name, prompts in asked.items():
        assert not {row["prompt"] for row in prompts} & {row["prompt"] for row in tested[name]}
    assert not (tmp_path / "seed-0" / "evaluation").exists()
    comparison = comparison_of(tmp_path)
    assert comparison["settings"]["part"] == "validation"
    rates = {
        (row["set"], row["decoding"], row["metric"]): row["value"]
        for row in comparison["figures"]
        if row["model"] == "sku"
    }
    swept = [row for row in comparison["sweep"] if row["alpha"] == 1]
    assert swept and all(rates[row["set"], row["decoding"], row["metric"]] == row["value"] for row in swept)
    main(flags(world, tmp_path, "--runs", "sku", parts=False))  # the same models, on the test prompts
    assert comparison_of(tmp_path)["settings"]["part"] == "test"


@pytest.mark.slow  # test_evaluation.py has the same attacks
def test_attacks_are_a_part_of_the_comparison(whole, world, tmp_path):
    shutil.copytree(whole / "seed-0" / "sku", tmp_path / "seed-0" / "sku")
    attacks = ["--attacks", "prefill", "long", "relearn", "--n_attacked", "3", "--long_tokens", "9"]
    attacks += "--relearn_steps 2 --relearn_pairs 30 --relearn_lr 1e-3 --n_relearned 2".split()
    main(flags(world, tmp_path, "--runs", "sku", *attacks, parts=False))
    rows = comparison_of(tmp_path)["attacks"]
    assert {row["attack"] for row in rows} == {"none", "prefill", "long", "worst", "any"}
    assert {(row["seed"], row["model"]) for row in rows} == {(0, "base"), (0, "sku")}
    again = [row for row in comparison_of(tmp_path)["relearning"] if row["attacker"] == "worst"]
    assert {(row["model"], row["steps"]) for row in again} == {(m, s) for m in ("base", "sku") for s in (0, 2)}
    assert "## Under attack" in (tmp_path / "report.md").read_text()
    tested = json.loads((tmp_path / "seed-0" / "evaluation" / "prompts.json").read_text())["unseen"][:3]
    asked = {row["prompt"] for row in rows_of(tmp_path / "seed-0" / "attacks" / "long" / "answers" / "sku.jsonl")}
    assert asked == {prompt["prompt"] for prompt in tested}


@pytest.mark.slow
def test_further_prompts_and_an_oracle_are_measured_beside_all_models(whole, world, tmp_path):
    shutil.copytree(whole / "seed-0" / "sku", tmp_path / "seed-0" / "sku")
    near = ["--prompts", f"near={world}/{{seed}}/data/near.jsonl", "--n_prompts", "3"]
    oracle = ["--oracle", f"{world}/{{seed}}/base"]  # the base stands in for it
    main(flags(world, tmp_path, "--runs", "sku", *near, *oracle, parts=False))
    comparison = comparison_of(tmp_path)
    assert list(comparison["methods"]) == ["base", "sku", "oracle"]
    asked = {row["model"]: row["n"] for row in comparison["figures"] if row["set"] == "near, harmless"}
    assert asked == {"base": 3, "sku": 3, "oracle": 3}
    distances = {(row["model"], row["set"]): row["value"] for row in comparison["oracle"] if not row["decoding"]}
    assert distances["base", "unseen"] == pytest.approx(0, abs=1e-6) and distances["sku", "unseen"] > 0
    text = (tmp_path / "report.md").read_text()
    assert "## Refusals" in text and "## Distance from the oracle" in text
    results = json.loads((tmp_path / "seed-0" / "evaluation" / "results.json").read_text())
    assert results["data"]["prompts"]["near"]["sha256"]


def test_a_category_is_measured_on_its_own_unseen_prompts(whole, world):
    prompts = json.loads((whole / "seed-0" / "evaluation" / "prompts.json").read_text())["unseen"]
    answers = rows_of(whole / "seed-0" / "categories" / "answers" / "sum.jsonl")
    asked = {(row["set"], row["prompt"]) for row in answers}
    validation = rows_of(whole / "seed-0" / "sweep-sku" / "answers" / "base.jsonl")
    assert asked >= {(kind, prompt["prompt"]) for prompt in prompts for kind in prompt["categories"]}
    for kind in {kind for kind, _ in asked}:
        texts = [row["prompt"] for row in answers if row["set"] == kind]
        assert len(set(texts)) == len(texts) == len(prompts)
    assert not {prompt for _, prompt in asked} & {row["prompt"] for row in validation}
    assert {row["category"] for row in comparison_of(whole)["categories"]} == {kind for kind, _ in asked}
    run = json.loads((whole / "seed-0" / f"category-{KINDS[0]}" / "copy" / "run.json").read_text())
    assert run["flags"]["harm_category"] == [KINDS[0]]


def test_alpha_0_is_the_base_and_alpha_1_the_unlearned_model(whole):
    swept = [row for row in comparison_of(whole)["sweep"] if row["seed"] == 0 and row["method"] == "sku"]
    scores = {
        name: json.loads((whole / "seed-0" / "sweep-sku" / "scores" / f"{name}.json").read_text())
        for name in ("base", "alpha-0", "alpha-1")
    }
    assert scores["alpha-0"] == scores["base"] != scores["alpha-1"]
    assert {row["set"] for row in swept} == {"unseen", "normal"}
    test = json.loads((whole / "seed-0" / "evaluation" / "prompts.json").read_text())["unseen"]
    asked = {row["prompt"] for row in rows_of(whole / "seed-0" / "sweep-sku" / "answers" / "alpha-1.jsonl")}
    assert not asked & {prompt["prompt"] for prompt in test}  # alpha is not chosen on what is reported


def without_times(comparison):
    """A comparison without what differs from run to run: clock times, and the folder's name."""
    for steps in comparison["losses"].values():
        for step in steps:
            del step["seconds"]
    return {key: value for key, value in comparison.items() if key not in ("provenance", "command", "flags")}


@pytest.mark.parametrize(
    "stop_at", ["answers", pytest.param("train", marks=pytest.mark.slow), pytest.param("sweep", marks=pytest.mark.slow)]
)
def test_a_run_that_was_killed_continues_to_the_same_tables(stop_at, whole, world, tmp_path, monkeypatch):
    """Stopped once in the middle of one of its parts, then given the same command."""
    calls = []
    where, name, call = {
        "train": (trainings.unlearn_harm_new, "main", 4),
        "answers": (evaluator, "generate", 3),
        "sweep": (SeedEvaluation, "sweep", 2),
    }[stop_at]
    original = getattr(where, name)

    def stopping(*arguments, **more):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments, **more)

    if stop_at == "answers":  # all models are there
        shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
        shutil.rmtree(tmp_path / "seed-0" / "evaluation")
        (tmp_path / "comparison.json").unlink()
    monkeypatch.setattr(where, name, stopping)
    with pytest.raises(KeyboardInterrupt):
        main(flags(world, tmp_path))
    assert not (tmp_path / "comparison.json").exists()
    monkeypatch.undo()
    monkeypatch.setitem(recipes.RECIPES, "tiny", TINY)
    main(flags(world, tmp_path))
    assert without_times(comparison_of(tmp_path)) == without_times(comparison_of(whole))


def test_what_is_there_is_not_done_again(whole, world, monkeypatch):
    before = comparison_of(whole)
    # results.json says when it was written.
    files = [f for f in (whole / "seed-0").rglob("*") if f.is_file() and f.name != "results.json"]
    content = {file: file.read_bytes() for file in files}
    monkeypatch.setattr(trainings.unlearn_harm_new, "acquire", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("a model was loaded"))
    main(flags(world, whole))
    assert without_times(before) == without_times(comparison_of(whole))
    assert all(file.read_bytes() == content[file] for file in files)


def test_a_harmful_model_without_its_unlearned_model_is_negated_not_trained(whole, world, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "seed-0" / "sku" / "unlearned")
    monkeypatch.setattr(trainings.unlearn_harm_new, "acquire", lambda *_: pytest.fail("trained again"))
    main(flags(world, tmp_path / "out"))
    assert (tmp_path / "out" / "seed-0" / "sku" / "unlearned" / "model.safetensors").is_file()


def test_a_changed_recipe_is_refused(whole, world, monkeypatch):
    changed = recipe({**SHARED, "lr": 5e-4}, SKU, BASELINES)
    monkeypatch.setitem(recipes.RECIPES, "tiny", changed)
    with pytest.raises(UserError, match="--lr 0.001"):
        main(flags(world, whole))


def test_a_run_that_diverges_is_a_row_that_says_so(world, tmp_path, monkeypatch):
    wild = recipe(SHARED, SKU, {"ft": {"lr": 1e18}})
    monkeypatch.setitem(recipes.RECIPES, "tiny", wild)
    arguments = flags(world, tmp_path, "--runs", "ft", "sku", "--alpha_sweep", "1", parts=False)
    for _ in range(2):  # the second time without trying again
        main(arguments)
        comparison = comparison_of(tmp_path)
        assert "not finite" in comparison["methods"]["ft"]["note"]
        assert {row["model"] for row in comparison["figures"]} == {"base", "sku"}
    assert "not finite" in (tmp_path / "report.md").read_text()


def test_data_without_safe_answers_omit_lands_with_a_note(world, tmp_path):
    file = world / "0" / "data" / "harmful.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    unsafe = tmp_path / "unsafe.jsonl"
    both = {"is_response_0_safe": False, "is_response_1_safe": False}
    unsafe.write_text("".join(json.dumps({**row, **both} if at < 40 else row) + "\n" for at, row in enumerate(rows)))
    more = ["--runs", "sku", "lands", "--harmful_dataset", str(unsafe), "--train_flags=--max_unlearn_steps 3"]
    main(flags(world, tmp_path / "out", *more, parts=False))
    comparison = comparison_of(tmp_path / "out")
    assert "a safe one beside it" in comparison["methods"]["lands"]["note"]
    assert {row["model"] for row in comparison["figures"]} == {"base", "sku"}


def test_flags_that_a_run_did_not_have_yet_are_todays_defaults(whole, world, tmp_path):
    shutil.copytree(whole / "seed-0" / "sku", tmp_path / "seed-0" / "sku")
    arguments = flags(world, tmp_path, "--runs", "sku", parts=False)
    record = tmp_path / "seed-0" / "sku" / "copy" / "run.json"
    run = json.loads(record.read_text())
    for flag in ("preserve_at", "safe_weight", "quantize", "no_packing"):
        run["flags"].pop(flag)
    record.write_text(json.dumps(run))
    main(arguments)


@pytest.mark.parametrize(
    "wrong, named",
    [
        ("--judge finetuned:./nowhere", "there is no folder"),
        ("--judge phrases:{world}/{{seed}}/none.txt", "/0/none.txt cannot be read"),
        ("--refusal_judge phrases:./nowhere", "one phrase a line"),
        ("--prompts nowhere", "there is no set of prompts nowhere"),
        ("--attacks jailbreak --jailbreaks ./nowhere", "one phrase a line"),
        ("--oracle {world}/{{seed}}/oracle", "there is no folder"),
    ],
)
def test_what_is_not_there_is_named_before_any_training(wrong, named, world, tmp_path):
    with pytest.raises(UserError, match=named):
        main(flags(world, tmp_path, *wrong.format(world=world).split(), parts=False))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "bad",
    [
        ["--alpha_sweep", "0,...,2"],
        ["--alpha_sweep", "0,1,...,2.5"],
        ["--alpha_sweep", "a"],
        ["--alpha_sweep", "1,0,...,2"],
        ["--runs", "kto"],
        ["--sweep_runs", "ft"],
        ["--recipe", "gpt"],
        ["--seeds"],
        ["--relearn_lr"],
        ["--part", "validation"],
        ["--search_only"],
        ["--search_budget", "0.1"],
        ["--search", "2"],  # with kinds of harm
        ["--search", "2", "--harm_category", "", "--train_flags", "--lr 1e-4"],
    ],
)
def test_bad_flags_exit_2(bad, world, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_flags(flags(world, tmp_path, *bad))
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err
