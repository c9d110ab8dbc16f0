"""The floating-point operations of a CoLT5 encoder's matrix products, by formula."""

from modeling_colt5 import CoLT5Config
from modeling_colt5.routing import routed_capacity


def band_pairs(n: int, radius: int) -> int:
    """The pairs of n tokens that are at most `radius` positions apart, each token with itself included."""
    radius = min(radius, n - 1)
    return n * (2 * radius + 1) - radius * (radius + 1)


def encoder_flops(config: CoLT5Config, n: int, light_pairs: int | None = None) -> int:
    """FLOP of the matrix products of one row's forward pass, a multiplication and an addition as two; the backward
    has twice as many.

    Args:
        config: the model's.
        n: tokens, all real.
        light_pairs: pairs of tokens for which the light attention takes scores; None for those that it needs.
    """
    minimum = config.min_routed_tokens
    queries = routed_capacity(n, config.routed_query_fraction, minimum)
    keys = routed_capacity(n, config.routed_key_value_fraction, minimum)
    routed = routed_capacity(n, config.routed_feed_forward_fraction, minimum)
    pairs = band_pairs(n, config.local_radius) if light_pairs is None else light_pairs
    light, heavy = config.num_light_heads * config.d_kv, config.num_heavy_heads * config.d_kv
    matrices = 3 if config.is_gated_act else 2
    multiplications = (
        # queries, keys, values, output; then scores and the weighted sum of values
        4 * n * config.d_model * light
        + 2 * pairs * light
        + 2 * queries * config.d_model * heavy
        + 2 * keys * config.d_model * heavy
        + 2 * queries * keys * heavy
        + matrices * n * config.d_model * config.light_d_ff
        + matrices * routed * config.d_model * config.heavy_d_ff
        # the scores of three routers
        + 3 * n * config.d_model
    )
    return 2 * config.num_layers * multiplications
