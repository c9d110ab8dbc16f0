"""What the routing kernels share: scores as integer keys, budgets, steps towards the threshold, and exchanges.

"key" is a score's image in int32 of the same order, "z" is (score - centre) / ε. The mathematics: docs/soft_topk.md.

Programs that share a row exchange numbers: each leaves its own, waits for all, and reads all. The programs of a row
are on the GPU at the same time (a cooperative launch). `turn` counts the exchanges of a row so far, alike in all of
its programs. Numbers go by two places in turn: a program that leaves one there in the exchange after next knows that
every other has read what was there, because every other came to the next exchange.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("op_routing_steps_triton needs triton; use kernel_backend='torch' without it") from error

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
