"""What a user can mend, said in one sentence, and the exit codes of every command."""

import errno
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend. The message is one sentence that names the fix."""


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
    errno.ENAMETOOLONG: "a name is too long for the file system: give a shorter one",
    errno.ELOOP: "its symbolic links lead round in a loop: give another path",
    errno.ENOTDIR: "a part of the path is a file: give another path",
    errno.EISDIR: "a folder is where a file should be: remove it, or give another path",
}


def exit_code(main: Callable[[], None]) -> int:
    """Run a command and turn its end into an exit code, without a traceback for what users can mend.

    Returns:
        0 when `main` returns, 2 for what the user can mend (`UserError`, no memory, a full disk, no permission),
        130 after Ctrl-C. Anything else is a bug and keeps its traceback.
    """
    try:
        main()
        return 0
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt:
        print("\ninterrupted: no folder was left half-written", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        message = f"{error.filename or 'a file'}: {MENDABLE[error.errno]}"
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message = OUT_OF_MEMORY
    print(f"error: {one_line(message)}", file=sys.stderr)
    return 2


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
