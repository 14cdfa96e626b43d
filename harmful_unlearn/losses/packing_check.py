"""Can this model read packed rows (data/collator.py)? Checked once, on the model itself, before it is trained."""

import math
from dataclasses import replace

import torch
from transformers import PretrainedConfig, PreTrainedModel

from harmful_unlearn.data.batch import Batch
from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.errors import is_out_of_memory
from harmful_unlearn.losses.objective import cross_entropy
from harmful_unlearn.models.offload import execution_device
from harmful_unlearn.models.tree_attention import TREE

PAIRS = [
    Pair("How is a kite made?", "Tie two sticks together, stretch paper over them, and add a tail."),
    Pair("How long does a pot of tea have to stand?", "Three minutes."),
]
ANSWERS = ["Ask the person who knows.", "First this and then that, slowly, until all of it is done."]
# Nats by which a token's cross-entropy may differ in packed and plain rows: above rounding, and far below what a wrong
# mask or position does.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
TOLERANCE_OF_16_BITS = 0.5
# Nats by which it may change when another answer's tokens do: nothing in exact arithmetic, whatever the dtype. Only
# experts are multiplied in other shapes then, which rounds otherwise.
LEAK_OF_16_BITS = 0.05
SEES = {"full_attention", "sliding_attention", "chunked_attention"}  # layers that see what the mask shows, and no more


def max_packed_length(model: PreTrainedModel, collator: Collator) -> tuple[float, str]:
    """The most tokens that a text may have to be packed with others, and why not more. Switches tree attention on.

    Packed rows need an architecture that takes another attention function and explicit position ids (a model with
    ALiBi ignores them), and in which nothing but attention passes from token to token.

    Returns:
        The length and the reason. 0 where packed rows do not give what plain ones do; infinity and "" where any text
        may be packed.
    """
    length, reason = length_by_config(model.config)
    if not length:
        return length, reason
    probe = Collator(collator.template, "paper", collator.max_length)
    plain, packed = (probe.answers_batch(PAIRS, ANSWERS, packed_up_to=up_to) for up_to in (0, math.inf))
    training = model.training
    model.eval()
    problem = ""
    try:
        model.set_attn_implementation(TREE)
        with torch.inference_mode():
            device = execution_device(model)
            changed = _with_other_first_answer(packed)
            one, other, after = (cross_entropy(model, batch.to(device)).cpu() for batch in (plain, packed, changed))
        # Packed, texts that begin alike share an entry, so each is compared with the nearest of the other layout.
        between = (one[:, None] - other).abs()
        difference = max(between.amin(0).max().item(), between.amin(1).max().item())
        if not difference <= TOLERANCE.get(model.dtype, TOLERANCE_OF_16_BITS):
            problem = f"they differ from plain rows by {difference:.2g} nats"
        unmoved = packed.attention_mask[0, 0, 1, packed.position[packed.index]] != 1
        leak = (after - other)[unmoved].abs().max().item()
        if not problem and not leak <= TOLERANCE.get(model.dtype, LEAK_OF_16_BITS):
            problem = f"an answer changes by {leak:.2g} nats with the answer before it"
    except Exception as error:  # a model that does not know such a mask or argument may raise anything
        if is_out_of_memory(error):
            raise
        problem = f"it cannot run them ({type(error).__name__})"
    finally:
        model.train(training)
        if problem:
            model.set_attn_implementation("sdpa")
    return (0, problem) if problem else (length, reason)


def length_by_config(config: PretrainedConfig) -> tuple[float, str]:
    """The most that `max_packed_length` can return, and why, before there are weights.

    Tree attention knows no sliding window, so texts longer than the window are not packed.
    """
    if (attention := config._attn_implementation) not in ("sdpa", TREE):
        return 0, f"its attention is {attention}, not sdpa"
    config = config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or SEES)
    if others := sorted(kinds - SEES):
        return 0, f"it has layers of {', '.join(others)}"
    windows = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    sizes = (getattr(config, name, None) for kind, name in windows.items() if kind in kinds)
    window = min((size for size in sizes if size), default=math.inf)
    return window, "" if window == math.inf else f"its attention reaches back {window} tokens"


def _with_other_first_answer(packed: Batch) -> Batch:
    """The same rows, with the tokens of all first answers in reverse order."""
    ids, branch = packed.input_ids.clone(), packed.attention_mask[0, 0, 1]
    ids[0, branch == 1] = ids[0, branch == 1].flip(0)
    return replace(packed, input_ids=ids)
