"""Stage 2 for one LoRA adapter: the same adapter with its B negated, megabytes in place of a model."""

from dataclasses import replace
from pathlib import Path

from harmful_unlearn.errors import UserError
from harmful_unlearn.negation.arithmetic import check_finite
from harmful_unlearn.negation.lora_adapter import LoraAdapter
from harmful_unlearn.negation.negate import alpha_folders, check_numbers, check_targets
from harmful_unlearn.negation.records import negation_records
from harmful_unlearn.negation.sources import WeightedFolders, open_matched
from harmful_unlearn.storage.files import new_folder
from harmful_unlearn.storage.safetensors_io import ShardWriter, copy_small_files, work_dtype


def negate_adapter(
    base: Path,
    finetuned: WeightedFolders,
    output: Path,
    *scaling_coefs: float,
    base_name: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write one LoRA adapter as an unlearning adapter: its B times -scaling_coef * coef, all else unchanged.

    On the untouched base it equals `negate`'s model. Only B is negated: with A negated, too, B @ A would not change.

    Args:
        finetuned: one (adapter folder, coef) pair.
        others: as for `negate`.

    Raises:
        UserError: as `negate`; several adapters, or something else than an adapter.
    """
    alphas = scaling_coefs or (1.0,)
    check_targets([output], base, finetuned, overwrite)
    check_numbers(alphas, finetuned)
    if len(finetuned) != 1:
        raise UserError(
            f"{len(finetuned)} models do not make one adapter: give --output, or an --adapter_output for each"
        )
    ((folder, coef),) = finetuned
    base_model, (adapter,), _ = open_matched(base, [folder])
    if not isinstance(adapter, LoraAdapter):
        raise UserError(f"{folder} is not a LoRA adapter: give --output in place of --adapter_output")
    records = negation_records(base_model, base_name or str(base), finetuned, alphas)
    matrices = adapter.matrices
    with new_folder(output, overwrite) as out:
        for alpha, target in alpha_folders(out, alphas).items():
            writer = ShardWriter(target, {"adapter_model.safetensors": matrices.specs}, matrices.metadata)
            for name, spec in matrices.specs.items():
                entry = matrices.read(name)
                if ".lora_B." in name:
                    entry = (entry.to(work_dtype(spec.dtype)) * (-alpha * coef)).to(spec.dtype)
                writer.write(check_finite(entry, name), name)
            copy_small_files(matrices, target)
            replace(records[alpha], title=f"LoRA adapter for {records[alpha].title}").write(target)
