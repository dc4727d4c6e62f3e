/* The C side of the Python package: arrays of any library as attn_tensor views, and mechanisms that run on them.
 * Limited API (stable ABI) of Python 3.11. */
#ifndef ATTN_PYTHON_CORE_H
#define ATTN_PYTHON_CORE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "dlpack.h"
#include <attn/attn.h>

/* ---- array.c ---- */

/* A view of a Python array; the array stays borrowed until py_array_release(). */
typedef struct py_array {
    attn_tensor view;
    Py_buffer buffer; /* held when has_buffer */
    int has_buffer;
    dl_managed *managed; /* held when not NULL */
    dl_managed_versioned *versioned;
} py_array;

/* Fill `array` from any object with DLPack or the buffer protocol. `who` and `name` are for messages, `expected` is the
 * list of data types to name in them. -1 with a Python exception set on failure; then nothing is held. */
int py_array_get(py_array *array, PyObject *object, const char *who, const char *name, const char *expected);
void py_array_release(py_array *array);

/* Memory for a new array of the kind of `like` (NULL: NumPy where it is installed, else memoryview) with the shape and
 * type of *view: write through array->view, then py_array_release(), then make the array of it with py_array_finish(),
 * which takes the reference. NULL with an exception set on failure. */
PyObject *py_array_new(py_array *array, PyObject *like, const attn_tensor *view);
PyObject *py_array_finish(PyObject *made, PyObject *like);

int py_array_init(PyObject *module);

/* ---- core.c ---- */

/* Set the Python exception of a failed call from its status and attn_last_error(); returns NULL. */
PyObject *py_raise(attn_status status);

/* ---- op.c, model.c ---- */
int py_op_init(PyObject *module);
int py_model_init(PyObject *module);
PyObject *py_op_table(PyObject *module, PyObject *unused);

#endif
