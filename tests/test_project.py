"""What a project is expected to have: one version, dependencies that are used, and files that tools can read."""

import ast
import functools
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import conftest
import pytest
import yaml

import modeling_colt5

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Transformers reads vocabulary files with these
READ_BY_TRANSFORMERS = {"protobuf", "sentencepiece"}

# tests and benchmarks leave out what needs these where they are not installed; CI has a job that installs all but
# fla, which is for a GPU
SKIPPED_WITHOUT = {"fla", "kernels", "lm-eval", "mteb"}


def names(requirements: list[str]) -> set[str]:
    """The distributions of requirements, without versions."""
    return {re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-") for requirement in requirements}


# which distribution has which module: the files of all that are installed are read for it
distributions_once = functools.cache(packages_distributions)


@functools.cache
def imported(folder: str) -> frozenset[str]:
    """The distributions that the Python files of a folder import, wherever in them."""
    own = {path.stem for path in (ROOT / folder).glob("*.py")} | {path.name for path in (ROOT / folder).iterdir()}
    modules = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules.add(node.module.split(".")[0])
    modules -= {*sys.stdlib_module_names, "modeling_colt5", *own}
    where = distributions_once()
    return frozenset(where.get(module, [module])[0].lower().replace("_", "-") for module in modules)


def test_the_package_depends_on_what_it_imports():
    optional = names(PROJECT["optional-dependencies"]["triton"])
    assert imported("modeling_colt5") - optional == names(PROJECT["dependencies"])


def test_the_examples_extra_is_what_the_scripts_import():
    extra = names(PROJECT["optional-dependencies"]["examples"])
    known = extra | names(PROJECT["dependencies"])
    optional = names(PROJECT["optional-dependencies"]["pdf"])
    # a file of the types job is for machines with a GPU, where torch brings triton
    assert imported("examples") - {"triton"} - optional <= known and optional <= imported("examples")
    assert extra - READ_BY_TRANSFORMERS <= imported("examples")


def test_the_dev_extra_has_what_tests_and_benchmarks_import():
    known = names([*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])])
    folders = ("tests", "benchmarks", "examples", "docs", "spaces/python-types")
    own = {path.stem for folder in folders for path in (ROOT / folder).glob("*.py")} | {"python_types", "tests"}
    used = (imported("tests") | imported("benchmarks")) - names(sorted(own))
    assert used - SKIPPED_WITHOUT <= known


def test_one_version():
    version = modeling_colt5.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    (newest, *_) = re.findall(r"(?m)^## \[([\d.]+)\] - (?:unreleased|\d{4}-\d\d-\d\d)$", changelog)
    assert newest == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == version


@pytest.mark.parametrize(
    "file",
    [
        ".pre-commit-config.yaml",
        *(str(path.relative_to(ROOT)) for path in sorted((ROOT / ".github").rglob("*.yml"))),
    ],
)
def test_configurations_can_be_read(file):
    assert yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))


def test_a_release_needs_the_tag_of_its_version():
    workflow = yaml.load((ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8"), yaml.BaseLoader)
    assert workflow["on"]["push"]["tags"] == ["v*"]
    script = "\n".join(step.get("run", "") for step in workflow["jobs"]["build"]["steps"])
    assert "twine check --strict" in script and 'test "v$version" = "$GITHUB_REF_NAME"' in script
    assert workflow["jobs"]["publish"]["needs"] == "build"


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"])
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)\s#]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        assert re.match(r"[a-z]+:", target) or (ROOT / target).exists(), target


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


@pytest.mark.parametrize(
    ("until", "is_slow", "is_left_out"), [(0, True, True), (0, False, False), (2**40, True, False)]
)
def test_slow_tests_that_no_time_is_left_for_are_left_out(until, is_slow, is_left_out, request, monkeypatch):
    monkeypatch.setenv("COLT5_SLOW_TESTS_BEGIN_UNTIL", str(until))
    if is_slow:
        request.node.add_marker(pytest.mark.slow)
    if is_left_out:
        with pytest.raises(pytest.skip.Exception, match="no time left"):
            conftest.pytest_runtest_setup(request.node)
    else:
        conftest.pytest_runtest_setup(request.node)
