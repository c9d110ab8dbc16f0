"""Routing as a layer that the `kernels` package can replace, where Transformers uses the installed version of it."""

import pytest
import torch
import transformers
from models import pad, random_ids, tiny_model
from rounding import assert_same_but_for_rounding
from transformers.utils import is_kernels_available
from transformers.utils.import_utils import KERNELS_MAX_VERSION, KERNELS_MIN_VERSION

from modeling_colt5 import CoLT5EncoderModel, op_routing
from modeling_colt5.model_router import CoLT5Routing, CoLT5RoutingTriton, TritonLayers

needs_kernels = pytest.mark.skipif(
    not is_kernels_available(),
    reason=f"transformers {transformers.__version__} takes kernels from {KERNELS_MIN_VERSION} to below "
    f"{KERNELS_MAX_VERSION}, and no such one is installed",
)


def forwards(model: torch.nn.Module) -> set[object]:
    """The functions behind the forwards of the model's routing layers."""
    return {module.forward.__func__ for module in model.modules() if isinstance(module, CoLT5Routing)}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes that Triton's routing kernels were called with."""
    shapes = []
    launch = op_routing._route.launch

    def counted(scores, *arguments):
        shapes.append(scores.shape)
        launch(scores, *arguments)

    monkeypatch.setattr(op_routing._route, "launch", counted)
    return shapes


def test_the_layer_is_the_operation() -> None:
    scores, budget = torch.randn(2, 30), torch.tensor([3, 5])
    indices, weights, valid = CoLT5Routing()(scores, budget, 6, scores > -1, {"epsilon": 0.5})
    expected = op_routing.route(scores, budget, 6, mask=scores > -1, epsilon=0.5)
    assert torch.equal(indices, expected.indices)
    assert_same_but_for_rounding(weights, expected.weights)
    assert torch.equal(valid, expected.valid)


@needs_kernels
def test_use_kernels_puts_the_triton_kernels_in_place(device: torch.device, launches: list[torch.Size]) -> None:
    from kernels import use_kernel_mapping

    model = tiny_model(CoLT5EncoderModel, kernel_backend="torch").to(device)
    batch = {name: tensor.to(device) for name, tensor in pad([random_ids(40), random_ids(23)]).items()}
    expected = model(**batch).last_hidden_state
    assert not launches
    # where there is no GPU, the interpreter takes CPU tensors
    with use_kernel_mapping({"CoLT5Routing": {device.type: TritonLayers()}}):
        model.set_use_kernels(True)
        assert forwards(model) == {CoLT5RoutingTriton.forward}
        states = model(**batch).last_hidden_state
        # in a layer, queries and keys/values as one call, and the feed-forward
        assert len(launches) == 2 * model.config.num_layers
        # the weights may differ by 2e-6, and pass through two layers of unit size
        torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)
        # another mode looks for the layer again
        model.train()
        assert forwards(model) == {CoLT5RoutingTriton.forward}
        model(**batch).last_hidden_state.square().sum().backward()
    routers = [parameter.grad for name, parameter in model.named_parameters() if "router" in name]
    assert routers and all(gradient.abs().max() > 0 for gradient in routers)


@needs_kernels
def test_the_layer_takes_the_place_where_the_user_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels import Mode, kernelize, use_kernel_mapping

    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for mode in (Mode.INFERENCE, Mode.TRAINING, Mode.TRAINING | Mode.TORCH_COMPILE):
        model = tiny_model(CoLT5EncoderModel)
        assert forwards(model) == {CoLT5Routing.forward}
        # the import alone registers nothing
        assert forwards(kernelize(model, mode=mode, device="cuda")) == {CoLT5Routing.forward}
        with use_kernel_mapping({"CoLT5Routing": {"cuda": TritonLayers()}}):
            assert forwards(kernelize(model, mode=mode, device="cuda")) == {CoLT5RoutingTriton.forward}


@needs_kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="the model is on the CPU, for which nothing is registered")
def test_other_devices_keep_their_forward(launches: list[torch.Size]) -> None:
    model = tiny_model(CoLT5EncoderModel)
    model.set_use_kernels(True)
    assert forwards(model) == {CoLT5Routing.forward}
    model(**pad([random_ids(20)]))
    assert not launches
