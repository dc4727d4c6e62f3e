/* What flow attention's two files share. */
#ifndef ATTN_OP_FLOW_H
#define ATTN_OP_FLOW_H

#include "kernel/linear.h"
#include "kernel/tile.h"
#include "op/class.h"

enum { ATTN_FLOW_SIGMOID, ATTN_FLOW_RELU };
#define ATTN_FLOW_RELU_FLOOR 1e-6f

/* One call's shape: `heads` query heads; keys and values of head h belong to kv head h / group. */
typedef struct attn_flow {
    int64_t batch, heads, group, n, m, d, dv;
    int causal;
    int64_t kernel;
    double eps, clamp;
} attn_flow;

/* q, k, v of head i of batch * heads. */
static inline const float *attn_flow_kv(const attn_flow *f, const float *x, int64_t i, int64_t width)
{
    int64_t kv_heads = f->heads / f->group;
    return x + (i / f->heads * kv_heads + i % f->heads / f->group) * f->m * width;
}

/* y = the feature map of x. */
static inline void attn_flow_map(int64_t kernel, const float *x, float *y, int64_t count)
{
    if (kernel == ATTN_FLOW_SIGMOID) {
        attn_linear_kernels_get()->sigmoid(y, x, count);
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        y[i] = (x[i] > 0 ? x[i] : 0) + ATTN_FLOW_RELU_FLOOR;
    }
}

/* The conserved source flow within its limits; clipped: whether it was outside. */
static inline double attn_flow_limit(double x, double clamp, uint8_t *clipped)
{
    *clipped = clamp > 0 && fabs(x) > clamp;
    return *clipped ? (x > 0 ? clamp : -clamp) : x;
}

/* flow_tiles.c: o [B,H,N,Dv], competition [B,H,M] and allocation [B,H,N] (both may be NULL) in tiles of tokens. */
attn_status attn_flow_forward(attn_call *call, const attn_flow *f, const float *q, const float *k, const float *v, float *o,
                              float *competition, float *allocation);

#endif
