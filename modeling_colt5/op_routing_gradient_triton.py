"""Triton kernels of the gradient of routing by the exact solver, in closed form from what the forward saved."""

from .op_routing_steps_triton import (
    LOWEST_KEY,
    key_to_score,
    load_keys,
    sum_of_blocks,
)

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("op_routing_gradient_triton needs triton; use kernel_backend='torch' without it") from error

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
