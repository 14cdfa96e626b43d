"""Task vectors: what fine-tuning changed, summed, scaled, and subtracted (stage 2 of SKU).

    unlearned = base - scaling_coef * sum_i coef_i * (finetuned_i - base)

Stage 2 of the paper (the harmful model of stage 1: a full model or a LoRA adapter folder):

    python task_vector.py --base facebook/opt-1.3b --finetuned models/harmful --output models/unlearned

Two models at once, the second at half its strength, and their task vector saved:

    python task_vector.py --base B --finetuned F G --coefs 1 0.5 --output O --save_vector V

Another scaling_coef later, without the fine-tuned models:

    python task_vector.py --base B --vector V --output O2 --scaling_coef 0.5

Several from one read: O/alpha-0.5, O/alpha-1, O/alpha-1.5:

    python task_vector.py --base B --finetuned F --output O --scaling_coef 0.5 1 1.5

The unlearning adapter of a stage 1 adapter, megabytes in place of a model, for PeftModel on the untouched base:

    python task_vector.py --base B --finetuned ADAPTER --adapter_output O

Push it to the hub (private unless --public), at once or later; a stage 1 model is never pushed:

    python task_vector.py --base B --finetuned F --output O --push_to_hub OWNER/NAME
    python task_vector.py --output O --push_to_hub OWNER/NAME

A scaling_coef of -1 adds instead: with a stage 1 adapter it writes the merged harmful model.

The command streams the files (harmful_unlearn/negation/), so a model need not fit into memory; `TaskVector` does the
same arithmetic on models in memory. A saved vector is a folder: task_vector.safetensors, or shards with
task_vector.safetensors.index.json, in float32 (float64 for float64 entries).
"""

if __name__ == "__main__":
    import harmful_unlearn.cli.before_imports  # noqa: F401

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harmful_unlearn.cli.flag_parser import FlagParser, flag
from harmful_unlearn.cli.flag_types import number
from harmful_unlearn.cli.running import exit_code
from harmful_unlearn.errors import UserError
from harmful_unlearn.models.offload import Weights, copy_model, read_entry, shapes_of, tied_groups, write_entry
from harmful_unlearn.negation.entry_names import match, refuse_mismatch, refuse_untied
from harmful_unlearn.negation.negate import Check, check_targets, negate, negate_adapter
from harmful_unlearn.negation.records import check_landing
from harmful_unlearn.negation.sources import SavedVector, vector_metadata
from harmful_unlearn.storage.files import new_folder, user_path
from harmful_unlearn.storage.run_record import RunRecord
from harmful_unlearn.storage.safetensors_io import VECTOR_STEM, ShardWriter, TensorSpec, work_dtype


class TaskVector:
    """tau = finetuned - pretrained, over all floating-point entries (implementation detail 16).

    unlearned = (-TaskVector(base, harmful)).apply_to(base, scaling_coef=1.0)

    Tied weights are one entry, under their first name. Differences are float32 (float64 for float64 entries), so
    that a 16-bit model is rounded once, when the vector is applied.

    Args:
        pretrained, finetuned: models or state dicts with the same entries. A device_map may have spread the models
            over devices and disk; each difference is computed where pretrained's entry is.
        vector: tau itself, by entry name, in place of the two models.
        partial: entries that `vector` lacks are zero, as for an adapter.

    Raises:
        UserError: an entry is missing, extra, or of another shape; a quantized model.
        TypeError: neither two models nor a vector is given.
    """

    def __init__(
        self,
        pretrained: Weights | None = None,
        finetuned: Weights | None = None,
        *,
        vector: Mapping[str, Tensor] | None = None,
        partial: bool = False,
    ):
        self.partial = partial
        if vector is not None:
            self.vector = dict(vector)
            return
        if pretrained is None or finetuned is None:
            raise TypeError("a task vector needs two models or state dicts, or vector=")
        base, changed = tied_groups(pretrained), tied_groups(finetuned)

        def twins(name: str) -> list[str]:
            return [twin for tied in base[name] for twin in changed.get(tied, ())]

        def equal(a: str, b: str) -> bool:
            return torch.equal(read_entry(finetuned, a), read_entry(finetuned, b))

        shapes = shapes_of(pretrained, base), shapes_of(finetuned, changed)
        names = match(*shapes, lambda name: [*base[name], *twins(name)], "the fine-tuned model")
        self.vector = {}
        for name, twin in names.items():
            refuse_untied(twin, twins(name), equal)
            entry = read_entry(pretrained, name)
            work = work_dtype(entry.dtype)
            self.vector[name] = read_entry(finetuned, twin).to(entry.device, work) - entry.to(work)

    @classmethod
    def load(cls, path: str | Path) -> "TaskVector":
        """Read a vector that `save` or `--save_vector` wrote, on the CPU."""
        source = SavedVector(Path(path))
        return cls(vector={name: source.read(name) for name in source.specs}, partial=source.partial)

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the vector as a folder that `load` and `--vector` read."""
        entries = {name: tensor.to(work_dtype(tensor.dtype)) for name, tensor in self.vector.items()}
        specs = {name: TensorSpec(entry.dtype, tuple(entry.shape)) for name, entry in entries.items()}
        with new_folder(Path(path), overwrite) as folder:
            shards = ShardWriter(folder, {f"{VECTOR_STEM}.safetensors": specs}, vector_metadata(self.partial))
            for name, entry in entries.items():
                shards.write(entry, name)

    def __add__(self, other: "TaskVector") -> "TaskVector":
        if not isinstance(other, TaskVector):
            return NotImplemented
        missing = [] if other.partial else [name for name in self.vector if name not in other.vector]
        extra = [] if self.partial else [name for name in other.vector if name not in self.vector]
        common = sorted(self.vector.keys() & other.vector.keys())
        reshaped = [name for name in common if self.vector[name].shape != other.vector[name].shape]
        refuse_mismatch("the second task vector", missing, extra, reshaped)
        total = dict(self.vector)
        for name, entry in other.vector.items():
            total[name] = total[name] + entry.to(total[name].device) if name in total else entry
        return TaskVector(vector=total, partial=self.partial and other.partial)

    def __radd__(self, other: object) -> "TaskVector":
        return self if other == 0 else NotImplemented  # sum() starts from 0

    def __neg__(self) -> "TaskVector":
        return TaskVector(vector={name: -entry for name, entry in self.vector.items()}, partial=self.partial)

    def __sub__(self, other: "TaskVector") -> "TaskVector":
        return self + -other if isinstance(other, TaskVector) else NotImplemented

    def __mul__(self, coef: float) -> "TaskVector":
        if not isinstance(coef, int | float):
            return NotImplemented
        return TaskVector(vector={name: coef * entry for name, entry in self.vector.items()}, partial=self.partial)

    __rmul__ = __mul__

    @torch.no_grad()
    def apply_to(self, model: nn.Module, scaling_coef: float = 1.0, in_place: bool = False) -> nn.Module:
        """model + scaling_coef * tau, each entry in its own dtype on its own device.

        Args:
            in_place: change and return `model` itself; by default a copy is changed and returned. Entries that
                are on disk are written to new files, never into the files that the model was loaded from.

        Raises:
            UserError: as the class; nothing was changed then.
        """
        groups = tied_groups(model)
        deltas = {name: entry.shape for name, entry in self.vector.items()}
        names = match(shapes_of(model, groups), deltas, groups.__getitem__, "the task vector", self.partial)
        if not in_place:
            model = copy_model(model)
        for name, twin in names.items():
            base = read_entry(model, name)
            work = work_dtype(base.dtype)
            changed = (base.to(work) + scaling_coef * self.vector[twin].to(base.device, work)).to(base.dtype)
            for tied in groups[name]:
                write_entry(model, tied, changed)
        return model


@dataclass(frozen=True)
class TaskVectorSettings:
    """The flags of this command."""

    base: str | None = flag("the model that was fine-tuned: folder or hub id")
    finetuned: list[str] | None = flag("fine-tuned models or LoRA adapters: folders or hub ids", nargs="+")
    vector: list[Path] | None = flag("saved task vectors, in place of --finetuned", nargs="+", type=user_path)
    coefs: list[float] | None = flag("one per model or vector (default: all 1)", nargs="+", type=number)
    output: Path | None = flag("the folder to write the model to", type=user_path)
    scaling_coef: list[float] = flag(
        "alpha (default: 1); several write OUTPUT/alpha-0.5, ... from one read", nargs="+", type=number, default=[1.0]
    )
    adapter_output: Path | None = flag("the folder to write the negated adapter to", type=user_path)
    save_vector: Path | None = flag("the folder to write the (summed) task vector to", type=user_path)
    push_to_hub: str | None = flag(
        "upload the unlearned model or adapter there, with its card; without --base, the one that OUTPUT has already "
        "(the token comes from HF_TOKEN or `hf auth login`)",
        metavar="OWNER/NAME",
    )
    public: bool = flag("push to a public repository (default: a private one)", action="store_true")
    force: bool = flag("allow another alpha than the one that a model was trained to land at", action="store_true")
    overwrite: bool = flag("replace the folders to write if they are not empty", action="store_true")


def parse_flags(arguments: list[str] | None = None) -> TaskVectorSettings:
    """The flags. Exits with code 2: they do not go together."""
    description, _, examples = __doc__.partition("\n")
    parser = FlagParser(prog="task_vector.py", description=description, epilog=examples)
    parser.add_settings(TaskVectorSettings)
    values = vars(parser.parse_args(arguments))
    settings = TaskVectorSettings(**values)
    computes = bool(settings.base or settings.finetuned or settings.vector or settings.save_vector)
    if not settings.base and (computes or not settings.push_to_hub):
        parser.error("give --base")
    if computes and bool(settings.finetuned) == bool(settings.vector):
        parser.error("give either --finetuned or --vector")
    if not (settings.output or settings.adapter_output or settings.save_vector):
        parser.error("give --output, --adapter_output, --save_vector or several of them")
    if settings.public and not settings.push_to_hub:
        parser.error("--public is about a push: give --push_to_hub OWNER/NAME, too")
    is_one = bool(settings.output) != bool(settings.adapter_output) and len(settings.scaling_coef) == 1
    if settings.push_to_hub and not is_one:
        parser.error("--push_to_hub pushes one folder: give --output or --adapter_output, and one --scaling_coef")
    return parser.settings(TaskVectorSettings, values)


def main(arguments: list[str] | None = None) -> None:
    """Run the command. Raises UserError before anything is written, unless the hub fails in the end."""
    settings = parse_flags(arguments)
    if not settings.push_to_hub:
        _compute(settings)
        return
    from harmful_unlearn.negation import push  # imports the hub's client, which local folders do not need

    folder = settings.output or settings.adapter_output
    assert folder  # parse_flags has seen to it
    if not settings.base:
        push.check_unlearned(RunRecord.read(folder), folder)
    push.check_access(settings.push_to_hub)
    if settings.base:
        _compute(settings, check=push.check_unlearned)
    url = push.push(folder, settings.push_to_hub, settings.public)
    print(f"pushed: {url} ({'public' if settings.public else 'private'})")


def _compute(settings: TaskVectorSettings, check: Check | None = None) -> None:
    assert settings.base  # parse_flags has seen to it
    targets = [settings.output, settings.adapter_output, settings.save_vector]
    names = settings.finetuned or settings.vector or []
    coefs = settings.coefs or [1.0] * len(names)
    if len(coefs) != len(names):
        raise UserError(f"{len(coefs)} --coefs for {len(names)} folders: give one each")

    base = _locate(settings.base)
    folders = [_locate(name) for name in settings.finetuned or []] or settings.vector or []
    finetuned = list(zip(folders, coefs, strict=True))
    check_targets(targets, base, finetuned, settings.overwrite)
    if (settings.output or settings.adapter_output) and not settings.force:
        check_landing(finetuned, settings.scaling_coef)
    common: dict[str, Any] = {"base_name": settings.base, "overwrite": settings.overwrite, "check": check}
    if settings.adapter_output:
        negate_adapter(base, finetuned, settings.adapter_output, *settings.scaling_coef, **common)
    if settings.output or settings.save_vector:
        negate(base, finetuned, settings.output, *settings.scaling_coef, save_vector=settings.save_vector, **common)
    for target in filter(None, targets):
        print(f"saved: {target}")


def _locate(name: str) -> Path:
    folder = user_path(name)
    if folder.is_dir():
        return folder
    from harmful_unlearn.models.hub import resolve_model  # imports the hub's client, which local folders do not need

    return resolve_model(name)


if __name__ == "__main__":
    sys.exit(exit_code(main))
