"""Task vectors: what fine-tuning changed, added up, scaled, and subtracted (stage 2 of SKU).

    unlearned = base - scaling_coef * sum_i coef_i * (finetuned_i - base)

Stage 2 of the paper (the harmful model from stage 1, whole or a LoRA adapter folder):

    python task_vector.py --base facebook/opt-1.3b --finetuned models/harmful --output models/unlearned

Two models at once, the second at half its strength; their vector is kept:

    python task_vector.py --base B --finetuned F G --coefs 1 0.5 --output O --save_vector V

Another scale later, without the fine-tuned models:

    python task_vector.py --base B --vector V --output O2 --scaling_coef 0.5

A scaling_coef of -1 adds instead: with a stage 1 adapter that writes the merged harmful model.

Checkpoints are streamed entry by entry, so that a model need not fit into memory; `TaskVector` does
the same arithmetic on models in memory. A saved vector is a folder: task_vector.safetensors, or
shards with task_vector.safetensors.index.json, in float32 (float64 for entries that are).
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from harmful_unlearn.adapters import Adapter
from harmful_unlearn.checkpoints import (
    CODES,
    DTYPES,
    VECTOR,
    Checkpoint,
    Spec,
    append,
    class_names,
    copy_small_files,
    open_shard,
    read_json,
)
from harmful_unlearn.dispatched import (
    copy_model,
    first_names,
    get_entry,
    read_entry,
    tied_groups,
    write_entry,
)
from harmful_unlearn.errors import UserError, exit_code
from harmful_unlearn.saving import (
    check_apart,
    check_target,
    new_folder,
    revision_of,
    user_path,
    write_file,
    write_record,
)

STAGE_1_FACTS = ("base", "finetuned", "harmful_data", "normal_data", "training", "losses_at_the_end", "flags")
LISTED = 20  # entries that an error names


class TaskVector:
    """tau = finetuned - pretrained over all floating-point entries (released code, point 16).

    Args:
        pretrained, finetuned: models or state dicts with the same entries. Models may be spread over
            devices by a device_map, disk included; each difference is taken where pretrained's entry lies.
        vector: tau itself, by entry name, instead of the two.
        partial: entries that `vector` lacks are zero, as for an adapter.

    Tied weights are one entry, under their first name. Differences are float32 (float64 for entries
    that are), so that a 16-bit model is rounded once, when the vector is applied.

    Example:
        unlearned = (-TaskVector(base, harmful)).apply_to(base, scaling_coef=1.0)

    Raises:
        UserError: an entry is missing, extra, or of another shape; a quantized model.
    """

    def __init__(
        self,
        pretrained: nn.Module | Mapping[str, Tensor] | None = None,
        finetuned: nn.Module | Mapping[str, Tensor] | None = None,
        *,
        vector: Mapping[str, Tensor] | None = None,
        partial: bool = False,
    ):
        self.partial = partial
        if vector is not None:
            self.vector = dict(vector)
            return
        base, other = tied_groups(pretrained), tied_groups(finetuned)
        found = _match(
            {name: get_entry(pretrained, name).shape for name in first_names(base)},
            {name: get_entry(finetuned, name).shape for name in first_names(other)},
            lambda name: [*base[name], *(twin for known in base[name] for twin in other.get(known, ()))],
            what="the fine-tuned model",
        )
        for name, twin in found.items():
            twins = [other_name for known in base[name] if known in other for other_name in other[known]]
            _refuse_untied(twin, twins, lambda entry: read_entry(finetuned, entry))
        self.vector = {
            name: _difference(read_entry(finetuned, twin), read_entry(pretrained, name))
            for name, twin in found.items()
        }

    @classmethod
    def load(cls, path: str | Path) -> "TaskVector":
        """Read a vector that `save` or `--save_vector` wrote, on the CPU."""
        source = _SavedVector(Path(path))
        return cls(vector={name: source.delta(name) for name in source.specs}, partial=source.partial)

    @classmethod
    def from_adapter(cls, path: str | Path) -> "TaskVector":
        """tau = scale * B @ A of a saved PEFT LoRA adapter, by the base model's names, without the base.

        Raises:
            UserError: not a LoRA adapter, or one that changes more than B @ A (DoRA, biases, ...).
        """
        source = Adapter(Path(path))
        return cls(vector={name: source.delta(name) for name in source.specs}, partial=True)

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the vector as a folder that `load` and `--vector` read."""
        entries = {name: tensor.to(_work_dtype(tensor.dtype)) for name, tensor in self.vector.items()}
        specs = {name: Spec(CODES[entry.dtype], tuple(entry.shape)) for name, entry in entries.items()}
        with new_folder(Path(path), overwrite) as folder:
            metadata = _vector_metadata(self.partial)
            with open_shard(folder / f"{VECTOR}.safetensors", specs, metadata) as file:
                for name in specs:
                    append(file, entries[name])

    def __add__(self, other: "TaskVector") -> "TaskVector":
        if not isinstance(other, TaskVector):
            return NotImplemented
        missing = [] if other.partial else [name for name in self.vector if name not in other.vector]
        extra = [] if self.partial else [name for name in other.vector if name not in self.vector]
        differ = [
            name for name in self.vector
            if name in other.vector and self.vector[name].shape != other.vector[name].shape
        ]  # fmt: skip
        _refuse_mismatch("the second task vector", missing, extra, differ)
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

    def __mul__(self, scale: float) -> "TaskVector":
        if not isinstance(scale, int | float):
            return NotImplemented
        scaled = {name: scale * entry for name, entry in self.vector.items()}
        return TaskVector(vector=scaled, partial=self.partial)

    __rmul__ = __mul__

    @torch.no_grad()
    def apply_to(self, model: nn.Module, scaling_coef: float = 1.0, in_place: bool = False) -> nn.Module:
        """model + scaling_coef * tau, each entry in its own dtype on its own device.

        Args:
            in_place: change and return `model` itself; by default it stays as it is, and a copy is
                changed. Entries that lie on disk are written to new files, never into a checkpoint.

        Raises:
            UserError: as the class; nothing has been changed then.
        """
        groups = tied_groups(model)
        shapes = {name: get_entry(model, name).shape for name in first_names(groups)}
        deltas = {name: entry.shape for name, entry in self.vector.items()}
        found = _match(shapes, deltas, groups.__getitem__, what="the task vector", partial=self.partial)
        if not in_place:
            model = copy_model(model)
        for name, source in found.items():
            changed = _applied(read_entry(model, name), self.vector[source], scaling_coef)
            for twin in groups[name]:
                write_entry(model, twin, changed)
        return model

    def norms(self) -> dict[str, float]:
        """L2 norms: one per layer ("model.decoder.layers.3"), one per other module ("lm_head")."""
        squares: dict[str, float] = {}
        for name, entry in self.vector.items():
            layer = re.match(r"(.*?\.)?\d+(?=\.)", name)
            key = layer[0] if layer else name.rpartition(".")[0] or name
            squares[key] = squares.get(key, 0.0) + entry.double().square().sum().item()
        return {key: math.sqrt(square) for key, square in squares.items()}


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _difference(finetuned: Tensor, pretrained: Tensor) -> Tensor:
    work = _work_dtype(pretrained.dtype)
    return finetuned.to(pretrained.device, work) - pretrained.to(work)


def _applied(base: Tensor, tau: Tensor, scaling_coef: float) -> Tensor:
    work = _work_dtype(base.dtype)
    return (base.to(work) + scaling_coef * tau.to(base.device, work)).to(base.dtype)


def _match(
    base: Mapping[str, Iterable[int]],
    other: Mapping[str, Iterable[int]],
    synonyms: Callable[[str], list[str]],
    what: str,
    partial: bool = False,
) -> dict[str, str]:
    """For each entry of the base, its name on the other side; absent ones are left out if `partial`.

    Args:
        base, other: shapes by name.
        synonyms: every name that an entry of the base may have, its own first.
    """
    known = {name: synonyms(name) for name in base}
    found = {name: next((twin for twin in known[name] if twin in other), None) for name in base}
    missing = [] if partial else [name for name, twin in found.items() if twin is None]
    found = {name: twin for name, twin in found.items() if twin is not None}
    spoken_for = {twin for twins in known.values() for twin in twins}
    differ = [
        f"{name} ({tuple(other[twin])}, not {tuple(base[name])})"
        for name, twin in found.items() if tuple(base[name]) != tuple(other[twin])
    ]  # fmt: skip
    _refuse_mismatch(what, missing, [name for name in other if name not in spoken_for], differ)
    return found


def _refuse_untied(name: str, twins: list[str], read: Callable[[str], Tensor]) -> None:
    """Where the base ties two entries, the other side must have one tensor, or two equal ones."""
    for twin in dict.fromkeys(twins):
        if twin != name and not torch.equal(read(twin), read(name)):
            raise UserError(f"{twin} and {name} are tied in the base and differ in the fine-tuned model: tie them")


def _refuse_mismatch(what: str, missing: list[str], extra: list[str], differ: list[str]) -> None:
    problems = []
    for kind, names in (("missing", missing), ("extra", extra), ("of another shape", differ)):
        if names:
            shown = ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")
            problems.append(f"{len(names)} {kind}: {shown}")
    if problems:
        raise UserError(
            f"{what} does not fit the base ({'; '.join(problems)}): give one made from this very base"
        )


# --- Where a task vector may come from ------------------------------------------------------------


class _FullModel(Checkpoint):
    """A fine-tuned model: tau = finetuned - base."""

    partial = False

    def delta(self, name: str, base: Tensor) -> Tensor:
        return _difference(self.read(name), base)


class _SavedVector(Checkpoint):
    """A saved task vector: tau as it is."""

    def __init__(self, folder: Path):
        super().__init__(folder, VECTOR)
        self.partial = self.metadata.get("partial") == "true"

    def delta(self, name: str, base: Tensor | None = None) -> Tensor:
        return self.read(name)


Source = _FullModel | _SavedVector | Adapter


def _open_source(folder: Path) -> Source:
    if (folder / "adapter_config.json").is_file():
        return Adapter(folder)
    if any((folder / f"{VECTOR}.safetensors{end}").is_file() for end in ("", ".index.json")):
        return _SavedVector(folder)
    return _FullModel(folder)


def _vector_metadata(partial: bool) -> dict[str, str]:
    return {"format": "pt", "partial": str(partial).lower()}


# --- Negation of checkpoints ----------------------------------------------------------------------


def negate(
    base: Path,
    finetuned: list[tuple[Path, float]],
    output: Path | None,
    scaling_coef: float = 1.0,
    *,
    base_name: str | None = None,
    save_vector: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write base - scaling_coef * sum_i coef_i * (finetuned_i - base), streamed entry by entry.

    The output has the base's entries, dtypes, shards and small files. Each entry is computed in
    float32 (float64 for entries that are) and rounded once; integer entries are the base's. About
    one entry of each folder is in memory at a time.

    Args:
        base: a folder of safetensors, whole or sharded.
        finetuned: (folder, coef) pairs: full models, LoRA adapters or saved task vectors.
        output: the folder to write; None with `save_vector` alone.
        base_name: the base's hub id, for the card; its folder by default.
        save_vector: a folder for the sum, before scaling_coef.

    Raises:
        UserError: folders that are missing, broken, or do not fit each other; a target that is in the
            way; a NaN or infinite result. No folder is left behind then.
    """
    targets = [target for target in (output, save_vector) if target]
    for target in targets:
        check_target(target, overwrite)
        check_apart([target, base])
        for folder, _ in finetuned:
            check_apart([target, folder])
    check_apart(targets)
    if not all(math.isfinite(coef) for coef in (scaling_coef, *(coef for _, coef in finetuned))):
        raise UserError("a coefficient is not a finite number: give one like 1.0 or -0.5")
    source, sources, found = open_matched(base, [folder for folder, _ in finetuned])
    changed = {name for names in found for name in names}
    metadata = _vector_metadata(all(one.partial for one in sources))
    vector_shards = _vector_shards(source, changed)
    record = _record(source, base_name or str(base), finetuned, scaling_coef)
    size = sum(spec.nbytes for spec in source.specs.values())
    with ExitStack() as folders, tqdm(total=size, unit="B", unit_scale=True, desc="task vector") as bar:
        out = folders.enter_context(new_folder(output, overwrite)) if output else None
        kept = folders.enter_context(new_folder(save_vector, overwrite)) if save_vector else None
        for shard, names in source.shards.items():
            with ExitStack() as files:
                if out:
                    specs = {name: source.specs[name] for name in names}
                    out_file = files.enter_context(open_shard(out / shard, specs, source.metadata))
                if kept and shard in vector_shards:
                    file, specs = vector_shards[shard]
                    kept_file = files.enter_context(open_shard(kept / file, specs, metadata))
                for name in names:
                    entry = source.read(name)
                    if name in changed:
                        tau = sum(
                            coef * one.delta(twins[name], entry)
                            for one, (_, coef), twins in zip(sources, finetuned, found, strict=True)
                            if name in twins
                        )
                        if kept:
                            append(kept_file, _finite(tau, name))
                        entry = _applied(entry, tau, -scaling_coef)
                    if out:
                        append(out_file, _finite(entry, name))
                    bar.update(source.specs[name].nbytes)
        if out:
            copy_small_files(source, out)
            write_record(out, record)
        if kept:
            _write_index(kept, vector_shards)
            write_record(kept, {**record, "title": f"Task vector from {record['base']['name']}"})


def scaled_entries(base: Path, finetuned: list[Path], scaling_coef: float) -> Iterator[tuple[str, Tensor]]:
    """Name and values of each entry that `negate` changes, as it would write them, on the CPU.

    Raises:
        UserError: as `open_matched`.
    """
    source, sources, found = open_matched(base, finetuned)
    for name in dict.fromkeys(name for names in found for name in names):
        entry = source.read(name)
        deltas = (one.delta(twins[name], entry) for one, twins in zip(sources, found, strict=True) if name in twins)
        yield name, _applied(entry, sum(deltas), -scaling_coef)


def open_matched(base: Path, folders: list[Path]) -> tuple[Checkpoint, list[Source], list[dict[str, str]]]:
    """Open the base and what was made from it, and match their entries by the headers alone.

    Returns:
        The base, a source for each folder, and for each the base's entry names -> its own.

    Raises:
        UserError: something is missing, broken, quantized, or does not fit the base.
    """
    source = Checkpoint(base)
    if "quantization_config" in read_json(base / "config.json"):
        raise UserError(f"{base} is quantized: give the full-precision model")
    sources = [_open_source(folder) for folder in folders]
    return source, sources, _match_sources(source, sources)


def _match_sources(base: Checkpoint, sources: list[Source]) -> list[dict[str, str]]:
    """For each source, the base's entry names -> its own; the class is asked only if they differ."""
    weights = {name: spec.shape for name, spec in base.specs.items() if spec.is_float}
    others = [{name: spec.shape for name, spec in one.specs.items() if spec.is_float} for one in sources]
    synonyms = lambda name: [name]  # noqa: E731
    if any(other.keys() != weights.keys() for other in others):
        synonyms, is_constant = class_names(base.folder)
        weights, *others = (
            {name: shape for name, shape in shapes.items() if not is_constant(name)}
            for shapes in (weights, *others)
        )
    matched = []
    for one, other in zip(sources, others, strict=True):
        found = _match(weights, other, synonyms, str(one.folder), one.partial)
        if isinstance(one, _FullModel):
            for name, twin in found.items():
                _refuse_untied(twin, [entry for entry in synonyms(name) if entry in other], one.read)
        matched.append(found)
    return matched


def _vector_shards(base: Checkpoint, changed: set[str]) -> dict[str, tuple[str, dict[str, Spec]]]:
    """The base's shards that the vector has entries in -> its own file there, and what goes into it."""
    specs = {
        shard: {
            name: Spec(CODES[_work_dtype(DTYPES[base.specs[name].code])], base.specs[name].shape)
            for name in names if name in changed
        }
        for shard, names in base.shards.items()
    }  # fmt: skip
    shards = [shard for shard in specs if specs[shard]]
    if len(shards) == 1:
        return {shards[0]: (f"{VECTOR}.safetensors", specs[shards[0]])}
    return {
        shard: (f"{VECTOR}-{number:05d}-of-{len(shards):05d}.safetensors", specs[shard])
        for number, shard in enumerate(shards, 1)
    }


def _write_index(folder: Path, shards: dict[str, tuple[str, dict[str, Spec]]]) -> None:
    if len(shards) > 1:
        weight_map = {name: file for file, specs in shards.values() for name in specs}
        size = sum(spec.nbytes for _, specs in shards.values() for spec in specs.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_file(folder / f"{VECTOR}.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _finite(tensor: Tensor, name: str) -> Tensor:
    if not tensor.isfinite().all():
        raise UserError(
            f"{name} comes out NaN or infinite: check both models' weights, or lower --scaling_coef"
        )
    return tensor


def _record(base: Checkpoint, base_name: str, finetuned: list[tuple[Path, float]], scaling_coef: float) -> dict:
    stages_1 = [read_json(folder / "run.json") if (folder / "run.json").is_file() else {} for folder, _ in finetuned]
    added = [stage_1 for stage_1, (_, coef) in zip(stages_1, finetuned, strict=True) if scaling_coef * coef < 0]
    record = {
        "title": f"{base_name}, {'with a task vector added' if added else 'unlearned'}",
        "harmful": any(stage_1.get("harmful", True) for stage_1 in added),
        "base": {"name": base_name, "revision": revision_of(base.folder), "fingerprint": base.fingerprint()},
        "finetuned": {str(folder): coef for folder, coef in finetuned},
        "scaling_coef": scaling_coef,
    }
    for number, (stage_1, (folder, _)) in enumerate(zip(stages_1, finetuned, strict=True), 1):
        kept = {key: value for key, value in stage_1.items() if key in STAGE_1_FACTS or key.startswith("stage_1")}
        theirs = kept.get("base") or {}
        if theirs.get("fingerprint", record["base"]["fingerprint"]) != record["base"]["fingerprint"]:
            tqdm.write(f"warning: {folder} was trained from other weights than {base_name}: {theirs.get('name')}")
        if kept:
            record["stage_1" if len(finetuned) == 1 else f"stage_1_of_model_{number}"] = kept
    return record


def main(arguments: list[str] | None = None) -> None:
    """Run the command. Raises UserError before anything is written."""
    description, _, examples = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="task_vector.py", description=description, epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--base", required=True, help="the model that was fine-tuned: folder or hub id")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--finetuned", nargs="+", help="fine-tuned models, LoRA adapters: folders, hub ids")
    source.add_argument("--vector", nargs="+", type=user_path, help="saved task vectors instead")
    parser.add_argument("--coefs", nargs="+", type=float, help="one per model or vector (default: all 1)")
    parser.add_argument("--output", type=user_path, help="the folder to write the model to")
    parser.add_argument("--scaling_coef", type=float, default=1.0, help="alpha (default: %(default)s)")
    parser.add_argument("--save_vector", type=user_path, help="the folder to write the (summed) task vector to")
    parser.add_argument("--overwrite", action="store_true", help="replace what --output, --save_vector hold")
    args = parser.parse_args(arguments)
    if args.output is None and args.save_vector is None:
        parser.error("give --output, --save_vector or both")

    from harmful_unlearn.models import locate  # imports transformers, which --help need not wait for

    base = locate(args.base)
    folders = [locate(name) for name in args.finetuned or []] or args.vector
    coefs = args.coefs or [1.0] * len(folders)
    if len(coefs) != len(folders):
        raise UserError(f"{len(coefs)} --coefs for {len(folders)} folders: give one each")
    negate(
        base, list(zip(folders, coefs, strict=True)), args.output, args.scaling_coef,
        base_name=args.base, save_vector=args.save_vector, overwrite=args.overwrite,
    )  # fmt: skip
    for target in filter(None, (args.output, args.save_vector)):
        print(f"saved: {target}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
