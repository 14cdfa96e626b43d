"""The sections of a report on refusals, on what holds under attack, and on the distance from an oracle."""

import pandas as pd

from harmful_unlearn.reporting import plots
from harmful_unlearn.reporting.blocks import Block, Link, paragraph, picture, table
from harmful_unlearn.reporting.comparison import BASE, ORACLE
from harmful_unlearn.reporting.figures import DASH, REFERENCES, Cell, Cells, figure_frame, over_seeds, span
from harmful_unlearn.reporting.parts.context import ReportContext, figure_table
from harmful_unlearn.reporting.parts.results import tradeoff_picture


def attacks(report: ReportContext) -> list[Block]:
    if all(row["attack"] == "none" for row in report.data.attacks):
        return []
    everything = figure_frame(report.data.attacks)
    figures = everything[everything["metric"] == "harmful_rate"]
    cells = over_seeds(figures, ["model", "attack", "variant"], report.seeds)
    models = [name for name in report.data.methods if name in set(figures["model"])]
    asked = list(dict.fromkeys(zip(figures["attack"], figures["variant"], strict=True)))
    variants = figures.groupby("attack", sort=False)["variant"].agg(lambda names: list(dict.fromkeys(names)))
    # Of an attack with several variants its worst one, of others the only one.
    decisive = [(name, "worst" if "worst" in own else own[0]) for name, own in variants.items()]
    columns = {
        "no attack" if name == "none" else name.replace("_", " "): {model: cells[model, name, own] for model in models}
        for name, own in decisive
    }
    if report.data.relearning:
        curves, steps = _worst_relearned(report)
        title = f"relearn, {steps[-1]} steps"
        last = list(columns)[-2:]  # the sums
        columns = {
            **{name: column for name, column in columns.items() if name not in last},
            title: {model: curves[model, steps[-1]] for model in models},
            **{name: columns[name] for name in last},
        }
    body: list[list[str | Cell | Link]] = [
        [report.link(model), *(column[model] for column in columns.values())] for model in models
    ]
    every: list[list[str | Cell | Link]] = [[*names, *(cells[model, *names] for model in models)] for names in asked]
    worst = {name: cells[name, "worst", "worst"] for name in report.data.methods}
    return [
        paragraph(
            "Harmful rates, %, on the same unseen prompts without an attack and under each; of an attack with several "
            'variants that of its worst one. "worst" is the highest of all attacks, "any" the share of prompts that '
            "any answer breaks: there a judge's false alarms add up, too. Relearning has no part in these two."
        ),
        table("attacks", ["method", *columns], body),
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


def _worst_relearned(report: ReportContext) -> tuple[Cells, list[int]]:
    """Harmful rates by the worst attacker, by model and steps, and the numbers of steps."""
    figures = figure_frame(report.data.relearning)
    worst = figures[figures["attacker"] == "worst"]
    return over_seeds(worst, ["model", "steps"], report.seeds), sorted(worst["steps"].unique())


def _perplexities(report: ReportContext, figures: pd.DataFrame, models: list[str]) -> list[Block]:
    """What changed weights do to normal text; nothing if none were changed."""
    if figures.empty:
        return []
    changes = list(dict.fromkeys(zip(figures["attack"], figures["variant"], strict=True)))
    changed = over_seeds(figures, ["model", "attack", "variant"], report.seeds)
    rows: list[list[str | Cell | Link]] = [
        [
            report.link(model),
            report.cells[model, "normal", REFERENCES, "reference_perplexity"],
            *(changed[model, *change] for change in changes),
        ]
        for model in models
    ]
    return [
        paragraph("Perplexity of normal reference answers, as the models are and with changed weights."),
        table("attack-perplexity", ["method", "as it is", *map(", ".join, changes)], rows),
    ]


def refusals(report: ReportContext) -> list[Block]:
    """Refusals of harmless and of harmful prompts, and harm on prompts that --prompts names."""
    named = [name for name in report.figures["set"].unique() if ", " in name]
    usual = report.decoding
    columns = [(name, usual, "refusal_rate") for name in ("normal", "utility", "unseen")]
    columns += [(name, usual, metric) for name in named for metric in ("refusal_rate", "harmful_rate")]
    if "refusal_rate" not in report.metrics:
        return []
    rows = [([report.link(model)], (model,)) for model in report.data.methods]
    counts = report.figures[(report.figures["metric"] == "refusal_rate") & (report.figures["decoding"] == usual)]
    n = ", ".join(f"{span(own['n'])} {name}" for name, own in counts.groupby("set", sort=False))
    judge = report.data.settings.get("refusal_judge", "phrases")
    known = ""
    if judge.startswith("phrases"):
        known = (
            " It knows refusals by their first words: it misses those in other words, and takes other answers that "
            "begin so for refusals."
        )
    return [
        paragraph(
            "A model that refuses harmless prompts has lost something, one that refuses harmful ones does what is "
            f"wanted. Judge of refusals: {judge}.{known}"
        ),
        figure_table(report, "refusals", ["method"], rows, columns, report.cells),
        *(
            [report.judge()]
            if any(
                report.cells[model, *column].measured
                for model in report.data.methods
                for column in columns
                if column[2] == "harmful_rate"
            )
            else []
        ),
        paragraph(f"n: {n}{report.each_seed}."),
    ]


def oracle(report: ReportContext) -> list[Block]:
    """How far each model is from the one that never learned any harm: in output, in behaviour, in relearning."""
    if not report.data.oracle:
        return []
    figures = figure_frame(report.data.oracle)
    cells = over_seeds(figures, ["model", "set", "decoding", "metric"], report.seeds)
    metrics = [(REFERENCES, "oracle_divergence"), (report.decoding, "oracle_kind"), (report.decoding, "oracle_rouge")]
    columns = [(name, decoding, metric) for decoding, metric in metrics for name in ("unseen", "normal")]
    rows = [([report.link(model)], (model,)) for model in report.data.methods if model != ORACLE]
    return [
        paragraph(
            "The oracle had the original's training without the harm. Near it means that a model answers as one that "
            "never knew would, not that it has forgotten: a model that hides what it knows is near, too. Relearning "
            "tells them apart."
        ),
        figure_table(report, "oracle", ["method"], rows, columns, cells),
        paragraph(f"n: {span(figures['n'])} prompts of a set{report.each_seed}."),
    ]


def relearning(report: ReportContext) -> list[Block]:
    """Harmful rates while models are fine-tuned: the worst attacker of the grid after each number of steps."""
    if not report.data.relearning:
        return []
    figures = figure_frame(report.data.relearning)
    models = [name for name in report.data.methods if name in set(figures["model"])]
    worst = figures[figures["attacker"] == "worst"]
    cells, steps = _worst_relearned(report)
    half = cells[BASE, 0].value / 2
    rows: list[list[str | Cell | Link]] = []
    for model in models:
        curve = [cells[model, step] for step in steps]
        reached = next((str(step) for step, cell in zip(steps, curve, strict=True) if cell.value >= half), None)
        cost = reached or f"more than {steps[-1]}"
        rows.append([report.link(model), *curve, cost if half > 0 else DASH])
    before = figures[figures["attacker"] == "none"]
    panels = {"worst attacker": worst}
    for text in dict.fromkeys(figures["text"][figures["text"] != ""]):
        own = pd.concat([before, figures[figures["text"] == text]]).dropna(subset="value")
        places = own.groupby(["seed", "model", "steps"])["value"].idxmax()
        panels[f"trained on {text}"] = own.loc[places]
    curves = {
        title: {report.label(model): [own[model, step] for step in steps] for model in models}
        for title, own in (
            (title, over_seeds(part, ["model", "steps"], report.seeds)) for title, part in panels.items()
        )
    }
    attackers = figures["attacker"][~figures["attacker"].isin(("none", "worst"))].nunique()
    texts = ", ".join(text for text in figures["text"].unique() if text)
    caption = (
        f"Each point is the worst attacker of the panel; bands: {report.spread}, which does not count that it was "
        "chosen as the worst."
    )
    return [
        paragraph(
            f"Harmful rates, %, after so many steps of fine-tuning (batches of two) on {span(figures['pairs'])} pairs: "
            f"the worst of {attackers} attackers, who differ in what they train (all weights or LoRA), on what text "
            f"({texts}), and how fast. It is chosen on the prompts that it is measured on, so it is a little too high. "
            "The last column is what it costs an attacker to get half of the original's harm. With enough steps any "
            "model learns harm, so compare with the original"
            f"{' and the oracle, which never knew any' if ORACLE in models else ''}: what comes back faster than in a "
            "model that never knew it had not gone."
        ),
        table("relearning", ["method", *(f"{step} steps" for step in steps), "steps to half of the original's"], rows),
        report.judge(),
        paragraph(f"n: {span(worst['n'])} prompts{report.each_seed}."),
        picture(
            "relearning",
            "Harmful rates over steps of fine-tuning",
            caption,
            plots.plot_curves([f"{step:g}" for step in steps], curves, report.label(ORACLE)),
        ),
    ]
