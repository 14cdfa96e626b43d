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
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if device.type == "cpu" and any(map(capabilities.get, BF16_INSTRUCTIONS)) else "fp32"


PART = 2**17  # elements that a CPU adds at a time; they stay in its cache


class _Cast(torch.autograd.Function):
    """A weight in bf16, whose gradient is added to the weight's own without a float32 copy of it."""

    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return weight.to(torch.bfloat16)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> None:
        if ctx.weight.grad is None:
            ctx.weight.grad = torch.zeros_like(ctx.weight, memory_format=torch.contiguous_format)
        total = ctx.weight.grad
        if gradient.is_sparse:
            total.index_add_(0, gradient._indices()[0], gradient._values().to(total.dtype))
        elif gradient.is_cpu:  # it adds tensors of two dtypes by making one of them anew
            for part, more in zip(total.view(-1).split(PART), gradient.reshape(-1).split(PART), strict=True):
                part += more
        else:
            total += gradient


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
    is_alone = not torch.distributed.is_initialized()
    cast = _Cast.apply if is_alone else (lambda weight: weight.to(torch.bfloat16))
    casts: dict[Tensor, Tensor] = {}  # a weight that is tied is cast once
    # Of a large vocabulary a pass reads few rows: on a CPU their gradient is not made as large as the whole matrix.
    is_sparse = {module: module.sparse for module, _, _ in owners if isinstance(module, nn.Embedding)}
    try:
        for module, name, weight in owners:
            casts[weight] = casts[weight] if weight in casts else cast(weight)
            module._parameters[name] = casts[weight]  # type: ignore[assignment]
        for embedding, sparse in is_sparse.items():
            embedding.sparse = sparse or (embedding.weight.is_cpu and is_alone)
        yield
    finally:
        for embedding, sparse in is_sparse.items():
            embedding.sparse = sparse
        for module, name, weight in owners:
            module._parameters[name] = weight
