"""Names that pages, docstrings and comments put in backticks: files and code of that name exist."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    path
    for folder in ("modeling_colt5", "benchmarks", "examples", "docs", "configuration", "tokenization")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "benchmarks").glob("*.md"))]
# of other libraries, and nowhere in this project's code
FOREIGN = {
    "DataLoader", "SentenceTransformer", "TorchAoConfig", "add_bos_token", "custom_op", "do_bench",
    "do_bench_cudagraph", "functional_call", "ignore_data_skip", "index_add", "infer_auto_device_map", "load_adapter",
    "make_fx", "max_memory", "once_differentiable",
    "quantize_dynamic", "register_autograd", "set_use_kernels", "setup_context", "tie_weights",
    "trainable_token_indices",
}  # fmt: skip
# of a checkpoint's folder, or of one that the reader makes
WRITTEN = {
    "baselines.json", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "summaries/README.md",
}  # fmt: skip
FOLDERS = [ROOT / name for name in (".", "modeling_colt5", "benchmarks", "benchmarks/results", "examples", "tests")]
FILE = re.compile(r"[\w/.-]+\.(?:py|md|jsonl|json|svg|ipynb|txt|yml|toml)$")


@functools.cache
def docstrings(text):
    """The docstring of each module, class and function of a source, as nodes."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                found.append(first.value)
    return found


def words_of_code(path):
    """Every word of a source outside of docstrings and comments."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in docstrings(text):
        lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return re.findall(r"\w+", re.sub(r"(?m)(^|\s)#.*$", "", "\n".join(lines)))


def prose(path):
    """What a file says to its readers: a page without its blocks, a source's docstrings and comments."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return re.sub(r"```.*?```", "", text, flags=re.S)
    comments = re.findall(r"(?m)(?:^|\s)#.*$", text)
    return "\n".join([*(str(node.value) for node in docstrings(text)), *comments])


def names_in(text):
    """The files, and the words of code, that a text has in backticks."""
    files, words = set(), set()
    for quoted in re.findall(r"`([^`\n]+)`", re.sub(r"<extra_id_\w+>", "", text)):
        for part in quoted.split():
            if FILE.match(part):
                files.add(part)
            else:
                words.update(re.findall(r"\w+", part))
    # a word of plain English may be anything
    return files, {word for word in words if re.search(r"[a-z]_[a-z]|[a-z][A-Z]", word) and not word.endswith("_")}


@pytest.fixture(scope="module")
def known():
    return FOREIGN.union(*map(words_of_code, SOURCES), (path.stem for path in SOURCES))


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_named_exists(path, known):
    files, words = names_in(prose(path))
    folders = (path.parent, *FOLDERS)
    assert {file for file in files - WRITTEN if not any((folder / file).exists() for folder in folders)} == set()
    assert words - known == set()


def test_a_name_of_nothing_is_found(known):
    files, words = names_in("`no_such.py` reads `model.no_such_method()`, `CoLT5Nothing` and `route`")
    assert files == {"no_such.py"} and words - known == {"no_such_method", "CoLT5Nothing"}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_page_has_a_heading_twice(page):
    headings = re.findall(r"(?m)^#+ .*$", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S))
    assert len(headings) == len(set(headings)), headings
