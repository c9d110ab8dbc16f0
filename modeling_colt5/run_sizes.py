"""Sizes that may be symbols: what compilers and exporters put in place of a length that they keep free."""

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
