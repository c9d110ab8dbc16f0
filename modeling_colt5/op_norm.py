"""T5's norm with router scores, and router scores alone: in PyTorch, and the operators with their kernels."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .kernel_backend import HALF_DTYPES, accumulation_dtype, normed_dtype, triton_is_available
from .run_operator import Gradient, Launch, Operator

norm_into: Launch = None
norm_backward_into: Launch = None
if triton_is_available():
    from .op_norm_triton import norm_backward_into, norm_into


def mean_square(hidden_states: Tensor) -> Tensor:
    """The norm's statistic `[batch, n]` of `[batch, n, d]`, in fp32 even for float64.

    T5 has it so, and a CoLT5 at its limit is then T5's function to the last digits in float64 as well.
    """
    return hidden_states.float().pow(2).mean(-1)


def norm_reference(
    hidden_states: Tensor,
    norm_weight: Tensor,
    router_weights: Tensor | None,
    eps: float,
    wanted_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `rms_norm_scores` returns, whose docstring says what the arguments are.

    Returns:
        The normalised states `[batch, n, d]`, the scores `[batch, routers, n]` (empty without routers) and the
        reciprocal root mean squares `[batch, n]`, the last two in fp32 (float64 for float64).
    """
    dtype = accumulation_dtype(hidden_states.dtype)
    rstd = torch.rsqrt(mean_square(hidden_states) + eps).to(dtype)
    normed = hidden_states.to(dtype) * rstd[..., None]
    if norm_weight.dtype in HALF_DTYPES:
        normed = normed.to(norm_weight.dtype)
    normed = (norm_weight * normed).to(normed_dtype(hidden_states.dtype, norm_weight.dtype, None))
    returned = normed if wanted_dtype is None else normed.to(wanted_dtype)
    if router_weights is None:
        return returned, rstd.new_empty(0), rstd
    # The rounding of a matrix product differs with a row's place, but equal tokens must get equal scores.
    wide = normed.to(dtype)
    scores = [(wide * vector).sum(-1) for vector in router_weights.to(dtype).unbind(0)]
    return returned, torch.stack(scores, 1), rstd


def _norm_results(
    hidden_states: Tensor,
    norm_weight: Tensor,
    router_weights: Tensor | None,
    eps: float,
    wanted_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, n, _ = shape = hidden_states.shape
    dtype = normed_dtype(hidden_states.dtype, norm_weight.dtype, wanted_dtype)
    normed = torch.empty(shape, device=hidden_states.device, dtype=dtype)
    wide = accumulation_dtype(hidden_states.dtype)
    scores = (0,) if router_weights is None else (batch, router_weights.shape[0], n)
    return normed, normed.new_empty(scores, dtype=wide), normed.new_empty((batch, n), dtype=wide)


_norm = Operator(
    "token_norm",
    norm_reference,
    _norm_results,
    norm_into,
    Gradient(
        inputs=("hidden_states", "norm_weight", "router_weights"),
        results=("normed", "scores", "rstd"),
        through=("normed", "scores"),
        kept=("rstd",),
        launch=norm_backward_into,
    ),
)


def router_scores_reference(hidden_states: Tensor, router_weights: Tensor) -> Tensor:
    """The states' products with router vectors, in fp32: `[batch, n, d]`, `[routers, d]` → `[batch, routers, n]`."""
    dtype = accumulation_dtype(hidden_states.dtype)
    return torch.einsum("bnd,rd->brn", hidden_states.to(dtype), router_weights.to(dtype)).contiguous()


# How many tokens, of all rows together, are scored in one step. In fp32 they take 48 MiB at d = 768, which stays in
# the L2 cache of an H100.
_SCORED_AT_ONCE = 16_384


def _parts(hidden_states: Tensor) -> Iterator[slice]:
    """Parts of the positions of `[batch, n, d]`."""
    batch, n, _ = hidden_states.shape
    step = max(1, _SCORED_AT_ONCE // batch)
    return (slice(first, first + step) for first in range(0, n, step))


def _router_scores_in_parts(hidden_states: Tensor, router_weights: Tensor, scores: Tensor) -> None:
    for part in _parts(hidden_states):
        scores[:, :, part] = router_scores_reference(hidden_states[:, part], router_weights)


def _router_scores_backward_in_parts(
    grad: Tensor, hidden_states: Tensor, router_weights: Tensor, grad_states: Tensor, grad_router: Tensor
) -> None:
    total, vectors = torch.zeros_like(router_weights, dtype=grad.dtype), router_weights.to(grad.dtype)
    for part in _parts(hidden_states):
        grad_states[:, part] = torch.einsum("brn,rd->bnd", grad[:, :, part], vectors)
        total += torch.einsum("brn,bnd->rd", grad[:, :, part], hidden_states[:, part].to(grad.dtype))
    grad_router.copy_(total)


def _router_scores_result(hidden_states: Tensor, router_weights: Tensor) -> Tensor:
    batch, n, _ = hidden_states.shape
    dtype = accumulation_dtype(hidden_states.dtype)
    return hidden_states.new_empty(batch, router_weights.shape[0], n, dtype=dtype)


_router_scores = Operator(
    "router_scores",
    router_scores_reference,
    _router_scores_result,
    _router_scores_in_parts,
    Gradient(
        inputs=("hidden_states", "router_weights"),
        results=("scores",),
        through=("scores",),
        launch=_router_scores_backward_in_parts,
    ),
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
        kernel_backend: as in `uses_triton` of kernel_backend.py.
        wanted_dtype: of the normalised states: None for the weight's where that is half precision and else the hidden
            states'. The scores are those of the states before the rounding to another.

    Returns:
        The normalised states `[batch, n, d]` and the scores `[batch, routers, n]` in fp32 (float64 for float64),
        contiguous, or None.
    """
    normed, scores, _ = _norm(hidden_states, weight, router_weights, eps, wanted_dtype, kernel_backend=kernel_backend)
    return normed, None if router_weights is None else scores


def router_scores(hidden_states: Tensor, router_weights: Tensor, kernel_backend: str = "auto") -> Tensor:
    """The products of states with router vectors, for states that are normalised already; no copy of the states.

    Args:
        hidden_states: `[batch, n, d]`, any float dtype.
        router_weights: one learned vector a router `[routers, d]`.

    Returns:
        `[batch, routers, n]` in fp32 (float64 for float64), contiguous.
    """
    return _router_scores(hidden_states, router_weights, kernel_backend=kernel_backend)
