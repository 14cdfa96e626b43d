"""What a run reports while it works: the bar, the log, the metrics, and a plot of the losses."""

import io
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import IO

from tqdm import tqdm

from harmful_unlearn.losses.terms import LOSSES
from harmful_unlearn.storage.files import ROOT, write_file
from harmful_unlearn.storage.provenance import provenance
from harmful_unlearn.training.flags import TrainingSettings

# A KL above this many nats is damage on normal prompts that negation inherits.
KL_WARNING = 1.0
METRICS, PICTURE, FLAGS = ".metrics.jsonl", ".losses.png", ".flags.json"  # suffixes of the files beside a log


def beside(log_file: Path, suffix: str) -> Path:
    """`logs/run.log` -> `logs/run<suffix>`."""
    return log_file.with_name(log_file.name.removesuffix(".log") + suffix)


def new_log(logs: Path, name: str) -> Path:
    """The log of a new run, in a new folder: `logs/NAME/run.log`, or in NAME-2 and so on."""
    for number in count(1):
        folder = logs / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):  # also by a run that started at the same moment
            folder.mkdir(parents=True)
            return folder / "run.log"
    raise AssertionError("unreachable")


def losses_of(metrics: dict) -> dict[str, float]:
    """The losses among a step's metrics, by their short names ("GD", ..., "total"), without those of weight 0."""
    values = {name.removesuffix("_loss"): value for name, value in metrics.items() if name.endswith("_loss")}
    return {"total" if n == "total" else n.upper(): value for n, value in values.items() if value is not None}


class RunLog:
    """The log file (appended to), the metrics of this run (one JSON object a step), its flags, and the bar.

    The files are made when the first line is written, so that a run that cannot start leaves none.

    Metrics of a step: `step` (from 1), the method's losses (`gd_loss`, `rd_loss` and `pd_loss` for SKU) and
    `total_loss` (nats; null for one whose weight is 0), `lr`, `grad_norm` (global L2 norm, before it is clipped),
    `tokens` (of text, without padding, in this step) and `seconds`.

    Args:
        settings: the run's flags. Without --log_file the log gets a new folder in logs/, named after the model.
        writes: whether this process writes and prints; the others only keep the history.
        history: the metrics of earlier steps, of a run that is resumed.
        notes: what the log has to say first.

    Attributes:
        history: the metrics of all steps so far.
        seconds: the duration of each stage that has ended.
    """

    def __init__(
        self, settings: TrainingSettings, writes: bool = True, history: Sequence[dict] = (), notes: Sequence[str] = ()
    ):
        self.history = list(history)
        self.seconds: dict[str, float] = {}
        self._settings, self._notes, self._writes = settings, notes, writes
        self._file = settings.log_file
        self._warned_of_kl = self._warned_of_disk = False
        self._logger: logging.Logger | None = None
        self._bar: tqdm | None = None
        self._metrics: IO[str] | None = None
        self._step_started = time.perf_counter()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def file(self) -> Path:
        """The log file."""
        self._open()
        return self._file or Path("run.log")

    @property
    def metrics_file(self) -> Path:
        return beside(self.file, METRICS)

    @property
    def picture_file(self) -> Path:
        return beside(self.file, PICTURE)

    @property
    def metrics_text(self) -> str:
        """The metrics of this run so far, as the metrics file has them."""
        return "".join(json.dumps(metrics) + "\n" for metrics in self.history)

    def flags(self) -> dict[str, object]:
        """The run's flags, with the log's file, as run.json has them."""
        return {**self._settings.to_json(), "log_file": str(self.file)}

    def _open(self) -> None:
        if self._logger:
            return
        self._logger = logging.Logger("sku", logging.INFO)
        self._logger.addHandler(logging.NullHandler())
        if not self._writes:
            return
        self._file = self._file or new_log(ROOT / "logs", _short_name(self._settings.model_name))
        self._file.parent.mkdir(parents=True, exist_ok=True)
        _end_last_line(self._file)
        handler = logging.FileHandler(self._file, encoding="utf-8")
        handler.handleError = lambda record: self._warn_of_disk(sys.exc_info()[1])  # type: ignore[method-assign]
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._logger.addHandler(handler)
        text = json.dumps({"flags": self.flags(), **provenance()}, indent=2, ensure_ascii=False)
        write_file(beside(self._file, FLAGS), text + "\n")
        for note in self._notes:
            self.record(note)

    def _log(self, level: int, message: str) -> None:
        self._open()
        assert self._logger
        self._logger.log(level, message)

    def say(self, message: str) -> None:
        """A line for the terminal and the log."""
        self._open()
        if self._writes:
            tqdm.write(message)
        self._log(logging.INFO, message)

    def record(self, message: str) -> None:
        """A text for the log only."""
        self._log(logging.INFO, message)

    def warn(self, message: str) -> None:
        """As `say`, marked as a warning."""
        self._open()
        if self._writes:
            tqdm.write(f"warning: {message}")
        self._log(logging.WARNING, message)

    @contextmanager
    def timing(self, stage: str) -> Iterator[None]:
        """Measure the duration of the block as a stage."""
        started = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - started

    def start_clock(self) -> None:
        """The first step starts now; each later one starts where the one before was logged."""
        self._step_started = time.perf_counter()

    def step(self, metrics: dict) -> None:
        """Record one optimizer step; `seconds` is added to its metrics."""
        now = time.perf_counter()
        metrics = {**metrics, "seconds": round(now - self._step_started, 4)}
        self._step_started = now
        self._open()
        if self._writes:
            self._write_metrics(metrics)
        self.history.append(metrics)
        if self._writes:
            self._show(metrics)
            self._warn_of_kl(metrics)

    def _write_metrics(self, metrics: dict) -> None:
        try:
            if self._metrics is None:
                # Steps after the checkpoint are computed again: drop their lines, of which the last may be incomplete.
                write_file(self.metrics_file, self.metrics_text)
                self._metrics = self.metrics_file.open("a", encoding="utf-8")
            self._metrics.write(json.dumps(metrics) + "\n")
            self._metrics.flush()
        except OSError as error:
            self._warn_of_disk(error)

    def _show(self, metrics: dict) -> None:
        steps, losses, rate = (
            self._settings.max_unlearn_steps,
            losses_of(metrics),
            metrics["tokens"] / metrics["seconds"],
        )
        shown = "  ".join(f"{name} {value:.6g}" for name, value in losses.items())
        self.record(
            f"step {metrics['step']}/{steps}  {shown}  lr {metrics['lr']:.3e}  "
            f"grad_norm {metrics['grad_norm']:.4g}  {rate:.0f} tokens/s"
        )
        if self._bar is None:
            self._bar = tqdm(total=steps, initial=len(self.history) - 1, desc="acquire", unit="step")
        shown = " ".join(f"{name} {value:.3f}" for name, value in losses.items() if name != "total")
        self._bar.set_postfix_str(f"{shown} lr {metrics['lr']:.1e} {rate:.0f} tok/s", refresh=False)
        self._bar.update()
        if metrics["step"] == steps:
            self._bar.close()

    def _warn_of_kl(self, metrics: dict) -> None:
        """Warn once, when theta has moved far from the base on normal text."""
        kl, fix = largest_kl(metrics)
        if self._warned_of_kl or kl <= KL_WARNING:
            return
        self._warned_of_kl = True
        self.warn(
            f"step {metrics['step']}: the KL from the base on normal text has passed {KL_WARNING:g} nat; the "
            f"unlearned model will have that damage on normal prompts (docs/results.md): {fix}"
        )

    def close(self) -> None:
        """End the bar, close the files and plot the losses; safe to call at any point."""
        ends = [handler.close for handler in self._logger.handlers] if self._logger else []
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
                self._warn_of_disk(error)

    def _warn_of_disk(self, error: BaseException | None) -> None:
        """Warn once that the log cannot be written, and continue: the metrics are also saved with the model."""
        if not self._warned_of_disk:
            self._warned_of_disk = True
            tqdm.write(f"warning: {self.file} or a file beside it cannot be written ({error}): continuing without it")


def _short_name(model_name: str) -> str:
    return Path(os.path.realpath(model_name)).name


def _end_last_line(file: Path) -> None:
    """End the last line of a log that was cut off in the middle of it."""
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

    steps = [(metrics["step"], losses_of(metrics)) for metrics in history]
    names = list(dict.fromkeys(name for _, losses in steps for name in losses))
    figure, panels = plt.subplots(len(names), 1, sharex=True, squeeze=False, figsize=(7, 2 * len(names)))
    for panel, name in zip(panels[:, 0], names, strict=True):
        panel.plot([step for step, _ in steps], [losses.get(name) for _, losses in steps], linewidth=1)
        panel.set_ylabel(f"{name} (nats)")
        panel.grid(alpha=0.3)
    panels[-1, 0].set_xlabel("step")
    panels[0, 0].set_title("Stage 1")
    figure.tight_layout()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    plt.close(figure)
    write_file(path, content.getvalue())


def largest_kl(metrics: dict) -> tuple[float, str]:
    """The largest KL divergence from the base in a step, in nats (0 if no loss is one), and what makes it smaller."""
    kls = {name: abs(metrics.get(f"{name}_loss") or 0) for name, term in LOSSES.items() if term.value == "kl"}
    worst = max(kls, key=lambda name: kls[name])
    return kls[worst], f"lower --lr, or {'lower' if LOSSES[worst].sign < 0 else 'raise'} --normal_weight"


def not_finite(metrics: dict) -> str:
    """Names and values of a step's numbers that are NaN or infinite; "" if there are none."""
    wrong = ((name, value) for name, value in metrics.items() if value is not None and not math.isfinite(value))
    return ", ".join(f"{name} {value}" for name, value in wrong)
