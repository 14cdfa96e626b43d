"""The comparison's report: which sections it has, as Markdown, HTML, CSV and PNG.

Rows are in the order of the comparison's methods, whatever their figures: nothing is ranked.
"""

from pathlib import Path

from harmful_unlearn.reporting import sections
from harmful_unlearn.reporting.blocks import Block, Picture, plain
from harmful_unlearn.reporting.comparison import BASE, SKU, Comparison
from harmful_unlearn.reporting.context import ReportContext
from harmful_unlearn.reporting.figures import REFERENCES
from harmful_unlearn.reporting.page import page
from harmful_unlearn.reporting.sections import Column, comparison_table
from harmful_unlearn.storage.files import write_file


def write_report(comparison: Comparison, folder: Path) -> None:
    """Write report.md, report.html (one file that needs no other), the plots and the tables as CSV into `folder`."""
    parts = {heading: blocks for heading, blocks in report_parts(ReportContext(comparison)) if blocks}
    all_blocks = [block for blocks in parts.values() for block in blocks]
    for block in all_blocks:
        for name, content in block.files().items():
            write_file(folder / name, content)
    lines = [f"# {plain(comparison.title)}\n"]
    for heading, blocks in parts.items():
        lines += [f"## {heading}\n", *(block.markdown() for block in blocks)]
    text = "\n".join(lines)
    pictures = {f"{block.name}.png": block.png for block in all_blocks if isinstance(block, Picture)}
    write_file(folder / "report.md", text)
    write_file(folder / "report.html", page(comparison.title, text, pictures))


def report_parts(report: ReportContext) -> list[tuple[str, list[Block]]]:
    """Headings with their blocks, in order; no blocks where the comparison has nothing of it."""
    data, methods = report.data, report.data.methods
    main = [name for name, model in methods.items() if model.group == "main"]
    changed = [name for name, model in methods.items() if model.group == "ablation"]
    ablations = [name for name in methods if name in (BASE, SKU, *changed)]
    paper = paper_columns(report)
    return [
        ("What was compared", sections.overview(report)),
        (f"Results ({report.decoding} answers)", comparison_table(report, "main", main, paper)),
        ("What a harmful rate hides", comparison_table(report, "hidden", main, hidden_columns(report))),
        (
            "Ablations",
            comparison_table(report, "ablations", ablations, ablation_columns(report, paper)) if changed else [],
        ),
        ("Harm against normal text", sections.tradeoff(report)),
        ("The choice of alpha", sections.alphas(report)),
        ("By kind of harm", sections.categories(report)),
        ("Relearning", sections.relearning(report)),
        ("Losses of stage 1", sections.losses(report)),
        ("Prompts and answers", sections.answers(report)),
        ("Glossary", sections.glossary(report)),
        ("Commands", sections.commands(report)),
        ("Provenance", [sections.facts_table(data.provenance)] if data.provenance else []),
    ]


def paper_columns(report: ReportContext) -> list[Column]:
    """The columns of the paper's tables."""
    similarity = "bleurt_reference" if "bleurt_reference" in report.metrics else "rouge_reference"
    return [
        ("seen", report.decoding, "harmful_rate"),
        ("seen", report.decoding, "answer_perplexity"),
        ("unseen", report.decoding, "harmful_rate"),
        ("unseen", report.decoding, "answer_perplexity"),
        ("normal", report.decoding, "answer_perplexity"),
        ("normal", report.decoding, similarity),
    ]


def hidden_columns(report: ReportContext) -> list[Column]:
    """What the paper's columns do not show: broken answers, knowledge that is still there, damage on normal text."""
    greedy = [("unseen", "greedy", "harmful_rate")] if report.decoding != "greedy" else []
    normal = ("degenerate_rate", "exact_match", "rouge_reference", "rouge_base", "bleurt_base")
    return [
        ("seen", REFERENCES, "reference_perplexity"),
        ("unseen", report.decoding, "degenerate_rate"),
        ("unseen", report.decoding, "unjudged_rate"),
        *greedy,
        ("unseen", REFERENCES, "reference_perplexity"),
        *(("normal", report.decoding, metric) for metric in normal),
        *(("normal", REFERENCES, metric) for metric in ("reference_perplexity", "mc1", "mc2")),
    ]


def ablation_columns(report: ReportContext, paper: list[Column]) -> list[Column]:
    """The paper's columns, with the broken answers."""
    return [
        *paper[:4],
        ("unseen", report.decoding, "degenerate_rate"),
        *paper[4:],
        ("normal", report.decoding, "degenerate_rate"),
        ("normal", report.decoding, "exact_match"),
    ]
