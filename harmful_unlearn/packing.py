"""Texts to tensors: rows, plain or packed as trees, and which positions count for how much.

A loss of SKU is a weighted sum over positions. Everything in which the modules and the two variants
differ (where an answer starts, what is averaged over, whether the question counts) is in the
weights made here, so that losses.py has no branch.

A harmful question's own answer (GD) and the K random ones (RD) follow the same tokens. Packed, they are one row

    [question | answer | random answer 1 | ... | random answer K]

in which each answer sees the question and itself, at the positions that it has in a row of its own. That
gives every loss and gradient of separate rows from one forward pass over each question.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import takewhile
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
        answer_start: index of the first token that a model has to say: that the text does not share with its
            prefix less the trailing space, since " W" may be one token or two. An empty answer has none.
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
        row, position: [scored] int64; which hidden states go through the output embeddings, each once.
        index, target: [entries] int64; a loss reads the cross-entropy of token `target[e]` at scored position
            `index[e]`. After the question of a packed row several tokens may follow. Ascending in `index`.
        weights: an [entries] float32 vector for each module laid out in this batch: "gd" and "rd" for
            harmful text, "pd" for normal text (where entry and scored position are one, without a target).
        branch: [rows, length] int64 of packed rows: 0 in the question, n in the n-th answer, -1 in padding.
        position_ids: [rows, length] int64 of packed rows: each token's place in its own text.
    """

    input_ids: Tensor
    attention_mask: Tensor
    row: Tensor
    position: Tensor
    index: Tensor
    target: Tensor
    weights: dict[str, Tensor]
    branch: Tensor | None = None
    position_ids: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens of text in the batch, padding left out; a packed question counts once, a stand-in (`share`) not."""
        return int(self.attention_mask.sum()) if any(weight.any() for weight in self.weights.values()) else 0

    @property
    def model_inputs(self) -> dict[str, Tensor]:
        """The forward pass's arguments; the mask of packed rows is [rows, 1, length, length], true where seen."""
        if self.branch is None:
            return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        seeing, seen = self.branch[:, :, None], self.branch[:, None, :]
        mask = ((seen == 0) | (seen == seeing)).tril()
        return {"input_ids": self.input_ids, "attention_mask": mask[:, None], "position_ids": self.position_ids}

    def share(self, process: int, processes: int) -> "Batch":
        """The rows of one of several processes, whose losses and gradients add up to the batch's.

        Where there are fewer rows than processes, the first row stands in with weights of 0: all take part in
        every forward pass.
        """
        if processes == 1:
            return self
        rows = torch.tensor(range(process, len(self.input_ids), processes), dtype=torch.long)
        idle = not len(rows)
        rows = torch.zeros(1, dtype=torch.long) if idle else rows
        scored = torch.isin(self.row, rows)
        entries = scored[self.index]
        position = self.position[scored]
        length = max([int(self.attention_mask[rows].sum(1).max()), *(position + 1).tolist()])

        def cut(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows, :length]

        return Batch(
            input_ids=cut(self.input_ids),
            attention_mask=cut(self.attention_mask),
            row=torch.searchsorted(rows, self.row[scored]),
            position=position,
            index=(scored.cumsum(0) - 1)[self.index[entries]],
            target=self.target[entries],
            weights={module: weight[entries] * (not idle) for module, weight in self.weights.items()},
            branch=cut(self.branch),
            position_ids=cut(self.position_ids),
        )

    def to(self, device: torch.device) -> "Batch":
        """The same batch with every tensor on `device`."""
        weights = {module: weight.to(device) for module, weight in self.weights.items()}
        tensors = {
            field.name: value if value is None else value.to(device)
            for field in fields(self) if field.name != "weights" for value in [getattr(self, field.name)]
        }  # fmt: skip
        return Batch(weights=weights, **tensors)


class _Text(NamedTuple):
    """A text of a batch, and what of it counts."""

    module: str
    input_ids: list[int]
    positions: range  # the scored ones
    sharing: int  # how many positions share the text's weight of 1


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
        asked_ids = self._tokenize([format_prefix(question).rstrip() for question in questions])
        prefixes = dict(zip(questions, zip(prefix_ids, asked_ids, strict=True), strict=True))
        encoded = []
        for pair, ids in zip(pairs, texts, strict=True):
            prefix, asked = prefixes[pair.question]
            same = (ours == theirs for ours, theirs in zip(asked, ids, strict=False))
            start = len(ids) if ids == prefix else sum(takewhile(bool, same))
            kept = ids[: self.max_length]
            encoded.append(Encoded(kept, len(prefix) - 1, start, len(kept) < len(ids)))
        return encoded

    def harmful_batch(
        self, pairs: list[Pair], answers: list[str], guided: bool = True, packed_up_to: float = 0
    ) -> Batch:
        """The texts of GD and RD for one step, to be run in one forward pass.

        Args:
            pairs: B harmful questions with their own answers (GD's texts, unless `guided` is false).
            answers: K answers drawn from the pool; each is paired with every question (B*K texts of RD;
                released code, point 11). Empty: no RD.
            packed_up_to: a row for each question rather than for each text, if no text has more tokens.

        In "released", a text's positions from its start on share a weight of 1, the last position,
        which predicts nothing, included (point 9), and RD scores the question too (point 11). In
        "paper", each answer token counts once and nothing else does, with weights that add up to 1.
        """
        asked = [
            [("gd", pair)] * guided + [("rd", Pair(pair.question, answer)) for answer in answers] for pair in pairs
        ]
        encoded = iter(self.encode([pair for texts in asked for _, pair in texts]))
        groups = [[self._text(module, next(encoded)) for module, _ in texts] for texts in asked]
        averaged = {module: self._averaged(module, groups) for module in ("gd", "rd")}
        longest = max(len(text.input_ids) for group in groups for text in group)
        if longest > packed_up_to or len(answers) + guided == 1:
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
            for module, wanted in (("gd", guided), ("rd", answers)) if wanted
        }  # fmt: skip
        return self._batch(rows, list(scored), [entry for entry, _ in ordered], weights)

    def normal_batch(self, pairs: list[Pair]) -> Batch:
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
        return self._batch([_lay_out([text]) for text in ids], scored, entries, {"pd": [1 / len(scored)] * len(scored)})

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts)["input_ids"] if texts else []

    def _text(self, module: str, text: Encoded) -> _Text:
        length = len(text.input_ids)
        if self.variant == "released":
            first = text.start_loc if module == "gd" else RELEASED_RD_START
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


def answer_pool(losses: set[str], harmful: HarmfulData, normal: NormalData) -> list[str]:
    """Where the K random answers come from: harmful answers (RD), or normal training answers ("rm")."""
    return [normal.texts[row].answer for row in normal.train] if "rm" in losses else harmful.answers


class StepTexts(NamedTuple):
    """The batches of a step; None for one that no loss reads.

    Attributes:
        harmful: prompts with their own and with random answers.
        normal: normal texts.
        safe: those of the prompts that have a safe answer beside the harmful one, with it.
    """

    harmful: Batch | None = None
    normal: Batch | None = None
    safe: Batch | None = None


@dataclass(frozen=True)
class StepBatches:
    """The batches of each step, a pure function of the step.

    Attributes:
        losses: names in losses.py; a loss that is left out (its weight is 0) costs nothing.
        packed_up_to: tokens; steps whose texts are no longer have a row for each harmful question. 0: plain rows.
        share: which of how many processes this is. The batches are its part of each step's.
    """

    packer: Packer
    order: BatchOrder
    harmful: HarmfulData
    normal: NormalData
    losses: set[str]
    packed_up_to: float = 0
    share: tuple[int, int] = (0, 1)

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
            touched |= asked if self.losses & {"gd", "ga", "rd", "rm", "sa"} else set()
            if "rd" in self.losses:
                touched |= {self.harmful.answer_questions[row] for row in draw.answer_rows}
        return trained, touched

    def ahead(self, steps: range, device: torch.device) -> Iterator["StepTexts"]:
        """Each step's batches, made in a thread while the step before is computed."""
        with ThreadPoolExecutor(1, "batches") as worker:
            coming = deque(worker.submit(self, step, device) for step in steps[:1])
            for step in steps[1:]:
                coming.append(worker.submit(self, step, device))
                yield coming.popleft().result()
            yield from (last.result() for last in coming)

    def __call__(self, step: int, device: torch.device) -> "StepTexts":
        """The batches of a step (from 0)."""
        draw, harmful, normal, safe = self.order[step], None, None, None

        def mine(batch: Batch) -> Batch:
            return batch.share(*self.share).to(device)

        own, random = self.losses & {"gd", "ga"}, self.losses & {"rd", "rm"}
        if own or random:
            pairs = [self.harmful.pairs[row] for row in draw.harmful_rows]
            answers = [self.pool[row] for row in draw.answer_rows] if random else []
            harmful = mine(self.packer.harmful_batch(pairs, answers, bool(own), self.packed_up_to))
        texts = [self.normal.texts[row] for row in draw.normal_rows]
        if self.losses & {"pd", "kl", "lp"}:
            normal = mine(self.packer.normal_batch(texts))
        if "ft" in self.losses:  # laid out as GD: the answer counts
            normal = mine(self.packer.harmful_batch(texts, []))
        if "sa" in self.losses:
            asked = [(self.harmful.pairs[row].question, self.harmful.safe_answers[row]) for row in draw.harmful_rows]
            answered = [Pair(question, answer) for question, answer in asked if answer]
            safe = mine(self.packer.harmful_batch(answered, [])) if answered else None
        return StepTexts(harmful, normal, safe)
