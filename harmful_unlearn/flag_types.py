"""Numbers as flags take them, for argparse."""

import argparse
import math

LARGEST = 2**32 - 1  # NumPy's largest seed; the other whole numbers that flags take stay far below it


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
    """A whole number from 0 to LARGEST."""
    return _between(text, 0)


def positive_int(text: str) -> int:
    """A whole number from 1 to LARGEST."""
    return _between(text, 1)


def _between(text: str, least: int) -> int:
    if not least <= int(text) <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text} is not from {least} to {LARGEST}")
    return int(text)
