/* Mixture-of-head attention: its router and the attention of the heads that were chosen, for the operators of the family. */
#ifndef ATTN_OP_MOH_H
#define ATTN_OP_MOH_H

#include "exec/stairs.h"
#include "layer/route.h"
#include "op/class.h"

/* ---- moh_router.c: the router with weights ---- */

enum { MOH_OFFICIAL, MOH_PAPER };

typedef struct moh_router {
    int64_t tokens, width, shared, routed, chosen; /* T, C, Hs, E, K */
    int official;
    const float *x, *wg, *wg_0, *wg_1;
    float *p, *s, *alpha; /* softmax over routed [T,E], shared [T,Hs], groups [T,2] */
} moh_router;

/* shared + routed heads; K of the routed ones. */
attn_status attn_moh_check_counts(int64_t heads, int64_t shared, int64_t chosen);
/* The weights lie at ports wg, wg + 1 (wg_0) and wg + 2 (wg_1). */
attn_status attn_moh_check_router(const attn_call *call, int wg, int64_t heads, int64_t shared, int64_t chosen);
moh_router attn_moh_router(const attn_call *call, int x, int wg, int64_t heads, int64_t shared, int64_t chosen, int64_t gate_norm);
/* p, s, alpha; and, when mask is not NULL, the choice [T,H], the gates [T,H] and the loss [1]. */
attn_status attn_moh_route(attn_call *call, moh_router *router, uint8_t *mask, float *gates, float *loss);
/* Gradients at ports x and wg ... of the call, added to, from those of the gates [T,H] (those at port `gates`, where heads are chosen, plus
 * `grad_gates`, which may be NULL) and of the loss; attn_moh_route() has filled p, s and alpha. */
attn_status attn_moh_route_back(attn_call *call, const moh_router *router, const uint8_t *mask, int x, int wg, int gates, int loss,
                                const float *grad_gates);
/* Mark the `chosen` largest of x [count]; of equal ones the lower index. */
void attn_moh_choose(int64_t count, int64_t chosen, const float *x, int64_t *indices, uint8_t *mask);

/* ---- moh_lists.c: attention of the chosen heads ---- */

/* Rows of all heads, those of head h of batch item b in list b * H + h, in the order of the lists. */
typedef struct moh_lists {
    attn_lists lists;
    attn_stairs stairs;
    float *o, *lse;
} moh_lists;

/* mask [B,N,H]. decode: token by token. */
attn_status attn_moh_attend(attn_call *call, const uint8_t *mask, const attn_tensor *q, const attn_tensor *k, const attn_tensor *v,
                            double scale, int causal, int decode, moh_lists *to);
/* Rows times their gates [B,N,H], in place, and into o [B,H,N,Dv], which is 0 elsewhere. gates NULL: all 1. */
void attn_moh_scatter(const attn_call *call, moh_lists *lists, const float *gates, float *o);
/* Rows [rows][Dv] in the order of the lists from a [B,H,N,Dv] gradient (NULL: 0); NULL when memory is short. */
float *attn_moh_gather_gradient(attn_call *call, const moh_lists *lists, const attn_tensor *grad_o);
/* Backward of the attention: grad_rows is the gradient of the gated outputs in the order of the lists and becomes that of the ungated ones
 * (which the lists hold); grad_gates [B,N,H] is added to at the chosen heads. q, k, v: ports with gradients. */
attn_status attn_moh_attend_back(attn_call *call, const moh_lists *lists, const float *gates, float *grad_rows, float *grad_gates,
                                 int q, int k, int v);
/* Pairs and their flops, for `active` heads per token. */
void attn_moh_cost(const attn_call *call, int64_t active, int causal, attn_cost *cost);

#endif
