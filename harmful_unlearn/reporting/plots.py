"""The pictures of the comparison's report, one function each."""

import math

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from harmful_unlearn.reporting.blocks import DASH, Cell
from harmful_unlearn.training.run_log import LOSSES

# Okabe and Ito's colours, told apart by the colour-blind; markers have another period, so pairs do not recur.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
MARKERS = "s^DvPX<>*ph"
WIDE = 5  # a range of this factor or more has a logarithmic axis
STYLE = {
    "font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "text.parse_math": False, "legend.frameon": False,
}  # fmt: skip
PERCENT_AXIS = (-4, 104)


def draw_tradeoff(points: dict[str, tuple[Cell, Cell, bool]], decoding: str) -> Figure:
    """Each method's normal perplexity (x), harmful rate (y), and whether it is hollow; the original first."""
    figure, [[panel]] = panels(1, 1, (8.5, 4.8))
    handles = []
    for place, (label, (x, y, hollow)) in enumerate(points.items()):
        colour, marker = ("black", "o") if not place else (COLOURS[place % 7 - 1], MARKERS[place % 11 - 1])
        at = x.value, 100 * y.value
        panel.errorbar(*at, whisker(y, 100), whisker(x), color=colour, elinewidth=1, capsize=2)
        handles += panel.plot(
            *at,
            linestyle="none",
            marker=marker,
            color=colour,
            markersize=7,
            markeredgewidth=1.5,
            markerfacecolor="white" if hollow else colour,
            label=label + " (hollow: degenerate)" * hollow,
        )
    log_if_wide(panel, "x", [x.value for x, _, _ in points.values()])
    panel.set(
        xlabel="perplexity of normal reference answers, as a multiple of the original's",
        ylabel=f"harmful rate on unseen prompts, % ({decoding})",
        ylim=PERCENT_AXIS,
    )
    figure.legend(handles=handles, loc="outside right upper")
    return figure


def draw_alphas(
    scales: list[float],
    rates: dict[str, dict[str, list[Cell]]],
    multiples: dict[str, list[Cell]],
    advised: dict[str, set[float]],
    budget: float | None,
) -> Figure:
    """A row a method: its rates by name (left) and its multiples of the perplexity (right) at each scale."""
    figure, grid = panels(len(rates), 2, (9, 3 * len(rates)))
    for (left, right), method in zip(grid, rates, strict=True):
        looks = (("-", COLOURS[0]), ("--", COLOURS[1]), (":", "black"))
        for (name, cells), (dash, colour) in zip(rates[method].items(), looks, strict=False):
            band(left, scales, cells, 100, color=colour, linestyle=dash, label=name)
        band(right, scales, multiples[method], color=COLOURS[0])
        log_if_wide(right, "y", [cell.value for cell in multiples[method] if cell.value])
        if budget is not None:
            right.axhline(1 + budget, color="black", linewidth=0.8, linestyle=":", label="budget")
        for panel in (left, right):
            for alpha in sorted(advised.get(method, ())):
                panel.axvline(alpha, color=COLOURS[2], linewidth=1.2, linestyle="-.", label="recommended alpha")
            panel.set(xlabel="alpha", title=method)
        left.set(ylabel="unseen harmful prompts, %", ylim=PERCENT_AXIS)
        right.set_ylabel(f"normal perplexity / that at alpha {scales[0]:g}")
    legend_below(figure, grid)
    return figure


def draw_categories(vectors: list[str], kinds: list[str], cells: list[list[Cell]]) -> Figure:
    """A heat map of harmful rates, with the numbers in it."""
    values = np.array([[np.nan if cell.value is None else 100 * cell.value for cell in row] for row in cells])
    figure, [[panel]] = panels(1, 1, (4 + 0.6 * len(kinds), 2.2 + 0.32 * len(vectors)))
    image = panel.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        text = DASH if np.isnan(value) else f"{value:.0f}"
        panel.text(column, row, text, ha="center", va="center", color="white" if value > 60 else "black")
    panel.set_xticks(range(len(kinds)), kinds, rotation=35, ha="right", rotation_mode="anchor")
    panel.set_yticks(range(len(vectors)), vectors)
    panel.set(xlabel="harmful prompts of this kind", ylabel="task vector subtracted")
    panel.grid(False)
    figure.colorbar(image, label="harmful rate, %")
    return figure


def draw_relearning(methods: list[str], times: list[str], cells: list[list[Cell]], decoding: str) -> Figure:
    """A line a method, with its harmful rate at each time."""
    figure, [[panel]] = panels(1, 1, (8, 1.6 + 0.34 * len(methods)))
    for at, (time, shift) in enumerate(zip(times, np.linspace(-0.22, 0.22, len(times)), strict=True)):
        drawn = [(row + shift, line[at]) for row, line in enumerate(cells) if line[at].value is not None]
        panel.errorbar(
            [100 * cell.value for _, cell in drawn],
            [row for row, _ in drawn],
            xerr=np.hstack([np.zeros((2, 0)), *(whisker(cell, 100) for _, cell in drawn)]),
            capsize=2,
            elinewidth=1,
            linestyle="none",
            color=COLOURS[at % 7],
            marker=MARKERS[at % 11],
            label=time,
        )
    panel.set_yticks(range(len(methods)), methods)
    panel.set(xlabel=f"harmful rate on unseen prompts, % ({decoding})", xlim=PERCENT_AXIS)
    panel.invert_yaxis()
    figure.legend(loc="outside right upper")
    return figure


def draw_losses(runs: dict[str, list[dict]]) -> Figure:
    """A panel a method, with its losses over the steps and their running means."""
    columns = min(3, len(runs))
    rows = math.ceil(len(runs) / columns)
    figure, grid = panels(rows, columns, (1 + 3 * columns, 0.8 + 2.3 * rows))
    for panel, (title, steps) in zip(grid.flat, runs.items(), strict=False):
        for at, (key, name) in enumerate(LOSSES.items()):
            colour = "black" if key == "total_loss" else COLOURS[at % 7]  # no method has two of one colour
            kept = pd.Series({step["step"]: step[key] for step in steps if step.get(key) is not None}, dtype=float)
            if len(kept):
                panel.plot(kept, color=colour, linewidth=0.5, alpha=0.3)
                smooth = kept.rolling(max(1, len(kept) // 25), min_periods=1).mean()
                panel.plot(smooth, color=colour, linewidth=1.2, label=name)
        panel.set(title=title, xlabel="step", ylabel="nats")
    for panel in grid.flat[len(runs) :]:
        panel.set_axis_off()
    legend_below(figure, grid)
    return figure


def panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    figure = Figure(size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def legend_below(figure: Figure, grid: np.ndarray) -> None:
    labelled = {t: h for panel in grid.flat for h, t in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(labelled.values(), labelled, loc="outside lower center", ncols=len(labelled))


def whisker(cell: Cell, scale: float = 1) -> np.ndarray:
    """[2, 1]: how far a cell's value lies above its low and below its high end."""
    low, high = (cell.value if end is None else end for end in (cell.low, cell.high))
    return scale * np.array([[max(0.0, cell.value - low)], [max(0.0, high - cell.value)]])


def band(panel, x: list[float], cells: list[Cell], scale: float = 1, **look) -> None:
    """A line through the values with a band from low to high."""
    value, low, high = scale * np.array([[cell.value, cell.low, cell.high] for cell in cells], float).T
    panel.plot(x, value, marker="o", markersize=3, **look)
    panel.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)


def log_if_wide(panel, axis: str, values: list[float]) -> None:
    if not values or max(values) < WIDE * min(values):
        return
    panel.set(**{f"{axis}scale": "log"})
    ticks = getattr(panel, f"{axis}axis")
    ticks.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 1000 * min(values) else (1,)))
    ticks.set_major_formatter("{x:g}")
    ticks.set_minor_formatter(NullFormatter())
