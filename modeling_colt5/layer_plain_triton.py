"""Whether modules are as they were seen, asked in C: the question of `Seen.weights` in layer_plain.py.

It is asked in each call. For one new token, and for an encoder's short input, it takes the host in Python as long as
all launches, and in C a third of that.
"""

import functools
import subprocess
from typing import Any

try:
    from triton.runtime.build import compile_module_from_src
except ImportError as error:
    raise ImportError("layer_plain_triton needs triton; layer_plain asks in Python without it") from error

SOURCE = r"""
#define PY_SSIZE_T_CLEAN
#include <Python.h>

static PyObject *names[6];
enum { PARAMETERS = 4, MODULES };

/* the dictionary under a name of a module's dictionary; NULL, without an error, where there is none */
static PyObject *dictionary_of(PyObject *owner, PyObject *name) {
  PyObject *found = PyDict_GetItemWithError(owner, name);
  return found && PyDict_Check(found) ? found : NULL;
}

static int are_called_as_seen(PyObject *modules, PyObject *classes, PyObject *dicts, PyObject *lengths) {
  for (Py_ssize_t place = 0; place < PyList_GET_SIZE(modules); place++) {
    PyObject *own = PyList_GET_ITEM(dicts, place);
    if ((PyObject *)Py_TYPE(PyList_GET_ITEM(modules, place)) != PyList_GET_ITEM(classes, place) ||
        PyDict_GET_SIZE(own) != PyLong_AsSsize_t(PyList_GET_ITEM(lengths, place)))
      return 0;
    for (int hooks = 0; hooks < PARAMETERS; hooks++) {
      PyObject *found = dictionary_of(own, names[hooks]);
      if (!found || PyDict_GET_SIZE(found))
        return 0;
    }
  }
  return 1;
}

static int have_children(PyObject *parents, PyObject *children) {
  Py_ssize_t number = 0;
  for (Py_ssize_t place = 0; place < PyList_GET_SIZE(parents); place++) {
    PyObject *key, *child, *own = dictionary_of(PyList_GET_ITEM(parents, place), names[MODULES]);
    Py_ssize_t position = 0;
    if (!own)
      return 0;
    for (; PyDict_Next(own, &position, &key, &child); number++)
      if (number == PyList_GET_SIZE(children) || child != PyList_GET_ITEM(children, number))
        return 0;
  }
  return number == PyList_GET_SIZE(children);
}

/* 1 where numbers are equal, 0 where one is not, -1 with an error where they cannot be compared */
static int have_numbers(PyObject *owners, PyObject *attributes, PyObject *numbers) {
  for (Py_ssize_t place = 0; place < PyList_GET_SIZE(owners); place++) {
    PyObject *seen = PyList_GET_ITEM(numbers, place);
    PyObject *found = PyDict_GetItemWithError(PyList_GET_ITEM(owners, place), PyList_GET_ITEM(attributes, place));
    int is_equal = PyObject_RichCompareBool(found ? found : Py_None, seen, Py_EQ);
    if (is_equal != 1)
      return is_equal;
  }
  return 1;
}

static int have_forwards(PyObject *kinds, PyObject *forwards) {
  for (Py_ssize_t place = 0; place < PyList_GET_SIZE(kinds); place++) {
    PyObject *found = PyObject_GetAttrString(PyList_GET_ITEM(kinds, place), "forward");
    if (!found)
      return -1;
    Py_DECREF(found);
    if (found != PyList_GET_ITEM(forwards, place))
      return 0;
  }
  return 1;
}

/* weights(modules, classes, dicts, lengths, parents, children, with_parameters, kinds_of_values, with_numbers,
   attributes, numbers, kinds, forwards), all lists: the parameters as a new list, or None where something is not as
   it was seen */
static PyObject *weights(PyObject *self, PyObject *const *args, Py_ssize_t count) {
  if (count != 13) {
    PyErr_SetString(PyExc_TypeError, "weights takes thirteen lists");
    return NULL;
  }
  for (Py_ssize_t place = 0; place < count; place++)
    if (!PyList_Check(args[place])) {
      PyErr_SetString(PyExc_TypeError, "weights takes lists");
      return NULL;
    }
  int as_seen = are_called_as_seen(args[0], args[1], args[2], args[3]) && have_children(args[4], args[5]);
  if (as_seen)
    as_seen = have_numbers(args[8], args[9], args[10]);
  if (as_seen == 1)
    as_seen = have_forwards(args[11], args[12]);
  if (PyErr_Occurred())
    return NULL;
  if (!as_seen)
    Py_RETURN_NONE;
  PyObject *found = PyList_New(0);
  Py_ssize_t number = 0;
  for (Py_ssize_t place = 0; found && place < PyList_GET_SIZE(args[6]); place++) {
    PyObject *key, *value, *own = dictionary_of(PyList_GET_ITEM(args[6], place), names[PARAMETERS]);
    Py_ssize_t position = 0;
    as_seen = own != NULL;
    while (as_seen && PyDict_Next(own, &position, &key, &value)) {
      as_seen = number < PyList_GET_SIZE(args[7]) && (PyObject *)Py_TYPE(value) == PyList_GET_ITEM(args[7], number);
      number++;
      if (as_seen && value != Py_None && PyList_Append(found, value))
        as_seen = 0;
    }
    if (!as_seen)
      Py_CLEAR(found);
  }
  if (found && number != PyList_GET_SIZE(args[7]))
    Py_CLEAR(found);
  if (found || PyErr_Occurred())
    return found;
  Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"weights", (PyCFunction)(void (*)(void))weights, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "colt5_plain", NULL, -1, methods};
PyMODINIT_FUNC PyInit_colt5_plain(void) {
  static const char *const known[] = {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks",
                                      "_backward_pre_hooks", "_parameters", "_modules"};
  for (int place = 0; place < 6; place++)
    if (!names[place] && !(names[place] = PyUnicode_InternFromString(known[place])))
      return NULL;
  return PyModule_Create(&module);
}
"""


@functools.cache
def weights_as_seen() -> Any:
    """The function of C, compiled once and kept in Triton's cache: it takes the lists of a `Seen`, and gives what its
    `weights` gives. None where there is no compiler of C: the same question in Python has the same answer."""
    try:
        return compile_module_from_src(src=SOURCE, name="colt5_plain").weights
    except (OSError, RuntimeError, ImportError, subprocess.CalledProcessError):
        return None
