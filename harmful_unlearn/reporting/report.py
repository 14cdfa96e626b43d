"""The comparison's report: tables and pictures from one dict, as Markdown, HTML and CSV.

Rows stand in the order of the comparison's methods, whatever was measured: nothing is ranked.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import groupby
from pathlib import Path

import matplotlib
import numpy as np

from harmful_unlearn.reporting.blocks import DASH, Answers, Cell, Code, Picture, Table, Text, markdown, page
from harmful_unlearn.reporting.plots import (
    STYLE,
    draw_alphas,
    draw_categories,
    draw_losses,
    draw_relearning,
    draw_tradeoff,
)
from harmful_unlearn.storage.files import write_file

BASE, SKU = "base", "sku"  # as the comparison calls them
BROKEN = 0.2  # a model with more degenerate answers than this is drawn hollow
MOST = 1000  # multiples of a perplexity above this are drawn here: a broken model's would press the rest together
SETS = {
    "seen": "Harmful prompts used in unlearning", "unseen": "Unseen harmful prompts", "normal": "Normal prompts",
}  # fmt: skip
NAMES = {
    "harmful_rate": "harmful rate, %", "degenerate_rate": "degenerate, %", "unjudged_rate": "unjudged, %",
    "answer_perplexity": "perplexity", "reference_perplexity": "reference perplexity", "exact_match": "exact match, %",
    "rouge_reference": "ROUGE-L to reference", "rouge_base": "ROUGE-L to original",
    "bleurt_reference": "BLEURT to reference", "bleurt_base": "BLEURT to original", "mc1": "MC1", "mc2": "MC2",
}  # fmt: skip
GLOSSARY = {
    "harmful_rate": "Harmful answers / judged answers, that is all but the unjudged. Degenerate answers are judged "
    "as such without asking the judge: never harmful, in the denominator, and counted apart as degenerate.",
    "degenerate_rate": "Share of answers that are no answers: empty, under three words, mostly not letters and "
    "digits, or mostly one phrase repeated. A model that says nothing is not safe, it is broken.",
    "unjudged_rate": "Share of answers on which the judge gave no verdict that could be read; neither safe nor "
    "harmful.",
    "answer_perplexity": "exp of the mean cross-entropy of a token of the model's own answers given their prompts, "
    "over all tokens of a set, under the reference language model. A repeated phrase scores low: read degenerate too.",
    "reference_perplexity": "exp of the mean cross-entropy of a token of the data's answers given their prompts, "
    "under the model itself. Of normal answers low is knowledge kept; of harmful ones low is harm still known.",
    "exact_match": "Share of answers with the same words in the same spelling as the reference.",
    "rouge_reference": "ROUGE-L, F-measure: words of the longest common subsequence with the reference, 0 to 1.",
    "rouge_base": "The same against the original model's answer to the prompt.",
    "bleurt_reference": "BLEURT, a learned measure of similarity, of the answer against the reference.",
    "bleurt_base": "The same against the original model's answer to the prompt.",
    "mc1": "TruthfulQA: share of questions whose best answer is more probable than every false one.",
    "mc2": "TruthfulQA: the share of the probability of all choices that lies on the true ones, averaged.",
}
INTERVAL = (
    "95 % percentile bootstrap over prompts. A rate of exactly 0 or 1 has no bootstrap width: from n answers the "
    "true rate may, by the rule of three, be up to 3/n away."
)


def write_report(comparison: dict, folder: Path) -> None:
    """Write report.md, report.html (self-contained), the pictures and the tables as CSV into `folder`.

    Args:
        comparison: as reproduce.py keeps it in comparison.json. Shares are of 1; a value of None had nothing to
            average. Parts that are empty are left out of the report.
    """
    with matplotlib.rc_context(STYLE):
        parts = {title: blocks for title, blocks in sections(Report(comparison)) if blocks}
    for block in (block for blocks in parts.values() for block in blocks):
        for name, content in block.files().items():
            write_file(folder / name, content)
    write_file(folder / "report.md", markdown(comparison["title"], parts))
    write_file(folder / "report.html", page(comparison["title"], parts))


def by_keys(rows: list[dict], *keys: str) -> dict[tuple, dict[int, dict]]:
    """The rows of each seed under the values of `keys`."""
    found = defaultdict(dict)
    for row in rows:
        found[tuple(row[key] for key in keys)][row["seed"]] = row
    return found


def relative(rows: dict[int, dict], base: dict[int, dict]) -> dict[int, dict]:
    """Each seed's value as a multiple of the base's of that seed, for a picture: MOST at most."""
    return {
        seed: {"value": min(row["value"] / base[seed]["value"], MOST)}
        for seed, row in rows.items()
        if row["value"] is not None and seed in base and base[seed]["value"]
    }


class Report:
    """What the sections share: the comparison, its figures by seed, and what is said of them."""

    def __init__(self, comparison: dict):
        self.data = comparison
        self.methods: dict[str, dict] = comparison["methods"]
        self.asked = len(comparison["seeds"])
        self.figures = by_keys(comparison["figures"], "model", "set", "decoding", "metric")
        self.metrics = {row["metric"] for row in comparison["figures"] if row["value"] is not None}
        self.decodings = list(dict.fromkeys(row["decoding"] for row in comparison["figures"] if row["decoding"]))
        self.decoding = "sampled" if "sampled" in self.decodings else next(iter(self.decodings), None)

    def label(self, name: str) -> str:
        return self.methods[name]["label"] if name in self.methods else name

    def over_seeds(self, rows: dict[int, dict], metric: str) -> Cell:
        rows = [row for row in rows.values() if row["value"] is not None]
        if not rows:
            return Cell(metric, None, None, None, 0, self.asked)
        if self.asked == 1:
            return Cell(metric, *(rows[0].get(key) for key in ("value", "low", "high")), 1, 1)
        values = [row["value"] for row in rows]
        return Cell(metric, float(np.mean(values)), min(values), max(values), len(rows), self.asked)

    def cell(self, model: str, prompts: str, decoding: str | None, metric: str) -> Cell:
        return self.over_seeds(self.figures.get((model, prompts, decoding, metric), {}), metric)

    def judge(self) -> Text:
        """The judge with what is known of it; beside every table with a harmful rate."""
        facts = self.data["judge"]["by_seed"].values()
        known = []
        for key, name in (("accuracy", "accuracy"), ("auc", "AUC")):
            values = [fact[key] for fact in facts if fact.get(key) is not None]
            if values:
                spread = f" ({min(values):.3f}–{max(values):.3f})" if len(values) > 1 else ""
                known.append(f"{name} {np.mean(values):.3f}{spread}")
        held_out = f"on held-out labels: {', '.join(known)}" if known else "not measured on held-out labels here"
        return Text(f"Judge: {self.data['judge']['name']}; {held_out}.")

    def prompts_note(self) -> Text:
        """How to read the cells, and n of each set."""
        counts = []
        for prompts, title in SETS.items():
            found = [r["n"] for r in self.data["figures"] if r["set"] == prompts and r["metric"] == "degenerate_rate"]
            if found:
                counts.append(f"{span(found)} {title[0].lower()}{title[1:]}")
        reading = "mean (lowest–highest) over seeds" if self.asked > 1 else "value [95 % interval]"
        return Text(f"Cells: {reading}; {DASH}: nothing to measure. n: {', '.join(counts)}{per_seed(self.asked)}.")

    def notes(self, names: list[str]) -> list[Text]:
        return [Text(f"{self.label(name)}: {note}") for name in names if (note := self.methods[name].get("note"))]


def span(values: list[int]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"


def per_seed(asked: int) -> str:
    return ", for each seed" if asked > 1 else ""


def sections(report: Report) -> list[tuple[str, list]]:
    """Headings with their blocks, in order; an empty list where the comparison has nothing of it."""
    data, judge = report.data, report.judge()
    main = [name for name, method in report.methods.items() if method["group"] == "main"]
    changed = [name for name, method in report.methods.items() if method["group"] == "ablation"]
    ablations = [name for name in report.methods if name in (BASE, SKU, *changed)]
    similarity = "bleurt_reference" if "bleurt_reference" in report.metrics else "rouge_reference"
    now, greedy = report.decoding, [("unseen", "greedy", "harmful_rate")] * ("greedy" in report.decodings)
    paper = [
        ("seen", now, "harmful_rate"),
        ("seen", now, "answer_perplexity"),
        ("unseen", now, "harmful_rate"),
        ("unseen", now, "answer_perplexity"),
        ("normal", now, "answer_perplexity"),
        ("normal", now, similarity),
    ]
    hidden = [
        ("seen", None, "reference_perplexity"),
        ("unseen", now, "degenerate_rate"),
        ("unseen", now, "unjudged_rate"),
        *(greedy if now != "greedy" else []),
        ("unseen", None, "reference_perplexity"),
        *(("normal", now, metric) for metric in ("degenerate_rate", "exact_match")),
        *(("normal", now, m) for m in ("rouge_reference", "rouge_base", "bleurt_base")),
        *(("normal", None, metric) for metric in ("reference_perplexity", "mc1", "mc2")),
    ]
    ablated = [
        *paper[:4],
        ("unseen", now, "degenerate_rate"),
        *paper[4:],
        ("normal", now, "degenerate_rate"),
        ("normal", now, "exact_match"),
    ]

    def compared(name: str, models: list[str], columns: list[tuple]) -> list:
        rows = [([report.label(model)], partial(report.cell, model)) for model in models]
        table = figure_table(name, ["method"], rows, columns, now)
        return [table, judge, report.prompts_note(), *report.notes(models)]

    return [
        ("What was compared", overview(report)),
        (f"Results ({now} answers)", compared("main", main, paper)),
        ("What a harmful rate hides", compared("hidden", main, hidden)),
        ("Ablations", compared("ablations", ablations, ablated) if changed else []),
        ("Harm against normal text", tradeoff(report)),
        ("The scale alpha", alphas(report)),
        ("By kind of harm", categories(report)),
        ("Relearning", relearning(report)),
        ("Losses of stage 1", losses(report)),
        ("Prompts and answers", answers(report)),
        (
            "Glossary",
            [
                facts(
                    {
                        **{
                            NAMES[key].removesuffix(", %"): text
                            for key, text in GLOSSARY.items()
                            if key in report.metrics
                        },
                        "interval": INTERVAL,
                    }
                )
            ],
        ),
        (
            "Commands",
            [
                Code(f"{report.label(name)} (seed {data['seeds'][0]})", method["command"])
                for name, method in report.methods.items()
                if method.get("command")
            ],
        ),
        ("Provenance", [facts(data["provenance"])] if data.get("provenance") else []),
    ]


def figure_table(
    name: str, heads: list[str], rows: list[tuple[list[str], Callable[..., Cell]]], columns: list[tuple], now: str
) -> Table:
    """Rows of (labels, cell of a column) by columns of (set, decoding, metric); columns without any value left out."""
    shown = [column for column in columns if any(cell(*column).value is not None for _, cell in rows)]
    titles = [
        (SETS[prompts], NAMES[metric] + (f" ({decoding})" if decoding not in (None, now) else ""))
        for prompts, decoding, metric in shown
    ]
    cells = [[*labels, *(cell(*column) for column in shown)] for labels, cell in rows]
    return Table(name, [*(("", head) for head in heads), *titles], cells, len(heads))


def facts(values: dict) -> Table:
    """A dict as a table of two columns; a dict in it as one line."""

    def line(value: object) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{key} {line(part)}" for key, part in value.items())
        return ", ".join(map(line, value)) if isinstance(value, list) else DASH if value is None else str(value)

    return Table(None, [("", "what"), ("", "value")], [[key, line(value)] for key, value in values.items()])


def overview(report: Report) -> list:
    data = report.data
    judged = {
        f"judge, seed {seed}": {key: round(v, 4) if isinstance(v, float) else v for key, v in found.items()}
        for seed, found in data["judge"]["by_seed"].items()
    }
    names = ", ".join(report.label(name) for name in report.methods if name != BASE)
    return [
        Text(
            f"The original model, {data['model']}, and what was trained from it: {names}. "
            "Rows stand in this order in every table, whatever was measured."
        ),
        report.judge(),
        Code("Command", data["command"]),
        facts({"model": data["model"], "seeds": data["seeds"], **data["settings"], **judged}),
    ]


def tradeoff(report: Report) -> list:
    base = report.figures.get((BASE, "normal", None, "reference_perplexity"), {})
    points, absent = {}, []
    for name in sorted(report.methods, key=lambda name: name != BASE):
        own = relative(report.figures.get((name, "normal", None, "reference_perplexity"), {}), base)
        x = report.over_seeds(own, "reference_perplexity")
        y = report.cell(name, "unseen", report.decoding, "harmful_rate")
        degenerate = [report.cell(name, s, report.decoding, "degenerate_rate").value for s in ("unseen", "normal")]
        if None in (x.value, y.value):
            absent.append(report.label(name))
        else:
            points[report.label(name)] = (x, y, any(value is not None and value > BROKEN for value in degenerate))
    if len(points) < 2:
        return []
    spread = "from the lowest to the highest seed" if report.asked > 1 else "the 95 % interval of the harmful rate"
    caption = f"One point a method; whiskers: {spread}."
    if any(hollow for _, _, hollow in points.values()):
        caption += f" Hollow: more than {BROKEN:.0%} of the unseen or of the normal answers are degenerate."
    if beyond := [label for label, (x, _, _) in points.items() if (x.high or x.value) >= MOST]:
        caption += f" A multiple above {MOST} is drawn at {MOST}: {', '.join(beyond)}."
    if absent:
        caption += f" Not drawn, for lack of figures: {', '.join(absent)}."
    return [Picture("tradeoff", caption, draw_tradeoff(points, report.decoding)), report.judge()]


def alphas(report: Report) -> list:
    sweep, advice = report.data["sweep"], report.data["recommended"]
    if not sweep:
        return []
    at = by_keys(sweep, "method", "alpha", "set", "decoding", "metric")
    methods = list(dict.fromkeys(row["method"] for row in sweep))
    scales = sorted({row["alpha"] for row in sweep})
    decodings = [one for one in report.decodings if any(row["decoding"] == one for row in sweep)]
    lines = [("unseen", one, "harmful_rate") for one in decodings] + [("unseen", decodings[0], "degenerate_rate")]
    normal = ("normal", None, "reference_perplexity")

    def cell(method: str, alpha: float, *column: str | None) -> Cell:
        return report.over_seeds(at.get((method, alpha, *column), {}), column[-1])

    rates, multiples, advised = {}, {}, defaultdict(set)
    for method in methods:
        rates[report.label(method)] = {
            f"{NAMES[line[-1]].removesuffix(', %')}, {line[1]}": [cell(method, alpha, *line) for alpha in scales]
            for line in lines
        }
        own = [at.get((method, alpha, *normal), {}) for alpha in scales]
        multiples[report.label(method)] = [report.over_seeds(relative(rows, own[0]), normal[-1]) for rows in own]
    for row in advice:
        if row["alpha"] is not None:
            advised[report.label(row["method"])].add(row["alpha"])
    budget = advice[0]["budget"] if advice and scales[0] == 0 else None
    spread = "from the lowest to the highest seed" if report.asked > 1 else "the 95 % interval"
    caption = (
        f"One task vector at each scale, on validation prompts; bands: {spread}. A multiple of the perplexity "
        f"above {MOST} is drawn at {MOST}."
    )
    advised_rows = [
        [
            report.label(row["method"]),
            str(row["seed"]),
            "none" if row["alpha"] is None else f"{row['alpha']:g}",
            f"{row['budget']:.0%}",
            row["why"],
        ]
        for row in advice
    ]
    heads = [("", head) for head in ("method", "seed", "recommended alpha", "budget", "why")]
    landings = {row["method"]: row["trained_for"] for row in sweep if row.get("trained_for")}
    if landings:
        own = ", ".join(f"{report.label(method)} at {alpha:g}" for method, alpha in landings.items())
        caption += f" Trained for one scale: {own}; its other scales only show what that training does not cover."

    def named(method: str, alpha: float) -> str:
        landing = landings.get(method)
        mark = "" if landing is None else " (trained for)" if alpha == landing else " (not trained for)"
        return f"{alpha:g}{mark}"

    rows = [
        ([report.label(m), named(m, alpha)], partial(cell, m, alpha))
        for m in methods
        for alpha in scales
        if (m, alpha, *normal) in at
    ]
    return [
        Picture("alpha", caption, draw_alphas(scales, rates, multiples, advised, budget)),
        *([Table("recommended", heads, advised_rows)] if advice else []),
        figure_table("alpha", ["method", "alpha"], rows, [*lines, normal], report.decoding),
        report.judge(),
    ]


def categories(report: Report) -> list:
    found = by_keys(report.data["categories"], "vector", "category")
    if not found:
        return []
    vectors, kinds = (list(dict.fromkeys(key[at] for key in found)) for at in (0, 1))
    cells = [[report.over_seeds(found.get((v, k), {}), "harmful_rate") for k in kinds] for v in vectors]
    counts = [span([row["n"] for v in vectors for row in found.get((v, kind), {}).values()]) for kind in kinds]
    names = [report.label(v) if v == BASE else "sum of all" if v == "sum" else v for v in vectors]
    titles = [("Harmful rate on unseen prompts, %", f"{k} (n = {n})") for k, n in zip(kinds, counts, strict=True)]
    rows = [[name, *row] for name, row in zip(names, cells, strict=True)]
    decoding = report.data["categories"][0]["decoding"]
    caption = f"Harmful rate by kind of harm ({decoding}{', mean over seeds' if report.asked > 1 else ''})."
    return [
        Text("Task vectors trained on one kind of harm alone, and their sum. A prompt of two kinds counts in both."),
        Table("categories", [("", "task vector"), *titles], rows),
        report.judge(),
        Picture("categories", caption, draw_categories(names, kinds, cells)),
    ]


def relearning(report: Report) -> list:
    def time(row: dict) -> str:  # what stands before relearning is the same for every strength
        return f"after, {row['strength']}" if row["when"] == "after" else "before"

    rows = [{**row, "time": time(row)} for row in report.data["relearning"] if row["metric"] == "harmful_rate"]
    if not rows:
        return []
    found, settings = by_keys(rows, "model", "time"), report.data["relearning_settings"]
    models = [name for name in report.methods if any(row["model"] == name for row in rows)]
    times = list(dict.fromkeys(["before", *(row["time"] for row in rows)]))
    cells = [[report.over_seeds(found.get((name, time), {}), "harmful_rate") for time in times] for name in models]
    labels = [report.label(name) for name in models]
    rates = " and ".join(f"{lr:g} ({name})" for name, lr in settings["lr"].items())
    spread = "from the lowest to the highest seed" if report.asked > 1 else "the 95 % interval"
    return [
        Text(
            f"Each model was fine-tuned for {settings['steps']} steps on {settings['pairs']} harmful pairs, at a rate "
            f"of {rates}. Read each row against the original's: whether harm was gone or only muted."
        ),
        Table(
            "relearning",
            [("", "method"), *(("Harmful rate on unseen prompts, %", time) for time in times)],
            [[label, *row] for label, row in zip(labels, cells, strict=True)],
        ),
        report.judge(),
        Text(f"n: {span([row['n'] for row in rows])} prompts{per_seed(report.asked)}."),
        Picture(
            "relearning",
            f"Before and after relearning; whiskers: {spread}.",
            draw_relearning(labels, times, cells, rows[0]["decoding"]),
        ),
    ]


def losses(report: Report) -> list:
    runs = {report.label(name): steps for name, steps in report.data["losses"].items() if steps}
    caption = (
        f"Losses of stage 1 before their weights, and the weighted total (seed {report.data['seeds'][0]}); "
        "bold: running means."
    )
    return [Picture("losses", caption, draw_losses(runs))] if runs else []


def answers(report: Report) -> list:
    if not report.data["answers"]:
        return []
    blocks = [
        Text(
            "Warning: these texts are harmful by construction. They are what the models said, unedited, and "
            "stand here for safety research; do not act on them or pass them on.",
            warning=True,
        )
    ]
    for prompts, rows in groupby(report.data["answers"], key=lambda row: row["set"]):
        for at, row in enumerate(rows, 1):
            said = [
                (report.label(name), row["answers"][name]["answer"], row["answers"][name]["verdict"])
                for name in report.methods
                if name in row["answers"]
            ]
            blocks.append(Answers(f"{SETS[prompts]}, {at}", row["prompt"], row["reference"], said))
    return blocks
