"""The goldens' folder, configurations of tiny models, and the value of one loss."""

from pathlib import Path

import torch
from transformers import LlamaConfig, OPTConfig, Qwen2Config

from harmful_unlearn.data.step_batches import StepBatch
from harmful_unlearn.losses.objective import Objective
from harmful_unlearn.losses.terms import LOSSES

GOLDENS = Path(__file__).parents[2] / "goldens"

TINY = {
    "opt": OPTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, vocab_size=700,
        word_embed_proj_dim=32, max_position_embeddings=256, dropout=0.0, attention_dropout=0.0,
    ),
    "llama": LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, vocab_size=700, max_position_embeddings=256,
        bos_token_id=2, eos_token_id=2, pad_token_id=1,
    ),
    "qwen2": Qwen2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, vocab_size=700, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=2, eos_token_id=2, pad_token_id=1,
    ),
}  # fmt: skip


def value_of(model, name: str, batch, base=None) -> torch.Tensor:
    """One loss of one batch, with its gradient."""
    value, _ = Objective(model, {name: 1.0}, base)(model, StepBatch(**{LOSSES[name].batch: batch}))
    return value
