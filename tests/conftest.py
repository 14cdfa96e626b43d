"""Shared by all tests: the goldens and tiny random models with the goldens' tokenizer."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads only slow tiny models down

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.tiny import GOLDENS, TINY


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Each run of the script is a process of its own; here they share one, and accelerate's state."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def goldens() -> dict:
    """golden.json: figures of the authors' code."""
    return json.loads((GOLDENS / "golden.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def tokenizer():
    """The goldens' byte-level BPE of 700 tokens; BOS is added, pad is 1."""
    return AutoTokenizer.from_pretrained(GOLDENS / "model")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """`tiny_model("llama")`: a folder with a random model of that architecture and the tokenizer."""
    made = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture)
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(TINY[architecture]).save_pretrained(folder)
            # A fresh one: what the shared one was last used for would be saved with it.
            AutoTokenizer.from_pretrained(GOLDENS / "model").save_pretrained(folder)
            made[architecture] = folder
        return made[architecture]

    return make
