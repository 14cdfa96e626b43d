"""The sections of a report: blocks for each, none where the comparison has nothing of it."""

from itertools import groupby

import pandas as pd

from harmful_unlearn.reporting.blocks import Answers, Block, Code, Picture, Table, Text
from harmful_unlearn.reporting.comparison import BASE
from harmful_unlearn.reporting.context import ReportContext
from harmful_unlearn.reporting.figures import (
    DASH,
    LARGEST_MULTIPLE,
    REFERENCES,
    Cell,
    Cells,
    figure_frame,
    over_seeds,
    relative,
    span,
)
from harmful_unlearn.reporting.glossary import INTERVAL, MEANINGS, METRIC_TITLES, SET_TITLES, without_unit
from harmful_unlearn.reporting.plots import (
    plot_alphas,
    plot_categories,
    plot_losses_by_method,
    plot_relearning,
    plot_tradeoff,
)

BROKEN = 0.2  # models with a larger share of degenerate answers have a hollow marker
NORMAL_PERPLEXITY = ("normal", REFERENCES, "reference_perplexity")
UNSEEN_RATE = "Harmful rate on unseen prompts, %"
Column = tuple[str, str, str]  # set of prompts, decoding, metric


def overview(report: ReportContext) -> list[Block]:
    data = report.data
    judged = {
        f"judge, seed {seed}": {key: round(v, 4) if isinstance(v, float) else v for key, v in facts.items()}
        for seed, facts in data.judge["by_seed"].items()
    }
    trained = ", ".join(report.label(name) for name in data.methods if name != BASE)
    return [
        Text(
            f"The original model, {data.model}, and what was trained from it: {trained}. "
            "Rows have this order in every table, whatever their figures."
        ),
        report.judge(),
        Code("Command", data.command),
        facts_table({"model": data.model, "seeds": data.seeds, **data.settings, **judged}),
    ]


def comparison_table(report: ReportContext, name: str, models: list[str], columns: list[Column]) -> list[Block]:
    """The figures of models, with all that is needed to read them."""
    rows = [([report.label(model)], (model,)) for model in models]
    table = figure_table(name, ["method"], rows, columns, report.cells, report.decoding)
    return [table, report.judge(), report.reading(), *report.notes(models)]


def figure_table(
    name: str, heads: list[str], rows: list[tuple[list[str], tuple]], columns: list[Column], cells: Cells, usual: str
) -> Table:
    """A table of figures; columns without any value are omitted.

    Args:
        heads: the titles of the columns that label a row.
        rows: the labels of each, and the start of the key of its cells.
        cells: by the row's start of the key and the column.
        usual: the decoding that titles do not name.
    """
    shown = [column for column in columns if any(cells[*key, *column].measured for _, key in rows)]
    titles = []
    for prompts, decoding, metric in shown:
        named = "" if decoding in (REFERENCES, usual) else f" ({decoding})"
        titles.append(f"{SET_TITLES[prompts]}: {METRIC_TITLES[metric]}{named}")
    body: list[list[str | Cell]] = [[*labels, *(cells[*key, *column] for column in shown)] for labels, key in rows]
    return Table(name, [*heads, *titles], body)


def facts_table(facts: dict) -> Table:
    """A dict as a table of two columns; a dict or list in it is one line."""

    def line(value: object) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{key} {line(part)}" for key, part in value.items())
        if isinstance(value, list):
            return ", ".join(map(line, value))
        return DASH if value is None else str(value)

    return Table(None, ["what", "value"], [[str(name), line(value)] for name, value in facts.items()])


def tradeoff(report: ReportContext) -> list[Block]:
    figures = report.figures
    perplexity = figures[(figures["set"] == "normal") & (figures["metric"] == "reference_perplexity")]
    multiples = over_seeds(relative(perplexity, perplexity[perplexity["model"] == BASE]), "model", report.seeds)
    points: dict[str, tuple[Cell, Cell, bool]] = {}
    absent = []
    for name in sorted(report.data.methods, key=lambda name: name != BASE):  # the base first
        x, y = multiples[name], report.cells[name, "unseen", report.decoding, "harmful_rate"]
        degenerate = [report.cells[name, s, report.decoding, "degenerate_rate"].value for s in ("unseen", "normal")]
        if x.measured and y.measured:
            points[report.label(name)] = x, y, any(share > BROKEN for share in degenerate)
        else:
            absent.append(report.label(name))
    if len(points) < 2:
        return []
    spread = report.spread if report.seeds > 1 else f"{report.spread} of the harmful rate"
    caption = f"One point a method; whiskers: {spread}."
    if any(hollow for _, _, hollow in points.values()):
        caption += f" Hollow: more than {BROKEN:.0%} of the unseen or of the normal answers are degenerate."
    if beyond := [label for label, (x, _, _) in points.items() if max(x.value, x.high) >= LARGEST_MULTIPLE]:
        caption += f" A multiple above {LARGEST_MULTIPLE} is drawn at {LARGEST_MULTIPLE}: {', '.join(beyond)}."
    if absent:
        caption += f" Not drawn, for lack of figures: {', '.join(absent)}."
    return [Picture("tradeoff", caption, plot_tradeoff(points, report.decoding)), report.judge()]


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

    measured = figures[["method", "alpha"]].drop_duplicates().sort_values("alpha", kind="stable")
    rows = [
        ([report.label(method), named(method, alpha)], (method, alpha))
        for method in figures["method"].unique()
        for alpha in measured["alpha"][measured["method"] == method]
    ]
    return [
        Picture("alpha", caption, alpha_plot(report, figures, cells, rates)),
        *([recommendations(report)] if report.data.recommended else []),
        figure_table("alpha", ["method", "alpha"], rows, [*rates, NORMAL_PERPLEXITY], cells, report.decoding),
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
    perplexity = figures[(figures["set"] == "normal") & (figures["metric"] == "reference_perplexity")]
    rates: dict[str, dict[str, list[Cell]]] = {}
    multiples: dict[str, list[Cell]] = {}
    advised: dict[str, set[float]] = {}
    for method in figures["method"].unique():
        label = report.label(method)
        rates[label] = {
            f"{without_unit(metric)}, {decoding}": [cells[method, alpha, prompts, decoding, metric] for alpha in swept]
            for prompts, decoding, metric in columns
        }
        own = perplexity[perplexity["method"] == method]
        by_alpha = over_seeds(relative(own, own[own["alpha"] == swept[0]]), "alpha", report.seeds)
        multiples[label] = [by_alpha[alpha] for alpha in swept]
        recommended = [row["alpha"] for row in report.data.recommended if row["method"] == method]
        advised[label] = {alpha for alpha in recommended if alpha is not None}
    budgets = [row["budget"] for row in report.data.recommended]
    return plot_alphas(swept, rates, multiples, advised, budgets[0] if budgets and swept[0] == 0 else None)


def recommendations(report: ReportContext) -> Table:
    rows: list[list[str | Cell]] = [
        [
            report.label(row["method"]),
            str(row["seed"]),
            "none" if row["alpha"] is None else f"{row['alpha']:g}",
            f"{row['budget']:.0%}",
            row["why"],
        ]
        for row in report.data.recommended
    ]
    return Table("recommended", ["method", "seed", "recommended alpha", "budget", "why"], rows)


def categories(report: ReportContext) -> list[Block]:
    if not report.data.categories:
        return []
    figures = figure_frame(report.data.categories)
    cells = over_seeds(figures, ["vector", "category"], report.seeds)
    vectors, kinds = list(figures["vector"].unique()), list(figures["category"].unique())
    matrix = [[cells[vector, kind] for kind in kinds] for vector in vectors]
    counts = [span(figures["n"][figures["category"] == kind]) for kind in kinds]
    names = ["sum of all" if vector == "sum" else report.label(vector) for vector in vectors]
    titles = [f"{UNSEEN_RATE}: {kind} (n = {n})" for kind, n in zip(kinds, counts, strict=True)]
    mean = ", mean over seeds" if report.seeds > 1 else ""
    caption = f"Harmful rate by kind of harm ({figures['decoding'].iloc[0]}{mean})."
    return [
        Text("Task vectors trained on only one kind of harm, and their sum. A prompt of two kinds counts in both."),
        Table("categories", ["task vector", *titles], [[n, *row] for n, row in zip(names, matrix, strict=True)]),
        report.judge(),
        Picture("categories", caption, plot_categories(names, kinds, matrix)),
    ]


def relearning(report: ReportContext) -> list[Block]:
    if not report.data.relearning:
        return []
    figures = figure_frame(report.data.relearning)
    # Before relearning, a model is the same for every strength.
    figures["time"] = ("after, " + figures["strength"].fillna("")).where(figures["when"] == "after", "before")
    cells = over_seeds(figures, ["model", "time"], report.seeds)
    models = [name for name in report.data.methods if name in set(figures["model"])]
    times = list(dict.fromkeys(["before", *figures["time"]]))
    rates = [[cells[name, time] for time in times] for name in models]
    labels = [report.label(name) for name in models]
    settings = report.data.relearning_settings
    learning_rates = " and ".join(f"{lr:g} ({strength})" for strength, lr in settings["lr"].items())
    return [
        Text(
            f"Each model was fine-tuned for {settings['steps']} steps on {settings['pairs']} harmful pairs, at a rate "
            f"of {learning_rates}. Compare each row with the original's: it shows whether harm was gone or only muted."
        ),
        Table(
            "relearning",
            ["method", *(f"{UNSEEN_RATE}: {time}" for time in times)],
            [[label, *row] for label, row in zip(labels, rates, strict=True)],
        ),
        report.judge(),
        Text(f"n: {span(figures['n'])} prompts{report.each_seed}."),
        Picture(
            "relearning",
            f"Before and after relearning; whiskers: {report.spread}.",
            plot_relearning(labels, times, rates, figures["decoding"].iloc[0]),
        ),
    ]


def losses(report: ReportContext) -> list[Block]:
    runs = {report.label(name): steps for name, steps in report.data.losses.items() if steps}
    caption = (
        f"Losses of stage 1 before their weights, and the weighted total (seed {report.data.seeds[0]}); "
        "bold: running means."
    )
    return [Picture("losses", caption, plot_losses_by_method(runs))] if runs else []


def answers(report: ReportContext) -> list[Block]:
    if not report.data.answers:
        return []
    blocks: list[Block] = [
        Text(
            "Warning: these texts are harmful by construction. They are the models' answers, unedited, and are shown "
            "for safety research; do not act on them or pass them on.",
            warning=True,
        )
    ]
    for prompts, rows in groupby(report.data.answers, key=lambda row: row["set"]):
        for place, row in enumerate(rows, 1):
            answered = [(name, row["answers"][name]) for name in report.data.methods if name in row["answers"]]
            labelled = [(report.label(name), given["answer"], given["verdict"]) for name, given in answered]
            blocks.append(Answers(f"{SET_TITLES[prompts]}, {place}", row["prompt"], row["reference"], labelled))
    return blocks


def glossary(report: ReportContext) -> list[Block]:
    meanings = {without_unit(metric): text for metric, text in MEANINGS.items() if metric in report.metrics}
    return [facts_table({**meanings, "interval": INTERVAL})]


def commands(report: ReportContext) -> list[Block]:
    return [
        Code(f"{model.label} (seed {report.data.seeds[0]})", model.command)
        for model in report.data.methods.values()
        if model.command
    ]
