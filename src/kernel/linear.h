/* Micro-kernels of linear attention: one token of the recurrence, and small row operations. */
#ifndef ATTN_KERNEL_LINEAR_H
#define ATTN_KERNEL_LINEAR_H

#include "kernel/dispatch.h"
#include <stdint.h>

typedef struct attn_linear_kernels {
    /* state [d][dv] (rows ld apart): each row is scaled by decay (or by decays[row] when that is not NULL) and gets k[row] * v;
     * then o [dv] = sum of q[row] * state[row]. One pass over the state. */
    void (*step)(int64_t d, int64_t dv, float *state, int64_t ld, float decay, const float *decays, const float *q,
                 const float *k, const float *v, float *o);
    /* o [dv] = sum of q[row] * state[row]. */
    void (*read)(int64_t d, int64_t dv, const float *state, int64_t ld, const float *q, float *o);
    /* to[i] = a[i] * b[i] */
    void (*multiply)(float *to, const float *a, const float *b, int64_t count);

    /* The second-order Taylor expansion of exp (arXiv:2402.18668): s[i] becomes 1 + s + s^2/2; slope[i], unless NULL, 1 + s. */
    void (*taylor)(float *s, float *slope, int64_t count);
    /* Its feature map: phi [1 + d + d(d+1)/2] = 1 | sqrt(scale) x | scale/sqrt(2) x_i^2 and scale x_i x_j for i < j, row by row. */
    void (*taylor_features)(int64_t d, double scale, const float *x, float *phi);
    /* grad_x [d] += the gradient through phi. */
    void (*taylor_features_back)(int64_t d, double scale, const float *x, const float *grad_phi, float *grad_x);
} attn_linear_kernels;

/* For this machine, or what ATTN_ISA asks for. */
const attn_linear_kernels *attn_linear_kernels_get(void);
const attn_linear_kernels *attn_linear_kernels_at(attn_isa isa);

#endif
