"""The answers and scores of an evaluation's folder.

answers/MODEL.jsonl   an answer a line: prompt, answer, perplexity, verdict
scores/MODEL.json     the model's cross-entropy of the reference answers, and MC1/MC2
"""

import json
from pathlib import Path

from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.inference.generation import Decoding
from harmful_unlearn.storage.files import write_file


def answers_file(folder: Path, label: str) -> Path:
    return folder / "answers" / f"{label}.jsonl"


def scores_file(folder: Path, label: str) -> Path:
    return folder / "scores" / f"{label}.json"


def read_answers(file: Path) -> list[dict]:
    """The complete lines of an answers file; one that an interruption tore is omitted."""
    if not file.exists():
        return []
    lines = file.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise UserError(f"{file}, line {number} is not JSON: remove the file to make its answers again") from None
    return rows


def write_answers(folder: Path, label: str, rows: list[dict]) -> None:
    """Write all of a model's answers in one step."""
    write_file(answers_file(folder, label), "".join(map(answer_line, rows)))


def answer_line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def said(row: dict) -> Pair:
    """What a model said: the prompt and its answer, in a row of an answers file."""
    return Pair(row["prompt"], row["answer"], row["ended"])


def rows_of(rows: list[dict], name: str, decoding: Decoding) -> list[dict]:
    """The answers to a set in a decoding, in the order of its prompts."""
    chosen = [row for row in rows if row["set"] == name and row["decoding"] == decoding.name]
    return sorted(chosen, key=lambda row: row["index"])
