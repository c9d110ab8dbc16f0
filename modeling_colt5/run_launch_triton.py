"""Launching Triton kernels with little host time: a compiled kernel is called without Triton's own inspection.

Kernels of a function that is to be noted are compiled and loaded before its first launch, several at a time.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from .kernel_backend import INTERPRETED

try:
    import triton as triton
except ImportError as error:
    raise ImportError("Triton kernels need triton; use kernel_backend='torch' without it") from error

# Files of kernels import both names from here, so that one place says that Triton is missing.
tl = triton.language

# A multiprocessor has so many registers, on all of NVIDIA's GPUs since Kepler.
REGISTERS = 65536

# Of each kernel: whether Triton looks at an integer's value, of each argument that is no constant; what was compiled
# of it, by all that Triton's code generation looks at; and the kernel itself, so that no other gets its id. Kernels
# are known by identity, because a kernel's own hash is taken over its source.
_kernels: dict[int, tuple[tuple[bool, ...], dict[tuple[Any, ...], "Compiled"], Any]] = {}
# What threads compiled at the same time. Triton unloads the code of what nobody holds, and launches may wait for it.
_compiled_twice: list["Compiled"] = []
# A grid of one, two or three axes leaves these out.
_AXES = ((), (1, 1), (1,), ())


class Compiled(NamedTuple):
    """What Triton compiled, and what of it a launch needs."""

    kernel: Any
    run: Callable[..., None]
    function: int
    metadata: Any


# Where the launches of a thread are noted, and whether they are only compiled.
_notes = threading.local()


def _note(compiled: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
    notes = getattr(_notes, "launches", None)
    if notes is not None:
        notes.append((compiled, grid, arguments))


def note_launches(notes: list[Any] | None) -> list[Any] | None:
    """From now on add each launch of this thread to the notes, None for no notes: as what was compiled, its grid and
    its arguments; as None, its grid and its arguments where it went to Triton itself, as those do that are not aligned
    to 16 bytes. Returns where they were added before."""
    before = getattr(_notes, "launches", None)
    _notes.launches = notes
    return before


class _Loaders(ThreadPoolExecutor):
    """Threads that compile kernels, and load each onto the device that was the current one when it was asked for."""

    def submit(self, compile_kernel: Callable[[], Any], /) -> Future[Any]:  # type: ignore[override]
        device = torch._C._cuda_getDevice()

        def load() -> Any:
            torch._C._cuda_setDevice(device)
            kernel = compile_kernel()
            # Triton loads a kernel when this is asked for. Release 3.6 also compiles C code then, which launches it.
            _ = kernel.run
            return kernel

        return super().submit(load)


@contextlib.contextmanager
def only_compiled() -> Iterator[None]:
    """Inside, this thread's launches do nothing. At the end what they need is compiled and loaded, by several threads
    at once; a kernel that cannot be compiled gives its error where it is launched."""
    with _Loaders() as threads, triton.AsyncCompileMode(threads, ignore_errors=True):
        _notes.only_compiled = True
        try:
            yield
        finally:
            _notes.only_compiled = False


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
    (docs/operators.md). Here the same properties are looked at, only faster: dtypes, None, the constants, and
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
    is_launched = not getattr(_notes, "only_compiled", False)
    if INTERPRETED:
        if not is_launched:
            return
        kernel[grid](*arguments)
        _note(kernel, grid, arguments)
        return
    known = _kernels.get(id(kernel))
    if known is None:
        parameters = [parameter for parameter in kernel.params if not parameter.is_constexpr]
        specialized = tuple(not parameter.do_not_specialize for parameter in parameters)
        # another thread may have been faster
        known = _kernels.setdefault(id(kernel), (specialized, {}, kernel))
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
    if compiled is not None and not is_launched:
        return
    if compiled is None:
        options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages}
        if together:
            options |= options_together(num_warps, together)
        if not is_launched:
            kernel.warmup(*arguments, grid=grid, **options)
            return
        made = kernel[grid](*arguments, **options)
        if is_plain:
            new = Compiled(made, made.run, made.function, made.packed_metadata)
            compiled = compiled_kernels.setdefault(found, new)
            if compiled is not new:
                _compiled_twice.append(new)
        _note(compiled, grid, arguments)
        return
    _note(compiled, grid, arguments)
    kernel_made, run, function, metadata = compiled
    axes = grid + _AXES[len(grid)]
    stream = torch._C._cuda_getCurrentRawStream(device)
    if has_listeners():
        kernel_made[axes](*values, stream=stream)
    else:
        # The line above comes to this call too, but first describes the launch for profilers.
        run(*axes, stream, function, metadata, None, None, None, *values)
