"""Pairs to batches.

Two ideas:

1. Every loss is a weighted sum over positions. The losses, and the two variants, differ in where an answer starts, in
   what is averaged over, and in whether the question counts. All of that is in the weights that are computed here
   (`Batch.weights`), so that the losses themselves need no distinction.

2. A harmful question's own answer (GD) and the K random ones (RD) follow the same tokens. Packed, they are one row

       [question | own answer | random answer 1 | ... | random answer K]

   in which each answer sees the question and itself, at the positions that it would have in a row of its own. One
   forward pass over the question then gives the losses and gradients of K + 1 separate rows. Such rows follow each
   other without padding (batch.py).
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from harmful_unlearn.data.batch import Batch, Row, batch_of
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.data.templates import Template

VARIANTS = ("released", "paper")
# The first position of RD in the released code: all of the question counts but its first two tokens.
RELEASED_RD_START = 2


@dataclass(frozen=True)
class TokenizedText:
    """One text as token ids."""

    input_ids: list[int]  # of the complete text, cut to the collator's `max_length`
    # Where the released code has the answer start: the number of tokens of the prefix, less one (implementation
    # detail 3). It is the first answer token if the prefix's trailing space merges into that, as in byte-level BPE.
    # In a chat it is the prompt's last token, so that the released GD predicts the first answer token there.
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
    weight: float  # of each position


@dataclass(frozen=True)
class Collator:
    """Turns pairs into batches for one template (with its tokenizer) and one variant."""

    template: Template
    variant: str  # "released" or "paper" (docs/implementation-details.md)
    max_length: int  # tokens; longer texts are cut on the right, that is, in the answer

    def encode(self, pairs: list[Pair]) -> list[TokenizedText]:
        """Tokenise pairs, and find where each answer starts (implementation details 1 to 4)."""
        texts = self.template.texts(pairs)
        questions = list(dict.fromkeys(pair.question for pair in pairs))
        prefixes = dict(zip(questions, self.template.prefixes(questions), strict=True))
        prompts = dict(zip(questions, self.template.prompts(questions), strict=True))
        encoded = []
        for pair, ids in zip(pairs, texts, strict=True):
            prefix = prefixes[pair.question]
            answer_start = len(ids) if ids == prefix else _shared_length(prompts[pair.question], ids)
            is_cut = len(ids) > self.max_length
            encoded.append(TokenizedText(ids[: self.max_length], len(prefix) - 1, answer_start, is_cut))
        return encoded

    def answers(
        self,
        pairs: list[Pair],
        answers: list[str],
        own_answers: bool = True,
        packed_up_to: float = 0,
        row_tokens: float = math.inf,
    ) -> list[Row]:
        """Questions with their own answers and with others.

        In "released", the positions of a text from its start on share a weight of 1, the last position, which predicts
        nothing, included, and random answers' questions are scored, too (implementation details 9 and 11). In "paper",
        the answer tokens of a text share a weight of 1, and nothing else counts. The weights of all texts of a kind are
        then averaged; in "paper" without texts whose answer has no token to score.

        Args:
            pairs: B questions with their own answers.
            answers: K answers, each of which is paired with every question (B * K texts of RD). May be empty.
            own_answers: whether the questions' own answers are in the batch (GD's texts).
            packed_up_to: in tokens: if no text is longer, a row holds a question with its answers, in tokens at most
                `row_tokens`; else one text.
        """
        keys = (["own_answer"] if own_answers else []) + ["random_answers"] * len(answers)  # of a question's texts
        answers_of = [[pair.answer, *answers] if own_answers else answers for pair in pairs]
        texts = [Pair(pair.question, answer) for pair, row in zip(pairs, answers_of, strict=True) for answer in row]
        encoded = iter(self.encode(texts))
        groups = [[self._scored(key, next(encoded)) for key in keys] for _ in pairs]  # of each row
        flat = sorted((text for group in groups for text in group), key=lambda text: text.key)  # own answers first
        averaged = [text.key for text in flat if text.positions or self.variant == "released"]  # others score nothing
        averaged_over = {key: max(averaged.count(key), 1) for key in keys}
        if max(len(text.input_ids) for text in flat) > packed_up_to:
            groups = [[text] for text in flat]
        else:
            groups = [part for group in groups for part in _divided(group, row_tokens)]
        return [_lay_out(group, averaged_over) for group in groups]

    def separate_answers(self, pairs: list[Pair], packed_up_to: float = 0, row_tokens: float = math.inf) -> list[Row]:
        """Answers that are averaged over nothing: `Batch.weights["3"]` is 1 at each token of the fourth answer.

        Answers to the same question share a row; the limits are those of `answers`.
        """
        groups: dict[str, list[_ScoredText]] = defaultdict(list)
        texts = [_answer(number, text, 1.0) for number, text in enumerate(self.encode(pairs))]
        for pair, text in zip(pairs, texts, strict=True):
            groups[pair.question].append(text)
        packed = all(len(text.input_ids) <= packed_up_to for text in texts)
        parts = [part for group in groups.values() for part in _divided(group, row_tokens if packed else 0)]
        scored = sum(bool(text.positions) for text in texts)
        return [_lay_out(part, {text.key: 1 for text in part}, scored) for part in parts]

    def preferences(self, pairs: list[Pair], preferred: list[str], packed_up_to: float = 0) -> list[list[Row]]:
        """Two answers to a question: `Batch.weights["3"]` is 1 at each token of the fourth question's preferred answer,
        and -1 at those of its own.

        Returns:
            The rows of each question: one, or where a text has more than `packed_up_to` tokens one for each answer.
        """
        better = self.encode([Pair(pair.question, answer) for pair, answer in zip(pairs, preferred, strict=True)])
        groups = [
            [_answer(number, text, 1.0), _answer(number, other, -1.0)]
            for number, (text, other) in enumerate(zip(better, self.encode(pairs), strict=True))
        ]
        packed = all(len(text.input_ids) <= packed_up_to for group in groups for text in group)
        scored = sum(any(text.positions for text in group) for group in groups)
        rows = []
        for group in groups:
            parts = [group] if packed else [[text] for text in group]
            rows.append([_lay_out(part, {part[0].key: 1}, scored) for part in parts])
        return rows

    def texts(self, pairs: list[Pair]) -> list[Row]:
        """Whole texts, for PD (implementation detail 12).

        In "released" every position of the padded rows has the same weight, padding included; in "paper" every token
        of text has. The weights add up to 1.
        """
        ids = [text[: self.max_length] for text in self.template.texts(pairs)]
        longest = max(map(len, ids))
        lengths = [longest if self.variant == "released" else len(text) for text in ids]
        weights = {"text": 1 / sum(lengths)}
        return [
            Row(text, [0] * len(text), [*range(len(text))], {(at, 0): weights for at in range(length)}, ("text",))
            for text, length in zip(ids, lengths, strict=True)
        ]

    def batch(self, rows: list[Row], packed_up_to: float = 0) -> Batch:
        """The rows for one forward pass; `packed_up_to` as in `answers`."""
        return batch_of(rows, self.template.tokenizer.pad_token_id, packed_up_to, self.max_length)

    def answers_batch(
        self, pairs: list[Pair], answers: list[str], own_answers: bool = True, packed_up_to: float = 0
    ) -> Batch:
        """`answers`, all in one forward pass."""
        return self.batch(self.answers(pairs, answers, own_answers, packed_up_to), packed_up_to)

    def texts_batch(self, pairs: list[Pair]) -> Batch:
        """`texts`, all in one forward pass."""
        return self.batch(self.texts(pairs))

    def _scored(self, key: str, text: TokenizedText) -> _ScoredText:
        length = len(text.input_ids)
        if self.variant == "released":
            first = text.start_loc if key == "own_answer" else RELEASED_RD_START
            shared_by = length - first
        else:
            first, shared_by = text.answer_start - 1, length - text.answer_start
        return _ScoredText(key, text.input_ids, range(first, length - 1), 1 / max(shared_by, 1))


def _answer(number: int, text: TokenizedText, weight: float) -> _ScoredText:
    """A text of whose answer every token counts."""
    return _ScoredText(str(number), text.input_ids, range(text.answer_start - 1, len(text.input_ids) - 1), weight)


def _divided(texts: list[_ScoredText], row_tokens: float) -> list[list[_ScoredText]]:
    """A question's texts in as many parts as it takes for each to have at most `row_tokens`, if one text has not more.

    The question is repeated in each part.
    """
    parts: list[list[_ScoredText]] = [[]]
    for text in texts:
        together = [*parts[-1], text]
        shared = _shared_length(*(t.input_ids for t in together))
        if parts[-1] and shared + sum(len(t.input_ids) - shared for t in together) > row_tokens:
            parts.append([text])
        else:
            parts[-1] = together
    return parts


def _lay_out(texts: list[_ScoredText], averaged_over: dict[str, int], of_texts: int = 1) -> Row:
    """One row of texts, which begins with the tokens that all of them share.

    Args:
        averaged_over: the number of texts of each kind in all rows.
        of_texts: `Row.texts`.
    """
    shared = _shared_length(*(text.input_ids for text in texts))
    row = Row(texts[0].input_ids[:shared], [0] * shared, [*range(shared)], {}, tuple(averaged_over), of_texts)
    for number, text in enumerate(texts, 1):
        places = [*range(shared), *range(len(row.input_ids), len(row.input_ids) + len(text.input_ids) - shared)]
        row.input_ids.extend(text.input_ids[shared:])
        row.branch.extend([number] * (len(text.input_ids) - shared))
        row.position_ids.extend(range(shared, len(text.input_ids)))
        weight = text.weight / averaged_over[text.key]
        for position in text.positions:
            weights = row.entries.setdefault((places[position], text.input_ids[position + 1]), {})
            weights[text.key] = weights.get(text.key, 0.0) + weight
    return row


def _shared_length(*texts: list[int]) -> int:
    """The number of tokens that all texts begin with."""
    same = (len(set(tokens)) == 1 for tokens in zip(*texts, strict=False))
    return sum(takewhile(bool, same))
