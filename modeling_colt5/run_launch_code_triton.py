"""The C code that runs lists of launches and records them as CUDA graphs: its source, and how it is compiled and
connected to CUDA's driver and to cuBLAS.

run_launch_list_triton.py makes the lists. They are handed over as bytes, with the addresses of a call's memories.
"""

import ctypes
import functools
import re
import subprocess
import warnings
from typing import Any

try:
    from triton.runtime.build import compile_module_from_src
except ImportError as error:
    raise ImportError("run_launch_code_triton needs triton; use kernel_backend='torch' without it") from error

# Lists are words of 64 bits. A launch is its kind, its length, a function, a grid of three axes, threads, bytes of
# shared memory, whether its programs wait for each other, then for each parameter a memory's number (or -1) and the
# number to be added (or the parameter itself). A product is its kind, its length, what cuBLAS takes, and three
# memories with their distances. A filling with zeros is its kind, its length, a memory, a distance and a size. The
# others are their kind and length: in a graph, what lies between ASIDE and BACK runs beside what lies between BACK and
# JOIN.
LAUNCH, PRODUCT, ZEROS, ASIDE, BACK, JOIN = range(6)
# so many parameters and memories the C code has room for
MOST_PARAMETERS, MOST_MEMORIES = 64, 128

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
