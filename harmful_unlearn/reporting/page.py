"""A Markdown report as one HTML file."""

import base64
import html
import re

from markdown import Markdown
from markdown.extensions.toc import TocExtension
from markdown.inlinepatterns import SubstituteTagInlineProcessor

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # no scripts, nothing from a network
STYLESHEET = """
:root { color-scheme: light dark; --line: #888; --soft: rgba(127, 127, 127, .12) }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem;
  overflow-wrap: anywhere }
nav ul { display: flex; flex-wrap: wrap; gap: 0 1.2rem; list-style: none; padding: 0 }
table { display: block; overflow-x: auto; border-collapse: collapse; font-size: 13px; margin: .8rem 0 }
th, td { border: 1px solid var(--line); padding: .25rem .5rem; text-align: left; vertical-align: top }
th { background: var(--soft); min-width: 4rem } td[style] { white-space: nowrap }
pre { background: var(--soft); padding: .6rem; white-space: pre-wrap }
blockquote { border-left: 4px solid #d55e00; padding: .1rem .8rem; margin: 1rem 0; background: var(--soft) }
img { max-width: 100%; background: #fff }
@media print { nav { display: none } body { max-width: none; margin: 0; font-size: 11px } table { font-size: 8px }
  img, tr { break-inside: avoid } h2 { break-after: avoid } td[style] { white-space: normal } }
"""


def page(title: str, text: str, pictures: dict[str, bytes]) -> str:
    """The whole page.

    Args:
        text: Markdown. HTML in it is shown as text, except for <br>.
        pictures: the PNG files that `text` shows, by name; they become a part of the page.
    """
    parser = Markdown(extensions=["tables", "fenced_code", TocExtension(toc_depth="2-2")], output_format="html")
    parser.preprocessors.deregister("html_block")
    parser.inlinePatterns.deregister("html")
    parser.inlinePatterns.register(SubstituteTagInlineProcessor("<br>", "br"), "br", 90)
    parser.ESCAPED_CHARS += ["~", "$"]  # as in GitHub's Markdown, for which `blocks.plain` escapes

    body = parser.convert(text)
    for name, png in pictures.items():
        source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        body = re.sub(rf'(<img [^>]*src="){re.escape(name)}"', rf'\g<1>{source}"', body)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLESHEET}</style></head>\n<body>\n<nav>{parser.toc}</nav>\n{body}\n</body></html>\n"
    )
