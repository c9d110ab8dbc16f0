"""Times routing against colt5-attention's Triton path, torch.topk and a copy of the scores; verifies before it times.

python benchmarks/router.py --peer FOLDER                      all rows, the most important first
python benchmarks/router.py --rows 8x131072 1x1048576          some of them

FOLDER holds an unpacked colt5-attention 0.11.2 (`pip download --no-deps colt5-attention==0.11.2`, then unzip; it need
not be installed). Without it only our numbers are taken.
"""

import argparse
import importlib
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from measure import captured, gpu_ms, make_parser, median_ms, parse, peak_mib
from peers import DEVICE
from results import Row, Table, render

from modeling_colt5.op_routing import route

# those that targets name stand first
ROWS = (
    (8, 131072), (1, 1 << 20), (4, 16384), (32, 16384), (1, 131072), (8, 65536), (1, 65536), (8, 4096),
    (1, 1 << 22), (1, 262144),
)  # fmt: skip
TINY_ROWS = ((2, 64), (1, 300))
LONGEST_OF_PEER = 131072
FRACTION = 16
PEER_SETTINGS = {
    "peer, 50 iterations": {"n_iters": 50, "eps": 1.0, "checkpoint_segments": 10},
    "peer, 20 scaled": {"n_iters": 20, "eps": 1.0, "eps_init": 4.0, "eps_decay": 0.7, "checkpoint_segments": 4},
}
TITLE = (
    f"Routing: scores to indices and weights. fp32, k = n/{FRACTION}, soft k = 9/8 k, ε = 1. Microseconds, medians. "
    "GPU: device time a call in a CUDA graph of several calls. Eager: called from Python, the device waited for. "
    "One thread: the same with autograd in the calling thread (torch.autograd.set_multithreading_enabled(False)), "
    "without the hand-over to the thread that PyTorch keeps for a device. "
    "Graph: one call's CUDA graph replayed, the device waited for. Copy: the scores read and written once at the "
    "rate of a large copy. The peer is colt5-attention 0.11.2's Triton path, then torch.topk and gather"
)

Routing = Callable[[torch.Tensor], torch.Tensor]


def load_peer(folder: Path) -> Callable[..., torch.Tensor]:
    """The peer's kernel without its __init__, which imports another package that routing does not use."""
    package = types.ModuleType("colt5_attention")
    package.__path__ = [str(folder / "colt5_attention")]
    sys.modules["colt5_attention"] = package
    return importlib.import_module("colt5_attention.triton_coor_descent").triton_coor_descent


def wall_us(call: Callable[[], object], tiny: bool) -> float:
    """`measure.median_ms` in microseconds, of more calls, because one is short and the host uneven."""
    return 1e3 * median_ms(call, tiny, least=5, most=300, seconds=0.25)


def one_thread_us(call: Callable[[], object], tiny: bool) -> float:
    """`wall_us` with autograd in the calling thread."""
    with torch.autograd.set_multithreading_enabled(False):
        return wall_us(call, tiny)


def gpu_us(call: Callable[[], object], calls: int, tiny: bool) -> float:
    """Median microseconds of device time of a call, in a graph of several."""
    return 1e3 * gpu_ms(*[call] * (1 if tiny else calls), tiny=tiny)


def forward_and_backward(routing: Routing, scores: torch.Tensor) -> Callable[[], None]:
    """A call of both, which keeps nothing: in a graph, later calls take the memory of earlier ones."""
    cotangent = torch.randn_like(routing(scores))

    def both() -> None:
        leaf = scores.detach().requires_grad_()
        torch.autograd.grad(routing(leaf), leaf, cotangent)

    return both


def verify(scores: torch.Tensor, budget: torch.Tensor, k: int) -> float:
    """The largest error of our weights against the float64 reference; raises where anything is wrong."""
    leaf, exact = scores.detach().requires_grad_(), scores.double().requires_grad_()
    routed, expected = route(leaf, budget, k), route(exact, budget, k, kernel_backend="torch")
    chosen = scores.gather(-1, routed.indices).sort(-1, descending=True).values
    if not torch.equal(chosen, scores.topk(k).values) or not torch.equal(routed.indices, expected.indices):
        raise AssertionError("not the largest scores, or not in order of position")
    cotangent = torch.randn_like(routed.weights)
    (gradient,) = torch.autograd.grad(routed.weights, leaf, cotangent)
    (exact_gradient,) = torch.autograd.grad(expected.weights, exact, cotangent.double())
    error = float((routed.weights.detach() - expected.weights.detach()).abs().max())
    # fp32 holds the exponents to 2.4e-7, and sums of many add to it; gradients reach twice the largest cotangent
    if error > 2e-6 or (gradient - exact_gradient).abs().max() > 4e-6 * cotangent.abs().max():
        raise AssertionError(f"weights are off by {error:.1e}, or their gradient is off")
    return error


def wanted_times(rows: int, n: int) -> int:
    """How many times as fast as the peer's 50 iterations eager forward and backward should be."""
    return 100 if rows * n >= 8 * 131072 else 10 if n >= 65536 else 5


def measure_ours(rows: int, n: int, copy_rate: float, tiny: bool) -> tuple[Row, torch.Tensor]:
    """Our columns of a row, and the scores."""
    k = n // FRACTION
    scores = torch.randn(rows, n, device=DEVICE)
    budget = torch.full((rows,), k, device=DEVICE)
    row: Row = {"rows": rows, "n": n, "largest error": verify(scores, budget, k)}

    def routing(s: torch.Tensor) -> torch.Tensor:
        return route(s, budget, k).weights

    def forward() -> None:
        routing(scores)

    def topk() -> None:
        scores.topk(k)

    both = forward_and_backward(routing, scores)
    calls = 20 if rows * n <= 1 << 20 else 5
    row["forward GPU"] = gpu_us(forward, calls, tiny)
    both_gpu = gpu_us(both, calls, tiny)
    # timings of a toy run on the CPU can differ the other way
    row["backward GPU"] = both_gpu - row["forward GPU"] if DEVICE.type == "cuda" else None
    row["topk GPU"] = gpu_us(topk, calls, tiny)
    row["below topk"] = "yes" if row["forward GPU"] <= row["topk GPU"] else "no"
    row["copy"] = 1e6 * 2 * 4 * scores.numel() / copy_rate
    row["4 copies + 60"] = 4 * row["copy"] + 60
    row["forward within"] = "yes" if row["forward GPU"] <= row["4 copies + 60"] else "no"
    row["forward eager"] = wall_us(forward, tiny)
    row["fwd+bwd eager"] = wall_us(both, tiny)
    row["fwd+bwd one thread"] = one_thread_us(both, tiny)
    row["fwd+bwd graph"] = wall_us(captured(both), tiny)
    row["forward MiB"], row["fwd+bwd MiB"] = peak_mib(forward), peak_mib(both)
    return row, scores


def measure_peer(row: Row, scores: torch.Tensor, peer: Callable[..., torch.Tensor], tiny: bool) -> Row:
    """The peer's columns, beside ours of the same run."""
    rows, n = scores.shape
    k = n // FRACTION
    # a number for k is copied to the device at every call, which a graph cannot capture
    soft_k = torch.full((rows,), k * 9 / 8, device=DEVICE)
    budget = torch.full((rows,), k, device=DEVICE)
    expected = route(scores.double(), budget, k, kernel_backend="torch")
    columns: Row = {}
    for name, settings in PEER_SETTINGS.items():

        def routing(s: torch.Tensor, settings: dict[str, float] = settings) -> torch.Tensor:
            return peer(s, k=soft_k, **settings).gather(-1, s.detach().topk(k).indices)

        weights = peer(scores, k=soft_k, **settings).gather(-1, expected.indices)
        columns[f"{name}: from the optimum"] = float((weights - expected.weights).abs().max())
        both = forward_and_backward(routing, scores)
        columns[f"{name}: fwd+bwd eager"] = eager = wall_us(both, tiny)
        columns[f"{name}: fwd+bwd one thread"] = one_thread = one_thread_us(both, tiny)
        columns[f"{name}: fwd+bwd graph"] = graph = wall_us(captured(both), tiny)
        columns[f"{name}: fwd+bwd MiB"] = peak_mib(both)
        if name == "peer, 50 iterations":
            columns["times as fast, eager"] = eager / row["fwd+bwd eager"]
            columns["wanted, eager"] = wanted_times(rows, n)
            columns["times as fast, one thread"] = one_thread / row["fwd+bwd one thread"]
            columns["times as fast, graph (10 wanted)"] = graph / row["fwd+bwd graph"]
    return columns


def measure_copy_rate(tiny: bool) -> float:
    """Bytes a second, read and written, of a copy far larger than the caches."""
    source = torch.randn(1 << (10 if tiny else 29), device=DEVICE)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / (1e-6 * gpu_us(lambda: target.copy_(source), 5, tiny))


def parse_rows(text: str) -> tuple[int, int]:
    """`8x131072` as (8, 131072).

    Raises:
        ArgumentTypeError: for anything else.
    """
    rows, _, n = text.partition("x")
    if not (rows.isdigit() and n.isdigit() and int(rows) and int(n) >= FRACTION):
        raise argparse.ArgumentTypeError(f"{text!r}; it must be rows x tokens, such as 8x131072")
    return int(rows), int(n)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure row by row, and keep each as it is measured."""
    parser = make_parser(__doc__)
    parser.add_argument("--peer", type=Path, help="folder with an unpacked colt5-attention 0.11.2")
    parser.add_argument("--rows", nargs="+", type=parse_rows, metavar="ROWSxN", help="what to measure instead of all")
    options = parse(parser, arguments)
    torch.manual_seed(0)
    peer = load_peer(options.peer) if options.peer else None
    table = Table("router", TITLE, options)
    copy_rate = measure_copy_rate(options.tiny)
    table.note(f"A large copy moves {copy_rate / 1e12:.2f} TB/s, read and written.")
    left_out = []
    for rows, n in options.rows or (TINY_ROWS if options.tiny else ROWS):
        if time.perf_counter() > options.deadline:
            left_out.append(f"{rows} × {n:,}")
            continue
        row, scores = measure_ours(rows, n, copy_rate, options.tiny)
        if peer is not None and n <= LONGEST_OF_PEER:
            try:
                row |= measure_peer(row, scores, peer, options.tiny)
            except (RuntimeError, ValueError, AssertionError) as error:  # out of memory, or a shape that it refuses
                row["note"] = f"the peer fails: {type(error).__name__}"
        table.add(row)
    if left_out:
        table.note(f"Not measured for lack of time: {', '.join(left_out)}.")
    if left_out or options.rows:
        render("router", options.out)
    else:
        table.finish()


if __name__ == "__main__":
    main()
