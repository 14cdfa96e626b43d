"""The flags of unlearn_harm_new.py that made a saved model, by its run.json."""

from pathlib import Path
from typing import Any

from harmful_unlearn.errors import UserError
from harmful_unlearn.storage.run_record import RunRecord

NOT_REPLAYED = {
    "model_save_dir", "task_vector_saving_path", "log_file", "saved_model", "stage", "save_every", "keep_checkpoints",
    "resume", "replay", "report_to", "check", "overwrite",
}  # fmt: skip


def folder_of(source: Path) -> Path:
    """The folder that --replay names, by itself or by its run.json."""
    return source.parent if source.name == "run.json" else source


def read_training(source: Path) -> tuple[RunRecord, RunRecord]:
    """The record of a model, and that of the one training behind it (the same for a stage 1 model).

    Raises:
        UserError: there is no such record, the training was not finished, or there are several.
    """
    if not folder_of(source).is_dir():
        raise UserError(f"there is no {folder_of(source)}: give the folder of a saved model")
    record = RunRecord.read(folder_of(source))
    if not record.trainings:
        raise UserError(f"no run.json in {folder_of(source)} records a training: give a folder of unlearn_harm_new.py")
    steps = record.trainings[0].training
    if steps.get("steps", 0) < steps.get("of", 0):
        raise UserError(f"{source} is a checkpoint, of step {steps['steps']} of {steps['of']}: replay a finished model")
    if len(record.trainings) > 1:
        sources = ", ".join(record.finetuned)
        raise UserError(f"{source} was made from several trainings ({sources}): replay each of them")
    return record, record.trainings[0]


def replayed_flags(source: Path) -> dict[str, Any]:
    """The flags of unlearn_harm_new.py that make a model again, with what "auto" and defaults came to then.

    Args:
        source: the model's folder, or its run.json.

    Raises:
        UserError: as `read_training`.
    """
    record, training = read_training(source)
    flags = {name: value for name, value in training.flags.items() if name not in NOT_REPLAYED}
    resolved, lora = training.training, training.training.get("lora")
    flags["precision"] = resolved.get("precision", flags.get("precision"))
    flags["template"] = resolved.get("template", "released")
    flags["system_prompt"] = resolved.get("system_prompt")
    flags["lora"] = "on" if lora else "off"
    for name in ("r", "alpha", "target_modules"):
        flags[f"lora_{name}"] = lora[name] if lora else None
    flags["harmful_revision"] = training.harmful_data.get("revision") or flags.get("harmful_revision")
    if record is training:
        flags["stage"] = "acquire"
    elif training.negates:
        (coef,) = record.finetuned.values()
        flags["scaling_coef"] = (record.scaling_coef or 0.0) * coef
    return {name: value for name, value in flags.items() if value not in (None, [])}
