"""Batch: rows of tokens, the positions that losses read, and their weights."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows of text for one forward pass, and the positions that losses read.

    Attributes:
        input_ids, attention_mask: [rows, length] int64; padded on the right, 0 in the mask.
        row, position: [scored] int64; the positions whose logits are computed, each once.
        index, target: [entries] int64; entry e is the cross-entropy of token `target[e]` at scored position
            `index[e]`. Ascending in `index`. In a packed row several tokens may follow one position.
        weights: an [entries] float32 vector for each average that losses may take over this batch: "own_answer" and
            "random_answers" of `Collator.answers_batch`; "text" of `Collator.texts_batch` (which has one entry for
            each scored position, and no targets).
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
        """Number of tokens, without padding and the dummy row of `share`; a packed question is counted once."""
        return int(self.attention_mask.sum()) if any(weight.any() for weight in self.weights.values()) else 0

    @property
    def model_inputs(self) -> dict[str, Tensor]:
        """The arguments of the forward pass. The mask of packed rows is [rows, 1, length, length], true where seen."""
        if self.branch is None or self.position_ids is None:
            return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        seeing, seen = self.branch[:, :, None], self.branch[:, None, :]
        mask = ((seen == 0) | (seen == seeing)).tril()
        return {"input_ids": self.input_ids, "attention_mask": mask[:, None], "position_ids": self.position_ids}

    def share(self, process: int, processes: int) -> "Batch":
        """The rows of one of several processes. Losses and gradients of all processes add up to the batch's.

        Every process has to take part in every forward pass: one without rows gets the first row, with weights of 0.
        """
        if processes == 1:
            return self
        is_idle = process >= len(self.input_ids)
        rows = torch.tensor([0] if is_idle else range(process, len(self.input_ids), processes))
        scored = torch.isin(self.row, rows)
        entries = scored[self.index]
        position = self.position[scored]
        # Of the padding, only what is scored ("released" counts the padding of normal texts).
        length = max([int(self.attention_mask[rows].sum(1).max()), *(position + 1).tolist()])
        share = 0.0 if is_idle else 1.0
        return Batch(
            input_ids=self.input_ids[rows, :length],
            attention_mask=self.attention_mask[rows, :length],
            row=torch.searchsorted(rows, self.row[scored]),
            position=position,
            index=(scored.cumsum(0) - 1)[self.index[entries]],
            target=self.target[entries],
            weights={key: share * weight[entries] for key, weight in self.weights.items()},
            branch=None if self.branch is None else self.branch[rows, :length],
            position_ids=None if self.position_ids is None else self.position_ids[rows, :length],
        )

    def to(self, device: torch.device) -> "Batch":
        """The same batch with every tensor on `device`."""
        moved: dict[str, Any] = {n: value.to(device) for n, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, weights={key: weight.to(device) for key, weight in self.weights.items()}, **moved)
