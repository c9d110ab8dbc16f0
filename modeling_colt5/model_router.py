"""The routers of a layer: what scores its tokens, and one operation that routes for all that read the same states."""

from functools import reduce
from itertools import chain
from numbers import Real
from typing import Any

import torch
from torch import nn
from transformers.integrations import use_kernel_forward_from_hub

from .op_routing import RoutedTokens, dense_start_weights, route
from .run_budgets import RoutingBudget, larger
from .run_plan import RouterPlan


@use_kernel_forward_from_hub("CoLT5Routing")
class CoLT5Routing(nn.Module):
    """The routing operation as a layer without weights, so that the package `kernels` can replace its forward."""

    def forward(
        self,
        scores: torch.Tensor,
        budget: torch.Tensor,
        capacity: int,
        mask: torch.Tensor | None,
        settings: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Indices, weights and valid [rows, capacity] of the routed tokens; arguments and results are `route`'s,
        `settings` its other keywords."""
        routed = route(scores, budget, capacity, mask=mask, **settings)
        return routed.indices, routed.weights, routed.valid


class CoLT5RoutingTriton(nn.Module):
    """What takes that forward's place: the Triton kernels, also where the configuration says "torch"."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        scores: torch.Tensor,
        budget: torch.Tensor,
        capacity: int,
        mask: torch.Tensor | None,
        settings: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `CoLT5Routing.forward`."""
        routed = route(scores, budget, capacity, mask=mask, **settings | {"kernel_backend": "triton"})
        return routed.indices, routed.weights, routed.valid


class TritonLayers:
    """A repository of layers as `kernels` understands it, here instead of on the Hub; see docs/operators.md."""

    def load(self) -> type[nn.Module]:
        """The layer."""
        return CoLT5RoutingTriton


def set_dense_start(network: nn.Module, progress: float | None) -> None:
    """Say how far the dense start of a network's routers has come, in models and in stand-alone modules.

    While a module is in training mode, every token takes its heavy branches, and its weight says how much of them it
    receives. At progress 0 the weights are near 1 and constant. Up to progress 1 they shrink until they sum to the
    budgets, and the routers have a gradient. In evaluation mode, and after None, routing is the paper's. Nothing of
    this is saved. `DenseStart` of dense_start.py has a schedule.

    Args:
        network: with routers of such modules somewhere inside.
        progress: from 0 to 1, or None to end the dense start.

    Raises:
        TypeError: for a progress of another type.
        ValueError: for a number outside of 0 to 1, or a network without a module that has a dense start.
    """
    if not isinstance(progress, Real | None):
        raise TypeError(f"progress is a {type(progress).__name__}; it must be None, or a number from 0 to 1")
    if progress is not None and not 0 <= progress <= 1:
        raise ValueError(f"progress is {progress}; it must be None, or a number from 0 to 1")
    parts: list[Any] = [module for module in network.modules() if "dense_start" in vars(module)]
    if not parts:
        raise ValueError(f"{type(network).__name__} has no routers that a dense start could train")
    for part in parts:
        # routers that cannot learn have no parameters of their own
        device = next(chain(part.parameters(), network.parameters())).device
        if progress is None:
            part.dense_start = None
        elif part.dense_start is None or part.dense_start.device != device:
            part.dense_start = torch.tensor(float(progress), device=device)
        else:
            # A captured step reads the tensor, so it is changed in place.
            part.dense_start.fill_(progress)


class CoLT5Router(nn.Module):
    """What scores the tokens of one heavy branch: a learned vector (Ainslie et al. 2023), or a control without one.

    Args:
        d_model: the states' width.
        routing: "learned", or the controls "random" and "even".
        seed: of the random control's order in evaluation.
    """

    def __init__(self, d_model: int, routing: str = "learned", seed: int = 0):
        super().__init__()
        self.routing = routing
        self.seed = seed
        self.select = CoLT5Routing()
        if self.routing == "learned":
            self.weight = nn.Parameter(torch.empty(d_model))

    def forward(self) -> torch.Tensor | None:
        """The learned vector [d_model], None for controls. It is got by a call, so that a hook can bring an offloaded
        vector."""
        return self.weight if self.routing == "learned" else None

    def control_scores(
        self, hidden_states: torch.Tensor, mask: torch.Tensor | None, budget: torch.Tensor
    ) -> torch.Tensor:
        """Scores whose largest are evenly spaced, or random: anew at each training step, and by a fixed order of
        positions in evaluation.

        Args:
            hidden_states: [batch, n, d_model], for its shape and device.
            mask: bool [batch, n], True for real tokens; None for all.
            budget: int64 [batch].

        Returns:
            fp32 [batch, n].
        """
        batch, length = hidden_states.shape[:2]
        device = hidden_states.device
        if self.routing == "random" and self.training:
            return torch.rand(batch, length, device=device)
        # Tokens count by rank among the real ones, so that padding changes nothing.
        if mask is None:
            rank = torch.arange(length, device=device).expand(batch, length)
            real = torch.full((batch, 1), length, device=device)
        else:
            rank, real = mask.cumsum(-1) - 1, mask.sum(-1, keepdim=True).clamp(min=1)
        if self.routing == "even":
            budget = budget[:, None]
            return ((rank + 1) * budget // real > rank * budget // real).float()
        # This is Knuth's multiplicative hashing, twice, with a shift between that mixes the high bits down.
        hashed = (rank + 1 + self.seed * 7919) * 2654435761 % 2**32
        hashed = (hashed ^ (hashed >> 15)) * 2246822519 % 2**32
        # fp32 holds the upper 24 bits exactly.
        return (hashed >> 8).float()


def router_weights(*routers: CoLT5Router) -> torch.Tensor | None:
    """The routers' vectors [routers, d_model], [d_model] of a single one; None for controls."""
    if routers[0].routing != "learned":
        return None
    vectors = [router() for router in routers]
    return torch.cat(vectors).view(len(vectors), -1) if len(vectors) > 1 else vectors[0]


def run_routers(
    routers: tuple[Any, ...],
    hidden_states: torch.Tensor,
    scores: torch.Tensor | None,
    plan: RouterPlan,
    budget: RoutingBudget,
) -> list[RoutedTokens]:
    """Route for all routers that read the same states, in one operation.

    Args:
        routers: the routers.
        hidden_states: [batch, n, d_model], for the controls' shape and device.
        scores: ⟨normalised states, each router's vector⟩ in fp32, [batch, routers, n]; None for controls.
        plan: the batch's mask and backend.
        budget: these routers' budgets.

    Returns:
        Each router's tokens, in rows [batch]; the controls' weights are 1.
    """
    learned = scores is not None
    if scores is None:
        budgets = budget.budget.view(len(routers), -1)
        kinds = zip(routers, budgets, strict=True)
        scores = torch.stack([router.control_scores(hidden_states, plan.mask, b) for router, b in kinds], 1)
    slots, select = reduce(larger, budget.capacities), routers[0].select
    if len(routers) > 1 and plan.kernel_backend == "triton" and isinstance(slots, int):
        # Each router's part then begins where kernels may read 16 bytes at once, and is launched without inspection.
        slots += -slots % 16
    rows = scores.transpose(0, 1).flatten(0, 1)
    if plan.dense_start is None:
        indices, weights, valid = select(rows, budget.budget, slots, budget.mask, plan.settings)
    else:
        settings = plan.settings | {"soft_budget": budget.soft_budget}
        indices, weights, valid = select(rows.detach(), budget.budget, slots, budget.mask, settings)
        own_scores = rows.gather(1, indices).masked_fill(~valid, 0)
        weights = dense_start_weights(weights, own_scores, settings["epsilon"], plan.dense_start)
    if not learned:
        weights = valid.to(weights.dtype)
    if len(routers) == 1:
        return [RoutedTokens(indices, weights, valid)]
    sizes = [hidden_states.shape[0]] * len(routers)
    tokens = []
    for capacity, *own in zip(
        budget.capacities, *(part.split_with_sizes(sizes) for part in (indices, weights, valid)), strict=True
    ):
        if not isinstance(capacity, int) or capacity != slots:
            # Used slots come first, so that a router with fewer slots than the largest has all of its own at the
            # front. The copy lies side by side, as all kernels read it.
            own = [part.narrow(1, 0, capacity).contiguous() for part in own]
        tokens.append(RoutedTokens(*own))
    return tokens
