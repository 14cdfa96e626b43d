"""fp32 or bf16: what the machine computes in, and a model whose float32 weights are bf16 for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from harmful_unlearn.models.sharding import is_sharded

# What torch.cpu.get_capabilities calls instructions that multiply bf16 matrices: x86's AVX-512 and AMX, ARM's.
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")


def resolve_precision(flag: str, device: torch.device) -> str:
    """ "fp32" or "bf16", as a --precision flag says; "auto" is bf16 where the device has instructions for it."""
    if flag != "auto":
        return flag
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if device.type == "cpu" and any(map(capabilities.get, BF16_INSTRUCTIONS)) else "fp32"


class _Cast(torch.autograd.Function):
    """A weight in bf16, whose gradient is added to the weight's own without a float32 copy of it."""

    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return weight.to(torch.bfloat16)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> None:
        if ctx.weight.grad is None:
            ctx.weight.grad = gradient.to(ctx.weight.dtype)
        else:
            ctx.weight.grad += gradient


@contextmanager
def computing_in(precision: str, model: nn.Module) -> Iterator[None]:
    """Within the block the model computes in "bf16": its float32 weights are replaced by their bf16 casts.

    Gradients are computed in bf16 and added to the float32 weights' own, so do the backward pass inside the block, too.
    Weights are cast once, whatever number of forward passes follows. In "fp32", and for weights that an engine
    shards, nothing changes.
    """
    if precision != "bf16":
        yield
        return
    owners = [
        (module, name, weight)
        for module in model.modules()
        for name, weight in module._parameters.items()
        if weight is not None and weight.dtype == torch.float32 and not (weight.is_meta or is_sharded(weight))
    ]
    # Wrappers for several processes wait for gradients to arrive by autograd's own way.
    cast = (lambda weight: weight.to(torch.bfloat16)) if torch.distributed.is_initialized() else _Cast.apply
    casts: dict[Tensor, Tensor] = {}  # a weight that is tied is cast once
    try:
        for module, name, weight in owners:
            casts[weight] = casts[weight] if weight in casts else cast(weight)
            module._parameters[name] = casts[weight]  # type: ignore[assignment]
        yield
    finally:
        for module, name, weight in owners:
            module._parameters[name] = weight
