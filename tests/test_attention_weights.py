"""Attention weights that are returned are those that the output is made of, in one product."""

from typing import Any

import pytest
import torch
from models import pad, random_ids, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from modeling_colt5 import CoLT5ForCausalLM, CoLT5ForConditionalGeneration
from modeling_colt5.model_decoder_layer import CoLT5CrossAttention
from modeling_colt5.model_encoder_layer import CoLT5LocalAttention
from modeling_colt5.run_plan import DecoderPlan, Implementation

CROSS = {
    "multi-query": {"num_cross_key_value_heads": 1},
    "grouped": {"num_cross_key_value_heads": 2},
    "as many": {"num_cross_key_value_heads": 4},
    "routed": {"num_cross_key_value_heads": 1, "routed_cross_key_values": 8},
    "two routers": {"num_cross_key_value_heads": 1, "routed_cross_key_values": 8, "num_cross_routers": 2},
}
WEIGHTS = ("encoder_attentions", "encoder_heavy_attentions", "decoder_attentions", "cross_attentions")


def batch() -> dict[str, torch.Tensor]:
    # more than one block of the light attention
    return pad([random_ids(140), random_ids(23)]) | {"decoder_input_ids": random_ids(2, 7)}


def models(dtype: torch.dtype = torch.float64, **fields: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same model with eager attention and with sdpa's."""
    eager = tiny_model(attn_implementation="eager", **fields)
    sdpa = tiny_model(attn_implementation="sdpa", **fields)
    sdpa.load_state_dict(eager.state_dict())
    return eager.to(dtype), sdpa.to(dtype)


@pytest.mark.parametrize("fields", CROSS.values(), ids=CROSS)
def test_the_loss_has_the_same_gradients_and_one_for_every_weight(fields: dict[str, int]) -> None:
    eager, sdpa = models(**fields)
    inputs = batch()
    output, expected = eager(**inputs, output_attentions=True), sdpa(**inputs).logits
    # float64: the same sums in another order
    torch.testing.assert_close(output.logits, expected, rtol=1e-9, atol=1e-10)
    weights = [layer for name in WEIGHTS for layer in output[name]]
    gradients = torch.autograd.grad(output.logits.square().sum(), [*weights, *eager.parameters()])
    for gradient in gradients[: len(weights)]:
        assert gradient.isfinite().all() and gradient.any()
    theirs = torch.autograd.grad(expected.square().sum(), list(sdpa.parameters()))
    for ours, other in zip(gradients[len(weights) :], theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("fields", CROSS.values(), ids=CROSS)
def test_the_weights_derivatives_add_up_to_the_output(fields: dict[str, int]) -> None:
    """The output is linear in the weights: each times its own derivative adds up to all of it."""
    eager, _ = models(**fields)
    attention = eager.decoder.block[0].layer[1].EncDecAttention
    states, memory = torch.randn(2, 7, 32).double(), torch.randn(2, 16, 32).double()
    output, weights, _ = attention(states, memory, DecoderPlan(Implementation(attention="eager")), None, 0)
    heads, keys = 4, 16 // attention.num_routers
    assert weights.shape == (2, heads, 7, keys)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, heads, 7).double())
    gradient = torch.autograd.grad(output.sum(), weights)[0]
    torch.testing.assert_close((gradient * weights).sum((1, 3)), output.sum(-1), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", CROSS)
def test_cross_attention_takes_two_products(name: str) -> None:
    model, _ = models(torch.float32, **CROSS[name])
    rows, keys, width, heads, size = 2, 16, 32, 4, 8
    attention = model.decoder.block[0].layer[1].EncDecAttention
    assert isinstance(attention, CoLT5CrossAttention)
    for queries in (7, 1):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            attention(
                torch.randn(rows, queries, width), torch.randn(rows, keys, width),
                DecoderPlan(Implementation(attention="eager")), None, 0,
            )  # fmt: skip
        projections = 2 * width * size * rows * (2 * heads * queries + 2 * attention.num_key_value_heads * keys)
        products = 2 * 2 * rows * heads * queries * (keys // attention.num_routers) * size
        assert counter.get_total_flops() == projections + products


def test_light_attention_takes_two_products() -> None:
    eager, _ = models(torch.float32)
    attention = eager.encoder.block[0].layer[0].light_attention
    assert isinstance(attention, CoLT5LocalAttention)
    taken = []
    attention.register_forward_pre_hook(lambda module, inputs: taken.append(inputs))
    with torch.no_grad():
        eager(**batch())
        with FlopCounterMode(display=False) as counter:
            attention.forward(*taken[0])
    rows, length, width, heads, size, radius = 2, 140, 32, 2, 8, 5
    blocks = length // 128 + 1
    projections = 4 * 2 * rows * length * width * heads * size
    products = 2 * 2 * rows * blocks * heads * 128 * (128 + 2 * radius) * size
    assert counter.get_total_flops() == projections + products


@pytest.mark.parametrize("model_class", [CoLT5ForConditionalGeneration, CoLT5ForCausalLM])
def test_dropped_weights_are_the_ones_returned(model_class: Any) -> None:
    """In training, as T5's: some are 0, the others larger."""
    model = tiny_model(model_class, attn_implementation="eager", dropout_rate=0.5).train()
    is_causal = model_class is CoLT5ForCausalLM
    inputs = {"input_ids": random_ids(2, 12)} if is_causal else batch()
    output = model(**inputs, output_attentions=True)
    for weights in output["attentions" if is_causal else "cross_attentions"]:
        assert (weights == 0).any() and (weights.sum(-1) > 1.001).any(), weights
