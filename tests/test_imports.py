"""The modules' dependencies are those of docs/architecture.md, and the Hub's code loader can follow them."""

import ast
import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_imports

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "modeling_colt5"
FILES = sorted(PACKAGE.glob("*.py"))

# what the package requires, and what its requirements bring along
REQUIRED = {"accelerate", "einops", "huggingface_hub", "numpy", "safetensors", "tokenizers", "torch", "transformers"}
# usable where present, so imported where a failure is caught
OPTIONAL = {"triton"}


def documented_ranks() -> dict[str, int]:
    """File name -> rank, from the table of the architecture page."""
    rows = re.findall(
        r"^\| *(\d+) *\| *(`[^|]*`) *\|", (ROOT / "docs/architecture.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    ranks = {}
    for rank, cell in rows:
        for name in re.findall(r"`([^`]+)`", cell):
            assert name not in ranks, f"{name} stands twice in the table of docs/architecture.md"
            ranks[name] = int(rank)
    return ranks


RANKS = documented_ranks()


@functools.cache
def imports(tree: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def top_level_names(node: ast.Import | ast.ImportFrom) -> set[str]:
    """Top-level modules that an absolute import names; none for a relative one."""
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    return {node.module.split(".")[0]} if node.level == 0 else set()


def guarded_imports(tree: ast.AST) -> set[ast.AST]:
    """The imports that stand in the body of a `try` which catches their failure."""
    caught = {"ImportError", "ModuleNotFoundError", "Exception"}
    guarded = set()
    for block in ast.walk(tree):
        if isinstance(block, ast.Try):
            names = {node.id for handler in block.handlers for node in ast.walk(handler) if isinstance(node, ast.Name)}
            if names & caught:
                guarded.update(node for statement in block.body for node in imports(statement))
    return guarded


def never_run(tree: ast.AST) -> set[ast.AST]:
    """The imports under `if TYPE_CHECKING:`, which only the Hub's code loader follows."""
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    return {
        node
        for block in blocks
        if isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for statement in block.body
        for node in imports(statement)
    }


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def file(request: pytest.FixtureRequest) -> Path:
    return request.param


@functools.cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@pytest.fixture
def tree(file: Path) -> ast.Module:
    return parsed(file)


def test_table_names_every_module_and_no_other():
    assert set(RANKS) == {path.name for path in FILES}


def test_first_statement_is_a_docstring(tree):
    assert ast.get_docstring(tree), "a file's first line says its one job"


def test_siblings_are_imported_in_the_one_form_the_loader_follows(file, tree):
    for node in imports(tree):
        where = f"{file.name}:{node.lineno}"
        assert "modeling_colt5" not in top_level_names(node), f"{where}: the Hub's copy has another package name"
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module and "." not in node.module, f"{where}: write `from .x import y`"


def test_loader_reads_the_same_siblings_as_python(file, tree):
    # the loader searches the text with a pattern: it misses some imports, and takes prose of that form for one
    siblings = {node.module for node in imports(tree) if isinstance(node, ast.ImportFrom) and node.level}
    assert set(get_relative_imports(file)) == siblings


def test_imports_point_downward(file, tree):
    rank = RANKS[file.name]
    for node in set(imports(tree)) - never_run(tree):
        if isinstance(node, ast.ImportFrom) and node.level and node.module:
            other = f"{node.module}.py"
            assert RANKS[other] < rank, f"{file.name} (rank {rank}) imports {other} (rank {RANKS[other]})"


def test_third_parties_are_required_or_guarded(file, tree):
    guarded = guarded_imports(tree)
    for node in imports(tree):
        foreign = top_level_names(node) - sys.stdlib_module_names - REQUIRED
        if node in guarded:
            foreign -= OPTIONAL
        assert not foreign, (
            f"{file.name}:{node.lineno}: {', '.join(foreign)} is neither required nor optional in a try"
        )


def test_loader_demands_only_what_the_package_requires(file):
    # the loader refuses to load a model whose code imports, outside a try, what is not installed
    assert set(get_imports(file)) - sys.stdlib_module_names <= REQUIRED


# imports Transformers anew; that triton is imported in a `try` alone is a test above
@pytest.mark.slow
def test_package_imports_without_triton():
    # a finder without triton, not an entry in sys.modules: `find_spec("triton")` has to answer None as well
    code = """
import importlib, importlib.machinery, sys

# torchao, which Transformers imports where it is installed, would take longer than all else
ABSENT = {"triton", "kernels", "torchao"}

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in ABSENT else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError:
        assert name.endswith("_triton"), name
    else:
        assert not name.endswith("_triton"), name
assert "triton" not in sys.modules
"""
    names = ["modeling_colt5", *(f"modeling_colt5.{path.stem}" for path in FILES if path.stem != "__init__")]
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names():
    package = importlib.import_module("modeling_colt5")
    # fixed by the project: code that people write against them must go on working
    promised = {
        "CoLT5Config",
        "CoLT5EncoderModel",
        "CoLT5ForCausalLM",
        "CoLT5ForConditionalGeneration",
        "CoLT5ForQuestionAnswering",
        "CoLT5ForSequenceClassification",
        "CoLT5ForTokenClassification",
        "CoLT5Model",
        "CoLT5PreTrainedModel",
        "CoLT5Tokenizer",
        "soft_topk",
    }
    assert promised <= set(package.__all__)
    assert [name for name in package.__all__ if not hasattr(package, name)] == []
