"""The routing operation as Triton kernels: threshold, selection and weights forward, closed-form gradient backward.

Rows of up to `LONGEST_ROW` tokens are one program each, the row held in registers. Longer rows are passes of a grid
of blocks: a radix search with integer histograms, log-Newton passes, and one pass that selects and writes. Sums over
blocks are partials added up in fixed order, so results are bit-identical from run to run. docs/soft_topk.md has the
mathematics; "key" is a score's image in int32 of the same order, "z" is (score - centre) / ε.
"""

import math

import torch

from .kernel_launch import cdiv, launch, next_power_of_2

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("modeling_colt5.routing_triton needs triton") from error

LONGEST_ROW = 16384
SHORTEST_BLOCK = 2048
# slots that one program of the backward sums by itself
SLOTS_OF_A_PART = 4096
# log-Newton passes of the grid; docs/soft_topk.md counts what rows of many kinds need
NEWTON_PASSES = 10
HISTOGRAM_WIDTH = 7 * 256 + 16

LOWEST_KEY = tl.constexpr(-(2**31))
HIGHEST_KEY = tl.constexpr(2**31 - 1)
SIGN_SHIFT = tl.constexpr(31)
LARGEST_SCORE = tl.constexpr(3.4028234663852886e38)
MOST_PASSES = tl.constexpr(24)
FEW_DIGITS = tl.constexpr(256)


@triton.jit
def _load_keys(
    scores, mask, lengths, row, positions, n,
    score_row_stride, score_stride, mask_row_stride, mask_stride,
    HAS_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """Keys of a row's scores: NaN the highest, what is masked the lowest, which no real score has."""
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
    # both zeros are one score
    score = tl.where(score == 0.0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> SIGN_SHIFT) & HIGHEST_KEY)
    key = tl.where(is_nan, HIGHEST_KEY, key)
    return tl.where(real, key, LOWEST_KEY)


@triton.jit
def _key_to_score(key):
    bits = key ^ ((key >> SIGN_SHIFT) & HIGHEST_KEY)
    return tl.where(key == LOWEST_KEY, float("-inf"), bits.to(tl.float32, bitcast=True))


@triton.jit
def _budgets(budgets, soft_budgets, row, real_tokens, capacity, soft_topk_ratio, HAS_SOFT_BUDGET: tl.constexpr):
    """The row's hard budget, soft budget k, and the rank of the centre: the ceil(k)-th largest score."""
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
def _newton_step(threshold, low, high, saturated, free, k):
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
def _saturated_and_free(z, threshold):
    """How many z are above the threshold, and the sum of the weights of the rest, in one reduction."""
    saturated = z > threshold
    free = tl.where(saturated, 0.0, tl.exp(z - threshold))
    return tl.split(tl.sum(tl.join(saturated.to(tl.float32), free), 0))


@triton.jit
def _is_settled(saturated, free, k):
    # the last step makes up for what is left, as long as it does not change the saturated set
    return tl.abs((saturated - k) + free) <= 2e-6 * free


@triton.jit
def _last_step(threshold, saturated, free, k):
    """The threshold that is exact for this saturated set, and the sum of the free weights."""
    rest = k - saturated
    proper = (rest > 0) & (free > 0)
    return tl.where(proper, threshold + tl.log(free / rest), threshold), tl.where(proper, rest, free)


@triton.jit
def _weigh(z, threshold):
    # a comparison instead of a minimum keeps NaN
    weight = tl.exp(z - threshold)
    return tl.where(weight > 1.0, 1.0, weight)


@triton.jit
def _write_unused(weights, indices, valid, slots, budget, n, capacity):
    unused = (slots >= budget) & (slots < capacity)
    tl.store(weights + slots, tl.zeros_like(slots).to(tl.float32), mask=unused)
    tl.store(indices + slots, tl.zeros_like(slots).to(tl.int64) + (n - 1), mask=unused)
    tl.store(valid + slots, slots < budget, mask=unused)


@triton.jit
def _descent_epsilon(iteration, epsilon, epsilon_init, log2_decay):
    return tl.maximum(epsilon_init * tl.exp2(iteration * log2_decay), epsilon)


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
    keys = _load_keys(
        scores, mask, lengths, row, positions, n,
        score_row_stride, score_stride, mask_row_stride, mask_stride, HAS_MASK, HAS_LENGTHS,
    )  # fmt: skip
    real_tokens = tl.sum((keys != LOWEST_KEY).to(tl.int32))
    budget, k, rank = _budgets(budgets, soft_budgets, row, real_tokens, capacity, soft_topk_ratio, HAS_SOFT_BUDGET)

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

    score = _key_to_score(keys)
    if EXACT:
        all_saturated = k >= real_tokens.to(tl.float32)
        centre = tl.where(all_saturated, 0.0, _key_to_score(soft_key))
        last_epsilon = epsilon
        z = (score - centre) / epsilon
        saturated, free = _saturated_and_free(z, 0.0)
        low = 0.0
        high = tl.log(free / (k - saturated))
        threshold = high
        passes = 0
        unsettled = tl.where(all_saturated, 0, 1)
        while unsettled != 0:
            saturated, free = _saturated_and_free(z, threshold)
            following, low, high = _newton_step(threshold, low, high, saturated, free, k)
            passes += 1
            unsettled = tl.where(_is_settled(saturated, free, k) | (passes >= MOST_PASSES), 0, 1)
            threshold = tl.where(unsettled != 0, following, threshold)
        threshold, mass = _last_step(threshold, saturated, free, k)
        threshold = tl.where(all_saturated, float("-inf"), threshold)
        mass = tl.where(all_saturated, 0.0, mass)
        tl.store(state + row * 3, centre)
        tl.store(state + row * 3 + 1, threshold)
        tl.store(state + row * 3 + 2, mass)
    else:
        log_k = tl.log(k)
        largest = tl.max(score)
        current = _descent_epsilon(0.0, epsilon, epsilon_init, log2_decay)
        centre = current * (tl.log(tl.maximum(real_tokens, 1).to(tl.float32)) - log_k)
        all_saturated = k >= real_tokens.to(tl.float32)
        tl.store(state + row * num_iterations, tl.where(all_saturated, float("-inf"), centre))
        for iteration in range(1, num_iterations):
            current = _descent_epsilon(iteration * 1.0, epsilon, epsilon_init, log2_decay)
            top = tl.minimum(largest, centre)
            # a comparison instead of a minimum keeps NaN
            total = tl.sum(tl.exp((tl.where(score > centre, centre, score) - top) / current))
            centre = top + current * (tl.log(total) - log_k)
            tl.store(state + row * num_iterations + iteration, tl.where(all_saturated, float("-inf"), centre))
        last_epsilon = _descent_epsilon(num_iterations * 1.0, epsilon, epsilon_init, log2_decay)
        threshold = tl.where(all_saturated, float("-inf"), 0.0)

    # loaded again, so that the iteration above needs registers for z alone
    keys = _load_keys(
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
        slot_keys = _load_keys(
            scores, mask, lengths, row, index, n,
            score_row_stride, score_stride, mask_row_stride, mask_stride, HAS_MASK, HAS_LENGTHS,
        )  # fmt: skip
        weight = _weigh((_key_to_score(slot_keys) - centre) / last_epsilon, threshold)
        inside = slots < capacity
        tl.store(weights + slots, tl.where(used, weight, 0.0), mask=inside)
        tl.store(valid + slots, used, mask=inside)
        tl.store(indices + slots, index, mask=inside)


@triton.jit
def _find_digit(histogram, rank):
    """The highest digit with at least `rank` entries at or above it, and the rank left among the entries of it."""
    digits = tl.arange(0, 256)
    counts = tl.load(histogram + digits)
    at_or_above = tl.sum(counts) - tl.cumsum(counts, 0) + counts
    digit = tl.maximum(tl.sum((at_or_above >= rank).to(tl.int32)) - 1, 0)
    return digit, rank - tl.sum(tl.where(digits > digit, counts, 0))


@triton.jit
def _search_state(
    work, budgets, soft_budgets, row, capacity, soft_topk_ratio, HAS_SOFT_BUDGET: tl.constexpr, LEVEL: tl.constexpr
):
    """Prefixes and remaining ranks of both searches after `LEVEL` digits; `work` points to the row's histograms.

    Level 1 starts from the shared histogram; a later one from what level - 1's pass wrote, and its two histograms.
    """
    if LEVEL == 1:
        real_tokens = tl.sum(tl.load(work + tl.arange(0, 256)))
        budget, k, rank = _budgets(budgets, soft_budgets, row, real_tokens, capacity, soft_topk_ratio, HAS_SOFT_BUDGET)
        hard_digit, hard_rank = _find_digit(work, tl.maximum(budget, 1))
        soft_digit, soft_rank = _find_digit(work, rank)
        hard_prefix = (hard_digit ^ 0x80) << 24
        soft_prefix = (soft_digit ^ 0x80) << 24
    else:
        before = work + 7 * 256 + 4 * (LEVEL - 2)
        hard_prefix = tl.load(before)
        hard_rank = tl.load(before + 1)
        soft_prefix = tl.load(before + 2)
        soft_rank = tl.load(before + 3)
        # one histogram serves both searches as long as they have one prefix
        apart = (hard_prefix != soft_prefix).to(tl.int32)
        hard_digit, hard_rank = _find_digit(work + (2 * LEVEL - 3) * 256, hard_rank)
        soft_digit, soft_rank = _find_digit(work + (2 * LEVEL - 3 + apart) * 256, soft_rank)
        hard_prefix = hard_prefix | (hard_digit << (32 - 8 * LEVEL))
        soft_prefix = soft_prefix | (soft_digit << (32 - 8 * LEVEL))
    return hard_prefix, hard_rank, soft_prefix, soft_rank


@triton.jit
def _count_digits(histogram, digit, mask):
    """Adds the masked digits to a histogram; the few of the lower levels go there one by one.

    The atomics are of integers: their order cannot change a count.
    """
    if tl.sum(mask.to(tl.int32)) <= FEW_DIGITS:
        tl.atomic_add(histogram + digit, tl.full(digit.shape, 1, tl.int32), mask=mask, sem="relaxed")
    else:
        counts = tl.histogram(digit, 256, mask=mask)
        tl.atomic_add(histogram + tl.arange(0, 256), counts, mask=counts != 0, sem="relaxed")


@triton.jit
def histogram_kernel(
    scores, budgets, soft_budgets, mask, lengths, work,
    score_row_stride, score_stride, mask_row_stride, mask_stride, n, capacity, soft_topk_ratio,
    blocks, work_width,
    HAS_SOFT_BUDGET: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    LEVEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts of the keys' digit `LEVEL` (0 the highest) among the keys that share the prefix found so far."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    keys = _load_keys(
        scores, mask, lengths, row, block * BLOCK + tl.arange(0, BLOCK), n,
        score_row_stride, score_stride, mask_row_stride, mask_stride, HAS_MASK, HAS_LENGTHS,
    )  # fmt: skip
    work += row * work_width
    real = keys != LOWEST_KEY
    if LEVEL == 0:
        _count_digits(work, ((keys >> 24) & 0xFF) ^ 0x80, real)
    else:
        hard_prefix, hard_rank, soft_prefix, soft_rank = _search_state(
            work, budgets, soft_budgets, row, capacity, soft_topk_ratio, HAS_SOFT_BUDGET, LEVEL
        )
        if block == 0:
            after = work + 7 * 256 + 4 * (LEVEL - 1)
            tl.store(after, hard_prefix)
            tl.store(after + 1, hard_rank)
            tl.store(after + 2, soft_prefix)
            tl.store(after + 3, soft_rank)
        shift: tl.constexpr = 32 - 8 * LEVEL
        digit = (keys >> (shift - 8)) & 0xFF
        _count_digits(work + (2 * LEVEL - 1) * 256, digit, real & ((keys >> shift) == (hard_prefix >> shift)))
        if hard_prefix != soft_prefix:
            _count_digits(work + 2 * LEVEL * 256, digit, real & ((keys >> shift) == (soft_prefix >> shift)))


@triton.jit
def _sum_of_blocks(partials, blocks, BLOCKS: tl.constexpr):
    index = tl.arange(0, BLOCKS)
    return tl.sum(tl.load(partials + index, mask=index < blocks, other=0.0))


@triton.jit
def _sums_of_blocks(pair, blocks, BLOCKS: tl.constexpr):
    """A row's saturated count and free weights, from the partials of its blocks."""
    index = tl.arange(0, BLOCKS)
    saturated = tl.load(pair + index, mask=index < blocks, other=0.0)
    free = tl.load(pair + blocks + index, mask=index < blocks, other=0.0)
    return tl.split(tl.sum(tl.join(saturated, free), 0))


@triton.jit
def _store_partials(pair, keys, centre, threshold, epsilon, block, blocks):
    saturated, free = _saturated_and_free((_key_to_score(keys) - centre) / epsilon, threshold)
    tl.store(pair + block, saturated)
    tl.store(pair + blocks + block, free)


@triton.jit
def _store_pass(history, first, second, third, settled):
    tl.store(history, first)
    tl.store(history + 1, second)
    tl.store(history + 2, third)
    tl.store(history + 3, settled)


@triton.jit(do_not_specialize=["step"])
def newton_kernel(
    scores, budgets, soft_budgets, mask, lengths, work, sums,
    score_row_stride, score_stride, mask_row_stride, mask_stride, n, capacity, soft_topk_ratio, epsilon,
    blocks, work_width, sums_width, step,
    HAS_SOFT_BUDGET: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    STAGE: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Partial sums of the saturated count and the free weights at the threshold that the pass before leads to.

    `sums` [rows, 6 · blocks + 4 · passes]: two pairs of partials in turn; counts above and equal to the hard key; k;
    then of each pass its threshold and bracket, or, once the threshold is settled, the threshold and the free mass.
    """
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    keys = _load_keys(
        scores, mask, lengths, row, block * BLOCK + tl.arange(0, BLOCK), n,
        score_row_stride, score_stride, mask_row_stride, mask_stride, HAS_MASK, HAS_LENGTHS,
    )  # fmt: skip
    work += row * work_width
    found = work + 7 * 256 + 12
    sums += row * sums_width
    history = sums + 6 * blocks
    if STAGE == 0:
        hard_key, hard_rank, soft_key, soft_rank = _search_state(
            work, budgets, soft_budgets, row, capacity, soft_topk_ratio, HAS_SOFT_BUDGET, 4
        )
        if block == 0:
            real_tokens = tl.sum(tl.load(work + tl.arange(0, 256)))
            budget, k, rank = _budgets(
                budgets, soft_budgets, row, real_tokens, capacity, soft_topk_ratio, HAS_SOFT_BUDGET
            )
            tl.store(found, hard_key)
            tl.store(found + 1, budget)
            tl.store(found + 2, soft_key)
            tl.store(history, tl.where(k >= real_tokens.to(tl.float32), float("inf"), k))
        tl.store(sums + 4 * blocks + block, tl.sum((keys > hard_key).to(tl.int32)).to(tl.float32))
        tl.store(sums + 5 * blocks + block, tl.sum((keys == hard_key).to(tl.int32)).to(tl.float32))
        _store_partials(sums, keys, _key_to_score(soft_key), 0.0, epsilon, block, blocks)
    else:
        k = tl.load(history)
        before = history + 4 * (step - 1)
        after = history + 4 * step
        pair = sums + 2 * blocks * (step % 2)
        pair_before = sums + 2 * blocks * ((step + 1) % 2)
        centre = _key_to_score(tl.load(found + 2))
        if STAGE == 1:
            if k == float("inf"):
                if block == 0:
                    _store_pass(after, float("-inf"), 0.0, 0.0, 1.0)
            else:
                saturated, free = _sums_of_blocks(pair_before, blocks, BLOCKS)
                high = tl.log(free / (k - saturated))
                if block == 0:
                    _store_pass(after, high, 0.0, high, 0.0)
                _store_partials(pair, keys, centre, high, epsilon, block, blocks)
        else:
            threshold = tl.load(before)
            low = tl.load(before + 1)
            high = tl.load(before + 2)
            if tl.load(before + 3) == 0.0:
                saturated, free = _sums_of_blocks(pair_before, blocks, BLOCKS)
                if _is_settled(saturated, free, k):
                    settled_threshold, mass = _last_step(threshold, saturated, free, k)
                    if block == 0:
                        _store_pass(after, settled_threshold, mass, 0.0, 1.0)
                else:
                    following, low, high = _newton_step(threshold, low, high, saturated, free, k)
                    if block == 0:
                        _store_pass(after, following, low, high, 0.0)
                    _store_partials(pair, keys, centre, following, epsilon, block, blocks)
            else:
                if block == 0:
                    _store_pass(after, threshold, low, high, 1.0)


@triton.jit
def select_kernel(
    scores, budgets, soft_budgets, mask, lengths, weights, indices, valid, state, work, sums,
    score_row_stride, score_stride, mask_row_stride, mask_stride, n, capacity, soft_topk_ratio, epsilon,
    blocks, work_width, sums_width, passes,
    HAS_SOFT_BUDGET: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The exact last step of the threshold, then a block's selected tokens to their slots."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    positions = block * BLOCK + tl.arange(0, BLOCK)
    keys = _load_keys(
        scores, mask, lengths, row, positions, n,
        score_row_stride, score_stride, mask_row_stride, mask_stride, HAS_MASK, HAS_LENGTHS,
    )  # fmt: skip
    work += row * work_width
    sums += row * sums_width
    hard_key = tl.load(work + 7 * 256 + 12)
    budget = tl.load(work + 7 * 256 + 13)
    history = sums + 6 * blocks
    last = history + 4 * passes
    saturated, free = _sums_of_blocks(sums + 2 * blocks * (passes % 2), blocks, BLOCKS)
    threshold, mass = _last_step(tl.load(last), saturated, free, tl.load(history))
    settled = tl.load(last + 3) != 0.0
    threshold = tl.where(settled, tl.load(last), threshold)
    mass = tl.where(settled, tl.load(last + 1), mass)
    centre = tl.where(threshold == float("-inf"), 0.0, _key_to_score(tl.load(work + 7 * 256 + 14)))
    if block == 0:
        tl.store(state + row * 3, centre)
        tl.store(state + row * 3 + 1, threshold)
        tl.store(state + row * 3 + 2, mass)

    index = tl.arange(0, BLOCKS)
    above_of_blocks = tl.load(sums + 4 * blocks + index, mask=index < blocks, other=0.0).to(tl.int32)
    equal_of_blocks = tl.load(sums + 5 * blocks + index, mask=index < blocks, other=0.0).to(tl.int32)
    room = budget - tl.sum(above_of_blocks)
    above_before = tl.sum(tl.where(index < block, above_of_blocks, 0))
    equal_before = tl.sum(tl.where(index < block, equal_of_blocks, 0))
    above = (keys > hard_key).to(tl.int32)
    equal = (keys == hard_key).to(tl.int32)
    ranks = tl.cumsum(above + (equal << 16), 0)
    equals_so_far = equal_before + ((ranks >> 16) & 0xFFFF)
    selected = (above != 0) | ((equal != 0) & (equals_so_far <= room))
    slot = above_before + (ranks & 0xFFFF) + tl.minimum(equals_so_far, room) - 1
    weights += row * capacity
    indices += row * capacity
    valid += row * capacity
    tl.store(weights + slot, _weigh((_key_to_score(keys) - centre) / epsilon, threshold), mask=selected)
    tl.store(indices + slot, positions.to(tl.int64), mask=selected)
    tl.store(valid + slot, selected, mask=selected)
    _write_unused(weights, indices, valid, positions, budget, n, capacity)


@triton.jit
def _first_slot(indices, position, capacity, STEPS: tl.constexpr, FAN: tl.constexpr):
    """How many of the ascending `indices` are below `position`: a search with `FAN` probes a step."""
    probes = tl.arange(0, FAN)
    first = 0
    size = capacity
    for _ in tl.static_range(STEPS):
        stride = tl.maximum((size + FAN - 1) // FAN, 1)
        offsets = probes * stride
        inside = offsets < size
        probed = tl.load(indices + first + offsets, mask=inside, other=0)
        below = tl.sum((inside & (probed < position)).to(tl.int32))
        first = tl.where(below > 0, first + (below - 1) * stride + 1, first)
        size = tl.where(below > 0, tl.minimum(stride - 1, capacity - first), 0)
    return first


@triton.jit
def slot_sums_kernel(grad_weights, weights, sums, grad_row_stride, grad_stride, capacity, parts, PART: tl.constexpr):
    """Partial sums of weight times cotangent over the unsaturated slots."""
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    slots = part * PART + tl.arange(0, PART)
    inside = slots < capacity
    weight = tl.load(weights + row * capacity + slots, mask=inside, other=0.0)
    # an unused slot has weight 0, and its cotangent may be anything
    free = inside & (weight < 1.0) & (weight > 0.0)
    grad = tl.load(grad_weights + row * grad_row_stride + slots.to(tl.int64) * grad_stride, mask=free, other=0.0)
    tl.store(sums + row * parts + part, tl.sum(tl.where(free, weight * grad, 0.0)))


@triton.jit
def route_backward_kernel(
    grad_weights, weights, indices, valid, scores, mask, lengths, state, sums, grad_scores, grad_budget,
    grad_row_stride, grad_stride, score_row_stride, score_stride, mask_row_stride, mask_stride,
    n, capacity, epsilon, blocks, parts,
    HAS_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr, ONE_PART: tl.constexpr,
    PARTS: tl.constexpr, STEPS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of scores: -q ⟨g⟩ / ε everywhere, then q (g - ⟨g⟩) / ε over it where tokens are routed."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    weights += row * capacity
    indices += row * capacity
    valid += row * capacity
    grad_weights += row * grad_row_stride
    probes = tl.arange(0, SLOTS)
    start = block * BLOCK
    if ONE_PART:
        inside = probes < capacity
        weight = tl.load(weights + probes, mask=inside, other=0.0)
        free = inside & (weight < 1.0) & (weight > 0.0)
        grad = tl.load(grad_weights + probes.to(tl.int64) * grad_stride, mask=free, other=0.0)
        total = tl.sum(tl.where(free, weight * grad, 0.0))
        index = tl.load(indices + probes, mask=inside, other=n)
        first = tl.sum((index < start).to(tl.int32))
    else:
        total = _sum_of_blocks(sums + row * parts, parts, PARTS)
        first = _first_slot(indices, start, capacity, STEPS, SLOTS)
    centre = tl.load(state + row * 3)
    threshold = tl.load(state + row * 3 + 1)
    mass = tl.load(state + row * 3 + 2)
    mean = tl.where(mass > 0.0, total / mass, 0.0)
    if block == 0:
        tl.store(grad_budget + row, mean)

    positions = start + tl.arange(0, BLOCK)
    keys = _load_keys(
        scores, mask, lengths, row, positions, n,
        score_row_stride, score_stride, mask_row_stride, mask_stride, HAS_MASK, HAS_LENGTHS,
    )  # fmt: skip
    free_weight = tl.exp((_key_to_score(keys) - centre) / epsilon - threshold)
    free_weight = tl.where((keys != LOWEST_KEY) & (free_weight < 1.0), free_weight, 0.0)
    tl.store(grad_scores + row * n + positions, -free_weight * mean / epsilon, mask=positions < n)
    # the stores below overwrite some of those above, from other threads of the program
    tl.debug_barrier()
    more = 1
    while more != 0:
        slots = first + probes
        inside = slots < capacity
        index = tl.load(indices + slots, mask=inside, other=n)
        here = inside & (index < start + BLOCK)
        used = tl.load(valid + slots, mask=here, other=0) != 0
        weight = tl.load(weights + slots, mask=used, other=0.0)
        grad = tl.load(grad_weights + slots.to(tl.int64) * grad_stride, mask=used, other=0.0)
        grad = tl.where(weight < 1.0, weight * (grad - mean) / epsilon, 0.0)
        tl.store(grad_scores + row * n + index, grad, mask=used)
        first += SLOTS
        more = tl.min(here.to(tl.int32))


@triton.jit
def descent_backward_kernel(
    grad_weights, weights, indices, valid, scores, mask, lengths, soft_budgets, state, grad_scores, grad_budget,
    grad_row_stride, grad_stride, score_row_stride, score_stride, mask_row_stride, mask_stride,
    n, capacity, epsilon, epsilon_init, log2_decay, num_iterations,
    HAS_SOFT_BUDGET: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """`descent_backward` of soft_topk_reference.py, one program a row: the iteration backward from its thresholds."""
    row = tl.program_id(0).to(tl.int64)
    weights += row * capacity
    indices += row * capacity
    valid += row * capacity
    grad_weights += row * grad_row_stride
    state += row * num_iterations
    positions = tl.arange(0, BLOCK)
    keys = _load_keys(
        scores, mask, lengths, row, positions, n,
        score_row_stride, score_stride, mask_row_stride, mask_stride, HAS_MASK, HAS_LENGTHS,
    )  # fmt: skip
    score = _key_to_score(keys)
    last = tl.load(state + num_iterations - 1)
    descended = last != float("-inf")
    last_epsilon = _descent_epsilon(num_iterations * 1.0, epsilon, epsilon_init, log2_decay)

    total = 0.0
    for start in range(0, capacity, SLOTS):
        slots = start + tl.arange(0, SLOTS)
        inside = slots < capacity
        weight = tl.load(weights + slots, mask=inside, other=0.0)
        free = inside & (weight < 1.0) & (weight > 0.0)
        grad = tl.load(grad_weights + slots.to(tl.int64) * grad_stride, mask=free, other=0.0)
        total += tl.sum(tl.where(free, weight * grad, 0.0))
    grad_threshold = tl.where(descended, -total / last_epsilon, 0.0)

    grad_score = tl.zeros([BLOCK], tl.float32)
    before = _descent_epsilon(num_iterations - 1.0, epsilon, epsilon_init, log2_decay)
    grad_k = -before * grad_threshold
    for back in range(1, num_iterations):
        column = num_iterations - 1 - back
        threshold = tl.load(state + column)
        current = _descent_epsilon(column + 1.0, epsilon, epsilon_init, log2_decay)
        saturated = tl.sum((score >= threshold).to(tl.int32)).to(tl.float32)
        free_weight = tl.where(score < threshold, tl.exp((score - threshold) / current), 0.0)
        free = tl.sum(free_weight)
        # far above all scores nothing is left of the sum, nor of the threshold's effect
        share = tl.where(free + saturated > 0.0, grad_threshold / (free + saturated), 0.0)
        grad_score += share * free_weight
        grad_threshold = share * saturated
        grad_k += -_descent_epsilon(column * 1.0, epsilon, epsilon_init, log2_decay) * grad_threshold
    if HAS_SOFT_BUDGET:
        k = tl.load(soft_budgets + row).to(tl.float32)
        tl.store(grad_budget + row, tl.where(descended, grad_k / k, 0.0))

    grad_score = tl.where(keys != LOWEST_KEY, tl.where(descended, grad_score, 0.0), 0.0)
    tl.store(grad_scores + row * n + positions, grad_score, mask=positions < n)
    tl.debug_barrier()
    for start in range(0, capacity, SLOTS):
        slots = start + tl.arange(0, SLOTS)
        used = tl.load(valid + slots, mask=slots < capacity, other=0) != 0
        weight = tl.load(weights + slots, mask=used, other=0.0)
        used = used & (weight < 1.0)
        index = tl.load(indices + slots, mask=used, other=0)
        grad = tl.load(grad_weights + slots.to(tl.int64) * grad_stride, mask=used, other=0.0)
        shared = tl.load(grad_scores + row * n + index, mask=used, other=0.0)
        tl.store(grad_scores + row * n + index, shared + weight * grad / last_epsilon, mask=used)


def _row_warps(block: int) -> int:
    return min(max(block // 512, 4), 16)


def _grid_block(n: int) -> int:
    """Tokens of a program: enough that a row has at most 1,024 programs, for which sums over blocks are short."""
    return max(SHORTEST_BLOCK, next_power_of_2(cdiv(n, 1024)))


def kernels_take(n: int, solver: str) -> bool:
    """Whether there is a kernel for rows of `n` tokens: coordinate descent has one for rows that fit one program."""
    return solver == "exact" or n <= LONGEST_ROW


def route_forward(
    scores: torch.Tensor,
    budget: torch.Tensor,
    soft_budget: torch.Tensor | None,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    capacity: int,
    soft_topk_ratio: float,
    solver: str,
    epsilon: float,
    num_iterations: int,
    epsilon_init: float,
    epsilon_decay: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`route_reference` of routing_reference.py by kernels; for fp16, bf16 and fp32 scores.

    Returns:
        weights, indices, valid [rows, capacity] and state [rows, 3 or iterations].
    """
    rows, n = scores.shape
    device = scores.device
    exact = solver == "exact"
    weights = torch.empty((rows, capacity), dtype=torch.float32, device=device)
    indices = torch.empty((rows, capacity), dtype=torch.int64, device=device)
    valid = torch.empty((rows, capacity), dtype=torch.bool, device=device)
    state = torch.empty((rows, 3 if exact else num_iterations), dtype=torch.float32, device=device)
    if rows == 0:
        return weights, indices, valid, state
    inputs = (scores, budget, soft_budget, mask, lengths)
    score_strides = scores.stride()
    mask_strides = (0, 0) if mask is None else mask.stride()
    flags = {"HAS_SOFT_BUDGET": soft_budget is not None, "HAS_MASK": mask is not None,
             "HAS_LENGTHS": lengths is not None}  # fmt: skip
    if n <= LONGEST_ROW:
        block = next_power_of_2(n)
        launch(
            route_row_kernel, (rows,),
            *inputs, weights, indices, valid, state, *score_strides, *mask_strides, n, capacity,
            soft_topk_ratio, epsilon, max(epsilon, epsilon_init), math.log2(epsilon_decay), num_iterations,
            **flags, EXACT=exact, BLOCK=block, SLOTS=min(1024, block), num_warps=_row_warps(block),
        )  # fmt: skip
        return weights, indices, valid, state

    block = _grid_block(max(n, capacity))
    blocks = cdiv(max(n, capacity), block)
    sums_width = 6 * blocks + 4 * (NEWTON_PASSES + 1)
    work = torch.zeros((rows, HISTOGRAM_WIDTH), dtype=torch.int32, device=device)
    sums = torch.empty((rows, sums_width), dtype=torch.float32, device=device)
    grid = (rows * blocks,)
    shape = (*score_strides, *mask_strides, n, capacity, soft_topk_ratio)
    for level in range(4):
        launch(
            histogram_kernel,
            grid,
            *inputs,
            work,
            *shape,
            blocks,
            HISTOGRAM_WIDTH,
            **flags,
            LEVEL=level,
            BLOCK=block,
            num_warps=8,
        )
    padded = max(16, next_power_of_2(blocks))
    for step in range(NEWTON_PASSES + 1):
        launch(
            newton_kernel, grid,
            *inputs, work, sums, *shape, epsilon, blocks, HISTOGRAM_WIDTH, sums_width, step,
            **flags, STAGE=min(step, 2), BLOCK=block, BLOCKS=padded, num_warps=8,
        )  # fmt: skip
    launch(
        select_kernel, grid,
        *inputs, weights, indices, valid, state, work, sums, *shape, epsilon,
        blocks, HISTOGRAM_WIDTH, sums_width, NEWTON_PASSES, **flags, BLOCK=block, BLOCKS=padded, num_warps=8,
    )  # fmt: skip
    return weights, indices, valid, state


def route_backward(
    grad_weights: torch.Tensor,
    scores: torch.Tensor,
    soft_budget: torch.Tensor | None,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    weights: torch.Tensor,
    indices: torch.Tensor,
    valid: torch.Tensor,
    state: torch.Tensor,
    solver: str,
    epsilon: float,
    num_iterations: int,
    epsilon_init: float,
    epsilon_decay: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`route_backward_reference` by kernels: gradients with respect to scores [rows, n] and soft budget [rows]."""
    rows, n = scores.shape
    capacity = weights.shape[1]
    grad_scores = torch.empty((rows, n), dtype=scores.dtype, device=scores.device)
    grad_budget = torch.empty(rows, dtype=torch.float32, device=scores.device)
    if rows == 0:
        return grad_scores, grad_budget
    slots = (grad_weights, weights, indices, valid, scores, mask, lengths)
    strides = (*grad_weights.stride(), *scores.stride(), *((0, 0) if mask is None else mask.stride()))
    flags = {"HAS_MASK": mask is not None, "HAS_LENGTHS": lengths is not None}
    if solver != "exact":
        block = next_power_of_2(n)
        launch(
            descent_backward_kernel, (rows,),
            *slots, soft_budget, state, grad_scores, grad_budget, *strides, n, capacity,
            epsilon, max(epsilon, epsilon_init), math.log2(epsilon_decay), num_iterations,
            HAS_SOFT_BUDGET=soft_budget is not None, **flags, BLOCK=block, SLOTS=min(1024, block),
            num_warps=_row_warps(block),
        )  # fmt: skip
        return grad_scores, grad_budget

    one_part = capacity <= SLOTS_OF_A_PART
    parts = cdiv(capacity, SLOTS_OF_A_PART)
    sums = grad_budget
    if not one_part:
        sums = torch.empty((rows, parts), dtype=torch.float32, device=scores.device)
        launch(
            slot_sums_kernel,
            (rows * parts,),
            grad_weights,
            weights,
            sums,
            *grad_weights.stride(),
            capacity,
            parts,
            PART=SLOTS_OF_A_PART,
            num_warps=8,
        )
    block = min(2048, next_power_of_2(n))
    blocks = cdiv(n, block)
    launch(
        route_backward_kernel, (rows * blocks,),
        *slots, state, sums, grad_scores, grad_budget, *strides, n, capacity, epsilon, blocks, parts,
        **flags, ONE_PART=one_part, PARTS=next_power_of_2(parts),
        STEPS=2 if capacity <= 2**20 else 3,
        SLOTS=next_power_of_2(capacity) if one_part else 1024, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return grad_scores, grad_budget
