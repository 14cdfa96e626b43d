"""All batches of a step, for this process."""

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch

from harmful_unlearn.data.batch import Batch, Row, are_packed
from harmful_unlearn.data.batch_sampler import BatchSampler
from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.pku_saferlhf import HarmfulData
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.data.truthfulqa import NormalData


class Reads(NamedTuple):
    """What the losses of a run read in a step; nothing else is prepared. `losses.terms.reads` derives it."""

    own_answers: bool = False  # harmful prompts with their own answers (GD)
    random_answers: str | None = None  # with K random ones: "harmful" (RD) or "normal" answers, or none
    harmful_texts: bool = False  # with their own answers, each text by itself (NPO)
    safe_answers: bool = False  # harmful prompts with their safe answers
    preferences: bool = False  # with the safe and the own answer, each pair by itself (DPO)
    only_with_safe: bool = False  # harmful pairs without a safe answer are left out
    normal_texts: bool = False  # normal texts, of which every position counts (PD)
    normal_answers: bool = False  # normal texts, of which the answer counts (FT)


def answer_pool(reads: Reads, harmful: HarmfulData, normal: NormalData) -> list[str]:
    """The answers that K random ones are drawn from: harmful answers, or normal training answers."""
    return [normal.texts[row].answer for row in normal.train] if reads.random_answers == "normal" else harmful.answers


def run_sampler(
    flags: Mapping[str, Any], processes: int, harmful: HarmfulData, normal: NormalData, reads: Reads
) -> BatchSampler:
    """Which rows each step of a run uses, by the run's flags. Raises UserError: as `BatchSampler`."""
    answers = len(answer_pool(reads, harmful, normal))
    batch_size = flags["batch_size"] * processes  # of all processes together
    k_random = flags["k_random"] if reads.random_answers else 0
    all_harmful = flags.get("all_harmful", False)
    rows: Sequence[int] = range(len(harmful.pairs))
    if reads.only_with_safe:
        rows = [row for row in rows if harmful.safe_answers[row]]
    return BatchSampler(rows, normal.train, answers, batch_size, k_random, flags["seed"], all_harmful)


class StepBatch(NamedTuple):
    """The batches of a step; None for one that no loss reads."""

    harmful: Batch | None = None  # questions with their own and with random answers
    normal: Batch | None = None  # normal texts, every position of which counts
    safe: Batch | None = None  # the questions that have a safe answer beside the harmful one, with that
    normal_answers: Batch | None = None  # the normal texts, of which only the answer counts
    harmful_texts: Batch | None = None  # questions with their own answers, each text with an average of its own
    preferences: Batch | None = None  # the questions that have a safe answer, with that and their own


@dataclass(frozen=True)
class StepBatches:
    """The batches of each step, a pure function of the step.

    Attributes:
        packed_up_to: in tokens: as in `Collator.answers`.
        tokens_per_pass: a step with more tokens is computed in several passes, whose gradients add up. A single text
            may be longer.
        share: (process, processes): each pass holds the rows of this process.
    """

    collator: Collator
    sampler: BatchSampler
    harmful: HarmfulData
    normal: NormalData
    reads: Reads
    packed_up_to: float = 0
    tokens_per_pass: float = math.inf
    share: tuple[int, int] = (0, 1)

    @cached_property
    def pool(self) -> list[str]:
        """The answers that K random ones are drawn from."""
        return answer_pool(self.reads, self.harmful, self.normal)

    def random_pairs(self, step: int) -> list[Pair]:
        """Each question of a step with each of the K answers drawn for the step."""
        indices = self.sampler[step]
        questions = [self.harmful.pairs[row].question for row in indices.harmful_rows]
        return [Pair(question, self.pool[row]) for question in questions for row in indices.answer_rows]

    def ahead(self, steps: range, device: torch.device) -> Iterator[list[StepBatch]]:
        """The passes of each step, prepared in a thread during the step before."""
        with ThreadPoolExecutor(1, "batches") as worker:
            following: Future[list[StepBatch]] | None = None
            for step in steps:
                pending, following = following, worker.submit(self, step, device)
                if pending:
                    yield pending.result()
            if following:
                yield following.result()

    def __call__(self, step: int, device: torch.device) -> list[StepBatch]:
        """The passes of a step (from 0), one if it has at most `tokens_per_pass`."""
        return [self._pass(rows, device) for rows in self._passes(self._rows(step))]

    def _rows(self, step: int) -> dict[str, list[list[Row]]]:
        """The rows of a step, by their batch (`StepBatch`); those in one list have to be in one pass."""
        indices = self.sampler[step]
        harmful = [self.harmful.pairs[row] for row in indices.harmful_rows]
        normal = [self.normal.texts[row] for row in indices.normal_rows]
        reads, collator, limits = self.reads, self.collator, (self.packed_up_to, self.tokens_per_pass)
        safe = [(row, answer) for row in indices.harmful_rows if (answer := self.harmful.safe_answers[row])]
        rows = {}
        if reads.own_answers or reads.random_answers:
            answers = [self.pool[row] for row in indices.answer_rows] if reads.random_answers else []
            rows["harmful"] = collator.answers(harmful, answers, reads.own_answers, *limits)
        if reads.normal_texts:
            rows["normal"] = collator.texts(normal)
        if reads.safe_answers and safe:
            pairs = [Pair(self.harmful.pairs[row].question, answer) for row, answer in safe]
            rows["safe"] = collator.answers(pairs, [], True, *limits)
        if reads.normal_answers:
            rows["normal_answers"] = collator.answers(normal, [], True, *limits)
        if reads.harmful_texts:
            rows["harmful_texts"] = collator.separate_answers(harmful, *limits)
        together = {name: [[row] for row in part] for name, part in rows.items()}
        if reads.preferences and safe:
            pairs = [self.harmful.pairs[row] for row, _ in safe]
            preferred = [answer for _, answer in safe]
            together["preferences"] = collator.preferences(pairs, preferred, self.packed_up_to)
        return together

    def _passes(self, rows: dict[str, list[list[Row]]]) -> list[dict[str, list[Row]]]:
        """The rows of each pass for this process, in order.

        All processes take part in every forward pass: one that has no row of a batch gets one that does not count.
        """
        process, processes = self.share
        passes: list[dict[str, list[list[Row]]]] = []  # the rows of each process
        for name, part in rows.items():
            for start in range(0, len(part), processes):
                each = part[start : start + processes]
                each += [[]] * (processes - len(each))
                last = passes[-1] if passes else {}
                before = last.get(name, [[]] * processes)
                together = {**last, name: [own + more for own, more in zip(before, each, strict=True)]}
                if passes and self._tokens(together) <= self.tokens_per_pass:
                    passes[-1] = together
                else:
                    passes.append({name: each})
        return [
            {name: of[process] or [row.without_weight() for row in of[0]] for name, of in each.items()}
            for each in passes
        ]

    def _tokens(self, rows: dict[str, list[list[Row]]]) -> int:
        """The most that a process computes in a pass of these rows, by batch and process; rounding up aside."""
        return sum(max(map(partial(self._computed, name), of)) for name, of in rows.items())

    def _computed(self, name: str, rows: list[Row]) -> int:
        lengths = [row.length for row in rows]
        is_packed = are_packed(rows, self._packed_up_to(name))
        return sum(lengths) if is_packed else len(lengths) * max(lengths, default=0)

    def _packed_up_to(self, name: str) -> float:
        return 0 if name == "normal" else self.packed_up_to  # "released" counts the padding of normal texts

    def _pass(self, rows: dict[str, list[Row]], device: torch.device) -> StepBatch:
        batches = {}
        for name, part in rows.items():
            batch = self.collator.batch(part, self._packed_up_to(name))
            batches[name] = batch.to(device)
        return StepBatch(**batches)
