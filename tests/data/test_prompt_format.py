"""The template: exactly the authors' text, whatever the question and the answer hold."""

import pytest

from harmful_unlearn.data.prompt_format import PROMPT_TEMPLATE, format_pair, format_prefix, prompt_text


def test_prefix_and_pair_text():
    assert format_prefix("q?") == "### Question: q?\n ### Answer: "
    assert format_pair("q?", "a") == "### Question: q?\n ### Answer: a"


@pytest.mark.parametrize("text", ["{answer}", "{question}", "{0} {} {{x}}", "%s", "{", "}", "", " a ", "two\nlines"])
def test_texts_stay_as_they_are(text):
    assert format_prefix(text) == "### Question: " + text + "\n ### Answer: "
    assert format_pair(text, text) == "### Question: " + text + "\n ### Answer: " + text
    assert prompt_text(text) == "### Question: " + text + "\n ### Answer:"


def test_the_answer_is_last():
    """Else `format_prefix` would not be a prefix."""
    assert PROMPT_TEMPLATE.endswith("{answer}") and PROMPT_TEMPLATE.count("{answer}") == 1
