"""Attention of one new token in each row: to the keys of a cache, which its own key joins, or to those of a memory."""

import torch
from torch import Tensor

from .kernel_backend import accumulation_dtype, triton_is_available
from .op_attention import bias_by_position
from .run_operator import Launch

step_attention_into: Launch = None
if triton_is_available():
    from .op_step_attention_triton import step_attention_into as step_attention_into


def step_attention_reference(
    query: Tensor,
    new_key: Tensor | None,
    new_value: Tensor | None,
    bias_table: Tensor | None,
    mask: Tensor | None,
    length: Tensor | None,
    key: Tensor,
    value: Tensor,
    output: Tensor,
) -> None:
    """Write the attention of one query in each row to `output`, and what is new to `key` and `value`; T5's scale of 1.

    Args:
        query: [rows, heads * d_kv].
        new_key, new_value: [rows, key/value heads * d_kv], of the token itself, which are written behind the others;
            None where the token is none of those that it reads.
        bias_table: fp32 [heads, 2 * max_distance + 1], as of `bias_by_position`, for a query at the last key's
            position; None for no bias.
        mask: bool [rows, keys], True for keys to read; None for all. A row without any reads the mean of all values.
        length: int32 [1], the number of keys, the new one included; None where keys fill their tensor.
        key, value: [rows, key/value heads, room, d_kv], of which the first keys are read; the number of heads is a
            multiple of theirs.
        output: [rows, heads * d_kv].
    """
    rows, groups, room, d_kv = key.shape
    keys = room if length is None else int(length)
    if new_key is not None and new_value is not None:
        key[:, :, keys - 1] = new_key.view(rows, groups, d_kv)
        value[:, :, keys - 1] = new_value.view(rows, groups, d_kv)
    dtype = accumulation_dtype(query.dtype)
    # heads that share a key/value head are just more queries for it
    queries = query.view(rows, groups, -1, d_kv).to(dtype)
    scores = queries @ key[:, :, :keys].to(dtype).transpose(2, 3)
    if bias_table is not None:
        positions = torch.arange(keys, device=query.device)
        scores = scores + bias_by_position(bias_table, positions[-1:], positions).view(groups, -1, keys)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], torch.finfo(dtype).min)
    output.view_as(queries).copy_(scores.softmax(-1) @ value[:, :, :keys].to(dtype))
