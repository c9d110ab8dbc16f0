"""Triton kernels of the gradient of routing by the exact solver, in closed form from what the forward saved; and the
launches of either solver's gradient."""

import math

from torch import Tensor

from .op_routing_descent_triton import descent_backward_kernel
from .op_routing_steps_triton import LOWEST_KEY, key_to_score, load_keys, sum_of_blocks
from .op_routing_triton import SLOTS_AT_ONCE, readable, row_block, row_warps
from .run_launch_triton import adjacent, cdiv, launch, next_power_of_2, tl, triton

# How many tokens a program takes, and how many slots one program sums by itself.
GRADIENT_BLOCK = 2048
SLOTS_OF_A_PART = 4096

# A new length must not mean a new compilation.
STRIDES = ["grad_row_stride", "score_row_stride", "mask_row_stride", "grad_score_row_stride"]


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


@triton.jit(do_not_specialize=["grad_row_stride", "capacity", "parts"])
def slot_sums_kernel(grad_weights, weights, sums, grad_row_stride, capacity, parts, PART: tl.constexpr):
    """Partial sums of weight times cotangent over the unsaturated slots."""
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    slots = part * PART + tl.arange(0, PART)
    inside = slots < capacity
    weight = tl.load(weights + row * capacity + slots, mask=inside, other=0.0)
    # An unused slot has weight 0, and its cotangent may be anything.
    free = inside & (weight < 1.0) & (weight > 0.0)
    grad = tl.load(grad_weights + row * grad_row_stride + slots, mask=free, other=0.0)
    tl.store(sums + row * parts + part, tl.sum(tl.where(free, weight * grad, 0.0)))


@triton.jit(do_not_specialize=[*STRIDES, "n", "capacity", "blocks", "parts"])
def route_backward_kernel(
    grad_weights, weights, indices, valid, scores, mask, lengths, state, sums, grad_scores, grad_budget,
    grad_row_stride, score_row_stride, mask_row_stride, grad_score_row_stride,
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
    grad_scores += row * grad_score_row_stride
    probes = tl.arange(0, SLOTS)
    start = block * BLOCK
    if ONE_PART:
        inside = probes < capacity
        weight = tl.load(weights + probes, mask=inside, other=0.0)
        free = inside & (weight < 1.0) & (weight > 0.0)
        grad = tl.load(grad_weights + probes, mask=free, other=0.0)
        total = tl.sum(tl.where(free, weight * grad, 0.0))
        index = tl.load(indices + probes, mask=inside, other=n)
        first = tl.sum((index < start).to(tl.int32))
    else:
        total = sum_of_blocks(sums + row * parts, parts, PARTS)
        first = _first_slot(indices, start, capacity, STEPS, SLOTS)
    centre = tl.load(state + row * 3)
    threshold = tl.load(state + row * 3 + 1)
    mass = tl.load(state + row * 3 + 2)
    mean = tl.where(mass > 0.0, total / mass, 0.0)
    if block == 0:
        tl.store(grad_budget + row, mean)

    positions = start + tl.arange(0, BLOCK)
    keys = load_keys(
        scores, mask, lengths, row, positions, n,
        score_row_stride, 1, mask_row_stride, 1, HAS_MASK, HAS_LENGTHS,
    )  # fmt: skip
    free_weight = tl.exp((key_to_score(keys) - centre) / epsilon - threshold)
    free_weight = tl.where((keys != LOWEST_KEY) & (free_weight < 1.0), free_weight, 0.0)
    tl.store(grad_scores + positions, -free_weight * mean / epsilon, mask=positions < n)
    # The stores below overwrite some of those above, which came from other threads of the program.
    tl.debug_barrier()
    more = 1
    while more != 0:
        slots = first + probes
        inside = slots < capacity
        index = tl.load(indices + slots, mask=inside, other=n)
        here = inside & (index < start + BLOCK)
        used = tl.load(valid + slots, mask=here, other=0) != 0
        weight = tl.load(weights + slots, mask=used, other=0.0)
        grad = tl.load(grad_weights + slots, mask=used, other=0.0)
        grad = tl.where(weight < 1.0, weight * (grad - mean) / epsilon, 0.0)
        tl.store(grad_scores + index, grad, mask=used)
        first += SLOTS
        more = tl.min(here.to(tl.int32))


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
    grad_weights, scores = readable(grad_weights), readable(scores)
    mask = None if mask is None else readable(mask)
    slots = (grad_weights, *map(adjacent, (weights, indices, valid)), scores, mask, adjacent(lengths))
    strides = (
        grad_weights.stride(0), scores.stride(0), 0 if mask is None else mask.stride(0), grad_scores.stride(0),
    )  # fmt: skip
    given = (mask is not None, lengths is not None)
    if solver != "exact":
        block = row_block(n)
        launch(
            descent_backward_kernel, (rows,),
            *slots, adjacent(soft_budget), adjacent(state), grad_scores, grad_budget, *strides, n, capacity,
            epsilon, max(epsilon, epsilon_init or epsilon), math.log2(epsilon_decay), num_iterations,
            soft_budget is not None, *given, block, SLOTS_AT_ONCE, num_warps=row_warps(block),
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
