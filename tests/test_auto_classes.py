"""What Auto classes make of every class's checkpoint, of a user's classes, and of a configuration saved alone."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import auto_steps
import hub_steps
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    pipeline,
)

import modeling_colt5
from modeling_colt5 import (
    CoLT5Config,
    CoLT5EncoderModel,
    CoLT5ForCausalLM,
    CoLT5ForConditionalGeneration,
    CoLT5ForSequenceClassification,
    CoLT5Model,
    CoLT5Tokenizer,
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """A folder with a checkpoint of every class, KIND/model, a user's among them."""
    root = tmp_path_factory.mktemp("checkpoints")
    package = root / "code_of_a_user"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "head_of_a_user.py").write_text(auto_steps.USERS_CODE, encoding="utf-8")
    (package / "scale_of_a_user.py").write_text("SCALE = 2.0\n", encoding="utf-8")
    sys.path.insert(0, str(root))
    try:
        users = importlib.import_module("code_of_a_user.head_of_a_user")
    finally:
        sys.path.remove(str(root))
    torch.manual_seed(0)
    tokenizer = CoLT5Tokenizer(vocab=hub_steps.PIECES)
    for kind in (*auto_steps.KINDS, "OtherScoreModel"):
        folder = root / kind / "model"
        getattr(modeling_colt5, kind, getattr(users, kind, None))(CoLT5Config(**hub_steps.SIZES)).save_pretrained(
            folder
        )
        tokenizer.save_pretrained(folder)
    users.TopicModel(users.TopicConfig(**hub_steps.SIZES, num_topics=5)).save_pretrained(root / "TopicModel/model")
    return root


@pytest.mark.parametrize("kind", auto_steps.KINDS)
def test_auto_classes_give_trained_weights_or_an_error(kind, checkpoints):
    auto_steps.check(kind, str(checkpoints / kind / "model"))


def test_configuration_saved_alone_makes_every_model(checkpoints):
    for kind in ("CoLT5ForConditionalGeneration", "CoLT5EncoderModel"):
        auto_steps.check_configuration_alone(str(checkpoints / kind / "model"))


@pytest.mark.slow
def test_users_classes_load_as_what_they_are(checkpoints):
    auto_steps.check_users(str(checkpoints))


# test_remote_code.py loads one checkpoint without the package in the normal run
@pytest.mark.slow
def test_the_same_without_the_package(checkpoints, tmp_path):
    done = subprocess.run(
        [sys.executable, auto_steps.__file__, str(checkpoints)],
        env={**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": str(hub_steps.ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_users_class_is_not_replaced_without_a_word(checkpoints):
    where = str(checkpoints / "ScoreModel/model")
    with pytest.raises(
        ValueError, match=r"names head_of_a_user\.ScoreModel for AutoModelForSequenceClassification.*trust"
    ):
        AutoModelForSequenceClassification.from_pretrained(where)
    # asked for by its name, or by an Auto class for which the user has none
    assert type(CoLT5ForSequenceClassification.from_pretrained(where)) is CoLT5ForSequenceClassification
    assert type(AutoModel.from_pretrained(where)) is CoLT5EncoderModel


def test_users_class_that_is_registered_here_is_the_one_that_loads(checkpoints):
    users = sys.modules["code_of_a_user.head_of_a_user"]
    try:
        AutoModelForSequenceClassification.register(CoLT5Config, users.ScoreModel, exist_ok=True)
        for kind in ("ScoreModel", "CoLT5EncoderModel"):
            loaded = AutoModelForSequenceClassification.from_pretrained(checkpoints / kind / "model")
            assert type(loaded) is users.ScoreModel
    finally:
        AutoModelForSequenceClassification.register(CoLT5Config, CoLT5ForSequenceClassification, exist_ok=True)


def test_saved_copy_of_a_users_code_imports_the_copies(checkpoints):
    folder = checkpoints / "ScoreModel/model"
    code = (folder / "head_of_a_user.py").read_text(encoding="utf-8")
    assert "from .modeling_colt5 import (" in code and "from .model_layers import" in code
    assert (checkpoints / "code_of_a_user/head_of_a_user.py").read_text(encoding="utf-8") == auto_steps.USERS_CODE
    # what a user's code may import from the package, the file of that name has; but for a tool of scripts and
    # notebooks, whose files do not travel
    models = importlib.import_module("modeling_colt5.modeling_colt5")
    of_pictures = {name for name in modeling_colt5.__all__ if "Image" in name or "Vision" in name}
    assert {name for name in modeling_colt5.__all__ if not hasattr(models, name)} == {"show_routing", *of_pictures}


@pytest.mark.parametrize("loaded_as", [CoLT5Model, CoLT5ForConditionalGeneration, CoLT5ForCausalLM])
def test_models_refuse_checkpoints_without_their_stacks(loaded_as, checkpoints):
    with pytest.raises(ValueError, match="was saved from CoLT5EncoderModel and has no decoder"):
        loaded_as.from_pretrained(checkpoints / "CoLT5EncoderModel/model")
    with pytest.raises(ValueError, match="from CoLT5ForConditionalGeneration and has other layers in its decoder"):
        CoLT5ForCausalLM.from_pretrained(checkpoints / "CoLT5ForConditionalGeneration/model")


def test_new_routers_and_further_layers_may_begin_anew(checkpoints):
    where = checkpoints / "CoLT5ForConditionalGeneration/model"
    for fields in ({"num_layers": 3}, {"routed_cross_key_values": 4}, {"causal_attention": "local"}):
        assert type(CoLT5ForConditionalGeneration.from_pretrained(where, **fields)) is CoLT5ForConditionalGeneration


def test_feature_extraction_pipeline(checkpoints):
    where = str(checkpoints / "CoLT5ForTokenClassification/model")
    extract = pipeline("feature-extraction", where)
    together = extract(hub_steps.TEXTS, batch_size=2, return_tensors=True)
    for text, padded in zip(hub_steps.TEXTS, together, strict=True):
        alone = extract(text, return_tensors=True)
        # sums of other lengths round differently
        torch.testing.assert_close(padded[:, : alone.shape[1]], alone, rtol=0, atol=1e-5)


def test_pipeline_of_a_whole_model_names_the_line_that_makes_an_encoder(checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = str(checkpoints / "CoLT5ForConditionalGeneration/model")
    with pytest.raises(ValueError, match="decoder_input_ids") as error:
        pipeline("feature-extraction", where)(hub_steps.TEXTS[0])
    line = "AutoModelForTextEncoding" + str(error.value).partition("AutoModelForTextEncoding")[2]
    eval(line, {"AutoModelForTextEncoding": AutoModelForTextEncoding})
    CoLT5Tokenizer.from_pretrained(where).save_pretrained("encoder")
    extract = pipeline("feature-extraction", "encoder")
    assert type(extract.model) is CoLT5EncoderModel
    assert extract(hub_steps.TEXTS[0], return_tensors=True).shape[-1] == hub_steps.SIZES["d_model"]


def test_sentence_transformers(checkpoints, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    for kind in ("CoLT5EncoderModel", "CoLT5ForSequenceClassification"):
        model = library.SentenceTransformer(str(checkpoints / kind / "model"), device="cpu")
        together = model.encode(hub_steps.TEXTS, convert_to_tensor=True)
        for text, padded in zip(hub_steps.TEXTS, together, strict=True):
            batch = model.tokenizer(text, return_tensors="pt")
            states = CoLT5EncoderModel.from_pretrained(checkpoints / kind / "model")(**batch).last_hidden_state
            torch.testing.assert_close(padded, states.mean(1)[0], rtol=0, atol=1e-5)
        model.save(str(tmp_path / kind))
        again = library.SentenceTransformer(str(tmp_path / kind), device="cpu")
        torch.testing.assert_close(again.encode(hub_steps.TEXTS, convert_to_tensor=True), together, rtol=0, atol=1e-6)
    whole = library.SentenceTransformer(str(checkpoints / "CoLT5ForConditionalGeneration/model"), device="cpu")
    with pytest.raises(ValueError, match="AutoModelForTextEncoding.from_pretrained"):
        whole.encode(hub_steps.TEXTS)


def test_configuration_of_an_encoder_says_so(tmp_path):
    CoLT5EncoderModel(CoLT5Config(**hub_steps.SIZES)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert saved["auto_map"]["AutoModel"] == "modeling_colt5.CoLT5EncoderModel"
    assert type(AutoModel.from_config(AutoConfig.from_pretrained(tmp_path))) is CoLT5EncoderModel
