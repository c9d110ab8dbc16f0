"""Conditional attention and feed-forward of a causal decoder: no output depends on any later token."""

from typing import Any

import torch
from torch import Tensor, nn

from .configuration_colt5 import CoLT5Config
from .model_layers import CoLT5Attention, CoLT5DenseActDense, CoLT5LayerNorm, clamp_half, project
from .model_position import bias_of_sequence
from .model_router import CoLT5Router, router_weights
from .op_attention import local_attention, local_attention_reference, routed_attention, routed_attention_reference
from .op_gates import Gates, causal_gates
from .op_pools import Pools, gather_pools, routed_pools
from .op_routing import RoutedTokens
from .op_rows import gather_tokens, scatter_add_tokens, share_and_gather
from .run_causal_plan import CausalPlan, take

# what the cache keeps of a pool, each [batch, 2, groups, pool size, ...]
POOL_PARTS = ("key", "value", "score", "rank", "weight", "valid")


def _run_gates(
    scores: Tensor, plan: CausalPlan, cache: Any, name: str, target: int, fill_first: bool
) -> tuple[Gates, RoutedTokens]:
    """Gates of one router, and the chunk's routed tokens in the slots of their windows.

    Args:
        scores: fp32 [batch, n], by rank.
        plan: the chunk's windows.
        cache: the layer's routed cache, which the router's scores and thresholds are kept in; None for none.
        name: of the router in the cache.
        target: tokens to route in a window on average.
        fill_first: see `causal_gates`.

    Returns:
        The gates, and RoutedTokens in rows [batch * windows], or [batch] of one slot for a step of one token.
    """
    settings = plan.settings
    ring = cache.rings.get(name) if cache is not None else None
    carried = cache.carried.get(name) if cache is not None else None
    joined = plan.join(ring, scores)
    gates = causal_gates(
        plan.frame_joined(joined).unflatten(1, (-1, settings.window)),
        plan.past,
        plan.total,
        None if carried is None else carried[:, 0],
        target=target,
        capacity=settings.capacity(target),
        soft_topk_ratio=settings.soft_topk_ratio,
        epsilon=settings.epsilon,
        fill_first=fill_first,
        kernel_backend=settings.kernel_backend,
    )
    if cache is not None:
        cache.write("rings", {name: plan.advance_ring(joined.detach())})
        cache.write("carried", {name: plan.keep_carried(carried, plan.handed(gates.thresholds.detach()))})
    tokens = gates.tokens
    if plan.is_step:
        # the token is in the first slot or in none, and has a row of its own
        tokens = RoutedTokens(plan.own_slot, tokens.weights[:, :1], tokens.valid[:, :1])
    return gates, tokens


def _windows(states: Tensor, plan: CausalPlan) -> Tensor:
    """[batch, n, d] by rank → [batch * windows, window, d]; a step's one token stays as it is."""
    if plan.is_step:
        return states
    return plan.frame(states).unflatten(1, (-1, plan.settings.window)).flatten(0, 1)


def _tokens(windows: Tensor, plan: CausalPlan) -> Tensor:
    """The inverse of `_windows`."""
    if plan.is_step:
        return windows
    return plan.unframe(windows.unflatten(0, (len(plan.counts), -1)).flatten(1, 2))


def _share_and_gather(states: Tensor, tokens: RoutedTokens, plan: CausalPlan) -> tuple[Tensor, Tensor]:
    """The states [batch, n, d], for all that reads them, and their routed tokens in slots [rows, capacity, d]."""
    backend = plan.settings.kernel_backend
    if plan.past is not None:
        return states, gather_tokens(_windows(states, plan), tokens.indices, tokens.valid, kernel_backend=backend)
    routing = (tokens.indices, tokens.valid, None)
    windows, rows = share_and_gather(_windows(states, plan), routing, kernel_backend=backend)
    return _tokens(windows, plan), rows


def _scatter_add(light: Tensor, heavy: Tensor, tokens: RoutedTokens, plan: CausalPlan) -> Tensor:
    """The light branch [batch, n, d] with the weighted heavy rows [rows, capacity, d] added where they belong."""
    total = scatter_add_tokens(
        _windows(light, plan), heavy, tokens.indices, tokens.valid, tokens.weights, plan.settings.kernel_backend
    )
    return _tokens(total, plan)


def _token_weights(gates: Gates, tokens: RoutedTokens, plan: CausalPlan) -> Tensor:
    """Each token's routing weight, fp32 [batch, n] by position; 0 for tokens that were not routed."""
    if plan.is_step:
        return tokens.weights
    return plan.leave(plan.unframe(gates.weights.flatten(1)))


def light_bias(bias_table: Tensor, plan: CausalPlan) -> Tensor:
    """What every layer's light attention adds to its scores, from the bias by distance [heads, 2 * max_distance + 1].

    Such a table again, -inf for keys after the query, which makes a band of both sides causal; of a step the bias of
    its keys, [1, heads, 1, local_radius + 1].
    """
    if plan.is_step:
        radius = plan.settings.radius
        return bias_of_sequence(bias_table, 1, radius + 1, radius)[None]
    later = torch.arange(bias_table.shape[1], device=bias_table.device) > bias_table.shape[1] // 2
    return bias_table.masked_fill(later, -torch.inf)


def _parts(states: Tensor, groups: int, dim: int) -> tuple[Tensor, ...]:
    """One part for each group; where there is one group the states themselves, without a copy of their gradient."""
    return (states,) if groups == 1 else states.chunk(groups, dim)


class CoLT5CausalLocalAttention(CoLT5Attention):
    """The light branch: every token attends to itself and the `local_radius` tokens before it."""

    is_causal = True

    def forward(self, hidden_states: Tensor, bias: Tensor, plan: CausalPlan, cache: Any) -> Tensor:
        """[batch, n, d_model] by rank → the same shape; for `bias` see `light_bias`."""
        settings = plan.settings
        query, key, value = project(hidden_states, self.q, self.k, self.v, head_size=self.d_kv)
        rings = {} if cache is None else cache.rings
        new = {"light_key": key, "light_value": value}
        joined = {name: plan.join(rings.get(name), states) for name, states in new.items()}
        keys, values = map(plan.recent, joined.values())
        before = 0 if plan.past is None else settings.radius
        if cache is not None:
            cache.write("rings", {name: plan.advance_ring(states.detach()) for name, states in joined.items()})
        mask = plan.light_mask
        if plan.is_step:
            query, keys, values = (states.transpose(1, 2) for states in (query, keys, values))
            output, _ = self.attend(query, keys, values, bias, None if mask is None else mask[:, None, None])
            return self.o(output.flatten(-2))
        padded = query if before == 0 else nn.functional.pad(query, (0, 0, 0, 0, before, 0))
        inputs = (padded, keys, values, bias, settings.radius, mask)
        if settings.fused_attention:
            output = local_attention(*inputs, self.dropout if self.training else 0.0)
        else:
            output, _ = local_attention_reference(*inputs, self.attend)
        return self.o((output if before == 0 else output[:, before:]).flatten(-2))


class CoLT5CausalRoutedAttention(CoLT5Attention):
    """The heavy branch: a window's routed queries attend to the keys/values that its pool holds."""

    is_causal = True

    def __init__(self, config: CoLT5Config):
        super().__init__(config, config.num_heavy_heads)
        self.groups = config.num_causal_key_value_routers

    def forward(
        self,
        hidden_states: Tensor,
        query_states: Tensor,
        scores: Tensor,
        queries: RoutedTokens,
        bias_table: Tensor,
        plan: CausalPlan,
        cache: Any,
    ) -> tuple[Tensor, RoutedTokens]:
        """Attention of routed queries to each window's pool.

        Args:
            hidden_states: [batch, n, d_model], by rank.
            query_states: [rows, query slots, d_model], the routed ones of them.
            scores: fp32 [batch, n, groups], of the keys/values, by rank.
            queries: what was routed, in rows [batch * windows], or [batch] for a step.
            bias_table: [heads, 2 * max_distance + 1].
            plan: the chunk's windows.
            cache: the layer's routed cache; None for none.

        Returns:
            The output [rows, query slots, d_model], and the pools [batch, groups, windows + 1, pool size], whose
            `indices` are ranks.
        """
        settings = plan.settings
        size, groups, batch = settings.pool_size, self.groups, len(hidden_states)
        key, value = project(hidden_states, self.k, self.v, head_size=self.d_kv)
        rings = {} if cache is None else cache.rings
        # W_k (s̃ x) = s̃ W_k x: one projection a token, scaled anew in every window's pool
        new = {"heavy_key": key, "heavy_value": value, "key_value_scores": scores}
        joined = {name: plan.join(rings.get(name), states) for name, states in new.items()}
        # without a past keys and values stay as they are: no pool that is read holds a token of a window's open end
        framed = [
            joined[name] if plan.past is None else plan.frame_joined(joined[name])
            for name in ("heavy_key", "heavy_value")
        ]
        known = plan.frame_joined(joined["key_value_scores"]).transpose(1, 2)
        old: dict[str, Tensor] = {}
        initial = None
        if plan.past is not None:
            old = {name: cache.carried[f"pool_{name}"][:, 0] for name in POOL_PARTS}
            score, *first = (old[name].flatten(0, 1) for name in ("score", "rank", "weight", "valid"))
            initial = (score, RoutedTokens(*first))
        pools = routed_pools(
            known.flatten(0, 1),
            settings.window,
            size,
            initial,
            soft_topk_ratio=settings.soft_topk_ratio,
            epsilon=settings.epsilon,
            kernel_backend=settings.kernel_backend,
        )
        index, weights, valid, following = (
            part.unflatten(0, (batch, groups))
            for part in (pools.tokens.indices, pools.tokens.weights, pools.tokens.valid, pools.following)
        )
        # without a past a token's index is its rank
        ranks = index
        if old:
            ranks = torch.cat([old["rank"], plan.ranks[:, None].expand(-1, groups, -1)], -1)
            ranks = ranks.gather(-1, index.flatten(2)).view(index.shape)

        query = self.split_heads(self.q(query_states))
        positions = plan.starts + queries.indices
        outputs, sources = [], []
        queries_of, tables = _parts(query, groups, 2), _parts(bias_table, groups, 0)
        keys_of, values_of = (_parts(states, groups, 2) for states in framed)
        pools_of = zip(*(_parts(part, groups, 1) for part in (index, weights, valid, following, ranks)), strict=True)
        for group, parts in enumerate(pools_of):
            pool_index, pool_weights, pool_valid, pool_following, pool_ranks = (part.squeeze(1) for part in parts)
            states = (keys_of[group], values_of[group])
            if old:
                states = (
                    torch.cat([old["key"][:, group], states[0]], 1),
                    torch.cat([old["value"][:, group], states[1]], 1),
                )
            sources.append(states)
            group_pools = Pools(RoutedTokens(pool_index, pool_weights, pool_valid), pool_following)
            keys, values = gather_pools(*states, group_pools, size if old else 0, settings.kernel_backend)
            inputs = (
                queries_of[group],
                keys.flatten(0, 1),
                values.flatten(0, 1),
                tables[group],
                positions,
                pool_ranks[:, :-1].flatten(0, 1),
                pool_valid[:, :-1].flatten(0, 1),
            )
            if settings.fused_attention and not plan.is_step:
                outputs.append(routed_attention(*inputs, self.dropout if self.training else 0.0))
            else:
                outputs.append(routed_attention_reference(*inputs, self.attend)[0])
        if cache is not None:
            cache.write("rings", {name: plan.advance_ring(states.detach()) for name, states in joined.items()})
            known = torch.cat([old["score"], known], -1) if old else known
            self._carry(plan, cache, sources, known, index, ranks, weights, valid)
        output = outputs[0] if groups == 1 else torch.cat(outputs, 2)
        return self.o(output.flatten(-2)), RoutedTokens(ranks, weights, valid)

    def _carry(
        self,
        plan: CausalPlan,
        cache: Any,
        sources: list[tuple[Tensor, Tensor]],
        scores: Tensor,
        index: Tensor,
        ranks: Tensor,
        weights: Tensor,
        valid: Tensor,
    ) -> None:
        """Hand the pool of each row's next token on, and the one before it."""
        parts = {"index": index, "rank": ranks, "weight": weights.detach(), "valid": valid}
        chosen = {name: plan.handed(part.transpose(1, 2)) for name, part in parts.items()}
        slots = chosen.pop("index").transpose(1, 2)
        chosen["score"] = scores.detach().gather(-1, slots.flatten(2)).view(slots.shape).transpose(1, 2)
        for place, name in enumerate(("key", "value")):
            # no pool that is read holds a token of a window's open end, which may not be there
            groups = [
                take(states[place].detach(), slots[:, group].flatten(1).clamp(max=states[place].shape[1] - 1))
                for group, states in enumerate(sources)
            ]
            part = groups[0][:, None] if len(groups) == 1 else torch.stack(groups, 1)
            chosen[name] = part.unflatten(2, slots.shape[2:]).transpose(1, 2)
        for name, value in chosen.items():
            name = f"pool_{name}"
            cache.write("carried", {name: plan.keep_carried(cache.carried.get(name), value)})


class CoLT5LayerCausalAttention(nn.Module):
    """Norm, causal local attention for every token, routed attention for the few important ones, residual."""

    def __init__(self, config: CoLT5Config, layer_idx: int):
        super().__init__()
        self.layer_norm = CoLT5LayerNorm(config)
        self.light_attention = CoLT5CausalLocalAttention(config, config.num_light_heads)
        if config.causal_attention == "routed":
            self.query_router = CoLT5Router(config, seed=0)
            self.key_value_routers = nn.ModuleList(
                CoLT5Router(config, seed=0) for _ in range(config.num_causal_key_value_routers)
            )
            self.heavy_attention = CoLT5CausalRoutedAttention(config)
            if config.causal_unrouted_vector:
                self.unrouted = nn.Parameter(torch.empty(config.d_model))
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(
        self,
        hidden_states: Tensor,
        bias: Tensor,
        heavy_bias_table: Tensor | None,
        plan: CausalPlan,
        cache: Any,
    ) -> tuple[Tensor, Tensor | None, RoutedTokens | None]:
        """X + LightAttn(X) + s̃ᵩ · HeavyAttn(X, pool of all windows before), see docs/causal_routing.md.

        Args:
            hidden_states: [batch, n, d_model].
            bias: of the light attention, see `light_bias`.
            heavy_bias_table: None with causal_attention "local".
            plan: the chunk's windows.
            cache: the layer's routed cache; None for none.

        Returns:
            The new hidden states, the queries' routing weights [batch, n] and the pools, the last two None with
            causal_attention "local".
        """
        backend = plan.settings.kernel_backend
        if heavy_bias_table is None:
            normed, _ = self.layer_norm(hidden_states, None, backend)
            update = self.light_attention(plan.enter(normed), bias, plan, cache)
            return clamp_half(hidden_states + self.dropout(plan.leave(update))), None, None

        routers = router_weights(self.query_router, *self.key_value_routers)
        normed, scores = self.layer_norm(hidden_states, routers, backend)
        assert scores is not None
        normed, scores = plan.enter(normed), plan.enter(scores.transpose(1, 2))
        # one gradient for both parts
        query_scores, key_value_scores = scores.split([1, len(self.key_value_routers)], -1)
        gates, queries = _run_gates(query_scores.squeeze(-1), plan, cache, "query", plan.settings.num_queries, False)
        normed, query_states = _share_and_gather(normed, queries, plan)
        light = self.light_attention(normed, bias, plan, cache)
        heavy, pools = self.heavy_attention(
            normed, query_states, key_value_scores, queries, heavy_bias_table, plan, cache
        )
        update = _scatter_add(light, heavy, queries, plan)
        if hasattr(self, "unrouted"):
            routed = plan.unframe(gates.routed.flatten(1))
            update = update + self.unrouted.to(update.dtype) * ~routed[..., None]
        hidden_states = clamp_half(hidden_states + self.dropout(plan.leave(update)))
        return hidden_states, _token_weights(gates, queries, plan), pools


class CoLT5LayerCausalFF(nn.Module):
    """Norm, a small feed-forward for every token, a large one for the few important ones, residual."""

    def __init__(self, config: CoLT5Config):
        super().__init__()
        self.layer_norm = CoLT5LayerNorm(config)
        self.light_feed_forward = CoLT5DenseActDense(config, config.light_d_ff)
        self.router = CoLT5Router(config, seed=0)
        self.heavy_feed_forward = CoLT5DenseActDense(config, config.heavy_d_ff)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, hidden_states: Tensor, plan: CausalPlan, cache: Any) -> tuple[Tensor, Tensor]:
        """X + LightFF(X) + s̃ · HeavyFF(X); the new hidden states and the routing weights [batch, n]."""
        backend = plan.settings.kernel_backend
        normed, scores = self.layer_norm(hidden_states, router_weights(self.router), backend)
        assert scores is not None
        normed, scores = plan.enter(normed), plan.enter(scores.squeeze(1))
        gates, tokens = _run_gates(scores, plan, cache, "feed_forward", plan.settings.num_feed_forward, True)
        normed, routed = _share_and_gather(normed, tokens, plan)
        light = self.light_feed_forward(normed, backend)
        heavy = self.heavy_feed_forward(routed, backend)
        update = plan.leave(_scatter_add(light, heavy, tokens, plan))
        return clamp_half(hidden_states + self.dropout(update)), _token_weights(gates, tokens, plan)
