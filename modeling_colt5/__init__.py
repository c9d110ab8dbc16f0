"""CoLT5 for Hugging Face Transformers: the public names, and their registration with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
    AutoTokenizer,
    ViltImageProcessorPil,
)
from transformers.utils import is_vision_available

from .configuration_colt5 import CoLT5Config
from .configuration_colt5_vision import CoLT5VisionConfig
from .model_base import CoLT5PreTrainedModel
from .model_blocks import (
    CoLT5CausalConditionalAttention,
    CoLT5CausalConditionalFeedForward,
    CoLT5ConditionalAttention,
    CoLT5ConditionalBlock,
    CoLT5ConditionalCrossAttention,
    CoLT5ConditionalFeedForward,
)
from .model_router import set_dense_start
from .model_vision_blocks import CoLT5ConditionalImageAttention
from .modeling_colt5 import (
    CoLT5EncoderModel,
    CoLT5ForCausalLM,
    CoLT5ForConditionalGeneration,
    CoLT5ForQuestionAnswering,
    CoLT5ForSequenceClassification,
    CoLT5ForTokenClassification,
    CoLT5Model,
)
from .modeling_colt5_vision import CoLT5ForImageClassification, CoLT5VisionModel
from .op_soft_topk import soft_topk
from .routing_view import show_routing
from .run_plan import SoftTopK
from .tokenization_colt5 import CoLT5Tokenizer

__version__ = "0.2.0"

__all__ = [
    "CoLT5CausalConditionalAttention",
    "CoLT5CausalConditionalFeedForward",
    "CoLT5ConditionalAttention",
    "CoLT5ConditionalBlock",
    "CoLT5ConditionalCrossAttention",
    "CoLT5ConditionalFeedForward",
    "CoLT5ConditionalImageAttention",
    "CoLT5Config",
    "CoLT5EncoderModel",
    "CoLT5ForCausalLM",
    "CoLT5ForConditionalGeneration",
    "CoLT5ForImageClassification",
    "CoLT5ForQuestionAnswering",
    "CoLT5ForSequenceClassification",
    "CoLT5ForTokenClassification",
    "CoLT5Model",
    "CoLT5PreTrainedModel",
    "CoLT5Tokenizer",
    "CoLT5VisionConfig",
    "CoLT5VisionModel",
    "SoftTopK",
    "set_dense_start",
    "show_routing",
    "soft_topk",
]

AutoConfig.register(CoLT5Config.model_type, CoLT5Config, exist_ok=True)
AutoConfig.register(CoLT5VisionConfig.model_type, CoLT5VisionConfig, exist_ok=True)
AutoTokenizer.register(CoLT5Config, tokenizer_class=CoLT5Tokenizer, exist_ok=True)
if is_vision_available() and not getattr(AutoImageProcessor, "is_dummy", False):
    # Without Pillow there are no pictures to process, and Transformers refuses to register a class for them; so does
    # its release 5.17 without torchvision, where this name is a stand-in.
    AutoImageProcessor.register(
        CoLT5VisionConfig, image_processor_classes={"pil": ViltImageProcessorPil}, exist_ok=True
    )
for _auto_class, _model_class in (
    (AutoModel, CoLT5Model),
    (AutoModelForSeq2SeqLM, CoLT5ForConditionalGeneration),
    (AutoModelForCausalLM, CoLT5ForCausalLM),
    (AutoModelForTextEncoding, CoLT5EncoderModel),
    (AutoModelForSequenceClassification, CoLT5ForSequenceClassification),
    (AutoModelForTokenClassification, CoLT5ForTokenClassification),
    (AutoModelForQuestionAnswering, CoLT5ForQuestionAnswering),
):
    _auto_class.register(CoLT5Config, _model_class, exist_ok=True)
AutoModel.register(CoLT5VisionConfig, CoLT5VisionModel, exist_ok=True)
AutoModelForImageClassification.register(CoLT5VisionConfig, CoLT5ForImageClassification, exist_ok=True)
