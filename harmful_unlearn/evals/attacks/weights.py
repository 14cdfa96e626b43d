"""Attacks on weights: what is measured is a changed copy in memory. No model is written."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from harmful_unlearn.evals.evaluated_model import EvaluatedModel, LoadedModel
from harmful_unlearn.evals.prompt_sets import Prompt
from harmful_unlearn.evals.protocol import EvalProtocol

GROUP = 64  # weights of a row that share a scale


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


def rounded(weight: Tensor, bits: int, group: int = GROUP) -> Tensor:
    """A matrix, [rows, columns], rounded to `bits` bits. A row's last group may be smaller."""
    columns = weight.shape[1]
    groups = nn.functional.pad(weight.float(), (0, -columns % group)).unflatten(1, (-1, group))
    largest = groups.abs().amax(-1, keepdim=True)
    scale = (largest / ((2**bits - 1) / 2)).clamp(min=torch.finfo(torch.float32).eps)
    whole = (groups * (1 / scale)).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (whole * scale).flatten(1)[:, :columns].to(weight.dtype)


# What each attack makes of a loaded model, by variant.
WEIGHT_ATTACKS: dict[str, dict[str, Callable[[PreTrainedModel], PreTrainedModel]]] = {
    "quantize": {"8 bits": partial(quantize, bits=8), "4 bits": partial(quantize, bits=4)}
}


def variants_of(
    attack: str, models: list[EvaluatedModel], plain: EvalProtocol, normal: list[Prompt]
) -> dict[str, tuple[list[EvaluatedModel], EvalProtocol]]:
    """The changed models of each variant of an attack, and how they are asked: the attacked prompts, and normal ones.

    Args:
        plain: how the attacked prompts are asked.
        normal: may be none.
    """
    (prompts,) = plain.prompts.values()
    variants = {}
    for variant, change in WEIGHT_ATTACKS[attack].items():
        changed = [
            EvaluatedModel(model.label, {**model.identity, attack: variant}, partial(_changed, model, change))
            for model in models
        ]
        sets = {variant: prompts, **({"normal": normal} if normal else {})}
        variants[variant] = changed, replace(plain, prompts=sets)
    return variants


def _changed(model: EvaluatedModel, change: Callable[[PreTrainedModel], PreTrainedModel]) -> LoadedModel:
    loaded, template = model.load()
    return change(loaded), template
