"""Triton kernels of strictly causal gates: a program a window, and another for its gradient; a program a new token."""

from torch import Tensor

from .op_routing_steps_triton import HIGHEST_KEY, LOWEST_KEY, closed_threshold, key_to_score, load_keys
from .run_launch_triton import adjacent, launch, next_power_of_2, tl, triton

# How many tokens of a window a program compares with all others in one step.
CHUNK = 16
# How many pairs a program compares in one step at most where it runs once in a window.
PAIRS = 2**14
# The most tokens of a window for which a program stays within its registers.
LONGEST_WINDOW = 4096


@triton.jit
def window_keys(scores, row, start, positions, window, row_stride, stride, size, RING: tl.constexpr):
    """Integer keys of a window's scores, in their order; the lowest beyond its end. A ring of `size` goes on at its
    beginning."""
    first = scores + row * row_stride
    if RING:
        keys = load_keys(
            first, first, first, row * 0, (start + positions) % size, size, 0, stride, 0, 0, False, False
        )  # fmt: skip
        return tl.where(positions < window, keys, LOWEST_KEY)
    first += start * stride
    return load_keys(first, first, first, row * 0, positions, window, 0, stride, 0, 0, False, False)


@triton.jit
def handed_on(
    scores, row, start, window, row_stride, stride, target, soft_target, epsilon, size,
    RING: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """`window_thresholds` of a window, in closed form from all pairs of its tokens."""
    positions = tl.arange(0, BLOCK)
    keys = window_keys(scores, row, start, positions, window, row_stride, stride, size, RING)
    inside = positions < window
    score = tl.where(inside, key_to_score(keys), 0.0)
    rank = tl.zeros([BLOCK], dtype=tl.int32)
    tail = tl.zeros([BLOCK], dtype=tl.float32)
    for chunk in range(0, window, CHUNK):
        others = chunk + tl.arange(0, CHUNK)
        other_keys = window_keys(scores, row, start, others, window, row_stride, stride, size, RING)
        tie_before = (other_keys[None, :] == keys[:, None]) & (others[None, :] < positions[:, None])
        above = (other_keys[None, :] > keys[:, None]) | tie_before
        rank += tl.sum(above.to(tl.int32), 1)
        other_score = tl.where(others < window, key_to_score(other_keys), 0.0)
        gap = (other_score[None, :] - score[:, None]) / epsilon
        tail += tl.sum(tl.where(above | (others >= window)[None, :], 0.0, tl.exp(gap)), 1)
    least = key_to_score(tl.max(tl.where(inside & (rank == target - 1), keys, LOWEST_KEY)))
    threshold = closed_threshold(score, rank, tail, inside, window, soft_target, epsilon)
    # NaN is the highest key
    return least, tl.where(tl.max(keys) == HIGHEST_KEY, float("nan"), threshold)


@triton.jit(do_not_specialize=["batch_stride", "stride", "windows", "window", "target", "capacity"])
def gates_kernel(
    scores, past, total, carried, weights, routed, thresholds, indices, slot_weights, valid,
    batch_stride, stride, windows, window, target, capacity, soft_target, epsilon,
    FILL_FIRST: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program (row, v): what window v - 1 hands on, and the gates of window v with it."""
    row = (tl.program_id(0) // (windows + 1)).to(tl.int64)
    number = tl.program_id(0) % (windows + 1)
    if number > 0:
        start = (number - 1) * window
        least, soft = handed_on(
            scores, row, start, window, batch_stride, stride, target, soft_target, epsilon, 0, False, BLOCK, CHUNK
        )
    elif carried is not None:
        least = tl.load(carried + row * 2).to(tl.float32)
        soft = tl.load(carried + row * 2 + 1).to(tl.float32)
    else:
        least = 0.0
        soft = 0.0
    thresholds += (row * (windows + 1) + number) * 2
    tl.store(thresholds, least)
    tl.store(thresholds + 1, soft)
    if number < windows:
        before = 0
        if past is not None:
            before = tl.load(past + row).to(tl.int32)
        slot = tl.arange(0, BLOCK)
        inside = slot < window
        rank = (before // window + number) * window + slot
        score = tl.load(scores + row * batch_stride + (number * window + slot) * stride, mask=inside, other=0.0).to(
            tl.float32
        )
        is_first = rank < window
        evenly = slot < 0
        if FILL_FIRST:
            evenly = (slot + 1) * target // window > slot * target // window
        reach = tl.where(is_first, evenly, score >= least) & inside & (rank < tl.load(total + row))
        # Tokens before the new ones count for the capacity too.
        chosen = reach & (tl.cumsum(reach.to(tl.int32), 0) <= capacity) & (rank >= before)
        gap = (score - soft) / epsilon
        # A comparison instead of a minimum keeps NaN.
        weight = tl.where(is_first | (gap > 0), 1.0, tl.exp(gap))
        weight = tl.where(chosen, weight, 0.0)

        own = (row * windows + number).to(tl.int64)
        tl.store(weights + own * window + slot, weight, mask=inside)
        tl.store(routed + own * window + slot, chosen, mask=inside)
        place = tl.cumsum(chosen.to(tl.int32), 0) - 1
        count = tl.sum(chosen.to(tl.int32))
        slots = tl.arange(0, SLOTS)
        unused = (slots >= count) & (slots < capacity)
        tl.store(indices + own * capacity + place, slot.to(tl.int64), mask=chosen)
        tl.store(indices + own * capacity + slots, slots.to(tl.int64) * 0 + window - 1, mask=unused)
        tl.store(slot_weights + own * capacity + place, weight, mask=chosen)
        tl.store(slot_weights + own * capacity + slots, slots.to(tl.float32) * 0, mask=unused)
        tl.store(valid + own * capacity + slots, slots < count, mask=slots < capacity)


@triton.jit
def falling_gradient(
    grad_weights, grad_slots, weights, routed, window_row, window, capacity, epsilon, BLOCK: tl.constexpr
):
    """What a window's weights below 1 give on: to their own scores, and their sum, negated, to t."""
    slot = tl.arange(0, BLOCK)
    inside = slot < window
    weight = tl.load(weights + window_row * window + slot, mask=inside, other=0.0)
    grad = tl.zeros([BLOCK], dtype=tl.float32)
    if grad_weights is not None:
        grad += tl.load(grad_weights + window_row * window + slot, mask=inside, other=0.0)
    if grad_slots is not None:
        chosen = tl.load(routed + window_row * window + slot, mask=inside, other=0).to(tl.int32)
        place = tl.cumsum(chosen, 0) - 1
        grad += tl.load(grad_slots + window_row * capacity + place, mask=chosen != 0, other=0.0)
    return tl.where(weight < 1.0, grad * weight / epsilon, 0.0)


@triton.jit(do_not_specialize=["batch_stride", "stride", "windows", "window", "capacity"])
def gates_backward_kernel(
    grad_weights, grad_slots, scores, weights, routed, thresholds, grad_scores,
    batch_stride, stride, windows, window, capacity, epsilon, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, v): the gradient of window v's scores, by its own gates and, through t, by those of the next."""
    row = (tl.program_id(0) // windows).to(tl.int64)
    number = tl.program_id(0) % windows
    own = row * windows + number
    slot = tl.arange(0, BLOCK)
    inside = slot < window
    grad = falling_gradient(grad_weights, grad_slots, weights, routed, own, window, capacity, epsilon, BLOCK)
    if number + 1 < windows:
        handed = falling_gradient(grad_weights, grad_slots, weights, routed, own + 1, window, capacity, epsilon, BLOCK)
        soft = tl.load(thresholds + (row * (windows + 1) + number + 1) * 2 + 1)
        score = tl.load(scores + row * batch_stride + (number * window + slot) * stride, mask=inside, other=0.0).to(
            tl.float32
        )
        free = tl.exp((score - soft) / epsilon)
        free = tl.where(inside & (free < 1.0), free, 0.0)
        mass = tl.sum(free)
        grad -= free * (tl.sum(handed) / tl.where(mass == 0.0, 1.0, mass))
    tl.store(grad_scores + own * window + slot, grad.to(grad_scores.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["size", "window", "target", "capacity"])
def token_gate_kernel(
    scores, past, total, carried, ring, other_ring, weights, indices, valid, size, window, target, capacity, epsilon,
    ROUTERS: tl.constexpr, FILL_FIRST: tl.constexpr, BLOCK: tl.constexpr, ROUTER_BLOCK: tl.constexpr,
):  # fmt: skip
    """Program row: the gate of a row's new token, from its window's earlier scores in the ring."""
    row = tl.program_id(0).to(tl.int64)
    rank = tl.load(past + row).to(tl.int32)
    is_real = tl.load(total + row).to(tl.int32) > rank
    offset = rank % window
    ring += row * size
    scores += row * ROUTERS
    own = tl.load(scores)
    least = tl.load(carried + row * 4)
    soft = tl.load(carried + row * 4 + 1)

    slot = tl.arange(0, BLOCK)
    is_first = rank < window
    evenly = slot < 0
    if FILL_FIRST:
        evenly = (slot + 1) * target // window > slot * target // window
    known = tl.load(ring + (rank - offset + slot) % size, mask=slot < offset, other=0.0)
    known = tl.where(slot == offset, own, known)
    reach = tl.where(is_first, evenly, known >= least) & (slot <= offset)
    is_own = tl.max((reach & (slot == offset)).to(tl.int32)) != 0
    chosen = is_own & (tl.sum(reach.to(tl.int32)) <= capacity) & is_real
    gap = (own - soft) / epsilon
    # A comparison instead of a minimum keeps NaN.
    weight = tl.where(is_first | (gap > 0), 1.0, tl.exp(gap))
    tl.store(weights + row, tl.where(chosen, weight, 0.0))
    tl.store(indices + row, row * 0)
    tl.store(valid + row, chosen)

    if is_real:
        place = rank % size
        tl.store(ring + place, own)
        if ROUTERS > 1:
            others = tl.arange(0, ROUTER_BLOCK)
            other = tl.load(scores + 1 + others, mask=others < ROUTERS - 1, other=0.0)
            tl.store(other_ring + (row * size + place) * (ROUTERS - 1) + others, other, mask=others < ROUTERS - 1)


@triton.jit(do_not_specialize=["size", "window", "target"])
def hand_thresholds_kernel(
    past, total, ring, carried, size, window, target, soft_target, epsilon,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program row: what the row's window hands on, where its new token completed it."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(total + row).to(tl.int32)
    if (length > tl.load(past + row).to(tl.int32)) & (length % window == 0):
        least, soft = handed_on(
            ring, row, length - window, window, size, 1, target, soft_target, epsilon, size, True, BLOCK, CHUNK
        )
        carried += row * 4
        tl.store(carried + 2, tl.load(carried))
        tl.store(carried + 3, tl.load(carried + 1))
        tl.store(carried, least)
        tl.store(carried + 1, soft)


def causal_gates_into(
    scores: Tensor,
    past: Tensor | None,
    total: Tensor,
    carried: Tensor | None,
    target: int,
    capacity: int,
    soft_target: float,
    epsilon: float,
    fill_first: bool,
    *results: Tensor,
) -> None:
    """Write `causal_gates_reference` of op_gates.py to its six results."""
    batch, windows, window = scores.shape
    scores = _evenly_spaced(scores)
    launch(
        gates_kernel, (batch * (windows + 1),),
        scores, *map(adjacent, (past, total, carried)), *results, scores.stride(0), scores.stride(2),
        windows, window, target, capacity, soft_target, epsilon,
        fill_first, max(16, next_power_of_2(window)), next_power_of_2(capacity), CHUNK,
        num_warps=_warps(window),
    )  # fmt: skip


def causal_gates_backward_into(
    grad_weights: Tensor | None,
    grad_slots: Tensor | None,
    scores: Tensor,
    past: Tensor | None,
    total: Tensor,
    carried: Tensor | None,
    target: int,
    capacity: int,
    soft_target: float,
    epsilon: float,
    fill_first: bool,
    weights: Tensor,
    routed: Tensor,
    thresholds: Tensor,
    grad_scores: Tensor,
) -> None:
    """Write the scores' gradient [batch, windows, window], from those of weights and of the slots' weights.

    A weight below 1 gives g w / ε to its score and takes it from t, which gives it to the window before: q / Σ q of it
    to each score, with q that window's own weights below 1 at t.
    """
    batch, windows, window = scores.shape
    scores = _evenly_spaced(scores)
    launch(
        gates_backward_kernel, (batch * windows,),
        adjacent(grad_weights), adjacent(grad_slots),
        scores, weights, routed, thresholds, grad_scores, scores.stride(0), scores.stride(2),
        windows, window, capacity, epsilon, max(16, next_power_of_2(window)), num_warps=_warps(window),
    )  # fmt: skip


def _evenly_spaced(scores: Tensor) -> Tensor:
    """Scores [batch, windows, window] whose windows follow each other in memory, at any distance."""
    return scores if scores.stride(1) == scores.shape[2] * scores.stride(2) else scores.contiguous()


def _warps(window: int) -> int:
    return max(1, min(8, next_power_of_2(window) // 64))


def token_gate_into(
    scores: Tensor,
    past: Tensor,
    total: Tensor,
    carried: Tensor,
    ring: Tensor,
    other_ring: Tensor | None,
    window: int,
    target: int,
    capacity: int,
    epsilon: float,
    fill_first: bool,
    weights: Tensor,
    indices: Tensor,
    valid: Tensor,
) -> None:
    """Route one new token in each row as `causal_gates` of op_gates.py does, and let the rings of a cache go on to it.

    Args, of which tensors are contiguous:
        scores: fp32 [rows, routers], of the new token, those of the gates first.
        past: int64 [rows], real tokens before it.
        total: int64 [rows], these and the new one where it is real. No token that is not real is routed.
        carried: fp32 [rows, 2, 2], what the token's window was handed, and the one before.
        ring: fp32 [rows, R], scores of the last tokens, of rank `rank` in slot `rank % R`; R is at least a window.
        other_ring: fp32 [rows, R, routers - 1], likewise of the other routers; None where there are none.
        window, target, capacity, epsilon, fill_first: as of `causal_gates`.
        weights, indices, valid: fp32, int64 and bool [rows, 1], results: the token as `RoutedTokens` of a row alone.
    """
    rows, routers = scores.shape
    launch(
        token_gate_kernel, (rows,),
        scores, past, total, carried, ring, other_ring, weights, indices, valid,
        ring.shape[1], window, target, capacity, epsilon,
        routers, fill_first, max(16, next_power_of_2(window)), next_power_of_2(max(1, routers - 1)),
        num_warps=_warps(window),
    )  # fmt: skip


def hand_thresholds_into(
    past: Tensor,
    total: Tensor,
    ring: Tensor,
    carried: Tensor,
    window: int,
    target: int,
    soft_target: float,
    epsilon: float,
) -> None:
    """Let each row whose new token completed a window go on to what that hands on, `window_thresholds` of
    op_gates.py.

    Args, of which tensors are contiguous:
        past, total, ring: as of `token_gate_into`, after the new token.
        carried: fp32 [rows, 2, 2]; what the window was handed itself comes to the second place.
        window: tokens of a window, at most `LONGEST_WINDOW`.
        target, soft_target, epsilon: as of `window_thresholds`.
    """
    block = max(16, next_power_of_2(window))
    launch(
        hand_thresholds_kernel, (len(ring),),
        past, total, ring, carried, ring.shape[1], window, target, soft_target, epsilon,
        block, min(CHUNK, PAIRS // block), num_warps=_warps(window),
    )  # fmt: skip
