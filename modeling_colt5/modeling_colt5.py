"""The Hugging Face models of CoLT5: encoder–decoder, encoder, causal decoder, and the heads on them."""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.masking_utils import create_masks_for_generate
from transformers.processing_utils import Unpack
from transformers.utils import can_return_tuple

from .configuration_colt5 import CoLT5Config, check_config
from .model_base import CoLT5ClassificationHead, CoLT5PreTrainedModel, mean_of_real

# These imports, and three below, are for a saved copy of a user's code, which imports from this file what it imported
# from the package.
from .model_blocks import (  # noqa: F401
    CoLT5CausalConditionalAttention,
    CoLT5CausalConditionalFeedForward,
    CoLT5ConditionalAttention,
    CoLT5ConditionalBlock,
    CoLT5ConditionalCrossAttention,
    CoLT5ConditionalFeedForward,
)
from .model_decoder import CoLT5Decoder, run_decoder
from .model_embedding import CoLT5EmbeddingModel
from .model_encoder import CoLT5Encoder
from .model_outputs import (
    CoLT5CausalLMOutput,
    CoLT5EncoderOutput,
    CoLT5QuestionAnsweringOutput,
    CoLT5Seq2SeqLMOutput,
    CoLT5Seq2SeqModelOutput,
    CoLT5SequenceClassifierOutput,
    CoLT5TokenClassifierOutput,
    as_encoder_output,
)
from .model_router import set_dense_start  # noqa: F401
from .op_soft_topk import soft_topk  # noqa: F401
from .run_growing_cache import let_grow
from .run_inputs import (
    ForwardFlags,
    check_class_labels,
    check_document,
    check_label_type,
    check_labels,
    leave_out_padding,
    padding_mask,
    read_arguments,
)
from .run_plan import SoftTopK  # noqa: F401
from .run_release import CACHE, cache_of_forward, is_called_by_peft, model_arguments, one_cache

# This one is for saved models: they take along the files that this file imports, and need the tokenizer's.
from .tokenization_colt5 import CoLT5Tokenizer  # noqa: F401


def _with_encoder_decoder(config: CoLT5Config, is_encoder_decoder: bool) -> CoLT5Config:
    """The configuration as the model's class needs it; the caller's is never changed."""
    check_config(config)
    if config.is_encoder_decoder == is_encoder_decoder:
        return config
    config = copy.deepcopy(config)
    config.is_encoder_decoder = is_encoder_decoder
    return config


def _first_candidates(
    get_candidates: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    number: int,
    input_ids: torch.Tensor,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `get_candidates` of a generator of candidates gives for [batch, n]: ids [batch, n + candidates] and their
    logits [batch, candidates, vocabulary], if any; at most the first `number` candidates."""
    ids, logits = get_candidates(input_ids, **kwargs)
    return ids[:, : input_ids.shape[1] + number], None if logits is None else logits[:, :number]


class CoLT5GenerationMixin(GenerationMixin):
    """`generate`, with the masks of a causally routed decoder, which reads no mask of queries and keys."""

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Transformers' `generate`, which takes a cache under either of its names, `past_key_values` or `cache`.

        Raises:
            TypeError: for a cache under both names.
        """
        given = one_cache(kwargs.pop("cache", None), kwargs.pop("past_key_values", None))
        if given is not None:
            kwargs[CACHE] = given
        reach = self._tokens_to_take_back()
        if reach is not None and getattr(kwargs.get("generation_config"), "is_assistant", False):
            # Another model, which this one proposes tokens to, takes back those that it refuses.
            limits = {name: kwargs[name] for name in ("min_new_tokens", "max_new_tokens") if name in kwargs}
            kwargs |= {name: min(limit, reach) for name, limit in limits.items()}
        return super().generate(inputs, *args, **kwargs)

    def _tokens_to_take_back(self) -> int | None:
        """The most tokens that a cache can always take back; None for all."""
        return None if self.config.causal_attention == "full" else self.config.causal_window

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        # Refused candidates are taken back from the cache, so no more are tried at once than it can take back.
        generator, reach = super()._get_candidate_generator(*args, **kwargs), self._tokens_to_take_back()
        if reach is not None:
            generator.get_candidates = partial(_first_candidates, generator.get_candidates, reach)
        return generator

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Transformers' own, except that tokens which a filled cache already has are left out.

        Transformers leaves them out where it has a mask of all tokens. An encoder–decoder's `generate` makes no such
        mask, so it would read these tokens a second time. An assistant model starts again, with its cache, at each
        round of proposals, which Transformers does not call a first iteration.
        """
        cache = kwargs.get(CACHE)
        is_whole = self.config.is_encoder_decoder and kwargs.get("decoder_attention_mask") is None
        if is_whole and next_sequence_length is None and cache is not None:
            past = cache.get_seq_length()
            if 0 < past < input_ids.shape[1]:
                next_sequence_length = input_ids.shape[1] - past
        kwargs |= {"next_sequence_length": next_sequence_length, "is_first_iteration": is_first_iteration}
        # `generate` looks for the name `inputs_embeds` in this signature.
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        # Transformers hands the tokenizers on that it finds stop strings and candidates' tokens with.
        inputs.pop("tokenizer", None)
        inputs.pop("assistant_tokenizer", None)
        # PEFT's prompts and prefixes look for the cache under its older name, under every release
        if CACHE in inputs and is_called_by_peft():
            inputs["past_key_values"] = inputs.pop(CACHE)
        return inputs

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        # A dynamic cache that Transformers makes here, because the call brings none, takes new tokens in place.
        prepare = super()._prepare_cache_for_generation
        given = model_arguments(prepare, *args, **kwargs) if self.config.causal_attention == "full" else None
        is_new = given is not None and given.get(CACHE) is None
        result = prepare(*args, **kwargs)
        if given is not None and is_new:
            let_grow(given.get(CACHE))
        return result

    def _reorder_cache(self, cache: Cache, beam_idx: torch.Tensor) -> Cache:
        # Transformers calls this for beams, which change places only among those of the same document.
        if isinstance(cache, EncoderDecoderCache) and not getattr(cache, "_is_user_defined", False):
            cache.self_attention_cache.reorder_cache(beam_idx)
        else:
            cache.reorder_cache(beam_idx)
        return cache

    @staticmethod
    def create_masks_for_generate(
        config: CoLT5Config, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Any
    ) -> Any:
        """A compiled step's mask: Transformers' own, or for a routed decoder the new tokens' part of the 2D mask."""
        if config.causal_attention == "full":
            return create_masks_for_generate(config, inputs_embeds, attention_mask, **kwargs)
        if attention_mask is None:
            return None
        # A view would have the strides of the whole mask, and a compiler would see another tensor at every token.
        return attention_mask[:, -inputs_embeds.shape[1] :].clone(memory_format=torch.contiguous_format)


class CoLT5Seq2SeqPreTrainedModel(CoLT5EmbeddingModel):
    """What the models with encoder and decoder share: both stacks, and a call that runs the encoder, then the
    decoder."""

    def __init__(self, config: CoLT5Config):
        super().__init__(_with_encoder_decoder(config, True))
        self.encoder = CoLT5Encoder(self.config)
        self.decoder = CoLT5Decoder(self.config)
        self.share_embedding()

    def _shift_right(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, m] shifted right behind the start token, with padding for -100; by T5's name, which T5's
        documentation uses.

        Raises:
            ValueError: where the config has no start or no padding token.
        """
        start, padding = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None or padding is None:
            raise ValueError(f"labels need decoder_start_token_id (is {start}) and pad_token_id (is {padding})")
        shifted = input_ids.roll(1, dims=-1)
        shifted[..., 0] = start
        return shifted.masked_fill(shifted == -100, padding)

    def run_stacks(
        self,
        input_ids: torch.LongTensor | None,
        attention_mask: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        decoder_input_ids: torch.Tensor | None,
        decoder_attention_mask: torch.Tensor | None,
        decoder_inputs_embeds: torch.Tensor | None,
        encoder_outputs: CoLT5EncoderOutput | Mapping | tuple | list | torch.Tensor | None,
        cache: Cache | None,
        use_cache: bool | None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Encode, unless `encoder_outputs` are given, and decode; the arguments are those of `forward`.

        Returns:
            The fields of `CoLT5Seq2SeqModelOutput`. No output object is made: at every new token that would take the
            host as long as a layer.
        """
        kwargs = read_arguments(
            self, kwargs, attention_mask=attention_mask, decoder_attention_mask=decoder_attention_mask
        )
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            raise ValueError(
                "neither of decoder_input_ids and decoder_inputs_embeds given; exactly one is needed. Trainer with "
                "label_smoothing_factor takes the labels away from the model: DataCollatorForSeq2Seq(tokenizer, "
                "model=model) makes decoder_input_ids of them. The encoder alone, for example for embeddings of "
                "texts, needs a folder of its own, with the tokenizer beside it: "
                f"AutoModelForTextEncoding.from_pretrained({self.name_or_path or 'FOLDER'!r}, trust_remote_code=True)"
                ".save_pretrained('encoder')"
            )
        if encoder_outputs is None:
            encoded = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                return_dict=True,
                **kwargs,
            )
        else:
            encoded = as_encoder_output(encoder_outputs)
            check_document(encoded.last_hidden_state, input_ids, inputs_embeds)
        decoded = run_decoder(
            self.decoder,
            kwargs,
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            inputs_embeds=decoder_inputs_embeds,
            encoder_hidden_states=encoded.last_hidden_state,
            encoder_attention_mask=attention_mask,
            cache=cache,
            use_cache=use_cache,
        )
        return {
            "last_hidden_state": decoded["last_hidden_state"],
            CACHE: decoded.get(CACHE),
            "decoder_hidden_states": decoded.get("hidden_states"),
            "decoder_attentions": decoded.get("attentions"),
            "cross_attentions": decoded.get("cross_attentions"),
            "encoder_last_hidden_state": encoded.last_hidden_state,
            "encoder_hidden_states": encoded.hidden_states,
            "encoder_attentions": encoded.attentions,
            "encoder_heavy_attentions": encoded.heavy_attentions,
            "encoder_routing": encoded.routing,
            "cross_routing": decoded.get("cross_routing"),
            "decoder_routing": decoded.get("routing"),
        }


class CoLT5Model(CoLT5Seq2SeqPreTrainedModel):
    """Encoder and decoder without a head."""

    _auto_class = "AutoModel"
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: CoLT5Config):
        super().__init__(config)
        self.post_init()

    @classmethod
    def _class_of_kind(cls, config: CoLT5Config) -> type[CoLT5PreTrainedModel]:
        return CoLT5EncoderModel if cls is CoLT5Model and not config.is_encoder_decoder else cls

    @classmethod
    def _from_config(cls, config: CoLT5Config, **kwargs: Any) -> CoLT5PreTrainedModel:
        # `AutoModel.from_config` calls this method.
        kind = cls._class_of_kind(config)
        return super()._from_config(config, **kwargs) if kind is cls else kind._from_config(config, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: CoLT5EncoderOutput | Mapping | tuple | list | torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[ForwardFlags],
    ) -> CoLT5Seq2SeqModelOutput:
        """Encode and decode.

        Args:
            input_ids: int64 [batch, n].
            attention_mask: [batch, n], 1 for real tokens, 0 for padding on either side.
            decoder_input_ids: int64 [batch, m].
            decoder_attention_mask: [batch, past + m], 1 for real tokens.
            encoder_outputs: the encoder's output, to skip encoding: as it is, a dictionary, a tuple or a list of its
                parts, or its last hidden state [batch, n, d_model] alone.
            past_key_values, cache: the decoder's cache, under the name of Transformers up to 5.23 or from 5.24 on.
            inputs_embeds, decoder_inputs_embeds: [batch, n or m, d_model], instead of ids.
            use_cache: whether to fill a cache.
            kwargs: `output_hidden_states`, `output_attentions`, `output_routing` and `return_dict`.
        """
        return CoLT5Seq2SeqModelOutput(
            **self.run_stacks(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                decoder_input_ids=decoder_input_ids,
                decoder_attention_mask=decoder_attention_mask,
                decoder_inputs_embeds=decoder_inputs_embeds,
                encoder_outputs=encoder_outputs,
                cache=cache_of_forward(cache, past_key_values),
                use_cache=use_cache,
                **kwargs,
            )
        )


class CoLT5ForConditionalGeneration(CoLT5Seq2SeqPreTrainedModel, CoLT5GenerationMixin):
    """Encoder and decoder with a language modelling head."""

    _auto_class = "AutoModelForSeq2SeqLM"

    def __init__(self, config: CoLT5Config):
        super().__init__(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: CoLT5EncoderOutput | Mapping | tuple | list | torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[ForwardFlags],
    ) -> CoLT5Seq2SeqLMOutput:
        """Encode, decode, and predict tokens.

        Args:
            input_ids: int64 [batch, n].
            attention_mask: [batch, n], 1 for real tokens, 0 for padding on either side.
            decoder_input_ids: int64 [batch, m]; where only `labels` are given, they are shifted right.
            decoder_attention_mask: [batch, past + m], 1 for real tokens.
            encoder_outputs: the encoder's output, to skip encoding: as it is, a dictionary, a tuple or a list of its
                parts, or its last hidden state [batch, n, d_model] alone.
            past_key_values, cache: the decoder's cache, under the name of Transformers up to 5.23 or from 5.24 on.
            inputs_embeds, decoder_inputs_embeds: [batch, n or m, d_model], instead of ids.
            labels: int64 [batch, m]; -100 is left out of the loss.
            use_cache: whether to fill a cache; by default as the configuration says, and not where there are labels.
            num_items_in_batch: what the summed loss is divided by: `Trainer`'s count of labels in all accumulated
                batches; None for the mean over this batch.
            kwargs: `output_hidden_states`, `output_attentions`, `output_routing` and `return_dict`.
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            check_label_type("labels", labels)
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = self.run_stacks(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_inputs_embeds=decoder_inputs_embeds,
            encoder_outputs=encoder_outputs,
            cache=cache_of_forward(cache, past_key_values),
            use_cache=False if use_cache is None and labels is not None else use_cache,
            **kwargs,
        )
        hidden_states = outputs.pop("last_hidden_state")
        if self.config.scale_decoder_outputs:
            hidden_states = hidden_states * self.config.d_model**-0.5
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            check_labels("labels", labels, logits, 2)
            # `self.loss_function` would shift the labels a second time.
            scores = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
            loss = fixed_cross_entropy(
                scores, labels.to(logits.device).flatten(), num_items_in_batch, ignore_index=-100
            )
        return CoLT5Seq2SeqLMOutput(loss=loss, logits=logits, **outputs)

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Transformers' `generate`, which takes `encoder_outputs` in each form that `forward` takes."""
        if kwargs.get("encoder_outputs") is not None:
            # This is a copy: for beams Transformers repeats the rows in place, and a second call with the same output
            # would get the repeated ones.
            kwargs["encoder_outputs"] = CoLT5EncoderOutput(**as_encoder_output(kwargs["encoder_outputs"]))
        # Trainer hands over whole batches, and Transformers would pass the labels on to the encoder.
        kwargs.pop("labels", None)
        return super().generate(inputs, *args, **kwargs)

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """The labels [batch, m] shifted right behind the start token, with padding for -100.

        Raises:
            ValueError: where the config has no start or no padding token.
        """
        return self._shift_right(labels)


class CoLT5ForCausalLM(CoLT5EmbeddingModel, CoLT5GenerationMixin):
    """A language model from the decoder alone, full or causally routed as the configuration's `causal_attention` and
    `causal_feed_forward` say; `num_decoder_layers` deep."""

    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: CoLT5Config):
        config = _with_encoder_decoder(config, False)
        if config.num_layers != config.num_decoder_layers:
            # Who asks this model's configuration for `num_hidden_layers` is to hear its depth.
            config = copy.deepcopy(config)
            config.num_layers = config.num_decoder_layers
        super().__init__(config)
        self.decoder = CoLT5Decoder(self.config)
        self.share_embedding()
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Unpack[ForwardFlags],
    ) -> CoLT5CausalLMOutput:
        """Predict each token's successor.

        Args:
            input_ids: int64 [batch, n].
            attention_mask: [batch, past + n], 1 for real tokens, 0 for padding on either side.
            past_key_values, cache: the cache of earlier calls, under the name of Transformers up to 5.23 or from 5.24
                on.
            inputs_embeds: [batch, n, d_model], instead of `input_ids`.
            labels: int64 [batch, n], the tokens themselves, shifted here; -100 is left out of the loss.
            use_cache: whether to fill a cache; by default as the configuration says, and not where there are labels.
            logits_to_keep: how many of the last tokens get logits, 0 for all; or their positions.
            kwargs: `num_items_in_batch`, `output_hidden_states`, `output_attentions`, `output_routing` and
                `return_dict`.
        """
        flags = read_arguments(self, kwargs, attention_mask=attention_mask)
        num_items_in_batch = flags.pop("num_items_in_batch", None)
        outputs = run_decoder(
            self.decoder,
            flags,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            cache=cache_of_forward(cache, past_key_values),
            use_cache=False if use_cache is None and labels is not None else use_cache,
        )
        hidden_states = outputs.pop("last_hidden_state")
        # The decoder's output has a place for these weights even where there is no cross-attention.
        outputs.pop("cross_attentions", None)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = hidden_states[:, kept]
        if self.config.scale_decoder_outputs:
            hidden_states = hidden_states * self.config.d_model**-0.5
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            check_labels("labels", labels, logits, 2)
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        return CoLT5CausalLMOutput(loss=loss, logits=logits, **outputs)


class CoLT5EncoderHeadModel(CoLT5EmbeddingModel):
    """What the models without a decoder share; they load an encoder–decoder's checkpoint without its decoder."""

    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^lm_head\."]

    def __init__(self, config: CoLT5Config):
        super().__init__(_with_encoder_decoder(config, False))
        self.encoder = CoLT5Encoder(self.config)
        self.share_embedding()

    def encode(
        self,
        input_ids: torch.LongTensor | None,
        attention_mask: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The encoder's output by name; the arguments are those of `CoLT5Encoder.forward`."""
        kwargs = read_arguments(self, kwargs, attention_mask=attention_mask)
        return dict(
            self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                return_dict=True,
                **kwargs,
            )
        )


class CoLT5EncoderModel(CoLT5EncoderHeadModel):
    """The encoder alone."""

    _auto_class = "AutoModelForTextEncoding"

    def __init__(self, config: CoLT5Config):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[ForwardFlags],
    ) -> CoLT5EncoderOutput:
        """Encode; the arguments are those of `CoLT5Encoder.forward`."""
        return CoLT5EncoderOutput(**self.encode(input_ids, attention_mask, inputs_embeds, **kwargs))


class CoLT5ForSequenceClassification(CoLT5EncoderHeadModel):
    """The encoder with a head for whole sequences: the mean of the real tokens' states, taken in fp32."""

    _auto_class = "AutoModelForSequenceClassification"
    # The losses of regression and of several labels do not take `num_items_in_batch`, so Trainer averages them.
    accepts_loss_kwargs = False

    def __init__(self, config: CoLT5Config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.classification_head = CoLT5ClassificationHead(
            config.d_model, config.num_labels, config.classifier_dropout
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[ForwardFlags],
    ) -> CoLT5SequenceClassifierOutput:
        """Classify. Takes `CoLT5Encoder.forward`'s arguments and `labels`: int64 [batch], or floats [batch] or
        [batch, num_labels] for regression and several labels. Gives logits [batch, num_labels]."""
        outputs = self.encode(input_ids, attention_mask, inputs_embeds, **kwargs)
        hidden_states = outputs.pop("last_hidden_state")
        mask = padding_mask("attention_mask", attention_mask, hidden_states)
        real = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool) if mask is None else mask
        logits = self.classification_head(mean_of_real(hidden_states, real))
        loss = None
        if labels is not None:
            check_class_labels(labels, logits, self.config.problem_type)
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return CoLT5SequenceClassifierOutput(loss=loss, logits=logits, **outputs)


class CoLT5ForTokenClassification(CoLT5EncoderHeadModel):
    """The encoder with a head for each token."""

    _auto_class = "AutoModelForTokenClassification"

    def __init__(self, config: CoLT5Config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.d_model, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[ForwardFlags],
    ) -> CoLT5TokenClassifierOutput:
        """Label tokens. Takes `CoLT5Encoder.forward`'s arguments, `labels`, int64 [batch, n] with -100 for tokens that
        are left out, and `num_items_in_batch`, see `CoLT5ForConditionalGeneration.forward`. Gives logits
        [batch, n, num_labels]."""
        outputs = self.encode(input_ids, attention_mask, inputs_embeds, **kwargs)
        logits = self.classifier(self.dropout(outputs.pop("last_hidden_state")))
        loss = None
        if labels is not None:
            check_labels("labels", labels, logits, 2)
            loss = self.loss_function(
                logits=logits, labels=labels, config=self.config, num_items_in_batch=num_items_in_batch
            )
        return CoLT5TokenClassifierOutput(loss=loss, logits=logits, **outputs)


class CoLT5ForQuestionAnswering(CoLT5EncoderHeadModel):
    """The encoder with a head for the first and the last token of an answer."""

    _auto_class = "AutoModelForQuestionAnswering"
    # Each question has one answer, so the losses of batches are simply averaged by Trainer.
    accepts_loss_kwargs = False

    def __init__(self, config: CoLT5Config):
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.d_model, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs: Unpack[ForwardFlags],
    ) -> CoLT5QuestionAnsweringOutput:
        """Find answers. Takes `CoLT5Encoder.forward`'s arguments, `start_positions` and `end_positions`, int64
        [batch]. Gives start and end logits [batch, n]; those of padding are the least number of their dtype. The loss
        leaves out answers that begin or end in padding or beyond the input."""
        outputs = self.encode(input_ids, attention_mask, inputs_embeds, **kwargs)
        hidden_states = outputs.pop("last_hidden_state")
        logits = self.qa_outputs(hidden_states)
        mask = padding_mask("attention_mask", attention_mask, hidden_states)
        if mask is not None:
            logits = logits.masked_fill(~mask[..., None], torch.finfo(logits.dtype).min)
        start_logits, end_logits = logits.unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            check_labels("start_positions", start_positions, start_logits, 1)
            check_labels("end_positions", end_positions, end_logits, 1)
            answer: list[torch.Tensor] = [start_positions, end_positions]
            if mask is not None:
                answer = [leave_out_padding(positions, mask) for positions in answer]
            loss = self.loss_function(start_logits, end_logits, *answer)
        return CoLT5QuestionAnsweringOutput(loss=loss, start_logits=start_logits, end_logits=end_logits, **outputs)
