"""Lists of kernel launches and products: noted while a function runs for the first time, repeated by one call of a C
function.

Between two launches of a list there is no Python. A list holds no tensor: it says of each address in which of the
call's memories it lies and how far from its beginning, so that it serves all calls with memories of the same kinds.

Where all memories of a call have the addresses that they had in an earlier one, its launches are one launch, of a CUDA
graph (run_launch_graphs.py).
"""

import contextlib
import ctypes
import functools
import re
import struct
import subprocess
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernel_backend import INTERPRETED
from .run_launch_graphs import launch_graphs
from .run_launch_triton import Compiled, has_listeners, note_launches

try:
    from triton.runtime.build import compile_module_from_src
except ImportError as error:
    raise ImportError("run_launch_list_triton needs triton; use kernel_backend='torch' without it") from error

# Lists are words of 64 bits. A launch is its kind, its length, a function, a grid of three axes, threads, bytes of
# shared memory, whether its programs wait for each other, then for each parameter a memory's number (or -1) and the
# number to be added (or the parameter itself). A product is its kind, its length, what cuBLAS takes, and three
# memories with their distances. A filling with zeros is its kind, its length, a memory, a distance and a size. The
# others are their kind and length: in a graph, what lies between ASIDE and BACK runs beside what lies between BACK and
# JOIN.
LAUNCH, PRODUCT, ZEROS, ASIDE, BACK, JOIN = range(6)
# so many parameters and memories the C code has room for
MOST_PARAMETERS, MOST_MEMORIES = 64, 128
# each temporary begins at a multiple of so many bytes, so that kernels may read 16 bytes at once
ALIGNMENT = 128

SOURCE = r"""
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <unistd.h>

typedef int (*launch_t)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **,
                        void **);
typedef int (*together_t)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *,
                          void **);
typedef int (*product_t)(void *, int, int, int, int, int, const void *, const void *, int, int, const void *, int, int,
                         const void *, void *, int, int, int, int);
typedef int (*zeros_t)(uint64_t, unsigned char, size_t, void *);
typedef int (*context_t)(void **);
typedef int (*open_stream_t)(void **, unsigned);
typedef int (*begin_capture_t)(void *, int);
typedef int (*end_capture_t)(void *, void **);
typedef int (*instantiate_t)(void **, void *, unsigned long long);
typedef int (*start_t)(void *, void *);
typedef int (*destroy_t)(void *);
typedef int (*open_event_t)(void **, unsigned);
typedef int (*record_t)(void *, void *);
typedef int (*wait_t)(void *, void *, unsigned);
typedef int (*set_stream_t)(void *, void *);
typedef int (*set_workspace_t)(void *, void *, size_t);

enum { LAUNCH, PRODUCT, ZEROS, ASIDE, BACK, JOIN };

#define MOST_PARAMETERS 64
#define MOST_MEMORIES 128

static launch_t launch;
static together_t launch_together;
static product_t multiply;
static zeros_t fill;
static context_t context_of_now;
static open_stream_t open_stream;
static begin_capture_t begin_capture;
static end_capture_t end_capture;
static instantiate_t instantiate;
static start_t start_graph;
static destroy_t close_stream, destroy_graph, destroy_executable, close_event;
static open_event_t open_event;
static record_t record;
static wait_t wait_for;
static set_stream_t set_stream;
static start_t upload;
static pid_t process;
static set_workspace_t set_workspace;

static PyObject *connect(PyObject *self, PyObject *const *args, Py_ssize_t count) {
  if (count != 20) {
    PyErr_SetString(PyExc_TypeError, "connect takes twenty addresses");
    return NULL;
  }
  launch = (launch_t)PyLong_AsVoidPtr(args[0]);
  launch_together = (together_t)PyLong_AsVoidPtr(args[1]);
  fill = (zeros_t)PyLong_AsVoidPtr(args[2]);
  context_of_now = (context_t)PyLong_AsVoidPtr(args[3]);
  open_stream = (open_stream_t)PyLong_AsVoidPtr(args[4]);
  begin_capture = (begin_capture_t)PyLong_AsVoidPtr(args[5]);
  end_capture = (end_capture_t)PyLong_AsVoidPtr(args[6]);
  instantiate = (instantiate_t)PyLong_AsVoidPtr(args[7]);
  start_graph = (start_t)PyLong_AsVoidPtr(args[8]);
  close_stream = (destroy_t)PyLong_AsVoidPtr(args[9]);
  destroy_graph = (destroy_t)PyLong_AsVoidPtr(args[10]);
  destroy_executable = (destroy_t)PyLong_AsVoidPtr(args[11]);
  open_event = (open_event_t)PyLong_AsVoidPtr(args[12]);
  record = (record_t)PyLong_AsVoidPtr(args[13]);
  wait_for = (wait_t)PyLong_AsVoidPtr(args[14]);
  close_event = (destroy_t)PyLong_AsVoidPtr(args[15]);
  upload = (start_t)PyLong_AsVoidPtr(args[16]);
  multiply = (product_t)PyLong_AsVoidPtr(args[17]);
  set_stream = (set_stream_t)PyLong_AsVoidPtr(args[18]);
  set_workspace = (set_workspace_t)PyLong_AsVoidPtr(args[19]);
  process = getpid();
  if (PyErr_Occurred())
    return NULL;
  Py_RETURN_NONE;
}

/* A recording: its stream, the one beside it, an event, and for cuBLAS a handle and two workspaces of so many bytes,
   side by side; no handle where there are no products */
typedef struct {
  void *main, *beside, *event, *handle;
  char *workspace;
  size_t bytes;
} recording_t;

/* cuBLAS forgets its workspace with its stream */
static int multiply_on(const recording_t *recording, void *stream) {
  if (!recording->handle)
    return 0;
  int status = set_stream(recording->handle, stream);
  char *workspace = recording->workspace + (stream == recording->beside ? recording->bytes : 0);
  return status ? status : set_workspace(recording->handle, workspace, recording->bytes);
}

/* the second of two streams waits for what was recorded on the first */
static int wait_between(const recording_t *recording, void *first, void *second) {
  int status = record(recording->event, first);
  return status ? status : wait_for(second, recording->event, 0);
}

/* without a recording, what may run beside other words runs before them */
static int run_words(const int64_t *word, const int64_t *end, const uint64_t *memories, void *stream, void *handle,
                     const recording_t *recording) {
  static const float alpha = 1.0f;
  while (word < end) {
    const int64_t *next = word + word[1];
    int status = 0;
    if (word[0] == LAUNCH) {
      uint64_t values[MOST_PARAMETERS];
      void *parameters[MOST_PARAMETERS];
      int number = 0;
      for (const int64_t *pair = word + 9; pair < next; pair += 2, number++) {
        values[number] = (pair[0] < 0 ? 0 : memories[pair[0]]) + (uint64_t)pair[1];
        parameters[number] = &values[number];
      }
      if (word[8])
        status = launch_together((void *)word[2], word[3], word[4], word[5], word[6], 1, 1, word[7], stream,
                                 parameters);
      else
        status = launch((void *)word[2], word[3], word[4], word[5], word[6], 1, 1, word[7], stream, parameters, NULL);
    } else if (word[0] == PRODUCT) {
      float beta = word[15] ? 1.0f : 0.0f;
      status = multiply(handle, word[2], word[3], word[4], word[5], word[6], &alpha,
                        (void *)(memories[word[16]] + word[17]), word[7], word[8],
                        (void *)(memories[word[18]] + word[19]), word[9], word[10], &beta,
                        (void *)(memories[word[20]] + word[21]), word[11], word[12], word[13], word[14]);
    } else if (word[0] == ZEROS) {
      status = fill(memories[word[2]] + word[3], 0, word[4], stream);
    } else if (recording) {
      if (word[0] == ASIDE)
        status = wait_between(recording, recording->main, recording->beside);
      else if (word[0] == JOIN)
        status = wait_between(recording, recording->beside, recording->main);
      if (!status && word[0] != JOIN) {
        stream = word[0] == ASIDE ? recording->beside : recording->main;
        status = multiply_on(recording, stream);
      }
    }
    if (status)
      return status;
    word = next;
  }
  return 0;
}

/* run(words, addresses, each, room, stream, handle) runs the words for each of several calls one after another: every
   `each` addresses are the memories of a call, and the room of temporary tensors, which comes behind them, is all
   calls'. It gives one of these, and launches nothing unless it is DONE */
enum { DONE, WITHOUT_CONTEXT, UNALIGNED };

static PyObject *run(PyObject *self, PyObject *const *args, Py_ssize_t count) {
  if (count != 6 || !PyBytes_Check(args[0]) || !PyList_Check(args[1])) {
    PyErr_SetString(PyExc_TypeError, "run takes bytes, a list of addresses, three numbers, and a handle");
    return NULL;
  }
  Py_ssize_t size = PyList_GET_SIZE(args[1]);
  Py_ssize_t each = PyLong_AsSsize_t(args[2]);
  uint64_t room = PyLong_AsUnsignedLongLong(args[3]);
  void *stream = PyLong_AsVoidPtr(args[4]);
  void *handle = PyLong_AsVoidPtr(args[5]);
  if (PyErr_Occurred())
    return NULL;
  if (each < 1 || each >= MOST_MEMORIES || size % each) {
    PyErr_SetString(PyExc_ValueError, "the addresses must be whole calls, of at least one memory and not too many");
    return NULL;
  }
  uint64_t *addresses = PyMem_Malloc((size + 1) * sizeof(uint64_t));
  if (!addresses)
    return PyErr_NoMemory();
  uint64_t all = room;
  for (Py_ssize_t place = 0; place < size; place++)
    all |= addresses[place] = PyLong_AsUnsignedLongLong(PyList_GET_ITEM(args[1], place));
  /* kernels were compiled for addresses that are multiples of 16 */
  if (PyErr_Occurred() || all & 15) {
    PyMem_Free(addresses);
    return PyErr_Occurred() ? NULL : PyLong_FromLong(UNALIGNED);
  }
  const int64_t *words = (const int64_t *)PyBytes_AS_STRING(args[0]);
  const int64_t *end = words + PyBytes_GET_SIZE(args[0]) / sizeof(int64_t);
  void *context = NULL;
  if (context_of_now(&context) || !context) {
    PyMem_Free(addresses);
    return PyLong_FromLong(WITHOUT_CONTEXT);
  }
  int status = 0;
  Py_BEGIN_ALLOW_THREADS
  uint64_t memories[MOST_MEMORIES];
  memories[each] = room;
  for (Py_ssize_t first = 0; first < size && !status; first += each) {
    for (Py_ssize_t place = 0; place < each; place++)
      memories[place] = addresses[first + place];
    status = run_words(words, end, memories, stream, handle, NULL);
  }
  Py_END_ALLOW_THREADS
  PyMem_Free(addresses);
  if (status)
    return PyErr_Format(PyExc_RuntimeError, "a launch of a CoLT5 layer failed with CUDA's or cuBLAS's error %d",
                        status);
  return PyLong_FromLong(DONE);
}

static const char *const GRAPH = "colt5_launches.graph";

/* a process that was forked from the graph's has no part in it */
static void forget(PyObject *capsule) {
  if (getpid() == process)
    destroy_executable(PyCapsule_GetPointer(capsule, GRAPH));
}

/* graph(words, addresses, each, room, stream, handle, workspace, bytes) gives what run would launch as one CUDA graph,
   in a capsule; None where run launches nothing or CUDA refuses. At the workspace are twice so many bytes. The handle
   is 0 where the words have no products; it is on the stream afterwards, without a workspace of PyTorch's. A recording
   would disturb a thread that waits for the whole GPU meanwhile; Python's lock is therefore held */
static PyObject *graph(PyObject *self, PyObject *const *args, Py_ssize_t count) {
  if (count != 8 || !PyBytes_Check(args[0]) || !PyList_Check(args[1])) {
    PyErr_SetString(PyExc_TypeError, "graph takes bytes, a list of addresses, and six numbers");
    return NULL;
  }
  Py_ssize_t size = PyList_GET_SIZE(args[1]);
  Py_ssize_t each = PyLong_AsSsize_t(args[2]);
  uint64_t memories[MOST_MEMORIES];
  if (!PyErr_Occurred() && (each < 1 || each >= MOST_MEMORIES || size % each))
    PyErr_SetString(PyExc_ValueError, "the addresses must be whole calls, of at least one memory and not too many");
  if (PyErr_Occurred())
    return NULL;
  memories[each] = PyLong_AsUnsignedLongLong(args[3]);
  recording_t recording = {NULL};
  void *stream = PyLong_AsVoidPtr(args[4]);
  recording.handle = PyLong_AsVoidPtr(args[5]);
  recording.workspace = PyLong_AsVoidPtr(args[6]);
  recording.bytes = PyLong_AsSize_t(args[7]);
  if (PyErr_Occurred())
    return NULL;
  uint64_t all = memories[each];
  for (Py_ssize_t place = 0; place < size; place++)
    all |= PyLong_AsUnsignedLongLong(PyList_GET_ITEM(args[1], place));
  if (PyErr_Occurred())
    return NULL;
  if (all & 15)
    Py_RETURN_NONE;
  const int64_t *words = (const int64_t *)PyBytes_AS_STRING(args[0]);
  const int64_t *end = words + PyBytes_GET_SIZE(args[0]) / sizeof(int64_t);
  void *captured = NULL, *executable = NULL;
  /* streams that wait for no other one; what other threads do meanwhile is not looked at */
  int status = open_stream(&recording.main, 1) || open_stream(&recording.beside, 1) || open_event(&recording.event, 2);
  status = status ? status : multiply_on(&recording, recording.main);
  if (!status && !(status = begin_capture(recording.main, 2))) {
    for (Py_ssize_t first = 0; first < size && !status; first += each) {
      for (Py_ssize_t place = 0; place < each; place++)
        memories[place] = PyLong_AsUnsignedLongLong(PyList_GET_ITEM(args[1], first + place));
      status = run_words(words, end, memories, recording.main, recording.handle, &recording);
    }
    int ended = end_capture(recording.main, &captured);
    status = status ? status : ended;
  }
  if (!status && captured)
    status = instantiate(&executable, captured, 0);
  /* what the graph needs of the GPU's memory is taken now, and not when it is launched */
  if (!status && executable && (status = upload(executable, stream)))
    destroy_executable(executable);
  if (captured)
    destroy_graph(captured);
  if (recording.handle)
    set_stream(recording.handle, stream);
  if (recording.event)
    close_event(recording.event);
  if (recording.beside)
    close_stream(recording.beside);
  if (recording.main)
    close_stream(recording.main);
  if (status || !executable)
    Py_RETURN_NONE;
  PyObject *capsule = PyCapsule_New(executable, GRAPH, forget);
  if (!capsule)
    destroy_executable(executable);
  return capsule;
}

/* replay(capsule, stream) launches a graph; it gives what run gives */
static PyObject *replay(PyObject *self, PyObject *const *args, Py_ssize_t count) {
  void *executable = count == 2 ? PyCapsule_GetPointer(args[0], GRAPH) : NULL;
  void *stream = executable ? PyLong_AsVoidPtr(args[1]) : NULL;
  if (PyErr_Occurred())
    return NULL;
  if (!executable) {
    PyErr_SetString(PyExc_TypeError, "replay takes a graph and a stream");
    return NULL;
  }
  void *context = NULL;
  if (context_of_now(&context) || !context)
    return PyLong_FromLong(WITHOUT_CONTEXT);
  int status;
  Py_BEGIN_ALLOW_THREADS
  status = start_graph(executable, stream);
  Py_END_ALLOW_THREADS
  if (status)
    return PyErr_Format(PyExc_RuntimeError, "the graph of a CoLT5 layer failed with CUDA's error %d", status);
  return PyLong_FromLong(DONE);
}

static PyMethodDef methods[] = {
    {"connect", (PyCFunction)(void (*)(void))connect, METH_FASTCALL, NULL},
    {"run", (PyCFunction)(void (*)(void))run, METH_FASTCALL, NULL},
    {"graph", (PyCFunction)(void (*)(void))graph, METH_FASTCALL, NULL},
    {"replay", (PyCFunction)(void (*)(void))replay, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "colt5_launches", NULL, -1, methods};
PyMODINIT_FUNC PyInit_colt5_launches(void) { return PyModule_Create(&module); }
"""

DONE, WITHOUT_CONTEXT, UNALIGNED = range(3)

# what of CUDA's driver the C code calls
FUNCTIONS = (
    "cuLaunchKernel", "cuLaunchCooperativeKernel", "cuMemsetD8Async", "cuCtxGetCurrent",
    "cuStreamCreate", "cuStreamBeginCapture_v2", "cuStreamEndCapture", "cuGraphInstantiateWithFlags", "cuGraphLaunch",
    "cuStreamDestroy_v2", "cuGraphDestroy", "cuGraphExecDestroy",
    "cuEventCreate", "cuEventRecord", "cuStreamWaitEvent", "cuEventDestroy_v2", "cuGraphUpload",
)  # fmt: skip
FUNCTIONS_OF_CUBLAS = ("cublasGemmEx", "cublasSetStream_v2", "cublasSetWorkspace_v2")

# cuBLAS's names of dtypes, of sums in fp32, and of the ways to choose a product's kernel
_DTYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
_SUMS_IN_FLOAT32, _ANY_KERNEL, _KERNEL_OF_TENSOR_CORES = 68, -1, 99


def _address(library: ctypes.CDLL, name: str) -> int:
    address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    assert address is not None
    return address


def _cublas() -> ctypes.CDLL:
    """The library that PyTorch multiplies by."""
    everything = ctypes.CDLL(None)
    if hasattr(everything, "cublasGemmEx"):
        return everything
    with open("/proc/self/maps") as maps:
        paths = [line.split()[-1] for line in maps if re.search(r"/libcublas\.so", line)]
    return ctypes.CDLL(paths[0])


@functools.cache
def launcher() -> Any:
    """The C code that runs lists, compiled as Triton compiles its own and kept in Triton's cache; None, with a
    warning, where that does not work: every call then runs like the first one."""
    try:
        # this needs a C compiler, as Triton's own kernels do, and no setting of Triton's
        made = compile_module_from_src(src=SOURCE, name="colt5_launches")
        cuda = ctypes.CDLL("libcuda.so.1")
        cublas = _cublas()
        addresses = [_address(cuda, name) for name in FUNCTIONS]
        made.connect(*addresses, *(_address(cublas, name) for name in FUNCTIONS_OF_CUBLAS))
    except (OSError, RuntimeError, ImportError, AttributeError, IndexError, subprocess.CalledProcessError) as error:
        warnings.warn(
            f"CoLT5's layers are launched one kernel after another, which takes the host longer: {error}", stacklevel=2
        )
        return None
    return made


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
    """Notes what a block under `with` computes: launches of kernels, and what the methods here do; nothing else may be
    in such a block. At its end the list is kept, where it has a place.

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

    def __enter__(self) -> None:
        self.before = note_launches(self.notes)

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        note_launches(self.before)
        if error is None and self.notes is not None and self.place is not None:
            lists, kind, memories = self.place
            lists[kind] = self.finish(memories)

    def temporary(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Memory for the time of the function."""
        memory = torch.empty(shape, dtype=dtype, device=self.device)
        if self.notes is not None:
            self.temporaries.append(memory)
        return memory

    def product(self, first: Tensor, second: Tensor, out: Tensor) -> None:
        """Write the product of two matrices, of which each or its transpose has rows of adjacent numbers, to a
        contiguous one."""
        torch.mm(first, second, out=out)
        self._note("product", first, second, out, False)

    def add_product(self, first: Tensor, second: Tensor, out: Tensor) -> None:
        """The same, added to what is there."""
        out.addmm_(first, second)
        self._note("product", first, second, out, True)

    def zeros(self, memory: Tensor) -> None:
        """Fill a contiguous tensor with zeros."""
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
        if self.notes is not None:
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
    what notes the first of the calls, under `with`, for the others and later ones.

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
        The number of a call, and what notes it, under `with`, before the next one is asked for.
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
