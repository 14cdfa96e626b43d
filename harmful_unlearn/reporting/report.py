"""The comparison's report as Markdown, HTML, CSV and SVG."""

from pathlib import Path

import pandas as pd

from harmful_unlearn.reporting.blocks import plain
from harmful_unlearn.reporting.comparison import Comparison
from harmful_unlearn.reporting.page import page
from harmful_unlearn.reporting.parts.context import ReportContext
from harmful_unlearn.reporting.parts.findings import subject
from harmful_unlearn.reporting.sections import sections
from harmful_unlearn.storage.files import write_file


def write_report(comparison: Comparison, folder: Path) -> None:
    """Write a comparison's report into `folder`.

    report.md, report.html (one file that needs no other), the plots, the tables as CSV, and figures.csv: all figures of
    the compared models, one a row.
    """
    report = ReportContext(comparison)
    title = f"Unlearning methods compared on {report.model}"
    lines = [f"# {plain(title)}\n", subject(report).markdown]
    files: dict[str, str] = {}
    for heading, blocks in sections(report).items():
        if blocks:
            lines += [f"## {heading}\n", *(block.markdown for block in blocks)]
        for block in blocks:
            files |= block.files
    text = "\n".join(lines)
    pictures = {name: content for name, content in files.items() if name.endswith(".svg")}
    figures = pd.DataFrame(comparison.figures).to_csv(index=False, lineterminator="\n")
    files |= {"report.md": text, "report.html": page(title, text, pictures), "figures.csv": figures}
    for name, content in files.items():
        write_file(folder / name, content)
