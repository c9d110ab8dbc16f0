"""Triton kernels of the pools of a causal decoder: the candidates of every pool, and the pools' keys and values.

A token's key is one 64-bit integer, its score's integer image above its position's complement: larger is better, ties
go to the earlier token, no two are equal. A token that leaves a pool never comes back, so that a token's places in the
pools are a chain: `following` holds its links, and a gradient is summed along it, in order and without atomics.
"""

import torch
from torch import Tensor

from .op_routing_steps_triton import HIGHEST_KEY, LOWEST_KEY, closed_threshold, key_to_score, load_keys
from .run_launch_triton import adjacent, cdiv, launch, next_power_of_2, tl, triton

# How many lists are merged in one step.
RADIX = 8
# How many of its keys a program compares with all others in one step.
CHUNK = 16
# The most keys of a window or of a pool: Triton's tensors have at most 2**20 entries, and lists are a power of two
# long.
LONGEST_LIST = 2**20 // CHUNK
# The most keys of a pool and a window together for which one program makes a row's next pool, and how many pairs of
# keys it compares in one step.
LONGEST_UNION, PAIRS = 2**13, 2**14
NO_TOKEN = tl.constexpr(2**31 - 1)
NO_KEY = tl.constexpr(-(2**63))


@triton.jit
def token_keys(scores, row, row_stride, first, slots, count, position):
    """64-bit keys of the `count` scores from `first` on, whose positions begin at `position`."""
    pointer = scores + row * row_stride + first
    keys = load_keys(pointer, pointer, pointer, row * 0, slots, count, 0, 1, 0, 0, False, False)
    keys = (keys.to(tl.int64) << 32) | ((position + slots) ^ NO_TOKEN).to(tl.int64)
    return tl.where(slots < count, keys, NO_KEY)


@triton.jit(do_not_specialize=["row_stride", "initial_stride", "windows", "window", "size", "base"])
def tops_kernel(
    scores, initial, initial_valid, tops,
    row_stride, initial_stride, windows, window, size, base,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """Program (row, j): the `LIST` largest keys of window j - 1, or of the initial pool for j = 0; falling."""
    row = (tl.program_id(0) // windows).to(tl.int64)
    number = tl.program_id(0) % windows
    slots = tl.arange(0, BLOCK)
    out = tops + tl.program_id(0).to(tl.int64) * LIST
    first = (number - 1) * window
    count = 0
    rank = slots * 0
    keys = slots.to(tl.int64) * 0 + NO_KEY
    if number > 0:
        count = window
        keys = token_keys(scores, row, row_stride, first, slots, count, base + first)
        for chunk in range(0, count, CHUNK):
            others = chunk + tl.arange(0, CHUNK)
            other_keys = token_keys(scores, row, row_stride, first, others, count, base + first)
            rank += tl.sum((other_keys[None, :] > keys[:, None]).to(tl.int32), 1)
    elif initial is not None:
        # Used slots come first.
        count = tl.sum(tl.load(initial_valid + row * size + slots, mask=slots < size, other=0).to(tl.int32))
        keys = token_keys(initial, row, initial_stride, 0, slots, count, 0)
        for chunk in range(0, count, CHUNK):
            others = chunk + tl.arange(0, CHUNK)
            other_keys = token_keys(initial, row, initial_stride, 0, others, count, 0)
            rank += tl.sum((other_keys[None, :] > keys[:, None]).to(tl.int32), 1)
    tl.store(out + rank, keys, mask=(slots < count) & (rank < LIST))
    tl.store(out + slots, keys * 0 + NO_KEY, mask=(slots >= count) & (slots < LIST))


@triton.jit(do_not_specialize=["windows", "step"])
def merge_kernel(tops, merged, windows, step, RADIX: tl.constexpr, LIST: tl.constexpr):
    """Program (row, j, r): the list of entry j - r · step, put into its places in the merged lists of j, j - step, …

    A key's place is its number in its own list and how many keys of each other list are larger.
    """
    entry = tl.program_id(0).to(tl.int64)
    own = tl.program_id(1)
    lists = tl.minimum((tl.program_id(0) % windows) // step + 1, RADIX)
    if own < lists:
        slots = tl.arange(0, LIST)
        keys = tl.load(tops + (entry - own * step) * LIST + slots)
        place = slots
        for other in range(0, lists):
            if other != own:
                list_ptr = tops + (entry - other * step) * LIST
                larger = slots * 0
                jump = LIST
                while jump > 0:
                    probe = larger + jump
                    inside = probe <= LIST
                    found = tl.load(list_ptr + probe - 1, mask=inside, other=NO_KEY)
                    larger = tl.where(inside & (found > keys), probe, larger)
                    jump = jump // 2
                place += larger
        tl.store(merged + entry * LIST + place, keys, mask=place < LIST)


@triton.jit(do_not_specialize=["row_stride", "initial_stride", "windows", "window", "size", "base"])
def candidates_kernel(
    scores, initial, tops, candidate_scores, candidates, present,
    row_stride, initial_stride, windows, window, size, base,
    LIST: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program (row, j): the pool before pool j, in order of position, and the window before it."""
    row = (tl.program_id(0) // (windows + 1)).to(tl.int64)
    number = tl.program_id(0) % (windows + 1)
    out = tl.program_id(0).to(tl.int64) * (size + window)
    slots = tl.arange(0, LIST)
    position = slots * 0 + NO_TOKEN
    place = slots
    if number > 0:
        list_ptr = tops + (row * windows + number - 1) * LIST
        position = positions_of(tl.load(list_ptr + slots, mask=slots < size, other=NO_KEY))
        # What is missing stands last in both orders.
        place = tl.where(position == NO_TOKEN, slots, 0)
        for chunk in range(0, size, CHUNK):
            others = chunk + tl.arange(0, CHUNK)
            other = positions_of(tl.load(list_ptr + others, mask=others < size, other=NO_KEY))
            before = (other[None, :] < position[:, None]) & (position != NO_TOKEN)[:, None]
            place += tl.sum(before.to(tl.int32), 1)
    real = position != NO_TOKEN
    score = tl.load(scores + row * row_stride + position - base, mask=real & (position >= base), other=0.0)
    if initial is not None:
        old = tl.load(initial + row * initial_stride + position, mask=real & (position < base), other=0.0)
        score = tl.where(position < base, old, score)
    tl.store(candidate_scores + out + place, score, mask=slots < size)
    tl.store(candidates + out + place, position.to(tl.int64), mask=slots < size)
    tl.store(present + out + place, real, mask=slots < size)

    out += size
    first = tl.maximum(number - 1, 0) * window
    for start in range(0, window, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        inside = tokens < window
        new = tl.load(scores + row * row_stride + first + tokens, mask=inside, other=0.0)
        tl.store(candidate_scores + out + tokens, new, mask=inside)
        tl.store(candidates + out + tokens, (base + first + tokens).to(tl.int64), mask=inside)
        tl.store(present + out + tokens, inside & (number > 0), mask=inside)


@triton.jit
def positions_of(keys):
    return tl.where(keys == NO_KEY, NO_TOKEN, (keys & NO_TOKEN).to(tl.int32) ^ NO_TOKEN)


@triton.jit(do_not_specialize=["windows", "window", "size"])
def links_kernel(candidates, following, windows, window, size, BLOCK: tl.constexpr):
    """Program (row, j): where the candidates of pool j stand in it, read off the candidates of pool j + 1."""
    number = tl.program_id(0) % (windows + 1)
    width = size + window
    own = tl.program_id(0).to(tl.int64) * width
    for start in range(0, width, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        inside = slots < width
        place = slots * 0 - 1
        if number < windows:
            position = tl.load(candidates + own + slots, mask=inside, other=NO_TOKEN)
            low = slots * 0
            high = low + size
            steps = size
            while steps > 0:
                middle = (low + high) // 2
                open_ = low < high
                right = tl.load(candidates + own + width + middle, mask=open_, other=0) < position
                high = tl.where(open_ & (right == 0), middle, high)
                low = tl.where(open_ & right, middle + 1, low)
                steps = steps // 2
            found = tl.load(candidates + own + width + low, mask=low < size, other=-1)
            place = tl.where((found == position) & (position != NO_TOKEN), low, -1)
        tl.store(following + own + slots, place, mask=inside)


@triton.jit(do_not_specialize=["windows", "window", "size"])
def candidates_backward_kernel(grad, following, grad_scores, windows, window, size, BLOCK: tl.constexpr):
    """Program (row, v, block): sums along the chains of a window's tokens."""
    blocks = tl.cdiv(window, BLOCK)
    row = (tl.program_id(0) // (windows * blocks)).to(tl.int64)
    number = (tl.program_id(0) // blocks) % windows
    slots = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = slots < window
    width = size + window
    pool = (row * (windows + 1) + number + 1) * width
    place = tl.where(inside, size + slots, -1)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    while tl.max(place) >= 0:
        total += tl.load(grad + pool + place, mask=place >= 0, other=0.0).to(tl.float32)
        # The last pool has no links.
        place = tl.load(following + pool + place, mask=place >= 0, other=-1)
        pool += width
    tl.store(
        grad_scores + (row * windows + number) * window + slots, total.to(grad_scores.dtype.element_ty), mask=inside
    )


@triton.jit
def state_columns(head_stride, d: tl.constexpr, BLOCK: tl.constexpr):
    """Where a token's states [heads, d] lie behind its first, in their order."""
    columns = tl.arange(0, BLOCK)
    return columns, (columns // d).to(tl.int64) * head_stride + columns % d


@triton.jit(do_not_specialize=["windows", "size"])
def gather_kernel(
    key, value, indices, weights, valid, keys, values,
    key_batch_stride, key_stride, key_head_stride, value_batch_stride, value_stride, value_head_stride,
    windows, size, width, d: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A slot of a pool a program: its token's key and value, scaled; zeros where unused."""
    out = tl.program_id(0).to(tl.int64)
    row = out // (windows * size)
    # Every row has one more pool, which nobody reads here.
    slot = out + row * size
    used = tl.load(valid + slot).to(tl.int32)
    weight = tl.load(weights + slot)
    token = tl.load(indices + slot)
    columns, offsets = state_columns(key_head_stride, d, BLOCK)
    states = tl.load(
        key + row * key_batch_stride + token * key_stride + offsets, mask=columns < used * width, other=0.0
    )
    states = states.to(tl.float32) * weight
    tl.store(keys + out * width + columns, states.to(keys.dtype.element_ty), mask=columns < width)
    columns, offsets = state_columns(value_head_stride, d, BLOCK)
    states = tl.load(
        value + row * value_batch_stride + token * value_stride + offsets, mask=columns < used * width, other=0.0
    )
    states = states.to(tl.float32) * weight
    tl.store(values + out * width + columns, states.to(values.dtype.element_ty), mask=columns < width)


@triton.jit(do_not_specialize=["tokens", "windows", "window", "size", "base"])
def gather_backward_kernel(
    grad_keys, grad_values, key, value, weights, valid, following, grad_key, grad_value, grad_weights,
    key_batch_stride, key_stride, key_head_stride, value_batch_stride, value_stride, value_head_stride,
    tokens, windows, window, size, base, width, d: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A token a program: the sums along its chain of slots, and each slot's product with the token's states."""
    out = tl.program_id(0).to(tl.int64)
    row = out // tokens
    token = out % tokens
    columns, offsets = state_columns(key_head_stride, d, BLOCK)
    inside = columns < width
    key_states = tl.load(key + row * key_batch_stride + token * key_stride + offsets, mask=inside, other=0.0).to(
        tl.float32
    )
    columns, offsets = state_columns(value_head_stride, d, BLOCK)
    value_states = tl.load(
        value + row * value_batch_stride + token * value_stride + offsets, mask=inside, other=0.0
    ).to(tl.float32)

    new = tl.maximum(token - base, 0)
    pool = tl.where(token < base, 0, new // window + 1)
    link = following + (row * (windows + 1) + pool) * (size + window)
    place = tl.load(link + size + new % window)
    if token < base:
        place = tl.where(tl.load(valid + row * (windows + 1) * size + token).to(tl.int32) != 0, token.to(tl.int32), -1)
    key_sum = tl.zeros([BLOCK], dtype=tl.float32)
    value_sum = tl.zeros([BLOCK], dtype=tl.float32)
    while place >= 0:
        slot = (row * windows + pool) * size + place
        key_grad = tl.load(grad_keys + slot * width + columns, mask=inside, other=0.0).to(tl.float32)
        value_grad = tl.load(grad_values + slot * width + columns, mask=inside, other=0.0).to(tl.float32)
        # Every row has one more pool.
        weight = tl.load(weights + slot + row * size)
        key_sum += key_grad * weight
        value_sum += value_grad * weight
        tl.store(grad_weights + slot + row * size, tl.sum(key_grad * key_states + value_grad * value_states))
        # The last pool, which was not gathered, has no links.
        link += size + window
        pool += 1
        place = tl.load(link + place)
    tl.store(grad_key + out * width + columns, key_sum.to(grad_key.dtype.element_ty), mask=inside)
    tl.store(grad_value + out * width + columns, value_sum.to(grad_value.dtype.element_ty), mask=inside)


@triton.jit
def window_ends(past, total, row, window):
    """The number of a row's real tokens, and whether the new one completed a window."""
    length = tl.load(total + row).to(tl.int32)
    return length, (length > tl.load(past + row).to(tl.int32)) & (length % window == 0)


@triton.jit
def union_keys(pool_score, pool_valid, ring, slots, first, ring_size, window, size, GROUPS: tl.constexpr):
    """Integer keys of a pool's scores and, behind them, of a window's in a ring; the lowest where there is none."""
    pooled = load_keys(pool_score, pool_valid, pool_score, 0, slots, size, 0, 1, 0, 1, True, False)
    places = (first + tl.maximum(slots - size, 0)) % ring_size
    new = load_keys(ring, ring, ring, 0, places, ring_size, 0, GROUPS, 0, 0, False, False)
    return tl.where(slots < size, pooled, tl.where(slots < size + window, new, LOWEST_KEY))


@triton.jit(do_not_specialize=["ring_size", "window", "size"])
def choose_pool_kernel(
    past, total, ring, pool_score, pool_rank, pool_weight, pool_valid, sources,
    ring_size, window, size, soft_topk_ratio, epsilon,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program (row, group): the next pool's tokens, where the row's window ended; `sources` says where each comes
    from."""
    row = (tl.program_id(0) // GROUPS).to(tl.int64)
    group = tl.program_id(0) % GROUPS
    length, ends = window_ends(past, total, row, window)
    if ends:
        ring += row * ring_size * GROUPS + group
        own = (row * 2 * GROUPS + group) * size
        before = own + GROUPS * size
        slots = tl.arange(0, BLOCK)
        first = length - window
        keys = union_keys(pool_score + own, pool_valid + own, ring, slots, first, ring_size, window, size, GROUPS)
        real = keys != LOWEST_KEY
        score = tl.where(real, key_to_score(keys), 0.0)
        rank = tl.zeros([BLOCK], dtype=tl.int32)
        tail = tl.zeros([BLOCK], dtype=tl.float32)
        for chunk in range(0, size + window, CHUNK):
            others = chunk + tl.arange(0, CHUNK)
            other_keys = union_keys(
                pool_score + own, pool_valid + own, ring, others, first, ring_size, window, size, GROUPS
            )
            tie_before = (other_keys[None, :] == keys[:, None]) & (others[None, :] < slots[:, None])
            above = (other_keys[None, :] > keys[:, None]) | tie_before
            rank += tl.sum(above.to(tl.int32), 1)
            exists = other_keys != LOWEST_KEY
            gap = (tl.where(exists, key_to_score(other_keys), 0.0)[None, :] - score[:, None]) / epsilon
            tail += tl.sum(tl.where(above | (exists == 0)[None, :], 0.0, tl.exp(gap)), 1)
        count = tl.sum(real.to(tl.int32))
        budget = tl.minimum(count, size)
        threshold = closed_threshold(score, rank, tail, real, count, soft_topk_ratio * budget, epsilon)
        # NaN is the highest key
        threshold = tl.where(tl.max(keys) == HIGHEST_KEY, float("nan"), threshold)
        gap = (score - threshold) / epsilon
        # A comparison instead of a minimum keeps NaN.
        weight = tl.where(gap > 0, 1.0, tl.exp(gap))
        chosen = real & (rank < budget)
        place = tl.cumsum(chosen.to(tl.int32), 0) - 1

        pooled = slots < size
        position = tl.load(pool_rank + own + slots, mask=pooled, other=0)
        tl.store(pool_rank + before + slots, position, mask=pooled)
        old_score = tl.load(pool_score + own + slots, mask=pooled, other=0.0)
        tl.store(pool_score + before + slots, old_score, mask=pooled)
        old_weight = tl.load(pool_weight + own + slots, mask=pooled, other=0.0)
        tl.store(pool_weight + before + slots, old_weight, mask=pooled)
        old_valid = tl.load(pool_valid + own + slots, mask=pooled, other=0)
        tl.store(pool_valid + before + slots, old_valid, mask=pooled)
        # Until here all threads have read the pool that is now written over.
        tl.debug_barrier()
        position = tl.where(pooled, position, (first + slots - size).to(tl.int64))
        sources += tl.program_id(0).to(tl.int64) * size
        tl.store(pool_rank + own + place, position, mask=chosen)
        tl.store(pool_score + own + place, score, mask=chosen)
        tl.store(pool_weight + own + place, weight, mask=chosen)
        tl.store(sources + place, slots, mask=chosen)
        unused = pooled & (slots >= budget)
        tl.store(pool_rank + own + slots, slots.to(tl.int64) * 0, mask=unused)
        tl.store(pool_score + own + slots, tail * 0.0, mask=unused)
        tl.store(pool_weight + own + slots, tail * 0.0, mask=unused)
        tl.store(pool_valid + own + slots, slots < budget, mask=pooled)


@triton.jit(do_not_specialize=["window", "size"])
def keep_pool_kernel(
    past, total, pool_key, pool_value, window, size,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row and group, slot): the slot's key and value come to the second place, where the row's window
    ended."""
    row = (tl.program_id(0) // GROUPS).to(tl.int64)
    _, ends = window_ends(past, total, row, window)
    columns = tl.arange(0, BLOCK)
    inside = columns < tl.where(ends, WIDTH, 0)
    own = ((row * 2 * GROUPS + tl.program_id(0) % GROUPS) * size + tl.program_id(1)) * WIDTH + columns
    before = own + GROUPS * size * WIDTH
    tl.store(pool_key + before, tl.load(pool_key + own, mask=inside, other=0.0), mask=inside)
    tl.store(pool_value + before, tl.load(pool_value + own, mask=inside, other=0.0), mask=inside)


@triton.jit(do_not_specialize=["ring_size", "window", "size"])
def fill_pool_kernel(
    past, total, key_ring, value_ring, pool_key, pool_value, pool_valid, sources, ring_size, window, size,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row and group, slot): the slot's key and value, out of the pool before or of the ring, where the row's
    window ended."""
    row = (tl.program_id(0) // GROUPS).to(tl.int64)
    group = tl.program_id(0) % GROUPS
    length, ends = window_ends(past, total, row, window)
    columns = tl.arange(0, BLOCK)
    slot = (row * 2 * GROUPS + group) * size
    used = tl.load(pool_valid + slot + tl.program_id(1)).to(tl.int32) != 0
    if ends & used:
        source = tl.load(sources + tl.program_id(0).to(tl.int64) * size + tl.program_id(1))
        inside = columns < WIDTH
        own = (slot + tl.program_id(1)) * WIDTH + columns
        if source < size:
            old = (slot + GROUPS * size + source) * WIDTH + columns
            tl.store(pool_key + own, tl.load(pool_key + old, mask=inside, other=0.0), mask=inside)
            tl.store(pool_value + own, tl.load(pool_value + old, mask=inside, other=0.0), mask=inside)
        else:
            place = (length - window + source - size) % ring_size
            new = ((row * ring_size + place) * GROUPS + group) * WIDTH + columns
            tl.store(pool_key + own, tl.load(key_ring + new, mask=inside, other=0.0), mask=inside)
            tl.store(pool_value + own, tl.load(value_ring + new, mask=inside, other=0.0), mask=inside)


def pool_candidates_into(
    scores: Tensor,
    initial: Tensor | None,
    initial_valid: Tensor | None,
    window: int,
    size: int,
    candidate_scores: Tensor,
    candidates: Tensor,
    present: Tensor,
    following: Tensor,
) -> None:
    """Write `pool_candidates_reference` of op_pools.py to the last four, for fp32 scores."""
    rows, length = scores.shape
    windows = length // window
    if scores.stride(1) != 1:
        scores = scores.contiguous()
    initial, initial_valid = adjacent(initial), adjacent(initial_valid)
    base = initial_stride = 0 if initial is None else size
    list_size = max(16, next_power_of_2(size))
    tops, merged = (scores.new_empty((rows, windows, list_size), dtype=torch.int64) for _ in range(2))
    launch(
        tops_kernel, (rows * windows,),
        scores, initial, initial_valid, tops, scores.stride(0), initial_stride, windows, window, size, base,
        max(list_size, next_power_of_2(window)), CHUNK, list_size, num_warps=8,
    )  # fmt: skip
    step = 1
    while step < windows:
        launch(merge_kernel, (rows * windows, RADIX), tops, merged, windows, step, RADIX, list_size, num_warps=4)
        tops, merged = merged, tops
        step *= RADIX
    launch(
        candidates_kernel, (rows * (windows + 1),),
        scores, initial, tops, candidate_scores, candidates, present,
        scores.stride(0), initial_stride, windows, window, size, base,
        list_size, min(1024, next_power_of_2(window)), CHUNK, num_warps=8,
    )  # fmt: skip
    launch(
        links_kernel, (rows * (windows + 1),),
        candidates, following, windows, window, size, min(1024, next_power_of_2(size + window)), num_warps=8,
    )  # fmt: skip


def pool_candidates_backward_into(
    grad: Tensor,
    scores: Tensor,
    initial: Tensor | None,
    initial_valid: Tensor | None,
    window: int,
    size: int,
    following: Tensor,
    grad_scores: Tensor,
) -> None:
    """Write the scores' gradient from that of the candidates' scores, each sum in a fixed order."""
    rows, length = scores.shape
    windows = length // window
    block = min(128, next_power_of_2(window))
    launch(
        candidates_backward_kernel, (rows * windows * cdiv(window, block),),
        grad.contiguous(), following, grad_scores, windows, window, size, block, num_warps=4,
    )  # fmt: skip


def _readable(states: Tensor) -> Tensor:
    """States [batch, n, heads, d_kv] that may lie at any distance, each head's side by side."""
    return states if states.stride(3) == 1 else states.contiguous()


def pool_gather_into(
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    weights: Tensor,
    valid: Tensor,
    following: Tensor,
    base: int,
    keys: Tensor,
    values: Tensor,
) -> None:
    """Write `pool_gather_reference` of op_pools.py to the last two."""
    batch, _, heads, d_kv = key.shape
    _, pools, size = indices.shape
    key, value = _readable(key), _readable(value)
    width = heads * d_kv
    block = next_power_of_2(width)
    launch(
        gather_kernel, (batch * (pools - 1) * size,),
        key, value, *map(adjacent, (indices, weights, valid)), keys, values,
        *key.stride()[:3], *value.stride()[:3], pools - 1, size, width, d_kv, block,
        num_warps=max(1, min(8, block // 256)),
    )  # fmt: skip


def pool_gather_backward_into(
    grad_keys: Tensor | None,
    grad_values: Tensor | None,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    weights: Tensor,
    valid: Tensor,
    following: Tensor,
    base: int,
    grad_key: Tensor,
    grad_value: Tensor,
    grad_weights: Tensor,
) -> None:
    """Write the gradients of key, value and weights, each sum in a fixed order."""
    batch, tokens, heads, d_kv = key.shape
    _, pools, size = indices.shape
    key, value = _readable(key), _readable(value)
    shape = (batch, pools - 1, size, heads, d_kv)
    grads = (key.new_zeros(shape) if grad is None else grad.contiguous() for grad in (grad_keys, grad_values))
    # A slot that is not used has no token to write its gradient.
    grad_weights.zero_()
    width = heads * d_kv
    block = next_power_of_2(width)
    launch(
        gather_backward_kernel, (batch * tokens,),
        *grads, key, value, *map(adjacent, (weights, valid, following)), grad_key, grad_value, grad_weights,
        *key.stride()[:3], *value.stride()[:3],
        tokens, pools - 1, following.shape[2] - size, size, base, width, d_kv, block,
        num_warps=max(1, min(8, block // 128)),
    )  # fmt: skip


def hand_pool_into(
    past: Tensor,
    total: Tensor,
    ring: Tensor,
    key_ring: Tensor,
    value_ring: Tensor,
    pool_score: Tensor,
    pool_key: Tensor,
    pool_value: Tensor,
    pool_rank: Tensor,
    pool_weight: Tensor,
    pool_valid: Tensor,
    window: int,
    soft_topk_ratio: float,
    epsilon: float,
    sources: Tensor,
) -> None:
    """Let each row whose new token completed a window go on to the pools that follow from it, as `routed_pools` of
    op_pools.py makes them; the pools before come to the second place.

    Args, of which tensors are contiguous:
        past: int64 [rows], real tokens before the new one.
        total: int64 [rows], these and the new one where it is real.
        ring: fp32 [rows, R, groups], the routers' scores of the last tokens, of rank `rank` in slot `rank % R`.
        key_ring, value_ring: [rows, R, heads, d_kv], of the same tokens.
        pool_score: fp32 [rows, 2, groups, size], of the current window's pools and of those before.
        pool_key, pool_value: [rows, 2, groups, size, heads / groups, d_kv], likewise, not scaled.
        pool_rank, pool_weight, pool_valid: int64, fp32 and bool [rows, 2, groups, size], likewise; what is used comes
            first.
        window: tokens of a window.
        soft_topk_ratio, epsilon: of the soft top-k.
        sources: room for int32 [rows, groups, size].
    """
    rows, _, groups, size, heads, d_kv = pool_key.shape
    ring_size, width = ring.shape[1], heads * d_kv
    block = max(16, next_power_of_2(size + window))
    launch(
        choose_pool_kernel, (rows * groups,),
        past, total, ring, pool_score, pool_rank, pool_weight, pool_valid, sources,
        ring_size, window, size, soft_topk_ratio, epsilon, groups, block, min(CHUNK, PAIRS // block), num_warps=8,
    )  # fmt: skip
    columns = next_power_of_2(width)
    warps = max(1, min(8, columns // 256))
    launch(
        keep_pool_kernel, (rows * groups, size),
        past, total, pool_key, pool_value, window, size, groups, width, columns, num_warps=warps,
    )  # fmt: skip
    launch(
        fill_pool_kernel, (rows * groups, size),
        past, total, key_ring, value_ring, pool_key, pool_value, pool_valid, sources,
        ring_size, window, size, groups, width, columns, num_warps=warps,
    )  # fmt: skip
