"""Band and routed attention forward as one Triton kernel, with positions of routed tokens or without for a band."""

from .op_attention_steps_triton import (
    LOG2_E,
    UNSPECIALIZED,
    add_bias,
    load_rows,
    load_valid,
    near_range,
    store_rows,
    tile_start,
)
from .op_dropout_steps_triton import keeps, keys_of_rows

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("op_attention_forward_triton needs triton; use kernel_backend='torch' without it") from error


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
    row_positions, near_begin, near_end = near_range(
        query_positions, key_positions, start, num_queries, num_keys, radius, max_distance, ROUTED, BLOCK_Q, BLOCK_K
    )

    query_tile = load_rows(query, start, num_queries, query_stride_n, HEAD, BLOCK_Q, BLOCK_D)
    if DROPOUT > 0.0:
        row_keys = keys_of_rows(seed, batch * HEADS + head, rows)[:, None]
    maximum = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    accumulator = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    # The first pass takes the routed keys far from these queries, whose bias is one of the table's two ends.
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
                columns = key_start + tl.arange(0, BLOCK_K)
                if ROUTED:
                    columns = tl.load(key_positions + columns, mask=columns < num_keys, other=0).to(tl.int32)
                distance = columns[None, :] - row_positions[:, None]
                scores = add_bias(scores, distance, valid, table, max_distance, radius, ROUTED, WIDE)
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
    store_rows(output, accumulator, start, num_queries, HEADS * HEAD, HEAD, BLOCK_Q, BLOCK_D)
    tl.store(log_sum_exp + rows, row_lse, mask=rows < num_queries)
