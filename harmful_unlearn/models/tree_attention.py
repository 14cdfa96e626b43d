"""Attention over packed texts: an answer sees its question and itself, and nothing else is computed.

A packed row holds trees: a question, then its answers. `tree_attention` is an attention function under transformers'
attention interface, so it serves every architecture that goes through that. What it needs to know comes as the
`attention_mask`: a layout [1, 1, 2, tokens] of integers, the number of each token's tree, and of its branch (0 in the
question, n in the n-th answer). Models pass a mask with four dimensions on as it is, to every layer.

On a CPU (and wherever there is no Triton) the scores of an answer are one product with the keys of its question and
its own: the work grows with the pairs of tokens that see each other. On CUDA, FlexAttention skips the blocks of pairs
that do not.
"""

from functools import lru_cache
from importlib.util import find_spec
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

TREE = "tree"  # the name under which transformers knows it
QUERIES = 256  # at a time; bounds the memory of the scores of long texts


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers. Without a layout it is the library's own "sdpa".

    Args:
        query: [1, heads, tokens, head_dim].
        key, value: [1, key heads, tokens, head_dim]; a key head serves the next heads / key heads of the query.
        attention_mask: a layout, or what "sdpa" takes.

    Returns:
        [1, tokens, heads, head_dim].
    """
    if attention_mask is None or attention_mask.is_floating_point() or attention_mask.dtype == torch.bool:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **more)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.is_cuda and not dropout and find_spec("triton"):
        repeats = query.shape[1] // key.shape[1]
        output = _compiled_flex_attention()(
            query, key, value, block_mask=_block_mask(attention_mask), scale=scaling, enable_gqa=repeats > 1
        )
        return output.transpose(1, 2).contiguous(), None
    return _TreeAttention.apply(query[0], key[0], value[0], _blocks(attention_mask), scaling, dropout), None


AttentionInterface.register(TREE, tree_attention)
AttentionMaskInterface.register(TREE, sdpa_mask)


class _Block(NamedTuple):
    """Queries [start, stop) and the keys that they see: those of the question, and of their own text up to each."""

    question: slice
    text: slice  # of the text, up to `stop`
    start: int
    stop: int


def _blocks(layout: Tensor) -> list[_Block]:
    """The blocks of a layout. They are kept on it, since every layer asks."""
    kept = vars(layout)
    if "blocks" not in kept:
        blocks: list[_Block] = []
        questions: dict[int, slice] = {}  # of each tree; texts may share nothing
        at = 0
        for (tree, branch), tokens in groupby(zip(*layout[0, 0].tolist(), strict=True)):
            first, at = at, at + len(list(tokens))
            question = questions.get(tree, slice(0, 0))  # none while the question itself is read
            for start in range(first, at, QUERIES):
                stop = min(start + QUERIES, at)
                blocks.append(_Block(question, slice(first, stop), start, stop))
            if branch == 0:
                questions[tree] = slice(first, at)
        kept["blocks"] = blocks
    return kept["blocks"]


class _TreeAttention(torch.autograd.Function):
    """All of it is computed in float32 at least: for bf16 products of ever new shapes, oneDNN keeps 10 MB a step.

    The backward pass computes the probabilities once more, so that they need not be kept.
    """

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, blocks: list[_Block], scaling: float, dropout: float
    ) -> Tensor:
        inputs = query, key, value
        ctx.blocks, ctx.scaling = blocks, scaling
        kept: list[Tensor] = []  # with dropout: for each block, 0 or 1 / (1 - dropout) for each pair
        heads, tokens, _ = query.shape
        output = query.new_empty(1, tokens, heads, value.shape[-1])
        query, key, value = _precise(query) * scaling, _precise(key), _precise(value)
        for block in blocks:
            probabilities = _probabilities(query, key, block)
            if dropout:
                kept.append(torch.empty_like(probabilities).bernoulli_(1 - dropout).div_(1 - dropout))
                probabilities *= kept[-1]
            result = probabilities @ _seen(value, block)  # [key heads, group * queries, head_dim]
            output[0, block.start : block.stop] = result.view(heads, -1, result.shape[-1]).transpose(0, 1)
        ctx.save_for_backward(*inputs, *kept)
        return output

    @staticmethod
    def backward(ctx, gradient: Tensor):
        dtype = gradient.dtype
        inputs = ctx.saved_tensors  # asked for once, as gradient checkpointing demands
        query, key, value = map(_precise, inputs[:3])
        kept = inputs[3:]
        query, gradient = query * ctx.scaling, _precise(gradient[0].transpose(0, 1))
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for number, block in enumerate(ctx.blocks):
            probabilities = _probabilities(query, key, block)
            incoming = _grouped(gradient, len(key), block)
            of_probabilities = incoming @ _seen(value, block).transpose(1, 2)
            used = probabilities
            if kept:
                used = probabilities * kept[number]
                of_probabilities *= kept[number]
            _add_seen(of_value, used.transpose(1, 2) @ incoming, block)
            of_scores = torch._softmax_backward_data(of_probabilities, probabilities, -1, probabilities.dtype)
            result = of_scores @ _seen(key, block)
            of_query[:, block.start : block.stop] = result.view(len(query), -1, result.shape[-1])
            _add_seen(of_key, of_scores.transpose(1, 2) @ _grouped(query, len(key), block), block)
        return (of_query * ctx.scaling).to(dtype), of_key.to(dtype), of_value.to(dtype), None, None, None


def _precise(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _grouped(tensor: Tensor, key_heads: int, block: _Block) -> Tensor:
    """The block's queries of [heads, tokens, size], as [key heads, group * queries, size]."""
    return tensor[:, block.start : block.stop].reshape(key_heads, -1, tensor.shape[-1])


def _seen(tensor: Tensor, block: _Block) -> Tensor:
    """The keys (or values) that a block sees, of [key heads, tokens, size]."""
    own = tensor[:, block.text]
    return torch.cat([tensor[:, block.question], own], 1) if block.question.stop > block.question.start else own


def _add_seen(total: Tensor, part: Tensor, block: _Block) -> None:
    """Add a gradient of `_seen` to that of the tensor."""
    shared = block.question.stop - block.question.start
    total[:, block.question] += part[:, :shared]
    total[:, block.text] += part[:, shared:]


def _probabilities(query: Tensor, key: Tensor, block: _Block) -> Tensor:
    """[key heads, group * queries, keys], adding up to 1 over the keys; the query is scaled."""
    queries = block.stop - block.start
    scores = _grouped(query, len(key), block) @ _seen(key, block).transpose(1, 2)
    last = scores.view(len(query), queries, -1)[:, :, -queries:]  # the keys of the block itself: causal
    last += _later(scores.dtype, scores.device)[:queries, :queries]
    return torch.softmax(scores, -1, out=scores)


@lru_cache(maxsize=8)
def _later(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((QUERIES, QUERIES), -torch.inf, dtype=dtype, device=device).triu_(1)


@lru_cache(maxsize=1)
def _compiled_flex_attention():
    return torch.compile(flex_attention, dynamic=True)  # every step has another number of tokens


def _block_mask(layout: Tensor) -> BlockMask:
    """Which blocks of pairs FlexAttention computes. It is kept on the layout, since every layer asks."""
    kept = vars(layout)
    if "block_mask" not in kept:
        tree, branch = layout[0, 0]

        def sees(_row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same = (branch[key] == 0) | (branch[key] == branch[query])
            return (tree[key] == tree[query]) & same & (key <= query)

        tokens = layout.shape[-1]
        kept["block_mask"] = create_block_mask(sees, None, None, tokens, tokens, device=layout.device)
    return kept["block_mask"]
