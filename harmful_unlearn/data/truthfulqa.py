"""TruthfulQA: normal texts (PD), more of them, their split, and the multiple choices of MC1 and MC2."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harmful_unlearn.data.batch_sampler import SPLIT
from harmful_unlearn.data.instructions import read_instructions
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.data.tables import Table, as_text, read_table
from harmful_unlearn.errors import UserError

NORMAL_COLUMNS = ("Question", "Best Answer", "Correct Answers")
INCORRECT_COLUMN = "Incorrect Answers"
HUB_CONFIGS = {"truthfulqa/truthful_qa": ("generation", "validation")}  # name: (config, split)
NORMAL_FIX = (
    "run `make data` for the original TruthfulQA.csv, or give --normal_dataset a local "
    ".csv, .jsonl, .json or .parquet file"
)
MORE_FIX = "give --more_normal_dataset a hub id such as tatsu-lab/alpaca, or a .jsonl, .json, .csv or .parquet file"


@dataclass
class NormalData:
    """Normal texts, for PD, and their random split of 70 / 10 / 20 % (implementation detail 6)."""

    texts: list[Pair]  # each question with its best answer, each with all its correct answers as one text, then tasks
    train: list[int]  # indices into `texts`, as are the other two
    validation: list[int]
    test: list[int]
    source: dict  # name, revision, split, sha256 (of a file), rows, texts, train, validation, test; "more", of tasks
    tasks: int = 0  # everyday tasks at the end of `texts`, all of them in `train`

    @property
    def questions(self) -> int:
        """The number of questions, each of which is in two texts."""
        return (len(self.texts) - self.tasks) // 2

    @property
    def everyday_tasks(self) -> list[Pair]:
        """Those at the end of `texts`."""
        return self.texts[len(self.texts) - self.tasks :]


def read_normal(name: str | Path, seed: int, more: str | None = None) -> NormalData:
    """TruthfulQA, or any data with its columns Question, Best Answer and Correct Answers.

    Case, spaces and underscores in column names do not matter. Correct answers are one text, semicolons included; a
    list of them is joined with "; ".

    Of the everyday tasks in `more`, 70 %, drawn by the seed, are training texts. The others are left for an evaluation.

    Args:
        name: a .csv, .jsonl, .json or .parquet file, a folder, or a hub id (its split "train"; of
            truthfulqa/truthful_qa, "validation").
        seed: of the split.
        more: everyday tasks in Alpaca's columns (`read_instructions`).

    Raises:
        UserError: the data cannot be read, lack a column, or hold a value that is not text.
    """
    table, columns = _read_normal(name)
    questions, best, correct = (table.cells(column, as_joined_text, "text") for column in columns[:3])
    texts = [*map(Pair, questions, best), *map(Pair, questions, correct)]
    order = _order(len(texts), seed)
    first = int(0.7 * len(texts))
    second = first + int(0.1 * len(texts))
    parts = {"train": order[:first], "validation": order[first:second], "test": order[second:]}
    sizes = {part: len(rows) for part, rows in parts.items()}
    source: dict = {**table.source, "rows": table.rows, "texts": len(texts), **sizes}
    tasks: list[Pair] = []
    if more:
        instructions = read_instructions(more, MORE_FIX)
        pairs = instructions.pairs
        tasks = [pairs[row] for row in _order(len(pairs), seed)[: int(0.7 * len(pairs))]]
        if not tasks:
            raise UserError(f"{more} has too few complete tasks to train on a part of them: {MORE_FIX}")
        source["more"] = {**instructions.source, "train": len(tasks)}
        parts["train"] += range(len(texts), len(texts) + len(tasks))
    return NormalData([*texts, *tasks], **parts, source=source, tasks=len(tasks))


def _order(number: int, seed: int) -> list[int]:
    """The rows 0, 1, ... in the random order of a seed."""
    return np.random.default_rng([seed, SPLIT]).permutation(number).tolist()


@dataclass(frozen=True)
class Choices:
    """The one best answer to a TruthfulQA question, and all true and all false ones, for multiple-choice scores."""

    best: str
    true: list[str]
    false: list[str]


def read_choices(name: str | Path) -> dict[str, Choices]:
    """The multiple choices of `read_normal`'s data, by question; empty without a column "Incorrect Answers".

    Several answers in one cell are split at semicolons. A question without a best, a true or a false answer is omitted.

    Args and raises as `read_normal`.
    """
    table, columns = _read_normal(name)
    if len(columns) < 4:
        return {}
    questions, best, true, false = (table.cells(column, as_joined_text, "text") for column in columns)
    rows = zip(questions, best, true, false, strict=True)
    choices = {question: Choices(b.strip(), _split(t), _split(f)) for question, b, t, f in rows}
    return {question: choice for question, choice in choices.items() if choice.best and choice.true and choice.false}


def _split(answers: str) -> list[str]:
    return [answer.strip() for answer in answers.split(";") if answer.strip()]


def _read_normal(name: str | Path) -> tuple[Table, list[str]]:
    """The table, and its own names for NORMAL_COLUMNS and, if it has that, INCORRECT_COLUMN."""
    config, split = HUB_CONFIGS.get(str(name), (None, "train"))
    table = read_table(str(name), NORMAL_FIX, split=split, config=config)
    own_name = {_plain(column): column for column in table.columns}
    missing = [column for column in NORMAL_COLUMNS if _plain(column) not in own_name]
    if missing:
        raise table.missing(missing, NORMAL_FIX)
    wanted = (*NORMAL_COLUMNS, INCORRECT_COLUMN)
    return table, [own_name[_plain(column)] for column in wanted if _plain(column) in own_name]


def _plain(column: str) -> str:
    """A column name without its case, spaces and underscores."""
    return column.lower().replace(" ", "").replace("_", "")


def as_joined_text(value: Any) -> str:
    """A text, or a list of texts as one, with "; " between them."""
    return "; ".join(map(as_text, value)) if isinstance(value, list) else as_text(value)
