"""Stage 2 on disk: write base - scaling_coef * sum_i coef_i * (finetuned_i - base), and the task vector itself."""

import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from harmful_unlearn.errors import UserError
from harmful_unlearn.negation.arithmetic import Negation, check_finite
from harmful_unlearn.negation.lora_adapter import LoraAdapter
from harmful_unlearn.negation.records import negation_records
from harmful_unlearn.negation.sources import WeightedFolders, open_matched, vector_metadata
from harmful_unlearn.storage.files import check_apart, check_target, new_folder, write_file
from harmful_unlearn.storage.lock import locked
from harmful_unlearn.storage.run_record import RunRecord
from harmful_unlearn.storage.safetensors_io import (
    VECTOR_STEM,
    SafetensorsFolder,
    ShardWriter,
    TensorSpec,
    copy_small_files,
    work_dtype,
)

Check = Callable[[RunRecord, Path], None]  # what a model's run.json will say, and the folder that is given for it


def negate(
    base: Path,
    finetuned: WeightedFolders,
    output: Path | None,
    *scaling_coefs: float,
    base_name: str | None = None,
    save_vector: Path | None = None,
    overwrite: bool = False,
    check: Check | None = None,
) -> None:
    """Write base - scaling_coef * sum_i coef_i * (finetuned_i - base), for every scaling_coef from one read.

    The output has the base's entries, dtypes, shards and small files; integer entries are the base's. Memory does
    not grow with the model: a few megabytes for each thread.

    Args:
        base: a model folder, its safetensors in one file or sharded.
        finetuned: (folder, coef) pairs: full models, LoRA adapters or saved task vectors.
        output: the folder to write; None to write only `save_vector`.
        scaling_coefs: 1 by default. Each of several has a folder of its own in `output`: alpha-0.5, alpha-1.
        base_name: the base's hub id, for the card; its folder by default.
        save_vector: a folder for the sum, before scaling_coef.
        check: called with each model's record before anything is written; it may raise.

    Raises:
        UserError: folders that are missing, broken, or do not fit each other; a target that cannot be written; a
            scaling_coef given twice; a NaN or infinite result. No folder is left behind then.
    """
    alphas = scaling_coefs or (1.0,)
    check_targets([output, save_vector], base, finetuned, overwrite)
    _check_numbers(alphas, finetuned)
    negation = Negation(base, finetuned)
    records = negation_records(negation.base, base_name or str(base), finetuned, alphas)
    for record in records.values():
        if check and output:
            check(record, output)
    with locked(*filter(None, [output, save_vector])), ExitStack() as folders:
        targets: list[tuple[float | None, ShardWriter]] = []  # alpha (None: tau itself), and where its values go
        if output:
            models = _alpha_folders(folders.enter_context(new_folder(output, overwrite)), alphas)
            specs = negation.base.specs
            shards = {file: {name: specs[name] for name in names} for file, names in negation.base.shards.items()}
            targets += [(alpha, ShardWriter(models[alpha], shards, negation.base.metadata)) for alpha in alphas]
        if save_vector:
            vector = folders.enter_context(new_folder(save_vector, overwrite))
            targets.append((None, _vector_writer(vector, negation)))
        _fill(negation, targets)
        if output:
            for alpha in alphas:
                copy_small_files(negation.base, models[alpha])
                fingerprint = SafetensorsFolder(models[alpha]).fingerprint()
                replace(records[alpha], fingerprint=fingerprint).write(models[alpha])
        if save_vector:
            replace(records[alphas[0]], title=f"Task vector from {base_name or base}").write(vector)


def negate_adapter(
    base: Path,
    finetuned: WeightedFolders,
    output: Path,
    *scaling_coefs: float,
    base_name: str | None = None,
    overwrite: bool = False,
    check: Check | None = None,
) -> None:
    """Write one LoRA adapter as an unlearning adapter: its B times -scaling_coef * coef, all else unchanged.

    On the untouched base it equals `negate`'s model. Only B is negated: with A negated, too, B @ A would not change.
    Args as `negate`; `finetuned` is one (adapter folder, coef) pair.

    Raises:
        UserError: as `negate`; several adapters, or something else than an adapter.
    """
    alphas = scaling_coefs or (1.0,)
    check_targets([output], base, finetuned, overwrite)
    _check_numbers(alphas, finetuned)
    if len(finetuned) != 1:
        raise UserError(
            f"{len(finetuned)} models do not make one adapter: give --output, or an --adapter_output for each"
        )
    ((folder, coef),) = finetuned
    base_model, (adapter,), _ = open_matched(base, [folder])
    if not isinstance(adapter, LoraAdapter):
        raise UserError(f"{folder} is not a LoRA adapter: give --output in place of --adapter_output")
    records = negation_records(base_model, base_name or str(base), finetuned, alphas)
    for record in records.values():
        if check:
            check(record, output)
    matrices = adapter.matrices
    with locked(output), new_folder(output, overwrite) as out:
        for alpha, target in _alpha_folders(out, alphas).items():
            writer = ShardWriter(target, {"adapter_model.safetensors": matrices.specs}, matrices.metadata)
            for name, spec in matrices.specs.items():
                entry = matrices.read(name)
                if ".lora_B." in name:
                    entry = (entry.to(work_dtype(spec.dtype)) * (-alpha * coef)).to(spec.dtype)
                writer.write(check_finite(entry, name), name)
            copy_small_files(matrices, target)
            fingerprint = SafetensorsFolder(target, "adapter_model").fingerprint()
            title = f"LoRA adapter for {records[alpha].title}"
            replace(records[alpha], title=title, fingerprint=fingerprint).write(target)


def check_targets(targets: Sequence[Path | None], base: Path, finetuned: WeightedFolders, overwrite: bool) -> None:
    """Raises UserError: a target cannot be written, or contains or is in another target or a folder that is read."""
    given = [target for target in targets if target]
    for target in given:
        check_target(target, overwrite)
        for folder in (base, *(folder for folder, _ in finetuned)):
            check_apart([target, folder])
    check_apart(given)


def _check_numbers(alphas: Sequence[float], finetuned: WeightedFolders) -> None:
    if not all(math.isfinite(number) for number in (*alphas, *(coef for _, coef in finetuned))):
        raise UserError("a coefficient is not a finite number: give one like 1.0 or -0.5")
    if len(set(alphas)) < len(alphas):
        raise UserError("a --scaling_coef is given twice: give each value once")


def _alpha_folders(output: Path, alphas: Sequence[float]) -> dict[float, Path]:
    """The folder for each alpha: `output` itself for a single one; else alpha-0.5, alpha-1, ... in it, created."""
    if len(alphas) == 1:
        return {alphas[0]: output}
    folders = {alpha: output / f"alpha-{float(alpha)!r}".removesuffix(".0") for alpha in alphas}
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    return folders


def _fill(negation: Negation, targets: list[tuple[float | None, ShardWriter]]) -> None:
    """Compute and write every entry, on as many threads as torch has; the first error stops all of them."""
    specs = negation.base.specs

    def write(task: tuple[str, slice]) -> int:
        name, span = task
        writers = [(alpha, writer) for alpha, writer in targets if name in writer]
        values = negation.values(name, span, [alpha for alpha, _ in writers])
        for (_, writer), chunk in zip(writers, values, strict=True):
            writer.write(chunk, name, span.start)
        return (span.stop - span.start) * specs[name].dtype.itemsize

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for each of ours
    pool = ThreadPoolExecutor(threads)
    size = sum(spec.nbytes for spec in specs.values())
    try:
        with tqdm(total=size, unit="B", unit_scale=True, desc="task vector") as bar:
            for names in negation.base.shards.values():  # shard by shard, so that the queue of tasks stays short
                for count in pool.map(write, ((name, span) for name in names for span in specs[name].chunks())):
                    bar.update(count)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _vector_writer(folder: Path, negation: Negation) -> ShardWriter:
    """The vector's files: one for each file of the base that has changed entries; several with an index."""
    base = negation.base
    specs = {name: TensorSpec(work_dtype(base.specs[name].dtype), base.specs[name].shape) for name in negation.changed}
    shards = [{name: specs[name] for name in names if name in specs} for names in base.shards.values()]
    shards = [shard for shard in shards if shard]
    files = {f"{VECTOR_STEM}-{n:05d}-of-{len(shards):05d}.safetensors": shard for n, shard in enumerate(shards, 1)}
    if len(shards) == 1:
        files = {f"{VECTOR_STEM}.safetensors": shards[0]}
    else:
        weight_map = {name: file for file, shard in files.items() for name in shard}
        index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs.values())}, "weight_map": weight_map}
        write_file(folder / f"{VECTOR_STEM}.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    return ShardWriter(folder, files, vector_metadata(partial=all(source.partial for source in negation.sources)))
