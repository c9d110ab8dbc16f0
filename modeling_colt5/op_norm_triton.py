"""Triton kernels of T5's RMSNorm with router scores, after a combination or not, and of its gradient.

A program holds whole rows of `d` features in registers, so the mean square, the scores and the products all come out
of one read. The weights' gradients are summed per program and then over the programs in a fixed order, not by atomics.
"""

import torch
from torch import Tensor

from .op_dropout_triton import dropped
from .op_rows_triton import routed_rows, tile_shape
from .run_launch_triton import adjacent, cdiv, launch, next_power_of_2, tl, triton

# This is a constant and not the device's number of processors, so that the weights' gradients are summed in the same
# order on every device.
GRADIENT_PROGRAMS = 512
# The backward keeps more of each element than the forward, and smaller programs let four share a processor.
BACKWARD_TILE, BACKWARD_WARP = 2048, 512


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
    residual_ptr, light_ptr, heavy_ptr, indices_ptr, valid_ptr, weights_ptr, capacity, seed_ptr, norm_weight_ptr,
    router_ptr, hidden_ptr, normed_ptr, rstd_ptr, scores_ptr, n, eps,
    d: tl.constexpr, DROPOUT: tl.constexpr, ROUTERS: tl.constexpr, ROUTER_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The combined rows (where there is a light branch), their norm and their router scores, in one read. With a seed
    what is added to the residual is dropped."""
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
        residual = rows
        if seed_ptr is not None:
            rows = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        rows += tl.load(light_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if heavy_ptr is not None:
            rows += routed_rows(
                positions, batch, columns, column_mask, heavy_ptr, indices_ptr, valid_ptr, weights_ptr, capacity, d,
                ROWS,
            )  # fmt: skip
        if seed_ptr is not None:
            rows = residual + dropped(rows, seed_ptr, batch * n + positions, columns, DROPOUT)
        combined = rows.to(hidden_ptr.dtype.element_ty)
        tl.store(hidden_ptr + offsets, combined, mask=mask)
        rows = combined.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(rows * rows, axis=1) / d + eps)
    tl.store(rstd_ptr + batch * n + positions, rstd, mask=position_mask)
    norm_weight = tl.load(norm_weight_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
    normed = norm_rows(rows, rstd, norm_weight, norm_weight_ptr.dtype.element_ty, residual_ptr.dtype.element_ty)
    tl.store(normed_ptr + offsets, normed.to(normed_ptr.dtype.element_ty), mask=mask)
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
    grad_hidden_ptr, grad_normed_ptr, grad_scores_ptr, hidden_ptr, rstd_ptr, norm_weight_ptr, router_ptr,
    grad_rows_ptr, partials_ptr, n, total_blocks,
    d: tl.constexpr, ROUTERS: tl.constexpr, ROUTER_BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
    partials_ptr, grad_norm_weight_ptr, grad_router_ptr, programs,
    d: tl.constexpr, ROUTERS: tl.constexpr, PROGRAM_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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


def norm_into(
    hidden_states: Tensor,
    norm_weight: Tensor,
    router_weights: Tensor | None,
    eps: float,
    wanted_dtype: torch.dtype | None,
    normed: Tensor,
    scores: Tensor,
    rstd: Tensor,
    light: Tensor | None = None,
    heavy: Tensor | None = None,
    indices: Tensor | None = None,
    valid: Tensor | None = None,
    weights: Tensor | None = None,
    combined: Tensor | None = None,
    seed: Tensor | None = None,
    dropout: float = 0.0,
) -> None:
    """Write `norm_reference` of op_norm.py to `normed`, `scores` (where there are routers) and `rstd`.

    Where there is a light branch, what is normalised is the sum of the states and this, and where there is a heavy one
    of that too, as `combine_reference` of op_rows.py has it. The sum is written to `combined`. With a seed what is
    added to the states is dropped as `dropout` of op_dropout.py does.
    """
    batch, n, d = hidden_states.shape
    routers = 0 if router_weights is None else router_weights.shape[0]
    rows, block, warps = tile_shape(d)
    launch(
        combine_norm_kernel, (batch * cdiv(n, rows),),
        *map(adjacent, (hidden_states, light, heavy, indices, valid, weights)),
        0 if heavy is None else heavy.shape[1], seed, *map(adjacent, (norm_weight, router_weights)),
        combined, normed, rstd, scores,
        n, eps, d, dropout, routers, next_power_of_2(max(routers, 1)), rows, block, num_warps=warps,
    )  # fmt: skip


def gradient_programs(batch: int, n: int, d: int) -> int:
    """How many programs of `norm_backward_into` leave a share of the weights' gradients, for states [batch, n, d]."""
    rows, _, _ = tile_shape(d, BACKWARD_TILE, BACKWARD_WARP)
    return min(GRADIENT_PROGRAMS, batch * cdiv(n, rows))


def norm_backward_into(
    grad_normed: Tensor | None,
    grad_scores: Tensor | None,
    hidden_states: Tensor,
    norm_weight: Tensor,
    router_weights: Tensor | None,
    eps: float,
    wanted_dtype: torch.dtype | None,
    rstd: Tensor,
    grad_states: Tensor,
    grad_norm_weight: Tensor,
    grad_router: Tensor | None,
    grad_hidden: Tensor | None = None,
    partials: Tensor | None = None,
) -> None:
    """Write the gradients of states, norm and routers, by two launches: rows and partial sums, then their sums.

    `grad_hidden` is what else flows into the states. `partials` is room for the programs' shares, fp32
    `[gradient_programs, 1 + routers, d]`; None takes some.
    """
    batch, n, d = hidden_states.shape
    routers = 0 if router_weights is None else router_weights.shape[0]
    if partials is None:
        shape = (gradient_programs(batch, n, d), 1 + routers, d)
        partials = torch.empty(shape, device=hidden_states.device, dtype=torch.float32)
    rows, block, warps = tile_shape(d, BACKWARD_TILE, BACKWARD_WARP)
    programs = partials.shape[0]
    parts = (grad_hidden, grad_normed, grad_scores, hidden_states, rstd, norm_weight, router_weights)
    launch(
        norm_backward_kernel, (programs,),
        *map(adjacent, parts), grad_states, partials,
        n, batch * cdiv(n, rows), d, routers, next_power_of_2(max(routers, 1)), rows, block, num_warps=warps,
    )  # fmt: skip
    launch(
        sum_partials_kernel, (cdiv(d, 32), 1 + routers),
        partials, grad_norm_weight, grad_router, programs, d, routers, 128, 32, num_warps=8,
    )  # fmt: skip
