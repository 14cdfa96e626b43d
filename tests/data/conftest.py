"""The goldens' tokenizer, and a stand-in for the hub."""

import pytest

from tests.helpers.models.tiny import GOLDENS


@pytest.fixture(scope="session")
def decode():
    """Token ids to text, exactly (byte-level BPE)."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(GOLDENS / "model" / "tokenizer.json"))
    return lambda ids: tokenizer.decode(ids)


@pytest.fixture
def hub(monkeypatch):
    """`load_dataset` stands for the hub: it records its call and returns or raises `hub.answer`."""
    import datasets

    class Hub:
        answer = None

        def load_dataset(self, *args, **kwargs):
            self.call = args, kwargs
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer

    hub = Hub()
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    return hub
