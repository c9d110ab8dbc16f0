"""Annotations found, hidden and filled: hand-written positions, real modules, files of every kind, and the scores."""

import ast
import contextlib
import os
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import transformers
from python_types import holes, score
from python_types.holes import (
    as_type,
    choose,
    fill,
    hide,
    holes_of,
    holes_to_fill,
    holes_to_hide,
    needed_names,
    passes,
    possible,
    types_in,
)
from python_types.score import Answer, commonest, copied_by_name, copied_from_nearest, far_holes, paired_bootstrap
from python_types.source import SourceError, lines_of, read_source, unified_diff, write_source

# « » stand around each annotation, and are alone where one is missing; the text without them is the module
CASES = {
    "plain": "def f(a: «int», b«», *c: «str», d«» = 1, **e«») -> «None»: pass\n",
    "no return": "def f(a: «int»)«»: pass\n",
    "no parameters": "def f()«»:\n    pass\n",
    "positional only": "def f(a: «int», /, b: «str», *, c: «T») -> «R»: ...\n",
    "tight": "def f(a:«int»=1,*b:«str»)->«R»:pass\n",
    "parentheses": "def f(a: «(int)» = (1), b: «((\n  x | y\n))» = (((2)))) -> «( ((int)) )»: pass\n",
    "tuple": "def f(a: «(int, str)» = (1, (2))) -> «(int, str)»: pass\n",
    "several lines": (
        "def f(\n    a: «Union[\n        int,  # one: (\n        str,\n    ]» = None,\n"
        ") -> «Dict[\n  a, b]»:\n  pass\n"
    ),
    "continuation": "def f(a \\\n  : \\\n «int» = 1) \\\n -> \\\n «int» \\\n : pass\n",
    "comments": (
        "def f(  # (: -> [\n    a  # :\n    :  # int\n    «int»,  # b: str)\n    b«»,  # -> int:\n"
        ")«»:  # -> x\n    pass\n"
    ),
    "strings": "def f(a: «'A(:'» = ')->:', b«» = '''\n):->\n''', c: «\"B\"» = f'{1:>{2}}') -> «'R:)'»: pass\n",
    "brackets in defaults": "def f(a«» = {1: ')'}, b«» = [x for x in (1, 2)], c«» = lambda y, z=1: (y))«»: pass\n",
    "lambda": "g = lambda a, *b, c=1: a\ndef f(a: «Callable[[int], str]»)«»: return lambda q: q\n",
    "async": "async def f(a«») -> «int»: pass\nasync  def  g(a: «b»)«»: pass\n",
    "unicode": (
        "é = '😀'; λ = 1\ndef ñ(é: «'😀é'» = '→', ﬁ: «λ» = 1, x·y«» = 2) -> «Ä»: '😀'\n"
        'class Ö:\n  def m(self, 名: «Ö») -> «"Ö"»: pass\n'
    ),
    "tabs": "class A:\n\tdef m(self,\tb:\t«int»\t=\t1)\t->\t«int»:\n\t\tdef n(c«»)«»:\n\t\t\tpass\n",
    "form feed": "\x0cdef f(a: «int»)«»: pass\n\x0c\ndef g(a: «int»\x0c)«»: pass\n",
    "windows": "def f(\r\n  a: «int»,\r\n  b: «List[\r\n  str]»\r\n) -> «int»:\r\n  '''é\r\n'''\r\n",
    "old mac": "def f(a: «int»)«»:\r  pass\rdef g(b«»)«»: pass\r",
    "other line ends": "x = '\x0b\x1c\x85\u2028'\ndef f(a: «int») -> «str»: pass\n",
    "methods": (
        "class A:\n"
        "  def m(self, a«»)«»: pass\n"
        "  def typed(self: «A», a«»)«»: pass\n"
        "  def other_name(this, a: «int»)«»: pass\n"
        "  @classmethod\n  def c(cls, a«»)«»: pass\n"
        "  @staticmethod\n  def s(a«»)«»: pass\n"
        "  @property\n  def p(self) -> «int»: pass\n"
        "  def only_star(*args«»)«»: pass\n"
        "  if True:\n    def inner(me) -> «A»:\n      def nested(a«»)«»: pass\n"
        "  class B:\n    async def m(self, /, a: «int»)«»: pass\n"
        "def patched(self, a«»)«»: pass\n"
    ),
    "overloads": (
        "@overload\ndef f(a: «int») -> «int»: ...\n@overload\ndef f(a: «str») -> «str»: ...\n"
        "@d(lambda x: (x))\ndef f(a«»)«»:\n    return a\n"
    ),
    "everywhere": (
        "try:\n  def a(x«»)«»: pass\nexcept E:\n  def b(x«»)«»: pass\nfinally:\n  def c(x«»)«»: pass\n"
        "match 1:\n  case 1:\n    def d(x«»)«»: pass\nwith e:\n  for f in g:\n    def h(x«»)«»: pass\n"
        "  else:\n    def i(x«»)«»: pass\n"
    ),
    "no end of line": "def f(a: «int»)«»: return '''a: b'''",
}
CASES["star annotation"] = "def f(*a: «*Ts») -> «int»: pass\n"
if sys.version_info >= (3, 12):
    CASES["type parameters"] = (
        "def f[T: (int, ')->:'), **P](a: «T») -> «T»: pass\nclass A[T]:\n  def m(self, a: «T»)«»: pass\n"
    )
    CASES["new f-strings"] = "def f(a«» = f'{x['(']}')«»: pass\n"

STANDARD = Path(sysconfig.get_paths()["stdlib"])
MODULES = [
    *(STANDARD / name for name in ("dataclasses.py", "functools.py", "asyncio/streams.py", "graphlib.py")),
    Path(transformers.__file__).parent / "models" / "t5" / "modeling_t5.py",
    Path(np.__file__).parent / "_core" / "getlimits.py",
    *sorted(Path(holes.__file__).parent.glob("*.py")),
]


def marked(case: str) -> tuple[str, list[tuple[int, int]]]:
    """A case's text, and where the marks were in it."""
    pieces = case.replace("»", "«").split("«")
    ends = np.cumsum([len(piece) for piece in pieces]).tolist()
    return "".join(pieces), list(zip(ends[:-1:2], ends[1::2], strict=True))


def without_annotations(text: str) -> str:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
    return ast.dump(tree)


@pytest.mark.parametrize("name", CASES)
def test_every_place_is_found_to_the_character(name):
    text, spans = marked(CASES[name])
    found = holes_of(text)
    assert [(hole.start, hole.start if hole.annotation is None else hole.end) for hole in found] == spans
    for hole, (start, end) in zip(found, spans, strict=True):
        assert (hole.annotation is None) == (start == end)
        if start < end and not text[start:end].startswith("*"):
            assert hole.annotation == ast.unparse(ast.parse(f"({text[start:end]})", mode="eval"))


@pytest.mark.parametrize("name", CASES)
def test_nothing_but_annotations_changes(name):
    text, _ = marked(CASES[name])
    found = holes_of(text)
    assert fill(text, found, [None] * len(found)) == text
    filled = fill(text, found, [f"T{k}[int]" for k in range(len(found))])
    assert [hole.annotation for hole in holes_of(filled)] == [f"T{k}[int]" for k in range(len(found))]
    assert without_annotations(filled) == without_annotations(text)
    # removed from the text, an annotation is removed from the tree and nothing else is
    removed = hide(text, [], found).text
    assert ast.dump(ast.parse(removed)) == without_annotations(text)
    # a sentinel stands where a type would
    hidden = hide(text, found)
    assert [hidden.text[at:].startswith(f"<extra_id_{k}>") for k, at in enumerate(hidden.offsets)] == [True] * len(
        found
    )
    assert holes.SENTINEL.sub(lambda match: f"T{match[1]}[int]", hidden.text) == filled


@pytest.mark.slow
@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_a_real_module_comes_back(path):
    text = read_source(path).text
    found = holes_of(text)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    given = [
        argument.annotation for node in nodes for argument in ast.walk(node.args) if isinstance(argument, ast.arg)
    ]
    given += [node.returns for node in nodes]
    assert sum(hole.annotation is not None for hole in found) == sum(node is not None for node in given)
    candidates = holes_to_hide(found)
    types = [hole.annotation for hole in candidates]
    filled = fill(text, candidates, types)
    assert ast.dump(ast.parse(filled)) == ast.dump(ast.parse(text))
    plain = [hole for hole in candidates if text[hole.start : hole.end] == hole.annotation]
    assert fill(text, plain, [hole.annotation for hole in plain]) == text
    seen = []
    for hidden in passes(text, candidates):
        seen += hidden.holes
        assert len(hidden.offsets) == len(hidden.holes) <= 100
        assert types_in(hidden.target, len(hidden.holes)) == [hole.annotation for hole in hidden.holes]
        # nothing of what is asked for in another pass is shown in this one
        with_names = holes.SENTINEL.sub("hidden", hidden.text)
        shown = [hole.annotation for hole in holes_of(with_names) if hole.annotation not in (None, "hidden")]
        assert len(shown) == sum(hole.annotation is not None for hole in found) - len(candidates)
    assert seen == candidates


def test_sentinels_are_in_t5s_form():
    text = "def f(a: int, b=None, *, c = 1, d=\\\n2) -> Optional[ \"A\" ]:\n    '<extra_id_0>'\n"
    found = holes_of(text)
    hidden = hide(text, found)
    assert hidden.text == (
        "def f(a: <extra_id_0>, b: <extra_id_1> = None, *, c: <extra_id_2> = 1, d: <extra_id_3> =\\\n2)"
        " -> <extra_id_4>:\n"
        "    '<extra-id_0>'\n"
    )
    assert hidden.target == "<extra_id_0>int<extra_id_1><extra_id_2><extra_id_3><extra_id_4>Optional['A']"
    assert types_in("<pad><extra_id_1> str <extra_id_0>a b<extra_id_1>int<extra_id_7>int</s>", 3) == [
        None,
        "str",
        None,
    ]
    ended = "<pad><extra_id_0> int<extra_id_1> List[int]</s><pad><extra_id_2>int"
    assert types_in(ended, 3) == ["int", "List[int]", None]
    many = "".join(f"def f{k}(a: int) -> str: ...\n" for k in range(120))
    with pytest.raises(ValueError, match="240 holes.*at most 100"):
        hide(many, holes_of(many))
    with pytest.raises(ValueError, match="twice"):
        hide(text, found[:2], found[1:])
    with pytest.raises(ValueError, match="most is 0"):
        list(passes(text, found, 0))
    assert [len(hidden.holes) for hidden in passes(many, holes_of(many))] == [100, 100, 40]


def test_the_choice_is_seeded():
    text = "".join(f"def f{k}(a: int, b) -> str: ...\n" for k in range(100))
    found = holes_of(text)
    assert choose(found, 3) == choose(found, 3) != choose(found, 4)
    sizes = [len(choose(found, seed)) for seed in range(200)]
    assert min(sizes) >= 30 and max(sizes) <= 200 and max(sizes) - min(sizes) > 100
    assert len(choose(found, 0, 0.3)) == 60
    assert choose(found, 0, 1) == [hole for hole in found if hole.annotation]
    assert choose(holes_of("def f(a): ...\n"), 0) == []
    for share in (0, -1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="share is"):
            choose(found, 0, share)


def test_only_types_are_written():
    for given in (
        "int", "a.b.C", "None", "int|None", "Dict[str,int]", "Callable[..., 'A']", "Callable[[int], str]", "Tuple[()]",
        "Literal[-1, 'a b', b'c', True]", "'A'", "'A[int] | None'", "Float[Tensor, 'b c']",
        "Annotated[int, 5]", "Optional[\n int ]",
    ):  # fmt: skip
        assert as_type(as_type(given)) == as_type(given) is not None
    assert as_type("Tuple[int, *Ts]") == "Tuple[int, *Ts]"
    for given in (
        "", " ", "int,", "(int, str)", "[int]", "f()", "lambda: 1", "x := 1", "a = 1", "a if b else c", "a and b",
        "not a", "a < b", "a + b", "5", "...", "True", "a[1:2]", "{'a': 1}", "f'{a}'", "[a for a in b]", "await a",
        "*a", "'a b'", "A[f()]", "A[b + c]", "f().a", "int): pass\ndef g(x", "int\nint", "A[", "\x00",
        "'\ud800'", "\ud800", "(" * 1000, "a." * 50_000 + "b", "A[-'x']", "<extra_id_0>",
        "Literal['<extra_id_0>']", "Literal['</s>']",
    ):  # fmt: skip
        assert as_type(given) is None, given
    text = "def f(a): ...\n"
    found = holes_of(text)
    with pytest.raises(ValueError, match=r"a in line 1 is given 'f\(\)', must be a type"):
        fill(text, found, ["f()", None])
    with pytest.raises(ValueError, match="1 types for 2 holes"):
        fill(text, found, ["int"])
    with pytest.raises(ValueError, match="not of this text"):
        fill("x = 1\ndef f(a): ...\n", found, ["int", None])


def test_names_that_types_need():
    text = (
        "import typing as t\nfrom a.b import C\nif t.TYPE_CHECKING:\n    from d import E\n"
        "class G:\n    H = int\n    def m(self, x): ...\n    def k(self, x): ...\nfor item in (): Z = 1\n"
    )
    found = holes_of(text)[:1]

    def needed(given: str, before: str = "") -> tuple[list[str], list[str]]:
        names = needed_names(before + text, holes_of(before + text)[: len(found)], [given])
        assert not names.inner
        return names.imports, names.early

    assert needed("t.List[C]") == ([], [])
    assert needed("Optional[np.ndarray] | int") == (["Optional", "np"], [])
    assert needed("Tuple[H, item, Z]") == (["Tuple"], ["Z", "item"])
    assert needed("G | E | k") == ([], ["E", "G", "k"])
    assert needed("'G | E | torch.Tensor'") == (["torch"], [])
    assert needed("G | E", "from __future__ import annotations\n") == ([], [])
    assert needed("t.Literal['torch']") == ([], [])
    assert needed("t.Annotated[Any, 'torch']") == (["Any"], [])
    assert needed_names(text, found, [None]) == holes.Needed([], [], [])
    nested = "def f():\n    class A: ...\n    def g(x): ...\nclass B: ...\n"
    assert needed_names(nested, holes_of(nested)[1:2], ["dict[A, B]"]) == holes.Needed([], [], [])


INNER = """
class A:
    class B:
        def own(self, x): ...
    def inside(self, x): ...

def f(x):
    class C:
        class list: ...
        def own(self, x): ...
    def beside(x): ...
"""


@pytest.mark.parametrize(
    ("function", "given", "inner", "is_known"),
    [
        # `B` is seen in `A`, and not in itself
        ("A.B.own", "B", ["A.B"], False), ("A.inside", "B", [], True), ("f", "C | B", ["A.B", "f.<locals>.C"], False),
        # inside a class that is not there yet
        ("f.C.own", "C", [], False), ("A.inside", "A.B", [], False),
        ("f.beside", "C", [], True), ("f", "list", [], True),
    ],
)  # fmt: skip
def test_classes_inside_others_are_not_to_be_imported(
    function: str, given: str, inner: list[str], is_known: bool
) -> None:
    (hole,) = (hole for hole in holes_of(INNER) if (hole.function, hole.key) == (function, "x"))
    needed = needed_names(INNER, [hole], [given])
    assert (needed.imports, needed.inner) == ([], inner)
    run = compile(f"{fill(INNER, [hole], [given])}\nf(0)\n", "module", "exec")
    with contextlib.nullcontext() if is_known else pytest.raises(NameError):
        exec(run, {})


@pytest.mark.parametrize(
    ("given", "is_possible"),
    [
        ("open", False), ("open[int]", False), ("list[len]", False), ("'print'", False), ("int[str]", False),
        ("str | open", False), ("list[bool[int]]", False), ("__debug__", False), ("NotImplemented", False),
        ("int | 'A'", False), ("'A' | None", False), ("None | None", False),
        ("list[int]", True), ("type[int]", True), ("A[int]", True), ("dict[str, int | None]", True), ("'A'", True),
        ("Literal['open']", True), ("sum", True), ("ValueError", True), ("None", True), ("A | 'B'", True),
    ],
)  # fmt: skip
def test_what_cannot_be_a_type_in_its_place_is_none(given: str, is_possible: bool) -> None:
    """`sum` is bound here. What Python can evaluate without other names, it evaluates or refuses alike."""
    text = "class sum: ...\ndef f(x): ...\n"
    found = holes_of(text)[:1]
    assert possible(text, found, [given]) == [given if is_possible else None]
    assert possible(text, found, [None]) == [None]
    try:
        exec(fill(text, found, [given]), {})
    except NameError:
        pass
    except TypeError:
        assert not is_possible
    lazy = f"from __future__ import annotations\n{text}"
    late = possible(lazy, holes_of(lazy)[:1], [given])
    assert late == [given if is_possible or "A" in given or given == "None | None" else None]


def file(folder: Path, data: bytes) -> Path:
    path = folder / "module.py"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "data",
    [
        b"def f(a): pass\n",
        b"\xef\xbb\xbfdef f(a): '\xc3\xa9'\n",
        b"\xef\xbb\xbf# coding: utf-8\r\ndef f(a):\r\n\tpass\r\n",
        b"# -*- coding: latin-1 -*-\ndef f(\xe9): '\xe9'\n",
        b"#!/usr/bin/python\n# vim: set fileencoding=cp1252 :\ndef f(a): '\x80'",
        b"def f(a): pass # mixed\r\n\n\rx = 1\r",
    ],
    ids=["plain", "mark", "mark and declaration", "latin-1", "cp1252", "mixed line ends"],
)
def test_a_file_keeps_its_bytes(tmp_path, data):
    path = file(tmp_path, data)
    path.chmod(0o640)
    link = tmp_path / "link.py"
    link.symlink_to(path)
    read = read_source(link)
    write_source(read, fill(read.text, holes_to_fill(read), [None, None]))
    assert path.read_bytes() == data
    write_source(read, fill(read.text, holes_to_fill(read), ["int", "None"]))
    end = data.index(b"):")
    assert path.read_bytes() == data[:end] + b": int) -> None" + data[end + 1 :]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640 and link.is_symlink()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link.py", "module.py"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "module.py: is empty; must be a module"),
        (b" \n\n", "module.py: is empty; must be a module"),
        (b"\xef\xbb\xbf", "module.py: is empty; must be a module"),
        (b"x = 1\ndef f(:\n", "module.py, line 2: is not Python .*; mend it"),
        (b"x = 1\nprint 'a'\n", "module.py, line 2: is not Python"),
        (b"x = 1\n\x00\n", "module.py.*: is not Python"),
        (b"x = 1\ny = 2\nz = '\xe9'\n", "module.py, line 3: byte 0xe9 is not utf-8; save"),
        (b"'\xe9'\n", "module.py, line 1: .*save the file as UTF-8"),
        (b"# coding: nonsense\n", "module.py, line 1: has no encoding.*nonsense"),
        (b"# coding: rot13\n", "module.py, line 1: has no encoding"),
        (b"x = " + b"(" * 5000 + b")" * 5000, "module.py.*: is "),
        (b"x = 1\n", "nothing to fill in: it has no function; it must"),
        (b"def f(a: int) -> int: ...\n", "nothing to fill in: all .* are annotated already; it must"),
        (b"class A:\n  def f(self) -> int: ...\n", "nothing to fill in: all"),
    ],
)
def test_files_that_cannot_be_annotated(tmp_path, data, message):
    with pytest.raises(SourceError, match=message):
        holes_to_fill(read_source(file(tmp_path, data)))


def test_a_file_is_not_left_half_written(tmp_path, monkeypatch):
    with pytest.raises(SourceError, match="is not a file"):
        read_source(tmp_path)
    path = file(tmp_path, b"# coding: ascii\ndef f(a): pass\n")
    read = read_source(path)
    with pytest.raises(SourceError, match="module.py, line 2: ascii has no 'é'"):
        write_source(read, fill(read.text, holes_to_fill(read), ["é", None]))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            write_source(read, "x = 1\n")
    assert path.read_bytes() == read.data
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        with pytest.raises(SourceError, match="must not be written"):
            write_source(read, "x = 1\n")
    path.write_bytes(b"new = 1\n")
    with pytest.raises(SourceError, match="has changed since"):
        write_source(read, "x = 1\n")
    assert path.read_bytes() == b"new = 1\n" and list(tmp_path.iterdir()) == [path]


def test_warnings_of_a_strange_module_are_not_ours(recwarn):
    assert len(holes_of("def f(a: int): return '\\d' is 1\n")) == 2
    assert not recwarn.list


@pytest.mark.parametrize("text", ["def f(a):\r\n\tpass\r\n", "x = '\x0c'\n\x0c\ndef f(a): pass", "def f(a): '\x85'\n"])
def test_patch_understands_the_difference(tmp_path, text):
    filled = fill(text, holes_of(text), ["int", "None"])
    difference = unified_diff(text, filled, "module.py")
    path = file(tmp_path, text.encode())
    command = ["git", "apply", "--whitespace=nowarn", "-"]
    subprocess.run(command, cwd=tmp_path, input=difference.encode(), check=True, env={**os.environ, "GIT_DIR": "none"})
    assert path.read_bytes() == filled.encode()
    assert unified_diff(text, text, "module.py") == ""
    assert "".join(lines_of(text)) == text


def test_scores_are_counted():
    text = "def f(a: int, b: str, c: T): ...\ndef g(a: int, b: bytes, d: X): ...\ndef h(a: bool, b: str): ...\n"
    found = holes_of(text)
    chosen = [hole for hole in found if hole.function == "h" and hole.annotation or hole.key == "d"]
    assert [hole.key for hole in chosen] == ["d", "a", "b"]
    other = holes_of("def f(a: A, d: X, e: Y): ...\ndef g(a: A, d: X, e: W): ...\ndef h(a: B): ...\n")
    table, common = commonest(other)
    assert table == {"a": "A", "d": "X", "e": "W"} and common == ["A", "X", "B", "W", "Y"]
    # of str and bytes, equally common here, the first in the alphabet
    assert copied_by_name(chosen, found, table) == ["X", "int", "bytes"]
    # the nearest b of all is that of g
    assert copied_from_nearest(chosen, found, table) == ["X", "int", "bytes"]
    returns = holes_of(
        "def f() -> A: ...\nclass B:\n  def f(self, x: int) -> A: ...\ndef g() -> C: ...\ndef h() -> C: ...\n"
        "def f(x: str) -> B: ...\n"
    )
    table, _ = commonest(holes_of("def g() -> D: ...\ndef k() -> E: ...\ndef m() -> E: ...\n"))
    assert table == {"return": "E", "g()": "D", "k()": "E", "m()": "E"}
    last = [hole for hole in returns if hole.line >= 4]
    assert [hole.key for hole in last] == ["g()", "h()", "x", "f()"]
    assert copied_by_name(last, returns, table) == ["A", "A", "int", "A"]
    assert copied_from_nearest(last, returns, table) == ["D", "A", "int", "A"]
    assert copied_from_nearest(last[-1:], returns, table) == ["A"] and copied_by_name(last[-1:], returns, {}) == ["A"]
    assert copied_by_name(returns, returns, {}) == [None] * len(returns)
    assert copied_from_nearest(returns[:1], returns[:1], table) == ["E"]
    table, _ = commonest(other)
    # a token for each character: far is counted in tokens between the holes
    distance = chosen[2].start - found[1].start
    starts = range(len(text))
    assert far_holes(chosen, found, starts, distance) == [None, None, False]
    assert far_holes(chosen, found, starts, distance - 1) == [None, None, True]
    answers = [
        Answer("m", hole.key, hole.annotation, given, far)
        for hole, given, far in zip(chosen, ["X", None, "str"], [None, True, False], strict=True)
    ]
    assert {name: (share.right, share.all) for name, share in score.score(answers, ["str"]).items()} == {
        "all": (2, 3),
        "rare": (1, 2),
        "far": (0, 1),
        "near": (1, 1),
    }
    assert np.isnan(score.Share(0, 0).percent) and score.Share(1, 4).percent == 25


def test_the_bootstraps_interval_is_that_of_the_mean_over_modules():
    generator = np.random.default_rng(0)
    gains = generator.random(400) < 0.3
    ours = [
        Answer(str(k), "a", "int", "int" if gain else "no", None) for k, gain in enumerate(gains) for _ in range(5)
    ]
    theirs = [Answer(answer.module, "a", "int", "no", None) for answer in ours]
    mean, low, high = paired_bootstrap(ours, theirs, samples=2000)
    assert mean == pytest.approx(100 * gains.mean())
    # the normal interval over modules, not over holes; 2,000 samples know each end to about a twentieth of it
    half = 196 * gains.std() / 400**0.5
    assert (mean - low, high - mean) == pytest.approx((half, half), rel=0.15)
    assert paired_bootstrap(ours, ours, samples=10) == (0, 0, 0)
    for other in ([], theirs[:-1], theirs[::-1]):
        with pytest.raises(ValueError, match="same holes"):
            paired_bootstrap(ours, other)
