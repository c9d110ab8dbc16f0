"""Launching Triton kernels with little host time: a kernel compiled once is called past Triton's own inspection."""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernel_backend import INTERPRETED

try:
    import triton
except ImportError as error:
    raise ImportError("run_launch_triton needs triton; use kernel_backend='torch' without it") from error

# A multiprocessor has so many registers, on all of NVIDIA's GPUs since Kepler.
REGISTERS = 65536

# Of each kernel: whether Triton looks at an integer's value, of each argument that is no constant; what was compiled
# of it, by all that Triton's code generation looks at; and the kernel itself, so that no other gets its id. Kernels
# are known by identity, because a kernel's own hash is taken over its source.
_kernels: dict[int, tuple[tuple[bool, ...], dict[tuple[Any, ...], "_Compiled"], Any]] = {}
# A grid of one, two or three axes leaves these out.
_AXES = ((), (1, 1), (1,), ())


class _Compiled(NamedTuple):
    """What Triton compiled, and what of it a launch needs."""

    kernel: Any
    run: Callable[..., None]
    function: int
    metadata: Any


# The launches of a thread are noted here while `bind` runs a function.
_notes = threading.local()


def _note(compiled: _Compiled | None, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
    notes = getattr(_notes, "launches", None)
    if notes is not None:
        notes.append((compiled, grid, arguments))


def has_listeners() -> bool:
    """Whether a profiler wants to hear of launches."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    # Triton has a chain of hooks here, unless somebody put another callable in its place.
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def cdiv(a: int, b: int) -> int:
    """`a / b` rounded up; Triton's own is a wrapper that costs the host as much as ten such divisions."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least `n` ≥ 1; Triton's own likewise."""
    return 1 << (n - 1).bit_length()


def adjacent(states: torch.Tensor | None) -> torch.Tensor | None:
    """Numbers as the kernels read them, side by side; None where there are none."""
    return None if states is None else states.contiguous()


def options_together(num_warps: int, together: int) -> dict[str, Any]:
    """Triton's options for programs that wait for each other, so many of which a multiprocessor has to hold."""
    return {"launch_cooperative_grid": True, "maxnreg": min(REGISTERS // (32 * num_warps * together), 255)}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int = 4,
    num_stages: int = 3,
    together: int = 0,
    **constants: Any,
) -> None:
    """`kernel[grid](*arguments, **constants)` on the device of its first tensor.

    Triton inspects every argument of every call, which takes the host longer than most kernels here take the GPU
    (docs/operators.md). What it looks for is looked at here once more, only faster: dtypes, None, the constants, and
    whether integers are beyond 32 bits and, unless a kernel says `do_not_specialize`, 1 or multiples of 16. Where a
    tensor is not aligned to 16 bytes or on another device, or Triton interprets, it is left to Triton. Else the kernel
    gets addresses in place of tensors, because Triton's launcher would ask the driver about every tensor.

    Args:
        kernel: a function under `triton.jit`, its constants the last of its parameters.
        grid: programs along up to three axes.
        arguments: in the kernel's order, a tensor among them.
        num_warps, num_stages: Triton's options.
        together: where programs wait for each other, how many of them a multiprocessor has to hold: the launch is a
            cooperative one, and a program gets its share of the registers.
        constants: the last parameters, where they are not among `arguments`.
    """
    if constants:
        arguments += tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
    if INTERPRETED:
        kernel[grid](*arguments)
        return
    known = _kernels.get(id(kernel))
    if known is None:
        parameters = [parameter for parameter in kernel.params if not parameter.is_constexpr]
        specialized = tuple(not parameter.do_not_specialize for parameter in parameters)
        known = _kernels[id(kernel)] = (specialized, {}, kernel)
    specialized, compiled_kernels, _ = known
    # The kernel is called with the arguments, in which addresses stand for tensors.
    values: list[Any] = [*arguments]
    key: list[Any] = [num_warps, num_stages, together]
    key += values[len(specialized) :]
    add = key.append
    addresses = 0
    device = None
    elsewhere = False
    for number, is_specialized in enumerate(specialized):
        argument = values[number]
        kind = type(argument)
        if kind is int:
            if is_specialized:
                # Triton tells apart 1, multiples of 16 and all others, of 32 bits and of more.
                add(-1 if argument == 1 else not argument & 15 if argument < 2**31 else 2 + (not argument & 15))
            else:
                add(argument < 2**31)
        elif argument is None or kind is float:
            add(kind)
        else:
            add(argument.dtype)
            place = argument.get_device()
            if device is None:
                device = place
            elif place != device:
                elsewhere = True
            values[number] = address = argument.data_ptr()
            addresses |= address
    # torch.cuda.current_device would first look whether CUDA is initialised.
    if device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            return launch(kernel, grid, *arguments, num_warps=num_warps, num_stages=num_stages, together=together)
    add(device)
    found = tuple(key)
    is_plain = not (elsewhere or addresses & 15)
    compiled = compiled_kernels.get(found) if is_plain else None
    if compiled is None:
        options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages}
        if together:
            options |= options_together(num_warps, together)
        made = kernel[grid](*arguments, **options)
        if is_plain:
            compiled = compiled_kernels[found] = _Compiled(made, made.run, made.function, made.packed_metadata)
        _note(compiled, grid, arguments)
        return
    _note(compiled, grid, arguments)
    kernel_made, run, function, metadata = compiled
    axes = grid + _AXES[len(grid)]
    stream = torch._C._cuda_getCurrentRawStream(device)
    if has_listeners():
        kernel_made[axes](*values, stream=stream)
    else:
        # The line above comes to this, with a description of the launch that nobody would read.
        run(*axes, stream, function, metadata, None, None, None, *values)


class Bound:
    """The launches of a function for tensors of one kind, repeated with the addresses of other such tensors.

    Only what differs between two calls is put in: that takes the host a fraction of what a launch takes that has to
    find out what was compiled.
    """

    __slots__ = ("device", "launches")

    def __init__(self, launches: list[tuple[Any, ...]], device: int):
        self.launches = launches
        self.device = device

    def __call__(self, addresses: tuple[int | None, ...]) -> None:
        """Launch on the current stream. The tensors behind the addresses have the dtypes, shapes and strides of those
        that the function was bound with, are on its device, begin at multiples of 16 bytes, and are None where those
        were."""
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        for run, (x, y, z), function, metadata, constants, places in self.launches:
            values = constants.copy()
            for place, slot in places:
                values[place] = addresses[slot]
            run(x, y, z, stream, function, metadata, None, None, None, *values)


def bind(function: Callable[..., None], tensors: tuple[Tensor | None, ...], *numbers: Any) -> Bound | None:
    """Run `function(*tensors, *numbers)`, which does nothing but launch kernels, and keep its launches; None where one
    went to Triton itself, as those do that are not aligned to 16 bytes, or reads what is not among the tensors."""
    notes: list[tuple[_Compiled | None, tuple[int, ...], tuple[Any, ...]]] = []
    _notes.launches = notes
    try:
        function(*tensors, *numbers)
    finally:
        _notes.launches = None
    given = [(tensor.data_ptr(), slot) for slot, tensor in enumerate(tensors) if tensor is not None]
    slots = dict(given)
    if len(slots) != len(given) or 0 in slots:
        return None
    device = next(tensor.get_device() for tensor in tensors if tensor is not None)
    launches = []
    for compiled, grid, arguments in notes:
        constants, places = [*arguments], []
        for place, argument in enumerate(arguments):
            if isinstance(argument, Tensor):
                constants[place] = None
                places.append((place, slots.get(argument.data_ptr())))
        if compiled is None or any(slot is None for _, slot in places):
            return None
        axes = grid + _AXES[len(grid)]
        launches.append((compiled.run, axes, compiled.function, compiled.metadata, constants, places))
    return Bound(launches, device)
