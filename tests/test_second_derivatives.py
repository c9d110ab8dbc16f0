"""Derivatives beyond the first, on the torch backend against finite differences in float64; kernels refuse them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import checkpoint_activations, pad, random_ids, tiny_config, tiny_model
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jvp, vmap

from modeling_colt5 import (
    CoLT5EncoderModel,
    CoLT5ForCausalLM,
    CoLT5ForConditionalGeneration,
    CoLT5ForSequenceClassification,
    soft_topk,
)
from modeling_colt5.op_attention import local_attention, routed_attention
from modeling_colt5.op_gates import causal_gates
from modeling_colt5.op_gelu import gated_gelu
from modeling_colt5.op_norm import rms_norm_scores, router_scores
from modeling_colt5.op_pools import gather_pools, routed_pools
from modeling_colt5.op_routing import route
from modeling_colt5.op_rows import combine_branches, scatter_add_tokens, share_and_gather

SOLVERS = ("exact", "coordinate_descent")


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("epsilon", (0.2, 1.0))
@pytest.mark.parametrize("solver", SOLVERS)
def test_soft_topk_is_differentiable_twice(solver, epsilon):
    scores, k = draw(4, 9), torch.tensor([2.5, 3.1, 6.25, 12.0], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(4, 9, dtype=torch.bool)
    mask[1, 6:] = mask[2, 0] = False

    def weights(scores, k):
        return soft_topk(scores, k, epsilon=epsilon, mask=mask, solver=solver, num_iterations=3)

    values = weights(scores, k)
    # some weights are 1, some below, and in the last row all
    assert (values[:3] == 1).any() and (values[:3] < 1).any() and (values[3] == 1).all()
    assert gradcheck(weights, (scores, k))
    assert gradgradcheck(weights, (scores, k))


def test_soft_topk_without_anything_to_move_has_derivatives_of_zero():
    scores = torch.tensor([[5.0, 5.0, 5.0, -1e4], [1.0, 2.0, 3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 4, [False] * 4])
    for solver in SOLVERS:
        weights = soft_topk(scores, 3.0, mask=mask, solver=solver)
        (first,) = torch.autograd.grad(weights.square().sum(), scores, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), scores)
        # coordinate descent gets to the limit only up to its iterations
        assert first.abs().max() <= (0 if solver == "exact" else 1e-6) and second.abs().max() <= 1e-6


# PyTorch's forward mode compiles a formula of its own by it
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("solver", SOLVERS)
def test_transforms_of_soft_topk_agree_with_autograd(solver):
    scores, k, tangent = torch.randn(3, 3, 9, dtype=torch.float64).unbind(0)
    k = k[:, 0].abs() + 2

    def value(scores, k):
        return soft_topk(scores, k, solver=solver, num_iterations=5).square().sum()

    expected = [torch.autograd.functional.hessian(lambda s, i=i: value(s, k[i]), scores[i]) for i in range(3)]
    torch.testing.assert_close(vmap(hessian(value))(scores, k), torch.stack(expected))
    gradients = vmap(grad(value))(scores, k)
    # forward mode, with gradients turned off around it
    with torch.no_grad():
        _, derivative = jvp(lambda s: vmap(value)(s, k), (scores,), (tangent,))
    torch.testing.assert_close(derivative, (gradients * tangent).sum(-1))


def routing(batch: int, slots: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct ascending positions, the last slot of row 0 unused."""
    indices = torch.stack([torch.randperm(n)[:slots].sort().values for _ in range(batch)])
    valid = torch.ones(batch, slots, dtype=torch.bool)
    valid[0, -1] = False
    return indices.masked_fill(~valid, n - 1), valid


BUDGET = torch.tensor([3, 4])


def operations(dtype: torch.dtype, device: torch.device | str, **backend: Any) -> dict[str, tuple[Callable, tuple]]:
    """Each public operation with a gradient, and inputs for it."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=device).requires_grad_()

    indices, valid = (part.to(device) for part in routing(2, 4, 16))
    tokens = (indices, valid)
    states, weights = draw(2, 16, 16), draw(2, 4)
    total = torch.tensor([8, 7], device=device)
    gates = {"target": 2, "capacity": 3, "soft_topk_ratio": 1.5, "epsilon": 1.0, "fill_first": True, **backend}

    def pooled(scores, key, value):
        pools = routed_pools(scores, 4, 2, None, soft_topk_ratio=1.5, **backend)
        return gather_pools(key, value, pools, 0, **backend)

    def attend(query, key, value, table):
        return local_attention(query, key, value, table, 3)

    def attend_routed(query, key, value, table):
        positions = indices.sort().values * 2
        return routed_attention(query, key, value, table, positions, positions, valid)

    heads = [draw(2, 4, 2, 16) for _ in range(3)]
    found = {
        "route": (
            lambda s, k: route(s, BUDGET.to(device), 4, soft_budget=k, **backend).weights,
            (draw(2, 16), torch.tensor([3.5, 5.0], dtype=dtype, device=device).requires_grad_()),
        ),
        "causal gates": (
            lambda s: causal_gates(s, None, total, None, **gates).weights.sum(-1),
            (draw(2, 2, 4),),
        ),
        "pools": (pooled, (draw(1, 8), draw(1, 8, 1, 16), draw(1, 8, 1, 16))),
        "norm": (lambda x, w, r: rms_norm_scores(x, w, r, 1e-6, **backend), (states, draw(16), draw(2, 16))),
        "router scores": (lambda x, r: router_scores(x, r, **backend), (states, draw(2, 16))),
        "combine": (
            lambda x, y, h, s: combine_branches(x, y, h, *tokens, s, **backend),
            (states, draw(2, 16, 16), draw(2, 4, 16), weights),
        ),
        "scatter": (
            lambda x, h, s: scatter_add_tokens(x, h, *tokens, s, **backend),
            (states, draw(2, 4, 16), weights),
        ),
        "gather": (lambda x, s: share_and_gather(x, (*tokens, s), **backend)[1], (states, weights)),
        "share and gather": (
            lambda x, s: share_and_gather(x, (*tokens, s), (*tokens, None), **backend)[1:],
            (states, weights),
        ),
        "gated GELU": (lambda g, u: gated_gelu(g, u, **backend), (draw(2, 3, 16), draw(2, 3, 16))),
        "local attention": (attend, (*heads, draw(2, 9))),
        "routed attention": (attend_routed, (*heads, draw(2, 9))),
    }
    return found


NAMES = list(operations(torch.float64, "cpu"))


@pytest.mark.parametrize("name", NAMES)
def test_operations_are_differentiable_twice(name, float64_statistics):
    operation, inputs = operations(torch.float64, "cpu")[name]
    # along random directions, as the Jacobians here are large
    assert gradgradcheck(operation, inputs, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_kernels_refuse_in_the_first_backward_that_asks(name, device):
    operation, inputs = operations(torch.float32, device, kernel_backend="triton")[name]
    outputs = operation(*inputs)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    total = sum(output.square().sum() for output in outputs)
    with pytest.raises(RuntimeError, match='kernel_backend="torch"'):
        torch.autograd.grad(total, inputs, create_graph=True)


@pytest.mark.parametrize("name", NAMES)
def test_kernels_refuse_batches_of_gradients(name, device):
    def batched(outputs, inputs):
        return torch.autograd.grad(outputs, inputs, torch.stack([torch.ones_like(outputs)] * 2), is_grads_batched=True)

    def mapped(outputs, inputs):
        return vmap(lambda grads: torch.autograd.grad(outputs, inputs, grads))(
            torch.ones(2, *outputs.shape).to(outputs)
        )

    operation, inputs = operations(torch.float32, device, kernel_backend="triton")[name]
    for ask in (batched, mapped):
        outputs = operation(*inputs)
        outputs = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
        with pytest.raises(RuntimeError, match='takes no batch of gradients.*kernel_backend="torch"'):
            ask(outputs, inputs)


@pytest.mark.parametrize("name", NAMES)
def test_kernels_refuse_transforms(name, device):
    operation, inputs = operations(torch.float32, device, kernel_backend="triton")[name]

    def total(*inputs):
        outputs = operation(*inputs)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        return sum(output.square().sum() for output in outputs)

    with pytest.raises(RuntimeError, match='kernel_backend="torch"'):
        grad(total)(*inputs)
    with torch.no_grad(), pytest.raises(RuntimeError, match='kernel_backend="torch"'):
        vmap(total)(*(tensor[None] for tensor in inputs))


def causal_fields() -> dict[str, Any]:
    return {
        "causal_attention": "routed",
        "causal_feed_forward": "routed",
        "causal_window": 8,
        "causal_routed_keys": 6,
        "num_decoder_layers": 2,
    }


def hold_choices(routing: Any) -> list[torch.Tensor]:
    """The tensors of integers and flags in what was routed."""
    if isinstance(routing, torch.Tensor):
        return [] if routing.is_floating_point() else [routing]
    if isinstance(routing, (list, tuple)):
        return [tensor for part in routing for tensor in hold_choices(part)]
    return [] if routing is None else hold_choices(list(vars(routing).values()))


def check_hessian_vector_product(model: torch.nn.Module, **batch: torch.Tensor) -> None:
    """The product with a random vector over all parameters, by autograd and by central differences of gradients."""
    parameters = list(model.parameters())
    step = 1e-6

    def gradient(create_graph: bool = False) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        output = model(**batch, output_routing=True)
        choices = [hold_choices(value) for key, value in output.items() if "routing" in key]
        # of the logits: a causal model's loss is in fp32
        gradients = torch.autograd.grad(output.logits.square().mean(), parameters, create_graph=create_graph)
        return list(gradients), [tensor for part in choices for tensor in part]

    vector = [torch.randn_like(parameter) for parameter in parameters]
    gradients, choices = gradient(create_graph=True)
    product = torch.autograd.grad(gradients, parameters, vector)
    shifted = []
    for sign in (1, -1):
        with torch.no_grad():
            torch._foreach_add_(parameters, vector, alpha=sign * step)
        values, moved = gradient()
        with torch.no_grad():
            torch._foreach_add_(parameters, vector, alpha=-sign * step)
        # the choice of tokens has no derivative
        assert choices and all(torch.equal(a, b) for a, b in zip(choices, moved, strict=True))
        shifted.append(values)
    names = [name for name, _ in model.named_parameters()]
    for name, ours, above, below in zip(names, product, *shifted, strict=True):
        expected = (above - below) / (2 * step)
        # third derivatives times step², and rounding of gradients of up to some hundreds over the step
        scale = max(expected.norm().item(), 1e-3)
        assert (ours - expected).norm() <= 1e-5 * scale, (name, ours.norm(), (ours - expected).norm())


MODELS = {
    "encoder, eager": (CoLT5ForSequenceClassification, "eager", {}),
    "encoder, sdpa": (CoLT5ForSequenceClassification, "sdpa", {}),
    "coordinate descent": (
        CoLT5ForSequenceClassification,
        "eager",
        {"soft_topk_solver": "coordinate_descent", "num_soft_topk_iterations": 4},
    ),
    "even": (CoLT5ForSequenceClassification, "eager", {"routing": "even"}),
    "cross-attention routed": (
        CoLT5ForConditionalGeneration,
        "eager",
        {"routed_cross_key_values": 9, "num_decoder_layers": 2},
    ),
    "causal": (CoLT5ForCausalLM, "eager", causal_fields()),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_hessian_vector_products_of_models(name, float64_statistics):
    model_class, attention, fields = MODELS[name]
    # a small initialisation keeps third derivatives small
    model = tiny_model(model_class, torch.float64, attention, initializer_factor=0.3, **fields)
    batch = pad([random_ids(30), random_ids(22)])
    labels = torch.tensor([0, 1]) if model_class is CoLT5ForSequenceClassification else batch["input_ids"]
    check_hessian_vector_product(model, **batch, labels=labels)


def test_gradient_penalty_is_the_same_with_checkpointing():
    """Activations that are computed again, all of them or a gated GELU's alone, are in the graph of the gradient."""
    penalties = []
    model = tiny_model(CoLT5EncoderModel, attn_implementation="eager").train()
    embeddings = torch.randn(2, 30, 32)
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_activations(model)
        leaf = embeddings.clone().requires_grad_()
        output = model(inputs_embeds=leaf).last_hidden_state
        (gradient,) = torch.autograd.grad(output.square().sum(), leaf, create_graph=True)
        penalties.append(torch.autograd.grad(gradient.square().sum(), leaf)[0])
    torch.testing.assert_close(*penalties, rtol=1e-4, atol=1e-4 * penalties[0].abs().max().item())


# of an operation of PyTorch's that it runs row by row
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("attention", ("eager", "sdpa"))
def test_per_sample_gradients_are_those_of_samples_alone(attention):
    model = tiny_model(CoLT5ForSequenceClassification, attn_implementation=attention)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    batch = pad([random_ids(30), random_ids(22), random_ids(9)])
    labels = torch.tensor([0, 1, 1])

    def loss(parameters, ids, mask, label):
        inputs = {"input_ids": ids[None], "attention_mask": mask[None], "labels": label[None]}
        return functional_call(model, parameters, (), inputs).loss

    rows = (batch["input_ids"], batch["attention_mask"], labels)
    alone = []
    for i in range(3):
        model.zero_grad()
        ids, mask, label = (part[i : i + 1] for part in rows)
        model(ids, mask, labels=label).loss.backward()
        alone.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    found = vmap(grad(loss), in_dims=(None, 0, 0, 0))(parameters, *rows)
    for name in parameters:
        expected = torch.stack([gradients[name] for gradients in alone])
        # fp32 sums in another order
        limit = 1e-5 * max(1, expected.abs().max().item())
        torch.testing.assert_close(found[name], expected, rtol=0, atol=limit, msg=name)


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:torch.searchsorted")
@pytest.mark.parametrize("model_class", (CoLT5ForConditionalGeneration, CoLT5ForCausalLM))
def test_per_sample_gradients_of_a_causally_routed_decoder(model_class):
    routed = {"causal_attention": "routed", "causal_feed_forward": "routed", "causal_window": 4}
    model = tiny_model(model_class, causal_routed_keys=5, **routed)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    batch = pad([random_ids(14), random_ids(9)])
    rows = (batch["input_ids"], batch["attention_mask"])

    def loss(parameters, ids, mask):
        inputs = {"input_ids": ids[None], "attention_mask": mask[None], "labels": ids[None]}
        return functional_call(model, parameters, (), inputs).loss

    found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, *rows)
    for i in range(2):
        model.zero_grad()
        ids, mask = (part[i : i + 1] for part in rows)
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        for name, parameter in model.named_parameters():
            # fp32 sums in another order
            limit = 1e-5 * max(1, parameter.grad.abs().max().item())
            torch.testing.assert_close(found[name][i], parameter.grad, rtol=0, atol=limit, msg=name)


def test_models_on_kernels_refuse_second_derivatives(device):
    # attention's kernels have their turn above
    fields = {"num_layers": 1, "kernel_backend": "triton", "attn_implementation": "eager"}
    model = tiny_model(CoLT5EncoderModel, **fields).to(device)
    ids = random_ids(1, 6).to(device)
    output = model(ids).last_hidden_state
    parameters = list(model.parameters())
    with pytest.raises(RuntimeError, match='kernel_backend="torch"'):
        torch.autograd.grad(output.square().sum(), parameters, create_graph=True)
    output = model(ids).last_hidden_state
    # a gradient alone is given as ever
    assert all(part.isfinite().all() for part in torch.autograd.grad(output.square().sum(), parameters))


@pytest.mark.gpu
def test_a_gpu_refuses_or_computes_second_derivatives(device):
    """By default kernels run and refuse; on the torch backend the product with a vector is that of the CPU."""
    batch = {key: value.to(device) for key, value in pad([random_ids(60), random_ids(40)]).items()}
    model = tiny_model(CoLT5ForSequenceClassification, attn_implementation="eager").to(device)
    labels = torch.tensor([0, 1], device=device)
    parameters = list(model.parameters())
    with pytest.raises(RuntimeError, match='kernel_backend="torch"'):
        torch.autograd.grad(model(**batch, labels=labels).loss, parameters, create_graph=True)

    model.config.kernel_backend = "torch"
    model.double()
    vector = [torch.randn_like(parameter) for parameter in parameters]
    products = []
    for place in (device, torch.device("cpu")):
        model.to(place)
        inputs = {key: value.to(place) for key, value in batch.items()}
        gradients = torch.autograd.grad(
            model(**inputs, labels=labels.to(place)).loss, list(model.parameters()), create_graph=True
        )
        here = [part.to(place) for part in vector]
        products.append([part.cpu() for part in torch.autograd.grad(gradients, list(model.parameters()), here)])
    for ours, theirs in zip(*products, strict=True):
        # the norm's statistic is in fp32
        assert (ours - theirs).norm() <= 1e-4 * max(theirs.norm().item(), 1e-3)


def test_the_configuration_of_these_tests_routes_some_and_not_all():
    config = tiny_config()
    assert 1 < config.routed_key_value_fraction * 22 < 22
