"""How a command ends: what a user can mend, said in one sentence; being stopped; and the exit codes."""

import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """Something the user can mend. The message is one sentence that names the fix."""


class Stopped(BaseException):
    """Ctrl-C or SIGTERM, with what became of the work; the exit code is 128 + the signal's number."""

    def __init__(self, number: int, message: str):
        self.number = number
        super().__init__(message)


NOTHING_HALF_WRITTEN = "no folder was left half-written"
OUT_OF_MEMORY = (
    "out of memory: use a smaller --batch_size or --max_length, --lora on, "
    "--gradient_checkpointing, or a GPU with bf16 (--check prints an estimate first)"
)


MENDABLE = {
    errno.ENOSPC: "no space is left on the disk: free some, then run again",
    errno.EDQUOT: "your disk quota is used up: free some space, then run again",
    errno.EACCES: "permission denied: give a path that you may use",
    errno.EPERM: "permission denied: give a path that you may use",
    errno.EROFS: "the file system is read-only: give another path",
    errno.EFBIG: "the file is larger than this disk or account may hold: give another path",
    errno.EIO: "the disk does not answer: check it, or give another path",
    errno.ESTALE: "the disk is gone: mount it again, or give another path",
    errno.ENOTCONN: "the disk is gone: mount it again, or give another path",
    errno.ENODEV: "the disk is gone: mount it again, or give another path",
    errno.ENAMETOOLONG: "a name is too long for the file system: give a shorter one",
    errno.ELOOP: "its symbolic links lead round in a loop: give another path",
    errno.ENOTDIR: "a part of the path is a file: give another path",
    errno.EISDIR: "a folder is where a file should be: remove it, or give another path",
}


@contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Within the block, what the system says of files is an OSError, also from libraries with errors of their own."""
    try:
        yield
    except Exception as error:  # safetensors' and tokenizers' derive from Exception alone
        said = re.search(r"os error (\d+)|code: (\d+)", str(error))
        if isinstance(error, OSError) or not said:
            raise
        number = int(said[1] or said[2])
        raise OSError(number, os.strerror(number), str(path)) from error


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the machine or its GPU has no memory left."""
    # Torch's CPU allocator raises a bare RuntimeError, told apart by its text alone.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(said in str(error) for said in ("can't allocate memory", "Cannot allocate memory", "unable to mmap"))
    )
