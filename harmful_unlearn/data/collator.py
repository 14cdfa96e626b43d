"""Texts to tensors: rows, plain or packed as trees, and which positions count for how much.

A loss of SKU is a weighted sum over positions. Everything in which the modules and the two variants
differ (where an answer starts, what is averaged over, whether the question counts) is in the
weights made here, so that the losses have no branch.

A harmful question's own answer (GD) and the K random ones (RD) follow the same tokens. Packed, they are one row

    [question | answer | random answer 1 | ... | random answer K]

in which each answer sees the question and itself, at the positions that it has in a row of its own. That
gives every loss and gradient of separate rows from one forward pass over each question.
"""

from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from harmful_unlearn.data.batch import Batch
from harmful_unlearn.data.prompt_format import Pair, format_pair, format_prefix

VARIANTS = ("released", "paper")
# Where the released code starts to score in RD: the question counts, all but its first tokens.
RELEASED_RD_START = 2


@dataclass(frozen=True)
class TokenizedText:
    """One text as token ids.

    Attributes:
        input_ids: the tokens of the whole text, cut to the encoder's `max_length`.
        start_loc: the released code's start of the answer: the tokens of the prefix, less one
            (released code, point 3). It is the index of the answer's first token where the prefix's
            trailing space merges into it, as in byte-level BPE.
        answer_start: index of the first token that a model has to say: that the text does not share with its
            prefix less the trailing space, since " W" may be one token or two. An empty answer has none.
        cut: whether `max_length` cut the text.
    """

    input_ids: list[int]
    start_loc: int
    answer_start: int
    cut: bool


class _Text(NamedTuple):
    """A text of a batch, and what of it counts."""

    module: str
    input_ids: list[int]
    positions: range  # the scored ones
    sharing: int  # how many positions share the text's weight of 1


class Collator:
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

    def encode(self, pairs: list[Pair]) -> list[TokenizedText]:
        """Tokenise pairs, and find where each answer starts (released code, points 1 to 4)."""
        texts = self._tokenize([format_pair(pair.question, pair.answer) for pair in pairs])
        questions = list(dict.fromkeys(pair.question for pair in pairs))
        prefix_ids = self._tokenize([format_prefix(question) for question in questions])
        asked_ids = self._tokenize([format_prefix(question).rstrip() for question in questions])
        prefixes = dict(zip(questions, zip(prefix_ids, asked_ids, strict=True), strict=True))
        encoded = []
        for pair, ids in zip(pairs, texts, strict=True):
            prefix, asked = prefixes[pair.question]
            same = (ours == theirs for ours, theirs in zip(asked, ids, strict=False))
            start = len(ids) if ids == prefix else sum(takewhile(bool, same))
            kept = ids[: self.max_length]
            encoded.append(TokenizedText(kept, len(prefix) - 1, start, len(kept) < len(ids)))
        return encoded

    def answers_batch(
        self, pairs: list[Pair], answers: list[str], own_answers: bool = True, packed_up_to: float = 0
    ) -> Batch:
        """The texts of GD and RD for one step, to be run in one forward pass.

        Args:
            pairs: B harmful questions with their own answers (GD's texts, unless `own_answers` is false).
            answers: K answers drawn from the pool; each is paired with every question (B*K texts of RD;
                released code, point 11). Empty: no RD.
            packed_up_to: a row for each question rather than for each text, if no text has more tokens.

        In "released", a text's positions from its start on share a weight of 1, the last position,
        which predicts nothing, included (point 9), and RD scores the question too (point 11). In
        "paper", each answer token counts once and nothing else does, with weights that add up to 1.
        """
        own = ["own_answer"] if own_answers else []
        asked = [
            [(key, pair) for key in own] + [("random_answers", Pair(pair.question, answer)) for answer in answers]
            for pair in pairs
        ]
        encoded = iter(self.encode([pair for texts in asked for _, pair in texts]))
        groups = [[self._text(module, next(encoded)) for module, _ in texts] for texts in asked]
        averaged = {module: self._averaged(module, groups) for module in ("own_answer", "random_answers")}
        longest = max(len(text.input_ids) for group in groups for text in group)
        if longest > packed_up_to or len(answers) + own_answers == 1:
            texts = [text for group in groups for text in group]
            texts.sort(key=lambda text: text.module)  # GD's first
            groups = [[text] for text in texts]
        rows = [_lay_out([text.input_ids for text in group]) for group in groups]

        scored: dict[tuple[int, int], int] = {}
        entries: dict[tuple[int, int], dict[str, float]] = {}
        for row, (group, laid_out) in enumerate(zip(groups, rows, strict=True)):
            for text, places in zip(group, laid_out.places, strict=True):
                weight = 1 / (text.sharing * averaged[text.module])
                for at in text.positions:
                    index = scored.setdefault((row, places[at]), len(scored))
                    of = entries.setdefault((index, text.input_ids[at + 1]), {})
                    of[text.module] = of.get(text.module, 0.0) + weight
        ordered = sorted(entries.items(), key=lambda entry: entry[0][0])
        weights = {
            module: [of.get(module, 0.0) for _, of in ordered]
            for module, wanted in (("own_answer", own_answers), ("random_answers", answers))
            if wanted
        }
        return self._batch(rows, list(scored), [entry for entry, _ in ordered], weights)

    def texts_batch(self, pairs: list[Pair]) -> Batch:
        """The rows of PD for one step (released code, point 12).

        In "released" every position of the padded rows counts alike, padding included; in "paper"
        every token of text does.
        """
        texts = self._tokenize([format_pair(pair.question, pair.answer) for pair in pairs])
        ids = [text[: self.max_length] for text in texts]
        longest = max(map(len, ids))
        lengths = [longest if self.variant == "released" else len(text) for text in ids]
        scored = [(row, at) for row, length in enumerate(lengths) for at in range(length)]
        entries = [(index, 0) for index in range(len(scored))]
        return self._batch(
            [_lay_out([text]) for text in ids], scored, entries, {"text": [1 / len(scored)] * len(scored)}
        )

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts)["input_ids"] if texts else []

    def _text(self, module: str, text: TokenizedText) -> _Text:
        length = len(text.input_ids)
        if self.variant == "released":
            first = text.start_loc if module == "own_answer" else RELEASED_RD_START
            sharing = length - first
        else:
            first, sharing = text.answer_start - 1, length - text.answer_start
        return _Text(module, text.input_ids, range(first, length - 1), max(sharing, 1))

    def _averaged(self, module: str, groups: list[list[_Text]]) -> int:
        # "Weights adding to 1" leaves out, in "paper", the texts whose answer has no token to score.
        texts = [text for group in groups for text in group if text.module == module]
        if self.variant == "released":
            return len(texts)
        return max(1, sum(bool(text.positions) for text in texts))

    def _batch(self, rows: list["_Row"], scored, entries, weights) -> Batch:
        longest = max(len(row.input_ids) for row in rows)

        def padded(values: list[list[int]], filler: int) -> Tensor:
            return torch.tensor([row + [filler] * (longest - len(row)) for row in values])

        trees = any(len(row.places) > 1 for row in rows)
        return Batch(
            input_ids=padded([row.input_ids for row in rows], self.tokenizer.pad_token_id),
            attention_mask=padded([[1] * len(row.input_ids) for row in rows], 0),
            row=torch.tensor([row for row, _ in scored], dtype=torch.long),
            position=torch.tensor([at for _, at in scored], dtype=torch.long),
            index=torch.tensor([index for index, _ in entries], dtype=torch.long),
            target=torch.tensor([target for _, target in entries], dtype=torch.long),
            weights={module: torch.tensor(w, dtype=torch.float32) for module, w in weights.items()},
            branch=padded([row.branch for row in rows], -1) if trees else None,
            position_ids=padded([row.position_ids for row in rows], 0) if trees else None,
        )


class _Row(NamedTuple):
    """Texts laid out in one row after the tokens that they share.

    Attributes:
        places: of each text, where in the row each of its tokens is.
    """

    input_ids: list[int]
    branch: list[int]
    position_ids: list[int]
    places: list[list[int]]


def _lay_out(texts: list[list[int]]) -> _Row:
    """One row of texts; what they share is the longest common prefix of their tokens."""
    same = (len(set(tokens)) == 1 for tokens in zip(*texts, strict=False))
    shared = sum(takewhile(bool, same))
    row = _Row(texts[0][:shared], [0] * shared, list(range(shared)), [])
    for number, text in enumerate(texts, 1):
        start = len(row.input_ids)
        row.input_ids.extend(text[shared:])
        row.branch.extend([number] * (len(text) - shared))
        row.position_ids.extend(range(shared, len(text)))
        row.places.append([*range(shared), *range(start, len(row.input_ids))])
    return row
