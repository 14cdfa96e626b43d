"""Names beside points: none covers another one, and each is near its point."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from harmful_unlearn.reporting.labels import name_points


@pytest.mark.parametrize("spread", [0.5, 0.02])
def test_names_cover_no_other_name_or_marker(spread):
    points = {f"a long name {n}": (1 + spread * np.cos(n), 50 + 40 * spread * np.sin(n)) for n in range(8)}
    figure = Figure((8, 4))
    axes = figure.subplots()
    axes.plot(*zip(*points.values(), strict=True), "o", markersize=7)
    axes.set(xlim=(0, 3), ylim=(0, 100))
    figure.draw_without_rendering()
    name_points(axes, points, dict.fromkeys(points, "red"))
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert [text.get_text() for text in axes.texts if text.get_text()] == list(points)
    assert not any(box.overlaps(other) for place, box in enumerate(boxes) for other in boxes[:place])
    markers = axes.transData.transform([*points.values()])
    assert not any(box.contains(*marker) for box in boxes for marker in markers)
    assert all(axes.bbox.padded(2).contains(*corner) for box in boxes for corner in (box.min, box.max))
    if spread == 0.5:  # there is space enough, so that no name needs a line
        assert len(axes.texts) == len(points)
