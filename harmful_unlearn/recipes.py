"""What reproduce.py runs, and with which hyper-parameters: edit these tables for your model."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from harmful_unlearn.losses.methods import METHODS

Flags = Mapping[str, object]  # flags of unlearn_harm_new.py, by name


@dataclass(frozen=True)
class ComparisonRun:
    """One row of the report.

    Attributes:
        title: as tables show it.
        group: "main" (the comparison) or "ablation" (SKU with something changed).
        method: its --method.
        flags: its other flags; they take precedence over the recipe's.
    """

    title: str
    group: str
    method: str = "sku"
    flags: Flags = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of one model.

    Attributes:
        shared: flags of all runs. LAND's and LANDS's defaults (losses/methods.py) take precedence over them.
        sku: SKU's three weights, also used by its ablations.
        baselines: flags of the methods that SKU is compared with, by --method.
        lands: flags of LANDS, in place of its defaults.
        more_runs: further rows, by name.
    """

    shared: Flags
    sku: Mapping[str, float]
    baselines: Mapping[str, Flags]
    lands: Flags = field(default_factory=dict)
    more_runs: Mapping[str, ComparisonRun] = field(default_factory=dict)


# GA + mismatch's weights, of the code of Yao et al. 2023.
MISMATCH = {"bad_weight": 0.5, "random_weight": 1, "normal_weight": 1}
# The paper's, where the paper or its published command states them: steps, batch size, learning rate, and SKU's weights
# for OPT-2.7B. It publishes none for the LLaMA2 models, and none for the methods that it compares with. GA and GA +
# mismatch have the learning rate of that code; FT and the task vector have SKU's steps and learning rate.
PAPER = Recipe(
    shared={"max_unlearn_steps": 1000, "batch_size": 2, "lr": 2e-4},
    sku={"bad_weight": 2.5, "random_weight": 2.5, "normal_weight": 1},
    baselines={"ft": {}, "ga": {"lr": 2e-6}, "ga_mismatch": {"lr": 2e-6, **MISMATCH}, "task_vector": {}},
)
# Small models on a CPU: 60 steps for every method. SKU's settings are the best of three that were tried on validation
# prompts (docs/claims.md, SmolLM2 in its chat template); those of the others were tried there once, those of FT and GA
# never. The published ones, with which PD runs away, are a row of their own.
SMALL = Recipe(
    shared={"max_unlearn_steps": 60, "batch_size": 2, "lr": 5e-5, "max_length": 256},
    sku={"bad_weight": 2.5, "random_weight": 2.5, "normal_weight": 0.05},
    baselines={"ft": {}, "ga": {"lr": 2e-5}, "ga_mismatch": {"lr": 2e-5, **MISMATCH}, "task_vector": {}},
    lands={"max_unlearn_steps": 60, "max_length": 256},
    more_runs={
        "sku-published": ComparisonRun(
            "SKU at the published settings", "main", flags={"lr": 2e-4, "normal_weight": 1, "max_kl": 0}
        )
    },
)
DEMO_SHARED = {"max_unlearn_steps": 200, "batch_size": 2, "lr": 1e-4, "precision": "fp32"}
DEMO_SKU = {"bad_weight": 2.5, "random_weight": 2.5, "normal_weight": 0.05}
RECIPES: dict[str, Recipe] = {
    "facebook/opt-2.7b": PAPER,
    "meta-llama/Llama-2-7b-hf": PAPER,
    "meta-llama/Llama-2-13b-hf": PAPER,
    "HuggingFaceTB/SmolLM2-135M-Instruct": SMALL,
    "google/gemma-3-270m": SMALL,
    # The offline demo's model (make reproduce-demo), with the demo's steps and weights of SKU.
    "demo": Recipe(
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
    "demo-no-refusals": Recipe(
        shared=DEMO_SHARED,
        sku=DEMO_SKU,
        baselines={"ga_mismatch": MISMATCH, "task_vector": {}},
        # LANDS has to teach a base without refusals to refuse, which takes more (chosen on worlds of their own).
        lands={"max_unlearn_steps": 400, "lr": 2e-4, "normal_weight": 1, "safe_weight": 1},
    ),
}
TITLES = {"ft": "FT", "ga": "GA", "ga_mismatch": "GA + mismatch", "task_vector": "Task vector"}


def runs_of(recipe: Recipe) -> dict[str, ComparisonRun]:
    """All runs of a recipe by name, in the order of the tables."""
    no_harm = {**recipe.lands, "bad_weight": 0}
    turned = {"normal_weight": -recipe.sku["normal_weight"]}
    return {
        **{name: ComparisonRun(TITLES[name], "main", name, flags) for name, flags in recipe.baselines.items()},
        "sku": ComparisonRun("SKU", "main"),
        "land": ComparisonRun("LAND", "main", "land"),
        "lands": ComparisonRun("LANDS", "main", "lands", recipe.lands),
        "lands-no-harm": ComparisonRun("LANDS without its harmful term", "main", "lands", no_harm),
        "task_vector-alpha-2": ComparisonRun(
            "Task vector, all tokens, alpha 2", "main", "task_vector", {"variant": "paper", "scaling_coef": 2}
        ),
        "sku-no-gd": ComparisonRun("SKU without GD", "ablation", flags={"bad_weight": 0}),
        "sku-no-rd": ComparisonRun("SKU without RD", "ablation", flags={"random_weight": 0}),
        "sku-no-pd": ComparisonRun("SKU without PD", "ablation", flags={"normal_weight": 0}),
        "sku-pd-turned": ComparisonRun("SKU, PD's sign turned", "ablation", flags=turned),
        **recipe.more_runs,
    }


def flags_of(recipe: Recipe, run: ComparisonRun) -> dict[str, object]:
    """All flags of a run."""
    defaults = METHODS[run.method].settings
    shared = {name: value for name, value in recipe.shared.items() if name not in defaults}
    own = recipe.sku if run.method == "sku" else {"method": run.method}
    return {**shared, **own, **run.flags}
