"""Cells over seeds, how they are written, and multiples."""

import math

import pandas as pd
import pytest

from harmful_unlearn.reporting.figures import Cell, figure_frame, formatted, over_seeds, perplexity_multiples, span


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
    figures = [*rows(2.0, 3.0, 1e9, None), *rows(4.0, None, 1.0, 1.0, model="base")]
    frame = figure_frame(figures).assign(set="normal", metric="reference_perplexity")
    unlike = [frame.assign(set="unseen", value=7.0), frame.assign(metric="mc1", value=7.0)]
    cells = perplexity_multiples(pd.concat([frame, *unlike]), "model", "base", 4)
    assert cells["a"] == Cell("reference_perplexity", 500.25, 0.5, 1000, 2, 4)  # of seeds 0 and 2
    assert cells["base"] == Cell("reference_perplexity", 1, 1, 1, 3, 4)
    assert math.isnan(perplexity_multiples(frame[frame["seed"] == 0], "model", "base", 1)["a"].low)


def test_spans():
    assert span(pd.Series([3, 3])) == "3" and span(pd.Series([5, 3])) == "3 to 5"
