"""Triton kernel of dropout that follows from a seed and from an element's place, and what other kernels drop by."""

from torch import Tensor

from .run_launch_triton import cdiv, launch, next_power_of_2, tl, triton


@triton.jit
def keys_of_rows(seed_ptr, stream, rows):
    """Where the random numbers of each row of a stream start: Philox by row, stream and seed."""
    rows = rows.to(tl.int32)
    zero = rows * 0
    return tl.philox(tl.load(seed_ptr), rows, zero + stream.to(tl.int32), zero, zero)[0]


@triton.jit
def keeps(keys, columns, DROPOUT: tl.constexpr):
    """Which elements dropout keeps: number `column` of the SplitMix32 sequence that starts at a row's key.

    Philox for every element would cost more than what is dropped.
    """
    state = keys + columns.to(tl.uint32) * 0x9E3779B9
    state = (state ^ (state >> 16)) * 0x85EBCA6B
    state = (state ^ (state >> 13)) * 0xC2B2AE35
    state = state ^ (state >> 16)
    # fp32 holds 24 bits exactly.
    return (state >> 8).to(tl.float32) >= DROPOUT * 16777216.0


@triton.jit
def dropped(values, seed_ptr, rows, columns, DROPOUT: tl.constexpr):
    """Values `[rows, columns]` in fp32, of which dropout keeps some and makes them larger."""
    keys = keys_of_rows(seed_ptr, rows * 0, rows)
    return tl.where(keeps(keys[:, None], columns[None, :], DROPOUT), values * (1.0 / (1.0 - DROPOUT)), 0.0)


@triton.jit
def dropped_in_row(values, seed_ptr, row, columns, DROPOUT: tl.constexpr):
    """The same for the values `[columns]` of one row."""
    return tl.where(
        keeps(keys_of_rows(seed_ptr, row * 0, row), columns, DROPOUT), values * (1.0 / (1.0 - DROPOUT)), 0.0
    )


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
