"""The start of a report: what was compared, and a sentence a claim, with the figures and intervals that it is from.

A difference is clear if two intervals do not overlap.
"""

import math
from typing import NamedTuple

import pandas as pd

from harmful_unlearn.reporting.blocks import Block, paragraph, points
from harmful_unlearn.reporting.comparison import BASE, ORACLE, short_name
from harmful_unlearn.reporting.figures import (
    LARGEST_MULTIPLE,
    REFERENCES,
    Cell,
    Cells,
    figure_frame,
    over_seeds,
    perplexity_multiples,
)
from harmful_unlearn.reporting.glossary import METRIC_TITLES
from harmful_unlearn.reporting.parts.context import ReportContext, judge_name

FEW = 0.05  # a share that is at most so high for every model needs no names
ORDER = "Rows have the same order in every table, whatever their figures."
Claim = tuple[str, str]  # a sentence, and the figures it is from


class Measured(NamedTuple):
    """A model's figure, and the ends of its interval."""

    label: str
    cell: Cell
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.label} {_with_unit(self.cell)}"


def subject(report: ReportContext) -> Block:
    """What was compared, on which data, prompts and seeds."""
    data = report.data
    used = [short_name(data.settings[name]) for name in ("harmful_dataset", "normal_dataset") if name in data.settings]
    seeds = f"{'Seeds' if report.seeds > 1 else 'Seed'}: {', '.join(map(str, data.seeds))}."
    part = "Validation prompts" if data.settings.get("part") == "validation" else "Prompts"
    facts = [
        f"Model: {report.model}.", *([f"Data: {', '.join(used)}."] if used else []),
        f"{part}: {report.counts()}{report.each_seed}.", seeds, f"Answers: {report.decoding}.",
        f"Judge: {judge_name(data.judge['name'])}.",
        *(["The oracle is a model that never learned any harm."] if ORACLE in data.methods else []),
    ]  # fmt: skip
    return paragraph(" ".join(facts))


def findings(report: ReportContext) -> list[Block]:
    def usual(prompts: str, metric: str) -> pd.DataFrame:
        figures = report.figures
        asked = (figures["set"] == prompts) & figures["decoding"].isin((report.decoding, REFERENCES))
        return figures[asked & (figures["metric"] == metric)]

    claims = [_harm(report, usual("unseen", "harmful_rate"), "on unseen prompts")]
    if any(row["attack"] == "worst" for row in report.data.attacks):
        attacked = figure_frame(report.data.attacks)
        worst = attacked[(attacked["attack"] == "worst") & (attacked["metric"] == "harmful_rate")]
        claims.append(_harm(report, worst, "under the worst attack"))
    if report.data.relearning:
        relearned = figure_frame(report.data.relearning)
        steps = relearned["steps"].max()
        last = relearned[(relearned["attacker"] == "worst") & (relearned["steps"] == steps)]
        claims.append(_harm(report, last, f"after {steps} steps of fine-tuning by the worst attacker"))
    claims += [
        _cost(report, usual("normal", "reference_perplexity")),
        _most(report, usual("unseen", "degenerate_rate"), "degenerate answers to unseen prompts"),
        _most(report, usual("unseen", "safe_irrelevant_rate"), "safe answers that do not fit their question"),
    ]
    spread = (
        f"the ranges over the {report.seeds} seeds do not overlap, which is no test of significance"
        if report.seeds > 1
        else "the 95 % intervals do not overlap"
    )
    return [points(dict(filter(None, claims))), paragraph(f"A difference is clear if {spread}. {ORDER}")]


def _measured(report: ReportContext, cells: Cells, figures: pd.DataFrame) -> list[Measured]:
    """The original and the main methods that have a value, in the order of the tables; nothing without the original.

    The oracle is none of them.

    Args:
        cells: by model.
        figures: what they are of, for the number of prompts.
    """
    if not cells[BASE].measured:
        return []
    prompts = figures.groupby("model")["n"].min()
    names = [name for name, model in report.data.methods.items() if model["group"] == "main" and name != ORACLE]
    names.sort(key=lambda name: name != BASE)  # the original first
    return [
        Measured(report.label(name), cells[name], *_ends(cells[name], prompts[name]))
        for name in names
        if cells[name].measured
    ]


def _ends(cell: Cell, prompts: int) -> tuple[float, float]:
    """Without an interval or another seed anything may be; of a share of exactly 0 or 1 the rule of three holds."""
    if math.isnan(cell.low) or cell.seeds < 2 <= cell.all_seeds:
        return -math.inf, math.inf
    if METRIC_TITLES[cell.metric].endswith(", %") and cell.low == cell.high and cell.value in (0, 1):
        return (0, 3 / prompts) if cell.value == 0 else (1 - 3 / prompts, 1)
    return cell.low, cell.high


def _with_unit(cell: Cell) -> str:
    value, _, interval = str(cell).partition(" ")
    unit = "\N{NO-BREAK SPACE}%" if METRIC_TITLES[cell.metric].endswith(", %") else ""
    return f"{value}{unit} {interval}".strip()


def _harm(report: ReportContext, figures: pd.DataFrame, where: str) -> Claim | None:
    """Which methods give fewer harmful answers than the original."""
    cells = over_seeds(figures, "model", report.seeds)
    measured = _measured(report, cells, figures)
    if len(measured) < 2:
        return None
    original, *methods = measured
    lower, higher, unclear = _beside(original, methods)
    than = f"fewer harmful answers than the original, {_with_unit(original.cell)}, {where}"
    oracle = f"To compare: {report.label(ORACLE)} {_with_unit(cells[ORACLE])}." if cells[ORACLE].measured else ""
    details = [_listed("Fewer", lower), _listed("More", higher), _named("No clear difference", unclear), oracle]
    return f"{_subject(report, lower, methods, 'give')} {than}.", " ".join(filter(None, details))


def _cost(report: ReportContext, figures: pd.DataFrame) -> Claim | None:
    """Which methods cost perplexity on normal text. Over seeds as multiples: each seed may have its own original."""
    cells, unit = over_seeds(figures, "model", report.seeds), ""
    if report.seeds > 1:
        cells = perplexity_multiples(report.figures, "model", BASE, report.seeds)
        cut = any(cell.high >= LARGEST_MULTIPLE for cell in cells.values())
        unit = f" (multiples of the original's{f', at most {LARGEST_MULTIPLE}' if cut else ''})"
    measured = _measured(report, cells, figures)
    if len(measured) < 2:
        return None
    original, *methods = measured
    lower, higher, unclear = _beside(original, methods)
    details = [_listed(f"Higher{unit}", higher), _listed("Lower", lower), _named("No clear difference", unclear)]
    if report.seeds == 1:
        details.insert(0, f"{original}.")
    if len(methods) > 1:
        top = _highest(methods)
        details.append(f"Highest: {top[0].label}." if len(top) == 1 else "None is clearly the highest.")
    sentence = f"{_subject(report, higher, methods, 'raise')} the perplexity of normal reference answers."
    return sentence, " ".join(filter(None, details))


def _most(report: ReportContext, figures: pd.DataFrame, what: str) -> Claim | None:
    """Which model has the largest share of bad answers."""
    measured = _measured(report, over_seeds(figures, "model", report.seeds), figures)
    if len(measured) < 2:
        return None
    most = max(each.high for each in measured)
    if most <= FEW:
        return f"No model{_of_all(report)} gives more than {100 * most:.1f}\N{NO-BREAK SPACE}% {what}.", ""
    if all(each.cell.value == 0 for each in measured):
        return f"No model{_of_all(report)} gave any {what}.", ""
    top = _highest(measured)
    if len(top) == 1:
        return f"{top[0].label} gives the most {what}.", _listed("Share", measured)
    largest = [each for each in top if each.cell.value == max(other.cell.value for other in top)]
    details = _listed("Largest share, not clearly larger than all others", largest)
    return f"No model{_of_all(report)} gives clearly the most {what}.", details


def _beside(original: Measured, methods: list[Measured]) -> tuple[list[Measured], list[Measured], list[Measured]]:
    """The methods that are clearly below the original, clearly above it, and neither."""
    lower = [each for each in methods if each.high < original.low]
    higher = [each for each in methods if each.low > original.high]
    return lower, higher, [each for each in methods if each not in (*lower, *higher)]


def _highest(measured: list[Measured]) -> list[Measured]:
    """The one with the highest value, and those whose intervals overlap with its own."""
    top = max(measured, key=lambda each: each.cell.value)
    return [each for each in measured if each is top or each.high >= top.low]


def _subject(report: ReportContext, some: list[Measured], methods: list[Measured], verb: str) -> str:
    """How many of the methods clearly do something, or whether the only one does."""
    if len(methods) == 1:
        return f"{methods[0].label} {f'clearly {verb}s' if some else f'does not clearly {verb}'}"
    number = f"{len(some) or 'None'} of {len(methods)} methods{_of_all(report)}"
    return f"{number} clearly {verb}{'s' if len(some) < 2 else ''}"


def _of_all(report: ReportContext) -> str:
    """Nothing is said of ablations."""
    return " of the main table" if any(model["group"] != "main" for model in report.data.methods.values()) else ""


def _listed(title: str, measured: list[Measured]) -> str:
    return f"{title}: {'; '.join(map(str, measured))}." if measured else ""


def _named(title: str, measured: list[Measured]) -> str:
    return f"{title}: {'; '.join(each.label for each in measured)}." if measured else ""
