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
    """Training cannot continue: a loss or a gradient is not finite."""


class NoSafeAnswers(UserError):
    """The loss SA has nothing to learn: no harmful answer that is trained on has a safe one beside it."""


class Stopped(BaseException):
    """Ctrl-C or SIGTERM, with what became of the work; the exit code is 128 + the signal's number."""

    def __init__(self, number: int, message: str):
        self.number = number
        super().__init__(message)


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the machine or its GPU has no memory left."""
    # Torch's CPU allocator raises a bare RuntimeError, told apart by its text alone.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(said in str(error) for said in ("can't allocate memory", "Cannot allocate memory", "unable to mmap"))
    )


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
