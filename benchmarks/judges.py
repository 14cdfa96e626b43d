"""How well judges do on answers that somebody has read and labelled.

    python benchmarks/judges.py --labels docs/claims/labels.csv --answers logs/O/seed-0/evaluation \
        --harmful_dataset PKU-Alignment/PKU-SafeRLHF --normal_dataset TruthfulQA.csv \
        --judge classifier finetuned:HuggingFaceTB/SmolLM2-135M-Instruct

LABELS has an answer a line: the sha256 of its question, a line break and the answer (so that no harmful text is passed
on), the model that gave it, and its label: harmful; refused; safe (it fits the question and does no harm); nonsense.
ANSWERS are folders of evaluation.py or reproduce.py that hold these answers. Of the labels only "harmful" is one that a
judge should call harmful, and only "refused" one that a judge of refusals should call a refusal. No judge learns from
the questions here.
"""

import argparse
import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
import torch

from benchmarks import measuring
from harmful_unlearn.cli.flag_parser import FlagParser
from harmful_unlearn.cli.running import exit_code
from harmful_unlearn.data.pku_saferlhf import read_responses
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.data.truthfulqa import read_normal
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.files.answers import read_answers
from harmful_unlearn.evals.judges.labelled import LabelledAnswer, measured
from harmful_unlearn.evals.judges.registry import judge_name, make_judge, make_refusal_judge, refusal_judge_name
from harmful_unlearn.evals.metrics.figures import UNSURE
from harmful_unlearn.storage.files import user_path

LABELS = ("harmful", "refused", "safe", "nonsense")


def main() -> None:
    """Judge the labelled answers and print the tables. Raises UserError: a file does not fit the others."""
    args = parse_flags()
    labels = read_labels(args.labels)
    texts = {digest(pair): pair for pair in answers_in(args.answers)}
    found = labels[labels["sha256"].isin(texts)].copy()
    if found.empty:
        raise UserError(f"none of the answers in {args.labels} is in {' '.join(map(str, args.answers))}")
    pairs = [texts[key] for key in found["sha256"]]
    print(f"{len(found)} of {len(labels)} labelled answers found\n")
    responses = read_responses(args.harmful_dataset, None, args.harmful_split)
    normal = read_normal(args.normal_dataset, seed=0)
    quality, called = [], []
    for name in args.judge:
        judge = make_judge(
            name,
            responses=responses,
            normal=normal.texts,
            judged={pair.question for pair in pairs},
            seed=0,
            cache=args.cache,
            device=torch.device(args.device),
        )
        verdicts = judge.judge(pairs)
        scores = np.array([np.nan if verdict.score is None else verdict.score for verdict in verdicts])
        harmful = (found["label"] == "harmful").tolist()
        rows = [LabelledAnswer(pair.question, pair.answer, bad) for pair, bad in zip(pairs, harmful, strict=True)]
        figures = measured(rows, scores)
        unsure = np.mean(abs(scores - 0.5) <= UNSURE)
        quality.append([name, figures["n_held_out"], *(figures[key] for key in ("accuracy", "auc")), f"{unsure:.0%}"])
        quality[-1] += [judge.facts.get("accuracy"), judge.facts.get("auc")]
        found[name] = [bool(verdict.yes) for verdict in verdicts]
    for name in args.refusal_judge:
        judge = make_refusal_judge(name, args.cache, torch.device(args.device))
        found[f"refusals, {name}"] = [bool(verdict.yes) for verdict in judge.judge(pairs)]
    refusals = [f"refusals, {name}" for name in args.refusal_judge]
    for kind in LABELS:
        part = found[found["label"] == kind]
        called.append(
            [kind, len(part), *(f"{part[name].mean():.0%}" if len(part) else "–" for name in [*args.judge, *refusals])]
        )
    by_model = []
    for model, part in found.groupby("model", sort=False):
        shares = [(part["label"] == kind).mean() for kind in LABELS] + [part[name].mean() for name in args.judge]
        by_model.append([model, len(part), *(f"{share:.0%}" for share in shares)])
    header = ["judge", "n", "accuracy", "AUC", "unsure", "accuracy on the data's labels", "AUC on them"]
    print(measuring.table(header, quality), end="\n\n")
    titles = [*(f"{name} calls harmful" for name in args.judge), *refusals]
    print(measuring.table(["label", "n", *titles], called), end="\n\n")
    print(measuring.table(["model", "n", *LABELS, *(f"{name} calls harmful" for name in args.judge)], by_model))


def digest(pair: Pair) -> str:
    """What names an answer in the labels."""
    return hashlib.sha256(f"{pair.question}\n{pair.answer}".encode()).hexdigest()


def answers_in(folders: list[Path]) -> list[Pair]:
    """All answers that evaluations have kept."""
    files = [file for folder in folders for file in sorted((folder / "answers").glob("*.jsonl"))]
    return [Pair(row["prompt"], row["answer"]) for file in files for row in read_answers(file)]


def read_labels(file: Path) -> pd.DataFrame:
    """Columns "sha256", "model" and "label". Raises UserError: it is not such a file."""
    try:
        labels = pd.read_csv(file, dtype=str)
        unknown = set(labels["label"]) - set(LABELS)
        labels = labels[["sha256", "model", "label"]]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file} is no table with the columns sha256, model and label ({error})") from None
    if unknown:
        raise UserError(f"{file} has the labels {', '.join(map(str, unknown))}: use {', '.join(LABELS)}")
    return labels


def parse_flags() -> argparse.Namespace:
    title, _, usage = (__doc__ or "").partition("\n")
    parser = FlagParser(description=title, epilog=usage)
    parser.add_argument("--labels", type=user_path, required=True, help="a table of labelled answers")
    parser.add_argument("--answers", type=user_path, nargs="+", required=True, help="folders of evaluations")
    parser.add_argument("--harmful_dataset", required=True, help="whose labels the judges learn from")
    parser.add_argument("--harmful_split", default="train", help="of it (default: train)")
    parser.add_argument("--normal_dataset", required=True, help="normal answers, safe ones")
    parser.add_argument("--judge", type=judge_name, nargs="+", default=["classifier"], help="as evaluation.py's")
    parser.add_argument(
        "--refusal_judge", type=refusal_judge_name, nargs="+", default=["phrases"], help="as that one's"
    )
    parser.add_argument("--cache", type=user_path, default=Path("logs/judges/server.jsonl"), help="of openai: verdicts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(exit_code(main))
