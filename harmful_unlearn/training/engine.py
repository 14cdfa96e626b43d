"""The engine of stage 1: optimizer, schedule, processes, checkpoints, resuming, and stopping, behind the loop."""

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from accelerate.utils import set_seed
from torch import Tensor
from transformers import PreTrainedModel

from harmful_unlearn.cli.running import stop_asked
from harmful_unlearn.data.step_batches import StepBatch
from harmful_unlearn.errors import Diverged, Stopped, UserError, system_errors
from harmful_unlearn.losses.packing_check import max_packed_length
from harmful_unlearn.models.precision import computing_in
from harmful_unlearn.models.reference import ReferenceModel
from harmful_unlearn.models.tree_attention import TREE
from harmful_unlearn.storage.files import new_folder, write_file
from harmful_unlearn.training import distributed
from harmful_unlearn.training.checkpointing import load_state, save_model, save_state
from harmful_unlearn.training.distributed import is_main_process
from harmful_unlearn.training.resume import free_folder
from harmful_unlearn.training.run_log import RunLog, largest_kl, not_finite
from harmful_unlearn.training.setup import Stage1

Terms = Callable[[PreTrainedModel, StepBatch], tuple[Tensor, dict[str, Tensor]]]
STAGE_2 = "continue with the same command and --stage negate"


class Engine:
    """AdamW with a linearly decreasing rate (implementation detail 14) on one process or several.

    Within `with engine:` a first Ctrl-C or SIGTERM only ends the current step.

    Args:
        run: with a checkpoint, the run continues after it.
        model: theta, with the checkpoint's weights.
        base: theta_o.

    Attributes:
        model: theta, in the wrapper that accelerate has put around it.
    """

    def __init__(self, run: Stage1, model: PreTrainedModel, base: ReferenceModel | None, log: RunLog):
        self.run, self.log, self.accelerator = run, log, run.accelerator
        settings = run.settings
        self._announce(model)
        self._batches = run.batches
        if not settings.no_packing:
            length, reason = distributed.of_main_process(
                self.accelerator, lambda: max_packed_length(model, run.batches.collator)
            )
            if length:
                model.set_attn_implementation(TREE)
            if reason:
                log.say(f"{f'texts over {length} tokens' if length else 'all texts'} in plain rows: {reason}")
            self._batches = replace(run.batches, packed_up_to=length)
            if base and not base.shared:  # which may read the same rows
                base.model.set_attn_implementation(model.config._attn_implementation)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW([{"params": trained, "initial_lr": settings.lr}], lr=settings.lr, fused=True)
        self.model, self._optimizer = distributed.prepare(self.accelerator, model, base, optimizer, run.precision)
        inner = self.accelerator.unwrap_model(self.model)
        self._trained = {name: p for name, p in inner.named_parameters() if p.requires_grad}
        first_step = len(log.history)
        set_seed(settings.seed + first_step, device_specific=True)  # of dropout; data have draws of their own
        if run.checkpoint:
            log.say(f"stage 1 continues after step {first_step}, from {run.checkpoint}")
            if not load_state(run.checkpoint, self._optimizer, self._trained, self.accelerator):
                log.say("on other devices or processes than before: dropout is drawn anew")
        self._scheduler = transformers.get_linear_schedule_with_warmup(
            self._optimizer, settings.warmup_steps, settings.max_unlearn_steps, last_epoch=first_step - 1
        )
        self._exit = ExitStack()
        self._asked_to_stop = False
        self._values: dict[str, Tensor] = {}
        self._has_gradient = False
        self.model.train()

    def _announce(self, model: PreTrainedModel) -> None:
        """Announce the stage, and start what reports on it."""
        settings, log = self.run.settings, self.log
        purpose = "harmful knowledge acquisition" if settings.negates else f"training by {settings.method}"
        log.record(str(self.run.plan))
        log.say(f"stage 1, {purpose}: {settings.model_name} -> {settings.model_save_dir}")
        if settings.overwrite and not self.run.checkpoint and is_main_process():
            self.run.checkpoints.remove()
        distributed.start_tracker(self.accelerator, settings, log.file, continues=bool(self.run.checkpoint))
        if not settings.gradient_checkpointing and any(parameter.is_meta for parameter in model.parameters()):
            log.say("with --gradient_checkpointing, since a part of the model is on the CPU or on disk")

    def __enter__(self) -> "Engine":
        self._stop_signal = self._exit.enter_context(stop_asked())
        return self

    def __exit__(self, *_) -> None:
        self._exit.close()

    def steps(self) -> Iterator[list[StepBatch]]:
        """The passes of every step that is left, made in a thread while the step before is computed."""
        self.log.start_clock()
        steps = range(len(self.log.history), self.run.settings.max_unlearn_steps)
        yield from self._batches.ahead(steps, self.accelerator.device)

    def backward(self, objective: Terms, passes: list[StepBatch], factor: float = 1.0) -> None:
        """Add the gradient of factor * objective, over the passes of a step, to that of the step.

        Each pass is computed forward and backward before the next, so that its activations are freed.
        """
        with computing_in(self.run.precision, self.model):
            for batch in passes:
                loss, values = objective(self.model, batch)
                if loss.requires_grad:  # a method may have terms at theta only, or at the landing point only
                    # Engines average gradients over processes, and losses are sums over their rows.
                    self.accelerator.backward(factor * loss * self.accelerator.num_processes)
                    self._has_gradient = True
                for name, value in values.items():
                    self._values[name] = self._values.get(name, 0.0) + value

    def step(self, passes: list[StepBatch]) -> None:
        """Update the weights and the rate, and log the step's metrics.

        Raises:
            Diverged: a loss or the gradient is NaN or infinite, or the KL from the base above --max_kl. The weights
                have not been updated then.
        """
        metrics = self._metrics(passes)
        if wrong := not_finite(metrics):
            self._stop_diverged(metrics, f"is not finite ({wrong})", "lower --lr or a weight")
        kl, fix = largest_kl(metrics)
        if 0 < self.run.settings.max_kl < kl:
            limit = f"above --max_kl {self.run.settings.max_kl:g} (0: no limit)"
            self._stop_diverged(metrics, f"has a KL from the base of {kl:.3g} nats on normal text, {limit}", fix, False)
        if self._has_gradient:  # else nothing was to learn in this step
            limit_norm = self.run.settings.max_grad_norm
            if limit_norm and metrics["grad_norm"] > limit_norm:
                for weight in self._trained.values():
                    if weight.grad is not None:
                        weight.grad.mul_(limit_norm / metrics["grad_norm"])
            self._optimizer.step()
        self._scheduler.step()
        # Kept, since gradients that are allocated between the activations of each step break up the memory.
        self._optimizer.zero_grad(set_to_none=False)
        self._has_gradient = False
        self.log.step(metrics)
        logged = {name: value for name, value in metrics.items() if value is not None}
        self.accelerator.log(logged, step=metrics["step"])

    def _metrics(self, passes: list[StepBatch]) -> dict:
        """The step's metrics (RunLog), of all processes together."""
        weights = self.run.settings.loss_weights
        values, self._values = self._values, {}  # each loss term of this process's rows, without its weight
        gradient_norm = distributed.gradient_norm(self.accelerator, self._trained.values())
        tokens = sum(rows.tokens for batch in passes for rows in batch if rows)
        counts = torch.tensor([tokens, self._stop_signal()], device=self.accelerator.device)
        total = self.accelerator.reduce(torch.stack([*values.values(), *counts.float()]), "sum").tolist()
        total = dict(zip([*values, "tokens", "stop"], total, strict=True))
        self._asked_to_stop = bool(total["stop"])
        return {
            "step": len(self.log.history) + 1,
            **{f"{name}_loss": total[name] + 0.0 if name in values else None for name in weights},  # no -0.0
            "total_loss": sum(weights[name] * total[name] for name in values),
            "lr": self._scheduler.get_last_lr()[0],
            "grad_norm": gradient_norm.item(),
            "tokens": int(total["tokens"]),
        }

    def _stop_diverged(self, metrics: dict, problem: str, fix: str, may_be_good: bool = True) -> None:
        """Raises Diverged. Weights that a finite loss was computed with are saved first, if they may be good."""
        step = metrics["step"]
        if may_be_good and math.isfinite(metrics["total_loss"]) and step > 1:
            self._save_checkpoint()
        newest = self.run.checkpoints.newest()
        weights = f"the last good weights are in {newest}" if newest else self._no_checkpoint()
        self.log.warn(f"step {step} {problem}")
        raise Diverged(f"step {step} {problem}; {weights}: {fix}, and start again")

    def after_step(self) -> None:
        """Save a checkpoint if one is due.

        Raises:
            Stopped: Ctrl-C or SIGTERM came, after a checkpoint.
        """
        settings, step = self.run.settings, len(self.log.history)
        if self._asked_to_stop:
            self._save_checkpoint()
            newest = self.run.checkpoints.newest()
            advice = f"{self._no_checkpoint()}: start again"
            if newest:
                advice = f"its checkpoint is {newest}: continue with the same command and --resume"
            raise Stopped(self._stop_signal() or signal.SIGTERM, f"stopped after step {step}; {advice}")
        if settings.save_every and step % settings.save_every == 0 and step < settings.max_unlearn_steps:
            self._save_checkpoint()

    def _no_checkpoint(self) -> str:
        if distributed.keeps_checkpoints(self.accelerator):
            return "no checkpoint was saved (--save_every N)"
        return "DeepSpeed saves no checkpoints"

    def _save_checkpoint(self) -> None:
        if distributed.keeps_checkpoints(self.accelerator):
            self._save(self.run.checkpoints.at(len(self.log.history)), overwrite=True, with_state=True)
            if is_main_process():
                self.run.checkpoints.prune()

    def save(self, stage_2_follows: bool) -> Path:
        """Save theta, or with LoRA its adapter, and remove the checkpoints. Returns the folder.

        Raises:
            UserError: it cannot be written.
            Stopped: Ctrl-C or SIGTERM came in the meantime, and stage 2 is still to come.
        """
        settings, folder = self.run.settings, self.run.settings.model_save_dir
        if is_main_process() and not settings.overwrite and (free := free_folder(folder)) != folder:
            self.log.warn(f"{folder} was filled by something else in the meantime")
            folder = free
        self._save(folder, settings.overwrite)
        self.log.say(f"stage 1 model saved: {folder}{' (deliberately harmful)' if settings.negates else ''}")
        self.accelerator.end_training()
        if is_main_process():
            self.run.checkpoints.remove()
        if self._stop_signal() and stage_2_follows:
            raise Stopped(self._stop_signal(), f"stopped before stage 2: {STAGE_2}")
        return folder

    def _save(self, folder: Path, overwrite: bool, with_state: bool = False) -> None:
        """Write a stage 1 folder; `with_state` makes it a checkpoint."""
        run = self.run
        try:
            with system_errors(folder), new_folder(folder, overwrite) if is_main_process() else nullcontext() as target:
                save_model(self.accelerator, self.model, run.base_folder, target)
                if with_state:
                    save_state(target, self._optimizer, self._trained, self.accelerator)
                if target:
                    run.template.tokenizer.save_pretrained(target)
                    write_file(target / "metrics.jsonl", self.log.metrics_text)
                    run.record(self.log).write(target)
        except (OSError, UserError) as error:
            newest = run.checkpoints.newest()
            problem = str(error)
            if isinstance(error, OSError):
                reason = error.strerror or error
                problem = f"{folder} cannot be written ({reason}): free some space or fix the disk"
            resume = " with --resume" if distributed.keeps_checkpoints(self.accelerator) else ""
            outcome = f"continues from {newest}, which is complete" if newest else "starts stage 1 again"
            raise UserError(f"{problem}, then the same command{resume} {outcome}") from error
        self.accelerator.wait_for_everyone()
