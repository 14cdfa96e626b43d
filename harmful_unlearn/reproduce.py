"""The paper's comparison: train and measure every method and ablation, and write a report.

    python harmful_unlearn/reproduce.py --model_name facebook/opt-2.7b --output logs/reproduce
With the choice of alpha, three kinds of harm apart, and three seeds:
    python harmful_unlearn/reproduce.py --model_name facebook/opt-2.7b --output logs/reproduce \\
        --seeds 8888 8889 8890 --alpha_sweep 0,0.25,...,2 --harm_category "Cybercrime" --harm_category "Drugs"
Only some rows, without the relearning check:
    python harmful_unlearn/reproduce.py --model_name B --recipe facebook/opt-2.7b --output O \\
        --runs sku task_vector --relearn_steps 0

The hyper-parameters stand in recipes.py, by model name (--recipe takes another's). "{seed}" in a path stands for
the seed. Whatever OUTPUT holds already is not done again: after an interruption give the same command.
"""

import argparse
import gc
import json
import shlex
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

if not __package__:  # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import transformers
from accelerate import PartialState

from harmful_unlearn import unlearn_harm_new
from harmful_unlearn.cli import FlagParser, exit_code, number, positive_int, positive_number, whole_number
from harmful_unlearn.data.pku_saferlhf import read_harmful
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals import bleurt
from harmful_unlearn.evals.alpha_sweep import AlphaSweep, recommend
from harmful_unlearn.evals.evaluated_model import BASE, EvaluatedModel, evaluated_model, load_model
from harmful_unlearn.evals.evaluator import EvalProtocol, figures, measure
from harmful_unlearn.evals.judges.base import Judge
from harmful_unlearn.evals.judges.registry import make_judge
from harmful_unlearn.evals.prompt_sets import SETS, EvalData, PromptSets, draw_prompts
from harmful_unlearn.evals.relearning import relearn
from harmful_unlearn.evals.results import write_prompts, write_results
from harmful_unlearn.evaluation import MeasuringSettings, add_measuring_flags
from harmful_unlearn.losses.methods import METHODS
from harmful_unlearn.models import hub, loading
from harmful_unlearn.models.lora import Lora, add_lora
from harmful_unlearn.recipes import RECIPES, flags_of, runs_of
from harmful_unlearn.reporting.comparison import ComparedModel, Comparison
from harmful_unlearn.reporting.report import write_report
from harmful_unlearn.storage.files import check_target, user_path, write_file
from harmful_unlearn.storage.provenance import provenance
from harmful_unlearn.storage.run_record import read_trainings
from harmful_unlearn.training.flags import parse_flags as training_flags
from harmful_unlearn.training.resume import FREE_FLAGS


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings(MeasuringSettings):
    """The flags of this command."""

    model_name: str
    output: Path
    recipe: str
    seeds: list[int]
    runs: list[str]
    alpha_sweep: list[float]
    sweep_runs: list[str]
    alpha_budget: float
    harm_category: list[str]
    relearn_steps: int
    relearn_pairs: int
    relearn_lr: list[float]
    train_flags: list[str]


SHOWN = {"seen": 5, "unseen": 10, "normal": 5}  # prompts that the report shows with all answers


def main(arguments: list[str] | None = None) -> None:
    """Run the comparison for every seed. Raises UserError."""
    args = parse_flags(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    check_target(args.output, overwrite=True)
    if args.bleurt:
        hub.resolve_model(args.bleurt)
    if args.judge != "classifier":  # which alone needs data; the others say now what they lack
        device = PartialState().device
        make_judge(args.judge, responses=[], normal=[], judged=set(), seed=0, cache=args.output, device=device)
    recipe = RECIPES[args.recipe]
    runs = {name: run for name, run in runs_of(recipe).items() if name in args.runs}
    comparison = {
        "title": f"SKU and what it is compared with, on {args.model_name}",
        "model": args.model_name,
        "seeds": args.seeds,
        "command": shlex.join(["python", "harmful_unlearn/reproduce.py", *(arguments or sys.argv[1:])]),
        "settings": {
            "recipe": args.recipe,
            **{name: getattr(args, name) for name in ("decoding", "temperature", "top_k", "max_new_tokens", "judge")},
            **{f"{name} prompts, at most": getattr(args, f"n_{name}") for name in SETS},
        },
        "methods": {
            BASE: {"label": "Original", "group": "main", "command": None},
            **{name: {"label": run.title, "group": run.group} for name, run in runs.items()},
        },
        "judge": {"name": args.judge, "by_seed": {}},
        "relearning_settings": {
            "steps": args.relearn_steps,
            "pairs": args.relearn_pairs,
            "lr": dict(zip(("soft", "strong"), args.relearn_lr, strict=True)),
        },
        **{part: [] for part in ("figures", "sweep", "recommended", "categories", "relearning", "answers")},
        "losses": {},
    }
    for seed in args.seeds:
        run_seed(Seed(args, seed, recipe, runs), comparison)
    comparison["provenance"] = provenance()
    methods = {name: ComparedModel(**method) for name, method in comparison["methods"].items()}
    report = Comparison(**{**comparison, "methods": methods})
    write_file(args.output / "comparison.json", report.to_json())
    write_report(report, args.output)
    print(f"\nreport: {args.output / 'report.html'} (and report.md)")


class Seed:
    """One seed's folders, models and data; `add` puts figures of it into the comparison."""

    def __init__(self, args: ComparisonSettings, seed: int, recipe, runs: dict):
        self.args, self.seed, self.recipe, self.runs = args, seed, recipe, runs
        fill = lambda text: text and text.replace("{seed}", str(seed))  # noqa: E731
        self.home = args.output / f"seed-{seed}"
        self.model_name = fill(args.model_name)
        self.base = hub.resolve_model(self.model_name)
        paths = ("harmful_dataset", "unseen_dataset", "normal_dataset")
        self.data_flags = replace(args, **{name: fill(getattr(args, name)) for name in paths})
        data = {flag: getattr(self.data_flags, flag) for flag in TRAINING_DATA if getattr(self.data_flags, flag)}
        self.data_words = [word for flag, value in data.items() for word in (f"--{flag}", value)]
        self.precision = loading.resolve_precision(args.precision, PartialState().device)
        self.load = partial(load_model, precision=self.precision, device_map=args.device_map)
        self.failed: dict[str, str] = {}

    def train(self, name: str, flags: dict) -> str:
        """Train a run as far as it is not there yet, into NAME/copy and NAME/unlearned; returns its command.

        A run whose losses stop being finite, or whose data lack safe answers, is noted in `failed`, and stays so.

        Raises:
            UserError: the folder holds a run with other flags, or training cannot start.
        """
        folder = self.home / name
        flags = {**flags, "seed": self.seed}
        words = ["--model_name", self.model_name, *self.data_words]
        words += [word for flag, value in flags.items() for word in (f"--{flag}", str(value))] + self.args.train_flags
        command = f"python harmful_unlearn/unlearn_harm_new.py {shlex.join(words)}"
        where = {"model_save_dir": folder / "copy", "task_vector_saving_path": folder / "unlearned"}
        words += [word for flag, value in where.items() for word in (f"--{flag}", str(value))]
        words += ["--log_file", str(folder / "run.log"), "--overwrite"]
        if (folder / "copy" / "run.json").is_file():
            check_same(folder, vars(training_flags(words)))
            words += ["--stage", "negate"]
        failure = folder / "failed.txt"
        if failure.exists() and not failure.read_text(encoding="utf-8").endswith(f"{command}\n"):
            failure.unlink()  # the recipe has changed since
        if not failure.exists() and not (folder / "unlearned" / "run.json").is_file():
            print(f"\n$ {command}", flush=True)
            try:
                unlearn_harm_new.main(words)
            except UserError as error:
                if not any(said in str(error) for said in ("is not finite", "a safe one beside it")):
                    raise
                write_file(failure, f"not trained: {error}\n{command}\n")
            gc.collect()  # the copy and its optimizer refer to each other; the next training needs their memory
            torch.cuda.empty_cache()
        if failure.exists():
            self.failed[name] = failure.read_text(encoding="utf-8").splitlines()[0]
            print(f"{name}: {self.failed[name]}")
        return command

    def protocol(self, prompts: dict, decodings: list, choices: dict | None = None) -> EvalProtocol:
        """How this seed's models are measured on `prompts`."""
        args = self.args
        return EvalProtocol(
            prompts, decodings, args.max_new_tokens, args.batch_size, self.seed, choices or {}, self.precision
        )

    def subject(self, name: str) -> EvaluatedModel:
        """The unlearned model of a run."""
        return evaluated_model(name, self.home / name / "unlearned", self.load)


TRAINING_DATA = ("harmful_dataset", "harmful_revision", "harmful_split", "normal_dataset")
NO_MATTER = FREE_FLAGS - {"gradient_checkpointing", "device_map"}


def check_same(folder: Path, wanted: dict) -> None:
    """Raises UserError where the run in `folder` had other flags than `wanted`."""
    had = {**vars(training_flags([])), **read_trainings(folder / "copy")[0].flags}
    for flag, value in wanted.items():
        if flag not in NO_MATTER and json.dumps(value) != json.dumps(had.get(flag)):
            raise UserError(
                f"{folder} was trained with --{flag} {had.get(flag)}, and the recipe has {value} now: "
                "remove that folder, or give another --output"
            )


def run_seed(seed: Seed, comparison: dict) -> None:
    """Train, measure, sweep, tell categories apart and relearn; fills `comparison`."""
    args = seed.args
    if args.harm_category:  # an unknown kind would be noticed after all other trainings
        data = training_flags(seed.data_words + args.train_flags)
        read_harmful(data.harmful_dataset, data.harmful_revision, data.harmful_split, args.harm_category)
    print(f"\n=== seed {seed.seed}: training")
    for name, run in seed.runs.items():
        method = comparison["methods"][name]
        command = seed.train(name, flags_of(seed.recipe, run))
        method.setdefault("command", command)
        if name in seed.failed:
            notes = [*filter(None, [method.get("note")]), f"seed {seed.seed}: {seed.failed[name]}"]
            method["note"] = "; ".join(notes)
        elif seed.seed == args.seeds[0]:
            lines = (seed.home / name / "copy" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            comparison["losses"][name] = [json.loads(line) for line in lines]
    trained = [name for name in seed.runs if name not in seed.failed]
    vectors = {kind: f"category-{kind.replace('/', '-')}" for kind in args.harm_category}
    for kind, name in vectors.items():
        seed.train(name, {**seed.recipe.shared, **seed.recipe.sku, "harm_category": kind})
    vectors = {kind: name for kind, name in vectors.items() if name not in seed.failed}
    copies = [seed.home / name / "copy" for name in [*trained, *vectors.values()]]
    if not copies:
        raise UserError(f"no run of seed {seed.seed} could be trained: lower the rates in recipes.py")

    print(f"\n=== seed {seed.seed}: measuring")
    data = EvalData.read(seed.data_flags, [record for copy in copies for record in read_trainings(copy)])
    sets = draw_prompts(data, args.prompt_numbers, seed.seed)
    judged = chain(*(part.values() for part in (sets.test, sets.validation, sets.of_category if vectors else {})))
    judge = make_judge(
        args.judge,
        responses=data.responses,
        normal=data.training_texts,
        judged={prompt.question for prompts in judged for prompt in prompts},
        seed=seed.seed,
        cache=seed.home / "judge.jsonl",
        device=PartialState().device,
    )
    comparison["judge"]["by_seed"][str(seed.seed)] = judge.facts
    protocol = seed.protocol(sets.test, args.decodings, data.choices)
    base = evaluated_model(BASE, seed.base, seed.load)
    subjects = [base, *map(seed.subject, trained)]
    folder = seed.home / "evaluation"
    rows = measure(subjects, protocol, judge, base, folder)
    if args.bleurt:
        bleurt.add_bleurt(rows, args.bleurt, folder, PartialState().device)
    found = figures(rows, protocol, folder)
    write_prompts(folder, sets.test)
    write_results(
        folder, found, judge=judge, protocol=protocol, models=subjects, flags=asdict(args), sources=data.sources
    )
    comparison["figures"] += of_seed(seed, found)
    if seed.seed == args.seeds[0]:
        comparison["answers"] = side_by_side(rows, protocol)

    for name in args.sweep_runs if args.alpha_sweep else ():
        if name in trained:
            sweep(seed, name, sets, judge, base, comparison)
    if vectors:
        by_category(seed, vectors, sets, judge, base, comparison)
    if args.relearn_steps and trained:
        relearn_all(seed, trained, sets, judge, base, found, comparison)


def of_seed(seed: Seed, found: list[dict], **more: object) -> list[dict]:
    """Figures with the seed and what else tells them apart."""
    return [{"seed": seed.seed, **more, **row} for row in found]


def side_by_side(rows: dict[str, list[dict]], protocol: EvalProtocol) -> list[dict]:
    """A few prompts of each set with the answers of all models, in the first decoding."""
    decoding = protocol.decodings[0].name
    shown = []
    for name, prompts in protocol.prompts.items():
        for index, prompt in enumerate(prompts[: SHOWN[name]]):
            answers = {
                label: {"answer": row["answer"], "verdict": row["verdict"]}
                for label, found in rows.items()
                for row in found
                if (row["set"], row["decoding"], row["index"]) == (name, decoding, index)
            }
            shown.append({"set": name, "prompt": prompt.question, "reference": prompt.reference, "answers": answers})
    return shown


def sweep(seed: Seed, name: str, sets: PromptSets, judge: Judge, base: EvaluatedModel, comparison: dict) -> None:
    """Measure one run's task vector at every scale on the validation prompts, and recommend a scale."""
    args = seed.args
    landing = read_trainings(seed.home / name / "copy")[0].landing_alpha
    alphas = sorted({*args.alpha_sweep, *([landing] if landing else [])})
    print(f"\n=== seed {seed.seed}: {name} at {len(alphas)} scales")
    scales = AlphaSweep(seed.base, [seed.home / name / "copy"], seed.load)
    copy = seed.subject(name).identity
    subjects = [base] + [
        EvaluatedModel(f"alpha-{alpha:g}", {"unlearned": copy, "alpha": alpha}, partial(scales.at, alpha))
        for alpha in alphas
    ]
    protocol = seed.protocol(sets.validation, args.decodings)
    folder = seed.home / f"sweep-{name}"
    found = figures(measure(subjects, protocol, judge, base, folder), protocol, folder)
    perplexity = next(
        row["value"]
        for row in found
        if (row["model"], row["set"], row["metric"]) == (BASE, "normal", "reference_perplexity")
    )
    at_scale = [
        {**row, "alpha": float(row["model"].removeprefix("alpha-")), "trained_for": landing}
        for row in found
        if row["model"] != BASE
    ]
    comparison["sweep"] += of_seed(seed, at_scale, method=name)
    fit = [row for row in at_scale if landing in (None, row["alpha"])]
    advice = recommend(fit, perplexity, args.alpha_budget, args.decoding[0])
    comparison["recommended"].append({"seed": seed.seed, "method": name, "budget": args.alpha_budget, **advice})
    print(f"recommended alpha for {name}: {advice['alpha']} ({advice['why']})")


def by_category(
    seed: Seed, vectors: dict[str, str], sets: PromptSets, judge: Judge, base: EvaluatedModel, comparison: dict
) -> None:
    """Each category's vector, and their sum, on every category's unseen prompts."""
    args = seed.args
    print(f"\n=== seed {seed.seed}: task vectors by category")
    subjects = [
        base,
        *(evaluated_model(kind, seed.home / name / "unlearned", seed.load) for kind, name in vectors.items()),
    ]
    if len(vectors) > 1:
        scales = AlphaSweep(seed.base, [seed.home / name / "copy" for name in vectors.values()], seed.load)
        identity = {"sum": [subject.identity for subject in subjects[1:]]}
        subjects.append(EvaluatedModel("sum", identity, partial(scales.at, 1.0)))
    protocol = seed.protocol(sets.of_category, args.decodings[:1])
    folder = seed.home / "categories"
    for row in figures(measure(subjects, protocol, judge, base, folder), protocol, folder):
        if row["metric"] == "harmful_rate":
            comparison["categories"].append({**row, "seed": seed.seed, "vector": row["model"], "category": row["set"]})


def relearn_all(
    seed: Seed,
    trained: list[str],
    sets: PromptSets,
    judge: Judge,
    base: EvaluatedModel,
    before: list[dict],
    comparison: dict,
) -> None:
    """Harmful rates on unseen prompts after a few steps on a handful of harmful pairs, softly and strongly."""
    args = seed.args
    print(f"\n=== seed {seed.seed}: relearning, {args.relearn_steps} steps on {args.relearn_pairs} harmful pairs")
    pairs = [prompt.pair for prompt in sets.test["seen"][: args.relearn_pairs]]
    settings = read_trainings(seed.home / trained[0] / "copy")[0].training["lora"]
    lora = Lora(**{**settings, "target_modules": tuple(settings["target_modules"])}) if settings else None
    # Weights that are trained are float32; under an adapter they may be 16-bit.
    precision = seed.precision if lora else "fp32"

    def relearned(subject: EvaluatedModel, lr: float):
        model, tokenizer = load_model(subject.folder, precision, args.device_map)
        if lora:
            model = add_lora(model, lora, str(subject.folder))
        return relearn(model, tokenizer, pairs, args.relearn_steps, lr, seed.seed, seed.precision), tokenizer

    strengths = comparison["relearning_settings"]["lr"]
    decoding = args.decodings[:1]
    protocol = seed.protocol({"unseen": sets.test["unseen"]}, decoding)
    keep = {"set": "unseen", "decoding": decoding[0].name, "metric": "harmful_rate"}
    for row in before:
        if keep.items() <= row.items():
            comparison["relearning"] += of_seed(seed, [row], when="before", strength=None)
    subjects = [base, *map(seed.subject, trained)]
    for strength, lr in strengths.items():
        settings = {"steps": args.relearn_steps, "pairs": len(pairs), "lr": lr}
        again = [EvaluatedModel(s.label, {**s.identity, **settings}, partial(relearned, s, lr)) for s in subjects]
        folder = seed.home / f"relearning-{strength}"
        for row in figures(measure(again, protocol, judge, base, folder), protocol, folder):
            if keep.items() <= row.items():
                comparison["relearning"] += of_seed(seed, [row], when="after", strength=strength)


MOST_SCALES = 1000


def scale_list(text: str) -> list[float]:
    """ "0,0.5,...,2" or "0.5,1": scales as argparse reads them; three dots go on by the step before them."""
    try:
        parts = [part.strip() for part in text.split(",")]
        if "..." not in parts:
            return sorted({number(part) for part in parts})
        at = parts.index("...")
        first, second, last = number(parts[at - 2]), number(parts[at - 1]), number(parts[at + 1])
        step = second - first
        steps = round((last - first) / step)
        fits = at == len(parts) - 2 and at >= 2 and step > 0 and abs(first + steps * step - last) <= 1e-9
        if not fits or steps > MOST_SCALES:
            raise ValueError
        between = [round(first + step * n, 10) for n in range(steps + 1)]
        return sorted({*map(number, parts[: at - 2]), *between})
    except (argparse.ArgumentTypeError, ValueError, IndexError, ArithmeticError):
        message = f"{text} is no list of at most {MOST_SCALES} scales: give one like 0,0.25,...,2 or 0.5,1,2"
        raise argparse.ArgumentTypeError(message) from None


def parse_flags(arguments: list[str] | None) -> ComparisonSettings:
    """The flags."""
    title, _, usage = __doc__.partition("\n")
    parser = FlagParser(description=title, epilog=usage)
    parser.add_argument("--model_name", required=True, help="the base model: hub id or folder")
    parser.add_argument("--output", type=user_path, required=True, help="folder of everything that is made")
    parser.add_argument("--recipe", help=f"whose hyper-parameters: {', '.join(RECIPES)} (default: --model_name's)")
    parser.add_argument(
        "--seeds",
        type=whole_number,
        nargs="+",
        default=[8888],
        help="of everything, one after the other (default: 8888)",
    )
    parser.add_argument("--runs", nargs="+", metavar="RUN", help="rows to run (default: all of the recipe)")
    parser.add_argument(
        "--alpha_sweep",
        type=scale_list,
        default=[],
        metavar="SCALES",
        help="measure task vectors at these scales, as 0,0.25,...,2, and recommend one",
    )
    parser.add_argument("--sweep_runs", nargs="+", metavar="RUN", help="whose task vectors (default: sku task_vector)")
    parser.add_argument(
        "--alpha_budget",
        type=positive_number,
        default=0.1,
        help="how much normal perplexity may rise for a recommended scale (default: 0.1)",
    )
    parser.add_argument(
        "--harm_category",
        action="append",
        default=[],
        help="train a task vector of this kind of harm alone (may be repeated)",
    )
    parser.add_argument(
        "--relearn_steps", type=whole_number, default=50, help="of the relearning check; 0: leave it out (default: 50)"
    )
    parser.add_argument(
        "--relearn_pairs", type=positive_int, default=16, help="harmful pairs that it relearns (default: 16)"
    )
    parser.add_argument(
        "--relearn_lr",
        type=positive_number,
        nargs=2,
        default=[3e-5, 1e-4],
        metavar=("SOFT", "STRONG"),
        help="its two rates (default: 3e-5 1e-4)",
    )
    parser.add_argument(
        "--train_flags", type=shlex.split, default=[], help="more flags for every training, as one quoted text"
    )
    add_measuring_flags(parser)
    args = parser.parse_args(arguments)
    training_flags(args.train_flags)  # says now what is wrong with them
    args.seeds = list(dict.fromkeys(args.seeds))
    if not all(getattr(args, f"n_{name}") for name in SETS):
        parser.error("the comparison needs prompts of all sets: give --n_seen, --n_unseen and --n_normal above 0")
    args.recipe = args.recipe or args.model_name
    if args.recipe not in RECIPES:
        known = ", ".join(RECIPES)
        parser.error(f"there is no recipe for {args.recipe}: add one to recipes.py, or give --recipe: {known}")
    known = runs_of(RECIPES[args.recipe])
    args.runs = args.runs or list(known)
    negating = [name for name, run in known.items() if METHODS[run.flags.get("method", "sku")].negates]
    args.sweep_runs = args.sweep_runs or [name for name in ("sku", "task_vector") if name in negating]
    for flag, given, choices in (("runs", args.runs, known), ("sweep_runs", args.sweep_runs, negating)):
        unknown = [name for name in given if name not in choices]
        if unknown:
            parser.error(f"--{flag} {' '.join(unknown)}: take from {', '.join(choices)}")
    return ComparisonSettings(**vars(args))


if __name__ == "__main__":
    sys.exit(exit_code(main))
