"""What comes before and after the layers over pictures: patches, which are their tokens, and pooling for a head."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


class CoLT5PatchEmbedding(nn.Module):
    """A linear projection of each square patch of a picture."""

    def __init__(self, patch_size: int, num_channels: int, d_model: int):
        super().__init__()
        self.patch_size = patch_size
        self.projection = nn.Linear(num_channels * patch_size**2, d_model)

    def forward(
        self, pixel_values: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Patches of pictures, which are filled up with zeros to whole patches at the right and at the bottom.

        Args:
            pixel_values: [batch, channels, height, width].
            mask: bool [batch, height, width], True for real pixels; the others count as zeros. None for all real.

        Returns:
            [batch, rows, columns, d_model], and bool [batch, rows, columns], True for patches with a real pixel; None
            where all pixels are.
        """
        size = self.patch_size
        height, width = pixel_values.shape[-2:]
        filling = (0, -width % size, 0, -height % size)
        real = None
        if mask is not None:
            pixel_values = pixel_values.masked_fill(~mask[:, None], 0)
            real = F.max_pool2d(F.pad(mask, filling)[:, None].to(torch.float32), size)[:, 0] > 0
        patches = rearrange(F.pad(pixel_values, filling), "b c (y i) (x j) -> b y x (i j c)", i=size, j=size)
        return self.projection(patches), real


class CoLT5AttentionPooling(nn.Module):
    """One state of many: a learned query attends to the real ones.

    A few patches of a large picture may decide, and little is left of these in a mean over all. Keys and values are
    the states themselves: the product of a learned query with projected keys would be a linear score too. With a query
    of 0 this is the mean.
    """

    def __init__(self, d_model: int):
        super().__init__()
        self.query = nn.Parameter(torch.empty(d_model))

    def forward(self, hidden_states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """[batch, n, d_model] and bool [batch, n], True for real patches → [batch, d_model], taken in fp32."""
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        scores = (wide * self.query).sum(-1).masked_fill(~real, -torch.inf)
        return (scores.softmax(-1)[..., None] * wide).sum(1).to(hidden_states.dtype)
