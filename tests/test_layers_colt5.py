"""The layers: an encoder layer against the paper's equations written out, routers, budgets, attention, dropout."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from models import pad, random_ids, tiny_config, tiny_model
from rounding import assert_same_but_for_rounding
from torch import nn
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerNorm

from modeling_colt5 import CoLT5EncoderModel, CoLT5ForConditionalGeneration
from modeling_colt5.kernel_backend import product_dtype
from modeling_colt5.model_decoder_layer import CoLT5CrossAttention, CoLT5SelfAttention
from modeling_colt5.model_encoder_layer import CoLT5LayerConditionalFF, CoLT5LocalAttention, CoLT5RoutedAttention
from modeling_colt5.model_layers import (
    CoLT5Attention,
    CoLT5DenseActDense,
    CoLT5LayerNorm,
    clamp_half,
    masked_bias,
)
from modeling_colt5.model_router import CoLT5Router
from modeling_colt5.run_budgets import routed_budget, routed_capacity
from modeling_colt5.run_plan import DecoderPlan, EncoderPlan, Implementation


def brute_budget(n: int, fraction: float, minimum: int = 1) -> int:
    """min(n, max(minimum, ceil(fraction * n - 1e-6))) in exact rational arithmetic."""
    numerator, denominator = Fraction(fraction).as_integer_ratio()
    # ceil(a / b) is -(-a // b) in integers
    return min(n, max(minimum, -((denominator - numerator * n * 10**6) // (denominator * 10**6))))


def brute_soft_topk(scores: torch.Tensor, k: float, epsilon: float) -> torch.Tensor:
    """min(1, exp((s + a) / epsilon)) with the a that makes the sum k, by bisection in float64; ones if k is not less
    than the number of scores."""
    if k >= len(scores):
        return torch.ones_like(scores)
    low, high = -scores.max() - epsilon * 100, -scores.min() + epsilon * 100
    for _ in range(200):
        middle = (low + high) / 2
        if ((scores + middle) / epsilon).exp().clamp(max=1).sum() > k:
            high = middle
        else:
            low = middle
    return ((scores + low) / epsilon).exp().clamp(max=1)


def brute_route(states: torch.Tensor, router: torch.Tensor, fraction: float, config) -> tuple[list[int], torch.Tensor]:
    """The routed tokens [n, d_model] of one row in order of position, and their weights."""
    scores = states @ router
    budget = brute_budget(len(states), fraction, config.min_routed_tokens)
    chosen = sorted(sorted(range(len(states)), key=lambda i: (-scores[i].item(), i))[:budget])
    weights = brute_soft_topk(scores, config.soft_topk_ratio * budget, config.routing_epsilon)
    return chosen, weights[chosen]


def brute_attention(attention, queries, keys, query_positions, key_positions, bias_weight, radius, config):
    """T5 attention of one row with dense scores and an optional band."""
    distance = key_positions[None, :] - query_positions[:, None]
    bucket = T5Attention._relative_position_bucket(
        distance, True, config.relative_attention_num_buckets, config.relative_attention_max_distance
    )
    outputs = []
    for head in range(attention.q.weight.shape[0] // config.d_kv):
        part = slice(head * config.d_kv, (head + 1) * config.d_kv)
        q, k = queries @ attention.q.weight[part].T, keys @ attention.k.weight[part].T
        scores = q @ k.T + bias_weight[bucket, head]
        if radius is not None:
            scores[distance.abs() > radius] = -math.inf
        outputs.append(scores.softmax(-1) @ (keys @ attention.v.weight[part].T))
    return torch.cat(outputs, -1) @ attention.o.weight.T


def brute_feed_forward(layer, states: torch.Tensor) -> torch.Tensor:
    """Gated feed-forward with the tanh form of GELU."""
    gate = states @ layer.wi_0.weight.T
    gelu = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    return (gelu * (states @ layer.wi_1.weight.T)) @ layer.wo.weight.T


def brute_norm(states: torch.Tensor, norm, config) -> torch.Tensor:
    """T5's norm: by the root mean square, no bias."""
    return states / (states.pow(2).mean(-1, keepdim=True) + config.layer_norm_epsilon).sqrt() * norm.weight


def brute_layer(encoder, block, states: torch.Tensor, positions: torch.Tensor, config) -> torch.Tensor:
    """The paper's two equations for the real tokens [n, d_model] of one row, which stand at `positions`."""
    attention, feed_forward = block.layer
    x = brute_norm(states, attention.layer_norm, config)
    queries, query_weights = brute_route(x, attention.query_router.weight, config.routed_query_fraction, config)
    keys, key_weights = brute_route(x, attention.key_value_router.weight, config.routed_key_value_fraction, config)
    light_bias, heavy_bias = encoder.light_relative_attention_bias, encoder.heavy_relative_attention_bias
    light = brute_attention(
        attention.light_attention, x, x, positions, positions, light_bias.weight, config.local_radius, config
    )
    heavy = brute_attention(
        attention.heavy_attention,
        x[queries],
        key_weights[:, None] * x[keys],
        positions[queries],
        positions[keys],
        heavy_bias.weight,
        None,
        config,
    )
    states = states + light
    states[queries] += query_weights[:, None] * heavy

    x = brute_norm(states, feed_forward.layer_norm, config)
    tokens, weights = brute_route(x, feed_forward.router.weight, config.routed_feed_forward_fraction, config)
    states = states + brute_feed_forward(feed_forward.light_feed_forward, x)
    states[tokens] += weights[:, None] * brute_feed_forward(feed_forward.heavy_feed_forward, x[tokens])
    return states


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"local_radius": 0, "routing_epsilon": 0.1},
        {"local_radius": 400, "min_routed_tokens": 4, "soft_topk_ratio": 1.6},
        {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 9, "layer_norm_epsilon": 0.1},
    ],
)
@torch.no_grad()
@pytest.mark.usefixtures("float64_statistics")
def test_encoder_is_the_papers_equations(fields, attn_implementation):
    """Dense, row by row, in float64; rows padded left, right, with a hole, and not at all; longer than a block."""
    model = tiny_model(CoLT5EncoderModel, torch.float64, attn_implementation, **fields)
    config, encoder = model.config, model.encoder
    for parameter in encoder.parameters():
        # norms and biases away from their special initial values
        parameter.add_(0.1 * torch.randn_like(parameter))
    states = torch.randn(4, 150, config.d_model, dtype=torch.float64)
    mask = torch.ones(4, 150, dtype=torch.bool)
    mask[1, 60:], mask[2, :31], mask[3, 20:50] = False, False, False
    mask[3, 144] = False
    output = model(inputs_embeds=states, attention_mask=mask).last_hidden_state
    for row in range(4):
        positions = mask[row].nonzero().squeeze(-1)
        expected = states[row, positions]
        for block in encoder.block:
            expected = brute_layer(encoder, block, expected, positions, config)
        expected = brute_norm(expected, encoder.final_layer_norm, config)
        # float64 sums of a few hundred terms of size up to 10
        torch.testing.assert_close(output[row, positions], expected, atol=1e-11, rtol=1e-11)


FRACTIONS = sorted(
    {float(p) / q for q in (1, 2, 3, 7, 10, 16, 48, 100) for p in range(1, q + 1)} | {1e-9, 0.999999, 1 - 1e-12}
)


def test_budgets_are_exact_for_every_length_and_fraction():
    lengths = torch.arange(1, 2049)
    rounds_differently = 0
    for fraction in FRACTIONS:
        expected = torch.tensor([brute_budget(n, fraction) for n in lengths.tolist()])
        assert torch.equal(routed_budget(lengths, fraction, 1), expected)
        single = (lengths.float() * fraction - 1e-6).ceil().long().clamp(min=1).minimum(lengths)
        rounds_differently += (single != expected).sum().item()
    # the pairs are those that fp32 gets wrong, and this test would notice
    assert rounds_differently > 500


def test_budgets_have_a_least_number_and_never_exceed_the_tokens():
    lengths = torch.arange(0, 300)
    for fraction in (1 / 16, 0.3, 1.0):
        for minimum in (1, 5, 64):
            budget = routed_budget(lengths, fraction, minimum)
            assert budget.tolist() == [brute_budget(n, fraction, minimum) for n in lengths.tolist()]
            assert (budget <= lengths).all()


def test_capacity_holds_every_row_of_the_length():
    for fraction in (1 / 16, 1 / 3, 0.07, 1.0):
        for minimum in (1, 9):
            largest = 0
            for n in range(1, 600):
                largest = max(largest, brute_budget(n, fraction, minimum))
                assert routed_capacity(n, fraction, minimum) == largest


@torch.no_grad()
def test_each_row_routes_by_its_own_number_of_real_tokens():
    model = tiny_model(
        CoLT5EncoderModel, routed_query_fraction=1 / 16, routed_key_value_fraction=0.3, min_routed_tokens=2
    )
    mask = torch.zeros(5, 90, dtype=torch.int64)
    mask[0], mask[1, 30:71], mask[2, ::3], mask[3, 89] = 1, 1, 1, 1
    counts = (90, 41, 30, 1, 0)
    for layer in model(random_ids(5, 90), attention_mask=mask, output_routing=True).routing:
        for kind, fraction in (("query", 1 / 16), ("key_value", 0.3), ("feed_forward", 1 / 5)):
            assert layer[kind].valid.sum(-1).tolist() == [brute_budget(n, fraction, 2) for n in counts]
            assert layer[kind].valid.shape[1] == brute_budget(90, fraction, 2)


def routed_ranks(routing: str, mask: torch.Tensor, fraction: float, training: bool = False) -> list[list[list[int]]]:
    """What each router of a control's encoder routes of each row, by rank among the row's real tokens; all routers
    have one fraction. Weights must be 1."""
    names = ("query", "key_value", "feed_forward")
    fractions = {f"routed_{name}_fraction": fraction for name in names}
    model = tiny_model(CoLT5EncoderModel, routing=routing, **fractions).train(training)
    with torch.no_grad():
        output = model(random_ids(*mask.shape), attention_mask=mask, output_routing=True)
    rank, routers = mask.long().cumsum(-1) - 1, []
    for routed in (layer[name] for layer in output.routing for name in names):
        assert torch.equal(routed.weights, routed.valid.float())
        rows = [routed.indices[row, routed.valid[row]] for row in range(len(mask))]
        assert all(mask[row, used].all() and (used.diff() > 0).all() for row, used in enumerate(rows))
        routers.append([rank[row, used].tolist() for row, used in enumerate(rows)])
    return routers


@pytest.mark.parametrize("routing", ["random", "even"])
@pytest.mark.parametrize("training", [False, True])
def test_controls_route_the_budget(routing, training):
    mask = torch.ones(3, 64, dtype=torch.bool)
    mask[1, 40:], mask[2, :59] = False, False
    for rows in routed_ranks(routing, mask, 1 / 4, training):
        assert [len(row) for row in rows] == [16, 10, 2]


def test_even_control_spaces_evenly():
    for n, budget in ((64, 16), (100, 7), (31, 30), (31, 31), (17, 1), (1000, 63)):
        for (chosen,) in routed_ranks("even", torch.ones(1, n, dtype=torch.bool), budget / n):
            assert len(chosen) == budget
            gaps = {later - earlier for earlier, later in zip([chosen[-1] - n, *chosen], chosen, strict=False)}
            # around the circle, gaps are n / budget rounded down or up
            assert gaps <= {n // budget, -(-n // budget)}


def test_random_control_is_fixed_in_evaluation_and_anew_in_training():
    mask = torch.ones(2, 200, dtype=torch.bool)
    first, again = (routed_ranks("random", mask, 1 / 4) for _ in range(2))
    assert first == again
    # rows agree, routers and layers do not
    assert all(rows[0] == rows[1] for rows in first)
    assert len({tuple(rows[0]) for rows in first}) == len(first) == 6
    one, two = (routed_ranks("random", mask, 1 / 4, training=True) for _ in range(2))
    assert all(a != b and a[0] != a[1] for a, b in zip(one, two, strict=True))


def test_random_control_routes_every_token_alike():
    """Each token as often as any other, within five standard deviations of a binomial share."""
    for rows in routed_ranks("random", torch.ones(600, 20, dtype=torch.bool), 1 / 4, training=True):
        counts = torch.tensor(rows).flatten().bincount(minlength=20)
        assert ((counts - 150).abs() < 5 * math.sqrt(600 * 0.25 * 0.75)).all()
    # in evaluation by each of many routers, which differ by their seed alone
    counts, budget = torch.zeros(200), torch.tensor([50])
    for seed in range(400):
        scores = CoLT5Router(32, "random", seed).eval().control_scores(torch.zeros(1, 200, 32), None, budget)
        counts[scores[0].topk(50).indices] += 1
    assert ((counts - 100).abs() < 5 * math.sqrt(400 * 0.25 * 0.75)).all()


@pytest.mark.parametrize("routing", ["random", "even"])
def test_controls_do_not_see_padding(routing):
    alone = routed_ranks(routing, torch.ones(1, 37, dtype=torch.bool), 1 / 4)
    for before, after in ((0, 20), (20, 0), (11, 90)):
        assert routed_ranks(routing, nn.functional.pad(torch.ones(1, 37), (before, after)).bool(), 1 / 4) == alone


def test_no_routing_has_no_heavy_branch():
    with torch.device("meta"):
        none = CoLT5EncoderModel(tiny_config(routing="none"))
        even = CoLT5EncoderModel(tiny_config(routing="even"))
        learned = CoLT5EncoderModel(tiny_config())
    names = {name for name, _ in none.named_parameters()}
    assert not any("heavy" in name or "router" in name for name in names)
    assert names == {name for name, _ in learned.named_parameters() if "heavy" not in name and "router" not in name}
    assert {name for name, _ in even.named_parameters()} == {
        name for name, _ in learned.named_parameters() if "router" not in name
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_norm_is_t5s(dtype):
    config = tiny_config()
    norm, expected = (
        CoLT5LayerNorm(config.d_model, config.layer_norm_epsilon),
        T5LayerNorm(config.d_model, config.layer_norm_epsilon),
    )
    with torch.no_grad():
        norm.weight.copy_(expected.weight.normal_())
    norm, expected = norm.to(dtype), expected.to(dtype)
    states = (30 * torch.randn(2, 7, config.d_model)).to(dtype)
    output, scores = norm(states)
    assert output.dtype == dtype and scores is None
    # T5's in half precision rounds the root mean square once more; in fp32 the means may differ in their last bits
    torch.testing.assert_close(output, expected(states), rtol=2 * torch.finfo(dtype).eps + 1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_encoder_says_its_shape_without_data(dtype):
    model = tiny_model(CoLT5EncoderModel, dtype).to("meta")
    batch = {name: tensor.to("meta") for name, tensor in pad([random_ids(20), random_ids(9)]).items()}
    output = model(**batch).last_hidden_state
    assert output.shape == (2, 20, model.config.d_model) and output.dtype == dtype


def test_norm_scores_are_fp32_under_autocast():
    """Issue 2: scores and norms in fp32 even under autocast, where a plain matrix product would be in bf16."""
    norm = CoLT5LayerNorm(32)
    states, routers = torch.randn(2, 50, 32), torch.randn(2, 32)
    normed, scores = norm(states, routers)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast, scores_under_autocast = norm(states, routers)
    assert scores_under_autocast.dtype == torch.float32
    assert_same_but_for_rounding(scores_under_autocast, scores)
    assert_same_but_for_rounding(under_autocast, normed)
    # what products alone read is rounded as they would round it, and without autocast not at all
    with torch.autocast("cpu", torch.bfloat16):
        rounded = norm(states, for_products=True)[0]
    # half of bf16's last bit, and fp32's rounding where the states are computed again
    assert rounded.dtype == torch.bfloat16
    assert ((rounded.float() - normed).abs() <= (2**-8 + 1e-6) * normed.abs()).all()
    assert_same_but_for_rounding(norm(states, for_products=True)[0], normed)
    assert product_dtype(states.double()) is None
    expected = torch.einsum("bnd,rd->brn", normed.double(), routers.double())
    # fp32 sums of 32 products of size up to 10
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)


def attention_calls(model, **inputs) -> list[tuple[nn.Module, tuple, torch.Tensor]]:
    """Each attention module of a model with the arguments it got in a forward pass, and its output."""
    calls, handles = [], []
    for module in model.modules():
        if isinstance(module, CoLT5Attention):
            hook = module.register_forward_hook(lambda module, args, output: calls.append((module, args, output)))
            handles.append(hook)
    # a cache would hold what the decoder's attention appends, and a second call append again
    model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [1, 2, 4])
@torch.no_grad()
def test_eager_and_sdpa_agree_in_every_attention(dtype, groups):
    """Given the same inputs: in half precision the states of whole models would come to route other tokens."""
    model = tiny_model(CoLT5ForConditionalGeneration, dtype, "eager", num_cross_key_value_heads=groups)
    batch = pad([random_ids(150), random_ids(40)], "left")
    calls = attention_calls(model, **batch, decoder_input_ids=random_ids(2, 9))
    kinds = {CoLT5LocalAttention: 2, CoLT5RoutedAttention: 2, CoLT5SelfAttention: 3, CoLT5CrossAttention: 3}
    assert {kind: sum(type(module) is kind for module, _, _ in calls) for kind in kinds} == kinds
    for module, args, (eager, weights, *_) in calls:
        by_sdpa = Implementation("torch", "sdpa")
        if isinstance(module, CoLT5SelfAttention):
            states, bias, plan, *rest = args
            args = [states, masked_bias(bias, plan.mask, 0, dtype), plan, *rest]
        args = [
            replace(arg, implementation=by_sdpa) if isinstance(arg, EncoderPlan | DecoderPlan) else arg for arg in args
        ]
        sdpa, no_weights, *_ = module(*args)
        assert weights is not None and no_weights is None
        if isinstance(module, CoLT5LocalAttention):
            real = batch["attention_mask"].bool()
            eager, sdpa = eager[real], sdpa[real]
        # sums in another order; in half precision a handful of roundings of scores and weights
        limit = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 16 * torch.finfo(dtype).eps)
        assert (eager - sdpa).abs().max() <= limit * eager.abs().max(), module


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_stack_sets_the_attention_of_all(part):
    model = tiny_model()
    getattr(model, part).set_attn_implementation("eager")
    output = model(input_ids=random_ids(1, 9), decoder_input_ids=random_ids(1, 3), output_attentions=True)
    assert len(output.encoder_attentions) == 2 and len(output.cross_attentions) == 3


def test_encoder_attentions_are_not_causal():
    """sdpa takes an attention module without `is_causal=False` for causal when there is no mask."""
    kinds = [CoLT5LocalAttention(32, 8, 2, 5), CoLT5RoutedAttention(32, 8, 3), CoLT5CrossAttention(32, 8, 4, 1)]
    assert not any(attention.is_causal for attention in kinds)
    assert CoLT5SelfAttention(32, 8, 4).is_causal


@torch.no_grad()
def test_multi_query_attention_is_t5s_with_one_key_and_value_repeated():
    attention = CoLT5CrossAttention(d_model=32, d_kv=8, num_heads=4, num_key_value_heads=1).double()
    t5 = T5Attention(
        T5Config(d_model=32, d_kv=8, num_heads=4, is_decoder=True, attn_implementation="eager"), layer_idx=0
    )
    t5 = t5.double().eval()
    t5.q.weight.copy_(attention.q.weight)
    t5.o.weight.copy_(attention.o.weight)
    t5.k.weight.copy_(attention.k.weight.repeat(4, 1))
    t5.v.weight.copy_(attention.v.weight.repeat(4, 1))
    x, y = torch.randn(2, 5, 32).double(), torch.randn(2, 9, 32).double()
    output, weights, _ = attention(x, y, DecoderPlan(Implementation(attention="eager")), None, 0)
    expected, *_ = t5(x, key_value_states=y)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    assert weights.shape == (2, 4, 5, 9)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5).double())


def dropout_sites(monkeypatch, model, **inputs) -> list[tuple[int, ...]]:
    """The shapes of everything that goes through dropout in a training forward pass."""
    shapes = []

    def record(states, p=0.5, training=True, inplace=False):
        assert (p, training) == (0.1, True)
        shapes.append(tuple(states.shape))
        return states

    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "dropout", record)
        model.train()(**inputs)
    return shapes


def test_dropout_stands_where_t5_has_it(monkeypatch):
    ids = torch.randint(3, 96, (2, 20))
    model = tiny_model(attn_implementation="eager", dropout_rate=0.1, num_layers=1, num_decoder_layers=1)
    t5_config = T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_decoder_layers=1, num_heads=4,
        feed_forward_proj="gated-gelu", attn_implementation="eager",
    )  # fmt: skip
    states = (2, 20, 32)
    sites = dropout_sites(monkeypatch, model.encoder, input_ids=ids)
    # queries 20 / 4, keys 20 / 3, tokens 20 / 5; the light scores are folded into blocks of 128 with 5 to each side
    light, heavy = [(2, 2, 128, 138), (2, 3, 5, 7)], [(2, 20, 24), (2, 4, 64)]
    assert sorted(sites) == sorted([states, *light, states, *heavy, states, states])
    t5_sites = dropout_sites(monkeypatch, T5EncoderModel(t5_config), input_ids=ids)
    assert sorted(t5_sites) == sorted([states, (2, 4, 20, 20), states, (2, 20, 48), states, states])

    decoder_ids, encoder_outputs = ids[:, :7], (torch.randn(states),)
    inputs = {"decoder_input_ids": decoder_ids, "encoder_outputs": encoder_outputs}
    ours = dropout_sites(monkeypatch, model, **inputs)
    t5s = dropout_sites(monkeypatch, T5ForConditionalGeneration(t5_config), **inputs)
    # the heads that share a key/value head are queries of one: the same weights in another shape
    assert sorted(math.prod(shape) for shape in ours) == sorted(math.prod(shape) for shape in t5s)


@pytest.mark.slow
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_attention_dropout_keeps_the_mean(attn_implementation):
    """The output is linear in the weights, so that its mean over many draws is the output without dropout."""
    model = tiny_model(attn_implementation=attn_implementation, dropout_rate=0.5, num_layers=1, num_decoder_layers=1)
    ids = random_ids(1, 10).expand(500, -1)
    calls = attention_calls(model, input_ids=ids, decoder_input_ids=ids[:, :4])
    assert len(calls) == 4
    for module, args, (without, *_) in calls:
        draws, *_ = module.train()(*args)
        assert (draws.std(0).amax(-1) > 0).any()
        # six standard errors for the largest of a few hundred numbers; the first decoder token has one key
        assert ((draws.mean(0) - without[0]).abs() <= 6 * draws.std(0) / math.sqrt(500) + 1e-6).all()


@pytest.mark.parametrize("projection", ["gated-gelu", "gated-silu", "relu"])
@torch.no_grad()
def test_feed_forward_runs_with_a_wo_in_fp32(projection):
    """`wo` stays in fp32 in an fp16 model (`_keep_in_fp32_modules`)."""
    model = tiny_model(CoLT5ForConditionalGeneration, feed_forward_proj=projection)
    layer = model.encoder.block[0].layer[1]
    assert isinstance(layer, CoLT5LayerConditionalFF)
    branch = layer.light_feed_forward
    states = torch.randn(2, 6, 32)
    expected = branch(states)
    branch.half().wo.float()
    # fp16 roundings of the inputs, weights and hidden units
    torch.testing.assert_close(branch(states.half()), expected, rtol=1e-2, atol=1e-2)


def test_clamp_saves_fp16_from_infinities_only():
    states = torch.tensor([1.0, -2.0, 6e4, 65504.0, torch.inf, -torch.inf])
    assert torch.equal(clamp_half(states), states)
    clamped = clamp_half(states.half())
    assert clamped.isfinite().all()
    assert torch.equal(clamped[:3], states[:3].half())


@pytest.mark.parametrize("model_class", [CoLT5EncoderModel, CoLT5ForConditionalGeneration])
def test_another_activation_is_used_and_hooks_on_it_see_its_values(model_class):
    model = tiny_model(model_class)
    ids = random_ids(2, 12)
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :4]} if hasattr(model, "decoder") else {})
    before = model(**inputs)[0]
    parts = [part for part in model.modules() if isinstance(part, CoLT5DenseActDense)]
    assert len(parts) == len(model.encoder.block) * 2 + (len(model.decoder.block) if hasattr(model, "decoder") else 0)
    for part in parts:
        seen = []
        hook = part.act.register_forward_hook(lambda module, args, output, seen=seen: seen.append((*args, output)))
        torch.testing.assert_close(model(**inputs)[0], before)
        hook.remove()
        ((gate, activated),) = seen
        torch.testing.assert_close(activated, nn.functional.gelu(gate, approximate="tanh"))
        own, part.act = part.act, nn.Tanh()
        # the same product of weights with the activation written out
        gate = torch.randn(3, 32)
        expected = part.wo(part.wi_0(gate).tanh() * part.wi_1(gate))
        torch.testing.assert_close(part(gate), expected)
        assert (model(**inputs)[0] - before).abs().max() > 1e-3
        part.act = own
    torch.testing.assert_close(model(**inputs)[0], before)


@pytest.mark.parametrize("dense_start", [None, 0.0, 0.5])
@pytest.mark.parametrize("minimum", [1, 6])
def test_without_padding_all_slots_are_used(dense_start, minimum, device):
    """Heavy attention masks no slot then; a mask of ones, with which it does, gives the same."""
    model = tiny_model(CoLT5EncoderModel, min_routed_tokens=minimum).to(device).train()
    model.set_dense_start(dense_start)
    for length in (1, 2, 5, 7, 12, 40, 41):
        ids = random_ids(2, length).to(device)
        output = model(ids, output_routing=True)
        for layer in output.routing:
            assert bool(layer.query.valid.all()) and bool(layer.key_value.valid.all())
        masked = model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        assert_same_but_for_rounding(output.last_hidden_state, masked)
