"""The decoder: T5's or causally routed, with an encoder or without."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_causal_mask
from transformers.processing_utils import Unpack
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_colt5 import CoLT5Config
from .kernel_backend import Mode, is_hooked, product_dtype
from .layer_causal import RoutedStep
from .layer_decoder import StraightStep, goes_on, may_run_straight
from .layer_decoder_parts import DecoderPass, project_memory
from .layer_plain import PlainStack, is_plain_linear
from .layer_program import is_one_product
from .model_base import CoLT5Stack
from .model_decoder_layer import PLAIN, CoLT5DecoderBlock
from .model_from_config import (
    causal_settings,
    cross_routers,
    cross_settings,
    decoder_block,
    implementation,
    layer_norm,
    position_bias,
)
from .model_layers import bias_by_distance, causal_table, masked_bias
from .model_outputs import CoLT5DecoderOutput
from .op_attention import bias_of_sequence
from .op_routing import RoutedTokens
from .run_causal_cache import routed_layer
from .run_causal_plan import CausalPlan
from .run_growing_cache import let_grow
from .run_inputs import (
    ForwardFlags,
    check_cache,
    check_causal_mask,
    check_memory,
    check_no_dense_start,
    embed,
    padding_mask,
    read_arguments,
    refuse_jit_trace,
    warn_of_missing_attentions,
)
from .run_plan import DecoderPlan, kernels_attend
from .run_release import CACHE, cache_of_forward


class SelfAttentionInputs(NamedTuple):
    """What the self-attention of all layers takes in one pass.

    Args:
        position_bias: as `CoLT5DecoderBlock.forward` takes it.
        heavy_bias_table: fp32 [heads, 2 * max_distance + 1], of causally routed layers; None in others.
        mask, windows: as of `DecoderPlan`.
    """

    position_bias: torch.Tensor
    heavy_bias_table: torch.Tensor | None
    mask: torch.Tensor | None
    windows: CausalPlan | None


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
        if config.causal_attention == "full":
            self.relative_attention_bias = position_bias(config, config.num_heads, bidirectional=False)
        else:
            self.light_relative_attention_bias = position_bias(config, config.num_light_heads, bidirectional=False)
        if config.causal_attention == "routed":
            self.heavy_relative_attention_bias = position_bias(config, config.num_heavy_heads, bidirectional=False)
        self.block = nn.ModuleList(decoder_block(config) for _ in range(config.num_decoder_layers))
        self.plain = PlainStack()
        # Transformers' configurations take long to answer, for one token.
        self.has_encoder = config.is_encoder_decoder
        self.head_size = config.d_kv
        self.attends_to_all = config.causal_attention == "full"
        self.is_causally_routed = "routed" in (config.causal_attention, config.causal_feed_forward)
        self.prefix = "decoder_" if self.has_encoder else ""
        is_routed = self.has_encoder and config.routed_cross_key_values is not None
        # Tokens that ask choose in the layers' attention.
        self.asks = is_routed and config.asking_cross_routing
        self.is_cross_routed = is_routed and not self.asks
        self._no_split_modules = ["CoLT5DecoderBlock"]
        if self.is_cross_routed:
            self.cross_routing = cross_routers(config)
            self._no_split_modules.append("CoLT5CrossRouting")
        self.final_layer_norm = layer_norm(config)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.gradient_checkpointing = False
        self.dense_start: torch.Tensor | None = None
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
        **kwargs: Unpack[ForwardFlags],
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
            ValueError: for both or neither of ids and embeddings, no row or no token, no encoder output, another shape
                of anything, or a cache during a dense start of causally routed layers.
            TypeError: for a cache that does not fit a causally routed decoder, or one under both names.
        """
        cache = cache_of_forward(cache, past_key_values)
        refuse_jit_trace()
        flags = read_arguments(self, kwargs, attention_mask=attention_mask)
        warn_of_missing_attentions(self, flags)
        states = self.next_states(
            input_ids, inputs_embeds, attention_mask, encoder_hidden_states, encoder_attention_mask, cache, flags
        )
        if states is not None:
            return CoLT5DecoderOutput(last_hidden_state=states, **{CACHE: cache})
        hidden_states, memory, encoder_mask = self.begin(
            input_ids, inputs_embeds, encoder_hidden_states, encoder_attention_mask, cache
        )
        if use_cache and cache is None and self.progress is None:
            cache = DynamicCache(config=self.config)
            if memory is not None:
                cache = EncoderDecoderCache(cache, DynamicCache(config=self.config))
            let_grow(cache)
        self_cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        by_kernels = self.kernels_attend(hidden_states, attention_mask, memory, cache)
        to_itself = self.inputs_of_self_attention(hidden_states, attention_mask, self_cache, by_kernels)
        memories, encoder_mask, cross_routing = self.route_memory(memory, encoder_mask, cache)
        inputs = (to_itself, memories, encoder_mask, cache, by_kernels)
        hidden_states, asked = self.run_blocks(self.dropout(hidden_states), *inputs)
        return CoLT5DecoderOutput(
            last_hidden_state=self.end(hidden_states),
            **{CACHE: cache},
            cross_routing=(asked if self.asks else cross_routing)
            if flags.get("output_routing", self.config.output_routing)
            else None,
        )

    def begin(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        memory: torch.Tensor | None,
        memory_mask: torch.Tensor | None,
        cache: Cache | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The embeddings [batch, n, d_model]; and the encoder's output with its mask, bool [batch, encoder length].
        The arguments are those of `forward`, and so is what is raised."""
        hidden_states = embed(self, input_ids, inputs_embeds, self.prefix)
        mask = None
        if self.has_encoder:
            if memory is None:
                raise ValueError(
                    "encoder_hidden_states (of encoder_outputs the last_hidden_state) is None; the decoder needs the "
                    "encoder's output"
                )
            memory = check_memory(memory, hidden_states)
            mask = padding_mask("encoder attention_mask", memory_mask, memory)
        if cache is not None:
            check_no_dense_start(self.progress)
            check_cache(cache, hidden_states)
        return hidden_states, memory if self.has_encoder else None, mask

    def end(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The last norm, and dropout: [batch, n, d_model]."""
        hidden_states, _ = self.final_layer_norm(hidden_states, None, self.config.kernel_backend)
        return self.dropout(hidden_states)

    def next_states(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        memory: torch.Tensor | None,
        memory_mask: torch.Tensor | None,
        cache: Cache | None,
        flags: dict[str, Any],
    ) -> torch.Tensor | None:
        """The states [batch, 1, d_model] of one new token in each row, through layers that run as straight lines; None
        where they may not, and then nothing has changed.

        The arguments are those of `forward`. A call of the decoder takes the host as long as a few layers of a token,
        so models whose decoder `is_called_as_written` ask this first.
        """
        tokens, embedding = inputs_embeds if input_ids is None else input_ids, self.embed_tokens
        if tokens is None or tokens.dim() < 2 or tokens.shape[1] != 1 or not goes_on(cache):
            return None
        # The embedding's call may come a second time, in `forward`, so that nobody may look at it.
        if type(embedding) is not nn.Embedding or is_hooked(embedding) or not self.may_step_straight(flags):
            return None
        read = self.plain.read(self.block, PLAIN)
        if read is None:
            return None
        hidden_states, memory, memory_mask = self.begin(input_ids, inputs_embeds, memory, memory_mask, cache)
        if type(hidden_states) is not torch.Tensor:
            return None
        _, memory_mask, _ = self.route_memory(memory, memory_mask, cache)
        step = self.straight_step(self.dropout(hidden_states), read, attention_mask, memory_mask, cache)
        return None if step is None else self.end(step.run())

    @property
    def is_called_as_written(self) -> bool:
        """Whether a call of the decoder is no more than its forward: it has no hook, and its class and forward are
        ours."""
        return type(self) is CoLT5Decoder and CoLT5Decoder.forward is _FORWARD and not is_hooked(self)

    @property
    def progress(self) -> torch.Tensor | None:
        """fp32 [], how far a dense start of causally routed layers has come in this call; None for the budgets."""
        return self.dense_start if self.training and self.is_causally_routed else None

    def may_step_straight(self, flags: dict[str, Any]) -> bool:
        """Whether a call with one new token in each row may run as straight lines; blocks and cache are asked
        elsewhere."""
        # What the embedding gives is like its weight.
        like = self.embed_tokens.weight
        return (
            not self.asks
            and implementation(self.config).for_states(like).fuses_attention
            and may_run_straight(like, Mode.of_now(like))
            and not self.records_blocks(flags)
        )

    def straight_step(
        self,
        hidden_states: torch.Tensor,
        read: list[tuple[Any, tuple[torch.Tensor, ...]]],
        attention_mask: torch.Tensor | None,
        encoder_mask: torch.Tensor | None,
        cache: Cache | None,
    ) -> StraightStep | RoutedStep | None:
        """One new token in each row as straight lines, by what was `read` of the blocks; None where modules have to
        make it."""
        if self.attends_to_all:
            table = bias_by_distance(self.relative_attention_bias)
            return StraightStep.of(hidden_states, read, table, attention_mask, encoder_mask, cache)
        tables = [bias_by_distance(self.light_relative_attention_bias)]
        if self.config.causal_attention == "routed":
            tables.append(bias_by_distance(self.heavy_relative_attention_bias))
        settings = causal_settings(self.config)
        return RoutedStep.of(hidden_states, read, tuple(tables), settings, attention_mask, encoder_mask, cache)

    def run_blocks(
        self,
        hidden_states: torch.Tensor,
        to_itself: SelfAttentionInputs,
        memories: Sequence[torch.Tensor | None],
        encoder_mask: torch.Tensor | None,
        cache: Cache | None,
        by_kernels: bool,
    ) -> tuple[torch.Tensor, tuple[tuple[RoutedTokens, ...], ...]]:
        """All layers: the states [batch, n, d_model], and what each layer's tokens chose of the memory.

        Args:
            hidden_states: [batch, n, d_model].
            to_itself: what `inputs_of_self_attention` gave.
            memories, encoder_mask: what `route_memory` gave.
            cache: of the decoder.
            by_kernels: what `kernels_attend` said.
        """
        asking = cross_settings(self.config) if self.asks else None
        who = implementation(self.config).for_states(hidden_states)
        straight = None
        if self.attends_to_all and who.fuses_attention:
            straight = DecoderPass.of(hidden_states, Mode.of_now(hidden_states))
        projected = None if straight is None or cache is not None else self.projected_memory(straight, memories[0])
        masks = (to_itself.mask, to_itself.windows, encoder_mask)
        plan = DecoderPlan(who, *masks, asking, straight, projected, by_kernels)
        asked = []
        for layer_idx, (block, memory) in enumerate(zip(self.block, memories, strict=True)):
            # Gradient checkpointing hands gradients through arguments by position alone, and looks for the cache by
            # the release's name for it.
            inputs = (to_itself.position_bias, to_itself.heavy_bias_table, memory, plan, layer_idx)
            hidden_states, *_, tokens = block(hidden_states, *inputs, **{CACHE: cache})
            asked.append((tokens,))
        return hidden_states, tuple(asked)

    def projected_memory(self, straight: DecoderPass, memory: torch.Tensor | None) -> tuple[torch.Tensor, ...] | None:
        """The keys and values of a memory [batch, encoder length, d_model] for all layers, as `DecoderPlan` has them;
        None where each layer makes its own.

        In training the backward pass needs all of them in any case, and as one product they take the host less time.
        """
        if memory is None or self.asks or self.is_cross_routed or not torch.is_grad_enabled():
            return None
        # Here a block's own hooks have not run yet, which may bring its weights: a block with hooks is not plain.
        if self.plain.read(self.block, PLAIN) is None:
            return None
        blocks: Any = self.block
        # A block that is checkpointed is to compute them again, and its gradients go through its arguments alone, not
        # through the plan.
        if any(block.gradient_checkpointing for block in blocks):
            return None
        attentions = [block.layer[1].EncDecAttention for block in blocks]
        projections = [projection for attention in attentions for projection in (attention.k, attention.v)]
        # The projections are not among what was read above.
        if not all(map(is_plain_linear, projections)):
            return None
        weights = [projection.weight for projection in projections]
        results, d = sum(map(len, weights)), memory.shape[-1]
        if (
            not any(part.requires_grad for part in (memory, *weights))
            or any(weight.device != memory.device for weight in weights)
            or not {weight.dtype for weight in weights} <= straight.takes_matrices
            or not is_one_product(memory.numel() // d, results, d, memory.device)
        ):
            return None
        return project_memory(straight, memory, weights, attentions[0].d_kv)

    def kernels_attend(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        memory: torch.Tensor | None,
        cache: Cache | None,
    ) -> bool:
        """Whether kernels attend in this pass, as `DecoderPlan` has it; the arguments are those of `forward`."""
        # a ready mask may hold anything, and several routers choose other keys for each group of heads
        is_ready = attention_mask is not None and getattr(attention_mask, "ndim", None) != 2
        has_routers = self.is_cross_routed and self.cross_routing.num_routers > 1
        if not self.attends_to_all or cache is not None or is_ready or self.asks or has_routers:
            return False
        who, mode = implementation(self.config).for_states(hidden_states), Mode.of_now(hidden_states)
        memory_tokens = 0 if memory is None else memory.shape[1]
        return kernels_attend(who, mode, hidden_states, memory_tokens, self.head_size)

    def inputs_of_self_attention(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache | None, by_kernels: bool
    ) -> SelfAttentionInputs:
        """What self-attention takes in all layers; `by_kernels` is what `kernels_attend` said."""
        if self.attends_to_all:
            bias, mask = self.attention_to_all(hidden_states, attention_mask, cache, by_kernels)
            return SelfAttentionInputs(bias, None, mask, None)
        plan = self.windows_of(hidden_states, attention_mask, cache)
        bias, heavy_bias_table = plan.light_bias(bias_by_distance(self.light_relative_attention_bias)), None
        if self.config.causal_attention == "routed":
            heavy_bias_table = bias_by_distance(self.heavy_relative_attention_bias)
        return SelfAttentionInputs(bias, heavy_bias_table, None, plan)

    def attention_to_all(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache | None, by_kernels: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Position bias and mask of T5's self-attention, as the blocks and their plan take them; `by_kernels` is what
        `kernels_attend` said."""
        length = hidden_states.shape[1]
        past = cache.get_seq_length() if cache is not None else 0
        key_length = cache.get_mask_sizes(length, 0)[0] if cache is not None else length
        check_causal_mask(f"{self.prefix}attention_mask", attention_mask, hidden_states, past, key_length)
        table = bias_by_distance(self.relative_attention_bias)
        if by_kernels:
            real = None
            if attention_mask is not None:
                real = attention_mask.to(hidden_states.device, torch.bool).contiguous()
            return causal_table(table), real
        # The arguments go by position, because Transformers renamed the last one.
        mask = create_causal_mask(self.config, hidden_states, attention_mask, cache)
        position_bias = bias_of_sequence(table, length, key_length, past)
        if implementation(self.config).bias_holds_mask:
            dtype = product_dtype(hidden_states) or hidden_states.dtype
            return masked_bias(position_bias[None], mask, past, dtype), None
        return position_bias[None], mask

    def route_memory(
        self, memory: torch.Tensor | None, mask: torch.Tensor | None, cache: Cache | None
    ) -> tuple[Sequence[torch.Tensor | None], torch.Tensor | None, tuple[tuple[RoutedTokens, ...], ...] | None]:
        """What each layer's cross-attention reads of a memory [batch, n, d_model], and its mask; and what was routed.
        Nothing of either in a model without an encoder.

        Layers whose keys and values the cache has already read nothing: they get the memory as it is.
        """
        if memory is not None and self.is_cross_routed:
            settings, who = cross_settings(self.config), implementation(self.config)
            routers, needed = len(self.cross_routing.routers), len(self.block) * self.cross_routing.num_routers
            if routers != needed:
                raise ValueError(
                    f"cross_routing.routers has {routers} routers; it must have {needed} for the decoder's "
                    f"{len(self.block)} layers. Whoever takes layers out takes their routers out as well"
                )
            return self.cross_routing.memories_of_layers(memory, mask, cache, settings, who)
        if memory is not None and self.asks and cache is not None and mask is None:
            # A static cache may have more slots than the memory has tokens.
            mask = memory.new_ones(memory.shape[:2], dtype=torch.bool)
        return [memory] * len(self.block), mask, None

    def windows_of(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache | None
    ) -> CausalPlan:
        """Where the tokens stand in the windows of the causally routed layers, whose caches count them."""
        length = hidden_states.shape[1]
        first = routed_layer(cache, 0)
        if attention_mask is not None:
            seen = 0 if first is None else first.get_seq_length()
            check_causal_mask(f"{self.prefix}attention_mask", attention_mask, hidden_states, seen)
            attention_mask = attention_mask[:, -length:].to(torch.bool)
        past = None if first is None else first.past_lengths()
        settings = causal_settings(self.config)
        plan = CausalPlan.make(
            settings, implementation(self.config), hidden_states, attention_mask, past, self.progress
        )
        if first is not None:
            layers = [routed_layer(cache, layer_idx) for layer_idx in range(len(self.block))]
            plan.count_in(layers, attention_mask)
        return plan


_FORWARD = CoLT5Decoder.forward
_READ_FOR_A_TOKEN = (
    "input_ids", "inputs_embeds", "attention_mask", "encoder_hidden_states", "encoder_attention_mask", "cache",
)  # fmt: skip


def run_decoder(decoder: Any, flags: dict[str, Any], **inputs: Any) -> dict[str, Any]:
    """The fields of the output that a decoder gives, as far as they are not None. For one new token neither the
    decoder's call nor an output is made, which take the host as long as several layers.

    Args:
        decoder: a `CoLT5Decoder`, or what stands in its place.
        flags: what shall be returned, as of `forward`.
        inputs: other arguments of `forward`, by name, with the cache under `cache`.
    """
    if getattr(decoder, "is_called_as_written", False):
        states = decoder.next_states(*map(inputs.get, _READ_FOR_A_TOKEN), flags)
        if states is not None:
            return {"last_hidden_state": states, CACHE: inputs["cache"]}
    return dict(decoder(**inputs, return_dict=True, **flags))
