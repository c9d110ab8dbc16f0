"""Conditional attention and feed-forward of a causal decoder: no output depends on any later token."""

from typing import Any

import torch
from torch import Tensor, nn

from .attention_ops import local_attention, routed_attention
from .causal_plan_colt5 import CausalPlan, take
from .causal_routing import Gates, causal_gates, fill_slots, gather_scaled, routed_pools
from .configuration_colt5 import CoLT5Config
from .layers_colt5 import CoLT5Attention, CoLT5DenseActDense, CoLT5LayerNorm, clamp_half, project
from .local_attention_reference import local_attention_reference
from .routed_attention_reference import routed_attention_reference
from .router_colt5 import CoLT5Router, router_weights
from .routing import RoutedTokens
from .token_ops import gather_tokens, scatter_add_tokens

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
    framed = plan.frame_with_past(ring, scores).unflatten(1, (-1, settings.window))
    ranks = plan.ranks.unflatten(1, (-1, settings.window))
    real = ranks < plan.total[:, None, None]
    capacity = settings.capacity(target)
    gates = causal_gates(
        framed,
        real,
        plan.first_window,
        None if carried is None else carried[:, 0],
        target,
        capacity,
        settings.soft_topk_ratio,
        settings.epsilon,
        fill_first,
    )
    if cache is not None:
        cache.write("rings", {name: plan.advance_ring(ring, scores.detach())})
        cache.write("carried", {name: plan.advance_carried(carried, gates.thresholds.detach())})
    if plan.past is not None:
        # earlier tokens count for the capacity and are not computed again
        gates.routed = gates.routed & (ranks >= plan.past[:, None, None])
        gates.weights = gates.weights.masked_fill(~gates.routed, 0)
    if plan.is_step:
        weight = take(gates.weights.flatten(1), plan.offset[:, None])
        routed = take(gates.routed.flatten(1), plan.offset[:, None])
        return gates, RoutedTokens(torch.zeros_like(plan.offset)[:, None], weight, routed)
    return gates, fill_slots(gates.routed.flatten(0, 1), gates.weights.flatten(0, 1), capacity)


def _windows(states: Tensor, plan: CausalPlan) -> Tensor:
    """[batch, n, d] by rank → [batch * windows, window, d]; a step's one token stays as it is."""
    if plan.is_step:
        return states
    return plan.frame(states).unflatten(1, (-1, plan.settings.window)).flatten(0, 1)


def _gather(states: Tensor, tokens: RoutedTokens, plan: CausalPlan) -> Tensor:
    """The routed tokens of [batch, n, d], in slots [rows, capacity, d]."""
    return gather_tokens(
        _windows(states, plan), tokens.indices, tokens.valid, kernel_backend=plan.settings.kernel_backend
    )


def _scatter_add(light: Tensor, heavy: Tensor, tokens: RoutedTokens, plan: CausalPlan) -> Tensor:
    """The light branch [batch, n, d] with the weighted heavy rows [rows, capacity, d] added where they belong."""
    total = scatter_add_tokens(
        _windows(light, plan), heavy, tokens.indices, tokens.valid, tokens.weights, plan.settings.kernel_backend
    )
    return total if plan.is_step else plan.unframe(total.unflatten(0, (light.shape[0], -1)).flatten(1, 2))


def _token_weights(gates: Gates, plan: CausalPlan) -> Tensor:
    """Each token's routing weight, fp32 [batch, n] by position; 0 for tokens that were not routed."""
    return plan.leave(plan.unframe(gates.weights.flatten(1)))


class CoLT5CausalLocalAttention(CoLT5Attention):
    """The light branch: every token attends to itself and the `local_radius` tokens before it."""

    is_causal = True

    def forward(self, hidden_states: Tensor, bias_table: Tensor, plan: CausalPlan, cache: Any) -> Tensor:
        """[batch, n, d_model] by rank → the same shape.

        `bias_table` is [heads, 2 * max_distance + 1], -inf for keys after the query: what makes a band of both sides
        causal.
        """
        settings = plan.settings
        query, key, value = map(self.split_heads, project(hidden_states, self.q, self.k, self.v))
        rings = {} if cache is None else cache.rings
        keys, values, before = key, value, 0
        if plan.past is not None:
            before = settings.radius
            keys = plan.with_recent(rings["light_key"], key, before)
            values = plan.with_recent(rings["light_value"], value, before)
        if cache is not None:
            new = {"light_key": key.detach(), "light_value": value.detach()}
            cache.write("rings", {name: plan.advance_ring(rings.get(name), states) for name, states in new.items()})

        length = before + plan.length
        position = torch.arange(length, device=key.device)
        # slots of no token yet are before rank 0, or behind the row's last real one
        mask = position < before + plan.counts[:, None]
        if plan.past is not None:
            mask = mask & (position >= before - plan.past[:, None])
        if plan.is_step:
            positions = position.expand(len(key), -1)
            output, _ = routed_attention_reference(
                query, keys, values, bias_table, positions[:, -1:], positions, mask, self.attend
            )
            return self.o(output.flatten(-2))
        padded = query if before == 0 else nn.functional.pad(query, (0, 0, 0, 0, before, 0))
        inputs = (padded, keys, values, bias_table, settings.radius, mask)
        if settings.fused_attention:
            output = local_attention(*inputs, self.dropout if self.training else 0.0)
        else:
            output, _ = local_attention_reference(*inputs, self.attend)
        return self.o(output[:, before:].flatten(-2))


class CoLT5CausalRoutedAttention(CoLT5Attention):
    """The heavy branch: a window's routed queries attend to the keys/values that its pool holds."""

    is_causal = True

    def __init__(self, config: CoLT5Config):
        super().__init__(config, config.num_heavy_heads)
        self.groups = config.num_causal_key_value_routers

    def _group(self, states: Tensor, group: int) -> Tensor:
        size = self.num_heads // self.groups
        return states[..., group * size : (group + 1) * size, :]

    def forward(
        self,
        hidden_states: Tensor,
        scores: Tensor,
        queries: RoutedTokens,
        bias_table: Tensor,
        plan: CausalPlan,
        cache: Any,
    ) -> tuple[Tensor, RoutedTokens]:
        """Attention of routed queries to each window's pool.

        Args:
            hidden_states: [batch, n, d_model], by rank.
            scores: fp32 [batch, n, groups], of the keys/values, by rank.
            queries: in rows [batch * windows], or [batch] for a step.
            bias_table: [heads, 2 * max_distance + 1].
            plan: the chunk's windows.
            cache: the layer's routed cache; None for none.

        Returns:
            The output [rows, query slots, d_model], and the pools [batch, groups, windows + 1, pool size], whose
            `indices` are ranks.
        """
        settings = plan.settings
        size, batch = settings.pool_size, len(hidden_states)
        query = self.split_heads(self.q(_gather(hidden_states, queries, plan)))
        key, value = map(self.split_heads, project(hidden_states, self.k, self.v))
        rings = {} if cache is None else cache.rings
        # W_k (s̃ x) = s̃ W_k x: one projection a token, scaled anew in every window's pool
        new = {"heavy_key": key, "heavy_value": value, "key_value_scores": scores}
        framed_scores = plan.frame_with_past(rings.get("key_value_scores"), scores).transpose(1, 2)
        pool: dict[str, Tensor] = {}
        initial = None
        if plan.past is not None:
            pool = {name: cache.carried[f"pool_{name}"][:, 0] for name in POOL_PARTS}
            score, *first = (pool[name].flatten(0, 1) for name in ("score", "rank", "weight", "valid"))
            initial = (score, RoutedTokens(*first))
        pools = routed_pools(
            framed_scores.flatten(0, 1),
            settings.window,
            size,
            initial,
            soft_topk_ratio=settings.soft_topk_ratio,
            epsilon=settings.epsilon,
            kernel_backend=settings.kernel_backend,
        )
        shape = (batch, self.groups, plan.num_windows + 1, size)
        index, weights, valid = (part.view(shape) for part in (pools.indices, pools.weights, pools.valid))
        framed = {
            name: states if plan.past is None else plan.frame_with_past(rings.get(name), states)
            for name, states in (("heavy_key", key), ("heavy_value", value))
        }
        ranks = plan.ranks[:, None].expand(-1, self.groups, -1)
        ranks = torch.cat([pool["rank"], ranks], -1) if pool else ranks
        ranks = ranks.gather(-1, index.flatten(2)).view(shape)

        windows = plan.num_windows
        # a step's one token has a row of its own
        first_ranks = plan.ranks.view(batch * windows, -1)[:, :1]
        if plan.is_step:
            first_ranks = first_ranks + plan.offset[:, None]
        positions = first_ranks + queries.indices
        outputs, sources = [], []
        for group in range(self.groups):
            states = [self._group(framed[name], group) for name in ("heavy_key", "heavy_value")]
            if pool:
                old = (pool[name][:, group] for name in ("key", "value"))
                states = [torch.cat(pair, 1) for pair in zip(old, states, strict=True)]
            sources.append(states)
            # without a cache the rows of unfinished windows are not there, and no pool that is read holds one
            group_index = index[:, group, :-1].flatten(1).clamp(max=states[0].shape[1] - 1)
            group_weights = weights[:, group, :-1].flatten(1)
            keys, values = (
                gather_scaled(part, group_index, group_weights).unflatten(1, (windows, size)).flatten(0, 1)
                for part in states
            )
            heads = slice(group * len(bias_table) // self.groups, (group + 1) * len(bias_table) // self.groups)
            inputs = (
                self._group(query, group),
                keys,
                values,
                bias_table[heads],
                positions,
                ranks[:, group, :-1].flatten(0, 1),
                valid[:, group, :-1].flatten(0, 1),
            )
            if settings.fused_attention and not plan.is_step:
                outputs.append(routed_attention(*inputs, self.dropout if self.training else 0.0))
            else:
                outputs.append(routed_attention_reference(*inputs, self.attend)[0])
        if cache is not None:
            cache.write(
                "rings",
                {name: plan.advance_ring(rings.get(name), states.detach()) for name, states in new.items()},
            )
            known = torch.cat([pool["score"], framed_scores], -1) if pool else framed_scores
            self._carry(plan, cache, sources, known, index, ranks, weights, valid)
        return self.o(torch.cat(outputs, 2).flatten(-2)), RoutedTokens(ranks, weights, valid)

    def _carry(
        self,
        plan: CausalPlan,
        cache: Any,
        sources: list[list[Tensor]],
        scores: Tensor,
        index: Tensor,
        ranks: Tensor,
        weights: Tensor,
        valid: Tensor,
    ) -> None:
        """Hand the pool of each row's next token on, and the one before it."""
        parts = {"index": index, "rank": ranks, "weight": weights.detach(), "valid": valid}
        chosen = {name: plan.advance_carried(None, part.transpose(1, 2)) for name, part in parts.items()}
        chosen_index = chosen.pop("index")
        slots = chosen_index.transpose(1, 2)
        chosen["score"] = scores.detach().gather(-1, slots.flatten(2)).view(slots.shape).transpose(1, 2)
        for place, name in enumerate(("key", "value")):
            groups = [
                take(states[place].detach(), slots[:, group].flatten(1).clamp(max=states[place].shape[1] - 1))
                for group, states in enumerate(sources)
            ]
            chosen[name] = torch.stack(groups, 1).unflatten(2, slots.shape[2:]).transpose(1, 2)
        for name, value in chosen.items():
            carried = cache.carried.get(f"pool_{name}")
            if carried is not None:
                moved = (plan.completed > 0).view(-1, *[1] * (value.dim() - 1))
                value = torch.cat([value[:, :1], torch.where(moved, value[:, 1:], carried[:, 1:])], 1)
            cache.write("carried", {f"pool_{name}": value})


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
        light_bias_table: Tensor,
        heavy_bias_table: Tensor | None,
        plan: CausalPlan,
        cache: Any,
    ) -> tuple[Tensor, Tensor | None, RoutedTokens | None]:
        """X + LightAttn(X) + s̃ᵩ · HeavyAttn(X, pool of all windows before), see docs/causal_routing.md.

        Args:
            hidden_states: [batch, n, d_model].
            light_bias_table: -inf for keys after the query.
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
            update = self.light_attention(plan.enter(normed), light_bias_table, plan, cache)
            return clamp_half(hidden_states + self.dropout(plan.leave(update))), None, None

        routers = router_weights(self.query_router, *self.key_value_routers)
        normed, scores = self.layer_norm(hidden_states, routers, backend)
        assert scores is not None
        normed, scores = plan.enter(normed), plan.enter(scores.transpose(1, 2))
        gates, queries = _run_gates(scores[..., 0], plan, cache, "query", plan.settings.num_queries, False)
        light = self.light_attention(normed, light_bias_table, plan, cache)
        heavy, pools = self.heavy_attention(normed, scores[..., 1:], queries, heavy_bias_table, plan, cache)
        update = _scatter_add(light, heavy, queries, plan)
        if hasattr(self, "unrouted"):
            routed = plan.unframe(gates.routed.flatten(1))
            update = update + self.unrouted.to(update.dtype) * ~routed[..., None]
        hidden_states = clamp_half(hidden_states + self.dropout(plan.leave(update)))
        return hidden_states, _token_weights(gates, plan), pools


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
        normed, scores = plan.enter(normed), plan.enter(scores[:, 0])
        gates, tokens = _run_gates(scores, plan, cache, "feed_forward", plan.settings.num_feed_forward, True)
        light = self.light_feed_forward(normed, backend)
        heavy = self.heavy_feed_forward(_gather(normed, tokens, plan), backend)
        update = plan.leave(_scatter_add(light, heavy, tokens, plan))
        return clamp_half(hidden_states + self.dropout(update)), _token_weights(gates, plan)
