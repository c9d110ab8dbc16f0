"""The PyTorch band attention against dense attention in float64: values, weights and all gradients."""

import pytest
import torch
from dense_attention import band, dense_attention

from modeling_colt5.op_attention import local_attention_reference


def eager_attend(query, key, value, bias, mask):
    """Dense attention that also gives its weights."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(-1, -2) + bias
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


def inputs(batch, length, heads, kv_heads, head_size, max_distance):
    states = [
        torch.randn(batch, length, count, head_size, dtype=torch.float64) for count in (heads, kv_heads, kv_heads)
    ]
    return [*states, torch.randn(heads, 2 * max_distance + 1, dtype=torch.float64)]


# lengths around the block of 128, radii of 0, within, around and beyond block and length, tables narrower and wider
# than the band, grouped and multi-query heads
CASES = [
    (1, 1, 0, 4, 2, 2),
    (2, 127, 3, 4, 2, 1),
    (1, 128, 127, 128, 2, 2),
    (2, 129, 130, 16, 2, 1),
    (1, 300, 127, 128, 4, 2),
    (1, 90, 500, 8, 1, 1),
]


@pytest.mark.parametrize("batch, length, radius, max_distance, heads, kv_heads", CASES)
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_are_those_of_dense_attention(
    batch, length, radius, max_distance, heads, kv_heads, masked
):
    leaves = [tensor.requires_grad_() for tensor in inputs(batch, length, heads, kv_heads, 8, max_distance)]
    mask = None
    if masked:
        mask = torch.rand(batch, length) < 0.8
        # every query keeps itself: what a query without any key gets is tested apart
        mask[:, :: radius + 1] = True
    positions = torch.arange(length).expand(batch, length)
    expected, _ = dense_attention(*leaves, positions, positions, band(length, radius, mask))
    actual, _ = local_attention_reference(*leaves, radius, mask)
    # float64: sums of a few hundred terms
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)
    cotangent = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


# PyTorch traces it in symbols twice, forward and backward: 20 seconds
@pytest.mark.slow
def test_gradients_compile_for_any_number_of_blocks():
    """One block of 128 first, then more; heads split off a projection, as in the model."""
    # with a gradient, as in training: PyTorch then takes attention whose gradients lie in the order of its inputs
    table = torch.randn(2, 17, requires_grad=True)

    def attend(query, key, value):
        split = (states.unflatten(-1, (2, 8)) for states in (query, key, value))
        return local_attention_reference(*split, table, 5)[0].flatten(-2)

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (70, 133, 300):
        leaves = [torch.randn(2, length, 16, requires_grad=True) for _ in range(3)]
        cotangent = torch.randn(2, length, 16)
        expected = torch.autograd.grad(attend(*leaves), leaves, cotangent)
        for ours, theirs in zip(torch.autograd.grad(compiled(*leaves), leaves, cotangent), expected, strict=True):
            # fp32, the same operations
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_weights_come_by_distance():
    batch, length, radius = 2, 150, 20
    query, key, value, table = inputs(batch, length, 2, 1, 4, 16)
    mask = torch.rand(batch, length) < 0.7
    mask[:, ::radius] = True
    positions = torch.arange(length).expand(batch, length)
    _, expected = dense_attention(query, key, value, table, positions, positions, band(length, radius, mask))
    _, weights = local_attention_reference(query, key, value, table, radius, mask, eager_attend)
    assert weights.shape == (batch, 2, length, 2 * radius + 1)
    for distance in range(-radius, radius + 1):
        diagonal = torch.diagonal(expected, distance, 2, 3)
        first = max(0, -distance)
        torch.testing.assert_close(
            weights[:, :, first : first + diagonal.shape[-1], radius + distance], diagonal, rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_band_without_real_tokens_stays_finite(dtype):
    query, key, value, table = (tensor.to(dtype) for tensor in inputs(1, 200, 2, 2, 8, 16))
    leaves = [tensor.requires_grad_() for tensor in (query, key, value, table.float())]
    mask = torch.zeros(1, 200, dtype=torch.bool)
    mask[:, :5] = True
    output, _ = local_attention_reference(*leaves, 10, mask)
    gradients = torch.autograd.grad(output.float().sum(), leaves)
    assert all(tensor.isfinite().all() for tensor in (output, *gradients))


def test_padding_to_the_right_changes_nothing():
    query, key, value, table = inputs(1, 100, 2, 1, 8, 16)
    expected, _ = local_attention_reference(query, key, value, table, 30)
    padded = [torch.cat([states, torch.randn_like(states[:, :70])], 1) for states in (query, key, value)]
    mask = (torch.arange(170) < 100)[None]
    actual, _ = local_attention_reference(*padded, table, 30, mask)
    torch.testing.assert_close(actual[:, :100], expected, rtol=1e-12, atol=1e-12)
