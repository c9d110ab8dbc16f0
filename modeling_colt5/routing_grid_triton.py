"""Routing forward as passes of a grid of Triton programs, for rows that one program cannot hold.

A radix search with integer histograms, log-Newton passes that begin before the search has ended, one program a row for
the rare rows that need more of them, and one pass that selects and writes. Sums over blocks are partials added up in
fixed order, so results are bit-identical from run to run.
"""

from .routing_steps_triton import (
    LOWEST_KEY,
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
    raise ImportError("routing_grid_triton needs triton; use kernel_backend='torch' without it") from error

FEW_DIGITS = tl.constexpr(256)
# where the solver of a row is: before its first pass, at its centre, under way, and done
WAITING = tl.constexpr(0.0)
STARTED = tl.constexpr(1.0)
STEPPING = tl.constexpr(2.0)
SETTLED = tl.constexpr(3.0)
# numbers that a pass leaves to the next: state, centre, threshold, and the bracket, or the free mass if it is settled
RECORD = tl.constexpr(5)
MOST_FINISHING_PASSES = tl.constexpr(24)


@triton.jit
def _write_unused(weights, indices, valid, slots, budget, n, capacity):
    unused = (slots >= budget) & (slots < capacity)
    tl.store(weights + slots, tl.zeros_like(slots).to(tl.float32), mask=unused)
    tl.store(indices + slots, tl.zeros_like(slots).to(tl.int64) + (n - 1), mask=unused)
    tl.store(valid + slots, slots < budget, mask=unused)


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
        budget, k, rank = row_budgets(
            budgets, soft_budgets, row, real_tokens, capacity, soft_topk_ratio, HAS_SOFT_BUDGET
        )
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
def _sums_of_blocks(pair, blocks, BLOCKS: tl.constexpr):
    """A row's saturated count and free weights, from the partials of its blocks."""
    index = tl.arange(0, BLOCKS)
    saturated = tl.load(pair + index, mask=index < blocks, other=0.0)
    free = tl.load(pair + blocks + index, mask=index < blocks, other=0.0)
    return tl.split(tl.sum(tl.join(saturated, free), 0))


@triton.jit
def _store_record(record, state, centre, threshold, low, high):
    tl.store(record, state)
    tl.store(record + 1, centre)
    tl.store(record + 2, threshold)
    tl.store(record + 3, low)
    tl.store(record + 4, high)


@triton.jit
def _solver_pass(keys, sums, soft_prefix, epsilon, block, blocks, step, LEVEL: tl.constexpr, BLOCKS: tl.constexpr):
    """Partial sums of the saturated count and the free weights at the threshold that the pass before leads to.

    `sums` of a row: two pairs of partials in turn; counts above and equal to the hard key; k; a record of each pass. A
    row starts as soon as the `LEVEL` digits known of its soft key bound that to few ε, from the key's upper bound.
    """
    history = sums + 6 * blocks
    k = tl.load(history)
    before = history + 1 + RECORD * (step - 1)
    state = tl.load(before)
    centre = tl.load(before + 1)
    threshold = tl.load(before + 2)
    low = tl.load(before + 3)
    high = tl.load(before + 4)
    if state == WAITING:
        start = key_to_score(soft_prefix | ((1 << (32 - 8 * LEVEL)) - 1))
        reach = (key_to_score(soft_prefix) - start) / epsilon
        # so written that NaN starts too
        state = tl.where(reach < -4.0, WAITING, STARTED)
        centre = start
        low = reach
    elif state != SETTLED:
        saturated, free = _sums_of_blocks(sums + 2 * blocks * ((step + 1) % 2), blocks, BLOCKS)
        if state == STARTED:
            high = tl.log(free / (k - saturated))
            threshold = high
            state = state + 1.0
        elif is_settled(saturated, free, k):
            # the free mass in the place of the bracket
            threshold, low = last_step(threshold, saturated, free, k)
            state = state + 1.0
        else:
            threshold, low, high = newton_step(threshold, low, high, saturated, free, k)
    if (state == STARTED) | (state == STEPPING):
        saturated, free = saturated_and_free((key_to_score(keys) - centre) / epsilon, threshold)
        pair = sums + 2 * blocks * (step % 2)
        tl.store(pair + block, saturated)
        tl.store(pair + blocks + block, free)
    if block == 0:
        _store_record(before + RECORD, state, centre, threshold, low, high)


@triton.jit
def histogram_kernel(
    scores, budgets, soft_budgets, mask, lengths, work, sums,
    score_row_stride, score_stride, mask_row_stride, mask_stride, n, capacity, soft_topk_ratio, epsilon,
    blocks, work_width, sums_width,
    HAS_SOFT_BUDGET: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    LEVEL: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Counts of the keys' digit `LEVEL` (0 the highest) among the keys that share the prefix found so far.

    From level 2 on a pass of the solver too.
    """
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    keys = load_keys(
        scores, mask, lengths, row, block * BLOCK + tl.arange(0, BLOCK), n,
        score_row_stride, score_stride, mask_row_stride, mask_stride, HAS_MASK, HAS_LENGTHS,
    )  # fmt: skip
    work += row * work_width
    sums += row * sums_width
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
            if LEVEL == 1:
                real_tokens = tl.sum(tl.load(work + tl.arange(0, 256)))
                budget, k, _ = row_budgets(
                    budgets, soft_budgets, row, real_tokens, capacity, soft_topk_ratio, HAS_SOFT_BUDGET
                )
                tl.store(work + 7 * 256 + 13, budget)
                all_saturated = k >= real_tokens.to(tl.float32)
                tl.store(sums + 6 * blocks, k)
                state = tl.where(all_saturated, SETTLED, WAITING)
                threshold = tl.where(all_saturated, float("-inf"), 0.0)
                _store_record(sums + 6 * blocks + 1, state, 0.0, threshold, 0.0, 0.0)
        shift: tl.constexpr = 32 - 8 * LEVEL
        digit = (keys >> (shift - 8)) & 0xFF
        _count_digits(work + (2 * LEVEL - 1) * 256, digit, real & ((keys >> shift) == (hard_prefix >> shift)))
        if hard_prefix != soft_prefix:
            _count_digits(work + 2 * LEVEL * 256, digit, real & ((keys >> shift) == (soft_prefix >> shift)))
        if LEVEL > 1:
            _solver_pass(keys, sums, soft_prefix, epsilon, block, blocks, LEVEL - 1, LEVEL, BLOCKS)


@triton.jit(do_not_specialize=["step"])
def newton_kernel(
    scores, budgets, soft_budgets, mask, lengths, work, sums,
    score_row_stride, score_stride, mask_row_stride, mask_stride, n, capacity, soft_topk_ratio, epsilon,
    blocks, work_width, sums_width, step,
    HAS_SOFT_BUDGET: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    FIRST: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """A pass of the solver; the first one finds the keys from their last digits, and counts what is selected."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    keys = load_keys(
        scores, mask, lengths, row, block * BLOCK + tl.arange(0, BLOCK), n,
        score_row_stride, score_stride, mask_row_stride, mask_stride, HAS_MASK, HAS_LENGTHS,
    )  # fmt: skip
    work += row * work_width
    found = work + 7 * 256 + 12
    sums += row * sums_width
    if FIRST:
        hard_key, _, soft_key, _ = _search_state(
            work, budgets, soft_budgets, row, capacity, soft_topk_ratio, HAS_SOFT_BUDGET, 4
        )
        if block == 0:
            tl.store(found, hard_key)
            tl.store(found + 2, soft_key)
        tl.store(sums + 4 * blocks + block, tl.sum((keys > hard_key).to(tl.int32)).to(tl.float32))
        tl.store(sums + 5 * blocks + block, tl.sum((keys == hard_key).to(tl.int32)).to(tl.float32))
    else:
        soft_key = tl.load(found + 2)
    _solver_pass(keys, sums, soft_key, epsilon, block, blocks, step, 4, BLOCKS)


@triton.jit(do_not_specialize=["step"])
def finish_kernel(
    scores, mask, lengths, sums,
    score_row_stride, score_stride, mask_row_stride, mask_stride, n, epsilon, blocks, sums_width, step,
    HAS_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The last record of a row, by one program, after as many more passes as it needs: none as a rule."""
    row = tl.program_id(0).to(tl.int64)
    sums += row * sums_width
    history = sums + 6 * blocks
    k = tl.load(history)
    before = history + 1 + RECORD * (step - 1)
    state = tl.load(before)
    centre = tl.load(before + 1)
    threshold = tl.load(before + 2)
    low = tl.load(before + 3)
    high = tl.load(before + 4)
    if state != SETTLED:
        saturated, free = _sums_of_blocks(sums + 2 * blocks * ((step + 1) % 2), blocks, BLOCKS)
        passes = 0
        unsettled = tl.where(is_settled(saturated, free, k), 0, 1)
        while unsettled != 0:
            threshold, low, high = newton_step(threshold, low, high, saturated, free, k)
            saturated = saturated * 0.0
            free = free * 0.0
            for start in range(0, n, BLOCK):
                keys = load_keys(
                    scores, mask, lengths, row, start + tl.arange(0, BLOCK), n,
                    score_row_stride, score_stride, mask_row_stride, mask_stride, HAS_MASK, HAS_LENGTHS,
                )  # fmt: skip
                more_saturated, more_free = saturated_and_free((key_to_score(keys) - centre) / epsilon, threshold)
                saturated += more_saturated
                free += more_free
            passes += 1
            unsettled = tl.where(is_settled(saturated, free, k) | (passes >= MOST_FINISHING_PASSES), 0, 1)
        threshold, low = last_step(threshold, saturated, free, k)
    _store_record(before + RECORD, state, centre, threshold, low, high)


@triton.jit
def select_kernel(
    scores, mask, lengths, weights, indices, valid, state, work, sums,
    score_row_stride, score_stride, mask_row_stride, mask_stride, n, capacity, epsilon,
    blocks, work_width, sums_width, passes,
    HAS_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """A block's selected tokens to their slots, and the solver's last record."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    positions = block * BLOCK + tl.arange(0, BLOCK)
    keys = load_keys(
        scores, mask, lengths, row, positions, n,
        score_row_stride, score_stride, mask_row_stride, mask_stride, HAS_MASK, HAS_LENGTHS,
    )  # fmt: skip
    work += row * work_width
    sums += row * sums_width
    hard_key = tl.load(work + 7 * 256 + 12)
    budget = tl.load(work + 7 * 256 + 13)
    last = sums + 6 * blocks + 1 + RECORD * passes
    centre = tl.load(last + 1)
    threshold = tl.load(last + 2)
    if block == 0:
        tl.store(state + row * 3, centre)
        tl.store(state + row * 3 + 1, threshold)
        tl.store(state + row * 3 + 2, tl.load(last + 3))

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
    tl.store(weights + slot, weigh((key_to_score(keys) - centre) / epsilon, threshold), mask=selected)
    tl.store(indices + slot, positions.to(tl.int64), mask=selected)
    tl.store(valid + slot, selected, mask=selected)
    _write_unused(weights, indices, valid, positions, budget, n, capacity)
