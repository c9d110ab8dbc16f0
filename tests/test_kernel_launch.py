"""Launching kernels past Triton's inspection: what goes to Triton, and what the compiled kernel is given.

Without a GPU, on a kernel and tensors that only look like those; what kernels compute is tested where they are.
"""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from modeling_colt5 import run_launch_triton  # noqa: E402
from modeling_colt5.run_launch_triton import launch, note_launches, only_compiled  # noqa: E402

STREAM = 7


class Compiled:
    """What Triton makes of a kernel, with the two ways to call it."""

    function, packed_metadata = 11, (13,)

    def __init__(self, calls: list[tuple[str, Any]]):
        self.calls = calls

    def run(self, *arguments: Any) -> None:
        self.calls.append(("direct", arguments))

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, stream: self.calls.append(("described", (grid, stream, arguments)))


class Kernel:
    """A kernel of a tensor, another or None, a number and a constant."""

    arg_names = ["x", "y", "n", "BLOCK"]

    def __init__(self, do_not_specialize: tuple[str, ...] = ()) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.params = [
            SimpleNamespace(is_constexpr=name.isupper(), do_not_specialize=name in do_not_specialize)
            for name in self.arg_names
        ]

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_and_run(*arguments: Any, **options: Any) -> Compiled:
            self.calls.append(("triton", options))
            return Compiled(self.calls)

        return compile_and_run

    def warmup(self, *arguments: Any, grid: tuple[int, ...], **options: Any) -> None:
        self.calls.append(("warmup", options))

    def ways(self) -> list[str]:
        return [way for way, _ in self.calls]


def tensor(address: int = 4096, dtype: torch.dtype = torch.float32, device: int = 0) -> Any:
    return SimpleNamespace(dtype=dtype, get_device=lambda: device, data_ptr=lambda: address)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_launch_triton, "INTERPRETED", False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, raising=False)


def test_what_is_compiled_is_called_with_addresses() -> None:
    kernel = Kernel()
    launch(kernel, (3,), tensor(), None, 48, BLOCK=128)
    launch(kernel, (3, 2), tensor(8192), None, 32, BLOCK=128)
    assert kernel.ways() == ["triton", "direct"]
    assert kernel.calls[1][1] == (3, 2, 1, STREAM, 11, (13,), None, None, None, 8192, None, 32, 128)


@pytest.mark.parametrize(
    "changed",
    [
        (tensor(dtype=torch.bfloat16), None, 32, 128),
        (tensor(), tensor(), 32, 128),
        # Triton compiles for multiples of 16, for 1, and for 64-bit integers
        (tensor(), None, 33, 128),
        (tensor(), None, 1, 128),
        (tensor(), None, 2**31, 128),
        (tensor(), None, 32, 256),
    ],
)
def test_what_triton_would_compile_anew_goes_to_triton(changed: tuple[Any, ...]) -> None:
    kernel = Kernel()
    launch(kernel, (3,), tensor(), None, 32, 128)
    launch(kernel, (3,), *changed)
    assert kernel.ways() == ["triton", "triton"]
    launch(kernel, (3,), *changed)
    assert kernel.ways()[2:] == ["direct"]


def test_of_what_is_not_specialized_only_64_bits_go_to_triton() -> None:
    kernel = Kernel(do_not_specialize=("n",))
    for n in (32, 33, 1, 2**31 - 1):
        launch(kernel, (3,), tensor(), None, n, 128)
    assert kernel.ways() == ["triton", "direct", "direct", "direct"]
    assert [call[1][-2] for call in kernel.calls[1:]] == [33, 1, 2**31 - 1]
    launch(kernel, (3,), tensor(), None, 2**31, 128)
    assert kernel.ways()[4:] == ["triton"]


def test_options_are_part_of_what_is_compiled() -> None:
    kernel = Kernel()
    for options in ({}, {"num_warps": 8}, {"num_warps": 8, "together": 2}, {"num_warps": 8}):
        launch(kernel, (3,), tensor(), None, 32, 128, **options)
    assert kernel.ways() == ["triton", "triton", "triton", "direct"]
    # eight warps twice on a multiprocessor of 65,536 registers
    expected = {"num_warps": 8, "num_stages": 3, "launch_cooperative_grid": True, "maxnreg": 128}
    assert kernel.calls[2][1] == expected


@pytest.mark.parametrize("other", [tensor(4100), tensor(device=1)])
def test_unaligned_tensors_and_other_devices_are_left_to_triton(other: Any) -> None:
    kernel = Kernel()
    for _ in range(2):
        launch(kernel, (3,), tensor(), other, 32, 128)
    assert kernel.ways() == ["triton", "triton"]


def test_launches_may_be_compiled_alone() -> None:
    kernel, others, notes = Kernel(), Kernel(), []
    launch(kernel, (3,), tensor(), None, 32, 128)
    before = note_launches(notes)
    with only_compiled():
        # what was compiled before, what was not, and what is left to Triton
        launch(kernel, (3,), tensor(), None, 32, 128)
        launch(kernel, (3,), tensor(), None, 33, 128, num_warps=8, together=2)
        launch(kernel, (3,), tensor(4100), None, 32, 128)
        # another thread launches as ever
        other = threading.Thread(target=launch, args=(others, (3,), tensor(), None, 32, 128))
        other.start()
        other.join()
    note_launches(before)
    assert kernel.ways() == ["triton", "warmup", "warmup"] and others.ways() == ["triton"]
    assert not notes
    launch(kernel, (3,), tensor(), None, 33, 128, num_warps=8, together=2)
    assert kernel.ways()[3:] == ["triton"] and kernel.calls[3][1] == kernel.calls[1][1]


def test_after_an_error_launches_are_launches_again() -> None:
    kernel = Kernel()
    with pytest.raises(ZeroDivisionError), only_compiled():
        launch(kernel, (1 // 0,), tensor(), None, 32, 128)
    with only_compiled():
        pass
    launch(kernel, (3,), tensor(), None, 32, 128)
    assert kernel.ways() == ["triton"]


def test_a_profiler_that_listens_hears_of_launches() -> None:
    kernel = Kernel()
    chain = run_launch_triton.triton.knobs.runtime.launch_enter_hook
    launch(kernel, (3,), tensor(), None, 32, 128)
    chain.add(print)
    try:
        launch(kernel, (3,), tensor(), None, 32, 128)
    finally:
        chain.remove(print)
    launch(kernel, (3,), tensor(), None, 32, 128)
    assert kernel.ways() == ["triton", "described", "direct"]
    assert kernel.calls[1][1] == ((3, 1, 1), STREAM, (4096, None, 32, 128))
