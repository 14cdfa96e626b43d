"""Which prompts a model is measured on: by what unlearning read, prompt by prompt rather than row by row.

The same prompt occurs in several rows of PKU-SafeRLHF, and each question of TruthfulQA in two texts:
a prompt counts as touched if any of its rows was.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from harmful_unlearn.data import NormalData, Pair, Response
from harmful_unlearn.errors import UserError

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
    in_part = {
        part: {normal.texts[row].question for row in getattr(normal, part)} for part in ("train", "test")
    }
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
        {
            "unseen": untouched[:kept][: numbers["unseen"]],
            "normal": shuffled(validation, 3)[: numbers["normal"]],
        },
        {kind: of_category[kind][: numbers["unseen"]] for kind in sorted(of_category)},
    )


def _harmful(responses: Iterable[Response], wanted) -> list[Prompt]:
    """The first unsafe response of each wanted prompt."""
    found = {}
    for row, response in enumerate(responses):
        if not response.safe and response.question.strip() and response.answer.strip() and wanted(response.question):
            found.setdefault(
                response.question, Prompt(response.question, response.answer, row, response.categories)
            )
    return list(found.values())
