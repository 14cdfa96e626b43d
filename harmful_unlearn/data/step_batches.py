"""All batches of a step, for this process."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from harmful_unlearn.data.batch import Batch
from harmful_unlearn.data.batch_sampler import BatchSampler
from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.pku_saferlhf import HarmfulData
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.data.truthfulqa import NormalData

READ_OWN_ANSWERS = {"gd", "ga"}  # losses (losses/terms.py) by what they read
READ_RANDOM_ANSWERS = {"rd", "rm"}
READ_WHOLE_NORMAL_TEXTS = {"pd", "kl", "lp"}


def answer_pool(losses: set[str], harmful: HarmfulData, normal: NormalData) -> list[str]:
    """The answers that K random ones are drawn from: harmful answers (RD), or normal training answers ("rm")."""
    return [normal.texts[row].answer for row in normal.train] if "rm" in losses else harmful.answers


def run_sampler(
    *,
    harmful: HarmfulData,
    normal: NormalData,
    losses: set[str],
    batch_size: int,
    k_random: int,
    seed: int,
    all_harmful: bool,
) -> BatchSampler:
    """Which rows each step of a run uses, by the run's flags.

    Args:
        losses: the losses of the run, by name.
        batch_size: the harmful pairs, and the normal texts, of a step, for all processes together.
        k_random: K; nothing is drawn if no loss reads random answers.

    Raises:
        UserError: the pool has fewer than K answers.
    """
    return BatchSampler(
        pairs=len(harmful.pairs),
        normal=normal.train,
        answers=len(answer_pool(losses, harmful, normal)),
        batch_size=batch_size,
        k_random=k_random if losses & READ_RANDOM_ANSWERS else 0,
        seed=seed,
        all_harmful=all_harmful,
    )


class StepBatch(NamedTuple):
    """The batches of a step; None for one that no loss reads.

    Attributes:
        harmful: questions with their own and with random answers.
        normal: normal texts.
        safe: the questions that have a safe answer beside the harmful one, with that.
    """

    harmful: Batch | None = None
    normal: Batch | None = None
    safe: Batch | None = None


@dataclass(frozen=True)
class StepBatches:
    """The batches of each step, a pure function of the step.

    Attributes:
        losses: the losses of the run, by name (losses/terms.py). What none of them reads is not computed.
        packed_up_to: in tokens: a step whose texts are no longer has one row for each harmful question
            (`Collator.answers_batch`). 0: always one row for each text.
        share: (process, processes): each batch holds the rows of this process (`Batch.share`).
    """

    collator: Collator
    sampler: BatchSampler
    harmful: HarmfulData
    normal: NormalData
    losses: set[str]
    packed_up_to: float = 0
    share: tuple[int, int] = (0, 1)

    @cached_property
    def pool(self) -> list[str]:
        """The answers that K random ones are drawn from."""
        return answer_pool(self.losses, self.harmful, self.normal)

    def random_pairs(self, step: int) -> list[Pair]:
        """Each question of a step with each of the K answers drawn for the step."""
        indices = self.sampler[step]
        questions = [self.harmful.pairs[row].question for row in indices.harmful_rows]
        return [Pair(question, self.pool[row]) for question in questions for row in indices.answer_rows]

    def ahead(self, steps: range, device: torch.device) -> Iterator[StepBatch]:
        """The batches of each step, prepared in a thread during the step before."""
        with ThreadPoolExecutor(1, "batches") as worker:
            pending: Future[StepBatch] | None = None
            for step in steps:
                following = worker.submit(self, step, device)
                if pending:
                    yield pending.result()
                pending = following
            if pending:
                yield pending.result()

    def __call__(self, step: int, device: torch.device) -> StepBatch:
        """The batches of a step (from 0)."""
        indices = self.sampler[step]
        harmful = [self.harmful.pairs[row] for row in indices.harmful_rows]
        normal = [self.normal.texts[row] for row in indices.normal_rows]
        own_answers, random_answers = bool(self.losses & READ_OWN_ANSWERS), bool(self.losses & READ_RANDOM_ANSWERS)
        batches: dict[str, Batch] = {}
        if own_answers or random_answers:
            answers = [self.pool[row] for row in indices.answer_rows] if random_answers else []
            batches["harmful"] = self.collator.answers_batch(harmful, answers, own_answers, self.packed_up_to)
        if self.losses & READ_WHOLE_NORMAL_TEXTS:
            batches["normal"] = self.collator.texts_batch(normal)
        if "ft" in self.losses:
            batches["normal"] = self.collator.answers_batch(normal, [])
        if "sa" in self.losses:
            safe_answers = [self.harmful.safe_answers[row] for row in indices.harmful_rows]
            safe = [Pair(pair.question, answer) for pair, answer in zip(harmful, safe_answers, strict=True) if answer]
            if safe:
                batches["safe"] = self.collator.answers_batch(safe, [])
        return StepBatch(**{name: batch.share(*self.share).to(device) for name, batch in batches.items()})
