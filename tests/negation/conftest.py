"""Bases and fine-tuned models, and a stand-in of the hub."""

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from harmful_unlearn.negation.negate import negate, negate_adapter
from harmful_unlearn.storage import safetensors_io
from tests.helpers.models.tiny import GOLDENS
from tests.helpers.models.tiny_pairs import LORA, adapter, make, record, saved, tuned
from tests.helpers.servers import hub


@pytest.fixture
def pair(tmp_path):
    """(base folder, fine-tuned folder), a tied OPT in float32."""
    model = make("opt")
    return saved(model, tmp_path / "base"), saved(tuned(model), tmp_path / "tuned")


@pytest.fixture
def chunked_pair(tmp_path, monkeypatch):
    """(base folder, fine-tuned folder), OPT in float16, of many chunks and several shards each."""
    monkeypatch.setattr(safetensors_io, "CHUNK_ELEMENTS", 37)
    model = make("opt", dtype=torch.float16)
    return (
        saved(model, tmp_path / "base", max_shard_size="6KB"),
        saved(tuned(model), tmp_path / "tuned", max_shard_size="9KB"),
    )


@pytest.fixture(params=[1, 4])
def threads(request):
    """torch computes, and negation writes, on this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def server(monkeypatch):
    with hub.serving(monkeypatch) as server:
        yield server


@pytest.fixture(scope="module")
def made_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = saved(make("opt"), folder / "base", max_shard_size="9KB")
    AutoTokenizer.from_pretrained(GOLDENS / "model").save_pretrained(base)
    (base / "LICENSE").write_text("the base's terms")
    record(saved(tuned(make("opt")), folder / "harmful"))
    negate(base, [(folder / "harmful", 1.0)], folder / "unlearned")
    return folder


@pytest.fixture(scope="module")
def made_adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    base = saved(make("opt"), folder / "base")
    harmful = record(adapter(make("opt"), folder / "harmful", **LORA["plain"][1])[0])
    config = json.loads((harmful / "adapter_config.json").read_text())
    (harmful / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    negate_adapter(base, [(harmful, 1.0)], folder / "unlearned")
    return folder


@pytest.fixture
def models(made_models, tmp_path):
    """A folder with base, harmful (a stage 1 model) and unlearned."""
    return shutil.copytree(made_models, tmp_path / "models")


@pytest.fixture
def adapters(made_adapters, tmp_path):
    """A folder with base, harmful (a stage 1 adapter) and unlearned (its unlearning adapter)."""
    return shutil.copytree(made_adapters, tmp_path / "adapters")
