"""A training of a comparison: stopped, it continues from its checkpoint."""

import pytest

from harmful_unlearn.comparison.trainings import plan, train
from harmful_unlearn.errors import Stopped, UserError
from harmful_unlearn.training.engine import Engine
from tests.helpers.inputs.world import make_world


def test_a_stopped_training_continues_from_its_checkpoint(tmp_path, monkeypatch):
    make_world(tmp_path, 0)
    flags = {
        "model_name": tmp_path / "base", "harmful_dataset": tmp_path / "data" / "harmful.jsonl",
        "normal_dataset": tmp_path / "data" / "normal.csv", "method": "task_vector", "max_unlearn_steps": 3,
        "batch_size": 2, "lr": 1e-3, "precision": "fp32", "save_every": 1,
    }  # fmt: skip
    whole = train(*plan(tmp_path / "whole", tmp_path / "base", flags))
    save = Engine._save_checkpoint

    def saving(engine):
        save(engine)
        if len(engine.log.history) == 2:
            raise Stopped(15, "stopped after step 2")

    monkeypatch.setattr(Engine, "_save_checkpoint", saving)
    with pytest.raises(Stopped, match="stopped: the same command continues it"):
        train(*plan(tmp_path / "stopped", tmp_path / "base", flags))
    monkeypatch.setattr(Engine, "_save_checkpoint", save)
    with pytest.raises(UserError, match="stopped was trained with --lr 0.001.*remove that folder"):
        plan(tmp_path / "stopped", tmp_path / "base", {**flags, "lr": 5e-4})
    continued = train(*plan(tmp_path / "stopped", tmp_path / "base", flags))
    log = (continued.folder / "run.log").read_text()
    assert log.count("step 1/3") == log.count("step 3/3") == 1
    weights = [(model.unlearned / "model.safetensors").read_bytes() for model in (continued, whole)]
    assert weights[0] == weights[1]
