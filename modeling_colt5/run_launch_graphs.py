"""CUDA graphs of lists of launches, for calls that come again with the same addresses.

PyTorch gives a loop of like steps the same memory in each step, and the tensors that the tokens of a cache share stay
where they are. The launches of such a call have the same arguments each time, so they can be one launch of a graph.
A graph holds addresses, and no memory but what cuBLAS works in: whoever calls holds the tensors.

While a graph is recorded, CUDA refuses another thread that begins to wait for the whole GPU, and breaks the recording
off. Python's lock is held meanwhile, so that no other thread of Python begins anything. Still, none is recorded where
several threads run models in turn.
"""

import os
import re
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

ENVIRONMENT_VARIABLE = "COLT5_LAUNCH_GRAPHS"
# All graphs together have at most so many launches. These would take 90 MiB of a GPU and 350 of the host, by what a
# quarter of them took on an H200.
MOST_LAUNCHES = 32_768
# So many calls are remembered that came once.
MOST_SEEN = 4096
# Where there is no place left, a new graph takes that of the one that ran longest ago. So many replays pay for it,
# as they save the host about the time that making a graph takes it. Without that, more calls in turn than places would
# make a graph in each call.
REPLAYS_OF_A_PLACE = 8
# Replays of so many places are saved up at most.
MOST_PLACES_EARNED = 256
# A thread counts as one that runs models until so many calls have come from others. A pass of an encoder without
# gradients is three.
CALLS_OF_A_THREAD = 1000
# CUDA may refuse a recording because of what another thread does just then.
MOST_TRIES = 3

# All that a call's launches depend on: its list, device and stream, and all addresses.
Key = tuple[Any, ...]


def is_wanted() -> bool:
    """Whether graphs may be made, as the environment says.

    Raises:
        ValueError: for another value than 0 and 1.
    """
    value = os.environ.get(ENVIRONMENT_VARIABLE, "1")
    if value not in ("0", "1"):
        raise ValueError(f"{ENVIRONMENT_VARIABLE} is {value!r}; it must be 0 for no CUDA graphs of launches, or 1")
    return value == "1"


# It is read once, where this code is imported.
enabled = is_wanted()


class _Kept(NamedTuple):
    """The graph of a call, None where it was refused so many times; how many launches it has, and cuBLAS's memory, if
    any."""

    graph: Any
    launches: int
    workspace: Tensor | None
    refusals: int


class LaunchGraphs:
    """The graphs of calls that came at least twice.

    Attributes:
        kept: by call, the one that ran last at the end.
        launches: of all that are kept.
        replays: how many of them no graph in another one's place has used up.
    """

    def __init__(self) -> None:
        self.kept: OrderedDict[Key, _Kept] = OrderedDict()
        self.launches = 0
        self.replays = 0
        self._seen: OrderedDict[int, None] = OrderedDict()
        # how many calls there were, and of each thread the number of its last one
        self._calls = 0
        self._threads: dict[int, int] = {}
        self._workspaces: weakref.WeakValueDictionary[tuple[int, int], Tensor] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    def of(self, key: Key, launches: int, make: Callable[[Tensor | None], Any], multiplies_on: int | None) -> Any:
        """The graph of a call; None where it comes for the first time, has none, or may have none now.

        Args:
            key: of the call. Its device and stream, as numbers, come first.
            launches: of the call.
            make: from the memory that cuBLAS may work in to the graph; None where CUDA refuses one.
            multiplies_on: the number of the device where cuBLAS takes part; else None.
        """
        if not enabled:
            return None
        with self._lock:
            self._calls += 1
            # A backward pass runs in a thread of autograd's, for which the one that asked for it waits.
            if torch._C._current_graph_task_id() < 0:
                self._threads[threading.get_ident()] = self._calls
            kept = self.kept.get(key)
            if kept is not None:
                self.kept.move_to_end(key)
                if kept.graph is not None:
                    self.replays = min(self.replays + 1, REPLAYS_OF_A_PLACE * MOST_PLACES_EARNED)
                    return kept.graph
                if kept.refusals >= MOST_TRIES:
                    return None
            if not self._is_due(hash(key), launches):
                return None
        graph, workspace, refusals = None, None, 1 if kept is None else kept.refusals + 1
        try:
            workspace = None if multiplies_on is None else self._workspace(multiplies_on, key[1])
            graph = make(workspace)
        except torch.OutOfMemoryError:
            # What is left of the GPU is the caller's; and to ask again would empty PyTorch's cache again.
            refusals = MOST_TRIES
        if graph is None:
            launches, workspace = 0, None
        with self._lock:
            self._keep(key, _Kept(graph, launches, workspace, refusals))
        return graph

    def clear(self) -> None:
        """Forget all graphs, and free what cuBLAS works in for them."""
        with self._lock:
            self.kept.clear()
            self.launches = 0

    def _is_due(self, call: int, launches: int) -> bool:
        """Whether a call came before, one thread makes all calls, and there is a place for the graph or one that was
        paid for."""
        if call not in self._seen:
            self._seen[call] = None
            if len(self._seen) > MOST_SEEN:
                self._seen.popitem(last=False)
            return False
        if len(self._threads) > 1:
            alive = sys._current_frames()
            self._threads = {
                thread: last
                for thread, last in self._threads.items()
                if thread in alive and self._calls - last < CALLS_OF_A_THREAD
            }
            if len(self._threads) > 1:
                return False
        return launches <= MOST_LAUNCHES and self.replays >= REPLAYS_OF_A_PLACE * len(self._those_to_go(launches))

    def _those_to_go(self, launches: int) -> list[Key]:
        """The calls whose graphs have to go for one of so many launches, those that ran longest ago."""
        found: list[Key] = []
        left = self.launches
        for key, kept in self.kept.items():
            if left + launches <= MOST_LAUNCHES:
                break
            found.append(key)
            left -= kept.launches
        return found

    def _keep(self, key: Key, kept: _Kept) -> None:
        """Keep a graph, and forget as many as have to go for it; CUDA destroys those once they have ended."""
        before = self.kept.pop(key, None)
        if before is not None and before.graph is not None:
            # another thread was faster
            kept = before
            self.launches -= before.launches
        for other in self._those_to_go(kept.launches):
            self.launches -= self.kept.pop(other).launches
            # another thread may have paid for a graph of its own meanwhile
            self.replays = max(self.replays - REPLAYS_OF_A_PLACE, 0)
        self.kept[key] = kept
        self.launches += kept.launches
        while len(self.kept) > MOST_SEEN:
            # those that were refused take no place of launches
            self.launches -= self.kept.popitem(last=False)[1].launches

    def _workspace(self, device: int, stream: int) -> Tensor:
        """The memory that cuBLAS works in, in two halves for what runs side by side, of a stream whose graphs run one
        after another; the last of them frees it.

        PyTorch's own may be freed before that, when another graph is recorded.
        """
        workspace = self._workspaces.get((device, stream))
        if workspace is None:
            size = workspace_size(torch.cuda.get_device_capability(device))
            workspace = torch.empty(2 * size, dtype=torch.uint8, device=torch.device("cuda", device))
            self._workspaces[device, stream] = workspace
        return workspace


def workspace_size(capability: tuple[int, int]) -> int:
    """The bytes that PyTorch lets cuBLAS work in, so that a product has the same kernel in a graph and outside.

    Args:
        capability: of the device, which decides where neither PyTorch (from 2.13 on) nor the environment says it.
    """
    told = getattr(torch._C, "_cuda_getCublasWorkspaceSize", None)
    if told is not None:
        return told()
    chosen = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if not chosen:
        chosen = [(4096, 8)] if capability == (9, 0) or capability[0] > 9 else [(4096, 2), (16, 8)]
    return sum(1024 * int(size) * int(count) for size, count in chosen)


launch_graphs = LaunchGraphs()
