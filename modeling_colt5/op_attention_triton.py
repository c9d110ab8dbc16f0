"""Band and routed attention by Triton: tile sizes, operands in the kernels' layout, launches."""

import functools
from typing import Any

import torch

from .op_attention_kernels_triton import (
    attention_backward_key_kernel,
    attention_backward_query_kernel,
    attention_forward_kernel,
)
from .run_backend import INTERPRETED
from .run_launch_triton import launch, next_power_of_2

# (queries, keys, warps, stages) of a tile, by kernel and by whether positions are given; the rest of the head
# sizes and dtypes take others below. From benchmarks/attention.py --sweep on one H200; of two within 5 %, the one
# with less shared memory, so that smaller cards have room.
BLOCKS = {
    ("forward", False): (64, 64, 4, 3),
    ("forward", True): (64, 128, 4, 2),
    ("backward_query", False): (64, 64, 4, 1),
    ("backward_query", True): (64, 64, 4, 3),
    ("backward_key", False): (64, 64, 4, 1),
    ("backward_key", True): (64, 64, 4, 1),
}


# bytes of shared memory from which on the tiles of large heads fit; they take up to 98,304
LARGE_SHARED_MEMORY = 98_304


@functools.cache
def _has_large_shared_memory(device: torch.device) -> bool:
    """Whether a program may have `LARGE_SHARED_MEMORY`: not on NVIDIA's cards before Ampere, nor on AMD's."""
    # without a card launches are recorded at most, as those on one with much of it
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
        # without tensor cores a product's operands live in registers: smaller tiles and more warps, or they spill
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
    """What the three kernels share: operands in the kernels' layout, sizes, and what decides about a kernel's code."""

    __slots__ = ("code", "operands", "routed", "sizes")

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias_table: torch.Tensor,
        radius: int,
        query_positions: torch.Tensor | None,
        key_positions: torch.Tensor | None,
        mask: torch.Tensor | None,
        dropout: float,
        seed: torch.Tensor | None,
    ):
        _, num_queries, heads, head_size = query.shape
        _, num_keys, kv_heads, _ = key.shape
        # rows may lie anywhere, their elements side by side
        query, key, value = (
            states if states.stride(3) == 1 else states.contiguous() for states in (query, key, value)
        )
        if query_positions is not None and key_positions is not None:
            self.routed, radius = True, 0
            query_positions, key_positions = query_positions.contiguous(), key_positions.contiguous()
        else:
            self.routed, radius = False, min(radius, num_keys - 1)
        if mask is not None:
            mask = mask.contiguous()
        bias_table = bias_table.float().contiguous()
        max_distance = bias_table.shape[1] // 2
        self.operands = (query, key, value, bias_table, query_positions, key_positions, mask, seed)
        strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3])
        self.sizes = (*strides, num_queries, num_keys, radius, max_distance)
        dtype = query.dtype
        tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
        is_large = _has_large_shared_memory(query.device)
        self.code = (dtype, heads, kv_heads, head_size, self.routed, radius >= max_distance, dropout, tf32, is_large)

    def options(self, kernel: str) -> tuple[int, int, tuple[Any, ...], dict[str, int]]:
        return _launch_options(kernel, BLOCKS[kernel, self.routed], *self.code)


def attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias_table: torch.Tensor,
    radius: int,
    query_positions: torch.Tensor | None,
    key_positions: torch.Tensor | None,
    mask: torch.Tensor | None,
    dropout: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Band attention, or routed attention where positions are given (then `radius` is not read).

    Args:
        query: fp16, bf16 or fp32 [batch, queries, heads, d_kv], any strides.
        key, value: [batch, keys, key/value heads, d_kv], any strides.
        bias_table: [heads, 2 * max_distance + 1], max_distance ≥ 1.
        radius: positions to each side.
        query_positions, key_positions: int64 [batch, queries] and [batch, keys], or None for the band.
        mask: bool [batch, keys], True for keys to read; None for all.
        dropout: probability of dropping an attention probability.
        seed: int64 [1], of what is dropped; read where `dropout` is above 0.

    Returns:
        The output [batch, queries, heads, d_kv] and the log-sum-exp of the scores, fp32 [batch, heads, queries].
    """
    batch, num_queries, heads, _ = query.shape
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    log_sum_exp = query.new_empty((batch, heads, num_queries), dtype=torch.float32)
    if output.numel() == 0 or key.numel() == 0:
        return output.zero_(), log_sum_exp.zero_()
    problem = _Problem(query, key, value, bias_table, radius, query_positions, key_positions, mask, dropout, seed)
    block_q, _, constants, options = problem.options("forward")
    launch(
        attention_forward_kernel, (-(-num_queries // block_q), heads, batch),
        *problem.operands, output, log_sum_exp,
        *problem.sizes, *constants, **options,
    )  # fmt: skip
    return output, log_sum_exp


def attention_backward(
    output_gradient: torch.Tensor,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias_table: torch.Tensor,
    radius: int,
    query_positions: torch.Tensor | None,
    key_positions: torch.Tensor | None,
    mask: torch.Tensor | None,
    dropout: float,
    seed: torch.Tensor | None,
    table_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of `attention_forward`, each sum in a fixed order.

    Args:
        output_gradient: [batch, queries, heads, d_kv].
        output, log_sum_exp: what `attention_forward` returned for the other arguments.
        table_gradient: whether the table's gradient is wanted.

    Returns:
        The gradients of query, key and value in their dtypes, contiguous, and of the table in fp32 (zeros where not
        wanted).
    """
    query_gradient, key_gradient, value_gradient = (
        torch.empty_like(states, memory_format=torch.contiguous_format) for states in (query, key, value)
    )
    if query.numel() == 0 or key.numel() == 0:
        gradients = (query_gradient.zero_(), key_gradient.zero_(), value_gradient.zero_())
        return *gradients, torch.zeros_like(bias_table, dtype=torch.float32)
    problem = _Problem(query, key, value, bias_table, radius, query_positions, key_positions, mask, dropout, seed)
    output_gradient = output_gradient.contiguous()
    delta = torch.empty_like(log_sum_exp)
    batch, num_queries, heads, _ = query.shape

    block_q, _, constants, options = problem.options("backward_query")
    num_blocks = -(-num_queries // block_q)
    num_partials = num_queries if problem.routed else num_blocks
    partials = None
    if table_gradient:
        shape = (batch, heads, num_partials, bias_table.shape[1])
        partials = torch.zeros(shape, dtype=torch.float32, device=query.device)
    launch(
        attention_backward_query_kernel, (num_blocks, heads, batch),
        *problem.operands, output, log_sum_exp, output_gradient, delta, query_gradient, partials,
        *problem.sizes, num_partials, table_gradient, *constants, **options,
    )  # fmt: skip

    _, block_k, constants, options = problem.options("backward_key")
    launch(
        attention_backward_key_kernel, (-(-key.shape[1] // block_k), key.shape[2], batch),
        *problem.operands, log_sum_exp, output_gradient, delta, key_gradient, value_gradient,
        *problem.sizes, *constants, **options,
    )  # fmt: skip
    if partials is None:
        return query_gradient, key_gradient, value_gradient, torch.zeros_like(bias_table, dtype=torch.float32)
    return query_gradient, key_gradient, value_gradient, partials.sum((0, 2))
