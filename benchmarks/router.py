"""Times routing on a CUDA device against colt5-attention's Triton path, torch.topk and the card's copy bandwidth.

`python benchmarks/router.py --out DIR [--peer FOLDER]`: FOLDER holds an unpacked colt5-attention 0.11.2 (it need not
be installed); without it only our numbers are taken. Writes router.md and router.json to DIR. Results are verified
against the float64 reference before anything is timed.
"""

import argparse
import importlib
import json
import math
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from modeling_colt5.routing import route

WITH_PEER = ((8, 4096), (4, 16384), (32, 16384), (1, 65536), (8, 65536), (1, 131072), (8, 131072))
OURS_ALONE = ((1, 262144), (1, 1 << 20), (1, 1 << 22))
FRACTION = 16
PEER_SETTINGS = {
    "peer 50": {"n_iters": 50, "eps": 1.0, "checkpoint_segments": 10},
    "peer 20": {"n_iters": 20, "eps": 1.0, "eps_init": 4.0, "eps_decay": 0.7, "checkpoint_segments": 4},
}


def load_peer(folder: Path) -> Callable[..., torch.Tensor]:
    """The peer's kernel without its __init__, which imports another package that routing does not use."""
    package = types.ModuleType("colt5_attention")
    package.__path__ = [str(folder / "colt5_attention")]
    sys.modules["colt5_attention"] = package
    return importlib.import_module("colt5_attention.triton_coor_descent").triton_coor_descent


def wall(function: Callable[[], object], seconds: float = 0.25) -> float:
    """Median microseconds of a call as host and device see it, synchronised before and after."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    times: list[float] = []
    while sum(times) < seconds * 1e6 and len(times) < 200 or len(times) < 5:
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def graph_times(function: Callable[[], object], calls: int) -> tuple[float, float]:
    """Microseconds of device time a call, in a CUDA graph of `calls` in a row, and of replaying a graph of one."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()
    torch.cuda.synchronize()
    results = []
    for count in (calls, 1):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                function()
        graph.replay()
        torch.cuda.synchronize()
        if count == 1:
            results.append(wall(graph.replay, 0.1))
            break
        times = []
        for _ in range(7):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / count)
        results.append(statistics.median(times))
    return results[0], results[1]


def peak_bytes(function: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(forward: Callable[[torch.Tensor], torch.Tensor], scores: torch.Tensor, calls: int) -> dict[str, float]:
    """Times of `forward` (scores to weights) and of forward and backward; the backward's is the difference."""
    cotangent = torch.randn_like(forward(scores))

    def both() -> None:
        leaf = scores.detach().requires_grad_()
        torch.autograd.grad(forward(leaf), leaf, cotangent)

    forward_gpu, _ = graph_times(lambda: forward(scores), calls)
    both_gpu, both_replay = graph_times(both, calls)
    return {
        "forward wall": wall(lambda: forward(scores)),
        "both wall": wall(both),
        "both replay": both_replay,
        "forward GPU": forward_gpu,
        "backward GPU": both_gpu - forward_gpu,
        "both GPU": both_gpu,
        "forward peak bytes": peak_bytes(lambda: forward(scores)),
        "both peak bytes": peak_bytes(both),
    }


def verify(scores: torch.Tensor, budget: torch.Tensor, k: int) -> float:
    """Largest error of our weights against the float64 reference; indices and gradients must agree too."""
    leaf = scores.detach().requires_grad_()
    exact = scores.double().requires_grad_()
    routed, expected = route(leaf, budget, k), route(exact, budget, k, kernel_backend="torch")
    assert torch.equal(routed.indices, expected.indices)
    assert torch.equal(routed.indices, scores.topk(k).indices.sort().values)
    cotangent = torch.randn_like(routed.weights)
    (grad,) = torch.autograd.grad(routed.weights, leaf, cotangent)
    (expected_grad,) = torch.autograd.grad(expected.weights, exact, cotangent.double())
    error = float((routed.weights - expected.weights).abs().max())
    assert error < 2e-6, error
    assert float((grad - expected_grad).abs().max()) < 1e-5
    return error


def benchmark(rows: int, n: int, peer: Callable[..., torch.Tensor] | None) -> dict[str, Any]:
    k = n // FRACTION
    scores = torch.randn(rows, n, device="cuda")
    budget = torch.full((rows,), k, device="cuda")
    result: dict[str, Any] = {"rows": rows, "n": n, "k": k, "error": verify(scores, budget, k)}
    calls = 20 if rows * n <= 1 << 20 else 5
    result["ours"] = measure(lambda s: route(s, budget, k).weights, scores, calls)
    result["topk GPU"], _ = graph_times(lambda: scores.topk(k), calls)
    result["topk wall"] = wall(lambda: scores.topk(k))
    target = torch.empty_like(scores)
    result["copy GPU"], _ = graph_times(lambda: target.copy_(scores), 50)
    if peer is None or (rows, n) not in WITH_PEER:
        return result
    # a number for k is copied to the device at every call, which a graph cannot capture
    soft_k = torch.full((rows,), k * 9 / 8, device="cuda")
    for name, settings in PEER_SETTINGS.items():

        def forward(s: torch.Tensor, settings: dict[str, Any] = settings) -> torch.Tensor:
            weights = peer(s, k=soft_k, **settings)
            return weights.gather(-1, s.detach().topk(k).indices)

        expected = route(scores.double(), budget, k, kernel_backend="torch")
        dense = peer(scores, k=soft_k, **settings).gather(-1, expected.indices)
        result[f"{name} error"] = float((dense - expected.weights).abs().max())
        result[name] = measure(forward, scores, 3)
    return result


def table(results: list[dict[str, Any]], copy_rate: float) -> str:
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    lines = [
        "# Routing: scores to indices and weights",
        "",
        f"{torch.cuda.get_device_name()}, {versions}; a large copy moves {copy_rate:.2f} TB/s (read and written). "
        f"fp32, k = n/{FRACTION}, soft k = 9/8 k, ε = 1. Microseconds, medians. *GPU*: device time a call in a CUDA "
        "graph of several calls. *wall*: called eagerly, synchronised. *replay*: one call's graph replayed, "
        "synchronised. The peer is colt5-attention 0.11.2's Triton path, then torch.topk and gather.",
        "",
        "| rows × n | forward GPU | backward GPU | topk GPU | copy GPU | forward wall | fwd+bwd wall | fwd+bwd replay "
        "| peer 50 fwd+bwd wall / replay | peer 20 fwd+bwd wall / replay | times faster (50): wall / replay "
        "| peak MiB fwd+bwd, ours / peer |",
        "| --- " * 12 + "|",
    ]
    for result in results:
        ours = result["ours"]
        cells = [f"{result['rows']} × {result['n']:,}"]
        cells += [f"{value:.1f}" for value in (ours["forward GPU"], ours["backward GPU"], result["topk GPU"])]
        cells += [f"{result['copy GPU']:.1f}"]
        cells += [f"{ours[key]:.0f}" for key in ("forward wall", "both wall", "both replay")]
        peers = [result.get(name) for name in PEER_SETTINGS]
        cells += ["–" if p is None else f"{p['both wall']:.0f} / {p['both replay']:.0f}" for p in peers]
        memory = f"{ours['both peak bytes'] / 2**20:.2f}"
        if peers[0] is None:
            cells += ["–", memory]
        else:
            wall_ratio, replay_ratio = (peers[0][key] / ours[key] for key in ("both wall", "both replay"))
            peer_memory = f"{peers[0]['both peak bytes'] / 2**20:.2f}"
            cells += [f"{wall_ratio:.1f} / {replay_ratio:.1f}", f"{memory} / {peer_memory}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def measure_copy_rate() -> float:
    """TB/s of a copy far larger than the caches, bytes read and written."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / graph_times(lambda: target.copy_(source), 5)[0] / 1e6


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peer", type=Path)
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    copy_rate = measure_copy_rate()
    peer = load_peer(arguments.peer) if arguments.peer else None
    results = []
    for rows, n in (*WITH_PEER, *OURS_ALONE):
        result = benchmark(rows, n, peer)
        results.append(result)
        print(json.dumps(result, default=lambda value: math.nan), flush=True)
        # written as it grows: a run cut short keeps what it has
        (arguments.out / "router.md").write_text(table(results, copy_rate))
        settings = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
        (arguments.out / "router.json").write_text(json.dumps({**settings, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
