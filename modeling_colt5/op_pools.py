"""The pools of routed keys that each window of a causal decoder reads: in PyTorch, and the operators with kernels."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernel_backend import triton_is_available
from .op_routing import RoutedTokens, dense_start_weights, route
from .op_rows import flat_rows
from .op_soft_topk import mask_scores
from .run_operator import Gradient, Launch, Operator

pool_candidates_into: Launch = None
pool_candidates_backward_into: Launch = None
pool_gather_into: Launch = None
pool_gather_backward_into: Launch = None
if triton_is_available():
    from .op_pools_triton import (
        LONGEST_LIST,
        pool_candidates_backward_into,
        pool_candidates_into,
        pool_gather_backward_into,
        pool_gather_into,
    )

# Candidates that stand for no token have this number, which sorts behind all others.
NO_TOKEN = 2**31 - 1


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
        candidates: int64 [rows, windows + 1, size + window], as from `pool_candidates_reference`.
        size: tokens of a pool.

    Returns:
        int32, likewise; -1 for tokens that are not in the pool, and in the last row, whose pool has no successor.
    """
    pools = candidates[:, 1:, :size].contiguous()
    place = torch.searchsorted(pools, candidates[:, :-1].contiguous())
    found = pools.gather(-1, place.clamp(max=size - 1)) == candidates[:, :-1]
    place = place.masked_fill(~found | (candidates[:, :-1] == NO_TOKEN), -1)
    return F.pad(place, (0, 0, 0, 1), value=-1).int()


def pool_candidates_reference(
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
        # Unused slots need a token that they can point at.
        candidates[:, 0, size:] = tokens[:, 0]
    places = candidates.masked_fill(~present, 0).flatten(1)
    return known.gather(1, places).view(candidates.shape), candidates, present, links(candidates, size)


def _candidates_results(
    scores: Tensor, initial: Tensor | None, initial_valid: Tensor | None, window: int, size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    candidate_scores = scores.new_empty((scores.shape[0], scores.shape[1] // window + 1, size + window))
    dtypes = (torch.int64, torch.bool, torch.int32)
    candidates, present, following = (torch.empty_like(candidate_scores, dtype=dtype) for dtype in dtypes)
    return candidate_scores, candidates, present, following


_candidates = Operator(
    "pool_candidates",
    pool_candidates_reference,
    _candidates_results,
    pool_candidates_into,
    Gradient(
        inputs=("scores",),
        results=("candidate_scores", "candidates", "present", "following"),
        through=("candidate_scores",),
        kept=("following",),
        launch=pool_candidates_backward_into,
        copied=("initial", "initial_valid"),
    ),
    fits=lambda scores, initial, initial_valid, window, size: max(window, size) <= LONGEST_LIST,
)


def routed_pools(
    scores: Tensor,
    window: int,
    size: int,
    initial: tuple[Tensor, RoutedTokens] | None,
    *,
    dense_start: tuple[Tensor, Tensor] | None = None,
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
        dense_start: what the weights of each pool sum to, fp32 [rows * (windows + 1)], and how far a dense start has
            come, fp32 [], see `dense_start_weights`; None for the paper's weights.
        kernel_backend: as in `uses_triton` of kernel_backend.py.
        settings: keywords of `route`.
    """
    rows = scores.shape[0]
    known: tuple[Tensor | None, Tensor | None] = (None, None)
    if initial is not None:
        known = (initial[0].to(scores.dtype), initial[1].valid)
    candidate_scores, candidates, present, following = _candidates(
        scores, *known, window, size, kernel_backend=kernel_backend
    )
    budget = torch.full((rows * candidates.shape[1],), size, device=scores.device)
    known_scores, settings["mask"] = candidate_scores.flatten(0, 1), present.flatten(0, 1)
    if dense_start is None:
        chosen = route(known_scores, budget, size, kernel_backend=kernel_backend, **settings)
        weights = chosen.weights
    else:
        settings["soft_budget"], progress = dense_start
        chosen = route(known_scores.detach(), budget, size, kernel_backend=kernel_backend, **settings)
        own_scores = known_scores.gather(1, chosen.indices).masked_fill(~chosen.valid, 0)
        weights = dense_start_weights(chosen.weights, own_scores, settings["epsilon"], progress)
    shape = (rows, -1, size)
    indices = candidates.flatten(0, 1).gather(-1, chosen.indices).view(shape)
    weights, valid = weights.view(shape), chosen.valid.view(shape)
    if initial is not None:
        first = initial[1]
        slots = torch.arange(size, device=scores.device).expand(rows, 1, size)
        indices = torch.cat([slots, indices[:, 1:]], 1)
        weights = torch.cat([first.weights[:, None].to(weights.dtype), weights[:, 1:]], 1)
        valid = torch.cat([first.valid[:, None], valid[:, 1:]], 1)
    return Pools(RoutedTokens(indices, weights, valid), following)


def pool_gather_reference(
    key: Tensor, value: Tensor, indices: Tensor, weights: Tensor, valid: Tensor, following: Tensor, base: int
) -> tuple[Tensor, Tensor]:
    """What `gather_pools` returns, whose docstring says what the arguments are."""
    used = valid[:, :-1].flatten(1)
    index = indices[:, :-1].flatten(1).masked_fill(~used, 0)
    factors = weights[:, :-1].flatten(1).masked_fill(~used, 0)[..., None, None]

    def gather(states: Tensor) -> Tensor:
        # A token is in many pools, and its gradient is summed in fp32, whatever the states' dtype.
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        rows = (
            wide.flatten(0, 1).index_select(0, flat_rows(index, states.shape[1])).view(*index.shape, *states.shape[2:])
        )
        rows = rows.masked_fill(~used[..., None, None], 0) * factors
        return rows.to(states.dtype).unflatten(1, (-1, indices.shape[2]))

    return gather(key), gather(value)


def _pool_gather_results(key: Tensor, value: Tensor, indices: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = (key.shape[0], indices.shape[1] - 1, indices.shape[2], *key.shape[2:])
    return key.new_empty(shape), value.new_empty(shape)


_pool_gather = Operator(
    "pool_gather",
    pool_gather_reference,
    _pool_gather_results,
    pool_gather_into,
    Gradient(
        inputs=("key", "value", "weights"),
        results=("keys", "values"),
        through=("keys", "values"),
        launch=pool_gather_backward_into,
    ),
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
        kernel_backend: as in `uses_triton` of kernel_backend.py.

    Returns:
        [batch, windows, size, heads, d_kv] in the states' dtype: all pools but the last, which later windows read.
    """
    tokens = pools.tokens
    chosen = (tokens.indices, tokens.weights, tokens.valid, pools.following)
    return _pool_gather(key, value, *chosen, base, kernel_backend=kernel_backend)
