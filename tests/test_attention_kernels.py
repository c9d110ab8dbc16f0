"""The attention kernels against dense float64 attention, through the operator: values, all gradients, tracing.

In interpreter mode on the CPU; the cases marked gpu run compiled, on sizes that fill a card.
"""

import pytest
import torch
from dense_attention import band, dense_attention, random_positions
from rounding import assert_all_same_but_for_rounding, assert_same_but_for_rounding

from modeling_colt5 import kernel_backend
from modeling_colt5.model_layers import causal_table
from modeling_colt5.op_attention import (
    full_attention,
    local_attention,
    local_attention_reference,
    routed_attention,
)

pytest.importorskip("triton")

from modeling_colt5 import op_attention_gradient_triton, op_attention_triton  # noqa: E402

# error relative to the float64 reference on the same rounded inputs, in the 2-norm. fp32: a score adds up to 128
# rounded products, which makes it wrong by some 4e-7 of its size (2^-24 times the root of 128, over the root of 3); a
# score's gradient is a difference of two such sums, and is multiplied by a probability that is wrong as well, so that
# two to seven such errors add, by the order in which a card adds. Half precisions: probabilities, score gradients and
# results are rounded once each, by 2^-11 or 2^-8 at most, a third of that in the mean, and the errors of up to three
# such steps add.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = list(TOLERANCE)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Without a GPU the operators still take the kernels, interpreted, whatever the environment says."""
    monkeypatch.setattr(kernel_backend, "FORCED_BACKEND", None)


def draw(batch, queries, keys, heads, kv_heads, head_size, max_distance, dtype, device):
    """Query, key, value and table; scores have a deviation of about 1 before the bias."""
    scale = head_size**-0.25
    states = [
        (torch.randn(batch, length, count, head_size) * factor).to(device, dtype)
        for length, count, factor in ((queries, heads, scale), (keys, kv_heads, scale), (keys, kv_heads, 1.0))
    ]
    return [*states, torch.randn(heads, 2 * max_distance + 1, device=device)]


def assert_all_close(attend, leaves, query_positions, key_positions, allowed):
    """`attend(*leaves)` and its gradients against the dense reference; without a table among them, with one of 0."""
    dtype = leaves[0].dtype
    leaves = [tensor.detach().requires_grad_() for tensor in leaves]
    actual = attend(*leaves)
    assert actual.dtype == dtype
    cotangent = torch.randn_like(actual)
    gradients = torch.autograd.grad(actual, leaves, cotangent)

    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    table = exact[3:] or [exact[0].new_zeros(exact[0].shape[2], 1)]
    expected, _ = dense_attention(*exact[:3], *table, query_positions, key_positions, allowed)
    exact_gradients = torch.autograd.grad(expected, exact, cotangent.double())
    for name, ours, theirs in zip(
        ("output", "query", "key", "value", "table")[: 1 + len(leaves)],
        (actual, *gradients),
        (expected, *exact_gradients),
        strict=True,
    ):
        # softmax over a single key has a gradient of zero: what rounding leaves is measured against the cotangent
        scale = theirs.norm() if theirs.norm() > 1e-9 else cotangent.double().norm()
        error = (ours.double() - theirs).norm() / scale
        assert error < TOLERANCE[dtype], f"{name}: relative error {error:.1e}"


def check_band(batch, length, radius, max_distance, heads, kv_heads, head_size, dtype, mask, device):
    leaves = draw(batch, length, length, heads, kv_heads, head_size, max_distance, dtype, device)
    positions = torch.arange(length, device=device).expand(batch, length)
    mask = None if mask is None else mask.to(device)
    allowed = band(length, radius, mask).to(device)
    assert_all_close(lambda *inputs: local_attention(*inputs, radius, mask), leaves, positions, positions, allowed)


def check_routed(batch, length, queries, keys, max_distance, heads, kv_heads, head_size, dtype, used, device):
    leaves = draw(batch, queries, keys, heads, kv_heads, head_size, max_distance, dtype, device)
    query_positions, key_positions = random_positions(batch, queries, length), random_positions(batch, keys, length)
    mask = None
    allowed = torch.ones(batch, 1, keys, dtype=torch.bool, device=device)
    if used is not None:
        mask = (torch.arange(keys) < torch.tensor(used)[:, None]).to(device)
        # as the routing operation leaves them
        key_positions[~mask.cpu()] = length - 1
        allowed = mask[:, None, :]
    query_positions, key_positions = query_positions.to(device), key_positions.to(device)
    assert_all_close(
        lambda *inputs: routed_attention(*inputs, query_positions, key_positions, mask),
        leaves,
        query_positions,
        key_positions,
        allowed,
    )


def check_full(batch, queries, keys, max_distance, heads, kv_heads, head_size, dtype, mask, device):
    """Causal, with a bias by distance, where there is a `max_distance`; else as a decoder attends to a memory."""
    *states, table = draw(batch, queries, keys, heads, kv_heads, head_size, max_distance or 1, dtype, device)
    positions = [torch.arange(length, device=device).expand(batch, length) for length in (queries, keys)]
    mask = None if mask is None else mask.to(device).expand(batch, -1).contiguous()
    allowed = torch.ones(batch, 1, keys, dtype=torch.bool, device=device) if mask is None else mask[:, None]
    if max_distance is None:
        assert_all_close(lambda *inputs: full_attention(*inputs, None, mask), states, *positions, allowed)
        return
    allowed = allowed & (positions[1][:, None] <= positions[0][:, :, None])

    def attend(query, key, value, table):
        return full_attention(query, key, value, causal_table(table), mask)

    assert_all_close(attend, [*states, table], *positions, allowed)


LEFT = torch.arange(75)[None] >= 30
RIGHT = torch.arange(75)[None] < 40
HOLES = torch.arange(75)[None] % 3 == 1

# one tile and several, radii of 0, inside, at and beyond the table's reach and the length, heads alone, grouped and
# multi-query, a head size that is no power of two, every kind of mask
BAND_CASES = [
    (1, 1, 127, 128, 1, 1, 16, torch.float32, None),
    (2, 75, 0, 128, 1, 1, 16, torch.float32, None),
    (1, 140, 33, 40, 2, 1, 24, torch.float32, None),
    (1, 75, 20, 12, 2, 2, 16, torch.float32, LEFT),
    (1, 75, 75, 12, 2, 1, 16, torch.float32, RIGHT),
    (1, 75, 1000, 128, 1, 1, 16, torch.float32, HOLES),
    (2, 150, 127, 128, 1, 1, 64, torch.float16, None),
    (1, 75, 40, 16, 2, 1, 40, torch.bfloat16, HOLES),
]


@pytest.mark.parametrize("batch, length, radius, max_distance, heads, kv_heads, head_size, dtype, mask", BAND_CASES)
def test_band(batch, length, radius, max_distance, heads, kv_heads, head_size, dtype, mask, device):
    check_band(batch, length, radius, max_distance, heads, kv_heads, head_size, dtype, mask, device)


# causal: one token, the table's reach beyond the length and within it, one tile and several, rows without any key
# (before padding on the left ends); of a memory: fewer queries than keys, many more, one of either, no real key at all
FULL_CASES = [
    (2, 1, 1, 5, 2, 2, 16, torch.float32, None),
    (1, 40, 40, 128, 2, 1, 16, torch.float32, None),
    (2, 75, 75, 12, 2, 2, 16, torch.float32, LEFT),
    (1, 75, 75, 20, 2, 2, 24, torch.float32, RIGHT),
    (1, 150, 150, 16, 1, 1, 64, torch.float16, None),
    (1, 75, 75, 16, 2, 2, 16, torch.bfloat16, HOLES),
    (2, 40, 75, None, 4, 1, 16, torch.float32, RIGHT),
    (1, 140, 3, None, 4, 2, 16, torch.float32, None),
    (1, 100, 75, None, 2, 1, 24, torch.float32, HOLES),
    (2, 1, 75, None, 2, 1, 16, torch.float32, LEFT),
    (1, 75, 1, None, 2, 2, 16, torch.float32, None),
    (1, 5, 75, None, 2, 1, 16, torch.float32, torch.zeros(1, 75, dtype=torch.bool)),
    (1, 150, 40, None, 2, 1, 64, torch.bfloat16, None),
]


@pytest.mark.parametrize(
    "batch, queries, keys, max_distance, heads, kv_heads, head_size, dtype, mask", FULL_CASES, ids=str
)
def test_full(batch, queries, keys, max_distance, heads, kv_heads, head_size, dtype, mask, device):
    check_full(batch, queries, keys, max_distance, heads, kv_heads, head_size, dtype, mask, device)


# of keys, of heads, and of both; more parts than tiles, and parts without any real key
SPLIT_CASES = [
    (2, 40, 75, None, 4, 1, 16, torch.float32, RIGHT),
    (2, 3, 75, None, 4, 2, 16, torch.float32, LEFT),
    (1, 100, 150, None, 6, 1, 24, torch.float32, None),
    (1, 5, 75, None, 2, 1, 16, torch.float32, torch.zeros(1, 75, dtype=torch.bool)),
    (1, 150, 300, None, 2, 2, 64, torch.float16, None),
    (1, 40, 75, None, 4, 1, 64, torch.bfloat16, HOLES),
]


@pytest.fixture
def split(monkeypatch):
    """Sums are split wherever there are two tiles of keys, or two heads that share keys; the launches of their parts
    are counted."""
    launched = []
    monkeypatch.setattr(op_attention_triton, "LEAST_TILES", 1)
    for module in (op_attention_triton, op_attention_gradient_triton):

        def noted(*arguments, add_up=module.launch_parts):
            launched.append(arguments[-1])
            add_up(*arguments)

        monkeypatch.setattr(module, "launch_parts", noted)
    return launched


@pytest.mark.parametrize("case", SPLIT_CASES, ids=lambda case: "-".join(map(str, case[:7])))
def test_full_in_parts(case, device, split):
    check_full(*case, device)
    heads_share_keys = case[4] > case[5]
    # the output, the query's gradient, and where heads share keys those of key and value
    assert len(split) == 2 + 2 * heads_share_keys and min(split) > 1


def test_parts_drop_what_the_whole_drops(device, split, monkeypatch):
    query, key, value, _ = draw(1, 40, 150, 4, 1, 16, 1, torch.float32, device)
    leaves = [states.requires_grad_() for states in (query, key, value)]
    seed = torch.tensor([5], device=device)

    def results():
        output = full_attention(*leaves, dropout=0.3, seed=seed)
        return output, *torch.autograd.grad(output, leaves, torch.ones_like(output))

    in_parts = results()
    assert len(split) == 4
    monkeypatch.setattr(op_attention_triton, "PROGRAMS", 1)
    assert_all_same_but_for_rounding(in_parts, results())
    assert len(split) == 4


@pytest.mark.parametrize("length, ahead, max_distance", [(75, 0, 12), (150, 3, 128), (140, 40, 20)])
def test_keys_ahead_are_left_out_without_a_change(length, ahead, max_distance, device):
    """Where their bias is minus infinity, the kernels give the same bits with them: they add 0."""
    query, key, value, table = draw(2, length, length, 2, 2, 16, max_distance, torch.float32, device)
    # the largest distance stands for all beyond
    table[:, max_distance + 1 + min(ahead, max_distance - 1) :] = -torch.inf
    mask = torch.rand(2, length, device=device) < 0.8
    cotangent = torch.randn_like(query)
    operands = (query, key, value, table, length, None, None, mask, 0.0, None)

    def results(ahead):
        output, sums = torch.empty_like(query), torch.empty(2, 2, length, device=device)
        op_attention_triton.attention_into(*operands, output, sums, None, ahead)
        gradients = [torch.empty_like(part) for part in (query, key, value, table)]
        rest = (output, sums, *gradients, None, None, None, ahead)
        op_attention_gradient_triton.attention_backward_into(cotangent, *operands, *rest)
        return output, sums, *gradients

    for ours, theirs in zip(results(ahead), results(None), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_full_without_kernels(case, device, monkeypatch):
    """The same in PyTorch, wherever a query has a key; what the others give is some finite number."""
    monkeypatch.setattr(kernel_backend, "FORCED_BACKEND", "torch")
    batch, queries, keys, max_distance, heads, kv_heads, head_size, _, mask = case
    *states, table = draw(batch, queries, keys, heads, kv_heads, head_size, max_distance or 1, torch.float64, device)
    leaves = [tensor.double().requires_grad_() for tensor in (*states, table)]
    mask = None if mask is None else mask.to(device).expand(batch, -1)
    allowed = torch.ones(batch, queries, keys, dtype=torch.bool, device=device)
    allowed = allowed if mask is None else allowed & mask[:, None]
    if max_distance is not None:
        allowed = allowed.tril()
    has_key = allowed.any(-1)[..., None, None]
    positions = [torch.arange(length, device=device).expand(batch, length) for length in (queries, keys)]
    if max_distance is None:
        leaves[3] = torch.zeros_like(leaves[3])
        given = full_attention(*leaves[:3], None, mask)
    else:
        given = full_attention(*leaves[:3], causal_table(leaves[3]), mask)
    wanted, _ = dense_attention(*leaves, *positions, allowed)
    assert given.isfinite().all()
    assert_same_but_for_rounding(given * has_key, wanted * has_key)
    used = [leaf for leaf in leaves if leaf.requires_grad]
    cotangent = torch.randn_like(given) * has_key
    gradients = (torch.autograd.grad(output, used, cotangent) for output in (given, wanted))
    for ours, theirs in zip(*gradients, strict=True):
        # where a softmax has one key, all cancels
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 * cotangent.norm().item())


# keys all near, all far and both; fewer keys than a tile; unused slots, a whole tile of them too
ROUTED_CASES = [
    (1, 1000, 70, 100, 16, 2, 1, 16, torch.float32, None),
    (2, 150, 40, 90, 128, 1, 1, 24, torch.float32, (90, 7)),
    (1, 100_000, 40, 70, 1, 2, 2, 16, torch.float32, None),
    (1, 2000, 1, 3, 20, 1, 1, 16, torch.float32, None),
    (1, 1000, 70, 200, 20, 2, 1, 64, torch.float16, (100,)),
    (1, 1000, 70, 130, 20, 1, 1, 32, torch.bfloat16, (70,)),
]


@pytest.mark.parametrize(
    "batch, length, queries, keys, max_distance, heads, kv_heads, head_size, dtype, used", ROUTED_CASES
)
def test_routed(batch, length, queries, keys, max_distance, heads, kv_heads, head_size, dtype, used, device):
    check_routed(batch, length, queries, keys, max_distance, heads, kv_heads, head_size, dtype, used, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [32, 48, 64, 128])
@pytest.mark.parametrize("masked", [False, True])
def test_band_compiled(head_size, dtype, masked, device):
    mask = torch.rand(2, 1000) < 0.8 if masked else None
    check_band(2, 1000, 127, 128, 4, 2, head_size, dtype, mask, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("radius, max_distance", [(0, 128), (300, 128), (5000, 20)])
def test_band_compiled_radii(radius, max_distance, dtype, device):
    check_band(1, 700, radius, max_distance, 2, 2, 64, dtype, None, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [32, 48, 64, 128])
@pytest.mark.parametrize("used", [None, (600, 37)])
def test_routed_compiled(head_size, dtype, used, device):
    check_routed(2, 4800, 300, 600, 128, 4, 2, head_size, dtype, used, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [48, 64])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "queries, keys, max_distance, kv_heads",
    [
        (500, 500, 128, 4), (500, 500, 1000, 4), (300, 1500, None, 1), (700, 90, None, 2),
        # in parts: of many keys, and of heads that share few
        (70, 20_000, None, 2), (300, 1100, None, 1),
    ],
)  # fmt: skip
def test_full_compiled(queries, keys, max_distance, kv_heads, head_size, dtype, masked, device):
    mask = torch.rand(2, keys) < 0.8 if masked else None
    check_full(2, queries, keys, max_distance, 4, kv_heads, head_size, dtype, mask, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_bit_identical_from_run_to_run(dtype, device):
    leaves = draw(2, 4096, 4096, 4, 2, 64, 128, dtype, device)
    leaves = [tensor.requires_grad_() for tensor in leaves]
    positions = random_positions(2, 512, 4096).to(device)
    routed = [states[:, :512].detach().requires_grad_() for states in leaves[:3]] + [leaves[3]]
    memory = [leaves[0][:, :64].detach().requires_grad_(), *leaves[1:3]]
    for attend, inputs in (
        (full_attention, memory),
        (lambda *states: local_attention(*states, 127), leaves),
        (lambda *states: routed_attention(*states, positions, positions), routed),
    ):
        output = attend(*inputs)
        cotangent = torch.randn_like(output)
        first = torch.autograd.grad(output, inputs, cotangent)
        for _ in range(5):
            again = torch.autograd.grad(attend(*inputs), inputs, cotangent)
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, first, strict=True))


@pytest.mark.gpu
def test_offsets_beyond_32_bits(device):
    # the fused projection has 3,000,000 · 3 · 4 · 64 > 2^31 elements
    length, tail = 3_000_000, 400
    fused = torch.randn(1, length, 3, 4, 64, device=device, dtype=torch.bfloat16) * 0.3
    fused.requires_grad_()
    table = torch.randn(4, 257, device=device)
    output = local_attention(*fused.unbind(2), table, 127)
    cotangent = torch.zeros_like(output)
    cotangent[:, -tail // 2 :] = torch.randn(1, tail // 2, 4, 64, device=device)
    (gradient,) = torch.autograd.grad(output, fused, cotangent)

    exact = fused.detach()[:, -tail:].double().requires_grad_()
    positions = torch.arange(tail, device=device)[None]
    allowed = band(tail, 127).to(device)
    expected, _ = dense_attention(*exact.unbind(2), table.double(), positions, positions, allowed)
    (expected_gradient,) = torch.autograd.grad(expected, exact, cotangent[:, -tail:].double())
    expected, actual = expected[:, 127:], output[:, -tail:][:, 127:].double()
    assert (actual - expected).norm() / expected.norm() < TOLERANCE[torch.bfloat16]
    assert (gradient[:, -tail:].double() - expected_gradient).norm() / expected_gradient.norm() < TOLERANCE[
        torch.bfloat16
    ]


def test_views_of_a_fused_projection_are_read_in_place(device):
    fused = torch.randn(2, 40, 3, 2, 16, device=device)
    table = torch.randn(2, 33, device=device)
    views = fused.unbind(2)
    assert not views[0].is_contiguous()
    expected = local_attention(*(view.contiguous() for view in views), table, 10)
    assert_same_but_for_rounding(local_attention(*views, table, 10), expected)
    transposed = [view.transpose(2, 3).contiguous().transpose(2, 3) for view in views]
    assert_same_but_for_rounding(local_attention(*transposed, table, 10), expected)


@pytest.mark.gpu
def test_later_launches_see_their_own_alignment_and_strides(device):
    # the first call compiles for aligned operands; the next ones come shifted by an element, then with odd strides
    storage = torch.randn(3 * 2 * 500 * 4 * 64 + 1, device=device).bfloat16()
    table = torch.randn(4, 257, device=device)
    aligned = storage[:-1].view(3, 2, 500, 4, 64)
    shifted = storage[1:].view(3, 2, 500, 4, 64)
    odd = torch.randn(3, 2, 500, 4 * 64 + 1, device=device).bfloat16()[..., :-1].unflatten(-1, (4, 64))
    for states in (aligned, aligned, shifted, odd, aligned):
        expected, _ = local_attention_reference(*states.double(), table.double(), 127)
        actual = local_attention(*states, table, 127)
        assert (actual.double() - expected).norm() / expected.norm() < TOLERANCE[torch.bfloat16]


def test_padding_to_the_right_changes_nothing(device):
    leaves = draw(1, 60, 60, 1, 1, 16, 16, torch.float32, device)
    expected = local_attention(*leaves, 20)
    padded = [torch.cat([states, torch.randn_like(states[:, :40])], 1).requires_grad_() for states in leaves[:3]]
    mask = (torch.arange(100, device=device) < 60)[None]
    actual = local_attention(*padded, leaves[3], 20, mask)
    assert_same_but_for_rounding(actual[:, :60], expected)
    cotangent = torch.zeros_like(actual)
    cotangent[:, :60] = torch.randn_like(cotangent[:, :60])
    for gradient in torch.autograd.grad(actual, padded, cotangent):
        assert gradient[:, 60:].eq(0).all()


def test_a_query_without_any_key_gives_zeros_and_no_gradient(device):
    leaves = [tensor.requires_grad_() for tensor in draw(1, 80, 80, 1, 1, 16, 16, torch.float32, device)]
    mask = (torch.arange(80, device=device) < 5)[None]
    output = local_attention(*leaves, 10, mask)
    assert output[:, 15:].eq(0).all() and output[:, :15].ne(0).any()
    gradients = torch.autograd.grad(output, leaves, torch.randn_like(output))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[0][:, 15:].eq(0).all()

    positions = torch.arange(80, device=device)[None] * 3
    output = routed_attention(*leaves, positions, positions, torch.zeros_like(mask))
    gradients = torch.autograd.grad(output, leaves, torch.randn_like(output))
    assert all(tensor.eq(0).all() for tensor in (output, *gradients))


def test_a_table_without_gradient_gets_none(device):
    *states, table = draw(1, 40, 40, 1, 1, 16, 16, torch.float32, device)
    leaves = [tensor.requires_grad_() for tensor in states]
    gradients = torch.autograd.grad(local_attention(*leaves, table, 10).square().sum(), leaves)
    everything = [*leaves, table.clone().requires_grad_()]
    expected = torch.autograd.grad(local_attention(*everything, 10).square().sum(), everything)
    assert_all_same_but_for_rounding(gradients, expected[:3])


def test_large_scores_stay_finite(device):
    # T5 does not scale its scores: deviations of a hundred occur
    query, key, value, table = draw(1, 60, 60, 1, 1, 16, 16, torch.float16, device)
    leaves = [tensor.requires_grad_() for tensor in (query * 20, key * 20, value, table * 1000)]
    output = local_attention(*leaves, 20)
    gradients = torch.autograd.grad(output.float().sum(), leaves)
    assert all(tensor.isfinite().all() for tensor in (output, *gradients))


def operator_inputs(device, routed):
    leaves = [tensor.requires_grad_() for tensor in draw(2, 20, 20, 2, 1, 16, 8, torch.float32, device)]
    mask = (torch.arange(20, device=device) < 15).expand(2, 20).clone()
    positions = random_positions(2, 20, 90).to(device)
    rest = (None, 0, positions, positions, mask) if routed else (None, 6, None, None, mask)
    return (*leaves, *rest, 0.0, None)


@pytest.mark.slow
@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_operator_passes_opcheck(routed, backend, device, monkeypatch):
    monkeypatch.setattr(kernel_backend, "FORCED_BACKEND", backend)
    torch.library.opcheck(torch.ops.colt5.attention.default, operator_inputs(device, routed))


@pytest.mark.slow
@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_compiled_without_graph_break_it_gives_the_same(routed, backend, device, monkeypatch):
    monkeypatch.setattr(kernel_backend, "FORCED_BACKEND", backend)

    def attend(query, key, value, table, width, radius, query_positions, key_positions, mask, *_):
        if routed:
            return routed_attention(query, key, value, table, query_positions, key_positions, mask) * 2
        return local_attention(query, key, value, table, radius, mask) * 2

    inputs = operator_inputs(device, routed)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    output, expected = compiled(*inputs), attend(*inputs)
    assert_same_but_for_rounding(output, expected)
    cotangent = torch.randn_like(output)
    assert_all_same_but_for_rounding(
        torch.autograd.grad(output, inputs[:4], cotangent), torch.autograd.grad(expected, inputs[:4], cotangent)
    )


def test_exported_it_takes_any_length(device):
    class Attention(torch.nn.Module):
        def forward(self, query, key, value, table, mask):
            return local_attention(query, key, value, table, 6, mask)

    length = torch.export.Dim("length", min=2, max=1_000_000)
    dynamic = {1: length}
    *inputs, mask = (tensor.detach() for tensor in operator_inputs(device, False) if isinstance(tensor, torch.Tensor))
    program = torch.export.export(
        Attention(), (*inputs, mask), dynamic_shapes=(dynamic, dynamic, dynamic, None, dynamic)
    )
    *longer, table = draw(2, 37, 37, 2, 1, 16, 8, torch.float32, device)
    mask = torch.arange(37, device=device).expand(2, 37) < 30
    expected, _ = local_attention_reference(*longer, table, 6, mask)
    # fp32 against fp32: both round sums of a dozen terms; padded queries differ by design
    torch.testing.assert_close(program.module()(*longer, table, mask)[:, :30], expected[:, :30], rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused():
    query, key, value, table = draw(1, 8, 8, 4, 2, 16, 8, torch.float32, "cpu")
    with pytest.raises(ValueError, match="divides the query's"):
        local_attention(query[:, :, :3], key, value, table, 4)
    with pytest.raises(ValueError, match="bias_table"):
        local_attention(query, key, value, table[:3], 4)
    with pytest.raises(ValueError, match="max_distance"):
        local_attention(query, key, value, table[:, :-1], 4)
    with pytest.raises(ValueError, match="dtype"):
        local_attention(query, key.half(), value, table, 4)
    with pytest.raises(ValueError, match="bool"):
        local_attention(query, key, value, table, 4, torch.ones(1, 8, dtype=torch.int64))
    for keys in (key, key[:, :5]):
        with pytest.raises(ValueError, match="bias_table"):
            full_attention(query, keys, keys, table[:, :1])
    with pytest.raises(ValueError, match="as many tokens"):
        local_attention(query, key[:, :5], value[:, :5], table, 4)
    with pytest.raises(ValueError, match="int64"):
        positions = torch.arange(8, dtype=torch.int32)[None]
        routed_attention(query, key, value, table, positions, positions)
    # kernels would read beyond the keys of a smaller batch
    with pytest.raises(ValueError, match="of one batch"):
        local_attention(query.expand(2, -1, -1, -1), key, value, table, 4)
    for part in (query[:, :0], query[0]):
        with pytest.raises(ValueError, match="at least one token each"):
            local_attention(part, part, part, table, 4)
    with pytest.raises(ValueError, match="radius is -1"):
        local_attention(query, key, value, table, -1)
    with pytest.raises(ValueError, match="width is 0"):
        local_attention(query, key, value, table, 4, width=0)
    for dropout in (-0.5, 1.0, 1.5):
        with pytest.raises(ValueError, match=f"dropout is {dropout}"):
            local_attention(query, key, value, table, 4, dropout=dropout)
    for seed in (3, torch.tensor([1.0]), torch.tensor([1, 2])):
        with pytest.raises(TypeError, match="seed is"):
            local_attention(query, key, value, table, 4, dropout=0.5, seed=seed)


@pytest.mark.parametrize("routed", [False, True])
def test_dropout_drops_probabilities_forward_and_backward(routed, device):
    length, dropout = 60, 0.25
    *states, table = draw(1, length, length, 2, 2, 64, 16, torch.float32, device)
    positions = torch.arange(length, device=device)[None] * (3 if routed else 1)

    def attend(query, key, value, table):
        torch.manual_seed(7)
        if routed:
            return routed_attention(query, key, value, table, positions, positions, dropout=dropout)
        return local_attention(query, key, value, table, length, dropout=dropout)

    # values that are rows of the identity show the probabilities themselves
    identity = torch.eye(length, 64, device=device)[None, :, None].expand(1, length, 2, 64)
    weights = attend(*states[:2], identity, table)[..., :length].transpose(1, 2)
    kept = weights != 0
    # 7200 draws: three standard deviations are 0.015
    assert abs(kept.double().mean().item() - (1 - dropout)) < 0.015
    # neither heads nor neighbouring queries or keys share what they drop: 0.75² + 0.25² agree by chance
    for one, other in ((kept[:, 0], kept[:, 1]), (kept[:, :, 1:], kept[:, :, :-1]), (kept[..., 1:], kept[..., :-1])):
        assert abs((one == other).double().mean().item() - 0.625) < 0.03

    leaves = [tensor.requires_grad_() for tensor in (*states, table)]
    output = attend(*leaves)
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    _, probabilities = dense_attention(
        *exact, positions, positions, torch.ones(1, 1, 1, dtype=torch.bool, device=device)
    )
    expected = torch.einsum("bhqk,bkhd->bqhd", probabilities * kept / (1 - dropout), exact[2])
    cotangent = torch.randn_like(output)
    gradients = torch.autograd.grad(output, leaves, cotangent)
    exact_gradients = torch.autograd.grad(expected, exact, cotangent.double())
    for ours, theirs in zip((output, *gradients), (expected, *exact_gradients), strict=True):
        assert (ours.double() - theirs).norm() / theirs.norm() < TOLERANCE[torch.float32]


def test_dropout_follows_the_generator_and_is_refused_by_the_reference(device, monkeypatch):
    inputs = draw(1, 40, 40, 1, 1, 16, 16, torch.float32, device)
    torch.manual_seed(1)
    first, second = (local_attention(*inputs, 20, dropout=0.5) for _ in range(2))
    torch.manual_seed(1)
    assert_same_but_for_rounding(local_attention(*inputs, 20, dropout=0.5), first)
    assert (first - second).abs().max() > 0.1
    monkeypatch.setattr(kernel_backend, "FORCED_BACKEND", "torch")
    with pytest.raises(NotImplementedError, match="attend"):
        local_attention(*inputs, 20, dropout=0.5)


def test_float64_takes_the_reference(device):
    query, key, value, table = (tensor.double() for tensor in draw(1, 30, 30, 2, 1, 16, 8, torch.float32, device))
    positions = torch.arange(30, device=device)[None]
    expected, _ = dense_attention(query, key, value, table, positions, positions, band(30, 5).to(device))
    torch.testing.assert_close(local_attention(query, key, value, table, 5), expected, rtol=1e-12, atol=1e-12)
