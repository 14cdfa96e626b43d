"""Which rows a step uses: a pure function of the seed and the step."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harmful_unlearn.errors import UserError

SPLIT, SHUFFLE, ANSWERS = range(3)  # random streams of a seed


@dataclass(frozen=True)
class StepIndices:
    """The rows that one step trains on.

    Attributes:
        harmful_rows: indices into `HarmfulData.pairs`.
        normal_rows: indices into `NormalData.texts`.
        answer_rows: K distinct indices into the pool of answers, shared by the batch's questions.
    """

    harmful_rows: list[int]
    normal_rows: list[int]
    answer_rows: list[int]


class BatchSampler:
    """`sampler[step]` is the rows of a step, whatever steps came before.

    Harmful pairs keep their order. Normal training texts are shuffled anew for each epoch. The last batch of an epoch
    may be smaller. An epoch ends when the shorter of the two ends, and both start again, so that GD may never see the
    later pairs (implementation details 2, 6 and 7). K answers are drawn without replacement, once per step
    (implementation detail 11).

    Args:
        pairs: number of harmful pairs.
        normal: the normal training texts (`NormalData.train`).
        answers: size of the pool of answers.
        batch_size: B, the number of harmful pairs and that of normal texts.
        k_random: K.
        seed: of the shuffling and of the draws.
        all_harmful: go through all harmful pairs and all normal texts; each of the two starts again at its own end.

    Raises:
        UserError: the pool has fewer than K answers.
    """

    def __init__(
        self,
        pairs: int,
        normal: Sequence[int],
        answers: int,
        batch_size: int,
        k_random: int,
        seed: int,
        all_harmful: bool = False,
    ):
        if k_random > answers:
            raise UserError(
                f"--k_random {k_random} asks for more answers than there are unsafe ones: give at most {answers}"
            )
        self._pairs, self._normal, self._answers = pairs, np.asarray(normal), answers
        self._batch_size, self._k_random, self._seed = batch_size, k_random, seed
        self._harmful_batches = math.ceil(pairs / batch_size)
        self._normal_batches = math.ceil(len(normal) / batch_size)
        if not all_harmful:
            shorter = min(self._harmful_batches, self._normal_batches)
            self._harmful_batches = self._normal_batches = shorter
        # Every step of an epoch needs the epoch's order, and epochs follow one another.
        self._shuffled = functools.lru_cache(maxsize=1)(self._shuffle)

    @property
    def batches_per_epoch(self) -> int:
        """Steps until the harmful pairs start again."""
        return self._harmful_batches

    def __getitem__(self, step: int) -> StepIndices:
        start = step % self._harmful_batches * self._batch_size
        harmful = list(range(start, min(start + self._batch_size, self._pairs)))
        epoch, batch = divmod(step, self._normal_batches)
        start = batch * self._batch_size
        normal = self._shuffled(epoch)[start : start + self._batch_size]
        generator = np.random.default_rng([self._seed, ANSWERS, step])
        answers = generator.choice(self._answers, self._k_random, replace=False)
        return StepIndices(harmful, normal, answers.tolist())

    def _shuffle(self, epoch: int) -> list[int]:
        generator = np.random.default_rng([self._seed, SHUFFLE, epoch])
        return generator.permutation(self._normal).tolist()
