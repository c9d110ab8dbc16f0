"""Layers are built from plain numbers: no configuration is read in a file of layers, nor in the plan of a pass."""

import ast
from pathlib import Path

import pytest
import torch
from models import random_ids, tiny_config, tiny_model
from rounding import assert_same_but_for_rounding

from modeling_colt5 import CoLT5Config, CoLT5EncoderModel, model_from_config
from modeling_colt5.configuration_colt5 import CoLT5BaseConfig

PACKAGE = Path(model_from_config.__file__).parent
WITHOUT_CONFIG = [
    "model_layers", "model_encoder_layer", "model_vision_layer", "model_decoder_layer", "model_causal", "model_router",
    "model_cross_routing", "model_initialisation",
    "run_plan", "run_budgets", "run_causal_plan", "layer_causal", "layer_decoder", "layer_encoder", "layer_plain",
    "layer_program",
]  # fmt: skip
# of layers, and of what a pass over them needs to know; the rest is of stacks, heads and files
NOT_OF_LAYERS = {
    "vocab_size", "num_layers", "routers_trained", "classifier_dropout", "initializer_factor", "tie_word_embeddings",
    "scale_decoder_outputs", "output_routing", "is_decoder", "use_cache",
    "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id",
}  # fmt: skip


@pytest.mark.parametrize("name", WITHOUT_CONFIG)
def test_no_layer_reads_a_configuration(name: str) -> None:
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not (names | attributes) & {"config", "CoLT5Config", "PreTrainedConfig"}


def test_one_file_reads_every_field_of_layers() -> None:
    tree = ast.parse((PACKAGE / "model_from_config.py").read_text(encoding="utf-8"))
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "config"
    }
    own = {*CoLT5BaseConfig.__annotations__, *CoLT5Config.__annotations__}
    assert own - NOT_OF_LAYERS - read == set()


def test_no_module_but_the_models_holds_the_configuration() -> None:
    for module in tiny_model(routed_cross_key_values=4).modules():
        assert hasattr(module, "config") == hasattr(module, "post_init"), type(module).__name__


@torch.no_grad()
def test_what_may_change_after_a_model_is_made_is_read_anew_in_each_pass() -> None:
    torch.manual_seed(0)
    model, ids = tiny_model(CoLT5EncoderModel), random_ids(1, 40)
    before = model(ids, output_routing=True).routing[0]
    changes = {"routed_query_fraction": 1 / 2, "min_routed_tokens": 16, "routing_epsilon": 2.0, "soft_topk_ratio": 1.5}
    for name, value in changes.items():
        setattr(model.config, name, value)
        after = model(ids, output_routing=True).routing[0]
        assert any(
            ours.shape != theirs.shape or not torch.equal(ours, theirs)
            for part in ("query", "key_value", "feed_forward")
            for ours, theirs in zip(*(vars(getattr(layer, part)).values() for layer in (before, after)), strict=True)
        ), name
        before = after
    # whoever makes a model anew from the same numbers gets the same choices
    again = CoLT5EncoderModel(tiny_config(**changes)).eval()
    again.load_state_dict(model.state_dict())
    expected = again(ids, output_routing=True).routing[0]
    assert torch.equal(before.query.indices, expected.query.indices)
    assert_same_but_for_rounding(before.query.weights, expected.query.weights)
