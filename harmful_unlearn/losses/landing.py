"""The landing point theta' = theta_o - alpha * (theta - theta_o): the model that stage 2 will write.

SKU's preservation term is computed at the harmful model theta. What holds there need not hold at theta', on the other
side of the base. A loss term can be computed at theta' while theta is trained: d theta' / d theta = -alpha.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from harmful_unlearn.models.reference import ReferenceModel
from harmful_unlearn.models.sharding import local_parameters


class LandingPoint:
    """Puts theta' in theta's place for a while.

    With LoRA, theta' is the same adapter with its scaling times -alpha. In full fine-tuning theta is saved in a copy
    of the trained weights, and restored.

    Args:
        model: theta.
        base: theta_o; in full fine-tuning in float32, as theta is.
        alpha: the scaling_coef of stage 2.
    """

    def __init__(self, model: PreTrainedModel, base: ReferenceModel, alpha: float):
        self._alpha = alpha
        self._adapters = [module for module in model.modules() if isinstance(module, LoraLayer)]
        self._model, self._base = model, base
        self._saved: list[torch.Tensor] = []

    @contextmanager
    def reached(self) -> Iterator[float]:
        """Within the block the model is theta'; do the backward pass inside it, too.

        Yields:
            The factor of the chain rule: times it, a loss has its gradient with respect to theta.
        """
        if self._adapters:
            scalings = [dict(layer.scaling) for layer in self._adapters]
            for layer in self._adapters:
                layer.scaling.update({name: -self._alpha * scaling for name, scaling in layer.scaling.items()})
            try:
                yield 1.0
            finally:
                for layer, scaling in zip(self._adapters, scalings, strict=True):
                    layer.scaling.update(scaling)
            return
        with torch.no_grad():
            # Looked up each time: wrapping a model for several processes replaces its parameters.
            trained, origins = local_parameters(self._model), local_parameters(self._base.model)
            self._saved = self._saved or [torch.empty_like(theta) for theta in trained]
            for theta, origin, saved in zip(trained, origins, self._saved, strict=True):
                saved.copy_(theta)
                # Computed as in stage 2, so that what is preserved is exactly the model that is written.
                origin = origin.to(theta.device)
                theta.sub_(origin).mul_(-self._alpha).add_(origin)
        try:
            yield -self._alpha
        finally:
            with torch.no_grad():
                for theta, saved in zip(trained, self._saved, strict=True):
                    theta.copy_(saved)
