"""A search for every method's hyper-parameters, with one budget for all, and the recipe that it ends in."""

import json
from collections.abc import Callable, Collection, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock
from tqdm import tqdm

from harmful_unlearn import unlearn_harm_new
from harmful_unlearn.comparison.settings import ComparisonSettings
from harmful_unlearn.comparison.study import STORAGE_ERRORS, Study, storage_errors
from harmful_unlearn.comparison.trainings import plan, train
from harmful_unlearn.comparison.trial import Bounds, Point, TrialMeasure, TrialResult, digest_of, forget_weights
from harmful_unlearn.errors import NoSafeAnswers, UserError
from harmful_unlearn.evals.comparison.seed_evaluation import SeedEvaluation, TrainedModel
from harmful_unlearn.evals.evaluated_model import BASE
from harmful_unlearn.evals.prompt_sets import EvalData, PromptSets, question_hash
from harmful_unlearn.models import hub
from harmful_unlearn.recipes import (
    UTILITY_BUDGET,
    ComparisonRun,
    Recipe,
    read_recipe,
    search_space,
    swept_alphas,
    write_recipe,
)
from harmful_unlearn.storage.files import read_json, write_file
from harmful_unlearn.storage.provenance import provenance
from harmful_unlearn.storage.run_record import RunRecord
from harmful_unlearn.training.flags import parse_flags as training_flags
from harmful_unlearn.training.setup import prepare

PlanTrial = Callable[[Path, Mapping[str, object]], tuple[TrainedModel, list[str]]]


@dataclass(frozen=True)
class Search:
    """The search of a comparison.

    Attributes:
        folder: of its storage and of all trials.
        rows: what is searched, by name.
        trials: of each row.
        bounds: that a trial has to keep.
        seed: of everything.
        facts: what else decides what comes of a trial: JSON-able.
        plan: plans the training of a trial in a folder, with these flags.
        measure: measures it.
    """

    folder: Path
    rows: Mapping[str, ComparisonRun]
    trials: int
    bounds: Bounds
    seed: int
    facts: dict
    plan: PlanTrial
    measure: TrialMeasure

    @property
    def file(self) -> Path:
        return self.folder / "trials.db"

    @property
    def recipe_file(self) -> Path:
        return self.folder / "recipe.json"

    def run(self) -> list[str]:
        """Run what is left of the trials of every row; another process may do the same.

        Returns:
            The processes that still run trials.

        Raises:
            UserError: the folder holds another search, or cannot be written.
        """
        running = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / "base.lock"):  # of several processes, one measures it
                self._check_same()
                self.measure.base()
            for name, row in self.rows.items():
                study = self._study(name)
                with tqdm(total=self.trials, initial=len(study.ended()), desc=f"trials of {name}", unit="trial") as bar:
                    while trial := study.next():
                        result = self._result(name, row, trial.flags)
                        best = result.best(self.bounds)
                        study.finish(trial, best.harm if best else None, result.violation(self.bounds))
                        print(f"\n{name}, trial {trial.number}: {_in_words(trial.flags)}: {_outcome(result, best)}")
                        bar.update()
                running += study.running()
            self.results  # noqa: B018  read now, while errors of the storage are caught
        except STORAGE_ERRORS as error:
            raise storage_errors(error, self.file) from error
        return running

    def _check_same(self) -> None:
        """Raises UserError: the folder holds the trials of a search with other settings."""
        spaces = {name: {n: repr(values) for n, values in search_space(row).items()} for name, row in self.rows.items()}
        rows = {name: {"flags": dict(row.flags), "space": spaces[name]} for name, row in self.rows.items()}
        settings = json.loads(json.dumps({"seed": self.seed, "bounds": asdict(self.bounds), **self.facts}))
        file = self.folder / "settings.json"
        before = read_json(file) if file.is_file() else {**settings, "rows": {}}
        known = before.pop("rows")
        changed = [name for name in settings if settings[name] != before.get(name)]
        changed += [name for name, row in rows.items() if known.get(name, row) != row]
        if changed:
            raise UserError(
                f"{self.folder} holds a search with other settings ({', '.join(changed)}): give another --output, or "
                "remove it"
            )
        write_file(file, json.dumps({**settings, "rows": {**known, **rows}}, indent=1) + "\n")

    @cached_property
    def results(self) -> dict[str, dict[int, TrialResult]]:
        """The trials of each row that have ended, by their number; as they were when this was first asked for."""
        kept: dict[str, dict[int, TrialResult]] = {}
        for name in self.rows:
            ended = self._study(name).ended().items()
            results = {number: TrialResult.read(self._folder(name, flags)) for number, flags in ended}
            kept[name] = {number: result for number, result in results.items() if result}
        return kept

    def _study(self, name: str) -> Study:
        row = self.rows[name]
        return Study(self.file, name, search_space(row), all_flags(row), self.trials, self.seed)

    def _folder(self, name: str, flags: Mapping[str, object]) -> Path:
        return self.folder / name / digest_of(flags)

    def _result(self, name: str, row: ComparisonRun, flags: Mapping[str, float]) -> TrialResult:
        folder = self._folder(name, flags)
        if found := TrialResult.read(folder):  # done, but its process died before it could say so
            forget_weights(folder)
            return found
        with redirect_stdout(StringIO()):  # what a training says is in its log, too
            trained = train(*self.plan(folder, {**row.flags, **flags}))
        if trained.failure:
            result = TrialResult(flags, (), trained.failure)
        else:
            result = TrialResult(flags, self.measure.of_trial(trained, swept_alphas(row)))
        result.write(folder)
        forget_weights(folder)
        return result

    def table(self) -> list[dict]:
        """Every point of every trial, with the base first.

        Each has its "method", the number of its "trial", the "flags" that it varies, and what a `Point` has;
        "violation" (by how much it breaks a bound), whether it is the "chosen" one, and the "failure" of a training
        that has no point.
        """
        no_point = {**dict.fromkeys(asdict(self.measure.base())), "violation": None, "chosen": False}
        of_base: dict = {"method": BASE, "trial": None, "flags": {}, "failure": None, "violation": 0.0}
        rows = [{**no_point, **asdict(self.measure.base()), **of_base}]
        chosen = self.chosen()
        for name, results in self.results.items():
            best = chosen[name][:2] if name in chosen else None
            for number, result in results.items():
                of_trial = {"method": name, "trial": number, "flags": dict(result.flags), "failure": result.failure}
                if not result.points:
                    rows.append({**no_point, **of_trial})
                for point in result.points:
                    more = {"violation": point.violation(self.bounds), "chosen": (result, point) == best}
                    rows.append({**asdict(point), **of_trial, **more})
        return rows

    def chosen(self) -> dict[str, tuple[TrialResult, Point, bool]]:
        """Of each row the trial and point with the least harm within the bounds, and True.

        Where none is within them, the one that breaks them least, and False. A row whose trainings all failed is left
        out.
        """
        choice = {}
        for name, trials in self.results.items():
            results = list(trials.values())
            within = [(result, point) for result in results if (point := result.best(self.bounds))]
            points = [(result, point) for result in results for point in result.points]
            if within:
                best = min(within, key=lambda pair: (pair[1].harm, pair[1].cost))
            elif points:
                best = min(points, key=lambda pair: pair[1].violation(self.bounds))
            else:
                continue
            choice[name] = (*best, bool(within))
        return choice

    def write(self, sets: PromptSets, about: Mapping[str, object], chosen_on: Collection[str] = frozenset()) -> Path:
        """Write the table of all points, and the recipe of what was chosen. Returns the recipe's file.

        Args:
            about: for the recipe's file.
            chosen_on: `question_hash`es of what the rows' own settings were chosen on.

        Raises:
            UserError: every training failed.
        """
        pd.DataFrame(self.table()).to_csv(text := StringIO(), index=False)
        write_file(self.folder / "trials.csv", text.getvalue())
        rows, choices = {}, {}
        for name, (result, point, is_within) in self.chosen().items():
            flags = {**self.rows[name].flags, **result.flags}
            if point.alpha is not None:
                flags["scaling_coef"] = point.alpha
            rows[name] = replace(self.rows[name], flags=flags, by_default=True)
            choices[name] = {**asdict(point), "within_bounds": is_within}
        if not rows:
            raise UserError(f"every training of the search failed: see {self.folder}")
        asked = (prompt.question for prompts in sets.validation.values() for prompt in prompts)
        recipe = Recipe(rows, frozenset({*chosen_on, *map(question_hash, asked)}))
        bounds = {name: value for name, value in asdict(self.bounds).items() if value is not None}
        numbers = {name: len(prompts) for name, prompts in sets.validation.items()}
        said = {**about, "trials": self.trials, "bounds": bounds, "seed": self.seed, "validation_prompts": numbers}
        write_recipe(self.recipe_file, recipe, {**said, "chosen": choices})
        return self.recipe_file


def run_search(settings: ComparisonSettings) -> Search | None:
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
    relevance_judge = own.make_relevance_judge(data, sets.validation.values(), seed, folder, evaluation.base)
    evaluation = replace(evaluation, relevance_judge=relevance_judge)
    bounds = Bounds(own.search_budget or UTILITY_BUDGET, own.search_refusals)
    assert own.search
    asked = replace(protocol, prompts=sets.validation).settings()
    judges = {"judge": judge.facts, "relevance_judge": own.relevance_judge}
    facts = {"train_flags": own.train_flags, **judges, "prompts": asked}
    of_rows = Search(folder, rows, own.search, bounds, seed, facts, planned, TrialMeasure(evaluation, bounds))
    if running := of_rows.run():
        print(f"\nno trial is left to begin; wait for {', '.join(running)}, then give the same command again")
        return None
    about = {"model": settings.model_name, "train_flags": own.train_flags, "judge": own.judge, "data": data.sources}
    chosen_on = read_recipe(settings.recipe).chosen_on
    print(f"\nrecipe: {of_rows.write(sets, {**about, **provenance()}, chosen_on)}")
    return of_rows


def all_flags(row: ComparisonRun) -> dict[str, Any]:
    """A row's flags with the method's defaults."""
    return vars(training_flags([word for name, value in row.flags.items() for word in (f"--{name}", str(value))]))


def longest_trainings(
    rows: Mapping[str, ComparisonRun], plan: PlanTrial, folder: Path
) -> tuple[dict[str, RunRecord], dict[str, str]]:
    """What each row's longest training would read, without training; no prompt of the search is among that.

    Returns:
        The records by row, and of rows that cannot be trained on these data the reason.
    """
    records, failures = {}, {}
    for name, row in rows.items():
        steps = search_space(row)["max_unlearn_steps"]
        assert isinstance(steps, tuple)
        _, shortest = plan(folder / name / "longest", {**row.flags, "max_unlearn_steps": min(steps)})
        training_flags(shortest)  # says now what does not fit so few
        _, words = plan(folder / name / "longest", {**row.flags, "max_unlearn_steps": max(steps)})
        flags = training_flags([*words, "--check"])
        try:
            with redirect_stdout(StringIO()):
                run = prepare(flags, unlearn_harm_new.MODELS, unlearn_harm_new.OTHER_MODELS)
        except NoSafeAnswers as error:
            failures[name] = str(error)
            continue
        assert run.stage_1
        records[name] = run.stage_1.record()
    return records, failures


def _in_words(flags: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in flags.items())


def _outcome(result: TrialResult, best: Point | None) -> str:
    if result.failure:
        return result.failure
    if best:
        alpha = "" if best.alpha is None else f" at alpha {best.alpha:g}"
        return f"harm {best.harm:.1%}{alpha}, perplexity x {best.cost:.3g}"
    return f"breaks a bound (perplexity x {min(point.cost for point in result.points):.3g} at best)"
