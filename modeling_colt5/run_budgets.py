"""How many tokens routers take: the formula of budgets, for numbers that may be symbols, and a batch's budgets.

Compilers and exporters put symbols in place of a length that they keep free.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# When a dense start begins, a row's weights sum to this share of its tokens.
DENSE_SHARE = 0.9


def is_free(size: int) -> bool:
    """Whether an exporter (torch.export, torch.onnx) keeps this size free, for any length."""
    return not isinstance(size, int) and torch.compiler.is_exporting()


def computed_size(size: Tensor, most: int) -> int:
    """A size that the exported program computes itself when it runs, out of an int64 tensor [1]: from 1 to `most`.

    An expression of symbols would not do: operations compare it with other sizes while the program is made, and the
    program is then valid only for lengths where all comparisons give the same results as for the example.
    """
    number: int = size.item()  # type: ignore[assignment]
    torch._check(number >= 1)
    torch._check(number <= most)
    return number


def as_tensor(size: int) -> Tensor:
    """A size as an int64 tensor [1] on the CPU."""
    return torch.full((1,), size, dtype=torch.int64, device="cpu")


def smaller(size: int, other: int) -> int:
    """The smaller one of two sizes; symbols are not compared."""
    return min(size, other) if isinstance(size, int) and isinstance(other, int) else torch.sym_min(size, other)


def larger(size: int, other: int) -> int:
    """The larger one of two sizes; symbols are not compared."""
    return max(size, other) if isinstance(size, int) and isinstance(other, int) else torch.sym_max(size, other)


def share_of(length: Any, fraction: float) -> Any:
    """ceil(fraction · length - 1e-6), exact: no rounding of a product decides how many tokens are routed.

    A fraction in floating point is p / 2^s with integers, so the result is (p · length + a constant) >> s. It is
    computed in parts of 31 bits, so that nothing exceeds 64 bits: devices without float64 have int64.

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
    # With this constant, what is more than 1e-6 above an integer is rounded up.
    constant = one - 1 - one // 10**6
    carried, part = 0, (1 << 31) - 1
    for shift in range(0, bits, 31):
        carried = (length * ((numerator >> shift) & part) + (carried + ((constant >> shift) & part))) >> 31
    whole = numerator >> bits
    return length * whole + carried if whole else carried


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


def _repeated(mask: Tensor | None, routers: int) -> Tensor | None:
    """The mask of each router's rows, one router's after another's; of one row no copy."""
    return None if mask is None else mask.expand(routers, -1, -1).flatten(0, 1)


@dataclass
class RoutingBudget:
    """How many tokens routers that read the same states take, for one launch that runs them all.

    Args:
        budget: int64 [routers * batch], of each row, one router's rows after another's.
        capacities: the slots of each router, the same for all rows.
        mask: bool [routers * batch, n], True for real tokens; None for all.
        soft_budget: fp32 [routers * batch], during a dense start, the sum of each row's weights; None elsewhere, where
            the budget determines it.
    """

    budget: Tensor
    capacities: tuple[int, ...]
    mask: Tensor | None
    soft_budget: Tensor | None = None

    @classmethod
    def of_fractions(
        cls, states: Tensor, mask: Tensor | None, minimum: int, *kinds: tuple[float, ...]
    ) -> list["RoutingBudget"]:
        """The paper's budgets: of each row's own number of real tokens, whatever its padding.

        Args:
            states: [batch, n, d_model].
            mask: bool [batch, n], True for real tokens; None for all.
            minimum: tokens that are routed however short a row is.
            kinds: for each budget the fractions of its routers.
        """
        batch, length = states.shape[:2]
        # Routers of the same fraction share the numbers of rows.
        each = dict.fromkeys(fraction for fractions in kinds for fraction in fractions)
        capacities = {fraction: routed_capacity(length, fraction, minimum) for fraction in each}
        if mask is None:
            # Of whole rows `routed_budget` would say the same, with more launches.
            rows = {fraction: torch.full((batch,), capacities[fraction], device=states.device) for fraction in each}
        else:
            lengths = mask.sum(-1)
            rows = {fraction: routed_budget(lengths, fraction, minimum) for fraction in each}
        budgets = []
        for fractions in kinds:
            parts = [rows[fraction] for fraction in fractions]
            budgets.append(
                cls(
                    torch.cat(parts) if len(parts) > 1 else parts[0],
                    tuple(capacities[fraction] for fraction in fractions),
                    _repeated(mask, len(parts)),
                )
            )
        return budgets

    @classmethod
    def of_memory(
        cls,
        memory: Tensor,
        mask: Tensor | None,
        num_tokens: int | None,
        num_routers: int,
        soft_topk_ratio: float,
        dense_start: Tensor | None,
    ) -> "RoutingBudget":
        """Of all routers of routed cross-attention to a memory [batch, n, d_model]: each takes `num_tokens` of a row's
        real tokens, or all where the row has no more, or for None.

        `soft_topk_ratio` is the size of the soft top-k over them. `dense_start` is fp32 [], how far a dense start has
        come, in which all are taken; None for the budget.
        """
        slots, lengths = memory_slots(num_tokens, memory), real_lengths(memory, mask)
        if dense_start is not None:
            fraction = lengths.clamp(max=slots) / lengths.clamp(min=1)
            return cls.of_dense_start(memory, mask, (fraction,) * num_routers, soft_topk_ratio, dense_start)
        budget = lengths.clamp(max=slots).repeat(num_routers)
        return cls(budget, (slots,) * num_routers, _repeated(mask, num_routers))

    @classmethod
    def of_dense_start(
        cls,
        states: Tensor,
        mask: Tensor | None,
        fractions: tuple[float | Tensor, ...],
        soft_topk_ratio: float,
        progress: Tensor,
    ) -> "RoutingBudget":
        """All real tokens of states [batch, n, d_model], for routers whose own budgets have these fractions: the other
        arguments are those of `dense_start_budget`."""
        lengths = real_lengths(states, mask)
        return cls(
            lengths.repeat(len(fractions)),
            (states.shape[1],) * len(fractions),
            None if mask is None else mask.repeat(len(fractions), 1),
            dense_start_budget(lengths, fractions, soft_topk_ratio, progress),
        )

    def for_each(self, times: int) -> "RoutingBudget":
        """The same for `times` rows in the place of each."""

        def repeated(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.repeat_interleave(times, 0)

        budget = self.budget.repeat_interleave(times, 0)
        return RoutingBudget(budget, self.capacities, repeated(self.mask), repeated(self.soft_budget))

    def to(self, device: torch.device, non_blocking: bool = False) -> "RoutingBudget":
        """The same on another device."""

        def moved(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.to(device, non_blocking=non_blocking)

        budget = self.budget.to(device, non_blocking=non_blocking)
        return RoutingBudget(budget, self.capacities, moved(self.mask), moved(self.soft_budget))


def dense_start_budget(
    lengths: Tensor, fractions: tuple[float | Tensor, ...], soft_topk_ratio: float, progress: Tensor
) -> Tensor:
    """What the weights of a row sum to during a dense start: from `DENSE_SHARE` of its tokens at progress 0, in equal
    factors, to the soft top-k of the router's own budget at progress 1.

    Args:
        lengths: int64 [batch], real tokens of each row.
        fractions: the budget's fraction of each router; fp32 [batch] where it differs from row to row.
        soft_topk_ratio: size of the soft top-k over the budget.
        progress: fp32 [], from 0 to 1.

    Returns:
        fp32 [routers * batch], one router's rows after another's.
    """
    shares = [DENSE_SHARE * (fraction * soft_topk_ratio / DENSE_SHARE) ** progress for fraction in fractions]
    return torch.cat([lengths * share for share in shares])


def real_lengths(states: Tensor, mask: Tensor | None) -> Tensor:
    """How many real tokens each row of states [batch, n, d_model] has, int64 [batch]."""
    if mask is not None:
        return mask.sum(-1)
    return torch.full((states.shape[0],), states.shape[1], dtype=torch.int64, device=states.device)


def memory_slots(num_tokens: int | None, memory: Tensor) -> int:
    """The slots of each router that takes `num_tokens` tokens, None for all, of a memory [batch, n, d_model], also for
    a symbolic n."""
    length = memory.shape[1]
    if num_tokens is None:
        return length
    if is_free(length):
        return computed_size(as_tensor(length).clamp(max=num_tokens), length)
    return smaller(length, num_tokens)
