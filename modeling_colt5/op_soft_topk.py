"""Soft top-k: the exact solver and coordinate descent, differentiable any number of times, and the public function.

Both maximise ⟨s, p⟩ + ε H(p) over 0 ≤ p ≤ 1 with Σp = k (CoLT5, section 3.2; Lei et al. 2023, arXiv 2304.04947,
section 4). The maximum is p_i = min(1, exp((s_i - t) / ε)) with one threshold t per row; docs/soft_topk.md derives it.
"""

import math

import torch
from torch import Tensor

from .kernel_backend import can_look

SOLVERS = ("exact", "coordinate_descent")


def mask_scores(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Scores in the precision of the solvers (fp32, or float64 where they are that), -inf where `mask` is False.

    Infinite scores become the largest finite ones, so that a real token always stands above a masked one.
    """
    dtype = torch.promote_types(scores.dtype, torch.float32)
    limits = torch.finfo(dtype)
    scores = scores.to(dtype).clamp(limits.min, limits.max)
    return scores if mask is None else scores.masked_fill(~mask, -torch.inf)


def soft_topk_weights(exponents: torch.Tensor, is_absent: torch.Tensor) -> torch.Tensor:
    """Weights min(1, exp(exponent)), and 0 where `is_absent`; both of one shape."""
    exponents = exponents.masked_fill(is_absent, -torch.inf)
    # The mask comes before the exponential: an infinite one would turn its gradient of 0 into NaN.
    return exponents.masked_fill(_is_saturated(exponents.detach().exp()), 0).exp()


def _is_saturated(weights: torch.Tensor) -> torch.Tensor:
    """Which of the weights, not yet cut, are 1 and have no gradient."""
    return weights >= 1


def solve_exactly(
    scores: torch.Tensor, k: torch.Tensor, epsilon: float, largest: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The threshold of the optimum, without iteration, from the sorted largest scores and the sum of all others.

    An entry is saturated (weight 1) if the weights sum to at most k with the threshold at its own score; this is
    monotone in the score, so counting such entries gives the saturated set, and the rest of k divides among the rest.

    Args:
        scores: [rows, n], masked.
        k: [rows], above 0; a row with k at or above its number of real entries gets an offset of -inf.
        largest: how many scores to sort, at least ceil(k) in each row, at most n.

    Returns:
        A centre [rows, 1], the ceil(k)-th largest score, without gradient; (scores - centre) / ε, [rows, n]; and an
        offset [rows, 1] with t = centre + ε · offset, apart from it because their sum in fp32 would lose
        |t| 2^-24 / ε in the exponent.
    """
    k = k.unsqueeze(-1)
    known, rank = scores.detach(), k.detach()
    top, positions = known.topk(largest, dim=-1)
    all_saturated = rank >= (known > -torch.inf).sum(-1, keepdim=True)
    last = (rank.nan_to_num(1.0, 1.0, 1.0).ceil() - 1).clamp(0, largest - 1).long()
    centre = top.gather(-1, last).masked_fill(all_saturated, 0)
    scaled = (scores - centre) / epsilon
    values = scaled.detach()

    others = values.scatter(-1, positions, -torch.inf).logsumexp(-1, keepdim=True)
    top = values.gather(-1, positions)
    tail = torch.cat((top, others), -1).flip(-1).logcumsumexp(-1).flip(-1)
    # The tail is compared with what the rank leaves of k: a sum of rank and tail would lose the tail's digits.
    left = rank - torch.arange(largest, device=scores.device)
    saturated = ((tail[:, :-1] - top).exp() <= left).sum(-1, keepdim=True).minimum(last)
    offset = tail.gather(-1, saturated) - (rank - saturated).log()
    # Running sums of logarithms have lost digits. With the saturated set that an offset says, sums over the row say a
    # better one, twice, because the first may have moved an entry in or out.
    for _ in range(2):
        weights = (values - offset).exp()
        is_saturated = _is_saturated(weights)
        mass = weights.masked_fill(is_saturated, 0).sum(-1, keepdim=True)
        rest = rank - is_saturated.sum(-1, keepdim=True)
        offset = torch.where((mass > 0) & (rest > 0), offset + (mass / rest).log(), offset)
    offset = offset.masked_fill(all_saturated, -torch.inf).masked_fill(top[:, :1].isnan(), torch.nan)

    # Given which entries are saturated, the offset is the logarithm of Σ exp(scaled) over the others, less that of
    # what k leaves to them: written out for the sake of its derivatives, the value is the one found above.
    weights = (values - offset).exp()
    is_saturated = _is_saturated(weights) | (values == -torch.inf)
    mass = weights.masked_fill(is_saturated, 0).sum(-1, keepdim=True)
    # In such a row no weight could move.
    is_fixed = mass == 0
    free = scaled.masked_fill(is_saturated, -torch.inf).masked_fill(is_fixed, 0)
    rest = mass.masked_fill(is_fixed, 1) + (k - rank)
    moving = free.logsumexp(-1, keepdim=True) - rest.log()
    return centre, scaled, offset + (moving - moving.detach())


def epsilon_schedule(
    epsilon: float, num_iterations: int, epsilon_init: float | None, epsilon_decay: float
) -> list[float]:
    """ε of every coordinate-descent iteration, then that of the weights: from `epsilon_init` down to `epsilon`."""
    if epsilon_init is None:
        # A tracer that keeps numbers as symbols need not compute one number step by step.
        return [epsilon] * (num_iterations + 1)
    current = max(epsilon_init, epsilon)
    schedule = [current]
    for _ in range(num_iterations):
        current = max(current * epsilon_decay, epsilon)
        schedule.append(current)
    return schedule


def descend_coordinates(scores: torch.Tensor, k: torch.Tensor, schedule: list[float]) -> torch.Tensor:
    """The last threshold of coordinate descent (CoLT5, section 3.2; CoDA's ε-scaling by `schedule`).

    From t_1 = ε (log n - log k), each iteration sets t = ε (logsumexp(min(s, t) / ε) - log k).

    Args:
        scores: [rows, n], masked.
        k: [rows], above 0.
        schedule: ε of each iteration and of the weights, from `epsilon_schedule`.

    Returns:
        [rows, 1]; -inf for a row with k at or above its number of real entries.
    """
    k = k.unsqueeze(-1)
    real = (scores > -torch.inf).sum(-1, keepdim=True)
    all_saturated = k >= real
    # Rows that nobody looks at get numbers with finite logarithms and derivatives.
    scores, log_k = scores.masked_fill(all_saturated, 0), k.masked_fill(all_saturated, 1).log()
    threshold = schedule[0] * (real.clamp(min=1).to(scores.dtype).log() - log_k)
    for epsilon in schedule[1:-1]:
        capped = torch.where(scores < threshold, scores, threshold)
        threshold = epsilon * ((capped / epsilon).logsumexp(-1, keepdim=True) - log_k)
    return threshold.masked_fill(all_saturated, -torch.inf)


def solve(scores: torch.Tensor, k: torch.Tensor, solver: str, schedule: list[float], largest: int) -> torch.Tensor:
    """The exponents (s - t) / ε [rows, n] that `soft_topk_weights` needs, of masked `scores` [rows, n] and `k` [rows].

    Which entries are saturated has no derivative; else the derivatives are PyTorch's own, of any order.

    Args:
        solver: of `SOLVERS`.
        schedule: from `epsilon_schedule`.
        largest: at least ceil(k) in each row, at most n.
    """
    if solver == "exact":
        _, scaled, offset = solve_exactly(scores, k, schedule[-1], largest)
        return scaled - offset
    return (scores - descend_coordinates(scores, k, schedule)) / schedule[-1]


def weights_dtype(scores: Tensor) -> torch.dtype:
    """The dtype of the weights of scores: fp32, or float64 for float64."""
    return torch.promote_types(scores.dtype, torch.float32)


def check_scores(scores: Tensor) -> None:
    """Refuse scores that are not floating point."""
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores is a {type(scores).__name__}; it must be a tensor")
    if not scores.is_floating_point():
        raise TypeError(f"scores have dtype {scores.dtype}; they must be floating point")


def check_positive(name: str, value: float) -> None:
    """Refuse a setting that is no finite number above 0."""
    # The usual type is looked at first, because a router checks its settings at every call.
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise TypeError(f"{name} is {value!r}; it must be a number of Python's, int or float")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}; it must be finite and above 0")


def check_solver(
    solver: str, epsilon: float, num_iterations: int, epsilon_init: float | None, epsilon_decay: float
) -> None:
    """Refuse settings of the soft top-k that are of another type or out of their range."""
    if solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}; it must be one of {', '.join(SOLVERS)}")
    check_positive("epsilon", epsilon)
    check_positive("epsilon_decay", epsilon_decay)
    if epsilon_decay > 1:
        raise ValueError(f"epsilon_decay is {epsilon_decay!r}; it must be at most 1")
    if epsilon_init is not None:
        check_positive("epsilon_init", epsilon_init)
    if isinstance(num_iterations, bool) or not isinstance(num_iterations, int):
        raise TypeError(f"num_iterations is {num_iterations!r}; it must be an integer")
    if num_iterations < 1:
        raise ValueError(f"num_iterations is {num_iterations}; it must be at least 1")


def check_mask(mask: Tensor | None) -> None:
    """Refuse a mask that is not bool."""
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}; it must be bool")


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
    check_scores(scores)
    if scores.dim() == 0:
        raise ValueError("scores have shape (); it must be [..., n]")
    check_solver(solver, epsilon, num_iterations, epsilon_init, epsilon_decay)
    check_mask(mask)
    leading, n = scores.shape[:-1], scores.shape[-1]
    dtype = weights_dtype(scores)
    if isinstance(k, Tensor):
        if can_look(k) and not bool(((k > 0) & k.isfinite()).all()):
            raise ValueError(f"k is {k}; it must be finite and above 0")
        k = _expanded("k", k.to(device=scores.device, dtype=dtype), leading).reshape(-1)
    else:
        check_positive("k", k)
        k = torch.full((math.prod(leading),), float(k), device=scores.device, dtype=dtype)
    if mask is not None:
        mask = _expanded("mask", mask, scores.shape).reshape(-1, n) if n else None
    if scores.numel() == 0:
        return scores.to(dtype)
    masked = mask_scores(scores.reshape(-1, n), mask)
    schedule = epsilon_schedule(epsilon, num_iterations, epsilon_init, epsilon_decay)
    exponents = solve(masked, k, solver, schedule, n)
    return soft_topk_weights(exponents, masked == -torch.inf).reshape(scores.shape)
