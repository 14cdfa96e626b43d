"""Checkpoints of a stage 1 run: what is in them, which is the newest, and whether a run may go on from it.

A checkpoint is a stage 1 folder of fewer steps, which --saved_model takes, with two files more: optimizer.safetensors
(AdamW's moments) and random.safetensors (each process's generators). The rate and the order of the data are functions
of the step. Like every folder it is whole or not there (saving.new_folder).
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from harmful_unlearn.errors import UserError
from harmful_unlearn.models.sharding import shard_like
from harmful_unlearn.storage.files import remove_folder, resolved
from harmful_unlearn.storage.run_record import read_record
from harmful_unlearn.storage.safetensors_io import SafetensorsFolder, TensorSpec
from harmful_unlearn.training.distributed import random_states, set_random_states, write_gathered

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW, for each weight


class TrainingCheckpoints:
    """The checkpoints of the run that trains into `model_save_dir`: folders step-N beside it.

    Args:
        keep: how many of the newest stay.
    """

    def __init__(self, model_save_dir: Path, keep: int):
        self.folder = Path(f"{resolved(model_save_dir)}.checkpoints")
        self._keep = keep

    def at(self, step: int) -> Path:
        """Where the checkpoint after `step` steps belongs."""
        return self.folder / f"step-{step}"

    def steps(self) -> list[int]:
        """The steps of all checkpoints, the newest first."""
        found = self.folder.glob("step-*") if self.folder.is_dir() else ()
        return sorted((int(one.name[5:]) for one in found if re.fullmatch(r"step-\d+", one.name)), reverse=True)

    def newest(self) -> Path | None:
        """The newest checkpoint whose files are all there and as long as they should be."""
        return next(self._whole(), None)

    def _whole(self) -> Iterator[Path]:
        for step in self.steps():
            with suppress(UserError):
                check_complete(self.at(step))
                yield self.at(step)

    def size(self) -> int:
        """Bytes that lie there, all of which the run will take up again."""
        return sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())

    def prune(self) -> None:
        """Remove all but the newest whole ones: one that is broken keeps no place."""
        kept = set(islice(self._whole(), self._keep))
        for step in self.steps():
            if self.at(step) not in kept:
                remove_folder(self.at(step))

    def remove(self) -> None:
        """Remove them all."""
        for step in self.steps():
            remove_folder(self.at(step))
        shutil.rmtree(self.folder, ignore_errors=True)


def check_complete(folder: Path) -> None:
    """Raises UserError where a folder is no checkpoint or lacks something."""
    if not all((folder / name).is_file() for name in ("run.json", "optimizer.safetensors", "random.safetensors")):
        raise UserError(f"{folder} is no checkpoint, or half of one: give a step-N, or --resume alone for the newest")
    adapter = (folder / "adapter_config.json").is_file()
    if not adapter and not (folder / "config.json").is_file():
        raise UserError(f"{folder} lacks its config.json: use another checkpoint")
    for stem in ("adapter_model" if adapter else "model", "optimizer", "random"):
        SafetensorsFolder(folder, stem)
    steps = read_record(folder).get("training", {}).get("steps")
    found = [metrics.get("step") for metrics in history_of(folder)]
    if found != [*range(1, len(found) + 1)] or len(found) != steps:
        raise UserError(f"{folder} has not the metrics of its {steps} steps: use another checkpoint")


def history_of(folder: Path) -> list[dict]:
    """The metrics of the steps that a stage 1 folder or checkpoint has behind it. Raises UserError."""
    try:
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
        return [dict(json.loads(line)) for line in text.splitlines()]
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'metrics.jsonl'} cannot be read ({error}): use another checkpoint") from None


def save_state(
    folder: Path | None, optimizer: torch.optim.Optimizer, trained: dict[str, Tensor], accelerator: Accelerator
) -> None:
    """Write AdamW's state, by the names of the trained weights, and the random generators'.

    Args:
        folder: None in all processes but the main one.
    """
    moments = (
        (f"{name}.{what}", value) for name, weight in trained.items() for what, value in optimizer.state[weight].items()
    )
    write_gathered(folder and folder / "optimizer.safetensors", moments)
    states = random_states(accelerator)
    if folder:
        save_file(states, folder / "random.safetensors")


def load_state(
    folder: Path, optimizer: torch.optim.Optimizer, trained: dict[str, Tensor], accelerator: Accelerator
) -> bool:
    """Put the optimizer and the random generators back as `save_state` found them.

    Returns:
        False where the generators belong to another number of processes or another device, and were left alone.

    Raises:
        UserError: the state is not these weights'.
    """
    moments = SafetensorsFolder(folder, "optimizer")
    for key, spec in moments.specs.items():  # AdamW's fused step looks at no shape, and would write anywhere
        name, _, what = key.rpartition(".")
        shape = () if what == "step" else getattr(trained.get(name), "shape", None)
        if what not in MOMENTS or spec != TensorSpec("F32", shape):
            raise UserError(f"{key} in {folder / 'optimizer.safetensors'} fits no weight: use another checkpoint")
    for name, weight in trained.items():
        found = {key: moments.read(key) for key in moments.specs if key.rpartition(".")[0] == name}
        if len(found) not in (0, len(MOMENTS)):
            raise UserError(f"{folder / 'optimizer.safetensors'} lacks moments of {name}: use another checkpoint")
        optimizer.state[weight] = {
            key.rpartition(".")[2]: shard_like(value, weight) if value.dim() else value.to(weight.device)
            for key, value in found.items()
        }
    try:
        return set_random_states(accelerator, load_file(folder / "random.safetensors"))
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{folder / 'random.safetensors'} holds no states: use another checkpoint") from error
