"""The models' layers on their own, for a user's networks: states in, states out, built from plain numbers."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from .configuration_colt5 import CoLT5BaseConfig, CoLT5Config
from .layer_encoder import encoder_plan
from .model_cross_routing import CoLT5CrossRouting
from .model_encoder_layer import branch_biases
from .model_from_config import (
    add_branch_biases,
    causal_settings,
    cross_attention,
    cross_settings,
    decoder_feed_forward,
    encoder_attention,
    encoder_block,
    encoder_feed_forward,
    encoder_settings,
    implementation,
    position_bias,
    self_attention,
)
from .model_initialisation import init_layer
from .model_layers import bias_by_distance
from .model_outputs import CoLT5CausalLayerRouting, CoLT5LayerRouting
from .op_routing import RoutedTokens
from .run_causal_cache import CoLT5DynamicRoutedLayer, check_routed_layer
from .run_causal_plan import CausalPlan
from .run_inputs import check_cache, check_no_dense_start, check_states, padding_mask, refuse_jit_trace
from .run_plan import DecoderPlan, EncoderPlan, SoftTopK

ATTENTIONS = ("sdpa", "eager")
SOFT_TOPK = SoftTopK()


def config_of(arguments: dict[str, Any], config_class: Any = CoLT5Config, **others: Any) -> Any:
    """The configuration made of a module's arguments, all of which have the names and the rules of its fields.

    Args:
        arguments: all local names at the beginning of a module's `__init__`.
        config_class: of the configuration.
        others: fields that are no arguments.

    Raises:
        StrictDataclassError: for a number of another type, or one that breaks a rule.
        ValueError: for another implementation of attention.
    """
    fields = {name: value for name, value in arguments.items() if name not in ("self", "__class__", "soft_topk")}
    soft_topk = arguments["soft_topk"]
    attn_implementation = fields.setdefault("attn_implementation", "sdpa")
    if attn_implementation not in ATTENTIONS:
        raise ValueError(
            f"attn_implementation is {attn_implementation!r}; it must be one of {', '.join(map(repr, ATTENTIONS))}"
        )
    return config_class(
        soft_topk_ratio=soft_topk.ratio,
        routing_epsilon=soft_topk.epsilon,
        soft_topk_solver=soft_topk.solver,
        num_soft_topk_iterations=soft_topk.num_iterations,
        routing_epsilon_init=soft_topk.epsilon_init,
        routing_epsilon_decay=soft_topk.epsilon_decay,
        **fields,
        **others,
    )


class _StandAlone(nn.Module):
    """What all stand-alone modules share: T5's initialisation, of what the class has made before it calls this."""

    d_model: int

    def cast(self, states: Tensor) -> Tensor:
        """States in the dtype of the module's weights, as a model casts `inputs_embeds`."""
        return states.to(next(part.dtype for part in self.parameters() if part.is_floating_point()))

    def initialise(self, d_model: int) -> None:
        """Initialise all layers for states of this width."""
        self.d_model = d_model
        for module in self.modules():
            init_layer(module, d_model)


class EncoderStandAlone(_StandAlone):
    """What the stand-alone modules of the encoder's layers share.

    Attributes:
        settings: budgets, soft top-k, and who computes. To change a module's budgets, assign another object of this
            class.
        dense_start: fp32 [], how far a dense start has come; `set_dense_start` sets it.
    """

    def __init__(self, config: CoLT5BaseConfig):
        super().__init__()
        self.dimensions = config.dimensions
        self.settings = encoder_settings(config)
        self.dense_start: Tensor | None = None

    def checked(self, hidden_states: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """States and mask as layers take them, and how far a dense start has come in this call.

        Raises:
            TypeError, ValueError: for states or a mask that do not fit.
        """
        refuse_jit_trace()
        check_states("hidden_states", hidden_states, self.d_model, self.dimensions)
        bool_mask = padding_mask("mask", mask, hidden_states)
        return self.cast(hidden_states), bool_mask, self.dense_start if self.training else None


class CoLT5ConditionalFeedForward(EncoderStandAlone):
    """X + LightFF(X) + s̃ · HeavyFF(X): a small feed-forward for every token, a large one for the few important ones
    (Ainslie et al. 2023). The norm before it is inside, and so is the residual.

    Args:
        d_model: width of the states.
        light_d_ff, heavy_d_ff: hidden sizes of the branches.
        routed_feed_forward_fraction: share of a row's real tokens that go through the heavy branch.
        min_routed_tokens: least number of tokens to route, as far as a row has so many.
        feed_forward_proj: an activation of Transformers, with "gated-" before it for a gated feed-forward.
        routing: "learned", the controls "random" and "even", or "none" for no heavy branch.
        soft_topk: of the router.
        dropout_rate: of the hidden states and of what the module adds.
        layer_norm_epsilon: of the norm.
        kernel_backend: "auto", "triton" or "torch".

    Raises:
        StrictDataclassError: for a number that the rule of the configuration's field of that name refuses.
    """

    def __init__(
        self,
        d_model: int,
        light_d_ff: int,
        heavy_d_ff: int,
        *,
        routed_feed_forward_fraction: float = 1 / 16,
        min_routed_tokens: int = 1,
        feed_forward_proj: str = "gated-gelu",
        routing: str = "learned",
        soft_topk: SoftTopK = SOFT_TOPK,
        dropout_rate: float = 0.0,
        layer_norm_epsilon: float = 1e-6,
        kernel_backend: str = "auto",
    ):
        config = config_of(locals())
        super().__init__(config)
        self.settings = replace(self.settings, query_fraction=None, key_value_fraction=None)
        self.layer = encoder_feed_forward(config, seed=0)
        self.initialise(d_model)

    def forward(
        self, hidden_states: Tensor, mask: Tensor | None = None, output_routing: bool = False
    ) -> Tensor | tuple[Tensor, RoutedTokens | None]:
        """[batch, n, d_model] → the same shape.

        Args:
            hidden_states: floating point [batch, n, d_model].
            mask: [batch, n], 1 or True for real tokens; None for all. What padding holds changes nothing, as long as
                it is finite.
            output_routing: whether to return what was routed beside the states.

        Returns:
            The states; with `output_routing` a pair of them and the routed tokens, whose `indices`, `weights` and
            `valid` are [batch, slots] (None with routing="none").

        Raises:
            TypeError: for states that are no floating point tensor.
            ValueError: for another shape of states or mask.
        """
        hidden_states, bool_mask, progress = self.checked(hidden_states, mask)
        plan = EncoderPlan.make(self.settings, hidden_states, bool_mask, progress)
        output, tokens = self.layer(hidden_states, plan)
        return (output, tokens) if output_routing else output


class CoLT5ConditionalAttention(EncoderStandAlone):
    """X + LightAttn(X) + s̃ᵩ · HeavyAttn(X, s̃ᵏᵛ ⊙ X): local attention for every token, attention among routed tokens
    for the few important ones (Ainslie et al. 2023). The norm before it is inside, and so is the residual.

    Args:
        d_model: width of the states.
        d_kv: width of a head.
        num_light_heads, num_heavy_heads: of the branches.
        local_radius: positions to each side that the light branch sees.
        routed_query_fraction, routed_key_value_fraction: shares of a row's real tokens that are queries, and keys and
            values, of the heavy branch.
        relative_attention_num_buckets, relative_attention_max_distance: of T5's biases by distance. Modules share
            them, as a model's layers do, where `light_relative_attention_bias` of one is assigned to another, and
            `heavy_relative_attention_bias` likewise.
        dropout_rate: of the attention weights and of what the module adds.
        min_routed_tokens, routing, soft_topk, layer_norm_epsilon, kernel_backend: as of `CoLT5ConditionalFeedForward`.
        attn_implementation: "sdpa", which kernels stand in for where they run, or "eager".

    Raises:
        StrictDataclassError: for a number that the rule of the configuration's field of that name refuses.
        ValueError: for another `attn_implementation`.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_kv: int = 64,
        num_light_heads: int = 4,
        num_heavy_heads: int = 8,
        local_radius: int = 127,
        routed_query_fraction: float = 1 / 16,
        routed_key_value_fraction: float = 1 / 8,
        min_routed_tokens: int = 1,
        relative_attention_num_buckets: int = 32,
        relative_attention_max_distance: int = 128,
        routing: str = "learned",
        soft_topk: SoftTopK = SOFT_TOPK,
        dropout_rate: float = 0.0,
        layer_norm_epsilon: float = 1e-6,
        kernel_backend: str = "auto",
        attn_implementation: str = "sdpa",
    ):
        config = config_of(locals())
        super().__init__(config)
        self.settings = replace(self.settings, feed_forward_fraction=None)
        add_branch_biases(self, config)
        self.layer = encoder_attention(config, seed=0)
        self.initialise(d_model)

    def forward(
        self, hidden_states: Tensor, mask: Tensor | None = None, output_routing: bool = False
    ) -> Tensor | tuple[Tensor, CoLT5LayerRouting]:
        """[batch, n, d_model] → the same shape; arguments and errors are those of `CoLT5ConditionalFeedForward`.

        Returns:
            The states; with `output_routing` a pair of them and what was routed, `query` and `key_value`.
        """
        hidden_states, bool_mask, progress = self.checked(hidden_states, mask)
        plan = EncoderPlan.make(self.settings, hidden_states, bool_mask, progress)
        output, _, _, queries, keys = self.layer(hidden_states, *branch_biases(self), plan)
        return (output, CoLT5LayerRouting(query=queries, key_value=keys)) if output_routing else output


class CoLT5ConditionalBlock(EncoderStandAlone):
    """A whole layer of the encoder: conditional attention, then the conditional feed-forward, each with its norm and
    its residual. Where kernels run and no hook or adapter is inside, it is one straight line of launches, as in a
    model.

    Args:
        d_model, light_d_ff, heavy_d_ff: as of `CoLT5ConditionalFeedForward`.
        d_kv, num_light_heads, num_heavy_heads, local_radius: as of `CoLT5ConditionalAttention`.
        routed_query_fraction, routed_key_value_fraction, routed_feed_forward_fraction: shares of a row's real tokens
            that are routed.
        relative_attention_num_buckets, relative_attention_max_distance, attn_implementation: as of
            `CoLT5ConditionalAttention`.
        dropout_rate: of attention weights, hidden states, and of what each sublayer adds.
        min_routed_tokens, feed_forward_proj, routing, soft_topk, layer_norm_epsilon, kernel_backend: as of
            `CoLT5ConditionalFeedForward`.

    Raises:
        StrictDataclassError: for a number that the rule of the configuration's field of that name refuses.
        ValueError: for another `attn_implementation`.
    """

    def __init__(
        self,
        d_model: int,
        light_d_ff: int,
        heavy_d_ff: int,
        *,
        d_kv: int = 64,
        num_light_heads: int = 4,
        num_heavy_heads: int = 8,
        local_radius: int = 127,
        routed_query_fraction: float = 1 / 16,
        routed_key_value_fraction: float = 1 / 8,
        routed_feed_forward_fraction: float = 1 / 16,
        min_routed_tokens: int = 1,
        relative_attention_num_buckets: int = 32,
        relative_attention_max_distance: int = 128,
        feed_forward_proj: str = "gated-gelu",
        routing: str = "learned",
        soft_topk: SoftTopK = SOFT_TOPK,
        dropout_rate: float = 0.0,
        layer_norm_epsilon: float = 1e-6,
        kernel_backend: str = "auto",
        attn_implementation: str = "sdpa",
    ):
        config = config_of(locals())
        super().__init__(config)
        add_branch_biases(self, config)
        self.block = encoder_block(config, 0)
        self.initialise(d_model)

    def forward(
        self, hidden_states: Tensor, mask: Tensor | None = None, output_routing: bool = False
    ) -> Tensor | tuple[Tensor, CoLT5LayerRouting]:
        """[batch, n, d_model] → the same shape; arguments and errors are those of `CoLT5ConditionalFeedForward`.

        Returns:
            The states; with `output_routing` a pair of them and what was routed: `query`, `key_value` and
            `feed_forward`.
        """
        hidden_states, bool_mask, progress = self.checked(hidden_states, mask)
        plan = encoder_plan(self.settings, hidden_states, bool_mask, progress, output_routing)
        try:
            output, _, _, routing = self.block(hidden_states, *branch_biases(self), plan)
        finally:
            # The recording of a CUDA graph that an error breaks off can end only with all of its streams joined.
            plan.join()
        return (output, routing) if output_routing else output


class _CausalStandAlone(_StandAlone):
    """What the causal stand-alone modules share.

    Attributes:
        settings: windows, budgets and soft top-k. Another object of its class in its place changes the budgets of a
            module that is already there.
        implementation: who computes.
        dense_start: fp32 [], how far a dense start has come; `set_dense_start` sets it.
        ring: the name of something that the module keeps in its cache.
    """

    ring: str

    def __init__(self, config: CoLT5Config):
        super().__init__()
        self.settings = causal_settings(config)
        self.implementation = implementation(config)
        self.dense_start: Tensor | None = None

    def make_cache(self) -> CoLT5DynamicRoutedLayer:
        """An empty cache of this module's, whose size does not grow with the text. It can be cropped, reordered and
        repeated as the layers of Transformers' caches can."""
        return CoLT5DynamicRoutedLayer()

    def _count(self, hidden_states: Tensor, mask: Tensor | None, cache: Any) -> tuple[Tensor, CausalPlan]:
        """Count the new tokens in the cache, where there is one; states as layers take them, and where they stand in
        the windows.

        Raises:
            TypeError, ValueError: for states, a mask or a cache that do not fit.
        """
        refuse_jit_trace()
        check_states("hidden_states", hidden_states, self.d_model)
        hidden_states, bool_mask = self.cast(hidden_states), padding_mask("mask", mask, hidden_states)
        dense_start = self.dense_start if self.training else None
        if cache is not None:
            check_routed_layer(cache, len(hidden_states), self.ring)
            check_no_dense_start(dense_start)
        past = None if cache is None else cache.past_lengths()
        plan = CausalPlan.make(self.settings, self.implementation, hidden_states, bool_mask, past, dense_start)
        if cache is not None:
            plan.count_in([cache], bool_mask)
        return hidden_states, plan


class CoLT5CausalConditionalAttention(_CausalStandAlone):
    """X + LightAttn(X) + s̃ᵩ · HeavyAttn(X, what earlier windows handed on), where no output depends on a later token:
    see docs/causal_routing.md. The norm before it is inside, and so is the residual.

    Args:
        d_model: width of the states.
        d_kv: width of a head.
        num_light_heads, num_heavy_heads: of the branches.
        local_radius: tokens before a token that the light branch sees.
        causal_window: tokens of a window of the routing.
        causal_routed_keys: keys/values that a window's heavy branch reads, out of all windows before it.
        routed_query_fraction: share of a window's tokens that are queries of the heavy branch, on average.
        causal_capacity_ratio: the most queries that a window may route, divided by how many it is to route on average.
        num_causal_key_value_routers: routers of the heavy branch's keys/values, each for a group of heads.
        causal_unrouted_vector: whether tokens without a heavy part get a learned vector.
        relative_attention_num_buckets, relative_attention_max_distance: of T5's biases by distance.
        soft_topk: of the routers; its solver is "exact".
        dropout_rate, layer_norm_epsilon, kernel_backend, attn_implementation: as of `CoLT5ConditionalAttention`.

    Raises:
        StrictDataclassError: for a number that the rule of the configuration's field of that name refuses.
        ValueError: for another `attn_implementation`.
    """

    ring = "light_key"

    def __init__(
        self,
        d_model: int,
        *,
        d_kv: int = 64,
        num_light_heads: int = 4,
        num_heavy_heads: int = 8,
        local_radius: int = 127,
        causal_window: int = 256,
        causal_routed_keys: int = 512,
        routed_query_fraction: float = 1 / 16,
        causal_capacity_ratio: float = 2.0,
        num_causal_key_value_routers: int = 1,
        causal_unrouted_vector: bool = False,
        relative_attention_num_buckets: int = 32,
        relative_attention_max_distance: int = 128,
        soft_topk: SoftTopK = SOFT_TOPK,
        dropout_rate: float = 0.0,
        layer_norm_epsilon: float = 1e-6,
        kernel_backend: str = "auto",
        attn_implementation: str = "sdpa",
    ):
        config = config_of(locals(), causal_attention="routed")
        super().__init__(config)
        self.light_relative_attention_bias = position_bias(config, num_light_heads, bidirectional=False)
        self.heavy_relative_attention_bias = position_bias(config, num_heavy_heads, bidirectional=False)
        self.layer = self_attention(config)
        self.initialise(d_model)

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        cache: CoLT5DynamicRoutedLayer | None = None,
        output_routing: bool = False,
    ) -> Tensor | tuple[Tensor, CoLT5CausalLayerRouting]:
        """[batch, n, d_model] → the same shape.

        Args:
            hidden_states: floating point [batch, n, d_model]; with a cache the new tokens alone, one or many.
            mask: [batch, n], 1 or True for real tokens; None for all. What padding holds changes nothing, as long as
                it is finite.
            cache: what `make_cache` made, which this call continues, and fills in place; None for a whole text.
            output_routing: whether to return what was routed beside the states.

        Returns:
            The states; with `output_routing` a pair of them and what was routed, `query` and `key_value` of
            `CoLT5CausalLayerRouting`.

        Raises:
            TypeError: for states that are no floating point tensor, or another kind of cache.
            ValueError: for another shape of states or mask, or a cache of another number of rows.
        """
        hidden_states, plan = self._count(hidden_states, mask, cache)
        light_bias = plan.light_bias(bias_by_distance(self.light_relative_attention_bias))
        output, queries, pools = self.layer(
            hidden_states, light_bias, bias_by_distance(self.heavy_relative_attention_bias), plan, cache
        )
        return (output, CoLT5CausalLayerRouting(query=queries, key_value=pools)) if output_routing else output


class CoLT5CausalConditionalFeedForward(_CausalStandAlone):
    """X + LightFF(X) + s̃ · HeavyFF(X), where no output depends on a later token: see docs/causal_routing.md. The norm
    before it is inside, and so is the residual.

    Args:
        d_model, light_d_ff, heavy_d_ff, feed_forward_proj, dropout_rate, layer_norm_epsilon, kernel_backend: as of
            `CoLT5ConditionalFeedForward`.
        causal_window: tokens of a window of the routing.
        routed_feed_forward_fraction: share of a window's tokens that go through the heavy branch, on average.
        causal_capacity_ratio: the most tokens that a window may route, divided by how many it is to route on average.
        soft_topk: of the router; its solver is "exact".

    Raises:
        StrictDataclassError: for a number that the rule of the configuration's field of that name refuses.
    """

    ring = "feed_forward"

    def __init__(
        self,
        d_model: int,
        light_d_ff: int,
        heavy_d_ff: int,
        *,
        causal_window: int = 256,
        routed_feed_forward_fraction: float = 1 / 16,
        causal_capacity_ratio: float = 2.0,
        feed_forward_proj: str = "gated-gelu",
        soft_topk: SoftTopK = SOFT_TOPK,
        dropout_rate: float = 0.0,
        layer_norm_epsilon: float = 1e-6,
        kernel_backend: str = "auto",
    ):
        config = config_of(
            locals(),
            causal_attention="local",
            causal_feed_forward="routed",
            # It has no attention that would look back or read keys. The cache has room for a radius, so it is 0.
            local_radius=0,
            causal_routed_keys=1,
        )
        super().__init__(config)
        self.layer = decoder_feed_forward(config)
        self.initialise(d_model)

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        cache: CoLT5DynamicRoutedLayer | None = None,
        output_routing: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[batch, n, d_model] → the same shape; arguments and errors are those of `CoLT5CausalConditionalAttention`.

        Returns:
            The states; with `output_routing` a pair of them and each token's routing weight, fp32 [batch, n], 0 where
            it was not routed.
        """
        hidden_states, plan = self._count(hidden_states, mask, cache)
        output, weights = self.layer(hidden_states, plan, cache)
        return (output, weights) if output_routing else output


class CoLT5ConditionalCrossAttention(_StandAlone):
    """X + Attn(X, w ⊙ M[routed]): attention of all tokens to what routers choose of a memory, see
    docs/cross_routing.md. The norm of X before it is inside, and so is the residual; M is read as it is, and should be
    normalised, as an encoder's output is.

    Args:
        d_model: width of states and memory.
        routed_cross_key_values: how many tokens of the memory a router chooses; all where there are no more. None for
            the whole memory, without routers.
        d_kv: width of a head.
        num_heads: heads.
        num_cross_key_value_heads: key/value heads; 1 is multi-query attention.
        num_cross_routers: routers, each with a vector of its own and for a group of heads.
        asking_cross_routing: whether each token chooses its own tokens of the memory, by its queries and their keys,
            instead of one choice that all tokens share.
        routing: "learned", or the controls "random" and "even".
        dropout_rate: of the attention weights and of what the module adds.
        soft_topk, layer_norm_epsilon, kernel_backend: as of `CoLT5ConditionalFeedForward`.
        attn_implementation: "sdpa" or "eager".

    Attributes:
        settings: budget and soft top-k. To change a module's budget, assign another object of this class.

    Raises:
        StrictDataclassError: for a number that the rule of the configuration's field of that name refuses.
        ValueError: for another `attn_implementation`.
    """

    def __init__(
        self,
        d_model: int,
        routed_cross_key_values: int | None,
        *,
        d_kv: int = 64,
        num_heads: int = 12,
        num_cross_key_value_heads: int = 1,
        num_cross_routers: int = 1,
        asking_cross_routing: bool = False,
        routing: str = "learned",
        soft_topk: SoftTopK = SOFT_TOPK,
        dropout_rate: float = 0.0,
        layer_norm_epsilon: float = 1e-6,
        kernel_backend: str = "auto",
        attn_implementation: str = "sdpa",
    ):
        config = config_of(locals())
        super().__init__()
        self.settings, self.implementation = cross_settings(config), implementation(config)
        self.asks = asking_cross_routing
        if routed_cross_key_values is not None and not self.asks:
            self.cross_routing = CoLT5CrossRouting(d_model, 1, num_cross_routers, routing)
        self.layer = cross_attention(config)
        self.initialise(d_model)

    def make_cache(self) -> EncoderDecoderCache:
        """An empty cache of one memory's keys and values, for further calls with the same memory."""
        return EncoderDecoderCache(DynamicCache(), DynamicCache())

    def forward(
        self,
        hidden_states: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        output_routing: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[RoutedTokens, ...] | None]:
        """[batch, m, d_model] and a memory [batch, n, d_model] → [batch, m, d_model].

        Args:
            hidden_states: floating point [batch, m, d_model].
            memory: floating point [batch, n, d_model]; with a filled cache only its shape is read.
            memory_mask: [batch, n], 1 or True for real tokens; None for all. What padding holds changes nothing, as
                long as it is finite.
            cache: what `make_cache` made: the first call with it keeps the routed tokens' keys and values there, and
                further calls read them, with the same memory and mask; None for a call of its own.
            output_routing: whether to return what was routed beside the states.

        Returns:
            The states; with `output_routing` a pair of them and each router's tokens, whose `indices`, `weights` and
            `valid` are [batch, slots], or with `asking_cross_routing` [batch, m, slots] (None where nothing was routed
            in this call).

        Raises:
            TypeError: for states or a memory that are no floating point tensor, or another kind of cache.
            ValueError: for another shape of anything.
        """
        refuse_jit_trace()
        check_states("hidden_states", hidden_states, self.d_model)
        check_states("memory", memory, self.d_model)
        if len(memory) != len(hidden_states):
            raise ValueError(
                f"memory has {len(memory)} rows, and hidden_states has {len(hidden_states)}; they must have as many"
            )
        if not isinstance(cache, EncoderDecoderCache | None):
            raise TypeError(f"cache is a {type(cache).__name__}; it must be what make_cache() made, or None")
        check_cache(cache, hidden_states)
        kept = None if cache is None or not cache.is_updated.get(0) else cache.cross_attention_cache.layers[0].keys
        # of a routed memory the cache has the routed tokens alone
        is_whole = self.asks or not self.layer.EncDecAttention.is_routed
        if kept is not None and is_whole and kept.shape[2] != memory.shape[1]:
            raise ValueError(
                f"memory has {memory.shape[1]} tokens, and the cache was filled from one of {kept.shape[2]}; a cache "
                "goes on only with the memory that it was filled from"
            )
        mask = padding_mask("memory_mask", memory_mask, memory)
        hidden_states, memory, routing = self.cast(hidden_states), self.cast(memory), None
        if self.layer.EncDecAttention.is_routed and not self.asks:
            memories, mask, routing = self.cross_routing.memories_of_layers(
                memory, mask, cache, self.settings, self.implementation
            )
            (memory,) = memories
        plan = DecoderPlan(self.implementation, memory_mask=mask, asking=self.settings if self.asks else None)
        output, _, asked = self.layer(hidden_states, memory, plan, cache, 0)
        tokens = (asked,) if asked is not None else None if routing is None else routing[0]
        return (output, tokens) if output_routing else output
