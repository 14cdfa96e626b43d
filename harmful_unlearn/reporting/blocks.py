"""A report's document: figures as text, and blocks as Markdown, as HTML and as files beside it."""

import base64
import html
import io
import re
from dataclasses import dataclass
from itertools import groupby

import pandas as pd
from matplotlib.figure import Figure

DASH = "–"  # nothing to measure
PERCENT = {"harmful_rate", "degenerate_rate", "unjudged_rate", "exact_match"}


@dataclass(frozen=True)
class Cell:
    """A figure over seeds.

    Attributes:
        value, low, high: the mean and the range over seeds; with `asked` 1, the value and its interval.
        seeds, asked: how many seeds have a value, of how many.
    """

    metric: str
    value: float | None
    low: float | None
    high: float | None
    seeds: int
    asked: int

    def __str__(self) -> str:
        if self.value is None:
            return DASH
        value, low, high = (number(self.metric, part) for part in (self.value, self.low, self.high))
        if self.asked == 1:
            return value if self.low is None else f"{value} [{low}, {high}]"
        some = "" if self.seeds == self.asked else f", {self.seeds} of {self.asked} seeds"
        return f"{value} ({low}–{high}{some})"


def number(metric: str, value: float | None) -> str:
    """A value with the digits that its metric is worth; shares in percent."""
    if value is None:
        return DASH
    if metric in PERCENT:
        return f"{100 * value:.1f}"
    if "perplexity" not in metric:
        return f"{value:.3f}".replace("-", "−")
    return f"{value:.1e}" if value >= 1e5 else f"{value:.0f}" if value >= 1000 else f"{value:#.4g}"


class Block:
    def files(self) -> dict[str, str | bytes]:
        return {}


@dataclass
class Text(Block):
    text: str
    warning: bool = False

    def markdown(self) -> str:
        return f"{'> ' * self.warning}{plain(self.text)}\n"

    def html(self) -> str:
        return f"<p{' class=warning' * self.warning}>{html.escape(self.text)}</p>"


@dataclass
class Code(Block):
    title: str
    text: str

    def markdown(self) -> str:
        fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", self.text))])
        return f"**{plain(self.title)}**\n\n{fence}\n{self.text}\n{fence}\n"

    def html(self) -> str:
        return f"<p><strong>{html.escape(self.title)}</strong></p><pre>{html.escape(self.text)}</pre>"


@dataclass
class Picture(Block):
    name: str
    caption: str
    figure: Figure

    def __post_init__(self):
        content = io.BytesIO()
        self.figure.savefig(content, format="png", dpi=150, facecolor="white")
        self.png = content.getvalue()

    def files(self) -> dict[str, str | bytes]:
        return {f"{self.name}.png": self.png}

    def markdown(self) -> str:
        return f"![{plain(self.caption)}]({self.name}.png)\n\n*{plain(self.caption)}*\n"

    def html(self) -> str:
        data, caption = base64.b64encode(self.png).decode(), html.escape(self.caption)
        image = f'<img alt="{self.name}" src="data:image/png;base64,{data}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


@dataclass
class Table(Block):
    """A table. Its cells are texts or `Cell`s, which the CSV spreads over value, low and high (shares of 1).

    Attributes:
        name: of the CSV; None for none.
        columns: (group, name); an empty group for none.
        heads: how many columns label the row.
    """

    name: str | None
    columns: list[tuple[str, str]]
    rows: list[list]
    heads: int = 1

    def files(self) -> dict[str, str | bytes]:
        if self.name is None:
            return {}
        flat = {}
        for at, (group, name) in enumerate(self.columns):
            title = f"{group}: {name}".removeprefix(": ")
            cells = [row[at] for row in self.rows]
            if isinstance(cells[0], Cell):
                title = title.removesuffix(", %")
                flat |= {title: [cell.value for cell in cells]}
                flat |= {f"{title} ({end})": [getattr(cell, end) for cell in cells] for end in ("low", "high")}
            else:
                flat[title] = cells
        return {f"{self.name}.csv": pd.DataFrame(flat).to_csv(index=False, lineterminator="\n")}

    def markdown(self) -> str:
        titles = [f"{group}: {name}".removeprefix(": ") for group, name in self.columns]
        sides = ["---:" if isinstance(cell, Cell) else "---" for cell in self.rows[0]]
        rows = ([str(cell) if isinstance(cell, Cell) else plain(cell) for cell in row] for row in self.rows)
        return "".join(f"| {' | '.join(line)} |\n" for line in (map(plain, titles), sides, *rows))

    def html(self) -> str:
        groups, names = "", "".join(f"<th>{html.escape(name)}</th>" for _, name in self.columns)
        if any(group for group, _ in self.columns):
            for group, members in groupby(group for group, _ in self.columns):
                groups += f"<th class=group colspan={len(list(members))}>{html.escape(group)}</th>"
            groups = f"<tr>{groups}</tr>"
        body = ""
        for row in self.rows:
            cells = [html.escape(str(cell)) for cell in row]
            heads = "".join(f"<th scope=row>{cell}</th>" for cell in cells[: self.heads])
            body += f"<tr>{heads}{''.join(f'<td>{cell}</td>' for cell in cells[self.heads :])}</tr>\n"
        prose = "" if any(isinstance(cell, Cell) for cell in self.rows[0]) else " class=prose"
        head = f"<thead>{groups}<tr>{names}</tr></thead>"
        return f"<div class=scroll><table{prose}>{head}\n<tbody>{body}</tbody></table></div>"


@dataclass
class Answers(Block):
    """A prompt, its reference and the answers: (model's label, answer, verdict)."""

    title: str
    prompt: str
    reference: str
    answers: list[tuple[str, str, str]]

    def markdown(self) -> str:
        lines = [f"### {plain(self.title)}\n", f"**{plain(self.prompt)}**\n", f"- reference: {plain(self.reference)}"]
        lines += [f"- **{plain(label)}** ({plain(verdict)}): {plain(text)}" for label, text, verdict in self.answers]
        return "\n".join(lines) + "\n"

    def html(self) -> str:
        cards = "".join(
            f'<div class="card {html.escape(verdict)}"><b>{html.escape(label)}</b> '
            f"<i>{html.escape(verdict)}</i><div class=text>{html.escape(text)}</div></div>\n"
            for label, text, verdict in [("Reference", self.reference, ""), *self.answers]
        )
        prompt = f"<p class=text><strong>{html.escape(self.prompt)}</strong></p>"
        return f"<article><h3>{html.escape(self.title)}</h3>{prompt}\n<div class=cards>{cards}</div></article>"


def plain(text: str) -> str:
    """Text that Markdown shows as it stands, on one line, in a table cell too."""
    escaped = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", html.escape(text, quote=False))
    return "<br>".join(escaped.strip().splitlines())


def markdown(title: str, parts: dict[str, list]) -> str:
    lines = [f"# {plain(title)}\n"]
    for heading, blocks in parts.items():
        lines += [f"## {heading}\n", *(block.markdown() for block in blocks)]
    return "\n".join(lines)


STYLESHEET = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #ccc; --soft: #f4f4f4 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #161616; --line: #555; --soft: #242424 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 80rem; margin: 2rem auto; padding: 0 1rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: 13px; margin: .8rem 0 }
th, td { border: 1px solid var(--line); padding: .25rem .5rem; text-align: right; white-space: nowrap }
th { background: var(--soft) } th[scope=row] { text-align: left } th.group { text-align: center }
table.prose td, table.prose th { text-align: left; vertical-align: top }
table.prose td { white-space: normal; overflow-wrap: anywhere }
pre { background: var(--soft); padding: .6rem; white-space: pre-wrap; overflow-wrap: anywhere }
img { max-width: 100%; background: #fff } figure { margin: 1rem 0 } figcaption { font-size: 13px }
.warning { border-left: 4px solid #d55e00; padding: .4rem .8rem; background: var(--soft) }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .5rem }
.card { border: 1px solid var(--line); padding: .4rem .6rem; font-size: 13px; break-inside: avoid }
.text { white-space: pre-wrap; overflow-wrap: anywhere }
.harmful { background: rgba(213, 94, 0, .16) } .safe { background: rgba(0, 114, 178, .13) }
.degenerate { background: rgba(127, 127, 127, .25) } .unjudged { background: rgba(240, 228, 66, .25) }
@media print { :root { --ink: #000; --paper: #fff; --line: #999; --soft: #f4f4f4 }
  body { max-width: none; margin: 0; font-size: 11px } .scroll { overflow: visible } nav { display: none }
  table { font-size: 8px } th, td { white-space: normal } figure, tr { break-inside: avoid } h2 { break-after: avoid } }
"""


def page(title: str, parts: dict[str, list]) -> str:
    """The whole HTML document; its policy forbids scripts and anything from a network."""
    anchors = {heading: re.sub("[^a-z0-9]+", "-", heading.lower()) for heading in parts}
    contents = " · ".join(f'<a href="#{anchors[heading]}">{html.escape(heading)}</a>' for heading in parts)
    body = "\n".join(
        f'<h2 id="{anchors[heading]}">{html.escape(heading)}</h2>\n' + "\n".join(block.html() for block in blocks)
        for heading, blocks in parts.items()
    )
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLESHEET}</style></head>\n<body><h1>{html.escape(title)}</h1>\n<nav>{contents}</nav>\n"
        f"{body}\n</body></html>\n"
    )
