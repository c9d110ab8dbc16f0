"""The routing operation by Triton: which kernels a row's length asks for, their buffers and launches.

Rows of up to `LONGEST_ROW` tokens are one program each, longer ones are shared by programs that wait for each other.
"""

import functools
import math

import torch
from torch import Tensor

from .kernel_backend import INTERPRETED
from .op_routing_descent_triton import descent_backward_kernel, descent_kernel
from .op_routing_forward_triton import route_kernel
from .op_routing_gradient_triton import route_backward_kernel, slot_sums_kernel
from .op_routing_steps_triton import COUNTER_STRIDE, PLACES
from .run_launch_triton import adjacent, cdiv, launch, next_power_of_2

# The longest row that one program takes. It is below 32,768, so that two counts in one integer never reach its sign.
LONGEST_ROW = 16384
# The fewest tokens that a program with a row to itself is compiled for, so that all short rows share one kernel.
SHORTEST_BLOCK = 2048
# How many tokens a program of the backward takes, and how many slots any program takes in one step.
GRADIENT_BLOCK = 2048
SLOTS_AT_ONCE = 1024
# Pairs of a row's length and how many of its tokens a program takes that shares a row of up to that length.
PARTS = ((65536, 2048), (1 << 20, 4096))
# The most tokens of a program that shares a row, because its counts must fit 16 bits.
LONGEST_PART = 32768
# How many slots one program of the backward sums by itself.
SLOTS_OF_A_PART = 4096


def _row_block(n: int) -> int:
    return max(SHORTEST_BLOCK, next_power_of_2(n))


def _row_warps(block: int) -> int:
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


def _readable(rows: Tensor) -> Tensor:
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
    scores, mask = _readable(scores), None if mask is None else _readable(mask)
    inputs = (scores, budget.contiguous(), adjacent(soft_budget), mask, adjacent(lengths))
    sizes = (scores.stride(0), 0 if mask is None else mask.stride(0), n, capacity)
    # Constants are given by position, which costs the host less than by name.
    given = (soft_budget is not None, mask is not None, lengths is not None)
    block = _row_block(n)
    if solver != "exact":
        highest = max(epsilon, epsilon_init or epsilon)
        launch(
            descent_kernel, (rows,),
            *inputs, weights, indices, valid, state, *sizes,
            soft_topk_ratio, epsilon, highest, math.log2(epsilon_decay), num_iterations,
            *given, block, SLOTS_AT_ONCE, num_warps=_row_warps(block),
        )  # fmt: skip
        return
    if n <= LONGEST_ROW:
        launch(
            route_kernel, (rows,),
            *inputs, weights, indices, valid, state, None, None, *sizes, soft_topk_ratio, epsilon, 1, 1, 1,
            *given, False, 1, block, SLOTS_AT_ONCE, num_warps=_row_warps(block),
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


def slot_parts(capacity: int) -> int:
    """Into how many parts the backward cuts a row's slots to sum over them, one where a program sums all by itself."""
    return cdiv(capacity, SLOTS_OF_A_PART)


def route_backward_into(
    grad_weights: Tensor,
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
    grad_scores: Tensor,
    grad_budget: Tensor | None,
    sums: Tensor | None = None,
) -> None:
    """Write the gradients of `route_into`, of scores [rows, n] and of a soft budget [rows].

    `sums` is room for partial sums [rows, `slot_parts`] where it takes more than one; None takes some.
    """
    rows, n = scores.shape
    if rows == 0:
        return
    # the kernels write it in any case
    grad_budget = state.new_empty(rows) if grad_budget is None else grad_budget
    if sums is None and solver == "exact" and slot_parts(capacity) > 1:
        sums = state.new_empty((rows, slot_parts(capacity)))
    grad_weights, scores = _readable(grad_weights), _readable(scores)
    mask = None if mask is None else _readable(mask)
    slots = (grad_weights, *map(adjacent, (weights, indices, valid)), scores, mask, adjacent(lengths))
    strides = (
        grad_weights.stride(0), scores.stride(0), 0 if mask is None else mask.stride(0), grad_scores.stride(0),
    )  # fmt: skip
    given = (mask is not None, lengths is not None)
    if solver != "exact":
        block = _row_block(n)
        launch(
            descent_backward_kernel, (rows,),
            *slots, adjacent(soft_budget), adjacent(state), grad_scores, grad_budget, *strides, n, capacity,
            epsilon, max(epsilon, epsilon_init or epsilon), math.log2(epsilon_decay), num_iterations,
            soft_budget is not None, *given, block, SLOTS_AT_ONCE, num_warps=_row_warps(block),
        )  # fmt: skip
        return

    one_part = capacity <= SLOTS_OF_A_PART
    parts = slot_parts(capacity)
    if not one_part:
        launch(
            slot_sums_kernel, (rows * parts,),
            grad_weights, weights, sums, grad_weights.stride(0), capacity, parts, SLOTS_OF_A_PART, num_warps=8,
        )  # fmt: skip
    blocks = cdiv(n, GRADIENT_BLOCK)
    launch(
        route_backward_kernel, (rows * blocks,),
        *slots, adjacent(state), grad_budget if sums is None else sums, grad_scores, grad_budget, *strides,
        n, capacity, epsilon, blocks, parts,
        *given, one_part, next_power_of_2(parts), 2 if capacity <= 2**20 else 3,
        max(256, next_power_of_2(capacity)) if one_part else SLOTS_AT_ONCE, GRADIENT_BLOCK, num_warps=4,
    )  # fmt: skip
