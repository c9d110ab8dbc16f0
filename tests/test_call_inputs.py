"""A call's inputs: shapes that do not fit are refused by name, forms that users hold are taken, unread ones named."""

import inspect
import warnings

import pytest
import torch
from models import ENCODER_HEADS, random_ids, shallow_model, tiny_model
from rounding import assert_same_but_for_rounding
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.modeling_outputs import BaseModelOutput

from modeling_colt5 import (
    CoLT5EncoderModel,
    CoLT5ForCausalLM,
    CoLT5ForConditionalGeneration,
    CoLT5ForQuestionAnswering,
    CoLT5ForSequenceClassification,
    CoLT5ForTokenClassification,
    CoLT5Model,
)

ALL = [CoLT5Model, CoLT5ForConditionalGeneration, CoLT5ForCausalLM, CoLT5EncoderModel, *ENCODER_HEADS]
CAUSAL = {"full": {}, "routed": {"causal_attention": "routed", "causal_window": 4}}


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.int64)


def inputs_of(model_class: type, rows: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": random_ids(rows, length), "attention_mask": ones(rows, length)}
    if model_class in (CoLT5Model, CoLT5ForConditionalGeneration):
        inputs["decoder_input_ids"] = random_ids(rows, 3)
    return inputs


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_mask", ones(2, 11)),
        ("attention_mask", ones(1, 12)),
        ("decoder_attention_mask", ones(2, 2)),
        ("decoder_attention_mask", ones(2, 4)),
        ("decoder_attention_mask", ones(1, 3)),
        ("decoder_attention_mask", ones(2, 3, 3)),
        ("decoder_attention_mask", ones(2, 1, 3, 4)),
        ("decoder_input_ids", ones(1, 3)),
        ("decoder_input_ids", ones(4, 3)),
        ("decoder_input_ids", ones(3)),
        ("encoder_outputs", torch.randn(2, 12, 1)),
        ("encoder_outputs", torch.randn(12, 32)),
        ("encoder_outputs", torch.randn(1, 12, 32)),
        ("encoder_outputs", (torch.randn(2, 11, 32),)),
        ("labels", ones(3, 2)),
        ("labels", ones(6)),
    ],
    ids=lambda value: value if isinstance(value, str) else "x".join(map(str, getattr(value, "shape", ["tuple"]))),
)
def test_shapes_that_do_not_fit_are_refused_by_name(name, value, causal):
    model = shallow_model(**CAUSAL[causal])
    with pytest.raises(ValueError, match=name):
        model(**{**inputs_of(CoLT5ForConditionalGeneration), name: value})


@pytest.mark.parametrize("name", ["inputs_embeds", "decoder_inputs_embeds"])
@pytest.mark.parametrize("shape", [(2, 3, 1), (2, 3, 33), (3, 32), (2, 0, 32), (0, 3, 32)])
def test_embeddings_of_another_shape_are_refused_by_name(name, shape):
    ids = "input_ids" if name == "inputs_embeds" else "decoder_input_ids"
    inputs = inputs_of(CoLT5ForConditionalGeneration) | {ids: None, "attention_mask": None}
    with pytest.raises(ValueError, match=f"{name} has shape"):
        shallow_model()(**inputs, **{name: torch.randn(shape)})


@pytest.mark.parametrize(
    ("model_class", "fields", "name", "value"),
    [
        (CoLT5ForSequenceClassification, {"num_labels": 1}, "labels", torch.randn(1)),
        (CoLT5ForSequenceClassification, {"num_labels": 2}, "labels", torch.randn(2)),
        (CoLT5ForSequenceClassification, {"num_labels": 2, "problem_type": "regression"}, "labels", torch.randn(1, 2)),
        (CoLT5ForSequenceClassification, {"num_labels": 3}, "labels", ones(1)),
        (CoLT5ForTokenClassification, {}, "labels", ones(12, 2)),
        (CoLT5ForQuestionAnswering, {}, "start_positions", ones(1)),
        (CoLT5ForQuestionAnswering, {}, "end_positions", ones(2, 2)),
        (CoLT5ForCausalLM, {}, "labels", ones(12, 2)),
    ],
)
def test_labels_of_another_shape_are_refused_by_name(model_class, fields, name, value):
    labels = {"start_positions": ones(2), "end_positions": ones(2)} if "positions" in name else {}
    with pytest.raises(ValueError, match=f"{name} has shape"):
        shallow_model(model_class, **fields)(**inputs_of(model_class), **labels | {name: value})


@pytest.mark.parametrize(
    ("model_class", "fields", "name", "value"),
    [
        (CoLT5ForConditionalGeneration, {}, "input_ids", ones(2, 12).tolist()),
        (CoLT5ForConditionalGeneration, {}, "input_ids", ones(2, 12).numpy()),
        (CoLT5ForConditionalGeneration, {}, "input_ids", torch.ones(2, 12)),
        (CoLT5ForConditionalGeneration, {}, "decoder_input_ids", torch.ones(2, 4)),
        (CoLT5ForConditionalGeneration, {}, "attention_mask", ones(2, 12).tolist()),
        (CoLT5ForConditionalGeneration, {"decoder_input_ids": None}, "labels", ones(2, 4).int()),
        (CoLT5ForConditionalGeneration, {"decoder_input_ids": None}, "labels", ones(2, 4).tolist()),
        (CoLT5ForConditionalGeneration, {}, "labels", ones(2, 4).int()),
        (CoLT5ForCausalLM, {}, "labels", ones(2, 12).float()),
        (CoLT5ForTokenClassification, {}, "labels", ones(2, 12).int()),
        (CoLT5ForQuestionAnswering, {"end_positions": ones(2)}, "start_positions", ones(2).int()),
        (CoLT5ForQuestionAnswering, {"start_positions": ones(2)}, "end_positions", ones(2).float()),
    ],
)
def test_what_is_no_tensor_or_of_another_type_is_refused_by_name(model_class, fields, name, value):
    with pytest.raises(TypeError, match=f"^{name} (has dtype|is) "):
        shallow_model(model_class)(**inputs_of(model_class) | fields | {name: value})


@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [
        (None, ones(2).int()),
        (None, ones(2).to(torch.uint8)),
        (None, ones(2, 3).bool()),
        (None, [1, 2]),
        ("single_label_classification", torch.ones(2)),
        ("multi_label_classification", ones(2, 3)),
        ("multi_label_classification", ones(2, 3).bool()),
        ("regression", [[0.0, 1.0, 2.0]] * 2),
    ],
)
def test_class_labels_of_another_type_are_refused_and_decide_nothing(problem_type, labels):
    """Transformers' loss would take them for labels of another kind, and keep that in the configuration."""
    model = shallow_model(CoLT5ForSequenceClassification, num_labels=3, problem_type=problem_type)
    with pytest.raises(TypeError, match="^labels (has dtype|is) "):
        model(**inputs_of(CoLT5ForSequenceClassification), labels=labels)
    assert model.config.problem_type == problem_type


@pytest.mark.parametrize("labels", [ones(2), torch.ones(2, 3)])
def test_a_problem_type_that_there_is_not_is_named(labels):
    model = shallow_model(CoLT5ForSequenceClassification, num_labels=3, problem_type="multi_label")
    with pytest.raises(ValueError, match="problem_type of the configuration is 'multi_label'; it must be one of regr"):
        model(**inputs_of(CoLT5ForSequenceClassification), labels=labels)


def test_several_labels_may_be_a_single_one():
    model = shallow_model(CoLT5ForSequenceClassification, num_labels=1, problem_type="multi_label_classification")
    inputs = inputs_of(CoLT5ForSequenceClassification)
    assert model(**inputs, labels=torch.ones(2, 1)).loss.isfinite()
    with pytest.raises(ValueError, match=r"labels has shape \(2,\)"):
        model(**inputs, labels=torch.ones(2))


@pytest.mark.parametrize(
    ("num_labels", "labels"),
    [(1, torch.randn(2)), (1, torch.randn(2, 1)), (3, ones(2)), (3, ones(2, 1)), (3, torch.rand(2, 3))],
)
def test_every_kind_of_class_labels_is_taken(num_labels, labels):
    model = shallow_model(CoLT5ForSequenceClassification, num_labels=num_labels)
    assert model(**inputs_of(CoLT5ForSequenceClassification), labels=labels).loss.isfinite()


def caches_of(config, kind: str, rows: int):
    """A cache of a kind that holds nothing, for documents of 12 tokens."""
    sizes = config.get_text_config(decoder=True)
    if kind == "dynamic":
        return EncoderDecoderCache(DynamicCache(config=sizes), DynamicCache(config=sizes))
    return EncoderDecoderCache(StaticCache(sizes, max_cache_len=9), StaticCache(sizes, max_cache_len=12))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("causal", CAUSAL)
def test_a_mask_covers_the_cached_tokens_too(causal, kind):
    model = shallow_model(**CAUSAL[causal])
    inputs = inputs_of(CoLT5ForConditionalGeneration)
    ids, inputs["decoder_input_ids"] = random_ids(2, 1), random_ids(2, 4)
    inputs["cache"] = caches_of(model.config, kind, 2)
    output = model(**inputs)
    inputs |= {"cache": output.cache, "decoder_input_ids": ids}
    for columns in (3, 4, 6):
        with pytest.raises(ValueError, match="decoder_attention_mask has shape"):
            model(**inputs, decoder_attention_mask=ones(2, columns))
    if causal == "full":
        with pytest.raises(ValueError, match="decoder_attention_mask has shape"):
            model(**inputs, decoder_attention_mask=ones(2, 1))
    assert model(**inputs, decoder_attention_mask=ones(2, 5)).logits.isfinite().all()


@pytest.mark.parametrize("causal", CAUSAL)
def test_a_cache_of_other_rows_is_refused(causal):
    model = shallow_model(**CAUSAL[causal])
    one, two = inputs_of(CoLT5ForConditionalGeneration, rows=1), inputs_of(CoLT5ForConditionalGeneration)
    with pytest.raises(ValueError, match=r"cache \(or past_key_values\)"):
        model(**two, cache=model(**one).cache)


@pytest.mark.parametrize("causal", CAUSAL)
def test_every_form_of_encoder_outputs_is_the_same(causal):
    model = shallow_model(**CAUSAL[causal])
    inputs = inputs_of(CoLT5ForConditionalGeneration)
    want = model(**inputs).logits
    states = model.encoder(inputs.pop("input_ids"), inputs["attention_mask"]).last_hidden_state
    for given in (
        BaseModelOutput(last_hidden_state=states),
        {"last_hidden_state": states},
        {"last_hidden_state": states, "pooler_output": states},
        (states, None, None),
        [states],
        states,
        states.double(),
    ):
        got = model(encoder_outputs=given, **inputs)
        torch.testing.assert_close(got.logits, want)


def test_generation_takes_every_form_of_encoder_outputs_and_leaves_it_as_it_was():
    model, ids = shallow_model(), random_ids(2, 12)
    settings = {"max_new_tokens": 3, "num_beams": 2, "num_return_sequences": 2, "attention_mask": ones(2, 12)}
    want = model.generate(ids, **settings)
    encoded = model.encoder(ids, ones(2, 12))
    states = encoded.last_hidden_state
    for given in (encoded, encoded, {"last_hidden_state": states}, [states], states):
        torch.testing.assert_close(model.generate(encoder_outputs=given, **settings), want)
    assert encoded.last_hidden_state.shape == (2, 12, 32)


@pytest.mark.parametrize("given", ["text", (), {"hidden": 1}, (None,), 3, ones(2, 12, 32)], ids=str)
def test_other_encoder_outputs_are_refused_by_name(given):
    inputs = inputs_of(CoLT5ForConditionalGeneration) | {"input_ids": None}
    with pytest.raises((TypeError, ValueError), match="encoder_outputs"):
        shallow_model()(encoder_outputs=given, **inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_embeddings_of_another_dtype_are_taken_to_the_models(dtype):
    model = shallow_model(dtype=torch.bfloat16)
    embeds = torch.randn(2, 12, 32).to(dtype)
    own = embeds.to(torch.bfloat16)
    got = model(inputs_embeds=embeds, decoder_inputs_embeds=embeds)
    want = model(inputs_embeds=own, decoder_inputs_embeds=own)
    assert_same_but_for_rounding(got.logits, want.logits)


def test_embeddings_of_integers_are_refused_by_name():
    with pytest.raises(TypeError, match="inputs_embeds"):
        shallow_model(CoLT5EncoderModel)(inputs_embeds=ones(2, 3, 32))


@pytest.mark.parametrize("model_class", ALL)
def test_nothing_at_all_is_refused_by_name(model_class):
    model, inputs = shallow_model(model_class), inputs_of(model_class)
    for name in (name for name in inputs if name.endswith("input_ids")):
        for empty in (random_ids(2, 0), random_ids(0, 5)):
            for mask in (None, torch.ones_like(empty)):
                with pytest.raises(ValueError, match=f"^{name} has shape"):
                    model(**inputs | {name: empty} | ({} if name != "input_ids" else {"attention_mask": mask}))


@pytest.mark.parametrize("model_class", [CoLT5ForConditionalGeneration, CoLT5ForCausalLM])
def test_generation_from_no_row_is_refused_by_name(model_class):
    with pytest.raises(ValueError, match="input_ids"):
        shallow_model(model_class).generate(random_ids(0, 5), max_new_tokens=2)


@pytest.mark.parametrize("model_class", ALL)
def test_a_configuration_may_ask_for_tuples(model_class):
    inputs = inputs_of(model_class)
    model = shallow_model(model_class)
    want = model(**inputs, output_hidden_states=True).to_tuple()
    model.config.return_dict = False
    got = model(**inputs, output_hidden_states=True)
    assert isinstance(got, tuple) and len(got) == len(want)
    torch.testing.assert_close(got[0], want[0])
    assert not isinstance(model(**inputs, return_dict=True), tuple)
    if model_class in (CoLT5ForConditionalGeneration, CoLT5ForCausalLM):
        tokens = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=2)
        assert tokens.shape[0] == 2


@pytest.fixture
def said():
    """What is warned of, each time."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


@pytest.mark.parametrize("model_class", ALL)
def test_packed_texts_are_refused_by_name(model_class, said):
    model, inputs = shallow_model(model_class), inputs_of(model_class, rows=1)
    packed = torch.arange(12)[None] % 6
    lengths = torch.tensor([0, 6, 12])
    for name, value in (("cu_seq_lens_q", lengths), ("cu_seqlens", lengths), ("seq_idx", packed // 6)):
        with pytest.raises(ValueError, match=name):
            model(**inputs, **{name: value})
    with pytest.raises(ValueError, match="position_ids is given without attention_mask"):
        model(**inputs | {"attention_mask": None}, position_ids=packed)
    model(**inputs | {"attention_mask": None}, position_ids=None, cu_seq_lens_q=None, seq_idx=None, head_mask=None)
    assert not said


@pytest.mark.parametrize("model_class", ALL)
def test_what_is_not_read_is_said_once(model_class, said):
    model, inputs = shallow_model(model_class), inputs_of(model_class)
    unread = {
        "position_ids": torch.arange(12)[None],
        "token_type_ids": ones(2, 12),
        "atention_mask": ones(2, 12),
        "output_hidden_state": True,
    }
    want = model(**inputs)[0]
    for _ in range(2):
        torch.testing.assert_close(model(**inputs, **unread)[0], want)
    texts = [str(warning.message) for warning in said]
    assert len(texts) == 4
    for name in unread:
        assert sum(f" {name} " in text for text in texts) == 1
    assert "attention_mask" in texts[2] and "output_hidden_states" in texts[3]


@pytest.mark.parametrize("model_class", [CoLT5EncoderModel, CoLT5Model, CoLT5ForCausalLM])
def test_missing_attentions_are_said(model_class, said):
    model, inputs = shallow_model(model_class), inputs_of(model_class)
    model(**inputs, output_attentions=True)
    assert said and all("eager" in str(warning.message) for warning in said)
    said.clear()
    model(**inputs, output_attentions=True)
    shallow_model(model_class, attn_implementation="eager")(**inputs, output_attentions=True)
    assert not said


def test_signatures_do_not_name_what_is_not_read():
    for model_class in ALL:
        assert not {"position_ids", "token_type_ids"} & set(inspect.signature(model_class.forward).parameters)


@pytest.mark.parametrize("model_class", ALL)
def test_forwards_say_which_flags_they_read(model_class):
    """In the annotation of their further arguments, where Transformers' tests and type checkers look."""
    flags = inspect.signature(model_class.forward).parameters["kwargs"].annotation.__args__[0].__annotations__
    assert {"output_attentions", "output_hidden_states", "output_routing", "return_dict"} <= flags.keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shallow_model(model_class)(**inputs_of(model_class), **dict.fromkeys(flags, False))


@pytest.mark.parametrize("model_class", [CoLT5EncoderModel, CoLT5Model])
def test_heavy_attentions_can_be_asked_for_alone(model_class):
    model = tiny_model(model_class, attn_implementation="eager")
    output = model(**inputs_of(model_class), output_heavy_attentions=True)
    prefix = "encoder_" if model_class is CoLT5Model else ""
    assert len(output[f"{prefix}heavy_attentions"]) == 2 and f"{prefix}attentions" not in output
