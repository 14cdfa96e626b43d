"""Which rows a step uses: a pure function of the seed and the step."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from harmful_unlearn.errors import UserError

SPLIT, SHUFFLE, ANSWERS = range(3)  # random streams of a seed


class StepIndices(NamedTuple):
    """The rows that one step trains on."""

    harmful_rows: list[int]  # indices into `HarmfulData.pairs`
    normal_rows: list[int]  # indices into `NormalData.texts`
    answer_rows: list[int]  # K distinct indices into the pool of answers, shared by the batch's questions


@dataclass(frozen=True)
class BatchSampler:
    """`sampler[step]` is the rows of a step, whatever steps came before.

    Harmful pairs keep their order. Normal training texts are shuffled anew for each epoch. The last batch of an epoch
    may be smaller. An epoch ends when the shorter of the two ends, and both start again, so that GD may never see the
    later pairs (implementation details 2, 6 and 7). K answers are drawn without replacement, once per step
    (implementation detail 11).

    Raises:
        UserError: the pool has fewer than K answers.
    """

    harmful: Sequence[int]  # the harmful pairs to train on (indices into `HarmfulData.pairs`)
    normal: Sequence[int]  # the normal training texts (`NormalData.train`)
    answers: int  # the size of the pool of answers
    batch_size: int  # B, the number of harmful pairs and that of normal texts
    k_random: int  # K
    seed: int  # of the shuffling and of the draws
    all_harmful: bool = False  # go through all pairs and all normal texts, each starting again at its own end

    def __post_init__(self) -> None:
        if self.k_random > self.answers:
            problem = f"--k_random {self.k_random} asks for more answers than there are unsafe ones"
            raise UserError(f"{problem}: give at most {self.answers}")

    @property
    def batches_per_epoch(self) -> int:
        """Steps until the harmful pairs start again."""
        return self._batches(len(self.harmful))

    def _batches(self, rows: int) -> int:
        if not self.all_harmful:
            rows = min(len(self.harmful), len(self.normal))
        return math.ceil(rows / self.batch_size)

    @cached_property
    def _order(self) -> Callable[[int], np.ndarray]:
        """The order of the normal texts in an epoch; the last one is kept, since its steps follow each other."""

        def shuffled(epoch: int) -> np.ndarray:
            return np.random.default_rng([self.seed, SHUFFLE, epoch]).permutation(self.normal)

        return lru_cache(maxsize=1)(shuffled)

    def __getitem__(self, step: int) -> StepIndices:
        start = step % self.batches_per_epoch * self.batch_size
        harmful = self.harmful[start : start + self.batch_size]
        epoch, batch = divmod(step, self._batches(len(self.normal)))
        start = batch * self.batch_size
        normal = self._order(epoch)[start : start + self.batch_size].tolist()
        answers = np.random.default_rng([self.seed, ANSWERS, step]).choice(self.answers, self.k_random, replace=False)
        return StepIndices(list(harmful), normal, answers.tolist())
