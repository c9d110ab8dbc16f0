"""Triton kernel and launch of band and routed attention, with tile sizes and steps that its gradient shares.

The kernels are one family: with the positions of routed tokens, or without for a band. A band whose radius is the
length, or more, is attention to all keys, of which there may be more or fewer than queries. Where the table is minus
infinity, probabilities and gradients are 0, as they are where the mask is False. Without a table all keys are read,
whatever the radius.

A decoder has few queries and a long memory, which makes few programs. So without a table the keys are split among
more of them, and for the gradients of keys the heads that share these. Each program leaves its part of a sum in fp32,
and a last kernel adds up the parts in their order.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .kernel_backend import INTERPRETED
from .op_dropout_triton import keeps, keys_of_rows
from .run_launch_triton import adjacent, cdiv, launch, next_power_of_2, tl, triton

LOG2_E = tl.constexpr(1.4426950408889634)

# A new length must not mean a new compilation.
UNSPECIALIZED = ["num_queries", "num_keys", "radius", "max_distance", "num_partials", "num_parts", "ahead"]


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
def near_range(
    own_positions, other_positions, start, num_own, num_other, behind, ahead, max_distance,
    ROUTED: tl.constexpr, BLOCK: tl.constexpr, OTHER_BLOCK: tl.constexpr,
):  # fmt: skip
    """The positions [BLOCK] of a tile of queries or of keys that begins at `start`, and the tiles [begin, end) of the
    other kind that are near: in a band those at most so far behind or ahead, of routed tokens those of distances that
    differ."""
    rows = start + tl.arange(0, BLOCK)
    if ROUTED:
        first = tl.load(own_positions + start).to(tl.int32)
        last = tl.load(own_positions + tl.minimum(start + BLOCK, num_own) - 1).to(tl.int32)
        begin, end = _near_tiles(other_positions, num_other, first, last, max_distance, OTHER_BLOCK)
        rows = tl.load(own_positions + rows, mask=rows < num_own, other=0).to(tl.int32)
    else:
        begin = tl.minimum(tl.maximum(start - behind, 0), num_other) // OTHER_BLOCK
        end = tl.cdiv(tl.minimum(start + BLOCK + ahead, num_other), OTHER_BLOCK)
    return rows, begin, end


@triton.jit
def load_rows(base, start, length, stride, HEAD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [start, start + BLOCK) of one head as [BLOCK, BLOCK_D], zeros beyond `length` and HEAD."""
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    # Only the tile's own offset can pass 2^31.
    pointers = base + tl.cast(start, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    inside = (start + rows < length)[:, None]
    if HEAD != BLOCK_D:
        inside &= (columns < HEAD)[None, :]
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_rows(base, tile, start, length, stride, HEAD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    pointers = base + tl.cast(start, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    inside = (start + rows < length)[:, None]
    if HEAD != BLOCK_D:
        inside &= (columns < HEAD)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def add_bias(scores, distance, valid, table, max_distance, radius, ROUTED: tl.constexpr, WIDE: tl.constexpr):
    """The scores plus the bias of each distance, if there is a table; minus infinity where not valid, and with a table
    out of the band."""
    if table is None:
        scores = tl.where(valid, scores, float("-inf"))
    else:
        if not ROUTED:
            valid = valid & (distance <= radius) & (distance >= -radius)
        if ROUTED or WIDE:
            distance = tl.minimum(tl.maximum(distance, -max_distance), max_distance)
        scores += tl.load(table + max_distance + distance, mask=valid, other=float("-inf"))
    return scores


@triton.jit
def tile_start(step, near_begin, near_end, NEAR: tl.constexpr, BLOCK: tl.constexpr):
    """Where the tile of a loop's step begins: the far tiles are those before `near_begin` and from `near_end` on."""
    if not NEAR:
        return tl.where(step < near_begin, step, step + near_end - near_begin) * BLOCK
    return (step + near_begin) * BLOCK


@triton.jit
def tile_and_part(num_parts, SPLIT: tl.constexpr):
    """The tile of a program, and the part of what is summed for it; 0 where nothing is split."""
    tile, part = tl.program_id(0), 0
    if SPLIT:
        tile, part = tile // num_parts, tile % num_parts
    return tile, part


@triton.jit
def share_of(begin, end, part, num_parts):
    """The part of a range [begin, end): all parts are as long, the last ones perhaps shorter or empty."""
    share = tl.cdiv(end - begin, num_parts)
    first = tl.minimum(begin + part * share, end)
    return first, tl.minimum(first + share, end)


@triton.jit
def load_valid(mask, start, length, BLOCK: tl.constexpr):
    """Which of the keys [start, start + BLOCK) exist and are real."""
    keys = start + tl.arange(0, BLOCK)
    valid = keys < length
    if mask is not None:
        valid = tl.load(mask + keys, mask=valid, other=0) != 0
    return valid


@triton.jit
def softmax_step(
    scores, value_tile, row_keys, columns, maximum, total, accumulator,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """An online softmax with one tile of keys more, whose numbers for dropout are `columns`: the maximum and the sum
    of each row so far, and its sum of values."""
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    # A row that has met no real key yet has a maximum of minus infinity, from which itself must not be subtracted.
    finite = tl.where(new_maximum == float("-inf"), 0.0, new_maximum) * LOG2_E
    rescale = tl.exp2(maximum * LOG2_E - finite)
    probabilities = tl.exp2(scores * LOG2_E - finite[:, None])
    total = total * rescale + tl.sum(probabilities, 1)
    if DROPOUT > 0.0:
        probabilities = tl.where(keeps(row_keys, columns[None, :], DROPOUT), probabilities, 0.0)
    accumulator = accumulator * rescale[:, None]
    accumulator = tl.dot(probabilities.to(value_tile.dtype), value_tile, accumulator, input_precision=PRECISION)
    return new_maximum, total, accumulator


@triton.jit
def softmax_end(maximum, total, accumulator, DROPOUT: tl.constexpr):
    """The output and the log-sum-exp of an online softmax. A row without any real key has an output of 0, and
    probabilities of 0 in the backward."""
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    accumulator = accumulator / (total * (1.0 - DROPOUT))[:, None]
    return accumulator, tl.where(empty, float("inf"), maximum + tl.log(total))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_forward_kernel(
    query, key, value, table, query_positions, key_positions, mask, seed, output, log_sum_exp,
    query_stride_b, query_stride_n, query_stride_h,
    key_stride_b, key_stride_n, key_stride_h,
    value_stride_b, value_stride_n, value_stride_h,
    num_queries, num_keys, radius, max_distance, ahead, num_parts, SPLIT: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr,
    ROUTED: tl.constexpr, WIDE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head: output and log-sum-exp, by online softmax over tiles of keys; where these are
    split, those of one part."""
    tile, part = tile_and_part(num_parts, SPLIT)
    start = tile * BLOCK_Q
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    query += batch * query_stride_b + head * query_stride_h
    key += batch * key_stride_b + head // GROUP * key_stride_h
    value += batch * value_stride_b + head // GROUP * value_stride_h
    output += (batch * num_queries * HEADS + head) * HEAD
    log_sum_exp += (batch * HEADS + head) * num_queries
    if table is not None:
        table += head * (2 * max_distance + 1)
    if mask is not None:
        mask += batch * num_keys

    rows = start + tl.arange(0, BLOCK_Q)
    if ROUTED:
        query_positions += batch * num_queries
        key_positions += batch * num_keys
    row_positions, near_begin, near_end = near_range(
        query_positions, key_positions, start, num_queries, num_keys, radius, ahead, max_distance,
        ROUTED, BLOCK_Q, BLOCK_K,
    )  # fmt: skip
    if SPLIT:
        near_begin, near_end = share_of(near_begin, near_end, part, num_parts)
        of_part = tl.cast(part, tl.int64) * tl.num_programs(2) * num_queries * HEADS
        output += of_part * HEAD
        log_sum_exp += of_part

    query_tile = load_rows(query, start, num_queries, query_stride_n, HEAD, BLOCK_Q, BLOCK_D)
    row_keys = None
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
            numbers = key_start + tl.arange(0, BLOCK_K)
            maximum, total, accumulator = softmax_step(
                scores, value_tile, row_keys, numbers, maximum, total, accumulator, DROPOUT, PRECISION
            )

    accumulator, row_lse = softmax_end(maximum, total, accumulator, DROPOUT)
    store_rows(output, accumulator, start, num_queries, HEADS * HEAD, HEAD, BLOCK_Q, BLOCK_D)
    tl.store(log_sum_exp + rows, row_lse, mask=rows < num_queries)


@triton.jit(do_not_specialize=["length", "stride", "num_parts"])
def attention_parts_kernel(
    parts, sums, result, log_sum_exp, length, stride, num_parts,
    HEADS: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of rows of one head: the sum of their parts; with log-sum-exps, the mean by these, and that of all."""
    start = tl.program_id(0) * BLOCK
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    of_part = tl.cast(tl.num_programs(2), tl.int64) * length * HEADS
    parts += (batch * length * HEADS + head) * HEAD
    rows = start + tl.arange(0, BLOCK)
    vector = (batch * HEADS + head) * length + rows
    accumulator = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    if sums is None:
        for part in range(0, num_parts):
            accumulator += load_rows(parts + part * of_part * HEAD, start, length, HEADS * HEAD, HEAD, BLOCK, BLOCK_D)
    else:
        maximum = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for part in range(0, num_parts):
            tile = load_rows(parts + part * of_part * HEAD, start, length, HEADS * HEAD, HEAD, BLOCK, BLOCK_D)
            row_lse = tl.load(sums + part * of_part + vector, mask=rows < length, other=float("inf"))
            # a part without any real key
            row_lse = tl.where(row_lse == float("inf"), float("-inf"), row_lse)
            new_maximum = tl.maximum(maximum, row_lse)
            finite = tl.where(new_maximum == float("-inf"), 0.0, new_maximum) * LOG2_E
            rescale, weight = tl.exp2(maximum * LOG2_E - finite), tl.exp2(row_lse * LOG2_E - finite)
            total = total * rescale + weight
            accumulator = accumulator * rescale[:, None] + tile * weight[:, None]
            maximum = new_maximum
        accumulator, row_lse = softmax_end(maximum, total, accumulator, 0.0)
        tl.store(log_sum_exp + vector, row_lse, mask=rows < length)
    result += batch * length * stride + head * HEAD
    store_rows(result, accumulator, start, length, stride, HEAD, BLOCK, BLOCK_D)


# What is read: all keys without a bias, those of a band, and those of routed tokens.
FULL, BAND, AMONG_ROUTED = "full", "band", "routed"
# A tile has these (queries, keys, warps, stages), by kernel and by what is read; other head sizes and dtypes take
# others below. They are from benchmarks/attention.py --sweep on one H200, those for all keys from a like one over 64
# to 2,048 queries on 512 to 131,072 keys; of two within 5 %, the one with less shared memory was taken, so that
# smaller cards have room.
BLOCKS = {
    ("forward", FULL): (64, 64, 4, 3),
    ("forward", BAND): (64, 64, 4, 3),
    ("forward", AMONG_ROUTED): (64, 128, 4, 2),
    ("backward_query", FULL): (64, 64, 4, 3),
    ("backward_query", BAND): (64, 64, 4, 1),
    ("backward_query", AMONG_ROUTED): (64, 64, 4, 3),
    ("backward_key", FULL): (64, 64, 4, 1),
    ("backward_key", BAND): (64, 64, 4, 1),
    ("backward_key", AMONG_ROUTED): (64, 64, 4, 1),
}

# Sums are split where there would be at most half as many programs as this, which was the best of six numbers in the
# same sweep. It is a constant, and not by the device's number of processors, so that sums are taken in the same order
# on every device.
PROGRAMS = 384
# No part has fewer tiles: adding up takes a launch.
LEAST_TILES = 8
# Nothing has more parts: one program adds up all of a row.
MOST_PARTS = 16

# Heads of more than 64 features take large tiles where a program may have at least this many bytes of shared memory.
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


class Problem:
    """What the three kernels share: operands in the kernels' layout, sizes, and what decides about a kernel's code.

    Rows of query, key and value may lie anywhere, their elements side by side; the rest is contiguous, the table in
    fp32. Without a table and positions all keys are read. `ahead` is as of `attention_into`.
    """

    __slots__ = ("ahead", "code", "kind", "operands", "routed", "sizes")

    def __init__(
        self,
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
        ahead: int | None = None,
    ):
        query, key, value = (part if part.stride(3) == 1 else part.contiguous() for part in (query, key, value))
        _, num_queries, heads, head_size = query.shape
        _, num_keys, kv_heads, _ = key.shape
        self.routed = query_positions is not None and key_positions is not None
        self.kind = AMONG_ROUTED if self.routed else FULL if bias_table is None else BAND
        # a larger one would cut nothing off either, as no two are further apart
        farthest = max(num_queries, num_keys) - 1
        radius = {AMONG_ROUTED: 0, FULL: farthest, BAND: min(radius, farthest)}[self.kind]
        self.ahead = radius if ahead is None else min(ahead, radius)
        bias_table = None if bias_table is None else bias_table.float()
        max_distance = 0 if bias_table is None else bias_table.shape[1] // 2
        rest = map(adjacent, (bias_table, query_positions, key_positions, mask, seed))
        self.operands = (query, key, value, *rest)
        strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3])
        self.sizes = (*strides, num_queries, num_keys, radius, max_distance)
        dtype = query.dtype
        tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
        is_large = _has_large_shared_memory(query.device)
        self.code = (dtype, heads, kv_heads, head_size, self.routed, radius >= max_distance, dropout, tf32, is_large)

    def options(self, kernel: str) -> tuple[int, int, tuple[Any, ...], dict[str, int]]:
        return _launch_options(kernel, BLOCKS[kernel, self.kind], *self.code)


def _multiplied_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that products are taken in: Triton's interpreter would multiply bfloat16 as if its bits were
    integers."""
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype


def in_multiplied_dtype(first_result: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a launch, whose arguments are results from `first_result` on, work on copies in `_multiplied_dtype`."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def copied(*arguments: Any) -> None:
            states = arguments[0]
            copies = [
                part.to(_multiplied_dtype(states.dtype))
                if isinstance(part, Tensor) and part.dtype == states.dtype
                else part
                for part in arguments
            ]
            function(*copies)
            for result, copy in zip(arguments[first_result:], copies[first_result:], strict=True):
                if result is not copy:
                    result.copy_(copy)

        return copied if INTERPRETED else function

    return decorate


def partial_sums(num_queries: int, head_size: int, dtype: torch.dtype, device: torch.device, routed: bool) -> int:
    """How many sums of the table's gradient the backward leaves of each head: of a band one of each block of queries,
    of routed attention one of each query."""
    if routed:
        return num_queries
    return cdiv(num_queries, _blocks("backward_query", BAND, 1, 1, head_size, dtype, device)[0])


def _blocks(
    kernel: str, kind: str, heads: int, kv_heads: int, head_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[int, int]:
    """Queries and keys of a tile."""
    code = (_multiplied_dtype(dtype), heads, kv_heads, head_size, kind == AMONG_ROUTED, True, 0.0, False)
    return _launch_options(kernel, BLOCKS[kernel, kind], *code, _has_large_shared_memory(device))[:2]


def number_of_parts(kernel: str, query: Tensor, key: Tensor) -> int:
    """In how many parts a kernel's sums are split without a table: over keys, in "backward_key" over the heads that
    share them."""
    batch, num_queries, heads, head_size = query.shape
    num_keys, kv_heads = key.shape[1:3]
    block_q, block_k = _blocks(kernel, FULL, heads, kv_heads, head_size, query.dtype, query.device)
    query_tiles, key_tiles, group = cdiv(num_queries, block_q), cdiv(num_keys, block_k), heads // kv_heads
    if kernel == "backward_key":
        most, tiles, programs = group, group * query_tiles, key_tiles * kv_heads * batch
    else:
        most, tiles, programs = key_tiles, key_tiles, query_tiles * heads * batch
    return max(1, min(most, tiles // LEAST_TILES, PROGRAMS // programs, MOST_PARTS))


def room_of_parts(query: Tensor, key: Tensor, backward: bool) -> int:
    """How many fp32 numbers the parts of attention without a table take, forward or backward; 0 where nothing is
    split."""
    kernels = ("backward_query", "backward_key") if backward else ("forward",)
    parts = {kernel: number_of_parts(kernel, query, key) for kernel in kernels}
    sizes = {
        "forward": query.numel() + query.numel() // query.shape[-1],
        "backward_query": query.numel(),
        "backward_key": 2 * key.numel(),
    }
    return max(count * sizes[kernel] if count > 1 else 0 for kernel, count in parts.items())


def launch_parts(
    parts: Tensor, sums: Tensor | None, result: Tensor, log_sum_exp: Tensor | None, num_parts: int
) -> None:
    """Add up parts, fp32 [parts, batch, length, heads * d_kv], to the result [batch, length, heads, d_kv], whose rows
    may lie anywhere. With log-sum-exps, fp32 [parts, batch, heads, length], it is the mean by these, and theirs is
    written too."""
    batch, length, heads, head_size = result.shape
    launch(
        attention_parts_kernel, (cdiv(length, 32), heads, batch),
        parts, sums, result, log_sum_exp, length, result.stride(1), num_parts,
        heads, head_size, max(16, next_power_of_2(head_size)), 32, num_warps=4,
    )  # fmt: skip


@in_multiplied_dtype(first_result=10)
def attention_into(
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
    room: Tensor | None = None,
    ahead: int | None = None,
) -> None:
    """Write `attention_reference` of op_attention.py, of a text, to `output` [batch, queries, heads, d_kv],
    contiguous, and the log-sum-exp of the scores, fp32 [batch, heads, queries].

    `room` is for `room_of_parts`; None takes some. Keys of a band more than `ahead` after their query need not be
    looked at, since their bias is minus infinity; None where it is not.
    """
    batch, num_queries, heads, _ = query.shape
    if query.numel() == 0 or key.numel() == 0:
        output.zero_()
        log_sum_exp.zero_()
        return
    rest = (query_positions, key_positions, mask, dropout, seed, ahead)
    problem = Problem(query, key, value, bias_table, radius, *rest)
    num_parts = number_of_parts("forward", query, key) if problem.kind == FULL else 1
    parts, sums = output, log_sum_exp
    if num_parts > 1:
        if room is None:
            room = torch.empty(room_of_parts(query, key, False), dtype=torch.float32, device=query.device)
        parts, sums = room, room[num_parts * query.numel() :]
    block_q, _, constants, options = problem.options("forward")
    launch(
        attention_forward_kernel, (cdiv(num_queries, block_q) * num_parts, heads, batch),
        *problem.operands, parts, sums,
        *problem.sizes, problem.ahead, num_parts, num_parts > 1, *constants, **options,
    )  # fmt: skip
    if num_parts > 1:
        launch_parts(parts, sums, output, log_sum_exp, num_parts)
