"""The kernels of attention in two dimensions against dense float64 attention: values, all gradients, tracing.

In interpreter mode on the CPU; the cases marked gpu run compiled, on sizes that fill a card.
"""

from typing import Any

import pytest
import torch
from rounding import assert_all_same_but_for_rounding, assert_same_but_for_rounding
from vision import attend_in_windows, pad_pictures, tiny_vision_model, windows_by_reference

from modeling_colt5 import kernel_backend
from modeling_colt5.op_attention import local_attention, routed_attention, routed_attention_reference

pytest.importorskip("triton")

# relative to float64 on the same rounded inputs, in the 2-norm. fp32: sums of some hundred rounded terms. Half
# precisions: probabilities, score gradients and results are rounded once each, by 2^-11 or 2^-8 at most, a third of
# that in the mean, and the errors of up to three such steps add.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = list(TOLERANCE)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the operators still take the kernels, interpreted, whatever the environment says."""
    monkeypatch.setattr(kernel_backend, "FORCED_BACKEND", None)
    torch.manual_seed(0)


def dense(query, key, value, table, query_places, key_places, allowed):
    """Attention of [batch, n, heads, d] with every pair written out; a row with no key gives zeros.

    `query_places`, `key_places`: int64 [batch, n, 2], row and column; `allowed`: bool [batch, queries, keys].
    """
    most = table.shape[-1] // 2
    key, value = (part.repeat_interleave(query.shape[2] // part.shape[2], 2) for part in (key, value))
    offset = (key_places[:, None] - query_places[:, :, None]).clamp(-most, most) + most
    bias = table[:, offset[..., 0], offset[..., 1]].movedim(0, 1)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) + bias
    exponentials = torch.where(allowed[:, None], (scores - scores.detach().amax(-1, keepdim=True)).exp(), 0.0)
    total = exponentials.sum(-1, keepdim=True)
    return torch.einsum("bhqk,bkhd->bqhd", exponentials / torch.where(total == 0, 1.0, total), value)


def assert_all_close(attend, leaves, *rest):
    """`attend(*leaves)` [batch, n, heads, d] and its gradients against `dense(*leaves, *rest)`."""
    dtype = leaves[0].dtype
    leaves = [tensor.detach().requires_grad_() for tensor in leaves]
    actual = attend(*leaves)
    assert actual.dtype == dtype
    cotangent = torch.randn_like(actual)
    gradients = torch.autograd.grad(actual, leaves, cotangent)
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    expected = dense(*exact, *rest)
    exact_gradients = torch.autograd.grad(expected, exact, cotangent.double())
    names = ("output", "query", "key", "value", "table")
    for name, ours, theirs in zip(names, (actual, *gradients), (expected, *exact_gradients), strict=True):
        # softmax over a single key has a gradient of zero: what rounding leaves is measured against the cotangent
        scale = theirs.norm() if theirs.norm() > 1e-9 else cotangent.double().norm()
        error = (ours.double() - theirs).norm() / scale
        assert error < TOLERANCE[dtype], f"{name}: relative error {error:.1e}"


def draw(batch, queries, keys, heads, kv_heads, head_size, most, dtype, device):
    """Query, key, value and table; scores have a deviation of about 1 before the bias."""
    scale = head_size**-0.25
    states = [
        (torch.randn(batch, length, count, head_size) * factor).to(device, dtype)
        for length, count, factor in ((queries, heads, scale), (keys, kv_heads, scale), (keys, kv_heads, 1.0))
    ]
    return [*states, torch.randn(heads, 2 * most + 1, 2 * most + 1, device=device)]


def rows_and_columns(places, width):
    return torch.stack([places // width, places % width], -1)


def check_window(batch, height, width, radius, most, heads, kv_heads, head_size, dtype, masked, device):
    n = height * width
    leaves = draw(batch, n, n, heads, kv_heads, head_size, most, dtype, device)
    mask = torch.rand(batch, height, width, device=device) < 0.5 if masked else None
    places = rows_and_columns(torch.arange(n, device=device), width).expand(batch, n, 2)
    allowed = ((places[:, None] - places[:, :, None]).abs() <= radius).all(-1)
    if mask is not None:
        allowed = allowed & mask.flatten(1)[:, None]

    def attend(*inputs):
        states = [part.unflatten(1, (height, width)) for part in inputs[:3]]
        return attend_in_windows(*states, inputs[3], radius, mask).flatten(1, 2)

    assert_all_close(attend, leaves, places, places, allowed)


def check_routed(batch, height, width, queries, keys, most, heads, kv_heads, head_size, dtype, used, device):
    leaves = draw(batch, queries, keys, heads, kv_heads, head_size, most, dtype, device)
    places = [
        torch.stack([torch.randperm(height * width)[:count].sort().values for _ in range(batch)]).to(device)
        for count in (queries, keys)
    ]
    mask = None
    allowed = torch.ones(batch, queries, keys, dtype=torch.bool, device=device)
    if used is not None:
        mask = (torch.arange(keys) < torch.tensor(used)[:, None]).to(device)
        # as the routing operation leaves them
        places[1][~mask] = height * width - 1
        allowed = allowed & mask[:, None]
    assert_all_close(
        lambda *inputs: routed_attention(*inputs, *places, mask, width=width),
        leaves,
        *(rows_and_columns(part, width) for part in places),
        allowed,
    )


# one place, one row, one column, one block, several with parts over the edges; radii of 0, within, beyond a block and
# beyond the grid; tables narrower and wider than the window; heads alone and grouped; a head size that is no power of
# two; with and without padding, which leaves some places without any key
WINDOW_CASES = [
    (2, 1, 1, 0, 2, 1, 1, 16, torch.float32, False),
    (1, 1, 19, 2, 3, 2, 1, 16, torch.float32, True),
    (1, 21, 1, 1, 1, 1, 1, 16, torch.float32, True),
    (2, 9, 13, 3, 2, 2, 1, 24, torch.float32, False),
    (2, 10, 11, 1, 3, 2, 2, 16, torch.float32, True),
    (1, 6, 17, 10, 20, 1, 1, 16, torch.float32, False),
    (1, 7, 5, 1000, 3, 1, 1, 16, torch.float32, True),
    (1, 12, 17, 3, 2, 2, 1, 32, torch.float16, True),
    (1, 11, 9, 2, 4, 2, 2, 40, torch.bfloat16, True),
]


@pytest.mark.parametrize("case", WINDOW_CASES, ids=str)
def test_window(case, device):
    check_window(*case, device)


# fewer tokens than a tile and more, offsets beyond the table and within, unused slots, a whole row of them
ROUTED_CASES = [
    (1, 9, 7, 5, 8, 3, 2, 1, 16, torch.float32, None),
    (2, 30, 11, 40, 70, 4, 2, 2, 24, torch.float32, (70, 7)),
    (1, 500, 200, 33, 20, 128, 1, 1, 16, torch.float32, None),
    (2, 9, 9, 6, 6, 2, 1, 1, 16, torch.float32, (0, 6)),
    (1, 40, 60, 70, 150, 20, 2, 1, 32, torch.float16, (130,)),
    (1, 20, 20, 70, 65, 5, 1, 1, 40, torch.bfloat16, (60,)),
]


@pytest.mark.parametrize("case", ROUTED_CASES, ids=str)
def test_routed(case, device):
    check_routed(*case, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [16, 32, 48, 64, 128])
@pytest.mark.parametrize("masked", [False, True])
def test_window_compiled(head_size, dtype, masked, device):
    check_window(2, 37, 45, 3, 128, 4, 2, head_size, dtype, masked, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("radius, most", [(0, 4), (9, 3), (500, 20)])
def test_window_compiled_radii(radius, most, dtype, device):
    check_window(1, 33, 29, radius, most, 2, 2, 64, dtype, False, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [16, 32, 48, 64, 128])
@pytest.mark.parametrize("used", [None, (400, 37)])
def test_routed_compiled(head_size, dtype, used, device):
    check_routed(2, 90, 70, 300, 400, 20, 4, 2, head_size, dtype, used, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_bit_identical_from_run_to_run(dtype, device):
    leaves = [tensor.requires_grad_() for tensor in draw(2, 4096, 4096, 4, 2, 64, 20, dtype, device)]
    places = torch.stack([torch.randperm(4096, device=device)[:512] for _ in range(2)])
    few = [states[:, :512].detach().requires_grad_() for states in leaves[:3]] + [leaves[3]]

    def window(*parts):
        return attend_in_windows(*(part.unflatten(1, (64, 64)) for part in parts[:3]), parts[3], 3)

    for attend, inputs in (
        (window, leaves),
        (lambda *parts: routed_attention(*parts, places, places, width=64), few),
    ):
        output = attend(*inputs)
        cotangent = torch.randn_like(output)
        first = torch.autograd.grad(output, inputs, cotangent)
        for _ in range(5):
            again = torch.autograd.grad(attend(*inputs), inputs, cotangent)
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, first, strict=True))


@pytest.mark.parametrize("scale", [1e-25, 1e-6, 1e6])
def test_the_tables_gradient_keeps_its_digits_at_every_scale(scale, device):
    """Gradients are summed as whole numbers of a unit that goes with their size."""
    *states, table = draw(1, 30, 30, 1, 1, 16, 2, torch.float32, device)
    states = [part.unflatten(1, (5, 6)) for part in states]
    table.requires_grad_()
    output = attend_in_windows(*states, table, 2)
    cotangent = torch.randn_like(output)
    (expected,) = torch.autograd.grad(output, table, cotangent, retain_graph=True)
    (actual,) = torch.autograd.grad(output, table, cotangent * scale)
    # some rounding of fp32
    assert_same_but_for_rounding(actual / scale, expected)


# Triton's interpreter takes maxima with NumPy, which warns of them
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_loss_that_overflowed_shows_in_the_tables_gradient(bad, device):
    """Loss scaling looks for gradients that are not finite."""
    *states, table = draw(1, 30, 30, 1, 1, 16, 2, torch.float32, device)
    table.requires_grad_()
    output = attend_in_windows(*(part.unflatten(1, (5, 6)) for part in states), table, 2)
    cotangent = torch.randn_like(output)
    cotangent[0, 2, 2] = bad
    (gradient,) = torch.autograd.grad(output, table, cotangent)
    assert not gradient.isfinite().all()


def test_no_gradient_at_all_is_zero(device):
    leaves = [tensor.requires_grad_() for tensor in draw(1, 12, 12, 2, 1, 16, 2, torch.float32, device)]
    output = attend_in_windows(*(part.unflatten(1, (3, 4)) for part in leaves[:3]), leaves[3], 1)
    assert all(part.eq(0).all() for part in torch.autograd.grad(output, leaves, torch.zeros_like(output)))


def test_views_of_a_fused_projection_are_read_in_place(device):
    fused = torch.randn(2, 5, 8, 3, 2, 16, device=device)
    table = torch.randn(2, 5, 5, device=device)
    views = fused.unbind(3)
    assert not views[0].is_contiguous()
    expected = attend_in_windows(*(view.contiguous() for view in views), table, 2)
    assert_same_but_for_rounding(attend_in_windows(*views, table, 2), expected)


def test_padding_at_the_edges_changes_nothing(device):
    leaves = draw(1, 42, 42, 1, 1, 16, 4, torch.float32, device)
    small = [part.unflatten(1, (6, 7)) for part in leaves[:3]]
    expected = attend_in_windows(*small, leaves[3], 2)
    padded = []
    for part in small:
        room = torch.randn(1, 11, 9, *part.shape[3:], device=device)
        room[:, :6, :7] = part
        padded.append(room.requires_grad_())
    mask = torch.zeros(1, 11, 9, dtype=torch.bool, device=device)
    mask[:, :6, :7] = True
    actual = attend_in_windows(*padded, leaves[3], 2, mask)
    assert_same_but_for_rounding(actual[:, :6, :7], expected)
    cotangent = torch.zeros_like(actual)
    cotangent[:, :6, :7] = torch.randn_like(expected)
    for gradient in torch.autograd.grad(actual, padded, cotangent):
        assert gradient[~mask].eq(0).all() and gradient[mask].ne(0).any()


def operator_inputs(device: str, routed: bool) -> tuple[Any, ...]:
    leaves = [tensor.requires_grad_() for tensor in draw(1, 20, 20, 2, 1, 16, 2, torch.float32, device)]
    mask = (torch.arange(20, device=device) < 15)[None]
    places = torch.randperm(90, device=device)[None, :20].clone()
    rest = (9, 0, places, places, mask) if routed else (5, 2, None, None, mask)
    return (*leaves, *rest, 0.0, None)


@pytest.mark.slow
@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_operator_passes_opcheck(routed, backend, device, monkeypatch):
    monkeypatch.setattr(kernel_backend, "FORCED_BACKEND", backend)
    torch.library.opcheck(torch.ops.colt5.attention.default, operator_inputs(device, routed))


def test_dropout_is_undone_in_the_mean_and_the_same_in_the_backward(device):
    query, key, value, table = draw(40, 20, 20, 1, 1, 16, 2, torch.float32, device)
    # the same picture forty times, each with a dropout of its own
    states = [part[:1].expand_as(part).unflatten(1, (4, 5)) for part in (query, key, value)]
    expected = attend_in_windows(*(part[:1] for part in states), table, 2)
    seed = torch.tensor([3], device=device)
    mean = attend_in_windows(*states, table, 2, None, 0.5, seed).mean(0)
    # the mean of 40 has a sixth of one draw's deviation, which is about as large as the output
    assert (mean - expected[0]).norm() < 0.3 * expected.norm()
    states = [part[:2] for part in states]
    # the output is linear in the values: along a random direction, the gradient says how it changes
    leaf = states[2].clone().requires_grad_()
    direction, cotangent = torch.randn_like(leaf), torch.randn_like(leaf)
    output = attend_in_windows(*states[:2], leaf, table, 2, None, 0.5, seed)
    (gradient,) = torch.autograd.grad(output, leaf, cotangent)
    moved = attend_in_windows(*states[:2], states[2] + direction, table, 2, None, 0.5, seed)
    # the output is linear in the values: only rounding is left, of fp32 sums over all elements of two outputs
    torch.testing.assert_close(
        (gradient * direction).sum(), ((moved - output.detach()) * cotangent).sum(), rtol=1e-4, atol=1e-3
    )


def test_scores_gradients_with_dropout_are_finite_differences(device):
    leaves = draw(1, 20, 20, 1, 1, 16, 1, torch.float32, device)
    seed = torch.tensor([5], device=device)
    cotangent = torch.randn(1, 4, 5, 1, 16, device=device)

    def loss(*inputs):
        states = [part.unflatten(1, (4, 5)) for part in inputs[:3]]
        return (attend_in_windows(*states, inputs[3], 1, None, 0.3, seed) * cotangent).sum()

    inputs = [part.clone().requires_grad_() for part in leaves]
    gradients = torch.autograd.grad(loss(*inputs), inputs)
    for place in (0, 1, 3):
        direction = torch.randn_like(leaves[place])
        sides = []
        for step in (1e-2, -1e-2):
            moved = list(leaves)
            moved[place] = leaves[place] + step * direction
            sides.append(loss(*moved))
        # fp32, and an error of the third order in the step
        torch.testing.assert_close(
            (gradients[place] * direction).sum(), (sides[0] - sides[1]) / 2e-2, rtol=2e-2, atol=2e-2
        )


def test_what_does_not_fit_is_refused(device):
    query, key, value, table = draw(1, 12, 12, 2, 1, 16, 2, torch.float32, device)
    grid = [part.unflatten(1, (3, 4)) for part in (query, key, value)]
    with pytest.raises(ValueError, match="do not fit"):
        attend_in_windows(grid[0], grid[1][..., :8], grid[2], table, 1)
    with pytest.raises(ValueError, match="as many tokens, in rows of 4"):
        local_attention(query, key[:, :8], value[:, :8], table, 1, width=4)
    with pytest.raises(ValueError, match="as many tokens, in rows of 5"):
        local_attention(query, key, value, table, 1, width=5)
    with pytest.raises(ValueError, match="bias_table"):
        attend_in_windows(*grid, table[:, :, :3], 1)
    with pytest.raises(ValueError, match="differ in dtype"):
        attend_in_windows(grid[0].double(), *grid[1:], table, 1)
    with pytest.raises(ValueError, match=r"mask is torch.int64 \(1, 12\); it must be bool \(1, 12\)"):
        attend_in_windows(*grid, table, 1, torch.ones(1, 3, 4, dtype=torch.int64))
    places = torch.arange(12, device=device)[None]
    with pytest.raises(ValueError, match=r"key_positions are torch.int32 \(1, 12\)"):
        routed_attention(query, key, value, table, places, places.int(), width=4)


@pytest.mark.parametrize("function", ["window", "routed"])
def test_no_tokens_give_nothing(function, device):
    states = [torch.empty(0, 3, 4, 2, 16, device=device, requires_grad=True) for _ in range(3)]
    table = torch.randn(2, 5, 5, device=device, requires_grad=True)
    if function == "window":
        output = attend_in_windows(*states, table, 1)
    else:
        places = torch.empty(0, 12, dtype=torch.int64, device=device)
        output = routed_attention(*(part.flatten(1, 2) for part in states), table, places, places, width=4)
    (gradient,) = torch.autograd.grad(output.sum(), table)
    assert output.shape[0] == 0 and gradient.eq(0).all()


def test_a_model_with_kernels_is_the_one_without(device):
    """Pictures of two sizes in one batch, forward and backward."""
    batch = pad_pictures([torch.randn(3, 10, 39), torch.randn(3, 17, 22)], 17, 39)
    batch = {name: part.to(device) for name, part in batch.items()}
    results = []
    for backend in ("triton", "torch"):
        torch.manual_seed(1)
        model = (
            tiny_vision_model(kernel_backend=backend, num_layers=1, num_light_heads=1, num_heavy_heads=1)
            .to(device)
            .train()
        )
        logits = model(**batch).logits
        cotangent = torch.linspace(-1, 1, logits.numel(), device=device).view_as(logits)
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(logits, parameters, cotangent)
        results.append((logits, dict(zip(names, gradients, strict=True))))
    (ours, our_gradients), (theirs, their_gradients) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for name, gradient in our_gradients.items():
        # fp32 through a layer; what a router does with two almost equal scores is the same here
        error = (gradient - their_gradients[name]).norm()
        assert error <= 1e-4 * their_gradients[name].norm() + 1e-6, name


def test_references_and_operator_agree_in_float64(device):
    """On float64 there are no kernels: the public functions are the references."""
    query, key, value, table = (part.double() for part in draw(1, 12, 12, 2, 1, 16, 2, torch.float32, device))
    grid = [part.unflatten(1, (3, 4)) for part in (query, key, value)]
    places = torch.arange(12, device=device)[None]
    assert_all_same_but_for_rounding(
        [attend_in_windows(*grid, table, 1), routed_attention(query, key, value, table, places, places, width=4)],
        [
            windows_by_reference(*grid, table, 1)[0],
            routed_attention_reference(query, key, value, table, places, places, width=4)[0],
        ],
    )
