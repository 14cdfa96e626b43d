"""The flags of reproduce.py, which its search has, too."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from harmful_unlearn.cli.flag_parser import FlagParser, flag
from harmful_unlearn.cli.flag_types import not_negative, positive_int, positive_number, whole_number
from harmful_unlearn.comparison.recorded_flags import replayed_flags
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.attacks.wrappers import read_wrappers
from harmful_unlearn.evals.comparison.alpha_sweep import alpha_list
from harmful_unlearn.evals.judges.registry import LEARN_FROM_LABELS, make_judge
from harmful_unlearn.evals.named_sets import read_named_set
from harmful_unlearn.evals.settings import MeasuringSettings
from harmful_unlearn.losses.methods import METHODS
from harmful_unlearn.models import hub
from harmful_unlearn.recipes import RECIPES, UTILITY_BUDGET, ComparisonRun, read_recipe, search_space
from harmful_unlearn.storage.files import user_path
from harmful_unlearn.training.flags import parse_flags as training_flags


# fmt: off
@dataclass(frozen=True, kw_only=True)
class ComparisonSettings(MeasuringSettings):
    """The flags of this command."""

    model_name: str = flag("the base model: hub id or folder", required=True)
    output: Path = flag("folder of everything that is made", type=user_path, required=True)
    recipe: str = flag(f"whose hyper-parameters: {', '.join(RECIPES)} (default: --model_name's)")
    seeds: list[int] = flag(
        "of everything, one after the other (default: 8888)", type=whole_number, nargs="+", default=[8888])
    runs: list[str] = flag("rows to run (default: all of the recipe)", nargs="+", metavar="RUN")
    alpha_sweep: list[float] = flag(
        "measure task vectors at these alphas, as 0,0.25,...,2, and recommend one", type=alpha_list, default=[],
        metavar="ALPHAS")
    sweep_runs: list[str] = flag("whose task vectors (default: sku task_vector)", nargs="+", metavar="RUN")
    alpha_budget: float = flag(
        "how much normal perplexity may rise at a recommended alpha, as a share", type=positive_number, default=0.1)
    search: int | None = flag(
        "first search every row's hyper-parameters in N trials each, on validation prompts with the first seed, and "
        "go on with what was chosen (OUTPUT/search/recipe.json)", type=positive_int, metavar="N")
    search_budget: float | None = flag(
        f"by which share the perplexity of normal references, and with --utility_dataset that of everyday tasks, may "
        f"rise in a trial (default: {UTILITY_BUDGET})", type=positive_number)
    search_refusals: float | None = flag(
        "which share of normal questions a trial may refuse beyond what the base refuses (default: not asked)",
        type=not_negative)
    search_only: bool = flag(
        "stop once the recipe is written; several processes may run this at the same time", action="store_true")
    harm_category: list[str] = flag(
        "train a task vector of only this kind of harm (may be repeated)", action="append", default=[])
    oracle: str | None = flag(
        "a model with the base's training, but without the harm (demo.py --oracle makes one): measured as all others, "
        "and every model's distance from it")
    replay: Path | None = flag(
        "do again what this comparison is, by its comparison.json: the same flags, data and base, or an error; at the "
        "end the figures are compared (default of --output then: FOLDER-replayed)", type=user_path, metavar="FOLDER")
    train_flags: list[str] = flag("more flags for every training, as one quoted text", type=shlex.split, default=[])
    # fmt: on

    @property
    def compared_runs(self) -> dict[str, ComparisonRun]:
        """The rows of the report, by name, in the recipe's order."""
        return {name: run for name, run in read_recipe(self.recipe).rows.items() if name in self.runs}

    @property
    def training_data(self) -> dict[str, str]:
        """The flags that say what every run trains on, and in which template, where they are given."""
        data = ("harmful_dataset", "harmful_revision", "harmful_split", "normal_dataset", "more_normal_dataset")
        given = {name: value for name in (*data, "system_prompt") if (value := getattr(self, name)) is not None}
        return given if self.template == "auto" else {**given, "template": self.template}

    def all_flags(self, flags: Mapping[str, object], seed: int) -> dict[str, object]:
        """A row's flags, with those that all rows share."""
        return {"model_name": self.model_name, **self.training_data, **flags, "seed": seed}

    def to_json(self) -> dict[str, Any]:
        """The flags as comparison.json has them."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}

    def of_seed(self, seed: int) -> "ComparisonSettings":
        """These settings, with the seed in place of "{seed}"."""

        def filled(value: object) -> object:
            if isinstance(value, list):
                return [filled(part) for part in value]
            if isinstance(value, str | Path):
                return type(value)(str(value).replace("{seed}", str(seed)))
            return value

        changed: dict[str, Any] = {name: filled(value) for name, value in vars(self).items() if name != "output"}
        return replace(self, **changed)

    def check_inputs(self) -> None:
        """Raises UserError: something that a seed needs after its trainings is missing."""
        device, folder = PartialState().device, self.output
        if self.bleurt:
            hub.resolve_model(self.bleurt)
        for own in map(self.of_seed, self.seeds):
            kind, _, model = own.judge.partition(":")
            if kind == "finetuned":
                hub.resolve_model(model, weights=False)
            elif kind not in LEARN_FROM_LABELS:  # the others say now what they lack
                make_judge(own.judge, responses=[], normal=[], judged=set(), seed=0, cache=folder, device=device)
            own.make_refusal_judge(folder)
            for text in own.prompts:
                read_named_set(text)
            if own.jailbreaks:
                read_wrappers(own.jailbreaks)
            if own.oracle:
                hub.resolve_model(own.oracle)


def parse_flags(arguments: list[str] | None, about: str = "") -> ComparisonSettings:
    """The flags.

    Args:
        about: reproduce.py's docstring, for --help.
    """
    title, _, usage = about.partition("\n")
    parser = FlagParser(description=title, epilog=usage)
    parser.add_settings(ComparisonSettings)
    parser.replays(replayed_flags)
    args = parser.parse_args(arguments)
    for name in ("--config", "--write_config", "--replay"):
        if any(word.partition("=")[0] == name for word in args.train_flags):
            parser.error(f"--train_flags cannot have {name}: write its flags out")
    training_flags(args.train_flags)  # says now what is wrong with them
    if not (args.n_seen and args.n_unseen and args.n_normal):
        parser.error("the comparison needs prompts of all sets: give --n_seen, --n_unseen and --n_normal above 0")
    if args.part == "validation" and args.harm_category:
        parser.error("kinds of harm are measured on test prompts: leave --harm_category out with --part validation")
    recipe = args.recipe or args.model_name
    try:
        known_runs = read_recipe(recipe).rows
    except UserError as error:
        parser.error(str(error))
    negating = [name for name, run in known_runs.items() if METHODS[run.method].negates]
    by_default = [name for name, run in known_runs.items() if run.by_default]
    if args.search:  # every method once
        by_default = [name for name in known_runs if name in METHODS]
    elif args.search_only or args.search_budget is not None or args.search_refusals is not None:
        parser.error("--search_only, --search_budget and --search_refusals are for a search: add --search N")
    if args.harm_category and (args.search or "sku" not in known_runs):
        parser.error("--harm_category trains by the recipe's row sku, without a search: leave one of the two out")
    runs = args.runs or by_default
    sweep_runs = args.sweep_runs or [name for name in ("sku", "task_vector") if name in negating]
    for flag_name, given, choices in (("runs", runs, [*known_runs]), ("sweep_runs", sweep_runs, negating)):
        unknown = [name for name in given if name not in choices]
        if unknown:
            parser.error(f"--{flag_name} {' '.join(unknown)}: take from {', '.join(choices)}")
    if args.search:
        not_searched = [name for name in runs if known_runs[name].group != "main"]
        if not_searched:
            parser.error(f"--runs {' '.join(not_searched)}: ablations are not searched; leave them or --search out")
        varied = {flag_name for name in runs for flag_name in search_space(known_runs[name])}
        given = [word[2:].partition("=")[0] for word in args.train_flags if word.startswith("--")]
        if fixed := sorted(varied & set(given)):
            parser.error(f"--train_flags fixes --{fixed[0]}, which the search varies: leave it out")
    chosen = {"recipe": recipe, "runs": runs, "sweep_runs": sweep_runs, "seeds": list(dict.fromkeys(args.seeds))}
    return parser.settings(ComparisonSettings, {**vars(args), **chosen})
