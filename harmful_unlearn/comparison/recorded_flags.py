"""The flags of reproduce.py that made a comparison, by its comparison.json."""

from pathlib import Path
from typing import Any

from harmful_unlearn.errors import UserError
from harmful_unlearn.storage.files import read_json


def comparison_file(source: Path) -> Path:
    """The file of a comparison that --replay names, by itself or by its folder. Raises UserError: it is not there."""
    file = source if source.suffix == ".json" else source / "comparison.json"
    if not file.is_file():
        raise UserError(f"there is no {file}: give a folder that reproduce.py wrote")
    return file


def replayed_flags(source: Path) -> dict[str, Any]:
    """The flags of reproduce.py that make a comparison again, beside it unless --output is given.

    Raises:
        UserError: there is no comparison, or one of an earlier version.
    """
    flags = read_json(comparison_file(source)).get("flags")
    if not isinstance(flags, dict):
        raise UserError(f"{comparison_file(source)} does not record its flags: give one that this version wrote")
    folder = comparison_file(source).resolve().parent
    output = str(folder.with_name(f"{folder.name}-replayed"))
    return {**flags, "output": output, "replay": None}
