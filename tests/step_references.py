"""What the kernels of one new token compute, in plain PyTorch; each takes the arguments of the launch of its name."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_colt5.kernel_backend import accumulation_dtype
from modeling_colt5.op_attention import bias_by_position
from modeling_colt5.op_gates import window_thresholds
from modeling_colt5.op_gelu import gated_gelu_reference
from modeling_colt5.op_norm import norm_reference
from modeling_colt5.op_routing import route


def _advance_ring(ring: Tensor, new: Tensor, past: Tensor, total: Tensor) -> None:
    """Put what is new [rows, heads * d_kv] in its slot of a ring [rows, R, heads, d_kv], in rows where it is real."""
    every, places = torch.arange(len(ring), device=ring.device), past % ring.shape[1]
    is_real = (total > past)[:, None, None]
    ring[every, places] = torch.where(is_real, new.view(-1, *ring.shape[2:]), ring[every, places])


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
    """What `step_attention_into` does."""
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
    """What `local_step_attention_into` does."""
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
    """What `pool_step_attention_into` does."""
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


def step_products_reference(
    states: Tensor,
    branch: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    first: Tensor,
    second: Tensor | None,
    third: Tensor | None,
    total: Tensor | None,
    first_out: Tensor,
    second_out: Tensor | None,
    third_out: Tensor | None,
) -> None:
    """What `step_products_into` does."""
    states = states if branch is None else states + branch
    if total is not None:
        total.copy_(states)
    if norm_weight is not None:
        states = norm_reference(states[None], norm_weight, None, eps, None)[0][0]
    dtype = accumulation_dtype(states.dtype)
    products = [
        (states.to(dtype) @ weight.to(dtype).t()).to(states.dtype)
        for weight in (first, second, third)
        if weight is not None
    ]
    if second is not None and second_out is None:
        products = [gated_gelu_reference(*products)]
    for output, product in zip((first_out, second_out, third_out), products, strict=False):
        assert output is not None
        output.copy_(product)


def token_gate_reference(
    scores: Tensor,
    past: Tensor,
    total: Tensor,
    carried: Tensor,
    ring: Tensor,
    other_ring: Tensor | None,
    window: int,
    target: int,
    capacity: int,
    epsilon: float,
    fill_first: bool,
    weights: Tensor,
    indices: Tensor,
    valid: Tensor,
) -> None:
    """What `token_gate_into` does."""
    rows, size = ring.shape
    every, is_real = torch.arange(rows, device=ring.device), total > past
    slot = torch.arange(window, device=ring.device)
    offset = (past % window)[:, None]
    slots = (past[:, None] - offset + slot) % size
    known = torch.where(slot == offset, scores[:, :1], ring[every[:, None], slots])
    least, soft = carried[:, 0].unbind(-1)
    evenly = (slot + 1) * target // window > slot * target // window
    is_first = past < window
    reach = torch.where(is_first[:, None], evenly & fill_first, known >= least[:, None]) & (slot <= offset)
    routed = reach.gather(1, offset)[:, 0] & (reach.sum(-1) <= capacity) & is_real
    weight = torch.where(is_first, 1.0, ((scores[:, 0] - soft) / epsilon).clamp(max=0).exp())
    weights[:, 0], valid[:, 0] = weight.masked_fill(~routed, 0), routed
    indices.zero_()
    places = past % size
    ring[every, places] = torch.where(is_real, scores[:, 0], ring[every, places])
    if other_ring is not None:
        other_ring[every, places] = torch.where(is_real[:, None], scores[:, 1:], other_ring[every, places])


def hand_thresholds_reference(
    past: Tensor,
    total: Tensor,
    ring: Tensor,
    carried: Tensor,
    window: int,
    target: int,
    soft_target: float,
    epsilon: float,
) -> None:
    """What `hand_thresholds_into` does."""
    every = torch.arange(len(ring), device=ring.device)[:, None]
    ranks = total[:, None] - window + torch.arange(window, device=ring.device)
    handed = window_thresholds(ring[every, ranks % ring.shape[1]], target, soft_target, epsilon)
    ends = ((total > past) & (total % window == 0))[:, None, None]
    carried.copy_(torch.where(ends, torch.stack([handed, carried[:, 0]], 1), carried))


def hand_pool_reference(
    past: Tensor,
    total: Tensor,
    ring: Tensor,
    key_ring: Tensor,
    value_ring: Tensor,
    pool_score: Tensor,
    pool_key: Tensor,
    pool_value: Tensor,
    pool_rank: Tensor,
    pool_weight: Tensor,
    pool_valid: Tensor,
    window: int,
    soft_topk_ratio: float,
    epsilon: float,
) -> None:
    """What `hand_pool_into` does."""
    rows, _, groups, size = pool_score.shape
    ends = (total > past) & (total % window == 0)
    every = torch.arange(rows, device=ring.device)[:, None]
    ranks = total[:, None] - window + torch.arange(window, device=ring.device)
    places = ranks % ring.shape[1]
    keys, values = (part[every, places].unflatten(2, (groups, -1)) for part in (key_ring, value_ring))
    new = {
        "score": ring[every, places],
        "rank": ranks[:, :, None].expand(-1, -1, groups),
        "key": keys,
        "value": values,
    }
    pools = {"score": pool_score, "rank": pool_rank, "key": pool_key, "value": pool_value}
    union = {name: torch.cat([pools[name][:, 0], part.transpose(1, 2)], 2).flatten(0, 1) for name, part in new.items()}
    valid = F.pad(pool_valid[:, 0], (0, window), value=True).flatten(0, 1)
    budget = torch.full((rows * groups,), size, device=ring.device)
    settings: dict[str, Any] = {"soft_topk_ratio": soft_topk_ratio, "epsilon": epsilon, "kernel_backend": "torch"}
    chosen = route(union["score"], budget, size, mask=valid, **settings)
    row = torch.arange(rows * groups, device=ring.device)[:, None]
    results = {name: (pools[name], part[row, chosen.indices]) for name, part in union.items()}
    results |= {"weight": (pool_weight, chosen.weights), "valid": (pool_valid, chosen.valid)}
    for pool, handed in results.values():
        both = torch.stack([handed.view_as(pool[:, 0]), pool[:, 0]], 1)
        pool.copy_(torch.where(ends.view(-1, *[1] * (pool.dim() - 1)), both, pool))
