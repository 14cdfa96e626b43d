"""Chunks of entries, and folders whose index and files disagree."""

import torch

from harmful_unlearn.storage import safetensors_io
from harmful_unlearn.storage.safetensors_io import TensorSpec


def test_chunks_are_complete_rows_and_cover_the_entry(monkeypatch):
    monkeypatch.setattr(safetensors_io, "CHUNK_ELEMENTS", 10)
    for shape in ((), (1,), (25,), (7, 3), (2, 50), (3, 2, 2), (0, 3), (3, 0)):
        spans = list(TensorSpec("F32", shape).chunks())
        size, row = torch.empty(shape).numel(), shape[-1] if len(shape) > 1 else 1
        assert [index for span in spans for index in range(span.start, span.stop)] == list(range(size))
        assert all(span.start % row == 0 and span.stop - span.start <= max(10, row) for span in spans)
