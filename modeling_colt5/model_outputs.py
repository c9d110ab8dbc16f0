"""The outputs of CoLT5 models: Transformers' own, with what was routed and how the encoder's heavy branch attended."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithPast,
    ImageClassifierOutput,
    QuestionAnsweringModelOutput,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import ModelOutput

from .op_routing import RoutedTokens
from .run_release import NamesOfTheCache


@dataclass
class CoLT5LayerRouting(ModelOutput):
    """What the three routers of one encoder layer chose.

    Args:
        query: the queries of the heavy attention. Its `indices` (int64, positions in the padded sequence, ascending),
            `weights` (fp32) and `valid` (bool, which slots are used) are each [batch, slots].
        key_value: the keys and values of the heavy attention, likewise.
        feed_forward: the tokens of the heavy feed-forward, likewise.
    """

    query: RoutedTokens | None = None
    key_value: RoutedTokens | None = None
    feed_forward: RoutedTokens | None = None


@dataclass
class CoLT5CausalLayerRouting(ModelOutput):
    """What the routers of one causally routed decoder layer chose.

    Args:
        query: fp32 [batch, n], each token's weight as a query of the heavy attention, 0 where it was not routed. None
            with `causal_attention="local"`, as the next.
        key_value: the pools of the windows that the tokens fall into, and of the one after: `indices` (int64, ranks
            among the row's real tokens, ascending over the used slots), `weights` (fp32) and `valid` (bool) are each
            [batch, routers, windows + 1, causal_routed_keys].
        feed_forward: fp32 [batch, n], each token's weight in the heavy feed-forward, 0 where it was not routed. None
            with `causal_feed_forward="dense"`.
    """

    query: torch.Tensor | None = None
    key_value: RoutedTokens | None = None
    feed_forward: torch.Tensor | None = None


@dataclass
class CoLT5DecoderOutput(NamesOfTheCache, BaseModelOutputWithPastAndCrossAttentions):
    """The output of the decoder; the weights in `cross_attentions` are on all tokens of the encoder's output, or where
    `cross_routing` chose, on its slots: [batch, num_heads, n, slots].

    Args:
        routing: each layer's choices where it is causally routed, with `output_routing=True`.
        cross_routing: each layer's tokens of routed cross-attention, a `RoutedTokens` for each of its routers, [batch,
            slots], or of what each token chose with `asking_cross_routing`, [batch, n, slots]; with
            `output_routing=True`; None where there is none, and where keys and values came from the cache.
    """

    routing: tuple[CoLT5CausalLayerRouting, ...] | None = None
    cross_routing: tuple[tuple[RoutedTokens, ...], ...] | None = None


@dataclass
class CoLT5CausalLMOutput(NamesOfTheCache, CausalLMOutputWithPast):
    """The output of the causal language model; what is added here is `CoLT5DecoderOutput`'s."""

    routing: tuple[CoLT5CausalLayerRouting, ...] | None = None


@dataclass
class CoLT5EncoderOutput(BaseModelOutput):
    """The output of the encoder.

    Args:
        last_hidden_state: [batch, n, d_model].
        hidden_states: the embeddings' and each layer's output, each [batch, n, d_model], with
            `output_hidden_states=True`.
        attentions: each layer's light attention weights with `output_attentions=True` (and `attn_implementation=
            "eager"`): [batch, num_light_heads, n, 2 * r + 1] with r = min(local_radius, n - 1); entry [..., i, r + d]
            is token i's weight on token i + d.
        heavy_attentions: each layer's heavy attention weights, likewise: [batch, num_heavy_heads, query slots,
            key/value slots]; `routing` says which tokens the slots hold.
        routing: each layer's choices with `output_routing=True`.
    """

    heavy_attentions: tuple[torch.Tensor, ...] | None = None
    routing: tuple[CoLT5LayerRouting, ...] | None = None


@dataclass
class CoLT5Seq2SeqModelOutput(NamesOfTheCache, Seq2SeqModelOutput):
    """The output of encoder and decoder; `encoder_attentions` and what is added here are `CoLT5EncoderOutput`'s, and
    `decoder_routing` and `cross_routing` are `CoLT5DecoderOutput`'s."""

    encoder_heavy_attentions: tuple[torch.Tensor, ...] | None = None
    encoder_routing: tuple[CoLT5LayerRouting, ...] | None = None
    decoder_routing: tuple[CoLT5CausalLayerRouting, ...] | None = None
    cross_routing: tuple[tuple[RoutedTokens, ...], ...] | None = None


@dataclass
class CoLT5Seq2SeqLMOutput(NamesOfTheCache, Seq2SeqLMOutput):
    """The output with a language modelling head; what is added here is `CoLT5EncoderOutput`'s, and
    `decoder_routing` and `cross_routing` are `CoLT5DecoderOutput`'s."""

    encoder_heavy_attentions: tuple[torch.Tensor, ...] | None = None
    encoder_routing: tuple[CoLT5LayerRouting, ...] | None = None
    decoder_routing: tuple[CoLT5CausalLayerRouting, ...] | None = None
    cross_routing: tuple[tuple[RoutedTokens, ...], ...] | None = None


@dataclass
class CoLT5SequenceClassifierOutput(SequenceClassifierOutput):
    """The output of sequence classification; what is added here is `CoLT5EncoderOutput`'s."""

    heavy_attentions: tuple[torch.Tensor, ...] | None = None
    routing: tuple[CoLT5LayerRouting, ...] | None = None


@dataclass
class CoLT5TokenClassifierOutput(TokenClassifierOutput):
    """The output of token classification; what is added here is `CoLT5EncoderOutput`'s."""

    heavy_attentions: tuple[torch.Tensor, ...] | None = None
    routing: tuple[CoLT5LayerRouting, ...] | None = None


@dataclass
class CoLT5QuestionAnsweringOutput(QuestionAnsweringModelOutput):
    """The output of extractive question answering; what is added here is `CoLT5EncoderOutput`'s."""

    heavy_attentions: tuple[torch.Tensor, ...] | None = None
    routing: tuple[CoLT5LayerRouting, ...] | None = None


@dataclass
class CoLT5VisionOutput(CoLT5EncoderOutput):
    """The output of the encoder of pictures. Its tokens are patches, which count row by row in the padded pictures;
    the light attention weights are [batch, num_light_heads, rows, columns, 2 * r + 1, 2 * r + 1], see
    `window_attention_reference`.

    Args:
        patch_mask: bool [batch, rows, columns], True for the patches of a picture, False for padding.
    """

    patch_mask: torch.Tensor | None = None


@dataclass
class CoLT5ImageClassifierOutput(ImageClassifierOutput):
    """The output of image classification; what is added here is `CoLT5VisionOutput`'s."""

    heavy_attentions: tuple[torch.Tensor, ...] | None = None
    routing: tuple[CoLT5LayerRouting, ...] | None = None
    patch_mask: torch.Tensor | None = None


def as_encoder_output(given: Any) -> CoLT5EncoderOutput:
    """`encoder_outputs` in the one form that is worked with.

    Args:
        given: the encoder's output, another output with a `last_hidden_state`, a dictionary, a tuple or a list in the
            order of `CoLT5EncoderOutput`, or the last hidden state [batch, n, d_model] alone.

    Raises:
        TypeError: for another kind of value.
        ValueError: for a tuple or a list of another length.
    """
    if isinstance(given, CoLT5EncoderOutput):
        return given
    # Plain outputs of Transformers lack some of these fields, and other models' outputs have more.
    names = list(CoLT5EncoderOutput.__dataclass_fields__)
    if isinstance(given, torch.Tensor):
        return CoLT5EncoderOutput(last_hidden_state=given)
    if isinstance(given, tuple | list):
        if not 1 <= len(given) <= len(names):
            raise ValueError(
                f"encoder_outputs has {len(given)} entries; it must have from 1 to {len(names)}: {', '.join(names)}"
            )
        return CoLT5EncoderOutput(**dict(zip(names, given, strict=False)))
    if isinstance(given, Mapping):
        return CoLT5EncoderOutput(**{name: given.get(name) for name in names})
    if hasattr(given, "last_hidden_state"):
        return CoLT5EncoderOutput(**{name: getattr(given, name, None) for name in names})
    raise TypeError(
        f"encoder_outputs is a {type(given).__name__}; it must be the encoder's output, a dictionary, a tuple or a "
        "list of its parts, or its last_hidden_state alone"
    )
