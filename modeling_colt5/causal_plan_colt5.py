"""Where a chunk's tokens stand in the windows of a causally routed decoder: by rank among the real tokens of a row."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_colt5 import CoLT5Config
from .kernel_backend import uses_triton


def take(states: Tensor, index: Tensor) -> Tensor:
    """Entries `index` int64 [batch, k] of [batch, n, ...] → [batch, k, ...]."""
    first = torch.arange(index.shape[0], device=index.device)[:, None] * states.shape[1]
    return states.flatten(0, 1).index_select(0, (index + first).flatten()).view(*index.shape, *states.shape[2:])


@dataclass
class CausalSettings:
    """What the causal layers read off the configuration, once a pass: Transformers' configurations are slow to read.

    Args:
        window: tokens of a window.
        radius: tokens that the light attention looks back.
        pool_size: keys/values that a window's heavy attention reads.
        num_queries, num_feed_forward: tokens that a window routes on average.
        capacity_ratio: how many more it may route at most.
        soft_topk_ratio, epsilon: of the soft top-k.
        kernel_backend: "triton" or "torch".
        fused_attention: whether fused kernels stand in for "sdpa".
    """

    window: int
    radius: int
    pool_size: int
    num_queries: int
    num_feed_forward: int
    capacity_ratio: float
    soft_topk_ratio: float
    epsilon: float
    kernel_backend: str
    fused_attention: bool

    @classmethod
    def make(cls, config: CoLT5Config, hidden_states: Tensor) -> "CausalSettings":
        """The settings for a batch, whose device and dtype choose the kernels."""
        kernel_backend = "triton" if uses_triton(hidden_states, config.kernel_backend) else "torch"
        window = config.causal_window

        def target(fraction: float) -> int:
            return max(1, min(window, math.ceil(fraction * window - 1e-6)))

        return cls(
            window=window,
            radius=config.local_radius,
            pool_size=config.causal_routed_keys,
            num_queries=target(config.routed_query_fraction),
            num_feed_forward=target(config.routed_feed_forward_fraction),
            capacity_ratio=config.causal_capacity_ratio,
            soft_topk_ratio=config.soft_topk_ratio,
            epsilon=config.routing_epsilon,
            kernel_backend=kernel_backend,
            fused_attention=kernel_backend == "triton" and config._attn_implementation == "sdpa",
        )

    def capacity(self, target: int) -> int:
        """The most tokens that a window routes, given how many it routes on average."""
        return min(self.window, math.ceil(self.capacity_ratio * target - 1e-6))


@dataclass
class CausalPlan:
    """What all layers share in one forward pass over a chunk of tokens [batch, n].

    Everything inside the layers is in the order of ranks: `enter` moves a row's real tokens to its front, `leave` puts
    them back. The chunk's windows are those that its tokens fall into: window v of a row is the row's window
    `first_window + v`, and the row's first new token stands in window 0 at slot `offset`.

    Args:
        settings: see there.
        length: n, the chunk's tokens, padding included.
        counts: int64 [batch], the chunk's real tokens.
        order: int64 [batch, n], positions of the real tokens in order, then of the padding; None without padding.
        rank: int64 [batch, n], the inverse permutation.
        past: int64 [batch], real tokens before the chunk; None where there are none, and no cache content.
    """

    settings: CausalSettings
    length: int
    counts: Tensor
    order: Tensor | None = None
    rank: Tensor | None = None
    past: Tensor | None = None

    @classmethod
    def make(
        cls, config: CoLT5Config, hidden_states: Tensor, mask: Tensor | None, past: Tensor | None
    ) -> "CausalPlan":
        """The plan for a chunk [batch, n, d_model] with its mask, bool [batch, n] or None, and what came before."""
        batch, length = hidden_states.shape[:2]
        device = hidden_states.device
        settings = CausalSettings.make(config, hidden_states)
        if mask is None:
            counts = torch.full((batch,), length, dtype=torch.int64, device=device)
            return cls(settings, length, counts, past=past)
        counts = mask.sum(-1)
        if length == 1:
            return cls(settings, length, counts, past=past)
        padding_rank = counts[:, None] + (~mask).cumsum(-1)
        rank = torch.where(mask, mask.cumsum(-1), padding_rank) - 1
        order = torch.empty_like(rank).scatter_(1, rank, torch.arange(length, device=device).expand(batch, length))
        return cls(settings, length, counts, order, rank, past)

    def to(self, device: torch.device, non_blocking: bool = False) -> "CausalPlan":
        """The same on another device; Accelerate calls it where a device map spreads the blocks."""
        tensors = {part.name: getattr(self, part.name) for part in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in tensors.items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    @property
    def is_step(self) -> bool:
        """Whether the chunk is one token behind others, as in generation."""
        return self.past is not None and self.length == 1

    @property
    def num_windows(self) -> int:
        """Windows that the tokens of a row may fall into, whatever its offset."""
        unseen = 0 if self.past is None else self.settings.window - 1
        return -(-(unseen + self.length) // self.settings.window)

    @property
    def first_window(self) -> Tensor:
        """int64 [batch], number of each row's window 0."""
        return torch.zeros_like(self.counts) if self.past is None else self.past // self.settings.window

    @property
    def offset(self) -> Tensor:
        """int64 [batch], slot of the first new token in window 0."""
        return torch.zeros_like(self.counts) if self.past is None else self.past % self.settings.window

    @property
    def ranks(self) -> Tensor:
        """int64 [batch, windows * window], the rank of every slot."""
        slots = torch.arange(self.num_windows * self.settings.window, device=self.counts.device)
        return (self.first_window * self.settings.window)[:, None] + slots

    @property
    def total(self) -> Tensor:
        """int64 [batch], real tokens up to the end of the chunk."""
        return self.counts if self.past is None else self.past + self.counts

    @property
    def completed(self) -> Tensor:
        """int64 [batch], windows that the chunk completed, which is where each row's next token falls."""
        return self.total // self.settings.window - self.first_window

    def enter(self, states: Tensor) -> Tensor:
        """[batch, n, ...] by position → by rank."""
        return states if self.order is None else take(states, self.order)

    def leave(self, states: Tensor) -> Tensor:
        """[batch, n, ...] by rank → by position."""
        return states if self.rank is None else take(states, self.rank)

    def frame(self, states: Tensor) -> Tensor:
        """New tokens by rank [batch, n, ...] → slots of windows [batch, windows * window, ...]; other slots hold
        anything finite."""
        slots = self.num_windows * self.settings.window
        if self.past is None:
            if slots == self.length:
                return states
            return F.pad(states, (0, 0) * (states.dim() - 2) + (0, slots - self.length))
        index = torch.arange(slots, device=states.device) - self.offset[:, None]
        return take(states, index.clamp(0, self.length - 1))

    def unframe(self, states: Tensor) -> Tensor:
        """Slots of windows [batch, windows * window, ...] → new tokens by rank [batch, n, ...]."""
        if self.past is None:
            return states[:, : self.length]
        return take(states, torch.arange(self.length, device=states.device) + self.offset[:, None])

    def frame_with_past(self, ring: Tensor | None, states: Tensor) -> Tensor:
        """As `frame`, with what the ring holds of window 0's earlier tokens."""
        if ring is None or self.past is None:
            return self.frame(states)
        return self._from_ring(ring, states, self.ranks)

    def with_recent(self, ring: Tensor, states: Tensor, count: int) -> Tensor:
        """The `count` tokens before the chunk, then the chunk's, by rank: [batch, count + n, ...]."""
        assert self.past is not None
        steps = torch.arange(-count, self.length, device=states.device)
        return self._from_ring(ring, states, self.past[:, None] + steps)

    def _from_ring(self, ring: Tensor, states: Tensor, ranks: Tensor) -> Tensor:
        assert self.past is not None
        size = ring.shape[1]
        new = (ranks - self.past[:, None]).clamp(max=self.length - 1)
        index = torch.where(new >= 0, size + new, ranks % size)
        return take(torch.cat([ring, states.to(ring.dtype)], 1), index)

    def advance_ring(self, ring: Tensor | None, states: Tensor) -> Tensor:
        """The ring [batch, R, ...] after the chunk; a slot that no token has reached holds anything finite."""
        size = 2 * self.settings.window + self.settings.radius
        slots = torch.arange(size, device=states.device)
        last = self.total[:, None] - 1
        ranks = last - (last - slots) % size
        if ring is None or self.past is None:
            return take(states, ranks.clamp(0, self.length - 1))
        return self._from_ring(ring, states, torch.where(ranks < 0, slots, ranks))

    def advance_counters(self, counters: dict[str, Tensor], mask: Tensor | None) -> dict[str, Tensor]:
        """The cache's counters after the chunk, whose mask is bool [batch, n]; see `causal_cache_colt5`."""
        window = self.settings.window
        size = 2 * window + self.settings.radius
        batch = self.counts.shape[0]
        real = self.counts.new_ones(batch, self.length, dtype=torch.bool) if mask is None else mask
        recent = counters["recent"] if counters else real.new_zeros(batch, size)
        floor = counters["floor"] if counters else torch.zeros_like(self.counts)
        # the window before the current one starts here
        start = (self.total // window - 1).clamp(min=0) * window
        return {
            "lengths": self.total,
            "floor": torch.where(self.completed > 0, start, floor),
            "recent": torch.cat([recent, real], 1)[:, -size:],
        }

    def advance_carried(self, carried: Tensor | None, values: Tensor) -> Tensor:
        """What complete windows hand on, after the chunk.

        Args:
            carried: [batch, 2, ...], for the current window and the one before; None at the beginning.
            values: [batch, windows + 1, ...], what each of the chunk's windows, and the one after, is handed.
        """
        current = take(values, self.completed[:, None])
        before = take(values, (self.completed[:, None] - 1).clamp(min=0))
        if carried is not None:
            moved = (self.completed > 0).view(-1, *[1] * (carried.dim() - 1))
            before = torch.where(moved, before, carried[:, 1:])
        return torch.cat([current, before], 1)
