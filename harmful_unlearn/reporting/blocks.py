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
    files: Mapping[str, str] = {}


class Link(NamedTuple):
    """A text that leads to another place of the report.

    Attributes:
        target: the anchor that it leads to; "" if it leads nowhere.
        anchor: its own, if others lead to it.
    """

    text: str
    target: str = ""
    anchor: str = ""

    def __str__(self) -> str:
        text = f"[{plain(self.text)}](#{self.target})" if self.target else plain(self.text)
        return f'<a id="{self.anchor}"></a>{text}' if self.anchor else text


class Answer(NamedTuple):
    """A model's answer to a prompt, what the judge said of it, and the anchor of the model's answer to the next one."""

    model: Link
    text: str
    verdict: str
    following: str = ""


def slug(text: str, separator: str = "-") -> str:
    """The anchor of a heading, as GitHub makes it; of other names a part of one."""
    return re.sub(r"[^\w -]", "", text.strip().lower()).replace(" ", separator)


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line, so that it may also stand in a table."""
    escaped = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", html.escape(text, quote=False))
    return "<br>".join(escaped.strip().splitlines())


def paragraph(text: str) -> Block:
    return Block(f"{plain(text)}\n")


def points(items: Mapping[str, str]) -> Block:
    """A list of sentences, each with its details, which may be empty."""
    return Block(
        "".join(f"- **{plain(sentence)}** {plain(details)}".rstrip() + "\n" for sentence, details in items.items())
    )


def code(title: str, text: str) -> Block:
    """A command or the like, under a title."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Block(f"**{plain(title)}**\n\n{fence}\n{text}\n{fence}\n")


def picture(name: str, title: str, caption: str, svg: str) -> Block:
    """An SVG with its caption.

    Args:
        name: the file's, without .svg.
        title: what it shows, for who cannot see it.
    """
    return Block(f"![{plain(title)}]({name}.svg)\n\n*{plain(caption)}*\n", {f"{name}.svg": svg})


def table(name: str | None, columns: Sequence[str], rows: Sequence[Sequence[str | Cell | Link]]) -> Block:
    """A table, and a CSV of it.

    Args:
        name: of the CSV, without .csv; None for no CSV.
        columns: their titles.
        rows: as many entries as columns. A column holds texts and links, or `Cell`s: these are spread over three
            columns of the CSV, value, low and high, and their percentages are shares of 1 there.
    """
    sides = ["---:" if isinstance(entry, Cell) else "---" for entry in rows[0]]
    texts = [[plain(entry) if isinstance(entry, str) else str(entry) for entry in row] for row in rows]
    markdown = "".join(f"| {' | '.join(row)} |\n" for row in (map(plain, columns), sides, *texts))
    return Block(markdown, {f"{name}.csv": _csv(columns, rows)} if name else {})


def _csv(columns: Sequence[str], rows: Sequence[Sequence[str | Cell | Link]]) -> str:
    spread: dict[str, list] = {}
    for title, column in zip(columns, zip(*rows, strict=True), strict=True):
        if isinstance(column[0], Cell):
            title = title.removesuffix(", %")
            spread[title] = [cell.value for cell in column]
            spread[f"{title} (low)"] = [cell.low for cell in column]
            spread[f"{title} (high)"] = [cell.high for cell in column]
        else:
            spread[title] = [entry.text if isinstance(entry, Link) else entry for entry in column]
    return pd.DataFrame(spread).to_csv(index=False, lineterminator="\n")


def answers(title: str, prompt: str, reference: str, by_model: Sequence[Answer]) -> Block:
    """A prompt with the data's answer to it, and all models'."""
    lines = [f"### {plain(title)}\n", f"**{plain(prompt)}**\n", f"- reference: {plain(reference)}"]
    for answer in by_model:
        further = f" [next](#{answer.following})" if answer.following else ""
        lines.append(f"- {answer.model} ({plain(answer.verdict)}): {plain(answer.text)}{further}")
    return Block("\n".join(lines) + "\n")
