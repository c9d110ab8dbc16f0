"""The documentation site: every page has its place, links lead somewhere, examples run, and the table of memory is as
the formulas have it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from run_costs import KEPT_BESIDE, decoder_kept_values
from test_readme import INERT, SCRIPTS, blocks, check_command, help_of, shown_commands

from modeling_colt5 import CoLT5Config
from modeling_colt5.encoder_costs import kept_values

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
# test_recipes.py, test_readme.py and the pages' own tests run the others
RUN_HERE = [
    "index.md",
    "concepts.md",
    "causal_routing.md",
    "cross_routing.md",
    "deploy.md",
    "generate.md",
    "images.md",
]
RUN_HERE += ["see_routing.md"]
# test_readme.py has the one on training
COMMANDS_HERE = [page for page in PAGES if page != "training.md" and shown_commands(f"docs/{page}")]


def navigation() -> list[str]:
    """The pages of the site's navigation, in order."""
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), yaml.BaseLoader)

    def names(part: object) -> list[str]:
        if isinstance(part, str):
            return [part]
        parts = part.values() if isinstance(part, dict) else part
        return [name for inner in parts for name in names(inner)]

    return names(config["nav"])


def test_every_page_has_one_place():
    assert sorted(navigation()) == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    prose = re.sub(r"(?ms)^```.*?^```$", "", text)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (DOCS / name) if name else DOCS / page
        assert file.exists(), f"{page} links to {target}"
        if anchor:
            headings = re.findall(r"(?m)^#+ (.*)$", file.read_text(encoding="utf-8"))
            slugs = {re.sub(r"[^\w\s-]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page} links to {target}"


# one process for all pages, since it takes some seconds to import everything; each page has names of its own
@pytest.mark.slow
def test_the_pages_examples_run(tmp_path):
    """As a reader would type them, in a folder that has the trained model and the vocabulary alone; a comment after a
    line that prints says what it prints."""
    for folder in ("checkpoints", "tokenization"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    program, shown = "", []
    for page in RUN_HERE:
        found = [block for block in blocks(f"docs/{page}") if block.language == "python"]
        assert found, page
        program += "namespace = {'__name__': '__main__'}\n"
        for block in found:
            # blank lines before it, so that an error names the page's line
            program += f"exec(compile({chr(10) * (block.line - 1) + block.text!r}, {page!r}, 'exec'), namespace)\n"
            shown += re.findall(r"^ *print\(.*\)\n# (.*)$", block.text, re.MULTILINE)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert shown and set(shown) <= set(done.stdout.splitlines())


@pytest.mark.parametrize("page", [*RUN_HERE, *COMMANDS_HERE, "sizes.md", "faq.md"])
def test_every_block_has_a_language_that_is_checked(page):
    assert {block.language for block in blocks(f"docs/{page}")} <= {"python", "bash"} | INERT


@pytest.mark.parametrize("page", COMMANDS_HERE)
def test_the_pages_commands_exist(page, capsys, monkeypatch):
    for command in shown_commands(f"docs/{page}"):
        check_command(command, lambda script: help_of(script, capsys, monkeypatch))


def test_the_gallery_has_every_notebook_and_script():
    text = (DOCS / "gallery.md").read_text(encoding="utf-8")
    for path in [*ROOT.glob("examples/*.ipynb"), *SCRIPTS]:
        assert f"examples/{path.name}" in text, path.name
    for picture in DOCS.glob("gallery_*.png"):
        assert picture.name in text and (ROOT / "examples" / picture.name[8:]).with_suffix(".ipynb").is_file()


def test_the_table_of_memory_is_what_the_formulas_give():
    rows = re.findall(
        r"(?m)^\| (base|large|xl) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \|$",
        (DOCS / "sizes.md").read_text(encoding="utf-8"),
    )
    assert len(rows) == 9
    for size, tokens, *shown in rows:
        config, n = CoLT5Config.from_size(size), int(tokens.replace(",", ""))
        for checkpointed, gib in zip((False, True), shown, strict=True):
            encoder = max(
                kept_values(config, n, checkpointed=checkpointed),
                kept_values(config, n // 4, dense=True, checkpointed=checkpointed),
            )
            values = encoder + decoder_kept_values(config, n, 512, checkpointed=checkpointed)
            assert f"{2 * KEPT_BESIDE * values / 2**30:.1f}" == gib, (size, tokens, checkpointed)


def test_weights_of_the_sizes():
    text = (DOCS / "sizes.md").read_text(encoding="utf-8")
    counts = [int(count) for count in re.findall(r"(\d+) M", text)[:3]]
    for bytes_each, name in ((2, "weights in bf16"), (18, "weights, gradients")):
        (row,) = re.findall(rf"(?m)^\| {name}.*$", text)
        assert re.findall(r"([\d.]+) GiB", row) == [f"{bytes_each * count * 1e6 / 2**30:.1f}" for count in counts]


def test_the_example_of_the_concepts_is_the_base_size():
    """Of 16,384 tokens: the numbers that the page names."""
    config = CoLT5Config.from_size("base")
    routed = [
        16384 * fraction
        for fraction in (
            config.routed_query_fraction, config.routed_key_value_fraction, config.routed_feed_forward_fraction
        )
    ]  # fmt: skip
    assert routed == [1024, 2048, 1024]
    assert (config.num_layers, config.local_radius, config.light_d_ff, config.heavy_d_ff) == (12, 127, 1024, 8192)
    assert config.num_heavy_heads == 2 * config.num_light_heads
