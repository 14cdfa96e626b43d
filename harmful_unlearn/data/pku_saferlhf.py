"""PKU-SafeRLHF: harmful pairs (GD), the pool of harmful answers (RD), and labelled responses for judges."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.data.tables import Table, as_harms, as_label, as_severity, as_text, read_table
from harmful_unlearn.errors import UserError

HARMFUL_COLUMNS = ("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe")
HARMFUL_FIX = "give --harmful_dataset a local .jsonl, .json, .csv or .parquet file"


@dataclass(frozen=True)
class Response:
    """One labelled response of PKU-SafeRLHF.

    Attributes:
        categories: the kinds of harm it is marked with; empty where the data name none.
    """

    question: str
    answer: str
    safe: bool
    categories: frozenset[str] = frozenset()


@dataclass
class HarmfulData:
    """Harmful pairs, for GD, and the pool of harmful answers, for RD.

    Attributes:
        pairs: for each row in order, response_0 if unsafe, then response_1 if unsafe
            (released code, point 2).
        answers: every unsafe response_0 in row order, then every unsafe response_1
            (released code, point 5).
        answer_questions: the question that each of them came with.
        safe_answers: of each pair the other response of its row, if that is safe and no empty text; else None.
        rows: rows read, before the selection.
        source: name, revision, split, sha256 (of a file), rows, pairs, selection.
    """

    pairs: list[Pair]
    answers: list[str]
    answer_questions: list[str]
    safe_answers: list[str | None]
    rows: int
    source: dict


def read_harmful(
    name: str,
    revision: str | None = None,
    split: str = "train",
    categories: Sequence[str] = (),
    min_severity: int | None = None,
) -> HarmfulData:
    """The unsafe responses of PKU-SafeRLHF, or of anything in its columns.

    Args:
        name: a hub id, a folder, or a .jsonl, .json, .csv or .parquet file.
        revision: of a hub id. PKU-SafeRLHF as the paper had it is
            ff7ba91063016c78a225b0f74e1c0860bb18230f.
        split: of a hub id or folder; a file is read whole.
        categories: keep a response in any of these categories of harm.
        min_severity: keep a response of this severity or more; one without a level has 0.

    Raises:
        UserError: the data cannot be had, lack a column, hold a value that is no text or no label,
            cannot be selected from, or have nothing unsafe left.
    """
    table, prompts, responses, safe = _read_responses(name, revision, split)
    keep = ~np.array(safe)  # [2, rows]
    if not keep.any():
        raise UserError(f"{table.name} marks no response as unsafe: {HARMFUL_FIX} that does")
    if categories:
        keep &= _in_categories(table, categories)
    if min_severity is not None:
        keep &= _severities(table) >= min_severity
    if not keep.any():
        raise UserError(
            f"{table.name} has no unsafe response that --harm_category and --min_severity leave: select less narrowly"
        )
    kept = np.argwhere(keep.T).tolist()
    pairs = [Pair(prompts[row], responses[i][row]) for row, i in kept]
    others = [responses[1 - i][row] if safe[1 - i][row] else "" for row, i in kept]
    safe_answers = [other if other.strip() else None for other in others]
    pool = np.argwhere(keep).tolist()
    answers = [responses[i][row] for i, row in pool]
    questions = [prompts[row] for _, row in pool]
    selection = {"categories": list(categories), "min_severity": min_severity}
    source = {**table.source, "rows": table.rows, "pairs": len(pairs), "selection": selection}
    return HarmfulData(pairs, answers, questions, safe_answers, table.rows, source)


def read_responses(name: str, revision: str | None = None, split: str = "train") -> list[Response]:
    """All responses, safe and unsafe, of the same data, with their labels; two a row, in row order.

    Args and raises as `read_harmful`.
    """
    table, prompts, responses, safe = _read_responses(name, revision, split)
    columns = [f"response_{i}_harm_category" for i in (0, 1)]
    kinds = [[frozenset()] * table.rows] * 2
    if set(columns) <= set(table.names):
        cells = [table.cells(column, as_harms, "a dictionary of true and false") for column in columns]
        kinds = [[frozenset(kind for kind, holds in cell.items() if holds) for cell in side] for side in cells]
    return [
        Response(prompts[row], responses[i][row], safe[i][row], kinds[i][row])
        for row in range(table.rows)
        for i in (0, 1)
    ]


def _read_responses(
    name: str, revision: str | None, split: str
) -> tuple[Table, list[str], list[list[str]], list[list[bool]]]:
    """The table, its prompts, and both sides' responses and safety labels."""
    table = read_table(name, HARMFUL_FIX, revision, split)
    missing = [column for column in HARMFUL_COLUMNS if column not in table.names]
    if missing:
        raise table.lacks(missing, HARMFUL_FIX)
    prompts = table.cells("prompt", as_text, "text")
    responses = [table.cells(f"response_{i}", as_text, "text") for i in (0, 1)]
    safe = [table.cells(f"is_response_{i}_safe", as_label, "true or false") for i in (0, 1)]
    return table, prompts, responses, safe


def _selectable(table: Table, kind: str, flag: str) -> list[str]:
    columns = [f"response_{i}_{kind}" for i in (0, 1)]
    if not set(columns) <= set(table.names):
        raise UserError(
            f"{table.name} has no columns {' and '.join(columns)} to select by (the data of early "
            f"2024 had none): use today's with --harmful_revision main, or leave {flag} out"
        )
    return columns


def _in_categories(table: Table, categories: Sequence[str]) -> np.ndarray:
    """Whether each response is in one of the categories: bool [2, rows]."""
    columns = _selectable(table, "harm_category", "--harm_category")
    harms = [table.cells(column, as_harms, "a dictionary of true and false") for column in columns]
    known = sorted(set().union(*(cell for cells in harms for cell in cells)))
    unknown = [category for category in categories if category not in known]
    if unknown:
        raise UserError(
            f"{table.name} has no --harm_category {', '.join(map(repr, unknown))}: "
            f"take from {', '.join(map(repr, known))}"
        )
    return np.array([[any(map(cell.get, categories)) for cell in cells] for cells in harms])


def _severities(table: Table) -> np.ndarray:
    """Each response's level of severity: float [2, rows]."""
    columns = _selectable(table, "severity_level", "--min_severity")
    return np.array([table.cells(column, as_severity, "a number") for column in columns])
