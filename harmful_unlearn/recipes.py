"""What reproduce.py runs, and with which hyper-parameters: edit these tables for your model.

Also what a search for hyper-parameters (reproduce.py --search) tries.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from harmful_unlearn.errors import UserError
from harmful_unlearn.losses.methods import DEFAULTS, METHODS, PARAMETERS, WEIGHTS, uses_landing_point
from harmful_unlearn.storage.files import read_json, write_file

Flags = Mapping[str, object]  # flags of unlearn_harm_new.py, by name


@dataclass(frozen=True)
class ComparisonRun:
    """One row of the report.

    Attributes:
        title: as tables show it.
        group: "main" (the comparison) or "ablation" (SKU with something changed).
        method: its --method.
        flags: its other flags; in a recipe, all of them.
        by_default: whether it runs without being named in --runs.
    """

    title: str
    group: str
    method: str = "sku"
    flags: Flags = field(default_factory=dict)
    by_default: bool = True


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of one model.

    Attributes:
        rows: by name, in the order of the tables.
        chosen_on: SHA-256 of the questions that they were chosen on, which no test asks then.
    """

    rows: Mapping[str, ComparisonRun]
    chosen_on: frozenset[str] = frozenset()


TITLES = {
    "ft": "FT", "ga": "GA", "ga_mismatch": "GA + mismatch", "task_vector": "Task vector", "grad_diff": "GradDiff",
    "npo": "NPO", "simnpo": "SimNPO", "refusal_sft": "Refusal SFT", "dpo": "DPO", "safe_unlearning": "Safe Unlearning",
    "rmu": "RMU",
}  # fmt: skip


def recipe(
    shared: Flags,
    sku: Mapping[str, float],
    baselines: Mapping[str, Flags],
    lands: Flags | None = None,
    more_runs: Mapping[str, ComparisonRun] | None = None,
) -> Recipe:
    """The rows of a model.

    Args:
        shared: flags of all rows. A method's own defaults (losses/methods.py) take precedence over them.
        sku: SKU's three weights, and its alpha if that is not 1; also used by its ablations.
        baselines: flags of the methods that SKU is compared with, by --method.
        lands: flags of LANDS, in place of its defaults.
        more_runs: further rows, by name.
    """
    lands = lands or {}
    turned = {"normal_weight": -sku["normal_weight"]}
    rows = {
        **{name: ComparisonRun(TITLES[name], "main", name, flags) for name, flags in baselines.items()},
        "sku": ComparisonRun("SKU", "main"),
        "land": ComparisonRun("LAND", "main", "land"),
        "lands": ComparisonRun("LANDS", "main", "lands", lands),
        "lands-no-harm": ComparisonRun("LANDS without its harmful term", "main", "lands", {**lands, "bad_weight": 0}),
        "task_vector-alpha-2": ComparisonRun(
            "Task vector, all tokens, alpha 2", "main", "task_vector", {"variant": "paper", "scaling_coef": 2}
        ),
        "sku-no-gd": ComparisonRun("SKU without GD", "ablation", flags={"bad_weight": 0}),
        "sku-no-rd": ComparisonRun("SKU without RD", "ablation", flags={"random_weight": 0}),
        "sku-no-pd": ComparisonRun("SKU without PD", "ablation", flags={"normal_weight": 0}),
        "sku-pd-turned": ComparisonRun("SKU, PD's sign turned", "ablation", flags=turned),
        **(more_runs or {}),
    }
    # The other methods have no published settings for these data: they are there to be tuned by a search.
    others = {name: ComparisonRun(TITLES[name], "main", name, by_default=False) for name in METHODS if name not in rows}

    def complete(run: ComparisonRun) -> ComparisonRun:
        own = METHODS[run.method].settings
        flags = {name: value for name, value in shared.items() if name not in own}
        return replace(run, flags={**flags, **(sku if run.method == "sku" else {"method": run.method}), **run.flags})

    return Recipe({name: complete(run) for name, run in {**rows, **others}.items()})


# GA + mismatch's weights, of the code of Yao et al. 2023.
MISMATCH = {"bad_weight": 0.5, "random_weight": 1, "normal_weight": 1}
# The paper's, where the paper or its published command states them: steps, batch size, learning rate, and SKU's weights
# for OPT-2.7B. It publishes none for the LLaMA2 models, and none for the methods that it compares with. GA and GA +
# mismatch have the learning rate of that code; FT and the task vector have SKU's steps and learning rate.
PAPER = recipe(
    shared={"max_unlearn_steps": 1000, "batch_size": 2, "lr": 2e-4},
    sku={"bad_weight": 2.5, "random_weight": 2.5, "normal_weight": 1},
    baselines={"ft": {}, "ga": {"lr": 2e-6}, "ga_mismatch": {"lr": 2e-6, **MISMATCH}, "task_vector": {}},
)


def small_model(scaling_coef: float, mismatch_lr: float) -> Recipe:
    """For small models on a CPU: 60 steps for every method.

    SKU's settings are the best of three that were tried on validation prompts (docs/claims.md, SmolLM2 in its chat
    template); those of the others were tried once, GA + mismatch's on Gemma twice, those of FT and GA never. The
    published ones, with which PD runs away, are a row of their own.

    Args:
        scaling_coef: alpha of SKU and of the task vector, by a sweep of SKU's on validation prompts.
        mismatch_lr: the learning rate of GA + mismatch.
    """
    alpha = {"scaling_coef": scaling_coef}
    published = {"lr": 2e-4, "normal_weight": 1, "scaling_coef": 1.0, "max_kl": 0}
    return recipe(
        shared={"max_unlearn_steps": 60, "batch_size": 2, "lr": 5e-5, "max_length": 256},
        sku={"bad_weight": 2.5, "random_weight": 2.5, "normal_weight": 0.05, **alpha},
        baselines={"ft": {}, "ga": {"lr": 2e-5}, "ga_mismatch": {"lr": mismatch_lr, **MISMATCH}, "task_vector": alpha},
        lands={"max_unlearn_steps": 60, "max_length": 256},
        more_runs={"sku-published": ComparisonRun("SKU at the published settings", "main", flags=published)},
    )


DEMO_SHARED = {"max_unlearn_steps": 200, "batch_size": 2, "lr": 1e-4, "precision": "fp32"}
DEMO_SKU = {"bad_weight": 2.5, "random_weight": 2.5, "normal_weight": 0.05}
RECIPES: dict[str, Recipe] = {
    "facebook/opt-2.7b": PAPER,
    "meta-llama/Llama-2-7b-hf": PAPER,
    "meta-llama/Llama-2-13b-hf": PAPER,
    "HuggingFaceTB/SmolLM2-135M-Instruct": small_model(scaling_coef=1.0, mismatch_lr=2e-5),
    "google/gemma-3-270m": small_model(scaling_coef=0.5, mismatch_lr=5e-6),
    # The offline demo's model (make reproduce-demo), with the demo's steps and weights of SKU.
    "demo": recipe(
        shared=DEMO_SHARED,
        sku=DEMO_SKU,
        baselines={"ft": {}, "ga": {"lr": 2e-5, "max_unlearn_steps": 50}, "ga_mismatch": MISMATCH, "task_vector": {}},
        more_runs={
            # The released GD omits an answer's first token, where this world decides between harm and refusal.
            "task_vector-all-tokens": ComparisonRun(
                "Task vector, all tokens", "ablation", "task_vector", {"variant": "paper"}
            ),
            "sku-paper-losses": ComparisonRun("SKU, the paper's losses", "ablation", flags={"variant": "paper"}),
            "sku-paper-weights": ComparisonRun("SKU at the paper's weights", "ablation", flags={"normal_weight": 1}),
            "ga-80-steps": ComparisonRun("GA, 80 steps", "ablation", "ga", {"lr": 2e-5, "max_unlearn_steps": 80}),
        },
    ),
    # The same world without refusals in the base's pre-training (demo.py --refusal_share 0).
    "demo-no-refusals": recipe(
        shared=DEMO_SHARED,
        sku=DEMO_SKU,
        baselines={"ga_mismatch": MISMATCH, "task_vector": {}},
        # LANDS has to teach a base without refusals to refuse, which takes more (chosen on worlds of their own).
        lands={"max_unlearn_steps": 400, "lr": 2e-4, "normal_weight": 1, "safe_weight": 1},
    ),
}


# What reproduce.py --search tries: for every method the same number of trials.


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds; `log`: all orders of magnitude are as likely."""

    low: float
    high: float
    log: bool = True

    def with_value(self, value: float) -> "Range":
        """The range, made larger where `value` is outside it."""
        return replace(self, low=min(self.low, value), high=max(self.high, value))


RATES = Range(2e-6, 2e-4)
STEP_SHARES = (0.25, 0.5, 1.0)  # of the recipe's steps
WEIGHT_FACTORS = (1 / 30, 3.0)  # of a weight's default; a method's first weight stays, since AdamW ignores their scale
LANDING_ALPHAS = Range(1.0, 6.0, log=False)  # of a method that is trained for one alpha
ALPHAS = (0.5, 1.0, 1.5, 2.0, 3.0)  # at which every other task vector is measured; that costs no training
PARAMETER_RANGES: "Space" = {
    "beta": Range(0.03, 3.0),
    "gamma": Range(0.0, 2.0, log=False),
    "rmu_layer": (0.25, 0.5, 0.75),
    "rmu_coef": Range(1.0, 100.0),
}
# By method, in place of those that follow from its defaults. RMU trains at most three matrices, and those further.
MORE_RANGES: dict[str, "Space"] = {
    "dpo": {"normal_weight": Range(0.0, 2.0, log=False)},
    "rmu": {"lr": Range(2e-5, 5e-3)},
}
UTILITY_BUDGET = 0.2  # by which share normal perplexity may rise above the base's

Space = Mapping[str, Range | tuple[float, ...]]


def search_space(run: ComparisonRun) -> Space:
    """What a search varies of a row: its flags by name, each with a range or with choices. Its own values are included.

    Raises UserError: a weight is not above 0.
    """
    method, flags = METHODS[run.method], _with_defaults(run)
    steps = sorted({max(1, round(share * flags["max_unlearn_steps"])) for share in STEP_SHARES})
    space: dict[str, Range | tuple[float, ...]] = {"lr": RATES, "max_unlearn_steps": tuple(steps)}
    _, *weights = [flag for flag in WEIGHTS if getattr(method, flag) and flags[flag]]
    for flag in weights:
        if flags[flag] < 0:
            raise UserError(f"{run.title} has --{flag} {flags[flag]}, and a search needs weights above 0")
        low, high = sorted(factor * flags[flag] for factor in WEIGHT_FACTORS)
        space[flag] = Range(low, high)
    space |= {flag: PARAMETER_RANGES[flag] for flag in PARAMETERS if flag in method.settings}
    if method.negates and uses_landing_point(flags):
        space["scaling_coef"] = LANDING_ALPHAS
    space |= MORE_RANGES.get(run.method, {})
    own = {flag: flags[flag] for flag in space}
    return {
        flag: values.with_value(own[flag]) if isinstance(values, Range) else tuple(sorted({*values, own[flag]}))
        for flag, values in space.items()
    }


def swept_alphas(run: ComparisonRun) -> tuple[float, ...]:
    """The alphas at which a trial of this row is measured; none where the training decides."""
    flags = _with_defaults(run)
    if not METHODS[run.method].negates or uses_landing_point(flags):
        return ()
    return tuple(sorted({*ALPHAS, float(flags["scaling_coef"])}))


def _with_defaults(run: ComparisonRun) -> dict[str, Any]:
    return {**DEFAULTS, **METHODS[run.method].settings, **run.flags, "method": run.method}


def read_recipe(name: str) -> Recipe:
    """A recipe by its name in RECIPES, or from a file that a search wrote. Raises UserError: there is none."""
    if name in RECIPES:
        return RECIPES[name]
    if not name.endswith(".json"):
        known = ", ".join(RECIPES)
        raise UserError(
            f"there is no recipe for {name}: add one to recipes.py, or give --recipe FILE.json or one of {known}"
        )
    content = read_json(Path(name))
    try:
        rows = {row: ComparisonRun(**run) for row, run in content["rows"].items()}
        if unknown := [run.method for run in rows.values() if run.method not in METHODS]:
            raise ValueError(f"there is no method {unknown[0]}")
        return Recipe(rows, frozenset(content["chosen_on"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{name} is not a recipe ({error}): give a file that reproduce.py --search wrote") from None


def write_recipe(file: Path, recipe: Recipe, about: Mapping[str, object]) -> None:
    """Write a recipe for `read_recipe`.

    Args:
        about: what else the file says: on which model and data the settings were chosen, and how.
    """
    rows = {name: asdict(run) for name, run in recipe.rows.items()}
    content = {**about, "rows": rows, "chosen_on": sorted(recipe.chosen_on)}
    write_file(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
