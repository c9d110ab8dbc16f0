"""Repeated inference replayed as CUDA graphs: a call then costs the host microseconds instead of milliseconds."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .kernel_backend import runs_eagerly

# beyond so many tokens the GPU takes longer than the host, and a graph's memory is no longer small
MOST_TOKENS = 2**16
# of one module; the least recently used goes first
MOST_GRAPHS = 8
# calls of one kind before its graph is made: kernels are compiled by then, and lengths that come once make none
CALLS_BEFORE = 2


@dataclass
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor | None]
    output: Tensor

    def replay(self, inputs: tuple[Tensor | None, ...]) -> Tensor:
        for static, given in zip(self.inputs, inputs, strict=True):
            if static is not None and given is not None:
                static.copy_(given)
        self.graph.replay()
        # the next replay writes where this one did
        return self.output.clone()


@dataclass
class _Recordings:
    """Of one module: how often each kind of call came, the graphs, and the memory that they share."""

    calls: OrderedDict[Hashable, int] = field(default_factory=OrderedDict)
    graphs: OrderedDict[Hashable, _Recording] = field(default_factory=OrderedDict)
    pools: dict[int, Any] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


_recordings: WeakKeyDictionary[nn.Module, _Recordings] = WeakKeyDictionary()


def _weights(module: nn.Module) -> tuple[int, ...] | None:
    """Where the module's parameters lie; None where its kernels are not those of its plain layers.

    Hooks (offloading, sharding), adapters and quantised weights do more than a graph would replay.
    """
    addresses = []
    for part in module.modules():
        if type(part).__module__.partition(".")[0] not in _PLAIN or "forward" in part.__dict__:
            return None
        if part._forward_pre_hooks or part._backward_hooks:
            return None
        # Transformers leaves its hooks for `output_hidden_states` and the like in place, idle
        if any(hook.__name__ != "output_capturing_hook" for hook in part._forward_hooks.values()):
            return None
        for parameter in part._parameters.values():
            if parameter is None:
                continue
            if type(parameter) is not nn.Parameter:
                return None
            addresses.append(parameter.data_ptr())
    return tuple(addresses)


# torch's layers, Transformers' activations, and this code as a package or out of a repository
_PLAIN = {"torch", "transformers", __name__.partition(".")[0]}


def replayed(module: nn.Module, settings: Hashable, call: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """`call(*inputs)`; from the third call of a kind on, a replay of the CUDA graph of its kernels.

    A graph is of one kind of call: shapes, dtypes, settings, stream, and where the weights lie, which may change their
    values. Whatever a graph does not have takes the ordinary way: gradients, training, autocast, tracing, hooks,
    adapters, sharded or quantised weights, a second thread while the first one runs.

    Args:
        module: whose parameters `call` reads; all of its parts are looked at.
        settings: everything else that decides what `call` computes.
        call: from the inputs to one tensor, without synchronisation.
        inputs: on CUDA, the first [batch, n, ...]; None for what is absent.

    Returns:
        A tensor of the caller's own.
    """
    first = inputs[0]
    if (
        not runs_eagerly()
        or first is None
        or not first.is_cuda
        or module.training
        or torch.is_grad_enabled()
        or first.shape[0] * first.shape[1] > MOST_TOKENS
        or first.numel() == 0
        or torch.is_autocast_enabled("cuda")
        or torch.cuda.is_current_stream_capturing()
    ):
        return call(*inputs)
    weights = _weights(module)
    if weights is None:
        return call(*inputs)
    recordings = _recordings.setdefault(module, _Recordings())
    if not recordings.lock.acquire(blocking=False):
        return call(*inputs)
    try:
        stream = torch.cuda.current_stream(first.device).cuda_stream
        shapes = tuple(None if tensor is None else (tensor.shape, tensor.dtype, tensor.device) for tensor in inputs)
        # a tensor made in inference mode can be written in inference mode alone
        modes = (stream, torch.is_inference_mode_enabled(), torch.get_float32_matmul_precision())
        kind = (shapes, settings, modes, weights)
        recording = recordings.graphs.get(kind)
        if recording is not None:
            recordings.graphs.move_to_end(kind)
            return recording.replay(inputs)
        calls = recordings.calls.pop(kind, 0)
        recordings.calls[kind] = calls + 1
        if len(recordings.calls) > 8 * MOST_GRAPHS:
            recordings.calls.popitem(last=False)
        if calls < CALLS_BEFORE:
            return call(*inputs)
        recording = _record(call, inputs, recordings.pools, stream)
        recordings.graphs[kind] = recording
        if len(recordings.graphs) > MOST_GRAPHS:
            recordings.graphs.popitem(last=False)
        return recording.replay(inputs)
    finally:
        recordings.lock.release()


def _record(
    call: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], pools: dict[int, Any], stream: int
) -> _Recording:
    # one memory for all graphs of a stream: they never run at once, and their outputs are copied out
    pool = pools.setdefault(stream, torch.cuda.graph_pool_handle())
    static = [None if tensor is None else tensor.clone() for tensor in inputs]
    graph = torch.cuda.CUDAGraph()
    # cuBLAS keeps a workspace for each stream and frees it when Inductor records graphs of its own. One that was there
    # before would be freed under this graph; so the graph makes its own, in its own memory, and leaves none behind
    torch._C._cuda_clearCublasWorkspaces()
    try:
        # other threads may go on allocating
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            output = call(*static)
    finally:
        torch._C._cuda_clearCublasWorkspaces()
    return _Recording(graph, static, output)
