"""The routing operation by Triton: which kernels a row's length asks for, their buffers and launches.

Rows of up to `LONGEST_ROW` tokens are one program each, longer ones passes of a grid.
"""

import math

import torch

from .kernel_launch import cdiv, launch, next_power_of_2
from .routing_gradient_triton import descent_backward_kernel, route_backward_kernel, slot_sums_kernel
from .routing_grid_triton import RECORD, finish_kernel, histogram_kernel, newton_kernel, select_kernel
from .routing_row_triton import route_row_kernel

LONGEST_ROW = 16384
# a grid's counts are exact in fp32, and fit 16 bits in a block, up to here
MOST_TOKENS = 1 << 24
SHORTEST_BLOCK = 2048
# slots that one program of the backward sums by itself
SLOTS_OF_A_PART = 4096
HISTOGRAM_WIDTH = 7 * 256 + 16


def _row_warps(block: int) -> int:
    return min(max(block // 512, 4), 16)


def _grid_block(n: int) -> int:
    """Tokens of a program: enough that a row has at most 1,024 programs, for which sums over blocks are short."""
    return max(SHORTEST_BLOCK, next_power_of_2(cdiv(n, 1024)))


def _solver_passes(n: int) -> int:
    """Passes of the grid's solver, at least 4: two in the search's last launches, the others after it.

    Few rows need more (docs/soft_topk.md); they get them from one program, which is slow where a row is long.
    """
    return 5 if n <= 1 << 18 else 7


def kernels_take(n: int, solver: str) -> bool:
    """Whether there is a kernel for rows of `n` tokens: coordinate descent has one for rows that fit one program."""
    return n <= (MOST_TOKENS if solver == "exact" else LONGEST_ROW)


def _adjacent(rows: torch.Tensor | None) -> torch.Tensor | None:
    """Numbers of rows as the kernels read them."""
    return None if rows is None else rows.contiguous()


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
    exact = solver == "exact"
    weights = scores.new_empty((rows, capacity), dtype=torch.float32)
    indices = weights.new_empty((rows, capacity), dtype=torch.int64)
    valid = weights.new_empty((rows, capacity), dtype=torch.bool)
    state = weights.new_empty((rows, 3 if exact else num_iterations))
    if rows == 0:
        return weights, indices, valid, state
    inputs = (scores, budget.contiguous(), _adjacent(soft_budget), mask, _adjacent(lengths))
    score_strides = scores.stride()
    mask_strides = (0, 0) if mask is None else mask.stride()
    # constants by position, which costs the host less than by name
    given = (soft_budget is not None, mask is not None, lengths is not None)
    if n <= LONGEST_ROW:
        block = next_power_of_2(n)
        launch(
            route_row_kernel, (rows,),
            *inputs, weights, indices, valid, state, *score_strides, *mask_strides, n, capacity,
            soft_topk_ratio, epsilon, max(epsilon, epsilon_init), math.log2(epsilon_decay), num_iterations,
            *given, exact, block, min(1024, block), num_warps=_row_warps(block),
        )  # fmt: skip
        return weights, indices, valid, state

    block = _grid_block(max(n, capacity))
    blocks = cdiv(max(n, capacity), block)
    passes = _solver_passes(n)
    sums_width = 6 * blocks + 1 + RECORD.value * (passes + 2)
    work = indices.new_zeros((rows, HISTOGRAM_WIDTH), dtype=torch.int32)
    sums = state.new_empty((rows, sums_width))
    grid = (rows * blocks,)
    shape = (*score_strides, *mask_strides, n, capacity, soft_topk_ratio, epsilon, blocks, HISTOGRAM_WIDTH, sums_width)
    padded = max(16, next_power_of_2(blocks))
    for level in range(4):
        launch(histogram_kernel, grid, *inputs, work, sums, *shape, *given, level, block, padded, num_warps=8)
    for step in range(3, passes + 1):
        launch(newton_kernel, grid, *inputs, work, sums, *shape, step, *given, step == 3, block, padded, num_warps=8)
    launch(
        finish_kernel, (rows,),
        scores, mask, inputs[-1], sums, *score_strides, *mask_strides, n, epsilon, blocks, sums_width,
        passes + 1, *given[1:], 8192, padded, num_warps=16,
    )  # fmt: skip
    launch(
        select_kernel, grid,
        scores, mask, inputs[-1], weights, indices, valid, state, work, sums, *score_strides, *mask_strides,
        n, capacity, epsilon, blocks, HISTOGRAM_WIDTH, sums_width, passes + 1,
        *given[1:], block, padded, num_warps=8,
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
    grad_scores = scores.new_empty((rows, n))
    grad_budget = state.new_empty(rows)
    if rows == 0:
        return grad_scores, grad_budget
    slots = (grad_weights, weights, indices, valid, scores, mask, _adjacent(lengths))
    strides = (*grad_weights.stride(), *scores.stride(), *((0, 0) if mask is None else mask.stride()))
    given = (mask is not None, lengths is not None)
    if solver != "exact":
        block = next_power_of_2(n)
        launch(
            descent_backward_kernel, (rows,),
            *slots, _adjacent(soft_budget), state, grad_scores, grad_budget, *strides, n, capacity,
            epsilon, max(epsilon, epsilon_init), math.log2(epsilon_decay), num_iterations,
            soft_budget is not None, *given, block, min(1024, block), num_warps=_row_warps(block),
        )  # fmt: skip
        return grad_scores, grad_budget

    one_part = capacity <= SLOTS_OF_A_PART
    parts = cdiv(capacity, SLOTS_OF_A_PART)
    sums = grad_budget
    if not one_part:
        sums = state.new_empty((rows, parts))
        launch(
            slot_sums_kernel, (rows * parts,),
            grad_weights, weights, sums, *grad_weights.stride(), capacity, parts, SLOTS_OF_A_PART, num_warps=8,
        )  # fmt: skip
    block = min(2048, next_power_of_2(n))
    blocks = cdiv(n, block)
    launch(
        route_backward_kernel, (rows * blocks,),
        *slots, state, sums, grad_scores, grad_budget, *strides, n, capacity, epsilon, blocks, parts,
        *given, one_part, next_power_of_2(parts), 2 if capacity <= 2**20 else 3,
        next_power_of_2(capacity) if one_part else 1024, block, num_warps=4,
    )  # fmt: skip
    return grad_scores, grad_budget
