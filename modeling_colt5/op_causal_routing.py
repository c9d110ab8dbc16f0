"""Strictly causal routing over windows: gates by a threshold from complete windows, and pools of routed keys."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .op_causal_routing_reference import causal_gates as gates_reference
from .op_causal_routing_reference import causal_gates_backward as gates_backward_reference
from .op_causal_routing_reference import pool_candidates as candidates_reference
from .op_causal_routing_reference import pool_candidates_backward as candidates_backward_reference
from .op_causal_routing_reference import pool_gather as gather_reference
from .op_causal_routing_reference import pool_gather_backward as gather_backward_reference
from .op_routing import RoutedTokens, route
from .run_backend import uses_triton
from .run_operator import Operator, kernel_or

KERNELS: dict[str, Callable[..., Any]] = {}
# without triton `uses_triton` is False, and nothing below looks for a kernel
with contextlib.suppress(ImportError):
    from .op_gates_triton import LONGEST_WINDOW, causal_gates_backward
    from .op_gates_triton import causal_gates as gates_kernel
    from .op_pools_triton import (
        LONGEST_LIST,
        pool_candidates,
        pool_candidates_backward,
        pool_gather,
        pool_gather_backward,
    )

    KERNELS = {
        "causal_gates": gates_kernel,
        "causal_gates_backward": causal_gates_backward,
        "pool_candidates": pool_candidates,
        "pool_candidates_backward": pool_candidates_backward,
        "pool_gather": pool_gather,
        "pool_gather_backward": pool_gather_backward,
    }


_kernel_or = partial(kernel_or, KERNELS)


@dataclass
class Gates:
    """Which tokens of each window go through a heavy branch.

    Args:
        weights: fp32 [batch, windows, window], 0 where a token is not routed.
        routed: bool, likewise.
        thresholds: fp32 [batch, windows + 1, 2], what each window, and the one after the last, was handed: the least
            score that is routed, and the soft top-k's threshold.
        tokens: the routed tokens in slots, in rows [batch * windows].
    """

    weights: Tensor
    routed: Tensor
    thresholds: Tensor
    tokens: RoutedTokens


@dataclass
class Pools:
    """The keys/values that each window's heavy attention reads, out of all windows before it.

    Args:
        tokens: [rows, windows + 1, size], for each window and the one after the last. `indices` are into the scores,
            or where there is an initial pool into that and the scores, one behind the other.
        following: int32 [rows, windows + 1, size + window]: of the slots of the pool before, and of the tokens of the
            window before, the slot in this pool; -1 for none.
    """

    tokens: RoutedTokens
    following: Tensor


# causal_gates


def _fake_gates(
    scores: Tensor, past: Tensor | None, total: Tensor, carried: Tensor | None, target: int, capacity: int, *_: Any
) -> tuple[Tensor, ...]:
    batch, windows, window = scores.shape
    dtype = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.new_empty((batch, windows, window), dtype=dtype)
    slots = scores.new_empty((batch * windows, capacity), dtype=dtype)
    thresholds = scores.new_empty((batch, windows + 1, 2), dtype=dtype)
    indices = torch.empty_like(slots, dtype=torch.int64)
    return weights, weights.bool(), thresholds, indices, slots, slots.bool()


def _save_gates(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    weights, routed, thresholds, indices, _, valid = outputs
    ctx.capacity, ctx.epsilon = inputs[5], inputs[7]
    ctx.mark_non_differentiable(routed, thresholds, indices, valid)
    ctx.save_for_backward(inputs[0], weights, routed, thresholds)


def _autograd_gates(ctx: Any, grad_weights: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad = None
    if grad_weights is not None or grads[3] is not None:
        grad = _gates_backward(grad_weights, grads[3], *ctx.saved_tensors, ctx.capacity, ctx.epsilon)
    return grad, *[None] * 8


_gates_backward = Operator(
    "causal_gates_backward(Tensor? grad_weights, Tensor? grad_slots, Tensor scores, Tensor weights, Tensor routed, "
    "Tensor thresholds, int capacity, float epsilon) -> Tensor",
    _kernel_or(gates_backward_reference, operand=2),
    lambda grad_weights, grad_slots, scores, *_: scores.new_empty(scores.shape),
)
_gates = Operator(
    "causal_gates(Tensor scores, Tensor? past, Tensor total, Tensor? carried, int target, int capacity, "
    "float soft_target, float epsilon, bool fill_first) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _kernel_or(gates_reference),
    _fake_gates,
    _save_gates,
    _autograd_gates,
)


def causal_gates(
    scores: Tensor,
    past: Tensor | None,
    total: Tensor,
    carried: Tensor | None,
    *,
    target: int,
    capacity: int,
    soft_topk_ratio: float,
    epsilon: float,
    fill_first: bool,
    kernel_backend: str = "auto",
) -> Gates:
    """Route the tokens of each window that reach the threshold of the window before, in order, up to a capacity.

    A token is routed if its score is at least the `target`-th largest of the complete window before it, and fewer than
    `capacity` tokens before it in its window were. Its weight is min(1, exp((s - t) / ε)) with the t that the soft
    top-k of the window before found. Both come from complete windows: no token sees a later one.

    Args:
        scores: [batch, windows, window], of tokens by rank.
        past: int64 [batch], how many tokens came before: the first of them that falls into window 0 here has slot 0.
            They count for the capacity and are not routed again. None where there are none.
        total: int64 [batch], real tokens, those included; the rest of the last window holds anything finite.
        carried: fp32 [batch, 2], what window 0 was handed; None where it is the row's very first.
        target: tokens to route on average.
        capacity: the most to route in a window.
        soft_topk_ratio: size of the soft top-k over the target.
        epsilon: its temperature.
        fill_first: whether a row's very first window, which nothing was handed to, routes `target` evenly spaced
            tokens with a weight of 1; else it routes none.
        kernel_backend: as in `uses_triton` of run_backend.py.
    """
    takes = uses_triton(scores, kernel_backend) and scores.shape[2] <= LONGEST_WINDOW
    # a configuration's ratio may be a whole number, which a kernel would take for one of integers
    soft_target = float(soft_topk_ratio * target)
    run = _gates if takes else gates_reference
    weights, routed, thresholds, indices, slot_weights, valid = run(
        scores, past, total, carried, target, capacity, soft_target, epsilon, fill_first
    )
    return Gates(weights, routed, thresholds, RoutedTokens(indices, slot_weights, valid))


# pool_candidates


def _fake_candidates(
    scores: Tensor, initial: Tensor | None, initial_valid: Tensor | None, window: int, size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    candidate_scores = scores.new_empty((scores.shape[0], scores.shape[1] // window + 1, size + window))
    dtypes = (torch.int64, torch.bool, torch.int32)
    candidates, present, following = (torch.empty_like(candidate_scores, dtype=dtype) for dtype in dtypes)
    return candidate_scores, candidates, present, following


def _save_candidates(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    _, initial, _, ctx.window, size = inputs
    ctx.base = 0 if initial is None else size
    ctx.mark_non_differentiable(*outputs[1:])
    ctx.save_for_backward(*outputs[1:])


def _autograd_candidates(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is not None:
        grad = _candidates_backward(grad, *ctx.saved_tensors, ctx.window, ctx.base)
    return grad, None, None, None, None


_candidates_backward = Operator(
    "pool_candidates_backward(Tensor grad, Tensor candidates, Tensor present, Tensor following, int window, int base) "
    "-> Tensor",
    _kernel_or(candidates_backward_reference),
    lambda grad, candidates, present, following, window, base: grad.new_empty(
        (grad.shape[0], (grad.shape[1] - 1) * window)
    ),
)
_candidates = Operator(
    "pool_candidates(Tensor scores, Tensor? initial, Tensor? initial_valid, int window, int size) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _kernel_or(candidates_reference),
    _fake_candidates,
    _save_candidates,
    _autograd_candidates,
)


def routed_pools(
    scores: Tensor,
    window: int,
    size: int,
    initial: tuple[Tensor, RoutedTokens] | None,
    *,
    kernel_backend: str = "auto",
    **settings: Any,
) -> Pools:
    """The keys/values that each window's heavy attention reads, out of all windows before it.

    The pool of window j is pool_j = top(pool_{j-1} ∪ window_{j-1}), which is the top of all windows before j, with the
    weights of the soft top-k over pool_{j-1} ∪ window_{j-1}.

    Args:
        scores: fp32 [rows, windows * window].
        window: tokens of a window.
        size: tokens of a pool.
        initial: where window 0 was handed a pool: its scores [rows, size], and what it is, used slots first. None for
            none.
        kernel_backend: as in `uses_triton` of run_backend.py.
        settings: keywords of `route`.
    """
    rows = scores.shape[0]
    known: tuple[Tensor | None, Tensor | None] = (None, None)
    if initial is not None:
        known = (initial[0].to(scores.dtype), initial[1].valid)
    takes = uses_triton(scores, kernel_backend) and max(window, size) <= LONGEST_LIST
    run = _candidates if takes else candidates_reference
    candidate_scores, candidates, present, following = run(scores, *known, window, size)
    budget = torch.full((rows * candidates.shape[1],), size, device=scores.device)
    chosen = route(
        candidate_scores.flatten(0, 1),
        budget,
        size,
        mask=present.flatten(0, 1),
        kernel_backend=kernel_backend,
        **settings,
    )
    shape = (rows, -1, size)
    indices = candidates.flatten(0, 1).gather(-1, chosen.indices).view(shape)
    weights, valid = chosen.weights.view(shape), chosen.valid.view(shape)
    if initial is not None:
        first = initial[1]
        slots = torch.arange(size, device=scores.device).expand(rows, 1, size)
        indices = torch.cat([slots, indices[:, 1:]], 1)
        weights = torch.cat([first.weights[:, None].to(weights.dtype), weights[:, 1:]], 1)
        valid = torch.cat([first.valid[:, None], valid[:, 1:]], 1)
    return Pools(RoutedTokens(indices, weights, valid), following)


# pool_gather


def _fake_pool_gather(key: Tensor, value: Tensor, indices: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = (key.shape[0], indices.shape[1] - 1, indices.shape[2], *key.shape[2:])
    return key.new_empty(shape), value.new_empty(shape)


def _fake_pool_gather_backward(
    grad_keys: Tensor, grad_values: Tensor, key: Tensor, value: Tensor, indices: Tensor, weights: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return key.new_empty(key.shape), value.new_empty(value.shape), weights.new_empty(weights.shape)


def _save_pool_gather(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.base = inputs
    ctx.save_for_backward(*tensors)
    ctx.shape = outputs[0].shape


def _autograd_pool_gather(ctx: Any, grad_keys: Tensor | None, grad_values: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grad_keys, grad_values = (
        saved[0].new_zeros(ctx.shape) if grad is None else grad for grad in (grad_keys, grad_values)
    )
    grad_key, grad_value, grad_weights = _pool_gather_backward(grad_keys, grad_values, *saved, ctx.base)
    return grad_key, grad_value, None, grad_weights, None, None, None


_POOL = "Tensor key, Tensor value, Tensor indices, Tensor weights, Tensor valid, Tensor following, int base"
_pool_gather_backward = Operator(
    f"pool_gather_backward(Tensor grad_keys, Tensor grad_values, {_POOL}) -> (Tensor, Tensor, Tensor)",
    _kernel_or(gather_backward_reference),
    _fake_pool_gather_backward,
)
_pool_gather = Operator(
    f"pool_gather({_POOL}) -> (Tensor, Tensor)",
    _kernel_or(gather_reference),
    _fake_pool_gather,
    _save_pool_gather,
    _autograd_pool_gather,
)


def gather_pools(
    key: Tensor, value: Tensor, pools: Pools, base: int, kernel_backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`weights * states[indices]` of every window's pool, for the keys and the values; zeros at unused slots.

    A token is in the pools of many windows: its gradients are summed in fp32, in a fixed order.

    Args:
        key, value: [batch, n, heads, d_kv]. Of the last window's tokens, which no pool read here holds, any may lack.
        pools: in rows [batch].
        base: how many of the n tokens are the initial pool's; 0 without one.
        kernel_backend: as in `uses_triton` of run_backend.py.

    Returns:
        [batch, windows, size, heads, d_kv] in the states' dtype: all pools but the last, which later windows read.
    """
    run = _pool_gather if uses_triton(key, kernel_backend) else gather_reference
    tokens = pools.tokens
    return run(key, value, tokens.indices, tokens.weights, tokens.valid, pools.following, base)
