"""The fields of a CoLT5 model, the rules they obey, and the table of the paper's sizes."""

import copy
import difflib
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.dynamic_module_utils import custom_object_save
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from .kernel_backend import KERNEL_BACKENDS
from .model_checkpoints import OWN_FILES, code_file, import_copies
from .run_causal_cache import LAYER_TYPE
from .run_release import CACHE_NAMES

if TYPE_CHECKING:
    # These imports never run. A configuration is saved and loaded with the files that its text imports, and the files
    # of the models, which its map of Auto classes names, have to be among them.
    from .modeling_colt5 import CoLT5Model  # noqa: F401

# the model types of this project, which a configuration of another one of them refuses
MODEL_TYPES = ("colt5", "colt5_vision")
ROUTINGS = ("learned", "random", "even", "none")
CAUSAL_ATTENTIONS = ("full", "local", "routed")
CAUSAL_FEED_FORWARDS = ("dense", "routed")
SOFT_TOPK_SOLVERS = ("exact", "coordinate_descent")

# The sizes are those of the table in Ainslie et al. 2023. A field that is not named here has CoLT5Config's default.
SIZES: dict[str, dict[str, int]] = {
    "base": {},
    "large": {
        "d_model": 1024,
        "d_ff": 2816,
        "num_layers": 24,
        "num_decoder_layers": 24,
        "num_heads": 16,
        "num_light_heads": 4,
        "num_heavy_heads": 12,
        "light_d_ff": 1408,
        "heavy_d_ff": 11264,
    },
    "xl": {
        "d_model": 2048,
        "d_ff": 5120,
        "num_layers": 24,
        "num_decoder_layers": 24,
        "num_heads": 32,
        "num_light_heads": 8,
        "num_heavy_heads": 24,
        "light_d_ff": 2560,
        "heavy_d_ff": 20480,
    },
}

# Every head travels with every model, so that any Auto class can load any checkpoint.
AUTO_MAP: dict[str, Any] = {
    "AutoConfig": "configuration_colt5.CoLT5Config",
    "AutoModel": "modeling_colt5.CoLT5Model",
    "AutoModelForSeq2SeqLM": "modeling_colt5.CoLT5ForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_colt5.CoLT5ForCausalLM",
    "AutoModelForTextEncoding": "modeling_colt5.CoLT5EncoderModel",
    "AutoModelForSequenceClassification": "modeling_colt5.CoLT5ForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_colt5.CoLT5ForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_colt5.CoLT5ForQuestionAnswering",
    "AutoTokenizer": ["tokenization_colt5.CoLT5Tokenizer", None],
}


# how alike an unknown field and a known one are for a slip: T5's, LongT5's and mT5's own fields stay below
_SLIP = 0.8


def _conversion_advice(model_type: str, name: str | None) -> str:
    """What to do with a model of a type that `convert` takes, with the name of its folder or repository where known;
    nothing for another type."""
    if model_type not in ("t5", "longt5"):
        return ""
    command = f"python examples/convert_t5.py {name or 'SOURCE'} FOLDER"
    return f". Convert it first: {command}, or in Python modeling_colt5.conversion.convert(model)"


def check_config(config: Any, class_name: str = "CoLT5Config") -> None:
    """Check that a model is made from a configuration of its class, or of one that derives from it.

    Raises:
        TypeError: for another one, or for a model.
    """
    # Classes are compared by name, because the package's class and that of a copy from the Hub are two objects.
    if not any(base.__name__ == class_name for base in type(config).__mro__):
        message = f"config is a {type(config).__name__}; it must be a {class_name}"
        if class_name == "CoLT5Config":
            model_type = getattr(getattr(config, "config", config), "model_type", "")
            message += _conversion_advice(model_type, getattr(config, "name_or_path", None))
        raise TypeError(message)


def _rule(default: Any, rule: str, holds: Callable[[Any], bool]) -> Any:
    """A field whose value, where it is not None, must be finite and obey the rule, at creation and at assignment."""

    def validate(value: Any) -> None:
        if value is None:
            return
        if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)) or not holds(value):
            raise ValueError(f"got {value!r}; it must be {rule}")

    return field(default=default, metadata={"validator": validate})


def at_least(minimum: int, default: int) -> Any:
    """A field for an integer of at least `minimum`."""
    return _rule(default, f"an integer of at least {minimum}", lambda value: value >= minimum)


def _positive(default: float) -> Any:
    return _rule(default, "a finite number above 0", lambda value: value > 0)


def _fraction(default: float) -> Any:
    return _rule(default, "a fraction above 0 and at most 1", lambda value: 0 < value <= 1)


def _dropout(default: float) -> Any:
    return _rule(default, "a probability of at least 0 and below 1", lambda value: 0 <= value < 1)


def one_of(choices: tuple[str, ...]) -> Any:
    """A field that is one of some names, by default the first."""
    return _rule(choices[0], f"one of {', '.join(map(repr, choices))}", lambda value: value in choices)


def _is_feed_forward(value: str) -> bool:
    return value.removeprefix("gated-") in ACT2FN


def is_gated(feed_forward_proj: str) -> bool:
    """Whether feed-forwards of this kind are gated."""
    return feed_forward_proj.startswith("gated-")


def activation_name(feed_forward_proj: str) -> str:
    """The activation's name in Transformers; T5's "gated-gelu" is the tanh form of GELU."""
    return "gelu_new" if feed_forward_proj == "gated-gelu" else feed_forward_proj.removeprefix("gated-")


@strict
class CoLT5BaseConfig(PreTrainedConfig):
    """What the configurations of all CoLT5 models share: the fields of conditional layers, and how they are saved.

    A field that a derived class declares again has that class's default. See `CoLT5Config` for what they mean.

    Attributes:
        dimensions: of the positions of tokens, 2 for pictures.
    """

    dimensions = 1

    d_model: int = at_least(1, 768)
    d_kv: int = at_least(1, 64)
    num_layers: int = at_least(1, 12)
    num_light_heads: int = at_least(1, 4)
    num_heavy_heads: int = at_least(1, 8)
    light_d_ff: int = at_least(1, 1024)
    heavy_d_ff: int = at_least(1, 8192)
    local_radius: int = at_least(0, 127)
    routed_feed_forward_fraction: float | int = _fraction(1 / 16)
    routed_query_fraction: float | int = _fraction(1 / 16)
    routed_key_value_fraction: float | int = _fraction(1 / 8)
    min_routed_tokens: int = at_least(1, 1)
    routing: str = one_of(ROUTINGS)
    routers_trained: bool = False
    soft_topk_ratio: float | int = _rule(9 / 8, "a finite number of at least 1", lambda value: value >= 1)
    routing_epsilon: float | int = _positive(1.0)
    soft_topk_solver: str = one_of(SOFT_TOPK_SOLVERS)
    num_soft_topk_iterations: int = at_least(1, 50)
    routing_epsilon_init: float | int | None = _rule(None, "None or a finite number above 0", lambda value: value > 0)
    routing_epsilon_decay: float | int = _fraction(1.0)
    relative_attention_num_buckets: int = at_least(4, 32)
    relative_attention_max_distance: int = at_least(2, 128)
    dropout_rate: float | int = _dropout(0.1)
    classifier_dropout: float | int = _dropout(0.0)
    layer_norm_epsilon: float = _positive(1e-6)
    initializer_factor: float | int = _positive(1.0)
    feed_forward_proj: str = _rule(
        "gated-gelu", "an activation of Transformers, such as 'relu', or 'gated-' and one", _is_feed_forward
    )
    kernel_backend: str = one_of(KERNEL_BACKENDS)
    output_routing: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Take what is no field: Transformers' own arguments, and attributes of the caller's.

        Raises:
            ValueError: for the fields of another type of model, such as a T5's.
        """
        model_type: str = kwargs.get("model_type") or self.model_type
        # A model type that Transformers does not know may be a configuration that derives from this one.
        is_other = model_type in CONFIG_MAPPING_NAMES or model_type in MODEL_TYPES
        if is_other and model_type not in [getattr(base, "model_type", "") for base in type(self).__mro__]:
            message = f"model_type is {model_type!r}; it must be {self.model_type!r}"
            if isinstance(self, CoLT5Config):
                message += _conversion_advice(model_type, kwargs.get("_name_or_path"))
            raise ValueError(message)
        super().__post_init__(**kwargs)

    def __setattr__(self, key: str, value: Any) -> None:
        self._warn_of_slip(key)
        super().__setattr__(key, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Transformers' `from_dict`, with a warning for misspelt fields, which would be left out."""
        if not kwargs.get("return_unused_kwargs"):
            for name in kwargs:
                cls._warn_of_slip(name)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def _warn_of_slip(cls, name: str) -> None:
        """Warn of a name that is not known, but close to one that is. Others are the caller's own affair."""
        if name.startswith("_") or hasattr(cls, name) or name in cls.attribute_map:
            return
        known = [part.name for part in fields(cls)] + list(cls.attribute_map)
        for nearest in difflib.get_close_matches(name, known, n=1, cutoff=_SLIP):
            warnings.warn(f"{cls.__name__} has no field {name}, and nothing reads it; is it {nearest}?", stacklevel=2)

    @property
    def is_gated_act(self) -> bool:
        """Whether the feed-forwards are gated."""
        return is_gated(self.feed_forward_proj)

    @property
    def dense_act_fn(self) -> str:
        """The activation's name in Transformers."""
        return activation_name(self.feed_forward_proj)

    def validate_architecture(self) -> None:
        """Check the rules between fields.

        Raises:
            ValueError: naming the fields, their values and the rule.
        """
        if self.num_labels < 1:
            raise ValueError(
                f"num_labels is {self.num_labels} and id2label {self.id2label}; there must be at least one label, "
                "and a name for each"
            )
        if self.relative_attention_num_buckets % 2 != 0:
            raise ValueError(
                f"relative_attention_num_buckets is {self.relative_attention_num_buckets}; it must be even, "
                "half for each direction"
            )
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 2:
            raise ValueError(
                f"relative_attention_max_distance is {self.relative_attention_max_distance}; it must be above half of "
                f"relative_attention_num_buckets, which is {self.relative_attention_num_buckets}"
            )
        if self.soft_topk_solver == "exact" and (
            self.routing_epsilon_init is not None or self.routing_epsilon_decay != 1
        ):
            raise ValueError(
                f"routing_epsilon_init is {self.routing_epsilon_init} and routing_epsilon_decay is "
                f"{self.routing_epsilon_decay}; they belong to soft_topk_solver 'coordinate_descent' and must be None "
                "and 1 with 'exact'"
            )
        if self.routing_epsilon_init is not None and self.routing_epsilon_init < self.routing_epsilon:
            raise ValueError(
                f"routing_epsilon_init is {self.routing_epsilon_init}; it must be at least routing_epsilon, which is "
                f"{self.routing_epsilon}"
            )

    def own_auto_map(self) -> dict[str, Any]:
        """The classes of this project that each Auto class gives for this configuration."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """All fields as they are saved, with the map of every Auto class to this code or to a user's."""
        # A model that came from a repository has that repository's name in its map; a saved copy must not point back
        # to it.
        return super().to_dict() | {"auto_map": self.own_auto_map() | self.users_classes()}

    def users_classes(self) -> dict[str, Any]:
        """The entries of the map of Auto classes that name classes of a user's code."""
        auto_map = getattr(self, "auto_map", None) or {}
        return {name: reference for name, reference in auto_map.items() if code_file(reference) not in OWN_FILES}

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Transformers' `save_pretrained`: the fields, and the code of every class that the map of Auto classes names.

        Args:
            save_directory: the folder, made where there is none.
            push_to_hub: whether to push it as well, to `repo_id`, or to a repository of the folder's name.
            kwargs: `repo_id` and other arguments of `push_to_hub`.
        """
        folder = Path(save_directory)
        for name, reference in self.users_classes().items():
            # A user's model saves its file before its configuration. Other maps are of the place that this one was
            # loaded from.
            if "--" not in str(reference) and not (folder / f"{code_file(reference)}.py").is_file():
                del self.auto_map[name]
        super().save_pretrained(folder)
        own = next(base for base in type(self).__mro__ if base.__module__.rpartition(".")[2] in OWN_FILES)
        if own is not type(self):
            # The saved files of a user's class import the files of this package.
            custom_object_save(own, folder)
        for reference in self.users_classes().values():
            if "--" not in str(reference):
                import_copies(folder, code_file(reference))
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)


@strict
class CoLT5Config(CoLT5BaseConfig):
    """The configuration of a CoLT5 model (Ainslie et al. 2023); the defaults are the paper's base size.

    T5's fields have T5's meaning, and `num_heads` and `d_ff` are the decoder's. Every field is checked at creation and
    at assignment; an impossible value is refused with an error that names field, value and rule.

    Args:
        num_light_heads: heads of the local attention that every encoder token goes through.
        num_heavy_heads: heads of the attention among routed tokens.
        light_d_ff: hidden size of the feed-forward that every encoder token goes through.
        heavy_d_ff: hidden size of the feed-forward for routed tokens.
        local_radius: positions to each side that a token's light attention sees.
        routed_feed_forward_fraction: share of a sequence's real tokens that go through the heavy feed-forward.
        routed_query_fraction: share of the real tokens that are queries of the heavy attention.
        routed_key_value_fraction: share of the real tokens that are keys and values of the heavy attention.
        min_routed_tokens: least number of tokens to route, as far as the sequence has so many.
        routing: how tokens are chosen. "learned" is the paper's; "random", "even" (evenly spaced, both with weights of
            1) and "none" (no heavy branch) are controls for ablations and have no routers.
        routers_trained: whether the routers have been through a dense start, or need none for another reason;
            `DenseStartCallback` sets it, and leaves such a model as it is.
        soft_topk_ratio: size of the soft top-k, divided by the number of routed tokens.
        routing_epsilon: the soft top-k's temperature, in units of the scores.
        soft_topk_solver: "exact", or "coordinate_descent" as in the paper.
        num_soft_topk_iterations: iterations of the coordinate descent.
        routing_epsilon_init: temperature that the coordinate descent starts with, None for `routing_epsilon`.
        routing_epsilon_decay: factor on the temperature after each iteration, down to `routing_epsilon`.
        num_cross_key_value_heads: key/value heads of the decoder's cross-attention; 1 is the paper's multi-query
            attention, `num_heads` is T5's.
        routed_cross_key_values: how many tokens of the encoder's output a router of the cross-attention chooses;
            all where there are no more. None is the paper's cross-attention, to every token.
        num_cross_routers: routers of a layer's routed cross-attention, each for a group of heads.
        asking_cross_routing: whether each token of the decoder chooses its own tokens of the encoder's output, by
            its queries and their keys, instead of one choice that all of them share. See docs/cross_routing.md.
        causal_attention: the decoder's self-attention. "full" is T5's, as in the paper; "local" is light attention
            that looks back; "routed" has a heavy branch beside it, see docs/causal_routing.md. The last two take
            heads, radius and fractions from the encoder's fields above.
        causal_feed_forward: the decoder's feed-forward: "dense" is T5's, as in the paper; "routed" has a light and a
            heavy branch, of the sizes above.
        causal_window: tokens of a window of the causal routing.
        causal_routed_keys: keys/values that a window's heavy attention reads, out of all windows before it.
        causal_capacity_ratio: the most queries, or tokens of the heavy feed-forward, that a window may route, divided
            by how many it is to route on average.
        num_causal_key_value_routers: routers of the causal heavy attention's keys/values, each for a group of heads.
        causal_unrouted_vector: whether tokens without a heavy part of the causal attention get a learned vector.
        feed_forward_proj: an activation of Transformers, with "gated-" before it for a gated feed-forward.
        scale_decoder_outputs: whether the decoder's output is scaled by d_model^-½ before the head (T5 1.0).
        kernel_backend: "auto" (Triton kernels on CUDA where triton is installed, PyTorch elsewhere), "triton" or
            "torch". The environment variable COLT5_KERNEL_BACKEND, where set at import, overrides it.
        output_routing: whether the models return which tokens they routed.

    Raises:
        StrictDataclassError: for a value of another type than declared, or one that breaks a rule.
    """

    model_type = "colt5"
    # Trainer does not collect these outputs at evaluation: a document's states are d_model numbers a token.
    keys_to_ignore_at_inference = [
        *CACHE_NAMES, "encoder_last_hidden_state",
        "encoder_routing", "decoder_routing", "cross_routing", "routing",
    ]  # fmt: skip
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    }
    base_model_fsdp_plan = {
        "shared": "free_full_weight",
        "encoder.block.*": "free_full_weight",
        "decoder.block.*": "free_full_weight",
        "encoder.final_layer_norm": "keep_full_weight",
        "decoder.final_layer_norm": "keep_full_weight",
    }

    vocab_size: int = at_least(1, 32128)
    d_ff: int = at_least(1, 2048)
    num_decoder_layers: int = at_least(1, 12)
    num_heads: int = at_least(1, 12)
    num_cross_key_value_heads: int = at_least(1, 1)
    routed_cross_key_values: int | None = _rule(None, "None or an integer of at least 1", lambda value: value >= 1)
    num_cross_routers: int = at_least(1, 1)
    asking_cross_routing: bool = False
    causal_attention: str = one_of(CAUSAL_ATTENTIONS)
    causal_feed_forward: str = one_of(CAUSAL_FEED_FORWARDS)
    causal_window: int = at_least(1, 256)
    causal_routed_keys: int = at_least(1, 512)
    causal_capacity_ratio: float | int = _rule(2.0, "a finite number of at least 1", lambda value: value >= 1)
    num_causal_key_value_routers: int = at_least(1, 1)
    causal_unrouted_vector: bool = False
    tie_word_embeddings: bool = False
    scale_decoder_outputs: bool = False
    is_encoder_decoder: bool = True
    is_decoder: bool = False
    use_cache: bool = True
    pad_token_id: int | None = 0
    # T5 has no such token. Transformers reads the field where padding comes without a mask.
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 1
    decoder_start_token_id: int | None = 0

    @classmethod
    def from_size(cls, size: str, **kwargs: Any) -> "CoLT5Config":
        """The configuration of one of the paper's sizes: "base" (433 M parameters), "large" (1463 M), "xl" (5297 M).

        Args:
            size: the name of the size.
            kwargs: fields that differ.

        Raises:
            ValueError: for a size of another name.
        """
        if size not in SIZES:
            raise ValueError(f"size is {size!r}; it must be one of {', '.join(map(repr, SIZES))}")
        return cls(**(SIZES[size] | kwargs))

    def validate_architecture(self) -> None:
        """Check the rules between fields.

        Raises:
            ValueError: naming the fields, their values and the rule.
        """
        super().validate_architecture()
        if self.num_heads % self.num_cross_key_value_heads != 0:
            raise ValueError(
                f"num_cross_key_value_heads is {self.num_cross_key_value_heads}; it must divide num_heads, "
                f"which is {self.num_heads}"
            )
        if self.num_heads % self.num_cross_routers != 0:
            raise ValueError(
                f"num_cross_routers is {self.num_cross_routers}; it must divide num_heads, which is {self.num_heads}"
            )
        if self.num_cross_key_value_heads % self.num_cross_routers and (
            self.num_cross_routers % self.num_cross_key_value_heads
        ):
            raise ValueError(
                f"num_cross_routers is {self.num_cross_routers}; it must divide num_cross_key_value_heads, which is "
                f"{self.num_cross_key_value_heads}, or be a multiple of it"
            )
        if self.routed_cross_key_values is not None and self.routing == "none":
            raise ValueError(
                f"routed_cross_key_values is {self.routed_cross_key_values} and routing is 'none'; it must be None "
                "where nothing is routed"
            )
        if self.asking_cross_routing and (
            self.routed_cross_key_values is None
            or self.routing != "learned"
            or (self.num_cross_routers, self.num_cross_key_value_heads) != (1, 1)
        ):
            raise ValueError(
                "asking_cross_routing is True; it must be False unless routed_cross_key_values, "
                f"which is {self.routed_cross_key_values}, is a number, routing, which is {self.routing!r}, is "
                f"'learned', and num_cross_routers and num_cross_key_value_heads, which are {self.num_cross_routers} "
                f"and {self.num_cross_key_value_heads}, are 1"
            )
        if self.num_heavy_heads % self.num_causal_key_value_routers != 0:
            raise ValueError(
                f"num_causal_key_value_routers is {self.num_causal_key_value_routers}; it must divide "
                f"num_heavy_heads, which is {self.num_heavy_heads}"
            )
        if self.causal_feed_forward == "routed" and self.causal_attention == "full":
            raise ValueError(
                "causal_feed_forward is 'routed' and causal_attention is 'full'; routed tokens need the windows of "
                "causal_attention 'local' or 'routed'"
            )
        if "routed" in (self.causal_attention, self.causal_feed_forward) and (
            self.routing != "learned" or self.soft_topk_solver != "exact"
        ):
            raise ValueError(
                f"routing is {self.routing!r} and soft_topk_solver is {self.soft_topk_solver!r}; causal routing needs "
                "'learned' and 'exact'"
            )
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
            value = getattr(self, name)
            for token_id in value if isinstance(value, list) else [value]:
                if token_id is not None and not 0 <= token_id < self.vocab_size:
                    raise ValueError(
                        f"{name} is {value}; it must be in the vocabulary, from 0 to {self.vocab_size - 1}"
                    )

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> "CoLT5Config":
        """This configuration, or for the decoder alone a copy with the decoder's depth, which sizes its caches."""
        # The inherited method would take the depth of the encoder, and rename every field that starts with "decoder".
        if not decoder or encoder:
            return self
        config = copy.copy(self)
        config.num_layers = self.num_decoder_layers
        if self.causal_attention != "full":
            # The layer types are set on this copy alone: Transformers refuses to make or save a configuration with a
            # layer type that it does not know.
            # The name is no field: compilers cannot follow the search for a field that was meant.
            object.__setattr__(config, "layer_types", [LAYER_TYPE] * self.num_decoder_layers)
        return config

    def own_auto_map(self) -> dict[str, Any]:
        """The classes of this project that each Auto class gives for this configuration."""
        auto_map = copy.deepcopy(AUTO_MAP)
        if not self.is_encoder_decoder:
            auto_map["AutoModel"] = auto_map["AutoModelForTextEncoding"]
        return auto_map


CoLT5Config.register_for_auto_class()
