"""Checks of a call's inputs: shapes that fit each other, forms that are understood, arguments that are read.

Only shapes, dtypes and Python values are looked at: nothing here waits for a device.
"""

import difflib
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypedDict
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache

from .kernel_backend import can_look, runs_eagerly


class ForwardFlags(TypedDict, total=False):
    """What every forward takes beside the arguments that it names."""

    output_hidden_states: bool | None
    output_attentions: bool | None
    output_heavy_attentions: bool | None
    output_routing: bool | None
    return_dict: bool | None


# Every model may be given these beside its forward's named arguments: Trainer's count, and what Transformers' wrappers
# of a forward read.
_READ_BY_ALL = frozenset(
    (*ForwardFlags.__annotations__, "use_cache", "cache", "num_items_in_batch")
    + ("is_causal", "debug_io", "debug_io_dir", "prune_layers")
)
# Arguments of these names put several texts in one row. Transformers' names begin so or are these; the last two are
# T5X's and Megatron's.
_PACKING_PREFIX = "cu_seq"
_PACKING = frozenset({"seq_idx", "segment_ids", "encoder_segment_ids", "decoder_segment_ids", "packed_seq_params"})
# Without the mask that stands beside them, positions would say where texts begin.
_POSITIONS = {"position_ids": "attention_mask", "decoder_position_ids": "decoder_attention_mask"}

# The topics that each model has been warned of.
_warned: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def _warn_once(model: nn.Module, topic: str, message: Callable[[], str]) -> None:
    # A tracer keeps no warnings, and cannot follow what makes some of the messages.
    if not runs_eagerly():
        return
    topics = _warned.setdefault(model, set())
    if topic not in topics:
        topics.add(topic)
        warnings.warn(f"{type(model).__name__}: {message()}", UserWarning, stacklevel=2)


def _unread(model: nn.Module, name: str) -> str:
    """What to say of an argument that nobody reads."""
    if name in _POSITIONS:
        return f"{name} is not read: attention goes by the distance between tokens"
    if name == "token_type_ids":
        return "token_type_ids is not read: there are no embeddings of token types"
    (nearest,) = difflib.get_close_matches(name, _named_arguments(type(model).forward), n=1, cutoff=0.0)
    return f"the argument {name} is not read; the nearest name of one that is read is {nearest}"


@functools.cache
def _named_arguments(forward: Callable) -> list[str]:
    """The names of the arguments of a forward, and of the flags that all forwards take."""
    parameters = inspect.signature(forward).parameters.values()
    named = (parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD)
    return [*(name for name in named if name != "self"), *ForwardFlags.__annotations__]


def read_arguments(model: nn.Module, arguments: Mapping[str, Any], **masks: Tensor | None) -> dict[str, Any]:
    """Those of a call's further arguments that are read.

    An argument that is not read is refused if reading it would change the result; for any other there is one warning
    for each model and name. None is never refused. A forward must not name such arguments itself: `generate` makes the
    position ids that a forward names, and Trainer keeps the columns.

    Args:
        model: whose forward it is.
        arguments: the forward's keyword arguments beside those that it names.
        masks: the call's `attention_mask`, and its `decoder_attention_mask` where there is a decoder.

    Returns:
        The arguments that are read.

    Raises:
        ValueError: for several texts packed in one row.
    """
    if arguments.keys() <= _READ_BY_ALL:
        return dict(arguments)
    unread = {name: value for name, value in arguments.items() if name not in _READ_BY_ALL and value is not None}
    for name in unread:
        is_position = name in _POSITIONS and masks.get(_POSITIONS[name]) is None
        if is_position or name in _PACKING or name.startswith(_PACKING_PREFIX):
            mask = _POSITIONS.get(name, "attention_mask")
            raise ValueError(
                f"{name} is given{f' without {mask}' if is_position else ''}; it marks several texts in one row, "
                f"which {type(model).__name__} would take for one. Give each text a row of its own, with {mask}"
            )
    for name in unread:
        _warn_once(model, name, functools.partial(_unread, model, name))
    return {name: value for name, value in arguments.items() if name in _READ_BY_ALL}


def warn_of_missing_attentions(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Say once that a stack will give no attention weights, as Transformers' own models do.

    Args:
        model: the encoder or the decoder.
        arguments: the call's further arguments.
    """
    if arguments.get("output_attentions") and model.config._attn_implementation != "eager":
        _warn_once(
            model,
            "output_attentions",
            lambda: (
                f"attn_implementation {model.config._attn_implementation!r} does not give the weights that "
                'output_attentions=True asks for; load the model with attn_implementation="eager" to see them'
            ),
        )


def refuse_jit_trace() -> None:
    """Refuse `torch.jit.trace`, which would keep its example's length.

    Raises:
        RuntimeError: while it traces.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise RuntimeError(
            "torch.jit.trace would keep its example's length, and with it how many tokens are routed; use "
            "torch.export.export, whose programs take any length, and for ONNX torch.onnx.export(..., dynamo=True)"
        )


def _shape_error(name: str, tensor: Tensor, wanted: str) -> ValueError:
    return ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {wanted}")


def _type_error(name: str, given: Any, wanted: str) -> TypeError:
    is_tensor = isinstance(given, Tensor)
    what = f"has dtype {given.dtype}" if is_tensor else f"is {type(given).__name__}"
    return TypeError(f"{name} {what}; it must be {'' if is_tensor else 'a tensor, '}{wanted}")


def embed(stack: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None, prefix: str = "") -> Tensor:
    """The embeddings that a stack begins with, of ids or as they are given.

    Args:
        stack: the encoder or the decoder.
        input_ids: int64 [batch, n].
        inputs_embeds: floating point [batch, n, d_model] of any dtype, instead of ids.
        prefix: what the arguments' names begin with: "decoder_" or nothing.

    Returns:
        [batch, n, d_model] in the dtype of the stack.

    Raises:
        ValueError: for both or neither of ids and embeddings, another shape, or no row or no token.
        TypeError: for ids that are no tensor of integers, or embeddings that are not floating point.
    """
    if (input_ids is None) == (inputs_embeds is None):
        given = "neither" if input_ids is None else "both"
        raise ValueError(f"{given} of {prefix}input_ids and {prefix}inputs_embeds given; exactly one is needed")
    if input_ids is not None:
        if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
            raise _type_error(
                f"{prefix}input_ids", input_ids, "int64 [batch, length], as a tokenizer gives with return_tensors='pt'"
            )
        if input_ids.dim() != 2 or 0 in input_ids.shape:
            raise _shape_error(f"{prefix}input_ids", input_ids, "[batch, length] with at least one row and one token")
        return stack.embed_tokens(input_ids)
    assert inputs_embeds is not None
    check_states(f"{prefix}inputs_embeds", inputs_embeds, stack.config.d_model)
    return inputs_embeds.to(stack.dtype)


# The sizes of a batch of states but for their width, by the dimensions of positions.
_AXES = {1: "batch, length", 2: "batch, height, width"}


def check_states(name: str, states: Any, d_model: int, dimensions: int = 1) -> None:
    """Check that states are floating point with at least one row and one token: [batch, n, d_model], or in two
    dimensions [batch, height, width, d_model].

    Raises:
        TypeError: for what is no floating point tensor.
        ValueError: for another shape.
    """
    if not isinstance(states, Tensor) or not states.is_floating_point():
        raise _type_error(name, states, f"floating point [{_AXES[dimensions]}, {d_model}]")
    if states.dim() != dimensions + 2 or states.shape[-1] != d_model or 0 in states.shape:
        wanted = f"[{_AXES[dimensions]}, {d_model}], as d_model is {d_model}, with at least one row and one token"
        raise _shape_error(name, states, wanted)


def check_pixels(pixel_values: Any, num_channels: int) -> None:
    """Check that pictures are floating point [batch, channels, height, width] with at least one pixel.

    Raises:
        TypeError: for what is no floating point tensor.
        ValueError: for another shape, naming what is wrong with it.
    """
    shape = f"[batch, {num_channels}, height, width]"
    if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point():
        raise _type_error("pixel_values", pixel_values, f"floating point {shape}, as an image processor makes it")
    if pixel_values.dim() != 4:
        raise _shape_error("pixel_values", pixel_values, f"{shape}, also for a single picture")
    if pixel_values.shape[1] != num_channels:
        wanted = f"{shape}, as num_channels of the configuration is {num_channels}"
        raise _shape_error("pixel_values", pixel_values, wanted)
    if 0 in pixel_values.shape:
        raise _shape_error("pixel_values", pixel_values, f"{shape} with at least one picture and one pixel")


def pixel_mask_of(pixel_mask: Tensor | None, pixel_values: Tensor) -> Tensor | None:
    """The mask of pictures [batch, channels, height, width] as bool [batch, height, width], True for real pixels.

    Raises:
        TypeError: for a mask that is no tensor.
        ValueError: for a mask of another shape, or where it can be seen, a picture without a real pixel.
    """
    if pixel_mask is None:
        return None
    batch, _, *size = pixel_values.shape
    wanted = f"[batch, height, width], here {(batch, *size)}, with 1 for real pixels and 0 for padding"
    if not isinstance(pixel_mask, Tensor):
        raise _type_error("pixel_mask", pixel_mask, wanted)
    if pixel_mask.shape != (batch, *size):
        raise _shape_error("pixel_mask", pixel_mask, wanted)
    mask = pixel_mask.to(torch.bool)
    if can_look(mask):
        empty = (~mask.flatten(1).any(1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"pixel_mask has no real pixel in the pictures {empty}; each must have at least one")
    return mask


def padding_mask(name: str, attention_mask: Tensor | None, states: Tensor) -> Tensor | None:
    """The mask of states [batch, n, d_model] as bool [batch, n], True for real tokens; in two dimensions likewise.

    Raises:
        TypeError: for a mask that is no tensor.
        ValueError: for a mask of another shape.
    """
    if attention_mask is None:
        return None
    wanted = f"[{_AXES[states.dim() - 2]}], here {tuple(states.shape[:-1])}, with 1 for real tokens and 0 for padding"
    if not isinstance(attention_mask, Tensor):
        raise _type_error(name, attention_mask, wanted)
    if attention_mask.shape != states.shape[:-1]:
        raise _shape_error(name, attention_mask, wanted)
    return attention_mask.to(torch.bool)


def check_causal_mask(
    name: str, attention_mask: Any, states: Tensor, past: int | Tensor, key_length: int | None = None
) -> None:
    """Check a decoder's mask against its new states and its cache.

    A mask that lacks the columns of earlier tokens would otherwise have its own columns taken for theirs.

    Args:
        name: the argument.
        attention_mask: [batch, past + n], or where `key_length` is given a ready one [batch or 1, heads or 1, n,
            key_length]; None, and a mask that is no tensor, are left to Transformers.
        states: [batch, n, d_model].
        past: tokens in the cache. One that lies on another device than the CPU is not read.
        key_length: n and the slots of the cache, used and free, which a mask may cover too; None for a causally routed
            decoder, which takes the columns of the new tokens alone as well.

    Raises:
        ValueError: for a mask of another shape.
    """
    if not isinstance(attention_mask, Tensor):
        return
    batch, length = states.shape[:2]
    past_length: int | None = None
    if not isinstance(past, Tensor) or can_look(past):
        past_length = int(past)
    if attention_mask.dim() == 4 and key_length is not None:
        rows, _, queries, keys = attention_mask.shape
        if rows not in (1, batch) or queries != length or keys != key_length:
            raise _shape_error(
                name, attention_mask, f"[batch, 1, new tokens, keys], here {(batch, 1, length, key_length)}"
            )
        return
    wanted = (
        f"[batch, earlier + new tokens], here {(batch, 'earlier' if past_length is None else past_length + length)}"
    )
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch:
        raise _shape_error(name, attention_mask, wanted)
    columns, other_fit = attention_mask.shape[1], length if key_length is None else key_length
    fits = columns >= length if past_length is None else columns in (past_length + length, other_fit)
    if not fits:
        raise _shape_error(name, attention_mask, wanted)


def check_no_dense_start(dense_start: Tensor | None) -> None:
    """For a causally routed decoder that is given a cache: what it carries has the budgets' sizes, which a dense start
    has not yet.

    Raises:
        ValueError: for a dense start.
    """
    if dense_start is not None:
        raise ValueError(
            "a cache is given during a dense start, which trains on whole sequences; pass none, or end it with "
            "set_dense_start(None)"
        )


def check_cache(cache: Cache | None, states: Tensor) -> None:
    """Check that a cache has a row for each of a decoder's: attention would spread a single row over all.

    Args:
        cache: the cache, of one stack or of both.
        states: the decoder's embeddings, [batch, m, d_model].

    Raises:
        ValueError: for another number of rows.
    """
    caches = [cache]
    if isinstance(cache, EncoderDecoderCache):
        caches = [cache.self_attention_cache, cache.cross_attention_cache]
    for part in caches:
        if part is None or not part.layers:
            continue
        layer = part.layers[0]
        # A causally routed layer keeps no keys, but counters.
        tensor = getattr(layer, "counters", {}).get("lengths")
        if tensor is None and layer.is_initialized:
            tensor = layer.keys
        if isinstance(tensor, Tensor) and tensor.shape[0] != states.shape[0]:
            raise ValueError(
                f"cache (or past_key_values) has {tensor.shape[0]} rows, and the new tokens have {states.shape[0]}; "
                "they must have as many. A cache goes on only with the rows that it was filled by"
            )


def check_memory(memory: Tensor, states: Tensor) -> Tensor:
    """The encoder's output as a decoder reads it: checked, and in the dtype of the decoder's states.

    Attention would spread a single row over all rows of the decoder.

    Args:
        memory: the encoder's output, floating point [batch, n, d_model].
        states: the decoder's embeddings, [batch, m, d_model].

    Returns:
        [batch, n, d_model].

    Raises:
        TypeError: for what is no floating point tensor.
        ValueError: for another width, other numbers of rows, or no row or no token.
    """
    name = "encoder_outputs' last_hidden_state (the decoder's encoder_hidden_states)"
    batch, _, d_model = states.shape
    check_states(name, memory, d_model)
    if memory.shape[0] != batch:
        raise ValueError(
            f"decoder_input_ids or decoder_inputs_embeds has {batch} rows, and {name} has {memory.shape[0]}; each "
            "document must have one row of both. To decode several texts of one document, repeat the document's: "
            "states.repeat_interleave(times, 0)"
        )
    return memory if memory.dtype == states.dtype else memory.to(states.dtype)


def check_document(memory: Tensor, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
    """Check a document that comes with its encoder's output [batch, n, d_model], which is used instead: they must be
    of one shape.

    Raises:
        ValueError: for another shape.
    """
    for name, document in (("input_ids", input_ids), ("inputs_embeds", inputs_embeds)):
        if document is not None and document.shape[:2] != memory.shape[:2]:
            wanted = f"that of encoder_outputs, here {tuple(memory.shape[:2])}, or be left out"
            raise _shape_error(name, document, wanted)


def check_label_type(name: str, labels: Any) -> None:
    """Check that labels which number classes, tokens or places are int64, the one type that all losses take.

    Raises:
        TypeError: for others.
    """
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise _type_error(name, labels, "int64")


def check_labels(name: str, labels: Tensor, logits: Tensor, dims: int) -> None:
    """Check that there is a label for each token or row: a loss takes any labels of as many entries.

    Args:
        name: the argument.
        labels: of tokens [batch, n], of rows [batch] or [batch, 1].
        logits: [batch, n, ...] or [batch, ...].
        dims: 2 for labels of tokens, 1 for labels of rows.

    Raises:
        TypeError: for labels of another type.
        ValueError: for labels of another shape.
    """
    check_label_type(name, labels)
    _check_label_shape(name, labels, logits, dims)


def _check_label_shape(name: str, labels: Tensor, logits: Tensor, dims: int) -> None:
    shape = logits.shape[:dims]
    if labels.shape != shape and not (dims == 1 and labels.shape == (*shape, 1)):
        meaning = "[batch]" if dims == 1 else "[batch, tokens with logits]"
        raise _shape_error(name, labels, f"{meaning}, here {tuple(shape)}")


def leave_out_padding(positions: Tensor, mask: Tensor) -> Tensor:
    """Positions int64 [batch] or [batch, 1] as [batch]; those that the mask, bool [batch, n], has as padding become n,
    which is beyond the input."""
    n = mask.shape[1]
    positions = positions.reshape(-1).to(mask.device)
    is_real = mask.gather(1, positions.clamp(0, n - 1)[:, None])[:, 0]
    return torch.where(is_real, positions, n)


PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


def check_class_labels(labels: Tensor, logits: Tensor, problem_type: str | None) -> None:
    """Check the labels of whole rows against logits [batch, num_labels], by the rules of Transformers' loss.

    Without a problem type the loss goes by the labels' type and keeps what it found in the configuration, so that
    labels of a wrong type would decide over all that follow.

    Args:
        labels: [batch] or [batch, 1] for one class or number a row, [batch, num_labels] for several.
        logits: [batch, num_labels].
        problem_type: the configuration's.

    Raises:
        TypeError: for labels of another type.
        ValueError: for labels of another shape: a squared error would spread them over all logits; and for a problem
            type that there is not, with which Transformers' loss has no value.
    """
    if problem_type not in (None, *PROBLEM_TYPES):
        raise ValueError(
            f"problem_type of the configuration is {problem_type!r}; it must be one of {', '.join(PROBLEM_TYPES)}, or "
            "None to go by the labels' type"
        )
    num_labels = logits.shape[-1]
    is_tensor = isinstance(labels, Tensor)
    if problem_type is None and num_labels > 1:
        if not is_tensor or not (labels.is_floating_point() or labels.dtype == torch.int64):
            wanted = "int64 [batch] for one class a row, or floating point [batch, num_labels] for several"
            raise _type_error("labels", labels, wanted)
        problem_type = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
    if problem_type == "single_label_classification":
        check_labels("labels", labels, logits, 1)
        return
    if not is_tensor or (problem_type == "multi_label_classification" and not labels.is_floating_point()):
        raise _type_error("labels", labels, "floating point [batch, num_labels]")
    if problem_type != "multi_label_classification" and num_labels == 1:
        _check_label_shape("labels", labels, logits, 1)
    elif labels.shape != logits.shape:
        raise _shape_error("labels", labels, f"[batch, num_labels], here {tuple(logits.shape)}")
