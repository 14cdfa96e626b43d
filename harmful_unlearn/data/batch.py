"""Batch: rows of tokens, the positions that losses read, and their weights."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows of text for one forward pass, and the positions that losses read.

    Attributes:
        input_ids, attention_mask: [rows, length] int64; padded on the right, 0 in the mask.
        row, position: [scored] int64; which hidden states go through the output embeddings, each once.
        index, target: [entries] int64; a loss reads the cross-entropy of token `target[e]` at scored position
            `index[e]`. After the question of a packed row several tokens may follow. Ascending in `index`.
        weights: an [entries] float32 vector for each average that losses may take over this batch: "own_answer" and
            "random_answers" of `Collator.answers_batch`; "text" of `Collator.texts_batch` (where entry and scored
            position are one, without a target).
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
            for field in fields(self)
            if field.name != "weights"
            for value in [getattr(self, field.name)]
        }
        return Batch(weights=weights, **tensors)
