"""The decoder, and its layer: self-attention and feed-forward, T5's or routed, with cross-attention between."""

import torch
from einops import rearrange
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache, StaticLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.processing_utils import Unpack
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_colt5 import CoLT5Config
from .model_base import CoLT5Stack
from .model_causal import CoLT5LayerCausalAttention, CoLT5LayerCausalFF
from .model_cross_routing import CoLT5CrossRouting
from .model_layers import (
    CoLT5Attention,
    CoLT5DenseActDense,
    CoLT5LayerNorm,
    clamp_half,
    eager_attention_forward,
    project,
)
from .model_outputs import CoLT5CausalLayerRouting, CoLT5DecoderOutput
from .model_position import CoLT5RelativePositionBias
from .op_attention import bias_of_sequence
from .op_routing import RoutedTokens
from .run_causal_cache import routed_layer
from .run_causal_plan import CausalPlan
from .run_inputs import (
    ForwardFlags,
    check_cache,
    check_causal_mask,
    check_memory,
    embed,
    padding_mask,
    read_arguments,
    refuse_jit_trace,
    warn_of_missing_attentions,
)
from .run_release import CACHE, cache_of_forward, one_cache


class CoLT5SelfAttention(CoLT5Attention):
    """The decoder's causal self-attention, T5's."""

    is_causal = True

    def __init__(self, config: CoLT5Config, layer_idx: int):
        super().__init__(config, config.num_heads)
        self.layer_idx = layer_idx

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor,
        mask: torch.Tensor | None,
        cache: Cache | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[batch, n, d_model] → the same shape, and the weights where the implementation gives them."""
        states = project(hidden_states, self.q, self.k, self.v, head_size=self.d_kv)
        query, key, value = (part.transpose(1, 2) for part in states)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        output, weights = self.attend(query, key, value, position_bias, mask)
        return self.o(output.flatten(-2)), weights


class CoLT5CrossAttention(CoLT5Attention):
    """The decoder's attention to the encoder's output, all of it or what was routed out of it; multi-query in the
    paper (Shazeer 2019)."""

    def __init__(self, config: CoLT5Config, layer_idx: int):
        super().__init__(config, config.num_heads, config.num_cross_key_value_heads)
        self.layer_idx = layer_idx
        self.is_routed = config.routed_cross_key_values is not None
        self.num_routers = config.num_cross_routers if self.is_routed else 1

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

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_mask: torch.Tensor | None,
        cache: Cache | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[batch, n, d_model] → the same shape, and the weights where the implementation gives them.

        `encoder_hidden_states` is [batch, encoder length, d_model], or the routed rows [batch, routers * slots,
        d_model], and not read where the cache has its keys and values. `encoder_mask` is bool [batch, encoder length
        or slots], True for real tokens.
        """
        cache = cache if isinstance(cache, EncoderDecoderCache) else None
        if cache is not None and cache.is_updated.get(self.layer_idx):
            layer = cache.cross_attention_cache.layers[self.layer_idx]
            key, value = layer.keys, layer.values
        else:
            states = project(encoder_hidden_states, self.k, self.v)
            key, value = map(self.split_routers, states)
            if cache is not None:
                # A dense start, which is for training alone, routes more than the budget.
                if self.is_routed and not self.training:
                    self.shorten_static_layer(cache.cross_attention_cache)
                key, value = cache.cross_attention_cache.update(key, value, self.layer_idx)
                cache.is_updated[self.layer_idx] = True
        if self.is_routed and encoder_mask is not None:
            # A static cache of the caller's may be longer than the mask.
            key, value = (states[:, :, : encoder_mask.shape[1]] for states in (key, value))

        query = self.split_heads(self.q(hidden_states)).transpose(1, 2)
        mask = None if encoder_mask is None else encoder_mask[:, None, None, :]
        if hidden_states.shape[1] == 1 and self.config._attn_implementation == "sdpa" and not self.training:
            # One token has few queries: the kernels behind "sdpa" would walk along all keys with one processor a row.
            output, weights = eager_attention_forward(self, query, key, value, mask)[0], None
        else:
            output, weights = self.attend(query, key, value, None, mask)
        return self.o(output.flatten(-2)), weights

    def shorten_static_layer(self, cache: Cache) -> None:
        """Make a static cache's layer, which is sized for all of the encoder's output, no longer than the budget."""
        layer = cache.layers[self.layer_idx] if self.layer_idx < len(cache.layers) else None
        if isinstance(layer, StaticLayer) and not layer.is_initialized:
            layer.max_cache_len = min(layer.max_cache_len, self.config.routed_cross_key_values)


class CoLT5LayerSelfAttention(nn.Module):
    """Norm, causal self-attention, residual."""

    def __init__(self, config: CoLT5Config, layer_idx: int):
        super().__init__()
        self.SelfAttention = CoLT5SelfAttention(config, layer_idx)
        self.layer_norm = CoLT5LayerNorm(config)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor,
        mask: torch.Tensor | None,
        cache: Cache | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[batch, n, d_model] → the same shape, and the attention weights."""
        normed, _ = self.layer_norm(hidden_states, for_products=True)
        output, weights = self.SelfAttention(normed, position_bias, mask, cache)
        return clamp_half(hidden_states + self.dropout(output)), weights


class CoLT5LayerCrossAttention(nn.Module):
    """Norm, attention to the encoder's output, residual."""

    def __init__(self, config: CoLT5Config, layer_idx: int):
        super().__init__()
        self.EncDecAttention = CoLT5CrossAttention(config, layer_idx)
        self.layer_norm = CoLT5LayerNorm(config)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_mask: torch.Tensor | None,
        cache: Cache | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[batch, n, d_model] → the same shape, and the attention weights."""
        normed, _ = self.layer_norm(hidden_states, for_products=True)
        output, weights = self.EncDecAttention(normed, encoder_hidden_states, encoder_mask, cache)
        return clamp_half(hidden_states + self.dropout(output)), weights


class CoLT5LayerFF(nn.Module):
    """Norm, the decoder's feed-forward, residual."""

    def __init__(self, config: CoLT5Config):
        super().__init__()
        self.DenseReluDense = CoLT5DenseActDense(config, config.d_ff)
        self.layer_norm = CoLT5LayerNorm(config)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[batch, n, d_model] → the same shape."""
        normed, _ = self.layer_norm(hidden_states, for_products=True)
        return clamp_half(hidden_states + self.dropout(self.DenseReluDense(normed)))


class CoLT5DecoderBlock(GradientCheckpointingLayer):
    """One decoder layer: self-attention, cross-attention where there is an encoder, feed-forward."""

    def __init__(self, config: CoLT5Config, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.is_causally_routed = config.causal_attention != "full"
        self.has_cross_attention = config.is_encoder_decoder
        attention = CoLT5LayerCausalAttention if self.is_causally_routed else CoLT5LayerSelfAttention
        self.layer = nn.ModuleList([attention(config, layer_idx)])
        if self.has_cross_attention:
            self.layer.append(CoLT5LayerCrossAttention(config, layer_idx))
        is_routed = config.causal_feed_forward == "routed"
        self.layer.append(CoLT5LayerCausalFF(config) if is_routed else CoLT5LayerFF(config))

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor,
        heavy_bias_table: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        plan: CausalPlan | None,
        encoder_hidden_states: torch.Tensor | None,
        encoder_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, CoLT5CausalLayerRouting | None]:
        """One layer.

        Args:
            hidden_states: [batch, n, d_model].
            position_bias: of T5's self-attention, [1, heads, n, keys]; of a causally routed layer's light branch, what
                `CausalPlan.light_bias` gives.
            heavy_bias_table: of a routed layer's heavy branch; None where there is none.
            attention_mask: of T5's self-attention.
            plan: the windows of a causally routed layer; None for T5's.
            encoder_hidden_states, encoder_mask: for the cross-attention; None without an encoder.
            past_key_values, cache: the cache, by either name: gradient checkpointing looks for that of its release.

        Returns:
            The new hidden states, self-attention and cross-attention weights (None where not given), and what was
            routed (None in T5's layer).
        """
        cache = one_cache(cache, past_key_values)
        self_cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        weights = cross_weights = routing = None
        if plan is None:
            hidden_states, weights = self.layer[0](hidden_states, position_bias, attention_mask, self_cache)
        else:
            routing = CoLT5CausalLayerRouting()
            self_cache = routed_layer(self_cache, self.layer_idx)
            hidden_states, routing.query, routing.key_value = self.layer[0](
                hidden_states, position_bias, heavy_bias_table, plan, self_cache
            )
        if self.has_cross_attention:
            hidden_states, cross_weights = self.layer[1](hidden_states, encoder_hidden_states, encoder_mask, cache)
        if isinstance(self.layer[-1], CoLT5LayerCausalFF):
            assert routing is not None
            hidden_states, routing.feed_forward = self.layer[-1](hidden_states, plan, self_cache)
        else:
            hidden_states = self.layer[-1](hidden_states)
        return hidden_states, weights, cross_weights, routing


class CoLT5Decoder(CoLT5Stack):
    """The decoder: T5's, with multi-query cross-attention to all of the encoder's output or to what was routed out of
    it, or causally routed; without an encoder a causal stack."""

    _can_record_outputs = {
        "hidden_states": OutputRecorder(CoLT5DecoderBlock, index=0),
        "attentions": OutputRecorder(CoLT5DecoderBlock, index=1),
        "cross_attentions": OutputRecorder(CoLT5DecoderBlock, index=2),
        "routing": OutputRecorder(CoLT5DecoderBlock, index=3),
    }

    def __init__(self, config: CoLT5Config):
        super().__init__(config)
        buckets, distance = config.relative_attention_num_buckets, config.relative_attention_max_distance
        if config.causal_attention == "full":
            self.relative_attention_bias = CoLT5RelativePositionBias(config.num_heads, buckets, distance, False)
        else:
            heads = {"light": config.num_light_heads}
            if config.causal_attention == "routed":
                heads["heavy"] = config.num_heavy_heads
            for branch, num_heads in heads.items():
                bias = CoLT5RelativePositionBias(num_heads, buckets, distance, False)
                setattr(self, f"{branch}_relative_attention_bias", bias)
        self.block = nn.ModuleList(
            [CoLT5DecoderBlock(config, layer_idx) for layer_idx in range(config.num_decoder_layers)]
        )
        self.is_cross_routed = config.is_encoder_decoder and config.routed_cross_key_values is not None
        if self.is_cross_routed:
            self.cross_routing = CoLT5CrossRouting(config)
        self.final_layer_norm = CoLT5LayerNorm(config)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[ForwardFlags],
    ) -> CoLT5DecoderOutput:
        """Decode a batch.

        Args:
            input_ids: int64 [batch, n].
            attention_mask: [batch, past + n], 1 for real tokens. T5's decoder takes a ready 4D mask too, a causally
                routed one the last n columns alone.
            inputs_embeds: [batch, n, d_model], instead of `input_ids`.
            encoder_hidden_states: [batch, encoder length, d_model]; None in a model without an encoder.
            encoder_attention_mask: [batch, encoder length], 1 for real tokens.
            past_key_values, cache: the cache of earlier calls, under the name of Transformers up to 5.23 or from 5.24
                on.
            use_cache: whether to fill a cache.
            kwargs: `output_hidden_states`, `output_attentions`, `output_routing` and `return_dict`.

        Raises:
            ValueError: for both or neither of ids and embeddings, no row or no token, no encoder output, or another
                shape of anything.
            TypeError: for a cache that does not fit a causally routed decoder, or one under both names.
        """
        cache = cache_of_forward(cache, past_key_values)
        refuse_jit_trace()
        flags = read_arguments(self, kwargs, attention_mask=attention_mask)
        warn_of_missing_attentions(self, flags)
        has_encoder = self.config.is_encoder_decoder
        prefix = "decoder_" if has_encoder else ""
        hidden_states = embed(self, input_ids, inputs_embeds, prefix)
        encoder_mask = None
        if has_encoder:
            if encoder_hidden_states is None:
                raise ValueError(
                    "encoder_hidden_states (of encoder_outputs the last_hidden_state) is None; the decoder needs the "
                    "encoder's output"
                )
            encoder_hidden_states = check_memory(encoder_hidden_states, hidden_states)
            encoder_mask = padding_mask("encoder attention_mask", encoder_attention_mask, encoder_hidden_states)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
            if has_encoder:
                cache = EncoderDecoderCache(cache, DynamicCache(config=self.config))
        check_cache(cache, hidden_states)
        self_cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache

        mask = plan = heavy_bias_table = None
        if self.config.causal_attention == "full":
            bias, mask = self.attention_to_all(hidden_states, attention_mask, self_cache, prefix)
        else:
            plan = self.windows_of(hidden_states, attention_mask, self_cache, prefix)
            bias = plan.light_bias(self.light_relative_attention_bias())
        if self.config.causal_attention == "routed":
            heavy_bias_table = self.heavy_relative_attention_bias()
        memories, encoder_mask, cross_routing = self.route_memory(encoder_hidden_states, encoder_mask, cache)
        hidden_states = self.dropout(hidden_states)
        for block, memory in zip(self.block, memories, strict=True):
            # Gradient checkpointing hands gradients through arguments by position alone, and looks for the cache by
            # the release's name for it.
            inputs = (bias, heavy_bias_table, mask, plan, memory, encoder_mask)
            hidden_states = block(hidden_states, *inputs, **{CACHE: cache})[0]
        hidden_states, _ = self.final_layer_norm(hidden_states)
        return CoLT5DecoderOutput(
            last_hidden_state=self.dropout(hidden_states),
            **{CACHE: cache},
            cross_routing=cross_routing if flags.get("output_routing", self.config.output_routing) else None,
        )

    def attention_to_all(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache | None, prefix: str
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Position bias and mask of T5's self-attention, as the blocks take them."""
        length = hidden_states.shape[1]
        past = cache.get_seq_length() if cache is not None else 0
        key_length = cache.get_mask_sizes(length, 0)[0] if cache is not None else length
        check_causal_mask(f"{prefix}attention_mask", attention_mask, hidden_states, past, key_length)
        # The arguments go by position, because Transformers renamed the last one.
        mask = create_causal_mask(self.config, hidden_states, attention_mask, cache)
        position_bias = bias_of_sequence(self.relative_attention_bias(), length, key_length, past)
        return position_bias[None], mask

    def route_memory(
        self, memory: torch.Tensor | None, mask: torch.Tensor | None, cache: Cache | None
    ) -> tuple[list[torch.Tensor | None], torch.Tensor | None, tuple[tuple[RoutedTokens, ...], ...] | None]:
        """What each layer's cross-attention reads of a memory [batch, n, d_model], and its mask; and what was routed.
        Nothing of either in a model without an encoder.

        Layers whose keys and values the cache has already read nothing: they get the memory as it is.
        """
        memories = [memory] * len(self.block)
        if memory is None or not self.is_cross_routed:
            return memories, mask, None
        is_updated = cache.is_updated if isinstance(cache, EncoderDecoderCache) else {}
        routing = None
        if not all(is_updated.get(layer_idx) for layer_idx in range(len(self.block))):
            memories, routing = self.cross_routing(memory, mask)
        # Without padding all slots are used, but a static cache may still have more.
        if mask is not None or cache is not None:
            mask = self.cross_routing.used_slots(memory, mask)
        return memories, mask, routing

    def windows_of(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache | None, prefix: str
    ) -> CausalPlan:
        """Where the tokens stand in the windows of the causally routed layers, whose caches count them."""
        length = hidden_states.shape[1]
        first = routed_layer(cache, 0)
        if attention_mask is not None:
            seen = 0 if first is None else first.get_seq_length()
            check_causal_mask(f"{prefix}attention_mask", attention_mask, hidden_states, seen)
            attention_mask = attention_mask[:, -length:].to(torch.bool)
        past = first.counters["lengths"].clone() if first is not None and first.has_state else None
        plan = CausalPlan.make(self.config, hidden_states, attention_mask, past)
        if first is not None:
            counters = plan.advance_counters(first.counters, attention_mask)
            for layer_idx in range(len(self.block)):
                layer = routed_layer(cache, layer_idx)
                layer.window = plan.settings.window
                layer.write("counters", counters)
                layer.count(length)
        return plan
