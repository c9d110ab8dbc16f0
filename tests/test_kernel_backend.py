"""The choice between Triton and PyTorch, and operators of several copies of the code in one process."""

import importlib.util
from itertools import count

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from modeling_colt5 import kernel_backend
from modeling_colt5.kernel_backend import ENVIRONMENT_VARIABLE, Mode, uses_triton
from modeling_colt5.run_operator import Operator

# an operator stays registered as long as the process lives
_numbers = count()


@pytest.fixture
def name() -> str:
    return f"copies_test_{next(_numbers)}"


def times(name: str) -> Operator:
    def reference(x: Tensor, factor: float) -> Tensor:
        return x * factor

    return Operator(name, reference, lambda x, factor: x + 0)


def traced(operator: Operator, *inputs: object) -> torch.Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return operator(torch.empty(3), *inputs)


def test_two_copies_share_an_operator(name: str) -> None:
    first, second = times(name), times(name)
    assert first.overload is second.overload
    assert traced(second, 2.0).shape == (3,)


def test_copies_of_two_versions_have_an_operator_each(name: str) -> None:
    older = times(name)

    def reference(x: Tensor, factor: float, rows: int) -> Tensor:
        return (x * factor).expand(rows, -1).clone()

    newer = Operator(name, reference, lambda x, factor, rows: x.new_empty(rows, *x.shape))
    assert traced(older, 2.0).shape == (3,)
    assert traced(newer, 2.0, 4).shape == (4, 3)
    assert newer(torch.ones(3), 2.0, 4).sum() == 24 and older(torch.ones(3), 2.0).sum() == 6


@pytest.mark.parametrize("forced", ["torch", None])
def test_the_environment_is_read_when_the_code_is_imported(
    forced: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    if forced:
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, forced)
    # another copy of the file, as beside code from the Hub
    spec = importlib.util.spec_from_file_location("kernel_backend_once_more", kernel_backend.__file__)
    imported = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(imported)
    assert forced == imported.FORCED_BACKEND


def test_the_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_backend, "FORCED_BACKEND", "torch")
    assert not uses_triton(torch.empty(1), "triton")
    monkeypatch.setattr(kernel_backend, "FORCED_BACKEND", "tritn")
    with pytest.raises(ValueError, match="'tritn'"):
        uses_triton(torch.empty(1), "torch")


def test_plain_inference_is_neither_recorded_nor_watched_nor_cast() -> None:
    states = torch.ones(1, 2, 3)
    with torch.no_grad():
        assert Mode.of_now(states).is_plain_inference
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
        assert not Mode.of_now(states).is_plain_inference
        handle.remove()
        with torch.autocast("cpu", torch.bfloat16):
            assert not Mode.of_now(states).is_plain_inference
    assert not Mode.of_now(states).is_plain_inference
