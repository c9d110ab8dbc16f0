"""The launches of band and routed attention, and their tile sizes.

The kernels are one family: with the positions of routed tokens, or without for a band.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .kernel_backend import INTERPRETED
from .op_attention_forward_triton import attention_forward_kernel
from .op_attention_gradient_triton import (
    attention_backward_key_kernel,
    attention_backward_query_kernel,
    table_sums_kernel,
)
from .run_launch_triton import adjacent, cdiv, launch, next_power_of_2

# A tile has these (queries, keys, warps, stages), by kernel and by whether positions are given; other head sizes and
# dtypes take others below. They are from benchmarks/attention.py --sweep on one H200; of two within 5 %, the one with
# less shared memory was taken, so that smaller cards have room.
BLOCKS = {
    ("forward", False): (64, 64, 4, 3),
    ("forward", True): (64, 128, 4, 2),
    ("backward_query", False): (64, 64, 4, 1),
    ("backward_query", True): (64, 64, 4, 3),
    ("backward_key", False): (64, 64, 4, 1),
    ("backward_key", True): (64, 64, 4, 1),
}

# Heads of more than 64 features take large tiles where a program may have at least this many bytes of shared memory.
LARGE_SHARED_MEMORY = 98_304


@functools.cache
def _has_large_shared_memory(device: torch.device) -> bool:
    """Whether a program may have `LARGE_SHARED_MEMORY`: not on NVIDIA's cards before Ampere, nor on AMD's."""
    # Without a card launches are recorded at most, and as those on a card with much shared memory.
    if INTERPRETED or device.type != "cuda":
        return True
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return shared >= LARGE_SHARED_MEMORY


@functools.lru_cache
def _launch_options(
    kernel: str,
    blocks: tuple[int, int, int, int],
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_size: int,
    routed: bool,
    wide: bool,
    dropout: float,
    tf32: bool,
    has_large_shared_memory: bool,
) -> tuple[int, int, tuple[Any, ...], dict[str, int]]:
    """A tile's queries and keys, a kernel's constants from HEADS on, and its warps and stages."""
    block_q, block_k, warps, stages = blocks
    block_d = max(16, next_power_of_2(head_size))
    if dtype == torch.float32:
        # Without tensor cores a product's operands live in registers: they would spill with larger tiles or fewer
        # warps.
        block_q, block_k, warps, stages = 32, 32, 8, 1
        if block_d > 64 and kernel != "forward" and not has_large_shared_memory:
            block_q, block_k, warps = 16, 16, 4
    elif block_d > 64 and not has_large_shared_memory:
        block_q, block_k, warps, stages = 32, 32, 4, 1
    elif block_d > 64:
        block_q, block_k, warps, stages = 64, 64, 4 if kernel == "forward" else 8, 1
    precision = "tf32" if tf32 else "ieee"
    constants = (
        heads, heads // kv_heads, head_size, block_d, routed, wide, dropout, precision, block_q, block_k,
    )  # fmt: skip
    return block_q, block_k, constants, {"num_warps": warps, "num_stages": stages}


class _Problem:
    """What the three kernels share: operands in the kernels' layout, sizes, and what decides about a kernel's code.

    Rows of query, key and value may lie anywhere, their elements side by side; the rest is contiguous, the table in
    fp32.
    """

    __slots__ = ("code", "operands", "routed", "sizes")

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias_table: Tensor,
        radius: int,
        query_positions: Tensor | None,
        key_positions: Tensor | None,
        mask: Tensor | None,
        dropout: float,
        seed: Tensor | None,
    ):
        query, key, value = (part if part.stride(3) == 1 else part.contiguous() for part in (query, key, value))
        _, num_queries, heads, head_size = query.shape
        _, num_keys, kv_heads, _ = key.shape
        self.routed = query_positions is not None and key_positions is not None
        radius = 0 if self.routed else min(radius, num_keys - 1)
        max_distance = bias_table.shape[1] // 2
        rest = map(adjacent, (bias_table.float(), query_positions, key_positions, mask, seed))
        self.operands = (query, key, value, *rest)
        strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3])
        self.sizes = (*strides, num_queries, num_keys, radius, max_distance)
        dtype = query.dtype
        tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
        is_large = _has_large_shared_memory(query.device)
        self.code = (dtype, heads, kv_heads, head_size, self.routed, radius >= max_distance, dropout, tf32, is_large)

    def options(self, kernel: str) -> tuple[int, int, tuple[Any, ...], dict[str, int]]:
        return _launch_options(kernel, BLOCKS[kernel, self.routed], *self.code)


def _multiplied_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that products are taken in: Triton's interpreter would multiply bfloat16 as if its bits were
    integers."""
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype


def _in_multiplied_dtype(first_result: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a launch, whose arguments are results from `first_result` on, work on copies in `_multiplied_dtype`."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def copied(*arguments: Any) -> None:
            states = arguments[0]
            copies = [
                part.to(_multiplied_dtype(states.dtype))
                if isinstance(part, Tensor) and part.dtype == states.dtype
                else part
                for part in arguments
            ]
            function(*copies)
            for result, copy in zip(arguments[first_result:], copies[first_result:], strict=True):
                if result is not copy:
                    result.copy_(copy)

        return copied if INTERPRETED else function

    return decorate


@_in_multiplied_dtype(first_result=10)
def attention_into(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias_table: Tensor,
    radius: int,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    mask: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    output: Tensor,
    log_sum_exp: Tensor,
) -> None:
    """Write `attention_reference` of op_attention.py to `output` [batch, queries, heads, d_kv], contiguous, and the
    log-sum-exp of the scores, fp32 [batch, heads, queries]."""
    batch, num_queries, heads, _ = query.shape
    if query.numel() == 0 or key.numel() == 0:
        output.zero_()
        log_sum_exp.zero_()
        return
    problem = _Problem(query, key, value, bias_table, radius, query_positions, key_positions, mask, dropout, seed)
    block_q, _, constants, options = problem.options("forward")
    launch(
        attention_forward_kernel, (cdiv(num_queries, block_q), heads, batch),
        *problem.operands, output, log_sum_exp,
        *problem.sizes, *constants, **options,
    )  # fmt: skip


def partial_sums(num_queries: int, head_size: int, dtype: torch.dtype, device: torch.device, routed: bool) -> int:
    """How many sums of the table's gradient the backward leaves of each head: of a band one of each block of queries,
    of routed attention one of each query."""
    if routed:
        return num_queries
    is_large = _has_large_shared_memory(device)
    code = (_multiplied_dtype(dtype), 1, 1, head_size, False, True, 0.0, False, is_large)
    return cdiv(num_queries, _launch_options("backward_query", BLOCKS["backward_query", False], *code)[0])


@_in_multiplied_dtype(first_result=13)
def attention_backward_into(
    output_gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias_table: Tensor,
    radius: int,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    mask: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    output: Tensor,
    log_sum_exp: Tensor,
    query_gradient: Tensor,
    key_gradient: Tensor,
    value_gradient: Tensor,
    table_gradient: Tensor | None,
    delta: Tensor | None = None,
    partials: Tensor | None = None,
) -> None:
    """Write the gradients of `attention_into`, each sum in a fixed order; None for `table_gradient` leaves it out.

    The gradients' heads lie side by side, their rows anywhere, those of key and value equally far apart. `delta` is
    room of log_sum_exp's shape, and `partials` of fp32 zeros [batch, heads, `partial_sums`, 2 * max_distance + 1];
    None takes some.
    """
    gradients = (query_gradient, key_gradient, value_gradient, table_gradient)
    if query.numel() == 0 or key.numel() == 0:
        for gradient in gradients:
            _ = None if gradient is None else gradient.zero_()
        return
    batch, num_queries, heads, head_size = query.shape
    problem = _Problem(query, key, value, bias_table, radius, query_positions, key_positions, mask, dropout, seed)
    delta = torch.empty_like(log_sum_exp) if delta is None else delta
    if table_gradient is None:
        partials, rows = None, 0
    else:
        rows = partial_sums(num_queries, head_size, query.dtype, query.device, problem.routed)
        if partials is None:
            shape = (batch, heads, rows, bias_table.shape[1])
            partials = torch.zeros(shape, dtype=torch.float32, device=query.device)
    output_gradient = output_gradient.contiguous()
    block_q, _, constants, options = problem.options("backward_query")
    launch(
        attention_backward_query_kernel, (cdiv(num_queries, block_q), heads, batch),
        *problem.operands, output, log_sum_exp, output_gradient, delta, query_gradient, partials,
        *problem.sizes, query_gradient.stride(1), rows, partials is not None, *constants, **options,
    )  # fmt: skip
    _, block_k, constants, options = problem.options("backward_key")
    launch(
        attention_backward_key_kernel, (cdiv(key.shape[1], block_k), key.shape[2], batch),
        *problem.operands, log_sum_exp, output_gradient, delta, key_gradient, value_gradient,
        *problem.sizes, key_gradient.stride(1), *constants, **options,
    )  # fmt: skip
    if partials is not None:
        width = bias_table.shape[1]
        launch(
            table_sums_kernel, (cdiv(width, 32), heads),
            partials, table_gradient, batch, rows, width, heads, 128, 32, num_warps=4,
        )  # fmt: skip
