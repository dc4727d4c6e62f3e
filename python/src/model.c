/* attn._core.Model, Context and Sampler: language models from GGUF files. attn/_model.py makes them convenient. */
#include "core.h"

#include <attn/model.h>
#include <attn/policy.h>
#include <attn/sample.h>
#include <attn/tokenizer.h>

#include <math.h>
#include <string.h>

typedef struct py_model {
    PyObject_HEAD
    attn_model *model;
    attn_tokenizer *tokenizer;
} py_model;

typedef struct py_context {
    PyObject_HEAD
    PyObject *owner; /* the model */
    attn_context *context;
    attn_policy *policy;
    int64_t vocabulary;
    int busy; /* a call runs without the interpreter lock */
} py_context;

typedef struct py_sampler {
    PyObject_HEAD
    attn_sampler *sampler;
    int64_t vocabulary;
} py_sampler;

static PyObject *model_type, *context_type, *sampler_type;

/* Called by the library while the interpreter lock is released: lets Ctrl-C through. */
static int check_signals(void *user, double done)
{
    (void)user;
    (void)done;
    PyGILState_STATE state = PyGILState_Ensure();
    int pending = PyErr_CheckSignals();
    PyGILState_Release(state);
    return pending;
}

/* ---- Models ---- */

/* Model(path, threads=0) */
static PyObject *model_new(PyTypeObject *type, PyObject *arguments, PyObject *options)
{
    static char *names[] = {"path", "threads", NULL};
    const char *path;
    int threads = 0;
    if (!PyArg_ParseTupleAndKeywords(arguments, options, "s|i", names, &path, &threads)) {
        return NULL;
    }
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    py_model *self = (py_model *)allocate(type, 0);
    if (self == NULL) {
        return NULL;
    }
    attn_model_settings settings = {.threads = threads, .progress = check_signals};
    PyThreadState *state = PyEval_SaveThread();
    attn_status status = attn_model_open(&self->model, path, &settings);
    if (status == ATTN_OK) {
        status = attn_tokenizer_from_gguf(&self->tokenizer, attn_model_file(self->model));
    }
    PyEval_RestoreThread(state);
    if (status != ATTN_OK) {
        Py_DECREF(self);
        return py_raise(status);
    }
    return (PyObject *)self;
}

static void model_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    attn_tokenizer_destroy(((py_model *)object)->tokenizer);
    attn_model_close(((py_model *)object)->model);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF((PyObject *)type);
}

static PyObject *model_info(PyObject *object, PyObject *unused)
{
    (void)unused;
    const attn_model_info *info = attn_model_get_info(((py_model *)object)->model);
    return Py_BuildValue("{sssLsLsLsLsLsLsLsLsn}", "architecture", info->architecture, "layers", (long long)info->layers,
                         "width", (long long)info->width, "heads", (long long)info->heads, "kv_heads",
                         (long long)info->kv_heads, "head_width", (long long)info->head_width, "hidden",
                         (long long)info->hidden, "vocabulary", (long long)info->vocabulary, "context_length",
                         (long long)info->context_length, "weight_bytes", (Py_ssize_t)info->weight_bytes);
}

/* tokenize(text, special, parse): token numbers of a str. */
static PyObject *model_tokenize(PyObject *object, PyObject *arguments)
{
    const char *text;
    Py_ssize_t bytes;
    int special, parse;
    if (!PyArg_ParseTuple(arguments, "s#pp", &text, &bytes, &special, &parse)) {
        return NULL;
    }
    int32_t *tokens = NULL;
    int64_t count = 0;
    int flags = (special ? ATTN_TOKENIZE_SPECIAL : 0) | (parse ? ATTN_TOKENIZE_PARSE : 0);
    PyThreadState *state = PyEval_SaveThread();
    attn_status status = attn_tokenize(((py_model *)object)->tokenizer, text, (size_t)bytes, flags, &tokens, &count);
    PyEval_RestoreThread(state);
    if (status != ATTN_OK) {
        return py_raise(status);
    }
    PyObject *list = PyList_New((Py_ssize_t)count);
    for (Py_ssize_t i = 0; list != NULL && i < (Py_ssize_t)count; i++) {
        PyList_SetItem(list, i, PyLong_FromLong(tokens[i]));
    }
    attn_tokens_free(tokens);
    return list;
}

/* token(number, special): its bytes. */
static PyObject *model_token(PyObject *object, PyObject *arguments)
{
    int token, special;
    if (!PyArg_ParseTuple(arguments, "ip", &token, &special)) {
        return NULL;
    }
    size_t bytes = 0;
    const char *text = attn_token_text(((py_model *)object)->tokenizer, token, special, &bytes);
    return PyBytes_FromStringAndSize(text, (Py_ssize_t)bytes);
}

static PyObject *model_is_end(PyObject *object, PyObject *token)
{
    long value = PyLong_AsLong(token);
    if (value == -1 && PyErr_Occurred()) {
        return NULL;
    }
    return PyBool_FromLong(attn_tokenizer_is_end(((py_model *)object)->tokenizer, (int32_t)value));
}

/* chat([(role, text)], reply): the text that the model's template makes of a conversation. */
static PyObject *model_chat(PyObject *object, PyObject *arguments)
{
    enum { MOST = 1024 };
    PyObject *list;
    int reply;
    if (!PyArg_ParseTuple(arguments, "O!p", &PyList_Type, &list, &reply)) {
        return NULL;
    }
    Py_ssize_t count = PyList_Size(list);
    if (count > MOST) {
        PyErr_Format(PyExc_ValueError, "%zd messages (at most %d)", count, MOST);
        return NULL;
    }
    attn_chat_message messages[MOST];
    for (Py_ssize_t i = 0; i < count; i++) {
        if (!PyArg_ParseTuple(PyList_GetItem(list, i), "ss", &messages[i].role, &messages[i].text)) {
            return NULL;
        }
    }
    char *text = NULL;
    attn_status status = attn_chat_render(((py_model *)object)->tokenizer, messages, (int)count, reply, &text);
    if (status != ATTN_OK) {
        return py_raise(status);
    }
    PyObject *made = PyUnicode_FromString(text);
    attn_text_free(text);
    return made;
}

/* context(length, cache, threads, prompt, generation, policy): prompt and generation are SPECs or None, policy the path of
 * a JSON file or None. */
static PyObject *model_context(PyObject *object, PyObject *arguments)
{
    py_model *self = (py_model *)object;
    long long length;
    int threads;
    const char *cache, *prompt, *generation, *policy;
    if (!PyArg_ParseTuple(arguments, "Lsizzz", &length, &cache, &threads, &prompt, &generation, &policy)) {
        return NULL;
    }
    attn_context_settings settings = {.length = length, .threads = threads, .progress = check_signals};
    attn_status status = attn_dtype_parse(cache, &settings.cache);
    if (status != ATTN_OK) {
        return py_raise(status);
    }
    allocfunc allocate = (allocfunc)PyType_GetSlot((PyTypeObject *)context_type, Py_tp_alloc);
    py_context *context = (py_context *)allocate((PyTypeObject *)context_type, 0);
    if (context == NULL) {
        return NULL;
    }
    context->owner = Py_NewRef(object);
    context->vocabulary = attn_model_get_info(self->model)->vocabulary;
    status = attn_context_create(&context->context, self->model, &settings);
    if (status == ATTN_OK && policy != NULL) {
        status = attn_policy_load(&context->policy, self->model, policy);
    } else if (status == ATTN_OK && (prompt != NULL || generation != NULL)) {
        status = attn_policy_create(&context->policy, self->model, prompt, generation);
    }
    if (status == ATTN_OK && context->policy != NULL) {
        status = attn_policy_use(context->policy, context->context);
    }
    if (status != ATTN_OK) {
        py_raise(status);
        Py_DECREF(context);
        return NULL;
    }
    return (PyObject *)context;
}

static PyMethodDef model_methods[] = {
    {"info", model_info, METH_NOARGS, "What the model is: a dict."},
    {"tokenize", model_tokenize, METH_VARARGS, "tokenize(text, special, parse): token numbers"},
    {"token", model_token, METH_VARARGS, "token(number, special): its bytes"},
    {"is_end", model_is_end, METH_O, "is_end(token): whether generation ends with it"},
    {"chat", model_chat, METH_VARARGS, "chat([(role, text)], reply): the template's text"},
    {"context", model_context, METH_VARARGS, "context(length, cache, threads, prompt, generation, policy)"},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot model_slots[] = {
    {Py_tp_new, model_new}, {Py_tp_dealloc, model_dealloc}, {Py_tp_methods, model_methods},
    {Py_tp_doc, "A language model of a GGUF file: Model(path, threads=0)."}, {0, NULL},
};
static PyType_Spec model_spec = {
    .name = "attn._core.Model", .basicsize = sizeof(py_model), .flags = Py_TPFLAGS_DEFAULT, .slots = model_slots};

/* ---- Contexts ---- */

static void context_dealloc(PyObject *object)
{
    py_context *self = (py_context *)object;
    PyTypeObject *type = Py_TYPE(object);
    attn_context_destroy(self->context);
    attn_policy_destroy(self->policy);
    Py_XDECREF(self->owner);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF((PyObject *)type);
}

/* A context serves one call at a time. */
static int begin(py_context *self)
{
    if (self->busy) {
        PyErr_SetString(PyExc_RuntimeError, "this model is in use by another thread (make one per thread)");
        return -1;
    }
    self->busy = 1;
    return 0;
}

/* Token numbers of a sequence; PyMem_Free() them. */
static int32_t *to_tokens(PyObject *sequence, int64_t vocabulary, Py_ssize_t *count)
{
    *count = PySequence_Size(sequence);
    if (*count < 0) {
        return NULL;
    }
    int32_t *tokens = PyMem_Calloc((size_t)*count + 1, sizeof *tokens);
    if (tokens == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    for (Py_ssize_t i = 0; i < *count; i++) {
        PyObject *item = PySequence_GetItem(sequence, i);
        long token = item != NULL ? PyLong_AsLong(item) : -1;
        Py_XDECREF(item);
        if (PyErr_Occurred() || token < 0 || token >= vocabulary) {
            if (!PyErr_Occurred()) {
                PyErr_Format(PyExc_ValueError, "token %ld, expected 0 to %lld", token, (long long)vocabulary - 1);
            }
            PyMem_Free(tokens);
            return NULL;
        }
        tokens[i] = (int32_t)token;
    }
    return tokens;
}

/* The log-probability of each token that is known to follow. */
typedef struct scores {
    const int32_t *tokens;
    Py_ssize_t count;
    int64_t vocabulary;
    double *log_probability; /* [count - 1] */
} scores;

static int score(void *user, int item, int64_t token, const float *logits)
{
    scores *s = user;
    (void)item;
    if (token + 1 < s->count) {
        float most = logits[0];
        for (int64_t i = 1; i < s->vocabulary; i++) {
            most = logits[i] > most ? logits[i] : most;
        }
        double sum = 0;
        for (int64_t i = 0; i < s->vocabulary; i++) {
            sum += (double)expf(logits[i] - most);
        }
        s->log_probability[token] = (double)(logits[s->tokens[token + 1]] - most) - log(sum);
    }
    return 0;
}

static attn_status evaluate(py_context *self, const int32_t *tokens, Py_ssize_t count, scores *s)
{
    attn_context_batch batch = {.sequence = 0, .tokens = tokens, .count = count};
    PyThreadState *state = PyEval_SaveThread();
    attn_status status = attn_context_eval(self->context, &batch, 1, s != NULL ? score : NULL, s);
    PyEval_RestoreThread(state);
    self->busy = 0;
    return status;
}

/* eval(tokens): add tokens to the sequence. */
static PyObject *context_eval(PyObject *object, PyObject *sequence)
{
    py_context *self = (py_context *)object;
    Py_ssize_t count;
    int32_t *tokens = to_tokens(sequence, self->vocabulary, &count);
    if (tokens == NULL || begin(self) != 0) {
        PyMem_Free(tokens);
        return NULL;
    }
    attn_status status = evaluate(self, tokens, count, NULL);
    PyMem_Free(tokens);
    return status == ATTN_OK ? Py_NewRef(Py_None) : py_raise(status);
}

/* logprobs(tokens): add tokens; the log-probability of each but the first, given those before it. */
static PyObject *context_logprobs(PyObject *object, PyObject *sequence)
{
    py_context *self = (py_context *)object;
    Py_ssize_t count;
    int32_t *tokens = to_tokens(sequence, self->vocabulary, &count);
    double *values = tokens != NULL ? PyMem_Calloc((size_t)count + 1, sizeof *values) : NULL;
    if (values == NULL || begin(self) != 0) {
        if (!PyErr_Occurred()) {
            PyErr_NoMemory();
        }
        PyMem_Free(tokens);
        PyMem_Free(values);
        return NULL;
    }
    scores s = {tokens, count, self->vocabulary, values};
    attn_status status = evaluate(self, tokens, count, &s);
    PyObject *list = status == ATTN_OK ? PyList_New(count > 0 ? count - 1 : 0) : py_raise(status);
    for (Py_ssize_t i = 0; list != NULL && i + 1 < count; i++) {
        PyList_SetItem(list, i, PyFloat_FromDouble(values[i]));
    }
    PyMem_Free(tokens);
    PyMem_Free(values);
    return list;
}

/* logits(): a memoryview (or NumPy array) of the logits after the last token. */
static PyObject *context_logits(PyObject *object, PyObject *unused)
{
    (void)unused;
    py_context *self = (py_context *)object;
    const float *logits = self->busy ? NULL : attn_context_logits(self->context, 0);
    if (logits == NULL) {
        PyErr_SetString(PyExc_ValueError, "there are no logits before tokens have been evaluated");
        return NULL;
    }
    attn_tensor view = attn_tensor_make(NULL, ATTN_F32, 1, &self->vocabulary);
    py_array held;
    PyObject *made = py_array_new(&held, NULL, &view);
    if (made == NULL) {
        return NULL;
    }
    memcpy(held.view.data, logits, (size_t)self->vocabulary * sizeof *logits);
    py_array_release(&held);
    return py_array_finish(made, NULL);
}

static PyObject *context_length(PyObject *object, PyObject *unused)
{
    (void)unused;
    return PyLong_FromLongLong(attn_context_length(((py_context *)object)->context, 0));
}

static PyObject *context_room(PyObject *object, PyObject *unused)
{
    (void)unused;
    return PyLong_FromLongLong(attn_context_room(((py_context *)object)->context, 0));
}

static PyObject *context_truncate(PyObject *object, PyObject *length)
{
    py_context *self = (py_context *)object;
    long long value = PyLong_AsLongLong(length);
    if ((value == -1 && PyErr_Occurred()) || begin(self) != 0) {
        return NULL;
    }
    attn_status status = attn_context_truncate(self->context, 0, value);
    self->busy = 0;
    return status == ATTN_OK ? Py_NewRef(Py_None) : py_raise(status);
}

static PyObject *context_stats(PyObject *object, PyObject *unused)
{
    (void)unused;
    attn_context_stats s = attn_context_get_stats(((py_context *)object)->context);
    return Py_BuildValue("{sLsdsdsdsdsnsn}", "tokens", (long long)s.tokens, "seconds", s.seconds, "attention_seconds",
                         s.attention_seconds, "linear_seconds", s.linear_seconds, "attention_flops", s.attention_flops,
                         "cache_bytes", (Py_ssize_t)s.cache_bytes, "cache_peak_bytes", (Py_ssize_t)s.cache_peak_bytes);
}

static PyMethodDef context_methods[] = {
    {"eval", context_eval, METH_O, "eval(tokens): add tokens to the sequence"},
    {"logprobs", context_logprobs, METH_O, "logprobs(tokens): add tokens; log-probabilities of all but the first"},
    {"logits", context_logits, METH_NOARGS, "The logits after the last token."},
    {"length", context_length, METH_NOARGS, "Tokens seen."},
    {"room", context_room, METH_NOARGS, "Tokens that still fit."},
    {"truncate", context_truncate, METH_O, "truncate(length): forget all later tokens"},
    {"stats", context_stats, METH_NOARGS, "Time and memory used: a dict."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot context_slots[] = {
    {Py_tp_dealloc, context_dealloc}, {Py_tp_methods, context_methods},
    {Py_tp_doc, "A model's cache of keys and values, and evaluation."}, {0, NULL},
};
static PyType_Spec context_spec = {.name = "attn._core.Context",
                                   .basicsize = sizeof(py_context),
                                   .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                                   .slots = context_slots};

/* ---- Samplers ---- */

/* Sampler(vocabulary, temperature, top_k, top_p, min_p, repeat_penalty, repeat_window, seed) */
static PyObject *sampler_new(PyTypeObject *type, PyObject *arguments, PyObject *options)
{
    (void)options;
    attn_sampler_settings settings;
    attn_sampler_defaults(&settings);
    long long vocabulary, top_k, window;
    unsigned long long seed;
    if (!PyArg_ParseTuple(arguments, "LdLdddLK", &vocabulary, &settings.temperature, &top_k, &settings.top_p,
                          &settings.min_p, &settings.repeat_penalty, &window, &seed)) {
        return NULL;
    }
    settings.top_k = top_k;
    settings.repeat_window = window;
    settings.seed = seed;
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    py_sampler *self = (py_sampler *)allocate(type, 0);
    if (self == NULL) {
        return NULL;
    }
    self->vocabulary = vocabulary;
    attn_status status = attn_sampler_create(&self->sampler, &settings, vocabulary);
    if (status != ATTN_OK) {
        self->sampler = NULL;
        Py_DECREF(self);
        return py_raise(status);
    }
    return (PyObject *)self;
}

static void sampler_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    attn_sampler_destroy(((py_sampler *)object)->sampler);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF((PyObject *)type);
}

/* next(context): the token that follows, from the context's logits. */
static PyObject *sampler_next(PyObject *object, PyObject *context)
{
    py_sampler *self = (py_sampler *)object;
    py_context *from = (py_context *)context;
    if ((PyObject *)Py_TYPE(context) != context_type || from->vocabulary != self->vocabulary) {
        PyErr_SetString(PyExc_TypeError, "next(context): expected a context of the same vocabulary");
        return NULL;
    }
    const float *logits = from->busy ? NULL : attn_context_logits(from->context, 0);
    if (logits == NULL) {
        PyErr_SetString(PyExc_ValueError, "there are no logits before tokens have been evaluated");
        return NULL;
    }
    return PyLong_FromLong(attn_sampler_next(self->sampler, logits));
}

static PyObject *sampler_accept(PyObject *object, PyObject *token)
{
    long value = PyLong_AsLong(token);
    if (value == -1 && PyErr_Occurred()) {
        return NULL;
    }
    attn_sampler_accept(((py_sampler *)object)->sampler, (int32_t)value);
    return Py_NewRef(Py_None);
}

static PyMethodDef sampler_methods[] = {
    {"next", sampler_next, METH_O, "next(context): the token that follows"},
    {"accept", sampler_accept, METH_O, "accept(token): it counts for the repeat penalty"},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot sampler_slots[] = {
    {Py_tp_new, sampler_new}, {Py_tp_dealloc, sampler_dealloc}, {Py_tp_methods, sampler_methods},
    {Py_tp_doc, "Choice of the next token."}, {0, NULL},
};
static PyType_Spec sampler_spec = {
    .name = "attn._core.Sampler", .basicsize = sizeof(py_sampler), .flags = Py_TPFLAGS_DEFAULT, .slots = sampler_slots};

static int add(PyObject *module, const char *name, PyType_Spec *spec, PyObject **type)
{
    *type = PyType_FromModuleAndSpec(module, spec, NULL);
    return *type != NULL ? PyModule_AddObjectRef(module, name, *type) : -1;
}

int py_model_init(PyObject *module)
{
    return add(module, "Model", &model_spec, &model_type) == 0 && add(module, "Context", &context_spec, &context_type) == 0 &&
                   add(module, "Sampler", &sampler_spec, &sampler_type) == 0
               ? 0
               : -1;
}
