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
from dataclasses import field, fields
from types import FrameType
from typing import Any, NoReturn

from harmful_unlearn.allocator import keep_freed_memory
from harmful_unlearn.errors import OUT_OF_MEMORY, Stopped, UserError, disk_problem, is_out_of_memory

NOTHING_HALF_WRITTEN = "no folder was left half-written"
LARGEST = 2**32 - 1  # NumPy's largest seed; the other whole numbers that flags take are far below it
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def exit_code(main: Callable[[], None]) -> int:
    """Run a command and turn its end into an exit code, without a traceback for problems that the user can fix.

    Returns:
        0 when `main` returns, 2 for what the user can fix (`UserError`, no memory, a full disk, no permission),
        130 after Ctrl-C, 143 after SIGTERM. Anything else is a bug and keeps its traceback.
    """
    keep_freed_memory()
    process = int(os.environ.get("RANK", 0))
    try:
        with _handled(_terminate, signal.SIGTERM):
            main()
        return 0
    except KeyboardInterrupt:
        print(f"\ninterrupted: {NOTHING_HALF_WRITTEN}", file=sys.stderr)
        return 128 + signal.SIGINT
    except Stopped as stop:
        if process == 0:
            print(f"\n{stop}", file=sys.stderr)
        return 128 + stop.number
    except Exception as error:
        message = _problem(error)
        if message is None:
            raise
    where = f" (process {process})" if process > 0 else ""
    print(f"error{where}: {one_line(message)}", file=sys.stderr)
    return 2


def _problem(error: Exception) -> str | None:
    """The message for a problem that the user can fix; None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError | RuntimeError) and is_out_of_memory(error):
        return OUT_OF_MEMORY
    return disk_problem(error)


def _terminate(number: int, _frame: object) -> None:
    raise Stopped(number, f"terminated: {NOTHING_HALF_WRITTEN}")


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None], *signals: int) -> Iterator[None]:
    """Within the block, signals call `handler`. Only the main thread receives signals; elsewhere nothing changes."""
    is_main_thread = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, handler) for number in signals if is_main_thread}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def stop_asked() -> Iterator[Callable[[], int]]:
    """Within the block, the first Ctrl-C or SIGTERM only asks for a stop, which work can heed; a second one stops it.

    Yields:
        A function that returns the number of the signal received, 0 before. Outside of the main thread it is always 0.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            signal.default_int_handler(number, frame) if number == signal.SIGINT else _terminate(number, frame)
        received.append(number)
        print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    with _handled(note, signal.SIGINT, signal.SIGTERM):
        yield lambda: received[0] if received else 0


def one_line(message: str) -> str:
    """A message without line breaks and terminal control characters, which file names and data may hold."""
    return "".join(sign if sign.isprintable() else " " for sign in message.strip())


def flag(help: str, group: str = "", **options: Any) -> Any:
    """A field of a command's settings dataclass, which is its flag, too. `options` are those of `add_argument`."""
    return field(metadata={"help": help, "group": group, **options})


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and suggest a flag for a misspelt one.

    Flags cannot be abbreviated, and a negative number may have an exponent (-1e-3).
    """

    def __init__(self, **settings: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)")  # argparse's own takes -1e-3 for a flag

    def add_settings(self, settings_class: type) -> None:
        """Add a flag for each field of a settings dataclass that `flag` made."""
        groups: dict[str, Any] = {}
        for setting in fields(settings_class):
            options = dict(setting.metadata)
            title = options.pop("group")
            if title not in groups:
                groups[title] = self.add_argument_group(title) if title else self
            default = options.get("default")
            if default not in (None, (), []) and default is not False and "(default:" not in options["help"]:
                options["help"] += f" (default: {default})"
            groups[title].add_argument(f"--{setting.name}", **options)

    def parse_args(self, args=None, namespace=None):
        """The flags. Exits with code 2: a value is refused, a flag is missing or unknown, or not UTF-8."""
        words = sys.argv[1:] if args is None else args
        try:
            "".join(words).encode()  # Python keeps other bytes as half a surrogate pair, which cannot be written
        except UnicodeEncodeError:
            self.error(f"{next(word for word in words if not word.isprintable())!r} is not UTF-8: give another name")
        flags, unknown = self.parse_known_args(words, namespace)
        if unknown:
            self.error(f"unknown argument {unknown[0]}{self._suggestion(unknown[0])}")
        return flags

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and one line, rather than the usage."""
        message = one_line(message).removeprefix("argument ")
        self.exit(2, f"error: {message} (--help lists all flags)\n")

    def _suggestion(self, unknown: str) -> str:
        known = [flag for flag in self._option_string_actions if flag.startswith("--")]
        name = "--" + unknown.partition("=")[0].lstrip("-").replace("-", "_")
        near = [flag for flag in known if flag.startswith(name)] or difflib.get_close_matches(name, known, 1)
        return f": did you mean {' or '.join(near)}?" if near else ""


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
not_negative = _number_type(float, lambda value: 0 <= value < math.inf, "a number from 0")
share = _number_type(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
whole_number = _number_type(int, lambda value: 0 <= value <= LARGEST, f"a whole number from 0 to {LARGEST}")
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
