"""Products of one new token in each row: the kernel against norm, products and activation in float64."""

import pytest
import torch
from rounding import assert_same_but_for_rounding
from torch import nn

pytest.importorskip("triton")

from step_references import step_products_reference  # noqa: E402

from modeling_colt5.op_step_products_triton import BLOCK_ROWS, step_products_into  # noqa: E402

EPS = 1e-6
# rows, d, widths of the weights, whether two of them make an activation, sum and norm
CASES = {
    "one weight": (1, 64, (32,), False, False, False),
    "three weights": (2, 64, (48, 16, 20), False, True, True),
    "two weights": (3, 130, (17, 40), False, False, True),
    "activation": (2, 64, (40, 40), True, True, True),
    "more rows than a program has": (BLOCK_ROWS + 3, 32, (24, 8, 8), False, True, True),
    "sum without norm": (2, 20, (16,), False, True, False),
}


def computed(case: str, dtype: torch.dtype, device: torch.device) -> None:
    """Compare the kernel, and the reference, with what PyTorch's own modules give in float64."""
    rows, d, widths, is_gated, adds, norms = CASES[case]
    torch.manual_seed(0)
    states, branch = torch.randn(2, rows, d, device=device).to(dtype).unbind(0)
    gain = (1 + torch.randn(d, device=device) / 4).to(dtype) if norms else None
    weights = [(torch.randn(width, d, device=device) * d**-0.5).to(dtype) for width in widths]
    weights += [None] * (3 - len(weights))

    wide = (states + branch if adds else states).double()
    if gain is not None:
        normed = nn.functional.rms_norm(wide, (d,), eps=EPS).to(dtype).double()
        wide = (normed * gain.double()).to(dtype).double()
    expected = [(wide @ weight.double().t()) for weight in weights if weight is not None]
    if is_gated:
        gate, up = (product.to(dtype).double() for product in expected)
        expected = [nn.functional.gelu(gate, approximate="tanh") * up]

    for step_products in (step_products_into, step_products_reference):
        outputs = [torch.empty(rows, part.shape[1], dtype=dtype, device=device) for part in expected]
        total = torch.empty_like(states) if adds else None
        given = (states, branch if adds else None, gain, EPS, *weights, total, *outputs, *[None] * (3 - len(outputs)))
        step_products(*given)
        for output, other in zip(outputs, expected, strict=True):
            assert_same_but_for_rounding(output, other.to(dtype))
        if total is not None:
            torch.testing.assert_close(total, states + branch, rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_products(case: str, device: torch.device) -> None:
    computed(case, torch.float32, device)


@pytest.mark.parametrize("case", ["three weights", "activation"])
def test_half_precision(case: str, device: torch.device) -> None:
    computed(case, torch.bfloat16, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_compiled(case: str, dtype: torch.dtype) -> None:
    computed(case, dtype, torch.device("cuda"))
