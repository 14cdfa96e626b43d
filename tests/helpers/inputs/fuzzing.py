"""What fuzzing draws: bytes, words, safetensors and data that are nearly right; FUZZ_EXAMPLES says how many."""

import csv
import io
import json
import math
import os
from datetime import timedelta
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save as serialized

from harmful_unlearn.data.pku_saferlhf import HARMFUL_COLUMNS
from harmful_unlearn.data.truthfulqa import INCORRECT_COLUMN, NORMAL_COLUMNS
from harmful_unlearn.storage.safetensors_io import DTYPE_CODES

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
COMMON = {
    "deadline": timedelta(seconds=20),
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much,
                              HealthCheck.large_base_example, HealthCheck.data_too_large],
}  # fmt: skip
settings.register_profile("suite", max_examples=80, derandomize=True, database=None, **COMMON)
settings.register_profile("fuzz", max_examples=max(EXAMPLES, 1), print_blob=True, **COMMON)
settings.load_profile("fuzz" if EXAMPLES else "suite")

TEXT = st.text(st.characters(exclude_categories=()), max_size=12)  # halves of surrogate pairs, too
ODD_NUMBERS = st.sampled_from([-1, 0, 1, 2**31, 2**32, 2**62, 2**63, 2**64, 10**400, 0.5, 1e300, math.nan, math.inf])
SCALARS = st.none() | st.booleans() | st.integers() | ODD_NUMBERS | st.floats() | TEXT
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))
DEEP = st.sampled_from(["[", "{", '{"a":', "(", "-", "[{"]).map(lambda opened: opened * 100_000)


@st.composite
def spoilt(draw, contents) -> bytes:
    """Bytes of `contents` with a few places overwritten, cut out or filled in, perhaps cut off."""
    content = bytearray(draw(contents))
    for _ in range(draw(st.integers(0, 3))):
        # Headers lie at the beginning, Parquet's at the end.
        at = draw(st.integers(0, 40) | st.integers(0, len(content)) | st.integers(1, 40).map(lambda n: -n))
        new = draw(st.binary(max_size=8) | st.sampled_from([b"\0", b"\xff" * 8, b"{", b'"', b"\n", b"]" * 3, b"9" * 9]))
        start = min(max(at if at >= 0 else len(content) + at, 0), len(content))
        content[start : start + draw(st.sampled_from([0, len(new), 5]))] = new
    return bytes(content[: draw(st.sampled_from([None, None, -1, len(content) // 2]))])


# --- safetensors ----------------------------------------------------------------------------------

DTYPES = st.sampled_from([*DTYPE_CODES, torch.float8_e4m3fn, torch.uint16, torch.complex64])
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@st.composite
def tensors(draw, dtypes=DTYPES, shapes=SHAPES) -> torch.Tensor:
    """Any bits, infinities and NaNs among them."""
    dtype, shape = draw(dtypes), draw(shapes)
    count = math.prod(shape) * dtype.itemsize
    content = bytearray(draw(st.binary(min_size=count, max_size=count)))
    if dtype == torch.bool:
        content = bytearray(byte & 1 for byte in content)
    return torch.frombuffer(content, dtype=dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def bits(tensor: torch.Tensor) -> tuple:
    return tensor.dtype, tensor.shape, tensor.contiguous().view(-1).view(torch.uint8).tolist()


STATES = st.dictionaries(TEXT.map(lambda name: name.encode(errors="replace").decode()), tensors(), max_size=3)
FILES = STATES.map(serialized)
DIMENSIONS = st.integers(0, 3) | ODD_NUMBERS | SCALARS
OFFSETS = st.integers(0, 24) | ODD_NUMBERS
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPE_CODES.values(), "F8_E4M3", "C64", "F4", "f32", ""]) | SCALARS,
        "shape": st.lists(DIMENSIONS, max_size=3) | JSON,
        "data_offsets": st.tuples(OFFSETS, OFFSETS).map(list) | JSON,
        "more": JSON,
    },
)


@st.composite
def near_headers(draw) -> bytes:
    """A header that looks like one, and some data."""
    entries = draw(st.dictionaries(TEXT, ENTRIES | JSON, max_size=3))
    if draw(st.booleans()):
        entries["__metadata__"] = draw(st.dictionaries(TEXT, TEXT, max_size=2) | JSON)
    text = json.dumps(entries).encode() + b" " * draw(st.integers(0, 9))
    length = draw(st.just(len(text)) | st.integers(0, 2**64 - 1) | st.integers(0, len(text) + 9))
    return length.to_bytes(8, "little") + text + draw(st.binary(max_size=24))


ANY_FILE = st.binary(max_size=64) | spoilt(FILES) | near_headers() | FILES


# --- data -----------------------------------------------------------------------------------------

SUFFIXES = st.sampled_from([".jsonl", ".json", ".csv", ".parquet"])
COLUMNS = [
    *HARMFUL_COLUMNS, *NORMAL_COLUMNS, INCORRECT_COLUMN, "response_0_harm_category", "response_1_harm_category",
    "response_0_severity_level", "response_1_severity_level",
]  # fmt: skip
LABELS = st.sampled_from([True, False, "true", "FALSE ", "1", 0, 1.0])
HARMS = st.dictionaries(st.sampled_from(["Crime", "Fraud"]) | TEXT, LABELS | SCALARS, max_size=2)
CELL_TEXTS = (
    st.sampled_from(
        [
            '{"a": true}',
            "{'a': True, 1: False}",
            "{None: True, 'b': True}",
            "{'\\ud800': True}",
            "nan",
            "-inf",
            "1e999",
            "{[]: 1}",
            "{**{}}",
            "{'a': b'x'}",
            "None",
            "{1j: True}",
            "0x1",
            "9" * 5000,
            "{'a': " + "9" * 5000 + "}",
            "\0",
        ]
    )
    | DEEP
)
NEAR_CELLS = LABELS | HARMS | HARMS.map(str) | HARMS.map(json.dumps) | CELL_TEXTS | JSON
GOOD_CELLS = {column: st.text(max_size=9) for column in COLUMNS}
GOOD_CELLS |= {column: LABELS for column in COLUMNS if column.endswith("_safe")}
GOOD_CELLS |= {column: HARMS for column in COLUMNS if column.endswith("_category")}
GOOD_CELLS |= {column: st.none() | st.integers(0, 3) for column in COLUMNS if column.endswith("_level")}


@st.composite
def near_rows(draw) -> list[dict]:
    """Rows with the columns of both data sets, of which a few cells, or columns, are not what they should be."""
    wanted = st.fixed_dictionaries({column: GOOD_CELLS[column] for column in COLUMNS})
    rows = draw(st.lists(wanted, min_size=1, max_size=3))
    for _ in range(draw(st.integers(0, 2))):
        row, column = draw(st.sampled_from(rows)), draw(st.sampled_from(COLUMNS) | TEXT)
        if draw(st.integers(0, 5)):
            row[column] = draw(NEAR_CELLS)
        else:
            row.pop(column, None)
    return rows


def written(rows: list[dict], suffix: str) -> bytes:
    if suffix == ".json":
        return json.dumps(rows).encode()
    if suffix == ".jsonl":
        return "\n".join(map(json.dumps, rows)).encode()
    if suffix == ".csv":
        text = io.StringIO()
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(text, names)
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode(errors="replace")
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


@st.composite
def data_files(draw) -> tuple[str, bytes]:
    """(suffix, content): any bytes, near misses, and near misses with some bytes spoilt."""
    suffix = draw(SUFFIXES)
    if not draw(st.integers(0, 4)):
        return suffix, draw(
            st.binary(max_size=60) | TEXT.map(lambda text: text.encode(errors="replace")) | DEEP.map(str.encode)
        )
    try:
        content = written(draw(near_rows()), suffix)
    except (pyarrow.ArrowException, ValueError, OverflowError, TypeError, csv.Error):
        assume(False)  # not every row can be written as every format
    return suffix, draw(spoilt(st.just(content))) if draw(st.booleans()) else content


PLAIN = {column: "0" if column.endswith("_safe") else "x" for column in (*HARMFUL_COLUMNS, *NORMAL_COLUMNS)}
PLAIN |= {f"response_{i}_harm_category": "{}" for i in (0, 1)} | {f"response_{i}_severity_level": 1 for i in (0, 1)}


def one_row(suffix: str, **cells) -> tuple[str, bytes]:
    return suffix, written([{**PLAIN, **cells}], suffix)


def odd_parquet(cell: pyarrow.Array, *names: str) -> tuple[str, bytes]:
    """One row with columns of these names that hold this cell, beside those that are needed."""
    columns = {name: pyarrow.array([value]) for name, value in PLAIN.items() if name not in names}
    table = pyarrow.table([*columns.values(), *(cell for _ in names)], [*columns, *names])
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file)
    return ".parquet", file.getvalue()


def read_by_library(path: Path) -> dict | None:
    """What safetensors' own reader gives; None where it refuses the file."""
    try:
        with safe_open(path, "pt") as file:
            return {name: bits(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except BaseException as error:  # noqa: B036 (a panic in Rust is one)
        assert not isinstance(error, KeyboardInterrupt)
        return None
