"""Whether a block is plain, so that a straight line of launches may stand for the calls of its modules."""

from collections.abc import Mapping
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any

from torch import Tensor, nn

_HOOKS = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_FORWARD = attrgetter("forward")
_PARAMETERS, _MODULES = itemgetter("_parameters"), itemgetter("_modules")


class PlainBlock:
    """What a straight line reads of a block, as long as the block is plain.

    Plain is a block of this code's own modules with ordinary parameters: no hooks inside, no other forward in the
    place of a module's or a class's, no other modules, no adapters, no quantised weights. PyTorch tells nobody when
    one of these changes, so `read` looks at all of them each time: at the modules' dictionaries, by functions that are
    written in C, some ten microseconds for all 36 modules of an encoder's block.

    A copy of a block begins with nothing, and so does one that comes out of a file.

    Args:
        kind: what a block is read as.
    """

    def __init__(self, kind: "type[PlainLayer]") -> None:
        self._kind = kind
        self._layer: PlainLayer | None = None

    def __reduce__(self) -> Any:
        return PlainBlock, (self._kind,)

    def read(self, block: nn.Module, kinds: Mapping[str, tuple[type, Any]]) -> "tuple[Any, tuple[Tensor, ...]] | None":
        """The layer, of the kind that this object was made for, and its weights in the order of `weighted`; None where
        the block is not plain.

        Args:
            block: that holds this object.
            kinds: for each kind of module in a block its class, and the `forward` that the class was written with.
        """
        layer = self._layer
        weights = None if layer is None else layer.weights(block)
        if weights is None:
            layer = self._layer = self._kind.of(block, kinds)
            weights = None if layer is None else layer.weights(block)
        return None if layer is None or weights is None else (layer, weights)


class PlainLayer:
    """The modules of a plain block, all about them that makes it one, and the numbers that they hold.

    It holds neither the block nor its dictionary: a circle of references would keep a model in memory.

    Attributes:
        weighted: names of the modules with a weight, in the order in which the weights are read.
        numbered: names of modules and their attributes that are numbers, in the order in which they are read.
        numbers: all of them.
    """

    __slots__ = (
        "_attributes", "_children", "_classes", "_dicts", "_forwards", "_kinds", "_kinds_of_values", "_lengths",
        "_modules", "_parents", "_with_numbers", "_with_parameters", "numbers",
    )  # fmt: skip

    weighted: tuple[str, ...]
    numbered: tuple[tuple[str, str], ...]

    def __init__(self, block: Any, parts: dict[str, nn.Module]):
        self._modules = list(parts.values())
        self._classes = list(map(type, self._modules))
        self._kinds = list(dict.fromkeys(self._classes))
        self._forwards = list(map(_FORWARD, self._kinds))
        self._dicts = [part.__dict__ for part in self._modules]
        self._lengths = list(map(len, self._dicts))
        self._parents = [part.__dict__ for part in (block.layer, *self._modules) if part._modules]
        self._children = list(chain.from_iterable(map(dict.values, map(_MODULES, self._parents))))
        self._with_parameters = [parts[name].__dict__ for name in self.weighted]
        values = chain.from_iterable(map(dict.values, map(_PARAMETERS, self._with_parameters)))
        self._kinds_of_values = [type(None) if value is None else nn.Parameter for value in values]
        self._with_numbers = [parts[name].__dict__ for name, _ in self.numbered]
        self._attributes = [attribute for _, attribute in self.numbered]
        self.numbers: list[Any] = list(map(dict.get, self._with_numbers, self._attributes))

    @property
    def is_supported(self) -> bool:
        """Whether there is a straight line for these numbers."""
        raise NotImplementedError

    @classmethod
    def parts(cls, block: Any) -> dict[str, tuple[str, nn.Module]]:
        """The modules of a block whose calls its forward comes to, by name, each with its kind.

        Raises:
            AttributeError, ValueError: where one lacks.
        """
        raise NotImplementedError

    @classmethod
    def of(cls, block: nn.Module, kinds: Mapping[str, tuple[type, Any]]) -> "PlainLayer | None":
        """The layer that a block is; None where it is not plain."""
        try:
            parts = cls.parts(block)
        except (AttributeError, ValueError):
            return None
        for name, (kind, part) in parts.items():
            known, forward = kinds[kind]
            if type(part) is not known or known.forward is not forward or "forward" in part.__dict__:
                return None
            parameters = part.__dict__["_parameters"]
            if name in cls.weighted and type(parameters.get("weight")) is not nn.Parameter:
                return None
            if any(value is not None for key, value in parameters.items() if key != "weight"):
                return None
        layer = cls(block, {name: part for name, (_, part) in parts.items()})
        return layer if layer.is_supported else None

    def weights(self, block: nn.Module) -> tuple[Tensor, ...] | None:
        """The block's weights in the order of `weighted`; None where anything is not as it was seen."""
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
            or list(map(dict.get, self._with_numbers, self._attributes)) != self.numbers
            or list(map(_FORWARD, self._kinds)) != self._forwards
        ):
            return None
        return tuple([value for value in values if value is not None])


def parts_of_dense(name: str, dense: Any) -> dict[str, tuple[str, nn.Module]]:
    """The modules of a gated feed-forward, as `PlainLayer.parts` has them, under this name."""
    parts = {name: ("dense", dense)}
    parts |= {f"{name}.{part}": ("linear", getattr(dense, part)) for part in ("wi_0", "wi_1", "wo")}
    return parts | {f"{name}.dropout": ("dropout", dense.dropout), f"{name}.act": ("activation", dense.act)}
