"""The cache of a plain decoder's self-attention, which grows in blocks and takes new tokens in place."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

from .kernel_backend import runs_eagerly

# How many tokens a room grows by: copying a long cache once in so many tokens is cheap beside reading it for each.
BLOCK = 256


class _Room:
    """Memory [batch, heads, a multiple of `BLOCK`, d_kv], and the view of the tokens that it holds, its first ones."""

    def __init__(self, states: Tensor, rows: int, length: int):
        _, heads, _, size = states.shape
        self.memory = states.new_empty(rows, heads, -(-length // BLOCK) * BLOCK, size)
        self.view = self.memory.narrow(2, 0, 0)

    def takes(self, states: Tensor, total: int) -> bool:
        """Whether states are this view, so that nobody else can know what lies behind it, and it may become one of
        `total` tokens: what inference mode made may only be written in it."""
        memory = self.memory
        is_free = states is self.view and total <= memory.shape[2]
        return is_free and (not memory.is_inference() or torch.is_inference_mode_enabled())

    def write(self, states: Tensor) -> Tensor:
        """Write states behind those that are here; returns the view of all."""
        first, count = self.view.shape[2], states.shape[2]
        self.memory.narrow(2, first, count).copy_(states)
        return self.count(count)

    def count(self, number: int) -> Tensor:
        """Let the view end so many tokens later; returns it."""
        self.view = self.memory.narrow(2, 0, self.view.shape[2] + number)
        return self.view

    def reordered(self, states: Tensor, rows: Tensor) -> "_Room":
        """Another room of this size, with these rows of the states."""
        length = states.shape[2]
        room = _Room(states, len(rows), max(length, self.memory.shape[2]))
        room.view = torch.index_select(states, 0, rows, out=room.memory.narrow(2, 0, length))
        return room


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
        is_plain = not torch.is_grad_enabled() and runs_eagerly()
        pairs = ((self.keys, key_states), (self.values, value_states))
        if not is_plain or not all(_go_on(states, new.shape, new) for states, new in pairs):
            self.rooms = None
            return super().update(key_states, value_states, *args, **kwargs)
        key_room, value_room = self._rooms_for(key_states.shape[2])
        self.keys, self.values = key_room.write(key_states), value_room.write(value_states)
        return self.keys, self.values

    def takes_token(self, length: int, shape: tuple[int, ...], states: Tensor) -> bool:
        """Whether the next token may be one that `count_token` counts.

        Args:
            length: tokens that the layer must have, at least one.
            shape: of a token's keys, [batch, heads, 1, d_kv].
            states: of the dtype and on the device of keys.
        """
        parts = (self.keys, self.values)
        return length > 0 and all(_go_on(part, shape, states) and part.shape[2] == length for part in parts)

    def count_token(self) -> tuple[Tensor, Tensor]:
        """Count one token more in each row, whose keys and values the caller writes.

        Only without autograd, and where `takes_token` says so.

        Returns:
            Keys and values as contiguous tensors [batch, heads, room, d_kv]: the token's are to be written behind the
            others.
        """
        key_room, value_room = self._rooms_for(1)
        self.keys, self.values = key_room.count(1), value_room.count(1)
        return key_room.memory, value_room.memory

    def _rooms_for(self, count: int) -> tuple[_Room, _Room]:
        """The rooms of keys and values, of one size, with space for so many tokens more: others where they are full or
        hold something else."""
        parts = (self.keys, self.values)
        total = self.keys.shape[2] + count
        rooms = self.rooms
        if rooms is None or not all(room.takes(states, total) for room, states in zip(rooms, parts, strict=True)):
            key_room, value_room = (_Room(states, len(states), total) for states in parts)
            rooms = self.rooms = key_room, value_room
            for room, states in zip(rooms, parts, strict=True):
                room.write(states)
        return rooms

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Take back the last tokens, as of a dynamic layer; the next ones are written over them."""
        rooms = self._own_rooms()
        super().crop(*args, **kwargs)
        if rooms is not None:
            rooms[0].view, rooms[1].view = self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows by beam, with as much room as before."""
        rooms = self._own_rooms()
        if rooms is None or torch.is_grad_enabled():
            super().reorder_cache(beam_idx)
            return
        order = beam_idx.to(self.keys.device)
        key_room, value_room = rooms[0].reordered(self.keys, order), rooms[1].reordered(self.values, order)
        self.rooms = key_room, value_room
        self.keys, self.values = key_room.view, value_room.view

    def _own_rooms(self) -> tuple[_Room, _Room] | None:
        """The rooms that keys and values are views of; None where there are none."""
        rooms = self.rooms
        is_own = rooms is not None and self.keys is rooms[0].view and self.values is rooms[1].view
        return rooms if is_own else None

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.rooms = None

    def offload(self) -> None:
        """Move keys and values to the CPU, without the room."""
        super().offload()
        self.rooms = None


def _go_on(states: Tensor | None, new: tuple[int, ...], like: Tensor) -> bool:
    """Whether there are states, and new ones of a shape, and of the dtype and on the device of `like`, differ from
    them in their number of tokens alone."""
    if states is None or states.dim() != 4 or len(new) != 4 or type(like) is not Tensor or type(states) is not Tensor:
        return False
    shape = states.shape
    is_alike = shape[0] == new[0] and shape[1] == new[1] and shape[3] == new[3]
    return is_alike and states.dtype == like.dtype and states.device == like.device


def let_grow(cache: Any) -> None:
    """Give a new and empty cache, of one stack or of both, growing layers in the place of plain dynamic ones.

    Those of a memory's keys and values are filled once, and stay as they are; so does a cache of any other kind, and
    None.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if type(cache) is DynamicCache and not cache.offloading:
        cache.layers = [CoLT5GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
