"""Triton kernel of dropout that follows from a seed and from an element's place."""

from torch import Tensor

from .op_dropout_steps_triton import dropped_in_row
from .run_launch_triton import cdiv, launch, next_power_of_2

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("op_dropout_triton needs triton; use kernel_backend='torch' without it") from error


@triton.jit
def dropout_kernel(states_ptr, seed_ptr, out_ptr, width, DROPOUT: tl.constexpr, BLOCK: tl.constexpr):
    """One block of one row a program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    values = tl.load(states_ptr + row * width + columns, mask=mask, other=0.0).to(tl.float32)
    values = dropped_in_row(values, seed_ptr, row, columns, DROPOUT)
    tl.store(out_ptr + row * width + columns, values.to(out_ptr.dtype.element_ty), mask=mask)


def dropout_into(states: Tensor, seed: Tensor, probability: float, out: Tensor) -> None:
    """Write `dropout_reference` of op_dropout.py to `out`, which may have another floating dtype."""
    width = states.shape[-1]
    block = min(1024, next_power_of_2(width))
    grid = (states.numel() // width, cdiv(width, block))
    launch(dropout_kernel, grid, states.contiguous(), seed, out, width, probability, block, num_warps=4)
