"""Routing, from scores to the chosen tokens and their weights: in PyTorch, as an operator, and `route`."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernel_backend import triton_is_available
from .op_soft_topk import (
    check_mask,
    check_positive,
    check_scores,
    check_solver,
    epsilon_schedule,
    mask_scores,
    soft_topk_weights,
    solve,
    weights_dtype,
)
from .run_budgets import smaller
from .run_operator import Gradient, Launch, Operator

route_into: Launch = None
route_backward_into: Launch = None
if triton_is_available():
    from .op_routing_gradient_triton import route_backward_into
    from .op_routing_triton import kernels_take, route_into


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


def real_tokens(scores: Tensor, mask: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    """The mask [rows, n] of real tokens, from either of its two forms; `None` where all are real."""
    if lengths is None:
        return mask
    return torch.arange(scores.shape[-1], device=scores.device) < lengths.unsqueeze(-1)


def select_tokens(scores: Tensor, budget: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Positions of the `budget` largest scores of each row, ties to the lower position.

    Args:
        scores: [rows, n], masked; NaN counts as the largest.
        budget: int64 [rows], at most the number of real tokens and `capacity`.

    Returns:
        indices int64 [rows, capacity], ascending, and valid bool [rows, capacity]; unused slots hold n - 1.
    """
    rows, n = scores.shape
    scores = scores.nan_to_num(torch.inf, torch.inf, -torch.inf)
    top = scores.topk(smaller(capacity, n), dim=-1).values
    smallest = top.gather(-1, (budget.unsqueeze(-1) - 1).clamp(0, top.shape[-1] - 1))
    above, equal = scores > smallest, scores == smallest
    room = budget.unsqueeze(-1) - above.sum(-1, keepdim=True)
    selected = above | (equal & (equal.cumsum(-1) <= room))
    slot = (selected.cumsum(-1) - 1).masked_fill(~selected, capacity)
    # The column past the last slot takes what was not selected, and is cut off.
    indices = torch.full((rows, capacity + 1), n - 1, dtype=torch.int64, device=scores.device)
    indices = indices.scatter(-1, slot, torch.arange(n, device=scores.device).expand(rows, n))
    valid = torch.arange(capacity, device=scores.device) < budget.unsqueeze(-1)
    return indices.narrow(1, 0, capacity).masked_fill(~valid, n - 1), valid


def _state_width(solver: str, num_iterations: int) -> int:
    return 3 if solver == "exact" else num_iterations


def route_reference(
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
    epsilon_init: float | None,
    epsilon_decay: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `route` returns, whose docstring says what the arguments are.

    Returns:
        weights, indices and valid [rows, capacity]; and zeros in the shape of what the kernels keep for their
        gradient, [rows, 3 or iterations].
    """
    rows, n = scores.shape
    masked = mask_scores(scores, real_tokens(scores, mask, lengths))
    budget = budget.minimum((masked != -torch.inf).sum(-1)).clamp(0, smaller(capacity, n))
    # This is at least ceil(k) of every row. It is computed in integers, as symbolic sizes can be too.
    largest = (
        n if soft_budget is not None else smaller(n, (capacity * math.ceil(1024 * soft_topk_ratio) + 1023) // 1024)
    )
    k = soft_topk_ratio * budget.to(masked.dtype) if soft_budget is None else soft_budget.to(masked.dtype)
    schedule = epsilon_schedule(epsilon, num_iterations, epsilon_init, epsilon_decay)
    exponents = solve(masked, k.clamp(min=torch.finfo(masked.dtype).tiny), solver, schedule, largest)
    indices, valid = select_tokens(masked.detach(), budget, capacity)
    weights = soft_topk_weights(exponents.gather(-1, indices), ~valid)
    return weights, indices, valid, weights.new_zeros((rows, _state_width(solver, num_iterations)))


def _route_results(
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
    *_: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = scores.shape[0]
    weights = scores.new_empty((rows, capacity), dtype=weights_dtype(scores))
    indices = weights.new_empty((rows, capacity), dtype=torch.int64)
    valid = weights.new_empty((rows, capacity), dtype=torch.bool)
    return weights, indices, valid, weights.new_empty((rows, _state_width(solver, num_iterations)))


_route = Operator(
    "route",
    route_reference,
    _route_results,
    route_into,
    Gradient(
        inputs=("scores", "soft_budget"),
        results=("weights", "indices", "valid", "state"),
        through=("weights",),
        kept=("weights", "indices", "valid", "state"),
        launch=route_backward_into,
    ),
    fits=lambda scores, *rest: kernels_take(scores.shape[1], rest[6], scores.device),
)


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _check_rows(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; it must be a tensor")
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; for these scores it must be {tuple(shape)}")


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
        kernel_backend: as in `uses_triton` of kernel_backend.py.

    Raises:
        TypeError: for scores that are not floating point, a mask that is not bool, a setting of another type.
        ValueError: for a setting out of its range, both `mask` and `lengths`, scores of another rank or no tokens,
            another argument of another shape.
    """
    check_scores(scores)
    if budget is None:
        raise TypeError("budget is None; it must be a tensor")
    check_solver(solver, epsilon, num_iterations, epsilon_init, epsilon_decay)
    check_mask(mask)
    check_positive("soft_topk_ratio", soft_topk_ratio)
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
    for name, tensor in (("budget", budget), ("lengths", lengths)):
        if tensor is not None and tensor.dtype not in _INTEGERS:
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must hold integers")
    if soft_budget is not None and not soft_budget.is_floating_point():
        raise TypeError(f"soft_budget has dtype {soft_budget.dtype}; it must be floating point")
    if isinstance(capacity, float):
        raise TypeError(f"capacity is {capacity!r}; it must be an integer")
    if isinstance(capacity, int) and capacity < 1:
        raise ValueError(f"capacity is {capacity}; it must be at least 1")
    weights, indices, valid, _ = _route(
        scores, budget, soft_budget, mask, lengths, capacity, soft_topk_ratio, solver,
        epsilon, num_iterations, epsilon_init, epsilon_decay, kernel_backend=kernel_backend,
    )  # fmt: skip
    return RoutedTokens(indices, weights, valid)


def dense_start_weights(weights: Tensor, scores: Tensor, epsilon: float, progress: Tensor) -> Tensor:
    """The soft top-k's weights, with the gradient that they have during a dense start.

    Each weight follows its own score alone, with the slope weight / ε, as if the threshold were constant; a saturated
    weight does so too. So a token whose heavy branch helps rises, whatever the others do, and none is pushed down
    because another is chosen. At progress 0 the weights are constants: the heavy branches learn first.

    Args:
        weights: fp32 [rows, slots], the soft top-k's weights, without a gradient.
        scores: [rows, slots], the scores of the same tokens.
        epsilon: the soft top-k's temperature.
        progress: fp32 [], from 0 to 1.

    Returns:
        fp32 [rows, slots], equal to `weights`.
    """
    scores = scores.float()
    slope = weights / epsilon * (progress > 0)
    return weights + slope * (scores - scores.detach())
