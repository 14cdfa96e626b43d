"""Shared by all tests: the goldens and tiny random models with the goldens' tokenizer."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads only slow tiny models down

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, AutoTokenizer

from harmful_unlearn.training.run_log import RunLog
from tests.helpers.models.tiny import GOLDENS, TINY
from tests.helpers.running.resumed import run


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Each run of the script is a process of its own; here they share one, and accelerate's state."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session", autouse=True)
def no_bf16_instructions():
    """`--precision auto` is fp32 in this process, whatever the machine, so that figures are the same everywhere."""
    with pytest.MonkeyPatch.context() as patch:  # before fixtures that train for a module
        patch.setattr(torch.cpu, "get_capabilities", dict)
        yield


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


@pytest.fixture
def stop_after(monkeypatch):
    """`stop_after(n, signal)`: the process gets the signal, once, when its n-th step is logged."""

    def stop(step: int, number: int = signal.SIGTERM) -> None:
        logged = RunLog.step

        def then_signal(log, metrics):
            logged(log, metrics)
            if metrics["step"] == step:
                monkeypatch.setattr(RunLog, "step", logged)
                os.kill(os.getpid(), number)

        monkeypatch.setattr(RunLog, "step", then_signal)

    return stop


@pytest.fixture(scope="module")
def dropout_model(tiny_model, tmp_path_factory):
    """A tiny OPT with dropout, so that random generators matter."""
    folder = shutil.copytree(tiny_model("opt"), tmp_path_factory.mktemp("dropout") / "opt")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dropout": 0.1}))
    return folder


@pytest.fixture
def stopped(tiny_model, tmp_path, stop_after):
    """A run that was stopped after three steps."""
    stop_after(2)
    assert run(tiny_model("opt"), tmp_path / "run") == 143
    return tmp_path / "run"
