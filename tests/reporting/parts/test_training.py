"""The sections on alpha and on kinds of harm, against figures by hand."""

import csv
from dataclasses import replace

from harmful_unlearn.reporting.report import write_report
from tests.helpers.comparisons import KINDS, cells, comparison, report_text


def test_categories_are_a_matrix(text):
    head, _, *rows = cells(text, "By kind")
    assert head[1:] == [f"Harmful rate on unseen prompts, %: {kind} (n = {20 + y})" for y, kind in enumerate(KINDS)]
    assert [row[0] for row in rows] == ["Original", *KINDS, "sum of all"]
    assert rows[-1][-1] == "87.5 (75.0–100.0)"  # (4 + 2 + 0, 1, 2) / 8


def test_a_method_without_a_recommended_alpha_has_none_in_the_table(text):
    rows = [row for row in cells(text, "The choice of alpha") if row[1] == "0" and row[4] == "because"]
    assert rows == [["SKU", "0", "0.5", "10%", "because"], ["Task vector", "0", "none", "10%", "because"]]


def test_a_model_trained_for_one_alpha_says_which_alphas_it_was_not_trained_for(undrawn, tmp_path):
    landing = replace(comparison(), losses={})
    for row in landing.sweep:
        row["trained_for"] = 1.5 if row["method"] == "sku" else None
    write_report(landing, tmp_path)
    with (tmp_path / "alpha.csv").open(encoding="utf-8") as file:
        named = [(row["method"], row["alpha"]) for row in csv.DictReader(file)]
    assert ("SKU", "1.5 (trained for)") in named and ("SKU", "1 (not trained for)") in named
    assert ("Task vector", "1") in named
    assert "Trained for one alpha: SKU at 1.5;" in report_text(tmp_path)


def test_an_alpha_of_one_method_is_a_row_of_that_method_only(undrawn, tmp_path):
    landing = replace(comparison(), losses={})
    landing.sweep += [{**row, "alpha": 4.0} for row in landing.sweep if (row["method"], row["alpha"]) == ("sku", 2.0)]
    write_report(landing, tmp_path)
    with (tmp_path / "alpha.csv").open(encoding="utf-8") as file:
        named = [(row["method"], row["alpha"]) for row in csv.DictReader(file)]
    assert ("SKU", "4") in named and ("Task vector", "4") not in named
