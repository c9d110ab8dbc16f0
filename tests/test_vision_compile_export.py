"""torch.compile without a graph break, and torch.export, of a classifier of pictures.

Tracing takes some seconds a model, so all of it is slow.
"""

import pytest
import torch
from vision import pad_pictures, tiny_vision_model


class Logits(torch.nn.Module):
    """Tensors in, tensors out."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values, pixel_mask=pixel_mask).logits


@pytest.fixture(params=["torch", "triton"])
def model_and_pictures(request, device):
    """With PyTorch's operations, and with kernels, whose operators are opaque to the tracers: in interpreter mode on
    the CPU. Two pictures of different sizes in one batch, one of them no multiple of the patch."""
    torch.manual_seed(0)
    model = Logits(tiny_vision_model(num_layers=1, kernel_backend=request.param))
    batch = pad_pictures([torch.randn(3, 40, 52), torch.randn(3, 22, 31)], 40, 52)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    return model.eval().to(device), (batch["pixel_values"], batch["pixel_mask"])


@pytest.mark.slow
@torch.no_grad()
def test_an_exported_classifier_gives_the_same_logits(model_and_pictures):
    model, inputs = model_and_pictures
    program = torch.export.export(model, inputs).module()
    # here and below: tracers put some operations together, which takes fp32 sums in another order
    torch.testing.assert_close(program(*inputs), model(*inputs), rtol=1e-5, atol=1e-6)
    # of other pictures and another padding too
    others = pad_pictures([torch.randn(3, 17, 52), torch.randn(3, 40, 9)], 40, 52)
    others = tuple(others[name].to(inputs[0].device) for name in ("pixel_values", "pixel_mask"))
    torch.testing.assert_close(program(*others), model(*others), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@torch.no_grad()
def test_a_classifier_compiles_without_a_break(model_and_pictures):
    model, inputs = model_and_pictures
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_training_step_compiles_without_a_break(model_and_pictures):
    model, inputs = model_and_pictures
    model.train()
    weight = torch.randn(2, model.model.config.num_labels, device=inputs[0].device)
    (model(*inputs) * weight).sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    (torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs) * weight).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)
