"""The PyTorch routed attention against dense attention in float64: values and all gradients."""

import pytest
import torch
from dense_attention import dense_attention, random_positions

from modeling_colt5.op_attention import routed_attention_reference


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_are_those_of_dense_attention(heads, kv_heads, masked):
    batch, queries, keys, length = 2, 9, 14, 60
    leaves = [
        torch.randn(batch, count, rows, 8, dtype=torch.float64).requires_grad_()
        for count, rows in ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    ]
    leaves.append(torch.randn(heads, 2 * 10 + 1, dtype=torch.float64).requires_grad_())
    query_positions, key_positions = random_positions(batch, queries, length), random_positions(batch, keys, length)
    mask = torch.arange(keys) < torch.tensor([[5], [keys]]) if masked else None
    allowed = torch.ones(batch, 1, keys, dtype=torch.bool) if mask is None else mask[:, None, :]

    expected, _ = dense_attention(*leaves, query_positions, key_positions, allowed)
    actual, _ = routed_attention_reference(*leaves, query_positions, key_positions, mask)
    # float64: sums of a few dozen terms
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    cotangent = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_unused_slots_are_not_read():
    query, key, value = torch.randn(1, 4, 2, 8), torch.randn(1, 6, 2, 8), torch.randn(1, 6, 2, 8)
    table, query_positions = torch.randn(2, 21), random_positions(1, 4, 40)
    key_positions = random_positions(1, 6, 40)
    mask = torch.tensor([[True, True, True, False, False, False]])
    expected, _ = routed_attention_reference(
        query, key[:, :3], value[:, :3], table, query_positions, key_positions[:, :3]
    )
    actual, _ = routed_attention_reference(query, key, value, table, query_positions, key_positions, mask)
    # fp32: the same few terms, perhaps in another order
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
