"""The layers on their own: those of a model in another frame, with everything that holds for them there."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from models import tiny_model
from rounding import assert_same_but_for_rounding
from torch import Tensor, nn

import modeling_colt5
from modeling_colt5 import (
    CoLT5CausalConditionalAttention,
    CoLT5CausalConditionalFeedForward,
    CoLT5ConditionalAttention,
    CoLT5ConditionalBlock,
    CoLT5ConditionalCrossAttention,
    CoLT5ConditionalFeedForward,
    CoLT5EncoderModel,
    CoLT5ForCausalLM,
    CoLT5ForConditionalGeneration,
    SoftTopK,
    kernel_backend,
    layer_encoder,
    set_dense_start,
    soft_topk,
)
from modeling_colt5.layer_encoder import StraightLayer

# the sizes of `tiny_config`
HEADS: dict[str, Any] = {"d_kv": 8, "num_light_heads": 2, "num_heavy_heads": 3, "local_radius": 5}
ATTENTION = HEADS | {"routed_query_fraction": 1 / 4, "routed_key_value_fraction": 1 / 3}
FEED_FORWARD: dict[str, Any] = {"light_d_ff": 24, "heavy_d_ff": 64, "routed_feed_forward_fraction": 1 / 5}
CAUSAL: dict[str, Any] = {"causal_window": 8}
CAUSAL_MODEL: dict[str, Any] = {
    "causal_attention": "routed", "causal_feed_forward": "routed", "causal_routed_keys": 12, "num_heavy_heads": 4,
    "num_causal_key_value_routers": 2, "causal_unrouted_vector": True, "num_decoder_layers": 1,
}  # fmt: skip

MAKERS: dict[str, Callable[..., nn.Module]] = {
    "feed-forward": lambda **more: CoLT5ConditionalFeedForward(32, **FEED_FORWARD | more),
    "attention": lambda **more: CoLT5ConditionalAttention(32, **ATTENTION | more),
    "block": lambda **more: CoLT5ConditionalBlock(32, **ATTENTION | FEED_FORWARD | more),
    "causal attention": lambda **more: CoLT5CausalConditionalAttention(
        32, **HEADS | CAUSAL | {"num_heavy_heads": 4, "causal_routed_keys": 12, "routed_query_fraction": 1 / 4} | more
    ),
    "causal feed-forward": lambda **more: CoLT5CausalConditionalFeedForward(32, **FEED_FORWARD | CAUSAL | more),
    "cross-attention": lambda **more: CoLT5ConditionalCrossAttention(
        32, 6, **{"d_kv": 8, "num_heads": 4, "num_cross_routers": 2} | more
    ),
}
CAUSAL_KINDS = ["causal attention", "causal feed-forward"]


def make(kind: str, **more: Any) -> nn.Module:
    return MAKERS[kind](**more).eval()


def call(kind: str, module: nn.Module, states: Tensor, mask: Tensor | None = None, **more: Any) -> Any:
    """The module's output; cross-attention reads its states as the memory, from queries made of them."""
    if kind == "cross-attention":
        return module(states[:, -3:].tanh(), states, mask, **more)
    return module(states, mask, **more)


def real(lengths: list[int], n: int) -> Tensor:
    return torch.arange(n) < torch.tensor(lengths)[:, None]


# ------------------------------------------------------------------ the models' own layers


@torch.no_grad()
def test_encoder_modules_are_a_models_layers() -> None:
    model = tiny_model(CoLT5EncoderModel, num_layers=1)
    encoder, states, mask = model.encoder, torch.randn(2, 40, 32), real([40, 23], 40)
    attention, feed_forward, block = (make(kind) for kind in ("attention", "feed-forward", "block"))
    attention.layer.load_state_dict(encoder.block[0].layer[0].state_dict())
    feed_forward.layer.load_state_dict(encoder.block[0].layer[1].state_dict())
    block.block.load_state_dict(encoder.block[0].state_dict())
    for module in (attention, block):
        for name in ("light_relative_attention_bias", "heavy_relative_attention_bias"):
            setattr(module, name, getattr(encoder, name))
    expected = encoder(inputs_embeds=states, attention_mask=mask, output_hidden_states=True, output_routing=True)
    # the last of the hidden states is behind the norm
    output, routing = block(states, mask, output_routing=True)
    assert_same_but_for_rounding(encoder.final_layer_norm(output)[0][mask], expected.last_hidden_state[mask])
    attended, first = attention(states, mask, output_routing=True)
    both, tokens = feed_forward(attended, mask, output_routing=True)
    assert_same_but_for_rounding(both[mask], output[mask])
    for ours, theirs in (
        (routing.query, first.query), (routing.key_value, first.key_value), (routing.feed_forward, tokens),
        (routing.query, expected.routing[0].query), (routing.feed_forward, expected.routing[0].feed_forward),
    ):  # fmt: skip
        assert torch.equal(ours.indices, theirs.indices) and torch.equal(ours.valid, theirs.valid)


@torch.no_grad()
def test_causal_modules_are_a_models_layers() -> None:
    model = tiny_model(CoLT5ForCausalLM, **CAUSAL_MODEL | CAUSAL)
    decoder, states, mask = model.decoder, torch.randn(2, 29, 32), real([29, 12], 29)
    attention = make("causal attention", num_causal_key_value_routers=2, causal_unrouted_vector=True)
    feed_forward = make("causal feed-forward")
    attention.layer.load_state_dict(decoder.block[0].layer[0].state_dict())
    feed_forward.layer.load_state_dict(decoder.block[0].layer[1].state_dict())
    for name in ("light_relative_attention_bias", "heavy_relative_attention_bias"):
        setattr(attention, name, getattr(decoder, name))
    expected = decoder(inputs_embeds=states, attention_mask=mask, output_routing=True)
    attended, routing = attention(states, mask, output_routing=True)
    output, weights = feed_forward(attended, mask, output_routing=True)
    assert_same_but_for_rounding(decoder.final_layer_norm(output)[0][mask], expected.last_hidden_state[mask])
    assert_same_but_for_rounding(routing.query, expected.routing[0].query)
    assert torch.equal(routing.key_value.indices, expected.routing[0].key_value.indices)
    assert_same_but_for_rounding(weights, expected.routing[0].feed_forward)


@pytest.mark.parametrize("budget", [6, None])
@torch.no_grad()
def test_cross_attention_is_a_models_layer(budget: int | None) -> None:
    model = tiny_model(
        CoLT5ForConditionalGeneration, num_decoder_layers=1, routed_cross_key_values=budget, num_cross_routers=2
    )
    decoder, states = model.decoder, torch.randn(2, 5, 32)
    memory, mask = torch.randn(2, 20, 32), real([20, 4], 20)
    module = CoLT5ConditionalCrossAttention(32, budget, d_kv=8, num_heads=4, num_cross_routers=2).eval()
    module.layer.load_state_dict(decoder.block[0].layer[1].state_dict())
    if budget is not None:
        module.cross_routing.load_state_dict(decoder.cross_routing.state_dict())
    seen = []
    decoder.block[0].layer[1].register_forward_hook(lambda layer, inputs, output: seen.append((inputs[0], output[0])))
    decoder(inputs_embeds=states, encoder_hidden_states=memory, encoder_attention_mask=mask)
    ((inputs, expected),) = seen
    assert_same_but_for_rounding(module(inputs, memory, mask), expected)


# ------------------------------------------------------------------ written out in float64


def rms_norm(states: Tensor, weight: Tensor) -> Tensor:
    return states * (states.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def feed(states: Tensor, dense: nn.Module) -> Tensor:
    gate = nn.functional.gelu(states @ dense.wi_0.weight.T, approximate="tanh")
    return (gate * (states @ dense.wi_1.weight.T)) @ dense.wo.weight.T


def test_feed_forward_and_its_gradients_are_the_equation(float64_statistics: None) -> None:
    ours = make("feed-forward").double()
    with torch.no_grad():
        ours.layer.layer_norm.weight.add_(0.3 * torch.randn(32))
    written = copy.deepcopy(ours)
    states, goal = torch.randn(1, 30, 32, dtype=torch.float64, requires_grad=True), torch.randn(1, 30, 32).double()
    output, tokens = ours(states, output_routing=True)

    own = states.detach().clone().requires_grad_()
    layer = written.layer
    normed = rms_norm(own[0], layer.layer_norm.weight)
    scores = normed @ layer.router.weight
    chosen = scores.topk(6).indices.sort().values
    assert tokens.indices[0].tolist() == chosen.tolist()
    weights = soft_topk(scores, 9 / 8 * 6)[chosen, None]
    heavy = torch.zeros_like(normed).index_add(0, chosen, weights * feed(normed[chosen], layer.heavy_feed_forward))
    expected = own[0] + feed(normed, layer.light_feed_forward) + heavy
    # scores and weights of routers are fp32 where nothing is in float64, and the same float64 here
    torch.testing.assert_close(output[0], expected, rtol=1e-10, atol=1e-10)
    found = torch.autograd.grad((output * goal).sum(), [states, *ours.parameters()])
    wanted = torch.autograd.grad((expected * goal[0]).sum(), [own, *written.parameters()])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_cross_attention_and_its_gradients_are_the_equation(float64_statistics: None) -> None:
    ours = make("cross-attention").double()
    written = copy.deepcopy(ours)
    states, memory = (torch.randn(1, n, 32, dtype=torch.float64, requires_grad=True) for n in (5, 30))
    goal = torch.randn(1, 5, 32).double()
    output = ours(states, memory)
    own, read = (part.detach().clone().requires_grad_() for part in (states, memory))
    attention = written.layer.EncDecAttention
    normed = rms_norm(own[0], written.layer.layer_norm.weight)
    query = (normed @ attention.q.weight.T).view(5, 4, 8)
    heads = []
    for head in range(4):
        scores = read[0] @ written.cross_routing.routers[head // 2].weight
        chosen = scores.topk(6).indices
        rows = soft_topk(scores, 9 / 8 * 6)[chosen, None] * read[0][chosen]
        weights = (query[:, head] @ (rows @ attention.k.weight.T).T).softmax(-1)
        heads.append(weights @ (rows @ attention.v.weight.T))
    expected = own[0] + torch.cat(heads, 1) @ attention.o.weight.T
    # float64 throughout, sums of some hundred terms; gradients are sums of those
    torch.testing.assert_close(output[0], expected, rtol=1e-10, atol=1e-10)
    found = torch.autograd.grad((output * goal).sum(), [states, memory, *ours.parameters()])
    wanted = torch.autograd.grad((expected * goal[0]).sum(), [own, read, *written.parameters()])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kernel_backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", MAKERS)
def test_gradients_in_fp32_are_those_of_float64(kind: str, kernel_backend: str, device: torch.device) -> None:
    if kernel_backend == "triton":
        pytest.importorskip("triton")
    module = make(kind, kernel_backend=kernel_backend).to(device)
    reference = copy.deepcopy(module).double()
    states, mask = torch.randn(2, 19, 32, device=device), real([19, 11], 19).to(device)
    gradients = []
    for own in (module, reference):
        dtype = next(own.parameters()).dtype
        inputs = states.to(dtype).requires_grad_()
        output = call(kind, own, inputs, mask)
        output = output if kind == "cross-attention" else output[mask]
        goal = torch.linspace(-1, 1, output.numel(), dtype=dtype, device=device).view(output.shape)
        gradients.append([output, *torch.autograd.grad((output * goal).sum(), [inputs, *own.parameters()])])
    for ours, expected in zip(*gradients, strict=True):
        # fp32 sums of some hundred terms
        scale = expected.abs().max().item()
        torch.testing.assert_close(ours.double(), expected.double(), rtol=1e-4, atol=2e-5 * max(scale, 1.0))


# ------------------------------------------------------------------ what holds


@pytest.mark.parametrize("kernel_backend", ["torch", "triton"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", MAKERS)
@torch.no_grad()
def test_padding_changes_nothing(kind: str, side: str, kernel_backend: str, device: torch.device) -> None:
    if kernel_backend == "triton":
        pytest.importorskip("triton")
    module = make(kind, kernel_backend=kernel_backend).to(device)
    place = slice(0, 17) if side == "right" else slice(13, 30)
    states = torch.randn(1, 17, 32, device=device)
    padded, mask = torch.full((1, 30, 32), 1e4, device=device), torch.zeros(1, 30, device=device)
    padded[:, place], mask[:, place] = states, 1
    if kind == "cross-attention":
        queries = torch.randn(1, 3, 32, device=device)
        assert_same_but_for_rounding(module(queries, padded, mask), module(queries, states))
        return
    assert_same_but_for_rounding(module(padded, mask)[:, place], module(states))


@pytest.mark.parametrize("kernel_backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", CAUSAL_KINDS)
@torch.no_grad()
def test_no_output_depends_on_a_later_token(kind: str, kernel_backend: str, device: torch.device) -> None:
    if kernel_backend == "triton":
        pytest.importorskip("triton")
    # Triton's interpreter takes seconds a call: one end, before the last token of a window, and two windows behind it
    length, ends = (40, (1, 8, 23, 39)) if kernel_backend == "torch" else (25, (15,))
    module = make(kind, kernel_backend=kernel_backend).to(device)
    states = torch.randn(2, length, 32, device=device)
    before = module(states)
    for end in ends:
        changed = states.clone()
        changed[:, end:] = 10 * torch.randn(2, length - end, 32, device=device)
        assert_same_but_for_rounding(module(changed)[:, :end], before[:, :end])


@pytest.mark.parametrize("chunks", [(1,) * 29, (5, 1, 1, 16, 6)], ids=["one by one", "chunks"])
@pytest.mark.parametrize("kind", CAUSAL_KINDS)
@torch.no_grad()
def test_with_a_cache_it_is_the_whole(kind: str, chunks: tuple[int, ...]) -> None:
    module, states = make(kind), torch.randn(2, 29, 32)
    mask = torch.ones(2, 29, dtype=torch.bool)
    # of one row some tokens are padding, anywhere
    mask[1, [0, 3, 4, 20]] = False
    whole, cache = module(states, mask), module.make_cache()
    parts = [
        module(part, own, cache=cache)
        for part, own in zip(states.split(chunks, 1), mask.split(chunks, 1), strict=True)
    ]
    assert_same_but_for_rounding(torch.cat(parts, 1)[mask], whole[mask])
    # the last tokens are taken back, and others come in their place
    cache.crop(-2)
    others = torch.randn(2, 2, 32)
    expected = module(torch.cat([states[:, :-2], others], 1), mask)[:, -2:]
    assert_same_but_for_rounding(module(others, cache=cache), expected)


@torch.no_grad()
def test_a_memory_is_read_once() -> None:
    module, memory, mask = make("cross-attention"), torch.randn(2, 20, 32), real([20, 4], 20)
    states, cache = torch.randn(2, 4, 32), make("cross-attention").make_cache()
    expected = module(states, memory, mask)
    calls = []
    module.cross_routing.register_forward_hook(lambda *_: calls.append(1))
    parts = [module(part, memory, mask, cache=cache, output_routing=True) for part in states.split(1, 1)]
    assert_same_but_for_rounding(torch.cat([output for output, _ in parts], 1), expected)
    assert len(calls) == 1 and parts[0][1] is not None and parts[1][1] is None


@torch.no_grad()
def test_a_budget_that_covers_everything_is_full_cross_attention() -> None:
    routed = CoLT5ConditionalCrossAttention(32, 20, d_kv=8, num_heads=4).eval()
    full = CoLT5ConditionalCrossAttention(32, None, d_kv=8, num_heads=4).eval()
    full.layer.load_state_dict(routed.layer.state_dict())
    states, memory = torch.randn(2, 4, 32), torch.randn(2, 20, 32)
    assert_same_but_for_rounding(routed(states, memory), full(states, memory))


@pytest.mark.parametrize("kind", MAKERS)
def test_budgets_are_those_that_were_asked_for(kind: str) -> None:
    _, routing = call(kind, make(kind), torch.randn(1, 60, 32), output_routing=True)
    counts = {
        "feed-forward": lambda: [int(routing.valid.sum())],
        "attention": lambda: [int(routing.query.valid.sum()), int(routing.key_value.valid.sum())],
        "block": lambda: [int(part.valid.sum()) for part in (routing.query, routing.key_value, routing.feed_forward)],
        "causal attention": lambda: [routing.key_value.valid.shape[-1]],
        "causal feed-forward": lambda: [],
        "cross-attention": lambda: [int(part.valid.sum()) for part in routing],
    }
    expected: dict[str, list[int]] = {
        "feed-forward": [12], "attention": [15, 20], "block": [15, 20, 12], "causal attention": [12],
        "causal feed-forward": [], "cross-attention": [6, 6],
    }  # fmt: skip
    assert counts[kind]() == expected[kind]


# ------------------------------------------------------------------ modules of PyTorch


@pytest.mark.parametrize("kind", MAKERS)
@torch.no_grad()
def test_copies_and_files(kind: str, tmp_path: Any) -> None:
    module, states = make(kind), torch.randn(2, 21, 32)
    expected = call(kind, module, states)
    torch.save(module.state_dict(), tmp_path / "weights")
    loaded = make(kind)
    loaded.load_state_dict(torch.load(tmp_path / "weights"))
    for other in (copy.deepcopy(module), loaded):
        assert_same_but_for_rounding(call(kind, other, states), expected)
        for parameter in other.parameters():
            parameter.zero_()
    # neither shares its weights with the first
    assert_same_but_for_rounding(call(kind, module, states), expected)


# five seconds each, and whole models of these layers are compiled in test_compile_export.py
@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
def test_compilers_take_it_whole(kind: str) -> None:
    module, mask = make(kind), real([21, 13], 21)
    compiled = torch.compile(module, fullgraph=True, dynamic=False, backend="aot_eager")
    states = torch.randn(2, 21, 32, requires_grad=True)
    results = []
    for one in (module, compiled):
        output = call(kind, one, states, mask)
        output = output if kind == "cross-attention" else output[mask]
        results.append([output, *torch.autograd.grad(output.square().sum(), [states, *module.parameters()])])
    for ours, expected in zip(*results, strict=True):
        # the compiler takes fp32 sums in another order
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("kind", MAKERS)
def test_jit_trace_names_what_works(kind: str) -> None:
    states = torch.randn(1, 20, 32)
    inputs = (states[:, :3], states) if kind == "cross-attention" else (states,)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"torch\.export"):
        torch.jit.trace(make(kind), inputs)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_dense_start_gives_every_token_a_weight(kind: str) -> None:
    module = nn.Sequential(make(kind)).train()
    states = torch.randn(1, 30, 32)
    set_dense_start(module, 0.5)
    _, routing = call(kind, module[0], states, output_routing=True)
    tokens = {
        "feed-forward": lambda: routing.valid, "attention": lambda: routing.query.valid,
        "block": lambda: routing.query.valid, "causal attention": lambda: routing.query > 0,
        "causal feed-forward": lambda: routing > 0, "cross-attention": lambda: routing[0].valid,
    }  # fmt: skip
    assert tokens[kind]().sum() == 30
    set_dense_start(module, None)
    _, routing = call(kind, module[0], states, output_routing=True)
    assert tokens[kind]().sum() < 30
    with pytest.raises(TypeError, match="progress is a str; it must be None, or a number from 0 to 1"):
        set_dense_start(module, "a")
    with pytest.raises(ValueError, match="progress is 2"):
        set_dense_start(module, 2)
    with pytest.raises(ValueError, match="Linear has no routers"):
        set_dense_start(nn.Linear(2, 2), 0.5)


def test_a_block_runs_as_a_straight_line_where_kernels_do(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    ran, of = [], StraightLayer.of.__func__

    def counted(cls: type[StraightLayer], *arguments: Any) -> StraightLayer | None:
        line = of(cls, *arguments)
        ran.extend([] if line is None else [line])
        return line

    monkeypatch.setattr(StraightLayer, "of", classmethod(counted))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = make("block", kernel_backend="triton").to(device)
    states = torch.randn(2, 11, 32, device=device, requires_grad=True)
    mask = real([11, 6], 11).to(device)

    def results() -> list[Tensor]:
        output = module(states, mask)
        leaves = [states, *module.parameters()]
        return [output[mask].detach(), *torch.autograd.grad(output[mask].square().sum(), leaves)]

    straight = results()
    assert len(ran) == 1
    monkeypatch.setattr(layer_encoder, "enabled", False)
    # interpreted kernels take long, and plain PyTorch is independent of them
    monkeypatch.setattr(kernel_backend, "FORCED_BACKEND", "torch" if device.type == "cpu" else None)
    for ours, expected in zip(straight, results(), strict=True):
        assert_same_but_for_rounding(ours, expected)
    # whoever asks what was routed gets the modules
    monkeypatch.setattr(layer_encoder, "enabled", True)
    monkeypatch.setattr(kernel_backend, "FORCED_BACKEND", None)
    ran.clear()
    module(states, mask, output_routing=True)
    assert not ran


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", MAKERS)
@torch.no_grad()
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    module, states = make(kind), torch.randn(2, 25, 32)
    expected = call(kind, module, states)
    output = call(kind, copy.deepcopy(module).to(dtype), states.to(dtype))
    assert output.dtype == dtype and output.isfinite().all() and output.shape == expected.shape
    with torch.autocast("cpu", torch.bfloat16):
        assert call(kind, module, states).isfinite().all()


@pytest.mark.parametrize("given", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind != "block"])
@torch.no_grad()
def test_states_of_another_dtype_than_half_precision_weights(kind: str, given: torch.dtype) -> None:
    """The norm gives them the weights' dtype. A block's second norm reads a rounded sum, which may route others."""
    module, states = make(kind).bfloat16(), torch.randn(2, 25, 32).bfloat16()
    expected = call(kind, module, states).float()
    # the same numbers but for rounding: bf16 has 8 bits, of sums up to some units
    torch.testing.assert_close(call(kind, module, states.to(given)).float(), expected, rtol=2e-2, atol=4e-2)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("feed-forward", {"routed_feed_forward_fraction": 1.5}, "routed_feed_forward_fraction"),
        ("feed-forward", {"heavy_d_ff": 0}, "heavy_d_ff"),
        ("feed-forward", {"feed_forward_proj": "gelou"}, "feed_forward_proj"),
        ("attention", {"local_radius": -1}, "local_radius"),
        ("attention", {"d_kv": 8.5}, "d_kv"),
        ("block", {"routing": "some"}, "routing"),
        ("block", {"kernel_backend": "cuda"}, "kernel_backend"),
        ("causal attention", {"num_causal_key_value_routers": 3}, "num_causal_key_value_routers"),
        ("causal attention", {"soft_topk": SoftTopK(solver="coordinate_descent")}, "soft_topk_solver"),
        ("causal feed-forward", {"causal_window": 0}, "causal_window"),
        ("cross-attention", {"num_cross_routers": 3}, "num_cross_routers"),
        ("cross-attention", {"routing": "none"}, "routed_cross_key_values"),
    ],
)
def test_numbers_that_break_a_rule_are_named(kind: str, more: dict[str, Any], said: str) -> None:
    with pytest.raises(StrictDataclassError, match=said):
        make(kind, **more)


def test_another_implementation_of_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="attn_implementation is 'flash'"):
        make("attention", attn_implementation="flash")


@pytest.mark.parametrize("kind", MAKERS)
def test_inputs_that_do_not_fit_are_refused(kind: str) -> None:
    module = make(kind)
    cases: list[tuple[type[Exception], str, Tensor, Tensor | None]] = [
        (TypeError, "dtype torch.int64", torch.ones(2, 9, 32, dtype=torch.int64), None),
        (ValueError, r"shape \(2, 9, 31\)", torch.ones(2, 9, 31), None),
        (ValueError, r"shape \(9, 32\)", torch.ones(9, 32), None),
        (ValueError, r"shape \(0, 9, 32\)", torch.ones(0, 9, 32), None),
        (ValueError, r"mask has shape \(2, 8\)", torch.ones(2, 9, 32), torch.ones(2, 8)),
    ]
    for error, said, states, mask in cases:
        with pytest.raises(error, match=said):
            if kind == "cross-attention":
                module(torch.ones(2, 3, 32), states, mask)
            else:
                module(states, mask)


def test_caches_that_do_not_fit_are_refused() -> None:
    module = make("causal attention")
    with pytest.raises(TypeError, match="cache is a dict"):
        module(torch.ones(2, 9, 32), cache={})
    cache = module.make_cache()
    module(torch.ones(2, 9, 32), cache=cache)
    with pytest.raises(ValueError, match="cache has 2 rows, and hidden_states has 3"):
        module(torch.ones(3, 1, 32), cache=cache)
    feed_forward = make("causal feed-forward")
    with pytest.raises(ValueError, match="cache was filled by another kind of module"):
        feed_forward(torch.ones(2, 1, 32), cache=cache)
    other = feed_forward.make_cache()
    feed_forward(torch.ones(2, 9, 32), cache=other)
    with pytest.raises(ValueError, match="cache was filled by another kind of module"):
        module(torch.ones(2, 1, 32), cache=other)
    assert cache.get_seq_length() == other.get_seq_length() == 9
    cross = make("cross-attention")
    with pytest.raises(TypeError, match="cache is a dict"):
        cross(torch.ones(2, 9, 32), torch.ones(2, 9, 32), cache={})
    with pytest.raises(ValueError, match="memory has 1 rows, and hidden_states has 2"):
        cross(torch.ones(2, 9, 32), torch.ones(1, 9, 32))


def test_public_names() -> None:
    names = [type(make(kind)).__name__ for kind in MAKERS]
    assert set(names) | {"SoftTopK", "set_dense_start"} <= set(modeling_colt5.__all__)


@pytest.mark.parametrize(("budget", "asks"), [(5, False), (5, True), (None, False)])
def test_a_cache_goes_on_with_its_rows_and_its_memory(budget: int | None, asks: bool) -> None:
    module = CoLT5ConditionalCrossAttention(32, budget, d_kv=4, num_heads=2, asking_cross_routing=asks).eval()
    memory, cache = torch.randn(1, 10, 32), module.make_cache()
    module(torch.randn(1, 1, 32), memory, cache=cache)
    with pytest.raises(ValueError, match="has 1 rows, and the new tokens have 2"):
        module(torch.randn(2, 1, 32), memory.expand(2, -1, -1), cache=cache)
    if budget is None or asks:
        with pytest.raises(ValueError, match="memory has 30 tokens, and the cache was filled from one of 10"):
            module(torch.randn(1, 1, 32), torch.randn(1, 30, 32), cache=cache)
    module(torch.randn(1, 1, 32), memory, cache=cache)


@pytest.mark.parametrize("change", [{"window": 8}, {"radius": 2}, {"pool_size": 3}])
def test_a_causal_cache_goes_on_with_its_sizes(change: dict[str, int]) -> None:
    """Another size is refused before anything is counted."""
    module = CoLT5CausalConditionalAttention(
        32, d_kv=4, num_light_heads=2, num_heavy_heads=2, local_radius=3, causal_window=4, causal_routed_keys=6
    ).eval()
    states, cache = torch.randn(2, 12, 32), module.make_cache()
    module(states[:, :9], cache=cache)
    before, module.settings = module.settings, replace(module.settings, **change)
    with pytest.raises(ValueError, match="cache was filled with .* must stay as it is"):
        module(states[:, 9:], cache=cache)
    module.settings = before
    assert cache.get_seq_length() == 9
    whole = module(states)
    # sums in another order
    torch.testing.assert_close(module(states[:, 9:], cache=cache), whole[:, 9:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_cast_to_the_weights(dtype: torch.dtype) -> None:
    """As a model casts `inputs_embeds`: the result is that of states that were cast before."""
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    heads = {"d_kv": 4, "num_light_heads": 2, "num_heavy_heads": 2, "local_radius": 3}
    states = torch.randn(2, 12, 32, dtype=other)
    for module in (
        CoLT5ConditionalBlock(32, 8, 24, **heads),
        CoLT5CausalConditionalAttention(32, **heads, causal_window=4, causal_routed_keys=6),
        CoLT5ConditionalCrossAttention(32, 5, d_kv=4, num_heads=2),
    ):
        module = module.to(dtype).eval()
        memory = [states] if isinstance(module, CoLT5ConditionalCrossAttention) else []
        expected = module(states.to(dtype), *[part.to(dtype) for part in memory])
        assert expected.dtype == dtype and torch.equal(module(states, *memory), expected)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("block", {"query_fraction": 0.0, "key_value_fraction": math.nan, "feed_forward_fraction": 5.0}),
        ("block", {"query_fraction": "a", "min_routed_tokens": 0}),
        ("causal attention", {"window": 0, "radius": -1, "pool_size": 2.5, "query_fraction": -1.0}),
        ("cross-attention", {"num_tokens": 0}),
        ("cross-attention", {"num_tokens": 2.5}),
    ],
)
def test_settings_out_of_range_are_refused(kind: str, changes: dict[str, Any]) -> None:
    """Where they are made, and by their own names."""
    settings: Any = make(kind).settings
    for name, value in changes.items():
        with pytest.raises(ValueError, match=f"{name} is {value!r}"):
            replace(settings, **{name: value})


@pytest.mark.parametrize("wrong", [{"ratio": 0.5}, {"epsilon": 0.0}, {"num_iterations": 0}, {"solver": "fast"}])
def test_a_soft_topk_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name} is"):
        SoftTopK(**wrong)
