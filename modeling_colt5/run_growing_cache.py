"""The cache of a plain decoder's self-attention, which grows in blocks and takes new tokens in place."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

from .kernel_backend import runs_eagerly

# How many tokens a room grows by: copying a long cache once in so many tokens is cheap beside reading it for each.
BLOCK = 256


class _Rooms:
    """One memory of keys and values [2, batch, heads, a multiple of `BLOCK`, d_kv], and how many tokens it holds.

    Attributes:
        keys, values: its parts.
        length: how many tokens there are.
        is_seen: whether somebody may hold a view of the tokens.
    """

    def __init__(self, memory: Tensor, length: int):
        self.memory, self.length, self.is_seen = memory, length, False
        self.keys, self.values = memory.unbind(0)

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, size: int) -> "_Rooms":
        """With these tokens, and space for at least so many."""
        rows, heads, length, features = keys.shape
        rooms = cls(keys.new_empty(2, rows, heads, -(-size // BLOCK) * BLOCK, features), length)
        for memory, states in ((rooms.keys, keys), (rooms.values, values)):
            memory.narrow(2, 0, length).copy_(states)
        return rooms

    def __reduce__(self) -> Any:
        # pickled one by one, the parts would no longer be parts of the memory
        return _Rooms, (self.memory, self.length)

    def takes(self, count: int) -> bool:
        """Whether there is space for so many tokens more: what inference mode made may only be written in it."""
        memory = self.keys
        is_free = self.length + count <= memory.shape[2]
        return is_free and (not memory.is_inference() or torch.is_inference_mode_enabled())

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Write the states of new tokens behind those that are here."""
        first, count = self.length, keys.shape[2]
        for memory, states in zip((self.keys, self.values), (keys, values), strict=True):
            memory.narrow(2, first, count).copy_(states)
        self.length += count

    def reorder(self, rows: Tensor) -> "_Rooms":
        """Rooms with these rows, and as much space as before. They are the same ones where nobody would notice: a step
        then finds the addresses of the last one."""
        used = self.memory.narrow(3, 0, self.length)
        if not self.is_seen and len(rows) == used.shape[1] and self.takes(0):
            used.copy_(used.index_select(1, rows))
            return self
        _, _, *rest = self.memory.shape
        other = _Rooms(self.memory.new_empty(2, len(rows), *rest), self.length)
        torch.index_select(used, 1, rows, out=other.memory.narrow(3, 0, self.length))
        return other


class CoLT5GrowingLayer(DynamicLayer):
    """Transformers' dynamic layer, with room after the last token: a step writes its keys and values there, where the
    dynamic layer copies the whole cache.

    `keys` and `values` are as in a dynamic layer, [batch, heads, length, d_kv]; here they are views of larger tensors,
    the room, made when they are read. Assigning others drops the room, and the next step makes another one.

    Where autograd records, and where compilers or transforms trace, it is a dynamic layer: a backward pass needs each
    step's keys as they were, and tracers would note a room's length as a constant.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self._parts: list[Any] = [None, None]
        self.rooms: _Rooms | None = None
        # what straight lines keep from token to token (layer_decoder.py)
        self.step_buffers: Any = None
        super().__init__(*args, **kwargs)

    @property
    def keys(self) -> Any:
        """Of all tokens, [batch, heads, length, d_kv]; None in a cache that is empty."""
        return self._part(0)

    @keys.setter
    def keys(self, states: Any) -> None:
        self._replace(0, states)

    @property
    def values(self) -> Any:
        """The same."""
        return self._part(1)

    @values.setter
    def values(self, states: Any) -> None:
        self._replace(1, states)

    def _part(self, number: int) -> Any:
        rooms = self.rooms
        if rooms is not None and self._parts[number] is None:
            rooms.is_seen = True
            self._parts[number] = (rooms.keys, rooms.values)[number].narrow(2, 0, rooms.length)
        return self._parts[number]

    def _replace(self, number: int, states: Any) -> None:
        self._leave_rooms()
        self._parts[number] = states

    def _leave_rooms(self) -> None:
        """Keep keys and values as they are, without space behind them."""
        self._parts, self.rooms = [self.keys, self.values], None

    def _enter(self, rooms: _Rooms | None) -> None:
        """Hold what rooms hold."""
        if rooms is not None:
            self._parts, self.rooms = [None, None], rooms

    def __getstate__(self) -> dict[str, Any]:
        # a copy that shares no tensor has its own
        return self.__dict__ | {"step_buffers": None}

    def __copy__(self) -> "CoLT5GrowingLayer":
        # The two share their keys and values, so neither may write behind them any more.
        self._leave_rooms()
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._parts = list(self._parts)
        other.step_buffers = None
        return other

    def get_seq_length(self) -> int:
        """How many tokens there are."""
        return super().get_seq_length() if self.rooms is None else self.rooms.length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the states of new tokens, [batch, heads, n, d_kv]; returns those of all tokens."""
        # The first states of a cache stay without room: a cache that is filled once needs none.
        is_plain = not torch.is_grad_enabled() and runs_eagerly()
        pairs = ((self.keys, key_states), (self.values, value_states))
        is_plain = is_plain and _are_alike(key_states, value_states)
        if not is_plain or not all(_go_on(states, new.shape, new) for states, new in pairs):
            self._leave_rooms()
            return super().update(key_states, value_states, *args, **kwargs)
        rooms = self._rooms_for(key_states.shape[2])
        rooms.write(key_states, value_states)
        self._enter(rooms)
        return self.keys, self.values

    def room_for_token(self, length: int) -> tuple[Tensor, Tensor] | None:
        """Where the keys and values of one more token in each row are to be written, after the others, as contiguous
        tensors [batch, heads, room, d_kv]; None where the layer has no tokens, or not so many as asked.

        Only without autograd. Nothing has changed before `count_token` is called.
        """
        rooms = self.rooms
        if rooms is not None and rooms.length == length and rooms.takes(1):
            return rooms.keys, rooms.values
        if rooms is None:
            keys, values = self._parts
            if type(keys) is not Tensor or type(values) is not Tensor or not _are_alike(keys, values):
                return None
        if length == 0 or self.get_seq_length() != length:
            return None
        rooms = self._rooms_for(1)
        return rooms.keys, rooms.values

    def count_token(self) -> None:
        """Count one more token in each row, whose keys and values are where `room_for_token` said."""
        assert self.rooms is not None
        self.rooms.length += 1
        self._parts = [None, None]

    def _rooms_for(self, count: int) -> _Rooms:
        """The rooms, with space for so many tokens more: others where they are full or there are none."""
        rooms = self.rooms
        if rooms is None or not rooms.takes(count):
            rooms = _Rooms.of(self.keys, self.values, self.get_seq_length() + count)
            self._enter(rooms)
        return rooms

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Take back the last tokens, as of a dynamic layer; the next ones are written over them."""
        rooms = self.rooms
        super().crop(*args, **kwargs)
        if rooms is not None:
            rooms.length = self.keys.shape[2]
            self._enter(rooms)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows by beam, with as much room as before."""
        if self.rooms is None or torch.is_grad_enabled():
            super().reorder_cache(beam_idx)
            return
        self._enter(self.rooms.reorder(beam_idx.to(self.rooms.keys.device)))

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._leave_rooms()

    def offload(self) -> None:
        """Move keys and values to the CPU, without the room."""
        self._leave_rooms()
        self.step_buffers = None
        super().offload()


def _are_alike(keys: Tensor, values: Tensor) -> bool:
    """Whether one memory may hold both."""
    return keys.dim() == 4 and keys.shape == values.shape and keys.dtype == values.dtype


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
