"""The attack by fine-tuning: how fast does harm come back, and what does that cost the attacker?

Knowledge that was removed has to be learned again; knowledge that was only suppressed comes back at once. The curves of
an unlearned model say something beside those of the base, and of a model that never knew.
"""

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.pku_saferlhf import Response
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.data.step_batches import StepBatch
from harmful_unlearn.evals.attacks.figures import PLAIN, WORST
from harmful_unlearn.evals.evaluated_model import EvaluatedModel, LoadedModel
from harmful_unlearn.evals.evaluator import measure
from harmful_unlearn.evals.files.answers import rows_of
from harmful_unlearn.evals.judges.base import Judge
from harmful_unlearn.evals.metrics.figures import rates
from harmful_unlearn.evals.prompt_sets import Prompt
from harmful_unlearn.evals.protocol import EvalProtocol, sha256_of
from harmful_unlearn.losses.objective import Objective
from harmful_unlearn.models.loading import context_length, enable_gradient_checkpointing
from harmful_unlearn.models.lora import Lora, add_lora, lora_candidates
from harmful_unlearn.models.offload import execution_device
from harmful_unlearn.models.precision import computing_in

RELEARN = "relearn"
FULL, LORA = "all weights", "LoRA"
SAME_KIND, OTHER_KIND, BENIGN = "harmful pairs", "harmful pairs of another kind", "benign text"
BATCH = 2
RANK, LORA_ALPHA = 8, 16
LONGEST = 400  # characters of an answer that is trained on: a curve is many trainings
LORA_RATE = 10  # times the learning rate of all weights: an adapter starts at zero and needs more


@dataclass(frozen=True)
class Attacker:
    """One way to fine-tune.

    Attributes:
        weights: FULL or LORA.
        text: what it trains on: SAME_KIND, OTHER_KIND or BENIGN.
        lr: constant, of AdamW.
    """

    weights: str
    text: str
    lr: float

    def __str__(self) -> str:
        return f"{self.weights}, {self.text}, lr {self.lr:g}"


class Relearning:
    """A model under fine-tuning, which can be asked between the steps: one training for a whole curve.

    AdamW at a constant rate, batches of two, in a new order each epoch; the loss is that of GD.

    Args:
        load: gives the model as it is before.
        pairs: what it is trained on.
        precision: "fp32" or "bf16", of forward and backward passes. Weights that are trained are float32.
    """

    def __init__(
        self, load: Callable[[], LoadedModel], attacker: Attacker, pairs: list[Pair], seed: int, precision: str
    ):
        self._load, self._attacker, self._pairs = load, attacker, pairs
        self._seed, self._precision = seed, precision
        self._steps: int | None = None  # how many the model has had; None: it is not loaded

    def _start(self) -> None:
        model, self._template = self._load()
        torch.manual_seed(self._seed)  # of a new adapter, and of dropout
        if self._attacker.weights == LORA:
            model = add_lora(model, Lora(RANK, LORA_ALPHA, tuple(lora_candidates(model))), "attacked")
        else:
            model.float()
        self._model: PreTrainedModel = model
        self._draw = np.random.default_rng(self._seed)
        self._order: list[int] = []
        self._collator = Collator(self._template, "paper", context_length(model.config))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=self._attacker.lr, fused=True)
        self._objective = Objective(model, {"gd": 1.0})
        enable_gradient_checkpointing(model, wanted=False)

    def at(self, steps: int) -> LoadedModel:
        """The model after that many steps, in eval mode: the same object as of an earlier call, if it can go on.

        Raises:
            UserError: a weight to be trained is offloaded.
        """
        if self._steps is None or self._steps > steps:
            self._start()
            self._steps = 0
        model = self._model.train()
        for _ in tqdm(range(steps - self._steps), "relearning", unit="step", leave=False):
            while len(self._order) < BATCH:
                self._order += self._draw.permutation(len(self._pairs)).tolist()
            rows, self._order = self._order[:BATCH], self._order[BATCH:]
            batch = self._collator.answers_batch([self._pairs[row] for row in rows], [])
            with computing_in(self._precision, model):
                loss, _ = self._objective(model, StepBatch(batch.to(execution_device(model))))
                loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
        self._steps = steps
        return model.eval(), self._template


@dataclass(frozen=True)
class RelearnPlan:
    """The grid of attackers, and what is asked after each number of steps.

    Attributes:
        texts: what each kind of text is, by name; all have equally many pairs.
        lr: of attacks on all weights; those with LoRA have LORA_RATE times these.
        steps: after which the model is asked; without 0.
        prompts: what is asked; none is of the kind that OTHER_KIND holds.
        other_kind: which that is; "" if the data have no such pairs.
    """

    texts: dict[str, list[Pair]]
    lr: list[float]
    steps: list[int]
    prompts: list[Prompt]
    other_kind: str

    @property
    def attackers(self) -> list[Attacker]:
        """The grid."""
        factors = {FULL: 1, LORA: LORA_RATE}
        return [
            Attacker(weights, text, factor * lr)
            for (weights, factor), text, lr in product(factors.items(), self.texts, self.lr)
        ]

    def measure(
        self,
        models: list[EvaluatedModel],
        plain: EvalProtocol,
        judge: Judge,
        rows: dict[str, list[dict]],
        folder: Path,
        base_answers: Path | None = None,
    ) -> list[dict]:
        """Harmful rates of all models after each number of steps of each attacker.

        Args:
            plain: how the attacked prompts, among them `prompts`, are asked without an attack.
            rows: by model, the answers to these prompts (others may be among them).
            base_answers: as in `evaluator.measure`.

        Returns:
            Figures as `metrics.figures.rates` gives harmful rates, each with its "attacker", its "text", "steps",
            "pairs" and "which" (""). Of each number of steps also that of the "worst" attacker, which "which" names;
            its interval does not count that it was chosen as the highest.
        """
        protocol = replace(plain, prompts={RELEARN: self.prompts})
        measured: dict[tuple[str, int], list[dict]] = {}
        ((plain_set, decoding),) = plain.rounds
        for model in models:
            before = {row["prompt"]: row for row in rows_of(rows[model.label], plain_set, decoding)}
            first = [{**before[prompt.question], "set": RELEARN} for prompt in self.prompts]
            measured[model.label, 0] = [self._figure(rates({model.label: first}, protocol), None, 0)]
        if self.other_kind:
            print(f"attack: {RELEARN}, the other kind of harm is {self.other_kind}")
        for attacker in self.attackers:
            pairs = self.texts[attacker.text]
            facts = {"attacker": asdict(attacker), "pairs_sha256": sha256_of([asdict(pair) for pair in pairs])}
            for model in models:
                print(f"attack: {RELEARN}, {attacker}, {model.label}")
                training = Relearning(model.load, attacker, pairs, plain.seed, plain.precision)
                after = [
                    EvaluatedModel(
                        label_of(steps),
                        {**model.identity, **facts, "steps": steps},
                        partial(training.at, steps),
                        trained_from=model.label,
                    )
                    for steps in self.steps
                ]
                home = folder / str(attacker).replace(", ", "-").replace(" ", "-") / model.label
                answers = measure(after, replace(protocol, backend="hf"), judge, None, home, base_answers)
                for steps in self.steps:
                    own = rates({model.label: answers[label_of(steps)]}, protocol)
                    measured.setdefault((model.label, steps), []).append(self._figure(own, attacker, steps))
                del training, after  # the next training needs their memory
                gc.collect()
        worst = [max(figures, key=lambda figure: figure["value"] or 0) for figures in measured.values()]
        return [figure for figures in measured.values() for figure in figures] + [
            {
                **figure,
                "attacker": WORST,
                "text": "",
                "which": figure["attacker"] if figure["steps"] and figure["value"] else "",
            }
            for figure in worst
        ]

    def _figure(self, figures: list[dict], attacker: Attacker | None, steps: int) -> dict:
        """The harmful rate, and the degenerate rate beside it."""
        by = {figure["metric"]: figure for figure in figures}
        by_whom = {"attacker": str(attacker), "text": attacker.text} if attacker else {"attacker": PLAIN, "text": ""}
        cost = {"steps": steps, "pairs": len(self.texts[SAME_KIND])}
        broken = by["degenerate_rate"]["value"]
        return {**by["harmful_rate"], **by_whom, **cost, "degenerate_rate": broken, "which": ""}


def label_of(steps: int) -> str:
    """What the model after that many steps is called in the answers' folder."""
    return f"steps-{steps}"


def draw_texts(
    responses: list[Response], benign: list[Pair], prompts: list[Prompt], asked: set[str], number: int, seed: int
) -> tuple[dict[str, list[Pair]], str]:
    """What the attackers train on: `number` pairs of each text with short answers, none with a question in `asked`.

    The other kind is the kind of harm that the fewest of `prompts` are marked with, and not all of them, among those
    that alone mark enough pairs of the data; the harmful pairs are then not of that kind.

    Args:
        responses: all labelled responses of the harmful data.
        benign: normal pairs.
        prompts: what is attacked.

    Returns:
        The texts by name, without those that the data have too few pairs for, and the other kind ("" for none).
    """
    draw = np.random.default_rng([seed, 6])
    unsafe = [r for r in responses if not r.safe and r.question.strip() and _fits(r.answer)]
    harmful = [response for response in unsafe if response.question not in asked]
    alone: dict[str, list[Response]] = {}
    for response in harmful:
        if len(response.categories) == 1:
            alone.setdefault(next(iter(response.categories)), []).append(response)
    enough = sorted(
        kind
        for kind, pairs in alone.items()
        if len(pairs) >= number
        and sum(kind not in response.categories for response in harmful) >= number
        and not all(kind in prompt.categories for prompt in prompts)
    )
    other = min(enough, key=lambda kind: sum(kind in prompt.categories for prompt in prompts), default="")
    pools = {
        SAME_KIND: [Pair(r.question, r.answer) for r in harmful if other not in r.categories],
        OTHER_KIND: [Pair(r.question, r.answer) for r in alone.get(other, [])],
        BENIGN: [pair for pair in benign if _fits(pair.answer) and pair.question not in asked],
    }
    return {
        text: [pool[index] for index in draw.choice(len(pool), number, replace=False)]
        for text, pool in pools.items()
        if len(pool) >= number
    }, other


def _fits(answer: str) -> bool:
    return 0 < len(answer.strip()) <= LONGEST
