"""Triton kernels of T5's gated GELU and of its gradient."""

from torch import Tensor

from .op_dropout_triton import dropped_in_row
from .run_launch_triton import cdiv, launch, next_power_of_2, tl, triton


@triton.jit
def gelu_parts(gate):
    """The tanh form's ½·(1 + tanh u) and du/dgate."""
    inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    # The value ½·(1 + tanh u) is the sigmoid of 2u, which needs no tanh of the device's library.
    return tl.sigmoid(2.0 * inner), 0.7978845608028654 * (1.0 + 0.134145 * gate * gate)


@triton.jit
def gated_gelu_kernel(
    gate_ptr, up_ptr, seed_ptr, out_ptr, gate_stride, up_stride, width,
    DROPOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """gelu(gate) · up, dropped by a seed where there is one; one block of one row a program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    share, _ = gelu_parts(gate)
    activated = gate * share * up
    if seed_ptr is not None:
        activated = dropped_in_row(activated, seed_ptr, row, columns, DROPOUT)
    tl.store(out_ptr + row * width + columns, activated.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gated_gelu_backward_kernel(
    grad_ptr, gate_ptr, up_ptr, seed_ptr, grad_gate_ptr, grad_up_ptr, activated_ptr, gate_stride, up_stride,
    grad_stride, width,
    DROPOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """∂gate and ∂up from ∂out, everything else recomputed, what was dropped included; and `out` again where it is
    wanted, which may lie where ∂out lies."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    grad = tl.load(grad_ptr + row * width + columns, mask=mask, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        grad = dropped_in_row(grad, seed_ptr, row, columns, DROPOUT)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    share, slope = gelu_parts(gate)
    if activated_ptr is not None:
        activated = gate * share * up
        if seed_ptr is not None:
            activated = dropped_in_row(activated, seed_ptr, row, columns, DROPOUT)
        tl.store(activated_ptr + row * width + columns, activated.to(activated_ptr.dtype.element_ty), mask=mask)
    # The slope is d(½·(1 + tanh u))/du = ½·(1 − tanh² u) = 2·s·(1 − s).
    grad_gate = grad * up * (share + gate * 2.0 * share * (1.0 - share) * slope)
    grad_up = grad * gate * share
    tl.store(grad_gate_ptr + row * grad_stride + columns, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_up_ptr + row * grad_stride + columns, grad_up.to(grad_up_ptr.dtype.element_ty), mask=mask)


def rows_of(states: Tensor) -> tuple[Tensor, int]:
    """`[..., width]` as rows of adjacent features, and how far they lie apart; halves of a projection stay."""
    strides, shape = states.stride(), states.shape
    if len(shape) == 3 and strides[2] == 1 and (shape[0] == 1 or strides[0] == shape[1] * strides[1]):
        return states, strides[1]
    rows = states.reshape(-1, shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    return rows, rows.stride(0)


def gated_gelu_into(gate: Tensor, up: Tensor, out: Tensor, seed: Tensor | None = None, dropout: float = 0.0) -> None:
    """Write `gated_gelu_reference` of op_gelu.py to `out`, which is contiguous. With a seed it drops as `dropout` of
    op_dropout.py does."""
    (gate_rows, gate_stride), (up_rows, up_stride) = rows_of(gate), rows_of(up)
    width = gate.shape[-1]
    rows = gate.numel() // width
    block = min(1024, next_power_of_2(width))
    launch(
        gated_gelu_kernel, (rows, cdiv(width, block)),
        gate_rows, up_rows, seed, out, gate_stride, up_stride, width, dropout, block, num_warps=4,
    )  # fmt: skip


def gated_gelu_backward_into(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    grad_gate: Tensor,
    grad_up: Tensor,
    seed: Tensor | None = None,
    dropout: float = 0.0,
    activated: Tensor | None = None,
) -> None:
    """Write the gradients of gate and up to `grad_gate` and `grad_up`, whose rows lie equally far apart: both
    contiguous, or the halves of one tensor. The seed is that of the forward pass, whose result is written to
    `activated` once more where that is given: contiguous, and `grad` itself if nobody needs that any longer."""
    (gate_rows, gate_stride), (up_rows, up_stride) = rows_of(gate), rows_of(up)
    _, grad_stride = rows_of(grad_gate)
    width = gate.shape[-1]
    rows = gate.numel() // width
    block = min(1024, next_power_of_2(width))
    launch(
        gated_gelu_backward_kernel, (rows, cdiv(width, block)),
        grad.contiguous(), gate_rows, up_rows, seed, grad_gate, grad_up, activated,
        gate_stride, up_stride, grad_stride, width, dropout, block, num_warps=4,
    )  # fmt: skip
