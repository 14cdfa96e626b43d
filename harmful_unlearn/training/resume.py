"""Which stages run: by the flags, and, of a run that is resumed, by what is there already."""

import json
from argparse import Namespace
from itertools import count
from pathlib import Path

from harmful_unlearn.errors import UserError
from harmful_unlearn.losses.methods import METHODS, uses_landing_point
from harmful_unlearn.storage.files import ROOT, check_file, check_target, resolved
from harmful_unlearn.storage.run_record import RunRecord
from harmful_unlearn.storage.safetensors_io import SafetensorsFolder
from harmful_unlearn.training.checkpointing import TrainingCheckpoints, check_complete
from harmful_unlearn.training.distributed import is_main_process
from harmful_unlearn.training.flags import AUTO
from harmful_unlearn.training.run_log import METRICS, PICTURE, RunLog, beside

# Flags that may change when a run goes on. scaling_coef is among them unless a loss is taken at the landing point.
FREE_FLAGS = {
    "model_save_dir", "saved_model", "log_file", "task_vector_saving_path", "stage", "gradient_checkpointing",
    "device_map", "check", "overwrite", "save_every", "keep_checkpoints", "resume", "report_to",
}  # fmt: skip
# Flags whose outcome is compared in their place: what was read, how many pairs a step, which adapter.
RESOLVED_FLAGS = {
    "model_name", "harmful_dataset", "harmful_revision", "harmful_split", "normal_dataset", "batch_size", "precision",
    "lora", "lora_r", "lora_alpha", "lora_target_modules", "max_length",
}  # fmt: skip


def result_settings(record: dict, lands: bool) -> dict[str, object]:
    """All that decides a stage 1 run's weights, by the name that a user knows it by.

    Args:
        record: of a run (run.json).
        lands: whether a loss is taken at the landing point.
    """
    flags, training = record["flags"], record["training"]
    free = FREE_FLAGS | RESOLVED_FLAGS | (set() if lands else {"scaling_coef"})
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
        before = result_settings(then, lands)
    except (KeyError, TypeError):
        raise UserError(f"{where} was not written by this version: start again with --overwrite") from None
    after = result_settings(now, lands)
    changed = [
        f"{name} was {before.get(name)} and is {after.get(name)} now"
        for name in dict.fromkeys([*before, *after])
        if json.dumps(before.get(name)) != json.dumps(after.get(name))
    ]
    if changed:
        what = "; ".join(changed)
        raise UserError(f"{where} is another run's ({what}): give what it had, or start again with --overwrite")
    quiet = {"resume", "check", "overwrite"}
    return [
        f"--{name} was {then['flags'].get(name)} and is {value} now"
        for name, value in now["flags"].items()
        if name not in quiet
        and f"--{name}" not in after
        and name not in RESOLVED_FLAGS
        and json.dumps(value) != json.dumps(then["flags"].get(name))
    ]


def check_stages(args: Namespace) -> set[str]:
    """Which stages will run, and whether their folders can be read and written. Raises UserError."""
    stages = {"acquire", "negate"} if args.stage == "all" else {args.stage}
    if args.saved_model:
        if args.stage == "acquire":
            raise UserError("--saved_model is the start of stage 2: leave out --stage acquire")
        stages = {"negate"}
    if "acquire" in stages and not args.resume:
        check_target(args.model_save_dir, args.overwrite)
        found = TrainingCheckpoints(args.model_save_dir, args.keep_checkpoints).newest()
        if found and not args.overwrite:
            raise UserError(f"{found} is an earlier run's: --resume goes on with it, --overwrite starts again")
    if "negate" in stages:
        finetuned = args.saved_model or args.model_save_dir
        if "acquire" not in stages:
            if not finetuned.is_dir():
                raise UserError(f"there is no stage 1 model in {finetuned}: run stage 1, or give --saved_model")
            trained_by = RunRecord.read(finetuned).method
            if trained_by not in (None, args.method):
                raise UserError(f"{finetuned} was trained by --method {trained_by}: give that, not {args.method}")
        if not args.resume:
            check_target(args.task_vector_saving_path, args.overwrite)
    if log_file := args.log_file or (None if args.resume else ROOT / "logs" / "a run's" / "run.log"):
        for file in (log_file, beside(log_file, METRICS), beside(log_file, PICTURE)):
            check_file(file)
        for folder in (args.model_save_dir, args.task_vector_saving_path):
            if resolved(log_file).is_relative_to(resolved(folder)):
                raise UserError(f"--log_file {log_file} lies in {folder}, which must be empty: put it elsewhere")
    return stages


def remaining_work(
    args: Namespace, now: dict | None, base_folder: Path, stages: set[str], checkpoints: TrainingCheckpoints
) -> tuple[set[str], Path | None, list[str]]:
    """The stages that a resumed run still has to run; the checkpoint that stage 1 goes on from, if any; what to note.

    With --overwrite, what an earlier run left is replaced rather than refused.

    Args:
        now: stage 1's record (run.json) as the flags have it; None where it is not asked for.

    Raises:
        UserError: what is there belongs to another run.
    """
    finetuned = args.saved_model or args.model_save_dir
    resumed, notes = None, []
    if now:
        auto = args.resume == AUTO
        resumed = checkpoints.newest() if auto else args.resume
        # Beside a checkpoint a whole model is its own run's, just saved; with --overwrite it may be an earlier one's.
        whole = auto and (finetuned / "run.json").is_file() and not (args.overwrite and resumed)
        if whole:
            resumed = None
        elif resumed:
            check_complete(resumed)
        for step in checkpoints.steps() if auto and not whole else ():
            if checkpoints.at(step) == resumed:
                break
            notes.append(f"{checkpoints.at(step)} is not whole, and left out")
        found = finetuned if whole else resumed
        try:
            then = read_record(found) if found else {}
            notes += check_same_run(then, now, uses_landing_point(vars(args)), found) if found else []
        except UserError:
            if not (whole and args.overwrite):
                raise
            whole, then = False, {}
        if not whole:
            check_target(finetuned, args.overwrite)
        logged = then.get("flags", {}).get("log_file")
        if logged and auto:  # a checkpoint from elsewhere may name any file
            args.log_file = args.log_file or Path(logged)
        stages = stages - {"acquire"} if whole else stages
    if "negate" in stages:
        scale = args.scaling_coef if METHODS[args.method].negates else -1.0
        fingerprint = SafetensorsFolder(base_folder).fingerprint()
        if "acquire" not in stages and is_done(
            args.task_vector_saving_path, finetuned, scale, fingerprint, args.overwrite
        ):
            return stages - {"negate"}, None, notes
        check_target(args.task_vector_saving_path, args.overwrite)
    return stages, resumed, notes


def is_done(target: Path, finetuned: Path, scaling_coef: float, fingerprint: str, overwrite: bool) -> bool:
    """Whether the unlearned model is there already, made from that base and that copy.

    Raises:
        UserError: another one is (without `overwrite`).
    """
    if not (target / "run.json").is_file():
        return False
    found, copy = read_record(target), read_record(finetuned)
    of_base = (found.get("base") or {}).get("fingerprint")
    made_from = [Path(name).resolve() for name in found.get("finetuned") or ()]
    learned = found.get("stage_1") or {}
    same = (found.get("scaling_coef"), of_base, made_from) == (scaling_coef, fingerprint, [finetuned.resolve()])
    # The copy may have been replaced since.
    if same and all(learned.get(fact) == copy.get(fact) for fact in ("training", "losses_at_the_end")):
        return True
    if overwrite:
        return False
    raise UserError(
        f"{target} holds another model ({', '.join(map(str, made_from))}{' as it was before' * same} by "
        f"{found.get('scaling_coef')}): give another --task_vector_saving_path, or add --overwrite"
    )


def free_target(args: Namespace, log: RunLog) -> Path:
    """--model_save_dir, or a name beside it if something else has filled that meanwhile."""
    target = args.model_save_dir
    if not is_main_process() or args.overwrite or not target.exists() or not any(target.iterdir()):
        return target
    log.warn(f"{target} was filled by something else meanwhile")
    names = (target.with_name(f"{target.name}.new" + (f"-{number}" if number > 1 else "")) for number in count(1))
    return next(name for name in names if not name.exists())
