"""The attention of pictures against loops over places in float64: values, weights and all gradients."""

import pytest
import torch
from vision import windows_by_reference

from modeling_colt5.op_attention import routed_attention_reference


def eager_attend(query, key, value, bias, mask):
    """Dense attention that also gives its weights."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(-1, -2) + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    return (weights @ value).transpose(1, 2), weights


def one_query(query, keys, values, places, place, table):
    """One query [heads, d] among keys [n, heads, d] at known places, by the definition; the output [heads, d]."""
    most = (table.shape[-1] - 1) // 2
    scores = []
    for key, (row, column) in zip(keys, places, strict=True):
        down, across = (max(-most, min(most, d)) for d in (row - place[0], column - place[1]))
        scores.append((query * key).sum(-1) + table[:, most + down, most + across])
    weights = torch.stack(scores).softmax(0)
    return (weights[..., None] * torch.stack(list(values))).sum(0), weights


def by_the_definition(query, key, value, table, radius, mask):
    """Window attention as loops: [batch, height, width, heads, d]."""
    batch, height, width, heads, _ = query.shape
    key, value = (part.repeat_interleave(heads // part.shape[3], 3) for part in (key, value))
    rows = []
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                near = [
                    (i, j)
                    for i in range(max(0, y - radius), min(height, y + radius + 1))
                    for j in range(max(0, x - radius), min(width, x + radius + 1))
                    if mask is None or mask[b, i, j]
                ]
                keys, values = ([part[b, i, j] for i, j in near] for part in (key, value))
                rows.append(one_query(query[b, y, x], keys, values, near, (y, x), table)[0])
    return torch.stack(rows).view_as(query)


def inputs(batch, height, width, heads, kv_heads, most, size=4):
    states = [
        torch.randn(batch, height, width, count, size, dtype=torch.float64) for count in (heads, kv_heads, kv_heads)
    ]
    return [*states, torch.randn(heads, 2 * most + 1, 2 * most + 1, dtype=torch.float64)]


# grids of one place, of one row, within a block, of a block's side and around it; radii of 0, within, around and
# beyond block and grid; tables narrower and wider than the window; heads that share keys
CASES = [
    (2, 1, 1, 0, 2, 1, 1),
    (1, 1, 11, 2, 3, 2, 2),
    (2, 5, 3, 1, 1, 2, 1),
    (1, 8, 8, 3, 4, 2, 2),
    (1, 9, 7, 3, 2, 2, 2),
    (1, 6, 17, 9, 20, 1, 1),
    (1, 4, 5, 40, 3, 1, 1),
]


@pytest.mark.parametrize(
    "batch, height, width, radius, most, heads, kv_heads, masked",
    [(*case, masked) for case in CASES for masked in (False, True) if masked or case[2] < 17],
)
def test_window_values_and_gradients_are_those_of_the_definition(
    batch, height, width, radius, most, heads, kv_heads, masked
):
    torch.manual_seed(0)
    leaves = [tensor.requires_grad_() for tensor in inputs(batch, height, width, heads, kv_heads, most)]
    mask = None
    if masked:
        mask = torch.rand(batch, height, width) < 0.7
        # every query has a key: what one without any gets is not promised
        mask[:, :: radius + 1, :: radius + 1] = True
    expected = by_the_definition(*leaves, radius, mask)
    actual, weights = windows_by_reference(*leaves, radius, mask)
    assert weights is None
    # float64: sums of a few hundred terms
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)
    cotangent = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def test_window_gradients_are_finite_differences():
    torch.manual_seed(0)
    leaves = [tensor.requires_grad_() for tensor in inputs(1, 3, 4, 1, 1, 1, size=2)]
    assert torch.autograd.gradcheck(lambda *parts: windows_by_reference(*parts, 1)[0], leaves)


@pytest.mark.parametrize("radius", [1, 3, 30])
def test_window_weights_make_the_output(radius):
    """The entry r + d of the last dimensions is for the place d rows, or columns, away; beyond the grid it is 0."""
    torch.manual_seed(0)
    batch, height, width, heads = 2, 10, 9, 2
    query, key, value, table = inputs(batch, height, width, heads, heads, 2)
    output, weights = windows_by_reference(query, key, value, table, radius, attend=eager_attend)
    r = min(radius, height - 1)
    assert weights.shape == (batch, heads, height, width, 2 * r + 1, 2 * r + 1)
    torch.testing.assert_close(weights.sum((-1, -2)), torch.ones(batch, heads, height, width, dtype=torch.float64))
    total = torch.zeros_like(output)
    for y in range(height):
        for x in range(width):
            for i in range(max(0, y - r), min(height, y + r + 1)):
                for j in range(max(0, x - r), min(width, x + r + 1)):
                    total[:, y, x] += weights[:, :, y, x, r + i - y, r + j - x][..., None] * value[:, i, j]
    torch.testing.assert_close(total, output, rtol=1e-10, atol=1e-11)


def test_memory_of_windows_grows_with_the_grid():
    """What a call allocates at once for a grid of 128 × 128 is far below the 2 GiB of all pairs in fp32."""
    sizes = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(part.numel() for part in torch.utils._pytree.tree_leaves(result) if torch.is_tensor(part))
            return result

    with torch.device("meta"), Largest():
        states = torch.empty(1, 128, 128, 2, 8)
        windows_by_reference(states, states, states, torch.empty(2, 7, 7), 3)
    # 2 heads, and 14 × 14 keys for each of 128 × 128 queries
    assert max(sizes) <= 2 * 14 * 14 * 128 * 128


@pytest.mark.parametrize("masked", [False, True])
def test_routed_values_and_gradients_are_those_of_the_definition(masked):
    torch.manual_seed(0)
    batch, height, width, heads, size, most = 2, 9, 7, 2, 4, 3
    places = [torch.randint(height * width, (batch, n)) for n in (5, 8)]
    leaves = [torch.randn(batch, n, heads, size, dtype=torch.float64) for n in (5, 8, 8)]
    leaves.append(torch.randn(heads, 2 * most + 1, 2 * most + 1, dtype=torch.float64))
    leaves = [leaf.requires_grad_() for leaf in leaves]
    query, key, value, table = leaves
    valid = None
    if masked:
        valid = torch.arange(8) < torch.tensor([[3], [8]])
    actual, _ = routed_attention_reference(*leaves, *places, valid, width=width)
    rows = []
    for b in range(batch):
        used = range(8) if valid is None else valid[b].nonzero().flatten().tolist()
        where = [divmod(int(places[1][b, k]), width) for k in used]
        for q in range(5):
            here = divmod(int(places[0][b, q]), width)
            keys, values = ([part[b, k] for k in used] for part in (key, value))
            rows.append(one_query(query[b, q], keys, values, where, here, table)[0])
    expected = torch.stack(rows).view_as(actual)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)
    cotangent = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)
