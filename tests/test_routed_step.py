"""The kernels of one new token of a causally routed layer, and their references: against the whole sequence."""

import pytest
import torch
from rounding import assert_same_but_for_rounding

pytest.importorskip("triton")

from step_references import (  # noqa: E402
    hand_pool_reference,
    hand_thresholds_reference,
    local_step_attention_reference,
    pool_step_attention_reference,
    token_gate_reference,
)

from modeling_colt5.op_gates import causal_gates  # noqa: E402
from modeling_colt5.op_gates_triton import hand_thresholds_into, token_gate_into  # noqa: E402
from modeling_colt5.op_pools import routed_pools  # noqa: E402
from modeling_colt5.op_pools_triton import hand_pool_into  # noqa: E402
from modeling_colt5.op_step_attention_triton import (  # noqa: E402
    local_step_attention_into,
    pool_step_attention_into,
)

GATES = [token_gate_reference, token_gate_into]


@pytest.mark.parametrize("fill_first", [False, True])
@pytest.mark.parametrize("gate", GATES, ids=["reference", "kernel"])
def test_token_after_token_is_routed_as_the_whole_sequence(gate, fill_first: bool, device: torch.device) -> None:
    """With a row that gets a token in every second step alone, and scores of which many are equal."""
    window, target, capacity, size, steps = 6, 2, 3, 17, 30
    settings = {"target": target, "capacity": capacity, "epsilon": 0.7, "fill_first": fill_first}
    scores = torch.randint(0, 5, (2, steps), device=device) / 2.0
    others = torch.randn(2, steps, 2, device=device)
    total = torch.tensor([steps, steps // 2], device=device)
    framed = scores.view(2, -1, window)
    expected = causal_gates(
        framed, None, total, None, **settings, soft_topk_ratio=9 / 8, kernel_backend="torch"
    )  # fmt: skip
    ring, other_ring = torch.full((2, size), 9.0, device=device), torch.full((2, size, 2), 9.0, device=device)
    past = torch.zeros_like(total)
    seen = torch.zeros(2, dtype=torch.int64, device=device)
    for step in range(steps):
        is_real = torch.tensor([True, step % 2 == 1], device=device)
        every = torch.arange(2, device=device)
        # a token that is not real has other scores
        own = torch.where(is_real, scores[every, seen.clamp(max=steps - 1)], 7.0)
        own_others = torch.where(is_real[:, None], others[every, seen.clamp(max=steps - 1)], 7.0)
        number = past // window
        carried = torch.stack([expected.thresholds[every, number], torch.full((2, 2), 5.0, device=device)], 1)
        weights = torch.full((2, 1), 3.0, device=device)
        indices, valid = torch.full((2, 1), 3, device=device), torch.ones(2, 1, dtype=torch.bool, device=device)
        after = past + is_real
        gate(
            torch.cat([own[:, None], own_others], 1), past, after, carried, ring, other_ring, window,
            target, capacity, 0.7, fill_first, weights, indices, valid,
        )  # fmt: skip
        slot = (every, past // window, past % window)
        torch.testing.assert_close(valid[:, 0], expected.routed[slot] & is_real)
        torch.testing.assert_close(weights[:, 0], expected.weights[slot] * is_real)
        assert not indices.any()
        seen, past = seen + is_real, after
    for row, length in enumerate(total.tolist()):
        places = torch.arange(length - size, length).clamp(min=0) % size
        ranks = torch.arange(length - size, length).clamp(min=0)
        torch.testing.assert_close(ring[row, places], scores[row, ranks])
        torch.testing.assert_close(other_ring[row, places], others[row, ranks])


@pytest.mark.parametrize("gate", GATES, ids=["reference", "kernel"])
def test_a_router_alone_has_no_other_ring(gate, device: torch.device) -> None:
    ring = torch.zeros(1, 9, device=device)
    past = torch.tensor([5], device=device)
    carried = torch.tensor([[[0.5, 1.0], [9.0, 9.0]]], device=device)
    weights, indices = torch.empty(1, 1, device=device), torch.empty(1, 1, dtype=torch.int64, device=device)
    valid = torch.empty(1, 1, dtype=torch.bool, device=device)
    score = torch.tensor([[0.75]], device=device)
    gate(score, past, past + 1, carried, ring, None, 4, 1, 2, 0.5, False, weights, indices, valid)
    assert valid.item() and ring[0, 5].item() == 0.75
    torch.testing.assert_close(weights.double(), torch.tensor([[-0.5]], device=device).double().exp())


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: torch.Tensor, distance: torch.Tensor
) -> torch.Tensor:
    """[heads, d_kv] of one query [heads, d_kv] to keys [n, heads, d_kv], in float64."""
    most = table.shape[1] // 2
    scores = torch.einsum("hd,khd->hk", query.double(), key.double())
    scores = scores + table.double()[:, distance.clamp(-most, most) + most]
    return torch.einsum("hk,khd->hd", scores.softmax(-1), value.double())


def ring_of(states: torch.Tensor, length: int, size: int) -> torch.Tensor:
    """The ring of the first tokens of [n, ...], whose other slots hold something large."""
    ring = torch.full((size, *states.shape[1:]), 99.0, dtype=states.dtype, device=states.device)
    ranks = torch.arange(max(0, length - size), length, device=states.device)
    ring[ranks % size] = states[ranks]
    return ring


THRESHOLDS = [hand_thresholds_reference, hand_thresholds_into]


@pytest.mark.parametrize("soft_target", [2.25, 6.5, 8.0])
@pytest.mark.parametrize("hand_on", THRESHOLDS, ids=["reference", "kernel"])
def test_windows_hand_on_thresholds(hand_on, soft_target: float, device: torch.device) -> None:
    """Where the new token is real and the last of a window, else nothing; with many scores that are equal."""
    window, size, target, epsilon = 7, 19, 2, 0.7
    lengths = [21, 21, 22, 7, 35]
    scores = torch.randint(0, 5, (len(lengths), 40), device=device) / 2.0
    total = torch.tensor(lengths, device=device)
    past = total - 1
    # a token that is not real completes nothing
    past[1] = 21
    ring = torch.stack([ring_of(row, length, size) for row, length in zip(scores, lengths, strict=True)])
    carried = torch.randn(len(lengths), 2, 2, device=device)
    before = carried.clone()
    hand_on(past, total, ring, carried, window, target, soft_target, epsilon)
    for row, length in enumerate(lengths):
        if row in (1, 2):
            assert torch.equal(carried[row], before[row])
            continue
        assert torch.equal(carried[row, 1], before[row, 0])
        own = scores[row, length - window : length].double()
        assert carried[row, 0, 0] == own.sort(descending=True).values[target - 1]
        threshold = carried[row, 0, 1].double()
        if soft_target < window:
            weights = ((own - threshold) / epsilon).exp().clamp(max=1)
            # the threshold is fp32
            torch.testing.assert_close(weights.sum().item(), soft_target, rtol=1e-5, atol=0)
        else:
            assert threshold == float("-inf")


HAND_POOL = [hand_pool_reference, hand_pool_into]


# the interpreted kernel takes some seconds
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("size", [5, pytest.param(14, marks=pytest.mark.slow)])
@pytest.mark.parametrize("hand_on", HAND_POOL, ids=["reference", "kernel"])
def test_windows_hand_on_pools(hand_on, size: int, dtype: torch.dtype, device: torch.device) -> None:
    """End after end they are the pools of the whole sequence, where there are fewer tokens than slots too; a row whose
    last token is not real, or not the last of a window, keeps what it has."""
    rows, groups, group, d_kv, window, ring_size, ends = 3, 2, 2, 3, 6, 16, 3
    epsilon, ratio = 0.7, 9 / 8
    scores = torch.randint(0, 7, (rows, groups, (ends + 1) * window), device=device) / 2.0
    states = torch.randn(2, rows, (ends + 1) * window, groups * group, d_kv, device=device).to(dtype)
    settings = {"soft_topk_ratio": ratio, "epsilon": epsilon, "kernel_backend": "torch"}
    expected = routed_pools(scores.flatten(0, 1), window, size, None, **settings).tokens
    index, weights, valid = (
        part.view(rows, groups, ends + 2, size) for part in (expected.indices, expected.weights, expected.valid)
    )
    shape = (rows, 2, groups, size)
    pool = {"score": torch.full(shape, 99.0, device=device)}
    pool |= {name: torch.full((*shape, group, d_kv), 99.0, device=device, dtype=dtype) for name in ("key", "value")}
    pool |= {"rank": torch.full(shape, 99, device=device), "weight": torch.full(shape, 99.0, device=device)}
    pool |= {"valid": torch.zeros(shape, dtype=torch.bool, device=device)}
    sources = [torch.empty(rows, groups, size, dtype=torch.int32, device=device)] if hand_on is hand_pool_into else []
    # rows come to their ends one after the other
    for end in range(1, ends + 1):
        for row in range(rows):
            lengths = [end * window + other - row for other in range(rows)]
            total = torch.tensor(lengths, device=device)
            past = total - 1
            if row == 1:
                # a token that is not real in another row, which ends there too
                total[0] = past[0] = end * window
            rings = [
                torch.stack([ring_of(part[number], length, ring_size) for number, length in enumerate(lengths)])
                for part in (scores.transpose(1, 2), *states)
            ]
            before = {name: part.clone() for name, part in pool.items()}
            hand_on(past, total, *rings, *pool.values(), window, ratio, epsilon, *sources)
            for name, part in pool.items():
                for other in range(rows):
                    if other != row:
                        assert torch.equal(part[other], before[name][other]), name
                assert torch.equal(part[row, 1], before[name][row, 0]), name
            used = valid[row, :, end]
            assert torch.equal(pool["valid"][row, 0], used)
            for number in range(groups):
                count = int(used[number].sum())
                ranks = index[row, number, end, :count]
                assert torch.equal(pool["rank"][row, 0, number, :count], ranks)
                assert torch.equal(pool["score"][row, 0, number, :count], scores[row, number, ranks])
                # exponentials of fp32 differences, whose thresholds are summed in another order
                torch.testing.assert_close(
                    pool["weight"][row, 0, number, :count], weights[row, number, end, :count], rtol=1e-5, atol=1e-6
                )
                for name, part in zip(("key", "value"), states, strict=True):
                    own = part[row, ranks].unflatten(1, (groups, group))[:, number]
                    assert torch.equal(pool[name][row, 0, number, :count], own)


LOCAL = [local_step_attention_reference, local_step_attention_into]
POOL = [pool_step_attention_reference, pool_step_attention_into]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("radius", [0, 3, 70])
@pytest.mark.parametrize("attend", LOCAL, ids=["reference", "kernel"])
def test_local_attention(attend, radius: int, dtype: torch.dtype, device: torch.device) -> None:
    """Of first tokens, of tokens behind a ring that is not full, and of those behind one that has gone round."""
    heads, d_kv, size = 3, 20, 150
    lengths = [0, 1, 60, 149, 150, 433]
    rows = len(lengths)
    tokens = torch.randn(2, rows, max(lengths) + 1, heads, d_kv, device=device).to(dtype)
    query = torch.randn(rows, heads * d_kv, device=device).to(dtype)
    table = torch.randn(heads, 2 * 40 + 1, device=device)
    past = torch.tensor(lengths, device=device)
    # the third row's token is not real
    total = past + (torch.arange(rows, device=device) != 2)
    rings = torch.full((2, rows, size, heads, d_kv), float("nan"), device=device, dtype=dtype)
    for row, length in enumerate(lengths):
        known = torch.arange(max(0, length - size), length, device=device)
        rings[:, row, known % size] = tokens[:, row, known]
        # no slot that may be read is left out
        rings[:, row] = rings[:, row].nan_to_num(nan=100.0)
    new = [torch.stack([part[row, length] for row, length in enumerate(lengths)]) for part in tokens]
    before = rings.clone()
    output = torch.empty_like(query)
    attend(query, *(part.flatten(1) for part in new), table, past, total, *rings, radius, output)
    for row, length in enumerate(lengths):
        ranks = torch.arange(max(0, length - radius), length + 1, device=device)
        key, value = tokens[:, row, ranks]
        expected = plain_attention(query[row].view(heads, d_kv), key, value, table, ranks - length)
        assert_same_but_for_rounding(output[row], expected.flatten().to(dtype))
        if row != 2:
            before[:, row, length % size] = tokens[:, row, length]
    assert torch.equal(rings, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("attend", POOL, ids=["reference", "kernel"])
def test_attention_to_a_pool(attend, groups: int, dtype: torch.dtype, device: torch.device) -> None:
    group, d_kv, size, ring_size, rows = 2, 20, 300, 31, 3
    heads = groups * group
    query, new_key, new_value = torch.randn(3, rows, heads * d_kv, device=device).to(dtype)
    table = torch.randn(heads, 2 * 40 + 1, device=device)
    past = torch.tensor([700, 41, 350], device=device)
    total = past + torch.tensor([1, 1, 0], device=device)
    valid = torch.tensor([[True], [False], [True]], device=device)
    pools = torch.randn(2, rows, 2, groups, size, group, d_kv, device=device).to(dtype)
    rank = torch.randint(0, 40, (rows, 2, groups, size), device=device) + 300
    weight = torch.rand(rows, 2, groups, size, device=device)
    used = torch.arange(size, device=device) < torch.tensor([size, 9, 10], device=device)[:, None, None, None]
    used = used.expand(rows, 2, groups, size).contiguous()
    # what is not used may be anything
    pools[:, ~used], weight[~used], rank[~used] = float("nan"), float("nan"), -(10**9)
    # the pool before is not read
    pools[:, :, 1] = float("nan")
    rings = torch.randn(2, rows, ring_size, heads, d_kv, device=device).to(dtype)
    before = rings.clone()
    output = torch.full_like(query, 5.0)
    attend(query, new_key, new_value, table, past, total, valid, *rings, *pools, rank, weight, used, output)
    for row in range(rows):
        if row != 1:
            for number in range(groups):
                own = slice(number * group, (number + 1) * group)
                count = int(used[row, 0, number].sum())
                scale = weight[row, 0, number, :count, None, None]
                key, value = ((part[row, 0, number, :count].float() * scale).to(dtype) for part in pools)
                distance = rank[row, 0, number, :count] - past[row]
                states = query[row].view(heads, d_kv)[own]
                expected = plain_attention(states, key, value, table[own], distance)
                result = output[row].view(heads, d_kv)[own]
                assert_same_but_for_rounding(result, expected.to(dtype))
        if row != 2:
            for ring, new in zip(before, (new_key, new_value), strict=True):
                ring[row, past[row] % ring_size] = new[row].view(heads, d_kv)
    assert torch.equal(output[1], torch.full_like(output[1], 5.0))
    assert torch.equal(rings, before)
