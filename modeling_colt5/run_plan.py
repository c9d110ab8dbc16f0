"""What all layers share in one forward pass: the mask, the routers' budgets, and who computes and how."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from .configuration_colt5 import CoLT5Config
from .kernel_backend import Mode, backend_of
from .run_budgets import RoutingBudget
from .run_graphs import graph_stream


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


@dataclass
class RouterPlan:
    """What routers need to know of a pass. It is read off the configuration once for all layers, as Transformers'
    configurations are slow to read.

    Args:
        mask: bool [batch, n], True for real tokens; None for all.
        kernel_backend: "triton" or "torch".
        settings: of the soft top-k, the keywords of `route`.
        dense_start: fp32 [], how far a dense start has come; None for the paper's routing.
    """

    mask: torch.Tensor | None
    kernel_backend: str
    settings: dict[str, Any]
    dense_start: torch.Tensor | None

    @classmethod
    def of(
        cls, config: CoLT5Config, states: torch.Tensor, mask: torch.Tensor | None, dense_start: torch.Tensor | None
    ) -> "RouterPlan":
        """The plan for states [batch, n, d_model], whose device and dtype choose the kernels."""
        backend = backend_of(states, config.kernel_backend)
        return RouterPlan(mask, backend, route_settings(config, backend), dense_start)


@dataclass
class EncoderPlan(RouterPlan):
    """What all encoder layers share in one forward pass.

    Args:
        fused_attention: whether fused kernels stand in for "sdpa"; "eager" is for those who want to see the weights.
        mode: how PyTorch runs the pass.
        attention: the budgets of queries and of keys/values; None with `routing="none"`.
        feed_forward: the budget of the feed-forward; None with `routing="none"`.
        straight: what the straight lines of kernels have in common (`StraightPass` of layer_encoder.py), where plain
            blocks may run as such; None where all run as modules.
        side: the stream that heavy branches run on next to the light ones, while a CUDA graph is captured; None
            elsewhere, where switching streams would cost the host more than it saves.
    """

    fused_attention: bool
    mode: Mode
    attention: RoutingBudget | None = None
    feed_forward: RoutingBudget | None = None
    straight: Any = None
    side: torch.cuda.Stream | None = None

    @classmethod
    def make(
        cls,
        config: CoLT5Config,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None,
        dense_start: torch.Tensor | None = None,
    ) -> "EncoderPlan":
        """The plan for a batch [batch, n, d_model]: a row's budgets depend on its own number of real tokens.

        `dense_start` is fp32 [], how far a dense start has come; None for the paper's routing.
        """
        dense_start = dense_start if config.routing == "learned" else None
        routers = RouterPlan.of(config, hidden_states, mask, dense_start)
        fused = routers.kernel_backend == "triton" and config._attn_implementation == "sdpa"
        plan = cls(**vars(routers), fused_attention=fused, mode=Mode.of_now(hidden_states))
        if config.routing == "none":
            return plan
        kinds = (
            (config.routed_query_fraction, config.routed_key_value_fraction),
            (config.routed_feed_forward_fraction,),
        )
        if dense_start is not None:
            plan.attention, plan.feed_forward = (
                RoutingBudget.of_dense_start(hidden_states, mask, fractions, config.soft_topk_ratio, dense_start)
                for fractions in kinds
            )
            return plan
        plan.attention, plan.feed_forward = RoutingBudget.of_fractions(
            hidden_states, mask, config.min_routed_tokens, *kinds
        )
        if plan.mode.is_captured and not plan.mode.keeps_gradients:
            plan.side = graph_stream(hidden_states.device, 1)
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

    def to(self, device: torch.device, non_blocking: bool = False) -> "EncoderPlan":
        """The same on another device; Accelerate calls it where a device map spreads the blocks."""

        def moved(part: Any) -> Any:
            return part if part is None else part.to(device, non_blocking=non_blocking)

        parts = {name: moved(getattr(self, name)) for name in ("mask", "attention", "feed_forward", "dense_start")}
        return replace(self, **parts)
