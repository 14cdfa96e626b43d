"""LoRA adapters: settings, target modules, creation, loading."""

import warnings
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
NO_FIT = "the adapter in {folder} does not fit the model ({why}): give its base"


@dataclass(frozen=True)
class Lora:
    """Settings of a LoRA adapter, scaled by alpha / r; dropout is 0."""

    r: int
    alpha: int
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")


def add_lora(model: PreTrainedModel, lora: Lora, base_name: str, blocks: list[int] | None = None) -> PreTrainedModel:
    """Freeze the model and add a trainable LoRA adapter in float32.

    Args:
        blocks: the layers that get one, from 0; None: all.

    Raises:
        UserError: as `check_lora_targets`.
    """
    check_lora_targets(model, lora)
    targets = list(lora.target_modules)
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, target_modules=targets, task_type="CAUSAL_LM", layers_to_transform=blocks
    )
    with materialized(model):
        adapted = _with_adapter(model, config)
    adapted.peft_config["default"].base_model_name_or_path = base_name
    return adapted


def load_adapter(model: PreTrainedModel | PeftModel, folder: Path, name: str = "default") -> PeftModel:
    """Add the adapter saved in `folder` to the model, for inference.

    PeftModel.from_pretrained would write a second copy of the files of a base that is partly on disk.

    Args:
        model: changed in place. It may have adapters of other names (PEFT's `set_adapter` chooses one).

    Raises:
        UserError: the adapter is broken, or does not fit the model.
    """
    try:
        config = PeftConfig.from_pretrained(folder)
        with materialized(model):
            if isinstance(model, PeftModel):
                model.add_adapter(name, config)
                adapted = model
            else:
                adapted = _with_adapter(model, config, name)
    except ValueError as error:  # unknown target modules
        raise UserError(NO_FIT.format(folder=folder, why=first_line(error))) from None
    fill_adapter(adapted, folder, name)
    return adapted.eval()


def _with_adapter(model: PreTrainedModel, config: PeftConfig, name: str = "default") -> PeftModel:
    with warnings.catch_warnings():  # PEFT 0.21 reads a property that transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, config, name)


def fill_adapter(model: PeftModel, folder: Path, name: str = "default") -> None:
    """Set an adapter to the values saved in `folder`. Raises UserError: they are broken, sharded, or do not fit."""
    if "adapter_model.safetensors" not in SafetensorsFolder(folder, "adapter_model").shards:
        raise UserError(f"{folder} has its adapter in shards: save it as one adapter_model.safetensors")
    try:
        # Not with PEFT's own loader, which would also load a pickle from the folder.
        keys = set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"), name)
        missing = [key for key in keys.missing_keys if "lora_" in key and f".{name}." in key]
        if unmatched := [*keys.unexpected_keys, *missing]:
            raise ValueError(f"only one of the two has {unmatched[0]}")
    except (ValueError, RuntimeError) as error:  # RuntimeError: another shape
        raise UserError(NO_FIT.format(folder=folder, why=first_line(error))) from None


def check_lora_targets(model: PreTrainedModel, lora: Lora) -> None:
    """Raises UserError, naming the candidates, if the model lacks one of LoRA's target modules."""
    candidates = lora_candidates(model)
    unknown = sorted(set(lora.target_modules) - set(candidates))
    if unknown:
        fix = f"choose --lora_target_modules from {', '.join(candidates)}"
        raise UserError(f"this model has no module {', '.join(unknown)} for LoRA: {fix}")


def lora_candidates(model: PreTrainedModel) -> list[str]:
    """The names of the model's linear layers, without the output embeddings, as --lora_target_modules takes them."""
    return sorted({name.rsplit(".", 1)[-1] for name, _ in linear_layers(model)})


def linear_layers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Name and module of the model's linear layers, also quantized ones, without the output embeddings."""
    head = model.get_output_embeddings()
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
