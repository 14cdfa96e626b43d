"""One run at a time writes into an output folder, or into a log."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import SoftFileLock, Timeout

from harmful_unlearn.errors import UserError
from harmful_unlearn.storage.files import resolved

_held: set[Path] = set()  # by this process, whose parts may lock a target again


@contextmanager
def locked(*targets: Path) -> Iterator[None]:
    """Within the block, no other run may write into these folders and files, which need not be there yet.

    A lock is a file beside its target, `.NAME.lock`, with the process, its host and its start: so it works over NFS.
    What a process that has died on this host holds is taken over.

    Raises:
        UserError: another process holds the lock of a target.
    """
    with ExitStack() as locks:
        for target in map(resolved, targets):
            if target not in _held:
                locks.enter_context(_locked(target))
        yield


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    file = target.with_name(f".{target.name}.lock")
    new_parents = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = SoftFileLock(file)
    try:
        lock.acquire(timeout=0.2, poll_interval=0.05)  # twice: first it may only find out that the holder has died
    except Timeout:
        raise UserError(f"{target} is being written by {_holder(file)}: wait for it, or give another path") from None
    _held.add(target)
    try:
        yield
    finally:
        _held.discard(target)
        lock.release()
        with suppress(OSError):  # something may be in them by now
            for parent in new_parents:
                parent.rmdir()


def _holder(file: Path) -> str:
    try:
        process, host, *_ = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return f"another process; if none runs (this one's lock is empty or broken), remove {file}"
    here = " (this machine)" if host == os.uname().nodename else f"; if that has died, remove {file}"
    return f"process {process} on {host}{here}"
