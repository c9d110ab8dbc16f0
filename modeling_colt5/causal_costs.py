"""What a causal language model with routed layers costs, by formula: operations, and what is kept for a backward."""

from .configuration_colt5 import CoLT5Config
from .op_attention import BLOCK_LENGTH
from .run_budgets import share_of


def _check(config: CoLT5Config, n: int) -> None:
    if config.causal_attention == "full":
        raise ValueError("causal_attention is 'full'; it must be 'local' or 'routed': the formulas are for those")
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1")


def _routed(config: CoLT5Config, n: int, fraction: float, dense: bool) -> tuple[int, int]:
    """Tokens of n that a router takes on average, and the slots that all windows have for them."""
    window, windows = config.causal_window, -(-n // config.causal_window)
    if dense:
        return n, windows * window
    target = min(window, share_of(window, fraction))
    capacity = min(window, share_of(target, config.causal_capacity_ratio))
    return -(-n * target // window), windows * capacity


def _pool_slots(config: CoLT5Config, n: int, dense: bool) -> int:
    """Keys/values that a window's heavy attention has room for."""
    window = config.causal_window
    return -(-n // window) * window if dense else config.causal_routed_keys


def causal_flops(config: CoLT5Config, n: int, dense: bool = False) -> int:
    """FLOP of the matrix products of one row's forward pass through the layers, as `encoder_flops` counts them, but
    without the routers' scores.

    Args:
        config: the model's.
        n: tokens, all real.
        dense: whether all tokens take the heavy branches, as in a dense start.

    Raises:
        ValueError: for a decoder with full attention, or no token.
    """
    _check(config, n)
    width, light, radius = config.d_model, config.num_light_heads * config.d_kv, min(config.local_radius, n - 1)
    matrices = 3 if config.is_gated_act else 2
    pairs = n * (radius + 1) - radius * (radius + 1) // 2
    multiplications = 4 * n * width * light + 2 * pairs * light
    if config.causal_attention == "routed":
        heavy = config.num_heavy_heads * config.d_kv
        queries, _ = _routed(config, n, config.routed_query_fraction, dense)
        # keys and values are projected once for all pools
        multiplications += 2 * (n + queries) * width * heavy
        multiplications += 2 * queries * _pool_slots(config, n, dense) * heavy
    if config.causal_feed_forward == "routed":
        tokens, _ = _routed(config, n, config.routed_feed_forward_fraction, dense)
        multiplications += matrices * width * (n * config.light_d_ff + tokens * config.heavy_d_ff)
    else:
        multiplications += matrices * n * width * config.d_ff
    return 2 * config.num_decoder_layers * multiplications


def causal_kept_values(
    config: CoLT5Config, n: int, dense: bool = False, fused_attention: bool = True, checkpointed: bool = False
) -> int:
    """How many numbers the layers keep of one row's forward pass for its backward, as `kept_values` counts them; the
    arguments are the same, and the errors those of `causal_flops`."""
    _check(config, n)
    width = config.d_model
    hidden = (2 if config.is_gated_act else 1) + (config.dropout_rate > 0 or config.dense_act_fn != "gelu_new")
    copies = 3 if config.dropout_rate > 0 else 1
    light = config.num_light_heads * config.d_kv
    # both sublayers: states and normalised states; then queries, keys, values and output
    layer = 4 * n * width + 4 * n * light
    if not fused_attention:
        span = BLOCK_LENGTH + 2 * min(config.local_radius, n - 1)
        layer += (n // BLOCK_LENGTH + 1) * span * (copies * config.num_light_heads * BLOCK_LENGTH + 2 * light)
    if config.causal_attention == "routed":
        heavy, pool = config.num_heavy_heads * config.d_kv, _pool_slots(config, n, dense)
        _, slots = _routed(config, n, config.routed_query_fraction, dense)
        windows = -(-n // config.causal_window)
        # what goes in and comes out, queries and heads; keys and values once, and in every window's pool
        layer += slots * (2 * width + 2 * heavy) + 2 * n * heavy + 2 * windows * pool * heavy
        # without kernels rows are kept before their weights too; and for each pair its distance, an int64
        layer += 0 if fused_attention else 2 * windows * pool * heavy
        layer += 0 if fused_attention else slots * pool * (copies * config.num_heavy_heads + 2)
    if config.causal_feed_forward == "routed":
        _, slots = _routed(config, n, config.routed_feed_forward_fraction, dense)
        layer += n * hidden * config.light_d_ff + slots * (2 * width + hidden * config.heavy_d_ff)
    else:
        layer += n * hidden * config.d_ff
    if checkpointed:
        return (1 + config.num_decoder_layers) * n * width + layer
    return n * width + config.num_decoder_layers * layer
