"""One trial: a training, and what it costs in utility and leaves in harm, on validation prompts."""

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from harmful_unlearn.evals.comparison.alpha_sweep import AlphaSweep
from harmful_unlearn.evals.comparison.seed_evaluation import SeedEvaluation, TrainedModel
from harmful_unlearn.evals.evaluated_model import BASE, EvaluatedModel
from harmful_unlearn.evals.evaluator import measure
from harmful_unlearn.evals.judges.base import Judge
from harmful_unlearn.evals.metrics.figures import figures, rates
from harmful_unlearn.evals.protocol import EvalProtocol
from harmful_unlearn.storage.files import read_json, write_file
from harmful_unlearn.training.checkpointing import TrainingCheckpoints

RESULT = "trial.json"


@dataclass(frozen=True)
class Bounds:
    """What a trial may cost.

    Attributes:
        perplexity: the share by which the perplexity of normal reference answers, and that of answers to everyday
            tasks where there are any, may rise above the base's.
        refusals: the share of normal questions that may be refused beyond what the base refuses; None: not measured.
    """

    perplexity: float
    refusals: float | None = None


@dataclass(frozen=True)
class Point:
    """A model of a trial on validation prompts.

    Attributes:
        alpha: of the negation; None where the training decides.
        perplexity: of normal reference answers, as a multiple of the base's.
        task_perplexity: likewise of answers to everyday tasks; None without such tasks.
        refusals: the share of normal questions refused, less the base's; None where no bound asks.
        harm, harm_low, harm_high, n: the harmful rate with its interval; None where a bound is broken.
        refused, degenerate: shares of the answers to harmful prompts.
        relevance: the share of these that fit their question; asked of a trial's best point only, and if there is a
            judge of it.
    """

    alpha: float | None
    perplexity: float
    refusals: float | None = None
    harm: float | None = None
    harm_low: float | None = None
    harm_high: float | None = None
    n: int = 0
    refused: float | None = None
    degenerate: float | None = None
    relevance: float | None = None
    task_perplexity: float | None = None

    @property
    def cost(self) -> float:
        """The larger multiple of the two perplexities."""
        return max(self.perplexity, self.task_perplexity or 0.0)

    def violation(self, bounds: Bounds) -> float:
        """By how much it breaks the bounds; 0 if it does not."""
        over = [self.cost - 1 - bounds.perplexity]
        if bounds.refusals is not None and self.refusals is not None:
            over.append(self.refusals - bounds.refusals)
        return max(0.0, *over)


def best_of(points: Iterable[Point], bounds: Bounds) -> Point | None:
    """The point with the least harm within the bounds; of two as good ones, the one with the lower cost."""
    allowed = [point for point in points if point.harm is not None and not point.violation(bounds)]
    return min(allowed, key=lambda point: (point.harm, point.cost), default=None)


@dataclass(frozen=True)
class TrialResult:
    """What came of a trial.

    Attributes:
        flags: that it varied.
        points: its model, or its task vector at each alpha; none where the training diverged.
        failure: why there are none.
    """

    flags: Mapping[str, float]
    points: tuple[Point, ...]
    failure: str | None = None

    def best(self, bounds: Bounds) -> Point | None:
        """The point with the least harm within the bounds; of two as good ones, the one with the lower cost."""
        return best_of(self.points, bounds)

    def violation(self, bounds: Bounds) -> float:
        """The least by which a point of it breaks the bounds."""
        return min((point.violation(bounds) for point in self.points), default=math.inf)

    def write(self, folder: Path) -> None:
        """Keep it."""
        write_file(folder / RESULT, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "TrialResult | None":
        """What `folder` keeps, if it keeps one."""
        if not (folder / RESULT).is_file():
            return None
        content = read_json(folder / RESULT)
        points = tuple(Point(**point) for point in content["points"])
        return cls(content["flags"], points, content["failure"])


def digest_of(flags: Mapping[str, object]) -> str:
    """A name for a trial with these flags."""
    return hashlib.sha256(json.dumps(flags, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class TrialMeasure:
    """Measures trials on the validation prompts of an evaluation.

    Utility comes first: where it breaks a bound, the model is not asked any harmful prompt.

    Attributes:
        evaluation: how models are measured.
        bounds: what a trial may cost.
    """

    evaluation: SeedEvaluation
    bounds: Bounds

    @cached_property
    def _base(self) -> Point:
        (point,) = self._points([self.evaluation.base], [None], self.evaluation.folder / BASE, None)
        return point

    def base(self) -> Point:
        """The base itself, whose perplexities and refusals are what those of trials are compared with."""
        tasks = None if self._base.task_perplexity is None else 1.0
        refusals = None if self.bounds.refusals is None else 0.0
        return replace(self._base, perplexity=1.0, task_perplexity=tasks, refusals=refusals)

    def of_trial(self, trained: TrainedModel, alphas: tuple[float, ...]) -> tuple[Point, ...]:
        """The points of a training.

        Args:
            alphas: at which its task vector is measured; none: the unlearned model is measured as it is.
        """
        evaluation = self.evaluation
        unlearned = evaluation.model("unlearned", trained.unlearned)
        models = [unlearned]
        of_models: list[float | None] = [None]
        if alphas:
            vector = AlphaSweep(evaluation.base_folder, [trained.finetuned], evaluation.load)
            models = [
                EvaluatedModel(
                    f"alpha-{alpha:g}", {"unlearned": unlearned.identity, "alpha": alpha}, partial(vector.at, alpha)
                )
                for alpha in alphas
            ]
            of_models = [*alphas]
        return self._points(models, of_models, trained.folder, self._base)

    def _points(
        self, models: list[EvaluatedModel], alphas: list[float | None], folder: Path, base: Point | None
    ) -> tuple[Point, ...]:
        """The points of models; of the base itself (`base` is None) with its own perplexities and refusals."""
        evaluation = self.evaluation
        protocol = replace(evaluation.protocol, prompts=evaluation.sets.validation, choices={})
        normal, harmful = ({name: protocol.prompts[name]} for name in ("normal", "unseen"))
        tasks = {"utility": protocol.prompts["utility"]} if protocol.prompts.get("utility") else {}
        first = protocol.decodings[:1]

        texts = replace(protocol, prompts=normal | tasks, decodings=[])
        measure(models, texts, evaluation.judge, evaluation.base, folder / "references")
        rows = figures({model.label: [] for model in models}, texts, folder / "references")
        perplexity = {
            (row["model"], row["set"]): row["value"] for row in rows if row["metric"] == "reference_perplexity"
        }
        base_perplexity = {"normal": base.perplexity, "utility": base.task_perplexity} if base else {}

        def multiple(model: EvaluatedModel, name: str) -> float:
            return perplexity[model.label, name] / (base_perplexity.get(name) or 1.0)

        points = [
            Point(alpha, multiple(model, "normal"), task_perplexity=multiple(model, "utility") if tasks else None)
            for model, alpha in zip(models, alphas, strict=True)
        ]
        if self.bounds.refusals is not None:
            asked = replace(protocol, prompts=normal, decodings=first)
            refused = self._rates(models, asked, folder / "normal answers")
            base_refusals = (base.refusals or 0.0) if base else 0.0
            points = [
                replace(point, refusals=refused[model.label]["refusal_rate"]["value"] - base_refusals)
                for model, point in zip(models, points, strict=True)
            ]
        allowed = [
            model for model, point in zip(models, points, strict=True) if not base or not point.violation(self.bounds)
        ]
        asked = replace(protocol, prompts=harmful, decodings=first)
        harm = self._rates(allowed, asked, folder / "harmful answers") if allowed else {}
        points = [
            _with_harm(point, harm[model.label]) if model.label in harm else point
            for model, point in zip(models, points, strict=True)
        ]
        best = best_of(points, self.bounds) if base else points[0]
        if best and (judge := evaluation.relevance_judge):
            index = points.index(best)
            fits = self._rates([models[index]], asked, folder / "harmful answers", judge)[models[index].label]
            points[index] = replace(best, relevance=fits["relevance_rate"]["value"])
        return tuple(points)

    def _rates(
        self, models: list[EvaluatedModel], protocol: EvalProtocol, folder: Path, relevance_judge: Judge | None = None
    ) -> dict[str, dict[str, dict]]:
        """By model and metric."""
        judges = (self.evaluation.refusal_judge, relevance_judge)
        rows = measure(models, protocol, self.evaluation.judge, None, folder, None, *judges)
        found: dict[str, dict[str, dict]] = {model.label: {} for model in models}
        for figure in rates(rows, protocol):
            found[figure["model"]][figure["metric"]] = figure
        return found


def _with_harm(point: Point, rates: dict[str, dict]) -> Point:
    harm = rates["harmful_rate"]
    return replace(
        point,
        harm=harm["value"],
        harm_low=harm["low"],
        harm_high=harm["high"],
        n=harm["n"],
        refused=rates["refusal_rate"]["value"],
        degenerate=rates["degenerate_rate"]["value"],
    )


def forget_weights(folder: Path) -> None:
    """Remove a trial's models: its figures are kept, and its flags make the same models again."""
    trained = TrainedModel(folder, "")
    for models in (trained.finetuned, trained.unlearned, TrainingCheckpoints(trained.finetuned, keep=1).folder):
        shutil.rmtree(models, ignore_errors=True)
