"""The pieces of a report: Markdown, and the files beside it."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pandas as pd

from harmful_unlearn.reporting.figures import Cell


class Block(NamedTuple):
    """A piece of the report.

    Attributes:
        markdown: ends with a line break.
        files: the content of each file that goes beside the report, by name.
    """

    markdown: str
    files: Mapping[str, str | bytes] = {}


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line, so that it may also stand in a table."""
    escaped = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", html.escape(text, quote=False))
    return "<br>".join(escaped.strip().splitlines())


def paragraph(text: str) -> Block:
    return Block(f"{plain(text)}\n")


def code(title: str, text: str) -> Block:
    """A command or the like, under a title."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Block(f"**{plain(title)}**\n\n{fence}\n{text}\n{fence}\n")


def picture(name: str, caption: str, png: bytes) -> Block:
    """A PNG with its caption; `name` is the file's, without .png."""
    return Block(f"![{plain(caption)}]({name}.png)\n\n*{plain(caption)}*\n", {f"{name}.png": png})


def table(name: str | None, columns: Sequence[str], rows: Sequence[Sequence[str | Cell]]) -> Block:
    """A table, and a CSV of it.

    Args:
        name: of the CSV, without .csv; None for no CSV.
        columns: their titles.
        rows: as many entries as columns. A column holds texts, or `Cell`s: these are spread over three columns of the
            CSV, value, low and high, and their percentages are shares of 1 there.
    """
    sides = ["---:" if isinstance(entry, Cell) else "---" for entry in rows[0]]
    texts = [[str(entry) if isinstance(entry, Cell) else plain(entry) for entry in row] for row in rows]
    markdown = "".join(f"| {' | '.join(row)} |\n" for row in (map(plain, columns), sides, *texts))
    return Block(markdown, {f"{name}.csv": _csv(columns, rows)} if name else {})


def _csv(columns: Sequence[str], rows: Sequence[Sequence[str | Cell]]) -> str:
    spread: dict[str, list] = {}
    for title, column in zip(columns, zip(*rows, strict=True), strict=True):
        if isinstance(column[0], Cell):
            title = title.removesuffix(", %")
            spread[title] = [cell.value for cell in column]
            spread[f"{title} (low)"] = [cell.low for cell in column]
            spread[f"{title} (high)"] = [cell.high for cell in column]
        else:
            spread[title] = list(column)
    return pd.DataFrame(spread).to_csv(index=False, lineterminator="\n")


def answers(title: str, prompt: str, reference: str, by_model: Sequence[tuple[str, str, str]]) -> Block:
    """A prompt with the data's answer to it, and all models': (label of the model, answer, verdict)."""
    lines = [f"### {plain(title)}\n", f"**{plain(prompt)}**\n", f"- reference: {plain(reference)}"]
    lines += [f"- **{plain(label)}** ({plain(verdict)}): {plain(text)}" for label, text, verdict in by_model]
    return Block("\n".join(lines) + "\n")
