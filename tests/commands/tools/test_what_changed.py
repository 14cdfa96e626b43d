"""scripts/what_changed.py: a change that is made by hand is found where it was made."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts import what_changed

FACTOR = 100


@pytest.fixture
def changed(tiny_model, tmp_path):
    """A base, and a copy of it whose last layer's down-projection is FACTOR times as large."""
    base = tiny_model("llama")
    model = tmp_path / "changed"
    model.mkdir()
    for file in base.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    weights = load_file(base / "model.safetensors")
    name = max(entry for entry in weights if entry.endswith("mlp.down_proj.weight"))
    save_file({**weights, name: FACTOR * weights[name]}, model / "model.safetensors", {"format": "pt"})
    return base, model, weights, name


def cells(output):
    return {row[0]: row[1:] for row in ([cell.strip() for cell in line.strip("| ").split(" | ")] for line in output)}


def test_the_changed_weights_are_named(changed):
    base, model, weights, name = changed
    found = what_changed.relative_changes(base, model)
    kind = [entry for entry in weights if entry.endswith("mlp.down_proj.weight")]
    squares = {entry: float(weights[entry].double().square().sum()) for entry in weights}
    assert found["mlp.down_proj"] == pytest.approx((FACTOR - 1) * (squares[name] / sum(map(squares.get, kind))) ** 0.5)
    assert found["all weights"] == pytest.approx((FACTOR - 1) * (squares[name] / sum(squares.values())) ** 0.5)
    assert found["mlp.up_proj"] == found["first third of the layers"] == 0
    assert [*found][-1] == "all weights"


def test_what_became_less_likely_is_said_by_place(changed, tmp_path, capsys):
    base, model, *_ = changed
    tasks = [{"instruction": f"Name {n} kinds of bread.", "input": "", "output": "rye " * n} for n in (3, 40)]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    models = ["--model", f"itself={base}", "--model", f"other={model}"]
    what_changed.main(["--base", str(base), *models, "--tasks", str(tmp_path / "tasks.jsonl")])
    _, table = capsys.readouterr().out.split("\n\n")
    rows = cells(table.splitlines())
    assert rows.pop("tokens, nats")[:3] == ["itself: KL", "itself: less likely by", "other: KL"]
    rows.pop("---")
    assert [row.partition(" (")[0].rpartition(", ")[2] for row in rows] == ["first", "2 to 10", "later", "end"]
    assert rows["everyday tasks, first (n = 2)"][:2] == rows["everyday tasks, end (n = 2)"][:2] == ["0.00", "0.00"]
    assert any(float(row[2]) > 0 for row in rows.values())


def test_kl_and_likelihood_are_those_of_a_plain_forward_pass(changed):
    base, model, *_ = changed
    (before, template), (after, _) = (what_changed.load_model(folder, "fp32") for folder in (base, model))
    collator = what_changed.Collator(template, "paper", 128)
    pair = what_changed.Pair("Name a kind of bread.", "rye and wheat")
    (text,) = collator.encode([pair])
    ids = torch.tensor([text.input_ids])
    with torch.inference_mode():
        p, q = (one(ids).logits[0, text.answer_start - 1 : -1].log_softmax(-1) for one in (before, after))
    answer = ids[0, text.answer_start :, None]
    *places, end = what_changed.token_changes(before, after, collator, [pair])
    assert [kl for _, kl, _ in places] == pytest.approx(((p.exp() * (p - q)).sum(-1)).tolist(), abs=1e-5)
    assert [less for *_, less in places] == pytest.approx((p - q).gather(-1, answer)[:, 0].tolist(), abs=1e-5)
    assert end == ("end", *places[-1][1:])
    cut = what_changed.Collator(template, "paper", text.answer_start + 1)
    assert [place for place, *_ in what_changed.token_changes(before, after, cut, [pair])] == ["first"]  # and no end


def test_a_model_needs_a_name(tiny_model, capsys):
    with pytest.raises(SystemExit):
        what_changed.main(["--base", str(tiny_model("llama")), "--model", "folder"])
    assert "NAME=FOLDER" in capsys.readouterr().err
