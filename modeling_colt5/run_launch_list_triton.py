"""Lists of kernel launches and products: noted while a function runs for the first time, repeated by one call of a C
function.

Between two launches of a list there is no Python. A list holds no tensor: it says of each address in which of the
call's memories it lies and how far from its beginning, so that it serves all calls with memories of the same kinds.

The C code is in run_launch_code_triton.py. Where all memories of a call have the addresses that they had in an earlier
one, its launches are one launch, of a CUDA graph (run_launch_graphs.py).
"""

import contextlib
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernel_backend import INTERPRETED
from .run_launch_code_triton import (
    ASIDE,
    BACK,
    DONE,
    JOIN,
    LAUNCH,
    MOST_MEMORIES,
    MOST_PARAMETERS,
    PRODUCT,
    WITHOUT_CONTEXT,
    ZEROS,
    launcher,
)
from .run_launch_graphs import launch_graphs
from .run_launch_triton import Compiled, has_listeners, note_launches, only_compiled

# each temporary begins at a multiple of so many bytes, so that kernels may read 16 bytes at once
ALIGNMENT = 128
# cuBLAS's names of dtypes, of sums in fp32, and of the ways to choose a product's kernel
_DTYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
_SUMS_IN_FLOAT32, _ANY_KERNEL, _KERNEL_OF_TENSOR_CORES = 68, -1, 99


def may_repeat(states: Tensor) -> bool:
    """Whether lists serve these states: they are on the device that is the current one, PyTorch multiplies as lists
    do, and no profiler wants to hear of single launches."""
    if INTERPRETED or not states.is_cuda or torch.version.hip is not None or has_listeners():
        return False
    backends = torch.backends.cuda
    return (
        torch._C._cuda_getDevice() == states.get_device()
        and backends.preferred_blas_library() == torch._C._BlasBackend.Cublas
        and bool(backends.matmul.allow_bf16_reduced_precision_reduction)
        and bool(backends.matmul.allow_fp16_reduced_precision_reduction)
        and not backends.matmul.allow_fp16_accumulation
    )


class LaunchList:
    """Launches and products of a function of some memories.

    Args:
        words: for `launcher`.
        room: bytes of its temporary tensors.
        count: how many launches and products there are.
        multiplies: whether there are products.
    """

    __slots__ = ("count", "multiplies", "room", "words")

    def __init__(self, words: bytes, room: int, count: int, multiplies: bool):
        self.words, self.room, self.count, self.multiplies = words, room, count, multiplies

    def __call__(
        self,
        calls: Sequence[list[Tensor]],
        device: torch.device,
        index: int,
        keep: Callable[[int], Tensor] | None = None,
    ) -> bool:
        """Launch for one call after another, on the current stream of a device with this index, which is the current
        one; as one graph where all of these calls came before with the same addresses.

        Args:
            calls: of each its memories, as `Recorder` had them, each with the dtype, shape and strides that it had
                then.
            keep: from a number of bytes to the room for temporary tensors, of a caller whose memories stay; None for a
                room of this call alone.

        Returns:
            False where a memory is not aligned to 16 bytes; nothing was launched then.
        """
        room = torch.empty(self.room, dtype=torch.uint8, device=device) if keep is None else keep(self.room)
        addresses = list(map(Tensor.data_ptr, chain.from_iterable(calls)))
        made, each, place = launcher(), len(calls[0]), room.data_ptr()
        stream = torch._C._cuda_getCurrentRawStream(index)
        graph = None
        if not torch._C._cuda_isCurrentStreamCapturing():
            precision = torch.backends.cuda.matmul.fp32_precision if self.multiplies else ""
            key = (index, stream, precision, self.words, each, place, *addresses)

            def make(workspace: Tensor | None) -> Any:
                # a thread in which nothing was computed yet has no context
                torch._C._cuda_setDevice(index)
                if workspace is None:
                    return made.graph(self.words, addresses, each, place, stream, 0, 0, 0)
                of_cublas = (torch._C._cuda_getCurrentBlasHandle(), workspace.data_ptr(), workspace.numel() // 2)
                recorded = made.graph(self.words, addresses, each, place, stream, *of_cublas)
                # to ask for the handle gives it PyTorch's workspace again
                torch._C._cuda_getCurrentBlasHandle()
                return recorded

            graph = launch_graphs.of(key, len(calls) * self.count, make, index if self.multiplies else None)
        if graph is not None:
            status = made.replay(graph, stream)
        else:
            handle = torch._C._cuda_getCurrentBlasHandle()
            status = made.run(self.words, addresses, each, place, stream, handle)
        if status == WITHOUT_CONTEXT:
            # a thread of its own, in which nothing was computed yet
            torch._C._cuda_setDevice(index)
            return self(calls, device, index, keep)
        return status == DONE


# Of one function of memories: the list of each kind of call, None where it cannot be repeated.
Lists = dict[Any, LaunchList | None]


class Recorder:
    """Notes what a function computes: launches of kernels, and what the methods here do; nothing else may be in such a
    function. At its end the list is kept, where it has a place.

    Args:
        device: where.
        records: whether notes are taken. All temporary tensors stay until the end then.
        place: the lists, the kind, and the memories of the call that is noted; None where the list is not kept.
    """

    def __init__(self, device: torch.device, records: bool, place: tuple[Lists, Any, list[Tensor]] | None = None):
        self.device, self.place = device, place
        # what was compiled, grid and arguments; or a word and tensors
        self.notes: list[tuple[Any, ...]] | None = [] if records else None
        self.temporaries: list[Tensor] = []
        self.is_rehearsal = False

    def __call__(self, function: Callable[[], object], later: Callable[[], object] | None = None) -> None:
        """Compute a function. Where it is noted, it is called twice: the first time for what has to be compiled, and
        nothing is computed then.

        Args:
            function: what is computed.
            later: what will be computed later on. It is called for what has to be compiled alone, so that threads
                compile the kernels of both at once.
        """
        if self.notes is not None:
            self.is_rehearsal = True
            with only_compiled():
                function()
                if later is not None:
                    later()
            self.is_rehearsal = False
        before = note_launches(self.notes)
        try:
            function()
        finally:
            note_launches(before)
        if self.notes is not None and self.place is not None:
            lists, kind, memories = self.place
            lists[kind] = self.finish(memories)

    def temporary(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Memory for the time of the function."""
        memory = torch.empty(shape, dtype=dtype, device=self.device)
        if self.notes is not None and not self.is_rehearsal:
            self.temporaries.append(memory)
        return memory

    def product(self, first: Tensor, second: Tensor, out: Tensor) -> None:
        """Write the product of two matrices, of which each or its transpose has rows of adjacent numbers, to a
        contiguous one."""
        if not self.is_rehearsal:
            torch.mm(first, second, out=out)
            self._note("product", first, second, out, False)

    def add_product(self, first: Tensor, second: Tensor, out: Tensor) -> None:
        """The same, added to what is there."""
        if not self.is_rehearsal:
            out.addmm_(first, second)
            self._note("product", first, second, out, True)

    def zeros(self, memory: Tensor) -> None:
        """Fill a contiguous tensor with zeros."""
        if not self.is_rehearsal:
            memory.zero_()
            self._note("zeros", memory)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Inside is what may run beside what comes after it, until `join`, where the list is a graph."""
        self._note("aside")
        yield
        self._note("back")

    def join(self) -> None:
        """What comes next waits for what runs aside."""
        self._note("join")

    def _note(self, *note: Any) -> None:
        if self.notes is not None and not self.is_rehearsal:
            self.notes.append(note)

    def finish(self, memories: list[Tensor]) -> LaunchList | None:
        """What was noted, for other memories like these; None where something cannot be repeated, or nothing can.

        Args:
            memories: all contiguous tensors that the function read or wrote, other than temporary ones, and views of
                those.
        """
        assert self.notes is not None
        if launcher() is None:
            return None
        commands = [_command(note) for note in self.notes]
        places = _Places(memories, self.temporaries)
        if not places.are_clear or any(command is None for command in commands):
            return None
        try:
            return places.finish([command for command in commands if command is not None])
        except _Elsewhere:
            return None


def repeated_or_recorder(
    lists: Lists,
    kind: Any,
    calls: Sequence[list[Tensor]],
    repeats: bool,
    keep: Callable[[int], Tensor] | None = None,
) -> Recorder | None:
    """Repeat the list of launches of a kind for one call after another, and give None; where there is none yet, give
    what computes and notes the first of the calls, for the others and later ones.

    Args:
        lists: of earlier calls, by their kinds; None of a kind that cannot be repeated.
        kind: tells apart the calls that launch different kernels.
        calls: of each all contiguous tensors that it reads or writes and does not make itself.
        repeats: whether lists are used and made, see `may_repeat`.
        keep: as of `LaunchList`.
    """
    memories = calls[0]
    device = memories[0].device
    launches = lists.get(kind) if repeats else None
    if launches is not None and launches(calls, device, memories[0].get_device(), keep):
        return None
    return Recorder(device, repeats and kind not in lists, (lists, kind, memories))


def calls_to_compute(
    lists: Lists,
    kind: Any,
    calls: Sequence[list[Tensor]],
    repeats: bool,
    keep: Callable[[int], Tensor] | None = None,
) -> Iterator[tuple[int, Recorder]]:
    """The calls of one kind that the caller has to compute, until there is a list that can be repeated for the rest.

    Args:
        lists, kind, calls, repeats, keep: as of `repeated_or_recorder`.

    Yields:
        The number of a call, and what has to compute it before the next one is asked for.
    """
    for number in range(len(calls)):
        recorder = repeated_or_recorder(lists, kind, calls[number:], repeats, keep)
        if recorder is None:
            return
        yield number, recorder


class _Elsewhere(Exception):
    """A tensor that is in none of the memories."""


class _Need(NamedTuple):
    """When a temporary tensor is needed.

    Args:
        first, last: the first and the last command that has it.
        until: the last command beside which one of those may still run, as what runs aside may until the join.
        aside: the beginning of the part that runs aside, where all of them are in the same one; else None.
    """

    first: int
    last: int
    until: int
    aside: int | None

    def and_then(self, later: "_Need") -> "_Need":
        """Of a tensor that is needed now and later."""
        aside = self.aside if self.aside == later.aside else None
        return _Need(self.first, later.last, max(self.until, later.until), aside)

    def overlaps(self, other: "_Need") -> bool:
        """Whether both tensors may be needed at the same time."""
        if self.aside is not None and self.aside == other.aside:
            # commands of one part run in their order
            return self.first <= other.last and other.first <= self.last
        return self.first <= other.until and other.first <= self.until


class _Places:
    """The memories of a recording: those of the call, and temporary ones."""

    def __init__(self, memories: list[Tensor], temporaries: list[Tensor]):
        everything = [*memories, *temporaries]
        self.first_temporary = len(memories)
        self.sizes = [part.numel() * part.itemsize for part in everything]
        spans = sorted((part.data_ptr(), number) for number, part in enumerate(everything))
        self.beginnings = [beginning for beginning, _ in spans]
        self.numbers = [number for _, number in spans]
        # no two in one place, as tied weights are, none of another device, none empty, all aligned to 16 bytes
        self.are_clear = (
            len(memories) + 1 <= MOST_MEMORIES
            and all(self.sizes)
            and all(part.is_contiguous() for part in everything)
            and len({part.device for part in everything}) == 1
            and not any(beginning & 15 for beginning in self.beginnings)
            and all(
                beginning + self.sizes[number] <= following
                for (beginning, number), following in zip(spans, self.beginnings[1:], strict=False)
            )
        )

    def find(self, tensor: Tensor) -> tuple[int, int]:
        """In which memory a tensor begins, and how far from its beginning."""
        address = tensor.data_ptr()
        place = bisect_right(self.beginnings, address) - 1
        number = self.numbers[max(place, 0)]
        distance = address - self.beginnings[place]
        if place < 0 or distance >= self.sizes[number]:
            raise _Elsewhere
        return number, distance

    def finish(self, commands: "list[Command]") -> LaunchList:
        """The commands with numbers of memories in the place of tensors."""
        offsets, room = self._plan(commands)

        def final(tensor: Tensor) -> tuple[int, int]:
            number, distance = self.find(tensor)
            if number < self.first_temporary:
                return number, distance
            # behind the call's memories comes the one room of all temporary tensors
            return self.first_temporary, offsets[number] + distance

        words: list[int] = []
        for command in commands:
            own: list[int] = []
            for word in command.words:
                own += final(word) if isinstance(word, Tensor) else (word,)
            words += [command.kind, len(own) + 2, *own]
        kinds = [command.kind for command in commands if command.kind in (LAUNCH, PRODUCT, ZEROS)]
        return LaunchList(struct.pack(f"<{len(words)}q", *words), room, len(kinds), PRODUCT in kinds)

    def _plan(self, commands: "list[Command]") -> tuple[dict[int, int], int]:
        """Where each temporary tensor lies in their room, so that those that are needed at the same time lie apart,
        and the room's size."""
        needs: dict[int, _Need] = {}
        aside: int | None = None
        for turn, command in enumerate(commands):
            if command.kind in (ASIDE, BACK):
                aside = turn if command.kind == ASIDE else None
            until = turn
            if aside is not None:
                later = range(turn, len(commands))
                until = next((other for other in later if commands[other].kind == JOIN), len(commands))
            for word in command.words:
                if isinstance(word, Tensor):
                    number, _ = self.find(word)
                    if number >= self.first_temporary:
                        need = _Need(turn, turn, until, aside)
                        needs[number] = need if number not in needs else needs[number].and_then(need)
        offsets: dict[int, int] = {}
        room = 1
        for number in sorted(needs, key=lambda number: -self.sizes[number]):
            beside = sorted(
                (offsets[other], self.sizes[other]) for other in offsets if needs[number].overlaps(needs[other])
            )
            offset = 0
            for other_offset, size in beside:
                if offset + self.sizes[number] <= other_offset:
                    break
                offset = max(offset, -(-(other_offset + size) // ALIGNMENT) * ALIGNMENT)
            offsets[number] = offset
            room = max(room, offset + self.sizes[number])
        return offsets, room


class Command(NamedTuple):
    """A word that LAUNCH and the others are: what comes behind kind and length, where a tensor stands for its memory
    and distance."""

    kind: int
    words: tuple[int | Tensor, ...]


def _command(note: tuple[Any, ...]) -> Command | None:
    """What was noted, as words; None where it cannot be repeated."""
    kind, *rest = note
    if not isinstance(kind, str):
        return launch_command(*note)
    if kind == "product":
        return product_command(*rest)
    if kind == "zeros":
        (memory,) = rest
        return Command(ZEROS, (memory, memory.numel() * memory.itemsize))
    return Command({"aside": ASIDE, "back": BACK, "join": JOIN}[kind], ())


def product_command(first: Tensor, second: Tensor, out: Tensor, adds: bool) -> Command | None:
    """A product as cuBLAS takes it, which sees rows as columns: so it is the product of the transposes in the other
    order."""
    code = _DTYPES.get(out.dtype)
    if code is None or {first.dtype, second.dtype} != {out.dtype} or out.stride(1) != 1:
        return None
    sides: list[tuple[int, int]] = []
    for part in (second, first):
        if part.stride(1) == 1 and part.stride(0) >= part.shape[1]:
            sides.append((0, part.stride(0)))
        elif part.stride(0) == 1 and part.stride(1) >= part.shape[0]:
            sides.append((1, part.stride(1)))
        else:
            return None
    (second_transposed, second_distance), (first_transposed, first_distance) = sides
    algorithm = _ANY_KERNEL if out.dtype == torch.float32 else _KERNEL_OF_TENSOR_CORES
    words = (
        second_transposed, first_transposed, second.shape[1], first.shape[0], first.shape[1],
        code, second_distance, code, first_distance, code, out.stride(0), _SUMS_IN_FLOAT32, algorithm, int(adds),
        second, first, out,
    )  # fmt: skip
    return Command(PRODUCT, words)


def launch_command(compiled: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> Command | None:
    """A launch: Triton's kernels take what is not compiled into them, and two memories that ours do without."""
    if not isinstance(compiled, Compiled):
        return None
    kernel = compiled.kernel
    metadata = kernel.metadata
    if (
        getattr(metadata, "global_scratch_size", 0)
        or getattr(metadata, "profile_scratch_size", 0)
        or getattr(metadata, "launch_pdl", False)
        or getattr(metadata, "num_ctas", 1) != 1
    ):
        return None
    words: list[int | Tensor] = [
        compiled.function, *grid, *(1,) * (3 - len(grid)), 32 * metadata.num_warps, metadata.shared,
        int(metadata.launch_cooperative_grid),
    ]  # fmt: skip
    count = 2
    for kind, argument in zip(kernel.src.signature.values(), arguments, strict=True):
        if kind == "constexpr":
            continue
        count += 1
        if isinstance(argument, Tensor):
            words.append(argument)
        elif kind == "fp32":
            words += [-1, *struct.unpack("<I", struct.pack("<f", argument))]
        elif isinstance(argument, int) and kind[0] in "iu":
            words += [-1, argument]
        else:
            return None
    return Command(LAUNCH, (*words, -1, 0, -1, 0)) if count <= MOST_PARAMETERS else None
