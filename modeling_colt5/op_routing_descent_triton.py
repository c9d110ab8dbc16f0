"""Routing by coordinate descent, forward and gradient: Triton kernels for rows of one program each."""

from .op_routing_steps_triton import (
    LOWEST_KEY,
    find_rank,
    key_to_score,
    last_and_room,
    load_keys,
    row_budgets,
    row_statistics,
    selected_slots,
    write_slots,
)
from .run_launch_triton import tl, triton

# A new length must not mean a new compilation.
UNSPECIALIZED = [
    "grad_row_stride", "score_row_stride", "mask_row_stride", "grad_score_row_stride", "n", "capacity",
    "num_iterations",
]  # fmt: skip


@triton.jit
def descent_epsilon(iteration, epsilon, epsilon_init, log2_decay):
    """ε of an iteration of coordinate descent, counted from 0."""
    return tl.maximum(epsilon_init * tl.exp2(iteration * log2_decay), epsilon)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def descent_kernel(
    scores, budgets, soft_budgets, mask, lengths, weights, indices, valid, state,
    score_row_stride, mask_row_stride, n, capacity,
    soft_topk_ratio, epsilon, epsilon_init, log2_decay, num_iterations,
    HAS_SOFT_BUDGET: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Select, iterate, write slots and state, one program a row.

    Arguments are those of `route_kernel` of op_routing_triton.py; `state` is fp32 [rows, num_iterations], the
    thresholds.
    """
    row = tl.program_id(0).to(tl.int64)
    positions = tl.arange(0, BLOCK)
    keys = load_keys(
        scores, mask, lengths, row, positions, n,
        score_row_stride, 1, mask_row_stride, 1, HAS_MASK, HAS_LENGTHS,
    )  # fmt: skip
    # The row is this program's alone, so that nothing is exchanged.
    turn = 0
    count, mean, deviation, turn = row_statistics(keys, turn, None, None, 0, 1, False, 1)
    real_tokens = count.to(tl.int32)
    budget, k, _ = row_budgets(budgets, soft_budgets, row, real_tokens, capacity, soft_topk_ratio, HAS_SOFT_BUDGET)
    low, high, from_low, beyond_high, turn = find_rank(
        keys, tl.maximum(budget, 1), real_tokens, mean, deviation, turn, None, None, 0, 1, False, 1
    )
    last, room = last_and_room(budget, low, high, from_low, beyond_high)

    all_saturated = k >= count
    score = key_to_score(keys)
    log_k = tl.log(k)
    largest = tl.max(score)
    state += row * num_iterations
    current = descent_epsilon(0.0, epsilon, epsilon_init, log2_decay)
    centre = current * (tl.log(tl.maximum(count, 1.0)) - log_k)
    tl.store(state, tl.where(all_saturated, float("-inf"), centre))
    for iteration in range(1, num_iterations):
        current = descent_epsilon(iteration * 1.0, epsilon, epsilon_init, log2_decay)
        top = tl.minimum(largest, centre)
        # A comparison instead of a minimum keeps NaN.
        total = tl.sum(tl.exp((tl.where(score > centre, centre, score) - top) / current))
        centre = top + current * (tl.log(total) - log_k)
        tl.store(state + iteration, tl.where(all_saturated, float("-inf"), centre))
    last_epsilon = descent_epsilon(num_iterations * 1.0, epsilon, epsilon_init, log2_decay)
    threshold = tl.where(all_saturated, float("-inf"), 0.0)

    indices += row * capacity
    selected, slot = selected_slots(keys, last, room, turn, None, None, 0, 1, False, 1)
    tl.store(indices + slot, positions.to(tl.int64), mask=selected)
    write_slots(
        weights + row * capacity, indices, valid + row * capacity, budget, capacity, centre, last_epsilon, threshold,
        scores, mask, lengths, row, n, score_row_stride, mask_row_stride, HAS_MASK, HAS_LENGTHS, SLOTS,
    )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def descent_backward_kernel(
    grad_weights, weights, indices, valid, scores, mask, lengths, soft_budgets, state, grad_scores, grad_budget,
    grad_row_stride, score_row_stride, mask_row_stride, grad_score_row_stride,
    n, capacity, epsilon, epsilon_init, log2_decay, num_iterations,
    HAS_SOFT_BUDGET: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The gradient of coordinate descent, one program a row: the iteration backward from its thresholds, by the
    derivatives of a step that docs/soft_topk.md has."""
    row = tl.program_id(0).to(tl.int64)
    weights += row * capacity
    indices += row * capacity
    valid += row * capacity
    grad_weights += row * grad_row_stride
    grad_scores += row * grad_score_row_stride
    state += row * num_iterations
    positions = tl.arange(0, BLOCK)
    keys = load_keys(
        scores, mask, lengths, row, positions, n,
        score_row_stride, 1, mask_row_stride, 1, HAS_MASK, HAS_LENGTHS,
    )  # fmt: skip
    score = key_to_score(keys)
    last = tl.load(state + num_iterations - 1)
    descended = last != float("-inf")
    last_epsilon = descent_epsilon(num_iterations * 1.0, epsilon, epsilon_init, log2_decay)

    total = 0.0
    for start in range(0, capacity, SLOTS):
        slots = start + tl.arange(0, SLOTS)
        inside = slots < capacity
        weight = tl.load(weights + slots, mask=inside, other=0.0)
        free = inside & (weight < 1.0) & (weight > 0.0)
        grad = tl.load(grad_weights + slots, mask=free, other=0.0)
        total += tl.sum(tl.where(free, weight * grad, 0.0))
    grad_threshold = tl.where(descended, -total / last_epsilon, 0.0)

    grad_score = tl.zeros([BLOCK], tl.float32)
    before = descent_epsilon(num_iterations - 1.0, epsilon, epsilon_init, log2_decay)
    grad_k = -before * grad_threshold
    for back in range(1, num_iterations):
        column = num_iterations - 1 - back
        threshold = tl.load(state + column)
        current = descent_epsilon(column + 1.0, epsilon, epsilon_init, log2_decay)
        saturated = tl.sum((score >= threshold).to(tl.int32)).to(tl.float32)
        free_weight = tl.where(score < threshold, tl.exp((score - threshold) / current), 0.0)
        free = tl.sum(free_weight)
        # Far above all scores nothing is left of the sum, nor of the threshold's effect.
        share = tl.where(free + saturated > 0.0, grad_threshold / (free + saturated), 0.0)
        grad_score += share * free_weight
        grad_threshold = share * saturated
        grad_k += -descent_epsilon(column * 1.0, epsilon, epsilon_init, log2_decay) * grad_threshold
    if HAS_SOFT_BUDGET:
        k = tl.load(soft_budgets + row).to(tl.float32)
        tl.store(grad_budget + row, tl.where(descended, grad_k / k, 0.0))

    grad_score = tl.where(keys != LOWEST_KEY, tl.where(descended, grad_score, 0.0), 0.0)
    tl.store(grad_scores + positions, grad_score, mask=positions < n)
    tl.debug_barrier()
    for start in range(0, capacity, SLOTS):
        slots = start + tl.arange(0, SLOTS)
        used = tl.load(valid + slots, mask=slots < capacity, other=0) != 0
        weight = tl.load(weights + slots, mask=used, other=0.0)
        used = used & (weight < 1.0)
        index = tl.load(indices + slots, mask=used, other=0)
        grad = tl.load(grad_weights + slots, mask=used, other=0.0)
        shared = tl.load(grad_scores + index, mask=used, other=0.0)
        tl.store(grad_scores + index, shared + weight * grad / last_epsilon, mask=used)
