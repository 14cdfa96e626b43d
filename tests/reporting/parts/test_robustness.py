"""What a report says of attacks, against figures by hand."""

import csv
from dataclasses import replace

import pytest

from harmful_unlearn.reporting.report import write_report
from tests.helpers.comparisons import METHODS, attack_figures, cells, comparison, lean, report_text, table


def test_methods_under_each_attack(text):
    head, _, *rows = cells(text, "Under attack")
    assert head == ["method", "no attack", "prefill", "long", "quantize", "relearn, 20 steps", "any", "worst"]
    assert [row[0] for row in rows[: len(METHODS)]] == [label for label, _ in METHODS.values()]
    # SKU, (5 + 0, 1, 2) / 40; the worse of two prefills breaks 30 % more
    assert rows[5][1:4] == ["15.0 (12.5–17.5)", "45.0 (42.5–47.5)", "25.0 (22.5–27.5)"]
    assert rows[5][4:] == ["35.0 (32.5–37.5)", "35.0 (32.5–37.5)", "55.0 (52.5–57.5)", "45.0 (42.5–47.5)"]
    assert "n: 100 prompts, for each seed." in text


def test_every_variant_has_a_row(three):
    with (three / "attack-variants.csv").open(encoding="utf-8", newline="") as file:
        rows = {(row["attack"], row["variant"]): row for row in csv.DictReader(file)}
    assert list(rows) == list(dict.fromkeys((row["attack"], row["variant"]) for row in attack_figures(0)))
    assert table(three, "attack-perplexity")["SKU"]["quantize, 4 bits"] == "9.0"
    assert float(rows["prefill", "Sure:"]["SKU"]) == 0.25


def test_without_attacks_there_is_no_such_section(undrawn, tmp_path):
    write_report(lean(), tmp_path)
    assert "Under attack" not in report_text(tmp_path) and not (tmp_path / "attacks.csv").exists()


def test_the_worst_attacker_after_each_number_of_steps_and_what_half_of_the_harm_costs(three, text):
    row = table(three, "relearning")["SKU"]  # (5 + s) / 40 and 1/100 a step
    assert [float(row[f"{steps} steps"]) for steps in (0, 5, 20)] == pytest.approx([0.15, 0.2, 0.35])
    # The original is at 1/40 before, so all are above half of that at once.
    head, _, *rows = cells(text, "Relearning")
    assert head[-1] == "steps to half of the original's" and {row[-1] for row in rows} == {"0"}
    assert (
        "the worst of 2 attackers" in text and "on 16 pairs" in text and "and the oracle, which never knew any" in text
    )


def test_an_attacker_who_never_gets_there_is_said_to_need_more(undrawn, tmp_path):
    made = comparison(seeds=(0,))
    for row in made.relearning:
        row["value"] = {"base": 0.8, "sku": 0.1, "ft": 0.02 * row["steps"]}.get(row["model"], 0.5)
    write_report(replace(made, losses={}, attacks=[], sweep=[], categories=[]), tmp_path)
    cost = {name: row["steps to half of the original's"] for name, row in table(tmp_path, "relearning").items()}
    assert (cost["Original"], cost["FT"], cost["SKU"]) == ("0", "20", "more than 20")
    assert "chosen as the worst" in report_text(tmp_path) and "(harmful pairs, benign text)" in report_text(tmp_path)


def test_attackers_without_a_verdict_and_an_original_without_harm_have_no_cost(undrawn, tmp_path):
    made = comparison(seeds=(0,))
    for row in made.relearning:
        row["value"] = 0.0 if row["model"] == "base" else None if row["model"] == "ft" else row["value"]
    write_report(replace(made, losses={}, attacks=[], sweep=[], categories=[]), tmp_path)
    rows = table(tmp_path, "relearning")
    assert {row["steps to half of the original's"] for row in rows.values()} == {"–"} and not rows["FT"]["0 steps"]


def test_with_relearning_alone_there_is_no_table_of_attacks(undrawn, tmp_path):
    made = comparison(seeds=(0,))
    attacks = [row for row in made.attacks if row["attack"] == "none"]
    write_report(replace(made, losses={}, attacks=attacks, sweep=[], categories=[]), tmp_path)
    assert "## Under attack" not in report_text(tmp_path) and "## Relearning" in report_text(tmp_path)


def test_refusals_of_harmless_prompts_stand_beside_those_of_harmful_ones(three, text):
    head, _, *rows = cells(text, "Refusals")
    assert head == [
        "method",
        "Normal prompts: refused, %",
        "Unseen harmful prompts: refused, %",
        "near, harmless: refused, %",
        "near, harmful: harmful rate, %",
    ]
    assert float(table(three, "refusals")["SKU"]["near, harmless: refused"]) == pytest.approx(0.15 / 4)
    assert "150 normal" in text and "100 near, harmless" in text and "Judge of refusals: phrases" in text


def test_every_models_distance_from_the_oracle_but_its_own(three, text):
    rows = table(three, "oracle")
    assert list(rows) == [label for name, (label, _) in METHODS.items() if name != "oracle"]
    assert float(rows["SKU"]["Normal prompts: KL from the oracle, nats a token"]) == pytest.approx(0.6)
    assert "n: 60 prompts of a set, for each seed." in text and "The oracle is a model that never" in text
