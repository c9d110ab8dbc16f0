"""Inference as CUDA graphs: the same outputs, whatever changes between calls; no graph where one would lie."""

import contextlib
import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import pad, random_ids, tiny_config
from peft import LoraConfig, get_peft_model
from torch import nn

from modeling_colt5 import CoLT5EncoderModel, CoLT5ForConditionalGeneration, layer_encoder, model_encoder_layer
from modeling_colt5 import run_graphs as graphs
from modeling_colt5.kernel_backend import Mode
from modeling_colt5.run_plan import EncoderPlan


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


def test_plain_inference_is_what_graphs_are_made_of():
    states = torch.ones(1, 2, 3)
    with torch.no_grad():
        assert Mode.of_now(states).is_plain_inference
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
        assert not Mode.of_now(states).is_plain_inference
        handle.remove()
        with torch.autocast("cpu", torch.bfloat16):
            assert not Mode.of_now(states).is_plain_inference
    assert not Mode.of_now(states).is_plain_inference


ROADS = pytest.mark.parametrize("straight", [True, False], ids=["straight lines", "modules"])


@ROADS
@pytest.mark.gpu
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_replays_equal_ordinary_calls_bit_for_bit(model, device, mode, straight, monkeypatch):
    monkeypatch.setattr(layer_encoder, "enabled", straight)
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
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_encoder_of_another_device_than_the_current_one(model):
    model.to("cuda:1")
    with torch.no_grad():
        for batch in batches(torch.device("cuda:1"), 5):
            assert torch.equal(model(**batch).last_hidden_state, ordinary(model, **batch))
    assert count_graphs(model) == 1 and torch.cuda.current_device() == 0


def test_switches_of_matrix_products_are_looked_at_by_either_of_their_names():
    matmul, before = torch.backends.cuda.matmul, graphs._matmul_modes()
    given = matmul.fp32_precision
    try:
        # PyTorch's older question about the precision is an error after this
        matmul.fp32_precision = "tf32"
        assert graphs._matmul_modes() != before
    finally:
        matmul.fp32_precision = given


def record_all(kinds: list[int]) -> tuple[int, int]:
    """How many recordings and how many replays a sequence of calls has, by the book-keeping alone."""
    recordings = graphs._Recordings(graphs._Parts(nn.Linear(1, 1)))
    replays = 0
    for kind in kinds:
        if kind in recordings.graphs:
            recordings.graphs.move_to_end(kind)
            replays += 1
        elif recordings.is_due(kind):
            recordings.keep(kind, None)
    assert len(recordings.graphs) <= graphs.MOST_GRAPHS and len(recordings.calls) <= graphs.MOST_COUNTED
    return recordings.made, replays


def test_more_lengths_than_places_do_not_record_at_every_call():
    few, many = graphs.MOST_GRAPHS, 20
    assert record_all(list(range(few)) * 100) == (few, (100 - 1 - graphs.CALLS_BEFORE) * few)
    made, replays = record_all(list(range(many)) * 100)
    # a recording costs some ten calls: it must be rare
    assert made < 4 * many and replays > 20 * many
    # all lengths differ
    assert record_all(list(range(5000)) * 2) == (0, 0)


def test_after_a_change_of_lengths_the_new_ones_get_graphs():
    made, replays = record_all([*list(range(8)) * 50, *list(range(8, 16)) * 50])
    assert made == 16 and replays > 8 * 80


class Stream:
    """Of CUDA, for the order in which streams wait for each other."""

    def __init__(self):
        self.waited = []

    def wait_stream(self, other):
        self.waited.append(other)


def test_streams_join_only_where_they_parted(monkeypatch):
    here, side = Stream(), Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: here)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    plan = EncoderPlan(None, None, {}, None, Mode.of_now(torch.ones(1)), side=side)
    plan.join()
    assert not here.waited
    for layer in range(2):
        with plan.heavy() as current:
            assert current is side
        plan.join()
        assert side.waited == [here] * (layer + 1) and here.waited == [side] * (layer + 1)
    # what an error breaks off ends with this too
    plan.join()
    assert len(here.waited) == 2


@ROADS
@pytest.mark.gpu
def test_recording_that_fails_leaves_the_ordinary_call(model, device, monkeypatch, straight):
    heavy, run_routers = EncoderPlan.heavy, model_encoder_layer.run_routers

    def fail_while_recording() -> None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not while recording")

    @contextlib.contextmanager
    def failing_heavy(plan):
        # the worst place: two streams are in use, and the second one is the current one
        with heavy(plan):
            fail_while_recording()
            yield

    def failing_routers(*args):
        fail_while_recording()
        return run_routers(*args)

    # each road is broken where the other one does not pass
    monkeypatch.setattr(layer_encoder, "enabled", straight)
    if straight:
        monkeypatch.setattr(EncoderPlan, "heavy", failing_heavy)
    else:
        monkeypatch.setattr(model_encoder_layer, "run_routers", failing_routers)
    (batch,) = batches(device, 1)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="recording a CUDA graph failed") as warned:
        outputs = [model(**batch).last_hidden_state for _ in range(5)]
        assert torch.equal(outputs[-1], ordinary(model, **batch))
    assert count_graphs(model) == 0 and len(warned) == 1
    assert not torch.cuda.is_current_stream_capturing()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


@pytest.mark.gpu
def test_memory_of_a_model_that_goes_comes_back(device):
    def use() -> None:
        model = CoLT5EncoderModel(tiny_config(use_cuda_graphs=True)).to(device).eval()
        for batch in batches(device, 4):
            with torch.no_grad():
                model(**batch)
        assert count_graphs(model) == 1

    use()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(3):
        use()
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


# half a minute each, most of it compilation and as many rounds as there is time for
@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "seconds"), [("rounds", 45), ("threads", 10)])
def test_replays_beside_everything_else_that_makes_graphs(kind, seconds):
    script = Path(__file__).parent / "graphs_together.py"
    run = subprocess.run(
        [sys.executable, str(script), kind, str(seconds)], capture_output=True, text=True, timeout=400, check=False
    )
    assert run.returncode == 0 and f" {kind}" in run.stdout, run.stdout + run.stderr[-6000:]


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
    assert graphs._Parts(model.encoder).weights is not None


def test_weights_that_move_are_seen(model):
    parts = graphs._Parts(model.encoder)
    bias = model.encoder.light_relative_attention_bias
    bias.weight.data = bias.weight.clone()
    assert not parts.are_current()
    assert graphs._Parts(model.encoder).weights != parts.weights


def test_idle_hooks_of_recorded_outputs_do_not_stand_in_the_way(model, device):
    model(input_ids=random_ids(1, 20).to(device), output_hidden_states=True, output_routing=True)
    assert model.encoder.block[0]._forward_hooks
    assert graphs._Parts(model.encoder).weights is not None


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
    assert graphs._Parts(change(model)).weights is None
