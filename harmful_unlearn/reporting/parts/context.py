"""What the sections of a report share: its figures over seeds, and how a model, a judge and a table of figures look."""

import numpy as np

from harmful_unlearn.reporting.blocks import Block, Link, paragraph, slug, table
from harmful_unlearn.reporting.comparison import Comparison, short_name
from harmful_unlearn.reporting.figures import REFERENCES, Cells, figure_frame, over_seeds, span
from harmful_unlearn.reporting.glossary import METRIC_TITLES, SET_TITLES

Column = tuple[str, str, str]  # set of prompts, decoding, metric


def answer_anchor(name: str, place: int) -> str:
    """Where a model's answer is, by how many it gave before."""
    return f"answer-{slug(name)}-{place + 1}"


def row_anchor(name: str) -> str:
    """Where a model's row is in the first table that has it."""
    return f"row-{slug(name)}"


def judge_name(name: str) -> str:
    """A judge's name, without the path of its file."""
    kind, colon, source = name.partition(":")
    return f"{kind}{colon}{short_name(source)}"


class ReportContext:
    """A comparison, and what its sections share.

    Attributes:
        data: the comparison.
        model: the original's name, without its folder's path.
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
        self.model = short_name(comparison.model)
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

    def link(self, name: str, is_own_row: bool = False) -> Link:
        """A model in a table: leads to its first answer; of `is_own_row` the place that its answers lead back to."""
        target = answer_anchor(name, 0) if any(name in row["answers"] for row in self.data.answers) else ""
        return Link(self.label(name), target, row_anchor(name) if is_own_row else "")

    def counts(self) -> str:
        """How many prompts of each set were asked."""
        answered = dict(iter(self.figures[self.figures["metric"] == "degenerate_rate"].groupby("set")["n"]))
        titles = {prompts: title[0].lower() + title[1:] for prompts, title in SET_TITLES.items() if prompts in answered}
        return ", ".join(f"{span(answered[prompts])} {title}" for prompts, title in titles.items())

    def judge(self) -> Block:
        """The judge, and what is known of it; for every table with a harmful rate."""
        known = []
        for key, name in (("accuracy", "accuracy"), ("auc", "AUC")):
            values = [facts[key] for facts in self.data.judge["by_seed"].values() if facts.get(key) is not None]
            if values:
                ends = f" ({min(values):.3f}–{max(values):.3f})" if len(values) > 1 else ""
                known.append(f"{name} {np.mean(values):.3f}{ends}")
        held_out = f"on held-out labels: {', '.join(known)}" if known else "not measured on held-out labels here"
        return paragraph(f"Judge: {judge_name(self.data.judge['name'])}; {held_out}.")


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
