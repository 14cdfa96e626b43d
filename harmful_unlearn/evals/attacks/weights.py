"""Attacks on weights: what is measured is a changed copy in memory. No model is written."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from harmful_unlearn.data.templates import Template
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.evaluated_model import EvaluatedModel, LoadedModel
from harmful_unlearn.evals.prompt_sets import Prompt
from harmful_unlearn.evals.protocol import EvalProtocol, sha256_of
from harmful_unlearn.models.offload import execution_device

GROUP = 64  # weights of a row that share a scale
DEPTH = 0.6  # of the layers, where the direction is looked for
CONTRASTED = 64  # prompts of each kind that give the direction
# The linear layers whose output is added to the hidden state, by name: of attention, and of the MLP.
WRITERS = ("o_proj", "out_proj", "down_proj", "fc2")


@torch.no_grad()
def quantize(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """Round the weights of all linear layers but the LM head to `bits` bits, in place; they stay in their dtype.

    This is round-to-nearest, symmetric, with a scale for each group of GROUP weights in a row: what torchao's
    weight-only quantisation computes, without its faster storage.
    """
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            module.weight.copy_(rounded(module.weight, bits))
    return model


def _quantized(bits: int, model: PreTrainedModel, _template: Template, _contrast: "Contrast") -> PreTrainedModel:
    return quantize(model, bits)


def rounded(weight: Tensor, bits: int, group: int = GROUP) -> Tensor:
    """A matrix, [rows, columns], rounded to `bits` bits. A row's last group may be smaller."""
    columns = weight.shape[1]
    groups = nn.functional.pad(weight.float(), (0, -columns % group)).unflatten(1, (-1, group))
    largest = groups.abs().amax(-1, keepdim=True)
    scale = (largest / ((2**bits - 1) / 2)).clamp(min=torch.finfo(torch.float32).eps)
    whole = (groups * (1 / scale)).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (whole * scale).flatten(1)[:, :columns].to(weight.dtype)


@dataclass(frozen=True)
class Contrast:
    """Questions that an attack may learn from; none is asked afterwards.

    Attributes:
        harmful, harmless: at most CONTRASTED of each.
    """

    harmful: list[str]
    harmless: list[str]


@torch.no_grad()
def abliterate(model: PreTrainedModel, template: Template, contrast: Contrast) -> PreTrainedModel:
    """Remove the direction that tells harmful from harmless prompts from all that layers write, in place.

    The direction is the difference of the mean hidden states at the prompts' last token, at DEPTH of the layers (Arditi
    et al. 2024 choose layer and token by trying all). It is removed from the embeddings, and from the weights and
    biases of the two linear layers of each block whose output is added to the hidden state.

    Raises:
        UserError: there are no prompts to compare, or the model's layers are not known.
    """
    if not contrast.harmful or not contrast.harmless:
        raise UserError("abliterate needs harmful and normal prompts that are not asked: give more data")
    named = [(name.rpartition(".")[2], module) for name, module in model.named_modules()]
    writers = [module for name, module in named if name in WRITERS and isinstance(module, nn.Linear)]
    normed = any(name == "post_feedforward_layernorm" for name, _ in named)
    if len(writers) != 2 * model.config.num_hidden_layers or normed:
        raise UserError(
            "abliterate knows blocks with two linear layers that write into the hidden state, without a norm behind "
            f"them, and those of {model.config.model_type} are others: leave out abliterate"
        )
    harmful, harmless = (_hidden_state(model, template, part) for part in (contrast.harmful, contrast.harmless))
    direction = nn.functional.normalize(harmful - harmless, dim=0)
    for module in writers:
        for written in [module.weight, *([] if module.bias is None else [module.bias])]:  # [hidden, ...]
            written.sub_(torch.tensordot(direction, direction @ written.float(), 0).to(written.dtype))
    for embedding in model.modules():
        if isinstance(embedding, nn.Embedding) and embedding.embedding_dim == len(direction):
            weight = embedding.weight  # [tokens, hidden]
            weight.sub_(torch.outer(weight.float() @ direction, direction).to(weight.dtype))
    return model


def _hidden_state(model: PreTrainedModel, template: Template, questions: list[str]) -> Tensor:
    """The mean hidden state at the prompts' last tokens at DEPTH of the layers, [hidden], float32."""
    layer = round(DEPTH * model.config.num_hidden_layers)
    states = []
    for ids in template.prompts(questions):
        tokens = torch.tensor([ids], device=execution_device(model))
        hidden = model(input_ids=tokens, output_hidden_states=True).hidden_states[layer]
        states.append(hidden[0, -1].float())
    return torch.stack(states).mean(0)


# What each attack makes of a loaded model, by variant.
Change = Callable[[PreTrainedModel, Template, Contrast], PreTrainedModel]
WEIGHT_ATTACKS: dict[str, dict[str, Change]] = {
    "quantize": {f"{bits} bits": partial(_quantized, bits) for bits in (8, 4)},
    "abliterate": {"one direction": abliterate},
}


def variants_of(
    attack: str, models: list[EvaluatedModel], plain: EvalProtocol, normal: list[Prompt], contrast: Contrast
) -> dict[str, tuple[list[EvaluatedModel], EvalProtocol]]:
    """The changed models of each variant of an attack, and how they are asked: the attacked prompts, and normal ones.

    Args:
        plain: how the attacked prompts are asked.
        normal: may be none.
        contrast: what the attack may learn from.
    """
    (prompts,) = plain.prompts.values()
    read = sha256_of(asdict(contrast))
    variants = {}
    for variant, change in WEIGHT_ATTACKS[attack].items():
        changed = [
            EvaluatedModel(
                model.label,
                {**model.identity, attack: variant, "contrast_sha256": read},
                partial(_changed, model, change, contrast),
            )
            for model in models
        ]
        sets = {variant: prompts, **({"normal": normal} if normal else {})}
        variants[variant] = changed, replace(plain, prompts=sets, backend="hf")  # vLLM reads folders only
    return variants


def _changed(model: EvaluatedModel, change: Change, contrast: Contrast) -> LoadedModel:
    loaded, template = model.load()
    return change(loaded, template, contrast), template
