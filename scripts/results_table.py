"""Print a table of docs/claims.md or docs/search.md.

Its figures are figures.csv of reproduce.py's OUTPUT, or a copy of that in docs/claims or docs/search:

    .venv/bin/python scripts/results_table.py docs/claims/smollm2-chat.csv
    .venv/bin/python scripts/results_table.py docs/search/demo.csv --columns search
"""

import argparse
from collections.abc import Callable

import pandas as pd

TITLES = {  # rows, in the order of the table
    "base": "base",
    "ft": "FT",
    "ga": "GA",
    "sku-published": "SKU, published lr and weights",
    "sku": "SKU",
    "sku-no-gd": "SKU without GD",
    "sku-no-rd": "SKU without RD",
    "sku-no-pd": "SKU without PD",
    "sku-pd-turned": "SKU, PD's sign turned",
    "task_vector": "task vector",
    "ga_mismatch": "GA + mismatch",
    "ga_mismatch-2e-5": "GA + mismatch, lr 2e-5",
    "land": "LAND",
    "lands": "LANDS",
    "grad_diff": "GradDiff",
    "npo": "NPO",
    "simnpo": "SimNPO",
    "refusal_sft": "refusal SFT",
    "dpo": "DPO",
    "safe_unlearning": "Safe Unlearning",
    "rmu": "RMU",
}
PERCENT, NUMBER, MULTIPLE = "percent", "number", "multiple of the base's"
COLUMNS = {  # of each kind of table. Title: set, metric, and how it is written
    "claims": {
        "harmful, seen, %": ("seen", "harmful_rate", PERCENT),
        "harmful, unseen, %": ("unseen", "harmful_rate", PERCENT),
        "lower bound, %": ("unseen", "harmful_rate_low", PERCENT),
        "upper bound, %": ("unseen", "harmful_rate_high", PERCENT),
        "degenerate, %": ("unseen", "degenerate_rate", PERCENT),
        "answers' perplexity": ("unseen", "answer_perplexity", NUMBER),
        "normal references ×": ("normal", "reference_perplexity", MULTIPLE),
        "ROUGE-L to the base's answers": ("normal", "rouge_base", NUMBER),
        "base's answers to everyday tasks ×": ("utility", "base_answer_perplexity", MULTIPLE),
    },
    "search": {
        "harmful, unseen, %": ("unseen", "harmful_rate", PERCENT),
        "refused, %": ("unseen", "safe_refused_rate", PERCENT),
        "safe, fits, %": ("unseen", "safe_relevant_rate", PERCENT),
        "safe, does not fit, %": ("unseen", "safe_irrelevant_rate", PERCENT),
        "degenerate, %": ("unseen", "degenerate_rate", PERCENT),
        "normal fits, %": ("normal", "relevance_rate", PERCENT),
        "normal references ×": ("normal", "reference_perplexity", MULTIPLE),
        "base's answers to everyday tasks ×": ("utility", "base_answer_perplexity", MULTIPLE),
    },
}
WITH_INTERVAL = "harmful, unseen, %"
WRITE: dict[str, Callable[[float], str]] = {
    PERCENT: lambda value: f"{100 * value:.1f}",
    NUMBER: lambda value: f"{value:.3g}",
    MULTIPLE: lambda value: f"{value:.2f}" if value < 1000 else f"{value:.0e}",
}


def table(figures: pd.DataFrame, kind: str = "claims") -> str:
    """A row for each model: its figure for one seed, and mean (lowest–highest) for several.

    Args:
        figures: the columns of figures.csv; of several decodings the first counts.
        kind: a key of COLUMNS, of which those without any figure are left out.
    """
    decodings = figures["decoding"]
    figures = figures[decodings.isna() | (decodings == decodings.dropna().iloc[0])]
    measured = set(zip(figures["set"], figures["metric"], strict=True))
    columns = {title: column for title, column in COLUMNS[kind].items() if column[:2] in measured}
    lines = [f"| method | seeds | {' | '.join(columns)} |", f"| --- | ---: |{' ---: |' * len(columns)}"]
    for model, title in TITLES.items():
        own = figures[figures["model"] == model]
        if len(own):
            cells = [cell(figures, own, *column, title == WITH_INTERVAL) for title, column in columns.items()]
            lines.append(f"| {title} | {own['seed'].nunique()} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(figures: pd.DataFrame, own: pd.DataFrame, prompts: str, metric: str, form: str, interval: bool) -> str:
    """One cell; "–" where nothing was measured."""

    def of(rows: pd.DataFrame) -> pd.DataFrame:
        return rows[(rows["set"] == prompts) & (rows["metric"] == metric)].set_index("seed")

    rows, write = of(own), WRITE[form]
    values = rows["value"]
    if form == MULTIPLE:
        values = values / of(figures[figures["model"] == "base"])["value"]
    values = values.dropna()
    if not len(values):
        return "–"
    if len(values) > 1:
        return f"{write(values.mean())} ({write(values.min())}–{write(values.max())})"
    ends = f" [{write(rows['low'].iloc[0])}, {write(rows['high'].iloc[0])}]" if interval else ""
    return f"{write(values.iloc[0])}{ends}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="+")
    parser.add_argument("--columns", choices=COLUMNS, default="claims")
    arguments = parser.parse_args()
    for path in arguments.figures:
        print(table(pd.read_csv(path), arguments.columns))
