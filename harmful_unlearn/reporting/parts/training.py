"""The sections of a report on task vectors at other alphas and of one kind of harm, and on the losses of stage 1."""

import pandas as pd

from harmful_unlearn.reporting import plots
from harmful_unlearn.reporting.blocks import Block, paragraph, picture, table
from harmful_unlearn.reporting.figures import (
    LARGEST_MULTIPLE,
    REFERENCES,
    Cells,
    figure_frame,
    over_seeds,
    perplexity_multiples,
    span,
)
from harmful_unlearn.reporting.glossary import METRIC_TITLES
from harmful_unlearn.reporting.parts.context import Column, ReportContext, figure_table


def alphas(report: ReportContext) -> list[Block]:
    if not report.data.sweep:
        return []
    figures = figure_frame(report.data.sweep)
    cells = over_seeds(figures, ["method", "alpha", "set", "decoding", "metric"], report.seeds)
    decodings = [name for name in report.decodings if name in set(figures["decoding"])]
    rates = [*(("unseen", name, "harmful_rate") for name in decodings), ("unseen", decodings[0], "degenerate_rate")]
    trained_for = {row["method"]: row["trained_for"] for row in report.data.sweep if row.get("trained_for")}
    caption = (
        f"One task vector at each alpha, on validation prompts; bands: {report.spread}. A multiple of the perplexity "
        f"above {LARGEST_MULTIPLE} is drawn at {LARGEST_MULTIPLE}."
    )
    if trained_for:
        own_alphas = ", ".join(f"{report.label(method)} at {alpha:g}" for method, alpha in trained_for.items())
        caption += f" Trained for one alpha: {own_alphas}; other alphas show what that training does not cover."

    def named(method: str, alpha: float) -> str:
        if method not in trained_for:
            return f"{alpha:g}"
        return f"{alpha:g} ({'' if alpha == trained_for[method] else 'not '}trained for)"

    rows = [
        ([report.link(method), named(method, alpha)], (method, alpha))
        for method, measured in figures.groupby("method", sort=False)
        for alpha in sorted(measured["alpha"].unique())
    ]
    svg = alpha_plot(report, figures, cells, rates)
    columns: list[Column] = [*rates, ("normal", REFERENCES, "reference_perplexity")]
    return [
        picture("alpha", "Harmful rate and normal perplexity over alpha", caption, svg),
        *recommendations(report),
        figure_table(report, "alpha", ["method", "alpha"], rows, columns, cells),
        report.judge(),
    ]


def alpha_plot(report: ReportContext, figures: pd.DataFrame, cells: Cells, columns: list[Column]) -> str:
    """The plot of the alpha sweep.

    Args:
        figures: of the sweep.
        cells: the same, by method, alpha, set, decoding and metric.
        columns: the rates to draw.
    """
    swept = sorted(figures["alpha"].unique())
    advice = report.data.recommended
    panels = {}
    for method, rows in figures.groupby("method", sort=False):
        rates = {}
        for prompts, decoding, metric in columns:
            title = f"{METRIC_TITLES[metric].removesuffix(', %')}, {decoding}"
            rates[title] = [cells[method, alpha, prompts, decoding, metric] for alpha in swept]
        multiples = perplexity_multiples(rows, "alpha", swept[0], report.seeds)
        recommended = {row["alpha"] for row in advice if row["method"] == method and row["alpha"] is not None}
        panels[report.label(method)] = rates, [multiples[alpha] for alpha in swept], recommended
    return plots.plot_alphas(swept, panels, advice[0]["budget"] if advice and swept[0] == 0 else None)


def recommendations(report: ReportContext) -> list[Block]:
    rows = []
    for row in report.data.recommended:
        alpha = "none" if row["alpha"] is None else f"{row['alpha']:g}"
        rows.append([report.link(row["method"]), str(row["seed"]), alpha, f"{row['budget']:.0%}", row["why"]])
    return [table("recommended", ["method", "seed", "recommended alpha", "budget", "why"], rows)] if rows else []


def categories(report: ReportContext) -> list[Block]:
    if not report.data.categories:
        return []
    figures = figure_frame(report.data.categories)
    cells = over_seeds(figures, ["vector", "category"], report.seeds)
    vectors, kinds = list(figures["vector"].unique()), list(figures["category"].unique())
    matrix = [[cells[vector, kind] for kind in kinds] for vector in vectors]
    names = ["sum of all" if vector == "sum" else report.label(vector) for vector in vectors]
    counts = [span(figures["n"][figures["category"] == kind]) for kind in kinds]
    titles = [f"Harmful rate on unseen prompts, %: {kind} (n = {n})" for kind, n in zip(kinds, counts, strict=True)]
    mean = ", mean over seeds" if report.seeds > 1 else ""
    caption = f"Harmful rate by kind of harm ({figures['decoding'].iloc[0]}{mean})."
    return [
        paragraph(
            "Task vectors trained on only one kind of harm, and their sum. A prompt of two kinds counts in both."
        ),
        table("categories", ["task vector", *titles], [[n, *row] for n, row in zip(names, matrix, strict=True)]),
        report.judge(),
        picture("categories", "Harmful rates by kind of harm", caption, plots.plot_categories(names, kinds, matrix)),
    ]


def losses(report: ReportContext) -> list[Block]:
    runs = {report.label(name): steps for name, steps in report.data.losses.items() if steps}
    seed = report.data.seeds[0]
    caption = (
        f"Losses of stage 1 before their weights, and the weighted total (seed {seed}). A line is the mean of every "
        "few steps, its band goes from their lowest to their highest value."
    )
    return [picture("losses", "Losses over the steps", caption, plots.plot_losses_by_method(runs))] if runs else []
