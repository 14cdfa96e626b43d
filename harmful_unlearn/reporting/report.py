"""The comparison's report: which sections it has, as Markdown, HTML, CSV and PNG.

Rows are in the order of the comparison's methods, whatever their figures: nothing is ranked.
"""

from pathlib import Path

import pandas as pd

from harmful_unlearn.reporting import robustness, search, sections
from harmful_unlearn.reporting.blocks import Block, plain
from harmful_unlearn.reporting.comparison import BASE, SKU, Comparison
from harmful_unlearn.reporting.figures import REFERENCES
from harmful_unlearn.reporting.page import page
from harmful_unlearn.reporting.sections import Column, ReportContext, comparison_table
from harmful_unlearn.storage.files import write_file


def write_report(comparison: Comparison, folder: Path) -> None:
    """Write a comparison's report into `folder`.

    report.md, report.html (one file that needs no other), the plots, the tables as CSV, and figures.csv: all figures of
    the compared models, one a row.
    """
    lines = [f"# {plain(comparison.title)}\n"]
    files: dict[str, str | bytes] = {}
    for heading, blocks in report_parts(ReportContext(comparison)).items():
        if blocks:
            lines += [f"## {heading}\n", *(block.markdown for block in blocks)]
        for block in blocks:
            files |= block.files
    text = "\n".join(lines)
    pictures = {name: content for name, content in files.items() if isinstance(content, bytes)}
    figures = pd.DataFrame(comparison.figures).to_csv(index=False, lineterminator="\n")
    files |= {"report.md": text, "report.html": page(comparison.title, text, pictures), "figures.csv": figures}
    for name, content in files.items():
        write_file(folder / name, content)


def report_parts(report: ReportContext) -> dict[str, list[Block]]:
    """The blocks under each heading, in order; none where the comparison has nothing of it."""
    methods, provenance = report.data.methods, report.data.provenance
    main = [name for name, model in methods.items() if model["group"] == "main"]
    changed = [name for name, model in methods.items() if model["group"] == "ablation"]
    ablations = [name for name in methods if name in (BASE, SKU, *changed)]
    paper, hidden, ablated = table_columns(report)
    return {
        "What was compared": sections.overview(report),
        f"Results ({report.decoding} answers)": comparison_table(report, "main", main, paper),
        "What a harmful rate hides": comparison_table(report, "hidden", main, hidden),
        "Ablations": comparison_table(report, "ablations", ablations, ablated) if changed else [],
        "Harm against normal text": sections.tradeoff(report),
        "The search for settings": search.search(report),
        "Refusals": robustness.refusals(report),
        "Under attack": robustness.attacks(report),
        "Relearning": robustness.relearning(report),
        "Distance from the oracle": robustness.oracle(report),
        "The choice of alpha": sections.alphas(report),
        "By kind of harm": sections.categories(report),
        "Losses of stage 1": sections.losses(report),
        "Prompts and answers": sections.prompts_and_answers(report),
        "Glossary": sections.glossary(report),
        "Commands": sections.commands(report),
        "Provenance": [sections.facts_table(provenance)] if provenance else [],
    }


def table_columns(report: ReportContext) -> tuple[list[Column], list[Column], list[Column]]:
    """The columns of the paper's tables, of what these hide, and of the ablations.

    Hidden are broken answers, knowledge that is still there, and damage on normal text.
    """
    usual = report.decoding
    harm = ("harmful_rate", "answer_perplexity")
    normal = ("answer_perplexity", "bleurt_reference" if "bleurt_reference" in report.metrics else "rouge_reference")

    def columns(prompts: str, decoding: str, *metrics: str) -> list[Column]:
        return [(prompts, decoding, metric) for metric in metrics]

    paper = columns("seen", usual, *harm) + columns("unseen", usual, *harm) + columns("normal", usual, *normal)
    hidden = [
        *columns("seen", REFERENCES, "reference_perplexity"),
        *columns("unseen", usual, "safe_refused_rate", "safe_relevant_rate", "safe_irrelevant_rate"),
        *columns("unseen", usual, "degenerate_rate", "unjudged_rate", "unsure_rate"),
        *(columns("unseen", "greedy", "harmful_rate") if usual != "greedy" else []),
        *columns("unseen", REFERENCES, "reference_perplexity"),
        *columns(
            "normal",
            usual,
            "relevance_rate",
            "degenerate_rate",
            "exact_match",
            "rouge_reference",
            "rouge_base",
            "bleurt_base",
        ),
        *columns("normal", REFERENCES, "reference_perplexity", "mc1", "mc2"),
        *columns("utility", usual, "degenerate_rate", "rouge_base", "base_answer_perplexity"),
    ]
    ablated = [
        *columns("seen", usual, *harm),
        *columns("unseen", usual, *harm, "degenerate_rate"),
        *columns("normal", usual, *normal, "degenerate_rate", "exact_match"),
    ]
    return paper, hidden, ablated
