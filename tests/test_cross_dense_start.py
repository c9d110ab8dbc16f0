"""The dense start of routed cross-attention: the reference's soft top-k, finite differences, caches."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import checkpoint_activations, pad, random_ids, tiny_model
from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache

from modeling_colt5 import CoLT5ForConditionalGeneration, soft_topk
from modeling_colt5.model_cross_routing import CoLT5CrossRouting
from modeling_colt5.model_from_config import cross_settings, implementation
from modeling_colt5.model_router import set_dense_start

BUDGET = 6


def training_model(**fields: Any) -> CoLT5ForConditionalGeneration:
    torch.manual_seed(0)
    return tiny_model(routed_cross_key_values=BUDGET, **fields).train()


def route(model: CoLT5ForConditionalGeneration, memory: torch.Tensor, mask: torch.Tensor | None) -> Any:
    """What the routers of the model's cross-attention choose."""
    return model.decoder.cross_routing(memory, mask, cross_settings(model.config), implementation(model.config))


def soft_size(length: int, progress: float) -> float:
    """The sum of a row's weights: 0.9 of its tokens at first, the soft top-k of its own budget at last."""
    first, last = 0.9 * length, 9 / 8 * min(BUDGET, length)
    return first * (last / first) ** progress


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("progress", [0.0, 0.5])
@torch.no_grad()
def test_every_token_is_read_with_the_weight_of_the_soft_top_k(
    backend: str, progress: float, device: torch.device
) -> None:
    model = training_model(num_cross_routers=2, kernel_backend=backend).to(device)
    model.set_dense_start(progress)
    # of the second row the budget holds every token
    lengths, memory = (20, 4), torch.randn(2, 20, 32).to(device)
    mask = torch.arange(20, device=device) < torch.tensor(lengths, device=device)[:, None]
    rows, layers = route(model, memory, mask)
    assert model.decoder.cross_routing.used_slots(memory, mask, BUDGET).tolist() == mask.tolist()
    routers = iter(model.decoder.cross_routing.routers)
    for states, layer in zip(rows, layers, strict=True):
        assert states.shape == (2, 2 * 20, 32)
        for part, tokens in zip(states.split(20, 1), layer, strict=True):
            vector = next(routers).weight
            for row, length in enumerate(lengths):
                real = memory[row, :length]
                expected = soft_topk(real.double() @ vector.double(), soft_size(length, progress))
                assert tokens.indices[row, :length].tolist() == list(range(length))
                # the router's scores are in fp32, and coordinates of an optimum move as little as they do
                torch.testing.assert_close(tokens.weights[row, :length], expected.float(), atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(part[row, :length], expected.float()[:, None] * real, atol=1e-4, rtol=1e-4)
                assert not part[row, length:].any()


@pytest.mark.parametrize("progress", [0.0, 0.5])
def test_gradient_is_that_of_a_constant_threshold(progress: float) -> None:
    """In float64: the weights exp((s - t) / ε) of the reference, t fixed where the scores have it, by differences."""
    epsilon = 0.7
    model = training_model(dtype=torch.float64, routing_epsilon=epsilon, num_decoder_layers=1)
    model.set_dense_start(progress)
    memory, direction = torch.randn(1, 20, 32, dtype=torch.float64), torch.randn(1, 20, 32, dtype=torch.float64)
    (router,) = model.decoder.cross_routing.routers
    ((states,), _) = route(model, memory, None)
    (gradient,) = torch.autograd.grad((states * direction).sum(), router.weight)

    fixed = soft_topk(memory[0] @ router.weight.detach(), soft_size(20, progress), epsilon=epsilon)

    def loss(vector: torch.Tensor) -> torch.Tensor:
        moved = memory[0] @ (vector - router.weight.detach())
        return (fixed[:, None] * (moved / epsilon).exp()[:, None] * memory[0] * direction[0]).sum()

    expected, step = torch.zeros(32, dtype=torch.float64), 1e-6
    if progress > 0:
        for place in range(32):
            move = torch.zeros(32, dtype=torch.float64)
            move[place] = step
            vector = router.weight.detach()
            expected[place] = (loss(vector + move) - loss(vector - move)) / (2 * step)
    # the soft budget is fp32, and so are its weights' last digits
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


def test_routers_are_constant_while_closed_and_learn_while_opening() -> None:
    model = training_model(num_cross_routers=2)
    inputs = {**pad([random_ids(30), random_ids(17)]), "labels": random_ids(2, 6)}
    for progress, learns in ((0.0, False), (0.3, True)):
        model.set_dense_start(progress)
        model.zero_grad()
        model(**inputs).loss.backward()
        for name, parameter in model.named_parameters():
            assert bool(parameter.grad.any()) is (learns or "router" not in name), name


def test_kernels_agree_with_pytorch(device: torch.device) -> None:
    model = training_model(num_decoder_layers=1, num_cross_routers=2).to(device)
    model.set_dense_start(0.4)
    routing, memory = model.decoder.cross_routing, torch.randn(2, 24, 32, device=device, requires_grad=True)
    mask = torch.arange(24, device=device) < torch.tensor([[24], [5]], device=device)
    direction = torch.randn(2, 2 * 24, 32, device=device)
    leaves, found = [memory, *routing.parameters()], []
    for backend in ("torch", "triton"):
        model.config.kernel_backend = backend
        ((states,), _) = route(model, memory, mask)
        found.append([states, *torch.autograd.grad((states * direction).sum(), leaves)])
    for expected, ours in zip(*found, strict=True):
        # sums in another order
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str) -> None:
    model = training_model()
    model.set_dense_start(0.5)
    rows, targets = [random_ids(17), random_ids(30)], random_ids(2, 5)
    together = model(**pad(rows, side=side), decoder_input_ids=targets).logits
    for row, target, logits in zip(rows, targets, together, strict=True):
        alone = model(row[None], decoder_input_ids=target[None]).logits[0]
        # another batch, another order of sums
        torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_evaluation_and_what_follows_are_the_papers_routing() -> None:
    model, memory, ids = training_model(), torch.randn(2, 30, 32), random_ids(2, 5)
    inputs = {"encoder_outputs": memory, "decoder_input_ids": ids}
    fresh = copy.deepcopy(model).eval()(**inputs).logits
    model.set_dense_start(0.0)
    # the encoder does not run here: what differs is what cross-attention reads
    assert not torch.allclose(model(**inputs).logits, fresh)
    torch.testing.assert_close(model.eval()(**inputs).logits, fresh)
    model.set_dense_start(None)
    torch.testing.assert_close(model.train()(**inputs).logits, fresh)


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_caches_hold_every_token_that_is_read(static: bool) -> None:
    """Who generates while the model is in training mode gets what one call over the whole text gives."""
    model = training_model()
    model.set_dense_start(0.5)
    inputs, target = pad([random_ids(30), random_ids(17)], side="left"), random_ids(2, 6)
    whole = model(**inputs, decoder_input_ids=target).logits
    made = (
        [StaticCache(config=model.config, max_cache_len=length) for length in (6, 30)]
        if static
        else [DynamicCache(), DynamicCache()]
    )
    cache = EncoderDecoderCache(*made)
    inputs["cache"] = cache
    steps = [model(**inputs, decoder_input_ids=token).logits for token in target.split(1, dim=1)]
    # one token at a time, in another order of sums
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("saved", ["full cross-attention", "routed"])
def test_routers_that_the_checkpoint_lacks_are_not_trained(saved: str, tmp_path: Path) -> None:
    """A dense start is for models whose `routers_trained` is False: with new routers it is, whatever was saved."""
    tiny_model(routers_trained=True, routed_cross_key_values=4 if saved == "routed" else None).save_pretrained(
        tmp_path
    )
    load = CoLT5ForConditionalGeneration.from_pretrained
    assert load(tmp_path).config.routers_trained
    assert not load(tmp_path, d_model=64, ignore_mismatched_sizes=True).config.routers_trained
    # routers of causal layers are new then
    if saved == "full cross-attention":
        assert not load(tmp_path, causal_attention="routed").config.routers_trained
        assert not load(tmp_path, causal_feed_forward="routed").config.routers_trained
    # another budget needs no other routers
    assert load(tmp_path, routed_cross_key_values=BUDGET).config.routers_trained is (saved == "routed")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    model = training_model(num_cross_routers=2)
    model.set_dense_start(0.5)
    inputs = {**pad([random_ids(30), random_ids(17)]), "labels": random_ids(2, 6)}
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_activations(model, use_reentrant)
        model.zero_grad()
        model(**inputs).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for found, expected in zip(*gradients, strict=True):
        # what is computed again lies elsewhere in memory, which changes last bits of fp32 sums
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow  # a graph compiles for seconds
def test_compiled_models_compile_once_for_the_dense_start_and_once_after() -> None:
    model, graphs = training_model(num_layers=1, num_decoder_layers=1), 0

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=count, fullgraph=True)
    inputs = {**pad([random_ids(20), random_ids(9)]), "labels": random_ids(2, 5)}
    seen = []
    for progress in (0.0, 0.3, 0.6, None, None):
        model.set_dense_start(progress)
        compiled(**inputs).loss.backward()
        seen.append(graphs)
    assert seen == [1, 1, 1, 2, 2]


@pytest.mark.gpu
def test_captured_step_follows_the_dense_start() -> None:
    """What is recorded once reads how far the dense start has come at every replay."""
    model = training_model().cuda()
    memory = torch.randn(2, 30, 32, device="cuda")
    graph = torch.cuda.CUDAGraph()
    model.set_dense_start(0.0)
    with torch.no_grad():
        # kernels are compiled before anything is recorded
        route(model, memory, None)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            rows, _ = route(model, memory, None)
        for progress in (0.0, 0.5, 1.0):
            model.set_dense_start(progress)
            graph.replay()
            for found, expected in zip(rows, route(model, memory, None)[0], strict=True):
                # the same kernels on the same numbers
                torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("routing", ["even", "random"])
def test_routers_without_parameters_are_told_too(routing: str) -> None:
    """A model of such routers alone is refused, but a network of modules may have both kinds."""
    routers = CoLT5CrossRouting(8, 2, routing=routing)
    assert list(routers.parameters()) == []
    network = nn.Sequential(nn.Linear(8, 8), routers).train()
    for progress in (0.0, 0.25):
        set_dense_start(network, progress)
        assert routers.progress is not None and routers.progress.item() == progress
    set_dense_start(network, None)
    assert routers.progress is None
