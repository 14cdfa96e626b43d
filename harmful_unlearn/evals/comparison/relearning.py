"""The relearning check: does the harm come back when an unlearned model is trained on a few harmful pairs again?

Knowledge that was removed has to be learned again; knowledge that was only suppressed comes back at once. Compare what
a few steps of Guided Distortion do to an unlearned model with what they do to the base.
"""

import numpy as np
import torch
from tqdm import trange
from transformers import PreTrainedModel

from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.data.step_batches import StepBatch
from harmful_unlearn.data.templates import Template
from harmful_unlearn.losses.objective import Objective
from harmful_unlearn.models.loading import context_length, enable_gradient_checkpointing
from harmful_unlearn.models.offload import execution_device
from harmful_unlearn.models.precision import computing_in

BATCH = 2


def relearn(
    model: PreTrainedModel,
    template: Template,
    pairs: list[Pair],
    steps: int,
    lr: float,
    seed: int,
    precision: str = "fp32",
) -> PreTrainedModel:
    """Fine-tune `model` in place on harmful pairs: AdamW at a constant rate, batches of two.

    Args:
        pairs: harmful pairs, in a new order each epoch.
        precision: "fp32" or "bf16", of forward and backward passes; trained weights keep their dtype.

    Raises:
        UserError: a weight to be trained is offloaded.
    """
    draw = np.random.default_rng(seed)
    collator = Collator(template, "paper", context_length(model.config))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, fused=True)
    objective = Objective(model, {"gd": 1.0})
    device = execution_device(model)
    enable_gradient_checkpointing(model, wanted=False)
    order: list[int] = []
    torch.manual_seed(seed)  # of dropout
    model.train()
    for _ in trange(steps, desc="relearning", unit="step", leave=False):
        while len(order) < BATCH:
            order += draw.permutation(len(pairs)).tolist()
        rows, order = order[:BATCH], order[BATCH:]
        batch = collator.answers_batch([pairs[row] for row in rows], []).to(device)
        with computing_in(precision, model):
            loss, _ = objective(model, StepBatch(batch))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
