"""The likelihood that a model gives to answers, and how far it is from another model on them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from harmful_unlearn.data.batch import Batch
from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.losses.objective import Objective, scored_logits
from harmful_unlearn.losses.packing_check import max_packed_length
from harmful_unlearn.models.offload import execution_device

WORST = 700.0  # nats a token: a broken model's cross-entropy is cut here, so that its figures stay finite
TOKENS = 2048  # in a forward pass


@torch.inference_mode()
def answer_nll(model: PreTrainedModel, collator: Collator, pairs: list[Pair], title: str) -> list[tuple[float, int]]:
    """The summed cross-entropy of each answer's tokens given its question, in nats, and their number.

    Args:
        title: of the progress bar.
    """
    objective = Objective(model, {})

    def entropies(batch: Batch) -> Tensor:
        return objective.cross_entropies(model, batch.to(execution_device(model)))

    return _summed(entropies, [model], collator, pairs, title)


@torch.inference_mode()
def answer_divergence(
    reference: PreTrainedModel, model: PreTrainedModel, collator: Collator, pairs: list[Pair], title: str
) -> list[tuple[float, int]]:
    """KL(reference || model) of the next token, summed over each answer's tokens, in nats, and their number.

    Args:
        title: of the progress bar.
    """

    def divergences(batch: Batch) -> Tensor:
        log_p, log_q = (
            scored_logits(one, batch.to(execution_device(one))).log_softmax(-1).cpu() for one in (reference, model)
        )
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)[batch.index]

    return _summed(divergences, [reference, model], collator, pairs, title)


def _summed(
    score: Callable[[Batch], Tensor], models: list[PreTrainedModel], collator: Collator, pairs: list[Pair], title: str
) -> list[tuple[float, int]]:
    """The sum of each answer's scores, and the number of its tokens.

    Answers to the same question are packed behind it, if the models can read such rows.

    Args:
        score: gives a score for each entry of a batch, [entries], by these models.
    """
    packed_up_to = min(max_packed_length(model, collator)[0] for model in models)
    rows = collator.separate_answers(pairs, packed_up_to, TOKENS)
    rows.sort(key=lambda row: -row.length)  # plain rows of like lengths have little padding
    scored: list[tuple[float, int]] = [(0.0, 0)] * len(pairs)
    with tqdm(total=len(pairs), desc=title, unit="answer", leave=False) as bar:
        while rows:
            size = max(1, min(TOKENS // rows[0].length, len(rows)))  # of rows that are at most as long
            part, rows = rows[:size], rows[size:]
            batch = collator.batch(part, packed_up_to)
            if len(batch.row):
                scores = score(batch).double().cpu().nan_to_num(nan=WORST).clamp(max=WORST)  # [entries]
                for key, weight in batch.weights.items():
                    scored[int(key)] = (float(weight.double() @ scores), int(weight.sum()))
            bar.update(len(batch.weights))
    return scored
