"""TruthfulQA: normal texts (PD), their split, and the multiple choices of MC1 and MC2."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harmful_unlearn.data.batch_sampler import SPLIT
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.data.tables import Table, joined, plain, read_table

NORMAL_COLUMNS = ("Question", "Best Answer", "Correct Answers")
INCORRECT_COLUMN = "Incorrect Answers"
HUB_CONFIGS = {"truthfulqa/truthful_qa": ("generation", "validation")}  # name: (config, split)
NORMAL_FIX = (
    "run `make data` for the original TruthfulQA.csv, or give --normal_dataset a local "
    ".csv, .jsonl, .json or .parquet file"
)


@dataclass
class NormalData:
    """Normal texts, for PD, and their random split of 70 / 10 / 20 % (released code, point 6).

    Attributes:
        texts: each question with its best answer, then each with all its correct answers.
        train, validation, test: indices into `texts`.
        source: name, revision, split, sha256 (of a file), rows, texts, train, validation, test.
    """

    texts: list[Pair]
    train: list[int]
    validation: list[int]
    test: list[int]
    source: dict


def read_normal(name: str | Path, seed: int) -> NormalData:
    """TruthfulQA, or anything with its columns Question, Best Answer and Correct Answers.

    Column names match whatever their case, spaces and underscores. Correct answers are one text,
    semicolons included; a list of them is joined with "; ".

    Args:
        name: a .csv, .jsonl, .json or .parquet file, a folder, or a hub id (its split "train"; of
            truthfulqa/truthful_qa, "validation").
        seed: of the split.

    Raises:
        UserError: the data cannot be had, lack a column, or hold something that is no text.
    """
    table, columns = _read_normal(name)
    questions, best, correct = (table.cells(column, joined, "text") for column in columns[:3])
    texts = [
        Pair(question, answer)
        for answers in (best, correct)
        for question, answer in zip(questions, answers, strict=True)
    ]
    order = np.random.default_rng([seed, SPLIT]).permutation(len(texts)).tolist()
    trained, validated = int(0.7 * len(texts)), int(0.1 * len(texts))
    parts = {
        "train": order[:trained],
        "validation": order[trained : trained + validated],
        "test": order[trained + validated :],
    }
    sizes = {part: len(rows) for part, rows in parts.items()}
    source = {**table.source, "rows": table.rows, "texts": len(texts), **sizes}
    return NormalData(texts, **parts, source=source)


@dataclass(frozen=True)
class Choices:
    """The answers of a TruthfulQA question, for its multiple-choice scores.

    Attributes:
        best: the one best answer.
        true: all correct answers.
        false: all incorrect answers.
    """

    best: str
    true: list[str]
    false: list[str]


def read_choices(name: str | Path) -> dict[str, Choices]:
    """The multiple choices of `read_normal`'s data, by question; empty without "Incorrect Answers".

    Lists in one cell are split at semicolons. A question without any true or false answer is left out.

    Args and raises as `read_normal`.
    """
    table, columns = _read_normal(name)
    if len(columns) < 4:
        return {}
    cells = [table.cells(column, joined, "text") for column in columns]
    parts = [[[part.strip() for part in cell.split(";") if part.strip()] for cell in column] for column in cells[2:]]
    choices = {
        question: Choices(best.strip(), true, false)
        for question, best, true, false in zip(*cells[:2], *parts, strict=True)
    }
    return {question: found for question, found in choices.items() if found.best and found.true and found.false}


def _read_normal(name: str | Path) -> tuple[Table, list[str]]:
    """The table, and its columns for NORMAL_COLUMNS and, where there is one, INCORRECT_COLUMN."""
    config, split = HUB_CONFIGS.get(str(name), (None, "train"))
    table = read_table(str(name), NORMAL_FIX, split=split, config=config)
    found = {plain(column): column for column in table.names}
    missing = [column for column in NORMAL_COLUMNS if plain(column) not in found]
    if missing:
        raise table.lacks(missing, NORMAL_FIX)
    return table, [found[plain(c)] for c in (*NORMAL_COLUMNS, INCORRECT_COLUMN) if plain(c) in found]
