"""What all commands share: the parser, the types of flags, exit codes, and signals."""

import argparse
import difflib
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from harmful_unlearn.errors import MENDABLE, OUT_OF_MEMORY, Stopped, UserError, is_out_of_memory

NOTHING_HALF_WRITTEN = "no folder was left half-written"


def exit_code(main: Callable[[], None]) -> int:
    """Run a command and turn its end into an exit code, without a traceback for what users can mend.

    Returns:
        0 when `main` returns, 2 for what the user can mend (`UserError`, no memory, a full disk, no permission),
        130 after Ctrl-C, 143 after SIGTERM. Anything else is a bug and keeps its traceback.
    """
    process = int(os.environ.get("RANK", 0))
    try:
        with _handled(_terminate, signal.SIGTERM):
            main()
        return 0
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt:
        print(f"\ninterrupted: {NOTHING_HALF_WRITTEN}", file=sys.stderr)
        return 128 + signal.SIGINT
    except Stopped as stop:
        if process == 0:
            print(f"\n{stop}", file=sys.stderr)
        return 128 + stop.number
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        message = f"{error.filename2 or error.filename or 'a file'}: {MENDABLE[error.errno]}"
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message = OUT_OF_MEMORY
    print(f"error{f' (process {process})' * (process > 0)}: {one_line(message)}", file=sys.stderr)
    return 2


def _terminate(number: int, _frame) -> None:
    raise Stopped(number, f"terminated: {NOTHING_HALF_WRITTEN}")


@contextmanager
def _handled(handler: Callable[[int, object], None], *signals: int) -> Iterator[None]:
    """Within the block signals go to `handler`, if this is the thread that gets them."""
    mine = threading.current_thread() is threading.main_thread()
    usual = {number: signal.signal(number, handler) for number in signals if mine}
    try:
        yield
    finally:
        for number, before in usual.items():
            signal.signal(number, before)


@contextmanager
def stop_asked() -> Iterator[Callable[[], int]]:
    """Within the block a first Ctrl-C or SIGTERM is only noted, for work to come to a good end; a second one stops it.

    Yields:
        The number of the signal that came, 0 before. Outside of the main thread none is noted.
    """
    came = []

    def note(number: int, frame) -> None:
        if came:
            signal.default_int_handler(number, frame) if number == signal.SIGINT else _terminate(number, frame)
        came.append(number)
        print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    with _handled(note, signal.SIGINT, signal.SIGTERM):
        yield lambda: came[0] if came else 0


def one_line(message: str) -> str:
    """A message without line ends and what else steers a terminal: file names and data may hold any of it."""
    return "".join(sign if sign.isprintable() else " " for sign in message.strip())


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
