"""The encoder: conditional layers over the whole input."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers.processing_utils import Unpack
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_colt5 import CoLT5Config
from .kernel_backend import Mode
from .layer_encoder import StraightStack, encoder_plan
from .layer_plain import PlainStack, is_called_as_written
from .model_base import CoLT5Stack
from .model_encoder_layer import PLAIN, CoLT5EncoderBlock, branch_biases
from .model_from_config import add_branch_biases, encoder_block, encoder_settings, layer_norm
from .model_outputs import CoLT5EncoderOutput
from .run_inputs import (
    ForwardFlags,
    embed,
    padding_mask,
    read_arguments,
    refuse_jit_trace,
    warn_of_missing_attentions,
)
from .run_plan import EncoderPlan


def heavy_attentions_too(forward: Callable) -> Callable:
    """`output_attentions` asks for the heavy branch's weights as well as the light branch's."""

    @wraps(forward)
    def wrapper(self: "CoLT5Encoder", *args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("output_heavy_attentions", kwargs.get("output_attentions", self.config.output_attentions))
        return forward(self, *args, **kwargs)

    return wrapper


def first_layer(
    block: Any,
    hidden_states: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor | None],
    plan: EncoderPlan,
) -> StraightStack | None:
    """The first layer as a straight line without gradients, for others to be computed behind it; None where it is not
    plain, or somebody may see what goes from it to the next. Arguments are as of `run_layers`."""
    if plan.straight is None or plan.mode.keeps_gradients or not is_called_as_written(block, PLAIN):
        return None
    line = block.straight_line(hidden_states, *tables, plan)
    return None if line is None or line.records else StraightStack(line, hidden_states)


def run_layers(
    blocks: nn.ModuleList,
    plain: PlainStack,
    hidden_states: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor | None],
    plan: EncoderPlan,
) -> torch.Tensor:
    """All layers, [batch, n, d_model] → the same shape.

    Args:
        blocks: the layers.
        plain: what reads them all at once.
        hidden_states: what goes into the first.
        tables: what `branch_biases` gives.
        plan: of the pass.
    """
    rest = list(blocks)
    try:
        stack = first_layer(rest[0], hidden_states, tables, plan) if rest else None
        if stack is not None:
            # The device computes the first layer while the others are looked at.
            read = plain.read(blocks, PLAIN)
            rest = [] if read is not None and stack.add(read[1:]) else rest[1:]
            hidden_states = stack.states()
        for block in rest:
            hidden_states = block(hidden_states, *tables, plan)[0]
        return hidden_states
    finally:
        # The recording of a CUDA graph that an error breaks off can end only with all of its streams joined.
        plan.join()


class CoLT5Encoder(CoLT5Stack):
    """The encoder: conditional layers over the whole input (Ainslie et al. 2023)."""

    # of a stack, and a model collects those of its stacks: FSDP refuses names of modules that are not there
    _no_split_modules = ["CoLT5EncoderBlock"]

    _can_record_outputs = {
        "hidden_states": OutputRecorder(CoLT5EncoderBlock, index=0),
        "attentions": OutputRecorder(CoLT5EncoderBlock, index=1),
        "heavy_attentions": OutputRecorder(CoLT5EncoderBlock, index=2),
        "routing": OutputRecorder(CoLT5EncoderBlock, index=3),
    }

    def __init__(self, config: CoLT5Config):
        super().__init__(config)
        add_branch_biases(self, config)
        self.block = nn.ModuleList([encoder_block(config, layer_idx) for layer_idx in range(config.num_layers)])
        self.plain = PlainStack()
        self.final_layer_norm = layer_norm(config)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.gradient_checkpointing = False
        self.has_looked_for_padding = False
        self.dense_start: torch.Tensor | None = None
        self.post_init()

    @merge_with_config_defaults
    @heavy_attentions_too
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[ForwardFlags],
    ) -> CoLT5EncoderOutput:
        """Encode a batch of documents.

        Args:
            input_ids: int64 [batch, n].
            attention_mask: [batch, n], 1 for real tokens, 0 for padding on either side; None where there is none.
            inputs_embeds: [batch, n, d_model], instead of `input_ids`.
            kwargs: `output_hidden_states`, `output_attentions`, `output_heavy_attentions` (by default as
                `output_attentions`), `output_routing` and `return_dict`.

        Raises:
            ValueError: for both or neither of ids and embeddings, no row or no token, or another shape of anything.
        """
        refuse_jit_trace()
        flags = read_arguments(self, kwargs, attention_mask=attention_mask)
        warn_of_missing_attentions(self, flags)
        hidden_states = self.dropout(embed(self, input_ids, inputs_embeds))
        if input_ids is not None and attention_mask is None:
            self.warn_of_padding(input_ids)
        mask = padding_mask("attention_mask", attention_mask, hidden_states)
        hidden_states = self.run_blocks(hidden_states, mask, self.records_blocks(flags))
        return CoLT5EncoderOutput(last_hidden_state=self.dropout(hidden_states))

    def warn_of_padding(self, input_ids: torch.Tensor) -> None:
        """Transformers' warning of ids that look padded and come without a mask.

        To look waits for the device. On CUDA only the first such call looks, and none whose kernels are captured."""
        if input_ids.is_cuda:
            if self.has_looked_for_padding:
                return
            mode = Mode.of_now(input_ids)
            if not mode.is_eager or mode.is_captured:
                return
            self.has_looked_for_padding = True
        self.warn_if_padding_and_no_attention_mask(input_ids, None)

    def run_blocks(self, hidden_states: torch.Tensor, mask: torch.Tensor | None, records_blocks: bool) -> torch.Tensor:
        """All layers and the last norm: [batch, n, d_model] and a bool mask [batch, n] → [batch, n, d_model].

        `records_blocks` says that somebody reads what the blocks return.
        """
        dense_start = self.dense_start if self.training else None
        plan = encoder_plan(encoder_settings(self.config), hidden_states, mask, dense_start, records_blocks)
        hidden_states = run_layers(self.block, self.plain, hidden_states, branch_biases(self), plan)
        return self.final_layer_norm(hidden_states, None, plan.kernel_backend)[0]
