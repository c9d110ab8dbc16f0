"""Triton kernel and launch of the products of one new token in each row.

A token's products read each weight once and compute little, so that a launch takes as long as what it launches. One
kernel does what would be four: it adds, normalises, multiplies with up to three weights, and activates. Each program
computes sum and norm anew, which are some thousand numbers that all programs find in the cache.
"""

import torch
from torch import Tensor

from .op_attention_triton import in_multiplied_dtype
from .op_gelu_triton import gelu_parts
from .op_norm_triton import norm_rows
from .run_launch_triton import cdiv, launch, tl, triton

# rows of a program, the least that tensor cores multiply, and features of a weight in a program
BLOCK_ROWS, BLOCK_WIDTH = 16, 16
# bytes that are read of each feature in one step, so that the memory of three steps suffices on every card
BLOCK_BYTES = 512


@triton.jit
def summed(states, branch, offsets, mask):
    """States, or their sum with a branch, rounded to their dtype."""
    tile = tl.load(states + offsets, mask=mask, other=0.0)
    if branch is not None:
        tile = (tile.to(tl.float32) + tl.load(branch + offsets, mask=mask, other=0.0).to(tl.float32)).to(tile.dtype)
    return tile


@triton.jit(do_not_specialize=["rows"])
def step_products_kernel(
    states, branch, total, norm_weight, first, second, third, first_out, second_out, third_out,
    rows, eps, d, first_width, second_width, third_width,
    GATED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Some rows' products with one block of a weight, or with the same block of both weights of an activation:
    program (block of all weights, block of rows)."""
    block = tl.program_id(0)
    own = tl.program_id(1).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = (own < rows)[:, None]
    columns = tl.arange(0, BLOCK_D)
    if norm_weight is not None or total is not None:
        squares = tl.zeros([BLOCK_ROWS], tl.float32)
        for begin in range(0, d, BLOCK_D):
            inside = is_row & (begin + columns < d)[None, :]
            offsets = own[:, None] * d + (begin + columns)[None, :]
            tile = summed(states, branch, offsets, inside)
            if total is not None:
                is_mine = is_row & (begin + columns < tl.where(block == 0, d, 0))[None, :]
                tl.store(total + offsets, tile, mask=is_mine)
            squares += tl.sum(tile.to(tl.float32) * tile.to(tl.float32), 1)
        rstd = tl.rsqrt(squares / d + eps)

    weight, output, width = first, first_out, first_width
    if not GATED:
        if second is not None:
            blocks = tl.cdiv(first_width, BLOCK_WIDTH)
            if block >= blocks:
                weight, output, width = second, second_out, second_width
                block -= blocks
                if third is not None:
                    blocks = tl.cdiv(second_width, BLOCK_WIDTH)
                    if block >= blocks:
                        weight, output, width = third, third_out, third_width
                        block -= blocks
    features = block * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    product = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    other = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    for begin in range(0, d, BLOCK_D):
        here = begin + columns < d
        tile = summed(states, branch, own[:, None] * d + (begin + columns)[None, :], is_row & here[None, :])
        if norm_weight is not None:
            gain = tl.load(norm_weight + begin + columns, mask=here, other=0.0).to(tl.float32)
            kind = tile.dtype
            tile = norm_rows(tile.to(tl.float32), rstd, gain, norm_weight.dtype.element_ty, kind)
        places = features.to(tl.int64)[:, None] * d + (begin + columns)[None, :]
        inside = (features < width)[:, None] & here[None, :]
        weight_tile = tl.load(weight + places, mask=inside, other=0.0)
        product = tl.dot(tile, tl.trans(weight_tile), product, input_precision=PRECISION)
        if GATED:
            up_tile = tl.load(second + places, mask=inside, other=0.0)
            other = tl.dot(tile, tl.trans(up_tile), other, input_precision=PRECISION)
    kind = output.dtype.element_ty
    if GATED:
        # each product is rounded as one that is written
        gate, up = product.to(kind).to(tl.float32), other.to(kind).to(tl.float32)
        share, _ = gelu_parts(gate)
        product = gate * share * up
    inside = is_row & (features < width)[None, :]
    tl.store(output + own[:, None] * width + features[None, :], product.to(kind), mask=inside)


@in_multiplied_dtype(first_result=7)
def step_products_into(
    states: Tensor,
    branch: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    first: Tensor,
    second: Tensor | None,
    third: Tensor | None,
    total: Tensor | None,
    first_out: Tensor,
    second_out: Tensor | None,
    third_out: Tensor | None,
) -> None:
    """Write `norm(states + branch) @ weight.T` of each weight to its output; or, of two weights with one output, the
    gated activation `gelu(first product) * second product`.

    Args, of which tensors are contiguous:
        states: [rows, d].
        branch: [rows, d], added to the states; None for nothing.
        norm_weight: [d], of T5's norm; None for no norm.
        eps: of the norm.
        first, second, third: weights, [width, d] each; None for fewer.
        total: [rows, d], for `states + branch`, and none of those that are read; None where nobody wants it.
        first_out, second_out, third_out: [rows, width] each; None where there is no weight, and for the second weight
            of an activation, whose output is the first.
    """
    rows, d = states.shape
    is_gated = second is not None and second_out is None
    is_tf32 = states.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    widths = [0 if weight is None else weight.shape[0] for weight in (first, second, third)]
    blocks = sum(cdiv(width, BLOCK_WIDTH) for width in (widths[:1] if is_gated else widths))
    launch(
        step_products_kernel, (blocks, cdiv(rows, BLOCK_ROWS)),
        states, branch, total, norm_weight, first, second, third, first_out, second_out, third_out,
        rows, eps, d, *widths,
        is_gated, "tf32" if is_tf32 else "ieee", BLOCK_ROWS, BLOCK_WIDTH, BLOCK_BYTES // states.itemsize,
        num_warps=4, num_stages=3,
    )  # fmt: skip
