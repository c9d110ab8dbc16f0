"""What the conversion recommends follows from the measured curve."""

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def newest_rows(name: str) -> list[dict[str, Any]]:
    """The rows of a benchmark's last run."""
    lines = (ROOT / "benchmarks" / "results" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(lines[-1])["rows"]


@pytest.mark.parametrize("file", ["examples/convert_t5.py", "docs/convert.md"])
def test_the_recommended_steps_are_those_of_the_curve(file):
    """The first step at which the converted model's loss is below its source's."""
    source = newest_rows("warm_start")[0]
    assert source["model"] == "T5, trained for 2400 steps"
    first = next(row["steps"] for row in newest_rows("warm_start_steps") if row["converted"] < source["held-out loss"])
    text = (ROOT / file).read_text(encoding="utf-8")
    assert "2,400 steps" in text and f"{first} " in text
