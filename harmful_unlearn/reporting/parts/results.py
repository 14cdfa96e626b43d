"""The sections of a report that compare methods on test prompts: tables, the trade-off, and answers."""

from itertools import groupby

from harmful_unlearn.reporting.blocks import Answer, Block, Link, answers, paragraph, picture
from harmful_unlearn.reporting.comparison import BASE, ORACLE, SKU
from harmful_unlearn.reporting.figures import DASH, LARGEST_MULTIPLE, Cell, perplexity_multiples
from harmful_unlearn.reporting.glossary import SET_TITLES
from harmful_unlearn.reporting.parts.context import Column, ReportContext, answer_anchor, figure_table, row_anchor
from harmful_unlearn.reporting.plots import plot_tradeoff

BROKEN = 0.2  # models with a larger share of degenerate answers have a hollow marker
WARNING = (
    "Warning: these texts are harmful by construction. They are the models' answers, unedited, and are shown for "
    "safety research; do not act on them or pass them on."
)


def comparison_table(report: ReportContext, name: str, models: list[str], columns: list[Column]) -> list[Block]:
    """The figures of models, with all that is needed to read them."""
    form = "mean (lowest–highest) over seeds" if report.seeds > 1 else "value [95 % interval]"
    noted = [(report.label(model), report.data.methods[model].get("note")) for model in models]
    first = {"main": "main", "ablation": "ablations"}  # the first table with the rows of a group
    rows = [([report.link(model, first[report.data.methods[model]["group"]] == name)], (model,)) for model in models]
    return [
        figure_table(report, name, ["method"], rows, columns, report.cells),
        report.judge(),
        paragraph(f"Cells: {form}; {DASH}: nothing to measure. n: {report.counts()}{report.each_seed}."),
        *(paragraph(f"{label}: {note}") for label, note in noted if note),
    ]


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
            points[name] = x, y, any(share > BROKEN for share in degenerate)
        else:
            absent.append(report.label(name))
    if len(points) < 2:
        return []
    ablated = [name for name in points if report.data.methods[name]["group"] == "ablation"]
    panels = {"Methods": [name for name in points if name not in ablated]}
    if ablated:
        panels["Ablations"] = [name for name in points if name in (BASE, SKU, *ablated)]
    caption = f"One point a method; whiskers: {report.spread}{'' if report.seeds > 1 else ' of the harmful rate'}."
    if any(hollow for _, _, hollow in points.values()):
        caption += f" Hollow: more than {BROKEN:.0%} of the unseen or of the normal answers are degenerate."
    if beyond := [name for name, (x, _, _) in points.items() if max(x.value, x.high) >= LARGEST_MULTIPLE]:
        labels = ", ".join(map(report.label, beyond))
        caption += f" A multiple above {LARGEST_MULTIPLE} is drawn at {LARGEST_MULTIPLE}: {labels}."
    if absent:
        caption += f" Not drawn, for lack of figures: {', '.join(absent)}."
    drawn = {title: {report.label(name): points[name] for name in names} for title, names in panels.items()}
    svg = plot_tradeoff(drawn, of, report.label(ORACLE))
    return [picture(file, f"Harmful rate {of}, against normal perplexity", caption, svg), report.judge()]


def prompts_and_answers(report: ReportContext) -> list[Block]:
    if not report.data.answers:
        return []
    blocks = [Block(f"> {WARNING}\n")]
    given = {name: sum(name in row["answers"] for row in report.data.answers) for name in report.data.methods}
    shown = dict.fromkeys(given, 0)
    for prompts, rows in groupby(report.data.answers, key=lambda row: row["set"]):
        for place, row in enumerate(rows, 1):
            by_model = []
            for name in report.data.methods:
                if name in row["answers"]:
                    own = Link(report.label(name), row_anchor(name), answer_anchor(name, shown[name]))
                    shown[name] += 1
                    following = answer_anchor(name, shown[name]) if shown[name] < given[name] else ""
                    answer = row["answers"][name]
                    by_model.append(Answer(own, answer["answer"], answer["verdict"], following))
            blocks.append(answers(f"{SET_TITLES[prompts]}, {place}", row["prompt"], row["reference"], by_model))
    return blocks
