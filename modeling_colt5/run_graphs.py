"""Repeated inference replayed as CUDA graphs: a call then costs the host microseconds instead of milliseconds."""

import contextlib
import functools
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .kernel_backend import Mode, is_hooked

# The most tokens of a call that is recorded: beyond, the GPU takes longer than the host, and a graph's memory is no
# longer small.
MOST_TOKENS = 2**16
# The most graphs of a module; the least recently used one goes first.
MOST_GRAPHS = 8
# How many calls of one kind come before its graph is made: kernels are compiled by then, and lengths that come once
# make none.
CALLS_BEFORE = 2
# How many kinds of call are counted at the same time.
MOST_COUNTED = 8 * MOST_GRAPHS

# Plain modules come from here: torch's layers, Transformers' activations, and this code as a package or out of a
# repository.
_PLAIN = ("torch.nn.modules.", "transformers.activations.", __name__.rpartition(".")[0] + ".")


@dataclass
class _Recording:
    """A graph, the tensors that it reads and the one that it writes.

    Args:
        place: the device and the stream that it is replayed on.
        done: the newest replay's end.
    """

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor | None]
    output: Tensor
    place: tuple[torch.device, int]
    done: torch.cuda.Event

    def replay(self, inputs: tuple[Tensor | None, ...]) -> Tensor:
        for static, given in zip(self.inputs, inputs, strict=True):
            if static is not None and given is not None:
                static.copy_(given)
        self.graph.replay()
        # The output is copied because the next replay writes to the same place.
        output = self.output.clone()
        self.done.record(torch.cuda.current_stream(output.device))
        return output

    def __del__(self) -> None:
        # PyTorch gives expandable segments back to the device when the stream of the recording is idle, but replays
        # run on another stream.
        with contextlib.suppress(Exception):
            if not torch.cuda.is_current_stream_capturing():
                self.done.synchronize()


def _tensors(part: nn.Module) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
    """A part's own parameters and buffers, past the lookup of nn.Module."""
    return part.__dict__["_parameters"], part.__dict__["_buffers"]


class _Parts:
    """A module's parts, and where its weights and buffers lie: a look at them takes a fifth of a walk over the module.

    `weights` is None where the kernels are not those of plain layers in evaluation: hooks (offloading, sharding),
    adapters and quantised weights do more than a graph would replay.
    """

    def __init__(self, module: nn.Module):
        parts = list(module.modules())
        # The references are weak, because a module that held itself would never be freed.
        self.parts = [weakref.ref(part) for part in parts]
        self.state = self.look(parts)
        self.weights: tuple[int, ...] | None = None
        if all(map(_is_plain, parts)):
            tensors = (tensor for part in parts for held in _tensors(part) for tensor in held.values())
            self.weights = tuple(tensor.data_ptr() for tensor in tensors if tensor is not None)

    @staticmethod
    def look(parts: list[nn.Module]) -> list[Any]:
        """All that the parts' kernels depend on, but the weights' values: classes, children, patches, hooks, modes,
        which parameters and buffers there are, and where they lie. It runs at every call."""
        state: list[Any] = [*map(type, parts)]
        for number, part in enumerate(parts):
            own = part.__dict__
            if own["_modules"]:
                state += map(id, own["_modules"].values())
            for held in _tensors(part):
                for tensor in held.values():
                    if tensor is not None:
                        state += (id(tensor), tensor.data_ptr())
            if own["_forward_hooks"]:
                state += own["_forward_hooks"]
            if own["_forward_pre_hooks"] or own["training"] or "forward" in own:
                state.append(number)
        return state

    def are_current(self) -> bool:
        """Whether nothing has changed since they were walked over."""
        parts = [part() for part in self.parts]
        return None not in parts and self.look(parts) == self.state  # type: ignore[arg-type]


def _is_plain(part: nn.Module) -> bool:
    return (
        f"{type(part).__module__}.".startswith(_PLAIN)
        and not (is_hooked(part) or part.training)
        and all(type(parameter) is nn.Parameter for parameter in part._parameters.values() if parameter is not None)
    )


@dataclass
class _Recordings:
    """Of one module: its parts, how often each kind of call came, and the graphs."""

    parts: _Parts
    calls: OrderedDict[Hashable, int] = field(default_factory=OrderedDict)
    graphs: OrderedDict[Hashable, _Recording] = field(default_factory=OrderedDict)
    # This counts all recordings that were ever made.
    made: int = 0
    # After a recording that failed there will be no other.
    failed: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def is_due(self, kind: Hashable) -> bool:
        """Count a call of a kind without a graph; whether it came often enough to get one.

        Once the places are taken, each graph that takes another's makes the next one wait for a call more: lengths
        that come in turn, more of them than places, would otherwise record at every call.
        """
        before = self.calls.pop(kind, 0)
        self.calls[kind] = before + 1
        if len(self.calls) > MOST_COUNTED:
            self.calls.popitem(last=False)
        return before >= CALLS_BEFORE + max(0, self.made - MOST_GRAPHS)

    def keep(self, kind: Hashable, recording: _Recording) -> None:
        """Add a graph, in the place of the least recently used where there is none left."""
        del self.calls[kind]
        self.graphs[kind] = recording
        self.made += 1
        if len(self.graphs) > MOST_GRAPHS:
            self.graphs.popitem(last=False)


_recordings: WeakKeyDictionary[nn.Module, _Recordings] = WeakKeyDictionary()
_recording_now = threading.Lock()
# PyTorch may go on asking a graph whose recording broke off, so such graphs are kept.
_broken: list[torch.cuda.CUDAGraph] = []


@functools.cache
def graph_stream(device: torch.device, branch: int) -> torch.cuda.Stream:
    """A stream for what is recorded on a device, the same one for each branch of all graphs.

    Memory belongs to the stream that took it, so graphs on one stream can share memory. PyTorch hands out its streams
    in turn, 32 of each priority, and whatever is launched on a stream that records is recorded too. This one therefore
    has a priority that few ask for. PyTorch's own stream for captures is of one device only, and when one of its
    graphs is freed, the stream's cuBLAS workspaces go too.
    """
    return torch.cuda.Stream(device, priority=-1)


def replayed(module: nn.Module, settings: Hashable, call: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """`call(*inputs)`; from the third call of a kind on, a replay of the CUDA graph of its kernels.

    A graph is of one kind of call: shapes, dtypes, settings, stream, PyTorch's switches for matrix products, and where
    the weights lie, which may change their values. These calls run in the ordinary way: those with gradients,
    training, autocast, tracing, hooks, adapters, sharded or quantised weights, and those of a second thread while the
    first one runs. So do all calls after a recording that failed, with a warning.

    Args:
        module: whose parameters `call` reads; all of its parts are looked at, their plain attributes excepted.
        settings: everything else that decides what `call` computes.
        call: from the inputs to one tensor, without synchronisation.
        inputs: on CUDA, the first [batch, n, ...]; None for what is absent.

    Returns:
        A tensor of the caller's own.
    """
    first = inputs[0]
    assert first is not None
    mode = Mode.of_now(first)
    if (
        not mode.is_plain_inference
        or type(first) is not Tensor
        or not first.is_cuda
        or module.training
        or first.shape[0] * first.shape[1] > MOST_TOKENS
        or first.numel() == 0
    ):
        return call(*inputs)
    recordings = _recordings.get(module)
    if recordings is None:
        recordings = _recordings.setdefault(module, _Recordings(_Parts(module)))
    if recordings.failed or not recordings.lock.acquire(blocking=False):
        return call(*inputs)
    try:
        recording = _find(recordings, module, (settings, mode), call, inputs)
        return call(*inputs) if recording is None else recording.replay(inputs)
    finally:
        recordings.lock.release()


def _find(
    recordings: _Recordings,
    module: nn.Module,
    settings: Hashable,
    call: Callable[..., Tensor],
    inputs: tuple[Tensor | None, ...],
) -> _Recording | None:
    """The graph of this kind of call, a new one where it is due; None for none yet, or none ever."""
    if not recordings.parts.are_current():
        recordings.parts = _Parts(module)
    if recordings.parts.weights is None:
        return None
    device = next(tensor.device for tensor in inputs if tensor is not None)
    place = (device, torch.cuda.current_stream(device).cuda_stream)
    shapes = tuple(None if tensor is None else (tensor.shape, tensor.dtype, tensor.device) for tensor in inputs)
    # Inference mode is part of the kind, because a tensor made in it can be written in it alone.
    modes = (torch.is_inference_mode_enabled(), *_matmul_modes())
    kind = (shapes, settings, place, modes, recordings.parts.weights)
    recording = recordings.graphs.get(kind)
    if recording is not None:
        recordings.graphs.move_to_end(kind)
    elif recordings.is_due(kind) and _recording_now.acquire(blocking=False):
        try:
            # All graphs of a place share their memory: they never run at once, and their outputs are copied out. The
            # memory goes with the last of them, so that there is no handle to keep.
            pools = [other.graph.pool() for other in recordings.graphs.values() if other.place == place]
            recording = _record(call, inputs, pools[0] if pools else None, place)
        finally:
            _recording_now.release()
        if recording is None:
            recordings.failed = True
        else:
            recordings.keep(kind, recording)
    return recording


def _matmul_modes() -> tuple[Any, ...]:
    matmul = torch.backends.cuda.matmul
    return (
        matmul.fp32_precision,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
    )


def _record(
    call: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], pool: Any, place: tuple[torch.device, int]
) -> _Recording | None:
    """Record a call; None where that fails: the ordinary call then works, or says what is wrong."""
    device = place[0]
    graph = torch.cuda.CUDAGraph()
    # PyTorch keeps a cuBLAS workspace for each stream that a product ran on, wherever it was first needed, and frees
    # it when Inductor records graphs of its own, or when another graph of the stream goes. One that was there before
    # could be freed under this graph; so the graph makes its own, in its own memory, and leaves none behind
    torch._C._cuda_clearCublasWorkspaces()
    try:
        # The outer context gives device and stream back where the end of the recording fails. Other threads may go on
        # allocating.
        with torch.cuda.stream(torch.cuda.current_stream(device)):
            static = [None if tensor is None else tensor.clone() for tensor in inputs]
            with torch.cuda.graph(graph, pool=pool, stream=graph_stream(device, 0), capture_error_mode="thread_local"):
                output = call(*static)
    except Exception as error:  # noqa: BLE001 - out of memory, or a layer that synchronises: both work without a graph
        with contextlib.suppress(Exception):
            graph.reset()
        _broken.append(graph)
        warnings.warn(
            f"recording a CUDA graph failed, the encoder is called without ({type(error).__name__}: {error}); "
            "config.use_cuda_graphs = False tries none",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    finally:
        torch._C._cuda_clearCublasWorkspaces()
    return _Recording(graph, static, output, place, torch.cuda.Event())
