"""Answers by vLLM, which keeps a GPU busier than transformers does. It pins its own torch, so it is no package of ours.

This module has never been run with vLLM itself: the tests have a stand-in for it. It follows the documented interface
of vLLM 0.9 and later (`LLM`, `SamplingParams`).
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from harmful_unlearn.data.templates import Template
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.inference.generation import Answer, Request


def check_usable() -> None:
    """Raises UserError where vLLM is not installed, or there is no CUDA GPU."""
    if find_spec("vllm") is None:
        raise UserError("--backend vllm needs vLLM: pip install vllm, or omit the flag")
    if not torch.cuda.is_available():
        raise UserError("--backend vllm needs a CUDA GPU: use a machine with one, or omit the flag")


def generate(
    folder: Path, template: Template, max_new_tokens: int, precision: str, requests: list[Request]
) -> Iterator[list[Answer]]:
    """All answers of the model in `folder`, as `generation.generate` makes them, from the same tokens.

    Each sampled answer has a seed of its own. vLLM draws other numbers from it than we do: sampled answers are equal
    in distribution only.

    Args:
        precision: "fp32" or "bf16".
    """
    from vllm import LLM, SamplingParams

    prompts = template.contexts([request.asked for request in requests])
    longest = max(map(len, prompts)) + max_new_tokens
    engine = LLM(model=str(folder), dtype={"fp32": "float32", "bf16": "bfloat16"}[precision], max_model_len=longest)
    sampling = [
        SamplingParams(
            temperature=request.decoding.temperature or 0.0,  # 0: greedy
            top_k=request.decoding.top_k,
            max_tokens=max_new_tokens,
            stop=[template.stop] if template.stop else [],
            stop_token_ids=sorted(template.end_ids),
            seed=int(np.random.SeedSequence(request.seed).generate_state(1)[0]),
        )
        for request in requests
    ]
    results = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling)  # in the order of the prompts
    yield [
        Answer(index, result.outputs[0].text.strip(), result.outputs[0].finish_reason == "stop")
        for index, result in enumerate(results)
    ]
