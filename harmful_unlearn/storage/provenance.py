"""What ran: recorded beside every result."""

import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from harmful_unlearn.errors import UserError
from harmful_unlearn.storage.files import ROOT

CODE_VERSION = "0.1.0"
PACKAGES = ("torch", "transformers", "accelerate", "peft", "safetensors", "datasets", "numpy", "pandas", "scikit-learn")

INPUTS = (  # flags that may name a file or a folder that is read
    "model_name", "harmful_dataset", "normal_dataset", "more_normal_dataset", "unseen_dataset", "utility_dataset",
)  # fmt: skip
# What a difference may change, by what differs.
GRADES = {
    "the results may change": {"code", "transformers", "accelerate", "peft"},
    "a judge's verdicts may change": {"scikit-learn"},
    "the rounding may change": {"torch", "numpy", "cpu", "threads", "gpus"},
    "nothing should change": set(),
}


def revision_of(folder: Path) -> str | None:
    """The hub commit of a cached snapshot of a model, None for a folder of the user's own."""
    return folder.name if folder.parent.name == "snapshots" else None


def provenance() -> dict:
    """What ran: command, working folder, code version and commit, package versions, Python, hardware, time (UTC)."""
    packages: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            packages[name] = version(name)
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "folder": str(Path.cwd()),
        "code": {"version": CODE_VERSION, "commit": _commit()},
        "packages": packages,
        "python": platform.python_version(),
        "hardware": _hardware(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def differences(before: dict) -> list[str]:
    """What differs between this process and a recorded `provenance`, and what that may change, the gravest first.

    Other code (uncommitted changes count as that) or another release of a library may change more than rounding, other
    hardware or another torch only the rounding, and the rest nothing.
    """
    now, found = provenance(), []
    pairs = [("code", before.get("code"), now["code"]), ("Python", before.get("python"), now["python"])]
    for group in ("packages", "hardware"):
        recorded = before.get(group) or {}
        pairs += [(name, recorded.get(name), value) for name, value in now[group].items()]
    for name, was, value in pairs:
        if was != value or (name == "code" and str(value["commit"]).endswith("-dirty")):  # which says not what changed
            grade = next(grade for grade, names in GRADES.items() if name in names or not names)
            found.append((list(GRADES).index(grade), f"{name} was {_shown(was)} and is {_shown(value)} now: {grade}"))
    return [line for _, line in sorted(found)]


def check_folder(before: dict, flags: Mapping[str, Any], source: Path) -> None:
    """Raises UserError: the flags of a replay name inputs from the folder where the recorded run was started."""
    folder = Path(before.get("folder", ""))
    for name in (flag for flag in INPUTS if flags.get(flag)):
        path = Path(str(flags[name]).replace("{seed}", "*"))
        if not path.is_absolute() and not any(Path().glob(str(path))) and any(folder.glob(str(path))):
            raise UserError(
                f"{source} names {flags[name]} from {folder}: start the replay there, or give --{name} its full path"
            )


def _shown(value: object) -> str:
    if isinstance(value, dict):  # of the code
        commit = str(value.get("commit"))
        return f"{value.get('version')}, commit {commit[:12]}{' with changes' if commit.endswith('-dirty') else ''}"
    return "not recorded" if value is None else str(value)


def _hardware() -> dict:
    """The CPU, torch's threads, and the GPUs."""
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    gpus = []
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {"cpu": cpu, "threads": torch.get_num_threads(), "gpus": gpus}


def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
