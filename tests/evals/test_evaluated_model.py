"""What identifies a model, and how it is loaded."""

import json
import os
import shutil

import pytest
import torch

from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.evaluated_model import evaluated_model, load_model


def test_an_adapter_is_refused_with_the_command_that_merges_it(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="scaling_coef -1"):
        evaluated_model("a", tmp_path, load_model)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match="safetensors"):
        evaluated_model("a", tmp_path, load_model)


def test_a_model_is_identified_by_how_it_was_made(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("opt"), folder)
    bare = evaluated_model("a", folder, load_model).identity
    os.utime(folder / "model.safetensors")
    assert evaluated_model("a", folder, load_model).identity != bare  # nothing but its time tells it from another

    record = {"title": "", "training": {"steps": 3}, "flags": {"seed": 1}, "losses_at_the_end": {"gd_loss": 1.0}}
    (folder / "run.json").write_text(json.dumps(record))
    made = evaluated_model("a", folder, load_model).identity
    os.utime(folder / "model.safetensors")
    assert evaluated_model("a", folder, load_model).identity == made and "written_ns" not in made
    (folder / "run.json").write_text(json.dumps({**record, "losses_at_the_end": {"gd_loss": 2.0}}))
    assert evaluated_model("a", folder, load_model).identity != made
    json.dumps(made)


def test_a_model_is_loaded_on_demand_in_eval_mode(tiny_model):
    model = evaluated_model("a", tiny_model("opt"), lambda folder: load_model(folder, "bf16"))
    assert model.label == "a" and model.folder == tiny_model("opt")
    language_model, template = model.load()
    assert not language_model.training and language_model.dtype == torch.bfloat16
    assert template.tokenizer("Why?").input_ids and load_model(tiny_model("opt"), "fp32")[0].dtype == torch.float32
