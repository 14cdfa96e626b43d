"""DeepSpeed ZeRO-3: everything that this engine needs and the others do not."""

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from transformers import PreTrainedModel
from transformers.integrations import unset_hf_deepspeed_config

from harmful_unlearn.errors import UserError


def configure(plugin: DeepSpeedPlugin, batch_size: int) -> None:
    """Make ZeRO-3 compute what the other engines do. Raises UserError where its file asks for something else."""
    config = plugin.deepspeed_config
    own = {"optimizer", "scheduler"} & config.keys()
    if plugin.zero_stage != 3 or config["gradient_accumulation_steps"] not in (1, "auto") or own:
        raise UserError(
            "DeepSpeed needs zero_stage: 3, gradient_accumulation_steps: 1 and no optimizer or scheduler of its own, "
            "as in harmful_unlearn/launch/zero3_offload.yaml: use that file"
        )
    config["train_micro_batch_size_per_gpu"] = batch_size
    if config.get("gradient_clipping") == "auto":  # accelerate would make it 1
        config["gradient_clipping"] = 0.0
    config["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW on the CPU, too, which needs no compiler
    for dtype in ("bf16", "fp16"):  # these round the trained weights before they are copied to float32
        config[dtype] = {"enabled": False}
    unset_hf_deepspeed_config()  # else transformers shards models while it loads them, and the checks need all of them


def shard_model(model: PreTrainedModel, accelerator: Accelerator) -> dict:
    """Leave each process its shard of every weight; returns the configuration that was used.

    DeepSpeed's engine would first put the complete model on the GPU.
    """
    import deepspeed

    config = accelerator.state.deepspeed_plugin.deepspeed_config
    zero = {name: value for name, value in config["zero_optimization"].items() if value != "auto"}
    config = {name: config[name] for name in ("train_micro_batch_size_per_gpu", "bf16", "fp16")}
    config["zero_optimization"] = zero
    device = zero.get("offload_param", {}).get("device")
    deepspeed.zero.Init(module=model, config_dict_or_path=config, remote_device=device)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(accelerator.device)
    return config


def shard_reference(model: PreTrainedModel, accelerator: Accelerator) -> None:
    """Shard the reference model and gather each layer while it computes; accelerate knows one engine only."""
    import deepspeed

    config = shard_model(model, accelerator)
    zero = {name: value for name, value in config["zero_optimization"].items() if name != "offload_optimizer"}
    deepspeed.initialize(model=model, config={**config, "zero_optimization": zero})


def gradient_norm(accelerator: Accelerator) -> torch.Tensor:
    """The engine's own L2 norm of all gradients, a scalar."""
    return torch.tensor(accelerator.deepspeed_engine_wrapped.get_global_grad_norm(), device=accelerator.device)
