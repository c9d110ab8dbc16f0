"""Products of one new token in each row with a layer's weights, the norm before and the activation behind included."""

from torch import Tensor

from .kernel_backend import accumulation_dtype, triton_is_available
from .op_gelu import gated_gelu_reference
from .op_norm import norm_reference
from .run_operator import Launch

step_products_into: Launch = None
if triton_is_available():
    from .op_step_products_triton import step_products_into as step_products_into


def step_products_reference(
    states: Tensor,
    branch: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    first: Tensor,
    second: Tensor | None,
    third: Tensor | None,
    total: Tensor | None,
    first_out: Tensor,
    second_out: Tensor | None,
    third_out: Tensor | None,
) -> None:
    """Write `norm(states + branch) @ weight.T` of each weight to its output; or, of two weights with one output, the
    gated activation `gelu(first product) * second product`.

    Args:
        states: [rows, d].
        branch: [rows, d], added to the states; None for nothing.
        norm_weight: [d], of T5's norm; None for no norm.
        eps: of the norm.
        first, second, third: weights, [width, d] each; None for fewer.
        total: [rows, d], for `states + branch`; None where nobody reads it.
        first_out, second_out, third_out: [rows, width] each; None where there is no weight, and for the second weight
            of an activation, whose output is the first.
    """
    states = states if branch is None else states + branch
    if total is not None:
        total.copy_(states)
    if norm_weight is not None:
        states = norm_reference(states[None], norm_weight, None, eps, None)[0][0]
    dtype = accumulation_dtype(states.dtype)
    products = [
        (states.to(dtype) @ weight.to(dtype).t()).to(states.dtype)
        for weight in (first, second, third)
        if weight is not None
    ]
    if second is not None and second_out is None:
        products = [gated_gelu_reference(*products)]
    for output, product in zip((first_out, second_out, third_out), products, strict=False):
        assert output is not None
        output.copy_(product)
