"""The memory-bound operations around an encoder layer's two branches, in PyTorch.

They are what runs on CPUs and in float64, and what the kernels of `op_norm_triton.py` and `op_rows_triton.py`,
of the same names and signatures, are tested against. The forward ones are plain differentiable PyTorch; the backward
ones write their gradients out. `indices`, `valid` and `weights` are a routing's, each `[batch, k]`, as in
docs/architecture.md: positions ascending over the used slots, which come first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

HALF_DTYPES = (torch.float16, torch.bfloat16)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype statistics and sums are kept in: fp32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def normed_dtype(hidden_dtype: torch.dtype, weight_dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype of the normalised states: what is wanted, or a half-precision weight's, as in T5, or else the hidden
    states'."""
    return wanted or (weight_dtype if weight_dtype in HALF_DTYPES else hidden_dtype)


def flat_rows(indices: Tensor, length: int) -> Tensor:
    """Positions `[batch, k]` as rows `[batch · k]` of a `[batch · length, d]` tensor."""
    first_row = torch.arange(indices.shape[0], device=indices.device) * length
    return (indices + first_row[:, None]).flatten()


def slot_weights(valid: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What each slot's row is multiplied by `[batch, k, 1]`: its weight, 1 without weights, 0 where unused."""
    if weights is None:
        return valid.to(dtype)[..., None]
    return weights.to(dtype).masked_fill(~valid, 0)[..., None]


def gather_rows(hidden_states: Tensor, indices: Tensor, valid: Tensor) -> Tensor:
    """The routed positions' rows `[batch, k, d]`, zeros where unused."""
    rows = hidden_states.flatten(0, 1).index_select(0, flat_rows(indices, hidden_states.shape[1]))
    # an unused slot points at a row that may hold anything, NaN included: times 0 would not do
    return rows.view(*indices.shape, hidden_states.shape[-1]).masked_fill(~valid[..., None], 0)


def weighted_gather(hidden_states: Tensor, indices: Tensor, valid: Tensor, weights: Tensor | None) -> Tensor:
    """The routed positions' rows times their weights, in the hidden states' dtype."""
    dtype = accumulation_dtype(hidden_states.dtype)
    rows = gather_rows(hidden_states, indices, valid)
    return (rows.to(dtype) * slot_weights(valid, weights, dtype)).to(hidden_states.dtype)


def weighted_scatter_add(
    base: Tensor, updates: Tensor, indices: Tensor, valid: Tensor, weights: Tensor | None
) -> Tensor:
    """`base` `[batch, n, d]` with `weights * updates` added at the routed positions, in the base's dtype."""
    updates = updates.to(base.dtype).masked_fill(~valid[..., None], 0) * slot_weights(valid, weights, base.dtype)
    # on the CPU PyTorch's out-of-place index_add takes many times as long as a copy and the in-place one
    rows = base.flatten(0, 1).clone(memory_format=torch.contiguous_format)
    rows.index_add_(0, flat_rows(indices, base.shape[1]), updates.flatten(0, 1))
    # not a view of the whole shape, of which an exporter with free sizes makes other strides
    return rows.unflatten(0, base.shape[:2])


def combine(
    base: Tensor | None,
    light: Tensor | None,
    updates: Tensor,
    indices: Tensor,
    valid: Tensor,
    weights: Tensor | None,
    updates2: Tensor | None,
    indices2: Tensor | None,
    valid2: Tensor | None,
    weights2: Tensor | None,
    length: int,
) -> Tensor:
    """`base + light`, and the weighted updates of one or two routings at their positions; summed in fp32.

    Args:
        base: `[batch, length, d]`; None for zeros.
        light: `[batch, length, d]` or None.
        updates, indices, valid, weights: `[batch, k, d]` and its routing; weights of None are 1.
        updates2, indices2, valid2, weights2: a second routing's, or None.
        length: the number of positions.

    Returns:
        `[batch, length, d]`, rounded once, to the base's dtype or else the updates'.
    """
    out_dtype = updates.dtype if base is None else base.dtype
    dtype = accumulation_dtype(out_dtype)
    if base is None:
        total = updates.new_zeros(updates.shape[0], length, updates.shape[-1], dtype=dtype)
    else:
        total = base.to(dtype)
    if light is not None:
        total = total + light.to(dtype)
    total = weighted_scatter_add(total, updates, indices, valid, weights)
    if updates2 is not None and indices2 is not None and valid2 is not None:
        total = weighted_scatter_add(total, updates2, indices2, valid2, weights2)
    return total.to(out_dtype)


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


def combine_norm(
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
        light, heavy, indices, valid, weights: as in `combine`; all None where `residual` is to be normalised as it is.
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
        hidden = combined = combine(
            residual, light, heavy, indices, valid, weights, None, None, None, None, residual.shape[1]
        )
    rstd = torch.rsqrt(mean_square(hidden) + eps).to(dtype)
    normed = norm(hidden, rstd, norm_weight)
    returned = normed if wanted_dtype is None else normed.to(wanted_dtype)
    if router_weights is None:
        return combined, returned, rstd, rstd.new_empty(0)
    # not as a matrix product, whose rounding differs with a row's place: equal tokens must get equal scores
    wide = normed.to(dtype)
    scores = [(wide * vector).sum(-1) for vector in router_weights.to(dtype).unbind(0)]
    return combined, returned, rstd, torch.stack(scores, 1)


def router_scores(hidden_states: Tensor, router_weights: Tensor) -> Tensor:
    """The states' products with router vectors, in fp32: `[batch, n, d]`, `[routers, d]` → `[batch, routers, n]`."""
    dtype = accumulation_dtype(hidden_states.dtype)
    return torch.einsum("bnd,rd->brn", hidden_states.to(dtype), router_weights.to(dtype)).contiguous()


def router_scores_backward(grad: Tensor, hidden_states: Tensor, router_weights: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `router_scores` to its states, in their dtype, and to its vectors, in fp32.

    Args:
        grad: `[batch, routers, n]` in fp32.
        hidden_states, router_weights: as in `router_scores`.
    """
    dtype = accumulation_dtype(hidden_states.dtype)
    grad_states = torch.einsum("brn,rd->bnd", grad, router_weights.to(dtype)).to(hidden_states.dtype)
    return grad_states, torch.einsum("brn,bnd->rd", grad, hidden_states.to(dtype))


def norm_backward(
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
        rstd, norm_weight, router_weights: as in `combine_norm`.

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


def gather(
    hidden_states: Tensor,
    indices: Tensor,
    valid: Tensor,
    weights: Tensor | None,
    indices2: Tensor | None,
    valid2: Tensor | None,
    weights2: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The rows of one or two routings, times their weights; zeros where unused.

    Args:
        hidden_states: `[batch, n, d]`.
        indices, valid, weights: the first routing; weights of None are 1.
        indices2, valid2, weights2: the second routing, or None.

    Returns:
        `[batch, k, d]` in the hidden states' dtype, and the same of the second routing (empty without one).
    """
    rows = weighted_gather(hidden_states, indices, valid, weights)
    if indices2 is None or valid2 is None:
        return rows, hidden_states.new_empty(0)
    return rows, weighted_gather(hidden_states, indices2, valid2, weights2)


def gather_dot(
    hidden_states: Tensor, other: Tensor, indices: Tensor, valid: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The routed rows times their weights, and the rows' products with other rows: the backward of a scatter.

    Args:
        hidden_states: `[batch, n, d]`.
        other: `[batch, k, d]`.
        indices, valid, weights: the routing; weights of None are 1.

    Returns:
        `weights * rows` `[batch, k, d]` in the dtype of `other`, and `⟨rows, other⟩` `[batch, k]` in fp32; zeros
        where unused.
    """
    dtype = accumulation_dtype(hidden_states.dtype)
    rows = gather_rows(hidden_states, indices, valid).to(dtype)
    dots = (rows * other.to(dtype).masked_fill(~valid[..., None], 0)).sum(-1)
    return (rows * slot_weights(valid, weights, dtype)).to(other.dtype), dots


def gated_gelu(gate: Tensor, up: Tensor) -> Tensor:
    """`gelu_new(gate) * up`, T5's tanh form of the GELU, in fp32 and rounded once; `[..., d_ff]` all three."""
    dtype = accumulation_dtype(gate.dtype)
    return (F.gelu(gate.to(dtype), approximate="tanh") * up.to(dtype)).to(gate.dtype)


def gated_gelu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `gated_gelu` to gate and up, all else recomputed from the two."""
    dtype = accumulation_dtype(gate.dtype)
    grad, wide = grad.to(dtype), gate.to(dtype)
    grad_gate = torch.ops.aten.gelu_backward(grad * up.to(dtype), wide, approximate="tanh")
    grad_up = grad * F.gelu(wide, approximate="tanh")
    return grad_gate.to(gate.dtype), grad_up.to(up.dtype)
