"""Modules that are nested more deeply than what walks their trees can follow are refused, at every depth."""

import pytest
from annotate_types import main
from python_types.holes import fill, holes_of, needed_names
from python_types.source import SourceError

MODULES = {
    "annotation": "def f(a: int{}, b): ...\n",
    "sum": "x = 1{}\ndef f(a, b): ...\n",
    "condition": "if a{}: pass\ndef f(a, b): ...\n",
}
LINKS = {"annotation": "|int", "sum": "+1", "condition": ".b"}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("depth", [10, 400, 800, 3000])
def test_a_deep_module_is_done_or_refused(kind, depth):
    text = MODULES[kind].format(LINKS[kind] * depth)
    try:
        holes = holes_of(text)
        last = [hole for hole in holes if hole.annotation is None][-1:]
        assert "b" in fill(text, last, ["int"])
        needed_names(text, last, ["int"])
    except SourceError as error:
        assert depth > 10 and "is nested too deeply for Python; split its longest expression" in str(error)


def test_the_command_says_so_in_one_line(tmp_path):
    file = tmp_path / "deep.py"
    file.write_text(MODULES["annotation"].format(LINKS["annotation"] * 800))
    with pytest.raises(SystemExit, match=r"annotate_types.py: .*deep.py: is nested too deeply"):
        main([str(file)])
