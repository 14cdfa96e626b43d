"""One or several processes, on accelerate's engines: DDP, FSDP2, DeepSpeed ZeRO-3 (launch/ has a file for each).

Every process reads all data and makes every step's batch, and takes its share of the rows (Batch.share), so that the
draws and the losses do not depend on the number of processes. Only the main process writes.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, broadcast_object_list, parse_flag_from_env
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import PeftModel
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from harmful_unlearn.errors import UserError
from harmful_unlearn.models.precision import resolve_precision
from harmful_unlearn.models.reference import ReferenceModel
from harmful_unlearn.models.sharding import gather_full
from harmful_unlearn.storage.files import ROOT, write_file
from harmful_unlearn.training import deepspeed
from harmful_unlearn.training.flags import TrainingSettings

Result = TypeVar("Result")
# While the main process writes a large model, the others wait for it.
TIMEOUT = timedelta(hours=2)
ENGINES = {DistributedType.FSDP: "FSDP2", DistributedType.DEEPSPEED: "DeepSpeed"}


def start(settings: TrainingSettings) -> tuple[Accelerator, str]:
    """The Accelerator of a run (`accelerate launch` decides the engine), and the precision, "fp32" or "bf16".

    Raises:
        UserError: the engine and the flags do not work together, or a tracker is not installed.
    """
    tracker = None if settings.report_to == "none" else settings.report_to
    if tracker and find_spec(tracker) is None:
        raise UserError(f"--report_to {tracker} needs {tracker}: pip install {tracker}, or leave it out")
    on_cpus = parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=on_cpus, timeout=TIMEOUT)
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and (on_cpus or not state.backend):  # it would be ignored
        raise UserError("DeepSpeed needs a GPU, and none was found: use DDP (harmful_unlearn/launch/ddp.yaml)")
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != state.num_processes:
        raise UserError(
            f"{started} processes were started, and no GPU was found for them: for CPUs set ACCELERATE_USE_CPU=1"
        )
    precision = resolve_precision(settings.precision, state.device)
    accelerator = Accelerator(
        device_placement=False,  # models are moved to their device when they are loaded
        mixed_precision="no",  # models/precision.py does it
        log_with=tracker,
        project_dir=str(ROOT / "logs") if tracker else None,
    )
    plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type == DistributedType.FSDP else None
    if plugin:
        if plugin.fsdp_version != 2:
            raise UserError("FSDP 1 is not supported: set fsdp_version: 2 (as in harmful_unlearn/launch/fsdp2.yaml)")
        if plugin.activation_checkpointing:
            raise UserError(
                "set fsdp_activation_checkpointing to false (as in harmful_unlearn/launch/fsdp2.yaml): "
                "--gradient_checkpointing does it"
            )
        plugin.cpu_ram_efficient_loading = True  # setup.load_models gives weights to the main process alone
        if precision == "bf16":  # gradients are added up in float32, as they are without FSDP
            plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    engine = engine_of(accelerator)
    if settings.device_map and (accelerator.num_processes > 1 or engine != "DDP"):
        raise UserError("--device_map spreads one process over all devices: start one process, or leave it out")
    if settings.quantize and engine != "DDP":
        raise UserError(f"--quantize does not work with {engine}: use DDP (harmful_unlearn/launch/ddp.yaml)")
    if engine == "DeepSpeed":
        if settings.save_every or settings.resume:
            raise UserError(
                "DeepSpeed saves no checkpoints, so --save_every and --resume do not work with it: use FSDP2 "
                "(harmful_unlearn/launch/fsdp2.yaml)"
            )
        deepspeed.configure(accelerator.state.deepspeed_plugin, settings.batch_size)
    return accelerator, precision


def start_tracker(accelerator: Accelerator, settings: TrainingSettings, log_file: Path, continues: bool) -> None:
    """Begin to send metrics to --report_to; its files go beside the log.

    Args:
        continues: whether the run is resumed; wandb then continues its run, by the id that the first one left.

    Raises:
        UserError: it cannot start.
    """
    if settings.report_to == "none":
        return
    accelerator.project_configuration.logging_dir = str(log_file.parent)
    flags = {name: v if isinstance(v, int | float | str) else str(v) for name, v in settings.to_json().items()}
    name = log_file.with_suffix(".tensorboard").name if settings.report_to == "tensorboard" else "sku"
    folder, wandb = log_file.parent, {}
    if settings.report_to == "wandb" and is_main_process():
        kept = log_file.with_suffix(".wandb-id")
        wandb_id = kept.read_text(encoding="utf-8") if continues and kept.is_file() else token_hex(4)
        write_file(kept, wandb_id)
        wandb = {"name": folder.name, "dir": str(folder), "id": wandb_id, "resume": "allow"}
    try:
        accelerator.init_trackers(name, flags, {"wandb": wandb})
    except Exception as error:  # each tracker has its own
        raise UserError(
            f"--report_to {settings.report_to} cannot start ({error}): fix that, or leave it out"
        ) from error


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes; known before there is an Accelerator."""
    return int(os.environ.get("RANK", 0)) == 0


def print_once(message: str, end: str = "\n") -> None:
    """Print, in one process only."""
    if is_main_process():
        print(message, end=end, flush=True)


def engine_of(accelerator: Accelerator) -> str:
    """What several processes run on: "DDP", "FSDP2" or "DeepSpeed"."""
    return ENGINES.get(accelerator.distributed_type, "DDP")


def keeps_checkpoints(accelerator: Accelerator) -> bool:
    """Whether a run can be stopped and resumed; DeepSpeed saves its state as pickles only."""
    return engine_of(accelerator) != "DeepSpeed"


def shards_weights(accelerator: Accelerator) -> bool:
    """Whether each process holds a shard of every weight."""
    return accelerator.distributed_type in ENGINES


def of_main_process(accelerator: Accelerator, compute: Callable[[], Result]) -> Result:
    """What `compute` gives. Where weights are sharded, the main process alone has them until `prepare`, and computes.

    Raises:
        UserError: in every process, if `compute` raises it.
    """
    if not shards_weights(accelerator):
        return compute()
    found: list[Any] = [None, ""]
    if accelerator.is_main_process:
        try:
            found[0] = compute()
        except UserError as error:
            found[1] = str(error)
    broadcast_object_list(found)
    if found[1]:
        raise UserError(found[1])
    return found[0]


def prepare(
    accelerator: Accelerator,
    model: PreTrainedModel,
    base: ReferenceModel | None,
    optimizer: torch.optim.Optimizer,
    precision: str,
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The model, wrapped or sharded by the engine, and its optimizer. A separate reference model is sharded, too.

    Args:
        precision: "fp32" or "bf16".

    Raises:
        UserError: transformers saves this model under different parameter names, which is not supported when it is
            sharded.
    """
    if shards_weights(accelerator) and not isinstance(model, PeftModel):
        names = dict.fromkeys(name for name, _ in saved_weights(model))
        stored = revert_weight_conversion(model, {name: torch.empty(1, device="meta") for name in names})
        if set(stored) != set(names):
            raise UserError("transformers saves this model under other parameter names: use DDP, or --lora on")
    uses_deepspeed = engine_of(accelerator) == "DeepSpeed"
    if uses_deepspeed:
        deepspeed.shard_model(model, accelerator)
        if precision == "bf16":  # the other engines' wrappers do it
            model.forward = torch.autocast(accelerator.device.type, torch.bfloat16)(model.forward)
    prepared = accelerator.prepare(model, optimizer)
    if base and not base.shared:
        if accelerator.is_fsdp2:
            base.model = fsdp2_prepare_model(accelerator, base.model)
        elif uses_deepspeed:
            deepspeed.shard_reference(base.model, accelerator)
    return prepared


def gradient_norm(accelerator: Accelerator, trained: Iterable[Tensor]) -> Tensor:
    """The L2 norm of the gradients of all trained weights together, a scalar."""
    if engine_of(accelerator) == "DeepSpeed":
        return deepspeed.gradient_norm(accelerator)
    return gather_full(torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]))


def saved_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters (tied ones once) and the buffers that are saved with a model."""
    yield from model.named_parameters()
    saved = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)
