/* Micro-kernels of linear attention: one token of the recurrence, and small row operations. */
#ifndef ATTN_KERNEL_LINEAR_H
#define ATTN_KERNEL_LINEAR_H

#include "kernel/dispatch.h"
#include <stdint.h>

typedef struct attn_linear_kernels {
    /* state [d][dv] (rows ld apart): each row is scaled by decay (or by decays[row] when that is not NULL) and gets k[row] * v;
     * then o [dv] = sum of q[row] * state[row]. One pass over the state. A decay of 1 - 1e-9 is told from 1. */
    void (*step)(int64_t d, int64_t dv, float *state, int64_t ld, double decay, const float *decays, const float *q,
                 const float *k, const float *v, float *o);
    /* o [dv] = sum of q[row] * state[row]. */
    void (*read)(int64_t d, int64_t dv, const float *state, int64_t ld, const float *q, float *o);
    float (*sum)(const float *x, int64_t count);
    /* to[i] = a[i] * b[i] */
    void (*multiply)(float *to, const float *a, const float *b, int64_t count);

    /* A few tokens whose channels decay each by its own factor: from token j to token i >= j by D(i,j)[c] = product of
     * decays[t][c] over t = j + 1 ... i. Rows of `width` channels; strides may be negative, so that tokens may come in reverse.
     * s[i][j] = sum of q[i][c] k[j][c] D(i,j)[c] for j <= i, 0 for j > i. */
    void (*faded_scores)(int64_t count, int64_t width, const float *q, const float *k, int64_t ld, const float *decays, int64_t ldd,
                         float *s, int64_t lds);
    /* to[i] += sum over j <= i of p[i*p_row + j*p_col] from[j] D(i,j) */
    void (*faded_sums)(int64_t count, int64_t width, const float *p, int64_t p_row, int64_t p_col, const float *from, int64_t ld,
                       const float *decays, int64_t ldd, float *to, int64_t ldt);
    /* rows[i] *= product of decays[t] over t = first ... i; total [width], unless NULL, that up to the last token. */
    void (*fade)(int64_t count, int64_t width, float *rows, int64_t ld, const float *decays, int64_t ldd, int64_t first, float *total);

    /* to[i] = 1 / (1 + exp(-from[i])) */
    void (*sigmoid)(float *to, const float *from, int64_t count);

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
