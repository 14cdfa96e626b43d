"""The reference model theta_o: the frozen base under a KL divergence."""

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from transformers import PreTrainedModel

from harmful_unlearn.models.precision import computing_in


class ReferenceModel:
    """theta_o, the base model in KL(P_theta_o || P_theta): frozen, in eval mode.

    With LoRA it is the trained model with its adapter switched off, so there is no second copy of the weights.

    Args:
        model: the trained model if it has an adapter (`shared` is then true), else a second model, to be frozen.
        precision: "bf16" to compute in it, for a second model in float32.
    """

    def __init__(self, model: PreTrainedModel, precision: str = "fp32"):
        self.model = model
        self._precision = precision
        self.shared = isinstance(model, PeftModel)
        if not self.shared:
            model.eval().requires_grad_(False)

    @contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        """The base model, for one forward pass."""
        if not self.shared:
            with computing_in(self._precision, self.model):
                yield self.model
            return
        training = self.model.training
        self.model.eval()
        try:
            with self.model.disable_adapter():
                yield self.model
        finally:
            self.model.train(training)
