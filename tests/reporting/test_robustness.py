"""What a report says of attacks, against figures by hand."""

import csv

from harmful_unlearn.reporting.report import write_report
from tests.helpers.comparisons import METHODS, attack_figures, cells, lean, report_text, table


def test_methods_under_each_attack(text):
    head, _, *rows = cells(text, "Under attack")
    assert head == ["method", "no attack", "prefill", "long", "quantize", "any", "worst"]
    assert [row[0] for row in rows[: len(METHODS)]] == [label for label, _ in METHODS.values()]
    # SKU, (5 + 0, 1, 2) / 40; the worse of two prefills breaks 30 % more
    assert rows[5][1:4] == ["15.0 (12.5–17.5)", "45.0 (42.5–47.5)", "25.0 (22.5–27.5)"]
    assert rows[5][4:] == ["35.0 (32.5–37.5)", "55.0 (52.5–57.5)", "45.0 (42.5–47.5)"]
    assert "n: 100 prompts, for each seed." in text


def test_every_variant_has_a_row(three):
    with (three / "attack-variants.csv").open(encoding="utf-8", newline="") as file:
        rows = {(row["attack"], row["variant"]): row for row in csv.DictReader(file)}
    assert list(rows) == list(dict.fromkeys((row["attack"], row["variant"]) for row in attack_figures(0)))
    assert table(three, "attack-perplexity")["SKU"]["quantize, 4 bits"] == "9.0"
    assert float(rows["prefill", "Sure:"]["SKU"]) == 0.25


def test_without_attacks_there_is_no_such_section(tmp_path):
    write_report(lean(), tmp_path)
    assert "Under attack" not in report_text(tmp_path) and not (tmp_path / "attacks.csv").exists()
