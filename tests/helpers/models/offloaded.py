"""Tiny models with a part on disk: device_maps, and architectures that the library stores or computes differently."""

import torch
from transformers import Gemma2Config, MixtralConfig

from harmful_unlearn.models import loading

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "vocab_size": 700, "max_position_embeddings": 256,
    "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip
OTHER_ARCHITECTURES = {
    "mixtral": MixtralConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1),
    "gemma2": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=5.0, sliding_window=256),
}
IDS = torch.arange(3, 13)[None]
# Modules to put on disk, by the ends of their names.
LAYER, HEAD, ENDS = ("layers.1",), ("lm_head",), ("embed_tokens", "lm_head")
MOST = ("embed_tokens", "layers.0", "layers.1", "lm_head")


def places(model_folder, *on_disk):
    """A device_map like those of "auto", with the modules whose names end with one of `on_disk` on disk."""
    structure = loading.empty_model(loading.load_config(model_folder))
    inner = next(name for name, module in structure.named_modules() if hasattr(module, "layers"))
    names = [f"{inner}.{name}" for name, _ in structure.get_submodule(inner).named_children() if name != "layers"]
    names += [f"{inner}.layers.{number}" for number in range(2)] + ["lm_head"]
    return {name: "disk" if name.endswith(on_disk) else "cpu" for name in names}
