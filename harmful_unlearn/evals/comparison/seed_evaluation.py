"""What a comparison measures with one seed: test sets, attacks, the alpha sweep, kinds of harm.

Figures are those of `metrics.figures`, with their seed and what else tells them apart.
"""

from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from accelerate import PartialState

from harmful_unlearn.data.templates import TemplateChoice
from harmful_unlearn.evals.attacks.measured import AttackPlan
from harmful_unlearn.evals.comparison.alpha_sweep import AlphaSweep, recommend
from harmful_unlearn.evals.comparison.oracle import ORACLE, oracle_figures
from harmful_unlearn.evals.evaluated_model import BASE, EvaluatedModel, LoadedModel, evaluated_model, load_model
from harmful_unlearn.evals.evaluator import measure
from harmful_unlearn.evals.files.results import write_prompts, write_results
from harmful_unlearn.evals.judges.base import Judge
from harmful_unlearn.evals.metrics.bleurt import add_bleurt
from harmful_unlearn.evals.metrics.figures import agreement, figures
from harmful_unlearn.evals.named_sets import NamedSet, measure_named_sets
from harmful_unlearn.evals.prompt_sets import PromptSets
from harmful_unlearn.evals.protocol import EvalProtocol
from harmful_unlearn.storage.run_record import RunRecord, read_trainings

SHOWN = {"seen": 5, "unseen": 10, "normal": 5, "utility": 5}  # prompts that the report shows with all answers


@dataclass(frozen=True)
class TrainedModel:
    """What a run of unlearn_harm_new.py left in a folder: the stage 1 model and the unlearned model.

    Attributes:
        command: what made them.
        failure: why they are not there; None if they are.
    """

    folder: Path
    command: str
    failure: str | None = None

    @property
    def finetuned(self) -> Path:
        return self.folder / "copy"

    @property
    def unlearned(self) -> Path:
        return self.folder / "unlearned"

    @property
    def record(self) -> RunRecord:
        """The record of stage 1."""
        return read_trainings(self.finetuned)[0]


@dataclass(frozen=True)
class SeedEvaluation:
    """How the models of one seed are measured.

    Attributes:
        folder: gets a folder of answers and scores for each measurement.
        base_folder: holds the base, under which the perplexity of all answers is computed.
        judge: of the answers to harmful prompts.
        refusal_judge: of all answers to the test sets.
        relevance_judge: of whether these fit their questions; None: nobody asks.
        sets: the prompts.
        protocol: how the test sets are asked.
        template: that all models are asked in.
        device_map: for accelerate, to spread a model over devices.
        oracle_folder: holds a model that never learned any harm.
    """

    folder: Path
    base_folder: Path
    judge: Judge
    refusal_judge: Judge
    sets: PromptSets
    protocol: EvalProtocol
    template: TemplateChoice | None = None
    device_map: str | None = None
    oracle_folder: Path | None = None
    relevance_judge: Judge | None = None

    def load(self, folder: Path) -> LoadedModel:
        return load_model(folder, self.protocol.precision, self.device_map, self.template)

    def model(self, label: str, folder: Path) -> EvaluatedModel:
        return evaluated_model(label, folder, self.load)

    @cached_property
    def base(self) -> EvaluatedModel:
        return self.model(BASE, self.base_folder)

    @cached_property
    def oracle(self) -> EvaluatedModel | None:
        return self.model(ORACLE, self.oracle_folder) if self.oracle_folder else None

    def all_models(self, models: dict[str, TrainedModel]) -> list[EvaluatedModel]:
        """The base, these models as they are unlearned, and the oracle, if there is one."""
        unlearned = [self.model(label, trained.unlearned) for label, trained in models.items()]
        return [self.base, *unlearned, *([self.oracle] if self.oracle else [])]

    def test(self, models: dict[str, TrainedModel], flags: dict, sources: dict) -> tuple[list[dict], list[dict]]:
        """Measure the base and all models on the test sets, and write the results as evaluation.py does.

        Args:
            flags: of the command, for results.json; "bleurt" names BLEURT's model, if there is to be one.
            sources: of the data, for results.json.

        Returns:
            The figures, and a few prompts with all answers, as `Comparison.answers`.
        """
        folder, judge, protocol = self.folder / "evaluation", self.judge, self.protocol
        measured, rows = self.all_models(models), self._answers(models)
        if flags["bleurt"]:
            add_bleurt(rows, flags["bleurt"], folder, PartialState().device)
        results = figures(rows, protocol, folder)
        write_prompts(folder, self.sets.test)
        write_results(
            folder,
            results,
            judge=judge,
            refusal_judge=self.refusal_judge,
            relevance_judge=self.relevance_judge,
            protocol=protocol,
            models=measured,
            flags=flags,
            sources=sources,
            agreement=agreement(rows),
        )
        return self._of_seed(results), side_by_side(rows, protocol)

    def named_sets(self, models: dict[str, TrainedModel], sets: list[NamedSet]) -> list[dict]:
        """Figures of the base and all models on the prompts that --prompts names."""
        measured = self.all_models(models)
        judges = (self.judge, self.refusal_judge)
        return self._of_seed(measure_named_sets(sets, measured, self.protocol, *judges, self.folder / "prompts"))

    def attack(self, models: dict[str, TrainedModel], attacks: AttackPlan) -> tuple[list[dict], list[dict]]:
        """Figures of the base and all models under attack; after `test`, whose answers stand beside them.

        Returns:
            As `AttackPlan.measure`.
        """
        measured, rows = self.all_models(models), self._answers(models)
        attacked, relearned = attacks.measure(measured, rows, self.judge, self.base, self.folder / "attacks")
        return self._of_seed(attacked), self._of_seed(relearned)

    def oracle_distances(self, models: dict[str, TrainedModel]) -> list[dict]:
        """Figures of the base's and all models' distance from the oracle; after `test`, whose answers it reads."""
        distances = oracle_figures(
            self.all_models(models), self._answers(models), self.protocol, self.folder / "oracle"
        )
        return self._of_seed(distances)

    def sweep(self, name: str, trained: TrainedModel, alphas: list[float], budget: float) -> tuple[list[dict], dict]:
        """Measure a model's task vector at each alpha, on the validation prompts.

        A model that was trained for one alpha is measured at that alpha, too, and no other is recommended.

        Args:
            budget: how much the perplexity of normal text may rise, as a share.

        Returns:
            The figures at each alpha, and the recommendation.
        """
        landing = trained.record.landing_alpha
        vector = AlphaSweep(self.base_folder, [trained.finetuned], self.load)
        unlearned = self.model(name, trained.unlearned).identity
        models = [
            EvaluatedModel(f"alpha-{alpha:g}", {"unlearned": unlearned, "alpha": alpha}, partial(vector.at, alpha))
            for alpha in sorted({*alphas, *([] if landing is None else [landing])})
        ]
        results = self._figures([self.base, *models], f"sweep-{name}", prompts=self.sets.validation)
        wanted = (BASE, "normal", "reference_perplexity")
        base_perplexity = next(row["value"] for row in results if (row["model"], row["set"], row["metric"]) == wanted)
        swept = [
            {**row, "method": name, "alpha": float(row["model"].removeprefix("alpha-")), "trained_for": landing}
            for row in results
            if row["model"] != BASE
        ]
        allowed = [row for row in swept if landing in (None, row["alpha"])]
        advice = recommend(allowed, base_perplexity, budget, self.protocol.decodings[0].name)
        return swept, {"seed": self.protocol.seed, "method": name, "budget": budget, **advice}

    def categories(self, vectors: dict[str, TrainedModel]) -> list[dict]:
        """Harmful rates on the unseen prompts of each kind of harm.

        Args:
            vectors: models that were trained on one kind of harm, by kind. Each one's task vector is subtracted from
                the base, and their sum.
        """
        models = [self.model(kind, trained.unlearned) for kind, trained in vectors.items()]
        if len(models) > 1:
            vector = AlphaSweep(self.base_folder, [trained.finetuned for trained in vectors.values()], self.load)
            identity = {"sum": [model.identity for model in models]}
            models.append(EvaluatedModel("sum", identity, partial(vector.at, 1.0)))
        first = self.protocol.decodings[:1]
        results = self._figures([self.base, *models], "categories", prompts=self.sets.of_category, decodings=first)
        rates = [row for row in results if row["metric"] == "harmful_rate"]
        return [{**row, "vector": row["model"], "category": row["set"]} for row in rates]

    def _answers(self, models: dict[str, TrainedModel]) -> dict[str, list[dict]]:
        """The answers to the test sets by label, with all verdicts; those that are missing are made."""
        measured, folder = self.all_models(models), self.folder / "evaluation"
        judges = (self.refusal_judge, self.relevance_judge)
        return measure(measured, self.protocol, self.judge, self.base, folder, None, *judges)

    def _figures(self, models: list[EvaluatedModel], name: str, **how) -> list[dict]:
        """The figures of `models`; their answers and scores are kept in the folder `name`.

        Args:
            how: prompts and decodings, where they are not those of the test sets.
        """
        protocol = replace(self.protocol, choices={}, **how)
        rows = measure(models, protocol, self.judge, self.base, self.folder / name)
        return self._of_seed(figures(rows, protocol, self.folder / name))

    def _of_seed(self, results: list[dict]) -> list[dict]:
        return [{"seed": self.protocol.seed, **row} for row in results]


def side_by_side(rows: dict[str, list[dict]], protocol: EvalProtocol) -> list[dict]:
    """A few prompts of each set with the answers of all models, in the first decoding.

    Args:
        rows: of each model's answers file, by label.
    """
    decoding = protocol.decodings[0].name
    shown = []
    for name, prompts in protocol.prompts.items():
        for index, prompt in enumerate(prompts[: SHOWN[name]]):
            answers = {
                label: {"answer": row["answer"], "verdict": row["verdict"]}
                for label, answered in rows.items()
                for row in answered
                if (row["set"], row["decoding"], row["index"]) == (name, decoding, index)
            }
            shown.append({"set": name, "prompt": prompt.question, "reference": prompt.reference, "answers": answers})
    return shown
