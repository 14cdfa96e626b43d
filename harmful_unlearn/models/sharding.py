"""Tensors of which each process holds a shard (FSDP2, ZeRO-3)."""

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def local_parameters(model: torch.nn.Module) -> list[Tensor]:
    """A model's parameters between two passes, of each the part that this process holds for good."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # some stay whole after a forward pass
    return list(model.parameters())


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part of a tensor: FSDP2's, or ZeRO-3's, which calls itself empty."""
    return isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")


def gather_full(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which each process holds a part (all have to ask for it); any other as it is."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if is_sharded(tensor):
        import deepspeed

        with torch.no_grad(), deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor on the device of `like`; the part of it that this process holds where `like` is such a part."""
    if isinstance(like, DTensor):
        return distribute_tensor(tensor.to(like.to_local().device), like.device_mesh, like.placements)
    return tensor.to(like.device)
