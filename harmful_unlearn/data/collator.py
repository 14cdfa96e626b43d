"""Pairs to batches.

Two ideas:

1. Every loss is a weighted sum over positions. The losses, and the two variants, differ in where an answer starts, in
   what is averaged over, and in whether the question counts. All of that is in the weights that are computed here
   (`Batch.weights`), so that the losses themselves need no distinction.

2. A harmful question's own answer (GD) and the K random ones (RD) follow the same tokens. Packed, they are one row

       [question | own answer | random answer 1 | ... | random answer K]

   in which each answer sees the question and itself, at the positions that it would have in a row of its own. One
   forward pass over the question then gives the losses and gradients of K + 1 separate rows.
"""

from collections import defaultdict
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from harmful_unlearn.data.batch import Batch
from harmful_unlearn.data.prompt_format import Pair, format_pair, format_prefix, prompt_text

Indices = list[tuple[int, int]]
VARIANTS = ("released", "paper")
# The first position of RD in the released code: all of the question counts but its first two tokens.
RELEASED_RD_START = 2


@dataclass(frozen=True)
class TokenizedText:
    """One text as token ids."""

    input_ids: list[int]  # of the complete text, cut to the collator's `max_length`
    # Where the released code has the answer start: the number of tokens of the prefix, less one (implementation
    # detail 3). It is the first answer token if the prefix's trailing space merges into that, as in byte-level BPE.
    start_loc: int
    # Where it starts: at the first token not shared with the tokenised prompt (without its trailing space, which some
    # tokenizers merge into the next word). `len(input_ids)` if the answer is empty.
    answer_start: int
    cut: bool  # whether `max_length` cut the text


class _ScoredText(NamedTuple):
    """A text of a batch with its scored positions, each of which predicts the token after it."""

    key: str  # the entry of `Batch.weights` that it counts in
    input_ids: list[int]
    positions: range
    shared_by: int  # the number of positions that share the text's weight of 1


@dataclass(frozen=True)
class Collator:
    """Turns pairs into batches for one tokenizer and one variant."""

    tokenizer: PreTrainedTokenizerBase  # adds its own BOS; its padding and truncation are not used
    variant: str  # "released" or "paper" (docs/implementation-details.md)
    max_length: int  # tokens; longer texts are cut on the right, that is, in the answer

    def encode(self, pairs: list[Pair]) -> list[TokenizedText]:
        """Tokenise pairs, and find where each answer starts (implementation details 1 to 4)."""
        texts = self._tokenize([format_pair(pair.question, pair.answer) for pair in pairs])
        questions = list(dict.fromkeys(pair.question for pair in pairs))
        prefixes = dict(zip(questions, self._tokenize([format_prefix(q) for q in questions]), strict=True))
        prompts = dict(zip(questions, self._tokenize([prompt_text(q) for q in questions]), strict=True))
        encoded = []
        for pair, ids in zip(pairs, texts, strict=True):
            prefix = prefixes[pair.question]
            answer_start = len(ids) if ids == prefix else _shared_length(prompts[pair.question], ids)
            is_cut = len(ids) > self.max_length
            encoded.append(TokenizedText(ids[: self.max_length], len(prefix) - 1, answer_start, is_cut))
        return encoded

    def answers_batch(
        self, pairs: list[Pair], answers: list[str], own_answers: bool = True, packed_up_to: float = 0
    ) -> Batch:
        """Questions with their own answers and with others, for one forward pass.

        In "released", the positions of a text from its start on share a weight of 1, the last position, which predicts
        nothing, included, and random answers' questions are scored, too (implementation details 9 and 11). In "paper",
        the answer tokens of a text share a weight of 1, and nothing else counts. The weights of all texts of a kind are
        then averaged; in "paper" without texts whose answer has no token to score.

        Args:
            pairs: B questions with their own answers.
            answers: K answers, each of which is paired with every question (B * K texts of RD). May be empty.
            own_answers: whether the questions' own answers are in the batch (GD's texts).
            packed_up_to: in tokens: if no text is longer, a row holds a question with all its answers; if one is
                longer, or each question has one answer, a row holds one text.
        """
        keys = (["own_answer"] if own_answers else []) + ["random_answers"] * len(answers)  # of a question's texts
        answers_of = [[pair.answer, *answers] if own_answers else answers for pair in pairs]
        texts = [Pair(pair.question, answer) for pair, row in zip(pairs, answers_of, strict=True) for answer in row]
        encoded = iter(self.encode(texts))
        groups = [[self._scored(key, next(encoded)) for key in keys] for _ in pairs]  # of each row
        flat = sorted((text for group in groups for text in group), key=lambda text: text.key)  # own answers first
        averaged = [text.key for text in flat if text.positions or self.variant == "released"]  # others score nothing
        averaged_over = {key: max(averaged.count(key), 1) for key in keys}
        if max(len(text.input_ids) for text in flat) > packed_up_to or len(keys) == 1:
            groups = [[text] for text in flat]
        rows = [_lay_out([text.input_ids for text in group]) for group in groups]

        scored: dict[tuple[int, int], int] = {}  # (row, position): index
        # (index, target): the weight in each kind of text
        entries: dict[tuple[int, int], dict[str, float]] = defaultdict(lambda: dict.fromkeys(keys, 0.0))
        for number, (group, row) in enumerate(zip(groups, rows, strict=True)):
            for text, places in zip(group, row.places, strict=True):
                weight = 1 / (text.shared_by * averaged_over[text.key])
                for position in text.positions:
                    index = scored.setdefault((number, places[position]), len(scored))
                    entries[index, text.input_ids[position + 1]][text.key] += weight
        ordered = sorted(entries.items(), key=lambda item: item[0][0])  # by index
        weights = {key: [weights_of[key] for _, weights_of in ordered] for key in dict.fromkeys(keys)}
        return self._batch(rows, list(scored), [entry for entry, _ in ordered], weights)

    def texts_batch(self, pairs: list[Pair]) -> Batch:
        """Whole texts, for PD (implementation detail 12).

        In "released" every position of the padded rows has the same weight, padding included; in "paper" every token
        of text has. The weights add up to 1.
        """
        texts = self._tokenize([format_pair(pair.question, pair.answer) for pair in pairs])
        ids = [text[: self.max_length] for text in texts]
        longest = max(map(len, ids))
        lengths = [longest if self.variant == "released" else len(text) for text in ids]
        scored = [(row, position) for row, length in enumerate(lengths) for position in range(length)]
        entries = [(index, 0) for index in range(len(scored))]
        weights = {"text": [1 / len(scored)] * len(scored)}
        return self._batch([_lay_out([text]) for text in ids], scored, entries, weights)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts)["input_ids"] if texts else []

    def _scored(self, key: str, text: TokenizedText) -> _ScoredText:
        length = len(text.input_ids)
        if self.variant == "released":
            first = text.start_loc if key == "own_answer" else RELEASED_RD_START
            shared_by = length - first
        else:
            first, shared_by = text.answer_start - 1, length - text.answer_start
        return _ScoredText(key, text.input_ids, range(first, length - 1), max(shared_by, 1))

    def _batch(self, rows: list["_Row"], scored: Indices, entries: Indices, weights: dict[str, list[float]]) -> Batch:
        """The tensors of padded rows, scored (row, position)s, (index, target) entries, and the entries' weights."""
        longest = max(len(row.input_ids) for row in rows)

        def padded(values: list[list[int]], filler: int) -> Tensor:
            return torch.tensor([row + [filler] * (longest - len(row)) for row in values])

        is_packed = any(len(row.places) > 1 for row in rows)
        return Batch(
            input_ids=padded([row.input_ids for row in rows], self.tokenizer.pad_token_id),
            attention_mask=padded([[1] * len(row.input_ids) for row in rows], 0),
            row=torch.tensor([row for row, _ in scored], dtype=torch.long),
            position=torch.tensor([position for _, position in scored], dtype=torch.long),
            index=torch.tensor([index for index, _ in entries], dtype=torch.long),
            target=torch.tensor([target for _, target in entries], dtype=torch.long),
            weights={key: torch.tensor(values, dtype=torch.float32) for key, values in weights.items()},
            branch=padded([row.branch for row in rows], -1) if is_packed else None,
            position_ids=padded([row.position_ids for row in rows], 0) if is_packed else None,
        )


class _Row(NamedTuple):
    """Texts laid out in one row, after the tokens that they share; as in `Batch`, without padding."""

    input_ids: list[int]
    branch: list[int]
    position_ids: list[int]
    places: list[list[int]]  # for each text, where in the row each of its tokens is


def _lay_out(texts: list[list[int]]) -> _Row:
    """One row of texts, which begins with the tokens that all of them share."""
    shared = _shared_length(*texts)
    row = _Row(texts[0][:shared], [0] * shared, list(range(shared)), [])
    for number, text in enumerate(texts, 1):
        start = len(row.input_ids)
        row.input_ids.extend(text[shared:])
        row.branch.extend([number] * (len(text) - shared))
        row.position_ids.extend(range(shared, len(text)))
        row.places.append([*range(shared), *range(start, len(row.input_ids))])
    return row


def _shared_length(*texts: list[int]) -> int:
    """The number of tokens that all texts begin with."""
    same = (len(set(tokens)) == 1 for tokens in zip(*texts, strict=False))
    return sum(takewhile(bool, same))
