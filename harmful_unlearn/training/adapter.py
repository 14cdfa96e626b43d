"""Which adapter a model gets, if any, by the flags and the table of models."""

from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel

from harmful_unlearn.errors import UserError
from harmful_unlearn.models.lora import LORA_ABOVE, Lora, check_lora_targets, lora_candidates
from harmful_unlearn.training.flags import TrainingSettings


def choose_lora(
    settings: TrainingSettings, structure: PreTrainedModel, table: Mapping[str, Lora | None], others: Lora
) -> Lora | None:
    """LoRA's settings for this model by the flags and the table, or None for full fine-tuning.

    Raises:
        UserError: the model has no module of that name, or a LoRA flag is given for full fine-tuning.
    """
    is_large = structure.num_parameters() > LORA_ABOVE
    listed = table.get(settings.model_name, others if is_large else None)
    targets = settings.lora_target_modules
    flags = {"r": settings.lora_r, "alpha": settings.lora_alpha, "target_modules": tuple(targets) if targets else None}
    given: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    if settings.lora == "off" or (settings.lora == "auto" and listed is None):
        if given:
            raise UserError(f"--lora_{next(iter(given))} does nothing in full fine-tuning: add --lora on")
        return None
    lora = replace(listed or others, **given)
    if settings.model_name not in table and not targets:
        linear = lora_candidates(structure)
        if not set(lora.target_modules) <= set(linear):
            lora = replace(lora, target_modules=tuple(linear))  # no q_proj and v_proj here: every linear layer
    check_lora_targets(structure, lora)
    return lora


def check_four_bits(lora: Lora | None, device: torch.device) -> None:
    """Raises UserError where a base in 4 bits cannot be trained on."""
    if not lora:
        raise UserError("--quantize trains an adapter on a base that stays in 4 bits: add --lora on")
    if find_spec("bitsandbytes") is None:
        raise UserError("--quantize 4bit needs bitsandbytes: pip install bitsandbytes, or leave it out")
    if device.type != "cuda":  # for a CPU, bitsandbytes repacks weights for inference, which stops gradients
        raise UserError(f"--quantize 4bit needs a CUDA GPU, and the device here is {device}: leave it out")
