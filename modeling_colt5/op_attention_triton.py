"""Band and routed attention by Triton: the kernels, their tile sizes and their launches.

The kernels are one family: with the positions of routed tokens, or without for a band.
"""

import functools
from typing import Any

import torch

from .kernel_backend import INTERPRETED
from .op_dropout_steps_triton import keeps, keys_of_rows
from .run_launch_triton import adjacent, launch, next_power_of_2

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("op_attention_triton needs triton; use kernel_backend='torch' without it") from error

LOG2_E = tl.constexpr(1.4426950408889634)

# A new length must not mean a new compilation.
UNSPECIALIZED = ["num_queries", "num_keys", "radius", "max_distance", "num_partials"]


@triton.jit
def _near_tiles(positions, length, first, last, max_distance, BLOCK: tl.constexpr):
    """Tiles [begin, end) of ascending positions that may come within max_distance of the range [first, last].

    All distances to a tile before `begin`, and all to one from `end` on, are clamped to one and the same value.
    """
    num_tiles = tl.cdiv(length, BLOCK)
    begin, end = 0, 0
    for chunk in range(0, num_tiles, 128):
        tile = chunk + tl.arange(0, 128)
        exists = tile < num_tiles
        tile_first = tl.load(positions + tile * BLOCK, mask=exists, other=0)
        tile_last = tl.load(positions + tl.minimum((tile + 1) * BLOCK, length) - 1, mask=exists, other=0)
        begin += tl.sum((exists & (tile_last <= first - max_distance)).to(tl.int32))
        end += tl.sum((exists & (tile_first < last + max_distance)).to(tl.int32))
    return begin, tl.maximum(begin, end)


@triton.jit
def _load_rows(base, start, length, stride, HEAD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [start, start + BLOCK) of one head as [BLOCK, BLOCK_D], zeros beyond `length` and HEAD."""
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    # Only the tile's own offset can pass 2^31.
    pointers = base + tl.cast(start, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    inside = (start + rows < length)[:, None]
    if HEAD != BLOCK_D:
        inside &= (columns < HEAD)[None, :]
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _store_rows(base, tile, start, length, stride, HEAD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    pointers = base + tl.cast(start, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    inside = (start + rows < length)[:, None]
    if HEAD != BLOCK_D:
        inside &= (columns < HEAD)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _add_bias(scores, distance, valid, table, max_distance, radius, ROUTED: tl.constexpr, WIDE: tl.constexpr):
    """The scores plus the bias of each distance; minus infinity where not valid or out of the band."""
    if not ROUTED:
        valid = valid & (distance <= radius) & (distance >= -radius)
    if ROUTED or WIDE:
        distance = tl.minimum(tl.maximum(distance, -max_distance), max_distance)
    return scores + tl.load(table + max_distance + distance, mask=valid, other=float("-inf"))


@triton.jit
def _tile_start(step, near_begin, near_end, NEAR: tl.constexpr, BLOCK: tl.constexpr):
    """Where the tile of a loop's step begins: the far tiles are those before `near_begin` and from `near_end` on."""
    if not NEAR:
        return tl.where(step < near_begin, step, step + near_end - near_begin) * BLOCK
    return (step + near_begin) * BLOCK


@triton.jit
def _load_valid(mask, start, length, BLOCK: tl.constexpr):
    """Which of the keys [start, start + BLOCK) exist and are real."""
    keys = start + tl.arange(0, BLOCK)
    valid = keys < length
    if mask is not None:
        valid = tl.load(mask + keys, mask=valid, other=0) != 0
    return valid


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_forward_kernel(
    query, key, value, table, query_positions, key_positions, mask, seed, output, log_sum_exp,
    query_stride_b, query_stride_n, query_stride_h,
    key_stride_b, key_stride_n, key_stride_h,
    value_stride_b, value_stride_n, value_stride_h,
    num_queries, num_keys, radius, max_distance,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr,
    ROUTED: tl.constexpr, WIDE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head: output and log-sum-exp, by online softmax over tiles of keys."""
    start = tl.program_id(0) * BLOCK_Q
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    query += batch * query_stride_b + head * query_stride_h
    key += batch * key_stride_b + head // GROUP * key_stride_h
    value += batch * value_stride_b + head // GROUP * value_stride_h
    output += (batch * num_queries * HEADS + head) * HEAD
    log_sum_exp += (batch * HEADS + head) * num_queries
    table += head * (2 * max_distance + 1)
    if mask is not None:
        mask += batch * num_keys

    rows = start + tl.arange(0, BLOCK_Q)
    if ROUTED:
        query_positions += batch * num_queries
        key_positions += batch * num_keys
        first = tl.load(query_positions + start).to(tl.int32)
        last = tl.load(query_positions + tl.minimum(start + BLOCK_Q, num_queries) - 1).to(tl.int32)
        near_begin, near_end = _near_tiles(key_positions, num_keys, first, last, max_distance, BLOCK_K)
        row_positions = tl.load(query_positions + rows, mask=rows < num_queries, other=0).to(tl.int32)
    else:
        row_positions = rows
        near_begin = tl.maximum(start - radius, 0) // BLOCK_K
        near_end = tl.cdiv(tl.minimum(start + BLOCK_Q + radius, num_keys), BLOCK_K)

    query_tile = _load_rows(query, start, num_queries, query_stride_n, HEAD, BLOCK_Q, BLOCK_D)
    if DROPOUT > 0.0:
        row_keys = keys_of_rows(seed, batch * HEADS + head, rows)[:, None]
    maximum = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    accumulator = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    # The first pass takes the routed keys far from these queries, whose bias is one of the table's two ends.
    for NEAR in tl.static_range(0 if ROUTED else 1, 2):
        steps = near_end - near_begin if NEAR else tl.cdiv(num_keys, BLOCK_K) - (near_end - near_begin)
        for step in range(0, steps):
            key_start = _tile_start(step, near_begin, near_end, NEAR, BLOCK_K)
            key_tile = _load_rows(key, key_start, num_keys, key_stride_n, HEAD, BLOCK_K, BLOCK_D)
            value_tile = _load_rows(value, key_start, num_keys, value_stride_n, HEAD, BLOCK_K, BLOCK_D)
            valid = _load_valid(mask, key_start, num_keys, BLOCK_K)[None, :]
            scores = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION)
            if not NEAR:
                bias = tl.load(table + tl.where(step < near_begin, 0, 2 * max_distance))
                scores = tl.where(valid, scores + bias, float("-inf"))
            else:
                columns = key_start + tl.arange(0, BLOCK_K)
                if ROUTED:
                    columns = tl.load(key_positions + columns, mask=columns < num_keys, other=0).to(tl.int32)
                distance = columns[None, :] - row_positions[:, None]
                scores = _add_bias(scores, distance, valid, table, max_distance, radius, ROUTED, WIDE)
            new_maximum = tl.maximum(maximum, tl.max(scores, 1))
            # A row that has met no real key yet has a maximum of minus infinity, from which itself must not be
            # subtracted.
            finite = tl.where(new_maximum == float("-inf"), 0.0, new_maximum) * LOG2_E
            rescale = tl.exp2(maximum * LOG2_E - finite)
            probabilities = tl.exp2(scores * LOG2_E - finite[:, None])
            total = total * rescale + tl.sum(probabilities, 1)
            if DROPOUT > 0.0:
                kept = keeps(row_keys, (key_start + tl.arange(0, BLOCK_K))[None, :], DROPOUT)
                probabilities = tl.where(kept, probabilities, 0.0)
            accumulator = accumulator * rescale[:, None]
            accumulator = tl.dot(
                probabilities.to(value_tile.dtype), value_tile, accumulator, input_precision=PRECISION
            )
            maximum = new_maximum

    # A row without any real key has an output of 0, and probabilities of 0 in the backward.
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    accumulator = accumulator / (total * (1.0 - DROPOUT))[:, None]
    row_lse = tl.where(empty, float("inf"), maximum + tl.log(total))
    _store_rows(output, accumulator, start, num_queries, HEADS * HEAD, HEAD, BLOCK_Q, BLOCK_D)
    tl.store(log_sum_exp + rows, row_lse, mask=rows < num_queries)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_backward_query_kernel(
    query, key, value, table, query_positions, key_positions, mask, seed, output, log_sum_exp, output_gradient,
    delta, query_gradient, table_partials,
    query_stride_b, query_stride_n, query_stride_h,
    key_stride_b, key_stride_n, key_stride_h,
    value_stride_b, value_stride_n, value_stride_h,
    num_queries, num_keys, radius, max_distance, gradient_stride, num_partials, TABLE_GRADIENT: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr,
    ROUTED: tl.constexpr, WIDE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head: their gradient, delta = <output, its gradient>, and partial table gradients.

    Routed: a query's row of partials holds its own score gradients at their distances, which are distinct.
    Band: a block's row holds the sums along the diagonals of its score gradients.
    """
    tl.static_assert(ROUTED or BLOCK_Q == BLOCK_K)
    start = tl.program_id(0) * BLOCK_Q
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    query += batch * query_stride_b + head * query_stride_h
    key += batch * key_stride_b + head // GROUP * key_stride_h
    value += batch * value_stride_b + head // GROUP * value_stride_h
    head_offset = (batch * num_queries * HEADS + head) * HEAD
    table += head * (2 * max_distance + 1)
    if mask is not None:
        mask += batch * num_keys
    if TABLE_GRADIENT:
        table_partials += (batch * HEADS + head) * num_partials * (2 * max_distance + 1)

    rows = start + tl.arange(0, BLOCK_Q)
    if ROUTED:
        query_positions += batch * num_queries
        key_positions += batch * num_keys
        first = tl.load(query_positions + start).to(tl.int32)
        last = tl.load(query_positions + tl.minimum(start + BLOCK_Q, num_queries) - 1).to(tl.int32)
        near_begin, near_end = _near_tiles(key_positions, num_keys, first, last, max_distance, BLOCK_K)
        row_positions = tl.load(query_positions + rows, mask=rows < num_queries, other=0).to(tl.int32)
        if TABLE_GRADIENT:
            partial_rows = table_partials + rows.to(tl.int64) * (2 * max_distance + 1)
    else:
        row_positions = rows
        near_begin = tl.maximum(start - radius, 0) // BLOCK_K
        near_end = tl.cdiv(tl.minimum(start + BLOCK_Q + radius, num_keys), BLOCK_K)
        if TABLE_GRADIENT:
            partial_rows = table_partials + tl.program_id(0).to(tl.int64) * (2 * max_distance + 1)

    query_tile = _load_rows(query, start, num_queries, query_stride_n, HEAD, BLOCK_Q, BLOCK_D)
    gradient_tile = _load_rows(output_gradient + head_offset, start, num_queries, HEADS * HEAD, HEAD, BLOCK_Q, BLOCK_D)
    output_tile = _load_rows(output + head_offset, start, num_queries, HEADS * HEAD, HEAD, BLOCK_Q, BLOCK_D)
    row_delta = tl.sum(output_tile.to(tl.float32) * gradient_tile.to(tl.float32), 1)
    row_vector = (batch * HEADS + head) * num_queries + rows
    tl.store(delta + row_vector, row_delta, mask=rows < num_queries)
    row_lse = tl.load(log_sum_exp + row_vector, mask=rows < num_queries, other=float("inf")) * LOG2_E

    if DROPOUT > 0.0:
        row_keys = keys_of_rows(seed, batch * HEADS + head, rows)[:, None]
    accumulator = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
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
            key_start = _tile_start(step, near_begin, near_end, NEAR, BLOCK_K)
            key_tile = _load_rows(key, key_start, num_keys, key_stride_n, HEAD, BLOCK_K, BLOCK_D)
            value_tile = _load_rows(value, key_start, num_keys, value_stride_n, HEAD, BLOCK_K, BLOCK_D)
            valid = _load_valid(mask, key_start, num_keys, BLOCK_K)[None, :]
            scores = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION)
            if not NEAR:
                bias = tl.load(table + tl.where(step < near_begin, 0, 2 * max_distance))
                scores = tl.where(valid, scores + bias, float("-inf"))
            else:
                columns = key_start + lanes
                if ROUTED:
                    columns = tl.load(key_positions + columns, mask=columns < num_keys, other=0).to(tl.int32)
                distance = columns[None, :] - row_positions[:, None]
                scores = _add_bias(scores, distance, valid, table, max_distance, radius, ROUTED, WIDE)
            probabilities = tl.exp2(scores * LOG2_E - row_lse[:, None])
            probability_gradient = tl.dot(gradient_tile, tl.trans(value_tile), input_precision=PRECISION)
            if DROPOUT > 0.0:
                kept = keeps(row_keys, (key_start + lanes)[None, :], DROPOUT)
                probability_gradient = tl.where(kept, probability_gradient / (1.0 - DROPOUT), 0.0)
            score_gradient = probabilities * (probability_gradient - row_delta[:, None])
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
                        left += tl.sum(tl.where(diagonal <= -max_distance, diagonals, 0.0))
                        right += tl.sum(tl.where(diagonal >= max_distance, diagonals, 0.0))
                    carried = skewed

    query_gradient += batch * num_queries * gradient_stride + head * HEAD
    _store_rows(query_gradient, accumulator, start, num_queries, gradient_stride, HEAD, BLOCK_Q, BLOCK_D)
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
                left += tl.sum(tl.where(diagonal <= -max_distance, diagonals, 0.0))
                right += tl.sum(tl.where(diagonal >= max_distance, diagonals, 0.0))
                one = tl.arange(0, BLOCK_Q)
                tl.store(partial_rows + one, left, mask=one == 0)
                tl.store(partial_rows + 2 * max_distance + one, right, mask=one == 0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_backward_key_kernel(
    query, key, value, table, query_positions, key_positions, mask, seed, log_sum_exp, output_gradient, delta,
    key_gradient, value_gradient,
    query_stride_b, query_stride_n, query_stride_h,
    key_stride_b, key_stride_n, key_stride_h,
    value_stride_b, value_stride_n, value_stride_h,
    num_queries, num_keys, radius, max_distance, gradient_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr,
    ROUTED: tl.constexpr, WIDE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of keys of one key/value head: gradients of keys and values, over all query heads that share them."""
    start = tl.program_id(0) * BLOCK_K
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
        first = tl.load(key_positions + start).to(tl.int32)
        last = tl.load(key_positions + tl.minimum(start + BLOCK_K, num_keys) - 1).to(tl.int32)
        near_begin, near_end = _near_tiles(query_positions, num_queries, first, last, max_distance, BLOCK_Q)
        column_positions = tl.load(key_positions + columns, mask=columns < num_keys, other=0).to(tl.int32)
    else:
        column_positions = columns
        near_begin = tl.maximum(start - radius, 0) // BLOCK_Q
        near_end = tl.cdiv(tl.minimum(start + BLOCK_K + radius, num_queries), BLOCK_Q)

    key_tile = _load_rows(key, start, num_keys, key_stride_n, HEAD, BLOCK_K, BLOCK_D)
    value_tile = _load_rows(value, start, num_keys, value_stride_n, HEAD, BLOCK_K, BLOCK_D)
    valid = _load_valid(mask, start, num_keys, BLOCK_K)[:, None]
    key_accumulator = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    value_accumulator = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        head_query = query + batch * query_stride_b + head * query_stride_h
        head_gradient = output_gradient + (batch * num_queries * HEADS + head) * HEAD
        head_vector = (batch * HEADS + head) * num_queries
        head_table = table + head * (2 * max_distance + 1)
        for NEAR in tl.static_range(0 if ROUTED else 1, 2):
            steps = near_end - near_begin if NEAR else tl.cdiv(num_queries, BLOCK_Q) - (near_end - near_begin)
            for step in range(0, steps):
                query_start = _tile_start(step, near_begin, near_end, NEAR, BLOCK_Q)
                query_tile = _load_rows(head_query, query_start, num_queries, query_stride_n, HEAD, BLOCK_Q, BLOCK_D)
                gradient_tile = _load_rows(
                    head_gradient, query_start, num_queries, HEADS * HEAD, HEAD, BLOCK_Q, BLOCK_D
                )
                rows = query_start + tl.arange(0, BLOCK_Q)
                in_rows = rows < num_queries
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
                    scores = _add_bias(scores, distance, valid, head_table, max_distance, radius, ROUTED, WIDE)
                probabilities = tl.exp2(scores * LOG2_E - row_lse[None, :])
                probability_gradient = tl.dot(value_tile, tl.trans(gradient_tile), input_precision=PRECISION)
                dropped = probabilities
                if DROPOUT > 0.0:
                    kept = keeps(row_keys, columns[:, None], DROPOUT)
                    dropped = tl.where(kept, probabilities / (1.0 - DROPOUT), 0.0)
                    probability_gradient = tl.where(kept, probability_gradient / (1.0 - DROPOUT), 0.0)
                value_accumulator = tl.dot(
                    dropped.to(gradient_tile.dtype), gradient_tile, value_accumulator, input_precision=PRECISION
                )
                score_gradient = probabilities * (probability_gradient - row_delta[None, :])
                key_accumulator = tl.dot(
                    score_gradient.to(query_tile.dtype), query_tile, key_accumulator, input_precision=PRECISION
                )

    offset = batch * num_keys * gradient_stride + kv_head * HEAD
    _store_rows(key_gradient + offset, key_accumulator, start, num_keys, gradient_stride, HEAD, BLOCK_K, BLOCK_D)
    _store_rows(value_gradient + offset, value_accumulator, start, num_keys, gradient_stride, HEAD, BLOCK_K, BLOCK_D)


@triton.jit(do_not_specialize=["rows"])
def table_sums_kernel(
    partials, table, batch, rows, width, heads: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """The sums [heads, width] of partial sums [batch, heads, rows, width], in a fixed order."""
    head = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for row in range(batch):
        first = partials + (row * heads + head).to(tl.int64) * rows * width
        for start in range(0, rows, ROWS):
            numbers = start + tl.arange(0, ROWS)
            total += tl.load(
                first + numbers.to(tl.int64)[:, None] * width + columns[None, :],
                mask=(numbers < rows)[:, None] & (columns < width)[None, :],
                other=0.0,
            )
    tl.store(table + head * width + columns, tl.sum(total, axis=0), mask=columns < width)


# A tile has these (queries, keys, warps, stages), by kernel and by whether positions are given; other head sizes and
# dtypes take others below. They are from benchmarks/attention.py --sweep on one H200; of two within 5 %, the one with
# less shared memory was taken, so that smaller cards have room.
BLOCKS = {
    ("forward", False): (64, 64, 4, 3),
    ("forward", True): (64, 128, 4, 2),
    ("backward_query", False): (64, 64, 4, 1),
    ("backward_query", True): (64, 64, 4, 3),
    ("backward_key", False): (64, 64, 4, 1),
    ("backward_key", True): (64, 64, 4, 1),
}


# The tiles of large heads fit from so many bytes of shared memory on; they take up to 98,304.
LARGE_SHARED_MEMORY = 98_304


@functools.cache
def _has_large_shared_memory(device: torch.device) -> bool:
    """Whether a program may have `LARGE_SHARED_MEMORY`: not on NVIDIA's cards before Ampere, nor on AMD's."""
    # Without a card launches are recorded at most, and as those on a card with much shared memory.
    if INTERPRETED or device.type != "cuda":
        return True
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return shared >= LARGE_SHARED_MEMORY


@functools.lru_cache
def _launch_options(
    kernel: str,
    blocks: tuple[int, int, int, int],
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_size: int,
    routed: bool,
    wide: bool,
    dropout: float,
    tf32: bool,
    has_large_shared_memory: bool,
) -> tuple[int, int, tuple[Any, ...], dict[str, int]]:
    """A tile's queries and keys, a kernel's constants from HEADS on, and its warps and stages."""
    block_q, block_k, warps, stages = blocks
    block_d = max(16, next_power_of_2(head_size))
    if dtype == torch.float32:
        # Without tensor cores a product's operands live in registers: they would spill with larger tiles or fewer
        # warps.
        block_q, block_k, warps, stages = 32, 32, 8, 1
        if block_d > 64 and kernel != "forward" and not has_large_shared_memory:
            block_q, block_k, warps = 16, 16, 4
    elif block_d > 64 and not has_large_shared_memory:
        block_q, block_k, warps, stages = 32, 32, 4, 1
    elif block_d > 64:
        block_q, block_k, warps, stages = 64, 64, 4 if kernel == "forward" else 8, 1
    precision = "tf32" if tf32 else "ieee"
    constants = (
        heads, heads // kv_heads, head_size, block_d, routed, wide, dropout, precision, block_q, block_k,
    )  # fmt: skip
    return block_q, block_k, constants, {"num_warps": warps, "num_stages": stages}


class _Problem:
    """What the three kernels share: operands in the kernels' layout, sizes, and what decides about a kernel's code."""

    __slots__ = ("code", "operands", "routed", "sizes")

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias_table: torch.Tensor,
        radius: int,
        query_positions: torch.Tensor | None,
        key_positions: torch.Tensor | None,
        mask: torch.Tensor | None,
        dropout: float,
        seed: torch.Tensor | None,
    ):
        _, num_queries, heads, head_size = query.shape
        _, num_keys, kv_heads, _ = key.shape
        self.routed = query_positions is not None and key_positions is not None
        radius = 0 if self.routed else min(radius, num_keys - 1)
        max_distance = bias_table.shape[1] // 2
        self.operands = (query, key, value, bias_table, query_positions, key_positions, mask, seed)
        strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3])
        self.sizes = (*strides, num_queries, num_keys, radius, max_distance)
        dtype = query.dtype
        tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
        is_large = _has_large_shared_memory(query.device)
        self.code = (dtype, heads, kv_heads, head_size, self.routed, radius >= max_distance, dropout, tf32, is_large)

    def options(self, kernel: str) -> tuple[int, int, tuple[Any, ...], dict[str, int]]:
        return _launch_options(kernel, BLOCKS[kernel, self.routed], *self.code)


def _operands(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias_table: torch.Tensor, *rest: torch.Tensor | None
) -> list[Any]:
    """Operands in the kernels' layout: rows of query, key and value may lie anywhere, their elements side by side; the
    rest is contiguous, the table in fp32."""
    states = [part if part.stride(3) == 1 else part.contiguous() for part in (query, key, value)]
    return [*states, *map(adjacent, (bias_table.float(), *rest))]


def readable(*states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The states for a kernel to read: Triton's interpreter multiplies bfloat16 as if its bits were integers."""
    if INTERPRETED and states[0].dtype == torch.bfloat16:
        return tuple(tensor.float() for tensor in states)
    return states


def attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias_table: torch.Tensor,
    radius: int,
    query_positions: torch.Tensor | None,
    key_positions: torch.Tensor | None,
    mask: torch.Tensor | None,
    dropout: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Band attention, or routed attention where positions are given (then `radius` is not read).

    Args:
        query: fp16, bf16 or fp32 [batch, queries, heads, d_kv], any strides.
        key, value: [batch, keys, key/value heads, d_kv], any strides.
        bias_table: [heads, 2 * max_distance + 1], max_distance ≥ 1.
        radius: positions to each side.
        query_positions, key_positions: int64 [batch, queries] and [batch, keys], or None for the band.
        mask: bool [batch, keys], True for keys to read; None for all.
        dropout: probability of dropping an attention probability.
        seed: int64 [1], of what is dropped; read where `dropout` is above 0.

    Returns:
        The output [batch, queries, heads, d_kv] and the log-sum-exp of the scores, fp32 [batch, heads, queries].
    """
    batch, num_queries, heads, _ = query.shape
    dtype = query.dtype
    query, key, value = readable(query, key, value)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    log_sum_exp = query.new_empty((batch, heads, num_queries), dtype=torch.float32)
    if output.numel() == 0 or key.numel() == 0:
        return output.zero_().to(dtype), log_sum_exp.zero_()
    operands = _operands(query, key, value, bias_table, query_positions, key_positions, mask)
    operands += (seed, output, log_sum_exp, radius, dropout)
    attention_forward_into(*operands)
    return output.to(dtype), log_sum_exp


def attention_forward_into(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias_table: torch.Tensor,
    query_positions: torch.Tensor | None,
    key_positions: torch.Tensor | None,
    mask: torch.Tensor | None,
    seed: torch.Tensor | None,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    radius: int,
    dropout: float,
) -> None:
    """The launch of `attention_forward`: operands as kernels read them, then its results, which it writes."""
    batch, num_queries, heads, _ = query.shape
    problem = _Problem(query, key, value, bias_table, radius, query_positions, key_positions, mask, dropout, seed)
    block_q, _, constants, options = problem.options("forward")
    launch(
        attention_forward_kernel, (-(-num_queries // block_q), heads, batch),
        *problem.operands, output, log_sum_exp,
        *problem.sizes, *constants, **options,
    )  # fmt: skip


def attention_backward(
    output_gradient: torch.Tensor,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias_table: torch.Tensor,
    radius: int,
    query_positions: torch.Tensor | None,
    key_positions: torch.Tensor | None,
    mask: torch.Tensor | None,
    dropout: float,
    seed: torch.Tensor | None,
    table_gradient: bool,
) -> tuple[torch.Tensor, ...]:
    """The gradients of `attention_forward`, each sum in a fixed order.

    Args:
        output_gradient: [batch, queries, heads, d_kv].
        output, log_sum_exp: what `attention_forward` returned for the other arguments.
        table_gradient: whether the table's gradient is wanted.

    Returns:
        The gradients of query, key and value, contiguous, and of the table (zeros where not wanted), in their dtypes.
    """
    dtype = query.dtype
    output_gradient, output, query, key, value = readable(output_gradient, output, query, key, value)
    query_gradient, key_gradient, value_gradient = (
        torch.empty_like(states, memory_format=torch.contiguous_format) for states in (query, key, value)
    )
    if query.numel() == 0 or key.numel() == 0:
        gradients = (query_gradient.zero_(), key_gradient.zero_(), value_gradient.zero_())
        return *(gradient.to(dtype) for gradient in gradients), torch.zeros_like(bias_table)
    batch, num_queries, heads, head_size = query.shape
    partials = None
    if table_gradient:
        rows = num_queries
        if query_positions is None:
            rows = band_partials(num_queries, head_size, query.dtype, query.device)
        shape = (batch, heads, rows, bias_table.shape[1])
        partials = torch.zeros(shape, dtype=torch.float32, device=query.device)
    operands: list[Any] = [output_gradient.contiguous(), output, log_sum_exp]
    operands += _operands(query, key, value, bias_table, query_positions, key_positions, mask)
    operands += (seed, torch.empty_like(log_sum_exp), query_gradient, key_gradient, value_gradient)
    operands += (partials, radius, dropout)
    attention_backward_into(*operands)
    table = torch.zeros_like(bias_table) if partials is None else partials.sum((0, 2)).to(bias_table.dtype)
    return query_gradient.to(dtype), key_gradient.to(dtype), value_gradient.to(dtype), table


def band_partials(num_queries: int, head_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many sums of the table's gradient the backward of band attention leaves of each head, one of each block of
    queries; that of routed attention leaves one of each query."""
    is_large = _has_large_shared_memory(device)
    code = (dtype, 1, 1, head_size, False, True, 0.0, False, is_large)
    return -(-num_queries // _launch_options("backward_query", BLOCKS["backward_query", False], *code)[0])


def attention_backward_into(
    output_gradient: torch.Tensor,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias_table: torch.Tensor,
    query_positions: torch.Tensor | None,
    key_positions: torch.Tensor | None,
    mask: torch.Tensor | None,
    seed: torch.Tensor | None,
    delta: torch.Tensor,
    query_gradient: torch.Tensor,
    key_gradient: torch.Tensor,
    value_gradient: torch.Tensor,
    partials: torch.Tensor | None,
    radius: int,
    dropout: float,
) -> None:
    """The launches of `attention_backward`: operands as kernels read them, then what it writes.

    The gradients' heads lie side by side, their rows anywhere, those of key and value equally far apart. `partials`
    [batch, heads, queries or `band_partials`, 2 * max_distance + 1] come as zeros, None where the table's gradient is
    not wanted; `delta` is room of log_sum_exp's shape.
    """
    batch, num_queries, heads, _ = query.shape
    problem = _Problem(query, key, value, bias_table, radius, query_positions, key_positions, mask, dropout, seed)
    block_q, _, constants, options = problem.options("backward_query")
    launch(
        attention_backward_query_kernel, (-(-num_queries // block_q), heads, batch),
        *problem.operands, output, log_sum_exp, output_gradient, delta, query_gradient, partials,
        *problem.sizes, query_gradient.stride(1), 0 if partials is None else partials.shape[2], partials is not None,
        *constants, **options,
    )  # fmt: skip
    _, block_k, constants, options = problem.options("backward_key")
    launch(
        attention_backward_key_kernel, (-(-key.shape[1] // block_k), key.shape[2], batch),
        *problem.operands, log_sum_exp, output_gradient, delta, key_gradient, value_gradient,
        *problem.sizes, key_gradient.stride(1), *constants, **options,
    )  # fmt: skip


def table_sums_into(partials: torch.Tensor, table_gradient: torch.Tensor) -> None:
    """The launch that sums the `partials` of `attention_backward_into` to the table's gradient, which it writes."""
    batch, heads, rows, width = partials.shape
    launch(
        table_sums_kernel, (-(-width // 32), heads),
        partials, table_gradient, batch, rows, width, heads, 128, 32, num_warps=4,
    )  # fmt: skip
