"""Types of flags: each turns a text into a value, or says what to give."""

import argparse
import math
import re
from collections.abc import Callable
from typing import Any

LEAST_TEMPERATURE = 0.01  # sampling is as good as greedy there; far below it, numbers overflow
LARGEST = 2**32 - 1  # NumPy's largest seed; the other whole numbers that flags take are far below it
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def _number_type(kind: type, is_valid: Callable[[float], bool], expected: str) -> Callable[[str], Any]:
    """A `type` of flags that are numbers. It raises ArgumentTypeError for any other text."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not is_valid(value):
            raise argparse.ArgumentTypeError(f"give {expected}, not {text!r}")
        return value

    return parse


number = _number_type(float, math.isfinite, "a finite number")
positive_number = _number_type(float, lambda value: 0 < value < math.inf, "a number above 0")
sampling_temperature = _number_type(
    float, lambda value: LEAST_TEMPERATURE <= value < math.inf, f"a number from {LEAST_TEMPERATURE}"
)
not_negative = _number_type(float, lambda value: 0 <= value < math.inf, "a number from 0")
share = _number_type(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
whole_number = _number_type(int, lambda value: 0 <= value <= LARGEST, f"a whole number from 0 to {LARGEST}")
layer_or_share = _number_type(
    float, lambda value: 0 < value < 1 or (value.is_integer() and 1 <= value <= LARGEST), "a layer from 1, or a share"
)
positive_int = _number_type(int, lambda value: 1 <= value <= LARGEST, f"a whole number from 1 to {LARGEST}")


def device_map(text: str) -> str:
    """One of accelerate's ways to spread a model over devices (DEVICE_MAPS), or a device."""
    if text not in DEVICE_MAPS and not re.fullmatch(r"(cpu|disk|mps|(cuda|xpu|npu)(:\d+)?)", text):
        raise argparse.ArgumentTypeError(f"give one of {', '.join(DEVICE_MAPS)}, or a device, not {text!r}")
    if text.startswith("cuda"):
        import torch  # here, since it takes seconds that no other flag needs

        if torch.cuda.device_count() <= int(text.partition(":")[2] or 0):
            raise argparse.ArgumentTypeError(f"this machine has no {text}: give auto or cpu")
    return text
