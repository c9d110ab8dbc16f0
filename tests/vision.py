"""Tiny models over pictures that the test files share."""

from typing import Any

import torch

from modeling_colt5 import CoLT5ForImageClassification, CoLT5VisionConfig
from modeling_colt5.op_attention import local_attention, window_attention_reference

TINY = {
    "d_model": 32,
    "d_kv": 8,
    "num_layers": 2,
    "num_light_heads": 2,
    "num_heavy_heads": 3,
    "light_d_ff": 24,
    "heavy_d_ff": 64,
    "patch_size": 4,
    "local_radius": 2,
    "routed_feed_forward_fraction": 1 / 5,
    "routed_query_fraction": 1 / 4,
    "routed_key_value_fraction": 1 / 3,
    "dropout_rate": 0.0,
    "num_labels": 5,
}


def tiny_vision_model(
    model_class: Any = CoLT5ForImageClassification,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    **fields: Any,
) -> Any:
    """A model over pictures with random weights, in evaluation mode; `fields` are what differs from `TINY`."""
    config = CoLT5VisionConfig(**(TINY | fields))
    return model_class._from_config(config, attn_implementation=attn_implementation).to(dtype).eval()


def pad_pictures(pictures: list[torch.Tensor], height: int, width: int, fill: float = 0.0) -> dict[str, torch.Tensor]:
    """`pixel_values` [batch, channels, height, width] and `pixel_mask`, of pictures [channels, h, w] top left."""
    values = torch.full((len(pictures), pictures[0].shape[0], height, width), fill, dtype=pictures[0].dtype)
    mask = torch.zeros(len(pictures), height, width, dtype=torch.int64)
    for i, picture in enumerate(pictures):
        _, h, w = picture.shape
        values[i, :, :h, :w], mask[i, :h, :w] = picture, 1
    return {"pixel_values": values, "pixel_mask": mask}


def attend_in_windows(query, key, value, table, radius, mask=None, dropout=0.0, seed=None):
    """`local_attention` of states [batch, height, width, heads, d_kv] and a mask [batch, height, width]."""
    grid = query.shape[1:3]
    states = (part.flatten(1, 2) for part in (query, key, value))
    mask = None if mask is None else mask.flatten(1)
    return local_attention(*states, table, radius, mask, dropout, seed, grid[1]).unflatten(1, grid)


def windows_by_reference(query, key, value, table, radius, mask=None, **more):
    """`window_attention_reference` likewise."""
    grid = query.shape[1:3]
    states = (part.flatten(1, 2) for part in (query, key, value))
    mask = None if mask is None else mask.flatten(1)
    output, weights = window_attention_reference(*states, table, grid[1], radius, mask, **more)
    return output.unflatten(1, grid), weights
