"""Tensors that are sharded: each process holds a part (FSDP2, ZeRO-3)."""

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def local_parameters(model: torch.nn.Module) -> list[Tensor]:
    """The parameters that this process owns (with FSDP2, its shards), between two passes."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # some stay gathered after a forward pass
    return list(model.parameters())


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part of a tensor. A ZeRO-3 tensor is empty, its part is in an attribute."""
    return isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")


def gather_full(tensor: Tensor) -> Tensor:
    """The complete tensor if it is sharded (all processes must call this), else the tensor itself."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if is_sharded(tensor):
        import deepspeed

        with torch.no_grad(), deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A complete tensor moved to the device of `like`; if `like` is sharded, this process's shard of the tensor."""
    if isinstance(like, DTensor):
        return distribute_tensor(tensor.to(like.to_local().device), like.device_mesh, like.placements)
    return tensor.to(like.device)
