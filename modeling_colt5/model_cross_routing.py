"""Routed cross-attention: what every decoder layer reads of the encoder's output, or of any long memory."""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, EncoderDecoderCache, StaticLayer
from transformers.utils.generic import maybe_autocast

from .model_router import CoLT5Router, router_weights, run_routers
from .op_norm import router_scores
from .op_routing import RoutedTokens
from .op_rows import share_and_gather
from .run_budgets import RoutingBudget, memory_slots, real_lengths
from .run_plan import CrossSettings, Implementation, RouterPlan


def shorten_static_layers(cache: Cache, length: int) -> None:
    """Make a static cache's layers, which are sized for all of the encoder's output, no longer than what is routed."""
    for layer in cache.layers:
        if isinstance(layer, StaticLayer) and not layer.is_initialized:
            layer.max_cache_len = min(layer.max_cache_len, length)


class CoLT5CrossRouting(nn.Module):
    """The routers of all decoder layers, which score and route the memory together: it is the same for all of them.

    One pass over the memory gives all scores, and its gradient comes back in a chain, not in a tensor for each layer.
    The layers get routed rows alone, whatever devices they are on.

    Args:
        d_model: the memory's width.
        num_layers: layers that read it.
        num_routers: routers of each layer.
        routing: as of `CoLT5Router`.
        first_seed: of the first router; each other one has the next.
    """

    def __init__(
        self, d_model: int, num_layers: int, num_routers: int = 1, routing: str = "learned", first_seed: int = 0
    ):
        super().__init__()
        self.num_routers = num_routers
        self.routers = nn.ModuleList(
            CoLT5Router(d_model, routing, first_seed + i) for i in range(num_layers * num_routers)
        )
        self.dense_start: torch.Tensor | None = None

    @property
    def progress(self) -> torch.Tensor | None:
        """fp32 [], how far a dense start has come in this call; None for the configured budget."""
        return self.dense_start if self.training else None

    def forward(
        self,
        memory: torch.Tensor,
        mask: torch.Tensor | None,
        settings: CrossSettings,
        implementation: Implementation,
    ) -> tuple[list[torch.Tensor], tuple[tuple[RoutedTokens, ...], ...]]:
        """Choose what each layer's cross-attention reads: w ⊙ M[routed], as in the encoder's heavy attention.

        Args:
            memory: M, [batch, n, d_model], normalised.
            mask: bool [batch, n], True for real tokens; None for all.
            settings: of all layers.
            implementation: who computes.

        Returns:
            Each layer's rows [batch, routers * slots, d_model], one router's after another's, zeros at unused slots;
            and what each layer's routers chose.
        """
        routers: tuple[Any, ...] = tuple(self.routers)
        plan = RouterPlan.of(settings.soft_topk, implementation, memory, mask, self.progress)
        ratio = settings.soft_topk.ratio
        budget = RoutingBudget.of_memory(memory, mask, settings.num_tokens, len(routers), ratio, self.progress)
        weights, scores = router_weights(*routers), None
        if weights is not None:
            # Autocast would take the scores' product in half precision.
            with maybe_autocast(memory.device.type, enabled=False):
                scores = router_scores(memory, weights.view(len(routers), -1), plan.kernel_backend)
        routed = run_routers(routers, memory, scores, plan, budget)

        rows: list[torch.Tensor] = []
        for first in range(0, len(routed), 2):
            pair = [(tokens.indices, tokens.valid, tokens.weights) for tokens in routed[first : first + 2]]
            memory, *gathered = share_and_gather(memory, *pair, kernel_backend=plan.kernel_backend)
            rows += gathered
        layers = [slice(first, first + self.num_routers) for first in range(0, len(routed), self.num_routers)]
        states = [torch.cat(rows[layer], 1) if self.num_routers > 1 else rows[layer.start] for layer in layers]
        return states, tuple(tuple(routed[layer]) for layer in layers)

    def memories_of_layers(
        self,
        memory: torch.Tensor,
        mask: torch.Tensor | None,
        cache: Cache | None,
        settings: CrossSettings,
        implementation: Implementation,
    ) -> tuple[list[torch.Tensor], torch.Tensor | None, tuple[tuple[RoutedTokens, ...], ...] | None]:
        """What each layer's cross-attention reads, its mask, and what was routed; the arguments are those of
        `forward`, and the layers' cache.

        Layers whose keys and values the cache has already read nothing: they get the memory as it is.
        """
        num_layers = len(self.routers) // self.num_routers
        memories, routing, num_tokens = [memory] * num_layers, None, settings.num_tokens
        is_updated = cache.is_updated if isinstance(cache, EncoderDecoderCache) else {}
        if not all(is_updated.get(layer_idx) for layer_idx in range(num_layers)):
            memories, routing = self(memory, mask, settings, implementation)
            # A dense start, which is for training alone, routes more than the budget.
            if isinstance(cache, EncoderDecoderCache) and num_tokens is not None and not self.training:
                shorten_static_layers(cache.cross_attention_cache, num_tokens)
        # Without padding all slots are used, but a static cache may still have more.
        if mask is not None or cache is not None:
            mask = self.used_slots(memory, mask, num_tokens)
        return memories, mask, routing

    def used_slots(self, memory: torch.Tensor, mask: torch.Tensor | None, num_tokens: int | None) -> torch.Tensor:
        """Which slots hold a token, bool [batch, slots]: the same in all layers and routers, as used slots come first,
        and known from the memory's mask alone, so that it need not be kept with the cached keys and values."""
        number = memory.shape[1] if self.progress is not None else memory_slots(num_tokens, memory)
        slots = torch.arange(number, device=memory.device)
        return slots < real_lengths(memory, mask)[:, None]
