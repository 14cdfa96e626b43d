"""The section of a report on the search for settings: what was tried, what it cost and left, and what was chosen."""

import pandas as pd

from harmful_unlearn.reporting import plots
from harmful_unlearn.reporting.blocks import Block, Link, paragraph, picture, table
from harmful_unlearn.reporting.comparison import BASE
from harmful_unlearn.reporting.figures import DASH, Cell
from harmful_unlearn.reporting.parts.context import ReportContext

FEWEST = 5  # trials that a correlation needs


def search(report: ReportContext) -> list[Block]:
    if not report.data.trials:
        return []
    points = pd.DataFrame(report.data.trials)
    base, points = points[points["method"] == BASE].iloc[0], points[points["method"] != BASE]
    budget, asked = report.data.settings["search_budget"], points["harm"].notna()
    methods = list(dict.fromkeys(points["method"]))
    drawn = {
        report.label(name): (_drawn(points[asked & (points["method"] == name)]), _drawn(_chosen(points[asked], name)))
        for name in methods
    }
    of_each = points.groupby("method")["trial"].nunique()
    trials = str(of_each.min()) if of_each.nunique() == 1 else f"{of_each.min()} to {of_each.max()}"
    refusals = report.data.settings.get("search_refusals")
    titles, fits = ["method", "trials", "within the bounds", "chosen settings"], []
    if points["relevance"].notna().any():
        fits = ["fits its question, %"]
    base_fits = f", and {_percent(base['relevance'])} % of its answers fit their question" if fits else ""
    has_tasks = points["task_perplexity"].notna().any()
    tasks = ", and whose perplexity of answers to everyday tasks is," if has_tasks else ""
    more_bound = f", and refuses at most {refusals:.0%} more normal questions" if refusals else ""
    return [
        paragraph(
            f"Every method had {trials} trials, each a training with other settings; the first has the recipe's. "
            f"Optuna's TPE sampler draws them to minimise the harmful rate on {int(base['n'])} validation prompts "
            f"among models whose perplexity of normal reference answers is{tasks} at most "
            f"{1 + budget:g} times the original's{more_bound}; a trial that breaks this is not asked harmful prompts. "
            "Of equal harmful rates the one with the lower multiple is chosen. No test prompt was read before. "
            f"The original's harmful rate on these prompts is {_percent(base['harm'])} %{base_fits}."
        ),
        table(
            "search",
            [
                *titles,
                "harm, validation, %",
                *fits,
                "normal references ×",
                *(["everyday tasks ×"] if has_tasks else []),
            ],
            [_row(report, points[points["method"] == name], name, bool(fits), has_tasks) for name in methods],
        ),
        picture(
            "search",
            "Harmful rate against the cost in perplexity of all trials, a panel a method",
            "All trials within the bounds (a task vector at several alphas gives several points), each method's front, "
            "and the chosen one (star, with its 95 % interval); grey: the trials of the others."
            + (" Of normal references and everyday tasks, the larger multiple." if has_tasks else ""),
            plots.plot_search(drawn, budget),
        ),
        paragraph(
            "How harm goes with each setting: Spearman's rank correlation over a method's trials that were asked "
            f"harmful prompts, where there are at least {FEWEST}. Few trials make it a hint, not a finding."
        ),
        *_sensitivity(report, points[asked], methods),
    ]


def _chosen(points: pd.DataFrame, name: str) -> pd.DataFrame:
    return points[points["chosen"] & (points["method"] == name)]


def _drawn(points: pd.DataFrame) -> list[tuple[float, Cell]]:
    return [(row[["perplexity", "task_perplexity"]].astype(float).max(), _harm(row)) for _, row in points.iterrows()]


def _harm(row: pd.Series) -> Cell:
    return Cell("harmful_rate", row["harm"], row["harm_low"], row["harm_high"], 1)


def _row(report: ReportContext, points: pd.DataFrame, name: str, fits: bool, has_tasks: bool) -> list[str | Link]:
    within = points[points["harm"].notna()]["trial"].nunique()
    counts: list[str | Link] = [report.link(name), str(points["trial"].nunique()), str(within)]
    chosen = points[points["chosen"]]
    if chosen.empty:
        return [*counts, f"none: {points['failure'].dropna().iloc[0]}", *[DASH] * (2 + fits + has_tasks)]
    row = chosen.iloc[0]
    settings = {**row["flags"], **({} if pd.isna(row["alpha"]) else {"scaling_coef": row["alpha"]})}
    words = " ".join(
        f"--{flag} {value if isinstance(value, int) else format(value, '.4g')}" for flag, value in settings.items()
    )
    if pd.isna(row["harm"]):
        words += " (no trial kept the bounds: this one breaks them least)"
    harm = DASH if pd.isna(row["harm"]) else str(_harm(row))
    relevance = [DASH if pd.isna(row["relevance"]) else _percent(row["relevance"])] if fits else []
    tasks = [f"{row['task_perplexity']:.2f}"] if has_tasks else []
    return [*counts, words, harm, *relevance, f"{row['perplexity']:.2f}", *tasks]


def _sensitivity(report: ReportContext, points: pd.DataFrame, methods: list[str]) -> list[Block]:
    rows: list[list[str | Link]] = []
    for name in methods:
        own = points[points["method"] == name]
        best = own.sort_values("harm").drop_duplicates("trial")  # of many alphas the one that a trial stands for
        varied = pd.DataFrame([*best["flags"]], index=best.index)
        for flag in varied.columns:
            values = varied[flag]
            correlates = len(best) >= FEWEST and values.nunique() > 1 and best["harm"].nunique() > 1
            rho = f"{values.rank().corr(best['harm'].rank()):+.2f}" if correlates else DASH
            rows.append([report.link(name), flag, rho, str(len(best))])
    titles = ["method", "setting", "rank correlation with harm", "trials"]
    return [table("search-sensitivity", titles, rows)] if rows else []


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
