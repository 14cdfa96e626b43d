"""The output embeddings and a loss in one step: logits of [positions, vocabulary] exist a chunk at a time.

The logits of a chunk of positions are turned into the loss's gradient where they lie, and that into the gradients
of the hidden states and of the output embeddings, all in the forward pass; the backward pass only scales them.
No kept library does this for every model (Liger's kernels need a GPU and have no OPT) or for the KL between two models.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from harmful_unlearn.data.batch import Batch
from harmful_unlearn.models.offload import execution_device

CHUNK = 32 * 2**20  # bytes of float32 logits at a time


class Score(Protocol):
    """What a loss does with the logits of some positions."""

    def __call__(self, logits: Tensor, log_q: Tensor, start: int, gradient: bool) -> Tensor:
        """The sum that is minimised, over positions from `start`.

        Args:
            logits: [positions, vocabulary] float32; `gradient` replaces them by the sum's gradient.
            log_q: their log_softmax, to be overwritten at will.
        """


class CrossEntropy:
    """coefficient @ cross-entropy, of entries that read a position each.

    Args:
        index, target: as in `Batch`.
        coefficient: [entries].

    Attributes:
        values: [entries] float32, the cross-entropies in nats once all positions have been scored.
    """

    def __init__(self, index: Tensor, target: Tensor, coefficient: Tensor):
        self.index, self.target, self.coefficient = index, target, coefficient
        self.values = torch.zeros_like(coefficient)

    def __call__(self, logits: Tensor, log_q: Tensor, start: int, gradient: bool) -> Tensor:
        ends = torch.tensor([start, start + len(logits)], device=self.index.device)
        here = slice(*torch.searchsorted(self.index, ends).tolist())  # index is ascending
        index, target, coefficient = self.index[here] - start, self.target[here], self.coefficient[here]
        self.values[here] = -log_q[index, target]
        if gradient:
            weight = logits.new_zeros(len(logits), 1).index_add_(0, index, coefficient[:, None])
            torch.exp(log_q, out=logits).mul_(weight).index_put_((index, target), -coefficient, accumulate=True)
        return coefficient @ self.values[here]


class Divergence:
    """coefficient @ KL(p || q), q by the logits and p by the base's hidden states.

    Args:
        hidden: [positions, hidden] of the base.
        head: the base's output embeddings; their weights are looked up when logits are computed.
        coefficient: [positions].

    Attributes:
        values: [positions] float32, the divergences in nats once all positions have been scored.
    """

    def __init__(self, hidden: Tensor, head: nn.Module, coefficient: Tensor):
        self.hidden, self.head, self.coefficient = hidden, head, coefficient
        self.values = torch.zeros_like(coefficient)

    def __call__(self, logits: Tensor, log_q: Tensor, start: int, gradient: bool) -> Tensor:
        here = slice(start, start + len(logits))
        base = F.linear(self.hidden[here].to(self.head.weight), self.head.weight, self.head.bias)
        log_p = base.to(logits).log_softmax(-1)  # the base may sit on another device
        self.values[here] = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        if gradient:
            torch.sub(log_q.exp_(), log_p.exp_(), out=logits).mul_(self.coefficient[here, None])
        return self.coefficient[here] @ self.values[here]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, score: Score, dtype: torch.dtype, sums: dict
    ) -> Tensor:
        """`score` summed over all positions; matrices are multiplied in `dtype`.

        Args:
            sums: the gradients of weight and bias of calls whose results are added up, in one tensor each: the
                first call hands them to autograd, the others only add to them.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            needed = ctx.needs_input_grad[:3]
            of_hidden = torch.empty_like(hidden)
            of_weight, of_bias = sums.get("weight"), sums.get("bias")
            first = not sums
            rows, matrix = hidden.to(dtype), weight.to(dtype)
            total = hidden.new_zeros((), dtype=torch.float32)
            step = max(1, min(CHUNK // (4 * len(weight)), len(rows)))
            full, spare = (_room(name, step, len(weight), torch.float32, hidden.device) for name in ("full", "spare"))
            low = full if dtype == torch.float32 else _room("low", step, len(weight), dtype, hidden.device)
            for start in range(0, len(rows), step):
                here = slice(start, start + step)
                size = len(rows[here])
                logits, gradient = full[:size], low[:size]
                torch.mm(rows[here], matrix.T, out=gradient)
                if low is not full:
                    logits.copy_(gradient)
                if bias is not None:
                    logits += bias
                log_q = torch.log_softmax(logits, -1, out=spare[:size])
                total += score(logits, log_q, start, any(needed))
                if low is not full:
                    gradient.copy_(logits)
                if needed[0]:
                    of_hidden[here] = gradient @ matrix
                if needed[1] and of_weight is not None and dtype == weight.dtype:
                    of_weight.addmm_(gradient.T, rows[here])
                elif needed[1]:
                    part = (gradient.T @ rows[here]).to(weight.dtype)
                    of_weight = part if of_weight is None else of_weight.add_(part)
                if needed[2]:
                    part = logits.sum(0).to(bias.dtype)
                    of_bias = part if of_bias is None else of_bias.add_(part)
            if needed[1] and of_weight is None:  # no position here; other processes wait for a gradient
                of_weight = torch.zeros_like(weight)
            if needed[2] and of_bias is None:
                of_bias = torch.zeros_like(bias)
            sums |= {"weight": of_weight, "bias": of_bias}
        ctx.sums = of_hidden if needed[0] else None, of_weight if first else None, of_bias if first else None
        return total

    @staticmethod
    def backward(ctx, scale: Tensor):
        return *(one if one is None else one.mul_(scale) for one in ctx.sums), None, None, None


def _room(name: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _memory(name, max(CHUNK // 4, columns), dtype, device)[: rows * columns].view(rows, columns)


@lru_cache(maxsize=8)
def _memory(_name: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Kept for good: to a CPU, fresh memory of this size costs as much as what is done in it.
    with torch.inference_mode(False):
        return torch.empty(size, dtype=dtype, device=device)


def fused_loss(model: PreTrainedModel, batch: Batch, score: Score, sums: dict) -> Tensor:
    """`score` over the scored positions of a batch, one forward pass. Returns a scalar, float32.

    Only for a model that `has_plain_head`.

    Args:
        sums: one empty dict for all losses that are added up before the backward pass: they share the gradient of
            the output embeddings.
    """
    head = head_of(model)

    def scored(hidden: Tensor) -> Tensor:
        with align_module_device(head):  # which may be offloaded
            weight, bias = head.weight, head.bias
            dtype = weight.dtype
            if torch.is_autocast_enabled(weight.device.type):
                dtype = torch.get_autocast_dtype(weight.device.type)
            return _Fused.apply(_chosen(hidden, batch).to(weight.device), weight, bias, score, dtype, sums)

    with _head_does(model, scored):
        return model(**batch.model_inputs, use_cache=False).logits


def scored_hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Final hidden states [scored, hidden] of the scored positions; the output embeddings are not used."""
    with _head_does(model, lambda hidden: _chosen(hidden, batch)):
        return model(**batch.model_inputs, use_cache=False).logits


def head_of(model: nn.Module) -> nn.Module:
    """The output embeddings of a model, which a wrapper for several processes may hold as its `module`."""
    return getattr(model, "module", model).get_output_embeddings()


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether the model's logits are its output embeddings' product and nothing else (no softcap, no scale)."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:  # quantized or adapted
        return False
    found = []

    def large(hidden: Tensor) -> Tensor:
        found.append(torch.linspace(-1000, 1000, hidden.numel(), device=hidden.device).to(hidden).view_as(hidden))
        return found[-1]

    ids = torch.zeros(1, 2, dtype=torch.long, device=execution_device(model))
    training = model.training
    model.eval()
    with _head_does(model, large), torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits
    model.train(training)
    return len(found) == 1 and torch.equal(logits, found[0].to(logits))


def _chosen(hidden: Tensor, batch: Batch) -> Tensor:
    return hidden[batch.row.to(hidden.device), batch.position.to(hidden.device)]


@contextmanager
def _head_does(model: PreTrainedModel, forward) -> Iterator[None]:
    """Within the block the output embeddings' forward is `forward`; inside the model's own forward pass, where
    parallel wrappers have their weights at hand.
    """
    head = head_of(model)
    usual = head.__dict__.get("forward")  # a wrapper's, or the class's if there is none
    head.forward = forward
    try:
        yield
    finally:
        if usual is None:
            del head.forward
        else:
            head.forward = usual
