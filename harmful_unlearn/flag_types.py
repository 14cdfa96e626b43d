"""How every command reads its flags: numbers, devices, and one line about what is wrong."""

import argparse
import difflib
import math
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from harmful_unlearn.errors import one_line

LARGEST = 2**32 - 1  # NumPy takes no larger seed
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, like all others here, and name a flag that was nearly given.

    Flags are written out, and a negative number may have an exponent (-1e-3).
    """

    def __init__(self, **settings):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)")  # argparse's own takes -1e-3 for a flag

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        words = sys.argv[1:] if args is None else args
        for word in words:
            if not word.isprintable() and ("\0" in word or not _is_utf8(word)):
                self.error(f"{word!r} holds a NUL byte, or something else than UTF-8: give another name")
        # Before all else: a flag that is required and misspelt would be called missing.
        for word in words[: words.index("--") if "--" in words else None]:
            name = word.partition("=")[0]
            is_flag = name.startswith("-") and " " not in name and not self._negative_number_matcher.match(name)
            if is_flag and len(name) > 1 and name not in self._option_string_actions:
                self.error(f"there is no flag {name}{self._nearly(name)}")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """End with exit code 2 and one line in place of the usage."""
        message = one_line(message).removeprefix("argument ")
        self.exit(2, f"error: {message} (--help tells of all flags)\n")

    def _nearly(self, name: str) -> str:
        known = [flag for flag in self._option_string_actions if flag.startswith("--")]
        name = "--" + name.lstrip("-").replace("-", "_")
        near = [flag for flag in known if flag.startswith(name)] or difflib.get_close_matches(name, known, 1)
        return f": did you mean {' or '.join(near)}?" if near else ""


def _is_utf8(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:  # bytes that Python keeps as half a surrogate pair
        return False
    return True


def _read(text: str, kind: type, fits: Callable[[float], bool], what: str) -> float:
    try:
        if fits(value := kind(text)):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"give {what}, not {text!r}")

LARGEST = 2**32 - 1  # NumPy's largest seed; the other whole numbers that flags take stay far below it


def number(text: str) -> float:
    """A finite number, as argparse reads it."""
    return _read(text, float, math.isfinite, "a finite number")


def positive_number(text: str) -> float:
    """A number above 0."""
    return _read(text, float, lambda value: 0 < value < math.inf, "a number above 0")


def not_negative(text: str) -> float:
    """A number from 0."""
    return _read(text, float, lambda value: 0 <= value < math.inf, "a number from 0")


def share(text: str) -> float:
    """A number from 0 to 1."""
    return _read(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def whole_number(text: str) -> int:
    """A whole number from 0."""
    return _read(text, int, lambda value: 0 <= value <= LARGEST, f"a whole number from 0 to {LARGEST}")


def positive_int(text: str) -> int:
    """A whole number from 1."""
    return _read(text, int, lambda value: 1 <= value <= LARGEST, f"a whole number from 1 to {LARGEST}")


def device_map(text: str) -> str:
    """How accelerate spreads a model over devices, or one device."""
    if text not in DEVICE_MAPS and not re.fullmatch(r"(cpu|disk|mps|(cuda|xpu|npu)(:\d+)?)", text):
        raise argparse.ArgumentTypeError(f"give one of {', '.join(DEVICE_MAPS)}, or a device, not {text!r}")
    if text.startswith("cuda"):
        import torch  # seconds that no other flag needs

        if torch.cuda.device_count() <= int(text.partition(":")[2] or 0):
            raise argparse.ArgumentTypeError(f"there is no {text} here: give auto or cpu")
    return text
