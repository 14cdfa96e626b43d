"""The recipes: the paper's hyper-parameters, and flags that the script takes."""

import pytest

from harmful_unlearn.recipes import RECIPES, ComparisonRun
from harmful_unlearn.training.flags import TrainingSettings, parse_flags

MAIN = ["ft", "ga", "ga_mismatch", "task_vector", "sku", "land", "lands", "lands-no-harm", "task_vector-alpha-2"]


def settings_of(run: ComparisonRun) -> TrainingSettings:
    """What the script makes of a run's flags."""
    return parse_flags([word for name, value in run.flags.items() for word in (f"--{name}", str(value))])


@pytest.mark.parametrize("name", ["facebook/opt-2.7b", "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-13b-hf"])
def test_recipes_are_the_papers(name):
    runs = RECIPES[name].rows
    assert runs["sku"].flags == {
        "max_unlearn_steps": 1000, "batch_size": 2, "lr": 2e-4,
        "bad_weight": 2.5, "random_weight": 2.5, "normal_weight": 1,
    }  # fmt: skip
    assert runs["sku-no-rd"].flags["random_weight"] == 0
    assert runs["sku-pd-turned"].flags["normal_weight"] == -1
    assert "bad_weight" not in runs["task_vector"].flags
    assert [name for name, run in runs.items() if run.group == "main" and run.by_default] == MAIN
    for method in ("land", "lands"):  # their own steps and learning rate
        settings = settings_of(runs[method])
        assert (settings.max_unlearn_steps, settings.lr) == (200, 1e-4)


def test_a_base_without_refusals_has_lands_settings_of_its_own():
    rows = RECIPES["demo-no-refusals"].rows
    flags = rows["lands"].flags
    assert flags["max_unlearn_steps"] == 400 and flags["safe_weight"] == 1
    assert rows["lands-no-harm"].flags["bad_weight"] == 0
    assert "lr" not in rows["land"].flags


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipes_flags_are_the_scripts(recipe):
    for run in RECIPES[recipe].rows.values():
        assert settings_of(run).method == run.method


def test_the_demos_recipe_has_more_ablations():
    runs = RECIPES["demo"].rows
    more = ("task_vector-all-tokens", "sku-paper-losses", "sku-paper-weights", "ga-80-steps")
    assert [name for name in runs if runs[name].group == "ablation"][-4:] == list(more)
