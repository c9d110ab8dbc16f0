"""Operators for the memory-bound work of an encoder layer: norm with router scores, gather, combine, gated GELU.

A block's two sublayers call them in this order, each call one launch on the GPU:

    rms_norm_scores → route → share_and_gather → light and heavy branch → combine_norm_scores →
                      route → share_and_gather → light and heavy branch → combine_branches

Where a block leaves its output in parts, the next one's combine_norm_scores stands for the last and the first.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .op_tokens_reference import accumulation_dtype, normed_dtype
from .op_tokens_reference import combine as combine_reference
from .op_tokens_reference import combine_norm as combine_norm_reference
from .op_tokens_reference import gated_gelu as gated_gelu_reference
from .op_tokens_reference import gated_gelu_backward as gated_gelu_backward_reference
from .op_tokens_reference import gather as gather_reference
from .op_tokens_reference import gather_dot as gather_dot_reference
from .op_tokens_reference import norm_backward as norm_backward_reference
from .op_tokens_reference import router_scores as router_scores_reference
from .op_tokens_reference import router_scores_backward as router_scores_backward_reference
from .run_backend import runs_eagerly, uses_triton
from .run_operator import Operator, kernel_or, refuse_derivatives_of_kernels

KERNELS: dict[str, Callable[..., Any]] = {}
# without triton `uses_triton` is False, and nothing below looks for a kernel
with contextlib.suppress(ImportError):
    from .op_gelu_triton import gated_gelu as gated_gelu_kernel
    from .op_gelu_triton import gated_gelu_backward as gated_gelu_backward_kernel
    from .op_norm_triton import combine_norm, norm_backward
    from .op_rows_triton import combine, gather, gather_dot

    KERNELS = {
        "combine": combine,
        "combine_norm": combine_norm,
        "norm_backward": norm_backward,
        "gather": gather,
        "gather_dot": gather_dot,
        "gated_gelu": gated_gelu_kernel,
        "gated_gelu_backward": gated_gelu_backward_kernel,
    }


_kernel_or = partial(kernel_or, KERNELS)


# gather_dot, the backward of a weighted scatter


def _fake_gather_dot(hidden_states: Tensor, other: Tensor, indices: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return other.new_empty(other.shape), hidden_states.new_empty(indices.shape, dtype=torch.float32)


_gather_dot = Operator(
    "token_gather_dot(Tensor hidden_states, Tensor other, Tensor indices, Tensor valid, Tensor? weights) "
    "-> (Tensor, Tensor)",
    _kernel_or(gather_dot_reference),
    _fake_gather_dot,
)


def _scatter_gradients(
    ctx: Any, grad: Tensor, first: int, updates: Tensor, indices: Tensor, valid: Tensor, weights: Tensor | None
) -> tuple[Tensor | None, None, None, Tensor | None]:
    """The gradients of a scatter's (updates, indices, valid, weights), which are inputs `first` and up."""
    if not ctx.needs_input_grad[first] and not ctx.needs_input_grad[first + 3]:
        return None, None, None, None
    grad_updates, dots = _gather_dot(grad, updates, indices, valid, weights)
    return grad_updates, None, None, None if weights is None else dots.to(weights.dtype)


# combine: base + light + the weighted rows of one or two routings


def _fake_combine(base: Tensor | None, light: Tensor | None, updates: Tensor, *rest: Any) -> Tensor:
    length = rest[-1]
    return (updates if base is None else base).new_empty(updates.shape[0], length, updates.shape[2])


def _save_combine(ctx: Any, inputs: tuple[Any, ...], _: Tensor) -> None:
    ctx.save_for_backward(*inputs[2:10])
    ctx.light_dtype = None if inputs[1] is None else inputs[1].dtype


def _backward_combine(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    updates, indices, valid, weights, updates2, indices2, valid2, weights2 = ctx.saved_tensors
    grad_light = None if ctx.light_dtype is None else grad.to(ctx.light_dtype)
    first = _scatter_gradients(ctx, grad, 2, updates, indices, valid, weights)
    second: tuple[Tensor | None, ...] = (None, None, None, None)
    if updates2 is not None:
        second = _scatter_gradients(ctx, grad, 6, updates2, indices2, valid2, weights2)
    return grad if ctx.needs_input_grad[0] else None, grad_light, *first, *second, None


_combine = Operator(
    "token_combine(Tensor? base, Tensor? light, Tensor updates, Tensor indices, Tensor valid, Tensor? weights, "
    "Tensor? updates2, Tensor? indices2, Tensor? valid2, Tensor? weights2, SymInt length) -> Tensor",
    _kernel_or(combine_reference, operand=2),
    _fake_combine,
    _save_combine,
    _backward_combine,
)


# combine_norm: the combined rows, their norm and their router scores


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
    _kernel_or(norm_backward_reference, operand=3),
    _fake_norm_backward,
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
    return grad, grad.to(ctx.light_dtype), *_scatter_gradients(ctx, grad, 2, heavy, indices, valid, weights), *last


_combine_norm = Operator(
    "token_combine_norm(Tensor residual, Tensor? light, Tensor? heavy, Tensor? indices, Tensor? valid, "
    "Tensor? weights, Tensor norm_weight, Tensor? router_weights, float eps, ScalarType? wanted_dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _kernel_or(combine_norm_reference),
    _fake_combine_norm,
    _save_combine_norm,
    _backward_combine_norm,
)


# gather: the rows of one or two routings


def _fake_gather(
    hidden_states: Tensor,
    indices: Tensor,
    valid: Tensor,
    weights: Tensor | None,
    indices2: Tensor | None,
    valid2: Tensor | None,
    weights2: Tensor | None,
) -> tuple[Tensor, Tensor]:
    d = hidden_states.shape[-1]
    second = (0,) if indices2 is None else (*indices2.shape, d)
    return hidden_states.new_empty(*indices.shape, d), hidden_states.new_empty(second)


def _save_gather(ctx: Any, inputs: tuple[Any, ...], _: tuple[Tensor, ...]) -> None:
    # the states are needed for the weights' gradients alone
    weighted = any(ctx.needs_input_grad[position] for position in (3, 6))
    ctx.save_for_backward(inputs[0] if weighted else None, *inputs[1:])
    ctx.length = inputs[0].shape[1]


def _gather_gradients(
    ctx: Any, grad_shared: Tensor | None, grad: Tensor | None, grad2: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of a gather's inputs, `grad_shared` added to the states'."""
    hidden_states, indices, valid, weights, indices2, valid2, weights2 = ctx.saved_tensors
    routings = [(grad, indices, valid, weights), (grad2, indices2, valid2, weights2)]
    grad_weights: list[Tensor | None] = [None, None]
    for i, (rows, positions, used, factors) in enumerate(routings):
        if rows is not None and factors is not None and ctx.needs_input_grad[3 * i + 3]:
            grad_weights[i] = _gather_dot(hidden_states, rows, positions, used, None)[1].to(factors.dtype)
    given = [routing for routing in routings if routing[0] is not None and routing[1] is not None]
    if given and ctx.needs_input_grad[0]:
        second = given[1] if len(given) == 2 else (None, None, None, None)
        grad_shared = _combine(grad_shared, None, *given[0], *second, ctx.length)
    return grad_shared, None, None, grad_weights[0], None, None, grad_weights[1]


def _backward_gather(ctx: Any, grad: Tensor | None, grad2: Tensor | None) -> tuple[Tensor | None, ...]:
    return _gather_gradients(ctx, None, grad, grad2)


_gather = Operator(
    "token_gather(Tensor hidden_states, Tensor indices, Tensor valid, Tensor? weights, Tensor? indices2, "
    "Tensor? valid2, Tensor? weights2) -> (Tensor, Tensor)",
    _kernel_or(gather_reference),
    _fake_gather,
    _save_gather,
    _backward_gather,
)


class _ShareAndGather(torch.autograd.Function):
    """`_gather` that also hands its states on, so that both gradients of the states meet in one kernel."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, *routings: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        rows, rows2 = _gather.implementation(hidden_states, *routings)
        ctx.set_materialize_grads(False)
        _save_gather(ctx, (hidden_states, *routings), (rows, rows2))
        return hidden_states, rows, rows2

    @staticmethod
    def backward(
        ctx: Any, grad_shared: Tensor | None, grad: Tensor | None, grad2: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        refuse_derivatives_of_kernels("token_gather")
        return _gather_gradients(ctx, grad_shared, grad, grad2)


# router_scores: matrix products, of a part of the states at a time, so that no fp32 copy of all of them is made

# tokens of all rows together; 48 MiB in fp32 at d = 768, which stays in the L2 of an H100
_SCORED_AT_ONCE = 16_384


def _parts(hidden_states: Tensor) -> Iterator[slice]:
    """Parts of the positions of `[batch, n, d]`."""
    batch, n, _ = hidden_states.shape
    step = max(1, _SCORED_AT_ONCE // batch)
    return (slice(first, first + step) for first in range(0, n, step))


def _router_scores_forward(hidden_states: Tensor, router_weights: Tensor) -> Tensor:
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
    _router_scores_backward_in_parts,
    _fake_router_scores_backward,
)


def _save_router_scores(ctx: Any, inputs: tuple[Tensor, ...], _: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_router_scores(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _router_scores_backward(grad, *ctx.saved_tensors)


_router_scores = Operator(
    "router_scores(Tensor hidden_states, Tensor router_weights) -> Tensor",
    _router_scores_forward,
    _fake_router_scores,
    _save_router_scores,
    _backward_router_scores,
)


# gated_gelu


def _fake_gated_gelu(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _fake_gated_gelu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


_gated_gelu_backward = Operator(
    "gated_gelu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    _kernel_or(gated_gelu_backward_reference),
    _fake_gated_gelu_backward,
)


def _save_gated_gelu(ctx: Any, inputs: tuple[Tensor, ...], _: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_gated_gelu(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _gated_gelu_backward(grad, *ctx.saved_tensors)


_gated_gelu = Operator(
    "gated_gelu(Tensor gate, Tensor up) -> Tensor",
    _kernel_or(gated_gelu_reference),
    _fake_gated_gelu,
    _save_gated_gelu,
    _backward_gated_gelu,
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
        kernel_backend: see `run_backend.uses_triton`, here and in the functions below.
        wanted_dtype: of the normalised states: None for the weight's where that is half precision and else the hidden
            states'. The scores are those of the states before the rounding to another.

    Returns:
        The normalised states `[batch, n, d]` and the scores `[batch, routers, n]` in fp32 (float64 for float64),
        contiguous, or None.
    """
    run = _combine_norm if uses_triton(hidden_states, kernel_backend) else combine_norm_reference
    _, normed, _, scores = run(hidden_states, None, None, None, None, None, weight, router_weights, eps, wanted_dtype)
    return normed, None if router_weights is None else scores


def router_scores(hidden_states: Tensor, router_weights: Tensor, kernel_backend: str = "auto") -> Tensor:
    """The products of states with router vectors, for states that are normalised already; no copy of the states.

    Args:
        hidden_states: `[batch, n, d]`, any float dtype.
        router_weights: one learned vector a router `[routers, d]`.

    Returns:
        `[batch, routers, n]` in fp32 (float64 for float64), contiguous.
    """
    run = _router_scores if uses_triton(hidden_states, kernel_backend) else router_scores_reference
    return run(hidden_states, router_weights)


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
    run = _combine_norm if uses_triton(residual, kernel_backend) else combine_norm_reference
    hidden_states, normed, _, scores = run(
        residual, light, heavy, indices, valid, weights, norm_weight, router_weights, eps, wanted_dtype
    )
    return hidden_states, normed, None if router_weights is None else scores


def combine_branches(
    residual: Tensor,
    light: Tensor,
    heavy: Tensor,
    indices: Tensor,
    valid: Tensor,
    weights: Tensor,
    kernel_backend: str = "auto",
) -> Tensor:
    """`residual + light`, and `weights * heavy` added at the routed positions; summed in fp32, rounded once.

    Args:
        residual: `[batch, n, d]`.
        light: `[batch, n, d]`.
        heavy: `[batch, k, d]`.
        indices, valid, weights: the routing, each `[batch, k]` (int64, bool, fp32); a position at most once.

    Returns:
        `[batch, n, d]` in the residual's dtype, a new tensor.
    """
    run = _combine if uses_triton(residual, kernel_backend) else combine_reference
    return run(residual, light, heavy, indices, valid, weights, None, None, None, None, residual.shape[1])


def scatter_add_tokens(
    base: Tensor,
    updates: Tensor,
    indices: Tensor,
    valid: Tensor,
    weights: Tensor | None = None,
    kernel_backend: str = "auto",
) -> Tensor:
    """`base` with `weights * updates` added at the routed positions; `combine_branches` without a light branch.

    Args:
        base: `[batch, n, d]`.
        updates: `[batch, k, d]`.
        indices, valid, weights: the routing, each `[batch, k]` (int64, bool, fp32 or None for 1).

    Returns:
        `[batch, n, d]` in the base's dtype, a new tensor.
    """
    run = _combine if uses_triton(base, kernel_backend) else combine_reference
    return run(base, None, updates, indices, valid, weights, None, None, None, None, base.shape[1])


def gather_tokens(
    hidden_states: Tensor,
    indices: Tensor,
    valid: Tensor,
    weights: Tensor | None = None,
    kernel_backend: str = "auto",
) -> Tensor:
    """The routed tokens' rows, times their routing weights where given; unused slots are rows of zeros.

    Args:
        hidden_states: `[batch, n, d]`.
        indices: int64 `[batch, k]`, ascending over the used slots, which come first.
        valid: bool `[batch, k]`, which slots are used.
        weights: fp32 `[batch, k]`; the product is taken in fp32 and rounded once.

    Returns:
        `[batch, k, d]` in the hidden states' dtype.
    """
    run = _gather if uses_triton(hidden_states, kernel_backend) else gather_reference
    return run(hidden_states, indices, valid, weights, None, None, None)[0]


def share_and_gather(
    hidden_states: Tensor,
    *routings: tuple[Tensor, Tensor, Tensor | None],
    kernel_backend: str = "auto",
) -> tuple[Tensor, ...]:
    """`gather_tokens` of one or two routings in one launch, for a layer whose light branch reads all the states too.

    Use the returned hidden states, which are the given ones, for the light branch: the backward then adds the
    routed tokens' gradients to the light branch's in one pass, instead of one zero-filled `[batch, n, d]` tensor
    and one addition for each routing.

    Args:
        hidden_states: `[batch, n, d]`.
        routings: one or two of `(indices, valid, weights or None)`, as in `gather_tokens`.

    Returns:
        The hidden states, then each routing's tokens `[batch, k, d]`.
    """
    first, *rest = routings
    second = rest[0] if rest else (None, None, None)
    tokens: tuple[Tensor, ...]
    if not uses_triton(hidden_states, kernel_backend):
        tokens = gather_reference(hidden_states, *first, *second)
    elif runs_eagerly() and torch.is_grad_enabled():
        hidden_states, *shared_tokens = _ShareAndGather.apply(hidden_states, *first, *second)
        tokens = tuple(shared_tokens)
    else:
        tokens = _gather(hidden_states, *first, *second)
    return hidden_states, *tokens[: len(routings)]


def gated_gelu(gate: Tensor, up: Tensor, kernel_backend: str = "auto") -> Tensor:
    """T5's gated GELU, `gelu_new(gate) * up` (the tanh form), in fp32 and rounded once; stores only its inputs.

    Args:
        gate, up: `[..., d_ff]`, of one shape and dtype; halves of one projection are read in place.

    Returns:
        `[..., d_ff]` in their dtype.
    """
    return (_gated_gelu if uses_triton(gate, kernel_backend) else gated_gelu_reference)(gate, up)


@contextlib.contextmanager
def recomputed_in_backward(states: Tensor, recompute: Callable[[], Tensor]) -> Iterator[None]:
    """Inside, whatever autograd would keep of `states` for its backward is computed again there instead.

    For results that are cheaper to repeat than to store (a norm, a gated activation) around the projections that
    read them, whatever those are: a LoRA adapter's included. Eager calls only; compilers decide that for themselves.

    Args:
        states: a contiguous tensor.
        recompute: gives the same values again; it runs without gradients, once for each time they were kept.
    """
    if not runs_eagerly() or not torch.is_grad_enabled():
        yield
        return
    address = states.data_ptr()

    def pack(kept: Tensor) -> Any:
        if kept.data_ptr() == address and kept.numel() == states_numel and kept.is_contiguous():
            return kept.shape
        return kept

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, torch.Size):
            with torch.no_grad():
                return recompute().view(kept)
        return kept

    states_numel = states.numel()
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
