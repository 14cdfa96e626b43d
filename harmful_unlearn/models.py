"""Models and tokenizers: where they lie, how they are loaded and saved, LoRA, and the frozen base."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import HfApi, scan_cache_dir, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
)
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn
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
from transformers.pytorch_utils import Conv1D

from harmful_unlearn.checkpoints import INDEX, Checkpoint, all_finite, read_index
from harmful_unlearn.dispatched import Scratch, runs_on, stand_ins
from harmful_unlearn.errors import MENDABLE, UserError, is_out_of_memory
from harmful_unlearn.saving import user_path

TEXT_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
# Some repositories hold the weights twice, as consolidated*.safetensors or in subfolders.
WEIGHT_FILES = ["model*.safetensors", "adapter_model*.safetensors"]
CONVERSION_TITLE = "Adding `safetensors` variant of this model"
LORA_ABOVE = 3e9  # parameters; the paper fine-tunes 2.7B in full, and 7B with LoRA


@dataclass(frozen=True)
class Lora:
    """Settings of a LoRA adapter; the scale is alpha / r, dropout is 0."""

    r: int
    alpha: int
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")


def locate(name: str, weights: bool = True) -> Path:
    """The local folder of a model: itself, or the hub's snapshot, downloaded when it is not cached.

    Args:
        name: a local folder or a hub id.
        weights: False leaves a hub model's weights there: configuration and tokenizer only.

    A hub repository that has pickled weights alone (OPT's) is taken from the pull request in which
    the hub's own converter put safetensors.

    Raises:
        UserError: no such folder or model, no access, no connection, no safetensors, or an index that leads
            out of the folder.
    """
    folder = user_path(name)
    if folder.is_dir():
        if not _has_weights(folder):
            raise UserError(_NO_SAFETENSORS.format(folder=folder))
        return _with_index_checked(folder)
    if folder.exists():
        raise UserError(f"{name} is a file: give the model's folder or a hub id")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"there is no folder {name}: check the path, or give a hub id (owner/name)")
    try:
        return _with_index_checked(_snapshot(name, weights))
    except UserError:
        raise
    except GatedRepoError:
        raise UserError(
            f"{name} is gated: accept its licence on its hub page, then set HF_TOKEN or run `hf auth login`"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"there is no folder and no hub model {name}: check the name (a private model needs HF_TOKEN)"
        ) from None
    except Exception as error:  # the hub's client raises its HTTP library's own errors
        if isinstance(error, OSError) and error.errno in MENDABLE:
            raise
        raise UserError(
            f"{name} is not in the local cache and the hub cannot be reached ({type(error).__name__}): "
            "go online, unset HF_HUB_OFFLINE, or give a local folder"
        ) from error


_NO_SAFETENSORS = (
    "{folder} has no .safetensors weights, and pickled ones are not loaded: convert them on a machine "
    "you trust with its transformers class, from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
)


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def _with_index_checked(folder: Path) -> Path:
    if (index := folder / INDEX.format("model")).is_file():
        read_index(index)  # transformers would follow it anywhere
    return folder


def _snapshot(name: str, weights: bool) -> Path:
    wanted = TEXT_FILES + (WEIGHT_FILES if weights else [])
    folder = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"]))
    if not weights or _has_weights(folder):
        return folder
    for repository in scan_cache_dir().repos:
        for revision in repository.revisions:
            converted = any(ref.startswith("refs/pr/") for ref in revision.refs)
            if repository.repo_id == name and converted and _has_weights(revision.snapshot_path):
                return revision.snapshot_path
    # The author is the hub's own converter; anybody may open a pull request with that title.
    for discussion in HfApi().get_repo_discussions(name, author="SFconvertbot", discussion_type="pull_request"):
        if discussion.title == CONVERSION_TITLE and discussion.status == "open":
            return Path(
                snapshot_download(
                    name, revision=discussion.git_reference, allow_patterns=wanted, ignore_patterns=["*/*"]
                )
            )
    raise UserError(_NO_SAFETENSORS.format(folder=name))


_CONFIG = "{folder} has no config.json that can be used ({error}): give a folder that save_pretrained wrote"


def load_config(folder: Path) -> PretrainedConfig:
    """The model's configuration.

    Raises:
        UserError: there is none, it is broken, or it is no causal language model's.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # which, depends on the release and on what is wrong
        raise UserError(_CONFIG.format(folder=folder, error=_first_line(error))) from None
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
        raise UserError(f"{folder} has no usable tokenizer ({_first_line(error)}): copy its files there") from None
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


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model's structure on the meta device: names and shapes, no memory.

    Raises:
        UserError: the configuration describes no model.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # the model classes check little, and each its own way
        raise UserError(_CONFIG.format(folder=config.name_or_path, error=_first_line(error))) from None


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
    scratch = Scratch(prefix="offload-") if device_map else None
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
            f"the weights in {folder} cannot be loaded ({_first_line(error)}): copy or download them again"
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
    with stand_ins(model):
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
        with stand_ins(model):
            adapted = get_peft_model(model, PeftConfig.from_pretrained(folder))
    except ValueError as error:  # target modules that the model has not
        raise UserError(_NO_FIT.format(folder=folder, why=_first_line(error))) from None
    fill_adapter(adapted, folder)
    return adapted.eval()


_NO_FIT = "the adapter in {folder} does not fit the model ({why}): give its base"


def fill_adapter(model: PeftModel, folder: Path) -> None:
    """Give the model's adapter the values of the one that is saved in `folder`.

    Raises:
        UserError: that is broken, or does not fit.
    """
    if "adapter_model.safetensors" not in Checkpoint(folder, "adapter_model").shards:
        raise UserError(f"{folder} has its adapter in shards: save it as one adapter_model.safetensors")
    try:
        # Not by PEFT's own loader, which would take a pickle that lies beside it.
        found = set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
        if wrong := [*found.unexpected_keys, *(name for name in found.missing_keys if "lora_" in name)]:
            raise ValueError(f"{wrong[0]} is in one of the two alone")
    except (ValueError, RuntimeError) as error:  # shapes that the model has not
        raise UserError(_NO_FIT.format(folder=folder, why=_first_line(error))) from None


def checkpoint_activations(model: PreTrainedModel, wanted: bool) -> None:
    """Compute activations twice rather than keep them, where that is wanted or a part of the model is offloaded.

    Autograd would keep each offloaded weight that a forward pass brings until the backward pass, all of them at once.

    Raises:
        UserError: a weight that is to be trained is offloaded.
    """
    offloaded = [parameter for parameter in model.parameters() if parameter.is_meta]
    if any(parameter.requires_grad for parameter in offloaded):
        raise UserError(
            "--device_map puts a part of the model where it cannot be trained (CPU or disk): "
            "use --lora on or more GPUs"
        )
    if wanted or offloaded:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


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
        (name, module) for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]  # fmt: skip


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


class FrozenBase:
    """theta_o, the base model as PD sees it: frozen, in eval mode.

    With LoRA it is the current model with its adapter switched off, so there is no second copy.

    Args:
        model: the current model if it carries an adapter, else a copy of the base of its own.
        autocast: a copy of its own in float32 computes in bf16.
    """

    def __init__(self, model: PreTrainedModel, autocast: bool = False):
        self.model = model
        self._autocast = autocast
        self.shared = isinstance(model, PeftModel)
        if not self.shared:
            model.eval().requires_grad_(False)

    @contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        """The base model, for one forward pass."""
        if not self.shared:
            with torch.autocast(runs_on(self.model).type, torch.bfloat16, enabled=self._autocast):
                yield self.model
            return
        training = self.model.training
        self.model.eval()
        try:
            with self.model.disable_adapter():
                yield self.model
        finally:
            self.model.train(training)
