"""Which prompts a model is measured on: by what unlearning read, prompt by prompt rather than row by row.

The same prompt occurs in several rows of PKU-SafeRLHF, and each question of TruthfulQA in two texts:
a prompt counts as touched if any of its rows was.
"""

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from harmful_unlearn.data.batch_sampler import BatchSampler
from harmful_unlearn.data.pku_saferlhf import HarmfulData, Response, read_harmful, read_responses
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.data.step_batches import StepBatches, answer_pool
from harmful_unlearn.data.truthfulqa import NormalData, read_choices, read_normal
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.judges.base import Judge
from harmful_unlearn.evals.judges.registry import make_judge
from harmful_unlearn.losses.methods import loss_weights
from harmful_unlearn.storage.run_record import RunRecord

SETS = ("seen", "unseen", "normal")


@dataclass(frozen=True)
class Prompt:
    """A question to a model, with a reference answer.

    Attributes:
        row: of the reference, in its data: the response (two a row, response_0 first) of harmful data,
            the question of normal data; both from 0.
        categories: kinds of harm that its reference is marked with.
    """

    question: str
    reference: str
    row: int
    categories: frozenset[str] = frozenset()

    @property
    def pair(self) -> Pair:
        """The prompt with its reference answer."""
        return Pair(self.question, self.reference)


@dataclass(frozen=True)
class PromptSets:
    """Prompts by set ("seen", "unseen", "normal"), for testing and, apart from these, for choosing alpha.

    Attributes:
        test: "seen" was trained on by GD or GA; no row of "unseen" was touched; no text of a "normal"
            question was trained on. A set of which no prompt is asked for is not there.
        validation: "unseen" and "normal" alone, the latter with the texts of the validation part; a
            question's other text may have been trained on.
        of_category: the "unseen" prompts for testing by kind of harm, as many of each as of "unseen".
    """

    test: dict[str, list[Prompt]]
    validation: dict[str, list[Prompt]]
    of_category: dict[str, list[Prompt]]


def draw_prompts(
    responses: list[Response],
    unseen: list[Response],
    normal: NormalData,
    trained: set[str],
    touched: set[str],
    numbers: dict[str, int],
    seed: int,
) -> PromptSets:
    """Draw the sets of a seed.

    Args:
        responses: of the harmful data that was unlearned.
        unseen: of the data to draw unseen prompts from; may be the same.
        trained: the harmful questions that GD or GA trained on, in every model that is compared.
        touched: what any of them trained on, and the questions that an answer drawn by RD came with.
        numbers: at most so many prompts a set, by set.

    A third of the untouched prompts is kept for validation.

    Raises:
        UserError: a set has no prompt.
    """

    def shuffled(found: list[Prompt], stream: int) -> list[Prompt]:
        order = np.random.default_rng([seed, stream]).permutation(len(found))
        return [found[index] for index in order]

    seen = shuffled(_harmful(responses, lambda question: question in trained), 0)
    untouched = shuffled(_harmful(unseen, lambda question: question not in touched), 1)
    kept = len(untouched) // 3
    questions = len(normal.texts) // 2  # each question twice: its best answer, then all its correct ones
    in_part = {part: {normal.texts[row].question for row in getattr(normal, part)} for part in ("train", "test")}
    first = {}  # TruthfulQA has no question twice, other data may
    for row in range(questions):
        first.setdefault(normal.texts[row].question, row)
    asked = [Prompt(question, normal.texts[row].answer, row) for question, row in first.items()]
    held_out = [p for p in asked if p.question in in_part["test"] - in_part["train"]]
    tested = {prompt.question for prompt in held_out}
    validation = {}  # with the text that is in this part: the question's other one may have been trained on
    for row in normal.validation:
        pair = normal.texts[row]
        if pair.question not in tested:
            validation.setdefault(pair.question, Prompt(pair.question, pair.answer, row % questions))
    validation = list(validation.values())
    test = {"seen": seen, "unseen": untouched[kept:], "normal": shuffled(held_out, 2)}
    for name, why in (
        ("seen", "the models that train on harmful pairs have none in common: measure fewer together"),
        ("unseen", "unlearning touched every harmful prompt of the data: give others with --unseen_dataset"),
        ("normal", "the test part of the normal data holds no question that was not trained on: give more data"),
    ):
        if numbers[name] and not test[name]:
            raise UserError(f"there is no {name} prompt to measure on ({why}, or leave them out: --n_{name} 0)")
    of_category: dict[str, list[Prompt]] = {}
    for prompt in test["unseen"]:
        for kind in prompt.categories:
            of_category.setdefault(kind, []).append(prompt)
    return PromptSets(
        {name: test[name][: numbers[name]] for name in SETS if numbers[name]},
        {"unseen": untouched[:kept][: numbers["unseen"]], "normal": shuffled(validation, 3)[: numbers["normal"]]},
        {kind: of_category[kind][: numbers["unseen"]] for kind in sorted(of_category)},
    )


def _harmful(responses: Iterable[Response], wanted) -> list[Prompt]:
    """The first unsafe response of each wanted prompt."""
    found = {}
    for row, response in enumerate(responses):
        if not response.safe and response.question.strip() and response.answer.strip() and wanted(response.question):
            found.setdefault(response.question, Prompt(response.question, response.answer, row, response.categories))
    return list(found.values())


class EvalData:
    """The data of an evaluation, each read once.

    Args:
        args: harmful_dataset, harmful_revision, harmful_split, unseen_dataset, unseen_split, normal_dataset;
            what is None is as the first training had it.
        trainings: the stage 1 runs behind the models (`read_trainings`).

    Raises:
        UserError: data cannot be read, are not those of the trainings, or were split by different seeds.
    """

    def __init__(self, args: Namespace, trainings: list[RunRecord]):
        first = trainings[0].flags
        harmful = args.harmful_dataset or first["harmful_dataset"]
        same = harmful == first["harmful_dataset"]
        read_then = trainings[0].harmful_data.get("revision")  # of a hub data set, named or not
        self._where = (
            harmful,
            args.harmful_revision or (first["harmful_revision"] or read_then if same else None),
            args.harmful_split or (first["harmful_split"] if same else "train"),
        )
        self.responses = read_responses(*self._where)
        self.unseen = self.responses
        if args.unseen_dataset or args.unseen_split:
            where = args.unseen_dataset or harmful
            revision = None if args.unseen_dataset else self._where[1]
            self.unseen = read_responses(where, revision, args.unseen_split or "train")
        seeds = {training.flags["seed"] for training in trainings}
        if len(seeds) > 1:
            raise UserError(
                f"the models split the normal data by different seeds ({sorted(seeds)}), so nothing is held out "
                "for all of them: evaluate those of one seed together"
            )
        normal = args.normal_dataset or first["normal_dataset"]
        self.normal = read_normal(normal, seeds.pop())
        self.choices = read_choices(normal)
        for training in trainings:
            for what, source in (("harmful", self._harmful((), None).source), ("normal", self.normal.source)):
                theirs, ours = getattr(training, f"{what}_data"), source
                if any(theirs.get(key) != ours[key] for key in ("sha256", "rows", "revision")):
                    raise UserError(
                        f"{ours['name']} is not what a model was trained on ({theirs.get('name')}, sha256 "
                        f"{theirs.get('sha256')}): give that with --{what}_dataset"
                    )
        self.sources = {"harmful": self._harmful((), None).source, "normal": self.normal.source}
        learned, learned_of_a_kind, self._touched = [], [], set()
        for training in trainings:
            trained, touched = self._read_by(training)
            self._touched |= touched
            if trained and not training.flags.get("harm_category"):
                learned.append(trained)
            elif trained:
                learned_of_a_kind.append(trained)
        self._trained = set.intersection(*(learned or learned_of_a_kind or [set()]))

    @cache  # noqa: B019 (one Data lives as long as the program)
    def _harmful(self, categories: tuple[str, ...], min_severity: int | None) -> HarmfulData:
        return read_harmful(*self._where, categories, min_severity)

    def _read_by(self, training: RunRecord) -> tuple[set[str], set[str]]:
        """The harmful questions that a training trained on, and all that it touched."""
        flags = training.flags
        harmful = self._harmful(tuple(flags.get("harm_category") or ()), flags.get("min_severity"))
        losses = {name for name, weight in loss_weights(flags).items() if weight}
        order = BatchSampler(
            len(harmful.pairs),
            self.normal.train,
            len(answer_pool(losses, harmful, self.normal)),
            flags["batch_size"] * training.training.get("processes", 1),
            flags["k_random"] if losses & {"rd", "rm"} else 0,
            flags["seed"],
            flags.get("all_harmful", False),
        )
        return StepBatches(None, order, harmful, self.normal, losses).touched(flags["max_unlearn_steps"])

    def prompts(self, numbers: dict[str, int], seed: int) -> PromptSets:
        """Prompts that every training on harmful pairs trained on, and prompts that none touched. Raises UserError.

        Trainings of one kind of harm alone count for "seen" only where there is no other.
        """
        return draw_prompts(self.responses, self.unseen, self.normal, self._trained, self._touched, numbers, seed)

    def judge(self, name: str, prompts: Iterable[Prompt], seed: int, output: Path, device: torch.device) -> Judge:
        """The judge of that name, trained (where it is) on none of `prompts`. Raises UserError."""
        judged = {prompt.question for prompt in prompts}
        return make_judge(
            name,
            responses=self.responses,
            normal=[self.normal.texts[row] for row in self.normal.train],
            judged=judged,
            seed=seed,
            cache=output / "judge.jsonl",
            device=device,
        )
