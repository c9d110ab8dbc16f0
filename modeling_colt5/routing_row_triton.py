"""Routing forward as one Triton program a row, which is held in registers."""

from .routing_steps_triton import (
    HIGHEST_KEY,
    LOWEST_KEY,
    descent_epsilon,
    is_settled,
    key_to_score,
    last_step,
    load_keys,
    newton_step,
    row_budgets,
    saturated_and_free,
    weigh,
)

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("routing_row_triton needs triton; use kernel_backend='torch' without it") from error

MOST_PASSES = tl.constexpr(24)


@triton.jit
def route_row_kernel(
    scores, budgets, soft_budgets, mask, lengths, weights, indices, valid, state,
    score_row_stride, score_stride, mask_row_stride, mask_stride, n, capacity,
    soft_topk_ratio, epsilon, epsilon_init, log2_decay, num_iterations,
    HAS_SOFT_BUDGET: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr, EXACT: tl.constexpr,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    positions = tl.arange(0, BLOCK)
    keys = load_keys(
        scores, mask, lengths, row, positions, n,
        score_row_stride, score_stride, mask_row_stride, mask_stride, HAS_MASK, HAS_LENGTHS,
    )  # fmt: skip
    real_tokens = tl.sum((keys != LOWEST_KEY).to(tl.int32))
    budget, k, rank = row_budgets(budgets, soft_budgets, row, real_tokens, capacity, soft_topk_ratio, HAS_SOFT_BUDGET)

    # the budget-th and the rank-th largest key, bit by bit, until as many keys as the rank are left above the bits
    # found; both counts share one sum, 16 bits each
    hard_rank = tl.maximum(budget, 1)
    counts = tl.sum((keys >= 0).to(tl.int32))
    hard_key = tl.where(counts >= hard_rank, 0, LOWEST_KEY)
    soft_key = tl.where(counts >= rank, 0, LOWEST_KEY)
    hard_count = tl.where(counts >= hard_rank, counts, BLOCK)
    soft_count = tl.where(counts >= rank, counts, BLOCK)
    bit = 30
    while (bit >= 0) & ((hard_count != hard_rank) | (soft_count != rank)):
        hard_candidate = hard_key | (1 << bit)
        soft_candidate = soft_key | (1 << bit)
        counts = tl.sum((keys >= hard_candidate).to(tl.int32) + ((keys >= soft_candidate).to(tl.int32) << 16))
        hard_above = counts & 0xFFFF
        soft_above = (counts >> 16) & 0xFFFF
        hard_key = tl.where(hard_above >= hard_rank, hard_candidate, hard_key)
        soft_key = tl.where(soft_above >= rank, soft_candidate, soft_key)
        hard_count = tl.where(hard_above >= hard_rank, hard_above, hard_count)
        soft_count = tl.where(soft_above >= rank, soft_above, soft_count)
        bit -= 1
    hard_key = tl.min(tl.where(keys >= hard_key, keys, HIGHEST_KEY))
    soft_key = tl.min(tl.where(keys >= soft_key, keys, HIGHEST_KEY))

    score = key_to_score(keys)
    if EXACT:
        all_saturated = k >= real_tokens.to(tl.float32)
        centre = tl.where(all_saturated, 0.0, key_to_score(soft_key))
        last_epsilon = epsilon
        z = (score - centre) / epsilon
        saturated, free = saturated_and_free(z, 0.0)
        low = 0.0
        high = tl.log(free / (k - saturated))
        threshold = high
        passes = 0
        unsettled = tl.where(all_saturated, 0, 1)
        while unsettled != 0:
            saturated, free = saturated_and_free(z, threshold)
            following, low, high = newton_step(threshold, low, high, saturated, free, k)
            passes += 1
            unsettled = tl.where(is_settled(saturated, free, k) | (passes >= MOST_PASSES), 0, 1)
            threshold = tl.where(unsettled != 0, following, threshold)
        threshold, mass = last_step(threshold, saturated, free, k)
        threshold = tl.where(all_saturated, float("-inf"), threshold)
        mass = tl.where(all_saturated, 0.0, mass)
        tl.store(state + row * 3, centre)
        tl.store(state + row * 3 + 1, threshold)
        tl.store(state + row * 3 + 2, mass)
    else:
        log_k = tl.log(k)
        largest = tl.max(score)
        current = descent_epsilon(0.0, epsilon, epsilon_init, log2_decay)
        centre = current * (tl.log(tl.maximum(real_tokens, 1).to(tl.float32)) - log_k)
        all_saturated = k >= real_tokens.to(tl.float32)
        tl.store(state + row * num_iterations, tl.where(all_saturated, float("-inf"), centre))
        for iteration in range(1, num_iterations):
            current = descent_epsilon(iteration * 1.0, epsilon, epsilon_init, log2_decay)
            top = tl.minimum(largest, centre)
            # a comparison instead of a minimum keeps NaN
            total = tl.sum(tl.exp((tl.where(score > centre, centre, score) - top) / current))
            centre = top + current * (tl.log(total) - log_k)
            tl.store(state + row * num_iterations + iteration, tl.where(all_saturated, float("-inf"), centre))
        last_epsilon = descent_epsilon(num_iterations * 1.0, epsilon, epsilon_init, log2_decay)
        threshold = tl.where(all_saturated, float("-inf"), 0.0)

    # loaded again, so that the iteration above needs registers for z alone
    keys = load_keys(
        scores, mask, lengths, row, positions, n,
        score_row_stride, score_stride, mask_row_stride, mask_stride, HAS_MASK, HAS_LENGTHS,
    )  # fmt: skip
    above = (keys > hard_key).to(tl.int32)
    equal = (keys == hard_key).to(tl.int32)
    room = budget - tl.sum(above)
    ranks = tl.cumsum(above + (equal << 16), 0)
    equals_so_far = (ranks >> 16) & 0xFFFF
    selected = (above != 0) | ((equal != 0) & (equals_so_far <= room))
    slot = (ranks & 0xFFFF) + tl.minimum(equals_so_far, room) - 1
    weights += row * capacity
    indices += row * capacity
    valid += row * capacity
    tl.store(indices + slot, positions.to(tl.int64), mask=selected)
    # weights by slot: the slots are few, and other threads of the program found their tokens
    tl.debug_barrier()
    for start in range(0, capacity, SLOTS):
        slots = start + tl.arange(0, SLOTS)
        used = slots < budget
        index = tl.load(indices + slots, mask=used, other=n - 1)
        slot_keys = load_keys(
            scores, mask, lengths, row, index, n,
            score_row_stride, score_stride, mask_row_stride, mask_stride, HAS_MASK, HAS_LENGTHS,
        )  # fmt: skip
        weight = weigh((key_to_score(slot_keys) - centre) / last_epsilon, threshold)
        inside = slots < capacity
        tl.store(weights + slots, tl.where(used, weight, 0.0), mask=inside)
        tl.store(valid + slots, used, mask=inside)
        tl.store(indices + slots, index, mask=inside)
