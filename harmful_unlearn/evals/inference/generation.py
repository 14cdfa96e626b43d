"""A model's answers to prompts.

Each answer is a function of the model, its prompt and its seed: which others are made beside it changes only rounding.
"""

import inspect
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from harmful_unlearn.data.prompt_format import Asked
from harmful_unlearn.data.templates import Template
from harmful_unlearn.errors import UserError
from harmful_unlearn.models.loading import context_length
from harmful_unlearn.models.offload import execution_device

TOKENS_PER_BATCH = 16384  # 8 GB of keys and values in a LLaMA2-7B in 16 bits; more is no faster on a CPU
KEPT = 0.9  # ended answers leave the batch when at most this share of it goes on: dropping rows copies the others


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen: the likeliest, or drawn.

    Attributes:
        temperature: None for greedy.
        top_k: draw among the K likeliest tokens; 0 for all. 50 was the library's default when the released code
            was written.
    """

    temperature: float | None = None
    top_k: int = 50

    @property
    def name(self) -> str:
        """ "greedy" or "sampled"."""
        return "greedy" if self.temperature is None else "sampled"

    def choose(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """The next token of each row.

        Args:
            logits: [rows, vocabulary], in any precision.
            uniform: [rows], a number in [0, 1) for each row. A row's token is where the cumulated probabilities, in
                the vocabulary's order, exceed it.

        Returns:
            [rows]; the first of several likeliest tokens if it is greedy.
        """
        scores, k = logits.float(), self.top_k
        if self.temperature is None:
            return scores.argmax(-1)
        scores = scores / self.temperature
        if 0 < k < scores.shape[-1]:
            tokens = scores.topk(k, sorted=False).indices.sort().values  # in an order that rounding cannot change
            scores = scores.gather(-1, tokens)
        else:
            tokens = torch.arange(scores.shape[-1], device=scores.device).expand_as(scores)
        cumulated = scores.softmax(-1).cumsum(-1)
        drawn = torch.searchsorted(cumulated, cumulated[:, -1:] * uniform[:, None], right=True)
        return tokens.gather(-1, drawn.clamp(max=tokens.shape[-1] - 1))[:, 0]


@dataclass(frozen=True)
class Request:
    """One answer that is wanted.

    Attributes:
        seed: of its own random stream: numbers that no other request has.
    """

    asked: Asked
    decoding: Decoding
    seed: Sequence[int]


@dataclass(frozen=True)
class Answer:
    """An answer to a prompt.

    Attributes:
        index: of the request.
        text: without the special tokens, cut at the template's stop text (where the model asks itself a question).
        ended: whether the model ended it, rather than the limit of new tokens.
    """

    index: int
    text: str
    ended: bool


def configure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    decoding: Decoding,
    end_ids: Collection[int] = (),
    **limit: int,
) -> None:
    """Set how `model` generates. Of its own settings only the special tokens stay: all models are asked alike.

    Args:
        end_ids: tokens that end an answer, beside the model's own.
        limit: max_new_tokens or max_length.
    """
    sampling: dict = {"do_sample": False}
    if decoding.temperature is not None:
        sampling = {"do_sample": True, "temperature": decoding.temperature, "top_k": decoding.top_k, "top_p": 1.0}
    model.generation_config = GenerationConfig(
        bos_token_id=model.generation_config.bos_token_id,
        eos_token_id=sorted(all_ends(model, end_ids)) or None,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
        **limit,
    )


def all_ends(model: PreTrainedModel, end_ids: Collection[int]) -> frozenset[int]:
    """The tokens that end an answer: the model's own, and `end_ids`."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return frozenset(token for token in (*own, *end_ids) if token is not None)


def batches_of(
    requests: list[Request], template: Template, max_new_tokens: int, tokens_per_batch: int
) -> list[list[int]]:
    """Indices of the requests in batches.

    A batch has at most `tokens_per_batch` tokens, with padding and room for the answers, or only one prompt. Long
    prompts come first, so that there is little padding, and the answers to a prompt are in one batch.
    """
    prompts: dict[Asked, list[int]] = {}
    for index, request in enumerate(requests):
        prompts.setdefault(request.asked, []).append(index)
    encoded = template.contexts([*prompts])
    lengths = {asked: len(ids) for asked, ids in zip(prompts, encoded, strict=True)}
    batches: list[list[int]] = []
    room = 0  # rows that the last batch can still take
    for asked in sorted(prompts, key=lambda asked: -lengths[asked]):
        if room < len(prompts[asked]):
            batches.append([])
            room = tokens_per_batch // (lengths[asked] + max_new_tokens)
        batches[-1] += prompts[asked]
        room -= len(prompts[asked])
    return batches


def check_room(config: PretrainedConfig, template: Template, asked: list[Asked], max_new_tokens: int) -> None:
    """Raises UserError where a prompt and its answer do not fit into the model's context."""
    length = max(map(len, template.contexts(asked)), default=0)
    limit = context_length(config)
    if length + max_new_tokens > limit:
        raise UserError(
            f"a prompt of {length} tokens and an answer of {max_new_tokens} do not fit into the model's {limit}: "
            + (f"give a --max_new_tokens of at most {limit - length}" if length < limit else "give shorter prompts")
        )


@torch.inference_mode()
def generate(
    model: PreTrainedModel, template: Template, max_new_tokens: int, tokens_per_batch: int, requests: list[Request]
) -> Iterator[list[Answer]]:
    """The answers, batch by batch, in an order of their own.

    Raises:
        UserError: a prompt and its answer do not fit into the model's context.
    """
    check_room(model.config, template, [request.asked for request in requests], max_new_tokens)
    ends = all_ends(model, template.end_ids)
    for indices in batches_of(requests, template, max_new_tokens, tokens_per_batch):
        made = _new_tokens(model, template, [requests[index] for index in indices], max_new_tokens, ends)
        yield [_read(index, tokens, ends, template) for index, tokens in zip(indices, made, strict=True)]


def _new_tokens(
    model: PreTrainedModel, template: Template, requests: list[Request], max_new_tokens: int, ends: frozenset[int]
) -> list[list[int]]:
    """The tokens of each answer, up to and with the one that ends it.

    A prompt is read once for all its answers, and answers that have ended leave the batch.
    """
    device, tokenizer = execution_device(model), template.tokenizer
    asked = list(dict.fromkeys(request.asked for request in requests))
    ids = {"input_ids": template.contexts(asked)}
    prompts = tokenizer.pad(ids, padding_side="left", return_tensors="pt").to(device)
    mask = torch.nn.functional.pad(prompts["attention_mask"], (0, max_new_tokens), value=1)
    read = Reader(model, prompts["input_ids"], mask)
    read.keep([asked.index(request.asked) for request in requests])
    draws = [np.random.default_rng(request.seed).random(max_new_tokens, np.float32) for request in requests]
    uniform = torch.tensor(np.array(draws), device=device)  # [requests, max_new_tokens]
    answers: list[list[int]] = [[] for _ in requests]
    rows = list(range(len(requests)))  # which request each row of the batch answers
    going = set(rows)
    for step in range(max_new_tokens):
        chosen = torch.empty(len(rows), dtype=torch.long, device=device)
        for decoding in {requests[row].decoding for row in rows}:
            at = [i for i, row in enumerate(rows) if requests[row].decoding == decoding]
            chosen[at] = decoding.choose(read.logits[at], uniform[[rows[i] for i in at], step])
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if row in going:
                answers[row].append(token)
        going -= {row for row in rows if answers[row][-1] in ends}
        if template.stop:  # it has at most a token for each letter: an answer's last tokens are searched for it
            last = [answers[row][-len(template.stop) :] for row in rows]
            tails = tokenizer.batch_decode(last, skip_special_tokens=True)
            going -= {row for row, tail in zip(rows, tails, strict=True) if template.stop in tail}
        if not going or step + 1 == max_new_tokens:
            break
        if len(going) <= KEPT * len(rows):
            at = [i for i, row in enumerate(rows) if row in going]
            rows, chosen = [rows[i] for i in at], chosen[at]
            read.keep(at)
        read.next(chosen)
    return answers


class Reader:
    """A model that reads a batch of prompts, and then token by token what is added to them.

    Attributes:
        logits: [rows, vocabulary], of each row's next token.
    """

    logits: Tensor

    def __init__(self, model: PreTrainedModel, prompts: Tensor, mask: Tensor):
        """Read the prompts, [rows, tokens], padded on the left; `mask` has room for all tokens that are to come."""
        owner = model.get_base_model() if isinstance(model, PeftModel) else model
        self._model, self._ids, self._mask = model, prompts, mask
        self._takes = inspect.signature(owner.forward).parameters
        cached = "past_key_values" in self._takes  # a model that has no such cache reads the whole text at every step
        self._cache = DynamicCache(config=model.config) if cached else None
        self._read(prompts)

    def next(self, tokens: Tensor) -> None:
        """Read one more token in each row, [rows]."""
        self._ids = torch.cat([self._ids, tokens[:, None]], 1)
        self._read(self._ids[:, -1:] if self._cache else self._ids)

    def keep(self, rows: list[int]) -> None:
        """Keep these rows, in this order; one that is named twice is there twice."""
        index = torch.tensor(rows, device=self._ids.device)
        self._ids, self._mask, self.logits = self._ids[index], self._mask[index], self.logits[index]
        if self._cache:
            self._cache.reorder_cache(index)

    def _read(self, ids: Tensor) -> None:
        mask = self._mask[:, : self._ids.shape[1]]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        more = {"position_ids": positions, "past_key_values": self._cache, "logits_to_keep": 1}
        more = {name: value for name, value in more.items() if name in self._takes}
        self.logits = self._model(input_ids=ids, attention_mask=mask, **more).logits[:, -1]


def _read(index: int, row: list[int], ends: frozenset[int], template: Template) -> Answer:
    end = next((at for at, token in enumerate(row) if token in ends), None)
    text, cut = template.tokenizer.decode(row[:end], skip_special_tokens=True), ""
    if template.stop:
        text, cut, _ = text.partition(template.stop)
    return Answer(index, text.strip(), end is not None or bool(cut))
