"""Triton kernel and launch of attention in two dimensions, with steps that its gradient shares.

The kernels are one family: with the places of routed tokens, or without for a square window around each place of a
grid. Tile sizes are those of one dimension.
"""

from torch import Tensor

from .op_attention_triton import UNSPECIALIZED, Problem, in_multiplied_dtype, softmax_end, softmax_step
from .op_dropout_triton import keys_of_rows
from .run_launch_triton import cdiv, launch, tl, triton

# A block of a window's queries, or of its keys, has so many columns, and as many rows as make a tile.
COLUMNS = 8
BLOCK_COLUMNS = tl.constexpr(COLUMNS)

UNSPECIALIZED_IN_GRIDS = [*UNSPECIALIZED, "width", "reach", "copies", "queries"]


@triton.jit
def frame_of(num_places, width, radius, ROUTED: tl.constexpr, BLOCK: tl.constexpr):
    """Where the tokens are that a program reads: first row and column, columns, and their number.

    Routed tokens are all of them, one after the other. Of a grid they are the places at most `radius` away from the
    program's own block, row by row.
    """
    first_row, first_column, columns, count = 0, 0, 1, num_places
    if not ROUTED:
        height = num_places // width
        across = tl.cdiv(width, BLOCK_COLUMNS)
        top = tl.program_id(0) // across * (BLOCK // BLOCK_COLUMNS)
        left = tl.program_id(0) % across * BLOCK_COLUMNS
        first_row = tl.maximum(top - radius, 0)
        first_column = tl.maximum(left - radius, 0)
        columns = tl.minimum(left + BLOCK_COLUMNS + radius, width) - first_column
        count = (tl.minimum(top + BLOCK // BLOCK_COLUMNS + radius, height) - first_row) * columns
    return first_row, first_column, columns, count


@triton.jit
def tile_of(
    places, start, first_row, first_column, columns, count, width, ROUTED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The tokens [start, start + BLOCK) of a frame: their numbers, whether they exist, their rows and columns."""
    number = start + tl.arange(0, BLOCK)
    exists = number < count
    if ROUTED:
        place = tl.load(places + number, mask=exists, other=0).to(tl.int32)
        row, column = place // width, place % width
    else:
        row, column = first_row + number // columns, first_column + number % columns
        number = row * width + column
    return number, exists, row, column


@triton.jit
def own_tile(places, num_places, width, ROUTED: tl.constexpr, BLOCK: tl.constexpr):
    """The program's own tokens, as `tile_of` has them."""
    first_row, first_column, columns, count = frame_of(num_places, width, 0, ROUTED, BLOCK)
    start = tl.program_id(0) * BLOCK if ROUTED else 0
    return tile_of(places, start, first_row, first_column, columns, count, width, ROUTED, BLOCK)


@triton.jit
def load_tokens(base, number, exists, stride, HEAD: tl.constexpr, BLOCK_D: tl.constexpr):
    """One head of these tokens as [BLOCK, BLOCK_D], zeros where they do not exist and beyond HEAD."""
    features = tl.arange(0, BLOCK_D)
    inside = exists[:, None] & (features < HEAD)[None, :]
    return tl.load(base + number.to(tl.int64)[:, None] * stride + features[None, :], mask=inside, other=0.0)


@triton.jit
def store_tokens(base, tile, number, exists, stride, HEAD: tl.constexpr, BLOCK_D: tl.constexpr):
    features = tl.arange(0, BLOCK_D)
    inside = exists[:, None] & (features < HEAD)[None, :]
    pointers = base + number.to(tl.int64)[:, None] * stride + features[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def real_tokens(mask, number, exists):
    """Which tokens exist and are real."""
    if mask is not None:
        exists = tl.load(mask + number, mask=exists, other=0) != 0
    return exists


@triton.jit
def seen(down, across, valid, radius, ROUTED: tl.constexpr):
    """Which pairs of these offsets belong together: in a grid those within the radius."""
    if not ROUTED:
        valid = valid & (tl.abs(down) <= radius) & (tl.abs(across) <= radius)
    return valid


@triton.jit
def entry_of(down, across, most, CLAMPED: tl.constexpr):
    """Which entry of a table [2 * most + 1, 2 * most + 1] these offsets have; if not clamped, those up to `most`."""
    if CLAMPED:
        down = tl.minimum(tl.maximum(down, -most), most)
        across = tl.minimum(tl.maximum(across, -most), most)
    return (most + down) * (2 * most + 1) + most + across


@triton.jit(do_not_specialize=UNSPECIALIZED_IN_GRIDS)
def grid_attention_forward_kernel(
    query, key, value, table, query_places, key_places, mask, seed, output, log_sum_exp,
    query_stride_b, query_stride_n, query_stride_h,
    key_stride_b, key_stride_n, key_stride_h,
    value_stride_b, value_stride_n, value_stride_h,
    num_queries, num_keys, radius, max_distance, width,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr,
    ROUTED: tl.constexpr, WIDE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head: output and log-sum-exp, by online softmax over tiles of keys."""
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    query += batch * query_stride_b + head * query_stride_h
    key += batch * key_stride_b + head // GROUP * key_stride_h
    value += batch * value_stride_b + head // GROUP * value_stride_h
    output += (batch * num_queries * HEADS + head) * HEAD
    log_sum_exp += (batch * HEADS + head) * num_queries
    table += head * (2 * max_distance + 1) * (2 * max_distance + 1)
    if mask is not None:
        mask += batch * num_keys
    if ROUTED:
        query_places += batch * num_queries
        key_places += batch * num_keys

    own, in_own, row, column = own_tile(query_places, num_queries, width, ROUTED, BLOCK_Q)
    query_tile = load_tokens(query, own, in_own, query_stride_n, HEAD, BLOCK_D)
    row_keys = None
    if DROPOUT > 0.0:
        row_keys = keys_of_rows(seed, batch * HEADS + head, own)[:, None]
    maximum = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
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
        maximum, total, accumulator = softmax_step(
            scores, value_tile, row_keys, number, maximum, total, accumulator, DROPOUT, PRECISION
        )

    accumulator, row_lse = softmax_end(maximum, total, accumulator, DROPOUT)
    store_tokens(output, accumulator, own, in_own, HEADS * HEAD, HEAD, BLOCK_D)
    tl.store(log_sum_exp + own, row_lse, mask=in_own)


def num_blocks(num_places: int, width: int, block: int, routed: bool) -> int:
    """How many programs share the tokens: tiles of routed ones, blocks of a grid."""
    if routed:
        return cdiv(num_places, block)
    return cdiv(num_places // width, block // COLUMNS) * cdiv(width, COLUMNS)


@in_multiplied_dtype(first_result=11)
def grid_attention_into(
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
) -> None:
    """Write `attention_reference` of op_attention.py, of a grid, to `output` [batch, queries, heads, d_kv],
    contiguous, and the log-sum-exp of the scores, fp32 [batch, heads, queries]."""
    batch, num_queries, heads, _ = query.shape
    if query.numel() == 0 or key.numel() == 0:
        output.zero_()
        log_sum_exp.zero_()
        return
    problem = Problem(query, key, value, bias_table, radius, query_positions, key_positions, mask, dropout, seed)
    block_q, _, constants, options = problem.options("forward")
    launch(
        grid_attention_forward_kernel, (num_blocks(num_queries, width, block_q, problem.routed), heads, batch),
        *problem.operands, output, log_sum_exp,
        *problem.sizes, width, *constants, **options,
    )  # fmt: skip
