"""The encoder's layer: conditional attention and conditional feed-forward, light and heavy branches."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .kernel_backend import shows_results
from .layer_encoder import StraightLayer
from .layer_plain import PlainBlock, kinds_of
from .layer_program import PlainEncoderLayer
from .model_layers import (
    GELU,
    CoLT5Attention,
    CoLT5DenseActDense,
    CoLT5Dropout,
    CoLT5LayerNorm,
    attention_interface,
    bias_by_distance,
    clamp_half,
    drop,
    drop_rate,
    drops,
    eager_attention_forward,
)
from .model_outputs import CoLT5LayerRouting
from .model_router import CoLT5Router, CoLT5Routing, router_weights, run_routers
from .op_attention import local_attention, local_attention_reference, routed_attention, routed_attention_reference
from .op_dropout import draw_seeds
from .op_routing import RoutedTokens
from .op_rows import combine_branches, scatter_add_tokens, share_and_gather
from .run_plan import EncoderPlan


def seeds_of(seeds: torch.Tensor | None) -> Sequence[torch.Tensor | None]:
    """The three seeds of a sublayer, int64 [1] each."""
    return (None, None, None) if seeds is None else seeds[:, :1].unbind()


def branch_biases(module: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The biases by distance of light and heavy branch, fp32 [heads, 2 * max_distance + 1], or in two dimensions as
    many rows of as many columns, of a module that holds them; None for a heavy branch without."""
    heavy = getattr(module, "heavy_relative_attention_bias", None)
    return bias_by_distance(module.light_relative_attention_bias), None if heavy is None else bias_by_distance(heavy)


def add_branches(
    hidden_states: torch.Tensor,
    light: torch.Tensor,
    heavy: torch.Tensor,
    tokens: RoutedTokens,
    dropout: nn.Module,
    kernel_backend: str,
    seed: torch.Tensor | None,
) -> torch.Tensor:
    """X + dropout(light + weights ⊙ heavy), [batch, n, d_model].

    Args:
        hidden_states: X, [batch, n, d_model].
        light: [batch, n, d_model].
        heavy: [batch, slots, d_model], at the routed positions.
        tokens: where the heavy rows belong, and their weights.
        dropout: of the sublayer.
        kernel_backend: "triton" or "torch".
        seed: of dropout, int64 [1]; None for PyTorch's.
    """
    routed = (tokens.indices, tokens.valid, tokens.weights)
    if drops(dropout):
        update = scatter_add_tokens(light, heavy, *routed, kernel_backend)
        return clamp_half(hidden_states + drop(dropout, update, seed))
    return clamp_half(combine_branches(hidden_states, light, heavy, *routed, kernel_backend))


class CoLT5LocalAttention(CoLT5Attention):
    """The light branch: every token attends to its neighbours, `radius` to each side."""

    def __init__(self, d_model: int, d_kv: int, num_heads: int, radius: int, dropout_rate: float = 0.0):
        super().__init__(d_model, d_kv, num_heads, dropout_rate=dropout_rate)
        self.radius = radius

    def forward(
        self,
        hidden_states: torch.Tensor,
        bias_table: torch.Tensor,
        plan: EncoderPlan,
        seed: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[batch, n, d_model] → the same shape, and the weights where the implementation gives them."""
        query, key, value = (self.split_heads(part(hidden_states)) for part in (self.q, self.k, self.v))
        inputs = (query, key, value, bias_table, self.radius, plan.mask)
        if plan.implementation.fuses_attention:
            return self.o(local_attention(*inputs, drop_rate(self), seed, plan.width).flatten(-2)), None
        name = plan.implementation.attention
        weigh = self.weigh if attention_interface(name) is eager_attention_forward else None
        attend = partial(self.attend, implementation=name)
        output, weights = local_attention_reference(*inputs, attend, weigh, plan.width)
        return self.o(output.flatten(-2)), weights


class CoLT5RoutedAttention(CoLT5Attention):
    """The heavy branch: routed queries attend to routed keys and values."""

    def forward(
        self,
        query_states: torch.Tensor,
        key_value_states: torch.Tensor,
        bias_table: torch.Tensor,
        queries: RoutedTokens,
        keys: RoutedTokens,
        plan: EncoderPlan,
        seed: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[batch, query slots, d_model], [batch, key/value slots, d_model] → [batch, query slots, d_model], and the
        weights where the implementation gives them."""
        query = self.split_heads(self.q(query_states))
        key, value = (self.split_heads(part(key_value_states)) for part in (self.k, self.v))
        inputs = (query, key, value, bias_table, queries.indices, keys.indices)
        if plan.implementation.fuses_attention:
            attended = routed_attention(*inputs, keys.valid, drop_rate(self), seed, plan.width)
            return self.o(attended.flatten(-2)), None
        attend = partial(self.attend, implementation=plan.implementation.attention)
        # without padding all slots are used, and a mask would be one more tensor of the size of the bias
        used = None if plan.mask is None else keys.valid
        output, weights = routed_attention_reference(*inputs, used, attend, plan.width)
        return self.o(output.flatten(-2)), weights


class CoLT5LayerConditionalAttention(nn.Module):
    """Local attention for every token, and attention among routed tokens for the few important ones.

    Args:
        d_model: width of the states.
        d_kv: width of a head.
        num_light_heads, num_heavy_heads: of the branches.
        local_radius: positions to each side that the light branch sees.
        routing: as of `CoLT5Router`; "none" for no heavy branch.
        seed: of the queries' router; that of the keys' and values' has the next.
        dropout_rate: of the weights and of what the layer adds.
        layer_norm_epsilon: of the norm.
    """

    def __init__(
        self,
        d_model: int,
        d_kv: int,
        num_light_heads: int,
        num_heavy_heads: int,
        local_radius: int,
        routing: str = "learned",
        seed: int = 0,
        dropout_rate: float = 0.0,
        layer_norm_epsilon: float = 1e-6,
    ):
        super().__init__()
        self.layer_norm = CoLT5LayerNorm(d_model, layer_norm_epsilon)
        self.light_attention = CoLT5LocalAttention(d_model, d_kv, num_light_heads, local_radius, dropout_rate)
        if routing != "none":
            self.query_router = CoLT5Router(d_model, routing, seed)
            self.key_value_router = CoLT5Router(d_model, routing, seed + 1)
            self.heavy_attention = CoLT5RoutedAttention(d_model, d_kv, num_heavy_heads, dropout_rate=dropout_rate)
        self.dropout = CoLT5Dropout(dropout_rate)

    def drop_rates(self) -> tuple[float, float, float]:
        """With which probabilities the light attention, the heavy attention and the layer drop now."""
        heavy = getattr(self, "heavy_attention", None)
        return drop_rate(self.light_attention), drop_rate(heavy), drop_rate(self.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        light_bias_table: torch.Tensor,
        heavy_bias_table: torch.Tensor | None,
        plan: EncoderPlan,
        seeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, RoutedTokens | None, RoutedTokens | None]:
        """X + LightAttn(X) + s̃ᵩ · HeavyAttn(X, s̃ᵏᵛ ⊙ X) (Ainslie et al. 2023, eq. of conditional attention).

        Args:
            hidden_states: X, [batch, n, d_model].
            light_bias_table, heavy_bias_table: [heads, 2 * max_distance + 1] of each branch.
            plan: the batch's mask and budgets.
            seeds: int64 [3, 2], of what `drop_rates` names, the first of each row; None where PyTorch drops.

        Returns:
            The new hidden states, light and heavy attention weights (where the implementation gives them), and the
            routed queries and keys/values (None with `routing="none"`).
        """
        backend = plan.kernel_backend
        light_seed, heavy_seed, seed = seeds_of(seeds)
        if plan.attention is None or heavy_bias_table is None:
            normed, _ = self.layer_norm(hidden_states, None, backend, for_products=True)
            light, light_weights = self.light_attention(normed, light_bias_table, plan, light_seed)
            return clamp_half(hidden_states + drop(self.dropout, light, seed)), light_weights, None, None, None

        routers = (self.query_router, self.key_value_router)
        normed, scores = self.layer_norm(hidden_states, router_weights(*routers), backend, for_products=True)
        queries, keys = run_routers(routers, normed, scores, plan, plan.attention)
        normed, query_states, key_value_states = share_and_gather(
            normed,
            (queries.indices, queries.valid, None),
            (keys.indices, keys.valid, keys.weights),
            kernel_backend=backend,
        )
        heavy, heavy_weights = self.heavy_attention(
            query_states, key_value_states, heavy_bias_table, queries, keys, plan, heavy_seed
        )
        light, light_weights = self.light_attention(normed, light_bias_table, plan, light_seed)
        hidden_states = add_branches(hidden_states, light, heavy, queries, self.dropout, backend, seed)
        return hidden_states, light_weights, heavy_weights, queries, keys


class CoLT5LayerConditionalFF(nn.Module):
    """A small feed-forward for every token, and a large one for the few important ones.

    Args:
        d_model: width of the states.
        light_d_ff, heavy_d_ff: hidden sizes of the branches.
        feed_forward_proj: as of `CoLT5DenseActDense`.
        routing: as of `CoLT5Router`; "none" for no heavy branch.
        seed: of the router.
        dropout_rate: of the hidden states and of what the layer adds.
        layer_norm_epsilon: of the norm.
    """

    def __init__(
        self,
        d_model: int,
        light_d_ff: int,
        heavy_d_ff: int,
        feed_forward_proj: str = "gated-gelu",
        routing: str = "learned",
        seed: int = 0,
        dropout_rate: float = 0.0,
        layer_norm_epsilon: float = 1e-6,
    ):
        super().__init__()
        self.layer_norm = CoLT5LayerNorm(d_model, layer_norm_epsilon)
        self.light_feed_forward = CoLT5DenseActDense(d_model, light_d_ff, feed_forward_proj, dropout_rate)
        if routing != "none":
            self.router = CoLT5Router(d_model, routing, seed)
            self.heavy_feed_forward = CoLT5DenseActDense(d_model, heavy_d_ff, feed_forward_proj, dropout_rate)
        self.dropout = CoLT5Dropout(dropout_rate)

    def drop_rates(self) -> tuple[float, float, float]:
        """With which probabilities the light feed-forward, the heavy feed-forward and the layer drop now."""
        heavy = getattr(self, "heavy_feed_forward", None)
        return drop_rate(self.light_feed_forward), drop_rate(heavy), drop_rate(self.dropout)

    def forward(
        self, hidden_states: torch.Tensor, plan: EncoderPlan, seeds: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, RoutedTokens | None]:
        """X + LightFF(X) + s̃ · HeavyFF(X) (Ainslie et al. 2023, eq. of the conditional feed-forward).

        Args:
            hidden_states: X, [batch, n, d_model].
            plan: the batch's mask and budgets.
            seeds: int64 [3, 2], of what `drop_rates` names, the first of each row; None where PyTorch drops.

        Returns:
            The new hidden states, and the routed tokens (None with `routing="none"`).
        """
        backend = plan.kernel_backend
        light_seed, heavy_seed, seed = seeds_of(seeds)
        if plan.feed_forward is None:
            normed, _ = self.layer_norm(hidden_states, None, backend, for_products=True)
            light = self.light_feed_forward(normed, backend, light_seed)
            return clamp_half(hidden_states + drop(self.dropout, light, seed)), None

        normed, scores = self.layer_norm(hidden_states, router_weights(self.router), backend, for_products=True)
        (tokens,) = run_routers((self.router,), normed, scores, plan, plan.feed_forward)
        normed, routed_states = share_and_gather(normed, (tokens.indices, tokens.valid, None), kernel_backend=backend)
        heavy = self.heavy_feed_forward(routed_states, backend, heavy_seed)
        light = self.light_feed_forward(normed, backend, light_seed)
        return add_branches(hidden_states, light, heavy, tokens, self.dropout, backend, seed), tokens


class CoLT5EncoderBlock(GradientCheckpointingLayer):
    """One encoder layer: conditional attention, conditional feed-forward."""

    def __init__(self, attention: CoLT5LayerConditionalAttention, feed_forward: CoLT5LayerConditionalFF):
        super().__init__()
        self.layer = nn.ModuleList([attention, feed_forward])
        self.plain = PlainBlock(PlainEncoderLayer)

    def drop_rates(self) -> tuple[float, ...]:
        """With which probabilities attention and feed-forward drop now, three each."""
        return tuple(rate for layer in self.layer for rate in layer.drop_rates())  # type: ignore[operator]

    def forward(
        self,
        hidden_states: torch.Tensor,
        light_bias_table: torch.Tensor,
        heavy_bias_table: torch.Tensor | None,
        plan: EncoderPlan,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, CoLT5LayerRouting | None]:
        """The new hidden states [batch, n, d_model]; where the block runs as modules also light and heavy attention
        weights (None where not given), and what was routed."""
        line = self.straight_line(hidden_states, light_bias_table, heavy_bias_table, plan)
        if line is not None:
            return line(hidden_states), None, None, None
        attention_seeds = feed_forward_seeds = None
        # PyTorch's dropout would keep its masks; and what a layer drops must not depend on how it runs
        if plan.kernel_backend == "triton" and any(self.drop_rates()):
            attention_seeds, feed_forward_seeds = draw_seeds(6, hidden_states.device).split_with_sizes([3, 3])
        hidden_states, light_weights, heavy_weights, queries, keys = self.layer[0](
            hidden_states, light_bias_table, heavy_bias_table, plan, attention_seeds
        )
        hidden_states, tokens = self.layer[1](hidden_states, plan, feed_forward_seeds)
        routing = CoLT5LayerRouting(query=queries, key_value=keys, feed_forward=tokens)
        return hidden_states, light_weights, heavy_weights, routing

    def straight_line(
        self,
        hidden_states: torch.Tensor,
        light_bias_table: torch.Tensor,
        heavy_bias_table: torch.Tensor | None,
        plan: EncoderPlan,
    ) -> StraightLayer | None:
        """This block as a straight line of kernels, where it is plain and may run so; None for modules. Arguments are
        those of `forward`."""
        # a hook is to see what was routed, which a straight line does not give
        if plan.straight is None or heavy_bias_table is None or shows_results(self):
            return None
        if not plan.straight.takes(hidden_states):
            return None
        found = self.plain.read(self, PLAIN)
        if found is None:
            return None
        return StraightLayer.of(*found, (light_bias_table, heavy_bias_table), plan)


# What a plain block is made of.
PLAIN = kinds_of(
    block=CoLT5EncoderBlock,
    attention=CoLT5LayerConditionalAttention,
    feed_forward=CoLT5LayerConditionalFF,
    norm=CoLT5LayerNorm,
    light_attention=CoLT5LocalAttention,
    heavy_attention=CoLT5RoutedAttention,
    dense=CoLT5DenseActDense,
    router=CoLT5Router,
    select=CoLT5Routing,
    linear=nn.Linear,
    dropout=CoLT5Dropout,
    activation=GELU,
)
