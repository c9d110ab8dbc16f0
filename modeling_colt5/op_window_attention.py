"""Attention in two dimensions, in PyTorch: a square window around each place of a grid, and among routed places.

A grid is cut into square blocks with a border around each, so that memory is linear in the number of places. The bias
goes by the offset of two places.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .op_attention import Attend, sdpa_attend

# The side of a block of queries. With windows that reach further than that, blocks are twice as long: a border would
# otherwise be many times as large as what it surrounds.
BLOCK_SIDE = 8

# The rows and the columns of a number of places, integers of one shape.
Places = tuple[Tensor, Tensor]


def places_of(indices: Tensor, width: int) -> Places:
    """Rows and columns of places that are counted row by row in a grid of this width."""
    return indices // width, indices % width


def bias_by_offset(bias_table: Tensor, query_places: Places, key_places: Places) -> Tensor:
    """The bias of each query and key, read from a table by their offset in two dimensions.

    Args:
        bias_table: [heads, 2 * max_distance + 1, 2 * max_distance + 1]: the entry max_distance + d of a dimension is
            for a key that is d rows, or columns, after its query; larger distances have that of the largest.
        query_places: integers [..., queries] each.
        key_places: integers [..., keys] each.

    Returns:
        [..., heads, queries, keys] in the table's dtype.
    """
    side = bias_table.shape[-1]
    most = (side - 1) // 2
    rows, columns = (
        (key[..., None, :] - query[..., :, None]).clamp(-most, most) + most
        for query, key in zip(query_places, key_places, strict=True)
    )
    # One row of all heads for each pair: its gradient is a sum of rows.
    return F.embedding(rows * side + columns, bias_table.flatten(1).transpose(0, 1)).movedim(-1, -3)


def block_side(radius: int, height: int, width: int) -> int:
    """The side of the blocks of queries that a grid is cut into."""
    return min(BLOCK_SIDE if radius <= BLOCK_SIDE else 2 * BLOCK_SIDE, max(height, width))


def _windows(states: Tensor, window: int, step: int) -> Tensor:
    """[batch, height, width, ...] → [batch, blocks down, blocks across, ..., window, window], overlapping."""
    return states.unfold(1, window, step).unfold(2, window, step)


def window_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias_table: Tensor,
    radius: int,
    mask: Tensor | None = None,
    attend: Attend = sdpa_attend,
) -> tuple[Tensor, Tensor | None]:
    """Each place attends to the real places at most `radius` rows and `radius` columns away.

    Args:
        query: [batch, height, width, heads, d_kv].
        key, value: [batch, height, width, key/value heads, d_kv]; the number of heads is a multiple of theirs.
        bias_table: [heads, 2 * max_distance + 1, 2 * max_distance + 1], added to the scores; see `bias_by_offset`.
        radius: places to each side, ≥ 0.
        mask: bool [batch, height, width], True for real places; None for all. A place with no real one in its window
            gets some finite output.
        attend: the dense attention that each block goes through.

    Returns:
        The output [batch, height, width, heads, d_kv] in the query's dtype and, where there are weights, these [batch,
        heads, height, width, 2 * r + 1, 2 * r + 1] with r = min(radius, max(height, width) - 1): the entry r + d of
        the last dimensions is for the place d rows, or columns, away.
    """
    batch, height, width = query.shape[:3]
    radius = min(radius, max(height, width) - 1)
    block = block_side(radius, height, width)
    window = block + 2 * radius
    below, beside = -height % block, -width % block
    down, across = (height + below) // block, (width + beside) // block
    border = (radius, radius + beside, radius, radius + below)

    query = F.pad(query, (0, 0, 0, 0, 0, beside, 0, below))
    query = rearrange(query, "b (y i) (x j) h d -> (b y x) h (i j) d", i=block, j=block)
    key, value = (
        rearrange(_windows(F.pad(states, (0, 0, 0, 0, *border)), window, block), "b y x h d i j -> (b y x) h (i j) d")
        for states in (key, value)
    )
    # Places count from a window's first key; its queries begin `radius` behind it.
    query_places = places_of(torch.arange(block * block, device=query.device), block)
    query_places = (query_places[0] + radius, query_places[1] + radius)
    key_places = places_of(torch.arange(window * window, device=query.device), window)
    near_rows, near_columns = (
        (ours[None, :] - theirs[:, None]).abs() <= radius
        for theirs, ours in zip(query_places, key_places, strict=True)
    )
    bias = bias_by_offset(bias_table, query_places, key_places)[None]
    real = query.new_ones(batch, height, width, dtype=torch.bool) if mask is None else mask
    real = rearrange(_windows(F.pad(real, border), window, block), "b y x i j -> (b y x) 1 1 (i j)")

    output, weights = attend(query, key, value, bias, real & near_rows & near_columns)
    if weights is not None:
        # Only the weights of each query's own window are returned.
        reach = torch.arange(2 * radius + 1, device=query.device)
        rows = query_places[0][:, None, None] - radius + reach[:, None]
        columns = query_places[1][:, None, None] - radius + reach
        own = (rows * window + columns).flatten(1).expand(*weights.shape[:2], -1, -1)
        weights = rearrange(
            weights.gather(-1, own),
            "(b y x) h (i j) (k l) -> b h (y i) (x j) k l",
            **{"y": down, "x": across, "i": block, "k": 2 * radius + 1},
        )[:, :, :height, :width]
    output = rearrange(output, "(b y x) (i j) h d -> b (y i) (x j) h d", y=down, x=across, i=block)
    return output[:, :height, :width], weights


def patch_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias_table: Tensor,
    query_places: Places,
    key_places: Places,
    key_mask: Tensor | None = None,
    attend: Attend = sdpa_attend,
) -> tuple[Tensor, Tensor | None]:
    """Routed queries attend to all routed keys/values, wherever in the grid they are.

    Args:
        query: [batch, queries, heads, d_kv].
        key, value: [batch, keys, key/value heads, d_kv]; the number of heads is a multiple of theirs.
        bias_table: [heads, 2 * max_distance + 1, 2 * max_distance + 1], added to the scores; see `bias_by_offset`.
        query_places: int64 [batch, queries] each, in the grid that the places were routed out of.
        key_places: int64 [batch, keys] each, likewise.
        key_mask: bool [batch, keys], True for used slots; None for all.
        attend: the dense attention to use.

    Returns:
        The output [batch, queries, heads, d_kv] in the query's dtype and, where `attend` gives weights, the weights
        [batch, heads, queries, keys].
    """
    bias = bias_by_offset(bias_table, query_places, key_places)
    mask = None if key_mask is None else key_mask[:, None, None, :]
    return attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), bias, mask)
