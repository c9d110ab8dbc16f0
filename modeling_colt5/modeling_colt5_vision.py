"""The Hugging Face models of CoLT5 over pictures: the encoder, and image classification."""

from typing import Any

import torch
from transformers.processing_utils import Unpack
from transformers.utils import can_return_tuple

# The imports that are not used are for a saved copy of a user's code, which imports from this file what it imported
# from the package.
from .configuration_colt5 import CoLT5Config  # noqa: F401
from .configuration_colt5_vision import CoLT5VisionConfig
from .model_base import CoLT5ClassificationHead, CoLT5PreTrainedModel, mean_of_real  # noqa: F401
from .model_blocks import (  # noqa: F401
    CoLT5CausalConditionalAttention,
    CoLT5CausalConditionalFeedForward,
    CoLT5ConditionalAttention,
    CoLT5ConditionalBlock,
    CoLT5ConditionalCrossAttention,
    CoLT5ConditionalFeedForward,
)
from .model_outputs import CoLT5ImageClassifierOutput, CoLT5VisionOutput
from .model_router import set_dense_start  # noqa: F401
from .model_vision_blocks import CoLT5ConditionalImageAttention  # noqa: F401
from .model_vision_encoder import CoLT5VisionEncoder, CoLT5VisionPreTrainedModel
from .model_vision_layer import CoLT5AttentionPooling
from .modeling_colt5 import (  # noqa: F401
    CoLT5EncoderModel,
    CoLT5ForCausalLM,
    CoLT5ForConditionalGeneration,
    CoLT5ForQuestionAnswering,
    CoLT5ForSequenceClassification,
    CoLT5ForTokenClassification,
    CoLT5Model,
)
from .op_soft_topk import soft_topk  # noqa: F401
from .run_inputs import ForwardFlags, check_class_labels, read_arguments
from .run_plan import SoftTopK  # noqa: F401
from .tokenization_colt5 import CoLT5Tokenizer  # noqa: F401


class CoLT5VisionHeadModel(CoLT5VisionPreTrainedModel):
    """What the models over pictures share: the encoder."""

    def __init__(self, config: CoLT5VisionConfig):
        super().__init__(config)
        self.encoder = CoLT5VisionEncoder(self.config)

    def get_input_embeddings(self) -> torch.nn.Module:
        """The projection of patches."""
        return self.encoder.get_input_embeddings()

    def encode(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None, **kwargs: Any) -> dict[str, Any]:
        """The encoder's output by name; the arguments are those of `CoLT5VisionEncoder.forward`."""
        kwargs = read_arguments(self, kwargs)
        return dict(self.encoder(pixel_values, pixel_mask, return_dict=True, **kwargs))


class CoLT5VisionModel(CoLT5VisionHeadModel):
    """The encoder of pictures."""

    _auto_class = "AutoModel"

    def __init__(self, config: CoLT5VisionConfig):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None = None, **kwargs: Unpack[ForwardFlags]
    ) -> CoLT5VisionOutput:
        """Encode; the arguments are those of `CoLT5VisionEncoder.forward`."""
        return CoLT5VisionOutput(**self.encode(pixel_values, pixel_mask, **kwargs))


class CoLT5ForImageClassification(CoLT5VisionHeadModel):
    """The encoder with a head for whole pictures: attention of a learned query to the real patches' states, or their
    mean (`classifier_pooling`), taken in fp32."""

    _auto_class = "AutoModelForImageClassification"
    # The losses of regression and of several labels do not take `num_items_in_batch`, so Trainer averages them.
    accepts_loss_kwargs = False

    def __init__(self, config: CoLT5VisionConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.attention_pooling = None
        if config.classifier_pooling == "attention":
            self.attention_pooling = CoLT5AttentionPooling(config.d_model)
        self.classification_head = CoLT5ClassificationHead(
            config.d_model, config.num_labels, config.classifier_dropout
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[ForwardFlags],
    ) -> CoLT5ImageClassifierOutput:
        """Classify. Takes `CoLT5VisionEncoder.forward`'s arguments and `labels`: int64 [batch], or floats [batch] or
        [batch, num_labels] for regression and several labels. Gives logits [batch, num_labels]."""
        outputs = self.encode(pixel_values, pixel_mask, **kwargs)
        hidden_states = outputs.pop("last_hidden_state")
        pool = mean_of_real if self.attention_pooling is None else self.attention_pooling
        logits = self.classification_head(pool(hidden_states, outputs["patch_mask"].flatten(1)))
        loss = None
        if labels is not None:
            check_class_labels(labels, logits, self.config.problem_type)
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return CoLT5ImageClassifierOutput(loss=loss, logits=logits, **outputs)
