"""The harmful data's own labels, as judges learn from them and are measured on them."""

import hashlib
import json
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from sklearn.metrics import roc_auc_score

from harmful_unlearn.data.pku_saferlhf import Response
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.judges.base import THRESHOLD

LEAST = 5  # answers of each class that a judge needs to learn from
MOST_ROWS = 50_000  # of the harmful data, and as many normal ones: for the classifier about 12 s and 1 GB
BINS = 10  # of the calibration error


class LabelledAnswer(NamedTuple):
    """An answer to a question, and whether it is harmful."""

    question: str
    answer: str
    harmful: bool

    @property
    def pair(self) -> Pair:
        return Pair(self.question, self.answer)


@dataclass(frozen=True)
class LabelledSplit:
    """Labelled answers without those to prompts that will be judged. Both answers to a prompt are on one side.

    Attributes:
        train: in a random order of prompts, those of the harmful data first.
        harmful_data, normal_data: held out, a fifth of the prompts of each.
        facts: for the judge's own.
    """

    train: list[LabelledAnswer]
    harmful_data: list[LabelledAnswer]
    normal_data: list[LabelledAnswer]
    facts: dict


def label(responses: list[Response], normal: list[Pair]) -> tuple[list[LabelledAnswer], list[LabelledAnswer]]:
    """The labelled responses, and normal answers as safe ones.

    Without normal answers a judge would call everything harmful that is not a refusal.
    """
    harmful_data = [LabelledAnswer(response.question, response.answer, not response.safe) for response in responses]
    return harmful_data, [LabelledAnswer(pair.question, pair.answer, False) for pair in normal]


def labels_sha256(rows: list[LabelledAnswer]) -> str:
    """Of the answers with their labels, in whatever order."""
    return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()


def check_enough(rows: list[LabelledAnswer]) -> None:
    """Raises UserError: these are too few answers of a class to learn from."""
    harmful = sum(row.harmful for row in rows)
    if min(harmful, len(rows) - harmful) < LEAST:
        raise UserError(
            f"the judge has {harmful} harmful and {len(rows) - harmful} safe answers to learn from, without those to "
            f"prompts that it judges, and needs {LEAST} of each: draw fewer prompts, give more data, or another --judge"
        )


def split_labelled(responses: list[Response], normal: list[Pair], judged: set[str], seed: int) -> LabelledSplit:
    """What a judge may learn from.

    Args:
        responses: all labelled responses of the harmful data.
        judged: the questions whose answers will be judged.
        seed: of the split.

    Raises:
        UserError: too few answers of a class are left.
    """
    kinds = label(responses, normal)
    rows = [row for kind in kinds for row in kind]
    questions = {row.question for row in rows}
    order = sorted(questions - judged)
    rank = dict(zip(order, np.random.default_rng(seed).permutation(len(order)).tolist(), strict=True))
    data = [sorted((row for row in kind if row.question in rank), key=lambda row: rank[row.question]) for kind in kinds]
    over_the_cap = sum(len(kind[MOST_ROWS:]) for kind in data)
    data = [kind[:MOST_ROWS] for kind in data]
    train = [row for kind in data for row in kind if rank[row.question] % 5 != 4]
    held_out = [[row for row in kind if rank[row.question] % 5 == 4] for kind in data]  # harmful data, normal data
    check_enough(train)
    facts = {
        "n_train": len(train),
        "harmful_in_train": sum(row.harmful for row in train),
        "rows_over_the_cap": over_the_cap,
        "prompts_left_out": len(questions & judged),
        "labels_sha256": labels_sha256(rows),
        "seed": seed,
    }
    return LabelledSplit(train, held_out[0], held_out[1], facts)


def measured(rows: list[LabelledAnswer], scores: np.ndarray) -> dict:
    """Accuracy, AUC, calibration error and numbers; None where there is nothing to measure, or a class is missing.

    The calibration error is the mean difference, over rows in BINS equal intervals of the score, between the mean
    score of an interval and its share of harmful answers.

    Args:
        scores: [rows], the probability that each is harmful; nan where the judge gave none, and the row is omitted.
    """
    judged = ~np.isnan(scores)
    truth, scores = np.array([row.harmful for row in rows], bool)[judged], scores[judged]
    both = 0 < truth.sum() < len(truth)
    bins = np.minimum((scores * BINS).astype(int), BINS - 1)
    gaps = [abs((scores - truth)[bins == n].sum()) for n in range(BINS)]
    return {
        "accuracy": round(float(((scores > THRESHOLD) == truth).mean()), 4) if both else None,
        "auc": round(float(roc_auc_score(truth, scores)), 4) if both else None,
        "calibration_error": round(float(sum(gaps) / len(truth)), 4) if both else None,
        "n_held_out": len(truth),
        "harmful_held_out": int(truth.sum()),
    }
