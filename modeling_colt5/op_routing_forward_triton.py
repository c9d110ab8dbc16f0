"""Routing forward as one Triton kernel: a row is held in the registers of one program, or of several that share it."""

from .op_routing_steps_triton import (
    COUNTER_STRIDE,
    HIGHEST_KEY,
    LOWEST_FINITE_KEY,
    LOWEST_KEY,
    PLACES,
    descent_epsilon,
    exchange,
    is_settled,
    key_to_score,
    last_step,
    leave,
    load_keys,
    meet,
    newton_step,
    read,
    row_budgets,
    score_to_key,
    sum_over_programs,
    sum_three,
    weigh,
)

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("op_routing_forward_triton needs triton; use kernel_backend='torch' without it") from error

# The solver makes at most so many passes; in all rows tried it was settled after 12.
MOST_PASSES = tl.constexpr(24)

# The first probes stand so many standard deviations of a normal order statistic to either side of its expectation.
FIRST_MARGIN = tl.constexpr(2.5)
# Later ones stand so many of a count's between two counts.
LATER_MARGIN = tl.constexpr(0.6)
FEW_KEYS = tl.constexpr(4)

# A new length must not mean a new compilation. And where a length is known to be a multiple of 16, masks are read 16
# at a time, in another layout than scores: to change between the two takes up to 131,072 bytes of shared memory.
UNSPECIALIZED = [
    "score_row_stride", "mask_row_stride", "n", "capacity", "num_iterations", "rows", "groups", "programs",
]  # fmt: skip


@triton.jit
def _both_halves(packed):
    """The counts in the halves of packed numbers."""
    return tl.join(packed & 0xFFFF, (packed >> 16) & 0xFFFF)


@triton.jit
def _counts_from(
    keys, first, second, third, fourth,
    turn, numbers, arrived, program, programs, SHARED: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """How many keys are at or above each of four; a program of at most 32,768 keys leaves two counts to an integer."""
    lower = (keys >= first).to(tl.int32) + ((keys >= second).to(tl.int32) << 16)
    upper = (keys >= third).to(tl.int32) + ((keys >= fourth).to(tl.int32) << 16)
    lower, upper = tl.split(tl.sum(tl.join(lower, upper), 0))
    if SHARED:
        lower, upper, turn = exchange(lower, upper, turn, numbers, arrived, program, programs, PROGRAMS)
        counts = tl.sum(tl.join(_both_halves(lower), _both_halves(upper)), 0)
        even, odd = tl.split(counts)
        from_first, from_second = tl.split(even)
        from_third, from_fourth = tl.split(odd)
    else:
        from_first = lower & 0xFFFF
        from_second = lower >> 16
        from_third = upper & 0xFFFF
        from_fourth = upper >> 16
    return from_first, from_second, from_third, from_fourth, turn


@triton.jit
def _largest_of_both(
    first, second, turn, numbers, arrived, program, programs, SHARED: tl.constexpr, PROGRAMS: tl.constexpr
):
    """The row's largest of each of two integers a key."""
    first, second = tl.split(tl.max(tl.join(first, second), 0))
    if SHARED:
        first, second, turn = exchange(first, second, turn, numbers, arrived, program, programs, PROGRAMS)
        real = tl.arange(0, PROGRAMS) < programs
        first = tl.where(real, first, LOWEST_KEY)
        second = tl.where(real, second, LOWEST_KEY)
        first, second = tl.split(tl.max(tl.join(first, second), 0))
    return first, second, turn


@triton.jit
def _narrow(low, high, from_low, beyond_high, probe, count, rank):
    """The bracket of the rank-th largest key after one more count."""
    low = tl.where(count >= rank, tl.maximum(low, probe), low)
    from_low = tl.where(count >= rank, tl.minimum(from_low, count), from_low)
    high = tl.where(count < rank, tl.minimum(high, probe - 1), high)
    beyond_high = tl.where(count < rank, tl.maximum(beyond_high, count), beyond_high)
    return low, high, from_low, beyond_high


@triton.jit
def _find_rank(
    keys, rank, real_tokens, mean, deviation,
    turn, numbers, arrived, program, programs, SHARED: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """A bracket [low, high] of the rank-th largest key, and the counts of keys from `low` and beyond `high`.

    It is one key, or `low` has exactly the rank's number of keys from it up. A pass counts at four keys: two where
    the counts so far, taken as exponential between the bracket's ends, put the rank, and two that divide the bracket
    in three. The first takes the scores as normal instead, with `mean` and `deviation`; at most 22 more divide all
    keys down to one. A pass that leaves few keys, or does not halve their number within the bracket, is followed by a
    look for their smallest and largest, which resolves ties.

    Where a row has no `rank` real keys, the bracket is the lowest key that a real one may be.
    """
    low = tl.full([], LOWEST_KEY + 1, tl.int32)
    high = tl.where(rank <= real_tokens, HIGHEST_KEY, low)
    from_low = real_tokens
    beyond_high = tl.zeros([], tl.int32)

    share = (rank.to(tl.float32) - 0.5) / tl.maximum(real_tokens, 1).to(tl.float32)
    # The normal quantile is approximated by a difference of powers.
    quantile = 4.91 * (tl.exp(0.14 * tl.log(1.0 - share)) - tl.exp(0.14 * tl.log(share)))
    expected = mean + deviation * quantile
    margin = tl.sqrt((share * (1.0 - share)) / tl.maximum(real_tokens, 1).to(tl.float32))
    margin = FIRST_MARGIN * deviation * margin * 2.5066283 * tl.exp(0.5 * quantile * quantile)
    first = score_to_key(expected - margin) - 1
    second = score_to_key(expected + margin) + 1
    third = score_to_key(expected - 4.0 * margin)
    fourth = score_to_key(expected + 4.0 * margin)
    while (low < high) & (from_low != rank):
        within = from_low - beyond_high
        first = tl.minimum(tl.maximum(first, low + 1), high)
        second = tl.minimum(tl.maximum(second, low + 1), high)
        third = tl.minimum(tl.maximum(third, low + 1), high)
        fourth = tl.minimum(tl.maximum(fourth, low + 1), high)
        from_first, from_second, from_third, from_fourth, turn = _counts_from(
            keys, first, second, third, fourth, turn, numbers, arrived, program, programs, SHARED, PROGRAMS
        )
        low, high, from_low, beyond_high = _narrow(low, high, from_low, beyond_high, first, from_first, rank)
        low, high, from_low, beyond_high = _narrow(low, high, from_low, beyond_high, second, from_second, rank)
        low, high, from_low, beyond_high = _narrow(low, high, from_low, beyond_high, third, from_third, rank)
        low, high, from_low, beyond_high = _narrow(low, high, from_low, beyond_high, fourth, from_fourth, rank)
        left = from_low - beyond_high
        if (from_low != rank) & ((left <= FEW_KEYS) | (2 * left > within)):
            largest = tl.where(keys <= high, keys, LOWEST_KEY)
            # The complement turns the order around.
            smallest = tl.where(keys >= low, ~keys, LOWEST_KEY)
            largest, smallest, turn = _largest_of_both(
                largest, smallest, turn, numbers, arrived, program, programs, SHARED, PROGRAMS
            )
            high = largest
            low = tl.where(rank == beyond_high + 1, high, ~smallest)

        spread = (from_low - rank).to(tl.float32) + 0.5
        spread = LATER_MARGIN * tl.sqrt(spread * (1.0 - spread / (left.to(tl.float32) + 0.5))) + 0.5
        log_low = tl.log(from_low.to(tl.float32) + 0.5)
        scale = 1.0 / (log_low - tl.log(beyond_high.to(tl.float32) + 0.5))
        nearer = (log_low - tl.log(rank.to(tl.float32) + spread)) * scale
        farther = (log_low - tl.log(tl.maximum(rank.to(tl.float32) - spread, 0.5))) * scale
        low_score = key_to_score(low)
        difference = key_to_score(high) - low_score
        first = score_to_key(low_score + nearer * difference)
        second = score_to_key(low_score + farther * difference)
        step = high // 3 - low // 3
        third = low + step
        fourth = high - step
    return low, high, from_low, beyond_high, turn


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
def _route_row(
    row, scores, budgets, soft_budgets, mask, lengths, weights, indices, valid, state, numbers, arrived,
    score_row_stride, mask_row_stride, n, capacity,
    soft_topk_ratio, epsilon, epsilon_init, log2_decay, num_iterations, program, programs,
    HAS_SOFT_BUDGET: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr, EXACT: tl.constexpr,
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
    # The search begins with a guess, which needs neither NaN nor what would overflow.
    score = key_to_score(keys)
    score = tl.where(tl.abs(score) < 1e15, score, 0.0)
    real = (keys != LOWEST_KEY).to(tl.float32)
    count, mean, square = sum_three(real, score, score * score)
    if SHARED:
        leave(count, 0, turn, numbers, program, programs)
        leave(mean, 1, turn, numbers, program, programs)
        leave(square, 2, turn, numbers, program, programs)
        turn = meet(turn, arrived, programs)
        count, mean, square = sum_three(
            read(0, turn, numbers, programs, count, PROGRAMS),
            read(1, turn, numbers, programs, mean, PROGRAMS),
            read(2, turn, numbers, programs, square, PROGRAMS),
        )
    real_tokens = count.to(tl.int32)
    mean = mean / tl.maximum(count, 1.0)
    deviation = tl.sqrt(tl.maximum(square / tl.maximum(count, 1.0) - mean * mean, 0.0))
    budget, k, rank = row_budgets(budgets, soft_budgets, row, real_tokens, capacity, soft_topk_ratio, HAS_SOFT_BUDGET)
    all_saturated = k >= count

    hard_rank = tl.maximum(budget, 1)
    low, high, from_low, beyond_high, turn = _find_rank(
        keys, hard_rank, real_tokens, mean, deviation, turn, numbers, arrived, program, programs, SHARED, PROGRAMS
    )
    # Keys above this one are taken, and of the equal ones as many as there is room for.
    hard_key = tl.where(from_low == hard_rank, low - 1, high)
    room = tl.where(from_low == hard_rank, 0, budget - beyond_high)
    hard_key = tl.where(budget > 0, hard_key, HIGHEST_KEY)
    room = tl.where(budget > 0, room, 0)

    if EXACT:
        # Any score will do as a centre that has fewer than k above it, and from which the weights below 1 make up for
        # the rest.
        centre = key_to_score(tl.maximum(low, LOWEST_FINITE_KEY))
        saturated, free, turn = _saturated_and_free(
            _relative_weights(keys, centre, epsilon, 0.0), 1.0,
            turn, numbers, arrived, program, programs, SHARED, PROGRAMS,
        )  # fmt: skip
        if (k < count) & ((saturated >= k) | (saturated + free < k)):
            soft_key, _, _, _, turn = _find_rank(
                keys, rank, real_tokens, mean, deviation, turn, numbers, arrived, program, programs, SHARED, PROGRAMS
            )
            # The least key from there on is found by the largest complement.
            lowest_key, _, turn = _largest_of_both(
                tl.where(keys >= soft_key, ~keys, LOWEST_KEY), keys,
                turn, numbers, arrived, program, programs, SHARED, PROGRAMS,
            )  # fmt: skip
            centre = key_to_score(~lowest_key)
            saturated, free, turn = _saturated_and_free(
                _relative_weights(keys, centre, epsilon, 0.0), 1.0,
                turn, numbers, arrived, program, programs, SHARED, PROGRAMS,
            )  # fmt: skip
        centre = tl.where(all_saturated, 0.0, centre)
        last_epsilon = epsilon
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
        mass = tl.where(all_saturated, 0.0, mass)
        if program == 0:
            tl.store(state + row * 3, centre)
            tl.store(state + row * 3 + 1, threshold)
            tl.store(state + row * 3 + 2, mass)
    else:
        tl.static_assert(not SHARED, "coordinate descent takes rows of one program")
        score = key_to_score(keys)
        log_k = tl.log(k)
        largest = tl.max(score)
        current = descent_epsilon(0.0, epsilon, epsilon_init, log2_decay)
        centre = current * (tl.log(tl.maximum(count, 1.0)) - log_k)
        tl.store(state + row * num_iterations, tl.where(all_saturated, float("-inf"), centre))
        for iteration in range(1, num_iterations):
            current = descent_epsilon(iteration * 1.0, epsilon, epsilon_init, log2_decay)
            top = tl.minimum(largest, centre)
            # A comparison instead of a minimum keeps NaN.
            total = tl.sum(tl.exp((tl.where(score > centre, centre, score) - top) / current))
            centre = top + current * (tl.log(total) - log_k)
            tl.store(state + row * num_iterations + iteration, tl.where(all_saturated, float("-inf"), centre))
        last_epsilon = descent_epsilon(num_iterations * 1.0, epsilon, epsilon_init, log2_decay)
        threshold = tl.where(all_saturated, float("-inf"), 0.0)

    above = (keys > hard_key).to(tl.int32)
    equal = (keys == hard_key).to(tl.int32)
    ranks = tl.cumsum(above + (equal << 16), 0)
    above_so_far = ranks & 0xFFFF
    equals_so_far = (ranks >> 16) & 0xFFFF
    weights += row * capacity
    indices += row * capacity
    valid += row * capacity
    if SHARED:
        all_above, all_equal, turn = exchange(
            tl.sum(above), tl.sum(equal), turn, numbers, arrived, program, programs, PROGRAMS
        )
        before = tl.arange(0, PROGRAMS) < program
        above_so_far += tl.sum(tl.where(before, all_above, 0))
        equals_so_far += tl.sum(tl.where(before, all_equal, 0))
    selected = (above != 0) | ((equal != 0) & (equals_so_far <= room))
    slot = above_so_far + tl.minimum(equals_so_far, room) - 1
    tl.store(indices + slot, positions.to(tl.int64), mask=selected)
    if SHARED:
        tl.store(weights + slot, weigh((key_to_score(keys) - centre) / last_epsilon, threshold), mask=selected)
        tl.store(valid + slot, selected, mask=selected)
        for start in range(program * BLOCK, capacity, programs * BLOCK):
            slots = start + tl.arange(0, BLOCK)
            unused = (slots >= budget) & (slots < capacity)
            tl.store(weights + slots, tl.zeros([BLOCK], tl.float32), mask=unused)
            tl.store(valid + slots, slots < budget, mask=unused)
            tl.store(indices + slots, tl.zeros([BLOCK], tl.int64) + (n - 1), mask=unused)
    else:
        # Weights are computed by slot: the slots are few, and other threads of the program found their tokens.
        tl.debug_barrier()
        for start in range(0, capacity, SLOTS):
            slots = start + tl.arange(0, SLOTS)
            used = slots < budget
            index = tl.load(indices + slots, mask=used, other=n - 1)
            slot_keys = load_keys(
                scores, mask, lengths, row, index, n,
                score_row_stride, 1, mask_row_stride, 1, HAS_MASK, HAS_LENGTHS,
            )  # fmt: skip
            weight = weigh((key_to_score(slot_keys) - centre) / last_epsilon, threshold)
            inside = slots < capacity
            tl.store(weights + slots, tl.where(used, weight, 0.0), mask=inside)
            tl.store(valid + slots, used, mask=inside)
            tl.store(indices + slots, index, mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def route_kernel(
    scores, budgets, soft_budgets, mask, lengths, weights, indices, valid, state, numbers, arrived,
    score_row_stride, mask_row_stride, n, capacity,
    soft_topk_ratio, epsilon, epsilon_init, log2_decay, num_iterations, rows, groups, programs,
    HAS_SOFT_BUDGET: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr, EXACT: tl.constexpr,
    SHARED: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One program a row; or, where rows are shared, groups of `programs`, each of which takes every `groups`-th row.

    Reads `scores` fp32, fp16 or bf16 [rows, n], each row's side by side, `budgets` int64 [rows], `soft_budgets`
    floating point [rows] or None, and as the mask `mask` bool [rows, n], likewise, `lengths` int [rows] or neither.
    Writes `weights` fp32, `indices` int64 and `valid` bool, each [rows, capacity], and `state`, fp32 [rows, 3]
    (centre, threshold from there over ε, sum of the unsaturated weights) or, not `EXACT`, [rows, num_iterations] (the
    thresholds).

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
                score_row_stride, mask_row_stride, n, capacity,
                soft_topk_ratio, epsilon, epsilon_init, log2_decay, num_iterations, program, programs,
                HAS_SOFT_BUDGET, HAS_MASK, HAS_LENGTHS, EXACT, SHARED, PROGRAMS, BLOCK, SLOTS,
            )  # fmt: skip
    else:
        _route_row(
            tl.program_id(0).to(tl.int64), scores, budgets, soft_budgets, mask, lengths, weights, indices, valid,
            state, numbers, arrived,
            score_row_stride, mask_row_stride, n, capacity,
            soft_topk_ratio, epsilon, epsilon_init, log2_decay, num_iterations, 0, programs,
            HAS_SOFT_BUDGET, HAS_MASK, HAS_LENGTHS, EXACT, SHARED, PROGRAMS, BLOCK, SLOTS,
        )  # fmt: skip
