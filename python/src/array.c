/* Arrays in and out without copies: the buffer protocol (NumPy, memoryview, array.array), the DLPack protocol (JAX, CuPy
 * on the host, older PyTorch) and its C exchange table (PyTorch), which needs no Python call. */
#include "core.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- Data types ---- */

static const struct {
    attn_dtype dtype;
    uint8_t code, bits;
    const char *format; /* of the buffer protocol, native sizes */
    const char *numpy;
} types[] = {
    {ATTN_F32, DL_FLOAT, 32, "f", "float32"}, {ATTN_F16, DL_FLOAT, 16, "e", "float16"},
    {ATTN_BF16, DL_BFLOAT, 16, "H", "uint16"}, {ATTN_I8, DL_INT, 8, "b", "int8"},
    {ATTN_I32, DL_INT, 32, "i", "int32"},     {ATTN_I64, DL_INT, 64, "q", "int64"},
    {ATTN_BOOL, DL_BOOL, 8, "?", "bool"},
};
enum { TYPE_COUNT = sizeof types / sizeof types[0] };

static const char *const code_names[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};

static int wrong_type(const char *who, const char *name, const char *type, const char *expected)
{
    PyErr_Format(PyExc_TypeError, "%s: %s has data type %s, expected %s", who, name, type, expected);
    return -1;
}

/* 1 when `format` (with its item size) is one of ours. */
static int dtype_of_format(const char *format, Py_ssize_t size, attn_dtype *dtype)
{
    const char *f = format != NULL ? format : "B";
    f += *f == '@' || *f == '=' || *f == '<';
    if (f[0] == '\0' || f[1] != '\0') {
        return 0;
    }
    switch (*f) {
    case 'f': *dtype = ATTN_F32; return size == 4;
    case 'e': *dtype = ATTN_F16; return size == 2;
    case 'b': *dtype = ATTN_I8; return size == 1;
    case '?': *dtype = ATTN_BOOL; return size == 1;
    case 'i':
    case 'l':
    case 'q': *dtype = size == 4 ? ATTN_I32 : ATTN_I64; return size == 4 || size == 8;
    default: return 0;
    }
}

static const char *name_of_format(const char *format)
{
    static const char *const names[][2] = {{"d", "float64"}, {"g", "longdouble"}, {"B", "uint8"},   {"H", "uint16"},
                                           {"h", "int16"},   {"I", "uint32"},     {"L", "uint64"},  {"Q", "uint64"},
                                           {"c", "char"},    {"Zf", "complex64"}, {"Zd", "complex128"}};
    if (format == NULL) {
        return "uint8";
    }
    const char *f = format + (*format == '@' || *format == '=' || *format == '<');
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        if (strcmp(f, names[i][0]) == 0) {
            return names[i][1];
        }
    }
    return format;
}

/* ---- Views ---- */

static int check_rank(int64_t ndim, const char *who, const char *name)
{
    if (ndim < 0 || ndim > ATTN_MAX_DIMS) {
        PyErr_Format(PyExc_ValueError, "%s: %s has %lld dimensions (at most %d)", who, name, (long long)ndim,
                     ATTN_MAX_DIMS);
        return -1;
    }
    return 0;
}

static int check_alignment(const attn_tensor *view, const char *who, const char *name)
{
    if ((uintptr_t)view->data % attn_dtype_size(view->dtype) != 0) {
        PyErr_Format(PyExc_ValueError, "%s: %s is not aligned to its element size (pass a copy)", who, name);
        return -1;
    }
    return 0;
}

static int view_of_dl(attn_tensor *view, const dl_tensor *t, const char *who, const char *name, const char *expected)
{
    if (t->device.type != DL_CPU && t->device.type != DL_CUDA_HOST && t->device.type != DL_ROCM_HOST &&
        t->device.type != DL_CUDA_MANAGED) {
        PyErr_Format(PyExc_ValueError, "%s: %s is not in CPU memory (DLPack device type %d)", who, name,
                     (int)t->device.type);
        return -1;
    }
    if (check_rank(t->ndim, who, name) != 0) {
        return -1;
    }
    int type = 0;
    while (type < TYPE_COUNT && !(types[type].code == t->dtype.code && types[type].bits == t->dtype.bits)) {
        type++;
    }
    if (type == TYPE_COUNT || t->dtype.lanes != 1) {
        char text[64];
        snprintf(text, sizeof text, "%s%d", t->dtype.code < 7 ? code_names[t->dtype.code] : "unknown", t->dtype.bits);
        return wrong_type(who, name, text, expected);
    }
    *view = attn_tensor_make(NULL, types[type].dtype, t->ndim, t->shape);
    if (t->strides != NULL) {
        memcpy(view->stride, t->strides, (size_t)t->ndim * sizeof view->stride[0]);
    }
    view->data = t->data != NULL ? (char *)t->data + t->byte_offset : NULL;
    return check_alignment(view, who, name);
}

static int view_of_buffer(attn_tensor *view, const Py_buffer *buffer, const char *who, const char *name,
                          const char *expected, int is_bf16)
{
    attn_dtype dtype = ATTN_BF16;
    if (check_rank(buffer->ndim, who, name) != 0) {
        return -1;
    }
    if (!is_bf16 && !dtype_of_format(buffer->format, buffer->itemsize, &dtype)) {
        return wrong_type(who, name, name_of_format(buffer->format), expected);
    }
    *view = (attn_tensor){.data = buffer->buf, .dtype = dtype, .ndim = buffer->ndim};
    for (int i = 0; i < buffer->ndim; i++) {
        view->shape[i] = buffer->shape[i];
        view->stride[i] = buffer->strides[i] / buffer->itemsize;
        if (buffer->strides[i] % buffer->itemsize != 0) {
            PyErr_Format(PyExc_ValueError, "%s: %s has a stride of %zd bytes, not a multiple of its %zd byte elements",
                         who, name, buffer->strides[i], buffer->itemsize);
            return -1;
        }
    }
    return check_alignment(view, who, name);
}

/* ---- What kind of array an object is, remembered per type ---- */

typedef enum py_kind { KIND_OTHER, KIND_NUMPY, KIND_EXCHANGE } py_kind;
typedef struct known_type {
    PyTypeObject *type; /* kept alive */
    py_kind kind;
    const dl_exchange *exchange;
} known_type;
enum { KNOWN_TYPES = 8 };
static known_type known_types[KNOWN_TYPES];
static int known_count;

static PyObject *numpy_empty, *numpy_uint16, *numpy_dtypes[TYPE_COUNT];
static PyObject *array_type;

/* NumPy's pieces, once it has been imported by someone; 0 when it has not. -1 on error. */
static int find_numpy(int import_it)
{
    if (numpy_empty != NULL) {
        return 1;
    }
    PyObject *modules = PyImport_GetModuleDict();
    PyObject *numpy = PyDict_GetItemString(modules, "numpy");
    if (numpy != NULL) {
        Py_INCREF(numpy);
    } else {
        numpy = import_it ? PyImport_ImportModule("numpy") : NULL;
        if (numpy == NULL) {
            PyErr_Clear();
            return 0;
        }
    }
    for (int i = 0; i < TYPE_COUNT; i++) {
        PyObject *scalar = PyObject_GetAttrString(numpy, types[i].numpy);
        PyObject *dtype = scalar != NULL ? PyObject_CallMethod(numpy, "dtype", "O", scalar) : NULL;
        Py_XDECREF(scalar);
        if (dtype == NULL) {
            Py_DECREF(numpy);
            PyErr_Clear();
            return 0;
        }
        numpy_dtypes[i] = dtype;
    }
    numpy_uint16 = numpy_dtypes[ATTN_BF16];
    numpy_empty = PyObject_GetAttrString(numpy, "empty");
    Py_DECREF(numpy);
    if (numpy_empty == NULL) {
        PyErr_Clear();
        return 0;
    }
    return 1;
}

static int is_numpy(PyObject *object)
{
    PyObject *modules = PyImport_GetModuleDict();
    PyObject *numpy = PyDict_GetItemString(modules, "numpy");
    PyObject *type = numpy != NULL ? PyObject_GetAttrString(numpy, "ndarray") : NULL;
    int result = type != NULL && PyObject_IsInstance(object, type) == 1;
    Py_XDECREF(type);
    PyErr_Clear();
    return result && find_numpy(0) == 1;
}

static const dl_exchange *exchange_of(PyObject *type)
{
    PyObject *capsule = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__");
    const dl_exchange *table = capsule != NULL ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : NULL;
    Py_XDECREF(capsule); /* the table is static memory of the library that the type belongs to */
    PyErr_Clear();
    while (table != NULL && table->version.major != DL_MAJOR) {
        table = table->previous;
    }
    return table;
}

static known_type classify(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    for (int i = 0; i < known_count; i++) {
        if (known_types[i].type == type) {
            return known_types[i];
        }
    }
    known_type found = {.type = type, .kind = KIND_OTHER, .exchange = exchange_of((PyObject *)type)};
    if (found.exchange != NULL) {
        found.kind = KIND_EXCHANGE;
    } else if (is_numpy(object)) {
        found.kind = KIND_NUMPY;
    }
    if (known_count < KNOWN_TYPES) {
        Py_INCREF((PyObject *)type);
        known_types[known_count++] = found;
    }
    return found;
}

/* ---- In ---- */

/* NumPy arrays of ml_dtypes.bfloat16 refuse the buffer protocol; their bits as uint16 do not. New reference or NULL. */
static PyObject *bf16_bits(PyObject *object)
{
    PyObject *dtype = PyObject_GetAttrString(object, "dtype");
    PyObject *name = dtype != NULL ? PyObject_GetAttrString(dtype, "name") : NULL;
    PyObject *bits = NULL;
    if (name != NULL && PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, "bfloat16") == 0) {
        bits = PyObject_CallMethod(object, "view", "O", numpy_uint16);
    }
    Py_XDECREF(name);
    Py_XDECREF(dtype);
    PyErr_Clear();
    return bits;
}

static int get_buffer(py_array *array, PyObject *object, const char *who, const char *name, const char *expected,
                      int is_bf16)
{
    if (PyObject_GetBuffer(object, &array->buffer, PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
        return -1;
    }
    array->has_buffer = 1;
    if (view_of_buffer(&array->view, &array->buffer, who, name, expected, is_bf16) != 0) {
        py_array_release(array);
        return -1;
    }
    return 0;
}

static int get_capsule(py_array *array, PyObject *object, const char *who, const char *name, const char *expected)
{
    PyObject *method = PyObject_GetAttrString(object, "__dlpack__");
    if (method == NULL) {
        return -1;
    }
    PyObject *no_arguments = PyTuple_New(0);
    PyObject *options = Py_BuildValue("{s(ii)}", "max_version", DL_MAJOR, DL_MINOR);
    PyObject *capsule = no_arguments != NULL && options != NULL ? PyObject_Call(method, no_arguments, options) : NULL;
    if (capsule == NULL && PyErr_ExceptionMatches(PyExc_TypeError)) { /* before version 1 of the protocol */
        PyErr_Clear();
        capsule = PyObject_CallNoArgs(method);
    }
    Py_XDECREF(options);
    Py_XDECREF(no_arguments);
    Py_DECREF(method);
    if (capsule == NULL) {
        return -1;
    }
    const dl_tensor *tensor = NULL;
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        array->versioned = PyCapsule_GetPointer(capsule, "dltensor_versioned");
        PyCapsule_SetName(capsule, "used_dltensor_versioned");
        tensor = array->versioned->version.major == DL_MAJOR ? &array->versioned->tensor : NULL;
    } else if (PyCapsule_IsValid(capsule, "dltensor")) {
        array->managed = PyCapsule_GetPointer(capsule, "dltensor");
        PyCapsule_SetName(capsule, "used_dltensor");
        tensor = &array->managed->tensor;
    }
    Py_DECREF(capsule);
    if (tensor == NULL) {
        PyErr_Format(PyExc_TypeError, "%s: %s gives no DLPack tensor of version %d", who, name, DL_MAJOR);
        py_array_release(array);
        return -1;
    }
    if (view_of_dl(&array->view, tensor, who, name, expected) != 0) {
        py_array_release(array);
        return -1;
    }
    return 0;
}

int py_array_get(py_array *array, PyObject *object, const char *who, const char *name, const char *expected)
{
    array->has_buffer = 0;
    array->managed = NULL;
    array->versioned = NULL;
    known_type type = classify(object);
    if (type.kind == KIND_EXCHANGE) {
        dl_tensor tensor;
        if (type.exchange->view_of_object != NULL) {
            if (type.exchange->view_of_object(object, &tensor) != 0) {
                return -1;
            }
            return view_of_dl(&array->view, &tensor, who, name, expected);
        }
        if (type.exchange->managed_from_object(object, &array->versioned) != 0) {
            array->versioned = NULL;
            return -1;
        }
        if (view_of_dl(&array->view, &array->versioned->tensor, who, name, expected) != 0) {
            py_array_release(array);
            return -1;
        }
        return 0;
    }
    int has_dlpack = PyObject_HasAttrString((PyObject *)Py_TYPE(object), "__dlpack__");
    if (type.kind == KIND_NUMPY) {
        if (get_buffer(array, object, who, name, expected, 0) == 0) {
            return 0;
        }
        PyObject *kind, *value, *trace;
        PyErr_Fetch(&kind, &value, &trace);
        PyObject *bits = bf16_bits(object);
        if (bits == NULL) {
            PyErr_Restore(kind, value, trace);
            return -1;
        }
        Py_XDECREF(kind);
        Py_XDECREF(value);
        Py_XDECREF(trace);
        int result = get_buffer(array, bits, who, name, expected, 1); /* the buffer keeps `bits` alive */
        Py_DECREF(bits);
        return result;
    }
    if (has_dlpack) {
        return get_capsule(array, object, who, name, expected);
    }
    if (PyObject_CheckBuffer(object)) {
        return get_buffer(array, object, who, name, expected, 0);
    }
    PyObject *type_name = PyObject_GetAttrString((PyObject *)Py_TYPE(object), "__name__");
    PyErr_Format(PyExc_TypeError, "%s: %s is %U, expected an array (DLPack or the buffer protocol)", who, name,
                 type_name != NULL ? type_name : Py_None);
    Py_XDECREF(type_name);
    return -1;
}

void py_array_release(py_array *array)
{
    if (array->has_buffer) {
        PyBuffer_Release(&array->buffer);
        array->has_buffer = 0;
    }
    if (array->managed != NULL) {
        if (array->managed->deleter != NULL) {
            array->managed->deleter(array->managed);
        }
        array->managed = NULL;
    }
    if (array->versioned != NULL) {
        if (array->versioned->deleter != NULL) {
            array->versioned->deleter(array->versioned);
        }
        array->versioned = NULL;
    }
}

/* ---- Memory of our own, for callers without an allocator: exports the buffer protocol and DLPack ---- */

typedef struct own_array {
    PyObject_HEAD
    attn_tensor view;
    int type; /* index into types */
    Py_ssize_t shape[ATTN_MAX_DIMS], strides[ATTN_MAX_DIMS];
} own_array;

static PyObject *own_array_new(const attn_tensor *like)
{
    own_array *array = PyObject_New(own_array, (PyTypeObject *)array_type);
    if (array == NULL) {
        return NULL;
    }
    array->view = attn_tensor_make(NULL, like->dtype, like->ndim, like->shape);
    array->type = 0;
    while (types[array->type].dtype != like->dtype) {
        array->type++;
    }
    size_t size = attn_dtype_size(like->dtype);
    for (int i = 0; i < like->ndim; i++) {
        array->shape[i] = (Py_ssize_t)like->shape[i];
        array->strides[i] = (Py_ssize_t)(array->view.stride[i] * (int64_t)size);
    }
    size_t bytes = (size_t)attn_tensor_count(like) * size;
    array->view.data = aligned_alloc(64, (bytes + 64) / 64 * 64);
    if (array->view.data == NULL) {
        Py_DECREF(array);
        return PyErr_NoMemory();
    }
    return (PyObject *)array;
}

static void own_array_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    free(((own_array *)self)->view.data);
    PyObject_Free(self);
    Py_DECREF((PyObject *)type);
}

static int own_array_buffer(PyObject *self, Py_buffer *buffer, int flags)
{
    own_array *array = (own_array *)self;
    if (array->view.dtype == ATTN_BF16) {
        PyErr_SetString(PyExc_BufferError, "the buffer protocol has no bfloat16");
        buffer->obj = NULL;
        return -1;
    }
    *buffer = (Py_buffer){
        .buf = array->view.data,
        .obj = self,
        .len = (Py_ssize_t)attn_tensor_count(&array->view) * (Py_ssize_t)attn_dtype_size(array->view.dtype),
        .itemsize = (Py_ssize_t)attn_dtype_size(array->view.dtype),
        .ndim = array->view.ndim,
        .format = (flags & PyBUF_FORMAT) ? (char *)(uintptr_t)types[array->type].format : NULL,
        .shape = (flags & PyBUF_ND) ? array->shape : NULL,
        .strides = (flags & PyBUF_STRIDES) == PyBUF_STRIDES ? array->strides : NULL,
    };
    Py_INCREF(self);
    return 0;
}

/* Both kinds of managed tensor, and the array that they keep alive. */
typedef struct dl_export {
    union {
        dl_managed plain;
        dl_managed_versioned versioned;
    } managed;
    PyObject *owner;
} dl_export;

static void release_export(dl_export *held)
{
    PyGILState_STATE state = PyGILState_Ensure();
    Py_DECREF(held->owner);
    PyGILState_Release(state);
    free(held);
}

static void delete_plain(dl_managed *self) { release_export(self->context); }
static void delete_versioned(dl_managed_versioned *self) { release_export(self->context); }

static void unused_capsule(PyObject *capsule)
{
    if (PyCapsule_IsValid(capsule, "dltensor")) {
        delete_plain(PyCapsule_GetPointer(capsule, "dltensor"));
    } else if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        delete_versioned(PyCapsule_GetPointer(capsule, "dltensor_versioned"));
    }
}

static PyObject *own_array_dlpack(PyObject *self, PyObject *arguments, PyObject *options)
{
    static char *names[] = {"stream", "max_version", "dl_device", "copy", NULL};
    PyObject *stream = NULL, *version = NULL, *device = NULL, *copy = NULL;
    if (!PyArg_ParseTupleAndKeywords(arguments, options, "|$OOOO", names, &stream, &version, &device, &copy)) {
        return NULL;
    }
    own_array *array = (own_array *)self;
    dl_export *held = calloc(1, sizeof *held);
    if (held == NULL) {
        return PyErr_NoMemory();
    }
    held->owner = self;
    Py_INCREF(self);
    dl_tensor tensor = {.data = array->view.data,
                        .device = {DL_CPU, 0},
                        .ndim = array->view.ndim,
                        .dtype = {types[array->type].code, types[array->type].bits, 1},
                        .shape = array->view.shape,
                        .strides = array->view.stride};
    PyObject *capsule;
    if (version != NULL && version != Py_None) {
        held->managed.versioned = (dl_managed_versioned){
            .version = {DL_MAJOR, DL_MINOR}, .context = held, .deleter = delete_versioned, .tensor = tensor};
        capsule = PyCapsule_New(&held->managed.versioned, "dltensor_versioned", unused_capsule);
    } else {
        held->managed.plain = (dl_managed){.context = held, .deleter = delete_plain, .tensor = tensor};
        capsule = PyCapsule_New(&held->managed.plain, "dltensor", unused_capsule);
    }
    if (capsule == NULL) {
        release_export(held);
    }
    return capsule;
}

static PyObject *own_array_device(PyObject *self, PyObject *unused)
{
    (void)self;
    (void)unused;
    return Py_BuildValue("(ii)", DL_CPU, 0);
}

static PyMethodDef own_array_methods[] = {
    {"__dlpack__", (PyCFunction)(void (*)(void))own_array_dlpack, METH_VARARGS | METH_KEYWORDS, "The array as a DLPack capsule."},
    {"__dlpack_device__", own_array_device, METH_NOARGS, "(1, 0): the CPU."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot own_array_slots[] = {
    {Py_tp_dealloc, own_array_dealloc}, {Py_bf_getbuffer, own_array_buffer},
    {Py_tp_methods, own_array_methods}, {Py_tp_doc, "Memory that the library allocated, as a buffer and as DLPack."},
    {0, NULL},
};

static PyType_Spec own_array_spec = {
    .name = "attn._core.Array",
    .basicsize = sizeof(own_array),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = own_array_slots,
};

/* ---- Out ---- */

static PyObject *new_numpy(py_array *array, PyObject *like, const attn_tensor *view)
{
    PyObject *shape = PyTuple_New(view->ndim);
    for (int i = 0; shape != NULL && i < view->ndim; i++) {
        PyTuple_SetItem(shape, i, PyLong_FromLongLong(view->shape[i]));
    }
    PyObject *dtype = NULL;
    if (view->dtype == ATTN_BF16 && like != NULL) {
        dtype = PyObject_GetAttrString(like, "dtype"); /* bfloat16 outputs only come from bfloat16 inputs */
    } else {
        for (int i = 0; i < TYPE_COUNT; i++) {
            dtype = types[i].dtype == view->dtype ? numpy_dtypes[i] : dtype;
        }
        Py_XINCREF(dtype);
    }
    PyObject *made = shape != NULL && dtype != NULL ? PyObject_CallFunctionObjArgs(numpy_empty, shape, dtype, NULL) : NULL;
    Py_XDECREF(shape);
    Py_XDECREF(dtype);
    if (made != NULL && py_array_get(array, made, "attn", "output", "an array") != 0) {
        Py_CLEAR(made);
    }
    return made;
}

static void set_python_error(void *context, const char *kind, const char *message)
{
    (void)context;
    PyErr_Format(strcmp(kind, "MemoryError") == 0 ? PyExc_MemoryError : PyExc_RuntimeError, "%s", message);
}

static PyObject *new_exchange(py_array *array, const dl_exchange *exchange, const attn_tensor *view)
{
    attn_tensor shape = *view;
    int type = 0;
    while (types[type].dtype != view->dtype) {
        type++;
    }
    dl_tensor prototype = {.device = {DL_CPU, 0},
                           .ndim = view->ndim,
                           .dtype = {types[type].code, types[type].bits, 1},
                           .shape = shape.shape};
    dl_managed_versioned *managed = NULL;
    void *made = NULL;
    if (exchange->allocate(&prototype, &managed, NULL, set_python_error) != 0) {
        return NULL;
    }
    array->view.data = managed->tensor.data != NULL ? (char *)managed->tensor.data + managed->tensor.byte_offset : NULL;
    if (exchange->object_from_managed(managed, &made) != 0) {
        managed->deleter(managed);
        return NULL;
    }
    return made;
}

/* from_dlpack of the library that `like` belongs to. */
static PyObject *from_dlpack_of(PyObject *like)
{
    PyObject *space = NULL;
    if (PyObject_HasAttrString(like, "__array_namespace__")) {
        space = PyObject_CallMethod(like, "__array_namespace__", NULL);
    } else {
        PyObject *module = PyObject_GetAttrString((PyObject *)Py_TYPE(like), "__module__");
        PyObject *parts = module != NULL ? PyObject_CallMethod(module, "partition", "s", ".") : NULL;
        PyObject *root = parts != NULL ? PyTuple_GetItem(parts, 0) : NULL;
        space = root != NULL ? PyImport_Import(root) : NULL;
        Py_XDECREF(parts);
        Py_XDECREF(module);
    }
    PyObject *function = space != NULL ? PyObject_GetAttrString(space, "from_dlpack") : NULL;
    Py_XDECREF(space);
    return function;
}

PyObject *py_array_new(py_array *array, PyObject *like, const attn_tensor *view)
{
    *array = (py_array){.view = attn_tensor_make(NULL, view->dtype, view->ndim, view->shape)};
    known_type type = {.kind = KIND_OTHER};
    if (like != NULL) {
        type = classify(like);
    } else if (find_numpy(1) == 1) {
        type.kind = KIND_NUMPY;
    }
    if (type.kind == KIND_NUMPY) {
        return new_numpy(array, like, view);
    }
    if (type.kind == KIND_EXCHANGE) {
        return new_exchange(array, type.exchange, view);
    }
    PyObject *own = own_array_new(view);
    if (own != NULL) {
        array->view.data = ((own_array *)own)->view.data;
    }
    return own;
}

PyObject *py_array_finish(PyObject *made, PyObject *like)
{
    if ((PyObject *)Py_TYPE(made) != array_type) {
        return made;
    }
    PyObject *result = NULL;
    if (like != NULL && PyObject_HasAttrString((PyObject *)Py_TYPE(like), "__dlpack__")) {
        PyObject *convert = from_dlpack_of(like);
        result = convert != NULL ? PyObject_CallFunctionObjArgs(convert, made, NULL) : NULL;
        Py_XDECREF(convert);
    } else {
        result = PyMemoryView_FromObject(made);
    }
    Py_DECREF(made);
    return result;
}

int py_array_init(PyObject *module)
{
    array_type = PyType_FromModuleAndSpec(module, &own_array_spec, NULL);
    return array_type != NULL ? PyModule_AddObjectRef(module, "Array", array_type) : -1;
}
