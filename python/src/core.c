/* The module attn._core: what the package's Python code stands on. */
#include "core.h"

PyObject *py_raise(attn_status status)
{
    PyObject *type = PyExc_ValueError;
    switch (status) {
    case ATTN_ERR_DTYPE: type = PyExc_TypeError; break;
    case ATTN_ERR_MEMORY: type = PyExc_MemoryError; break;
    case ATTN_ERR_IO: type = PyExc_OSError; break;
    case ATTN_ERR_UNSUPPORTED: type = PyExc_NotImplementedError; break;
    default: break;
    }
    if (!PyErr_Occurred()) {
        PyErr_SetString(type, attn_last_error());
    }
    return NULL;
}

static PyObject *version(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return PyUnicode_FromString(attn_version());
}

static PyMethodDef methods[] = {
    {"version", version, METH_NOARGS, "The version of the library."},
    {"table", py_op_table, METH_NOARGS, "What the library says about each mechanism: a list of dicts."},
    {NULL, NULL, 0, NULL},
};

static int execute(PyObject *module)
{
    return py_array_init(module) == 0 && py_op_init(module) == 0 && py_model_init(module) == 0 ? 0 : -1;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, execute}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "attn._core",
    .m_doc = "The C side of the package: mechanisms on arrays of any library.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__core(void);
PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&definition); }
