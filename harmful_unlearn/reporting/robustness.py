"""The sections of a report on what holds under attack."""

import pandas as pd

from harmful_unlearn.reporting.blocks import Block, paragraph, table
from harmful_unlearn.reporting.figures import REFERENCES, Cell, figure_frame, over_seeds, span
from harmful_unlearn.reporting.sections import ReportContext, tradeoff_picture


def attacks(report: ReportContext) -> list[Block]:
    if not report.data.attacks:
        return []
    everything = figure_frame(report.data.attacks)
    figures = everything[everything["metric"] == "harmful_rate"]
    cells = over_seeds(figures, ["model", "attack", "variant"], report.seeds)
    models = [name for name in report.data.methods if name in set(figures["model"])]
    asked = list(dict.fromkeys(zip(figures["attack"], figures["variant"], strict=True)))
    variants = figures.groupby("attack", sort=False)["variant"].agg(lambda names: list(dict.fromkeys(names)))
    # Of an attack with several variants its worst one, of others the only one.
    decisive = [(name, "worst" if "worst" in own else own[0]) for name, own in variants.items()]
    titles = ["no attack" if name == "none" else name.replace("_", " ") for name, _ in decisive]
    body: list[list[str | Cell]] = [
        [report.label(model), *(cells[model, *column] for column in decisive)] for model in models
    ]
    every: list[list[str | Cell]] = [[*names, *(cells[model, *names] for model in models)] for names in asked]
    worst = {name: cells[name, "worst", "worst"] for name in report.data.methods}
    return [
        paragraph(
            "Harmful rates, %, on the same unseen prompts without an attack and under each; of an attack with several "
            'variants that of its worst one. "worst" is the highest of all attacks, "any" the share of prompts that '
            "any answer breaks: there a judge's false alarms add up, too."
        ),
        table("attacks", ["method", *titles], body),
        report.judge(),
        paragraph(
            f"n: {span(figures['n'])} prompts{report.each_seed}. An attack that the original resists as well as before "
            "says nothing. Who has the original's weights needs no attack: this measures how deep the unlearning goes, "
            "not how safe a model is."
        ),
        *tradeoff_picture(report, "attacks-tradeoff", worst, "on unseen prompts under the worst attack, %"),
        table("attack-variants", ["attack", "variant", *map(report.label, models)], every),
        *_perplexities(report, everything[everything["metric"] == "reference_perplexity"], models),
    ]


def _perplexities(report: ReportContext, figures: pd.DataFrame, models: list[str]) -> list[Block]:
    """What changed weights do to normal text; nothing if none were changed."""
    if figures.empty:
        return []
    changes = list(dict.fromkeys(zip(figures["attack"], figures["variant"], strict=True)))
    changed = over_seeds(figures, ["model", "attack", "variant"], report.seeds)
    rows: list[list[str | Cell]] = [
        [
            report.label(model),
            report.cells[model, "normal", REFERENCES, "reference_perplexity"],
            *(changed[model, *change] for change in changes),
        ]
        for model in models
    ]
    return [
        paragraph("Perplexity of normal reference answers, as the models are and with changed weights."),
        table("attack-perplexity", ["method", "as it is", *map(", ".join, changes)], rows),
    ]
