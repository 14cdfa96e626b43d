"""reproduce.py --search: from trials on validation prompts to a comparison on test prompts."""

import json

import pytest

from harmful_unlearn import recipes
from harmful_unlearn.evals.files.answers import read_answers
from harmful_unlearn.recipes import recipe
from harmful_unlearn.reproduce import main
from tests.helpers.inputs.world import make_world

TINY = recipe(
    {"max_unlearn_steps": 3, "batch_size": 2, "lr": 1e-3, "precision": "fp32"},
    {"bad_weight": 2.5, "random_weight": 2.5, "normal_weight": 0.5},
    {},
)


@pytest.mark.slow
def test_a_search_chooses_the_settings_of_the_comparison(tmp_path, monkeypatch):
    """On validation prompts only; with the same command nothing is trained again."""
    for seed in (0, 1):
        make_world(tmp_path / "worlds" / str(seed), seed)
    monkeypatch.setitem(recipes.RECIPES, "tiny", TINY)
    world, out = tmp_path / "worlds" / "{seed}", tmp_path / "out"
    tasks = [{"instruction": f"Name {number} kinds of bread.", "output": f"Bread {number}."} for number in range(9)]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    words = f"""
        --model_name {world}/base --recipe tiny --output {out} --seeds 0 1 --runs sku npo
        --harmful_dataset {world}/data/harmful.jsonl --unseen_dataset {world}/data/unseen.jsonl
        --normal_dataset {world}/data/normal.csv --n_seen 6 --n_unseen 12 --n_normal 5
        --utility_dataset {tmp_path}/tasks.jsonl
        --max_new_tokens 6 --precision fp32 --decoding greedy
    """.split()
    main([*words, "--search", "3", "--search_budget", "5"])
    comparison = json.loads((out / "comparison.json").read_text())
    trials = comparison["trials"]
    assert {row["method"] for row in trials} == {"base", "sku", "npo"} and sum(row["chosen"] for row in trials) == 2
    assert all(row["task_perplexity"] > 0 for row in trials)
    costs = [max(row["perplexity"], row["task_perplexity"]) for row in trials]
    assert [row["violation"] for row in trials] == pytest.approx([max(0.0, cost - 6) for cost in costs])
    fits = [row["relevance"] for row in trials if row["relevance"] is not None]
    asked = {(row["method"], row["trial"]) for row in trials if row["harm"] is not None}
    assert len(fits) == len(asked), "of each trial one point"
    assert '"fits its question, %",normal references ×,everyday tasks ×' in (out / "search.csv").read_text()
    recipe = json.loads((out / "search" / "recipe.json").read_text())
    record = json.loads((out / "seed-1" / "npo" / "copy" / "run.json").read_text())
    assert record["flags"]["beta"] == recipe["rows"]["npo"]["flags"]["beta"]
    asked = {row["prompt"] for file in (out / "search").rglob("answers/*.jsonl") for row in read_answers(file)}
    assert asked
    for seed in (0, 1):
        tested = json.loads((out / f"seed-{seed}" / "evaluation" / "prompts.json").read_text())
        assert not asked & {row["prompt"] for name in ("unseen", "normal") for row in tested[name]}
    assert not list((out / "search").rglob("*.safetensors"))
    assert (out / "search.svg").stat().st_size > 1000 and "The search for settings" in (out / "report.md").read_text()
    before = (out / "search" / "trials.csv").read_text()
    main([*words, "--search", "3", "--search_budget", "5"])
    assert (out / "search" / "trials.csv").read_text() == before
