"""Which stages run: by the flags, and, of a run that is resumed, by what an earlier run left."""

import json
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import NamedTuple

from harmful_unlearn.errors import UserError
from harmful_unlearn.storage.files import ROOT, check_file, check_target, resolved
from harmful_unlearn.storage.lock import locked
from harmful_unlearn.storage.run_record import RunRecord
from harmful_unlearn.storage.safetensors_io import SafetensorsFolder
from harmful_unlearn.training.checkpointing import TrainingCheckpoints, check_complete
from harmful_unlearn.training.flags import AUTO, TrainingSettings, parse_flags
from harmful_unlearn.training.run_log import METRICS, PICTURE, beside

# Flags that may change when a run is resumed. So may scaling_coef, unless a loss is computed at the landing point.
FREE_FLAGS = {
    "model_save_dir", "saved_model", "log_file", "task_vector_saving_path", "stage", "gradient_checkpointing",
    "device_map", "max_kl", "check", "overwrite", "save_every", "keep_checkpoints", "resume", "replay", "report_to",
}  # fmt: skip
# Flags that are compared by what they resolved to: the data that was read, the pairs of a step, the adapter, ...
RESOLVED_FLAGS = {
    "model_name", "harmful_dataset", "harmful_revision", "harmful_split", "normal_dataset", "more_normal_dataset",
    "batch_size", "precision", "lora", "lora_r", "lora_alpha", "lora_target_modules", "max_length", "template",
    "system_prompt",
}  # fmt: skip


def check_stages(settings: TrainingSettings) -> frozenset[str]:
    """Which stages the flags ask for ("acquire", "negate"). Raises UserError: a folder cannot be read or written."""
    stages = {"acquire", "negate"} if settings.stage == "all" else {settings.stage}
    if settings.saved_model:
        if settings.stage == "acquire":
            raise UserError("--saved_model is where stage 2 starts: leave out --stage acquire")
        stages = {"negate"}
    if "acquire" in stages and not settings.resume:
        check_target(settings.model_save_dir, settings.overwrite, "--model_save_dir")
        newest = TrainingCheckpoints(settings.model_save_dir, settings.keep_checkpoints).newest()
        if newest and not settings.overwrite:
            with locked(settings.model_save_dir):  # says if that run is still going on
                pass
            raise UserError(f"{newest} is an earlier run's: --resume continues it, --overwrite starts again")
    if "negate" in stages:
        harmful = settings.harmful_model
        if "acquire" not in stages:
            if not harmful.is_dir():
                raise UserError(f"there is no stage 1 model in {harmful}: run stage 1, or give --saved_model")
            method = RunRecord.read(harmful).method
            if method not in (None, settings.method):
                raise UserError(f"{harmful} was trained by --method {method}: give that, not {settings.method}")
        if not settings.resume:
            check_target(settings.task_vector_saving_path, settings.overwrite, "--task_vector_saving_path")
    if log_file := settings.log_file or (None if settings.resume else ROOT / "logs" / "a run's" / "run.log"):
        for file in (log_file, beside(log_file, METRICS), beside(log_file, PICTURE)):
            check_file(file)
        for folder in (settings.model_save_dir, settings.task_vector_saving_path):
            if resolved(log_file).is_relative_to(resolved(folder)):
                raise UserError(f"--log_file {log_file} is in {folder}, which must be empty: put it elsewhere")
    return frozenset(stages)


class RemainingWork(NamedTuple):
    """What a resumed run still has to do.

    Attributes:
        stages: that still have to run.
        checkpoint: that stage 1 continues from; None for the first step.
        log_file: of the run that is resumed, if it is to be continued, too.
        notes: what the log should say.
    """

    stages: frozenset[str]
    checkpoint: Path | None = None
    log_file: Path | None = None
    notes: tuple[str, ...] = ()


def remaining_work(
    settings: TrainingSettings, record: RunRecord | None, base_folder: Path, stages: frozenset[str]
) -> RemainingWork:
    """What is left of a run that --resume continues. With --overwrite, another run's results are replaced.

    Args:
        record: of stage 1, as it would be written now; None if the flags do not ask for stage 1.

    Raises:
        UserError: what is there belongs to another run.
    """
    work = RemainingWork(stages)
    if record:
        work = _remaining_stage_1(settings, record, stages)
    if "negate" not in stages:
        return work
    fingerprint = SafetensorsFolder(base_folder).fingerprint()
    if "acquire" not in work.stages and _is_negated(settings, fingerprint):
        return RemainingWork(work.stages - {"negate"}, log_file=work.log_file, notes=work.notes)
    check_target(settings.task_vector_saving_path, settings.overwrite, "--task_vector_saving_path")
    return work


def _remaining_stage_1(settings: TrainingSettings, record: RunRecord, stages: frozenset[str]) -> RemainingWork:
    checkpoints = TrainingCheckpoints(settings.model_save_dir, settings.keep_checkpoints)
    automatic = settings.resume == AUTO
    checkpoint = checkpoints.newest() if automatic else Path(settings.resume or "")
    # A finished model next to a checkpoint belongs to this run, unless --overwrite was given: then it may be left over
    # from an earlier one.
    is_trained = automatic and (settings.model_save_dir / "run.json").is_file()
    if is_trained and not (settings.overwrite and checkpoint):
        try:
            earlier = RunRecord.read(settings.model_save_dir)
            notes = check_same_run(earlier, record, settings.model_save_dir)
            return RemainingWork(stages - {"acquire"}, log_file=_log_of(earlier), notes=tuple(notes))
        except UserError:
            if not settings.overwrite:
                raise
        check_target(settings.model_save_dir, settings.overwrite, "--model_save_dir")
        return RemainingWork(stages)
    notes = []
    if checkpoint:
        check_complete(checkpoint)
    for step in checkpoints.steps() if automatic else ():
        if checkpoints.at(step) == checkpoint:
            break
        notes.append(f"{checkpoints.at(step)} is not complete, and is not used")
    earlier = RunRecord()
    if checkpoint:
        earlier = RunRecord.read(checkpoint)
        notes += check_same_run(earlier, record, checkpoint)
    check_target(settings.model_save_dir, settings.overwrite, "--model_save_dir")
    log_file = _log_of(earlier) if automatic else None  # a checkpoint from elsewhere may name any file
    return RemainingWork(stages, checkpoint, log_file, tuple(notes))


def _log_of(record: RunRecord) -> Path | None:
    log_file = record.flags.get("log_file")
    return Path(log_file) if log_file else None


def _is_negated(settings: TrainingSettings, fingerprint: str) -> bool:
    """Whether the unlearned model is there already, made from this base and this stage 1 model.

    Raises:
        UserError: another model is there (without --overwrite).
    """
    target, harmful = settings.task_vector_saving_path, settings.harmful_model
    if not (target / "run.json").is_file():
        return False
    there, stage_1 = RunRecord.read(target), RunRecord.read(harmful)
    sources = [Path(name).resolve() for name in there.finetuned]
    alpha = settings.scaling_coef if settings.negates else -1.0
    same_folders = (there.scaling_coef, there.base.get("fingerprint"), sources) == (
        alpha, fingerprint, [harmful.resolve()],
    )  # fmt: skip
    source = there.stage_1[0] if there.stage_1 else RunRecord()
    # The stage 1 model may have been replaced since.
    if same_folders and (source.training, source.losses_at_the_end) == (stage_1.training, stage_1.losses_at_the_end):
        return True
    if settings.overwrite:
        return False
    names = ", ".join(map(str, sources)) + (" as it was before" if same_folders else "")
    raise UserError(
        f"{target} holds another model ({names} by {there.scaling_coef}): give another --task_vector_saving_path, or "
        "add --overwrite"
    )


def result_settings(record: RunRecord, lands: bool) -> dict[str, object]:
    """Every setting that affects the stage 1 weights, by flag name.

    Args:
        lands: whether a loss is computed at the landing point, so that alpha matters.
    """
    flags, training = record.flags, record.training
    free = FREE_FLAGS | RESOLVED_FLAGS | (set() if lands else {"scaling_coef"})
    settings = {f"--{name}": value for name, value in flags.items() if name not in free}
    settings["--batch_size times the number of processes"] = flags["batch_size"] * training["processes"]
    settings["--max_length"] = training["max_length"]
    settings["--precision"] = training["precision"]
    settings["LoRA"] = training["lora"] and json.dumps(training["lora"])
    settings["template"] = record.prompt_template
    settings["base model (--model_name)"] = record.base["fingerprint"][:12]
    settings |= {f"the base's {name}": sha256[:12] for name, sha256 in record.base["files"].items()}
    more = record.normal_data.get("more", {})
    sources = {
        "harmful data (--harmful_dataset)": record.harmful_data,
        "normal data (--normal_dataset)": record.normal_data,
        "more normal data (--more_normal_dataset)": more,
    }
    for name, source in sources.items():
        sha256 = source.get("sha256")
        settings[name] = sha256[:12] if sha256 else f"{source.get('revision')} {source.get('split')}"
    return settings


def changed_settings(earlier: RunRecord, now: RunRecord, folder: Path) -> list[str]:
    """The settings that affect the result and have changed since. Args and raises as `check_same_run`."""
    lands = now.landing_alpha is not None
    # A flag that is younger than the record had its default.
    earlier = replace(earlier, flags={**parse_flags([]).to_json(), **earlier.flags})
    try:
        before = result_settings(earlier, lands)
    except (KeyError, TypeError):
        raise UserError(f"{folder} was not written by this version: start again, with --overwrite") from None
    after = result_settings(now, lands)
    return [
        f"{name} was {before.get(name)} and is {after.get(name)} now"
        for name in dict.fromkeys([*before, *after])
        if json.dumps(before.get(name)) != json.dumps(after.get(name))
    ]


def check_same_run(earlier: RunRecord, now: RunRecord, folder: Path) -> list[str]:
    """What has changed since a run was started, for the log, if none of it affects the result.

    Args:
        earlier, now: the run's record as it was started, and as it would continue.
        folder: of the earlier record, for messages.

    Raises:
        UserError: a change affects the result.
    """
    if changed := changed_settings(earlier, now, folder):
        raise UserError(
            f"{folder} is another run's ({'; '.join(changed)}): give what it had, or start again with --overwrite"
        )
    after = result_settings(now, now.landing_alpha is not None)
    silent = {"resume", "check", "overwrite"}
    return [
        f"--{name} was {earlier.flags.get(name)} and is {value} now"
        for name, value in now.flags.items()
        if name not in silent
        and f"--{name}" not in after
        and name not in RESOLVED_FLAGS
        and json.dumps(value) != json.dumps(earlier.flags.get(name))
    ]


def free_folder(folder: Path) -> Path:
    """The folder, or a new name beside it if something else has filled it in the meantime."""
    if not folder.exists() or not any(folder.iterdir()):
        return folder
    names = (folder.with_name(f"{folder.name}.new" + (f"-{n}" if n > 1 else "")) for n in count(1))
    return next(name for name in names if not name.exists())
