"""Tiny models and a temporary folder, for the tests of offloading."""

import tempfile

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.models.offloaded import OTHER_ARCHITECTURES
from tests.helpers.models.tiny import GOLDENS


@pytest.fixture(scope="module")
def base_of(tiny_model, tmp_path_factory):
    """`base_of("mixtral")`: as `tiny_model`, with more architectures."""
    folders = {}

    def make(architecture):
        if architecture not in OTHER_ARCHITECTURES:
            return tiny_model(architecture)
        if architecture not in folders:
            folder = folders[architecture] = tmp_path_factory.mktemp(architecture)
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(OTHER_ARCHITECTURES[architecture]).save_pretrained(folder)
            AutoTokenizer.from_pretrained(GOLDENS / "model").save_pretrained(folder)
        return folders[architecture]

    return make


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """The folder in which temporary folders are created."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder
