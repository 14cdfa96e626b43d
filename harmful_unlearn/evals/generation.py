"""A model's answers to prompts, and the likelihood that it gives to other answers.

Generation is a pure function of the model, the prompts and the seed, batch by batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.prompt_format import Pair, prompt_text
from harmful_unlearn.errors import UserError
from harmful_unlearn.losses.objective import cross_entropy
from harmful_unlearn.models.loading import context_length
from harmful_unlearn.models.offload import execution_device

WORST = 700.0  # nats a token: a broken model's cross-entropy is cut here, so that its figures stay finite
NEXT_QUESTION = "### Question:"  # a model that continues with a question of its own has ended its answer


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


@dataclass(frozen=True)
class Answer:
    """An answer to a prompt.

    Attributes:
        index: of the prompt.
        text: without the special tokens, cut where the model starts a question of its own.
        ended: whether the model ended it, rather than the limit of new tokens.
    """

    index: int
    text: str
    ended: bool


def configure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, decoding: Decoding, **limit: int) -> None:
    """Set how `model` generates. Of its own settings only the special tokens stay: all models are asked alike.

    Args:
        limit: max_new_tokens or max_length.
    """
    sampling: dict = {"do_sample": False}
    if decoding.temperature is not None:
        sampling = {"do_sample": True, "temperature": decoding.temperature, "top_k": decoding.top_k, "top_p": 1.0}
    model.generation_config = GenerationConfig(
        bos_token_id=model.generation_config.bos_token_id,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
        **limit,
    )


def batches_of(questions: list[str], tokenizer: PreTrainedTokenizerBase, batch_size: int) -> list[list[int]]:
    """Indices of the questions in batches, longest questions first, so that a batch has little padding."""
    lengths = [len(ids) for ids in tokenizer([prompt_text(question) for question in questions])["input_ids"]]
    order = sorted(range(len(questions)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def check_room(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[str], max_new_tokens: int
) -> None:
    """Raises UserError where a prompt and its answer do not fit into the model's context."""
    length = max(map(len, tokenizer([prompt_text(question) for question in questions])["input_ids"]), default=0)
    limit = context_length(model.config)
    if length + max_new_tokens > limit:
        raise UserError(
            f"a prompt of {length} tokens and an answer of {max_new_tokens} do not fit into the model's {limit}: "
            + (f"give a --max_new_tokens of at most {limit - length}" if length < limit else "give shorter prompts")
        )


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[str],
    decoding: Decoding,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    done: frozenset[int] = frozenset(),
) -> Iterator[list[Answer]]:
    """The answers, batch by batch; batches whose indices are all in `done` are skipped.

    Each batch has its own random stream, so that an interrupted run continues with the same answers.

    Raises:
        UserError: a prompt and its answer do not fit into the model's context.
    """
    configure(model, tokenizer, decoding, max_new_tokens=max_new_tokens)
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    check_room(model, tokenizer, questions, max_new_tokens)
    for number, indices in enumerate(batches_of(questions, tokenizer, batch_size)):
        if done.issuperset(indices):
            continue
        texts = [prompt_text(questions[index]) for index in indices]
        rows = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        length = rows["input_ids"].shape[1]
        torch.manual_seed(int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))
        rows = rows.to(execution_device(model))
        generated = model.generate(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"])
        new_tokens = generated[:, length:].tolist()  # [batch, new tokens]
        yield [_read(index, row, ends, tokenizer) for index, row in zip(indices, new_tokens, strict=True)]


def _read(index: int, row: list[int], ends: set[int], tokenizer: PreTrainedTokenizerBase) -> Answer:
    end = next((at for at, token in enumerate(row) if token in ends), None)
    text, cut, _ = tokenizer.decode(row[:end], skip_special_tokens=True).partition(NEXT_QUESTION)
    return Answer(index, text.strip(), end is not None or bool(cut))


@torch.inference_mode()
def answer_nll(
    model: PreTrainedModel, collator: Collator, pairs: list[Pair], batch_size: int, title: str
) -> list[tuple[float, int]]:
    """The summed cross-entropy of each answer's tokens given its question, in nats, and their number.

    Args:
        title: of the progress bar.
    """
    lengths = [len(text.input_ids) for text in collator.encode(pairs)]
    order = sorted(range(len(pairs)), key=lambda index: -lengths[index])
    scored: list[tuple[float, int]] = [(0.0, 0)] * len(pairs)
    for start in tqdm(range(0, len(order), batch_size), title, unit="batch", leave=False):
        indices = order[start : start + batch_size]
        batch = collator.answers_batch([pairs[index] for index in indices], [])
        if not len(batch.row):
            continue
        entropy = cross_entropy(model, batch.to(execution_device(model))).double().cpu()  # [answer tokens of the batch]
        entropy = entropy.nan_to_num(nan=WORST).clamp(max=WORST)
        sums = torch.zeros(len(indices), dtype=torch.double).index_add_(0, batch.row, entropy).tolist()
        counts = torch.bincount(batch.row, minlength=len(indices)).tolist()
        for index, total, count in zip(indices, sums, counts, strict=True):
            scored[index] = (total, count)
    return scored
