"""Entries of models in memory, on a device or where accelerate's device_map put them.

What a device_map puts on disk, or on the CPU beside a GPU, is offloaded: the entry itself is on the meta device, and
accelerate loads its values for each forward pass of its module.
"""

import copy
import inspect
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from harmful_unlearn.errors import UserError

Weights = nn.Module | Mapping[str, Tensor]  # a model, or its state dict


def tied_groups(source: Weights) -> dict[str, list[str]]:
    """The name of each floating-point entry -> all names of that tensor (tied weights have several).

    Raises UserError: a quantized model, or a state dict with entries on the meta device.
    """
    if getattr(source, "is_quantized", False):
        raise UserError("a quantized model has no weights to add to: load it without quantization_config")
    entries = source.state_dict(keep_vars=True) if isinstance(source, nn.Module) else source
    groups: dict[object, list[str]] = {}
    for name, tensor in entries.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        if tensor.is_meta and entries is source:
            raise UserError(f"{name} is on the meta device: give the dispatched model, not its state dict")
        has_storage = not tensor.is_meta and tensor.numel() > 0
        storage = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()) if has_storage else name
        groups.setdefault(storage, []).append(name)
    by_name = {name: names for names in groups.values() for name in names}
    # Tied entries on different devices, or on disk, share no storage: the model class knows them.
    ties: Any = getattr(source, "all_tied_weights_keys", None) or {}
    for target, origin in ties.items():
        if target in by_name and origin in by_name and by_name[target] is not by_name[origin]:
            merged = by_name[origin] + by_name[target]
            by_name.update(dict.fromkeys(merged, merged))
    return by_name


def shapes_of(source: Weights, groups: dict[str, list[str]]) -> dict[str, torch.Size]:
    """The shape of each tensor of `tied_groups`, by its first name."""
    return {name: get_entry(source, name).shape for name, names in groups.items() if name == names[0]}


def get_entry(source: Weights, name: str) -> Tensor:
    """The entry as it is in the model: on the meta device if it is offloaded."""
    if isinstance(source, Mapping):
        return source[name]
    module, _, leaf = name.rpartition(".")
    return getattr(source.get_submodule(module), leaf)


def read_entry(source: Weights, name: str) -> Tensor:
    """The entry's values, loaded if it is offloaded. Raises UserError: it has no values."""
    tensor = get_entry(source, name).detach()
    if isinstance(source, Mapping) or not tensor.is_meta:
        return tensor
    store, key = _offloaded(source, name)
    return store[key]


def write_entry(model: nn.Module, name: str, value: Tensor) -> None:
    """Set the entry's values where they are; if that is on disk, in a new file that belongs to this model."""
    tensor = get_entry(model, name)
    if not tensor.is_meta:
        tensor.data.copy_(value)
        return
    store, key = _offloaded(model, name)
    in_memory = getattr(store, "state_dict", store)  # accelerate's loader has some values in memory, some on disk
    if key in in_memory:
        in_memory[key] = value
        return
    folder = TemporaryFolder(prefix="task-vector-", dir=store.save_folder)
    file = Path(folder.name) / "entry.safetensors"
    save_file({key: value.contiguous()}, file)
    dtype = str(value.dtype).removeprefix("torch.")
    store.index[key] = {"safetensors_file": str(file), "weight_name": key, "dtype": dtype, "owner": folder}


class TemporaryFolder(tempfile.TemporaryDirectory):
    """A folder of offloaded entries, removed with the last model that reads them; copies of a model share it."""

    def __deepcopy__(self, memo: dict) -> "TemporaryFolder":
        return self


def _hooks(module: nn.Module) -> list:
    """What accelerate attached to a module to place its weights."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _offloaded(model: nn.Module, name: str) -> tuple[Any, str]:
    """Where accelerate keeps the values of an offloaded entry: a mapping, and the key in it."""
    module, _, leaf = name.rpartition(".")
    for hook in _hooks(model.get_submodule(module)):
        values = getattr(hook, "weights_map", None)
        if values is not None and hasattr(values, "dataset"):
            return values.dataset, values.prefix + leaf
        if values is not None:
            return values, leaf
    raise UserError(f"{name} is on the meta device and has no values: load the model's weights first")


def execution_device(module: nn.Module) -> torch.device:
    """The device on which a module computes: that of its weights, or the one that accelerate loads them to."""
    for part in module.modules():
        for hook in _hooks(part):
            if getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device)
    return next(module.parameters()).device


@contextmanager
def materialized(model: nn.Module) -> Iterator[None]:
    """Within the block offloaded parameters appear on the device where they compute, without values or memory.

    For peft, which creates an adapter on the device of its layer's weight: on the meta device of an offloaded weight
    the adapter would lose its values.
    """
    offloaded = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_meta
    ]
    for module, name, parameter in offloaded:
        placeholder = torch.zeros((), dtype=parameter.dtype, device=execution_device(module)).expand(parameter.shape)
        setattr(module, name, nn.Parameter(placeholder, parameter.requires_grad))
    try:
        yield
    finally:
        for module, name, parameter in offloaded:
            setattr(module, name, parameter.requires_grad_(getattr(module, name).requires_grad))


def copy_model(model: nn.Module) -> nn.Module:
    """A copy that shares no memory with the model, on the same devices."""
    clone = copy.deepcopy(model)
    for module in clone.modules():
        for hook in _hooks(module):
            if getattr(hook, "tied_params_map", None):
                hook.tied_params_map.clear()  # its keys are addresses of the original's tensors
    # accelerate replaces the model's `to`, `cuda`, ... by functions, which act on the original in a copy, too.
    for name, attribute in list(vars(clone).items()):
        if inspect.isfunction(attribute) and hasattr(type(clone), name):
            delattr(clone, name)
    return clone
