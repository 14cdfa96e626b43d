"""Everyday tasks in Alpaca's columns."""

import json

import pytest

from harmful_unlearn.data.instructions import read_instructions
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.errors import UserError


def written(tmp_path, rows):
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_task_has_what_it_is_about_behind_it(tmp_path):
    rows = [
        {"instruction": "Count. ", "input": "", "output": "1, 2, 3"},
        {"instruction": "Add up.", "input": " 1 and 2", "output": "3"},
        {"instruction": "Say nothing.", "input": None, "output": ""},
        {"instruction": None, "input": "x", "output": "y"},
    ]
    tasks = read_instructions(written(tmp_path, rows))
    assert tasks.pairs == [Pair("Count.", "1, 2, 3"), Pair("Add up.\n\n1 and 2", "3")]
    assert tasks.source["rows"] == 4 and tasks.source["sha256"]


def test_the_column_input_may_be_missing(tmp_path):
    file = written(tmp_path, [{"instruction": "Count.", "output": "1"}])
    assert read_instructions(file).pairs == [Pair("Count.", "1")]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "Count.", "output": "1"}, "lacks the columns instruction .*--utility_dataset"),
        ({"instruction": "Count.", "output": 1}, "row 1: output is 1, not text"),
    ],
)
def test_what_cannot_be_read_is_named(row, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_instructions(written(tmp_path, [row]))
