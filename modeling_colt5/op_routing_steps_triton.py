"""What the routing kernels share: scores as integer keys, budgets, steps towards the threshold, exchanges, and which
tokens of a row are routed, by a search for the budget's smallest score among the keys.

"key" is a score's image in int32 of the same order, "z" is (score - centre) / ε. The mathematics: docs/soft_topk.md.

Programs that share a row exchange numbers: each leaves its own, waits for all, and reads all. The programs of a row
are on the GPU at the same time (a cooperative launch). `turn` counts the exchanges of a row so far, alike in all of
its programs. Numbers go by two places in turn: a program that leaves one there in the exchange after next knows that
every other has read what was there, because every other came to the next exchange.
"""

from .run_launch_triton import tl, triton

LOWEST_KEY = tl.constexpr(-(2**31))

HIGHEST_KEY = tl.constexpr(2**31 - 1)

SIGN_SHIFT = tl.constexpr(31)

# The key of the least finite score.
LOWEST_FINITE_KEY = tl.constexpr(-0x7F800000)

LARGEST_SCORE = tl.constexpr(3.4028234663852886e38)

# How many 32-bit numbers a program can leave in an exchange.
PLACES = tl.constexpr(3)
# Distance in integers between the counters of arrivals of two rows, which is a cache line.
COUNTER_STRIDE = tl.constexpr(32)


@triton.jit
def load_keys(
    scores, mask, lengths, row, positions, n,
    score_row_stride, score_stride, mask_row_stride, mask_stride,
    HAS_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """int32 keys of a row's scores at `positions`: NaN the highest, what is masked the lowest, as no real one is."""
    real = positions < n
    score = tl.load(scores + row * score_row_stride + positions.to(tl.int64) * score_stride, mask=real, other=0.0)
    if HAS_MASK:
        unmasked = tl.load(mask + row * mask_row_stride + positions.to(tl.int64) * mask_stride, mask=real, other=0)
        real = real & (unmasked != 0)
    if HAS_LENGTHS:
        real = real & (positions < tl.load(lengths + row))
    score = score.to(tl.float32)
    is_nan = score != score
    score = tl.where(score > LARGEST_SCORE, LARGEST_SCORE, tl.where(score < -LARGEST_SCORE, -LARGEST_SCORE, score))
    # Both zeros are one score.
    key = tl.where(is_nan, HIGHEST_KEY, score_to_key(tl.where(score == 0.0, 0.0, score)))
    return tl.where(real, key, LOWEST_KEY)


@triton.jit
def score_to_key(score):
    """The int32 key of an fp32 score."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> SIGN_SHIFT) & HIGHEST_KEY)


@triton.jit
def key_to_score(key):
    """The fp32 score of a key; -inf of what is masked."""
    bits = key ^ ((key >> SIGN_SHIFT) & HIGHEST_KEY)
    return tl.where(key == LOWEST_KEY, float("-inf"), bits.to(tl.float32, bitcast=True))


@triton.jit
def row_budgets(budgets, soft_budgets, row, real_tokens, capacity, soft_topk_ratio, HAS_SOFT_BUDGET: tl.constexpr):
    """The row's hard budget (int32), soft budget k (fp32), and the rank of the centre (int32, from 1): ceil(k)."""
    budget = tl.minimum(tl.load(budgets + row), tl.minimum(real_tokens, capacity).to(tl.int64)).to(tl.int32)
    budget = tl.maximum(budget, 0)
    if HAS_SOFT_BUDGET:
        k = tl.load(soft_budgets + row).to(tl.float32)
    else:
        k = soft_topk_ratio * budget.to(tl.float32)
    k = tl.maximum(k, 1e-30)
    rank = tl.maximum(tl.ceil(tl.minimum(k, real_tokens.to(tl.float32))).to(tl.int32), 1)
    return budget, k, rank


@triton.jit
def closed_threshold(score, rank, tail, inside, count, k, epsilon):
    """The soft top-k's threshold t of `count` tokens, given all at once: fp32.

    A token is saturated if its rank and the tail, the sum over itself and all below it of exp((s_j - s_i) / ε), are at
    most k together (docs/soft_topk.md). The first that is not says what t is.
    """
    saturated = tl.sum((inside & (rank.to(tl.float32) + tail <= k)).to(tl.int32))
    saturated = tl.minimum(saturated, tl.ceil(k).to(tl.int32) - 1)
    first = inside & (rank == saturated)
    all_saturated = k >= count
    mass = tl.where(all_saturated, 1.0, tl.sum(tl.where(first, tail, 0.0)))
    threshold = tl.sum(tl.where(first, score, 0.0)) + epsilon * tl.log(mass / (k - saturated))
    return tl.where(all_saturated, float("-inf"), threshold)


@triton.jit
def newton_step(threshold, low, high, saturated, free, k):
    """One log-Newton step on log F(threshold) = log k, halving the bracket where it would leave it.

    F - k is formed as (saturated - k) + free, which is exact where saturated and k are large and free is small.
    """
    residual = (saturated - k) + free
    low = tl.where(residual >= 0, threshold, low)
    high = tl.where(residual <= 0, threshold, high)
    ratio = residual / k
    series = ratio * (1.0 - ratio * (0.5 - ratio * (0.33333334 - ratio * 0.25)))
    log_ratio = tl.where(tl.abs(ratio) < 1e-2, series, tl.log(1.0 + ratio))
    stepped = threshold + log_ratio * ((saturated + free) / free)
    inside = (stepped >= low) & (stepped <= high)
    return tl.where(inside, stepped, 0.5 * (low + high)), low, high


@triton.jit
def sum_three(first, second, third):
    """Three sums in one reduction."""
    third = tl.join(third, tl.zeros_like(third))
    lower, upper = tl.split(tl.sum(tl.join(tl.join(first, second), third), 0))
    first, second = tl.split(lower)
    third, _ = tl.split(upper)
    return first, second, third


@triton.jit
def is_settled(saturated, free, k):
    """Whether the solver is done."""
    # The last step makes up for what is left, as long as it does not change the saturated set. NaN counts as settled.
    return (tl.abs((saturated - k) + free) > 2e-6 * free) == 0


@triton.jit
def last_step(threshold, saturated, free, k):
    """The threshold that is exact for this saturated set, and the sum of the free weights."""
    rest = k - saturated
    proper = (rest > 0) & (free > 0)
    return tl.where(proper, threshold + tl.log(free / rest), threshold), tl.where(proper, rest, free)


@triton.jit
def weigh(z, threshold):
    """The soft top-k weight min(1, exp(z - threshold))."""
    # A comparison instead of a minimum keeps NaN.
    weight = tl.exp(z - threshold)
    return tl.where(weight > 1.0, 1.0, weight)


@triton.jit
def sum_of_blocks(partials, blocks, BLOCKS: tl.constexpr):
    """The sum of the first `blocks` of fp32 partial sums, `BLOCKS` a power of two from there up."""
    index = tl.arange(0, BLOCKS)
    return tl.sum(tl.load(partials + index, mask=index < blocks, other=0.0))


@triton.jit
def leave(number, place, turn, numbers, program, programs):
    """Leave an int32 or fp32 number for the others at one of `PLACES`, before `meet`; `numbers` is the row's."""
    where = numbers + ((turn % 2) * PLACES + place) * programs + program
    tl.store(where, number.to(tl.int32, bitcast=True))


@triton.jit
def meet(turn, arrived, programs):
    """Wait until all programs of the row have come; returns the next turn. What they left is then there to be read.

    `arrived` points to the row's counter, 0 before turn 0. One thread adds and polls; the barriers put what the
    program's other threads stored and loaded before it, and what they load, after it.
    """
    tl.debug_barrier()
    tl.atomic_add(arrived, 1, sem="release")
    # The counter only grows, so that the order of the arrivals does not matter.
    while tl.atomic_add(arrived, 0, sem="acquire") < (turn + 1) * programs:
        pass
    tl.debug_barrier()
    return turn + 1


@triton.jit
def read(place, turn, numbers, programs, like, PROGRAMS: tl.constexpr):
    """What all programs left at a place in the turn before this one, [PROGRAMS] in their order and the dtype of
    `like`; 0 beyond the last program."""
    index = tl.arange(0, PROGRAMS)
    where = numbers + (((turn + 1) % 2) * PLACES + place) * programs + index
    return tl.load(where, mask=index < programs, other=0).to(like.dtype, bitcast=True)


@triton.jit
def exchange(first, second, turn, numbers, arrived, program, programs, PROGRAMS: tl.constexpr):
    """Two numbers of each program, as all of them see them: as `read` gives them, and the next turn."""
    leave(first, 0, turn, numbers, program, programs)
    leave(second, 1, turn, numbers, program, programs)
    turn = meet(turn, arrived, programs)
    all_first = read(0, turn, numbers, programs, first, PROGRAMS)
    all_second = read(1, turn, numbers, programs, second, PROGRAMS)
    return all_first, all_second, turn


@triton.jit
def sum_over_programs(
    first, second, turn, numbers, arrived, program, programs, SHARED: tl.constexpr, PROGRAMS: tl.constexpr
):
    """Two numbers of each program summed in the order of the programs, so that every program has the same bits."""
    if SHARED:
        all_first, all_second, turn = exchange(first, second, turn, numbers, arrived, program, programs, PROGRAMS)
        first, second = tl.split(tl.sum(tl.join(all_first, all_second), 0))
    return first, second, turn


# The search's first two probes stand to either side of where the wanted score is expected if scores are normal, this
# many standard deviations of that order statistic away.
FIRST_MARGIN = tl.constexpr(2.5)
# Later probes stand this many standard deviations of a count away from where the two known counts put the rank.
LATER_MARGIN = tl.constexpr(0.6)
FEW_KEYS = tl.constexpr(4)


@triton.jit
def _both_halves(packed):
    """The counts in the halves of packed numbers."""
    return tl.join(packed & 0xFFFF, (packed >> 16) & 0xFFFF)


@triton.jit
def counts_from(
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
def largest_of_both(
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
def find_rank(
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
        from_first, from_second, from_third, from_fourth, turn = counts_from(
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
            largest, smallest, turn = largest_of_both(
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
def row_statistics(
    keys, turn, numbers, arrived, program, programs, SHARED: tl.constexpr, PROGRAMS: tl.constexpr
):  # fmt: skip
    """How many real keys a row has, in fp32, and the mean and the deviation of their scores: the search's first guess,
    which needs neither NaN nor what would overflow."""
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
    mean = mean / tl.maximum(count, 1.0)
    deviation = tl.sqrt(tl.maximum(square / tl.maximum(count, 1.0) - mean * mean, 0.0))
    return count, mean, deviation, turn


@triton.jit
def last_and_room(budget, low, high, from_low, beyond_high):
    """Keys above the last are taken, and of the equal ones as many as there is room for; from the bracket of the
    budget's rank and the counts, as `find_rank` gives them."""
    is_whole = from_low == tl.maximum(budget, 1)
    last = tl.where(is_whole, low - 1, high)
    room = tl.where(is_whole, 0, budget - beyond_high)
    return tl.where(budget > 0, last, HIGHEST_KEY), tl.where(budget > 0, room, 0)


@triton.jit
def selected_slots(
    keys, last, room, turn, numbers, arrived, program, programs, SHARED: tl.constexpr, PROGRAMS: tl.constexpr
):
    """Which keys are taken, and the slot of each: they stand in order of position, ties go to the earlier one."""
    above = (keys > last).to(tl.int32)
    equal = (keys == last).to(tl.int32)
    ranks = tl.cumsum(above + (equal << 16), 0)
    above_so_far = ranks & 0xFFFF
    equals_so_far = (ranks >> 16) & 0xFFFF
    if SHARED:
        all_above, all_equal, turn = exchange(
            tl.sum(above), tl.sum(equal), turn, numbers, arrived, program, programs, PROGRAMS
        )
        before = tl.arange(0, PROGRAMS) < program
        above_so_far += tl.sum(tl.where(before, all_above, 0))
        equals_so_far += tl.sum(tl.where(before, all_equal, 0))
    selected = (above != 0) | ((equal != 0) & (equals_so_far <= room))
    return selected, above_so_far + tl.minimum(equals_so_far, room) - 1


@triton.jit
def write_slots(
    weights, indices, valid, budget, capacity, centre, epsilon, threshold,
    scores, mask, lengths, row, n, score_row_stride, mask_row_stride,
    HAS_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Weights and validity of a row's slots, whose `indices` the program has written; what is unused is filled."""
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
        weight = weigh((key_to_score(slot_keys) - centre) / epsilon, threshold)
        inside = slots < capacity
        tl.store(weights + slots, tl.where(used, weight, 0.0), mask=inside)
        tl.store(valid + slots, used, mask=inside)
        tl.store(indices + slots, index, mask=inside)
