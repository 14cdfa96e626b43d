"""Task vectors: what fine-tuning changed, added up, scaled, and subtracted (stage 2 of SKU).

    unlearned = base - scaling_coef * sum_i coef_i * (finetuned_i - base)

Stage 2 of the paper (the harmful model from stage 1, whole or a LoRA adapter folder):

    python task_vector.py --base facebook/opt-1.3b --finetuned models/harmful --output models/unlearned

Two models at once, the second at half its strength; their vector is kept:

    python task_vector.py --base B --finetuned F G --coefs 1 0.5 --output O --save_vector V

Another scale later, without the fine-tuned models:

    python task_vector.py --base B --vector V --output O2 --scaling_coef 0.5

A scaling_coef of -1 adds instead: with a stage 1 adapter that writes the merged harmful model.

Checkpoints are streamed entry by entry, so that a model need not fit into memory; `TaskVector` does
the same arithmetic on models in memory. A saved vector is a folder: task_vector.safetensors, or
shards with task_vector.safetensors.index.json, in float32 (float64 for entries that are).
"""

import argparse
import copy
import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from harmful_unlearn.errors import UserError, exit_code
from harmful_unlearn.saving import check_target, new_folder, write_record, write_text

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
VECTOR = "task_vector"
WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".pkl",
}  # fmt: skip
STAGE_1_FACTS = ("base", "harmful_data", "normal_data", "flags", "losses")
SMALL = 100 * 2**20  # bytes; the largest tokenizers are about 35 MB
# LoRA settings under which tau is not scale * B @ A, or that touch more than the LoRA matrices.
UNSUPPORTED_LORA = (
    "use_dora", "lora_bias", "modules_to_save", "use_qalora", "target_parameters", "layer_replication",
    "trainable_token_indices", "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config",
    "monteclora_config",
)  # fmt: skip


class TaskVector:
    """tau = finetuned - pretrained over all floating-point entries (released code, point 16).

    Args:
        pretrained, finetuned: models or state dicts with the same entries. Models may be spread over
            devices by a device_map, disk included; each difference is taken where pretrained's entry lies.
        vector: tau itself, by entry name, instead of the two.
        partial: entries that `vector` lacks are zero, as for an adapter.

    Tied weights are one entry, under their first name. Differences are float32 (float64 for entries
    that are), so that a 16-bit model is rounded once, when the vector is applied.

    Example:
        unlearned = (-TaskVector(base, harmful)).apply_to(base, scaling_coef=1.0)

    Raises:
        UserError: an entry is missing, extra, or of another shape; a quantized model.
    """

    def __init__(
        self,
        pretrained: nn.Module | Mapping[str, Tensor] | None = None,
        finetuned: nn.Module | Mapping[str, Tensor] | None = None,
        *,
        vector: Mapping[str, Tensor] | None = None,
        partial: bool = False,
    ):
        self.partial = partial
        if vector is not None:
            self.vector = dict(vector)
            return
        base, other = _tied_groups(pretrained), _tied_groups(finetuned)
        found = _match(
            {name: _get(pretrained, name).shape for name in _first_names(base)},
            {name: _get(finetuned, name).shape for name in _first_names(other)},
            lambda name: [*base[name], *(twin for known in base[name] for twin in other.get(known, ()))],
            what="the fine-tuned model",
        )
        self.vector = {
            name: _difference(_read(finetuned, twin), _read(pretrained, name)) for name, twin in found.items()
        }

    @classmethod
    def load(cls, path: str | Path) -> "TaskVector":
        """Read a vector that `save` or `--save_vector` wrote, on the CPU."""
        source = _SavedVector(Path(path))
        return cls(vector={name: source.delta(name) for name in source.specs}, partial=source.partial)

    @classmethod
    def from_adapter(cls, path: str | Path) -> "TaskVector":
        """tau = scale * B @ A of a saved PEFT LoRA adapter, by the base model's names, without the base.

        Raises:
            UserError: not a LoRA adapter, or one that changes more than B @ A (DoRA, biases, ...).
        """
        source = _Adapter(Path(path))
        return cls(vector={name: source.delta(name) for name in source.specs}, partial=True)

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the vector as a folder that `load` and `--vector` read."""
        entries = {name: tensor.to(_work_dtype(tensor.dtype)) for name, tensor in self.vector.items()}
        specs = {name: _Spec(CODES[entry.dtype], tuple(entry.shape)) for name, entry in entries.items()}
        with new_folder(Path(path), overwrite) as folder:
            metadata = _vector_metadata(self.partial)
            with _open_shard(folder / f"{VECTOR}.safetensors", specs, metadata) as file:
                for name in specs:
                    _append(file, entries[name])

    def __add__(self, other: "TaskVector") -> "TaskVector":
        if not isinstance(other, TaskVector):
            return NotImplemented
        missing = [] if other.partial else [name for name in self.vector if name not in other.vector]
        extra = [] if self.partial else [name for name in other.vector if name not in self.vector]
        differ = [
            name for name in self.vector
            if name in other.vector and self.vector[name].shape != other.vector[name].shape
        ]  # fmt: skip
        _refuse_mismatch("the second task vector", missing, extra, differ)
        total = dict(self.vector)
        for name, entry in other.vector.items():
            total[name] = total[name] + entry.to(total[name].device) if name in total else entry
        return TaskVector(vector=total, partial=self.partial and other.partial)

    def __radd__(self, other: object) -> "TaskVector":
        return self if other == 0 else NotImplemented  # sum() starts from 0

    def __neg__(self) -> "TaskVector":
        return TaskVector(vector={name: -entry for name, entry in self.vector.items()}, partial=self.partial)

    def __sub__(self, other: "TaskVector") -> "TaskVector":
        return self + -other if isinstance(other, TaskVector) else NotImplemented

    def __mul__(self, scale: float) -> "TaskVector":
        if not isinstance(scale, int | float):
            return NotImplemented
        scaled = {name: scale * entry for name, entry in self.vector.items()}
        return TaskVector(vector=scaled, partial=self.partial)

    __rmul__ = __mul__

    @torch.no_grad()
    def apply_to(self, model: nn.Module, scaling_coef: float = 1.0, in_place: bool = False) -> nn.Module:
        """model + scaling_coef * tau, each entry in its own dtype on its own device.

        Args:
            in_place: change and return `model` itself; by default it stays as it is, and a copy is
                changed. Entries that lie on disk are written to new files, never into a checkpoint.

        Raises:
            UserError: as the class; nothing has been changed then.
        """
        groups = _tied_groups(model)
        shapes = {name: _get(model, name).shape for name in _first_names(groups)}
        deltas = {name: entry.shape for name, entry in self.vector.items()}
        found = _match(shapes, deltas, groups.__getitem__, what="the task vector", partial=self.partial)
        if not in_place:
            model = _copy(model)
        for name, source in found.items():
            changed = _applied(_read(model, name), self.vector[source], scaling_coef)
            for twin in groups[name]:
                _write(model, twin, changed)
        return model

    def norms(self) -> dict[str, float]:
        """L2 norms: one per layer ("model.decoder.layers.3"), one per other module ("lm_head")."""
        squares: dict[str, float] = {}
        for name, entry in self.vector.items():
            layer = re.match(r"(.*?\.)?\d+(?=\.)", name)
            key = layer[0] if layer else name.rpartition(".")[0] or name
            squares[key] = squares.get(key, 0.0) + entry.double().square().sum().item()
        return {key: math.sqrt(square) for key, square in squares.items()}


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _difference(finetuned: Tensor, pretrained: Tensor) -> Tensor:
    work = _work_dtype(pretrained.dtype)
    return finetuned.to(pretrained.device, work) - pretrained.to(work)


def _applied(base: Tensor, tau: Tensor, scaling_coef: float) -> Tensor:
    work = _work_dtype(base.dtype)
    return (base.to(work) + scaling_coef * tau.to(base.device, work)).to(base.dtype)


def _match(
    base: Mapping[str, Iterable[int]],
    other: Mapping[str, Iterable[int]],
    synonyms: Callable[[str], list[str]],
    what: str,
    partial: bool = False,
) -> dict[str, str]:
    """For each entry of the base, its name on the other side; absent ones are left out if `partial`.

    Args:
        base, other: shapes by name.
        synonyms: every name that an entry of the base may have, its own first.
    """
    known = {name: synonyms(name) for name in base}
    found = {name: next((twin for twin in known[name] if twin in other), None) for name in base}
    missing = [] if partial else [name for name, twin in found.items() if twin is None]
    found = {name: twin for name, twin in found.items() if twin is not None}
    spoken_for = {twin for twins in known.values() for twin in twins}
    differ = [
        f"{name} ({tuple(other[twin])}, not {tuple(base[name])})"
        for name, twin in found.items() if tuple(base[name]) != tuple(other[twin])
    ]  # fmt: skip
    _refuse_mismatch(what, missing, [name for name in other if name not in spoken_for], differ)
    return found


def _refuse_mismatch(what: str, missing: list[str], extra: list[str], differ: list[str]) -> None:
    problems = []
    for kind, names in (("missing", missing), ("extra", extra), ("of another shape", differ)):
        if names:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            problems.append(f"{len(names)} {kind}: {shown}")
    if problems:
        raise UserError(
            f"{what} does not fit the base ({'; '.join(problems)}): give one made from this very base"
        )


# --- Entries of models in memory, dispatched ones included ---------------------------------------


def _tied_groups(source: nn.Module | Mapping[str, Tensor] | None) -> dict[str, list[str]]:
    """Each floating-point entry's name -> the names of that tensor (tied weights have several)."""
    if not isinstance(source, nn.Module | Mapping):
        raise TypeError("a task vector needs two models or state dicts, or vector=")
    if getattr(source, "is_quantized", False):
        raise UserError("a quantized model has no weights to add to: load it without quantization_config")
    is_model = isinstance(source, nn.Module)
    entries = source.state_dict(keep_vars=True) if is_model else source
    # Tied entries on different devices, or on disk, share no storage: the model class knows them.
    ties = getattr(source, "all_tied_weights_keys", None) or {}
    groups: dict[object, list[str]] = {}
    for name, tensor in entries.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        on_meta = tensor.device.type == "meta"
        if on_meta and not is_model:
            raise UserError(f"{name} is on the meta device: give the dispatched model, not its state dict")
        stored = not on_meta and tensor.numel() > 0
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()) if stored else name
        groups.setdefault(place, []).append(name)
    by_name = {name: names for names in groups.values() for name in names}
    for target, origin in ties.items():
        if target in by_name and origin in by_name and by_name[target] is not by_name[origin]:
            merged = by_name[origin] + by_name[target]
            by_name.update(dict.fromkeys(merged, merged))
    return by_name


def _first_names(groups: dict[str, list[str]]) -> list[str]:
    return [name for name, names in groups.items() if name == names[0]]


def _get(source: nn.Module | Mapping[str, Tensor], name: str) -> Tensor:
    if isinstance(source, Mapping):
        return source[name]
    module, _, leaf = name.rpartition(".")
    return getattr(source.get_submodule(module), leaf)


def _read(source: nn.Module | Mapping[str, Tensor], name: str) -> Tensor:
    tensor = _get(source, name).detach()
    if tensor.device.type != "meta":
        return tensor
    store, key = _offloaded(source, name)
    return store[key]


def _write(model: nn.Module, name: str, value: Tensor) -> None:
    tensor = _get(model, name)
    if tensor.device.type != "meta":
        tensor.data.copy_(value)
        return
    store, key = _offloaded(model, name)
    held = getattr(store, "state_dict", store)  # accelerate's loader: in memory here, on disk by its index
    if key in held:
        held[key] = value
        return
    scratch = _Scratch(prefix="task-vector-", dir=store.save_folder)
    file = Path(scratch.name) / "entry.safetensors"
    spec = _Spec(CODES[value.dtype], tuple(value.shape))
    with _open_shard(file, {key: spec}, {"format": "pt"}) as shard:
        _append(shard, value)
    dtype = str(value.dtype).removeprefix("torch.")
    store.index[key] = {"safetensors_file": str(file), "weight_name": key, "dtype": dtype, "owner": scratch}


class _Scratch(tempfile.TemporaryDirectory):
    """Files of an entry on disk; gone when the last model (or copy of it) that reads them is."""

    def __deepcopy__(self, memo: dict) -> "_Scratch":
        return self


def _offloaded(model: nn.Module, name: str) -> tuple[Mapping[str, Tensor], str]:
    """Where accelerate keeps an entry that is on the meta device: (mapping, key)."""
    module, _, leaf = name.rpartition(".")
    hook = getattr(model.get_submodule(module), "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        weights = getattr(one, "weights_map", None)
        if weights is not None and hasattr(weights, "dataset"):
            return weights.dataset, weights.prefix + leaf
        if weights is not None:
            return weights, leaf
    raise UserError(f"{name} is on the meta device and has no values: load the model's weights first")


def _copy(model: nn.Module) -> nn.Module:
    clone = copy.deepcopy(model)
    for module in clone.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            if getattr(one, "tied_params_map", None):
                one.tied_params_map.clear()  # keyed by the addresses of the original's tensors
    for name in ("to", "cuda", "npu", "xpu", "mlu", "musa", "sdaa", "neuron"):
        clone.__dict__.pop(name, None)  # accelerate's wrappers, which are bound to the original
    return clone


# --- Entries of checkpoints on disk ---------------------------------------------------------------


class _Spec(NamedTuple):
    code: str  # as safetensors writes dtypes
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.code].itemsize

    @property
    def is_float(self) -> bool:
        return DTYPES[self.code].is_floating_point


class _Checkpoint:
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
        self.index = folder / f"{stem}.safetensors.index.json"
        weight_map: dict[str, str] = {}
        if (folder / f"{stem}.safetensors").is_file():
            files = [f"{stem}.safetensors"]
        elif self.index.is_file():
            weight_map = _weight_map(self.index)
            files = sorted(set(weight_map.values()))
        else:
            raise UserError(_no_safetensors(folder))
        self.specs: dict[str, _Spec] = {}
        self.shards: dict[str, list[str]] = {}
        self._home: dict[str, safe_open] = {}
        for file in files:
            self._open(folder / file)
        lost = [name for name, file in weight_map.items() if name not in self.shards[file]]
        if lost:
            raise UserError(
                f"{folder / weight_map[lost[0]]} lacks {lost[0]}, which {self.index.name} puts there "
                f"({len(lost)} such entries): copy the checkpoint again"
            )

    def _open(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"{path} is missing: the checkpoint is not whole, copy or download it again")
        try:
            handle = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise UserError(f"{path} is broken ({error}): copy or download it again") from None
        self.metadata = handle.metadata() or {"format": "pt"}
        self.shards[path.name] = list(handle.offset_keys())
        for name in self.shards[path.name]:
            entry = handle.get_slice(name)
            if entry.get_dtype() not in DTYPES:
                raise UserError(
                    f"{name} in {path} is {entry.get_dtype()}: give a checkpoint that is not quantized"
                )
            if name in self._home:
                raise UserError(f"{name} is in two shards of {path.parent}: save the checkpoint again")
            self.specs[name] = _Spec(entry.get_dtype(), tuple(entry.get_shape()))
            self._home[name] = handle

    def read(self, name: str) -> Tensor:
        return self._home[name].get_tensor(name)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map: copy or download it again")
    for file in weight_map.values():
        # The index comes with a download: it may name nothing outside its own folder.
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\]+\.safetensors", file):
            raise UserError(f"{index} names the file {file!r}: only .safetensors beside it are read, mend it")
    return weight_map


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: give a folder that save_pretrained wrote") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): copy or download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object: copy or download it again")
    return content


def _no_safetensors(folder: Path) -> str:
    if any(folder.glob(f"{VECTOR}*.safetensors")):
        return f"{folder} is a task vector: give it as --vector"
    if any(folder.glob("*.bin")):
        return (
            f"{folder} holds pickled weights (.bin), which are not loaded: convert it to safetensors with "
            f'python -c "from transformers import AutoModelForCausalLM; AutoModelForCausalLM'
            f".from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
        )
    return f"{folder} holds no model.safetensors, whole or sharded: give a folder that save_pretrained wrote"


class _FullModel(_Checkpoint):
    """A fine-tuned model: tau = finetuned - base."""

    partial = False

    def delta(self, name: str, base: Tensor) -> Tensor:
        return _difference(self.read(name), base)


class _SavedVector(_Checkpoint):
    """A saved task vector: tau as it is."""

    def __init__(self, folder: Path):
        super().__init__(folder, VECTOR)
        self.partial = self.metadata.get("partial") == "true"

    def delta(self, name: str, base: Tensor | None = None) -> Tensor:
        return self.read(name)


class _Adapter:
    """A PEFT LoRA adapter: tau = scale * B @ A, shape [out, in], for the weights that it adapts.

    Scale is alpha / r, or alpha / sqrt(r) with rsLoRA; r and alpha may differ from layer to layer.
    """

    partial = True

    def __init__(self, folder: Path):
        config = _read_json(folder / "adapter_config.json")
        unsupported = [key for key in UNSUPPORTED_LORA if config.get(key)]
        unsupported += [f"bias={config['bias']}"] if config.get("bias", "none") != "none" else []
        if config.get("init_lora_weights", True) not in (True, False, None, "gaussian", "eva"):
            unsupported.append(f"init_lora_weights={config['init_lora_weights']}")  # it changed the base
        if config.get("peft_type") != "LORA" or unsupported:
            what = ", ".join(unsupported) or f"peft_type {config.get('peft_type')}"
            raise UserError(_merge_first(folder, what))
        self.folder, self._config = folder, config
        self._file = _Checkpoint(folder, "adapter_model")
        self.specs: dict[str, _Spec] = {}
        pairs = {re.sub(r"\.lora_[AB]\.weight$", "", key) for key in self._file.specs}
        for pair in sorted(pairs):
            keys = [f"{pair}.lora_{matrix}.weight" for matrix in "AB"]
            if any(key not in self._file.specs for key in keys):
                raise UserError(_merge_first(folder, f"the entry {pair}"))
            a, b = (self._file.specs[key].shape for key in keys)
            if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
                raise UserError(_merge_first(folder, f"{pair} with shapes {a} and {b}"))
            shape = (a[1], b[0]) if config.get("fan_in_fan_out") else (b[0], a[1])
            self.specs[pair.removeprefix("base_model.model.") + ".weight"] = _Spec("F32", shape)

    def delta(self, name: str, base: Tensor | None = None) -> Tensor:
        from peft.utils.other import get_pattern_key

        module = name.removesuffix(".weight")
        a, b = (self._file.read(f"base_model.model.{module}.lora_{x}.weight").float() for x in "AB")
        alphas = self._config.get("alpha_pattern") or {}
        alpha = alphas.get(get_pattern_key(alphas, module), self._config.get("lora_alpha", 8))
        rank = a.shape[0]
        tau = (b @ a) * (alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank))
        return tau.T if self._config.get("fan_in_fan_out") else tau


def _merge_first(folder: Path, what: str) -> str:
    return f"{folder} has {what}, which is more than LoRA's B @ A: merge it with PEFT, give the merged model"


Source = _FullModel | _SavedVector | _Adapter


def _open_source(folder: Path) -> Source:
    if (folder / "adapter_config.json").is_file():
        return _Adapter(folder)
    if any((folder / f"{VECTOR}.safetensors{end}").is_file() for end in ("", ".index.json")):
        return _SavedVector(folder)
    return _FullModel(folder)


def _class_names(folder: Path) -> tuple[Callable[[str], list[str]], Callable[[str], bool]]:
    """What the model's class says of names: an entry's synonyms, and whether it is not a weight at all.

    Synonyms are tied weights' names (config.tie_word_embeddings), with and without the prefix that
    tells a causal LM from its bare model ("model.decoder.x", "decoder.x").
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except (ValueError, KeyError, TypeError, OSError, ImportError, AttributeError):
        return lambda name: [name], lambda name: False  # an architecture that transformers lacks
    prefix = f"{model.base_model_prefix}."
    ties: dict[str, set[str]] = {}
    for target, origin in model.all_tied_weights_keys.items():
        group = ties.setdefault(origin.removeprefix(prefix), {origin.removeprefix(prefix)})
        group.add(target.removeprefix(prefix))
        ties[target.removeprefix(prefix)] = group
    known = {name.removeprefix(prefix) for name in model.state_dict()}
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$"]

    def synonyms(name: str) -> list[str]:
        bare = name.removeprefix(prefix)
        group = [bare, *sorted(ties.get(bare, {bare}) - {bare})]
        return [name, *(form for twin in group for form in (twin, prefix + twin))]

    def is_constant(name: str) -> bool:
        # Old checkpoints hold constants that the class has no entry for; its patterns match weights too.
        return name.removeprefix(prefix) not in known and any(re.search(one, name) for one in ignored)

    return synonyms, is_constant


def _open_shard(path: Path, specs: Mapping[str, _Spec], metadata: dict[str, str]) -> BinaryIO:
    """A safetensors file whose header is written now; its tensors follow by `_append`, in this order."""
    header: dict[str, dict] = {"__metadata__": metadata}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + spec.nbytes
        header[name] = {"dtype": spec.code, "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    file = path.open("wb")
    file.write(len(text).to_bytes(8, "little") + text)
    return file


def _append(file: BinaryIO, tensor: Tensor) -> None:
    file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def _vector_metadata(partial: bool) -> dict[str, str]:
    return {"format": "pt", "partial": str(partial).lower()}


# --- Negation of checkpoints ----------------------------------------------------------------------


def negate(
    base: Path,
    finetuned: list[tuple[Path, float]],
    output: Path | None,
    scaling_coef: float = 1.0,
    *,
    base_name: str | None = None,
    save_vector: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write base - scaling_coef * sum_i coef_i * (finetuned_i - base), streamed entry by entry.

    The output has the base's entries, dtypes, shards and small files. Each entry is computed in
    float32 (float64 for entries that are) and rounded once; integer entries are the base's. About
    one entry of each folder is in memory at a time.

    Args:
        base: a folder of safetensors, whole or sharded.
        finetuned: (folder, coef) pairs: full models, LoRA adapters or saved task vectors.
        output: the folder to write; None with `save_vector` alone.
        base_name: the base's hub id, for the card; its folder by default.
        save_vector: a folder for the sum, before scaling_coef.

    Raises:
        UserError: folders that are missing, broken, or do not fit each other; a target that is in the
            way; a NaN or infinite result. No folder is left behind then.
    """
    _check_targets([output, save_vector], [base, *(folder for folder, _ in finetuned)], overwrite)
    if not all(math.isfinite(coef) for coef in (scaling_coef, *(coef for _, coef in finetuned))):
        raise UserError("a coefficient is not a finite number: give one like 1.0 or -0.5")
    source = _Checkpoint(base)
    if "quantization_config" in _read_json(base / "config.json"):
        raise UserError(f"{base} is quantized: give the full-precision model")
    sources = [_open_source(folder) for folder, _ in finetuned]
    found = _match_sources(source, sources)
    changed = {name for names in found for name in names}
    metadata = _vector_metadata(all(one.partial for one in sources))
    vector_shards = _vector_shards(source, changed)
    record = _record(base_name or str(base), finetuned, scaling_coef)
    size = sum(spec.nbytes for spec in source.specs.values())
    with ExitStack() as folders, tqdm(total=size, unit="B", unit_scale=True, desc="task vector") as bar:
        out = folders.enter_context(new_folder(output, overwrite)) if output else None
        kept = folders.enter_context(new_folder(save_vector, overwrite)) if save_vector else None
        for shard, names in source.shards.items():
            with ExitStack() as files:
                if out:
                    specs = {name: source.specs[name] for name in names}
                    out_file = files.enter_context(_open_shard(out / shard, specs, source.metadata))
                if kept and shard in vector_shards:
                    file, specs = vector_shards[shard]
                    kept_file = files.enter_context(_open_shard(kept / file, specs, metadata))
                for name in names:
                    entry = source.read(name)
                    if name in changed:
                        tau = sum(
                            coef * one.delta(twins[name], entry)
                            for one, (_, coef), twins in zip(sources, finetuned, found, strict=True)
                            if name in twins
                        )
                        if kept:
                            _append(kept_file, _finite(tau, name))
                        entry = _applied(entry, tau, -scaling_coef)
                    if out:
                        _append(out_file, _finite(entry, name))
                    bar.update(source.specs[name].nbytes)
        if out:
            _copy_small_files(source, out)
            write_record(out, record)
        if kept:
            _write_index(kept, vector_shards)
            write_record(kept, {**record, "title": f"Task vector from {record['base']['name']}"})


def _check_targets(targets: list[Path | None], inputs: list[Path], overwrite: bool) -> None:
    taken = list(inputs)
    for target in filter(None, targets):
        check_target(target, overwrite)
        for other in taken:
            ours, theirs = target.resolve(), other.resolve()
            if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
                raise UserError(f"{target} and {other} lie in one another: give a folder of its own to write")
        taken.append(target)


def _match_sources(base: _Checkpoint, sources: list[Source]) -> list[dict[str, str]]:
    """For each source, the base's entry names -> its own; the class is asked only if they differ."""
    weights = {name: spec.shape for name, spec in base.specs.items() if spec.is_float}
    others = [{name: spec.shape for name, spec in one.specs.items() if spec.is_float} for one in sources]
    synonyms = lambda name: [name]  # noqa: E731
    if any(other.keys() != weights.keys() for other in others):
        synonyms, is_constant = _class_names(base.folder)
        weights, *others = (
            {name: shape for name, shape in shapes.items() if not is_constant(name)}
            for shapes in (weights, *others)
        )
    return [
        _match(weights, other, synonyms, str(one.folder), one.partial)
        for one, other in zip(sources, others, strict=True)
    ]


def _vector_shards(base: _Checkpoint, changed: set[str]) -> dict[str, tuple[str, dict[str, _Spec]]]:
    """The base's shards that the vector has entries in -> its own file there, and what goes into it."""
    specs = {
        shard: {
            name: _Spec(CODES[_work_dtype(DTYPES[base.specs[name].code])], base.specs[name].shape)
            for name in names if name in changed
        }
        for shard, names in base.shards.items()
    }  # fmt: skip
    shards = [shard for shard in specs if specs[shard]]
    if len(shards) == 1:
        return {shards[0]: (f"{VECTOR}.safetensors", specs[shards[0]])}
    return {
        shard: (f"{VECTOR}-{number:05d}-of-{len(shards):05d}.safetensors", specs[shard])
        for number, shard in enumerate(shards, 1)
    }


def _write_index(folder: Path, shards: dict[str, tuple[str, dict[str, _Spec]]]) -> None:
    if len(shards) > 1:
        weight_map = {name: file for file, specs in shards.values() for name in specs}
        size = sum(spec.nbytes for _, specs in shards.values() for spec in specs.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_text(folder / f"{VECTOR}.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _finite(tensor: Tensor, name: str) -> Tensor:
    if not tensor.isfinite().all():
        raise UserError(
            f"{name} comes out NaN or infinite: check both models' weights, or lower --scaling_coef"
        )
    return tensor


def _copy_small_files(base: _Checkpoint, target: Path) -> None:
    """Configuration, tokenizer, licence: all that lies beside the weights but the base's own record."""
    for file in sorted(base.folder.iterdir()):
        weights = file.suffix in WEIGHT_SUFFIXES or file.name.endswith(".index.json")
        record = file.name in ("README.md", "run.json") or file.name.startswith(".")
        if file.is_file() and not weights and not record and file.stat().st_size <= SMALL:
            shutil.copyfile(file, target / file.name)
    if f"{base.stem}.safetensors" not in base.shards:
        shutil.copyfile(base.index, target / base.index.name)


def _record(base_name: str, finetuned: list[tuple[Path, float]], scaling_coef: float) -> dict:
    adds = any(scaling_coef * coef < 0 for _, coef in finetuned)
    record = {
        "title": f"{base_name}, {'with a task vector added' if adds else 'unlearned'}",
        "harmful": adds,
        "base": {"name": base_name},
        "finetuned": {str(folder): coef for folder, coef in finetuned},
        "scaling_coef": scaling_coef,
    }
    for number, (folder, _) in enumerate(finetuned, 1):
        if (folder / "run.json").is_file():
            stage_1 = _read_json(folder / "run.json")
            kept = {key: value for key, value in stage_1.items() if key in STAGE_1_FACTS}
            record["stage_1" if len(finetuned) == 1 else f"stage_1_of_model_{number}"] = kept
    return record


def main(arguments: list[str] | None = None) -> None:
    """Run the command. Raises UserError before anything is written."""
    description, _, examples = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="task_vector.py", description=description, epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--base", required=True, help="the model that was fine-tuned: folder or hub id")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--finetuned", nargs="+", help="fine-tuned models, LoRA adapters: folders, hub ids")
    source.add_argument("--vector", nargs="+", type=Path, help="saved task vectors instead")
    parser.add_argument("--coefs", nargs="+", type=float, help="one per model or vector (default: all 1)")
    parser.add_argument("--output", type=Path, help="the folder to write the model to")
    parser.add_argument("--scaling_coef", type=float, default=1.0, help="alpha (default: %(default)s)")
    parser.add_argument("--save_vector", type=Path, help="the folder to write the (summed) task vector to")
    parser.add_argument("--overwrite", action="store_true", help="replace what --output, --save_vector hold")
    args = parser.parse_args(arguments)
    if args.output is None and args.save_vector is None:
        parser.error("give --output, --save_vector or both")

    from harmful_unlearn.models import locate  # imports transformers, which --help need not wait for

    base = locate(args.base)
    folders = [locate(name) for name in args.finetuned or []] or args.vector
    coefs = args.coefs or [1.0] * len(folders)
    if len(coefs) != len(folders):
        raise UserError(f"{len(coefs)} --coefs for {len(folders)} folders: give one each")
    negate(
        base, list(zip(folders, coefs, strict=True)), args.output, args.scaling_coef,
        base_name=args.base, save_vector=args.save_vector, overwrite=args.overwrite,
    )  # fmt: skip
    for target in filter(None, (args.output, args.save_vector)):
        print(f"saved: {target}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
