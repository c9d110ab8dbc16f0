"""Encoders in CUDA graphs that others record, by hand and by a compiler, and beside the graphs of launches."""

import contextlib
import copy
import gc
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import pad, random_ids, tiny_config

from modeling_colt5 import (
    CoLT5EncoderModel,
    CoLT5ForConditionalGeneration,
    layer_encoder,
    model_encoder_layer,
    run_launch_graphs,
)
from modeling_colt5.kernel_backend import Mode
from modeling_colt5.run_launch_graphs import LaunchGraphs
from modeling_colt5.run_plan import EncoderPlan

LENGTHS = range(128, 512, 64)
ROADS = pytest.mark.parametrize("straight", [True, False], ids=["straight lines", "modules"])

Inputs = dict[str, torch.Tensor]


@pytest.fixture
def model(device: torch.device) -> CoLT5EncoderModel:
    return CoLT5EncoderModel(tiny_config()).to(device).eval()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> LaunchGraphs:
    """The graphs of launches, none so far, and no other thread."""
    made = LaunchGraphs()
    monkeypatch.setattr("modeling_colt5.run_launch_list_triton.launch_graphs", made)
    return made


def batch(device: torch.device, length: int) -> Inputs:
    inputs = pad([random_ids(length), random_ids(length // 2)])
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def states(model: CoLT5EncoderModel, inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).last_hidden_state


def gradient(model: CoLT5EncoderModel, inputs: Inputs) -> torch.Tensor:
    """Of one weight."""
    model.zero_grad()
    model(**inputs).last_hidden_state.square().mean().backward()
    grad = model.encoder.block[0].layer[0].light_attention.q.weight.grad
    assert grad is not None
    return grad


def capture(call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The call as a graph of the caller's, the way PyTorch's manual has it. What the call reads lives as long."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # or graphs captured on one stream would share a workspace in the memory of the first of them, which goes with it:
    # https://github.com/pytorch/pytorch/issues/193402
    torch._C._cuda_clearCublasWorkspaces()
    with torch.cuda.graph(graph):
        output = call()
    torch._C._cuda_clearCublasWorkspaces()

    def replay(_reads: object = call) -> torch.Tensor:
        graph.replay()
        return output

    return replay


class Stream:
    """Of CUDA, for the order in which streams wait for each other."""

    def __init__(self) -> None:
        self.waited: list[Stream] = []

    def wait_stream(self, other: "Stream") -> None:
        self.waited.append(other)


def test_streams_join_only_where_they_parted(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_a_capture_has_the_same_bits_and_a_straight_line_its_heavy_branches_on_another_stream(
    straight: bool, model: CoLT5EncoderModel, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides, heavy = [], EncoderPlan.heavy

    def noted(plan: EncoderPlan) -> contextlib.AbstractContextManager:
        sides.append(plan.side)
        return heavy(plan)

    monkeypatch.setattr(layer_encoder, "enabled", straight)
    monkeypatch.setattr(EncoderPlan, "heavy", noted)
    inputs = batch(device, 160)
    replay = capture(lambda: states(model, inputs))
    # modules have one stream
    assert (sides[0] is None and sides[-1] is not None) if straight else not sides
    for _ in range(3):
        inputs["input_ids"].copy_(random_ids(2, 160))
        assert torch.equal(replay(), states(model, inputs))


@ROADS
@pytest.mark.gpu
def test_a_capture_that_fails_leaves_the_ordinary_call(
    straight: bool, model: CoLT5EncoderModel, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    heavy, run_routers = EncoderPlan.heavy, model_encoder_layer.run_routers

    def fail_while_capturing() -> None:
        if torch.cuda.is_current_stream_capturing():
            raise ValueError("not while capturing")

    @contextlib.contextmanager
    def failing_heavy(plan: EncoderPlan) -> Iterator[None]:
        # the worst place: two streams are in use, and the second one is the current one
        with heavy(plan):
            fail_while_capturing()
            yield

    def failing_routers(*args: object) -> object:
        fail_while_capturing()
        return run_routers(*args)

    # each road is broken where the other one does not pass
    monkeypatch.setattr(layer_encoder, "enabled", straight)
    if straight:
        monkeypatch.setattr(EncoderPlan, "heavy", failing_heavy)
    else:
        monkeypatch.setattr(model_encoder_layer, "run_routers", failing_routers)
    inputs = batch(device, 160)
    expected = states(model, inputs)
    with pytest.raises(ValueError, match="not while capturing"):
        capture(lambda: states(model, inputs))
    assert not torch.cuda.is_current_stream_capturing()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.equal(states(model, inputs), expected)


def expect(model: CoLT5EncoderModel, inputs: Inputs) -> Callable[[], None]:
    """What checks calls whose launches may be graphs against one whose launches are none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_launch_graphs, "MOST_LAUNCHES", 0)
        expected = states(model, inputs)

    def check() -> None:
        # each call's output goes, so that the next one may have the same addresses
        assert all(torch.equal(states(model, inputs), expected) for _ in range(4))

    return check


@pytest.mark.gpu
def test_graphs_of_all_kinds_beside_each_other(
    model: CoLT5EncoderModel, device: torch.device, graphs: LaunchGraphs
) -> None:
    """Graphs of launches; by hand, some of which go; a compiler's; generation with a static cache; and memory that is
    given back meanwhile."""
    writer = CoLT5ForConditionalGeneration(tiny_config()).to(device).eval()
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), dynamic=False, mode="reduce-overhead")
    inputs = batch(device, LENGTHS[0])
    launches = [expect(model, batch(device, length)) for length in LENGTHS]

    def capture_one(call: Callable, length: int) -> Callable[[], None]:
        own = batch(device, length)
        expected = call(model, own).clone()
        replay = capture(lambda: call(model, own))

        def check() -> None:
            assert torch.equal(replay(), expected)

        return check

    def write() -> torch.Tensor:
        return writer.generate(**inputs, max_new_tokens=8, min_new_tokens=8, cache_implementation="static")

    by_hand: list[Callable[[], None]] = []
    compiled_outputs, tokens = [], []
    for turn in range(4):
        for check in launches:
            check()
        by_hand.append(capture_one(gradient if turn % 2 else states, random.choice(LENGTHS)))
        # compiled code rounds elsewhere, but always alike: from the third call on it is the same graph
        compiled_outputs.append([states(compiled, inputs).clone() for _ in range(3)][-1])
        tokens.append([write() for _ in range(2)][-1])
        for check in [*by_hand, *launches]:
            check()
        if len(by_hand) > 2:
            del by_hand[random.randrange(len(by_hand))]
        gc.collect()
        torch.cuda.empty_cache()
        for check in [*launches, *by_hand]:
            check()
    assert graphs.kept
    for made in (compiled_outputs, tokens):
        assert all(torch.equal(one, made[0]) for one in made)
    # the compiler's graphs go, with their memory
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("has_graphs", [False, True])
def test_encoders_in_threads(
    has_graphs: bool, model: CoLT5EncoderModel, device: torch.device, graphs: LaunchGraphs
) -> None:
    """Every other thread has a stream of its own."""
    checks = [expect(model, batch(device, length)) for length in LENGTHS]
    if has_graphs:
        for check in checks:
            check()
    torch.cuda.synchronize()

    def work(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream() if number % 2 else torch.cuda.default_stream()):
            for _ in range(20):
                random.choice(checks)()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
