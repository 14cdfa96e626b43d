"""What SKU learns from: harmful pairs, the answer pool, normal texts, and the order of batches.

The readers take PKU-SafeRLHF and TruthfulQA from the hub or from a file, in the columns of early
2024 or of today, by name. Nothing here knows of tokens or tensors.

The normal split, the shuffling of normal texts and the draws of random answers have the
distributions of the released code, not its random streams: those depend on everything that used the
global generator before. Here each draw is a function of the seed, of what it is for (SPLIT, SHUFFLE
or ANSWERS) and of the epoch or step: a run resumes at any step without a replay, and its order does
not depend on the number of processes.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harmful_unlearn.errors import UserError
from harmful_unlearn.readers import Table, as_harms, as_label, as_severity, as_text, joined, plain, read_table

SPLIT, SHUFFLE, ANSWERS = range(3)  # random streams

HARMFUL_COLUMNS = (
    "prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe",
)
NORMAL_COLUMNS = ("Question", "Best Answer", "Correct Answers")
INCORRECT_COLUMN = "Incorrect Answers"
HUB_CONFIGS = {"truthfulqa/truthful_qa": ("generation", "validation")}  # name: (config, split)

HARMFUL_FIX = "give --harmful_dataset a local .jsonl, .json, .csv or .parquet file"
NORMAL_FIX = (
    "run `make data` for the original TruthfulQA.csv, or give --normal_dataset a local "
    ".csv, .jsonl, .json or .parquet file"
)


@dataclass(frozen=True)
class Pair:
    """A question and one answer to it."""

    question: str
    answer: str


def format_prefix(question: str) -> str:
    """All of a pair's text before its answer, the last space included (released code, point 1)."""
    return f"### Question: {question}\n ### Answer: "


def format_pair(question: str, answer: str) -> str:
    """A pair's text (released code, point 1)."""
    return format_prefix(question) + answer


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
            f"{table.name} has no unsafe response that --harm_category and --min_severity leave: "
            "select less narrowly"
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
        for row in range(table.rows) for i in (0, 1)
    ]  # fmt: skip


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


@dataclass(frozen=True)
class Draw:
    """What one step trains on.

    Attributes:
        harmful_rows: indices into `HarmfulData.pairs`.
        normal_rows: indices into `NormalData.texts`.
        answer_rows: K distinct indices into `HarmfulData.answers`, shared by the batch's questions.
    """

    harmful_rows: list[int]
    normal_rows: list[int]
    answer_rows: list[int]


class BatchOrder:
    """`order[step]`: which rows a step uses, whatever came before it.

    Harmful pairs keep their order; normal training texts are shuffled anew each epoch; the last
    batch of a pass may be smaller. An epoch ends when the shorter of the two ends, and both start
    again, so that GD may never see the later pairs (released code, points 2, 6 and 7). K answers
    are drawn without replacement, once a step (point 11).

    Args:
        pairs: number of harmful pairs.
        normal: the normal training texts (`NormalData.train`).
        answers: size of the answer pool.
        batch_size: B, for each of the two.
        k_random: K.
        seed: of the shuffling and of the draws.
        all_harmful: go through all harmful pairs and all normal texts, each starting again at its
            own end.

    Raises:
        UserError: the pool has fewer than K answers.
    """

    def __init__(
        self,
        pairs: int,
        normal: Sequence[int],
        answers: int,
        batch_size: int,
        k_random: int,
        seed: int,
        all_harmful: bool = False,
    ):
        if k_random > answers:
            raise UserError(
                f"--k_random {k_random} asks for more answers than there are unsafe ones: "
                f"give at most {answers}"
            )
        self._pairs, self._normal, self._answers = pairs, np.asarray(normal), answers
        self._batch_size, self._k_random, self._seed = batch_size, k_random, seed
        self._harmful_batches = math.ceil(pairs / batch_size)
        self._normal_batches = math.ceil(len(normal) / batch_size)
        if not all_harmful:
            shorter = min(self._harmful_batches, self._normal_batches)
            self._harmful_batches = self._normal_batches = shorter
        # An epoch's order is asked for once a batch, and epochs come one after the other.
        self._shuffled = functools.lru_cache(maxsize=1)(self._shuffle)

    @property
    def batches_per_epoch(self) -> int:
        """Steps until the harmful pairs start again."""
        return self._harmful_batches

    def __getitem__(self, step: int) -> Draw:
        start = step % self._harmful_batches * self._batch_size
        harmful = list(range(start, min(start + self._batch_size, self._pairs)))
        epoch, batch = divmod(step, self._normal_batches)
        start = batch * self._batch_size
        normal = self._shuffled(epoch)[start : start + self._batch_size]
        generator = np.random.default_rng([self._seed, ANSWERS, step])
        answers = generator.choice(self._answers, self._k_random, replace=False)
        return Draw(harmful, normal, answers.tolist())

    def _shuffle(self, epoch: int) -> list[int]:
        generator = np.random.default_rng([self._seed, SHUFFLE, epoch])
        return generator.permutation(self._normal).tolist()


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
