"""Times of the attention kernels against FlexAttention, SDPA and the PyTorch references; verifies before it times.

python benchmarks/attention.py            the table
python benchmarks/attention.py --sweep    tile sizes, best first: what op_attention_triton.BLOCKS is chosen from
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
import triton
from measure import gpu_ms, make_parser, median_ms, parse, peak_mib
from peers import DEVICE, DTYPE
from results import Table
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from modeling_colt5 import op_attention, op_attention_triton
from modeling_colt5.op_attention import (
    local_attention,
    local_attention_reference,
    routed_attention,
    routed_attention_reference,
)

# the base size
LIGHT_HEADS, HEAVY_HEADS, HEAD_SIZE, RADIUS, MAX_DISTANCE = 4, 8, 64, 127, 128
# bf16 rounds probabilities and results by 2^-8 at most, a third of that in the mean, over at most three steps
TOLERANCE = 8e-3

Inputs = list[torch.Tensor]


def band_inputs(length: int, batch: int = 1) -> Inputs:
    """Query, key, value as views of one fused projection, and the table."""
    fused = torch.randn(batch, length, 3, LIGHT_HEADS, HEAD_SIZE, device=DEVICE, dtype=DTYPE)
    fused[:, :, :2] *= HEAD_SIZE**-0.25
    return [*fused.unbind(2), torch.randn(LIGHT_HEADS, 2 * MAX_DISTANCE + 1, device=DEVICE)]


def routed_inputs(length: int) -> tuple[Inputs, Inputs]:
    """Query, key, value and table, and then positions of 1/16 and 1/8 of a sequence's tokens and the keys' mask."""
    queries, keys = length // 16, length // 8
    scale = HEAD_SIZE**-0.25
    states = [
        torch.randn(1, count, HEAVY_HEADS, HEAD_SIZE, device=DEVICE, dtype=DTYPE) * factor
        for count, factor in ((queries, scale), (keys, scale), (keys, 1.0))
    ]
    table = torch.randn(HEAVY_HEADS, 2 * MAX_DISTANCE + 1, device=DEVICE)
    positions = [torch.randperm(length, device=DEVICE)[:count].sort().values[None] for count in (queries, keys)]
    return [*states, table], [*positions, torch.ones(1, keys, dtype=torch.bool, device=DEVICE)]


def forward_and_backward(attend: Callable[..., torch.Tensor], inputs: Inputs) -> Callable[[], object]:
    """A call that runs `attend` and the gradients of all its inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    cotangent = torch.randn(attend(*inputs).shape, device=DEVICE, dtype=DTYPE)
    return lambda: torch.autograd.grad(attend(*leaves), leaves, cotangent)


def verify(attend: Callable[..., torch.Tensor], exact: Callable[..., torch.Tensor], inputs: Inputs) -> None:
    """Raise where output or a gradient of `attend` is not that of `exact` in float64."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    exact_leaves = [tensor.detach().double().requires_grad_() for tensor in inputs]
    output, expected = attend(*leaves), exact(*exact_leaves)
    cotangent = torch.randn_like(output)
    gradients = torch.autograd.grad(output, leaves, cotangent)
    exact_gradients = torch.autograd.grad(expected, exact_leaves, cotangent.double())
    names = ("output", "query", "key", "value", "table")
    for name, ours, theirs in zip(names, (output, *gradients), (expected, *exact_gradients), strict=True):
        error = ((ours.double() - theirs).norm() / theirs.norm()).item()
        if not error < TOLERANCE:
            raise AssertionError(f"{name}: relative error {error:.1e}")


def measured(
    name: str, length: int, attend: Callable[..., torch.Tensor], inputs: Inputs, backward: bool, tiny: bool
) -> dict:
    """One row of the table; a failure (out of memory, a kernel that does not compile) is what the row then says."""
    row: dict[str, object] = {"attention": name, "n": length}
    calls: dict[str, Callable[[], Callable[[], object]]] = {"forward": lambda: lambda: attend(*inputs)}
    if backward:
        calls["forward+backward"] = lambda: forward_and_backward(attend, inputs)
    for label, prepare in calls.items():
        try:
            call = prepare()
            # several in a graph, so that the start of a replay does not count; few of what is large
            row[f"{label}: GPU ms"] = gpu_ms(*[call] * (1 if tiny else 10 if length <= 65_536 else 2), tiny=tiny)
            row[f"{label}: eager ms"] = median_ms(call, tiny)
            row[f"{label}: MiB"] = peak_mib(call)
        except Exception as error:  # noqa: BLE001 - whatever a peer raises belongs in the table
            row[f"{label}: GPU ms"] = type(error).__name__
    return row


def band_block_mask(length: int) -> BlockMask:
    """FlexAttention's mask of the band: blocks of 128 queries meet their own block of keys and the two beside it."""
    block = torch.arange(-(-length // 128), device=DEVICE)
    neighbours = (block[None, :] - block[:, None]).abs() <= -(-RADIUS // 128)
    counts = neighbours.sum(1, dtype=torch.int32)
    indices = neighbours.int().argsort(dim=1, descending=True, stable=True).int()
    return BlockMask.from_kv_blocks(
        counts[None, None],
        indices[None, None],
        BLOCK_SIZE=128,
        mask_mod=lambda b, h, q, k: (q - k).abs() <= RADIUS,
        seq_lengths=(length, length),
    )


def compare(options: argparse.Namespace) -> None:
    """The table; a tiny one leaves out the peers that compile."""
    tiny = options.tiny
    compiled_flex = torch.compile(flex_attention, dynamic=False)
    compiled_band = torch.compile(lambda *states: local_attention_reference(*states, RADIUS)[0], dynamic=False)
    compiled_routed = torch.compile(lambda *states: routed_attention_reference(*states)[0], dynamic=False)
    title = (
        f"Attention at base size ({LIGHT_HEADS} light and {HEAVY_HEADS} heavy heads of {HEAD_SIZE}, radius {RADIUS}, "
        "learned bias, bf16, batch 1; routed: n/16 queries, n/8 keys). GPU: median of CUDA-graph replays, inputs as "
        "warm in the L2 as they fit; eager: median wall time of one call; MiB: peak beyond the inputs"
    )
    table = Table("attention", title, options)
    for length in [64] if tiny else options.lengths:
        if time.perf_counter() > options.deadline:
            table.note(f"Not measured for lack of time: from n = {length:,} on.")
            break
        backward = length <= 65_536
        states = band_inputs(length)
        routed, fixed = routed_inputs(length)

        def band(*inputs: torch.Tensor) -> torch.Tensor:
            return local_attention(*inputs, RADIUS)

        def band_reference(*inputs: torch.Tensor) -> torch.Tensor:
            return local_attention_reference(*inputs, RADIUS)[0]

        def heavy(*inputs: torch.Tensor, fixed: Inputs = fixed) -> torch.Tensor:
            return routed_attention(*inputs, *fixed)

        def heavy_reference(*inputs: torch.Tensor, fixed: Inputs = fixed) -> torch.Tensor:
            return routed_attention_reference(*inputs, *fixed)[0]

        if backward:
            verify(band, band_reference, states)
            verify(heavy, heavy_reference, routed)
        table.add(measured("band, kernel", length, band, states, backward, tiny))
        table.add(measured("routed, kernel", length, heavy, routed, backward, tiny))
        if not backward:
            continue
        table.add(measured("band, SDPA in blocks with a bias", length, band_reference, states, True, tiny))
        table.add(measured("routed, SDPA with a bias", length, heavy_reference, routed, True, tiny))
        if tiny:
            continue
        blocks = band_block_mask(length)

        def flex(*inputs: torch.Tensor, blocks: BlockMask = blocks) -> torch.Tensor:
            query, key, value = (tensor.transpose(1, 2) for tensor in inputs)
            return compiled_flex(query, key, value, block_mask=blocks, scale=1.0).transpose(1, 2)

        def heavy_compiled(*inputs: torch.Tensor, fixed: Inputs = fixed) -> torch.Tensor:
            return compiled_routed(*inputs, *fixed)

        table.add(measured("band, FlexAttention without bias", length, flex, states[:3], True, tiny))
        table.add(measured("band, SDPA in blocks with a bias, compiled", length, compiled_band, states, True, tiny))
        table.add(measured("routed, SDPA with a bias, compiled", length, heavy_compiled, routed, True, tiny))
    table.finish()


# (queries, keys, warps, stages)
CANDIDATES = {
    ("forward", False): [
        (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (128, 64, 4, 3), (128, 64, 8, 3),
        (128, 128, 8, 2), (64, 128, 4, 2), (64, 32, 4, 3), (64, 64, 8, 3),
    ],
    ("forward", True): [
        (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (128, 64, 4, 3), (128, 64, 8, 3),
        (128, 128, 8, 2), (64, 128, 4, 2), (64, 128, 4, 3), (64, 128, 8, 2),
    ],
    ("backward_query", False): [
        (64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (64, 64, 8, 3),
        (128, 128, 8, 1), (128, 128, 8, 2), (32, 32, 4, 2),
    ],
    ("backward_query", True): [
        (64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (128, 64, 8, 2),
        (64, 128, 8, 2), (64, 32, 4, 3), (64, 128, 4, 2),
    ],
    ("backward_key", False): [
        (64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (64, 128, 8, 2),
        (32, 64, 4, 3), (32, 128, 4, 2), (128, 64, 8, 2), (32, 128, 8, 2),
    ],
    ("backward_key", True): [
        (64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (64, 128, 8, 2),
        (32, 64, 4, 3), (32, 128, 4, 2), (128, 64, 8, 2), (32, 128, 8, 2),
    ],
}  # fmt: skip


def sweep_call(kernel: str, routed: bool, length: int) -> Callable[[], object]:
    """A call of the forward or of the whole backward at this length."""
    if routed:
        (query, key, value, table), (query_positions, key_positions, mask) = routed_inputs(length)
    else:
        query, key, value, table = band_inputs(length)
        query_positions = key_positions = mask = None
    inputs = (query, key, value, table, None, RADIUS, query_positions, key_positions, mask, 0.0, None)
    if kernel == "forward":
        return lambda: op_attention._attention.kernel(*inputs)
    results = op_attention._attention.kernel(*inputs)
    cotangent = torch.randn_like(results[0])
    return lambda: op_attention._attention.gradient.kernel(cotangent, *inputs, *results, [True] * 4)


def kind_of(routed: bool) -> str:
    """What is read, as `BLOCKS` names it."""
    return op_attention_triton.AMONG_ROUTED if routed else op_attention_triton.BAND


def compile_candidate(candidate: tuple[str, bool, tuple[int, int, int, int]]) -> None:
    """Run a candidate once, so that its binary is in Triton's cache on disk."""
    kernel, routed, blocks = candidate
    op_attention_triton.BLOCKS[kernel, kind_of(routed)] = blocks
    try:
        sweep_call(kernel, routed, 1024)()
        torch.cuda.synchronize()
    except triton.runtime.errors.OutOfResources:
        return


def sweep(lengths: Iterable[int]) -> None:
    """Print the candidates of each kernel by GPU time; a backward kernel's time includes the other one's."""
    candidates = [(*kernel, blocks) for kernel, choices in CANDIDATES.items() for blocks in choices]
    with ProcessPoolExecutor(10, get_context("spawn")) as pool:
        list(pool.map(compile_candidate, candidates))
    for ((kernel, routed), choices), length in itertools.product(CANDIDATES.items(), lengths):
        default, times = op_attention_triton.BLOCKS[kernel, kind_of(routed)], []
        for blocks in choices:
            op_attention_triton.BLOCKS[kernel, kind_of(routed)] = blocks
            try:
                times.append((gpu_ms(sweep_call(kernel, routed, length)), blocks))
            except triton.runtime.errors.OutOfResources:
                continue
        op_attention_triton.BLOCKS[kernel, kind_of(routed)] = default
        ranking = ", ".join(f"{blocks} {1e3 * time:.1f}" for time, blocks in sorted(times))
        print(f"{kernel}, {'routed' if routed else 'band'}, n = {length}, µs: {ranking}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The table, or the sweep."""
    parser = make_parser(__doc__)
    parser.add_argument("--sweep", action="store_true", help="times of tile sizes instead of the table")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16_384, 65_536, 1_048_576])
    options = parse(parser, arguments)
    torch.manual_seed(0)
    if options.sweep:
        sweep(length for length in options.lengths if length <= 65_536)
    else:
        compare(options)


if __name__ == "__main__":
    main()
