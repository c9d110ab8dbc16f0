"""What an encoder layer as a straight line is made of: weights and numbers of a block, and the places of its tensors.

Sizes and places are those of a kind of call. The decoder's straight lines share `PassStates` and `Room`.
"""

from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from .kernel_backend import normed_dtype, triton_is_available
from .layer_plain import Parts, PlainLayer, parts_of_attention, parts_of_dense, parts_of_sublayer
from .run_plan import EncoderPlan

if triton_is_available():
    from .run_launch_list_triton import LaunchList, may_repeat

# Each module with a weight, in the order in which the weights are read.
WEIGHTS = (
    "attention.layer_norm", "light.q", "light.k", "light.v", "light.o", "query_router", "key_value_router",
    "heavy.q", "heavy.k", "heavy.v", "heavy.o",
    "feed_forward.layer_norm", "light_ff.wi_0", "light_ff.wi_1", "light_ff.wo", "router",
    "heavy_ff.wi_0", "heavy_ff.wi_1", "heavy_ff.wo",
)  # fmt: skip


class Weight:
    """The place of each of `WEIGHTS`."""

    (
        ATTENTION_NORM, LIGHT_Q, LIGHT_K, LIGHT_V, LIGHT_O, QUERY_ROUTER, KEY_VALUE_ROUTER,
        HEAVY_Q, HEAVY_K, HEAVY_V, HEAVY_O,
        FEED_FORWARD_NORM, LIGHT_WI_0, LIGHT_WI_1, LIGHT_WO, ROUTER, HEAVY_WI_0, HEAVY_WI_1, HEAVY_WO,
    ) = range(len(WEIGHTS))  # fmt: skip


class Drop:
    """The places where a layer drops, in the order of its seeds: light and heavy attention's weights, what the
    attention adds, light and heavy feed-forward's activations, and what the feed-forward adds."""

    LIGHT_ATTENTION, HEAVY_ATTENTION, ATTENTION, LIGHT_FF, HEAVY_FF, FEED_FORWARD = range(6)


class PlainEncoderLayer(PlainLayer):
    """A plain block of the encoder.

    Attributes:
        eps: of the norms of attention and feed-forward.
        head_sizes: of light and heavy attention.
        radius: of the light attention.
        drops: probabilities of dropout as the modules' modes have them, by the places of `Drop`.
    """

    __slots__ = ("drops", "eps", "head_sizes", "radius")

    def __init__(self, block: Any, parts: dict[str, nn.Module]):
        super().__init__(block, parts)
        self.eps, self.head_sizes = self.values("eps"), self.values("d_kv")
        self.radius = self.named["light", "radius"]
        self.drops: tuple[float, ...] = block.drop_rates()

    @property
    def is_supported(self) -> bool:
        return self.weighted == WEIGHTS and super().is_supported

    @classmethod
    def parts(cls, block: Any) -> Parts:
        def parts_of_router(name: str, router: Any) -> Parts:
            return {name: ("router", router), f"{name}.select": ("select", router.select)}

        attention, feed_forward = block.layer
        return {
            "attention": ("attention", attention),
            **parts_of_sublayer("attention", attention, "dropout"),
            **parts_of_attention("light", "light_attention", attention.light_attention),
            **parts_of_router("query_router", attention.query_router),
            **parts_of_router("key_value_router", attention.key_value_router),
            **parts_of_attention("heavy", "heavy_attention", attention.heavy_attention),
            "feed_forward": ("feed_forward", feed_forward),
            **parts_of_sublayer("feed_forward", feed_forward, "dropout"),
            **parts_of_dense("light_ff", feed_forward.light_feed_forward),
            **parts_of_router("router", feed_forward.router),
            **parts_of_dense("heavy_ff", feed_forward.heavy_feed_forward),
        }


# The vectors among the weights. All others are matrices.
VECTORS = (
    Weight.ATTENTION_NORM, Weight.QUERY_ROUTER, Weight.KEY_VALUE_ROUTER, Weight.FEED_FORWARD_NORM, Weight.ROUTER,
)  # fmt: skip
_MATRICES = itemgetter(*(place for place in range(len(WEIGHTS)) if place not in VECTORS))
_DTYPE, _SHAPE = attrgetter("dtype"), attrgetter("shape")
# Calls of more tokens are launched one by one: they do not wait for the host, and while launches are noted, all
# tensors of a layer are held at the same time.
MOST_TOKENS_OF_A_LIST = 131_072


class PassStates:
    """What the states between the layers of one pass have in common.

    Args:
        hidden_states: [batch, n, d_model], what goes into the first layer.
    """

    def __init__(self, hidden_states: Tensor):
        self.shape, self.hidden_dtype, self.device = hidden_states.shape, hidden_states.dtype, hidden_states.device
        self.batch, self.n, self.d = hidden_states.shape
        self.device_index = hidden_states.get_device()

    def takes(self, states: Tensor) -> bool:
        """Whether states differ from the pass's in their numbers alone: a hook may have put others in their place."""
        return (
            type(states) in (Tensor, nn.Parameter)
            and (states.shape, states.dtype) == (self.shape, self.hidden_dtype)
            and states.get_device() == self.device_index
        )


class StraightPass(PassStates):
    """What the straight lines of one pass have in common: sizes, budgets and masks.

    Args:
        hidden_states: [batch, n, d_model], what goes into the first layer.
        plan: of the pass.
    """

    def __init__(self, hidden_states: Tensor, plan: EncoderPlan):
        attention, feed_forward, settings = plan.attention, plan.feed_forward, plan.settings
        assert attention is not None and feed_forward is not None
        super().__init__(hidden_states)
        # of products
        self.dtype = plan.mode.dtype_of_products(self.hidden_dtype) or self.hidden_dtype
        self.mask, self.width = plan.mask, plan.width
        self.capacities = (*attention.capacities, *feed_forward.capacities)
        # as the routing kernels take them
        self.settings = (
            settings["soft_topk_ratio"], settings["solver"], settings["epsilon"], settings["num_iterations"],
            settings["epsilon_init"], settings["epsilon_decay"],
        )  # fmt: skip
        # both routers of one row are two rows of one launch; those of several rows are launched one by one, so that
        # the slots of each lie side by side
        if self.batch == 1:
            self.routers = [(attention.budget, None if plan.mask is None else plan.mask.expand(2, -1))]
        else:
            # copied, as lists of launches take addresses only where they are multiples of 16
            self.routers = [(budget.clone(), plan.mask) for budget in attention.budget.split(self.batch)]
        self.routers.append((feed_forward.budget, plan.mask))
        self.read = [budget for budget, _ in self.routers] + ([] if plan.mask is None else [plan.mask])
        self.is_readable = all(map(Tensor.is_contiguous, self.read))
        precision = torch.backends.cuda.matmul.fp32_precision if self.dtype == torch.float32 else ""
        self.key = (
            self.batch, self.n, self.width, self.hidden_dtype, self.dtype, self.device, self.mask is None,
            self.capacities, self.settings, precision,
        )  # fmt: skip
        self.repeats = plan.side is None and self.batch * self.n <= MOST_TOKENS_OF_A_LIST and may_repeat(hidden_states)
        self.program: Program | None = None


Places = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class Room:
    """Where tensors lie in one piece of memory, some of them parts of others. Each has a number, and may have a name.

    Args:
        places: of each name its dtype and shape.
    """

    def __init__(self, places: Places | None = None):
        # of each its dtype, its shape, its strides, and its first byte
        self.places: list[tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]] = []
        self.offsets: list[int] = []
        self.size = 0
        self.numbers = {name: self.add(dtype, *shape) for name, (dtype, shape) in (places or {}).items()}

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

    def view(self, memory: Tensor, place: int | str) -> Tensor:
        """The tensor of a number or a name."""
        number = self.numbers[place] if isinstance(place, str) else place
        dtype, shape, strides = self.places[number]
        first = (memory.storage_offset() + self.offsets[number]) // dtype.itemsize
        return memory.view(dtype).as_strided(shape, strides, first)

    def views(self, memory: Tensor) -> list[Tensor]:
        """All tensors, by their numbers."""
        return [self.view(memory, number) for number in range(len(self.places))]


class Slots:
    """The places of routers' slots in a room: for each launch its scores, weights, indices, valid and state, and for
    each router its indices, valid and weights.

    Args:
        room: where `scores` [batch, routers, n] are.
        slots: of each router.
        state: numbers of a row that its gradient needs.
    """

    def __init__(self, room: Room, scores: int, batch: int, n: int, slots: tuple[int, ...], state: int):
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

    def tokens(self, tensors: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Each router's indices, valid and weights, of all tensors of the room."""
        return [(tensors[indices], tensors[valid], tensors[weights]) for indices, valid, weights in self.routers]


# Both sublayers' rooms begin with these: the norm's reciprocal root mean squares, and the router scores.
RSTD, SCORES = range(2)

# How many numbers of weights a GPU copies in less time than the host takes to launch another product.
FEW_WEIGHTS = 1 << 21


def is_one_product(states: int, results: int, width: int, device: torch.device) -> bool:
    """Whether products of the same states are made as one, for which their weights are copied together.

    Args:
        states: how many.
        results: of each state, those of all products.
        width: of a state.
        device: where.
    """
    return states >= 2 * results or (device.type == "cuda" and results * width <= FEW_WEIGHTS)


# Programs by all that they depend on. Each new length adds one, so there is a limit.
programs: dict[Any, "Program | None"] = {}
MOST_PROGRAMS = 256


class Program:
    """Sizes, places and lists of launches of the straight lines of one kind.

    Attributes:
        kept: what a backward pass reads, and no more.
        outgoing: what a layer leaves to the next where nobody wants gradients: a sum that the next one's norm takes.
        others: places of the tensors that are in neither, and in `kept` alone with gradients.
        lists: for each kind of call its launches; None where they cannot be repeated.
    """

    def __init__(self, common: StraightPass, layer: PlainEncoderLayer, weights: tuple[Tensor, ...]):
        self.batch, self.n, self.d = common.batch, common.n, weights[Weight.ATTENTION_NORM].numel()
        self.device, self.settings = common.device, common.settings
        self.hidden_dtype, self.dtype = common.hidden_dtype, common.dtype
        # whether autocast takes the matrices to another dtype
        self.casts = self.hidden_dtype != self.dtype
        self.numbers, self.eps, self.radius = layer.numbers, layer.eps, layer.radius
        self.drops = layer.drops
        self.dtypes, self.shapes = list(map(_DTYPE, weights)), list(map(_SHAPE, weights))
        self.capacities = queries, keys, tokens = common.capacities
        self.light_size, self.heavy_size = layer.head_sizes
        self.light, self.heavy = weights[Weight.LIGHT_Q].shape[0], weights[Weight.HEAVY_Q].shape[0]
        self.light_ff, self.heavy_ff = weights[Weight.LIGHT_WI_0].shape[0], weights[Weight.HEAVY_WI_0].shape[0]
        batch, n, d, exact = self.batch, self.n, self.d, common.settings[1] == "exact"
        state = 3 if exact else common.settings[3]
        # whether products of the same states are one, with their weights joined
        self.joins = {
            first: is_one_product(rows, results, d, self.device)
            for first, rows, results in (
                (Weight.LIGHT_Q, batch * n, 3 * self.light), (Weight.HEAVY_K, batch * keys, 2 * self.heavy),
                (Weight.LIGHT_WI_0, batch * n, 2 * self.light_ff),
                (Weight.HEAVY_WI_0, batch * tokens, 2 * self.heavy_ff),
            )
        }  # fmt: skip

        # Numbers RSTD and SCORES come first.
        self.first, self.second = Room(), Room()
        for room, routers in ((self.first, 2), (self.second, 1)):
            room.add(torch.float32, batch, n)
            room.add(torch.float32, batch, routers, n)
        self.first_slots = Slots(self.first, SCORES, batch, n, (queries, keys), state)
        self.second_slots = Slots(self.second, SCORES, batch, n, (tokens,), state)
        light_heads, heavy_heads = self.light // self.light_size, self.heavy // self.heavy_size
        self.heavy_sums = self.first.add(torch.float32, batch, heavy_heads, queries)
        self.light_sums = self.first.add(torch.float32, batch, light_heads, n)
        queries, keys, tokens = batch * queries, batch * keys, batch * tokens
        places: Places = {
            "routers": (weights[Weight.QUERY_ROUTER].dtype, (2, d)),
            "first": (torch.uint8, (self.first.size,)),
            "normed": (self.dtype, (batch * n, d)),
            "query_states": (self.dtype, (queries, d)),
            "key_states": (self.dtype, (keys, d)),
            "query": (self.dtype, (queries, self.heavy)),
            "key_value": (self.dtype, (keys, 2 * self.heavy)),
            "heavy_attended": (self.dtype, (queries, self.heavy)),
            "heavy_update": (self.dtype, (queries, d)),
            "query_key_value": (self.dtype, (batch * n, 3 * self.light)),
            "light_attended": (self.dtype, (batch * n, self.light)),
            "hidden": (self.hidden_dtype, (batch, n, d)),
            "second": (torch.uint8, (self.second.size,)),
            "second_normed": (self.dtype, (batch * n, d)),
            "states": (self.dtype, (tokens, d)),
            "heavy_products": (self.dtype, (tokens, 2 * self.heavy_ff)),
            "light_products": (self.dtype, (batch * n, 2 * self.light_ff)),
            # `wo` stays in fp32 in an fp16 model
            "heavy": (self.dtype if self.casts else weights[Weight.HEAVY_WO].dtype, (tokens, d)),
        }
        if self.casts:
            places["matrices"] = (self.dtype, (sum(map(Tensor.numel, _MATRICES(weights))),))
        self.others: Places = places | {
            "summed": places["hidden"],
            "light_update": places["normed"],
            "light": (self.dtype if self.casts else weights[Weight.LIGHT_WO].dtype, (batch * n, d)),
        }
        self.kept = Room(places)
        self.outgoing = Room({name: self.others[name] for name in ("hidden", "second", "light", "heavy")})
        self.lists: dict[Any, LaunchList | None] = {}
        self._gradients: dict[tuple[bool, ...], list[tuple[torch.dtype, list[int], int]]] = {}

    def gradients(self, needs: tuple[bool, ...]) -> list[tuple[torch.dtype, list[int], int]]:
        """Which weights' gradients lie side by side, one behind the other: their dtype, their places and how many
        numbers they have together.

        Args:
            needs: of each weight whether its gradient is wanted. Those of vectors come with others' and are written
                always.
        """
        groups = self._gradients.get(needs)
        if groups is None:
            wanted = [place for place in range(len(needs)) if needs[place] or place in VECTORS]
            places = {dtype: [place for place in wanted if self.dtypes[place] == dtype] for dtype in self.dtypes}
            groups = self._gradients[needs] = [
                (dtype, own, sum(self.shapes[place].numel() for place in own)) for dtype, own in places.items() if own
            ]
        return groups

    @staticmethod
    def of(
        common: StraightPass, layer: PlainEncoderLayer, weights: tuple[Tensor, ...], tables: tuple[Tensor, Tensor]
    ) -> "Program | None":
        """The program for these weights; None where there is none for such shapes or dtypes."""
        last = common.program
        dtypes, shapes = list(map(_DTYPE, weights)), list(map(_SHAPE, weights))
        if last is not None and (last.numbers, last.dtypes, last.shapes) == (layer.numbers, dtypes, shapes):
            return last
        key = (common.key, tuple(layer.numbers), tuple(dtypes), tuple(shapes), tables[0].shape, tables[1].shape)
        # one look, as another thread may clear them after it
        try:
            program = programs[key]
        except KeyError:
            program = Program(common, layer, weights) if _fits(common, layer, weights, tables) else None
            if len(programs) >= MOST_PROGRAMS:
                programs.clear()
            programs[key] = program
        common.program = program
        return program


def _fits(
    common: StraightPass, layer: PlainEncoderLayer, weights: tuple[Tensor, ...], tables: tuple[Tensor, Tensor]
) -> bool:
    """Whether weights have the shapes and dtypes that the straight lines are written for."""
    dtype, hidden_dtype, d = common.dtype, common.hidden_dtype, weights[Weight.ATTENTION_NORM].shape[-1]
    light, heavy = weights[Weight.LIGHT_Q].shape[0], weights[Weight.HEAVY_Q].shape[0]
    light_ff, heavy_ff = weights[Weight.LIGHT_WI_0].shape[0], weights[Weight.HEAVY_WI_0].shape[0]
    norms = (weights[Weight.ATTENTION_NORM], weights[Weight.FEED_FORWARD_NORM])
    light_size, heavy_size = layer.head_sizes
    shapes = [
        (d,), (light, d), (light, d), (light, d), (d, light), (d,), (d,),
        (heavy, d), (heavy, d), (heavy, d), (d, heavy),
        (d,), (light_ff, d), (light_ff, d), (d, light_ff), (d,), (heavy_ff, d), (heavy_ff, d), (d, heavy_ff),
    ]  # fmt: skip
    if dtype != hidden_dtype:
        # autocast takes all of these
        fit = all(matrix.dtype in (torch.float32, torch.bfloat16, torch.float16) for matrix in _MATRICES(weights))
    else:
        # `wo` stays in fp32 in an fp16 model
        outputs = (dtype, torch.float32) if dtype == torch.float16 else (dtype,)
        fit = all(
            weight.dtype in (outputs if place in (Weight.LIGHT_WO, Weight.HEAVY_WO) else (dtype,))
            for place, weight in enumerate(weights)
            if place not in VECTORS
        )
    return (
        [tuple(weight.shape) for weight in weights] == shapes
        and light % light_size == 0
        and heavy % heavy_size == 0
        and (tables[0].shape[0], tables[1].shape[0]) == (light // light_size, heavy // heavy_size)
        and all(normed_dtype(hidden_dtype, norm.dtype, None) == hidden_dtype for norm in norms)
        and fit
        and weights[Weight.QUERY_ROUTER].dtype == weights[Weight.KEY_VALUE_ROUTER].dtype
    )
