"""What stands before and behind the layers over pictures: patches, which are their tokens, and pooling for a head."""

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
    """One state of many: learned queries, one a head, attend to the real ones.

    Few patches of a large picture may decide, and in a mean over all of them little of those is left. A fixed query's
    product with a linear key is a linear score, so there is no projection of keys.

    Args:
        d_model: width of the states.
        num_heads: how many choices among the states are made.
        d_kv: width of what a head takes from them.
    """

    def __init__(self, d_model: int, num_heads: int, d_kv: int):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(d_model, num_heads, bias=False)
        self.v = nn.Linear(d_model, num_heads * d_kv, bias=False)
        self.o = nn.Linear(num_heads * d_kv, d_model, bias=False)

    def forward(self, hidden_states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """[batch, n, d_model] and bool [batch, n], True for real patches → [batch, d_model]; weights are fp32."""
        scores = self.query(hidden_states)
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        weights = wide.masked_fill(~real[..., None], -torch.inf).softmax(1).to(scores.dtype)
        values = self.v(hidden_states).unflatten(-1, (self.num_heads, -1))
        return self.o(torch.einsum("bnh,bnhd->bhd", weights, values).flatten(1))
