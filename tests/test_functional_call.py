"""`torch.func.functional_call` with a model's parameters: the model stays as it was, and gradients are backward's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import ENCODER_HEADS, random_ids, shallow_model
from rounding import assert_same_but_for_rounding
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils import parametrize

from modeling_colt5 import CoLT5EncoderModel, CoLT5ForCausalLM, CoLT5ForConditionalGeneration, CoLT5Model

Slots = list[tuple[nn.Module, str, torch.Tensor]]


def inputs_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A call's arguments, with those of a decoder where there is one."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    inputs = {"input_ids": random_ids(2, 9)}
    return inputs | ({"decoder_input_ids": random_ids(2, 4)} if {"encoder", "decoder"} <= names else {})


def slots(model: nn.Module) -> Slots:
    """Every place of a parameter, and what stands in it."""
    return [(module, name, tensor) for module in model.modules() for name, tensor in module._parameters.items()]


def assert_unchanged(before: Slots) -> None:
    assert all(module._parameters[name] is tensor for module, name, tensor in before)


class Loss(nn.Module):
    """A module of a user's around a model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.model(**inputs)[0].square().mean(),)


class Twice(nn.Module):
    """A parametrisation."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def adapted(**options: Any) -> Callable[[nn.Module], nn.Module]:
    """What gives a model an adapter."""

    def adapt(model: nn.Module) -> nn.Module:
        peft = pytest.importorskip("peft")
        return peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "target_modules": ["q"]} | options))

    return adapt


def resized(model: Any) -> Any:
    model.resize_token_embeddings(99)
    return model


def parametrised(model: Any) -> Any:
    parametrize.register_parametrization(model.shared, "weight", Twice())
    return model


WAYS: dict[str, Callable[[Any], Any]] = {
    "plain": lambda model: model,
    "resized": resized,
    "within another module": Loss,
    "parametrised": parametrised,
    "products for shared": adapted(target_modules=["q", "shared"]),
    "products for a stack's name": adapted(target_modules=["q", "embed_tokens"]),
    "saved": adapted(modules_to_save=["embed_tokens"]),
    "trained tokens": adapted(trainable_token_indices=[4, 5]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning:peft")
def test_a_changed_models_parameters_stay(is_tied: bool, way: str) -> None:
    model = WAYS[way](shallow_model(tie_word_embeddings=is_tied))
    before = slots(model)
    inputs = inputs_of(model)
    with torch.no_grad():
        functional_call(model, dict(model.named_parameters()), (), inputs)
        assert_unchanged(before)
        tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        functional_call(model, tensors, (), inputs, strict=True)
    assert_unchanged(before)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize(
    "model_class", [CoLT5ForConditionalGeneration, CoLT5ForCausalLM, CoLT5Model, CoLT5EncoderModel, *ENCODER_HEADS]
)
def test_parameters_stay_and_gradients_are_backwards(model_class: Any, is_tied: bool) -> None:
    model = shallow_model(model_class, tie_word_embeddings=is_tied)
    before = slots(model)
    inputs = inputs_of(model)

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional_call(model, parameters, (), inputs)[0].square().mean()

    gradients = grad(loss)({name: parameter.detach() for name, parameter in model.named_parameters()})
    assert_unchanged(before)
    model(**inputs)[0].square().mean().backward()
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        # the same operations in fp32, and sums that nearly cancel
        torch.testing.assert_close(gradients[name], expected, rtol=1e-5, atol=1e-7)


def test_another_embedding_acts_on_both_stacks() -> None:
    model, other = shallow_model(), shallow_model()
    other.load_state_dict(model.state_dict())
    weight = torch.randn_like(model.shared.weight)
    with torch.no_grad():
        other.shared.weight.copy_(weight)
    inputs = inputs_of(model)
    with torch.no_grad():
        changed = functional_call(model, {"shared.weight": weight}, (), inputs).logits
        assert_same_but_for_rounding(changed, other(**inputs).logits)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning:transformers")
def test_an_ensembles_rows_are_its_models() -> None:
    models = [shallow_model(CoLT5EncoderModel) for _ in range(2)]
    parameters, buffers = stack_module_state(models)  # type: ignore[arg-type]
    before = slots(models[0])
    inputs = inputs_of(models[0])

    def call(state: Any) -> torch.Tensor:
        return functional_call(models[0], state, (), inputs).last_hidden_state

    with torch.no_grad():
        rows = vmap(call)((parameters, buffers))
        for row, model in zip(rows, models, strict=True):
            # products of both at once, whose sums have another order
            torch.testing.assert_close(row, model(**inputs).last_hidden_state, rtol=1e-4, atol=1e-4)
    assert_unchanged(before)


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_state_dict_is_refused_where_names_are_checked(is_tied: bool) -> None:
    """It has the embedding under all its names, each with a tensor of its own."""
    model = shallow_model(tie_word_embeddings=is_tied)
    before = slots(model)
    with pytest.raises(ValueError if is_tied else RuntimeError, match="multiple values|Unexpected key"):
        functional_call(model, model.state_dict(), (), inputs_of(model), strict=True)
    assert_unchanged(before)


@pytest.mark.xfail(reason="PyTorch puts the tensors of several names back in the order in which it took them")
def test_a_module_with_two_names_gets_its_tensor_back() -> None:
    """The cause of a limit that docs/limits.md names, without a model of ours. Once this passes, it can go there."""
    model = nn.ModuleDict({"one": nn.Linear(2, 2)})
    model["other"] = model["one"]
    model.forward = lambda states: states  # type: ignore[method-assign]
    before = slots(model)
    functional_call(model, model.state_dict(), (torch.ones(2),), tie_weights=False)
    assert_unchanged(before)
