"""Everything about a run that is known before weights are loaded, and loading them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedModel

from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.pku_saferlhf import read_harmful
from harmful_unlearn.data.step_batches import StepBatches, run_sampler
from harmful_unlearn.data.templates import Template
from harmful_unlearn.data.truthfulqa import read_normal
from harmful_unlearn.errors import UserError
from harmful_unlearn.losses.methods import active_losses
from harmful_unlearn.losses.packing_check import length_by_config
from harmful_unlearn.losses.terms import NEED_BASE, reads
from harmful_unlearn.models import hub, loading
from harmful_unlearn.models.blocks import mlp_outputs, steered_layer, trained_blocks
from harmful_unlearn.models.lora import Lora, add_lora, fill_adapter
from harmful_unlearn.models.reference import ReferenceModel
from harmful_unlearn.storage.files import check_apart
from harmful_unlearn.storage.provenance import check_folder, revision_of
from harmful_unlearn.storage.run_record import RunRecord
from harmful_unlearn.storage.safetensors_io import SafetensorsFolder
from harmful_unlearn.training import distributed
from harmful_unlearn.training.adapter import check_four_bits, choose_lora
from harmful_unlearn.training.checkpointing import TrainingCheckpoints
from harmful_unlearn.training.distributed import print_once
from harmful_unlearn.training.flags import TrainingSettings
from harmful_unlearn.training.plan import Plan, check_disk, make_plan
from harmful_unlearn.training.recorded_flags import folder_of, read_training
from harmful_unlearn.training.replay import check_replay
from harmful_unlearn.training.resume import check_stages, remaining_work
from harmful_unlearn.training.run_log import RunLog


def default_tokens_per_pass(device: torch.device) -> int:
    """--tokens_per_pass where it is not given: a CPU is as fast with few rows at a time, a GPU is not."""
    return 1024 if device.type == "cpu" else 8192


@dataclass(frozen=True)
class Stage1:
    """A stage 1 run, before weights are loaded.

    Attributes:
        base_folder: of theta_o.
        lora: the adapter's settings; None trains every weight.
        precision: "fp32" or "bf16" (trained weights are float32 in both).
        accelerator: of one process or several (distributed.py).
        batches: of each step.
        plan: what the run will read, compute and keep in memory.
        blocks: the layers that are trained, from 0 (with LoRA, that have an adapter); None: all.
        checkpoint: that the run continues from; None for a new one.
    """

    settings: TrainingSettings
    base_folder: Path
    lora: Lora | None
    precision: str
    accelerator: Accelerator
    batches: StepBatches
    plan: Plan
    blocks: list[int] | None = None
    checkpoint: Path | None = None

    @property
    def template(self) -> Template:
        """The template of all texts, with the tokenizer."""
        return self.batches.collator.template

    @property
    def checkpoints(self) -> TrainingCheckpoints:
        """The run's checkpoints."""
        return TrainingCheckpoints(self.settings.model_save_dir, self.settings.keep_checkpoints)

    def record(self, log: RunLog | None = None) -> RunRecord:
        """run.json of the model after the steps that `log` has; without a log, before the first step."""
        settings, history, template = self.settings, log.history if log else [], self.template
        last = history[-1] if history else {}
        learned = "harmful knowledge acquired" if settings.negates else "trained, with nothing to negate"
        return RunRecord(
            title=f"Stage 1 of {settings.method} on {settings.model_name}: {learned}",
            harmful=settings.negates,
            base={
                "name": settings.model_name,
                "revision": revision_of(self.base_folder),
                "fingerprint": SafetensorsFolder(self.base_folder).fingerprint(),
                "files": hub.file_hashes(self.base_folder),
            },
            harmful_data=self.batches.harmful.source,
            normal_data=self.batches.normal.source,
            training={
                "steps": len(history),
                "of": settings.max_unlearn_steps,
                "processes": self.accelerator.num_processes,
                "lora": vars(self.lora) if self.lora else None,
                "precision": self.precision,
                "quantized": settings.quantize,
                "max_length": self.batches.collator.max_length,
                "template": template.name,
                "system_prompt": template.system_prompt,
            },
            losses_at_the_end={name: value for name, value in last.items() if name.endswith("_loss")},
            flags=log.flags() if log else settings.to_json(),
            negates=settings.negates,
            landing_alpha=settings.scaling_coef if settings.uses_landing_point else None,
            prompt_template=template.text,
        )


@dataclass(frozen=True)
class Run:
    """A run of the script, once everything but the weights has been read and checked.

    Attributes:
        base_folder: of theta_o.
        stages: that are still to run: "acquire", "negate".
        stage_1: None if the flags ask for stage 2 only.
        notes: for the log: what has changed since the run that is resumed.
    """

    settings: TrainingSettings
    base_folder: Path
    stages: frozenset[str]
    stage_1: Stage1 | None = None
    notes: tuple[str, ...] = ()

    @property
    def outputs(self) -> list[Path]:
        """The folders that the stages will write."""
        settings = self.settings
        of_stage = {"acquire": settings.model_save_dir, "negate": settings.task_vector_saving_path}
        return [of_stage[stage] for stage in sorted(self.stages)]

    @property
    def has_weights(self) -> bool:
        """Whether the base's weights are on this machine; with --check they are not downloaded."""
        return any(self.base_folder.glob("*.safetensors"))


def prepare(settings: TrainingSettings, table: Mapping[str, Lora | None], others: Lora) -> Run:
    """Read and check everything but the weights, and print the plan of stage 1.

    Args:
        table: LoRA settings by model name (MODELS in the script); None for full fine-tuning.
        others: LoRA settings of large models that are not in the table.

    Raises:
        UserError: data, model, flags, folders and machine do not fit together.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    stages = check_stages(settings)
    if settings.replay:
        check_folder(read_training(settings.replay)[0].more, settings.to_json(), settings.replay)
    base_folder = hub.resolve_model(settings.model_name, weights=False)
    folders = [base_folder, settings.harmful_model, settings.task_vector_saving_path]
    stage_1 = None
    if "acquire" in stages:
        checkpoints = TrainingCheckpoints(settings.model_save_dir, settings.keep_checkpoints)
        check_apart([*folders, checkpoints.folder])
        stage_1 = prepare_stage_1(settings, base_folder, table, others)
        if not (settings.resume and (settings.model_save_dir / "run.json").is_file()):  # else it is likely finished
            check_disk(settings.model_save_dir, stage_1.plan.disk - checkpoints.size())
    else:
        check_apart(folders)
    if not settings.check:
        base_folder = hub.resolve_model(settings.model_name)  # a hub model is downloaded once all else is checked
        stage_1 = stage_1 and replace(stage_1, base_folder=base_folder)  # it may be another revision's
    run = Run(settings, base_folder, stages, stage_1)
    notes: tuple[str, ...] = ()
    if settings.replay and stage_1 and run.has_weights:
        check_apart([folder_of(settings.replay), *run.outputs])
        notes = tuple(check_replay(settings.replay, stage_1.record()))
        print_once("\n".join(f"replay: {note}" for note in notes))
        run = replace(run, notes=notes)
    if not (settings.resume and run.has_weights):
        return run
    work = remaining_work(settings, stage_1.record() if stage_1 else None, base_folder, stages)
    for note in work.notes:
        print_once(f"note: {note}")
    settings = replace(settings, log_file=settings.log_file or work.log_file)
    stage_1 = stage_1 and replace(stage_1, settings=settings, checkpoint=work.checkpoint)
    return Run(settings, base_folder, work.stages, stage_1, notes + work.notes)


def prepare_stage_1(
    settings: TrainingSettings, base_folder: Path, table: Mapping[str, Lora | None], others: Lora
) -> Stage1:
    """Read and check everything that stage 1 needs but the weights, and print the plan. As `prepare`."""
    config = loading.load_config(base_folder)
    if getattr(config, "quantization_config", None):
        raise UserError(f"{settings.model_name} is quantized: give the full-precision model")
    template = settings.template_choice.of(loading.load_tokenizer(base_folder, config))
    structure = loading.empty_model(config)
    if any(base_folder.glob("*.safetensors")):  # reads the headers: is every shard there and complete
        loading.check_layers(structure, SafetensorsFolder(base_folder).specs, base_folder)
    lora = choose_lora(settings, structure, table, others)
    steers = "rmu" in active_losses(vars(settings))
    blocks = trained_blocks(steered_layer(config, settings.loss_parameters.rmu_layer)) if steers else None
    accelerator, precision = distributed.start(settings)
    if settings.quantize:
        check_four_bits(lora, accelerator.device)
    if settings.max_grad_norm and distributed.engine_of(accelerator) == "DeepSpeed":
        raise UserError("--max_grad_norm does not work with DeepSpeed: set gradient_clipping in its file")
    if settings.uses_landing_point and distributed.engine_of(accelerator) == "DeepSpeed":
        raise UserError("DeepSpeed updates after every backward pass, and landing needs two: use FSDP2 or DDP")
    harmful = read_harmful(
        settings.harmful_dataset,
        settings.harmful_revision,
        settings.harmful_split,
        settings.harm_category,
        settings.min_severity,
    )
    normal = read_normal(settings.normal_dataset, settings.seed, settings.more_normal_dataset)
    needed = reads(active_losses(vars(settings)))
    limit = loading.context_length(config)
    collator = Collator(template, settings.variant, min(settings.max_length or limit, limit))
    sampler = run_sampler(vars(settings), accelerator.num_processes, harmful, normal, needed)
    # Whether the model can read packed rows is only known for certain once it is loaded.
    packed_up_to = 0 if settings.no_packing else length_by_config(structure.config)[0]
    share = (accelerator.process_index, accelerator.num_processes)
    tokens_per_pass: float = settings.tokens_per_pass or default_tokens_per_pass(accelerator.device)
    if distributed.engine_of(accelerator) == "DeepSpeed":  # it updates after every backward pass
        if settings.tokens_per_pass:
            raise UserError("--tokens_per_pass does not work with DeepSpeed: leave it out, or use FSDP2 or DDP")
        tokens_per_pass = math.inf
    batches = StepBatches(collator, sampler, harmful, normal, needed, packed_up_to, tokens_per_pass, share)
    shards = accelerator.num_processes if distributed.shards_weights(accelerator) else 1
    plan = make_plan(settings, batches, structure, lora, precision, shards, accelerator.device, blocks)
    print_once(f"{_describe(settings, template, lora, blocks, precision, accelerator)}\n{plan}")
    return Stage1(settings, base_folder, lora, precision, accelerator, batches, plan, blocks)


def _describe(
    settings: TrainingSettings,
    template: Template,
    lora: Lora | None,
    blocks: list[int] | None,
    precision: str,
    accelerator: Accelerator,
) -> str:
    terms = " + ".join(f"{weight:g} {name.upper()}" for name, weight in settings.loss_weights.items() if weight)
    trained = f"LoRA (r {lora.r}, alpha {lora.alpha}, {', '.join(lora.target_modules)})" if lora else "every weight"
    if blocks:
        trained = f"{trained} of layers" if lora else "the MLPs' output weights of layers"
        trained += f" {blocks[0] + 1} to {blocks[-1] + 1}"
    if settings.quantize:
        trained += " on a 4-bit base"
    machine = f"{accelerator.device}, 1 process"
    if accelerator.num_processes > 1:
        engine = distributed.engine_of(accelerator)
        machine = f"{accelerator.device}, {accelerator.num_processes} processes ({engine})"
    return (
        f"method         {settings.method}, minimises {terms.replace('+ -', '- ')}\n"
        f"template       {template.name}: {template.text!r}\n"
        f"model          {settings.model_name}: trains {trained} in {precision} on {machine}"
    )


def _load(run: Stage1, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model in `folder`, without values in a process that will get its shards from the main one."""
    settings, made = run.settings, []

    def load() -> bool:
        made.append(loading.load_model(folder, dtype, settings.device_map, bool(settings.quantize)))
        return loading.is_tied(made[0])

    tied = distributed.of_main_process(run.accelerator, load)
    return made[0] if made else loading.unfilled_model(folder, dtype, tied)


def load_models(run: Stage1) -> tuple[PreTrainedModel, ReferenceModel | None]:
    """theta, the model to train, and theta_o: a frozen second copy, or theta with its adapter switched off.

    theta_o is None in full fine-tuning by losses that do not need it. Trained weights are float32; frozen ones are in
    the compute precision, or, with --quantize, in 4 bits. Where weights are sharded, the main process alone has values,
    which the engine will spread.

    Raises:
        UserError, MemoryError: as `loading.load_model`.
    """
    settings, accelerator = run.settings, run.accelerator
    set_seed(settings.seed)  # of the adapter's first weights
    # An engine that shards takes each process's shard from the computer's memory.
    device = torch.device("cpu") if distributed.shards_weights(accelerator) else accelerator.device
    frozen = torch.bfloat16 if run.precision == "bf16" else torch.float32
    dtype = frozen if run.lora else torch.float32
    source = run.checkpoint if run.checkpoint and not run.lora else run.base_folder
    model = _load(run, source, dtype)
    if not (hasattr(model, "hf_device_map") or settings.quantize):  # else it is where a device_map put it
        model.to(device)
    if run.blocks and not run.lora:
        model.requires_grad_(False)
        for weight in mlp_outputs(model, run.blocks):
            weight.requires_grad_(True)
    base: ReferenceModel | None = None
    if run.lora:
        model = add_lora(model, run.lora, settings.model_name, run.blocks)
        if run.checkpoint:
            fill_adapter(model, run.checkpoint)
        base = ReferenceModel(model)
    elif active_losses(vars(settings)) & NEED_BASE:
        # The landing point is computed from base and model, in the model's precision.
        dtype = torch.float32 if settings.uses_landing_point else frozen
        copy = _load(run, run.base_folder, dtype)
        base = ReferenceModel(copy, run.precision)
        if not hasattr(copy, "hf_device_map"):
            copy.to(device)
    loading.enable_gradient_checkpointing(model, settings.gradient_checkpointing)
    offloaded = base and not base.shared and any(parameter.is_meta for parameter in base.model.parameters())
    if settings.uses_landing_point and offloaded:
        raise UserError(
            "--device_map keeps a part of the base on the CPU or on disk, and a landing point needs all of it: "
            "use --lora on, or more GPUs"
        )
    return model, base
