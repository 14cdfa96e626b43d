"""vLLM is not installed here: what it is asked, and how its answers are read, with a stand-in for it."""

import sys
from types import SimpleNamespace

import pytest
import torch

from harmful_unlearn.data.prompt_format import Asked, prompt_text
from harmful_unlearn.data.templates import ReleasedTemplate
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.inference import vllm_backend
from harmful_unlearn.evals.inference.generation import Answer, Decoding, Request

REQUESTS = [
    Request(Asked("Why?"), Decoding(), (0, 0)),
    Request(Asked("Who is it?"), Decoding(0.9, 50), (0, 1)),
    Request(Asked("Who is it?"), Decoding(0.9, 0), (0, 2)),
]


@pytest.fixture
def engines(monkeypatch):
    """A stand-in for vLLM: it answers with the number of the prompt, and lists what it was asked."""
    made = []

    class Engine:
        def __init__(self, **settings):
            self.settings = settings
            made.append(self)

        def generate(self, prompts, sampling):
            self.prompts, self.sampling = prompts, sampling
            reasons = ("stop", "length", "stop")
            said = [SimpleNamespace(text=f" answer {i} ", finish_reason=why) for i, why in enumerate(reasons)]
            return [SimpleNamespace(outputs=[text]) for text in said]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Engine, SamplingParams=SimpleNamespace))
    return made


def test_it_is_asked_as_transformers_is(engines, tokenizer, tmp_path):
    (answers,) = vllm_backend.generate(tmp_path, ReleasedTemplate(tokenizer), 20, "bf16", REQUESTS)
    assert answers == [Answer(0, "answer 0", True), Answer(1, "answer 1", False), Answer(2, "answer 2", True)]
    (engine,) = engines
    ids = [tokenizer(prompt_text(request.asked.question)).input_ids for request in REQUESTS]
    assert engine.prompts == [{"prompt_token_ids": prompt} for prompt in ids]
    assert engine.settings == {
        "model": str(tmp_path), "dtype": "bfloat16", "max_model_len": max(map(len, ids)) + 20
    }  # fmt: skip
    greedy, sampled, unlimited = engine.sampling
    assert (greedy.temperature, sampled.temperature, unlimited.top_k, sampled.top_k) == (0, 0.9, 0, 50)
    assert all((each.max_tokens, each.stop) == (20, ["### Question:"]) for each in engine.sampling)
    assert len({each.seed for each in engine.sampling}) == 3


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(vllm_backend, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install vllm"):
        vllm_backend.check_usable()
    monkeypatch.setattr(vllm_backend, "find_spec", lambda _: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="CUDA GPU"):
        vllm_backend.check_usable()
