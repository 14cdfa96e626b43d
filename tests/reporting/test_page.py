"""The page: complete, self-contained, and no text in it becomes markup."""

from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harmful_unlearn.reporting.blocks import answers, code, paragraph, table
from harmful_unlearn.reporting.page import page as make_page
from tests.helpers.comparisons import NASTY

PIECES = [
    *"\\`*_[]()|~$<>&!#+-.:{}'\"=/ \n\tabc1;", "&lt;", "&#60;", "<script>", "<br>", "http://a.b/", "](javascript:a)",
    "<!--", "-->", "<![CDATA[", "<?php", "```", "    code", "\n\n# a", "\x02amp\x03", "\x02wzxhzdk:0\x03", "[TOC]",
]  # fmt: skip


class Elements(HTMLParser):
    """Every start tag with its attributes, the text, and whether each tag is closed in order."""

    VOID = ("meta", "img", "br")

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page(three):
    return (three / "report.html").read_text(encoding="utf-8")


def test_html_is_complete_and_self_contained(page):
    elements = Elements(page)
    assert not elements.open
    sources = [attrs[name] for _, attrs in elements.tags for name in ("src", "href") if name in attrs]
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert [tag for tag, _ in elements.tags].count("img") == 6
    assert "@import" not in page and "url(" not in page
    headings = {attrs["id"] for tag, attrs in elements.tags if tag == "h2"}
    assert {source[1:] for source in sources if source.startswith("#")} == headings and len(headings) == 16
    policy = {attrs["content"] for _, attrs in elements.tags if attrs.get("http-equiv") == "Content-Security-Policy"}
    assert policy == {"default-src 'none'; img-src data:; style-src 'unsafe-inline'"}


def test_tables_are_tables(page):
    elements = Elements(page)
    tags = [tag for tag, _ in elements.tags]
    assert tags.count("table") == 15 and "| --- |" not in elements.text
    assert any(tag == "td" and "right" in attrs.get("style", "") for tag, attrs in elements.tags)


def test_untrusted_text_is_escaped(page, text):
    elements = Elements(page)
    assert not {tag for tag, _ in elements.tags} & {"script", "others"}
    assert not any(name.startswith("on") for _, attrs in elements.tags for name in attrs)
    assert f"unseen {NASTY}" in elements.text  # shown as it is
    assert "<script" not in text and "first \\| line<br>&lt;script&gt;" in text and "\\[a\\](b)" in text
    assert text.startswith("# SKU &amp; &lt;others&gt;\n")


def document(first: str, second: str) -> str:
    blocks = [
        paragraph(f"t{first}"),
        table(None, ["a", f"b{second}"], [[f"c{first}", f"{second}d"]]),
        answers("title", f"p{first}", second, [("label", first, "safe"), (f"l{second}", second, "harmful")]),
        code(f"e{first}", second),
    ]
    return make_page(f"page{first}", "\n".join(block.markdown for block in blocks), {})


def visible(text: str) -> str:
    """A text without what a browser does not show as it is: white space and control characters."""
    return "".join(sign for sign in text if sign.isprintable() and not sign.isspace())


TEXTS = st.lists(st.sampled_from(PIECES)).map("".join)


@settings(max_examples=100, deadline=None)
@given(TEXTS, TEXTS)
def test_any_text_is_shown_as_it_is(first, second):
    elements = Elements(document(first, second))
    usual = [(tag, sorted(attrs)) for tag, attrs in Elements(document("x", "y")).tags]
    assert [(tag, sorted(attrs)) for tag, attrs in elements.tags if tag != "br"] == usual and not elements.open
    shown = visible(elements.text)
    for text in (f"t{first}", f"c{first}", f"{second}d", f"p{first}", f"(safe): {first}", f"reference: {second}"):
        assert visible(text) in shown
