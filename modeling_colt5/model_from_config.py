"""The one place where a configuration becomes layers, and what a pass over them needs to know of it.

Layers take plain numbers. Budgets, routing and who computes may change after a model was made, so the stacks read them
anew in each pass, through the settings here; once for all layers, as Transformers' configurations are slow to read.
"""

from torch import nn

from .configuration_colt5 import CoLT5BaseConfig, CoLT5Config
from .model_causal import CoLT5LayerCausalAttention, CoLT5LayerCausalFF
from .model_cross_routing import CoLT5CrossRouting
from .model_decoder_layer import (
    CoLT5DecoderBlock,
    CoLT5LayerCrossAttention,
    CoLT5LayerFF,
    CoLT5LayerSelfAttention,
)
from .model_encoder_layer import CoLT5EncoderBlock, CoLT5LayerConditionalAttention, CoLT5LayerConditionalFF
from .model_layers import CoLT5LayerNorm, CoLT5RelativePositionBias
from .run_causal_plan import CausalSettings
from .run_plan import CrossSettings, EncoderSettings, Implementation, SoftTopK


def encoder_attention(config: CoLT5BaseConfig, seed: int) -> CoLT5LayerConditionalAttention:
    """The first sublayer of an encoder layer; `seed` is that of its first router."""
    return CoLT5LayerConditionalAttention(
        d_model=config.d_model,
        d_kv=config.d_kv,
        num_light_heads=config.num_light_heads,
        num_heavy_heads=config.num_heavy_heads,
        local_radius=config.local_radius,
        routing=config.routing,
        seed=seed,
        dropout_rate=config.dropout_rate,
        layer_norm_epsilon=config.layer_norm_epsilon,
    )


def encoder_feed_forward(config: CoLT5BaseConfig, seed: int) -> CoLT5LayerConditionalFF:
    """The second sublayer of an encoder layer; `seed` is that of its router."""
    return CoLT5LayerConditionalFF(
        d_model=config.d_model,
        light_d_ff=config.light_d_ff,
        heavy_d_ff=config.heavy_d_ff,
        feed_forward_proj=config.feed_forward_proj,
        routing=config.routing,
        seed=seed,
        dropout_rate=config.dropout_rate,
        layer_norm_epsilon=config.layer_norm_epsilon,
    )


def encoder_block(config: CoLT5BaseConfig, layer_idx: int) -> CoLT5EncoderBlock:
    """An encoder layer, which has three routers."""
    seed = 3 * layer_idx
    return CoLT5EncoderBlock(encoder_attention(config, seed), encoder_feed_forward(config, seed + 2))


def decoder_block(config: CoLT5Config) -> CoLT5DecoderBlock:
    """A decoder layer."""
    cross = cross_attention(config) if config.is_encoder_decoder else None
    return CoLT5DecoderBlock(self_attention(config), cross, decoder_feed_forward(config))


def self_attention(config: CoLT5Config) -> CoLT5LayerSelfAttention | CoLT5LayerCausalAttention:
    """A decoder layer's self-attention, T5's or causally routed."""
    if config.causal_attention == "full":
        return CoLT5LayerSelfAttention(
            d_model=config.d_model,
            d_kv=config.d_kv,
            num_heads=config.num_heads,
            dropout_rate=config.dropout_rate,
            layer_norm_epsilon=config.layer_norm_epsilon,
        )
    return CoLT5LayerCausalAttention(
        d_model=config.d_model,
        d_kv=config.d_kv,
        num_light_heads=config.num_light_heads,
        num_heavy_heads=config.num_heavy_heads if config.causal_attention == "routed" else None,
        num_key_value_routers=config.num_causal_key_value_routers,
        unrouted_vector=config.causal_unrouted_vector,
        dropout_rate=config.dropout_rate,
        layer_norm_epsilon=config.layer_norm_epsilon,
    )


def cross_attention(config: CoLT5Config) -> CoLT5LayerCrossAttention:
    """A decoder layer's attention to the encoder's output."""
    return CoLT5LayerCrossAttention(
        d_model=config.d_model,
        d_kv=config.d_kv,
        num_heads=config.num_heads,
        num_key_value_heads=config.num_cross_key_value_heads,
        num_routers=None if config.routed_cross_key_values is None else config.num_cross_routers,
        asks=config.asking_cross_routing,
        dropout_rate=config.dropout_rate,
        layer_norm_epsilon=config.layer_norm_epsilon,
    )


def decoder_feed_forward(config: CoLT5Config) -> CoLT5LayerFF | CoLT5LayerCausalFF:
    """A decoder layer's feed-forward, T5's or causally routed."""
    if config.causal_feed_forward == "dense":
        return CoLT5LayerFF(
            d_model=config.d_model,
            d_ff=config.d_ff,
            feed_forward_proj=config.feed_forward_proj,
            dropout_rate=config.dropout_rate,
            layer_norm_epsilon=config.layer_norm_epsilon,
        )
    return CoLT5LayerCausalFF(
        d_model=config.d_model,
        light_d_ff=config.light_d_ff,
        heavy_d_ff=config.heavy_d_ff,
        feed_forward_proj=config.feed_forward_proj,
        dropout_rate=config.dropout_rate,
        layer_norm_epsilon=config.layer_norm_epsilon,
    )


def cross_routers(config: CoLT5Config) -> CoLT5CrossRouting:
    """The routers of the decoder's cross-attention, of all layers."""
    return CoLT5CrossRouting(
        d_model=config.d_model,
        num_layers=config.num_decoder_layers,
        num_routers=config.num_cross_routers,
        routing=config.routing,
        # The encoder's layers have three routers each.
        first_seed=3 * config.num_layers,
    )


def layer_norm(config: CoLT5BaseConfig) -> CoLT5LayerNorm:
    """The norm at the end of a stack."""
    return CoLT5LayerNorm(config.d_model, config.layer_norm_epsilon)


def add_branch_biases(module: nn.Module, config: CoLT5BaseConfig) -> None:
    """Give a stack of encoder layers, or what stands for one, the biases by distance of both branches, which all of
    its layers share; `branch_biases` of model_encoder_layer.py reads them."""
    module.light_relative_attention_bias = position_bias(config, config.num_light_heads, bidirectional=True)
    if config.routing != "none":
        module.heavy_relative_attention_bias = position_bias(config, config.num_heavy_heads, bidirectional=True)


def position_bias(config: CoLT5BaseConfig, num_heads: int, bidirectional: bool) -> CoLT5RelativePositionBias:
    """The bias by distance of one branch, for all layers of a stack."""
    return CoLT5RelativePositionBias(
        num_heads=num_heads,
        num_buckets=config.relative_attention_num_buckets,
        max_distance=config.relative_attention_max_distance,
        bidirectional=bidirectional,
        dimensions=config.dimensions,
    )


def implementation(config: CoLT5BaseConfig) -> Implementation:
    """Who computes."""
    return Implementation(kernel_backend=config.kernel_backend, attention=config._attn_implementation)


def soft_topk(config: CoLT5BaseConfig) -> SoftTopK:
    """The soft top-k of all routers."""
    return SoftTopK(
        ratio=config.soft_topk_ratio,
        epsilon=config.routing_epsilon,
        solver=config.soft_topk_solver,
        num_iterations=config.num_soft_topk_iterations,
        epsilon_init=config.routing_epsilon_init,
        epsilon_decay=config.routing_epsilon_decay,
    )


def cross_settings(config: CoLT5Config) -> CrossSettings:
    """What routed cross-attention has in common in all layers in a pass."""
    return CrossSettings(num_tokens=config.routed_cross_key_values, soft_topk=soft_topk(config))


def encoder_settings(config: CoLT5BaseConfig) -> EncoderSettings:
    """What all encoder layers have in common in a pass."""
    return EncoderSettings(
        routing=config.routing,
        query_fraction=config.routed_query_fraction,
        key_value_fraction=config.routed_key_value_fraction,
        feed_forward_fraction=config.routed_feed_forward_fraction,
        min_routed_tokens=config.min_routed_tokens,
        soft_topk=soft_topk(config),
        implementation=implementation(config),
    )


def causal_settings(config: CoLT5Config) -> CausalSettings:
    """What all causally routed layers have in common in a pass."""
    return CausalSettings(
        window=config.causal_window,
        radius=config.local_radius,
        pool_size=config.causal_routed_keys,
        query_fraction=config.routed_query_fraction,
        feed_forward_fraction=config.routed_feed_forward_fraction,
        capacity_ratio=config.causal_capacity_ratio,
        soft_topk_ratio=config.soft_topk_ratio,
        epsilon=config.routing_epsilon,
    )
