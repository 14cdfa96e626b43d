"""Any source as a table: hub data sets, folders, and .csv, .json, .jsonl and .parquet files.

Values are read by column name and parsed by functions such as `as_text`, which raise ValueError, TypeError, KeyError
or OverflowError for a value that they refuse.
"""

import errno
import hashlib
import io
import json
import re
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harmful_unlearn.errors import UserError, first_line
from harmful_unlearn.storage.files import user_path


@dataclass
class Table:
    """Rows from any source."""

    name: str  # of the source, for error messages
    columns: list[str]
    rows: int
    values: Callable[[str], list]  # `values(column)` lists a column's values in row order; None for a missing one
    source: dict  # name, revision, split, and sha256 (of a file)

    def cells(self, column: str, parse: Callable[[Any], Any], expected: str) -> list:
        """A column's values, parsed.

        Raises:
            UserError: `parse` refuses a value, which should have been `expected`. Rows are counted from 1, without
                the header and blank lines.
        """
        cells = []
        for row, value in enumerate(self.values(column), 1):
            try:
                cells.append(parse(value))
            except (KeyError, TypeError, ValueError, OverflowError):
                problem = f"{column} is {reprlib.repr(value)}, not {expected}"
                raise UserError(f"{self.name}, row {row}: {problem}: fix that row") from None
        return cells

    def missing(self, columns: Sequence[str], fix: str) -> UserError:
        """The error for columns that the table does not have."""
        has = ", ".join(self.columns)
        return UserError(f"{self.name} lacks the columns {', '.join(columns)} (it has {has}): {fix} with them")


def read_table(
    name: str, fix: str, revision: str | None = None, split: str = "train", config: str | None = None
) -> Table:
    """A table with at least one row.

    Args:
        name: a .csv, .json, .jsonl or .parquet file, a folder, or a hub id.
        fix: for error messages, how to give another source.
        revision, config: of a hub id.
        split: of a hub id or a folder; a file is read completely.

    Raises:
        UserError: the source cannot be read, or has no rows.
    """
    path = user_path(name)
    if path.is_dir():
        table = _load(str(path), fix, None, split, None)
    elif path.exists() or path.suffix.lower() in FORMATS or name.startswith((".", "/", "~")) or name.count("/") > 1:
        table = _read_file(path, fix)
    else:
        table = _load(name, fix, revision, split, config)
    if not table.rows:
        raise UserError(f"{name} has no rows: {fix}")
    return table


def _load(name: str, fix: str, revision: str | None, split: str, config: str | None) -> Table:
    """A hub data set, or a folder, by `datasets` (imported here: files do without)."""
    import datasets
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HTTPError

    try:
        dataset = datasets.load_dataset(name, config, revision=revision, split=split)
    except (DatasetsError, HTTPError, OSError, RuntimeError, ValueError) as error:
        cause: BaseException = error
        if isinstance(error, DatasetGenerationError) and error.__cause__:
            cause = error.__cause__
        if getattr(cause, "errno", None) == errno.ENOSPC:
            raise cause from None
        remedy = "check its split and its files"
        if isinstance(cause, DatasetNotFoundError):
            log_in = "log in with `hf auth login` or set HF_TOKEN"
            remedy = f"check its name and revision, and if it is gated or private {log_in}"
        elif isinstance(cause, HTTPError | ConnectionError | TimeoutError):
            remedy = "check the connection and HF_HUB_OFFLINE"
        raise UserError(f"cannot load {name} ({_reason(cause)}): {remedy}, or {fix}") from error

    # Without a connection to the hub, `datasets` takes whichever revision is in its cache.
    commit = re.search(r"@([0-9a-f]{40})/", " ".join(dataset.download_checksums or {}))
    loaded = commit.group(1) if commit else revision
    if re.fullmatch("[0-9a-f]{40}", revision or "") and loaded != revision:
        problem = f"cannot load revision {revision} of {name} (the cache has {loaded})"
        raise UserError(f"{problem}: connect to the hub, or {fix}")
    source = {"name": name, "revision": loaded, "split": split, "sha256": None}
    return Table(name, dataset.column_names, len(dataset), lambda column: dataset[column][:], source)


def _read_file(path: Path, fix: str) -> Table:
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path} is not in a known format: {fix}")
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file: {fix}")  # reading a device or a pipe may never end
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {fix}") from None
    if not content.strip():
        raise UserError(f"{path} is empty: {fix}")
    source = {"name": str(path), "revision": None, "split": None, "sha256": hashlib.sha256(content).hexdigest()}
    return Table(str(path), *FORMATS[path.suffix.lower()](content, path, fix), source)


def _decode(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None


_Columns = tuple[list[str], int, Callable[[str], list]]  # as in Table: columns, rows, values


def _read_csv(content: bytes, path: Path, fix: str) -> _Columns:
    import pandas

    text = _decode(content, path)
    try:
        # Every cell stays text: an answer may be the word "None" or "NA".
        frame = pandas.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
    except ValueError as error:
        reason = str(error).strip().removeprefix("Error tokenizing data. C error: ")
        raise UserError(f"{path} is not well-formed CSV ({reason}): fix it, or {fix}") from None
    if not isinstance(frame.index, pandas.RangeIndex):  # pandas took the extra cells for an index
        raise UserError(f"{path} has rows with more cells than its header: fix it, or {fix}")
    return list(frame.columns), len(frame), lambda column: frame[column].tolist()


def _read_json(content: bytes, path: Path, fix: str) -> _Columns:
    """A list of objects, or one object per line.

    By the json module: pandas.read_json silently drops half of a surrogate pair, and makes floats of whole numbers.
    """
    text = _decode(content, path)
    if text.lstrip().startswith("["):
        rows = {f"row {number}": row for number, row in enumerate(_parse_json(text, path, 1), 1)}
    else:
        lines = enumerate(text.split("\n"), 1)  # not splitlines(): a JSON string may hold U+2028
        rows = {f"line {number}": _parse_json(line, path, number) for number, line in lines if line.strip()}
    for place, row in rows.items():
        if not isinstance(row, dict):
            raise UserError(f"{path}, {place} is not a JSON object: fix it, or {fix}")
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    return columns, len(rows), lambda column: [row.get(column) for row in rows.values()]


def _parse_json(text: str, path: Path, first_line_number: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line = first_line_number + getattr(error, "lineno", 1) - 1
        raise UserError(f"{path}, line {line} is not JSON ({getattr(error, 'msg', error)}): fix it") from None


def _read_parquet(content: bytes, path: Path, fix: str) -> _Columns:
    """By pyarrow: pandas would make arrays of lists."""
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content))
        table.validate(full=True)  # a damaged file may pass until its values are used
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} is not a complete Parquet file ({_reason(error)}): {fix}") from None

    def values(column: str) -> list:
        try:
            return table[column].to_pylist()
        except (pyarrow.ArrowException, KeyError, OverflowError, ValueError) as error:  # a name twice, a year 10000
            problem = f"{path}: the column {column} cannot be read ({_reason(error)})"
            raise UserError(f"{problem}: fix it, or {fix}") from None

    return table.column_names, table.num_rows, values


def _reason(error: BaseException) -> str:
    return first_line(error).rstrip(".:")


FORMATS: dict[str, Callable[[bytes, Path, str], _Columns]] = {
    ".csv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
}


def is_missing(value: object) -> bool:
    """Whether a cell is empty: None, empty text or NaN."""
    return value is None or value == "" or value != value  # only NaN differs from itself


def as_text(value: Any) -> str:
    """Text; a missing value is empty text."""
    if is_missing(value):
        return ""
    if not isinstance(value, str):
        raise TypeError
    value.encode()  # JSON lets half of a surrogate pair through, which no tokenizer takes
    return value
