"""Whether a block is plain, so that a straight line of launches may stand for the calls of its modules."""

from collections.abc import Mapping
from itertools import chain, islice
from operator import attrgetter, itemgetter
from typing import Any

from torch import Tensor, nn

from .kernel_backend import is_hooked, runs_eagerly, triton_is_available

if triton_is_available():
    from .layer_plain_triton import weights_as_seen


# attributes whose numbers a straight line depends on; where a module drops, it depends on `training` too
_NUMBERS = ("eps", "d_kv", "radius", "groups", "routing", "is_gated_act", "dropout", "p")
_NONE = type(None)
_HOOKS = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_FORWARD = attrgetter("forward")
_PARAMETERS, _MODULES = itemgetter("_parameters"), itemgetter("_modules")

# For each kind of module in a block its class, and the `forward` that the class was written with; the block itself is
# the kind "block".
Kinds = Mapping[str, tuple[type[nn.Module], Any]]
# Modules of a block by name, each with its kind.
Parts = dict[str, tuple[str, nn.Module]]


def kinds_of(**classes: type[nn.Module]) -> Kinds:
    """The kind of each class, with the `forward` that it has now."""
    return {kind: (module_class, module_class.forward) for kind, module_class in classes.items()}


def is_called_as_written(block: nn.Module, kinds: Kinds) -> bool:
    """Whether a call of the block runs the `forward` of its known class alone: no hook, no subclass, no patch."""
    known, forward = kinds["block"]
    return type(block) is known and known.forward is forward and not is_hooked(block)


def is_plain_linear(linear: nn.Module) -> bool:
    """Whether a projection of a plain block is no more than a product with its weight: not with adapters, hooks, a
    bias that a user's module has, or a weight that is quantised, which is another class's or not a plain
    parameter."""
    return (
        type(linear) is nn.Linear
        and type(linear.weight) is nn.Parameter
        and linear.bias is None
        and not is_hooked(linear)
    )


class PlainBlock:
    """What a straight line reads of a block, as long as the block is plain.

    Plain is a block of this code's own modules with ordinary parameters: no hooks inside, no other forward in the
    place of a module's or a class's, no other modules, no adapters, no quantised weights. PyTorch tells nobody when
    one of these changes, so `read` looks at all of them each time: at the modules' dictionaries, in C, a few
    microseconds for all 36 modules of an encoder's block.

    A copied or unpickled object has read nothing yet.

    Args:
        kind: what a block is read as.
    """

    def __init__(self, kind: "type[PlainLayer]") -> None:
        self._kind = kind
        self._layer: PlainLayer | None = None

    def __reduce__(self) -> Any:
        return PlainBlock, (self._kind,)

    def read(self, block: nn.Module, kinds: Kinds) -> "tuple[Any, tuple[Tensor, ...]] | None":
        """The layer, of the kind that this object was made for, and its weights in the order of `weighted`; None where
        the block, which holds this object, is not plain, or is traced: one block may be compiled in an eager pass."""
        if not runs_eagerly():
            return None
        layer = self._layer
        weights = None if layer is None else layer.weights(block)
        if weights is None:
            layer = self._layer = self._kind.of(block, kinds)
            weights = None if layer is None else layer.weights(block)
        return None if layer is None or weights is None else (layer, weights)


class Seen:
    """What makes modules plain, as it was at the time of the last look, to be compared with what it is now.

    Args:
        modules: all of them.
        parents: modules with children; these children must stay the same.
        with_parameters: those that have parameters.
        numbered: pairs of a module and the name of a number that it holds.
    """

    __slots__ = (
        "attributes", "children", "classes", "dicts", "forwards", "kinds", "kinds_of_values", "lengths", "modules",
        "numbers", "parents", "with_numbers", "with_parameters",
    )  # fmt: skip

    def __init__(
        self,
        modules: list[nn.Module],
        parents: list[nn.Module],
        with_parameters: list[nn.Module],
        numbered: list[tuple[nn.Module, str]],
    ):
        self.modules = modules
        self.classes = list(map(type, modules))
        self.kinds = list(dict.fromkeys(self.classes))
        self.forwards = list(map(_FORWARD, self.kinds))
        self.dicts = [part.__dict__ for part in modules]
        self.lengths = list(map(len, self.dicts))
        self.parents = [part.__dict__ for part in parents]
        self.children = list(chain.from_iterable(map(dict.values, map(_MODULES, self.parents))))
        self.with_parameters = [part.__dict__ for part in with_parameters]
        values = chain.from_iterable(map(dict.values, map(_PARAMETERS, self.with_parameters)))
        self.kinds_of_values = [_NONE if value is None else nn.Parameter for value in values]
        self.with_numbers = [part.__dict__ for part, _ in numbered]
        self.attributes = [attribute for _, attribute in numbered]
        self.numbers: list[Any] = list(map(dict.get, self.with_numbers, self.attributes))

    @classmethod
    def together(cls, parts: "list[Seen]") -> "Seen":
        """What was seen of several blocks, as one: a single look at everything takes less time than one a block."""
        whole = cls.__new__(cls)
        for name in cls.__slots__:
            setattr(whole, name, list(chain.from_iterable(getattr(part, name) for part in parts)))
        whole.kinds = list(dict.fromkeys(whole.kinds))
        whole.forwards = list(map(_FORWARD, whole.kinds))
        return whole

    def weights(self) -> list[Tensor] | None:
        """The parameters that there are, in their order; None where anything is not as it was seen."""
        in_c = weights_as_seen() if triton_is_available() else None
        if in_c is None:
            return self.weights_in_python()
        return in_c(
            self.modules, self.classes, self.dicts, self.lengths, self.parents, self.children, self.with_parameters,
            self.kinds_of_values, self.with_numbers, self.attributes, self.numbers, self.kinds, self.forwards,
        )  # fmt: skip

    def weights_in_python(self) -> list[Tensor] | None:
        """The same without a compiler of C. It also documents what the C code compares."""
        values = list(chain.from_iterable(map(dict.values, map(_PARAMETERS, self.with_parameters))))
        if (
            any(chain.from_iterable(map(_HOOKS, self.dicts)))
            or list(map(type, self.modules)) != self.classes
            or list(map(len, self.dicts)) != self.lengths
            or list(chain.from_iterable(map(dict.values, map(_MODULES, self.parents)))) != self.children
            or list(map(type, values)) != self.kinds_of_values
            or list(map(dict.get, self.with_numbers, self.attributes)) != self.numbers
            or list(map(_FORWARD, self.kinds)) != self.forwards
        ):
            return None
        return [value for value in values if value is not None]


class PlainStack:
    """What straight lines read of all blocks of a stack, as long as all are plain.

    It reads what `PlainBlock` reads, of all blocks at once. Block by block would take too long for one new token, and
    an encoder without gradients computes all of its layers together.

    A copied or unpickled object has read nothing yet. Threads may read at the same time: what one has found is put
    down and taken up as a whole.
    """

    def __init__(self) -> None:
        # the blocks, what holds their sublayers, their layers, and what makes all of them plain
        self._found: tuple[list[nn.Module], list[Any], list[PlainLayer], Seen] | None = None

    def __reduce__(self) -> Any:
        return PlainStack, ()

    def read(self, blocks: nn.ModuleList, kinds: Kinds) -> "list[tuple[Any, tuple[Tensor, ...]]] | None":
        """Of each block its layer, of the kind that its `plain` was made for, and its weights in the order of
        `weighted`; None where a block is not plain, or its call is more than it was written with."""
        own: list[Any] = list(blocks._modules.values())
        if not all(is_called_as_written(block, kinds) for block in own):
            return None
        holders = [block.__dict__["_modules"].get("layer") for block in own]
        found = self._found
        if found is not None and (found[0], found[1]) == (own, holders):
            _, _, layers, seen = found
            weights = seen.weights()
            if weights is not None:
                numbers = iter(weights)
                return [(layer, tuple(islice(numbers, len(layer.weighted)))) for layer in layers]
        read = [block.plain.read(block, kinds) for block in own]
        if any(each is None for each in read):
            self._found = None
            return None
        layers = [layer for layer, _ in read]
        self._found = own, holders, layers, Seen.together([layer.seen for layer in layers])
        return read


class PlainLayer:
    """The modules of a plain block, what makes them plain, and the numbers that they hold.

    It holds neither the block nor its dictionary: a circle of references would keep a model in memory.

    Attributes:
        weighted: names of the modules with a weight, in the order in which the weights are read.
        named: numbers that modules hold, by the names of modules and attributes.
        seen: the modules as they are.
    """

    __slots__ = ("named", "seen", "weighted")

    def __init__(self, block: Any, parts: dict[str, nn.Module]):
        self.weighted = tuple(name for name, part in parts.items() if part._parameters.get("weight") is not None)
        numbered = [(name, key) for name, part in parts.items() for key in _NUMBERS if key in part.__dict__]
        numbered += [(name, "training") for name, key in numbered if key in ("dropout", "p")]
        modules = list(parts.values())
        self.seen = Seen(
            modules,
            [part for part in (block.layer, *modules) if part._modules],
            [parts[name] for name in self.weighted],
            [(parts[name], key) for name, key in numbered],
        )
        self.named: dict[tuple[str, str], Any] = dict(zip(numbered, self.seen.numbers, strict=True))

    @property
    def numbers(self) -> list[Any]:
        """All numbers that modules hold."""
        return self.seen.numbers

    def values(self, attribute: str) -> tuple[Any, ...]:
        """The numbers of an attribute, in the modules' order."""
        return tuple(number for (_, own), number in self.named.items() if own == attribute)

    @property
    def drops_something(self) -> bool:
        """Whether a module drops something now."""
        rates = ((name, rate) for (name, key), rate in self.named.items() if key in ("dropout", "p"))
        return any(rate and self.named[name, "training"] for name, rate in rates)

    @property
    def is_supported(self) -> bool:
        """Whether there is a straight line for these numbers."""
        return all(self.values("is_gated_act")) and set(self.values("routing")) <= {"learned"}

    @classmethod
    def parts(cls, block: Any) -> Parts:
        """The modules that a block's forward calls.

        Raises:
            AttributeError, ValueError: where one is missing.
        """
        raise NotImplementedError

    @classmethod
    def of(cls, block: nn.Module, kinds: Kinds) -> "PlainLayer | None":
        """The layer that a block is; None where it is not plain."""
        try:
            parts = cls.parts(block)
        except (AttributeError, ValueError):
            return None
        for kind, part in parts.values():
            known, forward = kinds[kind]
            if type(part) is not known or known.forward is not forward or "forward" in part.__dict__:
                return None
            for key, value in part.__dict__["_parameters"].items():
                if type(value) is not (nn.Parameter if key == "weight" else _NONE):
                    return None
        layer = cls(block, {name: part for name, (_, part) in parts.items()})
        return layer if layer.is_supported else None

    def weights(self, block: nn.Module) -> tuple[Tensor, ...] | None:
        """The block's weights in the order of `weighted`; None where anything is not as it was seen."""
        layers = block.__dict__["_modules"].get("layer")
        if layers is None or layers.__dict__ is not self.seen.parents[0]:
            return None
        values = self.seen.weights()
        return None if values is None else tuple(values)


def parts_of_sublayer(name: str, sublayer: Any, dropout: str) -> Parts:
    """The norm before a sublayer, and the dropout of what it adds, which has the kind `dropout`."""
    return {f"{name}.layer_norm": ("norm", sublayer.layer_norm), f"{name}.dropout": (dropout, sublayer.dropout)}


def parts_of_attention(name: str, kind: str, attention: Any, projections: str = "qkvo") -> Parts:
    """An attention of a kind, and its projections."""
    own = {f"{name}.{part}": ("linear", getattr(attention, part)) for part in projections}
    return {name: (kind, attention), **own}


def parts_of_dense(name: str, dense: Any) -> Parts:
    """A gated feed-forward and its modules."""
    own = {f"{name}.{part}": ("linear", getattr(dense, part)) for part in ("wi_0", "wi_1", "wo")}
    others = {f"{name}.dropout": ("dropout", dense.dropout), f"{name}.act": ("activation", dense.act)}
    return {name: ("dense", dense), **own, **others}
