"""What kernels drop by: which elements a seed keeps, by their row and column."""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("op_dropout_steps_triton needs triton; use kernel_backend='torch' without it") from error


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
