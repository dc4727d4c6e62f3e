/* The parts of TransNormerLLM, for its operators and its model. */
#ifndef ATTN_OP_TNL_H
#define ATTN_OP_TNL_H

#include "op/class.h"

#define TNL_PAPER "arXiv:2307.14995, arXiv:2405.17381"

typedef struct tnl_params {
    int64_t heads, act, offset, block, scale_embedding, schedule;
    double eps;
    attn_ints lrpe_layers;
} tnl_params;

#define TNL_HEADS ATTN_P_INT("heads", tnl_params, heads, NULL, 1, INFINITY, "attention heads; divides E")
#define TNL_ACT ATTN_P_CHOICE("act", tnl_params, act, "silu", "silu|elu1|none", "activation of queries and keys")
#define TNL_EPS ATTN_P_FLOAT("eps", tnl_params, eps, "1e-6", 0, INFINITY, "of every norm")
#define TNL_OFFSET ATTN_P_INT("offset", tnl_params, offset, "0", 0, INFINITY, "position of the first token: tokens already in kv_state")
#define TNL_BLOCK ATTN_P_INT("block", tnl_params, block, "64", 1, INFINITY, "tile length of the attention; changes rounding only")

/* ---- LRPE (tnl_lrpe.c) ---- */

/* Rows of one head: x [n] rows of d at a stride, wide [n][2d]. */
typedef struct tnl_lrpe {
    int64_t n, d, offset;
    int64_t counted;    /* the first token's position in the gradient of theta; any will do when all that meet have this origin */
    const float *theta; /* [d] */
    double *cosine, *sine, *turn_c, *turn_s; /* [d] each: of the current token, and of one token's turn */
} tnl_lrpe;

void attn_tnl_lrpe_forward(tnl_lrpe *l, const float *x, int64_t stride, float *wide);
/* grad_x [n] rows, overwritten; grad_theta [d] in double, added to. */
void attn_tnl_lrpe_backward(tnl_lrpe *l, const float *x, int64_t stride, const float *grad_wide, float *grad_x,
                            int64_t grad_stride, double *grad_theta);
/* Scratch for the heads that run at the same time. */
attn_status attn_tnl_lrpe_scratch(attn_call *call, int64_t heads, int64_t d, double **scratch);
tnl_lrpe attn_tnl_lrpe_at(int64_t n, int64_t d, int64_t offset, const float *theta, double *scratch, int64_t h);
/* The gradient of a head's angles, summed over the batch in order. */
double *attn_tnl_lrpe_sum(double *scratch, int64_t h, int64_t d);

/* ---- Gated linear attention (tnl_core.c) ---- */

typedef struct tnl_core {
    int64_t batch, n, rows, c, e, heads, d, key; /* key: d, or 2d with LRPE */
    int64_t offset, block, act;
    double eps;
    int by_token; /* evaluate token by token */
    const float *w_qkvu, *w_o, *slope, *theta, *state_in;
    const uint8_t *mask;
} tnl_core;

typedef struct tnl_core_gradients {
    float *x, *w_qkvu, *w_o, *theta, *state; /* x and state are overwritten, the others added to; each may be NULL */
} tnl_core_gradients;

attn_status attn_tnl_core_forward(attn_call *call, const tnl_core *core, const float *x, float *o, float *state_out);
attn_status attn_tnl_core_backward(attn_call *call, const tnl_core *core, const float *x, const float *grad_o,
                                   const tnl_core_gradients *to);
double attn_tnl_core_flops(const tnl_core *core);
attn_status attn_tnl_check_heads(int64_t e, int64_t heads);

/* ---- SGLU, and a layer (tnl_layer.c) ---- */

typedef struct tnl_sglu {
    int64_t rows, c, f;
    const float *w_1, *w_2, *w_3;
} tnl_sglu;

attn_status attn_tnl_sglu_forward(attn_call *call, const tnl_sglu *sglu, const float *x, float *o);
/* grad_x is overwritten, the weights' gradients are added to; each may be NULL. */
attn_status attn_tnl_sglu_backward(attn_call *call, const tnl_sglu *sglu, const float *x, const float *grad_o,
                                   float *grad_x, float *grad_1, float *grad_2, float *grad_3);

typedef struct tnl_layer {
    tnl_core core;
    tnl_sglu sglu;
} tnl_layer;

typedef struct tnl_layer_gradients {
    tnl_core_gradients core;
    float *w_1, *w_2, *w_3;
} tnl_layer_gradients;

/* o may be x. */
attn_status attn_tnl_layer_forward(attn_call *call, const tnl_layer *layer, const float *x, float *o, float *state_out);
/* grad_x may be grad_o. */
attn_status attn_tnl_layer_backward(attn_call *call, const tnl_layer *layer, const float *x, const float *grad_o,
                                    float *grad_x, const tnl_layer_gradients *to);

#endif
