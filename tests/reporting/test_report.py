"""A report's files, its sections in order, and that it ranks nothing."""

import re
from dataclasses import replace

import pandas as pd

from harmful_unlearn.reporting.report import write_report
from tests.helpers.comparisons import METHODS, cells, comparison, report_text, table


def test_files(three):
    names = {path.name for path in three.iterdir()}
    tables = (
        "main",
        "hidden",
        "ablations",
        "attacks",
        "attack-variants",
        "attack-perplexity",
        "recommended",
        "alpha",
        "categories",
    )
    tables += ("relearning", "refusals", "oracle")
    pictures = ("tradeoff", "attacks-tradeoff", "alpha", "categories", "relearning", "losses")
    files = {"report.md", "report.html", "figures.csv", *(f"{t}.csv" for t in tables)}
    assert names == files | {f"{picture}.svg" for picture in pictures}
    figures = pd.read_csv(three / "figures.csv")
    assert set(figures["seed"]) == {0, 1, 2} and {"model", "set", "decoding", "metric", "value", "n"} <= set(figures)
    assert all((three / f"{name}.svg").read_text(encoding="utf-8").startswith("<?xml") for name in pictures)


def test_sections_are_in_order(three, text):
    expected = [
        "What was found",
        "Results (sampled answers)",
        "Harm against normal text",
        "What a harmful rate hides",
        "Ablations",
        "Refusals",
        "Under attack",
        "Relearning",
        "Distance from the oracle",
        "The choice of alpha",
        "By kind of harm",
        "Losses of stage 1",
        "Prompts and answers",
        "Glossary",
        "Settings",
        "Commands",
        "Provenance",
    ]
    page = (three / "report.html").read_text(encoding="utf-8")
    assert re.findall("^## (.+)$", text, re.M) == expected == re.findall(r"<h2 id=[^>]+>(.+?)</h2>", page)


def test_the_main_table_is_the_papers(text):
    harmful = ("harmful rate, %", "perplexity")
    assert cells(text, "Results")[0] == [
        "method",
        *(f"Harmful prompts used in unlearning: {name}" for name in harmful),
        *(f"Unseen harmful prompts: {name}" for name in harmful),
        "Normal prompts: perplexity",
        "Normal prompts: BLEURT to reference",
    ]


def test_rows_keep_the_methods_order(three, undrawn, tmp_path):
    reversed_rows = replace(comparison(), losses={}, sweep=[])
    reversed_rows.methods = dict(reversed(reversed_rows.methods.items()))
    write_report(reversed_rows, tmp_path)
    for folder, methods in ((three, list(METHODS)), (tmp_path, list(METHODS)[::-1])):
        titles = {name: METHODS[name][0] for name in methods}
        assert list(table(folder, "main")) == [titles[m] for m in methods if METHODS[m][1] == "main"]
        ablated = [titles[m] for m in methods if m in ("base", "sku") or METHODS[m][1] == "ablation"]
        assert list(table(folder, "ablations")) == ablated
        assert list(table(folder, "relearning")) == list(titles.values())


def test_nothing_is_ranked(text):
    assert not re.search(r"\b(best|wins?|winner|outperforms?|better|rank\w*)\b", text.split("## Glossary")[0], re.I)
    without_attacks = (
        text.split("## Results")[1].split("## Under attack")[0] + text.split("## The choice")[1].split("## Glossary")[0]
    )
    assert "worst" not in without_attacks.lower()
    assert "**" not in text.split("## Results")[1].split("## Prompts")[0]


def test_empty_parts_are_omitted(undrawn, tmp_path):
    small = comparison()
    small.methods = {name: small.methods[name] for name in ("base", "sku")}
    small.figures = [
        row
        for row in small.figures
        if row["model"] in small.methods
        and row["metric"] not in ("mc1", "mc2", "refusal_rate")
        and row["decoding"] != "sampled"
    ]
    for part in ("attacks", "sweep", "recommended", "categories", "oracle", "relearning", "answers"):
        setattr(small, part, [])
    small.losses = {}
    write_report(small, tmp_path)
    text = report_text(tmp_path)
    assert re.findall("^## (.+)$", text, re.M) == [
        "What was found",
        "Results (greedy answers)",
        "Harm against normal text",
        "What a harmful rate hides",
        "Glossary",
        "Settings",
        "Commands",
        "Provenance",
    ]
    assert "MC1" not in text and "(greedy)" not in cells(text, "What a harmful")[0]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"report.md", "report.html", "figures.csv", "main.csv", "hidden.csv", "tradeoff.svg"}
