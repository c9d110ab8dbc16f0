"""Attention to what is near, among routed tokens, and to everything, of texts and of grids: in PyTorch, the operator
with its kernels, and the public functions.

Near is a band of a text, or a square window of a grid. In PyTorch both are cut into blocks, so that memory is linear
in the number of tokens. The bias goes by distance, or in a grid by the offset of two places. To everything is a band
of a text that is wide enough.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .kernel_backend import INTERPRETED, triton_is_available
from .run_budgets import as_tensor, computed_size, is_free
from .run_operator import Gradient, Launch, Operator

attention_into: Launch = None
attention_backward_into: Launch = None
grid_attention_into: Launch = None
grid_attention_backward_into: Launch = None
if triton_is_available():
    from .op_attention_gradient_triton import attention_backward_into
    from .op_attention_triton import attention_into
    from .op_grid_attention_gradient_triton import grid_attention_backward_into
    from .op_grid_attention_triton import grid_attention_into

BLOCK_LENGTH = 128
# The side of a block of queries. With windows that reach further than that, blocks are twice as long: a border would
# otherwise be many times as large as what it surrounds.
BLOCK_SIDE = 8

# A dense attention takes query [N, H, Q, D], key and value [N, G, K, D], bias [1 or N, H, Q, K], and a bool mask [N,
# 1, 1 or Q, K] or None. It returns the output [N, Q, H, D], and the weights [N, H, Q, K] or None.
Attend = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor | None],
    tuple[Tensor, Tensor | None],
]
# This takes the same without values, and returns the weights alone.
Weigh = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def _read_table(bias_table: Tensor, entries: Tensor) -> Tensor:
    """The bias of each pair: [heads, entries of the table], int64 [..., queries, keys] → [..., heads, queries, keys].

    `gather` writes in the order of its result. Indexing and a copy in that order take a CPU nearly twice as long,
    `F.embedding` five times.
    """
    *rows, _, keys = entries.shape
    entries = entries.flatten(-2)[..., None, :].expand(*rows, len(bias_table), -1)
    return bias_table.expand(*rows, -1, -1).gather(-1, entries).unflatten(-1, (-1, keys))


def bias_by_position(bias_table: Tensor, query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """The bias of each query and key, read from a table by distance.

    Args:
        bias_table: [heads, 2 * max_distance + 1].
        query_positions: integers [..., queries].
        key_positions: integers [..., keys].

    Returns:
        [..., heads, queries, keys] in the table's dtype.
    """
    max_distance = (bias_table.shape[-1] - 1) // 2
    distance = key_positions[..., None, :] - query_positions[..., :, None]
    return _read_table(bias_table, distance.clamp(-max_distance, max_distance) + max_distance)


def bias_of_sequence(bias_table: Tensor, length: int, key_length: int, past: int | Tensor) -> Tensor:
    """The bias of consecutive queries and keys: `bias_by_position` of `past`, `past + 1`, ... and of 0, 1, ...

    Read in two steps, each distance and then each pair, for the sake of the gradient: a GPU adds up what was read of
    one entry one after the other, and all pairs beyond max_distance read the same one.

    Args:
        bias_table: [heads, 2 * max_distance + 1].
        length, key_length: how many queries and keys.
        past: position of the first query.

    Returns:
        [heads, length, key_length] in the table's dtype.
    """
    max_distance = (bias_table.shape[-1] - 1) // 2
    distance = torch.arange(1 - length, key_length, device=bias_table.device)
    by_distance = bias_table[:, (distance - past).clamp(-max_distance, max_distance) + max_distance]
    query = torch.arange(length, device=bias_table.device)[:, None]
    return by_distance[:, torch.arange(key_length, device=bias_table.device) - query + (length - 1)]


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
    return _read_table(bias_table.flatten(1), rows * side + columns)


def sdpa_attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
    """PyTorch's scaled dot-product attention with an additive bias and T5's scale of 1; see `Attend` for shapes."""
    bias = bias.to(query.dtype)
    if mask is not None:
        bias = bias.masked_fill(~mask, torch.finfo(query.dtype).min)
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
    return output.transpose(1, 2), None


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
    width: int,
    radius: int,
    mask: Tensor | None = None,
    attend: Attend = sdpa_attend,
) -> tuple[Tensor, Tensor | None]:
    """Each place of a grid attends to the real places at most `radius` rows and `radius` columns away.

    Args:
        query: [batch, places, heads, d_kv], counted row by row.
        key, value: [batch, places, key/value heads, d_kv]; the number of heads is a multiple of theirs.
        bias_table: [heads, 2 * max_distance + 1, 2 * max_distance + 1], added to the scores; see `bias_by_offset`.
        width: of the grid.
        radius: places to each side, ≥ 0.
        mask: bool [batch, places], True for real places; None for all. A place with no real one in its window gets
            some finite output.
        attend: the dense attention that each block goes through.

    Returns:
        The output [batch, places, heads, d_kv] in the query's dtype and, where there are weights, these [batch, heads,
        height, width, 2 * r + 1, 2 * r + 1] with r = min(radius, max(height, width) - 1): the entry r + d of the last
        dimensions is for the place d rows, or columns, away.
    """
    height = query.shape[1] // width
    real = query.new_ones(query.shape[:2], dtype=torch.bool) if mask is None else mask
    query, key, value, real = (part.unflatten(1, (height, width)) for part in (query, key, value, real))
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
    return output[:, :height, :width].flatten(1, 2), weights


def local_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias_table: Tensor,
    radius: int,
    mask: Tensor | None = None,
    attend: Attend = sdpa_attend,
    weigh: Weigh | None = None,
    width: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Each token attends to the real tokens at most `radius` positions away (Ainslie et al. 2023, light attention).

    Args:
        query: [batch, length, heads, d_kv].
        key, value: [batch, length, key/value heads, d_kv]; the number of heads is a multiple of theirs.
        bias_table: [heads, 2 * max_distance + 1], added to the scores by clamped distance; see `bias_by_position`.
        radius: positions to each side, ≥ 0.
        mask: bool [batch, length], True for real tokens; None for all. A token with no real token in its band gets
            some finite output.
        attend: the dense attention that each block goes through.
        weigh: gives a block's weights, instead of `attend`, for an output made of the weights that are returned: the
            loss then has a gradient for these. Not read of a grid.
        width: of the grid that the tokens are, for what `window_attention_reference` does; None for a text.

    Returns:
        The output [batch, length, heads, d_kv] in the query's dtype and, where there are weights, these
        [batch, heads, length, 2 * r + 1] with r = min(radius, length - 1): entry r + d is for the token d away.
    """
    if width is not None:
        return window_attention_reference(query, key, value, bias_table, width, radius, mask, attend)
    batch, length, heads = query.shape[:3]
    # There is always one block too many, so that the padding is never empty: an exported program then holds for every
    # length.
    if is_free(length):
        num_blocks = computed_size(as_tensor(length) // BLOCK_LENGTH + 1, length)
    else:
        num_blocks = length // BLOCK_LENGTH + 1
        radius = min(radius, length - 1)
    pad = num_blocks * BLOCK_LENGTH - length
    window = BLOCK_LENGTH + 2 * radius

    # Overlapping windows fold into one dimension only as a copy, except for a batch of 1. They are always copied here,
    # so that an exported program does not ask for the batch. The query is padded with its heads flat: otherwise the
    # gradient of the padding has another order in memory with one block than a program that was compiled for more
    # expects.
    query = F.pad(query.flatten(-2), (0, 0, 0, pad))
    query = rearrange(query, "b (n l) (h d) -> (b n) h l d", l=BLOCK_LENGTH, h=heads)
    key, value = (
        F.pad(states, (0, 0, 0, 0, radius, radius + pad))
        .unfold(1, window, BLOCK_LENGTH)
        .transpose(-1, -2)
        .clone(memory_format=torch.contiguous_format)
        .flatten(0, 1)
        for states in (key, value)
    )
    # Positions count from a window's first key; its queries begin `radius` behind it.
    query_positions = torch.arange(BLOCK_LENGTH, device=query.device) + radius
    key_positions = torch.arange(window, device=query.device)
    bias = bias_by_position(bias_table, query_positions, key_positions)[None]
    in_band = (key_positions[None, :] - query_positions[:, None]).abs() <= radius
    real = query.new_ones(batch, length, dtype=torch.bool) if mask is None else mask
    real = F.pad(real, (radius, radius + pad)).unfold(1, window, BLOCK_LENGTH)
    real = real.clone(memory_format=torch.contiguous_format)
    block_mask = rearrange(real, "b n w -> (b n) 1 1 w") & in_band

    if weigh is None:
        output, weights = attend(query, key, value, bias, block_mask)
    else:
        weights = weigh(query, key, bias, block_mask)
    if weights is not None:
        # Only the weights of the band are returned.
        band = torch.arange(BLOCK_LENGTH, device=query.device)[:, None]
        band = band + torch.arange(2 * radius + 1, device=query.device)
        band = band.expand(*weights.shape[:2], -1, -1)
        weights = rearrange(weights.gather(-1, band), "(b n) h l w -> b h (n l) w", b=batch)[:, :, :length]
        if weigh is not None:
            by_block = rearrange(F.pad(weights, (0, 0, 0, pad)), "b h (n l) w -> (b n) h l w", l=BLOCK_LENGTH)
            by_window = by_block.new_zeros(*by_block.shape[:-1], window).scatter(-1, band, by_block)
            output = torch.matmul(by_window, value).transpose(1, 2)
    output = rearrange(output, "(b n) l h d -> b (n l) h d", b=batch)[:, :length]
    return output, weights


def routed_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias_table: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    key_mask: Tensor | None = None,
    attend: Attend = sdpa_attend,
    width: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Routed queries attend to all routed keys/values (Ainslie et al. 2023, heavy attention).

    Args:
        query: [batch, queries, heads, d_kv].
        key, value: [batch, keys, key/value heads, d_kv]; the number of heads is a multiple of theirs.
        bias_table: [heads, 2 * max_distance + 1], added to the scores by clamped distance, see `bias_by_position`; of
            a grid as in `bias_by_offset`.
        query_positions: int64 [batch, queries], positions in the sequence that the tokens were routed out of; of a
            grid places that are counted row by row.
        key_positions: int64 [batch, keys], likewise.
        key_mask: bool [batch, keys], True for used slots; None for all.
        attend: the dense attention to use.
        width: of the grid; None for a text.

    Returns:
        The output [batch, queries, heads, d_kv] in the query's dtype and, where `attend` gives weights, the weights
        [batch, heads, queries, keys].
    """
    if width is None:
        bias = bias_by_position(bias_table, query_positions, key_positions)
    else:
        bias = bias_by_offset(bias_table, places_of(query_positions, width), places_of(key_positions, width))
    mask = None if key_mask is None else key_mask[:, None, None, :]
    return attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), bias, mask)


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias_table: Tensor | None,
    width: int | None,
    radius: int,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    mask: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention to what is near, or where positions are given among routed tokens.

    Args:
        query: [batch, queries, heads, d_kv]; the places of a grid are counted row by row.
        key, value: [batch, keys, key/value heads, d_kv].
        bias_table: as of the two functions above; entries may be minus infinity, but for the one of distance 0. None
            for no bias, of what is near in a text.
        width: of the grid; None for a text.
        radius: positions, or places, to each side; not read where positions are given. Where there are not as many
            keys as queries, it must reach all of them.
        query_positions, key_positions: int64 [batch, queries] and [batch, keys], or None for what is near.
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
        raise NotImplementedError(
            f"dropout is {dropout}; it must be 0 where no kernels run, here {query.device} and {query.dtype}: the "
            "references take an `attend` that drops"
        )
    batch, length, heads = query.shape[:3]
    if bias_table is None:
        bias_table = torch.zeros(heads, 1, dtype=torch.float32, device=query.device)
    if query_positions is not None and key_positions is not None:
        positions = (query_positions, key_positions)
        output, _ = routed_attention_reference(query, key, value, bias_table, *positions, mask, width=width)
    elif key.shape[1] != length:
        queries, keys = (torch.arange(part.shape[1], device=query.device) for part in (query, key))
        output, _ = routed_attention_reference(query, key, value, bias_table, queries, keys, mask)
    else:
        output, _ = local_attention_reference(query, key, value, bias_table, radius, mask, width=width)
    return output.contiguous(), torch.zeros(batch, heads, length, dtype=torch.float32, device=query.device)


def _attention_results(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, length, heads = query.shape[:3]
    log_sum_exp = query.new_empty((batch, heads, length), dtype=torch.float32)
    return torch.empty_like(query, memory_format=torch.contiguous_format), log_sum_exp


def _for_width(of_text: Launch, of_grid: Launch, place: int) -> Launch:
    """The launch for a text or for a grid, by the width, which is the argument at a place and which texts lack."""
    if of_text is None or of_grid is None:
        return None

    @functools.wraps(of_grid)
    def launch(*arguments: Any) -> None:
        if arguments[place] is None:
            of_text(*arguments[:place], *arguments[place + 1 :])
        else:
            of_grid(*arguments)

    return launch


_attention = Operator(
    "attention",
    attention_reference,
    _attention_results,
    _for_width(attention_into, grid_attention_into, 4),
    Gradient(
        inputs=("query", "key", "value", "bias_table"),
        results=("output", "log_sum_exp"),
        through=("output",),
        kept=("output", "log_sum_exp"),
        launch=_for_width(attention_backward_into, grid_attention_backward_into, 5),
        unwanted=("bias_table",),
    ),
)


def _check_arguments(
    query: Tensor, key: Tensor, width: int | None, radius: int | None, dropout: float, seed: Tensor | None
) -> None:
    """Refuse what kernels would read or compute something else for.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if query.dim() != 4 or key.dim() != 4 or query.shape[0] != key.shape[0] or not (query.shape[1] and key.shape[1]):
        raise ValueError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)} must be [batch, tokens, heads, d_kv] of one batch "
            "and with at least one token each"
        )
    if width is not None and width < 1:
        raise ValueError(f"width is {width}; it must be at least 1, or None for a text")
    if radius is not None and radius < 0:
        raise ValueError(f"radius is {radius}; it must be at least 0")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; it must be at least 0 and below 1")
    if seed is not None and (not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.numel() != 1):
        raise TypeError(f"seed is {seed!r}; it must be int64 [1], or None for one of PyTorch's generator")


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias_table: Tensor | None,
    width: int | None,
    radius: int | None,
    positions: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    """The operator's output; the arguments are those of `attention_reference`, but None for a radius that reaches all
    keys. A ValueError says which of them do not fit."""
    _check_arguments(query, key, width, radius, dropout, seed)
    heads, head_size = query.shape[-2:]
    kv_heads, key_size = key.shape[-2:]
    if heads % kv_heads or head_size != key_size or key.shape != value.shape:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit: the last "
            "two must be alike, with the query's d_kv and a number of heads that divides the query's"
        )
    if bias_table is not None:
        dimensions, entries = 1 if width is None else 2, bias_table.shape[-1]
        if bias_table.shape != (heads, *(entries,) * dimensions) or entries < 3 or entries % 2 == 0:
            raise ValueError(
                f"bias_table {tuple(bias_table.shape)} must be [{heads} heads"
                f"{', 2 * max_distance + 1' * dimensions}], with a max_distance of at least 1"
            )
    if key.dtype != query.dtype or value.dtype != query.dtype:
        raise ValueError(f"query, key and value differ in dtype: {query.dtype}, {key.dtype}, {value.dtype}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != key.shape[:2]):
        raise ValueError(f"the mask is {mask.dtype} {tuple(mask.shape)}; it must be bool {tuple(key.shape[:2])}")
    if radius is None:
        radius = max(query.shape[1], key.shape[1])
    elif positions is None:
        if key.shape[1] != query.shape[1] or (width is not None and key.shape[1] % width):
            rows = "" if width is None else f", in rows of {width}"
            raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} must have as many tokens{rows}")
    else:
        for name, own, states in (("query", positions[0], query), ("key", positions[1], key)):
            shape = states.shape[:2]
            if own.dtype != torch.int64 or own.shape != shape:
                raise ValueError(
                    f"{name}_positions are {own.dtype} {tuple(own.shape)}; they must be int64 {tuple(shape)}"
                )
    if seed is None and dropout > 0:
        seed = torch.randint(2**63 - 1, (1,), device=query.device)
    rest = (bias_table, width, radius, *(positions or (None, None)), mask, dropout, seed)
    return _attention(query, key, value, *rest, kernel_backend="triton" if INTERPRETED else "auto")[0]


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias_table: Tensor,
    radius: int,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    width: int | None = None,
) -> Tensor:
    """Each token attends to the real tokens at most `radius` positions away (Ainslie et al. 2023, light attention); in
    a grid, at most `radius` rows and columns away.

    Args:
        query: fp16, bf16 or fp32 [batch, length, heads, d_kv], any strides.
        key, value: [batch, length, key/value heads, d_kv], any strides; the number of heads is a multiple of theirs.
        bias_table: fp32, of the shape that `routed_attention_reference` says.
        radius: positions to each side, ≥ 0.
        mask: bool [batch, length], True for real tokens; None for all. A token with no real token near it gets an
            output of zeros where kernels run, and some finite output elsewhere.
        dropout: probability of dropping an attention probability.
        seed: int64 [1], from which follows what is dropped; None for one from PyTorch's generator.
        width: of the grid whose places the tokens are, counted row by row; None for a text.

    Returns:
        [batch, length, heads, d_kv] in the query's dtype. Every gradient is summed so that it has the same bits each
        time.

    Raises:
        TypeError: for a seed of another kind.
        ValueError: for shapes or dtypes that do not fit together, or a number out of its range.
        NotImplementedError: for dropout where the kernels do not run.
    """
    return _attend(query, key, value, bias_table, width, radius, None, mask, dropout, seed)


def routed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias_table: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    key_mask: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    width: int | None = None,
) -> Tensor:
    """Routed queries attend to all routed keys/values (Ainslie et al. 2023, heavy attention).

    Args:
        query: fp16, bf16 or fp32 [batch, queries, heads, d_kv], any strides.
        key, value: [batch, keys, key/value heads, d_kv], any strides; the number of heads is a multiple of theirs.
        bias_table: fp32, of the shape that `routed_attention_reference` says.
        query_positions: int64 [batch, queries], positions in the sequence that the tokens were routed out of, below
            2^31. They must not descend, unused slots included: tiles of distant tokens take one bias for all. Places
            of a grid may stand in any order.
        key_positions: int64 [batch, keys], likewise; no two keys that `key_mask` lets through share a position.
        key_mask: bool [batch, keys], True for used slots; None for all. A query without any key gets zeros where
            kernels run, and some finite output elsewhere.
        dropout, seed: as of `local_attention`.
        width: of the grid whose places positions are, counted row by row; None for a text.

    Returns:
        [batch, queries, heads, d_kv] in the query's dtype. Every gradient is summed so that it has the same bits each
        time.

    Raises:
        TypeError: for a seed of another kind.
        ValueError: for shapes or dtypes that do not fit together, or a number out of its range.
        NotImplementedError: for dropout where the kernels do not run.
    """
    positions = (query_positions, key_positions)
    return _attend(query, key, value, bias_table, width, 0, positions, key_mask, dropout, seed)


def full_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias_table: Tensor | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Each query attends to all real keys whose bias is not minus infinity.

    Args:
        query: fp16, bf16 or fp32 [batch, queries, heads, d_kv], any strides.
        key, value: [batch, keys, key/value heads, d_kv], any strides; the number of heads is a multiple of theirs.
        bias_table: fp32 [heads, 2 * max_distance + 1], added to the scores by clamped distance, see
            `bias_by_position`; queries and keys count from 0. Minus infinity behind the middle makes attention causal.
            None for no bias.
        mask: bool [batch, keys], True for real keys; None for all. A query without any key gets zeros.
        dropout, seed: as of `local_attention`.

    Returns:
        [batch, queries, heads, d_kv] in the query's dtype. Every gradient is summed so that it has the same bits each
        time.

    Raises:
        TypeError: for a seed of another kind.
        ValueError: for shapes or dtypes that do not fit together, or a dropout out of its range.
        NotImplementedError: for dropout where the kernels do not run.
    """
    return _attend(query, key, value, bias_table, None, None, None, mask, dropout, seed)
