"""Load and save models: configuration, tokenizer, weights, precision."""

import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from harmful_unlearn.errors import UserError, first_line, is_out_of_memory
from harmful_unlearn.models.offload import TemporaryFolder
from harmful_unlearn.storage.files import read_json
from harmful_unlearn.storage.safetensors_io import all_finite

BAD_CONFIG = "{folder} has no usable config.json ({error}): give a folder that save_pretrained wrote"
LAYERS = {"num_hidden_layers", "num_layers", "n_layer", "n_layers"}
COUNTS = LAYERS | {"num_local_experts", "num_experts", "n_routed_experts"}
LARGEST_COUNT = 1000  # of any model there is; a broken file's number would fill the memory before a weight is read


def load_config(folder: Path) -> PretrainedConfig:
    """The model's configuration. Raises UserError: it is missing or broken, or not of a causal language model."""
    content: dict = {}
    with suppress(UserError):  # the library says what is wrong with it
        content = read_json(folder / "config.json")
    for part in (content, *(value for value in content.values() if isinstance(value, dict))):
        for name in sorted(COUNTS & part.keys()):
            if isinstance(part[name], int) and part[name] > LARGEST_COUNT:
                problem = f"{name} is {part[name]}, more than any model has"
                raise UserError(BAD_CONFIG.format(folder=folder, error=problem))
            if name in LAYERS and isinstance(part[name], int) and part[name] < 1:
                raise UserError(BAD_CONFIG.format(folder=folder, error=f"{name} is {part[name]}"))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the type depends on the library's release and on the problem
        raise UserError(BAD_CONFIG.format(folder=folder, error=first_line(error))) from None
    if AutoModelForCausalLM._model_mapping.get(type(config), None) is None:
        problem = f"{folder} ({config.model_type}) is not a causal language model in transformers"
        raise UserError(f"{problem}: give one that is")
    return config


def load_tokenizer(folder: Path, config: PretrainedConfig) -> transformers.PreTrainedTokenizerBase:
    """The model's tokenizer, with a pad token inside the vocabulary (implementation detail 21).

    A tokenizer without one pads with its unknown or end token. Which one does not matter: padding is recognised by
    the attention mask, never by its id.

    Raises:
        UserError: it is missing or broken, or its vocabulary is larger than the model's.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise UserError(f"{folder} has no usable tokenizer ({first_line(error)}): copy its files there") from None
    if not tokenizer("text", add_special_tokens=False)["input_ids"]:
        raise UserError(f"{folder} lacks its tokenizer's files: copy them there")  # the library returned an empty one
    vocabulary = config.get_text_config().vocab_size
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= vocabulary:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    # Special tokens beyond the embeddings do no harm (Gemma 3's image token): text has none of them.
    if tokenizer.vocab_size > vocabulary:
        sizes = f"has {tokenizer.vocab_size} tokens and the model {vocabulary} embeddings"
        raise UserError(f"the tokenizer in {folder} {sizes}: use the tokenizer that the model was trained with")
    return tokenizer


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model on the meta device: names and shapes, without values. Raises UserError: its class refuses `config`."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # each model class fails in its own way
        raise UserError(BAD_CONFIG.format(folder=config.name_or_path, error=first_line(error))) from None


def check_layers(model: PreTrainedModel, names: Iterable[str], folder: Path) -> None:
    """Raises UserError: the weights in `folder` have more layers than the model, which would be cut off silently.

    Layers that the model's class itself leaves out are none of them.

    Args:
        model: with or without values.
        names: of weights in the model's files.
    """
    lists = {name: len(part) for name, part in model.named_modules() if isinstance(part, torch.nn.ModuleList)}
    prefix = f"{model.base_model_prefix}."  # a file of the model without its head has names without that
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    for name in sorted(names):
        for match in re.finditer(r"\.(\d+)\.", name):
            layers = name[: match.start()]
            count = lists.get(layers, lists.get(prefix + layers))
            if count is not None and int(match[1]) >= count and not any(re.search(key, name) for key in ignored):
                problem = f"its config.json has {count} {layers}, and its weights have more ({name})"
                raise UserError(f"{folder} would be cut off: {problem}; give the model with its own config.json")


def context_length(config: PretrainedConfig) -> int:
    """The number of tokens that the model can read; 2048 if its configuration sets no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 2048


def load_model(
    folder: Path, dtype: torch.dtype, device_map: str | dict[str, str | int] | None = None, four_bit: bool = False
) -> PreTrainedModel:
    """The causal LM in `folder` in `dtype`, from safetensors only.

    Args:
        device_map: "auto", "balanced", ... (accelerate), or each module's device: GPUs, CPU and disk. Weights on disk
            are read from `folder` itself; only those that the library loads in another layout (of some mixtures of
            experts) are written to a temporary folder, which is removed with the model.
        four_bit: keep the linear layers in 4 bits (bitsandbytes NF4, with quantized scales), computing in `dtype`.

    Raises:
        UserError: weights are missing, broken, NaN or infinite, or do not fit the configuration, or have more layers.
        MemoryError: the model does not fit into memory.
    """
    offload_folder = TemporaryFolder(prefix="offload-") if device_map else None
    four_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map=device_map,
            offload_folder=offload_folder.name if offload_folder else None,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            quantization_config=four_bits if four_bit else None,
        )
    except Exception as error:  # safetensors' own error type derives from Exception alone
        if is_out_of_memory(error):
            raise MemoryError from error
        problem = f"the weights in {folder} cannot be loaded ({first_line(error)})"
        raise UserError(f"{problem}: copy or download them again") from error
    check_layers(model, info["unexpected_keys"], folder)
    missing = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    if missing:
        problem = f"{len(missing)} weights are missing or have another shape, {missing[0]} first"
        raise UserError(f"{folder} does not fit its config.json: {problem}; give a complete model folder")
    if offload_folder:
        model.offload_folder = offload_folder  # it exists as long as the model
    for name, parameter in model.named_parameters():
        if not (parameter.is_meta or all_finite(parameter.detach())):  # on the meta device: its values are on disk
            raise UserError(f"{name} in {folder} has NaN or infinite values: give a model without any")
    return model


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the LM head has the weights of the input embeddings. A file with both may untie what its config ties."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def unfilled_model(folder: Path, dtype: torch.dtype, tied: bool) -> PreTrainedModel:
    """The causal LM in `folder` on the CPU without values, where another process sends them.

    Memory that nothing is written to takes none.

    Args:
        tied: whether that process has the LM head tied.

    Raises:
        UserError: as `empty_model`.
    """
    config = load_config(folder)
    try:
        with init_empty_weights(include_buffers=False):  # of buffers that no file holds nobody sends values
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # each model class fails in its own way
        raise UserError(BAD_CONFIG.format(folder=folder, error=first_line(error))) from None
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = torch.nn.Parameter(torch.empty_like(parameter, device="cpu"))
    if tied:
        model.tie_weights()
    return model


def enable_gradient_checkpointing(model: PreTrainedModel, wanted: bool) -> None:
    """Recompute activations in the backward pass if `wanted`, or if a part of the model is offloaded.

    Without that, autograd would keep every offloaded weight that a forward pass loads until the backward pass. Raises
    UserError: an offloaded weight would be trained.
    """
    offloaded = [parameter for parameter in model.parameters() if parameter.is_meta]
    if any(parameter.requires_grad for parameter in offloaded):
        problem = "--device_map puts a part of the model where it cannot be trained (CPU or disk)"
        raise UserError(f"{problem}: use --lora on or more GPUs")
    if wanted or offloaded:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def save_model(
    model: PreTrainedModel, base_folder: Path, folder: Path, state: dict[str, torch.Tensor] | None = None
) -> None:
    """Write the trained weights as safetensors; with LoRA only the adapter.

    The base's generation_config.json is copied unchanged: some published ones (LLaMA2's, for example) do not pass the
    library's own check on saving.

    Args:
        state: an adapter's weights, if the model holds only shards of them.
    """
    if isinstance(model, PeftModel):
        model.save_pretrained(folder, save_embedding_layers=False, state_dict=state)
    else:
        published, model.generation_config = model.generation_config, transformers.GenerationConfig()
        try:
            model.save_pretrained(folder, max_shard_size="5GB")
        finally:
            model.generation_config = published
    copy_generation_config(base_folder, folder)


def copy_generation_config(base_folder: Path, folder: Path) -> None:
    """Copy the base's generation_config.json to `folder`; if the base has none, remove the one in `folder`."""
    generation = base_folder / "generation_config.json"
    if generation.exists():
        shutil.copyfile(generation, folder / generation.name)
    else:
        (folder / generation.name).unlink(missing_ok=True)
