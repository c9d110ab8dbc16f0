"""What all encoder layers share in one forward pass: the mask, the routers' budgets, and who computes."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .configuration_colt5 import CoLT5Config
from .run_backend import backend_of, is_capturing
from .run_graphs import graph_stream
from .run_sizes import as_tensor, computed_size, is_free, routed_budget, routed_capacity, smaller

# the share of its tokens that a row's weights sum to when a dense start begins
DENSE_SHARE = 0.9


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

    def to(self, device: torch.device, non_blocking: bool = False) -> "RoutingBudget":
        """The same on another device."""

        def moved(part: torch.Tensor | None) -> torch.Tensor | None:
            return None if part is None else part.to(device, non_blocking=non_blocking)

        budget = self.budget.to(device, non_blocking=non_blocking)
        return RoutingBudget(budget, self.capacities, moved(self.mask), moved(self.soft_budget))


def route_settings(config: CoLT5Config, kernel_backend: str) -> dict[str, Any]:
    """The keywords of `route` that a configuration gives."""
    return {
        "soft_topk_ratio": config.soft_topk_ratio,
        "epsilon": config.routing_epsilon,
        "solver": config.soft_topk_solver,
        "num_iterations": config.num_soft_topk_iterations,
        "epsilon_init": config.routing_epsilon_init,
        "epsilon_decay": config.routing_epsilon_decay,
        "kernel_backend": kernel_backend,
    }


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


def memory_slots(config: CoLT5Config, memory: torch.Tensor) -> int:
    """The slots of each router of routed cross-attention to a memory [batch, n, d_model], also for a symbolic n."""
    length, budget = memory.shape[1], config.routed_cross_key_values
    if budget is None:
        return length
    return computed_size(as_tensor(length).clamp(max=budget), length) if is_free(length) else smaller(length, budget)


@dataclass
class RoutingPlan:
    """What all layers share in one forward pass: which tokens are real, the routers' budgets, and who computes.

    Args:
        mask: bool [batch, n], True for real tokens; None for all.
        kernel_backend: "triton" or "torch".
        fused_attention: whether fused kernels stand in for "sdpa"; "eager" is for those who want to see the weights.
        settings: of the soft top-k, the keywords of `route`. Like the two before, read off the configuration once for
            all layers: Transformers' configurations are slow to read.
        attention: the budgets of queries and of keys/values; None with `routing="none"`.
        feed_forward: the budget of the feed-forward; None with `routing="none"`.
        dense_start: fp32 [], how far a dense start has come; None for the paper's routing.
        merges_late: whether blocks return their hidden states alone, and in parts, for the next norm to sum.
        side: the stream that heavy branches run on next to the light ones, while a CUDA graph is captured; None
            elsewhere, where switching streams would cost the host more than it saves.
    """

    mask: torch.Tensor | None
    kernel_backend: str
    fused_attention: bool
    settings: dict[str, Any] = field(default_factory=dict)
    attention: RoutingBudget | None = None
    feed_forward: RoutingBudget | None = None
    dense_start: torch.Tensor | None = None
    merges_late: bool = False
    side: torch.cuda.Stream | None = None

    @classmethod
    def make(
        cls,
        config: CoLT5Config,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None,
        dense_start: torch.Tensor | None = None,
    ) -> "RoutingPlan":
        """The plan for a batch [batch, n, d_model]: a row's budgets depend on its own number of real tokens.

        `dense_start` is fp32 [], how far a dense start has come; None for the paper's routing.
        """
        kernel_backend = backend_of(hidden_states, config.kernel_backend)
        plan = cls(mask, kernel_backend, kernel_backend == "triton" and config._attn_implementation == "sdpa")
        if config.routing == "none":
            return plan
        plan.settings = route_settings(config, kernel_backend)
        (batch, length), minimum = hidden_states.shape[:2], config.min_routed_tokens
        query, key_value = config.routed_query_fraction, config.routed_key_value_fraction
        feed_forward = config.routed_feed_forward_fraction
        if config.routing == "learned" and dense_start is not None:
            plan.dense_start = dense_start
            plan.attention, plan.feed_forward = (
                RoutingBudget.of_dense_start(hidden_states, mask, fractions, config.soft_topk_ratio, dense_start)
                for fractions in ((query, key_value), (feed_forward,))
            )
            return plan
        # routers of one fraction share their budget
        each = dict.fromkeys((query, key_value, feed_forward))
        capacities = {fraction: routed_capacity(length, fraction, minimum) for fraction in each}
        if mask is None:
            # what `routed_budget` says of whole rows, without its launches
            shape, device = (batch,), hidden_states.device
            budgets = {fraction: torch.full(shape, capacities[fraction], device=device) for fraction in each}
        else:
            lengths = mask.sum(-1)
            budgets = {fraction: routed_budget(lengths, fraction, minimum) for fraction in each}

        def budget(*fractions: float) -> RoutingBudget:
            parts = [budgets[fraction] for fraction in fractions]
            return RoutingBudget(
                torch.cat(parts) if len(parts) > 1 else parts[0],
                tuple(capacities[fraction] for fraction in fractions),
                # of one row no copy
                None if mask is None else mask.expand(len(parts), -1, -1).flatten(0, 1),
            )

        if hidden_states.is_cuda and not torch.is_grad_enabled() and is_capturing():
            plan.side = graph_stream(hidden_states.device, 1)
        plan.attention = budget(query, key_value)
        plan.feed_forward = budget(feed_forward)
        return plan

    def heavy(self) -> AbstractContextManager:
        """Inside, a sublayer's heavy branch: from its routers on, it may run next to what comes after until `join`.

        What it reads must live until then.
        """
        if self.side is None:
            return nullcontext()
        self.side.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.side)

    def join(self) -> None:
        """Wait for the heavy branch."""
        if self.side is not None:
            torch.cuda.current_stream().wait_stream(self.side)

    @classmethod
    def for_memory(
        cls,
        config: CoLT5Config,
        memory: torch.Tensor,
        mask: torch.Tensor | None,
        num_routers: int,
        dense_start: torch.Tensor | None = None,
    ) -> tuple["RoutingPlan", RoutingBudget]:
        """The plan and the budget of all routers of routed cross-attention to a memory [batch, n, d_model]: each takes
        `routed_cross_key_values` of a row's real tokens, or all where the row has no more.

        `dense_start` is fp32 [], how far a dense start has come, in which all are taken; None for the budget.
        """
        kernel_backend = backend_of(memory, config.kernel_backend)
        plan = cls(mask, kernel_backend, False, route_settings(config, kernel_backend), dense_start=dense_start)
        slots, lengths = memory_slots(config, memory), real_lengths(memory, mask)
        if dense_start is not None:
            fraction = lengths.clamp(max=slots) / lengths.clamp(min=1)
            fractions = (fraction,) * num_routers
            return plan, RoutingBudget.of_dense_start(memory, mask, fractions, config.soft_topk_ratio, dense_start)
        return plan, RoutingBudget(
            lengths.clamp(max=slots).repeat(num_routers),
            (slots,) * num_routers,
            None if mask is None else mask.expand(num_routers, -1, -1).flatten(0, 1),
        )

    def to(self, device: torch.device, non_blocking: bool = False) -> "RoutingPlan":
        """The same on another device; Accelerate calls it where a device map spreads the blocks."""

        def moved(part: Any) -> Any:
            return part if part is None else part.to(device, non_blocking=non_blocking)

        parts = {name: moved(getattr(self, name)) for name in ("mask", "attention", "feed_forward", "dense_start")}
        return replace(self, **parts)
