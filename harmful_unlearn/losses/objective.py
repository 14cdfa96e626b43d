"""The losses of SKU's stage 1, by the paper's names, and those of the methods it is compared with.

    L = e1 * L_GD + e2 * L_RD + e3 * L_PD

Each is a sum over positions, weighted by the batch (data/collator.py), of one of two things: the cross-entropy of the
next token, or the KL divergence from the base. Which of them a method minimises is in methods.py.
"""

from collections.abc import Iterator
from contextlib import nullcontext

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
from harmful_unlearn.losses.landing import LandingPoint
from harmful_unlearn.losses.terms import LOSSES
from harmful_unlearn.models.offload import execution_device
from harmful_unlearn.models.reference import ReferenceModel
from harmful_unlearn.models.sharding import gather_full, is_sharded


class Objective:
    """A weighted sum of losses of one model.

    Args:
        model: whose head is looked at once: where its logits are not the plain product of hidden states and
            output embeddings, they are computed by the model itself, all at once.
        weights: of each loss, by name; those with 0 are left out.
        base: theta_o, for losses in NEED_BASE.
        scaling_coef: alpha, which says where the landing point is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        weights: dict[str, float],
        base: ReferenceModel | None = None,
        scaling_coef: float = 1.0,
    ):
        self.weights = {name: weight for name, weight in weights.items() if weight}
        self.base = base
        lands = any(LOSSES[name].at_landing for name in self.weights)
        self.landing = LandingPoint(model, base, scaling_coef) if lands else None
        models = [model] if base is None or base.shared else [model, base.model]
        self.fused = all(map(has_plain_head, models))

    def __call__(self, model: PreTrainedModel, texts: StepBatch) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """The sum in one or two parts, of which the gradients add up; one forward pass over each batch.

        Call `backward` on each part before the next is asked for: the second is computed at the landing point.

        Returns:
            A scalar that has a gradient, and each of its losses without its weight, in nats.
        """
        part, each = self._part(model, texts, lands=False)
        if each:
            yield part, each
        if self.landing:
            with self.landing.reached() as factor:
                part, each = self._part(model, texts, lands=True)
                if each:
                    yield factor * part, each

    def _part(self, model: PreTrainedModel, texts: StepBatch, lands: bool) -> tuple[Tensor, dict[str, Tensor]]:
        total, each, sums = 0.0, {}, {}
        for field, batch in texts._asdict().items():
            losses = {name: LOSSES[name] for name in self.weights}
            losses = {name: loss for name, loss in losses.items() if (loss.batch, loss.at_landing) == (field, lands)}
            if batch is None or not losses:
                continue
            coefficient = sum(
                self.weights[name] * loss.sign * batch.weights[loss.weights] for name, loss in losses.items()
            )
            diverges = any(loss.diverges for loss in losses.values())
            part, values = (self._divergence if diverges else self._cross_entropy)(model, batch, coefficient, sums)
            total = total + part
            values = values.detach().to(coefficient.device)
            for name, loss in losses.items():
                each[name] = loss.sign * (batch.weights[loss.weights] @ values)
        return total, each

    def _cross_entropy(
        self, model: PreTrainedModel, batch: Batch, coefficient: Tensor, sums: dict
    ) -> tuple[Tensor, Tensor]:
        if self.fused:
            score = CrossEntropy(*(one.to(_place(model)) for one in (batch.index, batch.target, coefficient)))
            return fused_loss(model, batch, score, sums), score.values
        values = cross_entropy(model, batch).to(coefficient.device)
        return coefficient @ values, values

    def _divergence(
        self, model: PreTrainedModel, batch: Batch, coefficient: Tensor, sums: dict
    ) -> tuple[Tensor, Tensor]:
        if self.fused:
            with _no_gradient(), self.base.active() as frozen:
                hidden = scored_hidden(frozen, batch)
            head = _at_hand(head_of(frozen), hidden.dtype)
            # Offloaded weights of a second copy are not brought by the first one's forward pass.
            with nullcontext() if self.base.shared else align_module_device(head):
                score = Divergence(hidden, head, coefficient.to(_place(model)))
                return fused_loss(model, batch, score, sums), score.values
        with _no_gradient(), self.base.active() as frozen:
            log_p = scored_logits(frozen, batch).log_softmax(-1)
        log_q = scored_logits(model, batch).log_softmax(-1)
        # Outside of inference mode, since autograd keeps p; the base may sit on another device.
        log_p = log_p.to(log_q.device, copy=True)
        values = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).to(coefficient.device)
        return coefficient @ values, values


def _no_gradient():
    # Weights that are gathered from other processes in inference mode could not be trained with afterwards.
    return torch.no_grad() if torch.distributed.is_initialized() else torch.inference_mode()


def _at_hand(head: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """Output embeddings outside of their model's forward pass, where engines have only a part of them here."""
    if not is_sharded(head.weight):
        return head
    gathered = nn.Module()
    for name, weight in (("weight", head.weight), ("bias", head.bias)):
        gathered.register_buffer(name, weight if weight is None else gather_full(weight).to(dtype))
    return gathered


def _place(model: PreTrainedModel) -> torch.device:
    return execution_device(head_of(model))


def scored_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Logits of the scored positions alone, as the model defines them (its softcap or scale included).

    The hidden states of all other positions never meet the output embeddings, so logits of
    [rows, length, vocabulary] never exist.

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
