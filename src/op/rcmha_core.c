/* Attention with learned relative positions, rcmha.core (arXiv:2308.03429). The positional terms are computed tile by tile: of the tables
 * only the rows that a tile's distances reach, read askew. */
#include "op/rcmha.h"

#include <string.h>

attn_status attn_rcmha_core_forward(attn_call *call, rcmha_core *x)
{
    int64_t all = x->batch * x->heads, group = x->heads / x->kv_heads;
    attn_stairs_head *list = attn_arena_array(call->arena, (size_t)all, sizeof *list);
    int64_t *end = attn_arena_array(call->arena, (size_t)x->n, sizeof *end);
    if (list == NULL || end == NULL) {
        return attn_fail_memory((size_t)all * sizeof *list);
    }
    for (int64_t i = 0; i < x->n; i++) {
        end[i] = x->causal ? attn_max_i64(0, i + x->m - x->n + 1) : x->m;
    }
    for (int64_t bh = 0; bh < all; bh++) {
        int64_t h = bh % x->heads, kv = bh / x->heads * x->kv_heads + h / group;
        list[bh] = (attn_stairs_head){.rows = x->n, .kv = kv, .q = x->q + bh * x->q_stride * x->d, .end = end,
                                      .k = x->k + kv * x->k_stride * x->d, .v = x->v + kv * x->k_stride * x->dv,
                                      .o = x->o + bh * x->n * x->dv, .lse = x->lse + bh * x->n,
                                      .q_bias = x->q_bias != NULL ? x->q_bias + h * x->d : NULL};
        if (x->rel_emb != NULL) {
            list[bh].rel_emb = x->rel_emb + h * x->d;
            list[bh].rel_stride = x->heads * x->d;
            list[bh].rel_bias = x->rel_bias != NULL ? x->rel_bias + h : NULL;
            list[bh].rel_bias_stride = x->heads;
            list[bh].rel_count = x->table;
            list[bh].zero = x->table / 2;
            list[bh].first = x->m - x->n;
        }
    }
    x->stairs = (attn_stairs){.keys = x->m, .d = x->d, .dv = x->dv, .kv_count = x->batch * x->kv_heads, .head_count = all, .scale = x->scale, .heads = list};
    return attn_stairs_forward(&x->stairs, call->arena, call->threads);
}

attn_status attn_rcmha_core_backward(attn_call *call, const rcmha_core *x, const rcmha_core_gradients *g)
{
    int64_t all = x->batch * x->heads, size = x->n * x->d, table = x->rel_emb != NULL ? x->table : 0;
    attn_stairs_gradient *gradients = attn_arena_array(call->arena, (size_t)all, sizeof *gradients);
    float *content = attn_scratch_f32(call, 2 * all * size), *rel_q = content + all * size;
    float *emb = attn_scratch_f32(call, all * table * (x->d + 1)), *bias = emb + all * table * x->d;
    if (gradients == NULL || content == NULL || emb == NULL) {
        return attn_fail_memory((size_t)(all * (2 * size + table * (x->d + 1))) * sizeof(float));
    }
    for (int64_t bh = 0; bh < all; bh++) {
        gradients[bh] = (attn_stairs_gradient){.grad_o = g->o + bh * x->n * x->dv, .q = content + bh * size};
        if (table > 0) {
            gradients[bh].rel_q = rel_q + bh * size;
            gradients[bh].rel_emb = emb + bh * table * x->d;
            gradients[bh].rel_bias = x->rel_bias != NULL ? bias + bh * table : NULL;
        }
    }
    ATTN_TRY(attn_stairs_backward(&x->stairs, gradients, g->k, g->v, call->arena, call->threads));
    for (int64_t bh = 0; bh < all; bh++) {
        int64_t h = bh % x->heads;
        for (int64_t i = 0; i < size; i++) {
            float own = content[bh * size + i];
            if (g->q_bias != NULL) {
                g->q_bias[h * x->d + i % x->d] += own;
            }
            if (g->q != NULL) {
                g->q[bh * x->q_stride * x->d + i] = table > 0 ? own + rel_q[bh * size + i] : own;
            }
        }
        for (int64_t r = 0; r < table; r++) {
            for (int64_t c = 0; c < x->d && g->rel_emb != NULL; c++) {
                g->rel_emb[(r * x->heads + h) * x->d + c] += emb[(bh * table + r) * x->d + c];
            }
            if (g->rel_bias != NULL) {
                g->rel_bias[r * x->heads + h] += bias[bh * table + r];
            }
        }
    }
    return ATTN_OK;
}

attn_status attn_rcmha_check_table(const attn_tensor *table, const char *name, int64_t n, int64_t m)
{
    if (table == NULL) {
        return ATTN_OK;
    }
    if (table->shape[0] % 2 != 0) {
        return attn_fail(ATTN_ERR_SHAPE, "%s has %lld rows, expected an even number 2P", name, (long long)table->shape[0]);
    }
    if (m > table->shape[0] / 2 || n > table->shape[0] / 2) {
        return attn_fail(ATTN_ERR_SHAPE, "N = %lld and M = %lld, expected at most P = %lld, half the rows of %s", (long long)n,
                         (long long)m, (long long)(table->shape[0] / 2), name);
    }
    return ATTN_OK;
}

void attn_rcmha_core_cost(const rcmha_core *x, attn_cost *cost)
{
    double keys = 0;
    for (int64_t i = 0; i < x->n; i++) {
        keys += x->causal ? (double)attn_max_i64(0, i + x->m - x->n + 1) : (double)x->m;
    }
    double pairs = (double)(x->batch * x->heads) * keys;
    cost->pairs += pairs;
    cost->flops += 2 * pairs * (double)(x->d + x->dv + (x->table > 0 ? x->d : 0));
}

/* ---- rcmha.core ---- */

typedef struct core_params {
    int64_t causal;
    double scale;
} core_params;

static const attn_param_info core_param_table[] = {
    ATTN_P_BOOL("causal", core_params, causal, "true", "the last query sees the last key"),
    ATTN_P_FLOAT_AUTO("scale", core_params, scale, "1/sqrt(D)", -INFINITY, INFINITY, "multiplies the sum of all score terms"),
};

enum { C_Q, C_K, C_V, C_REL_EMB, C_REL_BIAS, C_Q_BIAS, C_O };

static const attn_port_info core_ports[] = {
    ATTN_IN("q", "B,H,N,D", FLOAT, ATTN_PORT_DIFF, "queries"),
    ATTN_IN("k", "B,Hkv,M,D", FLOAT, ATTN_PORT_DIFF, "keys"),
    ATTN_IN("v", "B,Hkv,M,Dv", FLOAT, ATTN_PORT_DIFF, "values"),
    ATTN_IN("rel_emb", "R,H,D", FLOAT, ATTN_PORT_DIFF | ATTN_PORT_OPTIONAL, "[2P, H, D]: row P + (key position - query position)"),
    ATTN_IN("rel_bias", "R,H", FLOAT, ATTN_PORT_DIFF | ATTN_PORT_OPTIONAL, "scalar bias, same row"),
    ATTN_IN("q_bias", "H,D", FLOAT, ATTN_PORT_DIFF | ATTN_PORT_OPTIONAL, "added to the query in the content term"),
    ATTN_OUT("o", "B,H,N,Dv", FLOAT, ATTN_PORT_DIFF, "the attention output"),
};

static attn_status core_bind(attn_call *call)
{
    int port = call->t[C_REL_EMB] != NULL ? C_REL_EMB : C_REL_BIAS;
    return attn_rcmha_check_table(call->t[port], core_ports[port].name, attn_dim(call, "N"), attn_dim(call, "M"));
}

static attn_status core_setup(attn_call *call, rcmha_core *x)
{
    const core_params *p = call->params;
    *x = (rcmha_core){.batch = attn_dim(call, "B"), .heads = attn_dim(call, "H"), .kv_heads = attn_dim(call, "Hkv"), .n = attn_dim(call, "N"),
                .m = attn_dim(call, "M"), .d = attn_dim(call, "D"), .dv = attn_dim(call, "Dv"), .table = attn_dim(call, "R"),
                .causal = (int)p->causal, .q = attn_f32(call->t[C_Q]), .k = attn_f32(call->t[C_K]), .v = attn_f32(call->t[C_V]),
                .rel_emb = attn_f32(call->t[C_REL_EMB]), .rel_bias = attn_f32(call->t[C_REL_BIAS]),
                .q_bias = attn_f32(call->t[C_Q_BIAS]), .o = attn_f32(call->t[C_O])};
    x->q_stride = x->n;
    x->k_stride = x->m;
    x->scale = attn_default_scale(p->scale, x->d);
    if (x->rel_bias != NULL && x->rel_emb == NULL) { /* stairs have no scalars without embeddings */
        int64_t size = x->table * x->heads * x->d;
        float *none;
        ATTN_TRY(attn_take_f32(call, size, &none));
        memset(none, 0, (size_t)size * sizeof *none);
        x->rel_emb = none;
    }
    return attn_take_f32(call, x->batch * x->heads * x->n, &x->lse);
}

static attn_status forward(attn_call *call)
{
    rcmha_core x;
    ATTN_TRY(core_setup(call, &x));
    return attn_rcmha_core_forward(call, &x);
}

static attn_status backward(attn_call *call)
{
    rcmha_core x;
    ATTN_TRY(core_setup(call, &x));
    ATTN_TRY(attn_rcmha_core_forward(call, &x));
    rcmha_core_gradients g = {attn_f32(call->grad[C_O]), attn_f32(call->grad[C_Q]), attn_f32(call->grad[C_K]), attn_f32(call->grad[C_V]),
                        attn_f32(call->grad[C_REL_EMB]), attn_f32(call->grad[C_REL_BIAS]), attn_f32(call->grad[C_Q_BIAS])};
    return attn_rcmha_core_backward(call, &x, &g);
}

static attn_status core_cost(attn_call *call, attn_cost *cost)
{
    rcmha_core x;
    ATTN_TRY(core_setup(call, &x));
    attn_rcmha_core_cost(&x, cost);
    return ATTN_OK;
}

const attn_op_class attn_op_rcmha_core = {
    .info = {.name = "rcmha.core",
             .title = "Attention with learned relative positions",
             .summary = "Softmax attention whose scores add, per head, the product of the query with a learned embedding of the distance, a "
                        "learned scalar for the distance, and a query bias in the content term. Costs half as much again as ordinary "
                        "attention; memory stays linear.",
             .paper = "arXiv:2308.03429",
             .differentiable = 1,
             ATTN_TABLE(core_param_table, core_ports)},
    .params_size = sizeof(core_params),
    .bind = core_bind,
    .forward = forward,
    .backward = backward,
    .cost = core_cost,
};
