/* Mixtures of experts as Branch-Attend-Mix makes them: the router, attention experts and feed-forward experts, for the operators of the
 * family. An expert works on the list of tokens that use it (all of them in soft routing). */
#ifndef ATTN_OP_BAM_H
#define ATTN_OP_BAM_H

#include "exec/stairs.h"
#include "layer/ffn.h"
#include "layer/route.h"
#include "op/class.h"

/* ---- bam_route.c ---- */

typedef struct bam_choice {
    int64_t tokens, experts, chosen; /* chosen 0: all experts for every token */
    float *p;                        /* [tokens, experts], the full softmax */
    int64_t *indices;                /* [tokens, chosen] or NULL */
    double *lse;                     /* [tokens] of the logits */
    attn_lists lists;                /* tokens of each expert */
} bam_choice;

/* tokens, experts and chosen are set. x [tokens, width], w [experts, width]. */
attn_status attn_bam_route(attn_call *call, bam_choice *choice, int64_t width, const float *x, const float *w);
/* gates (NULL: not wanted): the full softmax; applied: 0 where an expert was not chosen. */
void attn_bam_write_choice(const bam_choice *choice, int applied, attn_tensor *gates, attn_tensor *indices);
/* The rows [count, width] of expert e's tokens: x itself when it has all of them, else gathered into `rows`. */
const float *attn_bam_rows(const attn_call *call, const bam_choice *choice, int64_t e, int64_t width, const float *x, float *rows);
/* rows[i] *= the gate of expert e for its token first + i, `count` of them */
void attn_bam_weigh(const attn_call *call, const bam_choice *choice, int64_t e, int64_t first, int64_t count, int64_t width, float *rows);
/* A gradient's memory, or zeroed scratch when nobody wants it (or it is not given); NULL when memory is short. */
float *attn_bam_gradient(attn_call *call, const attn_tensor *grad, int64_t count);

static inline int64_t bam_count(const bam_choice *r, int64_t e) { return r->lists.first[e + 1] - r->lists.first[e]; }
static inline const int64_t *bam_list(const bam_choice *r, int64_t e) { return r->lists.token + r->lists.first[e]; }

/* ---- bam_attention.c ---- */

typedef struct bam_moa_params {
    int64_t heads, kv_heads, causal, rope_style, top_k, decode;
    double scale, rope_theta;
} bam_moa_params;

#define BAM_MOA_ENTRIES(S, F)                                                                                                  \
    ATTN_P_INT("heads", S, F heads, NULL, 1, INFINITY, "query heads of each expert"),                                          \
    ATTN_P_INT("kv_heads", S, F kv_heads, NULL, 1, INFINITY, "key/value heads of each expert; divides heads"),                 \
    ATTN_P_BOOL("causal", S, F causal, "true", "tokens see only earlier ones and themselves"),                                 \
    ATTN_P_SCALE(S, F scale),                                                                                                  \
    ATTN_P_FLOAT("rope_theta", S, F rope_theta, "0", 0, INFINITY, "base of the rotary positions; 0: none"),                    \
    ATTN_P_CHOICE("rope_style", S, F rope_style, "half", "half|interleaved", "pairs (d, d + D/2) or (2d, 2d + 1)"),            \
    ATTN_P_BOOL("decode", S, F decode, "false", "run token by token with caches; the result is the same")

typedef struct bam_moa {
    const bam_moa_params *p;
    int64_t batch, n, width, experts, kv_sets, d, dv; /* kv_sets: experts, or 1 when keys and values are shared */
    double scale;
    const float *x, *w_router, *w_q, *w_k, *w_v, *w_o;
    bam_choice route;
    float *table;       /* rotary, or NULL */
    float *k, *v;       /* [batch][kv_sets][Hkv][n][d or dv] */
    float *q, *o, *lse; /* per expert, head and row of its list */
    attn_stairs stairs;
} bam_moa;

/* From tensors: router, w_q, w_k, w_v, w_o lie at ports first ... of the call; x is set by the caller. top_k: that parameter's name. */
attn_status attn_bam_moa_setup(const attn_call *call, const bam_moa_params *p, const char *top_k, int first, bam_moa *moa);
/* y [tokens, C] is added to. */
attn_status attn_bam_moa_forward(attn_call *call, bam_moa *moa, float *y);
/* x [tokens, C] and the gradients of router, w_q ... w_o at ports first ... of the call are added to. grad_gates may be NULL. */
attn_status attn_bam_moa_backward(attn_call *call, bam_moa *moa, const float *grad_y, const float *grad_gates, float *x, int first);
void attn_bam_moa_cost(const bam_moa *moa, attn_cost *cost);

/* ---- bam_ffn.c ---- */

typedef struct bam_ffn {
    int64_t tokens, width, experts, hidden, chosen;
    const float *x, *w_router, *w_up, *w_down;
    bam_choice route;
} bam_ffn;

/* As above; router, w_up, w_down. */
attn_status attn_bam_ffn_setup(const attn_call *call, int64_t chosen, const char *top_k, int first, bam_ffn *ffn);
attn_status attn_bam_ffn_forward(attn_call *call, bam_ffn *ffn, float *y, float *lb_loss, float *z_loss);
/* lb_loss, z_loss: their gradients, or NULL. */
attn_status attn_bam_ffn_backward(attn_call *call, bam_ffn *ffn, const float *grad_y, const float *grad_gates, const attn_tensor *lb_loss,
                                  const attn_tensor *z_loss, float *x, int first);
double attn_bam_ffn_flops(const bam_ffn *ffn);

#endif
