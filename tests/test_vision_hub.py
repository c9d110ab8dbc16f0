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
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

AUTO_MAP = {
    "AutoConfig": "configuration_colt5_vision.CoLT5VisionConfig",
    "AutoModel": "modeling_colt5_vision.CoLT5VisionModel",
    "AutoModelForImageClassification": "modeling_colt5_vision.CoLT5ForImageClassification",
}


def picture() -> torch.Tensor:
    return torch.linspace(0, 255, 3 * 30 * 21).view(3, 30, 21).to(torch.uint8)


def read(model: torch.nn.Module, folder: str) -> torch.Tensor:
    batch = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)(picture(), return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**batch)[0].clone()


def without_the_package(out: str, folder: str) -> None:
    """In a process of its own: the Auto classes, the pipeline, a step of training, and one more round."""
    hub_steps.Hidden(["modeling_colt5", "triton", "torchao"])
    outputs = {}
    for auto_class in (AutoModel, AutoModelForImageClassification):
        model = auto_class.from_pretrained(folder, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        outputs[auto_class.__name__] = read(model, folder)
    classify = pipeline("image-classification", model=folder, trust_remote_code=True)
    image = Image.fromarray(picture().permute(1, 2, 0).numpy())
    scores = {entry["label"]: entry["score"] for entry in classify(image)}
    outputs["pipeline"] = torch.tensor([scores[f"LABEL_{i}"] for i in range(5)]).log()
    batch = AutoImageProcessor.from_pretrained(folder)(picture(), return_tensors="pt")
    model.train()(**batch, labels=torch.tensor([1])).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.save_pretrained(f"{folder}/again")
    AutoImageProcessor.from_pretrained(folder).save_pretrained(f"{folder}/again")
    again = AutoModelForImageClassification.from_pretrained(f"{folder}/again", trust_remote_code=True)
    outputs["tuned"] = read(again, f"{folder}/again")
    torch.testing.assert_close(outputs["tuned"], read(model, folder), rtol=0, atol=1e-5)
    assert importlib.util.find_spec("modeling_colt5") is None and "modeling_colt5" not in sys.modules
    save_file(outputs, out)


def save(folder: Path) -> torch.nn.Module:
    from vision import tiny_vision_model

    torch.manual_seed(0)
    model = tiny_vision_model()
    model.save_pretrained(folder)
    model.config.image_processor().save_pretrained(folder)
    return model


def test_a_folder_holds_weights_configuration_and_code(tmp_path):
    save(tmp_path)
    code = hub_steps.closure("modeling_colt5_vision")
    assert {"configuration_colt5_vision.py", "op_window_attention.py"} < code
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


# a process that imports everything anew
@pytest.mark.slow
def test_code_goes_round_without_the_package(tmp_path):
    folder = tmp_path / "model"
    model = save(folder)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(hub_steps.ROOT)}
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path / "out.safetensors"), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    outputs = load_file(tmp_path / "out.safetensors")
    expected = {
        "AutoModel": read(AutoModel.from_pretrained(folder), str(folder)),
        "AutoModelForImageClassification": read(model, str(folder)),
        "pipeline": read(model, str(folder))[0].log_softmax(0),
        "tuned": read(AutoModelForImageClassification.from_pretrained(folder / "again"), str(folder)),
    }
    hub_steps.assert_equal(outputs, expected)


if __name__ == "__main__":
    without_the_package(*sys.argv[1:])
