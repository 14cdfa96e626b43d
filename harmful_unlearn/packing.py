"""Texts to tensors: padded rows, and which positions count for how much.

A loss of SKU is a weighted sum over positions. Everything in which the modules and the two variants
differ (where an answer starts, what is averaged over, whether the question counts) is in the
weights made here, so that losses.py has no branch.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import chain, takewhile
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from harmful_unlearn.data import BatchOrder, HarmfulData, NormalData, Pair, format_pair, format_prefix

VARIANTS = ("released", "paper")
# Where the released code starts to score in RD: the question counts, all but its first tokens.
RELEASED_RD_START = 2


@dataclass(frozen=True)
class Encoded:
    """One text as token ids.

    Attributes:
        input_ids: the tokens of the whole text, cut to the encoder's `max_length`.
        start_loc: the released code's start of the answer: the tokens of the prefix, less one
            (released code, point 3). It is the index of the answer's first token where the prefix's
            trailing space merges into it, as in byte-level BPE.
        answer_start: index of the first token that the text does not share with its prefix.
        cut: whether `max_length` cut the text.
    """

    input_ids: list[int]
    start_loc: int
    answer_start: int
    cut: bool


@dataclass(frozen=True)
class Batch:
    """Rows of text for one forward pass, and the positions that losses read.

    Attributes:
        input_ids, attention_mask: [rows, length] int64; padded on the right, 0 in the mask.
        row, position: [scored] int64; which hidden states go through the output embeddings.
        target: [scored] int64; the token that follows each of them (harmful text only).
        weights: a [scored] float32 vector for each module laid out in this batch: "gd" and "rd" for
            harmful text, "pd" for normal text.
    """

    input_ids: Tensor
    attention_mask: Tensor
    row: Tensor
    position: Tensor
    target: Tensor
    weights: dict[str, Tensor]

    @property
    def tokens(self) -> int:
        """Tokens of text in the batch, padding left out."""
        return int(self.attention_mask.sum())

    def to(self, device: torch.device) -> "Batch":
        """The same batch with every tensor on `device`."""
        weights = {module: weight.to(device) for module, weight in self.weights.items()}
        tensors = {
            name: getattr(self, name).to(device)
            for name in ("input_ids", "attention_mask", "row", "position", "target")
        }
        return Batch(weights=weights, **tensors)


class _Span(NamedTuple):
    positions: range  # the scored positions of a row
    sharing: int  # how many positions share the row's weight of 1


class Packer:
    """Turns pairs into batches for one tokenizer and one variant.

    Args:
        tokenizer: adds its own BOS; its padding and truncation are not used.
        variant: "released" or "paper" (README, implementation details).
        max_length: tokens; longer texts are cut on the right, that is, in the answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, variant: str, max_length: int):
        self.tokenizer = tokenizer
        self.variant = variant
        self.max_length = max_length

    def encode(self, pairs: list[Pair]) -> list[Encoded]:
        """Tokenise pairs, and find where each answer starts (released code, points 1 to 4)."""
        texts = self._tokenize([format_pair(pair.question, pair.answer) for pair in pairs])
        questions = list(dict.fromkeys(pair.question for pair in pairs))
        prefix_ids = self._tokenize([format_prefix(question) for question in questions])
        prefixes = dict(zip(questions, prefix_ids, strict=True))
        encoded = []
        for pair, ids in zip(pairs, texts, strict=True):
            prefix = prefixes[pair.question]
            same = (ours == theirs for ours, theirs in zip(prefix, ids, strict=False))
            shared = sum(takewhile(bool, same))
            kept = ids[: self.max_length]
            encoded.append(Encoded(kept, len(prefix) - 1, shared, len(kept) < len(ids)))
        return encoded

    def harmful_batch(self, pairs: list[Pair], answers: list[str], guided: bool = True) -> Batch:
        """The rows of GD and RD for one step, to be run in one forward pass.

        Args:
            pairs: B harmful questions with their own answers (GD rows, unless `guided` is false).
            answers: K answers drawn from the pool; each is paired with every question (B*K RD rows;
                released code, point 11). Empty: no RD.

        In "released", a row's positions from its start on share a weight of 1, the last position,
        which predicts nothing, included (point 9), and RD scores the question too (point 11). In
        "paper", each answer token counts once and nothing else does, with weights that add up to 1.
        """
        own = pairs if guided else []
        mismatched = [Pair(pair.question, answer) for pair in pairs for answer in answers]
        encoded = self.encode(own + mismatched)
        modules = ["gd"] * len(own) + ["rd"] * len(mismatched)
        spans = [
            self._span(text, text.start_loc if module == "gd" else RELEASED_RD_START)
            for text, module in zip(encoded, modules, strict=True)
        ]
        row = [index for index, span in enumerate(spans) for _ in span.positions]
        position = [at for span in spans for at in span.positions]
        target = [encoded[r].input_ids[at + 1] for r, at in zip(row, position, strict=True)]
        weights = {}
        for module in dict.fromkeys(modules):
            of_module = [span for span, m in zip(spans, modules, strict=True) if m == module]
            rows = self._rows_averaged(of_module)
            weights[module] = [1 / (spans[r].sharing * rows) if modules[r] == module else 0.0 for r in row]
        return self._batch([text.input_ids for text in encoded], row, position, target, weights)

    def normal_batch(self, pairs: list[Pair]) -> Batch:
        """The rows of PD for one step (released code, point 12).

        In "released" every position of the padded rows counts alike, padding included; in "paper"
        every token of text does.
        """
        texts = self._tokenize([format_pair(pair.question, pair.answer) for pair in pairs])
        ids = [text[: self.max_length] for text in texts]
        longest = max(map(len, ids))
        lengths = [longest if self.variant == "released" else len(text) for text in ids]
        row = [index for index, length in enumerate(lengths) for _ in range(length)]
        position = list(chain.from_iterable(map(range, lengths)))
        weights = {"pd": [1 / len(row)] * len(row)}
        return self._batch(ids, row, position, [0] * len(row), weights)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts)["input_ids"] if texts else []

    def _span(self, text: Encoded, released_start: int) -> "_Span":
        length = len(text.input_ids)
        if self.variant == "released":
            first, sharing = released_start, length - released_start
        else:
            first, sharing = text.answer_start - 1, length - text.answer_start
        return _Span(range(first, length - 1), max(sharing, 1))

    def _rows_averaged(self, spans: list["_Span"]) -> int:
        # "Weights adding to 1" leaves out, in "paper", the rows whose answer has no token to score.
        if self.variant == "released":
            return len(spans)
        return max(1, sum(bool(span.positions) for span in spans))

    def _batch(self, ids, row, position, target, weights) -> Batch:
        longest = max(map(len, ids))
        padded = [text + [self.tokenizer.pad_token_id] * (longest - len(text)) for text in ids]
        mask = [[1] * len(text) + [0] * (longest - len(text)) for text in ids]
        return Batch(
            input_ids=torch.tensor(padded),
            attention_mask=torch.tensor(mask),
            row=torch.tensor(row, dtype=torch.long),
            position=torch.tensor(position, dtype=torch.long),
            target=torch.tensor(target, dtype=torch.long),
            weights={module: torch.tensor(w, dtype=torch.float32) for module, w in weights.items()},
        )


def answer_pool(losses: set[str], harmful: HarmfulData, normal: NormalData) -> list[str]:
    """Where the K random answers come from: harmful answers (RD), or normal training answers ("rm")."""
    return [normal.texts[row].answer for row in normal.train] if "rm" in losses else harmful.answers


@dataclass(frozen=True)
class StepBatches:
    """The batches of each step, a pure function of the step.

    Attributes:
        losses: names in losses.py; a loss that is left out (its weight is 0) costs nothing.
    """

    packer: Packer
    order: BatchOrder
    harmful: HarmfulData
    normal: NormalData
    losses: set[str]

    @cached_property
    def pool(self) -> list[str]:
        """The answers that are paired with prompts they do not belong to."""
        return answer_pool(self.losses, self.harmful, self.normal)

    def random_pairs(self, step: int) -> list[Pair]:
        """Each question of a step with each of the K answers drawn for it."""
        draw = self.order[step]
        questions = [self.harmful.pairs[row].question for row in draw.harmful_rows]
        return [Pair(question, self.pool[row]) for question in questions for row in draw.answer_rows]

    def touched(self, steps: int) -> tuple[set[str], set[str]]:
        """The harmful questions whose own answer is trained on, and all that `steps` steps touch.

        An answer that RD draws touches the question that it came with.
        """
        trained, touched = set(), set()
        for step in range(steps):
            draw = self.order[step]
            asked = {self.harmful.pairs[row].question for row in draw.harmful_rows}
            trained |= asked if self.losses & {"gd", "ga"} else set()
            touched |= asked if self.losses & {"gd", "ga", "rd", "rm"} else set()
            if "rd" in self.losses:
                touched |= {self.harmful.answer_questions[row] for row in draw.answer_rows}
        return trained, touched

    def __call__(self, step: int, device: torch.device) -> tuple[Batch | None, Batch | None]:
        """Harmful prompts with their own and with random answers, and normal text, of a step (from 0).

        None stands for a batch that no loss reads.
        """
        draw, harmful, normal = self.order[step], None, None
        own, random = self.losses & {"gd", "ga"}, self.losses & {"rd", "rm"}
        if own or random:
            pairs = [self.harmful.pairs[row] for row in draw.harmful_rows]
            answers = [self.pool[row] for row in draw.answer_rows] if random else []
            harmful = self.packer.harmful_batch(pairs, answers, bool(own)).to(device)
        texts = [self.normal.texts[row] for row in draw.normal_rows]
        if self.losses & {"pd", "kl"}:
            normal = self.packer.normal_batch(texts).to(device)
        if "ft" in self.losses:  # laid out as GD: the answer counts
            normal = self.packer.harmful_batch(texts, []).to(device)
        return harmful, normal
