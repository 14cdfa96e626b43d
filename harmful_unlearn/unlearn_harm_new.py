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
One of the methods that the paper compares with (the tables in methods.py):
    python unlearn_harm_new.py --model_name facebook/opt-2.7b --method task_vector
"""

import argparse
import math
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, wherever one stands

import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from harmful_unlearn import losses, models
from harmful_unlearn.checkpoints import Checkpoint, read_record
from harmful_unlearn.data import BatchOrder, read_harmful, read_normal
from harmful_unlearn.errors import UserError, exit_code
from harmful_unlearn.flags import parse_flags
from harmful_unlearn.methods import METHODS, lands, loss_weights
from harmful_unlearn.models import FrozenBase, Lora
from harmful_unlearn.negation import check_landing, negate
from harmful_unlearn.packing import Packer, StepBatches, answer_pool
from harmful_unlearn.plan import Plan, check_disk, make_plan
from harmful_unlearn.probe import packs_up_to
from harmful_unlearn.run_log import LOSSES, METRICS, PICTURE, RunLog, beside, is_finite
from harmful_unlearn.saving import (
    check_apart,
    check_file,
    check_target,
    new_folder,
    real,
    revision_of,
    write_file,
    write_record,
)
from harmful_unlearn.sources import open_matched

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
# The trained weights are copied to the computer's memory now and then, to go back to if a loss becomes NaN.
SNAPSHOT_EVERY = 50  # steps
OTHER_MODELS = Lora(r=32, alpha=16, target_modules=("q_proj", "v_proj"))


def main(arguments: list[str] | None = None) -> None:
    """Run the stages that the flags ask for. Raises UserError before any work that cannot end well."""
    args = parse_flags(arguments, __doc__)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    stages = check_stages(args)
    folder = models.locate(args.model_name, weights=False)
    finetuned = args.saved_model or args.model_save_dir
    check_apart([folder, finetuned, args.task_vector_saving_path])
    job = prepare(args, folder) if "acquire" in stages else None
    if not args.check:
        folder = models.locate(args.model_name)  # a hub model's weights are downloaded once all else is well
    if "acquire" not in stages and any(folder.glob("*.safetensors")):
        open_matched(folder, [finetuned])
        check_landing([(finetuned, 1.0)], [args.scaling_coef])
    if args.check:
        print("check passed: nothing was loaded or written")
        return

    if job:
        set_seed(args.seed)
        accelerator = Accelerator(mixed_precision="bf16" if job.precision == "bf16" else "no")
        model, base = load_copy_and_base(args, job, folder, accelerator.device)
    log = RunLog(args.log_file, args.max_unlearn_steps)  # now that all has been found good
    try:
        if job:
            log.record(str(job.plan))
            what = "harmful knowledge acquisition" if METHODS[args.method].negates else f"training by {args.method}"
            log.say(f"stage 1, {what}: {args.model_name} -> {args.model_save_dir}")
            try:
                acquire(model, base, job.batches, args, accelerator, log)
            except NotFinite as stop:
                log.warn(str(stop))
                kept = "no weights were worth keeping"
                if stop.good:
                    target = free_name(args.model_save_dir, f".step-{stop.good}")
                    save_copy(model, job, folder, target, args, log, steps=stop.good)
                    kept = f"the weights after step {stop.good} are in {target}"
                raise UserError(f"{stop}; {kept}: lower --lr or a weight") from None
            if finetuned.exists() and any(finetuned.iterdir()) and not args.overwrite:
                log.warn(f"{finetuned} was filled by something else meanwhile")
                finetuned = free_name(finetuned, ".new")
            save_copy(model, job, folder, finetuned, args, log, steps=args.max_unlearn_steps)
            del model, base
        if "negate" in stages:
            negates = METHODS[args.method].negates
            what = "knowledge negation" if negates else "no negation, the copy in the base's dtype"
            log.say(f"stage 2, {what}: {finetuned} -> {args.task_vector_saving_path}")
            negate(
                folder, [(finetuned, 1.0)], args.task_vector_saving_path,
                args.scaling_coef if negates else -1.0, base_name=args.model_name, overwrite=args.overwrite,
            )  # fmt: skip
            log.say(f"unlearned model saved: {args.task_vector_saving_path}")
    finally:
        log.close()


def acquire(
    model: PreTrainedModel,
    base: FrozenBase | None,
    batches: StepBatches,
    args: argparse.Namespace,
    accelerator: Accelerator,
    log: RunLog,
) -> None:
    """Stage 1: train `model` in place for --max_unlearn_steps (released code, points 7 to 15).

    Args:
        base: theta_o; None where no loss of the method needs it.

    Raises:
        NotFinite: a loss or the gradient is NaN or infinite; `model` has its last good weights again.
    """
    if batches.packed_up_to:
        up_to, why = packs_up_to(model, batches.packer)
        if why:
            log.say(f"{f'texts over {up_to} tokens' if up_to else 'all texts'} in plain rows: {why}")
        batches = replace(batches, packed_up_to=up_to)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, fused=True)
    weights = loss_weights(args)
    objective = losses.Objective(model, weights, base, args.scaling_coef)
    model, optimizer = accelerator.prepare(model, optimizer)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 0, args.max_unlearn_steps)
    good, good_weights = 0, []  # the last step kept, whose weights gave finite losses
    model.train()
    started = time.perf_counter()
    for step, texts in enumerate(batches.ahead(range(args.max_unlearn_steps), accelerator.device)):
        loss = {}
        for part, each in objective(model, texts):
            accelerator.backward(part)
            loss |= each
        total = sum((weights[name] * value for name, value in loss.items()), torch.zeros((), device=accelerator.device))
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        measured = {"total": total, "grad": grad_norm.to(total.device), **loss}
        measured = dict(zip(measured, torch.stack([*measured.values()]).tolist(), strict=True))
        metrics = {
            "step": step + 1,
            **{f"{name}_loss": measured[name] + 0.0 if name in loss else None for name in weights},  # no -0.0
            "total_loss": measured["total"],
            "lr": scheduler.get_last_lr()[0],
            "grad_norm": measured["grad"],
            "tokens": sum(batch.tokens for batch in texts if batch),
        }
        if not math.isfinite(metrics["total_loss"]):  # the last update spoilt the weights
            for parameter, kept in zip(trained, good_weights, strict=False):
                parameter.data.copy_(kept)
            raise NotFinite(good, metrics)
        if not is_finite(metrics):
            raise NotFinite(step, metrics)
        if step and step % SNAPSHOT_EVERY == 0:
            good, good_weights = step, [parameter.detach().to("cpu", copy=True) for parameter in trained]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        now = time.perf_counter()
        log.step({**metrics, "seconds": round(now - started, 4)})
        started = now


class NotFinite(Exception):
    """A loss or the gradient of a step is NaN or infinite.

    Attributes:
        good: the step whose weights the model has now; 0 where none is worth keeping.
    """

    def __init__(self, good: int, metrics: dict):
        self.good = good
        wrong = ", ".join(f"{name} {value}" for name, value in metrics.items() if not is_finite({name: value}))
        super().__init__(f"step {metrics['step']} is not finite ({wrong})")


def free_name(folder: Path, suffix: str) -> Path:
    """`folder` with the suffix, and a number if that is taken."""
    for tried in count(1):
        found = folder.with_name(folder.name + suffix + (f"-{tried}" if tried > 1 else ""))
        if not found.exists():
            return found


class Job(NamedTuple):
    """Everything about stage 1 that is known before weights are loaded."""

    tokenizer: PreTrainedTokenizerBase
    lora: Lora | None
    precision: str
    batches: StepBatches
    plan: Plan


def prepare(args: argparse.Namespace, base_folder: Path) -> Job:
    """Read and check all that stage 1 needs, and print the plan. Raises UserError."""
    machine = PartialState()
    if machine.num_processes > 1:
        raise UserError("run one process: several are not supported yet (--device_map auto uses every GPU)")
    if any(base_folder.glob("*.safetensors")):
        Checkpoint(base_folder)  # reads the headers: is every shard there and whole
    config = models.load_config(base_folder)
    if getattr(config, "quantization_config", None):
        raise UserError(f"{args.model_name} is quantized: give the full-precision model")
    tokenizer = models.load_tokenizer(base_folder, config)
    structure = models.empty_model(config)
    lora = choose_lora(args, structure)
    if args.quantize:
        check_four_bits(lora, machine.device)
    precision = models.resolve_precision(args.precision, machine.device)
    harmful = read_harmful(
        args.harmful_dataset, args.harmful_revision, args.harmful_split, args.harm_category, args.min_severity
    )
    normal = read_normal(args.normal_dataset, args.seed)
    active = {name for name, weight in loss_weights(args).items() if weight}
    order = BatchOrder(
        len(harmful.pairs), normal.train, len(answer_pool(active, harmful, normal)),
        args.batch_size, args.k_random if active & {"rd", "rm"} else 0, args.seed, args.all_harmful,
    )  # fmt: skip
    limit = models.context_length(config)
    packer = Packer(tokenizer, args.variant, min(args.max_length or limit, limit))
    # Whether the model can read packed rows is only known once it is loaded.
    trees = bool(active & {"rd", "rm"}) and not args.no_packing
    batches = StepBatches(packer, order, harmful, normal, active, math.inf if trees else 0)
    plan = make_plan(
        batches, args.max_unlearn_steps, structure, lora, precision, args.gradient_checkpointing, bool(args.quantize)
    )
    how = f"LoRA (r {lora.r}, alpha {lora.alpha}, {', '.join(lora.target_modules)})" if lora else "every weight"
    how += " on a 4-bit base" * bool(args.quantize)
    minimised = " + ".join(f"{weight:g} {name.upper()}" for name, weight in loss_weights(args).items() if weight)
    print(f"method         {args.method}, minimises {minimised.replace('+ -', '- ')}\n"
          f"model          {args.model_name}: trains {how} in {precision} on {machine.device}\n{plan}")
    check_disk(args.model_save_dir, plan.disk)
    return Job(tokenizer, lora, precision, batches, plan)


def choose_lora(args: argparse.Namespace, structure: PreTrainedModel) -> Lora | None:
    """LoRA's settings for this model by the flags and MODELS, or None for full fine-tuning.

    Raises:
        UserError: the model has no module of that name, or a LoRA flag is given for full fine-tuning.
    """
    large = structure.num_parameters() > models.LORA_ABOVE
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
        linear = models.lora_candidates(structure)
        if not set(lora.target_modules) <= set(linear):
            lora = replace(lora, target_modules=tuple(linear))  # no q_proj and v_proj here: every linear layer
    models.check_lora_targets(structure, lora)
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
    args: argparse.Namespace, job: Job, base_folder: Path, device: torch.device
) -> tuple[PreTrainedModel, FrozenBase | None]:
    """The copy theta to train, and theta_o: a frozen second copy, or theta with its adapter off.

    theta_o is None in full fine-tuning by losses that do not need it.

    Trained weights are float32; frozen ones are in the compute precision, or, with --quantize, in 4 bits.
    """
    frozen = torch.bfloat16 if job.precision == "bf16" else torch.float32
    dtype = frozen if job.lora else torch.float32
    model = models.load_model(base_folder, dtype, args.device_map, bool(args.quantize))
    if not (args.device_map or args.quantize):
        model.to(device)
    if job.lora:
        model = models.add_lora(model, job.lora, args.model_name)
        base = FrozenBase(model)
    elif not job.batches.losses & losses.NEED_BASE:
        base = None
    else:
        # A landing point is computed from the base and the copy, in the copy's precision.
        dtype = torch.float32 if lands(args) else frozen
        base = FrozenBase(models.load_model(base_folder, dtype, args.device_map), autocast=dtype != frozen)
        if not args.device_map:
            base.model.to(device)
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if places & ({"disk"} if device.type == "cpu" else {"cpu", "disk"}):
        raise UserError(
            "--device_map puts a part of the model where it cannot be trained (CPU or disk): "
            "use --lora on, --precision bf16 or more GPUs"
        )
    if lands(args) and any(parameter.is_meta for parameter in base.model.parameters()):
        raise UserError(
            "--device_map keeps a part of the base on the CPU or on disk, and a landing point needs all of it: "
            "use --lora on, or more GPUs"
        )
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, base


def save_copy(
    model: PreTrainedModel,
    job: Job,
    base_folder: Path,
    target: Path,
    args: argparse.Namespace,
    log: RunLog,
    steps: int,
) -> None:
    """Save the stage 1 model: the whole model, or with LoRA its adapter."""
    last = log.history[steps - 1]
    harmful = METHODS[args.method].negates
    learned = "harmful knowledge acquired" if harmful else "trained, with nothing to negate"
    record = {
        "title": f"Stage 1 of {args.method} on {args.model_name}: {learned}",
        "harmful": harmful,
        "base": {
            "name": args.model_name,
            "revision": revision_of(base_folder),
            "fingerprint": Checkpoint(base_folder).fingerprint(),
        },
        "harmful_data": job.batches.harmful.source,
        "normal_data": job.batches.normal.source,
        "training": {
            "steps": steps,
            "of": args.max_unlearn_steps,
            "lora": vars(job.lora) if job.lora else None,
            "precision": job.precision,
            "quantized": args.quantize,
        },
        "losses_at_the_end": {name: last[name] for name in LOSSES if name in last},
        "flags": {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()},
    }
    with new_folder(target, args.overwrite) as folder:
        models.save_model(model, base_folder, folder)
        job.tokenizer.save_pretrained(folder)
        write_file(folder / "metrics.jsonl", log.metrics_text)
        write_record(folder, record)
    log.say(f"stage 1 model saved: {target}" + " (deliberately harmful)" * harmful)


def check_stages(args: argparse.Namespace) -> set[str]:
    """Which stages will run, and whether their folders can be read and written. Raises UserError."""
    stages = {"acquire", "negate"} if args.stage == "all" else {args.stage}
    if args.saved_model:
        if args.stage == "acquire":
            raise UserError("--saved_model is the start of stage 2: leave out --stage acquire")
        stages = {"negate"}
    if "acquire" in stages:
        check_target(args.model_save_dir, args.overwrite)
    if "negate" in stages:
        finetuned = args.saved_model or args.model_save_dir
        if "acquire" not in stages:
            if not finetuned.is_dir():
                raise UserError(f"there is no stage 1 model in {finetuned}: run stage 1, or give --saved_model")
            trained_by = read_record(finetuned).get("flags", {}).get("method")
            if trained_by not in (None, args.method):
                raise UserError(f"{finetuned} was trained by --method {trained_by}: give that, not {args.method}")
        check_target(args.task_vector_saving_path, args.overwrite)
    for file in (args.log_file, beside(args.log_file, METRICS), beside(args.log_file, PICTURE)):
        check_file(file)
    for folder in (args.model_save_dir, args.task_vector_saving_path):
        if real(args.log_file).is_relative_to(real(folder)):
            raise UserError(f"--log_file {args.log_file} lies in {folder}, which must be empty: put it elsewhere")
    return stages


if __name__ == "__main__":
    sys.exit(exit_code(main))
