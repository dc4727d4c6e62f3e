/* Gated linear attention of TransNormerLLM: projections, LRPE, the linear executor with decay, norm, gate, output projection. */
#include "exec/linear.h"
#include "layer/activation.h"
#include "layer/heads.h"
#include "layer/linear.h"
#include "layer/norm.h"
#include "op/tnl.h"

#include <string.h>

enum { ACT_SILU, ACT_ELU1, ACT_NONE };

static attn_activation activation_of(int64_t act)
{
    return act == ACT_SILU ? ATTN_ACTIVATION_SILU : act == ACT_ELU1 ? ATTN_ACTIVATION_ELU1 : ATTN_ACTIVATION_IDENTITY;
}

/* What the way to the output leaves behind. */
typedef struct core_work {
    float *z;          /* [rows, 4E]: q, k, v, u before activations */
    float *q, *k, *v;  /* [B,heads,N,key or d] as the attention gets them */
    float *y;          /* [rows, E], heads concatenated */
    float *normed;     /* srms(y) */
    float *gated;      /* u * srms(y) */
    double *scratch;
} core_work;

static attn_linattn core_shape(const tnl_core *g)
{
    return (attn_linattn){.batch = g->batch, .heads = g->heads, .kv_heads = g->heads, .n = g->n, .m = g->n, .d = g->key, .dv = g->d,
                          .causal = 1, .chunk = g->block, .scale = 1, .slope = g->slope};
}

/* Activation, LRPE and mask on the way from z to the attention's inputs, or without LRPE straight. act [N][d] is scratch of a head. */
static void split_head(const tnl_core *g, core_work *w, float *act, int64_t b, int64_t h)
{
    attn_activation f = activation_of(g->act);
    for (int part = 0; part < 2; part++) {
        float *to = (part == 0 ? w->q : w->k) + (b * g->heads + h) * g->n * g->key;
        float *plain = g->theta != NULL ? act : to;
        for (int64_t t = 0; t < g->n; t++) {
            attn_activation_forward(f, 1, g->d, w->z + (b * g->n + t) * 4 * g->e + part * g->e + h * g->d, plain + t * g->d);
        }
        if (g->theta != NULL) {
            tnl_lrpe l = attn_tnl_lrpe_at(g->n, g->d, g->offset, g->theta, w->scratch, h);
            attn_tnl_lrpe_forward(&l, act, g->d, to);
        }
    }
    for (int64_t t = 0; t < g->n; t++) {
        float *to = w->v + ((b * g->heads + h) * g->n + t) * g->d;
        if (g->mask != NULL && !g->mask[b * g->n + t]) {
            memset(to, 0, (size_t)g->d * sizeof *to);
        } else {
            memcpy(to, w->z + (b * g->n + t) * 4 * g->e + 2 * g->e + h * g->d, (size_t)g->d * sizeof *to);
        }
    }
}

static attn_head_rows rows_of(const tnl_core *g) { return (attn_head_rows){g->batch, g->n, g->heads, g->d, g->e, 0}; }

/* gated = u * normed; u lies in z. */
static void gate(const tnl_core *g, int threads, const core_work *w, float *gated)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < g->rows; r++) {
        const float *u = w->z + r * 4 * g->e + 3 * g->e, *y = w->normed + r * g->e;
        for (int64_t i = 0; i < g->e; i++) {
            gated[r * g->e + i] = u[i] * y[i];
        }
    }
}

/* Everything before the output projection. state_out [B,heads,key,d], or NULL. */
static attn_status core_inner(attn_call *call, const tnl_core *g, const float *x, core_work *w, float *state_out)
{
    int64_t wide = g->batch * g->heads * g->n * g->key, narrow = g->rows * g->e;
    float *by_head, *act;
    ATTN_TRY(attn_take_f32(call, g->rows * 4 * g->e, &w->z));
    ATTN_TRY(attn_take_f32(call, wide, &w->q));
    ATTN_TRY(attn_take_f32(call, wide, &w->k));
    ATTN_TRY(attn_take_f32(call, narrow, &w->v));
    ATTN_TRY(attn_take_f32(call, narrow, &w->y));
    ATTN_TRY(attn_take_f32(call, narrow, &w->normed));
    ATTN_TRY(attn_take_f32(call, narrow, &w->gated));
    ATTN_TRY(attn_take_f32(call, narrow, &by_head));
    ATTN_TRY(attn_take_f32(call, g->theta != NULL ? g->heads * g->n * g->d : 1, &act));
    ATTN_TRY(attn_tnl_lrpe_scratch(call, g->heads, g->d, &w->scratch));
    ATTN_TRY(attn_linear_forward(call->arena, call->threads, g->rows, g->c, 4 * g->e, x, g->w_qkvu, NULL, w->z));
    /* Heads in parallel, the batch inside: scratch belongs to a head. */
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t h = 0; h < g->heads; h++) {
        for (int64_t b = 0; b < g->batch; b++) {
            split_head(g, w, g->theta != NULL ? act + h * g->n * g->d : act, b, h);
        }
    }
    attn_linattn shape = core_shape(g);
    if (g->by_token) {
        shape.chunk = 0;
        ATTN_TRY(attn_linattn_decode(&shape, call->arena, call->threads, w->q, w->k, w->v, g->state_in, state_out, by_head));
    } else {
        ATTN_TRY(attn_linattn_forward(&shape, call->arena, call->threads, w->q, w->k, w->v, g->state_in, by_head, state_out));
    }
    attn_head_rows rows = rows_of(g);
    attn_heads_join(&rows, call->threads, by_head, w->y);
    attn_norm_forward(ATTN_NORM_RMS, call->threads, g->rows, g->e, g->eps, w->y, NULL, NULL, w->normed);
    gate(g, call->threads, w, w->gated);
    return ATTN_OK;
}

attn_status attn_tnl_core_forward(attn_call *call, const tnl_core *g, const float *x, float *o, float *state_out)
{
    core_work w;
    ATTN_TRY(core_inner(call, g, x, &w, state_out));
    return attn_linear_forward(call->arena, call->threads, g->rows, g->e, g->c, w.gated, g->w_o, NULL, o);
}

/* From the gradients of the attention's inputs to those of z (q, k and v parts of a head). */
static void split_head_back(const tnl_core *g, const core_work *w, const float *gq, const float *gk, const float *gv, float *gz, float *act,
                            float *narrow, int64_t b, int64_t h)
{
    attn_activation f = activation_of(g->act);
    for (int part = 0; part < 2; part++) {
        const float *grad = (part == 0 ? gq : gk) + (b * g->heads + h) * g->n * g->key;
        if (g->theta != NULL) {
            tnl_lrpe l = attn_tnl_lrpe_at(g->n, g->d, g->offset, g->theta, w->scratch, h);
            /* Without a state only distances count, and long sums with the weight `offset` would leave nothing but their rounding. */
            l.counted = g->state_in != NULL ? g->offset : 0;
            for (int64_t t = 0; t < g->n; t++) {
                attn_activation_forward(f, 1, g->d, w->z + (b * g->n + t) * 4 * g->e + part * g->e + h * g->d, act + t * g->d);
            }
            attn_tnl_lrpe_backward(&l, act, g->d, grad, narrow, g->d, attn_tnl_lrpe_sum(w->scratch, h, g->d));
            grad = narrow;
        }
        for (int64_t t = 0; t < g->n; t++) {
            int64_t at = (b * g->n + t) * 4 * g->e + part * g->e + h * g->d;
            attn_activation_backward(f, 1, g->d, w->z + at, grad + t * g->d, gz + at);
        }
    }
    for (int64_t t = 0; t < g->n; t++) {
        float *to = gz + (b * g->n + t) * 4 * g->e + 2 * g->e + h * g->d;
        if (g->mask != NULL && !g->mask[b * g->n + t]) {
            memset(to, 0, (size_t)g->d * sizeof *to);
        } else {
            memcpy(to, gv + ((b * g->heads + h) * g->n + t) * g->d, (size_t)g->d * sizeof *to);
        }
    }
}

attn_status attn_tnl_core_backward(attn_call *call, const tnl_core *g, const float *x, const float *grad_o,
                                   const tnl_core_gradients *to)
{
    core_work w;
    float *gated, *normed, *gy, *gq, *gk, *gv, *gz, *by_head, *act, *narrow;
    int64_t wide = g->batch * g->heads * g->n * g->key, rows_e = g->rows * g->e, lrpe = g->theta != NULL ? g->heads * g->n * g->d : 1;
    ATTN_TRY(core_inner(call, g, x, &w, NULL));
    ATTN_TRY(attn_take_f32(call, rows_e, &gated));
    ATTN_TRY(attn_take_f32(call, rows_e, &normed));
    ATTN_TRY(attn_take_f32(call, rows_e, &gy));
    ATTN_TRY(attn_take_f32(call, rows_e, &by_head));
    ATTN_TRY(attn_take_f32(call, rows_e, &gv));
    ATTN_TRY(attn_take_f32(call, wide, &gq));
    ATTN_TRY(attn_take_f32(call, wide, &gk));
    ATTN_TRY(attn_take_f32(call, g->rows * 4 * g->e, &gz));
    ATTN_TRY(attn_take_f32(call, lrpe, &act));
    ATTN_TRY(attn_take_f32(call, lrpe, &narrow));
    ATTN_TRY(attn_linear_backward(call->arena, call->threads, g->rows, g->e, g->c, w.gated, g->w_o, grad_o, gated, to->w_o, NULL));
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t r = 0; r < g->rows; r++) {
        float *gu = gz + r * 4 * g->e + 3 * g->e;
        const float *u = w.z + r * 4 * g->e + 3 * g->e;
        for (int64_t i = 0; i < g->e; i++) {
            gu[i] = gated[r * g->e + i] * w.normed[r * g->e + i];
            normed[r * g->e + i] = gated[r * g->e + i] * u[i];
        }
    }
    ATTN_TRY(attn_norm_backward(ATTN_NORM_RMS, call->arena, call->threads, g->rows, g->e, g->eps, w.y, NULL, normed, gy, NULL, NULL));
    attn_head_rows rows = rows_of(g);
    attn_heads_split(&rows, call->threads, gy, by_head);
    attn_linattn shape = core_shape(g);
    ATTN_TRY(attn_linattn_backward(&shape, call->arena, call->threads, w.q, w.k, w.v, g->state_in, by_head, gq, gk, gv, to->state));
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t h = 0; h < g->heads; h++) {
        int64_t own = g->theta != NULL ? h * g->n * g->d : 0;
        double *sum = attn_tnl_lrpe_sum(w.scratch, h, g->d);
        memset(sum, 0, (size_t)g->d * sizeof *sum);
        for (int64_t b = 0; b < g->batch; b++) {
            split_head_back(g, &w, gq, gk, gv, gz, act + own, narrow + own, b, h);
        }
        for (int64_t c = 0; c < g->d && to->theta != NULL; c++) {
            to->theta[h * g->d + c] += (float)sum[c];
        }
    }
    return attn_linear_backward(call->arena, call->threads, g->rows, g->c, 4 * g->e, x, g->w_qkvu, gz, to->x, to->w_qkvu, NULL);
}

double attn_tnl_core_flops(const tnl_core *g)
{
    attn_linattn shape = core_shape(g);
    return (double)g->rows * 10 * (double)(g->c * g->e) + attn_linattn_flops(&shape);
}

attn_status attn_tnl_check_heads(int64_t e, int64_t heads)
{
    return e % heads == 0 && e > 0 ? ATTN_OK
                                   : attn_fail(ATTN_ERR_ARGUMENT, "heads = %lld does not divide E = %lld", (long long)heads, (long long)e);
}
