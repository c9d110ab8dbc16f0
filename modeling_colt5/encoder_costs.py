"""What an encoder costs, by formula: the operations of its matrix products, and what it keeps for its backward, with
what the decoder reads of it by routed cross-attention."""

import math
from dataclasses import dataclass

from .configuration_colt5 import CoLT5BaseConfig
from .op_attention import BLOCK_LENGTH, block_side
from .run_budgets import routed_capacity


@dataclass(frozen=True)
class RoutedNumbers:
    """How many tokens of a row the heavy branches take.

    Attributes:
        queries, keys: of the heavy attention.
        tokens: of the heavy feed-forward.
    """

    queries: int
    keys: int
    tokens: int

    @classmethod
    def of(cls, config: CoLT5BaseConfig, n: int, dense: bool = False) -> "RoutedNumbers":
        """The numbers for n real tokens: the configuration's budgets, or all tokens where `dense`.

        Raises:
            ValueError: for no token.
        """
        if n < 1:
            raise ValueError(f"n is {n}; it must be at least 1")
        if dense:
            return cls(n, n, n)
        fractions = (
            config.routed_query_fraction, config.routed_key_value_fraction, config.routed_feed_forward_fraction
        )  # fmt: skip
        return cls(*(routed_capacity(n, fraction, config.min_routed_tokens) for fraction in fractions))


def band_pairs(n: int, radius: int) -> int:
    """The pairs of n tokens that are at most `radius` positions apart, each token with itself included."""
    radius = min(radius, n - 1)
    return n * (2 * radius + 1) - radius * (radius + 1)


def light_pairs_of(config: CoLT5BaseConfig, n: int) -> int:
    """The pairs of n tokens that light attention needs. Patches of pictures are taken for those of a square."""
    return band_pairs(side_of(config, n), config.local_radius) ** config.dimensions


def side_of(config: CoLT5BaseConfig, n: int) -> int:
    """How many tokens stand in a row: all n of a text, of patches as many as in a square."""
    return n if config.dimensions == 1 else math.isqrt(n - 1) + 1


def light_blocks(config: CoLT5BaseConfig, n: int) -> tuple[int, ...]:
    """How many blocks the light attention without kernels cuts n tokens into, and the queries and the keys of each."""
    side = side_of(config, n)
    radius = min(config.local_radius, side - 1)
    block = BLOCK_LENGTH if config.dimensions == 1 else block_side(radius, side, side)
    blocks = side // block + 1 if config.dimensions == 1 else -(-side // block)
    return tuple(count**config.dimensions for count in (blocks, block, block + 2 * radius))


def encoder_flops(config: CoLT5BaseConfig, n: int, light_pairs: int | None = None, dense: bool = False) -> int:
    """FLOP of the matrix products of one row's forward pass, a multiplication and an addition as two; the backward
    has twice as many.

    Args:
        config: the model's.
        n: tokens, all real.
        light_pairs: pairs of tokens for which the light attention takes scores; None for those that it needs.
        dense: whether all tokens take the heavy branches, as in a dense start.
    """
    routed = RoutedNumbers.of(config, n, dense)
    pairs = light_pairs_of(config, n) if light_pairs is None else light_pairs
    light, heavy = config.num_light_heads * config.d_kv, config.num_heavy_heads * config.d_kv
    matrices = 3 if config.is_gated_act else 2
    multiplications = (
        # queries, keys, values, output; then scores and the weighted sum of values
        4 * n * config.d_model * light
        + 2 * pairs * light
        + 2 * routed.queries * config.d_model * heavy
        + 2 * routed.keys * config.d_model * heavy
        + 2 * routed.queries * routed.keys * heavy
        + matrices * n * config.d_model * config.light_d_ff
        + matrices * routed.tokens * config.d_model * config.heavy_d_ff
        # the scores of three routers
        + 3 * n * config.d_model
    )
    return 2 * config.num_layers * multiplications


def kept_values(
    config: CoLT5BaseConfig, n: int, dense: bool = False, fused_attention: bool = True, checkpointed: bool = False
) -> int:
    """How many numbers the layers keep of one row's forward pass for its backward: the large tensors, to compare one
    kind of step with another. Dropout's masks and what is copied for a product come on top, up to a third in all.
    Of a decoder with routed cross-attention they are the rows that it reads, and their keys and values; where its
    tokens choose for themselves, the keys, values and answers of the memory, and not what each one chooses.

    Args:
        config: the model's.
        n: tokens, all real.
        dense: whether all tokens take the heavy branches, as in a dense start.
        fused_attention: whether fused kernels compute the attention, which keep no attention weights.
        checkpointed: whether activations are checkpointed: each layer keeps its input, and one at a time the rest.
    """
    routed = RoutedNumbers.of(config, n, dense)
    d_model, light, heavy = config.d_model, config.num_light_heads * config.d_kv, config.num_heavy_heads * config.d_kv
    # of a feed-forward's hidden units: what goes into the activation, and what comes out where dropout follows it or
    # where it is not recomputed
    hidden = (2 if config.is_gated_act else 1) + (config.dropout_rate > 0 or config.dense_act_fn != "gelu_new")
    layer = (
        # both sublayers: states and normalised states
        4 * n * d_model
        # queries, keys, values, output
        + 4 * n * light
        + hidden * n * config.light_d_ff
        # the same of the heavy branches, their input, and their output, which the weights' gradient needs
        + (2 * routed.queries + routed.keys) * d_model
        + 2 * (routed.queries + routed.keys) * heavy
        + routed.tokens * (2 * d_model + hidden * config.heavy_d_ff)
    )
    if not fused_attention:
        blocks, queries, window = light_blocks(config, n)
        # the bias, with dropout the attention weights before and after it as well
        copies = 3 if config.dropout_rate > 0 else 1
        # keys and values of overlapping windows
        layer += blocks * window * (copies * config.num_light_heads * queries + 2 * light)
        # for each pair also its distance, an int64
        layer += routed.queries * routed.keys * (copies * config.num_heavy_heads + 2)
    cross_rows = cross_keys = decoder_layers = 0
    if config.is_encoder_decoder and config.routed_cross_key_values is not None:
        decoder_layers = config.num_decoder_layers
        slots = config.num_cross_routers * (n if dense else min(n, config.routed_cross_key_values))
        # without kernels the rows are kept before their weights and after
        cross_rows = (1 if fused_attention else 2) * slots * d_model
        cross_keys = 2 * slots * config.num_cross_key_value_heads * config.d_kv
        if config.asking_cross_routing:
            cross_rows, cross_keys = 0, 2 * n * config.d_kv
    # the last norm keeps its input
    kept = n * d_model + decoder_layers * cross_rows
    if checkpointed:
        return kept + config.num_layers * n * d_model + layer + cross_keys
    return kept + config.num_layers * layer + decoder_layers * cross_keys
