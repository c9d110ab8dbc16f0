"""Triton kernels and launches of the attention of one new token in each row.

A row alone has few queries and many keys. So keys are split among programs, each of which leaves the sum of its values
by their weights, the sum of these and the largest score; a second kernel adds up the parts in order. The token of a
causally routed layer reads as many keys however long the text is, and each head of each row is one program.
"""

import torch
from torch import Tensor

from .op_attention_triton import in_multiplied_dtype
from .run_launch_triton import cdiv, launch, next_power_of_2, tl, triton

LOG2_E = tl.constexpr(1.4426950408889634)
# The score of a key that a mask hides. It is finite, so that a row of hidden keys alone has the mean of all values, as
# where attention is written out, and so small that beside any other score its weight is 0.
HIDDEN = tl.constexpr(-1e30)

# Keys are split for about so many programs in all: a constant and not the device's number of processors, so that sums
# are taken in the same order on every device. The parts of a row are at most this many too.
PROGRAMS = 256
# No part has less room than this, and what has no more than twice as much is not split: adding up takes a launch.
LEAST_KEYS = 128
# parts that are added up in one step
BLOCK_PARTS = 32


@triton.jit(do_not_specialize=["room", "max_distance"])
def step_attention_kernel(
    query, new_key, new_value, table, mask, length, key, value, output, sums, room, max_distance,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One part of the keys of one row and key/value head, for all heads that share it: program (row and key/value
    head, part). The output, or where the keys are split the part's values, and its sum and maximum."""
    own = tl.program_id(0).to(tl.int64)
    part, parts = tl.program_id(1), tl.num_programs(1)
    key += own * room * HEAD
    value += own * room * HEAD
    keys = room
    if length is not None:
        keys = tl.load(length)
    # All parts have as many keys, the last ones perhaps fewer or none.
    share = tl.cdiv(tl.cdiv(keys, parts), BLOCK_K) * BLOCK_K
    begin = part * share
    end = tl.minimum(begin + share, keys)
    # The new key is not where it belongs yet, and other programs of this row do not read it.
    old = keys
    if new_key is not None:
        old = keys - 1

    heads, columns = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    inside = (heads < GROUP)[:, None] & (columns < HEAD)[None, :]
    rows = own * GROUP + heads
    query_tile = tl.load(query + rows[:, None] * HEAD + columns[None, :], mask=inside, other=0.0)
    if new_key is not None:
        key_row = tl.load(new_key + own * HEAD + columns, mask=columns < HEAD, other=0.0)
        value_row = tl.load(new_value + own * HEAD + columns, mask=columns < HEAD, other=0.0)
        # none where the new key belongs to another part
        is_here = columns < tl.where((begin <= old) & (old < end), HEAD, 0)
        place = tl.cast(old, tl.int64) * HEAD + columns
        tl.store(key + place, key_row, mask=is_here)
        tl.store(value + place, value_row, mask=is_here)
    if table is not None:
        table += ((own % GROUPS) * GROUP + heads) * (2 * max_distance + 1) + max_distance
    if mask is not None:
        mask += own // GROUPS * keys

    maximum = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    accumulator = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_K):
        places = start + tl.arange(0, BLOCK_K)
        offsets = tl.cast(start, tl.int64) * HEAD + tl.arange(0, BLOCK_K)[:, None] * HEAD + columns[None, :]
        is_old = (places < tl.minimum(old, end))[:, None]
        if HEAD != BLOCK_D:
            is_old &= (columns < HEAD)[None, :]
        key_tile = tl.load(key + offsets, mask=is_old, other=0.0)
        value_tile = tl.load(value + offsets, mask=is_old, other=0.0)
        if new_key is not None:
            is_new = (places == old)[:, None]
            key_tile = tl.where(is_new, key_row[None, :], key_tile)
            value_tile = tl.where(is_new, value_row[None, :], value_tile)
        scores = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION)
        exists = places < end
        if table is not None:
            distance = tl.maximum(places - (keys - 1), -max_distance)
            scores += tl.load(
                table[:, None] + distance[None, :], mask=(heads < GROUP)[:, None] & exists[None, :], other=0.0
            )
        if mask is not None:
            is_read = tl.load(mask + places, mask=exists, other=0) != 0
            scores = tl.where(is_read[None, :], scores, HIDDEN)
        scores = tl.where(exists[None, :], scores, float("-inf"))
        # Every tile has a key that exists, so that the maximum is finite from the first one on.
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        rescale = tl.exp2((maximum - new_maximum) * LOG2_E)
        weights = tl.exp2((scores - new_maximum[:, None]) * LOG2_E)
        total = total * rescale + tl.sum(weights, 1)
        accumulator = tl.dot(
            weights.to(value_tile.dtype), value_tile, accumulator * rescale[:, None], input_precision=PRECISION
        )
        maximum = new_maximum
    if SPLIT:
        rows = rows * parts + part
        tl.store(sums + 2 * rows, total, mask=heads < GROUP)
        tl.store(sums + 2 * rows + 1, maximum, mask=heads < GROUP)
    else:
        accumulator = accumulator / total[:, None]
    tl.store(output + rows[:, None] * HEAD + columns[None, :], accumulator.to(output.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["parts"])
def add_parts_kernel(
    values, sums, output, parts,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The parts of one row and head, added up in order."""
    row = tl.program_id(0).to(tl.int64)
    values += row * parts * HEAD
    sums += row * parts * 2
    columns = tl.arange(0, BLOCK_D)
    every = tl.arange(0, MOST)
    largest = tl.max(tl.load(sums + 2 * every + 1, mask=every < parts, other=float("-inf")), 0)
    total = tl.zeros([BLOCK], tl.float32)
    accumulator = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, parts, BLOCK):
        some = start + tl.arange(0, BLOCK)
        exists = some < parts
        # A part without keys has the maximum of minus infinity, and values of 0.
        maximum = tl.load(sums + 2 * some + 1, mask=exists, other=float("-inf"))
        scale = tl.exp2((maximum - largest) * LOG2_E)
        total += tl.load(sums + 2 * some, mask=exists, other=0.0) * scale
        tile = tl.load(
            values + some[:, None] * HEAD + columns[None, :],
            mask=exists[:, None] & (columns < HEAD)[None, :],
            other=0.0,
        )
        accumulator += tl.sum(tile * scale[:, None], 0)
    result = accumulator / tl.sum(total, 0)
    tl.store(output + row * HEAD + columns, result.to(output.dtype.element_ty), mask=columns < HEAD)


@triton.jit
def add_tile(query_row, key_tile, value_tile, bias, exists, maximum, total, accumulator):
    """The attention of one query with the keys of a tile added; all in fp32, of which some key existed by now."""
    scores = tl.sum(query_row[None, :] * key_tile, 1) + bias
    scores = tl.where(exists, scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, 0))
    rescale = tl.exp2((maximum - new_maximum) * LOG2_E)
    weights = tl.exp2((scores - new_maximum) * LOG2_E)
    total = total * rescale + tl.sum(weights, 0)
    return new_maximum, total, accumulator * rescale + tl.sum(weights[:, None] * value_tile, 0)


@triton.jit(do_not_specialize=["size", "radius", "max_distance"])
def local_step_attention_kernel(
    query, new_key, new_value, table, past, total, key_ring, value_ring, output, size, radius, max_distance,
    HEADS: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (row, head): its new token's attention to itself and the `radius` tokens before."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rank = tl.load(past + row).to(tl.int32)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < HEAD
    own = (row * HEADS + head) * HEAD + columns
    query_row = tl.load(query + own, mask=inside, other=0.0).to(tl.float32)
    key_row = tl.load(new_key + own, mask=inside, other=0.0)
    value_row = tl.load(new_value + own, mask=inside, other=0.0)
    table += head * (2 * max_distance + 1) + max_distance
    key_ring += (row * size * HEADS + head) * HEAD
    value_ring += (row * size * HEADS + head) * HEAD

    accumulator = value_row.to(tl.float32)
    maximum = tl.sum(query_row * key_row.to(tl.float32), 0) + tl.load(table)
    weight = 1.0
    for start in range(1, tl.minimum(radius, rank) + 1, BLOCK_K):
        back = start + tl.arange(0, BLOCK_K)
        exists = (back <= radius) & (back <= rank)
        places = ((rank + size - back) % size).to(tl.int64) * (HEADS * HEAD)
        offsets = places[:, None] + columns[None, :]
        is_read = exists[:, None] & inside[None, :]
        key_tile = tl.load(key_ring + offsets, mask=is_read, other=0.0).to(tl.float32)
        value_tile = tl.load(value_ring + offsets, mask=is_read, other=0.0).to(tl.float32)
        bias = tl.load(table - tl.minimum(back, max_distance), mask=exists, other=0.0)
        maximum, weight, accumulator = add_tile(
            query_row, key_tile, value_tile, bias, exists, maximum, weight, accumulator
        )
    tl.store(output + own, (accumulator / weight).to(output.dtype.element_ty), mask=inside)
    # The slot's last token is no longer read.
    is_kept = columns < tl.where(tl.load(total + row).to(tl.int32) > rank, HEAD, 0)
    place = (rank % size).to(tl.int64) * (HEADS * HEAD) + columns
    tl.store(key_ring + place, key_row, mask=is_kept)
    tl.store(value_ring + place, value_row, mask=is_kept)


@triton.jit(do_not_specialize=["ring_size", "size", "max_distance"])
def pool_step_attention_kernel(
    query, new_key, new_value, table, past, total, valid, key_ring, value_ring,
    pool_key, pool_value, pool_rank, pool_weight, pool_valid, output, ring_size, size, max_distance,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (row, head): its new token's attention to the pool of its window, where it is routed."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    HEADS: tl.constexpr = GROUPS * GROUP
    rank = tl.load(past + row).to(tl.int32)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < HEAD
    own = (row * HEADS + head) * HEAD + columns
    is_kept = columns < tl.where(tl.load(total + row).to(tl.int32) > rank, HEAD, 0)
    place = ((row * ring_size + rank % ring_size) * HEADS + head) * HEAD + columns
    tl.store(key_ring + place, tl.load(new_key + own, mask=inside, other=0.0), mask=is_kept)
    tl.store(value_ring + place, tl.load(new_value + own, mask=inside, other=0.0), mask=is_kept)
    if tl.load(valid + row).to(tl.int32) != 0:
        query_row = tl.load(query + own, mask=inside, other=0.0).to(tl.float32)
        table += head * (2 * max_distance + 1) + max_distance
        # of the two pools that a row has for each group the first
        first = (row * 2 * GROUPS + head // GROUP) * size
        pool_rank += first
        pool_weight += first
        pool_valid += first
        pool_key += (first * GROUP + head % GROUP) * HEAD
        pool_value += (first * GROUP + head % GROUP) * HEAD
        maximum = float("-inf")
        weight = 0.0
        accumulator = tl.zeros([BLOCK_D], tl.float32)
        for start in range(0, size, BLOCK_K):
            slots = start + tl.arange(0, BLOCK_K)
            exists = slots < size
            exists &= tl.load(pool_valid + slots, mask=exists, other=0).to(tl.int32) != 0
            scale = tl.load(pool_weight + slots, mask=exists, other=0.0)
            distance = (tl.load(pool_rank + slots, mask=exists, other=0) - rank).to(tl.int32)
            bias = tl.load(table + tl.maximum(distance, -max_distance), mask=exists, other=0.0)
            offsets = slots.to(tl.int64)[:, None] * (GROUP * HEAD) + columns[None, :]
            is_read = exists[:, None] & inside[None, :]
            key_tile = tl.load(pool_key + offsets, mask=is_read, other=0.0)
            value_tile = tl.load(pool_value + offsets, mask=is_read, other=0.0)
            # as `gather_pools` of op_pools.py rounds them
            key_tile = (key_tile.to(tl.float32) * scale[:, None]).to(key_tile.dtype).to(tl.float32)
            value_tile = (value_tile.to(tl.float32) * scale[:, None]).to(value_tile.dtype).to(tl.float32)
            maximum, weight, accumulator = add_tile(
                query_row, key_tile, value_tile, bias, exists, maximum, weight, accumulator
            )
        tl.store(output + own, (accumulator / weight).to(output.dtype.element_ty), mask=inside)


def number_of_parts(rows: int, room: int) -> int:
    """In how many parts keys are split.

    Args:
        rows: of the batch, times key/value heads.
        room: for how many keys.
    """
    if room <= 2 * LEAST_KEYS:
        return 1
    return max(1, min(cdiv(PROGRAMS, rows), cdiv(room, LEAST_KEYS)))


@in_multiplied_dtype(first_result=6)
def step_attention_into(
    query: Tensor,
    new_key: Tensor | None,
    new_value: Tensor | None,
    bias_table: Tensor | None,
    mask: Tensor | None,
    length: Tensor | None,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    values: Tensor | None = None,
    sums: Tensor | None = None,
) -> None:
    """Write the attention of one query in each row to `output`, and what is new to `key` and `value`; T5's scale of 1.

    Args, of which tensors are contiguous:
        query: [rows, heads * d_kv].
        new_key, new_value: [rows, key/value heads * d_kv], of the token itself, which are written behind the others;
            None where the token is none of those that it reads.
        bias_table: fp32 [heads, 2 * max_distance + 1], as of `bias_by_position` of op_attention.py, for a query at the
            last key's position; None for no bias.
        mask: bool [rows, keys], True for keys to read; None for all. A row without any reads the mean of all values.
        length: int32 [1], the number of keys, the new one included; None where keys fill their tensor.
        key, value: [rows, key/value heads, room, d_kv], of which the first keys are read; the number of heads is a
            multiple of theirs.
        output: [rows, heads * d_kv].
        values, sums: fp32 [rows, heads, parts, d_kv] and [rows, heads, parts, 2], room for the parts of
            `number_of_parts`; None where there is one.
    """
    rows, groups, room, d_kv = key.shape
    group = query.shape[1] // (groups * d_kv)
    parts = 1 if values is None else values.shape[2]
    max_distance = 0 if bias_table is None else bias_table.shape[1] // 2
    is_tf32 = query.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    block_d = max(16, next_power_of_2(d_kv))
    # keys of a tile, so that its memory suffices on every card
    block_k = 64 if block_d * query.itemsize <= 256 else 32
    launch(
        step_attention_kernel, (rows * groups, parts),
        query, new_key, new_value, bias_table, mask, length, key, value, output if values is None else values, sums,
        room, max_distance, groups, group, d_kv, max(16, next_power_of_2(group)), block_d, values is not None,
        "tf32" if is_tf32 else "ieee", block_k, num_warps=4, num_stages=2,
    )  # fmt: skip
    if values is not None:
        launch(
            add_parts_kernel, (rows * groups * group,),
            values, sums, output, parts, d_kv, block_d, PROGRAMS, BLOCK_PARTS, num_warps=4,
        )  # fmt: skip


def _tile(d_kv: int) -> tuple[int, int]:
    """Features and keys of a tile of one query's attention, whose keys and values are in registers."""
    block_d = max(16, next_power_of_2(d_kv))
    return block_d, 4096 // block_d


def local_step_attention_into(
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

    Args, of which tensors are contiguous:
        query, new_key, new_value: [rows, heads * d_kv].
        bias_table: fp32 [heads, 2 * max_distance + 1], as of `bias_by_position`.
        past: int64 [rows], real tokens before the new one.
        total: int64 [rows], these and the new one where it is real.
        key_ring, value_ring: [rows, R, heads, d_kv] with R above the radius; token `rank` is in slot `rank % R`.
        radius: how far it looks back.
        output: [rows, heads * d_kv].
    """
    rows, size, heads, d_kv = key_ring.shape
    launch(
        local_step_attention_kernel, (rows, heads),
        query, new_key, new_value, bias_table, past, total, key_ring, value_ring, output,
        size, radius, bias_table.shape[1] // 2, heads, d_kv, *_tile(d_kv), num_warps=4,
    )  # fmt: skip


def pool_step_attention_into(
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

    Args, of which tensors are contiguous:
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
    rows, _, groups, size, group, d_kv = pool_key.shape
    launch(
        pool_step_attention_kernel, (rows, groups * group),
        query, new_key, new_value, bias_table, past, total, valid, key_ring, value_ring,
        pool_key, pool_value, pool_rank, pool_weight, pool_valid, output,
        key_ring.shape[1], size, bias_table.shape[1] // 2, groups, group, d_kv, *_tile(d_kv), num_warps=4,
    )  # fmt: skip
