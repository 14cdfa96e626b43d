"""Which stages run: by the flags, and, of a run that is resumed, by what is there already."""

from argparse import Namespace
from itertools import count
from pathlib import Path

from harmful_unlearn.checkpoints import Checkpoint, read_record
from harmful_unlearn.errors import UserError
from harmful_unlearn.flags import AUTO
from harmful_unlearn.methods import METHODS, lands
from harmful_unlearn.processes import is_main_process
from harmful_unlearn.resuming import Checkpoints, check_same_run, check_whole
from harmful_unlearn.run_log import METRICS, PICTURE, RunLog, beside
from harmful_unlearn.saving import ROOT, check_file, check_target, real


def check_stages(args: Namespace) -> set[str]:
    """Which stages will run, and whether their folders can be read and written. Raises UserError."""
    stages = {"acquire", "negate"} if args.stage == "all" else {args.stage}
    if args.saved_model:
        if args.stage == "acquire":
            raise UserError("--saved_model is the start of stage 2: leave out --stage acquire")
        stages = {"negate"}
    if "acquire" in stages and not args.resume:
        check_target(args.model_save_dir, args.overwrite)
        found = Checkpoints(args.model_save_dir, args.keep_checkpoints).newest()
        if found and not args.overwrite:
            raise UserError(f"{found} is an earlier run's: --resume goes on with it, --overwrite starts again")
    if "negate" in stages:
        finetuned = args.saved_model or args.model_save_dir
        if "acquire" not in stages:
            if not finetuned.is_dir():
                raise UserError(f"there is no stage 1 model in {finetuned}: run stage 1, or give --saved_model")
            trained_by = read_record(finetuned).get("flags", {}).get("method")
            if trained_by not in (None, args.method):
                raise UserError(f"{finetuned} was trained by --method {trained_by}: give that, not {args.method}")
        if not args.resume:
            check_target(args.task_vector_saving_path, args.overwrite)
    if log_file := args.log_file or (None if args.resume else ROOT / "logs" / "a run's" / "run.log"):
        for file in (log_file, beside(log_file, METRICS), beside(log_file, PICTURE)):
            check_file(file)
        for folder in (args.model_save_dir, args.task_vector_saving_path):
            if real(log_file).is_relative_to(real(folder)):
                raise UserError(f"--log_file {log_file} lies in {folder}, which must be empty: put it elsewhere")
    return stages


def what_is_left(
    args: Namespace, now: dict | None, base_folder: Path, stages: set[str], checkpoints: Checkpoints
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
            check_whole(resumed)
        for step in checkpoints.steps() if auto and not whole else ():
            if checkpoints.at(step) == resumed:
                break
            notes.append(f"{checkpoints.at(step)} is not whole, and left out")
        found = finetuned if whole else resumed
        try:
            then = read_record(found) if found else {}
            notes += check_same_run(then, now, lands(args), found) if found else []
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
        fingerprint = Checkpoint(base_folder).fingerprint()
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
