/* Running a mechanism: named tensors to ports, shapes to symbols, layouts and types converted, gradients prepared. */
#include "op/class.h"
#include "plan/plan.h"

#include <omp.h>
#include <stdio.h>
#include <string.h>

/* ---- Symbols ---- */

static attn_symbol *find_symbol(attn_call *call, const char *name, int length)
{
    for (int i = 0; i < call->symbol_count; i++) {
        if (call->symbols[i].length == length && memcmp(call->symbols[i].name, name, (size_t)length) == 0) {
            return &call->symbols[i];
        }
    }
    return NULL;
}

static void put_symbol(attn_call *call, const char *name, int length, int64_t value)
{
    attn_symbol *symbol = find_symbol(call, name, length);
    if (symbol == NULL && call->symbol_count < ATTN_MAX_SYMBOLS) {
        symbol = &call->symbols[call->symbol_count++];
        symbol->name = name;
        symbol->length = length;
    }
    if (symbol != NULL) {
        symbol->value = value;
    }
}

int64_t attn_dim(const attn_call *call, const char *name)
{
    attn_symbol *symbol = find_symbol((attn_call *)(uintptr_t)call, name, (int)strlen(name));
    return symbol != NULL ? symbol->value : -1;
}

void attn_set_dim(attn_call *call, const char *name, int64_t value)
{
    put_symbol(call, name, (int)strlen(name), value);
}

void attn_drop_output(attn_call *call, int port) { call->dropped[port] = 1; }

/* ---- Shapes ---- */

/* One axis of a port's shape text. */
typedef struct axis {
    int any;          /* "*" */
    int or_one;       /* "1|B" */
    int64_t factor;   /* of the symbol, or the number itself */
    const char *name; /* NULL for a number */
    int length;
} axis;

/* Axes of "B,H,4*E"; the text is ours and well formed. Returns their number; *ellipsis when it starts with "...". */
static int parse_shape(const char *text, axis axes[ATTN_MAX_DIMS], int *ellipsis)
{
    int count = 0;
    *ellipsis = 0;
    while (*text != '\0') {
        size_t length = strcspn(text, ",");
        if (length == 3 && memcmp(text, "...", 3) == 0) {
            *ellipsis = 1;
        } else {
            axis *a = &axes[count++];
            *a = (axis){.factor = 1};
            const char *p = text, *end = text + length;
            if (*p == '*') {
                a->any = 1;
                p = end;
            } else if (length > 2 && p[0] == '1' && p[1] == '|') {
                a->or_one = 1;
                p += 2;
            }
            if (p < end && *p >= '0' && *p <= '9') {
                a->factor = 0;
                while (p < end && *p >= '0' && *p <= '9') {
                    a->factor = a->factor * 10 + (*p++ - '0');
                }
                p += p < end && *p == '*';
            }
            if (p < end) {
                a->name = p;
                a->length = (int)(end - p);
            }
        }
        text += length + (text[length] == ',');
    }
    return count;
}

/* "[2, 3, 5]" */
static const char *shape_text(const attn_tensor *tensor, char *text, size_t bytes)
{
    size_t used = (size_t)snprintf(text, bytes, "[");
    for (int i = 0; i < tensor->ndim && used + 24 < bytes; i++) {
        used += (size_t)snprintf(text + used, bytes - used, "%s%lld", i > 0 ? ", " : "", (long long)tensor->shape[i]);
    }
    snprintf(text + used, bytes - used, "]");
    return text;
}

static attn_status wrong_shape(const attn_call *call, const attn_port_info *port, const attn_tensor *tensor,
                               const axis *conflict, int64_t value)
{
    char got[256];
    shape_text(tensor, got, sizeof got);
    if (conflict != NULL && conflict->name != NULL && value >= 0) {
        return attn_fail(ATTN_ERR_SHAPE, "%s: %s has shape %s, expected [%s] with %.*s = %lld", call->cls->info.name,
                         port->name, got, port->shape, conflict->length, conflict->name, (long long)value);
    }
    return attn_fail(ATTN_ERR_SHAPE, "%s: %s has shape %s, expected [%s]", call->cls->info.name, port->name, got,
                     port->shape);
}

/* Check one input against its shape text and bind the symbols that it introduces. */
static attn_status bind_shape(attn_call *call, const attn_port_info *port, const attn_tensor *tensor)
{
    axis axes[ATTN_MAX_DIMS];
    int ellipsis;
    int count = parse_shape(port->shape, axes, &ellipsis);
    if (ellipsis ? tensor->ndim < count : tensor->ndim != count) {
        return wrong_shape(call, port, tensor, NULL, -1);
    }
    for (int i = 0; i < count; i++) {
        const axis *a = &axes[i];
        int64_t extent = tensor->shape[tensor->ndim - count + i];
        if (a->any || (a->or_one && extent == 1)) {
            continue;
        }
        if (a->name == NULL) {
            if (extent != a->factor) {
                return wrong_shape(call, port, tensor, NULL, -1);
            }
            continue;
        }
        attn_symbol *symbol = find_symbol(call, a->name, a->length);
        if (symbol == NULL) {
            if (extent % a->factor != 0) {
                return wrong_shape(call, port, tensor, NULL, -1);
            }
            put_symbol(call, a->name, a->length, extent / a->factor);
        } else if (extent != symbol->value * a->factor) {
            return wrong_shape(call, port, tensor, a, symbol->value);
        }
    }
    return ATTN_OK;
}

/* The shape of an output from the bound symbols. "..." and "*" follow the first input that has "..." or equal rank: such
 * outputs have the leading axes of the first input. */
static attn_status output_shape(attn_call *call, const attn_port_info *port, attn_tensor *tensor)
{
    axis axes[ATTN_MAX_DIMS];
    int64_t shape[ATTN_MAX_DIMS];
    int ellipsis, lead = 0;
    int count = parse_shape(port->shape, axes, &ellipsis);
    if (ellipsis) {
        const attn_tensor *first = call->t[0];
        lead = first->ndim - count;
        memcpy(shape, first->shape, sizeof shape);
    }
    double total = 1;
    for (int i = 0; i < count; i++) {
        const axis *a = &axes[i];
        attn_symbol *symbol = a->name != NULL ? find_symbol(call, a->name, a->length) : NULL;
        if (a->any || (a->name != NULL && symbol == NULL)) {
            return attn_fail(ATTN_ERR_SHAPE, "%s: the extent %.*s of output %s is not known from these inputs",
                             call->cls->info.name, a->length, a->name != NULL ? a->name : "*", port->name);
        }
        shape[lead + i] = symbol != NULL ? symbol->value * a->factor : a->factor;
        total *= (double)shape[lead + i];
    }
    if (total > 1e15) {
        return attn_fail(ATTN_ERR_SHAPE, "%s: output %s would have %.3g elements", call->cls->info.name, port->name, total);
    }
    attn_dtype dtype = port->type == ATTN_PORT_INT ? ATTN_I64 : port->type == ATTN_PORT_BOOL ? ATTN_BOOL : ATTN_F32;
    *tensor = attn_tensor_make(NULL, dtype, lead + count, shape);
    return ATTN_OK;
}

/* ---- Ports ---- */

static int find_port(const attn_op_info *info, attn_port_direction direction, const char *name)
{
    for (int i = 0; i < info->port_count; i++) {
        if (info->ports[i].direction == direction && strcmp(info->ports[i].name, name) == 0) {
            return i;
        }
    }
    return -1;
}

static attn_status no_such_port(const attn_op_info *info, attn_port_direction direction, const char *name, int gradients)
{
    char names[700] = "";
    size_t used = 0;
    for (int i = 0; i < info->port_count && used + 64 < sizeof names; i++) {
        if (info->ports[i].direction == direction && (!gradients || (info->ports[i].flags & ATTN_PORT_DIFF) != 0)) {
            used += (size_t)snprintf(names + used, sizeof names - used, "%s%s", used > 0 ? ", " : "", info->ports[i].name);
        }
    }
    return attn_fail(ATTN_ERR_ARGUMENT, "%s has no %s%s '%.60s' (it has %s)", info->name, gradients ? "differentiable " : "",
                     direction == ATTN_PORT_IN ? "input" : "output", name, used > 0 ? names : "none");
}

static int type_fits(attn_port_type type, attn_dtype dtype)
{
    switch (type) {
    case ATTN_PORT_FLOAT: return dtype == ATTN_F32 || dtype == ATTN_F16 || dtype == ATTN_BF16;
    case ATTN_PORT_CACHE: return dtype == ATTN_F32 || dtype == ATTN_F16 || dtype == ATTN_BF16 || dtype == ATTN_I8;
    case ATTN_PORT_INT: return dtype == ATTN_I32 || dtype == ATTN_I64;
    case ATTN_PORT_BOOL: return dtype == ATTN_BOOL;
    }
    return 0;
}

static const char *const type_names[] = {"f32, f16 or bf16", "f32, f16, bf16 or i8", "i32 or i64", "bool"};

static attn_status check_tensor(const attn_op_info *info, const char *name, attn_port_type type,
                                const attn_tensor *tensor, int needs_data)
{
    if (tensor->ndim < 0 || tensor->ndim > ATTN_MAX_DIMS) {
        return attn_fail(ATTN_ERR_SHAPE, "%s: %s has %d dimensions (at most %d)", info->name, name, tensor->ndim,
                         ATTN_MAX_DIMS);
    }
    double total = 1;
    for (int i = 0; i < tensor->ndim; i++) {
        if (tensor->shape[i] < 0) {
            return attn_fail(ATTN_ERR_SHAPE, "%s: %s has a negative extent %lld", info->name, name,
                             (long long)tensor->shape[i]);
        }
        total *= (double)tensor->shape[i];
    }
    if (total > 1e15) {
        return attn_fail(ATTN_ERR_SHAPE, "%s: %s has %.3g elements", info->name, name, total);
    }
    if (!type_fits(type, tensor->dtype)) {
        return attn_fail(ATTN_ERR_DTYPE, "%s: %s has data type %s, expected %s", info->name, name,
                         attn_dtype_name(tensor->dtype), type_names[type]);
    }
    if (needs_data && total > 0 && tensor->data == NULL) {
        return attn_fail(ATTN_ERR_ARGUMENT, "%s: %s has no data", info->name, name);
    }
    return ATTN_OK;
}

static void call_init(attn_call *call, const attn_op *op)
{
    call->cls = attn_op_class_of(op);
    call->params = attn_op_params(op);
    call->arena = NULL;
    call->threads = 1;
    call->symbol_count = 0;
    for (int i = 0; i < call->cls->info.port_count; i++) {
        call->t[i] = NULL;
        call->grad[i] = NULL;
        call->dropped[i] = 0;
        call->spare[i] = 0;
    }
}

/* Inputs to ports, shapes to symbols, then the mechanism's own checks. */
static attn_status bind_inputs(attn_call *call, const attn_named_tensor *in, int in_count, int needs_data)
{
    const attn_op_info *info = &call->cls->info;
    for (int i = 0; i < in_count; i++) {
        int port = find_port(info, ATTN_PORT_IN, in[i].name);
        if (port < 0) {
            return no_such_port(info, ATTN_PORT_IN, in[i].name, 0);
        }
        if (call->t[port] != NULL) {
            return attn_fail(ATTN_ERR_ARGUMENT, "%s: input %s is given twice", info->name, in[i].name);
        }
        ATTN_TRY(check_tensor(info, in[i].name, info->ports[port].type, &in[i].tensor, needs_data));
        call->storage[port] = in[i].tensor;
        call->t[port] = &call->storage[port];
    }
    for (int i = 0; i < info->port_count && info->ports[i].direction == ATTN_PORT_IN; i++) {
        if (call->t[i] != NULL) {
            ATTN_TRY(bind_shape(call, &info->ports[i], call->t[i]));
        } else if ((info->ports[i].flags & ATTN_PORT_OPTIONAL) == 0) {
            return attn_fail(ATTN_ERR_ARGUMENT, "%s: input %s [%s] is missing", info->name, info->ports[i].name,
                             info->ports[i].shape);
        }
    }
    int64_t heads = attn_dim(call, "H"), kv_heads = attn_dim(call, "Hkv");
    if (heads >= 0 && kv_heads >= 0 && (kv_heads == 0 ? heads != 0 : heads % kv_heads != 0)) {
        return attn_fail(ATTN_ERR_SHAPE, "%s: %lld query heads are not a multiple of %lld key/value heads", info->name,
                         (long long)heads, (long long)kv_heads);
    }
    if (call->cls->bind != NULL) {
        attn_status status = call->cls->bind(call);
        if (status != ATTN_OK) {
            return attn_fail(status, "%s: %s", info->name, attn_last_error());
        }
    }
    return ATTN_OK;
}

static attn_status no_memory(const attn_op_info *info, const char *name)
{
    return attn_fail(ATTN_ERR_MEMORY, "%s: out of memory (%s)", info->name, name);
}

static attn_dtype compute_type(attn_port_type type)
{
    return type == ATTN_PORT_INT ? ATTN_I64 : type == ATTN_PORT_BOOL ? ATTN_BOOL : ATTN_F32;
}

static attn_status scratch_tensor(attn_call *call, const char *name, attn_tensor *tensor, attn_dtype dtype, int ndim,
                                  const int64_t *shape)
{
    attn_tensor made = attn_tensor_make(NULL, dtype, ndim, shape);
    made.data = attn_arena_array(call->arena, (size_t)attn_tensor_count(&made), attn_dtype_size(dtype));
    if (made.data == NULL) {
        return no_memory(&call->cls->info, name);
    }
    *tensor = made;
    return ATTN_OK;
}

/* A contiguous tensor of the type that mechanisms compute in: the tensor itself when it is that, else a copy. */
static attn_status convert(attn_call *call, const attn_port_info *port, attn_tensor *tensor)
{
    attn_dtype dtype = compute_type(port->type);
    if ((port->flags & ATTN_PORT_ANY_LAYOUT) != 0 || (tensor->dtype == dtype && attn_tensor_is_contiguous(tensor))) {
        return ATTN_OK;
    }
    attn_tensor copy;
    ATTN_TRY(scratch_tensor(call, port->name, &copy, dtype, tensor->ndim, tensor->shape));
    ATTN_TRY(attn_tensor_copy(&copy, tensor));
    *tensor = copy;
    return ATTN_OK;
}

static attn_status convert_inputs(attn_call *call)
{
    const attn_op_info *info = &call->cls->info;
    for (int i = 0; i < info->port_count; i++) {
        if (info->ports[i].direction == ATTN_PORT_IN && call->t[i] != NULL) {
            ATTN_TRY(convert(call, &info->ports[i], call->t[i]));
        }
    }
    return ATTN_OK;
}

static int same_shape(const attn_tensor *a, const attn_tensor *b)
{
    return a->ndim == b->ndim && memcmp(a->shape, b->shape, sizeof a->shape[0] * (size_t)a->ndim) == 0;
}

/* A tensor that the caller gives for an output (or a gradient): name, type and shape checked. */
static attn_status check_given(const attn_call *call, const char *what, const attn_named_tensor *given,
                               attn_port_type type, const attn_tensor *want)
{
    const attn_op_info *info = &call->cls->info;
    ATTN_TRY(check_tensor(info, given->name, type, &given->tensor, 1));
    if (type == ATTN_PORT_INT && given->tensor.dtype != ATTN_I64) {
        return attn_fail(ATTN_ERR_DTYPE, "%s: %s%s has data type %s, expected i64", info->name, what, given->name,
                         attn_dtype_name(given->tensor.dtype));
    }
    if (!same_shape(&given->tensor, want)) {
        char got[256], wanted[256];
        return attn_fail(ATTN_ERR_SHAPE, "%s: %s%s has shape %s, expected %s", info->name, what, given->name,
                         shape_text(&given->tensor, got, sizeof got), shape_text(want, wanted, sizeof wanted));
    }
    return ATTN_OK;
}

/* Whether the mechanism can write there directly. */
static int direct(const attn_port_info *port, const attn_tensor *tensor)
{
    return (port->flags & ATTN_PORT_ANY_LAYOUT) != 0 ||
           (tensor->dtype == compute_type(port->type) && attn_tensor_is_contiguous(tensor));
}

/* Outputs: the caller's where they fit, scratch elsewhere. given[port]: index into `out`, -1 for none. optional: flags of outputs that are
 * left out when they are not given. */
static attn_status prepare_outputs(attn_call *call, const attn_named_tensor *out, int out_count, unsigned optional, int given[])
{
    const attn_op_info *info = &call->cls->info;
    for (int i = 0; i < info->port_count; i++) {
        given[i] = -1;
    }
    for (int i = 0; i < out_count; i++) {
        int port = find_port(info, ATTN_PORT_OUT, out[i].name);
        if (port < 0) {
            return no_such_port(info, ATTN_PORT_OUT, out[i].name, 0);
        }
        if (call->dropped[port]) {
            return attn_fail(ATTN_ERR_ARGUMENT, "%s: these inputs and parameters give no output %s", info->name,
                             out[i].name);
        }
        given[port] = i;
    }
    for (int i = 0; i < info->port_count; i++) {
        const attn_port_info *port = &info->ports[i];
        if (port->direction != ATTN_PORT_OUT || call->dropped[i] ||
            ((port->flags & optional) != 0 && given[i] < 0)) {
            continue;
        }
        attn_tensor want;
        ATTN_TRY(output_shape(call, port, &want));
        if (given[i] >= 0) {
            ATTN_TRY(check_given(call, "output ", &out[given[i]], port->type, &want));
        }
        if (given[i] >= 0 && direct(port, &out[given[i]].tensor)) {
            call->storage[i] = out[given[i]].tensor;
        } else {
            ATTN_TRY(scratch_tensor(call, port->name, &call->storage[i], want.dtype, want.ndim, want.shape));
        }
        call->t[i] = &call->storage[i];
        call->spare[i] = given[i] < 0;
    }
    return ATTN_OK;
}

static attn_status return_outputs(attn_call *call, const attn_named_tensor *out, const int given[])
{
    const attn_op_info *info = &call->cls->info;
    for (int i = 0; i < info->port_count; i++) {
        if (given[i] >= 0 && call->t[i]->data != out[given[i]].tensor.data) {
            ATTN_TRY(attn_tensor_copy(&out[given[i]].tensor, call->t[i]));
        }
    }
    return ATTN_OK;
}

static attn_status run(attn_call *call, attn_status (*function)(attn_call *))
{
    attn_status status = function(call);
    return status == ATTN_OK ? status : attn_fail(status, "%s: %s", call->cls->info.name, attn_last_error());
}

attn_status attn_op_outputs(const attn_op *op, const attn_named_tensor *in, int in_count, attn_named_tensor *out,
                            int *out_count)
{
    attn_call call;
    call_init(&call, op);
    ATTN_TRY(bind_inputs(&call, in, in_count, 0));
    const attn_op_info *info = &call.cls->info;
    int room = *out_count;
    *out_count = 0;
    for (int i = 0; i < info->port_count; i++) {
        if (info->ports[i].direction == ATTN_PORT_OUT && !call.dropped[i]) {
            if (*out_count == room) {
                return attn_fail(ATTN_ERR_ARGUMENT, "%s: room for %d outputs is not enough", info->name, room);
            }
            out[*out_count].name = info->ports[i].name;
            ATTN_TRY(output_shape(&call, &info->ports[i], &out[*out_count].tensor));
            ++*out_count;
        }
    }
    return ATTN_OK;
}

static attn_status forward(attn_call *call, const attn_named_tensor *in, int in_count, const attn_named_tensor *out,
                           int out_count)
{
    int given[ATTN_MAX_PORTS];
    ATTN_TRY(bind_inputs(call, in, in_count, 1));
    ATTN_TRY(convert_inputs(call));
    ATTN_TRY(prepare_outputs(call, out, out_count, ATTN_PORT_ON_REQUEST | ATTN_PORT_FOR_BACKWARD, given));
    ATTN_TRY(run(call, call->cls->forward));
    return return_outputs(call, out, given);
}

attn_status attn_op_forward(const attn_op *op, const attn_named_tensor *in, int in_count, const attn_named_tensor *out,
                            int out_count, const attn_exec *exec)
{
    attn_call call;
    attn_scratch scratch;
    call_init(&call, op);
    ATTN_TRY(attn_scratch_begin(&scratch, exec));
    call.arena = scratch.arena;
    call.threads = attn_exec_threads(exec);
    attn_status status = forward(&call, in, in_count, out, out_count);
    attn_scratch_end(&scratch);
    return status;
}

/* Outputs for a backward call: the saved ones, converted; the rest is computed again if backward reads any of it. */
static attn_status saved_outputs(attn_call *call, const attn_named_tensor *out, int out_count)
{
    const attn_op_info *info = &call->cls->info;
    int given[ATTN_MAX_PORTS];
    attn_tensor saved[ATTN_MAX_PORTS];
    int missing = 0;
    ATTN_TRY(prepare_outputs(call, NULL, 0, ATTN_PORT_ON_REQUEST, given));
    memset(call->spare, 0, sizeof call->spare); /* backward reads them */
    for (int i = 0; i < out_count; i++) {
        int port = find_port(info, ATTN_PORT_OUT, out[i].name);
        if (port < 0) {
            return no_such_port(info, ATTN_PORT_OUT, out[i].name, 0);
        }
        if (call->t[port] == NULL) {
            continue; /* on request, and not needed here */
        }
        ATTN_TRY(check_given(call, "saved output ", &out[i], info->ports[port].type, call->t[port]));
        saved[port] = out[i].tensor;
        given[port] = i;
    }
    for (int i = 0; i < info->port_count; i++) {
        missing |= info->ports[i].direction == ATTN_PORT_OUT && call->t[i] != NULL && given[i] < 0 &&
                   (info->ports[i].flags & ATTN_PORT_NO_BACKWARD) == 0;
    }
    if (missing) {
        return run(call, call->cls->forward);
    }
    for (int i = 0; i < info->port_count; i++) {
        if (given[i] >= 0) {
            call->storage[i] = saved[i];
            ATTN_TRY(convert(call, &info->ports[i], &call->storage[i]));
        }
    }
    return ATTN_OK;
}

static attn_status prepare_grad_out(attn_call *call, const attn_named_tensor *grad_out, int count)
{
    const attn_op_info *info = &call->cls->info;
    if (count == 0) {
        return attn_fail(ATTN_ERR_ARGUMENT, "%s: backward needs the gradient of at least one output", info->name);
    }
    for (int i = 0; i < count; i++) {
        int port = find_port(info, ATTN_PORT_OUT, grad_out[i].name);
        if (port < 0 || (info->ports[port].flags & ATTN_PORT_DIFF) == 0 || call->t[port] == NULL) {
            return no_such_port(info, ATTN_PORT_OUT, grad_out[i].name, 1);
        }
        ATTN_TRY(check_given(call, "gradient of ", &grad_out[i], ATTN_PORT_FLOAT, call->t[port]));
        call->grad_storage[port] = grad_out[i].tensor;
        call->grad[port] = &call->grad_storage[port];
        attn_port_info plain = {.name = info->ports[port].name, .type = ATTN_PORT_FLOAT};
        ATTN_TRY(convert(call, &plain, call->grad[port]));
    }
    return ATTN_OK;
}

static attn_status prepare_grad_in(attn_call *call, const attn_named_tensor *grad_in, int count, int given[])
{
    const attn_op_info *info = &call->cls->info;
    for (int i = 0; i < info->port_count; i++) {
        given[i] = -1;
    }
    for (int i = 0; i < count; i++) {
        int port = find_port(info, ATTN_PORT_IN, grad_in[i].name);
        if (port < 0 || (info->ports[port].flags & ATTN_PORT_DIFF) == 0) {
            return no_such_port(info, ATTN_PORT_IN, grad_in[i].name, 1);
        }
        if (call->t[port] == NULL) {
            return attn_fail(ATTN_ERR_ARGUMENT, "%s: gradient of %s asked for, but that input is absent", info->name,
                             grad_in[i].name);
        }
        const attn_tensor *want = call->t[port];
        ATTN_TRY(check_given(call, "gradient of ", &grad_in[i], ATTN_PORT_FLOAT, want));
        const attn_tensor *to = &grad_in[i].tensor;
        if (to->dtype == ATTN_F32 && attn_tensor_is_contiguous(to)) {
            call->grad_storage[port] = *to;
        } else {
            ATTN_TRY(scratch_tensor(call, grad_in[i].name, &call->grad_storage[port], ATTN_F32, to->ndim, to->shape));
        }
        call->grad[port] = &call->grad_storage[port];
        size_t bytes = (size_t)attn_tensor_count(to) * sizeof(float);
        if (bytes > 0) {
            memset(call->grad[port]->data, 0, bytes);
        }
        given[port] = i;
    }
    return ATTN_OK;
}

attn_status attn_op_backward(const attn_op *op, const attn_named_tensor *in, int in_count, const attn_named_tensor *out,
                             int out_count, const attn_named_tensor *grad_out, int grad_out_count,
                             const attn_named_tensor *grad_in, int grad_in_count, const attn_exec *exec)
{
    attn_call call;
    attn_scratch scratch;
    call_init(&call, op);
    if (call.cls->backward == NULL) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "%s has no backward", call.cls->info.name);
    }
    ATTN_TRY(attn_scratch_begin(&scratch, exec));
    call.arena = scratch.arena;
    call.threads = attn_exec_threads(exec);
    int given[ATTN_MAX_PORTS];
    attn_status status = bind_inputs(&call, in, in_count, 1);
    if (status == ATTN_OK) {
        status = convert_inputs(&call);
    }
    if (status == ATTN_OK) {
        status = saved_outputs(&call, out, out_count);
    }
    if (status == ATTN_OK) {
        status = prepare_grad_out(&call, grad_out, grad_out_count);
    }
    if (status == ATTN_OK) {
        status = prepare_grad_in(&call, grad_in, grad_in_count, given);
    }
    if (status == ATTN_OK) {
        status = run(&call, call.cls->backward);
    }
    for (int i = 0; status == ATTN_OK && i < call.cls->info.port_count; i++) {
        if (given[i] >= 0 && call.grad[i]->data != grad_in[given[i]].tensor.data) {
            status = attn_tensor_copy(&grad_in[given[i]].tensor, call.grad[i]);
        }
    }
    attn_scratch_end(&scratch);
    return status;
}

attn_status attn_op_cost(const attn_op *op, const attn_named_tensor *in, int in_count, attn_cost *cost)
{
    attn_call call;
    attn_scratch scratch;
    call_init(&call, op);
    if (call.cls->cost == NULL) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "%s gives no account of its cost", call.cls->info.name);
    }
    ATTN_TRY(attn_scratch_begin(&scratch, NULL));
    call.arena = scratch.arena;
    call.threads = omp_get_max_threads();
    *cost = (attn_cost){0};
    attn_status status = bind_inputs(&call, in, in_count, 0);
    if (status == ATTN_OK) {
        status = call.cls->cost(&call, cost);
    }
    attn_scratch_end(&scratch);
    return status;
}

attn_status attn_op_select(const attn_op *op, const attn_named_tensor *in, int in_count, attn_plan **plan, const attn_exec *exec)
{
    attn_call call;
    attn_scratch scratch;
    attn_plan *made = NULL;
    *plan = NULL;
    call_init(&call, op);
    if (call.cls->select == NULL) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "%s does not select blocks or keys", call.cls->info.name);
    }
    ATTN_TRY(attn_scratch_begin(&scratch, exec));
    call.arena = scratch.arena;
    call.threads = attn_exec_threads(exec);
    attn_status status = bind_inputs(&call, in, in_count, 1);
    if (status == ATTN_OK) {
        status = convert_inputs(&call);
    }
    if (status == ATTN_OK) {
        status = attn_plan_create(&made, &(attn_plan_shape){1, 1, 0, 0, 1, 1});
    }
    if (status == ATTN_OK) {
        status = call.cls->select(&call, made);
    }
    if (status == ATTN_OK) {
        *plan = made;
    } else {
        attn_plan_destroy(made);
    }
    attn_scratch_end(&scratch);
    return status;
}
