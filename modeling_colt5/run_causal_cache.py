"""The cache of a causally routed layer: rings of recent tokens, and what complete windows carry over to later ones."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

LAYER_TYPE = "colt5_routed"


class _RoutedState:
    """What both kinds of routed cache layer share; its size depends on window and budget, never on the length.

    Three kinds of tensor, all with the batch first, which their shape and not their content fixes:

    - `rings` [batch, R, ...]: the last R = 2 · window + radius real tokens of each row, token `rank` in slot
      `rank % R`.
    - `carried` [batch, 2, ...]: what complete windows hand on, entry 0 for the row's current window and entry 1 for
      the one before, to which a crop may go back.
    - `counters`: `lengths` [batch], real tokens of each row; `floor` [batch], the length below which a crop cannot go;
      `recent` [batch, R], which of the last R positions were real.

    Until a routed layer writes to it, it is the plain layer that it derives from: an encoder–decoder's
    cross-attention cache is made of the same classes.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.window = 0
        self.rings: dict[str, Tensor] = {}
        self.carried: dict[str, Tensor] = {}
        self.counters: dict[str, Tensor] = {}

    @property
    def has_state(self) -> bool:
        """Whether a routed layer has written to it."""
        return bool(self.counters)

    def check_sizes(self, window: int, radius: int, pool_size: int) -> None:
        """Check that what a routed layer wrote has the sizes that it is to go on with: `causal_window`, `local_radius`
        and `causal_routed_keys`.

        Raises:
            ValueError: for other ones.
        """
        if not self.has_state:
            return
        ring, pool = self.counters["recent"].shape[1], self.carried.get("pool_score")
        sizes = {
            "causal_window": (self.window, window),
            "local_radius": (ring - 2 * self.window, radius),
            "causal_routed_keys": (pool_size if pool is None else pool.shape[-1], pool_size),
        }
        for name, (was, now) in sizes.items():
            if was != now:
                raise ValueError(
                    f"cache was filled with {name} {was}, which is {now} now; it must stay as it is: begin a new "
                    "cache after a change"
                )

    def past_lengths(self) -> Tensor | None:
        """Real tokens of each row so far, int64 [batch]; None before the first one."""
        return self.counters["lengths"].clone() if self.has_state else None

    def write(self, kind: str, values: dict[str, Tensor]) -> None:
        """Replace tensors of one kind, "rings", "carried" or "counters"."""
        getattr(self, kind).update(values)

    def _replace_each(self, function: Any) -> None:
        for kind in ("rings", "carried", "counters"):
            self.write(kind, {name: function(value) for name, value in getattr(self, kind).items()})

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows by beam."""
        if self.has_state:
            self._replace_each(lambda value: value.index_select(0, beam_idx.to(value.device)))
        else:
            super().reorder_cache(beam_idx)  # type: ignore[misc]


class CoLT5DynamicRoutedLayer(_RoutedState, DynamicLayer):
    """The cache layer of `DynamicCache` for a causally routed layer."""

    _layer_type = LAYER_TYPE

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.seen = 0
        # so many tokens that no window ends by, at least; None where nobody has looked since
        self._before_end: int | None = None
        # what straight lines keep from token to token (layer_decoder.py)
        self.step_buffers: Any = None

    def __getstate__(self) -> dict[str, Any]:
        # a copy that shares no tensor has its own
        return self.__dict__ | {"step_buffers": None}

    def __copy__(self) -> "CoLT5DynamicRoutedLayer":
        # A token is written in place, so that the two may not share what it is written to.
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__getstate__())
        for kind in ("rings", "carried", "counters"):
            setattr(other, kind, {name: value.clone() for name, value in getattr(self, kind).items()})
        return other

    def get_seq_length(self) -> int:
        """Positions seen, padding included."""
        return self.seen if self.has_state else super().get_seq_length()

    def count(self, positions: int) -> None:
        """Note how many positions came in."""
        self.seen += positions
        if self._before_end is not None:
            # Beyond that a window may have ended, of which the next one says when it ends.
            self._before_end = self._before_end - positions if positions <= self._before_end else None

    def tokens_before_end(self) -> int:
        """How many tokens may come, at least, before one completes a window of some row.

        The answer follows from an earlier one wherever it can, once in a window: to look waits for the device.
        """
        if self._before_end is None:
            self._before_end = self.window - 1 - int((self.counters["lengths"] % self.window).max())
        return self._before_end

    def state_of_token(self, rings: tuple[str, ...], carried: tuple[str, ...]) -> tuple[Tensor, ...] | None:
        """Rings and carried tensors of these names; None where one lacks."""
        try:
            return (*map(self.rings.__getitem__, rings), *map(self.carried.__getitem__, carried))
        except KeyError:
            return None

    def make_contiguous(self) -> bool:
        """Make contiguous what is not; returns whether something was not."""
        others = [
            (tensors, name, tensor)
            for tensors in (self.rings, self.carried)
            for name, tensor in tensors.items()
            if not tensor.is_contiguous()
        ]
        for tensors, name, tensor in others:
            tensors[name] = tensor.contiguous()
        return bool(others)

    def counters_after_token(self, lengths: Tensor, real: Tensor | None, may_end: bool) -> dict[str, Tensor]:
        """The counters with one more position in each row.

        Args:
            lengths: int64 [batch], real tokens of each row with the new ones.
            real: bool [batch], whether they are real; None for all.
            may_end: whether one may complete a window.
        """
        recent, floor = self.counters["recent"], self.counters["floor"]
        new = recent.new_ones(len(recent), 1) if real is None else real[:, None]
        if may_end:
            ends = (lengths % self.window == 0) & (lengths > self.counters["lengths"])
            floor = torch.where(ends, (lengths - self.window), floor)
        return {"lengths": lengths, "floor": floor, "recent": torch.cat([recent[:, 1:], new], 1)}

    def count_token(self, counters: dict[str, Tensor]) -> None:
        """Go on to what `counters_after_token` gave. The caller has written what else the layer keeps of the token."""
        self.counters = dict(counters)
        self.count(1)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.seen = 0
        self._before_end = None
        for tensors in (self.rings, self.carried, self.counters):
            tensors.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` positions, at most to the start of a row's last complete window.

        Raises:
            ValueError: for a positive number, or one that goes further back.
        """
        if not self.has_state:
            super().crop(tokens_to_remove)
            return
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove is {tokens_to_remove}; it must be minus the number of tokens to remove"
            )
        removed = -tokens_to_remove
        if removed == 0:
            return
        recent, lengths, floor = (self.counters[name] for name in ("recent", "lengths", "floor"))
        reach = recent.shape[1]
        shorter = lengths - recent[:, max(reach - removed, 0) :].sum(-1)
        if (removed > reach and self.seen > reach) or bool((shorter < floor).any()):
            raise ValueError(
                f"tokens_to_remove is {tokens_to_remove}; a routed cache goes back to the start of the last complete "
                f"window of {self.window} tokens, here by at most {int((lengths - floor).min())} tokens"
            )
        moved = shorter // self.window < lengths // self.window
        for name, value in self.carried.items():
            current = torch.where(moved.view(-1, *[1] * (value.dim() - 2)), value[:, 1], value[:, 0])
            self.carried[name] = torch.stack([current, value[:, 1]], 1)
        kept = recent[:, : max(reach - removed, 0)]
        self.counters = {
            "lengths": shorter,
            "floor": torch.where(moved, shorter // self.window * self.window, floor),
            "recent": torch.cat([recent.new_zeros(len(recent), reach - kept.shape[1]), kept], 1),
        }
        self.seen = max(self.seen - removed, 0)
        self._before_end = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        if self.has_state:
            self._replace_each(lambda value: value.repeat_interleave(repeats, 0))
        else:
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the rows `indices`."""
        if self.has_state:
            self._replace_each(lambda value: value[indices])
        else:
            super().batch_select_indices(indices)


def _kept_in_place(tensor: Tensor) -> Tensor:
    """The tensor, which compilers are told keeps its address; while they compile, it has been told."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(tensor)
    return tensor


class CoLT5StaticRoutedLayer(_RoutedState, StaticLayer):
    """The cache layer of `StaticCache` for a causally routed layer: tensors keep their addresses, for compilers."""

    _layer_type = LAYER_TYPE
    # Assisted generation asks for this before it begins. A crop would leave rings and carried states as they are.
    is_croppable = False
    cumulative_length: Tensor

    def crop(self, tokens_to_remove: int) -> None:
        """Refused, unless there is nothing to take back.

        Raises:
            ValueError: for any number but 0.
        """
        if tokens_to_remove != 0:
            raise ValueError(
                f"tokens_to_remove is {tokens_to_remove}; a static cache of a causally routed decoder cannot be "
                "cropped: use a dynamic one"
            )

    def count(self, positions: int) -> None:
        """Note how many positions came in."""
        if not torch.compiler.is_compiling():
            self.cumulative_length = _kept_in_place(self.cumulative_length.to(self.counters["lengths"].device))
        self.cumulative_length.add_(positions)

    def get_seq_length(self) -> Any:
        """Positions seen, padding included."""
        return self.cumulative_length if self.has_state else super().get_seq_length()

    def write(self, kind: str, values: dict[str, Tensor]) -> None:
        """Replace tensors of one kind, in place from the second time on."""
        tensors = getattr(self, kind)
        for name, value in values.items():
            if name in tensors and tensors[name].shape == value.shape:
                tensors[name].copy_(value)
                continue
            tensors[name] = _kept_in_place(value.clone())

    def reset(self) -> None:
        """Forget everything, and keep the tensors."""
        super().reset()
        self._replace_each(torch.zeros_like)


def routed_layer(cache: Cache | None, layer_idx: int) -> Any:
    """The routed cache layer of one decoder layer; None without a cache.

    Raises:
        TypeError: for a cache that was made without the model's configuration.
    """
    if cache is None:
        return None
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    # The layer is known by its type's name: where another copy of this code is loaded too, Transformers makes caches
    # of the newest copy's classes.
    if getattr(layer, "_layer_type", None) != LAYER_TYPE:
        raise TypeError(
            f"layer {layer_idx} of the cache is {layer!r}; a decoder with causal_attention 'local' or 'routed' needs "
            "a cache that was made for it, such as DynamicCache(config=model.config)"
        )
    return layer


def check_routed_layer(layer: Any, batch: int, ring: str) -> None:
    """Check that a module's own cache is one of a causally routed layer, with as many rows as the new tokens have, and
    that no other kind of module has filled it.

    Args:
        layer: the cache.
        batch: rows of the new tokens.
        ring: one that the module keeps whenever it is called.

    Raises:
        TypeError: for another kind of cache.
        ValueError: for another number of rows, or another kind of module.
    """
    if getattr(layer, "_layer_type", None) != LAYER_TYPE:
        raise TypeError(f"cache is a {type(layer).__name__}; it must be what make_cache() made, or None")
    if layer.has_state and len(layer.counters["lengths"]) != batch:
        rows = len(layer.counters["lengths"])
        raise ValueError(f"cache has {rows} rows, and hidden_states has {batch}; they must have as many")
    if layer.has_state and ring not in layer.rings:
        raise ValueError(
            "cache was filled by another kind of module; it must be what make_cache() of this one made, or None"
        )
