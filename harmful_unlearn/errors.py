"""UserError and its kinds: problems the user can fix, reported in one line."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """A problem that the user can fix. The message is one sentence that names the problem and the fix."""


class Diverged(UserError):
    """Training cannot continue: a loss or a gradient is not finite, or theta has left the base too far behind."""


class NoSafeAnswers(UserError):
    """The loss SA has nothing to learn: no harmful answer that is trained on has a safe one beside it."""


class Stopped(BaseException):
    """Ctrl-C or SIGTERM, with a message about the work so far; the exit code is 128 + the signal's number."""

    def __init__(self, number: int, message: str):
        self.number = number
        super().__init__(message)


OUT_OF_MEMORY = (
    "out of memory: use a smaller --tokens_per_pass (training), --tokens_per_batch (evaluation) or --max_length, "
    "--lora on, --gradient_checkpointing, or a GPU with bf16 (--check prints an estimate first)"
)
_DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT}
_PATH_IS_UNUSABLE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV,
    errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR,
}  # fmt: skip


def disk_problem(error: BaseException) -> str | None:
    """The message for a path or a disk that cannot be used; None for any other error."""
    if not isinstance(error, OSError) or error.errno not in _DISK_IS_FULL | _PATH_IS_UNUSABLE:
        return None
    fix = "free some space, then run again" if error.errno in _DISK_IS_FULL else "give another path"
    return f"{error.filename2 or error.filename or 'a file'}: {error.strerror}: {fix}"


@contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Within the block, a failed write is an OSError in safetensors and tokenizers, too."""
    try:
        yield
    except Exception as error:  # their errors are bare Exceptions that name the system's error in their text
        number = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, OSError) or not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the machine or its GPU has no memory left."""
    # Torch's CPU allocator raises a bare RuntimeError, which only its text identifies.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(text in str(error) for text in ("can't allocate memory", "Cannot allocate memory", "unable to mmap"))
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
