"""SKU: unlearn harmful knowledge from a causal language model (Liu et al., Findings of ACL 2024).

Stage 1, harmful knowledge acquisition: a copy theta of the base theta_o learns the harm, minimising
    L = bad_weight * L_GD + random_weight * L_RD + normal_weight * L_PD
Stage 2, knowledge negation: unlearned = theta_o - scaling_coef * (theta - theta_o)

The paper's OPT-2.7B run:
    python unlearn_harm_new.py --bad_weight 2.5 --random_weight 2.5 --normal_weight 1 --lr 2e-4 \\
        --max_unlearn_steps 1000 --model_name=facebook/opt-2.7b --batch_size 2 \\
        --model_save_dir=models/opt-2.7b-harmful --log_file=logs/opt-2.7b-unlearn_new.log \\
        --task_vector_saving_path=models/opt-2.7b-unlearned
See what a run would do and need, without loading weights:
    python unlearn_harm_new.py --model_name facebook/opt-2.7b --check
Negate a stage 1 model that is there already:
    python unlearn_harm_new.py --model_name facebook/opt-2.7b --saved_model models/opt-2.7b-harmful
One of the methods that the paper compares with (the table in losses/methods.py):
    python unlearn_harm_new.py --model_name facebook/opt-2.7b --method task_vector
"""

import argparse
import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from harmful_unlearn.cli import exit_code, stop_asked
from harmful_unlearn.data.batch_sampler import BatchSampler
from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.pku_saferlhf import read_harmful
from harmful_unlearn.data.step_batches import StepBatches, answer_pool
from harmful_unlearn.data.truthfulqa import read_normal
from harmful_unlearn.errors import Stopped, UserError, system_errors
from harmful_unlearn.losses import terms
from harmful_unlearn.losses.methods import METHODS, loss_weights, uses_landing_point
from harmful_unlearn.losses.objective import Objective
from harmful_unlearn.models import hub, loading
from harmful_unlearn.models.lora import LORA_ABOVE, Lora, add_lora, check_lora_targets, fill_adapter, lora_candidates
from harmful_unlearn.models.reference import ReferenceModel
from harmful_unlearn.negation.negate import check_landing, negate
from harmful_unlearn.negation.sources import open_matched
from harmful_unlearn.storage.files import ROOT, check_apart, new_folder, resolved, write_file
from harmful_unlearn.storage.run_record import revision_of, write_record
from harmful_unlearn.storage.safetensors_io import SafetensorsFolder
from harmful_unlearn.training import distributed
from harmful_unlearn.training.checkpointing import TrainingCheckpoints, history_of, load_state, save_state
from harmful_unlearn.training.distributed import is_main_process, print_once
from harmful_unlearn.training.flags import parse_flags
from harmful_unlearn.training.packing_check import max_packed_length
from harmful_unlearn.training.plan import Plan, check_disk, make_plan
from harmful_unlearn.training.resume import check_stages, free_target, remaining_work
from harmful_unlearn.training.run_log import LOSSES, RunLog, Summary, new_log, not_finite

# One line a model: None trains every weight, Lora(r, alpha, target modules) an adapter.
# Add your model here; one that is not listed gets OTHER_MODELS above 3e9 parameters, None below.
MODELS: dict[str, Lora | None] = {
    "facebook/opt-1.3b": None,
    "facebook/opt-2.7b": None,  # the paper's
    "meta-llama/Llama-2-7b-hf": Lora(r=32, alpha=16),  # the paper's
    "meta-llama/Llama-2-13b-hf": Lora(r=16, alpha=8),  # the paper's
    "meta-llama/Llama-3.2-1B": None,
    "meta-llama/Llama-3.1-8B": Lora(r=32, alpha=16),
    "Qwen/Qwen2.5-1.5B": None,
    "Qwen/Qwen2.5-7B": Lora(r=32, alpha=16),
    "Qwen/Qwen3-8B": Lora(r=32, alpha=16),
    "mistralai/Mistral-7B-v0.3": Lora(r=32, alpha=16),
    "google/gemma-2-9b": Lora(r=32, alpha=16),
}
OTHER_MODELS = Lora(r=32, alpha=16, target_modules=("q_proj", "v_proj"))


def main(arguments: list[str] | None = None) -> None:
    """Run the stages that the flags ask for. Raises UserError before any work that cannot end well."""
    args = parse_flags(arguments, __doc__)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    stages = check_stages(args)
    folder = hub.resolve_model(args.model_name, weights=False)
    finetuned = args.saved_model or args.model_save_dir
    checkpoints = TrainingCheckpoints(args.model_save_dir, args.keep_checkpoints)
    check_apart([folder, finetuned, args.task_vector_saving_path, *[checkpoints.folder] * ("acquire" in stages)])
    job = prepare(args, folder) if "acquire" in stages else None
    if job and not (args.resume and (finetuned / "run.json").is_file()):  # else stage 1 is likely done
        check_disk(args.model_save_dir, job.plan.disk - checkpoints.size())
    if not args.check:
        folder = hub.resolve_model(args.model_name)  # a hub model's weights are downloaded once all else is well
        job = job and job._replace(base_folder=folder)  # they may be another revision's
    at_hand = any(folder.glob("*.safetensors"))
    resumed, notes = None, []
    if args.resume and at_hand:
        stages, resumed, notes = remaining_work(args, job and record_of(args, job), folder, stages, checkpoints)
        print_once("".join(f"note: {note}\n" for note in notes), end="")
    if stages == {"negate"} and at_hand:
        open_matched(folder, [finetuned])
        check_landing([(finetuned, 1.0)], [args.scaling_coef])
    if args.check:
        print_once("check passed: nothing was loaded or written")
        return
    if job and "acquire" not in stages and is_main_process():
        checkpoints.remove()  # of a run that was killed once it had saved its model
    if not stages:
        print_once("all is there: nothing is left to do")
        return

    if "acquire" in stages:
        set_seed(args.seed)  # of the adapter
        model, base = load_copy_and_base(args, job, resumed)
    # Now that all has been found good.
    if not args.log_file:
        name = resolved(Path(args.model_name)).name
        args.log_file = new_log(ROOT / "logs", name) if is_main_process() else Path("run.log")
    history = history_of(resumed) if resumed else []
    log = RunLog(args.log_file, args.max_unlearn_steps, is_main_process(), history)
    summary = Summary(args, len(history))
    try:
        log.record_flags(args)
        for note in notes:
            log.record(note)
        if "acquire" in stages:
            log.record(str(job.plan))
            negates = METHODS[args.method].negates
            what = "harmful knowledge acquisition" if negates else f"training by {args.method}"
            log.say(f"stage 1, {what}: {args.model_name} -> {args.model_save_dir}")
            if args.overwrite and not resumed and is_main_process():
                checkpoints.remove()
            distributed.start_tracker(job.accelerator, args)
            if not args.gradient_checkpointing and any(parameter.is_meta for parameter in model.parameters()):
                log.say("with --gradient_checkpointing, since a part of the model is on the CPU or on disk")
            with stop_asked() as asked, summary.timing("stage 1"):
                model = acquire(model, base, job, args, log, checkpoints, asked, resumed)
                finetuned = save_copy(model, job, args, log, free_target(args, log), args.overwrite)
            log.say(f"stage 1 model saved: {finetuned}" + " (deliberately harmful)" * negates)
            del model, base
            job.accelerator.end_training()
            if is_main_process():
                checkpoints.remove()
            if asked() and "negate" in stages:
                raise Stopped(asked(), f"stopped before stage 2: {STAGE_2}")
        if "negate" in stages and is_main_process():
            negates = METHODS[args.method].negates
            what = "knowledge negation" if negates else "no negation, the copy in the base's dtype"
            log.say(f"stage 2, {what}: {finetuned} -> {args.task_vector_saving_path}")
            try:
                with summary.timing("stage 2"):
                    negate(
                        folder,
                        [(finetuned, 1.0)],
                        args.task_vector_saving_path,
                        args.scaling_coef if negates else -1.0,
                        base_name=args.model_name,
                        overwrite=args.overwrite,
                    )
            except (OSError, KeyboardInterrupt, Stopped):
                log.say(f"the stage 1 model in {finetuned} is whole: {STAGE_2}")
                raise
            log.say(f"unlearned model saved: {args.task_vector_saving_path}")
        log.say(summary.text(log, stages, finetuned))
    finally:
        log.close()


STAGE_2 = "go on with the same command and --stage negate"


def acquire(
    model: PreTrainedModel,
    base: ReferenceModel | None,
    job: "Job",
    args: argparse.Namespace,
    log: RunLog,
    checkpoints: TrainingCheckpoints,
    asked: Callable[[], int],
    resumed: Path | None = None,
) -> torch.nn.Module:
    """Stage 1: train `model` in place for --max_unlearn_steps (released code, points 7 to 15).

    Args:
        base: theta_o; None where no loss of the method needs it.
        asked: whether to stop (`stop_asked`).
        resumed: the checkpoint that `model` has been loaded from.

    Returns:
        The model, in the wrapper that the engine has put around it.

    Raises:
        UserError: a loss or the gradient is NaN or infinite.
        Stopped: Ctrl-C or SIGTERM, after a checkpoint.
    """
    accelerator, batches = job.accelerator, job.batches
    if batches.packed_up_to:
        up_to, why = max_packed_length(model, batches.collator)
        if why:
            log.say(f"{f'texts over {up_to} tokens' if up_to else 'all texts'} in plain rows: {why}")
        batches = replace(batches, packed_up_to=up_to)
    weights = loss_weights(vars(args))
    objective = Objective(model, weights, base, args.scaling_coef)
    done = len(log.history)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW([{"params": trained, "initial_lr": args.lr}], lr=args.lr, fused=True)
    model, optimizer = distributed.prepare(accelerator, model, base, optimizer, job.precision)
    inner = accelerator.unwrap_model(model)
    trained = {name: parameter for name, parameter in inner.named_parameters() if parameter.requires_grad}
    set_seed(args.seed + done, device_specific=True)  # of dropout; the draws of data are their own
    if resumed:
        log.say(f"stage 1 goes on after step {done}, from {resumed}")
        if not load_state(resumed, optimizer, trained, accelerator):
            log.say("on other devices or processes than before: dropout draws anew")
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 0, args.max_unlearn_steps, last_epoch=done - 1)

    def keep() -> None:
        if distributed.keeps_checkpoints(accelerator):
            target = checkpoints.at(len(log.history))
            save_copy(model, job, args, log, target, overwrite=True, optimizer=optimizer, trained=trained)
            if is_main_process():
                checkpoints.prune()

    none_kept = "no checkpoint was kept (--save_every N)"
    if not distributed.keeps_checkpoints(accelerator):
        none_kept = "DeepSpeed keeps no checkpoints"
    model.train()
    started = time.perf_counter()
    for step, texts in enumerate(batches.ahead(range(done, args.max_unlearn_steps), accelerator.device), done):
        loss = {}
        for part, each in objective(model, texts):
            accelerator.backward(part * accelerator.num_processes)  # engines average over processes
            loss |= each
        grad_norm = distributed.gradient_norm(accelerator, trained.values())
        counts = torch.tensor([sum(batch.tokens for batch in texts if batch), asked()], device=accelerator.device)
        measured = accelerator.reduce(torch.stack([*loss.values(), *counts.float()]), "sum").tolist()
        measured = dict(zip([*loss, "tokens", "asked"], measured, strict=True))
        metrics = {
            "step": step + 1,
            **{f"{name}_loss": measured[name] + 0.0 if name in loss else None for name in weights},  # no -0.0
            "total_loss": sum(weights[name] * measured[name] for name in loss),
            "lr": scheduler.get_last_lr()[0],
            "grad_norm": grad_norm.item(),
            "tokens": int(measured["tokens"]),
        }
        if wrong := not_finite(metrics):
            if math.isfinite(metrics["total_loss"]) and step:  # the weights are still good
                keep()
            found = checkpoints.newest()
            kept = f"the last good weights are in {found}" if found else none_kept
            log.warn(f"step {step + 1} is not finite ({wrong})")
            raise UserError(f"step {step + 1} is not finite ({wrong}); {kept}: lower --lr or a weight, start again")
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        now = time.perf_counter()
        log.step({**metrics, "seconds": round(now - started, 4)})
        accelerator.log({name: value for name, value in metrics.items() if value is not None}, step=step + 1)
        started = now
        if measured["asked"]:
            keep()
            kept = checkpoints.newest()
            go_on = f"its checkpoint is {kept}: go on with the same command and --resume"
            go_on = go_on if kept else f"{none_kept}: start again"
            raise Stopped(asked() or signal.SIGTERM, f"stopped after step {step + 1}; {go_on}")
        if args.save_every and (step + 1) % args.save_every == 0 and step + 1 < args.max_unlearn_steps:
            keep()
    return model


class Job(NamedTuple):
    """Everything about stage 1 that is known before weights are loaded."""

    base_folder: Path
    tokenizer: PreTrainedTokenizerBase
    lora: Lora | None
    precision: str
    accelerator: Accelerator
    batches: StepBatches
    plan: Plan


def prepare(args: argparse.Namespace, base_folder: Path) -> Job:
    """Read and check all that stage 1 needs, and print the plan. Raises UserError."""
    if any(base_folder.glob("*.safetensors")):
        SafetensorsFolder(base_folder)  # reads the headers: is every shard there and whole
    config = loading.load_config(base_folder)
    if getattr(config, "quantization_config", None):
        raise UserError(f"{args.model_name} is quantized: give the full-precision model")
    tokenizer = loading.load_tokenizer(base_folder, config)
    structure = loading.empty_model(config)
    lora = choose_lora(args, structure)
    accelerator, precision = distributed.start(args)
    if args.quantize:
        check_four_bits(lora, accelerator.device)
    if uses_landing_point(vars(args)) and distributed.engine_of(accelerator) == "DeepSpeed":
        raise UserError("DeepSpeed updates after every backward pass, and landing needs two: use FSDP2 or DDP")
    harmful = read_harmful(
        args.harmful_dataset, args.harmful_revision, args.harmful_split, args.harm_category, args.min_severity
    )
    normal = read_normal(args.normal_dataset, args.seed)
    active = {name for name, weight in loss_weights(vars(args)).items() if weight}
    pool, batch_size = len(answer_pool(active, harmful, normal)), args.batch_size * accelerator.num_processes
    order = BatchSampler(
        len(harmful.pairs),
        normal.train,
        pool,
        batch_size,
        args.k_random if active & {"rd", "rm"} else 0,
        args.seed,
        args.all_harmful,
    )
    limit = loading.context_length(config)
    collator = Collator(tokenizer, args.variant, min(args.max_length or limit, limit))
    # Whether the model can read packed rows is only known once it is loaded.
    trees = bool(active & {"rd", "rm"}) and not args.no_packing
    share = accelerator.process_index, accelerator.num_processes
    batches = StepBatches(collator, order, harmful, normal, active, math.inf if trees else 0, share)
    plan = make_plan(
        batches,
        args.max_unlearn_steps,
        structure,
        lora,
        precision,
        args.gradient_checkpointing,
        bool(args.quantize),
        shards=accelerator.num_processes if distributed.holds_shards(accelerator) else 1,
        checkpoints=args.keep_checkpoints + 1 if args.save_every else 0,
    )
    how = f"LoRA (r {lora.r}, alpha {lora.alpha}, {', '.join(lora.target_modules)})" if lora else "every weight"
    how += " on a 4-bit base" * bool(args.quantize)
    minimised = " + ".join(f"{weight:g} {name.upper()}" for name, weight in loss_weights(vars(args)).items() if weight)
    where = f"{accelerator.device}, {accelerator.num_processes} process{'es' * (accelerator.num_processes > 1)}"
    if accelerator.num_processes > 1:
        where += f" ({distributed.engine_of(accelerator)})"
    print_once(
        f"method         {args.method}, minimises {minimised.replace('+ -', '- ')}\n"
        f"model          {args.model_name}: trains {how} in {precision} on {where}\n{plan}"
    )
    return Job(base_folder, tokenizer, lora, precision, accelerator, batches, plan)


def choose_lora(args: argparse.Namespace, structure: PreTrainedModel) -> Lora | None:
    """LoRA's settings for this model by the flags and MODELS, or None for full fine-tuning.

    Raises:
        UserError: the model has no module of that name, or a LoRA flag is given for full fine-tuning.
    """
    large = structure.num_parameters() > LORA_ABOVE
    listed = MODELS.get(args.model_name, OTHER_MODELS if large else None)
    given = {
        "r": args.lora_r,
        "alpha": args.lora_alpha,
        "target_modules": tuple(args.lora_target_modules) if args.lora_target_modules else None,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if args.lora == "off" or (args.lora == "auto" and listed is None):
        if given:
            raise UserError(f"--lora_{next(iter(given))} does nothing in full fine-tuning: add --lora on")
        return None
    lora = replace(listed or OTHER_MODELS, **given)
    if args.model_name not in MODELS and not args.lora_target_modules:
        linear = lora_candidates(structure)
        if not set(lora.target_modules) <= set(linear):
            lora = replace(lora, target_modules=tuple(linear))  # no q_proj and v_proj here: every linear layer
    check_lora_targets(structure, lora)
    return lora


def check_four_bits(lora: Lora | None, device: torch.device) -> None:
    """Raises UserError where a base in 4 bits cannot be trained on."""
    if not lora:
        raise UserError("--quantize trains an adapter on a base that stays in 4 bits: add --lora on")
    if find_spec("bitsandbytes") is None:
        raise UserError("--quantize 4bit needs bitsandbytes: pip install bitsandbytes, or leave it out")
    if device.type != "cuda":  # bitsandbytes packs weights anew for a CPU's inference, which stops gradients
        raise UserError(f"--quantize 4bit needs a CUDA GPU, and the device here is {device}: leave it out")


def load_copy_and_base(
    args: argparse.Namespace, job: Job, resumed: Path | None = None
) -> tuple[PreTrainedModel, ReferenceModel | None]:
    """The copy theta to train, and theta_o: a frozen second copy, or theta with its adapter off.

    theta_o is None in full fine-tuning by losses that do not need it.

    Trained weights are float32; frozen ones are in the compute precision, or, with --quantize, in 4 bits.

    Args:
        resumed: a checkpoint whose weights theta gets in place of the base's.
    """
    # Where each process is to hold a part, the engine takes it from the computer's memory.
    device = torch.device("cpu") if distributed.holds_shards(job.accelerator) else job.accelerator.device
    frozen = torch.bfloat16 if job.precision == "bf16" else torch.float32
    dtype = frozen if job.lora else torch.float32
    source = resumed if resumed and not job.lora else job.base_folder
    model = loading.load_model(source, dtype, args.device_map, bool(args.quantize))
    if not (hasattr(model, "hf_device_map") or args.quantize):  # else it is where a device_map put it
        model.to(device)
    if job.lora:
        model = add_lora(model, job.lora, args.model_name)
        if resumed:
            fill_adapter(model, resumed)
        base = ReferenceModel(model)
    elif not job.batches.losses & terms.NEED_BASE:
        base = None
    else:
        # A landing point is computed from the base and the copy, in the copy's precision.
        dtype = torch.float32 if uses_landing_point(vars(args)) else frozen
        base = ReferenceModel(loading.load_model(job.base_folder, dtype, args.device_map), autocast=dtype != frozen)
        if not hasattr(base.model, "hf_device_map"):
            base.model.to(device)
    loading.enable_gradient_checkpointing(model, args.gradient_checkpointing)
    if uses_landing_point(vars(args)) and not base.shared and any(parameter.is_meta for parameter in base.model.parameters()):
        raise UserError(
            "--device_map keeps a part of the base on the CPU or on disk, and a landing point needs all of it: "
            "use --lora on, or more GPUs"
        )
    return model, base


def save_copy(
    model: torch.nn.Module,
    job: Job,
    args: argparse.Namespace,
    log: RunLog,
    target: Path,
    overwrite: bool,
    optimizer: torch.optim.Optimizer | None = None,
    trained: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Save the copy, or with LoRA its adapter, and what a run needs to go on from it where an optimizer is given.

    Args:
        trained: the optimizer's weights by name.

    Returns:
        `target`.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with system_errors(target), new_folder(target, overwrite) if is_main_process() else nullcontext() as folder:
            distributed.save_model(job.accelerator, model, job.base_folder, folder)
            if optimizer:
                save_state(folder, optimizer, trained, job.accelerator)
            if folder:
                job.tokenizer.save_pretrained(folder)
                write_file(folder / "metrics.jsonl", log.metrics_text)
                write_record(folder, record_of(args, job, log.history))
    except (OSError, UserError) as error:
        newest = TrainingCheckpoints(args.model_save_dir, args.keep_checkpoints).newest()
        after = f"goes on with {newest}, which is whole" if newest else "starts stage 1 again"
        what = str(error)
        if isinstance(error, OSError):
            what = f"{target} cannot be written ({error.strerror or error}): free some space or mend the disk"
        resume = "with --resume " * distributed.keeps_checkpoints(job.accelerator)
        raise UserError(f"{what}, then the same command {resume}{after}") from error
    job.accelerator.wait_for_everyone()
    return target


def record_of(args: argparse.Namespace, job: Job, history: Sequence[dict] = ()) -> dict:
    """What run.json says of the copy after the steps of `history`."""
    last = history[-1] if history else {}
    harmful = METHODS[args.method].negates
    learned = "harmful knowledge acquired" if harmful else "trained, with nothing to negate"
    return {
        "title": f"Stage 1 of {args.method} on {args.model_name}: {learned}",
        "harmful": harmful,
        "base": {
            "name": args.model_name,
            "revision": revision_of(job.base_folder),
            "fingerprint": SafetensorsFolder(job.base_folder).fingerprint(),
        },
        "harmful_data": job.batches.harmful.source,
        "normal_data": job.batches.normal.source,
        "training": {
            "steps": len(history),
            "of": args.max_unlearn_steps,
            "processes": job.accelerator.num_processes,
            "lora": vars(job.lora) if job.lora else None,
            "precision": job.precision,
            "quantized": args.quantize,
            "max_length": job.batches.collator.max_length,
        },
        "losses_at_the_end": {name: last[name] for name in LOSSES if name in last},
        "flags": {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()},
    }


if __name__ == "__main__":
    sys.exit(exit_code(main))
