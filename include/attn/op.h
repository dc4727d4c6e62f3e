/* The generic operator interface: every mechanism by its name, with parameters and named tensors.
 *
 * A mechanism SPEC is "name" or "name:key=value,key=value", the same in C, on the command line and in Python. Values are
 * numbers, true/false, names, null (the automatic default), and lists as [1,2].
 *
 *     attn_op *op;
 *     attn_op_create(&op, "dense:causal=true");
 *     attn_named_tensor in[] = {{"q", q}, {"k", k}, {"v", v}}, out[] = {{"o", o}};
 *     attn_op_forward(op, in, 3, out, 1, NULL);
 *     attn_op_destroy(op);
 */
#ifndef ATTN_OP_H
#define ATTN_OP_H

#include <attn/memory.h>
#include <attn/tensor.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- What mechanisms there are: tables that describe each one ---- */

typedef enum attn_param_type {
    ATTN_PARAM_BOOL,
    ATTN_PARAM_INT,
    ATTN_PARAM_FLOAT,
    ATTN_PARAM_CHOICE, /* one of the names in `choices` */
    ATTN_PARAM_INTS,   /* a list; a single number stands for a list of one */
    ATTN_PARAM_FLOATS,
    ATTN_PARAM_BOOLS
} attn_param_type;

typedef struct attn_param_info {
    const char *name;
    attn_param_type type;
    const char *standard;      /* the default as it would be written in a SPEC; NULL: required; "null": automatic */
    const char *standard_text; /* what "null" means, for people ("1/sqrt(D)"); NULL otherwise */
    const char *choices;       /* ATTN_PARAM_CHOICE: the names, separated by '|' */
    double min, max;           /* numbers, and each number of a list; infinite when there is no bound */
    int min_open, max_open;    /* the bound itself is excluded */
    int min_items, max_items;  /* lists; max_items 0: no bound */
    const char *help;
    size_t offset;             /* where the value goes (internal) */
} attn_param_info;

typedef enum attn_port_direction { ATTN_PORT_IN, ATTN_PORT_OUT } attn_port_direction;

typedef enum attn_port_type {
    ATTN_PORT_FLOAT, /* f32, f16 or bf16 */
    ATTN_PORT_CACHE, /* f32, f16, bf16 or i8 (int8 with a scale port) */
    ATTN_PORT_INT,   /* i32 or i64; outputs are i64 */
    ATTN_PORT_BOOL
} attn_port_type;

enum {
    ATTN_PORT_OPTIONAL = 1,   /* input that may be absent, output that some calls do not produce */
    ATTN_PORT_DIFF = 2,       /* input that gets a gradient, output whose gradient is taken */
    ATTN_PORT_ANY_LAYOUT = 4, /* the mechanism reads any strides and types itself; otherwise they are converted */
    ATTN_PORT_ON_REQUEST = 8, /* output computed only when the caller asks for it */
    ATTN_PORT_FOR_BACKWARD = 16, /* output computed only when the caller asks for it or backward needs it */
    ATTN_PORT_NO_BACKWARD = 32, /* output that backward does not read: it need not be saved for it */
    ATTN_PORT_F32 = 64 /* float output that is best f32 whatever the inputs are: backward takes exponentials of it */
};

typedef struct attn_port_info {
    attn_port_direction direction;
    const char *name;
    const char *shape; /* "B,H,N,D": symbols, numbers, "4*E", "1|B" (1 or B), "*" (anything), "...,C" (any leading axes) */
    attn_port_type type;
    int flags;
    const char *help;
} attn_port_info;

typedef struct attn_op_info {
    const char *name;    /* "flexprefill", "neighborhood.mask" */
    const char *title;   /* one line */
    const char *summary; /* what it is, when to use it, cost: a paragraph or two */
    const char *paper;   /* "arXiv:2502.20766" */
    const attn_param_info *params;
    int param_count;
    const attn_port_info *ports; /* inputs first, then outputs */
    int port_count;
    int differentiable; /* has a backward */
} attn_op_info;

ATTN_API int attn_op_count(void);
/* In alphabetical order; NULL when out of range. Static memory. */
ATTN_API const attn_op_info *attn_op_at(int index);
/* NULL when there is no such mechanism. */
ATTN_API const attn_op_info *attn_op_find(const char *name);

/* ---- A mechanism with its parameters ---- */

typedef struct attn_op attn_op;

/* From a SPEC. Errors (ATTN_ERR_ARGUMENT) name the mechanism or parameter and what is allowed. */
ATTN_API attn_status attn_op_create(attn_op **op, const char *spec);
/* From a name and a JSON object of parameters (NULL or "{}": the defaults). */
ATTN_API attn_status attn_op_create_json(attn_op **op, const char *name, const char *json);
ATTN_API void attn_op_destroy(attn_op *op); /* NULL is ignored */
ATTN_API const attn_op_info *attn_op_get_info(const attn_op *op);

typedef struct attn_named_tensor {
    const char *name;
    attn_tensor tensor;
} attn_named_tensor;

/* Check the inputs and tell the outputs: names, shapes and data types as contiguous views without data, in table order.
 * *out_count: room in `out` on entry (ports of the mechanism suffice), outputs on return. Outputs that these inputs and
 * parameters do not produce are left out. */
ATTN_API attn_status attn_op_outputs(const attn_op *op, const attn_named_tensor *in, int in_count,
                                     attn_named_tensor *out, int *out_count);

/* Compute the outputs in `out` (any subset, in any order, any strides). Float outputs may be f32, f16 or bf16.
 * Inputs and outputs must not overlap. */
ATTN_API attn_status attn_op_forward(const attn_op *op, const attn_named_tensor *in, int in_count,
                                     const attn_named_tensor *out, int out_count, const attn_exec *exec);

/* Gradients: `grad_out` holds dLoss/d(output) under the outputs' names, `grad_in` receives dLoss/d(input) under the
 * inputs' names (any subset of the differentiable ones; overwritten). `out` holds outputs saved from the forward call with the
 * same inputs; what is missing there is computed again. ATTN_ERR_UNSUPPORTED for a mechanism without backward. */
ATTN_API attn_status attn_op_backward(const attn_op *op, const attn_named_tensor *in, int in_count,
                                      const attn_named_tensor *out, int out_count, const attn_named_tensor *grad_out,
                                      int grad_out_count, const attn_named_tensor *grad_in, int grad_in_count,
                                      const attn_exec *exec);

/* The work that a call with these inputs does, by the mechanism's own account; for mechanisms that select, the selection
 * is made. ATTN_ERR_UNSUPPORTED for a mechanism that gives no account. */
typedef struct attn_cost {
    double flops; /* of the main arithmetic, multiply and add counted apart */
    double bytes; /* that must move at least, when memory is the limit; 0 when arithmetic is */
    double pairs; /* (query, key) pairs that are computed, summed over batch and heads; 0 when that means nothing */
} attn_cost;
ATTN_API attn_status attn_op_cost(const attn_op *op, const attn_named_tensor *in, int in_count, attn_cost *cost);

/* The plan (attn/plan.h) that a mechanism selects for these inputs; freed by attn_plan_destroy(). *plan is NULL on failure.
 * ATTN_ERR_UNSUPPORTED for a mechanism that does not select blocks or keys. */
struct attn_plan;
ATTN_API attn_status attn_op_select(const attn_op *op, const attn_named_tensor *in, int in_count, struct attn_plan **plan,
                                    const attn_exec *exec);

#ifdef __cplusplus
}
#endif
#endif
