"""Where a chunk's tokens stand in the windows of a causally routed decoder: by rank among the real tokens of a row."""

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_colt5 import CoLT5Config
from .run_backend import uses_triton
from .run_sizes import share_of


def _rows(index: Tensor, n: int) -> Tensor:
    """Entries [batch, k] of [batch, n, ...] as rows of [batch * n, ...]."""
    return index + torch.arange(index.shape[0], device=index.device)[:, None] * n


def _take_rows(states: Tensor, rows: Tensor) -> Tensor:
    """Rows int64 [batch, k] of all the rows of [batch, n, ...] → [batch, k, ...]."""
    return states.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, *states.shape[2:])


def _spread(mask: Tensor, dims: int) -> Tensor:
    """A mask for tensors of more dimensions."""
    return mask.view(*mask.shape, *[1] * (dims - mask.dim()))


def take(states: Tensor, index: Tensor) -> Tensor:
    """Entries `index` int64 [batch, k] of [batch, n, ...] → [batch, k, ...].

    Where the states have a gradient no two entries may be the same: CUDA would add theirs in no fixed order.
    """
    return _take_rows(states, _rows(index, states.shape[1]))


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
            return max(1, min(window, share_of(window, fraction)))

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
        return min(self.window, share_of(target, self.capacity_ratio))


@dataclass
class CausalPlan:
    """What all layers share in one forward pass over a chunk of tokens [batch, n].

    Everything inside the layers is in the order of ranks: `enter` moves a row's real tokens to its front, `leave` puts
    them back. The chunk's windows are those that its tokens fall into: window v of a row is the row's window
    `past // window + v`, and the row's first new token stands in window 0 at slot `past % window`.

    Args:
        settings: see there.
        length: n, the chunk's tokens, padding included.
        counts: int64 [batch], the chunk's real tokens.
        order: int64 [batch, n], positions of the real tokens in order, then of the padding; None without padding.
        rank: int64 [batch, n], the inverse permutation.
        past: int64 [batch], real tokens before the chunk; None where there are none, and no cache content.

    Attributes:
        ranks: int64 [batch, windows * window], the rank of every slot.
        total: int64 [batch], real tokens up to the end of the chunk.
        completed: int64 [batch], windows that the chunk completed, which is where each row's next token falls.
        starts: int64 [batch * windows, 1], the rank of what the rows of routed tokens count from: the first of each
            window, or a step's token.
        own_slot: int64 [batch, 1], where a step's token stands in its row: 0.
        light_mask: bool, which of the chunk's tokens, and of the `local_radius` before it where it has a past, there
            are; None for all.
    """

    settings: CausalSettings
    length: int
    counts: Tensor
    order: Tensor | None = None
    rank: Tensor | None = None
    past: Tensor | None = None
    ranks: Tensor = field(init=False)
    total: Tensor = field(init=False)
    completed: Tensor = field(init=False)
    starts: Tensor = field(init=False)
    light_mask: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        window, radius, device = self.settings.window, self.settings.radius, self.counts.device
        slots = torch.arange(self.num_windows * window, device=device)
        if self.past is None:
            self.ranks, self.total = slots.expand(len(self.counts), -1), self.counts
            self.completed = self.total // window
            if self.order is not None:
                self.light_mask = torch.arange(self.length, device=device) < self.counts[:, None]
        else:
            offset = self.past % window
            first = self.past - offset
            self.ranks, self.total = first[:, None] + slots, self.past + self.counts
            self.completed = (self.total - first) // window
            steps = torch.arange(-radius, self.length, device=device)
            recent = self.past[:, None] + steps
            # slots of no token yet are before rank 0, or behind the row's last real one
            self.light_mask = (recent >= 0) & (recent < self.total[:, None])
            # what the methods below take is the same for all layers
            self._new = _rows((slots - offset[:, None]).clamp(0, self.length - 1), self.length)
            self._back = _rows(torch.arange(self.length, device=device) + offset[:, None], len(slots))
            self._framed, self._recent = self._joined_rows(self.ranks), self._joined_rows(recent)
            self._moved = self.completed > 0
            ring_slots, ranks = self._ring_ranks()
            if self.is_step:
                self._slot = (ring_slots == (self.total[:, None] - 1) % self.ring_size) & (self.counts[:, None] > 0)
            else:
                self._handed = _rows(self._handing(), self.num_windows + 1)
                self._advanced = self._joined_rows(torch.where(ranks < 0, ring_slots, ranks))
        self.starts = self.ranks.reshape(len(self.counts) * self.num_windows, window)[:, :1]
        if self.is_step and self.past is not None:
            self.starts = self.past[:, None]
            self.own_slot = torch.zeros_like(self.starts)

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
        tensors = {part.name: getattr(self, part.name) for part in fields(self) if part.init}
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
    def ring_size(self) -> int:
        """R, the recent tokens that a cache keeps."""
        return 2 * self.settings.window + self.settings.radius

    def enter(self, states: Tensor) -> Tensor:
        """[batch, n, ...] by position → by rank."""
        return states if self.order is None else take(states, self.order)

    def leave(self, states: Tensor) -> Tensor:
        """[batch, n, ...] by rank → by position."""
        return states if self.rank is None else take(states, self.rank)

    def frame(self, states: Tensor) -> Tensor:
        """New tokens by rank [batch, n, ...] → slots of windows [batch, windows * window, ...]; other slots hold
        anything finite."""
        if self.past is not None:
            return _take_rows(states, self._new)
        slots = self.num_windows * self.settings.window
        if slots == self.length:
            return states
        return F.pad(states, (0, 0) * (states.dim() - 2) + (0, slots - self.length))

    def unframe(self, states: Tensor) -> Tensor:
        """Slots of windows [batch, windows * window, ...] → new tokens by rank [batch, n, ...]."""
        if self.past is not None:
            return _take_rows(states, self._back)
        return states if states.shape[1] == self.length else states[:, : self.length]

    def join(self, ring: Tensor | None, states: Tensor) -> Tensor:
        """The ring of a cache and the chunk's tokens by rank, in one tensor for `frame_joined`, `recent` and
        `advance_ring`; without a past the tokens alone."""
        if ring is None:
            return states
        states = states.to(ring.dtype)
        if self.is_step:
            # the ring has room for one token, in the place of one that is no longer read
            return torch.where(_spread(self._slot, ring.dim()), states, ring)
        return torch.cat([ring, states], 1)

    def frame_joined(self, joined: Tensor) -> Tensor:
        """As `frame`, with window 0's earlier tokens in their slots."""
        return self.frame(joined) if self.past is None else _take_rows(joined, self._framed)

    def recent(self, joined: Tensor) -> Tensor:
        """The `local_radius` tokens before the chunk, then the chunk's, by rank: [batch, radius + n, ...]."""
        return joined if self.past is None else _take_rows(joined, self._recent)

    def advance_ring(self, joined: Tensor) -> Tensor:
        """The ring [batch, R, ...] after the chunk; a slot that no token has reached holds anything finite."""
        if self.past is None:
            return take(joined, self._ring_ranks()[1].clamp(0, self.length - 1))
        return joined if self.is_step else _take_rows(joined, self._advanced)

    def _ring_ranks(self) -> tuple[Tensor, Tensor]:
        """The ring's slots, and the rank of each slot's token after the chunk, below 0 for none: int64 [batch, R]."""
        slots = torch.arange(self.ring_size, device=self.counts.device)
        last = self.total[:, None] - 1
        return slots, last - (last - slots) % self.ring_size

    def _joined_rows(self, ranks: Tensor) -> Tensor:
        """Where the tokens with these ranks [batch, k] stand in what `join` gives, as rows of all of it."""
        assert self.past is not None
        index = ranks % self.ring_size
        if self.is_step:
            return _rows(index, self.ring_size)
        new = (ranks - self.past[:, None]).clamp(max=self.length - 1)
        return _rows(torch.where(new >= 0, self.ring_size + new, index), self.ring_size + self.length)

    def _handing(self) -> Tensor:
        """Of the chunk's windows and the one after: that of each row's next token, and the one before; [batch, 2]."""
        now = self.completed[:, None]
        return torch.cat([now, (now - 1).clamp(min=0)], 1)

    def advance_counters(self, counters: dict[str, Tensor], mask: Tensor | None) -> dict[str, Tensor]:
        """The cache's counters after the chunk, whose mask is bool [batch, n]; see `run_causal_cache`."""
        window = self.settings.window
        batch = self.counts.shape[0]
        real = self.counts.new_ones(batch, self.length, dtype=torch.bool) if mask is None else mask
        recent = counters["recent"] if counters else real.new_zeros(batch, self.ring_size)
        floor = counters["floor"] if counters else torch.zeros_like(self.counts)
        # the window before the current one starts here
        start = (self.total // window - 1).clamp(min=0) * window
        return {
            "lengths": self.total,
            "floor": torch.where(self.completed > 0, start, floor),
            "recent": torch.cat([recent, real], 1)[:, -self.ring_size :],
        }

    def handed(self, values: Tensor) -> Tensor:
        """What complete windows hand on, after the chunk: [batch, windows + 1, ...], what each of its windows, and the
        one after, is handed → [batch, 2, ...], for each row's current window and the one before; of a step the last
        alone, [batch, 1, ...], as all else is in the cache."""
        if self.past is None:
            return take(values, self._handing())
        return values[:, 1:] if self.is_step else _take_rows(values, self._handed)

    def keep_carried(self, carried: Tensor | None, handed: Tensor) -> Tensor:
        """`carried` [batch, 2, ...] of a cache after the chunk, given what `handed` gives; None at the beginning."""
        if carried is None:
            return handed
        moved = _spread(self._moved, handed.dim())
        if self.is_step:
            return torch.where(moved, torch.cat([handed, carried[:, :1]], 1), carried)
        before = torch.where(moved, handed[:, 1:], carried[:, 1:])
        return torch.cat([handed[:, :1], before], 1)
