"""Whether a GPU computes the losses and gradients that the CPU does, for every layout of the rows. Used by gpu.py."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks import made_up, measuring
from benchmarks.step import AWAY
from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.data.step_batches import StepBatch
from harmful_unlearn.data.templates import ReleasedTemplate
from harmful_unlearn.errors import UserError, first_line
from harmful_unlearn.losses.landing import LandingPoint
from harmful_unlearn.losses.objective import Objective
from harmful_unlearn.losses.packing_check import max_packed_length
from harmful_unlearn.losses.terms import LOSSES
from harmful_unlearn.models import tree_attention
from harmful_unlearn.models.reference import ReferenceModel

CLOSE = 5e-3  # relative: largest difference of a loss, or of a gradient to its largest value, in float32
LAYOUTS = {"packed, FlexAttention": math.inf, "packed, loop": math.inf, "plain rows": 0}
CHECKED = ["CUDA against CPU, fp32", "rows", "largest difference of a loss", "of a gradient, of its largest"]


class Wrong(UserError):
    """The GPU's losses or gradients are not the CPU's."""


def check(device: torch.device) -> list[list]:
    """The largest differences by model and layout. Raises Wrong: one is too large."""
    configs = {
        "OPT": made_up.opt_config(128, 2, 1000),
        "LLaMA, grouped queries": LlamaConfig(
            hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=1000, max_position_embeddings=2048,
        ),
    }  # fmt: skip
    rows = []
    for name, config in configs.items():
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        model = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(AWAY * torch.randn_like(parameter))
        collator = Collator(ReleasedTemplate(made_up.word_tokenizer(1000)), "released", 2048)
        expected = losses_and_gradients(model, base, collator, "plain rows")
        there, base_there = copy.deepcopy(model).to(device), copy.deepcopy(base).to(device)
        for layout in LAYOUTS:
            try:
                found = losses_and_gradients(there, base_there, collator, layout)
            except Exception as error:  # a layout that does not run; training would use plain rows
                rows.append([name, layout, f"{type(error).__name__}: {first_line(error)[:80]}", "–"])
                continue
            pairs = [(expected[loss], found[loss]) for loss in LOSSES]
            of_loss = max(abs(e[0] - f[0]) / max(1.0, abs(e[0])) for e, f in pairs)
            of_gradient = max(((e[1] - f[1]).abs().max() / e[1].abs().max()).item() for e, f in pairs)
            rows.append([name, layout, f"{of_loss:.1e}", f"{of_gradient:.1e}"])
            if not max(of_loss, of_gradient) <= CLOSE:
                print(measuring.table(CHECKED, rows))
                raise Wrong(f"the losses or gradients of {name} in {layout} are not those of the CPU")
    return rows


def losses_and_gradients(
    model: PreTrainedModel, base: PreTrainedModel, collator: Collator, layout: str
) -> dict[str, tuple[float, torch.Tensor]]:
    """Each loss term's value, in nats, and its gradient, [parameters], on the CPU."""
    reference = ReferenceModel(base)
    packed_up_to, reason = max_packed_length(model, collator) if LAYOUTS[layout] else (0, "")
    if reason:
        raise RuntimeError(f"plain rows: {reason}")
    harmful, normal = made_up.data(collator.template.tokenizer)
    safe = [Pair(pair.question, answer or "") for pair, answer in zip(harmful.pairs, harmful.safe_answers, strict=True)]
    preferences = collator.preferences(harmful.pairs[:2], [pair.answer for pair in safe[:2]], packed_up_to)
    batches = StepBatch(
        collator.answers_batch(harmful.pairs[:2], harmful.answers[:5], packed_up_to=packed_up_to),
        collator.texts_batch(normal.texts[:2]),
        collator.answers_batch(safe[:2], [], packed_up_to=packed_up_to),
        collator.answers_batch(normal.texts[:2], [], packed_up_to=packed_up_to),
        collator.batch(collator.separate_answers(harmful.pairs[:2], packed_up_to), packed_up_to),
        collator.batch(list(chain.from_iterable(preferences)), packed_up_to),
    )
    batches = StepBatch(*(batch and batch.to(model.device) for batch in batches))
    found = {}
    with without_flex_attention() if layout == "packed, loop" else nullcontext():
        for name, term in LOSSES.items():
            model.zero_grad()
            objective = Objective(model, {name: 1.0}, reference)
            if term.at_landing:
                with LandingPoint(model, reference, 1.0).reached() as chain_rule:
                    loss, values = objective.at_landing(model, batches)
                    (chain_rule * loss).backward()
            else:
                loss, values = objective(model, batches)
                loss.backward()
            gradients = [p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]
            found[name] = (values[name].item(), torch.cat(gradients))
    return found


@contextmanager
def without_flex_attention() -> Iterator[None]:
    """Within the block, packed rows go through the loop over texts, on a GPU too."""
    with mock.patch.object(tree_attention, "find_spec", lambda _name: None):
        yield
