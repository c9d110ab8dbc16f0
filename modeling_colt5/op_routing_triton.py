"""The routing operation by Triton: which kernels a row's length asks for, their buffers and launches.

Rows of up to `LONGEST_ROW` tokens are one program each, longer ones are shared by programs that wait for each other.
"""

import functools
import math
from typing import Any

import torch

from .kernel_backend import INTERPRETED
from .op_routing_forward_triton import route_kernel
from .op_routing_gradient_triton import descent_backward_kernel, route_backward_kernel, slot_sums_kernel
from .op_routing_steps_triton import COUNTER_STRIDE, PLACES
from .run_launch_triton import adjacent, cdiv, launch, next_power_of_2

# A row of up to so many tokens is one program's. It is below 32,768, so that two counts in one integer never reach its
# sign.
LONGEST_ROW = 16384
# A program that has a row to itself takes at least so many tokens, so that all short rows share one compiled kernel.
SHORTEST_BLOCK = 2048
# A program of the backward takes so many tokens, and any program so many slots at once.
GRADIENT_BLOCK = 2048
SLOTS_AT_ONCE = 1024
# In rows of up to so many tokens, a program that shares one takes so many of them.
PARTS = ((65536, 2048), (1 << 20, 4096))
# A program takes at most so many tokens, because its counts must fit 16 bits.
LONGEST_PART = 32768
# One program of the backward sums so many slots by itself.
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


def route_fits(scores: torch.Tensor, *inputs: Any) -> bool:
    """Whether there is a kernel for the rows of `route_forward`'s arguments."""
    return kernels_take(scores.shape[1], inputs[6], scores.device)


def route_backward_fits(grad_weights: torch.Tensor, scores: torch.Tensor, *inputs: Any) -> bool:
    """Whether there is a kernel for the rows of `route_backward`'s arguments."""
    return kernels_take(scores.shape[1], inputs[9], scores.device)


def _readable(rows: torch.Tensor) -> torch.Tensor:
    """Rows [rows, n] as the kernels read them: at any distance, each one's numbers side by side."""
    return rows if rows.stride(1) == 1 else rows.contiguous()


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
    epsilon_init: float | None,
    epsilon_decay: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`route_reference` of op_routing.py by kernels; for fp16, bf16 and fp32 scores.

    Returns:
        weights, indices, valid [rows, capacity] and, for `route_backward`, a state [rows, 3 or iterations].
    """
    rows, n = scores.shape
    exact = solver == "exact"
    weights = scores.new_empty((rows, capacity), dtype=torch.float32)
    indices = weights.new_empty((rows, capacity), dtype=torch.int64)
    valid = weights.new_empty((rows, capacity), dtype=torch.bool)
    state = weights.new_empty((rows, 3 if exact else num_iterations))
    if rows == 0:
        return weights, indices, valid, state
    numbers = arrived = None
    if (shapes := sharing_shapes(rows, n, scores.device)) is not None:
        numbers = torch.empty(shapes[0], dtype=torch.int32, device=scores.device)
        arrived = torch.zeros(shapes[1], dtype=torch.int32, device=scores.device)
    route_forward_into(
        _readable(scores), budget.contiguous(), adjacent(soft_budget), None if mask is None else _readable(mask),
        adjacent(lengths), weights, indices, valid, state, numbers, arrived,
        soft_topk_ratio, solver, epsilon, num_iterations, epsilon_init, epsilon_decay,
    )  # fmt: skip
    return weights, indices, valid, state


def sharing_shapes(rows: int, n: int, device: torch.device) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Shapes of int32: of where programs that share a row leave numbers for each other, and of the counters of their
    arrivals, which begin at 0; None for rows of one program each."""
    if n <= LONGEST_ROW:
        return None
    programs = cdiv(n, _parts(n, device)[0])
    return (rows, 2 * PLACES.value * programs), (rows, COUNTER_STRIDE.value)


def route_forward_into(
    scores: torch.Tensor,
    budget: torch.Tensor,
    soft_budget: torch.Tensor | None,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    weights: torch.Tensor,
    indices: torch.Tensor,
    valid: torch.Tensor,
    state: torch.Tensor,
    numbers: torch.Tensor | None,
    arrived: torch.Tensor | None,
    soft_topk_ratio: float,
    solver: str,
    epsilon: float,
    num_iterations: int,
    epsilon_init: float | None,
    epsilon_decay: float,
) -> None:
    """The launch of `route_forward`: operands as kernels read them, its results, which it writes, and memory of
    `sharing_shapes`, None where that gives none."""
    rows, n = scores.shape
    capacity = weights.shape[1]
    exact = solver == "exact"
    inputs = (scores, budget, soft_budget, mask, lengths)
    strides = (scores.stride(0), 0 if mask is None else mask.stride(0))
    # Constants are given by position, which costs the host less than by name.
    given = (soft_budget is not None, mask is not None, lengths is not None)
    highest = max(epsilon, epsilon_init or epsilon)
    schedule = (soft_topk_ratio, epsilon, highest, math.log2(epsilon_decay), num_iterations)
    if n <= LONGEST_ROW:
        block = _row_block(n)
        launch(
            route_kernel, (rows,),
            *inputs, weights, indices, valid, state, None, None, *strides, n, capacity,
            *schedule, 1, 1, 1, *given, exact, False, 1, block, SLOTS_AT_ONCE, num_warps=_row_warps(block),
        )  # fmt: skip
        return

    block, num_warps, together = _parts(n, scores.device)
    programs = cdiv(n, block)
    groups = min(rows, together * _multiprocessors(scores.device) // programs)
    # This is a power of two of at least 16, so that fewer lengths compile anew.
    columns = max(16, next_power_of_2(programs))
    launch(
        route_kernel, (groups * programs,),
        *inputs, weights, indices, valid, state, numbers, arrived, *strides, n, capacity,
        *schedule, rows, groups, programs, *given, exact, True, columns, block, 1,
        num_warps=num_warps, together=together,
    )  # fmt: skip


def route_backward(
    grad_weights: torch.Tensor,
    scores: torch.Tensor,
    budget: torch.Tensor,
    soft_budget: torch.Tensor | None,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    weights: torch.Tensor,
    indices: torch.Tensor,
    valid: torch.Tensor,
    state: torch.Tensor,
    soft_topk_ratio: float,
    solver: str,
    epsilon: float,
    num_iterations: int,
    epsilon_init: float | None,
    epsilon_decay: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of `route_forward`, by kernels: with respect to scores [rows, n] and soft budget [rows]."""
    rows, n = scores.shape
    capacity = weights.shape[1]
    grad_scores = scores.new_empty((rows, n))
    grad_budget = state.new_empty(rows)
    if rows == 0:
        return grad_scores, grad_budget
    parts = slot_parts(capacity) if solver == "exact" else 1
    sums = state.new_empty((rows, parts)) if parts > 1 else None
    route_backward_into(
        _readable(grad_weights), weights, indices, valid, _readable(scores), None if mask is None else _readable(mask),
        adjacent(lengths), adjacent(soft_budget), state, sums, grad_scores, grad_budget,
        solver, epsilon, num_iterations, epsilon_init, epsilon_decay,
    )  # fmt: skip
    return grad_scores, grad_budget


def slot_parts(capacity: int) -> int:
    """Into how many parts the backward cuts a row's slots to sum over them, one where a program sums all by itself."""
    return cdiv(capacity, SLOTS_OF_A_PART)


def route_backward_into(
    grad_weights: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    valid: torch.Tensor,
    scores: torch.Tensor,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    soft_budget: torch.Tensor | None,
    state: torch.Tensor,
    sums: torch.Tensor | None,
    grad_scores: torch.Tensor,
    grad_budget: torch.Tensor,
    solver: str,
    epsilon: float,
    num_iterations: int,
    epsilon_init: float | None,
    epsilon_decay: float,
) -> None:
    """The launches of `route_backward`: operands as kernels read them, room for partial sums [rows, `slot_parts`]
    where it takes more than one, and its results, which it writes."""
    rows, n = scores.shape
    capacity = weights.shape[1]
    slots = (grad_weights, weights, indices, valid, scores, mask, lengths)
    strides = (
        grad_weights.stride(0), scores.stride(0), 0 if mask is None else mask.stride(0), grad_scores.stride(0),
    )  # fmt: skip
    given = (mask is not None, lengths is not None)
    if solver != "exact":
        block = _row_block(n)
        launch(
            descent_backward_kernel, (rows,),
            *slots, soft_budget, state, grad_scores, grad_budget, *strides, n, capacity,
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
        *slots, state, grad_budget if sums is None else sums, grad_scores, grad_budget, *strides,
        n, capacity, epsilon, blocks, parts,
        *given, one_part, next_power_of_2(parts), 2 if capacity <= 2**20 else 3,
        max(256, next_power_of_2(capacity)) if one_part else SLOTS_AT_ONCE, GRADIENT_BLOCK, num_warps=4,
    )  # fmt: skip
