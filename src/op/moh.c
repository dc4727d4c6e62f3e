/* Mixture-of-head attention (arXiv:2410.11842): heads are experts; each token uses the shared heads and its top routed ones.
 *
 * For each head the tokens that chose it are gathered, attended to as one block of rows, weighted and scattered. A token that a head
 * does not serve costs that head nothing: no scores, no output projection, no gradient.
 */
#include "exec/stairs.h"
#include "layer/gemm.h"
#include "layer/linear.h"
#include "layer/route.h"
#include "op/class.h"

#include <string.h>

enum { OFFICIAL, PAPER };

/* ---- The router with weights ---- */

typedef struct router {
    int64_t tokens, width, shared, routed, chosen; /* T, C, Hs, E, K */
    int official;
    const float *x, *wg, *wg_0, *wg_1;
    float *p, *s, *alpha; /* softmax over routed [T,E], shared [T,Hs], groups [T,2] */
} router;

/* Softmax of x w^T into a new array [T, count]; the logits are left in `logits` when that is not NULL. */
static attn_status soft_linear(attn_call *call, const router *r, const float *w, int64_t count, float **soft, float *logits)
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
    for (int64_t t = 0; t < r->tokens; t++) {
        attn_softmax_row(count, *soft + t * count);
    }
    return ATTN_OK;
}

/* Mark the `chosen` largest of `count`. */
static void choose(int64_t count, int64_t chosen, const float *x, int64_t *indices, uint8_t *mask)
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
static double chosen_sum(const router *r, int64_t t, const uint8_t *mask)
{
    double sum = 0;
    for (int64_t j = 0; j < r->routed; j++) {
        sum += mask[t * (r->shared + r->routed) + r->shared + j] ? (double)r->p[t * r->routed + j] : 0;
    }
    return sum;
}

static double group_factor(const router *r, int64_t t, int group)
{
    return r->wg_0 == NULL ? 1 : (r->official ? 2 : 1) * (double)r->alpha[2 * t + group];
}

/* p, s, alpha; and, when mask is not NULL, the choice, the gates and the loss. */
static attn_status route(attn_call *call, router *r, uint8_t *mask, float *gates, float *loss)
{
    int64_t heads = r->shared + r->routed;
    float *logits = attn_scratch_f32(call, r->tokens * r->routed);
    int64_t *indices = attn_arena_array(call->arena, (size_t)r->chosen, sizeof *indices);
    if (logits == NULL || indices == NULL) {
        return attn_fail_memory((size_t)(r->tokens * r->routed) * sizeof(float));
    }
    ATTN_TRY(soft_linear(call, r, r->wg, r->chosen > 0 ? r->routed : 0, &r->p, logits));
    ATTN_TRY(soft_linear(call, r, r->wg_1, r->shared, &r->s, NULL));
    ATTN_TRY(soft_linear(call, r, r->wg_0, 2, &r->alpha, NULL));
    if (mask == NULL) {
        return ATTN_OK;
    }
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
        choose(r->routed, r->chosen, logits + t * r->routed, indices, m + r->shared);
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

typedef struct router_gradients {
    float *x, *wg, *wg_0, *wg_1; /* added to; NULL: not wanted */
} router_gradients;

/* grad_x and the weight's gradient from the gradient of logits [T, count]. */
static attn_status logits_back(attn_call *call, const router *r, int64_t count, const float *w, const float *grad, float *grad_x,
                               float *grad_w)
{
    float *part = grad_x != NULL ? attn_scratch_f32(call, r->tokens * r->width) : NULL;
    if (grad_x != NULL && part == NULL) {
        return attn_fail_memory((size_t)(r->tokens * r->width) * sizeof(float));
    }
    ATTN_TRY(attn_linear_backward(call->arena, call->threads, r->tokens, r->width, count, r->x, w, grad, part, grad_w, NULL));
    for (int64_t i = 0; i < r->tokens * r->width && grad_x != NULL; i++) {
        grad_x[i] += part[i];
    }
    return ATTN_OK;
}

/* From the gradient of the gates [T,H] and of the loss; route() has filled p, s, alpha. */
static attn_status route_back(attn_call *call, const router *r, const uint8_t *mask, const float *grad_gates, double grad_loss,
                              const router_gradients *to)
{
    int64_t heads = r->shared + r->routed, routed = r->chosen > 0 ? r->routed : 0;
    double tokens = (double)r->tokens, *weight = attn_arena_array(call->arena, (size_t)routed, sizeof *weight);
    float *dr = attn_scratch_f32(call, r->tokens * routed), *ds = attn_scratch_f32(call, r->tokens * r->shared);
    float *da = attn_scratch_f32(call, r->tokens * 2);
    if (weight == NULL || dr == NULL || ds == NULL || da == NULL) {
        return attn_fail_memory((size_t)(r->tokens * heads) * sizeof(float));
    }
    for (int64_t j = 0; j < routed; j++) {
        double share = 0;
        for (int64_t t = 0; t < r->tokens; t++) {
            share += mask[t * heads + r->shared + j];
        }
        weight[j] = grad_loss * (r->official ? (double)r->routed : 1) * share / (tokens * tokens);
    }
    for (int64_t t = 0; t < r->tokens; t++) {
        const uint8_t *m = mask + t * heads + r->shared;
        const float *p = r->p + t * routed, *s = r->s + t * r->shared, *g = grad_gates + t * heads;
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
    if (r->wg != NULL) {
        ATTN_TRY(logits_back(call, r, routed, r->wg, dr, to->x, to->wg));
    }
    if (r->wg_1 != NULL) {
        ATTN_TRY(logits_back(call, r, r->shared, r->wg_1, ds, to->x, to->wg_1));
    }
    return r->wg_0 != NULL ? logits_back(call, r, 2, r->wg_0, da, to->x, to->wg_0) : ATTN_OK;
}

static attn_status check_counts(int64_t heads, int64_t shared, int64_t chosen)
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

static attn_status check_router(const attn_call *call, int first, int64_t heads, int64_t shared, int64_t chosen)
{
    ATTN_TRY(check_counts(heads, shared, chosen));
    ATTN_TRY(check_weight(call, first, "wg", chosen > 0, heads - shared, "top_k > 0"));
    ATTN_TRY(check_weight(call, first + 1, "wg_0", shared > 0 && chosen > 0, 2, "shared_heads > 0 and top_k > 0"));
    return check_weight(call, first + 2, "wg_1", shared > 1, shared, "shared_heads > 1");
}

/* ---- The router without weights ---- */

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
    double *norms = attn_arena_array(call->arena, (size_t)routed, sizeof *norms), mean, deviation;
    float *single = attn_scratch_f32(call, routed);
    int64_t *indices = attn_arena_array(call->arena, (size_t)chosen, sizeof *indices);
    if (norms == NULL || single == NULL || indices == NULL) {
        return attn_fail_memory((size_t)routed * sizeof *norms);
    }
    for (int64_t t = 0; t < batch * length; t++) {
        norm_of_rows(call, shared, t / length, t % length, norms, &mean, &deviation);
        float *to = scores + t * routed;
        for (int64_t j = 0; j < routed; j++) {
            to[j] = deviation > 0 ? (float)(norms[j] / deviation) : 0.0f;
            single[j] = deviation > 0 ? (float)norms[j] : 0.0f;
        }
        attn_softmax_row(routed, to);
        memset(mask + t * heads, 1, (size_t)shared);
        choose(routed, chosen, single, indices, mask + t * heads + shared);
    }
    return ATTN_OK;
}

/* grad_scores [T,E] to the gradient of q_route (port 0). */
static attn_status norm_route_back(attn_call *call, int64_t shared, const float *scores, const float *grad_scores, float *to)
{
    int64_t batch = attn_dim(call, "B"), heads = attn_dim(call, "H"), length = attn_dim(call, "N"), d = attn_dim(call, "D");
    int64_t routed = heads - shared;
    double *norms = attn_arena_array(call->arena, (size_t)routed, sizeof *norms), mean, deviation;
    if (norms == NULL) {
        return attn_fail_memory((size_t)routed * sizeof *norms);
    }
    for (int64_t t = 0; t < batch * length; t++) {
        norm_of_rows(call, shared, t / length, t % length, norms, &mean, &deviation);
        if (deviation == 0) {
            continue;
        }
        const float *s = scores + t * routed, *g = grad_scores + t * routed;
        double inner = 0, along = 0;
        for (int64_t j = 0; j < routed; j++) {
            inner += (double)s[j] * (double)g[j];
        }
        for (int64_t j = 0; j < routed; j++) { /* dLoss/d(deviation) */
            along -= (double)s[j] * ((double)g[j] - inner) * norms[j] / (deviation * deviation);
        }
        for (int64_t j = 0; j < routed; j++) {
            double slope = (double)s[j] * ((double)g[j] - inner) / deviation +
                           along * (norms[j] - mean) / ((double)(routed - 1) * deviation);
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
    return check_counts(heads, shared, chosen);
}

/* ---- Attention of the chosen heads ---- */

typedef struct lists {
    attn_stairs stairs;
    int64_t *token;   /* of row r of head h: token[first[h] + r] in 0 ... N-1 */
    int64_t *first;   /* [B*H + 1] */
    float *q, *o, *lse; /* gathered, in the order of the lists */
} lists;

static attn_status build_lists(attn_call *call, const uint8_t *mask, const float *q, const float *k, const float *v, double scale,
                               int causal, lists *to)
{
    int64_t batch = attn_dim(call, "B"), heads = attn_dim(call, "H"), kv_heads = attn_dim(call, "Hkv"), n = attn_dim(call, "N");
    int64_t m = attn_dim(call, "M"), d = attn_dim(call, "D"), dv = attn_dim(call, "Dv"), rows = 0;
    for (int64_t i = 0; i < batch * n * heads; i++) {
        rows += mask[i];
    }
    attn_stairs_head *list = attn_arena_array(call->arena, (size_t)(batch * heads), sizeof *list);
    int64_t *end = attn_arena_array(call->arena, (size_t)rows, sizeof *end);
    to->token = attn_arena_array(call->arena, (size_t)rows, sizeof *to->token);
    to->first = attn_arena_array(call->arena, (size_t)(batch * heads) + 1, sizeof *to->first);
    to->q = attn_scratch_f32(call, rows * d);
    to->o = attn_scratch_f32(call, rows * dv);
    to->lse = attn_scratch_f32(call, rows);
    if (list == NULL || end == NULL || to->token == NULL || to->first == NULL || to->q == NULL || to->o == NULL || to->lse == NULL) {
        return attn_fail_memory((size_t)(rows * (d + dv)) * sizeof(float));
    }
    int64_t at = 0;
    for (int64_t bh = 0; bh < batch * heads; bh++) {
        int64_t b = bh / heads, h = bh % heads, kv = b * kv_heads + h / (heads / kv_heads);
        to->first[bh] = at;
        for (int64_t i = 0; i < n; i++) {
            if (mask[(b * n + i) * heads + h]) {
                to->token[at] = i;
                end[at] = causal ? attn_max_i64(0, attn_min_i64(m, i + m - n + 1)) : m;
                memcpy(to->q + at * d, q + (bh * n + i) * d, (size_t)d * sizeof(float));
                at++;
            }
        }
        int64_t start = to->first[bh];
        list[bh] = (attn_stairs_head){.rows = at - start, .kv = kv, .q = to->q + start * d, .end = end + start, .k = k + kv * m * d,
                                      .v = v + kv * m * dv, .o = to->o + start * dv, .lse = to->lse + start};
    }
    to->first[batch * heads] = at;
    to->stairs = (attn_stairs){m, d, dv, batch * kv_heads, batch * heads, scale, list};
    return attn_stairs_forward(&to->stairs, call->arena, call->threads);
}

/* o [B,H,N,Dv]: gate times attention where a head serves a token, 0 elsewhere. gates NULL: all 1. */
static void scatter(const attn_call *call, const lists *x, const float *gates, float *o)
{
    int64_t batch = attn_dim(call, "B"), heads = attn_dim(call, "H"), n = attn_dim(call, "N"), dv = x->stairs.dv;
    memset(o, 0, (size_t)(batch * heads * n * dv) * sizeof *o);
    for (int64_t bh = 0; bh < batch * heads; bh++) {
        for (int64_t r = x->first[bh]; r < x->first[bh + 1]; r++) {
            int64_t i = x->token[r];
            float gate = gates != NULL ? gates[(bh / heads * n + i) * heads + bh % heads] : 1.0f;
            for (int64_t c = 0; c < dv; c++) {
                o[(bh * n + i) * dv + c] = gate * x->o[r * dv + c];
            }
        }
    }
}

/* Backward of the attention: grad_rows [rows][dv] is the gradient of the gated outputs in the order of the lists and becomes that
 * of the ungated ones; grad_gates [B,N,H] is added to at the chosen heads. */
static attn_status lists_back(attn_call *call, const lists *x, const float *gates, float *grad_rows, float *grad_gates,
                              float *grad_q, float *grad_k, float *grad_v)
{
    int64_t heads = attn_dim(call, "H"), n = attn_dim(call, "N"), d = x->stairs.d, dv = x->stairs.dv, all = x->stairs.head_count;
    attn_stairs_gradient *gradients = attn_arena_array(call->arena, (size_t)all, sizeof *gradients);
    float *rows_q = attn_scratch_f32(call, x->first[all] * d);
    if (gradients == NULL || rows_q == NULL) {
        return attn_fail_memory((size_t)(x->first[all] * d) * sizeof(float));
    }
    for (int64_t bh = 0; bh < all; bh++) {
        for (int64_t r = x->first[bh]; r < x->first[bh + 1]; r++) {
            int64_t at = (bh / heads * n + x->token[r]) * heads + bh % heads;
            double sum = 0;
            for (int64_t c = 0; c < dv; c++) {
                sum += (double)grad_rows[r * dv + c] * (double)x->o[r * dv + c];
                grad_rows[r * dv + c] *= gates != NULL ? gates[at] : 1.0f;
            }
            grad_gates[at] += (float)sum;
        }
        gradients[bh] = (attn_stairs_gradient){.grad_o = grad_rows + x->first[bh] * dv, .q = rows_q + x->first[bh] * d};
    }
    if (grad_q == NULL && grad_k == NULL && grad_v == NULL) {
        return ATTN_OK;
    }
    ATTN_TRY(attn_stairs_backward(&x->stairs, gradients, grad_k, grad_v, call->arena, call->threads));
    for (int64_t bh = 0; bh < all && grad_q != NULL; bh++) {
        for (int64_t r = x->first[bh]; r < x->first[bh + 1]; r++) {
            memcpy(grad_q + (bh * n + x->token[r]) * d, rows_q + r * d, (size_t)d * sizeof(float));
        }
    }
    return ATTN_OK;
}

/* grad_rows [rows][dv] from a [B,H,N,Dv] gradient (NULL: 0). */
static float *gather_gradient(attn_call *call, const lists *x, const float *grad_o)
{
    int64_t n = attn_dim(call, "N"), dv = x->stairs.dv, all = x->stairs.head_count;
    float *rows = attn_scratch_f32(call, x->first[all] * dv);
    for (int64_t bh = 0; bh < all && rows != NULL; bh++) {
        for (int64_t r = x->first[bh]; r < x->first[bh + 1]; r++) {
            if (grad_o != NULL) {
                memcpy(rows + r * dv, grad_o + (bh * n + x->token[r]) * dv, (size_t)dv * sizeof(float));
            } else {
                memset(rows + r * dv, 0, (size_t)dv * sizeof(float));
            }
        }
    }
    return rows;
}

static void list_cost(const attn_call *call, const uint8_t *mask, int causal, attn_cost *cost)
{
    int64_t heads = attn_dim(call, "H"), n = attn_dim(call, "N"), m = attn_dim(call, "M");
    for (int64_t i = 0; i < attn_dim(call, "B") * n * heads; i++) {
        int64_t keys = causal ? attn_max_i64(0, i / heads % n + m - n + 1) : m;
        cost->pairs += mask[i] ? (double)keys : 0;
    }
    cost->flops += 2 * cost->pairs * (double)(attn_dim(call, "D") + attn_dim(call, "Dv"));
}

/* ---- moh ---- */

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
    ATTN_TRY(check_router(call, WG, attn_dim(call, "H"), p->shared_heads, p->top_k));
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

static router moh_router(const attn_call *call)
{
    const moh_params *p = call->params;
    return (router){.tokens = attn_dim(call, "B") * attn_dim(call, "N"), .width = attn_dim(call, "C"), .shared = p->shared_heads,
                    .routed = attn_dim(call, "H") - p->shared_heads, .chosen = p->top_k, .official = p->gate_norm == OFFICIAL,
                    .x = attn_f32(call->t[X]), .wg = attn_f32(call->t[WG]), .wg_0 = attn_f32(call->t[WG_0]),
                    .wg_1 = attn_f32(call->t[WG_1])};
}

static attn_status attend(attn_call *call, const uint8_t *mask, lists *x)
{
    const moh_params *p = call->params;
    return build_lists(call, mask, attn_f32(call->t[Q]), attn_f32(call->t[K]), attn_f32(call->t[V]),
                       attn_default_scale(p->scale, attn_dim(call, "D")), (int)p->causal, x);
}

/* One token at a time over the cached keys: only the chosen heads read theirs. The mask is known. */
static void decode_tokens(const attn_call *call, const uint8_t *mask, const float *gates, float *o)
{
    const moh_params *p = call->params;
    int64_t batch = attn_dim(call, "B"), heads = attn_dim(call, "H"), kv_heads = attn_dim(call, "Hkv"), n = attn_dim(call, "N");
    int64_t m = attn_dim(call, "M"), d = attn_dim(call, "D"), dv = attn_dim(call, "Dv");
    double scale = attn_default_scale(p->scale, d);
    memset(o, 0, (size_t)(batch * heads * n * dv) * sizeof *o);
    for (int64_t i = 0; i < n; i++) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(call->threads) if (call->threads > 1)
        for (int64_t bh = 0; bh < batch * heads; bh++) {
            int64_t at = (bh / heads * n + i) * heads + bh % heads, kv = bh / heads * kv_heads + bh % heads / (heads / kv_heads);
            const float *q = attn_f32(call->t[Q]) + (bh * n + i) * d, *k = attn_f32(call->t[K]) + kv * m * d;
            const float *v = attn_f32(call->t[V]) + kv * m * dv;
            float *to = o + (bh * n + i) * dv;
            double top = -INFINITY, sum = 0;
            for (int64_t j = 0; j < i + m - n + 1 && mask[at]; j++) {
                float score = 0;
                for (int64_t c = 0; c < d; c++) {
                    score += q[c] * k[j * d + c];
                }
                double s = (double)score * scale, next = fmax(top, s), fade = exp(top - next), weight = exp(s - next);
                sum = sum * fade + weight;
                top = next;
                for (int64_t c = 0; c < dv; c++) {
                    to[c] = (float)fade * to[c] + (float)weight * v[j * dv + c];
                }
            }
            for (int64_t c = 0; c < dv && sum > 0; c++) {
                to[c] *= (float)((double)gates[at] / sum);
            }
        }
    }
}

/* y += the rows of each head through that head's columns of w_out. */
static attn_status project(attn_call *call, const uint8_t *mask, const float *o, float *y)
{
    int64_t batch = attn_dim(call, "B"), heads = attn_dim(call, "H"), n = attn_dim(call, "N"), dv = attn_dim(call, "Dv");
    int64_t cout = attn_dim(call, "Cout"), tokens = batch * n;
    const float *w = attn_f32(call->t[W_OUT]), *bias = attn_f32(call->t[B_OUT]);
    float *rows = attn_scratch_f32(call, tokens * dv), *part = attn_scratch_f32(call, tokens * cout);
    int64_t *token = attn_arena_array(call->arena, (size_t)tokens, sizeof *token);
    if (rows == NULL || part == NULL || token == NULL) {
        return attn_fail_memory((size_t)(tokens * cout) * sizeof(float));
    }
    for (int64_t i = 0; i < tokens * cout; i++) {
        y[i] = bias != NULL ? bias[i % cout] : 0.0f;
    }
    for (int64_t h = 0; h < heads; h++) {
        int64_t count = 0;
        for (int64_t t = 0; t < tokens; t++) {
            if (mask[t * heads + h]) {
                token[count] = t;
                memcpy(rows + count++ * dv, o + ((t / n * heads + h) * n + t % n) * dv, (size_t)dv * sizeof(float));
            }
        }
        ATTN_TRY(attn_gemm(call->arena, call->threads, 0, 1, count, cout, dv, 1.0f, rows, dv, w + h * dv, heads * dv, 0.0f, part, cout));
        for (int64_t r = 0; r < count; r++) {
            for (int64_t c = 0; c < cout; c++) {
                y[token[r] * cout + c] += part[r * cout + c];
            }
        }
    }
    return ATTN_OK;
}

static attn_status moh_forward(attn_call *call)
{
    const moh_params *p = call->params;
    router r = moh_router(call);
    uint8_t *mask = attn_bool(call->t[MASK]);
    float *gates = attn_f32(call->t[GATES]), *o = attn_f32(call->t[O]);
    ATTN_TRY(route(call, &r, mask, gates, attn_f32(call->t[LB_LOSS])));
    if (p->decode) {
        decode_tokens(call, mask, gates, o);
    } else {
        lists x;
        ATTN_TRY(attend(call, mask, &x));
        scatter(call, &x, gates, o);
    }
    return call->t[W_OUT] != NULL ? project(call, mask, o, attn_f32(call->t[Y])) : ATTN_OK;
}

/* What y adds: to the gradient of the gated rows, and to those of w_out and b_out. */
static attn_status project_back(attn_call *call, const lists *x, const float *gates, const float *grad_y, float *grad_rows)
{
    int64_t heads = attn_dim(call, "H"), n = attn_dim(call, "N"), dv = attn_dim(call, "Dv"), cout = attn_dim(call, "Cout");
    const float *w = attn_f32(call->t[W_OUT]);
    float *grad_w = attn_f32(call->grad[W_OUT]), *grad_b = attn_f32(call->grad[B_OUT]);
    float *rows_y = attn_scratch_f32(call, n * cout), *rows_o = attn_scratch_f32(call, n * dv);
    if (rows_y == NULL || rows_o == NULL) {
        return attn_fail_memory((size_t)(n * (cout + dv)) * sizeof(float));
    }
    for (int64_t bh = 0; bh < x->stairs.head_count; bh++) {
        int64_t b = bh / heads, h = bh % heads, first = x->first[bh], count = x->first[bh + 1] - first;
        for (int64_t r = 0; r < count; r++) {
            int64_t t = b * n + x->token[first + r];
            memcpy(rows_y + r * cout, grad_y + t * cout, (size_t)cout * sizeof(float));
            for (int64_t c = 0; c < dv; c++) {
                rows_o[r * dv + c] = gates[t * heads + h] * x->o[(first + r) * dv + c];
            }
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
    router r = moh_router(call);
    const uint8_t *mask = attn_bool(call->t[MASK]);
    const float *gates = attn_f32(call->t[GATES]);
    int64_t count = r.tokens * (r.shared + r.routed);
    float *grad_gates = attn_scratch_f32(call, count);
    lists x;
    ATTN_TRY(route(call, &r, NULL, NULL, NULL));
    ATTN_TRY(attend(call, mask, &x));
    float *rows = gather_gradient(call, &x, attn_f32(call->grad[O]));
    if (grad_gates == NULL || rows == NULL) {
        return attn_fail_memory((size_t)count * sizeof(float));
    }
    for (int64_t i = 0; i < count; i++) {
        grad_gates[i] = call->grad[GATES] != NULL && mask[i] ? attn_f32(call->grad[GATES])[i] : 0.0f;
    }
    if (call->t[W_OUT] != NULL && call->grad[Y] != NULL) {
        ATTN_TRY(project_back(call, &x, gates, attn_f32(call->grad[Y]), rows));
    }
    ATTN_TRY(lists_back(call, &x, gates, rows, grad_gates, attn_f32(call->grad[Q]), attn_f32(call->grad[K]), attn_f32(call->grad[V])));
    router_gradients to = {attn_f32(call->grad[X]), attn_f32(call->grad[WG]), attn_f32(call->grad[WG_0]), attn_f32(call->grad[WG_1])};
    double loss = call->grad[LB_LOSS] != NULL ? (double)attn_f32(call->grad[LB_LOSS])[0] : 0;
    return route_back(call, &r, mask, grad_gates, loss, &to);
}

static attn_status moh_cost(attn_call *call, attn_cost *cost)
{
    const moh_params *p = call->params;
    int64_t heads = attn_dim(call, "H"), n = attn_dim(call, "N"), m = attn_dim(call, "M"), tokens = attn_dim(call, "B") * n;
    double keys = 0, active = (double)(p->shared_heads + p->top_k), width = (double)attn_dim(call, "Dv");
    for (int64_t i = 0; i < n; i++) {
        keys += p->causal ? (double)attn_max_i64(0, i + m - n + 1) : (double)m;
    }
    cost->pairs = active * keys * (double)attn_dim(call, "B");
    cost->flops = 2 * cost->pairs * ((double)attn_dim(call, "D") + width) +
                  2 * (double)tokens * (double)attn_dim(call, "C") * (double)(heads + 2);
    if (call->t[W_OUT] != NULL) {
        cost->flops += 2 * (double)tokens * active * width * (double)attn_dim(call, "Cout");
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
    ATTN_IN("x", "B,N,C", FLOAT, DIFF, "the layer's input"),
    ATTN_IN("wg", "E,C", FLOAT, MAYBE, "router of the routed heads (absent when top_k = 0)"),
    ATTN_IN("wg_0", "2,C", FLOAT, MAYBE, "gate between shared and routed heads (when there are both)"),
    ATTN_IN("wg_1", "Hs,C", FLOAT, MAYBE, "weights within the shared heads (when there are several)"),
    ATTN_OUT("gates", "B,N,H", FLOAT, DIFF, "weight of each head"),
    ATTN_OUT("mask", "B,N,H", BOOL, 0, "heads in use"),
    ATTN_OUT("lb_loss", "1", FLOAT, DIFF, "load balance of the routed heads"),
};

static attn_status gates_bind(attn_call *call)
{
    const gates_params *p = call->params;
    attn_set_dim(call, "H", p->heads);
    return check_router(call, G_WG, p->heads, p->shared_heads, p->top_k);
}

static router gates_router(const attn_call *call)
{
    const gates_params *p = call->params;
    return (router){.tokens = attn_dim(call, "B") * attn_dim(call, "N"), .width = attn_dim(call, "C"), .shared = p->shared_heads,
                    .routed = p->heads - p->shared_heads, .chosen = p->top_k, .official = p->gate_norm == OFFICIAL,
                    .x = attn_f32(call->t[G_X]), .wg = attn_f32(call->t[G_WG]), .wg_0 = attn_f32(call->t[G_WG_0]),
                    .wg_1 = attn_f32(call->t[G_WG_1])};
}

static attn_status gates_forward(attn_call *call)
{
    router r = gates_router(call);
    return route(call, &r, attn_bool(call->t[G_MASK]), attn_f32(call->t[G_GATES]), attn_f32(call->t[G_LB_LOSS]));
}

static attn_status gates_backward(attn_call *call)
{
    router r = gates_router(call);
    const uint8_t *mask = attn_bool(call->t[G_MASK]);
    int64_t count = r.tokens * (r.shared + r.routed);
    float *grad = attn_scratch_f32(call, count);
    if (grad == NULL) {
        return attn_fail_memory((size_t)count * sizeof(float));
    }
    ATTN_TRY(route(call, &r, NULL, NULL, NULL));
    for (int64_t i = 0; i < count; i++) {
        grad[i] = call->grad[G_GATES] != NULL && mask[i] ? attn_f32(call->grad[G_GATES])[i] : 0.0f;
    }
    router_gradients to = {attn_f32(call->grad[G_X]), attn_f32(call->grad[G_WG]), attn_f32(call->grad[G_WG_0]),
                           attn_f32(call->grad[G_WG_1])};
    double loss = call->grad[G_LB_LOSS] != NULL ? (double)attn_f32(call->grad[G_LB_LOSS])[0] : 0;
    return route_back(call, &r, mask, grad, loss, &to);
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
    ATTN_IN("q_route", "B,H,N,D", FLOAT, DIFF, "projected queries before rotary positions"),
    ATTN_OUT("scores", "B,N,E", FLOAT, DIFF, "softmax over the routed heads"),
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
    return norm_route_back(call, p->shared_heads, attn_f32(call->t[N_SCORES]), attn_f32(call->grad[N_SCORES]),
                           attn_f32(call->grad[N_Q_ROUTE]));
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
    ATTN_IN("q_route", "B,H,N,D", FLOAT, DIFF, "projected queries before rotary positions, for the router"),
    ATTN_IN("q", "B,H,N,D", FLOAT, DIFF, "queries"),
    ATTN_IN("k", "B,Hkv,M,D", FLOAT, DIFF, "keys"),
    ATTN_IN("v", "B,Hkv,M,Dv", FLOAT, DIFF, "values"),
    ATTN_OUT("o", "B,H,N,Dv", FLOAT, DIFF, "head outputs; 0 for heads that were not chosen"),
    ATTN_OUT("scores", "B,N,E", FLOAT, DIFF, "softmax over the routed heads"),
    ATTN_OUT("mask", "B,N,H", BOOL, 0, "heads in use"),
};

static attn_status tuned_lists(attn_call *call, lists *x)
{
    const tuned_params *p = call->params;
    return build_lists(call, attn_bool(call->t[T_MASK]), attn_f32(call->t[T_Q]), attn_f32(call->t[T_K]), attn_f32(call->t[T_V]),
                       attn_default_scale(p->scale, attn_dim(call, "D")), (int)p->causal, x);
}

static attn_status tuned_forward(attn_call *call)
{
    const tuned_params *p = call->params;
    lists x;
    ATTN_TRY(norm_route(call, p->shared_heads, p->top_k, attn_f32(call->t[T_SCORES]), attn_bool(call->t[T_MASK])));
    ATTN_TRY(tuned_lists(call, &x));
    scatter(call, &x, NULL, attn_f32(call->t[T_O]));
    return ATTN_OK;
}

/* Straight through: the gates are 1, their gradients go to the scores of the chosen heads. */
static attn_status tuned_backward(attn_call *call)
{
    const tuned_params *p = call->params;
    int64_t heads = attn_dim(call, "H"), routed = heads - p->shared_heads, tokens = attn_dim(call, "B") * attn_dim(call, "N");
    lists x;
    ATTN_TRY(tuned_lists(call, &x));
    float *rows = gather_gradient(call, &x, attn_f32(call->grad[T_O])), *grad_gates = attn_scratch_f32(call, tokens * heads);
    float *grad_scores = attn_scratch_f32(call, tokens * routed);
    if (rows == NULL || grad_gates == NULL || grad_scores == NULL) {
        return attn_fail_memory((size_t)(tokens * heads) * sizeof(float));
    }
    memset(grad_gates, 0, (size_t)(tokens * heads) * sizeof(float));
    ATTN_TRY(lists_back(call, &x, NULL, rows, grad_gates, attn_f32(call->grad[T_Q]), attn_f32(call->grad[T_K]),
                        attn_f32(call->grad[T_V])));
    for (int64_t i = 0; i < tokens * routed; i++) {
        grad_scores[i] = grad_gates[i / routed * heads + p->shared_heads + i % routed];
        grad_scores[i] += call->grad[T_SCORES] != NULL ? attn_f32(call->grad[T_SCORES])[i] : 0.0f;
    }
    return call->grad[T_Q_ROUTE] != NULL
               ? norm_route_back(call, p->shared_heads, attn_f32(call->t[T_SCORES]), grad_scores, attn_f32(call->grad[T_Q_ROUTE]))
               : ATTN_OK;
}

static attn_status tuned_cost(attn_call *call, attn_cost *cost)
{
    const tuned_params *p = call->params;
    int64_t tokens = attn_dim(call, "B") * attn_dim(call, "N"), heads = attn_dim(call, "H");
    uint8_t *mask = attn_arena_array(call->arena, (size_t)(tokens * heads), 1);
    if (mask == NULL) {
        return attn_fail_memory((size_t)(tokens * heads));
    }
    /* Which heads does not matter, only how many. */
    for (int64_t i = 0; i < tokens * heads; i++) {
        mask[i] = i % heads < p->shared_heads + p->top_k;
    }
    list_cost(call, mask, (int)p->causal, cost);
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
