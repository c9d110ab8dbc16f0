"""Attention over grids on its own: a model's layer in another frame, pictures of several sizes, what is refused."""

import copy
import math
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from rounding import assert_same_but_for_rounding
from vision import TINY, tiny_vision_model

from modeling_colt5 import CoLT5ConditionalImageAttention, CoLT5VisionModel, set_dense_start

FIELDS = (
    "d_kv", "num_light_heads", "num_heavy_heads", "local_radius", "routed_query_fraction", "routed_key_value_fraction",
)  # fmt: skip


def make(**more: Any) -> CoLT5ConditionalImageAttention:
    torch.manual_seed(0)
    return CoLT5ConditionalImageAttention(32, **{name: TINY[name] for name in FIELDS} | more).eval()


@torch.no_grad()
def test_it_is_a_models_layer() -> None:
    model = tiny_vision_model(CoLT5VisionModel, num_layers=1)
    encoder, module, seen = model.encoder, make(), []
    module.layer.load_state_dict(encoder.block[0].layer[0].state_dict())
    for name in ("light_relative_attention_bias", "heavy_relative_attention_bias"):
        setattr(module, name, getattr(encoder, name))
    encoder.block[0].layer[0].register_forward_hook(lambda layer, inputs, output: seen.append((inputs[0], output)))
    pixels, mask = torch.randn(2, 3, 24, 36), torch.ones(2, 24, 36)
    mask[1, 16:] = 0
    output = model(pixel_values=pixels, pixel_mask=mask, output_routing=True)
    ((states, (expected, *_)),) = seen
    ours, routing = module(states.unflatten(1, (6, 9)), output.patch_mask, output_routing=True)
    assert ours.shape == (2, 6, 9, 32)
    assert_same_but_for_rounding(ours[output.patch_mask], expected.unflatten(1, (6, 9))[output.patch_mask])
    for name in ("query", "key_value"):
        assert torch.equal(routing[name].indices, output.routing[0][name].indices)


# interpreted kernels take five seconds, and have tests of their own
@pytest.mark.parametrize("kernel_backend", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
def test_a_picture_computes_in_a_batch_what_it_computes_alone(kernel_backend: str, device: torch.device) -> None:
    if kernel_backend == "triton":
        pytest.importorskip("triton")
    module = make(kernel_backend=kernel_backend).to(device)
    sizes = [(7, 5), (3, 9), (1, 1)]
    grids = [torch.randn(1, *size, 32).to(device) for size in sizes]
    batch, mask = torch.full((3, 8, 10, 32), 1e4, device=device), torch.zeros(3, 8, 10, device=device)
    for i, ((height, width), grid) in enumerate(zip(sizes, grids, strict=True)):
        batch[i, :height, :width], mask[i, :height, :width] = grid[0], 1
    batch.requires_grad_()
    output, routing = module(batch, mask, output_routing=True)
    goal = torch.randn_like(output) * mask[..., None]
    (gradient,) = torch.autograd.grad((output * goal).sum(), batch)
    for i, ((height, width), grid) in enumerate(zip(sizes, grids, strict=True)):
        grid.requires_grad_()
        alone = module(grid)
        assert_same_but_for_rounding(output[i, :height, :width], alone[0])
        own = goal[i : i + 1, :height, :width]
        # fp32 sums in another order
        torch.testing.assert_close(
            gradient[i, :height, :width], torch.autograd.grad((alone * own).sum(), grid)[0][0], rtol=1e-4, atol=1e-5
        )
        # 1/4 and 1/3 of its own places
        assert int(routing.query.valid[i].sum()) == math.ceil(height * width / 4)
        assert int(routing.key_value.valid[i].sum()) == math.ceil(height * width / 3)
    # gradients never come from padding, which nobody reads
    assert gradient[mask == 0].eq(0).all()


def test_gradients_in_fp32_are_those_of_float64() -> None:
    module = make()
    gradients = []
    for own in (module, copy.deepcopy(module).double()):
        dtype = next(own.parameters()).dtype
        torch.manual_seed(1)
        inputs = torch.randn(2, 5, 6, 32).to(dtype).requires_grad_()
        output = own(inputs)
        goal = torch.linspace(-1, 1, output.numel(), dtype=dtype).view(output.shape)
        gradients.append([output, *torch.autograd.grad((output * goal).sum(), [inputs, *own.parameters()])])
    for ours, expected in zip(*gradients, strict=True):
        # fp32 sums of some hundred terms
        scale = expected.abs().max().item()
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=2e-5 * max(scale, 1.0))


def test_turned_pictures_turn_the_output_where_nothing_depends_on_offsets() -> None:
    """Without biases, rows and columns are alike: a transposed grid has the transposed output."""
    module = make()
    with torch.no_grad():
        for bias in (module.light_relative_attention_bias, module.heavy_relative_attention_bias):
            bias.weight.zero_()
    grid = torch.randn(1, 6, 9, 32)
    assert_same_but_for_rounding(module(grid.transpose(1, 2)).transpose(1, 2), module(grid))


@torch.no_grad()
def test_a_dense_start_reaches_it() -> None:
    module, grid = make().train(), torch.randn(1, 6, 9, 32)
    routed = module(grid)
    network = torch.nn.Sequential(module)
    set_dense_start(network, 0.0)
    dense, routing = module(grid, output_routing=True)
    assert int(routing.query.valid.sum()) == 54 and (dense - routed).abs().max() > 1e-3
    set_dense_start(network, None)
    assert_same_but_for_rounding(module(grid), routed)


@pytest.mark.parametrize("routing", ["even", "random", "none"])
def test_controls(routing: str) -> None:
    module = make(routing=routing)
    output, found = module(torch.randn(2, 6, 9, 32), output_routing=True)
    assert output.shape == (2, 6, 9, 32)
    assert (found.query is None) == (routing == "none")


def test_what_does_not_fit_is_refused() -> None:
    module = make()
    with pytest.raises(ValueError, match=r"\[batch, height, width, 32\], as d_model is 32"):
        module(torch.randn(2, 54, 32))
    with pytest.raises(ValueError, match=r"\[batch, height, width, 32\]"):
        module(torch.randn(2, 6, 9, 31))
    with pytest.raises(ValueError, match="at least one row and one token"):
        module(torch.randn(2, 0, 9, 32))
    with pytest.raises(TypeError, match=r"int64; it must be floating point \[batch, height, width, 32\]"):
        module(torch.zeros(2, 6, 9, 32, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[batch, height, width\], here \(2, 6, 9\)"):
        module(torch.randn(2, 6, 9, 32), torch.ones(2, 54))
    with pytest.raises(StrictDataclassError, match="local_radius"):
        make(local_radius=-1)
    with pytest.raises(ValueError, match="attn_implementation is 'flash'"):
        make(attn_implementation="flash")
