"""The routing operation in PyTorch: scores to the budget's tokens in order of position, and their weights."""

import math

import torch

from .op_soft_topk import mask_scores, soft_topk_weights, solve
from .run_sizes import smaller


def real_tokens(scores: torch.Tensor, mask: torch.Tensor | None, lengths: torch.Tensor | None) -> torch.Tensor | None:
    """The mask [rows, n] of real tokens, from either of its two forms; `None` where all are real."""
    if lengths is None:
        return mask
    return torch.arange(scores.shape[-1], device=scores.device) < lengths.unsqueeze(-1)


def select_tokens(scores: torch.Tensor, budget: torch.Tensor, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
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
    # the column past the last slot takes what was not selected and is cut off
    indices = torch.full((rows, capacity + 1), n - 1, dtype=torch.int64, device=scores.device)
    indices = indices.scatter(-1, slot, torch.arange(n, device=scores.device).expand(rows, n))
    valid = torch.arange(capacity, device=scores.device) < budget.unsqueeze(-1)
    return indices.narrow(1, 0, capacity).masked_fill(~valid, n - 1), valid


def route_reference(
    scores: torch.Tensor,
    budget: torch.Tensor,
    soft_budget: torch.Tensor | None,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    capacity: int,
    soft_topk_ratio: float,
    solver: str,
    schedule: list[float],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`route` of op_routing.py, whose docstring says what the arguments are.

    Returns:
        weights, indices and valid [rows, capacity].
    """
    rows, n = scores.shape
    masked = mask_scores(scores, real_tokens(scores, mask, lengths))
    budget = budget.minimum((masked != -torch.inf).sum(-1)).clamp(0, smaller(capacity, n))
    # at least ceil(k) of every row, in integers, which symbolic sizes may be computed with too
    largest = (
        n if soft_budget is not None else smaller(n, (capacity * math.ceil(1024 * soft_topk_ratio) + 1023) // 1024)
    )
    k = soft_topk_ratio * budget.to(masked.dtype) if soft_budget is None else soft_budget.to(masked.dtype)
    exponents = solve(masked, k.clamp(min=torch.finfo(masked.dtype).tiny), solver, schedule, largest)
    indices, valid = select_tokens(masked.detach(), budget, capacity)
    return soft_topk_weights(exponents.gather(-1, indices), ~valid), indices, valid
