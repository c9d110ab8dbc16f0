"""The layers over pictures on their own, for a user's networks: grids of states in, grids of states out."""

from dataclasses import replace

from torch import Tensor

from .configuration_colt5_vision import CoLT5VisionConfig
from .model_blocks import SOFT_TOPK, EncoderStandAlone, config_of
from .model_encoder_layer import branch_biases
from .model_from_config import add_branch_biases, encoder_attention
from .model_outputs import CoLT5LayerRouting
from .run_plan import EncoderPlan, SoftTopK


class CoLT5ConditionalImageAttention(EncoderStandAlone):
    """`CoLT5ConditionalAttention` in two dimensions: attention in a square window for every place of a grid, attention
    among routed places for the few important ones. The norm before it is inside, and so is the residual.

    Args:
        d_model: width of the states.
        d_kv: width of a head.
        num_light_heads, num_heavy_heads: of the branches.
        local_radius: places to each side, of rows and of columns, that the light branch sees.
        routed_query_fraction, routed_key_value_fraction: shares of a picture's real places that are queries, and keys
            and values, of the heavy branch.
        relative_attention_num_buckets, relative_attention_max_distance: of the biases, by rows and by columns; each
            pair of buckets has a bias of its own. Modules share them as those of `CoLT5ConditionalAttention` do.
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
        local_radius: int = 3,
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
        config = config_of(locals(), CoLT5VisionConfig)
        super().__init__(config)
        self.settings = replace(self.settings, feed_forward_fraction=None)
        add_branch_biases(self, config)
        self.layer = encoder_attention(config, 0)
        self.initialise(d_model)

    def forward(
        self, hidden_states: Tensor, mask: Tensor | None = None, output_routing: bool = False
    ) -> Tensor | tuple[Tensor, CoLT5LayerRouting]:
        """[batch, height, width, d_model] → the same shape.

        Args:
            hidden_states: floating point [batch, height, width, d_model].
            mask: [batch, height, width], 1 or True for real places; None for all. Budgets count a picture's own real
                places.
            output_routing: whether to return what was routed beside the states.

        Returns:
            The states; with `output_routing` a pair of them and what was routed, `query` and `key_value`, whose
            `indices` count places row by row.

        Raises:
            TypeError: for states that are no floating point tensor.
            ValueError: for another shape of states or mask.
        """
        hidden_states, bool_mask, progress = self.checked(hidden_states, mask)
        states, bool_mask = hidden_states.flatten(1, 2), None if bool_mask is None else bool_mask.flatten(1)
        plan = EncoderPlan.make(self.settings, states, bool_mask, progress, width=hidden_states.shape[2])
        output, _, _, queries, keys = self.layer(states, *branch_biases(self), plan)
        output = output.unflatten(1, hidden_states.shape[1:3])
        return (output, CoLT5LayerRouting(query=queries, key_value=keys)) if output_routing else output
