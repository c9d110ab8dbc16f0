"""Encoders of base width and 4 layers on the CPU, fp32: time and memory against length, CoLT5 beside LongT5.

python benchmarks/encoder_cpu.py [--lengths 1024 4096 16384] [--repeats 5 5 3]
"""

import contextlib
import ctypes
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

import torch
from measure import make_parser, parse
from peers import COLT5, GLOBAL, LOCAL, colt5_config, longt5_config
from results import Table
from torch import nn
from transformers import LongT5EncoderModel

from modeling_colt5 import CoLT5EncoderModel

TITLE = (
    "Encoders of base width and 4 layers on the CPU, fp32, one sequence of n tokens: medians, the encoders in turns; "
    "peak resident memory beyond weights and inputs"
)


def make_encoders(tiny: bool) -> dict[str, nn.Module]:
    """The three encoders with random weights."""
    encoders: dict[str, nn.Module] = {}
    for name in (GLOBAL, LOCAL):
        torch.manual_seed(0)
        config = longt5_config(name, tiny)
        config.num_layers = min(config.num_layers, 4)
        encoders[name] = LongT5EncoderModel(config).eval()
    torch.manual_seed(0)
    config = colt5_config(tiny)
    config.num_layers = min(config.num_layers, 4)
    encoders[COLT5] = CoLT5EncoderModel(config).eval()
    return encoders


def verify(encoders: dict[str, nn.Module]) -> None:
    """Check outputs before anything is timed.

    Raises:
        AssertionError: for an output of another shape or that is not finite, or where CoLT5 as timed differs from its
            attention and gradients written out.
    """
    ids = torch.randint(2, encoders[COLT5].config.vocab_size, (2, 700))
    mask = (torch.arange(700) < torch.tensor([[700], [512]])).long()
    for name, encoder in encoders.items():
        output = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        assert output.shape == (2, 700, encoder.config.d_model) and output.isfinite().all(), name

    encoder = encoders[COLT5]
    results = []
    for implementation in ("sdpa", "eager"):
        encoder.set_attn_implementation(implementation)
        encoder.zero_grad()
        output = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        (output.square() * mask[..., None]).mean().backward()
        gradients = [parameter.grad.clone() for parameter in encoder.parameters()]
        results.append([output.detach() * mask[..., None], *gradients])
    encoder.set_attn_implementation("sdpa")
    for value, reference in zip(*results, strict=True):
        # fp32 sums in another order, through four layers
        assert (value - reference).norm() <= 1e-4 * reference.norm()
    print("verified: shapes, finite outputs, CoLT5 equal to its eager attention with all gradients", flush=True)


@contextlib.contextmanager
def memory_limit() -> Iterator[None]:
    """A case too large for this machine fails on its own, and takes no other process with it."""
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvail"))
    resource.setrlimit(resource.RLIMIT_DATA, (int(0.6 * 1024 * int(available.split()[1])), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def memory_kib(field: str) -> int:
    """A field of this process's status: VmRSS, the memory that it holds, or VmHWM, the most that it held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def measure(call: Callable[[], object]) -> tuple[float, float, float]:
    """Wall and CPU milliseconds of one call, and the MiB that it held at most beyond what was held before."""
    # hand freed memory back, and forget the earlier maximum
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_kib("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return 1e3 * wall, 1e3 * cpu, (memory_kib("VmHWM") - before) / 1024


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all encoders at all lengths, in turns, so that a change of the machine's load meets all alike."""
    parser = make_parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--repeats", type=int, nargs="+", default=[5, 5, 3], help="for each length")
    options = parse(parser, arguments, needs_gpu=False)
    lengths, repeats = ([200], [2]) if options.tiny else (options.lengths, options.repeats)
    load = os.getloadavg()[0]
    with memory_limit():
        encoders = make_encoders(options.tiny)
        verify(encoders)
        table = Table("encoder_cpu", f"{TITLE}; {os.cpu_count()} cores, load {load:.1f} before", options)
        for length, count in zip(lengths, repeats, strict=True):
            if time.perf_counter() > options.deadline:
                table.note(f"Not measured for lack of time: from n = {length:,} on.")
                break
            for row in compare(encoders, length, count):
                table.add(row)
        table.finish()


def compare(encoders: dict[str, nn.Module], length: int, repeats: int) -> list[dict[str, object]]:
    """The rows of one length."""
    ids = torch.randint(2, encoders[COLT5].config.vocab_size, (1, length))

    def forward(encoder: nn.Module) -> None:
        with torch.no_grad():
            encoder(input_ids=ids)

    def forward_backward(encoder: nn.Module) -> None:
        encoder(input_ids=ids).last_hidden_state.square().mean().backward()

    rows: dict[str, dict[str, object]] = {name: {"n": length, "runs": repeats, "encoder": name} for name in encoders}
    for title, call in (("forward", forward), ("forward + backward", forward_backward)):
        runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in encoders}
        for _ in range(repeats + 1):
            for name, encoder in encoders.items():
                try:
                    runs[name].append(measure(lambda encoder=encoder, call=call: call(encoder)))
                except RuntimeError as error:
                    if "allocate memory" not in str(error):
                        raise
                encoder.zero_grad(set_to_none=True)
        slowest: float | None = None
        for name, row in rows.items():
            # the first run of each warms up
            wall, cpu, peak = map(list, zip(*runs[name][1:], strict=True)) if runs[name][1:] else ([], [], [])
            row[f"{title}: ms"] = median(wall) if wall else None
            # another process on the same cores stretches the wall time, but hardly the CPU time
            row[f"{title}: CPU ms"] = median(cpu) if cpu else None
            if name == GLOBAL:
                slowest = row[f"{title}: CPU ms"]
            row[f"{title}: CPU, × transient-global"] = slowest / median(cpu) if cpu and slowest else None
            row[f"{title}: peak MiB"] = max(peak, default=None)
            print(name, length, title, [round(milliseconds) for milliseconds in wall], flush=True)
    return list(rows.values())


if __name__ == "__main__":
    main()
