"""All batches of a step, for this process."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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


def answer_pool(losses: set[str], harmful: HarmfulData, normal: NormalData) -> list[str]:
    """Where the K random answers come from: harmful answers (RD), or normal training answers ("rm")."""
    return [normal.texts[row].answer for row in normal.train] if "rm" in losses else harmful.answers


class StepBatch(NamedTuple):
    """The batches of a step; None for one that no loss reads.

    Attributes:
        harmful: prompts with their own and with random answers.
        normal: normal texts.
        safe: those of the prompts that have a safe answer beside the harmful one, with it.
    """

    harmful: Batch | None = None
    normal: Batch | None = None
    safe: Batch | None = None


@dataclass(frozen=True)
class StepBatches:
    """The batches of each step, a pure function of the step.

    Attributes:
        losses: names in losses/terms.py; a loss that is left out (its weight is 0) costs nothing.
        packed_up_to: tokens; steps whose texts are no longer have a row for each harmful question. 0: plain rows.
        share: which of how many processes this is. The batches are its part of each step's.
    """

    collator: Collator | None
    sampler: BatchSampler
    harmful: HarmfulData
    normal: NormalData
    losses: set[str]
    packed_up_to: float = 0
    share: tuple[int, int] = (0, 1)

    @classmethod
    def build(
        cls,
        *,
        harmful: HarmfulData,
        normal: NormalData,
        losses: set[str],
        batch_size: int,
        k_random: int,
        seed: int,
        all_harmful: bool,
        collator: Collator | None = None,
        packed_up_to: float = 0,
        share: tuple[int, int] = (0, 1),
    ) -> "StepBatches":
        """The batches of a run, by its flags.

        Args:
            batch_size: harmful pairs, and normal texts, of a step: of all processes together.
            k_random: K; nothing is drawn where no loss reads random answers.
            collator: None where only the rows of a step are asked for, not their tokens.

        Raises:
            UserError: the pool has fewer than K answers.
        """
        sampler = BatchSampler(
            pairs=len(harmful.pairs),
            normal=normal.train,
            answers=len(answer_pool(losses, harmful, normal)),
            batch_size=batch_size,
            k_random=k_random if losses & {"rd", "rm"} else 0,
            seed=seed,
            all_harmful=all_harmful,
        )
        return cls(collator, sampler, harmful, normal, losses, packed_up_to, share)

    @cached_property
    def pool(self) -> list[str]:
        """The answers that are paired with prompts they do not belong to."""
        return answer_pool(self.losses, self.harmful, self.normal)

    def random_pairs(self, step: int) -> list[Pair]:
        """Each question of a step with each of the K answers drawn for it."""
        draw = self.sampler[step]
        questions = [self.harmful.pairs[row].question for row in draw.harmful_rows]
        return [Pair(question, self.pool[row]) for question in questions for row in draw.answer_rows]

    def touched(self, steps: int) -> tuple[set[str], set[str]]:
        """The harmful questions whose own answer is trained on, and all that `steps` steps touch.

        An answer that RD draws touches the question that it came with.
        """
        trained, touched = set(), set()
        for step in range(steps):
            draw = self.sampler[step]
            asked = {self.harmful.pairs[row].question for row in draw.harmful_rows}
            trained |= asked if self.losses & {"gd", "ga"} else set()
            touched |= asked if self.losses & {"gd", "ga", "rd", "rm", "sa"} else set()
            if "rd" in self.losses:
                touched |= {self.harmful.answer_questions[row] for row in draw.answer_rows}
        return trained, touched

    def ahead(self, steps: range, device: torch.device) -> Iterator["StepBatch"]:
        """Each step's batches, made in a thread while the step before is computed."""
        with ThreadPoolExecutor(1, "batches") as worker:
            coming = deque(worker.submit(self, step, device) for step in steps[:1])
            for step in steps[1:]:
                coming.append(worker.submit(self, step, device))
                yield coming.popleft().result()
            yield from (last.result() for last in coming)

    def __call__(self, step: int, device: torch.device) -> "StepBatch":
        """The batches of a step (from 0)."""
        if self.collator is None:
            raise ValueError("built without a collator, for the rows of a step alone")
        draw, harmful, normal, safe = self.sampler[step], None, None, None

        def mine(batch: Batch) -> Batch:
            return batch.share(*self.share).to(device)

        own, random = self.losses & {"gd", "ga"}, self.losses & {"rd", "rm"}
        if own or random:
            pairs = [self.harmful.pairs[row] for row in draw.harmful_rows]
            answers = [self.pool[row] for row in draw.answer_rows] if random else []
            harmful = mine(self.collator.answers_batch(pairs, answers, bool(own), self.packed_up_to))
        texts = [self.normal.texts[row] for row in draw.normal_rows]
        if self.losses & {"pd", "kl", "lp"}:
            normal = mine(self.collator.texts_batch(texts))
        if "ft" in self.losses:  # laid out as GD: the answer counts
            normal = mine(self.collator.answers_batch(texts, []))
        if "sa" in self.losses:
            asked = [(self.harmful.pairs[row].question, self.harmful.safe_answers[row]) for row in draw.harmful_rows]
            answered = [Pair(question, answer) for question, answer in asked if answer]
            safe = mine(self.collator.answers_batch(answered, [])) if answered else None
        return StepBatch(harmful, normal, safe)
