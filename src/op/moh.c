/* Mixture-of-head attention (arXiv:2410.11842): heads are experts; each token uses the shared heads and its top routed ones.
 *
 * For each head the tokens that chose it are gathered, attended to as one block of rows, weighted and scattered. A token that a head
 * does not serve costs that head nothing: no scores, no output projection, no gradient.
 */
#include "op/moh.h"

#include "layer/gemm.h"

#include <string.h>

typedef struct moh_params {
    int64_t shared_heads, top_k, gate_norm, causal, decode;
    double scale;
} moh_params;

static const attn_param_info moh_param_table[] = {
    ATTN_P_INT("shared_heads", moh_params, shared_heads, NULL, 0, INFINITY, "heads that every token uses: the first ones"),
    ATTN_P_INT("top_k", moh_params, top_k, NULL, 0, INFINITY, "routed heads per token; 0 only when all heads are shared"),
    ATTN_P_CHOICE("gate_norm", moh_params, gate_norm, "official", "official|paper",
                  "official: gates are renormalised over the chosen heads and average 1; paper: plain softmax probabilities"),
    ATTN_P_BOOL("causal", moh_params, causal, "false", "the last query sees the last key"),
    ATTN_P_SCALE(moh_params, scale),
    ATTN_P_BOOL("decode", moh_params, decode, "false", "run token by token (causal only); the result is the same"),
};

enum { X, Q, K, V, WG, WG_0, WG_1, W_OUT, B_OUT, O, GATES, MASK, LB_LOSS, Y };

#define DIFF ATTN_PORT_DIFF
#define MAYBE (ATTN_PORT_DIFF | ATTN_PORT_OPTIONAL)

static const attn_port_info moh_ports[] = {
    ATTN_IN("x", "B,N,C", FLOAT, DIFF, "the layer's input at the query positions, for the router"),
    ATTN_IN("q", "B,H,N,D", FLOAT, DIFF, "queries"),
    ATTN_IN("k", "B,Hkv,M,D", FLOAT, DIFF, "keys"),
    ATTN_IN("v", "B,Hkv,M,Dv", FLOAT, DIFF, "values"),
    ATTN_IN("wg", "E,C", FLOAT, MAYBE, "router of the E routed heads (absent when top_k = 0)"),
    ATTN_IN("wg_0", "2,C", FLOAT, MAYBE, "gate between shared and routed heads (when there are both)"),
    ATTN_IN("wg_1", "Hs,C", FLOAT, MAYBE, "weights within the shared heads (when there are several)"),
    ATTN_IN("w_out", "Cout,*", FLOAT, MAYBE, "output projection [Cout, H*Dv]"),
    ATTN_IN("b_out", "Cout", FLOAT, MAYBE, "its bias"),
    ATTN_OUT("o", "B,H,N,Dv", FLOAT, DIFF, "head outputs times their gates; 0 for heads that were not chosen"),
    ATTN_OUT("gates", "B,N,H", FLOAT, DIFF, "weight of each head"),
    ATTN_OUT("mask", "B,N,H", BOOL, 0, "heads in use"),
    ATTN_OUT("lb_loss", "1", FLOAT, DIFF, "load balance of the routed heads"),
    ATTN_OUT("y", "B,N,Cout", FLOAT, MAYBE, "projected output, with w_out"),
};

static attn_status moh_bind(attn_call *call)
{
    const moh_params *p = call->params;
    int64_t width = attn_dim(call, "H") * attn_dim(call, "Dv");
    ATTN_TRY(attn_moh_check_router(call, WG, attn_dim(call, "H"), p->shared_heads, p->top_k));
    if (call->t[W_OUT] == NULL) {
        if (call->t[B_OUT] != NULL) {
            return attn_fail(ATTN_ERR_ARGUMENT, "b_out needs w_out");
        }
        attn_drop_output(call, Y);
    } else if (call->t[W_OUT]->shape[1] != width) {
        return attn_fail(ATTN_ERR_SHAPE, "w_out has %lld columns, expected H*Dv = %lld", (long long)call->t[W_OUT]->shape[1],
                         (long long)width);
    }
    if (p->decode && !p->causal) {
        return attn_fail(ATTN_ERR_ARGUMENT, "decode = true needs causal = true");
    }
    return ATTN_OK;
}

static moh_router router(const attn_call *call)
{
    const moh_params *p = call->params;
    return attn_moh_router(call, X, WG, attn_dim(call, "H"), p->shared_heads, p->top_k, p->gate_norm);
}

static attn_status attend(attn_call *call, moh_lists *x)
{
    const moh_params *p = call->params;
    return attn_moh_attend(call, attn_bool(call->t[MASK]), call->t[Q], call->t[K], call->t[V],
                           attn_default_scale(p->scale, attn_dim(call, "D")), (int)p->causal, (int)p->decode, x);
}

/* y += the gated rows of each head through that head's columns of w_out. */
static attn_status project(attn_call *call, const moh_lists *x, float *y)
{
    int64_t heads = attn_dim(call, "H"), n = attn_dim(call, "N"), dv = x->stairs.dv, cout = attn_dim(call, "Cout");
    const float *w = attn_f32(call->t[W_OUT]), *bias = attn_f32(call->t[B_OUT]);
    float *part = attn_scratch_f32(call, n * cout);
    if (part == NULL) {
        return attn_fail_memory((size_t)(n * cout) * sizeof(float));
    }
    for (int64_t i = 0; i < attn_dim(call, "B") * n * cout; i++) {
        y[i] = bias != NULL ? bias[i % cout] : 0.0f;
    }
    for (int64_t bh = 0; bh < x->lists.count; bh++) {
        int64_t first = x->lists.first[bh], count = x->lists.first[bh + 1] - first;
        ATTN_TRY(attn_gemm(call->arena, call->threads, 0, 1, count, cout, dv, 1.0f, x->o + first * dv, dv, w + bh % heads * dv, heads * dv,
                           0.0f, part, cout));
        attn_rows_scatter_add(call->threads, cout, part, x->lists.token + first, count, y + bh / heads * n * cout);
    }
    return ATTN_OK;
}

static attn_status moh_forward(attn_call *call)
{
    moh_router r = router(call);
    moh_lists x;
    float *gates = attn_f32(call->t[GATES]);
    ATTN_TRY(attn_moh_route(call, &r, attn_bool(call->t[MASK]), gates, attn_f32(call->t[LB_LOSS])));
    ATTN_TRY(attend(call, &x));
    attn_moh_scatter(call, &x, gates, attn_f32(call->t[O]));
    return call->t[W_OUT] != NULL ? project(call, &x, attn_f32(call->t[Y])) : ATTN_OK;
}

/* What y adds: to the gradient of the gated rows, and to those of w_out and b_out. */
static attn_status project_back(attn_call *call, const moh_lists *x, const float *gates, const float *grad_y, float *grad_rows)
{
    int64_t heads = attn_dim(call, "H"), n = attn_dim(call, "N"), dv = attn_dim(call, "Dv"), cout = attn_dim(call, "Cout");
    const float *w = attn_f32(call->t[W_OUT]);
    float *grad_w = attn_f32(call->grad[W_OUT]), *grad_b = attn_f32(call->grad[B_OUT]);
    float *rows_y = attn_scratch_f32(call, n * cout), *rows_o = attn_scratch_f32(call, n * dv);
    if (rows_y == NULL || rows_o == NULL) {
        return attn_fail_memory((size_t)(n * (cout + dv)) * sizeof(float));
    }
    for (int64_t bh = 0; bh < x->lists.count; bh++) {
        int64_t b = bh / heads, h = bh % heads, first = x->lists.first[bh], count = x->lists.first[bh + 1] - first;
        attn_rows_gather(call->threads, cout, grad_y + b * n * cout, x->lists.token + first, count, rows_y);
        for (int64_t i = 0; i < count * dv; i++) {
            rows_o[i] = gates[(b * n + x->lists.token[first + i / dv]) * heads + h] * x->o[first * dv + i];
        }
        ATTN_TRY(attn_gemm(call->arena, call->threads, 0, 0, count, dv, cout, 1.0f, rows_y, cout, w + h * dv, heads * dv, 1.0f,
                           grad_rows + first * dv, dv));
        if (grad_w != NULL) {
            ATTN_TRY(attn_gemm(call->arena, call->threads, 1, 0, cout, dv, count, 1.0f, rows_y, cout, rows_o, dv, 1.0f, grad_w + h * dv,
                               heads * dv));
        }
    }
    for (int64_t c = 0; c < cout && grad_b != NULL; c++) {
        double sum = 0;
        for (int64_t t = 0; t < attn_dim(call, "B") * n; t++) {
            sum += (double)grad_y[t * cout + c];
        }
        grad_b[c] = (float)sum;
    }
    return ATTN_OK;
}

static attn_status moh_backward(attn_call *call)
{
    moh_router r = router(call);
    moh_lists x;
    const float *gates = attn_f32(call->t[GATES]);
    int64_t count = r.tokens * (r.shared + r.routed);
    float *grad_gates = attn_scratch_f32(call, count);
    ATTN_TRY(attn_moh_route(call, &r, NULL, NULL, NULL));
    ATTN_TRY(attend(call, &x));
    float *rows = attn_moh_gather_gradient(call, &x, call->grad[O]);
    if (grad_gates == NULL || rows == NULL) {
        return attn_fail_memory((size_t)count * sizeof(float));
    }
    memset(grad_gates, 0, (size_t)count * sizeof *grad_gates);
    if (call->t[W_OUT] != NULL && call->grad[Y] != NULL) {
        ATTN_TRY(project_back(call, &x, gates, attn_f32(call->grad[Y]), rows));
    }
    ATTN_TRY(attn_moh_attend_back(call, &x, gates, rows, grad_gates, Q, K, V));
    return attn_moh_route_back(call, &r, attn_bool(call->t[MASK]), X, WG, GATES, LB_LOSS, grad_gates);
}

static attn_status moh_cost(attn_call *call, attn_cost *cost)
{
    const moh_params *p = call->params;
    int64_t active = p->shared_heads + p->top_k;
    double tokens = (double)(attn_dim(call, "B") * attn_dim(call, "N"));
    attn_moh_cost(call, active, (int)p->causal, cost);
    cost->flops += 2 * tokens * (double)attn_dim(call, "C") * (double)(attn_dim(call, "H") + 2);
    if (call->t[W_OUT] != NULL) {
        cost->flops += 2 * tokens * (double)(active * attn_dim(call, "Dv")) * (double)attn_dim(call, "Cout");
    }
    return ATTN_OK;
}

const attn_op_class attn_op_moh = {
    .info = {.name = "moh",
             .title = "Mixture-of-head attention: each token uses a few of the heads",
             .summary = "Heads are experts: the shared ones are always on, and a router picks top_k of the others for each token and weighs "
                        "them. 50 to 90 % of the heads keep the accuracy of all. Attention and output projection are computed for the "
                        "chosen (token, head) pairs only, so the time falls with (shared_heads + top_k) / H; keys and values of all "
                        "heads are needed.",
             .paper = "arXiv:2410.11842",
             .differentiable = 1,
             ATTN_TABLE(moh_param_table, moh_ports)},
    .params_size = sizeof(moh_params),
    .bind = moh_bind,
    .forward = moh_forward,
    .backward = moh_backward,
    .cost = moh_cost,
};
