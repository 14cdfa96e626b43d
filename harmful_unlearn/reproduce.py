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
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

if not __package__:  # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import harmful_unlearn.cli.before_imports  # noqa: F401

import transformers

from harmful_unlearn.cli.running import exit_code
from harmful_unlearn.comparison import replay
from harmful_unlearn.comparison.search import Search, run_search
from harmful_unlearn.comparison.settings import ComparisonSettings, parse_flags
from harmful_unlearn.comparison.trainings import as_words, plan, train
from harmful_unlearn.data.pku_saferlhf import read_harmful
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.comparison.seed_evaluation import SeedEvaluation, TrainedModel
from harmful_unlearn.evals.named_sets import check_named_sets
from harmful_unlearn.evals.prompt_sets import EvalData
from harmful_unlearn.models import hub
from harmful_unlearn.models.loading import load_config
from harmful_unlearn.recipes import UTILITY_BUDGET, read_recipe
from harmful_unlearn.reporting.comparison import BASE, ORACLE, Comparison
from harmful_unlearn.reporting.report import write_report
from harmful_unlearn.storage.files import check_target, write_file
from harmful_unlearn.storage.lock import locked
from harmful_unlearn.storage.provenance import provenance
from harmful_unlearn.training.flags import parse_flags as training_flags


def main(arguments: list[str] | None = None) -> None:
    """Run the comparison for every seed. Raises UserError."""
    settings = parse_flags(arguments, __doc__)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    check_target(settings.output, overwrite=True)
    if settings.replay:
        replay.check_source(settings)
    settings.check_inputs()
    searched, asked_for = None, settings.to_json()
    inputs = {str(seed): replay.inputs(settings.of_seed(seed), seed) for seed in settings.seeds}
    if settings.replay:
        for seed in settings.seeds:
            replay.check_inputs(settings.replay, seed, inputs[str(seed)])
    if settings.search:
        searched = run_search(settings)
        if settings.search_only or searched is None:
            return
        settings = replace(settings, recipe=str(searched.recipe_file), runs=list(searched.chosen()))
    command = shlex.join(["python", "harmful_unlearn/reproduce.py", *(arguments or sys.argv[1:])])
    with locked(settings.output):  # several processes may share a search
        compare(settings, searched, command, asked_for, inputs)


def compare(settings: ComparisonSettings, searched: Search | None, command: str, asked_for: dict, inputs: dict) -> None:
    """Train and measure the rows of every seed, and write the report.

    Args:
        searched: the search that the rows' settings are from.
        command, asked_for, inputs: the command line, its flags, and `replay.inputs` by seed, for the record.

    Raises:
        UserError: it cannot be done.
    """
    names = ("part", "prompts", "attacks", "decoding", "temperature", "top_k", "max_new_tokens")
    asked = {name: getattr(settings, name) for name in (*names, "judge", "refusal_judge", "relevance_judge")}
    data = training_flags([*as_words(settings.training_data), *settings.train_flags])
    asked |= {name: getattr(data, name) for name in ("harmful_dataset", "normal_dataset")}
    if settings.search:
        asked |= {"search": settings.search, "search_budget": settings.search_budget or UTILITY_BUDGET}
        asked["search_refusals"] = settings.search_refusals
    numbers = {f"{name} prompts, at most": number for name, number in settings.prompt_numbers.items()}
    comparison = Comparison(
        model=settings.model_name,
        seeds=settings.seeds,
        command=command,
        flags=asked_for,
        inputs=inputs,
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
    if settings.replay:
        replay.compare(settings.replay, comparison.figures)


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
    comparison.inputs[str(seed)] |= replay.base_hashes(base)
    if own.replay:
        replay.check_inputs(own.replay, seed, comparison.inputs[str(seed)])
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


if __name__ == "__main__":
    sys.exit(exit_code(main))
