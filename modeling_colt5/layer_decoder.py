"""One new token of a plain decoder as straight lines of kernel launches, one line a layer.

The modules of model_decoder_layer.py say what a layer computes. For one token their Python takes the host ten times as
long as the kernels take a GPU. Blocks that nothing looks into (`PlainStack` of layer_plain.py) therefore run here,
where a growing cache holds the earlier tokens and the keys and values of the memory, the encoder's output.

The launches of a layer are noted once, and then repeated by one call of C (run_launch_list_triton.py) for all layers
and tokens. What changes from token to token is not part of a list: the number of keys is on the device, where kernels
read it, and a cache that has grown has another address.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from .kernel_backend import Mode, triton_is_available
from .layer_plain import Parts, PlainLayer, parts_of_attention, parts_of_dense, parts_of_sublayer
from .run_growing_cache import CoLT5GrowingLayer

# PyTorch's comparison of tensors with those that it was made of; None in a release that has none.
TensorGuards: Any = getattr(getattr(torch._C._dynamo, "guards", None), "TensorGuards", None)

if triton_is_available():
    from .op_norm_triton import norm_into
    from .op_step_attention_triton import number_of_parts, step_attention_into
    from .op_step_products_triton import step_products_into
    from .run_launch_list_triton import Lists, Recorder, calls_to_compute, may_repeat

# False lets every block run as modules, for a comparison
enabled = True

_SHAPE, _DTYPE = attrgetter("shape"), attrgetter("dtype")


class PlainDecoderLayer(PlainLayer):
    """A plain block of a decoder, with an encoder or without. Keys and values of the memory are made before, by
    modules.

    Attributes:
        eps, d_kv: of the norms and of the attentions, in their order.
        kind: all of it that a line depends on beside the shapes of weights.
        before: of a stack's first layer, what the last pass was like.
    """

    __slots__ = ("before", "d_kv", "eps", "kind")

    def __init__(self, block: Any, parts: dict[str, nn.Module]):
        super().__init__(block, parts)
        self.before: _Before | None = None
        self.eps, self.d_kv = self.values("eps"), self.values("d_kv")
        self.kind = (self.weighted, self.eps, self.d_kv, self.drops_something)

    @classmethod
    def parts(cls, block: Any) -> Parts:
        attention = block.layer[0]
        return {
            "self_layer": ("self_layer", attention),
            **parts_of_sublayer("self", attention, "dropout"),
            **parts_of_attention("self", "self_attention", attention.SelfAttention),
            **cls.parts_of_cross(block),
            **cls.parts_of_feed_forward(block.layer[-1]),
        }

    @staticmethod
    def parts_of_cross(block: Any) -> Parts:
        """The attention to a memory, but for what makes keys and values; nothing without an encoder."""
        if not block.has_cross_attention:
            return {}
        _, cross, _ = block.layer
        return {
            "cross_layer": ("cross_layer", cross),
            **parts_of_sublayer("cross", cross, "dropout"),
            **parts_of_attention("cross", "cross_attention", cross.EncDecAttention, "qo"),
        }

    @staticmethod
    def parts_of_feed_forward(feed_forward: Any) -> Parts:
        """T5's feed-forward."""
        return {
            "ff": ("feed_forward", feed_forward),
            **parts_of_sublayer("ff", feed_forward, "dropout"),
            **parts_of_dense("dense", feed_forward.DenseReluDense),
        }


def may_run_straight(states: Tensor, mode: Mode) -> bool:
    """Whether the blocks may run as straight lines for one new token in each row, as far as that is not a matter of
    blocks and cache.

    Args:
        states: like what goes into the first layer, in all but the shape.
        mode: of the pass.
    """
    return (
        enabled
        and mode.is_plain_inference
        and not mode.is_deterministic
        and type(states) in (Tensor, nn.Parameter)
        and states.dtype in (torch.float32, torch.bfloat16)
        and forward_ad._current_level < 0
    )


class StepLayer(NamedTuple):
    """A layer that is about to run as a straight line.

    Args:
        plain, weights: what `PlainStack.read` gave.
        cache: of its own keys and values.
        state: tensors of the cache that the line reads, and writes in place.
        memory: keys and values of the memory, [rows, key/value heads, n, d_kv] each; nothing without an encoder.
        tensors: weights, state and memory.
    """

    plain: Any
    weights: tuple[Tensor, ...]
    cache: Any
    state: tuple[Tensor, ...]
    memory: tuple[Tensor, ...]
    tensors: tuple[Tensor, ...]


_TENSORS = attrgetter("tensors")


class StepBuffers:
    """Tensors that all tokens of a cache use one after another, so that their launches come again with the same
    addresses: then they are a CUDA graph (run_launch_graphs.py). Each token writes its own numbers to them."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    @classmethod
    def of(cls, cache: Any) -> "StepBuffers":
        """That of a cache, by its first layer; made where there is none."""
        if cache.step_buffers is None:
            cache.step_buffers = cls()
        return cache.step_buffers

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous tensor of a name; its numbers are what was last written to it."""
        count = math.prod(shape)
        kept = self.kept.get(name)
        # What inference mode made may only be written in it.
        if (
            kept is None
            or kept.numel() < count
            or (kept.dtype, kept.device, kept.is_inference()) != (dtype, device, torch.is_inference_mode_enabled())
        ):
            # A mask grows with each token: with twice the space it moves seldom.
            kept = self.kept[name] = torch.empty(max(2 * count, 1), dtype=dtype, device=device)
        return kept[:count].view(shape)

    def copy(self, name: str, source: Tensor) -> Tensor:
        """The same numbers in a tensor of a name."""
        return self.empty(name, tuple(source.shape), source.dtype, source.device).copy_(source)


class _Before:
    """The lists of a pass's layers, for the next pass, if it is of the same kind: PyTorch compares all tensors of a
    pass with those of the one before in a tenth of the time that their shapes take here.

    Args:
        of_pass: as of `TokenStep.read_layers`.
        others: the plain layers but for the first one, which holds this object.
        guards: what compares, by class, dtype, device, shape and strides.
        lists: of the layers.
    """

    def __init__(self, of_pass: tuple[Any, ...], others: list[Any], guards: Any, lists: Any):
        self.of_pass, self.others, self.guards, self.lists = of_pass, others, guards, lists

    @classmethod
    def of(cls, of_pass: tuple[Any, ...], others: list[Any], tensors: list[Tensor], lists: Any) -> "_Before | None":
        """None where this release of PyTorch has no such comparison."""
        if TensorGuards is None:
            return None
        guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        return cls(of_pass, others, guards, lists)

    def fits(self, of_pass: tuple[Any, ...], plains: list[Any], tensors: list[Tensor]) -> bool:
        """Whether a pass is of the same kind."""
        return of_pass == self.of_pass and plains[1:] == self.others and self.guards.check(*tensors)


# Layers of one kind that follow each other, and the lists of their launches, by what changes from token to token.
LikeLayers = tuple["Lists", list[StepLayer]]


class TokenStep:
    """One new token in each row, through all layers: what the steps of both kinds of decoders share.

    Args:
        hidden_states: [rows, 1, d_model], what goes into the first layer.
        layers: in their order.
    """

    # of the layers of the memory's cache
    memory_class: type[DynamicLayer] = DynamicLayer

    def __init__(self, hidden_states: Tensor, layers: list[LikeLayers]):
        self.rows, _, self.d = hidden_states.shape
        self.dtype, self.device = hidden_states.dtype, hidden_states.device
        self.hidden_states, self.layers = hidden_states, layers
        self.repeats = may_repeat(hidden_states)
        _, (first, *_) = layers[0]
        self.buffers = StepBuffers.of(first.cache)

    def room(self, count: int) -> Tensor:
        """So many bytes for temporary tensors."""
        return self.buffers.empty("room", (count,), torch.uint8, self.device)

    @staticmethod
    def fits(of_pass: tuple[Any, ...], layer: StepLayer) -> bool:
        """Whether a layer's tensors have the shapes and dtypes that straight lines are written for; `of_pass`, as of
        `read_layers`, begins with dtype, device, shape of the states, and shape of the memory's mask."""
        raise NotImplementedError

    @classmethod
    def read_layers(
        cls,
        of_pass: tuple[Any, ...],
        read: Sequence[tuple[Any, tuple[Tensor, ...]]],
        caches: tuple[DynamicCache, DynamicCache | None, dict[int, bool]],
        state_of: Callable[[Any, Any], tuple[Tensor, ...] | None],
        index: int,
    ) -> list[LikeLayers] | None:
        """The layers; None where modules have to run.

        Args:
            of_pass: all that lists of launches depend on beside the layers.
            read: what `PlainStack.read` gave.
            caches: what `caches_of` gave.
            state_of: from a plain layer and its cache to the `state` of a `StepLayer`; None where these do not fit.
            index: of the device.
        """
        own_cache, memory_cache, is_updated = caches
        if len(own_cache.layers) < len(read):
            return None
        layers: list[StepLayer] = []
        for layer_idx, ((plain, weights), cache) in enumerate(zip(read, own_cache.layers, strict=False)):
            memory = memory_of(plain, layer_idx, memory_cache, is_updated, cls.memory_class)
            state = state_of(plain, cache)
            if memory is None or state is None:
                return None
            layers.append(StepLayer(plain, weights, cache, state, memory, (*weights, *state, *memory)))
        # all layers' tensors are looked at together: one by one it takes the host several times as long
        tensors = list(chain.from_iterable(map(_TENSORS, layers)))
        first_layer, plains = layers[0].plain, [layer.plain for layer in layers]
        before: _Before | None = first_layer.before
        if before is not None and before.fits(of_pass, plains, tensors):
            lists = before.lists
        else:
            if not all(map(Tensor.is_contiguous, tensors)) or set(map(Tensor.get_device, tensors)) != {index}:
                return None
            kind = (of_pass, *[plain.kind for plain in plains], *map(_SHAPE, tensors), *map(_DTYPE, tensors))
            lists = lists_of(kind, partial(cls.make_lists, of_pass, layers))
            first_layer.before = _Before.of(of_pass, plains[1:], tensors, lists)
        return None if lists is None else [(own, layers[first:end]) for own, first, end in lists]

    @classmethod
    def make_lists(cls, of_pass: tuple[Any, ...], layers: list[StepLayer]) -> "list[tuple[Lists, int, int]] | None":
        """Lists, without a launch yet, for each run of like layers, and where it begins and ends; None where modules
        have to run."""
        runs: list[tuple[Lists, int, int]] = []
        kind: Any = None
        for number, layer in enumerate(layers):
            before, kind = kind, (layer.plain.kind, [(tensor.shape, tensor.dtype) for tensor in layer.tensors])
            if kind == before:
                lists, first, _ = runs.pop()
                runs.append((lists, first, number + 1))
            elif not layer.plain.drops_something and cls.fits(of_pass, layer):
                runs.append(({}, number, number + 1))
            else:
                return None
        return runs


class StraightStep(TokenStep):
    """One new token in each row of a plain decoder.

    Args:
        hidden_states, layers: as of `TokenStep`.
        table: bias table of the self-attention, fp32 [heads, 2 * max_distance + 1].
        mask: bool [rows, keys], of all keys with the new one; None for all.
        memory_mask: bool [rows, n]; None for all.
        length: number of keys, the new one included.
    """

    def __init__(
        self,
        hidden_states: Tensor,
        layers: list[LikeLayers],
        table: Tensor,
        mask: Tensor | None,
        memory_mask: Tensor | None,
        length: int,
    ):
        super().__init__(hidden_states, layers)
        self.table, self.length = self.buffers.copy("table", table), length
        named = {"mask": mask, "memory mask": memory_mask}
        self.masks = [None if part is None else self.buffers.copy(name, part) for name, part in named.items()]

    @classmethod
    def of(
        cls,
        hidden_states: Tensor,
        read: Sequence[tuple[PlainDecoderLayer, tuple[Tensor, ...]]],
        table: Tensor,
        attention_mask: Tensor | None,
        memory_mask: Tensor | None,
        cache: Cache | None,
    ) -> "StraightStep | None":
        """The step; None where modules have to make it, for which nothing has changed then.

        Args:
            hidden_states, table, memory_mask: as above.
            read: what `PlainStack.read` gave.
            attention_mask: [rows, keys], 1 for real tokens; None for all.
            cache: of the decoder.
        """
        caches = caches_of(cache)
        if caches is None:
            return None
        rows, length = hidden_states.shape[0], caches[0].get_seq_length()
        mask = None
        if attention_mask is not None:
            if type(attention_mask) is not Tensor or tuple(attention_mask.shape) != (rows, length + 1):
                return None
            mask = attention_mask.to(torch.bool).contiguous()
        if memory_mask is not None and not memory_mask.is_contiguous():
            memory_mask = memory_mask.contiguous()
        others = [part for part in (table, mask, memory_mask) if part is not None]
        index = hidden_states.get_device()
        if set(map(Tensor.get_device, others)) != {index} or not table.is_contiguous():
            return None
        of_pass = (
            hidden_states.dtype, hidden_states.device, hidden_states.shape,
            None if memory_mask is None else memory_mask.shape, table.dtype, table.shape, mask is None,
            torch.backends.cuda.matmul.fp32_precision,
        )  # fmt: skip

        def state_of(plain: PlainDecoderLayer, layer: Any) -> tuple[Tensor, ...] | None:
            return layer.room_for_token(length) if type(layer) is CoLT5GrowingLayer else None

        layers = cls.read_layers(of_pass, read, caches, state_of, index)
        return None if layers is None else cls(hidden_states, layers, table, mask, memory_mask, length + 1)

    def run(self) -> Tensor:
        """The states [rows, 1, d_model] behind the last layer; the caches count the token from then on."""
        # Each layer begins with a sum. The first one adds nothing to its states, which must not be written to.
        hidden = self.buffers.copy("hidden", self.hidden_states)
        update = self.buffers.empty("update", tuple(hidden.shape), self.dtype, self.device).zero_()
        # read by kernels, so that one list serves all lengths
        length = self.buffers.empty("length", (1,), torch.int32, self.device).fill_(self.length)
        shared = [hidden, update, length, self.table, *[mask for mask in self.masks if mask is not None]]
        for lists, layers in self.layers:
            calls = [[*shared, *layer.tensors] for layer in layers]
            for number, recorder in calls_to_compute(lists, None, calls, self.repeats, self.room):
                recorder(partial(_Line(self, layers[number], recorder).run, hidden, update, length))
            for layer in layers:
                layer.cache.count_token()
        return hidden + update

    @staticmethod
    def fits(of_pass: tuple[Any, ...], layer: StepLayer) -> bool:
        plain, weights, _, state, memory, _ = layer
        dtype, _, (rows, _, d), mask_shape, table_dtype, (heads, _), *_ = of_pass
        by_name = dict(zip(plain.weighted, map(tuple, map(_SHAPE, weights)), strict=True))
        inner, (d_ff, *_) = heads * plain.d_kv[0], by_name.get("dense.wi_0", (0,))
        shapes = {
            "self.layer_norm": (d,), "ff.layer_norm": (d,),
            "self.q": (inner, d), "self.k": (inner, d), "self.v": (inner, d), "self.o": (d, inner),
            "dense.wi_0": (d_ff, d), "dense.wi_1": (d_ff, d), "dense.wo": (d, d_ff),
        }  # fmt: skip
        if memory:
            cross = shapes_of_cross(by_name, plain.d_kv[1], (rows, d), memory, mask_shape)
            if cross is None:
                return False
            shapes |= cross
        key, value = state
        return (
            by_name == shapes
            and max(plain.d_kv) <= MOST_FEATURES
            and key.shape == value.shape == (rows, heads, key.shape[2], plain.d_kv[0])
            and table_dtype == torch.float32
            and all(part.dtype == dtype for part in layer.tensors)
        )


class TokenLine:
    """What lines of one new token have in common: the launches of a layer, of states [rows, 1, width].

    Args:
        step: of all layers.
        layer: whose launches these are.
        recorder: notes all launches, and makes temporary tensors.
    """

    step: Any

    def __init__(self, step: TokenStep, layer: StepLayer, recorder: "Recorder"):
        self.step, self.layer, self.plain, self.recorder = step, layer, layer.plain, recorder
        self.dtype, self.rows = step.dtype, step.rows
        self.weights: dict[str, Tensor] = dict(zip(layer.plain.weighted, layer.weights, strict=True))

    def empty(self, width: int) -> Tensor:
        """Room for states."""
        return self.recorder.temporary(self.dtype, self.rows, 1, width)

    def products(
        self,
        states: Tensor,
        names: Sequence[str],
        norm: str | None = None,
        branch: Tensor | None = None,
        total: Tensor | None = None,
        outs: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        """The products of states with up to three weights, in one launch; or of two weights, where there is room for
        one, their gated activation.

        Args:
            states: [rows, 1, width].
            names: of the weights.
            norm: the sublayer whose norm comes before; None for none.
            branch: added to the states before that; None for nothing.
            total: room for that sum; None where nobody reads it.
            outs: room for the results; made for the products where none is given.
        """
        weights = [self.weights[name] for name in names]
        outs = outs or [self.empty(len(weight)) for weight in weights]
        gain, eps = None, 0.0
        if norm is not None:
            gain, eps = self.weights[f"{norm}.layer_norm"], self.plain.named[f"{norm}.layer_norm", "eps"]
        added, summed = (None if part is None else part[:, 0] for part in (branch, total))
        inputs = (states[:, 0], added, gain, eps, *weights, *[None] * (3 - len(weights)))
        step_products_into(*inputs, summed, *[out[:, 0] for out in outs], *[None] * (3 - len(outs)))
        return tuple(outs)

    def norm(
        self,
        name: str,
        states: Tensor,
        branches: tuple[Tensor, ...],
        total: Tensor | None = None,
        routers: Tensor | None = None,
        scores: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The sum of states with branches, which is written to `total` where that is given; and the norm of it.

        Args:
            name: of the sublayer.
            states: [rows, 1, d_model].
            branches: a light one, or that and a heavy one with the indices, valid and weights of its tokens.
            total: room for the sum.
            routers: vectors [routers, d_model]; None for none.
            scores: fp32 [rows, routers, 1], room for the products of the norm with these.
        """
        normed = self.empty(states.shape[2])
        rstd = self.recorder.temporary(torch.float32, self.rows, 1)
        eps = self.plain.named[f"{name}.layer_norm", "eps"]
        scores = rstd if scores is None else scores
        inputs = (states, self.weights[f"{name}.layer_norm"], routers, eps, None, normed, scores, rstd)
        total = self.empty(states.shape[2]) if total is None else total
        light, heavy, indices, valid, factors = (*branches, None, None, None, None)[:5]
        norm_into(*inputs, light, heavy, indices, valid, factors, total)
        return total, normed

    def attend(
        self,
        query: Tensor,
        new_key: Tensor | None,
        new_value: Tensor | None,
        table: Tensor | None,
        mask: Tensor | None,
        length: Tensor | None,
        key: Tensor,
        value: Tensor,
    ) -> Tensor:
        """[rows, 1, heads * d_kv] → the same; the arguments are those of `step_attention_into`."""
        output = self.empty(query.shape[2])
        rows, groups, size, d_kv = key.shape
        parts, heads = number_of_parts(rows * groups, size), query.shape[2] // d_kv
        room: tuple[Tensor, ...] = ()
        if parts > 1:
            room = tuple(self.recorder.temporary(torch.float32, rows, heads, parts, width) for width in (d_kv, 2))
        inputs = (query[:, 0], new_key, new_value, table, mask, length, key, value, output[:, 0], *room)
        step_attention_into(*inputs)
        return output

    def cross_attention(self, query: Tensor, mask: Tensor | None, memory: tuple[Tensor, ...]) -> Tensor:
        """What the attention to a memory adds, given its keys and values."""
        return self.products(self.attend(query, None, None, None, mask, None, *memory), ["cross.o"])[0]

    def feed_forward(
        self,
        states: Tensor,
        name: str,
        out: Tensor,
        norm: str | None = None,
        branch: Tensor | None = None,
        total: Tensor | None = None,
    ) -> None:
        """Write a gated feed-forward; the other arguments are those of `products`."""
        names = [f"{name}.wi_0", f"{name}.wi_1"]
        activated = self.empty(len(self.weights[names[0]]))
        self.products(states, names, norm, branch, total, [activated])
        self.products(activated, [f"{name}.wo"], outs=[out])


class _Line(TokenLine):
    """A plain layer's launches."""

    step: StraightStep

    def run(self, hidden: Tensor, update: Tensor, length: Tensor) -> None:
        """From the sum of `hidden` and `update` to such a sum.

        Args:
            hidden, update: [rows, 1, d_model].
            length: int32 [1], number of keys.
        """
        states, (key_room, value_room) = self.empty(hidden.shape[2]), self.layer.state
        query, key, value = self.products(hidden, [f"self.{name}" for name in "qkv"], "self", update, states)
        new = (key[:, 0], value[:, 0])
        attended = self.attend(query, *new, self.step.table, self.step.masks[0], length, key_room, value_room)
        (branch,) = self.products(attended, ["self.o"])
        if self.layer.memory:
            total = self.empty(states.shape[2])
            (query,) = self.products(states, ["cross.q"], "cross", branch, total)
            states, branch = total, self.cross_attention(query, self.step.masks[1], self.layer.memory)
        # the last sum is what the next layer adds to
        self.feed_forward(states, "dense", update, "ff", branch, hidden)


# features of a head, and heads that share a key/value head, which the kernels are compiled for on all cards
MOST_FEATURES, MOST_HEADS = 128, 32

# Lists of a decoder's layers by all that they depend on; None where no straight line is written for it. Each new
# length adds one, so there is a limit.
lists_by_kind: dict[Any, Any] = {}
MOST_KINDS = 256


def lists_of(kind: Any, make: Callable[[], Any]) -> Any:
    """The lists of the layers of a kind in a pass; None where modules have to run.

    Args:
        kind: all that the lists depend on but what they are kept by.
        make: makes them, once.
    """
    # not looked for first: another thread may clear them in between
    try:
        return lists_by_kind[kind]
    except KeyError:
        lists = make()
    if len(lists_by_kind) >= MOST_KINDS:
        lists_by_kind.clear()
    lists_by_kind[kind] = lists
    return lists


def caches_of(cache: Cache | None) -> tuple[DynamicCache, DynamicCache | None, dict[int, bool]] | None:
    """The tokens' cache, the memory's, and which layers of that are filled; None where they are of other classes."""
    own: Any = cache
    memory: Any = None
    is_updated: dict[int, bool] = {}
    if isinstance(cache, EncoderDecoderCache):
        own, memory, is_updated = cache.self_attention_cache, cache.cross_attention_cache, cache.is_updated
        if type(cache) is not EncoderDecoderCache or type(memory) is not DynamicCache or memory.offloading:
            return None
    return None if type(own) is not DynamicCache or own.offloading else (own, memory, is_updated)


def goes_on(cache: Cache | None) -> bool:
    """Whether there is a cache of a class that straight lines read, with tokens in it."""
    caches = caches_of(cache)
    return caches is not None and bool(caches[0].layers) and caches[0].get_seq_length() > 0


def memory_of(
    plain: PlainDecoderLayer,
    layer_idx: int,
    cache: DynamicCache | None,
    is_updated: dict[int, bool],
    layer_class: type[DynamicLayer],
) -> tuple[Tensor, ...] | None:
    """Keys and values of the memory that a cache has for a layer; nothing where the layer reads no memory, and None
    where they are not there, or of another class of the cache's layers."""
    if "cross.q" not in plain.weighted:
        return ()
    if cache is None or not is_updated.get(layer_idx):
        return None
    memory = cache.layers[layer_idx]
    if type(memory) is not layer_class or type(memory.keys) is not Tensor or type(memory.values) is not Tensor:
        return None
    return memory.keys, memory.values


def shapes_of_cross(
    by_name: dict[str, tuple[int, ...]],
    d_kv: int,
    sizes: tuple[int, int],
    memory: tuple[Tensor, ...],
    mask_shape: tuple[int, ...] | None,
) -> dict[str, tuple[int, ...]] | None:
    """The shapes that the weights of the attention to a memory must have; None where no weights fit the memory.

    Args:
        by_name: the shapes that weights have.
        d_kv: features of a head.
        sizes: rows and d_model.
        memory: its keys and values.
        mask_shape: of the memory's mask; None where there is none.
    """
    rows, d = sizes
    cross, *_ = by_name.get("cross.q", (0,))
    key, value = memory
    if key.dim() != 4 or key.shape != value.shape or key.numel() == 0:
        return None
    if mask_shape not in (None, (rows, key.shape[2])):
        return None
    width = key.shape[1] * d_kv
    if (key.shape[0], key.shape[3]) != (rows, d_kv) or cross % width or cross // width > MOST_HEADS:
        return None
    return {"cross.layer_norm": (d,), "cross.q": (cross, d), "cross.o": (d, cross)}
