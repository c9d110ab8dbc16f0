"""The places of a Python module's annotations: find them, hide those that are there, fill those that are not.

    holes = holes_of(text)
    hidden = hide(text, choose(holes, seed=0)[:100])    # hidden.text and hidden.target are what a model is trained on
    text = fill(text, holes, types)                     # one type for each hole; None leaves a hole as it is

Nothing here needs a model or imports the module that it reads.
"""

import ast
import builtins
import math
import random
import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from python_types.source import Source, SourceError, lines_of, not_too_deep, parse

MOST_SENTINELS = 100
Function = ast.FunctionDef | ast.AsyncFunctionDef
SENTINEL = re.compile(r"<extra_id_(\d+)>")
# what ends a parameter's name; whatever else is in it is the tokenizer's to judge
NAME = re.compile(r"[^\s:#\\]+")
GAP = re.compile(r"(?:\s|\\|#[^\r\n]*)*")
PUNCTUATION = re.compile(r"#[^\r\n]*|->|[()\[\]:]")


@dataclass(frozen=True)
class Hole:
    """The place of one annotation. Positions count characters of the text.

    `text[start:end]` is the annotation with the parentheses around it; where there is none, it is what has to give
    way, which is empty or a default's `=`. `text[anchor:end]` goes when the function is to have no annotation here. An
    annotation stands between `before` and `after`. `key` is what baselines take for its name: a parameter's own, for a
    return its function's and `()`. `annotation` is normalised (see `as_type`), or None where the module has none.
    """

    key: str
    function: str
    line: int
    anchor: int
    start: int
    end: int
    before: str
    after: str
    annotation: str | None

    @property
    def is_return(self) -> bool:
        """Whether it is what a function returns, not a parameter."""
        return self.key.endswith("()")


@dataclass(frozen=True)
class Hidden:
    """A module with sentinels: `holes[k]` is `<extra_id_k>`, which begins at character `offsets[k]` of `text`."""

    text: str
    holes: list[Hole]
    offsets: list[int]

    @property
    def target(self) -> str:
        """T5's form of the hidden types: `<extra_id_0>int<extra_id_1>str`."""
        return "".join(f"<extra_id_{k}>{hole.annotation or ''}" for k, hole in enumerate(self.holes))


@dataclass(frozen=True)
class _Place:
    hole: Hole
    # what has the annotation, its function, and what encloses that, from the outside inwards
    owner: Function | ast.arg
    function: Function
    enclosing: tuple[ast.AST, ...]


class _Positions:
    """From a tree's lines and UTF-8 columns to characters of the text."""

    def __init__(self, text: str) -> None:
        self.lines = lines_of(text)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))

    def at(self, line: int, column: int) -> int:
        content = self.lines[line - 1]
        if not content.isascii():
            column = len(content.encode()[:column].decode())
        return self.starts[line - 1] + column

    def span(self, node: ast.AST) -> tuple[int, int]:
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)


def _header(text: str, function: Function, positions: _Positions) -> tuple[int, int, int]:
    """Where the parameters' `)` ends, where what follows `->` begins, where it ends; both the same without `->`.

    Between the tree's own nodes a header has only names, punctuation and comments, so strings need no care.
    """
    arguments = function.args
    nodes = [
        *getattr(function, "type_params", ()),
        *(node for node in (*_parameters(arguments), *arguments.defaults, *arguments.kw_defaults) if node is not None),
    ]
    if function.returns is not None:
        nodes.append(function.returns)
    skips = sorted(positions.span(node) for node in nodes)
    position, depth, closed, begin = positions.span(function)[0], 0, None, None
    end = 0
    while True:
        match = PUNCTUATION.search(text, position)
        while skips and skips[0][0] < match.end():
            # the match lies in a node or behind it
            if skips[0][1] > position:
                position = end = skips[0][1]
                match = PUNCTUATION.search(text, position)
            skips.pop(0)
        position = match.end()
        found = match.group()
        if found in "([":
            depth += 1
        elif found in ")]":
            depth -= 1
            end = position
            if found == ")" and depth == 0 and closed is None:
                closed = position
        elif found == "->":
            begin = GAP.match(text, position).end()
        elif found == ":" and depth == 0:
            return (closed, closed, closed) if begin is None else (closed, begin, end)


def _parameters(arguments: ast.arguments) -> list[ast.arg]:
    each = [*arguments.posonlyargs, *arguments.args, arguments.vararg, *arguments.kwonlyargs, arguments.kwarg]
    return [argument for argument in each if argument is not None]


def _has_receiver(function: Function, enclosing: tuple[ast.AST, ...]) -> bool:
    """Whether the first parameter is the object or class that a method is called on."""
    first = [*function.args.posonlyargs, *function.args.args][:1]
    if not first:
        return False
    if first[0].arg in ("self", "cls"):
        return True
    is_static = any(isinstance(node, ast.Name) and node.id == "staticmethod" for node in function.decorator_list)
    return bool(enclosing) and isinstance(enclosing[-1], ast.ClassDef) and not is_static


def _functions(tree: ast.Module) -> Iterator[tuple[Function, tuple[ast.AST, ...]]]:
    stack: list[tuple[ast.AST, tuple[ast.AST, ...]]] = [(tree, ())]
    while stack:
        node, enclosing = stack.pop()
        if isinstance(node, Function):
            yield node, enclosing
        if isinstance(node, Function | ast.ClassDef):
            enclosing = (*enclosing, node)
        # functions and classes are statements, which are never inside an expression
        stack.extend((child, enclosing) for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr))


def _places(text: str, tree: ast.Module) -> list[_Place]:
    positions = _Positions(text)
    places = []
    for function, enclosing in _functions(tree):
        name = ".".join([*(node.name for node in enclosing), function.name])
        receiver = _has_receiver(function, enclosing)
        for index, argument in enumerate(_parameters(function.args)):
            start, end = positions.span(argument)
            anchor = NAME.match(text, start, end).end()
            before = after = ""
            if argument.annotation is not None:
                colon = GAP.match(text, anchor).end()
                start = GAP.match(text, colon + 1).end()
            elif index == 0 and receiver:
                continue
            else:
                before, start = ": ", anchor
                # PEP 8 has no spaces around a default's = without an annotation, and has them with one
                equals = re.compile(r"=[ \t]*").match(text, end)
                if equals:
                    end = equals.end()
                    after = " =" if text[end] in "\r\n\\#" else " = "
            places.append(
                _Place(
                    Hole(
                        key=argument.arg,
                        function=name,
                        line=argument.lineno,
                        anchor=anchor,
                        start=start,
                        end=end,
                        before=before,
                        after=after,
                        annotation=None if argument.annotation is None else ast.unparse(argument.annotation),
                    ),
                    argument,
                    function,
                    enclosing,
                )
            )
        closed, start, end = _header(text, function, positions)
        places.append(
            _Place(
                Hole(
                    key=f"{function.name}()",
                    function=name,
                    line=function.lineno,
                    anchor=closed,
                    start=start,
                    end=end,
                    before="" if function.returns is not None else " -> ",
                    after="",
                    annotation=None if function.returns is None else ast.unparse(function.returns),
                ),
                function,
                function,
                enclosing,
            )
        )
    return sorted(places, key=lambda place: place.hole.start)


def holes_of(text: str, name: str = "the module") -> list[Hole]:
    """All places of annotations of parameters and returns, filled or not, in the order of the text.

    A method's own object or class (`self`, `cls`, or however a method calls its first parameter) has a place only
    where it is annotated; parameters of a lambda have none.

    Args:
        text: a module with its own line endings and without a byte order mark.
        name: what errors call it.

    Raises:
        SourceError: if the text does not parse.
    """
    with not_too_deep(name):
        return [place.hole for place in _places(text, parse(text, name))]


def holes_to_fill(source: Source) -> list[Hole]:
    """The places of a file that have no annotation yet.

    Raises:
        SourceError: if there is none.
    """
    holes = holes_of(source.text, str(source.path))
    missing = [hole for hole in holes if hole.annotation is None]
    if not missing:
        what = "all parameters and returns are annotated already" if holes else "it has no function"
        raise SourceError(
            f"{source.path}: nothing to fill in: {what}; it must have a parameter or a return without an annotation"
        )
    return missing


def holes_to_hide(holes: Sequence[Hole]) -> list[Hole]:
    """The holes whose annotation is there and one that `fill` would write."""
    return [hole for hole in holes if hole.annotation is not None and as_type(hole.annotation) is not None]


def choose(holes: Sequence[Hole], seed: int, share: float | None = None) -> list[Hole]:
    """A random part of the annotations that are there, in the order of the text, at least one if there is one.

    Args:
        holes: of one module.
        seed: the same seed chooses the same.
        share: above 0, at most 1; by default drawn evenly from 0.15 to 1.

    Raises:
        ValueError: for another share.
    """
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"share is {share}, must be above 0 and at most 1")
    generator = random.Random(seed)
    candidates = holes_to_hide(holes)
    if share is None:
        share = generator.uniform(0.15, 1)
    chosen = generator.sample(range(len(candidates)), math.ceil(share * len(candidates)))
    return [candidates[index] for index in sorted(chosen)]


def _replaced(text: str, pieces: Sequence[tuple[int, int, str]]) -> str:
    """The text with pieces of it, in order and apart from each other, given anew."""
    result, position = [], 0
    for start, end, piece in pieces:
        result += text[position:start], piece
        position = end
    return "".join([*result, text[position:]])


def hide(text: str, chosen: Sequence[Hole], removed: Sequence[Hole] = ()) -> Hidden:
    """Put `<extra_id_0>`, `<extra_id_1>`, ... in the place of the chosen annotations, whether they are there or not.

    A sentinel that the text itself shows is spelt `<extra-id_0>`, so that all sentinels of the result are holes.

    Args:
        text: the module.
        chosen: holes of this text, at most 100.
        removed: further holes, which are left without an annotation.

    Raises:
        ValueError: for more holes than sentinels, or a hole twice.
    """
    if len(chosen) > MOST_SENTINELS:
        raise ValueError(f"{len(chosen)} holes are chosen, must be at most {MOST_SENTINELS}; see passes()")
    if len({hole.start for hole in (*chosen, *removed)}) < len(chosen) + len(removed):
        raise ValueError("a hole is given twice; must be once among chosen and removed")
    chosen = sorted(chosen, key=lambda hole: hole.start)
    pieces = [(hole.start, hole.end, f"{hole.before}<extra_id_{k}>{hole.after}") for k, hole in enumerate(chosen)]
    pieces += [(hole.anchor, hole.end, "") for hole in removed if hole.annotation is not None]
    # the spelling keeps its length, so the holes stay where they are
    hidden = _replaced(text.replace("<extra_id_", "<extra-id_"), sorted(pieces))
    offsets = [match.start() for match in SENTINEL.finditer(hidden)]
    return Hidden(hidden, chosen, offsets)


def passes(text: str, chosen: Sequence[Hole], most: int = MOST_SENTINELS) -> Iterator[Hidden]:
    """Hide any number of holes, the next `most` of them in each pass.

    A pass shows those of the other passes without an annotation: no pass sees another's answer, and all can be run as
    one batch.

    Raises:
        ValueError: if most is not from 1 to 100.
    """
    if not 1 <= most <= MOST_SENTINELS:
        raise ValueError(f"most is {most}, must be from 1 to {MOST_SENTINELS}")
    chosen = sorted(chosen, key=lambda hole: hole.start)
    for first in range(0, len(chosen), most):
        last = first + most
        yield hide(text, chosen[first:last], [*chosen[:first], *chosen[last:]])


def types_in(target: str, count: int) -> list[str | None]:
    """The types of a model's answer, one for each of `count` sentinels, normalised; None where `as_type` refuses it.

    Of several answers to a sentinel the first counts, and one to a sentinel that was not asked for is dropped. The
    answer is decoded with its special tokens, for sentinels are some: it may begin with `<pad>`, and ends at `</s>`.
    """
    pieces = SENTINEL.split(target.partition("</s>")[0])
    answers: dict[int, str] = {}
    for number, answer in zip(pieces[1::2], pieces[2::2], strict=True):
        answers.setdefault(int(number), answer)
    return [as_type(answers.get(k, "")) for k in range(count)]


def _is_type(node: ast.expr, inside: bool = False) -> bool:
    """Whether an expression is a type, or, inside a type's brackets, what may stand there."""
    if isinstance(node, ast.Name):
        return True
    if isinstance(node, ast.Attribute):
        return isinstance(node.value, ast.Name | ast.Attribute) and _is_type(node.value)
    if isinstance(node, ast.Subscript):
        return isinstance(node.value, ast.Name | ast.Attribute) and _is_type(node.value) and _is_type(node.slice, True)
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.BitOr) and _is_type(node.left) and _is_type(node.right)
    if isinstance(node, ast.Constant):
        if inside or node.value is None:
            return True
        # a string is a type that is named before it is defined
        return isinstance(node.value, str) and as_type(node.value) is not None
    if not inside:
        return False
    if isinstance(node, ast.List | ast.Tuple):
        return all(_is_type(element, True) for element in node.elts)
    if isinstance(node, ast.Starred):
        return _is_type(node.value)
    # Literal[-1]
    is_negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
    return is_negative and isinstance(node.operand, ast.Constant) and isinstance(node.operand.value, int | float)


@lru_cache(maxsize=2**16)
def as_type(text: str) -> str | None:
    """A type in the form that is written and compared, or None for what is not a type.

    `ast.unparse` settles spaces, line breaks and the kind of quotes, and nothing else: `Optional[int]` and
    `int | None` are two types, and so are `Tensor` and `"Tensor"`. A type is a name, an attribute of one, None, either
    with brackets, several joined by `|`, or a string of these. Brackets may also hold constants, `...`, lists, tuples,
    negative numbers and `*Ts`. Calls, lambdas, comparisons, conditions and all else are none, nor is what has a
    sentinel or `</s>` in a string.
    """
    if SENTINEL.search(text) or "</s>" in text:
        return None
    try:
        tree = ast.parse(text.strip(), mode="eval")
        return ast.unparse(tree) if _is_type(tree.body) else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _asked(holes: Sequence[Hole], types: Sequence[str | None]) -> dict[int, str]:
    """From a hole's start to its type, normalised, without the holes that are left."""
    if len(holes) != len(types):
        raise ValueError(f"there are {len(types)} types for {len(holes)} holes, must be one for each")
    asked = {}
    for hole, given in zip(holes, types, strict=True):
        if given is None:
            continue
        normal = as_type(given)
        if normal is None:
            raise ValueError(f"{hole.key} in line {hole.line} is given {given!r}, must be a type; see as_type()")
        asked[hole.start] = normal
    return asked


@not_too_deep("the module")
def fill(text: str, holes: Sequence[Hole], types: Sequence[str | None]) -> str:
    """Write types into a module's holes, also over annotations that are there; all other characters stay.

    Args:
        text: the module.
        holes: some of `holes_of(text)`.
        types: one for each hole; None leaves it as it is.

    Raises:
        ValueError: for a type that `as_type` refuses, or a hole that is not of this text.
        SourceError: if the text does not parse.
    """
    asked = _asked(holes, types)
    tree = parse(text)
    places = [place for place in _places(text, tree) if place.hole.start in asked]
    if {place.hole for place in places} != {hole for hole in holes if hole.start in asked}:
        raise ValueError("a hole is not of this text; must be of holes_of() of the same text")
    pieces = []
    for place in places:
        hole, given = place.hole, asked[place.hole.start]
        pieces.append((hole.start, hole.end, f"{hole.before}{given}{hole.after}"))
        expression = ast.parse(given, mode="eval").body
        if isinstance(place.owner, ast.arg):
            place.owner.annotation = expression
        else:
            place.owner.returns = expression
    filled = _replaced(text, pieces)
    # the tree with nothing but these types changed has to be what Python reads in the new text
    if ast.dump(parse(filled)) != ast.dump(tree):
        raise RuntimeError("the filled module differs in more than its annotations: this is a defect of fill()")
    return filled


@dataclass(frozen=True)
class Needed:
    """What types need that the module does not give them.

    `imports`: names that are neither built in nor bound where the type stands; a star import may bring them.
    `early`: names that the module binds only later, or for type checkers alone. Before Python 3.14 such an annotation
    raises NameError when the module is imported, unless it is quoted or the module has `from __future__ import
    annotations`.
    `inner`: names that are known only inside a class or function, by which the module's classes are found: "A.B" for
    `B` of the class `A`, "f.<locals>.C" for `C` of the function `f`.
    """

    imports: list[str]
    early: list[str]
    inner: list[str]


def _is_lazy(tree: ast.Module) -> bool:
    """Whether a module's annotations are never evaluated, as it asks for that."""
    return any(
        isinstance(node, ast.ImportFrom)
        and node.module == "__future__"
        and any(alias.name == "annotations" for alias in node.names)
        for node in tree.body
    )


class _Scopes:
    """The names that a module's annotations can see."""

    def __init__(self, tree: ast.Module):
        self.tree = tree
        self.bound: dict[ast.AST, dict[str, float]] = {}

    def at(self, place: "_Place") -> dict[str, float]:
        """The names that are bound where an annotation stands, and the line from which they are there."""
        # the names of a class are seen by its own methods' annotations, not by functions in these
        seen = [
            owner
            for owner in (self.tree, *place.enclosing)
            if not isinstance(owner, ast.ClassDef) or owner is place.enclosing[-1]
        ]
        parameters = (
            parameter.name for owner in (*place.enclosing, place.function) for parameter in _type_parameters(owner)
        )
        bound: dict[str, float] = dict.fromkeys(parameters, 0)
        for owner in seen:
            if owner not in self.bound:
                self.bound[owner] = _bound(owner)
            bound |= self.bound[owner]
        return bound


@not_too_deep("the module")
def possible(text: str, holes: Sequence[Hole], types: Sequence[str | None]) -> list[str | None]:
    """The types, None in the place of each that has the form of a type and cannot be one where it stands.

    That is so of one with a built-in function, such as `open`, or with brackets behind a built-in class that takes
    none, such as `int[str]`, where the module does not bind the name itself; and of one that Python evaluates and that
    joins two by `|` which cannot be joined, such as `int | 'A'`.

    Args:
        text: the module without the types.
        holes: some of `holes_of(text)`.
        types: one for each hole; None stays.

    Raises:
        ValueError: for a type that `as_type` refuses.
        SourceError: if the text does not parse.
    """
    asked = _asked(holes, types)
    tree = parse(text)
    scopes, is_lazy = _Scopes(tree), _is_lazy(tree)
    refused = set()
    for place in _places(text, tree):
        if place.hole.start in asked:
            bound, node = scopes.at(place), ast.parse(asked[place.hole.start], mode="eval").body
            is_possible = not any(_is_built_in_value(name) for name, _ in _names(node) if name not in bound)
            if not is_possible or _fails(node, bound, is_lazy):
                refused.add(place.hole.start)
    return [None if hole.start in refused else given for hole, given in zip(holes, types, strict=True)]


def _is_built_in_value(name: str) -> bool:
    """Whether a name is built in and not of a class: of a function, or of a constant."""
    return hasattr(builtins, name) and not isinstance(getattr(builtins, name), type)


def _fails(node: ast.AST, bound: Container[str], is_lazy: bool) -> bool:
    """Whether a type's brackets, or its `|` where it is evaluated, raise TypeError, as far as Python's own classes
    say."""

    def built_in(part: ast.expr) -> type | None:
        found = getattr(builtins, part.id, None) if isinstance(part, ast.Name) and part.id not in bound else None
        return found if isinstance(found, type) else None

    for part in ast.walk(node):
        if isinstance(part, ast.Subscript):
            of = built_in(part.value)
            # `type[int]` is Python's own exception
            if of is not None and of is not type and not hasattr(of, "__class_getitem__"):
                return True
        elif isinstance(part, ast.BinOp) and not is_lazy:
            sides = part.left, part.right
            constants = [side.value for side in sides if isinstance(side, ast.Constant)]
            # a string beside a class or None, or two of None
            if len(constants) == 2 or (any(isinstance(one, str) for one in constants) and any(map(built_in, sides))):
                return True
    return False


@not_too_deep("the module")
def needed_names(text: str, holes: Sequence[Hole], types: Sequence[str | None]) -> Needed:
    """The names that types will need in the holes of a module, each list sorted.

    Args:
        text: the module without the types.
        holes: some of `holes_of(text)`.
        types: one for each hole; None is left out.

    Raises:
        ValueError: for a type that `as_type` refuses.
        SourceError: if the text does not parse.
    """
    asked = _asked(holes, types)
    tree = parse(text)
    is_lazy = _is_lazy(tree)
    scopes = _Scopes(tree)
    inner_names = _inner_classes(tree)
    imports: set[str] = set()
    early: set[str] = set()
    inner: set[str] = set()
    for place in _places(text, tree):
        hole = place.hole
        if hole.start not in asked:
            continue
        bound = scopes.at(place)
        # annotations are evaluated when a `def` is, which inside another function is later than the module's names
        is_evaluated = not is_lazy and not any(isinstance(owner, Function) for owner in place.enclosing)
        for name, is_quoted in _names(ast.parse(asked[hole.start], mode="eval").body):
            if name in bound:
                if is_evaluated and not is_quoted and bound[name] >= hole.line:
                    early.add(name)
            elif hasattr(builtins, name):
                continue
            elif name in inner_names:
                inner.add(inner_names[name])
            else:
                imports.add(name)
    return Needed(sorted(imports), sorted(early), sorted(inner))


def _inner_classes(tree: ast.Module) -> dict[str, str]:
    """The classes that are defined inside other classes or functions: from the name to `__qualname__`, of several with
    one name the first."""
    found: dict[str, str] = {}
    waiting: list[tuple[ast.AST, str]] = [(tree, "")]
    while waiting:
        owner, before = waiting.pop(0)
        for node in ast.iter_child_nodes(owner):
            inside = before
            if isinstance(node, ast.ClassDef):
                if before:
                    found.setdefault(node.name, before + node.name)
                inside = f"{before}{node.name}."
            elif isinstance(node, Function):
                inside = f"{before}{node.name}.<locals>."
            waiting.append((node, inside))
    return found


def _type_parameters(owner: ast.AST) -> list[ast.AST]:
    """`T` of `def f[T](x: T)`, which Python has from 3.12."""
    return getattr(owner, "type_params", [])


def _names(node: ast.AST, is_quoted: bool = False) -> Iterator[tuple[str, bool]]:
    """The names in a type, each with whether it stands in a string, where Python does not look it up."""
    if isinstance(node, ast.Name):
        yield node.id, is_quoted
    elif isinstance(node, ast.Constant):
        normal = as_type(node.value) if isinstance(node.value, str) else None
        if normal is not None:
            yield from _names(ast.parse(normal, mode="eval").body, True)
    elif isinstance(node, ast.Subscript) and ast.unparse(node.value).split(".")[-1] in ("Literal", "Annotated"):
        yield from _names(node.value, is_quoted)
        # a literal's strings are values, and so are Annotated's but for its first
        if ast.unparse(node.value).endswith("Annotated"):
            yield from _names(node.slice.elts[0] if isinstance(node.slice, ast.Tuple) else node.slice, is_quoted)
    else:
        for child in ast.iter_child_nodes(node):
            yield from _names(child, is_quoted)


def _bound(owner: ast.AST) -> dict[str, float]:
    """The names that a module, class or function binds itself, and the line from which they are there."""
    bound: dict[str, float] = {}
    stack: list[tuple[ast.AST, bool]] = [(node, False) for node in owner.body]
    if isinstance(owner, Function):
        stack += [(argument, False) for argument in _parameters(owner.args)]
    while stack:
        node, is_checked_only = stack.pop()
        names: list[str] = []
        children = ast.iter_child_nodes(node)
        if isinstance(node, Function | ast.ClassDef):
            names, children = [node.name], iter(())
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.asname or alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names = [node.id]
        elif isinstance(node, ast.arg):
            names = [node.arg]
        elif isinstance(node, ast.Lambda):
            children = iter(())
        elif isinstance(node, ast.If) and ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING":
            stack += [(child, True) for child in node.body]
            children = iter(node.orelse)
        for name in names:
            # a class has its name from its last line on
            line = math.inf if is_checked_only else node.end_lineno
            bound[name] = min(line, bound.get(name, math.inf))
        stack += [(child, is_checked_only) for child in children]
    return bound
