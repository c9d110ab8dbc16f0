"""Triton kernels of the gradient of attention in two dimensions, each sum in a fixed order, and their launches."""

import torch
from torch import Tensor

from .op_attention_gradient_triton import add_key_gradients, score_gradients
from .op_attention_triton import LOG2_E, Problem, in_multiplied_dtype
from .op_dropout_triton import keys_of_rows
from .op_grid_attention_triton import (
    UNSPECIALIZED_IN_GRIDS,
    entry_of,
    frame_of,
    load_tokens,
    num_blocks,
    own_tile,
    real_tokens,
    seen,
    store_tokens,
    tile_of,
)
from .run_launch_triton import launch, tl, triton

# So many entries at least have the partial sums of a head's table gradient: few programs then add to the same one.
PARTIAL_ENTRIES = 4096


@triton.jit(do_not_specialize=UNSPECIALIZED_IN_GRIDS)
def grid_attention_backward_query_kernel(
    query, key, value, table, query_places, key_places, mask, seed, output, log_sum_exp, output_gradient,
    delta, query_gradient, table_partials, table_unit,
    query_stride_b, query_stride_n, query_stride_h,
    key_stride_b, key_stride_n, key_stride_h,
    value_stride_b, value_stride_n, value_stride_h,
    num_queries, num_keys, radius, max_distance, width, reach, copies,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr,
    ROUTED: tl.constexpr, WIDE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head: their gradient, delta = <output, its gradient>, and what they add to the
    table's gradient, in whole numbers of `table_unit`: the sum of whole numbers is the same in every order."""
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    query += batch * query_stride_b + head * query_stride_h
    key += batch * key_stride_b + head // GROUP * key_stride_h
    value += batch * value_stride_b + head // GROUP * value_stride_h
    head_offset = (batch * num_queries * HEADS + head) * HEAD
    table += head * (2 * max_distance + 1) * (2 * max_distance + 1)
    if mask is not None:
        mask += batch * num_keys
    if ROUTED:
        query_places += batch * num_queries
        key_places += batch * num_keys
    if table_partials is not None:
        copy = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) % copies
        table_partials += (head * copies + copy).to(tl.int64) * (2 * reach + 1) * (2 * reach + 1)
        unit = tl.load(table_unit)

    own, in_own, row, column = own_tile(query_places, num_queries, width, ROUTED, BLOCK_Q)
    query_tile = load_tokens(query, own, in_own, query_stride_n, HEAD, BLOCK_D)
    gradient_tile = load_tokens(output_gradient + head_offset, own, in_own, HEADS * HEAD, HEAD, BLOCK_D)
    output_tile = load_tokens(output + head_offset, own, in_own, HEADS * HEAD, HEAD, BLOCK_D)
    row_delta = tl.sum(output_tile.to(tl.float32) * gradient_tile.to(tl.float32), 1)
    row_vector = (batch * HEADS + head) * num_queries + own
    tl.store(delta + row_vector, row_delta, mask=in_own)
    row_lse = tl.load(log_sum_exp + row_vector, mask=in_own, other=float("inf")) * LOG2_E

    row_keys = None
    if DROPOUT > 0.0:
        row_keys = keys_of_rows(seed, batch * HEADS + head, own)[:, None]
    accumulator = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    first_row, first_column, columns, count = frame_of(num_keys, width, radius, ROUTED, BLOCK_Q)
    for start in range(0, count, BLOCK_K):
        number, exists, key_row, key_column = tile_of(
            key_places, start, first_row, first_column, columns, count, width, ROUTED, BLOCK_K
        )
        key_tile = load_tokens(key, number, exists, key_stride_n, HEAD, BLOCK_D)
        value_tile = load_tokens(value, number, exists, value_stride_n, HEAD, BLOCK_D)
        down, across = key_row[None, :] - row[:, None], key_column[None, :] - column[:, None]
        valid = seen(down, across, real_tokens(mask, number, exists)[None, :], radius, ROUTED)
        scores = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION)
        scores += tl.load(
            table + entry_of(down, across, max_distance, ROUTED or WIDE), mask=valid, other=float("-inf")
        )
        score_gradient = score_gradients(
            scores, gradient_tile, value_tile, row_lse, row_delta, row_keys, number, DROPOUT, PRECISION
        )
        accumulator = tl.dot(score_gradient.to(key_tile.dtype), key_tile, accumulator, input_precision=PRECISION)
        if table_partials is not None:
            tl.atomic_add(
                table_partials + entry_of(down, across, reach, ROUTED or WIDE),
                (score_gradient / unit).to(tl.int64),
                mask=valid & in_own[:, None],
                sem="relaxed",
            )

    store_tokens(query_gradient + head_offset, accumulator, own, in_own, HEADS * HEAD, HEAD, BLOCK_D)


@triton.jit(do_not_specialize=UNSPECIALIZED_IN_GRIDS)
def grid_attention_backward_key_kernel(
    query, key, value, table, query_places, key_places, mask, seed, log_sum_exp, output_gradient, delta,
    key_gradient, value_gradient,
    query_stride_b, query_stride_n, query_stride_h,
    key_stride_b, key_stride_n, key_stride_h,
    value_stride_b, value_stride_n, value_stride_h,
    num_queries, num_keys, radius, max_distance, width,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr,
    ROUTED: tl.constexpr, WIDE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of keys of one key/value head: gradients of keys and values, over all query heads that share them."""
    kv_head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    key += batch * key_stride_b + kv_head * key_stride_h
    value += batch * value_stride_b + kv_head * value_stride_h
    if mask is not None:
        mask += batch * num_keys
    if ROUTED:
        query_places += batch * num_queries
        key_places += batch * num_keys

    own, in_own, row, column = own_tile(key_places, num_keys, width, ROUTED, BLOCK_K)
    key_tile = load_tokens(key, own, in_own, key_stride_n, HEAD, BLOCK_D)
    value_tile = load_tokens(value, own, in_own, value_stride_n, HEAD, BLOCK_D)
    real = real_tokens(mask, own, in_own)[:, None]
    key_accumulator = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    value_accumulator = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    first_row, first_column, columns, count = frame_of(num_queries, width, radius, ROUTED, BLOCK_K)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        head_query = query + batch * query_stride_b + head * query_stride_h
        head_gradient = output_gradient + (batch * num_queries * HEADS + head) * HEAD
        head_vector = (batch * HEADS + head) * num_queries
        head_table = table + head * (2 * max_distance + 1) * (2 * max_distance + 1)
        for start in range(0, count, BLOCK_Q):
            number, exists, query_row, query_column = tile_of(
                query_places, start, first_row, first_column, columns, count, width, ROUTED, BLOCK_Q
            )
            query_tile = load_tokens(head_query, number, exists, query_stride_n, HEAD, BLOCK_D)
            gradient_tile = load_tokens(head_gradient, number, exists, HEADS * HEAD, HEAD, BLOCK_D)
            row_lse = tl.load(log_sum_exp + head_vector + number, mask=exists, other=float("inf")) * LOG2_E
            row_delta = tl.load(delta + head_vector + number, mask=exists, other=0.0)
            down, across = row[:, None] - query_row[None, :], column[:, None] - query_column[None, :]
            valid = seen(down, across, real & exists[None, :], radius, ROUTED)
            scores = tl.dot(key_tile, tl.trans(query_tile), input_precision=PRECISION)
            scores += tl.load(
                head_table + entry_of(down, across, max_distance, ROUTED or WIDE), mask=valid, other=float("-inf")
            )
            row_keys = None
            if DROPOUT > 0.0:
                row_keys = keys_of_rows(seed, batch * HEADS + head, number)[None, :]
            key_accumulator, value_accumulator = add_key_gradients(
                scores, query_tile, gradient_tile, value_tile, row_lse, row_delta, row_keys, own,
                key_accumulator, value_accumulator, DROPOUT, PRECISION,
            )  # fmt: skip

    offset = (batch * num_keys * (HEADS // GROUP) + kv_head) * HEAD
    stride = HEADS // GROUP * HEAD
    store_tokens(key_gradient + offset, key_accumulator, own, in_own, stride, HEAD, BLOCK_D)
    store_tokens(value_gradient + offset, value_accumulator, own, in_own, stride, HEAD, BLOCK_D)


def _unit(output_gradient: Tensor, value: Tensor, dropout: float) -> Tensor:
    """The unit, fp32 [], that the table's gradient is counted in.

    A query's score gradients are together at most twice the longest output gradient times the longest value, before
    what dropout multiplies. With four times that for every query, an entry's sum stays below 2^62. What a number of
    this unit leaves over is then less than 2^-30 of the bound for up to 2^30 queries.
    """
    longest = [torch.linalg.vector_norm(part, dim=-1, dtype=torch.float32).amax() for part in (output_gradient, value)]
    queries = output_gradient.shape[0] * output_gradient.shape[1]
    # not 0, by which nothing can be divided
    return (longest[0] * longest[1] * (4 * queries / (1 - dropout) / 2**62)).clamp(min=2.0**-120)


@in_multiplied_dtype(first_result=14)
def grid_attention_backward_into(
    output_gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias_table: Tensor,
    width: int,
    radius: int,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    mask: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    output: Tensor,
    log_sum_exp: Tensor,
    query_gradient: Tensor,
    key_gradient: Tensor,
    value_gradient: Tensor,
    table_gradient: Tensor | None,
) -> None:
    """Write the gradients of `grid_attention_into`, contiguous; None for `table_gradient` leaves it out."""
    if query.numel() == 0 or key.numel() == 0:
        for gradient in (query_gradient, key_gradient, value_gradient, table_gradient):
            _ = None if gradient is None else gradient.zero_()
        return
    batch, num_queries, heads, _ = query.shape
    _, num_keys, kv_heads, _ = key.shape
    problem = Problem(query, key, value, bias_table, radius, query_positions, key_positions, mask, dropout, seed)
    delta = torch.empty_like(log_sum_exp)
    output_gradient = output_gradient.contiguous()
    # Offsets are at most this, where larger ones count as the table's largest.
    most = bias_table.shape[1] // 2
    reach = most if problem.routed else min(radius, most)
    side = 2 * reach + 1
    copies = max(1, PARTIAL_ENTRIES // side**2)
    partials = unit = None
    if table_gradient is not None:
        unit = _unit(output_gradient, value, dropout)
        partials = torch.zeros(heads, copies, side, side, dtype=torch.int64, device=query.device)
    block_q, _, constants, options = problem.options("backward_query")
    launch(
        grid_attention_backward_query_kernel, (num_blocks(num_queries, width, block_q, problem.routed), heads, batch),
        *problem.operands, output, log_sum_exp, output_gradient, delta, query_gradient, partials, unit,
        *problem.sizes, width, reach, copies, *constants, **options,
    )  # fmt: skip
    _, block_k, constants, options = problem.options("backward_key")
    launch(
        grid_attention_backward_key_kernel, (num_blocks(num_keys, width, block_k, problem.routed), kv_heads, batch),
        *problem.operands, log_sum_exp, output_gradient, delta, key_gradient, value_gradient,
        *problem.sizes, width, *constants, **options,
    )  # fmt: skip
    if table_gradient is not None and partials is not None and unit is not None:
        inner = slice(most - reach, most + reach + 1)
        table_gradient.zero_()
        table_gradient[:, inner, inner] = partials.sum(1) * unit
