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
    const float *k_given, *v_given, *k_start, *v_start;
    float *k_end, *v_end; /* [B*H][ends][d], made by attn_rat_core_open when NULL */
    /* The rest is attn_rat_core_open's: */
    int64_t ends;           /* complete chunks, those before included */
    float *k_last, *v_last; /* [B*H][d]: the running pair, not rotated */
    float *table;           /* of chunks from steps/chunk on: cosines, sines and negative sines */
} rat_core;

/* Some tokens: [B][Hq|Hk|H|H|H] heads that lie `stride` tokens of d numbers apart. */
typedef struct rat_rows {
    int64_t first, count, stride; /* first: of the n tokens */
    const float *q, *k, *v, *g;
    float *o;
} rat_rows;

/* Memory for the state, and what is given of it. */
attn_status attn_rat_core_open(attn_call *call, rat_core *core);
/* All tokens in order, in one call or several. Goes through them in tiles: scratch memory does not depend on their number. */
attn_status attn_rat_core_forward(attn_call *call, rat_core *core, const rat_rows *rows);

/* o is incoming; v and g are overwritten, q and k are added to. Each may be NULL but o. */
typedef struct rat_gradients {
    const float *o;
    float *q, *k, *v, *g;
} rat_gradients;

/* Of all tokens at once, heads n tokens apart. Opens the core and runs it forward itself; steps must be 0. rows->o is not used. */
attn_status attn_rat_core_backward(attn_call *call, rat_core *core, const rat_rows *rows,
                                   const rat_gradients *gradients);

#endif
