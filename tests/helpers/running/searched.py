"""A search without models: what a trial leaves is a function of its flags. As a command, for tests that kill it.

python searched.py FOLDER TRIALS [KILL_AT]      the process kills itself in the KILL_AT-th trial that it measures
"""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from harmful_unlearn.comparison import search
from harmful_unlearn.comparison.trial import Bounds, Point
from harmful_unlearn.evals.comparison.seed_evaluation import TrainedModel
from harmful_unlearn.evals.prompt_sets import Prompt
from harmful_unlearn.recipes import ComparisonRun, recipe

ROWS = recipe(
    {"max_unlearn_steps": 8, "lr": 1e-4}, {"bad_weight": 1, "random_weight": 1, "normal_weight": 0.1}, {}
).rows
BOUNDS = Bounds(0.2)
SETS = SimpleNamespace(validation={"unseen": [Prompt("How?", "So.", 0)], "normal": [Prompt("Why?", "Because.", 1)]})


def points_of(flags: dict, alphas: tuple[float, ...]) -> tuple[Point, ...]:
    """Faster rates leave less harm and cost more perplexity, as larger alphas do."""
    points = []
    for alpha in alphas or (None,):
        strength = flags["lr"] / 2e-4 * (alpha or 1.0)
        point = Point(alpha, 1 + 0.3 * strength)
        if not point.violation(BOUNDS):
            harm = max(0.0, 1 - strength)
            point = Point(alpha, point.perplexity, None, harm, harm, harm, 10, 0.0, 0.0)
        points.append(point)
    return tuple(points)


class Measure:
    """Counts what it measures."""

    def __init__(self, kill_at: int = 0):
        self.measured, self._kill_at = 0, kill_at

    def base(self) -> Point:
        return Point(None, 1.0, None, 0.9, 0.8, 1.0, 10, 0.0, 0.0)

    def of_trial(self, trained: TrainedModel, alphas: tuple[float, ...]) -> tuple[Point, ...]:
        self.measured += 1
        if self.measured == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return points_of(trained.flags, alphas)


def a_search(
    folder: Path, trials: int, measure: Measure | None = None, rows: dict[str, ComparisonRun] | None = None
) -> search.Search:
    """A search of SKU and NPO, without a training."""
    rows = rows or {name: ROWS[name] for name in ("sku", "npo")}
    return search.Search(folder, rows, trials, BOUNDS, 0, {}, lambda to, flags: (to, flags), measure or Measure())


def trained(to: Path, flags: dict) -> SimpleNamespace:
    """In the training's place."""
    return SimpleNamespace(
        folder=to, flags=flags, finetuned=to / "copy", unlearned=to / "unlearned", failure=flags.get("failure")
    )


def run(one: search.Search) -> search.Search:
    """Run it."""
    with mock.patch.object(search, "train", trained):
        one.run()
    return one


if __name__ == "__main__":
    folder, trials, *kill_at = sys.argv[1:]
    run(a_search(Path(folder), int(trials), Measure(int(kill_at[0]) if kill_at else 0)))
