"""Band and routed attention: in PyTorch, the operator with its kernels, and the public functions.

In PyTorch a band is folded into blocks, so that memory is linear in length. The bias goes by distance.
"""

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
if triton_is_available():
    from .op_attention_gradient_triton import attention_backward_into
    from .op_attention_triton import attention_into

BLOCK_LENGTH = 128

# A dense attention takes query [N, H, Q, D], key and value [N, G, K, D], bias [1 or N, H, Q, K], and a bool mask [N,
# 1, 1 or Q, K] or None. It returns the output [N, Q, H, D], and the weights [N, H, Q, K] or None.
Attend = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor | None],
    tuple[Tensor, Tensor | None],
]
# This takes the same without values, and returns the weights alone.
Weigh = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


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
    bias = bias_table[:, distance.clamp(-max_distance, max_distance) + max_distance]
    return bias.movedim(0, -3)


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


def sdpa_attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
    """PyTorch's scaled dot-product attention with an additive bias and T5's scale of 1; see `Attend` for shapes."""
    bias = bias.to(query.dtype)
    if mask is not None:
        bias = bias.masked_fill(~mask, torch.finfo(query.dtype).min)
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
    return output.transpose(1, 2), None


def local_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias_table: Tensor,
    radius: int,
    mask: Tensor | None = None,
    attend: Attend = sdpa_attend,
    weigh: Weigh | None = None,
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
            loss then has a gradient for these.

    Returns:
        The output [batch, length, heads, d_kv] in the query's dtype and, where there are weights, these
        [batch, heads, length, 2 * r + 1] with r = min(radius, length - 1): entry r + d is for the token d away.
    """
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
) -> tuple[Tensor, Tensor | None]:
    """Routed queries attend to all routed keys/values (Ainslie et al. 2023, heavy attention).

    Args:
        query: [batch, queries, heads, d_kv].
        key, value: [batch, keys, key/value heads, d_kv]; the number of heads is a multiple of theirs.
        bias_table: [heads, 2 * max_distance + 1], added to the scores by clamped distance; see `bias_by_position`.
        query_positions: int64 [batch, queries], positions in the sequence that the tokens were routed out of.
        key_positions: int64 [batch, keys], likewise.
        key_mask: bool [batch, keys], True for used slots; None for all.
        attend: the dense attention to use.

    Returns:
        The output [batch, queries, heads, d_kv] in the query's dtype and, where `attend` gives weights, the weights
        [batch, heads, queries, keys].
    """
    # The copy has the order of its shape for a batch of 1 too, so that an exported program does not ask for the batch.
    bias = bias_by_position(bias_table, query_positions, key_positions).clone(memory_format=torch.contiguous_format)
    mask = None if key_mask is None else key_mask[:, None, None, :]
    return attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), bias, mask)


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias_table: Tensor,
    radius: int,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    mask: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Band attention, or routed attention where positions are given (then `radius` is not read).

    Args:
        query, key, value, bias_table: as of the two functions above.
        radius: positions to each side.
        query_positions, key_positions: int64 [batch, queries] and [batch, keys], or None for the band.
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
    if query_positions is None or key_positions is None:
        output = local_attention_reference(query, key, value, bias_table, radius, mask)[0]
    else:
        output = routed_attention_reference(query, key, value, bias_table, query_positions, key_positions, mask)[0]
    batch, length, heads = query.shape[:3]
    return output.contiguous(), torch.zeros(batch, heads, length, dtype=torch.float32, device=query.device)


def _attention_results(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, length, heads = query.shape[:3]
    log_sum_exp = query.new_empty((batch, heads, length), dtype=torch.float32)
    return torch.empty_like(query, memory_format=torch.contiguous_format), log_sum_exp


_attention = Operator(
    "attention",
    attention_reference,
    _attention_results,
    attention_into,
    Gradient(
        inputs=("query", "key", "value", "bias_table"),
        results=("output", "log_sum_exp"),
        through=("output",),
        kept=("output", "log_sum_exp"),
        launch=attention_backward_into,
        unwanted=("bias_table",),
    ),
)


def check_states(query: Tensor, key: Tensor, value: Tensor, bias_table: Tensor, dimensions: int) -> None:
    """Whether states and a table of biases by distance fit together; a ValueError says what does not.

    Args:
        query: [..., heads, d_kv].
        key, value: [..., key/value heads, d_kv].
        bias_table: [heads, 2 * max_distance + 1], or that length once for each dimension.
        dimensions: in which distance is counted.
    """
    heads, head_size = query.shape[-2:]
    kv_heads, key_size = key.shape[-2:]
    if heads % kv_heads or head_size != key_size or key.shape != value.shape:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit: the last "
            "two must be alike, with the query's d_kv and a number of heads that divides the query's"
        )
    width = bias_table.shape[-1]
    if bias_table.shape != (heads, *(width,) * dimensions) or width < 3 or width % 2 == 0:
        raise ValueError(
            f"bias_table {tuple(bias_table.shape)} must be [{heads} heads{', 2 * max_distance + 1' * dimensions}], "
            "with a max_distance of at least 1"
        )
    if key.dtype != query.dtype or value.dtype != query.dtype:
        raise ValueError(f"query, key and value differ in dtype: {query.dtype}, {key.dtype}, {value.dtype}")


def _check(
    query: Tensor, key: Tensor, value: Tensor, bias_table: Tensor, mask: Tensor | None, *positions: Tensor
) -> None:
    check_states(query, key, value, bias_table, 1)
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"the mask must be bool, not {mask.dtype}")
    for tensor in positions:
        if tensor.dtype != torch.int64:
            raise ValueError(f"positions must be int64, not {tensor.dtype}")


def _attend(query: Tensor, *rest: Any, dropout: float, seed: Tensor | None) -> Tensor:
    if seed is None and dropout > 0:
        seed = torch.randint(2**63 - 1, (1,), device=query.device)
    return _attention.call("triton" if INTERPRETED else "auto", query, *rest, dropout, seed)[0]


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias_table: Tensor,
    radius: int,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Each token attends to the real tokens at most `radius` positions away (Ainslie et al. 2023, light attention).

    Args:
        query: fp16, bf16 or fp32 [batch, length, heads, d_kv], any strides.
        key, value: [batch, length, key/value heads, d_kv], any strides; the number of heads is a multiple of theirs.
        bias_table: fp32 [heads, 2 * max_distance + 1], added to the scores by clamped distance.
        radius: positions to each side, ≥ 0.
        mask: bool [batch, length], True for real tokens; None for all. A token with no real token in its band gets
            an output of zeros.
        dropout: probability of dropping an attention probability.
        seed: int64 [1], from which follows what is dropped; None for one from PyTorch's generator.

    Returns:
        [batch, length, heads, d_kv] in the query's dtype. Every gradient is summed in a fixed order.

    Raises:
        ValueError: for shapes or dtypes that do not fit together.
        NotImplementedError: for dropout where the kernels do not run.
    """
    _check(query, key, value, bias_table, mask)
    return _attend(query, key, value, bias_table, radius, None, None, mask, dropout=dropout, seed=seed)


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
) -> Tensor:
    """Routed queries attend to all routed keys/values (Ainslie et al. 2023, heavy attention).

    Args:
        query: fp16, bf16 or fp32 [batch, queries, heads, d_kv], any strides.
        key, value: [batch, keys, key/value heads, d_kv], any strides; the number of heads is a multiple of theirs.
        bias_table: fp32 [heads, 2 * max_distance + 1], added to the scores by clamped distance.
        query_positions: int64 [batch, queries], positions in the sequence that the tokens were routed out of, below
            2^31. They must not descend, unused slots included: tiles of distant tokens take one bias for all.
        key_positions: int64 [batch, keys], likewise; no two keys that `key_mask` lets through share a position.
        key_mask: bool [batch, keys], True for used slots; None for all.
        dropout: probability of dropping an attention probability.
        seed: int64 [1], from which follows what is dropped; None for one from PyTorch's generator.

    Returns:
        [batch, queries, heads, d_kv] in the query's dtype. Every gradient is summed in a fixed order.

    Raises:
        ValueError: for shapes or dtypes that do not fit together.
        NotImplementedError: for dropout where the kernels do not run.
    """
    _check(query, key, value, bias_table, key_mask, query_positions, key_positions)
    rest = (bias_table, 0, query_positions, key_positions, key_mask)
    return _attend(query, key, value, *rest, dropout=dropout, seed=seed)
