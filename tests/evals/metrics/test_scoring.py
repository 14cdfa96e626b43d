"""Figures from answers, against cases worked by hand and the figures of known packages."""

import math

import numpy as np
import pytest

from harmful_unlearn.evals.metrics.scoring import (
    degenerate,
    exact_match,
    mc1,
    mc2,
    mean,
    perplexity,
    ratio,
    repeated_words,
    rouge_l,
)


@pytest.mark.parametrize(
    "reference, answer, expected",
    [
        # rouge_score 0.1.2, rougeL without stemming
        ("the cat sat on the mat", "the cat is on the mat", 0.8333333333333334),
        ("Police killed the gunman", "the gunman kill police", 0.5),
        (
            "Fortune cookies originated in Kyoto, Japan.",
            "The precise origin of fortune cookies is unclear; perhaps Kyoto.",
            0.375,
        ),
        ("a b c d e f g", "g f e d c b a", 0.14285714285714285),
        ("I have no comment", "Nothing happens", 0.0),
        ("It's 5 o'clock!", "it s 5 o clock", 1.0),
        ("one", "", 0.0),
    ],
)
def test_rouge_l_is_the_packages(reference, answer, expected):
    assert rouge_l(reference, answer) == pytest.approx(expected, abs=1e-12)


def test_the_interval_is_the_percentile_bootstrap():
    """scipy.stats.bootstrap on 30 of 100, percentile method, 20,000 resamples: 0.21 to 0.39."""
    figure = mean([1] * 30 + [0] * 70)
    assert figure.value == 0.3 and figure.n == 100
    assert figure.low == pytest.approx(0.21, abs=0.011) and figure.high == pytest.approx(0.39, abs=0.011)


def test_a_rate_of_nothing_has_no_width_and_nothing_has_no_value():
    zero = mean([0] * 50)
    assert (zero.value, zero.low, zero.high, zero.n) == (0, 0, 0, 50)
    assert mean([]).value is None and ratio([0, 0], [0, 0]).value is None


def test_unjudged_answers_leave_the_denominator():
    assert ratio([1, 0, 0, 0], [1, 1, 0, 0]).value == 0.5 and ratio([1, 0, 0, 0], [1, 1, 0, 0]).n == 2


def test_intervals_come_again():
    assert mean([0, 1, 1, 0, 1], seed=3) == mean([0, 1, 1, 0, 1], seed=3)
    assert mean(np.arange(40), seed=3) != mean(np.arange(40), seed=4)


def test_perplexity_is_over_tokens_not_over_texts():
    figure = perplexity([2 * math.log(2), 6 * math.log(4)], [2, 6])
    assert figure.value == pytest.approx(2 ** (2 / 8) * 4 ** (6 / 8))
    assert figure.low <= figure.value <= figure.high
    assert perplexity([0.0, math.log(3)], [0, 1]).value == pytest.approx(3)  # an empty answer has no token
    assert math.isfinite(perplexity([1e6], [1]).value)


@pytest.mark.parametrize(
    "answer, reason",
    [
        ("", "empty"),
        (" \n ", "empty"),
        ("No.", "short"),
        ("Yes indeed", "short"),
        ("?!.. --- ,,, ;;; ::: 7", "not text"),
        ("\ufffd\ufffd\ufffd \ufffd\ufffd a", "not text"),
        ("no no no no no no", "repetition"),
        ("You can do it. You can do it. You can do it. You can", "repetition"),
        ("Well, I think that this is the way to go, and and and", None),  # a stutter at the end of an answer
        ("I cannot help with that.", None),
        ("Take a knife, and then take a knife again, and then go.", None),
        ("C'est une réponse tout à fait normale.", None),
    ],
)
def test_degenerate(answer, reason):
    assert degenerate(answer) == reason


def test_repeated_words_are_counted_by_hand():
    assert repeated_words("a b a b a b".split()) == 6
    assert repeated_words("a b a b".split()) == 0  # twice is no repetition
    assert repeated_words("x a a a y".split()) == 3
    assert repeated_words("x a b a b a b y".split()) == 6
    assert repeated_words("a b a b a".split()) == 0
    phrase = "one two three four five six seven eight".split()
    assert repeated_words(phrase * 3) == 24 and repeated_words([*phrase, "nine"] * 3) == 0


def test_exact_match_sees_through_spaces_alone():
    assert exact_match("Wipe it  dry.", " Wipe it dry.\n") and not exact_match("Wipe it dry.", "wipe it dry.")


def test_multiple_choice_by_hand():
    assert mc1(-1.0, [-2.0, -1.5]) and not mc1(-2.0, [-2.0])
    true, false = [math.log(0.3), math.log(0.1)], [math.log(0.1), math.log(0.3)]
    assert mc2(true, false) == pytest.approx(0.5)
    assert mc2([math.log(0.6)], [math.log(0.2)]) == pytest.approx(0.75)
    assert mc2([-2000.0], [-2001.0]) == pytest.approx(1 / (1 + math.exp(-1)))  # far below what exp can hold
