"""T5's gated GELU: in PyTorch, its gradient, and the operator with its kernels."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernel_backend import accumulation_dtype, triton_is_available
from .run_operator import Kernel, Operator

gelu_kernel: Kernel = None
gelu_backward_kernel: Kernel = None
if triton_is_available():
    from .op_gelu_triton import gated_gelu as gelu_kernel
    from .op_gelu_triton import gated_gelu_backward as gelu_backward_kernel


def gated_gelu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """`gelu_new(gate) * up`, T5's tanh form of the GELU, in fp32 and rounded once; `[..., d_ff]` all three."""
    dtype = accumulation_dtype(gate.dtype)
    return (F.gelu(gate.to(dtype), approximate="tanh") * up.to(dtype)).to(gate.dtype)


def gated_gelu_backward_reference(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `gated_gelu_reference` to gate and up, all else recomputed from the two."""
    dtype = accumulation_dtype(gate.dtype)
    grad, wide = grad.to(dtype), gate.to(dtype)
    grad_gate = torch.ops.aten.gelu_backward(grad * up.to(dtype), wide, approximate="tanh")
    grad_up = grad * F.gelu(wide, approximate="tanh")
    return grad_gate.to(gate.dtype), grad_up.to(up.dtype)


def _fake_gated_gelu(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _fake_gated_gelu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


_gated_gelu_backward = Operator(
    "gated_gelu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    gated_gelu_backward_reference,
    _fake_gated_gelu_backward,
    gelu_backward_kernel,
)


def _save_gated_gelu(ctx: Any, inputs: tuple[Tensor, ...], _: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_gated_gelu(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _gated_gelu_backward(grad, *ctx.saved_tensors)


_gated_gelu = Operator(
    "gated_gelu(Tensor gate, Tensor up) -> Tensor",
    gated_gelu_reference,
    _fake_gated_gelu,
    gelu_kernel,
    _save_gated_gelu,
    _backward_gated_gelu,
)


def gated_gelu(gate: Tensor, up: Tensor, kernel_backend: str = "auto") -> Tensor:
    """T5's gated GELU, `gelu_new(gate) * up` (the tanh form), in fp32 and rounded once; stores only its inputs.

    Args:
        gate, up: `[..., d_ff]`, of one shape and dtype; halves of one projection are read in place.
        kernel_backend: as in `uses_triton` of kernel_backend.py.

    Returns:
        `[..., d_ff]` in their dtype.
    """
    return _gated_gelu.call(kernel_backend, gate, up)
