"""Which calls get a CUDA graph, and which graph goes for another one."""

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from modeling_colt5 import run_launch_graphs
from modeling_colt5.run_launch_graphs import LaunchGraphs, workspace_size


class Graph:
    """What stands for a graph."""


class Calls:
    """Calls of some graphs, and how many were made.

    Args:
        launches: of each call.
    """

    def __init__(self, launches: int = 1):
        self.graphs, self.launches, self.made = LaunchGraphs(), launches, 0

    def __call__(self, name: Any) -> bool:
        """Whether the call of a name is a graph."""

        def make(workspace: Any) -> Graph:
            self.made += 1
            return Graph()

        return self.graphs.of((0, 7, name), self.launches, make, None) is not None


@pytest.fixture
def two_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_launch_graphs, "MOST_LAUNCHES", 20)
    monkeypatch.setattr(run_launch_graphs, "REPLAYS_OF_A_PLACE", 3)


def test_a_call_that_comes_again_gets_a_graph() -> None:
    calls = Calls()
    assert [calls(name) for name in "aabacb"] == [False, True, False, True, False, True]
    assert calls.made == 2


def test_where_there_is_no_place_replays_pay_for_one(two_places: None) -> None:
    calls = Calls(launches=10)
    for name in "aabb":
        calls(name)
    # "c" comes as often as it likes
    assert not any(calls("c") for _ in range(5))
    # three replays, of which "a" was the first to be replayed last, so that "b" goes
    assert calls("b") and calls("a") and calls("a")
    assert calls("c") and calls.made == 3
    assert calls("a") and not calls("b") and calls("c")
    assert calls.graphs.launches == 20 and len(calls.graphs.kept) == 2


def test_more_calls_in_turn_than_places_make_few_graphs(two_places: None) -> None:
    calls = Calls(launches=10)
    turns = 300
    replayed = sum(calls(name) for _ in range(turns) for name in "abcde")
    # each but the first two was paid for by three replays
    assert 2 <= calls.made <= 2 + replayed / 3
    assert replayed > turns


def test_what_is_larger_than_all_places_has_no_graph(two_places: None) -> None:
    calls = Calls(launches=21)
    assert not any(calls("a") for _ in range(9))
    assert calls.made == 0


def test_a_large_graph_takes_the_places_of_several(two_places: None) -> None:
    calls = Calls(launches=5)
    for name in "abcd" * 2:
        calls(name)
    calls.launches = 15
    # three of them have to go, and three replays are the price of each
    calls.graphs.replays = 8
    assert not calls("e") and not calls("e")
    calls.graphs.replays = 10
    assert calls("e")
    assert calls.graphs.launches == 20 and [key[2] for key in calls.graphs.kept] == ["d", "e"]
    assert calls.graphs.replays == 1


def test_calls_are_not_remembered_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_launch_graphs, "MOST_SEEN", 2)
    calls = Calls()
    assert not any(calls(name) for name in "abca")
    assert calls("a")


def test_what_cuda_refuses_is_tried_a_few_times() -> None:
    graphs, tried = LaunchGraphs(), []
    for _ in range(9):
        assert graphs.of((0, 7), 1, tried.append, None) is None
    assert tried == [None] * run_launch_graphs.MOST_TRIES
    # it takes no place, and nothing was replayed
    assert graphs.launches == graphs.replays == 0


def test_what_was_refused_once_may_be_a_graph_later() -> None:
    graphs, answers = LaunchGraphs(), [None, Graph()]
    found = [graphs.of((0, 7), 5, lambda workspace: answers.pop(0), None) is not None for _ in range(4)]
    assert found == [False, False, True, True]
    assert graphs.launches == 5


def test_many_refusals_are_not_remembered_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_launch_graphs, "MOST_SEEN", 4)
    graphs = LaunchGraphs()
    for name in "aabbccddeeffgg":
        assert graphs.of((0, 7, name), 1, lambda workspace: None, None) is None
    assert len(graphs.kept) == 4 and graphs.launches == 0


def test_a_full_gpu_has_no_graphs_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def full(self: LaunchGraphs, device: int, stream: int) -> torch.Tensor:
        asked.append((device, stream))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LaunchGraphs, "_workspace", full)
    graphs = LaunchGraphs()
    for _ in range(9):
        assert graphs.of((0, 7), 1, lambda workspace: Graph(), 0) is None
    # PyTorch empties its cache before it says so
    assert asked == [(0, 7)]


def test_graphs_can_be_forgotten() -> None:
    calls = Calls(launches=3)
    assert not calls("a") and calls("a")
    held = weakref.ref(calls.graphs.kept[0, 7, "a"].graph)
    calls.graphs.clear()
    assert held() is None and calls.graphs.launches == 0
    assert calls("a") and calls.made == 2


@pytest.mark.parametrize(("value", "wanted"), [(None, True), ("1", True), ("0", False)])
def test_the_environment_says_whether_there_are_graphs(
    value: str | None, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delenv(run_launch_graphs.ENVIRONMENT_VARIABLE, raising=False)
    else:
        monkeypatch.setenv(run_launch_graphs.ENVIRONMENT_VARIABLE, value)
    assert run_launch_graphs.is_wanted() == wanted
    calls = Calls()
    assert not calls("a") and calls("a")
    monkeypatch.setattr(run_launch_graphs, "enabled", wanted)
    # those that are there already do not run either
    assert calls("a") == wanted


def test_another_word_in_the_environment_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(run_launch_graphs.ENVIRONMENT_VARIABLE, "off")
    with pytest.raises(ValueError, match="COLT5_LAUNCH_GRAPHS is 'off'; it must be 0 for no CUDA graphs"):
        run_launch_graphs.is_wanted()


def test_graphs_of_a_stream_share_what_cublas_works_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delattr(torch._C, "_cuda_getCublasWorkspaceSize", raising=False)
    empty, sizes = torch.empty, []

    def on_cpu(size: int, **options: Any) -> torch.Tensor:
        sizes.append((size, options["device"]))
        return empty(16, dtype=options["dtype"])

    monkeypatch.setattr(torch, "empty", on_cpu)
    graphs, given = LaunchGraphs(), []

    def make(workspace: torch.Tensor) -> Graph:
        given.append(workspace)
        return Graph()

    for stream, name in ((7, "a"), (7, "b"), (8, "a")):
        for _ in range(3):
            graphs.of((0, stream, name), 1, make, 0)
    first, second, third = map(weakref.ref, given)
    assert first() is second() is not third()
    assert sizes == [(2**26, torch.device("cuda", 0))] * 2
    given.clear()
    # the graphs hold it, and the last one of a stream lets it go
    assert first() is not None
    graphs.clear()
    assert first() is None and third() is None


@pytest.mark.parametrize(
    ("chosen", "capability", "size"),
    [
        ("", (9, 0), 32 * 2**20),
        ("", (8, 0), 8 * 2**20 + 2**17),
        ("", (12, 0), 32 * 2**20),
        (":4096:8", (8, 0), 32 * 2**20),
        (":16:8", (9, 0), 2**17),
        (":4096:2:16:8", (9, 0), 8 * 2**20 + 2**17),
    ],
)
def test_products_may_work_in_as_much_as_pytorchs(
    chosen: str, capability: tuple[int, int], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch._C, "_cuda_getCublasWorkspaceSize", raising=False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", chosen)
    assert workspace_size(capability) == size
    # a release that says it knows best
    monkeypatch.setattr(torch._C, "_cuda_getCublasWorkspaceSize", lambda: 12_345, raising=False)
    assert workspace_size(capability) == 12_345


def test_nothing_is_recorded_while_several_threads_call() -> None:
    calls = Calls()
    assert not calls("a") and calls("a")
    with ThreadPoolExecutor(1) as pool:

        def in_the_pool(name: str) -> bool:
            return pool.submit(calls, name).result()

        # what was recorded before is replayed in any thread
        assert in_the_pool("a")
        for call in (calls, in_the_pool):
            assert not any(call("b") for _ in range(4))
            assert call("a")
        assert calls.made == 1
    # the other thread has ended
    assert calls("b") and calls.made == 2


def test_a_thread_that_does_not_call_any_more_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_launch_graphs, "CALLS_OF_A_THREAD", 10)
    calls = Calls()
    # this one loads and warms up, another one serves from then on
    calls("a")
    with ThreadPoolExecutor(1) as pool:
        found = list(pool.map(calls, "b" * 14))
    assert found == [False] * 9 + [True] * 5


def test_another_thread_alone_may_record() -> None:
    calls = Calls()
    with ThreadPoolExecutor(1) as pool:
        assert list(pool.map(calls, "aaa")) == [False, True, True]


def test_the_thread_of_a_backward_pass_is_no_other_one() -> None:
    calls, found = Calls(), []

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, states: torch.Tensor) -> torch.Tensor:
            return states.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            found.append(in_a_thread_of_autograd(lambda: calls("backward")))
            return grad

    def in_a_thread_of_autograd(work: Callable[[], Any]) -> Any:
        """On a CPU autograd has no thread of its own; another name of this one stands for it."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_launch_graphs.threading, "get_ident", lambda: -5)
            return work()

    for _ in range(3):
        calls("forward")
        Backward.apply(torch.ones(2, requires_grad=True)).sum().backward()
    assert found == [False, True, True]
    assert calls("forward")


def test_threads_may_call_at_the_same_time() -> None:
    calls, errors = Calls(launches=4), []
    for name in range(9):
        assert not calls(name) and calls(name)

    def work(number: int) -> None:
        try:
            assert all(calls((number + turn * turn) % 9) for turn in range(300))
        except Exception as error:  # noqa: BLE001 - whatever it is
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert (calls.made, calls.graphs.launches, calls.graphs.replays) == (9, 36, 4 * 300)
