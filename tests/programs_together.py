"""Triton's interpreter with all programs of a launch at once, for kernels whose programs wait for each other.

The interpreter runs one program after the other. Here each has a thread, one thread runs at a time, and every atomic
operation hands over to another one, drawn at random: so waiting ends, and every order of the programs can come up.
"""

import functools
import inspect
import math
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest

# the interpreter looks for it among a kernel's globals, which are those of this file here
import triton.language as tl  # noqa: F401
from triton.runtime.interpreter import interpreter_builder

# a launch of a few programs takes one or two thousand
MOST_HAND_OVERS = 20_000


class _Programs:
    """The programs of one launch that have not ended, by their place in the grid, and whose turn it is."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.condition = threading.Condition()
        self.waiting: list[tuple[int, int, int]] = []
        self.turn: tuple[int, int, int] | None = None
        self.hand_overs = 0
        self.error: BaseException | None = None

    def hand_over(self) -> None:
        """Draw whose turn is next; the caller holds the condition."""
        self.turn = self.random.choice(self.waiting) if self.waiting else None
        self.hand_overs += 1
        if self.hand_overs > MOST_HAND_OVERS:
            self.error = self.error or RuntimeError("the programs wait for each other for ever")
        self.condition.notify_all()

    def wait(self, place: tuple[int, int, int]) -> None:
        """Wait for the turn of a program; the caller holds the condition."""
        self.condition.wait_for(lambda: self.turn == place or self.error)
        if self.error:
            raise self.error
        interpreter_builder.grid_idx = place

    def run(self, place: tuple[int, int, int], program: Callable[[], None]) -> None:
        """What the thread of a program does."""
        try:
            with self.condition:
                self.wait(place)
            program()
        except BaseException as error:
            self.error = self.error or error
        with self.condition:
            self.waiting.remove(place)
            self.hand_over()


def run_together(monkeypatch: pytest.MonkeyPatch, kernel: Any, seed: int) -> None:
    """From now on the interpreter runs the programs of `kernel` at once, in an order that depends on `seed`."""
    body = kernel.rewrite()
    atomic = interpreter_builder.create_atomic_rmw
    programs = _Programs(seed)

    def create_atomic_rmw(*operands: Any) -> Any:
        result = atomic(*operands)
        place = interpreter_builder.grid_idx
        with programs.condition:
            programs.hand_over()
            programs.wait(place)
        return result

    @functools.wraps(body)
    def program(**arguments: Any) -> None:
        place = interpreter_builder.grid_idx
        programs.waiting.append(place)
        threading.Thread(target=programs.run, args=(place, lambda: body(**arguments)), daemon=True).start()
        if len(programs.waiting) == math.prod(interpreter_builder.grid_dim):
            with programs.condition:
                programs.hand_over()
                programs.condition.wait_for(lambda: not programs.waiting)
            if programs.error:
                raise programs.error

    program.__signature__ = inspect.signature(body)
    monkeypatch.setattr(kernel, "rewrite", lambda: program)
    monkeypatch.setattr(interpreter_builder, "create_atomic_rmw", create_atomic_rmw)
