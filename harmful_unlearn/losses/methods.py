"""What each --method minimises in stage 1, and whether stage 2 negates it. Add a method to METHODS."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """The loss term (terms.py) that each weight flag weighs, and whether stage 2 negates what stage 1 learned.

    Where it does not, the unlearned model is the trained model itself, rounded once to the base's dtype.

    Attributes:
        bad_weight: the term on harmful pairs; None if there is none (so for the next two).
        random_weight: the term on harmful prompts with K random answers.
        normal_weight: the term on normal text.
        safe_weight: the term on safe answers to the harmful prompts.
        settings: defaults of flags, where they are not the released script's; and those of the flags in PARAMETERS
            that its losses have.
    """

    bad_weight: str | None
    random_weight: str | None
    normal_weight: str | None
    safe_weight: str | None
    negates: bool
    settings: dict[str, object] = field(default_factory=dict)


# The released script's defaults, and those of the flags that it does not have.
DEFAULTS = {
    "bad_weight": 0.5, "random_weight": 1.0, "normal_weight": 1.0, "safe_weight": 0.0,
    "lr": 2e-5, "max_unlearn_steps": 1000, "scaling_coef": 1.0, "preserve_at": "copy", "variant": "released",
}  # fmt: skip
# Ours (docs/method.md): what is preserved is the model that negation leads to, not the harmful model. The released
# variant does not score an answer's first token, where a model decides between harm and refusal.
LAND = {"bad_weight": 1.0, "random_weight": 0.0, "normal_weight": 0.3, "lr": 1e-4, "max_unlearn_steps": 200,
        "preserve_at": "landing", "variant": "paper"}  # fmt: skip
# The methods of after 2023 count an answer's first token, too. Steps and rate are those that their rows share with SKU.
LATER = {"bad_weight": 1.0, "normal_weight": 1.0, "variant": "paper"}
METHODS = {
    "sku": Method("gd", "rd", "pd", "sa", negates=True),
    "task_vector": Method("gd", None, None, "sa", negates=True),  # Ilharco et al. 2023
    "ga": Method("ga", None, None, None, negates=False),  # Yao et al. 2023
    "ga_mismatch": Method("ga", "rm", "kl", None, negates=False),  # Yao et al. 2023
    "ft": Method(None, None, "ft", None, negates=False),  # fine-tuning on normal text
    "land": Method("gd", "rd", "pd", "sa", negates=True, settings={**LAND, "scaling_coef": 3.0}),
    "lands": Method("gd", "rd", "pd", "sa", negates=True, settings={**LAND, "scaling_coef": 4.0, "safe_weight": 0.1}),
    "grad_diff": Method("ga", None, "ft", None, negates=False, settings=LATER),  # Liu et al. 2022
    "npo": Method("npo", None, "ft", None, negates=False, settings={**LATER, "beta": 0.1}),
    "simnpo": Method("simnpo", None, "ft", None, negates=False, settings={**LATER, "beta": 2.5, "gamma": 0.0}),
    # The obvious thing to do: answer harmful prompts with the data's safe answers.
    "refusal_sft": Method(None, None, "ft", "sft", negates=False, settings={**LATER, "safe_weight": 1.0}),
    "dpo": Method("dpo", None, "ft", None, negates=False, settings={**LATER, "normal_weight": 0.0, "beta": 0.1}),
    # Its code's weights.
    "safe_unlearning": Method(
        "su", None, "ft", "sft", negates=False, settings={**LATER, "bad_weight": 0.3, "safe_weight": 0.5, "beta": 1.0}
    ),
    # normal_weight is the paper's alpha, rmu_coef its c; both are those for Zephyr-7B, as is the layer (8 of 32).
    "rmu": Method(
        "rmu", None, "rmk", None, negates=False,
        settings={**LATER, "normal_weight": 1200.0, "rmu_layer": 0.25, "rmu_coef": 6.5},
    ),
}  # fmt: skip
WEIGHTS = ("bad_weight", "random_weight", "normal_weight", "safe_weight")
PARAMETERS = ("beta", "gamma", "rmu_layer", "rmu_coef")  # of single losses (terms.LossParameters)


def loss_weights(flags: Mapping[str, Any]) -> dict[str, float]:
    """The weight of each of the method's loss terms (terms.py), by name; 0 for one that is switched off.

    Args:
        flags: method and the weights, as settings or a run's record have them.
    """
    method = METHODS[flags["method"]]
    terms = {flag: getattr(method, flag) for flag in WEIGHTS if flag != "safe_weight" or flags.get(flag)}
    if flags.get("preserve_at") == "landing":
        terms["normal_weight"] = "lp"
    return {term: flags[flag] for flag, term in terms.items() if term}


def active_losses(flags: Mapping[str, Any]) -> set[str]:
    """The loss terms whose weight is not 0."""
    return {name for name, weight in loss_weights(flags).items() if weight}


def uses_landing_point(flags: Mapping[str, Any]) -> bool:
    """Whether a term is computed at the landing point, so that the model is made for one alpha."""
    teaches_there = flags["safe_weight"] and METHODS[flags["method"]].negates
    return bool((flags["preserve_at"] == "landing" and flags["normal_weight"]) or teaches_there)


def apply_method_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """The flags, with the method's defaults for those that were not given (None).

    Raises:
        ValueError: with a message for the user, flags that do not go together.
    """
    name, method = given["method"], METHODS[given["method"]]
    for flag in WEIGHTS:
        if getattr(method, flag) is None and given[flag]:
            raise ValueError(f"--{flag} has no effect in --method {name}: leave it out")
    for flag in PARAMETERS:
        if flag not in method.settings and given[flag] is not None:
            raise ValueError(f"--{flag} has no effect in --method {name}: leave it out")
    if not method.negates:
        for flag, neutral in (("scaling_coef", DEFAULTS["scaling_coef"]), ("preserve_at", "copy")):
            if given[flag] not in (None, neutral):
                raise ValueError(f"--{flag} is for methods that negate, and --method {name} does not: leave it out")
    unused = {flag: 0.0 for flag in WEIGHTS if getattr(method, flag) is None}
    defaults = {**DEFAULTS, **method.settings, **unused}
    flags = {flag: defaults.get(flag) if value is None else value for flag, value in given.items()}
    if flags["preserve_at"] == "landing" and method.normal_weight is None:
        raise ValueError(f"--preserve_at landing: --method {name} preserves nothing; give --method land")
    if not any(loss_weights(flags).values()):
        raise ValueError("the weights are all 0: nothing to learn")
    if flags["scaling_coef"] == 0 and uses_landing_point(flags):
        raise ValueError("--scaling_coef 0 lands on the base itself, where there is nothing to train: give another")
    return flags
