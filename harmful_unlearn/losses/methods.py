"""What each --method minimises in stage 1, and whether stage 2 negates it."""

from argparse import Namespace
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Method:
    """The loss (terms.py) that each weight flag weighs, and whether stage 2 negates what the copy learned.

    Where it does not, the unlearned model is the copy itself, rounded once to the base's dtype.

    Attributes:
        settings: values of flags that are not given, where they are not the released script's.
    """

    bad_weight: str | None  # on harmful pairs
    random_weight: str | None  # on harmful prompts with K random answers
    normal_weight: str | None  # on normal text
    negates: bool
    settings: dict[str, object] = field(default_factory=dict)


# The released script's defaults, and those of the flags that it does not have.
SETTINGS = {
    "bad_weight": 0.5, "random_weight": 1.0, "normal_weight": 1.0, "safe_weight": 0.0,
    "lr": 2e-5, "max_unlearn_steps": 1000, "scaling_coef": 1.0, "preserve_at": "copy", "variant": "released",
}  # fmt: skip
# Ours, beside SKU (README, Landing): preserved is the model that negation leads to, not the copy. The released
# variant does not score an answer's first token, where a model decides between harm and refusal.
LAND = {"bad_weight": 1.0, "random_weight": 0.0, "normal_weight": 0.3, "lr": 1e-4, "max_unlearn_steps": 200,
        "preserve_at": "landing", "variant": "paper"}  # fmt: skip
METHODS = {
    "sku": Method("gd", "rd", "pd", negates=True),
    "task_vector": Method("gd", None, None, negates=True),  # Ilharco et al. 2023
    "ga": Method("ga", None, None, negates=False),  # Yao et al. 2023
    "ga_mismatch": Method("ga", "rm", "kl", negates=False),  # Yao et al. 2023
    "ft": Method(None, None, "ft", negates=False),  # fine-tuning on normal text
    "land": Method("gd", "rd", "pd", negates=True, settings={**LAND, "scaling_coef": 3.0}),
    "lands": Method("gd", "rd", "pd", negates=True, settings={**LAND, "scaling_coef": 4.0, "safe_weight": 0.1}),
}
WEIGHTS = ("bad_weight", "random_weight", "normal_weight")  # those of the paper


def loss_weights(args: Namespace) -> dict[str, float]:
    """The method's losses by name (terms.py) and the weight of each, 0 for one that is left out."""
    method = METHODS[args.method]
    weights = {loss: getattr(args, flag) for flag in WEIGHTS if (loss := getattr(method, flag))}
    if args.preserve_at == "landing":
        weights["lp"] = weights.pop("pd")
    if args.safe_weight:
        weights["sa"] = args.safe_weight
    return weights


def apply_method_defaults(args: Namespace) -> str | None:
    """Fill in the flags that were not given (None) with the method's settings; returns what is wrong with the rest."""
    method = METHODS[args.method]
    for flag in WEIGHTS:
        if getattr(method, flag) is None and getattr(args, flag):
            return f"--{flag} weighs nothing in --method {args.method}: leave it out"
    if not method.negates:
        for flag, nothing in (("scaling_coef", None), ("preserve_at", "copy"), ("safe_weight", 0)):
            if getattr(args, flag) not in (None, nothing):
                return f"--{flag} belongs to a negation, and --method {args.method} has none: leave it out"
    unused = {flag: 0.0 for flag in WEIGHTS if getattr(method, flag) is None}
    for flag, value in {**SETTINGS, **method.settings, **unused}.items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    if args.preserve_at == "landing" and method.normal_weight is None:
        return f"--preserve_at landing: --method {args.method} preserves nothing; give --method land"
    if not any(loss_weights(args).values()):
        return "the weights are all 0: nothing to learn"
    if args.scaling_coef == 0 and uses_landing_point(args):
        return "--scaling_coef 0 lands on the base itself, where there is nothing to train: give another"
    return None


def uses_landing_point(args: Namespace) -> bool:
    """Whether a loss was minimised at the landing point, so that the model is made for one scaling_coef."""
    return bool((args.preserve_at == "landing" and args.normal_weight) or args.safe_weight)
