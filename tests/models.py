"""Tiny models, padded batches and checkpointing that the test files share."""

from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from modeling_colt5 import (
    CoLT5Config,
    CoLT5ForConditionalGeneration,
    CoLT5ForQuestionAnswering,
    CoLT5ForSequenceClassification,
    CoLT5ForTokenClassification,
    CoLT5PreTrainedModel,
)
from modeling_colt5.layer_plain import PlainLayer, PlainStack
from modeling_colt5.model_decoder_layer import PLAIN

# the encoder with a head for a task
ENCODER_HEADS = [CoLT5ForSequenceClassification, CoLT5ForTokenClassification, CoLT5ForQuestionAnswering]


def tiny_config(**fields: Any) -> CoLT5Config:
    """A configuration of a few thousand parameters: every size differs from every other, depths too, no dropout, and
    budgets large enough that ten tokens route more than one.

    Args:
        fields: what differs.
    """
    tiny = {
        "vocab_size": 96,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 3,
        "num_heads": 4,
        "num_light_heads": 2,
        "num_heavy_heads": 3,
        "light_d_ff": 24,
        "heavy_d_ff": 64,
        "local_radius": 5,
        "routed_feed_forward_fraction": 1 / 5,
        "routed_query_fraction": 1 / 4,
        "routed_key_value_fraction": 1 / 3,
        "dropout_rate": 0.0,
    }
    return CoLT5Config(**(tiny | fields))


def tiny_model(
    model_class: type[CoLT5PreTrainedModel] = CoLT5ForConditionalGeneration,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    **fields: Any,
) -> CoLT5PreTrainedModel:
    """A model of `tiny_config(**fields)` with random weights, in evaluation mode."""
    model = model_class._from_config(tiny_config(**fields), attn_implementation=attn_implementation)
    return model.to(dtype).eval()


# one layer of the encoder and two of the decoder, for what does not depend on how many there are: caches have several
shallow_model = partial(tiny_model, num_layers=1, num_decoder_layers=2)


def random_ids(*shape: int, vocab_size: int = 96) -> torch.Tensor:
    """int64 token ids of ordinary tokens: neither pad, nor eos, nor unk."""
    return torch.randint(3, vocab_size, shape)


def pad(rows: list[torch.Tensor], side: str = "right", length: int | None = None) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` [batch, length] of rows [n] padded with 0.

    Args:
        rows: int64 ids of each row.
        side: where the padding goes, "right" or "left".
        length: padded length; None for the longest row's.
    """
    length = length or max(len(row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        part = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[i, part], mask[i, part] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def checkpoint_activations(model: CoLT5PreTrainedModel, use_reentrant: bool = False) -> None:
    """Have each layer's activations computed again in the backward, by the name that this Transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})


stacks: WeakKeyDictionary[nn.Module, PlainStack] = WeakKeyDictionary()


def read_plain(block: nn.Module) -> tuple[PlainLayer, tuple[torch.Tensor, ...]] | None:
    """What straight lines read of a decoder's block, as a stack does that may have read it before; None where the
    block is to be called."""
    read = stacks.setdefault(block, PlainStack()).read(nn.ModuleList([block]), PLAIN)
    return None if read is None else read[0]
