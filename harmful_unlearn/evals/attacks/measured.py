"""Measures models under attack: what is asked, of which models, and the harmful rates that come of it."""

from dataclasses import dataclass, replace
from pathlib import Path

from harmful_unlearn.evals.attacks.figures import attack_figures
from harmful_unlearn.evals.attacks.relearning import RELEARN, RelearnPlan
from harmful_unlearn.evals.attacks.weights import Contrast, variants_of
from harmful_unlearn.evals.evaluated_model import EvaluatedModel
from harmful_unlearn.evals.evaluator import measure
from harmful_unlearn.evals.judges.base import Judge
from harmful_unlearn.evals.metrics.figures import figures
from harmful_unlearn.evals.prompt_sets import Prompt
from harmful_unlearn.evals.protocol import EvalProtocol


@dataclass(frozen=True)
class AttackPlan:
    """Which attacks are wanted.

    Attributes:
        plain: how the attacked prompts are asked without an attack.
        asking: the protocol of each attack at asking, by name.
        weights: names of attacks on weights.
        normal: prompts whose references show what a changed model has lost; may be none.
        contrast: what attacks on weights may learn from.
        relearning: the attack by fine-tuning, if it is wanted.
    """

    plain: EvalProtocol
    asking: dict[str, EvalProtocol]
    weights: list[str]
    normal: list[Prompt]
    contrast: Contrast
    relearning: RelearnPlan | None = None

    def measure(
        self,
        models: list[EvaluatedModel],
        rows: dict[str, list[dict]],
        judge: Judge,
        reference: EvaluatedModel,
        folder: Path,
        base_answers: Path | None = None,
    ) -> tuple[list[dict], list[dict]]:
        """Ask all models under each attack; what `folder` holds already is not made again.

        Args:
            rows: by model, its answers without an attack.
            reference, base_answers: as in `evaluator.measure`.

        Returns:
            As `attack_figures`; then, for attacks on weights, the perplexity of normal references under the changed
            models ("metric": "reference_perplexity"). And what `RelearnPlan.measure` gives, or nothing.

        Raises:
            UserError: as `evaluator.measure`.
        """
        protocols: dict[str, EvalProtocol] = {}
        attacked: dict[str, dict[str, list[dict]]] = {}
        (prompts,) = self.plain.prompts.values()
        perplexities = []
        for name in self.weights:  # first: they may refuse a model
            attacked[name] = {model.label: [] for model in models}
            variants = variants_of(name, models, self.plain, self.normal, self.contrast)
            for variant, (changed, protocol) in variants.items():
                print(f"attack: {name}, {variant}")
                at = folder / name / variant.replace(" ", "-")
                answers = measure(changed, protocol, judge, reference, at, base_answers)
                for label, own in answers.items():
                    attacked[name][label] += own
                perplexities += [
                    {**figure, "attack": name, "variant": variant, "degenerate_rate": None, "which": ""}
                    for figure in figures(answers, protocol, at)
                    if (figure["set"], figure["metric"]) == ("normal", "reference_perplexity")
                ]
            protocols[name] = replace(self.plain, prompts=dict.fromkeys(variants, prompts))
        for name, protocol in self.asking.items():
            print(f"attack: {name}, {protocol.answers} answers by each model")
            attacked[name] = measure(models, protocol, judge, None, folder / name, base_answers)
        harm = attack_figures(self.plain, rows, {**self.asking, **protocols}, attacked) + perplexities
        if not self.relearning:
            return harm, []
        return harm, self.relearning.measure(models, self.plain, judge, rows, folder / RELEARN, base_answers)
