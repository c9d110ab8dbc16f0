"""Every Auto class on checkpoints of every class, here or in a process without the package: `python auto_steps.py`
and folders."""

import copy
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import hub_steps
import torch
import transformers
from safetensors.torch import load_file

ENCODER_CLASSES = [
    "CoLT5EncoderModel",
    "CoLT5ForSequenceClassification",
    "CoLT5ForTokenClassification",
    "CoLT5ForQuestionAnswering",
]
KINDS = ["CoLT5Model", "CoLT5ForConditionalGeneration", "CoLT5ForCausalLM", *ENCODER_CLASSES, "ScoreModel"]

# a user's file, beside which another of theirs is
USERS_CODE = '''"""A head of a user's."""

import torch
from modeling_colt5 import (
    CoLT5Config,
    CoLT5EncoderModel,
)
from modeling_colt5.model_layers import CoLT5LayerNorm
from torch import nn

from .scale_of_a_user import SCALE


class TopicConfig(CoLT5Config):
    model_type = "topic-colt5"
    num_topics: int = 3


class ScoreModel(CoLT5EncoderModel):
    """One number for each token."""

    def __init__(self, config):
        super().__init__(config)
        self.norm = CoLT5LayerNorm(config.d_model)
        self.score = nn.Linear(config.d_model, 1)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        states = super().forward(input_ids, attention_mask, **kwargs).last_hidden_state
        return {"logits": SCALE * self.score(self.norm(states)[0]).squeeze(-1)}


class OtherScoreModel(ScoreModel):
    """The same weights, read otherwise."""

    def forward(self, *args, **kwargs):
        return {"logits": super().forward(*args, **kwargs)["logits"].abs()}


class TopicModel(CoLT5EncoderModel):
    """A configuration and a model of their own."""

    config: TopicConfig
    config_class = TopicConfig

    def __init__(self, config):
        super().__init__(config)
        self.topics = nn.Linear(config.d_model, config.num_topics)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        states = super().forward(input_ids, attention_mask, **kwargs).last_hidden_state
        return {"logits": self.topics(states)}


ScoreModel.register_for_auto_class("AutoModelForSequenceClassification")
OtherScoreModel.register_for_auto_class("AutoModelForSequenceClassification")
TopicConfig.register_for_auto_class()
TopicModel.register_for_auto_class("AutoModelForTokenClassification")
'''


def expected_class(kind: str, auto_class: str) -> str | None:
    """The class that an Auto class makes of a checkpoint of `kind`, None for an error."""
    is_whole = kind in ("CoLT5Model", "CoLT5ForConditionalGeneration")
    if "CausalLM" in auto_class or kind == "CoLT5ForCausalLM":
        return "CoLT5ForCausalLM" if "CausalLM" in auto_class and kind == "CoLT5ForCausalLM" else None
    if auto_class == "AutoModel":
        return "CoLT5Model" if is_whole else "CoLT5EncoderModel"
    if auto_class == "AutoModelForSeq2SeqLM" and not is_whole:
        return None
    if auto_class == "AutoModelForSequenceClassification" and kind == "ScoreModel":
        return kind
    return hub_steps.AUTO_CLASSES[auto_class]


def check(kind: str, where: str) -> None:
    """Each Auto class makes of a checkpoint the right class with trained weights, but for a new head, or an error."""
    saved = load_file(Path(where, "model.safetensors"))
    for auto_class in hub_steps.AUTO_CLASSES:
        expected = expected_class(kind, auto_class)
        make = getattr(transformers, auto_class).from_pretrained
        try:
            model, info = make(where, trust_remote_code=True, output_loading_info=True)
        except ValueError as error:
            assert expected is None and f"saved from {kind} and has" in str(error), (kind, auto_class, error)
            continue
        assert type(model).__name__ == expected, (kind, auto_class, type(model))
        new = set(info["missing_keys"])
        heads = set() if expected == kind else hub_steps.OWN_WEIGHTS.get(auto_class, {"lm_head.weight"})
        assert new <= heads, (kind, auto_class, new)
        for name, weight in model.state_dict().items():
            trained = saved.get(name, saved["shared.weight"] if name.endswith("embed_tokens.weight") else None)
            assert name in new or torch.equal(weight, trained), (kind, auto_class, name)


def check_configuration_alone(where: str) -> None:
    """A configuration saved by itself makes every model of its checkpoint, again and again."""
    config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=True)
    for folder in (f"{where}-configuration", f"{where}-configuration-again"):
        config.save_pretrained(folder)
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
        for auto_class in hub_steps.AUTO_CLASSES:
            name = hub_steps.AUTO_CLASSES[auto_class]
            if auto_class == "AutoModel" and not config.is_encoder_decoder:
                name = "CoLT5EncoderModel"
            model = getattr(transformers, auto_class).from_config(copy.deepcopy(config), trust_remote_code=True)
            assert type(model).__name__ == name, (where, auto_class, type(model))
        if (Path(where) / "tokenizer.json").exists():
            tokenizer = transformers.AutoTokenizer.from_pretrained(where, config=config, trust_remote_code=True)
            assert type(tokenizer).__name__ == "CoLT5Tokenizer"


def logits(auto_class: str, where: str) -> tuple[Any, torch.Tensor]:
    """A loaded model, and what it computes for fixed ids."""
    model, info = getattr(transformers, auto_class).from_pretrained(
        where, trust_remote_code=True, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        return model.eval(), model(ids, attention_mask=torch.ones_like(ids))["logits"]


def check_users(where: str) -> None:
    """A user's models load as what they are, and so do their copies; other classes' copies leave the user's out."""
    for kind, auto_class in (
        ("ScoreModel", "AutoModelForSequenceClassification"),
        # of the same file, for the same Auto class
        ("OtherScoreModel", "AutoModelForSequenceClassification"),
        ("TopicModel", "AutoModelForTokenClassification"),
    ):
        model, expected = logits(auto_class, f"{where}/{kind}/model")
        assert type(model).__name__ == kind
        model.save_pretrained(f"{where}/{kind}/again")
        again, found = logits(auto_class, f"{where}/{kind}/again")
        assert type(again).__name__ == kind
        # loaded in the same way, computed by the same code
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert model.config.num_topics == 5 and type(model.config).__name__ == "TopicConfig"
    encoder = transformers.AutoModelForTextEncoding.from_pretrained(
        f"{where}/ScoreModel/model", trust_remote_code=True
    )
    encoder.save_pretrained(f"{where}/ScoreModel/encoder")
    auto_map = json.loads(Path(where, "ScoreModel/encoder/config.json").read_text(encoding="utf-8"))["auto_map"]
    assert not [name for name, entry in auto_map.items() if "ScoreModel" in entry]


def main(root: str) -> None:
    """Everything, without the package and triton.

    Args:
        root: folder of the checkpoints, KIND/model; every folder has the same last part, so that the code of all is
            one module where it is the same.
    """
    # where PyTorch has found triton, torchao does not do without it
    hub_steps.Hidden(["modeling_colt5", "triton", "torchao"])
    for kind in KINDS:
        check(kind, f"{root}/{kind}/model")
    for kind in ("CoLT5ForConditionalGeneration", "CoLT5EncoderModel"):
        check_configuration_alone(f"{root}/{kind}/model")
    check_users(root)
    assert importlib.util.find_spec("modeling_colt5") is None and "modeling_colt5" not in sys.modules


if __name__ == "__main__":
    main(*sys.argv[1:])
