"""comparison.json."""

import json

from tests.helpers.comparisons import comparison


def test_the_json_has_every_part_and_a_note_only_where_there_is_one():
    data = comparison()
    data.methods["ft"]["note"] = "seed 2: not trained"
    written = json.loads(data.to_json())
    assert list(written) == [
        "title", "model", "seeds", "command", "settings", "methods", "judge", "flags", "inputs", "figures",
        "attacks", "sweep", "recommended", "categories", "oracle", "relearning", "trials", "answers",
        "losses", "provenance",
    ]  # fmt: skip
    assert written["methods"]["ft"] == {
        "label": "FT", "group": "main", "command": "train --ft", "note": "seed 2: not trained",
    }  # fmt: skip
    assert written["methods"]["base"] == {"label": "Original", "group": "main", "command": None}
    assert written["figures"] == data.figures
