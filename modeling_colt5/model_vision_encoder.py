"""The encoder of pictures: patches, and conditional layers over all of them."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.processing_utils import Unpack
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_colt5_vision import CoLT5VisionConfig
from .layer_encoder import encoder_plan
from .layer_plain import PlainStack
from .model_base import CoLT5PreTrainedModel
from .model_encoder import CoLT5Encoder, heavy_attentions_too, run_layers
from .model_encoder_layer import branch_biases
from .model_from_config import add_branch_biases, encoder_block, encoder_settings, layer_norm
from .model_initialisation import init_normal
from .model_outputs import CoLT5VisionOutput
from .model_vision_layer import CoLT5AttentionPooling, CoLT5PatchEmbedding
from .run_inputs import (
    ForwardFlags,
    check_pixels,
    pixel_mask_of,
    read_arguments,
    refuse_jit_trace,
    warn_of_missing_attentions,
)


class CoLT5VisionPreTrainedModel(CoLT5PreTrainedModel):
    """What all CoLT5 models over pictures share."""

    config: CoLT5VisionConfig
    config_name = "CoLT5VisionConfig"
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """T5's initialisation. Pixels of a standard deviation of 1 give patches the one of T5's embeddings, 1."""
        if isinstance(module, CoLT5PatchEmbedding):
            init_normal(module.projection, self.config.initializer_factor * module.projection.in_features**-0.5)
        elif isinstance(module, CoLT5AttentionPooling):
            # as a router's vector: with a size of 0, rates relative to a parameter's size would leave it there
            init.normal_(module.query, mean=0.0, std=self.config.initializer_factor * self.config.d_model**-0.5)
        else:
            super()._init_weights(module)

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        """A batch of two pictures of four patches."""
        side = 2 * self.config.patch_size
        return {"pixel_values": torch.zeros(2, self.config.num_channels, side, side, device=self.device)}


class CoLT5VisionEncoder(CoLT5VisionPreTrainedModel):
    """The encoder of pictures: conditional layers whose tokens are patches."""

    _can_record_outputs = CoLT5Encoder._can_record_outputs
    _no_split_modules = CoLT5Encoder._no_split_modules

    def __init__(self, config: CoLT5VisionConfig):
        super().__init__(config)
        self.patch_embedding = CoLT5PatchEmbedding(config.patch_size, config.num_channels, config.d_model)
        add_branch_biases(self, config)
        self.block = nn.ModuleList([encoder_block(config, layer_idx) for layer_idx in range(config.num_layers)])
        self.plain = PlainStack()
        self.final_layer_norm = layer_norm(config)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.gradient_checkpointing = False
        self.dense_start: torch.Tensor | None = None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The projection of patches: where Transformers lets gradients begin if all of it is frozen, as PEFT needs for
        re-entrant checkpointing."""
        # its output is one tensor, unlike that of the module around it
        return self.patch_embedding.projection

    @merge_with_config_defaults
    @heavy_attentions_too
    @capture_outputs
    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        **kwargs: Unpack[ForwardFlags],
    ) -> CoLT5VisionOutput:
        """Encode a batch of pictures.

        Args:
            pixel_values: floating point [batch, channels, height, width]. A size that is no multiple of the patch is
                filled up with zeros at the right and at the bottom.
            pixel_mask: [batch, height, width], 1 for real pixels, 0 for padding; None where there is none. What
                padding holds is never read.
            kwargs: `output_hidden_states`, `output_attentions`, `output_routing` and `return_dict`.

        Raises:
            TypeError: for pictures that are no floating point tensor, or a mask that is no tensor.
            ValueError: for another number of channels, an empty picture, or another shape of anything.
        """
        refuse_jit_trace()
        flags = read_arguments(self, kwargs)
        warn_of_missing_attentions(self, flags)
        check_pixels(pixel_values, self.config.num_channels)
        pixels = pixel_mask_of(pixel_mask, pixel_values)
        patches, mask = self.patch_embedding(pixel_values.to(self.dtype), pixels)
        # autocast takes the projection to another dtype, and sums of layers stay in the model's, as those of a text
        patches = patches.to(self.dtype)
        hidden_states = self.run_blocks(self.dropout(patches), mask, self.records_blocks(flags))
        if mask is None:
            mask = torch.ones(patches.shape[:3], dtype=torch.bool, device=patches.device)
        return CoLT5VisionOutput(last_hidden_state=self.dropout(hidden_states), patch_mask=mask)

    def run_blocks(self, patches: torch.Tensor, mask: torch.Tensor | None, records_blocks: bool) -> torch.Tensor:
        """All layers and the last norm: [batch, rows, columns, d_model] and a bool mask [batch, rows, columns] →
        [batch, rows * columns, d_model].

        `records_blocks` says that somebody reads what the blocks return.
        """
        settings, dense_start = encoder_settings(self.config), self.dense_start if self.training else None
        hidden_states, mask = patches.flatten(1, 2), None if mask is None else mask.flatten(1)
        plan = encoder_plan(settings, hidden_states, mask, dense_start, records_blocks, patches.shape[2])
        hidden_states = run_layers(self.block, self.plain, hidden_states, branch_biases(self), plan)
        return self.final_layer_norm(hidden_states, None, plan.kernel_backend)[0]
