"""Dropout by a seed: the kernels' and the reference's, alone and inside other kernels; and where layers use it."""

from collections.abc import Callable

import pytest
import torch
from models import random_ids, tiny_model
from rounding import assert_same_but_for_rounding
from torch import Tensor, nn

from modeling_colt5 import CoLT5EncoderModel
from modeling_colt5.model_layers import CoLT5Dropout
from modeling_colt5.op_dropout import draw_seeds, dropout, dropout_reference, kept_elements
from modeling_colt5.op_gelu import gated_gelu_reference
from modeling_colt5.op_rows import scatter_add_tokens

pytest.importorskip("triton")

from modeling_colt5.op_gelu_triton import gated_gelu_backward_into, gated_gelu_into  # noqa: E402
from modeling_colt5.op_norm_triton import norm_into  # noqa: E402
from modeling_colt5.op_rows_triton import combine_into  # noqa: E402


@pytest.fixture
def seed(device: torch.device) -> Tensor:
    torch.manual_seed(7)
    return draw_seeds(2, device)[1, :1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_drops_what_the_reference_drops(dtype: torch.dtype, seed: Tensor) -> None:
    # wider than a program's block
    states = torch.randn(2, 3, 1100, device=seed.device).to(dtype).requires_grad_()
    output = dropout(states, seed, 0.3, "triton")
    expected = dropout_reference(states, seed, 0.3)
    assert torch.equal(output == 0, expected == 0)
    assert_same_but_for_rounding(output, expected)
    grad = torch.randn(states.shape, device=seed.device).to(dtype)
    (found,) = torch.autograd.grad(output, states, grad)
    assert_same_but_for_rounding(found, dropout_reference(grad, seed, 0.3))


def test_the_reference_keeps_as_many_as_it_should_and_independent_ones() -> None:
    first, second = draw_seeds(2, torch.device("cpu"))[:, :1]
    size, rate = 400, 0.2
    kept = [kept_elements(seed, size, size, rate).double() for seed in (first, second)]
    # each of these is the mean of about 160,000 independent numbers: 6 standard deviations of it
    bound = 6 * (rate * (1 - rate)) ** 0.5 / size
    for own in kept:
        assert abs(own.mean().item() - (1 - rate)) < bound
    centred = [own - (1 - rate) for own in kept]
    neighbours = (
        centred[0] * centred[1],
        centred[0][1:] * centred[0][:-1],
        centred[0][:, 1:] * centred[0][:, :-1],
        centred[0] * centred[0].t().triu(1),
    )
    for product in neighbours:
        assert abs(product.mean().item()) < bound * (rate * (1 - rate)) ** 0.5


def test_philox_is_that_of_its_authors() -> None:
    # known answers of the Random123 library for 4 x 32 bits and 10 rounds: counter and key of zeros
    from modeling_colt5.op_dropout import _philox

    assert _philox(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)).item() == 0x6627E8D5


def test_gated_gelu_drops_forward_and_backward(seed: Tensor) -> None:
    gate, up, grad = torch.randn(3, 2, 4, 70, device=seed.device)
    output, grad_gate, grad_up = (torch.empty_like(gate) for _ in range(3))
    gated_gelu_into(gate, up, output, seed, 0.3)
    leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    expected = dropout_reference(gated_gelu_reference(*leaves), seed, 0.3)
    assert_same_but_for_rounding(output, expected.detach())
    gated_gelu_backward_into(grad, gate, up, grad_gate, grad_up, seed, 0.3)
    expected = torch.autograd.grad(expected, leaves, grad)
    for found, own in zip((grad_gate, grad_up), expected, strict=True):
        assert_same_but_for_rounding(found, own)
    # once more, with the result in the place of its gradient
    gated_gelu_backward_into(grad, gate, up, grad_gate, grad_up, seed, 0.3, grad)
    assert_same_but_for_rounding(grad, output)
    for found, own in zip((grad_gate, grad_up), expected, strict=True):
        assert_same_but_for_rounding(found, own)


@pytest.mark.parametrize("rows", [7, 64])
def test_sums_of_branches_drop_what_is_added(rows: int, seed: Tensor) -> None:
    device, d = seed.device, 48
    residual, light = torch.randn(2, 2, rows, d, device=device)
    heavy, weights = torch.randn(2, 3, d, device=device), torch.rand(2, 3, device=device)
    indices = torch.tensor([[0, 2, 5], [1, 2, rows - 1]], device=device)
    valid = torch.tensor([[True, True, True], [True, True, False]], device=device)
    slots = (light, heavy, indices, valid, weights)
    update, output, hidden, normed = (torch.empty_like(residual) for _ in range(4))
    combine_into(None, *slots, *[None] * 4, rows, update)
    expected = residual + dropout_reference(update, seed, 0.4)
    combine_into(residual, *slots, *[None] * 4, rows, output, seed, 0.4)
    assert_same_but_for_rounding(output, expected)
    rstd, scores = torch.empty(2, rows, device=device), torch.empty(2, 1, rows, device=device)
    norm, router = torch.rand(d, device=device), torch.randn(1, d, device=device)
    norm_into(residual, norm, router, 1e-6, None, normed, scores, rstd, *slots, hidden, seed, 0.4)
    assert_same_but_for_rounding(hidden, expected)
    mean = expected.square().mean(-1, keepdim=True)
    assert_same_but_for_rounding(normed, expected * (mean + 1e-6).rsqrt() * norm)


@pytest.mark.slow
def test_the_operator_passes_opcheck(seed: Tensor) -> None:
    inputs = (torch.randn(2, 5, device=seed.device, requires_grad=True), seed, 0.5)
    torch.library.opcheck(torch.ops.colt5.dropout.default, inputs)


def test_a_module_drops_by_its_seed_or_by_pytorch(seed: Tensor) -> None:
    module, states = CoLT5Dropout(0.5), torch.ones(4, 6, device=seed.device)
    assert torch.equal(module(states, seed), dropout_reference(states, seed, 0.5))
    torch.manual_seed(1)
    expected = nn.functional.dropout(states, 0.5)
    torch.manual_seed(1)
    assert torch.equal(module(states), expected)
    module.p = 1.0
    assert not module(states, seed).any()
    assert module.eval()(states, seed) is states


def identity(model: CoLT5EncoderModel) -> None:
    for layer in model.encoder.block[0].layer:
        layer.dropout = nn.Identity()


def plain(model: CoLT5EncoderModel) -> None:
    model.encoder.block[0].layer[1].light_feed_forward.dropout = nn.Dropout(0.5)


@pytest.mark.slow
@pytest.mark.parametrize("change", [identity, plain])
def test_other_modules_may_stand_in_for_dropout(
    change: Callable[[CoLT5EncoderModel], None], device: torch.device
) -> None:
    model = tiny_model(CoLT5EncoderModel, num_layers=1, dropout_rate=0.5, kernel_backend="triton").to(device).train()
    change(model)
    # dropout alone may be in training mode, as for samples of a model's uncertainty
    for module in model.encoder.block.modules():
        module.train(isinstance(module, nn.Dropout))
    ids = random_ids(9)[None].to(device)
    torch.manual_seed(2)
    first = model(input_ids=ids).last_hidden_state
    assert not torch.equal(model(input_ids=ids).last_hidden_state, first)
    first.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


class _NoGradient(torch.autograd.Function):
    """The same states; nothing is passed on."""

    @staticmethod
    def forward(ctx, states: Tensor) -> Tensor:
        return states.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> None:
        return None


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_an_output_that_passes_nothing_on(backend: str, seed: Tensor) -> None:
    states = torch.randn(1, 4, 16, device=seed.device, requires_grad=True)
    places = torch.tensor([[1]], device=seed.device)
    routing = places, places >= 0, torch.ones(1, 1, device=seed.device)
    added = scatter_add_tokens(states, states[:, :1], *routing, kernel_backend=backend)
    for output in (dropout(states, seed, 0.3, backend), added):
        (found,) = torch.autograd.grad(_NoGradient.apply(output).sum() + states.sum(), states)
        assert torch.equal(found, torch.ones_like(states))


class Doubles(nn.Dropout):
    """As a user's dropout that does something in evaluation too."""

    def forward(self, states: Tensor) -> Tensor:
        return 2 * states


@pytest.mark.parametrize("number", [0, 1])
def test_a_dropout_is_called_in_evaluation_where_that_is_noticed(number):
    """What feed-forwards do without when nobody looks, they call when somebody does."""
    model = tiny_model(num_layers=1, num_decoder_layers=1)
    inputs = {"input_ids": random_ids(1, 12), "decoder_input_ids": random_ids(1, 4)}
    feed_forward = model.encoder.block[0].layer[1].light_feed_forward, model.decoder.block[0].layer[2].DenseReluDense
    layer = feed_forward[number]
    before = model(**inputs).logits
    seen = []
    handle = layer.dropout.register_forward_hook(lambda module, args, output: seen.append(output))
    assert_same_but_for_rounding(model(**inputs).logits, before)
    handle.remove()
    assert len(seen) == 1
    # twice the activations are twice what the last product gives
    layer.dropout = Doubles(0.1).eval()
    doubled = model(**inputs).logits
    layer.dropout = nn.Dropout(0.1).eval()
    layer.wo.weight.data *= 2
    assert_same_but_for_rounding(doubled, model(**inputs).logits)
    assert (doubled - before).abs().max() > 1e-4


def test_an_encoder_layers_dropout_is_called_in_evaluation_where_a_hook_is():
    model = tiny_model(num_layers=1, num_decoder_layers=1)
    inputs = {"input_ids": random_ids(1, 12), "decoder_input_ids": random_ids(1, 4)}
    before = model(**inputs).logits
    seen = []
    for layer in model.encoder.block[0].layer:
        layer.dropout.register_forward_hook(lambda module, args, output: seen.append(module))
    assert_same_but_for_rounding(model(**inputs).logits, before)
    assert seen == [layer.dropout for layer in model.encoder.block[0].layer]
