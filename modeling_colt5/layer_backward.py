"""The backward pass of an encoder layer as a straight line of kernel launches and products."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .kernel_backend import triton_is_available
from .layer_forward import Line
from .layer_program import RSTD, Drop, Program, Room, Slots, Weight

if triton_is_available():
    from .op_attention_gradient_triton import attention_backward_into
    from .op_attention_triton import partial_sums
    from .op_gelu_triton import gated_gelu_backward_into
    from .op_grid_attention_gradient_triton import grid_attention_backward_into, grid_partial_sums
    from .op_norm_triton import gradient_programs, norm_backward_into
    from .op_routing_gradient_triton import route_backward_into, slot_parts
    from .op_rows_triton import combine_into, gather_dot_into, join_into


class SlotGradients:
    """The places of what the backward of `Slots` needs: the scores' gradient, and for each launch the weights'
    gradient, the partial sums, the rows' scores' gradient and the budget's; for each router its weights' gradient."""

    def __init__(self, room: Room, slots: Slots, batch: int, n: int, capacities: tuple[int, ...], exact: bool):
        routers = len(capacities)
        self.scores = room.add(torch.float32, batch, routers, n)
        self.launches: list[tuple[int, int | None, int, int]] = []
        self.weights: list[int] = []
        for launch, width in enumerate(slots.width):
            rows = routers if batch == 1 else batch
            strides = (n, 1) if batch == 1 else (routers * n, 1)
            weights = room.add(torch.float32, rows, width)
            parts = slot_parts(width) if exact else 0
            sums = room.add(torch.float32, rows, parts) if parts > 1 else None
            scores = room.part(self.scores, launch * n, (rows, n), strides)
            self.launches.append((weights, sums, scores, room.add(torch.float32, rows)))
            if batch > 1:
                self.weights.append(weights)
                continue
            for router, own in enumerate(capacities):
                self.weights.append(room.part(weights, router * width, (1, own), (width, 1)))


class GradientRooms:
    """Sizes and places of what a backward pass needs besides what the forward pass kept.

    Args:
        program: of the layer.
    """

    def __init__(self, program: Program):
        batch, n, d = program.batch, program.n, program.d
        queries, keys, tokens = program.capacities
        light_heads, heavy_heads = program.light // program.light_size, program.heavy // program.heavy_size
        self.first, self.second = Room(), Room()
        exact = program.settings[1] == "exact"
        self.first_slots = SlotGradients(self.first, program.first_slots, batch, n, (queries, keys), exact)
        self.second_slots = SlotGradients(self.second, program.second_slots, batch, n, (tokens,), exact)
        shares = gradient_programs(batch, n, d)
        self.first_shares = self.first.add(torch.float32, shares, 3, d)
        self.second_shares = self.second.add(torch.float32, shares, 2, d)
        self.heavy_delta = self.first.add(torch.float32, batch, heavy_heads, queries)
        self.light_delta = self.first.add(torch.float32, batch, light_heads, n)


class Gradients:
    """Where the gradients of a layer's weights are written: side by side in one memory of each dtype.

    Args:
        program: of the layer.
        weights: in the order of `WEIGHTS`.
        needs: of which of them a gradient is wanted.
    """

    def __init__(self, program: Program, weights: Sequence[Tensor], needs: tuple[bool, ...]):
        self.needs = needs
        self.memories: list[Tensor] = []
        self.views: dict[int, Tensor] = {}
        for dtype, places, numbers in program.gradients(needs):
            memory = torch.empty(numbers, dtype=dtype, device=program.device)
            self.memories.append(memory)
            views = torch._C._nn.unflatten_dense_tensors(memory, [weights[place] for place in places])
            self.views.update(zip(places, views, strict=True))

    def wanted(self) -> list[Tensor | None]:
        """The gradients, None where none is wanted."""
        return [self.views[place] if needed else None for place, needed in enumerate(self.needs)]


class Backward:
    """The gradients of a layer, step by step.

    Args:
        line: of the forward pass's weights, memory and extras.
        gradients: of the weights, to be written.
        tables: the gradients of light and heavy table, to be written; None where not wanted.
    """

    def __init__(self, line: Line, gradients: Gradients, tables: tuple[Tensor | None, Tensor | None]):
        self.line, self.gradients, self.tables = line, gradients, tables
        self.needs, self.rooms = gradients.needs, GradientRooms(line.program)

    def weight_gradients(self, joined: Tensor, states: Tensor, first: int, count: int) -> None:
        """Write the gradients of weights from a place on, whose products have gradients [tokens, sum of widths] that
        lie side by side."""
        program, product = self.line.program, self.line.recorder.product
        needed = [place for place in range(first, first + count) if self.needs[place]]
        views = [self.gradients.views[place] for place in needed]
        if not views:
            return
        width = joined.shape[1] // count
        parts = [joined]
        if len(needed) < count:
            parts = [joined[:, (place - first) * width :][:, :width] for place in needed]
        elif len({view.dtype for view in views}) == 1:
            views = [views[0].as_strided((joined.shape[1], states.shape[1]), (states.shape[1], 1))]
        else:
            parts = list(joined.split(width, 1))
        for part, view in zip(parts, views, strict=True):
            out = view
            if view.dtype != program.dtype:
                out = self.line.temporary(program.dtype, *view.shape)
            product(part.t(), states, out)
            if out is not view:
                join_into((view, out))

    def states_gradient(self, joined: Tensor, first: int, count: int) -> Tensor:
        """The gradient of states, from those of their products with weights from a place on, side by side."""
        line = self.line
        weights = line.weights[first : first + count]
        out = line.temporary(line.program.dtype, joined.shape[0], weights[0].shape[1])
        if line.program.joins[first]:
            line.recorder.product(joined, line.joined[first], out)
            return out
        for number, (part, weight) in enumerate(zip(joined.chunk(count, 1), weights, strict=True)):
            (line.recorder.add_product if number else line.recorder.product)(part, weight, out)
        return out

    def route(
        self, router: int, slots: Slots, gradient: SlotGradients, places: list[Tensor], room: list[Tensor]
    ) -> None:
        """The routing's gradient of one launch, that of this number among those of slots; `places` are the tensors of
        the forward pass, `room` those of this one."""
        budget, mask = self.line.common.routers[router]
        scores, weights, indices, valid, state = (places[number] for number in slots.launches[router])
        weights_grad, sums, scores_grad, budget_grad = gradient.launches[router]
        route_backward_into(
            room[weights_grad], scores, budget, None, mask, None, weights.shape[1], *self.line.program.settings,
            weights, indices, valid, state, room[scores_grad], room[budget_grad], None if sums is None else room[sums],
        )  # fmt: skip

    def attend(
        self, grad: Tensor, states: tuple[Tensor, ...], size: int, table: Tensor, radius: int,
        queries: Tensor | None, keys: Tensor | None, mask: Tensor | None, drop: int, attended: Tensor, sums: Tensor,
        grads: tuple[Tensor, ...], table_grad: Tensor | None, delta: Tensor,
    ) -> None:  # fmt: skip
        """Launch the gradient of what `Line.attend` launched, whose arguments these are too.

        Args:
            grad: of what was attended.
            grads: of query, key and value, to be written.
            table_grad: of the table, likewise; None where it is not wanted.
            delta: room of the shape of `sums`.
        """
        line, width = self.line, self.line.common.width
        query, key, value = (line.heads(part, size) for part in states)
        partials = None
        if table_grad is not None:
            if width is None:
                batch, n, heads, _ = query.shape
                rows = partial_sums(n, size, query.dtype, query.device, queries is not None)
                partials = line.temporary(torch.float32, batch, heads, rows, table.shape[1])
            else:
                partials = line.temporary(torch.int64, grid_partial_sums(table, radius, queries is not None))
            line.recorder.zeros(partials)
        seed, probability = line.dropout(drop)
        operands = (line.heads(grad, size), query, key, value, table)
        rest = (
            radius, queries, keys, mask, probability, seed, line.heads(attended, size), sums,
            *(line.heads(part, size) for part in grads), table_grad, delta, partials,
        )  # fmt: skip
        if width is None:
            attention_backward_into(*operands, *rest)
        else:
            grid_attention_backward_into(*operands, width, *rest)

    def dense(self, name: str, grad: Tensor, states: Tensor, first: int, drop: int) -> Tensor:
        """The gradient of a gated feed-forward's states, and those of its weights, from the place `first` on, as
        needed; dropout as at the place `drop`."""
        line, out = self.line, self.line.weights[first + 2]
        products = line.place(f"{name}_products")
        gate, up = products.chunk(2, 1)
        tokens, width = states.shape[0], products.shape[1] // 2
        activated_grad = line.temporary(states.dtype, tokens, width)
        line.recorder.product(grad, out, activated_grad)
        joined = line.temporary(states.dtype, tokens, 2 * width)
        # the activation is cheaper to compute again than to keep, and takes the place of its gradient
        activated = activated_grad if self.needs[first + 2] else None
        gate_grad, up_grad = joined.chunk(2, 1)
        gated_gelu_backward_into(
            line.rows(activated_grad), line.rows(gate), line.rows(up), line.rows(gate_grad), line.rows(up_grad),
            *line.dropout(drop), None if activated is None else line.rows(activated),
        )  # fmt: skip
        if activated is not None:
            self.weight_gradients(grad, activated, first + 2, 1)
        del activated_grad, activated
        self.weight_gradients(joined, states, first, 2)
        return self.states_gradient(joined, first, 2)

    def norm(
        self,
        hidden_grad: Tensor,
        normed_grad: Tensor,
        scores_grad: Tensor,
        hidden_states: Tensor,
        rstd: Tensor,
        first: int,
        routers: Tensor,
        shares: Tensor,
        out: Tensor,
    ) -> None:
        """Write the gradients of a norm's states, of its weight, whose place is given, and of the routers."""
        line = self.line
        d, (attention_eps, feed_forward_eps) = line.program.d, line.program.eps
        if first == Weight.ATTENTION_NORM:
            router_first, count, eps = Weight.QUERY_ROUTER, 2, attention_eps
        else:
            router_first, count, eps = Weight.ROUTER, 1, feed_forward_eps
        # gradients of two routers lie side by side, as the routers do
        router_grads = self.gradients.views[router_first].as_strided((count, d), (d, 1))
        norm_backward_into(
            line.rows(normed_grad), scores_grad, hidden_states, line.weights[first], routers, eps, None, rstd,
            out, self.gradients.views[first], router_grads, hidden_grad, shares,
        )  # fmt: skip

    def run(self, grad: Tensor, hidden_states: Tensor, out: Tensor) -> None:
        """All gradients.

        Args:
            grad: of what the layer gave, [batch, n, d_model].
            hidden_states: what it got.
            out: the gradient of that, to be written.
        """
        if self.line.program.casts:
            self.line.cast_matrices(copies=False)
        self.line.join_weights()
        hidden_grad, update_grad = self.feed_forward(grad)
        self.attention(hidden_grad, update_grad, hidden_states, out)

    def feed_forward(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of what the feed-forward got, [batch, n, d_model], of the residual and of the branches before
        it."""
        line, program, own = self.line, self.line.program, self.rooms
        rows, d = line.rows, program.d
        light_grad = line.dropped(grad, Drop.FEED_FORWARD)
        grad_of_update = light_grad if program.drops[Drop.FEED_FORWARD] > 0 else grad
        places = program.second.views(line.place("second"))
        room = own.second.views(line.temporary(torch.uint8, own.second.size))
        gradient = own.second_slots
        ((indices, valid, weights),) = program.second_slots.tokens(places)
        normed, states = line.place("second_normed"), line.place("states")
        with line.heavy():
            heavy_grad = line.temporary(program.dtype, *states.shape)
            gather_dot_into(
                grad_of_update, rows(line.place("heavy")), indices, valid, weights, rows(heavy_grad),
                room[gradient.weights[0]],
            )  # fmt: skip
            self.route(-1, program.second_slots, gradient, places, room)
            states_grad = self.dense("heavy", heavy_grad, states, Weight.HEAVY_WI_0, Drop.HEAVY_FF)
            del heavy_grad
        normed_grad = self.dense("light", light_grad.view(-1, d), normed, Weight.LIGHT_WI_0, Drop.LIGHT_FF)
        line.join()
        total = line.temporary(program.dtype, *normed.shape)
        routed = (rows(states_grad), indices, valid, None)
        combine_into(rows(normed_grad), None, *routed, None, None, None, None, program.n, rows(total))
        del normed_grad, states_grad, routed
        result = line.temporary(program.hidden_dtype, *grad.shape)
        self.norm(
            grad, total, room[gradient.scores], line.place("hidden"), places[RSTD],
            Weight.FEED_FORWARD_NORM, line.weights[Weight.ROUTER].view(1, -1), room[own.second_shares], result,
        )  # fmt: skip
        return result, line.dropped(result, Drop.ATTENTION) if program.drops[Drop.ATTENTION] > 0 else result

    def attention(self, grad: Tensor, update_grad: Tensor, hidden_states: Tensor, out: Tensor) -> None:
        """The gradient of what the attention got, of its weights and of the tables."""
        line, program, own = self.line, self.line.program, self.rooms
        rows, d = line.rows, program.d
        places = program.first.views(line.place("first"))
        room = own.first.views(line.temporary(torch.uint8, own.first.size))
        slots, gradient = program.first_slots, own.first_slots
        queries, keys = slots.tokens(places)
        query_states, key_states = line.place("query_states"), line.place("key_states")

        with line.heavy():
            heavy_grad = line.temporary(program.dtype, *query_states.shape)
            gather_dot_into(
                update_grad, rows(line.place("heavy_update")), *queries, rows(heavy_grad), room[gradient.weights[0]]
            )
            attended, query, key_value = (line.place(name) for name in ("heavy_attended", "query", "key_value"))
            self.weight_gradients(heavy_grad, attended, Weight.HEAVY_O, 1)
            attended_grad = line.temporary(program.dtype, *attended.shape)
            line.recorder.product(heavy_grad, line.weights[Weight.HEAVY_O], attended_grad)
            del heavy_grad
            query_grad = line.temporary(program.dtype, *query.shape)
            key_value_grad = line.temporary(program.dtype, *key_value.shape)
            self.attend(
                attended_grad, (query, *key_value.chunk(2, 1)), program.heavy_size, line.tables[1], 0, queries[0],
                *keys[:2], Drop.HEAVY_ATTENTION, attended, places[program.heavy_sums],
                (query_grad, *key_value_grad.chunk(2, 1)), self.tables[1], room[own.heavy_delta],
            )  # fmt: skip
            del attended_grad
            self.weight_gradients(query_grad, query_states, Weight.HEAVY_Q, 1)
            self.weight_gradients(key_value_grad, key_states, Weight.HEAVY_K, 2)
            query_states_grad = line.temporary(program.dtype, *query_states.shape)
            line.recorder.product(query_grad, line.weights[Weight.HEAVY_Q], query_states_grad)
            key_states_grad = self.states_gradient(key_value_grad, Weight.HEAVY_K, 2)
            del query_grad, key_value_grad

        normed = line.place("normed")
        attended, query_key_value = line.place("light_attended"), line.place("query_key_value")
        light_grad = line.rounded(update_grad, program.dtype).view(-1, d)
        self.weight_gradients(light_grad, attended, Weight.LIGHT_O, 1)
        attended_grad = line.temporary(program.dtype, *attended.shape)
        line.recorder.product(light_grad, line.weights[Weight.LIGHT_O], attended_grad)
        del light_grad, update_grad
        query_key_value_grad = line.temporary(program.dtype, *query_key_value.shape)
        self.attend(
            attended_grad, query_key_value.chunk(3, 1), program.light_size, line.tables[0], program.radius, None,
            None, line.common.mask, Drop.LIGHT_ATTENTION, attended, places[program.light_sums],
            query_key_value_grad.chunk(3, 1), self.tables[0], room[own.light_delta],
        )  # fmt: skip
        del attended_grad
        self.weight_gradients(query_key_value_grad, normed, Weight.LIGHT_Q, 3)
        normed_grad = self.states_gradient(query_key_value_grad, Weight.LIGHT_Q, 3)
        del query_key_value_grad
        line.join()

        gather_dot_into(rows(normed), rows(key_states_grad), *keys[:2], None, None, room[gradient.weights[1]])
        for router in range(len(slots.launches)):
            self.route(router, slots, gradient, places, room)
        total = line.temporary(program.dtype, *normed.shape)
        combine_into(
            rows(normed_grad), None, rows(query_states_grad), *queries[:2], None,
            rows(key_states_grad), *keys, program.n, rows(total),
        )  # fmt: skip
        del normed_grad, query_states_grad, key_states_grad
        self.norm(
            grad, total, room[gradient.scores], hidden_states, places[RSTD],
            Weight.ATTENTION_NORM, line.place("routers"), room[own.first_shares], out,
        )  # fmt: skip
