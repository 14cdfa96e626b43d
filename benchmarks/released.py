"""The released computation of a step, straightforwardly: rows padded together, all logits, one row after another."""

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.prompt_format import Pair, format_pair, format_prefix
from harmful_unlearn.models.reference import ReferenceModel

WEIGHTS = {"gd": 2.5, "rd": 2.5, "pd": 1.0}


def released(
    model: PreTrainedModel,
    base: ReferenceModel,
    collator: Collator,
    pairs: list[Pair],
    answers: list[str],
    normal: list[Pair],
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """GD, RD and PD as implementation details 3 and 9 to 12 describe them: their weighted sum, and each."""
    tokenizer, device = collator.template.tokenizer, model.device

    def padded(texts: list[Pair]) -> dict:
        # Written out, since a tokenizer's own padding may be its end token, which texts have, too.
        ids = [tokenizer(format_pair(text.question, text.answer))["input_ids"] for text in texts]
        ids = [row[: collator.max_length] for row in ids]
        longest = max(map(len, ids))
        rows = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
        return {"input_ids": rows.to(device), "attention_mask": mask.to(device)}

    def answer_loss(texts: list[Pair], starts: list[int]):
        rows = padded(texts)
        logits = model(**rows).logits.float()
        losses = []
        for row, start in enumerate(starts):
            ids, is_text = rows["input_ids"][row], rows["attention_mask"][row]
            entropies = F.cross_entropy(logits[row, :-1], ids[1:], reduction="none") * is_text[1:]
            weight = torch.zeros(len(ids), device=device)
            weight[start:] = 1
            weight *= is_text
            weight /= weight.sum()
            losses.append((weight[:-1] * entropies).sum())
        return torch.stack(losses).mean()

    gd = answer_loss(pairs, [len(tokenizer(format_prefix(pair.question))["input_ids"]) - 1 for pair in pairs])
    random = [Pair(pair.question, answer) for pair in pairs for answer in answers]
    rd = answer_loss(random, [2] * len(random))
    rows = padded(normal)
    q = model(**rows).logits.float().softmax(-1)
    with torch.no_grad(), base.active() as theta_o:
        p = theta_o(**rows).logits.float().softmax(-1)
    pd = -(p * ((p + 1e-12) / q).log()).sum(-1).mean()
    values = {"gd": gd, "rd": rd, "pd": pd}
    return sum(WEIGHTS[name] * loss for name, loss in values.items()), values
