"""The embedding that stacks and head share: trained in every way, kept by merging, saving and loading."""

import copy
import gc
import pickle
import warnings
import weakref
from functools import partial

import pytest
import torch
from models import random_ids, shallow_model, tiny_config, tiny_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from modeling_colt5 import (
    CoLT5EncoderModel,
    CoLT5ForCausalLM,
    CoLT5ForConditionalGeneration,
    CoLT5ForSequenceClassification,
    CoLT5Model,
)

# PEFT says so of every adapter on an embedding that is saved, whatever the model
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")

ALL = [CoLT5ForConditionalGeneration, CoLT5ForCausalLM, CoLT5ForSequenceClassification, CoLT5EncoderModel]


def run(model, ids):
    """What the model computes of ids, whichever its head."""
    extra = {"decoder_input_ids": ids[:, :5]} if hasattr(model, "encoder") and hasattr(model, "decoder") else {}
    outputs = model(input_ids=ids, **extra)
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


def tiny_config_like(model, **fields):
    """The configuration of a model with other fields."""
    return type(model.config).from_dict(model.config.to_dict() | fields)


def assert_one_embedding(model):
    for stack in model.stacks().values():
        assert stack.embed_tokens is model.shared


WAYS = {
    "shared": {"modules_to_save": ["shared"]},
    "embed_tokens": {"modules_to_save": ["embed_tokens"]},
    "lm_head": {"modules_to_save": ["lm_head"]},
    "embed_tokens and lm_head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": [4, 5, 6]},
    "tokens of embed_tokens": {"trainable_token_indices": {"embed_tokens": [4, 5, 6]}},
    "tokens of embed_tokens and lm_head": {
        "trainable_token_indices": {"embed_tokens": [4, 5, 6], "lm_head": [4, 5, 6]}
    },
    "products for shared": {"target_modules": ["q", "shared"]},
    "products for embed_tokens": {"target_modules": ["q", "embed_tokens"]},
    "products for lm_head": {"target_modules": ["q", "lm_head"]},
    "products for embed_tokens and lm_head": {"target_modules": ["q", "embed_tokens", "lm_head"]},
}


def adapter_cases():
    """Each way with a head that is tied or is not in turn; the other half, and models of one stack, are slow.

    An encoder has no head to be tied, and a way that names none is the same for both kinds of encoders.
    """
    for number, way in enumerate(WAYS):
        for tied in (False, True):
            slow = pytest.mark.slow if tied == bool(number % 2) else ()
            yield pytest.param(CoLT5ForConditionalGeneration, way, tied, marks=slow)
        if number % 2:
            yield pytest.param(CoLT5ForCausalLM, way, "lm_head" in way, marks=pytest.mark.slow)
        if "lm_head" not in way:
            cls = (CoLT5ForSequenceClassification, CoLT5EncoderModel)[number % 2]
            yield pytest.param(
                cls, way, False, marks=() if way in ("shared", "products for embed_tokens") else pytest.mark.slow
            )


@pytest.mark.slow
@pytest.mark.parametrize(("model_class", "way", "tied"), list(adapter_cases()))
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning:peft")
@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning:peft")
def test_what_adapters_train_of_it_is_kept(model_class, way, tied, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    plain = shallow_model(model_class, tie_word_embeddings=tied)
    ids = random_ids(2, 12)
    ids[:, :3] = torch.tensor([4, 5, 6])
    model = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(**{"target_modules": ["q"], "r": 2} | WAYS[way]))
    assert_one_embedding(model.base_model.model)
    run(model, ids).float().square().mean().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and ("shared" in n or "lm_head" in n)}
    # one of the two factors of a product begins at 0, and its partner's gradient with it
    assert (
        trained and all(p.grad is not None for p in trained.values()) and any(p.grad.any() for p in trained.values())
    )
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn_like(parameter))
        expected = run(model.eval(), ids)
        model.save_pretrained(tmp_path / "adapter")
        with warnings.catch_warnings():
            # of keys that are there under another name
            warnings.filterwarnings("error", "Found missing adapter keys")
            other = copy.deepcopy(plain)
            # PEFT puts what it loads on a GPU where there is one
            load = partial(peft.PeftModel.from_pretrained, model_id=tmp_path / "adapter", torch_device="cpu")
            again = run(load(plain).eval(), ids)
            # the adapter's parameters are made without data, the model's own must keep theirs
            filled = run(load(other, low_cpu_mem_usage=True).eval(), ids)
        merged = model.merge_and_unload()
        assert_one_embedding(merged)
        merged.save_pretrained(tmp_path / "merged")
        loaded = model_class.from_pretrained(tmp_path / "merged").eval()
        # fp32, sums of some hundred products; merging adds LoRA's product to the weights first
        scale = expected.abs().max()
        for logits in (again, filled, run(merged, ids), run(loaded, ids)):
            assert (logits - expected).abs().max() <= 1e-4 * scale


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning:peft")
def test_a_tied_head_is_tied_again_when_an_adapter_is_taken_off():
    peft = pytest.importorskip("peft")
    model = shallow_model(tie_word_embeddings=True)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["shared"], r=2))
    assert not any(p is q for p in model.shared.parameters() for q in model.lm_head.parameters())
    adapted.unload()
    assert model.lm_head.weight is model.shared.weight


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_of_other_parts_leaves_a_head_of_its_own(assign):
    model = shallow_model(tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    head = model.lm_head.weight.detach().clone()
    norm = torch.full((32,), 2.0)
    model.load_state_dict({"encoder.final_layer_norm.weight": norm}, strict=False, assign=assign)
    assert torch.equal(model.lm_head.weight, head) and torch.equal(model.encoder.final_layer_norm.weight, norm)


@pytest.mark.parametrize("model_class", [CoLT5ForConditionalGeneration, CoLT5ForCausalLM])
def test_a_head_that_is_untied_begins_as_the_embedding(model_class, tmp_path):
    tied = tiny_model(model_class, tie_word_embeddings=True, scale_decoder_outputs=True)
    ids = random_ids(2, 9)
    expected = run(tied, ids)
    tied.save_pretrained(tmp_path)
    for given in ({"tie_word_embeddings": False}, {"config": tiny_config_like(tied, tie_word_embeddings=False)}):
        model, info = model_class.from_pretrained(tmp_path, output_loading_info=True, **given)
        assert not info["missing_keys"] and model.lm_head.weight is not model.shared.weight
        torch.testing.assert_close(run(model.eval(), ids), expected, rtol=0, atol=0)
    # the two are trained apart, and saved apart
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(tmp_path / "untied")
    torch.testing.assert_close(run(model_class.from_pretrained(tmp_path / "untied").eval(), ids), run(model, ids))


@pytest.mark.parametrize("way", ["saved", "saved by state dict", "told"])
def test_a_head_is_untied_by_the_configuration(way, tmp_path):
    model, ids = tiny_model(CoLT5ForCausalLM, tie_word_embeddings=True), random_ids(2, 9)
    expected = run(model, ids)
    model.config.tie_word_embeddings = False
    if way == "told":
        model.tie_weights()
    weights = dict(model.named_parameters())
    model.save_pretrained(tmp_path, state_dict=model.state_dict() if way == "saved by state dict" else None)
    # an optimizer holds the weights that there are
    assert all(part is weights[name] for name, part in model.named_parameters())
    assert (model.lm_head.weight is model.shared.weight) == (way != "told")
    loaded, info = CoLT5ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    torch.testing.assert_close(run(loaded.eval(), ids), expected, rtol=0, atol=0)


def test_a_head_that_no_checkpoint_had_is_new(tmp_path):
    """The embeddings of a model without a head are no weights of one."""
    torch.manual_seed(0)
    tiny_model(CoLT5Model).save_pretrained(tmp_path)
    model, info = CoLT5ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}
    assert not torch.equal(model.lm_head.weight, model.shared.weight)


def test_a_second_adapter_finds_it_under_a_stacks_name():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["embed_tokens"], r=2)
    model = peft.get_peft_model(shallow_model(), config)
    model.add_adapter("second", config)
    assert set(model.base_model.model.shared.lora_embedding_A) == {"default", "second"}


def test_a_model_can_be_made_of_fake_tensors():
    with FakeTensorMode():
        model = CoLT5ForConditionalGeneration(tiny_config(tie_word_embeddings=True))
    assert model.lm_head.weight is model.shared.weight


def test_one_replaced_by_a_stack_is_replaced_everywhere():
    model = shallow_model()
    model.decoder.set_input_embeddings(nn.Embedding(50, 32))
    assert_one_embedding(model)
    assert model.get_input_embeddings().num_embeddings == 50


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copys_embedding_is_its_own(copied):
    model = shallow_model()
    old, other = model.shared, copied(model)
    other.encoder.embed_tokens = nn.Embedding(50, 32)
    assert_one_embedding(other)
    assert_one_embedding(model)
    assert model.shared is old and other.shared.num_embeddings == 50


def test_a_model_is_freed_at_once():
    gc.collect()
    gc.disable()
    try:
        model = CoLT5EncoderModel(tiny_config())
        alive = weakref.ref(model.encoder.block[0])
        del model
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("tied", [False, True])
def test_missing_names_of_a_saved_model_are_what_trainer_expects(tied, tmp_path):
    """`Trainer` takes a checkpoint for complete that lacks just what the model leaves out at saving."""
    model = shallow_model(tie_word_embeddings=tied)
    weights = {
        name: tensor for name, tensor in model.state_dict().items() if name not in model._keys_to_ignore_on_save
    }
    result = shallow_model(tie_word_embeddings=tied).load_state_dict(weights, strict=False)
    assert set(result.missing_keys) == model._keys_to_ignore_on_save
    assert ("lm_head.weight" in result.missing_keys) == tied


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_class", ALL)
@pytest.mark.parametrize("way", ["to_empty", "assign", "assign without other names"])
def test_a_model_without_data_is_filled(model_class, tied, way):
    torch.manual_seed(0)
    model = tiny_model(model_class, tie_word_embeddings=tied)
    ids = random_ids(2, 40)
    with torch.device("meta"):
        other = model_class(tiny_config(tie_word_embeddings=tied)).eval()
    weights = model.state_dict()
    if way == "to_empty":
        other.to_empty(device="cpu").load_state_dict(weights)
    else:
        if way != "assign":
            weights = {name: t for name, t in weights.items() if name not in model._keys_to_ignore_on_save}
        other.load_state_dict(weights, assign=True, strict=way == "assign")
    with torch.no_grad():
        # the same operations on the same numbers, at other addresses
        torch.testing.assert_close(run(other, ids), run(model, ids), rtol=1e-5, atol=1e-5)
