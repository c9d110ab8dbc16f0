"""The decoder's layer: self-attention and feed-forward, T5's or routed, with cross-attention between."""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import maybe_autocast

from .kernel_backend import accumulation_dtype
from .layer_causal import PlainRoutedLayer
from .layer_decoder_parts import DecoderDrop, PartProgram, PlainT5Layer, StraightParts
from .layer_decoder_whole import AttentionInputs, StraightDecoderLayer
from .layer_plain import PlainBlock, kinds_of
from .model_causal import (
    CoLT5CausalLocalAttention,
    CoLT5CausalRoutedAttention,
    CoLT5LayerCausalAttention,
    CoLT5LayerCausalFF,
)
from .model_layers import (
    GELU,
    CoLT5Attention,
    CoLT5DenseActDense,
    CoLT5Dropout,
    CoLT5LayerNorm,
    clamp_half,
    drop,
    drop_rate,
    eager_attention_forward,
)
from .model_outputs import CoLT5CausalLayerRouting
from .model_router import CoLT5Router, CoLT5Routing, run_routers
from .op_attention import full_attention
from .op_dropout import draw_seeds
from .op_routing import RoutedTokens
from .run_budgets import RoutingBudget
from .run_causal_cache import routed_layer
from .run_plan import DecoderPlan, RouterPlan
from .run_release import one_cache


class CoLT5SelfAttention(CoLT5Attention):
    """The decoder's causal self-attention, T5's."""

    is_causal = True

    def __init__(self, d_model: int, d_kv: int, num_heads: int, dropout_rate: float = 0.0):
        super().__init__(d_model, d_kv, num_heads, dropout_rate=dropout_rate)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor,
        plan: DecoderPlan,
        cache: Cache | None,
        layer_idx: int,
        seed: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[batch, n, d_model] → the same shape, and the weights where the implementation gives them; `layer_idx` is
        where the cache has this layer. The bias is `masked_bias` where the implementation says so, and where kernels
        attend `causal_table`; these drop weights by the seed."""
        projections = (self.q, self.k, self.v)
        query, key, value = (self.split_heads(part(hidden_states)) for part in projections)
        if plan.kernels_attend:
            key, value = key.to(query.dtype), value.to(query.dtype)
            attended = full_attention(query, key, value, position_bias, plan.mask, drop_rate(self), seed)
            return self.o(attended.flatten(-2)), None
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        attended, weights = self.attend_projected(query, key, value, position_bias, plan, cache, layer_idx)
        return self.o(attended), weights

    def attend_projected(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        position_bias: torch.Tensor,
        plan: DecoderPlan,
        cache: Cache | None,
        layer_idx: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The attention without its projections where no kernels attend, [batch, heads, n, d_kv] → [batch, n, heads *
        d_kv], and the weights where the implementation gives them; other arguments as of `forward`."""
        if cache is not None:
            key, value = cache.update(key, value, layer_idx)
        holds_mask = plan.implementation.bias_holds_mask
        bias, mask = (None, position_bias.to(query.dtype)) if holds_mask else (position_bias, plan.mask)
        output, weights = self.attend(query, key, value, bias, mask, plan.implementation.attention)
        return output.flatten(-2), weights


class CoLT5CrossAttention(CoLT5Attention):
    """The decoder's attention to the encoder's output, all of it or what was routed out of it; multi-query in the
    paper (Shazeer 2019).

    Args:
        d_model, d_kv, num_heads, num_key_value_heads, dropout_rate: as of `CoLT5Attention`.
        num_routers: that chose what it reads, each for a group of heads; None where it reads everything.
    """

    def __init__(
        self,
        d_model: int,
        d_kv: int,
        num_heads: int,
        num_key_value_heads: int,
        num_routers: int | None = None,
        dropout_rate: float = 0.0,
    ):
        super().__init__(d_model, d_kv, num_heads, num_key_value_heads, dropout_rate)
        self.is_routed = num_routers is not None
        self.num_routers = num_routers or 1

    def split_routers(self, states: torch.Tensor) -> torch.Tensor:
        """[batch, routers * slots, key/value heads * d_kv] → [batch, groups, slots, d_kv], where the groups of heads
        are as many as the routers or the key/value heads, whichever are more: each has one of both."""
        if self.num_routers == 1:
            return self.split_heads(states).transpose(1, 2)
        routers, heads = self.num_routers, self.num_key_value_heads
        common = min(routers, heads)
        outer, inner = routers // common, heads // common
        states = rearrange(
            states, "b (r o s) (h i d) -> b r o s h i d", r=common, o=outer, h=common, i=inner, d=self.d_kv
        )
        return rearrange(states.diagonal(dim1=1, dim2=4), "b o s i d c -> b (c o i) s d")

    def keys_and_values(
        self,
        encoder_hidden_states: torch.Tensor,
        plan: DecoderPlan,
        cache: Cache | None,
        layer_idx: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[batch, groups, encoder length or slots, d_kv], the cache's where it has them; arguments as of `forward`."""
        if plan.projected is not None:
            key, value = plan.projected[2 * layer_idx : 2 * layer_idx + 2]
            return key.transpose(1, 2), value.transpose(1, 2)
        cache = cache if isinstance(cache, EncoderDecoderCache) else None
        if cache is not None and cache.is_updated.get(layer_idx):
            layer = cache.cross_attention_cache.layers[layer_idx]
            key, value = layer.keys, layer.values
        else:
            key, value = (self.split_routers(part(encoder_hidden_states)) for part in (self.k, self.v))
            if cache is not None:
                key, value = cache.cross_attention_cache.update(key, value, layer_idx)
                cache.is_updated[layer_idx] = True
        if self.is_routed and plan.memory_mask is not None:
            # A static cache of the caller's may be longer than the mask.
            key, value = (states[:, :, : plan.memory_mask.shape[1]] for states in (key, value))
        return key, value

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        plan: DecoderPlan,
        cache: Cache | None,
        layer_idx: int,
        seed: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, RoutedTokens | None]:
        """[batch, n, d_model] → the same shape, the weights where the implementation gives them, and what each token
        chose, which is None here.

        `encoder_hidden_states` is [batch, encoder length, d_model], or the routed rows [batch, routers * slots,
        d_model], and not read where the cache has its keys and values. `layer_idx` is where the cache has this layer.
        Where kernels attend, they drop weights by the seed.
        """
        query = self.split_heads(self.q(hidden_states))
        if plan.kernels_attend:
            keys_and_values = self.keys_and_values(encoder_hidden_states, plan, cache, layer_idx)
            key, value = (states.transpose(1, 2).to(query.dtype) for states in keys_and_values)
            attended = full_attention(query, key, value, None, plan.memory_mask, drop_rate(self), seed)
            return self.o(attended.flatten(-2)), None, None
        attended, weights = self.attend_projected(query.transpose(1, 2), encoder_hidden_states, plan, cache, layer_idx)
        return self.o(attended), weights, None

    def attend_projected(
        self,
        query: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        plan: DecoderPlan,
        cache: Cache | None,
        layer_idx: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The attention without the projections of queries and result where no kernels attend, [batch, heads, n, d_kv]
        → [batch, n, heads * d_kv], and the weights where the implementation gives them; other arguments as of
        `forward`."""
        key, value = self.keys_and_values(encoder_hidden_states, plan, cache, layer_idx)
        mask = None if plan.memory_mask is None else plan.memory_mask[:, None, None, :]
        if query.shape[2] == 1 and plan.implementation.attention == "sdpa" and not self.training:
            # One token has few queries: the kernels behind "sdpa" would walk along all keys with one processor a row.
            output, weights = eager_attention_forward(self, query, key, value, mask)[0], None
        else:
            output, weights = self.attend(query, key, value, None, mask, plan.implementation.attention)
        return output.flatten(-2), weights


class CoLT5AskingCrossAttention(CoLT5CrossAttention):
    """Attention of each token to what it chooses of the encoder's output itself, see docs/cross_routing.md.

    It asks with the mean of its heads' queries, and a token of the memory answers with its key: attention learns both
    while a dense start is closed, so they agree before the choice opens.

    Args:
        d_model, d_kv, num_heads, dropout_rate: as of `CoLT5Attention`; there is one key/value head.
    """

    def __init__(self, d_model: int, d_kv: int, num_heads: int, dropout_rate: float = 0.0):
        super().__init__(d_model, d_kv, num_heads, 1, num_routers=1, dropout_rate=dropout_rate)
        self.select = CoLT5Routing()
        self.dense_start: torch.Tensor | None = None

    def choose(self, query: torch.Tensor, keys: torch.Tensor, plan: DecoderPlan) -> RoutedTokens:
        """Choose what each token reads: the largest ⟨mean of its heads' queries, key⟩, unscaled as T5's attention.

        Args:
            query: [batch, m, num_heads, d_kv].
            keys: [batch, n, d_kv], of the memory.
            plan: of the pass; its `asking` has to be given.

        Returns:
            The tokens in rows [batch * m].
        """
        assert plan.asking is not None
        mask, soft_topk = plan.memory_mask, plan.asking.soft_topk
        progress = self.dense_start if self.training else None
        # Autocast would take the scores' product in half precision.
        with maybe_autocast(query.device.type, enabled=False):
            dtype = accumulation_dtype(query.dtype)
            scores = query.to(dtype).mean(-2) @ keys.to(dtype).transpose(1, 2)
        routers = RouterPlan.of(soft_topk, plan.implementation, keys, mask, progress)
        budget = RoutingBudget.of_memory(keys, mask, plan.asking.num_tokens, 1, soft_topk.ratio, progress)
        rows = scores.flatten(0, 1)[:, None]
        (routed,) = run_routers((self,), rows, rows, routers, budget.for_each(query.shape[1]))
        return routed

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        plan: DecoderPlan,
        cache: Cache | None,
        layer_idx: int,
        seed: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, RoutedTokens | None]:
        """As of `CoLT5CrossAttention`, with all of the encoder's output, and what each token chose, [batch, n,
        slots]; `plan.asking` has to be given, and no kernels attend."""
        key, value = self.keys_and_values(encoder_hidden_states, plan, cache, layer_idx)
        keys, values = key[:, 0], value[:, 0]
        query = self.split_heads(self.q(hidden_states))
        routed = self.choose(query, keys, plan)
        batch, length, n = *hidden_states.shape[:2], keys.shape[1]
        first = torch.arange(batch, device=keys.device).repeat_interleave(length) * n
        places = routed.indices + first[:, None]
        # As W_k (s̃ x) = s̃ W_k x, keys and values are those of the whole memory, scaled for each token. An embedding's
        # gradient adds up in one order, an index's does not.
        own_keys, own_values = (
            nn.functional.embedding(places, states.flatten(0, 1)) * routed.weights[..., None].to(states.dtype)
            for states in (keys, values)
        )
        output, weights = self.attend(
            query.flatten(0, 1)[:, :, None],
            own_keys[:, None],
            own_values[:, None],
            None,
            routed.valid[:, None, None],
            plan.implementation.attention,
        )
        if weights is not None:
            weights = weights[:, :, 0].unflatten(0, (batch, length)).transpose(1, 2)
        parts = (routed.indices, routed.weights, routed.valid)
        tokens = RoutedTokens(*(part.unflatten(0, (batch, length)) for part in parts))
        return self.o(output.flatten(1).unflatten(0, (batch, length))), weights, tokens


class CoLT5LayerSelfAttention(nn.Module):
    """Norm, causal self-attention, residual; `dropout_rate` is also that of what the layer adds."""

    def __init__(
        self,
        d_model: int,
        d_kv: int,
        num_heads: int,
        dropout_rate: float = 0.0,
        layer_norm_epsilon: float = 1e-6,
    ):
        super().__init__()
        self.SelfAttention = CoLT5SelfAttention(d_model, d_kv, num_heads, dropout_rate)
        self.layer_norm = CoLT5LayerNorm(d_model, layer_norm_epsilon)
        self.dropout = CoLT5Dropout(dropout_rate)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor,
        plan: DecoderPlan,
        cache: Cache | None,
        layer_idx: int,
        weights_seed: torch.Tensor | None = None,
        seed: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[batch, n, d_model] → the same shape, and the attention weights; the seeds are those of dropout: of
        attention's weights, and of the result."""
        normed, _ = self.layer_norm(hidden_states, None, plan.kernel_backend, for_products=True)
        output, weights = self.SelfAttention(normed, position_bias, plan, cache, layer_idx, weights_seed)
        return clamp_half(hidden_states + drop(self.dropout, output, seed)), weights


class CoLT5LayerCrossAttention(nn.Module):
    """Norm, attention to the encoder's output, residual; arguments as of `CoLT5CrossAttention`, whose `dropout_rate`
    is also that of what the layer adds. With `asks` it is `CoLT5AskingCrossAttention`'s, which has one key/value head
    and one choice for all heads."""

    def __init__(
        self,
        d_model: int,
        d_kv: int,
        num_heads: int,
        num_key_value_heads: int,
        num_routers: int | None = None,
        asks: bool = False,
        dropout_rate: float = 0.0,
        layer_norm_epsilon: float = 1e-6,
    ):
        super().__init__()
        self.EncDecAttention: CoLT5CrossAttention
        if asks:
            self.EncDecAttention = CoLT5AskingCrossAttention(d_model, d_kv, num_heads, dropout_rate)
        else:
            self.EncDecAttention = CoLT5CrossAttention(
                d_model, d_kv, num_heads, num_key_value_heads, num_routers, dropout_rate
            )
        self.layer_norm = CoLT5LayerNorm(d_model, layer_norm_epsilon)
        self.dropout = CoLT5Dropout(dropout_rate)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        plan: DecoderPlan,
        cache: Cache | None,
        layer_idx: int,
        weights_seed: torch.Tensor | None = None,
        seed: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, RoutedTokens | None]:
        """[batch, n, d_model] → the same shape, the attention weights, and what each token chose where it does; the
        seeds are those of dropout: of attention's weights, and of the result."""
        normed, _ = self.layer_norm(hidden_states, None, plan.kernel_backend, for_products=True)
        inputs = (normed, encoder_hidden_states, plan, cache, layer_idx, weights_seed)
        output, weights, tokens = self.EncDecAttention(*inputs)
        return clamp_half(hidden_states + drop(self.dropout, output, seed)), weights, tokens


class CoLT5LayerFF(nn.Module):
    """Norm, the decoder's feed-forward, residual; arguments as of `CoLT5DenseActDense`, whose `dropout_rate` is also
    that of what the layer adds."""

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        feed_forward_proj: str = "gated-gelu",
        dropout_rate: float = 0.0,
        layer_norm_epsilon: float = 1e-6,
    ):
        super().__init__()
        self.DenseReluDense = CoLT5DenseActDense(d_model, d_ff, feed_forward_proj, dropout_rate)
        self.layer_norm = CoLT5LayerNorm(d_model, layer_norm_epsilon)
        self.dropout = CoLT5Dropout(dropout_rate)

    def forward(
        self,
        hidden_states: torch.Tensor,
        plan: DecoderPlan,
        activation_seed: torch.Tensor | None = None,
        seed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[batch, n, d_model] → the same shape; the seeds are those of dropout: of activations, and of the result."""
        normed, _ = self.layer_norm(hidden_states, None, plan.kernel_backend, for_products=True)
        output = self.DenseReluDense(normed, plan.kernel_backend, activation_seed)
        return clamp_half(hidden_states + drop(self.dropout, output, seed))


class CoLT5DecoderBlock(GradientCheckpointingLayer):
    """One decoder layer: self-attention, cross-attention where there is an encoder, feed-forward; of the first and the
    last either T5's or the causally routed one."""

    def __init__(
        self,
        attention: CoLT5LayerSelfAttention | CoLT5LayerCausalAttention,
        cross_attention: CoLT5LayerCrossAttention | None,
        feed_forward: CoLT5LayerFF | CoLT5LayerCausalFF,
    ):
        super().__init__()
        self.has_cross_attention = cross_attention is not None
        self.layer = nn.ModuleList(filter(None, (attention, cross_attention, feed_forward)))
        is_routed = isinstance(attention, CoLT5LayerCausalAttention)
        self.plain = PlainBlock(PlainRoutedLayer if is_routed else PlainT5Layer)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor,
        heavy_bias_table: torch.Tensor | None,
        encoder_hidden_states: torch.Tensor | None,
        plan: DecoderPlan,
        layer_idx: int,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
    ) -> tuple[
        torch.Tensor,
        torch.Tensor | None,
        torch.Tensor | None,
        CoLT5CausalLayerRouting | None,
        RoutedTokens | None,
    ]:
        """One layer.

        Args:
            hidden_states: [batch, n, d_model].
            position_bias: of T5's self-attention, [1, heads, n, keys], or `masked_bias` where the implementation
                says so, or `causal_table` where kernels attend; of a causally routed layer's light branch, what
                `CausalPlan.light_bias` gives.
            heavy_bias_table: of a routed layer's heavy branch; None where there is none.
            encoder_hidden_states: for the cross-attention; None without an encoder.
            plan: of the pass.
            layer_idx: the layer's place in the stack, which is where the cache has it.
            past_key_values, cache: the cache, by either name: gradient checkpointing looks for that of its release.

        Returns:
            The new hidden states, self-attention and cross-attention weights (None where not given), what was
            routed (None in T5's layer), and what each token's cross-attention chose (None where it does not).
        """
        cache = one_cache(cache, past_key_values)
        inputs = (hidden_states, position_bias, encoder_hidden_states, plan, layer_idx, cache)
        results = self.run_straight(*inputs)
        if results is not None:
            return *results, None, None
        self_cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        weights = cross_weights = routing = asked = None
        seeds = self.draw_seeds(plan, hidden_states.device)
        if plan.windows is None:
            own_seeds = (seeds[DecoderDrop.SELF_WEIGHTS], seeds[DecoderDrop.SELF])
            hidden_states, weights = self.layer[0](
                hidden_states, position_bias, plan, self_cache, layer_idx, *own_seeds
            )
        else:
            routing = CoLT5CausalLayerRouting()
            self_cache = routed_layer(self_cache, layer_idx)
            hidden_states, routing.query, routing.key_value = self.layer[0](
                hidden_states, position_bias, heavy_bias_table, plan.windows, self_cache
            )
        if self.has_cross_attention:
            own_seeds = (seeds[DecoderDrop.CROSS_WEIGHTS], seeds[DecoderDrop.CROSS])
            hidden_states, cross_weights, asked = self.layer[1](
                hidden_states, encoder_hidden_states, plan, cache, layer_idx, *own_seeds
            )
        if isinstance(self.layer[-1], CoLT5LayerCausalFF):
            assert routing is not None
            hidden_states, routing.feed_forward = self.layer[-1](hidden_states, plan.windows, self_cache)
        else:
            hidden_states = self.layer[-1](
                hidden_states, plan, seeds[DecoderDrop.ACTIVATION], seeds[DecoderDrop.FEED_FORWARD]
            )
        return hidden_states, weights, cross_weights, routing, asked

    def drop_rates(self) -> tuple[float, ...]:
        """With which probabilities T5's layer drops now, by the places of `DecoderDrop`."""
        attention, *others, feed_forward = self.layer
        cross = others[0] if others else None
        dropping = (
            getattr(attention, "SelfAttention", None), attention, getattr(cross, "EncDecAttention", None), cross,
            getattr(feed_forward, "DenseReluDense", None), feed_forward,
        )  # fmt: skip
        return tuple(map(drop_rate, dropping))

    def draw_seeds(self, plan: DecoderPlan, device: torch.device) -> Sequence[torch.Tensor | None]:
        """The seeds of what the layer drops, by the places of `DecoderDrop`; None where PyTorch drops.

        PyTorch's dropout would keep its masks, and what a layer drops must not depend on how it runs.
        """
        rates = self.drop_rates()
        if plan.windows is not None or plan.kernel_backend != "triton" or not any(rates):
            return (None,) * len(rates)
        return draw_seeds(len(rates), device)[:, :1].unbind()

    def run_straight(
        self,
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        plan: DecoderPlan,
        layer_idx: int,
        cache: Cache | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None] | None:
        """T5's layer as straight lines of kernels, where this block is plain and may run so for these states: the new
        hidden states, and self-attention and cross-attention weights (None where not given). None for modules.
        Arguments as of `forward`."""
        if plan.straight is None or not plan.straight.takes(hidden_states):
            return None
        found = self.plain.read(self, PLAIN)
        if found is None:
            return None
        if not plan.kernels_attend:
            parts = StraightParts.of(plan.straight, *found)
            inputs = (hidden_states, position_bias, encoder_hidden_states, plan, layer_idx, cache)
            return None if parts is None else self.run_in_parts(parts, *inputs)
        # both come before the memory is projected, whose projections may have hooks that are called once, and may drop
        programs = PartProgram.of_layer(plan.straight, *found)
        if programs is None:
            return None
        layer, weights = found
        seeds = layer.draw_seeds(plan.straight.device)
        key = value = None
        if self.has_cross_attention:
            # what does not fit here fits no module either
            attention: Any = self.layer[1].EncDecAttention
            keys_and_values = attention.keys_and_values(encoder_hidden_states, plan, None, layer_idx)
            key, value = (states.transpose(1, 2).to(plan.straight.dtype) for states in keys_and_values)
        # it is the caller's own where that is bool, and may be a part of a wider one
        memory_mask = None if plan.memory_mask is None else plan.memory_mask.contiguous()
        of_attentions = AttentionInputs(position_bias, plan.mask, key, value, memory_mask)
        line = StraightDecoderLayer.of(plan.straight, layer, weights, programs, of_attentions, seeds)
        return None if line is None else (line(hidden_states), None, None)

    def run_in_parts(
        self,
        parts: StraightParts,
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        plan: DecoderPlan,
        layer_idx: int,
        cache: Cache | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """What `run_straight` gives, as straight lines with the attentions between them, which are not kernels'."""
        self_cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        cross_weights = None
        layers: Any = self.layer
        query, key, value = parts(0, hidden_states)
        attended, weights = layers[0].SelfAttention.attend_projected(
            query, key, value, position_bias, plan, self_cache, layer_idx
        )
        if self.has_cross_attention:
            hidden_states, query = parts(1, hidden_states, attended)
            attended, cross_weights = layers[1].EncDecAttention.attend_projected(
                query, encoder_hidden_states, plan, cache, layer_idx
            )
        (hidden_states,) = parts(-1, hidden_states, attended)
        return hidden_states, weights, cross_weights


# What a plain block is made of.
PLAIN = kinds_of(
    block=CoLT5DecoderBlock,
    self_layer=CoLT5LayerSelfAttention,
    self_attention=CoLT5SelfAttention,
    cross_layer=CoLT5LayerCrossAttention,
    cross_attention=CoLT5CrossAttention,
    feed_forward=CoLT5LayerFF,
    dense=CoLT5DenseActDense,
    norm=CoLT5LayerNorm,
    linear=nn.Linear,
    dropout=CoLT5Dropout,
    activation=GELU,
    causal_attention=CoLT5LayerCausalAttention,
    local_attention=CoLT5CausalLocalAttention,
    routed_attention=CoLT5CausalRoutedAttention,
    causal_feed_forward=CoLT5LayerCausalFF,
    router=CoLT5Router,
    list=nn.ModuleList,
)
