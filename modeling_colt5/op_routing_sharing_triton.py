"""How Triton programs that share a row see each other's numbers: each leaves its own, waits for all, reads all.

The programs of a row are on the GPU at the same time (a cooperative launch). `turn` counts the exchanges of a row so
far, alike in all of its programs. Numbers go by two places in turn: who leaves one there in the exchange after next
knows that everybody has read what was there, because everybody came to the next one.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("op_routing_sharing_triton needs triton; use kernel_backend='torch' without it") from error

# 32-bit numbers that a program can leave in an exchange
PLACES = tl.constexpr(3)
# integers from one row's counter of arrivals to the next one's: a cache line
COUNTER_STRIDE = tl.constexpr(32)


@triton.jit
def leave(number, place, turn, numbers, program, programs):
    """Leave an int32 or fp32 number for the others at one of `PLACES`, before `meet`; `numbers` is the row's."""
    where = numbers + ((turn % 2) * PLACES + place) * programs + program
    tl.store(where, number.to(tl.int32, bitcast=True))


@triton.jit
def meet(turn, arrived, programs):
    """Wait until all programs of the row have come; returns the next turn. What they left is then there to be read.

    `arrived` points to the row's counter, 0 before turn 0. One thread adds and polls; the barriers put what the
    program's other threads stored and loaded before it, and what they load, after it.
    """
    tl.debug_barrier()
    tl.atomic_add(arrived, 1, sem="release")
    # the counter only grows, so that the order of the arrivals does not matter
    while tl.atomic_add(arrived, 0, sem="acquire") < (turn + 1) * programs:
        pass
    tl.debug_barrier()
    return turn + 1


@triton.jit
def read(place, turn, numbers, programs, like, PROGRAMS: tl.constexpr):
    """What all programs left at a place in the turn before this one, [PROGRAMS] in their order and the dtype of
    `like`; 0 beyond the last program."""
    index = tl.arange(0, PROGRAMS)
    where = numbers + (((turn + 1) % 2) * PLACES + place) * programs + index
    return tl.load(where, mask=index < programs, other=0).to(like.dtype, bitcast=True)


@triton.jit
def exchange(first, second, turn, numbers, arrived, program, programs, PROGRAMS: tl.constexpr):
    """Two numbers of each program, as all of them see them: as `read` gives them, and the next turn."""
    leave(first, 0, turn, numbers, program, programs)
    leave(second, 1, turn, numbers, program, programs)
    turn = meet(turn, arrived, programs)
    all_first = read(0, turn, numbers, programs, first, PROGRAMS)
    all_second = read(1, turn, numbers, programs, second, PROGRAMS)
    return all_first, all_second, turn


@triton.jit
def sum_over_programs(
    first, second, turn, numbers, arrived, program, programs, SHARED: tl.constexpr, PROGRAMS: tl.constexpr
):
    """Two numbers of each program summed in the order of the programs, so that every program has the same bits."""
    if SHARED:
        all_first, all_second, turn = exchange(first, second, turn, numbers, arrived, program, programs, PROGRAMS)
        first, second = tl.split(tl.sum(tl.join(all_first, all_second), 0))
    return first, second, turn
