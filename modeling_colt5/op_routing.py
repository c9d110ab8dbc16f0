"""Soft top-k and routing: the public functions, their checks, and the operators of the namespace `colt5`."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .op_routing_reference import route_reference
from .op_soft_topk import SOLVERS, epsilon_schedule, mask_scores, soft_topk_weights, solve
from .run_backend import kernel_takes, runs_eagerly, uses_triton
from .run_operator import Operator
from .run_sizes import as_tensor, computed_size, is_free

try:
    from .op_routing_triton import kernels_take, route_backward, route_forward
except ImportError:  # without triton `uses_triton` is False, and nothing below calls them
    pass


@dataclass
class RoutedTokens:
    """What a router chose.

    Attributes:
        indices: int64 [rows, capacity], positions of the routed tokens, ascending over the used slots, which come
            first; n - 1 at unused slots.
        weights: [rows, capacity], their soft top-k weights in fp32 (float64 for float64 scores); 0 at unused slots.
        valid: bool [rows, capacity], which slots are used.
    """

    indices: Tensor
    weights: Tensor
    valid: Tensor


def _weights_dtype(scores: Tensor) -> torch.dtype:
    return torch.promote_types(scores.dtype, torch.float32)


def _state_width(solver: str, num_iterations: int) -> int:
    return 3 if solver == "exact" else num_iterations


def _runs_kernel(scores: Tensor, solver: str) -> bool:
    return kernel_takes(scores) and kernels_take(scores.shape[1], solver, scores.device)


def _route_forward(
    scores: Tensor,
    budget: Tensor,
    soft_budget: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    capacity: int,
    soft_topk_ratio: float,
    solver: str,
    *schedule_settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = (scores, budget, soft_budget, mask, lengths)
    if _runs_kernel(scores, solver):
        return route_forward(*rows, capacity, soft_topk_ratio, solver, *schedule_settings)
    routed = route_reference(*rows, capacity, soft_topk_ratio, solver, epsilon_schedule(*schedule_settings))
    # the reference's backward starts from its inputs; the kernels' layout keeps one shape for both
    return *routed, routed[0].new_zeros((scores.shape[0], _state_width(solver, schedule_settings[1])))


def _route_backward(
    grad_weights: Tensor,
    scores: Tensor,
    budget: Tensor,
    soft_budget: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    weights: Tensor,
    indices: Tensor,
    valid: Tensor,
    state: Tensor,
    soft_topk_ratio: float,
    solver: str,
    *schedule_settings: Any,
) -> tuple[Tensor, Tensor]:
    if _runs_kernel(scores, solver):
        return route_backward(
            grad_weights, scores, soft_budget, mask, lengths, weights, indices, valid, state,
            solver, *schedule_settings,
        )  # fmt: skip
    schedule = epsilon_schedule(*schedule_settings)
    with torch.enable_grad():
        leaves = [scores.detach().requires_grad_()]
        if soft_budget is not None:
            leaves.append(soft_budget.detach().requires_grad_())
        rows = (leaves[0], budget, None if soft_budget is None else leaves[1], mask, lengths)
        repeated = route_reference(*rows, weights.shape[1], soft_topk_ratio, solver, schedule)[0]
    grads = torch.autograd.grad(repeated, leaves, grad_weights)
    return grads[0], weights.new_zeros(scores.shape[0]) if soft_budget is None else grads[1].to(weights.dtype)


def _fake_route(
    scores: Tensor,
    budget: Tensor,
    soft_budget: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    capacity: int,
    soft_topk_ratio: float,
    solver: str,
    epsilon: float,
    num_iterations: int,
    *_: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = scores.shape[0]
    weights = scores.new_empty((rows, capacity), dtype=_weights_dtype(scores))
    indices = weights.new_empty((rows, capacity), dtype=torch.int64)
    valid = weights.new_empty((rows, capacity), dtype=torch.bool)
    return weights, indices, valid, weights.new_empty((rows, _state_width(solver, num_iterations)))


def _fake_route_backward(
    grad_weights: Tensor, scores: Tensor, budget: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    return scores.new_empty(scores.shape), grad_weights.new_empty(budget.shape)


def _save_route(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    *rows, _capacity, soft_topk_ratio, solver, epsilon, iterations, init, decay = inputs
    ctx.settings = (soft_topk_ratio, solver, epsilon, iterations, init, decay)
    ctx.mark_non_differentiable(*outputs[1:])
    ctx.save_for_backward(*rows, *outputs)


def _route_autograd(ctx: Any, grad_weights: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    grad_scores = grad_soft_budget = None
    if grad_weights is not None:
        # unpacked once: gradient checkpointing recomputes at the first time and refuses a second
        saved = ctx.saved_tensors
        grad_scores, grad_k = _ROUTE_BACKWARD(grad_weights, *saved, *ctx.settings)
        soft_budget = saved[2]
        grad_soft_budget = None if soft_budget is None else grad_k.to(soft_budget.dtype)
    return grad_scores, None, grad_soft_budget, *[None] * (3 + len(ctx.settings))


_SETTINGS = "str solver, float epsilon, int num_iterations, float epsilon_init, float epsilon_decay"
_ROWS = "Tensor scores, Tensor budget, Tensor? soft_budget, Tensor? mask, Tensor? lengths"
_ROUTE_BACKWARD = Operator(
    f"route_backward(Tensor grad_weights, {_ROWS}, Tensor weights, Tensor indices, Tensor valid, Tensor state, "
    f"float soft_topk_ratio, {_SETTINGS}) -> (Tensor, Tensor)",
    _route_backward,
    _fake_route_backward,
)
_ROUTE = Operator(
    f"route({_ROWS}, SymInt capacity, float soft_topk_ratio, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _route_forward,
    _fake_route,
    _save_route,
    _route_autograd,
)


def _check_scores(scores: Tensor) -> None:
    if not scores.is_floating_point():
        raise TypeError(f"scores have dtype {scores.dtype}; they must be floating point")


def _check_positive(name: str, value: float) -> None:
    # what is nearly always given comes first: a router checks its settings at every call
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise TypeError(f"{name} is {value!r}; it must be a number")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}; it must be finite and above 0")


def _check_solver(
    solver: str, epsilon: float, num_iterations: int, epsilon_init: float | None, epsilon_decay: float
) -> None:
    if solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}; it must be one of {', '.join(SOLVERS)}")
    _check_positive("epsilon", epsilon)
    _check_positive("epsilon_decay", epsilon_decay)
    if epsilon_decay > 1:
        raise ValueError(f"epsilon_decay is {epsilon_decay!r}; it must be at most 1")
    if epsilon_init is not None:
        _check_positive("epsilon_init", epsilon_init)
    if isinstance(num_iterations, bool) or not isinstance(num_iterations, int):
        raise TypeError(f"num_iterations is {num_iterations!r}; it must be an integer")
    if num_iterations < 1:
        raise ValueError(f"num_iterations is {num_iterations}; it must be at least 1")


def _check_mask(mask: Tensor | None) -> None:
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}; it must be bool")


def _check_rows(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; for these scores it must be {tuple(shape)}")


def _expanded(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    pairs = zip(reversed(tensor.shape), reversed(shape), strict=False)
    if tensor.dim() > len(shape) or not all(own in (1, wanted) for own, wanted in pairs):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; for these scores it must broadcast to {tuple(shape)}"
        )
    return tensor.expand(shape)


def soft_topk(
    scores: Tensor,
    k: float | Tensor,
    *,
    epsilon: float = 1.0,
    mask: Tensor | None = None,
    solver: str = "exact",
    num_iterations: int = 50,
    epsilon_init: float | None = None,
    epsilon_decay: float = 1.0,
) -> Tensor:
    """Weights between 0 and 1 that sum to `k` and lean to the largest scores (CoLT5, section 3.2).

    argmax over p of ⟨s, p⟩ + ε H(p), subject to Σp = k and 0 ≤ p ≤ 1. Where `k` reaches the number of real entries
    every one of them gets weight 1, and no gradient.

    Args:
        scores: [..., n], floating point; fp16 and bf16 are computed in fp32.
        k: a number, or a tensor that broadcasts to [...], which gets a gradient; finite and above 0. A tensor is
            checked where that costs no synchronisation (on the CPU, not traced); elsewhere a NaN gives NaN.
        epsilon: how soft; weights tend to 0 and 1 as it falls.
        mask: bool, broadcasts to [..., n]; False entries get weight 0 and take no part.
        solver: "exact", the optimum with its closed-form gradient, or "coordinate_descent", the paper's iteration.
        num_iterations: iterations of coordinate descent.
        epsilon_init, epsilon_decay: ε-scaling of coordinate descent (CoDA, arXiv 2304.04947): iteration i uses
            max(epsilon, epsilon_init · epsilon_decay^i).

    Returns:
        [..., n] in fp32, or float64 for float64 scores.

    Raises:
        TypeError: for scores that are not floating point, a mask that is not bool, a setting of another type.
        ValueError: for `k`, `epsilon` or another setting out of its range, a mask or a `k` of another shape, scores
            without a dimension.
    """
    _check_scores(scores)
    if scores.dim() == 0:
        raise ValueError("scores have shape (); it must be [..., n]")
    _check_solver(solver, epsilon, num_iterations, epsilon_init, epsilon_decay)
    _check_mask(mask)
    leading, n = scores.shape[:-1], scores.shape[-1]
    dtype = _weights_dtype(scores)
    if isinstance(k, Tensor):
        if k.device.type == "cpu" and runs_eagerly() and not bool(((k > 0) & k.isfinite()).all()):
            raise ValueError(f"k is {k}; it must be finite and above 0")
        k = _expanded("k", k.to(device=scores.device, dtype=dtype), leading).reshape(-1)
    else:
        _check_positive("k", k)
        k = torch.full((math.prod(leading),), float(k), device=scores.device, dtype=dtype)
    if mask is not None:
        mask = _expanded("mask", mask, scores.shape).reshape(-1, n) if n else None
    if scores.numel() == 0:
        return scores.to(dtype)
    masked = mask_scores(scores.reshape(-1, n), mask)
    schedule = epsilon_schedule(epsilon, num_iterations, epsilon_init, epsilon_decay)
    exponents = solve(masked, k, solver, schedule, n)
    return soft_topk_weights(exponents, masked == -torch.inf).reshape(scores.shape)


def share_of(length: Any, fraction: float) -> Any:
    """ceil(fraction · length - 1e-6), exact: no rounding of a product decides how many tokens are routed.

    A fraction in floating point is p / 2^s with integers, so the result is (p · length + a constant) >> s. It is
    computed in parts of 31 bits, so that nothing exceeds 64: devices without float64 have integers of those.

    Args:
        length: number of tokens, below 2^31: an integer, a symbolic one, or an int64 tensor.
        fraction: share of them, above 0 and below 2^31.

    Returns:
        What the length is: an integer, a symbolic one, or an int64 tensor of its shape.
    """
    numerator, denominator = fraction.as_integer_ratio()
    bits = -(-(denominator.bit_length() - 1) // 31) * 31
    one = 1 << bits
    numerator *= one // denominator
    # what is more than 1e-6 above an integer is rounded up
    constant = one - 1 - one // 10**6
    carried, part = 0, (1 << 31) - 1
    for shift in range(0, bits, 31):
        carried = (length * ((numerator >> shift) & part) + (carried + ((constant >> shift) & part))) >> 31
    return length * (numerator >> bits) + carried


def routed_budget(lengths: Tensor, fraction: float, minimum: int) -> Tensor:
    """How many tokens each row routes: min(length, max(minimum, ceil(fraction · length - 1e-6))), exact.

    Args:
        lengths: int [rows], real tokens of each row.
        fraction: share of the tokens, in (0, 1].
        minimum: tokens that are routed however short the row is.

    Returns:
        int64 [rows].
    """
    lengths = lengths.to(torch.int64)
    return share_of(lengths, fraction).clamp(min=minimum).minimum(lengths)


def routed_capacity(n: int, fraction: float, minimum: int) -> int:
    """The slots that rows of padded length `n` need: `routed_budget` of `n`, at least 1, also for a symbolic `n`."""
    if is_free(n):
        return computed_size(routed_budget(as_tensor(n), fraction, minimum).clamp(min=1), n)
    budget = share_of(n, fraction)
    if isinstance(n, int):
        return max(1, min(n, max(minimum, budget)))
    return torch.sym_max(1, torch.sym_min(n, torch.sym_max(minimum, budget)))


def route(
    scores: Tensor,
    budget: Tensor,
    capacity: int,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    soft_budget: Tensor | None = None,
    soft_topk_ratio: float = 9 / 8,
    epsilon: float = 1.0,
    solver: str = "exact",
    num_iterations: int = 50,
    epsilon_init: float | None = None,
    epsilon_decay: float = 1.0,
    kernel_backend: str = "auto",
) -> RoutedTokens:
    """Choose each row's `budget` tokens of the largest scores and weigh them by a soft top-k (CoLT5, section 3.2).

    Tokens are chosen by raw score, ties to the lower position, and returned in order of position. Their weights are
    those of `soft_topk` over all real tokens of the row with k = soft_topk_ratio · budget; the gradient flows from
    the weights to all scores. NaN scores count as the largest and make the row's weights NaN.

    Args:
        scores: [rows, n], floating point; fp16 and bf16 are computed in fp32.
        budget: int64 [rows]; what exceeds `capacity` or the row's real tokens is cut.
        capacity: slots of each row in the result, at least 1.
        mask: bool [rows, n], True = real token; `None` = all real.
        lengths: int [rows], another form of the mask: the first `length` positions are real. Not with `mask`.
        soft_budget: [rows], floating point, k of the soft top-k in place of soft_topk_ratio · budget, above 0; gets a
            gradient.
        soft_topk_ratio: at least 1.
        epsilon, solver, num_iterations, epsilon_init, epsilon_decay: as in `soft_topk`.
        kernel_backend: as in `uses_triton` of run_backend.py.

    Raises:
        TypeError: for scores that are not floating point, a mask that is not bool, a setting of another type.
        ValueError: for a setting out of its range, both `mask` and `lengths`, scores of another rank or no tokens,
            another argument of another shape.
    """
    _check_scores(scores)
    _check_solver(solver, epsilon, num_iterations, epsilon_init, epsilon_decay)
    _check_mask(mask)
    _check_positive("soft_topk_ratio", soft_topk_ratio)
    if soft_topk_ratio < 1:
        raise ValueError(f"soft_topk_ratio is {soft_topk_ratio}; it must be at least 1")
    shape = scores.shape
    if len(shape) != 2 or shape[1] < 1:
        raise ValueError(f"scores have shape {tuple(shape)}; it must be [rows, n] with n at least 1")
    if mask is not None and lengths is not None:
        raise ValueError("mask and lengths are both given; they are two forms of one thing")
    _check_rows("mask", mask, shape)
    rows = shape[:1]
    _check_rows("budget", budget, rows)
    _check_rows("lengths", lengths, rows)
    _check_rows("soft_budget", soft_budget, rows)
    if isinstance(capacity, int) and capacity < 1:
        raise ValueError(f"capacity is {capacity}; it must be at least 1")
    rows_of_scores = (scores, budget, soft_budget, mask, lengths, capacity, soft_topk_ratio, solver)
    if uses_triton(scores, kernel_backend):
        init = epsilon if epsilon_init is None else epsilon_init
        weights, indices, valid, _ = _ROUTE(*rows_of_scores, epsilon, num_iterations, init, epsilon_decay)
    else:
        schedule = epsilon_schedule(epsilon, num_iterations, epsilon_init, epsilon_decay)
        weights, indices, valid = route_reference(*rows_of_scores, schedule)
    return RoutedTokens(indices, weights, valid)
