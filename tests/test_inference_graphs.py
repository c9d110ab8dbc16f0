"""Inference as CUDA graphs: the same outputs, whatever changes between calls; no graph where one would lie."""

import pytest
import torch
from models import pad, random_ids, tiny_config
from peft import LoraConfig, get_peft_model
from torch import nn

from modeling_colt5 import CoLT5EncoderModel, CoLT5ForConditionalGeneration
from modeling_colt5 import inference_graphs as graphs


def count_graphs(model: nn.Module) -> int:
    return sum(len(graphs._recordings[part].graphs) for part in model.modules() if part in graphs._recordings)


@pytest.fixture
def model(device: torch.device) -> CoLT5EncoderModel:
    return CoLT5EncoderModel(tiny_config(use_cuda_graphs=True)).to(device).eval()


def ordinary(model: CoLT5EncoderModel, **inputs: torch.Tensor) -> torch.Tensor:
    model.config.use_cuda_graphs = False
    output = model(**inputs).last_hidden_state
    model.config.use_cuda_graphs = True
    return output


def batches(device: torch.device, count: int) -> list[dict[str, torch.Tensor]]:
    """Batches of one shape, with other tokens and other padding each."""
    made = []
    for index in range(count):
        batch = pad([random_ids(150 - 7 * index), random_ids(40 + index)], "left" if index % 2 else "right", 160)
        made.append({name: tensor.to(device) for name, tensor in batch.items()})
    return made


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_replays_equal_ordinary_calls_bit_for_bit(model, device, mode):
    with mode():
        kept = []
        for batch in batches(device, 6):
            kept.append((model(**batch).last_hidden_state, ordinary(model, **batch)))
    assert count_graphs(model) == 1
    # compared at the end: a later replay must not write into an earlier output
    assert all(torch.equal(ours, theirs) for ours, theirs in kept)


@pytest.mark.gpu
def test_what_changes_between_calls_is_seen(model, device):
    (batch,) = batches(device, 1)

    def settle() -> torch.Tensor:
        with torch.no_grad():
            outputs = [model(**batch).last_hidden_state for _ in range(4)]
            assert torch.equal(outputs[-1], ordinary(model, **batch))
        return outputs[-1]

    first = settle()
    with torch.no_grad():
        model.encoder.block[0].layer[0].light_attention.q.weight.mul_(2)
    second = settle()
    assert not torch.equal(first, second)
    model.set_routing_budget(feed_forward=1.0, query=1.0, key_value=1.0)
    third = settle()
    assert not torch.equal(second, third)
    model.bfloat16()
    assert settle().dtype == torch.bfloat16
    assert count_graphs(model) == 3


@pytest.mark.gpu
def test_what_a_graph_cannot_give_takes_the_ordinary_way(model, device):
    (batch,) = batches(device, 1)
    for _ in range(4):
        assert model(**batch).last_hidden_state.requires_grad
        with torch.no_grad():
            assert len(model(**batch, output_routing=True).routing) == model.config.num_layers
            with torch.autocast("cuda", torch.bfloat16):
                model(**batch)
            model.train()(**batch)
            model.eval()
    assert count_graphs(model) == 0


@pytest.mark.gpu
def test_lengths_that_come_once_make_no_graph_and_the_number_of_graphs_is_bounded(model, device):
    with torch.no_grad():
        for length in range(100, 130):
            model(input_ids=random_ids(1, length).to(device))
        assert count_graphs(model) == 0
        for length in range(100, 103 + graphs.MOST_GRAPHS):
            for _ in range(3):
                model(input_ids=random_ids(1, length).to(device))
    assert count_graphs(model) == graphs.MOST_GRAPHS


@pytest.mark.gpu
def test_generation_reads_with_a_replayed_encoder(device):
    model = CoLT5ForConditionalGeneration(tiny_config()).to(device).eval()
    (batch,) = batches(device, 1)
    model.config.use_cuda_graphs = False
    expected = model.generate(**batch, max_new_tokens=6, num_beams=2)
    model.config.use_cuda_graphs = True
    for _ in range(4):
        assert torch.equal(model.generate(**batch, max_new_tokens=6, num_beams=2), expected)
    assert count_graphs(model) == 1


def test_plain_layers_may_be_replayed(model):
    assert graphs._weights(model.encoder) is not None


def test_idle_hooks_of_recorded_outputs_do_not_stand_in_the_way(model, device):
    model(input_ids=random_ids(1, 20).to(device), output_hidden_states=True, output_routing=True)
    assert model.encoder.block[0]._forward_hooks
    assert graphs._weights(model.encoder) is not None


def hooked(model: CoLT5EncoderModel) -> nn.Module:
    model.encoder.block[0].register_forward_hook(lambda module, inputs, output: output)
    return model.encoder


def pre_hooked(model: CoLT5EncoderModel) -> nn.Module:
    model.encoder.block[0].register_forward_pre_hook(lambda module, inputs: None)
    return model.encoder


def patched(model: CoLT5EncoderModel) -> nn.Module:
    block = model.encoder.block[0]
    block.forward = block.forward
    return model.encoder


def adapted(model: CoLT5EncoderModel) -> nn.Module:
    return get_peft_model(model, LoraConfig(target_modules=["q", "v"])).base_model.model.encoder


def quantised(model: CoLT5EncoderModel) -> nn.Module:
    class Int8Parameter(nn.Parameter):
        pass

    projection = model.encoder.block[0].layer[0].light_attention.q
    projection.weight = Int8Parameter(projection.weight.data)
    return model.encoder


@pytest.mark.parametrize("change", [hooked, pre_hooked, patched, adapted, quantised])
def test_whatever_does_more_than_plain_layers_is_not_replayed(model, change):
    assert graphs._weights(change(model)) is None
