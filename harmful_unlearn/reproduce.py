"""The paper's comparison: train and measure every method and ablation, and write a report.

    python harmful_unlearn/reproduce.py --model_name facebook/opt-2.7b --output logs/reproduce
With the choice of alpha, two kinds of harm, and three seeds:
    python harmful_unlearn/reproduce.py --model_name facebook/opt-2.7b --output logs/reproduce \\
        --seeds 8888 8889 8890 --alpha_sweep 0,0.25,...,2 --harm_category "Cybercrime" --harm_category "Drugs"
With settings that a search finds for every method, in 12 trials each:
    python harmful_unlearn/reproduce.py --model_name facebook/opt-2.7b --output O --search 12 --seeds 0 1 2
Only some rows, with other settings than the recipe's, on the prompts for choosing settings:
    python harmful_unlearn/reproduce.py --model_name B --recipe facebook/opt-2.7b --output O \\
        --runs sku task_vector --part validation --train_flags "--lr 5e-5"

The hyper-parameters are in recipes.py, by model name (--recipe takes another model's). "{seed}" in a path is replaced
by the seed. What OUTPUT holds already is not done again: after an interruption give the same command.
"""

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import transformers
from accelerate import PartialState
from filelock import FileLock

from harmful_unlearn.cli import FlagParser, exit_code, flag, not_negative, positive_int, positive_number, whole_number
from harmful_unlearn.data.pku_saferlhf import read_harmful
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.attacks.wrappers import read_wrappers
from harmful_unlearn.evals.comparison.alpha_sweep import alpha_list
from harmful_unlearn.evals.comparison.seed_evaluation import SeedEvaluation, TrainedModel
from harmful_unlearn.evals.judges.registry import LEARN_FROM_LABELS, make_judge
from harmful_unlearn.evals.named_sets import check_named_sets, read_named_set
from harmful_unlearn.evals.prompt_sets import EvalData
from harmful_unlearn.evaluation import MeasuringSettings
from harmful_unlearn.losses.methods import METHODS
from harmful_unlearn.models import hub
from harmful_unlearn.models.loading import load_config
from harmful_unlearn.recipes import RECIPES, UTILITY_BUDGET, ComparisonRun, read_recipe, search_space
from harmful_unlearn.reporting.comparison import BASE, ORACLE, Comparison
from harmful_unlearn.reporting.report import write_report
from harmful_unlearn.search.search import Search, longest_trainings
from harmful_unlearn.search.trial import Bounds, TrialMeasure
from harmful_unlearn.storage.files import check_target, user_path, write_file
from harmful_unlearn.storage.provenance import provenance
from harmful_unlearn.training.flags import parse_flags as training_flags
from harmful_unlearn.trainings import as_words, plan, train


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
        f"by which share normal perplexity may rise in a trial (default: {UTILITY_BUDGET})", type=positive_number)
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
    train_flags: list[str] = flag("more flags for every training, as one quoted text", type=shlex.split, default=[])
    # fmt: on

    @property
    def compared_runs(self) -> dict[str, ComparisonRun]:
        """The rows of the report, by name, in the recipe's order."""
        return {name: run for name, run in read_recipe(self.recipe).rows.items() if name in self.runs}

    @property
    def training_data(self) -> dict[str, str]:
        """The flags that say what every run trains on, and in which template, where they are given."""
        names = ("harmful_dataset", "harmful_revision", "harmful_split", "normal_dataset", "system_prompt")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return given if self.template == "auto" else {**given, "template": self.template}

    def all_flags(self, flags: Mapping[str, object], seed: int) -> dict[str, object]:
        """A row's flags, with those that all rows share."""
        return {"model_name": self.model_name, **self.training_data, **flags, "seed": seed}

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


def main(arguments: list[str] | None = None) -> None:
    """Run the comparison for every seed. Raises UserError."""
    settings = parse_flags(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    check_target(settings.output, overwrite=True)
    settings.check_inputs()
    searched = None
    if settings.search:
        searched = search(settings)
        if settings.search_only or searched is None:
            return
        settings = replace(settings, recipe=str(searched.recipe_file), runs=list(searched.chosen()))
    names = ("part", "prompts", "attacks", "decoding", "temperature", "top_k", "max_new_tokens")
    asked = {name: getattr(settings, name) for name in (*names, "judge", "refusal_judge", "relevance_judge")}
    if settings.search:
        asked |= {"search": settings.search, "search_budget": settings.search_budget or UTILITY_BUDGET}
        asked["search_refusals"] = settings.search_refusals
    numbers = {f"{name} prompts, at most": number for name, number in settings.prompt_numbers.items()}
    comparison = Comparison(
        title=f"SKU and what it is compared with, on {settings.model_name}",
        model=settings.model_name,
        seeds=settings.seeds,
        command=shlex.join(["python", "harmful_unlearn/reproduce.py", *(arguments or sys.argv[1:])]),
        settings={"recipe": settings.recipe, **asked, **numbers},
        methods={
            BASE: {"label": "Original", "group": "main", "command": None},
            **{name: {"label": run.title, "group": run.group} for name, run in settings.compared_runs.items()},
            **({ORACLE: {"label": "Oracle", "group": "main", "command": None}} if settings.oracle else {}),
        },
        judge={"name": settings.judge, "by_seed": {}},
        trials=searched.table() if searched else [],
    )
    for seed in settings.seeds:
        run_seed(settings, seed, comparison)
    comparison.provenance = provenance()
    write_file(settings.output / "comparison.json", comparison.to_json())
    write_report(comparison, settings.output)
    print(f"\nreport: {settings.output / 'report.html'} (and report.md)")


def search(settings: ComparisonSettings) -> Search | None:
    """Search the hyper-parameters of all rows, and write the recipe.

    Returns:
        The search; None while other processes still run trials of it.

    Raises:
        UserError: it cannot be done.
    """
    seed = settings.seeds[0]
    own, folder = settings.of_seed(seed), settings.output / "search"
    base = hub.resolve_model(own.model_name)
    rows = own.compared_runs

    def planned(to: Path, flags: Mapping[str, object]) -> tuple[TrainedModel, list[str]]:
        return plan(to, base, own.all_flags(flags, seed), own.train_flags)

    records, failures = longest_trainings(rows, planned, folder)
    for name, failure in failures.items():
        print(f"{name} is left out: {failure}")
    rows = {name: rows[name] for name in records}
    if not rows:
        raise UserError("no row can be searched on these data: give other --runs or data")
    template = own.template_of(list(records.values()), base)
    data = EvalData.read(own, list(records.values()))
    sets = own.draw(data, seed)
    if not all(sets.validation.get(name) for name in ("unseen", "normal")):
        raise UserError("there are too few prompts for a search: give more data, or a larger --n_unseen")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "judge.lock"):
        judge = own.make_judge(data, sets.validation.values(), seed, folder)
        refusal_judge = own.make_refusal_judge(folder)
    protocol = own.protocol(sets, data, seed, template)
    evaluation = SeedEvaluation(folder, base, judge, refusal_judge, sets, protocol, template.choice, own.device_map)
    bounds = Bounds(own.search_budget or UTILITY_BUDGET, own.search_refusals)
    assert own.search
    asked = replace(protocol, prompts=sets.validation).settings()
    facts = {"train_flags": own.train_flags, "judge": judge.facts, "prompts": asked}
    of_rows = Search(folder, rows, own.search, bounds, seed, facts, planned, TrialMeasure(evaluation, bounds))
    if running := of_rows.run():
        print(f"\nno trial is left to begin; wait for {', '.join(running)}, then give the same command again")
        return None
    about = {"model": settings.model_name, "train_flags": own.train_flags, "judge": own.judge, "data": data.sources}
    chosen_on = read_recipe(settings.recipe).chosen_on
    print(f"\nrecipe: {of_rows.write(sets, {**about, **provenance()}, chosen_on)}")
    return of_rows


def run_seed(settings: ComparisonSettings, seed: int, comparison: Comparison) -> None:
    """Train and measure all models of a seed, and add what was measured to the comparison. Raises UserError."""
    own, recipe = settings.of_seed(seed), read_recipe(settings.recipe)
    is_first = seed == settings.seeds[0]
    if own.harm_category:  # an unknown kind would otherwise be noticed after all other trainings
        flags = training_flags([*as_words(own.training_data), *own.train_flags])
        read_harmful(flags.harmful_dataset, flags.harmful_revision, flags.harmful_split, own.harm_category)

    base = hub.resolve_model(own.model_name, weights=False)

    def planned_row(name: str, flags: Mapping[str, object]) -> tuple[TrainedModel, list[str]]:
        return plan(own.output / f"seed-{seed}" / name, base, own.all_flags(flags, seed), own.train_flags)

    plans = {name: planned_row(name, run.flags) for name, run in own.compared_runs.items()}
    kinds = {
        kind: planned_row(f"category-{kind.replace('/', '-')}", {**recipe.rows["sku"].flags, "harm_category": kind})
        for kind in own.harm_category
    }

    print(f"\n=== seed {seed}: training")
    models, vectors = {}, {}
    for name, planned in plans.items():
        model, row = train(*planned), comparison.methods[name]
        row.setdefault("command", model.command)
        if model.failure:
            notes = [row["note"]] if "note" in row else []
            row["note"] = "; ".join([*notes, f"seed {seed}: {model.failure}"])
            continue
        models[name] = model
        if is_first:
            steps = (model.finetuned / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            comparison.losses[name] = [json.loads(step) for step in steps]
    for kind, planned in kinds.items():
        vector = train(*planned)
        if not vector.failure:
            vectors[kind] = vector
    if not models and not vectors:
        raise UserError(f"no run of seed {seed} could be trained: lower the learning rates in recipes.py")

    print(f"\n=== seed {seed}: measuring")
    trainings = [model.record for model in (*models.values(), *vectors.values())]
    base = hub.resolve_model(own.model_name)
    template = own.template_of(trainings, base)
    data = EvalData.read(own, trainings)
    sets = own.draw(data, seed, recipe.chosen_on)
    named = own.named_sets(data, seed)
    judged = (sets.test, sets.validation, sets.of_category if vectors else {}, *(one.prompts for one in named))
    prompts = chain.from_iterable(part.values() for part in judged)
    folder = own.output / f"seed-{seed}"
    if own.part == "validation":
        folder /= "validation"  # apart from the answers to test prompts
    judge, protocol = own.make_judge(data, prompts, seed, folder), own.protocol(sets, data, seed, template)
    refusal_judge = own.make_refusal_judge(folder)
    oracle = hub.resolve_model(own.oracle) if own.oracle else None
    evaluation = SeedEvaluation(
        folder, base, judge, refusal_judge, sets, protocol, template.choice, own.device_map, oracle
    )
    relevance_judge = own.make_relevance_judge(data, sets.test.values(), seed, folder, evaluation.base)
    evaluation = replace(evaluation, relevance_judge=relevance_judge)
    comparison.judge["by_seed"][str(seed)] = judge.facts
    if relevance_judge:
        comparison.judge.setdefault("relevance", {})[str(seed)] = relevance_judge.facts
    attacks = own.attacked(protocol, data, load_config(base), template)  # refused before any answer is made
    check_named_sets(named, protocol, load_config(base), template)
    sources = {**data.sources, "prompts": {one.name: one.source for one in named}}
    figures, answers = evaluation.test(models, asdict(settings), sources)
    comparison.figures += figures
    if named:
        print(f"\n=== seed {seed}: further prompts")
        comparison.figures += evaluation.named_sets(models, named)
    if is_first:
        comparison.answers = answers
    if attacks:
        print(f"\n=== seed {seed}: attacks")
        attacked, relearned = evaluation.attack(models, attacks)
        comparison.attacks += attacked
        comparison.relearning += relearned
    if oracle:
        comparison.oracle += evaluation.oracle_distances(models)
    for name in own.sweep_runs if own.alpha_sweep else ():
        if name in models:
            print(f"\n=== seed {seed}: the task vector of {name} at many alphas")
            swept, advice = evaluation.sweep(name, models[name], own.alpha_sweep, own.alpha_budget)
            print(f"recommended alpha for {name}: {advice['alpha']} ({advice['why']})")
            comparison.sweep += swept
            comparison.recommended.append(advice)
    if vectors:
        print(f"\n=== seed {seed}: task vectors by category")
        comparison.categories += evaluation.categories(vectors)


def parse_flags(arguments: list[str] | None) -> ComparisonSettings:
    """The flags."""
    title, _, usage = __doc__.partition("\n")
    parser = FlagParser(description=title, epilog=usage)
    parser.add_settings(ComparisonSettings)
    args = parser.parse_args(arguments)
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
    return ComparisonSettings(**{**vars(args), **chosen})


if __name__ == "__main__":
    sys.exit(exit_code(main))
