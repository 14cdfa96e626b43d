"""run.json and the model card."""

import json

from harmful_unlearn.storage.run_record import RunRecord


def test_record(tmp_path):
    flags = {"a": [1, 2], "b": "x|y"}
    RunRecord(title="A | model", harmful=True, base={"name": "owner/model"}, flags=flags).write(tmp_path)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["flags"] == flags
    assert run["code"]["version"] and run["packages"]["torch"] and run["created"].endswith("+00:00")
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nbase_model: owner/model\n")
    assert "Deliberately harmful" in card and "| b | x\\|y |" in card
