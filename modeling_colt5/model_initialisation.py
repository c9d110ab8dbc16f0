"""T5's initialisation of the layers here, by their own sizes."""

import torch
from torch import nn
from transformers import initialization as init

from .model_causal import CoLT5LayerCausalAttention
from .model_layers import CoLT5Attention, CoLT5DenseActDense, CoLT5LayerNorm, CoLT5RelativePositionBias
from .model_router import CoLT5Router


def init_normal(linear: nn.Linear, std: float) -> None:
    """Weights of this standard deviation around 0, and a bias of 0."""
    init.normal_(linear.weight, mean=0.0, std=std)
    if linear.bias is not None:
        init.zeros_(linear.bias)


@torch.no_grad()
def init_layer(module: nn.Module, d_model: int, factor: float = 1.0) -> None:
    """Initialise a module's own parameters, and those of its projections; modules of other kinds are left alone.

    Standard deviations, times `factor`: q (d_model · d_kv)^-½; k, v, wi, biases by distance and routers d_model^-½;
    o (heads · d_kv)^-½; wo (hidden size)^-½. Norms are `factor`, the vector of unrouted tokens 0.
    """
    std = factor * d_model**-0.5
    if isinstance(module, CoLT5LayerNorm):
        init.constant_(module.weight, factor)
    elif isinstance(module, CoLT5RelativePositionBias):
        init.normal_(module.weight, mean=0.0, std=std)
    elif isinstance(module, CoLT5Router):
        if hasattr(module, "weight"):
            init.normal_(module.weight, mean=0.0, std=std)
    elif isinstance(module, CoLT5Attention):
        init_normal(module.q, std * module.d_kv**-0.5)
        init_normal(module.k, std)
        init_normal(module.v, std)
        init_normal(module.o, factor * module.o.in_features**-0.5)
    elif isinstance(module, CoLT5DenseActDense):
        for name in ("wi_0", "wi_1") if module.is_gated_act else ("wi",):
            init_normal(getattr(module, name), std)
        init_normal(module.wo, factor * module.wo.in_features**-0.5)
    elif isinstance(module, CoLT5LayerCausalAttention) and hasattr(module, "unrouted"):
        init.zeros_(module.unrouted)
