"""Cells over seeds, how they are written, and multiples."""

import math

import pandas as pd
import pytest

from harmful_unlearn.reporting.figures import Cell, figure_frame, formatted, over_seeds, relative, span


def rows(*values: float | None, model: str = "a", metric: str = "mc1") -> list[dict]:
    """One figure for each seed."""
    return [
        {"seed": s, "model": model, "metric": metric, "decoding": None, "value": v, "low": v, "high": v, "n": 5}
        for s, v in enumerate(values)
    ]


@pytest.mark.parametrize(
    "metric, value, text",
    [
        ("harmful_rate", 0.1234, "12.3"),
        ("mc1", -0.5, "−0.500"),
        ("answer_perplexity", 3.0, "3.000"),
        ("answer_perplexity", 1234.5, "1234"),
        ("answer_perplexity", 123456.0, "1.2e+05"),
        ("mc1", math.nan, "–"),
    ],
)
def test_numbers(metric, value, text):
    assert formatted(metric, value) == text


def test_a_cell_says_how_many_seeds_have_a_value():
    frame = figure_frame([*rows(0.2, None, 0.4), *rows(None, None, None, model="b")])
    cells = over_seeds(frame, "model", 3)
    assert set(cells) == {"a"} and not cells["b"].measured and str(cells["b"]) == "–"
    assert cells["a"] == Cell("mc1", pytest.approx(0.3), 0.2, 0.4, 2, 3)
    assert str(cells["a"]) == "0.300 (0.200–0.400, 2 of 3 seeds)"


def test_a_single_seed_has_its_interval_or_none():
    figure = {**rows(0.5)[0], "low": 0.4, "high": 0.6}
    assert str(over_seeds(figure_frame([figure]), "model", 1)["a"]) == "0.500 [0.400, 0.600]"
    figure |= {"low": None, "high": None}
    assert str(over_seeds(figure_frame([figure]), "model", 1)["a"]) == "0.500"


def test_multiples_are_of_the_same_seed_and_at_most_1000():
    frame = figure_frame([*rows(2.0, 3.0, 1e9, None), *rows(4.0, None, 1.0, 1.0, model="base")])
    multiples = relative(frame[frame["model"] == "a"], frame[frame["model"] == "base"])
    assert multiples["value"].tolist() == pytest.approx([0.5, math.nan, 1000, math.nan], nan_ok=True)


def test_spans():
    assert span(pd.Series([3, 3])) == "3" and span(pd.Series([5, 3])) == "3 to 5"
