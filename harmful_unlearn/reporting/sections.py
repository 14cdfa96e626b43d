"""The sections of a report: blocks for each, none where the comparison has nothing of it."""

from itertools import groupby

import numpy as np
import pandas as pd

from harmful_unlearn.reporting import plots
from harmful_unlearn.reporting.blocks import Block, answers, code, paragraph, picture, table
from harmful_unlearn.reporting.comparison import BASE, ORACLE, Comparison
from harmful_unlearn.reporting.figures import (
    DASH,
    LARGEST_MULTIPLE,
    REFERENCES,
    Cell,
    Cells,
    figure_frame,
    over_seeds,
    perplexity_multiples,
    span,
)
from harmful_unlearn.reporting.glossary import INTERVAL, MEANINGS, METRIC_TITLES, SET_TITLES

BROKEN = 0.2  # models with a larger share of degenerate answers have a hollow marker
UNSEEN_RATE = "Harmful rate on unseen prompts, %"
WARNING = (
    "Warning: these texts are harmful by construction. They are the models' answers, unedited, and are shown for "
    "safety research; do not act on them or pass them on."
)
Column = tuple[str, str, str]  # set of prompts, decoding, metric


class ReportContext:
    """A comparison, and what its sections share.

    Attributes:
        data: the comparison.
        seeds: how many seeds it has.
        each_seed, spread: words for counts, and for what the whiskers and bands of a plot are.
        figures: its figures of the test prompts, one a row.
        cells: the same over seeds, by model, set, decoding and metric.
        metrics: those that have a value.
        decodings: the decodings of its answers.
        decoding: the one in the main tables: "sampled" if there is one.
    """

    def __init__(self, comparison: Comparison):
        self.data = comparison
        self.seeds = len(comparison.seeds)
        self.each_seed = ", for each seed" if self.seeds > 1 else ""
        self.spread = "from the lowest to the highest seed" if self.seeds > 1 else "the 95 % interval"
        self.figures = figure_frame(comparison.figures)
        self.cells = over_seeds(self.figures, ["model", "set", "decoding", "metric"], self.seeds)
        self.metrics = {metric for _, _, _, metric in self.cells} | {row["metric"] for row in comparison.oracle}
        self.decodings = [name for name in self.figures["decoding"].unique() if name != REFERENCES]
        self.decoding = "sampled" if "sampled" in self.decodings else self.decodings[0]

    def label(self, name: str) -> str:
        """What tables call a model; a task vector that has no row of its own is called by its name."""
        return self.data.methods[name]["label"] if name in self.data.methods else name

    def judge(self) -> Block:
        """The judge, and what is known of it; for every table with a harmful rate."""
        known = []
        for key, name in (("accuracy", "accuracy"), ("auc", "AUC")):
            values = [facts[key] for facts in self.data.judge["by_seed"].values() if facts.get(key) is not None]
            if values:
                ends = f" ({min(values):.3f}–{max(values):.3f})" if len(values) > 1 else ""
                known.append(f"{name} {np.mean(values):.3f}{ends}")
        held_out = f"on held-out labels: {', '.join(known)}" if known else "not measured on held-out labels here"
        return paragraph(f"Judge: {self.data.judge['name']}; {held_out}.")


def overview(report: ReportContext) -> list[Block]:
    data = report.data
    judged = {
        f"judge, seed {seed}": {key: round(v, 4) if isinstance(v, float) else v for key, v in facts.items()}
        for seed, facts in data.judge["by_seed"].items()
    }
    trained = ", ".join(report.label(name) for name in data.methods if name not in (BASE, ORACLE))
    never = " The oracle is a model that never learned any harm." if ORACLE in data.methods else ""
    return [
        paragraph(
            f"The original model, {data.model}, and what was trained from it: {trained}. "
            f"Rows have this order in every table, whatever their figures.{never}"
        ),
        report.judge(),
        code("Command", data.command),
        facts_table({"model": data.model, "seeds": data.seeds, **data.settings, **judged}),
    ]


def facts_table(facts: dict) -> Block:
    """A dict as a table of two columns; a dict or list in it is one line."""

    def line(value: object) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{key} {line(part)}" for key, part in value.items())
        if isinstance(value, list):
            return ", ".join(map(line, value))
        return DASH if value is None else str(value)

    return table(None, ["what", "value"], [[name, line(value)] for name, value in facts.items()])


def comparison_table(report: ReportContext, name: str, models: list[str], columns: list[Column]) -> list[Block]:
    """The figures of models, with all that is needed to read them."""
    answered = dict(iter(report.figures[report.figures["metric"] == "degenerate_rate"].groupby("set")["n"]))
    titles = {prompts: title[0].lower() + title[1:] for prompts, title in SET_TITLES.items() if prompts in answered}
    n = ", ".join(f"{span(answered[prompts])} {title}" for prompts, title in titles.items())
    form = "mean (lowest–highest) over seeds" if report.seeds > 1 else "value [95 % interval]"
    noted = [(report.label(model), report.data.methods[model].get("note")) for model in models]
    rows = [([report.label(model)], (model,)) for model in models]
    return [
        figure_table(report, name, ["method"], rows, columns, report.cells),
        report.judge(),
        paragraph(f"Cells: {form}; {DASH}: nothing to measure. n: {n}{report.each_seed}."),
        *(paragraph(f"{label}: {note}") for label, note in noted if note),
    ]


def figure_table(
    report: ReportContext, name: str, heads: list[str], rows: list[tuple], columns: list[Column], cells: Cells
) -> Block:
    """A table of figures; columns without any value are omitted. Titles name a decoding other than the usual.

    Args:
        heads: the titles of the columns that label a row.
        rows: the labels of each, and the start of the key of its cells.
        cells: by the row's start of the key and the column.
    """
    shown = [column for column in columns if any(cells[*key, *column].measured for _, key in rows)]
    titles = []
    for prompts, decoding, metric in shown:
        named = "" if decoding in (REFERENCES, report.decoding) else f" ({decoding})"
        titles.append(f"{SET_TITLES.get(prompts, prompts)}: {METRIC_TITLES[metric]}{named}")
    body = [[*labels, *(cells[*key, *column] for column in shown)] for labels, key in rows]
    return table(name, [*heads, *titles], body)


def tradeoff(report: ReportContext) -> list[Block]:
    rates = {name: report.cells[name, "unseen", report.decoding, "harmful_rate"] for name in report.data.methods}
    return tradeoff_picture(report, "tradeoff", rates, f"on unseen prompts, % ({report.decoding})")


def tradeoff_picture(report: ReportContext, file: str, rates: dict[str, Cell], of: str) -> list[Block]:
    """Harmful rates against the perplexity of normal text.

    Args:
        rates: by model.
        of: what the rates are of.
    """
    multiples = perplexity_multiples(report.figures, "model", BASE, report.seeds)
    points: dict[str, tuple[Cell, Cell, bool]] = {}
    absent = []
    for name in sorted(report.data.methods, key=lambda name: name != BASE):  # the base first
        x, y = multiples[name], rates[name]
        degenerate = [report.cells[name, s, report.decoding, "degenerate_rate"].value for s in ("unseen", "normal")]
        if x.measured and y.measured:
            points[report.label(name)] = x, y, any(share > BROKEN for share in degenerate)
        else:
            absent.append(report.label(name))
    if len(points) < 2:
        return []
    caption = f"One point a method; whiskers: {report.spread}{'' if report.seeds > 1 else ' of the harmful rate'}."
    if any(hollow for _, _, hollow in points.values()):
        caption += f" Hollow: more than {BROKEN:.0%} of the unseen or of the normal answers are degenerate."
    if beyond := [label for label, (x, _, _) in points.items() if max(x.value, x.high) >= LARGEST_MULTIPLE]:
        caption += f" A multiple above {LARGEST_MULTIPLE} is drawn at {LARGEST_MULTIPLE}: {', '.join(beyond)}."
    if absent:
        caption += f" Not drawn, for lack of figures: {', '.join(absent)}."
    return [picture(file, caption, plots.plot_tradeoff(points, of, report.label(ORACLE))), report.judge()]


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
        ([report.label(method), named(method, alpha)], (method, alpha))
        for method, measured in figures.groupby("method", sort=False)
        for alpha in sorted(measured["alpha"].unique())
    ]
    columns: list[Column] = [*rates, ("normal", REFERENCES, "reference_perplexity")]
    return [
        picture("alpha", caption, alpha_plot(report, figures, cells, rates)),
        *recommendations(report),
        figure_table(report, "alpha", ["method", "alpha"], rows, columns, cells),
        report.judge(),
    ]


def alpha_plot(report: ReportContext, figures: pd.DataFrame, cells: Cells, columns: list[Column]) -> bytes:
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
        rows.append([report.label(row["method"]), str(row["seed"]), alpha, f"{row['budget']:.0%}", row["why"]])
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
    titles = [f"{UNSEEN_RATE}: {kind} (n = {n})" for kind, n in zip(kinds, counts, strict=True)]
    mean = ", mean over seeds" if report.seeds > 1 else ""
    caption = f"Harmful rate by kind of harm ({figures['decoding'].iloc[0]}{mean})."
    return [
        paragraph(
            "Task vectors trained on only one kind of harm, and their sum. A prompt of two kinds counts in both."
        ),
        table("categories", ["task vector", *titles], [[n, *row] for n, row in zip(names, matrix, strict=True)]),
        report.judge(),
        picture("categories", caption, plots.plot_categories(names, kinds, matrix)),
    ]


def losses(report: ReportContext) -> list[Block]:
    runs = {report.label(name): steps for name, steps in report.data.losses.items() if steps}
    seed = report.data.seeds[0]
    caption = f"Losses of stage 1 before their weights, and the weighted total (seed {seed}); bold: running means."
    return [picture("losses", caption, plots.plot_losses_by_method(runs))] if runs else []


def prompts_and_answers(report: ReportContext) -> list[Block]:
    if not report.data.answers:
        return []
    blocks = [Block(f"> {WARNING}\n")]
    for prompts, rows in groupby(report.data.answers, key=lambda row: row["set"]):
        for place, row in enumerate(rows, 1):
            answered = [(name, row["answers"][name]) for name in report.data.methods if name in row["answers"]]
            labelled = [(report.label(name), given["answer"], given["verdict"]) for name, given in answered]
            blocks.append(answers(f"{SET_TITLES[prompts]}, {place}", row["prompt"], row["reference"], labelled))
    return blocks


def glossary(report: ReportContext) -> list[Block]:
    shown = {
        METRIC_TITLES[metric].removesuffix(", %"): MEANINGS[metric] for metric in MEANINGS if metric in report.metrics
    }
    return [facts_table({**shown, "interval": INTERVAL})]


def commands(report: ReportContext) -> list[Block]:
    models = [model for model in report.data.methods.values() if model["command"]]
    return [code(f"{model['label']} (seed {report.data.seeds[0]})", model["command"]) for model in models]
