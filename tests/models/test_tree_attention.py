"""Tree attention against the dense mask: outputs and gradients, long rows, dropout, FlexAttention's blocks."""

import random

import pytest
import torch
import torch.nn.functional as F

from harmful_unlearn.models import tree_attention as module
from harmful_unlearn.models.tree_attention import tree_attention

LONG = [[20, *[250] * 16]]  # more than 4,000 tokens


def layout(trees: list[list[int]]) -> torch.Tensor:
    """Of trees, each the length of its question and those of its answers."""
    tree = [number for number, lengths in enumerate(trees) for length in lengths for _ in range(length)]
    branch = [number for lengths in trees for number, length in enumerate(lengths) for _ in range(length)]
    return torch.tensor([[[tree, branch]]])


def dense_mask(tree: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    same = (branch == 0) | (branch[:, None] == branch)
    return ((tree[:, None] == tree) & same).tril()


def tensors(tokens: int, heads: int, key_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(1, heads, tokens, 16), (1, key_heads, tokens, 16), (1, key_heads, tokens, 16)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def plain(query, key, value, mask, scaling=None):
    repeats = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(repeats, 1) for tensor in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling).transpose(1, 2)


def attend(inputs, mask, **more):
    return tree_attention(torch.nn.Module(), *inputs, mask, **more)[0]


@pytest.mark.parametrize("heads, key_heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 0.03)])
def test_as_the_dense_mask(heads, key_heads, dtype, close):
    draw = random.Random(heads)
    for trial in range(8):
        trees = [[draw.randrange(1, 30), *(draw.randrange(40) for _ in range(draw.randrange(4)))] for _ in range(3)]
        trees += [[0, 7, 3]] if trial % 2 else [[300, 290]]  # nothing shared; longer than a block of queries
        mask = layout(trees)
        inputs = tensors(mask.shape[-1], heads, key_heads, dtype)
        found, expected = attend(inputs, mask), plain(*inputs, dense_mask(*mask[0, 0]))
        torch.testing.assert_close(found, expected, rtol=close, atol=close)
        weight = torch.randn_like(found)
        gradients = torch.autograd.grad((found * weight).sum(), inputs)
        for ours, theirs in zip(gradients, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
            assert (ours - theirs).abs().max() <= close * theirs.abs().max()


def test_long_rows_cost_what_they_need():
    """The pairs of tokens that are computed grow with the pairs that see each other, not with the row's square."""
    mask = layout(LONG)
    tokens = mask.shape[-1]
    pairs = 0
    for block in module._blocks(mask):
        keys = block.question.stop - block.question.start + block.text.stop - block.text.start
        pairs += (block.stop - block.start) * keys
    needed = int(dense_mask(*mask[0, 0]).sum())
    assert needed <= pairs < 2 * needed and pairs < tokens**2 / 10
    inputs = tensors(tokens, 2, 1, torch.float32)
    torch.testing.assert_close(attend(inputs, mask), plain(*inputs, dense_mask(*mask[0, 0])), rtol=1e-5, atol=1e-5)


def test_a_texts_queries_are_taken_in_blocks(monkeypatch):
    mask = layout([[50, 70, 10]])
    inputs = tensors(130, 2, 2, torch.float32)
    expected = attend(inputs, mask)
    monkeypatch.setattr(module, "QUERIES", 16)
    again = mask.clone()
    torch.testing.assert_close(attend(inputs, again), expected)
    assert max(block.stop - block.start for block in module._blocks(again)) == 16


def test_scaling_and_masks_of_plain_rows():
    mask = layout([[4, 5]])
    inputs = tensors(9, 2, 2, torch.float32)
    torch.testing.assert_close(attend(inputs, mask, scaling=0.3), plain(*inputs, dense_mask(*mask[0, 0]), 0.3))
    boolean = torch.rand(1, 1, 9, 9) < 0.7
    boolean |= torch.eye(9, dtype=torch.bool)
    torch.testing.assert_close(attend(inputs, boolean), plain(*inputs, boolean))


@pytest.mark.slow
def test_dropout_keeps_the_mean_and_has_the_gradient_of_its_own_draw():
    mask = layout([[6, 5, 4]])
    inputs = tensors(15, 2, 1, torch.float64)
    value = inputs[2]
    torch.manual_seed(0)
    outputs = [attend(inputs, mask, dropout=0.4) for _ in range(1000)]
    torch.testing.assert_close(torch.stack(outputs).mean(0), attend(inputs, mask), rtol=0, atol=0.2)

    def drawn(*tensors):
        torch.manual_seed(7)
        return attend(tensors, mask, dropout=0.4)

    assert not torch.equal(drawn(*inputs), attend(inputs, mask))
    assert torch.autograd.gradcheck(drawn, inputs) and value.requires_grad


def test_what_dropout_drew_is_kept_as_autograd_keeps_tensors():
    """So that gradient checkpointing frees it, and draws it again."""
    kept = []
    for dropout in (0.0, 0.4):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            attend(tensors(15, 2, 1, torch.float32), layout([[6, 5, 4]]), dropout=dropout)
        kept.append(sum(sizes))
    assert kept[1] - kept[0] == 2 * (6 * 6 + 5 * (6 + 5) + 4 * (6 + 4))


def test_flex_attentions_blocks_are_the_dense_mask():
    """CUDA's path, as far as a CPU can run it: FlexAttention with the block mask, not compiled."""
    mask = layout([[20, 40, 90], [33, 1], [0, 7, 3]])
    inputs = [tensor.detach() for tensor in tensors(mask.shape[-1], 4, 2, torch.float32)]
    found = module.flex_attention(*inputs, block_mask=module._block_mask(mask), enable_gqa=True)
    torch.testing.assert_close(found.transpose(1, 2), plain(*inputs, dense_mask(*mask[0, 0])), rtol=1e-5, atol=1e-5)
    far = module._block_mask(layout(LONG))
    assert far.sparsity() > 80  # percent of blocks that are skipped
