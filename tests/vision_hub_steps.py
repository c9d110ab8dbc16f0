"""What the test of saving models over pictures does without the package: `python vision_hub_steps.py OUT FOLDER`."""

import importlib
import sys

import hub_steps
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline


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


if __name__ == "__main__":
    without_the_package(*sys.argv[1:])
