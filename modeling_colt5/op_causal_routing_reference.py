"""Strictly causal routing over windows, in PyTorch: gates, pools of routed keys, and their states."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .op_soft_topk import mask_scores, solve_exactly

# candidates that stand for no token sort behind all others
NO_TOKEN = 2**31 - 1


def window_thresholds(scores: Tensor, target: int, soft_target: float, epsilon: float) -> Tensor:
    """What complete windows hand on to the next: their `target`-th largest score, and the t of their soft top-k.

    Args:
        scores: [rows, window].
        target: how many tokens a window routes on average.
        soft_target: k of the soft top-k.
        epsilon: its temperature.

    Returns:
        [rows, 2]. t = -∞ where k reaches the window. It alone has a gradient (docs/soft_topk.md).
    """
    values = mask_scores(scores, None)
    least = values.detach().topk(target, -1).values[:, -1]
    k = values.new_full((len(values),), soft_target)
    centre, _, offset = solve_exactly(values, k, epsilon, min(values.shape[1], math.ceil(soft_target)))
    return torch.stack([least, (centre + epsilon * offset)[:, 0]], -1)


def fill_slots(routed: Tensor, weights: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """The routed tokens of each row in slots: `indices`, `weights` and `valid` as in `RoutedTokens`.

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
    return indices, weights.gather(-1, indices).masked_fill(~valid, 0), valid


def causal_gates(
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
    """`causal_gates` of op_causal_routing.py, whose docstring says what the arguments are.

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
    # earlier tokens count for the capacity
    routed = reach & (reach.cumsum(-1) <= capacity) & (ranks >= before[:, None, None])
    weights = ((scores - soft) / epsilon).clamp(max=0).exp()
    weights = torch.where(is_first, torch.ones_like(weights), weights).masked_fill(~routed, 0)
    return weights, routed, thresholds, *fill_slots(routed.flatten(0, 1), weights.flatten(0, 1), capacity)


def causal_gates_backward(
    grad_weights: Tensor | None,
    grad_slots: Tensor | None,
    scores: Tensor,
    weights: Tensor,
    routed: Tensor,
    thresholds: Tensor,
    capacity: int,
    epsilon: float,
) -> Tensor:
    """The scores' gradient [batch, windows, window], from those of weights and of the slots' weights.

    A weight below 1 gives g w / ε to its score and takes it from t, which gives it to the window before: q / Σ q of it
    to each score, with q that window's own weights below 1 at t.

    Args:
        grad_weights: [batch, windows, window] or None.
        grad_slots: [batch * windows, capacity] or None.
        scores, weights, routed, thresholds: what `causal_gates` had and returned.
        capacity, epsilon: as there.
    """
    grad = torch.zeros_like(weights) if grad_weights is None else grad_weights
    if grad_slots is not None:
        slots = (routed.cumsum(-1) - 1).clamp(min=0).flatten(0, 1)
        grad = grad + grad_slots.gather(-1, slots).view(grad.shape).masked_fill(~routed, 0)
    falling = (grad * weights / epsilon).masked_fill(weights >= 1, 0)
    free = ((scores - thresholds[:, 1:, 1:]) / epsilon).exp()
    free = free.masked_fill(~(free < 1), 0)
    mass = free.sum(-1, keepdim=True)
    handed = F.pad(falling.sum(-1, keepdim=True)[:, 1:], (0, 0, 0, 1))
    return (falling - free / mass.masked_fill(mass == 0, 1) * handed).to(scores.dtype)


def prefix_top(scores: Tensor, window: int, size: int, initial: Tensor | None, initial_valid: Tensor | None) -> Tensor:
    """The `size` largest scores of all windows before each one, ties to the earlier token.

    The largest of a prefix merge: the largest of a ∪ b are among the largest of a and the largest of b. So they are
    found for all windows by doubling, in log2(windows) sorts of [rows, windows, 2 · size], not by a walk. What is
    sorted is each token's place in the order of the whole row: no two are equal, and it says which token it is.

    Args:
        scores: [rows, windows * window]; NaN counts as the largest.
        window: tokens of a window.
        size: how many.
        initial: [rows, size], scores of the pool that window 0 was handed; None for none.
        initial_valid: bool, likewise, which of them are used.

    Returns:
        int64 [rows, windows, size]: indices into `initial` ⊕ `scores`, ascending; `NO_TOKEN`, last, for what is not
        there.
    """
    rows, length = scores.shape
    windows = length // window
    known = mask_scores(scores if initial is None else torch.cat([initial, scores], 1), None)
    order = known.argsort(dim=-1, descending=True, stable=True)
    nothing = known.shape[1]
    numbers = torch.arange(nothing, device=scores.device).expand_as(order)
    places = torch.empty_like(order).scatter_(-1, order, numbers)
    order = F.pad(order, (0, 1), value=NO_TOKEN)

    tops = places.new_full((rows, windows, max(size, window)), nothing)
    tops[:, 1:, :window] = places[:, nothing - length : nothing - window].unflatten(-1, (windows - 1, window))
    if initial_valid is not None:
        tops[:, 0, :size] = places[:, :size].masked_fill(~initial_valid, nothing)
    tops = tops.sort(-1).values[..., :size]
    step = 1
    while step < windows:
        merged = torch.cat([tops[:, :-step], tops[:, step:]], -1).sort(-1).values[..., :size]
        tops = torch.cat([tops[:, :step], merged], 1)
        step *= 2
    return order.gather(-1, tops.flatten(1)).view(tops.shape).sort(-1).values


def links(candidates: Tensor, size: int) -> Tensor:
    """Where each candidate of a pool stands in it, which is where it stands among the next pool's candidates.

    Args:
        candidates: int64 [rows, windows + 1, size + window], as from `pool_candidates`.
        size: tokens of a pool.

    Returns:
        int32, likewise; -1 for tokens that are not in the pool, and in the last row, whose pool has no successor.
    """
    pools = candidates[:, 1:, :size].contiguous()
    place = torch.searchsorted(pools, candidates[:, :-1].contiguous())
    found = pools.gather(-1, place.clamp(max=size - 1)) == candidates[:, :-1]
    place = place.masked_fill(~found | (candidates[:, :-1] == NO_TOKEN), -1)
    return F.pad(place, (0, 0, 0, 1), value=-1).int()


def pool_candidates(
    scores: Tensor, initial: Tensor | None, initial_valid: Tensor | None, window: int, size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What each window's pool is chosen from: the pool before it, and the window before it.

    Args:
        scores: fp32 or float64 [rows, windows * window].
        initial: [rows, size], scores of the pool that window 0 was handed; None for none.
        initial_valid: bool, likewise, which of them are used; they come first.
        window: tokens of a window.
        size: tokens of a pool.

    Returns:
        The candidates' scores, their indices (int64, into `initial` ⊕ `scores`, ascending over pool and window each),
        which of them there are, and their `links`: [rows, windows + 1, size + window]. Pool 0 has no candidates.
    """
    rows, length = scores.shape
    base = 0 if initial is None else size
    known = scores if initial is None else torch.cat([initial.to(scores.dtype), scores], 1)
    with torch.no_grad():
        before = prefix_top(scores, window, size, initial, initial_valid)
        tokens = torch.arange(base, base + length, device=scores.device).view(1, -1, window).expand(rows, -1, -1)
        candidates = F.pad(torch.cat([before, tokens], -1), (0, 0, 1, 0), value=NO_TOKEN)
        present = candidates != NO_TOKEN
        # a place that unused slots can point at
        candidates[:, 0, size:] = tokens[:, 0]
    places = candidates.masked_fill(~present, 0).flatten(1)
    return known.gather(1, places).view(candidates.shape), candidates, present, links(candidates, size)


def pool_candidates_backward(
    grad: Tensor, candidates: Tensor, present: Tensor, following: Tensor, window: int, base: int
) -> Tensor:
    """The scores' gradient [rows, windows * window] from that of the candidates' scores.

    Args:
        grad: [rows, windows + 1, size + window].
        candidates, present, following: what `pool_candidates` returned.
        window: tokens of a window.
        base: size of the initial pool, which has no gradient; 0 without one.
    """
    rows, pools, _ = candidates.shape
    sums = grad.new_zeros(rows, base + (pools - 1) * window)
    sums.scatter_add_(1, candidates.masked_fill(~present, 0).flatten(1), grad.masked_fill(~present, 0).flatten(1))
    return sums[:, base:]


def _flat(index: Tensor, length: int) -> Tensor:
    return (index + torch.arange(index.shape[0], device=index.device)[:, None] * length).flatten()


def pool_gather(
    key: Tensor, value: Tensor, indices: Tensor, weights: Tensor, valid: Tensor, following: Tensor, base: int
) -> tuple[Tensor, Tensor]:
    """`gather_pools` of op_causal_routing.py, whose docstring says what the arguments are."""
    used = valid[:, :-1].flatten(1)
    index = indices[:, :-1].flatten(1).masked_fill(~used, 0)
    factors = weights[:, :-1].flatten(1).masked_fill(~used, 0)[..., None, None]

    def gather(states: Tensor) -> Tensor:
        # a token is in many pools: its gradient is summed in fp32, whatever the states' dtype
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        rows = wide.flatten(0, 1).index_select(0, _flat(index, states.shape[1])).view(*index.shape, *states.shape[2:])
        rows = rows.masked_fill(~used[..., None, None], 0) * factors
        return rows.to(states.dtype).unflatten(1, (-1, indices.shape[2]))

    return gather(key), gather(value)


def pool_gather_backward(
    grad_keys: Tensor,
    grad_values: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    weights: Tensor,
    valid: Tensor,
    following: Tensor,
    base: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of key, value and weights, given those of what `pool_gather` returned."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in (key, value, weights)]
        outputs = pool_gather(leaves[0], leaves[1], indices, leaves[2], valid, following, base)
    grad_key, grad_value, grad_weights = torch.autograd.grad(outputs, leaves, (grad_keys, grad_values))
    return grad_key, grad_value, grad_weights
