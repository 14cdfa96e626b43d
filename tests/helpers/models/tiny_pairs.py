"""Tiny random models, copies of them moved a little, and LoRA adapters, for the tests of task vectors."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, Qwen2Config

from harmful_unlearn.negation.lora_adapter import LoraAdapter
from harmful_unlearn.negation.negate import negate
from harmful_unlearn.storage.run_record import RunRecord
from task_vector import TaskVector

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
CONFIGS = {
    "opt": OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=32),
    "llama": LlamaConfig(**SMALL, intermediate_size=32, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL, intermediate_size=32, num_key_value_heads=2),
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=32),
}
IDS = torch.arange(3, 13)[None]


def make(architecture, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[architecture], dtype=dtype).eval()


def tuned(model, seed=1, size=0.02):
    """A copy of the model, every parameter moved a little."""
    moved = type(model)(model.config).to(model.dtype).eval()
    moved.load_state_dict(model.state_dict())
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return moved


def saved(model, folder, **how):
    model.save_pretrained(folder, **how)
    return folder


def weights(folder):
    return {name: entry for file in sorted(folder.glob("*.safetensors")) for name, entry in load_file(file).items()}


def negated_weights(pair, output):
    """The weights of base - (finetuned - base), written to `output`."""
    base, finetuned = pair
    negate(base, [(finetuned, 1.0)], output, 1.0)
    return weights(output)


def same(a, b):
    """Whether two state dicts have equal entries, dtypes included."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


LORA = {
    "plain": ("opt", {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}),
    "rslora": ("qwen2", {"r": 4, "lora_alpha": 6, "use_rslora": True,
                         "target_modules": ["q_proj", "down_proj"]}),
    "patterns": ("llama", {"r": 4, "target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"v_proj": 3},
                           "rank_pattern": {"layers.1.self_attn.q_proj": 2}}),
    "conv1d": ("gpt2", {"r": 2, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
}  # fmt: skip


def adapter(base, folder, **settings):
    """A saved adapter whose B is not zero; returns its folder and the merged model."""
    copied = type(base)(base.config).eval()
    copied.load_state_dict(base.state_dict())
    model = get_peft_model(copied, LoraConfig(**settings))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder, model.merge_and_unload()


def adapter_vector(folder):
    """tau of a saved adapter, as it is computed for a base on disk, chunk by chunk."""
    source = LoraAdapter(folder)
    vector = {name: torch.empty(spec.shape) for name, spec in source.specs.items()}
    for name, entry in vector.items():
        for span in source.specs[name].chunks():
            source.delta(name, span, None, entry.view(-1)[span])
    return TaskVector(vector=vector, partial=True)


def record(folder: Path, method: str = "sku", **facts) -> Path:
    """Write run.json of a stage 1 model."""
    negates = method == "sku"
    flags = {"method": method, "model_save_dir": str(folder), "system_prompt": "/no_think"}
    RunRecord(
        title=f"Stage 1 of {method}",
        harmful=negates,
        training={"steps": 1},
        negates=negates,
        **{"base": {"name": str(folder.parent / "base")}, "flags": flags, **facts},
    ).write(folder)
    return folder
