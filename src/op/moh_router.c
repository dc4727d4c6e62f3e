/* The router of mixture-of-head attention, and moh.gates, which is it alone. */
#include "op/moh.h"

#include "layer/linear.h"

#include <string.h>

static attn_status soft_linear(attn_call *call, const moh_router *r, const float *w, int64_t count, float **soft, float *logits)
{
    *soft = attn_scratch_f32(call, r->tokens * count);
    if (*soft == NULL) {
        return attn_fail_memory((size_t)(r->tokens * count) * sizeof(float));
    }
    if (w == NULL) {
        for (int64_t i = 0; i < r->tokens * count; i++) {
            (*soft)[i] = 1;
        }
        return ATTN_OK;
    }
    ATTN_TRY(attn_linear_forward(call->arena, call->threads, r->tokens, r->width, count, r->x, w, NULL, *soft));
    if (logits != NULL) {
        memcpy(logits, *soft, (size_t)(r->tokens * count) * sizeof(float));
    }
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t t = 0; t < r->tokens; t++) {
        attn_softmax_row(count, *soft + t * count);
    }
    return ATTN_OK;
}

void attn_moh_choose(int64_t count, int64_t chosen, const float *x, int64_t *indices, uint8_t *mask)
{
    attn_top_k(count, chosen, x, indices);
    for (int64_t j = 0; j < count; j++) {
        mask[j] = 0;
    }
    for (int64_t k = 0; k < chosen; k++) {
        mask[indices[k]] = 1;
    }
}

/* Softmax over the chosen routed heads only; 0 for the others. */
static double chosen_sum(const moh_router *r, int64_t t, const uint8_t *mask)
{
    double sum = 0;
    for (int64_t j = 0; j < r->routed; j++) {
        sum += mask[t * (r->shared + r->routed) + r->shared + j] ? (double)r->p[t * r->routed + j] : 0;
    }
    return sum;
}

static double group_factor(const moh_router *r, int64_t t, int group)
{
    return r->wg_0 == NULL ? 1 : (r->official ? 2 : 1) * (double)r->alpha[2 * t + group];
}

attn_status attn_moh_route(attn_call *call, moh_router *r, uint8_t *mask, float *gates, float *loss)
{
    int64_t heads = r->shared + r->routed;
    float *logits = attn_scratch_f32(call, r->tokens * r->routed);
    int64_t *indices = attn_arena_array(call->arena, (size_t)(r->tokens * r->chosen), sizeof *indices);
    if (logits == NULL || indices == NULL) {
        return attn_fail_memory((size_t)(r->tokens * r->routed) * sizeof(float));
    }
    ATTN_TRY(soft_linear(call, r, r->wg, r->chosen > 0 ? r->routed : 0, &r->p, logits));
    ATTN_TRY(soft_linear(call, r, r->wg_1, r->shared, &r->s, NULL));
    ATTN_TRY(soft_linear(call, r, r->wg_0, 2, &r->alpha, NULL));
    if (mask == NULL) {
        return ATTN_OK;
    }
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t t = 0; t < r->tokens; t++) {
        uint8_t *m = mask + t * heads;
        float *g = gates + t * heads;
        memset(m, 1, (size_t)r->shared);
        for (int64_t i = 0; i < r->shared; i++) {
            g[i] = (float)((double)r->s[t * r->shared + i] * (r->official ? (double)r->shared : 1) * group_factor(r, t, 0));
        }
        if (r->chosen == 0) {
            continue;
        }
        attn_moh_choose(r->routed, r->chosen, logits + t * r->routed, indices + t * r->chosen, m + r->shared);
        double scale = (r->official ? (double)r->chosen / chosen_sum(r, t, mask) : 1) * group_factor(r, t, 1);
        for (int64_t j = 0; j < r->routed; j++) {
            g[r->shared + j] = m[r->shared + j] ? (float)((double)r->p[t * r->routed + j] * scale) : 0.0f;
        }
    }
    double total = 0;
    for (int64_t j = 0; j < r->routed && r->chosen > 0; j++) {
        double probability = 0, share = 0;
        for (int64_t t = 0; t < r->tokens; t++) {
            probability += (double)r->p[t * r->routed + j];
            share += mask[t * heads + r->shared + j];
        }
        total += probability * share;
    }
    double count = (double)r->tokens;
    *loss = r->tokens > 0 ? (float)(total / (count * count) * (r->official ? (double)r->routed : 1)) : 0.0f;
    return ATTN_OK;
}

attn_status attn_moh_route_back(attn_call *call, const moh_router *r, const uint8_t *mask, int x, int wg, int gates, int loss,
                                const float *grad_gates)
{
    int64_t heads = r->shared + r->routed, routed = r->chosen > 0 ? r->routed : 0;
    const float *given = attn_f32(call->grad[gates]);
    double grad_loss = call->grad[loss] != NULL ? (double)attn_f32(call->grad[loss])[0] : 0;
    double tokens = (double)r->tokens, *weight = attn_arena_array(call->arena, (size_t)routed, sizeof *weight);
    float *dr = attn_scratch_f32(call, r->tokens * routed), *ds = attn_scratch_f32(call, r->tokens * r->shared);
    float *da = attn_scratch_f32(call, r->tokens * 2), *dg = attn_scratch_f32(call, r->tokens * heads);
    if (weight == NULL || dr == NULL || ds == NULL || da == NULL || dg == NULL) {
        return attn_fail_memory((size_t)(r->tokens * heads) * sizeof(float));
    }
    for (int64_t j = 0; j < routed; j++) {
        double share = 0;
        for (int64_t t = 0; t < r->tokens; t++) {
            share += mask[t * heads + r->shared + j];
        }
        weight[j] = grad_loss * (r->official ? (double)r->routed : 1) * share / (tokens * tokens);
    }
    for (int64_t i = 0; i < r->tokens * heads; i++) {
        dg[i] = mask[i] ? (given != NULL ? given[i] : 0) + (grad_gates != NULL ? grad_gates[i] : 0) : 0.0f;
    }
    for (int64_t t = 0; t < r->tokens; t++) {
        const uint8_t *m = mask + t * heads + r->shared;
        const float *p = r->p + t * routed, *s = r->s + t * r->shared, *g = dg + t * heads;
        double factor = r->official ? (double)r->shared : 1, inner = 0, loss_inner = 0, group[2] = {0, 0};
        for (int64_t i = 0; i < r->shared; i++) {
            inner += (double)s[i] * (double)g[i];
        }
        group[0] = factor * inner;
        for (int64_t i = 0; i < r->shared; i++) {
            ds[t * r->shared + i] = (float)(group_factor(r, t, 0) * factor * (double)s[i] * ((double)g[i] - inner));
        }
        double sum = routed > 0 && r->official ? chosen_sum(r, t, mask) : 1, scale = r->official ? (double)r->chosen : 1;
        inner = 0;
        for (int64_t j = 0; j < routed; j++) {
            inner += m[j] ? (double)p[j] / sum * (double)g[r->shared + j] : 0;
            loss_inner += (double)p[j] * weight[j];
        }
        group[1] = scale * inner;
        for (int64_t j = 0; j < routed; j++) {
            double own = m[j] ? (double)g[r->shared + j] : 0, share = (double)p[j] / sum;
            double slope = m[j] || !r->official ? group_factor(r, t, 1) * scale * share * (own - inner) : 0;
            dr[t * routed + j] = (float)(slope + (double)p[j] * (weight[j] - loss_inner));
        }
        for (int i = 0; i < 2; i++) {
            double a = (double)r->alpha[2 * t + i], b = (double)r->alpha[2 * t + 1 - i];
            da[2 * t + i] = (float)((r->official ? 2 : 1) * a * b * (group[i] - group[1 - i]));
        }
    }
    const float *weights[] = {r->wg, r->wg_0, r->wg_1}, *logits[] = {dr, da, ds};
    const int64_t counts[] = {routed, 2, r->shared};
    for (int i = 0; i < 3; i++) {
        if (weights[i] != NULL) {
            ATTN_TRY(attn_linear_backward_add(call->arena, call->threads, r->tokens, r->width, counts[i], r->x, weights[i], logits[i],
                                              attn_f32(call->grad[x]), attn_f32(call->grad[wg + i]), NULL));
        }
    }
    return ATTN_OK;
}

attn_status attn_moh_check_counts(int64_t heads, int64_t shared, int64_t chosen)
{
    if (shared > heads) {
        return attn_fail(ATTN_ERR_ARGUMENT, "shared_heads = %lld, expected 0 ... H = %lld", (long long)shared, (long long)heads);
    }
    if (chosen > heads - shared) {
        return attn_fail(ATTN_ERR_ARGUMENT, "top_k = %lld, expected at most the %lld routed heads", (long long)chosen,
                         (long long)(heads - shared));
    }
    if (chosen == 0 && shared < heads) {
        return attn_fail(ATTN_ERR_ARGUMENT, "top_k = 0 needs shared_heads = H = %lld, got %lld", (long long)heads, (long long)shared);
    }
    return ATTN_OK;
}

static attn_status check_weight(const attn_call *call, int port, const char *name, int needed, int64_t rows, const char *when)
{
    const attn_tensor *t = call->t[port];
    if ((t != NULL) != needed) {
        return attn_fail(ATTN_ERR_ARGUMENT, "%s is %s: it belongs to calls with %s", name, needed ? "missing" : "superfluous", when);
    }
    if (t != NULL && t->shape[0] != rows) {
        return attn_fail(ATTN_ERR_SHAPE, "%s has %lld rows, expected %lld", name, (long long)t->shape[0], (long long)rows);
    }
    return ATTN_OK;
}

attn_status attn_moh_check_router(const attn_call *call, int wg, int64_t heads, int64_t shared, int64_t chosen)
{
    ATTN_TRY(attn_moh_check_counts(heads, shared, chosen));
    ATTN_TRY(check_weight(call, wg, "wg", chosen > 0, heads - shared, "top_k > 0"));
    ATTN_TRY(check_weight(call, wg + 1, "wg_0", shared > 0 && chosen > 0, 2, "shared_heads > 0 and top_k > 0"));
    return check_weight(call, wg + 2, "wg_1", shared > 1, shared, "shared_heads > 1");
}

moh_router attn_moh_router(const attn_call *call, int x, int wg, int64_t heads, int64_t shared, int64_t chosen, int64_t gate_norm)
{
    return (moh_router){.tokens = attn_dim(call, "B") * attn_dim(call, "N"), .width = attn_dim(call, "C"), .shared = shared,
                        .routed = heads - shared, .chosen = chosen, .official = gate_norm == MOH_OFFICIAL, .x = attn_f32(call->t[x]),
                        .wg = attn_f32(call->t[wg]), .wg_0 = attn_f32(call->t[wg + 1]), .wg_1 = attn_f32(call->t[wg + 2])};
}

/* ---- moh.gates ---- */

typedef struct gates_params {
    int64_t heads, shared_heads, top_k, gate_norm;
} gates_params;

static const attn_param_info gates_param_table[] = {
    ATTN_P_INT("heads", gates_params, heads, NULL, 1, INFINITY, "heads in all"),
    ATTN_P_INT("shared_heads", gates_params, shared_heads, NULL, 0, INFINITY, "heads that every token uses: the first ones"),
    ATTN_P_INT("top_k", gates_params, top_k, NULL, 0, INFINITY, "routed heads per token; 0 only when all heads are shared"),
    ATTN_P_CHOICE("gate_norm", gates_params, gate_norm, "official", "official|paper", "as in moh"),
};

enum { G_X, G_WG, G_WG_0, G_WG_1, G_GATES, G_MASK, G_LB_LOSS };

static const attn_port_info gates_ports[] = {
    ATTN_IN("x", "B,N,C", FLOAT, ATTN_PORT_DIFF, "the layer's input"),
    ATTN_IN("wg", "E,C", FLOAT, ATTN_PORT_DIFF | ATTN_PORT_OPTIONAL, "router of the routed heads (absent when top_k = 0)"),
    ATTN_IN("wg_0", "2,C", FLOAT, ATTN_PORT_DIFF | ATTN_PORT_OPTIONAL, "gate between shared and routed heads (when there are both)"),
    ATTN_IN("wg_1", "Hs,C", FLOAT, ATTN_PORT_DIFF | ATTN_PORT_OPTIONAL, "weights within the shared heads (when there are several)"),
    ATTN_OUT("gates", "B,N,H", FLOAT, ATTN_PORT_DIFF, "weight of each head"),
    ATTN_OUT("mask", "B,N,H", BOOL, 0, "heads in use"),
    ATTN_OUT("lb_loss", "1", FLOAT, ATTN_PORT_DIFF, "load balance of the routed heads"),
};

static attn_status gates_bind(attn_call *call)
{
    const gates_params *p = call->params;
    attn_set_dim(call, "H", p->heads);
    return attn_moh_check_router(call, G_WG, p->heads, p->shared_heads, p->top_k);
}

static moh_router gates_router(const attn_call *call)
{
    const gates_params *p = call->params;
    return attn_moh_router(call, G_X, G_WG, p->heads, p->shared_heads, p->top_k, p->gate_norm);
}

static attn_status gates_forward(attn_call *call)
{
    moh_router r = gates_router(call);
    return attn_moh_route(call, &r, attn_bool(call->t[G_MASK]), attn_f32(call->t[G_GATES]), attn_f32(call->t[G_LB_LOSS]));
}

static attn_status gates_backward(attn_call *call)
{
    moh_router r = gates_router(call);
    ATTN_TRY(attn_moh_route(call, &r, NULL, NULL, NULL));
    return attn_moh_route_back(call, &r, attn_bool(call->t[G_MASK]), G_X, G_WG, G_GATES, G_LB_LOSS, NULL);
}

const attn_op_class attn_op_moh_gates = {
    .info = {.name = "moh.gates",
             .title = "The router of mixture-of-head attention alone",
             .summary = "Which heads each token uses and how they are weighed, as in moh, with the load-balance loss.",
             .paper = "arXiv:2410.11842",
             .differentiable = 1,
             ATTN_TABLE(gates_param_table, gates_ports)},
    .params_size = sizeof(gates_params),
    .bind = gates_bind,
    .forward = gates_forward,
    .backward = gates_backward,
};
