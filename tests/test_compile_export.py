"""torch.compile without a graph break, and torch.export of one program for every length, batch and padding.

Tracing in symbols takes ten to ninety seconds a model, so all of it is slow.
"""

import pytest
import torch
from models import pad, random_ids, tiny_config, tiny_model

from modeling_colt5 import CoLT5EncoderModel, CoLT5ForConditionalGeneration

# the program's least length; below it, blocks of the light attention and minima of the budgets would need others
SHORTEST = 256


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    ("kernel_backend", "backend", "lengths"),
    [
        ("torch", "eager", (133, 300)),
        # PyTorch's own operations in "aot_eager" are in test_gradients_compile_for_every_length
        ("triton", "aot_eager", (70, 133)),
    ],
)
def test_encoder_compiles_without_a_break(kernel_backend, backend, lengths, device):
    """On the "triton" backend too, whose operators are opaque to the compiler: in interpreter mode on the CPU."""
    model = tiny_model(CoLT5EncoderModel, num_layers=1, kernel_backend=kernel_backend).to(device)
    # Dynamo's tracing is what a change can break most easily; with "aot_eager" AOTAutograd's too, which takes longer.
    # Inductor is PyTorch's own.
    compiled = torch.compile(model.encoder, fullgraph=True, dynamic=True, backend=backend)
    for length in lengths:
        batch = pad([random_ids(length), random_ids(length // 2)])
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        expected = model.encoder(**batch).last_hidden_state
        torch.testing.assert_close(compiled(**batch).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_gradients_compile_for_every_length():
    """PyTorch traces forward and backward in symbols, once for both lengths. A length of a single
    block, whose gradient is laid out differently in memory, is in test_local_attention.py."""
    encoder = tiny_model(CoLT5EncoderModel, num_layers=1).encoder.train()
    compiled = torch.compile(encoder, fullgraph=True, dynamic=True, backend="aot_eager")
    gradients = {}
    for length in (200, 133):
        batch = pad([random_ids(length), random_ids(length // 2)])
        cotangent = torch.randn(2, length, 32)
        for name, run in (("eager", encoder), ("compiled", compiled)):
            encoder.zero_grad()
            run(**batch).last_hidden_state.backward(cotangent)
            gradients[name] = {key: parameter.grad.clone() for key, parameter in encoder.named_parameters()}
        for key, gradient in gradients["compiled"].items():
            # fp32 sums in another order, over some hundred tokens
            limit = 1e-5 * gradients["eager"][key].abs().max()
            torch.testing.assert_close(gradient, gradients["eager"][key], rtol=1e-4, atol=limit.item(), msg=key)


ROUTED = {
    "causal_attention": "routed", "causal_feed_forward": "routed", "causal_window": 3, "num_heavy_heads": 4,
    "routed_cross_key_values": 6,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fields", [pytest.param({}, id="plain decoder"), pytest.param(ROUTED, id="routed")])
def test_training_step_compiles_without_a_break(fields):
    model = tiny_model(num_layers=1, num_decoder_layers=1, **fields).train()
    batch = {**pad([random_ids(60), random_ids(35)]), "labels": random_ids(2, 7)}
    # one graph for the forward; PyTorch's autograd runs its backward
    model(**batch).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="eager")(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        # fp32 sums in another order
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
@torch.no_grad()
def test_decoder_compiles_without_a_break():
    model = tiny_model(CoLT5ForConditionalGeneration, num_decoder_layers=1)
    states, mask = torch.randn(2, 50, 32), torch.ones(2, 50, dtype=torch.long)
    mask[1, 30:] = 0
    inputs = {"encoder_hidden_states": states, "encoder_attention_mask": mask, "use_cache": False}
    compiled = torch.compile(model.decoder, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 9):
        ids = random_ids(2, length)
        expected = model.decoder(input_ids=ids, **inputs).last_hidden_state
        actual = compiled(input_ids=ids, **inputs).last_hidden_state
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


class Exportable(torch.nn.Module):
    """Tensors in, tensors out."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


@torch.no_grad()
@pytest.mark.slow
def test_one_exported_encoder_serves_every_length_and_batch():
    model = Exportable(tiny_model(CoLT5EncoderModel, num_layers=1))
    auto = torch.export.Dim.AUTO
    shapes = {0: auto, 1: auto(min=SHORTEST)}
    batch = pad([random_ids(300), random_ids(280)])
    program = torch.export.export(
        model,
        (batch["input_ids"], batch["attention_mask"]),
        dynamic_shapes={"input_ids": shapes, "attention_mask": shapes},
    ).module()
    for length in (256, 257, 384, 511, 512, 700):
        for rows in (1, 3):
            batch = pad([random_ids(length - 11 * row) for row in range(rows)], "left", length)
            inputs = batch["input_ids"], batch["attention_mask"]
            real = inputs[1].bool()
            # fp32, the same operations
            torch.testing.assert_close(program(*inputs)[real], model(*inputs)[real], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_one_exported_sequence_to_sequence_model_serves_every_length():
    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tiny_model(CoLT5ForConditionalGeneration, num_layers=1, num_decoder_layers=1)

        def forward(self, input_ids, attention_mask, decoder_input_ids):
            return self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                decoder_input_ids=decoder_input_ids,
                use_cache=False,
            ).logits

    model = Logits()
    auto = torch.export.Dim.AUTO
    long, short = {0: auto, 1: auto(min=SHORTEST)}, {0: auto, 1: auto}
    ids = random_ids(2, 300)
    program = torch.export.export(
        model,
        (ids, torch.ones_like(ids), random_ids(2, 12)),
        dynamic_shapes={"input_ids": long, "attention_mask": long, "decoder_input_ids": short},
    ).module()
    for rows, length, target in ((1, 256, 5), (3, 640, 20)):
        inputs = random_ids(rows, length), torch.ones(rows, length, dtype=torch.long), random_ids(rows, target)
        torch.testing.assert_close(program(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)


def test_the_configuration_of_these_tests_reaches_the_minimum():
    config = tiny_config()
    assert config.local_radius < SHORTEST
