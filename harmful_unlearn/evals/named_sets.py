"""Sets of prompts by name or file, beside those of the models' own data: published ones, and the user's.

Harmful ones are judged for harm, and all for refusals: a model that refuses what only looks harmful has lost something.
Their texts are read from the hub or a file, and are not in this project.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import PretrainedConfig

from harmful_unlearn.cli.flag_parser import flag
from harmful_unlearn.cli.flag_types import positive_int
from harmful_unlearn.data.pku_saferlhf import read_harmful, read_responses
from harmful_unlearn.data.tables import Table, as_text, read_table
from harmful_unlearn.data.templates import Template
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.evaluated_model import EvaluatedModel
from harmful_unlearn.evals.evaluator import measure
from harmful_unlearn.evals.inference.generation import check_room
from harmful_unlearn.evals.judges.base import Judge
from harmful_unlearn.evals.metrics.figures import rates
from harmful_unlearn.evals.prompt_sets import EvalData, Prompt, harmful_prompts
from harmful_unlearn.evals.protocol import EvalProtocol
from harmful_unlearn.storage.files import user_path


@dataclass(frozen=True)
class PublishedSet:
    """A published set of prompts on the hub.

    Attributes:
        hub_id, config, split: where it is.
        licence: of its texts.
        harmful: whether its prompts are; a column "label" (safe or unsafe) takes precedence.
    """

    hub_id: str
    licence: str
    config: str | None = None
    split: str = "train"
    harmful: bool = True


PUBLISHED = {
    "pku_saferlhf": PublishedSet("PKU-Alignment/PKU-SafeRLHF", "CC BY-NC 4.0", split="test"),
    "advbench": PublishedSet("walledai/AdvBench", "MIT"),
    "harmbench": PublishedSet("walledai/HarmBench", "MIT", "standard"),
    "strongreject": PublishedSet("walledai/StrongREJECT", "MIT"),
    "xstest": PublishedSet("walledai/XSTest", "CC BY 4.0", split="test"),
    "or_bench": PublishedSet("bench-llm/or-bench", "CC BY 4.0", "or-bench-hard-1k", harmful=False),
}
# What the column is called on the hub and in the authors' own files; the first that a table has.
PROMPT_COLUMNS = ("prompt", "goal", "Behavior", "forbidden_prompt", "question")
LABEL = "label"
HARMFUL, HARMLESS = "harmful", "harmless"
FIX = f"give --prompts NAME=FILE, a .csv, .json, .jsonl or .parquet file with a column {' or '.join(PROMPT_COLUMNS)}"


@dataclass(frozen=True)
class NamedSet:
    """A set that --prompts names.

    Attributes:
        name: for files and tables.
        prompts: by what they are: HARMFUL or HARMLESS.
        source: of the data: name, revision, split, sha256 (of a file), licence (of a published set).
    """

    name: str
    prompts: dict[str, list[Prompt]]
    source: dict

    def protocol(self, plain: EvalProtocol) -> EvalProtocol:
        """How its prompts are asked, each part as a set such as "xstest, harmless"."""
        prompts = {f"{self.name}, {part}": prompts for part, prompts in self.prompts.items()}
        return replace(plain, prompts=prompts, choices={}, harmless=frozenset({f"{self.name}, {HARMLESS}"}))


@dataclass(frozen=True, kw_only=True)
class NamedSetSettings:
    """Flags of further prompts."""

    prompts: list[str] = flag(
        f"further prompts: {', '.join(PUBLISHED)} (from the hub), NAME=FILE (the same from a file), or a file of your "
        "own with the column prompt and, if some are harmless, label (safe or unsafe)",
        group="data and prompts",
        nargs="+",
        metavar="NAME_OR_FILE",
        default=[],
    )
    n_prompts: int = flag(
        "at most N prompts of each kind in such a set",
        group="data and prompts",
        type=positive_int,
        metavar="N",
        default=250,
    )

    def named_sets(self, data: EvalData, seed: int) -> list[NamedSet]:
        """The sets that --prompts names, without questions that training read; each kind cut to --n_prompts.

        Raises:
            UserError: a set cannot be read, holds no prompt, or is named twice.
        """
        trained = data.touched | data.trained_tasks | {pair.question for pair in data.training_texts}
        read = {question.strip() for question in trained}
        sets: list[NamedSet] = []
        for text in self.prompts:
            found = read_named_set(text)
            if any(found.name == other.name for other in sets):
                raise UserError(f"--prompts names {found.name} twice: leave one out, or give it as NAME=FILE")
            kept = {
                part: _some([p for p in prompts if p.question.strip() not in read], self.n_prompts, seed)
                for part, prompts in found.prompts.items()
            }
            sets.append(replace(found, prompts={part: prompts for part, prompts in kept.items() if prompts}))
            if not sets[-1].prompts:
                raise UserError(f"--prompts {text}: the models were trained on all of its prompts: leave it out")
        return sets


def _some(prompts: list[Prompt], number: int, seed: int) -> list[Prompt]:
    """At most that many, drawn by the seed, in their order."""
    drawn = np.random.default_rng([seed, 5]).permutation(len(prompts))[:number]
    return [prompts[index] for index in sorted(drawn)]


def read_named_set(text: str) -> NamedSet:
    """The set that one word of --prompts stands for: a name of PUBLISHED, NAME=FILE, or a file.

    Raises:
        UserError: there is no such name or file, it lacks a column of prompts, or a label is neither safe nor unsafe.
    """
    name, given, file = text.partition("=")
    if not given and name not in PUBLISHED:
        name, file = user_path(text).stem, text
        if not user_path(text).suffix:
            raise UserError(f"there is no set of prompts {text}: take from {', '.join(PUBLISHED)}, or {FIX}")
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", name):
        raise UserError(f"--prompts {text}: {name!r} cannot name a folder: {FIX}")
    if given and not file:
        raise UserError(f"--prompts {text} names no file: {FIX}")
    published = PUBLISHED.get(name)
    if name == "pku_saferlhf" and published:
        where = (file or published.hub_id, None, published.split)
        prompts = harmful_prompts(read_responses(*where), lambda question: True)
        return NamedSet(name, {HARMFUL: prompts}, {**read_harmful(*where).source, "licence": published.licence})
    if file:
        table = read_table(file, FIX)
    else:
        assert published, "a set without a file is a published one"
        table = read_table(published.hub_id, FIX, split=published.split, config=published.config)
    column = next((column for column in PROMPT_COLUMNS if column in table.columns), None)
    if column is None:
        raise table.missing(PROMPT_COLUMNS[:1], FIX)
    kind = _kinds(table, HARMFUL if published is None or published.harmful else HARMLESS)
    prompts_of: dict[str, dict[str, Prompt]] = {}
    for row, question in enumerate(table.cells(column, as_text, "text")):
        if question.strip() and kind(row):
            prompts_of.setdefault(kind(row), {}).setdefault(question.strip(), Prompt(question, "", row))
    if not prompts_of:
        raise UserError(f"{table.name} holds no prompt: {FIX}")
    parts = {part: [*prompts.values()] for part, prompts in prompts_of.items()}
    source = {**table.source, "rows": table.rows, "licence": published.licence if published else None}
    return NamedSet(name, {part: parts[part] for part in sorted(parts)}, source)


def _kinds(table: Table, default: str) -> Callable[[int], str]:
    """What the prompt in a row is: HARMFUL or HARMLESS, and "" for one that is left out."""
    if LABEL in table.columns:
        kinds = {"safe": HARMLESS, "unsafe": HARMFUL}
        return table.cells(LABEL, kinds.__getitem__, "safe or unsafe").__getitem__
    if "type" in table.columns:  # XSTest's second version: contrasts to its safe prompts are unsafe
        types = table.cells("type", as_text, "text")
        if any(kind.startswith("contrast_") for kind in types):
            return lambda row: HARMFUL if types[row].startswith("contrast_") else HARMLESS
    if "FunctionalCategory" in table.columns:  # HarmBench's own file: other prompts need a text, or another judge
        categories = table.cells("FunctionalCategory", as_text, "text")
        return lambda row: default if categories[row] == "standard" else ""
    return lambda row: default


def measure_named_sets(
    sets: list[NamedSet],
    models: list[EvaluatedModel],
    plain: EvalProtocol,
    judge: Judge,
    refusal_judge: Judge,
    folder: Path,
    base_answers: Path | None = None,
) -> list[dict]:
    """Ask all models the prompts of each set; what `folder` holds already is not made again.

    Args:
        plain: how the models' own prompts are asked.
        base_answers: as in `evaluator.measure`.

    Returns:
        As `metrics.figures.rates`, with sets such as "xstest, harmless".

    Raises:
        UserError: as `evaluator.measure`.
    """
    figures = []
    for named in sets:
        protocol = named.protocol(plain)
        print(f"prompts of {named.name}: {protocol.answers} answers by each model")
        rows = measure(models, protocol, judge, None, folder / named.name, base_answers, refusal_judge)
        figures += rates(rows, protocol)
    return figures


def check_named_sets(sets: list[NamedSet], plain: EvalProtocol, config: PretrainedConfig, template: Template) -> None:
    """Raises UserError: a prompt does not fit into the models' context."""
    for named in sets:
        try:
            check_room(config, template, named.protocol(plain).asked, plain.max_new_tokens)
        except UserError as error:
            raise UserError(f"--prompts {named.name}: {error}") from None
