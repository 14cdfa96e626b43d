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


PART = 2**17  # elements at a time; stays in a cache


class _Cast(torch.autograd.Function):
    """A weight in bf16, whose gradient is added to the weight's own without a float32 copy of it."""

    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return weight.to(torch.bfloat16)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> None:
        if ctx.weight.grad is None:
            ctx.weight.grad = gradient.to_dense().to(ctx.weight.dtype)
        elif gradient.is_sparse:
            ctx.weight.grad.index_add_(0, gradient._indices()[0], gradient._values().to(ctx.weight.dtype))
        else:
            # Added as they are, tensors of two dtypes are first copied as a whole.
            parts = zip(ctx.weight.grad.view(-1).split(PART), gradient.reshape(-1).split(PART), strict=True)
            for total, part in parts:
                total += part


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
    # Of a large vocabulary a pass reads few rows: their gradient need not be as large as the whole matrix.
    dense = [] if torch.distributed.is_initialized() else [module for module, _, _ in owners if _has_dense_rows(module)]
    try:
        for module, name, weight in owners:
            casts[weight] = casts[weight] if weight in casts else cast(weight)
            module._parameters[name] = casts[weight]  # type: ignore[assignment]
        for module in dense:
            module.sparse = True
        yield
    finally:
        for module in dense:
            module.sparse = False
        for module, name, weight in owners:
            module._parameters[name] = weight


def _has_dense_rows(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and not module.sparse
