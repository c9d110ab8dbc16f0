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
from .run_launch_triton import cdiv, launch, next_power_of_2, tl, triton

# So many entries at least have the partial sums of a head's table gradient: few programs then add to the same one.
PARTIAL_ENTRIES = 4096
# Before these sums stand so many numbers, from which follows the unit that the sums are counted in.
NUMBERS_OF_UNIT = 2
SUMS_BEGIN = tl.constexpr(NUMBERS_OF_UNIT)
# So many numbers of a table, or of copies of a part of it, has a program that sums these up.
ENTRIES = 1024
# So many queries, or keys, has a program that looks for the unit.
UNIT_BLOCK = 64

# The least unit: not 0, by which nothing can be divided.
LEAST_UNIT = tl.constexpr(2.0**-120)


@triton.jit
def keep_largest(numbers, partials):
    """Let the number at `partials` be at least the largest of a tile, all ≥ 0 and in fp32: their bits, read as whole
    numbers, have the same order. What is not a number counts as larger than all others."""
    bits = numbers.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(partials, tl.max(bits).to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=UNSPECIALIZED_IN_GRIDS)
def grid_table_unit_kernel(
    output_gradient, value, partials, value_stride_b, value_stride_n, value_stride_h, num_queries, num_keys,
    HEADS: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What `unit_of` reads of a block of queries, or of keys, of one head: programs take the heads of the output
    gradient first, and then those of the values."""
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if head < HEADS:
        output_gradient += (batch * num_queries * HEADS + head) * HEAD
        tile = load_tokens(output_gradient, number, number < num_queries, HEADS * HEAD, HEAD, BLOCK_D)
        keep_largest(tl.sum(tl.abs(tile.to(tl.float32)), 1), partials)
    else:
        value += batch * value_stride_b + (head - HEADS) * value_stride_h
        tile = load_tokens(value, number, number < num_keys, value_stride_n, HEAD, BLOCK_D)
        keep_largest(tl.abs(tile.to(tl.float32)), partials + 1)


@triton.jit
def unit_of(partials, queries, DROPOUT: tl.constexpr):
    """The unit that the table's gradient is counted in, of the numbers that `grid_table_unit_kernel` has left.

    These are the largest sum of an output gradient's absolute values, and the largest absolute value among the values.
    A query's score gradients are together at most twice the product of both, before what dropout multiplies. With four
    times that for every query, an entry's sum stays below 2^62. What a number of this unit leaves over is then less
    than 2^-30 of the bound for up to 2^30 queries.
    """
    gradient = tl.load(partials).to(tl.int32).to(tl.float32, bitcast=True)
    value = tl.load(partials + 1).to(tl.int32).to(tl.float32, bitcast=True)
    unit = gradient * value * (queries * (4 / (1 - DROPOUT) / 2**62))
    # of a loss that overflowed it is not finite, and neither is the table's gradient
    return tl.where(unit < LEAST_UNIT, LEAST_UNIT, unit)


@triton.jit(do_not_specialize=UNSPECIALIZED_IN_GRIDS)
def grid_attention_backward_query_kernel(
    query, key, value, table, query_places, key_places, mask, seed, output, log_sum_exp, output_gradient,
    delta, query_gradient, table_partials,
    query_stride_b, query_stride_n, query_stride_h,
    key_stride_b, key_stride_n, key_stride_h,
    value_stride_b, value_stride_n, value_stride_h,
    num_queries, num_keys, radius, max_distance, width, gradient_stride, reach, copies,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr,
    ROUTED: tl.constexpr, WIDE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head: their gradient, delta = <output, its gradient>, and what they add to the
    table's gradient, in whole numbers of `unit_of`: the sum of whole numbers is the same in every order."""
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
        unit = unit_of(table_partials, num_queries * tl.num_programs(2), DROPOUT)
        table_partials += SUMS_BEGIN + (head * copies + copy).to(tl.int64) * (2 * reach + 1) * (2 * reach + 1)

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

    query_gradient += batch * num_queries * gradient_stride + head * HEAD
    store_tokens(query_gradient, accumulator, own, in_own, gradient_stride, HEAD, BLOCK_D)


@triton.jit(do_not_specialize=UNSPECIALIZED_IN_GRIDS)
def grid_attention_backward_key_kernel(
    query, key, value, table, query_places, key_places, mask, seed, log_sum_exp, output_gradient, delta,
    key_gradient, value_gradient,
    query_stride_b, query_stride_n, query_stride_h,
    key_stride_b, key_stride_n, key_stride_h,
    value_stride_b, value_stride_n, value_stride_h,
    num_queries, num_keys, radius, max_distance, width, gradient_stride,
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

    offset = batch * num_keys * gradient_stride + kv_head * HEAD
    store_tokens(key_gradient + offset, key_accumulator, own, in_own, gradient_stride, HEAD, BLOCK_D)
    store_tokens(value_gradient + offset, value_accumulator, own, in_own, gradient_stride, HEAD, BLOCK_D)


@triton.jit(do_not_specialize=UNSPECIALIZED_IN_GRIDS)
def grid_table_sums_kernel(
    partials, table, queries, max_distance, reach, copies,
    DROPOUT: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A part of one head's table gradient: of the entries within the reach the sums of all copies, times their unit;
    before these programs come those that write zeros to the entries beyond."""
    head = tl.program_id(1)
    side, inner_side = 2 * max_distance + 1, 2 * reach + 1
    table += head.to(tl.int64) * side * side
    beyond = tl.where(reach < max_distance, tl.cdiv(side * side, COPIES * BLOCK), 0)
    if tl.program_id(0) < beyond:
        entry = tl.program_id(0) * (COPIES * BLOCK) + tl.arange(0, COPIES * BLOCK)
        row, column = entry // side - max_distance, entry % side - max_distance
        is_beyond = (tl.abs(row) > reach) | (tl.abs(column) > reach)
        tl.store(table + entry, tl.zeros([COPIES * BLOCK], tl.float32), mask=is_beyond & (entry < side * side))
    else:
        inner = (tl.program_id(0) - beyond) * BLOCK + tl.arange(0, BLOCK)
        exists = inner < inner_side * inner_side
        total = tl.zeros([COPIES, BLOCK], tl.int64)
        for start in range(0, copies, COPIES):
            copy = start + tl.arange(0, COPIES)
            of_head = (head * copies + copy).to(tl.int64) * inner_side * inner_side
            total += tl.load(
                partials + SUMS_BEGIN + of_head[:, None] + inner[None, :],
                mask=(copy < copies)[:, None] & exists[None, :],
                other=0,
            )
        gradient = tl.sum(total, 0).to(tl.float32) * unit_of(partials, queries, DROPOUT)
        down, across = inner // inner_side - reach, inner % inner_side - reach
        tl.store(table + entry_of(down, across, max_distance, False), gradient, mask=exists)


def _reach_and_copies(bias_table: Tensor, radius: int, routed: bool) -> tuple[int, int]:
    """How large the offsets are at most that a table's gradient is not 0 at, where larger ones count as the table's
    largest; and how many copies programs share to add to."""
    most = bias_table.shape[1] // 2
    reach = most if routed else min(radius, most)
    return reach, max(1, PARTIAL_ENTRIES // (2 * reach + 1) ** 2)


def grid_partial_sums(bias_table: Tensor, radius: int, routed: bool) -> int:
    """How many whole numbers the gradient of a grid's table [heads, 2 * max_distance + 1, 2 * max_distance + 1] is
    summed up in, with those of the unit."""
    reach, copies = _reach_and_copies(bias_table, radius, routed)
    return NUMBERS_OF_UNIT + bias_table.shape[0] * copies * (2 * reach + 1) ** 2


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
    delta: Tensor | None = None,
    partials: Tensor | None = None,
) -> None:
    """Write the gradients of `grid_attention_into`; None for `table_gradient` leaves it out.

    The gradients' heads lie side by side, their rows anywhere, those of key and value equally far apart. `delta` is
    room of log_sum_exp's shape, and `partials` of int64 zeros [`grid_partial_sums`]; None takes some.
    """
    if query.numel() == 0 or key.numel() == 0:
        for gradient in (query_gradient, key_gradient, value_gradient, table_gradient):
            _ = None if gradient is None else gradient.zero_()
        return
    batch, num_queries, heads, head_size = query.shape
    _, num_keys, kv_heads, _ = key.shape
    problem = Problem(query, key, value, bias_table, radius, query_positions, key_positions, mask, dropout, seed)
    delta = torch.empty_like(log_sum_exp) if delta is None else delta
    output_gradient = output_gradient.contiguous()
    reach, copies = _reach_and_copies(bias_table, radius, problem.routed)
    block_q, _, constants, options = problem.options("backward_query")
    if table_gradient is None:
        partials = None
    else:
        if partials is None:
            numbers = grid_partial_sums(bias_table, radius, problem.routed)
            partials = torch.zeros(numbers, dtype=torch.int64, device=query.device)
        _, _, _, block_d, *_ = constants
        launch(
            grid_table_unit_kernel, (cdiv(max(num_queries, num_keys), UNIT_BLOCK), heads + kv_heads, batch),
            output_gradient, problem.operands[2], partials, *problem.sizes[6:11],
            heads, head_size, block_d, UNIT_BLOCK, num_warps=4,
        )  # fmt: skip
    launch(
        grid_attention_backward_query_kernel, (num_blocks(num_queries, width, block_q, problem.routed), heads, batch),
        *problem.operands, output, log_sum_exp, output_gradient, delta, query_gradient, partials,
        *problem.sizes, width, query_gradient.stride(1), reach, copies, *constants, **options,
    )  # fmt: skip
    _, block_k, constants, options = problem.options("backward_key")
    launch(
        grid_attention_backward_key_kernel, (num_blocks(num_keys, width, block_k, problem.routed), kv_heads, batch),
        *problem.operands, log_sum_exp, output_gradient, delta, key_gradient, value_gradient,
        *problem.sizes, width, key_gradient.stride(1), *constants, **options,
    )  # fmt: skip
    if partials is not None:
        side, inner_side = bias_table.shape[1], 2 * reach + 1
        rows = min(next_power_of_2(copies), 16)
        block = ENTRIES // rows
        beyond = cdiv(side * side, ENTRIES) if inner_side < side else 0
        launch(
            grid_table_sums_kernel, (beyond + cdiv(inner_side * inner_side, block), heads),
            partials, table_gradient, batch * num_queries, side // 2, reach, copies, dropout, rows, block, num_warps=4,
        )  # fmt: skip
