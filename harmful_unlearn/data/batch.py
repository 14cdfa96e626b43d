"""Batch: rows of tokens, the positions that losses read, and their weights."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

MULTIPLE = 32  # lengths that come again: oneDNN keeps megabytes for each number of tokens that it has met


@dataclass(frozen=True)
class Row:
    """A text, or texts that share a question, and what losses read in them.

    Attributes:
        input_ids: [tokens].
        branch: [tokens] 0 in the question, n in the n-th answer.
        position_ids: [tokens] each token's place in its own text.
        entries: (place, target): the weight in each average. The cross-entropy of token `target` is read at the
            position `place` of the row, which may lie in its padding ("released" counts that of normal texts).
        averages: the names of the averages.
        texts: the number of texts of the whole step, where each text has an average of its own.
    """

    input_ids: list[int]
    branch: list[int]
    position_ids: list[int]
    entries: dict[tuple[int, int], dict[str, float]]
    averages: tuple[str, ...]
    texts: int = 1

    @property
    def length(self) -> int:
        """Number of tokens, with the padding that is scored."""
        return max([len(self.input_ids), *(place + 1 for place, _ in self.entries)])

    def without_weight(self) -> "Row":
        """The same row, of which nothing counts."""
        return replace(self, entries={at: dict.fromkeys(weights, 0.0) for at, weights in self.entries.items()})


@dataclass(frozen=True)
class Batch:
    """Rows of text for one forward pass, and the positions that losses read.

    Attributes:
        input_ids: [rows, length] int64. Plain rows are padded on the right. Packed rows follow each other in one row.
            The tokens of all rows together are a multiple of MULTIPLE (for odd numbers of rows, nearly so), if no
            row is padded beyond the longest text allowed for that.
        row, position: [scored] int64; the positions whose logits are computed, each once.
        index, target: [entries] int64; entry e is the cross-entropy of token `target[e]` at scored position
            `index[e]`. Ascending in `index`. In a packed row several tokens may follow one position.
        weights: an [entries] float32 vector for each average that losses may take over this batch: "own_answer" and
            "random_answers" of `Collator.answers`; "text" of `Collator.texts` (which has one entry for each scored
            position, and no targets); "0", "1", ... of `Collator.separate_answers` and `Collator.preferences`, one
            for each text.
        texts: the number of texts in all batches of the step, where each has an average of its own.
        attention_mask: [rows, length] int64 of plain rows, 0 in the padding. Of packed rows a layout, [1, 1, 2,
            length] int64: the number of each token's row (-1 in the padding), and of its branch there
            (models/tree_attention.py).
        position_ids: [1, length] int64 of packed rows: each token's place in its own text.
    """

    input_ids: Tensor
    row: Tensor
    position: Tensor
    index: Tensor
    target: Tensor
    weights: dict[str, Tensor]
    attention_mask: Tensor
    position_ids: Tensor | None = None
    texts: int = 1

    @property
    def is_packed(self) -> bool:
        return self.position_ids is not None

    @property
    def tokens(self) -> int:
        """Number of tokens, without padding; 0 where nothing counts. A question is counted once in a packed row."""
        if not any(weight.any() for weight in self.weights.values()):
            return 0
        is_text = self.attention_mask[0, 0, 0] >= 0 if self.is_packed else self.attention_mask
        return int(is_text.sum())

    @property
    def model_inputs(self) -> dict[str, Tensor]:
        """The arguments of the forward pass."""
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return inputs if self.position_ids is None else inputs | {"position_ids": self.position_ids}

    def to(self, device: torch.device) -> "Batch":
        """The same batch with every tensor on `device`."""
        moved: dict[str, Any] = {n: value.to(device) for n, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, weights={key: weight.to(device) for key, weight in self.weights.items()}, **moved)


def are_packed(rows: list[Row], packed_up_to: float) -> bool:
    """Whether no text of these rows has more tokens."""
    return all(max(row.position_ids, default=0) < packed_up_to for row in rows)


def batch_of(rows: list[Row], pad_token_id: int, packed_up_to: float, max_length: int) -> Batch:
    """The tensors of rows for one forward pass.

    Args:
        max_length: in tokens: no text is longer, and plain rows are padded to no more.
        packed_up_to: in tokens: if no text is longer, the rows are packed; else each holds one text.
    """
    packed = are_packed(rows, packed_up_to)
    keys = dict.fromkeys(key for row in rows for key in row.averages)
    scored: dict[tuple[int, int], int] = {}  # (row, position): index
    entries = []  # (index, target, weight in each average)
    start = 0
    for number, row in enumerate(rows):
        for (place, target), weights in sorted(row.entries.items()):
            at = (0, start + place) if packed else (number, place)
            entries.append((scored.setdefault(at, len(scored)), target, weights))
        start += len(row.input_ids)
    longest = max(row.length for row in rows)
    longest = max(longest, min(_up(longest, max(1, MULTIPLE // len(rows))), max_length))

    def padded(values: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([row + [filler] * (longest - len(row)) for row in values])

    position_ids = None
    if packed:
        rest = [0] * (_up(start, MULTIPLE) - start)
        input_ids = torch.tensor([[token for row in rows for token in row.input_ids] + [pad_token_id for _ in rest]])
        numbers = [number for number, row in enumerate(rows) for _ in row.input_ids] + [-1 for _ in rest]
        attention_mask = torch.tensor([[[numbers, [branch for row in rows for branch in row.branch] + rest]]])
        position_ids = torch.tensor([[position for row in rows for position in row.position_ids] + rest])
    else:
        input_ids = padded([row.input_ids for row in rows], pad_token_id)
        attention_mask = padded([[1] * len(row.input_ids) for row in rows], 0)
    return Batch(
        input_ids=input_ids,
        row=torch.tensor([row for row, _ in scored], dtype=torch.long),
        position=torch.tensor([position for _, position in scored], dtype=torch.long),
        index=torch.tensor([index for index, _, _ in entries], dtype=torch.long),
        target=torch.tensor([target for _, target, _ in entries], dtype=torch.long),
        weights={key: torch.tensor([weights.get(key, 0.0) for _, _, weights in entries]) for key in keys},
        attention_mask=attention_mask,
        position_ids=position_ids,
        texts=rows[0].texts,
    )


def _up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
