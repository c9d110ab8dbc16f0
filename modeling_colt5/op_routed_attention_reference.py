"""Attention among routed tokens, in PyTorch, with the relative bias of their original positions."""

import torch

from .model_position import bias_by_position
from .op_local_attention_reference import Attend, sdpa_attend


def routed_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias_table: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    attend: Attend = sdpa_attend,
) -> tuple[torch.Tensor, torch.Tensor | None]:
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
    # in the order of its shape also for a batch of 1, so that an exported program does not ask for the batch
    bias = bias_by_position(bias_table, query_positions, key_positions).clone(memory_format=torch.contiguous_format)
    mask = None if key_mask is None else key_mask[:, None, None, :]
    return attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), bias, mask)
