"""Attention within a band around each token, in PyTorch: folded into blocks, so that memory is linear in length."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange

from .model_position import bias_by_position
from .run_sizes import as_tensor, computed_size, is_free

BLOCK_LENGTH = 128

# (query [N, H, Q, D], key [N, G, K, D], value, bias [1 or N, H, Q, K], mask bool [N, 1, 1 or Q, K] or None)
# -> (output [N, Q, H, D], weights [N, H, Q, K] or None)
Attend = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None],
    tuple[torch.Tensor, torch.Tensor | None],
]
# the same, without values: the weights alone
Weigh = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def sdpa_attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, None]:
    """PyTorch's scaled dot-product attention with an additive bias and T5's scale of 1; see `Attend` for shapes."""
    bias = bias.to(query.dtype)
    if mask is not None:
        bias = bias.masked_fill(~mask, torch.finfo(query.dtype).min)
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
    return output.transpose(1, 2), None


def local_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias_table: torch.Tensor,
    radius: int,
    mask: torch.Tensor | None = None,
    attend: Attend = sdpa_attend,
    weigh: Weigh | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
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
    # always one block too many, never a pad of zero: an exported program then holds for every length
    if is_free(length):
        num_blocks = computed_size(as_tensor(length) // BLOCK_LENGTH + 1, length)
    else:
        num_blocks = length // BLOCK_LENGTH + 1
        radius = min(radius, length - 1)
    pad = num_blocks * BLOCK_LENGTH - length
    window = BLOCK_LENGTH + 2 * radius

    # overlapping windows fold into one dimension only as a copy, except for a batch of 1: copied here, an exported
    # program does not ask which of the two it has
    # padded with its heads flat: otherwise the gradient of the padding, where there is one block, has another order in
    # memory than a program compiled for more expects
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
    # positions within a window: its queries stand `radius` after its first key
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
        # those of the band alone
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
