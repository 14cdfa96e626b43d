"""What a run will do and need, before it costs anything: the figures that `--check` prints."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage

import torch
from transformers import PretrainedConfig, PreTrainedModel

from harmful_unlearn.data.batch import Batch
from harmful_unlearn.data.step_batches import StepBatch, StepBatches
from harmful_unlearn.errors import UserError
from harmful_unlearn.losses import terms
from harmful_unlearn.losses.fused_linear import CHUNK
from harmful_unlearn.models.lora import Lora, linear_layers

GIB = 2**30
# Values that training keeps for each token, layer and hidden unit; about what OPT and LLaMA need.
SAVED_VALUES = 34
STEPS_SAMPLED = 25
CHECKPOINT_BYTES = 12  # a trained weight and AdamW's two moments
FOUR_BIT_BYTES = 0.516  # a weight in NF4 with quantized scales


@dataclass(frozen=True)
class Plan:
    """The figures of a stage 1 run.

    Attributes:
        rows, pairs, answers, normal: data rows read, harmful pairs selected, answers in the RD pool,
            normal texts trained on.
        steps, batches_per_epoch: optimizer steps, and how many make an epoch.
        pairs_seen: different harmful pairs that GD (or GA) will see.
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
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.memory.items())
        epochs = self.steps / self.batches_per_epoch
        return "\n".join(
            [
                f"harmful data   {self.rows:,} rows, {self.pairs:,} pairs, {self.answers:,} answers in the pool",
                f"normal data    {self.normal:,} texts to train on",
                f"steps          {self.steps:,} ({epochs:.1f} epochs of {self.batches_per_epoch:,}); "
                f"GD sees {self.pairs_seen:,} different pairs",
                f"tokens         about {self.tokens:,} of text; {self.cut:,} texts cut to --max_length, "
                f"and about {self.cut_in_rd:,} of RD's rows",
                f"parameters     {self.parameters:,}, {self.trainable:,} of them trained",
                f"memory         about {sum(self.memory.values()) / GIB:.2f} GiB a process ({parts})",
                f"disk           about {self.disk / GIB:.2f} GiB",
            ]
        )


def make_plan(
    batches: StepBatches,
    steps: int,
    structure: PreTrainedModel,
    lora: Lora | None,
    precision: str,
    gradient_checkpointing: bool,
    four_bit: bool = False,
    shards: int = 1,
    checkpoints: int = 0,
) -> Plan:
    """Count what a run will read, compute and hold.

    Args:
        batches: the training loop's own, so that what is counted is what is run.
        structure: the model on the meta device.
        shards: how many processes a model and AdamW's state are spread over.
        checkpoints: how many may lie on the disk at a time.
    """
    sampler, harmful, normal = batches.sampler, batches.harmful, batches.normal
    different = min(steps, sampler.batches_per_epoch)  # harmful batches come again in the same order
    seen = sorted({row for step in range(different) for row in sampler[step].harmful_rows})
    texts = [harmful.pairs[row] for row in seen] + [normal.texts[row] for row in normal.train]
    encoded = batches.collator.encode(texts)
    if batches.losses & terms.ON_HARMFUL and not any(
        one.answer_start < len(one.input_ids) for one in encoded[: len(seen)]
    ):
        raise UserError("--max_length leaves no harmful answer a token: give a larger one")
    if "sa" in batches.losses and not any(harmful.safe_answers[row] for row in seen):
        raise UserError(
            f"no unsafe answer that is trained on, in {harmful.source['name']}, has a safe one beside it: use --method "
            "land (--safe_weight 0)"
        )
    chosen = range(0, steps, max(1, steps // STEPS_SAMPLED))
    sampled = [batches(step, torch.device("cpu")) for step in chosen]
    cut_in_rd = 0
    if batches.losses & {"rd", "rm"}:
        cut_in_rd = sum(one.cut for step in chosen for one in batches.collator.encode(batches.random_pairs(step)))
    tokens = sum(batch.tokens for step in sampled for batch in step if batch) / len(sampled) * batches.share[1]
    parameters = structure.num_parameters()
    trainable = _lora_parameters(structure, lora) if lora else parameters
    dtype = structure.config.dtype
    return Plan(
        rows=harmful.rows,
        pairs=len(harmful.pairs),
        answers=len(harmful.answers),
        normal=len(normal.train),
        steps=steps,
        batches_per_epoch=sampler.batches_per_epoch,
        pairs_seen=len(seen),
        cut=sum(one.cut for one in encoded),
        cut_in_rd=round(cut_in_rd * steps / len(chosen)),
        tokens=round(tokens * steps),
        parameters=parameters,
        trainable=trainable,
        memory=_memory(
            parameters,
            trainable,
            [part for step in sampled for part in _parts(step, batches.losses)],
            structure.config,
            lora,
            precision,
            gradient_checkpointing,
            shards,
            second_copy=not lora and bool(batches.losses & terms.NEED_BASE),
            lands=any(terms.LOSSES[name].at_landing for name in batches.losses),
            four_bit=sum(layer.weight.numel() for _, layer in linear_layers(structure)) if four_bit else 0,
        ),
        disk=parameters * (dtype.itemsize if dtype else 4) + trainable * (4 + CHECKPOINT_BYTES * checkpoints),
    )


def _parts(texts: StepBatch, active: set[str]) -> Iterator[list[Batch]]:
    """The batches of a step that are held at the same time: those of the copy, then those of the landing point."""
    for lands in (False, True):
        read = {terms.LOSSES[name].batch for name in active if terms.LOSSES[name].at_landing == lands}
        if found := [batch for field, batch in texts._asdict().items() if field in read and batch]:
            yield found


def _lora_parameters(structure: PreTrainedModel, lora: Lora) -> int:
    return sum(
        lora.r * sum(module.weight.shape)
        for name, module in structure.named_modules()
        if name.rsplit(".", 1)[-1] in lora.target_modules
    )


def _memory(
    parameters: int,
    trainable: int,
    parts: list[list[Batch]],
    config: PretrainedConfig,
    lora: Lora | None,
    precision: str,
    gradient_checkpointing: bool,
    shards: int,
    second_copy: bool,
    lands: bool,
    four_bit: int,
) -> dict[str, float]:
    text = config.get_text_config()
    compute = 2 if precision == "bf16" else 4
    cells = max(sum(batch.input_ids.numel() for batch in part) for part in parts)
    scored = max(batch.row.numel() for part in parts for batch in part)
    mask = max(batch.input_ids.shape[1] * batch.input_ids.numel() for part in parts for batch in part)
    layers = 1 if gradient_checkpointing else text.num_hidden_layers
    saved = cells * text.hidden_size * compute * (SAVED_VALUES * layers / 2 + text.num_hidden_layers)
    held = {
        "weights": (parameters - four_bit) * (compute if lora else 4)
        + four_bit * FOUR_BIT_BYTES
        + (trainable * 4 if lora else 0),
        "frozen base": parameters * (4 if lands else compute) if second_copy else 0,
        **({"copy set aside": trainable * 4} if lands and second_copy else {}),
        "gradients": trainable * 4,
        "AdamW": trainable * 8,
    }
    return {
        **{what: size / shards for what, size in held.items()},
        "activations": saved + mask * compute,  # packed rows have a mask of their own
        "logits": min(scored * text.vocab_size * 4, CHUNK) * 3,
    }


def check_disk(folder: Path, needed: float) -> None:
    """Raises UserError when the disk that `folder` will lie on has less than `needed` bytes left."""
    while not folder.exists():
        folder = folder.parent
    free = disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the disk of {folder} has {free / GIB:.1f} GiB left and this run saves about "
            f"{needed / GIB:.1f} GiB: free some, or save elsewhere"
        )
