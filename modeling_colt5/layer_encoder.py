"""An encoder layer as straight lines of kernel launches and products: its forward, and its gradient.

The modules of model_encoder.py say what a layer computes. Called one by one, their Python takes the host several times
as long as the kernels take a GPU. So a block that nobody looks into (layer_plain.py) runs here: the same kernels in
the same order, without a module, an operator or a view between them.

The first call of a kind, which is one of its shapes, dtypes and numbers, gives its launches tensors. From then on they
are repeated with the addresses of other tensors, which spares looking at any of them again.
"""

from collections.abc import Callable
from functools import reduce
from operator import attrgetter, itemgetter, or_
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import linear
from torch.nn.modules import module as torch_module

from .kernel_backend import INTERPRETED, normed_dtype, runs_eagerly, triton_is_available
from .layer_plain import WEIGHTS, PlainLayer
from .run_operator import refuse_derivatives_of_kernels

if triton_is_available():
    from .op_attention_triton import attention_backward_into, attention_forward_into, band_partials, readable
    from .op_gelu_triton import gated_gelu_backward_into, gated_gelu_into
    from .op_norm_triton import combine_norm_into, gradient_programs, norm_backward_into
    from .op_routing_triton import (
        LONGEST_ROW,
        kernels_take,
        route_backward_into,
        route_forward_into,
        sharing_room,
        slot_parts,
    )
    from .op_rows_triton import combine_into, gather_dot_into, gather_into
    from .run_launch_triton import Bound, bind, has_listeners

# False lets every block run as modules, for a comparison
enabled = True

# of the weights those that kernels read, and those of products
_VECTORS = itemgetter(0, 5, 6, 11, 15)
_MATRICES = itemgetter(1, 2, 3, 4, 7, 8, 9, 10, 12, 13, 14, 16, 17, 18)
_DTYPE = attrgetter("dtype")

Routed = tuple[Tensor, Tensor, Tensor]
# residual and light branch [batch, n, d_model], heavy branch [batch, slots, d_model], its indices, valid and weights;
# the residual alone where there is nothing to be added to it
Parts = tuple[Tensor, Tensor | None, Tensor | None, Routed | None]


def may_run_straight(hidden_states: Tensor, solver: str) -> bool:
    """Whether the blocks of this pass may run as straight lines, as far as that is not a block's own matter.

    Args:
        hidden_states: [batch, n, d_model], what goes into the first layer.
        solver: of the soft top-k.
    """
    return (
        enabled
        and runs_eagerly()
        and type(hidden_states) in (Tensor, torch.nn.Parameter)
        and hidden_states.numel() > 0
        and _product_dtype(hidden_states) is not None
        and not torch.are_deterministic_algorithms_enabled()
        and forward_ad._current_level < 0
        and not torch_module._has_any_global_hook()
        and kernels_take(hidden_states.shape[1], solver, hidden_states.device)
        and not (torch.is_grad_enabled() and hidden_states.dtype == torch.float16)
    )


def _product_dtype(hidden_states: Tensor) -> torch.dtype | None:
    """The dtype of products of these states; None where autocast takes other states than those of fp32 to another."""
    dtype, kind = hidden_states.dtype, hidden_states.device.type
    if not torch.is_autocast_enabled(kind):
        return dtype
    wanted = torch.get_autocast_dtype(kind)
    return wanted if dtype in (wanted, torch.float32) else None


def _may_repeat(states: Tensor) -> bool:
    """Whether bound launches reach these states: on the device that is the current one, by what was compiled."""
    return not INTERPRETED and states.is_cuda and torch._C._cuda_getDevice() == states.get_device()


class StraightPass:
    """What the straight lines of one pass have in common: sizes, budgets and masks.

    Args:
        hidden_states: [batch, n, d_model], what goes into the first layer.
        plan: the pass's `EncoderPlan`.
    """

    def __init__(self, hidden_states: Tensor, plan: Any):
        attention, feed_forward, settings = plan.attention, plan.feed_forward, plan.settings
        self.batch, self.n, _ = hidden_states.shape
        # of the states, and of products
        self.hidden_dtype, self.device = hidden_states.dtype, hidden_states.device
        self.dtype = _product_dtype(hidden_states) or self.hidden_dtype
        self.device_index = hidden_states.get_device()
        self.mask = plan.mask
        self.capacities = (*attention.capacities, *feed_forward.capacities)
        # as the routing kernels take them
        self.settings = (
            settings["soft_topk_ratio"], settings["solver"], settings["epsilon"], settings["num_iterations"],
            settings["epsilon_init"], settings["epsilon_decay"],
        )  # fmt: skip
        # both routers of one row are two rows of one launch; those of several rows are launched one by one, so that
        # the slots of each lie side by side
        self.routers = [(attention.budget, attention.mask)]
        if self.batch > 1:
            # copied, as kernels are launched by address only where that is a multiple of 16
            self.routers = [(budget.clone(), plan.mask) for budget in attention.budget.split(self.batch)]
        self.routers.append((feed_forward.budget, feed_forward.mask))
        read = [part for pair in self.routers for part in pair if part is not None]
        self.is_readable = all(part.stride(-1) == 1 for part in read) and (
            self.mask is None or self.mask.is_contiguous()
        )
        strides = None if self.mask is None else tuple(mask.stride(0) for _, mask in self.routers)
        dtypes = (self.hidden_dtype, self.dtype)
        self.key = (self.batch, self.n, dtypes, self.device, strides, self.capacities, self.settings)
        self.by_address = (
            _may_repeat(hidden_states) and not any(part.data_ptr() & 15 for part in read) and not has_listeners()
        )
        self.program: _Program | None = None


class _Room:
    """Where small tensors lie in one piece of memory, which takes the host as long to get as one of them would."""

    def __init__(self) -> None:
        # of each its dtype, its shape, its strides and its first byte; some are parts of others
        self.places: list[tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]] = []
        self.offsets: list[int] = []
        self.size = 0

    def add(self, dtype: torch.dtype, *shape: int) -> int:
        """A contiguous tensor; its number."""
        strides = [1]
        for length in reversed(shape[1:]):
            strides.insert(0, strides[0] * length)
        number = self._add(dtype, self.size, shape, tuple(strides))
        # whatever begins here may be read 16 bytes at once
        self.size += -(-shape[0] * strides[0] * dtype.itemsize // 128) * 128
        return number

    def part(self, number: int, first: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
        """A part of the tensor of a number, from its element `first` on; the part's number."""
        dtype, *_ = self.places[number]
        return self._add(dtype, self.offsets[number] + first * dtype.itemsize, shape, strides)

    def _add(self, dtype: torch.dtype, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
        self.places.append((dtype, shape, strides))
        self.offsets.append(offset)
        return len(self.offsets) - 1

    def take(self, device: torch.device) -> Tensor:
        """The memory."""
        return torch.empty(self.size, dtype=torch.uint8, device=device)


class _Slots:
    """The places of routers' slots in a room: for each launch its scores, weights, indices, valid and state, and for
    each router its indices, valid and weights.

    Args:
        room: where `scores` [batch, routers, n] are.
        slots: of each router.
        state: numbers of a row that its gradient needs.
    """

    def __init__(self, room: _Room, scores: int, batch: int, n: int, slots: tuple[int, ...], state: int):
        self.launches: list[tuple[int, int, int, int, int]] = []
        self.routers: list[tuple[int, int, int]] = []
        # slots of a row of each launch
        self.width: list[int] = []
        routers, dtypes = len(slots), (torch.float32, torch.int64, torch.bool)
        if batch == 1:
            width = max(slots)
            # so that each router's part begins where kernels may read 16 bytes at once
            width += -width % 16 if routers > 1 else 0
            rows = room.part(scores, 0, (routers, n), (n, 1))
            weights, indices, valid = (room.add(dtype, routers, width) for dtype in dtypes)
            self.launches.append((rows, weights, indices, valid, room.add(torch.float32, routers, state)))
            self.width.append(width)
            for router, own in enumerate(slots):
                parts = [room.part(part, router * width, (1, own), (width, 1)) for part in (indices, valid, weights)]
                self.routers.append((parts[0], parts[1], parts[2]))
            return
        for router, own in enumerate(slots):
            rows = room.part(scores, router * n, (batch, n), (routers * n, 1))
            weights, indices, valid = (room.add(dtype, batch, own) for dtype in dtypes)
            self.launches.append((rows, weights, indices, valid, room.add(torch.float32, batch, state)))
            self.width.append(own)
            self.routers.append((indices, valid, weights))


class _SlotGradients:
    """The places of what the backward of `_Slots` needs: the scores' gradient, and for each launch the weights'
    gradient, the partial sums, the rows' scores' gradient and the budget's; for each router its weights' gradient."""

    def __init__(self, room: _Room, slots: _Slots, batch: int, n: int, capacities: tuple[int, ...], exact: bool):
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


# programs by all that they depend on; a length that never comes back leaves one behind
_programs: dict[Any, "_Program | None"] = {}
MOST_PROGRAMS = 256


class _Program:
    """Sizes, places and launches of the straight lines of one kind."""

    def __init__(self, common: StraightPass, layer: PlainLayer, weights: tuple[Tensor, ...]):
        self.batch, self.n, self.d = common.batch, common.n, weights[0].numel()
        self.device, self.settings = common.device, common.settings
        self.hidden_dtype, self.dtype = common.hidden_dtype, common.dtype
        # whether autocast takes the matrices to another dtype
        self.casts = self.hidden_dtype != self.dtype
        self.numbers, self.eps, self.radius = layer.numbers, layer.eps, layer.radius
        self.drops = layer.drops
        self.dtypes, self.sizes = list(map(_DTYPE, weights)), list(map(Tensor.numel, weights))
        self.capacities = queries, keys, tokens = common.capacities
        self.light_size, self.heavy_size = layer.head_sizes
        self.light, self.heavy = weights[1].shape[0], weights[7].shape[0]
        self.light_ff, self.heavy_ff = weights[12].shape[0], weights[16].shape[0]
        batch, n, exact = self.batch, self.n, common.settings[1] == "exact"
        state = 3 if exact else common.settings[3]
        # whether products of the same states are one, with their weights joined: with as many states as it takes to
        # make up for the copy, as in `project` of model_layers.py
        self.joins_light, self.joins_heavy, self.joins_light_ff, self.joins_heavy_ff = (
            rows >= 2 * results
            for rows, results in (
                (batch * n, 3 * self.light), (batch * keys, 2 * self.heavy),
                (batch * n, 2 * self.light_ff), (batch * tokens, 2 * self.heavy_ff),
            )
        )  # fmt: skip
        # more tokens in a row than one program of the routing takes
        self.shares_rows = n > LONGEST_ROW
        # Triton's interpreter rounds to bf16 by cutting off
        self.attended = torch.float32 if INTERPRETED and self.dtype == torch.bfloat16 else self.dtype

        # the norm's reciprocals and the scores come first
        self.first, self.second = _Room(), _Room()
        for room, routers in ((self.first, 2), (self.second, 1)):
            room.add(torch.float32, batch, n)
            room.add(torch.float32, batch, routers, n)
        self.first_slots = _Slots(self.first, 1, batch, n, (queries, keys), state)
        self.second_slots = _Slots(self.second, 1, batch, n, (tokens,), state)
        self.heavy_sums = self.first.add(torch.float32, batch, self.heavy // self.heavy_size, queries)
        self.light_sums = self.first.add(torch.float32, batch, self.light // self.light_size, n)
        # what the backward needs besides
        self.first_back, self.second_back = _Room(), _Room()
        self.first_gradients = _SlotGradients(self.first_back, self.first_slots, batch, n, (queries, keys), exact)
        self.second_gradients = _SlotGradients(self.second_back, self.second_slots, batch, n, (tokens,), exact)
        shares = gradient_programs(batch, n, self.d)
        self.first_shares = self.first_back.add(torch.float32, shares, 3, self.d)
        self.second_shares = self.second_back.add(torch.float32, shares, 2, self.d)
        light_heads, heavy_heads = self.light // self.light_size, self.heavy // self.heavy_size
        self.heavy_delta = self.first_back.add(torch.float32, batch, heavy_heads, queries)
        self.light_delta = self.first_back.add(torch.float32, batch, light_heads, n)
        band = band_partials(n, self.light_size, self.attended, self.device)
        self.light_partials = (batch, light_heads, band)
        self.heavy_partials = (batch, heavy_heads, queries)
        self.bound: dict[str, Bound | None] = {}
        self.ready: set[str] = set()
        self.way = _Addresses(self)

    @staticmethod
    def of(
        common: StraightPass, layer: PlainLayer, weights: tuple[Tensor, ...], tables: tuple[Tensor, Tensor]
    ) -> "_Program | None":
        """The program for these weights; None where there is none for such shapes or dtypes."""
        last = common.program
        dtypes, sizes = list(map(_DTYPE, weights)), list(map(Tensor.numel, weights))
        # products check the other side of a matrix
        if last is not None and (last.numbers, last.dtypes, last.sizes) == (layer.numbers, dtypes, sizes):
            return last
        shapes = tuple(part.shape for part in (*weights, *tables))
        key = (common.key, tuple(layer.numbers), tuple(dtypes), shapes)
        if key in _programs:
            program = _programs[key]
        else:
            program = _Program(common, layer, weights) if _fits(common, layer, weights, tables) else None
            if len(_programs) >= MOST_PROGRAMS:
                _programs.clear()
            _programs[key] = program
        common.program = program
        return program


def _fits(common: StraightPass, layer: PlainLayer, weights: tuple[Tensor, ...], tables: tuple[Tensor, Tensor]) -> bool:
    """Whether weights have the shapes and dtypes that the straight lines are written for."""
    dtype, hidden_dtype, d = common.dtype, common.hidden_dtype, weights[0].shape[-1]
    light, heavy = weights[1].shape[0], weights[7].shape[0]
    light_ff, heavy_ff = weights[12].shape[0], weights[16].shape[0]
    light_size, heavy_size = layer.head_sizes
    shapes = [
        (d,), (light, d), (light, d), (light, d), (d, light), (d,), (d,),
        (heavy, d), (heavy, d), (heavy, d), (d, heavy),
        (d,), (light_ff, d), (light_ff, d), (d, light_ff), (d,), (heavy_ff, d), (heavy_ff, d), (d, heavy_ff),
    ]  # fmt: skip
    matrices = _MATRICES(weights)
    if dtype != hidden_dtype:
        # autocast takes all of these
        fit = all(matrix.dtype in (torch.float32, torch.bfloat16, torch.float16) for matrix in matrices)
    else:
        # `wo` stays in fp32 in an fp16 model
        outputs = (dtype, torch.float32) if dtype == torch.float16 else (dtype,)
        kinds = [outputs if place in (10, 13) else (dtype,) for place in range(len(matrices))]
        fit = all(matrix.dtype in kind for matrix, kind in zip(matrices, kinds, strict=True))
    return (
        [tuple(weight.shape) for weight in weights] == shapes
        and light % light_size == 0
        and heavy % heavy_size == 0
        and (tables[0].shape[0], tables[1].shape[0]) == (light // light_size, heavy // heavy_size)
        and all(normed_dtype(hidden_dtype, weights[norm].dtype, None) == hidden_dtype for norm in (0, 11))
        and fit
        and weights[5].dtype == weights[6].dtype
    )


class _Tensors:
    """The way of the first call of a kind: launches get tensors, and are bound for the calls to come."""

    def __init__(self, program: _Program, kind: str):
        self.program = program
        self.kind = kind
        self.failed = INTERPRETED

    def at(self, tensor: Tensor) -> Tensor:
        """A tensor as it is."""
        return tensor

    def vectors(self, tensor: Tensor) -> Tensor:
        """A router's vector as [1, d]."""
        return tensor.view(1, -1)

    def rows(self, states: Tensor) -> Tensor:
        """States [batch * n, d] as kernels see them, [batch, n, d]."""
        return states.unflatten(0, (self.program.batch, -1))

    def heads(self, states: Tensor, size: int) -> Tensor:
        """States [batch * n, heads * size] as [batch, n, heads, size]."""
        return self.rows(states).unflatten(-1, (-1, size))

    def row_parts(self, products: tuple[Tensor, ...], width: int) -> list[Tensor]:
        """Parts of a width each of one product, or products of that width each, as `rows`."""
        return list(map(self.rows, products[0].split(width, -1) if len(products) == 1 else products))

    def head_parts(self, products: tuple[Tensor, ...], width: int, size: int) -> list[Tensor]:
        """The same as `heads`."""
        return [part.unflatten(-1, (-1, size)) for part in self.row_parts(products, width)]

    def read(self, *states: Tensor) -> tuple[Tensor, ...]:
        """States as attention's kernels read them."""
        return readable(*states)

    def places(self, room: _Room, memory: Tensor) -> list[Tensor]:
        """The tensors of a room."""
        return [
            memory.view(dtype).as_strided(shape, strides, offset // dtype.itemsize)
            for (dtype, shape, strides), offset in zip(room.places, room.offsets, strict=True)
        ]

    def run(self, name: str, function: Callable[..., None], tensors: tuple[Any, ...], *numbers: Any) -> None:
        """`function(*tensors, *numbers)`, which launches kernels."""
        if INTERPRETED:
            function(*tensors, *numbers)
            return
        bound = self.program.bound[name] = bind(function, tensors, *numbers)
        self.failed |= bound is None

    def done(self) -> None:
        """All launches of this kind of call are bound."""
        if not self.failed:
            self.program.ready.add(self.kind)


class _Addresses:
    """The way of all other calls: the same, with addresses in place of tensors."""

    at = vectors = rows = staticmethod(Tensor.data_ptr)

    def __init__(self, program: _Program):
        self.bound = program.bound
        self.item = program.dtype.itemsize

    def heads(self, states: Tensor, size: int) -> int:
        return states.data_ptr()

    def row_parts(self, products: tuple[Tensor, ...], width: int) -> list[int]:
        if len(products) > 1:
            return list(map(Tensor.data_ptr, products))
        first, step = products[0].data_ptr(), width * self.item
        return [*range(first, first + products[0].shape[1] * self.item, step)]

    def head_parts(self, products: tuple[Tensor, ...], width: int, size: int) -> list[int]:
        return self.row_parts(products, width)

    def read(self, *states: int) -> tuple[int, ...]:
        return states

    def places(self, room: _Room, memory: Tensor) -> list[int]:
        first = memory.data_ptr()
        return [first + offset for offset in room.offsets]

    def run(self, name: str, function: Callable[..., None], tensors: tuple[Any, ...], *numbers: Any) -> None:
        self.bound[name](tensors)  # type: ignore[misc]

    def done(self) -> None:
        pass


def _are_readable(common: StraightPass, tensors: list[Tensor]) -> bool:
    """Whether kernels can read tensors as they are: contiguous, and beside what goes into the first layer."""
    return all(map(Tensor.is_contiguous, tensors)) and set(map(Tensor.get_device, tensors)) == {common.device_index}


def _choose(common: StraightPass, program: _Program, kind: str, addresses: list[int]) -> Any:
    """The way of a call of a kind that reads at these addresses from outside of itself."""
    # kernels are compiled for addresses that are multiples of 16
    if kind in program.ready and common.by_address and not reduce(or_, addresses) & 15:
        return program.way
    return _Tensors(program, kind)


class StraightLayer:
    """A plain layer that is about to run as a straight line.

    Args:
        common: of this pass.
        program, way: how it runs.
        weights: in the order of `WEIGHTS`.
        tables: light and heavy bias tables [heads, 2 * max_distance + 1] in fp32.
        plan: the pass's `EncoderPlan`.
    """

    __slots__ = ("common", "plan", "program", "tables", "way", "weights")

    def __init__(
        self,
        common: StraightPass,
        program: _Program,
        way: Any,
        weights: tuple[Tensor, ...],
        tables: tuple[Tensor, Tensor],
        plan: Any,
    ):
        self.common, self.program, self.way = common, program, way
        self.weights, self.tables, self.plan = weights, tables, plan

    @classmethod
    def of(
        cls,
        layer: PlainLayer,
        weights: tuple[Tensor, ...],
        parts: Parts | list[Any],
        tables: tuple[Tensor, Tensor],
        plan: Any,
    ) -> "StraightLayer | None":
        """The layer for these weights and what goes in; None where it has to run as modules.

        Args:
            layer, weights: what `PlainBlock.read` gave.
            parts: what goes in.
            tables, plan: as above.
        """
        common = plan.straight
        drops = any(layer.drops) and (not torch.is_grad_enabled() or max(layer.drops) >= 1)
        program = None if drops else _Program.of(common, layer, weights, tables)
        if program is None:
            return None
        residual, light, heavy, routed = parts
        held, given = [*_VECTORS(weights), *tables], [residual]
        if light is not None and heavy is not None and routed is not None:
            given += (light, heavy, *routed)
        addresses = [common.device_index, *map(Tensor.data_ptr, held)]
        if addresses != layer.addresses:
            if not _are_readable(common, held):
                return None
            layer.addresses = addresses
        if not (common.is_readable and _are_readable(common, given)):
            return None
        kind = "parts" if light is not None else "training" if torch.is_grad_enabled() else "states"
        way = _choose(common, program, kind, [*addresses[1:], *map(Tensor.data_ptr, given)])
        return cls(common, program, way, weights, tables, plan)

    def run_with_gradient(self, hidden_states: Tensor) -> Tensor:
        """From states to states [batch, n, d_model], for a backward pass."""
        # past Function.apply, which looks through the arguments for what torch.func left behind
        return _apply(self, hidden_states, *self.tables, *self.weights)

    def run(self, parts: list[Any]) -> Parts:
        """Without gradients, from parts to parts; those that go in are taken out of their list, so that their memory
        comes back as soon as it can."""
        if self.program.casts:
            _cast(self)
        after = _attention(self, parts, None)
        result = _feed_forward(self, after, None)
        self.way.done()
        return result


def _cast(line: StraightLayer) -> Tensor:
    """Put copies of the matrices in the products' dtype in the place of the layer's; gives the memory of all."""
    matrices = list(_MATRICES(line.weights))
    memory = torch.empty(sum(map(Tensor.numel, matrices)), dtype=line.program.dtype, device=line.program.device)
    copies = _copies(memory, matrices)
    torch._foreach_copy_(copies, matrices)
    line.weights = _with_matrices(line.weights, copies)
    return memory


def _copies(memory: Tensor, matrices: list[Tensor]) -> list[Tensor]:
    """The matrices' places in a memory."""
    parts = memory.split_with_sizes(list(map(Tensor.numel, matrices)))
    return [part.view(matrix.shape) for part, matrix in zip(parts, matrices, strict=True)]


def _with_matrices(weights: tuple[Tensor, ...], matrices: list[Tensor]) -> tuple[Tensor, ...]:
    """Weights with other matrices."""
    query, *rest = matrices
    key, value, output, *heavy = rest
    first, second = heavy[:4], heavy[4:]
    return (
        weights[0], query, key, value, output, weights[5], weights[6], *first,
        weights[11], *second[:3], weights[15], *second[3:],
    )  # fmt: skip


def combined(parts: Parts | list[Any]) -> Tensor:
    """The sum of a sublayer's parts, [batch, n, d_model]."""
    residual, light, heavy, routed = parts
    if light is None or heavy is None or routed is None:
        return residual
    hidden_states = torch.empty_like(residual)
    indices, valid, weights = routed
    combine_into(residual, light, heavy, indices, valid, weights, None, None, None, None, hidden_states)
    return _clamped(hidden_states)


def _clamped(hidden_states: Tensor) -> Tensor:
    """`clamp_half` of model_layers.py in place."""
    if hidden_states.dtype == torch.float16:
        limit = torch.finfo(torch.float16).max - 1000
        hidden_states.clamp_(-limit, limit)
    return hidden_states


def _products(joins: bool, states: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """The states' product with the weights joined, or with each."""
    return (linear(states, torch.cat(weights)),) if joins else tuple([linear(states, weight) for weight in weights])


def _rounded(states: Tensor, dtype: torch.dtype) -> Tensor:
    return states if states.dtype == dtype else states.to(dtype)


def _seed(program: _Program, place: int) -> Tensor | None:
    """What attention's dropout of a place in `PlainLayer.drops` follows from, drawn as the modules draw it."""
    return torch.randint(2**63 - 1, (1,), device=program.device) if program.drops[place] > 0 else None


def _drop(states: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """What `torch.nn.functional.dropout` gives for the same state of the generator, and what `_drop_again` needs."""
    if states.is_cuda:
        return torch.native_dropout(states, probability, True)
    factors = torch.empty_like(states).bernoulli_(1 - probability).div_(1 - probability)
    return states * factors, factors


def _drop_again(states: Tensor, dropped: Tensor, probability: float) -> Tensor:
    """The same for other states, such as their gradient, by what `_drop` gave."""
    if dropped.dtype == torch.bool:
        return torch.ops.aten.native_dropout_backward(states, dropped, 1 / (1 - probability))
    return states * dropped


def _route(line: StraightLayer, router: int, name: str, scores: Any, results: list[Any]) -> None:
    """One launch of the routing: `results` are weights, indices, valid and state."""
    program, at = line.program, line.way.at
    budget, mask = line.common.routers[router]
    shared: tuple[Any, ...] = (None, None)
    if program.shares_rows:
        # held until the launch is made
        numbers, arrived = sharing_room(budget.shape[0], program.n, program.device)
        shared = (at(numbers), at(arrived))
    rows = (scores, at(budget), None, None if mask is None else at(mask), None)
    line.way.run(name, route_forward_into, (*rows, *results, *shared), *program.settings)


def _attention(line: StraightLayer, parts: list[Any], kept: list[Tensor] | None) -> list[Any]:
    """The conditional attention: its parts, whose slots lie in the memory that comes last."""
    program, way, common = line.program, line.way, line.common
    norm_weight, q, k, v, o, query_router, key_router, heavy_q, heavy_k, heavy_v, heavy_o = line.weights[:11]
    at, rows, run = way.at, way.rows, way.run
    dtype, device, d, batch = program.dtype, program.device, program.d, program.batch
    queries, keys, _ = program.capacities
    routers = torch.cat((query_router, key_router)).view(2, -1)
    memory = program.first.take(device)
    places = way.places(program.first, memory)
    normed = torch.empty(batch * program.n, d, dtype=dtype, device=device)
    residual, light, heavy, routed = parts
    parts.clear()
    if light is not None and program.hidden_dtype == torch.float16:
        residual, light = combined((residual, light, heavy, routed)), None
    if light is None:
        hidden_states = residual
        run(
            "norm", combine_norm_into,
            (at(residual), *[None] * 5, at(norm_weight), at(routers), None, rows(normed), *places[:2]),
            program.eps[0],
        )  # fmt: skip
    else:
        hidden_states = torch.empty_like(residual)
        run(
            "sum and norm", combine_norm_into,
            (
                at(residual), at(light), at(heavy), *map(at, routed), at(norm_weight), at(routers),
                at(hidden_states), rows(normed), *places[:2],
            ),
            program.eps[0],
        )  # fmt: skip
    del residual, light, heavy, routed
    with line.plan.heavy():
        slots = program.first_slots
        for router, (scores, *results) in enumerate(slots.launches):
            _route(line, router, f"route {router}", places[scores], [places[result] for result in results])
        query_slots, key_slots = ([places[part] for part in router] for router in slots.routers)
        query_states = torch.empty(batch * queries, d, dtype=dtype, device=device)
        key_states = torch.empty(batch * keys, d, dtype=dtype, device=device)
        run(
            "gather queries and keys", gather_into,
            (rows(normed), *query_slots[:2], None, rows(query_states), *key_slots, rows(key_states)),
        )  # fmt: skip
        query = linear(query_states, heavy_q)
        key_value = _products(program.joins_heavy, key_states, heavy_k, heavy_v)
        width, size = program.heavy, program.heavy_size
        attended = torch.empty(batch * queries, width, dtype=program.attended, device=device)
        states = way.read(way.heads(query, size), *way.head_parts(key_value, width, size))
        heavy_seed = _seed(program, 1)
        run(
            "heavy attention", attention_forward_into,
            (
                *states, at(line.tables[1]), query_slots[0], key_slots[0], key_slots[1],
                None if heavy_seed is None else at(heavy_seed),
                way.heads(attended, size), places[program.heavy_sums],
            ),
            0, program.drops[1],
        )  # fmt: skip
        attended = _rounded(attended, dtype)
        heavy = linear(attended, heavy_o)
    if kept is not None:
        kept += (hidden_states, memory, normed, heavy, query_states, key_states, attended, query, *key_value)
    width, size = program.light, program.light_size
    query_key_value = _products(program.joins_light, normed, q, k, v)
    attended = torch.empty(batch * program.n, width, dtype=program.attended, device=device)
    states = way.read(*way.head_parts(query_key_value, width, size))
    seed = _seed(program, 0)
    run(
        "light attention", attention_forward_into,
        (
            *states, at(line.tables[0]), None, None, None if common.mask is None else at(common.mask),
            None if seed is None else at(seed), way.heads(attended, size), places[program.light_sums],
        ),
        program.radius, program.drops[0],
    )  # fmt: skip
    attended = _rounded(attended, dtype)
    light = linear(attended, o)
    line.plan.join()
    if kept is not None:
        seeds = [part for part in (heavy_seed, seed) if part is not None]
        kept += (attended, *query_key_value, *seeds)
    return [hidden_states, light, heavy, query_slots, memory]


def _dense(
    line: StraightLayer,
    name: str,
    joins: bool,
    states: Tensor,
    wi_0: Tensor,
    wi_1: Tensor,
    wo: Tensor,
    drop: float,
    kept: list[Tensor] | None,
) -> Tensor:
    """A gated feed-forward, [tokens, d_model] → the same shape."""
    way, width = line.way, wi_0.shape[0]
    products = _products(joins, states, wi_0, wi_1)
    if kept is not None:
        kept += products
    activated = torch.empty(states.shape[0], width, dtype=states.dtype, device=states.device)
    way.run(name, gated_gelu_into, (*way.row_parts(products, width), way.rows(activated)))
    del products
    if drop > 0:
        activated, dropped = _drop(activated, drop)
        if kept is not None:
            kept.append(dropped)
    return linear(_rounded(activated, wo.dtype), wo)


def _feed_forward(line: StraightLayer, parts: list[Any], kept: list[Tensor] | None) -> Parts:
    """The conditional feed-forward, from what `_attention` gave, which it takes, to parts."""
    program, way = line.program, line.way
    norm_weight, wi_0, wi_1, wo, router, heavy_wi_0, heavy_wi_1, heavy_wo = line.weights[11:]
    at, rows, run = way.at, way.rows, way.run
    dtype, device, d, batch = program.dtype, program.device, program.d, program.batch
    tokens = program.capacities[2]
    residual, light, heavy, routed, memory_of_slots = parts
    parts.clear()
    memory = program.second.take(device)
    places = way.places(program.second, memory)
    normed = torch.empty(batch * program.n, d, dtype=dtype, device=device)
    hidden_states = torch.empty_like(residual)
    summands = (at(residual), rows(light), rows(heavy), *routed)
    vectors = (at(norm_weight), way.vectors(router))
    dropped = None
    if program.drops[2] > 0:
        update = torch.empty(residual.shape, dtype=dtype, device=device)
        run("branches", combine_into, (rows(light), None, rows(heavy), *routed, *[None] * 4, at(update)))
        update, dropped = _drop(update, program.drops[2])
        summands = (at(residual), at(update), *[None] * 4)
        results = (at(hidden_states), rows(normed), *places[:2])
        run("second sum and norm", combine_norm_into, (*summands, *vectors, *results), program.eps[1])
        del update
    elif program.hidden_dtype == torch.float16:
        run("sum", combine_into, (*summands, None, None, None, None, at(hidden_states)))
        states = at(_clamped(hidden_states))
        results = (None, rows(normed), *places[:2])
        run("second norm", combine_norm_into, (states, *[None] * 5, *vectors, *results), program.eps[1])
    else:
        results = (at(hidden_states), rows(normed), *places[:2])
        run("second sum and norm", combine_norm_into, (*summands, *vectors, *results), program.eps[1])
    del residual, light, heavy, memory_of_slots
    with line.plan.heavy():
        ((scores, *_, state),) = program.second_slots.launches
        factors = torch.empty(batch, tokens, dtype=torch.float32, device=device)
        indices = torch.empty(batch, tokens, dtype=torch.int64, device=device)
        valid = torch.empty(batch, tokens, dtype=torch.bool, device=device)
        _route(line, -1, "route tokens", places[scores], [at(factors), at(indices), at(valid), places[state]])
        states = torch.empty(batch * tokens, d, dtype=dtype, device=device)
        slots = (at(indices), at(valid))
        run("gather tokens", gather_into, (rows(normed), *slots, None, rows(states), None, None, None, None))
        if kept is not None:
            kept += (hidden_states, memory, normed, factors, indices, valid, states)
            kept += [] if dropped is None else [dropped]
        heavy = _dense(
            line,
            "heavy gelu",
            program.joins_heavy_ff,
            states,
            heavy_wi_0,
            heavy_wi_1,
            heavy_wo,
            program.drops[5],
            kept,
        )
    light = _dense(line, "light gelu", program.joins_light_ff, normed, wi_0, wi_1, wo, program.drops[4], kept)
    line.plan.join()
    if kept is not None:
        kept.append(heavy)
    return hidden_states, light.view(batch, -1, d), heavy.view(batch, -1, d), (indices, valid, factors)


class _Straight(torch.autograd.Function):
    """The layer from states to states, and its gradient."""

    @staticmethod
    def forward(ctx: Any, line: StraightLayer, hidden_states: Tensor, *inputs: Tensor) -> Tensor:
        kept: list[Tensor] = []
        memory = [_cast(line)] if line.program.casts else []
        after = _attention(line, [hidden_states, None, None, None], kept)
        states, light, heavy, routed = _feed_forward(line, after, kept)
        assert light is not None and heavy is not None and routed is not None
        at, drop = line.way.at, line.program.drops[3]
        result = torch.empty(states.shape, dtype=light.dtype if drop > 0 else states.dtype, device=states.device)
        slots = [*map(at, routed), None, None, None, None]
        if drop > 0:
            line.way.run("last branches", combine_into, (at(light), None, at(heavy), *slots, at(result)))
            result, dropped = _drop(result, drop)
            kept.append(dropped)
            result = states + result
        else:
            line.way.run("sum of all", combine_into, (at(states), at(light), at(heavy), *slots, at(result)))
        line.way.done()
        ctx.set_materialize_grads(False)
        ctx.common, ctx.program, ctx.plan = line.common, line.program, line.plan
        ctx.save_for_backward(*inputs, *memory, *kept)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_derivatives_of_kernels("encoder_layer")
        count = 1 + 1 + 2 + len(WEIGHTS)
        if grad is None:
            return (None,) * count
        saved = [part if part.is_contiguous() else part.contiguous() for part in (grad, *ctx.saved_tensors)]
        needs = ctx.needs_input_grad
        grad, tables, weights, kept = saved[0], tuple(saved[1:3]), tuple(saved[3 : count - 1]), saved[count - 1 :]
        dtypes = list(map(_DTYPE, weights))
        if ctx.program.casts:
            matrices = list(_MATRICES(weights))
            weights = _with_matrices(weights, _copies(kept.pop(0), matrices))
        kind = f"backward {needs[2:4]}"
        read = [grad, *tables, *_VECTORS(weights), *kept]
        way = _choose(ctx.common, ctx.program, kind, list(map(Tensor.data_ptr, read)))
        line = StraightLayer(ctx.common, ctx.program, way, weights, tables, ctx.plan)
        del saved
        gradients: list[Tensor | None] = [None] * len(weights)
        count_of_first = _kept_of_attention(ctx.program)
        first, second = kept[:count_of_first], kept[count_of_first:]
        del kept
        grads = _feed_forward_backward(line, grad, second, needs[4:], gradients)
        hidden, light_table, heavy_table = _attention_backward(line, *grads, first, needs, gradients)
        way.done()
        if ctx.program.casts:
            gradients = [
                None if gradient is None else _rounded(gradient, dtype)
                for gradient, dtype in zip(gradients, dtypes, strict=True)
            ]
        return None, hidden, light_table, heavy_table, *gradients


_apply = super(torch.autograd.Function, _Straight).apply


def _kept_of_attention(program: _Program) -> int:
    """How many tensors `_attention` keeps."""
    seeds = sum(drop > 0 for drop in program.drops[:2])
    return 10 + (1 if program.joins_heavy else 2) + (0 if program.joins_light else 2) + seeds


def _states_gradient(joins: bool, joined: Tensor, *weights: Tensor) -> Tensor:
    """The gradient of states, from those of their products [tokens, sum of widths] with these weights."""
    if joins:
        return torch.mm(joined, torch.cat(weights))
    first, *rest = joined.split_with_sizes([weight.shape[0] for weight in weights], -1)
    gradient = torch.mm(first, weights[0])
    for part, weight in zip(rest, weights[1:], strict=True):
        gradient.addmm_(part, weight)
    return gradient


def _weight_gradients(
    line: StraightLayer, joined: Tensor, states: Tensor, width: int, places: slice, all_needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradients of the weights of some places, whose products' gradients [tokens, width] lie side by side."""
    needs, dtypes = all_needs[places], line.program.dtypes[places]
    widths = [width] * len(needs)
    if all(needs) and len(set(dtypes)) == 1:
        return list(_rounded(torch.mm(joined.t(), states), dtypes[0]).split_with_sizes(widths))
    parts = joined.split_with_sizes(widths, -1)
    return [
        _rounded(torch.mm(part.t(), states), dtype) if need else None
        for part, need, dtype in zip(parts, needs, dtypes, strict=True)
    ]


def _dense_backward(
    line: StraightLayer,
    name: str,
    grad: Tensor,
    states: Tensor,
    products: list[Tensor],
    weights: tuple[Tensor, Tensor, Tensor],
    drop: float,
    first: int,
    needs: tuple[bool, ...],
) -> tuple[Tensor, list[Tensor | None]]:
    """The gradients of `_dense`, which kept the products: of its states, and of wi_0, wi_1 and wo, the weights from
    `first` on, as far as they are needed."""
    way, width = line.way, weights[0].shape[0]
    dropped = None
    if drop > 0:
        *products, dropped = products
    tokens, dtype, device = states.shape[0], states.dtype, states.device
    parts = way.row_parts(tuple(products), width)
    wo_grad = None
    if needs[first + 2]:
        # cheaper to compute again than to keep
        activated = torch.empty(tokens, width, dtype=dtype, device=device)
        way.run(name, gated_gelu_into, (*parts, way.rows(activated)))
        if dropped is not None:
            activated = _drop_again(activated, dropped, drop)
        wo_grad = torch.mm(grad.t(), activated)
        del activated
    activated_grad = torch.mm(grad, weights[2])
    if dropped is not None:
        activated_grad = _drop_again(activated_grad, dropped, drop)
    joined = torch.empty(tokens, 2 * width, dtype=dtype, device=device)
    run_with = (way.rows(activated_grad), *parts, *way.row_parts((joined,), width))
    way.run(f"{name} backward", gated_gelu_backward_into, run_with)
    del activated_grad
    gradients = _weight_gradients(line, joined, states, width, slice(first, first + 2), needs)
    return _states_gradient(len(products) == 1, joined, *weights[:2]), [*gradients, wo_grad]


def _route_backward(
    line: StraightLayer, name: str, router: int, slots: tuple[Any, ...], room: tuple[Any, ...]
) -> None:
    """One launch of the routing's gradient: `slots` are scores, weights, indices, valid and state, `room` the weights'
    gradient, partial sums, the scores' gradient and the budget's."""
    _, mask = line.common.routers[router]
    scores, weights, indices, valid, state = slots
    weights_grad, sums, scores_grad, budget_grad = room
    rows = (scores, None if mask is None else line.way.at(mask), None, None)
    run_with = (weights_grad, weights, indices, valid, *rows, state, sums, scores_grad, budget_grad)
    line.way.run(name, route_backward_into, run_with, *line.program.settings[1:])


def _feed_forward_backward(
    line: StraightLayer,
    grad: Tensor,
    kept: list[Tensor],
    needs: tuple[bool, ...],
    gradients: list[Tensor | None],
) -> tuple[Tensor, Tensor]:
    """The gradients of what the feed-forward got, [batch, n, d_model], of the residual and of the branches before it,
    and those of its weights into their places; it takes what was kept."""
    program, way = line.program, line.way
    norm_weight, wi_0, wi_1, wo, router, heavy_wi_0, heavy_wi_1, heavy_wo = line.weights[11:]
    at, rows, run = way.at, way.rows, way.run
    dtype, device, d, batch = program.dtype, program.device, program.d, program.batch
    tokens = program.capacities[2]
    branch_grad, light_grad = grad, _rounded(grad, dtype)
    if program.drops[3] > 0:
        branch_grad = light_grad = _drop_again(light_grad, kept.pop(), program.drops[3])
    hidden_states, memory, normed, factors, indices, valid, states, *products, heavy = kept
    kept.clear()
    dropped = products.pop(0) if program.drops[2] > 0 else None
    count = (1 if program.joins_heavy_ff else 2) + (program.drops[5] > 0)
    heavy_products, light_products = products[:count], products[count:]
    del products
    room = program.second_back.take(device)
    places, back = way.places(program.second, memory), way.places(program.second_back, room)
    slots = (at(indices), at(valid))
    gradient = program.second_gradients
    heavy_grad = torch.empty(batch * tokens, d, dtype=dtype, device=device)
    run(
        "heavy feed-forward's gradient", gather_dot_into,
        (at(branch_grad), rows(heavy), *slots, at(factors), rows(heavy_grad), back[gradient.weights[0]]),
    )  # fmt: skip
    ((scores, *_, state),) = program.second_slots.launches
    (places_back,) = gradient.launches
    _route_backward(
        line, "route tokens backward", -1,
        (places[scores], at(factors), *slots, places[state]),
        tuple([None if place is None else back[place] for place in places_back]),
    )  # fmt: skip
    states_grad, gradients[16:19] = _dense_backward(
        line, "heavy gelu", heavy_grad, states, heavy_products, (heavy_wi_0, heavy_wi_1, heavy_wo),
        program.drops[5], 16, needs,
    )  # fmt: skip
    del heavy_products, heavy_grad, states
    normed_grad, gradients[12:15] = _dense_backward(
        line, "light gelu", light_grad.view(-1, d), normed, light_products, (wi_0, wi_1, wo),
        program.drops[4], 12, needs,
    )  # fmt: skip
    del light_products, normed, branch_grad, light_grad
    total = torch.empty_like(normed_grad)
    run(
        "sum of the feed-forward's gradients", combine_into,
        (rows(normed_grad), None, rows(states_grad), *slots, *[None] * 5, rows(total)),
    )  # fmt: skip
    del normed_grad, states_grad
    result = torch.empty_like(hidden_states)
    norm_grad, router_grad = torch.empty_like(norm_weight), torch.empty_like(router)
    run(
        "second norm backward", norm_backward_into,
        (
            at(grad), rows(total), back[gradient.scores], at(hidden_states), places[0], at(norm_weight),
            way.vectors(router), at(result), back[program.second_shares], at(norm_grad), way.vectors(router_grad),
        ),
    )  # fmt: skip
    gradients[11], gradients[15] = norm_grad, router_grad
    if dropped is None:
        return result, result
    return result, _drop_again(_rounded(result, dtype), dropped, program.drops[2])


def _attention_backward(
    line: StraightLayer,
    grad: Tensor,
    branch_grad: Tensor,
    kept: list[Tensor],
    all_needs: tuple[bool, ...],
    gradients: list[Tensor | None],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of what the layer got, [batch, n, d_model], and of light and heavy table, and those of the
    attention's weights into their places; it takes what was kept."""
    program, way, common = line.program, line.way, line.common
    norm_weight, q, k, v, o, query_router, key_router, heavy_q, heavy_k, heavy_v, heavy_o = line.weights[:11]
    at, rows, heads, run = way.at, way.rows, way.heads, way.run
    dtype, device, d, batch, n = program.dtype, program.device, program.d, program.batch, program.n
    queries, keys, _ = program.capacities
    light_table_needed, heavy_table_needed = all_needs[2:4]
    needs = all_needs[4:]
    hidden_states, memory, normed, heavy, query_states, key_states, attended, query, *rest = kept
    kept.clear()
    key_value, rest = rest[: 1 if program.joins_heavy else 2], rest[1 if program.joins_heavy else 2 :]
    seed = rest.pop() if program.drops[0] > 0 else None
    heavy_seed = rest.pop() if program.drops[1] > 0 else None
    light_attended, *query_key_value = rest
    del rest
    room = program.first_back.take(device)
    places, back = way.places(program.first, memory), way.places(program.first_back, room)
    slots, gradient = program.first_slots, program.first_gradients
    query_slots, key_slots = ([places[part] for part in router] for router in slots.routers)

    heavy_grad = torch.empty(batch * queries, d, dtype=dtype, device=device)
    run(
        "heavy attention's gradient", gather_dot_into,
        (at(branch_grad), rows(heavy), *query_slots, rows(heavy_grad), back[gradient.weights[0]]),
    )  # fmt: skip
    if needs[10]:
        gradients[10] = torch.mm(heavy_grad.t(), attended)
    width, size = program.heavy, program.heavy_size
    attended_grad = torch.mm(heavy_grad, heavy_o)
    del heavy, heavy_grad
    query_grad = torch.empty(batch * queries, width, dtype=program.attended, device=device)
    key_value_grad = torch.empty(batch * keys, 2 * width, dtype=program.attended, device=device)
    partials = None
    if heavy_table_needed:
        partials = torch.zeros(*program.heavy_partials, line.tables[1].shape[1], dtype=torch.float32, device=device)
    outputs = way.read(heads(attended_grad, size), heads(attended, size))
    inputs = way.read(heads(query, size), *way.head_parts(tuple(key_value), width, size))
    run(
        f"heavy attention backward {heavy_table_needed}", attention_backward_into,
        (
            *outputs, places[program.heavy_sums], *inputs,
            at(line.tables[1]), query_slots[0], key_slots[0], key_slots[1],
            None if heavy_seed is None else at(heavy_seed), back[program.heavy_delta],
            heads(query_grad, size), *way.head_parts((key_value_grad,), width, size),
            None if partials is None else at(partials),
        ),
        0, program.drops[1],
    )  # fmt: skip
    del attended, attended_grad, query, key_value, outputs, inputs
    heavy_table = None if partials is None else partials.sum((0, 2))
    query_grad, key_value_grad = _rounded(query_grad, dtype), _rounded(key_value_grad, dtype)
    if needs[7]:
        gradients[7] = torch.mm(query_grad.t(), query_states)
    gradients[8:10] = _weight_gradients(line, key_value_grad, key_states, width, slice(8, 10), needs)
    query_states_grad = torch.mm(query_grad, heavy_q)
    key_states_grad = _states_gradient(program.joins_heavy, key_value_grad, heavy_k, heavy_v)
    del query_states, key_states, query_grad, key_value_grad

    width, size = program.light, program.light_size
    light_grad = _rounded(branch_grad, dtype).view(-1, d)
    if needs[4]:
        gradients[4] = torch.mm(light_grad.t(), light_attended)
    attended_grad = torch.mm(light_grad, o)
    query_key_value_grad = torch.empty(batch * n, 3 * width, dtype=program.attended, device=device)
    partials = None
    if light_table_needed:
        partials = torch.zeros(*program.light_partials, line.tables[0].shape[1], dtype=torch.float32, device=device)
    outputs = way.read(heads(attended_grad, size), heads(light_attended, size))
    inputs = way.read(*way.head_parts(tuple(query_key_value), width, size))
    run(
        f"light attention backward {light_table_needed}", attention_backward_into,
        (
            *outputs, places[program.light_sums], *inputs,
            at(line.tables[0]), None, None, None if common.mask is None else at(common.mask),
            None if seed is None else at(seed), back[program.light_delta],
            *way.head_parts((query_key_value_grad,), width, size),
            None if partials is None else at(partials),
        ),
        program.radius, program.drops[0],
    )  # fmt: skip
    del light_attended, attended_grad, query_key_value, outputs, inputs
    light_table = None if partials is None else partials.sum((0, 2))
    query_key_value_grad = _rounded(query_key_value_grad, dtype)
    gradients[1:4] = _weight_gradients(line, query_key_value_grad, normed, width, slice(1, 4), needs)
    normed_grad = _states_gradient(program.joins_light, query_key_value_grad, q, k, v)
    del query_key_value_grad

    run(
        "keys' weights' gradient", gather_dot_into,
        (rows(normed), rows(key_states_grad), *key_slots[:2], None, None, back[gradient.weights[1]]),
    )  # fmt: skip
    for router, (scores, weights, indices, valid, state) in enumerate(slots.launches):
        _route_backward(
            line, f"route {router} backward", router,
            (places[scores], places[weights], places[indices], places[valid], places[state]),
            tuple([None if place is None else back[place] for place in gradient.launches[router]]),
        )  # fmt: skip
    total = torch.empty_like(normed_grad)
    run(
        "sum of the attention's gradients", combine_into,
        (
            rows(normed_grad), None, rows(query_states_grad), *query_slots[:2], None,
            rows(key_states_grad), *key_slots, rows(total),
        ),
    )  # fmt: skip
    del normed, normed_grad, query_states_grad, key_states_grad
    result = torch.empty_like(hidden_states)
    routers = torch.cat((query_router, key_router)).view(2, -1)
    norm_grad, routers_grad = torch.empty_like(norm_weight), torch.empty_like(routers)
    run(
        "norm backward", norm_backward_into,
        (
            at(grad), rows(total), back[gradient.scores], at(hidden_states), places[0], at(norm_weight), at(routers),
            at(result), back[program.first_shares], at(norm_grad), at(routers_grad),
        ),
    )  # fmt: skip
    gradients[0], gradients[5:7] = norm_grad, routers_grad.unbind()
    return result, light_table, heavy_table
