"""Models in memory and their entries, wherever these lie: on a device, or where accelerate's device_map put them.

What a device_map puts on disk, or on the CPU beside a GPU, is offloaded: the entry itself is on the meta device, and
accelerate brings its values for each forward pass of its module.
"""

import copy
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from harmful_unlearn.errors import UserError
from harmful_unlearn.storage.safetensors_io import DTYPE_CODES, ShardWriter, TensorSpec


def tied_groups(source: nn.Module | Mapping[str, Tensor] | None) -> dict[str, list[str]]:
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


def first_names(groups: dict[str, list[str]]) -> list[str]:
    """One name for each tensor of `tied_groups`."""
    return [name for name, names in groups.items() if name == names[0]]


def get_entry(source: nn.Module | Mapping[str, Tensor], name: str) -> Tensor:
    """The entry as it stands in the model: on the meta device where its values lie on disk."""
    if isinstance(source, Mapping):
        return source[name]
    module, _, leaf = name.rpartition(".")
    return getattr(source.get_submodule(module), leaf)


def read_entry(source: nn.Module | Mapping[str, Tensor], name: str) -> Tensor:
    """The entry's values, read from where a device_map put them."""
    tensor = get_entry(source, name).detach()
    if tensor.device.type != "meta":
        return tensor
    store, key = _offloaded(source, name)
    return store[key]


def write_entry(model: nn.Module, name: str, value: Tensor) -> None:
    """Set the entry's values where they lie; on disk, in a new file of this model's own."""
    tensor = get_entry(model, name)
    if tensor.device.type != "meta":
        tensor.data.copy_(value)
        return
    store, key = _offloaded(model, name)
    held = getattr(store, "state_dict", store)  # accelerate's loader: in memory here, on disk by its index
    if key in held:
        held[key] = value
        return
    scratch = Scratch(prefix="task-vector-", dir=store.save_folder)
    file = Path(scratch.name) / "entry.safetensors"
    spec = TensorSpec(DTYPE_CODES[value.dtype], tuple(value.shape))
    ShardWriter(file.parent, {file.name: {key: spec}}, {"format": "pt"}).write(value, key)
    dtype = str(value.dtype).removeprefix("torch.")
    store.index[key] = {"safetensors_file": str(file), "weight_name": key, "dtype": dtype, "owner": scratch}


class Scratch(tempfile.TemporaryDirectory):
    """Files of entries on disk; gone when the last model (or copy of it) that reads them is."""

    def __deepcopy__(self, memo: dict) -> "Scratch":
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


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: where its weights lie, or where accelerate brings them for that."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            if getattr(one, "execution_device", None) is not None:
                return torch.device(one.execution_device)
    return next(module.parameters()).device


@contextmanager
def materialized(model: nn.Module) -> Iterator[None]:
    """Within the block offloaded parameters seem to be where they compute; they have no values and take no memory.

    For peft, which puts the parts of an adapter on the device of their layer's weight: with an offloaded one that is
    the meta device, and the parts' values are lost.
    """
    held = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_meta
    ]
    for module, name, parameter in held:
        one = torch.zeros((), dtype=parameter.dtype, device=execution_device(module)).expand(parameter.shape)
        setattr(module, name, nn.Parameter(one, parameter.requires_grad))
    try:
        yield
    finally:
        for module, name, parameter in held:
            setattr(module, name, parameter.requires_grad_(getattr(module, name).requires_grad))


def copy_model(model: nn.Module) -> nn.Module:
    """A copy that shares no storage in memory with the model, dispatched as it is."""
    clone = copy.deepcopy(model)
    for module in clone.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            if getattr(one, "tied_params_map", None):
                one.tied_params_map.clear()  # keyed by the addresses of the original's tensors
    for name in ("to", "cuda", "npu", "xpu", "mlu", "musa", "sdaa", "neuron"):
        clone.__dict__.pop(name, None)  # accelerate's wrappers, which are bound to the original
    return clone
