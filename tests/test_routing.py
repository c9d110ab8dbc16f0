"""Routing: selection against sorting, weights and gradients of the kernels against the float64 reference, operators.

Without CUDA the kernels run in Triton's interpreter; with CUDA the same tests run them compiled.
"""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
from rounding import assert_all_same_but_for_rounding, assert_same_but_for_rounding

import modeling_colt5
from modeling_colt5 import op_routing, op_routing_gradient_triton, op_routing_triton
from modeling_colt5.kernel_backend import INTERPRETED
from modeling_colt5.op_routing import RoutedTokens, route
from modeling_colt5.op_soft_topk import soft_topk
from modeling_colt5.run_budgets import routed_budget, routed_capacity

# weights: 2 ulp of exp, and the exponent's own rounding, below 2.4e-7 for exponents to 4; sums over 1e4 terms
WEIGHT_TOLERANCE = 2e-6
# gradients relative to the largest cotangent over ε, of which they reach twice; half an ulp is 2^-11 or 2^-8
GRADIENT_TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-10 + 2e-6, torch.bfloat16: 2**-7 + 2e-6}


def sorted_selection(scores: torch.Tensor, budget: int, mask: torch.Tensor) -> list[int]:
    """Positions of the `budget` largest real scores of one row, by Python's sort."""
    order = sorted((p for p in range(len(scores)) if mask[p]), key=lambda p: (-float(scores[p]), p))
    return sorted(order[:budget])


def check_against_reference(
    scores: torch.Tensor, fraction: float = 1 / 16, soft_budget: torch.Tensor | None = None, **settings: object
) -> None:
    """Kernels on `scores` against the reference on the same values in float64: selection equal, the rest close."""
    rows, n = scores.shape
    if "mask" in settings:
        lengths = settings["mask"].sum(-1)
    else:
        lengths = settings.get("lengths", torch.full((rows,), n, device=scores.device))
    budget, capacity = routed_budget(lengths, fraction, 1), routed_capacity(n, fraction, 1)
    cotangent = torch.randn(rows, capacity, device=scores.device, dtype=torch.float64)
    results = []
    for backend, dtype in (("triton", scores.dtype), ("torch", torch.float64)):
        inputs = [scores.to(dtype).requires_grad_()]
        if soft_budget is not None:
            inputs.append(soft_budget.to(torch.promote_types(dtype, torch.float32)).requires_grad_())
        routed = route(
            inputs[0], budget, capacity, soft_budget=inputs[1] if soft_budget is not None else None,
            kernel_backend=backend, **settings,
        )  # fmt: skip
        results.append((routed, torch.autograd.grad(routed.weights, inputs, cotangent.to(routed.weights.dtype))))
    (routed, grads), (expected, expected_grads) = results
    assert torch.equal(routed.valid, expected.valid)
    assert torch.equal(routed.indices, expected.indices)
    assert (routed.weights - expected.weights).abs().max() <= WEIGHT_TOLERANCE
    scale = cotangent.abs().max() / settings.get("epsilon", 1.0)
    assert grads[0].dtype == scores.dtype
    assert (grads[0] - expected_grads[0]).abs().max() <= GRADIENT_TOLERANCE[scores.dtype] * scale
    if soft_budget is not None:
        assert (grads[1] - expected_grads[1]).abs().max() <= GRADIENT_TOLERANCE[torch.float32] * scale


@pytest.fixture(params=("one program a row", "shared rows"))
def kernels(request, monkeypatch):
    """Both forms of the kernel; on the CPU a shared row's program shares it with itself alone."""
    if request.param == "shared rows":
        monkeypatch.setattr(op_routing_triton, "LONGEST_ROW", 0)
        monkeypatch.setattr(op_routing_triton, "PARTS", ((1 << 20, 128),))
    return request.param


@pytest.mark.parametrize("fraction", (1 / 16, 1 / 8, 0.3, 1.0))
def test_budget_is_the_exact_ceiling(fraction):
    lengths = torch.arange(0, 5000)
    budget = routed_budget(lengths, fraction, 3)
    for length in range(0, 5000, 7):
        # rational arithmetic knows nothing of rounding; 1e-6 of slack is the convention's
        numerator, denominator = fraction.as_integer_ratio()
        ceiling = -((-(length * numerator * 10**6 - denominator)) // (denominator * 10**6))
        assert budget[length] == min(length, max(3, ceiling))
        assert routed_capacity(length, fraction, 3) == max(1, int(budget[length]))


@pytest.mark.parametrize("kind", ("normal", "ties", "constant"))
def test_reference_selects_what_a_sort_selects(kind):
    scores = torch.randn(5, 60)
    scores = {"normal": scores, "ties": scores.round(), "constant": torch.zeros(5, 60)}[kind]
    mask = torch.rand(5, 60) < 0.7
    mask[2], mask[3] = False, True
    budget = torch.tensor([1, 7, 5, 12, 20])
    routed = route(scores, budget, 12, mask=mask)
    assert isinstance(routed, RoutedTokens)
    for row in range(5):
        expected = sorted_selection(scores[row], min(int(budget[row]), 12), mask[row])
        assert routed.indices[row].tolist() == expected + [59] * (12 - len(expected))
        assert routed.valid[row].tolist() == [True] * len(expected) + [False] * (12 - len(expected))


def test_weights_are_the_soft_topk_of_the_row():
    scores, budget = torch.randn(3, 80), torch.tensor([4, 9, 5])
    mask = torch.rand(3, 80) < 0.8
    for solver in ("exact", "coordinate_descent"):
        routed = route(scores, budget, 10, mask=mask, epsilon=0.5, solver=solver, num_iterations=20)
        dense = soft_topk(scores, budget * 9 / 8, epsilon=0.5, mask=mask, solver=solver, num_iterations=20)
        expected = dense.gather(-1, routed.indices) * routed.valid
        # one sums over the sorted prefix, the other over the sorted row
        torch.testing.assert_close(routed.weights, expected, rtol=0, atol=5e-7)


@pytest.mark.parametrize("solver", ("exact", "coordinate_descent"))
def test_gradients_are_those_of_finite_differences(solver):
    scores = torch.randn(3, 14, dtype=torch.float64, requires_grad=True)
    soft_budget = torch.tensor([3.5, 2.25, 5.0], dtype=torch.float64, requires_grad=True)
    budget, lengths = torch.tensor([3, 2, 4]), torch.tensor([14, 9, 14])

    def weights(scores, soft_budget):
        return route(
            scores, budget, 4, lengths=lengths, soft_budget=soft_budget, epsilon=0.4, solver=solver, num_iterations=8
        ).weights

    assert torch.autograd.gradcheck(weights, (scores, soft_budget))


def test_every_selected_token_gets_a_gradient_at_the_default_epsilon():
    """With ε = 1 and scores of unit spread few tokens saturate: a router that learns from all it chose."""
    scores = torch.randn(1, 1024, requires_grad=True)
    routed = route(scores, torch.tensor([64]), 64)
    routed.weights.square().sum().backward()
    assert (scores.grad[0, routed.indices[0]] != 0).float().mean() > 0.9


@pytest.mark.parametrize("padding", ("left", "right"))
def test_padding_changes_nothing(kernels, device, padding):
    scores = torch.randn(1, 100, device=device)
    pads = torch.full((1, 37), 1e4, device=device)
    padded = torch.cat((pads, scores) if padding == "left" else (scores, pads), -1)
    mask = padded != 1e4
    budget = torch.tensor([7], device=device)
    for backend in ("triton", "torch"):
        alone = route(scores, budget, 9, kernel_backend=backend)
        routed = route(padded, budget, 9, mask=mask, kernel_backend=backend)
        shift = 37 if padding == "left" else 0
        assert torch.equal(routed.indices[:, :7], alone.indices[:, :7] + shift)
        assert (routed.indices[:, 7:] == 136).all()
        assert torch.equal(routed.valid, alone.valid)
        # sums over another block shape
        assert (routed.weights - alone.weights).abs().max() <= 5e-7
        if padding == "right":
            by_length = route(padded, budget, 9, lengths=torch.tensor([100], device=device), kernel_backend=backend)
            assert torch.equal(by_length.indices, routed.indices)
            assert_same_but_for_rounding(by_length.weights, routed.weights)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("n", (1, 63, 1300))
def test_kernels_agree_with_the_reference(kernels, device, n, dtype):
    scores = torch.randn(2, n, device=device).to(dtype)
    check_against_reference(scores)
    # half precision has many ties
    check_against_reference(scores, 0.3, mask=torch.rand(2, n, device=device) < 0.6)


def test_kernels_take_lengths(kernels, device):
    check_against_reference(torch.randn(4, 600, device=device), lengths=torch.tensor([600, 97, 1, 0], device=device))


@pytest.mark.parametrize(("scale", "epsilon"), ((1.0, 0.03), (5.0, 0.1), (50.0, 1.0), (1e-3, 0.003), (1e3, 10.0)))
def test_kernels_agree_with_the_reference_on_hard_rows(kernels, device, scale, epsilon):
    normal = torch.randn(500, device=device)
    outliers = normal.clone()
    outliers[3], outliers[400] = 1e4, -1e4
    two_peaks = normal + 20 * (torch.rand(500, device=device) < 0.1)
    clusters = torch.randint(0, 6, (500,), device=device) * 10 + 0.01 * normal
    rows = torch.stack((normal, normal.round(), torch.ones_like(normal), outliers, two_peaks, clusters)) * scale
    check_against_reference(rows, 0.1, epsilon=epsilon)


@pytest.mark.parametrize("kind", ("all magnitudes", "neighbours", "bf16", "outliers", "two values", "limits", "tiny"))
def test_search_finds_any_rank_of_any_scores(kernels, device, kind):
    """The search guesses from the scores' distribution; here its guesses are bad."""
    n, steps = 130, torch.arange(130)
    normal = torch.randn(n)
    scores = {
        "all magnitudes": torch.exp2(torch.linspace(-140, 120, n)) * normal.sign(),
        # every float between some two is a score, and the search cannot step over any
        "neighbours": (torch.tensor(0.7).view(torch.int32) + steps).view(torch.float32),
        "bf16": (normal.view(torch.int32) & -65536).view(torch.float32),
        "outliers": torch.where(steps % 50 == 7, 1e30 * (steps - 60), normal),
        "two values": (steps % 3 == 0).float(),
        "limits": torch.where(steps % 4 == 0, math.inf, torch.where(steps % 4 == 1, -3.4e38, 3.4e38 * normal.sign())),
        "tiny": 1e-38 * normal,
    }[kind][torch.randperm(n)].to(device)
    # the soft budget's rank the same as the hard one's, and apart; each with small, middle and whole budgets
    for ratio, counts in ((1.0, [2, 64, 66, 129, 130]), (1.7, [1, 9, 65, 128, 130])):
        budget = torch.tensor(counts, device=device)
        routed = route(scores.expand(5, n), budget, n, soft_topk_ratio=ratio, epsilon=0.1, kernel_backend="triton")
        for row, count in enumerate(counts):
            expected = sorted_selection(scores, count, torch.ones(n, dtype=torch.bool))
            assert routed.indices[row, :count].tolist() == expected
            assert routed.valid[row].sum() == count


@pytest.mark.gpu
@pytest.mark.parametrize("part", (512, 4096))
@pytest.mark.parametrize("epsilon", (1.0, 0.05))
def test_programs_that_share_a_row_agree_with_the_reference(device, monkeypatch, part, epsilon):
    monkeypatch.setattr(op_routing_triton, "PARTS", ((1 << 20, part),))
    lengths = torch.tensor([70_001, 0, 1, 33_333, 70_001, 4_097, 50_000], device=device)
    scores = torch.randn(7, 70_001, device=device)
    # rows that differ in passes, ties among them
    scores[3] = scores[3].exp() * 3
    scores[4] += 20 * (torch.rand(70_001, device=device) < 0.1)
    scores[6] = scores[6].round()
    check_against_reference(scores, lengths=lengths, epsilon=epsilon)
    # more rows than there are programs
    check_against_reference(scores.repeat(60, 1), lengths=lengths.repeat(60), epsilon=epsilon)


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="orders the programs of Triton's interpreter")
@pytest.mark.parametrize("seed", (0, 1))
def test_programs_that_share_a_row_may_run_in_any_order(monkeypatch, seed):
    """Two groups of three programs, in turn on five rows; on a GPU the order cannot be chosen."""
    from programs_together import run_together

    monkeypatch.setattr(op_routing_triton, "LONGEST_ROW", 0)
    monkeypatch.setattr(op_routing_triton, "_parts", lambda n, device: (32, 8, 2))
    monkeypatch.setattr(op_routing_triton, "_multiprocessors", lambda device: 3)
    run_together(monkeypatch, op_routing_triton.route_kernel, seed)
    scores = torch.randn(5, 90)
    scores[1] = scores[1].round()
    scores[2] *= 50
    # the last program of a row of 50 has no real token
    check_against_reference(scores, 0.2, lengths=torch.tensor([90, 90, 90, 50, 0]), epsilon=0.5)


def test_counts_of_the_longest_part_fit(device, monkeypatch):
    """Two counts to an integer, of which each may be of all the program's tokens."""
    n = op_routing_triton.LONGEST_PART
    monkeypatch.setattr(op_routing_triton, "LONGEST_ROW", 0)
    monkeypatch.setattr(op_routing_triton, "_parts", lambda n, device: (n, 16, 1))
    scores = torch.zeros(3, n, device=device)
    # equal scores are taken from the left: without some larger ones on the right, taking too many would not show
    scores[0, -100:] = 1
    scores[1] = torch.randn(n, device=device)
    budget = torch.tensor([3 * n // 4, n, 3 * n // 4], device=device)
    routed = route(scores, budget, n, kernel_backend="triton")
    assert routed.valid.sum(-1).tolist() == budget.tolist()
    chosen = [*range(3 * n // 4 - 100), *range(n - 100, n)]
    assert routed.indices[0].tolist() == chosen + [n - 1] * (n - len(chosen))
    assert routed.indices[1].tolist() == list(range(n))
    assert routed.indices[2, : 3 * n // 4].tolist() == list(range(3 * n // 4))


@pytest.mark.gpu
def test_a_shared_row_has_the_bits_that_it_has_alone(device):
    scores = torch.randn(9, 40_000, device=device)
    budget = torch.full((9,), 2500, device=device)
    together = route(scores, budget, 2500)
    for row in range(9):
        alone = route(scores[row : row + 1], budget[:1], 2500)
        for name in ("indices", "weights", "valid"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[row])


def test_rows_of_one_launch_differ_in_passes(kernels, device):
    normal = torch.randn(1500, device=device)
    two_peaks = normal + 20 * (torch.rand(1500, device=device) < 0.1)
    rows = torch.stack((normal, two_peaks, normal.exp() * 3, torch.zeros_like(normal)))
    for epsilon in (1.0, 0.1):
        check_against_reference(rows, 0.1, epsilon=epsilon)


def test_kernels_give_the_gradient_of_a_soft_budget(kernels, device):
    scores = torch.randn(3, 300, device=device)
    check_against_reference(scores, soft_budget=torch.tensor([20.0, 7.5, 400.0], device=device))
    # below the hard budget, and not a multiple of anything
    check_against_reference(scores, 0.25, soft_budget=torch.tensor([9.1, 0.4, 74.9], device=device), epsilon=0.2)


@pytest.mark.parametrize(("init", "decay"), ((1.0, 1.0), (4.0, 0.7)))
@pytest.mark.parametrize("n", (5, 700))
def test_coordinate_descent_kernels_agree_with_the_reference(device, n, init, decay):
    settings = {"solver": "coordinate_descent", "num_iterations": 12, "epsilon_init": init, "epsilon_decay": decay}
    scores = torch.randn(3, n, device=device)
    check_against_reference(scores, 1 / 8, **settings)
    check_against_reference(scores, 0.3, mask=torch.rand(3, n, device=device) < 0.6, **settings)
    check_against_reference(scores, 0.3, soft_budget=torch.tensor([1.5, 2.0, 900.0], device=device), **settings)


def test_kernels_take_any_strides(kernels, device):
    base = torch.randn(100, 6, device=device)
    mask = torch.rand(100, 6, device=device) < 0.7
    check_against_reference(base.t(), mask=mask.t())
    check_against_reference(base[:, :1].t().expand(2, 100))
    scores = torch.randn(2, 100, device=device, requires_grad=True)
    routed = route(scores, torch.full((2,), 7, device=device), 7, kernel_backend="triton")
    # the cotangent of a sum is one number, expanded
    (grad,) = torch.autograd.grad(routed.weights.sum(), scores, retain_graph=True)
    (expected,) = torch.autograd.grad(routed.weights, scores, torch.ones(2, 7, device=device))
    assert_same_but_for_rounding(grad, expected)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ("triton", "torch"))
def test_rows_of_numbers_may_have_any_strides(kernels, device, backend):
    """Budgets and lengths that are columns of a matrix, or one number expanded."""
    scores = torch.randn(3, 90, device=device)
    columns = torch.tensor([[4, 80, 7], [9, 33, 5], [6, 90, 8]], device=device)
    soft = torch.tensor([[3.5, 1.0], [8.25, 1.0], [7.0, 1.0]], device=device)
    for budget, lengths, soft_budget in (
        (columns[:, 0], columns[:, 1], soft[:, 0]),
        (columns[0, 0].expand(3), columns[0, 1].expand(3), soft[0, 0].expand(3)),
    ):
        for solver in ("exact", "coordinate_descent"):
            grads, routings = [], []
            for rows in ((budget, lengths, soft_budget), (budget.clone(), lengths.clone(), soft_budget.clone())):
                leaves = scores.clone().requires_grad_(), rows[2].detach().requires_grad_()
                routed = route(
                    leaves[0], rows[0], 9, lengths=rows[1], soft_budget=leaves[1], solver=solver, num_iterations=5,
                    kernel_backend=backend,
                )  # fmt: skip
                routings.append(routed)
                grads.append(torch.autograd.grad(routed.weights.square().sum(), leaves))
            assert torch.equal(routings[0].indices, routings[1].indices)
            assert torch.equal(routings[0].valid, routings[1].valid)
            assert_same_but_for_rounding(routings[0].weights, routings[1].weights)
            assert_all_same_but_for_rounding(*grads)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_gradient_of_a_soft_budget_comes_in_its_dtype(kernels, device, dtype):
    scores = torch.randn(2, 200, device=device)
    # numbers that half precision holds exactly
    half = torch.tensor([20.5, 7.25], device=device, dtype=dtype, requires_grad=True)
    exact = half.detach().double().requires_grad_()
    budget = torch.tensor([18, 7], device=device)
    gradients = []
    for leaf, values, backend in ((half, scores, "triton"), (exact, scores.double(), "torch")):
        routed = route(values, budget, 18, soft_budget=leaf, kernel_backend=backend)
        gradients.append(torch.autograd.grad(routed.weights.square().sum(), leaf)[0])
    assert gradients[0].dtype == dtype
    # rounded once
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=2**-7 if dtype == torch.bfloat16 else 2**-10,
                               atol=0)  # fmt: skip


def test_gradient_with_more_slots_than_one_part(device, monkeypatch):
    """The backward then sums over parts, and finds the slots of a block by search."""
    monkeypatch.setattr(op_routing_gradient_triton, "SLOTS_OF_A_PART", 256)
    check_against_reference(torch.randn(2, 700, device=device).round(), 0.7)


@pytest.mark.parametrize("backend", ("triton", "torch"))
def test_rows_with_nothing_to_route(kernels, device, backend):
    scores = torch.randn(2, 20, device=device, requires_grad=True)
    mask = torch.zeros(2, 20, dtype=torch.bool, device=device)
    routed = route(scores, torch.tensor([3, 0], device=device), 4, mask=mask, kernel_backend=backend)
    assert not routed.valid.any()
    assert (routed.indices == 19).all()
    assert (routed.weights == 0).all()
    routed.weights.sum().backward()
    assert (scores.grad == 0).all()
    empty = route(scores[:0], torch.zeros(0, dtype=torch.int64, device=device), 4, kernel_backend=backend)
    assert empty.weights.shape == empty.indices.shape == empty.valid.shape == (0, 4)


@pytest.mark.parametrize("backend", ("triton", "torch"))
def test_budgets_are_cut_to_slots_and_real_tokens(kernels, device, backend):
    scores = torch.randn(2, 10, device=device)
    budget = torch.tensor([9, 9], device=device)
    routed = route(scores, budget, 5, lengths=torch.tensor([10, 3], device=device), kernel_backend=backend)
    assert routed.valid.sum(-1).tolist() == [5, 3]
    assert routed.indices[1].tolist() == [0, 1, 2, 9, 9]
    # a soft budget of 9/8 · 3 exceeds the 3 tokens there are
    assert routed.weights[1].tolist() == [1, 1, 1, 0, 0]
    wide = route(scores, budget, 15, kernel_backend=backend)
    assert wide.valid.sum(-1).tolist() == [9, 9]
    assert (wide.indices[:, 9:] == 9).all()


@pytest.mark.parametrize("backend", ("triton", "torch"))
def test_scores_that_are_no_numbers_stay_in_bounds(kernels, device, backend):
    scores = torch.randn(3, 50, device=device)
    scores[0, 13] = math.nan
    scores[1, :40] = -math.inf
    scores[2, 7] = math.inf
    scores.requires_grad_()
    mask = torch.ones(3, 50, dtype=torch.bool, device=device)
    mask[1, 0] = False
    budget = torch.full((3,), 12, device=device)
    routed = route(scores, budget, 12, mask=mask, kernel_backend=backend)
    assert routed.valid.all()
    assert 13 in routed.indices[0]
    assert routed.weights[0].isnan().all()
    # real tokens of score -inf go before a pad
    assert routed.indices[1].tolist() == [1, 2, *range(40, 50)]
    assert 7 in routed.indices[2]
    assert routed.weights[1:].isfinite().all()
    routed.weights.sum().backward()
    assert ((routed.indices >= 0) & (routed.indices < 50)).all()


def test_rows_that_no_kernel_holds_go_to_the_reference(device):
    """n alone is looked at, so that no such row need exist here."""
    longest = op_routing_triton.LONGEST_PART * op_routing_triton._multiprocessors(device)
    assert op_routing_triton.kernels_take(longest, "exact", device)
    assert not op_routing_triton.kernels_take(longest + 1, "exact", device)
    assert not op_routing_triton.kernels_take(op_routing_triton.LONGEST_ROW + 1, "coordinate_descent", device)


def test_same_bits_every_time(kernels, device):
    """As docs/soft_topk.md promises for one device."""
    scores = torch.randn(2, 3000, device=device).half().float().requires_grad_()
    budget = torch.full((2,), 200, device=device)
    runs = []
    for _ in range(2):
        routed = route(scores, budget, 200, kernel_backend="triton")
        (grad,) = torch.autograd.grad(routed.weights.square().sum(), scores)
        runs.append((routed.indices, routed.weights, grad))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("runs_kernel", (True, False))
@pytest.mark.parametrize("solver", ("exact", "coordinate_descent"))
def test_operator_passes_opcheck(device, solver, runs_kernel, monkeypatch):
    if not runs_kernel:
        # as for rows that no kernel holds
        monkeypatch.setattr(op_routing, "kernels_take", lambda *_: False)
    scores = torch.randn(2, 30, device=device, requires_grad=True)
    budget = torch.tensor([3, 4], device=device)
    soft_budget = torch.tensor([3.5, 4.5], device=device, requires_grad=True)
    mask = torch.rand(2, 30, device=device) < 0.8
    settings = (1.125, solver, 1.0, 4, 1.0, 1.0)
    torch.library.opcheck(torch.ops.colt5.route, (scores, budget, soft_budget, mask, None, 5, *settings))
    torch.library.opcheck(torch.ops.colt5.route, (scores, budget, None, None, mask.sum(-1), 5, *settings))


class Router(torch.nn.Module):
    def forward(self, scores: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        budget = routed_budget(mask.sum(-1), 1 / 16, 1)
        routed = route(scores, budget, routed_capacity(scores.shape[1], 1 / 16, 1), mask=mask)
        return routed.indices, routed.weights, routed.valid


# Dynamo and AOTAutograd trace it: seven seconds
@pytest.mark.slow
def test_compiles_in_one_graph_at_any_length(device):
    router = torch.compile(Router(), fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (100, 128, 333):
        scores = torch.randn(2, n, device=device, requires_grad=True)
        mask = torch.rand(2, n, device=device) < 0.8
        outputs, expected = router(scores, mask), Router()(scores, mask)
        assert_all_same_but_for_rounding(outputs, expected)
        grads = [torch.autograd.grad(weights.square().sum(), scores)[0] for _, weights, _ in (outputs, expected)]
        assert_same_but_for_rounding(*grads)


@pytest.mark.slow
def test_exports_for_any_batch_and_length(device):
    auto = torch.export.Dim.AUTO
    example = (torch.randn(2, 300, device=device), torch.ones(2, 300, dtype=torch.bool, device=device))
    dims = {0: auto, 1: auto(min=32)}
    program = torch.export.export(Router(), example, dynamic_shapes=(dims, dims)).module()
    for rows, n in ((1, 256), (3, 129), (2, 1000)):
        scores = torch.randn(rows, n, device=device)
        mask = torch.rand(rows, n, device=device) < 0.7
        outputs, expected = program(scores, mask), Router()(scores, mask)
        assert_all_same_but_for_rounding(outputs, expected)


def test_autocast_leaves_the_precision_alone(device):
    scores = torch.randn(2, 200, device=device).bfloat16()
    budget = torch.tensor([9, 13], device=device)
    expected = route(scores, budget, 13, kernel_backend="triton")
    with torch.autocast(device.type, torch.bfloat16):
        routed = route(scores, budget, 13, kernel_backend="triton")
    assert routed.weights.dtype == torch.float32
    assert_same_but_for_rounding(routed.weights, expected.weights)


@pytest.mark.slow
def test_two_copies_of_the_code_share_a_process():
    folder = Path(modeling_colt5.__file__).parent
    spec = importlib.util.spec_from_loader("second_copy", loader=None, is_package=True)
    package = importlib.util.module_from_spec(spec)
    package.__path__ = [str(folder)]
    sys.modules["second_copy"] = package
    try:
        copy = importlib.import_module("second_copy.op_routing")
        assert copy.route is not route
        scores, budget = torch.randn(2, 50), torch.tensor([3, 4])
        routed, expected = copy.route(scores, budget, 4), route(scores, budget, 4)
        assert_same_but_for_rounding(routed.weights, expected.weights)
        compiled = torch.compile(lambda s: copy.route(s, budget, 4).weights, fullgraph=True, backend="aot_eager")
        assert_same_but_for_rounding(compiled(scores), expected.weights)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "second_copy"]:
            del sys.modules[name]


def test_refuses_what_cannot_be_routed():
    scores, budget = torch.randn(2, 5), torch.tensor([1, 1])
    with pytest.raises(TypeError, match="int64"):
        route(torch.ones(2, 5, dtype=torch.int64), budget, 1)
    with pytest.raises(TypeError, match="mask"):
        route(scores, budget, 1, mask=torch.ones(2, 5))
    for changed in ({"soft_topk_ratio": 0.5}, {"capacity": 0}, {"kernel_backend": "cuda"}):
        with pytest.raises(ValueError, match=next(iter(changed))):
            route(scores, budget, **{"capacity": 1, **changed})
    with pytest.raises(ValueError, match=r"\(5,\)"):
        route(scores[0], budget, 1)
    with pytest.raises(ValueError, match=r"\(2, 0\)"):
        route(scores[:, :0], budget, 1)
    with pytest.raises(ValueError, match="lengths"):
        route(scores, budget, 1, mask=scores > 0, lengths=budget)
    # what the reference would broadcast, and a kernel read past its end
    for name, tensor in (("mask", scores[:1] > 0), ("lengths", budget[:1]), ("soft_budget", scores[:1, 0])):
        with pytest.raises(ValueError, match=name):
            route(scores, budget, 1, **{name: tensor})
    with pytest.raises(ValueError, match=r"budget has shape \(1,\)"):
        route(scores, budget[:1], 1)
    for budget in (None, 3, torch.tensor([2.0, 2.0])):
        with pytest.raises(TypeError, match="budget"):
            route(torch.zeros(2, 4), budget, 2)
    with pytest.raises(TypeError, match="capacity is 2.0"):
        route(torch.zeros(2, 4), torch.tensor([2, 2]), 2.0)
    with pytest.raises(TypeError, match="soft_budget"):
        route(torch.zeros(2, 4), torch.tensor([2, 2]), 2, soft_budget=torch.tensor([2, 2]))
    with pytest.raises(TypeError, match="scores is a list"):
        route([1.0], torch.tensor([2, 2]), 2)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "n", "fraction"),
    ((4, 16384, 1 / 16), (2, 32768, 1.0), (2, 32768, 1 / 8), (8, 65536, 1 / 16), (1, 131072, 0.5), (1, 1 << 20, 1 / 8),
     (1, 1 << 22, 1 / 16), (2, 5_000_001, 0.3), (3000, 700, 1 / 16)),
)  # fmt: skip
def test_kernels_agree_with_the_reference_at_size(device, rows, n, fraction):
    check_against_reference(torch.randn(rows, n, device=device) * 3, fraction)


@pytest.mark.gpu
def test_offsets_past_int32(device):
    scores = torch.randn(600, 1 << 22, device=device, dtype=torch.float16)
    budget = torch.full((600,), 40, device=device)
    last = route(scores[-1:].clone(), budget[-1:], 40)
    routed = route(scores, budget, 40)
    assert torch.equal(routed.indices[-1:], last.indices)
    assert_same_but_for_rounding(routed.weights[-1:], last.weights)


@pytest.mark.gpu
@pytest.mark.parametrize("n", (5000, 50000))
def test_cuda_graph_replays_new_scores(device, n):
    scores = torch.randn(3, n, device=device)
    cotangent = torch.randn(3, n // 16, device=device)
    budget = torch.full((3,), n // 16, device=device)

    def run(scores):
        scores = scores.detach().requires_grad_()
        routed = route(scores, budget, n // 16)
        return routed.indices, routed.weights, torch.autograd.grad(routed.weights, scores, cotangent)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(scores)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(scores)
    for _ in range(2):
        scores.copy_(torch.randn(3, n, device=device))
        graph.replay()
        assert_all_same_but_for_rounding(outputs, run(scores))


@pytest.mark.gpu
def test_no_memory_beyond_slots_on_short_rows(device):
    scores = torch.randn(64, 16384, device=device)
    budget = torch.full((64,), 1024, device=device)
    route(scores, budget, 1024)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    routed = route(scores, budget, 1024)
    used = torch.cuda.max_memory_allocated() - before
    # indices 8, weights 4, valid 1 bytes a slot, 12 a row, and the allocator's rounding to 512 bytes
    assert used <= 13 * routed.weights.numel() + 64 * 12 + 4 * 512


@pytest.mark.gpu
def test_compiles_with_inductor(device):
    router = torch.compile(Router(), fullgraph=True)
    scores, mask = torch.randn(2, 4096, device=device), torch.rand(2, 4096, device=device) < 0.9
    assert_all_same_but_for_rounding(router(scores, mask), Router()(scores, mask))
