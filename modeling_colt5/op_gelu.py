"""T5's gated GELU: in PyTorch, and the operator with its kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernel_backend import accumulation_dtype, triton_is_available
from .run_operator import Gradient, Launch, Operator

gated_gelu_into: Launch = None
gated_gelu_backward_into: Launch = None
if triton_is_available():
    from .op_gelu_triton import gated_gelu_backward_into, gated_gelu_into


def gated_gelu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """`gelu_new(gate) * up`, T5's tanh form of the GELU, in fp32 and rounded once; `[..., d_ff]` all three."""
    dtype = accumulation_dtype(gate.dtype)
    return (F.gelu(gate.to(dtype), approximate="tanh") * up.to(dtype)).to(gate.dtype)


_gated_gelu = Operator(
    "gated_gelu",
    gated_gelu_reference,
    lambda gate, up: torch.empty_like(gate, memory_format=torch.contiguous_format),
    gated_gelu_into,
    Gradient(inputs=("gate", "up"), results=("activated",), through=("activated",), launch=gated_gelu_backward_into),
)


def gated_gelu(gate: Tensor, up: Tensor, kernel_backend: str = "auto") -> Tensor:
    """T5's gated GELU, `gelu_new(gate) * up` (the tanh form), in fp32 and rounded once; stores only its inputs.

    Args:
        gate, up: `[..., d_ff]`, of one shape and dtype; halves of one projection are read in place.
        kernel_backend: as in `uses_triton` of kernel_backend.py.

    Returns:
        `[..., d_ff]` in their dtype.
    """
    return _gated_gelu(gate, up, kernel_backend=kernel_backend)
