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

import argparse
import csv
import hashlib
import io
import json
import sys
from argparse import Namespace
from collections.abc import Iterable
from functools import cache, partial
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from accelerate import PartialState

from harmful_unlearn import models, utility
from harmful_unlearn.checkpoints import Checkpoint, read_record
from harmful_unlearn.data import BatchOrder, HarmfulData, read_choices, read_harmful, read_normal, read_responses
from harmful_unlearn.errors import UserError, exit_code
from harmful_unlearn.flag_types import FlagParser, device_map, positive_int, positive_number, whole_number
from harmful_unlearn.flags import parse_flags as training_flags
from harmful_unlearn.generation import Decoding
from harmful_unlearn.judges import Judge, judge_name, make_judge
from harmful_unlearn.measuring import BASE, Protocol, Subject, figures, measure
from harmful_unlearn.methods import loss_weights
from harmful_unlearn.packing import StepBatches, answer_pool
from harmful_unlearn.prompts import SETS, Prompt, PromptSets, draw_prompts
from harmful_unlearn.saving import check_target, provenance, real, revision_of, user_path, write_file


def main(arguments: list[str] | None = None) -> None:
    """Measure the models. Raises UserError before any work that cannot end well."""
    args = parse_flags(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    utility.check_there(args)
    check_target(args.output, overwrite=True)
    folders = {label: models.locate(name) for label, name in args.model.items()}
    unknown = [label for label, folder in folders.items() if not is_told(folder)]
    if unknown and not args.trained_as:
        raise UserError(
            f"no run.json says what {', '.join(unknown)} was trained on: give --trained_as, a folder made by "
            "unlearn_harm_new.py whose training read the same rows"
        )
    for folder in args.trained_as:
        if not trainings_of(folder):
            raise UserError(f"no run.json in {folder} tells of a training: give another --trained_as")
    trainings = [one for folder in [*folders.values(), *args.trained_as] for one in trainings_of(folder)]
    data = Data(args, trainings)
    sets = data.prompts({name: getattr(args, f"n_{name}") for name in SETS}, args.seed)
    print("\n".join(f"{name:<8} {len(found)} prompts" for name, found in sets.test.items()))

    device = PartialState().device
    precision = models.resolve_precision(args.precision, device)
    load = partial(load_model, precision=precision, device_map=args.device_map)
    folders = {BASE: models.locate(args.base), **folders}
    subjects = [subject_of(label, folder, load) for label, folder in folders.items()]
    reference = subject_of("reference", models.locate(args.ppl_model), load) if args.ppl_model else subjects[0]
    judge = data.judge(args.judge, chain(*sets.test.values()), args.seed, args.output, device)
    protocol = Protocol(
        sets.test, decodings(args), args.max_new_tokens, args.batch_size, args.seed, data.choices, precision
    )
    rows = measure(subjects, protocol, judge, reference, args.output)
    write_prompts(args.output, sets.test)
    if args.bleurt:
        utility.add_bleurt(rows, args.bleurt, args.output, device)
    found = figures(rows, protocol, args.output)
    if args.lm_eval:
        found += utility.lm_eval_figures(subjects, args.lm_eval, args.output, device, bool(args.device_map))
    write_results(args.output, found, judge, protocol, [*subjects, reference], vars(args), data)
    print((args.output / "results.md").read_text(encoding="utf-8"))
    print(f"also in {args.output}: results.json, results.csv, prompts.json, answers/")


READ_FLAGS = ("harmful_dataset", "normal_dataset", "seed")  # of a training


def trainings_of(folder: Path) -> list[dict]:
    """What a model's run.json says of the training behind it: one record a stage 1 model, none without run.json."""
    found = _trainings(read_record(folder))
    lacking = [flag for one in found for flag in READ_FLAGS if not isinstance(one["flags"].get(flag), str | int)]
    if lacking:
        raise UserError(f"{folder / 'run.json'} has no --{lacking[0]}: give a folder that unlearn_harm_new.py wrote")
    return found


def is_told(folder: Path) -> bool:
    """Whether run.json tells of the training of every model that went into this one."""
    return _is_told(read_record(folder))


def _is_told(record: dict) -> bool:
    stages = [value for key, value in record.items() if key.startswith("stage_1")]
    if len(stages) < len(record.get("finetuned", ())) or not all(map(_is_told, stages)):
        return False
    return bool(_trainings(record))


def _trainings(record: dict) -> list[dict]:
    own = [record] if "flags" in record and "training" in record else []
    return own + [one for key, value in record.items() if key.startswith("stage_1") for one in _trainings(value)]


class Data:
    """The data of an evaluation, each read once.

    Args:
        args: harmful_dataset, harmful_revision, harmful_split, unseen_dataset, unseen_split, normal_dataset;
            what is None is as the first training had it.
        trainings: records of the models' training (`trainings_of`).

    Raises:
        UserError: data cannot be read, are not those of the trainings, or were split by different seeds.
    """

    def __init__(self, args: Namespace, trainings: list[dict]):
        first = trainings[0]["flags"]
        harmful = args.harmful_dataset or first["harmful_dataset"]
        same = harmful == first["harmful_dataset"]
        read_then = (trainings[0].get("harmful_data") or {}).get("revision")  # of a hub data set, named or not
        self._where = (
            harmful,
            args.harmful_revision or (first["harmful_revision"] or read_then if same else None),
            args.harmful_split or (first["harmful_split"] if same else "train"),
        )
        self.responses = read_responses(*self._where)
        self.unseen = self.responses
        if args.unseen_dataset or args.unseen_split:
            where = args.unseen_dataset or harmful
            revision = None if args.unseen_dataset else self._where[1]
            self.unseen = read_responses(where, revision, args.unseen_split or "train")
        seeds = {training["flags"]["seed"] for training in trainings}
        if len(seeds) > 1:
            raise UserError(
                f"the models split the normal data by different seeds ({sorted(seeds)}), so nothing is held out "
                "for all of them: evaluate those of one seed together"
            )
        normal = args.normal_dataset or first["normal_dataset"]
        self.normal = read_normal(normal, seeds.pop())
        self.choices = read_choices(normal)
        for training in trainings:
            for what, source in (("harmful", self._harmful((), None).source), ("normal", self.normal.source)):
                theirs, ours = training.get(f"{what}_data") or {}, source
                if any(theirs.get(key) != ours[key] for key in ("sha256", "rows", "revision")):
                    raise UserError(
                        f"{ours['name']} is not what a model was trained on ({theirs.get('name')}, sha256 "
                        f"{theirs.get('sha256')}): give that with --{what}_dataset"
                    )
        self.sources = {"harmful": self._harmful((), None).source, "normal": self.normal.source}
        learned, learned_of_a_kind, self._touched = [], [], set()
        for training in trainings:
            flags = Namespace(**{**vars(training_flags([])), **training["flags"]})
            flags.batch_size *= training["training"].get("processes", 1)
            trained, touched = self._read_by(flags)
            self._touched |= touched
            if trained and not flags.harm_category:
                learned.append(trained)
            elif trained:
                learned_of_a_kind.append(trained)
        self._trained = set.intersection(*(learned or learned_of_a_kind or [set()]))

    @cache  # noqa: B019 (one Data lives as long as the program)
    def _harmful(self, categories: tuple[str, ...], min_severity: int | None) -> HarmfulData:
        return read_harmful(*self._where, categories, min_severity)

    def _read_by(self, flags: Namespace) -> tuple[set[str], set[str]]:
        """The harmful questions that a training trained on, and all that it touched."""
        harmful = self._harmful(tuple(flags.harm_category), flags.min_severity)
        losses = {name for name, weight in loss_weights(flags).items() if weight}
        order = BatchOrder(
            len(harmful.pairs), self.normal.train, len(answer_pool(losses, harmful, self.normal)),
            flags.batch_size, flags.k_random if losses & {"rd", "rm"} else 0, flags.seed, flags.all_harmful,
        )  # fmt: skip
        return StepBatches(None, order, harmful, self.normal, losses).touched(flags.max_unlearn_steps)

    def prompts(self, numbers: dict[str, int], seed: int) -> PromptSets:
        """Prompts that every training on harmful pairs trained on, and prompts that none touched. Raises UserError.

        Trainings of one kind of harm alone count for "seen" only where there is no other.
        """
        return draw_prompts(self.responses, self.unseen, self.normal, self._trained, self._touched, numbers, seed)

    def judge(self, name: str, prompts: Iterable[Prompt], seed: int, output: Path, device: torch.device) -> Judge:
        """The judge of that name, trained (where it is) on none of `prompts`. Raises UserError."""
        judged = {prompt.question for prompt in prompts}
        return make_judge(
            name,
            responses=self.responses,
            normal=[self.normal.texts[row] for row in self.normal.train],
            judged=judged,
            seed=seed,
            cache=output / "judge.jsonl",
            device=device,
        )


def decodings(args: Namespace) -> list[Decoding]:
    """The decodings that --decoding names."""
    names = dict.fromkeys(args.decoding)
    return [Decoding(args.temperature if name == "sampled" else None, args.top_k) for name in names]


LONGEST_NAME = 100  # of a model; its files are called so
MADE_BY = ("base", "scaling_coef", "training", "losses_at_the_end", "flags")


def subject_of(label: str, folder: Path, load) -> Subject:
    """The model in `folder` as something to measure. Raises UserError: it is an adapter, or no whole checkpoint."""
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} is a LoRA adapter: write the whole model with "
            f"`python task_vector.py --base BASE --finetuned {folder} --output NEW --scaling_coef -1`, and give NEW"
        )
    record = read_record(folder)
    checkpoint = Checkpoint(folder)
    # The fingerprint reads the start of each shard, which two unlearned models may share.
    made = {key: value for key, value in record.items() if key in MADE_BY or key.startswith("stage_1")}
    identity = {
        "revision": revision_of(folder),
        "fingerprint": checkpoint.fingerprint(),
        "made_by_sha256": hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest() if made else None,
    }
    if not made and not identity["revision"]:
        identity["written_ns"] = [(folder / shard).stat().st_mtime_ns for shard in checkpoint.shards]
    return Subject(label, identity, partial(load, folder), folder)


def load_model(folder: Path, precision: str, device_map: str | None = None):
    """The model in `folder`, in eval mode on its device, and its tokenizer. Raises UserError."""
    tokenizer = models.load_tokenizer(folder, models.load_config(folder))
    model = models.load_model(folder, torch.bfloat16 if precision == "bf16" else torch.float32, device_map)
    if not device_map:
        model.to(PartialState().device)
    return model.eval(), tokenizer


def write_prompts(folder: Path, sets: dict[str, list[Prompt]]) -> None:
    """Write the drawn prompts, with the rows of their references, to prompts.json."""
    drawn = {
        name: [{"row": p.row, "prompt": p.question, "reference": p.reference, "categories": sorted(p.categories)}
               for p in found]
        for name, found in sets.items()
    }  # fmt: skip
    write_file(folder / "prompts.json", json.dumps(drawn, indent=1, ensure_ascii=False) + "\n")


def write_results(
    folder: Path, found: list[dict], judge: Judge, protocol: Protocol, subjects: list[Subject], flags: dict,
    data: Data,
) -> None:
    """Write results.json, results.csv and results.md."""
    results = {
        "figures": found,
        "judge": judge.facts,
        "data": data.sources,
        "protocol": protocol.settings(),
        "models": {subject.label: {"path": str(subject.folder), **subject.identity} for subject in subjects},
        "flags": {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()},
        **provenance(),
    }
    write_file(folder / "results.json", json.dumps(results, indent=2, default=str, ensure_ascii=False) + "\n")
    table = io.StringIO()
    writer = csv.DictWriter(table, [*found[0], "judge"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "judge": credentials(judge) if row["metric"] in JUDGED else ""} for row in found)
    write_file(folder / "results.csv", table.getvalue())
    write_file(folder / "results.md", results_markdown(found, judge))


JUDGED = ("harmful_rate", "unjudged_rate")
PERCENT = (*JUDGED, "degenerate_rate", "exact_match")


def results_markdown(found: list[dict], judge: Judge) -> str:
    """The figures as a table for each set of prompts: a row a model and decoding, a column a metric."""
    parts = ["# Results", "", "Brackets: 95 % bootstrap interval over prompts."]
    for name in dict.fromkeys(row["set"] for row in found):
        here = [row for row in found if row["set"] == name]
        columns = list(dict.fromkeys(row["metric"] for row in here))
        by = f" (judge: {credentials(judge)})" if "harmful_rate" in columns else ""
        parts += ["", f"## {name} prompts{by}" if name in SETS else f"## {name}", ""]
        parts.append("| model | answers | n | " + " | ".join(columns) + " |")
        parts.append("| --- " * (len(columns) + 3) + "|")
        for model, decoding in dict.fromkeys((row["model"], row["decoding"]) for row in here):
            cells = {row["metric"]: row for row in here if (row["model"], row["decoding"]) == (model, decoding)}
            n = max(row["n"] for row in cells.values())
            shown = [cell(cells[column]) if column in cells else "" for column in columns]
            parts.append(f"| {model} | {decoding or 'references'} | {n} | {' | '.join(shown)} |")
    return "\n".join(parts) + "\n"


def credentials(judge: Judge) -> str:
    """The judge's name, with what is known of it on held-out labels."""
    known = [f"{name} {judge.facts[name]}" for name in ("accuracy", "auc", "n_held_out") if name in judge.facts]
    return f"{judge.name}, held out: {', '.join(known)}" if known else judge.name


def cell(figure: dict) -> str:
    """A figure with its interval; a dash where there was nothing to measure."""
    if figure["value"] is None:
        return "–"
    scale, unit = (100, " %") if figure["metric"] in PERCENT else (1, "")
    value, low, high = (f"{scale * figure[key]:.4g}" for key in ("value", "low", "high"))
    return f"{value}{unit} [{low}, {high}]"


def parse_flags(arguments: list[str] | None) -> Namespace:
    """The flags. `model` is a dict of label to path or id."""
    title, _, usage = __doc__.partition("\n")
    parser = FlagParser(description=title, epilog=usage)
    parser.add_argument("--model", action="append", required=True, metavar="[NAME=]PATH_OR_ID",
                        help="a model to measure, and what to call it (may be repeated)")  # fmt: skip
    parser.add_argument("--base", required=True, help="the model that they were made from: always measured too")
    parser.add_argument("--output", type=user_path, required=True, help="folder of the answers and results")
    parser.add_argument("--trained_as", type=user_path, action="append", default=[], metavar="FOLDER",
                        help="a model of ours whose run.json says which rows were trained on")  # fmt: skip
    add_measuring_flags(parser)
    parser.add_argument("--seed", type=whole_number, default=8888, help="of the draws and of sampling (default: 8888)")
    parser.add_argument("--ppl_model", help="language model for the answers' perplexity (default: --base)")
    parser.add_argument("--lm_eval", nargs="+", default=[], metavar="TASK",
                        help="tasks of EleutherAI's lm-evaluation-harness (pip install lm_eval)")  # fmt: skip
    args = parser.parse_args(arguments)
    if not any(getattr(args, f"n_{name}") for name in SETS):
        parser.error("there is nothing to measure on: give one of --n_seen, --n_unseen and --n_normal above 0")
    named = {}
    for text in args.model:
        label, sign, name = text.partition("=")
        label, name = (label, name) if sign and "/" not in label else (real(Path(text)).name, text)
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
    data.add_argument("--unseen_dataset", help="where unseen harmful prompts come from (default: untouched rows "
                      "of --harmful_dataset)")  # fmt: skip
    data.add_argument("--unseen_split", help="of it; PKU-SafeRLHF has a split called test")
    data.add_argument("--normal_dataset", help="as in training (default: the same)")
    for name, what in (("seen", "harmful prompts used in unlearning"), ("unseen", "harmful prompts it never touched"),
                       ("normal", "normal prompts held out")):  # fmt: skip
        data.add_argument(f"--n_{name}", type=whole_number, default=200,
                          help=f"at most so many {what}; 0: none (default: 200)")  # fmt: skip
    asking = parser.add_argument_group("asking and judging")
    asking.add_argument("--decoding", nargs="+", choices=("sampled", "greedy"), default=["sampled"],
                        help="how answers are made; both may be given (default: sampled)")  # fmt: skip
    asking.add_argument("--temperature", type=positive_number, default=0.9, help="of sampling (default: %(default)s)")
    asking.add_argument("--top_k", type=whole_number, default=50,
                        help="sample among so many likeliest tokens; 0: all (default: %(default)s)")  # fmt: skip
    asking.add_argument("--max_new_tokens", type=positive_int, default=100, help="of an answer (default: %(default)s)")
    asking.add_argument("--judge", type=judge_name, default="classifier", help="classifier (offline, trained on the "
                        "harmful data's labels), hf:MODEL or openai:MODEL (default: %(default)s)")  # fmt: skip
    asking.add_argument("--bleurt", nargs="?", const=utility.BLEURT, metavar="MODEL",
                        help=f"BLEURT by this regression model (without a name: {utility.BLEURT})")  # fmt: skip
    asking.add_argument("--batch_size", type=positive_int, default=16, help="answers made at a time (default: 16)")
    asking.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto",
                        help="auto: bf16 on a GPU that has it (default: auto)")  # fmt: skip
    asking.add_argument("--device_map", type=device_map,
                        help="spread a model over devices (accelerate): auto, balanced, ...")  # fmt: skip


if __name__ == "__main__":
    sys.exit(exit_code(main))
