"""CUDA graphs of lists of launches, for calls that come again with the same addresses.

PyTorch gives a loop of like steps the same memory in each step, and the tensors that the tokens of a cache share stay
where they are. The launches of such a call have the same arguments each time, so they can be one launch of a graph.
A graph holds addresses, and no memory but what cuBLAS works in: whoever calls holds the tensors.

While a graph is recorded, CUDA refuses another thread that begins to wait for the whole GPU, and breaks the recording
off. Python's lock is held meanwhile, so that no other thread of Python begins anything. Still, none is recorded where
more than one thread runs models.
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

# All that a call's launches depend on: its list, device and stream, and all addresses.
Key = tuple[Any, ...]


class _Kept(NamedTuple):
    """The graph of a call, None where CUDA refuses one; how many launches it has, and cuBLAS's memory, if any."""

    graph: Any
    launches: int
    workspace: Tensor | None


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
        self._threads: set[int] = set()
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
        with self._lock:
            # A backward pass runs in a thread of autograd's, for which the one that asked for it waits.
            if torch._C._current_graph_task_id() < 0:
                self._threads.add(threading.get_ident())
            kept = self.kept.get(key)
            if kept is not None:
                self.kept.move_to_end(key)
                self.replays = min(self.replays + 1, REPLAYS_OF_A_PLACE * MOST_PLACES_EARNED)
                return kept.graph
            if not self._is_due(hash(key), launches):
                return None
        workspace = None if multiplies_on is None else self._workspace(multiplies_on, key[1])
        graph = make(workspace)
        with self._lock:
            self._keep(key, _Kept(graph, launches, workspace))
        return graph

    def _is_due(self, call: int, launches: int) -> bool:
        """Whether a call came before, one thread makes all calls, and there is a place for the graph or one that was
        paid for."""
        if call not in self._seen:
            self._seen[call] = None
            if len(self._seen) > MOST_SEEN:
                self._seen.popitem(last=False)
            return False
        if len(self._threads) > 1:
            # those that have ended do not count
            self._threads.intersection_update(sys._current_frames())
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
        if key in self.kept:
            # another thread was faster
            return
        for other in self._those_to_go(kept.launches):
            self.launches -= self.kept.pop(other).launches
            # another thread may have paid for a graph of its own meanwhile
            self.replays = max(self.replays - REPLAYS_OF_A_PLACE, 0)
        self.kept[key] = kept
        self.launches += kept.launches

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
    """The bytes that PyTorch lets cuBLAS work in, so that a product has the same kernel in a graph and outside."""
    chosen = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if not chosen:
        chosen = [(4096, 8)] if capability == (9, 0) else [(4096, 2), (16, 8)]
    return sum(1024 * int(size) * int(count) for size, count in chosen)


launch_graphs = LaunchGraphs()
