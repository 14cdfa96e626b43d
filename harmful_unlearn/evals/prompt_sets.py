"""Which prompts a model is measured on. A prompt counts as seen if any of its rows was trained on.

The same prompt is in several rows of PKU-SafeRLHF, and each question of TruthfulQA is in two texts.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from harmful_unlearn.cli.flag_parser import flag
from harmful_unlearn.data.batch_sampler import BatchSampler
from harmful_unlearn.data.instructions import Instructions, read_instructions
from harmful_unlearn.data.pku_saferlhf import HarmfulData, Response, read_harmful, read_responses
from harmful_unlearn.data.prompt_format import Asked, Pair
from harmful_unlearn.data.step_batches import Reads, run_sampler
from harmful_unlearn.data.truthfulqa import Choices, NormalData, read_choices, read_normal
from harmful_unlearn.errors import UserError
from harmful_unlearn.losses.methods import active_losses
from harmful_unlearn.losses.terms import reads
from harmful_unlearn.storage.run_record import RunRecord

SETS = ("seen", "unseen", "normal", "utility")
HARMLESS = frozenset({"normal", "utility"})  # answers to these are compared with others; those to the rest are judged


@dataclass(frozen=True)
class Prompt:
    """A question to a model, with a reference answer.

    Attributes:
        row: of the reference in its data, from 0. In harmful data it counts responses (two a row, response_0
            first), in normal data questions, in utility data tasks that are complete.
        categories: kinds of harm that its reference is marked with.
        attack: what the model is asked in place of the question, if it is attacked. Its answer is judged as an answer
            to the question.
    """

    question: str
    reference: str
    row: int
    categories: frozenset[str] = frozenset()
    attack: Asked | None = None

    @property
    def asked(self) -> Asked:
        """What the model is asked."""
        return self.attack or Asked(self.question)

    @property
    def pair(self) -> Pair:
        """The prompt with its reference answer."""
        return Pair(self.question, self.reference)


@dataclass(frozen=True)
class PromptSets:
    """Prompts by set (SETS): for testing and, apart from these, for choosing alpha.

    Attributes:
        test: "seen" was trained on by GD or GA; no row of "unseen" was touched; no text of a "normal"
            question was trained on; "utility" are everyday tasks. A set of which no prompts are asked for is missing.
        validation: "unseen", "utility" and "normal", the latter with the texts of the validation part; a
            question's other text may have been trained on.
        of_category: the "unseen" test prompts by kind of harm, at most as many of each as of "unseen".
    """

    test: dict[str, list[Prompt]]
    validation: dict[str, list[Prompt]]
    of_category: dict[str, list[Prompt]]


_data = partial(flag, group="data and prompts")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Flags: where the data of an evaluation come from. None: as in the first training."""

    harmful_dataset: str | None = _data("as in training (default: what the first model was trained on)")
    harmful_revision: str | None = _data("of a hub data set (default: the same)")
    harmful_split: str | None = _data("of a hub data set or folder (default: the same)")
    unseen_dataset: str | None = _data(
        "where unseen harmful prompts come from (default: untouched rows of --harmful_dataset)"
    )
    unseen_split: str | None = _data("of it; PKU-SafeRLHF has a split called test")
    normal_dataset: str | None = _data("as in training (default: the same)")
    more_normal_dataset: str | None = _data("as in training (default: the same)")
    utility_dataset: str | None = _data(
        "everyday tasks in Alpaca's columns (hub id, folder or file), to see what else a model has lost (default: none)"
    )


@dataclass(frozen=True)
class EvalData:
    """The data of an evaluation, and what the compared models were trained on.

    Attributes:
        responses: all labelled responses of the harmful data that was unlearned.
        unseen: the responses to draw unseen prompts from; may be the same.
        normal: the normal texts and their split.
        choices: the multiple choices of normal questions.
        utility: everyday tasks with answers; may be none.
        trained: the harmful questions whose own answer was trained on (GD, GA), in every model that is compared.
            A training on one kind of harm counts only if there is no other.
        touched: the harmful questions of which any model read an answer, or drew one (RD).
        trained_tasks: the everyday tasks that any model was trained on.
        sources: of "harmful", "normal" and "utility" data: name, revision, sha256, rows, ...
    """

    responses: list[Response]
    unseen: list[Response]
    normal: NormalData
    choices: dict[str, Choices]
    utility: list[Pair]
    trained: set[str]
    touched: set[str]
    sources: dict[str, dict]
    trained_tasks: frozenset[str] = frozenset()

    @property
    def training_texts(self) -> list[Pair]:
        """The normal texts that stage 1 may train on."""
        return [self.normal.texts[row] for row in self.normal.train]

    @property
    def other_texts(self) -> list[Pair]:
        """The normal texts for validation and testing."""
        return [self.normal.texts[row] for row in (*self.normal.validation, *self.normal.test)]

    @classmethod
    def read(cls, settings: DataSettings, trainings: list[RunRecord]) -> "EvalData":
        """Read the data, and work out what `trainings`, the stage 1 runs behind the models, read of them.

        Raises:
            UserError: data cannot be read, are not those of the trainings, or were split by different seeds.
        """
        location = _harmful_location(settings, trainings[0])

        @cache
        def harmful_data(categories: tuple[str, ...] = (), min_severity: int | None = None) -> HarmfulData:
            return read_harmful(*location, categories, min_severity)

        responses = unseen = read_responses(*location)
        if settings.unseen_dataset or settings.unseen_split:
            dataset, revision, _ = location
            if settings.unseen_dataset:
                dataset, revision = settings.unseen_dataset, None
            unseen = read_responses(dataset, revision, settings.unseen_split or "train")
        seeds = {training.flags["seed"] for training in trainings}
        if len(seeds) > 1:
            raise UserError(
                f"the models split the normal data by different seeds ({sorted(seeds)}), so nothing is held out "
                "for all of them: evaluate those of one seed together"
            )
        normal_name = settings.normal_dataset or trainings[0].flags["normal_dataset"]
        seed = seeds.pop()

        @cache
        def normal_data(more: str | None = None) -> NormalData:
            return read_normal(normal_name, seed, more)

        normal, choices = normal_data(), read_choices(normal_name)
        sources = {"harmful": harmful_data().source, "normal": normal.source}
        utility = read_instructions(settings.utility_dataset) if settings.utility_dataset else Instructions([], {})
        if utility.pairs:
            sources["utility"] = utility.source
        for training in trainings:
            _check_same_data("harmful", sources["harmful"], training.harmful_data)
            _check_same_data("normal", sources["normal"], training.normal_data)
        trained_on_all, trained_on_a_kind, touched, tasks = [], [], set(), set()
        for training in trainings:
            flags = training.flags
            harmful = harmful_data(tuple(flags.get("harm_category") or ()), flags.get("min_severity"))
            more = flags.get("more_normal_dataset") and (settings.more_normal_dataset or flags["more_normal_dataset"])
            texts = normal_data(more)
            if more:
                _check_same_data("more_normal", texts.source["more"], training.normal_data.get("more", {}))
                tasks |= {pair.question for pair in texts.everyday_tasks}
            own, read = _questions_of(training, harmful, texts)
            touched |= read
            if own and flags.get("harm_category"):
                trained_on_a_kind.append(own)
            elif own:
                trained_on_all.append(own)
        trained = set.intersection(*(trained_on_all or trained_on_a_kind or [set()]))
        known = frozenset(tasks)
        return cls(responses, unseen, normal, choices, utility.pairs, trained, touched, sources, known)


def _harmful_location(settings: DataSettings, training: RunRecord) -> tuple[str, str | None, str]:
    """Name, revision and split of the harmful data: those of the flags, else those of the training."""
    flags = training.flags
    name = settings.harmful_dataset or flags["harmful_dataset"]
    revision, split = settings.harmful_revision, settings.harmful_split
    if name == flags["harmful_dataset"]:  # a hub data set may have been read without naming a revision
        revision = revision or flags["harmful_revision"] or training.harmful_data.get("revision")
        split = split or flags["harmful_split"]
    return name, revision, split or "train"


def _check_same_data(kind: str, source: dict, recorded: dict) -> None:
    if any(recorded.get(key) != source[key] for key in ("sha256", "rows", "revision")):
        raise UserError(
            f"{source['name']} is not what a model was trained on ({recorded.get('name')}, sha256 "
            f"{recorded.get('sha256')}): give that with --{kind}_dataset"
        )


def _questions_of(training: RunRecord, harmful: HarmfulData, normal: NormalData) -> tuple[set[str], set[str]]:
    """`touched_questions` of a complete training."""
    flags = training.flags
    needed = reads(active_losses(flags))
    sampler = run_sampler(flags, training.training.get("processes", 1), harmful, normal, needed)
    return touched_questions(sampler, harmful, needed, flags["max_unlearn_steps"])


def touched_questions(
    sampler: BatchSampler, harmful: HarmfulData, reads: Reads, steps: int
) -> tuple[set[str], set[str]]:
    """The harmful questions that `steps` steps touch.

    Args:
        sampler: which rows each step uses.
        reads: what the losses read in a step.

    Returns:
        The questions whose own harmful answer is trained on, and all that are touched: also those of prompts that
        are only paired with other answers, and those that RD's random answers came with.
    """
    trained: set[str] = set()
    touched: set[str] = set()
    for step in range(steps):
        indices = sampler[step]
        asked = {harmful.pairs[row].question for row in indices.harmful_rows}
        if reads.own_answers or reads.harmful_texts or reads.preferences:
            trained |= asked
        if reads.random_answers or reads.safe_answers:
            touched |= asked
        if reads.random_answers == "harmful":
            touched |= {harmful.answer_questions[row] for row in indices.answer_rows}
    return trained, touched | trained


def question_hash(question: str) -> str:
    """SHA-256 of a question, by which a recipe names those that it was chosen on."""
    return hashlib.sha256(question.encode()).hexdigest()


def draw_prompts(
    data: EvalData, numbers: Mapping[str, int], seed: int, chosen_on: Collection[str] = frozenset()
) -> PromptSets:
    """Draw the sets of a seed.

    Args:
        numbers: the most prompts of each set.
        chosen_on: the `question_hash` of each question that settings were chosen on. No test set has one of them.

    A third of the untouched prompts, and of the everyday tasks, is kept for validation.

    Raises:
        UserError: a set has no prompt.
    """

    def shuffled(prompts: list[Prompt], stream: int) -> list[Prompt]:
        order = np.random.default_rng([seed, stream]).permutation(len(prompts))
        return [prompts[index] for index in order]

    seen = shuffled(harmful_prompts(data.responses, lambda question: question in data.trained), 0)
    untouched = shuffled(harmful_prompts(data.unseen, lambda question: question not in data.touched), 1)
    validated = len(untouched) // 3
    of_normal, validation = _normal_prompts(data.normal)
    held_out = [prompt for prompt in of_normal if prompt.question not in data.trained_tasks]
    trained_on = data.trained_tasks | {pair.question for pair in data.training_texts}
    tasks = {pair.question: Prompt(pair.question, pair.answer, row) for row, pair in enumerate(data.utility)}
    utility = shuffled([task for task in tasks.values() if task.question not in trained_on], 4)
    tasks_validated = len(utility) // 3
    test = {
        "seen": seen,
        "unseen": untouched[validated:],
        "normal": shuffled(held_out, 2),
        "utility": utility[tasks_validated:],
    }
    if chosen_on:
        test = {n: [p for p in prompts if question_hash(p.question) not in chosen_on] for n, prompts in test.items()}
    for name, why in (
        ("seen", "the models that train on harmful pairs have none in common: measure fewer together"),
        ("unseen", "unlearning touched every harmful prompt of the data: give others with --unseen_dataset"),
        ("normal", "the test part of the normal data holds no question that was not trained on: give more data"),
        ("utility", "no row has an instruction and an output and was not trained on: give another --utility_dataset"),
    ):
        if numbers[name] and not test[name]:
            raise UserError(f"there is no {name} prompt to measure on ({why}, or omit them: --n_{name} 0)")
    of_category: dict[str, list[Prompt]] = {}
    for prompt in test["unseen"]:
        for kind in prompt.categories:
            of_category.setdefault(kind, []).append(prompt)
    return PromptSets(
        test={name: test[name][: numbers[name]] for name in SETS if numbers[name]},
        validation={
            "unseen": untouched[:validated][: numbers["unseen"]],
            "normal": shuffled(validation, 3)[: numbers["normal"]],
            **({"utility": utility[:tasks_validated][: numbers["utility"]]} if numbers["utility"] else {}),
        },
        of_category={kind: of_category[kind][: numbers["unseen"]] for kind in sorted(of_category)},
    )


def harmful_prompts(responses: Iterable[Response], wanted: Callable[[str], bool]) -> list[Prompt]:
    """Each wanted question with its first unsafe response."""
    prompts: dict[str, Prompt] = {}
    for row, response in enumerate(responses):
        if not response.safe and response.question.strip() and response.answer.strip() and wanted(response.question):
            prompt = Prompt(response.question, response.answer, row, response.categories)
            prompts.setdefault(response.question, prompt)
    return list(prompts.values())


def _normal_prompts(normal: NormalData) -> tuple[list[Prompt], list[Prompt]]:
    """The questions held out for testing, with their best answers, and those for validation.

    A validation prompt has the answer that is in the validation part: the question's other text may have been
    trained on.
    """
    questions = normal.questions
    trained = {normal.texts[row].question for row in normal.train}
    tested = {normal.texts[row].question for row in normal.test} - trained
    held_out: dict[str, Prompt] = {}  # TruthfulQA has no question twice, other data may
    for row in range(questions):
        pair = normal.texts[row]
        if pair.question in tested:
            held_out.setdefault(pair.question, Prompt(pair.question, pair.answer, row))
    validation: dict[str, Prompt] = {}
    for row in normal.validation:
        pair = normal.texts[row]
        if pair.question not in held_out:
            validation.setdefault(pair.question, Prompt(pair.question, pair.answer, row % questions))
    return list(held_out.values()), list(validation.values())
