"""The page: complete, self-contained, and no text in it becomes markup."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harmful_unlearn.reporting.blocks import Answer, Link, answers, code, paragraph, points, table
from harmful_unlearn.reporting.page import page as make_page
from tests.helpers.comparisons import METHODS, NASTY

PIECES = [
    *"\\`*_[]()|~$<>&!#+-.:{}'\"=/ \n\tabc1;", "&lt;", "&#60;", "<script>", "<br>", "http://a.b/", "](javascript:a)",
    "<!--", "-->", "<![CDATA[", "<?php", "```", "    code", "\n\n# a", "\x02amp\x03", "\x02wzxhzdk:0\x03", "[TOC]",
]  # fmt: skip


class Elements(HTMLParser):
    """Every start tag with its attributes, the text, and whether each tag is closed in order."""

    VOID = ("meta", "br")

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
    sources += [attrs["xlink:href"] for _, attrs in elements.tags if "xlink:href" in attrs]
    sources += re.findall(r"url\(([^)]*)\)", page)
    assert all(source.startswith("#") for source in sources) and "@import" not in page
    places = [attrs["id"] for _, attrs in elements.tags if "id" in attrs]
    assert {source[1:] for source in sources} <= set(places) and len(places) == len(set(places))
    pictures = [attrs for tag, attrs in elements.tags if tag == "svg"]
    assert len(pictures) == 6 and all(attrs["role"] == "img" and attrs["aria-label"] for attrs in pictures)
    assert "<title>Unlearning methods compared on tiny/&lt;model&gt; &amp; co</title>" in page


def test_only_the_pages_own_script_may_run(page):
    [script] = re.findall(r"<script>(.*?)</script>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    [policy] = [attrs["content"] for _, attrs in Elements(page).tags if attrs.get("http-equiv")]
    assert policy == (
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
        f"script-src 'sha256-{digest}'"
    )


def test_rows_lead_to_answers_and_back(page):
    tags = Elements(page).tags
    rows = {attrs["href"] for tag, attrs in tags if tag == "a" and attrs.get("href", "").startswith("#answer-")}
    assert {f"#answer-{name}-1" for name in list(METHODS)[:6]} <= rows  # the others gave no answer
    assert ("a", {"href": "#row-sku"}) in tags and ("a", {"id": "row-sku"}) in tags
    assert ("a", {"href": "#answer-sku-4"}) in tags and ("a", {"href": "#answer-sku-5"}) not in tags


def test_tables_are_tables(page):
    elements = Elements(page)
    tags = [tag for tag, _ in elements.tags]
    assert tags.count("table") == 15 and "| --- |" not in elements.text
    assert any(tag == "td" and "right" in attrs.get("style", "") for tag, attrs in elements.tags)
    assert ("th", {"scope": "row"}) in elements.tags and ("th", {"scope": "col"}) in elements.tags
    scrolls = [attrs.get("tabindex") for tag, attrs in elements.tags if attrs.get("class") == "scroll"]
    assert scrolls == ["0"] * 21  # the tables and the pictures


def test_headings_have_the_anchors_that_github_gives_them():
    text = "# A\n\n## Harm, 100 % & more_of (it)\n\n## Harm\n"
    ids = [attrs["id"] for tag, attrs in Elements(make_page("", text, {})).tags if tag == "h2"]
    assert ids == ["harm-100---more_of-it", "harm"]


def test_untrusted_text_is_escaped(page, text):
    elements = Elements(page)
    tags = [tag for tag, _ in elements.tags]
    assert tags.count("script") == 1 and "model" not in tags
    assert not any(name.startswith("on") for _, attrs in elements.tags for name in attrs)
    assert f"unseen {NASTY}" in elements.text  # shown as it is
    assert "<script" not in text and "first \\| line<br>&lt;script&gt;" in text and "\\[a\\](b)" in text
    assert text.startswith("# Unlearning methods compared on tiny/&lt;model&gt; &amp; co\n")


def document(first: str, second: str) -> str:
    blocks = [
        paragraph(f"t{first}"),
        points({f"s{first}": second}),
        table(None, ["a", f"b{second}"], [[f"c{first}", f"{second}d"], [Link(f"m{first}", "there", "here"), "e"]]),
        answers(
            "title",
            f"p{first}",
            second,
            [Answer(Link("label"), first, "safe"), Answer(Link(f"l{second}", "a", "b"), second, "harmful", "c")],
        ),
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
    # Line breaks, and what stands before a colon in a column's title, have elements of their own.
    found = [(tag, sorted(attrs)) for tag, attrs in elements.tags if tag not in ("br", "small")]
    assert found == usual and not elements.open
    shown = visible(elements.text)
    for text in (
        f"t{first}",
        f"c{first}",
        f"{second}d",
        f"p{first}",
        f"(safe): {first}",
        f"reference: {second}",
        f"m{first}",
    ):
        assert visible(text) in shown
