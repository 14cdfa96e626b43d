"""The LM head and a loss in one step ("fused linear cross entropy"): logits exist for a chunk of positions at a time.

The logits of a chunk are overwritten by the loss's gradient, which gives the gradients of the hidden states and of the
LM head, all in the forward pass; the backward pass only scales them.

Libraries that do this do not cover what is needed here: a weight for each entry, and the KL between two models. Liger's
kernels need a GPU and have no OPT. `torch.nn.functional.linear_cross_entropy` (torch 2.13) has a chunked path for sums
and means only; once it takes a weight for each entry without computing the logits again, `CrossEntropy` can go.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from harmful_unlearn.data.batch import Batch
from harmful_unlearn.models.offload import execution_device

CHUNK = 32 * 2**20  # bytes of float32 logits at a time
LEAST_ROWS = 64  # of a chunk: with fewer, reading a large LM head takes longer than the products with it
PRODUCT = 4 * 2**20  # bytes of a product at a time, where it is added to a sum of higher precision


class Score(Protocol):
    """A loss of the logits of some positions."""

    def settle(self, first_look: Callable[[], Any]) -> None:
        """Called first; `first_look` calls the score for all positions, without a gradient, if it needs that."""

    def __call__(self, logits: Tensor, start: int, gradient: bool) -> Tensor:
        """The weighted sum over the positions from `start` on, a scalar.

        Args:
            logits: [positions, vocabulary] float32; overwritten, with `gradient` by the sum's gradient.
        """


class CrossEntropy:
    """A loss of the cross-entropies of entries, each of which reads one position.

    Args:
        index, target: as in `Batch`.
        loss: [entries], their coefficients in a sum; or any function of the cross-entropies, [entries], which is then
            replaced by its tangent: its gradient is coefficients for a sum, once the cross-entropies are known.

    Attributes:
        values: [entries] float32, the cross-entropies in nats once all positions have been scored.
    """

    def __init__(self, index: Tensor, target: Tensor, loss: Tensor | Callable[[Tensor], Tensor]):
        self.index, self.target, self._loss = index, target, loss
        self.values = torch.zeros(len(index), device=index.device)
        self.coefficient = self.values if callable(loss) else loss

    def settle(self, first_look: Callable[[], Any]) -> None:
        if not callable(self._loss):
            return
        with torch.no_grad():
            first_look()
        with torch.enable_grad(), torch.autocast(self.values.device.type, enabled=False):
            values = self.values.clone().requires_grad_()
            loss = self._loss(values)
        (self.coefficient,) = torch.autograd.grad(loss, values)

    def __call__(self, logits: Tensor, start: int, gradient: bool) -> Tensor:
        ends = torch.tensor([start, start + len(logits)], device=self.index.device)
        chunk = slice(*torch.searchsorted(self.index, ends).tolist())  # index is ascending
        index, target, coefficient = self.index[chunk] - start, self.target[chunk], self.coefficient[chunk]
        of_target = logits[index, target]
        largest, place = logits.max(-1)
        q = torch.softmax(logits, -1, out=logits)
        # log(sum(exp(logits))) without a second pass: q at the largest logit is never tiny.
        log_sum = largest - q.gather(1, place[:, None])[:, 0].log()
        self.values[chunk] = log_sum[index] - of_target
        if gradient:
            weight = logits.new_zeros(len(logits), 1).index_add_(0, index, coefficient[:, None])
            q.mul_(weight).index_put_((index, target), -coefficient, accumulate=True)
        return coefficient @ self.values[chunk]


class Divergence:
    """coefficient @ KL(p || q): q from the logits, p from the reference model's hidden states.

    Args:
        hidden: [positions, hidden] of the reference model.
        head: the reference model's LM head; its weights are looked up when logits are computed.
        coefficient: [positions].

    Attributes:
        values: [positions] float32, the divergences in nats once all positions have been scored.
    """

    def __init__(self, hidden: Tensor, head: Any, coefficient: Tensor):
        self.hidden, self.head, self.coefficient = hidden, head, coefficient
        self.values = torch.zeros_like(coefficient)

    def settle(self, first_look: Callable[[], Any]) -> None:
        pass  # linear

    def __call__(self, logits: Tensor, start: int, gradient: bool) -> Tensor:
        chunk = slice(start, start + len(logits))
        base = F.linear(self.hidden[chunk].to(self.head.weight), self.head.weight, self.head.bias)
        log_p = base.to(logits)  # the base may sit on another device
        torch.log_softmax(log_p, -1, out=log_p)
        log_q = torch.log_softmax(logits, -1, out=logits)
        p = log_p.exp()
        self.values[chunk] = log_p.sub_(log_q).mul_(p).sum(-1)
        if gradient:
            log_q.exp_().sub_(p).mul_(self.coefficient[chunk, None])
        return self.coefficient[chunk] @ self.values[chunk]


def chunk_rows(vocabulary: int) -> int:
    """The positions whose logits exist at a time."""
    return max(CHUNK // (4 * vocabulary), LEAST_ROWS)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, score: Score, dtype: torch.dtype, sums: dict
    ) -> Tensor:
        """`score` summed over all positions; matrices are multiplied in `dtype`.

        Args:
            sums: gradient buffers of the LM head, shared by all losses of a step. The first call returns them to
                autograd; later calls accumulate into them in place.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            hidden_needed, weight_needed, bias_needed = ctx.needs_input_grad[:3]
            any_needed = hidden_needed or weight_needed or bias_needed
            hidden_grad = torch.empty_like(hidden)
            weight_grad, bias_grad = sums.get("weight"), sums.get("bias")
            is_first = not sums
            rows, matrix = hidden.to(dtype), weight.to(dtype)
            total = hidden.new_zeros((), dtype=torch.float32)
            step = max(1, min(chunk_rows(len(weight)), len(rows)))
            full = _buffer("full", step, len(weight), torch.float32, hidden.device)
            low = full if dtype == torch.float32 else _buffer("low", step, len(weight), dtype, hidden.device)
            if weight_needed and weight_grad is None:
                weight_grad = torch.zeros_like(weight)
            if bias is not None and bias_needed and bias_grad is None:
                bias_grad = torch.zeros_like(bias)
            for start in range(0, len(rows), step):
                chunk = slice(start, start + step)
                size = len(rows[chunk])
                logits, gradient = full[:size], low[:size]
                torch.mm(rows[chunk], matrix.T, out=gradient)
                if low is not full:
                    logits.copy_(gradient)
                if bias is not None:
                    logits += bias
                total += score(logits, start, any_needed)
                if low is not full and any_needed:
                    gradient.copy_(logits)
                if hidden_needed:
                    hidden_grad[chunk] = gradient @ matrix
                if weight_grad is not None and dtype == weight.dtype:
                    weight_grad.addmm_(gradient.T, rows[chunk])
                elif weight_grad is not None:
                    _add_product(weight_grad, gradient.T, rows[chunk])
                if bias_grad is not None:
                    bias_grad += logits.sum(0)
            sums |= {"weight": weight_grad, "bias": bias_grad}
        head_grads = (weight_grad, bias_grad) if is_first else (None, None)
        ctx.gradients = hidden_grad if hidden_needed else None, *head_grads
        return total

    @staticmethod
    def backward(ctx, scale: Tensor):
        return *(grad if grad is None else grad.mul_(scale) for grad in ctx.gradients), None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, a few rows at a time, so that the product in its lower precision stays in the cache."""
    step = max(1, PRODUCT // (right.element_size() * right.shape[1]))
    for start in range(0, len(total), step):
        total[start : start + step] += left[start : start + step] @ right


def _buffer(name: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    size = max(CHUNK // 4, chunk_rows(columns) * columns)
    return _memory(name, size, dtype, device)[: rows * columns].view(rows, columns)


@lru_cache(maxsize=8)
def _memory(_name: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Kept forever: on a CPU, allocating this much memory takes as long as the work in it.
    with torch.inference_mode(False):
        return torch.empty(size, dtype=dtype, device=device)


def fused_loss(model: PreTrainedModel, batch: Batch, score: Score, sums: dict) -> Tensor:
    """`score` summed over the scored positions of a batch, in one forward pass. Returns a scalar, float32.

    Only for a model that `has_plain_head`.

    Args:
        sums: one dict, empty at first, for all losses that are added up before the backward pass: they share the
            gradient of the LM head.
    """
    head = head_of(model)

    def scored(hidden: Tensor) -> Tensor:
        with align_module_device(head):  # which may be offloaded
            weight, bias = head.weight, head.bias
            dtype = weight.dtype
            if torch.is_autocast_enabled(weight.device.type):
                dtype = torch.get_autocast_dtype(weight.device.type)
            states = at_scored(hidden, batch).to(weight.device)

            def total(sums: dict) -> Tensor:
                tensors: list[Tensor | None] = [states, weight, bias]
                if not torch.is_grad_enabled():  # which forward() cannot see
                    tensors = [one if one is None else one.detach() for one in tensors]
                return _Fused.apply(*tensors, score, dtype, sums)

            score.settle(lambda: total({}))
            return total(sums)

    with replaced_head(model, scored):
        return model(**batch.model_inputs, use_cache=False).logits


def scored_hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Final hidden states [scored, hidden] of the scored positions; the LM head is not used."""
    with replaced_head(model, lambda hidden: at_scored(hidden, batch)):
        return model(**batch.model_inputs, use_cache=False).logits


def head_of(model: Any) -> Any:
    """The LM head (output embeddings) of a model, also inside a wrapper for several processes."""
    return getattr(model, "module", model).get_output_embeddings()


def has_plain_head(model: Any) -> bool:
    """Whether the model's logits are `lm_head(hidden)` and nothing else (no softcap, no scaling)."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:  # quantized, or with an adapter
        return False
    planted: list[Tensor] = []

    def plant(hidden: Tensor) -> Tensor:  # values that a softcap or a scaling would change
        planted.append(torch.linspace(-1000, 1000, hidden.numel(), device=hidden.device).to(hidden).view_as(hidden))
        return planted[-1]

    ids = torch.zeros(1, 2, dtype=torch.long, device=execution_device(model))
    training = model.training
    model.eval()
    with replaced_head(model, plant), torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits
    model.train(training)
    return len(planted) == 1 and torch.equal(logits, planted[0].to(logits))


def at_scored(hidden: Tensor, batch: Batch) -> Tensor:
    """Hidden states [scored, hidden] of the scored positions, of [rows, length, hidden]."""
    return hidden[batch.row.to(hidden.device), batch.position.to(hidden.device)]


@contextmanager
def replaced_head(model: PreTrainedModel, forward) -> Iterator[None]:
    """Within the block the LM head's forward is `forward`.

    It runs inside the model's own forward pass, where parallel wrappers have gathered the head's weights.
    """
    head = head_of(model)
    original = head.__dict__.get("forward")  # a wrapper's; None: the class's
    head.forward = forward
    try:
        yield
    finally:
        if original is None:
            del head.forward
        else:
            head.forward = original
