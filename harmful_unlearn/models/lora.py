"""LoRA adapters: settings, target modules, creation, loading."""

from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from harmful_unlearn.errors import UserError, first_line
from harmful_unlearn.models.offload import materialized
from harmful_unlearn.storage.safetensors_io import SafetensorsFolder

LORA_ABOVE = 3e9  # parameters; the paper fine-tunes 2.7B in full, and 7B with LoRA


@dataclass(frozen=True)
class Lora:
    """Settings of a LoRA adapter; the scale is alpha / r, dropout is 0."""

    r: int
    alpha: int
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")


def add_lora(model: PreTrainedModel, lora: Lora, base_name: str) -> PreTrainedModel:
    """Freeze the model and put a trainable LoRA adapter (float32) on it.

    Raises:
        UserError: no module of the model has one of the target names.
    """
    check_lora_targets(model, lora)
    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=list(lora.target_modules),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    with materialized(model):
        adapted = get_peft_model(model, settings)
    adapted.peft_config["default"].base_model_name_or_path = base_name
    return adapted


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put the adapter that is saved in `folder` on the model, for use.

    Not by PeftModel.from_pretrained, which for a base that is partly on disk writes a second copy of its files.

    Raises:
        UserError: the adapter is broken, or does not fit the model.
    """
    try:
        with materialized(model):
            adapted = get_peft_model(model, PeftConfig.from_pretrained(folder))
    except ValueError as error:  # target modules that the model has not
        raise UserError(_NO_FIT.format(folder=folder, why=first_line(error))) from None
    fill_adapter(adapted, folder)
    return adapted.eval()


_NO_FIT = "the adapter in {folder} does not fit the model ({why}): give its base"


def fill_adapter(model: PeftModel, folder: Path) -> None:
    """Give the model's adapter the values of the one that is saved in `folder`.

    Raises:
        UserError: that is broken, or does not fit.
    """
    if "adapter_model.safetensors" not in SafetensorsFolder(folder, "adapter_model").shards:
        raise UserError(f"{folder} has its adapter in shards: save it as one adapter_model.safetensors")
    try:
        # Not by PEFT's own loader, which would take a pickle that lies beside it.
        found = set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
        if wrong := [*found.unexpected_keys, *(name for name in found.missing_keys if "lora_" in name)]:
            raise ValueError(f"{wrong[0]} is in one of the two alone")
    except (ValueError, RuntimeError) as error:  # shapes that the model has not
        raise UserError(_NO_FIT.format(folder=folder, why=first_line(error))) from None


def check_lora_targets(model: PreTrainedModel, lora: Lora) -> None:
    """Raises UserError, naming the candidates, where the model has none of LoRA's target modules."""
    candidates = lora_candidates(model)
    unknown = sorted(set(lora.target_modules) - set(candidates))
    if unknown:
        raise UserError(
            f"this model has no module {', '.join(unknown)} for LoRA: "
            f"choose --lora_target_modules from {', '.join(candidates)}"
        )


def lora_candidates(model: PreTrainedModel) -> list[str]:
    """The names of the model's linear layers, the output embeddings left out."""
    return sorted({name.rsplit(".", 1)[-1] for name, _ in linear_layers(model)})


def linear_layers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Name and module of the model's linear layers, quantized ones among them, the output embeddings left out."""
    head = model.get_output_embeddings()
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
