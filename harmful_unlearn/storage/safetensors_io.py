"""Folders of safetensors, read and written a chunk at a time; the library reads and writes complete entries."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from harmful_unlearn.errors import UserError
from harmful_unlearn.storage.files import read_json

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
# A stem is the start of the file names: "model" of model.safetensors or model-00001-of-00002.safetensors.
INDEX_NAME = "{}.safetensors.index.json"
VECTOR_STEM = "task_vector"
WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".pkl",
}  # fmt: skip
SMALL_FILE = 100 * 2**20  # bytes; the largest tokenizers have about 35 MB
CHUNK_ELEMENTS = 2**19  # 2 MB in float32: a few chunks fit into a core's cache


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite. True without a check for 8-bit floats, which torch cannot sum."""
    # If a value is not finite, nor is the sum, which takes a few hundredths of isfinite's time. But the sum of large
    # finite values may overflow, too.
    if not values.is_floating_point() or values.itemsize == 1 or math.isfinite(values.sum()):
        return True
    return bool(values.isfinite().all())


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in, for entries of a dtype: float32, or float64 for float64 (implementation detail 16)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


SAMPLE = 2**16  # bytes of each entry that a fingerprint reads


class TensorSpec(NamedTuple):
    """An entry's dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def chunks(self) -> Iterator[slice]:
        """The flattened entry cut into chunks of complete rows, of about CHUNK_ELEMENTS elements each."""
        row = max(self.shape[-1], 1) if len(self.shape) > 1 else 1
        step = max(CHUNK_ELEMENTS // row, 1) * row
        size = math.prod(self.shape)
        for start in range(0, size, step):
            yield slice(start, min(start + step, size))


class Buffers(threading.local):
    """Flat tensors that a thread reuses; each thread has its own."""

    def __init__(self):
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, role: str, size: int, dtype: torch.dtype) -> Tensor:
        """The buffer for a role, with values from its last use."""
        buffer = self._buffers.get((role, dtype))
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[role, dtype] = torch.empty(size, dtype=dtype)
        return buffer[:size]


class SafetensorsFolder:
    """The safetensors of a folder, one file or shards with an index. Opening reads headers only.

    Attributes:
        specs: every entry's dtype and shape.
        shards: file name -> its entries, in the order of their bytes.
        metadata: of the last file's header.

    Raises:
        UserError: no folder, no safetensors, a shard that is missing, broken, or does not fit the index.
    """

    def __init__(self, folder: Path, stem: str = "model"):
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}: check the path")
        self.folder, self.stem = folder, stem
        self.index = folder / INDEX_NAME.format(stem)
        file = folder / f"{stem}.safetensors"
        if not file.is_file() and not self.index.is_file():
            raise UserError(_no_safetensors(folder))
        weight_map = {} if file.is_file() else read_index(self.index)
        self.specs: dict[str, TensorSpec] = {}
        self.shards: dict[str, list[str]] = {}
        self._offsets: dict[str, tuple[Path, int]] = {}  # entry -> its file, and where its bytes start in that
        self._buffers = Buffers()
        for name in sorted(set(weight_map.values())) or [file.name]:
            self._open(folder / name)
        missing = [name for name, shard in weight_map.items() if name not in self.shards[shard]]
        if missing:
            raise UserError(
                f"{folder / weight_map[missing[0]]} lacks {missing[0]}, which {self.index.name} expects there "
                f"({len(missing)} such entries): copy the model folder again"
            )

    def _open(self, path: Path) -> None:
        if not os.path.isfile(path):  # False also for a name that no file can have
            raise UserError(f"{path} is missing: the model folder is incomplete, copy or download it again")
        try:
            # It validates the header. Data is not read through its memory map, which would count as memory (RSS).
            with safe_open(path, framework="pt") as handle:
                self.metadata = handle.metadata() or {"format": "pt"}
                self.shards[path.name] = list(handle.offset_keys())
        except SafetensorError as error:
            raise UserError(f"{path} is broken ({error}): copy or download it again") from None
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            pairs = json.loads(file.read(length), object_pairs_hook=list)
        header = {name: dict(entry) for name, entry in pairs}
        if len(header) < len(pairs):
            raise UserError(f"{path} has two entries of one name: copy or download it again")
        for name in self.shards[path.name]:
            entry = header[name]
            if entry["dtype"] not in DTYPES:
                raise UserError(f"{name} in {path} is {entry['dtype']}: give a model that is not quantized")
            if name in self._offsets:
                raise UserError(f"{name} is in two shards of {path.parent}: save the model again")
            self.specs[name] = TensorSpec(DTYPES[entry["dtype"]], tuple(entry["shape"]))
            self._offsets[name] = path, 8 + length + entry["data_offsets"][0]

    def fingerprint(self) -> str:
        """SHA-256 of every shard's header and the first 64 KiB of each entry: tells models of the same shapes apart.

        A single weight that differs may be missed; a training that changed a few matrices is not.
        """
        digest = hashlib.sha256()
        for shard, names in self.shards.items():
            with (self.folder / shard).open("rb") as file:
                header = file.read(8)
                digest.update(header + file.read(int.from_bytes(header, "little")))
                for name in names:
                    spec = self.specs[name]
                    file.seek(self._offsets[name][1])
                    digest.update(file.read(min(spec.nbytes, SAMPLE)))
        return digest.hexdigest()

    def read(self, name: str) -> Tensor:
        """One entry, on the CPU, in its own dtype."""
        spec = self.specs[name]
        return self.read_into(torch.empty(spec.shape, dtype=spec.dtype), name)

    def read_into(self, out: Tensor, name: str, start: int = 0) -> Tensor:
        """Fill `out` with elements of an entry, from `start`, in its dtype. Raises UserError: the file is too short."""
        path, offset = self._offsets[name]
        dtype = self.specs[name].dtype
        stored = out if out.dtype == dtype else self._buffers("stored", out.numel(), dtype)
        unread = _bytes(stored)
        with path.open("rb", buffering=0) as file:  # opened for each read: threads share no position in it
            file.seek(offset + start * stored.itemsize)
            while unread:
                count = file.readinto(unread)
                if not count:
                    raise UserError(f"{path} became shorter while it was read: copy or download it again")
                unread = unread[count:]
        return out if stored is out else out.copy_(stored)

    def equal(self, name: str, other: str) -> bool:
        """Whether two entries have the same values, shape and dtype."""
        spec = self.specs[name]

        def chunk(entry: str, span: slice) -> Tensor:
            return self.read_into(torch.empty(span.stop - span.start, dtype=spec.dtype), entry, span.start)

        same_spec = spec == self.specs[other]
        return same_spec and all(torch.equal(chunk(name, span), chunk(other, span)) for span in spec.chunks())


class ShardWriter:
    """Writes safetensors files chunk by chunk. Creating it writes the headers and reserves disk space for the data.

    `shards` has the entries of each file, in the order of their bytes. Raises OSError: no space.
    """

    def __init__(self, folder: Path, shards: Mapping[str, Mapping[str, TensorSpec]], metadata: dict[str, str]):
        self._offsets: dict[str, tuple[Path, int]] = {}
        for shard, specs in shards.items():
            header: dict[str, dict] = {"__metadata__": metadata}
            end = 0
            for name, spec in specs.items():
                start, end = end, end + spec.nbytes
                header[name] = {"dtype": DTYPE_CODES[spec.dtype], "shape": spec.shape, "data_offsets": [start, end]}
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)  # aligns the data
            with (folder / shard).open("wb", buffering=0) as file:
                _reserve(file.fileno(), 8 + len(text) + end)
                file.write(len(text).to_bytes(8, "little") + text)
            for name in specs:
                self._offsets[name] = folder / shard, 8 + len(text) + header[name]["data_offsets"][0]

    def __contains__(self, name: str) -> bool:
        return name in self._offsets

    def write(self, values: Tensor, name: str, start: int = 0) -> None:
        """Write elements of the flattened entry, from `start`; `values` has the entry's dtype."""
        path, offset = self._offsets[name]
        unwritten = _bytes(values.detach().cpu().contiguous())
        with path.open("r+b", buffering=0) as file:
            file.seek(offset + start * values.itemsize)
            while unwritten:
                unwritten = unwritten[file.write(unwritten) :]


def _reserve(file: int, size: int) -> None:
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that cannot reserve space
            raise


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def read_index(index: Path) -> dict[str, str]:
    """The file name of each entry by an index. Raises UserError: it is broken, or names files outside its folder.

    The files may be links to anywhere: in the hub's cache they are.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map: copy or download it again")
    for file in weight_map.values():
        # The index may be somebody else's: it must not name files outside its own folder.
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\]+\.safetensors", file):
            raise UserError(f"{index} names the file {file!r}: only .safetensors beside it are read, fix the index")
    return weight_map


def _no_safetensors(folder: Path) -> str:
    if any(folder.glob(f"{VECTOR_STEM}*.safetensors")):
        return f"{folder} is a task vector: give it as --vector"
    if any(folder.glob("*.bin")):
        return (
            f"{folder} has pickled weights (.bin), which are not loaded: convert it to safetensors with "
            f'python -c "from transformers import AutoModelForCausalLM; AutoModelForCausalLM'
            f".from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
        )
    return f"{folder} has no model.safetensors, nor shards with an index: give a folder that save_pretrained wrote"


def copy_small_files(base: SafetensorsFolder, target: Path) -> None:
    """Copy configuration, tokenizer, licence, ...: all files but the weights and the base's own record."""
    for file in sorted(base.folder.iterdir()):
        is_weights = file.suffix in WEIGHT_SUFFIXES or file.name.endswith(".index.json")
        is_record = file.name in ("README.md", "run.json", "metrics.jsonl") or file.name.startswith(".")
        if file.is_file() and not is_weights and not is_record and file.stat().st_size <= SMALL_FILE:
            shutil.copyfile(file, target / file.name)
    if f"{base.stem}.safetensors" not in base.shards:
        shutil.copyfile(base.index, target / base.index.name)
