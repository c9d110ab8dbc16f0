"""Whether an encoder block is plain: a straight line of kernels may then stand for the calls of its modules."""

from collections.abc import Mapping
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any

from torch import Tensor, nn

_HOOKS = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_FORWARD = attrgetter("forward")
_PARAMETERS, _MODULES = itemgetter("_parameters"), itemgetter("_modules")

# each module with a weight, in the order in which the weights are read
WEIGHTS = (
    "attention.layer_norm", "light.q", "light.k", "light.v", "light.o", "query_router", "key_value_router",
    "heavy.q", "heavy.k", "heavy.v", "heavy.o",
    "feed_forward.layer_norm", "light_ff.wi_0", "light_ff.wi_1", "light_ff.wo", "router",
    "heavy_ff.wi_0", "heavy_ff.wi_1", "heavy_ff.wo",
)  # fmt: skip
# the numbers that modules hold, in the order in which they are read
_NUMBERS = (
    ("attention.layer_norm", "eps"), ("feed_forward.layer_norm", "eps"),
    ("light", "d_kv"), ("light", "radius"), ("heavy", "d_kv"),
    ("light", "training"), ("light", "dropout"), ("heavy", "training"), ("heavy", "dropout"),
    ("attention.dropout", "training"), ("attention.dropout", "p"),
    ("feed_forward.dropout", "training"), ("feed_forward.dropout", "p"),
    ("light_ff.dropout", "training"), ("light_ff.dropout", "p"),
    ("heavy_ff.dropout", "training"), ("heavy_ff.dropout", "p"),
    ("light_ff", "is_gated_act"), ("heavy_ff", "is_gated_act"),
    ("query_router", "routing"), ("key_value_router", "routing"), ("router", "routing"),
)  # fmt: skip
_ATTRIBUTES = [attribute for _, attribute in _NUMBERS]


class PlainBlock:
    """What a straight line reads of a block, as long as the block is plain.

    Plain is a block of this code's own modules with ordinary parameters: no hooks inside, no other forward in the
    place of a module's or a class's, no other modules, no adapters, no quantised weights. PyTorch tells nobody when
    one of these changes, so `read` looks at all of them each time: at the modules' dictionaries, by functions that are
    written in C, some ten microseconds for all 36 modules of a block.

    A copy of a block begins with nothing, and so does one that comes out of a file.
    """

    def __init__(self) -> None:
        self._layer: PlainLayer | None = None

    def __reduce__(self) -> Any:
        return PlainBlock, ()

    def read(
        self, block: nn.Module, kinds: Mapping[str, tuple[type, Any]]
    ) -> "tuple[PlainLayer, tuple[Tensor, ...]] | None":
        """The layer and its weights in the order of `WEIGHTS`; None where the block is not plain.

        Args:
            block: the encoder block that holds this object.
            kinds: for each kind of module in a block its class, and the `forward` that the class was written with.
        """
        layer = self._layer
        weights = None if layer is None else layer.weights(block)
        if weights is None:
            layer = self._layer = PlainLayer.of(block, kinds)
            weights = None if layer is None else layer.weights(block)
        return None if layer is None or weights is None else (layer, weights)


class PlainLayer:
    """The modules of a plain block, all about them that makes it one, and the numbers that they hold.

    It holds neither the block nor its dictionary: a circle of references would keep a model in memory.

    Attributes:
        eps: of the norms of attention and feed-forward.
        head_sizes: of light and heavy attention.
        radius: of the light attention.
        drops: probabilities of dropout as the modules' modes have them: light and heavy attention's, that of what the
            attention adds, light and heavy feed-forward's, and that of what the feed-forward adds.
        numbers: all of them.
    """

    __slots__ = (
        "_children", "_classes", "_dicts", "_forwards", "_kinds", "_kinds_of_values", "_lengths", "_modules",
        "_parents", "_with_numbers", "_with_parameters", "drops", "eps", "head_sizes", "numbers",
        "radius",
    )  # fmt: skip

    def __init__(self, block: Any, parts: dict[str, nn.Module]):
        self._modules = list(parts.values())
        self._classes = list(map(type, self._modules))
        self._kinds = list(dict.fromkeys(self._classes))
        self._forwards = list(map(_FORWARD, self._kinds))
        self._dicts = [part.__dict__ for part in self._modules]
        self._lengths = list(map(len, self._dicts))
        self._parents = [part.__dict__ for part in (block.layer, *self._modules) if part._modules]
        self._children = list(chain.from_iterable(map(dict.values, map(_MODULES, self._parents))))
        self._with_parameters = [parts[name].__dict__ for name in WEIGHTS]
        values = chain.from_iterable(map(dict.values, map(_PARAMETERS, self._with_parameters)))
        self._kinds_of_values = [type(None) if value is None else nn.Parameter for value in values]
        self._with_numbers = [parts[name].__dict__ for name, _ in _NUMBERS]
        numbers: list[Any] = list(map(dict.get, self._with_numbers, _ATTRIBUTES))
        self.numbers = numbers
        self.eps = tuple(numbers[:2])
        self.head_sizes, self.radius = (numbers[2], numbers[4]), numbers[3]
        self.drops: tuple[float, ...] = block.drop_rates()

    @classmethod
    def of(cls, block: nn.Module, kinds: Mapping[str, tuple[type, Any]]) -> "PlainLayer | None":
        """The layer that a block is; None where it is not plain."""
        parts = _parts(block)
        if parts is None:
            return None
        for name, (kind, part) in parts.items():
            known, forward = kinds[kind]
            parameters = part.__dict__["_parameters"]
            if type(part) is not known or known.forward is not forward or "forward" in part.__dict__:
                return None
            if name in WEIGHTS and type(parameters.get("weight")) is not nn.Parameter:
                return None
            if any(value is not None for key, value in parameters.items() if key != "weight"):
                return None
        layer = cls(block, {name: part for name, (_, part) in parts.items()})
        *_, light_is_gated, heavy_is_gated, first, second, third = layer.numbers
        return layer if light_is_gated and heavy_is_gated and first == second == third == "learned" else None

    def weights(self, block: nn.Module) -> tuple[Tensor, ...] | None:
        """The block's weights in the order of `WEIGHTS`; None where anything is not as it was seen."""
        layers = block.__dict__["_modules"].get("layer")
        values = list(chain.from_iterable(map(dict.values, map(_PARAMETERS, self._with_parameters))))
        if (
            layers is None
            or layers.__dict__ is not self._parents[0]
            or any(chain.from_iterable(map(_HOOKS, self._dicts)))
            or list(map(type, self._modules)) != self._classes
            or list(map(len, self._dicts)) != self._lengths
            or list(chain.from_iterable(map(dict.values, map(_MODULES, self._parents)))) != self._children
            or list(map(type, values)) != self._kinds_of_values
            or list(map(dict.get, self._with_numbers, _ATTRIBUTES)) != self.numbers
            or list(map(_FORWARD, self._kinds)) != self._forwards
        ):
            return None
        return tuple([value for value in values if value is not None])


def _parts(block: Any) -> dict[str, tuple[str, nn.Module]] | None:
    """The modules of a block whose calls its forward comes to, by name, each with its kind; None where one lacks."""
    parts: dict[str, tuple[str, nn.Module]] = {}
    try:
        attention, feed_forward = block.layer
        for name, sublayer in (("attention", attention), ("feed_forward", feed_forward)):
            parts[name] = (name, sublayer)
            parts[f"{name}.layer_norm"] = ("norm", sublayer.layer_norm)
            parts[f"{name}.dropout"] = ("dropout", sublayer.dropout)
        for name, branch in (("light", attention.light_attention), ("heavy", attention.heavy_attention)):
            parts[name] = (f"{name}_attention", branch)
            parts |= {f"{name}.{part}": ("linear", getattr(branch, part)) for part in "qkvo"}
        for name, branch in (("light", feed_forward.light_feed_forward), ("heavy", feed_forward.heavy_feed_forward)):
            parts[f"{name}_ff"] = ("dense", branch)
            parts |= {f"{name}_ff.{part}": ("linear", getattr(branch, part)) for part in ("wi_0", "wi_1", "wo")}
            parts[f"{name}_ff.dropout"] = ("dropout", branch.dropout)
            parts[f"{name}_ff.act"] = ("activation", branch.act)
        routers = {
            "query_router": attention.query_router,
            "key_value_router": attention.key_value_router,
            "router": feed_forward.router,
        }
        for name, router in routers.items():
            parts[name] = ("router", router)
            parts[f"{name}.select"] = ("select", router.select)
    except (AttributeError, ValueError):
        return None
    return parts if all(isinstance(part, nn.Module) for _, part in parts.values()) else None
