"""Triton kernels of routing's gradient, in closed form from what the forward saved."""

from .op_routing_steps_triton import (
    LOWEST_KEY,
    descent_epsilon,
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


@triton.jit(do_not_specialize=[*STRIDES, "n", "capacity", "num_iterations"])
def descent_backward_kernel(
    grad_weights, weights, indices, valid, scores, mask, lengths, soft_budgets, state, grad_scores, grad_budget,
    grad_row_stride, score_row_stride, mask_row_stride, grad_score_row_stride,
    n, capacity, epsilon, epsilon_init, log2_decay, num_iterations,
    HAS_SOFT_BUDGET: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The gradient of coordinate descent, one program a row: the iteration backward from its thresholds, by the
    derivatives of a step that docs/soft_topk.md has."""
    row = tl.program_id(0).to(tl.int64)
    weights += row * capacity
    indices += row * capacity
    valid += row * capacity
    grad_weights += row * grad_row_stride
    grad_scores += row * grad_score_row_stride
    state += row * num_iterations
    positions = tl.arange(0, BLOCK)
    keys = load_keys(
        scores, mask, lengths, row, positions, n,
        score_row_stride, 1, mask_row_stride, 1, HAS_MASK, HAS_LENGTHS,
    )  # fmt: skip
    score = key_to_score(keys)
    last = tl.load(state + num_iterations - 1)
    descended = last != float("-inf")
    last_epsilon = descent_epsilon(num_iterations * 1.0, epsilon, epsilon_init, log2_decay)

    total = 0.0
    for start in range(0, capacity, SLOTS):
        slots = start + tl.arange(0, SLOTS)
        inside = slots < capacity
        weight = tl.load(weights + slots, mask=inside, other=0.0)
        free = inside & (weight < 1.0) & (weight > 0.0)
        grad = tl.load(grad_weights + slots, mask=free, other=0.0)
        total += tl.sum(tl.where(free, weight * grad, 0.0))
    grad_threshold = tl.where(descended, -total / last_epsilon, 0.0)

    grad_score = tl.zeros([BLOCK], tl.float32)
    before = descent_epsilon(num_iterations - 1.0, epsilon, epsilon_init, log2_decay)
    grad_k = -before * grad_threshold
    for back in range(1, num_iterations):
        column = num_iterations - 1 - back
        threshold = tl.load(state + column)
        current = descent_epsilon(column + 1.0, epsilon, epsilon_init, log2_decay)
        saturated = tl.sum((score >= threshold).to(tl.int32)).to(tl.float32)
        free_weight = tl.where(score < threshold, tl.exp((score - threshold) / current), 0.0)
        free = tl.sum(free_weight)
        # Far above all scores nothing is left of the sum, nor of the threshold's effect.
        share = tl.where(free + saturated > 0.0, grad_threshold / (free + saturated), 0.0)
        grad_score += share * free_weight
        grad_threshold = share * saturated
        grad_k += -descent_epsilon(column * 1.0, epsilon, epsilon_init, log2_decay) * grad_threshold
    if HAS_SOFT_BUDGET:
        k = tl.load(soft_budgets + row).to(tl.float32)
        tl.store(grad_budget + row, tl.where(descended, grad_k / k, 0.0))

    grad_score = tl.where(keys != LOWEST_KEY, tl.where(descended, grad_score, 0.0), 0.0)
    tl.store(grad_scores + positions, grad_score, mask=positions < n)
    tl.debug_barrier()
    for start in range(0, capacity, SLOTS):
        slots = start + tl.arange(0, SLOTS)
        used = tl.load(valid + slots, mask=slots < capacity, other=0) != 0
        weight = tl.load(weights + slots, mask=used, other=0.0)
        used = used & (weight < 1.0)
        index = tl.load(indices + slots, mask=used, other=0)
        grad = tl.load(grad_weights + slots, mask=used, other=0.0)
        shared = tl.load(grad_scores + index, mask=used, other=0.0)
        tl.store(grad_scores + index, shared + weight * grad / last_epsilon, mask=used)
