"""Operators of band and routed attention: Triton kernels where they run, else the references; the public functions."""

import contextlib
from typing import Any

import torch
from torch import Tensor

from .op_local_attention_reference import local_attention_reference
from .op_routed_attention_reference import routed_attention_reference
from .run_backend import INTERPRETED, uses_triton
from .run_operator import Operator

# without triton `uses_triton` is False, and nothing below calls them
with contextlib.suppress(ImportError):
    from .op_attention_triton import attention_backward, attention_forward


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias_table: Tensor,
    radius: int,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    if query_positions is None or key_positions is None:
        return local_attention_reference(query, key, value, bias_table, radius, mask)[0]
    return routed_attention_reference(query, key, value, bias_table, query_positions, key_positions, mask)[0]


def _refuse_dropout(dropout: float) -> None:
    if dropout > 0:
        raise NotImplementedError("only the Triton kernels drop attention probabilities; give the reference `attend`")


def _runs_kernel(query: Tensor) -> bool:
    return uses_triton(query, "triton" if INTERPRETED else "auto")


def _readable(*states: Tensor) -> tuple[Tensor, ...]:
    """The states for a kernel to read: Triton's interpreter multiplies bfloat16 as if its bits were integers."""
    if INTERPRETED and states[0].dtype == torch.bfloat16:
        return tuple(tensor.float() for tensor in states)
    return states


def _forward(
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
    rest = (bias_table, radius, query_positions, key_positions, mask)
    if _runs_kernel(query):
        states = _readable(query, key, value)
        output, log_sum_exp = attention_forward(states[0], states[1], states[2], *rest, dropout, seed)
        return output.to(query.dtype), log_sum_exp
    _refuse_dropout(dropout)
    output = _reference(query, key, value, *rest)
    batch, length, heads = query.shape[:3]
    # the reference's backward starts from its inputs; the kernels' layout keeps one shape for both
    return output.contiguous(), torch.zeros(batch, heads, length, dtype=torch.float32, device=query.device)


def _backward(
    output_gradient: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
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
    table_gradient: bool,
) -> tuple[Tensor, ...]:
    inputs = (query, key, value, bias_table)
    rest = (radius, query_positions, key_positions, mask)
    gradients: tuple[Tensor, ...]
    if _runs_kernel(query):
        states = _readable(output_gradient, output, query, key, value)
        gradients = attention_backward(
            *(states[0], states[1], log_sum_exp, states[2], states[3], states[4], bias_table),
            *rest,
            dropout,
            seed,
            table_gradient,
        )
    else:
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            result = _reference(leaves[0], leaves[1], leaves[2], leaves[3], *rest)
        gradients = torch.autograd.grad(result, leaves, output_gradient)
    return tuple(gradient.to(tensor.dtype).contiguous() for gradient, tensor in zip(gradients, inputs, strict=True))


def _fake_forward(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, length, heads = query.shape[:3]
    log_sum_exp = query.new_empty(batch, heads, length, dtype=torch.float32)
    return torch.empty_like(query, memory_format=torch.contiguous_format), log_sum_exp


def _fake_backward(output_gradient: Tensor, output: Tensor, log_sum_exp: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs[:4])


_attention_backward = Operator(
    "attention_backward(Tensor output_gradient, Tensor output, Tensor log_sum_exp, Tensor query, Tensor key, "
    "Tensor value, Tensor bias_table, int radius, Tensor? query_positions, Tensor? key_positions, Tensor? mask, "
    "float dropout, Tensor? seed, bool table_gradient) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    query, key, value, bias_table, radius, query_positions, key_positions, mask, dropout, seed = inputs
    ctx.save_for_backward(*outputs, query, key, value, bias_table, query_positions, key_positions, mask, seed)
    ctx.radius, ctx.dropout = radius, dropout


def _autograd_backward(ctx: Any, output_gradient: Tensor, _: None) -> tuple[Tensor | None, ...]:
    *states, query_positions, key_positions, mask, seed = ctx.saved_tensors
    rest = (ctx.radius, query_positions, key_positions, mask, ctx.dropout, seed, ctx.needs_input_grad[3])
    return *_attention_backward(output_gradient, *states, *rest), *(None,) * 6


_attention = Operator(
    "attention(Tensor query, Tensor key, Tensor value, Tensor bias_table, int radius, Tensor? query_positions, "
    "Tensor? key_positions, Tensor? mask, float dropout, Tensor? seed) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    _save,
    _autograd_backward,
)


def _check(
    query: Tensor, key: Tensor, value: Tensor, bias_table: Tensor, mask: Tensor | None, *positions: Tensor
) -> None:
    _, _, heads, head_size = query.shape
    _, _, kv_heads, key_size = key.shape
    if heads % kv_heads or head_size != key_size or key.shape != value.shape:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit: the last "
            "two must be alike, with the query's d_kv and a number of heads that divides the query's"
        )
    table_heads, width = bias_table.shape
    if table_heads != heads or width < 3 or width % 2 == 0:
        raise ValueError(
            f"bias_table {tuple(bias_table.shape)} must be [{heads} heads, 2 * max_distance + 1], with a max_distance "
            "of at least 1"
        )
    if key.dtype != query.dtype or value.dtype != query.dtype:
        raise ValueError(f"query, key and value differ in dtype: {query.dtype}, {key.dtype}, {value.dtype}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"the mask must be bool, not {mask.dtype}")
    for tensor in positions:
        if tensor.dtype != torch.int64:
            raise ValueError(f"positions must be int64, not {tensor.dtype}")


def _attend(query: Tensor, key: Tensor, value: Tensor, bias_table: Tensor, *rest: Any) -> Tensor:
    *positions_and_mask, dropout = rest
    if not _runs_kernel(query):
        _refuse_dropout(dropout)
        return _reference(query, key, value, bias_table, *positions_and_mask)
    seed = torch.randint(2**63 - 1, (1,), device=query.device) if dropout > 0 else None
    return _attention(query, key, value, bias_table, *rest, seed)[0]


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias_table: Tensor,
    radius: int,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Each token attends to the real tokens at most `radius` positions away (Ainslie et al. 2023, light attention).

    Args:
        query: fp16, bf16 or fp32 [batch, length, heads, d_kv], any strides.
        key, value: [batch, length, key/value heads, d_kv], any strides; the number of heads is a multiple of theirs.
        bias_table: fp32 [heads, 2 * max_distance + 1], added to the scores by clamped distance.
        radius: positions to each side, ≥ 0.
        mask: bool [batch, length], True for real tokens; None for all. A token with no real token in its band gets
            an output of zeros.
        dropout: probability of dropping an attention probability, with Philox keys from PyTorch's generator.

    Returns:
        [batch, length, heads, d_kv] in the query's dtype. Every gradient is summed in a fixed order.

    Raises:
        ValueError: for shapes or dtypes that do not fit together.
        NotImplementedError: for dropout where the kernels do not run.
    """
    _check(query, key, value, bias_table, mask)
    return _attend(query, key, value, bias_table, radius, None, None, mask, dropout)


def routed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias_table: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    key_mask: Tensor | None = None,
    dropout: float = 0.0,
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
        dropout: probability of dropping an attention probability, with Philox keys from PyTorch's generator.

    Returns:
        [batch, queries, heads, d_kv] in the query's dtype. Every gradient is summed in a fixed order.

    Raises:
        ValueError: for shapes or dtypes that do not fit together.
        NotImplementedError: for dropout where the kernels do not run.
    """
    _check(query, key, value, bias_table, key_mask, query_positions, key_positions)
    return _attend(query, key, value, bias_table, 0, query_positions, key_positions, key_mask, dropout)
