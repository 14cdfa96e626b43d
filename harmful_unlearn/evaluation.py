"""Measure models as the paper does: harmful rate, perplexity and utility, beside the base.

    python harmful_unlearn/evaluation.py --model models/opt-2.7b-unlearned --base facebook/opt-2.7b --output logs/eval
Several named models, judged by a language model behind an OpenAI-compatible server (OPENAI_BASE_URL, OPENAI_API_KEY):
    python harmful_unlearn/evaluation.py --model sku=models/a --model ga=models/b --base facebook/opt-2.7b \\
        --judge openai:gpt-4o-mini --output logs/eval
Does it refuse what only looks harmful, and does it hold under attack?
    python harmful_unlearn/evaluation.py --model models/a --base B --prompts xstest --attacks prefill jailbreak \\
        --output logs/eval
Greedy answers to 50 prompts of each set, and TruthfulQA by the evaluation harness (pip install lm_eval):
    python harmful_unlearn/evaluation.py --model models/a --base B --decoding greedy --n_seen 50 --n_unseen 50 \\
        --n_normal 50 --lm_eval truthfulqa_mc1 --output logs/eval

What the models were trained on is read from their run.json: harmful prompts that were used, prompts none of whose
rows was touched, and TruthfulQA questions none of whose texts was trained on. The answers stay in OUTPUT/answers: an
interrupted run continues where it stopped, and another judge needs no new answers. The base's are kept in
logs/base_answers, too, so that other models can be measured later without asking the base again.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import harmful_unlearn.cli.before_imports  # noqa: F401

from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain

import transformers
from accelerate import PartialState

from harmful_unlearn.cli.flag_parser import FlagParser, flag
from harmful_unlearn.cli.flag_types import positive_int, whole_number
from harmful_unlearn.cli.running import exit_code
from harmful_unlearn.data.templates import TemplateChoice
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.evaluated_model import BASE, evaluated_model, load_model
from harmful_unlearn.evals.evaluator import measure
from harmful_unlearn.evals.files.results import write_attacks, write_prompts, write_results
from harmful_unlearn.evals.inference import vllm_backend
from harmful_unlearn.evals.metrics import bleurt, lm_harness
from harmful_unlearn.evals.metrics.figures import agreement, figures
from harmful_unlearn.evals.named_sets import check_named_sets, measure_named_sets
from harmful_unlearn.evals.prompt_sets import EvalData
from harmful_unlearn.evals.settings import MeasuringSettings
from harmful_unlearn.models import hub
from harmful_unlearn.models.loading import load_config
from harmful_unlearn.storage.files import ROOT, check_target, resolved, user_path
from harmful_unlearn.storage.lock import locked
from harmful_unlearn.storage.run_record import RunRecord, read_trainings

LONGEST_NAME = 100  # of a model, which is also the name of its files


def folder_or_none(text: str) -> Path | None:
    """A folder from a flag that also takes "none". Raises UserError: as `user_path`."""
    return None if text == "none" else user_path(text)


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(MeasuringSettings):
    """The flags of this command. Once parsed, `model` is label -> path or id."""

    model: dict[str, str] = flag(
        "a model to measure, and what to call it (may be repeated)",
        action="append",
        required=True,
        metavar="[NAME=]PATH_OR_ID",
    )
    base: str = flag("the model that they were made from: always measured, too", required=True)
    output: Path = flag("folder of the answers and results", type=user_path, required=True)
    trained_as: list[Path] = flag(
        "a model of ours whose run.json says which rows were trained on",
        type=user_path,
        action="append",
        default=[],
        metavar="FOLDER",
    )
    seed: int = flag("of the prompts drawn and of sampling", type=whole_number, default=8888)
    ppl_model: str | None = flag("language model for the answers' perplexity (default: --base)")
    backend: str = flag(
        "what makes the answers: hf (transformers) or vllm (pip install vllm; needs a CUDA GPU)",
        choices=("hf", "vllm"),
        default="hf",
    )
    base_answers: Path | None = flag(
        "where the base's answers are kept for later evaluations; none: nowhere (default: logs/base_answers)",
        type=folder_or_none,
        metavar="FOLDER",
        default=ROOT / "logs" / "base_answers",
    )
    lm_eval: list[str] = flag(
        "tasks of EleutherAI's lm-evaluation-harness (pip install lm_eval): names, or .yaml files of your own",
        nargs="+",
        default=[],
        metavar="TASK",
    )
    lm_eval_limit: int | None = flag("only the first N samples of each of them", type=positive_int, metavar="N")


def main(arguments: list[str] | None = None) -> None:
    """Measure the models. Raises UserError, before any work that cannot succeed."""
    settings = parse_flags(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if settings.bleurt:
        hub.resolve_model(settings.bleurt)
    if settings.lm_eval:
        lm_harness.check_usable(settings.lm_eval)
    if settings.backend == "vllm":
        vllm_backend.check_usable()
    check_target(settings.output, overwrite=True)
    with locked(settings.output):
        evaluate(settings)


def evaluate(settings: EvaluationSettings) -> None:
    """Measure the models. Raises UserError: as `main`."""
    output, seed = settings.output, settings.seed
    folders = {label: hub.resolve_model(name) for label, name in settings.model.items()}
    base_folder, trainings = hub.resolve_model(settings.base), trainings_of(folders, settings.trained_as)
    template = settings.template_of(trainings, base_folder)
    data = EvalData.read(settings, trainings)
    sets = settings.draw(data, seed)
    print("\n".join(f"{name:<8} {len(prompts)} prompts" for name, prompts in sets.test.items()))

    print(f"template {template.name}: {template.text!r}")

    device = PartialState().device
    protocol = replace(settings.protocol(sets, data, seed, template), backend=settings.backend)
    load = partial(load_model, precision=protocol.precision, device_map=settings.device_map, template=template.choice)
    base = evaluated_model(BASE, base_folder, load)
    models = [base, *(evaluated_model(label, folder, load) for label, folder in folders.items())]
    reference = base
    if settings.ppl_model:
        own = TemplateChoice("released" if template.name == "released" else "auto")  # in its own words
        load = partial(load, template=own)
        reference = evaluated_model("reference", hub.resolve_model(settings.ppl_model), load)
    named = settings.named_sets(data, seed)
    judged = (part.values() for part in (sets.test, *(one.prompts for one in named)))
    judge = settings.make_judge(data, chain.from_iterable(judged), seed, output)
    refusal_judge = settings.make_refusal_judge(output)
    attacks = settings.attacked(protocol, data, load_config(base_folder), template)
    check_named_sets(named, protocol, load_config(base_folder), template)
    relevance_judge = settings.make_relevance_judge(data, sets.test.values(), seed, output, base)
    judges = (refusal_judge, relevance_judge)
    rows = measure(models, protocol, judge, reference, output, settings.base_answers, *judges)
    further = measure_named_sets(
        named, models, protocol, judge, refusal_judge, output / "prompts", settings.base_answers
    )
    if attacks:
        attacked, relearned = attacks.measure(models, rows, judge, reference, output / "attacks", settings.base_answers)
    write_prompts(output, sets.test)
    if settings.bleurt:
        bleurt.add_bleurt(rows, settings.bleurt, output, device)
    results = figures(rows, protocol, output) + further
    if settings.lm_eval:
        harness = (settings.lm_eval, output, device, settings.lm_eval_limit, bool(settings.device_map))
        results += lm_harness.lm_eval_figures(models, *harness)
    write_results(
        output,
        results,
        judge=judge,
        refusal_judge=refusal_judge,
        relevance_judge=relevance_judge,
        protocol=protocol,
        models=[*models, reference],
        flags=asdict(settings),
        sources={**data.sources, "prompts": {one.name: one.source for one in named}},
        agreement=agreement(rows),
    )
    print((output / "results.md").read_text(encoding="utf-8"))
    if attacks:
        write_attacks(output, attacked, relearned, judge)
        print((output / "attacks.md").read_text(encoding="utf-8"))
    print(f"also in {output}: results.json, results.csv, prompts.json, answers/")


def trainings_of(models: dict[str, Path], trained_as: list[Path]) -> list[RunRecord]:
    """The stage 1 runs behind the models (label -> folder), and those that --trained_as names.

    Raises:
        UserError: it is not recorded what a model was trained on.
    """
    unknown = [label for label, folder in models.items() if not RunRecord.read(folder).is_complete]
    if unknown and not trained_as:
        raise UserError(
            f"no run.json says what {', '.join(unknown)} was trained on: give --trained_as, a folder made by "
            "unlearn_harm_new.py whose training read the same rows"
        )
    for folder in trained_as:
        if not read_trainings(folder):
            raise UserError(f"no run.json in {folder} records a training: give another --trained_as")
    return [training for folder in [*models.values(), *trained_as] for training in read_trainings(folder)]


def parse_flags(arguments: list[str] | None) -> EvaluationSettings:
    """The flags."""
    title, _, usage = __doc__.partition("\n")
    parser = FlagParser(description=title, epilog=usage)
    parser.add_settings(EvaluationSettings)
    args = parser.parse_args(arguments)
    if args.backend == "vllm" and args.utility_dataset:  # the base's answers are scored before vLLM makes them
        parser.error("--utility_dataset needs --backend hf")
    if not (args.n_seen or args.n_unseen or args.n_normal or (args.utility_dataset and args.n_utility)):
        parser.error("there is nothing to measure on: give one of --n_seen, --n_unseen and --n_normal above 0")
    models: dict[str, str] = {}
    for text in args.model:
        label, sign, name = text.partition("=")
        if not sign or "/" in label:
            label, name = resolved(Path(text)).name, text
        if not label or label == BASE or label in models or "/" in label or len(label) > LONGEST_NAME:
            parser.error(f"--model {text}: its name, {label!r}, is taken or cannot name a file: give NAME=PATH_OR_ID")
        models[label] = name
    return parser.settings(EvaluationSettings, {**vars(args), "model": models})


if __name__ == "__main__":
    sys.exit(exit_code(main))
