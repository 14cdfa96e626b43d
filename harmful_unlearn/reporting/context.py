"""What the sections of a report share: names, cells, and the notes beside their tables."""

from collections.abc import Iterable

import numpy as np

from harmful_unlearn.reporting.blocks import Text
from harmful_unlearn.reporting.comparison import Comparison
from harmful_unlearn.reporting.figures import DASH, figure_frame, over_seeds, span
from harmful_unlearn.reporting.glossary import SET_TITLES


class ReportContext:
    """A comparison, and what is derived from it.

    Attributes:
        data: the comparison.
        seeds: how many seeds it has.
        figures: its figures of the test prompts, one a row.
        cells: the same over seeds, by model, set, decoding and metric.
        metrics: those that have a value.
        decodings: the decodings of its answers.
        decoding: the one in the main tables: "sampled" if there is one.
    """

    def __init__(self, comparison: Comparison):
        self.data = comparison
        self.seeds = len(comparison.seeds)
        self.figures = figure_frame(comparison.figures)
        self.metrics = set(self.figures.dropna(subset="value")["metric"])
        self.decodings = list(dict.fromkeys(row["decoding"] for row in comparison.figures if row["decoding"]))
        self.decoding = "sampled" if "sampled" in self.decodings else self.decodings[0]
        self.cells = over_seeds(self.figures, ["model", "set", "decoding", "metric"], self.seeds)

    def label(self, name: str) -> str:
        """What tables call a model; a task vector that has no row of its own is called by its name."""
        return self.data.methods[name].label if name in self.data.methods else name

    def judge(self) -> Text:
        """The judge, and what is known of it; for every table with a harmful rate."""
        facts = self.data.judge["by_seed"].values()
        known = []
        for key, name in (("accuracy", "accuracy"), ("auc", "AUC")):
            values = [fact[key] for fact in facts if fact.get(key) is not None]
            if values:
                ends = f" ({min(values):.3f}–{max(values):.3f})" if len(values) > 1 else ""
                known.append(f"{name} {np.mean(values):.3f}{ends}")
        held_out = f"on held-out labels: {', '.join(known)}" if known else "not measured on held-out labels here"
        return Text(f"Judge: {self.data.judge['name']}; {held_out}.")

    def reading(self) -> Text:
        """How to read a table's cells, and how many prompts each set has."""
        counts = []
        for prompts, title in SET_TITLES.items():
            answered = self.figures[(self.figures["set"] == prompts) & (self.figures["metric"] == "degenerate_rate")]
            if len(answered):
                counts.append(f"{span(answered['n'])} {title[0].lower()}{title[1:]}")
        cells = "mean (lowest–highest) over seeds" if self.seeds > 1 else "value [95 % interval]"
        return Text(f"Cells: {cells}; {DASH}: nothing to measure. n: {', '.join(counts)}{self.each_seed}.")

    @property
    def each_seed(self) -> str:
        return ", for each seed" if self.seeds > 1 else ""

    @property
    def spread(self) -> str:
        """What the whiskers and bands of a plot are."""
        return "from the lowest to the highest seed" if self.seeds > 1 else "the 95 % interval"

    def notes(self, models: Iterable[str]) -> list[Text]:
        """The notes of models, as paragraphs."""
        noted = [(name, self.data.methods[name].note) for name in models]
        return [Text(f"{self.label(name)}: {note}") for name, note in noted if note]
