"""How a command runs and ends: signals, exit codes, and problems that the user can fix."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from harmful_unlearn.cli.allocator import keep_freed_memory
from harmful_unlearn.errors import OUT_OF_MEMORY, Stopped, UserError, disk_problem, is_out_of_memory

NOTHING_HALF_WRITTEN = "no folder was left half-written"


def exit_code(main: Callable[[], None]) -> int:
    """Run a command and turn its end into an exit code, without a traceback for problems that the user can fix.

    Returns:
        0 when `main` returns, 2 for what the user can fix (`UserError`, no memory, a full disk, no permission),
        130 after Ctrl-C, 143 after SIGTERM. Anything else is a bug and keeps its traceback.
    """
    keep_freed_memory()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as `before_imports` has left it
        signal.signal(signal.SIGINT, signal.default_int_handler)
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
