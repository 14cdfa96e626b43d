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
    """A JSON object from a file. Raises UserError: it is missing, broken, or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise UserError(f"{path} {what}: give a folder that save_pretrained wrote") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): copy or download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object: copy or download it again")
    return content


ROOT = Path(__file__).resolve().parents[2]


def user_path(text: str) -> Path:
    """A path as a user writes it: `~` stands for the home folder also after `--flag=`. Raises UserError."""
    if not text:
        raise UserError("a path is empty: give one, or leave its flag out")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"nobody here has the home folder in {text}: give the whole path") from None


def resolved(path: Path) -> Path:
    """Path.resolve, which raises its own error on a loop of links before Python 3.13."""
    return Path(os.path.realpath(path))


def check_target(target: Path, overwrite: bool) -> None:
    """Say now, rather than after the work, that a folder cannot be written.

    Raises:
        UserError: `target` is a file, a mount or the current folder, is not empty (without
            `overwrite`), or cannot be written.
    """
    if _exists(target) and not target.is_dir():
        raise UserError(f"{target} is a file: give the path of a folder to write")
    if target.is_dir() and (os.path.ismount(target) or resolved(target) == Path.cwd()):
        raise UserError(f"{target} cannot be replaced as a whole (a mount, or where you stand): give a folder in it")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UserError(f"{target} is not empty: give another folder, or --overwrite to replace it")
    _check_parent(target)


def check_file(path: Path) -> None:
    """The same for a file. Raises UserError: `path` is a folder or a device, or cannot be written."""
    if _exists(path) and not path.is_file():
        raise UserError(f"{path} is a folder or a device: give the path of a file")
    if path.is_file() and not os.access(path, os.W_OK):
        raise UserError(f"{path} may not be written: give another path")
    _check_parent(path)


def _exists(path: Path) -> bool:
    """Path.exists, which takes a loop of links for nothing. Raises OSError (see errors.disk_problem)."""
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
        # The only sure way: /proc says that root may write there, a mount may be full, and the name, with what
        # new_folder puts beside it, too long.
        tempfile.TemporaryDirectory(prefix=f".{path.name}.writable-{_process()}", dir=parent).cleanup()
    except OSError as error:
        reason = f"{parent} is not a writable folder: {error.strerror}"
        raise UserError(f"{path} cannot be written ({reason}): give another path") from None


def check_apart(paths: list[Path]) -> None:
    """Raises UserError where one of `paths` is another or lies inside it: writing would mix them up."""
    for one, other in combinations(paths, 2):
        ours, theirs = resolved(one), resolved(other)
        if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
            raise UserError(f"{one} and {other} lie in one another: give each a folder of its own")


def _clear_up(target: Path) -> None:
    """Remove what processes that were killed here left beside `target`, but for a folder that nothing has replaced."""
    left = re.compile(rf"\.{re.escape(target.name)}\.(partial|previous|writable)-{re.escape(_HOST)}-(\d+)-")
    for path in target.parent.iterdir():
        found = left.match(path.name)
        if found and not _runs(int(found[2])) and (found[1] != "previous" or target.exists()):
            shutil.rmtree(path, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return process != os.getpid()  # after a restart of the machine, or of a container, the number may be ours


_HOST = socket.gethostname()


def _process() -> str:
    return f"{_HOST}-{os.getpid()}-"  # in the names of temporary folders


@contextmanager
def new_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling of `target` to write into, renamed to `target` when all went well.

    Whatever stops the block, `target` is either as it was or whole and new. The previous folder is
    removed (with `overwrite`) only once the new one stands. Where the renaming itself fails, what was
    written stays in the temporary folder, which the error names.

    Raises:
        UserError: as `check_target`, or the renaming failed.
    """
    check_target(target, overwrite)
    target = resolved(target)
    made = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear_up(target)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-{_process()}", dir=target.parent))
    try:
        yield partial
        mask = _umask()
        for path in (partial, *partial.rglob("*")):  # mkdtemp's 0700 and safetensors' 0600 would hide it from the group
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # something else lies in them by now
            for parent in made:
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
        raise UserError(f"{target} cannot be replaced ({error.strerror}): move {partial} there, it is whole") from None
    shutil.rmtree(previous, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder; if this is stopped half-way, nothing half of it has its name."""
    try:
        hidden = Path(tempfile.mkdtemp(prefix=f".{folder.name}.previous-{_process()}", dir=folder.parent))
        folder.rename(hidden / folder.name)
    except OSError:  # a full disk has no room for the new name
        hidden = folder
    shutil.rmtree(hidden, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_file(path: Path, content: str | bytes) -> None:
    """Write a small file in one step: the old content or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
