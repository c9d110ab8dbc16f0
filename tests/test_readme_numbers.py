"""The README's numbers are those of the measurements that the repository keeps, and of the demo."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from example_runs import REPOSITORY
from test_readme import blocks

from modeling_colt5 import CoLT5Config, CoLT5ForConditionalGeneration

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
RESULTS = REPOSITORY / "benchmarks" / "results"
NUMBERS_OF_WORDS = {"three": 3, "four": 4, "five": 5, "six": 6}


def table(first_heading: str, text: str = README) -> list[list[str]]:
    """The cells of the first table whose heading begins so, row by row, the heading's first."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first_heading}"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [rows[0], *rows[2:]]


def newest_rows(name: str) -> list[dict]:
    """The rows of a benchmark's newest run that came to its end."""
    runs = [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [run for run in runs if run["complete"]][-1]["rows"]


def assert_rounded(shown: str, value: float) -> None:
    """The number is the value to the places that it shows."""
    places = len(shown.partition(".")[2])
    # 1e-9: a value that lies in the middle may go either way
    assert abs(float(shown) - value) <= 0.5 * 10**-places + 1e-9, (shown, value)


def span(values: Iterable[float]) -> str:
    """Values to two places, as "least to most"."""
    values = list(values)
    least, most = f"{min(values):.2f}", f"{max(values):.2f}"
    return least if least == most else f"{least} to {most}"


def test_sizes():
    section = README.split("## Sizes")[1].split("##")[0]
    counts = re.findall(r"(\w+) (\d+) M\b", section)
    assert [name.lower() for name, _ in counts] == ["base", "large", "xl"]
    for name, count in counts:
        # no weights are made
        with torch.device("meta"):
            model = CoLT5ForConditionalGeneration(CoLT5Config.from_size(name.lower()))
        assert_rounded(count, sum(parameter.numel() for parameter in model.parameters()) / 1e6)


def test_the_table_of_speed():
    heading, *rows = table("work | CoLT5")
    names = {"T5": "T5, dense"}
    plain = [row for row in newest_rows("called") if (row["way"], row["setting"]) == ("called", "")]
    encoders = {(row["n"], row["model"]): row for row in plain}
    pass_ = "forward"
    for label, *cells in rows:
        if "generate" in label:
            tokens = {
                (row["model"], row["cache"]): row["ms/token"]
                for row in newest_rows("generation")
                if (row["batch"], row["input"], row["beams"]) == (1, 16384, 1)
            }
            for model, shown in zip(heading[1:], cells, strict=True):
                if shown:
                    assert_rounded(shown, tokens[model, "dynamic"])
            continue
        pass_ = "fwd+bwd" if "backward" in label else pass_
        length = int(re.search(r"([\d,]+) tokens", label)[1].replace(",", ""))
        for model, shown in zip(heading[1:], cells, strict=True):
            value = encoders[length, names.get(model, model)].get(f"{pass_} ms")
            if shown == "out of memory":
                assert value is None
            else:
                assert_rounded(shown, value)


def test_the_table_of_learning():
    lines = (RESULTS / "router_gym.jsonl").read_text(encoding="utf-8").splitlines()
    accuracies: dict[tuple[str, str], list[float]] = {}
    for run in map(json.loads, lines):
        if (run["length"], round(1 / run["query_fraction"]), run["steps"]) == (2048, 16, 3000):
            accuracies.setdefault((run["task"], run["arm"]), []).append(run["accuracy"])
    _, *rows = table("accuracy, 2,048 tokens, one query among 16")
    for (label, learned, without, others), task in zip(rows, ("facts", "marked", "cross"), strict=True):
        assert len(accuracies[task, "learned"]) == NUMBERS_OF_WORDS[re.search(r"(\w+) seeds", label)[1]]
        assert learned == span(accuracies[task, "learned"])
        assert without == (span(accuracies[task, "as_shipped"]) if without else "")
        arms = ("even", "random", "none", "none_wide")
        assert others == span(value for arm in arms for value in accuracies.get((task, arm), []))


def test_the_table_of_types():
    """It has rows of the model card, which `python -m python_types.evaluate` writes."""
    card = (REPOSITORY / "checkpoints" / "python-types" / "README.md").read_text(encoding="utf-8")
    _, *rows = table("annotations hidden")
    for (label, *shown), share in zip(rows, ("30%", "100%"), strict=True):
        heading, *measured = table(" |", card.split(f"{share} of the annotations hidden:")[1])
        (whole,) = (dict(zip(heading, row, strict=True)) for row in measured if row[0] == "all")
        assert shown == [whole["model"], whole["tool"], whole["copied by name"]]
        assert f"{whole['modules']} modules" in label


def test_what_the_pages_of_evidence_say():
    (learned, even) = re.findall(r"modules fall from (\d+) to (\d+) %", README)[0]
    types = (REPOSITORY / "docs/python_types.md").read_text(encoding="utf-8")
    rows = {row[0]: row[1] for row in table("choice", types)}
    assert_rounded(learned, float(rows["learned, one query among 16"].split()[0]))
    assert_rounded(even, float(rows["evenly spaced tokens"].split()[0]))
    (nats,) = re.findall(r"only ([\d.]+) nats", README)
    learning = (REPOSITORY / "docs/learning.md").read_text(encoding="utf-8")
    whole = "learned, 1/16, dense start on whole inputs − even, 1/16, after a dense start on whole inputs"
    assert_rounded(nats, -float(re.search(rf"\| {re.escape(whole)} \| (-[\d.]+),", learning)[1]))


def demo(folder: Path, *arguments: str) -> str:
    """What the demo prints."""
    done = subprocess.run(
        [sys.executable, "examples/demo.py", "--output-dir", str(folder), *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_end_of_make_test(request):
    """It is pytest's closing line, and of about as many tests as there are."""
    _, shown = (block.text for block in blocks("README.md") if block.language == "text")
    outcome = r"=+ (\d+) passed, (\d+) skipped(?:, \d+ xfailed)?(?:, \d+ warnings?)?"
    line = outcome + r" in (\d+)\.\d\ds \((\d+):(\d\d):(\d\d)\) =+\n"
    passed, skipped, seconds, *clock = map(int, re.fullmatch(line, shown).groups())
    # pytest cuts its clock down to whole seconds
    assert clock[0] * 3600 + clock[1] * 60 + clock[2] == seconds
    items, option = request.session.items, request.config.option
    files = len({item.path for item in items}), len(list((REPOSITORY / "tests").glob("test_*.py")))
    if option.markexpr != "not slow" or option.keyword or files[0] < 0.9 * files[1]:
        pytest.skip("a part of the tests is run")
    # files that skip as a whole count as one, and tests are added between two readings of the line
    assert passed + skipped == pytest.approx(len(items), rel=0.1)


# reads the module once, and 33 short pieces of others, to train on or to score: half a minute
@pytest.mark.slow
def test_the_demos_output(tmp_path):
    """As the README shows it, but for the time; the training that follows gives losses, and a model."""
    printed = demo(tmp_path, "--steps", "1")
    shown, _ = (block.text for block in blocks("README.md") if block.language == "text")
    pinned = re.search(r"(?m)^huggingface_hub==(.+)$", (REPOSITORY / "constraints.txt").read_text(encoding="utf-8"))[1]
    if version("huggingface_hub") == pinned:
        for line in shown.splitlines():
            if "the model:" not in line:
                assert line in printed
        model_line = r"the model: (\d+) of (\d+) are"
        (shown_right, shown_all), (right, total) = (
            map(int, re.search(model_line, text).groups()) for text in (shown, printed)
        )
        # a near tie between two types may fall the other way on another processor
        assert total == shown_all and abs(right - shown_right) <= 1
        # the sentinels' share among the queries, of each layer
        asked = [int(share) for share in re.findall(r"(?m)^ +\d+ +\d+% / +(\d+)% ", printed)]
        every, layers = re.search(r"in (\w+) of its (\w+) layers every place", README).groups()
        assert (NUMBERS_OF_WORDS[every], NUMBERS_OF_WORDS[layers]) == (asked.count(100), len(asked))
    assert re.search(r"loss on what was kept back: [\d.]+ before, [\d.]+ after 1 steps", printed)
    assert (tmp_path / "checkpoint" / "config.json").is_file()
