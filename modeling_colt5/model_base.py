"""What every CoLT5 model and stack inherits: initialisation, loading, budgets, the dense start's switch."""

import weakref
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from .configuration_colt5 import CoLT5Config, check_config
from .model_checkpoints import OWN_FILES, check_layers, code_file
from .model_initialisation import init_layer, init_normal
from .model_layers import CoLT5RelativePositionBias
from .model_router import CoLT5Router, set_dense_start


def mean_of_real(hidden_states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The mean of each row's real states [batch, n, d_model] → [batch, d_model], taken in fp32.

    Args:
        hidden_states: [batch, n, d_model].
        real: bool [batch, n], True for real tokens.
    """
    wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    sums = wide.masked_fill(~real[..., None], 0.0).sum(1)
    return (sums / real.sum(1, keepdim=True).clamp(min=1)).to(hidden_states.dtype)


class CoLT5ClassificationHead(nn.Module):
    """T5's head for sequences: dense, tanh, projection to the labels."""

    def __init__(self, d_model: int, num_labels: int, dropout_rate: float = 0.0):
        super().__init__()
        self.dense = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout_rate)
        self.out_proj = nn.Linear(d_model, num_labels)

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
        # With one process there is no tensor parallelism.
        if given is not None and given != 1:
            raise ValueError(
                f"{name} is {given!r}; it must be None, as CoLT5 has no plan for tensor parallelism and would stay "
                "whole on each device. FSDP2 shards it, and device_map spreads its layers"
            )


class CoLT5PreTrainedModel(PreTrainedModel):
    """What all CoLT5 models share: initialisation, loading, and the budgets of a loaded model."""

    config: CoLT5Config
    # the class that a model's configuration is of, or derives from
    config_name = "CoLT5Config"
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules = ["wo"]
    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_compile_fullgraph = True

    def __init__(self, config: CoLT5Config, *args: Any, **kwargs: Any):
        check_config(config, self.config_name)
        super().__init__(config, *args, **kwargs)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # Transformers would look for the call of its interface in the class's own file, and that is in another one
        return True

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        config: Any = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Transformers' `from_pretrained`, which refuses a checkpoint without the model's stacks and kinds of layers.

        An Auto class gives the class that the checkpoint names for it. This may be a class of a user's code, which
        needs `trust_remote_code=True`. For `AutoModel` it is the encoder where there is no decoder.

        Raises:
            ValueError: where the checkpoint lacks a stack of the model, or holds one with layers of other kinds; where
                it names a class of a user's code and `trust_remote_code` is not True; for tensor parallelism.
        """
        _refuse_tensor_parallelism(**kwargs)
        # An Auto class always gives both arguments, and nothing else tells its calls from others.
        if isinstance(config, PreTrainedConfig) and "adapter_kwargs" in kwargs:
            saved_class = cls._saved_class(pretrained_model_name_or_path, config, **kwargs)
            if saved_class is not cls:
                kwargs |= {"config": config, "output_loading_info": output_loading_info}
                return saved_class.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, config=config, output_loading_info=True, **kwargs
        )
        new = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
        if any("router" in name for name in new):
            # Some are new and random, whatever the checkpoint says of its own.
            model.config.routers_trained = False
        # Without a name there is no checkpoint, but a state dict that is as the caller wants it. And a caller who
        # ignores weights of other sizes wants random ones in their place.
        if pretrained_model_name_or_path is not None and not kwargs.get("ignore_mismatched_sizes"):
            missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
            check_layers(model, missing, unexpected, str(pretrained_model_name_or_path))
        return (model, info) if output_loading_info else model

    @classmethod
    def _saved_class(cls, where: Any, config: CoLT5Config, **kwargs: Any) -> Any:
        """The class that a checkpoint's configuration names for the Auto class that loads this one."""
        reference = (getattr(config, "auto_map", None) or {}).get(cls._auto_class)
        # The Auto class keeps what a checkpoint's code gave it, also for the next checkpoint with the same code.
        is_of_a_checkpoint = cls.__module__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.")
        is_own = cls.__module__.rpartition(".")[2] in OWN_FILES
        is_registered_here = not (is_own or is_of_a_checkpoint)
        if reference is None or is_registered_here or (is_own and code_file(reference) in OWN_FILES):
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

        embeddings 1; heads d_model^-½; of layers what `init_layer` says; biases 0. An untied lm_head starts as in T5
        1.1's original code, d_model^-½, which gives the logits of T5 1.0 with its scaled and tied one.
        """
        factor = self.config.initializer_factor
        std = factor * self.config.d_model**-0.5
        if isinstance(module, CoLT5ClassificationHead):
            init_normal(module.dense, std)
            init_normal(module.out_proj, std)
        elif isinstance(module, CoLT5PreTrainedModel):
            for name in ("lm_head", "classifier", "qa_outputs"):
                if isinstance(getattr(module, name, None), nn.Linear):
                    init_normal(getattr(module, name), std)
        elif isinstance(module, nn.Embedding) and not isinstance(module, CoLT5RelativePositionBias):
            init.normal_(module.weight, mean=0.0, std=factor)
        else:
            init_layer(module, self.config.d_model, factor)

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
        causal_routed_keys: int | None = None,
    ) -> None:
        """Change how many tokens a loaded model routes: quality against speed, without retraining.

        Args:
            feed_forward: new `routed_feed_forward_fraction`; None leaves it as it is.
            query: new `routed_query_fraction`.
            key_value: new `routed_key_value_fraction`, of an encoder's layers.
            cross_key_values: new `routed_cross_key_values`.
            causal_routed_keys: new `causal_routed_keys`, of a causally routed decoder.

        Raises:
            StrictDataclassError: for a fraction outside of (0, 1], or a number of tokens below 1; nothing is changed
                then.
            ValueError: for a budget that no layer of the model has.
        """
        fields = {
            "feed_forward": ("routed_feed_forward_fraction", feed_forward),
            "query": ("routed_query_fraction", query),
            "key_value": ("routed_key_value_fraction", key_value),
            "cross_key_values": ("routed_cross_key_values", cross_key_values),
            "causal_routed_keys": ("causal_routed_keys", causal_routed_keys),
        }
        there = self._budgets()
        given = {}
        for argument, (name, budget) in fields.items():
            if budget is None:
                continue
            if name not in there:
                raise ValueError(
                    f"{argument} is {budget}; it must be None, as no layer of this {type(self).__name__} has a budget "
                    f"{name}; those that there are: {', '.join(sorted(there)) or 'none'}"
                )
            given[name] = budget
        type(self.config)(**given)
        for name, budget in given.items():
            setattr(self.config, name, budget)

    def _budgets(self) -> set[str]:
        """The fields of the configuration that say how many tokens the model's layers route."""
        config = self.config
        # by name: a model with code of the Hub has classes of its own, and FSDP2 makes others with longer names
        kinds = {type(part).__name__.removeprefix("FSDP") for part in self.modules()}
        found = set()
        if "CoLT5EncoderBlock" in kinds and config.routing != "none":
            found |= {"routed_feed_forward_fraction", "routed_query_fraction", "routed_key_value_fraction"}
        if "CoLT5CausalRoutedAttention" in kinds:
            found |= {"routed_query_fraction", "causal_routed_keys"}
        if "CoLT5LayerCausalFF" in kinds:
            found.add("routed_feed_forward_fraction")
        if "CoLT5DecoderBlock" in kinds and config.is_encoder_decoder and config.routed_cross_key_values is not None:
            found.add("routed_cross_key_values")
        return found

    def set_dense_start(self, progress: float | None) -> None:
        """Train the routers of encoder, cross-attention and causally routed layers before they choose: see
        docs/routers.md.

        While the model is in training mode, every token takes the heavy branches, and its weight says how much of them
        it receives; routed cross-attention reads every token, times its weight, and a window of a causally routed
        decoder every token of the windows before it. At progress 0 the weights are near 1 and constant. Up to progress
        1 they shrink until they sum to the configured budgets, and the routers have a gradient. In evaluation mode,
        and after None, routing is the paper's. Nothing of this is saved. `DenseStart` of dense_start.py calls it at
        every step of a training run.

        Args:
            progress: from 0 to 1, or None to end the dense start.

        Raises:
            TypeError: for a progress of another type.
            ValueError: for a number outside of 0 to 1, or a model without learned routers.
        """
        if not any(part.routing == "learned" for part in self.modules() if isinstance(part, CoLT5Router)):
            raise ValueError(
                f"{type(self).__name__} with routing={self.config.routing!r} has no learned routers; a dense start "
                "needs them"
            )
        set_dense_start(self, progress)

    def records_blocks(self, flags: dict[str, Any]) -> bool:
        """Whether a call's flags or the configuration ask for something from inside the layers."""
        names = (f"output_{name}" for name in self._can_record_outputs)
        asked = (flags.get(name, getattr(self.config, name, None)) for name in names)
        # The number 0 asks for something, as it is the first of the hidden states.
        return any(flag is not None and flag is not False for flag in asked)

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        """A batch of two short rows."""
        ids = torch.tensor([[7, 6, 3, 2, 1], [2, 3, 1, 0, 0]], device=self.device)
        inputs = {"input_ids": ids, "attention_mask": ids.ne(0).long()}
        return inputs | {"decoder_input_ids": ids} if self.config.is_encoder_decoder else inputs


class CoLT5Stack(CoLT5PreTrainedModel):
    """What encoder and decoder share: the embedding, which in a whole model is the one of all its stacks."""

    def __init__(self, config: CoLT5Config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)

    def share_embedding_with(self, model: Any) -> None:
        """Take the embedding `shared` of a whole model, and give that model whichever replaces it here."""
        # The reference is weak: a model that its own stacks held would stay in memory until Python looks for such
        # circles.
        self.__dict__["_model"] = weakref.ref(model)
        if self.embed_tokens is not model.shared:
            self.embed_tokens = model.shared

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        model = self.__dict__.get("_model", lambda: None)() if name == "embed_tokens" else None
        if model is not None and model.shared is not value:
            model.shared = value

    def __getstate__(self) -> dict[str, Any]:
        # A copy belongs to the copied model, which gives it its own embedding.
        return {name: value for name, value in self.__dict__.items() if name != "_model"}
