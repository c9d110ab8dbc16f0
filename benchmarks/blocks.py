"""The layers on their own beside those of colt5-attention 0.11.2: numbers where both mean the same, then costs.

    python benchmarks/blocks.py [--peer FOLDER]

FOLDER holds colt5-attention 0.11.2, local-attention, hyper-connections and torch-einops-utils, without what they need
besides:

    pip install --no-deps --target FOLDER colt5-attention==0.11.2 local-attention hyper-connections torch-einops-utils

Both have the same sizes and budgets. Before anything is timed, feed-forward and attention of both get the same
weights, and states on which both compute the same function (see docs/blocks.md for what differs otherwise); outputs
and gradients of weights have to agree. A whole block and the causal attention of both are not the same functions:
they are timed alone. The peer runs in fp32, with its Triton router on CUDA, which takes no other dtype; matrix
products of fp32 may be in TF32 for both while they are timed.
"""

import importlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from encoder import release
from measure import make_parser, median_ms, parse, peak_mib
from peers import DEVICE, scaled_length
from results import Row, Table
from torch import Tensor, nn

from modeling_colt5 import (
    CoLT5CausalConditionalAttention,
    CoLT5ConditionalAttention,
    CoLT5ConditionalBlock,
    CoLT5ConditionalFeedForward,
    SoftTopK,
)

TITLE = (
    "Blocks of this project beside those of colt5-attention 0.11.2: d_model 512, light heads 8, heavy heads 8 of 64, "
    "light and heavy feed-forward of 256 and 2,048, queries and feed-forward 1/16, keys/values 1/8, batch 1, called "
    "eagerly; milliseconds and MiB"
)
PEER = "colt5-attention"
OURS = "CoLT5"
D_MODEL, D_KV, HEADS = 512, 64, 8
LIGHT_MULT, HEAVY_MULT = 0.5, 4
RADIUS = 64
WINDOW = 256
LENGTHS = (16384, 4096, 65536)
PARTS = ("feed-forward", "attention", "block", "causal attention")
# of the numbers that are compared: with ε = 1 few weights are 1, so that no choice hangs on a tie
SOFT_TOPK = SoftTopK(solver="coordinate_descent")
ROUTER = {"n_iters": 50, "eps": 1.0, "eps_init": None, "eps_decay": 1.0}
HIDDEN = {"light_d_ff": int(LIGHT_MULT * D_MODEL), "heavy_d_ff": HEAVY_MULT * D_MODEL, "feed_forward_proj": "gelu"}
SHAPE = {"d_kv": D_KV, "num_light_heads": HEADS, "num_heavy_heads": HEADS, "local_radius": RADIUS}


def make_ours(part: str, n: int, soft_topk: SoftTopK = SoftTopK()) -> nn.Module:  # noqa: B008
    """Our module."""
    if part == "feed-forward":
        return CoLT5ConditionalFeedForward(D_MODEL, **HIDDEN, soft_topk=soft_topk)
    if part == "attention":
        return CoLT5ConditionalAttention(D_MODEL, **SHAPE, soft_topk=soft_topk)
    if part == "block":
        return CoLT5ConditionalBlock(D_MODEL, **HIDDEN, **SHAPE, soft_topk=soft_topk)
    return CoLT5CausalConditionalAttention(D_MODEL, **SHAPE, causal_window=WINDOW, causal_routed_keys=n // 8)


def make_peer(part: str, n: int, **more: object) -> nn.Module:
    """The peer's, for inputs of n tokens: its budgets are numbers of tokens."""
    package = importlib.import_module("colt5_attention")
    use_triton = DEVICE.type == "cuda"
    feed_forward = {"light_ff_mult": LIGHT_MULT, "heavy_ff_mult": HEAVY_MULT}
    sizes = {"light_dim_head": D_KV, "light_heads": HEADS, "heavy_dim_head": D_KV, "heavy_heads": HEADS}
    if part == "feed-forward":
        return package.ConditionalRoutedFeedForward(
            D_MODEL, num_heavy_tokens=n // 16, **feed_forward, use_triton=use_triton, **more
        )
    if part == "attention":
        return package.ConditionalRoutedAttention(
            D_MODEL, num_heavy_tokens_q=n // 16, num_heavy_tokens_kv=n // 8, light_window_size=2 * RADIUS, **sizes,
            use_triton=use_triton, **more,
        )  # fmt: skip
    if part == "block":
        return package.ConditionalRoutedTransformerBlock(
            D_MODEL, num_heavy_attn_tokens_q=n // 16, num_heavy_attn_tokens_kv=n // 8, num_heavy_ff_tokens=n // 16,
            light_window_size=2 * RADIUS, **feed_forward, **sizes, use_triton=use_triton, **more,
        )  # fmt: skip
    return package.ConditionalRoutedAutoregressiveAttention(
        D_MODEL, num_heavy_tokens_q=WINDOW // 16, num_heavy_tokens_kv=n // 8, light_window_size=RADIUS,
        heavy_window_size=WINDOW, **sizes, use_triton=use_triton, **more,
    )  # fmt: skip


def same_for_every_norm(n: int) -> Tensor:
    """States that T5's norm, the peer's and LayerNorm leave as they are: mean 0 and mean square 1 in every token; the
    first number of each is 1."""
    rest = torch.randn(1, n, D_MODEL - 1, device=DEVICE)
    rest = rest - rest.mean(-1, keepdim=True)
    mean = -1 / (D_MODEL - 1)
    square = D_MODEL - 1 - (D_MODEL - 1) * mean**2
    rest = rest * (square / rest.square().sum(-1, keepdim=True)).sqrt() + mean
    return nn.functional.pad(rest, (1, 0), value=1.0)


@torch.no_grad()
def give_feed_forward(ours: nn.Module, peer: nn.Module) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Our weights for the peer, which has biases besides; pairs of weights and how many times as large its one is."""
    layer, pairs = ours.layer, {"router": (ours.layer.router.weight, peer.router.routing_token, 1.0)}
    for name, own, other in (
        ("light", layer.light_feed_forward, peer.light_ff), ("heavy", layer.heavy_feed_forward, peer.heavy_ff)
    ):  # fmt: skip
        other[1].bias.zero_()
        other[3].bias.zero_()
        pairs[f"{name} in"] = (own.wi.weight, other[1].weight, 1.0)
        pairs[f"{name} out"] = (own.wo.weight, other[3].weight, 1.0)
    for own, other, factor in pairs.values():
        other.copy_((factor * own).view(other.shape))
    return pairs


@torch.no_grad()
def give_attention(ours: nn.Module, peer: nn.Module) -> dict[str, tuple[Tensor, Tensor, float]]:
    """The same for attention. The peer divides scores by the root of the head's size, knows no bias by distance, and
    its heavy attention always reads a null key: the states' constant number makes that one's weight 0."""
    layer, light, heavy = ours.layer, peer.light_attn, peer.heavy_attn
    for bias in (ours.light_relative_attention_bias, ours.heavy_relative_attention_bias):
        bias.weight.zero_()
    query, key, value = (
        projection.weight.view(HEADS, D_KV, D_MODEL)
        for projection in (layer.heavy_attention.q, layer.heavy_attention.k, layer.heavy_attention.v)
    )
    query[:, 0] = 0
    query[:, 0, 0] = 1
    key[:, 0] = 0
    heavy.null_kv.zero_()
    heavy.null_kv[0, :, 0] = -1000
    scale = D_KV**0.5
    own = layer.light_attention
    light.to_qkv.weight.copy_(torch.cat([scale * own.q.weight, own.k.weight, own.v.weight]))
    light.to_out.weight.copy_(own.o.weight)
    own = layer.heavy_attention
    heavy.to_q.weight.copy_(scale * own.q.weight)
    heavy.to_kv.weight.copy_(torch.cat([key, value], 1).flatten(0, 1))
    heavy.to_out.weight.copy_(own.o.weight)
    peer.q_router.routing_token.copy_(layer.query_router.weight[None])
    peer.kv_router.routing_token.copy_(layer.key_value_router.weight[None])
    return {
        "query router": (layer.query_router.weight, peer.q_router.routing_token, 1.0),
        "key/value router": (layer.key_value_router.weight, peer.kv_router.routing_token, 1.0),
        "light out": (layer.light_attention.o.weight, light.to_out.weight, 1.0),
        "heavy query": (own.q.weight, heavy.to_q.weight, scale),
        "heavy out": (own.o.weight, heavy.to_out.weight, 1.0),
    }


def relative(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    return float((actual - expected).detach().norm() / expected.detach().norm())


def verify(n: int) -> str:
    """Raise where both mean the same and do not compute it; what was compared, in a sentence."""
    said = []
    for part, give in (("feed-forward", give_feed_forward), ("attention", give_attention)):
        torch.manual_seed(0)
        more = {} if part == "feed-forward" else {"multiply_keys_by_score": True, "use_null_q_tokens": False}
        ours = make_ours(part, n, SOFT_TOPK).to(DEVICE)
        peer = make_peer(part, n, router_straight_through=False, router_kwargs=ROUTER, **more).to(DEVICE)
        pairs = give(ours, peer)
        states = same_for_every_norm(n)
        # ours has the residual inside
        outputs = (ours(states) - states, peer(states))
        goal = torch.randn_like(states)
        first, second = (
            torch.autograd.grad((output * goal).sum(), [pair[place] for pair in pairs.values()])
            for place, output in enumerate(outputs)
        )
        errors = {"output": relative(*outputs)}
        for (name, (_, _, factor)), one, other in zip(pairs.items(), first, second, strict=True):
            errors[name] = relative(one, factor * other.view(one.shape))
        worst = max(errors, key=lambda name: errors[name])
        # TF32 inside kernels on CUDA; LayerNorm's epsilon of 1e-5, and the peer's solver in another order of sums
        if not errors[worst] < (2e-2 if DEVICE.type == "cuda" else 1e-3):
            raise AssertionError(f"{part}: relative errors {errors}")
        said.append(
            f"{part} {errors['output']:.1e} of the output, {errors[worst]:.1e} of the worst gradient ({worst})"
        )
    return f"Same weights, {n} tokens, coordinate descent with ε = 1, relative differences: {'; '.join(said)}."


def try_cross_attention() -> str:
    """What the peer's cross-attention does when called as its README says."""
    package = importlib.import_module("colt5_attention")
    module = package.ConditionalRoutedCrossAttention(dim=32, num_tokens_q=4, num_tokens_kv=4, dim_head=8, heads=2)
    try:
        module(torch.randn(1, 16, 32), torch.randn(1, 16, 32))
    except NameError as error:
        return f"The peer's cross-attention cannot be measured: its call ends with NameError, {error}."
    return "The peer's cross-attention runs; this script does not measure it."


def measure(table: Table, peer: Path | None, tiny: bool, deadline: float) -> None:
    """Rows of all lengths and parts."""
    makers: dict[str, tuple[Callable[[str, int], nn.Module], torch.dtype]] = {
        f"{OURS}, bf16": (make_ours, torch.bfloat16),
        f"{OURS}, fp32": (make_ours, torch.float32),
    }
    if peer is not None:
        makers[f"{PEER}, fp32"] = (make_peer, torch.float32)
    # whole numbers of windows, which the peer needs for exact budgets
    for n in dict.fromkeys(max(2 * WINDOW, scaled_length(length, tiny) // WINDOW * WINDOW) for length in LENGTHS):
        for part in PARTS:
            for name, (make, dtype) in makers.items():
                if time.perf_counter() > deadline:
                    table.note(f"Not measured for lack of time: {name}, {part}, at {n} tokens, and what follows.")
                    return
                table.add({"part": part, "class": name, "tokens": n} | costs(make, part, n, dtype, tiny))
                release()


def costs(make: Callable[[str, int], nn.Module], part: str, n: int, dtype: torch.dtype, tiny: bool) -> Row:
    """Time of a forward pass and of a training step's two passes, and the memory of these."""
    torch.manual_seed(0)
    try:
        module = make(part, n).to(DEVICE, dtype)
        states = torch.randn(1, n, D_MODEL, device=DEVICE, dtype=dtype, requires_grad=True)
        goal = torch.randn_like(states)
        # of a peer's module some parameters may be without use
        inputs = [states, *module.parameters()]

        def both() -> object:
            return torch.autograd.grad(module(states), inputs, goal, allow_unused=True)

        with torch.no_grad():
            row: Row = {"forward ms": median_ms(lambda: module(states), tiny)}
        row["MiB"] = peak_mib(both)
        row["forward+backward ms"] = median_ms(both, tiny)
    except torch.cuda.OutOfMemoryError:
        return {"remark": "out of memory"}
    return {column: value for column, value in row.items() if value is not None}


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare the numbers, then measure."""
    parser = make_parser(__doc__)
    parser.add_argument("--peer", type=Path, help="folder with the peer's packages")
    options = parse(parser, arguments)
    table = Table("blocks", TITLE, options)
    if options.peer is None:
        table.note("The peer was not measured: no --peer.")
    else:
        sys.path.insert(0, str(options.peer))
        table.note(verify(scaled_length(8192, options.tiny) // WINDOW * WINDOW or WINDOW))
        table.note(try_cross_attention())
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        measure(table, options.peer, options.tiny, options.deadline)
    finally:
        torch.set_float32_matmul_precision(precision)
    table.finish()


if __name__ == "__main__":
    main()
