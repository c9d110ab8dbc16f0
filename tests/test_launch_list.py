"""Lists of launches: what is noted, where temporary tensors lie, and what C is called with."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import launch_lists  # noqa: E402
from launch_lists import interpreting_launcher  # noqa: E402

from modeling_colt5 import run_launch_code_triton, run_launch_list_triton, run_launch_triton  # noqa: E402
from modeling_colt5.op_rows_triton import clamp_into, join_into  # noqa: E402
from modeling_colt5.run_launch_list_triton import Recorder, launch_command, product_command  # noqa: E402
from modeling_colt5.run_launch_triton import Compiled  # noqa: E402

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels of CPU tensors are interpreted")


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What lists have run."""
    names: list[str] = []
    monkeypatch.setattr(run_launch_list_triton, "launcher", interpreting_launcher(monkeypatch, names))
    return names


def computed(recorder: Recorder, first: torch.Tensor, second: torch.Tensor, out: torch.Tensor) -> None:
    """out = joined(first, second) @ first + second @ first, by way of several temporary tensors."""

    def compute() -> None:
        joined = recorder.temporary(torch.float32, 8, 4)
        join_into((joined, first, second))
        product = recorder.temporary(torch.float32, 8, 4)
        recorder.product(joined, first, product)
        upper = recorder.temporary(torch.float32, 4, 4)
        join_into((upper, product[:4]))
        recorder.add_product(second.t(), first, upper)
        recorder.zeros(out)
        join_into((out[4:], product[4:]))
        join_into((out[:4], upper))

    recorder(compute)


def expected(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    result = torch.cat((first, second)) @ first
    result[:4] += second.t() @ first
    return result


@interpreted
def test_a_list_computes_for_other_memories_what_was_noted(repeated: list[str]) -> None:
    memories = [torch.randn(4, 4), torch.randn(4, 4), torch.empty(8, 4)]
    recorder = Recorder(CPU, records=True)
    computed(recorder, *memories)
    torch.testing.assert_close(memories[2], expected(*memories[:2]))
    launches = recorder.finish(memories)
    assert launches is not None and not repeated
    # the joined tensor's memory serves again for the sum, which is written when nobody needs that anymore
    assert launches.room == 2 * 128
    others = [torch.randn(4, 4), torch.randn(4, 4), torch.empty(8, 4)]
    assert launches([others], CPU, -1)
    assert repeated == ["join_kernel", "product", "join_kernel", "product", "zeros", "join_kernel", "join_kernel"]
    torch.testing.assert_close(others[2], expected(*others[:2]))


@interpreted
def test_what_is_noted_is_rehearsed_for_what_has_to_be_compiled(repeated: list[str]) -> None:
    """The rehearsal goes through the whole function, and neither computes nor notes."""
    first, out, seen = torch.randn(4, 4), torch.full((4, 4), 7.0), []

    def compute() -> None:
        product = recorder.temporary(torch.float32, 4, 4)
        recorder.zeros(product)
        recorder.product(first, first, product)
        recorder.add_product(first, first, product)
        with recorder.aside():
            join_into((out, product))
        recorder.join()
        seen.append(out.clone())

    recorder = Recorder(CPU, records=True)
    recorder(compute)
    assert len(seen) == 2
    assert torch.equal(seen[0], torch.full((4, 4), 7.0))
    torch.testing.assert_close(seen[1], 2 * first @ first)
    assert recorder.notes is not None and len(recorder.notes) == 7 and len(recorder.temporaries) == 1
    # a call that is not noted is not rehearsed
    Recorder(CPU, records=False)(lambda: seen.append(out))
    assert len(seen) == 3


@interpreted
def test_what_is_not_aligned_launches_nothing(repeated: list[str]) -> None:
    recorder = Recorder(CPU, records=True)
    computed(recorder, *(memories := [torch.randn(4, 4), torch.randn(4, 4), torch.empty(8, 4)]))
    launches = recorder.finish(memories)
    assert launches is not None
    unaligned = torch.zeros(17)[1:].view(4, 4)
    assert not launches([[memories[0], unaligned, memories[2]]], CPU, -1)
    assert not repeated


@interpreted
def test_what_comes_again_with_the_same_memories_is_a_graph(repeated: list[str]) -> None:
    recorder, memories, room = Recorder(CPU, records=True), [torch.randn(2, 4), torch.empty(8)], torch.empty(256)

    def compute(source: torch.Tensor, out: torch.Tensor) -> None:
        copied = recorder.temporary(torch.float32, 8)
        join_into((copied, source))
        recorder.zeros(out)
        join_into((out, copied))

    recorder(partial(compute, *memories))
    launches = recorder.finish(memories)
    assert launches is not None
    launches_of_call = ["join_kernel", "zeros", "join_kernel"]
    for turn in range(4):
        memories[0].normal_()
        repeated.clear()
        assert launches([memories], CPU, -1, lambda size: room.view(torch.uint8)[:size])
        # the first call may be the only one, the second one makes the graph
        assert repeated == (["graph"] if turn else []) + launches_of_call
        torch.testing.assert_close(memories[1], memories[0].flatten(), rtol=0, atol=0)
    # other memories, another room, and two calls at once
    others, elsewhere = [torch.randn(2, 4), torch.empty(8)], torch.empty(256)
    for calls, place in (([others], room), ([memories], elsewhere), ([memories, others], room)):
        repeated.clear()
        assert launches(calls, CPU, -1, lambda size, place=place: place.view(torch.uint8)[:size])
        assert repeated == launches_of_call * len(calls)
    torch.testing.assert_close(others[1], others[0].flatten(), rtol=0, atol=0)


@interpreted
@pytest.mark.parametrize("calls", [1, 3])
def test_products_are_part_of_a_graph(calls: int, repeated: list[str]) -> None:
    parts = [[torch.randn(4, 4), torch.randn(4, 4), torch.empty(8, 4)] for _ in range(calls)]
    recorder, room = Recorder(CPU, records=True), torch.empty(1024, dtype=torch.uint8)
    computed(recorder, *parts[0])
    launches = recorder.finish(parts[0])
    assert launches is not None
    for turn in range(3):
        for first, second, _ in parts:
            first.normal_()
            second.normal_()
        repeated.clear()
        assert launches(parts, CPU, -1, lambda size: room[:size])
        assert repeated[0] == ("graph" if turn else "join_kernel") and repeated.count("product") == 2 * calls
        for first, second, out in parts:
            torch.testing.assert_close(out, expected(first, second))
    # cuBLAS has its stream and memory back, which what stands for it asks for
    others = [torch.randn(4, 4), torch.randn(4, 4), torch.empty(8, 4)]
    assert launches([others], CPU, -1)
    torch.testing.assert_close(others[2], expected(*others[:2]))


@interpreted
def test_what_runs_aside_shares_no_memory_with_what_runs_meanwhile(repeated: list[str]) -> None:
    """The graph here runs what is aside last, and calls without a graph run it first."""
    memories, room = [torch.randn(4, 4), torch.randn(4, 4), torch.empty(4, 4), torch.empty(4, 4)], torch.empty(2**14)
    recorder = Recorder(CPU, records=True)

    def chain(first: torch.Tensor, count: int) -> torch.Tensor:
        """A power of a matrix."""
        power = first
        for _ in range(count):
            following = recorder.temporary(torch.float32, 4, 4)
            recorder.product(power, first, following)
            power = following
        return power

    first, second, out, total = memories

    def compute() -> None:
        before = recorder.temporary(torch.float32, 4, 4)
        recorder.product(first, second, before)
        with recorder.aside():
            beside = chain(first, 4)
            recorder.add_product(before, before, beside)
        main = chain(second, 4)
        join_into((out, main))
        recorder.join()
        recorder.product(beside, main, total)

    recorder(compute)
    launches = recorder.finish(memories)
    assert launches is not None
    # places of the first product, of what the chain aside leaves and of two before that, and of two in the main part
    assert launches.room == 5 * 128 + 64
    for _ in range(3):
        # so that a product of ten matrices is not large
        first.normal_(std=0.4)
        second.normal_(std=0.4)
        before, power = first @ second, torch.linalg.matrix_power
        assert launches([memories], CPU, -1, lambda size: room.view(torch.uint8)[:size])
        torch.testing.assert_close(out, power(second, 5))
        # fp32 rounds each of ten products in a row, and their sums cancel
        expected_total = (power(first, 5) + before @ before) @ power(second, 5)
        torch.testing.assert_close(total, expected_total, rtol=1e-5, atol=1e-4)
    replay = repeated[-repeated[::-1].index("graph") :]
    # the first product, four of the main part and its copy, five aside, and the last one
    assert replay == ["product"] * 5 + ["join_kernel"] + ["product"] * 6


@interpreted
def test_a_graph_multiplies_as_precisely_as_pytorch_does_now(repeated: list[str]) -> None:
    memories, room = [torch.randn(4, 4), torch.randn(4, 4), torch.empty(8, 4)], torch.empty(1024, dtype=torch.uint8)
    recorder = Recorder(CPU, records=True)
    computed(recorder, *memories)
    launches = recorder.finish(memories)
    assert launches is not None

    def is_graph(precision: str) -> bool:
        torch.backends.cuda.matmul.fp32_precision = precision
        repeated.clear()
        assert launches([memories], CPU, -1, lambda size: room[:size])
        return "graph" in repeated

    before = torch.backends.cuda.matmul.fp32_precision
    try:
        order = [is_graph(precision) for precision in ("ieee", "ieee", "tf32", "ieee", "tf32")]
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert order == [False, True, False, True, True]


@interpreted
@pytest.mark.parametrize("refused", ["capture", "instantiation", "upload", "launch"])
def test_what_cuda_refuses_is_launched_one_by_one(
    refused: str, repeated: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, source, out = Recorder(CPU, records=True), torch.randn(4), torch.empty(4)
    recorder(lambda: join_into((out, source)))
    launches, room = recorder.finish([source, out]), torch.empty(256, dtype=torch.uint8)
    assert launches is not None
    launch_lists.REFUSED.add(refused)
    try:
        for _ in range(3):
            out.zero_()
            assert launches([[source, out]], CPU, -1, lambda size: room[:size])
            assert torch.equal(out, source)
    finally:
        launch_lists.REFUSED.clear()
    assert repeated == ["join_kernel"] * 3


@interpreted
@pytest.mark.parametrize("comes_again", [False, True])
def test_a_thread_without_a_context_gets_one(
    comes_again: bool, repeated: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(CPU, records=True)
    memories, room = [torch.ones(4), torch.empty(4)], torch.empty(256, dtype=torch.uint8)
    recorder(lambda: join_into((memories[1], memories[0])))
    launches = recorder.finish(memories)
    assert launches is not None

    def call() -> bool:
        return launches([memories], CPU, 3, lambda size: room[:size])

    if comes_again:
        assert call() and call()
        repeated.clear()
    devices, made = [], run_launch_list_triton.launcher()
    without = [run_launch_code_triton.WITHOUT_CONTEXT]
    name = "replay" if comes_again else "run"
    parts = {part: getattr(made, part) for part in ("run", "graph", "replay")}
    tried = {name: lambda *arguments: without.pop() if without else parts[name](*arguments)}
    monkeypatch.setattr(run_launch_list_triton, "launcher", lambda: SimpleNamespace(**parts | tried))
    monkeypatch.setattr(torch._C, "_cuda_setDevice", devices.append, raising=False)
    memories[1].zero_()
    assert call()
    assert set(devices) == {3} and torch.equal(memories[0], memories[1])
    # also where it had not come before, as it is called once more
    assert repeated == ["graph", "join_kernel"]


@interpreted
@pytest.mark.parametrize("case", ["tied", "unknown", "unaligned", "strided", "Triton's own", "no launcher"])
def test_what_cannot_be_repeated_gives_no_list(case: str, repeated: list[str], monkeypatch: Any) -> None:
    first, second, out = torch.randn(4), torch.randn(4), torch.empty(8)
    if case == "unaligned":
        second = torch.zeros(5)[1:]
    if case == "strided":
        second = torch.zeros(8)[::2]
    recorder = Recorder(CPU, records=True)
    recorder(lambda: join_into((out, first, first if case == "tied" else second.contiguous())))
    if case == "Triton's own":
        monkeypatch.setattr(run_launch_list_triton, "launch_command", lambda *note: None)
    if case == "no launcher":
        monkeypatch.setattr(run_launch_list_triton, "launcher", lambda: None)
    memories = [first, first if case == "tied" else second, out]
    assert recorder.finish(memories[:1] if case == "unknown" else memories) is None


def test_who_does_not_record_holds_nothing() -> None:
    recorder = Recorder(CPU, records=False)
    recorder.zeros(recorder.temporary(torch.float32, 4))
    assert recorder.notes is None and not recorder.temporaries


# what C is called with


def test_a_launch_hands_over_what_is_not_compiled_into_the_kernel() -> None:
    kinds = {"x": "*fp32", "nothing": "constexpr", "n": "i32", "one": "constexpr", "eps": "fp32", "BLOCK": "constexpr"}
    metadata = SimpleNamespace(num_warps=4, shared=1024, launch_cooperative_grid=False)
    kernel = SimpleNamespace(src=SimpleNamespace(signature=kinds), metadata=metadata)
    x = torch.zeros(4)
    note = (Compiled(kernel, lambda: None, 77, None), (5, 6), (x, None, 300, 1, 0.5, 64))
    command = launch_command(*note)
    assert command is not None and command.kind == run_launch_code_triton.LAUNCH
    # 0.5 in fp32 is 0x3F000000, and Triton's two memories of its own come last
    assert command.words == (77, 5, 6, 1, 128, 1024, 0, x, -1, 300, -1, 0x3F000000, -1, 0, -1, 0)
    metadata.global_scratch_size = 16
    assert launch_command(*note) is None


@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False)])
def test_products_are_those_of_rows(transposed: tuple[bool, bool], repeated: list[str]) -> None:
    first, second = torch.randn(6, 3), torch.randn(3, 5)
    if transposed[0]:
        first = first.t().contiguous().t()
    if transposed[1]:
        second = second.t().contiguous().t()
    out = torch.randn(6, 20)[:, 5:10]
    if torch.cuda.is_available():
        assert product_command(first, second, out, False) is not None
        return
    memory = torch.zeros(6, 20)
    recorder = Recorder(CPU, records=True)
    recorder.product(first, second, memory[:, 5:10])
    memories = [first.t() if transposed[0] else first, second.t() if transposed[1] else second, memory]
    launches = recorder.finish(memories)
    assert launches is not None
    memory.zero_()
    launches([memories], CPU, -1)
    torch.testing.assert_close(memory[:, 5:10], first @ second)
    assert not memory[:, :5].any() and not memory[:, 10:].any()


def test_other_products_have_no_command() -> None:
    first, second = torch.randn(6, 3), torch.randn(3, 5)
    assert product_command(first, second, torch.empty(6, 5, dtype=torch.float64), False) is None
    assert product_command(first.half(), second, torch.empty(6, 5), False) is None
    assert product_command(torch.randn(6, 6)[:, ::2], second, torch.empty(6, 5), False) is None


# how launches are noted


class Kernel:
    """What looks like a kernel of two tensors and a number; its launches are noted."""

    arg_names = ["x", "y", "n"]

    def __init__(self) -> None:
        self.params = [SimpleNamespace(is_constexpr=False, do_not_specialize=False) for _ in self.arg_names]

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        made = SimpleNamespace(run=lambda *given: None, function=11, packed_metadata=(13,))
        return lambda *arguments, **options: made


def test_launches_are_noted_as_what_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_launch_triton, "INTERPRETED", False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    kernel, x, unaligned = Kernel(), torch.zeros(8), torch.zeros(9)[1:]
    notes: list[Any] = []
    before = run_launch_triton.note_launches(notes)
    run_launch_triton.launch(kernel, (2, 3), x, None, 48)
    run_launch_triton.launch(kernel, (2, 3), x, None, 48)
    run_launch_triton.launch(kernel, (1,), x, unaligned, 48)
    assert run_launch_triton.note_launches(before) is notes
    run_launch_triton.launch(kernel, (1,), x, None, 48)
    assert [(made and made.function, grid) for made, grid, _ in notes] == [(11, (2, 3)), (11, (2, 3)), (None, (1,))]
    assert notes[0][2][0] is x


def test_what_threads_compile_at_the_same_time_stays_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one thread compiles a kernel another one does, and is done first: both launch what that one compiled."""
    monkeypatch.setattr(run_launch_triton, "INTERPRETED", False)
    monkeypatch.setattr(run_launch_triton, "_compiled_twice", [])
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    kernel, x, others = Kernel(), torch.zeros(8), [1]
    compile_one = Kernel.__getitem__

    def compiled_elsewhere_too(self: Kernel, grid: tuple[int, ...]) -> Any:
        if others:
            others.pop()
            run_launch_triton.launch(self, grid, x, None, 48)
        return compile_one(self, grid)

    monkeypatch.setattr(Kernel, "__getitem__", compiled_elsewhere_too)
    notes: list[Any] = []
    before = run_launch_triton.note_launches(notes)
    try:
        for _ in range(2):
            run_launch_triton.launch(kernel, (2,), x, None, 48)
    finally:
        run_launch_triton.note_launches(before)
    # that of the other one, and two of this one
    first, second, third = (made for made, *_ in notes)
    assert first is second is third
    (unused,) = run_launch_triton._compiled_twice
    assert unused.kernel is not first.kernel


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_states_are_clamped_as_pytorch_clamps_them(dtype: torch.dtype, device: torch.device) -> None:
    states = torch.randn(1, 3, 700, device=device).to(dtype) * 1000
    states[0, 1, :4] = torch.tensor([float("inf"), -float("inf"), float("nan"), 64600], device=device)
    expected = states.clamp(-900.0, 900.0)
    clamp_into(states, 900.0)
    torch.testing.assert_close(states, expected, rtol=0, atol=0, equal_nan=True)


def test_joins_of_one_launch_are_those_of_many(device: torch.device) -> None:
    # sizes of more than one block, of other dtypes, and of one number
    parts = [[torch.randn(size, device=device) for _ in range(count)] for size, count in ((2100, 3), (48, 4), (1, 1))]
    joins = [(torch.empty(len(own), own[0].numel(), device=device, dtype=torch.bfloat16), *own) for own in parts]
    join_into(*joins)
    for (result, *_), own in zip(joins, parts, strict=True):
        expected = torch.stack(own)
        # Triton's interpreter rounds to bf16 by cutting off
        torch.testing.assert_close(result.float(), expected, rtol=2**-7, atol=0)
