"""One run at a time writes into an output folder."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import SoftFileLock, Timeout

from harmful_unlearn.errors import UserError
from harmful_unlearn.storage.files import resolved

_held: set[Path] = set()  # by this process, whose parts may lock a folder again


@contextmanager
def locked(*folders: Path) -> Iterator[None]:
    """Within the block, no other run may write into these folders, which need not be there yet.

    A lock is a file beside its folder, `.NAME.lock`, with the process, its host and its start: so it works over NFS.
    What a process that has died on this host holds is taken over.

    Raises:
        UserError: another process holds the lock of a folder.
    """
    with ExitStack() as locks:
        for folder in map(resolved, folders):
            if folder not in _held:
                locks.enter_context(_locked(folder))
        yield


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    file = folder.with_name(f".{folder.name}.lock")
    new_parents = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = SoftFileLock(file)
    try:
        lock.acquire(timeout=0.2, poll_interval=0.05)  # twice: first it may only find out that the holder has died
    except Timeout:
        raise UserError(f"{folder} is being written by {_holder(file)}: wait for it, or give another folder") from None
    _held.add(folder)
    try:
        yield
    finally:
        _held.discard(folder)
        lock.release()
        with suppress(OSError):  # something may be in them by now
            for parent in new_parents:
                parent.rmdir()


def _holder(file: Path) -> str:
    try:
        process, host, *_ = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return f"another process ({file})"
    here = " (this machine)" if host == os.uname().nodename else f"; if that has died, remove {file}"
    return f"process {process} on {host}{here}"
