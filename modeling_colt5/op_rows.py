"""Rows of routed tokens: gathered for the heavy branches, and combined with the states.

A routing is `indices`, `valid` and `weights`, each `[batch, k]`, as in docs/architecture.md: positions ascending over
the used slots, which come first.
"""

from typing import Any

import torch
from torch import Tensor

from .kernel_backend import accumulation_dtype, records_now, triton_is_available, uses_triton
from .run_operator import ComposedGradient, Launch, Operator, check_backward_of_kernels

combine_into: Launch = None
gather_into: Launch = None
gather_dot_into: Launch = None
if triton_is_available():
    from .op_rows_triton import combine_into, gather_dot_into, gather_into


def flat_rows(indices: Tensor, length: int) -> Tensor:
    """Positions `[batch, k]` as rows `[batch · k]` of a `[batch · length, d]` tensor."""
    first_row = torch.arange(indices.shape[0], device=indices.device) * length
    return (indices + first_row[:, None]).flatten()


def slot_weights(valid: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What each slot's row is multiplied by `[batch, k, 1]`: its weight, 1 without weights, 0 where unused."""
    if weights is None:
        return valid.to(dtype)[..., None]
    return weights.to(dtype).masked_fill(~valid, 0)[..., None]


def gather_rows(hidden_states: Tensor, indices: Tensor, valid: Tensor) -> Tensor:
    """The routed positions' rows `[batch, k, d]`, zeros where unused."""
    rows = hidden_states.flatten(0, 1).index_select(0, flat_rows(indices, hidden_states.shape[1]))
    # An unused slot points at a row that may hold NaN, which a product with 0 would keep.
    return rows.view(*indices.shape, hidden_states.shape[-1]).masked_fill(~valid[..., None], 0)


def weighted_gather(hidden_states: Tensor, indices: Tensor, valid: Tensor, weights: Tensor | None) -> Tensor:
    """The routed positions' rows times their weights, in the hidden states' dtype."""
    dtype = accumulation_dtype(hidden_states.dtype)
    rows = gather_rows(hidden_states, indices, valid)
    return (rows.to(dtype) * slot_weights(valid, weights, dtype)).to(hidden_states.dtype)


def weighted_scatter_add(
    base: Tensor, updates: Tensor, indices: Tensor, valid: Tensor, weights: Tensor | None
) -> Tensor:
    """`base` `[batch, n, d]` with `weights * updates` added at the routed positions, in the base's dtype."""
    updates = updates.to(base.dtype).masked_fill(~valid[..., None], 0) * slot_weights(valid, weights, base.dtype)
    # On the CPU PyTorch's out-of-place `index_add` takes many times as long as a copy and the in-place one.
    rows = base.flatten(0, 1).clone(memory_format=torch.contiguous_format)
    rows.index_add_(0, flat_rows(indices, base.shape[1]), updates.flatten(0, 1))
    # An exporter with free sizes would make other strides of a view of the whole shape.
    return rows.unflatten(0, base.shape[:2])


def combine_reference(
    base: Tensor | None,
    light: Tensor | None,
    updates: Tensor,
    indices: Tensor,
    valid: Tensor,
    weights: Tensor | None,
    updates2: Tensor | None,
    indices2: Tensor | None,
    valid2: Tensor | None,
    weights2: Tensor | None,
    length: int,
) -> Tensor:
    """`base + light`, and the weighted updates of one or two routings at their positions; summed in fp32.

    Args:
        base: `[batch, length, d]`; None for zeros.
        light: `[batch, length, d]` or None.
        updates, indices, valid, weights: `[batch, k, d]` and its routing; weights of None are 1.
        updates2, indices2, valid2, weights2: a second routing's, or None.
        length: the number of positions.

    Returns:
        `[batch, length, d]`, rounded once, to the base's dtype or else the updates'.
    """
    out_dtype = updates.dtype if base is None else base.dtype
    dtype = accumulation_dtype(out_dtype)
    if base is None:
        total = updates.new_zeros(updates.shape[0], length, updates.shape[-1], dtype=dtype)
    else:
        total = base.to(dtype)
    if light is not None:
        total = total + light.to(dtype)
    total = weighted_scatter_add(total, updates, indices, valid, weights)
    if updates2 is not None and indices2 is not None and valid2 is not None:
        total = weighted_scatter_add(total, updates2, indices2, valid2, weights2)
    return total.to(out_dtype)


def gather_reference(
    hidden_states: Tensor,
    indices: Tensor,
    valid: Tensor,
    weights: Tensor | None,
    indices2: Tensor | None,
    valid2: Tensor | None,
    weights2: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The rows of one or two routings, times their weights; zeros where unused.

    Args:
        hidden_states: `[batch, n, d]`.
        indices, valid, weights: the first routing; weights of None are 1.
        indices2, valid2, weights2: the second routing, or None.

    Returns:
        `[batch, k, d]` in the hidden states' dtype, and the same of the second routing (empty without one).
    """
    rows = weighted_gather(hidden_states, indices, valid, weights)
    if indices2 is None or valid2 is None:
        return rows, hidden_states.new_empty(0)
    return rows, weighted_gather(hidden_states, indices2, valid2, weights2)


def gather_dot_reference(
    hidden_states: Tensor, other: Tensor, indices: Tensor, valid: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The routed rows times their weights, and the rows' products with other rows: the backward of a scatter.

    Args:
        hidden_states: `[batch, n, d]`.
        other: `[batch, k, d]`.
        indices, valid, weights: the routing; weights of None are 1.

    Returns:
        `weights * rows` `[batch, k, d]` in the dtype of `other`, and `⟨rows, other⟩` `[batch, k]` in fp32; zeros
        where unused.
    """
    dtype = accumulation_dtype(hidden_states.dtype)
    rows = gather_rows(hidden_states, indices, valid).to(dtype)
    dots = (rows * other.to(dtype).masked_fill(~valid[..., None], 0)).sum(-1)
    return (rows * slot_weights(valid, weights, dtype)).to(other.dtype), dots


def _gather_dot_results(hidden_states: Tensor, other: Tensor, indices: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return other.new_empty(other.shape), hidden_states.new_empty(indices.shape, dtype=torch.float32)


_gather_dot = Operator("token_gather_dot", gather_dot_reference, _gather_dot_results, gather_dot_into)


def _scatter_gradients(
    ctx: Any, grad: Tensor, first: int, updates: Tensor, indices: Tensor, valid: Tensor, weights: Tensor | None
) -> tuple[Tensor | None, None, None, Tensor | None]:
    """The gradients of a scatter's (updates, indices, valid, weights), which are inputs `first` and up."""
    if not ctx.needs_input_grad[first] and not ctx.needs_input_grad[first + 3]:
        return None, None, None, None
    grad_updates, dots = _gather_dot(grad, updates, indices, valid, weights)
    return grad_updates, None, None, None if weights is None else dots.to(weights.dtype)


def _combine_result(base: Tensor | None, light: Tensor | None, updates: Tensor, *rest: Any) -> Tensor:
    length = rest[-1]
    return (updates if base is None else base).new_empty(updates.shape[0], length, updates.shape[2])


def _save_combine(ctx: Any, inputs: tuple[Any, ...], _: Tensor) -> None:
    ctx.save_for_backward(*inputs[2:10])
    ctx.light_dtype = None if inputs[1] is None else inputs[1].dtype


def _backward_combine(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    updates, indices, valid, weights, updates2, indices2, valid2, weights2 = ctx.saved_tensors
    grad_light = None if ctx.light_dtype is None else grad.to(ctx.light_dtype)
    first = _scatter_gradients(ctx, grad, 2, updates, indices, valid, weights)
    second: tuple[Tensor | None, ...] = (None, None, None, None)
    if updates2 is not None:
        second = _scatter_gradients(ctx, grad, 6, updates2, indices2, valid2, weights2)
    return grad if ctx.needs_input_grad[0] else None, grad_light, *first, *second, None


_combine = Operator(
    "token_combine",
    combine_reference,
    _combine_result,
    combine_into,
    ComposedGradient(_save_combine, _backward_combine),
    operand=2,
)


def _gather_results(
    hidden_states: Tensor, indices: Tensor, valid: Tensor, weights: Tensor | None, indices2: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    d = hidden_states.shape[-1]
    second = (0,) if indices2 is None else (*indices2.shape, d)
    return hidden_states.new_empty(*indices.shape, d), hidden_states.new_empty(second)


def _save_gather(ctx: Any, inputs: tuple[Any, ...], _: tuple[Tensor, ...]) -> None:
    # The states are needed for the weights' gradients alone.
    weighted = any(ctx.needs_input_grad[position] for position in (3, 6))
    ctx.save_for_backward(inputs[0] if weighted else None, *inputs[1:])
    ctx.length = inputs[0].shape[1]


def _gather_gradients(
    ctx: Any, grad_shared: Tensor | None, grad: Tensor | None, grad2: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of a gather's inputs, `grad_shared` added to the states'."""
    hidden_states, indices, valid, weights, indices2, valid2, weights2 = ctx.saved_tensors
    routings = [(grad, indices, valid, weights), (grad2, indices2, valid2, weights2)]
    grad_weights: list[Tensor | None] = [None, None]
    for i, (rows, positions, used, factors) in enumerate(routings):
        if rows is not None and factors is not None and ctx.needs_input_grad[3 * i + 3]:
            grad_weights[i] = _gather_dot(hidden_states, rows, positions, used, None)[1].to(factors.dtype)
    given = [routing for routing in routings if routing[0] is not None and routing[1] is not None]
    if given and ctx.needs_input_grad[0]:
        second = given[1] if len(given) == 2 else (None, None, None, None)
        grad_shared = _combine(grad_shared, None, *given[0], *second, ctx.length)
    return grad_shared, None, None, grad_weights[0], None, None, grad_weights[1]


def _backward_gather(ctx: Any, grad: Tensor | None, grad2: Tensor | None) -> tuple[Tensor | None, ...]:
    return _gather_gradients(ctx, None, grad, grad2)


_gather = Operator(
    "token_gather",
    gather_reference,
    _gather_results,
    gather_into,
    ComposedGradient(_save_gather, _backward_gather),
)


class _ShareAndGather(torch.autograd.Function):
    """`_gather` that also hands its states on, so that both gradients of the states meet in one kernel."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, *routings: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        rows, rows2 = _gather.implementation(hidden_states, *routings)
        ctx.set_materialize_grads(False)
        _save_gather(ctx, (hidden_states, *routings), (rows, rows2))
        return hidden_states, rows, rows2

    @staticmethod
    def backward(
        ctx: Any, grad_shared: Tensor | None, grad: Tensor | None, grad2: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        check_backward_of_kernels("token_gather", (grad_shared, grad, grad2))
        return _gather_gradients(ctx, grad_shared, grad, grad2)


def combine_branches(
    residual: Tensor,
    light: Tensor,
    heavy: Tensor,
    indices: Tensor,
    valid: Tensor,
    weights: Tensor,
    kernel_backend: str = "auto",
) -> Tensor:
    """`residual + light`, and `weights * heavy` added at the routed positions; summed in fp32, rounded once.

    Args:
        residual: `[batch, n, d]`.
        light: `[batch, n, d]`.
        heavy: `[batch, k, d]`.
        indices, valid, weights: the routing, each `[batch, k]` (int64, bool, fp32); a position at most once.

    Returns:
        `[batch, n, d]` in the residual's dtype, a new tensor.
    """
    first, second = (heavy, indices, valid, weights), (None, None, None, None)
    return _combine(residual, light, *first, *second, residual.shape[1], kernel_backend=kernel_backend)


def scatter_add_tokens(
    base: Tensor,
    updates: Tensor,
    indices: Tensor,
    valid: Tensor,
    weights: Tensor | None = None,
    kernel_backend: str = "auto",
) -> Tensor:
    """`base` with `weights * updates` added at the routed positions; `combine_branches` without a light branch.

    Args:
        base: `[batch, n, d]`.
        updates: `[batch, k, d]`.
        indices, valid, weights: the routing, each `[batch, k]` (int64, bool, fp32 or None for 1).

    Returns:
        `[batch, n, d]` in the base's dtype, a new tensor.
    """
    first, second = (updates, indices, valid, weights), (None, None, None, None)
    return _combine(base, None, *first, *second, base.shape[1], kernel_backend=kernel_backend)


def share_and_gather(
    hidden_states: Tensor,
    *routings: tuple[Tensor, Tensor, Tensor | None],
    kernel_backend: str = "auto",
) -> tuple[Tensor, ...]:
    """The rows of one or two routings' tokens, times their weights where given; unused slots are rows of zeros.

    Use the returned hidden states, which are the given ones, for the light branch: the backward then adds the
    routed tokens' gradients to the light branch's in one pass, instead of one zero-filled `[batch, n, d]` tensor
    and one addition for each routing.

    Args:
        hidden_states: `[batch, n, d]`.
        routings: one or two of `(indices, valid, weights)`, each `[batch, k]`: int64, ascending over the used slots,
            which come first; bool, which slots are used; and fp32, whose product with the rows is taken in fp32 and
            rounded once, or None.

    Returns:
        The hidden states, then each routing's tokens `[batch, k, d]` in their dtype.
    """
    first, *rest = routings
    second = rest[0] if rest else (None, None, None)
    if records_now() and uses_triton(hidden_states, kernel_backend):
        hidden_states, *tokens = _ShareAndGather.apply(hidden_states, *first, *second)
    else:
        tokens = _gather(hidden_states, *first, *second, kernel_backend=kernel_backend)
    return hidden_states, *tokens[: len(routings)]
