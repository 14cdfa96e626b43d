"""Any source as a table: hub data sets, folders, and .csv, .json, .jsonl and .parquet files.

Values are read by column name and parsed by the functions at the end, which raise ValueError,
TypeError, KeyError or OverflowError on what they cannot take.
"""

import ast
import errno
import functools
import hashlib
import io
import json
import re
import reprlib
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harmful_unlearn.errors import UserError
from harmful_unlearn.storage.files import user_path


@dataclass
class Table:
    """Rows from anywhere: `column(name)` lists a column's values in row order."""

    name: str
    names: list[str]
    rows: int
    column: Callable[[str], list]
    source: dict

    def cells(self, column: str, parse: Callable[[Any], Any], expected: str) -> list:
        """A column's values, parsed. Rows count from 1, header and blank lines apart.

        Raises:
            UserError: `parse` refuses a value, which is then no `expected`.
        """
        cells = []
        for row, value in enumerate(self.column(column), 1):
            try:
                cells.append(parse(value))
            except (KeyError, TypeError, ValueError, OverflowError):
                raise UserError(
                    f"{self.name}, row {row}: {column} is {reprlib.repr(value)}, not {expected}: mend that row"
                ) from None
        return cells

    def lacks(self, missing: Sequence[str], fix: str) -> UserError:
        """The error for columns that are not there."""
        has = ", ".join(self.names)
        return UserError(f"{self.name} lacks the columns {', '.join(missing)} (it has {has}): {fix} with them")


def read_table(
    name: str, fix: str, revision: str | None = None, split: str = "train", config: str | None = None
) -> Table:
    """Any source as a table with at least one row. `fix` tells how to give another source."""
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
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        cause = cause or error
        if getattr(cause, "errno", None) == errno.ENOSPC:
            raise cause from None
        if isinstance(cause, DatasetNotFoundError):
            remedy = (
                "check its name and revision, and if it is gated or private log in with `hf auth login` or set HF_TOKEN"
            )
        elif isinstance(cause, HTTPError | ConnectionError | TimeoutError):
            remedy = "check the connection and HF_HUB_OFFLINE"
        else:
            remedy = "check its split and its files"
        raise UserError(f"cannot load {name} ({_reason(cause)}): {remedy}, or {fix}") from error

    # Out of reach of the hub, `datasets` takes whichever revision its cache holds.
    urls = " ".join(dataset.download_checksums or {})
    commit = re.search(r"@([0-9a-f]{40})/", urls)
    found = commit.group(1) if commit else revision
    if re.fullmatch("[0-9a-f]{40}", revision or "") and found != revision:
        raise UserError(
            f"cannot load revision {revision} of {name} (the cache has {found}): connect to the hub, or {fix}"
        )
    source = {"name": name, "revision": found, "split": split, "sha256": None}
    return Table(name, dataset.column_names, len(dataset), lambda key: dataset[key][:], source)


def _read_file(path: Path, fix: str) -> Table:
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path} is in no known format: {fix}")
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path} is no regular file: {fix}")  # /dev/zero has no end, and a pipe may have no writer
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {fix}") from None
    if not content.strip():
        raise UserError(f"{path} is empty: {fix}")
    names, rows, column = FORMATS[path.suffix.lower()](content, path, fix)
    sha256 = hashlib.sha256(content).hexdigest()
    source = {"name": str(path), "revision": None, "split": None, "sha256": sha256}
    return Table(str(path), names, rows, column, source)


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
        table.validate(full=True)  # a spoilt file may pass until its values are used
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} is no whole Parquet file ({_reason(error)}): {fix}") from None

    def column(key: str) -> list:
        try:
            return table[key].to_pylist()
        except (pyarrow.ArrowException, KeyError, OverflowError, ValueError) as error:  # two of a name, a year 10000
            raise UserError(f"{path}: the column {key} cannot be read ({_reason(error)}): mend it, or {fix}") from None

    return table.column_names, table.num_rows, column


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")


FORMATS = {".csv": _read_csv, ".json": _read_json, ".jsonl": _read_json, ".parquet": _read_parquet}


def plain(column: str) -> str:
    """A column name without its case, spaces and underscores."""
    return column.lower().replace(" ", "").replace("_", "")


def _absent(value: object) -> bool:
    return value is None or value == "" or value != value  # only NaN differs from itself


def as_text(value: Any) -> str:
    """Text; an absent value is empty text."""
    if _absent(value):
        return ""
    if not isinstance(value, str):
        raise TypeError
    value.encode()  # half a surrogate pair, which JSON lets through, is no text to any tokenizer
    return value


def joined(value: Any) -> str:
    """Text, or a list of texts as one, with "; " between them."""
    return "; ".join(map(as_text, value)) if isinstance(value, list) else as_text(value)


_LABELS = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}


def as_label(value: Any) -> bool:
    """True or false, as a bool, a number or a word."""
    return _LABELS[value.strip().lower() if isinstance(value, str) else value]


def as_harms(value: Any) -> dict[str, bool]:
    """A harm_category cell: category to bool."""
    if _absent(value):
        return {}
    if isinstance(value, str):
        return _harms_in(value)
    if not isinstance(value, dict):
        raise TypeError
    return {as_text(category): flag is not None and as_label(flag) for category, flag in value.items()}


@functools.cache  # a CSV has few different ones among its many rows
def _harms_in(text: str) -> dict[str, bool]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, MemoryError, RecursionError) as error:
            raise ValueError from error
    if not isinstance(value, dict):
        raise TypeError
    return as_harms(value)


def as_severity(value: Any) -> float:
    """A number; 0 for an absent value."""
    return 0.0 if _absent(value) else float(value)
