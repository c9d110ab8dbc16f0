"""The scripts' arguments, and which model they train: a checkpoint, or a new one of a given size; also with LoRA."""

import ast
import json
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

import torch
from run_record import known_labels
from safetensors import SafetensorError
from sources import check_least, check_source
from training_defaults import BestOfRouted
from transformers import (
    AutoConfig,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Tokenizer,
    Trainer,
)
from transformers.utils import find_adapter_config_file, logging

from modeling_colt5 import CoLT5Config, CoLT5Tokenizer
from modeling_colt5.configuration_colt5 import check_config
from modeling_colt5.dense_start import DenseStart, DenseStartCallback, learned_routers
from modeling_colt5.router_health import RouterHealthCallback

logger = logging.get_logger(__name__)


class Share(Fraction):
    """A budget on the command line, such as 1/8."""

    def __new__(cls, *given: Any) -> "Share":
        """Raises:
        ValueError: also for a division by 0, as the parser of arguments names what raises that.
        """
        try:
            return super().__new__(cls, *given)
        except ZeroDivisionError as error:
            raise ValueError(f"{given[0]} is no number") from error


@dataclass
class ModelArguments:
    """The model, its tokenizer, its budgets."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "a folder or Hub id to start from"})
    size: Literal["base", "large", "xl"] | None = field(default=None, metadata={"help": "a new model of this size"})
    tokenizer_name: str | None = field(default=None, metadata={"help": "the tokenizer, if not beside the model"})
    config_overrides: str | None = field(
        default=None, metadata={"help": "fields of a new model, as in 'd_model=64,num_layers=2'"}
    )
    # fractions, so that 1/8 may be written as it is
    query_fraction: Share | None = field(
        default=None, metadata={"help": "another budget of routed queries, such as 1/8"}
    )
    key_value_fraction: Share | None = field(default=None, metadata={"help": "the same of routed keys and values"})
    feed_forward_fraction: Share | None = field(default=None, metadata={"help": "the same of the feed-forward"})


@dataclass
class RouterArguments:
    """How the routers are trained, and watched."""

    dense_start: bool = field(
        default=True,
        metadata={
            "help": "begin with every token in the heavy branches, so that routers learn what to choose; "
            "a model whose routers have been trained goes on without"
        },
    )
    dense_start_closed: float = field(
        default=DenseStart.closed,
        metadata={"help": "the share of the steps in which all routers are open and constant"},
    )
    dense_start_opening: float = field(
        default=DenseStart.opening,
        metadata={"help": "the share of the steps after that in which weights shrink to the budgets"},
    )
    dense_start_input_share: float = field(
        default=DenseStart.input_share,
        metadata={
            "help": "the share of every input that both read: its beginning, in pre-training a stretch anywhere"
        },
    )
    router_health_steps: int = field(
        default=100,
        metadata={"help": "log what the routers choose at every so many steps, and warn of dead ones; 0 for never"},
    )

    def __post_init__(self) -> None:
        check_least(0, router_health_steps=self.router_health_steps)
        self.schedule()

    def schedule(self) -> DenseStart:
        """The dense start's.

        Raises:
            ValueError: for a share that it cannot have.
        """
        try:
            return DenseStart(self.dense_start_closed, self.dense_start_opening, self.dense_start_input_share)
        except ValueError as error:
            # which calls its fields as the options without this
            raise ValueError(f"dense_start_{error}") from None


@dataclass
class FineTunedModelArguments(ModelArguments):
    """The same, with LoRA."""

    lora: bool = field(default=False, metadata={"help": "train low-rank adapters (PEFT) instead of the weights"})
    lora_rank: int = field(default=16, metadata={"help": "the adapters' rank"})

    def __post_init__(self) -> None:
        check_least(1, lora_rank=self.lora_rank)


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults, and the description's lines as they are."""


def parse_arguments(kinds: tuple[type, ...], description: str | None, argv: list[str] | None) -> tuple[Any, ...]:
    """A script's arguments, an object of each of the dataclasses; `description` is what --help begins with."""
    parser = HfArgumentParser(kinds, description=description, formatter_class=HelpFormatter)
    return parser.parse_args_into_dataclasses(argv)


def parse_overrides(text: str | None) -> dict[str, Any]:
    """Fields written as 'd_model=64,routing=even,routing_epsilon_init=4.0'; what is no Python value is text.

    Raises:
        ValueError: for a part without "=", or a field that does not exist.
    """
    overrides: dict[str, Any] = {}
    fields = CoLT5Config().to_dict()
    for part in filter(None, (text or "").split(",")):
        name, equals, value = part.partition("=")
        if not equals or name not in fields:
            raise ValueError(f"config_overrides has {part!r}; it must be name=value with a field of CoLT5Config")
        try:
            overrides[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            overrides[name] = value
    return overrides


def check_model(arguments: ModelArguments) -> None:
    """Refuse arguments that name no model, or two, or one that cannot be there.

    Raises:
        ValueError: for those.
    """
    name = arguments.model_name_or_path
    if name is None and arguments.size is None:
        raise ValueError(
            "name the model to begin with: --model_name_or_path, a folder or Hub id, such as a T5 that "
            "examples/convert_t5.py has converted; or --size base for a new one with random weights"
        )
    if name is not None and arguments.size is not None:
        raise ValueError("give either --model_name_or_path, or --size for a new model")
    for option, given in (("model_name_or_path", name), ("tokenizer_name", arguments.tokenizer_name)):
        if given is not None:
            check_source(given, option)


def load_tokenizer(arguments: ModelArguments, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer; a folder of T5's gives a `CoLT5Tokenizer`, with T5's ids.

    Args:
        arguments: which one.
        kwargs: of `CoLT5Tokenizer`.

    Raises:
        ValueError: where neither it nor a checkpoint is named, or its files are broken.
    """
    name = arguments.tokenizer_name or arguments.model_name_or_path
    if name is None:
        raise ValueError("give --tokenizer_name with --size: a new model has no tokenizer of its own")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except json.JSONDecodeError as error:
        raise ValueError(f"the tokenizer of {name} cannot be read: {error}") from None
    if not isinstance(tokenizer, T5Tokenizer) or isinstance(tokenizer, CoLT5Tokenizer) and not kwargs:
        return tokenizer
    return CoLT5Tokenizer.from_pretrained(name, **kwargs)


def load_checkpoint(name: str, auto_class: Any, **kwargs: Any) -> Any:
    """The model of a folder or Hub id; of an adapter's, its base model with the adapter on it, ready to be trained on.

    In fp32, whatever it was saved in: AdamW's steps are smaller than what bf16 weights can hold. `--bf16 true` still
    computes in bf16. A head for another number of labels than the rows have begins anew.

    Args:
        name: the folder or Hub id.
        auto_class: of the whole model.
        kwargs: fields of the configuration.

    Raises:
        TypeError: for a model of another kind, such as T5.
        ValueError: for an adapter that is for another number of labels.
    """
    kwargs = {"dtype": torch.float32, **kwargs}
    labels = kwargs.get("id2label")
    if find_adapter_config_file(name) is None:
        if labels is not None:
            saved, kind = AutoConfig.from_pretrained(name), auto_class.__name__.removeprefix("AutoModel")
            has_head = any(architecture.endswith(kind) for architecture in saved.architectures or ())
            if has_head and saved.num_labels != len(labels):
                logger.warning(
                    f"The head of {name} is for {saved.num_labels} labels and the rows have {len(labels)}: it begins "
                    "with random weights"
                )
                kwargs["ignore_mismatched_sizes"] = True
        model = auto_class.from_pretrained(name, **kwargs)
        check_config(model.config)
        return model
    from peft import PeftConfig, PeftModel

    # PEFT loads what it saved; Auto classes of older releases make routers and heads anew
    source, known = PeftConfig.from_pretrained(name).base_model_name_or_path, known_labels(name)
    if labels is not None and known is not None and len(known) != len(labels):
        raise ValueError(
            f"{name} is an adapter for the labels {', '.join(known)}, and the rows have {', '.join(labels.values())}; "
            f"train another one: --model_name_or_path {source} --lora true"
        )
    base = load_checkpoint(source, auto_class, **kwargs)
    model = PeftModel.from_pretrained(base, name, is_trainable=True)
    if any(parameter.requires_grad for router in learned_routers(model) for parameter in router.parameters()):
        # the adapter's own training has trained the routers that it holds, which its base's configuration cannot say
        base.config.routers_trained = True
    return model


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
        ValueError: with fields for a checkpoint, for weights that are broken, or for a tokenizer with more tokens than
            the model has embeddings.
    """
    if arguments.model_name_or_path is not None:
        if arguments.config_overrides is not None:
            raise ValueError("config_overrides is for a new model (--size); a checkpoint has its fields")
        try:
            model = load_checkpoint(arguments.model_name_or_path, auto_class, **kwargs)
        except SafetensorError as error:
            raise ValueError(f"the weights of {arguments.model_name_or_path} cannot be read: {error}") from None
    else:
        overrides = {"vocab_size": -(-len(tokenizer) // 64) * 64} | parse_overrides(arguments.config_overrides)
        model = auto_class.from_config(CoLT5Config.from_size(arguments.size, **(overrides | kwargs)))
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model only {model.config.vocab_size}")
    budgets = {
        "feed_forward": arguments.feed_forward_fraction,
        "query": arguments.query_fraction,
        "key_value": arguments.key_value_fraction,
    }
    model.set_routing_budget(**{name: float(budget) for name, budget in budgets.items() if budget is not None})
    return model


def with_lora(model: PreTrainedModel, arguments: FineTunedModelArguments, task: str, heads: list[str]) -> Any:
    """The model with trainable low-rank adapters on all projections; routers and new heads train in full.

    Args:
        model: the model to adapt.
        arguments: `lora` and `lora_rank`.
        task: PEFT's name of the task, such as "SEQ_2_SEQ_LM".
        heads: modules that are new and therefore train in full.

    Raises:
        ValueError: for a model that has adapters.
    """
    if not arguments.lora:
        return model
    from peft import LoraConfig, PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        raise ValueError(
            "--model_name_or_path is an adapter already, which is trained further as it is: leave --lora out"
        )

    # a router is one vector: adapters would be larger than it. PEFT saves what it is told of, and nothing else
    learned = learned_routers(model)
    routers = [name for name, part in model.named_modules() if part in learned]
    config = LoraConfig(
        task_type=task,
        r=arguments.lora_rank,
        lora_alpha=2 * arguments.lora_rank,
        target_modules=["q", "k", "v", "o", "wi_0", "wi_1", "wi", "wo"],
        modules_to_save=routers + heads,
    )
    return get_peft_model(model, config)


def watch_routers(
    trainer: Trainer,
    arguments: RouterArguments,
    input_length: int,
    shorten: Callable[[dict[str, Any], float], dict[str, Any]] | None = None,
    health: Callable[[Any, int], RouterHealthCallback] = RouterHealthCallback,
) -> DenseStart | None:
    """Give a run its dense start and the log of its routers' health, as far as its model has routers to learn.

    Args:
        trainer: the run's.
        arguments: which of them, and the dense start's schedule.
        input_length: tokens of the longest inputs.
        shorten: as in `DenseStartCallback`.
        health: makes what logs the routers' health, of `Trainer.log` and the steps between measurements.

    Returns:
        The dense start's schedule, None where there is none.
    """
    schedule = arguments.schedule()
    routers = learned_routers(trainer.model)
    if not routers:
        return None
    if arguments.dense_start:
        trainer.add_callback(DenseStartCallback(schedule, shorten, input_length=input_length))
    if arguments.router_health_steps:
        trainer.add_callback(health(trainer.log, arguments.router_health_steps))
    trains_routers = any(parameter.requires_grad for router in routers for parameter in router.parameters())
    # what is trained may hold the model: sentence-transformers' does
    model: Any = next(part for part in trainer.model.modules() if hasattr(part, "set_dense_start"))
    if not arguments.dense_start or model.config.routers_trained or not trains_routers:
        return None
    trainer.add_callback(BestOfRouted(schedule))
    return schedule
