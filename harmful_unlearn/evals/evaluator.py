"""Measures models: their answers, scores and verdicts, kept in a folder so that nothing is done twice.

    answers/MODEL.jsonl   an answer a line: prompt, answer, perplexity, verdict
    scores/MODEL.json     the model's cross-entropy of the reference answers, and MC1/MC2
    protocol.json         what decides them: prompts, decodings, lengths, seed, the models' fingerprints

Figures are computed from these files only (metrics/figures.py).
"""

import gc
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.data.templates import Template
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.evaluated_model import BASE, EvaluatedModel
from harmful_unlearn.evals.files.answers import (
    answer_line,
    answers_file,
    read_answers,
    rows_of,
    said,
    scores_file,
    write_answers,
)
from harmful_unlearn.evals.files.base_answers import BaseAnswers, folder_of
from harmful_unlearn.evals.inference import vllm_backend
from harmful_unlearn.evals.inference.generation import Answer, Request, check_room, generate
from harmful_unlearn.evals.inference.likelihood import answer_nll
from harmful_unlearn.evals.judges.base import Judge
from harmful_unlearn.evals.metrics import scoring
from harmful_unlearn.evals.protocol import EvalProtocol, sha256_of
from harmful_unlearn.models.loading import context_length
from harmful_unlearn.storage.files import read_json, write_file

PROTOCOL_FILE = "protocol.json"


def measure(
    models: list[EvaluatedModel],
    protocol: EvalProtocol,
    judge: Judge,
    reference: EvaluatedModel | None,
    folder: Path,
    base_answers: Path | None = None,
    refusal_judge: Judge | None = None,
    relevance_judge: Judge | None = None,
) -> dict[str, list[dict]]:
    """Answers, perplexities and verdicts of every model; what `folder` holds already is not made again.

    Args:
        reference: the language model under which the answers' perplexity is computed; None for answers and verdicts
            only, without perplexities and scores.
        judge: of harm.
        base_answers: a folder where answers and scores of the base, and of what attacks make of it, are kept for other
            evaluations, and looked for.
        refusal_judge: of refusals; None: nobody asks whether an answer is one.
        relevance_judge: of whether an answer fits its question; None: nobody asks.

    Returns:
        By label, the rows of the model's answers file.

    Raises:
        UserError: the folder holds answers to other prompts, with other settings, or of another model.
    """
    record = _check_protocol(models, protocol, reference, folder)
    rows: dict[str, list[dict]] = {}
    for model in models:
        kept = folder_of(base_answers, protocol, model) if base_answers and model.is_of_base else None
        base_rows = rows.get(BASE, []) if reference else None
        rows[model.label] = _answer_and_score(model, protocol, record, folder, kept, base_rows)
    if reference:
        _add_perplexities(rows, protocol, reference, folder)
    for label, answers in rows.items():
        if _add_verdicts(answers, judge, protocol.harmless):
            write_answers(folder, label, answers)
        for key, other in (("refused", refusal_judge), ("relevant", relevance_judge)):
            if _add_answers_of(answers, other, key):
                write_answers(folder, label, answers)
    return rows


def _answer_and_score(
    model: EvaluatedModel,
    protocol: EvalProtocol,
    record: str,
    folder: Path,
    kept: Path | None,
    base_rows: list[dict] | None,
) -> list[dict]:
    """The model's answers; makes those that are missing, and its scores. The model is loaded only if it is needed.

    Args:
        kept: where complete answers and scores of this model are kept for other evaluations, or may be.
        base_rows: the base's answers; of the base itself, none yet. None: no scores are wanted.
    """
    file, scored = answers_file(folder, model.label), scores_file(folder, model.label)
    rows, lacks_scores = read_answers(file), base_rows is not None and not scored.exists()
    if len(rows) >= protocol.answers and not lacks_scores:
        return rows
    if kept and (found := BaseAnswers.read(kept)) and (found.scores or base_rows is None):
        print(f"{model.label}: its answers and scores are those in {kept}")
        write_file(folder / PROTOCOL_FILE, record)
        write_answers(folder, model.label, found.rows)
        if base_rows is not None:
            write_file(scored, json.dumps(found.scores))
        return found.rows
    language_model, template = model.load()
    if template.text != protocol.prompt_template:
        raise UserError(f"{model.label} has another chat template than the base: give models of the same base")
    check_room(language_model.config, template, protocol.asked, protocol.max_new_tokens)
    write_file(folder / PROTOCOL_FILE, record)  # before the first answer, and after all that refuses a model
    limits = (protocol.max_new_tokens, protocol.tokens_per_batch)
    if protocol.backend == "hf":
        rows = _answer(model.label, protocol, rows, file, partial(generate, language_model, template, *limits))
    if lacks_scores:
        write_file(scored, json.dumps(_score(language_model, template, protocol, base_rows or rows)))
    del language_model
    _free()
    if protocol.backend == "vllm":  # it needs the memory
        assert model.folder, "vLLM reads folders"
        asking = partial(vllm_backend.generate, model.folder, template, protocol.max_new_tokens, protocol.precision)
        rows = _answer(model.label, protocol, rows, file, asking)
    if kept and not any("nll" in row for row in rows):
        BaseAnswers(rows, read_json(scored) if scored.exists() else {}).write(kept)
    return rows


def _answer(
    label: str,
    protocol: EvalProtocol,
    rows: list[dict],
    file: Path,
    generate: Callable[[list[Request]], Iterable[list[Answer]]],
) -> list[dict]:
    """`rows` with the answers that they lack, each batch appended to `file` as it is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, "".join(answer_line(row) for row in rows))  # without a torn last line
    done = {(row["set"], row["decoding"], row["index"]) for row in rows}
    lacking = [
        (name, decoding, index)
        for name, decoding in protocol.rounds
        for index in range(len(protocol.prompts[name]))
        if (name, decoding.name, index) not in done
    ]
    requests = [
        Request(protocol.prompts[name][index].asked, decoding, (protocol.sampling_seed(name), index))
        for name, decoding, index in lacking
    ]
    with (
        file.open("a", encoding="utf-8") as out,
        tqdm(total=protocol.answers, initial=len(rows), desc=f"{label} answers", unit="answer") as bar,
    ):
        for batch in generate(requests) if requests else ():
            new_rows = []
            for answer in batch:
                name, decoding, index = lacking[answer.index]
                prompt = protocol.prompts[name][index]
                row = {"model": label, "set": name, "decoding": decoding.name, "index": index, "row": prompt.row}
                row |= {"prompt": prompt.question, "reference": prompt.reference}
                if prompt.attack:
                    row["asked"] = prompt.attack.question
                text = f"{prompt.asked.prefill} {answer.text}".strip() if answer.text else ""
                new_rows.append({**row, "answer": text, "ended": answer.ended})
            out.write("".join(map(answer_line, new_rows)))
            out.flush()
            rows = rows + new_rows
            bar.update(len(new_rows))
    return rows


def _score(model: PreTrainedModel, template: Template, protocol: EvalProtocol, base_rows: list[dict]) -> dict:
    """Cross-entropies of the reference answers by set, and [MC1, MC2] of the normal questions that have choices.

    Also, by decoding, the cross-entropies of the base's own answers to everyday tasks.
    """
    collator = Collator(template, "paper", context_length(model.config))
    scores: dict = {
        name: answer_nll(model, collator, [prompt.pair for prompt in prompts], f"{name} references")
        for name, prompts in protocol.prompts.items()
    }
    if "utility" in protocol.prompts:
        answered = {
            decoding.name: [said(row) for row in rows_of(base_rows, "utility", decoding)]
            for decoding in protocol.decodings
        }
        scores["base_answers"] = {
            name: answer_nll(model, collator, pairs, f"{name} answers of the base") for name, pairs in answered.items()
        }
    questions = [p.question for p in protocol.prompts.get("normal", []) if p.question in protocol.choices]
    choices = [protocol.choices[question] for question in questions]
    pairs = [
        Pair(question, answer)
        for question, choice in zip(questions, choices, strict=True)
        for answer in (choice.best, *choice.true, *choice.false)
    ]
    scores["choices"] = []
    if not pairs:
        return scores
    logs = iter([-nll for nll, _ in answer_nll(model, collator, pairs, "multiple choice")])
    for choice in choices:
        best, true, false = ([next(logs) for _ in range(n)] for n in (1, len(choice.true), len(choice.false)))
        scores["choices"].append([scoring.mc1(best[0], false), scoring.mc2(true, false)])
    return scores


def _add_perplexities(
    rows: dict[str, list[dict]], protocol: EvalProtocol, reference: EvaluatedModel, folder: Path
) -> None:
    """Add each answer's cross-entropy under `reference` ("nll", nats), its tokens and its perplexity."""
    lacking = [label for label in rows if any("nll" not in row for row in rows[label])]
    if not lacking:
        return
    model, template = reference.load()
    collator = Collator(template, "paper", context_length(model.config))
    for label in lacking:
        pairs = [said(row) for row in rows[label]]
        scored = answer_nll(model, collator, pairs, f"perplexity of {label}'s answers")
        for row, (nll, tokens) in zip(rows[label], scored, strict=True):
            row |= {"nll": nll, "tokens": tokens, "perplexity": float(np.exp(nll / tokens)) if tokens else None}
        write_answers(folder, label, rows[label])
    del model
    _free()


def _add_verdicts(rows: list[dict], judge: Judge, harmless_sets: frozenset[str]) -> bool:
    """Add a verdict to each answer that has none by this judge; returns whether there were any.

    Degenerate answers and answers to harmless prompts are not shown to the judge.
    """
    judge_id = _id_of(judge)
    harmless = [row for row in rows if row["set"] in harmless_sets and "verdict" not in row]
    unjudged = [
        row
        for row in rows
        if row["set"] not in harmless_sets and (row.get("judge") != judge_id or row["verdict"] == "unjudged")
    ]
    for row in harmless:
        reason = scoring.degenerate(row["answer"])
        row |= {"verdict": "degenerate" if reason else "answered", "note": reason or ""}
    asked = []
    for row in unjudged:
        reason = scoring.degenerate(row["answer"])
        if row.get("judge", judge_id) != judge_id:
            row["earlier"] = {**row.get("earlier", {}), row["judge"]: row["verdict"]}
        row |= {"judge": judge_id, "verdict": "degenerate", "score": None, "note": reason}
        if not reason:
            asked.append(row)
    verdicts = judge.judge([Pair(row["prompt"], row["answer"]) for row in asked]) if asked else []
    for row, verdict in zip(asked, verdicts, strict=True):
        word = {True: "harmful", False: "safe", None: "unjudged"}[verdict.yes]
        row |= {"verdict": word, "score": verdict.score, "note": verdict.note}
    return bool(unjudged or harmless)


def _add_answers_of(rows: list[dict], judge: Judge | None, key: str) -> bool:
    """Add to each answer whether it is "refused" or "relevant" (`key`) by this judge; returns whether any was added.

    It is None where no verdict could be read. Degenerate answers are neither, and are not shown to the judge.
    """
    if judge is None:
        return False
    judge_id, of_judge = _id_of(judge), {"refused": "refusal_judge", "relevant": "relevance_judge"}[key]
    unjudged = [row for row in rows if row.get(of_judge) != judge_id or row[key] is None]
    asked = [row for row in unjudged if row["verdict"] != "degenerate"]
    for row in unjudged:
        row |= {of_judge: judge_id, key: False}
    verdicts = judge.judge([Pair(row["prompt"], row["answer"]) for row in asked]) if asked else []
    for row, verdict in zip(asked, verdicts, strict=True):
        row[key] = verdict.yes
    return bool(unjudged)


def _id_of(judge: Judge) -> str:
    """A judge of the same name with other facts (other labels, another server) judges again."""
    return f"{judge.name} {sha256_of(judge.facts)[:16]}"


def _check_protocol(
    models: list[EvaluatedModel], protocol: EvalProtocol, reference: EvaluatedModel | None, folder: Path
) -> str:
    """The content of protocol.json. Raises UserError where the folder holds answers that something else decided."""
    file = folder / PROTOCOL_FILE
    scored_by = reference and reference.identity
    record: dict = {"settings": protocol.settings(), "reference": scored_by, "models": {}}
    if file.exists():
        before = read_json(file)
        record["models"] = before["models"]
        names = {*record["settings"], *before["settings"]}
        differ = sorted(name for name in names if before["settings"].get(name) != record["settings"].get(name))
        if before["reference"] != scored_by:
            differ.append("the perplexity model")
        differ += [
            model.label for model in models if before["models"].get(model.label, model.identity) != model.identity
        ]
        if differ:
            raise UserError(
                f"{folder} holds answers made otherwise ({', '.join(differ)}): give another --output, or remove it"
            )
    record["models"] |= {model.label: model.identity for model in models}
    return json.dumps(record, indent=2) + "\n"


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
