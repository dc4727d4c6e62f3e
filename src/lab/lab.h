/* What experiments are written with: tensors that live as long as the experiment, mechanisms by name, time, and verdicts. The first
 * failure is kept and makes everything after it a no-op, so that experiments need no checks. */
#ifndef ATTN_LAB_LAB_H
#define ATTN_LAB_LAB_H

#include "core/internal.h"
#include "core/random.h"
#include <attn/lab.h>
#include <attn/op.h>

typedef struct lab {
    const attn_lab_settings *settings;
    attn_arena *arena;
    attn_random random;
    attn_status status; /* of the first failure */
    attn_lab_result result;
} lab;

typedef struct attn_lab_class {
    attn_lab_info info;
    void (*run)(lab *l);
} attn_lab_class;

#define LAB_SHAPE(...) (int)(sizeof(int64_t[]){__VA_ARGS__} / sizeof(int64_t)), (int64_t[]){__VA_ARGS__}
/* Named tensors as two arguments: LAB_LIST({"q", q}, {"k", k}). */
#define LAB_LIST(...) \
    (attn_named_tensor[]){__VA_ARGS__}, (int)(sizeof(attn_named_tensor[]){__VA_ARGS__} / sizeof(attn_named_tensor))

int attn_lab_small(const lab *l);
/* Zeros of any type; data is NULL after a failure. */
attn_tensor attn_lab_zeros(lab *l, attn_dtype dtype, int ndim, const int64_t *shape);
attn_tensor attn_lab_normal(lab *l, double deviation, int ndim, const int64_t *shape);
attn_tensor attn_lab_uniform(lab *l, double low, double high, int ndim, const int64_t *shape);
static inline float *lab_f32(const attn_tensor *t) { return t->data; }
static inline int64_t *lab_i64(const attn_tensor *t) { return t->data; }
static inline uint8_t *lab_bool(const attn_tensor *t) { return t->data; }

/* Run a mechanism for one output. */
attn_tensor attn_lab_output(lab *l, const char *spec, const attn_named_tensor *in, int in_count, const char *name);
/* Median seconds of a call for all outputs in `names` (separated by spaces); with `backward`, of forward and the gradients of all
 * differentiable inputs for random gradients of those of these outputs that have any. */
double attn_lab_seconds(lab *l, const char *spec, const attn_named_tensor *in, int in_count, const char *names,
                        int backward);
/* Wall-clock seconds, for what is no mechanism. */
double attn_lab_now(void);
/* (query, key) pairs, or flops when pairs mean nothing, by the mechanism's own account. */
attn_cost attn_lab_cost(lab *l, const char *spec, const attn_named_tensor *in, int in_count);

/* Bytes of scratch memory that a call for the outputs in `names` has in use at most. */
double attn_lab_memory(lab *l, const char *spec, const attn_named_tensor *in, int in_count, const char *names);

/* |a - b| / |b| over all elements (Euclidean). */
double attn_lab_distance(const lab *l, const attn_tensor *a, const attn_tensor *b);

/* A line of the report. */
void attn_lab_print(lab *l, const char *format, ...) ATTN_PRINTF(2, 3);
/* A verdict, with the measured numbers. */
void attn_lab_claim(lab *l, int holds, const char *claim, const char *measured, ...) ATTN_PRINTF(4, 5);
/* A verdict about speed: in the small form the numbers are printed but not judged. */
void attn_lab_claim_speed(lab *l, int holds, const char *claim, const char *measured, ...) ATTN_PRINTF(4, 5);
void attn_lab_check(lab *l, attn_status status);

#endif
