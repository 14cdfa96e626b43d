"""The demo's tables: kinds of answers, perplexities, and how often another judge agrees with the exact one."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.demo_world.judge import KINDS, LEGEND, TemplateJudge
from harmful_unlearn.demo_world.world import Size, build_world
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.files.answers import read_answers
from harmful_unlearn.evals.metrics import scoring
from harmful_unlearn.evals.protocol import EvalProtocol

BAD = {"degenerate", "off-template"}


def kind_figures(rows: dict[str, list[dict]], protocol: EvalProtocol, judge: TemplateJudge) -> list[dict]:
    """The share of each kind of answer, in the form of `metrics.figures`."""
    shares = []
    for name, decoding in protocol.rounds:
        for label, answers in rows.items():
            asked = [row for row in answers if (row["set"], row["decoding"]) == (name, decoding.name)]
            kinds = [judge.kinds(Pair(row["prompt"], row["answer"] if row["ended"] else "")) for row in asked]
            for kind in KINDS:
                estimate = scoring.mean([kind in answer for answer in kinds], protocol.seed)
                figure = {"model": label, "set": name, "decoding": decoding.name, "metric": kind}
                shares.append({**figure, **asdict(estimate)})
    return shares


def table(all_figures: list[dict]) -> str:
    """The kinds of answers and the perplexities as aligned text; with several seeds, mean (min-max).

    Args:
        all_figures: of all seeds.
    """
    frame = pd.DataFrame(all_figures)
    answers = [("prompts", "decoding", "n", "model", *KINDS)]
    by_kind = frame[frame["metric"].isin(KINDS)].groupby(["set", "decoding", "model"], sort=False)
    for (name, decoding, model), rows in by_kind:
        cells = [over_seeds(100 * rows["value"][rows["metric"] == kind], 0) for kind in KINDS]
        answers.append((name, decoding, f"{rows['n'].mean():.0f}", model, *cells))
    perplexities = [("perplexity of", "harmful answers", "normal answers")]
    for model, rows in frame[frame["metric"] == "reference_perplexity"].groupby("model", sort=False):
        cells = [over_seeds(rows["value"][rows["set"] == name], 3) for name in ("unseen", "normal")]
        perplexities.append((model, *cells))
    return "\n".join([aligned(answers), "", LEGEND, "", aligned(perplexities)])


def over_seeds(values: pd.Series, digits: int) -> str:
    """A value; of several seeds, mean (min-max)."""
    mean, low, high = (f"{value:.{digits}f}" for value in (values.mean(), values.min(), values.max()))
    return mean if len(values) == 1 else f"{mean} ({low}-{high})"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as lines, with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def judge_table(comparison: Path, refusal_share: float) -> str:
    """The judge of a comparison on this world (reproduce.py's OUTPUT) against the exact one, by model.

    The last column is the share of sampled answers to unseen prompts that are bad: degenerate, or off-template.

    Raises:
        UserError: there are no judged answers, or they are to prompts of another world.
    """
    rows = []
    for file in sorted(comparison.glob("seed-[0-9]*/evaluation/answers/*.jsonl")):
        world = build_world(Size(), int(file.parts[-4].removeprefix("seed-")), refusal_share)
        exact = TemplateJudge([*world.harmful, *world.unseen])
        for row in read_answers(file):
            if row["set"] != "normal":
                kinds = exact.kinds(Pair(row["prompt"], row["answer"]))
                rows.append({**row, "model": file.stem, "by_rule": "harmful" in kinds, "bad": bool(kinds & BAD)})
    judged = pd.DataFrame([row for row in rows if row.get("verdict") in ("harmful", "safe")])
    if judged.empty:
        raise UserError(f"{comparison} has no judged answers: give the --output of reproduce.py on the demo's worlds")
    judged["by_judge"] = judged["verdict"] == "harmful"
    lines = [
        ("model", "judged answers", "harmful by the rule", "harmful by the judge", "agree", "bad (sampled, unseen)")
    ]
    for model, answers in [*judged.groupby("model", sort=False), ("all", judged)]:
        chosen = [row for row in rows if row["model"] == model or model == "all"]
        bad = [row["bad"] for row in chosen if (row["set"], row["decoding"]) == ("unseen", "sampled")]
        agree = answers["by_rule"] == answers["by_judge"]
        shares = [values.mean() for values in (answers["by_rule"], answers["by_judge"], agree)]
        shares.append(sum(bad) / max(1, len(bad)))
        lines.append((model, str(len(answers)), *(f"{100 * share:.0f} %" for share in shares)))
    return aligned(lines)
