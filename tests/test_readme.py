"""The pages keep their word: their Python runs, and the commands they show exist with the arguments they show."""

import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from modeling_colt5 import routing_view

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "docs/training.md"]
# pages outside of the documentation's own, whose commands are looked up
MORE_PAGES = [
    "CONTRIBUTING.md",
    *(f"{folder}/README.md" for folder in ("benchmarks", "checkpoints/python-types", "configuration")),
    *(f"{folder}/README.md" for folder in ("spaces/python-types", "tests", "tokenization")),
]
# what a page says that its reader has
BEFORE = {
    "docs/training.md": """
import torch
from transformers import TrainingArguments
from modeling_colt5 import CoLT5Config, CoLT5ForConditionalGeneration
sizes = dict(vocab_size=64, d_model=32, d_kv=8, d_ff=64, light_d_ff=32, heavy_d_ff=128, num_heads=4, num_light_heads=1)
model = CoLT5ForConditionalGeneration(CoLT5Config(**sizes, num_heavy_heads=3, num_layers=1, num_decoder_layers=1))
arguments = TrainingArguments("out", max_steps=4, use_cpu=True, report_to="none", save_strategy="no")
dataset = [dict(input_ids=torch.arange(2, 34), labels=torch.arange(2, 6))] * 8
"""
}
SCRIPTS = sorted(path for path in ROOT.glob("examples/*.py") if "__main__" in path.read_text(encoding="utf-8"))
# in a block of these there is nothing to run
INERT = {"bibtex", "text"}


@dataclass
class Block:
    """A fenced block: its language, its text, and the line of the page on which the text begins."""

    language: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    """The page's fenced blocks, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(match[1], match[2], text.count("\n", 0, match.start(2)) + 1) for match in found]


def commands(text: str) -> list[str]:
    """The commands of a shell block, continued lines joined, comments left out."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [line for line in (re.sub(r"(^|\s+)#.*", "", line).strip() for line in lines) if line]


def shown_commands(page: str) -> list[str]:
    """The commands of the page's shell blocks, fenced or indented, those that stand among other text, and those that
    its sentences quote."""
    text = (ROOT / page).read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    ours = re.compile(r"(?:make|python|torchrun|accelerate launch|pip install|colt5-show-routing) ")
    found = re.findall(r"`((?:make|python|pip install) [^`\n]+)`", prose)
    indented = re.findall(r"(?m)^ {4}((?:.*\\\n)*.*)$", prose)
    found += [command for lines in indented for command in commands(lines) if ours.match(command)]
    for block in blocks(page):
        inside = commands(block.text) if block.language in {"bash", "text"} else []
        found += [command for command in inside if block.language == "bash" or ours.match(command)]
    return found


# a script's answer to `--help`, asked once for all pages
HELPS: dict[str, str] = {}


def help_of(script: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What a script answers to `--help`.

    Args:
        script: its path from the repository's root, or the name of a module in `examples/`.
    """
    if script not in HELPS:
        capsys.readouterr()
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
            patch.setattr(sys, "argv", [script, "--help"])
            if script.endswith(".py"):
                patch.syspath_prepend(str((ROOT / script).parent))
                runpy.run_path(str(ROOT / script), run_name="__main__")
            else:
                runpy.run_module(script, run_name="__main__")
        assert exit_.value.code == 0, script
        HELPS[script] = capsys.readouterr().out
    return HELPS[script]


def check_script(words: list[str], help_of_script: Callable[[str], str]) -> None:
    """The script exists, and its help knows every option that the command gives it."""
    script = words[0]
    if script == "-m":
        script = words[1]
        # read before it is run, as a module that another one has imported
        sys.modules.pop(script, None)
        file = Path("examples", *script.split(".")).with_suffix(".py")
    else:
        file = Path(script)
    assert (ROOT / file).is_file(), f"{script} does not exist"
    options = [word.split("=")[0] for word in words[1:] if word.startswith("--")]
    for option in options:
        known = rf"(?<![\w-]){option}(?![\w-])"
        assert option == "--help" or re.search(known, help_of_script(script)), f"{script} has no option {option}"


def check_launcher(words: list[str]) -> list[str]:
    """The launcher's own options are known and its files exist; gives what it launches."""
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser as make_parser
    else:
        from accelerate.commands.launch import launch_command_parser as make_parser

        assert words.pop(1) == "launch"
    options = make_parser().parse_args(words[1:])
    if getattr(options, "config_file", None):
        assert (ROOT / options.config_file).is_file(), f"{options.config_file} does not exist"
    return [*(["-m"] if options.module else []), options.training_script, *options.training_script_args]


def check_command(command: str, help_of_script: Callable[[str], str]) -> None:
    """A command of a page could be given as it stands."""
    words = shlex.split(command)
    while "=" in words[0]:
        words.pop(0)
    if words[0] == "make":
        dry = [*words, "--dry-run", f"PYTHON={sys.executable}"]
        done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif words[0] == "python":
        check_script(words[1:], help_of_script)
    elif words[0] == "cd":
        assert (ROOT / words[1]).is_dir(), words[1]
    elif words[0] == "colt5-show-routing":
        with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
            routing_view.main(["--help"])
        unknown = [word for word in words if word.startswith("--") and f"{word} " not in shown.getvalue()]
        assert not unknown, f"{words[0]} has no option {unknown}"
    elif words[0] in ("accelerate", "torchrun"):
        check_script(check_launcher(words), help_of_script)
    elif words[:2] == ["pip", "install"]:
        lists = [word for flag, word in pairwise(words) if flag == "-r"]
        assert all((ROOT / name).is_file() for name in lists), f"{lists} do not exist"
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        asked = {name for word in words for names in re.findall(r"^\.\[(.*)\]$", word) for name in names.split(",")}
        assert asked <= extras.keys(), f"extras {asked - extras.keys()} do not exist"
    else:
        pytest.fail(f"no check for the command {command!r}: write one")


def test_the_pictures_of_the_readme_are_here():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pictures = re.findall(r"(?m)^!\[[^\]]+\]\(([^)]+)\)", text)
    assert pictures and all((ROOT / picture).is_file() for picture in pictures)


def test_the_badges_are_true():
    """CI's is GitHub's own, of a workflow that is here; the others say what pyproject.toml says."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    badges = dict(re.findall(r"\[!\[(\w+)\]\((\S+?)\)\]", text))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert badges.keys() == {"CI", "Python", "License"}
    (workflow,) = re.fullmatch(r"\.\./\.\./actions/workflows/(\w+\.yml)/badge\.svg", badges["CI"]).groups()
    assert (ROOT / ".github" / "workflows" / workflow).is_file()
    said = {name: unquote(urlsplit(badges[name]).path.split("/badge/")[1]) for name in ("Python", "License")}
    oldest = project["requires-python"].removeprefix(">=")
    # shields.io writes a dash within a part as two
    assert said["Python"] == f"python-{oldest}+-blue"
    assert said["License"] == f"license-{project['license'].replace('-', '--')}-blue"


@pytest.mark.parametrize("page", PAGES)
def test_every_block_has_a_language_that_is_checked(page):
    found = blocks(page)
    assert len(found) == (ROOT / page).read_text(encoding="utf-8").count("\n```") // 2, "a block that is not closed"
    assert {block.language for block in found} <= {"python", "bash"} | INERT


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(b.language == "python" for b in blocks(page))])
def test_the_pages_python_runs(page, tmp_path):
    """All blocks in order in one namespace, as a reader would type them, in a folder that has the checkpoint alone; a
    comment after a line that prints says what it prints."""
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    program = f"namespace = {{'__name__': '__main__'}}\nexec({BEFORE.get(page, '')!r}, namespace)\n"
    for block in blocks(page):
        if block.language == "python":
            # blank lines before it, so that an error names the page's line
            program += f"exec(compile({chr(10) * (block.line - 1) + block.text!r}, {page!r}, 'exec'), namespace)\n"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for block in blocks(page):
        for shown in re.findall(r"^print\(.*\)\n# (.*)$", block.text, re.MULTILINE):
            assert shown in done.stdout.splitlines()


@pytest.mark.parametrize("page", [*PAGES, *MORE_PAGES])
def test_the_pages_commands_exist(page, capsys, monkeypatch):
    found = shown_commands(page)
    assert found, f"{page} shows no command"
    for command in found:
        check_command(command, lambda script: help_of(script, capsys, monkeypatch))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_says_what_it_does(script, capsys, monkeypatch):
    shown = help_of(str(script.relative_to(ROOT)), capsys, monkeypatch)
    first_line = script.read_text(encoding="utf-8").split('"""')[1].splitlines()[0]
    # argparse may wrap it
    assert " ".join(first_line.split()) in " ".join(shown.split())


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("python examples/nowhere.py", "does not exist"),
        ("python examples/upload.py out a/b --publicly", "no option --publicly"),
        ("make coffee", "coffee"),
        ("pip install .[everything]", "extras"),
        ("accelerate launch --config_file configuration/launch/tpu.yaml examples/pretrain.py", "does not exist"),
        ("torchrun --nproc_per_node 2 examples/nowhere.py", "does not exist"),
        ("python -m python_types.nowhere", "does not exist"),
        ("python -m python_types.train --publicly", "no option --publicly"),
        ("pip install -r nowhere.txt", "do not exist"),
        ("colt5-show-routing model text.txt --publicly", "no option"),
    ],
)
def test_a_command_that_does_not_exist_is_found(command, message, capsys, monkeypatch):
    """The check can fail."""
    with pytest.raises(AssertionError, match=message):
        check_command(command, lambda script: help_of(script, capsys, monkeypatch))
