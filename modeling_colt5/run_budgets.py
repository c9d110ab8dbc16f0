"""How many tokens the routers of a batch take: by fractions, of a memory, and during a dense start."""

from dataclasses import dataclass

import torch

from .run_sizes import as_tensor, computed_size, is_free, routed_budget, routed_capacity, smaller

# When a dense start begins, a row's weights sum to this share of its tokens.
DENSE_SHARE = 0.9


def _repeated(mask: torch.Tensor | None, routers: int) -> torch.Tensor | None:
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

    budget: torch.Tensor
    capacities: tuple[int, ...]
    mask: torch.Tensor | None
    soft_budget: torch.Tensor | None = None

    @classmethod
    def of_fractions(
        cls, states: torch.Tensor, mask: torch.Tensor | None, minimum: int, *kinds: tuple[float, ...]
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
        memory: torch.Tensor,
        mask: torch.Tensor | None,
        num_tokens: int | None,
        num_routers: int,
        soft_topk_ratio: float,
        dense_start: torch.Tensor | None,
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
        states: torch.Tensor,
        mask: torch.Tensor | None,
        fractions: tuple[float | torch.Tensor, ...],
        soft_topk_ratio: float,
        progress: torch.Tensor,
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

        def repeated(part: torch.Tensor | None) -> torch.Tensor | None:
            return None if part is None else part.repeat_interleave(times, 0)

        budget = self.budget.repeat_interleave(times, 0)
        return RoutingBudget(budget, self.capacities, repeated(self.mask), repeated(self.soft_budget))

    def to(self, device: torch.device, non_blocking: bool = False) -> "RoutingBudget":
        """The same on another device."""

        def moved(part: torch.Tensor | None) -> torch.Tensor | None:
            return None if part is None else part.to(device, non_blocking=non_blocking)

        budget = self.budget.to(device, non_blocking=non_blocking)
        return RoutingBudget(budget, self.capacities, moved(self.mask), moved(self.soft_budget))


def dense_start_budget(
    lengths: torch.Tensor, fractions: tuple[float | torch.Tensor, ...], soft_topk_ratio: float, progress: torch.Tensor
) -> torch.Tensor:
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


def real_lengths(states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """How many real tokens each row of states [batch, n, d_model] has, int64 [batch]."""
    if mask is not None:
        return mask.sum(-1)
    return torch.full((states.shape[0],), states.shape[1], dtype=torch.int64, device=states.device)


def memory_slots(num_tokens: int | None, memory: torch.Tensor) -> int:
    """The slots of each router that takes `num_tokens` tokens, None for all, of a memory [batch, n, d_model], also for
    a symbolic n."""
    length = memory.shape[1]
    if num_tokens is None:
        return length
    if is_free(length):
        return computed_size(as_tensor(length).clamp(max=num_tokens), length)
    return smaller(length, num_tokens)
