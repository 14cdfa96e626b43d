"""What reproduce.py runs, and with which hyper-parameters: edit these tables for your model."""

from dataclasses import dataclass, field

from harmful_unlearn.losses.methods import METHODS


@dataclass(frozen=True)
class Run:
    """One row of the report.

    Attributes:
        title: as tables show it.
        group: "main" (the comparison) or "ablation" (SKU with something changed).
        flags: of unlearn_harm_new.py, beside those of the recipe.
    """

    title: str
    group: str
    flags: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """Flags of unlearn_harm_new.py for one model: `shared` by all runs, and those of each method.

    `sku` holds all three weights of SKU; its ablations start from them. `lands` changes that method's own settings
    (losses/methods.py), which like LAND's hold in place of `shared`.
    """

    shared: dict[str, object]
    sku: dict[str, float]
    methods: dict[str, dict[str, object]]
    more_runs: dict[str, Run] = field(default_factory=dict)
    lands: dict[str, object] = field(default_factory=dict)


# The paper's, where it or its published command states them: steps, batch, rate and SKU's weights of OPT-2.7B.
# It publishes none for the LLaMA2 models and none for the methods that it compares with. GA's and GA + mismatch's
# here are those of the code of Yao et al. 2023; FT and the task vector have SKU's steps and rate.
YAO = {
    "ga": {"method": "ga", "lr": 2e-6},
    "ga_mismatch": {"method": "ga_mismatch", "lr": 2e-6, "bad_weight": 0.5, "random_weight": 1, "normal_weight": 1},
}
PAPER = Recipe(
    shared={"max_unlearn_steps": 1000, "batch_size": 2, "lr": 2e-4},
    sku={"bad_weight": 2.5, "random_weight": 2.5, "normal_weight": 1},
    methods={"ft": {"method": "ft"}, **YAO, "task_vector": {"method": "task_vector"}},
)
RECIPES: dict[str, Recipe] = {
    "facebook/opt-2.7b": PAPER,
    "meta-llama/Llama-2-7b-hf": PAPER,
    "meta-llama/Llama-2-13b-hf": PAPER,
    # The offline demo's model (make reproduce-demo). Its SKU weights and steps are the demo's.
    "demo": Recipe(
        shared={"max_unlearn_steps": 200, "batch_size": 2, "lr": 1e-4, "precision": "fp32"},
        sku={"bad_weight": 2.5, "random_weight": 2.5, "normal_weight": 0.05},
        methods={
            "ft": {"method": "ft"},
            "ga": {"method": "ga", "lr": 2e-5, "max_unlearn_steps": 50},
            "ga_mismatch": {"method": "ga_mismatch", "bad_weight": 0.5, "random_weight": 1, "normal_weight": 1},
            "task_vector": {"method": "task_vector"},
        },
        more_runs={
            # The released GD leaves out an answer's first token, where this world decides between harm and refusal.
            "task_vector-all-tokens": Run(
                "Task vector, all tokens", "ablation", {"method": "task_vector", "variant": "paper"}
            ),
            "sku-paper-losses": Run("SKU, the paper's losses", "ablation", {"variant": "paper"}),
            "sku-paper-weights": Run("SKU at the paper's weights", "ablation", {"normal_weight": 1}),
            "ga-80-steps": Run("GA, 80 steps", "ablation", {"method": "ga", "lr": 2e-5, "max_unlearn_steps": 80}),
        },
    ),
    # The same world without refusals in the base's pre-training (demo.py --refusal_share 0).
    "demo-no-refusals": Recipe(
        shared={"max_unlearn_steps": 200, "batch_size": 2, "lr": 1e-4, "precision": "fp32"},
        sku={"bad_weight": 2.5, "random_weight": 2.5, "normal_weight": 0.05},
        methods={
            "ga_mismatch": {"method": "ga_mismatch", "bad_weight": 0.5, "random_weight": 1, "normal_weight": 1},
            "task_vector": {"method": "task_vector"},
        },
        # With no refusal in the base LANDS has to teach one, which takes more (chosen in the method's own study).
        lands={"max_unlearn_steps": 400, "lr": 2e-4, "normal_weight": 1, "safe_weight": 1},
    ),
}
TITLES = {"ft": "FT", "ga": "GA", "ga_mismatch": "GA + mismatch", "task_vector": "Task vector"}


def runs_of(recipe: Recipe) -> dict[str, Run]:
    """All runs of a recipe by name, in the order of the tables."""
    without = {"gd": "bad_weight", "rd": "random_weight", "pd": "normal_weight"}
    turned = {"normal_weight": -recipe.sku["normal_weight"]}
    return {
        **{name: Run(TITLES[name], "main", flags) for name, flags in recipe.methods.items()},
        "sku": Run("SKU", "main"),
        "land": Run("LAND", "main", {"method": "land"}),
        "lands": Run("LANDS", "main", {"method": "lands", **recipe.lands}),
        "lands-no-harm": Run(
            "LANDS without its harmful term", "main", {"method": "lands", **recipe.lands, "bad_weight": 0}
        ),
        "task_vector-alpha-2": Run(
            "Task vector, all tokens, alpha 2", "main", {"method": "task_vector", "variant": "paper", "scaling_coef": 2}
        ),
        **{f"sku-no-{m}": Run(f"SKU without {m.upper()}", "ablation", {flag: 0}) for m, flag in without.items()},
        "sku-pd-turned": Run("SKU, PD's sign turned", "ablation", turned),
        **recipe.more_runs,
    }


def flags_of(recipe: Recipe, run: Run) -> dict[str, object]:
    """The flags of a run, SKU's weights included where it is one of SKU."""
    method = run.flags.get("method", "sku")
    weights = recipe.sku if method == "sku" else {}
    own = METHODS[method].settings
    return {**{flag: value for flag, value in recipe.shared.items() if flag not in own}, **weights, **run.flags}
