"""--replay: do again what the run.json of a saved model says that it is, and compare what comes out."""

import filecmp
import math
from pathlib import Path

from harmful_unlearn.errors import UserError
from harmful_unlearn.storage.provenance import differences
from harmful_unlearn.storage.run_record import RunRecord
from harmful_unlearn.training.recorded_flags import folder_of, read_training, replayed_flags
from harmful_unlearn.training.resume import changed_settings
from harmful_unlearn.training.run_log import RunLog


def check_replay(source: Path, now: RunRecord) -> list[str]:
    """What of versions and hardware has changed since, and what that may change.

    Args:
        now: the record of stage 1 as it would be written.

    Raises:
        UserError: the base, the data or a flag is another, so that this would not be the same run.
    """
    record, training = read_training(source)
    changed = changed_settings(training, now, folder_of(source))
    alpha = replayed_flags(source).get("scaling_coef")
    if record is not training and now.flags["scaling_coef"] != alpha:
        changed.append(f"--scaling_coef was {alpha} and is {now.flags['scaling_coef']} now")
    if changed:
        raise UserError(f"this is not what made {source} ({'; '.join(changed)}): give what it had")
    return differences(record.more) or ["versions and hardware are those of the recorded run"]


def compare(source: Path, log: RunLog, harmful: Path, unlearned: Path | None) -> None:
    """Log how the losses of the last step and the weights differ from the recorded ones.

    Args:
        harmful, unlearned: the models that were made; None for a stage that was not run.

    Raises:
        UserError: they differ, though versions and hardware are the same.
    """
    losses = log.history[-1] if log.history else None  # None: stage 1 was done already
    record, training = read_training(source)
    lines, are_equal = [], True
    if losses is not None:
        recorded = {name: value for name, value in training.losses_at_the_end.items() if value is not None}
        lines = [f"{name} {losses.get(name)} (recorded: {value})" for name, value in recorded.items()]
        apart = max((abs(value - _known(losses.get(name))) for name, value in recorded.items()), default=math.nan)
        are_equal = apart == 0
        lines.append(f"the losses at the end {'are equal' if are_equal else f'differ by at most {apart:.2g}'}")
    made = harmful if record is training else unlearned
    weights = sorted(file.name for file in folder_of(source).glob("*.safetensors"))
    if made and weights:
        same, _, missing = filecmp.cmpfiles(folder_of(source), made, weights, shallow=False)
        if len(missing) < len(weights):
            are_equal &= len(same) + len(missing) == len(weights)
            lines.append(f"{len(same)} of {len(weights)} files of weights are equal, byte for byte")
        if missing:  # of an adapter the replay makes the complete model
            lines.append(f"{missing[0]} has no counterpart in {made}")
    log.say("\n".join(f"replayed       {line}" for line in lines))
    if not are_equal and not differences(record.more):
        raise UserError(f"the result is not that of {source}, on the same versions and hardware")


def _known(value: float | None) -> float:
    return math.inf if value is None else value
