"""The models that are measured against each other, of base size or tiny, with random weights and no dropout."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    EuroBertConfig,
    EuroBertModel,
    LEDConfig,
    LongT5Config,
    LongT5EncoderModel,
    LongT5ForConditionalGeneration,
    ModernBertConfig,
    ModernBertModel,
    PegasusXConfig,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5GemmaConfig,
    T5GemmaEncoderModel,
    T5GemmaForConditionalGeneration,
)
from transformers.models.led.modeling_led import LEDEncoder
from transformers.models.pegasus_x.modeling_pegasus_x import PegasusXEncoder

from modeling_colt5 import CoLT5Config, CoLT5EncoderModel, CoLT5ForConditionalGeneration

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# half precision is slow or missing in parts of PyTorch's CPU code
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32

COLT5 = "CoLT5"
LOCAL = "LongT5 local"
GLOBAL = "LongT5 transient-global"
DENSE_T5 = "T5, dense"
MODERNBERT = "ModernBERT"
MODERNBERT_FLEX = "ModernBERT, flex_attention"
EUROBERT = "EuroBERT"
T5GEMMA = "T5Gemma"
PEGASUS_X = "PEGASUS-X"
LED = "LED"
GATED_DELTANET = "Gated DeltaNet"
# its kernels are for a GPU, and its library, flash-linear-attention, is not part of this project's environment
HAS_GATED_DELTANET = DEVICE.type == "cuda" and importlib.util.find_spec("fla") is not None

# T5 1.1's base size
BASE = {"vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12}
TINY = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
TINY_COLT5 = {"num_decoder_layers": 1, "num_light_heads": 2, "num_heavy_heads": 3, "light_d_ff": 24, "heavy_d_ff": 64}
# the most tokens that a model with positions of its own is made for
LONGEST = 2**16
# by how much the lengths of a tiny run are shorter
TINY_LENGTH_DIVISOR = 256


def scaled_length(n: int, tiny: bool) -> int:
    """A length, or what a tiny run measures in its place."""
    return n // TINY_LENGTH_DIVISOR if tiny else n


def random_ids(batch: int, n: int, tiny: bool) -> torch.Tensor:
    """int64 [batch, n] of ordinary tokens."""
    return torch.randint(2, (TINY if tiny else BASE)["vocab_size"], (batch, n), device=DEVICE)


def colt5_config(tiny: bool, **fields: Any) -> CoLT5Config:
    """CoLT5's configuration; `fields` are what differs."""
    sizes = TINY | TINY_COLT5 if tiny else {}
    return CoLT5Config.from_size("base", **({"dropout_rate": 0.0} | sizes | fields))


def longt5_config(name: str, tiny: bool) -> LongT5Config:
    """LongT5's configuration, of either kind of attention."""
    return LongT5Config(
        **(TINY if tiny else BASE),
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        encoder_attention_type=name.removeprefix("LongT5 "),
        decoder_start_token_id=0,
    )


def _t5(tiny: bool) -> PreTrainedModel:
    config = T5Config(**(TINY if tiny else BASE), dropout_rate=0.0, feed_forward_proj="gated-gelu")
    return T5EncoderModel._from_config(config, attn_implementation="sdpa")


def _modernbert(tiny: bool, attention: str = "sdpa") -> PreTrainedModel:
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    config = ModernBertConfig(**(sizes | special | {"num_attention_heads": 4} if tiny else {}))
    return ModernBertModel._from_config(config, attn_implementation=attention)


def _common(tiny: bool) -> dict[str, Any]:
    """The sizes of a base model by the names of most libraries' configurations."""
    sizes = TINY if tiny else BASE
    return {
        "vocab_size": sizes["vocab_size"],
        "hidden_size": sizes["d_model"],
        "intermediate_size": sizes["d_ff"],
        "num_hidden_layers": sizes["num_layers"],
        "num_attention_heads": sizes["num_heads"],
    }


def _eurobert(tiny: bool) -> PreTrainedModel:
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id"), 0)
    config = EuroBertConfig(**_common(tiny), **special, max_position_embeddings=LONGEST)
    return EuroBertModel._from_config(config, attn_implementation="sdpa")


def _t5gemma_config(tiny: bool) -> T5GemmaConfig:
    sizes = TINY if tiny else BASE
    part = _common(tiny) | {
        "num_key_value_heads": sizes["num_heads"],
        "head_dim": sizes["d_kv"],
        "query_pre_attn_scalar": sizes["d_kv"],
        "max_position_embeddings": LONGEST,
    }
    return T5GemmaConfig(encoder=part, decoder=part, vocab_size=sizes["vocab_size"])


def _t5gemma_encoder(tiny: bool) -> PreTrainedModel:
    config = _t5gemma_config(tiny)
    config.is_encoder_decoder = False
    # it has no sdpa
    return T5GemmaEncoderModel(config)


def _of_bart(tiny: bool) -> dict[str, Any]:
    """The sizes of a base encoder by BART's names, with a decoder of one layer, as none is made."""
    sizes = TINY if tiny else BASE
    return {
        "vocab_size": sizes["vocab_size"],
        "d_model": sizes["d_model"],
        # 2,048 of the gated feed-forwards' units have as many weights as 3,072 without a gate
        "encoder_ffn_dim": sizes["d_ff"] * 3 // 2,
        "encoder_layers": sizes["num_layers"],
        "encoder_attention_heads": sizes["num_heads"],
        "decoder_layers": 1,
        "dropout": 0.0,
    }


def _pegasus_x(tiny: bool) -> PreTrainedModel:
    # blocks are whole: a tiny run's lengths are short
    config = PegasusXConfig(**_of_bart(tiny), max_position_embeddings=LONGEST, block_size=8 if tiny else 512)
    return PegasusXEncoder(config)


def _led(tiny: bool) -> PreTrainedModel:
    return LEDEncoder(
        LEDConfig(
            **_of_bart(tiny), max_encoder_position_embeddings=LONGEST, attention_window=8 if tiny else 512,
            attention_dropout=0.0,
        )
    )  # fmt: skip


def _gated_deltanet(tiny: bool) -> PreTrainedModel:
    from fla.models import GatedDeltaNetConfig, GatedDeltaNetModel

    # queries and keys of three quarters of the width, and values twice as wide, as the paper of the layer has them
    heads = {"num_heads": 2, "head_dim": 16} if tiny else {"num_heads": 9, "head_dim": 64}
    return GatedDeltaNetModel(GatedDeltaNetConfig(**_common(tiny), **heads, use_cache=False))


def _made(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    with DEVICE:
        return make().eval()


def make_encoder(name: str, tiny: bool, **fields: Any) -> PreTrainedModel:
    """An encoder by its name, on the device and in its dtype, in evaluation mode; `fields` are what differs in CoLT5's
    configuration."""
    makers: dict[str, Callable[[], PreTrainedModel]] = {
        COLT5: lambda: CoLT5EncoderModel(colt5_config(tiny, **fields)),
        LOCAL: lambda: LongT5EncoderModel(longt5_config(LOCAL, tiny)),
        GLOBAL: lambda: LongT5EncoderModel(longt5_config(GLOBAL, tiny)),
        DENSE_T5: lambda: _t5(tiny),
        MODERNBERT: lambda: _modernbert(tiny),
        MODERNBERT_FLEX: lambda: _modernbert(tiny, "flex_attention"),
        EUROBERT: lambda: _eurobert(tiny),
        T5GEMMA: lambda: _t5gemma_encoder(tiny),
        PEGASUS_X: lambda: _pegasus_x(tiny),
        LED: lambda: _led(tiny),
        GATED_DELTANET: lambda: _gated_deltanet(tiny),
    }
    return _made(makers[name]).to(DTYPE)


def make_seq2seq(name: str, tiny: bool) -> PreTrainedModel:
    """An encoder–decoder by its name, in fp32, on the device, in evaluation mode."""
    if name == COLT5:
        return _made(lambda: CoLT5ForConditionalGeneration(colt5_config(tiny)))
    if name == T5GEMMA:
        return _made(lambda: T5GemmaForConditionalGeneration(_t5gemma_config(tiny)))
    return _made(lambda: LongT5ForConditionalGeneration(longt5_config(name, tiny)))
