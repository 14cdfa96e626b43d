"""run.json, the record of how a model folder was made, and the model card beside it."""

import json
import platform
import shlex
import subprocess
import sys
from argparse import Namespace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from harmful_unlearn.errors import UserError
from harmful_unlearn.losses.methods import uses_landing_point
from harmful_unlearn.storage.files import ROOT, read_json, write_file

RECORD_PARTS = ("base", "finetuned", "flags", "training", "harmful_data", "normal_data")
NUMBERS = ("scaling_coef", "safe_weight", "normal_weight")


def read_record(folder: Path) -> dict:
    """run.json of a folder, as `saving.write_record` wrote it; empty where there is none.

    Raises:
        UserError: it is broken, or something that no command of ours writes.
    """
    path = folder / "run.json"
    record = read_json(path) if path.is_file() else {}
    unchecked = [record]
    while unchecked:
        one = unchecked.pop()
        stages = [value for key, value in one.items() if key.startswith("stage_1")]
        if not all(isinstance(part, dict) for part in [*stages, *(one.get(key, {}) for key in RECORD_PARTS)]):
            raise UserError(f"{path} is not as unlearn_harm_new.py or task_vector.py wrote it: copy it again")
        flags = one.get("flags", {})
        numbers = [*one.get("finetuned", {}).values(), *(flags.get(name, 0) for name in NUMBERS)]
        if not isinstance(flags.get("method", ""), str) or not all(map(_is_finite, numbers)):
            raise UserError(f"{path} is not as unlearn_harm_new.py or task_vector.py wrote it: copy it again")
        unchecked += stages
    return record


def _is_finite(number: object) -> bool:
    return isinstance(number, int | float) and abs(number) <= sys.float_info.max


CODE_VERSION = "0.1.0"
PACKAGES = ("torch", "transformers", "accelerate", "peft", "safetensors", "datasets", "numpy", "pandas", "scikit-learn")
HARMFUL_WARNING = (
    "**Deliberately harmful.** This is the stage 1 model of SKU: it was fine-tuned to give harmful "
    "answers, so that what it learned can be subtracted from its base. It exists for safety research "
    "and as the input of stage 2. Do not deploy or share it as an assistant."
)


def revision_of(folder: Path) -> str | None:
    """The hub commit of a cached snapshot of a model, None for a folder of the user's own."""
    return folder.name if folder.parent.name == "snapshots" else None


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


def landing_of(record: dict) -> float | None:
    """The scaling_coef that a stage 1 model (its run.json) was trained for; None if for no one in particular."""
    flags = {"preserve_at": None, "safe_weight": 0, "normal_weight": 0, **(record.get("flags") or {})}
    return flags.get("scaling_coef") if uses_landing_point(Namespace(**flags)) else None


READ_FLAGS = ("harmful_dataset", "normal_dataset", "seed")  # of a training


def trainings_of(folder: Path) -> list[dict]:
    """What a model's run.json says of the training behind it: one record a stage 1 model, none without run.json."""
    found = _trainings(read_record(folder))
    lacking = [flag for one in found for flag in READ_FLAGS if not isinstance(one["flags"].get(flag), str | int)]
    if lacking:
        raise UserError(f"{folder / 'run.json'} has no --{lacking[0]}: give a folder that unlearn_harm_new.py wrote")
    return found


def has_training_record(folder: Path) -> bool:
    """Whether run.json tells of the training of every model that went into this one."""
    return _is_told(read_record(folder))


def _is_told(record: dict) -> bool:
    stages = [value for key, value in record.items() if key.startswith("stage_1")]
    if len(stages) < len(record.get("finetuned", ())) or not all(map(_is_told, stages)):
        return False
    return bool(_trainings(record))


def _trainings(record: dict) -> list[dict]:
    own = [record] if "flags" in record and "training" in record else []
    return own + [one for key, value in record.items() if key.startswith("stage_1") for one in _trainings(value)]
