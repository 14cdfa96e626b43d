"""Entries that two models name differently: tied weights, prefixes, constants."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from harmful_unlearn.errors import UserError
from harmful_unlearn.negation.negate import negate
from task_vector import TaskVector
from tests.helpers.models.tiny_pairs import make, negated_weights, same, saved, tuned


@pytest.mark.parametrize("has_head", ["base", "tuned"])
def test_tied_head_missing_on_one_side(has_head, tmp_path, pair):
    expected = negated_weights(pair, tmp_path / "plain")
    folder = pair[has_head == "tuned"]
    state = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in state
    state["lm_head.weight"] = state["model.decoder.embed_tokens.weight"].clone()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    ours = negated_weights(pair, tmp_path / "out")
    if has_head == "base":
        assert torch.equal(ours.pop("lm_head.weight"), expected["model.decoder.embed_tokens.weight"])
    assert same(ours, expected)


def test_only_the_tied_head_is_there(tmp_path, pair):
    expected = negated_weights(pair, tmp_path / "plain")
    state = load_file(pair[1] / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.decoder.embed_tokens.weight")
    save_file(state, pair[1] / "model.safetensors")
    assert same(negated_weights(pair, tmp_path / "out"), expected)


@pytest.mark.parametrize("bare", ["base", "tuned"])
@pytest.mark.parametrize("architecture", ["opt", "gpt2"])
def test_names_with_and_without_the_prefix(architecture, bare, tmp_path):
    model = make(architecture)
    pair = saved(model, tmp_path / "base"), saved(tuned(model), tmp_path / "tuned")
    expected = negated_weights(pair, tmp_path / "plain")
    file = pair[bare == "tuned"] / "model.safetensors"
    prefix = model.base_model_prefix + "."
    state = {name.removeprefix(prefix): entry for name, entry in load_file(file).items()}
    state["layers.0.rotary_emb.inv_freq"] = torch.ones(4)  # a constant, as old releases saved it
    save_file(state, file)
    ours = negated_weights(pair, tmp_path / "out")
    if bare == "base":
        assert torch.equal(ours.pop("layers.0.rotary_emb.inv_freq"), torch.ones(4))
        ours = {prefix + name: entry for name, entry in ours.items()}
    assert same(ours, expected)


@pytest.fixture
def tiny_tied(tmp_path):
    model = make("llama")
    model.save_pretrained(tmp_path / "tied")
    return tmp_path / "tied", model


def test_an_untied_head_is_not_dropped_silently(tiny_tied, tmp_path):
    """A base that ties its head, a fine-tuned model that no longer does."""
    base, tied = tiny_tied
    untied = load_file(base / "model.safetensors")
    untied["lm_head.weight"] = untied["model.embed_tokens.weight"] + 1
    other = shutil.copytree(base, tmp_path / "other")
    save_file(untied, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="tied in the base and differ"):
        negate(base, [(other, 1.0)], tmp_path / "out")
    with pytest.raises(UserError, match="tied in the base and differ"):
        TaskVector(tied, untied)
    untied["lm_head.weight"] = untied["model.embed_tokens.weight"].clone()
    assert not any(entry.any() for entry in TaskVector(tied, untied).vector.values())
