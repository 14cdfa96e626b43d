"""One or several processes, on accelerate's engines: DDP, FSDP2, DeepSpeed ZeRO-3 (launch/ has a file for each).

Every process reads all data and makes every step's batch, and takes its share of the rows (Batch.share), so that the
draws and the losses do not depend on the number of processes. Only the main process writes.
"""

import copy
import os
from argparse import Namespace
from collections.abc import Iterable, Iterator
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, parse_flag_from_env
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import PeftModel
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from harmful_unlearn.errors import UserError
from harmful_unlearn.models import loading
from harmful_unlearn.models.reference import ReferenceModel
from harmful_unlearn.models.sharding import gather_full
from harmful_unlearn.storage.files import ROOT
from harmful_unlearn.storage.safetensors_io import DTYPE_CODES, ShardWriter, TensorSpec
from harmful_unlearn.training.deepspeed import _gathers_itself, _set_up_deepspeed, _spread

# While the main process writes a large model, the others wait for it.
TIMEOUT = timedelta(hours=2)
ENGINES = {DistributedType.FSDP: "FSDP2", DistributedType.DEEPSPEED: "DeepSpeed"}


def start(args: Namespace) -> tuple[Accelerator, str]:
    """The Accelerator of a run (which engine it has is up to `accelerate launch`), and the precision, "fp32" or "bf16".

    Raises:
        UserError: the engine and the flags do not go together, or a tracker is not installed.
    """
    tracker = None if args.report_to == "none" else args.report_to
    if tracker and find_spec(tracker) is None:
        raise UserError(f"--report_to {tracker} needs {tracker}: pip install {tracker}, or leave it out")
    on_cpus = parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=on_cpus, timeout=TIMEOUT)
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and (on_cpus or not state.backend):  # it would not be used
        raise UserError("DeepSpeed needs a GPU, and none was found: use DDP (harmful_unlearn/launch/ddp.yaml)")
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != state.num_processes:
        raise UserError(
            f"{started} processes were started, and no GPU was found for them: for CPUs set ACCELERATE_USE_CPU=1"
        )
    precision = loading.resolve_precision(args.precision, state.device)
    accelerator = Accelerator(
        device_placement=False,  # models are put in their places as they are loaded
        mixed_precision="bf16" if precision == "bf16" else "no",
        log_with=tracker,
        project_dir=str(ROOT / "logs") if tracker else None,
    )
    plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type == DistributedType.FSDP else None
    if plugin:
        if plugin.fsdp_version != 2:
            raise UserError("FSDP 1 is not supported: set fsdp_version: 2 (as in harmful_unlearn/launch/fsdp2.yaml)")
        if plugin.cpu_ram_efficient_loading or plugin.activation_checkpointing:
            raise UserError(
                "set fsdp_cpu_ram_efficient_loading and fsdp_activation_checkpointing to false (as in "
                "harmful_unlearn/launch/fsdp2.yaml); --gradient_checkpointing does the latter"
            )
        if precision == "bf16":  # gradients are added up in float32, as they are without FSDP
            plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    engine = engine_of(accelerator)
    if args.device_map and (accelerator.num_processes > 1 or engine != "DDP"):
        raise UserError("--device_map spreads one process over all devices: start one process, or leave it out")
    if args.quantize and engine != "DDP":
        raise UserError(f"--quantize does not go with {engine}: use DDP (harmful_unlearn/launch/ddp.yaml)")
    if engine == "DeepSpeed":
        if args.save_every or args.resume:
            raise UserError(
                "DeepSpeed keeps no checkpoints, so --save_every and --resume do not go with it: use FSDP2 "
                "(harmful_unlearn/launch/fsdp2.yaml)"
            )
        _set_up_deepspeed(accelerator.state.deepspeed_plugin, args.batch_size)
    return accelerator, precision


def start_tracker(accelerator: Accelerator, args: Namespace) -> None:
    """Begin to send metrics where --report_to says; its files go beside the log. Raises UserError: it cannot."""
    if args.report_to == "none":
        return
    accelerator.project_configuration.logging_dir = str(args.log_file.parent)
    flags = {name: one if isinstance(one, int | float | str) else str(one) for name, one in vars(args).items()}
    name = args.log_file.with_suffix(".tensorboard").name if args.report_to == "tensorboard" else "sku"
    folder = args.log_file.parent
    try:
        accelerator.init_trackers(name, flags, {"wandb": {"name": folder.name, "dir": str(folder)}})
    except Exception as error:  # each tracker has its own
        raise UserError(f"--report_to {args.report_to} cannot start ({error}): mend that, or leave it out") from error


def is_main_process() -> bool:
    """Whether this process is the one that speaks and writes; also before there is an Accelerator."""
    return int(os.environ.get("RANK", 0)) == 0


def print_once(message: str, end: str = "\n") -> None:
    """Print, in one process only."""
    if is_main_process():
        print(message, end=end, flush=True)


def engine_of(accelerator: Accelerator) -> str:
    """What several processes run on: "DDP", "FSDP2" or "DeepSpeed"."""
    return ENGINES.get(accelerator.distributed_type, "DDP")


def keeps_checkpoints(accelerator: Accelerator) -> bool:
    """Whether a run can be stopped and resumed; DeepSpeed has its state in pickles only."""
    return engine_of(accelerator) != "DeepSpeed"


def holds_shards(accelerator: Accelerator) -> bool:
    """Whether each process holds a part of every weight."""
    return accelerator.distributed_type in ENGINES


def prepare(
    accelerator: Accelerator,
    model: PreTrainedModel,
    base: ReferenceModel | None,
    optimizer: torch.optim.Optimizer,
    precision: str,
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The model, wrapped or sharded by the engine, and its optimizer; a base of its own is sharded, too.

    Args:
        precision: "fp32" or "bf16".

    Raises:
        UserError: a sharded model is stored under other names than its class has.
    """
    if holds_shards(accelerator) and not isinstance(model, PeftModel):
        names = dict.fromkeys(name for name, _ in _weights(model))
        stored = revert_weight_conversion(model, {name: torch.empty(1, device="meta") for name in names})
        if set(stored) != set(names):
            raise UserError("this model's weights are stored under other names than they have: use DDP, or --lora on")
    deepspeed = engine_of(accelerator) == "DeepSpeed"
    if deepspeed:
        _spread(model, accelerator)
        if precision == "bf16":  # the other engines' wrappers do it
            model.forward = torch.autocast(accelerator.device.type, torch.bfloat16)(model.forward)
    prepared = accelerator.prepare(model, optimizer)
    if base and not base.shared:
        if accelerator.is_fsdp2:
            base.model = fsdp2_prepare_model(accelerator, base.model)
        elif deepspeed:
            _gathers_itself(base.model, _spread(base.model, accelerator))
    return prepared


def gradient_norm(accelerator: Accelerator, trained: Iterable[Tensor]) -> Tensor:
    """Of all trained weights together, L2, a scalar."""
    if engine_of(accelerator) == "DeepSpeed":
        return torch.tensor(accelerator.deepspeed_engine_wrapped.get_global_grad_norm(), device=accelerator.device)
    return gather_full(torch.nn.utils.get_total_norm([one.grad for one in trained if one.grad is not None]))


def _weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters, tied ones once, and the buffers that belong to a checkpoint."""
    yield from model.named_parameters()
    saved = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def write_gathered(file: Path | None, entries: Iterable[tuple[str, Tensor]]) -> None:
    """Write tensors, of which processes may hold parts, as one safetensors file; no process holds more than one whole.

    Args:
        file: None in all processes but the main one.
    """
    entries = dict(entries)
    specs = {
        name: TensorSpec(DTYPE_CODES[tensor.dtype], tuple(getattr(tensor, "ds_shape", tensor.shape)))
        for name, tensor in entries.items()
    }
    new = ShardWriter(file.parent, {file.name: specs}, {"format": "pt"}) if file else None
    for name, tensor in entries.items():
        value = gather_full(tensor)
        if new:
            new.write(value, name)


def save_model(accelerator: Accelerator, model: torch.nn.Module, base_folder: Path, folder: Path | None) -> None:
    """`loading.save_model`, also of a model whose weights are spread over processes.

    Args:
        folder: None in all processes but the main one.
    """
    inner = accelerator.unwrap_model(model)
    if not holds_shards(accelerator):
        if folder:
            loading.save_model(inner, base_folder, folder)
    elif isinstance(inner, PeftModel):
        state = {name: gather_full(weight) for name, weight in inner.named_parameters() if weight.requires_grad}
        if folder:
            loading.save_model(inner, base_folder, folder, state)
    else:
        write_gathered(folder and folder / "model.safetensors", _weights(inner))
        if folder:
            config = copy.copy(inner.config)
            config.dtype = torch.float32
            config.save_pretrained(folder)
            loading.copy_generation_config(base_folder, folder)


def random_states(accelerator: Accelerator) -> dict[str, Tensor]:
    """The state of each random generator, uint8 [processes, bytes]; all processes have to ask for it."""
    states = {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    return {
        name: accelerator.gather(state[None].to(accelerator.device)).cpu().contiguous()
        for name, state in states.items()
    }


def set_random_states(accelerator: Accelerator, states: dict[str, Tensor]) -> bool:
    """Put generators back as `random_states` found them; False where there were not as many processes or devices."""
    devices = {"cpu", "cuda"} if accelerator.device.type == "cuda" else {"cpu"}
    if set(states) != devices or len(states["cpu"]) != accelerator.num_processes:
        return False
    mine = {name: state[accelerator.process_index].clone() for name, state in states.items()}  # torch reads no views
    torch.set_rng_state(mine["cpu"])
    if "cuda" in mine:
        torch.cuda.set_rng_state(mine["cuda"], accelerator.device)
    return True
