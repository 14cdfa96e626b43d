"""Numbers as flags take them, for argparse."""

import argparse
import math


def number(text: str) -> float:
    """A finite number, as argparse reads it."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not finite")
    return value


def positive_number(text: str) -> float:
    """A number above 0."""
    if number(text) <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number(text)


def not_negative(text: str) -> float:
    """A number from 0."""
    if number(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number(text)


def whole_number(text: str) -> int:
    """A whole number from 0."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return int(text)


def positive_int(text: str) -> int:
    """A whole number from 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return int(text)
