"""Checkpoints of a stage 1 run: what is in them, which is the newest, how they are written and read.

A checkpoint is a stage 1 model folder after fewer steps (--saved_model takes it), with two more files:
optimizer.safetensors (AdamW's moments) and random.safetensors (the state of each process's random generators). The
learning rate and the order of the data are functions of the step. Folders are written atomically (storage/files.py).
"""

import copy
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from harmful_unlearn.errors import UserError
from harmful_unlearn.models import loading
from harmful_unlearn.models.sharding import gather_full, shard_like
from harmful_unlearn.storage.files import remove_folder, resolved
from harmful_unlearn.storage.run_record import RunRecord
from harmful_unlearn.storage.safetensors_io import SafetensorsFolder, ShardWriter, TensorSpec
from harmful_unlearn.training.distributed import saved_weights, shards_weights

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW, for each weight


class TrainingCheckpoints:
    """The checkpoints of the run that trains into `model_save_dir`: folders MODEL_SAVE_DIR.checkpoints/step-N.

    Args:
        keep: how many of the newest to keep.
    """

    def __init__(self, model_save_dir: Path, keep: int):
        self.folder = Path(f"{resolved(model_save_dir)}.checkpoints")
        self._keep = keep

    def at(self, step: int) -> Path:
        """The folder of the checkpoint after `step` steps."""
        return self.folder / f"step-{step}"

    def steps(self) -> list[int]:
        """The steps of all checkpoints, the newest first."""
        folders = self.folder.glob("step-*") if self.folder.is_dir() else ()
        return sorted((int(f.name[5:]) for f in folders if re.fullmatch(r"step-\d+", f.name)), reverse=True)

    def newest(self) -> Path | None:
        """The newest complete checkpoint: all files are there and as long as they should be."""
        return next(self._complete(), None)

    def _complete(self) -> Iterator[Path]:
        for step in self.steps():
            with suppress(UserError):
                check_complete(self.at(step))
                yield self.at(step)

    def size(self) -> int:
        """Bytes on disk; the run will use all of them again."""
        return sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())

    def prune(self) -> None:
        """Remove all but the newest complete ones; an incomplete one does not count."""
        newest = set(islice(self._complete(), self._keep))
        for step in self.steps():
            if self.at(step) not in newest:
                remove_folder(self.at(step))

    def remove(self) -> None:
        """Remove them all."""
        for step in self.steps():
            remove_folder(self.at(step))
        shutil.rmtree(self.folder, ignore_errors=True)


def check_complete(folder: Path) -> None:
    """Raises UserError where a folder is not a checkpoint or lacks something."""
    if not all((folder / name).is_file() for name in ("run.json", "optimizer.safetensors", "random.safetensors")):
        raise UserError(
            f"{folder} is not a complete checkpoint: give a folder step-N, or --resume without a folder for the newest"
        )
    is_adapter = (folder / "adapter_config.json").is_file()
    if not is_adapter and not (folder / "config.json").is_file():
        raise UserError(f"{folder} lacks its config.json: use another checkpoint")
    for stem in ("adapter_model" if is_adapter else "model", "optimizer", "random"):
        SafetensorsFolder(folder, stem)
    expected = RunRecord.read(folder).training.get("steps")
    steps = [metrics.get("step") for metrics in read_history(folder)]
    if steps != [*range(1, len(steps) + 1)] or len(steps) != expected:
        raise UserError(f"{folder} does not have the metrics of its {expected} steps: use another checkpoint")


def read_history(folder: Path) -> list[dict]:
    """The metrics of all steps of a stage 1 folder or checkpoint. Raises UserError."""
    try:
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
        return [dict(json.loads(line)) for line in text.splitlines()]
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'metrics.jsonl'} cannot be read ({error}): use another checkpoint") from None


def save_model(accelerator: Accelerator, model: torch.nn.Module, base_folder: Path, folder: Path | None) -> None:
    """`loading.save_model`, also for a model that is sharded over processes.

    Args:
        folder: None in all processes but the main one.
    """
    inner = accelerator.unwrap_model(model)
    if not shards_weights(accelerator):
        if folder:
            loading.save_model(inner, base_folder, folder)
    elif isinstance(inner, PeftModel):
        state = {name: gather_full(weight) for name, weight in inner.named_parameters() if weight.requires_grad}
        if folder:
            loading.save_model(inner, base_folder, folder, state)
    else:
        write_gathered(folder and folder / "model.safetensors", saved_weights(inner))
        if folder:
            config = copy.copy(inner.config)
            config.dtype = torch.float32
            config.save_pretrained(folder)
            loading.copy_generation_config(base_folder, folder)


def write_gathered(file: Path | None, entries: Iterable[tuple[str, Tensor]]) -> None:
    """Write tensors, which may be sharded, as one safetensors file. No process holds more than one complete tensor.

    Args:
        file: None in all processes but the main one.
    """
    tensors = dict(entries)
    specs = {
        name: TensorSpec(tensor.dtype, tuple(getattr(tensor, "ds_shape", tensor.shape)))
        for name, tensor in tensors.items()
    }
    writer = ShardWriter(file.parent, {file.name: specs}, {"format": "pt"}) if file else None
    for name, tensor in tensors.items():
        value = gather_full(tensor)
        if writer:
            writer.write(value, name)


def save_state(
    folder: Path | None, optimizer: torch.optim.Optimizer, trained: dict[str, Tensor], accelerator: Accelerator
) -> None:
    """Write AdamW's state, by the names of the trained weights, and the state of the random generators.

    Args:
        folder: None in all processes but the main one.
    """
    moments = (
        (f"{name}.{moment}", value)
        for name, weight in trained.items()
        for moment, value in optimizer.state[weight].items()
    )
    write_gathered(folder and folder / "optimizer.safetensors", moments)
    states = _random_states(accelerator)
    if folder:
        save_file(states, folder / "random.safetensors")


def load_state(
    folder: Path, optimizer: torch.optim.Optimizer, trained: dict[str, Tensor], accelerator: Accelerator
) -> bool:
    """Put the optimizer and the random generators back as `save_state` found them.

    Returns:
        False where the generators are those of another number of processes or another device: these are then not set.

    Raises:
        UserError: the state does not belong to these weights.
    """
    file = folder / "optimizer.safetensors"
    moments = SafetensorsFolder(folder, "optimizer")
    for key, spec in moments.specs.items():  # AdamW's fused step checks no shape, and would write out of bounds
        name, _, moment = key.rpartition(".")
        shape = () if moment == "step" else getattr(trained.get(name), "shape", None)
        if moment not in MOMENTS or spec != (torch.float32, shape):
            raise UserError(f"{key} in {file} fits no weight: use another checkpoint")
    for name, weight in trained.items():
        state = {key: moments.read(key) for key in moments.specs if key.rpartition(".")[0] == name}
        if len(state) not in (0, len(MOMENTS)):
            raise UserError(f"{file} lacks moments of {name}: use another checkpoint")
        optimizer.state[weight] = {
            key.rpartition(".")[2]: shard_like(value, weight) if value.dim() else value.to(weight.device)
            for key, value in state.items()
        }
    try:
        return _set_random_states(accelerator, load_file(folder / "random.safetensors"))
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{folder / 'random.safetensors'} holds no states: use another checkpoint") from error


def _random_states(accelerator: Accelerator) -> dict[str, Tensor]:
    """The state of each random generator, uint8 [processes, bytes]; all processes must call this."""
    states = {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    return {
        name: accelerator.gather(state[None].to(accelerator.device)).cpu().contiguous()
        for name, state in states.items()
    }


def _set_random_states(accelerator: Accelerator, states: dict[str, Tensor]) -> bool:
    """Set the generators to `states`; False where these have another number of processes or another device."""
    devices = {"cpu", "cuda"} if accelerator.device.type == "cuda" else {"cpu"}
    if set(states) != devices or len(states["cpu"]) != accelerator.num_processes:
        return False
    own = {name: state[accelerator.process_index].clone() for name, state in states.items()}  # torch reads no views
    torch.set_rng_state(own["cpu"])
    if "cuda" in own:
        torch.cuda.set_rng_state(own["cuda"], accelerator.device)
    return True
