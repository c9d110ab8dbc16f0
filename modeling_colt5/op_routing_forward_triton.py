"""Routing forward by the exact solver, as one Triton kernel: a row in the registers of one program, or of several."""

from .op_routing_select_triton import (
    find_last_key,
    find_rank,
    largest_of_both,
    row_statistics,
    selected_slots,
    write_slots,
)
from .op_routing_steps_triton import (
    COUNTER_STRIDE,
    LOWEST_FINITE_KEY,
    LOWEST_KEY,
    PLACES,
    is_settled,
    key_to_score,
    last_step,
    load_keys,
    newton_step,
    row_budgets,
    sum_over_programs,
    weigh,
)

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("op_routing_forward_triton needs triton; use kernel_backend='torch' without it") from error

# The most passes that the solver makes; in all rows that were tried it was settled after 12.
MOST_PASSES = tl.constexpr(24)

# A new length must not mean a new compilation. And where a length is known to be a multiple of 16, masks are read 16
# at a time, in another layout than scores: to change between the two takes up to 131,072 bytes of shared memory.
UNSPECIALIZED = ["score_row_stride", "mask_row_stride", "n", "capacity", "rows", "groups", "programs"]


@triton.jit
def _relative_weights(keys, centre, epsilon, offset):
    """exp(z - offset) of every key, 0 of what is masked."""
    return tl.exp((key_to_score(keys) - centre) / epsilon - offset)


@triton.jit
def _saturated_and_free(
    relative, one, turn, numbers, arrived, program, programs, SHARED: tl.constexpr, PROGRAMS: tl.constexpr
):
    """How many of the row's relative weights are above `one`, and the sum of the rest over it, in one reduction."""
    saturated = relative > one
    count, free = tl.split(tl.sum(tl.join(saturated.to(tl.float32), tl.where(saturated, 0.0, relative)), 0))
    count, free, turn = sum_over_programs(count, free, turn, numbers, arrived, program, programs, SHARED, PROGRAMS)
    return count, free / one, turn


@triton.jit
def _solve(
    keys, k, rank, count, real_tokens, mean, deviation, low, epsilon,
    turn, numbers, arrived, program, programs, SHARED: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The soft top-k's threshold, as a centre and the distance from there over ε; and the sum of the weights below 1.
    `low` is a key that may be the centre's."""
    all_saturated = k >= count
    # Any score will do as a centre that has fewer than k above it, and from which the weights below 1 make up for the
    # rest.
    centre = key_to_score(tl.maximum(low, LOWEST_FINITE_KEY))
    saturated, free, turn = _saturated_and_free(
        _relative_weights(keys, centre, epsilon, 0.0), 1.0,
        turn, numbers, arrived, program, programs, SHARED, PROGRAMS,
    )  # fmt: skip
    if (k < count) & ((saturated >= k) | (saturated + free < k)):
        soft_key, _, _, _, turn = find_rank(
            keys, rank, real_tokens, mean, deviation, turn, numbers, arrived, program, programs, SHARED, PROGRAMS
        )
        # The least key from there on is found by the largest complement.
        lowest_key, _, turn = largest_of_both(
            tl.where(keys >= soft_key, ~keys, LOWEST_KEY), keys,
            turn, numbers, arrived, program, programs, SHARED, PROGRAMS,
        )  # fmt: skip
        centre = key_to_score(~lowest_key)
        saturated, free, turn = _saturated_and_free(
            _relative_weights(keys, centre, epsilon, 0.0), 1.0,
            turn, numbers, arrived, program, programs, SHARED, PROGRAMS,
        )  # fmt: skip
    centre = tl.where(all_saturated, 0.0, centre)
    # The threshold is kept as its distance from the upper end of the bracket: then passes need no exponentials.
    upper = tl.log(free / (k - saturated))
    relative = _relative_weights(keys, centre, epsilon, upper)
    lowest = -upper
    highest = 0.0
    offset = 0.0
    passes = 0
    unsettled = tl.where(all_saturated, 0, 1)
    while unsettled != 0:
        saturated, free, turn = _saturated_and_free(
            relative, tl.exp(offset), turn, numbers, arrived, program, programs, SHARED, PROGRAMS
        )
        following, lowest, highest = newton_step(offset, lowest, highest, saturated, free, k)
        passes += 1
        unsettled = tl.where(is_settled(saturated, free, k) | (passes >= MOST_PASSES), 0, 1)
        offset = tl.where(unsettled != 0, following, offset)
    offset, mass = last_step(offset, saturated, free, k)
    threshold = tl.where(all_saturated, float("-inf"), upper + offset)
    return centre, threshold, tl.where(all_saturated, 0.0, mass), turn


@triton.jit
def _route_row(
    row, scores, budgets, soft_budgets, mask, lengths, weights, indices, valid, state, numbers, arrived,
    score_row_stride, mask_row_stride, n, capacity, soft_topk_ratio, epsilon, program, programs,
    HAS_SOFT_BUDGET: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    SHARED: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One row, or a program's `BLOCK` tokens of it: select, solve for the threshold, write slots and state.

    `row` is int64. `numbers` and `arrived` are the row's own. Every branch with an exchange in it, and every loop's
    end, depends on numbers that all of the row's programs have alike: who took another one would wait for ever.
    """
    turn = 0
    positions = program * BLOCK + tl.arange(0, BLOCK)
    keys = load_keys(
        scores, mask, lengths, row, positions, n,
        score_row_stride, 1, mask_row_stride, 1, HAS_MASK, HAS_LENGTHS,
    )  # fmt: skip
    count, mean, deviation, turn = row_statistics(keys, turn, numbers, arrived, program, programs, SHARED, PROGRAMS)
    real_tokens = count.to(tl.int32)
    budget, k, rank = row_budgets(budgets, soft_budgets, row, real_tokens, capacity, soft_topk_ratio, HAS_SOFT_BUDGET)
    last, room, low, turn = find_last_key(
        keys, budget, real_tokens, mean, deviation, turn, numbers, arrived, program, programs, SHARED, PROGRAMS
    )
    centre, threshold, mass, turn = _solve(
        keys, k, rank, count, real_tokens, mean, deviation, low, epsilon,
        turn, numbers, arrived, program, programs, SHARED, PROGRAMS,
    )  # fmt: skip
    if program == 0:
        tl.store(state + row * 3, centre)
        tl.store(state + row * 3 + 1, threshold)
        tl.store(state + row * 3 + 2, mass)

    weights += row * capacity
    indices += row * capacity
    valid += row * capacity
    selected, slot = selected_slots(keys, last, room, turn, numbers, arrived, program, programs, SHARED, PROGRAMS)
    tl.store(indices + slot, positions.to(tl.int64), mask=selected)
    if SHARED:
        tl.store(weights + slot, weigh((key_to_score(keys) - centre) / epsilon, threshold), mask=selected)
        tl.store(valid + slot, selected, mask=selected)
        for start in range(program * BLOCK, capacity, programs * BLOCK):
            slots = start + tl.arange(0, BLOCK)
            unused = (slots >= budget) & (slots < capacity)
            tl.store(weights + slots, tl.zeros([BLOCK], tl.float32), mask=unused)
            tl.store(valid + slots, slots < budget, mask=unused)
            tl.store(indices + slots, tl.zeros([BLOCK], tl.int64) + (n - 1), mask=unused)
    else:
        write_slots(
            weights, indices, valid, budget, capacity, centre, epsilon, threshold,
            scores, mask, lengths, row, n, score_row_stride, mask_row_stride, HAS_MASK, HAS_LENGTHS, SLOTS,
        )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def route_kernel(
    scores, budgets, soft_budgets, mask, lengths, weights, indices, valid, state, numbers, arrived,
    score_row_stride, mask_row_stride, n, capacity, soft_topk_ratio, epsilon, rows, groups, programs,
    HAS_SOFT_BUDGET: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    SHARED: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One program a row; or, where rows are shared, groups of `programs`, each of which takes every `groups`-th row.

    Reads `scores` fp32, fp16 or bf16 [rows, n], each row's side by side, `budgets` int64 [rows], `soft_budgets`
    floating point [rows] or None, and as the mask `mask` bool [rows, n], likewise, `lengths` int [rows] or neither.
    Writes `weights` fp32, `indices` int64 and `valid` bool, each [rows, capacity], and `state`, fp32 [rows, 3]:
    centre, threshold from there over ε, sum of the unsaturated weights.

    Of a shared row `numbers` int32 [rows, 2, 3, programs] is where programs leave numbers, and `arrived` int32
    [rows, a cache line] their counter, which comes as zeros. `BLOCK` tokens are a program's, `SLOTS` how many slots it
    writes at once where it has the row to itself, `PROGRAMS` a power of two from `programs` up.
    """
    program = tl.program_id(0) % programs
    if SHARED:
        for number in range(tl.program_id(0) // programs, rows, groups):
            row = tl.zeros([], tl.int64) + number
            _route_row(
                row, scores, budgets, soft_budgets, mask, lengths, weights, indices, valid, state,
                numbers + row * (2 * PLACES * programs), arrived + row * COUNTER_STRIDE,
                score_row_stride, mask_row_stride, n, capacity, soft_topk_ratio, epsilon, program, programs,
                HAS_SOFT_BUDGET, HAS_MASK, HAS_LENGTHS, SHARED, PROGRAMS, BLOCK, SLOTS,
            )  # fmt: skip
    else:
        _route_row(
            tl.program_id(0).to(tl.int64), scores, budgets, soft_budgets, mask, lengths, weights, indices, valid,
            state, numbers, arrived,
            score_row_stride, mask_row_stride, n, capacity, soft_topk_ratio, epsilon, 0, programs,
            HAS_SOFT_BUDGET, HAS_MASK, HAS_LENGTHS, SHARED, PROGRAMS, BLOCK, SLOTS,
        )  # fmt: skip
