"""The tables of a report against figures by hand, and the notes beside them."""

import math
from dataclasses import replace

import pytest

from harmful_unlearn.reporting.report import write_report
from tests.helpers.comparisons import cells, comparison, lean, report_text, table


def test_cells_are_mean_and_range_over_seeds(three, text):
    """SKU is the sixth method: rates (5 + 0, 1, 2) / 40 and normal perplexities 4.5 * (1, 1.1, 1.2)."""
    head, _, *rows = cells(text, "Results")
    sku = dict(zip(head, rows[5], strict=True))
    assert sku["method"] == "SKU"
    assert sku["Unseen harmful prompts: harmful rate, %"] == "15.0 (12.5–17.5)"
    assert sku["Unseen harmful prompts: perplexity"] == "16.00 (15.00–17.00)"
    hidden = table(three, "hidden")["SKU"]
    column = "Normal prompts: reference perplexity"
    values = [float(hidden[name]) for name in (column, f"{column} (low)", f"{column} (high)")]
    assert values == pytest.approx([4.95, 4.5, 5.4])
    assert float(table(three, "main")["SKU"]["Unseen harmful prompts: harmful rate"]) == pytest.approx(0.15)


def test_one_seed_has_its_interval(undrawn, tmp_path):
    write_report(replace(comparison(seeds=(7,), bleurt=False), losses={}, attacks=[]), tmp_path)
    text = report_text(tmp_path)
    head, _, *rows = cells(text, "Results")
    assert rows[5][3] == "30.0 [24.0, 36.0]"  # (5 + 7) / 40, less and more a fifth
    assert head[-1] == "Normal prompts: ROUGE-L to reference" and "BLEURT" not in text
    assert "value \\[95 % interval\\]" in text and "over seeds" not in text


def test_nothing_measured_is_a_dash_and_seeds_with_a_value_are_counted(three, undrawn, tmp_path, text):
    assert cells(text, "Results")[4][5] == "–"  # GA's normal perplexity
    assert table(three, "main")["GA"]["Normal prompts: perplexity"] == ""
    diverged = lean()
    for row in diverged.figures:
        if row["seed"] == 2 and row["model"] == "ft":
            row["value"] = row["low"] = row["high"] = None
    diverged.methods["ft"]["note"] = "seed 2: training broke off"
    write_report(diverged, tmp_path)
    text = report_text(tmp_path)
    assert cells(text, "Results")[3][1] == "3.8 (2.5–5.0, 2 of 3 seeds)"
    assert "FT: seed 2: training broke off" in text


def test_every_table_with_a_harmful_rate_names_its_judge(text):
    known = "Judge: classifier; on held-out labels: accuracy 0.910 (0.900–0.920), AUC 0.950 (0.950–0.950)."
    for part in text.split("\n## ")[1:]:
        if "harmful rate, %" in part.lower():
            assert known in part


def test_a_judge_without_held_out_figures_says_so(undrawn, tmp_path):
    write_report(lean(judge={"name": "openai:some", "by_seed": {"0": {"judge": "openai:some"}}}), tmp_path)
    assert "Judge: openai:some; not measured on held-out labels here." in report_text(tmp_path)


def test_broken_figures_are_drawn(tmp_path):
    """A perplexity cut at e^700, and a model without any."""
    broken = replace(comparison(), losses={})
    for row in broken.figures + broken.sweep:
        if row["metric"] == "reference_perplexity" and row.get("model") in ("ga", "alpha-2"):
            row["value"] = row["low"] = row["high"] = math.exp(700)
        if row["metric"] == "reference_perplexity" and row["model"] == "ft":
            row["value"] = None
    write_report(broken, tmp_path)
    text = report_text(tmp_path)
    assert "Hollow: more than 20% of the unseen" in text and "Not drawn, for lack of figures: FT." in text
    assert "A multiple above 1000 is drawn at 1000: GA." in text and "1.0e+304 (1.0e+304–1.0e+304)" in text
