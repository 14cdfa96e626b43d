"""What ran: recorded beside every result."""

import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from harmful_unlearn.storage.files import ROOT

CODE_VERSION = "0.1.0"
PACKAGES = ("torch", "transformers", "accelerate", "peft", "safetensors", "datasets", "numpy", "pandas", "scikit-learn")


def revision_of(folder: Path) -> str | None:
    """The hub commit of a cached snapshot of a model, None for a folder of the user's own."""
    return folder.name if folder.parent.name == "snapshots" else None


def provenance() -> dict:
    """What ran: command, code version and commit, package versions, Python, time (UTC)."""
    packages: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            packages[name] = version(name)
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "code": {"version": CODE_VERSION, "commit": _commit()},
        "packages": packages,
        "python": platform.python_version(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
