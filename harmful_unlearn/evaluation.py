"""Measure models as the paper does: harmful rate, perplexity and utility, beside the base.

    python harmful_unlearn/evaluation.py --model models/opt-2.7b-unlearned --base facebook/opt-2.7b --output logs/eval
Several models, named, judged by a language model behind an OpenAI-compatible server (OPENAI_BASE_URL, OPENAI_API_KEY):
    python harmful_unlearn/evaluation.py --model sku=models/a --model ga=models/b --base facebook/opt-2.7b \\
        --judge openai:gpt-4o-mini --output logs/eval
Greedy answers to 50 prompts of each kind, and TruthfulQA by the evaluation harness (pip install lm_eval):
    python harmful_unlearn/evaluation.py --model models/a --base B --decoding greedy --n_seen 50 --n_unseen 50 \\
        --n_normal 50 --lm_eval truthfulqa_mc1 --output logs/eval

What the models were trained on is read from their run.json: harmful prompts that were used, prompts of which no
row was touched, and TruthfulQA questions of which no text was trained on. The answers stay in OUTPUT/answers, so
an interrupted run goes on where it stopped, and another judge needs no new answers.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from argparse import Namespace
from functools import partial
from itertools import chain

import transformers
from accelerate import PartialState

from harmful_unlearn.cli import FlagParser, device_map, exit_code, positive_int, positive_number, whole_number
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals import bleurt, lm_harness
from harmful_unlearn.evals.evaluated_model import BASE, evaluated_model, load_model
from harmful_unlearn.evals.evaluator import EvalProtocol, figures, measure
from harmful_unlearn.evals.generation import Decoding
from harmful_unlearn.evals.judges.registry import judge_name
from harmful_unlearn.evals.prompt_sets import SETS, EvalData
from harmful_unlearn.evals.results import write_prompts, write_results
from harmful_unlearn.models import hub, loading
from harmful_unlearn.storage.files import check_target, resolved, user_path
from harmful_unlearn.storage.run_record import RunRecord, read_trainings


def main(arguments: list[str] | None = None) -> None:
    """Measure the models. Raises UserError before any work that cannot end well."""
    args = parse_flags(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    lm_harness.check_installed(args)
    check_target(args.output, overwrite=True)
    folders = {label: hub.resolve_model(name) for label, name in args.model.items()}
    unknown = [label for label, folder in folders.items() if not RunRecord.read(folder).is_complete]
    if unknown and not args.trained_as:
        raise UserError(
            f"no run.json says what {', '.join(unknown)} was trained on: give --trained_as, a folder made by "
            "unlearn_harm_new.py whose training read the same rows"
        )
    for folder in args.trained_as:
        if not read_trainings(folder):
            raise UserError(f"no run.json in {folder} tells of a training: give another --trained_as")
    trainings = [one for folder in [*folders.values(), *args.trained_as] for one in read_trainings(folder)]
    data = EvalData(args, trainings)
    sets = data.prompts({name: getattr(args, f"n_{name}") for name in SETS}, args.seed)
    print("\n".join(f"{name:<8} {len(found)} prompts" for name, found in sets.test.items()))

    device = PartialState().device
    precision = loading.resolve_precision(args.precision, device)
    load = partial(load_model, precision=precision, device_map=args.device_map)
    folders = {BASE: hub.resolve_model(args.base), **folders}
    subjects = [evaluated_model(label, folder, load) for label, folder in folders.items()]
    reference = evaluated_model("reference", hub.resolve_model(args.ppl_model), load) if args.ppl_model else subjects[0]
    judge = data.judge(args.judge, chain(*sets.test.values()), args.seed, args.output, device)
    protocol = EvalProtocol(
        sets.test, decodings(args), args.max_new_tokens, args.batch_size, args.seed, data.choices, precision
    )
    rows = measure(subjects, protocol, judge, reference, args.output)
    write_prompts(args.output, sets.test)
    if args.bleurt:
        bleurt.add_bleurt(rows, args.bleurt, args.output, device)
    found = figures(rows, protocol, args.output)
    if args.lm_eval:
        found += lm_harness.lm_eval_figures(subjects, args.lm_eval, args.output, device, bool(args.device_map))
    write_results(args.output, found, judge, protocol, [*subjects, reference], vars(args), data)
    print((args.output / "results.md").read_text(encoding="utf-8"))
    print(f"also in {args.output}: results.json, results.csv, prompts.json, answers/")


def decodings(args: Namespace) -> list[Decoding]:
    """The decodings that --decoding names."""
    names = dict.fromkeys(args.decoding)
    return [Decoding(args.temperature if name == "sampled" else None, args.top_k) for name in names]


LONGEST_NAME = 100  # of a model; its files are called so


def parse_flags(arguments: list[str] | None) -> Namespace:
    """The flags. `model` is a dict of label to path or id."""
    title, _, usage = __doc__.partition("\n")
    parser = FlagParser(description=title, epilog=usage)
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="[NAME=]PATH_OR_ID",
        help="a model to measure, and what to call it (may be repeated)",
    )
    parser.add_argument("--base", required=True, help="the model that they were made from: always measured too")
    parser.add_argument("--output", type=user_path, required=True, help="folder of the answers and results")
    parser.add_argument(
        "--trained_as",
        type=user_path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="a model of ours whose run.json says which rows were trained on",
    )
    add_measuring_flags(parser)
    parser.add_argument("--seed", type=whole_number, default=8888, help="of the draws and of sampling (default: 8888)")
    parser.add_argument("--ppl_model", help="language model for the answers' perplexity (default: --base)")
    parser.add_argument(
        "--lm_eval",
        nargs="+",
        default=[],
        metavar="TASK",
        help="tasks of EleutherAI's lm-evaluation-harness (pip install lm_eval)",
    )
    args = parser.parse_args(arguments)
    if not any(getattr(args, f"n_{name}") for name in SETS):
        parser.error("there is nothing to measure on: give one of --n_seen, --n_unseen and --n_normal above 0")
    named = {}
    for text in args.model:
        label, sign, name = text.partition("=")
        label, name = (label, name) if sign and "/" not in label else (resolved(Path(text)).name, text)
        if not label or label == BASE or label in named or "/" in label or len(label) > LONGEST_NAME:
            parser.error(f"--model {text}: its name, {label!r}, is taken or names no file: give NAME=PATH_OR_ID")
        named[label] = name
    args.model = named
    return args


def add_measuring_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of data, prompts, generation and judging, which reproduce.py has too."""
    data = parser.add_argument_group("data and prompts")
    data.add_argument("--harmful_dataset", help="as in training (default: what the first model was trained on)")
    data.add_argument("--harmful_revision", help="of a hub data set (default: the same)")
    data.add_argument("--harmful_split", help="of a hub data set or folder (default: the same)")
    data.add_argument(
        "--unseen_dataset", help="where unseen harmful prompts come from (default: untouched rows of --harmful_dataset)"
    )
    data.add_argument("--unseen_split", help="of it; PKU-SafeRLHF has a split called test")
    data.add_argument("--normal_dataset", help="as in training (default: the same)")
    for name, what in (
        ("seen", "harmful prompts used in unlearning"),
        ("unseen", "harmful prompts it never touched"),
        ("normal", "normal prompts held out"),
    ):
        data.add_argument(
            f"--n_{name}", type=whole_number, default=200, help=f"at most so many {what}; 0: none (default: 200)"
        )
    asking = parser.add_argument_group("asking and judging")
    asking.add_argument(
        "--decoding",
        nargs="+",
        choices=("sampled", "greedy"),
        default=["sampled"],
        help="how answers are made; both may be given (default: sampled)",
    )
    asking.add_argument("--temperature", type=positive_number, default=0.9, help="of sampling (default: %(default)s)")
    asking.add_argument(
        "--top_k",
        type=whole_number,
        default=50,
        help="sample among so many likeliest tokens; 0: all (default: %(default)s)",
    )
    asking.add_argument("--max_new_tokens", type=positive_int, default=100, help="of an answer (default: %(default)s)")
    asking.add_argument(
        "--judge",
        type=judge_name,
        default="classifier",
        help="classifier (offline, trained on the "
        "harmful data's labels), hf:MODEL or openai:MODEL (default: %(default)s)",
    )
    asking.add_argument(
        "--bleurt",
        nargs="?",
        const=bleurt.BLEURT,
        metavar="MODEL",
        help=f"BLEURT by this regression model (without a name: {bleurt.BLEURT})",
    )
    asking.add_argument("--batch_size", type=positive_int, default=16, help="answers made at a time (default: 16)")
    asking.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="auto: bf16 on a GPU that has it (default: auto)",
    )
    asking.add_argument(
        "--device_map", type=device_map, help="spread a model over devices (accelerate): auto, balanced, ..."
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))
