"""Numbers that are computed twice: how far they may be apart, and why they are not asked to be equal.

The last bits of a matrix product depend on where its operands lie in memory (weights that were read from a file begin
at other addresses than weights that were made here), on the number of threads, and on the processor's instructions.
That holds for the same code on the same numbers, in one process. So a test asks for equal bits only of what is not
computed (indices, masks, copies, saved weights), of single additions and multiplications, and where the project
promises them for one device; everything else is compared here.

Which tokens are routed or generated follows from such numbers. It is compared exactly where the scores are drawn from
a fixed seed and lie apart by far more than rounding, and equal tokens have equal scores by design; where that is not
sure, the test computes in float64, in which no two scores lie within rounding of each other.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

# Relative to the largest number of the tensor. A sum of n terms is off by some sqrt(n) halves of a last bit, and the
# tiny models of the tests put some twenty sums of up to a hundred terms after one another: about 100 last bits of fp32
# and more than enough of float64. In half precision each of those steps rounds its result as well: ten last bits.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}


def assert_same_but_for_rounding(actual: torch.Tensor, expected: torch.Tensor, name: str = "tensor") -> None:
    """Two tensors of one shape and dtype hold the same: numbers within rounding, everything else exactly.

    Args:
        actual, expected: of any dtype; whole numbers and truth values must be equal.
        name: begins the message of a failure.
    """
    if not expected.is_floating_point():
        assert torch.equal(actual, expected), name
        return
    # what stands for "never" is no size to measure by
    ordinary = expected.detach().abs()
    ordinary = ordinary[ordinary < 1e-2 * torch.finfo(expected.dtype).max]
    atol = ROUNDING[expected.dtype] * ordinary.max().item() if ordinary.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol, msg=lambda text: f"{name}: {text}")


def assert_all_same_but_for_rounding(actual: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> None:
    """The same of two sequences of as many tensors, each by its own size."""
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert_same_but_for_rounding(one, other, f"tensor {index}")


def assert_trained_alike(
    weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], learning_rate: float
) -> None:
    """Two runs of AdamW with the same data and state: their weights differ by less than a hundredth of an update.

    The optimiser divides a gradient by its size, so one that is nothing but rounding makes a whole update: a few
    numbers may differ, and the root of the mean square is compared. Other data or another state move all of them by
    about the rate.

    Args:
        weights, expected: tensors by name.
        learning_rate: the largest rate of the runs.
    """
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        distance = (weight - expected[name]).detach().square().mean().sqrt().item()
        assert distance < 0.01 * learning_rate, f"{name} differs by {distance:.1e}"


def assert_same_gradients(
    actual: dict[str, Any], expected: dict[str, Any], rounded_to: torch.dtype | None = None
) -> None:
    """The same but for rounding, by the size of the tensor; one in which all cancels is nothing but rounding of the
    larger ones that it was summed of."""
    assert actual.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values() if gradient is not None)
    for name, gradient in expected.items():
        assert (gradient is None) == (actual[name] is None), name
        if gradient is not None:
            atol = ROUNDING[rounded_to or gradient.dtype] * max(gradient.abs().max().item(), 0.1 * largest)
            torch.testing.assert_close(
                actual[name], gradient, rtol=0, atol=atol, msg=lambda text, at=name: f"{at}: {text}"
            )
