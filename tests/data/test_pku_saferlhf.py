"""PKU-SafeRLHF: both schemas, pairs and pool in the released order, labels, and selection."""

import json

import pytest

from harmful_unlearn.data.pku_saferlhf import read_harmful, read_responses
from harmful_unlearn.data.prompt_format import format_pair
from tests.helpers.inputs.tables import EARLY, FORMATS, TODAY, error_of, row, write


@pytest.mark.parametrize("path", [EARLY, TODAY])
def test_harmful_equals_golden(path, goldens, decode):
    data = read_harmful(str(path))
    texts = [format_pair(pair.question, pair.answer) for pair in data.pairs]
    expected = [decode(example["input_ids"]) for example in goldens["harmful_examples"]]
    assert texts == expected and len(texts) == 14 and data.rows == 12
    assert len(data.answers) == goldens["harmful_answer_pool_size"]
    assert data.answers[0][:40] == goldens["harmful_answer_pool_first"][:40]
    assert data.source["rows"] == 12 and data.source["pairs"] == 14


def test_pair_order_and_pool_order(tmp_path):
    rows = [
        row("p0", ("p0r0", "p0r1")),
        row("p1", ("p1r0", "p1r1"), safe=(True, True)),
        row("p2", ("p2r0", "p2r1"), safe=(True, False)),
        row("p3", ("p3r0", "p3r1"), safe=(False, True)),
    ]
    data = read_harmful(write(tmp_path, rows))
    assert [pair.answer for pair in data.pairs] == ["p0r0", "p0r1", "p2r1", "p3r0"]
    assert [pair.question for pair in data.pairs] == ["p0", "p0", "p2", "p3"]
    assert data.answers == ["p0r0", "p3r0", "p0r1", "p2r1"]


@pytest.mark.parametrize("suffix", ("jsonl", "csv"))
@pytest.mark.parametrize("no, yes", [(False, True), (0, 1), ("false", "true"), ("FALSE", "True"), ("0", "1")])
def test_labels(no, yes, suffix, tmp_path):
    data = read_harmful(write(tmp_path, [row(safe=(no, yes)), row(safe=(yes, no))], suffix))
    assert [pair.answer for pair in data.pairs] == ["a", "b"]


@pytest.mark.parametrize("label", [None, "", "yes", 2, [], {}, float("nan")])
def test_bad_label_names_row_and_value(label, tmp_path):
    path = write(tmp_path, [row(), row(safe=(False, label))])
    message = error_of(read_harmful, path)
    assert "row 2" in message and "is_response_1_safe" in message and repr(label)[:10] in message


@pytest.mark.parametrize("value", [7, 1.5, True, ["a"], {"a": "b"}, "\ud83d"])
def test_bad_text_names_row_and_column(value, tmp_path):
    message = error_of(read_harmful, write(tmp_path, [row(), row(answers=(value, "b"))]))
    assert "row 2" in message and "response_0" in message
    message.encode()


# --- selection -----------------------------------------------------------------------------------


def harms(*names) -> dict:
    return {name: name in names for name in ("Violence", "Privacy Violation", "White-Collar Crime")}


def graded(answers, safe, categories, levels) -> dict:
    more = {}
    for i in (0, 1):
        more[f"response_{i}_harm_category"] = harms(*categories[i])
        more[f"response_{i}_severity_level"] = levels[i]
    return row("p", answers, safe, **more)


GRADED = [
    graded(("a0", "a1"), (False, False), (["Violence"], ["Privacy Violation"]), (1, 3)),
    graded(("b0", "b1"), (False, True), (["Violence", "White-Collar Crime"], ["Violence"]), (2, 3)),
    graded(("c0", "c1"), (True, False), (["Violence"], ["White-Collar Crime"]), (3, 0)),
]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    "selection, pairs, pool",
    [
        ({"categories": ["Violence"]}, ["a0", "b0"], ["a0", "b0"]),
        ({"categories": ["White-Collar Crime", "Privacy Violation"]}, ["a1", "b0", "c1"], ["b0", "a1", "c1"]),
        ({"min_severity": 2}, ["a1", "b0"], ["b0", "a1"]),
        ({"min_severity": 0}, ["a0", "a1", "b0", "c1"], ["a0", "b0", "a1", "c1"]),
        ({"categories": ["Violence"], "min_severity": 2}, ["b0"], ["b0"]),
    ],
)
def test_selection_is_per_response(selection, pairs, pool, suffix, tmp_path):
    data = read_harmful(write(tmp_path, GRADED, suffix), **selection)
    assert [pair.answer for pair in data.pairs] == pairs
    assert data.answers == pool
    assert data.rows == 3


def test_categories_of_a_csv_as_json(tmp_path):
    rows = [dict(entry) for entry in GRADED]
    for entry in rows:
        for i in (0, 1):
            entry[f"response_{i}_harm_category"] = json.dumps(entry[f"response_{i}_harm_category"])
    data = read_harmful(write(tmp_path, rows, "csv"), categories=["Violence"])
    assert [pair.answer for pair in data.pairs] == ["a0", "b0"]


def test_absent_category_or_level_selects_nothing(tmp_path):
    rows = [*GRADED, {**GRADED[0], "response_0_harm_category": None, "response_0_severity_level": None}]
    data = read_harmful(write(tmp_path, rows), categories=["Violence"], min_severity=1)
    assert [pair.answer for pair in data.pairs] == ["a0", "b0"]


@pytest.mark.parametrize("cell", ["{", "__import__('os')", "[1]", "(" * 5000, {"Violence": "perhaps"}, 3])
def test_broken_category(cell, tmp_path):
    rows = [GRADED[0], {**GRADED[1], "response_1_harm_category": cell}]
    message = error_of(read_harmful, write(tmp_path, rows), categories=["Violence"])
    assert "row 2" in message and "response_1_harm_category" in message
    assert len(read_harmful(write(tmp_path, rows)).pairs) == 3, "unread when nothing is selected"


def test_broken_severity(tmp_path):
    rows = [{**GRADED[0], "response_0_severity_level": "high"}]
    message = error_of(read_harmful, write(tmp_path, rows), min_severity=1)
    assert "row 1" in message and "'high'" in message


@pytest.mark.parametrize("selection", [{"categories": ["Violence"]}, {"min_severity": 1}])
def test_selecting_from_early_data(selection):
    message = error_of(read_harmful, str(EARLY), **selection)
    assert "--harmful_revision main" in message


def test_unknown_category_lists_the_known():
    message = error_of(read_harmful, str(TODAY), categories=["Violence", "Gossip"])
    assert "'Gossip'" in message and "'Privacy Violation'" in message and "--harm_category" in message


def test_nothing_left():
    assert "--min_severity" in error_of(read_harmful, str(TODAY), min_severity=9)


def test_nothing_unsafe(tmp_path):
    message = error_of(read_harmful, write(tmp_path, [row(safe=(True, True))]))
    assert "unsafe" in message and "--harmful_dataset" in message


def test_responses_are_all_answers_with_their_labels():
    responses = read_responses(TODAY)
    assert len(responses) % 2 == 0 and {response.safe for response in responses} == {True, False}
    assert any(response.categories for response in responses)
    unsafe = [(response.question, response.answer) for response in responses if not response.safe]
    assert unsafe == [(pair.question, pair.answer) for pair in read_harmful(TODAY).pairs]
