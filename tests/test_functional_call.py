"""`torch.func.functional_call` with all parameters: what docs/limits.md says to pass leaves the model as it was."""

from typing import Any

import pytest
import torch
from models import ENCODER_HEADS, random_ids, tiny_model
from torch.func import functional_call, grad

from modeling_colt5 import CoLT5EncoderModel, CoLT5ForCausalLM, CoLT5ForConditionalGeneration, CoLT5Model


@pytest.mark.parametrize("is_resized", [False, True])
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize(
    "model_class", [CoLT5ForConditionalGeneration, CoLT5ForCausalLM, CoLT5Model, CoLT5EncoderModel, *ENCODER_HEADS]
)
def test_parameters_stay_and_gradients_are_backwards(model_class: Any, is_tied: bool, is_resized: bool) -> None:
    model = tiny_model(model_class, tie_word_embeddings=is_tied)
    if is_resized:
        model.resize_token_embeddings(99)
    before = dict(model.named_parameters(remove_duplicate=False))
    inputs = {"input_ids": random_ids(2, 9)}
    if hasattr(model, "encoder") and hasattr(model, "decoder"):
        inputs["decoder_input_ids"] = random_ids(2, 4)

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        if is_tied and hasattr(model, "lm_head"):
            parameters = {**parameters, "lm_head.weight": parameters["shared.weight"]}
        return functional_call(model, parameters, (), inputs, tie_weights=False)[0].square().mean()

    gradients = grad(loss)({name: parameter.detach() for name, parameter in model.named_parameters()})
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    model(**inputs)[0].square().mean().backward()
    for name, parameter in model.named_parameters():
        # the same operations
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradients[name], expected, rtol=1e-5, atol=1e-7)
