"""The landing point theta' = theta_o - alpha * (theta - theta_o): the model that stage 2 will ship.

SKU's preservation term is evaluated at the copy theta, but what holds there need not hold at theta', on the base's
other side. Losses can be evaluated at theta' while theta is trained: their gradient is -alpha times that at theta'.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from harmful_unlearn.models.reference import ReferenceModel
from harmful_unlearn.models.sharding import local_parameters


class LandingPoint:
    """theta' in theta's place, for a while.

    With LoRA theta' is the same adapter, its scale times -alpha. In full fine-tuning theta is set aside, in one copy
    of the trained weights.

    Args:
        model: theta.
        base: theta_o; in full fine-tuning in float32, as theta is.
        scaling_coef: alpha.
    """

    def __init__(self, model: PreTrainedModel, base: ReferenceModel, scaling_coef: float):
        self._alpha = scaling_coef
        self._adapters = [module for module in model.modules() if isinstance(module, LoraLayer)]
        self._model, self._base = model, base
        self._aside: list[torch.Tensor] = []

    @contextmanager
    def reached(self) -> Iterator[float]:
        """Within the block the model is theta'; do the backward pass inside it.

        Yields:
            What to multiply a loss by, so that its gradient is that with respect to theta.
        """
        if self._adapters:
            scales = [dict(layer.scaling) for layer in self._adapters]
            for layer in self._adapters:
                layer.scaling.update({name: -self._alpha * scale for name, scale in layer.scaling.items()})
            try:
                yield 1.0
            finally:
                for layer, kept in zip(self._adapters, scales, strict=True):
                    layer.scaling.update(kept)
            return
        with torch.no_grad():
            # Looked up each time: wrapping a model for several processes replaces its parameters.
            trained, origins = local_parameters(self._model), local_parameters(self._base.model)
            self._aside = self._aside or [torch.empty_like(theta) for theta in trained]
            for theta, origin, kept in zip(trained, origins, self._aside, strict=True):
                kept.copy_(theta)
                # As stage 2 computes it, so that what is preserved is the model that is shipped.
                origin = origin.to(theta.device)
                theta.sub_(origin).mul_(-self._alpha).add_(origin)
        try:
            yield -self._alpha
        finally:
            with torch.no_grad():
                for theta, kept in zip(trained, self._aside, strict=True):
                    theta.copy_(kept)
