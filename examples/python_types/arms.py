"""The models that the study compares: all of one width, on the same data, each with what makes it read long inputs."""

from dataclasses import dataclass, field
from typing import Any

import torch
from python_types.first_weights import looking_from_the_start
from python_types.train import VOCAB_SIZE, Size
from transformers import (
    LongT5Config,
    LongT5ForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from modeling_colt5 import CoLT5Config, CoLT5ForConditionalGeneration
from modeling_colt5.encoder_costs import RoutedNumbers

# the length at which the model without routing costs as much as the one with it
EQUAL_AT = 8192
WINDOW = 2048


@dataclass(frozen=True)
class Arm:
    """A kind of model.

    Attributes:
        kind: "colt5", "t5", or LongT5's attention, "local" or "transient-global".
        size: fields of `Size`, for "colt5".
        config: further fields of its configuration.
        is_widened: whether the light feed-forward is so wide that the encoder costs what the paper's costs.
        window: tokens around each hole that it sees; None for the whole module.
        is_looking: whether it begins with first_weights.py's weights; else with its own.
        learning_rate: the highest, relative to each parameter's size.
        is_captured: whether its steps can be CUDA graphs. LongT5's cannot: its masks come from the host.
        is_started: whether routers that learn have a dense start.
        later_ratio: `soft_topk_ratio` from the end of the dense start on; None where it stays.
    """

    kind: str = "colt5"
    size: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    is_widened: bool = False
    window: int | None = None
    is_looking: bool = True
    learning_rate: float = 2e-2
    is_captured: bool = True
    is_started: bool = True
    later_ratio: float | None = None

    @property
    def has_dense_start(self) -> bool:
        """Whether it has routers that learn, and a dense start for them."""
        return self.is_started and self.kind == "colt5" and self.size.get("routing", "learned") == "learned"

    def model(self, size: Size, device: torch.device) -> PreTrainedModel:
        """A new one, in training mode.

        Args:
            size: of all arms; what this one has in `size` is changed.
            device: where it is made.
        """
        with device:
            made = self._model(size)
        return (looking_from_the_start(made) if self.is_looking else made).train()

    def _model(self, size: Size) -> PreTrainedModel:
        if self.kind == "colt5":
            config = Size(**{**vars(size), **self.size}).config()
            if self.is_widened:
                config.light_d_ff += equal_width(config, EQUAL_AT)
            for name, value in self.config.items():
                setattr(config, name, value)
            # the whole is checked
            return CoLT5ForConditionalGeneration(CoLT5Config.from_dict(config.to_dict()))
        fields = {
            "vocab_size": VOCAB_SIZE,
            "d_model": size.d_model,
            "d_kv": size.d_kv,
            "d_ff": size.light_d_ff + size.heavy_d_ff,
            "num_layers": size.num_layers,
            "num_decoder_layers": size.num_decoder_layers,
            "num_heads": size.num_heads,
            "feed_forward_proj": "gated-gelu",
            "dropout_rate": size.dropout,
            "tie_word_embeddings": True,
            "decoder_start_token_id": 0,
        }
        if self.kind == "t5":
            return T5ForConditionalGeneration(T5Config(**fields))
        return LongT5ForConditionalGeneration(LongT5Config(**fields, encoder_attention_type=self.kind))


def equal_width(config: CoLT5Config, n: int) -> int:
    """How much wider the light feed-forward is for what the heavy branches and routers of n tokens cost."""
    routed = RoutedNumbers.of(config, n)
    heavy, matrices = config.num_heavy_heads * config.d_kv, 3 if config.is_gated_act else 2
    multiplications = (
        2 * (routed.queries + routed.keys) * config.d_model * heavy
        + 2 * routed.queries * routed.keys * heavy
        + matrices * routed.tokens * config.d_model * config.heavy_d_ff
        + 3 * n * config.d_model
    )
    return round(multiplications / (matrices * n * config.d_model))


ARMS = {
    "learned": Arm(),
    "even": Arm(size={"routing": "even"}),
    "random": Arm(size={"routing": "random"}),
    "none": Arm(size={"routing": "none"}, is_widened=True),
    "longt5-local": Arm("local", is_captured=False),
    "longt5-global": Arm("transient-global", is_captured=False),
    "t5-window": Arm("t5", window=WINDOW),
    "learned-64": Arm(size={"budget": 64}),
    "even-64": Arm(size={"routing": "even", "budget": 64}),
    # the decoder reads what cross-attention's routers chose, or as many that are evenly spaced
    "learned-cross": Arm(config={"routed_cross_key_values": 256}),
    "even-cross": Arm(size={"routing": "even"}, config={"routed_cross_key_values": 256}),
    # what a dense start is worth, and routed tokens whose weights are nearer to 1
    "unstarted": Arm(is_started=False),
    "unstarted-ratio": Arm(is_started=False, config={"soft_topk_ratio": 4}),
    "learned-then-ratio": Arm(later_ratio=4),
    # first weights, on short inputs
    "own-weights": Arm(is_looking=False, learning_rate=1e-2),
    "looking": Arm(learning_rate=1e-2),
    "looking-3e-2": Arm(learning_rate=3e-2),
    "t5-looking": Arm("t5", learning_rate=1e-2),
}
