"""The cache with room: what a model reads through it is what it reads through the library's own."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Gemma3TextConfig

from harmful_unlearn.evals.kv_cache import roomy_cache
from tests.helpers.tiny import TINY

GEMMA = Gemma3TextConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=700,
    intermediate_size=64, sliding_window=4, layer_types=["sliding_attention", "full_attention"],
)  # fmt: skip


@pytest.mark.parametrize("config", [TINY["llama"], GEMMA], ids=["full", "sliding"])
def test_tokens_are_read_as_with_the_librarys_cache(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    caches = [DynamicCache(config=config), roomy_cache(config, 12)]
    rows = torch.tensor([2, 0, 0])
    with torch.inference_mode():
        for ids in (torch.randint(700, (3, 6)), torch.randint(700, (3, 1)), torch.randint(700, (3, 2))):
            logits = [model(input_ids=ids, past_key_values=cache).logits for cache in caches]
            torch.testing.assert_close(*logits, rtol=0, atol=1e-6)
            for cache in caches:
                cache.reorder_cache(rows)
    assert caches[1].get_seq_length() == 9


def test_new_tokens_do_not_move_the_others():
    """The library's cache copies all tokens at every step."""
    model = AutoModelForCausalLM.from_config(TINY["llama"]).eval()
    cache = roomy_cache(model.config, 8)
    with torch.inference_mode():
        model(input_ids=torch.ones(2, 5, dtype=torch.long), past_key_values=cache)
        places = [layer.keys.data_ptr() for layer in cache.layers]
        model(input_ids=torch.ones(2, 1, dtype=torch.long), past_key_values=cache)
    assert places == [layer.keys.data_ptr() for layer in cache.layers]
