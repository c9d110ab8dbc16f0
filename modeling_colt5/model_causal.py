"""Conditional attention and feed-forward of a causal decoder: no output depends on any later token."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .model_layers import CoLT5Attention, CoLT5DenseActDense, CoLT5Dropout, CoLT5LayerNorm, clamp_half
from .model_router import CoLT5Router, router_weights
from .op_attention import local_attention, local_attention_reference, routed_attention, routed_attention_reference
from .op_gates import Gates, causal_gates, dense_gates
from .op_pools import Pools, gather_pools, routed_pools
from .op_routing import RoutedTokens
from .op_rows import scatter_add_tokens, share_and_gather
from .run_budgets import dense_start_budget
from .run_causal_plan import CausalPlan, take


def _with_earlier(states: Tensor, plan: CausalPlan, cache: Any, name: str) -> Tensor:
    """New tokens by rank [batch, n, ...] after those that the cache's ring of this name keeps, as `plan.join` puts
    them; the ring then goes on to the last new token. Without a cache the new tokens alone."""
    if cache is None:
        return states
    joined = plan.join(cache.rings.get(name), states)
    cache.write("rings", {name: plan.advance_ring(joined.detach())})
    return joined


def _hand_on(values: Tensor, plan: CausalPlan, cache: Any, name: str) -> None:
    """Let the cache carry on what `plan.handed` gives, under a name of its own."""
    cache.write("carried", {name: plan.keep_carried(cache.carried.get(name), values)})


def _run_gates(
    scores: Tensor, plan: CausalPlan, cache: Any, name: str, target: int, fill_first: bool
) -> tuple[Gates, RoutedTokens]:
    """Gates of one router, and the routed tokens of the new ones in the slots of their windows.

    Args:
        scores: fp32 [batch, n], by rank.
        plan: the windows of the new tokens.
        cache: the layer's routed cache, which the router's scores and thresholds are kept in; None for none.
        name: of the router in the cache.
        target: tokens to route in a window on average.
        fill_first: see `causal_gates`.

    Returns:
        The gates, and RoutedTokens in the rows that `plan.windows` gives.
    """
    settings = plan.settings
    if plan.dense_start is not None:
        framed = plan.frame(scores).unflatten(1, (-1, settings.window))
        share = (target / settings.window,)
        (soft_target,) = dense_start_budget(
            plan.counts.new_full((1,), settings.window), share, settings.soft_topk_ratio, plan.dense_start
        )
        gates = dense_gates(framed, plan.total, soft_target, settings.epsilon, plan.dense_start)
        return gates, gates.tokens
    carried = None if cache is None else cache.carried.get(name)
    joined = _with_earlier(scores, plan, cache, name)
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
        kernel_backend=plan.implementation.kernel_backend,
    )
    if cache is not None:
        _hand_on(plan.handed(gates.thresholds.detach()), plan, cache, name)
    return gates, plan.routed(gates.tokens)


def _pools_of_dense_start(plan: CausalPlan, groups: int) -> tuple[Tensor, Tensor] | None:
    """What `routed_pools` takes for a dense start, for the pools of all rows and groups; None outside of one."""
    if plan.dense_start is None:
        return None
    settings, windows = plan.settings, torch.arange(plan.num_windows + 1, device=plan.counts.device)
    lengths = (windows * settings.window).repeat(len(plan.counts) * groups)
    share = lengths.clamp(max=settings.pool_size) / lengths.clamp(min=1)
    return dense_start_budget(lengths, (share,), settings.soft_topk_ratio, plan.dense_start), plan.dense_start


def _share_and_gather(states: Tensor, tokens: RoutedTokens, plan: CausalPlan) -> tuple[Tensor, Tensor]:
    """The states [batch, n, d], for all that reads them, and their routed tokens in slots [rows, capacity, d]."""
    routing = (tokens.indices, tokens.valid, None)
    windows, rows = share_and_gather(plan.windows(states), routing, kernel_backend=plan.implementation.kernel_backend)
    return plan.tokens(windows), rows


def _scatter_add(light: Tensor, heavy: Tensor, tokens: RoutedTokens, plan: CausalPlan) -> Tensor:
    """The light branch [batch, n, d] with the weighted heavy rows [rows, capacity, d] added where they belong."""
    routing = (tokens.indices, tokens.valid, tokens.weights)
    return plan.tokens(scatter_add_tokens(plan.windows(light), heavy, *routing, plan.implementation.kernel_backend))


def _parts(states: Tensor, groups: int, dim: int) -> tuple[Tensor, ...]:
    """One part for each group; where there is one group the states themselves, without a copy of their gradient."""
    return (states,) if groups == 1 else states.chunk(groups, dim)


class CoLT5CausalLocalAttention(CoLT5Attention):
    """The light branch: every token attends to itself and the `local_radius` tokens before it."""

    is_causal = True

    def forward(self, hidden_states: Tensor, bias: Tensor, plan: CausalPlan, cache: Any) -> Tensor:
        """[batch, n, d_model] by rank → the same shape; `bias` is what `plan.light_bias` gives."""
        query, key, value = (self.split_heads(part(hidden_states)) for part in (self.q, self.k, self.v))
        keys = plan.recent(_with_earlier(key, plan, cache, "light_key"))
        values = plan.recent(_with_earlier(value, plan, cache, "light_value"))
        mask, before = plan.light_mask, plan.num_before
        if plan.is_one_token:
            query, keys, values = (states.transpose(1, 2) for states in (query, keys, values))
            mask = None if mask is None else mask[:, None, None]
            output, _ = self.attend(query, keys, values, bias, mask, plan.implementation.attention)
            return self.o(output.flatten(-2))
        padded = nn.functional.pad(query, (0, 0, 0, 0, before, 0)) if before else query
        inputs = (padded, keys, values, bias, plan.settings.radius, mask)
        if plan.implementation.fuses_attention:
            output = local_attention(*inputs, self.dropout if self.training else 0.0)
        else:
            attend = partial(self.attend, implementation=plan.implementation.attention)
            output, _ = local_attention_reference(*inputs, attend)
        return self.o((output[:, before:] if before else output).flatten(-2))


@dataclass
class HandedPool:
    """The pool of each group that a cache hands to window 0.

    Args:
        key, value: [batch, groups, size, heads, d_kv].
        score, weight: fp32 [batch, groups, size].
        rank: int64, likewise, of its tokens in the row.
        valid: bool, likewise, which slots are used; they come first.
    """

    key: Tensor
    value: Tensor
    score: Tensor
    rank: Tensor
    weight: Tensor
    valid: Tensor

    @classmethod
    def of(cls, plan: CausalPlan, cache: Any) -> "HandedPool | None":
        """What the cache carries; None for a sequence from its beginning."""
        if plan.past is None:
            return None
        names = ("key", "value", "score", "rank", "weight", "valid")
        return cls(**{name: cache.carried[f"pool_{name}"][:, 0] for name in names})

    def initial(self) -> tuple[Tensor, RoutedTokens]:
        """As `routed_pools` takes it, in rows [batch * groups]."""
        score, rank, weight, valid = (part.flatten(0, 1) for part in (self.score, self.rank, self.weight, self.valid))
        return score, RoutedTokens(rank, weight, valid)


class CoLT5CausalRoutedAttention(CoLT5Attention):
    """The heavy branch: a window's routed queries attend to the keys/values that its pool holds.

    Args:
        d_model, d_kv, num_heads, dropout_rate: as of `CoLT5Attention`.
        groups: groups of heads, each with a pool of its own.
    """

    is_causal = True

    def __init__(self, d_model: int, d_kv: int, num_heads: int, groups: int = 1, dropout_rate: float = 0.0):
        super().__init__(d_model, d_kv, num_heads, dropout_rate=dropout_rate)
        self.groups = groups

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
            queries: what was routed, in the rows that `plan.windows` gives.
            bias_table: [heads, 2 * max_distance + 1].
            plan: the windows of the new tokens.
            cache: the layer's routed cache; None for none.

        Returns:
            The output [rows, query slots, d_model], and the pools [batch, groups, windows + 1, pool size], whose
            `indices` are ranks.
        """
        settings, groups, batch = plan.settings, self.groups, len(hidden_states)
        handed = HandedPool.of(plan, cache)
        # As W_k (s̃ x) = s̃ W_k x, each token is projected once, and scaled anew in every window's pool.
        key, value = (self.split_heads(part(hidden_states)) for part in (self.k, self.v))
        key = plan.pooled(_with_earlier(key, plan, cache, "heavy_key"))
        value = plan.pooled(_with_earlier(value, plan, cache, "heavy_value"))
        known = plan.frame_joined(_with_earlier(scores, plan, cache, "key_value_scores")).transpose(1, 2)
        pools = routed_pools(
            known.flatten(0, 1),
            settings.window,
            plan.pool_size,
            None if handed is None else handed.initial(),
            dense_start=_pools_of_dense_start(plan, groups),
            soft_topk_ratio=settings.soft_topk_ratio,
            epsilon=settings.epsilon,
            kernel_backend=plan.implementation.kernel_backend,
        )
        chosen, following = pools.tokens, pools.following.unflatten(0, (batch, groups))
        index, weights, valid = (
            part.unflatten(0, (batch, groups)) for part in (chosen.indices, chosen.weights, chosen.valid)
        )
        # In a sequence from its beginning a token's index is its rank.
        ranks = index
        if handed is not None:
            ranks = torch.cat([handed.rank, plan.ranks[:, None].expand(-1, groups, -1)], -1)
            ranks = ranks.gather(-1, index.flatten(2)).view(index.shape)
            known = torch.cat([handed.score, known], -1)

        # The pools' indices of each group point into these: the pool that was handed over, then the new tokens.
        keys, values = list(_parts(key, groups, 2)), list(_parts(value, groups, 2))
        if handed is not None:
            keys = [torch.cat([handed.key[:, group], keys[group]], 1) for group in range(groups)]
            values = [torch.cat([handed.value[:, group], values[group]], 1) for group in range(groups)]
        query = _parts(self.split_heads(self.q(query_states)), groups, 2)
        tables, positions = _parts(bias_table, groups, 0), plan.starts + queries.indices
        attend, outputs = self._attention(plan), []
        for group in range(groups):
            tokens = RoutedTokens(index[:, group], weights[:, group], valid[:, group])
            pool, base = Pools(tokens, following[:, group]), 0 if handed is None else settings.pool_size
            read = gather_pools(keys[group], values[group], pool, base, plan.implementation.kernel_backend)
            own_keys, own_values = (part.flatten(0, 1) for part in read)
            own_ranks, own_valid = (part[:, group, :-1].flatten(0, 1) for part in (ranks, valid))
            states = (query[group], own_keys, own_values)
            outputs.append(attend(*states, tables[group], positions, own_ranks, own_valid))
        routed = RoutedTokens(ranks, weights, valid)
        if cache is not None:
            self._carry(plan, cache, keys, values, known, index, routed)
        output = outputs[0] if groups == 1 else torch.cat(outputs, 2)
        return self.o(output.flatten(-2)), routed

    def _attention(self, plan: CausalPlan) -> Callable[..., Tensor]:
        """`routed_attention` by kernels where they run, or by the dense attention that the plan names."""
        if plan.implementation.fuses_attention and not plan.is_one_token:
            return partial(routed_attention, dropout=self.dropout if self.training else 0.0)
        attend = partial(self.attend, implementation=plan.implementation.attention)
        reference = partial(routed_attention_reference, attend=attend)
        return lambda *inputs: reference(*inputs)[0]

    def _carry(
        self,
        plan: CausalPlan,
        cache: Any,
        keys: list[Tensor],
        values: list[Tensor],
        scores: Tensor,
        index: Tensor,
        pools: RoutedTokens,
    ) -> None:
        """Hand the pool of each row's next token on, and the one before it, as a `HandedPool` reads them."""

        def chosen(part: Tensor) -> Tensor:
            return plan.handed(part.detach().transpose(1, 2))

        # The shape is [batch, groups, windows that hand on, size].
        slots = chosen(index).transpose(1, 2)

        def states_of(groups: list[Tensor]) -> Tensor:
            # No pool that is read holds a token of a window's open end, whose states may be missing: any other will
            # do.
            parts = [
                take(states.detach(), slots[:, group].flatten(1).clamp(max=states.shape[1] - 1))
                for group, states in enumerate(groups)
            ]
            part = parts[0][:, None] if len(parts) == 1 else torch.stack(parts, 1)
            return part.unflatten(2, slots.shape[2:]).transpose(1, 2)

        score = scores.detach().gather(-1, slots.flatten(2)).view(slots.shape).transpose(1, 2)
        new = {"key": states_of(keys), "value": states_of(values), "score": score}
        new |= {"rank": chosen(pools.indices), "weight": chosen(pools.weights), "valid": chosen(pools.valid)}
        for name, part in new.items():
            _hand_on(part, plan, cache, f"pool_{name}")


class CoLT5LayerCausalAttention(nn.Module):
    """Norm, causal local attention for every token, routed attention for the few important ones, residual.

    Args:
        d_model: width of the states.
        d_kv: width of a head.
        num_light_heads, num_heavy_heads: of the branches; None for no heavy branch.
        num_key_value_routers: routers of the heavy branch's keys/values, each for a group of heads.
        unrouted_vector: whether tokens without a heavy part get a learned vector.
        dropout_rate: of the weights and of what the layer adds.
        layer_norm_epsilon: of the norm.
    """

    def __init__(
        self,
        d_model: int,
        d_kv: int,
        num_light_heads: int,
        num_heavy_heads: int | None,
        num_key_value_routers: int = 1,
        unrouted_vector: bool = False,
        dropout_rate: float = 0.0,
        layer_norm_epsilon: float = 1e-6,
    ):
        super().__init__()
        self.layer_norm = CoLT5LayerNorm(d_model, layer_norm_epsilon)
        self.light_attention = CoLT5CausalLocalAttention(d_model, d_kv, num_light_heads, dropout_rate=dropout_rate)
        if num_heavy_heads is not None:
            self.query_router = CoLT5Router(d_model)
            self.key_value_routers = nn.ModuleList(CoLT5Router(d_model) for _ in range(num_key_value_routers))
            self.heavy_attention = CoLT5CausalRoutedAttention(
                d_model, d_kv, num_heavy_heads, num_key_value_routers, dropout_rate
            )
            if unrouted_vector:
                self.unrouted = nn.Parameter(torch.empty(d_model))
        self.dropout = CoLT5Dropout(dropout_rate)

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
            bias: of the light attention, what `plan.light_bias` gives.
            heavy_bias_table: None with causal_attention "local".
            plan: the windows of the new tokens.
            cache: the layer's routed cache; None for none.

        Returns:
            The new hidden states, the queries' routing weights [batch, n] and the pools, the last two None with
            causal_attention "local".
        """
        backend = plan.implementation.kernel_backend
        if heavy_bias_table is None:
            normed, _ = self.layer_norm(hidden_states, None, backend)
            update = self.light_attention(plan.enter(normed), bias, plan, cache)
            return clamp_half(hidden_states + self.dropout(plan.leave(update))), None, None

        routers = router_weights(self.query_router, *self.key_value_routers)
        normed, scores = self.layer_norm(hidden_states, routers, backend)
        assert scores is not None
        normed, scores = plan.enter(normed), plan.enter(scores.transpose(1, 2))
        # A split has one gradient for both parts.
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
        return hidden_states, plan.token_weights(gates.weights, queries), pools


class CoLT5LayerCausalFF(nn.Module):
    """Norm, a small feed-forward for every token, a large one for the few important ones, residual.

    Args:
        d_model: width of the states.
        light_d_ff, heavy_d_ff: hidden sizes of the branches.
        feed_forward_proj: as of `CoLT5DenseActDense`.
        dropout_rate: of the hidden states and of what the layer adds.
        layer_norm_epsilon: of the norm.
    """

    def __init__(
        self,
        d_model: int,
        light_d_ff: int,
        heavy_d_ff: int,
        feed_forward_proj: str = "gated-gelu",
        dropout_rate: float = 0.0,
        layer_norm_epsilon: float = 1e-6,
    ):
        super().__init__()
        self.layer_norm = CoLT5LayerNorm(d_model, layer_norm_epsilon)
        self.light_feed_forward = CoLT5DenseActDense(d_model, light_d_ff, feed_forward_proj, dropout_rate)
        self.router = CoLT5Router(d_model)
        self.heavy_feed_forward = CoLT5DenseActDense(d_model, heavy_d_ff, feed_forward_proj, dropout_rate)
        self.dropout = CoLT5Dropout(dropout_rate)

    def forward(self, hidden_states: Tensor, plan: CausalPlan, cache: Any) -> tuple[Tensor, Tensor]:
        """X + LightFF(X) + s̃ · HeavyFF(X); the new hidden states and the routing weights [batch, n]."""
        backend = plan.implementation.kernel_backend
        normed, scores = self.layer_norm(hidden_states, router_weights(self.router), backend)
        assert scores is not None
        normed, scores = plan.enter(normed), plan.enter(scores.squeeze(1))
        gates, tokens = _run_gates(scores, plan, cache, "feed_forward", plan.settings.num_feed_forward, True)
        normed, routed = _share_and_gather(normed, tokens, plan)
        light = self.light_feed_forward(normed, backend)
        heavy = self.heavy_feed_forward(routed, backend)
        update = plan.leave(_scatter_add(light, heavy, tokens, plan))
        return clamp_half(hidden_states + self.dropout(update)), plan.token_weights(gates.weights, tokens)
