"""What every benchmark needs: its common options, wall and GPU times, peak memory, and a name for the device."""

import argparse
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"

Call = Callable[[], object]


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser of the options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results, which are added to it")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further measurement after these")
    parser.add_argument("--commit", help="what was measured, where there is no git to ask")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, two repeats: does it run at all?")
    return parser


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, needs_gpu: bool = True
) -> argparse.Namespace:
    """The options, and with them `deadline` on the clock of `time.perf_counter`."""
    options = parser.parse_args(arguments)
    if needs_gpu and not options.tiny and not torch.cuda.is_available():
        parser.error("needs a CUDA device; --tiny runs without")
    if options.tiny and options.out.resolve() == RESULTS.resolve():
        parser.error("--tiny needs a folder of its own (--out): its numbers say nothing")
    options.deadline = time.perf_counter() + options.seconds
    return options


def describe_device() -> dict[str, str]:
    """The device and the versions that a number belongs to."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        device = (
            f"{models[0].split(':')[1].strip() if models else platform.machine()}, {torch.get_num_threads()} threads"
        )
    description = {"device": device, "python": platform.python_version()}
    for package in ("torch", "triton", "transformers"):
        try:
            description[package] = version(package)
        except PackageNotFoundError:
            description[package] = "not installed"
    return description


def describe_commit() -> str:
    """The commit of this checkout, with "+" where files differ from it; "unknown" outside of git."""
    try:
        commit = ["git", "-C", str(RESULTS), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(commit, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_ms(call: Call, tiny: bool = False, least: int = 3, most: int = 15, seconds: float = 2.0) -> float:
    """The median wall time of a call in milliseconds, the device waited for before and after each.

    `torch.utils.benchmark` and `triton.testing.do_bench` measure something else where a GPU waits for its host, as in
    most calls here: the one times blocks of calls, the other calls by events, and in both the host runs ahead.
    `Timer.timeit(1)` would time single calls, each after two that are not counted, which takes three times as long.

    Args:
        call: what to time; its first calls warm up and are not counted.
        tiny: two calls instead of the numbers that follow.
        least, most, seconds: at least and at most so many calls, and between the two as many as fit in the time.
    """
    start = time.perf_counter()
    for _ in range(1 if tiny else 3):
        call()
        synchronize()
        if time.perf_counter() - start > 1:
            break
    times: list[float] = []
    while len(times) < 2 or not tiny and (len(times) < least or len(times) < most and sum(times) < 1e3 * seconds):
        start = time.perf_counter()
        call()
        synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def captured(*calls: Call) -> Call:
    """A call that replays the calls' kernels as one CUDA graph; without CUDA, one that makes the calls.

    What the calls return stays alive between replays, so that each writes memory of its own; a replay returns it.
    """
    if not torch.cuda.is_available():
        return lambda: [call() for call in calls]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # so that the graph has cuBLAS's workspaces in memory of its own: one that was there before goes with an older
    # graph, or when Inductor or an encoder records (https://github.com/pytorch/pytorch/issues/193402)
    torch._C._cuda_clearCublasWorkspaces()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]
    torch._C._cuda_clearCublasWorkspaces()

    def replay() -> list[object]:
        graph.replay()
        return results

    return replay


def gpu_ms(*calls: Call, tiny: bool = False) -> float:
    """The median GPU time of one of the calls in milliseconds, from replays of a CUDA graph of all: no launch gaps.

    `triton.testing.do_bench_cudagraph` is much the same, but leaves cuBLAS's workspaces in its graph's memory, which
    `captured` avoids.
    """
    replay = captured(*calls)
    if not torch.cuda.is_available():
        return median_ms(replay, tiny) / len(calls)
    replay()
    times = []
    for _ in range(2 if tiny else 20):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(calls))
    return statistics.median(times)


def peak_mib(call: Call) -> float | None:
    """The most GPU memory that a call takes beyond what was allocated before it, in MiB; None without CUDA."""
    if not torch.cuda.is_available():
        call()
        return None
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def matrix_rate(tiny: bool = False) -> float:
    """FLOP a second of a large product of bf16 matrices: the ceiling for what a model can reach on this device."""
    size = 64 if tiny else 8192
    device = "cuda" if torch.cuda.is_available() else "cpu"
    left, right = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / (1e-3 * gpu_ms(*[lambda: left @ right] * 4, tiny=tiny))
