"""Keys and values of a batch that is being answered: with room for the new tokens from the start."""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


def roomy_cache(config: PreTrainedConfig, tokens: int) -> DynamicCache:
    """The cache that transformers would use, with room for `tokens` tokens in its attention layers.

    Its `reorder_cache` takes any list of rows: it repeats, drops and reorders them. A layer with a sliding window keeps
    all tokens, too; the model's mask limits what is seen.
    """
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    growing = (DynamicLayer, DynamicSlidingWindowLayer)
    cache.layers = [_RoomyLayer(tokens) if type(layer) in growing else layer for layer in cache.layers]
    return cache


class _RoomyLayer(DynamicLayer):
    """Writes new tokens into a buffer. The library's layer copies all of its tokens at every step.

    Args:
        room: the most tokens of a row.
    """

    is_initialized: bool

    def __init__(self, room: int):
        super().__init__()
        self._room = room
        self._buffers: list[Tensor] = []  # keys and values: [rows, heads, room, head_dim]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append tokens, [rows, heads, new tokens, head_dim]. Returns the keys and values of all tokens."""
        new = (key_states, value_states)
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self._buffers = [s.new_empty(*s.shape[:2], self._room, s.shape[3]) for s in new]
            start = 0
        else:
            start = self.get_seq_length()
        stop = start + key_states.shape[2]
        for buffer, states in zip(self._buffers, new, strict=True):
            buffer[:, :, start:stop] = states
        return self._show(stop)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep these rows, in this order."""
        if self.is_initialized:
            tokens = self.get_seq_length()
            self._buffers = [buffer.index_select(0, beam_idx.to(buffer.device)) for buffer in self._buffers]
            self._show(tokens)

    def _show(self, tokens: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (buffer[:, :, :tokens] for buffer in self._buffers)
        return self.keys, self.values
