"""Which model the scripts train: a checkpoint, or a new one of a given size; with or without LoRA; and saving it."""

from dataclasses import dataclass, field
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Trainer

from modeling_colt5 import CoLT5Config


@dataclass
class ModelArguments:
    """The model, its tokenizer, its budgets."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "a folder or Hub id to start from"})
    size: str | None = field(default=None, metadata={"help": "a new model: base, large or xl"})
    tokenizer_name: str | None = field(default=None, metadata={"help": "the tokenizer, if not beside the model"})
    config_overrides: str | None = field(
        default=None, metadata={"help": "fields of a new model, as in 'd_model=64,num_layers=2'"}
    )
    lora: bool = field(default=False, metadata={"help": "train low-rank adapters (PEFT) instead of the weights"})
    lora_rank: int = field(default=16, metadata={"help": "the adapters' rank"})
    query_fraction: float | None = field(default=None, metadata={"help": "another budget of routed queries"})
    key_value_fraction: float | None = field(default=None, metadata={"help": "another budget of routed keys/values"})
    feed_forward_fraction: float | None = field(default=None, metadata={"help": "another feed-forward budget"})


def parse_overrides(text: str | None) -> dict[str, Any]:
    """Fields written as 'd_model=64,routing=even', with the types of `CoLT5Config`'s defaults.

    Raises:
        ValueError: for a field that does not exist, or a value of another type.
    """
    overrides: dict[str, Any] = {}
    defaults = CoLT5Config()
    for part in filter(None, (text or "").split(",")):
        name, _, value = part.partition("=")
        if not hasattr(defaults, name):
            raise ValueError(f"config_overrides has {name!r}, which is no field of CoLT5Config")
        kind = type(getattr(defaults, name))
        overrides[name] = value == "True" if kind is bool else kind(value)
    return overrides


def load_tokenizer(arguments: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer.

    Raises:
        ValueError: where neither it nor a checkpoint is named.
    """
    name = arguments.tokenizer_name or arguments.model_name_or_path
    if name is None:
        raise ValueError("give --tokenizer_name with --size: a new model has no tokenizer of its own")
    return AutoTokenizer.from_pretrained(name)


def load_model(
    arguments: ModelArguments, auto_class: Any, tokenizer: PreTrainedTokenizerBase, **kwargs: Any
) -> PreTrainedModel:
    """The model of an Auto class, with its budgets, its vocabulary checked against the tokenizer's.

    Args:
        arguments: what to load.
        auto_class: for example `AutoModelForSeq2SeqLM`.
        tokenizer: the tokenizer it will read.
        kwargs: fields of the configuration, such as the labels of a classifier.

    Raises:
        ValueError: without a model or with two, or for a tokenizer with more tokens than the model has embeddings.
    """
    if (arguments.model_name_or_path is None) == (arguments.size is None):
        raise ValueError("give either --model_name_or_path, or --size for a new model")
    if arguments.model_name_or_path is not None:
        model = auto_class.from_pretrained(arguments.model_name_or_path, **kwargs)
    else:
        overrides = {"vocab_size": -(-len(tokenizer) // 64) * 64} | parse_overrides(arguments.config_overrides)
        model = auto_class.from_config(CoLT5Config.from_size(arguments.size, **(overrides | kwargs)))
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model only {model.config.vocab_size}")
    model.set_routing_budget(
        feed_forward=arguments.feed_forward_fraction,
        query=arguments.query_fraction,
        key_value=arguments.key_value_fraction,
    )
    return model


def with_lora(model: PreTrainedModel, arguments: ModelArguments, task: str, heads: list[str]) -> Any:
    """The model with trainable low-rank adapters on all projections; routers and new heads train in full.

    Args:
        model: the model to adapt.
        arguments: `lora` and `lora_rank`.
        task: PEFT's name of the task, such as "SEQ_2_SEQ_LM".
        heads: modules that are new and therefore train in full.
    """
    if not arguments.lora:
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type=task,
        r=arguments.lora_rank,
        lora_alpha=2 * arguments.lora_rank,
        target_modules=["q", "k", "v", "o", "wi_0", "wi_1", "wi", "wo"],
        modules_to_save=heads or None,
    )
    adapted = get_peft_model(model, config)
    # a router is one vector a layer: adapters would be larger than it
    for name, parameter in adapted.named_parameters():
        if "router" in name:
            parameter.requires_grad = True
    return adapted


def save_whole(trainer: Trainer) -> None:
    """Save the trained model for `from_pretrained`, also where FSDP writes its checkpoints in parts."""
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
