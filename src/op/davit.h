/* The two attentions of davit, as its layers use them. */
#ifndef ATTN_OP_DAVIT_H
#define ATTN_OP_DAVIT_H

#include "exec/windows.h"
#include "op/class.h"

#define ATTN_DAVIT_PAPER "arXiv:2204.03645"

attn_status attn_davit_check_grid(const attn_ints *grid, int64_t tokens);
/* Windows without halo over a grid. */
void attn_davit_window(attn_windows *w, const attn_ints *grid, const attn_ints *window);
void attn_davit_window_cost(const attn_windows *w, attn_cost *cost);

/* [batch, groups, n, width] with unit stride in the last axis. */
typedef struct attn_davit_rows {
    float *data;
    int64_t batch, group, row; /* strides */
} attn_davit_rows;

static inline float *attn_davit_row(const attn_davit_rows *r, int64_t batch, int64_t group, int64_t row)
{
    return r->data + batch * r->batch + group * r->group + row * r->row;
}

/* o[n,i] = sum_j A[i,j] v[n,j] with A = softmax over j of scale * sum_n q[n,i] k[n,j], for each group. */
typedef struct attn_davit_channel {
    int64_t batch, groups, n, i, j;
    double scale;
    attn_davit_rows q, k, v, o;
} attn_davit_channel;

/* attn [batch, groups, i, j]: A. ATTN_ERR_MEMORY. */
attn_status attn_davit_channel_forward(const attn_davit_channel *c, attn_arena *arena, int threads, float *attn);
/* Gradients are overwritten; data may be NULL in each. ATTN_ERR_MEMORY. */
attn_status attn_davit_channel_backward(const attn_davit_channel *c, attn_arena *arena, int threads, const float *attn,
                                        const attn_davit_rows *grad_o, const attn_davit_rows *grad_q, const attn_davit_rows *grad_k,
                                        const attn_davit_rows *grad_v);

#endif
