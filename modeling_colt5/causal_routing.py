"""Strictly causal routing over windows: gates by a threshold from complete windows, and pools of routed keys."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .routing import RoutedTokens, route
from .soft_topk_reference import mask_scores, solve_exactly

# elements of a gather's backward that are in fp32 at a time
CHUNK_ELEMENTS = 2**26


@dataclass
class Gates:
    """Which tokens of each window go through a heavy branch.

    Args:
        weights: fp32 [batch, windows, window], 0 where a token is not routed.
        routed: bool, likewise.
        thresholds: fp32 [batch, windows + 1, 2], what each window, and the one after the last, was handed: the least
            score that is routed, and the soft top-k's threshold.
    """

    weights: Tensor
    routed: Tensor
    thresholds: Tensor


def window_thresholds(scores: Tensor, target: int, soft_target: float, epsilon: float) -> Tensor:
    """What complete windows hand on to the next: their `target`-th largest score, and the t of their soft top-k.

    Args:
        scores: [rows, window].
        target: how many tokens a window routes on average.
        soft_target: k of the soft top-k.
        epsilon: its temperature.

    Returns:
        [rows, 2]. t = -∞ where k reaches the window. Its gradient is the exact one, dt/ds_i = q_i / Σ q over the
        weights q below 1 (docs/soft_topk.md).
    """
    with torch.no_grad():
        values = mask_scores(scores, None)
        least = values.topk(target, -1).values[:, -1]
        k = values.new_full((len(values),), soft_target)
        state = solve_exactly(values, k, epsilon, min(values.shape[1], math.ceil(soft_target)))
        centre, offset, mass = state.split(1, -1)
        threshold = (centre + epsilon * offset)[:, 0]
        free = ((values - centre) / epsilon - offset).exp()
        share = free.masked_fill(~(free < 1), 0) / mass.masked_fill(mass == 0, 1)
    if scores.requires_grad:
        threshold = threshold + (share * (scores - scores.detach())).sum(-1)
    return torch.stack([least, threshold.to(least.dtype)], -1)


def causal_gates(
    scores: Tensor,
    real: Tensor,
    first_window: Tensor,
    carried: Tensor | None,
    target: int,
    capacity: int,
    soft_topk_ratio: float,
    epsilon: float,
    fill_first: bool,
) -> Gates:
    """Route the tokens of each window that reach the threshold of the window before, in order, up to a capacity.

    A token is routed if its score is at least the `target`-th largest of the complete window before it, and fewer than
    `capacity` tokens before it in its window were. Its weight is min(1, exp((s - t) / ε)) with the t that the soft
    top-k of the window before found. Both come from complete windows: no token sees a later one.

    Args:
        scores: [batch, windows, window].
        real: bool, likewise; only complete windows hand on what anyone reads.
        first_window: int64 [batch], the number of each row's first window.
        carried: [batch, 2], what the first window was handed; None where it is the row's window 0.
        target: tokens to route on average.
        capacity: the most to route in a window.
        soft_topk_ratio: size of the soft top-k over the target.
        epsilon: its temperature.
        fill_first: whether a row's window 0, which nothing was handed to, routes `target` evenly spaced tokens with
            a weight of 1; else it routes none.
    """
    batch, windows, window = scores.shape
    soft_target = soft_topk_ratio * target
    handed = window_thresholds(scores.flatten(0, 1), target, soft_target, epsilon).view(batch, windows, 2)
    start = torch.zeros_like(handed[:, :1]) if carried is None else carried[:, None].to(handed.dtype)
    thresholds = torch.cat([start, handed], 1)
    least, soft = thresholds[:, :-1].unsqueeze(-2).unbind(-1)

    is_first = (first_window[:, None] + torch.arange(windows, device=scores.device) == 0)[..., None]
    slot = torch.arange(window, device=scores.device)
    evenly = (slot + 1) * target // window > slot * target // window
    routed = torch.where(is_first, evenly & fill_first, scores.detach() >= least.detach()) & real
    routed = routed & (routed.cumsum(-1) <= capacity)
    weights = ((scores - soft) / epsilon).clamp(max=0).exp()
    weights = torch.where(is_first, torch.ones_like(weights), weights).masked_fill(~routed, 0)
    return Gates(weights, routed, thresholds)


def fill_slots(routed: Tensor, weights: Tensor, capacity: int) -> RoutedTokens:
    """The routed tokens of each row in slots, as `route` gives them.

    Args:
        routed: bool [rows, n], at most `capacity` True in each.
        weights: [rows, n].
    """
    rows, n = routed.shape
    slot = (routed.cumsum(-1) - 1).masked_fill(~routed, capacity)
    # the column past the last slot takes what is not routed and is cut off
    indices = torch.full((rows, capacity + 1), n - 1, dtype=torch.int64, device=routed.device)
    indices.scatter_(-1, slot, torch.arange(n, device=routed.device).expand(rows, n))
    valid = torch.arange(capacity, device=routed.device) < routed.sum(-1, keepdim=True)
    indices = indices[:, :capacity].masked_fill(~valid, n - 1)
    return RoutedTokens(indices, weights.gather(-1, indices).masked_fill(~valid, 0), valid)


def prefix_top(scores: Tensor, window: int, size: int, initial: Tensor | None) -> Tensor:
    """The `size` largest scores of all windows before each one, ties to the earlier token.

    The largest of a prefix merge: the largest of a ∪ b are among the largest of a and the largest of b. So they are
    found for all windows by doubling, in log2(windows) sorts of [rows, windows, 2 · size], not by a walk.

    Args:
        scores: [rows, windows * window], finite.
        window: tokens of a window.
        size: how many.
        initial: [rows, size], scores of the pool that window 0 was handed, -inf at unused slots; None for none.

    Returns:
        int64 [rows, windows, size]: indices into `initial` ⊕ `scores`, ascending, -1 (first) for what is not there.
    """
    rows, length = scores.shape
    windows, base = length // window, 0 if initial is None else size
    if initial is None:
        first = (scores.new_full((rows, 1, size), -torch.inf), torch.full((rows, 1, size), -1, device=scores.device))
    else:
        slots = torch.arange(size, device=scores.device).expand(rows, size)
        first = (initial[:, None], slots.masked_fill(initial == -torch.inf, -1)[:, None])
        if windows > 1:
            # stable, so that equal scores stay in order of position
            value, place = first[0].sort(dim=-1, descending=True, stable=True)
            first = (value, first[1].gather(-1, place))
    if windows == 1:
        return first[1].sort(-1).values
    value, place = scores[:, :-window].reshape(rows, windows - 1, window).sort(dim=-1, descending=True, stable=True)
    place = place + base + window * torch.arange(windows - 1, device=scores.device)[:, None]
    missing = max(0, size - window)
    values = torch.cat([first[0], F.pad(value[..., :size], (0, missing), value=-torch.inf)], 1)
    places = torch.cat([first[1], F.pad(place[..., :size], (0, missing), value=-1)], 1)
    step = 1
    while step < windows:
        # the earlier tokens stand first, so that a stable sort gives ties to them
        value = torch.cat([values[:, :-step], values[:, step:]], -1)
        place = torch.cat([places[:, :-step], places[:, step:]], -1)
        value, chosen = value.sort(dim=-1, descending=True, stable=True)
        values = torch.cat([values[:, :step], value[..., :size]], 1)
        places = torch.cat([places[:, :step], place.gather(-1, chosen[..., :size])], 1)
        step *= 2
    return places.sort(-1).values


def routed_pools(
    scores: Tensor, window: int, size: int, initial: tuple[Tensor, RoutedTokens] | None, **settings: Any
) -> RoutedTokens:
    """The keys/values that each window's heavy attention reads, out of all windows before it.

    The pool of window j is pool_j = top(pool_{j-1} ∪ window_{j-1}), which is the top of all windows before j, with the
    weights of the soft top-k over pool_{j-1} ∪ window_{j-1}.

    Args:
        scores: fp32 [rows, windows * window].
        window: tokens of a window.
        size: tokens of a pool.
        initial: where window 0 was handed a pool: its scores [rows, size], and what it is. None for none.
        settings: keywords of `route`.

    Returns:
        [rows, windows + 1, size], for each window and the one after the last. `indices` are into `scores`, or where
        there is an initial pool into that and `scores`, one behind the other.
    """
    rows, length = scores.shape
    windows = length // window
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    limits = torch.finfo(wide.dtype)
    known = wide if initial is None else torch.cat([initial[0].to(wide.dtype), wide], 1)
    with torch.no_grad():
        finite = wide.nan_to_num(limits.max, limits.max, limits.min).clamp(limits.min, limits.max)
        pool = None if initial is None else initial[0].to(wide.dtype).masked_fill(~initial[1].valid, -torch.inf)
        before = prefix_top(finite, window, size, pool)
        base = known.shape[1] - length
        tokens = torch.arange(base, base + length, device=scores.device).view(1, windows, window)
        candidates = torch.cat([before, tokens.expand(rows, -1, -1)], -1)
        if initial is None:
            # window 0 has an empty pool of the same making, so that its parameters are part of any graph
            candidates = torch.cat([torch.full_like(candidates[:, :1], -1), candidates], 1)
        candidates = candidates.flatten(0, 1)
        present = candidates >= 0
        candidates = candidates.clamp(min=0)
    candidate_scores = known.gather(1, candidates.view(rows, -1)).view(candidates.shape)
    budget = torch.full((len(candidates),), size, device=scores.device)
    chosen = route(candidate_scores, budget, size, mask=present, **settings)
    shape = (rows, -1, size)
    pools = RoutedTokens(
        candidates.gather(-1, chosen.indices).view(shape), chosen.weights.view(shape), chosen.valid.view(shape)
    )
    if initial is None:
        return pools
    first = initial[1]
    slots = torch.arange(size, device=scores.device).expand(rows, 1, size)
    return RoutedTokens(
        torch.cat([slots, pools.indices], 1),
        torch.cat([first.weights[:, None].to(pools.weights.dtype), pools.weights], 1),
        torch.cat([first.valid[:, None], pools.valid], 1),
    )


def _flat(index: Tensor, length: int) -> Tensor:
    return (index + torch.arange(index.shape[0], device=index.device)[:, None] * length).flatten()


class _GatherScaled(torch.autograd.Function):
    """A token is in the pools of many windows: its gradient is summed in fp32, whatever the states' dtype."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(states, index, weights)
        rows = states.flatten(0, 1).index_select(0, _flat(index, states.shape[1]))
        return rows.view(*index.shape, *states.shape[2:]) * weights.to(states.dtype)[..., None, None]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        states, index, weights = ctx.saved_tensors
        wide = torch.promote_types(states.dtype, torch.float32)
        rows = states.flatten(2).flatten(0, 1)
        sums = torch.zeros(rows.shape, dtype=wide, device=rows.device)
        chunk = max(1, CHUNK_ELEMENTS // (rows.shape[1] * len(index)))
        dots = []
        for part, part_weights, part_grad in zip(
            index.split(chunk, 1), weights.split(chunk, 1), grad.flatten(2).split(chunk, 1), strict=True
        ):
            flat, update = _flat(part, states.shape[1]), part_grad.to(wide)
            dots.append((update * rows.index_select(0, flat).view(update.shape)).sum(-1))
            sums.index_add_(0, flat, (update * part_weights[..., None]).flatten(0, 1))
        return sums.to(states.dtype).view(states.shape), None, torch.cat(dots, 1).to(weights.dtype)


def gather_scaled(states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """`weights * states[index]`, for tokens that are gathered many times.

    Args:
        states: [batch, n, heads, d_kv].
        index: int64 [batch, k].
        weights: fp32 [batch, k].

    Returns:
        [batch, k, heads, d_kv] in the states' dtype.
    """
    return _GatherScaled.apply(states, index, weights)
