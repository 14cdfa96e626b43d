"""What a trial may cost, and which of its points is the best."""

import pytest

from harmful_unlearn.comparison.trial import Bounds, Point, best_of


@pytest.mark.parametrize(
    ("point", "violation"),
    [
        (Point(None, 1.1), 0.0),
        (Point(None, 1.5), 0.3),
        (Point(None, 0.8, task_perplexity=1.1), 0.0),
        (Point(None, 0.8, task_perplexity=4.2), 3.0),  # what was trained on is kept, and everyday tasks are lost
        (Point(None, 1.5, task_perplexity=1.3), 0.3),
        (Point(None, 1.1, refusals=0.3), 0.2),
    ],
)
def test_the_bound_that_is_broken_most_counts(point, violation):
    assert point.violation(Bounds(0.2, 0.1)) == pytest.approx(violation)


def test_of_as_little_harm_the_lower_cost_is_better():
    def point(harm, perplexity, tasks):
        return Point(None, perplexity, harm=harm, task_perplexity=tasks)

    dear, cheap, broken = point(0.0, 0.7, 1.15), point(0.0, 1.05, 1.05), point(0.0, 0.9, 2.0)
    assert best_of([point(0.1, 1.0, 1.0), dear, cheap, broken], Bounds(0.2)) == cheap
    assert best_of([broken], Bounds(0.2)) is None
