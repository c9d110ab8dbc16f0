"""The wheel holds the package and nothing else, and works from another folder than the repository."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

# a wheel takes some seconds to build, and what is in it rarely changes
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str, **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the working tree: setuptools leaves its build folder in the tree it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    leave_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, folder / "source", ignore=leave_out)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    run(*pip, "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(folder / "source"))
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_the_package_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    folders = {name.split("/")[0] for name in names}
    metadata = {name for name in folders if name.endswith(".dist-info")}
    assert folders - metadata == {"modeling_colt5"} and len(metadata) == 1
    modules = {name for name in names if name.startswith("modeling_colt5/")}
    assert modules == {f"modeling_colt5/{path.name}" for path in (ROOT / "modeling_colt5").glob("*.py")}


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
        licences = [name for name in archive.namelist() if name.endswith("LICENSE")]
    assert metadata["Name"] == "modeling-colt5"
    declared = re.search(r'^__version__ = "(.+)"$', (ROOT / "modeling_colt5/__init__.py").read_text(), re.MULTILINE)
    assert metadata["Version"] == declared[1]
    assert metadata["License-Expression"] == "Apache-2.0" and licences
    assert set(metadata.get_all("Provides-Extra")) == {"triton", "examples", "figures", "pdf", "dev"}


def test_constraints_pin_every_requirement(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        requirements = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist")
    normal = [re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in requirements]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert set(normal) - pinned - {"modeling-colt5"} == set()


def test_wheel_works_in_an_empty_folder(wheel, tmp_path):
    target, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    run(*pip, "--no-deps", "--no-index", "--target", str(target), str(wheel))
    code = """
import json, modeling_colt5
from modeling_colt5 import CoLT5Config
print(json.dumps([modeling_colt5.__file__, CoLT5Config.from_size("base").d_model]))
"""
    # ahead of the editable install that the test environment has
    environment = {**os.environ, "PYTHONPATH": str(target)}
    file, d_model = json.loads(run(sys.executable, "-c", code, cwd=empty, env=environment).splitlines()[-1])
    assert Path(file) == target / "modeling_colt5" / "__init__.py"
    # table 1 of the paper
    assert d_model == 768
