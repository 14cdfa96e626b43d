"""The losses of SKU's stage 1, by the paper's names, and those of the methods it is compared with.

    L = e1 * L_GD + e2 * L_RD + e3 * L_PD

All of them are weighted sums over scored positions; the weights come with the batch (packing.py).
The tables at the end name them: which losses a method minimises is in unlearn_harm_new.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from harmful_unlearn.models import FrozenBase
from harmful_unlearn.packing import Batch


def scored_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Logits of the scored positions alone, as the model defines them (its softcap or scale included).

    The hidden states of all other positions never meet the output embeddings, so logits of
    [rows, length, vocabulary] never exist.

    Returns:
        [scored, vocabulary] float32.
    """

    def keep_scored(_module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]  # [rows, length, hidden]
        return (hidden[batch.row.to(hidden.device), batch.position.to(hidden.device)],)

    hook = model.get_output_embeddings().register_forward_pre_hook(keep_scored)
    try:
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    finally:
        hook.remove()
    return output.logits.float()


def answer_cross_entropy(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Cross-entropy of the next token at every scored position of harmful text, one forward pass.

    Returns:
        [scored] float32, nats.
    """
    logits = scored_logits(model, batch)
    return F.cross_entropy(logits, batch.target.to(logits.device), reduction="none")


def guided_distortion(cross_entropy: Tensor, batch: Batch) -> Tensor:
    """L_GD: cross-entropy of each harmful answer given its own prompt (released code, points 3, 9).

    Args:
        cross_entropy: [scored], of `answer_cross_entropy` on the same batch.

    Returns:
        A scalar in nats; mean over rows.
    """
    return batch.weights["gd"].to(cross_entropy.device) @ cross_entropy


def random_disassociation(cross_entropy: Tensor, batch: Batch) -> Tensor:
    """L_RD: mean cross-entropy of K random harmful answers given each prompt (released code, point 11).

    Args and returns as `guided_distortion`.
    """
    return batch.weights["rd"].to(cross_entropy.device) @ cross_entropy


def preservation_divergence(model: PreTrainedModel, base: FrozenBase, batch: Batch) -> Tensor:
    """L_PD: minus KL(P_theta_o || P_theta) over the positions of normal text (released code, point 12).

    The released code adds 1e-12 inside the logarithm of p; that changes the value by less than
    1e-12 times the vocabulary and the gradient by nothing, so it is left out.

    Returns:
        A scalar in nats, 0 or less up to rounding.
    """
    with torch.no_grad(), base.active() as frozen:
        log_p = scored_logits(frozen, batch).log_softmax(-1)
    log_q = scored_logits(model, batch).log_softmax(-1)
    # The base may sit on another device than the current model's head.
    divergence = F.kl_div(log_q, log_p.to(log_q.device), reduction="none", log_target=True).sum(-1)
    return -(batch.weights["pd"].to(divergence.device) @ divergence)


def base_divergence(model: PreTrainedModel, base: FrozenBase, batch: Batch) -> Tensor:
    """KL(P_theta_o || P_theta) on normal text, as GA + mismatch minimises it: PD with its sign turned.

    Yao et al. 2023 call it the forward KL; their code leaves out the base's entropy, a constant.

    Returns:
        A scalar in nats, 0 or more up to rounding.
    """
    return -preservation_divergence(model, base, batch)


def normal_fine_tuning(model: PreTrainedModel, _base: FrozenBase | None, batch: Batch) -> Tensor:
    """Cross-entropy of normal answers given their questions: the baseline FT. A scalar in nats."""
    return guided_distortion(answer_cross_entropy(model, batch), batch)


def gradient_ascent(cross_entropy: Tensor, batch: Batch) -> Tensor:
    """L_GA, the baseline of Yao et al. 2023: GD with the sign turned (released code, point 13)."""
    return -guided_distortion(cross_entropy, batch)


# Of cross-entropies on harmful prompts, one forward pass for all; "rm", the random mismatch of Yao et
# al. 2023, is RD's formula with normal answers.
ON_HARMFUL = {
    "gd": guided_distortion,
    "ga": gradient_ascent,
    "rd": random_disassociation,
    "rm": random_disassociation,
}
# Of the model, the base and a batch of normal text.
ON_NORMAL = {"pd": preservation_divergence, "kl": base_divergence, "ft": normal_fine_tuning}
NEED_BASE = {"pd", "kl"}
