"""Folders of safetensors, read and written in chunks of an entry, under headers that are written first."""

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
INDEX_NAME = "{}.safetensors.index.json"  # of a stem
VECTOR_STEM = "task_vector"  # the stem of a saved task vector's files
WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".pkl",
}  # fmt: skip
SMALL_FILE = 100 * 2**20  # bytes; the largest tokenizers are about 35 MB
CHUNK_ELEMENTS = 2**19  # elements worked on at a time: 2 MB in float32, so that a few fit a core's cache


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; of 8-bit floats, which cannot be added up, this is taken for granted."""
    # The sum, in a few hundredths of isfinite's time, is not finite if a value is not; or if large ones overflow it.
    if not values.is_floating_point() or values.itemsize == 1 or math.isfinite(values.sum()):
        return True
    return bool(values.isfinite().all())


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """What entries of a dtype are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class TensorSpec(NamedTuple):
    """An entry's dtype and shape."""

    code: str  # as safetensors writes dtypes
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.code]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_float(self) -> bool:
        return self.dtype.is_floating_point

    def chunks(self) -> Iterator[slice]:
        """The flattened entry cut into about STRETCH elements each, at the ends of rows of its last dimension."""
        row = max(self.shape[-1], 1) if len(self.shape) > 1 else 1
        step = max(CHUNK_ELEMENTS // row, 1) * row
        size = math.prod(self.shape)
        for start in range(0, size, step):
            yield slice(start, min(start + step, size))


class Buffers(threading.local):
    """Flat tensors of each thread's own, used again and again."""

    def __init__(self):
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, role: str, size: int, dtype: torch.dtype) -> Tensor:
        held = self._held.get((role, dtype))
        if held is None or len(held) < size:
            held = self._held[role, dtype] = torch.empty(size, dtype=dtype)
        return held[:size]


class SafetensorsFolder:
    """The safetensors of a folder, one file or shards with an index: specs now, tensors on demand.

    Attributes:
        specs: every entry's dtype and shape.
        shards: file name -> its entries, in the order of their bytes.

    Raises:
        UserError: no folder, no safetensors, a missing, broken or foreign shard.
    """

    def __init__(self, folder: Path, stem: str = "model"):
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}: check the path")
        self.folder, self.stem = folder, stem
        self.index = folder / INDEX_NAME.format(stem)
        weight_map: dict[str, str] = {}
        if (folder / f"{stem}.safetensors").is_file():
            files = [f"{stem}.safetensors"]
        elif self.index.is_file():
            weight_map = read_index(self.index)
            files = sorted(set(weight_map.values()))
        else:
            raise UserError(_no_safetensors(folder))
        self.specs: dict[str, TensorSpec] = {}
        self.shards: dict[str, list[str]] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        self._buffers = Buffers()
        for file in files:
            self._open(folder / file)
        lost = [name for name, file in weight_map.items() if name not in self.shards[file]]
        if lost:
            raise UserError(
                f"{folder / weight_map[lost[0]]} lacks {lost[0]}, which {self.index.name} puts there "
                f"({len(lost)} such entries): copy the checkpoint again"
            )

    def _open(self, path: Path) -> None:
        if not os.path.isfile(path):  # False also where the index gives a name that no file can have
            raise UserError(f"{path} is missing: the checkpoint is not whole, copy or download it again")
        try:
            # Its checks are sound; its memory map is not read, so that page cache does not count as this process's.
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
                raise UserError(f"{name} in {path} is {entry['dtype']}: give a checkpoint that is not quantized")
            if name in self._places:
                raise UserError(f"{name} is in two shards of {path.parent}: save the checkpoint again")
            self.specs[name] = TensorSpec(entry["dtype"], tuple(entry["shape"]))
            self._places[name] = path, 8 + length + entry["data_offsets"][0]

    def fingerprint(self) -> str:
        """SHA-256 of every shard's header and first MiB of data: tells apart models of one shape."""
        digest = hashlib.sha256()
        for shard in self.shards:
            with (self.folder / shard).open("rb") as file:
                header = file.read(8)
                digest.update(header + file.read(int.from_bytes(header, "little") + 2**20))
        return digest.hexdigest()

    def read(self, name: str) -> Tensor:
        """One entry, on the CPU, in its own dtype."""
        spec = self.specs[name]
        entry = torch.empty(spec.shape, dtype=spec.dtype)
        self.read_into(entry.view(-1), name)
        return entry

    def read_into(self, out: Tensor, name: str, start: int = 0) -> Tensor:
        """The elements of the flattened entry from `start` on, as many as `out` holds, in the entry's own dtype.

        Raises:
            UserError: the file has become shorter.
        """
        path, offset = self._places[name]
        left = _bytes(out)
        with path.open("rb", buffering=0) as file:  # opened each time: threads share no position, none stays open
            file.seek(offset + start * out.itemsize)
            while left:
                count = file.readinto(left)
                if not count:
                    raise UserError(f"{path} became shorter while it was read: copy or download it again")
                left = left[count:]
        return out

    def convert_into(self, out: Tensor, name: str, start: int = 0) -> Tensor:
        """`read_into`, the elements converted to the dtype of `out`."""
        dtype = self.specs[name].dtype
        if dtype == out.dtype:
            return self.read_into(out, name, start)
        return out.copy_(self.read_into(self._buffers("stored", out.numel(), dtype), name, start))

    def equal(self, name: str, other: str) -> bool:
        """Whether two entries hold the same values in the same shape and dtype."""
        spec = self.specs[name]
        return spec == self.specs[other] and all(
            torch.equal(
                *(
                    self.read_into(self._buffers(side, span.stop - span.start, spec.dtype), entry, span.start)
                    for side, entry in (("ours", name), ("theirs", other))
                )
            )
            for span in spec.chunks()
        )


class ShardWriter:
    """Safetensors files to be filled: headers are written and room for the data is taken now.

    Args:
        shards: file name -> its entries, in the order of their bytes.

    Raises:
        OSError: no space.
    """

    def __init__(self, folder: Path, shards: Mapping[str, Mapping[str, TensorSpec]], metadata: dict[str, str]):
        self._places: dict[str, tuple[Path, int]] = {}
        for file, specs in shards.items():
            self._create(folder / file, specs, metadata)

    def _create(self, path: Path, specs: Mapping[str, TensorSpec], metadata: dict[str, str]) -> None:
        header: dict[str, dict] = {"__metadata__": metadata}
        end = 0
        for name, spec in specs.items():
            start, end = end, end + spec.nbytes
            header[name] = {"dtype": spec.code, "shape": list(spec.shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the data starts aligned
        with path.open("wb", buffering=0) as file:
            _reserve(file.fileno(), 8 + len(text) + end)
            file.write(len(text).to_bytes(8, "little") + text)
        for name in specs:
            self._places[name] = path, 8 + len(text) + header[name]["data_offsets"][0]

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def write(self, values: Tensor, name: str, start: int = 0) -> None:
        """Write values of the entry's dtype, from its element `start` on."""
        path, offset = self._places[name]
        left = _bytes(values.detach().cpu().contiguous())
        with path.open("r+b", buffering=0) as file:
            file.seek(offset + start * values.itemsize)
            while left:
                left = left[file.write(left) :]


def _reserve(file: int, size: int) -> None:
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # file systems that cannot: the file grows as written
            raise


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def read_index(index: Path) -> dict[str, str]:
    """An index's file name for each entry. Raises UserError: it is broken, or leads out of its folder.

    The files themselves may be links to anywhere, as those of the hub's cache are.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map: copy or download it again")
    for file in weight_map.values():
        # The index comes with a download: it may name nothing outside its own folder.
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\]+\.safetensors", file):
            raise UserError(f"{index} names the file {file!r}: only .safetensors beside it are read, mend it")
    return weight_map


def _no_safetensors(folder: Path) -> str:
    if any(folder.glob(f"{VECTOR_STEM}*.safetensors")):
        return f"{folder} is a task vector: give it as --vector"
    if any(folder.glob("*.bin")):
        return (
            f"{folder} holds pickled weights (.bin), which are not loaded: convert it to safetensors with "
            f'python -c "from transformers import AutoModelForCausalLM; AutoModelForCausalLM'
            f".from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
        )
    return f"{folder} holds no model.safetensors, whole or sharded: give a folder that save_pretrained wrote"


def copy_small_files(base: SafetensorsFolder, target: Path) -> None:
    """Configuration, tokenizer, licence: all that lies beside the weights but the base's own record."""
    for file in sorted(base.folder.iterdir()):
        weights = file.suffix in WEIGHT_SUFFIXES or file.name.endswith(".index.json")
        record = file.name in ("README.md", "run.json", "metrics.jsonl") or file.name.startswith(".")
        if file.is_file() and not weights and not record and file.stat().st_size <= SMALL_FILE:
            shutil.copyfile(file, target / file.name)
    if f"{base.stem}.safetensors" not in base.shards:
        shutil.copyfile(base.index, target / base.index.name)
