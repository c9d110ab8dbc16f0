"""Triton kernels of the memory-bound operations of `token_ops_reference.py`, forward and backward.

Every kernel reads and writes whole rows of `d` features: a program holds `ROWS` rows in registers, so the mean square,
the scores and the products all come out of one read. No kernel uses an atomic: dense results are written by the
program that owns the position, which finds the slot routed there by binary search in the ascending indices, and the
weights' gradients are summed per program and then over the programs in a fixed order.
"""

import functools

import torch
from torch import Tensor

from .kernel_launch import cdiv, launch, next_power_of_2
from .token_ops_reference import normed_dtype

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("token_ops_triton needs triton; use kernel_backend='torch' without it") from error

# a constant, not the device's number of processors: the order of the weights' gradient sums is then the same on
# every device
GRADIENT_PROGRAMS = 512
# elements a program holds; the backward keeps more of each, and smaller programs let four share a processor
FORWARD_TILE, BACKWARD_TILE = 4096, 2048


@functools.cache
def tile_shape(width: int, elements: int = FORWARD_TILE) -> tuple[int, int, int]:
    """Rows a program holds, its padded width and its warps, for rows of `width` features."""
    block = next_power_of_2(width)
    rows = max(1, min(16, elements // block))
    return rows, block, max(1, min(16, rows * block // 512))


@triton.jit
def routed_slots(positions, batch, indices_ptr, valid_ptr, capacity):
    """The slot that holds each position `[rows]`, as a row of `[batch · capacity]`, and whether there is one."""
    first = batch * capacity
    low = tl.zeros_like(positions)
    high = tl.zeros_like(positions) + capacity
    width = capacity
    while width > 0:
        middle = (low + high) // 2
        open_ = low < high
        found = tl.load(indices_ptr + first + middle, mask=open_, other=0)
        right = open_ & (found < positions)
        high = tl.where(open_ & (found >= positions), middle, high)
        low = tl.where(right, middle + 1, low)
        width = width // 2
    inside = low < capacity
    slots = first + low
    here = inside & (tl.load(indices_ptr + slots, mask=inside, other=-1) == positions)
    return slots, here & (tl.load(valid_ptr + slots, mask=here, other=0).to(tl.int32) != 0)


@triton.jit
def routed_rows(
    positions, batch, columns, column_mask, updates_ptr, indices_ptr, valid_ptr, weights_ptr, capacity, d: tl.constexpr
):
    """What the slots add at each position `[rows, block]`, in fp32: weight · update, or zeros."""
    slots, here = routed_slots(positions, batch, indices_ptr, valid_ptr, capacity)
    updates = tl.load(
        updates_ptr + slots[:, None] * d + columns[None, :], mask=here[:, None] & column_mask[None, :], other=0.0
    ).to(tl.float32)
    if weights_ptr is not None:
        updates *= tl.load(weights_ptr + slots, mask=here, other=0.0).to(tl.float32)[:, None]
    return updates


@triton.jit(do_not_specialize=["n", "capacity", "capacity2"])
def combine_kernel(
    base_ptr,
    light_ptr,
    updates_ptr,
    indices_ptr,
    valid_ptr,
    weights_ptr,
    capacity,
    updates2_ptr,
    indices2_ptr,
    valid2_ptr,
    weights2_ptr,
    capacity2,
    out_ptr,
    n,
    d: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = base + light + the routed rows of one or two routings, one block of positions a program."""
    blocks = tl.cdiv(n, ROWS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    positions = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    column_mask = columns < d
    mask = (positions < n)[:, None] & column_mask[None, :]
    offsets = (batch * n + positions)[:, None] * d + columns[None, :]
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    if base_ptr is not None:
        total += tl.load(base_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if light_ptr is not None:
        total += tl.load(light_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    total += routed_rows(
        positions, batch, columns, column_mask, updates_ptr, indices_ptr, valid_ptr, weights_ptr, capacity, d
    )
    if updates2_ptr is not None:
        total += routed_rows(
            positions, batch, columns, column_mask, updates2_ptr, indices2_ptr, valid2_ptr, weights2_ptr, capacity2, d
        )
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def norm_rows(rows, rstd, norm_weight, weight_type: tl.constexpr, hidden_type: tl.constexpr):
    """T5's RMSNorm of fp32 rows, rounded to a half-precision weight's dtype before and after the product."""
    normed = (rows * rstd[:, None]).to(weight_type).to(tl.float32)
    normed = (normed * norm_weight[None, :]).to(weight_type)
    if weight_type == tl.float32:
        normed = normed.to(hidden_type)
    return normed


@triton.jit(do_not_specialize=["n", "capacity"])
def combine_norm_kernel(
    residual_ptr,
    light_ptr,
    heavy_ptr,
    indices_ptr,
    valid_ptr,
    weights_ptr,
    capacity,
    norm_weight_ptr,
    router_ptr,
    hidden_ptr,
    normed_ptr,
    rstd_ptr,
    scores_ptr,
    n,
    eps,
    d: tl.constexpr,
    ROUTERS: tl.constexpr,
    ROUTER_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The combined rows (where there is a light branch), their norm and their router scores, in one read."""
    blocks = tl.cdiv(n, ROWS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    positions = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    position_mask = positions < n
    columns = tl.arange(0, BLOCK)
    column_mask = columns < d
    mask = position_mask[:, None] & column_mask[None, :]
    offsets = (batch * n + positions)[:, None] * d + columns[None, :]
    rows = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if light_ptr is not None:
        rows += tl.load(light_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        rows += routed_rows(
            positions, batch, columns, column_mask, heavy_ptr, indices_ptr, valid_ptr, weights_ptr, capacity, d
        )
        combined = rows.to(hidden_ptr.dtype.element_ty)
        tl.store(hidden_ptr + offsets, combined, mask=mask)
        rows = combined.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(rows * rows, axis=1) / d + eps)
    tl.store(rstd_ptr + batch * n + positions, rstd, mask=position_mask)
    norm_weight = tl.load(norm_weight_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
    normed = norm_rows(rows, rstd, norm_weight, norm_weight_ptr.dtype.element_ty, residual_ptr.dtype.element_ty)
    tl.store(normed_ptr + offsets, normed, mask=mask)
    if ROUTERS > 0:
        routers = tl.arange(0, ROUTER_BLOCK)
        vectors = tl.load(
            router_ptr + routers[:, None] * d + columns[None, :],
            mask=(routers < ROUTERS)[:, None] & column_mask[None, :],
            other=0.0,
        ).to(tl.float32)
        scores = tl.sum(normed.to(tl.float32)[None, :, :] * vectors[:, None, :], axis=2)
        tl.store(
            scores_ptr + (batch * ROUTERS + routers)[:, None] * n + positions[None, :],
            scores,
            mask=(routers < ROUTERS)[:, None] & position_mask[None, :],
        )


@triton.jit(do_not_specialize=["n", "total_blocks"])
def norm_backward_kernel(
    grad_hidden_ptr,
    grad_normed_ptr,
    grad_scores_ptr,
    hidden_ptr,
    rstd_ptr,
    norm_weight_ptr,
    router_ptr,
    grad_rows_ptr,
    partials_ptr,
    n,
    total_blocks,
    d: tl.constexpr,
    ROUTERS: tl.constexpr,
    ROUTER_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The rows' gradients, and this program's share `[1 + routers, d]` of the norm's and the routers' gradients.

    With x̂ = x · rstd and g = weight ⊙ (∂normed + Σ ∂score · router):
    ∂x = rstd · (g − x̂ · mean(g ⊙ x̂)) + ∂hidden, ∂weight = Σ (g / weight) ⊙ x̂, ∂router = Σ ∂score · normed.
    """
    columns = tl.arange(0, BLOCK)
    column_mask = columns < d
    routers = tl.arange(0, ROUTER_BLOCK)
    router_mask = (routers < ROUTERS)[:, None] & column_mask[None, :]
    norm_weight = tl.load(norm_weight_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
    vectors = tl.zeros([ROUTER_BLOCK, BLOCK], dtype=tl.float32)
    if ROUTERS > 0:
        vectors = tl.load(router_ptr + routers[:, None] * d + columns[None, :], mask=router_mask, other=0.0).to(
            tl.float32
        )
    weight_sum = tl.zeros([BLOCK], dtype=tl.float32)
    router_sum = tl.zeros([ROUTER_BLOCK, BLOCK], dtype=tl.float32)
    blocks = tl.cdiv(n, ROWS)
    for block in range(tl.program_id(0), total_blocks, tl.num_programs(0)):
        batch = (block // blocks).to(tl.int64)
        positions = (block % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        position_mask = positions < n
        mask = position_mask[:, None] & column_mask[None, :]
        offsets = (batch * n + positions)[:, None] * d + columns[None, :]
        rows = tl.load(hidden_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + batch * n + positions, mask=position_mask, other=0.0)
        grad_normed = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        if grad_normed_ptr is not None:
            grad_normed += tl.load(grad_normed_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if grad_scores_ptr is not None:
            grad_scores = tl.load(
                grad_scores_ptr + (batch * ROUTERS + routers)[:, None] * n + positions[None, :],
                mask=(routers < ROUTERS)[:, None] & position_mask[None, :],
                other=0.0,
            )
            grad_normed += tl.sum(grad_scores[:, :, None] * vectors[:, None, :], axis=0)
            normed = norm_rows(rows, rstd, norm_weight, norm_weight_ptr.dtype.element_ty, hidden_ptr.dtype.element_ty)
            router_sum += tl.sum(grad_scores[:, :, None] * normed.to(tl.float32)[None, :, :], axis=1)
        unit_rows = rows * rstd[:, None]
        weight_sum += tl.sum(grad_normed * unit_rows, axis=0)
        grad_unit = grad_normed * norm_weight[None, :]
        mean = tl.sum(grad_unit * unit_rows, axis=1) / d
        grad_rows = rstd[:, None] * (grad_unit - unit_rows * mean[:, None])
        if grad_hidden_ptr is not None:
            grad_rows += tl.load(grad_hidden_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_rows_ptr + offsets, grad_rows.to(grad_rows_ptr.dtype.element_ty), mask=mask)
    share = partials_ptr + tl.program_id(0) * (1 + ROUTERS) * d
    tl.store(share + columns, weight_sum, mask=column_mask)
    if ROUTERS > 0:
        tl.store(share + (1 + routers)[:, None] * d + columns[None, :], router_sum, mask=router_mask)


@triton.jit(do_not_specialize=["programs"])
def sum_partials_kernel(
    partials_ptr,
    grad_norm_weight_ptr,
    grad_router_ptr,
    programs,
    d: tl.constexpr,
    ROUTERS: tl.constexpr,
    PROGRAM_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The programs' shares summed in order: the norm weight's gradient (row 0) or a router's (rows 1 and up)."""
    row = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column_mask = columns < d
    total = tl.zeros([PROGRAM_BLOCK, BLOCK], dtype=tl.float32)
    for first in range(0, programs, PROGRAM_BLOCK):
        program = first + tl.arange(0, PROGRAM_BLOCK)
        total += tl.load(
            partials_ptr + (program * (1 + ROUTERS) + row)[:, None] * d + columns[None, :],
            mask=(program < programs)[:, None] & column_mask[None, :],
            other=0.0,
        )
    column_sums = tl.sum(total, axis=0)
    if row == 0:
        tl.store(
            grad_norm_weight_ptr + columns, column_sums.to(grad_norm_weight_ptr.dtype.element_ty), mask=column_mask
        )
    elif ROUTERS > 0:
        tl.store(
            grad_router_ptr + (row - 1) * d + columns,
            column_sums.to(grad_router_ptr.dtype.element_ty),
            mask=column_mask,
        )


@triton.jit
def gather_slot(
    slot,
    hidden_ptr,
    other_ptr,
    indices_ptr,
    valid_ptr,
    weights_ptr,
    out_ptr,
    dots_ptr,
    n,
    capacity,
    d: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One slot's row times its weight, and the row's product with the slot's row of `other`; zeros where unused."""
    columns = tl.arange(0, BLOCK)
    mask = columns < tl.load(valid_ptr + slot).to(tl.int32) * d
    source = (slot // capacity) * n + tl.load(indices_ptr + slot)
    row = tl.load(hidden_ptr + source * d + columns, mask=mask, other=0.0).to(tl.float32)
    if dots_ptr is not None:
        other = tl.load(other_ptr + slot * d + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(dots_ptr + slot, tl.sum(row * other, axis=0))
    if out_ptr is not None:
        if weights_ptr is not None:
            row *= tl.load(weights_ptr + slot).to(tl.float32)
        tl.store(out_ptr + slot * d + columns, row.to(out_ptr.dtype.element_ty), mask=columns < d)


@triton.jit(do_not_specialize=["n", "capacity", "capacity2", "slots"])
def gather_kernel(
    hidden_ptr,
    other_ptr,
    indices_ptr,
    valid_ptr,
    weights_ptr,
    out_ptr,
    dots_ptr,
    capacity,
    slots,
    indices2_ptr,
    valid2_ptr,
    weights2_ptr,
    out2_ptr,
    capacity2,
    n,
    d: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A slot a program: the first routing's `slots` slots, then the second routing's, where there is one."""
    slot = tl.program_id(0).to(tl.int64)
    if out2_ptr is None:
        gather_slot(
            slot, hidden_ptr, other_ptr, indices_ptr, valid_ptr, weights_ptr, out_ptr, dots_ptr, n, capacity, d, BLOCK
        )
    else:
        if slot < slots:
            gather_slot(
                slot, hidden_ptr, None, indices_ptr, valid_ptr, weights_ptr, out_ptr, None, n, capacity, d, BLOCK
            )
        else:
            gather_slot(
                slot - slots, hidden_ptr, None, indices2_ptr, valid2_ptr, weights2_ptr, out2_ptr, None, n, capacity2,
                d, BLOCK,
            )  # fmt: skip


@triton.jit
def gelu_parts(gate):
    """The tanh form's ½·(1 + tanh u) and du/dgate."""
    inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    # ½·(1 + tanh u) is the sigmoid of 2u, which needs no tanh of the device's library
    return tl.sigmoid(2.0 * inner), 0.7978845608028654 * (1.0 + 0.134145 * gate * gate)


@triton.jit
def gated_gelu_kernel(gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, width, BLOCK: tl.constexpr):
    """gelu(gate) · up, one block of one row a program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    share, _ = gelu_parts(gate)
    tl.store(out_ptr + row * width + columns, (gate * share * up).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gated_gelu_backward_kernel(
    grad_ptr,
    gate_ptr,
    up_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    gate_stride,
    up_stride,
    width,
    BLOCK: tl.constexpr,
):
    """∂gate and ∂up from ∂out, everything else recomputed."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    grad = tl.load(grad_ptr + row * width + columns, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    share, slope = gelu_parts(gate)
    # d(½·(1 + tanh u))/du = ½·(1 − tanh² u) = 2·s·(1 − s)
    grad_gate = grad * up * (share + gate * 2.0 * share * (1.0 - share) * slope)
    tl.store(grad_gate_ptr + row * width + columns, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_up_ptr + row * width + columns, (grad * gate * share).to(grad_up_ptr.dtype.element_ty), mask=mask)


def combine(
    base: Tensor | None,
    light: Tensor | None,
    updates: Tensor,
    indices: Tensor,
    valid: Tensor,
    weights: Tensor | None,
    updates2: Tensor | None,
    indices2: Tensor | None,
    valid2: Tensor | None,
    weights2: Tensor | None,
    length: int,
) -> Tensor:
    """`token_ops_reference.combine` as one launch."""
    batch, capacity, d = updates.shape
    out = torch.empty(batch, length, d, device=updates.device, dtype=updates.dtype if base is None else base.dtype)
    rows, block, warps = tile_shape(d)
    launch(
        combine_kernel,
        (batch * cdiv(length, rows),),
        None if base is None else base.contiguous(),
        None if light is None else light.contiguous(),
        updates.contiguous(),
        indices.contiguous(),
        valid.contiguous(),
        None if weights is None else weights.contiguous(),
        capacity,
        None if updates2 is None else updates2.contiguous(),
        None if indices2 is None else indices2.contiguous(),
        None if valid2 is None else valid2.contiguous(),
        None if weights2 is None else weights2.contiguous(),
        0 if updates2 is None else updates2.shape[1],
        out,
        length,
        d,
        rows,
        block,
        num_warps=warps,
    )
    return out


def combine_norm(
    residual: Tensor,
    light: Tensor | None,
    heavy: Tensor | None,
    indices: Tensor | None,
    valid: Tensor | None,
    weights: Tensor | None,
    norm_weight: Tensor,
    router_weights: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`token_ops_reference.combine_norm` as one launch."""
    batch, n, d = residual.shape
    routers = 0 if router_weights is None else router_weights.shape[0]
    hidden = torch.empty(0 if light is None else residual.shape, device=residual.device, dtype=residual.dtype)
    normed = torch.empty(residual.shape, device=residual.device, dtype=normed_dtype(residual.dtype, norm_weight.dtype))
    rstd = torch.empty(batch, n, device=residual.device, dtype=torch.float32)
    scores = torch.empty((batch, routers, n) if routers else 0, device=residual.device, dtype=torch.float32)
    rows, block, warps = tile_shape(d)
    launch(
        combine_norm_kernel,
        (batch * cdiv(n, rows),),
        residual.contiguous(),
        None if light is None else light.contiguous(),
        None if heavy is None else heavy.contiguous(),
        None if indices is None else indices.contiguous(),
        None if valid is None else valid.contiguous(),
        None if weights is None else weights.contiguous(),
        0 if heavy is None else heavy.shape[1],
        norm_weight.contiguous(),
        None if router_weights is None else router_weights.contiguous(),
        hidden,
        normed,
        rstd,
        scores,
        n,
        eps,
        d,
        routers,
        next_power_of_2(max(routers, 1)),
        rows,
        block,
        num_warps=warps,
    )
    return hidden, normed, rstd, scores


def norm_backward(
    grad_hidden: Tensor | None,
    grad_normed: Tensor | None,
    grad_scores: Tensor | None,
    hidden_states: Tensor,
    rstd: Tensor,
    norm_weight: Tensor,
    router_weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`token_ops_reference.norm_backward` as two launches: rows and partial sums, then the sums of the partials."""
    batch, n, d = hidden_states.shape
    routers = 0 if router_weights is None else router_weights.shape[0]
    rows, block, warps = tile_shape(d, BACKWARD_TILE)
    total_blocks = batch * cdiv(n, rows)
    programs = min(GRADIENT_PROGRAMS, total_blocks)
    grad_rows = torch.empty(hidden_states.shape, device=hidden_states.device, dtype=hidden_states.dtype)
    grad_norm_weight = torch.empty(d, device=hidden_states.device, dtype=norm_weight.dtype)
    grad_router = norm_weight.new_empty(0)
    if router_weights is not None:
        grad_router = router_weights.new_empty(router_weights.shape)
    partials = torch.empty(programs, 1 + routers, d, device=hidden_states.device, dtype=torch.float32)
    launch(
        norm_backward_kernel,
        (programs,),
        None if grad_hidden is None else grad_hidden.contiguous(),
        None if grad_normed is None else grad_normed.contiguous(),
        None if grad_scores is None else grad_scores.contiguous(),
        hidden_states.contiguous(),
        rstd,
        norm_weight.contiguous(),
        None if router_weights is None else router_weights.contiguous(),
        grad_rows,
        partials,
        n,
        total_blocks,
        d,
        routers,
        next_power_of_2(max(routers, 1)),
        rows,
        block,
        num_warps=warps,
    )
    launch(
        sum_partials_kernel,
        (cdiv(d, 32), 1 + routers),
        partials,
        grad_norm_weight,
        grad_router,
        programs,
        d,
        routers,
        128,
        32,
        num_warps=8,
    )
    return grad_rows, grad_norm_weight, grad_router


def gather(
    hidden_states: Tensor,
    indices: Tensor,
    valid: Tensor,
    weights: Tensor | None,
    indices2: Tensor | None,
    valid2: Tensor | None,
    weights2: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`token_ops_reference.gather` as one launch."""
    batch, n, d = hidden_states.shape
    capacity = indices.shape[1]
    capacity2 = 0 if indices2 is None else indices2.shape[1]
    out = torch.empty(batch, capacity, d, device=hidden_states.device, dtype=hidden_states.dtype)
    out2 = torch.empty(
        (batch, capacity2, d) if capacity2 else 0, device=hidden_states.device, dtype=hidden_states.dtype
    )
    _, block, _ = tile_shape(d)
    launch(
        gather_kernel,
        (batch * (capacity + capacity2),),
        hidden_states.contiguous(),
        None,
        indices.contiguous(),
        valid.contiguous(),
        None if weights is None else weights.contiguous(),
        out,
        None,
        capacity,
        batch * capacity,
        None if indices2 is None else indices2.contiguous(),
        None if valid2 is None else valid2.contiguous(),
        None if weights2 is None else weights2.contiguous(),
        None if indices2 is None else out2,
        capacity2,
        n,
        d,
        block,
        num_warps=max(1, min(8, block // 256)),
    )
    return out, out2


def gather_dot(
    hidden_states: Tensor, other: Tensor, indices: Tensor, valid: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`token_ops_reference.gather_dot` as one launch."""
    batch, n, d = hidden_states.shape
    capacity = indices.shape[1]
    out = torch.empty(batch, capacity, d, device=hidden_states.device, dtype=other.dtype)
    dots = torch.empty(batch, capacity, device=hidden_states.device, dtype=torch.float32)
    _, block, _ = tile_shape(d)
    launch(
        gather_kernel,
        (batch * capacity,),
        hidden_states.contiguous(),
        other.contiguous(),
        indices.contiguous(),
        valid.contiguous(),
        None if weights is None else weights.contiguous(),
        out,
        dots,
        capacity,
        batch * capacity,
        None,
        None,
        None,
        None,
        0,
        n,
        d,
        block,
        num_warps=max(1, min(8, block // 256)),
    )
    return out, dots


def rows_of(states: Tensor) -> Tensor:
    """`[..., width]` as `[rows, width]` with adjacent features, a view where it can be (halves of one projection)."""
    rows = states.reshape(-1, states.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def gated_gelu(gate: Tensor, up: Tensor) -> Tensor:
    """`token_ops_reference.gated_gelu` as one launch."""
    gate_rows, up_rows = rows_of(gate), rows_of(up)
    rows, width = gate_rows.shape
    out = torch.empty(gate.shape, device=gate.device, dtype=gate.dtype)
    block = min(1024, next_power_of_2(width))
    launch(
        gated_gelu_kernel,
        (rows, cdiv(width, block)),
        gate_rows,
        up_rows,
        out,
        gate_rows.stride(0),
        up_rows.stride(0),
        width,
        block,
        num_warps=4,
    )
    return out


def gated_gelu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """`token_ops_reference.gated_gelu_backward` as one launch."""
    gate_rows, up_rows = rows_of(gate), rows_of(up)
    rows, width = gate_rows.shape
    grad_gate = torch.empty(gate.shape, device=gate.device, dtype=gate.dtype)
    grad_up = torch.empty(up.shape, device=up.device, dtype=up.dtype)
    block = min(1024, next_power_of_2(width))
    launch(
        gated_gelu_backward_kernel,
        (rows, cdiv(width, block)),
        grad.contiguous(),
        gate_rows,
        up_rows,
        grad_gate,
        grad_up,
        gate_rows.stride(0),
        up_rows.stride(0),
        width,
        block,
        num_warps=4,
    )
    return grad_gate, grad_up
