"""Triton kernels that move routed tokens: gather their rows, and combine their updates with the states.

A program holds whole rows of `d` features in registers. Dense results are written by the program that owns the
position, which finds the slot routed there by a search in the ascending indices, so no kernel needs an atomic.
"""

import functools

from torch import Tensor

from .op_dropout_triton import dropped
from .run_launch_triton import adjacent, cdiv, launch, next_power_of_2, tl, triton

# How many indices a search looks at in one step.
PROBES = tl.constexpr(64)
# How many elements a program and a warp hold. Kernels that move memory gain from small programs: of nine shapes at 768
# features 2 rows by 2 warps were the fastest at 4,096 to 65,536 tokens (NVIDIA H100).
FORWARD_TILE, FORWARD_WARP = 2048, 1024


@functools.cache
def tile_shape(width: int, elements: int = FORWARD_TILE, warp: int = FORWARD_WARP) -> tuple[int, int, int]:
    """Rows a program holds, its padded width and its warps, for rows of `width` features; a program and a warp hold
    about as many elements as `elements` and `warp` say."""
    block = next_power_of_2(width)
    rows = max(1, min(16, elements // block))
    return rows, block, max(1, min(16, rows * block // warp))


@triton.jit
def slots_before(position, first, indices_ptr, capacity):
    """How many of a row's ascending `capacity` indices, which begin at `first`, are below a position: PROBES of them
    are looked at in one step, because what a step takes is the wait for memory."""
    low = 0
    width = capacity
    probes = tl.arange(0, PROBES)
    while width > 0:
        # The range is cut in PROBES parts, each known by its last index.
        part = tl.cdiv(width, PROBES)
        ends = (probes + 1) * part - 1
        found = tl.load(indices_ptr + first + low + ends, mask=ends < width, other=position)
        below = tl.sum((found < position).to(tl.int32), axis=0) * part
        low += below
        width = tl.where(part > 1, tl.minimum(part, width - below), 0)
    return low


@triton.jit
def routed_slots(positions, batch, indices_ptr, valid_ptr, capacity, ROWS: tl.constexpr):
    """The slot that holds each of ROWS adjacent positions, as a row of `[batch · capacity]`, and whether one does."""
    first = batch * capacity
    low = slots_before(tl.min(positions, axis=0), first, indices_ptr, capacity)
    # Adjacent positions have adjacent slots, so no more than ROWS come into question.
    slots = low + tl.arange(0, ROWS)
    inside = slots < capacity
    indices = tl.load(indices_ptr + first + slots, mask=inside, other=-1)
    used = tl.load(valid_ptr + first + slots, mask=inside, other=0).to(tl.int32) != 0
    holds = used[None, :] & (indices[None, :] == positions[:, None])
    return first + tl.sum(tl.where(holds, slots[None, :], 0), axis=1), tl.max(holds.to(tl.int32), axis=1) != 0


@triton.jit
def routed_rows(
    positions, batch, columns, column_mask, updates_ptr, indices_ptr, valid_ptr, weights_ptr, capacity,
    d: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What the slots add at each position `[rows, block]`, in fp32: weight · update, or zeros."""
    slots, here = routed_slots(positions, batch, indices_ptr, valid_ptr, capacity, ROWS)
    updates = tl.load(
        updates_ptr + slots[:, None] * d + columns[None, :], mask=here[:, None] & column_mask[None, :], other=0.0
    ).to(tl.float32)
    if weights_ptr is not None:
        updates *= tl.load(weights_ptr + slots, mask=here, other=0.0).to(tl.float32)[:, None]
    return updates


@triton.jit(do_not_specialize=["n", "capacity", "capacity2"])
def combine_kernel(
    base_ptr, light_ptr, updates_ptr, indices_ptr, valid_ptr, weights_ptr, capacity, updates2_ptr, indices2_ptr,
    valid2_ptr, weights2_ptr, capacity2, seed_ptr, out_ptr, n,
    d: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = base + light + the routed rows of up to two routings, one block of positions a program. With a seed all
    but the base is dropped."""
    blocks = tl.cdiv(n, ROWS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    positions = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    column_mask = columns < d
    mask = (positions < n)[:, None] & column_mask[None, :]
    offsets = (batch * n + positions)[:, None] * d + columns[None, :]
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    if base_ptr is not None and seed_ptr is None:
        total += tl.load(base_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if light_ptr is not None:
        total += tl.load(light_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if updates_ptr is not None:
        total += routed_rows(
            positions, batch, columns, column_mask, updates_ptr, indices_ptr, valid_ptr, weights_ptr, capacity, d,
            ROWS,
        )  # fmt: skip
    if updates2_ptr is not None:
        total += routed_rows(
            positions, batch, columns, column_mask, updates2_ptr, indices2_ptr, valid2_ptr, weights2_ptr, capacity2,
            d, ROWS,
        )  # fmt: skip
    if seed_ptr is not None:
        total = dropped(total, seed_ptr, batch * n + positions, columns, DROPOUT)
        total += tl.load(base_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gather_slot(
    slot, hidden_ptr, other_ptr, indices_ptr, valid_ptr, weights_ptr, out_ptr, dots_ptr, n, capacity,
    d: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One slot's row times its weight, and the row's product with the slot's row of `other`; zeros where unused."""
    columns = tl.arange(0, BLOCK)
    mask = columns < tl.load(valid_ptr + slot).to(tl.int32) * d
    source = (slot // capacity) * n + tl.load(indices_ptr + slot)
    row = tl.load(hidden_ptr + source * d + columns, mask=mask, other=0.0).to(tl.float32)
    if dots_ptr is not None:
        other = tl.load(other_ptr + slot * d + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(dots_ptr + slot, tl.sum(row * other, axis=0))
    if out_ptr is not None:
        if weights_ptr is not None:
            row *= tl.load(weights_ptr + slot).to(tl.float32)
        tl.store(out_ptr + slot * d + columns, row.to(out_ptr.dtype.element_ty), mask=columns < d)


@triton.jit(do_not_specialize=["n", "capacity", "capacity2"])
def gather_kernel(
    hidden_ptr, other_ptr, indices_ptr, valid_ptr, weights_ptr, out_ptr, dots_ptr, capacity, indices2_ptr,
    valid2_ptr, weights2_ptr, out2_ptr, capacity2, n,
    d: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A slot a program: all rows' slots of the first routing, then the second routing's, where there is one."""
    slot = tl.program_id(0).to(tl.int64)
    if out2_ptr is None:
        gather_slot(
            slot, hidden_ptr, other_ptr, indices_ptr, valid_ptr, weights_ptr, out_ptr, dots_ptr, n, capacity, d, BLOCK
        )
    else:
        slots = tl.num_programs(0) // (capacity + capacity2) * capacity
        if slot < slots:
            gather_slot(
                slot, hidden_ptr, None, indices_ptr, valid_ptr, weights_ptr, out_ptr, None, n, capacity, d, BLOCK
            )
        else:
            gather_slot(
                slot - slots, hidden_ptr, None, indices2_ptr, valid2_ptr, weights2_ptr, out2_ptr, None, n, capacity2,
                d, BLOCK,
            )  # fmt: skip


def combine_into(
    base: Tensor | None,
    light: Tensor | None,
    updates: Tensor | None,
    indices: Tensor | None,
    valid: Tensor | None,
    weights: Tensor | None,
    updates2: Tensor | None,
    indices2: Tensor | None,
    valid2: Tensor | None,
    weights2: Tensor | None,
    length: int,
    out: Tensor,
    seed: Tensor | None = None,
    dropout: float = 0.0,
) -> None:
    """Write `combine_reference` of op_rows.py to `out`; without updates the sum of base and light branch. With a seed
    what is added to the base is dropped as `dropout` of op_dropout.py does."""
    batch, _, d = out.shape
    first = map(adjacent, (base, light, updates, indices, valid, weights))
    second = map(adjacent, (updates2, indices2, valid2, weights2))
    rows, block, warps = tile_shape(d)
    launch(
        combine_kernel, (batch * cdiv(length, rows),),
        *first, 0 if updates is None else updates.shape[1], *second, 0 if updates2 is None else updates2.shape[1],
        seed, out, length, d, dropout, rows, block, num_warps=warps,
    )  # fmt: skip


def gather_into(
    hidden_states: Tensor,
    indices: Tensor,
    valid: Tensor,
    weights: Tensor | None,
    indices2: Tensor | None,
    valid2: Tensor | None,
    weights2: Tensor | None,
    rows: Tensor,
    rows2: Tensor | None,
) -> None:
    """Write `gather_reference` of op_rows.py to the last two."""
    batch, n, d = hidden_states.shape
    capacity = indices.shape[1]
    capacity2 = 0 if indices2 is None else indices2.shape[1]
    _, block, _ = tile_shape(d)
    launch(
        gather_kernel, (batch * (capacity + capacity2),),
        adjacent(hidden_states), None, *map(adjacent, (indices, valid, weights)), rows, None, capacity,
        *map(adjacent, (indices2, valid2, weights2)), None if indices2 is None else rows2, capacity2,
        n, d, block, num_warps=max(1, min(8, block // 256)),
    )  # fmt: skip


def gather_dot_into(
    hidden_states: Tensor,
    other: Tensor,
    indices: Tensor,
    valid: Tensor,
    weights: Tensor | None,
    rows: Tensor | None,
    dots: Tensor,
) -> None:
    """Write `gather_dot_reference` of op_rows.py to the last two, `rows` where it is given."""
    batch, n, d = hidden_states.shape
    capacity = indices.shape[1]
    _, block, _ = tile_shape(d)
    launch(
        gather_kernel, (batch * capacity,),
        *map(adjacent, (hidden_states, other, indices, valid, weights)), rows, dots, capacity,
        None, None, None, None, 0,
        n, d, block, num_warps=max(1, min(8, block // 256)),
    )  # fmt: skip


@triton.jit
def copy_block(source_ptr, out_ptr, part, block, size, BLOCK: tl.constexpr):
    """A block of one of the tensors of `size` numbers that lie one behind the other in `out`."""
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    values = tl.load(source_ptr + offsets, mask=mask)
    tl.store(out_ptr + part.to(tl.int64) * size + offsets, values.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def join_block(program, blocks, out_ptr, first_ptr, second_ptr, third_ptr, fourth_ptr, size, BLOCK: tl.constexpr):
    """A block of one of up to four tensors, by the number of the program."""
    part = program // blocks
    block = program % blocks
    if part == 0:
        copy_block(first_ptr, out_ptr, part, block, size, BLOCK)
    if second_ptr is not None:
        if part == 1:
            copy_block(second_ptr, out_ptr, part, block, size, BLOCK)
    if third_ptr is not None:
        if part == 2:
            copy_block(third_ptr, out_ptr, part, block, size, BLOCK)
    if fourth_ptr is not None:
        if part == 3:
            copy_block(fourth_ptr, out_ptr, part, block, size, BLOCK)


@triton.jit
def join_kernel(
    out0_ptr, first0_ptr, second0_ptr, third0_ptr, fourth0_ptr, size0,
    out1_ptr, first1_ptr, second1_ptr, third1_ptr, fourth1_ptr, size1,
    out2_ptr, first2_ptr, second2_ptr, third2_ptr, fourth2_ptr, size2,
    out3_ptr, first3_ptr, second3_ptr, third3_ptr, fourth3_ptr, size3,
    PARTS0: tl.constexpr, PARTS1: tl.constexpr, PARTS2: tl.constexpr, PARTS3: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Up to four joins, each of up to four tensors that it writes one behind the other: a block of one a program."""
    program = tl.program_id(0)
    blocks = tl.cdiv(size0, BLOCK)
    if program < PARTS0 * blocks:
        join_block(program, blocks, out0_ptr, first0_ptr, second0_ptr, third0_ptr, fourth0_ptr, size0, BLOCK)
    if PARTS1 > 0:
        program -= PARTS0 * blocks
        blocks = tl.cdiv(size1, BLOCK)
        if (program >= 0) & (program < PARTS1 * blocks):
            join_block(program, blocks, out1_ptr, first1_ptr, second1_ptr, third1_ptr, fourth1_ptr, size1, BLOCK)
    if PARTS2 > 0:
        program -= PARTS1 * blocks
        blocks = tl.cdiv(size2, BLOCK)
        if (program >= 0) & (program < PARTS2 * blocks):
            join_block(program, blocks, out2_ptr, first2_ptr, second2_ptr, third2_ptr, fourth2_ptr, size2, BLOCK)
    if PARTS3 > 0:
        program -= PARTS2 * blocks
        blocks = tl.cdiv(size3, BLOCK)
        if (program >= 0) & (program < PARTS3 * blocks):
            join_block(program, blocks, out3_ptr, first3_ptr, second3_ptr, third3_ptr, fourth3_ptr, size3, BLOCK)


@triton.jit
def clamp_kernel(states_ptr, limit, size, BLOCK: tl.constexpr):
    """Numbers beyond a limit become the limit, of their sign; what is no number stays."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    states = tl.load(states_ptr + offsets, mask=mask).to(tl.float32)
    states = tl.where(states > limit, limit, tl.where(states < -limit, -limit, states))
    tl.store(states_ptr + offsets, states.to(states_ptr.dtype.element_ty), mask=mask)


def clamp_into(states: Tensor, limit: float) -> None:
    """`torch.clamp` of contiguous states, between `-limit` and `limit`, in place."""
    launch(clamp_kernel, (cdiv(states.numel(), 1024),), states, limit, states.numel(), 1024, num_warps=4)


# joins of one launch, and tensors of a join
MOST_JOINS = MOST_PARTS = 4


def join_into(*joins: tuple[Tensor, ...]) -> None:
    """One launch that makes up to four joins, each of a contiguous result and up to four contiguous tensors of as many
    numbers each, which it writes to the result one behind the other, rounded to its dtype."""
    operands: list[Tensor | int | None] = []
    parts = [0] * MOST_JOINS
    sizes = [first.numel() for _, first, *_ in joins]
    block = min(2048, next_power_of_2(max(sizes)))
    for number, (join, size) in enumerate(zip(joins, sizes, strict=True)):
        parts[number] = len(join) - 1
        operands += [*join, *[None] * (MOST_PARTS - parts[number]), size]
    operands += [*[None] * (1 + MOST_PARTS), 0] * (MOST_JOINS - len(joins))
    programs = sum(part * cdiv(size, block) for part, size in zip(parts, sizes, strict=False))
    launch(join_kernel, (programs,), *operands, *parts, block, num_warps=4)
