"""The training objective: a weighted sum of loss terms, one forward pass over each batch of a step."""

from collections.abc import Callable
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
    at_scored,
    fused_loss,
    has_plain_head,
    head_of,
    replaced_head,
    scored_hidden,
)
from harmful_unlearn.losses.terms import LOSSES, LossParameters, LossTerm
from harmful_unlearn.models.blocks import hidden_states, steered_layer
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
        parameters: of the terms.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        weights: dict[str, float],
        base: ReferenceModel | None = None,
        parameters: LossParameters | None = None,
    ):
        self.weights = {name: weight for name, weight in weights.items() if weight}
        self.base = base
        self.parameters = parameters or LossParameters()
        self._layer = steered_layer(model.config, self.parameters.rmu_layer)
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
        total = torch.zeros(())
        values: dict[str, Tensor] = {}
        head_gradients: dict[str, Tensor] = {}
        for name, rows in batch._asdict().items():
            terms = {n: LOSSES[n] for n in self.weights}
            terms = {n: term for n, term in terms.items() if (term.batch, term.at_landing) == (name, at_landing)}
            if rows is None or not terms:
                continue
            # All terms of a batch share one forward and one backward pass.
            of_texts = any(term.of_text for term in terms.values())
            compute = self._of_texts if of_texts else self._linear
            part, of_terms = compute(model, rows, terms, head_gradients)
            total = part + total.to(part.device)
            values |= of_terms
        return total, values

    def _linear(
        self, model: PreTrainedModel, rows: Batch, terms: dict[str, LossTerm], head_gradients: dict
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of terms that are weighted sums of what they read, and each term."""
        # One weight an entry, so that all terms of a batch share one pass.
        parts = [self.weights[n] * term.sign * rows.weights[term.weights] for n, term in terms.items()]
        coefficient = torch.stack(parts).sum(0)
        (value,) = {term.value for term in terms.values()}
        if value == "cross-entropy":
            total, entries = self._cross_entropy(model, rows, coefficient, head_gradients)
        elif value == "kl":
            total, entries = self._divergence(model, rows, coefficient, head_gradients)
        else:
            entries = self._distance(model, rows, value)
            total = coefficient.to(entries.device) @ entries
        entries = entries.detach().to(coefficient.device)
        return total, {n: term.sign * (rows.weights[term.weights] @ entries) for n, term in terms.items()}

    def _of_texts(
        self, model: PreTrainedModel, rows: Batch, terms: dict[str, LossTerm], head_gradients: dict
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of terms that are functions of each text's log-probability, and each term."""
        counts = torch.stack([*rows.weights.values()])  # [texts, entries]: how often each entry counts in each text
        tokens = counts.abs().sum(1)
        base = torch.zeros(counts.shape[1], device=counts.device)
        if any(term.of_text.against_base for term in terms.values() if term.of_text):
            assert self.base
            with _no_gradient(), self.base.active() as reference:
                entries = self.cross_entropies(reference, rows)
            base = entries.to(counts.device, copy=True)

        def values(entries: Tensor) -> dict[str, Tensor]:
            found = {}
            for n, term in terms.items():
                assert term.of_text
                log_p = counts @ (base - entries if term.of_text.against_base else -entries)
                if term.of_text.per_token:
                    log_p = log_p / tokens.clamp(min=1)
                each = term.of_text.function(log_p, self.parameters)
                found[n] = term.sign * each[tokens > 0].sum() / rows.texts  # one without a token does not count
            return found

        def loss(entries: Tensor) -> Tensor:
            found = values(entries.to(counts.device))
            return torch.stack([self.weights[n] * value for n, value in found.items()]).sum()

        total, entries = self._cross_entropy(model, rows, loss, head_gradients)
        return total, values(entries.detach().to(counts.device))

    def _distance(self, model: PreTrainedModel, rows: Batch, value: str) -> Tensor:
        """Squared distances of hidden states, divided by their size, [entries]."""
        states = self._hidden(model, rows)
        if value == "from base":
            assert self.base
            with _no_gradient(), self.base.active() as reference:
                goal = self._hidden(reference, rows)
            goal = goal.to(states.device, copy=True)
        else:
            drawn = torch.rand(states.shape[-1], generator=torch.Generator().manual_seed(self.parameters.seed))
            goal = (self.parameters.rmu_coef * drawn / drawn.norm()).to(states.device)
        return (states - goal).square().mean(-1)[rows.index.to(states.device)]

    def _hidden(self, model: PreTrainedModel, rows: Batch) -> Tensor:
        """The hidden states that RMU reads, [scored, hidden] float32."""
        with replaced_head(model, lambda hidden: hidden[:, :1]):  # logits of all positions would be large
            return at_scored(hidden_states(model, rows.model_inputs, self._layer), rows).float()

    def _cross_entropy(
        self, model: PreTrainedModel, batch: Batch, loss: Tensor | Callable[[Tensor], Tensor], head_gradients: dict
    ) -> tuple[Tensor, Tensor]:
        """A loss of the cross-entropies (`CrossEntropy`), and the cross-entropies, [entries]."""
        if not self.fused:
            entries = cross_entropy(model, batch)
            return loss(entries) if callable(loss) else loss.to(entries.device) @ entries, entries
        device = execution_device(head_of(model))
        on_device = loss if callable(loss) else loss.to(device)
        score = CrossEntropy(batch.index.to(device), batch.target.to(device), on_device)
        total = fused_loss(model, batch, score, head_gradients)
        if callable(loss):  # the tangent has the gradient, but not the value
            total = total + (loss(score.values).to(total) - total).detach()
        return total, score.values

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
