"""What an encoder pass is made of: launches and GPU time by kernel, from PyTorch's profiler.

python benchmarks/encoder_kernels.py
"""

from collections.abc import Sequence

import torch
from encoder import BOTH, FORWARD, both_call, forward_call, new_step, verify
from measure import Call, make_parser, parse, synchronize
from peers import COLT5, DEVICE, DTYPE, make_encoder, random_ids, scaled_length
from results import Row, Table
from torch.profiler import ProfilerActivity, profile

LENGTH = 16_384
REPEATS = 3
# kernels of less than this share of a pass are one row
SMALL = 0.005
TITLE = (
    f"One eager pass of a base-size encoder, bf16, {LENGTH:,} tokens: launches, and milliseconds that the GPU is busy "
    f"with them, by kernel; the mean of {REPEATS} passes. On the CPU operations instead"
)


def measure(call: Call) -> list[Row]:
    """A row for each kernel, the longest first, and one for all."""
    for _ in range(REPEATS):
        call()
    synchronize()
    activity = ProfilerActivity.CUDA if DEVICE.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        for _ in range(REPEATS):
            call()
        synchronize()
    time_of = "self_device_time_total" if DEVICE.type == "cuda" else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, time_of))
    kernels = [(event.key, event.count / REPEATS, getattr(event, time_of) / 1e3 / REPEATS) for event in events]
    kernels = [kernel for kernel in kernels if kernel[2] > 0]
    total = ("all", sum(count for _, count, _ in kernels), sum(ms for *_, ms in kernels))
    large = [kernel for kernel in kernels if kernel[2] >= SMALL * total[2]]
    small = kernels[len(large) :]
    others = (f"{len(small)} others", sum(count for _, count, _ in small), sum(ms for *_, ms in small))
    return [
        {"kernel": name[:80], "launches": max(1, round(count)), "ms": ms}
        for name, count, ms in (total, *large, others)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Verify, then look at both passes."""
    options = parse(make_parser(__doc__), arguments)
    verify(options.tiny)
    table = Table("encoder_kernels", TITLE, options)
    model = make_encoder(COLT5, options.tiny)
    torch.manual_seed(0)
    ids = random_ids(1, scaled_length(LENGTH, options.tiny), options.tiny)
    mask = torch.ones_like(ids)
    cotangent = torch.randn(*ids.shape, model.config.d_model, device=DEVICE, dtype=DTYPE)
    both = new_step(both_call(model, ids, mask, cotangent), model)
    for name, call in ((FORWARD, forward_call(model, ids, mask)), (BOTH, both)):
        for row in measure(call):
            table.add({"pass": name} | row)
    table.finish()


if __name__ == "__main__":
    main()
