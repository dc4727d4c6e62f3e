/* The core of RAT, for its operators and for the layers around it. */
#ifndef ATTN_OP_RAT_H
#define ATTN_OP_RAT_H

#include "exec/stairs.h"
#include "op/class.h"

typedef struct rat_core {
    int64_t batch, heads, q_heads, k_heads, n, d, chunk, rotary_dim;
    int64_t steps; /* tokens before the first; then the state is given */
    int tiled;     /* head h reads query and key head h mod (their number), not h / (...) */
    double scale, base;
    const float *q, *k, *v, *g; /* [B][Hq|Hk|H|H][n][d] */
    const float *k_given, *v_given, *k_start, *v_start;
    float *o, *k_last, *v_last; /* k_last and v_last may be NULL */
    /* Made by the forward pass in scratch memory. */
    int64_t ends;          /* complete chunks, those before included */
    float *kr, *vr, *qr;   /* [B*H][n][d]: recurrent keys (rotated) and values, rotated queries */
    float *k_end, *v_end;  /* [B*H][ends][d] */
    float *lse, *table;
    int64_t *end;
    attn_stairs_head *list;
    attn_stairs stairs;
} rat_core;

attn_status rat_core_forward(attn_call *call, rat_core *core);

/* o is incoming; v and g are overwritten, q and k are added to. Each may be NULL but o. */
typedef struct rat_gradients {
    const float *o;
    float *q, *k, *v, *g;
} rat_gradients;

/* Runs the forward pass itself; steps must be 0. */
attn_status rat_core_backward(attn_call *call, rat_core *core, const rat_gradients *gradients);

#endif
