"""Warm start: a T5, mT5, umT5 or LongT5 model becomes a CoLT5 that computes the same wherever that is possible."""

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    LongT5ForConditionalGeneration,
    MT5ForConditionalGeneration,
    PreTrainedModel,
    T5ForConditionalGeneration,
    UMT5ForConditionalGeneration,
)
from transformers.utils import find_adapter_config_file

from .configuration_colt5 import CoLT5Config
from .model_layers import CoLT5Attention, CoLT5DenseActDense, relative_position_bucket
from .modeling_colt5 import CoLT5ForConditionalGeneration

# one batch of a text sample, as a tokenizer makes it: input_ids and attention_mask
Batch = dict[str, torch.Tensor]

SOURCES = (
    T5ForConditionalGeneration,
    MT5ForConditionalGeneration,
    UMT5ForConditionalGeneration,
    LongT5ForConditionalGeneration,
)
# how checkpoints name such a model, older ones of T5 too
_WHOLE = ("ForConditionalGeneration", "WithLMHeadModel")


def load_source(name: str) -> tuple[PreTrainedModel, list[str]]:
    """A model for `convert`, whole.

    Args:
        name: a folder or Hub id.

    Returns:
        The model, and the names of weights of the checkpoint that it has no place for.

    Raises:
        TypeError: for a checkpoint of a model without a decoder, or with another head than that for text.
        ValueError: for an adapter, or a checkpoint that lacks weights, which would be random ones.
        OSError: for a name that nothing is found under.
    """
    if find_adapter_config_file(name) is not None:
        raise ValueError(
            f"{name} holds an adapter; merge it into its model first (merge_and_unload of PEFT), and convert that"
        )
    config = AutoConfig.from_pretrained(name)
    kinds = {kind.config_class.model_type for kind in SOURCES}
    if config.model_type not in kinds:
        raise TypeError(f"{name} holds a model of the type {config.model_type}; it must be one of {', '.join(kinds)}")
    for architecture in config.architectures or ():
        if not architecture.endswith(_WHOLE):
            raise TypeError(
                f"{name} holds a {architecture}; a CoLT5 is made of an encoder-decoder with its head for text, a "
                "...ForConditionalGeneration: convert the checkpoint that this one was made of, and train that further"
            )
    source, report = AutoModelForSeq2SeqLM.from_pretrained(name, output_loading_info=True)
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{name} lacks {len(missing)} of the model's weights, such as {missing[0]}; they would be random. "
            "Is it a checkpoint of another kind of model, or one that was not copied whole?"
        )
    return source, sorted(report["unexpected_keys"])


# of the new model's layers, those that have a place for all of a source's weights
_KINDS_OF_LAYERS = {
    "routing": ("learned", "even", "random"),
    "causal_attention": ("full",),
    "causal_feed_forward": ("dense",),
}


def convert(
    source: PreTrainedModel,
    *,
    num_light_heads: int | None = None,
    num_heavy_heads: int | None = None,
    light_d_ff: int | None = None,
    heavy_d_ff: int | None = None,
    num_cross_key_value_heads: int | None = None,
    samples: Iterable[Batch] | None = None,
    **config_kwargs: Any,
) -> CoLT5ForConditionalGeneration:
    """A CoLT5 model with the weights of a T5 1.0, T5 1.1, mT5, umT5 or LongT5 model.

    With every budget at 1, a radius that covers the input and all cross-attention heads kept, a converted T5 is the
    same function. A converted LongT5 (local) is, at any length and with any other budgets, where that of the
    feed-forward is 1 and all its heads become light ones, which is the default for it. A transient-global LongT5 loses
    its global tokens. An umT5 has a table of biases in each layer, a CoLT5 one for all layers of a branch, which
    becomes their mean. `differences` lists what changed.

    Each branch has one table of biases for all layers, so that a head goes to the same branch in every layer. The
    heads that add most from near tokens become light ones, the units that matter most become light ones, and the
    others heavy ones; what the heavy branch has beyond them is new and starts with an output of zero. Routers are new.

    Args:
        source: the model to convert; it is not changed.
        num_light_heads: at most the source's heads; by default a quarter of them, for LongT5 all.
        num_heavy_heads: by default the rest, for LongT5 three quarters as many as the source has.
        light_d_ff: at most the source's; by default half of it.
        heavy_d_ff: by default four times the source's.
        num_cross_key_value_heads: by default all heads, as in the source; fewer are means of groups of neighbours,
            which changes the function.
        samples: batches of text, at least one; None to rank heads and units by the weights alone. Heads are ranked by
            the length of what each adds to a token's state from tokens within `local_radius`, summed over tokens and
            layers; without samples, and for LongT5 always, by the norm of the product of a head's value and output
            matrices times the share of attention that its biases alone would give to these tokens. Units are ranked
            by the sum of their absolute activations times the norm of their output weights; without samples by the
            product of the norms of their input and output weights.
        config_kwargs: other fields of the new configuration, which the source says nothing of.

    Raises:
        TypeError: for a source of another kind, or samples that are no batches.
        ValueError: for sizes that the source's heads or units do not fit into, fields that are the source's to say,
            kinds of layers that have no place for its weights, samples without a batch, or a source whose weights
            cannot be copied: quantised, on disk, with adapters on them, or such as a CoLT5 has no place for (a bias of
            the head, an embedding of the encoder's own).
    """
    if not isinstance(source, SOURCES):
        raise TypeError(
            f"source is a {type(source).__name__}; it must be one of {', '.join(kind.__name__ for kind in SOURCES)}"
        )
    _check_weights(source)
    for name, takes in _KINDS_OF_LAYERS.items():
        if config_kwargs.get(name, takes[0]) not in takes:
            raise ValueError(
                f"{name} is {config_kwargs[name]!r}; it must be {' or '.join(map(repr, takes))}: other layers have no "
                "place for the source's weights"
            )
    old = source.config
    is_long = isinstance(source, LongT5ForConditionalGeneration)
    heads, units = old.num_heads, old.d_ff
    if num_light_heads is None:
        num_light_heads = heads if is_long else math.ceil(heads / 4)
    if num_heavy_heads is None:
        num_heavy_heads = math.ceil(heads * 3 / 4) if is_long else max(1, heads - num_light_heads)
    light_d_ff = units // 2 if light_d_ff is None else light_d_ff
    heavy_d_ff = 4 * units if heavy_d_ff is None else heavy_d_ff
    if num_cross_key_value_heads is None:
        num_cross_key_value_heads = heads
    for name, light, heavy, given in (
        ("heads", num_light_heads, num_heavy_heads, heads),
        ("d_ff", light_d_ff, heavy_d_ff, units),
    ):
        if not light <= given <= light + heavy:
            raise ValueError(
                f"light and heavy {name} are {light} and {heavy}; the source's {given} must be at least the light "
                "ones and at most both together"
            )
    if is_long:
        config_kwargs.setdefault("local_radius", old.local_radius)
    fields = dict(
        vocab_size=source.shared.num_embeddings,
        d_model=old.d_model,
        d_kv=old.d_kv,
        d_ff=old.d_ff,
        # of a source with layers taken out, those that are left
        num_layers=len(source.encoder.block),
        num_decoder_layers=len(source.decoder.block),
        num_heads=heads,
        num_light_heads=num_light_heads,
        num_heavy_heads=num_heavy_heads,
        light_d_ff=light_d_ff,
        heavy_d_ff=heavy_d_ff,
        num_cross_key_value_heads=num_cross_key_value_heads,
        relative_attention_num_buckets=old.relative_attention_num_buckets,
        relative_attention_max_distance=old.relative_attention_max_distance,
        layer_norm_epsilon=old.layer_norm_epsilon,
        feed_forward_proj=_feed_forward_proj(old),
        tie_word_embeddings=torch.equal(source.lm_head.weight, source.shared.weight),
        # umT5 of older releases of Transformers scales without saying so, mT5 never does
        scale_decoder_outputs=getattr(
            old, "scale_decoder_outputs", old.model_type == "umt5" and old.tie_word_embeddings
        ),
        pad_token_id=old.pad_token_id,
        eos_token_id=old.eos_token_id,
        decoder_start_token_id=_start_token(source),
    )
    for name in fields.keys() & config_kwargs.keys():
        raise ValueError(f"{name} is given as {config_kwargs[name]!r}; it must be left out, as the source says it")
    config = CoLT5Config(**({"dropout_rate": old.dropout_rate} | fields | config_kwargs))
    model = CoLT5ForConditionalGeneration(config).to(source.dtype)
    added, importance = _measure(source, config, samples) if samples is not None else _read_off(source, config)
    with torch.no_grad():
        model.shared.weight.copy_(source.shared.weight)
        if not config.tie_word_embeddings:
            model.lm_head.weight.copy_(source.lm_head.weight)
        _convert_encoder(source.encoder, model, added, importance)
        _convert_decoder(source.decoder, model)
    if source.generation_config is not None:
        model.generation_config = _generation_config(source, config)
    return model.eval()


def differences(source: PreTrainedModel, model: CoLT5ForConditionalGeneration) -> list[str]:
    """In what a converted model computes something else than its source, a sentence for each; nothing where it is the
    same function.

    Args:
        source: what was converted.
        model: what `convert` made of it.
    """
    old, new = source.config, model.config
    is_long = isinstance(source, LongT5ForConditionalGeneration)
    found = []
    # what became heavy is for routed tokens alone; a heavy branch that is all new adds nothing yet
    budgets = {}
    if new.light_d_ff < old.d_ff:
        budgets["feed-forward's tokens"] = new.routed_feed_forward_fraction
    if new.num_light_heads < old.num_heads:
        budgets |= {"queries": new.routed_query_fraction, "keys and values": new.routed_key_value_fraction}
    below = [f"{fraction:.3g} of the {what}" for what, fraction in budgets.items() if fraction < 1]
    chosen = {"learned": "chosen by routers that are new", "even": "evenly spaced", "random": "drawn at random"}
    if below:
        found.append(f"The heavy branches take {', '.join(below)}, {chosen[new.routing]}.")
    if is_long:
        if old.encoder_attention_type == "transient-global":
            found.append("The global tokens of its attention are left out.")
        if new.num_light_heads < old.num_heads:
            found.append(
                f"{old.num_heads - new.num_light_heads} of {old.num_heads} heads see all routed tokens, not the "
                f"nearest {old.local_radius} to each side."
            )
        if new.local_radius != old.local_radius:
            found.append(f"Light heads see {new.local_radius} tokens to each side, where it has {old.local_radius}.")
    else:
        found.append(
            f"{new.num_light_heads} of {old.num_heads} heads see only the {new.local_radius} nearest tokens to each "
            "side."
        )
    if new.num_cross_key_value_heads < old.num_heads:
        found.append(
            f"Cross-attention's {old.num_heads} heads of keys and values are {new.num_cross_key_value_heads} means."
        )
    if new.routed_cross_key_values is not None:
        how = "which each token chooses itself" if new.asking_cross_routing else chosen[new.routing]
        most = new.routed_cross_key_values
        found.append(f"Cross-attention reads {most} tokens of the encoder's output at most, {how}.")
    if isinstance(source, UMT5ForConditionalGeneration):
        found.append("The layers' own tables of relative biases are their mean.")
    return found


def _check_weights(source: PreTrainedModel) -> None:
    """Refuse weights that a copy would make something else of.

    Raises:
        ValueError: naming one of them.
    """
    if getattr(source, "_hf_peft_config_loaded", False):
        raise ValueError("source has adapters on its weights, which would be lost; merge them into the weights first")
    for name, weight in source.named_parameters():
        if weight.is_meta:
            raise ValueError(f"source has {name} on disk or on the meta device; load it whole, without a device_map")
        if type(weight) is not torch.nn.Parameter or not weight.is_floating_point():
            raise ValueError(
                f"source has {name} as a {type(weight).__name__} of {weight.dtype}, where a plain floating-point "
                "parameter is needed; load it neither quantised nor sharded"
            )
    _check_places(source)


def _check_places(source: PreTrainedModel) -> None:
    """Refuse a source that computes with other weights than a model of its class and sizes has.

    Raises:
        ValueError: naming one of them.
    """
    kind = next(kind for kind in SOURCES if isinstance(source, kind))
    config = copy.deepcopy(source.config)
    config.vocab_size = source.shared.num_embeddings
    config.num_layers, config.num_decoder_layers = len(source.encoder.block), len(source.decoder.block)
    with torch.device("meta"):
        usual = dict(kind(config).named_parameters(remove_duplicate=False))
    given = dict(source.named_parameters(remove_duplicate=False))
    computed = set()
    for name in usual.keys() - given.keys():
        module_name, _, attribute = name.rpartition(".")
        try:
            weight = getattr(source.get_submodule(module_name), attribute)
        except AttributeError:
            raise ValueError(f"source has no {name}, which a {kind.__name__} of its sizes has") from None
        # a parametrisation or pruning computes it of parameters of the same module
        given[name] = weight
        computed.add(module_name)
    for name, weight in given.items():
        if name not in usual:
            if not any(name.startswith(f"{module}.") for module in computed):
                raise ValueError(
                    f"source has {name}, which a {kind.__name__} of its sizes does not have, and a CoLT5 has "
                    "no place for it; its outputs would be others"
                )
        elif weight.shape != usual[name].shape:
            raise ValueError(
                f"source has {name} of shape {list(weight.shape)}, where its other sizes ask for "
                f"{list(usual[name].shape)}"
            )
    for name in ("encoder", "decoder"):
        if not torch.equal(getattr(source, name).embed_tokens.weight, source.shared.weight):
            raise ValueError(
                f"source has a {name}.embed_tokens that is not equal to its shared embedding; encoder and decoder of "
                "a CoLT5 have one embedding"
            )


def _start_token(source: PreTrainedModel) -> int | None:
    """The token that decoding begins with: a source's own, or padding, as in T5, where it names none."""
    for settings in (source.config, source.generation_config):
        # a configuration that was made without one has no such field at all
        start = getattr(settings, "decoder_start_token_id", None)
        if start is not None:
            return start
    return source.config.pad_token_id


def _feed_forward_proj(old: Any) -> str:
    """The kind of feed-forward that a source computes. Its configuration may name another activation than
    `feed_forward_proj` does, and by "gated-gelu" means the tanh form."""
    if not old.is_gated_act:
        return old.dense_act_fn
    return "gated-" + {"gelu_new": "gelu", "gelu": "gelu_python"}.get(old.dense_act_fn, old.dense_act_fn)


def _generation_config(source: PreTrainedModel, config: CoLT5Config) -> GenerationConfig:
    """The source's settings of `generate`; ids that these lack are those of the new configuration."""
    settings = copy.deepcopy(source.generation_config)
    for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
        if getattr(settings, name) is None:
            setattr(settings, name, getattr(config, name))
    return settings


def _bias_tables(stack: Any) -> list[torch.Tensor]:
    """The relative biases of each layer of a stack, [buckets, heads]; umT5's layers have their own."""
    layers = [_self_attention(block.layer[0]) for block in stack.block]
    tables = [layer.relative_attention_bias.weight for layer in layers if layer.has_relative_attention_bias]
    return tables if len(tables) > 1 else tables * len(layers)


def _self_attention(layer: Any) -> Any:
    """The attention of a source's encoder layer, whatever its kind calls it."""
    names = ("SelfAttention", "LocalSelfAttention", "TransientGlobalSelfAttention")
    return next(getattr(layer, name) for name in names if hasattr(layer, name))


def _read_off(source: PreTrainedModel, config: CoLT5Config) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """How much each head adds from near tokens, [heads], and how much each unit of each layer matters, [d_ff], by the
    weights."""
    buckets, far = config.relative_attention_num_buckets, config.relative_attention_max_distance
    # a text in which the radius leaves most tokens out
    distance = torch.arange(-8 * config.local_radius - 8, 8 * config.local_radius + 9)
    added, importance = torch.zeros(config.num_heads), []
    for block, bias in zip(source.encoder.block, _bias_tables(source.encoder), strict=True):
        weights = bias.detach().cpu().float()[relative_position_bucket(distance, True, buckets, far)].softmax(0)
        share = weights[distance.abs() <= config.local_radius].sum(0)
        attention = _self_attention(block.layer[0])
        value = attention.v.weight.detach().float() * block.layer[0].layer_norm.weight.detach().float()
        output = attention.o.weight.detach().float()
        heads = output.unflatten(1, (config.num_heads, -1)).transpose(0, 1) @ value.unflatten(
            0, (config.num_heads, -1)
        )
        added += heads.flatten(1).norm(dim=1).cpu() * share
        dense = block.layer[1].DenseReluDense
        inputs = ("wi_0", "wi_1") if config.is_gated_act else ("wi",)
        norms = [getattr(dense, name).weight.detach().cpu().float().norm(dim=1) for name in inputs]
        importance.append(torch.stack(norms).prod(0) * dense.wo.weight.detach().cpu().float().norm(dim=0))
    return added, importance


def _measure(
    source: PreTrainedModel, config: CoLT5Config, samples: Iterable[Batch]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The same as `_read_off`, measured on a text sample."""
    added, importance = _read_off(source, config)
    # the weights of LongT5's folded attention are not by position; its heads keep their order by the weights
    with_heads = not isinstance(source, LongT5ForConditionalGeneration)
    if with_heads:
        added = torch.zeros_like(added)
    activity = [torch.zeros_like(layer) for layer in importance]
    values: list[torch.Tensor] = []

    def watch(layer: int, inputs: tuple[torch.Tensor, ...]) -> None:
        activity[layer] += inputs[0].detach().abs().float().flatten(0, -2).sum(0).cpu()

    hooks = [
        block.layer[1].DenseReluDense.wo.register_forward_pre_hook(lambda _, inputs, layer=layer: watch(layer, inputs))
        for layer, block in enumerate(source.encoder.block)
    ]
    if with_heads:
        hooks += [
            _self_attention(block.layer[0]).v.register_forward_hook(lambda _, inputs, output: values.append(output))
            for block in source.encoder.block
        ]
    # T5's encoder has a configuration of its own, which older releases of Transformers do not reach from the model's
    encoder = source.encoder
    implementation, training = encoder.config._attn_implementation, source.training
    source.eval()
    if with_heads:
        encoder.set_attn_implementation("eager")
    measured = False
    try:
        for batch in samples:
            if not isinstance(batch, Mapping):
                raise TypeError(
                    f"samples holds a {type(batch).__name__}; each must be a batch, as in "
                    "[tokenizer(text, return_tensors='pt')]"
                )
            measured = True
            values.clear()
            with torch.no_grad():
                output = encoder(**batch, output_attentions=with_heads)
            if with_heads:
                real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
                for block, weights, value in zip(encoder.block, output.attentions, values, strict=True):
                    matrix = _self_attention(block.layer[0]).o.weight.detach()
                    added += _added_from_near(weights, value, matrix, real, config.local_radius)
    finally:
        for hook in hooks:
            hook.remove()
        encoder.set_attn_implementation(implementation)
        source.train(training)
    if not measured:
        # all zeros would choose heads and units by their numbers
        raise ValueError(
            "samples has no batch (an iterator that was read before?); give some, or None for the weights"
        )
    for layer, block in enumerate(source.encoder.block):
        activity[layer] *= block.layer[1].DenseReluDense.wo.weight.detach().cpu().float().norm(dim=0)
    return added, activity


def _added_from_near(
    weights: torch.Tensor, value: torch.Tensor, output: torch.Tensor, real: torch.Tensor, radius: int
) -> torch.Tensor:
    """The lengths of what each head adds to the states of real tokens from within a radius, summed over them, [heads].

    Args:
        weights: of the attention, [batch, heads, n, n].
        value: [batch, n, heads * d_kv].
        output: the output matrix, [d_model, heads * d_kv].
        real: bool [batch, n].
        radius: in tokens.
    """
    heads = weights.shape[1]
    position = torch.arange(weights.shape[-1], device=weights.device)
    near = (position[:, None] - position).abs() <= radius
    states = (weights.float() * near) @ value.float().unflatten(-1, (heads, -1)).transpose(1, 2)
    parts = output.float().unflatten(1, (heads, -1)).transpose(0, 1)
    # ‖O s‖² = s (OᵀO) s, without a vector of d_model for each token and head
    squares = (states @ (parts.mT @ parts) * states).sum(-1).clamp(min=0)
    return (squares.sqrt() * real[:, None]).sum((0, 2)).cpu()


def _convert_encoder(
    source: Any, model: CoLT5ForConditionalGeneration, added: torch.Tensor, importance: list[torch.Tensor]
) -> None:
    config = model.config
    # a stack's submodules have no types that a checker knows
    encoder: Any = model.encoder
    order = added.argsort(descending=True, stable=True)
    light_heads, heavy_heads = order[: config.num_light_heads].sort()[0], order[config.num_light_heads :].sort()[0]
    bias = torch.stack(_bias_tables(source)).mean(0)
    encoder.light_relative_attention_bias.weight.copy_(bias[:, light_heads])
    encoder.heavy_relative_attention_bias.weight[:, : len(heavy_heads)] = bias[:, heavy_heads]
    for old, new, units in zip(source.block, encoder.block, importance, strict=True):
        attention, feed_forward = new.layer
        attention.layer_norm.weight.copy_(old.layer[0].layer_norm.weight)
        _copy_heads(_self_attention(old.layer[0]), attention.light_attention, light_heads)
        _copy_heads(_self_attention(old.layer[0]), attention.heavy_attention, heavy_heads)
        feed_forward.layer_norm.weight.copy_(old.layer[1].layer_norm.weight)
        ranked = units.argsort(descending=True, stable=True)
        dense = old.layer[1].DenseReluDense
        _copy_units(dense, feed_forward.light_feed_forward, ranked[: config.light_d_ff].sort()[0])
        _copy_units(dense, feed_forward.heavy_feed_forward, ranked[config.light_d_ff :].sort()[0])
    encoder.final_layer_norm.weight.copy_(source.final_layer_norm.weight)


def _copy_heads(source: Any, target: CoLT5Attention, heads: torch.Tensor) -> None:
    """The given heads come first; the target's others give zero."""
    d_kv = target.d_kv
    rows = (heads[:, None] * d_kv + torch.arange(d_kv)).flatten()
    for name in ("q", "k", "v"):
        getattr(target, name).weight[: len(rows)] = getattr(source, name).weight[rows]
    target.o.weight.zero_()
    target.o.weight[:, : len(rows)] = source.o.weight[:, rows]


def _copy_units(source: Any, target: CoLT5DenseActDense, units: torch.Tensor) -> None:
    """The given units come first; the target's others give zero."""
    for name in ("wi_0", "wi_1") if target.is_gated_act else ("wi",):
        getattr(target, name).weight[: len(units)] = getattr(source, name).weight[units]
    target.wo.weight.zero_()
    target.wo.weight[:, : len(units)] = source.wo.weight[:, units]


def _convert_decoder(source: Any, model: CoLT5ForConditionalGeneration) -> None:
    config = model.config
    decoder: Any = model.decoder
    decoder.relative_attention_bias.weight.copy_(torch.stack(_bias_tables(source)).mean(0))
    decoder.final_layer_norm.weight.copy_(source.final_layer_norm.weight)
    for old, new in zip(source.block, decoder.block, strict=True):
        for old_layer, new_layer in zip(old.layer, new.layer, strict=True):
            new_layer.layer_norm.weight.copy_(old_layer.layer_norm.weight)
        for name in ("q", "k", "v", "o"):
            weight = getattr(old.layer[0].SelfAttention, name).weight
            getattr(new.layer[0].SelfAttention, name).weight.copy_(weight)
            weight = getattr(old.layer[1].EncDecAttention, name).weight
            if name in ("k", "v"):
                groups = weight.unflatten(0, (config.num_cross_key_value_heads, -1, config.d_kv))
                weight = groups.mean(1).flatten(0, 1)
            getattr(new.layer[1].EncDecAttention, name).weight.copy_(weight)
        for name in ("wi_0", "wi_1", "wo") if config.is_gated_act else ("wi", "wo"):
            weight = getattr(old.layer[2].DenseReluDense, name).weight
            getattr(new.layer[2].DenseReluDense, name).weight.copy_(weight)
