"""The kernels of causal routing against their references, which test_causal_routing.py compares with a walk."""

from typing import Any

import pytest
import torch
from models import tiny_config
from rounding import assert_same_but_for_rounding
from test_causal_routing import make_pools
from transformers import DynamicCache

from modeling_colt5 import CoLT5ForCausalLM, op_gates, op_pools
from modeling_colt5.model_causal import CoLT5LayerCausalAttention, CoLT5LayerCausalFF
from modeling_colt5.model_from_config import causal_settings, implementation
from modeling_colt5.model_layers import bias_by_distance
from modeling_colt5.run_causal_plan import CausalPlan

kernels = pytest.importorskip("modeling_colt5.op_pools_triton")
gates = pytest.importorskip("modeling_colt5.op_gates_triton")

run_gates, run_candidates, run_gather = op_gates._gates, op_pools._candidates, op_pools._pool_gather

# fp32 sums of at most 32 terms of size 1 in another order, and their logarithm
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
KINDS = ("distinct", "ties", "odd")


def make_scores(kind: str, *shape: int, device: torch.device) -> torch.Tensor:
    """Scores as a layer has them: one router's of two, in one tensor."""
    batch, *rest = shape
    scores = torch.randn(batch, 2, *rest)
    if kind != "distinct":
        scores = scores.round()
    if kind == "odd":
        for value in (torch.inf, -torch.inf, -0.0):
            scores[torch.rand(scores.shape) < 0.05] = value
    return scores.to(device)[:, 1]


def assert_same(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


def gate_inputs(kind: str, batch: int, windows: int, window: int, past: bool, device: torch.device) -> list[Any]:
    scores = make_scores(kind, batch, windows * window, device=device).unflatten(1, (windows, window))
    before = torch.tensor([3, window + 2][:batch], device=device) if past else None
    total = torch.tensor([windows * window - 2, windows * window - window][:batch], device=device)
    carried = torch.randn(batch, 2, device=device) if past else None
    return [scores, before, total if before is None else before + total, carried]


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize(
    ("batch", "windows", "window", "target", "capacity", "fill_first", "past"),
    [
        (2, 5, 8, 2, 4, True, False),
        (1, 3, 5, 1, 2, False, False),
        (2, 2, 20, 3, 6, True, True),
        (1, 1, 8, 2, 4, True, True),
        # all are saturated
        (1, 4, 32, 32, 32, False, False),
        (1, 3, 1, 1, 1, True, False),
        # not a power of two, and of more than one warp
        (1, 2, 200, 13, 26, True, False),
    ],
)
def test_gates(
    kind: str,
    batch: int,
    windows: int,
    window: int,
    target: int,
    capacity: int,
    fill_first: bool,
    past: bool,
    device: torch.device,
) -> None:
    epsilon = 0.7
    scores, *rest = gate_inputs(kind, batch, windows, window, past, device)
    settings = (target, capacity, 9 / 8 * target, epsilon, fill_first)
    scores.requires_grad_()
    expected = op_gates.causal_gates_reference(scores, *rest, *settings)
    actual = run_gates.kernel(scores.detach(), *rest, *settings)
    # thresholds of incomplete windows too: whatever stands there is the same
    assert_same(actual, expected)
    weights, routed, thresholds, _, slots, valid = (part.detach() for part in expected)
    grads = [torch.randn_like(weights), torch.randn_like(slots).masked_fill(~valid, 0)]
    (autograd,) = torch.autograd.grad([expected[0], expected[4]], [scores], grads)
    inputs = (scores.detach(), *rest, *settings, weights, routed, thresholds, [True])
    assert_same((run_gates.gradient.kernel(*grads, *inputs),), (autograd,))
    (alone,) = torch.autograd.grad(
        op_gates.causal_gates_reference(scores, *rest, *settings)[4], [scores], grads[1], allow_unused=True
    )
    assert_same((run_gates.gradient.kernel(None, grads[1], *inputs),), (alone,))


def test_any_window_has_a_number_of_warps_that_triton_takes() -> None:
    for window in range(1, gates.LONGEST_WINDOW + 1):
        assert gates._warps(window) in (1, 2, 4, 8), window


def test_gates_by_numbers_that_do_not_lie_side_by_side(device: torch.device) -> None:
    scores, past, total, carried = gate_inputs("distinct", 2, 3, 8, True, device)
    apart = [torch.stack([part, part * 0 - 1], 1)[:, 0] for part in (past, total)]
    apart.append(torch.stack([carried, carried * 0], 2)[..., 0])
    settings = (2, 4, 2.25, 1.0, True)
    expected = op_gates.causal_gates_reference(scores, past, total, carried, *settings)
    assert_same(run_gates.kernel(scores, *apart, *settings), expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gates_take_whole_numbers_as_settings(backend: str, device: torch.device) -> None:
    scores, past, total, carried = gate_inputs("distinct", 2, 3, 8, True, device)
    fields = {"target": 2, "capacity": 4, "fill_first": True, "kernel_backend": backend}
    whole, real = (
        op_gates.causal_gates(scores, past, total, carried, soft_topk_ratio=one, epsilon=one, **fields)
        for one in (1, 1.0)
    )
    assert_same_but_for_rounding(whole.weights, real.weights)
    assert_same_but_for_rounding(whole.thresholds, real.thresholds)


POOLS = [
    # rows, windows, window, size, initial pool, and the kinds of scores that `make test` takes: one where the
    # interpreter needs seconds
    (2, 5, 8, 12, False, ("distinct",)),
    # lists are merged in two steps
    (1, 10, 2, 3, False, ("ties",)),
    (2, 3, 5, 7, True, KINDS),
    (2, 1, 8, 12, True, KINDS),
    (1, 1, 8, 3, False, KINDS),
    (1, 11, 4, 16, True, ("odd",)),
]


@pytest.mark.parametrize(
    ("rows", "windows", "window", "size", "with_initial", "kind"),
    [
        pytest.param(*pool, kind, marks=[] if kind in quick else pytest.mark.slow)
        for *pool, quick in POOLS
        for kind in KINDS
    ],
)
def test_pool_candidates(
    rows: int, windows: int, window: int, size: int, with_initial: bool, kind: str, device: torch.device
) -> None:
    scores = make_scores(kind, rows, windows * window, device=device)
    initial = initial_valid = None
    if with_initial:
        initial = make_scores(kind, rows, size, device=device)
        initial_valid = torch.arange(size, device=device) < torch.tensor([[size - 2], [size]], device=device)[:rows]
    inputs = (scores, initial, initial_valid, window, size)
    expected, actual = op_pools.pool_candidates_reference(*inputs), run_candidates.kernel(*inputs)
    present = expected[2]
    for one, other in zip(actual[1:], expected[1:], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(actual[0][present], expected[0][present])
    # what stands for no token has no gradient
    grad = torch.randn_like(expected[0]).masked_fill(~present, 0)
    inputs = (grad, *inputs, expected[3], [True])
    backward = run_candidates.gradient
    assert_same((backward.kernel(*inputs),), (backward.reference(*inputs),))


def test_a_pool_of_more_keys_than_a_program_holds_is_pytorchs(device: torch.device) -> None:
    scores = torch.randn(1, 8, device=device)
    settings = {"soft_topk_ratio": 9 / 8, "epsilon": 1.0}
    pools = [
        op_pools.routed_pools(scores, 4, kernels.LONGEST_LIST + 1, None, kernel_backend=backend, **settings)
        for backend in ("torch", "triton")
    ]
    assert torch.equal(pools[0].following, pools[1].following)
    assert torch.equal(pools[0].tokens.indices, pools[1].tokens.indices)


def test_scores_that_are_not_numbers_are_the_largest(device: torch.device) -> None:
    scores = torch.randn(1, 24, device=device)
    scores[0, [3, 9, 20]] = torch.nan
    inputs = (scores, None, None, 4, 5)
    assert torch.equal(run_candidates.kernel(*inputs)[1], op_pools.pool_candidates_reference(*inputs)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "windows", "window", "size"), [(2, 4, 3, 5), (1, 20, 2, 3)])
def test_gathering(rows: int, windows: int, window: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
    pools = make_pools(rows, windows, window, size)
    tokens = pools.tokens
    parts = [part.to(device) for part in (tokens.indices, tokens.weights.float(), tokens.valid, pools.following)]
    # both projections in one tensor, and a token less than the windows hold
    joint = torch.randn(rows, windows * window - 1, 12, device=device).to(dtype)
    key, value = (states.unflatten(-1, (2, 3)) for states in joint.split(6, -1))
    expected = op_pools.pool_gather_reference(key, value, *parts, 0)
    for one, other in zip(run_gather.kernel(key, value, *parts, 0), expected, strict=True):
        # a product each, rounded once
        assert torch.equal(one, other)
    grads = [torch.randn_like(part) for part in expected]
    inputs = (*grads, key, value, *parts, 0, [True] * 3)
    actual, expected = run_gather.gradient.kernel(*inputs), run_gather.gradient.reference(*inputs)
    # the weights' gradient is a sum of 12 products, and in half precision the reference rounds each
    tolerance = TOLERANCE if dtype == torch.float32 else {"rtol": 2e-3, "atol": 1e-2}
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def test_gathering_from_an_initial_pool(device: torch.device) -> None:
    windows, window, size = 3, 4, 5
    scores, initial = torch.randn(1, windows * window, device=device), torch.randn(1, size, device=device)
    valid = torch.arange(size, device=device)[None] < 4
    _, candidates, present, following = op_pools.pool_candidates_reference(scores, initial, valid, window, size)
    indices = torch.cat([candidates[:, 1:, :size], candidates[:, -1:, :size]], 1)
    used = torch.cat([present[:, 1:, :size], present[:, -1:, :size] & False], 1)
    weights = torch.rand(indices.shape, device=device).masked_fill(~used, 0)
    key, value = torch.randn(2, 1, size + windows * window, 2, 3, device=device).unbind(0)
    inputs = (key, value, indices.masked_fill(~used, 0), weights, used, following, size)
    assert_same(run_gather.kernel(*inputs), op_pools.pool_gather_reference(*inputs))
    grads = [torch.randn(1, windows, size, 2, 3, device=device) for _ in range(2)]
    inputs = (*grads, *inputs, [True] * 3)
    assert_same(run_gather.gradient.kernel(*inputs), run_gather.gradient.reference(*inputs))


def test_operators_say_their_shapes_and_kinds() -> None:
    scores = torch.randn(2, 12)
    total = torch.tensor([12, 9])
    candidates = op_pools.pool_candidates_reference(scores, None, None, 4, 5)
    pools = make_pools(2, 3, 4, 5)
    tokens = pools.tokens
    key, value = torch.randn(2, 2, 12, 2, 3).unbind(0)
    gathered = (key, value, tokens.indices, tokens.weights.float(), tokens.valid, pools.following, 0)
    gate_settings = (scores.view(2, 3, 4), None, total, None, 2, 3, 2.25, 1.0, True)
    gated = op_gates.causal_gates_reference(*gate_settings)
    grads = [torch.randn(2, 3, 5, 2, 3) for _ in range(2)]
    for operator, inputs in (
        (run_gates, gate_settings),
        (run_gates.gradient, (None, gated[4], *gate_settings, *gated[:3], [True])),
        (run_candidates, (scores, None, None, 4, 5)),
        (run_candidates.gradient, (candidates[0], scores, None, None, 4, 5, candidates[3], [True])),
        (run_gather, gathered),
        (run_gather.gradient, (*grads, *gathered, [True] * 3)),
    ):
        torch.library.opcheck(operator.overload, inputs, test_utils=("test_schema", "test_faketensor"))


def layer_outputs(backend: str, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Both sublayers' outputs and the gradients of all that they have."""
    torch.manual_seed(0)
    config = tiny_config(
        causal_attention="routed", causal_feed_forward="routed", causal_window=8, causal_routed_keys=12,
        num_heavy_heads=4, num_causal_key_value_routers=2, kernel_backend=backend,
    )  # fmt: skip
    model = CoLT5ForCausalLM(config).to(device, dtype)
    decoder, block = model.decoder, model.decoder.block[0]
    # three windows and a part of one
    states = torch.randn(2, 27, config.d_model).to(device, dtype).requires_grad_()
    plan = CausalPlan.make(causal_settings(config), implementation(config), states, None, None)
    biases = decoder.light_relative_attention_bias, decoder.heavy_relative_attention_bias
    light, heavy = map(bias_by_distance, biases)
    causal = light.masked_fill(torch.arange(light.shape[1], device=device) > light.shape[1] // 2, -torch.inf)
    attention, feed_forward = block.layer[0], block.layer[1]
    assert isinstance(attention, CoLT5LayerCausalAttention) and isinstance(feed_forward, CoLT5LayerCausalFF)
    attended, query_weights, _ = attention(states, causal, heavy, plan, None)
    output, weights = feed_forward(attended, plan, None)
    goal = torch.randn(output.shape).to(device, dtype)
    loss = (output * goal).sum() + query_weights.square().sum() + weights.square().sum()
    grads = torch.autograd.grad(loss, [states, light, heavy, *block.parameters()])
    return [attended.detach(), output.detach(), query_weights.detach(), *grads]


def test_layers_by_kernels_are_the_layers_in_pytorch(device: torch.device) -> None:
    expected = layer_outputs("torch", device, torch.float32)
    for one, other in zip(layer_outputs("triton", device, torch.float32), expected, strict=True):
        # products of d_model terms in another order, through two sublayers and their gradients
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-4)


@torch.no_grad()
def test_decoding_by_kernels_is_the_parallel_forward_in_pytorch(device: torch.device) -> None:
    torch.manual_seed(0)
    config = tiny_config(
        causal_attention="routed", causal_feed_forward="routed", causal_window=4, causal_routed_keys=6,
        num_heavy_heads=2, num_decoder_layers=1, kernel_backend="torch",
    )  # fmt: skip
    model = CoLT5ForCausalLM(config).eval().to(device)
    ids = torch.randint(3, 90, (2, 17), device=device)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    expected = model(ids, attention_mask=mask).logits
    config.kernel_backend = "triton"
    cache, logits, start = DynamicCache(config=config), [], 0
    for chunk in (6, 1, 1, 1, 7, 1):
        end = start + chunk
        outputs = model(ids[:, start:end], attention_mask=mask[:, :end], cache=cache, use_cache=True)
        logits.append(outputs.logits)
        start = end
    real = mask.bool()
    torch.testing.assert_close(torch.cat(logits, 1)[real], expected[real], rtol=0, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same_bits_each_time(dtype: torch.dtype, device: torch.device) -> None:
    """As docs/causal_routing.md promises for one GPU."""
    first = layer_outputs("triton", device, dtype)
    for _ in range(10):
        assert all(torch.equal(*pair) for pair in zip(layer_outputs("triton", device, dtype), first, strict=True))
