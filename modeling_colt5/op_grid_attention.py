"""Attention in two dimensions: a square window around each place of a grid, and among routed places.

In PyTorch, the operator with its kernels, and the public functions. In PyTorch a grid is cut into square blocks with a
border around each, so that memory is linear in the number of places. The bias goes by the offset of two places.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .kernel_backend import INTERPRETED, triton_is_available
from .op_attention import Attend, check_states, sdpa_attend
from .run_operator import Gradient, Launch, Operator

grid_attention_into: Launch = None
grid_attention_backward_into: Launch = None
if triton_is_available():
    from .op_grid_attention_gradient_triton import grid_attention_backward_into
    from .op_grid_attention_triton import grid_attention_into

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
    width: int,
    query_places: Tensor,
    key_places: Tensor,
    key_mask: Tensor | None = None,
    attend: Attend = sdpa_attend,
) -> tuple[Tensor, Tensor | None]:
    """Routed queries attend to all routed keys/values, wherever in the grid they are.

    Args:
        query: [batch, queries, heads, d_kv].
        key, value: [batch, keys, key/value heads, d_kv]; the number of heads is a multiple of theirs.
        bias_table: [heads, 2 * max_distance + 1, 2 * max_distance + 1], added to the scores; see `bias_by_offset`.
        width: of the grid that the places were routed out of.
        query_places: int64 [batch, queries], places that are counted row by row.
        key_places: int64 [batch, keys], likewise.
        key_mask: bool [batch, keys], True for used slots; None for all.
        attend: the dense attention to use.

    Returns:
        The output [batch, queries, heads, d_kv] in the query's dtype and, where `attend` gives weights, the weights
        [batch, heads, queries, keys].
    """
    bias = bias_by_offset(bias_table, places_of(query_places, width), places_of(key_places, width))
    mask = None if key_mask is None else key_mask[:, None, None, :]
    return attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), bias, mask)


def grid_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias_table: Tensor,
    width: int,
    radius: int,
    query_places: Tensor | None,
    key_places: Tensor | None,
    mask: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention in windows, or among routed places where places are given (then `radius` is not read).

    Args:
        query: [batch, queries, heads, d_kv], for windows of a grid whose places are counted row by row.
        key, value: [batch, keys, key/value heads, d_kv].
        bias_table: as of the two functions above.
        width: of the grid.
        radius: places to each side.
        query_places, key_places: int64 [batch, queries] and [batch, keys], or None for windows.
        mask: bool [batch, keys], True for keys to read; None for all.
        dropout: probability of dropping an attention probability.
        seed: int64 [1], of what is dropped; read where `dropout` is above 0.

    Returns:
        The output [batch, queries, heads, d_kv], and zeros in the shape of what the kernels keep for their gradient,
        fp32 [batch, heads, queries].

    Raises:
        NotImplementedError: for dropout.
    """
    if dropout > 0:
        raise NotImplementedError("only the Triton kernels drop attention probabilities; give the reference `attend`")
    if query_places is None or key_places is None:
        grid = (query.shape[1] // width, width)
        query_grid, key_grid, value_grid = (part.unflatten(1, grid) for part in (query, key, value))
        real = None if mask is None else mask.unflatten(1, grid)
        output, _ = window_attention_reference(query_grid, key_grid, value_grid, bias_table, radius, real)
        output = output.flatten(1, 2)
    else:
        output = patch_attention_reference(query, key, value, bias_table, width, query_places, key_places, mask)[0]
    batch, length, heads = query.shape[:3]
    return output.contiguous(), torch.zeros(batch, heads, length, dtype=torch.float32, device=query.device)


def _grid_attention_results(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, length, heads = query.shape[:3]
    log_sum_exp = query.new_empty((batch, heads, length), dtype=torch.float32)
    return torch.empty_like(query, memory_format=torch.contiguous_format), log_sum_exp


_grid_attention = Operator(
    "grid_attention",
    grid_attention_reference,
    _grid_attention_results,
    grid_attention_into,
    Gradient(
        inputs=("query", "key", "value", "bias_table"),
        results=("output", "log_sum_exp"),
        through=("output",),
        kept=("output", "log_sum_exp"),
        launch=grid_attention_backward_into,
        unwanted=("bias_table",),
    ),
)


def _check(query: Tensor, key: Tensor, value: Tensor, bias_table: Tensor, mask: Tensor | None) -> None:
    check_states(query, key, value, bias_table, 2)
    if mask is not None and (mask.dtype != torch.bool or mask.shape != key.shape[:-2]):
        raise ValueError(f"the mask is {mask.dtype} {tuple(mask.shape)}; it must be bool {tuple(key.shape[:-2])}")


def _attend(query: Tensor, *rest: Any, dropout: float, seed: Tensor | None) -> Tensor:
    if seed is None and dropout > 0:
        seed = torch.randint(2**63 - 1, (1,), device=query.device)
    return _grid_attention.call("triton" if INTERPRETED else "auto", query, *rest, dropout, seed)[0]


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias_table: Tensor,
    radius: int,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Each place of a grid attends to the real places at most `radius` rows and `radius` columns away.

    Args:
        query: fp16, bf16 or fp32 [batch, height, width, heads, d_kv], any strides.
        key, value: [batch, height, width, key/value heads, d_kv], any strides; the number of heads is a multiple of
            theirs.
        bias_table: fp32 [heads, 2 * max_distance + 1, 2 * max_distance + 1], added to the scores; see
            `bias_by_offset`.
        radius: places to each side, ≥ 0.
        mask: bool [batch, height, width], True for real places; None for all. A place with no real one in its window
            gets an output of zeros.
        dropout: probability of dropping an attention probability.
        seed: int64 [1], from which follows what is dropped; None for one from PyTorch's generator.

    Returns:
        [batch, height, width, heads, d_kv] in the query's dtype. Every gradient is summed so that it has the same bits
        each time.

    Raises:
        ValueError: for shapes or dtypes that do not fit together.
        NotImplementedError: for dropout where the kernels do not run.
    """
    _check(query, key, value, bias_table, mask)
    grid = query.shape[1:3]
    if key.shape[1:3] != grid:
        raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} must have the same grid")
    states = [part.flatten(1, 2) for part in (query, key, value)]
    radius = min(radius, max(grid))
    real = None if mask is None else mask.flatten(1)
    rest = (bias_table, grid[1], radius, None, None, real)
    return _attend(*states, *rest, dropout=dropout, seed=seed).unflatten(1, grid)


def patch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias_table: Tensor,
    width: int,
    query_places: Tensor,
    key_places: Tensor,
    key_mask: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Routed queries attend to all routed keys/values, wherever in the grid they are.

    Args:
        query: fp16, bf16 or fp32 [batch, queries, heads, d_kv], any strides.
        key, value: [batch, keys, key/value heads, d_kv], any strides; the number of heads is a multiple of theirs.
        bias_table: fp32 [heads, 2 * max_distance + 1, 2 * max_distance + 1], added to the scores; see
            `bias_by_offset`.
        width: of the grid that the places were routed out of.
        query_places: int64 [batch, queries], places that are counted row by row, in any order, below 2^31.
        key_places: int64 [batch, keys], likewise.
        key_mask: bool [batch, keys], True for used slots; None for all. A query without any key gets zeros.
        dropout, seed: as of `window_attention`.

    Returns:
        [batch, queries, heads, d_kv] in the query's dtype. Every gradient is summed so that it has the same bits each
        time.

    Raises:
        ValueError: for shapes or dtypes that do not fit together.
        NotImplementedError: for dropout where the kernels do not run.
    """
    _check(query, key, value, bias_table, key_mask)
    for name, places, states in (("query", query_places, query), ("key", key_places, key)):
        if places.dtype != torch.int64 or places.shape != states.shape[:2]:
            raise ValueError(
                f"{name}_places are {places.dtype} {tuple(places.shape)}; they must be int64 {tuple(states.shape[:2])}"
            )
    rest = (bias_table, width, 0, query_places, key_places, key_mask)
    return _attend(query, key, value, *rest, dropout=dropout, seed=seed)
