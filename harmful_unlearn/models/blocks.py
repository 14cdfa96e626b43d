"""The layers of a decoder, by number: the hidden states behind one, and training a few of them only."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from harmful_unlearn.errors import UserError


class _Reached(Exception):
    """The layer has been computed, and nothing after it is needed."""


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers, in order, also of a model in a wrapper for LoRA or several processes."""
    config: Any = getattr(model, "module", model).config
    layers = config.get_text_config().num_hidden_layers
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == layers)
    if (blocks := next(lists, None)) is None:
        raise UserError("this model's layers are not in one list, as rmu needs them: use another --method")
    return blocks


def steered_layer(config: PretrainedConfig, layer: float) -> int:
    """The layer that RMU steers, from 1: `layer`, or below 1 that share of the depth.

    Raises UserError: the model has fewer layers.
    """
    layers = config.get_text_config().num_hidden_layers
    if layer < 1:
        return max(1, round(layer * layers))
    if layer > layers:
        raise UserError(f"--rmu_layer {layer:g}: this model has {layers} layers")
    return int(layer)


def trained_blocks(layer: int) -> list[int]:
    """The layers that RMU trains, from 0: the one that it steers, given from 1, and the two before."""
    return [*range(max(0, layer - 3), layer)]


def mlp_outputs(model: nn.Module, blocks: list[int]) -> list[Tensor]:
    """The weight of the last linear layer of each of these layers, from 0: the MLP's output."""
    linear = [[m for m in blocks_of(model)[n].modules() if isinstance(m, nn.Linear | Conv1D)] for n in blocks]
    return [layers[-1].weight for layers in linear]


def hidden_states(model: nn.Module, inputs: dict[str, Tensor], layer: int) -> Tensor:
    """The hidden states behind a layer, from 1: [rows, length, hidden]. Later layers are not computed."""
    states: list[Tensor] = []
    is_alone = not torch.distributed.is_initialized()  # wrappers for several processes need a whole forward pass

    def keep(_module, _args, output) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)
        if is_alone:
            raise _Reached

    hook = blocks_of(model)[layer - 1].register_forward_hook(keep)
    try:
        model(**inputs, use_cache=False)
    except _Reached:
        pass
    finally:
        hook.remove()
    return states[0]
