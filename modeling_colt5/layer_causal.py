"""One new token of a causally routed decoder as straight lines of kernel launches, one line a layer.

The modules of model_causal.py say what a layer computes, and run_causal_cache.py what its cache holds. A token changes
little of that cache: its keys, values and scores go into the rings, and at a window's end pools and thresholds are
made anew. Kernels therefore write there in place. Where each row's token stands in its window, the device knows; the
host only knows when some row's window may end, and only then launches the kernels that make pools and thresholds.

What layer_decoder.py says of blocks, of lists of launches and of memories holds here too.
"""

from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .kernel_backend import triton_is_available
from .layer_decoder import (
    MOST_FEATURES,
    LikeLayers,
    PlainDecoderLayer,
    StepLayer,
    TokenLine,
    TokenStep,
    caches_of,
    shapes_of_cross,
)
from .layer_plain import Parts, parts_of_attention, parts_of_dense, parts_of_sublayer
from .run_causal_cache import CoLT5DynamicRoutedLayer
from .run_causal_plan import CausalSettings

if triton_is_available():
    from .op_gates_triton import LONGEST_WINDOW, hand_thresholds_into, token_gate_into
    from .op_pools_triton import LONGEST_UNION, hand_pool_into
    from .op_rows_triton import MOST_JOINS, MOST_PARTS, combine_into, join_into
    from .op_step_attention_triton import local_step_attention_into, pool_step_attention_into
    from .run_launch_list_triton import Recorder, calls_to_compute

_SHAPE = attrgetter("shape")
# what a layer's cache holds that a token reads or writes: first rings, then what is carried
_POOL = ("pool_key", "pool_value", "pool_rank", "pool_weight", "pool_valid")
_LIGHT = (("light_key", "light_value"), ())
_HEAVY = (("heavy_key", "heavy_value", "query", "key_value_scores"), ("query", "pool_score", *_POOL))
_FEED_FORWARD = (("feed_forward",), ("feed_forward",))


class PlainRoutedLayer(PlainDecoderLayer):
    """A plain block of a causally routed decoder, with an encoder or without. Keys and values of the memory are made
    before, by modules.

    Attributes:
        has_heavy_attention, has_heavy_ff: whether a sublayer has a heavy branch.
        denses: names of the feed-forwards.
        groups: of heavy heads, each with a pool of its own.
        rings, carried: names of what the layer's cache holds for it.
    """

    __slots__ = ("carried", "denses", "groups", "has_heavy_attention", "has_heavy_ff", "rings")

    def __init__(self, block: Any, parts: dict[str, nn.Module]):
        super().__init__(block, parts)
        self.has_heavy_attention, self.has_heavy_ff = "heavy" in parts, "router" in parts
        self.denses = ("light_ff", "heavy_ff") if self.has_heavy_ff else ("dense",)
        self.groups = self.named["heavy", "groups"] if self.has_heavy_attention else 0
        kept = [_LIGHT, *[_HEAVY] * self.has_heavy_attention, *[_FEED_FORWARD] * self.has_heavy_ff]
        self.rings, self.carried = (tuple(name for names in kept for name in names[place]) for place in range(2))

    @classmethod
    def parts(cls, block: Any) -> Parts:
        attention, feed_forward = block.layer[0], block.layer[-1]
        parts: Parts = {"self_layer": ("causal_attention", attention)}
        parts |= parts_of_sublayer("self", attention, "dropout")
        parts |= parts_of_attention("light", "local_attention", attention.light_attention)
        if hasattr(attention, "heavy_attention"):
            parts |= parts_of_attention("heavy", "routed_attention", attention.heavy_attention)
            routers = attention.key_value_routers
            parts |= {"query_router": ("router", attention.query_router), "key_value_routers": ("list", routers)}
            parts |= {f"key_value_router.{number}": ("router", router) for number, router in enumerate(routers)}
        parts |= cls.parts_of_cross(block)
        if not hasattr(feed_forward, "router"):
            return parts | cls.parts_of_feed_forward(feed_forward)
        parts |= {"ff": ("causal_feed_forward", feed_forward), "router": ("router", feed_forward.router)}
        parts |= parts_of_sublayer("ff", feed_forward, "dropout")
        for name in ("light", "heavy"):
            parts |= parts_of_dense(f"{name}_ff", getattr(feed_forward, f"{name}_feed_forward"))
        return parts


class RoutedStep(TokenStep):
    """One new token in each row of a causally routed decoder.

    Args:
        hidden_states, layers: as of `TokenStep`; the layers' caches count alike.
        tables: fp32 [heads, 2 * max_distance + 1], of the light and of the heavy attention, the last where there is
            one.
        settings: of all layers.
        real: bool [rows], whether the rows' tokens are real; None for all.
        memory_mask: bool [rows, n]; None for all.
        may_end: whether a token may complete a window of its row.
    """

    memory_class = CoLT5DynamicRoutedLayer

    def __init__(
        self,
        hidden_states: Tensor,
        layers: list[LikeLayers],
        tables: tuple[Tensor, ...],
        settings: CausalSettings,
        real: Tensor | None,
        memory_mask: Tensor | None,
        may_end: bool,
    ):
        super().__init__(hidden_states, layers)
        buffers = self.buffers
        self.tables = [buffers.copy(f"table {number}", table) for number, table in enumerate(tables)]
        self.memory_mask = None if memory_mask is None else buffers.copy("memory mask", memory_mask)
        self.settings, self.real, self.may_end = settings, real, may_end
        _, (first, *_) = layers[0]
        past = first.cache.counters["lengths"]
        # The cache keeps the lengths that it gets, so that kernels read copies.
        self.lengths = past + (1 if real is None else real)
        self.past, self.total = buffers.copy("past", past), buffers.copy("total", self.lengths)

    @classmethod
    def of(
        cls,
        hidden_states: Tensor,
        read: Sequence[tuple[PlainDecoderLayer, tuple[Tensor, ...]]],
        tables: tuple[Tensor, ...],
        settings: CausalSettings,
        attention_mask: Tensor | None,
        memory_mask: Tensor | None,
        cache: Cache | None,
    ) -> "RoutedStep | None":
        """The step; None where modules have to make it, for which nothing has changed then.

        Args:
            hidden_states, tables, settings, memory_mask: as above.
            read: what `PlainStack.read` gave.
            attention_mask: [rows, keys], 1 for real tokens; None for all.
            cache: of the decoder.
        """
        caches = caches_of(cache)
        if caches is None or len(caches[0].layers) < len(read):
            return None
        own: Any = caches[0].layers[: len(read)]
        rows, first = len(hidden_states), own[0]
        if any(type(layer) is not CoLT5DynamicRoutedLayer or layer.seen != first.seen for layer in own):
            return None
        if not first.has_state or len(first.counters["lengths"]) != rows or first.window != settings.window:
            return None
        real = None
        if attention_mask is not None:
            if type(attention_mask) is not Tensor or tuple(attention_mask.shape) != (rows, first.seen + 1):
                return None
            real = attention_mask[:, -1].to(torch.bool)
        if memory_mask is not None and not memory_mask.is_contiguous():
            memory_mask = memory_mask.contiguous()
        others = [*tables, *first.counters.values(), *[part for part in (real, memory_mask) if part is not None]]
        index = hidden_states.get_device()
        if set(map(Tensor.get_device, others)) != {index} or not all(map(Tensor.is_contiguous, tables)):
            return None
        of_pass = (
            hidden_states.dtype, hidden_states.device, hidden_states.shape,
            None if memory_mask is None else memory_mask.shape, settings, *map(_SHAPE, tables),
            torch.backends.cuda.matmul.fp32_precision,
        )  # fmt: skip

        def state_of(plain: PlainRoutedLayer, layer: CoLT5DynamicRoutedLayer) -> tuple[Tensor, ...] | None:
            return layer.state_of_token(plain.rings, plain.carried)

        layers = cls.read_layers(of_pass, read, caches, state_of, index)
        # What modules leave in a cache may be views. The kernels leave it contiguous.
        if layers is None and any([layer.make_contiguous() for layer in own]):
            layers = cls.read_layers(of_pass, read, caches, state_of, index)
        if layers is None:
            return None
        # Asked last, as the answer may be waited for.
        may_end = first.tokens_before_end() == 0
        return cls(hidden_states, layers, tables, settings, real, memory_mask, may_end)

    def run(self) -> Tensor:
        """The states [rows, 1, d_model] behind the last layer; the caches count the token from then on."""
        # Each layer begins with a sum. The first one adds nothing to its states, which must not be written to.
        hidden = self.buffers.copy("hidden", self.hidden_states)
        states, slot = tuple(hidden.shape), (self.rows, 1)
        # what the last sublayer adds: by a light branch, and where there is one by a heavy one
        kinds = {"light": (states, self.dtype)}
        _, (first, *_) = self.layers[0]
        if first.plain.has_heavy_ff:
            kinds |= {"heavy": (states, self.dtype), "indices": (slot, torch.int64), "valid": (slot, torch.bool)}
            kinds |= {"weights": (slot, torch.float32)}
        branches = tuple(self.buffers.empty(name, *kind, self.device).zero_() for name, kind in kinds.items())
        shared = [hidden, *branches, self.past, self.total, *self.tables]
        shared += [] if self.memory_mask is None else [self.memory_mask]
        for lists, layers in self.layers:
            calls = [[*shared, *layer.tensors] for layer in layers]
            for number, recorder in calls_to_compute(lists, self.may_end, calls, self.repeats, self.room):
                recorder(partial(_RoutedLine(self, layers[number], recorder).run, hidden, branches))
        counters = first.cache.counters_after_token(self.lengths, self.real, self.may_end)
        for _, layers in self.layers:
            for layer in layers:
                layer.cache.count_token(counters)
        if len(branches) == 1:
            return hidden + branches[0]
        output = torch.empty_like(hidden)
        light, heavy, indices, valid, weights = branches
        combine_into(hidden, light, heavy, indices, valid, weights, None, None, None, None, 1, output)
        return output

    @staticmethod
    def fits(of_pass: tuple[Any, ...], layer: StepLayer) -> bool:
        plain, weights, _, state, memory, _ = layer
        dtype, _, (rows, _, d), mask_shape, settings, (light_heads, _), *rest = of_pass
        by_name = dict(zip(plain.weighted, map(tuple, map(_SHAPE, weights)), strict=True))
        ring, d_kv = 2 * settings.window + settings.radius, plain.named["light", "d_kv"]
        shapes: dict[str, tuple[int, ...]] = {"self.layer_norm": (d,), "ff.layer_norm": (d,)}
        sizes: dict[str, Any] = {}
        kept: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        branches = {"light": light_heads}
        if plain.has_heavy_attention:
            heads, groups, size = rest[0][0], plain.groups, settings.pool_size
            if heads % groups or plain.named["heavy", "d_kv"] != d_kv or size + settings.window > LONGEST_UNION:
                return False
            branches |= {"heavy": heads}
            shapes |= {
                name: (d,) for name in ("query_router", *[f"key_value_router.{group}" for group in range(groups)])
            }
            kept |= {"key_value_scores": ((rows, ring, groups), torch.float32), "query": ((rows, ring), torch.float32)}
            sizes |= {f"pool_{name}": (rows, 2, groups, size) for name in ("score", "rank", "weight", "valid")}
            sizes |= {f"pool_{name}": (rows, 2, groups, size, heads // groups, d_kv) for name in ("key", "value")}
            sizes |= {"query": (rows, 2, 2)}
        for name, heads in branches.items():
            inner = heads * d_kv
            shapes |= {f"{name}.{part}": (inner, d) for part in "qkv"} | {f"{name}.o": (d, inner)}
            kept |= {f"{name}_{part}": ((rows, ring, heads, d_kv), dtype) for part in ("key", "value")}
        if plain.has_heavy_ff:
            shapes |= {"router": (d,)}
            kept |= {"feed_forward": ((rows, ring), torch.float32)}
            sizes |= {"feed_forward": (rows, 2, 2)}
        for name in plain.denses:
            width = by_name.get(f"{name}.wi_0", (0,))[0]
            shapes |= {f"{name}.wi_{part}": (width, d) for part in range(2)} | {f"{name}.wo": (d, width)}
        if memory:
            cross = shapes_of_cross(by_name, plain.named["cross", "d_kv"], (rows, d), memory, mask_shape)
            if cross is None:
                return False
            shapes |= cross
        dtypes = {"pool_rank": torch.int64, "pool_valid": torch.bool, "pool_key": dtype, "pool_value": dtype}
        expected = [kept[name] for name in plain.rings]
        expected += [(sizes[name], dtypes.get(name, torch.float32)) for name in plain.carried]
        return (
            by_name == shapes
            and [(tuple(part.shape), part.dtype) for part in state] == expected
            and max(plain.d_kv) <= MOST_FEATURES
            and (not plain.carried or settings.window <= LONGEST_WINDOW)
            and all(part.dtype == dtype for part in (*weights, *memory))
        )


class _RoutedLine(TokenLine):
    """A causally routed layer's launches."""

    step: RoutedStep

    def __init__(self, step: RoutedStep, layer: StepLayer, recorder: "Recorder"):
        super().__init__(step, layer, recorder)
        rings, carried = self.plain.rings, self.plain.carried
        self.rings: dict[str, Tensor] = dict(zip(rings, layer.state, strict=False))
        self.carried: dict[str, Tensor] = dict(zip(carried, layer.state[len(rings) :], strict=True))

    def run(self, hidden: Tensor, branches: tuple[Tensor, ...]) -> None:
        """From the sum of `hidden` and branches to such a sum.

        Args:
            hidden: [rows, 1, d_model].
            branches: a light branch [rows, 1, d_model], and where the feed-forward is routed a heavy one with the
                indices, valid and weights [rows, 1] of its tokens.
        """
        states, added = self.attention(hidden, branches)
        if self.layer.memory:
            states, normed = self.norm("cross", states, added)
            (query,) = self.products(normed, ["cross.q"])
            added = (self.cross_attention(query, self.step.memory_mask, self.layer.memory),)
        self.feed_forwards(states, added, hidden, *branches)
        if self.step.may_end:
            self.hand_on()

    def feed_forwards(
        self, states: Tensor, added: tuple[Tensor, ...], hidden: Tensor, light: Tensor, *heavy: Tensor
    ) -> None:
        """The feed-forward of states, or of their sum with branches, which is written to `hidden`; what it adds is
        written to `light` and `heavy`, see `run`."""
        if not heavy:
            _, normed = self.norm("ff", states, added, hidden)
            self.feed_forward(normed, "dense", light)
            return
        scores = self.recorder.temporary(torch.float32, self.rows, 1, 1)
        _, normed = self.norm("ff", states, added, hidden, self.weights["router"][None], scores)
        self.gate("feed_forward", scores, self.step.settings.num_feed_forward, True, *heavy[1:])
        self.feed_forward(normed, "light_ff", light)
        self.feed_forward(normed, "heavy_ff", heavy[0])

    def hand_on(self) -> None:
        """Let rows whose window the token completed go on to what that hands on: thresholds and pools."""
        settings, ranks = self.step.settings, (self.step.past, self.step.total)
        targets = {"query": settings.num_queries, "feed_forward": settings.num_feed_forward}
        epsilon, ratio = float(settings.epsilon), float(settings.soft_topk_ratio)
        for name, target in targets.items():
            if name in self.carried:
                state = (self.rings[name], self.carried[name])
                hand_thresholds_into(*ranks, *state, settings.window, target, ratio * target, epsilon)
        if self.plain.has_heavy_attention:
            rings = (self.rings["key_value_scores"], self.rings["heavy_key"], self.rings["heavy_value"])
            score = self.carried["pool_score"]
            sources = self.recorder.temporary(torch.int32, *score[:, 0].shape)
            hand_pool_into(*ranks, *rings, score, *self.pool(), settings.window, ratio, epsilon, sources)

    def pool(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Keys, values, ranks, weights and valid of the pools that the cache carries."""
        key, value, rank, weight, valid = (self.carried[name] for name in _POOL)
        return key, value, rank, weight, valid

    def attention(self, states: Tensor, added: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The sum of states with branches, and the branches that the self-attention adds to it."""
        step, routers, scores = self.step, None, None
        if self.plain.has_heavy_attention:
            routers = self.routers()
            scores = self.recorder.temporary(torch.float32, self.rows, len(routers), 1)
        states, normed = self.norm("self", states, added, None, routers, scores)
        query, key, value = (part[:, 0] for part in self.products(normed, [f"light.{name}" for name in "qkv"]))
        ranks = (step.past, step.total)
        attended = self.empty(query.shape[1])
        rings = (self.rings["light_key"], self.rings["light_value"])
        states_of_light = (query, key, value, step.tables[0], *ranks, *rings)
        local_step_attention_into(*states_of_light, step.settings.radius, attended[:, 0])
        (light,) = self.products(attended, ["light.o"])
        if scores is None:
            return states, (light,)
        kinds = (torch.int64, torch.bool, torch.float32)
        slots = [self.recorder.temporary(dtype, self.rows, 1) for dtype in kinds]
        self.gate("query", scores, step.settings.num_queries, False, *slots)
        query, key, value = (part[:, 0] for part in self.products(normed, [f"heavy.{name}" for name in "qkv"]))
        attended = self.empty(query.shape[1])
        rings = (self.rings["heavy_key"], self.rings["heavy_value"])
        states_of_heavy = (query, key, value, step.tables[1], *ranks, slots[1], *rings)
        pool_step_attention_into(*states_of_heavy, *self.pool(), attended[:, 0])
        return states, (light, *self.products(attended, ["heavy.o"]), *slots)

    def routers(self) -> Tensor:
        """The vectors of the attention's routers [routers, d_model], that of the queries first."""
        vectors = [vector for name, vector in self.weights.items() if name.startswith(("query_router", "key_value"))]
        result = self.recorder.temporary(vectors[0].dtype, len(vectors), vectors[0].numel())
        starts = range(0, len(vectors), MOST_PARTS)
        joins = [(result[start : start + MOST_PARTS], *vectors[start : start + MOST_PARTS]) for start in starts]
        for start in range(0, len(joins), MOST_JOINS):
            join_into(*joins[start : start + MOST_JOINS])
        return result

    def gate(
        self, name: str, scores: Tensor, target: int, fill_first: bool, indices: Tensor, valid: Tensor, weights: Tensor
    ) -> None:
        """Route the token, as `token_gate_into` does, with the state of a name."""
        settings = self.step.settings
        ranks = (self.step.past, self.step.total)
        other_ring = self.rings["key_value_scores"] if name == "query" else None
        token_gate_into(
            scores[:, :, 0], *ranks, self.carried[name], self.rings[name], other_ring,
            settings.window, target, settings.capacity(target), float(settings.epsilon), fill_first,
            weights, indices, valid,
        )  # fmt: skip
