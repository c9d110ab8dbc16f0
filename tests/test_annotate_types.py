"""The script that annotates a file: diff, writing, scores and errors, with answers given and with a new model's."""

import ast
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import annotate_types
import demo
import pytest
import torch
from annotate_types import annotate, read_source
from python_types.holes import as_type, holes_of
from python_types.predict import Prediction

from modeling_colt5 import CoLT5Config, CoLT5ForConditionalGeneration, CoLT5Tokenizer

ROOT = Path(__file__).parent.parent
TEXT = """import os
from typing import Any


def join(first, *rest: str, sep="/"):
    return sep.join((first, *rest))


class Late:
    def copy(self, other=None, /) -> "Late":
        return other or self
"""
# places in order: first, sep, join(), other
ANSWERS = [("str", 0.9), ("Path|None", 0.6), ("not a type", 0.8), ("Late", 0.3)]
WRITTEN = """import os
from typing import Any


def join(first: str, *rest: str, sep: Path | None = "/"):
    return sep.join((first, *rest))


class Late:
    def copy(self, other: Late = None, /) -> "Late":
        return other or self
"""


@pytest.fixture
def answers(monkeypatch):
    """Answers instead of a model's; gives what was asked."""
    given, asked = list(ANSWERS), []

    def predict(model, tokenizer, rows, counts):
        asked.extend(tokenizer.decode(row) for row in rows)
        each = iter(given)
        yield {
            number: [Prediction(as_type(kind), probability) for kind, probability in zip_first(each, count)]
            for number, count in enumerate(counts)
        }

    def zip_first(each, count):
        return [next(each) for _ in range(count)]

    tokenizer = CoLT5Tokenizer.from_pretrained(ROOT / "tokenization/python_stdlib")
    monkeypatch.setattr(annotate_types, "predict_all", predict)
    monkeypatch.setattr(annotate_types, "load", lambda folder: (None, tokenizer))
    return given, asked, tokenizer


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "module.py"
    path.write_text(TEXT)
    path.chmod(0o750)
    return path


def test_a_diff_is_printed_and_the_file_is_left(answers, file, capsys):
    annotate_types.main([str(file)])
    output = capsys.readouterr()
    assert output.out.startswith(f"--- a/{file}\n+++ b/{file}\n@@")
    changed = [line for line in output.out.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert changed == [
        '-def join(first, *rest: str, sep="/"):',
        '+def join(first: str, *rest: str, sep: Path | None = "/"):',
        '-    def copy(self, other=None, /) -> "Late":',
        '+    def copy(self, other: Late = None, /) -> "Late":',
    ]
    lines = output.err.splitlines()
    assert lines[:4] == [
        " 90%  line 5: join, first: str",
        " 60%  line 5: join, sep: Path | None",
        " 80%  line 5: join: left, for the answer is no type",
        " 30%  line 10: Late.copy, other: Late",
    ]
    assert lines[4] == "to be imported: Path"
    assert lines[5].startswith("used before they are there: Late; put `from __future__ import annotations`")
    assert file.read_text() == TEXT
    # one pass: every place that lacks an annotation is asked, and what is there is seen
    expected = TEXT.replace("first,", "first: <extra_id_0>,", 1) + "</s>"
    expected = expected.replace('sep="/")', 'sep: <extra_id_1> = "/") -> <extra_id_2>')
    expected = expected.replace("other=None", "other: <extra_id_3> = None")
    # the tokenizer does not keep spaces around sentinels
    assert [text.replace(" ", "") for text in answers[1]] == [expected.replace(" ", "")]


def test_what_cannot_be_a_type_where_it_stands_is_left_or_copied(answers, tmp_path, capsys):
    """`open` is a function, `B` is known as `A.B` alone; a name's type elsewhere in the module is copied instead."""
    answers[0][:] = [("open", 0.9), ("B", 0.8), ("open", 0.9)]
    path = tmp_path / "module.py"
    text = "class A:\n    class B: ...\ndef f(x, y):\n    def g(z: int): ...\ndef h(z) -> None: ...\n"
    path.write_text(text)
    answers[0].insert(2, ("int[str]", 0.9))
    answers[0].insert(3, ("len", 0.9))
    annotate_types.main([str(path), "--write"])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == " 90%  line 3: f, x: left, for the answer is no type"
    assert lines[1] == " 80%  line 3: f, y: B"
    assert lines[2] == " 90%  line 3: f: left, for the answer is no type"
    assert lines[3] == " 90%  line 4: f.g: left, for the answer is no type"
    assert lines[4] == "copied  line 5: h, z: int (the model: no type)"
    assert lines[5] == "known by these names alone, and by none inside a function: A.B"
    assert path.read_text() == text.replace("x, y", "x, y: B").replace("def h(z)", "def h(z: int)")


@pytest.mark.parametrize(
    "data",
    [
        "\ufeffdef é(first, sep=1): pass\r\n".encode(),
        b"# coding: latin-1\ndef f(first, sep='\xe9'): pass",
        b"# coding: cp1252\nx = '\x80'\ndef f(first, sep=1): pass\n",
        b"def f(first, sep=1):\r    return first\r",
        b"x = 1\rdef f(first, sep=1):\r\n    return first\nx = 2\r",
    ],
    ids=["byte order mark", "latin-1", "cp1252", "carriage returns", "all line ends"],
)
def test_the_printed_diff_is_in_the_bytes_of_the_file(answers, tmp_path, capfdbinary, monkeypatch, data):
    """Applied by git it gives what --write gives."""
    monkeypatch.chdir(tmp_path)
    path = Path("ñ.py")
    path.write_bytes(data)
    annotate_types.main([str(path)])
    patch = capfdbinary.readouterr().out
    command = ["git", "apply", "--whitespace=nowarn", "-"]
    subprocess.run(command, input=patch, check=True, env={**os.environ, "GIT_DIR": "none"})
    applied = path.read_bytes()
    path.write_bytes(data)
    annotate_types.main([str(path), "--write"])
    assert path.read_bytes() == applied != data


def test_the_file_is_written_whole(answers, file):
    annotate_types.main([str(file), "--write"])
    assert file.read_text() == WRITTEN
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o750
    assert [path.name for path in file.parent.iterdir()] == ["module.py"]


def test_improbable_types_are_left(answers, file, capsys):
    annotate_types.main([str(file), "--write", "--least-probability", "0.5"])
    assert file.read_text() == WRITTEN.replace("other: Late = None", "other=None")
    assert "other: left, Late is not probable enough" in capsys.readouterr().err


def test_a_failed_writing_leaves_the_file(answers, file, monkeypatch):
    def fails(*_):
        raise OSError("no space is left")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(SystemExit, match="no space is left"):
        annotate_types.main([str(file), "--write"])
    assert file.read_text() == TEXT and len(list(file.parent.iterdir())) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:\n", "line 1: is not Python"),
        ("", "is empty"),
        (" \n", "is empty"),
        ("x = 1\n", "nothing to fill in"),
        ("def f(x: int) -> int: ...\n", "nothing to fill in"),
        (None, "is not a file"),
    ],
)
def test_what_cannot_be_annotated_is_one_line(answers, file, text, message, monkeypatch):
    def loaded(folder):
        raise AssertionError("the model is not needed to say so")

    monkeypatch.setattr(annotate_types, "load", loaded)
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(SystemExit) as error:
        annotate_types.main([str(file), "--write"])
    assert str(error.value).startswith(f"annotate_types.py: {file}")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert text is None or file.read_text() == text


def test_a_module_that_is_too_long_is_one_line(answers, file):
    answers[2].model_max_length = 20
    with pytest.raises(SystemExit, match=r"has \d+ tokens; must have at most 20: split the module"):
        annotate_types.main([str(file), "--write"])
    assert file.read_text() == TEXT


def test_a_missing_model_is_one_line(file, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as error:
        annotate_types.main([str(file), "--model", str(tmp_path / "none")])
    assert "\n" not in str(error.value) and "where no folder is" in str(error.value)


def test_the_demo_refuses_a_missing_model_and_steps_below_none(tmp_path, capsys):
    with pytest.raises(SystemExit, match="^demo.py: model is .*none', where no folder is"):
        demo.main(["--model", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        demo.main(["--steps", "-1"])
    assert "--steps is -1; it must be at least 0" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["5", "-0.1", "nan"])
def test_a_probability_out_of_range_is_refused(given, file, capsys):
    with pytest.raises(SystemExit):
        annotate_types.main([str(file), "--least-probability", given])
    assert "--least-probability is" in capsys.readouterr().err


def test_a_score_hides_what_is_there(answers, file, capsys):
    given, asked, _ = answers
    file.write_text("def f(a: int, b: int) -> str: ...\ndef g(a: int, c): ...\n")
    # at 30 % two of four, and what is left of a; then all
    given[:] = [("int", 1.0), ("bool", 1.0), ("float", 1.0), ("T", 1.0)]
    annotate_types.main([str(file), "--score"])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("2 annotations hidden (30%): right ")
    assert second == (
        "4 annotations hidden (100%): right 25.0 %, the model alone 25.0 %, copied by name 0.0 %, copied from the "
        "nearest of that name 0.0 %"
    )
    assert asked[-1].count("<extra_id_") == 4 and "c)" in asked[-1]
    file.write_text("def f(a): ...\n")
    with pytest.raises(SystemExit, match="has no annotation to hide"):
        annotate_types.main([str(file), "--score"])


def test_a_new_model_changes_nothing_but_annotations(tmp_path, monkeypatch):
    monkeypatch.setattr("python_types.predict.LONGEST_ANSWER", 3)
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_heads": 4, "num_light_heads": 2, "num_heavy_heads": 2}
    sizes |= {"num_layers": 1, "num_decoder_layers": 1, "light_d_ff": 16, "heavy_d_ff": 32}
    CoLT5ForConditionalGeneration(CoLT5Config(vocab_size=8128, **sizes)).save_pretrained(tmp_path / "model")
    CoLT5Tokenizer.from_pretrained(ROOT / "tokenization/python_stdlib").save_pretrained(tmp_path / "model")
    source = read_source(Path(ast.__file__).parent / "bisect.py")
    annotated = annotate(source, *annotate_types.load(tmp_path / "model"))
    places = [hole for hole in holes_of(source.text) if hole.annotation is None]
    assert [annotation.hole for annotation in annotated.annotations] == places and len(places) > 20
    assert all(0 <= annotation.probability <= 1 for annotation in annotated.annotations)

    def bare(text: str) -> str:
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.arg):
                node.annotation = None
            elif isinstance(node, ast.FunctionDef):
                node.returns = None
        return ast.dump(tree)

    assert bare(annotated.text) == bare(source.text)
    written = [hole.annotation for hole in holes_of(annotated.text)]
    assert written == [annotation.type for annotation in annotated.annotations]


def test_more_places_than_sentinels_take_more_passes(answers, file):
    given, asked, tokenizer = answers
    file.write_text("".join(f"def f{number}(a, b, c): ...\n" for number in range(60)))
    given[:] = [("int", 1.0)] * 240
    annotated = annotate(read_source(file), None, tokenizer)
    assert len(asked) == 3 and annotated.text.count("a: int, b: int, c: int) -> int") == 60


# runs the shipped checkpoint once
def test_a_space_of_ones_own_has_what_the_page_needs(tmp_path):
    """What is read of the repository is in the folders that the Space's page copies, and all of these are read."""
    page = (ROOT / "spaces/python-types/README.md").read_text(encoding="utf-8")
    *folders, space = re.search(r"cp -rL (.+)", page)[1].split()
    assert space == "space"
    (tmp_path / "module.py").write_text("def f(a): ...\n")
    program = """
import sys
read = []
sys.addaudithook(lambda event, given: read.append(str(given[0])) if event == "open" else None)
import annotate_types
from modeling_colt5 import show_routing
annotate_types.main(sys.argv[1:])
print("\\n".join(read))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "module.py")],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    paths = [Path(line) for line in done.stdout.splitlines() if line.startswith(f"{ROOT}{os.sep}")]
    inside = {path.relative_to(ROOT).parts[0] for path in paths if "site-packages" not in path.parts}
    # an environment in the folder and its notes on the package, .venv and .egg-info, are none of the repository
    assert {name for name in inside if name.isidentifier()} == set(folders)
