"""Checkpoints of a stage 1 run: what is in them, which is the newest, and whether a run may go on from it.

A checkpoint is a stage 1 folder of fewer steps, which --saved_model takes, with two files more: optimizer.safetensors
(AdamW's moments) and random.safetensors (each process's generators). The rate and the order of the data are functions
of the step. Like every folder it is whole or not there (saving.new_folder).
"""

import json
import re
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from harmful_unlearn.checkpoints import Checkpoint, read_record
from harmful_unlearn.errors import UserError
from harmful_unlearn.processes import random_states, set_random_states, spread_as, write_whole

# Flags that may change when a run goes on. scaling_coef is among them unless a loss is taken at the landing point.
FREE = {
    "model_save_dir", "saved_model", "log_file", "task_vector_saving_path", "stage", "gradient_checkpointing",
    "device_map", "check", "overwrite", "save_every", "keep_checkpoints", "resume", "report_to",
}  # fmt: skip
# Flags whose outcome is compared in their place: what was read, how many pairs a step, which adapter.
RESOLVED = {
    "model_name", "harmful_dataset", "harmful_revision", "harmful_split", "normal_dataset", "batch_size", "precision",
    "lora", "lora_r", "lora_alpha", "lora_target_modules", "max_length",
}  # fmt: skip


class Checkpoints:
    """The checkpoints of the run that trains into `model_save_dir`: folders step-N beside it.

    Args:
        keep: how many of the newest stay.
    """

    def __init__(self, model_save_dir: Path, keep: int):
        self.folder = model_save_dir.with_name(model_save_dir.name + ".checkpoints")
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
        for step in self.steps():
            try:
                check_whole(self.at(step))
            except UserError:
                continue
            return self.at(step)
        return None

    def prune(self) -> None:
        """Remove all but the newest ones."""
        for step in self.steps()[self._keep :]:
            shutil.rmtree(self.at(step), ignore_errors=True)

    def remove(self) -> None:
        """Remove them all."""
        shutil.rmtree(self.folder, ignore_errors=True)


def check_whole(folder: Path) -> None:
    """Raises UserError where a folder is no checkpoint or lacks something."""
    if not (folder / "run.json").is_file():
        raise UserError(f"{folder} is no checkpoint: give a folder step-N, or --resume alone for the newest")
    read_record(folder)
    Checkpoint(folder, "adapter_model" if (folder / "adapter_config.json").is_file() else "model")
    for stem in ("optimizer", "random"):
        Checkpoint(folder, stem)
    history_of(folder)


def history_of(folder: Path) -> list[dict]:
    """The metrics of the steps that a stage 1 folder or checkpoint has behind it. Raises UserError."""
    try:
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'metrics.jsonl'} cannot be read ({error}): use another checkpoint") from None


def save_state(
    folder: Path | None, optimizer: torch.optim.Optimizer, trained: dict[str, Tensor], accelerator: Accelerator
) -> None:
    """Write AdamW's state, by the names of the trained weights, and the random generators'.

    Args:
        folder: None in all processes but the main one.
    """
    moments = (
        (f"{name}.{what}", value)
        for name, weight in trained.items() for what, value in optimizer.state[weight].items()
    )  # fmt: skip
    write_whole(folder and folder / "optimizer.safetensors", moments)
    states = random_states(accelerator)
    if folder:
        save_file(states, folder / "random.safetensors")


def load_state(
    folder: Path, optimizer: torch.optim.Optimizer, trained: dict[str, Tensor], accelerator: Accelerator
) -> bool:
    """Put the optimizer and the random generators back as `save_state` found them.

    Returns:
        False where the generators belong to another number of processes or another device, and were left alone.
    """
    moments = Checkpoint(folder, "optimizer")
    for name, weight in trained.items():
        found = {key: moments.read(key) for key in moments.specs if key.rpartition(".")[0] == name}
        optimizer.state[weight] = {
            key.rpartition(".")[2]: spread_as(value, weight) if value.dim() else value.to(weight.device)
            for key, value in found.items()
        }
    return set_random_states(accelerator, load_file(folder / "random.safetensors"))


def deciding(record: dict, lands: bool) -> dict[str, object]:
    """All that decides a stage 1 run's weights, by the name that a user knows it by.

    Args:
        record: of a run (run.json).
        lands: whether a loss is taken at the landing point.
    """
    flags, training = record["flags"], record["training"]
    free = FREE | RESOLVED | (set() if lands else {"scaling_coef"})
    decides = {f"--{name}": value for name, value in flags.items() if name not in free}
    decides["--batch_size times the number of processes"] = flags["batch_size"] * training["processes"]
    decides["--max_length"] = training["max_length"]
    decides["--precision"] = training["precision"]
    decides["LoRA"] = training["lora"] and json.dumps(training["lora"])
    decides["base model"] = record["base"]["fingerprint"][:12]
    for what in ("harmful", "normal"):
        source = record[f"{what}_data"]
        read = [source.get("revision"), source.get("split")] if not source.get("sha256") else [source["sha256"][:12]]
        decides[f"{what} data"] = " ".join(str(one) for one in read)
    return decides


def check_same_run(then: dict, now: dict, lands: bool, where: Path) -> list[str]:
    """What changed since a run was begun, for the log, if none of it changes the result.

    Args:
        then, now: records of the run (run.json) as it was begun, and as it would go on.

    Raises:
        UserError: it changes the result.
    """
    try:
        before = deciding(then, lands)
    except (KeyError, TypeError):
        raise UserError(f"{where} was not written by this version: start again with --overwrite") from None
    after = deciding(now, lands)
    changed = [
        f"{name} was {before.get(name)} and is {after.get(name)} now"
        for name in dict.fromkeys([*before, *after]) if json.dumps(before.get(name)) != json.dumps(after.get(name))
    ]  # fmt: skip
    if changed:
        what = "; ".join(changed)
        raise UserError(f"{where} is another run's ({what}): give what it had, or start again with --overwrite")
    quiet = {"resume", "check", "overwrite"}
    return [
        f"--{name} was {then['flags'].get(name)} and is {value} now"
        for name, value in now["flags"].items()
        if name not in quiet and f"--{name}" not in after and name not in RESOLVED
        and json.dumps(value) != json.dumps(then["flags"].get(name))
    ]  # fmt: skip


def is_done(target: Path, finetuned: Path, scaling_coef: float, fingerprint: str) -> bool:
    """Whether the unlearned model is there already, made from that base and that copy.

    Raises:
        UserError: another one is.
    """
    if not (target / "run.json").is_file():
        return False
    found = read_record(target)
    of_base = (found.get("base") or {}).get("fingerprint")
    made_from = [Path(name).resolve() for name in found.get("finetuned") or ()]
    if (found.get("scaling_coef"), of_base, made_from) != (scaling_coef, fingerprint, [finetuned.resolve()]):
        raise UserError(
            f"{target} holds another model ({', '.join(map(str, made_from))} by {found.get('scaling_coef')}): give "
            "another --task_vector_saving_path, or start again with --overwrite"
        )
    return True
