"""The cache of a plain decoder's self-attention, which grows in blocks and takes new tokens in place."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

from .kernel_backend import runs_eagerly

# How many tokens a room grows by: copying a long cache once in so many tokens is cheap beside reading it for each.
BLOCK = 256


class _Room:
    """Memory [batch, heads, a multiple of `BLOCK`, d_kv] whose first `length` tokens are written."""

    def __init__(self, states: Tensor, rows: int, length: int):
        _, heads, _, size = states.shape
        self.memory = states.new_empty(rows, heads, -(-length // BLOCK) * BLOCK, size)
        self.length = 0

    def takes(self, states: Tensor, total: int) -> bool:
        """Whether states are all that is written here, and may be written behind up to `total` tokens: what inference
        mode made may only be written in it."""
        memory = self.memory
        return (
            self.length == states.shape[2]
            and total <= memory.shape[2]
            and states.data_ptr() == memory.data_ptr()
            and states.stride() == memory.stride()
            and len(states) == len(memory)
            and (torch.is_inference_mode_enabled() or not memory.is_inference())
        )

    def write(self, states: Tensor) -> Tensor:
        """Write states behind those that are here; returns the view of all."""
        first, self.length = self.length, self.length + states.shape[2]
        self.memory[:, :, first : self.length] = states
        return self.memory[:, :, : self.length]

    def reordered(self, states: Tensor, rows: Tensor) -> "tuple[_Room, Tensor]":
        """Another room of this size with these rows of the states, and the view of them."""
        room, length = _Room(states, len(rows), max(states.shape[2], self.memory.shape[2])), states.shape[2]
        room.length = length
        return room, torch.index_select(states, 0, rows, out=room.memory[:, :, :length])


class CoLT5GrowingLayer(DynamicLayer):
    """Transformers' dynamic layer, with room behind the last token: a step writes its keys and values there, where the
    dynamic layer copies the whole cache.

    `keys` and `values` are what they are in a dynamic layer, [batch, heads, length, d_kv]; here they are views of
    rooms. Whoever replaces them takes their room away, and the next step makes another one.

    Where autograd records, and where compilers or transforms trace, it is a dynamic layer: a backward pass needs each
    step's keys as they were, and tracers would note a room's length as a constant.
    """

    keys: Any
    values: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.rooms: tuple[_Room, _Room] | None = None

    def __copy__(self) -> "CoLT5GrowingLayer":
        # The two share their keys and values, so neither may write behind them any more.
        self.rooms = None
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the states of new tokens, [batch, heads, n, d_kv]; returns those of all tokens."""
        # The first states of a cache stay without room: whoever fills it once needs none.
        if not self._can_write(key_states, value_states):
            self.rooms = None
            return super().update(key_states, value_states, *args, **kwargs)
        key_room, value_room = self.rooms or (None, None)
        key_room, self.keys = _append(key_room, self.keys, key_states)
        value_room, self.values = _append(value_room, self.values, value_states)
        self.rooms = key_room, value_room
        return self.keys, self.values

    def _can_write(self, key_states: Tensor, value_states: Tensor) -> bool:
        """Whether there are tokens that these states go on, and a copy into a room is all that remains to be done."""
        if self.get_seq_length() == 0 or torch.is_grad_enabled() or not runs_eagerly():
            return False
        return _go_on(self.keys, key_states) and _go_on(self.values, value_states)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Take back the last tokens, as of a dynamic layer; the next ones are written over them."""
        super().crop(*args, **kwargs)
        for room in self.rooms or ():
            room.length = min(room.length, self.get_seq_length())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows by beam, with as much room as before."""
        if self.rooms is None or torch.is_grad_enabled():
            super().reorder_cache(beam_idx)
            return
        key_room, value_room = self.rooms
        rows = beam_idx.to(self.keys.device)
        key_room, self.keys = key_room.reordered(self.keys, rows)
        value_room, self.values = value_room.reordered(self.values, rows)
        self.rooms = key_room, value_room

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.rooms = None

    def offload(self) -> None:
        """Move keys and values to the CPU, without the room."""
        super().offload()
        self.rooms = None


def _go_on(states: Tensor, new: Tensor) -> bool:
    """Whether new states differ from those before them in their number of tokens alone."""
    return (
        new.dim() == 4
        and states.shape[:2] == new.shape[:2]
        and states.shape[3] == new.shape[3]
        and states.dtype == new.dtype
        and states.device == new.device
        and type(states) is type(new) is Tensor
    )


def _append(room: _Room | None, states: Tensor, new: Tensor) -> tuple[_Room, Tensor]:
    """The room with new states behind the old ones, another where it is full or not theirs, and the view of all."""
    total = states.shape[2] + new.shape[2]
    if room is None or not room.takes(states, total):
        room = _Room(states, len(states), total)
        room.write(states)
    return room, room.write(new)


def let_grow(cache: Any) -> None:
    """Give a new and empty cache, of one stack or of both, growing layers in the place of plain dynamic ones.

    Those of a memory's keys and values are filled once, and stay as they are; so does a cache of any other kind, and
    None.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if type(cache) is DynamicCache and not cache.offloading:
        cache.layers = [CoLT5GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
