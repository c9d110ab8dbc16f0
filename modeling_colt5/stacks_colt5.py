"""The two stacks, encoder and decoder, and what every CoLT5 model inherits: initialisation, loading, budgets."""

import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.masking_utils import create_causal_mask
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .call_inputs_colt5 import (
    check_cache,
    check_causal_mask,
    check_memory,
    embed,
    padding_mask,
    read_arguments,
    warn_of_missing_attentions,
)
from .causal_cache_colt5 import routed_layer
from .causal_layers_colt5 import CoLT5LayerCausalAttention, light_bias
from .causal_plan_colt5 import CausalPlan
from .checkpoints_colt5 import OWN_FILES, check_layers, code_file
from .configuration_colt5 import CoLT5Config, check_config
from .cross_routing_colt5 import CoLT5CrossRouting
from .decoder_layers_colt5 import CoLT5DecoderBlock
from .encoder_layers_colt5 import CoLT5EncoderBlock, CoLT5MergingLayerNorm
from .inference_graphs import replayed
from .kernel_backend import is_hooked, runs_eagerly, uses_triton
from .layers_colt5 import CoLT5Attention, CoLT5DenseActDense, CoLT5LayerNorm
from .outputs_colt5 import CoLT5DecoderOutput, CoLT5EncoderOutput
from .relative_position import CoLT5RelativePositionBias, bias_of_sequence
from .release_colt5 import CACHE, cache_of_forward
from .router_colt5 import CoLT5Router, RoutingPlan
from .routing import RoutedTokens


class CoLT5ClassificationHead(nn.Module):
    """T5's head for sequences: dense, tanh, projection to the labels."""

    def __init__(self, config: CoLT5Config):
        super().__init__()
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out_proj = nn.Linear(config.d_model, config.num_labels)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """[batch, d_model] → [batch, num_labels]."""
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(pooled)))))


def _refuse_tensor_parallelism(
    tp_plan: Any = None, tp_size: int | None = None, distributed_config: Any = None, **kwargs: Any
) -> None:
    asked = {"tp_plan": tp_plan, "tp_size": tp_size}
    for name, value in asked.items():
        inner = distributed_config.get(name) if isinstance(distributed_config, dict) else None
        given = value if value is not None else getattr(distributed_config, name, inner)
        # one process is no tensor parallelism
        if given is not None and given != 1:
            raise ValueError(
                f"{name} is {given!r}; it must be None, as CoLT5 has no plan for tensor parallelism and would stay "
                "whole on each device. FSDP2 shards it, and device_map spreads its layers"
            )


class CoLT5PreTrainedModel(PreTrainedModel):
    """What all CoLT5 models share: initialisation, loading, and the budgets of a loaded model."""

    config: CoLT5Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CoLT5EncoderBlock", "CoLT5DecoderBlock", "CoLT5CrossRouting"]
    _keep_in_fp32_modules = ["wo"]
    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_compile_fullgraph = True

    def __init__(self, config: CoLT5Config, *args: Any, **kwargs: Any):
        check_config(config)
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        config: Any = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Transformers' `from_pretrained`, which never begins with random layers.

        An Auto class gives the class that the checkpoint names for it: a class of a user's code, which needs
        `trust_remote_code=True`, and for `AutoModel` the encoder where there is no decoder.

        Raises:
            ValueError: where the checkpoint lacks a stack of the model, or holds one with layers of other kinds; where
                it names a class of a user's code and `trust_remote_code` is not True; for tensor parallelism.
        """
        _refuse_tensor_parallelism(**kwargs)
        # an Auto class always gives both, and nothing else tells its calls from others
        if isinstance(config, PreTrainedConfig) and "adapter_kwargs" in kwargs:
            saved_class = cls._saved_class(pretrained_model_name_or_path, config, **kwargs)
            if saved_class is not cls:
                kwargs |= {"config": config, "output_loading_info": output_loading_info}
                return saved_class.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, config=config, output_loading_info=True, **kwargs
        )
        new = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
        if any("router" in name and "decoder.block." not in name for name in new):
            # some of those that a dense start trains begin at random, whatever the checkpoint says of its own
            model.config.routers_trained = False
        # without a name there is no checkpoint, but a state dict that is as the caller wants it; and who ignores
        # weights of other sizes wants random ones in their place
        if pretrained_model_name_or_path is not None and not kwargs.get("ignore_mismatched_sizes"):
            missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
            check_layers(model, missing, unexpected, str(pretrained_model_name_or_path))
        return (model, info) if output_loading_info else model

    @classmethod
    def _saved_class(cls, where: Any, config: CoLT5Config, **kwargs: Any) -> Any:
        """The class that a checkpoint's configuration names for the Auto class that loads this one."""
        reference = (getattr(config, "auto_map", None) or {}).get(cls._auto_class)
        is_own = cls.__module__.rpartition(".")[2] in OWN_FILES
        if reference is None or not is_own or code_file(reference) in OWN_FILES:
            return cls._class_of_kind(config)
        if not kwargs.get("trust_remote_code"):
            raise ValueError(
                f"{where} names {reference} for {cls._auto_class}, a class of its own code and not {cls.__name__}; "
                "give trust_remote_code=True to run that code, or load it with the class itself"
            )
        return get_class_from_dynamic_module(reference, where, **kwargs)

    @classmethod
    def _class_of_kind(cls, config: CoLT5Config) -> Any:
        """The class that an Auto class gives for a configuration."""
        return cls

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """T5's initialisation; the standard deviations are times `initializer_factor`.

        embeddings 1; q (d_model · d_kv)^-½; k, v, wi, biases by distance, routers and heads d_model^-½;
        o (heads · d_kv)^-½; wo (hidden size)^-½; norms 1, biases 0. An untied lm_head starts as in T5 1.1's original
        code, d_model^-½, which gives the logits of T5 1.0 with its scaled and tied one.
        """
        factor = self.config.initializer_factor
        d_model = self.config.d_model**-0.5

        def normal(linear: nn.Linear, std: float) -> None:
            init.normal_(linear.weight, mean=0.0, std=factor * std)
            if linear.bias is not None:
                init.zeros_(linear.bias)

        if isinstance(module, CoLT5LayerNorm):
            init.constant_(module.weight, factor)
        elif isinstance(module, CoLT5RelativePositionBias):
            init.normal_(module.weight, mean=0.0, std=factor * d_model)
        elif isinstance(module, CoLT5Router):
            if hasattr(module, "weight"):
                init.normal_(module.weight, mean=0.0, std=factor * d_model)
        elif isinstance(module, CoLT5Attention):
            normal(module.q, d_model * self.config.d_kv**-0.5)
            normal(module.k, d_model)
            normal(module.v, d_model)
            normal(module.o, module.o.in_features**-0.5)
        elif isinstance(module, CoLT5DenseActDense):
            for name in ("wi_0", "wi_1") if self.config.is_gated_act else ("wi",):
                normal(getattr(module, name), d_model)
            normal(module.wo, module.wo.in_features**-0.5)
        elif isinstance(module, CoLT5LayerCausalAttention):
            if hasattr(module, "unrouted"):
                init.zeros_(module.unrouted)
        elif isinstance(module, CoLT5ClassificationHead):
            normal(module.dense, d_model)
            normal(module.out_proj, d_model)
        elif isinstance(module, CoLT5PreTrainedModel):
            for name in ("lm_head", "classifier", "qa_outputs"):
                if isinstance(getattr(module, name, None), nn.Linear):
                    normal(getattr(module, name), d_model)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=factor)

    def _initialize_weights(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        # Transformers takes a module of custom code that holds no parameter of its own for initialised, and would
        # leave the layers here to the generic initialisation; the second argument says that this is not such code
        super()._initialize_weights(module, False)

    def set_routing_budget(
        self,
        feed_forward: float | None = None,
        query: float | None = None,
        key_value: float | None = None,
        cross_key_values: int | None = None,
    ) -> None:
        """Change how many tokens a loaded model routes: quality against speed, without retraining.

        Args:
            feed_forward: new `routed_feed_forward_fraction`; None leaves it as it is.
            query: new `routed_query_fraction`.
            key_value: new `routed_key_value_fraction`.
            cross_key_values: new `routed_cross_key_values`.

        Raises:
            StrictDataclassError: for a fraction outside of (0, 1], or a number of tokens below 1; nothing is changed
                then.
            ValueError: for `cross_key_values` where the model's cross-attention has no routers.
        """
        if cross_key_values is not None and self.config.routed_cross_key_values is None:
            raise ValueError(
                f"cross_key_values is {cross_key_values}; it must be None where the configuration's "
                "routed_cross_key_values is, as the model then has no routers for its cross-attention"
            )
        budgets = {
            "routed_feed_forward_fraction": feed_forward,
            "routed_query_fraction": query,
            "routed_key_value_fraction": key_value,
            "routed_cross_key_values": cross_key_values,
        }
        given = {name: budget for name, budget in budgets.items() if budget is not None}
        type(self.config)(**given)
        for name, budget in given.items():
            setattr(self.config, name, budget)

    def set_dense_start(self, progress: float | None) -> None:
        """Train the routers of the encoder, and of the cross-attention, before they choose: see docs/routers.md.

        While the model is in training mode, every token takes the heavy branches, and its weight says how much of them
        it receives; routed cross-attention reads every token, times its weight. At progress 0 the weights are near 1
        and constant. From there to 1 they shrink until they sum to the configured budgets, and the routers have a
        gradient. In evaluation mode, and after None, routing is the paper's. Nothing of this is saved. `DenseStart` of
        dense_start.py calls it at every step of a training run.

        Args:
            progress: from 0 to 1, or None to end the dense start.

        Raises:
            ValueError: for a number outside of that, or a model without learned routers in an encoder.
        """
        parts = [module for module in self.modules() if isinstance(module, CoLT5Encoder | CoLT5CrossRouting)]
        if not any(isinstance(part, CoLT5Encoder) for part in parts) or self.config.routing != "learned":
            raise ValueError(
                f"{type(self).__name__} with routing={self.config.routing!r} has no learned routers in an encoder; "
                "a dense start needs them"
            )
        if progress is not None and not 0 <= progress <= 1:
            raise ValueError(f"progress is {progress}; it must be None, or a number from 0 to 1")
        for part in parts:
            device = next(part.parameters()).device
            if progress is None:
                part.dense_start = None
            elif part.dense_start is None or part.dense_start.device != device:
                part.dense_start = torch.tensor(float(progress), device=device)
            else:
                # in place, for whom a captured step reads it
                part.dense_start.fill_(progress)

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        """A batch of two short rows."""
        ids = torch.tensor([[7, 6, 3, 2, 1], [2, 3, 1, 0, 0]], device=self.device)
        inputs = {"input_ids": ids, "attention_mask": ids.ne(0).long()}
        return inputs | {"decoder_input_ids": ids} if self.config.is_encoder_decoder else inputs


def _refuse_jit_trace() -> None:
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise RuntimeError(
            "torch.jit.trace would keep its example's length, and with it how many tokens are routed; use "
            "torch.export.export, whose programs take any length, and for ONNX torch.onnx.export(..., dynamo=True)"
        )


def _heavy_attentions_too(forward: Callable) -> Callable:
    """`output_attentions` asks for the heavy branch's weights as well as the light branch's."""

    @wraps(forward)
    def wrapper(self: "CoLT5Encoder", *args: Any, **kwargs: Any) -> Any:
        asked = kwargs.get("output_attentions", self.config.output_attentions)
        return forward(self, *args, output_heavy_attentions=asked, **kwargs)

    return wrapper


class CoLT5Stack(CoLT5PreTrainedModel):
    """What encoder and decoder share: the embedding, which in a whole model is the one of all its stacks."""

    def __init__(self, config: CoLT5Config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)

    def share_embedding_with(self, model: Any) -> None:
        """Take the embedding `shared` of a whole model, and give that model whichever replaces it here."""
        # weak: a model that its own stacks held would stay in memory until Python looks for such circles
        self.__dict__["_model"] = weakref.ref(model)
        if self.embed_tokens is not model.shared:
            self.embed_tokens = model.shared

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        model = self.__dict__.get("_model", lambda: None)() if name == "embed_tokens" else None
        if model is not None and model.shared is not value:
            model.shared = value

    def __getstate__(self) -> dict[str, Any]:
        # a copy belongs to the copied model, which says so itself
        return {name: value for name, value in self.__dict__.items() if name != "_model"}


class CoLT5Encoder(CoLT5Stack):
    """The encoder: conditional layers over the whole input (Ainslie et al. 2023)."""

    _can_record_outputs = {
        "hidden_states": OutputRecorder(CoLT5EncoderBlock, index=0),
        "attentions": OutputRecorder(CoLT5EncoderBlock, index=1),
        "heavy_attentions": OutputRecorder(CoLT5EncoderBlock, index=2),
        "routing": OutputRecorder(CoLT5EncoderBlock, index=3),
    }

    def __init__(self, config: CoLT5Config):
        super().__init__(config)
        buckets, distance = config.relative_attention_num_buckets, config.relative_attention_max_distance
        self.light_relative_attention_bias = CoLT5RelativePositionBias(config.num_light_heads, buckets, distance, True)
        if config.routing != "none":
            self.heavy_relative_attention_bias = CoLT5RelativePositionBias(
                config.num_heavy_heads, buckets, distance, True
            )
        self.block = nn.ModuleList([CoLT5EncoderBlock(config, layer_idx) for layer_idx in range(config.num_layers)])
        self.final_layer_norm = CoLT5MergingLayerNorm(config)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.gradient_checkpointing = False
        self.has_looked_for_padding = False
        self.dense_start: torch.Tensor | None = None
        self.post_init()

    @merge_with_config_defaults
    @_heavy_attentions_too
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CoLT5EncoderOutput:
        """Encode a batch of documents.

        Args:
            input_ids: int64 [batch, n].
            attention_mask: [batch, n], 1 for real tokens, 0 for padding on either side; None where there is none.
            inputs_embeds: [batch, n, d_model], instead of `input_ids`.
            kwargs: `output_hidden_states`, `output_attentions`, `output_routing` and `return_dict`.

        Raises:
            ValueError: for both or neither of ids and embeddings, no row or no token, or another shape of anything.
        """
        _refuse_jit_trace()
        kwargs = read_arguments(self, kwargs, attention_mask=attention_mask)
        warn_of_missing_attentions(self, kwargs)
        hidden_states = self.dropout(embed(self, input_ids, inputs_embeds))
        if input_ids is not None and attention_mask is None:
            self.warn_of_padding(input_ids)
        mask = padding_mask("attention_mask", attention_mask, hidden_states)
        records_blocks = self.records_blocks(kwargs)
        if not records_blocks and self.replays(hidden_states):
            hidden_states = replayed(self, repr(vars(self.config)), self.run_blocks, hidden_states, mask)
        else:
            hidden_states = self.run_blocks(hidden_states, mask, records_blocks)
        return CoLT5EncoderOutput(last_hidden_state=self.dropout(hidden_states))

    def warn_of_padding(self, input_ids: torch.Tensor) -> None:
        """Transformers' warning of ids that look padded and come without a mask.

        To look is to wait for the device: on CUDA the first such call does, and none whose kernels are captured."""
        if input_ids.is_cuda:
            if self.has_looked_for_padding or not runs_eagerly() or torch.cuda.is_current_stream_capturing():
                return
            self.has_looked_for_padding = True
        self.warn_if_padding_and_no_attention_mask(input_ids, None)

    def records_blocks(self, flags: dict[str, Any]) -> bool:
        """Whether something of the layers is to be returned."""
        names = (f"output_{name}" for name in self._can_record_outputs)
        return any(flags.get(name, getattr(self.config, name, False)) for name in names)

    def replays(self, hidden_states: torch.Tensor) -> bool:
        """Whether this call may be a replayed graph: wanted, and fused."""
        config = self.config
        if self.training and self.dense_start is not None:
            return False
        return runs_eagerly() and config.use_cuda_graphs and uses_triton(hidden_states, config.kernel_backend)

    def run_blocks(
        self, hidden_states: torch.Tensor, mask: torch.Tensor | None, records_blocks: bool = False
    ) -> torch.Tensor:
        """All layers and the last norm: [batch, n, d_model] and a bool mask [batch, n] → [batch, n, d_model].

        `records_blocks` says that somebody reads what the blocks return.
        """
        plan = RoutingPlan.make(self.config, hidden_states, mask, self.dense_start if self.training else None)
        # for inference only: a block's output in parts is more to keep for its gradient or for checkpointing
        plan.merges_late = (
            not (records_blocks or torch.is_grad_enabled())
            and runs_eagerly()
            and not torch_module._has_any_global_hook()
            and not any(is_hooked(part) for block in self.block for part in (block, *block.layer))  # type: ignore[misc]
            and not is_hooked(self.final_layer_norm)
        )
        light_bias_table = self.light_relative_attention_bias()
        heavy_bias_table = None if self.config.routing == "none" else self.heavy_relative_attention_bias()
        try:
            for block in self.block:
                hidden_states = block(hidden_states, light_bias_table, heavy_bias_table, plan)[0]
        finally:
            # the recording of a CUDA graph that an error breaks off can end only with all of its streams joined
            plan.join()
        return self.final_layer_norm(hidden_states, None, plan.kernel_backend)[0]


class CoLT5Decoder(CoLT5Stack):
    """The decoder: T5's, with multi-query cross-attention to all of the encoder's output or to what was routed out of
    it, or causally routed; without an encoder a causal stack."""

    _can_record_outputs = {
        "hidden_states": OutputRecorder(CoLT5DecoderBlock, index=0),
        "attentions": OutputRecorder(CoLT5DecoderBlock, index=1),
        "cross_attentions": OutputRecorder(CoLT5DecoderBlock, index=2),
        "routing": OutputRecorder(CoLT5DecoderBlock, index=3),
    }

    def __init__(self, config: CoLT5Config):
        super().__init__(config)
        buckets, distance = config.relative_attention_num_buckets, config.relative_attention_max_distance
        if config.causal_attention == "full":
            self.relative_attention_bias = CoLT5RelativePositionBias(config.num_heads, buckets, distance, False)
        else:
            heads = {"light": config.num_light_heads}
            if config.causal_attention == "routed":
                heads["heavy"] = config.num_heavy_heads
            for branch, num_heads in heads.items():
                bias = CoLT5RelativePositionBias(num_heads, buckets, distance, False)
                setattr(self, f"{branch}_relative_attention_bias", bias)
        self.block = nn.ModuleList(
            [CoLT5DecoderBlock(config, layer_idx) for layer_idx in range(config.num_decoder_layers)]
        )
        self.is_cross_routed = config.is_encoder_decoder and config.routed_cross_key_values is not None
        if self.is_cross_routed:
            self.cross_routing = CoLT5CrossRouting(config)
        self.final_layer_norm = CoLT5LayerNorm(config)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CoLT5DecoderOutput:
        """Decode a batch.

        Args:
            input_ids: int64 [batch, n].
            attention_mask: [batch, past + n], 1 for real tokens. T5's decoder takes a ready 4D mask too, a causally
                routed one the last n columns alone.
            inputs_embeds: [batch, n, d_model], instead of `input_ids`.
            encoder_hidden_states: [batch, encoder length, d_model]; None in a model without an encoder.
            encoder_attention_mask: [batch, encoder length], 1 for real tokens.
            past_key_values, cache: the cache of earlier calls, under the name of Transformers up to 5.23 or from 5.24
                on.
            use_cache: whether to fill a cache.
            kwargs: `output_hidden_states`, `output_attentions`, `output_routing` and `return_dict`.

        Raises:
            ValueError: for both or neither of ids and embeddings, no row or no token, no encoder output, or another
                shape of anything.
            TypeError: for a cache that does not fit a causally routed decoder, or one under both names.
        """
        cache = cache_of_forward(cache, past_key_values)
        _refuse_jit_trace()
        kwargs = read_arguments(self, kwargs, attention_mask=attention_mask)
        warn_of_missing_attentions(self, kwargs)
        has_encoder = self.config.is_encoder_decoder
        prefix = "decoder_" if has_encoder else ""
        hidden_states = embed(self, input_ids, inputs_embeds, prefix)
        encoder_mask = None
        if has_encoder:
            if encoder_hidden_states is None:
                raise ValueError(
                    "encoder_hidden_states (of encoder_outputs the last_hidden_state) is None; the decoder needs the "
                    "encoder's output"
                )
            encoder_hidden_states = check_memory(encoder_hidden_states, hidden_states)
            encoder_mask = padding_mask("encoder attention_mask", encoder_attention_mask, encoder_hidden_states)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
            if has_encoder:
                cache = EncoderDecoderCache(cache, DynamicCache(config=self.config))
        check_cache(cache, hidden_states)
        self_cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache

        if self.config.causal_attention == "full":
            inputs = self._full_attention_inputs(hidden_states, attention_mask, self_cache, prefix)
        else:
            inputs = self._routed_inputs(hidden_states, attention_mask, self_cache, prefix)
        memories, encoder_mask, cross_routing = self.route_memory(encoder_hidden_states, encoder_mask, cache)
        hidden_states = self.dropout(hidden_states)
        for block, memory in zip(self.block, memories, strict=True):
            # by the release's name for it, which gradient checkpointing looks for
            hidden_states = block(hidden_states, *inputs, memory, encoder_mask, **{CACHE: cache})[0]
        hidden_states, _ = self.final_layer_norm(hidden_states)
        return CoLT5DecoderOutput(
            last_hidden_state=self.dropout(hidden_states),
            **{CACHE: cache},
            cross_routing=cross_routing if kwargs.get("output_routing", self.config.output_routing) else None,
        )

    def _full_attention_inputs(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache | None, prefix: str
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, CausalPlan | None]:
        """Position bias and mask of T5's self-attention, as the blocks take them."""
        length = hidden_states.shape[1]
        past = cache.get_seq_length() if cache is not None else 0
        key_length = cache.get_mask_sizes(length, 0)[0] if cache is not None else length
        check_causal_mask(f"{prefix}attention_mask", attention_mask, hidden_states, past, key_length)
        # by position: Transformers renamed the last one
        mask = create_causal_mask(self.config, hidden_states, attention_mask, cache)
        position_bias = bias_of_sequence(self.relative_attention_bias(), length, key_length, past)
        return position_bias[None], None, mask, None

    def route_memory(
        self, memory: torch.Tensor | None, mask: torch.Tensor | None, cache: Cache | None
    ) -> tuple[list[torch.Tensor | None], torch.Tensor | None, tuple[tuple[RoutedTokens, ...], ...] | None]:
        """What each layer's cross-attention reads of a memory [batch, n, d_model], and its mask; and what was routed.
        Nothing of either in a model without an encoder.

        Layers whose keys and values the cache has already read nothing: they get the memory as it is.
        """
        memories = [memory] * len(self.block)
        if memory is None or not self.is_cross_routed:
            return memories, mask, None
        is_updated = cache.is_updated if isinstance(cache, EncoderDecoderCache) else {}
        routing = None
        if not all(is_updated.get(layer_idx) for layer_idx in range(len(self.block))):
            memories, routing = self.cross_routing(memory, mask)
        # without padding all slots are used; a static cache may still be longer than they are
        if mask is not None or cache is not None:
            mask = self.cross_routing.used_slots(memory, mask)
        return memories, mask, routing

    def _routed_inputs(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache | None, prefix: str
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, CausalPlan | None]:
        """Biases and plan of the causally routed layers, as the blocks take them; the caches count the chunk."""
        length = hidden_states.shape[1]
        first = routed_layer(cache, 0)
        if attention_mask is not None:
            seen = 0 if first is None else first.get_seq_length()
            check_causal_mask(f"{prefix}attention_mask", attention_mask, hidden_states, seen)
            attention_mask = attention_mask[:, -length:].to(torch.bool)
        past = first.counters["lengths"].clone() if first is not None and first.has_state else None
        plan = CausalPlan.make(self.config, hidden_states, attention_mask, past)
        if first is not None:
            counters = plan.advance_counters(first.counters, attention_mask)
            for layer_idx in range(len(self.block)):
                layer = routed_layer(cache, layer_idx)
                layer.window = plan.settings.window
                layer.write("counters", counters)
                layer.count(length)
        light = light_bias(self.light_relative_attention_bias(), plan)
        heavy = self.heavy_relative_attention_bias() if self.config.causal_attention == "routed" else None
        return light, heavy, None, plan
