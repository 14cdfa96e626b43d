"""The flags of how models are measured, which evaluation.py and reproduce.py share, and what follows from them."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from accelerate import PartialState

from harmful_unlearn.cli.flag_parser import flag
from harmful_unlearn.cli.flag_types import device_map, positive_int, sampling_temperature, whole_number
from harmful_unlearn.data.templates import Template
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.attacks.asking import AttackSettings
from harmful_unlearn.evals.evaluated_model import EvaluatedModel, TemplateSettings
from harmful_unlearn.evals.inference.generation import TOKENS_PER_BATCH, Decoding
from harmful_unlearn.evals.judges.base import Judge
from harmful_unlearn.evals.judges.registry import (
    judge_name,
    make_judge,
    make_refusal_judge,
    make_relevance_judge,
    refusal_judge_name,
    relevance_judge_name,
)
from harmful_unlearn.evals.metrics import bleurt
from harmful_unlearn.evals.named_sets import NamedSetSettings
from harmful_unlearn.evals.prompt_sets import DataSettings, EvalData, Prompt, PromptSets, draw_prompts
from harmful_unlearn.evals.protocol import EvalProtocol
from harmful_unlearn.models.precision import resolve_precision

_prompts = partial(flag, group="data and prompts", type=whole_number, metavar="N", default=200)
_asking = partial(flag, group="asking and judging")


@dataclass(frozen=True, kw_only=True)
class MeasuringSettings(DataSettings, NamedSetSettings, TemplateSettings, AttackSettings):
    """Flags of data, prompts, generation and judging, which reproduce.py has too."""

    n_seen: int = _prompts("at most N harmful prompts used in unlearning; 0: none")
    n_unseen: int = _prompts("at most N harmful prompts that it never touched; 0: none")
    n_normal: int = _prompts("at most N normal prompts held out; 0: none")
    n_utility: int = _prompts("at most N tasks of --utility_dataset; 0: none")
    part: str = flag(
        "which part of the prompts: test, or validation, which holds others and no seen ones, to choose settings on",
        group="data and prompts",
        choices=("test", "validation"),
        default="test",
    )
    decoding: list[str] = _asking(
        "how answers are made; both may be given (default: sampled)",
        nargs="+",
        choices=("sampled", "greedy"),
        default=["sampled"],
    )
    temperature: float = _asking("of sampling", type=sampling_temperature, default=0.9)
    top_k: int = _asking("sample among the K likeliest tokens; 0: all", type=whole_number, metavar="K", default=50)
    max_new_tokens: int = _asking("of an answer", type=positive_int, default=100)
    judge: str = _asking(
        "classifier (offline, trained on the harmful data's labels), finetuned:MODEL (a small language model that is "
        "fine-tuned on them once), hf:MODEL, openai:MODEL or phrases:FILE (harmful if a line of FILE is in the answer)",
        type=judge_name,
        default="classifier",
    )
    refusal_judge: str = _asking(
        "which answers are refusals: phrases (those that begin as published refusals do), phrases:FILE (one beginning "
        "a line), hf:MODEL or openai:MODEL",
        type=refusal_judge_name,
        default="phrases",
    )
    relevance_judge: str = _asking(
        "which answers fit their question: likelihood (those that the base finds likelier after it than after another "
        "one, by more than real answers from shuffled ones show), hf:MODEL, openai:MODEL, or none",
        type=relevance_judge_name,
        default="likelihood",
    )
    bleurt: str | None = _asking(
        f"BLEURT by this regression model (without a name: {bleurt.BLEURT})",
        nargs="?",
        const=bleurt.BLEURT,
        metavar="MODEL",
    )
    tokens_per_batch: int = _asking(
        "of prompts and answers that are in memory at a time", type=positive_int, default=TOKENS_PER_BATCH
    )
    precision: str = _asking(
        "auto: bf16 where the device has instructions for it", choices=("auto", "fp32", "bf16"), default="auto"
    )
    device_map: str | None = _asking("spread a model over devices (accelerate): auto, balanced, ...", type=device_map)

    @property
    def prompt_numbers(self) -> dict[str, int]:
        """The most prompts of each set."""
        tasks = self.n_utility if self.utility_dataset else 0
        return {"seen": self.n_seen, "unseen": self.n_unseen, "normal": self.n_normal, "utility": tasks}

    @property
    def decodings(self) -> list[Decoding]:
        """The decodings that --decoding names."""
        names = dict.fromkeys(self.decoding)
        return [Decoding(self.temperature if name == "sampled" else None, self.top_k) for name in names]

    def draw(self, data: EvalData, seed: int, chosen_on: Collection[str] = frozenset()) -> PromptSets:
        """The prompts of a seed. With --part validation these stand in for the test prompts. Raises UserError.

        Args:
            chosen_on: as `draw_prompts`.
        """
        sets = draw_prompts(data, self.prompt_numbers, seed, chosen_on)
        if self.part == "test":
            return sets
        validation = {name: prompts for name, prompts in sets.validation.items() if prompts}
        if not validation:
            raise UserError("there is no validation prompt to measure on: give more data, or --n_unseen above 0")
        return replace(sets, test=validation, of_category={})

    def protocol(self, sets: PromptSets, data: EvalData, seed: int, template: Template) -> EvalProtocol:
        """How models are measured on the test prompts."""
        precision = resolve_precision(self.precision, PartialState().device)
        limits = (self.max_new_tokens, self.tokens_per_batch)
        return EvalProtocol(
            sets.test, self.decodings, *limits, seed, data.choices, precision, prompt_template=template.text
        )

    def make_refusal_judge(self, folder: Path) -> Judge:
        """The judge of refusals; `folder` is for its verdicts. Raises UserError."""
        return make_refusal_judge(self.refusal_judge, folder / "refusal_judge.jsonl", PartialState().device)

    def make_relevance_judge(
        self, data: EvalData, prompts: Iterable[list[Prompt]], seed: int, folder: Path, base: EvaluatedModel
    ) -> Judge | None:
        """The judge of whether answers fit these prompts; `folder` is for what it learns. Raises UserError."""
        return make_relevance_judge(
            self.relevance_judge,
            base=base,
            responses=data.responses,
            sets=[[prompt.question for prompt in part] for part in prompts],
            seed=seed,
            folder=folder,
            device=PartialState().device,
        )

    def make_judge(self, data: EvalData, prompts: Iterable[list[Prompt]], seed: int, folder: Path) -> Judge:
        """The judge, which has seen none of the prompts; `folder` is for its verdicts. Raises UserError."""
        return make_judge(
            self.judge,
            responses=data.responses,
            normal=data.training_texts,
            more_normal=data.other_texts,
            judged={prompt.question for part in prompts for prompt in part},
            seed=seed,
            cache=folder / "judge.jsonl",
            device=PartialState().device,
        )
