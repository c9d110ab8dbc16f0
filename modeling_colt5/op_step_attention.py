"""Attention of one new token in each row: to the keys of a cache, which its own key joins, or to those of a memory.
In a causally routed layer: to the last keys of a ring, and to those of a pool."""

import torch
from torch import Tensor

from .kernel_backend import accumulation_dtype, triton_is_available
from .op_attention import bias_by_position
from .run_operator import Launch

step_attention_into: Launch = None
local_step_attention_into: Launch = None
pool_step_attention_into: Launch = None
if triton_is_available():
    from .op_step_attention_triton import local_step_attention_into as local_step_attention_into
    from .op_step_attention_triton import pool_step_attention_into as pool_step_attention_into
    from .op_step_attention_triton import step_attention_into as step_attention_into


def step_attention_reference(
    query: Tensor,
    new_key: Tensor | None,
    new_value: Tensor | None,
    bias_table: Tensor | None,
    mask: Tensor | None,
    length: Tensor | None,
    key: Tensor,
    value: Tensor,
    output: Tensor,
) -> None:
    """Write the attention of one query in each row to `output`, and what is new to `key` and `value`; T5's scale of 1.

    Args:
        query: [rows, heads * d_kv].
        new_key, new_value: [rows, key/value heads * d_kv], of the token itself, which are written behind the others;
            None where the token is none of those that it reads.
        bias_table: fp32 [heads, 2 * max_distance + 1], as of `bias_by_position`, for a query at the last key's
            position; None for no bias.
        mask: bool [rows, keys], True for keys to read; None for all. A row without any reads the mean of all values.
        length: int32 [1], the number of keys, the new one included; None where keys fill their tensor.
        key, value: [rows, key/value heads, room, d_kv], of which the first keys are read; the number of heads is a
            multiple of theirs.
        output: [rows, heads * d_kv].
    """
    rows, groups, room, d_kv = key.shape
    keys = room if length is None else int(length)
    if new_key is not None and new_value is not None:
        key[:, :, keys - 1] = new_key.view(rows, groups, d_kv)
        value[:, :, keys - 1] = new_value.view(rows, groups, d_kv)
    dtype = accumulation_dtype(query.dtype)
    # heads that share a key/value head are just more queries for it
    queries = query.view(rows, groups, -1, d_kv).to(dtype)
    scores = queries @ key[:, :, :keys].to(dtype).transpose(2, 3)
    if bias_table is not None:
        positions = torch.arange(keys, device=query.device)
        scores = scores + bias_by_position(bias_table, positions[-1:], positions).view(groups, -1, keys)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], torch.finfo(dtype).min)
    output.view_as(queries).copy_(scores.softmax(-1) @ value[:, :, :keys].to(dtype))


def _advance_ring(ring: Tensor, new: Tensor, past: Tensor, total: Tensor) -> None:
    """Put what is new [rows, heads * d_kv] in its slot of a ring [rows, R, heads, d_kv], in rows where it is real."""
    every, places = torch.arange(len(ring), device=ring.device), past % ring.shape[1]
    is_real = (total > past)[:, None, None]
    ring[every, places] = torch.where(is_real, new.view(-1, *ring.shape[2:]), ring[every, places])


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias_table: Tensor, distance: Tensor, exists: Tensor, like: Tensor
) -> Tensor:
    """[rows, heads * d_kv] of queries [rows, heads, d_kv] to keys [rows, n, heads, d_kv], T5's scale of 1.

    Args:
        query, key, value, bias_table: as in the functions below.
        distance: integers [rows, n], from the query to each key.
        exists: bool [rows, n], which keys are read.
        like: a tensor of the output's dtype.
    """
    dtype = accumulation_dtype(like.dtype)
    scores = torch.einsum("rhd,rkhd->rhk", query.to(dtype), key.to(dtype))
    scores = scores + bias_by_position(bias_table, distance.new_zeros(len(distance), 1), distance)[:, :, 0]
    weights = scores.masked_fill(~exists[:, None], float("-inf")).softmax(-1)
    return torch.einsum("rhk,rkhd->rhd", weights, value.to(dtype)).flatten(1).to(like.dtype)


def local_step_attention_reference(
    query: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    bias_table: Tensor,
    past: Tensor,
    total: Tensor,
    key_ring: Tensor,
    value_ring: Tensor,
    radius: int,
    output: Tensor,
) -> None:
    """Write the light attention of one new token in each row to `output`: to itself and to the `radius` tokens before
    it. Its key and value go into the rings in rows where it is real.

    Args:
        query, new_key, new_value: [rows, heads * d_kv].
        bias_table: fp32 [heads, 2 * max_distance + 1], as of `bias_by_position`.
        past: int64 [rows], real tokens before the new one.
        total: int64 [rows], these and the new one where it is real.
        key_ring, value_ring: [rows, R, heads, d_kv] with R above the radius; token `rank` is in slot `rank % R`.
        radius: how far it looks back.
        output: [rows, heads * d_kv].
    """
    shape = (-1, 1, *key_ring.shape[2:])
    distance = torch.arange(-radius, 1, device=query.device).expand(len(query), -1)
    ranks = past[:, None] + distance[:, :-1]
    every = torch.arange(len(query), device=query.device)[:, None]
    earlier = [ring[every, ranks % ring.shape[1]] for ring in (key_ring, value_ring)]
    key, value = (
        torch.cat([part, new.view(shape)], 1) for part, new in zip(earlier, (new_key, new_value), strict=True)
    )
    exists = past[:, None] + distance >= 0
    output.copy_(_attend(query.view(shape)[:, 0], key, value, bias_table, distance, exists, output))
    _advance_ring(key_ring, new_key, past, total)
    _advance_ring(value_ring, new_value, past, total)


def pool_step_attention_reference(
    query: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    bias_table: Tensor,
    past: Tensor,
    total: Tensor,
    valid: Tensor,
    key_ring: Tensor,
    value_ring: Tensor,
    pool_key: Tensor,
    pool_value: Tensor,
    pool_rank: Tensor,
    pool_weight: Tensor,
    pool_valid: Tensor,
    output: Tensor,
) -> None:
    """Write the heavy attention of one new token in each row, where it is routed, to `output`: to the pool that its
    window was handed. Its key and value go into the rings in rows where it is real, for later pools.

    Args:
        query, new_key, new_value: [rows, heads * d_kv].
        bias_table: fp32 [heads, 2 * max_distance + 1], as of `bias_by_position`.
        past, total: int64 [rows], as above.
        valid: bool [rows, 1], which rows' tokens are routed. The output of the others stays as it is.
        key_ring, value_ring: [rows, R, heads, d_kv], as above.
        pool_key, pool_value: [rows, 2, groups, size, heads / groups, d_kv], of the token's window and of the one
            before: what routing weights then scale.
        pool_rank, pool_weight, pool_valid: int64, fp32 and bool [rows, 2, groups, size], of these tokens; of a routed
            token's window some are valid, and those come first.
        output: [rows, heads * d_kv].
    """
    rows, _, groups, size, heads, d_kv = pool_key.shape
    shape = (rows, groups, heads, d_kv)
    queries, result = query.view(shape), output.view(shape)
    tables = bias_table.view(groups, heads, -1)
    for group in range(groups):
        rank, weight, used = (part[:, 0, group] for part in (pool_rank, pool_weight, pool_valid))
        # as `gather_pools` of op_pools.py rounds them
        key, value = (
            (part[:, 0, group] * weight[..., None, None]).to(part.dtype).masked_fill(~used[..., None, None], 0)
            for part in (pool_key, pool_value)
        )
        distance = rank - past[:, None]
        attended = _attend(queries[:, group], key, value, tables[group], distance, used, output)
        result[:, group] = torch.where(valid[..., None], attended.view(rows, heads, d_kv), result[:, group])
    _advance_ring(key_ring, new_key, past, total)
    _advance_ring(value_ring, new_value, past, total)
