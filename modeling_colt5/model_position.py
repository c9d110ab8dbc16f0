"""T5's relative position buckets, and the bias tables by distance that every attention here reads."""

import math
from collections.abc import Callable

import torch
from torch import nn

from .kernel_backend import accumulation_dtype, runs_eagerly


def relative_position_bucket(
    relative_position: torch.Tensor, bidirectional: bool, num_buckets: int, max_distance: int
) -> torch.Tensor:
    """T5's bucket of each relative position: exact up to a quarter or half of the buckets, logarithmic beyond.

    Args:
        relative_position: integers, key position minus query position, any shape.
        bidirectional: half of the buckets for keys after the query; otherwise those keys share bucket 0.
        num_buckets: number of buckets in all.
        max_distance: distances from here on share the last bucket.

    Returns:
        int64 bucket numbers in [0, num_buckets), of the same shape.
    """
    if bidirectional:
        num_buckets //= 2
        bucket = torch.where(relative_position > 0, num_buckets, 0)
        distance = relative_position.abs()
    else:
        bucket = torch.zeros_like(relative_position)
        distance = (-relative_position).clamp(min=0)
    exact = num_buckets // 2
    # Distances below `exact` never read this branch; the clamp keeps the logarithm finite there.
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    logarithmic = (exact + (ratio * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return bucket + torch.where(distance < exact, distance, logarithmic)


class CoLT5RelativePositionBias(nn.Embedding):
    """The learned bias of one attention branch, shared by all layers of a stack: [num_buckets, num_heads]."""

    def __init__(self, num_heads: int, num_buckets: int, max_distance: int, bidirectional: bool):
        super().__init__(num_buckets, num_heads)
        self.max_distance = max_distance
        self.bidirectional = bidirectional
        # It is no buffer, because a buffer that checkpoints lack is lost where a model without data is filled.
        distance = torch.arange(-max_distance, max_distance + 1, device="cpu")
        self.bucket = relative_position_bucket(distance, bidirectional, num_buckets, max_distance)

    def _apply(self, fn: Callable, recurse: bool = True) -> "CoLT5RelativePositionBias":
        super()._apply(fn, recurse)
        self._bucket_beside_weight()
        return self

    def _bucket_beside_weight(self) -> torch.Tensor:
        """The bucket of each distance from -max_distance to max_distance, int64 on the weight's device.

        It is kept there, as twenty operations make it, which are always the same."""
        device = self.weight.device
        if self.bucket.device == device:
            return self.bucket
        if device.type == "meta" or not runs_eagerly():
            return self.bucket.to(device)
        # A tensor that was made in inference mode could not be kept for a gradient later.
        with torch.inference_mode(False):
            self.bucket = self.bucket.to(device)
        return self.bucket

    def forward(self) -> torch.Tensor:  # type: ignore[override]
        """The bias by distance: fp32 (float64 in a float64 model), [num_heads, 2 * max_distance + 1].

        Entry max_distance + d is the bias of a key d positions after its query. All distances from max_distance on
        share a bucket, so that clamped distances lose nothing.
        """
        table = super().forward(self._bucket_beside_weight()).transpose(0, 1)
        # one copy, whatever the dtype: the first leaves fp32 as it is, the second what the first has copied
        return table.to(accumulation_dtype(table.dtype), memory_format=torch.contiguous_format).contiguous()
