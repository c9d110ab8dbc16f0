"""Dropout that follows from a seed and from an element's place: in PyTorch, and the operator with its kernel.

Nothing is kept of what was dropped: the gradient, or a layer that is computed again, drops the same by the same seed.
"""

from typing import Any

import torch
from torch import Tensor

from .kernel_backend import accumulation_dtype, triton_is_available
from .run_operator import ComposedGradient, Launch, Operator

dropout_into: Launch = None
if triton_is_available():
    from .op_dropout_triton import dropout_into

_BITS = 0xFFFFFFFF


def draw_seeds(count: int, device: torch.device) -> Tensor:
    """Seeds from the generator of a device, int64 `[count, 2]`: the first of each row is one. Kernels read them at
    addresses that are multiples of 16."""
    return torch.randint(2**63 - 1, (count, 2), device=device)


def _multiplied(factor: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of products of 32-bit integers, which int64 holds."""
    low = factor * (numbers & 0xFFFF)
    high = factor * (numbers >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def _philox(seed: Tensor, rows: Tensor) -> Tensor:
    """The first 32 bits that Philox 4x32 gives after 10 rounds for the counters (row, 0, 0, 0)."""
    first, second, third, fourth = rows, rows * 0, rows * 0, rows * 0
    low, high = seed & _BITS, (seed >> 32) & _BITS
    for _ in range(10):
        (upper, lower), (other_upper, other_lower) = _multiplied(0xD2511F53, first), _multiplied(0xCD9E8D57, third)
        first, second, third, fourth = other_upper ^ second ^ low, other_lower, upper ^ fourth ^ high, lower
        low, high = (low + 0x9E3779B9) & _BITS, (high + 0xBB67AE85) & _BITS
    return first


def kept_elements(seed: Tensor, rows: int, width: int, probability: float) -> Tensor:
    """Which elements of `[rows, width]` dropout keeps, bool: number `column` of the SplitMix32 sequence that starts at
    Philox's number of the row."""
    keys = _philox(seed, torch.arange(rows, device=seed.device))[:, None]
    state = (keys + torch.arange(width, device=seed.device) * 0x9E3779B9) & _BITS
    state = _multiplied(0x85EBCA6B, state ^ (state >> 16))[1]
    state = _multiplied(0xC2B2AE35, state ^ (state >> 13))[1]
    state = state ^ (state >> 16)
    return (state >> 8) >= probability * 2**24


def dropout_reference(states: Tensor, seed: Tensor, probability: float) -> Tensor:
    """States `[..., width]` whose elements are 0 with a probability, and else divided by that of the others."""
    width = states.shape[-1]
    kept = kept_elements(seed, states.numel() // width, width, probability).view(states.shape)
    dtype = accumulation_dtype(states.dtype)
    return torch.where(kept, states.to(dtype) * (1 / (1 - probability)), 0).to(states.dtype)


def _save_dropout(ctx: Any, inputs: tuple[Any, ...], _: Tensor) -> None:
    _, seed, ctx.probability = inputs
    ctx.save_for_backward(seed)


def _backward_dropout(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None
    return _dropout(grad, *ctx.saved_tensors, ctx.probability), None, None


_dropout = Operator(
    "dropout",
    dropout_reference,
    lambda states, *_: torch.empty_like(states, memory_format=torch.contiguous_format),
    dropout_into,
    ComposedGradient(_save_dropout, _backward_dropout),
)


def dropout(states: Tensor, seed: Tensor, probability: float, kernel_backend: str = "auto") -> Tensor:
    """Dropout by a seed.

    Args:
        states: `[..., width]`.
        seed: int64 `[1]`; the same seed drops the same elements.
        probability: of an element to become 0, from 0 to below 1.
        kernel_backend: as in `uses_triton` of kernel_backend.py.

    Returns:
        The states, of which some elements are 0 and the others divided by `1 - probability`.
    """
    return _dropout(states, seed, probability, kernel_backend=kernel_backend)
