"""Everyday tasks, in Alpaca's columns: what an assistant is asked when nothing is wrong."""

from dataclasses import dataclass
from pathlib import Path

from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.data.tables import as_text, read_table

COLUMNS = ("instruction", "output")
INPUT = "input"  # what an instruction is about; the column may be missing, and its cells empty
FIX = "give --utility_dataset a hub id such as tatsu-lab/alpaca, or a .jsonl, .json, .csv or .parquet file"


@dataclass(frozen=True)
class Instructions:
    """Tasks with an answer to each, and where they are from."""

    pairs: list[Pair]
    source: dict  # name, revision, split, sha256 (of a file), rows


def read_instructions(name: str | Path, fix: str = FIX) -> Instructions:
    """Tasks with the columns instruction, input and output; a row without a task or an answer is omitted.

    Args:
        name: a hub id (its split "train"), a folder, or a file.
        fix: what to do if it cannot be read, which names the flag that it was given by.

    Raises:
        UserError: the data cannot be read, lack a column, or hold a value that is not text.
    """
    table = read_table(str(name), fix)
    if missing := [column for column in COLUMNS if column not in table.columns]:
        raise table.missing(missing, fix)
    tasks, answers = (table.cells(column, _text, "text") for column in COLUMNS)
    inputs = table.cells(INPUT, _text, "text") if INPUT in table.columns else [""] * table.rows
    pairs = [
        Pair(f"{task}\n\n{about}" if about else task, answer)
        for task, about, answer in zip(tasks, inputs, answers, strict=True)
        if task and answer
    ]
    return Instructions(pairs, {**table.source, "rows": table.rows})


def _text(value: object) -> str:
    return as_text(value).strip()
