"""A search: its budget, its bounds, what it chooses, and that neither a kill nor a full disk loses a trial."""

import json
import math
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from harmful_unlearn.comparison.search import all_flags
from harmful_unlearn.comparison.trial import TrialResult
from harmful_unlearn.errors import UserError
from harmful_unlearn.losses.methods import METHODS
from harmful_unlearn.recipes import RECIPES, Range, read_recipe, search_space, swept_alphas
from tests.helpers.documents import ROOT
from tests.helpers.inputs.tables import error_of
from tests.helpers.running.resumed import limited
from tests.helpers.running.searched import BOUNDS, ROWS, SETS, Measure, a_search, points_of, run

COMMAND = [sys.executable, str(ROOT / "tests" / "helpers" / "running" / "searched.py")]


def flags_of(one, name):
    return [result.flags for result in one.results[name].values()]


def test_every_method_has_the_same_number_of_trials_and_the_first_is_the_recipes(tmp_path):
    measure = Measure()
    one = run(a_search(tmp_path, 4, measure))
    assert {name: len(results) for name, results in one.results.items()} == {"sku": 4, "npo": 4}
    assert measure.measured == 8
    assert flags_of(one, "npo")[0] == {"lr": 1e-4, "max_unlearn_steps": 8, "normal_weight": 1.0, "beta": 0.1}
    assert len({json.dumps(flags) for flags in flags_of(one, "npo")}) == 4
    for name, values in search_space(ROWS["npo"]).items():
        for flags in flags_of(one, "npo"):
            assert values.low <= flags[name] <= values.high if isinstance(values, Range) else flags[name] in values
    assert run(a_search(tmp_path, 4, measure)) and measure.measured == 8  # nothing is left to do


def test_the_same_search_tries_the_same_settings(tmp_path):
    one, other = (run(a_search(tmp_path / name, 4)) for name in ("a", "b"))
    assert flags_of(one, "sku") == flags_of(other, "sku")
    interrupted = run(a_search(tmp_path / "c", 2))
    assert flags_of(interrupted, "sku") == flags_of(one, "sku")[:2]


def test_the_least_harm_within_the_bounds_is_chosen(tmp_path):
    one = run(a_search(tmp_path, 5))
    for name, (result, point, is_within) in one.chosen().items():
        assert is_within and point in result.points and point.perplexity <= 1.2
        everything = [p for r in one.results[name].values() for p in r.points if p.harm is not None]
        assert point.harm == min(p.harm for p in everything)
    _, point, _ = one.chosen()["sku"]
    assert point.alpha in swept_alphas(ROWS["sku"])
    rows = one.table()
    assert rows[0]["method"] == "base" and sum(row["chosen"] for row in rows) == 2
    assert {row["alpha"] for row in rows if row["method"] == "sku"} == set(swept_alphas(ROWS["sku"]))
    assert all((row["harm"] is None) == (row["violation"] > 0) for row in rows)
    json.dumps(rows, allow_nan=False)


def test_a_method_of_which_no_trial_keeps_the_bounds_is_named_as_such(tmp_path):
    bounds = replace(BOUNDS, perplexity=1e-9)
    one = run(replace(a_search(tmp_path, 4), bounds=bounds))
    _, point, is_within = one.chosen()["npo"]
    assert not is_within
    assert point.perplexity == min(p.perplexity for r in one.results["npo"].values() for p in r.points)


def test_a_training_that_fails_is_a_trial_too(tmp_path):
    broken = replace(ROWS["npo"], flags={**ROWS["npo"].flags, "failure": "it diverged"})
    one = a_search(tmp_path, 3, rows={"npo": ROWS["npo"]})
    one = replace(one, plan=lambda to, flags: (to, {**flags, **broken.flags}))
    assert [result.failure for result in run(one).results["npo"].values()] == ["it diverged"] * 3
    assert one.chosen() == {} and {row["perplexity"] for row in one.table()[1:]} == {None}
    assert "every training" in error_of(one.write, SETS, {})


def test_what_was_chosen_is_a_recipe_for_the_script(tmp_path):
    one = run(a_search(tmp_path, 3))
    file = one.write(SETS, {"model": "tiny"})
    recipe = read_recipe(str(file))
    assert list(recipe.rows) == ["sku", "npo"] and len(recipe.chosen_on) == 2
    assert all_flags(recipe.rows["sku"])["scaling_coef"] == one.chosen()["sku"][1].alpha
    assert all_flags(recipe.rows["npo"])["beta"] == one.chosen()["npo"][0].flags["beta"]
    said = json.loads(file.read_text())
    assert said["model"] == "tiny" and said["bounds"] == {"perplexity": 0.2} and "How?" not in file.read_text()
    assert (tmp_path / "trials.csv").read_text().count("\n") == len(one.table()) + 1


def test_trials_of_other_settings_are_not_taken_for_these(tmp_path):
    """The folder says which search it holds; more trials of the same are welcome, and so is another row."""
    one = run(a_search(tmp_path, 2))
    for changed in (
        replace(one, bounds=replace(BOUNDS, perplexity=0.3)),
        replace(one, facts={"judge": "another"}),
        replace(one, rows={"npo": replace(ROWS["npo"], flags={**ROWS["npo"].flags, "batch_size": 4})}),
    ):
        assert "other settings" in error_of(changed.run)
    assert len(run(a_search(tmp_path, 3, rows={"sku": ROWS["sku"], "dpo": ROWS["dpo"]})).results["sku"]) == 3


def test_a_row_of_negative_weight_and_one_outside_the_usual_ranges():
    turned = replace(ROWS["sku"], flags={**ROWS["sku"].flags, "normal_weight": -1})
    assert "weights above 0" in error_of(search_space, turned)
    slow = replace(ROWS["sku"], flags={**ROWS["sku"].flags, "lr": 1e-7, "scaling_coef": 0.7, "safe_weight": 0.0})
    assert search_space(slow)["lr"].low == 1e-7 and 0.7 in swept_alphas(slow)
    deep = replace(RECIPES["demo"].rows["rmu"], flags={"method": "rmu", "max_unlearn_steps": 8, "rmu_layer": 3})
    assert search_space(deep)["rmu_layer"] == (0.25, 0.5, 0.75, 3)
    assert "scaling_coef" in search_space(replace(slow, flags={**slow.flags, "safe_weight": 0.1}))


@pytest.mark.parametrize("content", ["{}", '{"rows": {"a": {"title": "A"}}, "chosen_on": []}', '{"rows": []}'])
def test_a_file_that_is_no_recipe_is_refused(content, tmp_path):
    (tmp_path / "r.json").write_text(content)
    assert "is not a recipe" in error_of(read_recipe, str(tmp_path / "r.json"))
    with pytest.raises(UserError):
        read_recipe(str(tmp_path / "none.json"))


@pytest.mark.slow
def test_kill_9_loses_no_trial(tmp_path):
    """The trial that was being measured is run again, with the same flags; what was done stays."""
    done = subprocess.run([*COMMAND, tmp_path, "4", "3"], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    before = flags_of(a_search(tmp_path, 4), "sku")
    assert len(before) == 2
    measure = Measure()
    one = run(a_search(tmp_path, 4, measure))
    assert measure.measured == 6  # two more of sku, four of npo
    uninterrupted = run(a_search(tmp_path / "whole", 4, rows={"sku": ROWS["sku"]}))
    assert flags_of(one, "sku")[:3] == flags_of(uninterrupted, "sku")[:3]  # the third is the one that was killed
    assert len(flags_of(one, "sku")) == len(flags_of(one, "npo")) == 4


@pytest.mark.slow
def test_two_processes_share_the_trials(tmp_path):
    processes = [subprocess.Popen([*COMMAND, tmp_path, "6"], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    one = a_search(tmp_path, 6)
    assert [len(results) for results in one.results.values()] == [6, 6]
    assert sum(text.count("trial ") for text in outputs) == 12


@pytest.mark.slow
def test_a_full_disk_stops_with_one_line_and_loses_nothing(tmp_path):
    """The storage may grow no further after the second trial."""
    run(a_search(tmp_path, 2))
    size = (tmp_path / "trials.db").stat().st_size
    done = subprocess.run(
        [*COMMAND, tmp_path, "40"], capture_output=True, text=True, timeout=120, preexec_fn=limited(size + 4096)
    )
    assert done.returncode != 0 and "cannot be read or written" in done.stderr.splitlines()[-1]
    kept = {name: len(results) for name, results in a_search(tmp_path, 40).results.items()}
    assert kept["sku"] >= 2 and kept["npo"] >= 2
    one = run(a_search(tmp_path, max(kept.values()) + 2))
    assert len(set(map(len, one.results.values()))) == 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_method_of_a_recipe_can_be_searched(recipe):
    for name in METHODS:
        row = RECIPES[recipe].rows[name]
        space, flags = search_space(row), all_flags(row)
        assert {"lr", "max_unlearn_steps"} <= set(space) and flags["max_unlearn_steps"] in space["max_unlearn_steps"]
        assert all(values.low < values.high for values in space.values() if isinstance(values, Range))
        assert ("scaling_coef" in space) == (METHODS[name].negates and not swept_alphas(row)), name


def test_a_trial_is_read_as_it_was_written(tmp_path):
    for result in (TrialResult({"lr": 1e-4}, points_of({"lr": 1e-4}, (1.0, 2.0))), TrialResult({}, (), "no")):
        result.write(tmp_path)
        assert TrialResult.read(tmp_path) == result
    assert TrialResult({}, ()).violation(BOUNDS) == math.inf
