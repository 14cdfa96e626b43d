"""The plots' titles of losses."""

from harmful_unlearn.losses.terms import LOSSES
from harmful_unlearn.reporting.plots import COLOURS, MARKERS, loss_title, plot_losses_by_method


def test_every_loss_has_a_title():
    assert [loss_title(name) for name in ("gd_loss", "sa_loss", "total_loss")] == ["GD", "SA", "total"]


def test_runs_with_any_losses_are_drawn():
    """Also of methods with other losses, one without a value, and of a single step."""
    steps = [{"step": n, **{f"{name}_loss": 1.0 * n for name in LOSSES}, "total_loss": 2.0} for n in (1, 2, 3)]
    runs = {"all": steps, '<one> & "two"': [{"step": 1, "ft_loss": 1.0, "gd_loss": None, "total_loss": 1.0}]}
    svg = plot_losses_by_method(runs)
    assert all(f">{loss_title(name)}<" in svg for name in steps[0] if name.endswith("_loss"))
    assert '&lt;one&gt; &amp; "two"' in svg
    assert svg == plot_losses_by_method(runs)  # the same figures make the same file


def test_pairs_of_colour_and_marker_do_not_soon_come_again():
    pairs = {(COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]) for place in range(77)}
    assert len(pairs) == 77
