"""The files of an evaluation: results.json, results.csv, results.md and prompts.json."""

import json
from pathlib import Path

import pandas as pd

from harmful_unlearn.evals.evaluated_model import EvaluatedModel
from harmful_unlearn.evals.judges.base import Judge
from harmful_unlearn.evals.prompt_sets import SETS, Prompt
from harmful_unlearn.evals.protocol import EvalProtocol
from harmful_unlearn.storage.files import write_file
from harmful_unlearn.storage.provenance import provenance

JUDGED = ("harmful_rate", "unjudged_rate", "unsure_rate", "harmful_rate_low", "harmful_rate_high")
UNDER_ATTACK = """\
# Under attack

Harmful rate (judge: {}); brackets: 95 % bootstrap interval over at most {} prompts, which of a worst rate does not
count that it was chosen as the highest. "any": prompts that any variant breaks; there a judge's false alarms add up,
too. An attack under which the base yields no more than before says nothing.
"""
RELEARNING = """\
Fine-tuned on {} pairs of text, and asked at most {} of the prompts: the worst attacker after each number of steps
(all are in relearning.csv). With enough steps any model learns harm, so read this beside the base:"""
RELEVANCE = ("relevance_rate", "safe_refused_rate", "safe_relevant_rate", "safe_irrelevant_rate")
PERCENT = (*JUDGED, *RELEVANCE, "refusal_rate", "degenerate_rate", "exact_match")


def write_prompts(folder: Path, sets: dict[str, list[Prompt]]) -> None:
    """Write the drawn prompts, with the rows of their references, to prompts.json."""
    drawn = {
        name: [
            {"row": p.row, "prompt": p.question, "reference": p.reference, "categories": sorted(p.categories)}
            for p in prompts
        ]
        for name, prompts in sets.items()
    }
    write_file(folder / "prompts.json", json.dumps(drawn, indent=1, ensure_ascii=False) + "\n")


def write_results(
    folder: Path,
    figures: list[dict],
    *,
    judge: Judge,
    refusal_judge: Judge,
    relevance_judge: Judge | None,
    protocol: EvalProtocol,
    models: list[EvaluatedModel],
    flags: dict,
    sources: dict,
    agreement: list[dict],
) -> None:
    """Write results.json, results.csv and results.md.

    Args:
        figures: as `metrics.figures` gives them.
        flags: of the command.
        sources: of the data.
        agreement: as `metrics.figures.agreement` gives it.
    """
    results = {
        "figures": figures,
        "judge": judge.facts,
        "refusal_judge": refusal_judge.facts,
        "relevance_judge": relevance_judge and relevance_judge.facts,
        "agreement": agreement,
        "data": sources,
        "protocol": protocol.settings(),
        "models": {model.label: {"path": str(model.folder), **model.identity} for model in models},
        "flags": {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()},
        **provenance(),
    }
    write_file(folder / "results.json", json.dumps(results, indent=2, default=str, ensure_ascii=False) + "\n")
    table = pd.DataFrame(figures, dtype=object)
    judges = {**dict.fromkeys(JUDGED, credentials(judge)), "refusal_rate": refusal_judge.name}
    if relevance_judge:
        judges |= dict.fromkeys(RELEVANCE, credentials(relevance_judge))
    table["judge"] = table["metric"].map(judges).fillna("")
    write_file(folder / "results.csv", table.to_csv(index=False, lineterminator="\n"))
    write_file(folder / "results.md", results_markdown(figures, judge, agreement, refusal_judge, relevance_judge))


def results_markdown(
    figures: list[dict], judge: Judge, agreement: list[dict], refusal_judge: Judge, relevance_judge: Judge | None = None
) -> str:
    """The figures as a table for each set of prompts: a row for each model and decoding, a column for each metric."""
    counted = f"Judge of refusals: {refusal_judge.name}."
    if relevance_judge:
        counted += f" Judge of relevance: {credentials(relevance_judge)}."
    lines = ["# Results", "", f"Brackets: 95 % bootstrap interval over prompts. {counted}"]
    table = pd.DataFrame(figures, dtype=object)
    table["answers"] = table["decoding"].fillna("references")
    table["cell"] = [cell(figure) for figure in figures]
    for name, rows in table.groupby("set", sort=False):
        metrics = list(rows["metric"].unique())
        title = f"{name} prompts" if name in SETS else name
        if "harmful_rate" in metrics:
            title += f" (judge: {credentials(judge)})"
        lines += ["", f"## {title}", ""]
        lines.append(f"| model | answers | n | {' | '.join(metrics)} |")
        lines.append("| --- " * (len(metrics) + 3) + "|")
        for (model, answers), row in rows.groupby(["model", "answers"], sort=False):
            cells = row.set_index("metric")["cell"].reindex(metrics, fill_value="")
            lines.append(f"| {model} | {answers} | {row['n'].max()} | {' | '.join(cells)} |")
    if agreement:
        lines += ["", "## Agreement with earlier judges of the same answers", ""]
        lines += ["| model | judge | n | equal verdicts |", "| --- | --- | ---: | ---: |"]
        lines += [f"| {row['model']} | {row['judge']} | {row['n']} | {row['agree']:.1%} |" for row in agreement]
    return "\n".join(lines) + "\n"


def write_attacks(folder: Path, figures: list[dict], relearned: list[dict], judge: Judge) -> None:
    """Write attacks.csv and attacks.md, and relearning.csv where there was relearning.

    Args:
        figures, relearned: as `AttackPlan.measure` gives them.
    """
    table = pd.DataFrame(figures, dtype=object)
    write_file(folder / "attacks.csv", table.to_csv(index=False, lineterminator="\n"))
    if relearned:
        curves = pd.DataFrame(relearned, dtype=object).to_csv(index=False, lineterminator="\n")
        write_file(folder / "relearning.csv", curves)
    write_file(folder / "attacks.md", attacks_markdown(figures, relearned, judge))


def attacks_markdown(figures: list[dict], relearned: list[dict], judge: Judge) -> str:
    """Harmful rates under attack: a row for each attack and variant, a column for each model."""
    table = _with_cells(figures)
    models = list(table["model"].unique())
    rates = table[table["metric"] == "harmful_rate"]
    lines = [UNDER_ATTACK.format(credentials(judge), rates["n"].max())]
    if set(rates["attack"]) != {"none"}:
        lines += _attack_rows(rates, models)
    perplexities = table[table["metric"] != "harmful_rate"]
    if len(perplexities):
        lines += ["", "Perplexity of normal references after the changes of weights:", ""]
        lines += _attack_rows(perplexities, models)
    if relearned:
        lines += ["", RELEARNING.format(relearned[0]["pairs"], max(figure["n"] for figure in relearned)), ""]
        worst = [
            {**figure, "attack": "relearn", "variant": f"{figure['steps']} steps"}
            for figure in relearned
            if figure["attacker"] == "worst"
        ]
        lines += _attack_rows(_with_cells(worst), models)
    return "\n".join(lines) + "\n"


def _with_cells(figures: list[dict]) -> pd.DataFrame:
    """Figures as a table, with the text of each: value, interval, and which attack it is of if it is of the worst."""
    table = pd.DataFrame(figures, dtype=object)
    named = [f" ({figure['which']})" if figure["which"] else "" for figure in figures]
    return table.assign(cell=[cell(figure) + which for figure, which in zip(figures, named, strict=True)])


def _attack_rows(table: pd.DataFrame, models: list[str]) -> list[str]:
    lines = [f"| attack | variant | {' | '.join(models)} |", f"| --- | --- |{' ---: |' * len(models)}"]
    for (attack, variant), rows in table.groupby(["attack", "variant"], sort=False):
        cells = rows.set_index("model")["cell"].reindex(models, fill_value="")
        lines.append(f"| {attack} | {'' if variant == attack else variant} | {' | '.join(cells)} |")
    return lines


def credentials(judge: Judge) -> str:
    """The judge's name, with what is known of it on held-out labels."""
    known = [
        f"{name} {judge.facts[name]}"
        for name in ("accuracy", "auc", "calibration_error", "n_held_out")
        if name in judge.facts
    ]
    return f"{judge.name}, held out: {', '.join(known)}" if known else judge.name


def cell(figure: dict) -> str:
    """A figure with its interval; a dash where there was nothing to measure."""
    if figure["value"] is None:
        return "–"
    factor, unit = (100, " %") if figure["metric"] in PERCENT else (1, "")
    value, low, high = (f"{factor * figure[key]:.4g}" for key in ("value", "low", "high"))
    return f"{value}{unit} [{low}, {high}]"
