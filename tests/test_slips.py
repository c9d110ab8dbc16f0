"""Slips in a configuration's field names, models of another type, and a tokenizer that announces no errors."""

import warnings

import numpy as np
import pytest
from models import random_ids, tiny_config, tiny_model
from transformers import (
    AutoConfig,
    BartConfig,
    LongT5Config,
    LongT5ForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    Trainer,
    TrainingArguments,
)

from modeling_colt5 import (
    CoLT5Config,
    CoLT5EncoderModel,
    CoLT5ForCausalLM,
    CoLT5ForConditionalGeneration,
    CoLT5ForTokenClassification,
    CoLT5Tokenizer,
)
from modeling_colt5.model_decoder import CoLT5Decoder
from modeling_colt5.model_encoder import CoLT5Encoder

OTHERS = {"t5": T5Config, "longt5": LongT5Config}
TINY = {"vocab_size": 12, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "field"),
    [("local_radus", "local_radius"), ("num_layer", "num_layers"), ("output_routings", "output_routing")],
)
def test_a_slip_in_a_fields_name_is_warned_of(tmp_path, name, field):
    warned = f"no field {name}, .*{field}"
    with pytest.warns(UserWarning, match=warned):
        config = CoLT5Config(**{name: 1})
    with pytest.warns(UserWarning, match=warned):
        setattr(CoLT5Config(), name, 1)
    with pytest.warns(UserWarning, match=warned):
        CoLT5Config().update({name: 1})
    with pytest.warns(UserWarning, match=warned):
        CoLT5Config.from_dict(tiny_config().to_dict(), **{name: 1})
    assert getattr(config, name) == 1


def test_other_names_are_the_callers_own(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = tiny_config(my_threshold=3, task_specific_params={}, n_positions=512, num_labels=3, hidden_size=32)
        config.my_note, config.id2label = "text", {0: "no", 1: "yes"}
        config.save_pretrained(tmp_path)
        again = AutoConfig.from_pretrained(tmp_path, num_labels=2, attn_implementation="eager")
        assert again.my_note == "text" and again.d_model == 32
        for kind in OTHERS.values():
            own = {key: value for key, value in kind().to_dict().items() if not hasattr(CoLT5Config, key)}
            CoLT5Config(**own)


@pytest.mark.parametrize("model_type", OTHERS)
def test_another_models_configuration_says_how_to_convert(tmp_path, model_type):
    config = OTHERS[model_type](**TINY)
    message = r"Convert it first: python examples/convert_t5\.py .* FOLDER"
    for kind in (CoLT5ForConditionalGeneration, CoLT5EncoderModel, CoLT5ForTokenClassification, CoLT5ForCausalLM):
        with pytest.raises(TypeError, match=message):
            kind(config)
    for kind in (CoLT5Encoder, CoLT5Decoder):
        with pytest.raises(TypeError, match=message):
            kind(config)
    with pytest.raises(ValueError, match=message):
        CoLT5Config(**config.to_dict())
    config.save_pretrained(tmp_path)
    for kind in (CoLT5Config, CoLT5ForConditionalGeneration, CoLT5EncoderModel):
        with pytest.raises(ValueError, match=message):
            kind.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "model", [lambda: T5EncoderModel(T5Config(**TINY)), lambda: LongT5ForConditionalGeneration(LongT5Config(**TINY))]
)
def test_another_model_in_place_of_a_configuration_says_how_to_convert(model):
    with pytest.raises(TypeError, match="Convert it first"):
        CoLT5ForConditionalGeneration(model())


def test_a_model_that_cannot_be_converted_is_refused():
    with pytest.raises(ValueError, match="model_type is 'bart'") as error:
        CoLT5Config.from_dict(BartConfig().to_dict())
    assert "onvert" not in str(error.value)


def test_the_tokenizer_announces_no_error_at_any_length(messages):
    tokenizer = CoLT5Tokenizer([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581a", -1.0)], model_max_length=8)
    text = "a " * 100
    assert len(tokenizer(text)["input_ids"]) == len(tokenizer(text, return_tensors="pt")["input_ids"][0]) == 101
    assert len(tokenizer(text, truncation=True)["input_ids"]) == 8
    assert messages.text == ""


def test_evaluation_collects_no_documents_states(tmp_path):
    rows = [{"input_ids": random_ids(40), "labels": random_ids(5)} for _ in range(2)]
    shapes = []

    def metrics(prediction):
        parts = prediction.predictions
        shapes.extend(np.shape(part) for part in (parts if isinstance(parts, tuple) else [parts]))
        return {}

    arguments = TrainingArguments(tmp_path, report_to=[], use_cpu=True, disable_tqdm=True)
    Trainer(tiny_model(output_routing=True), arguments, eval_dataset=rows, compute_metrics=metrics).evaluate()
    assert shapes == [(2, 5, 96)]
