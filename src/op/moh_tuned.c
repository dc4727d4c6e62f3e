/* Mixture-of-head attention for pre-trained models: a router without weights, moh.norm_gates, and attention with it, moh.tuned. */
#include "op/moh.h"

#include <string.h>

static void norm_of_rows(const attn_call *call, int64_t shared, int64_t b, int64_t n, double *norms, double *mean, double *deviation)
{
    int64_t heads = attn_dim(call, "H"), length = attn_dim(call, "N"), d = attn_dim(call, "D"), routed = heads - shared;
    *mean = 0;
    for (int64_t j = 0; j < routed; j++) {
        const float *q = attn_f32(call->t[0]) + ((b * heads + shared + j) * length + n) * d;
        double sum = 0;
        for (int64_t c = 0; c < d; c++) {
            sum += (double)q[c] * (double)q[c];
        }
        norms[j] = sqrt(sum);
        *mean += norms[j] / (double)routed;
    }
    double square = 0;
    for (int64_t j = 0; j < routed; j++) {
        square += (norms[j] - *mean) * (norms[j] - *mean);
    }
    *deviation = sqrt(square / (double)(routed - 1));
    /* Norms that are equal up to rounding count as equal. */
    if (*deviation <= 1e-12 * *mean) {
        *deviation = 0;
    }
}

static attn_status norm_route(attn_call *call, int64_t shared, int64_t chosen, float *scores, uint8_t *mask)
{
    int64_t batch = attn_dim(call, "B"), heads = attn_dim(call, "H"), length = attn_dim(call, "N"), routed = heads - shared;
    double *norms = attn_arena_array(call->arena, (size_t)(batch * length * routed), sizeof *norms);
    float *single = attn_scratch_f32(call, batch * length * routed);
    int64_t *indices = attn_arena_array(call->arena, (size_t)(batch * length * chosen), sizeof *indices);
    if (norms == NULL || single == NULL || indices == NULL) {
        return attn_fail_memory((size_t)(batch * length * routed) * sizeof *norms);
    }
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t t = 0; t < batch * length; t++) {
        double mean, deviation, *own = norms + t * routed;
        norm_of_rows(call, shared, t / length, t % length, own, &mean, &deviation);
        for (int64_t j = 0; j < routed; j++) {
            single[t * routed + j] = deviation > 0 ? (float)own[j] : 0.0f;
            scores[t * routed + j] = deviation > 0 ? (float)(own[j] / deviation) : 0.0f;
        }
        attn_softmax_row(routed, scores + t * routed);
        memset(mask + t * heads, 1, (size_t)shared);
        attn_moh_choose(routed, chosen, single + t * routed, indices + t * chosen, mask + t * heads + shared);
    }
    return ATTN_OK;
}

/* grad_scores [T,E] to the gradient of q_route (port 0). The scores are computed again in double: with two routed heads they are constant,
 * and a float's rounding would be divided by a deviation that may be small. */
static attn_status norm_route_back(attn_call *call, int64_t shared, const float *grad_scores, float *to)
{
    int64_t batch = attn_dim(call, "B"), heads = attn_dim(call, "H"), length = attn_dim(call, "N"), d = attn_dim(call, "D");
    int64_t routed = heads - shared;
    double *memory = attn_arena_array(call->arena, (size_t)(batch * length * routed), 2 * sizeof *memory);
    if (memory == NULL) {
        return attn_fail_memory((size_t)(batch * length * routed) * 2 * sizeof *memory);
    }
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t t = 0; t < batch * length; t++) {
        double mean, deviation, *norms = memory + 2 * t * routed, *s = norms + routed, top = 0, sum = 0, inner = 0, along = 0;
        norm_of_rows(call, shared, t / length, t % length, norms, &mean, &deviation);
        if (deviation == 0) {
            continue;
        }
        const float *g = grad_scores + t * routed;
        for (int64_t j = 0; j < routed; j++) {
            top = fmax(top, norms[j]);
        }
        for (int64_t j = 0; j < routed; j++) {
            s[j] = exp((norms[j] - top) / deviation);
            sum += s[j];
        }
        for (int64_t j = 0; j < routed; j++) {
            s[j] /= sum;
            inner += s[j] * (double)g[j];
        }
        for (int64_t j = 0; j < routed; j++) {
            s[j] *= (double)g[j] - inner;
            along -= s[j] * (norms[j] - mean); /* the slopes s add up to 0 */
        }
        for (int64_t j = 0; j < routed; j++) {
            double slope = (s[j] + along * (norms[j] - mean) / ((double)(routed - 1) * deviation * deviation)) / deviation;
            int64_t at = ((t / length * heads + shared + j) * length + t % length) * d;
            for (int64_t c = 0; c < d && norms[j] > 0; c++) {
                to[at + c] = (float)(slope / norms[j] * (double)attn_f32(call->t[0])[at + c]);
            }
        }
    }
    return ATTN_OK;
}

static attn_status check_norm_router(int64_t heads, int64_t shared, int64_t chosen)
{
    if (heads - shared < 2) {
        return attn_fail(ATTN_ERR_ARGUMENT, "shared_heads = %lld leaves %lld routed heads of H = %lld, expected at least 2",
                         (long long)shared, (long long)(heads - shared), (long long)heads);
    }
    return attn_moh_check_counts(heads, shared, chosen);
}

/* ---- moh.norm_gates and moh.tuned ---- */

typedef struct tuned_params {
    int64_t shared_heads, top_k, causal;
    double scale;
} tuned_params;

static const attn_param_info norm_param_table[] = {
    ATTN_P_INT("shared_heads", tuned_params, shared_heads, NULL, 0, INFINITY, "heads that every token uses: the first ones"),
    ATTN_P_INT("top_k", tuned_params, top_k, NULL, 1, INFINITY, "routed heads per token"),
};

static const attn_param_info tuned_param_table[] = {
    ATTN_P_INT("shared_heads", tuned_params, shared_heads, NULL, 0, INFINITY, "heads that every token uses: the first ones"),
    ATTN_P_INT("top_k", tuned_params, top_k, NULL, 1, INFINITY, "routed heads per token"),
    ATTN_P_BOOL("causal", tuned_params, causal, "true", "the last query sees the last key"),
    ATTN_P_SCALE(tuned_params, scale),
};

enum { N_Q_ROUTE, N_SCORES, N_MASK };

static const attn_port_info norm_ports[] = {
    ATTN_IN("q_route", "B,H,N,D", FLOAT, ATTN_PORT_DIFF, "projected queries before rotary positions"),
    ATTN_OUT("scores", "B,N,E", FLOAT, ATTN_PORT_DIFF, "softmax over the routed heads"),
    ATTN_OUT("mask", "B,N,H", BOOL, 0, "heads in use"),
};

static attn_status norm_bind(attn_call *call)
{
    const tuned_params *p = call->params;
    attn_set_dim(call, "E", attn_dim(call, "H") - p->shared_heads);
    return check_norm_router(attn_dim(call, "H"), p->shared_heads, p->top_k);
}

static attn_status norm_forward(attn_call *call)
{
    const tuned_params *p = call->params;
    return norm_route(call, p->shared_heads, p->top_k, attn_f32(call->t[N_SCORES]), attn_bool(call->t[N_MASK]));
}

static attn_status norm_backward(attn_call *call)
{
    const tuned_params *p = call->params;
    if (call->grad[N_Q_ROUTE] == NULL || call->grad[N_SCORES] == NULL) {
        return ATTN_OK;
    }
    return norm_route_back(call, p->shared_heads, attn_f32(call->grad[N_SCORES]), attn_f32(call->grad[N_Q_ROUTE]));
}

const attn_op_class attn_op_moh_norm_gates = {
    .info = {.name = "moh.norm_gates",
             .title = "Router of mixture-of-head attention without parameters",
             .summary = "Chooses, for each token, the routed heads whose queries are longest: the start of continued training from a model "
                        "with ordinary attention.",
             .paper = "arXiv:2410.11842",
             .differentiable = 1,
             ATTN_TABLE(norm_param_table, norm_ports)},
    .params_size = sizeof(tuned_params),
    .bind = norm_bind,
    .forward = norm_forward,
    .backward = norm_backward,
};

enum { T_Q_ROUTE, T_Q, T_K, T_V, T_O, T_SCORES, T_MASK };

static const attn_port_info tuned_ports[] = {
    ATTN_IN("q_route", "B,H,N,D", FLOAT, ATTN_PORT_DIFF, "projected queries before rotary positions, for the router"),
    ATTN_IN("q", "B,H,N,D", FLOAT, ATTN_PORT_DIFF, "queries"),
    ATTN_IN("k", "B,Hkv,M,D", FLOAT, ATTN_PORT_DIFF, "keys"),
    ATTN_IN("v", "B,Hkv,M,Dv", FLOAT, ATTN_PORT_DIFF, "values"),
    ATTN_OUT("o", "B,H,N,Dv", FLOAT, ATTN_PORT_DIFF, "head outputs; 0 for heads that were not chosen"),
    ATTN_OUT("scores", "B,N,E", FLOAT, ATTN_PORT_DIFF, "softmax over the routed heads"),
    ATTN_OUT("mask", "B,N,H", BOOL, 0, "heads in use"),
};

static attn_status attend(attn_call *call, moh_lists *x)
{
    const tuned_params *p = call->params;
    return attn_moh_attend(call, attn_bool(call->t[T_MASK]), call->t[T_Q], call->t[T_K], call->t[T_V],
                           attn_default_scale(p->scale, attn_dim(call, "D")), (int)p->causal, 0, x);
}

static attn_status tuned_forward(attn_call *call)
{
    const tuned_params *p = call->params;
    moh_lists x;
    ATTN_TRY(norm_route(call, p->shared_heads, p->top_k, attn_f32(call->t[T_SCORES]), attn_bool(call->t[T_MASK])));
    ATTN_TRY(attend(call, &x));
    attn_moh_scatter(call, &x, NULL, attn_f32(call->t[T_O]));
    return ATTN_OK;
}

/* Straight through: the gates are 1, their gradients go to the scores of the chosen heads. */
static attn_status tuned_backward(attn_call *call)
{
    const tuned_params *p = call->params;
    int64_t heads = attn_dim(call, "H"), routed = heads - p->shared_heads, tokens = attn_dim(call, "B") * attn_dim(call, "N");
    moh_lists x;
    ATTN_TRY(attend(call, &x));
    float *rows = attn_moh_gather_gradient(call, &x, call->grad[T_O]), *grad_gates = attn_scratch_f32(call, tokens * heads);
    float *grad_scores = attn_scratch_f32(call, tokens * routed);
    if (rows == NULL || grad_gates == NULL || grad_scores == NULL) {
        return attn_fail_memory((size_t)(tokens * heads) * sizeof(float));
    }
    memset(grad_gates, 0, (size_t)(tokens * heads) * sizeof(float));
    ATTN_TRY(attn_moh_attend_back(call, &x, NULL, rows, grad_gates, T_Q, T_K, T_V));
    for (int64_t i = 0; i < tokens * routed; i++) {
        grad_scores[i] = grad_gates[i / routed * heads + p->shared_heads + i % routed];
        grad_scores[i] += call->grad[T_SCORES] != NULL ? attn_f32(call->grad[T_SCORES])[i] : 0.0f;
    }
    return call->grad[T_Q_ROUTE] != NULL ? norm_route_back(call, p->shared_heads, grad_scores, attn_f32(call->grad[T_Q_ROUTE]))
                                         : ATTN_OK;
}

static attn_status tuned_cost(attn_call *call, attn_cost *cost)
{
    const tuned_params *p = call->params;
    attn_moh_cost(call, p->shared_heads + p->top_k, (int)p->causal, cost);
    return ATTN_OK;
}

const attn_op_class attn_op_moh_tuned = {
    .info = {.name = "moh.tuned",
             .title = "Mixture-of-head attention for pre-trained models",
             .summary = "Attention with the router of moh.norm_gates: chosen heads count fully, the others not at all. In training the "
                        "choice gets a straight-through gradient. Work falls with (shared_heads + top_k) / H.",
             .paper = "arXiv:2410.11842",
             .differentiable = 1,
             ATTN_TABLE(tuned_param_table, tuned_ports)},
    .params_size = sizeof(tuned_params),
    .bind = norm_bind,
    .forward = tuned_forward,
    .backward = tuned_backward,
    .cost = tuned_cost,
};
