"""A Markdown report as one HTML file, with its pictures, style and script."""

import base64
import hashlib
import html
import re
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement

from markdown import Markdown
from markdown.extensions.toc import TocExtension
from markdown.inlinepatterns import InlineProcessor, SubstituteTagInlineProcessor
from markdown.treeprocessors import Treeprocessor

from harmful_unlearn.reporting.blocks import slug

ASSETS = Path(__file__).with_name("assets")
STYLE = (ASSETS / "style.css").read_text(encoding="utf-8")
SORT = (ASSETS / "sort.js").read_text(encoding="utf-8")
# No script but this one, and nothing from a network. Pictures and table cells have styles of their own.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    f"script-src 'sha256-{base64.b64encode(hashlib.sha256(SORT.encode()).digest()).decode()}'"
)


class _Anchors(InlineProcessor):
    """<a id="..."></a>, as `blocks.Link` writes it."""

    def handleMatch(self, m, data):
        return Element("a", id=m[1]), m.start(0), m.end(0)


class _Layout(Treeprocessor):
    """Tables and pictures scroll by themselves; rows have heads; intervals, and prompts in a head, are in small."""

    def run(self, root):
        for table in root.findall("table"):
            root[list(root).index(table)] = _scrolling(table)
            for head in table.iterfind("thead/tr/th"):
                head.set("scope", "col")
                prompts, colon, metric = (head.text or "").partition(": ")
                if colon:
                    head.text = None
                    SubElement(head, "small").text = f"{prompts}{colon}"
                    head[0].tail = metric
            for row in table.iterfind("tbody/tr"):
                row[0].tag = "th"
                row[0].set("scope", "row")
                for cell in row.iterfind("td[@style]"):
                    value, space, interval = (cell.text or "").partition(" ")
                    if space:
                        cell.text = f"{value} "
                        SubElement(cell, "small").text = interval
        for picture, caption in zip(root[:], root[1:], strict=False):
            image, text = picture.find("img"), caption.find("em")
            if picture.tag == "p" and image is not None and text is not None:
                figure = Element("figure")
                text.tag = "figcaption"
                figure.extend([_scrolling(image), text])
                root[list(root).index(picture)] = figure
                root.remove(caption)


def _scrolling(element: Element) -> Element:
    area = Element("div", {"class": "scroll", "tabindex": "0"})
    area.append(element)
    return area


def page(title: str, text: str, pictures: dict[str, str]) -> str:
    """The whole page.

    Args:
        text: Markdown. HTML in it is shown as text, except for <br> and anchors, <a id="..."></a>.
        pictures: the SVG files that `text` shows, by name; they become a part of the page.
    """
    parser = Markdown(
        extensions=["tables", "fenced_code", TocExtension(toc_depth="2-2", slugify=slug)], output_format="html"
    )
    parser.preprocessors.deregister("html_block")
    parser.inlinePatterns.deregister("html")
    parser.inlinePatterns.register(SubstituteTagInlineProcessor("<br>", "br"), "br", 90)
    parser.inlinePatterns.register(_Anchors(r'<a id="([\w-]+)"></a>'), "anchors", 90)
    parser.treeprocessors.register(_Layout(), "layout", 5)  # after the inline patterns
    parser.ESCAPED_CHARS += ["~", "$"]  # as in GitHub's Markdown, for which `blocks.plain` escapes

    body = parser.convert(text)
    for name, svg in pictures.items():
        upto, _, rest = body.partition(f'" src="{name}">')
        before, _, alt = upto.rpartition('<img alt="')
        stem = name.removesuffix(".svg")
        body = f'{before}<svg role="img" class="{stem}" aria-label="{alt}"{_inline(stem, svg)}{rest}'
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style></head>\n<body>\n"
        f"<nav><details><summary>Contents</summary>{parser.toc}</details></nav>\n"
        f"<main>{body}</main>\n<script>{SORT}</script>\n</body></html>\n"
    )


def _inline(name: str, svg: str) -> str:
    """What follows "<svg" in a file, with ids that no other picture has."""
    used = set(re.findall(r'(?:xlink:href="|url\()#([^")]+)', svg))

    def own(match: re.Match) -> str:
        return f'{match[1]} id="{name}-{match[2]}"' if match[2] in used else match[1]

    renamed = re.sub(r'(<\w+) id="([^"]*)"', own, svg.partition("<svg")[2])
    return re.sub(r'(xlink:href="|url\()#', rf"\g<1>#{name}-", renamed)
