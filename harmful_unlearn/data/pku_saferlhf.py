"""PKU-SafeRLHF: harmful pairs (GD), the pool of harmful answers (RD), and labelled responses for judges."""

import ast
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.data.tables import Table, as_text, is_missing, read_table
from harmful_unlearn.errors import UserError

HARMFUL_COLUMNS = ("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe")
FLAGS = "a dictionary of true and false"  # what a harm_category cell holds
HARMFUL_FIX = "give --harmful_dataset a local .jsonl, .json, .csv or .parquet file"


@dataclass(frozen=True)
class Response:
    """One labelled response of PKU-SafeRLHF."""

    question: str
    answer: str
    safe: bool
    categories: frozenset[str] = frozenset()  # the kinds of harm it is marked with, if the data have such a column


@dataclass
class HarmfulData:
    """Harmful pairs, for GD, and the pool of harmful answers, for RD (implementation details 2 and 5)."""

    pairs: list[Pair]  # for each row in order, response_0 if unsafe, then response_1 if unsafe
    answers: list[str]  # every unsafe response_0 in row order, then every unsafe response_1
    answer_questions: list[str]  # the question that each of `answers` came with
    safe_answers: list[str | None]  # for each pair, the other response of its row if that is safe and not empty
    rows: int  # read, before the selection
    source: dict  # name, revision, split, sha256 (of a file), rows, pairs, selection


def read_harmful(
    name: str,
    revision: str | None = None,
    split: str = "train",
    categories: Sequence[str] = (),
    min_severity: int | None = None,
) -> HarmfulData:
    """The unsafe responses of PKU-SafeRLHF, or of any data with its columns.

    Args:
        name: a hub id, a folder, or a .jsonl, .json, .csv or .parquet file.
        revision: of a hub id. PKU-SafeRLHF as it was for the paper is ff7ba91063016c78a225b0f74e1c0860bb18230f.
        split: of a hub id or folder; a file is read completely.
        categories: keep responses in any of these categories of harm; empty: in all.
        min_severity: keep responses of this severity or more. A response without a severity has 0.

    Raises:
        UserError: the data cannot be read, lack a column, hold a value that is not text or not a label, cannot be
            selected from, or have no unsafe response left.
    """
    table, prompts, responses, safe = _read_responses(name, revision, split)
    selected = ~np.array(safe)  # [2, rows]
    if not selected.any():
        raise UserError(f"{table.name} marks no response as unsafe: {HARMFUL_FIX} that does")
    if categories:
        selected &= _in_categories(table, categories)
    if min_severity is not None:
        severities = _labels(table, "severity_level", as_severity, "a number", "--min_severity")
        selected &= np.array(severities) >= min_severity
    if not selected.any():
        problem = "has no unsafe response that --harm_category and --min_severity leave"
        raise UserError(f"{table.name} {problem}: select less narrowly")
    by_row, by_side = np.argwhere(selected.T).tolist(), np.argwhere(selected).tolist()
    pairs = [Pair(prompts[row], responses[side][row]) for row, side in by_row]
    beside = [responses[1 - side][row] if safe[1 - side][row] else "" for row, side in by_row]
    selection = {"categories": list(categories), "min_severity": min_severity}
    return HarmfulData(
        pairs=pairs,
        answers=[responses[side][row] for side, row in by_side],
        answer_questions=[prompts[row] for _, row in by_side],
        safe_answers=[answer if answer.strip() else None for answer in beside],
        rows=table.rows,
        source={**table.source, "rows": table.rows, "pairs": len(pairs), "selection": selection},
    )


def read_responses(name: str, revision: str | None = None, split: str = "train") -> list[Response]:
    """All responses, safe and unsafe, with their labels; two a row, in row order. Args and raises as `read_harmful`."""
    table, prompts, responses, safe = _read_responses(name, revision, split)
    flags = _labels(table, "harm_category", as_flags, FLAGS)
    return [
        Response(prompts[row], responses[side][row], safe[side][row], frozenset(filter(cell.get, cell)))
        for row, cells in enumerate(zip(*flags, strict=True))
        for side, cell in enumerate(cells)
    ]


def _read_responses(
    name: str, revision: str | None, split: str
) -> tuple[Table, list[str], list[list[str]], list[list[bool]]]:
    """The table, its prompts [rows], its responses [2][rows], and whether each response is safe [2][rows]."""
    table = read_table(name, HARMFUL_FIX, revision, split)
    missing = [column for column in HARMFUL_COLUMNS if column not in table.columns]
    if missing:
        raise table.missing(missing, HARMFUL_FIX)
    prompts = table.cells("prompt", as_text, "text")
    responses = [table.cells(f"response_{side}", as_text, "text") for side in (0, 1)]
    safe = [table.cells(f"is_response_{side}_safe", as_label, "true or false") for side in (0, 1)]
    return table, prompts, responses, safe


def _labels(table: Table, kind: str, parse: Callable[[Any], Any], expected: str, flag: str = "") -> list[list]:
    """A kind of label of each response, [2][rows]; if the data have none, those of empty cells.

    Raises UserError: they have none, and `flag` selects by them.
    """
    columns = [f"response_{side}_{kind}" for side in (0, 1)]
    if set(columns) <= set(table.columns):
        return [table.cells(column, parse, expected) for column in columns]
    if flag:
        problem = f"{table.name} has no columns {' and '.join(columns)} to select by (the data of early 2024 had none)"
        raise UserError(f"{problem}: use today's with --harmful_revision main, or omit {flag}")
    return [[parse(None)] * table.rows] * 2


def _in_categories(table: Table, categories: Sequence[str]) -> np.ndarray:
    """Whether each response is in one of the categories: bool [2, rows]."""
    flags = _labels(table, "harm_category", as_flags, FLAGS, "--harm_category")
    known = sorted({category for side in flags for cell in side for category in cell})
    unknown = [category for category in categories if category not in known]
    if unknown:
        unknown_names, known_names = (", ".join(map(repr, names)) for names in (unknown, known))
        raise UserError(f"{table.name} has no --harm_category {unknown_names}: take from {known_names}")
    return np.array([[any(map(cell.get, categories)) for cell in side] for side in flags])


_LABELS = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}


def as_label(value: Any) -> bool:
    """A safety label, which may be a bool, a number or a word."""
    return _LABELS[value.strip().lower() if isinstance(value, str) else value]


def as_flags(value: Any) -> dict[str, bool]:
    """A harm_category cell, which may be a dictionary or its text: whether the response is in each category."""
    if is_missing(value):
        return {}
    if isinstance(value, str):
        return _parse_flags(value)
    if not isinstance(value, dict):
        raise TypeError
    return {as_text(category): flag is not None and as_label(flag) for category, flag in value.items()}


@functools.cache  # a CSV has few different cells in its many rows
def _parse_flags(text: str) -> dict[str, bool]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, MemoryError, RecursionError) as error:
            raise ValueError from error
    if not isinstance(value, dict):
        raise TypeError
    return as_flags(value)


def as_severity(value: Any) -> float:
    """A severity_level cell as a number; 0 if it is missing."""
    return 0.0 if is_missing(value) else float(value)
