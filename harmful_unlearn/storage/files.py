"""Files and folders: atomic writes, checks before the work, paths as users write them."""

import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import combinations
from pathlib import Path

from harmful_unlearn.errors import UserError


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises UserError: the file is missing, broken, or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        problem = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise UserError(f"{path} {problem}: give a folder that save_pretrained wrote") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): copy or download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object: copy or download it again")
    return content


ROOT = Path(__file__).resolve().parents[2]


def user_path(text: str) -> Path:
    """A path from a flag, with `~` for the home folder. Raises UserError: it is empty, or that home does not exist."""
    if not text:
        raise UserError("a path is empty: give one, or omit its flag")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{text} names the home folder of an unknown user: give the full path") from None


def resolved(path: Path) -> Path:
    """The absolute path without links. Unlike Path.resolve before Python 3.13, it takes a loop of links."""
    return Path(os.path.realpath(path))


def check_target(target: Path, overwrite: bool, flag: str = "folder") -> None:
    """Check before the work that a folder can be written.

    Args:
        flag: that names the folder, for messages.

    Raises UserError: it is a file, a mount, the current folder, not empty (without `overwrite`), or not writable.
    """
    if _exists(target) and not target.is_dir():
        raise UserError(f"{target} is a file: give the path of a folder to write")
    if target.is_dir() and (os.path.ismount(target) or resolved(target) == Path.cwd()):
        raise UserError(f"{target} cannot be replaced (it is a mount or the current folder): give a folder in it")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UserError(f"{target} is not empty: give another {flag}, or --overwrite to replace it")
    _check_parent(target)


def check_file(path: Path) -> None:
    """Check that a file can be written. Raises UserError: `path` is a folder or a device, or cannot be written."""
    if _exists(path) and not path.is_file():
        raise UserError(f"{path} is a folder or a device: give the path of a file")
    if path.is_file() and not os.access(path, os.W_OK):
        raise UserError(f"{path} is read-only: give another path")
    _check_parent(path)


def _exists(path: Path) -> bool:
    """Whether there is something at `path`. Unlike Path.exists, it raises OSError for a loop of links."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _check_parent(path: Path) -> None:
    parent = resolved(path).parent
    while not parent.exists():
        parent = parent.parent
    try:
        # Probe by writing: permission bits mislead for root, and a mount may be full, or the temporary name too long.
        tempfile.TemporaryDirectory(prefix=f".{path.name}.writable-{_process()}", dir=parent).cleanup()
    except OSError as error:
        reason = f"{parent} is not a writable folder: {error.strerror}"
        raise UserError(f"{path} cannot be written ({reason}): give another path") from None


def check_apart(paths: list[Path]) -> None:
    """Check that no path is equal to another or inside it. Raises UserError."""
    for first, second in combinations(paths, 2):
        a, b = resolved(first), resolved(second)
        if a.is_relative_to(b) or b.is_relative_to(a):
            raise UserError(f"{first} and {second} are equal or inside one another: give each a folder of its own")


def _clear_up(target: Path) -> None:
    """Remove what killed processes of this machine left beside `target`, except a previous folder without successor."""
    temporary = re.compile(rf"\.{re.escape(target.name)}\.(partial|previous|writable)-{re.escape(_HOST)}-(\d+)-")
    for path in target.parent.iterdir():
        match = temporary.match(path.name)
        if match and not _runs(int(match[2])) and (match[1] != "previous" or target.exists()):
            shutil.rmtree(path, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process
        return True
    return process != os.getpid()  # after a restart of the machine or of a container, the number may be our own


_HOST = socket.gethostname()


def _process() -> str:
    """This process, in the names of temporary folders."""
    return f"{_HOST}-{os.getpid()}-"


@contextmanager
def new_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` to write into, renamed to `target` at the end of the block.

    Whatever stops the block, `target` is either as it was or new and complete. The previous folder (with `overwrite`)
    is removed only after the new one has its name. Raises UserError: as `check_target`, or the renaming failed; the
    new files are then in the temporary folder, which the error names.
    """
    check_target(target, overwrite)
    target = resolved(target)
    new_parents = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear_up(target)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-{_process()}", dir=target.parent))
    try:
        yield partial
        mask = os.umask(0)
        os.umask(mask)
        for path in (partial, *partial.rglob("*")):  # mkdtemp's 0700 and safetensors' 0600 would hide it from the group
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # something else may be in them by now
            for parent in new_parents:
                parent.rmdir()
        raise
    previous = partial.with_name(partial.name.replace(".partial-", ".previous-"))
    try:
        if target.exists():
            target.rename(previous)
        partial.rename(target)
    except OSError as error:
        if previous.exists():
            previous.rename(target)
        problem = f"{target} cannot be replaced ({error.strerror})"
        raise UserError(f"{problem}: move {partial} there, which is complete") from None
    shutil.rmtree(previous, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder. If this is stopped halfway, the remaining files do not have the folder's name."""
    try:
        hidden = Path(tempfile.mkdtemp(prefix=f".{folder.name}.previous-{_process()}", dir=folder.parent))
        folder.rename(hidden / folder.name)
    except OSError:  # a full disk has no room for the new name
        hidden = folder
    shutil.rmtree(hidden, ignore_errors=True)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a small file atomically: it has the old content or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
