"""What each compiled kernel takes of a multiprocessor, on every generation of cards, without a card.

    python benchmarks/kernel_variants.py [--jobs 2] [--quick]

The kernels are launched as models launch them, on tensors of the CPU, with a launch that only notes what Triton would
compile: kernels, dtypes, what it specialises integers on, constants and options. Then every variant is compiled for
every generation, and the table results/kernel_variants.md says which takes the most shared memory, beside what the
generation's cards have. `--quick` compiles of each kernel the variant that should need most, and one generation for
several that plan memory alike (`stands_for`).
"""

import argparse
import contextlib
import functools
import importlib
import inspect
import itertools
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# compiled here, not interpreted; Triton reads it when it decorates a kernel
os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from modeling_colt5 import (
    op_attention,
    op_attention_gradient_triton,
    op_attention_triton,
    op_dropout,
    op_dropout_triton,
    op_gates,
    op_gates_triton,
    op_gelu,
    op_gelu_triton,
    op_grid_attention_gradient_triton,
    op_grid_attention_triton,
    op_norm,
    op_norm_triton,
    op_pools,
    op_pools_triton,
    op_routing,
    op_routing_gradient_triton,
    op_routing_triton,
    op_rows,
    op_rows_triton,
    op_step_attention_triton,
    op_step_products_triton,
    run_launch_triton,
)

WRAPPERS = (
    op_attention_triton, op_attention_gradient_triton, op_dropout_triton, op_gates_triton, op_pools_triton,
    op_gelu_triton, op_routing_triton, op_routing_gradient_triton, op_norm_triton, op_rows_triton,
    op_grid_attention_triton, op_grid_attention_gradient_triton, op_step_attention_triton,
    op_step_products_triton,
)  # fmt: skip


class Generation(NamedTuple):
    """Cards of one compute capability: the shared memory of one program at most and of a multiprocessor, in bytes."""

    cards: str
    program: int
    multiprocessor: int


GENERATIONS = {
    75: Generation("T4, RTX 20", 65_536, 65_536),
    80: Generation("A100", 166_912, 167_936),
    86: Generation("RTX 30, A10, A40", 101_376, 102_400),
    89: Generation("RTX 40, L4, L40S", 101_376, 102_400),
    90: Generation("H100, H200", 232_448, 233_472),
    100: Generation("B200", 232_448, 233_472),
    120: Generation("RTX 50", 101_376, 102_400),
}
TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32",
    torch.bool: "*i1",
}  # fmt: skip


class Variant(NamedTuple):
    """All that Triton's code generation looks at. `kinds` are the arguments': a type, or ("constant", c)."""

    module: str
    kernel: str
    kinds: tuple[Any, ...]
    num_warps: int
    num_stages: int
    together: int


def kind_of(argument: Any, parameter: Any) -> Any:
    """A pointer or number's type, with /16 where Triton knows it to be a multiple of 16; or a constant."""
    if parameter.is_constexpr or argument is None:
        return "constant", argument
    if isinstance(argument, torch.Tensor):
        return TYPES[argument.dtype] + "/16"
    if isinstance(argument, float):
        return "fp32"
    width = "i32" if argument < 2**31 else "i64"
    if parameter.do_not_specialize:
        return width
    return ("constant", 1) if argument == 1 else width if argument % 16 else width + "/16"


@contextlib.contextmanager
def recorded(variants: set[Variant], capability: int = 90) -> Iterator[None]:
    """Inside, kernels are not launched, but what they would be compiled for on a card of the capability is noted."""

    def note(
        kernel: Any, grid: Any, *arguments: Any, num_warps: int = 4, num_stages: int = 3, together: int = 0,
        **constants: Any,
    ) -> None:  # fmt: skip
        arguments += tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
        kinds = tuple(kind_of(*pair) for pair in zip(arguments, kernel.params, strict=True))
        variants.add(Variant(kernel.__module__, kernel.__name__, kinds, num_warps, num_stages, together))

    with contextlib.ExitStack() as undo:
        for module in WRAPPERS:
            undo.callback(setattr, module, "launch", module.launch)
            module.launch = note
        large = GENERATIONS[capability].program >= op_attention_triton.LARGE_SHARED_MEMORY
        answers = {
            (op_routing_triton, "_multiprocessors"): 132,
            (op_attention_triton, "_has_large_shared_memory"): large,
        }
        for (module, question), answer in answers.items():
            undo.callback(setattr, module, question, getattr(module, question))
            setattr(module, question, lambda device, answer=answer: answer)
        yield


def record(capability: int = 90, quick: bool = False) -> set[Variant]:
    """The variants of all layers, dtypes and lengths; `quick`: a few of each kernel, the most demanding among them."""
    variants: set[Variant] = set()
    with recorded(variants, capability):
        attention_jobs(capability, quick)
        for job in (routing_jobs, causal_jobs, token_jobs):
            job(quick)
        step_jobs(capability, quick)
    return variants


def attention_jobs(capability: int, quick: bool) -> None:
    """Band and routed attention: light and heavy layers, and a decoder's attentions, to its memory without a bias; the
    first two over pictures too."""
    # bf16 goes to PyTorch on cards without it
    half = [torch.float16] if capability < 80 else [torch.bfloat16] if quick else [torch.float16, torch.bfloat16]
    sizes = (128,) if quick else (16, 32, 64, 96, 128)
    # where a program may have little memory, tiles of fp32 are the largest
    dtypes = half if quick and capability >= 80 else [*half, torch.float32]
    inputs = ((256, 0.1, 4, True),) if quick else itertools.product((200, 256), (0.0, 0.1), (1, 4), (False, True))
    for (n, dropout, kv_heads, masked), size, dtype in itertools.product(list(inputs), sizes, dtypes):
        query = torch.empty(2, n, 4, size, dtype=dtype)
        key = torch.empty(2, n, kv_heads, size, dtype=dtype)
        mask = torch.ones(2, n, dtype=torch.bool) if masked else None
        table = torch.empty(4, 257)
        seed = torch.zeros(1, dtype=torch.int64) if dropout else None
        positions = torch.arange(n).expand(2, n)
        # as long as a memory has to be for its sums to be split
        memory = torch.empty(2, 4096, kv_heads, size, dtype=dtype)
        memory_mask = torch.ones(2, 4096, dtype=torch.bool) if masked else None
        grid = torch.empty(4, 257, 257)
        nowhere, everywhere = (None, None), (positions, positions)
        kinds = [(key, table, None, 127, *nowhere, mask), (key, grid, 16, 3, *nowhere, mask)]
        kinds += [(key, table, None, n, *nowhere, mask), (memory, None, None, 4096, *nowhere, memory_mask)]
        if not quick:
            kinds += [(key, table, None, 0, *everywhere, mask), (key, grid, 16, 3, *everywhere, mask)]
        operator = op_attention._attention
        for keys, *rest in kinds:
            inputs = (query, keys, keys, *rest, dropout, seed)
            output, log_sum_exp = operator.kernel(*inputs)
            for wanted in (True,) if quick else (True, False):
                needs = [True, True, True, wanted]
                operator.gradient.kernel(output, *inputs, output, log_sum_exp, needs)


def routing_jobs(quick: bool) -> None:
    """Rows of one program each, and rows that programs share; both solvers."""
    lengths = (16384, 65536) if quick else (100, 2048, 4096, 8192, 16000, 16384, 16385, 32768, 65536, 300_000, 2**20)
    for n in lengths:
        for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
            scores = torch.empty(3, n, dtype=dtype)
            mask, lengths_ = torch.empty(3, n, dtype=torch.bool), torch.empty(3, dtype=torch.int64)
            for masks in ((mask, None),) if quick else ((None, None), (mask, None), (None, lengths_)):
                for solver in ("exact", "coordinate_descent"):
                    if not op_routing_triton.kernels_take(n, solver, scores.device):
                        continue
                    for soft in (torch.empty(3),) if quick else (None, torch.empty(3)):
                        budget, capacity = torch.empty(3, dtype=torch.int64), max(1, n // 8)
                        settings = (solver, 1.0, 50, 1.0, 1.0)
                        inputs = (scores, budget, soft, *masks, capacity, 9 / 8, *settings)
                        routed = op_routing._route.kernel(*inputs)
                        op_routing._route.gradient.kernel(routed[0], *inputs, *routed, [True, True])


def causal_jobs(quick: bool) -> None:
    """Gates and pools of a causal decoder."""
    for window in (4096,) if quick else (16, 128, 512, 1024, 4096):
        for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
            scores = torch.empty(2, 3, window, dtype=dtype)
            total, handed = torch.empty(2, dtype=torch.int64), torch.empty(2, 2)
            for past in ((total, handed),) if quick else ((total, handed), (None, None)):
                inputs = (scores, past[0], total, past[1], window // 16, window // 12, 5.0, 1.0, True)
                gates = op_gates._gates.kernel(*inputs)
                op_gates._gates.gradient.kernel(gates[0], gates[4], *inputs, *gates[:3], [True])
    for window, size in ((4096, 4096),) if quick else ((128, 128), (512, 1024), (4096, 4096)):
        scores, initial = torch.empty(2, 3 * window), torch.empty(2, size)
        given = (initial, torch.empty(2, size, dtype=torch.bool))
        for known in (given,) if quick else (given, (None, None)):
            inputs = (scores, *known, window, size)
            pooled = op_pools._candidates.kernel(*inputs)
            op_pools._candidates.gradient.kernel(pooled[0], *inputs, pooled[3], [True])
    for heads, d_kv in ((16, 128),) if quick else ((1, 64), (12, 64), (16, 128), (4, 16)):
        for dtype in (torch.float32,) if quick else (torch.bfloat16, torch.float32):
            states = torch.empty(2, 96, heads, d_kv, dtype=dtype)
            indices, weights = torch.empty(2, 4, 16, dtype=torch.int64), torch.empty(2, 4, 16)
            valid, following = weights.bool(), torch.empty(2, 4, 48, dtype=torch.int32)
            inputs = (states, states, indices, weights, valid, following, 0)
            keys, values = op_pools._pool_gather.kernel(*inputs)
            op_pools._pool_gather.gradient.kernel(keys, values, *inputs, [True] * 3)


def token_jobs(quick: bool) -> None:
    """Norms with router scores, sums of branches, gathers, the gated GELU and dropout."""
    for d in (2048,) if quick else (64, 512, 768, 1024, 2048, 4096):
        for dtype in (torch.float32,) if quick else (torch.float32, torch.float16, torch.bfloat16):
            states, norm = torch.empty(2, 96, d, dtype=dtype), torch.empty(d)
            indices = torch.empty(2, 16, dtype=torch.int64)
            routing = (indices, torch.empty(2, 16, dtype=torch.bool), torch.empty(2, 16))
            slots = torch.empty(2, 16, d, dtype=dtype)
            for routers in (3,) if quick else (0, 1, 2, 3):
                vectors = torch.empty(routers, d) if routers else None
                inputs = (states, norm, vectors, 1e-6, None)
                results = op_norm._norm.kernel(*inputs)
                op_norm_triton.norm_into(*inputs, *results, states, slots, *routing, states)
                scores = results[1] if routers else None
                for gradient in (states,) if quick else (states, None):
                    grads = (states, norm, vectors, gradient)
                    op_norm_triton.norm_backward_into(states, scores, *inputs, results[2], *grads)
            for base, light in ((states, states),) if quick else ((states, states), (states, None), (None, None)):
                for second in ((slots, *routing),) if quick else ((None,) * 4, (slots, *routing)):
                    op_rows._combine.kernel(base, light, slots, *routing, *second, 96)
            for second in (routing,) if quick else ((None,) * 3, routing):
                op_rows._gather.kernel(states, *routing, *second)
            op_rows._gather_dot.kernel(states, slots, *routing)
            for joined in ((norm,), (norm, norm), (norm, norm, norm)):
                op_rows_triton.join_into((torch.empty(len(joined), d, dtype=dtype), *joined))
            joins = [(torch.empty(count, d, dtype=dtype), *[norm] * count) for count in (2, 3, 4, 2)]
            for count in (2, 3, 4):
                op_rows_triton.join_into(*joins[:count])
            op_rows_triton.clamp_into(states, 1.0)
            op_gelu._gated_gelu.kernel(states, states)
            op_gelu._gated_gelu.gradient.kernel(states, states, states, [True, True])
            drop = (torch.empty(1, dtype=torch.int64), 0.1)
            op_dropout._dropout.kernel(states, *drop)
            op_gelu_triton.gated_gelu_into(states, states, states, *drop)
            op_gelu_triton.gated_gelu_backward_into(*[states] * 5, *drop, states)
            op_rows_triton.combine_into(states, states, slots, *routing, *[None] * 4, 96, states, *drop)
            inputs = (states, norm, torch.empty(1, d), 1e-6, None)
            op_norm_triton.norm_into(*inputs, *op_norm._norm.kernel(*inputs), states, slots, *routing, states, *drop)


def step_jobs(capability: int, quick: bool) -> None:
    """Attention of one new token in each row, to a cache and to a memory, and products with weights."""
    # straight lines of a decoder are in these dtypes
    dtypes = [torch.float32] if quick or capability < 80 else [torch.bfloat16, torch.float32]
    sizes = ((16, 16, 128),) if quick else ((12, 12, 64), (12, 1, 64), (32, 1, 128), (32, 32, 128), (4, 2, 20))
    for (heads, groups, d_kv), dtype, room in itertools.product(sizes, dtypes, (256, 16_384)):
        states = torch.empty(2, heads * d_kv, dtype=dtype)
        cache = torch.empty(2, groups, room, d_kv, dtype=dtype)
        parts = op_step_attention_triton.number_of_parts(2 * groups, room)
        places = [torch.empty(2, heads, parts, width) for width in (d_kv, 2)] if parts > 1 else []
        new, table = torch.empty(2, groups * d_kv, dtype=dtype), torch.empty(heads, 257)
        for mask in (
            (torch.ones(2, room, dtype=torch.bool),) if quick else (None, torch.ones(2, room, dtype=torch.bool))
        ):
            for own in ((new, new, table, mask, torch.empty(1, dtype=torch.int32)), (None, None, None, mask, None)):
                op_step_attention_triton.step_attention_into(states, *own, cache, cache, states, *places)
    for dtype, d in itertools.product(dtypes, (768,) if quick else (768, 1000)):
        states, norm, weight = (torch.empty(*shape, dtype=dtype) for shape in ((2, d), (d,), (2048, d)))
        wide = torch.empty(2, 2048, dtype=dtype)
        three, norm_of_sum = [weight] * 3, (states, states, norm, 1e-6)
        multiply = op_step_products_triton.step_products_into
        multiply(*norm_of_sum, weight, weight, None, states, wide, None, None)
        if not quick:
            multiply(*norm_of_sum, *three, states, wide, wide, wide)
            multiply(states, None, norm, 1e-6, *three, None, wide, wide, wide)
            multiply(*norm_of_sum, weight, None, None, states, wide, None, None)
            multiply(states, None, None, 0.0, weight, None, None, None, wide, None, None)
            multiply(states, None, None, 0.0, weight, weight, None, None, wide, None, None)
    routed_step_jobs(capability, quick)


def routed_step_jobs(capability: int, quick: bool) -> None:
    """The gate of a causally routed layer's new token, its attention to a ring and to a pool, and what a window's end
    hands on."""
    ranks, carried = (torch.empty(2, dtype=torch.int64),) * 2, torch.empty(2, 2, 2)
    slots = (torch.empty(2, 1), torch.empty(2, 1, dtype=torch.int64), torch.empty(2, 1, dtype=torch.bool))
    for window, routers in ((4096, 3),) if quick else itertools.product((16, 256, 4096), (1, 2, 3)):
        scores, ring = torch.empty(2, routers), torch.empty(2, 2 * window + 127)
        others = torch.empty(2, 2 * window + 127, routers - 1) if routers > 1 else None
        for fills in (True,) if quick else (False, True):
            op_gates_triton.token_gate_into(
                scores, *ranks, carried, ring, others, window, window // 16, window // 8, 1.0, fills, *slots
            )
        op_gates_triton.hand_thresholds_into(*ranks, ring, carried, window, window // 16, 18.0, 1.0)
    dtypes = [torch.float32] if quick or capability < 80 else [torch.bfloat16, torch.float32]
    sizes = ((2, 16, 128),) if quick else ((1, 12, 64), (1, 4, 64), (2, 16, 128), (1, 3, 20))
    for (groups, group, d_kv), dtype in itertools.product(sizes, dtypes):
        heads, size = groups * group, 512
        states, table = torch.empty(2, heads * d_kv, dtype=dtype), torch.empty(heads, 257)
        ring = torch.empty(2, 639, heads, d_kv, dtype=dtype)
        pool = torch.empty(2, 2, groups, size, group, d_kv, dtype=dtype)
        kinds = (torch.int64, torch.float32, torch.bool)
        rank, weight, used = (torch.empty(2, 2, groups, size, dtype=kind) for kind in kinds)
        new = (states, states, states, table, *ranks)
        op_step_attention_triton.local_step_attention_into(*new, ring, ring, 127, states)
        op_step_attention_triton.pool_step_attention_into(
            *new, slots[2], ring, ring, pool, pool, rank, weight, used, states
        )
        for window in (8192 - size,) if quick else (256, 4096, 8192 - size):
            kept = (weight, pool, pool, rank, weight, used)
            scores, sources = torch.empty(2, 639, groups), torch.empty(2, groups, size, dtype=torch.int32)
            op_pools_triton.hand_pool_into(*ranks, scores, ring, ring, *kept, window, 1.125, 1.0, sources)


class Cost(NamedTuple):
    """Bytes of shared memory that a program takes, or why it cannot be compiled."""

    shared: int
    error: str = ""


def compile_variant(variant: Variant, capability: int) -> Cost:
    """What the variant takes on cards of the capability."""
    kernel = getattr(importlib.import_module(variant.module), variant.kernel)
    signature, constants, attributes = {}, {}, {}
    for place, (name, kind) in enumerate(zip(kernel.arg_names, variant.kinds, strict=True)):
        if isinstance(kind, tuple):
            signature[name], constants[(place,)] = "constexpr", kind[1]
        else:
            signature[name], _, known = kind.partition("/")
            if known:
                attributes[(place,)] = [["tt.divisibility", 16]]
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    if variant.together:
        options |= run_launch_triton.options_together(variant.num_warps, variant.together)
    source = ASTSource(kernel, signature, constants, attributes)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:
        return Cost(0, f"{type(error).__name__}: {error}".splitlines()[0])
    return Cost(compiled.metadata.shared)


@functools.cache
def multiplies(module: str) -> bool:
    """Whether a file's kernels multiply matrices."""
    return "tl.dot(" in inspect.getsource(importlib.import_module(module))


def stands_for(variant: Variant, capability: int) -> int:
    """The generation that a quick run compiles the variant for in the place of the capability.

    Triton plans the memory of products by a capability's major number. In the table of all variants, that of other
    kernels is the same from 7.5 to 8.9, and from 9.0 to 12.0.
    """
    if multiplies(variant.module):
        return min(other for other in GENERATIONS if other // 10 == capability // 10)
    return min(GENERATIONS) if capability < 90 else max(GENERATIONS)


def fits(variant: Variant, cost: Cost, capability: int) -> bool:
    """Whether a program fits, and where programs wait for each other, as many of them as have to be there at once.

    Of a multiprocessor's memory the driver takes 1,024 bytes for each program.
    """
    generation = GENERATIONS[capability]
    at_once = variant.together * (cost.shared + 1024)
    return not cost.error and cost.shared <= generation.program and at_once <= generation.multiprocessor


def describe(variant: Variant) -> str:
    """The variant's constants by name."""
    kernel = getattr(importlib.import_module(variant.module), variant.kernel)
    constants = (
        f"{parameter.name}={kind[1]}"
        for parameter, kind in zip(kernel.params, variant.kinds, strict=True)
        if parameter.is_constexpr
    )
    return f"{variant.kinds[0]}, {', '.join(constants)}, {variant.num_warps} warps"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--quick", action="store_true", help="a few variants of each kernel, and no table written")
    options = parser.parse_args()
    work = [(variant, capability) for capability in GENERATIONS for variant in record(capability, options.quick)]
    work.sort(key=str)
    # what is compiled for each: (variant, capability)
    compiled = [
        (variant, stands_for(variant, capability) if options.quick else capability) for variant, capability in work
    ]
    once = list(dict.fromkeys(compiled))
    with ProcessPoolExecutor(options.jobs) as pool:
        cost_of = dict(zip(once, pool.map(compile_variant, *zip(*once, strict=True)), strict=True))
    costs = [cost_of[key] for key in compiled]
    lines = []
    failures = 0
    for kernel in sorted({variant.kernel for variant, _ in work}):
        cells = []
        for capability in GENERATIONS:
            of_kernel = [
                (cost.shared, variant, cost)
                for (variant, at), cost in zip(work, costs, strict=True)
                if at == capability and variant.kernel == kernel
            ]
            cells.append(f"{max(shared for shared, _, _ in of_kernel):,}")
            for _, variant, cost in of_kernel:
                if not fits(variant, cost, capability):
                    failures += 1
                    print(f"sm_{capability} {kernel} {cost.shared:,} {cost.error} ({describe(variant)})")
        lines.append(f"| {kernel} | {len({v for v, _ in work if v.kernel == kernel})} | {' | '.join(cells)} |")
    head = " | ".join(f"sm_{capability}: {generation.cards}" for capability, generation in GENERATIONS.items())
    limits = " | ".join(f"{generation.program:,}" for generation in GENERATIONS.values())
    table = [
        f"| kernel | variants | {head} |",
        f"| --- | {' | '.join(['---:'] * (1 + len(GENERATIONS)))} |",
        *lines,
        f"| what a program may have | | {limits} |",
    ]
    print("\n".join(table))
    if not options.quick:
        text = [
            "# Shared memory of the kernels, bytes",
            "",
            f"Triton {triton.__version__}, compiled without a card: of each kernel the variant that takes most.",
            "",
            *table,
        ]
        results = Path(__file__).parent / "results"
        (results / "kernel_variants.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
