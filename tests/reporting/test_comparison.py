"""comparison.json."""

import json

import pytest

from harmful_unlearn.reporting.comparison import short_name
from tests.helpers.comparisons import comparison


def test_the_json_has_every_part_and_a_note_only_where_there_is_one():
    data = comparison()
    data.methods["ft"]["note"] = "seed 2: not trained"
    written = json.loads(data.to_json())
    assert list(written) == [
        "model", "seeds", "command", "settings", "methods", "judge", "flags", "inputs", "figures",
        "attacks", "sweep", "recommended", "categories", "oracle", "relearning", "trials", "answers",
        "losses", "provenance",
    ]  # fmt: skip
    assert written["methods"]["ft"] == {
        "label": "FT", "group": "main", "command": "train --ft", "note": "seed 2: not trained",
    }  # fmt: skip
    assert written["methods"]["base"] == {"label": "Original", "group": "main", "command": None}
    assert written["figures"] == data.figures


@pytest.mark.parametrize(
    "source, name",
    [
        ("facebook/opt-2.7b", "facebook/opt-2.7b"),
        ("gpt2", "gpt2"),
        ("/models/some/opt", "opt"),
        ("logs/demo/seed-{seed}/base", "demo (base of each seed)"),
        ("logs/demo/seed-{seed}/data/harmful.jsonl", "demo (harmful.jsonl of each seed)"),
        ("{seed}/base", "base of each seed"),
    ],
)
def test_a_path_is_called_by_its_last_parts_and_a_hub_id_as_it_is(source, name):
    assert short_name(source) == name
