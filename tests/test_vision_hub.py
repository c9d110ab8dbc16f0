"""Saved folders of models over pictures carry their code, and load without the package."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import hub_steps
import pytest
import torch
import vision_hub_steps
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageClassification
from vision import tiny_vision_model

import modeling_colt5

AUTO_MAP = {
    "AutoConfig": "configuration_colt5_vision.CoLT5VisionConfig",
    "AutoModel": "modeling_colt5_vision.CoLT5VisionModel",
    "AutoModelForImageClassification": "modeling_colt5_vision.CoLT5ForImageClassification",
}


def save(folder: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    model = tiny_vision_model()
    model.save_pretrained(folder)
    model.config.image_processor().save_pretrained(folder)
    return model


def test_a_folder_holds_weights_configuration_and_code(tmp_path):
    save(tmp_path)
    code = hub_steps.closure("modeling_colt5_vision")
    assert {"configuration_colt5_vision.py", "op_grid_attention_triton.py"} < code
    others = {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert {path.name for path in tmp_path.iterdir()} == code | others
    for file in code:
        assert (tmp_path / file).read_bytes() == (hub_steps.ROOT / "modeling_colt5" / file).read_bytes()
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert saved["auto_map"] == AUTO_MAP and saved["model_type"] == "colt5_vision"
    # the processor is Transformers' own, and needs no code
    assert "auto_map" not in json.loads((tmp_path / "preprocessor_config.json").read_text(encoding="utf-8"))


def test_code_for_text_does_not_travel_with_that_for_pictures():
    assert not {name for name in hub_steps.closure("modeling_colt5") if "vision" in name or "window" in name}


USERS_CODE = """from modeling_colt5 import CoLT5Config, CoLT5ForImageClassification
from modeling_colt5.model_layers import CoLT5LayerNorm


class DoubleClassifier(CoLT5ForImageClassification):
    def forward(self, pixel_values, pixel_mask=None, **kwargs):
        return {"logits": 2 * super().forward(pixel_values, pixel_mask, **kwargs).logits}


DoubleClassifier.register_for_auto_class("AutoModelForImageClassification")
"""


@pytest.mark.slow
def test_a_users_class_is_saved_with_imports_of_the_copies(tmp_path, monkeypatch):
    (tmp_path / "double_pictures.py").write_text(USERS_CODE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    users = importlib.import_module("double_pictures").DoubleClassifier
    model = users(tiny_vision_model().config).eval()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    saved = (folder / "double_pictures.py").read_text(encoding="utf-8")
    assert "from .modeling_colt5_vision import CoLT5Config, CoLT5ForImage" in saved
    assert "from .model_layers import" in saved
    copies = importlib.import_module("modeling_colt5.modeling_colt5_vision")
    assert {name for name in modeling_colt5.__all__ if not hasattr(copies, name)} == {"show_routing"}
    loaded = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    assert type(loaded).__name__ == "DoubleClassifier" and type(loaded) is not users
    pixels = torch.randn(1, 3, 9, 10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded.eval()(pixels)["logits"], model(pixels)["logits"], rtol=0, atol=1e-5)


# a process that imports everything anew
@pytest.mark.slow
def test_code_goes_round_without_the_package(tmp_path):
    folder = tmp_path / "model"
    model = save(folder)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(hub_steps.ROOT)}
    done = subprocess.run(
        [sys.executable, vision_hub_steps.__file__, str(tmp_path / "out.safetensors"), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    outputs = load_file(tmp_path / "out.safetensors")
    expected = {
        "AutoModel": vision_hub_steps.read(AutoModel.from_pretrained(folder), str(folder)),
        "AutoModelForImageClassification": vision_hub_steps.read(model, str(folder)),
        "pipeline": vision_hub_steps.read(model, str(folder))[0].log_softmax(0),
        "tuned": vision_hub_steps.read(AutoModelForImageClassification.from_pretrained(folder / "again"), str(folder)),
    }
    hub_steps.assert_equal(outputs, expected)
