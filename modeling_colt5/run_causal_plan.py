"""Where a call's tokens stand in the windows of a causally routed decoder: by rank among the real tokens of a row.

A call has a whole sequence, a chunk of tokens after earlier ones, or one token after them: three classes with one
interface, so that a layer does not ask which of them it has.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .op_attention import bias_of_sequence
from .op_routing import RoutedTokens
from .run_budgets import share_of
from .run_plan import Implementation, check_fractions, check_numbers


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

    Where the states have a gradient no two entries may be the same: CUDA would add their gradients in no fixed order.
    """
    return _take_rows(states, _rows(index, states.shape[1]))


@dataclass(frozen=True)
class CausalSettings:
    """What all causally routed layers have in common, whatever the batch.

    Args:
        window: tokens of a window.
        radius: tokens that the light attention looks back.
        pool_size: keys/values that a window's heavy attention reads.
        query_fraction, feed_forward_fraction: shares of a window's tokens that are routed on average.
        capacity_ratio: the most that a window may route, divided by the average.
        soft_topk_ratio, epsilon: of the soft top-k.

    Raises:
        ValueError: for a share or a number out of its range.
    """

    window: int
    radius: int
    pool_size: int
    query_fraction: float
    feed_forward_fraction: float
    capacity_ratio: float
    soft_topk_ratio: float
    epsilon: float

    def __post_init__(self) -> None:
        check_fractions(query_fraction=self.query_fraction, feed_forward_fraction=self.feed_forward_fraction)
        check_numbers(window=(self.window, 1), radius=(self.radius, 0), pool_size=(self.pool_size, 1))
        if not self.capacity_ratio >= 1:
            raise ValueError(f"capacity_ratio is {self.capacity_ratio}; it must be at least 1")

    @property
    def num_queries(self) -> int:
        """Queries of the heavy attention that a window routes on average."""
        return self._target(self.query_fraction)

    @property
    def num_feed_forward(self) -> int:
        """Tokens of the heavy feed-forward that a window routes on average."""
        return self._target(self.feed_forward_fraction)

    def _target(self, fraction: float) -> int:
        return max(1, min(self.window, share_of(self.window, fraction)))

    def capacity(self, target: int) -> int:
        """The most tokens that a window routes, given how many it routes on average."""
        return min(self.window, share_of(target, self.capacity_ratio))


@dataclass
class CausalPlan(ABC):
    """What all layers share in one forward pass over tokens [batch, n].

    Everything inside the layers is in the order of ranks: `enter` moves a row's real tokens to its front, `leave` puts
    them back. The plan's windows are those that its tokens fall into: window v of a row is the row's window
    `past // window + v`, and the row's first new token stands in window 0 at slot `past % window`.

    A cache keeps a ring of each row's latest tokens. What `join` makes of a ring and the new tokens is for
    `frame_joined`, `pooled`, `recent` and `advance_ring`.

    Args:
        settings: see there.
        implementation: who computes, decided for the pass.
        length: n, the new tokens, padding included.
        counts: int64 [batch], the new real tokens.
        order: int64 [batch, n], positions of the real tokens in order, then of the padding; None without padding.
        rank: int64 [batch, n], the inverse permutation.
        past: int64 [batch], real tokens before the new ones; None for a whole sequence.
        dense_start: fp32 [], how far a dense start has come, of whole sequences alone; None for the budgets.

    Attributes:
        ranks: int64 [batch, windows * window], the rank of every slot.
        total: int64 [batch], real tokens up to the end of the new ones.
        completed: int64 [batch], windows that the new tokens completed, which is where each row's next token falls.
        starts: int64, the rank of what the rows of routed tokens count from: [batch * windows, 1], the first of each
            window, or of one token [batch, 1], itself.
        light_mask: bool, which tokens there are of those that `recent` gives; None for all.
        num_before: how many of those come before the new ones.
        is_one_token: whether there is one new token, which attends without windows or bands.
    """

    settings: CausalSettings
    implementation: Implementation
    length: int
    counts: Tensor
    order: Tensor | None
    rank: Tensor | None
    past: Tensor | None
    dense_start: Tensor | None
    ranks: Tensor = field(init=False)
    total: Tensor = field(init=False)
    completed: Tensor = field(init=False)
    starts: Tensor = field(init=False)
    light_mask: Tensor | None = field(init=False)
    num_before = 0
    is_one_token = False

    @staticmethod
    def make(
        settings: CausalSettings,
        implementation: Implementation,
        hidden_states: Tensor,
        mask: Tensor | None,
        past: Tensor | None,
        dense_start: Tensor | None = None,
    ) -> "CausalPlan":
        """The plan for new tokens [batch, n, d_model] with their mask, bool [batch, n] or None, and what came before:
        int64 [batch], real tokens, or None where there is no cache or an empty one. `dense_start` is fp32 [], how far
        a dense start has come, for calls without a cache."""
        batch, length = hidden_states.shape[:2]
        device = hidden_states.device
        order = rank = None
        if mask is None:
            counts = torch.full((batch,), length, dtype=torch.int64, device=device)
        else:
            counts = mask.sum(-1)
            if length > 1:
                padding_rank = counts[:, None] + (~mask).cumsum(-1)
                rank = torch.where(mask, mask.cumsum(-1), padding_rank) - 1
                positions = torch.arange(length, device=device).expand(batch, length)
                order = torch.empty_like(rank).scatter_(1, rank, positions)
        implementation = implementation.for_states(hidden_states)
        if past is None:
            return WholePlan(settings, implementation, length, counts, order, rank, None, dense_start)
        kind = StepPlan if length == 1 else ChunkPlan
        return kind(settings, implementation, length, counts, order, rank, past, None)

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
    def num_windows(self) -> int:
        """Windows that the tokens of a row may fall into, whatever its offset."""
        return -(-self.length // self.settings.window)

    @property
    def pool_size(self) -> int:
        """Keys/values that a window's heavy attention reads at most: the budget, in a dense start all tokens."""
        return self.settings.pool_size if self.dense_start is None else self.num_windows * self.settings.window

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

    @abstractmethod
    def frame(self, states: Tensor) -> Tensor:
        """New tokens by rank [batch, n, ...] → slots of windows [batch, windows * window, ...]; other slots hold
        anything finite."""

    @abstractmethod
    def unframe(self, states: Tensor) -> Tensor:
        """Slots of windows [batch, windows * window, ...] → new tokens by rank [batch, n, ...]."""

    def windows(self, states: Tensor) -> Tensor:
        """New tokens by rank [batch, n, d] as rows that heavy branches route out of: [batch * windows, window, d]."""
        return self.frame(states).unflatten(1, (-1, self.settings.window)).flatten(0, 1)

    def tokens(self, windows: Tensor) -> Tensor:
        """The inverse of `windows`."""
        return self.unframe(windows.unflatten(0, (len(self.counts), -1)).flatten(1, 2))

    def routed(self, tokens: RoutedTokens) -> RoutedTokens:
        """The tokens that gates routed, in the rows that `windows` gives."""
        return tokens

    def token_weights(self, weights: Tensor, tokens: RoutedTokens) -> Tensor:
        """Each new token's routing weight, fp32 [batch, n] by position, of the gates' weights [batch, windows, window]
        and of what `routed` gives; 0 for tokens that were not routed."""
        return self.leave(self.unframe(weights.flatten(1)))

    def light_bias(self, bias_table: Tensor) -> Tensor:
        """What light attention adds to its scores, from the bias by distance [heads, 2 * max_distance + 1]: a table of
        that shape, -inf for keys after the query, which makes the two-sided band causal. Of one token the bias of
        its keys, [1, heads, 1, local_radius + 1]."""
        later = torch.arange(bias_table.shape[1], device=bias_table.device) > bias_table.shape[1] // 2
        return bias_table.masked_fill(later, -torch.inf)

    @abstractmethod
    def join(self, ring: Tensor | None, states: Tensor) -> Tensor:
        """The ring of a cache, None where it has none yet, and the new tokens by rank, in one tensor."""

    @abstractmethod
    def frame_joined(self, joined: Tensor) -> Tensor:
        """As `frame`, with window 0's earlier tokens in their slots."""

    @abstractmethod
    def pooled(self, joined: Tensor) -> Tensor:
        """As `frame_joined`; slots of an incomplete last window may be missing, because no pool reads them."""

    @abstractmethod
    def recent(self, joined: Tensor) -> Tensor:
        """What light attention reads, by rank: the new tokens, and before them `num_before` earlier ones."""

    @abstractmethod
    def advance_ring(self, joined: Tensor) -> Tensor:
        """The ring [batch, R, ...] after the new tokens; a slot that no token has reached holds anything finite."""

    @abstractmethod
    def handed(self, values: Tensor) -> Tensor:
        """What complete windows hand on: of [batch, windows + 1, ...], what each of the windows, and the one after, is
        handed, all that `keep_carried` needs."""

    @abstractmethod
    def keep_carried(self, carried: Tensor | None, handed: Tensor) -> Tensor:
        """`carried` [batch, 2, ...] of a cache, what each row's current window and the one before were handed, after
        the new tokens; given what `handed` gives."""

    def advance_counters(self, counters: dict[str, Tensor], mask: Tensor | None) -> dict[str, Tensor]:
        """The cache's counters after the new tokens, whose mask is bool [batch, n]; see `run_causal_cache`."""
        window = self.settings.window
        batch = self.counts.shape[0]
        real = self.counts.new_ones(batch, self.length, dtype=torch.bool) if mask is None else mask
        recent = counters["recent"] if counters else real.new_zeros(batch, self.ring_size)
        floor = counters["floor"] if counters else torch.zeros_like(self.counts)
        # The window before the current one starts here.
        start = (self.total // window - 1).clamp(min=0) * window
        return {
            "lengths": self.total,
            "floor": torch.where(self.completed > 0, start, floor),
            "recent": torch.cat([recent, real], 1)[:, -self.ring_size :],
        }

    def count_in(self, layers: Sequence[Any], mask: Tensor | None) -> None:
        """Note the new tokens in cache layers that have all seen the same ones before.

        Args:
            layers: of `run_causal_cache`.
            mask: bool [batch, n], the new tokens'; None for all real.

        Raises:
            ValueError: for a layer that was filled with other sizes; none has changed then.
        """
        settings = self.settings
        for layer in layers:
            layer.check_sizes(settings.window, settings.radius, settings.pool_size)
        counters = self.advance_counters(layers[0].counters, mask)
        for layer in layers:
            layer.window = self.settings.window
            layer.write("counters", counters)
            layer.count(self.length)

    def _window_starts(self) -> Tensor:
        """The rank of each window's first slot, int64 [batch * windows, 1]."""
        return self.ranks.reshape(len(self.counts) * self.num_windows, self.settings.window)[:, :1]

    def _ring_ranks(self) -> tuple[Tensor, Tensor]:
        """The ring's slots, and the rank of each one's token after the new tokens, below 0 for none; [batch, R]."""
        slots = torch.arange(self.ring_size, device=self.counts.device)
        last = self.total[:, None] - 1
        return slots, last - (last - slots) % self.ring_size

    def _handing(self) -> Tensor:
        """Of the plan's windows and the one after: that of each row's next token, and the one before; [batch, 2]."""
        now = self.completed[:, None]
        return torch.cat([now, (now - 1).clamp(min=0)], 1)


@dataclass
class WholePlan(CausalPlan):
    """A sequence from its beginning, with a cache or without: rank and position in the windows are one number."""

    def __post_init__(self) -> None:
        window, device = self.settings.window, self.counts.device
        slots = torch.arange(self.num_windows * window, device=device)
        self.ranks, self.total = slots.expand(len(self.counts), -1), self.counts
        self.completed = self.total // window
        self.starts = self._window_starts()
        self.light_mask = None
        if self.order is not None:
            self.light_mask = torch.arange(self.length, device=device) < self.counts[:, None]

    def frame(self, states: Tensor) -> Tensor:
        slots = self.num_windows * self.settings.window
        if slots == self.length:
            return states
        return F.pad(states, (0, 0) * (states.dim() - 2) + (0, slots - self.length))

    def unframe(self, states: Tensor) -> Tensor:
        return states if states.shape[1] == self.length else states[:, : self.length]

    def join(self, ring: Tensor | None, states: Tensor) -> Tensor:
        return states

    def frame_joined(self, joined: Tensor) -> Tensor:
        return self.frame(joined)

    def pooled(self, joined: Tensor) -> Tensor:
        return joined

    def recent(self, joined: Tensor) -> Tensor:
        return joined

    def advance_ring(self, joined: Tensor) -> Tensor:
        return take(joined, self._ring_ranks()[1].clamp(0, self.length - 1))

    def handed(self, values: Tensor) -> Tensor:
        return take(values, self._handing())

    def keep_carried(self, carried: Tensor | None, handed: Tensor) -> Tensor:
        return handed


@dataclass
class ChunkPlan(CausalPlan):
    """Tokens after those of a cache."""

    past: Tensor

    def __post_init__(self) -> None:
        window, device = self.settings.window, self.counts.device
        self.num_before = self.settings.radius
        slots = torch.arange(self.num_windows * window, device=device)
        offset = self.past % window
        first = self.past - offset
        self.ranks, self.total = first[:, None] + slots, self.past + self.counts
        self.completed = (self.total - first) // window
        self.starts = self._window_starts()
        recent = self.past[:, None] + torch.arange(-self.num_before, self.length, device=device)
        # Slots that hold no token yet are before rank 0, or behind the row's last real one.
        self.light_mask = (recent >= 0) & (recent < self.total[:, None])
        # The methods below take rows that are the same for all layers, and so are computed once.
        self._new = _rows((slots - offset[:, None]).clamp(0, self.length - 1), self.length)
        self._back = _rows(torch.arange(self.length, device=device) + offset[:, None], len(slots))
        self._framed, self._recent = self._joined_rows(self.ranks), self._joined_rows(recent)
        self._moved = self.completed > 0
        self._plan_cache()

    def _plan_cache(self) -> None:
        """What `advance_ring` and `handed` take."""
        slots, ranks = self._ring_ranks()
        self._handed = _rows(self._handing(), self.num_windows + 1)
        self._advanced = self._joined_rows(torch.where(ranks < 0, slots, ranks))

    def _joined_rows(self, ranks: Tensor) -> Tensor:
        """Where the tokens with these ranks [batch, k] stand in what `join` gives, as rows of all of it."""
        new = (ranks - self.past[:, None]).clamp(max=self.length - 1)
        index = torch.where(new >= 0, self.ring_size + new, ranks % self.ring_size)
        return _rows(index, self.ring_size + self.length)

    @property
    def num_windows(self) -> int:
        """Windows that the tokens of a row may fall into, whatever its offset."""
        window = self.settings.window
        return -(-(window - 1 + self.length) // window)

    def frame(self, states: Tensor) -> Tensor:
        return _take_rows(states, self._new)

    def unframe(self, states: Tensor) -> Tensor:
        return _take_rows(states, self._back)

    def join(self, ring: Tensor | None, states: Tensor) -> Tensor:
        assert ring is not None
        return torch.cat([ring, states.to(ring.dtype)], 1)

    def frame_joined(self, joined: Tensor) -> Tensor:
        return _take_rows(joined, self._framed)

    def pooled(self, joined: Tensor) -> Tensor:
        return self.frame_joined(joined)

    def recent(self, joined: Tensor) -> Tensor:
        return _take_rows(joined, self._recent)

    def advance_ring(self, joined: Tensor) -> Tensor:
        return _take_rows(joined, self._advanced)

    def handed(self, values: Tensor) -> Tensor:
        return _take_rows(values, self._handed)

    def keep_carried(self, carried: Tensor | None, handed: Tensor) -> Tensor:
        assert carried is not None
        before = torch.where(_spread(self._moved, handed.dim()), handed[:, 1:], carried[:, 1:])
        return torch.cat([handed[:, :1], before], 1)


@dataclass
class StepPlan(ChunkPlan):
    """One token after those of a cache, as in generation: the ring has room for it, in the place of one that is no
    longer read, and it is a row of its own to the heavy branches."""

    is_one_token = True

    def _plan_cache(self) -> None:
        slots, _ = self._ring_ranks()
        self._slot = (slots == (self.total[:, None] - 1) % self.ring_size) & (self.counts[:, None] > 0)
        self.starts = self.past[:, None]
        self._own_slot = torch.zeros_like(self.starts)

    def _joined_rows(self, ranks: Tensor) -> Tensor:
        return _rows(ranks % self.ring_size, self.ring_size)

    def windows(self, states: Tensor) -> Tensor:
        """The one token [batch, 1, d] as it is."""
        return states

    def tokens(self, windows: Tensor) -> Tensor:
        """The inverse of `windows`."""
        return windows

    def routed(self, tokens: RoutedTokens) -> RoutedTokens:
        """The token is in the first slot of the gates or in none; in its own row it stands at 0."""
        return RoutedTokens(self._own_slot, tokens.weights[:, :1], tokens.valid[:, :1])

    def token_weights(self, weights: Tensor, tokens: RoutedTokens) -> Tensor:
        """The token's routing weight, fp32 [batch, 1]."""
        return tokens.weights

    def light_bias(self, bias_table: Tensor) -> Tensor:
        """The bias of the token's keys, [1, heads, 1, local_radius + 1]."""
        return bias_of_sequence(bias_table, 1, self.num_before + 1, self.num_before)[None]

    def join(self, ring: Tensor | None, states: Tensor) -> Tensor:
        assert ring is not None
        return torch.where(_spread(self._slot, ring.dim()), states.to(ring.dtype), ring)

    def advance_ring(self, joined: Tensor) -> Tensor:
        return joined

    def handed(self, values: Tensor) -> Tensor:
        # A step needs the last one alone, because everything else is in the cache.
        return values[:, 1:]

    def keep_carried(self, carried: Tensor | None, handed: Tensor) -> Tensor:
        assert carried is not None
        moved = _spread(self._moved, handed.dim())
        return torch.where(moved, torch.cat([handed, carried[:, :1]], 1), carried)
