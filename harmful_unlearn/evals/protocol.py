"""How models are measured: what is asked, how it is answered, and what of that decides the answers."""

import hashlib
import json
from dataclasses import asdict, dataclass

import numpy as np

from harmful_unlearn.data.prompt_format import PROMPT_TEMPLATE, Asked
from harmful_unlearn.data.truthfulqa import Choices
from harmful_unlearn.evals.inference.generation import Decoding
from harmful_unlearn.evals.prompt_sets import HARMLESS, Prompt


@dataclass(frozen=True)
class EvalProtocol:
    """How models are measured.

    Attributes:
        prompts: by set.
        decodings: every prompt is answered once in each of them.
        tokens_per_batch: of prompts and answers together; no figure depends on it, but for rounding.
        choices: TruthfulQA's multiple choices by question; empty for no MC1 and MC2.
        prompt_template: the text that questions are asked in (`Template.text`).
        backend: what makes the answers: "hf" (transformers) or "vllm", for models in folders only.
        harmless: the sets whose answers are not judged for harm.
    """

    prompts: dict[str, list[Prompt]]
    decodings: list[Decoding]
    max_new_tokens: int
    tokens_per_batch: int
    seed: int
    choices: dict[str, Choices]
    precision: str = "fp32"
    backend: str = "hf"
    prompt_template: str = PROMPT_TEMPLATE
    harmless: frozenset[str] = HARMLESS

    @property
    def rounds(self) -> list[tuple[str, Decoding]]:
        """Which set is asked in which decoding, in order."""
        return [(name, decoding) for name in self.prompts for decoding in self.decodings]

    @property
    def asked(self) -> list[Asked]:
        """What each model is asked, without the decodings."""
        return [prompt.asked for prompts in self.prompts.values() for prompt in prompts]

    @property
    def answers(self) -> int:
        """How many answers each model gives."""
        return sum(len(self.prompts[name]) for name, _ in self.rounds)

    def sampling_seed(self, name: str) -> int:
        """The seed of a set's sampled answers, each of which has a random stream of its own in it."""
        stream = list(self.prompts).index(name)
        return int(np.random.SeedSequence([self.seed, stream]).generate_state(1)[0])

    def settings(self) -> dict:
        """What decides the answers, JSON-able; the prompts by their rows and a hash."""
        texts = [
            [p.question, p.reference, *([asdict(p.attack)] if p.attack else [])]
            for prompts in self.prompts.values()
            for p in prompts
        ]
        choices = {question: asdict(choice) for question, choice in self.choices.items()}
        # The authors' template is not named, so that what was answered before there were others stays valid.
        template = {} if self.prompt_template == PROMPT_TEMPLATE else {"prompt_template": self.prompt_template}
        return {
            **template,
            "decodings": [{"name": decoding.name, **asdict(decoding)} for decoding in self.decodings],
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
            "precision": self.precision,
            "backend": self.backend,
            "choices_sha256": sha256_of(choices) if choices else None,
            "rows": {name: [prompt.row for prompt in prompts] for name, prompts in self.prompts.items()},
            "prompts_sha256": sha256_of(texts),
        }


def sha256_of(content: object) -> str:
    """Of something JSON-able."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
