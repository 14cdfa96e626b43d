"""A base and a fine-tuned model, for all tests of negation."""

import pytest
import torch

from harmful_unlearn.storage import safetensors_io
from tests.helpers.models.tiny_pairs import make, saved, tuned


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
