"""The fields of a CoLT5 model over pictures."""

from typing import TYPE_CHECKING, Any

import transformers
from huggingface_hub.dataclasses import strict
from transformers.utils import is_torchvision_available

from .configuration_colt5 import CoLT5BaseConfig, at_least, one_of

if TYPE_CHECKING:
    # This import never runs. A configuration is saved and loaded with the files that its text imports, and the file of
    # the models, which its map of Auto classes names, has to be among them.
    from .modeling_colt5_vision import CoLT5VisionModel  # noqa: F401

CLASSIFIER_POOLINGS = ("attention", "mean")


@strict
class CoLT5VisionConfig(CoLT5BaseConfig):
    """The configuration of a CoLT5 model over pictures; the defaults are the paper's base encoder.

    The tokens are square patches. A distance has two parts here, one in rows and one in columns. All fields of
    conditional layers are those of `CoLT5Config`, with the same rules.

    Args:
        patch_size: pixels of a patch's side. Pictures may have any size: the last patches are filled up with zeros.
        num_channels: of a picture.
        local_radius: patches to each side, of rows and of columns, that a patch's light attention sees.
        routed_feed_forward_fraction, routed_query_fraction, routed_key_value_fraction: shares of a picture's patches,
            without its padding, that are routed.
        relative_attention_num_buckets: of each dimension; each pair of buckets has a bias of its own.
        classifier_pooling: how image classification makes one state of all patches: "attention" of a learned query, or
            their "mean".

    Raises:
        StrictDataclassError: for a value of another type than declared, or one that breaks a rule.
    """

    model_type = "colt5_vision"
    dimensions = 2
    # Trainer does not collect these outputs at evaluation.
    keys_to_ignore_at_inference = ["routing", "patch_mask"]
    attribute_map = {"hidden_size": "d_model", "num_hidden_layers": "num_layers", "head_dim": "d_kv"}
    base_model_fsdp_plan = {"encoder.block.*": "free_full_weight", "encoder.final_layer_norm": "keep_full_weight"}

    patch_size: int = at_least(1, 16)
    num_channels: int = at_least(1, 3)
    local_radius: int = at_least(0, 3)
    classifier_pooling: str = one_of(CLASSIFIER_POOLINGS)

    def own_auto_map(self) -> dict[str, Any]:
        """The classes of this project that each Auto class gives for this configuration."""
        return {
            "AutoConfig": "configuration_colt5_vision.CoLT5VisionConfig",
            "AutoModel": "modeling_colt5_vision.CoLT5VisionModel",
            "AutoModelForImageClassification": "modeling_colt5_vision.CoLT5ForImageClassification",
        }

    def image_processor(self, **kwargs: Any) -> Any:
        """Transformers' own image processor for this model: ViLT's, which pads pictures of several sizes.

        It gives `pixel_values` and `pixel_mask`. Pictures keep their size, because the model is for small things in
        large pictures. Save it with its own `save_pretrained`; `AutoImageProcessor` loads it.

        Args:
            kwargs: the processor's arguments, in the place of these: pictures become RGB where the model has three
                channels, and numbers from 0 to 1 lose 0.5 and are divided by 0.5.
        """
        half = [0.5] * self.num_channels
        settings = {"do_resize": False, "do_convert_rgb": self.num_channels == 3}
        # only here is torchvision imported, where it is installed
        name = "ViltImageProcessor" if is_torchvision_available() else "ViltImageProcessorPil"
        return getattr(transformers, name)(**(settings | {"image_mean": half, "image_std": half} | kwargs))


CoLT5VisionConfig.register_for_auto_class()
