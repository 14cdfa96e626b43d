"""What SKU learns from: harmful pairs, the answer pool, normal texts, and the order of batches.

The readers take PKU-SafeRLHF and TruthfulQA from the hub or from a file, in the columns of early
2024 or of today, by name. Nothing here knows of tokens or tensors.

The normal split, the shuffling of normal texts and the draws of random answers have the
distributions of the released code, not its random streams: those depend on everything that used the
global generator before. Here each draw is a function of the seed, of what it is for (SPLIT, SHUFFLE
or ANSWERS) and of the epoch or step: a run resumes at any step without a replay, and its order does
not depend on the number of processes.
"""

import ast
import errno
import functools
import hashlib
import io
import json
import math
import re
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harmful_unlearn.errors import UserError

SPLIT, SHUFFLE, ANSWERS = range(3)  # random streams

HARMFUL_COLUMNS = (
    "prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe",
)
NORMAL_COLUMNS = ("Question", "Best Answer", "Correct Answers")
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


@dataclass
class HarmfulData:
    """Harmful pairs, for GD, and the pool of harmful answers, for RD.

    Attributes:
        pairs: for each row in order, response_0 if unsafe, then response_1 if unsafe
            (released code, point 2).
        answers: every unsafe response_0 in row order, then every unsafe response_1
            (released code, point 5).
        rows: rows read, before the selection.
        source: name, revision, split, sha256 (of a file), rows, pairs, selection.
    """

    pairs: list[Pair]
    answers: list[str]
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
    table = _read(name, HARMFUL_FIX, revision, split)
    missing = [column for column in HARMFUL_COLUMNS if column not in table.names]
    if missing:
        raise _missing_columns(table, missing, HARMFUL_FIX)
    prompts = _cells(table, "prompt", _text, "text")
    responses = [_cells(table, f"response_{i}", _text, "text") for i in (0, 1)]
    safe = [_cells(table, f"is_response_{i}_safe", _label, "true or false") for i in (0, 1)]
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
    pairs = [Pair(prompts[row], responses[i][row]) for row, i in np.argwhere(keep.T).tolist()]
    answers = [responses[i][row] for i, row in np.argwhere(keep).tolist()]
    selection = {"categories": list(categories), "min_severity": min_severity}
    source = {**table.source, "rows": table.rows, "pairs": len(pairs), "selection": selection}
    return HarmfulData(pairs, answers, table.rows, source)


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
    config, split = HUB_CONFIGS.get(str(name), (None, "train"))
    table = _read(str(name), NORMAL_FIX, split=split, config=config)
    found = {_plain(column): column for column in table.names}
    missing = [column for column in NORMAL_COLUMNS if _plain(column) not in found]
    if missing:
        raise _missing_columns(table, missing, NORMAL_FIX)
    questions, best, correct = (
        _cells(table, found[_plain(column)], _joined, "text") for column in NORMAL_COLUMNS
    )
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


@dataclass
class _Table:
    """Rows from anywhere: `column(name)` lists a column's values in row order."""

    name: str
    names: list[str]
    rows: int
    column: Callable[[str], list]
    source: dict


def _read(
    name: str,
    fix: str,
    revision: str | None = None,
    split: str = "train",
    config: str | None = None,
) -> _Table:
    """Any source as a table with at least one row. `fix` tells how to give another source."""
    path = Path(name).expanduser()
    if path.is_dir():
        table = _load(str(path), fix, None, split, None)
    elif (
        path.exists() or path.suffix.lower() in FORMATS
        or name.startswith((".", "/", "~")) or name.count("/") > 1
    ):
        table = _read_file(path, fix)
    else:
        table = _load(name, fix, revision, split, config)
    if not table.rows:
        raise UserError(f"{name} has no rows: {fix}")
    return table


def _load(name: str, fix: str, revision: str | None, split: str, config: str | None) -> _Table:
    """A hub data set, or a folder, by `datasets` (imported here: files do without)."""
    import datasets
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HTTPError

    try:
        dataset = datasets.load_dataset(name, config, revision=revision, split=split)
    except (DatasetsError, HTTPError, OSError, RuntimeError, ValueError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        cause = cause or error
        if getattr(cause, "errno", None) == errno.ENOSPC:
            raise cause from None
        if isinstance(cause, DatasetNotFoundError):
            remedy = (
                "check its name and revision, and if it is gated or private log in with "
                "`hf auth login` or set HF_TOKEN"
            )
        elif isinstance(cause, HTTPError | ConnectionError | TimeoutError):
            remedy = "check the connection and HF_HUB_OFFLINE"
        else:
            remedy = "check its split and its files"
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0].rstrip(".:")
        raise UserError(f"cannot load {name} ({reason}): {remedy}, or {fix}") from error

    # Out of reach of the hub, `datasets` takes whichever revision its cache holds.
    urls = " ".join(dataset.download_checksums or {})
    commit = re.search(r"@([0-9a-f]{40})/", urls)
    found = commit.group(1) if commit else revision
    if re.fullmatch("[0-9a-f]{40}", revision or "") and found != revision:
        raise UserError(
            f"cannot load revision {revision} of {name} (the cache has {found}): connect to the "
            f"hub, or {fix}"
        )
    source = {"name": name, "revision": found, "split": split, "sha256": None}
    return _Table(name, dataset.column_names, len(dataset), lambda key: dataset[key][:], source)


def _read_file(path: Path, fix: str) -> _Table:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {fix}") from None
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path} is in no known format: {fix}")
    if not content.strip():
        raise UserError(f"{path} is empty: {fix}")
    names, rows, column = FORMATS[path.suffix.lower()](content, path, fix)
    sha256 = hashlib.sha256(content).hexdigest()
    source = {"name": str(path), "revision": None, "split": None, "sha256": sha256}
    return _Table(str(path), names, rows, column, source)


def _decode(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None


def _read_csv(content: bytes, path: Path, fix: str) -> tuple:
    import pandas

    text = _decode(content, path)
    try:
        # Every cell as it stands: an answer may be the word "None" or "NA".
        frame = pandas.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
    except ValueError as error:
        reason = str(error).strip().removeprefix("Error tokenizing data. C error: ")
        raise UserError(f"{path} is no well-formed CSV ({reason}): mend it, or {fix}") from None
    if not isinstance(frame.index, pandas.RangeIndex):  # pandas took the extra cells for an index
        raise UserError(f"{path} has rows with more cells than its header: mend it, or {fix}")
    return list(frame.columns), len(frame), lambda key: frame[key].tolist()


def _read_json(content: bytes, path: Path, fix: str) -> tuple:
    """One list of objects, or an object a line."""
    text = _decode(content, path)
    whole = text.lstrip().startswith("[")
    # Not splitlines(): JSON strings may hold U+2028 and its like as they are.
    lines = [text] if whole else text.split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            where = getattr(error, "lineno", 1) if whole else number
            reason = getattr(error, "msg", error)
            raise UserError(f"{path}, line {where} is no JSON ({reason}): mend it") from None
        for index, row in enumerate(value if whole else [value], 1):
            if not isinstance(row, dict):
                where = f"row {index}" if whole else f"line {number}"
                raise UserError(f"{path}, {where} is no JSON object: mend it, or {fix}")
            rows.append(row)
    names = list(dict.fromkeys(key for row in rows for key in row))
    return names, len(rows), lambda key: [row.get(key) for row in rows]


def _read_parquet(content: bytes, path: Path, fix: str) -> tuple:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content))
    except (OSError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".:")
        raise UserError(f"{path} is no whole Parquet file ({reason}): {fix}") from None
    return table.column_names, table.num_rows, lambda key: table[key].to_pylist()


FORMATS = {
    ".csv": _read_csv, ".json": _read_json, ".jsonl": _read_json, ".parquet": _read_parquet,
}


def _plain(column: str) -> str:
    return column.lower().replace(" ", "").replace("_", "")


def _missing_columns(table: _Table, missing: list[str], fix: str) -> UserError:
    return UserError(
        f"{table.name} lacks the columns {', '.join(missing)} (it has "
        f"{', '.join(table.names)}): {fix} with them"
    )


def _cells(table: _Table, column: str, parse: Callable[[Any], Any], expected: str) -> list:
    """A column's values, parsed. Rows count from 1, header and blank lines apart."""
    cells = []
    for row, value in enumerate(table.column(column), 1):
        try:
            cells.append(parse(value))
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{table.name}, row {row}: {column} is {reprlib.repr(value)}, not {expected}: "
                "mend that row"
            ) from None
    return cells


def _absent(value: object) -> bool:
    return value is None or value == "" or value != value  # only NaN differs from itself


def _text(value: Any) -> str:
    if _absent(value):
        return ""
    if not isinstance(value, str):
        raise TypeError
    value.encode()  # half a surrogate pair, which JSON lets through, is no text to any tokenizer
    return value


def _joined(value: Any) -> str:
    return "; ".join(map(_text, value)) if isinstance(value, list) else _text(value)


_LABELS = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}


def _label(value: Any) -> bool:
    return _LABELS[value.strip().lower() if isinstance(value, str) else value]


def _harms(value: Any) -> dict[str, bool]:
    """A harm_category cell: category to bool."""
    if _absent(value):
        return {}
    if isinstance(value, str):
        return _harms_in(value)
    if not isinstance(value, dict):
        raise TypeError
    return {category: flag is not None and _label(flag) for category, flag in value.items()}


@functools.cache  # a CSV has few different ones among its many rows
def _harms_in(text: str) -> dict[str, bool]:
    try:
        value = json.loads(text)
    except ValueError:
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, MemoryError, RecursionError) as error:
            raise ValueError from error
    if not isinstance(value, dict):
        raise TypeError
    return _harms(value)


def _severity(value: Any) -> float:
    return 0.0 if _absent(value) else float(value)


def _selectable(table: _Table, kind: str, flag: str) -> list[str]:
    columns = [f"response_{i}_{kind}" for i in (0, 1)]
    if not set(columns) <= set(table.names):
        raise UserError(
            f"{table.name} has no columns {' and '.join(columns)} to select by (the data of early "
            f"2024 had none): use today's with --harmful_revision main, or leave {flag} out"
        )
    return columns


def _in_categories(table: _Table, categories: Sequence[str]) -> np.ndarray:
    """Whether each response is in one of the categories: bool [2, rows]."""
    columns = _selectable(table, "harm_category", "--harm_category")
    harms = [_cells(table, column, _harms, "a dictionary of true and false") for column in columns]
    known = sorted(set().union(*(cell for cells in harms for cell in cells)))
    unknown = [category for category in categories if category not in known]
    if unknown:
        raise UserError(
            f"{table.name} has no --harm_category {', '.join(map(repr, unknown))}: "
            f"take from {', '.join(map(repr, known))}"
        )
    return np.array([[any(map(cell.get, categories)) for cell in cells] for cells in harms])


def _severities(table: _Table) -> np.ndarray:
    """Each response's level of severity: float [2, rows]."""
    columns = _selectable(table, "severity_level", "--min_severity")
    return np.array([_cells(table, column, _severity, "a number") for column in columns])
