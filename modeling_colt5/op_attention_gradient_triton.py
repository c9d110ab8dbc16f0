"""Triton kernels of the gradient of band and routed attention, each sum in a fixed order, and their launches."""

import torch
from torch import Tensor

from .op_attention_triton import (
    FULL,
    LOG2_E,
    UNSPECIALIZED,
    Problem,
    add_bias,
    in_multiplied_dtype,
    launch_parts,
    load_rows,
    load_valid,
    near_range,
    number_of_parts,
    partial_sums,
    room_of_parts,
    share_of,
    store_rows,
    tile_and_part,
    tile_start,
)
from .op_dropout_triton import keeps, keys_of_rows
from .run_launch_triton import cdiv, launch, tl, triton


@triton.jit
def score_gradients(
    scores, gradient_tile, value_tile, row_lse, row_delta, row_keys, columns,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of scores [queries, keys]; `columns` are the keys' numbers for dropout."""
    probabilities = tl.exp2(scores * LOG2_E - row_lse[:, None])
    gradient = tl.dot(gradient_tile, tl.trans(value_tile), input_precision=PRECISION)
    if DROPOUT > 0.0:
        gradient = tl.where(keeps(row_keys, columns[None, :], DROPOUT), gradient / (1.0 - DROPOUT), 0.0)
    return probabilities * (gradient - row_delta[:, None])


@triton.jit
def add_key_gradients(
    scores, query_tile, gradient_tile, value_tile, row_lse, row_delta, row_keys, columns,
    key_accumulator, value_accumulator, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of keys and of its values with what a tile of queries adds, of scores [keys, queries];
    the other arguments are those of `score_gradients`."""
    probabilities = tl.exp2(scores * LOG2_E - row_lse[None, :])
    gradient = tl.dot(value_tile, tl.trans(gradient_tile), input_precision=PRECISION)
    dropped = probabilities
    if DROPOUT > 0.0:
        kept = keeps(row_keys, columns[:, None], DROPOUT)
        dropped = tl.where(kept, probabilities / (1.0 - DROPOUT), 0.0)
        gradient = tl.where(kept, gradient / (1.0 - DROPOUT), 0.0)
    value_accumulator = tl.dot(
        dropped.to(gradient_tile.dtype), gradient_tile, value_accumulator, input_precision=PRECISION
    )
    score_gradient = probabilities * (gradient - row_delta[None, :])
    key_accumulator = tl.dot(
        score_gradient.to(query_tile.dtype), query_tile, key_accumulator, input_precision=PRECISION
    )
    return key_accumulator, value_accumulator


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_backward_query_kernel(
    query, key, value, table, query_positions, key_positions, mask, seed, output, log_sum_exp, output_gradient,
    delta, query_gradient, table_partials,
    query_stride_b, query_stride_n, query_stride_h,
    key_stride_b, key_stride_n, key_stride_h,
    value_stride_b, value_stride_n, value_stride_h,
    num_queries, num_keys, radius, max_distance, ahead, gradient_stride, num_partials, num_parts,
    TABLE_GRADIENT: tl.constexpr, SPLIT: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr,
    ROUTED: tl.constexpr, WIDE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head: their gradient, delta = <output, its gradient>, and partial table gradients.

    Routed: a query's row of partials holds its own score gradients at their distances, which are distinct.
    Band: a block's row holds the sums along the diagonals of its score gradients.
    Without a table keys may be split, and the gradient is that of one part.
    """
    tl.static_assert(ROUTED or BLOCK_Q == BLOCK_K)
    tl.static_assert(not (TABLE_GRADIENT and SPLIT))
    tile, part = tile_and_part(num_parts, SPLIT)
    start = tile * BLOCK_Q
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    query += batch * query_stride_b + head * query_stride_h
    key += batch * key_stride_b + head // GROUP * key_stride_h
    value += batch * value_stride_b + head // GROUP * value_stride_h
    head_offset = (batch * num_queries * HEADS + head) * HEAD
    if table is not None:
        table += head * (2 * max_distance + 1)
    if mask is not None:
        mask += batch * num_keys
    if TABLE_GRADIENT:
        table_partials += (batch * HEADS + head) * num_partials * (2 * max_distance + 1)

    rows = start + tl.arange(0, BLOCK_Q)
    if ROUTED:
        query_positions += batch * num_queries
        key_positions += batch * num_keys
    row_positions, near_begin, near_end = near_range(
        query_positions, key_positions, start, num_queries, num_keys, radius, ahead, max_distance,
        ROUTED, BLOCK_Q, BLOCK_K,
    )  # fmt: skip
    if TABLE_GRADIENT:
        if ROUTED:
            partial_rows = table_partials + rows.to(tl.int64) * (2 * max_distance + 1)
        else:
            partial_rows = table_partials + tl.cast(tile, tl.int64) * (2 * max_distance + 1)
    if SPLIT:
        near_begin, near_end = share_of(near_begin, near_end, part, num_parts)
        query_gradient += tl.cast(part, tl.int64) * tl.num_programs(2) * num_queries * gradient_stride

    query_tile = load_rows(query, start, num_queries, query_stride_n, HEAD, BLOCK_Q, BLOCK_D)
    gradient_tile = load_rows(output_gradient + head_offset, start, num_queries, HEADS * HEAD, HEAD, BLOCK_Q, BLOCK_D)
    output_tile = load_rows(output + head_offset, start, num_queries, HEADS * HEAD, HEAD, BLOCK_Q, BLOCK_D)
    row_delta = tl.sum(output_tile.to(tl.float32) * gradient_tile.to(tl.float32), 1)
    row_vector = (batch * HEADS + head) * num_queries + rows
    if not SPLIT or part == 0:
        tl.store(delta + row_vector, row_delta, mask=rows < num_queries)
    row_lse = tl.load(log_sum_exp + row_vector, mask=rows < num_queries, other=float("inf")) * LOG2_E

    row_keys = None
    if DROPOUT > 0.0:
        row_keys = keys_of_rows(seed, batch * HEADS + head, rows)[:, None]
    accumulator = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    # of routed tokens by query, of a band by lane
    left = tl.zeros([BLOCK_Q], tl.float32)
    right = tl.zeros([BLOCK_Q], tl.float32)
    carried = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    lanes = tl.arange(0, BLOCK_K)
    # Column j of a skewed tile holds its entries at the distances j and j - BLOCK_K from the tile's own.
    skew = (tl.arange(0, BLOCK_Q)[:, None] + lanes[None, :]) % BLOCK_K
    before = tl.arange(0, BLOCK_Q)[:, None] + lanes[None, :] >= BLOCK_K
    for NEAR in tl.static_range(0 if ROUTED else 1, 2):
        steps = near_end - near_begin if NEAR else tl.cdiv(num_keys, BLOCK_K) - (near_end - near_begin)
        for step in range(0, steps):
            key_start = tile_start(step, near_begin, near_end, NEAR, BLOCK_K)
            key_tile = load_rows(key, key_start, num_keys, key_stride_n, HEAD, BLOCK_K, BLOCK_D)
            value_tile = load_rows(value, key_start, num_keys, value_stride_n, HEAD, BLOCK_K, BLOCK_D)
            valid = load_valid(mask, key_start, num_keys, BLOCK_K)[None, :]
            scores = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION)
            if not NEAR:
                bias = tl.load(table + tl.where(step < near_begin, 0, 2 * max_distance))
                scores = tl.where(valid, scores + bias, float("-inf"))
            else:
                columns = key_start + lanes
                if ROUTED:
                    columns = tl.load(key_positions + columns, mask=columns < num_keys, other=0).to(tl.int32)
                distance = columns[None, :] - row_positions[:, None]
                scores = add_bias(scores, distance, valid, table, max_distance, radius, ROUTED, WIDE)
            score_gradient = score_gradients(
                scores, gradient_tile, value_tile, row_lse, row_delta, row_keys, key_start + lanes, DROPOUT, PRECISION
            )
            accumulator = tl.dot(score_gradient.to(key_tile.dtype), key_tile, accumulator, input_precision=PRECISION)
            if TABLE_GRADIENT:
                if not NEAR:
                    far = tl.sum(score_gradient, 1)
                    left += tl.where(step < near_begin, far, 0.0)
                    right += tl.where(step < near_begin, 0.0, far)
                elif ROUTED:
                    inside = (distance > -max_distance) & (distance < max_distance) & valid
                    tl.store(
                        partial_rows[:, None] + max_distance + distance,
                        score_gradient,
                        mask=inside & (rows < num_queries)[:, None],
                    )
                    left += tl.sum(tl.where(distance <= -max_distance, score_gradient, 0.0), 1)
                    right += tl.sum(tl.where(distance >= max_distance, score_gradient, 0.0), 1)
                else:
                    skewed = tl.gather(score_gradient, skew, 1)
                    diagonals = tl.sum(tl.where(before, skewed, carried), 0)
                    diagonal = key_start - start - BLOCK_K + lanes
                    inside = (diagonal > -max_distance) & (diagonal < max_distance)
                    tl.store(partial_rows + max_distance + diagonal, diagonals, mask=inside)
                    if WIDE:
                        left += tl.where(diagonal <= -max_distance, diagonals, 0.0)
                        right += tl.where(diagonal >= max_distance, diagonals, 0.0)
                    carried = skewed

    query_gradient += batch * num_queries * gradient_stride + head * HEAD
    store_rows(query_gradient, accumulator, start, num_queries, gradient_stride, HEAD, BLOCK_Q, BLOCK_D)
    if TABLE_GRADIENT:
        if ROUTED:
            tl.store(partial_rows, left, mask=rows < num_queries)
            tl.store(partial_rows + 2 * max_distance, right, mask=rows < num_queries)
        else:
            # No tile follows the last one, so what it holds past its own distance is added here.
            diagonals = tl.sum(tl.where(before, 0.0, carried), 0)
            diagonal = (near_end - 1) * BLOCK_K - start + lanes
            inside = (diagonal > -max_distance) & (diagonal < max_distance)
            tl.store(partial_rows + max_distance + diagonal, diagonals, mask=inside)
            if WIDE:
                left += tl.where(diagonal <= -max_distance, diagonals, 0.0)
                right += tl.where(diagonal >= max_distance, diagonals, 0.0)
                tl.store(partial_rows, tl.sum(left))
                tl.store(partial_rows + 2 * max_distance, tl.sum(right))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_backward_key_kernel(
    query, key, value, table, query_positions, key_positions, mask, seed, log_sum_exp, output_gradient, delta,
    key_gradient, value_gradient,
    query_stride_b, query_stride_n, query_stride_h,
    key_stride_b, key_stride_n, key_stride_h,
    value_stride_b, value_stride_n, value_stride_h,
    num_queries, num_keys, radius, max_distance, ahead, gradient_stride, num_parts, SPLIT: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr,
    ROUTED: tl.constexpr, WIDE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of keys of one key/value head: gradients of keys and values, over all query heads that share them;
    where these are split, over those of one part."""
    tile, part = tile_and_part(num_parts, SPLIT)
    start = tile * BLOCK_K
    kv_head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    key += batch * key_stride_b + kv_head * key_stride_h
    value += batch * value_stride_b + kv_head * value_stride_h
    if mask is not None:
        mask += batch * num_keys

    columns = start + tl.arange(0, BLOCK_K)
    if ROUTED:
        query_positions += batch * num_queries
        key_positions += batch * num_keys
    column_positions, near_begin, near_end = near_range(
        key_positions, query_positions, start, num_keys, num_queries, ahead, radius, max_distance,
        ROUTED, BLOCK_K, BLOCK_Q,
    )  # fmt: skip

    key_tile = load_rows(key, start, num_keys, key_stride_n, HEAD, BLOCK_K, BLOCK_D)
    value_tile = load_rows(value, start, num_keys, value_stride_n, HEAD, BLOCK_K, BLOCK_D)
    valid = load_valid(mask, start, num_keys, BLOCK_K)[:, None]
    key_accumulator = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    value_accumulator = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    first_member, last_member = 0, GROUP
    if SPLIT:
        first_member, last_member = share_of(0, GROUP, part, num_parts)
    for member in range(first_member, last_member):
        head = kv_head * GROUP + member
        head_query = query + batch * query_stride_b + head * query_stride_h
        head_gradient = output_gradient + (batch * num_queries * HEADS + head) * HEAD
        head_vector = (batch * HEADS + head) * num_queries
        head_table = None
        if table is not None:
            head_table = table + head * (2 * max_distance + 1)
        for NEAR in tl.static_range(0 if ROUTED else 1, 2):
            steps = near_end - near_begin if NEAR else tl.cdiv(num_queries, BLOCK_Q) - (near_end - near_begin)
            for step in range(0, steps):
                query_start = tile_start(step, near_begin, near_end, NEAR, BLOCK_Q)
                query_tile = load_rows(head_query, query_start, num_queries, query_stride_n, HEAD, BLOCK_Q, BLOCK_D)
                gradient_tile = load_rows(
                    head_gradient, query_start, num_queries, HEADS * HEAD, HEAD, BLOCK_Q, BLOCK_D
                )
                rows = query_start + tl.arange(0, BLOCK_Q)
                in_rows = rows < num_queries
                row_keys = None
                if DROPOUT > 0.0:
                    row_keys = keys_of_rows(seed, batch * HEADS + head, rows)[None, :]
                row_lse = tl.load(log_sum_exp + head_vector + rows, mask=in_rows, other=float("inf")) * LOG2_E
                row_delta = tl.load(delta + head_vector + rows, mask=in_rows, other=0.0)
                scores = tl.dot(key_tile, tl.trans(query_tile), input_precision=PRECISION)
                if not NEAR:
                    # The first queries stand far before these keys, which are then on their right.
                    bias = tl.load(head_table + tl.where(step < near_begin, 2 * max_distance, 0))
                    scores = tl.where(valid, scores + bias, float("-inf"))
                else:
                    if ROUTED:
                        rows = tl.load(query_positions + rows, mask=in_rows, other=0).to(tl.int32)
                    distance = column_positions[:, None] - rows[None, :]
                    scores = add_bias(scores, distance, valid, head_table, max_distance, radius, ROUTED, WIDE)
                key_accumulator, value_accumulator = add_key_gradients(
                    scores, query_tile, gradient_tile, value_tile, row_lse, row_delta, row_keys, columns,
                    key_accumulator, value_accumulator, DROPOUT, PRECISION,
                )  # fmt: skip

    offset = batch * num_keys * gradient_stride + kv_head * HEAD
    if SPLIT:
        offset += tl.cast(part, tl.int64) * tl.num_programs(2) * num_keys * gradient_stride
    store_rows(key_gradient + offset, key_accumulator, start, num_keys, gradient_stride, HEAD, BLOCK_K, BLOCK_D)
    store_rows(value_gradient + offset, value_accumulator, start, num_keys, gradient_stride, HEAD, BLOCK_K, BLOCK_D)


@triton.jit(do_not_specialize=["rows"])
def table_sums_kernel(
    partials, table, batch, rows, width, heads: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """The sums [heads, width] of partial sums [batch, heads, rows, width], in a fixed order."""
    head = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    # One loop over the rows of all batches: causal windows are many batches of few rows.
    for start in range(0, batch * rows, ROWS):
        numbers = start + tl.arange(0, ROWS)
        of_head = (numbers // rows * heads + head).to(tl.int64) * rows + numbers % rows
        total += tl.load(
            partials + of_head[:, None] * width + columns[None, :],
            mask=(numbers < batch * rows)[:, None] & (columns < width)[None, :],
            other=0.0,
        )
    tl.store(table + head * width + columns, tl.sum(total, axis=0), mask=columns < width)


def _written(
    kernel: str, query: Tensor, key: Tensor, results: tuple[Tensor, ...], room: Tensor | None
) -> tuple[tuple[Tensor, ...], int, int]:
    """Where a kernel writes results of one shape, which is there or to parts of each in a room; how far apart rows are
    there, and how many parts there are."""
    num_parts = 1 if room is None else number_of_parts(kernel, query, key)
    if room is None or num_parts == 1:
        return results, results[0].stride(1), 1
    size = num_parts * results[0].numel()
    rooms = tuple(room[number * size :] for number in range(len(results)))
    return rooms, results[0].shape[2] * results[0].shape[3], num_parts


def _add_up(parts: tuple[Tensor, ...], results: tuple[Tensor, ...], num_parts: int) -> None:
    """Add up the parts of each result, where it has more than one."""
    if num_parts > 1:
        for own, result in zip(parts, results, strict=True):
            launch_parts(own, None, result, None, num_parts)


@in_multiplied_dtype(first_result=13)
def attention_backward_into(
    output_gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias_table: Tensor | None,
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
    room: Tensor | None = None,
    ahead: int | None = None,
) -> None:
    """Write the gradients of `attention_into`, each sum in a fixed order; None for `table_gradient` leaves it out.

    The gradients' heads lie side by side, their rows anywhere, those of key and value equally far apart. `delta` is
    room of log_sum_exp's shape, `partials` fp32 zeros [batch, heads, `partial_sums`, 2 * max_distance + 1], and `room`
    is for `room_of_parts`; None takes some. `ahead` is as of `attention_into`.
    """
    gradients = (query_gradient, key_gradient, value_gradient, table_gradient)
    if query.numel() == 0 or key.numel() == 0:
        for gradient in gradients:
            _ = None if gradient is None else gradient.zero_()
        return
    batch, num_queries, heads, head_size = query.shape
    rest = (query_positions, key_positions, mask, dropout, seed, ahead)
    problem = Problem(query, key, value, bias_table, radius, *rest)
    delta = torch.empty_like(log_sum_exp) if delta is None else delta
    if table_gradient is None or bias_table is None:
        partials, rows = None, 0
    else:
        rows = partial_sums(num_queries, head_size, query.dtype, query.device, problem.routed)
        if partials is None:
            shape = (batch, heads, rows, bias_table.shape[1])
            partials = torch.zeros(shape, dtype=torch.float32, device=query.device)
    output_gradient = output_gradient.contiguous()
    if problem.kind != FULL:
        room = None
    elif room is None:
        room = torch.empty(room_of_parts(query, key, True), dtype=torch.float32, device=query.device)

    block_q, _, constants, options = problem.options("backward_query")
    of_query = (query_gradient,)
    written, stride, num_parts = _written("backward_query", query, key, of_query, room)
    launch(
        attention_backward_query_kernel, (cdiv(num_queries, block_q) * num_parts, heads, batch),
        *problem.operands, output, log_sum_exp, output_gradient, delta, *written, partials,
        *problem.sizes, problem.ahead, stride, rows, num_parts, partials is not None, num_parts > 1, *constants,
        **options,
    )  # fmt: skip
    _add_up(written, of_query, num_parts)

    num_keys, kv_heads = key.shape[1:3]
    _, block_k, constants, options = problem.options("backward_key")
    of_keys = (key_gradient, value_gradient)
    written, stride, num_parts = _written("backward_key", query, key, of_keys, room)
    launch(
        attention_backward_key_kernel, (cdiv(num_keys, block_k) * num_parts, kv_heads, batch),
        *problem.operands, log_sum_exp, output_gradient, delta, *written,
        *problem.sizes, problem.ahead, stride, num_parts, num_parts > 1, *constants, **options,
    )  # fmt: skip
    _add_up(written, of_keys, num_parts)
    if partials is not None:
        width = partials.shape[-1]
        launch(
            table_sums_kernel, (cdiv(width, 32), heads),
            partials, table_gradient, batch, rows, width, heads, 128, 32, num_warps=4,
        )  # fmt: skip
