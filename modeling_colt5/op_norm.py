"""T5's norm with router scores, of states or of branches whose sum it takes on the way; and router scores alone."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .kernel_backend import HALF_DTYPES, accumulation_dtype, normed_dtype, triton_is_available
from .op_rows import combine_reference, scatter_gradients
from .run_operator import Kernel, Operator

combine_norm_kernel: Kernel = None
norm_backward_kernel: Kernel = None
if triton_is_available():
    from .op_norm_triton import combine_norm as combine_norm_kernel
    from .op_norm_triton import norm_backward as norm_backward_kernel


def norm(hidden_states: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """T5LayerNorm's product and roundings, given the reciprocal root mean squares `[batch, n]`."""
    normed = hidden_states.to(rstd.dtype) * rstd[..., None]
    if weight.dtype in HALF_DTYPES:
        normed = normed.to(weight.dtype)
    return (weight * normed).to(normed_dtype(hidden_states.dtype, weight.dtype, None))


def mean_square(hidden_states: Tensor) -> Tensor:
    """The norm's statistic `[batch, n]` of `[batch, n, d]`, in fp32 even for float64.

    T5 has it so, and a CoLT5 at its limit is then T5's function to the last digits in float64 as well.
    """
    return hidden_states.float().pow(2).mean(-1)


def combine_norm_reference(
    residual: Tensor,
    light: Tensor | None,
    heavy: Tensor | None,
    indices: Tensor | None,
    valid: Tensor | None,
    weights: Tensor | None,
    norm_weight: Tensor,
    router_weights: Tensor | None,
    eps: float,
    wanted_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The combined states, their norm and their router scores.

    Args:
        residual: `[batch, n, d]`.
        light, heavy, indices, valid, weights: as in `combine_reference`; all None where `residual` is to be
            normalised as it is.
        norm_weight: `[d]`.
        router_weights: `[routers, d]` or None.
        eps: added to the mean square.
        wanted_dtype: of the normalised states, where it is not `normed_dtype`'s; scores are of the states before.

    Returns:
        The combined states `[batch, n, d]` (empty without `light`), the normalised states `[batch, n, d]`, the
        reciprocal root mean squares `[batch, n]` and the scores `[batch, routers, n]`, the last two in fp32.
    """
    dtype = accumulation_dtype(residual.dtype)
    hidden, combined = residual, residual.new_empty(0)
    if light is not None and heavy is not None and indices is not None and valid is not None:
        hidden = combined = combine_reference(
            residual, light, heavy, indices, valid, weights, None, None, None, None, residual.shape[1]
        )
    rstd = torch.rsqrt(mean_square(hidden) + eps).to(dtype)
    normed = norm(hidden, rstd, norm_weight)
    returned = normed if wanted_dtype is None else normed.to(wanted_dtype)
    if router_weights is None:
        return combined, returned, rstd, rstd.new_empty(0)
    # The rounding of a matrix product differs with a row's place, but equal tokens must get equal scores.
    wide = normed.to(dtype)
    scores = [(wide * vector).sum(-1) for vector in router_weights.to(dtype).unbind(0)]
    return combined, returned, rstd, torch.stack(scores, 1)


def norm_backward_reference(
    grad_hidden: Tensor | None,
    grad_normed: Tensor | None,
    grad_scores: Tensor | None,
    hidden_states: Tensor,
    rstd: Tensor,
    norm_weight: Tensor,
    router_weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of norm and scores; the normalised states' roundings count as the identity.

    With x̂ = x · rstd and g = weight ⊙ (∂normed + Σ ∂score · router):
    ∂x = rstd · (g − x̂ · mean(g ⊙ x̂)) + ∂hidden, ∂weight = Σ (g / weight) ⊙ x̂, ∂router = Σ ∂score · normed.

    Args:
        grad_hidden: `[batch, n, d]`, what else flows into the hidden states, or None.
        grad_normed: `[batch, n, d]` or None.
        grad_scores: fp32 `[batch, routers, n]` or None.
        hidden_states: what was normalised, `[batch, n, d]`.
        rstd, norm_weight, router_weights: as in `combine_norm_reference`.

    Returns:
        The gradients of the hidden states, the norm's weight and the router weights (empty without routers), each in
        the dtype of what it is the gradient of.
    """
    dtype = accumulation_dtype(hidden_states.dtype)
    unit = hidden_states.to(dtype) * rstd[..., None]
    total = torch.zeros_like(unit) if grad_normed is None else grad_normed.to(dtype)
    grad_router = norm_weight.new_zeros(0) if router_weights is None else torch.zeros_like(router_weights)
    if grad_scores is not None and router_weights is not None:
        total = total + torch.einsum("brn,rd->bnd", grad_scores, router_weights.to(dtype))
        normed = norm(hidden_states, rstd, norm_weight).to(dtype)
        grad_router = torch.einsum("brn,bnd->rd", grad_scores, normed).to(router_weights.dtype)
    grad_unit = total * norm_weight.to(dtype)
    grad_rows = rstd[..., None] * (grad_unit - unit * (grad_unit * unit).mean(-1, keepdim=True))
    if grad_hidden is not None:
        grad_rows = grad_rows + grad_hidden.to(dtype)
    return grad_rows.to(hidden_states.dtype), (total * unit).sum((0, 1)).to(norm_weight.dtype), grad_router


def router_scores_reference(hidden_states: Tensor, router_weights: Tensor) -> Tensor:
    """The states' products with router vectors, in fp32: `[batch, n, d]`, `[routers, d]` → `[batch, routers, n]`."""
    dtype = accumulation_dtype(hidden_states.dtype)
    return torch.einsum("bnd,rd->brn", hidden_states.to(dtype), router_weights.to(dtype)).contiguous()


def router_scores_backward_reference(
    grad: Tensor, hidden_states: Tensor, router_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of `router_scores_reference` to its states, in their dtype, and to its vectors, in fp32.

    Args:
        grad: `[batch, routers, n]` in fp32.
        hidden_states, router_weights: as in `router_scores_reference`.
    """
    dtype = accumulation_dtype(hidden_states.dtype)
    grad_states = torch.einsum("brn,rd->bnd", grad, router_weights.to(dtype)).to(hidden_states.dtype)
    return grad_states, torch.einsum("brn,bnd->rd", grad, hidden_states.to(dtype))


def _fake_norm_backward(
    grad_hidden: Tensor | None,
    grad_normed: Tensor | None,
    grad_scores: Tensor | None,
    hidden_states: Tensor,
    rstd: Tensor,
    norm_weight: Tensor,
    router_weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_router = norm_weight.new_empty(0)
    if router_weights is not None:
        grad_router = router_weights.new_empty(router_weights.shape)
    return hidden_states.new_empty(hidden_states.shape), norm_weight.new_empty(norm_weight.shape), grad_router


_norm_backward = Operator(
    "token_norm_backward(Tensor? grad_hidden, Tensor? grad_normed, Tensor? grad_scores, Tensor hidden_states, "
    "Tensor rstd, Tensor norm_weight, Tensor? router_weights) -> (Tensor, Tensor, Tensor)",
    norm_backward_reference,
    _fake_norm_backward,
    norm_backward_kernel,
    operand=3,
)


def _fake_combine_norm(
    residual: Tensor,
    light: Tensor | None,
    heavy: Tensor | None,
    indices: Tensor | None,
    valid: Tensor | None,
    weights: Tensor | None,
    norm_weight: Tensor,
    router_weights: Tensor | None,
    eps: float,
    wanted_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, n, _ = residual.shape
    hidden = residual.new_empty(0) if light is None else residual.new_empty(residual.shape)
    normed = residual.new_empty(residual.shape, dtype=normed_dtype(residual.dtype, norm_weight.dtype, wanted_dtype))
    wide = torch.promote_types(residual.dtype, torch.float32)
    scores = (0,) if router_weights is None else (batch, router_weights.shape[0], n)
    return hidden, normed, residual.new_empty(batch, n, dtype=wide), residual.new_empty(scores, dtype=wide)


def _save_combine_norm(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    residual, light, heavy, indices, valid, weights, norm_weight, router_weights, *_ = inputs
    hidden, _, rstd, _ = outputs
    ctx.mark_non_differentiable(rstd)
    ctx.light_dtype = None if light is None else light.dtype
    states = residual if light is None else hidden
    ctx.save_for_backward(states, rstd, norm_weight, router_weights, heavy, indices, valid, weights)


def _backward_combine_norm(
    ctx: Any, grad_hidden: Tensor | None, grad_normed: Tensor | None, _: None, grad_scores: Tensor | None
) -> tuple[Tensor | None, ...]:
    states, rstd, norm_weight, router_weights, heavy, indices, valid, weights = ctx.saved_tensors
    if ctx.light_dtype is None:
        grad_hidden = None
    grad, grad_norm_weight, grad_router = _norm_backward(
        grad_hidden, grad_normed, grad_scores, states, rstd, norm_weight, router_weights
    )
    last = grad_norm_weight, None if router_weights is None else grad_router, None, None
    if ctx.light_dtype is None:
        return grad, None, None, None, None, None, *last
    return grad, grad.to(ctx.light_dtype), *scatter_gradients(ctx, grad, 2, heavy, indices, valid, weights), *last


_combine_norm = Operator(
    "token_combine_norm(Tensor residual, Tensor? light, Tensor? heavy, Tensor? indices, Tensor? valid, "
    "Tensor? weights, Tensor norm_weight, Tensor? router_weights, float eps, ScalarType? wanted_dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    combine_norm_reference,
    _fake_combine_norm,
    combine_norm_kernel,
    _save_combine_norm,
    _backward_combine_norm,
)


# So many tokens, of all rows together, are scored at once. In fp32 they take 48 MiB at d = 768, which stays in the L2
# of an H100.
_SCORED_AT_ONCE = 16_384


def _parts(hidden_states: Tensor) -> Iterator[slice]:
    """Parts of the positions of `[batch, n, d]`."""
    batch, n, _ = hidden_states.shape
    step = max(1, _SCORED_AT_ONCE // batch)
    return (slice(first, first + step) for first in range(0, n, step))


def _router_scores_in_parts(hidden_states: Tensor, router_weights: Tensor) -> Tensor:
    scores = _fake_router_scores(hidden_states, router_weights)
    for part in _parts(hidden_states):
        scores[:, :, part] = router_scores_reference(hidden_states[:, part], router_weights)
    return scores


def _fake_router_scores(hidden_states: Tensor, router_weights: Tensor) -> Tensor:
    batch, n, _ = hidden_states.shape
    dtype = accumulation_dtype(hidden_states.dtype)
    return hidden_states.new_empty(batch, router_weights.shape[0], n, dtype=dtype)


def _router_scores_backward_in_parts(
    grad: Tensor, hidden_states: Tensor, router_weights: Tensor
) -> tuple[Tensor, Tensor]:
    grad_states = torch.empty_like(hidden_states)
    grad_router = torch.zeros_like(router_weights, dtype=grad.dtype)
    for part in _parts(hidden_states):
        grad_states[:, part], partial = router_scores_backward_reference(
            grad[:, :, part], hidden_states[:, part], router_weights
        )
        grad_router += partial
    return grad_states, grad_router.to(router_weights.dtype)


def _fake_router_scores_backward(grad: Tensor, hidden_states: Tensor, router_weights: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden_states), torch.empty_like(router_weights)


_router_scores_backward = Operator(
    "router_scores_backward(Tensor grad, Tensor hidden_states, Tensor router_weights) -> (Tensor, Tensor)",
    router_scores_backward_reference,
    _fake_router_scores_backward,
    _router_scores_backward_in_parts,
)


def _save_router_scores(ctx: Any, inputs: tuple[Tensor, ...], _: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_router_scores(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _router_scores_backward(grad, *ctx.saved_tensors)


_router_scores = Operator(
    "router_scores(Tensor hidden_states, Tensor router_weights) -> Tensor",
    router_scores_reference,
    _fake_router_scores,
    _router_scores_in_parts,
    _save_router_scores,
    _backward_router_scores,
)


def rms_norm_scores(
    hidden_states: Tensor,
    weight: Tensor,
    router_weights: Tensor | None,
    eps: float,
    kernel_backend: str = "auto",
    wanted_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """T5's RMSNorm (no mean, no bias, fp32 statistics) and the normalised states' products with router vectors.

    Args:
        hidden_states: `[batch, n, d]`, any float dtype.
        weight: the norm's weight `[d]`. A half-precision weight rounds the normalised states to its dtype before
            the product, as T5LayerNorm does.
        router_weights: one learned vector a router `[routers, d]`, or None for a norm alone.
        eps: added to the mean square.
        kernel_backend: as in `uses_triton` of kernel_backend.py, here and in the functions below.
        wanted_dtype: of the normalised states: None for the weight's where that is half precision and else the hidden
            states'. The scores are those of the states before the rounding to another.

    Returns:
        The normalised states `[batch, n, d]` and the scores `[batch, routers, n]` in fp32 (float64 for float64),
        contiguous, or None.
    """
    nothing = (None, None, None, None, None)
    _, normed, _, scores = _combine_norm.call(
        kernel_backend, hidden_states, *nothing, weight, router_weights, eps, wanted_dtype
    )
    return normed, None if router_weights is None else scores


def router_scores(hidden_states: Tensor, router_weights: Tensor, kernel_backend: str = "auto") -> Tensor:
    """The products of states with router vectors, for states that are normalised already; no copy of the states.

    Args:
        hidden_states: `[batch, n, d]`, any float dtype.
        router_weights: one learned vector a router `[routers, d]`.

    Returns:
        `[batch, routers, n]` in fp32 (float64 for float64), contiguous.
    """
    return _router_scores.call(kernel_backend, hidden_states, router_weights)


def combine_norm_scores(
    residual: Tensor,
    light: Tensor,
    heavy: Tensor,
    indices: Tensor,
    valid: Tensor,
    weights: Tensor,
    norm_weight: Tensor,
    router_weights: Tensor | None,
    eps: float,
    kernel_backend: str = "auto",
    wanted_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`combine_branches` and, in the same pass, `rms_norm_scores` of its result: the step between two sublayers.

    Returns:
        The combined states `[batch, n, d]`, the normalised states `[batch, n, d]` and the scores
        `[batch, routers, n]` or None, as the two functions return them.
    """
    branches = (light, heavy, indices, valid, weights)
    hidden_states, normed, _, scores = _combine_norm.call(
        kernel_backend, residual, *branches, norm_weight, router_weights, eps, wanted_dtype
    )
    return hidden_states, normed, None if router_weights is None else scores
