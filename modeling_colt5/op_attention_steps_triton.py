"""What the attention kernels share: tiles of rows, the bias by distance, and which tiles are near."""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("op_attention_steps_triton needs triton; use kernel_backend='torch' without it") from error

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
def near_range(
    own_positions, other_positions, start, num_own, num_other, radius, max_distance,
    ROUTED: tl.constexpr, BLOCK: tl.constexpr, OTHER_BLOCK: tl.constexpr,
):  # fmt: skip
    """The positions [BLOCK] of a tile of queries or of keys that begins at `start`, and the tiles [begin, end) of the
    other kind that are near: in a band those within the radius, of routed tokens those of distances that differ."""
    rows = start + tl.arange(0, BLOCK)
    if ROUTED:
        first = tl.load(own_positions + start).to(tl.int32)
        last = tl.load(own_positions + tl.minimum(start + BLOCK, num_own) - 1).to(tl.int32)
        begin, end = _near_tiles(other_positions, num_other, first, last, max_distance, OTHER_BLOCK)
        rows = tl.load(own_positions + rows, mask=rows < num_own, other=0).to(tl.int32)
    else:
        begin = tl.maximum(start - radius, 0) // OTHER_BLOCK
        end = tl.cdiv(tl.minimum(start + BLOCK + radius, num_other), OTHER_BLOCK)
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
    """The scores plus the bias of each distance; minus infinity where not valid or out of the band."""
    if not ROUTED:
        valid = valid & (distance <= radius) & (distance >= -radius)
    if ROUTED or WIDE:
        distance = tl.minimum(tl.maximum(distance, -max_distance), max_distance)
    return scores + tl.load(table + max_distance + distance, mask=valid, other=float("-inf"))


@triton.jit
def tile_start(step, near_begin, near_end, NEAR: tl.constexpr, BLOCK: tl.constexpr):
    """Where the tile of a loop's step begins: the far tiles are those before `near_begin` and from `near_end` on."""
    if not NEAR:
        return tl.where(step < near_begin, step, step + near_end - near_begin) * BLOCK
    return (step + near_begin) * BLOCK


@triton.jit
def load_valid(mask, start, length, BLOCK: tl.constexpr):
    """Which of the keys [start, start + BLOCK) exist and are real."""
    keys = start + tl.arange(0, BLOCK)
    valid = keys < length
    if mask is not None:
        valid = tl.load(mask + keys, mask=valid, other=0) != 0
    return valid
