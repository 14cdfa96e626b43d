"""Figures over seeds: the cells of tables and the points of plots."""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from harmful_unlearn.reporting.glossary import METRIC_TITLES

DASH = "–"  # there was nothing to measure
LARGEST_MULTIPLE = 1000  # larger multiples are drawn here: those of a broken model would squeeze all others together
REFERENCES = "references"  # the decoding of figures that need no answers, only the data's reference answers


@dataclass(frozen=True)
class Cell:
    """A metric over seeds; without arguments, an empty cell.

    Attributes:
        metric: its name, which decides how it is written.
        value: the mean over the seeds that have a value; NaN if no seed has one.
        low, high: the lowest and the highest seed; of a single seed, the ends of its interval, NaN if it has none.
        seeds: how many seeds have a value.
        all_seeds: how many seeds there are.
    """

    metric: str = ""
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    seeds: int = 0
    all_seeds: int = 1

    @property
    def measured(self) -> bool:
        """Whether there is a value."""
        return not math.isnan(self.value)

    def __str__(self) -> str:
        value, low, high = (formatted(self.metric, end) for end in (self.value, self.low, self.high))
        if math.isnan(self.low):
            return value
        if self.all_seeds == 1:
            return f"{value} [{low}, {high}]"
        count = "" if self.seeds == self.all_seeds else f", {self.seeds} of {self.all_seeds} seeds"
        return f"{value} ({low}–{high}{count})"


Cells = defaultdict[Any, Cell]  # by the names of what was measured; empty for what was not


def formatted(metric: str, value: float) -> str:
    """A value with as many digits as its metric is worth; shares in percent."""
    if math.isnan(value):
        return DASH
    if METRIC_TITLES[metric].endswith(", %"):
        return f"{100 * value:.1f}"
    if "perplexity" not in metric:
        return f"{value:.3f}".replace("-", "−")
    return f"{value:.1e}" if value >= 1e5 else f"{value:.0f}" if value >= 1000 else f"{value:#.4g}"


def figure_frame(rows: list[dict]) -> pd.DataFrame:
    """Figures as a table with the columns seed, metric, decoding, value, low, high, n and what else the rows have."""
    frame = pd.DataFrame(rows)
    numbers = {name: frame[name].astype(float) for name in ("value", "low", "high")}
    return frame.assign(decoding=frame["decoding"].where(frame["decoding"].notna(), REFERENCES), **numbers)


def over_seeds(figures: pd.DataFrame, by: str | list[str], all_seeds: int) -> Cells:
    """The cell of each value of the column `by`, or of each combination of several columns; else an empty cell."""
    cells = Cells(Cell)
    for key, rows in figures.dropna(subset="value").groupby(by):
        values = rows["value"]
        low, high = (values.min(), values.max()) if all_seeds > 1 else rows[["low", "high"]].iloc[0]
        cells[key] = Cell(rows["metric"].iloc[0], values.mean(), low, high, len(values), all_seeds)
    return cells


def perplexity_multiples(figures: pd.DataFrame, by: str, reference: object, all_seeds: int) -> Cells:
    """The perplexity of normal reference answers as a multiple of the same seed's for `reference`, for a plot.

    Multiples are at most `LARGEST_MULTIPLE`. Those of a single seed have no interval.

    Args:
        by: the column whose values are compared with each other; `reference` is one of them.
    """
    rows = figures[(figures["set"] == "normal") & (figures["metric"] == "reference_perplexity")]
    multiples = rows["value"] / rows["seed"].map(rows[rows[by] == reference].set_index("seed")["value"])
    return over_seeds(rows.assign(value=multiples.clip(upper=LARGEST_MULTIPLE), low=np.nan, high=np.nan), by, all_seeds)


def span(numbers: pd.Series) -> str:
    """The smallest and the largest number, or the only one."""
    low, high = numbers.min(), numbers.max()
    return f"{low}" if low == high else f"{low} to {high}"
