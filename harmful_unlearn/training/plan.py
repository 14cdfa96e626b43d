"""What a run will do and need, before it costs anything: the figures that `--check` prints."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from harmful_unlearn.data.batch import Batch
from harmful_unlearn.data.step_batches import StepBatch, StepBatches
from harmful_unlearn.errors import NoSafeAnswers, UserError
from harmful_unlearn.losses.fused_linear import chunk_rows
from harmful_unlearn.losses.methods import active_losses
from harmful_unlearn.losses.terms import LOSSES, NEED_BASE
from harmful_unlearn.models.blocks import blocks_of, mlp_outputs
from harmful_unlearn.models.lora import Lora, add_lora, linear_layers
from harmful_unlearn.models.tree_attention import TREE
from harmful_unlearn.training.flags import TrainingSettings

GIB = 2**30
STEPS_SAMPLED = 25
SAVED_VALUES = 20  # for each token, layer and hidden unit, where they cannot be counted; about right for LLaMA
# Measured on a CPU (benchmarks/memory.py measures runs): Python with its libraries and the data, and what oneDNN keeps
# for the shapes that it has met.
PROGRAM = {"fp32": {"program": 0.6 * GIB}, "bf16": {"program": 0.6 * GIB, "oneDNN": 0.3 * GIB}}
WHOLE_LOGITS = 4  # float32 copies of logits where they are not computed in chunks: for a softcap, the loss, gradients
HOLES = 0.5  # of the activations: what the heap keeps of earlier steps, whose tensors had other sizes
CHECKPOINT_BYTES = 12  # a trained weight and AdamW's two moments
FOUR_BIT_BYTES = 0.516  # a weight in NF4 with quantized scales


@dataclass(frozen=True)
class Plan:
    """The figures of a stage 1 run.

    Attributes:
        rows, pairs, answers, normal: data rows read, harmful pairs selected, answers in the RD pool,
            normal texts trained on.
        tasks: those of the normal texts that are everyday tasks.
        steps, batches_per_epoch: optimizer steps, and how many make an epoch.
        pairs_seen: different harmful pairs that are trained on.
        cut: harmful pairs and normal texts among those seen that --max_length cuts.
        cut_in_rd: rows of all steps that it cuts in RD, estimated from a sample of them.
        tokens: text tokens in all steps, estimated from a sample of them.
        parameters, trainable: of the model.
        memory: bytes by purpose, estimated.
        disk: bytes that the saved folders take.
    """

    rows: int
    pairs: int
    answers: int
    normal: int
    tasks: int
    steps: int
    batches_per_epoch: int
    pairs_seen: int
    cut: int
    cut_in_rd: int
    tokens: int
    parameters: int
    trainable: int
    memory: dict[str, float]
    disk: float

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.memory.items() if size >= GIB / 200)
        epochs = self.steps / self.batches_per_epoch
        tasks = f", {self.tasks:,} of them everyday tasks" if self.tasks else ""
        return "\n".join(
            [
                f"harmful data   {self.rows:,} rows, {self.pairs:,} pairs, {self.answers:,} answers in the pool",
                f"normal data    {self.normal:,} texts to train on{tasks}",
                f"steps          {self.steps:,} ({epochs:.1f} epochs of {self.batches_per_epoch:,}); "
                f"{self.pairs_seen:,} different harmful pairs are seen",
                f"tokens         about {self.tokens:,} of text; {self.cut:,} texts cut to --max_length, "
                f"and about {self.cut_in_rd:,} of RD's rows",
                f"parameters     {self.parameters:,}, {self.trainable:,} of them trained",
                f"memory         about {sum(self.memory.values()) / GIB:.2f} GiB a process ({parts})",
                f"disk           about {self.disk / GIB:.2f} GiB",
            ]
        )


def make_plan(
    settings: TrainingSettings,
    batches: StepBatches,
    structure: PreTrainedModel,
    lora: Lora | None,
    precision: str,
    shards: int,
    device: torch.device,
    blocks: list[int] | None = None,
) -> Plan:
    """Count what a run will read, compute and keep in memory.

    Args:
        batches: the training loop's own, so that what is counted is what is run.
        structure: the model on the meta device.
        shards: how many processes the model and AdamW's state are sharded over.
        device: on a CPU the program itself and what its libraries and its heap keep are counted, too.
        blocks: the layers that are trained, as in `setup.Stage1`.

    Raises:
        UserError: no answer has a token left to train on.
        NoSafeAnswers: a loss on safe answers has nothing to learn.
    """
    sampler, harmful, normal = batches.sampler, batches.harmful, batches.normal
    steps, losses = settings.max_unlearn_steps, active_losses(vars(settings))
    different = min(steps, sampler.batches_per_epoch)  # harmful batches repeat in the same order
    seen = sorted({row for step in range(different) for row in sampler[step].harmful_rows})
    pairs = [harmful.pairs[row] for row in seen] + [normal.texts[row] for row in normal.train]
    texts = batches.collator.encode(pairs)
    wanted = batches.reads
    if (wanted.safe_answers or wanted.preferences) and not any(harmful.safe_answers[row] for row in seen):
        problem = f"no unsafe answer that is trained on, in {harmful.source['name']}, has a safe one beside it"
        other = "--method land (--safe_weight 0)" if settings.negates else "a --method that needs none"
        raise NoSafeAnswers(f"{problem}: use {other}")
    harmful_is_read = wanted.own_answers or wanted.random_answers or wanted.harmful_texts or wanted.preferences
    if harmful_is_read and not any(text.answer_start < len(text.input_ids) for text in texts[: len(seen)]):
        raise UserError("--max_length leaves no harmful answer a token: give a larger one")
    sample = range(0, steps, max(1, steps // STEPS_SAMPLED))
    sampled = [part for step in sample for part in batches(step, torch.device("cpu"))]
    cut_in_rd = 0
    if batches.reads.random_answers:
        cut_in_rd = sum(text.cut for step in sample for text in batches.collator.encode(batches.random_pairs(step)))
    tokens = sum(rows.tokens for part in sampled for rows in part if rows) / len(sample) * batches.share[1]
    parameters = structure.num_parameters()
    trainable = parameters
    if lora:
        trainable = _lora_parameters(structure, lora, blocks)
    elif blocks:
        trainable = sum(weight.numel() for weight in mlp_outputs(structure, blocks))
    dtype = structure.config.dtype
    checkpoints = settings.keep_checkpoints + 1 if settings.save_every else 0
    memory = _weights(settings, losses, structure, trainable, lora, precision, shards)
    memory |= _activations(losses, sampled, structure, lora, precision, settings.gradient_checkpointing)
    if blocks:  # later layers are not computed, and the LM head neither
        memory["activations"] *= (blocks[-1] + 1) / structure.config.get_text_config().num_hidden_layers
        memory["logits"] = 0.0
    if device.type == "cpu":
        memory = {**PROGRAM[precision], **memory, "holes": HOLES * memory["activations"]}
    return Plan(
        rows=harmful.rows,
        pairs=len(harmful.pairs),
        answers=len(harmful.answers),
        normal=len(normal.train),
        tasks=normal.tasks,
        steps=steps,
        batches_per_epoch=sampler.batches_per_epoch,
        pairs_seen=len(seen),
        cut=sum(text.cut for text in texts),
        cut_in_rd=round(cut_in_rd * steps / len(sample)),
        tokens=round(tokens * steps),
        parameters=parameters,
        trainable=trainable,
        memory=memory,
        disk=parameters * (dtype.itemsize if dtype else 4) + trainable * (4 + CHECKPOINT_BYTES * checkpoints),
    )


def _lora_parameters(structure: PreTrainedModel, lora: Lora, blocks: list[int] | None) -> int:
    parts = [structure] if blocks is None else [blocks_of(structure)[block] for block in blocks]
    return sum(
        lora.r * sum(module.weight.shape)
        for part in parts
        for name, module in part.named_modules()
        if name.rsplit(".", 1)[-1] in lora.target_modules
    )


def _weights(
    settings: TrainingSettings,
    losses: set[str],
    structure: PreTrainedModel,
    trainable: int,
    lora: Lora | None,
    precision: str,
    shards: int,
) -> dict[str, float]:
    """Bytes of weights, gradients and AdamW's state; exact."""
    parameters, compute = structure.num_parameters(), 2 if precision == "bf16" else 4
    four_bit = 0
    if settings.quantize:
        weights: list[Any] = [layer.weight for _, layer in linear_layers(structure)]
        four_bit = sum(weight.numel() for weight in weights)
    model = (parameters - four_bit) * (compute if lora else 4) + four_bit * FOUR_BIT_BYTES
    model += trainable * 4 if lora else 0
    lands, has_copy = settings.uses_landing_point, not lora and bool(losses & NEED_BASE)
    sizes = {"weights": model, "frozen base": parameters * (4 if lands else compute) if has_copy else 0}
    if lands and has_copy:
        sizes["theta, saved"] = trainable * 4
    if precision == "bf16":
        sizes["bf16 casts"] = trainable * 2
    sizes |= {"gradients": trainable * 4, "AdamW": trainable * 8}
    return {name: size / shards for name, size in sizes.items()}


def _activations(
    losses: set[str],
    sampled: list[StepBatch],
    structure: PreTrainedModel,
    lora: Lora | None,
    precision: str,
    checkpointing: bool,
) -> dict[str, float]:
    """Bytes that the largest pass of a sample of steps needs beside them."""
    passes = [rows for part in sampled for rows in _together(part, losses)]
    largest = max(passes, key=lambda together: sum(rows.input_ids.numel() for rows in together))
    scored = max(rows.row.numel() for together in passes for rows in together)
    config = structure.config.get_text_config()
    head = 0 if lora else config.vocab_size * config.hidden_size * (2 if precision == "bf16" else 4)
    logits, chunk = (rows * config.vocab_size * 4 for rows in (scored, chunk_rows(config.vocab_size)))
    scales = (getattr(config, name, None) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"))
    in_chunks = all(scale in (None, 1.0) for scale in scales)  # else the LM head's output is not yet the logits
    return {
        "activations": sum(saved_bytes(structure, rows, lora, precision, checkpointing) for rows in largest),
        # A chunk of logits in two dtypes; the gradient of the embeddings as inputs, as outputs, and their sum.
        "logits": (min(logits, chunk) * 1.5 if in_chunks else logits * WHOLE_LOGITS) + 3 * head,
    }


def saved_bytes(
    structure: PreTrainedModel, rows: Batch, lora: Lora | None, precision: str, checkpointing: bool
) -> float:
    """Bytes that autograd keeps of a forward pass without the LM head, counted on the meta device.

    Args:
        structure: the model on the meta device; it stays as it is.
    """
    model = copy.deepcopy(structure).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    layers = model.config.get_text_config().num_hidden_layers
    adapted = add_lora(model, lora, "") if lora else model
    adapted.train()
    kept = {weight.untyped_storage()._cdata for weight in adapted.parameters()}
    sizes: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_meta and storage._cdata not in kept:
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    tokens = rows.input_ids.numel()
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    texts = torch.arange(len(rows.input_ids)).repeat_interleave(rows.input_ids.shape[1])
    layout = rows.attention_mask if rows.is_packed else torch.stack([texts, torch.zeros_like(texts)])[None, None]
    outputs = []  # autograd frees what nothing refers to, and another tensor may then have its address
    hidden = tokens * model.config.get_text_config().hidden_size * (2 if precision == "bf16" else 4)
    try:
        model.set_attn_implementation(TREE)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            outputs.append(model.base_model(input_ids=ids, attention_mask=layout, position_ids=ids, use_cache=False))
        total = float(sum(sizes.values()))
    except Exception:  # a model that does not run on the meta device, or not with this attention
        total = SAVED_VALUES * layers * hidden
    if not checkpointing:
        return total
    return layers * hidden + total / layers  # the inputs of all layers, and one of them computed again


def _together(step: StepBatch, losses: set[str]) -> Iterator[list[Batch]]:
    """The batches of a step that are in memory together: those at theta, then those at the landing point."""
    for at_landing in (False, True):
        names = {LOSSES[name].batch for name in losses if LOSSES[name].at_landing == at_landing}
        if together := [rows for name, rows in step._asdict().items() if name in names and rows]:
            yield together


def check_disk(folder: Path, needed: float) -> None:
    """Raises UserError when the disk of `folder` has less than `needed` bytes left."""
    while not folder.exists():
        folder = folder.parent
    free = disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the disk of {folder} has {free / GIB:.1f} GiB left and this run saves about "
            f"{needed / GIB:.1f} GiB: free some, or save elsewhere"
        )
