"""The pictures of the comparison's report, one function each. All return an SVG."""

import io
import math
import re

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from harmful_unlearn.reporting.figures import DASH, Cell
from harmful_unlearn.reporting.labels import name_points

# Okabe and Ito's colours, told apart by the colour-blind. The numbers of colours and markers have no common divisor:
# the same pair of both comes again only after 77 methods.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
MARKERS = "s^DvPX<>dph"
WIDE = 5  # an axis is logarithmic if its largest value is this many times its smallest
STYLE = {
    "font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "text.parse_math": False, "legend.frameon": False, "svg.fonttype": "none",
    "svg.hashsalt": "report",
}  # fmt: skip
PERCENT_AXIS = (-4, 104)
MOST_POINTS = 80  # of a line over steps


@rc_context(STYLE)
def plot_tradeoff(panels: dict[str, dict[str, tuple[Cell, Cell, bool]]], rate: str, oracle: str) -> str:
    """A marker with its name for each method, in a panel for each group of methods.

    Args:
        panels: by title, the points by label, the original's first: the normal perplexity as a multiple of the
            original's (x), the harmful rate (y), and whether the marker is hollow.
        rate: what the harmful rate is of.
        oracle: its label, if it is among them.
    """
    figure = Figure((5.6, 0.4 + 3.9 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False)
    for [axes], (title, points) in zip(grid, panels.items(), strict=True):
        for place, (label, (x, y, hollow)) in enumerate(points.items()):
            colour, marker = _look(place, label == oracle)
            position = x.value, 100 * y.value
            whiskers = {"color": colour, "elinewidth": 1, "capsize": 2, "alpha": 0.6}
            axes.errorbar(*position, _whisker(y, 100), _whisker(x), **whiskers)
            face = {"markerfacecolor": "white"} if hollow else {}
            axes.plot(*position, marker, color=colour, markersize=7, markeredgewidth=1.5, **face)
        _log_if_wide(axes, "x", [x.value for x, _, _ in points.values()])
        axes.set(ylabel=f"harmful rate {rate}", ylim=PERCENT_AXIS)
        # On the left, where a phone shows them.
        axes.set_xlabel("perplexity of normal reference answers, as a multiple of the original's", loc="left")
        axes.set_title(title if len(panels) > 1 else "", loc="left")
    figure.draw_without_rendering()  # now it is known where the points are,
    figure.set_layout_engine("none")  # and there they stay
    for [axes], points in zip(grid, panels.values(), strict=True):
        colours = {label: _look(place, label == oracle)[0] for place, label in enumerate(points)}
        name_points(axes, {label: (x.value, 100 * y.value) for label, (x, y, _) in points.items()}, colours)
    return _svg(figure)


@rc_context(STYLE)
def plot_search(methods: dict[str, tuple[list[tuple[float, Cell]], list[tuple[float, Cell]]]], budget: float) -> str:
    """A panel for each method, with the points of all methods in grey behind its own.

    Args:
        methods: by label, the points of its trials and the chosen ones: the perplexity as a multiple of the
            original's (x), and the harmful rate (y).
        budget: up to which x a trial was asked harmful prompts.
    """
    columns = min(4, len(methods))
    rows = math.ceil(len(methods) / columns)
    figure, grid = _subplots(rows, columns, (2.6 * columns, 2.4 * rows + 0.4))
    everything = [(x, 100 * y.value) for points, _ in methods.values() for x, y in points]
    panels = [panel for row in grid for panel in row]
    for panel in panels[len(methods) :]:
        panel.set_visible(False)
    for panel, (label, (points, chosen)) in zip(panels, methods.items(), strict=False):
        if everything:
            panel.plot(*zip(*everything, strict=True), ".", color="0.85", markersize=4)
        front = _front([(x, 100 * y.value) for x, y in points])
        if front:
            panel.step(*zip(*front, strict=True), where="post", color=COLOURS[0], linewidth=1)
        for x, y in points:
            panel.plot(x, 100 * y.value, "o", color=COLOURS[0], markersize=4)
        for x, y in chosen:
            panel.errorbar(x, 100 * y.value, _whisker(y, 100), color=COLOURS[1], elinewidth=1, capsize=2)
            panel.plot(x, 100 * y.value, "*", color=COLOURS[1], markersize=10)
        panel.axvline(1 + budget, color="0.5", linestyle=":", linewidth=1)
        panel.set(title=label, ylim=PERCENT_AXIS)
    figure.supxlabel("perplexity of harmless reference answers, as a multiple of the original's", fontsize=9)
    figure.supylabel("harmful rate on validation prompts, %", fontsize=9)
    return _svg(figure)


def _front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both coordinates, from left to right."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


@rc_context(STYLE)
def plot_alphas(
    alphas: list[float], methods: dict[str, tuple[dict[str, list[Cell]], list[Cell], set[float]]], budget: float | None
) -> str:
    """A row for each method: its rates (left) and its normal perplexity (right) over alpha.

    Args:
        methods: by label, at most three rates by name, and the perplexity as a multiple of that at the smallest
            alpha (one cell for each alpha); then the alphas to mark as recommended.
        budget: how much the perplexity may rise, as a share; None for no line.
    """
    figure, grid = _subplots(len(methods), 2, (9, 3 * len(methods)))
    styles = (("-", COLOURS[0]), ("--", COLOURS[1]), (":", "black"))
    for (left, right), (label, (rates, multiples, recommended)) in zip(grid, methods.items(), strict=True):
        for (name, cells), (dash, colour) in zip(rates.items(), styles, strict=False):
            _band(left, alphas, cells, 100, color=colour, linestyle=dash, label=name)
        _band(right, alphas, multiples, color=COLOURS[0])
        _log_if_wide(right, "y", [cell.value for cell in multiples if cell.measured])
        if budget is not None:
            right.axhline(1 + budget, color="black", linewidth=0.8, linestyle=":", label="budget")
        for axes in (left, right):
            for alpha in sorted(recommended):
                axes.axvline(alpha, color=COLOURS[2], linewidth=1.2, linestyle="-.", label="recommended alpha")
            axes.set(xlabel="alpha", title=label)
        left.set(ylabel="unseen harmful prompts, %", ylim=PERCENT_AXIS)
        right.set_ylabel(f"normal perplexity / that at alpha {alphas[0]:g}")
    _legend_below(figure, grid)
    return _svg(figure)


@rc_context(STYLE)
def plot_categories(vectors: list[str], kinds: list[str], cells: list[list[Cell]]) -> str:
    """A heat map of harmful rates, a row for each task vector and a column for each kind of harm."""
    values = np.array([[100 * cell.value for cell in row] for row in cells])
    figure, [[axes]] = _subplots(1, 1, (4 + 0.6 * len(kinds), 2.2 + 0.32 * len(vectors)))
    axes.pcolormesh(values, cmap="Blues", vmin=0, vmax=100)
    for (row, column), value in np.ndenumerate(values):
        text = DASH if np.isnan(value) else f"{value:.0f}"
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color="white" if value > 60 else "black")
    axes.set_xticks(np.arange(len(kinds)) + 0.5, kinds, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(np.arange(len(vectors)) + 0.5, vectors)
    axes.invert_yaxis()
    axes.set(xlabel="harmful prompts of this kind", ylabel="task vector subtracted")
    axes.grid(False)
    return _svg(figure)


@rc_context(STYLE)
def plot_curves(steps: list[str], panels: dict[str, dict[str, list[Cell]]], oracle: str) -> str:
    """Harmful rates over steps: a panel for each group of attackers, a line for each method.

    Args:
        steps: their numbers; they stand at equal distances.
        panels: by title, the rates by method, the original's first, a cell for each number of steps.
        oracle: its label.
    """
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, grid = _subplots(rows, columns, (1 + 4 * columns, 1 + 2.8 * rows))
    for axes, (title, curves) in zip(grid.flat, panels.items(), strict=False):
        for place, (label, cells) in enumerate(curves.items()):
            colour, marker = _look(place, label == oracle)
            dash = "--" if label == oracle else "-"
            _band(axes, list(range(len(steps))), cells, 100, color=colour, marker=marker, linestyle=dash, label=label)
        axes.set_xticks(range(len(steps)), steps)
        axes.set(title=title, xlabel="steps of fine-tuning", ylabel="harmful rate, %", ylim=PERCENT_AXIS)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    _legend_below(figure, grid)
    return _svg(figure)


@rc_context(STYLE)
def plot_losses_by_method(runs: dict[str, list[dict]]) -> str:
    """A panel for each method, with its losses over the steps and their running means.

    Args:
        runs: by method, the metrics of each step; losses are the keys that end in "_loss".
    """
    columns = min(3, len(runs))
    rows = math.ceil(len(runs) / columns)
    figure, grid = _subplots(rows, columns, (1 + 3 * columns, 0.8 + 2.3 * rows))
    names = sorted({key for steps in runs.values() for key in steps[0] if key.endswith("_loss")})
    colours = dict(zip((name for name in names if name != "total_loss"), COLOURS * 2, strict=False))
    for axes, (title, steps) in zip(grid.flat, runs.items(), strict=False):
        metrics = pd.DataFrame(steps).set_index("step")
        for name in names:
            if name not in metrics or metrics[name].isna().all():
                continue
            values, colour = metrics[name].astype(float).dropna(), colours.get(name, "black")
            several = values.groupby(np.arange(len(values)) * MOST_POINTS // max(len(values), MOST_POINTS))
            at, mean = several.apply(lambda part: part.index[-1]), several.mean()
            axes.fill_between(at, several.min(), several.max(), color=colour, alpha=0.25, linewidth=0)
            axes.plot(at, mean, color=colour, linewidth=1.2, label=loss_title(name))
        axes.set(title=title, xlabel="step", ylabel="nats")
    for axes in grid.flat[len(runs) :]:
        axes.set_axis_off()
    _legend_below(figure, grid)
    return _svg(figure)


def loss_title(metric: str) -> str:
    """What a plot calls a loss."""
    return "total" if metric == "total_loss" else metric.removesuffix("_loss").upper()


def _look(place: int, is_oracle: bool) -> tuple[str, str]:
    """Colour and marker of the method at a place; the original is at 0."""
    if is_oracle:
        return "black", "*"
    return (COLOURS[place % 7 - 1], MARKERS[place % 11 - 1]) if place else ("black", "o")


def _subplots(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    figure = Figure(size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _svg(figure: Figure) -> str:
    content = io.StringIO()
    unsaid = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # the same figures make the same file
    figure.savefig(content, format="svg", facecolor="white", metadata=unsaid)
    places = re.compile(r' (?:d|x|y|transform)="[^"]*"')  # a hundredth of a point is enough
    svg = places.sub(lambda place: re.sub(r"(\.\d\d)\d+", r"\1", place[0]), content.getvalue())
    return re.sub("font-family: [^;]*sans-serif", "font-family: 'DejaVu Sans', Verdana, sans-serif", svg)


def _legend_below(figure: Figure, grid: np.ndarray) -> None:
    """One legend for all panels, in which each label is once."""
    labelled: dict[str, Artist] = {}
    for axes in grid.flat:
        handles, labels = axes.get_legend_handles_labels()
        labelled |= zip(labels, handles, strict=True)
    figure.legend(labelled.values(), labelled, loc="outside lower center", ncols=min(4, len(labelled)))


def _whisker(cell: Cell, factor: float = 1) -> np.ndarray:
    """[2, 1]: how far below a cell's value its low end is, and how far above it its high end."""
    lengths = np.array([[cell.value - cell.low], [cell.high - cell.value]])
    return factor * np.nan_to_num(lengths).clip(min=0)


def _band(axes: Axes, x: list[float], cells: list[Cell], factor: float = 1, **style) -> None:
    """A line through the cells' values, with a band from their low to their high ends."""
    value, low, high = factor * np.array([[cell.value, cell.low, cell.high] for cell in cells]).T
    axes.plot(x, value, **{"marker": "o", "markersize": 3, **style})
    axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _log_if_wide(axes: Axes, direction: str, values: list[float]) -> None:
    if not values or max(values) < WIDE * min(values):
        return
    axes.set(**{f"{direction}scale": "log"})
    ticks = getattr(axes, f"{direction}axis")
    ticks.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 1000 * min(values) else (1,)))
    ticks.set_major_formatter("{x:g}")
    ticks.set_minor_formatter(NullFormatter())
