"""Learning rates relative to the parameters' sizes, as T5's Adafactor has them, for any optimiser."""

import math
from typing import Any

from torch import nn

# Adafactor's ε₂: no parameter counts as smaller
LEAST_SIZE = 1e-3


def size_scaled_groups(model: nn.Module, learning_rate: float) -> list[dict[str, Any]]:
    """Groups of parameters for an optimiser, each with `learning_rate` times the size of its parameters.

    T5's initialisation spans two orders of magnitude: embeddings have a root mean square of 1, query projections of
    (d_model · d_kv)^-½. Adafactor multiplies each update by its parameter's root mean square (Shazeer & Stern 2018,
    §8), and T5's learning rates, 0.01 to 0.001, are meant so (Raffel et al. 2020, §3.1.2). AdamW does not: at one rate
    for all, the embeddings hardly move (docs/learning.md). Here the size is the one that a parameter has now, rounded
    to two digits; it does not follow the training, so that a resumed run needs the sizes of the run's beginning.

        Trainer(model, arguments, optimizers=(torch.optim.AdamW(size_scaled_groups(model, 1e-2)), None), ...)

    Args:
        model: its parameters that need gradients; frozen ones are left out.
        learning_rate: relative to a parameter's size, above 0 and finite.

    Raises:
        ValueError: for a learning rate that is not above 0 or not finite, a parameter that is not finite, or a model
            of which nothing needs gradients.
    """
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate is {learning_rate}; it must be above 0 and finite")
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # the mean of no numbers is no number, and no size
            size = float(parameter.detach().float().square().mean().sqrt()) if parameter.numel() else 0.0
            if not math.isfinite(size):
                raise ValueError(f"{name} has a size of {size}; the parameter and its square must be finite")
            size = max(size, LEAST_SIZE)
            groups.setdefault(float(f"{size:.1e}"), []).append(parameter)
    if not groups:
        raise ValueError("no parameter of the model needs gradients")
    return [{"params": parameters, "lr": size * learning_rate} for size, parameters in groups.items()]
