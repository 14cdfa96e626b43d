"""The pieces of a report, as Markdown and as files beside it."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from harmful_unlearn.reporting.figures import Cell


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line, so that it may also stand in a table."""
    escaped = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", html.escape(text, quote=False))
    return "<br>".join(escaped.strip().splitlines())


class Block:
    """A piece of the report."""

    def markdown(self) -> str:
        """The piece as Markdown; ends with a line break."""
        raise NotImplementedError

    def files(self) -> dict[str, str | bytes]:
        """The content of each file that goes beside the report, by name."""
        return {}


@dataclass
class Text(Block):
    """A paragraph.

    Attributes:
        warning: set it off from the text around it.
    """

    text: str
    warning: bool = False

    def markdown(self) -> str:
        return f"{'> ' if self.warning else ''}{plain(self.text)}\n"


@dataclass
class Code(Block):
    """A command or the like, under a title."""

    title: str
    text: str

    def markdown(self) -> str:
        longest = max((len(run) for run in re.findall("`+", self.text)), default=0)
        fence = "`" * max(3, longest + 1)
        return f"**{plain(self.title)}**\n\n{fence}\n{self.text}\n{fence}\n"


@dataclass
class Picture(Block):
    """A PNG with its caption.

    Attributes:
        name: of the file, without .png.
    """

    name: str
    caption: str
    png: bytes

    def files(self) -> dict[str, str | bytes]:
        return {f"{self.name}.png": self.png}

    def markdown(self) -> str:
        return f"![{plain(self.caption)}]({self.name}.png)\n\n*{plain(self.caption)}*\n"


@dataclass
class Table(Block):
    """A table, and a CSV of it.

    Attributes:
        name: of the CSV, without .csv; None for no CSV.
        columns: their titles.
        rows: as many entries as columns. A column holds texts, or `Cell`s: these are spread over three columns of the
            CSV, value, low and high, and their percentages are shares of 1 there.
    """

    name: str | None
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]

    def files(self) -> dict[str, str | bytes]:
        if self.name is None:
            return {}
        spread: dict[str, list] = {}
        for title, column in zip(self.columns, zip(*self.rows, strict=True), strict=True):
            if isinstance(column[0], Cell):
                title = title.removesuffix(", %")
                spread[title] = [cell.value for cell in column]
                for end in ("low", "high"):
                    spread[f"{title} ({end})"] = [getattr(cell, end) for cell in column]
            else:
                spread[title] = list(column)
        return {f"{self.name}.csv": pd.DataFrame(spread).to_csv(index=False, lineterminator="\n")}

    def markdown(self) -> str:
        sides = ["---:" if isinstance(entry, Cell) else "---" for entry in self.rows[0]]
        rows = [[str(entry) if isinstance(entry, Cell) else plain(entry) for entry in row] for row in self.rows]
        return "".join(f"| {' | '.join(row)} |\n" for row in (map(plain, self.columns), sides, *rows))


@dataclass
class Answers(Block):
    """A prompt with all models' answers to it.

    Attributes:
        reference: the data's answer.
        answers: (label of the model, answer, verdict).
    """

    title: str
    prompt: str
    reference: str
    answers: list[tuple[str, str, str]]

    def markdown(self) -> str:
        lines = [f"### {plain(self.title)}\n", f"**{plain(self.prompt)}**\n", f"- reference: {plain(self.reference)}"]
        lines += [f"- **{plain(label)}** ({plain(verdict)}): {plain(text)}" for label, text, verdict in self.answers]
        return "\n".join(lines) + "\n"
