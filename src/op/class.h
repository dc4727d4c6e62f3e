/* What a mechanism is: a table and a few functions. One file per mechanism, always in this order: comment (what, why,
 * paper), parameters, ports, select, forward, backward, cost, class. The class is then listed in registry.c, and nothing else.
 *
 * The framework (call.c) does all that is common, so that a mechanism can trust what it gets:
 * - parameters are parsed and range-checked into the mechanism's own struct;
 * - shapes are checked against the port table; symbols are bound from the inputs in order; H must be a multiple of Hkv when
 *   both are bound; `bind` then checks what a table cannot say and sets the symbols that only outputs use;
 * - unless a port says ATTN_PORT_ANY_LAYOUT, tensors are contiguous; floats are f32, integers i64, booleans bytes;
 * - call->t[PORT] is NULL for an absent optional input, for an output that `bind` dropped, and for an ATTN_PORT_ON_REQUEST output
 *   (in forward, also an ATTN_PORT_FOR_BACKWARD one) that nobody asked for; all other outputs are always there (in scratch memory when the caller does not want them);
 * - in backward, call->t[] has inputs and outputs (ATTN_PORT_NO_BACKWARD ones may hold anything), call->grad[OUTPUT] the incoming
 *   gradient (NULL when not given; at least one is),
 *   call->grad[INPUT] is zero-filled contiguous f32, or NULL when not asked for;
 * - call->arena is scratch memory that is released after the call; call->threads is the number of OpenMP threads.
 */
#ifndef ATTN_OP_CLASS_H
#define ATTN_OP_CLASS_H

#include "core/internal.h"
#include <attn/op.h>
#include <math.h>

#define ATTN_MAX_PORTS 80
#define ATTN_MAX_SYMBOLS 40

/* What parameters parse into. "null" is ATTN_UNSET for bool, int and choice, NaN for float, count 0 for lists. */
#define ATTN_UNSET INT64_MIN
typedef struct attn_ints { /* ATTN_PARAM_INTS and ATTN_PARAM_BOOLS */
    int count;
    int64_t *items;
} attn_ints;
typedef struct attn_floats {
    int count;
    double *items;
} attn_floats;
/* In a params struct: int64_t for BOOL, INT and CHOICE (index into the names), double for FLOAT. */

/* Most rows, columns or cells of an axis: products of two extents do not overflow. */
#define ATTN_MOST_EXTENT 1073741824.0
/* Most of what is added to extents or multiplies them (windows, strides, padding). */
#define ATTN_MOST_STEP 1048576.0

/* Entries of a parameter table. S: the struct, F: its field, standard: text or NULL (required). */
#define ATTN_P_BOOL(name_, S, F, standard_, help_)                                                                     \
    {.name = name_, .type = ATTN_PARAM_BOOL, .standard = standard_, .min = 0, .max = 1, .help = help_, .offset = offsetof(S, F)}
#define ATTN_P_INT(name_, S, F, standard_, min_, max_, help_)                                                          \
    {.name = name_, .type = ATTN_PARAM_INT, .standard = standard_, .min = min_, .max = max_, .help = help_,            \
     .offset = offsetof(S, F)}
#define ATTN_P_FLOAT(name_, S, F, standard_, min_, max_, help_)                                                        \
    {.name = name_, .type = ATTN_PARAM_FLOAT, .standard = standard_, .min = min_, .max = max_, .help = help_,          \
     .offset = offsetof(S, F)}
/* A float whose "null" default means `text`, e.g. "1/sqrt(D)". */
#define ATTN_P_FLOAT_AUTO(name_, S, F, text_, min_, max_, help_)                                                       \
    {.name = name_, .type = ATTN_PARAM_FLOAT, .standard = "null", .standard_text = text_, .min = min_, .max = max_,    \
     .help = help_, .offset = offsetof(S, F)}
#define ATTN_P_CHOICE(name_, S, F, standard_, choices_, help_)                                                         \
    {.name = name_, .type = ATTN_PARAM_CHOICE, .standard = standard_, .choices = choices_, .help = help_,              \
     .offset = offsetof(S, F)}
/* A float strictly above min_ (min_open_ 1) or below max_ (max_open_ 1). */
#define ATTN_P_FLOAT_OPEN(name_, S, F, standard_, min_, min_open_, max_, max_open_, help_)                             \
    {.name = name_, .type = ATTN_PARAM_FLOAT, .standard = standard_, .min = min_, .max = max_, .min_open = min_open_,  \
     .max_open = max_open_, .help = help_, .offset = offsetof(S, F)}
/* A list: type_ is INTS, FLOATS or BOOLS. */
#define ATTN_P_LIST(type_, name_, S, F, standard_, min_, max_, min_items_, max_items_, help_)                          \
    {.name = name_, .type = ATTN_PARAM_##type_, .standard = standard_, .min = min_, .max = max_,                       \
     .min_items = min_items_, .max_items = max_items_, .help = help_, .offset = offsetof(S, F)}
/* The entry every softmax mechanism has. */
#define ATTN_P_SCALE(S, F) ATTN_P_FLOAT_AUTO("scale", S, F, "1/sqrt(D)", -INFINITY, INFINITY, "multiplies q.k")
/* The same for mechanisms that need it positive. */
#define ATTN_P_SCALE_POSITIVE(S, F)                                                                                    \
    {.name = "scale", .type = ATTN_PARAM_FLOAT, .standard = "null", .standard_text = "1/sqrt(D)", .min = 0,            \
     .min_open = 1, .max = INFINITY, .help = "multiplies q.k", .offset = offsetof(S, F)}

/* Entries of a port table. */
#define ATTN_IN(name_, shape_, type_, flags_, help_)                                                                   \
    {ATTN_PORT_IN, name_, shape_, ATTN_PORT_##type_, flags_, help_}
#define ATTN_OUT(name_, shape_, type_, flags_, help_)                                                                  \
    {ATTN_PORT_OUT, name_, shape_, ATTN_PORT_##type_, flags_, help_}

#define ATTN_COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))
#define ATTN_TABLE(params_, ports_)                                                                                    \
    .params = params_, .param_count = ATTN_COUNT(params_), .ports = ports_, .port_count = ATTN_COUNT(ports_)
#define ATTN_TABLE_NO_PARAMS(ports_) .params = NULL, .param_count = 0, .ports = ports_, .port_count = ATTN_COUNT(ports_)

typedef struct attn_op_class attn_op_class;

typedef struct attn_symbol {
    const char *name; /* not terminated */
    int length;
    int64_t value;
} attn_symbol;

typedef struct attn_call {
    const attn_op_class *cls;
    const void *params;
    attn_tensor *t[ATTN_MAX_PORTS];    /* by port number */
    attn_tensor *grad[ATTN_MAX_PORTS]; /* by port number; backward only */
    attn_arena *arena;
    int threads;
    unsigned char spare[ATTN_MAX_PORTS]; /* outputs that nobody asked for: scratch memory that need not be filled */
    /* The framework's own. */
    attn_symbol symbols[ATTN_MAX_SYMBOLS];
    int symbol_count;
    unsigned char dropped[ATTN_MAX_PORTS];
    attn_tensor storage[ATTN_MAX_PORTS], grad_storage[ATTN_MAX_PORTS];
} attn_call;

struct attn_plan;

struct attn_op_class {
    attn_op_info info;
    size_t params_size;
    attn_status (*bind)(attn_call *call);                           /* optional */
    attn_status (*select)(attn_call *call, struct attn_plan *plan); /* for mechanisms that select blocks or keys */
    attn_status (*forward)(attn_call *call);
    attn_status (*backward)(attn_call *call); /* optional */
    attn_status (*cost)(attn_call *call, attn_cost *cost); /* optional; after bind, with inputs (data only if they had data) */
};

/* For mechanisms. */
/* Value of a bound symbol; -1 when it is not bound (its optional input is absent). */
int64_t attn_dim(const attn_call *call, const char *symbol);
/* Set a symbol (an output extent) in bind. */
void attn_set_dim(attn_call *call, const char *symbol, int64_t value);
/* In bind: this call does not produce that output port. */
void attn_drop_output(attn_call *call, int port);
static inline float *attn_f32(const attn_tensor *tensor) { return tensor != NULL ? (float *)tensor->data : NULL; }
/* In forward: NULL for an output that nobody asked for, too. */
static inline float *attn_wanted_f32(const attn_call *call, int port) { return call->spare[port] ? NULL : attn_f32(call->t[port]); }
static inline int64_t *attn_i64(const attn_tensor *tensor) { return tensor != NULL ? (int64_t *)tensor->data : NULL; }
static inline uint8_t *attn_bool(const attn_tensor *tensor) { return tensor != NULL ? (uint8_t *)tensor->data : NULL; }
/* Scratch floats from the call's arena, not zeroed; NULL on failure (then return attn_fail_memory). */
static inline float *attn_scratch_f32(attn_call *call, int64_t count)
{
    return attn_arena_array(call->arena, (size_t)count, sizeof(float));
}
static inline attn_status attn_take_f32(attn_call *call, int64_t count, float **out)
{
    *out = attn_scratch_f32(call, count);
    return *out != NULL ? ATTN_OK : attn_fail_memory((size_t)count * sizeof(float));
}
static inline double attn_default_scale(double scale, int64_t head_size)
{
    /* Without channels all products are 0, whatever multiplies them: 1 as long as it is finite. */
    return isnan(scale) ? (head_size > 0 ? 1.0 / sqrt((double)head_size) : 1.0) : scale;
}

/* params.c: a params struct from text. */
attn_status attn_params_create(void **params, const attn_op_class *cls, const char *spec_params);
attn_status attn_params_create_json(void **params, const attn_op_class *cls, const char *json);
void attn_params_destroy(void *params, const attn_op_class *cls);

/* registry.c */
const attn_op_class *attn_op_class_find(const char *name);
const attn_op_class *attn_op_class_of(const attn_op *op);
const void *attn_op_params(const attn_op *op);

#endif
