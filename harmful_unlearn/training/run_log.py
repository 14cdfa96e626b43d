"""What a run says while it works: the bar, the log, the metrics, and the picture of the losses."""

import io
import json
import logging
import math
import os
import resource
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import torch
from tqdm import tqdm

from harmful_unlearn.losses.methods import METHODS
from harmful_unlearn.storage.files import write_file
from harmful_unlearn.storage.provenance import provenance

# A KL above this many nats is damage on normal prompts that negation inherits.
KL_WARNING = 1.0
LOSSES = {
    "gd_loss": "GD", "ga_loss": "GA", "rd_loss": "RD", "rm_loss": "RM",
    "pd_loss": "PD", "kl_loss": "KL", "lp_loss": "LP", "ft_loss": "FT", "sa_loss": "SA", "total_loss": "total",
}  # fmt: skip
METRICS, PICTURE = ".metrics.jsonl", ".losses.png"  # suffixes of what lies beside a log


def beside(log_file: Path, suffix: str) -> Path:
    """`logs/run.log` -> `logs/run<suffix>`."""
    return log_file.with_name(log_file.name.removesuffix(".log") + suffix)


def new_log(logs: Path, name: str) -> Path:
    """The log of a new run, in a folder of its own that is made now: `logs/NAME/run.log`, or in NAME-2 and so on."""
    for number in count(1):
        folder = logs / (name + f"-{number}" * (number > 1))
        with suppress(FileExistsError):  # also by a run that began at the same moment
            folder.mkdir(parents=True)
            return folder / "run.log"


class RunLog:
    """The log file (appended to), the metrics of this run (one JSON object a step), its flags, and the bar.

    Metrics of a step: `step` (from 1), the method's losses (`gd_loss`, `rd_loss` and `pd_loss` for SKU)
    and `total_loss` (nats; null for one whose weight is 0), `lr`, `grad_norm` (global L2 norm, unclipped),
    `tokens` (of text, without padding, in this step) and `seconds`.

    Args:
        writes: whether this process writes and speaks; the others only keep the history.
        history: the metrics of the steps before, of a run that goes on.
    """

    def __init__(self, log_file: Path, steps: int, writes: bool = True, history: Sequence[dict] = ()):
        self.file = log_file
        self.metrics_file = beside(log_file, METRICS)
        self.picture_file = beside(log_file, PICTURE)
        self.history = list(history)
        self._writes = writes
        self._warned = self._said_lost = False
        self._logger = logging.Logger("sku", logging.INFO)
        self._logger.addHandler(logging.NullHandler())
        self._steps = steps
        self._bar: tqdm | None = None
        self._metrics = None
        if not writes:
            return
        log_file.parent.mkdir(parents=True, exist_ok=True)
        _end_line(log_file)
        handler = logging.FileHandler(log_file, encoding="utf-8")
        handler.handleError = lambda record: self._lost(sys.exc_info()[1])
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._logger.addHandler(handler)

    def say(self, message: str) -> None:
        """A line for the reader and for the log."""
        if self._writes:
            tqdm.write(message)
        self._logger.info(message)

    def record(self, message: str) -> None:
        """A text for the log alone."""
        self._logger.info(message)

    def record_flags(self, args: Namespace) -> None:
        """Write the run's resolved flags, and what runs, beside the log."""
        if self._writes:
            flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
            text = json.dumps({"flags": flags, **provenance()}, indent=2, ensure_ascii=False)
            write_file(beside(self.file, ".flags.json"), text + "\n")

    def warn(self, message: str) -> None:
        """As `say`, marked as a warning."""
        if self._writes:
            tqdm.write(f"warning: {message}")
        self._logger.warning(message)

    def step(self, metrics: dict) -> None:
        """Record one optimizer step."""
        if not self._writes:
            self.history.append(metrics)
            return
        if self._bar is None:
            self._bar = tqdm(total=self._steps, initial=len(self.history), desc="acquire", unit="step")
        try:
            if self._metrics is None:
                # Steps after the checkpoint are computed again: their lines, of which the last may be torn, go.
                write_file(self.metrics_file, self.metrics_text)
                self._metrics = self.metrics_file.open("a", encoding="utf-8")
            self._metrics.write(json.dumps(metrics) + "\n")
            self._metrics.flush()
        except OSError as error:
            self._lost(error)
        self.history.append(metrics)
        losses = {short: metrics[name] for name, short in LOSSES.items() if metrics.get(name) is not None}
        self._logger.info(
            "step %d/%d  %s  lr %.3e  grad_norm %.4g  %.0f tokens/s",
            metrics["step"],
            self._steps,
            "  ".join(f"{short} {value:.6g}" for short, value in losses.items()),
            metrics["lr"],
            metrics["grad_norm"],
            metrics["tokens"] / metrics["seconds"],
        )
        self._bar.set_postfix_str(
            " ".join(f"{short} {value:.3f}" for short, value in losses.items() if short != "total")
            + f" lr {metrics['lr']:.1e} {metrics['tokens'] / metrics['seconds']:.0f} tok/s"
        )
        self._bar.update()
        if metrics["step"] == self._steps:
            self._bar.close()
        measured = {name: metrics.get(name) or 0 for name in ("pd_loss", "kl_loss", "lp_loss")}
        worst = max(measured, key=lambda name: abs(measured[name]))
        if not self._warned and abs(measured[worst]) > KL_WARNING:
            self._warned = True
            self.warn(
                f"step {metrics['step']}: the KL from the base on normal text has passed "
                f"{KL_WARNING:g} nat; the unlearned model will have that damage on normal prompts "
                f"(README, what the demo shows): lower --lr, or {'lower' if worst == 'pd_loss' else 'raise'} "
                "--normal_weight"
            )

    def close(self) -> None:
        """End the bar, close the files and draw the losses; safe to call at any point."""
        ends = [handler.close for handler in self._logger.handlers]
        if self._metrics is not None:
            ends.append(self._metrics.close)
        if self._bar is not None:
            self._bar.close()
            self._bar = None
            ends.append(lambda: draw_losses(self.history, self.picture_file))
        for end in ends:
            try:
                end()
            except OSError as error:
                self._lost(error)

    def _lost(self, error: Exception) -> None:
        """Say, once, that the log cannot be written: no run ends for that, and a model's folder has its metrics too."""
        if not self._said_lost:
            self._said_lost = True
            tqdm.write(f"warning: {self.file} or what lies beside it cannot be written ({error}): going on without it")

    @property
    def metrics_text(self) -> str:
        """The metrics of this run so far, as they stand in the metrics file."""
        return "".join(json.dumps(metrics) + "\n" for metrics in self.history)


def _end_line(file: Path) -> None:
    """End the last line of a log that was cut off in it."""
    if file.is_file() and file.stat().st_size:
        with file.open("r+b") as log:
            log.seek(-1, os.SEEK_END)
            if log.read(1) != b"\n":
                log.write(b"\n")


def draw_losses(history: list[dict], path: Path) -> None:
    """A PNG with one panel a loss over the steps of `history`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = {n: s for n, s in LOSSES.items() if any(m.get(n) is not None for m in history)}
    figure, panels = plt.subplots(len(drawn), 1, sharex=True, squeeze=False, figsize=(7, 2 * len(drawn)))
    for panel, (name, short) in zip(panels[:, 0], drawn.items(), strict=True):
        panel.plot([m["step"] for m in history], [m.get(name) for m in history], linewidth=1)
        panel.set_ylabel(f"{short} (nats)")
        panel.grid(alpha=0.3)
    panels[-1, 0].set_xlabel("step")
    panels[0, 0].set_title("Stage 1")
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    plt.close(figure)
    write_file(path, picture.getvalue())


def not_finite(metrics: dict) -> str:
    """Names and values of a step's numbers that are NaN or infinite; "" where all is well."""
    wrong = ((name, value) for name, value in metrics.items() if value is not None and not math.isfinite(value))
    return ", ".join(f"{name} {value}" for name, value in wrong)


class Summary:
    """What a run came to: the time of each stage, tokens, peak memory, where all lies, and what to type next.

    Args:
        args: the script's flags.
        before: steps that an earlier run took.
    """

    def __init__(self, args: Namespace, before: int = 0):
        self._args, self._before = args, before
        self._seconds: dict[str, float] = {}

    @contextmanager
    def timing(self, stage: str) -> Iterator[None]:
        """Time the block as a stage."""
        started = time.perf_counter()
        yield
        self._seconds[stage] = time.perf_counter() - started

    def text(self, log: RunLog, stages: set[str], finetuned: Path) -> str:
        """The summary, once the stages have ended."""
        args = self._args
        lines = [f"{stage:<15}{_duration(seconds)}" for stage, seconds in self._seconds.items()]
        if "acquire" in stages:
            steps = log.history[self._before :]
            tokens, seconds = (sum(step[what] for step in steps) for what in ("tokens", "seconds"))
            lines[0] += f", {len(steps):,} steps, {tokens:,} tokens ({tokens / max(seconds, 1e-9):,.0f} a second)"
            lines.append(f"stage 1 model  {finetuned}")
        lines.append(f"peak memory    {_peak_memory()}")
        if "negate" in stages:
            lines.append(f"unlearned      {args.task_vector_saving_path}")
            following = ["main.py", "--base", args.model_name, "--unlearned", str(args.task_vector_saving_path)]
        else:
            following = ["harmful_unlearn/unlearn_harm_new.py", "--model_name", args.model_name]
            following += ["--method", args.method]
            following += ["--scaling_coef", f"{args.scaling_coef:g}"] if METHODS[args.method].negates else []
            following += ["--saved_model", str(finetuned)]
            following += ["--task_vector_saving_path", str(args.task_vector_saving_path)]
        lines += [f"log            {log.file}", f"next           {shlex.join(['python', *following])}"]
        return "\n".join(lines)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _peak_memory() -> str:
    unit = 1 if sys.platform == "darwin" else 1024
    found = [f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB"]
    found += [
        f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on cuda:{device}"
        for device in range(torch.cuda.device_count())
        if torch.cuda.is_initialized()
    ]
    return ", ".join(found)
