"""Folders that are whole or absent, and what lies in them beside the weights: card and run.json."""

import json
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations
from pathlib import Path

from harmful_unlearn.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CODE_VERSION = "0.1.0"
PACKAGES = ("torch", "transformers", "accelerate", "peft", "safetensors", "datasets", "numpy", "pandas", "scikit-learn")

HARMFUL_WARNING = (
    "**Deliberately harmful.** This is the stage 1 model of SKU: it was fine-tuned to give harmful "
    "answers, so that what it learned can be subtracted from its base. It exists for safety research "
    "and as the input of stage 2. Do not deploy or share it as an assistant."
)


def user_path(text: str) -> Path:
    """A path as a user writes it: `~` stands for the home folder also after `--flag=`. Raises UserError."""
    if not text:
        raise UserError("a path is empty: give one, or leave its flag out")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"nobody here has the home folder in {text}: give the whole path") from None


def real(path: Path) -> Path:
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
    if target.is_dir() and (os.path.ismount(target) or real(target) == Path.cwd()):
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
    """Path.exists, which takes a loop of links for nothing. Raises OSError (see errors.MENDABLE)."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _check_parent(path: Path) -> None:
    parent = real(path).parent
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
        ours, theirs = real(one), real(other)
        if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
            raise UserError(f"{one} and {other} lie in one another: give each a folder of its own")


def revision_of(folder: Path) -> str | None:
    """The hub commit of a cached snapshot of a model, None for a folder of the user's own."""
    return folder.name if folder.parent.name == "snapshots" else None


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
    target = real(target)
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


def provenance() -> dict:
    """What ran: command, code version and commit, package versions, Python, time (UTC)."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "code": {"version": CODE_VERSION, "commit": _commit()},
        "packages": packages,
        "python": platform.python_version(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    try:
        found = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def write_record(folder: Path, record: dict) -> None:
    """Write `record`, what made this folder, as run.json for machines and README.md for people.

    Args:
        record: `title` (one line) and `harmful` (bool: a stage 1 model) are required; every other
            key is a section of the card: a dict becomes a table, anything else one line.
            `provenance()` is added to it.
    """
    record = {**record, **provenance()}
    write_file(folder / "run.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    write_file(folder / "README.md", _card(record))


def _card(record: dict) -> str:
    base = record.get("base", {}).get("name")
    # A local path is no hub id, and the hub refuses a card whose base_model is not one.
    base_line = f"base_model: {base}\n" if base and not Path(base).exists() else ""
    lines = [
        f"---\n{base_line}library_name: transformers\ntags:\n- machine-unlearning\n- sku\n---\n",
        f"# {record['title']}\n",
    ]
    if record["harmful"]:
        lines.append(f"> {HARMFUL_WARNING}\n")
    lines.append(
        "Made with a reproduction of SKU (Liu et al., *Towards Safer Large Language Models through "
        "Machine Unlearning*, Findings of ACL 2024). The same facts, for machines, are in run.json.\n"
    )
    for key, value in record.items():
        if key in ("title", "harmful"):
            continue
        heading = key.replace("_", " ").capitalize()
        if isinstance(value, dict):
            rows = "\n".join(f"| {name} | {_cell(entry)} |" for name, entry in value.items())
            lines.append(f"## {heading}\n\n| what | value |\n| --- | --- |\n{rows}\n")
        else:
            lines.append(f"- {heading}: {_cell(value)}\n")
    return "\n".join(lines)


def _cell(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
