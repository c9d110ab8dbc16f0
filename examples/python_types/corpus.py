"""Make the corpus of Python modules: fetch pinned wheels, check licences, drop near-duplicates, write rows by split.

    python examples/python_types/corpus.py --out build/python_types

A wheel is only unpacked: nothing of it is installed or run. `--packages` builds from some of the list.
"""

import argparse
import ast
import email
import json
import lzma
import platform
import re
import subprocess
import sys
import sysconfig
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import chain
from multiprocessing import Pool
from pathlib import Path, PurePosixPath

import numpy as np

from modeling_colt5.tokenization_colt5 import CoLT5Tokenizer

VOCABULARY = Path(__file__).resolve().parents[2] / "tokenization/python_stdlib"
TRAIN = "train"
# what is chosen after training, such as a threshold, is chosen here: neither trained on nor counted
VALIDATION = "validation"
PERMISSIVE = {
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "PSF-2.0",
    "Zlib",
}
# words of a licence expression that name no licence; the exception only adds permissions
CONNECTIVES = {"AND", "OR", "WITH", "LLVM-exception"}
# how the metadata of a wheel without a License-Expression names the licences above
CLASSIFIERS = {
    "License :: OSI Approved :: Apache Software License": {"Apache-2.0"},
    "License :: OSI Approved :: BSD License": {"BSD-2-Clause", "BSD-3-Clause"},
    "License :: OSI Approved :: MIT License": {"MIT"},
}
# tests, other people's code, and what a program wrote
EXCLUDED_FOLDERS = {"test", "tests", "testing", "idle_test", "_vendor", "vendor", "vendored", "third_party", "extern"}
EXCLUDED_FOLDERS |= {"encodings", "pydoc_data", "generated", "site-packages", "dist-packages"}
GENERATED = re.compile(r"^#.*(?:do not edit|auto-?generated|generated (?:by|from))", re.IGNORECASE | re.MULTILINE)
MIN_TOKENS = 1000
LONGEST_LINE = 1000
NEAR = 0.7
SHINGLE = 5
HASHES, BANDS = 128, 32
PRIME = 2**31 - 1


@dataclass(frozen=True)
class Package:
    """A pinned release: its name, version, SPDX licence and the split that all of its modules belong to; of its
    modules those with fewer annotations than `least_annotations` are left out."""

    name: str
    version: str
    licence: str
    split: str = TRAIN
    least_annotations: int = 0


@dataclass(frozen=True)
class Module:
    """A row of the corpus: one whole module. `path` is its path in the wheel or in the standard library."""

    package: str
    version: str
    path: str
    licence: str
    split: str
    text: str
    n_tokens: int


PACKAGES = [
    Package("torch", "2.13.0", "BSD-3-Clause"),
    Package("transformers", "5.24.0", "Apache-2.0"),
    Package("sympy", "1.14.0", "BSD-3-Clause"),
    Package("numpy", "2.4.6", "BSD-3-Clause"),
    Package("networkx", "3.6.1", "BSD-3-Clause"),
    Package("homeassistant", "2024.3.3", "Apache-2.0"),
    Package("django", "5.2.19", "BSD-3-Clause"),
    Package("nova", "34.0.0", "Apache-2.0"),
    Package("pandas", "3.1.1", "BSD-3-Clause", "pandas"),
    Package("accelerate", "1.15.0", "Apache-2.0", "hub"),
    Package("peft", "0.21.2", "Apache-2.0", "hub"),
    Package("datasets", "5.2.0", "Apache-2.0", "hub"),
    Package("huggingface_hub", "2.4.0", "Apache-2.0", "hub"),
    Package("sqlglot", "30.30.0", "MIT", "sqlglot"),
    Package("xarray", "2026.9.0", "Apache-2.0", VALIDATION),
    Package("haystack-ai", "3.4.1", "Apache-2.0", VALIDATION),
]
# of these only what has annotations: they are there for the variety of types
PACKAGES += [
    Package(name, version, licence, least_annotations=5)
    for name, version, licence in (
        ("aiohttp", "3.14.5", "Apache-2.0"),
        ("anndata", "0.12.19", "BSD-3-Clause"),
        ("anthropic", "2.14.0", "Apache-2.0"),
        ("anyio", "4.16.0", "MIT"),
        ("astropy", "8.0.2", "BSD-3-Clause"),
        ("ax-platform", "1.3.1", "MIT"),
        ("azure-ai-ml", "1.35.2", "MIT"),
        ("black", "26.10.1", "MIT"),
        ("bokeh", "3.9.2", "BSD-3-Clause"),
        ("botorch", "0.18.1", "MIT"),
        ("chromadb", "1.5.9", "Apache-2.0"),
        ("cirq-core", "1.7.0", "Apache-2.0"),
        ("dagster", "1.13.29", "Apache-2.0"),
        ("discord.py", "2.7.1", "MIT"),
        ("distributed", "2026.8.0", "BSD-3-Clause"),
        ("flax", "0.12.8", "Apache-2.0"),
        ("great-expectations", "1.24.1", "Apache-2.0"),
        ("jax", "0.10.2", "Apache-2.0"),
        ("kedro", "1.7.0", "Apache-2.0"),
        ("kornia", "0.9.0", "Apache-2.0"),
        ("langchain-community", "0.4.2", "MIT"),
        ("langchain-core", "1.8.4", "MIT"),
        ("lightning", "2.6.6", "Apache-2.0"),
        ("litestar", "2.25.0", "MIT"),
        ("llama-index-core", "0.14.25", "MIT"),
        ("marimo", "0.25.2", "Apache-2.0"),
        ("mcp", "2.3.0", "MIT"),
        ("mitmproxy", "11.0.2", "MIT"),
        ("mlflow", "3.18.0", "Apache-2.0"),
        ("monai", "1.6.1", "Apache-2.0"),
        ("mypy", "2.4.1", "MIT"),
        ("napari", "0.9.2", "BSD-3-Clause"),
        ("nicegui", "3.18.0", "MIT"),
        ("openai", "3.57.0", "Apache-2.0"),
        ("optuna", "5.0.0", "MIT"),
        ("poetry", "2.5.1", "MIT"),
        ("prefect", "3.9.1", "Apache-2.0"),
        ("pydantic", "2.14.4", "MIT"),
        ("pymatgen", "2026.10.24", "MIT"),
        ("pymongo", "4.20.1", "Apache-2.0"),
        ("qiskit", "2.6.2", "Apache-2.0"),
        ("scrapy", "2.19.0", "BSD-3-Clause"),
        ("semantic-kernel", "1.45.0", "MIT"),
        ("sphinx", "9.0.4", "BSD-2-Clause"),
        ("sqlalchemy", "2.1.9", "MIT"),
        ("strawberry-graphql", "0.341.2", "MIT"),
        ("streamlit", "1.67.0", "Apache-2.0"),
        ("tensordict", "0.15.3", "MIT"),
        ("textual", "8.2.8", "MIT"),
        ("torch-geometric", "2.8.1", "MIT"),
        ("torchmetrics", "1.9.0", "Apache-2.0"),
        ("torchvision", "0.29.1", "BSD-3-Clause"),
        ("twisted", "26.10.0", "MIT"),
        ("wandb", "0.31.0", "MIT"),
        ("web3", "8.0.0", "MIT"),
        ("zenml", "0.98.0", "Apache-2.0"),
    )
]


def check_licence(package: Package, metadata: str) -> None:
    """Compare a wheel's METADATA with the licence that the list states.

    Raises:
        ValueError: if the stated licence is not permissive, or the metadata names another, or none.
    """
    name = f"{package.name}=={package.version}"
    if package.licence not in PERMISSIVE:
        raise ValueError(f"{name}: licence {package.licence} is not one of {', '.join(sorted(PERMISSIVE))}")
    fields = email.message_from_string(metadata)
    expression = fields.get("License-Expression")
    if expression:
        named = set(re.findall(r"[\w.+-]+", expression)) - CONNECTIVES
        is_right = package.licence in named and named <= PERMISSIVE
    else:
        named = {entry for entry in fields.get_all("Classifier", []) if entry.startswith("License ::")}
        is_right = bool(named) and all(package.licence in CLASSIFIERS.get(entry, set()) for entry in named)
        if not named:
            # the field is free text, sometimes the whole licence: its first line has the name
            first = (fields.get("License") or "").strip().partition("\n")[0]
            named = {first} if first else set()
            words = package.licence.split("-")
            is_right = first.startswith(words[0]) and "GPL" not in first
    if not is_right:
        said = ", ".join(sorted(named)) or "no licence"
        raise ValueError(f"{name}: the list states {package.licence}, its METADATA {said}")


def check_splits(packages: Iterable[Package]) -> None:
    """Refuse a package that is listed twice, under any spelling of its name: its code would stand in two splits.

    Raises:
        ValueError: names the package.
    """
    seen: dict[str, Package] = {}
    for package in packages:
        other = seen.setdefault(re.sub(r"[-_.]+", "-", package.name).lower(), package)
        if other is not package:
            raise ValueError(f"{package.name} is listed twice, in splits {other.split} and {package.split}")


def fetch(package: Package, folder: Path) -> Path:
    """The package's wheel, downloaded into `folder` by pip unless it is there.

    Raises:
        subprocess.CalledProcessError: if pip finds no wheel of that version.
    """
    target = folder / f"{package.name}-{package.version}"
    if not list(target.glob("*.whl")):
        requirement = f"{package.name}=={package.version}"
        options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(target)]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement], check=True)
    return next(target.glob("*.whl"))


def files_in_wheel(wheel: Path) -> tuple[str, list[tuple[str, bytes]]]:
    """A wheel's METADATA, and its Python files in order of path."""
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(archive.namelist())
        (metadata,) = (name for name in names if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        files = [(name, archive.read(name)) for name in names if name.endswith(".py")]
        return archive.read(metadata).decode(), files


def standard_library() -> Iterator[tuple[str, bytes]]:
    """The Python files of the running Python's standard library, in order of path; excluded folders are not read."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root).as_posix()
        if not is_excluded(relative):
            yield relative, path.read_bytes()


def is_excluded(path: str) -> bool:
    """Whether a module is left out for its place or name: tests, vendored code, generated tables."""
    *folders, name = PurePosixPath(path).parts
    return bool(EXCLUDED_FOLDERS & set(folders)) or name.startswith("test_") or name.endswith(("_test.py", "_pb2.py"))


def usable_text(data: bytes) -> str | None:
    """A module's text; None if it is not UTF-8, does not parse, is minified, or says that a program wrote it."""
    try:
        text = data.decode("utf-8-sig")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except (ValueError, SyntaxError, RecursionError):
        return None
    head = "\n".join(text.split("\n", 20)[:20])
    if GENERATED.search(head) or max(map(len, text.split("\n"))) > LONGEST_LINE:
        return None
    return text


def modules_of(
    package: Package, files: Iterable[tuple[str, bytes]], count: Callable[[str], int], min_tokens: int = MIN_TOKENS
) -> Iterator[Module]:
    """The modules of one package that the corpus takes, whole; `count` gives a text's number of tokens."""
    for path, data in files:
        text = None if is_excluded(path) else usable_text(data)
        # every token has at least one character
        if not text or len(text) < min_tokens or annotations(text) < package.least_annotations:
            continue
        if (n_tokens := count(text)) >= min_tokens:
            yield Module(package.name, package.version, path, package.licence, package.split, text, n_tokens)


def signature(text: str) -> np.ndarray:
    """MinHash of a text's runs of five words or signs, (128,) int64: equal entries estimate Jaccard similarity."""
    words = re.findall(r"\w+|[^\w\s]", text)
    runs = {" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}
    values = np.array([zlib.crc32(run.encode("utf-8", "surrogatepass")) for run in runs], dtype=np.int64) % PRIME
    factors, shifts = np.random.RandomState(0).randint(1, PRIME, size=(2, HASHES), dtype=np.int64)
    # below 2**62: no overflow
    return np.array([((a * values + b) % PRIME).min() for a, b in zip(factors, shifts, strict=True)])


def without_duplicates(modules: Iterable[Module]) -> tuple[list[Module], list[tuple[Module, Module]]]:
    """The modules that are near no kept one, and the pairs (dropped, kept) of the others.

    Held-out modules are taken first, so that of a pair across splits it is the training module that is dropped;
    those of validation are taken last, and change none of the other splits. The result does not depend on the order
    given.
    """
    late = {TRAIN: 1, VALIDATION: 2}
    ordered = sorted(
        modules, key=lambda module: (late.get(module.split, 0), module.split, module.package, module.path)
    )
    kept: list[Module] = []
    dropped: list[tuple[Module, Module]] = []
    signatures: list[np.ndarray] = []
    buckets: dict[tuple[int, bytes], list[int]] = {}
    for module in ordered:
        mine = signature(module.text)
        keys = [(band, part.tobytes()) for band, part in enumerate(np.split(mine, BANDS))]
        candidates = sorted({index for key in keys for index in buckets.get(key, [])})
        twin = next((index for index in candidates if (signatures[index] == mine).mean() >= NEAR), None)
        if twin is not None:
            dropped.append((module, kept[twin]))
            continue
        for key in keys:
            buckets.setdefault(key, []).append(len(kept))
        kept.append(module)
        signatures.append(mine)
    return kept, dropped


def annotations(text: str) -> int:
    """The number of annotated parameters and returns."""
    nodes = list(ast.walk(ast.parse(text)))
    parameters = sum(isinstance(node, ast.arg) and node.annotation is not None for node in nodes)
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return parameters + sum(node.returns is not None for node in functions)


def summary(packages: Iterable[Package], kept: list[Module], dropped: list[tuple[Module, Module]]) -> str:
    """A Markdown table of the packages with their licences and what the corpus has of each."""
    lines = [
        "| package | licence | split | M tokens | modules | ≥ 8k | ≥ 16k | annotations | near-duplicates dropped |"
    ]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for package in packages:
        own = [module for module in kept if module.package == package.name]
        tokens = [module.n_tokens for module in own]
        cells: list[object] = [f"{package.name} {package.version}", package.licence, package.split]
        cells += [
            f"{sum(tokens) / 1e6:.2f}",
            len(own),
            sum(n >= 8192 for n in tokens),
            sum(n >= 16384 for n in tokens),
        ]
        cells += [sum(annotations(module.text) for module in own)]
        cells += [sum(module.package == package.name for module, _ in dropped)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def write(folder: Path, modules: Iterable[Module]) -> None:
    """One file `SPLIT.jsonl.xz` for each split, a module a line."""
    rows: dict[str, list[str]] = {}
    for module in modules:
        rows.setdefault(module.split, []).append(json.dumps(asdict(module)) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    # a build from other packages may have left splits that this one lacks
    for old in folder.glob("*.jsonl.xz"):
        old.unlink()
    for split, lines in rows.items():
        with lzma.open(folder / f"{split}.jsonl.xz", "wt", encoding="utf-8") as file:
            file.writelines(lines)


@lru_cache
def tokenizer() -> CoLT5Tokenizer:
    """The one that tokens are counted with; each process has its own."""
    return CoLT5Tokenizer.from_pretrained(VOCABULARY)


def count_tokens(text: str) -> int:
    """A text's tokens, without eos."""
    return len(tokenizer()(text, add_special_tokens=False, verbose=False)["input_ids"])


def modules_in_wheel(wheels: Path, package: Package) -> list[Module]:
    """The modules of a package that the corpus takes; its wheel is fetched into the folder `wheels`.

    Raises:
        ValueError: if its licence is not what the list states.
    """
    metadata, files = files_in_wheel(fetch(package, wheels))
    check_licence(package, metadata)
    return list(modules_of(package, files, count_tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the rows, the table and the wheels")
    names = [package.name for package in PACKAGES]
    parser.add_argument("--packages", nargs="+", choices=names, default=names, help="all by default")
    parser.add_argument("--processes", type=int, default=2, help="packages that are read at a time")
    arguments = parser.parse_args()

    packages = [package for package in PACKAGES if package.name in arguments.packages]
    check_splits(packages)
    with Pool(arguments.processes) as pool:
        found = pool.map(partial(modules_in_wheel, arguments.out / "wheels"), packages, chunksize=1)
    python = Package("python", platform.python_version(), "PSF-2.0")
    modules = [*chain.from_iterable(found), *modules_of(python, standard_library(), count_tokens)]
    kept, dropped = without_duplicates(modules)
    write(arguments.out, kept)
    table = summary([*packages, python], kept, dropped)
    (arguments.out / "summary.md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
