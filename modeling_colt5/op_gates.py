"""Strictly causal gates over windows, by a threshold from complete windows: in PyTorch, and as an operator."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .kernel_backend import accumulation_dtype, triton_is_available
from .op_routing import RoutedTokens, dense_start_weights
from .op_soft_topk import mask_scores, solve_exactly
from .run_operator import Gradient, Launch, Operator

causal_gates_into: Launch = None
causal_gates_backward_into: Launch = None
if triton_is_available():
    from .op_gates_triton import LONGEST_WINDOW, causal_gates_backward_into, causal_gates_into


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


def window_thresholds(scores: Tensor, target: int, soft_target: float | Tensor, epsilon: float) -> Tensor:
    """What complete windows hand on to the next: their `target`-th largest score, and the t of their soft top-k.

    Args:
        scores: [rows, window].
        target: how many tokens a window routes on average.
        soft_target: k of the soft top-k; a number, or fp32 [].
        epsilon: its temperature.

    Returns:
        [rows, 2]. t = -∞ where k reaches the window. It alone has a gradient (docs/soft_topk.md).
    """
    values = mask_scores(scores, None)
    least = values.detach().topk(target, -1).values[:, -1]
    rows, window = values.shape
    if isinstance(soft_target, Tensor):
        k, largest = soft_target.to(values.dtype).expand(rows), window
    else:
        k, largest = values.new_full((rows,), soft_target), min(window, math.ceil(soft_target))
    centre, _, offset = solve_exactly(values, k, epsilon, largest)
    return torch.stack([least, (centre + epsilon * offset)[:, 0]], -1)


def fill_slots(routed: Tensor, weights: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """The routed tokens of each row in slots: `indices`, `weights` and `valid` as in `RoutedTokens`.

    Args:
        routed: bool [rows, n], at most `capacity` True in each.
        weights: [rows, n].
    """
    rows, n = routed.shape
    slot = (routed.cumsum(-1) - 1).masked_fill(~routed, capacity)
    # The column past the last slot takes what is not routed, and is cut off.
    indices = torch.full((rows, capacity + 1), n - 1, dtype=torch.int64, device=routed.device)
    # A copy, because `torch.vmap` writes nothing that differs by sample into a tensor that all samples share.
    indices = indices.scatter(-1, slot, torch.arange(n, device=routed.device).expand(rows, n))
    valid = torch.arange(capacity, device=routed.device) < routed.sum(-1, keepdim=True)
    indices = indices[:, :capacity].masked_fill(~valid, n - 1)
    return indices, weights.gather(-1, indices).masked_fill(~valid, 0), valid


def causal_gates_reference(
    scores: Tensor,
    past: Tensor | None,
    total: Tensor,
    carried: Tensor | None,
    target: int,
    capacity: int,
    soft_target: float,
    epsilon: float,
    fill_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `causal_gates` returns, whose docstring says what the arguments are.

    Returns:
        weights and routed [batch, windows, window], thresholds [batch, windows + 1, 2]; and what `fill_slots` makes of
        them, in rows [batch * windows].
    """
    batch, windows, window = scores.shape
    handed = window_thresholds(scores.flatten(0, 1), target, soft_target, epsilon).view(batch, windows, 2)
    start = torch.zeros_like(handed[:, :1]) if carried is None else carried[:, None].to(handed.dtype)
    thresholds = torch.cat([start, handed], 1)
    least, soft = thresholds[:, :-1].unsqueeze(-2).unbind(-1)

    slot = torch.arange(window, device=scores.device)
    starts = torch.arange(windows, device=scores.device)[:, None] * window
    before = torch.zeros_like(total) if past is None else past
    ranks = (before // window * window)[:, None, None] + starts + slot
    is_first = ranks < window
    evenly = (slot + 1) * target // window > slot * target // window
    reach = torch.where(is_first, evenly & fill_first, scores.detach() >= least.detach())
    reach = reach & (ranks < total[:, None, None])
    # Tokens before the new ones count for the capacity too.
    routed = reach & (reach.cumsum(-1) <= capacity) & (ranks >= before[:, None, None])
    weights = ((scores - soft) / epsilon).clamp(max=0).exp()
    weights = torch.where(is_first, torch.ones_like(weights), weights).masked_fill(~routed, 0)
    return weights, routed, thresholds, *fill_slots(routed.flatten(0, 1), weights.flatten(0, 1), capacity)


def _gates_results(
    scores: Tensor, past: Tensor | None, total: Tensor, carried: Tensor | None, target: int, capacity: int, *_: Any
) -> tuple[Tensor, ...]:
    batch, windows, window = scores.shape
    dtype = accumulation_dtype(scores.dtype)
    weights = scores.new_empty((batch, windows, window), dtype=dtype)
    slots = scores.new_empty((batch * windows, capacity), dtype=dtype)
    thresholds = scores.new_empty((batch, windows + 1, 2), dtype=dtype)
    routed, valid = (torch.empty_like(part, dtype=torch.bool) for part in (weights, slots))
    return weights, routed, thresholds, torch.empty_like(slots, dtype=torch.int64), slots, valid


_gates = Operator(
    "causal_gates",
    causal_gates_reference,
    _gates_results,
    causal_gates_into,
    Gradient(
        inputs=("scores",),
        results=("weights", "routed", "thresholds", "indices", "slot_weights", "valid"),
        through=("weights", "slot_weights"),
        kept=("weights", "routed", "thresholds"),
        launch=causal_gates_backward_into,
        copied=("past", "total", "carried"),
    ),
    fits=lambda scores, *_: scores.shape[2] <= LONGEST_WINDOW,
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
        kernel_backend: as in `uses_triton` of kernel_backend.py.
    """
    # The product is made a float, because a kernel would take a configuration's whole number for an integer.
    soft_target = float(soft_topk_ratio * target)
    weights, routed, thresholds, indices, slot_weights, valid = _gates(
        scores, past, total, carried, target, capacity, soft_target, epsilon, fill_first, kernel_backend=kernel_backend
    )
    return Gates(weights, routed, thresholds, RoutedTokens(indices, slot_weights, valid))


def dense_gates(scores: Tensor, total: Tensor, soft_target: Tensor, epsilon: float, progress: Tensor) -> Gates:
    """What `causal_gates` gives during a dense start: every token is routed, with a weight of the budget's size.

    The weight is min(1, exp((s - t) / ε)) with the t of the window before, as there, for a soft top-k of size
    `soft_target`. A row's very first window, which nothing was handed to, has equal weights of that sum, at most 1
    each.

    Args:
        scores: [batch, windows, window], of a whole sequence's tokens by rank.
        total: int64 [batch], real tokens; the rest of the last window holds anything finite.
        soft_target: fp32 [], above 0, what the weights of a window sum to on average.
        epsilon: the soft top-k's temperature.
        progress: fp32 [], how far the dense start has come; see `dense_start_weights`.
    """
    batch, windows, window = scores.shape
    values = mask_scores(scores.detach(), None)
    handed = window_thresholds(values.flatten(0, 1), window, soft_target, epsilon).view(batch, windows, 2)
    thresholds = torch.cat([torch.zeros_like(handed[:, :1]), handed], 1)
    weights = ((values - thresholds[:, :-1, 1:]) / epsilon).clamp(max=0).exp()
    weights = dense_start_weights(weights, scores, epsilon, progress)
    ranks = torch.arange(windows * window, device=scores.device).view(windows, window)
    # a budget of all tokens has a soft top-k above their number
    weights = torch.where(ranks < window, (soft_target / window).clamp(max=1).to(weights.dtype), weights)
    routed = ranks < total[:, None, None]
    weights = weights.masked_fill(~routed, 0)
    slots = fill_slots(routed.flatten(0, 1), weights.flatten(0, 1), window)
    return Gates(weights, routed, thresholds, RoutedTokens(*slots))
