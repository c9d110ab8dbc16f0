"""Routing by Triton: the kernel of the exact solver, and which kernel a row's length and solver ask for.

A row is in the registers of one program up to `LONGEST_ROW` tokens, longer ones are shared by programs that wait for
each other.
"""

import functools
import math

import torch
from torch import Tensor

from .kernel_backend import INTERPRETED
from .op_routing_descent_triton import descent_kernel
from .op_routing_steps_triton import (
    COUNTER_STRIDE,
    HIGHEST_KEY,
    LOWEST_FINITE_KEY,
    LOWEST_KEY,
    PLACES,
    find_rank,
    is_settled,
    key_to_score,
    largest_of_both,
    last_and_room,
    last_step,
    load_keys,
    newton_step,
    row_budgets,
    row_statistics,
    selected_slots,
    sum_over_programs,
    weigh,
    write_slots,
)
from .run_launch_triton import adjacent, cdiv, launch, next_power_of_2, tl, triton

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
def _find_last_and_centre(
    keys, budget, k, rank, count, real_tokens, mean, deviation, epsilon,
    turn, numbers, arrived, program, programs, SHARED: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The last key that is taken, with the room for keys equal to it; and a centre for the solver, with how many
    weights are saturated there and the sum of the others.

    Any score will do as a centre that has fewer than k above it, and from which the weights below 1 make up for the
    rest. The lower end of the bracket that the first search ended with mostly does. Where it does not, a second search
    is for the key of k's own rank. Both are one loop, so that the search is compiled once.
    """
    wanted = tl.maximum(budget, 1)
    last = tl.full([], HIGHEST_KEY, tl.int32)
    room = tl.zeros([], tl.int32)
    centre = tl.zeros([], tl.float32)
    saturated = tl.zeros([], tl.float32)
    free = tl.zeros([], tl.float32)
    searches = 0
    while searches < 2:
        low, high, from_low, beyond_high, turn = find_rank(
            keys, wanted, real_tokens, mean, deviation, turn, numbers, arrived, program, programs, SHARED, PROGRAMS
        )
        if searches == 0:
            last, room = last_and_room(budget, low, high, from_low, beyond_high)
            low = tl.maximum(low, LOWEST_FINITE_KEY)
        else:
            # The least key from there on is found by the largest complement.
            lowest_key, _, turn = largest_of_both(
                tl.where(keys >= low, ~keys, LOWEST_KEY), keys,
                turn, numbers, arrived, program, programs, SHARED, PROGRAMS,
            )  # fmt: skip
            low = ~lowest_key
        centre = key_to_score(low)
        saturated, free, turn = _saturated_and_free(
            _relative_weights(keys, centre, epsilon, 0.0), 1.0,
            turn, numbers, arrived, program, programs, SHARED, PROGRAMS,
        )  # fmt: skip
        is_off = (k < count) & ((saturated >= k) | (saturated + free < k))
        searches = tl.where(is_off, searches + 1, 2)
        wanted = rank
    return last, room, centre, saturated, free, turn


@triton.jit
def _solve(
    keys, k, count, centre, saturated, free, epsilon,
    turn, numbers, arrived, program, programs, SHARED: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The soft top-k's threshold, as a centre and the distance from there over ε, and the sum of the weights below 1;
    from a centre, how many weights are saturated there, and the sum of the others."""
    all_saturated = k >= count
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
    last, room, centre, saturated, free, turn = _find_last_and_centre(
        keys, budget, k, rank, count, real_tokens, mean, deviation, epsilon,
        turn, numbers, arrived, program, programs, SHARED, PROGRAMS,
    )  # fmt: skip
    centre, threshold, mass, turn = _solve(
        keys, k, count, centre, saturated, free, epsilon,
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


# The longest row that one program takes. It is below 32,768, so that two counts in one integer never reach its sign.
LONGEST_ROW = 16384
# The fewest tokens that a program with a row to itself is compiled for, so that all short rows share one kernel.
SHORTEST_BLOCK = 2048
# How many slots a program takes in one step.
SLOTS_AT_ONCE = 1024
# Pairs of a row's length and how many of its tokens a program takes that shares a row of up to that length.
PARTS = ((65536, 2048), (1 << 20, 4096))
# The most tokens of a program that shares a row, because its counts must fit 16 bits.
LONGEST_PART = 32768


def row_block(n: int) -> int:
    return max(SHORTEST_BLOCK, next_power_of_2(n))


def row_warps(block: int) -> int:
    return min(max(block // 512, 4), 16)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # The interpreter runs one program after the other, so that one is all there is at the same time.
    return 1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def _parts(n: int, device: torch.device) -> tuple[int, int, int]:
    """How a long row is shared: tokens of a program, its warps, and how many programs a multiprocessor holds.

    Eight warps and their registers fit twice, sixteen once. The row's length alone decides, not the number of rows: so
    each row has the bits that it would have alone.
    """
    most = _multiprocessors(device)
    # The interpreter's one program has to take the whole row.
    for longest, part in () if INTERPRETED else PARTS:
        if n <= min(longest, 2 * most * part):
            return part, 8, 2
    return next_power_of_2(cdiv(n, most)), 16, 1


def kernels_take(n: int, solver: str, device: torch.device) -> bool:
    """Whether there is a kernel for rows of `n` tokens: all programs of a row must be on the device at once, which
    AMD's backend has no option for, and coordinate descent has one for rows of one program alone."""
    shares = solver == "exact" and torch.version.hip is None
    return n <= LONGEST_ROW or (shares and _parts(n, device)[0] <= LONGEST_PART)


def readable(rows: Tensor) -> Tensor:
    """Rows [rows, n] as the kernels read them: at any distance, each one's numbers side by side."""
    return rows if rows.stride(1) == 1 else rows.contiguous()


def sharing_shapes(rows: int, n: int, device: torch.device) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Shapes of int32: of where programs that share a row leave numbers for each other, and of the counters of their
    arrivals, which begin at 0; None for rows of one program each."""
    if n <= LONGEST_ROW:
        return None
    programs = cdiv(n, _parts(n, device)[0])
    return (rows, 2 * PLACES.value * programs), (rows, COUNTER_STRIDE.value)


def route_into(
    scores: Tensor,
    budget: Tensor,
    soft_budget: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    capacity: int,
    soft_topk_ratio: float,
    solver: str,
    epsilon: float,
    num_iterations: int,
    epsilon_init: float | None,
    epsilon_decay: float,
    weights: Tensor,
    indices: Tensor,
    valid: Tensor,
    state: Tensor,
    numbers: Tensor | None = None,
    arrived: Tensor | None = None,
) -> None:
    """Write `route_reference` of op_routing.py to weights, indices and valid [rows, capacity] and to a state that its
    gradient needs, [rows, 3 or iterations]; for fp16, bf16 and fp32 scores.

    `numbers` and `arrived` are memory of `sharing_shapes`, None where that gives none, or to take some.
    """
    rows, n = scores.shape
    if rows == 0:
        return
    scores, mask = readable(scores), None if mask is None else readable(mask)
    inputs = (scores, budget.contiguous(), adjacent(soft_budget), mask, adjacent(lengths))
    sizes = (scores.stride(0), 0 if mask is None else mask.stride(0), n, capacity)
    # Constants are given by position, which costs the host less than by name.
    given = (soft_budget is not None, mask is not None, lengths is not None)
    block = row_block(n)
    if solver != "exact":
        highest = max(epsilon, epsilon_init or epsilon)
        launch(
            descent_kernel, (rows,),
            *inputs, weights, indices, valid, state, *sizes,
            soft_topk_ratio, epsilon, highest, math.log2(epsilon_decay), num_iterations,
            *given, block, SLOTS_AT_ONCE, num_warps=row_warps(block),
        )  # fmt: skip
        return
    if n <= LONGEST_ROW:
        launch(
            route_kernel, (rows,),
            *inputs, weights, indices, valid, state, None, None, *sizes, soft_topk_ratio, epsilon, 1, 1, 1,
            *given, False, 1, block, SLOTS_AT_ONCE, num_warps=row_warps(block),
        )  # fmt: skip
        return

    if numbers is None and (shapes := sharing_shapes(rows, n, scores.device)) is not None:
        numbers = torch.empty(shapes[0], dtype=torch.int32, device=scores.device)
        arrived = torch.zeros(shapes[1], dtype=torch.int32, device=scores.device)
    block, num_warps, together = _parts(n, scores.device)
    programs = cdiv(n, block)
    groups = min(rows, together * _multiprocessors(scores.device) // programs)
    # This is a power of two of at least 16, so that fewer lengths compile anew.
    columns = max(16, next_power_of_2(programs))
    launch(
        route_kernel, (groups * programs,),
        *inputs, weights, indices, valid, state, numbers, arrived, *sizes, soft_topk_ratio, epsilon,
        rows, groups, programs, *given, True, columns, block, 1, num_warps=num_warps, together=together,
    )  # fmt: skip
