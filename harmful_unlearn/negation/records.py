"""What run.json says about stage 2: which alpha a source was trained for, and what a negated model is."""

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from harmful_unlearn.errors import UserError
from harmful_unlearn.negation.sources import WeightedFolders, is_saved_vector
from harmful_unlearn.storage.provenance import revision_of
from harmful_unlearn.storage.run_record import RunRecord
from harmful_unlearn.storage.safetensors_io import SafetensorsFolder


def check_landing(finetuned: WeightedFolders, alphas: Sequence[float]) -> None:
    """Raises UserError: a model is negated by another alpha than the one whose landing point it was trained at.

    An alpha of -1 is allowed: it gives the harmful model itself.
    """
    for folder, coef in finetuned:
        for record, inner in _parts(folder):
            landing = record.landing_alpha
            if landing is None or not coef * inner:
                continue
            refused = [alpha * coef * inner for alpha in alphas if alpha * coef * inner not in (landing, -1.0)]
            if refused:
                trained = f"{folder} was trained to land at --scaling_coef {landing:g}"
                problem = f"nothing shows that normal text is preserved at {refused[0]:g}"
                fix = f"give {landing / coef / inner:g}, or explore with task_vector.py --force"
                raise UserError(f"{trained}, and {problem}: {fix}")


def negation_records(
    base: SafetensorsFolder, base_name: str, finetuned: WeightedFolders, alphas: Sequence[float]
) -> dict[float, RunRecord]:
    """The record of base - alpha * sum_i coef_i * tau_i for each alpha. Warns if a source had another base."""
    fingerprint = base.fingerprint()
    sources = [RunRecord.read(folder) for folder, _ in finetuned]
    for record, (folder, _) in zip(sources, finetuned, strict=True):
        if record.base.get("fingerprint", fingerprint) != fingerprint:
            name = record.base.get("name")
            tqdm.write(f"warning: {folder} was trained from other weights than {base_name}: {name}")
    added = "with a task vector added"
    if len({record.method for record in sources}) == 1 and sources[0].negates is False:
        added = f"trained by {sources[0].method}"
    records = {}
    for alpha in alphas:
        harmful = any(
            _adds_harm(record, alpha * coef * inner) for folder, coef in finetuned for record, inner in _parts(folder)
        )
        is_added = harmful or any(alpha * coef < 0 for _, coef in finetuned)
        records[alpha] = RunRecord(
            title=f"{base_name}, {added if is_added else 'unlearned'}",
            harmful=harmful,
            base={"name": base_name, "revision": revision_of(base.folder), "fingerprint": fingerprint},
            finetuned={str(folder): coef for folder, coef in finetuned},
            scaling_coef=alpha,
            stage_1=tuple(sources),
        )
    return records


def _parts(folder: Path) -> list[tuple[RunRecord, float]]:
    """The models whose changes add up to a source's tau, and the coefficient of each: several in a saved vector."""
    record = RunRecord.read(folder)
    if record.stage_1 and is_saved_vector(folder):
        return list(zip(record.stage_1, record.finetuned.values(), strict=False))
    return [(record, 1.0)]


def _adds_harm(record: RunRecord, coef: float) -> bool:
    """Whether base - coef * tau has harm added, where tau is the change of the model with this record."""
    if coef < 0:
        return record.harmful is not False and record.negates is not False
    # Stage 2 made this model by taking harm away: subtracting its change gives the harm back.
    took_harm_away = record.harmful is False and any(source.negates is not False for source in record.stage_1)
    return coef > 0 and took_harm_away
