/* attn._core.Op: a mechanism with its parameters, run on arrays. And the table of all mechanisms. */
#include "core.h"

#include <string.h>
#include <time.h>

enum { MAX_PORTS = 80 };

typedef struct py_op {
    PyObject_HEAD
    attn_op *op;
    const attn_op_info *info;
    int in_count, out_count;
    const attn_port_info *in, *out; /* parts of info->ports */
} py_op;

static PyObject *op_type;

static const char *const expected_types[] = {"float32, float16 or bfloat16", "float32, float16, bfloat16 or int8",
                                             "int32 or int64", "bool"};

/* Arrays that one call holds. */
typedef struct arrays {
    int count;
    py_array array[MAX_PORTS];
    attn_named_tensor tensor[MAX_PORTS];
    int port[MAX_PORTS];
    PyObject *object[MAX_PORTS];
} arrays;

static void release(arrays *held)
{
    for (int i = 0; i < held->count; i++) {
        py_array_release(&held->array[i]);
    }
    held->count = 0;
}

/* None is an absent input; anything else has to be an array. */
static int get_arrays(arrays *held, const py_op *self, const attn_port_info *ports, int port_count,
                      PyObject *const *objects, Py_ssize_t count, int gradients)
{
    held->count = 0;
    if (count > port_count) {
        PyErr_Format(PyExc_TypeError, "%s takes %d arrays, not %zd", self->info->name, port_count, count);
        return -1;
    }
    for (int i = 0; i < (int)count; i++) {
        if (objects[i] == Py_None) {
            continue;
        }
        const char *expected = expected_types[gradients ? ATTN_PORT_FLOAT : ports[i].type];
        py_array *array = &held->array[held->count];
        if (py_array_get(array, objects[i], self->info->name, ports[i].name, expected) != 0) {
            release(held);
            return -1;
        }
        held->tensor[held->count] = (attn_named_tensor){ports[i].name, array->view};
        held->port[held->count] = i;
        held->object[held->count] = objects[i];
        held->count++;
    }
    return 0;
}

/* The input whose kind and float type the outputs follow: the first float one, else the first. NULL without inputs. */
static PyObject *leader(const py_op *self, const arrays *in, attn_dtype *dtype)
{
    *dtype = ATTN_F32;
    for (int i = 0; i < in->count; i++) {
        attn_dtype type = in->tensor[i].tensor.dtype;
        if (self->in[in->port[i]].type == ATTN_PORT_FLOAT && (type == ATTN_F16 || type == ATTN_BF16 || type == ATTN_F32)) {
            *dtype = type;
            return in->object[i];
        }
    }
    return in->count > 0 ? in->object[0] : NULL;
}

static int find_output(const py_op *self, const char *name)
{
    for (int i = 0; i < self->out_count; i++) {
        if (strcmp(self->out[i].name, name) == 0) {
            return i;
        }
    }
    return -1;
}

static int to_int(PyObject *object, long low, long high, const char *what, int *value)
{
    long number = PyLong_AsLong(object);
    if (number == -1 && PyErr_Occurred()) {
        return -1;
    }
    if (number < low || number > high) {
        PyErr_Format(PyExc_ValueError, "%s = %ld, expected %ld to %ld", what, number, low, high);
        return -1;
    }
    *value = (int)number;
    return 0;
}

/* Which outputs are wanted, by output number: all but those on request, or the listed ones. */
static int get_request(const py_op *self, PyObject *request, char wanted[MAX_PORTS])
{
    memset(wanted, 0, (size_t)self->out_count);
    if (request == Py_None) {
        for (int i = 0; i < self->out_count; i++) {
            wanted[i] = (self->out[i].flags & ATTN_PORT_ON_REQUEST) == 0;
        }
        return 0;
    }
    Py_ssize_t count = PyTuple_Size(request);
    for (Py_ssize_t i = 0; i < count; i++) {
        int index;
        if (to_int(PyTuple_GetItem(request, i), 0, self->out_count - 1, "output", &index) != 0) {
            return -1;
        }
        wanted[index] = 1;
    }
    return count < 0 ? -1 : 0;
}

/* The data type of an output: of the first float input, unless it is best f32, or of the library's choice. */
static attn_dtype output_type(const attn_port_info *port, attn_dtype first, attn_dtype own)
{
    return port->type == ATTN_PORT_FLOAT && (port->flags & ATTN_PORT_F32) == 0 ? first : own;
}

/* The wanted outputs as Python arrays by output number; NULL where these inputs do not produce one. kind: an array of the
 * kind to make when there are no inputs, or NULL. */
static int run_forward(const py_op *self, const arrays *in, const char wanted[], int threads, PyObject *kind,
                       PyObject *result[])
{
    attn_named_tensor made[MAX_PORTS], given[MAX_PORTS];
    static const py_array empty;
    py_array memory[MAX_PORTS];
    int number[MAX_PORTS], count = MAX_PORTS, given_count = 0;
    attn_status status = attn_op_outputs(self->op, in->tensor, in->count, made, &count);
    if (status != ATTN_OK) {
        py_raise(status);
        return -1;
    }
    attn_dtype dtype;
    PyObject *like = leader(self, in, &dtype);
    like = like != NULL ? like : kind;
    int failed = 0;
    for (int i = 0; i < count && !failed; i++) {
        int index = find_output(self, made[i].name);
        if (!wanted[index]) {
            continue;
        }
        made[i].tensor.dtype = output_type(&self->out[index], dtype, made[i].tensor.dtype);
        memory[given_count] = empty;
        number[given_count] = index;
        result[index] = py_array_new(&memory[given_count], like, &made[i].tensor);
        failed = result[index] == NULL;
        given[given_count] = (attn_named_tensor){made[i].name, memory[given_count].view};
        given_count++;
    }
    if (!failed) {
        attn_exec exec = {.threads = threads};
        PyThreadState *state = PyEval_SaveThread();
        status = attn_op_forward(self->op, in->tensor, in->count, given, given_count, &exec);
        PyEval_RestoreThread(state);
        failed = status != ATTN_OK;
        if (failed) {
            py_raise(status);
        }
    }
    for (int i = 0; i < given_count; i++) {
        py_array_release(&memory[i]);
        int index = number[i];
        if (result[index] != NULL && failed) {
            Py_CLEAR(result[index]);
        } else if (result[index] != NULL) {
            result[index] = py_array_finish(result[index], like);
            failed = result[index] == NULL;
        }
    }
    if (failed) { /* also what was finished before a failure */
        for (int i = 0; i < self->out_count; i++) {
            Py_CLEAR(result[i]);
        }
        return -1;
    }
    return 0;
}

/* forward(request, threads, *inputs). request None: the standard outputs, bare when the mechanism has one, else a tuple;
 * a tuple of output numbers: a tuple of these. Outputs that the inputs do not produce are None. A mechanism without inputs may
 * be given one array, whose kind the outputs then have. */
static PyObject *forward(PyObject *object, PyObject *const *arguments, Py_ssize_t count)
{
    py_op *self = (py_op *)object;
    char wanted[MAX_PORTS];
    int threads;
    if (count < 2 || (arguments[0] != Py_None && !PyTuple_Check(arguments[0]))) {
        PyErr_SetString(PyExc_TypeError, "forward(request, threads, *inputs)");
        return NULL;
    }
    if (to_int(arguments[1], 0, 4096, "threads", &threads) != 0 || get_request(self, arguments[0], wanted) != 0) {
        return NULL;
    }
    PyObject *kind = self->in_count == 0 && count == 3 ? arguments[2] : NULL;
    arrays in;
    if (get_arrays(&in, self, self->in, self->in_count, arguments + 2, kind != NULL ? 0 : count - 2, 0) != 0) {
        return NULL;
    }
    PyObject *result[MAX_PORTS];
    memset(result, 0, sizeof result[0] * (size_t)self->out_count);
    int status = run_forward(self, &in, wanted, threads, kind, result);
    release(&in);
    if (status != 0) {
        return NULL;
    }
    int standard = 0, last = -1;
    for (int i = 0; i < self->out_count; i++) {
        standard += wanted[i];
        last = wanted[i] ? i : last;
    }
    if (arguments[0] == Py_None && standard == 1) {
        return result[last] != NULL ? result[last] : Py_NewRef(Py_None);
    }
    Py_ssize_t size = arguments[0] == Py_None ? standard : PyTuple_Size(arguments[0]);
    PyObject *tuple = PyTuple_New(size);
    int next = 0;
    for (Py_ssize_t i = 0; tuple != NULL && i < size; i++) {
        int index;
        if (arguments[0] == Py_None) {
            while (!wanted[next]) {
                next++;
            }
            index = next++;
        } else {
            index = (int)PyLong_AsLong(PyTuple_GetItem(arguments[0], i));
        }
        PyTuple_SetItem(tuple, i, Py_NewRef(result[index] != NULL ? result[index] : Py_None));
    }
    for (int i = 0; i < self->out_count; i++) {
        Py_XDECREF(result[i]);
    }
    return tuple;
}

/* The items of a tuple (new references are not made). -1 with an exception when it is none, or too long. */
static Py_ssize_t items(PyObject *tuple, PyObject *object[MAX_PORTS])
{
    Py_ssize_t count = PyTuple_Size(tuple);
    if (count > MAX_PORTS) {
        PyErr_SetString(PyExc_TypeError, "too many arrays");
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        object[i] = PyTuple_GetItem(tuple, i);
    }
    return count;
}

static PyObject *run_backward(const py_op *self, const arrays *in, const arrays *out, const arrays *grads,
                              PyObject *wrt, int threads)
{
    attn_named_tensor given[MAX_PORTS];
    py_array memory[MAX_PORTS];
    PyObject *made[MAX_PORTS] = {NULL};
    int index[MAX_PORTS], count = 0, failed = 0;
    PyObject *tuple = PyTuple_New(self->in_count);
    for (int i = 0; tuple != NULL && i < in->count && !failed; i++) {
        int truth = PyObject_IsTrue(PyTuple_GetItem(wrt, in->port[i]));
        if (truth <= 0) {
            failed = truth < 0;
            continue;
        }
        made[count] = py_array_new(&memory[count], in->object[i], &in->tensor[i].tensor);
        failed = made[count] == NULL;
        given[count] = (attn_named_tensor){in->tensor[i].name, failed ? (attn_tensor){0} : memory[count].view};
        index[count++] = i;
    }
    failed |= tuple == NULL;
    if (!failed) {
        attn_exec exec = {.threads = threads};
        PyThreadState *state = PyEval_SaveThread();
        attn_status status = attn_op_backward(self->op, in->tensor, in->count, out->tensor, out->count, grads->tensor,
                                              grads->count, given, count, &exec);
        PyEval_RestoreThread(state);
        failed = status != ATTN_OK;
        if (failed) {
            py_raise(status);
        }
    }
    for (int i = 0; i < count; i++) {
        py_array_release(&memory[i]);
        if (made[i] != NULL && !failed) {
            made[i] = py_array_finish(made[i], in->object[index[i]]);
            failed = made[i] == NULL;
        }
    }
    for (int i = 0; i < count; i++) {
        if (made[i] != NULL && !failed) {
            PyTuple_SetItem(tuple, in->port[index[i]], made[i]);
        } else {
            Py_XDECREF(made[i]);
        }
    }
    if (failed) {
        Py_XDECREF(tuple);
        return NULL;
    }
    for (int i = 0; i < self->in_count; i++) {
        if (PyTuple_GetItem(tuple, i) == NULL) {
            PyTuple_SetItem(tuple, i, Py_NewRef(Py_None));
        }
    }
    return tuple;
}

/* backward(threads, wrt, inputs, outputs, grads): tuples by input and output number. wrt says which inputs' gradients
 * are wanted; outputs holds those saved from forward (or None), grads the gradients of outputs (or None). */
static PyObject *backward(PyObject *object, PyObject *arguments)
{
    py_op *self = (py_op *)object;
    int threads;
    PyObject *wrt, *inputs, *outputs, *gradients, *item[MAX_PORTS];
    if (!PyArg_ParseTuple(arguments, "iO!O!O!O!", &threads, &PyTuple_Type, &wrt, &PyTuple_Type, &inputs, &PyTuple_Type,
                          &outputs, &PyTuple_Type, &gradients)) {
        return NULL;
    }
    if (PyTuple_Size(wrt) != self->in_count) {
        PyErr_Format(PyExc_TypeError, "%s: wrt has %zd items, expected %d", self->info->name, PyTuple_Size(wrt),
                     self->in_count);
        return NULL;
    }
    arrays in, out, grads;
    in.count = out.count = grads.count = 0;
    PyObject *result = NULL;
    Py_ssize_t count = items(inputs, item);
    int ok = count >= 0 && get_arrays(&in, self, self->in, self->in_count, item, count, 0) == 0;
    if (ok) {
        count = items(outputs, item);
        ok = count >= 0 && get_arrays(&out, self, self->out, self->out_count, item, count, 0) == 0;
    }
    if (ok) {
        count = items(gradients, item);
        ok = count >= 0 && get_arrays(&grads, self, self->out, self->out_count, item, count, 1) == 0;
    }
    if (ok) {
        result = run_backward(self, &in, &out, &grads, wrt, threads);
    }
    release(&in);
    release(&out);
    release(&grads);
    return result;
}

static PyObject *shape_tuple(const attn_tensor *tensor)
{
    PyObject *shape = PyTuple_New(tensor->ndim);
    for (int i = 0; shape != NULL && i < tensor->ndim; i++) {
        PyTuple_SetItem(shape, i, PyLong_FromLongLong(tensor->shape[i]));
    }
    return shape;
}

/* A view without data from (shape, type name). */
static int described(PyObject *item, attn_tensor *tensor)
{
    PyObject *shape;
    const char *type;
    int64_t extents[ATTN_MAX_DIMS];
    if (!PyArg_ParseTuple(item, "O!s", &PyTuple_Type, &shape, &type)) {
        return -1;
    }
    Py_ssize_t ndim = PyTuple_Size(shape);
    if (ndim > ATTN_MAX_DIMS) {
        PyErr_Format(PyExc_ValueError, "an array has %zd dimensions (at most %d)", ndim, ATTN_MAX_DIMS);
        return -1;
    }
    for (Py_ssize_t i = 0; i < ndim; i++) {
        extents[i] = PyLong_AsLongLong(PyTuple_GetItem(shape, i));
        if (extents[i] == -1 && PyErr_Occurred()) {
            return -1;
        }
    }
    attn_dtype dtype;
    attn_status status = attn_dtype_parse(type, &dtype);
    if (status != ATTN_OK) {
        py_raise(status);
        return -1;
    }
    *tensor = attn_tensor_make(NULL, dtype, (int)ndim, extents);
    return 0;
}

/* outputs(*inputs), each (shape, type name) or None: what forward gives for such inputs, without data: a list with
 * (shape, type name) for each output, or None. */
static PyObject *outputs(PyObject *object, PyObject *arguments)
{
    py_op *self = (py_op *)object;
    attn_named_tensor in[MAX_PORTS], out[MAX_PORTS];
    int count = 0, out_count = MAX_PORTS;
    attn_dtype dtype = ATTN_F32;
    int have_dtype = 0;
    Py_ssize_t given = PyTuple_Size(arguments);
    if (given > self->in_count) {
        PyErr_Format(PyExc_TypeError, "%s takes %d arrays, not %zd", self->info->name, self->in_count, given);
        return NULL;
    }
    for (int i = 0; i < (int)given; i++) {
        PyObject *item = PyTuple_GetItem(arguments, i);
        if (item == Py_None) {
            continue;
        }
        in[count].name = self->in[i].name;
        if (described(item, &in[count].tensor) != 0) {
            return NULL;
        }
        if (!have_dtype && self->in[i].type == ATTN_PORT_FLOAT) {
            dtype = in[count].tensor.dtype;
            have_dtype = 1;
        }
        count++;
    }
    attn_status status = attn_op_outputs(self->op, in, count, out, &out_count);
    if (status != ATTN_OK) {
        return py_raise(status);
    }
    PyObject *list = PyList_New(self->out_count);
    for (int i = 0; list != NULL && i < self->out_count; i++) {
        PyList_SetItem(list, i, Py_NewRef(Py_None));
    }
    for (int i = 0; list != NULL && i < out_count; i++) {
        int index = find_output(self, out[i].name);
        attn_dtype type = output_type(&self->out[index], dtype, out[i].tensor.dtype);
        PyObject *entry = Py_BuildValue("(Ns)", shape_tuple(&out[i].tensor), attn_dtype_name(type));
        if (entry == NULL) {
            Py_CLEAR(list);
        } else {
            PyList_SetItem(list, index, entry);
        }
    }
    return list;
}

/* cost(*inputs): (flops, bytes, pairs). */
static PyObject *cost(PyObject *object, PyObject *const *arguments, Py_ssize_t count)
{
    py_op *self = (py_op *)object;
    arrays in;
    if (get_arrays(&in, self, self->in, self->in_count, arguments, count, 0) != 0) {
        return NULL;
    }
    attn_cost result;
    PyThreadState *state = PyEval_SaveThread();
    attn_status status = attn_op_cost(self->op, in.tensor, in.count, &result);
    PyEval_RestoreThread(state);
    release(&in);
    return status == ATTN_OK ? Py_BuildValue("(ddd)", result.flops, result.bytes, result.pairs) : py_raise(status);
}

/* time_forward(count, threads, *inputs): seconds per call of attn_op_forward() alone, for the benchmark. */
static PyObject *time_forward(PyObject *object, PyObject *const *arguments, Py_ssize_t count)
{
    py_op *self = (py_op *)object;
    int repeats, threads;
    if (count < 2) {
        PyErr_SetString(PyExc_TypeError, "time_forward(count, threads, *inputs)");
        return NULL;
    }
    if (to_int(arguments[0], 1, 1000000000, "count", &repeats) != 0 || to_int(arguments[1], 0, 4096, "threads", &threads) != 0) {
        return NULL;
    }
    arrays in;
    if (get_arrays(&in, self, self->in, self->in_count, arguments + 2, count - 2, 0) != 0) {
        return NULL;
    }
    attn_named_tensor out[MAX_PORTS];
    int out_count = MAX_PORTS, made = 0;
    PyObject *memory[MAX_PORTS];
    attn_status status = attn_op_outputs(self->op, in.tensor, in.count, out, &out_count);
    int ok = status == ATTN_OK;
    for (int i = 0; ok && i < out_count; i++) {
        if ((self->out[find_output(self, out[i].name)].flags & ATTN_PORT_ON_REQUEST) == 0) {
            py_array held = {.has_buffer = 0};
            memory[made] = py_array_new(&held, NULL, &out[i].tensor);
            ok = memory[made] != NULL;
            if (ok) {
                out[made] = (attn_named_tensor){out[i].name, held.view};
                made++;
            }
            py_array_release(&held);
        }
    }
    double seconds = 0;
    if (ok) {
        attn_exec exec = {.threads = threads};
        struct timespec begin, end;
        clock_gettime(CLOCK_MONOTONIC, &begin);
        for (int i = 0; i < repeats && status == ATTN_OK; i++) {
            status = attn_op_forward(self->op, in.tensor, in.count, out, made, &exec);
        }
        clock_gettime(CLOCK_MONOTONIC, &end);
        seconds = (double)(end.tv_sec - begin.tv_sec) + 1e-9 * (double)(end.tv_nsec - begin.tv_nsec);
    }
    for (int i = 0; i < made; i++) {
        Py_DECREF(memory[i]);
    }
    release(&in);
    if (status != ATTN_OK) {
        return py_raise(status);
    }
    return ok ? PyFloat_FromDouble(seconds / repeats) : NULL;
}

/* Op(spec), or Op(name, json). */
static PyObject *op_new(PyTypeObject *type, PyObject *arguments, PyObject *options)
{
    const char *name, *json = NULL;
    if (options != NULL && PyDict_Size(options) > 0) {
        PyErr_SetString(PyExc_TypeError, "Op() takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(arguments, "s|z", &name, &json)) {
        return NULL;
    }
    attn_op *op;
    attn_status status = PyTuple_Size(arguments) > 1 ? attn_op_create_json(&op, name, json) : attn_op_create(&op, name);
    if (status != ATTN_OK) {
        return py_raise(status);
    }
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    py_op *self = (py_op *)allocate(type, 0);
    if (self == NULL) {
        attn_op_destroy(op);
        return NULL;
    }
    self->op = op;
    self->info = attn_op_get_info(op);
    self->in = self->info->ports;
    self->in_count = 0;
    while (self->in_count < self->info->port_count && self->in[self->in_count].direction == ATTN_PORT_IN) {
        self->in_count++;
    }
    self->out = self->in + self->in_count;
    self->out_count = self->info->port_count - self->in_count;
    if (self->in_count > MAX_PORTS || self->out_count > MAX_PORTS) {
        Py_DECREF(self);
        PyErr_SetString(PyExc_NotImplementedError, "a mechanism with more than 80 inputs");
        return NULL;
    }
    return (PyObject *)self;
}

static void op_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    attn_op_destroy(((py_op *)object)->op);
    freefunc release_memory = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release_memory(object);
    Py_DECREF((PyObject *)type);
}

static PyMethodDef methods[] = {
    {"forward", (PyCFunction)(void (*)(void))forward, METH_FASTCALL, "forward(request, threads, *inputs)"},
    {"backward", backward, METH_VARARGS, "backward(threads, wrt, inputs, outputs, grads)"},
    {"outputs", outputs, METH_VARARGS, "outputs(*inputs): shapes and types, without data"},
    {"cost", (PyCFunction)(void (*)(void))cost, METH_FASTCALL, "cost(*inputs): (flops, bytes, pairs)"},
    {"time_forward", (PyCFunction)(void (*)(void))time_forward, METH_FASTCALL, "time_forward(count, threads, *inputs): seconds per call"},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, op_new}, {Py_tp_dealloc, op_dealloc}, {Py_tp_methods, methods},
    {Py_tp_doc, "A mechanism with its parameters: Op(spec) or Op(name, json)."}, {0, NULL},
};

static PyType_Spec spec = {
    .name = "attn._core.Op", .basicsize = sizeof(py_op), .flags = Py_TPFLAGS_DEFAULT, .slots = slots};

int py_op_init(PyObject *module)
{
    op_type = PyType_FromModuleAndSpec(module, &spec, NULL);
    return op_type != NULL ? PyModule_AddObjectRef(module, "Op", op_type) : -1;
}

/* ---- The table ---- */

static PyObject *flag(int value) { return PyBool_FromLong(value != 0); }

static PyObject *param_entry(const attn_param_info *p)
{
    static const char *const names[] = {"bool", "int", "float", "choice", "ints", "floats", "bools"};
    return Py_BuildValue("{ssssszszszsdsdsNsNsisisz}", "name", p->name, "type", names[p->type], "default", p->standard,
                         "default_text", p->standard_text, "choices", p->choices, "min", p->min, "max", p->max,
                         "min_open", flag(p->min_open), "max_open", flag(p->max_open), "min_items", p->min_items,
                         "max_items", p->max_items, "help", p->help);
}

static PyObject *port_entry(const attn_port_info *p)
{
    static const char *const names[] = {"float", "cache", "int", "bool"};
    return Py_BuildValue("{sssssssNsNsNsz}", "name", p->name, "shape", p->shape, "type",
                         p->flags & ATTN_PORT_F32 ? "float32" : names[p->type], "optional",
                         flag(p->flags & ATTN_PORT_OPTIONAL), "differentiable", flag(p->flags & ATTN_PORT_DIFF),
                         "on_request", flag(p->flags & ATTN_PORT_ON_REQUEST), "help", p->help);
}

static PyObject *ports(const attn_op_info *info, attn_port_direction direction)
{
    PyObject *list = PyList_New(0);
    for (int i = 0; list != NULL && i < info->port_count; i++) {
        if (info->ports[i].direction == direction) {
            PyObject *entry = port_entry(&info->ports[i]);
            if (entry == NULL || PyList_Append(list, entry) != 0) {
                Py_CLEAR(list);
            }
            Py_XDECREF(entry);
        }
    }
    return list;
}

static PyObject *params(const attn_op_info *info)
{
    PyObject *list = PyList_New(0);
    for (int i = 0; list != NULL && i < info->param_count; i++) {
        PyObject *entry = param_entry(&info->params[i]);
        if (entry == NULL || PyList_Append(list, entry) != 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(entry);
    }
    return list;
}

PyObject *py_op_table(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    PyObject *list = PyList_New(0);
    for (int i = 0; list != NULL && i < attn_op_count(); i++) {
        const attn_op_info *info = attn_op_at(i);
        PyObject *entry = Py_BuildValue("{szszszszsNsNsNsN}", "name", info->name, "title", info->title, "summary",
                                        info->summary, "paper", info->paper, "differentiable",
                                        flag(info->differentiable), "params", params(info), "inputs",
                                        ports(info, ATTN_PORT_IN), "outputs", ports(info, ATTN_PORT_OUT));
        if (entry == NULL || PyList_Append(list, entry) != 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(entry);
    }
    return list;
}
