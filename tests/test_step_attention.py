"""Attention of one new token in each row: the kernels against plain attention in float64."""

import pytest
import torch
from rounding import assert_same_but_for_rounding

pytest.importorskip("triton")

from step_references import step_attention_reference  # noqa: E402

from modeling_colt5 import op_step_attention_triton  # noqa: E402
from modeling_colt5.op_step_attention_triton import number_of_parts, step_attention_into  # noqa: E402


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short caches are split already."""
    monkeypatch.setattr(op_step_attention_triton, "LEAST_KEYS", 16)


def attended(
    rows: int, heads: int, groups: int, d_kv: int, room: int, keys: int | None, dtype: torch.dtype, hides: bool,
    device: torch.device,
) -> None:  # fmt: skip
    """Compare output and cache with those of float64; with `keys` the last one is new."""
    query = torch.randn(rows, heads * d_kv, device=device).to(dtype)
    key, value = torch.randn(2, rows, groups, room, d_kv, device=device).to(dtype).unbind(0)
    new_key = new_value = table = length = mask = None
    if keys is not None:
        # what lies behind the last key may be anything
        key[:, :, keys - 1 :], value[:, :, keys - 1 :] = float("nan"), float("nan")
        new_key, new_value = torch.randn(2, rows, groups * d_kv, device=device).to(dtype).unbind(0)
        table = torch.randn(heads, 2 * 5 + 1, device=device)
        length = torch.tensor([keys], dtype=torch.int32, device=device)
    if hides:
        mask = torch.rand(rows, keys or room, device=device) < 0.6
        mask[-1, : (keys or room) - 1] = False
        mask[0] = False

    def wide(part: torch.Tensor | None) -> torch.Tensor | None:
        return part.double() if part is not None and part.is_floating_point() else part

    inputs = (query, new_key, new_value, table, mask, length, key, value)
    expected, *others = (torch.empty_like(query, dtype=torch.float64), *map(wide, inputs))
    step_attention_reference(*others, expected)
    output, parts = torch.empty_like(query), number_of_parts(rows * groups, room)
    places = [torch.empty(rows, heads, parts, width, device=device) for width in (d_kv, 2)] if parts > 1 else []
    step_attention_into(*inputs, output, *places)
    assert_same_but_for_rounding(output, expected.to(dtype))
    for part, other in zip((key, value), others[-2:], strict=True):
        torch.testing.assert_close(part, other.to(dtype), rtol=0, atol=0, equal_nan=True)


# rows, heads, key/value heads, d_kv, room, keys
CASES = {
    "first behind one": (1, 2, 2, 16, 256, 2),
    "several rows": (3, 4, 4, 8, 256, 130),
    "last place": (2, 2, 2, 16, 64, 64),
    "shared keys": (2, 6, 2, 20, 128, 100),
    "memory": (2, 4, 1, 16, 100, None),
    "memory of one token": (2, 4, 1, 16, 1, None),
}


@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_one_part(case: str, hides: bool, device: torch.device) -> None:
    *sizes, room, keys = CASES[case]
    assert number_of_parts(sizes[0] * sizes[2], room) == 1
    attended(*sizes, room, keys, torch.float32, hides, device)


@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("small_parts")
def test_parts_are_added_up(case: str, hides: bool, device: torch.device) -> None:
    """Among them parts that have no key yet, and parts of which all are hidden."""
    *sizes, room, keys = CASES[case]
    attended(*sizes, room, keys, torch.float32, hides, device)


@pytest.mark.usefixtures("small_parts")
def test_half_precision(device: torch.device) -> None:
    for keys in (70, None):
        attended(2, 4, 4 if keys else 1, 16, 128, keys, torch.bfloat16, True, device)


def test_large_scores_are_no_infinities(device: torch.device) -> None:
    query = torch.full((1, 16), 1e3, device=device)
    key = torch.linspace(-1e3, 1e3, 300, device=device)[:, None].expand(1, 1, 300, 16).contiguous()
    value = torch.arange(300.0, device=device)[:, None].expand(1, 1, 300, 16).contiguous()
    output, parts = torch.empty_like(query), number_of_parts(1, 300)
    assert parts > 1
    places = [torch.empty(1, 1, parts, width, device=device) for width in (16, 2)]
    step_attention_into(query, None, None, None, None, None, key, value, output, *places)
    torch.testing.assert_close(output, torch.full_like(output, 299.0))


def test_parts_suffice_for_many_processors_and_are_not_too_small() -> None:
    assert number_of_parts(1, 256) == 1
    for rows in (1, 8, 96, 10_000):
        for room in (257, 1024, 16_384, 131_072):
            parts = number_of_parts(rows, room)
            assert 1 <= parts <= op_step_attention_triton.PROGRAMS
            assert parts == 1 or room // parts >= op_step_attention_triton.LEAST_KEYS // 2
            assert parts * rows >= min(rows * -(-room // op_step_attention_triton.LEAST_KEYS), 256) / 2
