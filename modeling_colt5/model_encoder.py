"""The encoder, and its layer: conditional attention and conditional feed-forward, light and heavy branches."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.processing_utils import Unpack
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_colt5 import CoLT5Config
from .kernel_backend import Mode, is_hooked, uses_triton
from .layer_encoder import StraightLayer, StraightPass, combined, may_run_straight
from .layer_plain import PlainBlock
from .model_base import CoLT5Stack
from .model_layers import (
    CoLT5Attention,
    CoLT5DenseActDense,
    CoLT5LayerNorm,
    clamp_half,
    eager_attention_forward,
    project,
)
from .model_outputs import CoLT5EncoderOutput, CoLT5LayerRouting
from .model_position import CoLT5RelativePositionBias
from .model_router import CoLT5Router, CoLT5Routing, router_weights, run_routers
from .op_attention import local_attention, local_attention_reference, routed_attention, routed_attention_reference
from .op_routing import RoutedTokens
from .op_rows import combine_branches, scatter_add_tokens, share_and_gather
from .run_graphs import replayed
from .run_inputs import (
    ForwardFlags,
    embed,
    padding_mask,
    read_arguments,
    refuse_jit_trace,
    warn_of_missing_attentions,
)
from .run_plan import EncoderPlan


def add_branches(
    hidden_states: torch.Tensor,
    light: torch.Tensor,
    heavy: torch.Tensor,
    tokens: RoutedTokens,
    dropout: nn.Dropout,
    kernel_backend: str,
) -> torch.Tensor:
    """X + dropout(light + weights ⊙ heavy), [batch, n, d_model].

    Args:
        hidden_states: X, [batch, n, d_model].
        light: [batch, n, d_model].
        heavy: [batch, slots, d_model], at the routed positions.
        tokens: where the heavy rows belong, and their weights.
        dropout: of the sublayer.
        kernel_backend: "triton" or "torch".
    """
    routed = (tokens.indices, tokens.valid, tokens.weights)
    if dropout.training and dropout.p > 0:
        update = scatter_add_tokens(light, heavy, *routed, kernel_backend)
        return clamp_half(hidden_states + dropout(update))
    return clamp_half(combine_branches(hidden_states, light, heavy, *routed, kernel_backend))


class CoLT5LocalAttention(CoLT5Attention):
    """The light branch: every token attends to its neighbours."""

    def forward(
        self, hidden_states: torch.Tensor, bias_table: torch.Tensor, plan: EncoderPlan
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[batch, n, d_model] → the same shape, and the weights where the implementation gives them."""
        query, key, value = project(hidden_states, self.q, self.k, self.v, head_size=self.d_kv)
        inputs = (query, key, value, bias_table, self.radius, plan.mask)
        if plan.fused_attention:
            return self.o(local_attention(*inputs, self.dropout if self.training else 0.0).flatten(-2)), None
        weigh = self.weigh if self.attention_interface is eager_attention_forward else None
        output, weights = local_attention_reference(*inputs, self.attend, weigh)
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
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[batch, query slots, d_model], [batch, key/value slots, d_model] → [batch, query slots, d_model], and the
        weights where the implementation gives them."""
        query = self.split_heads(self.q(query_states))
        key, value = project(key_value_states, self.k, self.v, head_size=self.d_kv)
        inputs = (query, key, value, bias_table, queries.indices, keys.indices, keys.valid)
        if plan.fused_attention:
            return self.o(routed_attention(*inputs, self.dropout if self.training else 0.0).flatten(-2)), None
        output, weights = routed_attention_reference(*inputs, self.attend)
        return self.o(output.flatten(-2)), weights


class CoLT5LayerConditionalAttention(nn.Module):
    """Local attention for every token, and attention among routed tokens for the few important ones."""

    def __init__(self, config: CoLT5Config, layer_idx: int):
        super().__init__()
        self.layer_norm = CoLT5LayerNorm(config)
        self.light_attention = CoLT5LocalAttention(config, config.num_light_heads)
        if config.routing != "none":
            self.query_router = CoLT5Router(config, seed=3 * layer_idx)
            self.key_value_router = CoLT5Router(config, seed=3 * layer_idx + 1)
            self.heavy_attention = CoLT5RoutedAttention(config, config.num_heavy_heads)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(
        self,
        hidden_states: torch.Tensor,
        light_bias_table: torch.Tensor,
        heavy_bias_table: torch.Tensor | None,
        plan: EncoderPlan,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, RoutedTokens | None, RoutedTokens | None]:
        """X + LightAttn(X) + s̃ᵩ · HeavyAttn(X, s̃ᵏᵛ ⊙ X) (Ainslie et al. 2023, eq. of conditional attention).

        Args:
            hidden_states: X, [batch, n, d_model].
            light_bias_table, heavy_bias_table: [heads, 2 * max_distance + 1] of each branch.
            plan: the batch's mask and budgets.

        Returns:
            The new hidden states, light and heavy attention weights (where the implementation gives them), and the
            routed queries and keys/values (None with `routing="none"`).
        """
        backend = plan.kernel_backend
        if plan.attention is None or heavy_bias_table is None:
            normed, _ = self.layer_norm(hidden_states, None, backend, for_products=True)
            light, light_weights = self.light_attention(normed, light_bias_table, plan)
            return clamp_half(hidden_states + self.dropout(light)), light_weights, None, None, None

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
            query_states, key_value_states, heavy_bias_table, queries, keys, plan
        )
        light, light_weights = self.light_attention(normed, light_bias_table, plan)
        hidden_states = add_branches(hidden_states, light, heavy, queries, self.dropout, backend)
        return hidden_states, light_weights, heavy_weights, queries, keys


class CoLT5LayerConditionalFF(nn.Module):
    """A small feed-forward for every token, and a large one for the few important ones."""

    def __init__(self, config: CoLT5Config, layer_idx: int):
        super().__init__()
        self.layer_norm = CoLT5LayerNorm(config)
        self.light_feed_forward = CoLT5DenseActDense(config, config.light_d_ff)
        if config.routing != "none":
            self.router = CoLT5Router(config, seed=3 * layer_idx + 2)
            self.heavy_feed_forward = CoLT5DenseActDense(config, config.heavy_d_ff)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, hidden_states: torch.Tensor, plan: EncoderPlan) -> tuple[torch.Tensor, RoutedTokens | None]:
        """X + LightFF(X) + s̃ · HeavyFF(X) (Ainslie et al. 2023, eq. of the conditional feed-forward).

        Args:
            hidden_states: X, [batch, n, d_model].
            plan: the batch's mask and budgets.

        Returns:
            The new hidden states, and the routed tokens (None with `routing="none"`).
        """
        backend = plan.kernel_backend
        if plan.feed_forward is None:
            normed, _ = self.layer_norm(hidden_states, None, backend, for_products=True)
            return clamp_half(hidden_states + self.dropout(self.light_feed_forward(normed, backend))), None

        normed, scores = self.layer_norm(hidden_states, router_weights(self.router), backend, for_products=True)
        (tokens,) = run_routers((self.router,), normed, scores, plan, plan.feed_forward)
        normed, routed_states = share_and_gather(normed, (tokens.indices, tokens.valid, None), kernel_backend=backend)
        heavy = self.heavy_feed_forward(routed_states, backend)
        light = self.light_feed_forward(normed, backend)
        return add_branches(hidden_states, light, heavy, tokens, self.dropout, backend), tokens


# A plain block has modules of these classes, with these forwards.
PLAIN: dict[str, tuple[type[nn.Module], Any]] = {
    kind: (module_class, vars(module_class)["forward"])
    for kind, module_class in {
        "attention": CoLT5LayerConditionalAttention,
        "feed_forward": CoLT5LayerConditionalFF,
        "norm": CoLT5LayerNorm,
        "light_attention": CoLT5LocalAttention,
        "heavy_attention": CoLT5RoutedAttention,
        "dense": CoLT5DenseActDense,
        "router": CoLT5Router,
        "select": CoLT5Routing,
        "linear": nn.Linear,
        "dropout": nn.Dropout,
    }.items()
}


class CoLT5EncoderBlock(GradientCheckpointingLayer):
    """One encoder layer: conditional attention, conditional feed-forward."""

    def __init__(self, config: CoLT5Config, layer_idx: int):
        super().__init__()
        self.layer = nn.ModuleList(
            [CoLT5LayerConditionalAttention(config, layer_idx), CoLT5LayerConditionalFF(config, layer_idx)]
        )
        self.plain = PlainBlock()

    def forward(
        self,
        hidden_states: torch.Tensor,
        light_bias_table: torch.Tensor,
        heavy_bias_table: torch.Tensor | None,
        plan: EncoderPlan,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, CoLT5LayerRouting | None]:
        """The new hidden states [batch, n, d_model]; where the block runs as modules also light and heavy attention
        weights (None where not given), and what was routed."""
        parts: list[Any] = [hidden_states, None, None, None]
        line = self.straight_line(parts, (light_bias_table, heavy_bias_table), plan)
        if line is not None:
            if torch.is_grad_enabled():
                return line.run_with_gradient(hidden_states), None, None, None
            return combined(line.run(parts)), None, None, None
        hidden_states, light_weights, heavy_weights, queries, keys = self.layer[0](
            hidden_states, light_bias_table, heavy_bias_table, plan
        )
        hidden_states, tokens = self.layer[1](hidden_states, plan)
        routing = CoLT5LayerRouting(query=queries, key_value=keys, feed_forward=tokens)
        return hidden_states, light_weights, heavy_weights, routing

    def straight_line(
        self, parts: list[Any], tables: tuple[torch.Tensor, torch.Tensor | None], plan: EncoderPlan
    ) -> StraightLayer | None:
        """This block as a straight line of kernels, where it is plain and may run so; None for modules.

        Args:
            parts: what goes in, `Parts` of layer_encoder.py: the hidden states and three times None, or a sum that is
                left to the first norm.
            tables: light and heavy bias table.
            plan: of the pass.
        """
        light_bias_table, heavy_bias_table = tables
        if plan.straight is None or heavy_bias_table is None:
            return None
        found = self.plain.read(self, PLAIN)
        if found is None:
            return None
        return StraightLayer.of(*found, parts, (light_bias_table, heavy_bias_table), plan)


BLOCK_FORWARD = CoLT5EncoderBlock.forward


def _is_as_written(block: nn.Module) -> bool:
    """Whether a call of an encoder's block is no more than what is written here: no hook, no other class."""
    is_own = type(block) is CoLT5EncoderBlock and CoLT5EncoderBlock.forward is BLOCK_FORWARD
    return is_own and not is_hooked(block)


def _heavy_attentions_too(forward: Callable) -> Callable:
    """`output_attentions` asks for the heavy branch's weights as well as the light branch's."""

    @wraps(forward)
    def wrapper(self: "CoLT5Encoder", *args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("output_heavy_attentions", kwargs.get("output_attentions", self.config.output_attentions))
        return forward(self, *args, **kwargs)

    return wrapper


class CoLT5Encoder(CoLT5Stack):
    """The encoder: conditional layers over the whole input (Ainslie et al. 2023)."""

    _can_record_outputs = {
        "hidden_states": OutputRecorder(CoLT5EncoderBlock, index=0),
        "attentions": OutputRecorder(CoLT5EncoderBlock, index=1),
        "heavy_attentions": OutputRecorder(CoLT5EncoderBlock, index=2),
        "routing": OutputRecorder(CoLT5EncoderBlock, index=3),
    }

    def __init__(self, config: CoLT5Config):
        super().__init__(config)
        buckets, distance = config.relative_attention_num_buckets, config.relative_attention_max_distance
        self.light_relative_attention_bias = CoLT5RelativePositionBias(config.num_light_heads, buckets, distance, True)
        if config.routing != "none":
            self.heavy_relative_attention_bias = CoLT5RelativePositionBias(
                config.num_heavy_heads, buckets, distance, True
            )
        self.block = nn.ModuleList([CoLT5EncoderBlock(config, layer_idx) for layer_idx in range(config.num_layers)])
        self.final_layer_norm = CoLT5LayerNorm(config)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.gradient_checkpointing = False
        self.has_looked_for_padding = False
        self.dense_start: torch.Tensor | None = None
        self.post_init()

    @merge_with_config_defaults
    @_heavy_attentions_too
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[ForwardFlags],
    ) -> CoLT5EncoderOutput:
        """Encode a batch of documents.

        Args:
            input_ids: int64 [batch, n].
            attention_mask: [batch, n], 1 for real tokens, 0 for padding on either side; None where there is none.
            inputs_embeds: [batch, n, d_model], instead of `input_ids`.
            kwargs: `output_hidden_states`, `output_attentions`, `output_routing` and `return_dict`.

        Raises:
            ValueError: for both or neither of ids and embeddings, no row or no token, or another shape of anything.
        """
        refuse_jit_trace()
        flags = read_arguments(self, kwargs, attention_mask=attention_mask)
        warn_of_missing_attentions(self, flags)
        hidden_states = self.dropout(embed(self, input_ids, inputs_embeds))
        if input_ids is not None and attention_mask is None:
            self.warn_of_padding(input_ids)
        mask = padding_mask("attention_mask", attention_mask, hidden_states)
        records_blocks = self.records_blocks(flags)
        if not records_blocks and self.replays(hidden_states):
            hidden_states = replayed(self, repr(vars(self.config)), self.run_blocks, hidden_states, mask)
        else:
            hidden_states = self.run_blocks(hidden_states, mask, records_blocks)
        return CoLT5EncoderOutput(last_hidden_state=self.dropout(hidden_states))

    def warn_of_padding(self, input_ids: torch.Tensor) -> None:
        """Transformers' warning of ids that look padded and come without a mask.

        To look is to wait for the device: on CUDA the first such call does, and none whose kernels are captured."""
        if input_ids.is_cuda:
            mode = Mode.of_now(input_ids)
            if self.has_looked_for_padding or not mode.is_eager or mode.is_captured:
                return
            self.has_looked_for_padding = True
        self.warn_if_padding_and_no_attention_mask(input_ids, None)

    def records_blocks(self, flags: dict[str, Any]) -> bool:
        """Whether something of the layers is to be returned."""
        names = (f"output_{name}" for name in self._can_record_outputs)
        return any(flags.get(name, getattr(self.config, name, False)) for name in names)

    def replays(self, hidden_states: torch.Tensor) -> bool:
        """Whether this call may be a replayed graph: wanted, and fused."""
        config = self.config
        if self.training and self.dense_start is not None:
            return False
        return config.use_cuda_graphs and uses_triton(hidden_states, config.kernel_backend)

    def run_blocks(
        self, hidden_states: torch.Tensor, mask: torch.Tensor | None, records_blocks: bool = False
    ) -> torch.Tensor:
        """All layers and the last norm: [batch, n, d_model] and a bool mask [batch, n] → [batch, n, d_model].

        `records_blocks` says that somebody reads what the blocks return.
        """
        plan = EncoderPlan.make(self.config, hidden_states, mask, self.dense_start if self.training else None)
        is_common = plan.fused_attention and plan.dense_start is None and self.config.routing == "learned"
        if is_common and not records_blocks and may_run_straight(hidden_states, self.config.soft_topk_solver):
            plan.straight = StraightPass(hidden_states, plan)
        light_bias_table = self.light_relative_attention_bias()
        heavy_bias_table = None if self.config.routing == "none" else self.heavy_relative_attention_bias()
        tables = (light_bias_table, heavy_bias_table)
        try:
            if plan.straight is not None and not plan.mode.keeps_gradients and all(map(_is_as_written, self.block)):
                hidden_states = self.run_straight(hidden_states, tables, plan)
            else:
                for block in self.block:
                    hidden_states = block(hidden_states, *tables, plan)[0]
        finally:
            # The recording of a CUDA graph that an error breaks off can end only with all of its streams joined.
            plan.join()
        return self.final_layer_norm(hidden_states, None, plan.kernel_backend)[0]

    def run_straight(
        self, hidden_states: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor | None], plan: EncoderPlan
    ) -> torch.Tensor:
        """All layers without gradients, where nobody sees what goes from block to block: a straight line leaves its
        last sum to the norm of the next one. A block that is not plain is called as it is."""
        parts: list[Any] = [hidden_states, None, None, None]
        for block in self.block:
            line = block.straight_line(parts, tables, plan)  # type: ignore[operator]
            if line is None:
                parts = [block(combined(parts), *tables, plan)[0], None, None, None]
            else:
                parts = list(line.run(parts))
        return combined(parts)
