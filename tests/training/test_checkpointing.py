"""Checkpoints: which are kept, which are complete, and what is in them."""

import json
import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from harmful_unlearn.errors import UserError
from harmful_unlearn.training import checkpointing, setup
from harmful_unlearn.training.checkpointing import TrainingCheckpoints, check_complete
from harmful_unlearn.unlearn_harm_new import main
from tests.helpers.running.resumed import flags, run

FC1 = "model.decoder.layers.0.fc1.weight"


def test_checkpoints_are_kept_pruned_and_stage_1_models_in_themselves(tiny_model, tmp_path, monkeypatch):
    base, seen = tiny_model("opt"), []
    prune = TrainingCheckpoints.prune

    def look(self):
        prune(self)
        seen.append(self.steps())

    monkeypatch.setattr(TrainingCheckpoints, "prune", look)
    monkeypatch.setattr(TrainingCheckpoints, "remove", lambda self: None)
    assert run(base, tmp_path, "--save_every", "1", "--keep_checkpoints", "2") == 0
    assert seen == [[1], [2, 1], [3, 2], [4, 3], [5, 4]]
    kept = tmp_path / "harmful.checkpoints" / "step-5"
    check_complete(kept)
    assert json.loads((kept / "run.json").read_text())["training"]["steps"] == 5
    assert "Deliberately harmful" in (kept / "README.md").read_text()
    assert run(base, tmp_path / "negated", "--saved_model", str(kept)) == 0
    assert (tmp_path / "negated" / "unlearned" / "model.safetensors").exists()


def test_a_broken_checkpoint_keeps_no_place(tiny_model, tmp_path, stop_after, capsys):
    """Of one to keep, that is; what is saved after it is."""
    base = tiny_model("opt")
    stop_after(4)
    assert run(base, tmp_path) == 143
    (tmp_path / "harmful.checkpoints" / "step-5" / "config.json").unlink()
    stop_after(2)
    assert run(base, tmp_path, "--resume") == 143
    said = capsys.readouterr()
    assert "step-5 is not complete, and is not used" in said.out
    assert "its checkpoint is" in said.err and TrainingCheckpoints(tmp_path / "harmful", 1).steps() == [3]


def test_a_checkpoint_is_negated_beside_its_own_run(stopped, tiny_model):
    assert run(tiny_model("opt"), stopped, "--saved_model", str(stopped / "harmful.checkpoints" / "step-3")) == 0


@pytest.mark.parametrize(
    "file, change, said",
    [
        ("optimizer", {f"{FC1}.exp_avg": torch.zeros(3, 3)}, "exp_avg in .* fits no weight"),
        ("optimizer", {f"{FC1}.exp_avg": torch.zeros(64, 32, dtype=torch.float64)}, "exp_avg in .* fits no weight"),
        ("optimizer", {f"{FC1}.step": torch.zeros(5)}, "step in .* fits no weight"),
        ("optimizer", {"another.exp_avg": torch.zeros(3)}, "another.exp_avg in .* fits no weight"),
        ("optimizer", {f"{FC1}.exp_avg": None}, f"lacks moments of {FC1}"),
        ("random", {"cpu": torch.zeros(1, 7, dtype=torch.uint8)}, "holds no states"),
        ("random", {"cpu": torch.zeros(1, 5056)}, "holds no states"),
        ("model", {FC1: torch.full((64, 32), float("nan"))}, "has NaN or infinite values"),
    ],
)
def test_a_checkpoint_that_was_tampered_with_is_refused(file, change, said, stopped, tiny_model, capsys):
    path = stopped / "harmful.checkpoints" / "step-3" / f"{file}.safetensors"
    changed = {name: value for name, value in {**load_file(path), **change}.items() if value is not None}
    save_file(changed, path, {"format": "pt"})
    assert run(tiny_model("opt"), stopped, "--resume") == 2
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize("text", ["3\n4\n5\n", '{"step": 1}\n', '{"a": 1}\n' * 3, "[]\n"])
def test_metrics_that_are_not_the_steps_make_no_checkpoint(text, stopped):
    checkpoint = TrainingCheckpoints(stopped / "harmful", 1).newest()
    (checkpoint / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match="use another checkpoint"):
        check_complete(checkpoint)


def test_a_folder_that_is_no_checkpoint_is_refused(tiny_model, tmp_path):
    with pytest.raises(UserError, match="is not a complete checkpoint"):
        main(flags(tiny_model("opt"), tmp_path, "--resume", str(tiny_model("opt"))))
    assert checkpointing.TrainingCheckpoints(tmp_path / "harmful", 1).newest() is None


def test_others_may_read_what_the_umask_lets_them(tiny_model, tmp_path):
    before = os.umask(0o027)
    try:
        assert run(tiny_model("opt"), tmp_path) == 0
    finally:
        os.umask(before)
    for folder in (tmp_path / "harmful", tmp_path / "unlearned"):
        assert folder.stat().st_mode & 0o777 == 0o750
        assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o640}


def test_a_resumed_run_needs_no_second_room_for_its_checkpoint(stopped, tiny_model, monkeypatch):
    needed = []
    monkeypatch.setattr(setup, "check_disk", lambda folder, size: needed.append(size))
    assert run(tiny_model("opt"), stopped / "fresh", "--save_every", "2") == 0
    there = sum(file.stat().st_size for file in (stopped / "harmful.checkpoints" / "step-3").iterdir())
    assert run(tiny_model("opt"), stopped, "--save_every", "2", "--resume") == 0
    assert needed == [needed[0], needed[0] - there]
    assert run(tiny_model("opt"), stopped, "--save_every", "2", "--resume") == 0  # nothing is left to do
    assert len(needed) == 2
