"""Measuring models: their answers, scores and verdicts, kept in a folder so that nothing is done twice.

    answers/MODEL.jsonl   an answer a line: prompt, answer, perplexity, verdict
    scores/MODEL.json     the model's cross-entropy of the reference answers, and MC1/MC2
    protocol.json         what decided them: prompts, decodings, lengths, seed, the models' fingerprints

Figures are computed from these files alone.
"""

import gc
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.data.truthfulqa import Choices
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals import metrics
from harmful_unlearn.evals.evaluated_model import BASE, EvaluatedModel
from harmful_unlearn.evals.generation import Decoding, answer_nll, check_room, generate
from harmful_unlearn.evals.judges.base import Judge
from harmful_unlearn.evals.metrics import Estimate
from harmful_unlearn.evals.prompt_sets import Prompt
from harmful_unlearn.models.loading import context_length
from harmful_unlearn.storage.files import read_json, write_file


@dataclass(frozen=True)
class EvalProtocol:
    """How models are measured.

    Attributes:
        prompts: by set; "normal" is the one whose answers are compared with references.
        decodings: one answer each to every prompt.
        choices: TruthfulQA's multiple choices by question; empty for no MC1 and MC2.
    """

    prompts: dict[str, list[Prompt]]
    decodings: list[Decoding]
    max_new_tokens: int
    batch_size: int
    seed: int
    choices: dict[str, Choices]
    precision: str = "fp32"

    def settings(self) -> dict:
        """What decides the answers, JSON-able; the prompts by their rows and a hash."""
        texts = json.dumps([[p.question, p.reference] for found in self.prompts.values() for p in found])
        return {
            "decodings": [{"name": one.name, **asdict(one)} for one in self.decodings],
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "precision": self.precision,
            "multiple_choice": bool(self.choices),
            "rows": {name: [prompt.row for prompt in found] for name, found in self.prompts.items()},
            "prompts_sha256": hashlib.sha256(texts.encode()).hexdigest(),
        }


def measure(
    subjects: list[EvaluatedModel], protocol: EvalProtocol, judge: Judge, reference: EvaluatedModel, folder: Path
) -> dict[str, list[dict]]:
    """Answers, perplexities and verdicts of every model, from `folder` as far as they are there.

    Args:
        reference: the language model under which answers have their perplexity.

    Returns:
        By label, the rows of its answers file.

    Raises:
        UserError: the folder holds answers to other prompts, in other settings, or of another model.
    """
    record = _check_protocol(subjects, protocol, reference, folder)
    rows = {}
    for subject in subjects:
        file, scores = _answers_file(folder, subject.label), _scores_file(folder, subject.label)
        found = read_answers(file)
        if len(found) < _answers_wanted(protocol) or not scores.exists():
            model, tokenizer = subject.load()
            questions = [prompt.question for prompts in protocol.prompts.values() for prompt in prompts]
            check_room(model, tokenizer, questions, protocol.max_new_tokens)
            write_file(_protocol_file(folder), record)  # before the first answer, and after all that refuses a model
            found = _answer(model, tokenizer, subject.label, protocol, found, file)
            if not scores.exists():
                write_file(scores, json.dumps(_score(model, tokenizer, protocol)))
            del model
            _free()
        rows[subject.label] = found

    lacking = [label for label in rows if any("nll" not in row for row in rows[label])]
    if lacking:
        model, tokenizer = reference.load()
        collator = _collator(model, tokenizer)
        for label in lacking:
            pairs = [Pair(row["prompt"], row["answer"]) for row in rows[label]]
            scored = answer_nll(model, collator, pairs, protocol.batch_size, f"perplexity of {label}'s answers")
            for row, (nll, tokens) in zip(rows[label], scored, strict=True):
                row |= {"nll": nll, "tokens": tokens, "perplexity": float(np.exp(nll / tokens)) if tokens else None}
            write_answers(folder, label, rows[label])
        del model
        _free()

    # Another judge of the same name (other labels, another server) judges anew.
    judge_id = f"{judge.name} {hashlib.sha256(json.dumps(judge.facts, sort_keys=True).encode()).hexdigest()[:16]}"
    for label, found in rows.items():
        unjudged = [row for row in found if row.get("judge") != judge_id or row["verdict"] == "unjudged"]
        unjudged = [row for row in unjudged if row["set"] != "normal"]
        broken = {id(row): metrics.degenerate(row["answer"]) for row in unjudged}
        asked = [row for row in unjudged if not broken[id(row)]]
        verdicts = judge.judge([Pair(row["prompt"], row["answer"]) for row in asked]) if asked else []
        for row in unjudged:
            row |= {"judge": judge_id, "verdict": "degenerate", "score": None, "note": broken[id(row)]}
        for row, verdict in zip(asked, verdicts, strict=True):
            word = {True: "harmful", False: "safe", None: "unjudged"}[verdict.harmful]
            row |= {"verdict": word, "score": verdict.score, "note": verdict.note}
        normal = [row for row in found if row["set"] == "normal" and "verdict" not in row]
        for row in normal:
            reason = metrics.degenerate(row["answer"])
            row |= {"verdict": "degenerate" if reason else "answered", "note": reason or ""}
        if unjudged or normal:
            write_answers(folder, label, found)
    return rows


def figures(rows: dict[str, list[dict]], protocol: EvalProtocol, folder: Path) -> list[dict]:
    """Every figure: {"model", "set", "decoding", "metric", "value", "low", "high", "n"}.

    Shares are of 1; intervals are 95 % bootstrap intervals over prompts. Decoding is None for figures
    of reference answers under the model itself.
    """
    found = []

    def add(model: str, name: str, decoding: str | None, metric: str, figure: Estimate) -> None:
        found.append({"model": model, "set": name, "decoding": decoding, "metric": metric, **asdict(figure)})

    for label, answers in rows.items():
        for name in protocol.prompts:
            for decoding in (one.name for one in protocol.decodings):
                here = _of(answers, name, decoding)
                verdicts = [row["verdict"] for row in here]
                if name != "normal":
                    judged = [word != "unjudged" for word in verdicts]
                    harmful = [word == "harmful" for word in verdicts]
                    add(label, name, decoding, "harmful_rate", metrics.ratio(harmful, judged, protocol.seed))
                    unjudged = [not one for one in judged]
                    add(label, name, decoding, "unjudged_rate", metrics.mean(unjudged, protocol.seed))
                broken = [word == "degenerate" for word in verdicts]
                add(label, name, decoding, "degenerate_rate", metrics.mean(broken, protocol.seed))
                nll, tokens = [row["nll"] for row in here], [row["tokens"] for row in here]
                add(label, name, decoding, "answer_perplexity", metrics.perplexity(nll, tokens, protocol.seed))
                if name == "normal":
                    base = [row["answer"] for row in _of(rows[BASE], name, decoding)]
                    for metric, values in _utility(here, base).items():
                        add(label, name, decoding, metric, metrics.mean(values, protocol.seed))
        scores = json.loads(_scores_file(folder, label).read_text(encoding="utf-8"))
        for name in protocol.prompts:
            nll, tokens = zip(*scores[name], strict=True)
            add(label, name, None, "reference_perplexity", metrics.perplexity(nll, tokens, protocol.seed))
        if scores["choices"]:
            for metric, values in zip(("mc1", "mc2"), zip(*scores["choices"], strict=True), strict=True):
                add(label, "normal", None, metric, metrics.mean(values, protocol.seed))
    return found


def _utility(rows: list[dict], base: list[str]) -> dict[str, list[float]]:
    measured = {
        "exact_match": [metrics.exact_match(row["reference"], row["answer"]) for row in rows],
        "rouge_reference": [metrics.rouge_l(row["reference"], row["answer"]) for row in rows],
        "rouge_base": [metrics.rouge_l(theirs, row["answer"]) for row, theirs in zip(rows, base, strict=True)],
    }
    for metric in ("bleurt_reference", "bleurt_base"):
        if all(metric in row for row in rows):
            measured[metric] = [row[metric] for row in rows]
    return measured


def _of(rows: list[dict], name: str, decoding: str) -> list[dict]:
    return sorted(
        (row for row in rows if row["set"] == name and row["decoding"] == decoding), key=lambda row: row["index"]
    )


def _score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, protocol: EvalProtocol) -> dict:
    """Cross-entropies of the reference answers by set, and [MC1, MC2] of the normal questions that have choices."""
    collator = _collator(model, tokenizer)
    scores: dict = {
        name: answer_nll(model, collator, [prompt.pair for prompt in found], protocol.batch_size, f"{name} references")
        for name, found in protocol.prompts.items()
    }
    asked = [p.question for p in protocol.prompts.get("normal", []) if p.question in protocol.choices]
    pairs = [
        Pair(question, answer)
        for question in asked
        for choices in (protocol.choices[question],)
        for answer in (choices.best, *choices.true, *choices.false)
    ]
    scores["choices"] = []
    if not asked:
        return scores
    logs = iter([-nll for nll, _ in answer_nll(model, collator, pairs, protocol.batch_size, "multiple choice")])
    for question in asked:
        choices = protocol.choices[question]
        best, *rest = (next(logs) for _ in range(1 + len(choices.true) + len(choices.false)))
        true, false = rest[: len(choices.true)], rest[len(choices.true) :]
        scores["choices"].append([metrics.mc1(best, false), metrics.mc2(true, false)])
    return scores


def _collator(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Collator:
    return Collator(tokenizer, "paper", context_length(model.config))


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    label: str,
    protocol: EvalProtocol,
    found: list[dict],
    file: Path,
) -> list[dict]:
    """The answers that `found` lacks, each batch appended to `file` as it is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, "".join(_line(row) for row in found))  # without a torn last line
    with (
        file.open("a", encoding="utf-8") as out,
        tqdm(total=_answers_wanted(protocol), initial=len(found), desc=f"{label} answers", unit="answer") as bar,
    ):
        for stream, (name, prompts) in enumerate(protocol.prompts.items()):
            for decoding in protocol.decodings:
                done = frozenset(row["index"] for row in _of(found, name, decoding.name))
                seed = int(np.random.SeedSequence([protocol.seed, stream]).generate_state(1)[0])
                questions = [prompt.question for prompt in prompts]
                for batch in generate(
                    model, tokenizer, questions, decoding, protocol.max_new_tokens, protocol.batch_size, seed, done
                ):
                    fresh = [
                        {
                            "model": label,
                            "set": name,
                            "decoding": decoding.name,
                            "index": answer.index,
                            "row": prompts[answer.index].row,
                            "prompt": questions[answer.index],
                            "reference": prompts[answer.index].reference,
                            "answer": answer.text,
                            "ended": answer.ended,
                        }
                        for answer in batch
                        if answer.index not in done
                    ]
                    out.write("".join(_line(row) for row in fresh))
                    out.flush()
                    found = found + fresh
                    bar.update(len(fresh))
    return found


def _answers_wanted(protocol: EvalProtocol) -> int:
    return len(protocol.decodings) * sum(map(len, protocol.prompts.values()))


def _check_protocol(
    subjects: list[EvaluatedModel], protocol: EvalProtocol, reference: EvaluatedModel, folder: Path
) -> str:
    """What decides the answers in `folder`, as it is remembered there; refuses to mix them with others."""
    file = _protocol_file(folder)
    wanted = {"settings": protocol.settings(), "reference": reference.identity, "models": {}}
    if file.exists():
        kept = read_json(file)
        wanted["models"] = kept["models"]
        differ = [name for name, value in wanted["settings"].items() if kept["settings"].get(name) != value]
        differ += ["the perplexity model"] * (kept["reference"] != reference.identity)
        differ += [s.label for s in subjects if kept["models"].get(s.label, s.identity) != s.identity]
        if differ:
            raise UserError(
                f"{folder} holds answers made otherwise ({', '.join(differ)}): give another --output, or remove it"
            )
    wanted["models"] = {**wanted["models"], **{subject.label: subject.identity for subject in subjects}}
    return json.dumps(wanted, indent=2) + "\n"


def _protocol_file(folder: Path) -> Path:
    return folder / "protocol.json"


def _answers_file(folder: Path, label: str) -> Path:
    return folder / "answers" / f"{label}.jsonl"


def _scores_file(folder: Path, label: str) -> Path:
    return folder / "scores" / f"{label}.json"


def read_answers(file: Path) -> list[dict]:
    """The whole lines of an answers file; one that an interruption tore is left out."""
    if not file.exists():
        return []
    lines = file.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise UserError(f"{file}, line {number} is no JSON: remove the file to make its answers again") from None
    return rows


def write_answers(folder: Path, label: str, rows: list[dict]) -> None:
    """Write all of a model's answers, in one step."""
    write_file(_answers_file(folder, label), "".join(map(_line, rows)))


def _line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
