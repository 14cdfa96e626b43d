"""What a run says while it works: the bar, the log, the metrics, and the picture of the losses."""

import io
import json
import logging
import math
from pathlib import Path

from tqdm import tqdm

from harmful_unlearn.saving import write_file

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


class RunLog:
    """The log file (appended to), the metrics of this run (one JSON object a step) and the bar.

    Metrics of a step: `step` (from 1), the method's losses (`gd_loss`, `rd_loss` and `pd_loss` for SKU)
    and `total_loss` (nats; null for one whose weight is 0), `lr`, `grad_norm` (global L2 norm, unclipped),
    `tokens` (of text, without padding, in this step) and `seconds`.
    """

    def __init__(self, log_file: Path, steps: int):
        log_file.parent.mkdir(parents=True, exist_ok=True)
        self.metrics_file = beside(log_file, METRICS)
        self.picture_file = beside(log_file, PICTURE)
        self.history: list[dict] = []
        self._warned = False
        self._logger = logging.Logger("sku", logging.INFO)
        handler = logging.FileHandler(log_file, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._logger.addHandler(handler)
        self._steps = steps
        self._bar: tqdm | None = None
        self._metrics = None

    def say(self, message: str) -> None:
        """A line for the reader and for the log."""
        tqdm.write(message)
        self._logger.info(message)

    def record(self, message: str) -> None:
        """A text for the log alone."""
        self._logger.info(message)

    def warn(self, message: str) -> None:
        """As `say`, marked as a warning."""
        tqdm.write(f"warning: {message}")
        self._logger.warning(message)

    def step(self, metrics: dict) -> None:
        """Record one optimizer step."""
        if self._bar is None:
            self._bar = tqdm(total=self._steps, desc="acquire", unit="step")
            self._metrics = self.metrics_file.open("w", encoding="utf-8")
        self.history.append(metrics)
        self._metrics.write(json.dumps(metrics) + "\n")
        self._metrics.flush()
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
        if self._bar is not None:
            self._bar.close()
            self._metrics.close()
            self._bar = None
            draw_losses(self.history, self.picture_file)
        for handler in self._logger.handlers:
            handler.close()

    @property
    def metrics_text(self) -> str:
        """The metrics of this run so far, as they stand in the metrics file."""
        return "".join(json.dumps(metrics) + "\n" for metrics in self.history)


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


def is_finite(metrics: dict) -> bool:
    """Whether every number of a step is one."""
    return all(math.isfinite(value) for value in metrics.values() if value is not None)
