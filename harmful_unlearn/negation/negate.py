"""Stage 2 on disk: a base's checkpoint minus task vectors, a stretch of an entry at a time, at one or more scales.

unlearned = base - scaling_coef * sum_i coef_i * (finetuned_i - base)
"""

import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from harmful_unlearn.errors import UserError
from harmful_unlearn.negation.sources import open_matched, vector_metadata
from harmful_unlearn.storage.files import check_apart, check_target, new_folder, write_file
from harmful_unlearn.storage.provenance import revision_of
from harmful_unlearn.storage.run_record import RunRecord
from harmful_unlearn.storage.safetensors_io import (
    DTYPE_CODES,
    VECTOR_STEM,
    Buffers,
    SafetensorsFolder,
    ShardWriter,
    TensorSpec,
    all_finite,
    copy_small_files,
    work_dtype,
)

STAGE_1_FACTS = ("base", "finetuned", "harmful_data", "normal_data", "training", "losses_at_the_end", "flags")
Terms = list[tuple[Path, float]]


class Negation:
    """base - alpha * tau with tau = sum_i coef_i * (finetuned_i - base), for any stretch of any entry.

    Computed in float32 (float64 for entries that are) and rounded once. Threads may share one.

    Args:
        finetuned: (folder, coef) pairs: full models, LoRA adapters or saved task vectors.

    Attributes:
        base: the base's checkpoint.
        changed: the entries that tau has; others are the base's.

    Raises:
        UserError: as `open_matched`.
    """

    def __init__(self, base: Path, finetuned: Terms):
        self.base, self.sources, self._found = open_matched(base, [folder for folder, _ in finetuned])
        self._coefs = [coef for _, coef in finetuned]
        self.changed = {name for names in self._found for name in names}
        if not self.changed:
            raise UserError(
                f"no number of {base} is changed by {', '.join(str(one.folder) for one in self.sources)}: "
                "give models with weights"
            )
        self._buffers = Buffers()

    def tau(self, name: str, span: slice, base: Tensor) -> Tensor:
        """Elements `span` of the flattened entry of tau; `base` holds the base's, in float32 or float64."""
        tau = None
        for source, coef, twins in zip(self.sources, self._coefs, self._found, strict=True):
            if name in twins:
                out = self._buffers("tau" if tau is None else "delta", base.numel(), base.dtype)
                delta = source.delta(twins[name], span, base, out)
                delta = delta.mul_(coef) if coef != 1 else delta
                tau = delta if tau is None else tau.add_(delta)
        return tau

    def values(self, name: str, span: slice, alphas: Sequence[float | None]) -> Iterator[Tensor]:
        """Elements `span` of the flattened entry at each alpha, or of tau where that is None.

        Each is overwritten by the next.

        Raises:
            UserError: one is NaN or infinite; a file has become shorter.
        """
        spec, size = self.base.specs[name], span.stop - span.start
        stored = self.base.read_into(self._buffers("stored", size, spec.dtype), name, span.start)
        if name not in self.changed:
            yield from (_finite(stored, name) for _ in alphas)
            return
        work = work_dtype(spec.dtype)
        base = self._buffers("base", size, work).copy_(stored)
        tau = self.tau(name, span, base)
        value = self._buffers("value", size, work)
        for alpha in alphas:
            if alpha is None:
                yield _finite(tau, name)
                continue
            scaled = tau if alpha == 1 else torch.mul(tau, alpha, out=value)
            torch.sub(base, scaled, out=value)  # not sub(alpha=): fused, it would round otherwise than TaskVector
            yield _finite(stored.copy_(value), name)


def scaled_entries(base: Path, finetuned: list[Path], scaling_coef: float) -> Iterator[tuple[str, Tensor]]:
    """Name and values of each entry that `negate` changes, as it would write them, on the CPU.

    Raises:
        UserError: as `Negation`; a value is NaN or infinite.
    """
    negation = Negation(base, [(folder, 1.0) for folder in finetuned])
    for name in filter(negation.changed.__contains__, negation.base.specs):
        spec = negation.base.specs[name]
        entry = torch.empty(spec.shape, dtype=spec.dtype)
        for span in spec.chunks():
            (entry.view(-1)[span],) = negation.values(name, span, [scaling_coef])
        yield name, entry


def negate(
    base: Path,
    finetuned: Terms,
    output: Path | None,
    *scaling_coefs: float,
    base_name: str | None = None,
    save_vector: Path | None = None,
    overwrite: bool = False,
    force: bool = False,
) -> None:
    """Write base - scaling_coef * sum_i coef_i * (finetuned_i - base), at every scale from one read.

    The output has the base's entries, dtypes, shards and small files; integer entries are the base's. A few
    megabytes for each thread are in memory.

    Args:
        base: a folder of safetensors, whole or sharded.
        finetuned: (folder, coef) pairs: full models, LoRA adapters or saved task vectors.
        output: the folder to write; None with `save_vector` alone.
        scaling_coefs: 1 by default. Of several, each has a folder of its own in `output`: alpha-0.5, alpha-1.
        base_name: the base's hub id, for the card; its folder by default.
        save_vector: a folder for the sum, before scaling_coef.
        force: take a model that was trained for one scaling_coef at another.

    Raises:
        UserError: folders that are missing, broken, or do not fit each other; a target that is in the
            way; a scale given twice, or one that a model was not trained for; a NaN or infinite result.
            No folder is left behind then.
    """
    alphas = scaling_coefs or (1.0,)
    if output and not force:
        check_landing(finetuned, alphas)
    check_targets([output, save_vector], base, finetuned, overwrite)
    _check_numbers(alphas, finetuned)
    negation = Negation(base, finetuned)
    records = _records(negation.base, base_name or str(base), finetuned, alphas)
    with ExitStack() as folders:
        targets: list[tuple[float | None, ShardWriter]] = []  # what each alpha's values, or tau's, are written to
        if output:
            out = folders.enter_context(new_folder(output, overwrite))
            shards = {
                shard: {name: negation.base.specs[name] for name in names}
                for shard, names in negation.base.shards.items()
            }
            for alpha, folder in _folders(out, alphas).items():
                targets.append((alpha, ShardWriter(folder, shards, negation.base.metadata)))
        if save_vector:
            kept = folders.enter_context(new_folder(save_vector, overwrite))
            vector_shards, partial = _vector_shards(negation), all(one.partial for one in negation.sources)
            targets.append((None, ShardWriter(kept, vector_shards, vector_metadata(partial))))
        _fill(negation, targets)
        if output:
            for alpha, folder in _folders(out, alphas).items():
                copy_small_files(negation.base, folder)
                records[alpha].write(folder)
        if save_vector:
            _write_index(kept, vector_shards)
            replace(records[alphas[0]], title=f"Task vector from {base_name or base}").write(kept)


def _fill(negation: Negation, targets: list[tuple[float | None, ShardWriter]]) -> None:
    """Compute and write every entry, several stretches at once; the first error stops all threads."""
    specs = negation.base.specs

    def write(task: tuple[str, slice]) -> int:
        name, span = task
        wanted = [(alpha, shards) for alpha, shards in targets if name in shards]
        values = negation.values(name, span, [alpha for alpha, _ in wanted])
        for (_, shards), stretch in zip(wanted, values, strict=True):
            shards.write(stretch, name, span.start)
        return (span.stop - span.start) * specs[name].dtype.itemsize

    size = sum(spec.nbytes for spec in specs.values())
    with tqdm(total=size, unit="B", unit_scale=True, desc="task vector") as bar, _threads() as pool:
        for names in negation.base.shards.values():  # shard by shard, so that few tasks wait
            for count in pool.map(write, ((name, span) for name in names for span in specs[name].chunks())):
                bar.update(count)


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """As many workers as torch has threads, each of which computes alone. What is left is cancelled on an error."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def negate_adapter(
    base: Path,
    finetuned: Terms,
    output: Path,
    *scaling_coefs: float,
    base_name: str | None = None,
    overwrite: bool = False,
    force: bool = False,
) -> None:
    """Write one LoRA adapter as an unlearning adapter: its B times -scaling_coef * coef, all else as it is.

    On the untouched base it equals `negate`'s model. B alone is negated: with A negated, too, nothing would be.

    Args:
        finetuned: one (adapter folder, coef) pair.
        others: as for `negate`.

    Raises:
        UserError: as `negate`; another number of adapters than one, or something else than an adapter.
    """
    alphas = scaling_coefs or (1.0,)
    if not force:
        check_landing(finetuned, alphas)
    check_targets([output], base, finetuned, overwrite)
    _check_numbers(alphas, finetuned)
    if len(finetuned) != 1:
        raise UserError(f"{len(finetuned)} models make no one adapter: give --output, or an --adapter_output for each")
    ((adapter, coef),) = finetuned
    if not (adapter / "adapter_config.json").is_file():
        raise UserError(f"{adapter} is no LoRA adapter: give --output in place of --adapter_output")
    checkpoint, (source,), _ = open_matched(base, [adapter])
    signs = dict.fromkeys((*alphas, *(-alpha for alpha in alphas)))
    records = _records(checkpoint, base_name or str(base), finetuned, list(signs))
    with new_folder(output, overwrite) as out:
        for alpha, folder in _folders(out, alphas).items():
            shards = ShardWriter(folder, {"adapter_model.safetensors": source.file.specs}, source.file.metadata)
            for name, spec in source.file.specs.items():
                entry = source.file.read(name)
                if ".lora_B." in name:
                    entry = (entry.to(work_dtype(spec.dtype)) * (-alpha * coef)).to(spec.dtype)
                shards.write(_finite(entry, name), name)
            copy_small_files(source.file, folder)
            title, turned = f"LoRA adapter for {records[alpha].title}", records[-alpha].harmful
            replace(records[alpha], title=title, more={"harmful_if_subtracted": turned}).write(folder)


def check_targets(targets: list[Path | None], base: Path, finetuned: Terms, overwrite: bool) -> None:
    """Raises UserError: a folder to write cannot be written, or is mixed up with another or with what is read."""
    given = [target for target in targets if target]
    for target in given:
        check_target(target, overwrite)
        for folder in (base, *(folder for folder, _ in finetuned)):
            check_apart([target, folder])
    check_apart(given)


def check_landing(finetuned: Terms, alphas: Sequence[float]) -> None:
    """Raises UserError where a model that was trained to land at one scaling_coef is negated by another."""
    for folder, coef in finetuned:
        for landing, inner in _landings(folder):
            # Adding it back, by -1, gives the stage 1 model itself.
            others = [alpha * coef * inner for alpha in alphas if alpha * coef * inner not in (landing, -1.0)]
            if others:
                raise UserError(
                    f"{folder} was trained to land at --scaling_coef {landing:g}, and at {others[0]:g} nothing says "
                    f"that normal text is preserved: give {landing / coef / inner:g}, or explore with "
                    "task_vector.py --force"
                )


def _landings(folder: Path) -> Iterator[tuple[float, float]]:
    """What a stage 1 model, or the models in a saved vector, were trained for, and their coefficients in it."""
    record = RunRecord.read(folder)
    terms = [(record, 1.0)]
    if any(folder.glob(f"{VECTOR_STEM}*.safetensors")):
        terms = list(zip(record.stage_1, record.finetuned.values(), strict=False))
    for stage_1, coef in terms:
        if stage_1.landing_alpha is not None and coef:
            yield stage_1.landing_alpha, coef


def _check_numbers(alphas: Sequence[float], finetuned: Terms) -> None:
    if not all(math.isfinite(number) for number in (*alphas, *(coef for _, coef in finetuned))):
        raise UserError("a coefficient is not a finite number: give one like 1.0 or -0.5")
    if len(set(alphas)) < len(alphas):
        raise UserError("a --scaling_coef is given twice: give each scale once")


def _folders(out: Path, alphas: Sequence[float]) -> dict[float, Path]:
    """The folder of each scale: `out` itself for one, alpha-0.5, alpha-1, ... in it for several."""
    if len(alphas) == 1:
        return {alphas[0]: out}
    folders = {alpha: out / f"alpha-{float(alpha)!r}".removesuffix(".0") for alpha in alphas}
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    return folders


def _vector_shards(negation: Negation) -> dict[str, dict[str, TensorSpec]]:
    """The vector's own files, one for each of the base's that has changed entries, and what goes into them."""
    base, shards = negation.base, []
    for names in base.shards.values():
        specs = {name: base.specs[name] for name in names if name in negation.changed}
        if specs:
            shards.append(
                {name: TensorSpec(DTYPE_CODES[work_dtype(spec.dtype)], spec.shape) for name, spec in specs.items()}
            )
    if len(shards) == 1:
        return {f"{VECTOR_STEM}.safetensors": shards[0]}
    return {
        f"{VECTOR_STEM}-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, 1)
    }


def _write_index(folder: Path, shards: dict[str, dict[str, TensorSpec]]) -> None:
    if len(shards) > 1:
        weight_map = {name: file for file, specs in shards.items() for name in specs}
        size = sum(spec.nbytes for specs in shards.values() for spec in specs.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_file(folder / f"{VECTOR_STEM}.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _finite(values: Tensor, name: str) -> Tensor:
    if not all_finite(values):
        raise UserError(f"{name} comes out NaN or infinite: check both models' weights, or lower --scaling_coef")
    return values


def _records(
    base: SafetensorsFolder, base_name: str, finetuned: Terms, alphas: Sequence[float]
) -> dict[float, RunRecord]:
    """What run.json says of the model at each alpha."""
    fingerprint = base.fingerprint()
    stage_1 = [RunRecord.read(folder) for folder, _ in finetuned]
    for record, (folder, _) in zip(stage_1, finetuned, strict=True):
        if record.base.get("fingerprint", fingerprint) != fingerprint:
            name = record.base.get("name")
            tqdm.write(f"warning: {folder} was trained from other weights than {base_name}: {name}")
    methods = {record.method for record in stage_1}
    trained = None  # and not negated
    if len(methods) == 1 and stage_1[0].negates is False:
        trained = f"trained by {stage_1[0].method}"
    records = {}
    for alpha in alphas:
        coefs = [alpha * coef for _, coef in finetuned]
        added = [record.harmful is not False for record, coef in zip(stage_1, coefs, strict=True) if coef < 0]
        turned = [  # an unlearning adapter, subtracted
            bool(record.more.get("harmful_if_subtracted"))
            for record, coef in zip(stage_1, coefs, strict=True)
            if coef > 0
        ]
        outcome = (trained or "with a task vector added") if added else "unlearned"
        records[alpha] = RunRecord(
            title=f"{base_name}, {outcome}",
            harmful=any(added + turned),
            base={"name": base_name, "revision": revision_of(base.folder), "fingerprint": fingerprint},
            finetuned={str(folder): coef for folder, coef in finetuned},
            scaling_coef=alpha,
            stage_1=tuple(stage_1),
        )
    return records
