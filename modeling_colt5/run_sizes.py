"""Numbers of tokens: the one formula of budgets, and sizes that may be symbols.

Compilers and exporters put symbols in place of a length that they keep free.
"""

from typing import Any

import torch
from torch import Tensor


def is_free(size: int) -> bool:
    """Whether an exporter (torch.export, torch.onnx) keeps this size free, for any length."""
    return not isinstance(size, int) and torch.compiler.is_exporting()


def computed_size(size: Tensor, most: int) -> int:
    """A size that the exported program computes itself when it runs, out of an int64 tensor [1]: from 1 to `most`.

    An expression of symbols would not do: operations compare it with other sizes while the program is made, and the
    program then holds only for lengths where all comparisons come out as they did for the example.
    """
    number: int = size.item()  # type: ignore[assignment]
    torch._check(number >= 1)
    torch._check(number <= most)
    return number


def as_tensor(size: int) -> Tensor:
    """A size as an int64 tensor [1] on the CPU."""
    return torch.full((1,), size, dtype=torch.int64, device="cpu")


def smaller(size: int, other: int) -> int:
    """The smaller one of two sizes; symbols are not compared."""
    return min(size, other) if isinstance(size, int) and isinstance(other, int) else torch.sym_min(size, other)


def larger(size: int, other: int) -> int:
    """The larger one of two sizes; symbols are not compared."""
    return max(size, other) if isinstance(size, int) and isinstance(other, int) else torch.sym_max(size, other)


# A GPU copies so many numbers of weights in less time than it takes the host to launch another product.
FEW_WEIGHTS = 1 << 21


def is_one_product(states: int, results: int, width: int, device: torch.device) -> bool:
    """Whether products of the same states are made as one, for which their weights are copied together.

    Args:
        states: how many.
        results: of each state, those of all products.
        width: of a state.
        device: where.
    """
    return states >= 2 * results or (device.type == "cuda" and results * width <= FEW_WEIGHTS)


def share_of(length: Any, fraction: float) -> Any:
    """ceil(fraction · length - 1e-6), exact: no rounding of a product decides how many tokens are routed.

    A fraction in floating point is p / 2^s with integers, so the result is (p · length + a constant) >> s. It is
    computed in parts of 31 bits, so that nothing exceeds 64: devices without float64 have integers of those.

    Args:
        length: number of tokens, below 2^31: an integer, a symbolic one, or an int64 tensor.
        fraction: share of them, above 0 and below 2^31.

    Returns:
        What the length is: an integer, a symbolic one, or an int64 tensor of its shape.
    """
    numerator, denominator = fraction.as_integer_ratio()
    bits = -(-(denominator.bit_length() - 1) // 31) * 31
    one = 1 << bits
    numerator *= one // denominator
    # With this constant, what is more than 1e-6 above an integer is rounded up.
    constant = one - 1 - one // 10**6
    carried, part = 0, (1 << 31) - 1
    for shift in range(0, bits, 31):
        carried = (length * ((numerator >> shift) & part) + (carried + ((constant >> shift) & part))) >> 31
    whole = numerator >> bits
    return length * whole + carried if whole else carried


def routed_budget(lengths: Tensor, fraction: float, minimum: int) -> Tensor:
    """How many tokens each row routes: min(length, max(minimum, ceil(fraction · length - 1e-6))), exact.

    Args:
        lengths: int [rows], real tokens of each row.
        fraction: share of the tokens, in (0, 1].
        minimum: tokens that are routed however short the row is.

    Returns:
        int64 [rows].
    """
    lengths = lengths.to(torch.int64)
    return share_of(lengths, fraction).clamp(min=minimum).minimum(lengths)


def routed_capacity(n: int, fraction: float, minimum: int) -> int:
    """The slots that rows of padded length `n` need: `routed_budget` of `n`, at least 1, also for a symbolic `n`."""
    if is_free(n):
        return computed_size(routed_budget(as_tensor(n), fraction, minimum).clamp(min=1), n)
    budget = share_of(n, fraction)
    if isinstance(n, int):
        return max(1, min(n, max(minimum, budget)))
    return torch.sym_max(1, torch.sym_min(n, torch.sym_max(minimum, budget)))
