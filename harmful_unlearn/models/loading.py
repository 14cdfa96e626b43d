"""Loading and saving: configuration, tokenizer, weights, precision."""

import shutil
from pathlib import Path

import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from harmful_unlearn.errors import UserError, first_line, is_out_of_memory
from harmful_unlearn.models.offload import TemporaryFolder
from harmful_unlearn.storage.safetensors_io import all_finite

_CONFIG = "{folder} has no config.json that can be used ({error}): give a folder that save_pretrained wrote"


def load_config(folder: Path) -> PretrainedConfig:
    """The model's configuration.

    Raises:
        UserError: there is none, it is broken, or it is no causal language model's.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # which, depends on the release and on what is wrong
        raise UserError(_CONFIG.format(folder=folder, error=first_line(error))) from None
    try:
        AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise UserError(
            f"{folder} ({config.model_type}) is not a causal language model: give one that transformers has as such"
        ) from None
    return config


def load_tokenizer(folder: Path, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a pad token inside the vocabulary.

    A tokenizer without one pads with its unknown or end token; which it is does not matter, since
    padding is masked by the attention mask and never told by its id.

    Raises:
        UserError: there is none, or its vocabulary is larger than the model's.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise UserError(f"{folder} has no usable tokenizer ({first_line(error)}): copy its files there") from None
    if not tokenizer("text", add_special_tokens=False)["input_ids"]:
        raise UserError(f"{folder} lacks its tokenizer's files: copy them there")  # the library made an empty one
    vocabulary = config.get_text_config().vocab_size
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= vocabulary:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    # Special tokens beyond the embeddings are no obstacle (Gemma 3's image token): text has none of them.
    if tokenizer.vocab_size > vocabulary:
        raise UserError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens and the model {vocabulary} embeddings: "
            "use the tokenizer that the model was trained with"
        )
    return tokenizer


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model's structure on the meta device: names and shapes, no memory.

    Raises:
        UserError: the configuration describes no model.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # the model classes check little, and each its own way
        raise UserError(_CONFIG.format(folder=config.name_or_path, error=first_line(error))) from None


def context_length(config: PretrainedConfig) -> int:
    """Tokens that the model can take; the longest the project would use where the model names none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 2048


def resolve_precision(flag: str, device: torch.device) -> str:
    """ "fp32" or "bf16" (bf16 autocast). "auto" is bf16 on a GPU that has it and fp32 elsewhere."""
    if flag != "auto":
        return flag
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def load_model(
    folder: Path, dtype: torch.dtype, device_map: str | dict[str, str | int] | None = None, four_bit: bool = False
) -> PreTrainedModel:
    """The causal LM in `folder` in `dtype`, from safetensors only.

    Args:
        device_map: "auto", "balanced", ... (accelerate), or each module's place: spread over GPUs, CPU and disk.
            What goes to disk is read from `folder`, but for weights that the library stores otherwise (of some
            mixtures of experts): these are written to a temporary folder, which goes with the model.
        four_bit: keep the linear layers in 4 bits (bitsandbytes: NF4, scales quantized too), computing in `dtype`.

    Raises:
        UserError: weights are missing, broken, NaN or infinite, or do not fit the configuration.
    """
    scratch = TemporaryFolder(prefix="offload-") if device_map else None
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map=device_map,
            offload_folder=scratch.name if scratch else None,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            quantization_config=_four_bits(dtype) if four_bit else None,
        )
    except Exception as error:  # safetensors' own error type derives from Exception alone
        if is_out_of_memory(error):
            raise MemoryError from error
        raise UserError(
            f"the weights in {folder} cannot be loaded ({first_line(error)}): copy or download them again"
        ) from error
    missing = sorted(found["missing_keys"]) + sorted(str(key) for key in found["mismatched_keys"])
    if missing:
        raise UserError(
            f"{folder} does not fit its config.json: {len(missing)} weights are missing or have "
            f"another shape, {missing[0]} first; use a whole checkpoint"
        )
    if scratch:
        model.offload_folder = scratch  # to stay as long as the model
    for name, parameter in model.named_parameters():
        if not (parameter.is_meta or all_finite(parameter.detach())):  # on the meta device: it lies on disk
            raise UserError(f"{name} in {folder} has NaN or infinite values: give a model without any")
    return model


def _four_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def enable_gradient_checkpointing(model: PreTrainedModel, wanted: bool) -> None:
    """Compute activations twice rather than keep them, where that is wanted or a part of the model is offloaded.

    Autograd would keep each offloaded weight that a forward pass brings until the backward pass, all of them at once.

    Raises:
        UserError: a weight that is to be trained is offloaded.
    """
    offloaded = [parameter for parameter in model.parameters() if parameter.is_meta]
    if any(parameter.requires_grad for parameter in offloaded):
        raise UserError(
            "--device_map puts a part of the model where it cannot be trained (CPU or disk): use --lora on or more GPUs"
        )
    if wanted or offloaded:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def save_model(
    model: PreTrainedModel, base_folder: Path, folder: Path, state: dict[str, torch.Tensor] | None = None
) -> None:
    """Write the trained weights as safetensors, or, with LoRA, the adapter alone.

    The base's generation_config.json comes along as it is: some published ones (LLaMA2's among them)
    do not pass the library's own check on saving.

    Args:
        state: an adapter's weights, where the model holds only parts of them.
    """
    if isinstance(model, PeftModel):
        model.save_pretrained(folder, save_embedding_layers=False, state_dict=state)
    else:
        published, model.generation_config = model.generation_config, GenerationConfig()
        try:
            model.save_pretrained(folder, max_shard_size="5GB")
        finally:
            model.generation_config = published
    copy_generation_config(base_folder, folder)


def copy_generation_config(base_folder: Path, folder: Path) -> None:
    """Take the base's generation_config.json as it is published, or none."""
    generation = base_folder / "generation_config.json"
    if generation.exists():
        shutil.copyfile(generation, folder / generation.name)
    else:
        (folder / generation.name).unlink(missing_ok=True)
