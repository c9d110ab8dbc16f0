"""Lists of launches on the CPU: C runs them, and what it calls interprets kernels and multiplies by PyTorch.

What is launched on a stream that is captured waits until the graph is launched, as on a GPU. What a graph may run
beside other work runs as late as it may, behind all of that.
"""

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton.runtime.build import compile_module_from_src

from modeling_colt5 import run_launch_code_triton, run_launch_list_triton, run_launch_triton
from modeling_colt5.run_launch_graphs import LaunchGraphs

DTYPES = {0: torch.float32, 2: torch.float16, 14: torch.bfloat16}
LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 7,
    ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p,
)  # fmt: skip
PRODUCT = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, *[ctypes.c_int] * 5, ctypes.POINTER(ctypes.c_float),
    ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int,
    ctypes.POINTER(ctypes.c_float), ctypes.c_void_p, *[ctypes.c_int] * 4,
)  # fmt: skip
ZEROS = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_ubyte, ctypes.c_size_t, ctypes.c_void_p)
CONTEXT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_void_p))
OPEN_STREAM = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint)
BEGIN_CAPTURE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
END_CAPTURE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))
INSTANTIATE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p, ctypes.c_ulonglong)
START = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
DESTROY = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
OPEN_EVENT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint)
RECORD = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
WAIT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint)
SET_STREAM = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
SET_WORKSPACE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
# streams: the one that work is launched on, the one that graphs are captured on, and the one beside that
STREAM, CAPTURED, BESIDE = 7, 8, 9
# cuBLAS's handle, and the bytes that a graph's products may work in
HANDLE, WORKSPACE = 5, 64
# what CUDA is to refuse: "capture", "instantiation", "upload", or "launch" of a kernel on the captured stream
REFUSED: set[str] = set()


class CPUGraphs(LaunchGraphs):
    """Graphs whose products work in memory of the CPU."""

    def _workspace(self, device: int, stream: int) -> torch.Tensor:
        return torch.empty(2 * WORKSPACE, dtype=torch.uint8)


def noted_launches(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[Any]]:
    """What is rehearsed from now on, and what is launched: kernels, and all that Triton would compile them for."""
    rehearsed: list[Any] = []
    launched: list[Any] = []
    launch = run_launch_triton.launch

    def note(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        kinds = tuple(argument.dtype if isinstance(argument, torch.Tensor) else argument for argument in arguments)
        is_rehearsed = getattr(run_launch_triton._notes, "only_compiled", False)
        (rehearsed if is_rehearsed else launched).append((kernel.fn.__name__, kinds, sorted(options.items())))
        launch(kernel, grid, *arguments, **options)

    for name, module in list(sys.modules.items()):
        if name.startswith("modeling_colt5.") and getattr(module, "launch", None) is launch:
            monkeypatch.setattr(module, "launch", note)
    return rehearsed, launched


def tensor_at(address: int, dtype: torch.dtype, shape: Any, strides: Any) -> torch.Tensor:
    """The tensor that begins at an address."""
    numbers = 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    memory = (ctypes.c_char * (numbers * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)


def interpreting_launcher(monkeypatch: pytest.MonkeyPatch, repeated: list[str]) -> Callable[[], Any]:
    """What stands for `launcher` of run_launch_list_triton.py; names of what it ran are added to `repeated`."""
    noted: list[tuple[Any, tuple[int, ...], tuple[Any, ...]]] = []
    # launches that wait on the captured stream, and those of each graph
    waiting: list[Callable[[], Any]] = []
    beside: list[Callable[[], Any]] = []
    opened: list[int] = []
    graphs: dict[int, list[Callable[[], Any]]] = {}
    # the stream that products run on, and whether they may work in a graph's own memory
    of_cublas: dict[str, Any] = {"stream": STREAM, "workspace": 0}
    workspaces: dict[int, int] = {}

    def do(stream: int | None, work: Callable[[], Any]) -> int:
        if stream in (CAPTURED, BESIDE) and "launch" in REFUSED:
            return 1
        if stream == BESIDE:
            beside.append(work)
        else:
            waiting.append(work) if stream == CAPTURED else work()
        return 0

    def command(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> run_launch_list_triton.Command:
        noted.append((kernel, grid, arguments))
        tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        words = (len(noted), *grid, *(1,) * (3 - len(grid)), 32, 0, 0, *tensors)
        return run_launch_list_triton.Command(run_launch_code_triton.LAUNCH, words)

    @LAUNCH
    def launch(number: int, *rest: Any) -> int:
        kernel, grid, arguments = noted[number - 1]
        parameters = iter(range(run_launch_code_triton.MOST_PARAMETERS))
        there = [
            tensor_at(
                ctypes.c_uint64.from_address(rest[8][next(parameters)]).value,
                argument.dtype, argument.shape, argument.stride(),
            )
            if isinstance(argument, torch.Tensor)
            else argument
            for argument in arguments
        ]  # fmt: skip

        def work() -> None:
            repeated.append(kernel.__name__)
            kernel[grid](*there)

        return do(rest[7], work)

    @PRODUCT
    def product(handle: Any, *given: Any) -> int:
        first_is, second_is, m, n, k, alpha, *memories = given
        first, dtype, rows, second, _, second_rows, beta, out, _, out_rows, *_ = memories
        assert alpha[0] == 1
        kind = DTYPES[dtype]
        a = tensor_at(first, kind, (m, k), (rows, 1) if first_is else (1, rows))
        b = tensor_at(second, kind, (k, n), (second_rows, 1) if second_is else (1, second_rows))
        c = tensor_at(out, kind, (m, n), (1, out_rows))
        assert handle == HANDLE
        adds = beta[0]

        def work() -> None:
            repeated.append("product")
            c.copy_(a @ b + c if adds else a @ b)

        assert bool(of_cublas["workspace"]) == (of_cublas["stream"] != STREAM)
        return do(of_cublas["stream"], work)

    @SET_STREAM
    def set_stream(handle: int, stream: int) -> int:
        of_cublas.update(stream=stream, workspace=0)
        return 0

    @SET_WORKSPACE
    def set_workspace(handle: int, memory: int, size: int) -> int:
        stream = of_cublas["stream"]
        assert size == WORKSPACE
        # streams that run side by side share none
        workspaces[stream] = of_cublas["workspace"] = memory
        assert stream != BESIDE or memory == workspaces[CAPTURED] + WORKSPACE
        return 0

    def current_handle() -> int:
        of_cublas.update(stream=STREAM, workspace=0)
        return HANDLE

    @ZEROS
    def zeros(address: int, value: int, size: int, stream: Any) -> int:

        def work() -> None:
            repeated.append("zeros")
            ctypes.memset(address, value, size)

        return do(stream, work)

    @CONTEXT
    def context(place: Any) -> int:
        place[0] = 1
        return 0

    @OPEN_STREAM
    def open_stream(place: Any, flags: int) -> int:
        place[0] = BESIDE if opened else CAPTURED
        opened.append(place[0])
        return 0

    @DESTROY
    def close_stream(stream: int) -> int:
        opened.remove(stream)
        return 0

    @OPEN_EVENT
    def open_event(place: Any, flags: int) -> int:
        place[0] = 11
        return 0

    @RECORD
    def record(event: int, stream: int) -> int:
        return 0

    @WAIT
    def wait(stream: int, event: int, flags: int) -> int:
        if stream == CAPTURED:
            waiting.extend(beside)
            beside.clear()
        return 0

    @BEGIN_CAPTURE
    def begin_capture(stream: int, mode: int) -> int:
        waiting.clear()
        beside.clear()
        return int("capture" in REFUSED)

    @END_CAPTURE
    def end_capture(stream: int, place: Any) -> int:
        # what was never waited for breaks a recording off
        assert not beside
        place[0] = len(graphs) + 1
        graphs[len(graphs) + 1] = waiting.copy()
        return 0

    @INSTANTIATE
    def instantiate(place: Any, graph: int, flags: int) -> int:
        place[0] = graph
        return int("instantiation" in REFUSED)

    @START
    def upload(graph: int, stream: int) -> int:
        assert stream == STREAM
        return int("upload" in REFUSED)

    @START
    def start(graph: int, stream: int) -> int:
        assert stream == STREAM
        repeated.append("graph")
        for work in graphs[graph]:
            work()
        return 0

    @DESTROY
    def nothing(what: int) -> int:
        return 0

    @DESTROY
    def destroy(graph: int) -> int:
        graphs[graph].clear()
        return 0

    made = compile_module_from_src(src=run_launch_code_triton.SOURCE, name="colt5_launches")
    streams = (open_stream, begin_capture, end_capture, instantiate, start)
    destroyers, events = (close_stream, nothing, destroy), (open_event, record, wait, nothing)
    of_products = (product, set_stream, set_workspace)
    callbacks = (launch, launch, zeros, context, *streams, *destroyers, *events, upload, *of_products)
    made.connect(*(ctypes.cast(callback, ctypes.c_void_p).value for callback in callbacks))
    # the callbacks live as long as what may be called
    made.callbacks = callbacks
    monkeypatch.setattr(run_launch_list_triton, "launch_command", command)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentBlasHandle", current_handle, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False, raising=False)
    # no graph of another test, whose callbacks are gone
    monkeypatch.setattr(run_launch_list_triton, "launch_graphs", CPUGraphs())
    monkeypatch.setattr(torch._C, "_cuda_setDevice", lambda index: None, raising=False)
    return lambda: made
