/* Checks that hold for every mechanism, for the tests of mechanisms: run one by its SPEC on random inputs and compare its
 * gradients with central differences, its results for 1, 2 and 7 threads bit by bit, and its outputs before and after backward.
 *
 *     opcheck_case c = {.spec = "dense:causal=true", .seed = 1};
 *     opcheck_input(&c, "q", 4, (int64_t[]){1, 4, 5, 8});   // normal numbers; opcheck_uniform for a range; opcheck_given
 *     ...
 *     opcheck_run(&c, 1e-2);   // 0: threads only; else the tolerance of the gradient comparison
 *
 * The loss is sum(g * o) over all differentiable outputs with a random g. Failures print what was compared and fail the test.
 */
#ifndef ATTN_TESTS_OPCHECK_H
#define ATTN_TESTS_OPCHECK_H

#include <stdint.h>

#include <attn/op.h>

typedef struct opcheck_case {
    const char *spec;
    uint64_t seed;
    const char *only_output; /* the loss uses this output alone; NULL: all differentiable ones */
    double step;             /* of the differences; 0: 1e-2 */
    int samples;             /* elements differentiated per input; 0: 24 */
    attn_named_tensor in[80];
    int in_count;
    int no_grad[80];
} opcheck_case;

/* Inputs keep their memory in the case until opcheck_run, which frees it. Returned pointers let a test adjust values. */
float *opcheck_input(opcheck_case *c, const char *name, int ndim, const int64_t *shape);
float *opcheck_uniform(opcheck_case *c, const char *name, int ndim, const int64_t *shape, double low, double high);
/* Whole numbers in low ... high (not differentiated). */
int64_t *opcheck_whole(opcheck_case *c, const char *name, int ndim, const int64_t *shape, int64_t low, int64_t high);
uint8_t *opcheck_bool(opcheck_case *c, const char *name, int ndim, const int64_t *shape, double share);
void opcheck_run(opcheck_case *c, double tolerance);
/* The SPEC (or the case's call) must fail with this status and a message that holds `words`. */
void opcheck_fails(opcheck_case *c, attn_status status, const char *words);

#endif
