"""Jobs in which nothing is wrong: no warning of ours from generation, adapters, pipelines or Trainer."""

import warnings

import pytest
import torch
from datasets import Dataset
from models import pad, random_ids, tiny_model
from transformers import Trainer, TrainingArguments, pipeline

from modeling_colt5 import (
    CoLT5EncoderModel,
    CoLT5ForCausalLM,
    CoLT5ForConditionalGeneration,
    CoLT5ForSequenceClassification,
    CoLT5ForTokenClassification,
    CoLT5Tokenizer,
)

MODELS = {
    "encoder-decoder": (CoLT5ForConditionalGeneration, {}),
    "routed encoder-decoder": (CoLT5ForConditionalGeneration, {"causal_attention": "routed", "causal_window": 4}),
    "causal": (CoLT5ForCausalLM, {}),
    "routed causal": (CoLT5ForCausalLM, {"causal_attention": "routed", "causal_window": 4}),
}


@pytest.fixture(autouse=True)
def no_warnings_of_ours():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="modeling_colt5")
        # of a cache under its older name, in whoever's name it is said
        warnings.filterwarnings("error", message="`past_key_values` is deprecated")
        yield


def batch() -> dict[str, torch.Tensor]:
    return pad([random_ids(9), random_ids(6)], side="left")


@pytest.mark.parametrize(
    "model_class", [CoLT5ForConditionalGeneration, CoLT5ForCausalLM, CoLT5EncoderModel, CoLT5ForTokenClassification]
)
def test_dummy_inputs_are_read(model_class):
    model = tiny_model(model_class)
    assert model(**model.dummy_inputs)[0].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_generation_of_every_kind(name):
    model_class, fields = MODELS[name]
    model, inputs = tiny_model(model_class, num_decoder_layers=1, **fields), batch()
    for settings in (
        {"num_beams": 2, "output_hidden_states": True, "return_dict_in_generate": True},
        {"do_sample": True, "cache_implementation": "static", "disable_compile": True},
        {"use_cache": False},
    ):
        model.generate(**inputs, max_new_tokens=2, **settings)
    row = {key: value[:1] for key, value in inputs.items()}
    model.generate(**row, max_new_tokens=3, assistant_model=model)
    model.generate(**row, max_new_tokens=3, prompt_lookup_num_tokens=2)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], max_new_tokens=2)
    letters = [(letter, -1.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    tokenizer = CoLT5Tokenizer([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], extra_ids=0)
    for further in ({}, {"num_beams": 2}, {"assistant_tokenizer": tokenizer}):
        model.generate(**inputs, max_new_tokens=3, stop_strings=["xyz"], tokenizer=tokenizer, **further)


@pytest.mark.parametrize("adapter", ["LoraConfig", "PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
@pytest.mark.parametrize("name", ["encoder-decoder", "causal"])
def test_adapters(name, adapter):
    peft = pytest.importorskip("peft")
    model_class, fields = MODELS[name]
    prompts = {"num_virtual_tokens": 3, "num_layers": 3, "token_dim": 32, "num_attention_heads": 4}
    own = {"target_modules": ["q", "v"]} if adapter == "LoraConfig" else prompts
    task = "CAUSAL_LM" if name == "causal" else "SEQ_2_SEQ_LM"
    model = peft.get_peft_model(tiny_model(model_class, **fields), getattr(peft, adapter)(task_type=task, **own))
    inputs = batch()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    model.eval().generate(**inputs, max_new_tokens=3, num_beams=2)


@pytest.mark.parametrize(
    ("name", "settings"), [("causal", {}), ("encoder-decoder", {"num_layers": 3})], ids=["causal", "encoder-decoder"]
)
def test_prefixes_are_as_deep_as_the_decoder(name, settings):
    """A causal model says so itself; PEFT takes the encoder's depth of an encoder-decoder that is told nothing."""
    peft = pytest.importorskip("peft")
    task = "CAUSAL_LM" if name == "causal" else "SEQ_2_SEQ_LM"
    model = tiny_model(MODELS[name][0], num_layers=1, num_decoder_layers=3)
    model = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3, **settings))
    inputs = batch()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad.any() for parameter in model.prompt_encoder.parameters())


@pytest.mark.parametrize("adapter", ["PromptTuningConfig", "PrefixTuningConfig"])
@pytest.mark.parametrize("name", ["encoder-decoder", "causal"])
def test_prompts_and_prefixes_are_read_by_generation(name, adapter):
    """As by whole passes over the tokens so far, each of which begins with them."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    task = "CAUSAL_LM" if name == "causal" else "SEQ_2_SEQ_LM"
    prompts = {"num_virtual_tokens": 3, "num_layers": 3, "token_dim": 32, "num_attention_heads": 4}
    settings = getattr(peft, adapter)(task_type=task, **prompts)
    ids = random_ids(2, 9)
    model = peft.get_peft_model(tiny_model(MODELS[name][0]), settings).eval()
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_()
        tokens = ids if name == "causal" else torch.zeros(2, 1, dtype=torch.int64)
        for _ in range(5):
            inputs = {"input_ids": tokens} if name == "causal" else {"input_ids": ids, "decoder_input_ids": tokens}
            logits = model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"])).logits[:, -1]
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    mask = torch.ones_like(ids)
    generated = model.generate(input_ids=ids, attention_mask=mask, min_new_tokens=5, max_new_tokens=5, eos_token_id=96)
    assert torch.equal(generated, tokens)


@pytest.mark.parametrize(
    ("task", "model_class", "settings"),
    [
        ("feature-extraction", CoLT5EncoderModel, {}),
        ("text-classification", CoLT5ForSequenceClassification, {}),
        ("zero-shot-classification", CoLT5ForSequenceClassification, {"candidate_labels": ["a", "b"]}),
        ("token-classification", CoLT5ForTokenClassification, {}),
        ("token-classification", CoLT5ForTokenClassification, {"aggregation_strategy": "simple"}),
        ("text-generation", CoLT5ForCausalLM, {"max_new_tokens": 2}),
        ("text-generation", CoLT5ForCausalLM, {"max_new_tokens": 2, "do_sample": True, "num_return_sequences": 2}),
    ],
)
def test_pipelines(task, model_class, settings):
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581a", -1.0), ("\u2581b", -1.0)]
    tokenizer = CoLT5Tokenizer(vocabulary, extra_ids=0)
    model = tiny_model(model_class, label2id={"entailment": 0, "contradiction": 1})
    run = pipeline(task, model=model, tokenizer=tokenizer, device="cpu")
    assert len(run(["a b a", "b"], batch_size=2, **settings)) == 2


@pytest.mark.parametrize("model_class", [CoLT5ForConditionalGeneration, CoLT5ForCausalLM, CoLT5ForTokenClassification])
def test_trainer_leaves_out_columns_that_are_not_read(model_class, tmp_path):
    ones = [1] * 9
    extra = {"token_type_ids": ones, "position_ids": ones, "seq_idx": ones, "text": "a"}
    rows = Dataset.from_list([{"input_ids": random_ids(9).tolist(), "labels": ones, **extra} for _ in range(2)])
    arguments = TrainingArguments(tmp_path, report_to=[], use_cpu=True, disable_tqdm=True, max_steps=1)
    trainer = Trainer(tiny_model(model_class), arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
