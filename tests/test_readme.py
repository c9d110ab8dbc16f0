"""The pages keep their word: their Python runs, and the commands they show exist with the arguments they show."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import tomllib

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "docs/training.md"]
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
    """The commands of the page's shell blocks, and those that its sentences quote."""
    text = (ROOT / page).read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    quoted = re.findall(r"`((?:make|python) [^`\n]+)`", prose)
    return [command for block in blocks(page) if block.language == "bash" for command in commands(block.text)] + quoted


def help_of(script: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What a script answers to `--help`."""
    capsys.readouterr()
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.syspath_prepend(str(script.parent))
        patch.setattr(sys, "argv", [str(script), "--help"])
        runpy.run_path(str(script), run_name="__main__")
    assert exit_.value.code == 0, script
    return capsys.readouterr().out


def check_script(words: list[str], helps: dict[Path, str], help_of_script) -> None:
    """The script exists, and its help knows every option that the command gives it."""
    script = ROOT / words[0]
    assert script.is_file(), f"{words[0]} does not exist"
    options = [word.split("=")[0] for word in words[1:] if word.startswith("--")]
    if options:
        if script not in helps:
            helps[script] = help_of_script(script)
        for option in options:
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", helps[script]), f"{words[0]} has no option {option}"


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
    return [options.training_script, *options.training_script_args]


def check_command(command: str, helps: dict[Path, str], help_of_script) -> None:
    """A command of a page could be given as it stands."""
    words = shlex.split(command)
    while "=" in words[0]:
        words.pop(0)
    if words[0] == "make":
        dry = [*words, "--dry-run", f"PYTHON={sys.executable}"]
        done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif words[0] == "python":
        check_script(words[1:], helps, help_of_script)
    elif words[0] in ("accelerate", "torchrun"):
        check_script(check_launcher(words), helps, help_of_script)
    elif words[:2] == ["pip", "install"]:
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
    program = "namespace = {'__name__': '__main__'}\n"
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
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for block in blocks(page):
        for shown in re.findall(r"^print\(.*\)\n# (.*)$", block.text, re.MULTILINE):
            assert shown in done.stdout.splitlines()


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_commands_exist(page, capsys, monkeypatch):
    helps: dict[Path, str] = {}
    found = shown_commands(page)
    assert found, f"{page} shows no command"
    for command in found:
        check_command(command, helps, lambda script: help_of(script, capsys, monkeypatch))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_says_what_it_does(script, capsys, monkeypatch):
    shown = help_of(script, capsys, monkeypatch)
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
    ],
)
def test_a_command_that_does_not_exist_is_found(command, message, capsys, monkeypatch):
    """The check can fail."""
    with pytest.raises(AssertionError, match=message):
        check_command(command, {}, lambda script: help_of(script, capsys, monkeypatch))
