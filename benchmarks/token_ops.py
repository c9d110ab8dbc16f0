"""Times of the token operations against their PyTorch references and the copy bandwidth; verifies before it times.

python benchmarks/token_ops.py             the tables
python benchmarks/token_ops.py --compile   with a column of the references under torch.compile
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from measure import gpu_ms, make_parser, parse, synchronize
from peers import DEVICE
from results import Table
from torch import Tensor
from torch.utils import benchmark

from modeling_colt5.op_gelu import gated_gelu
from modeling_colt5.op_norm import rms_norm_scores
from modeling_colt5.op_rows import combine_branches, share_and_gather

# the base size
D_MODEL, LIGHT_FF, HEAVY_FF = 768, 1024, 8192
EPS = 1e-6
DTYPE = torch.bfloat16
# bf16 rounds by 2^-9 at most, a few times in a chain; the interpreter truncates, twice that
TOLERANCE = 1.5e-2
# inputs that the timed calls take in turn, so that the cache holds none of them
INPUT_SETS = 4

Operation = Callable[..., tuple[Tensor, ...]]


@dataclass
class Case:
    """One operation: what it runs, on which inputs, and how many bytes it has to move.

    Args:
        name: the row's name.
        run: `(backend, *inputs)` → outputs; the inputs that are floating point get gradients.
        make: draws inputs.
        forward_bytes, backward_bytes: what must be read and written, once each.
    """

    name: str
    run: Operation
    make: Callable[[], list[Tensor]]
    forward_bytes: float
    backward_bytes: float


def routing(length: int, count: int) -> list[Tensor]:
    """Indices, validity and weights of one row that uses all its slots."""
    indices = torch.randperm(length, device=DEVICE)[:count].sort().values[None]
    return [indices, torch.ones_like(indices, dtype=torch.bool), torch.rand(1, count, device=DEVICE)]


def cases(n: int, d: int = D_MODEL, light_ff: int = LIGHT_FF, heavy_ff: int = HEAVY_FF) -> list[Case]:
    """The operations of an encoder layer at length n."""
    queries, keys = n // 16, n // 8
    width = DTYPE.itemsize

    def rows(*shape: int) -> Tensor:
        return torch.randn(1, *shape, device=DEVICE, dtype=DTYPE)

    def vectors(count: int) -> list[Tensor]:
        return [torch.randn(d, device=DEVICE, dtype=DTYPE), torch.randn(count, d, device=DEVICE, dtype=DTYPE)]

    def norm(backend: str, states: Tensor, weight: Tensor, routers: Tensor) -> tuple[Tensor, ...]:
        return rms_norm_scores(states, weight, routers, EPS, backend)

    def share(
        backend: str, states: Tensor, indices: Tensor, valid: Tensor, _: Tensor, *second: Tensor
    ) -> tuple[Tensor, ...]:
        return share_and_gather(states, (indices, valid, None), second, kernel_backend=backend)

    def combine(backend: str, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (combine_branches(*inputs, backend),)

    def gelu(backend: str, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (gated_gelu(*inputs, backend),)

    dense, routed, gathered = n * d * width, queries * d * width, (queries + keys) * d * width

    def make_branches() -> list[Tensor]:
        return [rows(n, d), rows(n, d), rows(queries, d), *routing(n, queries)]

    def make_share() -> list[Tensor]:
        return [rows(n, d), *routing(n, queries), *routing(n, keys)]

    return [
        Case("norm, 2 routers", norm, lambda: [rows(n, d), *vectors(2)], 2 * dense, 3 * dense),
        Case("share and gather, 2 routings", share, make_share, 2 * gathered, 2 * dense + 3 * gathered),
        Case("combine", combine, make_branches, 3 * dense + routed, 3 * routed),
        Case(
            "gated GELU, light",
            gelu,
            lambda: [rows(n, light_ff), rows(n, light_ff)],
            3 * n * light_ff * width,
            5 * n * light_ff * width,
        ),
        Case(
            "gated GELU, heavy",
            gelu,
            lambda: [rows(queries, heavy_ff), rows(queries, heavy_ff)],
            3 * queries * heavy_ff * width,
            5 * queries * heavy_ff * width,
        ),
    ]


def with_gradients(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The inputs as leaves."""
    return [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in inputs]


def gradients(run: Operation, backend: str, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
    """Forward and backward: the gradients of all floating-point inputs."""
    outputs = run(backend, *inputs)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    found = torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


def verify(case: Case) -> None:
    """Raise unless values and gradients agree with the reference in float64."""
    inputs = case.make()
    exact = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
    results = list(case.run("triton", *inputs))
    expected = list(case.run("torch", *exact))
    cotangents = [torch.randn_like(output) for output in results]
    results += gradients(case.run, "triton", with_gradients(inputs), cotangents)
    expected += gradients(case.run, "torch", with_gradients(exact), [c.double() for c in cotangents])
    for position, (result, oracle) in enumerate(zip(results, expected, strict=True)):
        error = ((result.double() - oracle).norm() / oracle.norm()).item()
        if not error < TOLERANCE:
            raise RuntimeError(f"{case.name}: result {position} is off by {error:.1e}")


def host_microseconds(call: Callable[[], object], tiny: bool) -> float:
    """The median host time of a call whose GPU work is too small to be waited for."""
    # a clock that waits for no device; 200 calls in all, so that the GPU's queue never fills up
    timer = benchmark.Timer("call()", globals={"call": call}, timer=time.perf_counter)
    blocks = [timer.timeit(1 if tiny else 20) for _ in range(2 if tiny else 10)]
    synchronize()
    return 1e6 * statistics.median(block.mean for block in blocks)


def copy_bandwidth(tiny: bool) -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.randn(2**10 if tiny else 2**28, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / (1e-3 * gpu_ms(lambda: target.copy_(source), tiny=tiny))


def time_case(case: Case, n: int, bandwidth: float, compiles: bool, tiny: bool) -> dict[str, object]:
    """One row of the table, in microseconds of GPU time."""
    sets = [case.make() for _ in range(INPUT_SETS)]
    leaves = [with_gradients(inputs) for inputs in sets]
    cotangents = [torch.randn_like(output) for output in case.run("torch", *sets[0])]

    def both(run: Operation, backend: str) -> tuple[float, float]:
        with torch.no_grad():
            forward = gpu_ms(*[lambda i=inputs: run(backend, *i) for inputs in sets], tiny=tiny)
        calls = [lambda i=inputs: gradients(run, backend, i, cotangents) for inputs in leaves]
        return 1e3 * forward, 1e3 * gpu_ms(*calls, tiny=tiny)

    forward, total = both(case.run, "triton")
    torch_forward, torch_total = both(case.run, "torch")
    row: dict[str, object] = {
        "operation": case.name,
        "n": n,
        "forward µs": forward,
        "of bandwidth": f"{case.forward_bytes / bandwidth * 1e6 / forward:.0%}",
        "forward+backward µs": total,
        "of bandwidth ": f"{(case.forward_bytes + case.backward_bytes) / bandwidth * 1e6 / total:.0%}",
        "PyTorch forward µs": torch_forward,
        "PyTorch forward+backward µs": torch_total,
    }
    if compiles:
        compiled = torch.compile(case.run, fullgraph=True)
        row["compiled forward µs"], row["compiled forward+backward µs"] = both(compiled, "torch")
    return row


def time_host(case: Case, tiny: bool) -> dict[str, object]:
    """Host microseconds of a call on few tokens, where the GPU has next to nothing to do."""
    inputs = case.make()
    leaves = with_gradients(inputs)
    cotangents = [torch.randn_like(output) for output in case.run("torch", *inputs)]
    with torch.no_grad():
        forward = host_microseconds(lambda: case.run("triton", *inputs), tiny)
        torch_forward = host_microseconds(lambda: case.run("torch", *inputs), tiny)
    return {
        "operation": case.name,
        "no gradient": forward,
        "gradient wanted": host_microseconds(lambda: case.run("triton", *leaves), tiny),
        "forward+backward": host_microseconds(lambda: gradients(case.run, "triton", leaves, cotangents), tiny),
        "PyTorch, no gradient": torch_forward,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Verify, then time."""
    parser = make_parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16_384, 65_536])
    parser.add_argument("--compile", action="store_true", help="also time the references under torch.compile")
    options = parse(parser, arguments)
    tiny = options.tiny
    torch.manual_seed(0)

    def sized(n: int) -> list[Case]:
        return cases(32, d=48, light_ff=64, heavy_ff=128) if tiny else cases(n)

    for case in sized(4096):
        verify(case)
        print(f"{case.name}: values and gradients agree with float64", flush=True)
    host = Table("token_ops_host", "Host time of the token operations' calls, µs", options)
    for case in sized(256):
        host.add(time_host(case, tiny))
    host.finish()
    bandwidth = copy_bandwidth(tiny)
    title = f"Token operations in bf16, GPU time from CUDA graphs; a copy moves {bandwidth / 1e12:.2f} TB/s"
    table = Table("token_ops", title, options)
    for n in [32] if tiny else options.lengths:
        if time.perf_counter() > options.deadline:
            table.note(f"Not measured for lack of time: from n = {n:,} on.")
            break
        for case in sized(n):
            table.add(time_case(case, n, bandwidth, options.compile and n == options.lengths[0], tiny))
    table.finish()


if __name__ == "__main__":
    main()
