"""The token operations against float64: values and all gradients, in Triton's interpreter and compiled on a GPU.

The oracle is PyTorch's own autograd through the references in float64; the references are held against loops.
"""

import math

import pytest
import torch
from rounding import assert_all_same_but_for_rounding, assert_same_but_for_rounding
from torch import Tensor, nn
from torch.library import opcheck

from modeling_colt5 import op_norm, op_norm_triton
from modeling_colt5.model_layers import recomputed_in_backward
from modeling_colt5.op_gelu import gated_gelu
from modeling_colt5.op_norm import rms_norm_scores, router_scores
from modeling_colt5.op_norm_triton import BACKWARD_TILE, GRADIENT_PROGRAMS, norm_backward_into, norm_into
from modeling_colt5.op_rows import combine_branches, scatter_add_tokens, share_and_gather
from modeling_colt5.op_rows_triton import tile_shape

# relative to the norm of the float64 result: a few roundings of fp32 sums, or of a result rounded once and what enters
# it rounded once or twice. Triton's interpreter truncates to bf16 where GPUs round, which doubles bf16's error.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
EPS = 1e-6
BATCH, LENGTH = 2, 37

# every kind of row: full, partly used, empty; a used slot at the last position, where unused slots point too
ROUTINGS = {"first": ([9, 4], 9), "second": ([0, 12], 12)}

needs_cuda = pytest.mark.gpu


def routing(lengths: list[int], capacity: int, n: int, device: torch.device, last: bool = False) -> tuple[Tensor, ...]:
    """Indices, validity and weights of rows with so many used slots, as docs/architecture.md lays them down."""
    indices = torch.full((len(lengths), capacity), n - 1)
    valid = torch.zeros(len(lengths), capacity, dtype=torch.bool)
    for row, used in enumerate(lengths):
        indices[row, :used] = torch.randperm(n)[:used].sort().values
        if last and used:
            indices[row, used - 1] = n - 1
        valid[row, :used] = True
    weights = torch.rand(indices.shape, dtype=torch.float64) * valid
    return indices.to(device), valid.to(device), weights.to(device)


def leaves(dtype: torch.dtype, device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal float64 leaves that `dtype` holds exactly."""
    draws = [torch.randn(shape, dtype=torch.float64).to(dtype).double().to(device) for shape in shapes]
    return [draw.requires_grad_() for draw in draws]


def cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]


def values_and_gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor]) -> list[Tensor]:
    """The outputs, and the inputs' gradients under fixed random cotangents."""
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(output.shape, generator=generator).to(output.device) for output in outputs]
    pairs = [(output, c.to(output.dtype)) for output, c in zip(outputs, cotangents, strict=True)]
    gradients = torch.autograd.grad([p[0] for p in pairs], inputs, [p[1] for p in pairs])
    return [*(output.detach() for output in outputs), *gradients]


def assert_close(results: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for position, (result, oracle) in enumerate(zip(results, expected, strict=True)):
        assert result.shape == oracle.shape
        error = (result.double() - oracle).norm() / oracle.norm().clamp(min=1e-12)
        assert error < TOLERANCE[dtype], f"result {position}: {error:.1e}"


CASES = [
    pytest.param(768, 2, torch.float32, id="base-fp32"),
    pytest.param(48, 1, torch.float16, id="48-fp16"),
    pytest.param(50, 3, torch.bfloat16, id="odd-bf16"),
    pytest.param(3, 1, torch.float32, id="three-features"),
    *(
        pytest.param(d, routers, dtype, id=f"{d}-{routers}-{dtype}"[:20], marks=needs_cuda)
        for d, routers in ((768, 2), (1000, 1), (1024, 2), (2048, 1), (5120, 2))
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ),
]
by_case = pytest.mark.parametrize(("d", "routers", "dtype"), CASES)


@by_case
def test_norm_and_scores(d: int, routers: int, dtype: torch.dtype, device: torch.device) -> None:
    inputs = leaves(dtype, device, (BATCH, LENGTH, d), (d,), (routers, d))
    expected = values_and_gradients(rms_norm_scores(*inputs, EPS), inputs)
    kernel_inputs = cast(inputs, dtype)
    outputs = rms_norm_scores(*kernel_inputs, EPS, "triton")
    assert outputs[0].dtype == dtype
    assert outputs[1].dtype == torch.float32 and outputs[1].is_contiguous()
    assert_close(values_and_gradients(outputs, kernel_inputs), expected, dtype)


def combined_norm(
    tensors: list[Tensor], routed: tuple[Tensor, ...], dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """What an encoder layer's straight line launches between two sublayers: the sum of the branches, its norm and its
    scores; and the reciprocals of the norm."""
    residual, light, heavy, norm_weight, router_weights = tensors
    hidden, normed = torch.empty_like(residual), torch.empty_like(residual, dtype=dtype)
    scores = torch.empty(BATCH, len(router_weights), LENGTH, device=residual.device)
    rstd = torch.empty(BATCH, LENGTH, device=residual.device)
    norm_into(residual, norm_weight, router_weights, EPS, None, normed, scores, rstd, light, heavy, *routed, hidden)
    return hidden, normed, scores, rstd


def combined_norm_in_float64(tensors: list[Tensor], routed: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same by the references, one after another."""
    residual, light, heavy, norm_weight, router_weights = tensors
    hidden = combine_branches(residual, light, heavy, *routed, "torch")
    return hidden, *rms_norm_scores(hidden, norm_weight, router_weights, EPS, "torch")


@by_case
def test_combine_norm_and_scores(d: int, routers: int, dtype: torch.dtype, device: torch.device) -> None:
    """The norm of a sum of branches, and its gradients with what else flows into the sum."""
    indices, valid, weights = routing(*ROUTINGS["first"], LENGTH, device, last=True)
    inputs = leaves(dtype, device, (BATCH, LENGTH, d), (BATCH, LENGTH, d), (BATCH, 9, d), (d,), (routers, d))
    exact = combined_norm_in_float64(inputs, (indices, valid, weights.float().double()))
    own = [tensor.detach() for tensor in cast(inputs, dtype)]
    *results, rstd = combined_norm(own, (indices, valid, weights.float()))
    assert_close(results, [tensor.detach() for tensor in exact], dtype)

    cotangents = leaves(dtype, device, *(tensor.shape for tensor in exact))
    expected = torch.autograd.grad(exact, [inputs[0], *inputs[3:]], cotangents)
    hidden_grad, normed_grad, scores_grad = (tensor.detach().to(dtype) for tensor in cotangents)
    gradients = [torch.empty_like(own[place]) for place in (0, 3, 4)]
    norm_backward_into(
        normed_grad, scores_grad.float(), results[0], *own[3:], EPS, None, rstd, *gradients, hidden_grad
    )
    assert_close(gradients, list(expected), dtype)


@by_case
def test_share_and_gather(d: int, routers: int, dtype: torch.dtype, device: torch.device) -> None:
    indices, valid, _ = routing(*ROUTINGS["first"], LENGTH, device, last=True)
    indices2, valid2, weights2 = routing(*ROUTINGS["second"], LENGTH, device)
    inputs = [*leaves(dtype, device, (BATCH, LENGTH, d)), weights2.float().double().requires_grad_()]

    def run(tensors: list[Tensor], backend: str) -> tuple[Tensor, ...]:
        states, factors = tensors
        routings = (indices, valid, None), (indices2, valid2, factors)
        return share_and_gather(states, *routings, kernel_backend=backend)

    expected = values_and_gradients(run(inputs, "torch"), inputs)
    kernel_inputs = [*cast(inputs[:1], dtype), *cast(inputs[1:], torch.float32)]
    assert_close(values_and_gradients(run(kernel_inputs, "triton"), kernel_inputs), expected, dtype)
    with torch.no_grad():
        shared, rows, rows2 = run(kernel_inputs, "triton")
    assert_close([shared, rows, rows2], [tensor.detach() for tensor in expected[:3]], dtype)


@pytest.mark.parametrize("weighted", [True, False])
@by_case
def test_combine_scatter_and_gather(
    d: int, routers: int, dtype: torch.dtype, weighted: bool, device: torch.device
) -> None:
    indices, valid, weights = routing(*ROUTINGS["first"], LENGTH, device, last=True)
    inputs = leaves(dtype, device, (BATCH, LENGTH, d), (BATCH, LENGTH, d), (BATCH, 9, d))
    inputs.append(weights.float().double().requires_grad_())

    def run(tensors: list[Tensor], backend: str) -> tuple[Tensor, ...]:
        residual, light, heavy, factors = tensors
        some = factors if weighted else None
        return (
            combine_branches(residual, light, heavy, indices, valid, factors, backend),
            scatter_add_tokens(residual, heavy, indices, valid, some, backend),
            share_and_gather(light, (indices, valid, some), kernel_backend=backend)[1],
        )

    expected = values_and_gradients(run(inputs, "torch"), inputs)
    kernel_inputs = [*cast(inputs[:-1], dtype), *cast(inputs[-1:], torch.float32)]
    assert_close(values_and_gradients(run(kernel_inputs, "triton"), kernel_inputs), expected, dtype)


@pytest.mark.parametrize("halves", [False, True], ids=["apart", "halves-of-one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gated_gelu(dtype: torch.dtype, halves: bool, device: torch.device) -> None:
    width = 1100
    gate, up = leaves(dtype, device, (2, 3, width), (2, 3, width))
    expected = values_and_gradients((nn.functional.gelu(gate, approximate="tanh") * up,), [gate, up])
    if halves:
        both = torch.cat([gate, up], -1).detach().to(dtype).requires_grad_()
        output, gradient = values_and_gradients((gated_gelu(*both.chunk(2, -1), "triton"),), [both])
        results = [output, *gradient.chunk(2, -1)]
    else:
        kernel_inputs = cast([gate, up], dtype)
        results = values_and_gradients((gated_gelu(*kernel_inputs, "triton"),), kernel_inputs)
    assert_close(results, expected, dtype)


# searches of one to three steps, with ranges that do and do not divide; the interpreter takes ten seconds for three
@pytest.mark.parametrize(
    "capacity", [1, 63, 64, 65, 130, *(pytest.param(n, marks=pytest.mark.slow) for n in (4097, 4200))]
)
def test_slots_are_found_whatever_their_number(capacity: int, device: torch.device) -> None:
    n, d = capacity + 301, 4
    indices, valid, _ = routing([capacity, capacity // 2], capacity, n, device, last=True)
    base, updates = torch.randn(2, n, d, device=device), torch.randn(2, capacity, d, device=device)
    expected = base.clone()
    for row in range(2):
        expected[row, indices[row, valid[row]]] += updates[row, valid[row]]
    # one addition each
    assert torch.equal(scatter_add_tokens(base, updates, indices, valid, None, "triton"), expected)


def test_references_against_loops() -> None:
    n, d = 11, 5
    device = torch.device("cpu")
    indices, valid, weights = routing([4, 2], 4, n, device)
    residual, light, heavy, norm_weight, router = (
        tensor.detach() for tensor in leaves(torch.float64, device, (2, n, d), (2, n, d), (2, 4, d), (d,), (1, d))
    )
    # what unused slots hold must never show
    heavy[1, 2:] = float("nan")
    hidden, normed, scores = combined_norm_in_float64(
        [residual, light, heavy, norm_weight, router], (indices, valid, weights)
    )
    tokens = share_and_gather(normed, (indices, valid, weights))[1]
    for row in range(2):
        slots = {int(indices[row, slot]): slot for slot in range(4) if valid[row, slot]}
        for position in range(n):
            x = residual[row, position] + light[row, position]
            if position in slots:
                x = x + weights[row, slots[position]] * heavy[row, slots[position]]
            expected = x / math.sqrt(float(sum(v * v for v in x)) / d + EPS) * norm_weight
            torch.testing.assert_close(hidden[row, position], x)
            torch.testing.assert_close(normed[row, position], expected)
            torch.testing.assert_close(scores[row, 0, position], expected @ router[0])
            if position in slots:
                torch.testing.assert_close(tokens[row, slots[position]], expected * weights[row, slots[position]])
    assert (tokens[~valid] == 0).all()


def test_norm_rounds_as_t5_does() -> None:
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    states = torch.randn(2, 8, 64, dtype=torch.bfloat16)
    layer = T5LayerNorm(64, eps=EPS).to(torch.bfloat16)
    nn.init.normal_(layer.weight)
    normed = rms_norm_scores(states, layer.weight, None, EPS)[0]
    # a mean whose last bit differs moves a number in ten thousand over a border of bf16; one more rounding, or one
    # fewer, moves a third of them
    assert (normed != layer(states)).float().mean() < 0.01


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_unused_slots_pass_nothing_on(backend: str, device: torch.device) -> None:
    """NaN in the row that unused slots point at, or in unused slots' updates, reaches no value and no gradient."""
    n, d = 8, 16
    indices, valid, weights = (tensor.to(device) for tensor in routing([2], 4, n - 1, torch.device("cpu")))
    indices[~valid] = n - 1
    states = torch.randn(1, n, d, device=device)
    states[0, n - 1] = float("nan")
    updates = torch.randn(1, 4, d, device=device)
    updates[~valid] = float("nan")
    factors = weights.float().requires_grad_()
    states.requires_grad_()
    updates.requires_grad_()
    rows = share_and_gather(states, (indices, valid, factors), kernel_backend=backend)[1]
    total = scatter_add_tokens(torch.zeros(1, n, d, device=device), updates, indices, valid, factors, backend)
    gradients = torch.autograd.grad(rows.sum() + total.sum(), [states, updates, factors])
    for result in (rows, total, *gradients):
        assert result.isfinite().all()


def test_mixed_precision(device: torch.device) -> None:
    """An fp32 residual stream with bf16 branches and weights, as autocast and half-precision models make it."""
    d = 32
    indices, valid, weights = routing(*ROUTINGS["first"], LENGTH, device)
    dtypes = (torch.float32, torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32)
    exact = leaves(torch.bfloat16, device, (BATCH, LENGTH, d), (BATCH, LENGTH, d), (BATCH, 9, d), (d,), (2, d))
    factors = weights.float()

    def run(tensors: list[Tensor], factors: Tensor, backend: str) -> tuple[Tensor, ...]:
        residual, light, heavy, norm_weight, router_weights = tensors
        hidden = combine_branches(residual, light, heavy, indices, valid, factors, backend)
        return hidden, *rms_norm_scores(hidden, norm_weight, router_weights, EPS, backend)

    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor, dtype in zip(exact, dtypes, strict=True)]
    outputs = run(inputs, factors, "triton")
    assert [output.dtype for output in outputs] == [torch.float32, torch.bfloat16, torch.float32]
    results = values_and_gradients(outputs, inputs)
    assert [gradient.dtype for gradient in results[3:]] == list(dtypes)
    expected = values_and_gradients(run(exact, factors.double(), "torch"), exact)
    assert_close(results, expected, torch.bfloat16)
    together = combined_norm([tensor.detach() for tensor in inputs], (indices, valid, factors), torch.bfloat16)
    assert_close(list(together[:3]), expected[:3], torch.bfloat16)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_normalised_states_in_another_dtype_are_rounded_once_and_the_scores_are_not(
    backend: str, device: torch.device
) -> None:
    # fp16, as Triton's interpreter cuts bfloat16 off instead of rounding it
    states, norm_weight, routers = cast(
        leaves(torch.float32, device, (BATCH, LENGTH, 32), (32,), (2, 32)), torch.float32
    )
    normed, scores = rms_norm_scores(states, norm_weight, routers, EPS, backend)
    rounded, same_scores = rms_norm_scores(states, norm_weight, routers, EPS, backend, torch.float16)
    assert rounded.dtype == torch.float16
    # half of fp16's last bit, and fp32's rounding where the states are computed again
    assert ((rounded.float() - normed).abs() <= (2**-11 + 1e-6) * normed.abs() + 2**-25).all()
    assert_same_but_for_rounding(scores, same_scores)
    # the rounding's own gradient is the identity: what comes in is representable
    grad = torch.randn_like(rounded)
    narrow = torch.autograd.grad(rounded, (states, norm_weight), grad)
    wide = torch.autograd.grad(normed, (states, norm_weight), grad.float())
    assert_all_same_but_for_rounding(narrow, wide)


@pytest.mark.parametrize("programs", [4, pytest.param(GRADIENT_PROGRAMS, marks=needs_cuda)])
def test_weight_gradients_are_summed_in_one_order(
    programs: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More row blocks than programs, so that partial sums form. They are added in one order and not as they come: two
    runs on one device give the same bits, and the float64 sum."""
    monkeypatch.setattr(op_norm_triton, "GRADIENT_PROGRAMS", programs)
    d = 1024
    rows = tile_shape(d, BACKWARD_TILE)[0]
    # an odd number of blocks: the programs' shares differ in size
    n = (programs + 3) * rows - 1
    states, grad = torch.randn(1, n, d, device=device), torch.randn(1, n, d, device=device)
    scores, routers = torch.randn(1, 2, n, device=device), torch.randn(2, d, device=device)
    weight = torch.randn(d, device=device)
    rstd = torch.rsqrt(states.pow(2).mean(-1) + EPS)
    backward = op_norm._norm.gradient
    inputs = (grad, scores, states, weight, routers, EPS, None, rstd, [True] * 3)
    first, second = (backward.kernel(*inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    exact = [tensor.double().requires_grad_() for tensor in (states, weight, routers)]
    outputs = rms_norm_scores(*exact, EPS)
    expected = torch.autograd.grad(outputs, exact, [grad.double(), scores.double()])
    assert_close(list(first), list(expected), torch.float32)


def chain(residual: Tensor, heavy: Tensor, norm_weight: Tensor, routers: Tensor, factors: Tensor, *where: Tensor):
    """All the operations after one another, as in a layer."""
    backend = "triton"
    hidden = combine_branches(residual, residual * 2, heavy, *where, factors, backend)
    normed, scores = rms_norm_scores(hidden, norm_weight, routers, EPS, backend)
    shared, rows, rows2 = share_and_gather(normed, (*where, None), (*where, factors), kernel_backend=backend)
    light = gated_gelu(shared, hidden, backend)
    return combine_branches(hidden, light, rows + rows2, *where, factors, backend).sum() + scores.sum()


def chain_inputs(device: torch.device, n: int = 12) -> tuple[list[Tensor], list[Tensor]]:
    indices, valid, weights = routing([2], 3, n, device)
    exact = leaves(torch.float32, device, (1, n, 16), (1, 3, 16), (16,), (2, 16))
    return [*cast(exact, torch.float32), weights.float().requires_grad_()], [indices, valid]


def test_compiles_as_one_graph_with_the_eager_gradients(device: torch.device) -> None:
    inputs, where = chain_inputs(device)
    eager = torch.autograd.grad(chain(*inputs, *where), inputs)
    compiled_chain = torch.compile(chain, fullgraph=True, backend="aot_eager")
    compiled = torch.autograd.grad(compiled_chain(*inputs, *where), inputs)
    for result, expected in zip(compiled, eager, strict=True):
        # the same kernels; only the order in which autograd adds a tensor's gradients may differ
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_exports_with_a_dynamic_length(device: torch.device) -> None:
    class Chain(nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return chain(*inputs)

    inputs, where = chain_inputs(device)
    shapes = ({1: torch.export.Dim.DYNAMIC}, *[None] * (len(inputs) + len(where) - 1))
    program = torch.export.export(Chain(), (*inputs, *where), dynamic_shapes=(shapes,))
    longer, where = chain_inputs(device, n=21)
    torch.testing.assert_close(program.module()(*longer, *where), chain(*longer, *where))


@pytest.mark.slow
def test_operators_are_registered_well(device: torch.device) -> None:
    (residual, heavy, norm_weight, routers, factors), (indices, valid) = chain_inputs(device)
    light = residual.detach().clone().requires_grad_()
    routed = (indices, valid, factors)
    plain = (indices, valid, None)
    nothing = (None, None, None)
    ops = torch.ops.colt5
    norm = (residual.detach(), norm_weight.detach(), routers.detach(), EPS, None)
    normed, scores, rstd = ops.token_norm(*norm)
    samples: list[tuple[torch._ops.OpOverload, tuple[object, ...]]] = [
        (ops.token_norm.default, (residual, norm_weight, routers, EPS, None)),
        (ops.token_norm.default, (residual, norm_weight, None, EPS, None)),
        (ops.token_norm.default, (residual, norm_weight, routers, EPS, torch.bfloat16)),
        (ops.token_norm_backward.default, (normed, scores, *norm, rstd, [True] * 3)),
        (ops.token_combine.default, (residual, light, heavy, *routed, None, *nothing, 12)),
        (ops.token_combine.default, (None, None, heavy, *plain, heavy.detach(), *routed, 12)),
        (ops.token_gather.default, (residual, *routed, *plain)),
        (ops.token_gather.default, (residual, *plain, *nothing)),
        (ops.token_gather_dot.default, (residual.detach(), heavy.detach(), indices, valid, factors.detach())),
        (ops.router_scores.default, (residual, routers)),
        (ops.router_scores_backward.default, (scores, residual.detach(), routers.detach(), [True] * 2)),
        (ops.gated_gelu.default, (residual, light)),
        (ops.gated_gelu_backward.default, (normed, residual.detach(), light.detach(), [True] * 2)),
    ]  # fmt: skip
    for operator, inputs in samples:
        opcheck(operator, inputs)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("at_once", [1, 10, 1000])
def test_router_scores_of_a_part_at_a_time(
    at_once: int, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients against float64, whatever the parts: 37 positions of two rows, 1, 5 or all at once."""
    monkeypatch.setattr(op_norm, "_SCORED_AT_ONCE", at_once)
    exact = leaves(dtype, device, (BATCH, LENGTH, 20), (3, 20))
    expected = torch.einsum("bnd,rd->brn", *exact)
    inputs = cast(exact, dtype)
    scores = router_scores(*inputs, "triton")
    assert scores.dtype == torch.float32 and scores.is_contiguous()
    # of products of half-precision numbers, taken and summed in fp32
    torch.testing.assert_close(scores.double(), expected, atol=1e-5, rtol=1e-5)
    cotangent = torch.randn_like(expected)
    actual = torch.autograd.grad(scores, inputs, cotangent.float())
    for gradient, wide, leaf in zip(actual, torch.autograd.grad(expected, exact, cotangent), inputs, strict=True):
        assert gradient.dtype == leaf.dtype
        assert (gradient.double() - wide).norm() < TOLERANCE[dtype] * wide.norm()


def test_recomputed_states_are_not_kept(device: torch.device) -> None:
    """The projection's gradient is the same, and what it keeps is not the activation."""
    gate, up = (torch.randn(2, 5, 8, device=device, requires_grad=True) for _ in range(2))
    projection = nn.Linear(8, 4, bias=False, device=device)
    calls = []

    def recompute() -> Tensor:
        calls.append(1)
        return gated_gelu(gate.detach(), up.detach())

    gradients = []
    for recomputes in (False, True):
        activation = gated_gelu(gate, up)
        if recomputes:
            with recomputed_in_backward(activation, recompute):
                output = projection(activation)
            # autograd must not read it again
            with torch.no_grad():
                activation.zero_()
        else:
            output = projection(activation)
        gradients.append(torch.autograd.grad(output.pow(2).sum(), [gate, up, projection.weight]))
    assert calls == [1]
    assert_all_same_but_for_rounding(*gradients)


@needs_cuda
def test_offsets_beyond_32_bits() -> None:
    """n · d and n · d_ff pass 2³¹: the last rows come out like the same rows alone."""
    device = torch.device("cuda")
    n, d = 2**20 + 8, 2048
    states = torch.randn(1, n, d, device=device, dtype=torch.bfloat16)
    weight = torch.randn(d, device=device, dtype=torch.bfloat16)
    routers = torch.randn(1, d, device=device, dtype=torch.bfloat16)
    normed, scores = rms_norm_scores(states, weight, routers, EPS)
    tail, tail_scores = rms_norm_scores(states[:, -8:].contiguous(), weight, routers, EPS)
    assert_same_but_for_rounding(normed[:, -8:], tail)
    assert_same_but_for_rounding(scores[..., -8:], tail_scores)
    indices = torch.arange(n - 8, n, device=device)[None]
    valid = torch.ones_like(indices, dtype=torch.bool)
    assert torch.equal(share_and_gather(normed, (indices, valid, None))[1], normed[:, -8:])
    total = scatter_add_tokens(states, tail, indices, valid)
    assert torch.equal(total[:, -8:], (states[:, -8:].float() + tail.float()).bfloat16())
    del total
    assert_same_but_for_rounding(gated_gelu(states, normed)[:, -8:], gated_gelu(states[:, -8:].contiguous(), tail))
