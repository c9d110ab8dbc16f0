"""Saved folders carry their code: every Auto class loads them, with the package, without it, and beside it."""

import json
import logging
import os
import shutil
from pathlib import Path

import hub_steps
import pytest
import torch
from transformers import logging as transformers_logging

import modeling_colt5
from modeling_colt5 import CoLT5Config, CoLT5Tokenizer

PACKAGE = hub_steps.ROOT / "modeling_colt5"


def make_folder(folder: Path, seed: int) -> Path:
    """A small encoder–decoder and its tokenizer, saved with nothing but `save_pretrained`."""
    torch.manual_seed(seed)
    modeling_colt5.CoLT5ForConditionalGeneration(CoLT5Config(**hub_steps.SIZES)).save_pretrained(folder)
    CoLT5Tokenizer(vocab=hub_steps.PIECES).save_pretrained(folder)
    return folder


def weights_without_code(where: str, folder: Path) -> Path:
    """A copy whose map of Auto classes names another repository's code, as other tools write it."""
    copy = folder / "weights-CoLT5ForConditionalGeneration"
    copy.mkdir()
    shutil.copy(Path(where, "model.safetensors"), copy)
    config = json.loads(Path(where, "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {
        name: f"{where}--{reference}" for name, reference in config["auto_map"].items() if name != "AutoTokenizer"
    }
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return copy


@pytest.mark.parametrize("name", hub_steps.AUTO_CLASSES.values())
def test_each_head_saves_weights_config_and_code(name, tmp_path):
    config = CoLT5Config(**hub_steps.SIZES)
    getattr(modeling_colt5, name)(config).save_pretrained(tmp_path)
    code = hub_steps.closure("modeling_colt5")
    assert {"configuration_colt5.py", "tokenization_colt5.py"} < code
    others = {"config.json", "model.safetensors"}
    if name in hub_steps.GENERATING:
        others.add("generation_config.json")
    assert {path.name for path in tmp_path.iterdir()} == code | others
    for file in code:
        assert (tmp_path / file).read_bytes() == (PACKAGE / file).read_bytes()
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert saved["architectures"] == [name]
    models = {auto_class: f"modeling_colt5.{head}" for auto_class, head in hub_steps.AUTO_CLASSES.items()}
    if name not in ("CoLT5Model", "CoLT5ForConditionalGeneration"):
        models["AutoModel"] = "modeling_colt5.CoLT5EncoderModel"
    assert saved["auto_map"] == models | {
        "AutoConfig": "configuration_colt5.CoLT5Config",
        "AutoTokenizer": ["tokenization_colt5.CoLT5Tokenizer", None],
    }


def test_tokenizer_alone_saves_its_code(tmp_path):
    CoLT5Tokenizer(vocab=hub_steps.PIECES).save_pretrained(tmp_path)
    code = hub_steps.closure("tokenization_colt5")
    assert {path.name for path in tmp_path.iterdir()} == code | {"tokenizer.json", "tokenizer_config.json"}
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert saved["auto_map"] == {"AutoTokenizer": ["tokenization_colt5.CoLT5Tokenizer", None]}


@pytest.mark.parametrize("auto_class", hub_steps.OF_ONE_CHECKPOINT)
def test_report_names_the_heads_own_weights_and_no_others(auto_class, tmp_path, caplog):
    folder = make_folder(tmp_path, seed=1)
    transformers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING, logger="transformers"):
            hub_steps.load(auto_class, str(folder))
    finally:
        transformers_logging.disable_propagation()
    cells = [line.split("|") for line in caplog.text.splitlines() if line.count("|") == 2]
    rows = {name.strip(): status.strip() for name, status, _ in cells if name.strip() != "Key"}
    assert rows == dict.fromkeys(hub_steps.OWN_WEIGHTS.get(auto_class, set()), "MISSING")


# every head, saved and loaded in processes of their own: eighteen seconds
@pytest.mark.slow
def test_code_goes_round_with_and_without_the_package(tmp_path):
    first = str(make_folder(tmp_path / "first", seed=1))
    other = str(make_folder(tmp_path / "other", seed=2))
    second = str(tmp_path / "second")
    home = tmp_path / "home"
    environment = {**os.environ, "HF_HOME": str(home)}

    by_package = hub_steps.load_all(first, "modeling_colt5")
    by_code = hub_steps.run_step(
        "code_only", first, second, str(weights_without_code(first, tmp_path)), environment=environment
    )
    tuned = by_code.pop("fine-tuned")
    hub_steps.assert_equal(by_code, by_package)

    shutil.rmtree(first)
    shutil.rmtree(home)
    by_code = hub_steps.run_step("next_round", second, other, environment=environment)
    hub_steps.assert_equal({"tuned": by_code[f"{second}/AutoModelForSeq2SeqLM"]}, {"tuned": tuned})
    for where in (second, other):
        by_package = hub_steps.load_all(where, "modeling_colt5")
        hub_steps.assert_equal({name: by_code.pop(f"{where}/{name}") for name in by_package}, by_package)
    assert not by_code
