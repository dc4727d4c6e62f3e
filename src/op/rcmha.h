/* The parts of relative convolutional attention, for its operators. */
#ifndef ATTN_OP_RCMHA_H
#define ATTN_OP_RCMHA_H

#include "exec/stairs.h"
#include "layer/conv.h"
#include "op/class.h"

/* ---- rcmha_core.c: relative attention ---- */

typedef struct rcmha_core {
    int64_t batch, heads, kv_heads, n, m, d, dv, table; /* table: 2P rows, 0 without relative positions */
    int64_t q_stride, k_stride;                         /* rows from head to head */
    int causal;
    double scale;
    const float *q, *k, *v, *rel_emb, *rel_bias, *q_bias;
    float *o, *lse;
    attn_stairs stairs;
} rcmha_core;

/* The rows of rel_emb or rel_bias (NULL is fine) for n queries and m keys. */
attn_status attn_rcmha_check_table(const attn_tensor *table, const char *name, int64_t n, int64_t m);
attn_status attn_rcmha_core_forward(attn_call *call, rcmha_core *core);

typedef struct rcmha_core_gradients {
    const float *o;
    float *q;                           /* like core->q, same stride */
    float *k, *v;                       /* [B*Hkv][m][d or dv] */
    float *rel_emb, *rel_bias, *q_bias; /* added to */
} rcmha_core_gradients;

attn_status attn_rcmha_core_backward(attn_call *call, const rcmha_core *core, const rcmha_core_gradients *gradients);
/* Adds pairs and flops. */
void attn_rcmha_core_cost(const rcmha_core *core, attn_cost *cost);

/* ---- rcmha_conv.c: the convolution of heads ---- */

/* Taps and bias (NULL is fine) have `ndim` axes for one set, or one more for a set per head. */
attn_status attn_rcmha_check_sets(const attn_tensor *t, const char *name, int ndim, int64_t heads);
/* Of [sequences = B*H][length][d]; taps and bias are spread to one set per head where only one of them is. */
attn_status attn_rcmha_conv(attn_call *call, const attn_tensor *w, const attn_tensor *b, int64_t heads, int64_t sequences, int64_t length,
                            attn_conv1d *conv);
/* grad_x and grad_state are overwritten, grad_w and grad_b added to. */
attn_status attn_rcmha_conv_back(attn_call *call, const attn_conv1d *conv, const float *x, const float *grad_o, float *grad_x,
                                 float *grad_state, const attn_tensor *grad_w, const attn_tensor *grad_b);

#endif
