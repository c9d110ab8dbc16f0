"""Causal conditional attention and feed-forward, against a walk over tokens in float64 that follows the definition."""

import math

import pytest
import torch
from dense_attention import dense_attention
from models import tiny_config

from modeling_colt5 import CoLT5Config, CoLT5ForCausalLM
from modeling_colt5.model_causal import CoLT5LayerCausalAttention, CoLT5LayerCausalFF
from modeling_colt5.model_from_config import causal_settings, implementation
from modeling_colt5.model_layers import bias_by_distance
from modeling_colt5.op_gates import Gates, causal_gates, window_thresholds
from modeling_colt5.op_pools import NO_TOKEN, Pools, gather_pools, links, prefix_top
from modeling_colt5.op_pools import pool_candidates_reference as pool_candidates
from modeling_colt5.op_routing import RoutedTokens
from modeling_colt5.run_causal_plan import CausalPlan

# what bisection leaves, and float64 sums in another order, over outputs of size 1
TOLERANCE = 1e-9


def causal_config(**fields) -> CoLT5Config:
    """Windows of 8 tokens, so that 50 tokens fill six and a part; pools of 12 hold more than one window."""
    causal = {"causal_attention": "routed", "causal_feed_forward": "routed", "causal_window": 8}
    return tiny_config(**({"num_heavy_heads": 4, "causal_routed_keys": 12} | causal | fields))


def soft_top_k(scores: torch.Tensor, k: float, epsilon: float) -> torch.Tensor:
    """min(1, exp((s - t) / ε)) with the t that makes the sum k, by bisection; all 1 where k reaches the number."""
    if k >= len(scores):
        return torch.ones_like(scores)
    low, high = scores.min() - epsilon * 50, scores.max() + epsilon * 50
    for _ in range(200):
        middle = (low + high) / 2
        if ((scores - middle) / epsilon).exp().clamp(max=1).sum() > k:
            low = middle
        else:
            high = middle
    return ((scores - low) / epsilon).exp().clamp(max=1)


def walk_gates(scores: list[float], config: CoLT5Config, fraction: float, fill_first: bool) -> list[float]:
    """Each token's weight, 0 where it is not routed, decided token by token."""
    window = config.causal_window
    target = math.ceil(fraction * window)
    capacity = math.ceil(config.causal_capacity_ratio * target)
    weights: list[float] = []
    for token, score in enumerate(scores):
        start = token // window * window
        if start == 0:
            first = [slot for slot in range(window) if (slot + 1) * target // window > slot * target // window]
            weights.append(1.0 if fill_first and token in first else 0.0)
            continue
        before = torch.tensor(scores[start - window : start], dtype=torch.float64)
        soft = soft_top_k(before, config.soft_topk_ratio * target, config.routing_epsilon)
        # a token of the window before has weight exp((s - t) / ε), which says what t is
        lowest = before.argmin()
        threshold = before[lowest] - config.routing_epsilon * soft[lowest].log()
        enough = score >= before.sort(descending=True).values[target - 1]
        room = sum(weight > 0 for weight in weights[start:]) < capacity
        weight = min(1.0, math.exp((score - threshold) / config.routing_epsilon))
        weights.append(weight if enough and room else 0.0)
    return weights


def walk_pools(scores: list[float], config: CoLT5Config) -> list[dict[int, float]]:
    """Token → weight of every window's pool, merged window by window."""
    window, size = config.causal_window, config.causal_routed_keys
    pools: list[dict[int, float]] = [{}]
    for start in range(0, len(scores) - window, window):
        candidates = sorted([*pools[-1], *range(start, start + window)])
        chosen = sorted(candidates, key=lambda token: (-scores[token], token))[:size]
        values = torch.tensor([scores[token] for token in candidates], dtype=torch.float64)
        weights = soft_top_k(values, config.soft_topk_ratio * len(chosen), config.routing_epsilon)
        pools.append({token: float(weights[candidates.index(token)]) for token in sorted(chosen)})
    return pools


def walk_attention(
    layer: CoLT5LayerCausalAttention,
    hidden_states: torch.Tensor,
    light_table: torch.Tensor,
    heavy_table: torch.Tensor,
    config: CoLT5Config,
) -> torch.Tensor:
    """The layer on one row [n, d_model]."""
    normed = layer.layer_norm(hidden_states[None])[0][0]
    length, position = len(normed), torch.arange(len(normed))[None]

    def heads(linear: torch.nn.Linear, states: torch.Tensor) -> torch.Tensor:
        return linear(states).view(1, len(states), -1, config.d_kv)

    light = layer.light_attention
    distance = position[0][:, None] - position[0][None, :]
    allowed = ((distance >= 0) & (distance <= config.local_radius))[None]
    states = (heads(linear, normed) for linear in (light.q, light.k, light.v))
    output = light.o(dense_attention(*states, light_table, position, position, allowed)[0].flatten(2))[0]

    heavy, groups = layer.heavy_attention, config.num_causal_key_value_routers
    weights = walk_gates((normed @ layer.query_router.weight).tolist(), config, config.routed_query_fraction, False)
    pools = [walk_pools((normed @ router.weight).tolist(), config) for router in layer.key_value_routers]
    for token in range(length):
        if weights[token] == 0:
            if config.causal_unrouted_vector:
                output[token] += layer.unrouted
            continue
        parts = []
        for group in range(groups):
            pool = pools[group][token // config.causal_window]
            keys = torch.tensor(list(pool))
            scaled = normed[keys] * torch.tensor(list(pool.values()), dtype=torch.float64)[:, None]
            own = slice(group * config.num_heavy_heads // groups, (group + 1) * config.num_heavy_heads // groups)
            query = heads(heavy.q, normed[token : token + 1])[:, :, own]
            key, value = (heads(linear, scaled)[:, :, own] for linear in (heavy.k, heavy.v))
            every = torch.ones(1, 1, len(keys), dtype=torch.bool)
            positions = (torch.tensor([[token]]), keys[None])
            parts.append(dense_attention(query, key, value, heavy_table[own], *positions, every)[0])
        output[token] += weights[token] * heavy.o(torch.cat(parts, 2).flatten())
    return hidden_states + output


def walk_feed_forward(layer: CoLT5LayerCausalFF, hidden_states: torch.Tensor, config: CoLT5Config) -> torch.Tensor:
    normed = layer.layer_norm(hidden_states[None])[0][0]
    scores = (normed @ layer.router.weight).tolist()
    weights = walk_gates(scores, config, config.routed_feed_forward_fraction, True)
    heavy = layer.heavy_feed_forward(normed) * torch.tensor(weights, dtype=torch.float64)[:, None]
    return hidden_states + layer.light_feed_forward(normed) + heavy


def make_model(config: CoLT5Config) -> CoLT5ForCausalLM:
    model = CoLT5ForCausalLM(config).double().eval()
    for block in model.decoder.block:
        if config.causal_unrouted_vector:
            torch.nn.init.normal_(block.layer[0].unrouted)
    return model


@pytest.mark.parametrize("length", [1, 8, 9, 50])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"causal_routed_keys": 3, "local_radius": 0},
        {"num_causal_key_value_routers": 2, "causal_unrouted_vector": True, "routing_epsilon": 0.3},
        {"causal_capacity_ratio": 1.0, "causal_window": 5, "local_radius": 11},
    ],
    ids=["pool above window", "pool below window", "two routers", "tight capacity"],
)
@torch.no_grad()
def test_layers_are_the_definition(length: int, fields: dict) -> None:
    config = causal_config(**fields)
    model = make_model(config)
    decoder, block = model.decoder, model.decoder.block[0]
    hidden_states = torch.randn(2, length, config.d_model, dtype=torch.float64)
    plan = CausalPlan.make(causal_settings(config), implementation(config), hidden_states, None, None)
    biases = decoder.light_relative_attention_bias, decoder.heavy_relative_attention_bias
    light, heavy = map(bias_by_distance, biases)
    causal = light.masked_fill(torch.arange(light.shape[1]) > light.shape[1] // 2, -torch.inf)
    attended, _, _ = block.layer[0](hidden_states, causal, heavy, plan, None)
    fed, _ = block.layer[1](hidden_states, plan, None)
    for row in range(2):
        expected = walk_attention(block.layer[0], hidden_states[row], light, heavy, config)
        torch.testing.assert_close(attended[row], expected, rtol=0, atol=TOLERANCE)
        expected = walk_feed_forward(block.layer[1], hidden_states[row], config)
        torch.testing.assert_close(fed[row], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("with_initial", [False, True])
@pytest.mark.parametrize("size", [2, 4, 7])
@pytest.mark.parametrize("windows", [1, 2, 5, 8])
def test_prefix_top_is_the_top_of_each_prefix(windows: int, size: int, with_initial: bool) -> None:
    window = 4
    # few values, so that most scores have equals
    scores = torch.randint(5, (3, windows * window)).float()
    initial, valid = None, None
    if with_initial:
        initial = torch.randint(5, (3, size)).float()
        valid = torch.arange(size) < torch.tensor([[size], [size // 2], [0]])
    tops = prefix_top(scores, window, size, initial, valid)
    for row in range(3):
        base = 0 if initial is None else size
        known = [] if initial is None else list(enumerate(initial[row][valid[row]].tolist()))
        for number in range(windows):
            best = sorted(known, key=lambda pair: (-pair[1], pair[0]))[:size]
            expected = sorted(place for place, _ in best)
            assert tops[row, number].tolist() == expected + [NO_TOKEN] * (size - len(expected))
            start = number * window
            known += [(base + token, float(scores[row, token])) for token in range(start, start + window)]


def test_links_lead_a_token_from_pool_to_pool() -> None:
    size, window = 5, 3
    candidates = pool_candidates(torch.randn(2, 8 * window), None, None, window, size)[1]
    following = links(candidates, size)
    for row in range(2):
        # pool j, as the candidates of pool j + 1 begin
        pools = [[token for token in line[:size].tolist() if token != NO_TOKEN] for line in candidates[row, 1:]]
        for number in range(1, 9):
            for place, token in enumerate(candidates[row, number].tolist()):
                pool = pools[number] if number < 8 else []
                expected = pool.index(token) if token in pool else -1
                assert following[row, number, place] == expected


def make_pools(rows: int, windows: int, window: int, size: int) -> Pools:
    """Pools of random scores, and random weights."""
    _, candidates, _, following = pool_candidates(torch.randn(rows, windows * window), None, None, window, size)
    indices = torch.cat([candidates[:, 1:, :size], candidates[:, -1:, :size]], 1)
    valid = indices != NO_TOKEN
    valid[:, -1] = False
    weights = torch.rand(indices.shape, dtype=torch.float64).masked_fill(~valid, 0)
    return Pools(RoutedTokens(indices.masked_fill(~valid, 0), weights, valid), following)


def test_gathering_adds_gradients_of_tokens_gathered_often() -> None:
    pools = make_pools(2, 4, 3, 5)
    key, value = torch.randn(2, 2, 12, 2, 3, dtype=torch.float64).requires_grad_().unbind(0)
    weights = pools.tokens.weights.requires_grad_()
    assert torch.autograd.gradcheck(lambda *states: gather_pools(*states[:2], pools, 0), (key, value, weights))
    keys, values = gather_pools(key, value, pools, 0)
    for row, window, slot in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(5)).tolist():
        token, weight = pools.tokens.indices[row, window, slot], weights[row, window, slot]
        torch.testing.assert_close(keys[row, window, slot], key[row, token] * weight)
        torch.testing.assert_close(values[row, window, slot], value[row, token] * weight)


def test_gradients_of_half_precision_are_summed_in_fp32() -> None:
    """In bf16 a sum of ones would stop growing at 256."""
    windows = 1000
    pools = make_pools(1, windows, 1, 1)
    # the best token stays in all pools after it
    token = int(pools.tokens.indices[0, windows - 1, 0])
    pools.tokens.weights = pools.tokens.valid.float()
    states = torch.randn(1, windows, 1, 1).bfloat16().requires_grad_()
    sum(part.sum() for part in gather_pools(states, states.detach(), pools, 0)).backward()
    assert windows - 1 - token > 300, "the seed gives too short a life to tell"
    # rounded once
    assert states.grad is not None and states.grad[0, token] == torch.tensor(windows - 1.0 - token).bfloat16()


@pytest.mark.parametrize("epsilon", [0.3, 1.0])
def test_thresholds_have_the_gradient_of_the_soft_top_k(epsilon: float) -> None:
    scores = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda scores: window_thresholds(scores, 4, 4.5, epsilon)[:, 1], (scores,))


def run_gates(scores: torch.Tensor, **settings) -> Gates:
    total = torch.full((len(scores),), scores[0].numel())
    return causal_gates(scores, None, total, None, **({"soft_topk_ratio": 9 / 8, "epsilon": 1.0} | settings))


def test_gates_follow_their_rule_where_scores_tie() -> None:
    """Scores that are all the same all reach the threshold, and the capacity cuts them."""
    gates = run_gates(torch.zeros(1, 3, 8), target=2, capacity=3, fill_first=True)
    assert gates.routed[0].tolist() == [[i in (3, 7) for i in range(8)], *[[i < 3 for i in range(8)]] * 2]
    # the soft top-k of 8 equal scores with k = 9/4
    torch.testing.assert_close(gates.weights[0, 1, :3], torch.full((3,), 9 / 32))
    assert gates.tokens.indices.tolist() == [[3, 7, 7], [0, 1, 2], [0, 1, 2]]
    assert gates.tokens.valid.tolist() == [[True, True, False], [True] * 3, [True] * 3]
    torch.testing.assert_close(gates.tokens.weights[1:], torch.full((2, 3), 9 / 32))
    assert gates.tokens.weights[0].tolist() == [1, 1, 0]


def test_budget_is_near_its_target_on_average() -> None:
    """Independent scores: the expected number above the k-th largest of w others is w · k / (w + 1)."""
    window, target = 32, 4
    gates = run_gates(torch.randn(64, 100, window), target=target, capacity=window, fill_first=False)
    mean = gates.routed[:, 1:].sum(-1).double().mean()
    # the number of a window has a variance of about 2k; 64 * 99 windows
    assert abs(float(mean) - window * target / (window + 1)) < 5 * math.sqrt(2 * target / (64 * 99))


def test_every_parameter_gets_the_gradient_of_finite_differences() -> None:
    config = causal_config(num_causal_key_value_routers=2, causal_unrouted_vector=True)
    model = make_model(config)
    decoder, block = model.decoder, model.decoder.block[0]
    # the norm takes its statistics in fp32, so they must not change with what is differentiated
    hidden_states, goal = torch.randn(2, 2, 37, config.d_model, dtype=torch.float64)
    plan = CausalPlan.make(causal_settings(config), implementation(config), hidden_states, None, None)

    def loss() -> torch.Tensor:
        biases = decoder.light_relative_attention_bias, decoder.heavy_relative_attention_bias
        light, heavy = map(bias_by_distance, biases)
        attended, _, _ = block.layer[0](hidden_states, light, heavy, plan, None)
        return ((attended + block.layer[1](hidden_states, plan, None)[0]) * goal).sum()

    loss().backward()
    names = ("light_relative_attention_bias", "heavy_relative_attention_bias", "block.0.")
    for name, parameter in decoder.named_parameters():
        if not name.startswith(names):
            continue
        assert parameter.grad is not None, name
        direction = torch.randn_like(parameter)
        slope = (parameter.grad * direction).sum()
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                values.append(loss())
                parameter.add_(direction, alpha=-step)
        numeric = (values[0] - values[1]) / 2e-6
        assert slope.abs() > 1e-4, f"{name} has no part in the loss"
        # central differences of a sum of size 100: 1e-14 / 1e-6 of rounding, and 1e-12 of curvature
        torch.testing.assert_close(slope, numeric, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
