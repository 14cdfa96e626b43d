"""Names beside the points of a plot, where they cover nothing."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

NEAR = 14  # up to here a name needs no line to its marker, points
SIZE = 8.5
MARKER, MARGIN = 6, 1.5  # half of a marker's width, and what is free around a name, points
TURNS = np.linspace(0, 2 * np.pi, 24, endpoint=False)
# The places to try: how far from the marker a name begins, [places], and in which direction, [places, x and y].
FAR = np.repeat(np.arange(10, 130, 5), len(TURNS))
TOWARDS = np.tile(np.stack([np.cos(TURNS), np.sin(TURNS)], axis=-1), (len(FAR) // len(TURNS), 1))


def name_points(axes: Axes, points: dict[str, tuple[float, float]], colours: dict[str, str]) -> None:
    """Write a name beside each point: the nearest place where it covers no other name, marker, whisker or line.

    Args:
        axes: drawn, so that its size and limits are final.
        points: the coordinates by name.
        colours: of the markers by name; the names have darker ones.
    """
    scale = axes.figure.dpi / 72  # pixels in a point
    renderer = FigureCanvasAgg(axes.figure).get_renderer()
    frame = np.array(axes.bbox.extents) / scale
    markers = axes.transData.transform([*points.values()]) / scale
    boxes = np.hstack([markers - MARKER, markers + MARKER])  # what is taken: left, bottom, right, top
    paths = [path.vertices for drawn in axes.collections for path in drawn.get_paths()]  # [start and end, x and y]
    whiskers = [axes.transData.transform(ends) / scale for ends in paths]
    lines = np.concatenate([np.empty((0, 2)), *(np.linspace(start, end, 40) for start, end in whiskers)])
    for (name, point), marker in zip(points.items(), markers, strict=True):
        colour = tuple(0.6 * np.array(to_rgb(colours[name])))
        text = axes.annotate(name, point, (0, 0), textcoords="offset points", fontsize=SIZE, color=colour)
        text.set_in_layout(False)
        size = np.array(text.get_window_extent(renderer).size) / scale
        starts = marker + FAR[:, None] * TOWARDS
        corners = starts - size * (1 - TOWARDS) / 2  # lower left
        places = np.hstack([corners - MARGIN, corners + size + MARGIN])
        leaders = np.linspace(marker + MARKER * TOWARDS, starts, 12)  # [points of a line, places, x and y]
        outside = np.clip(frame[:2] - places[:, :2], 0, None) + np.clip(places[:, 2:] - frame[2:], 0, None)
        crossed = np.stack([_within(leaders, box[None]) for box in boxes]).sum((0, 1)) * (FAR > NEAR)
        covered = _within(lines[:, None], places).sum(0)
        cost = FAR + 30 * outside.sum(1) + 3 * _overlaps(places, boxes) + 8 * covered + 10 * crossed
        best = int(np.argmin(cost))
        text.set_position(tuple(corners[best] - marker))
        boxes = np.vstack([boxes, places[best]])
        if FAR[best] > NEAR:
            look = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0}
            end = tuple(starts[best] - marker)
            axes.annotate("", point, end, textcoords="offset points", arrowprops=look).set_in_layout(False)
            lines = np.concatenate([lines, np.repeat(leaders[:, best], 2, axis=0)])  # worse than on a whisker


def _overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[boxes]: the area that each has in common with others."""
    low, high = np.maximum(boxes[:, None, :2], others[:, :2]), np.minimum(boxes[:, None, 2:], others[:, 2:])
    return np.clip(high - low, 0, None).prod(-1).sum(1)


def _within(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """[points, boxes]: which points, [points, 1 or boxes, 2], are in which boxes."""
    return np.all((points > boxes[:, :2]) & (points < boxes[:, 2:]), axis=-1)
