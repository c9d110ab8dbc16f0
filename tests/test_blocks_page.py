"""docs/blocks.md: its block runs."""

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).resolve().parents[1] / "docs/blocks.md"


def test_the_pages_block_runs(capsys: pytest.CaptureFixture) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    namespace: dict = {}
    exec(compile(block, str(PAGE), "exec"), namespace)
    assert capsys.readouterr().out == "torch.Size([2, 64])\n"
    parts = torch.cat([namespace["first"], namespace["second"]], 1)
    # a cache is the whole, to rounding
    torch.testing.assert_close(parts, namespace["whole"], rtol=1e-4, atol=1e-4)
    assert namespace["read"].shape == (2, 8, 256)
    assert namespace["grids"].shape == (2, 24, 32, 256)
