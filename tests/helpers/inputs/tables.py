"""Rows of PKU-SafeRLHF as its two schemas have them, and files of rows in every format."""

import json
from pathlib import Path

import pandas as pd
import pytest

from harmful_unlearn.data.pku_saferlhf import HarmfulData
from harmful_unlearn.errors import UserError
from tests.helpers.models.tiny import GOLDENS

EARLY = GOLDENS / "pku_saferlhf.jsonl"
TODAY = GOLDENS / "pku_saferlhf_current_schema.jsonl"
TRUTHFUL = GOLDENS / "TruthfulQA.csv"
FORMATS = ("jsonl", "json", "csv", "parquet")
HUB = "PKU-Alignment/PKU-SafeRLHF"


def rows_of(path: Path) -> list[dict]:
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def row(prompt="p", answers=("a", "b"), safe=(False, False), **more) -> dict:
    """A row of PKU-SafeRLHF."""
    return {
        "prompt": prompt,
        "response_0": answers[0],
        "response_1": answers[1],
        "is_response_0_safe": safe[0],
        "is_response_1_safe": safe[1],
        **more,
    }


def write(folder: Path, rows: list[dict], suffix: str = "jsonl") -> str:
    """The path of a new file with these rows."""
    path = folder / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    elif suffix == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif suffix == "csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        pd.DataFrame(rows).to_parquet(path)
    return str(path)


def error_of(read, *args, **kwargs) -> str:
    """The message of the UserError that a call raises; it is one line."""
    with pytest.raises(UserError) as caught:
        read(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def contents(data: HarmfulData) -> tuple:
    """What was read, without its source."""
    return data.pairs, data.answers, data.rows
