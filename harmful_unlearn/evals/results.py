"""The files of an evaluation: results.json, results.csv, results.md and prompts.json."""

import csv
import io
import json
from pathlib import Path

from harmful_unlearn.evals.evaluated_model import EvaluatedModel
from harmful_unlearn.evals.evaluator import EvalProtocol
from harmful_unlearn.evals.judges.base import Judge
from harmful_unlearn.evals.prompt_sets import SETS, EvalData, Prompt
from harmful_unlearn.storage.files import write_file
from harmful_unlearn.storage.provenance import provenance


def write_prompts(folder: Path, sets: dict[str, list[Prompt]]) -> None:
    """Write the drawn prompts, with the rows of their references, to prompts.json."""
    drawn = {
        name: [
            {"row": p.row, "prompt": p.question, "reference": p.reference, "categories": sorted(p.categories)}
            for p in found
        ]
        for name, found in sets.items()
    }
    write_file(folder / "prompts.json", json.dumps(drawn, indent=1, ensure_ascii=False) + "\n")


def write_results(
    folder: Path,
    found: list[dict],
    judge: Judge,
    protocol: EvalProtocol,
    subjects: list[EvaluatedModel],
    flags: dict,
    data: EvalData,
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
