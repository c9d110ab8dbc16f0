"""The forward pass of an encoder layer as a straight line of kernel launches and products."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .kernel_backend import triton_is_available
from .layer_program import RSTD, SCORES, Drop, Room, Weight

if TYPE_CHECKING:
    from .layer_encoder import StraightLayer
if triton_is_available():
    from .op_attention_triton import attention_into
    from .op_dropout_triton import dropout_into
    from .op_gelu_triton import gated_gelu_into
    from .op_grid_attention_triton import grid_attention_into
    from .op_norm_triton import norm_into
    from .op_routing_triton import route_into, sharing_shapes
    from .op_rows_triton import MOST_JOINS, clamp_into, combine_into, gather_into, join_into
    from .run_launch_list_triton import Recorder

# Groups of matrices of the same size.
_ALIKE = (
    (Weight.LIGHT_Q, Weight.LIGHT_K, Weight.LIGHT_V, Weight.LIGHT_O),
    (Weight.HEAVY_Q, Weight.HEAVY_K, Weight.HEAVY_V, Weight.HEAVY_O),
    (Weight.LIGHT_WI_0, Weight.LIGHT_WI_1, Weight.LIGHT_WO),
    (Weight.HEAVY_WI_0, Weight.HEAVY_WI_1, Weight.HEAVY_WO),
)
# The weights whose products with the same states may be one product: the first one's place, and how many they are.
_JOINED = {Weight.LIGHT_Q: 3, Weight.HEAVY_K: 2, Weight.LIGHT_WI_0: 2, Weight.HEAVY_WI_0: 2}


class Line:
    """A call of a layer: its weights, its memory, and what computes.

    Args:
        layer: whose call it is, with program, plan, weights and tables.
        recorder: notes launches, makes temporary tensors and products.
        layout, memory: of what outlives the call.
        seeds: of what the layer drops, int64 [6, 2] by the places of `Drop`; None where it drops nothing.
    """

    def __init__(
        self, layer: "StraightLayer", recorder: "Recorder", layout: Room, memory: Tensor, seeds: Tensor | None = None
    ):
        self.program, self.plan, self.common = layer.program, layer.plan, layer.common
        self.weights, self.tables = list(layer.weights), layer.tables
        self.recorder, self.layout, self.memory, self.seeds = recorder, layout, memory, seeds
        self.joined: dict[int, Tensor] = {}
        self.temporary = recorder.temporary

    @contextmanager
    def heavy(self) -> Iterator[None]:
        """Inside is what a heavy branch computes, which may run beside what comes after until `join`. What it reads
        must live until then."""
        with self.plan.heavy(), self.recorder.aside():
            yield

    def join(self) -> None:
        """Wait for the heavy branch."""
        self.plan.join()
        self.recorder.join()

    def place(self, name: str) -> Tensor:
        """The tensor of a name, in the memory of what outlives the call or as a temporary one."""
        if name in self.layout.numbers:
            return self.layout.view(self.memory, name)
        dtype, shape = self.program.others[name]
        return self.temporary(dtype, *shape)

    def rows(self, states: Tensor) -> Tensor:
        """States [batch * n, width] as kernels see them, [batch, n, width]."""
        return states.unflatten(0, (self.program.batch, -1))

    def heads(self, states: Tensor, size: int) -> Tensor:
        """States [batch * n, heads * size] as [batch, n, heads, size]."""
        return self.rows(states).unflatten(-1, (-1, size))

    def cast_matrices(self, copies: bool) -> None:
        """Let copies in the products' dtype, side by side in one memory, stand for the layer's matrices; they are made
        only if `copies`."""
        memory = self.place("matrices")
        joins: list[tuple[Tensor, ...]] = []
        first = 0
        for group in _ALIKE:
            matrices = [self.weights[place] for place in group]
            size = matrices[0].numel()
            joins.append((memory.narrow(0, first, size * len(group)), *matrices))
            for place, matrix in zip(group, matrices, strict=True):
                self.weights[place] = memory.narrow(0, first, size).view(matrix.shape)
                first += size
        if copies:
            join_into(*joins)

    def join_weights(self, *others: tuple[Tensor, ...]) -> None:
        """Put weights side by side whose products with the same states are one; other joins in the same launch."""
        joins = list(others)
        for first, count in _JOINED.items():
            if self.program.joins[first]:
                weights = self.weights[first : first + count]
                width, d = weights[0].shape
                if self.program.casts:
                    self.joined[first] = weights[0].as_strided((count * width, d), (d, 1))
                else:
                    self.joined[first] = self.temporary(weights[0].dtype, count * width, d)
                    joins.append((self.joined[first], *weights))
        for number in range(0, len(joins), MOST_JOINS):
            join_into(*joins[number : number + MOST_JOINS])

    def products(self, states: Tensor, first: int, count: int, out: Tensor) -> None:
        """Write the products of states with weights from a place on to `out`, side by side."""
        product = self.recorder.product
        if self.program.joins[first]:
            product(states, self.joined[first].t(), out)
            return
        width = out.shape[1] // count
        for part, weight in zip(out.split(width, 1), self.weights[first:], strict=False):
            product(states, weight.t(), part)

    def attend(
        self, states: tuple[Tensor, ...], size: int, table: Tensor, radius: int, queries: Tensor | None,
        keys: Tensor | None, mask: Tensor | None, drop: int, attended: Tensor, sums: Tensor,
    ) -> None:  # fmt: skip
        """Launch the attention of a text, or of a picture where the tokens are a grid's places.

        Args:
            states: of query, key and value, [batch * tokens, heads * size] each.
            size: of a head.
            table, radius, mask: as of `attention_into`.
            queries, keys: the places of routed tokens; None for all.
            drop: the place of `Drop` for what is dropped.
            attended, sums: its results, the first one like the query.
        """
        seed, probability = self.dropout(drop)
        query, key, value = (self.heads(part, size) for part in states)
        rest = (radius, queries, keys, mask, probability, seed, self.heads(attended, size), sums)
        if self.common.width is None:
            attention_into(query, key, value, table, *rest)
        else:
            grid_attention_into(query, key, value, table, self.common.width, *rest)

    def dropout(self, place: int) -> tuple[Tensor | None, float]:
        """The seed of a place of `Drop`, None where it drops nothing, and with which probability it drops."""
        probability = self.program.drops[place]
        return (None if self.seeds is None or probability == 0 else self.seeds[place, :1]), probability

    def dropped(self, states: Tensor, place: int) -> Tensor:
        """Contiguous states, dropped as at a place and rounded to the products' dtype."""
        seed, probability = self.dropout(place)
        if seed is None:
            return self.rounded(states, self.program.dtype)
        result = self.temporary(self.program.dtype, *states.shape)
        dropout_into(states, seed, probability, result)
        return result

    def rounded(self, states: Tensor, dtype: torch.dtype) -> Tensor:
        """Contiguous states in a dtype."""
        if states.dtype == dtype:
            return states
        result = self.temporary(dtype, *states.shape)
        join_into((result, states))
        return result


# What a sublayer sums: residual and light branch [batch, n, d_model], heavy branch [batch, slots,
# d_model], and its indices, valid and weights.
Branches = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def combined(line: Line, parts: Branches, out: Tensor, drop: int) -> None:
    """Write the sum of branches, [batch, n, d_model], with dropout as at a place of `Drop`."""
    combine_into(*parts, None, None, None, None, line.program.n, out, *line.dropout(drop))
    if out.dtype == torch.float16:
        # `clamp_half` of model_layers.py
        clamp_into(out, torch.finfo(torch.float16).max - 1000)


def parts_of(line: Line) -> Branches:
    """What a layer without gradients leaves in its memory."""
    hidden, light, heavy = (line.layout.view(line.memory, name) for name in ("hidden", "light", "heavy"))
    room, second = line.layout.view(line.memory, "second"), line.program.second
    indices, valid, weights = (second.view(room, part) for part in line.program.second_slots.routers[0])
    return hidden, line.rows(light), line.rows(heavy), indices, valid, weights


def _route(line: Line, router: int, tensors: list[Tensor], launch: tuple[int, int, int, int, int]) -> None:
    """One launch of the routing, whose scores and results have these numbers among the tensors, see `Slots`."""
    budget, mask = line.common.routers[router]
    numbers = arrived = None
    if (shapes := sharing_shapes(budget.shape[0], line.program.n, line.program.device)) is not None:
        numbers, arrived = (line.temporary(torch.int32, *shape) for shape in shapes)
        line.recorder.zeros(arrived)
    scores, weights, indices, valid, state = (tensors[number] for number in launch)
    route_into(
        scores, budget, None, mask, None, weights.shape[1], *line.program.settings,
        weights, indices, valid, state, numbers, arrived,
    )  # fmt: skip


def attention(line: Line, incoming: Tensor | None) -> Branches:
    """The conditional attention of states [batch, n, d_model], or of the sum that the layer before has left in the
    line's memory: what its branches add to what."""
    program = line.program
    if program.casts:
        line.cast_matrices(copies=True)
    weights, routers = line.weights, line.place("routers")
    line.join_weights((routers, weights[Weight.QUERY_ROUTER], weights[Weight.KEY_VALUE_ROUTER]))
    places = program.first.views(line.place("first"))
    normed = line.place("normed")
    norm_weight = weights[Weight.ATTENTION_NORM]
    of_norm = (norm_weight, routers, program.eps[0], None, line.rows(normed), places[SCORES], places[RSTD])
    if incoming is None and program.hidden_dtype == torch.float16:
        incoming = line.place("summed")
        combined(line, parts_of(line), incoming, Drop.FEED_FORWARD)
    if incoming is None:
        incoming = line.place("summed")
        parts = parts_of(line)
        norm_into(parts[0], *of_norm, *parts[1:], incoming)
    else:
        norm_into(incoming, *of_norm)
    with line.heavy():
        slots = program.first_slots
        for router, launch in enumerate(slots.launches):
            _route(line, router, places, launch)
        queries, keys = slots.tokens(places)
        query_states, key_states = line.place("query_states"), line.place("key_states")
        gather_into(line.rows(normed), *queries[:2], None, *keys, line.rows(query_states), line.rows(key_states))
        query, key_value = line.place("query"), line.place("key_value")
        line.recorder.product(query_states, weights[Weight.HEAVY_Q].t(), query)
        line.products(key_states, Weight.HEAVY_K, 2, key_value)
        attended = line.place("heavy_attended")
        line.attend(
            (query, *key_value.chunk(2, 1)), program.heavy_size, line.tables[1], 0, queries[0], *keys[:2],
            Drop.HEAVY_ATTENTION, attended, places[program.heavy_sums],
        )  # fmt: skip
        heavy = line.place("heavy_update")
        line.recorder.product(attended, weights[Weight.HEAVY_O].t(), heavy)
        del query_states, key_states, query, key_value, attended
    query_key_value = line.place("query_key_value")
    # the heavy branch may still read `normed`, which therefore stays until both branches are done
    line.products(normed, Weight.LIGHT_Q, 3, query_key_value)
    attended = line.place("light_attended")
    line.attend(
        query_key_value.chunk(3, 1), program.light_size, line.tables[0], program.radius, None, None, line.common.mask,
        Drop.LIGHT_ATTENTION, attended, places[program.light_sums],
    )  # fmt: skip
    del query_key_value
    light = line.place("light_update")
    line.recorder.product(attended, weights[Weight.LIGHT_O].t(), light)
    line.join()
    return incoming, line.rows(light), line.rows(heavy), *queries


def _dense(line: Line, name: str, states: Tensor, first: int, drop: int) -> Tensor:
    """A gated feed-forward, [tokens, d_model] → the same shape, with the weights from the place `first` on, and
    dropout as at the place `drop`."""
    out, weight = line.place(name), line.weights[first + 2]
    products = line.place(f"{name}_products")
    line.products(states, first, 2, products)
    activated = line.temporary(states.dtype, states.shape[0], products.shape[1] // 2)
    gate, up = products.chunk(2, 1)
    gated_gelu_into(line.rows(gate), line.rows(up), line.rows(activated), *line.dropout(drop))
    del products, gate, up
    line.recorder.product(line.rounded(activated, weight.dtype), weight.t(), out)
    return out


def feed_forward(line: Line, parts: list[Tensor]) -> Branches:
    """The conditional feed-forward of the sum that `attention` gave, which it takes: what its branches add to what."""
    program = line.program
    norm_weight, router = line.weights[Weight.FEED_FORWARD_NORM], line.weights[Weight.ROUTER].view(1, -1)
    residual, light, heavy, indices, valid, weights = parts
    parts.clear()
    places = program.second.views(line.place("second"))
    normed = line.place("second_normed")
    of_norm = (norm_weight, router, program.eps[1], None, line.rows(normed), places[SCORES], places[RSTD])
    hidden_states = line.place("hidden")
    if program.hidden_dtype == torch.float16:
        combined(line, (residual, light, heavy, indices, valid, weights), hidden_states, Drop.ATTENTION)
        norm_into(hidden_states, *of_norm)
    else:
        branches = (light, heavy, indices, valid, weights)
        norm_into(residual, *of_norm, *branches, hidden_states, *line.dropout(Drop.ATTENTION))
        del branches
    del residual, light, heavy
    with line.heavy():
        _route(line, -1, places, program.second_slots.launches[0])
        ((indices, valid, weights),) = program.second_slots.tokens(places)
        states = line.place("states")
        gather_into(line.rows(normed), indices, valid, None, None, None, None, line.rows(states), None)
        heavy = _dense(line, "heavy", states, Weight.HEAVY_WI_0, Drop.HEAVY_FF)
    light = _dense(line, "light", normed, Weight.LIGHT_WI_0, Drop.LIGHT_FF)
    line.join()
    return hidden_states, line.rows(light), line.rows(heavy), indices, valid, weights
