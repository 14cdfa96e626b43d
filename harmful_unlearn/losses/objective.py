"""The training objective: a weighted sum of loss terms, one forward pass over each batch of a step."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from harmful_unlearn.data.batch import Batch
from harmful_unlearn.data.step_batches import StepBatch
from harmful_unlearn.losses.fused_linear import (
    CrossEntropy,
    Divergence,
    fused_loss,
    has_plain_head,
    head_of,
    scored_hidden,
)
from harmful_unlearn.losses.terms import LOSSES
from harmful_unlearn.models.offload import execution_device
from harmful_unlearn.models.reference import ReferenceModel
from harmful_unlearn.models.sharding import gather_full, is_sharded


class Objective:
    """The weighted sum of a method's loss terms (terms.py).

    Args:
        model: theta. Its LM head is inspected once. If logits are more than `lm_head(hidden)` (softcap, scaling), the
            fused path is off and the model computes them, for all scored positions at once.
        weights: the weight of each term, by name; those with 0 are left out.
        base: theta_o, for the terms in NEED_BASE.
    """

    def __init__(self, model: PreTrainedModel, weights: dict[str, float], base: ReferenceModel | None = None):
        self.weights = {name: weight for name, weight in weights.items() if weight}
        self.base = base
        models = [model] if base is None or base.shared else [model, base.model]
        self.fused = all(map(has_plain_head, models))

    def __call__(self, model: PreTrainedModel, batch: StepBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The terms at theta: one forward pass over each batch that they read.

        Returns:
            The weighted sum, a scalar (without a gradient if the method has no term at theta), and the value of each
            term without its weight, in nats.
        """
        return self._weighted_sum(model, batch, at_landing=False)

    def at_landing(self, model: PreTrainedModel, batch: StepBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The same for the terms at the landing point; call it within `LandingPoint.reached`."""
        return self._weighted_sum(model, batch, at_landing=True)

    def cross_entropies(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """The cross-entropy of every entry of a batch, in nats, [entries]; without a gradient."""
        return self._cross_entropy(model, batch, torch.zeros_like(batch.index, dtype=torch.float32), {})[1]

    def _weighted_sum(
        self, model: PreTrainedModel, batch: StepBatch, at_landing: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        total, values = torch.zeros(()), {}
        head_gradients: dict[str, Tensor] = {}
        for name, rows in batch._asdict().items():
            terms = {n: LOSSES[n] for n in self.weights}
            terms = {n: term for n, term in terms.items() if (term.batch, term.at_landing) == (name, at_landing)}
            if rows is None or not terms:
                continue
            # One weight an entry, so that all terms of a batch share one forward and one backward pass.
            coefficient = sum(self.weights[n] * term.sign * rows.weights[term.weights] for n, term in terms.items())
            compute = self._divergence if any(term.diverges for term in terms.values()) else self._cross_entropy
            part, entries = compute(model, rows, coefficient, head_gradients)
            total = part + total.to(part.device)
            entries = entries.detach().to(coefficient.device)
            for n, term in terms.items():
                values[n] = term.sign * (rows.weights[term.weights] @ entries)
        return total, values

    def _cross_entropy(
        self, model: PreTrainedModel, batch: Batch, coefficient: Tensor, head_gradients: dict
    ) -> tuple[Tensor, Tensor]:
        """coefficient @ cross-entropies, and the cross-entropies, [entries]."""
        if self.fused:
            device = execution_device(head_of(model))
            score = CrossEntropy(batch.index.to(device), batch.target.to(device), coefficient.to(device))
            return fused_loss(model, batch, score, head_gradients), score.values
        entries = cross_entropy(model, batch).to(coefficient.device)
        return coefficient @ entries, entries

    def _divergence(
        self, model: PreTrainedModel, batch: Batch, coefficient: Tensor, head_gradients: dict
    ) -> tuple[Tensor, Tensor]:
        """coefficient @ KL(P_theta_o || P_theta), and the divergences, [scored]."""
        assert self.base
        if self.fused:
            with _no_gradient(), self.base.active() as reference:
                hidden = scored_hidden(reference, batch)
            head = _gathered_head(head_of(reference), hidden.dtype)
            # The model's own forward pass does not load the offloaded weights of a separate reference model.
            with nullcontext() if self.base.shared else align_module_device(head):
                score = Divergence(hidden, head, coefficient.to(execution_device(head_of(model))))
                return fused_loss(model, batch, score, head_gradients), score.values
        with _no_gradient(), self.base.active() as reference:
            log_p = scored_logits(reference, batch).log_softmax(-1)
        log_q = scored_logits(model, batch).log_softmax(-1)
        # Copied outside of inference mode, since autograd keeps p; the base may be on another device.
        log_p = log_p.to(log_q.device, copy=True)
        entries = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).to(coefficient.device)
        return coefficient @ entries, entries


def _no_gradient():
    # Weights that were gathered from other processes in inference mode could not be trained afterwards.
    return torch.no_grad() if torch.distributed.is_initialized() else torch.inference_mode()


def _gathered_head(head: Any, dtype: torch.dtype) -> Any:
    """The LM head outside of its model's forward pass, where engines have only a shard of it."""
    if not is_sharded(head.weight):
        return head
    gathered = nn.Module()
    for name, weight in (("weight", head.weight), ("bias", head.bias)):
        gathered.register_buffer(name, weight if weight is None else gather_full(weight).to(dtype))
    return gathered


def scored_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Logits of the scored positions only, as the model defines them (softcap or scaling included).

    The LM head sees no other position, so logits of [rows, length, vocabulary] never exist.

    Returns:
        [scored, vocabulary] float32.
    """

    def keep_scored(_module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]  # [rows, length, hidden]
        return (hidden[batch.row.to(hidden.device), batch.position.to(hidden.device)],)

    hook = head_of(model).register_forward_pre_hook(keep_scored)
    try:
        output = model(**batch.model_inputs, use_cache=False)
    finally:
        hook.remove()
    return output.logits.float()


def cross_entropy(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Cross-entropy of the target of every entry, one forward pass, by the model's own logits.

    Returns:
        [entries] float32, nats.
    """
    logits = scored_logits(model, batch)
    index, target = batch.index.to(logits.device), batch.target.to(logits.device)
    return F.cross_entropy(logits[index], target, reduction="none")
