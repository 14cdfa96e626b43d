"""What a run came to: the time of each stage, tokens, peak memory, where the results are, and what to type next."""

import os
import resource
import shlex
import sys
from pathlib import Path

import torch

from harmful_unlearn.storage.files import ROOT
from harmful_unlearn.training.flags import TrainingSettings
from harmful_unlearn.training.run_log import RunLog


def summary(settings: TrainingSettings, log: RunLog, harmful: Path, first_step: int, negated: bool) -> str:
    """The summary, once the stages have ended.

    Args:
        harmful: the stage 1 model.
        first_step: how many steps an earlier run took.
        negated: whether stage 2 has run.
    """
    lines = [f"{stage:<15}{_duration(seconds)}" for stage, seconds in log.seconds.items()]
    if "stage 1" in log.seconds:
        steps = log.history[first_step:]
        tokens, seconds = (sum(metrics[name] for metrics in steps) for name in ("tokens", "seconds"))
        lines[0] += f", {len(steps):,} steps, {tokens:,} tokens ({tokens / max(seconds, 1e-9):,.0f} a second)"
        lines.append(f"stage 1 model  {harmful}")
    lines.append(f"peak memory    {_peak_memory()}")
    unlearned = str(settings.task_vector_saving_path)
    if negated:
        lines.append(f"unlearned      {unlearned}")
        command = [_script("main.py"), "--base", settings.model_name, "--unlearned", unlearned]
    else:
        command = [_script("harmful_unlearn/unlearn_harm_new.py"), "--model_name", settings.model_name]
        command += ["--method", settings.method]
        if settings.negates:
            command += ["--scaling_coef", f"{settings.scaling_coef:g}"]
        command += ["--saved_model", str(harmful), "--task_vector_saving_path", unlearned]
    lines += [f"log            {log.file}", f"next           {shlex.join(['python', *command])}"]
    return "\n".join(lines)


def _script(path: str) -> str:
    """A file of this repository, as one types it from here."""
    return os.path.relpath(ROOT / path)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _peak_memory() -> str:
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = [f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB"]
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            peaks.append(f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on cuda:{device}")
    return ", ".join(peaks)
