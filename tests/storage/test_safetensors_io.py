"""Chunks of entries, and files that are written and read in chunks."""

import torch
from safetensors.torch import load_file, save_file

from harmful_unlearn.storage import safetensors_io
from harmful_unlearn.storage.safetensors_io import DTYPES, SafetensorsFolder, ShardWriter, TensorSpec
from tests.helpers.models.tiny_pairs import same


def test_chunks_are_complete_rows_and_cover_the_entry(monkeypatch):
    monkeypatch.setattr(safetensors_io, "CHUNK_ELEMENTS", 10)
    for shape in ((), (1,), (25,), (7, 3), (2, 50), (3, 2, 2), (0, 3), (3, 0)):
        spans = list(TensorSpec(torch.float32, shape).chunks())
        size, row = torch.empty(shape).numel(), shape[-1] if len(shape) > 1 else 1
        assert [index for span in spans for index in range(span.start, span.stop)] == list(range(size))
        assert all(span.start % row == 0 and span.stop - span.start <= max(10, row) for span in spans)


def test_files_are_those_of_the_library(tmp_path, monkeypatch):
    """Whatever the dtype: an entry of some chunks, and an empty one."""
    monkeypatch.setattr(safetensors_io, "CHUNK_ELEMENTS", 10)
    state = {code: (100 * torch.rand(5, 4)).to(dtype) for code, dtype in DTYPES.items()}
    state |= {f"{code}_empty": torch.empty(0, 3, dtype=dtype) for code, dtype in DTYPES.items()}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    folder = SafetensorsFolder(tmp_path)
    assert same({name: folder.read(name) for name in folder.specs}, state)
    writer = ShardWriter(tmp_path, {"copy.safetensors": folder.specs}, folder.metadata)
    for name, spec in folder.specs.items():
        for span in spec.chunks():
            writer.write(state[name].view(-1)[span], name, span.start)
    assert same(load_file(tmp_path / "copy.safetensors"), state)
    assert folder.equal("F32", "F32") and not folder.equal("F32", "F64")
