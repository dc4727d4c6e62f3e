/* TransNormerLLM (TNL; arXiv:2307.14995, arXiv:2405.17381): a language model of gated linear attention with decay and gated linear units,
 * with norms that have no weights and relative positions by cosine and sine channels (LRPE). The attention core is exec/linear.h, the
 * decay schedule that of lightning.
 */
#include "exec/linear.h"
#include "layer/activation.h"
#include "layer/heads.h"
#include "layer/linear.h"
#include "layer/norm.h"
#include "op/lightning.h"

#include <string.h>

#define PAPER "arXiv:2307.14995, arXiv:2405.17381"
#define ANGLE_BLOCK 64 /* tokens after which angles start again from an exact product */

enum { ACT_SILU, ACT_ELU1, ACT_NONE };

static attn_activation activation_of(int64_t act)
{
    return act == ACT_SILU ? ATTN_ACTIVATION_SILU : act == ACT_ELU1 ? ATTN_ACTIVATION_ELU1 : ATTN_ACTIVATION_IDENTITY;
}

/* ---- LRPE ---- */

/* Rows of one head: x [n] rows of d at a stride, wide [n][2d]. */
typedef struct lrpe_head {
    int64_t n, d, offset;
    const float *theta; /* [d] */
    double *cosine, *sine, *turn_c, *turn_s; /* [d] each: of the current token, and of one token's turn */
} lrpe_head;

/* Turn to token t: exact at the start of each block, by one turn in between. */
static void lrpe_angles(lrpe_head *l, int64_t t)
{
    for (int64_t c = 0; c < l->d; c++) {
        double theta = (double)l->theta[c];
        if (t % ANGLE_BLOCK == 0) {
            double angle = (double)(l->offset + t) * theta;
            l->cosine[c] = cos(angle);
            l->sine[c] = sin(angle);
            l->turn_c[c] = t == 0 ? cos(theta) : l->turn_c[c];
            l->turn_s[c] = t == 0 ? sin(theta) : l->turn_s[c];
        } else {
            double re = l->cosine[c], im = l->sine[c];
            l->cosine[c] = re * l->turn_c[c] - im * l->turn_s[c];
            l->sine[c] = im * l->turn_c[c] + re * l->turn_s[c];
        }
    }
}

static void lrpe_forward(lrpe_head *l, const float *x, int64_t stride, float *wide)
{
    for (int64_t t = 0; t < l->n; t++, x += stride, wide += 2 * l->d) {
        lrpe_angles(l, t);
        for (int64_t c = 0; c < l->d; c++) {
            wide[c] = (float)((double)x[c] * l->cosine[c]);
            wide[l->d + c] = (float)((double)x[c] * l->sine[c]);
        }
    }
}

/* grad_x [n] rows at the same stride, overwritten; grad_theta [d] in double, added to. */
static void lrpe_backward(lrpe_head *l, const float *x, int64_t stride, const float *grad_wide, float *grad_x, int64_t grad_stride,
                          double *grad_theta)
{
    for (int64_t t = 0; t < l->n; t++, x += stride, grad_wide += 2 * l->d, grad_x += grad_stride) {
        lrpe_angles(l, t);
        for (int64_t c = 0; c < l->d; c++) {
            double g1 = (double)grad_wide[c], g2 = (double)grad_wide[l->d + c];
            grad_theta[c] += (double)(l->offset + t) * (double)x[c] * (g2 * l->cosine[c] - g1 * l->sine[c]);
            grad_x[c] = (float)(g1 * l->cosine[c] + g2 * l->sine[c]);
        }
    }
}

/* Scratch for the heads that run at the same time. */
static attn_status lrpe_scratch(attn_call *call, int64_t heads, int64_t d, double **scratch)
{
    *scratch = attn_arena_array(call->arena, (size_t)heads * 5, (size_t)d * sizeof **scratch);
    return *scratch != NULL ? ATTN_OK : attn_fail_memory((size_t)(heads * 5 * d) * sizeof **scratch);
}

static lrpe_head lrpe_at(int64_t n, int64_t d, int64_t offset, const float *theta, double *scratch, int64_t h)
{
    double *own = scratch + h * 5 * d;
    return (lrpe_head){.n = n, .d = d, .offset = offset, .theta = theta + h * d, .cosine = own, .sine = own + d, .turn_c = own + 2 * d,
                       .turn_s = own + 3 * d};
}

/* The gradient of a head's angles, summed over the batch in order. */
static double *lrpe_sum(double *scratch, int64_t h, int64_t d) { return scratch + (h * 5 + 4) * d; }

/* ---- Gated linear attention ---- */

typedef struct core {
    int64_t batch, n, rows, c, e, heads, d, key; /* key: d, or 2d with LRPE */
    int64_t offset, block, act;
    double eps;
    int by_token; /* evaluate token by token */
    const float *w_qkvu, *w_o, *slope, *theta, *state_in;
    const uint8_t *mask;
} core;

typedef struct core_gradients {
    float *x, *w_qkvu, *w_o, *theta, *state; /* x and state are overwritten, the others added to; each may be NULL */
} core_gradients;

/* What the way to the output leaves behind. */
typedef struct core_work {
    float *z;          /* [rows, 4E]: q, k, v, u before activations */
    float *q, *k, *v;  /* [B,heads,N,key or d] as the attention gets them */
    float *y;          /* [rows, E], heads concatenated */
    float *normed;     /* srms(y) */
    float *gated;      /* u * srms(y) */
    double *scratch;
} core_work;

static attn_linattn core_shape(const core *g)
{
    return (attn_linattn){.batch = g->batch, .heads = g->heads, .kv_heads = g->heads, .n = g->n, .m = g->n, .d = g->key, .dv = g->d,
                          .causal = 1, .chunk = g->block, .scale = 1, .slope = g->slope};
}

/* Activation, LRPE and mask on the way from z to the attention's inputs, or without LRPE straight. act [N][d] is scratch of a head. */
static void split_head(const core *g, core_work *w, float *act, int64_t b, int64_t h)
{
    attn_activation f = activation_of(g->act);
    for (int part = 0; part < 2; part++) {
        float *to = (part == 0 ? w->q : w->k) + (b * g->heads + h) * g->n * g->key;
        float *plain = g->theta != NULL ? act : to;
        for (int64_t t = 0; t < g->n; t++) {
            attn_activation_forward(f, 1, g->d, w->z + (b * g->n + t) * 4 * g->e + part * g->e + h * g->d, plain + t * g->d);
        }
        if (g->theta != NULL) {
            lrpe_head l = lrpe_at(g->n, g->d, g->offset, g->theta, w->scratch, h);
            lrpe_forward(&l, act, g->d, to);
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

static attn_head_rows rows_of(const core *g) { return (attn_head_rows){g->batch, g->n, g->heads, g->d, g->e, 0}; }

/* gated = u * normed; u lies in z. */
static void gate(const core *g, int threads, const core_work *w, float *gated)
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
static attn_status core_inner(attn_call *call, const core *g, const float *x, core_work *w, float *state_out)
{
    int64_t wide = g->batch * g->heads * g->n * g->key, narrow = g->rows * g->e, states = g->batch * g->heads * g->key * g->d;
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
    ATTN_TRY(lrpe_scratch(call, g->heads, g->d, &w->scratch));
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
        if (g->state_in != NULL) {
            memcpy(state_out, g->state_in, (size_t)states * sizeof *state_out);
        } else {
            memset(state_out, 0, (size_t)states * sizeof *state_out);
        }
        shape.chunk = 0;
        ATTN_TRY(attn_linattn_decode(&shape, call->arena, call->threads, w->q, w->k, w->v, state_out, by_head));
    } else {
        ATTN_TRY(attn_linattn_forward(&shape, call->arena, call->threads, w->q, w->k, w->v, g->state_in, by_head, state_out));
    }
    attn_head_rows rows = rows_of(g);
    attn_heads_join(&rows, call->threads, by_head, w->y);
    attn_norm_forward(ATTN_NORM_RMS, call->threads, g->rows, g->e, g->eps, w->y, NULL, NULL, w->normed);
    gate(g, call->threads, w, w->gated);
    return ATTN_OK;
}

static attn_status core_forward(attn_call *call, const core *g, const float *x, float *o, float *state_out)
{
    core_work w;
    ATTN_TRY(core_inner(call, g, x, &w, state_out));
    return attn_linear_forward(call->arena, call->threads, g->rows, g->e, g->c, w.gated, g->w_o, NULL, o);
}

/* From the gradients of the attention's inputs to those of z (q, k and v parts of a head). */
static void split_head_back(const core *g, const core_work *w, const float *gq, const float *gk, const float *gv, float *gz, float *act,
                            float *narrow, int64_t b, int64_t h)
{
    attn_activation f = activation_of(g->act);
    for (int part = 0; part < 2; part++) {
        const float *grad = (part == 0 ? gq : gk) + (b * g->heads + h) * g->n * g->key;
        if (g->theta != NULL) {
            lrpe_head l = lrpe_at(g->n, g->d, g->offset, g->theta, w->scratch, h);
            for (int64_t t = 0; t < g->n; t++) {
                attn_activation_forward(f, 1, g->d, w->z + (b * g->n + t) * 4 * g->e + part * g->e + h * g->d, act + t * g->d);
            }
            lrpe_backward(&l, act, g->d, grad, narrow, g->d, lrpe_sum(w->scratch, h, g->d));
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

static attn_status core_backward(attn_call *call, const core *g, const float *x, const float *grad_o, const core_gradients *to)
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
        double *sum = lrpe_sum(w.scratch, h, g->d);
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

/* ---- SGLU: (x w_1 * x w_2) w_3 ---- */

typedef struct sglu {
    int64_t rows, c, f;
    const float *w_1, *w_2, *w_3;
} sglu;

static attn_status sglu_hidden(attn_call *call, const sglu *s, const float *x, float **a, float **b, float **product)
{
    ATTN_TRY(attn_take_f32(call, s->rows * s->f, a));
    ATTN_TRY(attn_take_f32(call, s->rows * s->f, b));
    ATTN_TRY(attn_take_f32(call, s->rows * s->f, product));
    ATTN_TRY(attn_linear_forward(call->arena, call->threads, s->rows, s->c, s->f, x, s->w_1, NULL, *a));
    ATTN_TRY(attn_linear_forward(call->arena, call->threads, s->rows, s->c, s->f, x, s->w_2, NULL, *b));
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t i = 0; i < s->rows * s->f; i++) {
        (*product)[i] = (*a)[i] * (*b)[i];
    }
    return ATTN_OK;
}

static attn_status sglu_forward(attn_call *call, const sglu *s, const float *x, float *o)
{
    float *a, *b, *product;
    ATTN_TRY(sglu_hidden(call, s, x, &a, &b, &product));
    return attn_linear_forward(call->arena, call->threads, s->rows, s->f, s->c, product, s->w_3, NULL, o);
}

/* grad_x is overwritten, the weights' gradients are added to; each may be NULL. */
static attn_status sglu_backward(attn_call *call, const sglu *s, const float *x, const float *grad_o, float *grad_x, float *grad_1,
                                 float *grad_2, float *grad_3)
{
    float *a, *b, *product, *h, *more;
    ATTN_TRY(sglu_hidden(call, s, x, &a, &b, &product));
    ATTN_TRY(attn_take_f32(call, s->rows * s->f, &h));
    ATTN_TRY(attn_take_f32(call, s->rows * s->c, &more));
    ATTN_TRY(attn_linear_backward(call->arena, call->threads, s->rows, s->f, s->c, product, s->w_3, grad_o, h, grad_3, NULL));
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t i = 0; i < s->rows * s->f; i++) {
        float left = a[i];
        a[i] = h[i] * b[i];
        b[i] = h[i] * left;
    }
    ATTN_TRY(attn_linear_backward(call->arena, call->threads, s->rows, s->c, s->f, x, s->w_1, a, grad_x, grad_1, NULL));
    ATTN_TRY(attn_linear_backward(call->arena, call->threads, s->rows, s->c, s->f, x, s->w_2, b, grad_x != NULL ? more : NULL, grad_2,
                                  NULL));
    if (grad_x != NULL) {
        attn_add_f32(call->threads, s->rows * s->c, grad_x, more);
    }
    return ATTN_OK;
}

/* ---- A layer ---- */

typedef struct layer {
    core core;
    sglu sglu;
} layer;

typedef struct layer_gradients {
    core_gradients core;
    float *w_1, *w_2, *w_3;
} layer_gradients;

/* o may be x. */
static attn_status layer_forward(attn_call *call, const layer *y, const float *x, float *o, float *state_out)
{
    const core *g = &y->core;
    int64_t count = g->rows * g->c;
    float *normed, *update;
    attn_arena_mark mark = attn_arena_get_mark(call->arena);
    ATTN_TRY(attn_take_f32(call, count, &normed));
    ATTN_TRY(attn_take_f32(call, count, &update));
    attn_norm_forward(ATTN_NORM_RMS, call->threads, g->rows, g->c, g->eps, x, NULL, NULL, normed);
    ATTN_TRY(core_forward(call, g, normed, update, state_out));
    for (int64_t i = 0; i < count; i++) {
        o[i] = x[i] + update[i];
    }
    attn_norm_forward(ATTN_NORM_RMS, call->threads, g->rows, g->c, g->eps, o, NULL, NULL, normed);
    ATTN_TRY(sglu_forward(call, &y->sglu, normed, update));
    attn_add_f32(call->threads, count, o, update);
    attn_arena_release(call->arena, mark);
    return ATTN_OK;
}

/* grad_x may be grad_o. */
static attn_status layer_backward(attn_call *call, const layer *y, const float *x, const float *grad_o, float *grad_x,
                                  const layer_gradients *to)
{
    const core *g = &y->core;
    int64_t count = g->rows * g->c;
    float *normed, *middle, *middle_normed, *grad, *through, *grad_middle;
    attn_arena_mark mark = attn_arena_get_mark(call->arena);
    ATTN_TRY(attn_take_f32(call, count, &normed));
    ATTN_TRY(attn_take_f32(call, count, &middle));
    ATTN_TRY(attn_take_f32(call, count, &middle_normed));
    ATTN_TRY(attn_take_f32(call, count, &grad));
    ATTN_TRY(attn_take_f32(call, count, &through));
    ATTN_TRY(attn_take_f32(call, count, &grad_middle));
    attn_norm_forward(ATTN_NORM_RMS, call->threads, g->rows, g->c, g->eps, x, NULL, NULL, normed);
    ATTN_TRY(core_forward(call, g, normed, middle, NULL));
    attn_add_f32(call->threads, count, middle, x);
    attn_norm_forward(ATTN_NORM_RMS, call->threads, g->rows, g->c, g->eps, middle, NULL, NULL, middle_normed);
    ATTN_TRY(sglu_backward(call, &y->sglu, middle_normed, grad_o, grad, to->w_1, to->w_2, to->w_3));
    ATTN_TRY(attn_norm_backward(ATTN_NORM_RMS, call->arena, call->threads, g->rows, g->c, g->eps, middle, NULL, grad, grad_middle, NULL,
                                NULL));
    attn_add_f32(call->threads, count, grad_middle, grad_o);
    core_gradients inner = to->core;
    inner.x = grad;
    ATTN_TRY(core_backward(call, g, normed, grad_middle, &inner));
    ATTN_TRY(attn_norm_backward(ATTN_NORM_RMS, call->arena, call->threads, g->rows, g->c, g->eps, x, NULL, grad, through, NULL, NULL));
    if (grad_x != NULL) {
        for (int64_t i = 0; i < count; i++) {
            grad_x[i] = through[i] + grad_middle[i];
        }
    }
    attn_arena_release(call->arena, mark);
    return ATTN_OK;
}

static double core_flops(const core *g)
{
    attn_linattn shape = core_shape(g);
    return (double)g->rows * 10 * (double)(g->c * g->e) + attn_linattn_flops(&shape);
}

/* ---- tnl, tnl.decode, tnl.attention ---- */

typedef struct tnl_params {
    int64_t heads, act, offset, block, scale_embedding, schedule;
    double eps;
    attn_ints lrpe_layers;
} tnl_params;

#define HEADS_PARAM ATTN_P_INT("heads", tnl_params, heads, NULL, 1, INFINITY, "attention heads; divides E")
#define ACT_PARAM ATTN_P_CHOICE("act", tnl_params, act, "silu", "silu|elu1|none", "activation of queries and keys")
#define EPS_PARAM ATTN_P_FLOAT("eps", tnl_params, eps, "1e-6", 0, INFINITY, "of every norm")
#define OFFSET_PARAM ATTN_P_INT("offset", tnl_params, offset, "0", 0, INFINITY, "position of the first token: tokens already in kv_state")
#define BLOCK_PARAM ATTN_P_INT("block", tnl_params, block, "64", 1, INFINITY, "tile length of the attention; changes rounding only")

static const attn_param_info layer_param_table[] = {HEADS_PARAM, ACT_PARAM, EPS_PARAM, OFFSET_PARAM, BLOCK_PARAM};

enum { X, W_QKVU, W_O, W_1, W_2, W_3, SLOPE, THETA, MASK, STATE, O, STATE_OUT };

#define PORT_X ATTN_IN("x", "B,N,C", FLOAT, ATTN_PORT_DIFF, "tokens")
#define PORT_QKVU ATTN_IN("w_qkvu", "4*E,C", FLOAT, ATTN_PORT_DIFF, "projection to queries, keys, values and output gate")
#define PORT_O ATTN_IN("w_o", "C,E", FLOAT, ATTN_PORT_DIFF, "output projection of the attention")
#define PORT_SLOPE ATTN_IN("slope", "Hl", FLOAT, ATTN_PORT_OPTIONAL, "decay rate of each head in this layer (lightning.slopes); absent: 0")
#define PORT_THETA                                                                                                     \
    ATTN_IN("theta", "Ht,dt", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "LRPE angles per token; absent: no positions but the decay")
#define PORT_MASK ATTN_IN("mask", "B,N", BOOL, ATTN_PORT_OPTIONAL, "true for tokens, false for padding")
#define PORT_STATE                                                                                                     \
    ATTN_IN("kv_state", "B,Hs,ks,ds", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "state after earlier tokens, [B,heads,d or 2d,d]")
#define PORT_STATE_OUT ATTN_OUT("kv_state", "B,heads,key,d", FLOAT, 0, "state after these tokens")

static const attn_port_info layer_ports[] = {
    PORT_X, PORT_QKVU, PORT_O,
    ATTN_IN("w_1", "F,C", FLOAT, ATTN_PORT_DIFF, "input projection of the gated unit"),
    ATTN_IN("w_2", "F,C", FLOAT, ATTN_PORT_DIFF, "its other factor"),
    ATTN_IN("w_3", "C,F", FLOAT, ATTN_PORT_DIFF, "its output projection"),
    PORT_SLOPE, PORT_THETA, PORT_MASK, PORT_STATE,
    ATTN_OUT("o", "B,N,C", FLOAT, ATTN_PORT_DIFF, "tokens after the layer"),
    PORT_STATE_OUT,
};

/* Ports of tnl.attention: those of the layer without the gated unit. */
enum { A_X, A_QKVU, A_O_W, A_SLOPE, A_THETA, A_MASK, A_STATE, A_O, A_STATE_OUT };

static const attn_port_info attention_ports[] = {
    PORT_X, PORT_QKVU, PORT_O, PORT_SLOPE, PORT_THETA, PORT_MASK, PORT_STATE,
    ATTN_OUT("o", "B,N,C", FLOAT, ATTN_PORT_DIFF, "the attention's output, no residual"),
    PORT_STATE_OUT,
};

static attn_status check_heads(int64_t e, int64_t heads)
{
    return e % heads == 0 && e > 0 ? ATTN_OK
                                   : attn_fail(ATTN_ERR_ARGUMENT, "heads = %lld does not divide E = %lld", (long long)heads, (long long)e);
}

static attn_status core_setup(const attn_call *call, const attn_tensor *w_qkvu, const attn_tensor *w_o, const attn_tensor *slope,
                              const attn_tensor *theta, const attn_tensor *mask, const attn_tensor *state, core *g)
{
    const tnl_params *p = call->params;
    *g = (core){.batch = attn_dim(call, "B"), .n = attn_dim(call, "N"), .c = attn_dim(call, "C"), .e = attn_dim(call, "E"),
                .heads = p->heads, .offset = p->offset, .block = p->block, .act = p->act, .eps = p->eps, .w_qkvu = attn_f32(w_qkvu),
                .w_o = attn_f32(w_o), .slope = attn_f32(slope), .theta = attn_f32(theta), .mask = attn_bool(mask),
                .state_in = attn_f32(state)};
    ATTN_TRY(check_heads(g->e, g->heads));
    g->rows = g->batch * g->n;
    g->d = g->e / g->heads;
    g->key = theta != NULL ? 2 * g->d : g->d;
    if (g->n < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "x has no tokens");
    }
    if (slope != NULL && slope->shape[0] != g->heads) {
        return attn_fail(ATTN_ERR_SHAPE, "slope has %lld numbers, expected heads = %lld", (long long)slope->shape[0], (long long)g->heads);
    }
    if (theta != NULL && (theta->shape[0] != g->heads || theta->shape[1] != g->d)) {
        return attn_fail(ATTN_ERR_SHAPE, "theta is [%lld, %lld], expected [heads, E/heads] = [%lld, %lld]", (long long)theta->shape[0],
                         (long long)theta->shape[1], (long long)g->heads, (long long)g->d);
    }
    if (state != NULL && (state->shape[1] != g->heads || state->shape[2] != g->key || state->shape[3] != g->d)) {
        return attn_fail(ATTN_ERR_SHAPE, "kv_state is [B, %lld, %lld, %lld], expected [B, %lld, %lld, %lld]", (long long)state->shape[1],
                         (long long)state->shape[2], (long long)state->shape[3], (long long)g->heads, (long long)g->key, (long long)g->d);
    }
    return ATTN_OK;
}

static attn_status layer_setup(const attn_call *call, layer *y)
{
    ATTN_TRY(core_setup(call, call->t[W_QKVU], call->t[W_O], call->t[SLOPE], call->t[THETA], call->t[MASK], call->t[STATE], &y->core));
    y->sglu = (sglu){y->core.rows, y->core.c, attn_dim(call, "F"), attn_f32(call->t[W_1]), attn_f32(call->t[W_2]),
                     attn_f32(call->t[W_3])};
    return ATTN_OK;
}

static void set_state_dims(attn_call *call, const core *g)
{
    attn_set_dim(call, "heads", g->heads);
    attn_set_dim(call, "key", g->key);
    attn_set_dim(call, "d", g->d);
}

static attn_status tnl_bind(attn_call *call)
{
    layer y;
    ATTN_TRY(layer_setup(call, &y));
    set_state_dims(call, &y.core);
    return ATTN_OK;
}

#define PART 1024 /* tokens of a long sequence that go through the layer together: what lies between stays in the caches */

/* One sequence in parts that hand on their state. */
static attn_status run_parts(attn_call *call, const layer *y, int64_t b)
{
    const core *g = &y->core;
    int64_t state = g->heads * g->key * g->d, at = b * g->n * g->c;
    float *spare, *out = attn_f32(call->t[STATE_OUT]) + b * state;
    ATTN_TRY(attn_take_f32(call, state, &spare));
    for (int64_t first = 0; first < g->n; first += PART) {
        layer part = *y;
        part.core.batch = 1;
        part.core.n = part.core.rows = part.sglu.rows = attn_min_i64(PART, g->n - first);
        part.core.offset = g->offset + first;
        part.core.mask = g->mask != NULL ? g->mask + b * g->n + first : NULL;
        part.core.state_in = g->state_in != NULL ? g->state_in + b * state : NULL;
        if (first > 0) {
            memcpy(spare, out, (size_t)state * sizeof *spare);
            part.core.state_in = spare;
        }
        ATTN_TRY(layer_forward(call, &part, attn_f32(call->t[X]) + at + first * g->c, attn_f32(call->t[O]) + at + first * g->c, out));
    }
    return ATTN_OK;
}

static attn_status run_layer(attn_call *call, int by_token)
{
    layer y;
    ATTN_TRY(layer_setup(call, &y));
    ATTN_TRY(attn_lightning_check_slopes(y.core.slope, y.core.heads));
    y.core.by_token = by_token;
    for (int64_t b = 0; b < y.core.batch && y.core.n > 2 * PART; b++) {
        ATTN_TRY(run_parts(call, &y, b));
    }
    return y.core.n > 2 * PART
               ? ATTN_OK
               : layer_forward(call, &y, attn_f32(call->t[X]), attn_f32(call->t[O]), attn_f32(call->t[STATE_OUT]));
}

static attn_status tnl_forward(attn_call *call) { return run_layer(call, 0); }
static attn_status decode_forward(attn_call *call) { return run_layer(call, 1); }

static attn_status tnl_backward(attn_call *call)
{
    layer y;
    ATTN_TRY(layer_setup(call, &y));
    ATTN_TRY(attn_lightning_check_slopes(y.core.slope, y.core.heads));
    layer_gradients to = {{NULL, attn_f32(call->grad[W_QKVU]), attn_f32(call->grad[W_O]), attn_f32(call->grad[THETA]),
                           attn_f32(call->grad[STATE])},
                          attn_f32(call->grad[W_1]), attn_f32(call->grad[W_2]), attn_f32(call->grad[W_3])};
    return layer_backward(call, &y, attn_f32(call->t[X]), attn_f32(call->grad[O]), attn_f32(call->grad[X]), &to);
}

static attn_status tnl_cost(attn_call *call, attn_cost *cost)
{
    layer y;
    ATTN_TRY(layer_setup(call, &y));
    cost->flops = core_flops(&y.core) + 6 * (double)y.core.rows * (double)(y.sglu.c * y.sglu.f);
    return ATTN_OK;
}

static attn_status attention_setup(const attn_call *call, core *g)
{
    return core_setup(call, call->t[A_QKVU], call->t[A_O_W], call->t[A_SLOPE], call->t[A_THETA], call->t[A_MASK], call->t[A_STATE], g);
}

static attn_status attention_bind(attn_call *call)
{
    core g;
    ATTN_TRY(attention_setup(call, &g));
    set_state_dims(call, &g);
    return ATTN_OK;
}

static attn_status attention_forward(attn_call *call)
{
    core g;
    ATTN_TRY(attention_setup(call, &g));
    ATTN_TRY(attn_lightning_check_slopes(g.slope, g.heads));
    return core_forward(call, &g, attn_f32(call->t[A_X]), attn_f32(call->t[A_O]), attn_f32(call->t[A_STATE_OUT]));
}

static attn_status attention_backward(attn_call *call)
{
    core g;
    ATTN_TRY(attention_setup(call, &g));
    ATTN_TRY(attn_lightning_check_slopes(g.slope, g.heads));
    core_gradients to = {attn_f32(call->grad[A_X]), attn_f32(call->grad[A_QKVU]), attn_f32(call->grad[A_O_W]),
                         attn_f32(call->grad[A_THETA]), attn_f32(call->grad[A_STATE])};
    return core_backward(call, &g, attn_f32(call->t[A_X]), attn_f32(call->grad[A_O]), &to);
}

static attn_status attention_cost(attn_call *call, attn_cost *cost)
{
    core g;
    ATTN_TRY(attention_setup(call, &g));
    cost->flops = core_flops(&g);
    return ATTN_OK;
}

const attn_op_class attn_op_tnl = {
    .info = {.name = "tnl",
             .title = "A TransNormerLLM layer: gated linear attention and a gated linear unit",
             .summary = "One full layer: norm, gated linear attention with decay (lightning), residual, norm, gated linear unit, residual. "
                        "The first layer of the released models also has LRPE positions (theta). Time per token does not depend on the "
                        "length, and the state of generation is one matrix per head.",
             .paper = PAPER,
             .differentiable = 1,
             ATTN_TABLE(layer_param_table, layer_ports)},
    .params_size = sizeof(tnl_params),
    .bind = tnl_bind,
    .forward = tnl_forward,
    .backward = tnl_backward,
    .cost = tnl_cost,
};

const attn_op_class attn_op_tnl_decode = {
    .info = {.name = "tnl.decode",
             .title = "A TransNormerLLM layer, token by token",
             .summary = "The same layer evaluated as a recurrence, for generation: kv_state and offset continue an earlier call.",
             .paper = PAPER,
             ATTN_TABLE(layer_param_table, layer_ports)},
    .params_size = sizeof(tnl_params),
    .bind = tnl_bind,
    .forward = decode_forward,
    .cost = tnl_cost,
};

const attn_op_class attn_op_tnl_attention = {
    .info = {.name = "tnl.attention",
             .title = "TransNormerLLM: the gated linear attention alone",
             .summary = "Projection to queries, keys, values and a gate; activation, LRPE, linear attention with decay, norm over all heads "
                        "together, gate, output projection. No norm before it and no residual.",
             .paper = PAPER,
             .differentiable = 1,
             ATTN_TABLE(layer_param_table, attention_ports)},
    .params_size = sizeof(tnl_params),
    .bind = attention_bind,
    .forward = attention_forward,
    .backward = attention_backward,
    .cost = attention_cost,
};

/* ---- tnl.sglu ---- */

enum { S_X, S_1, S_2, S_3, S_O };

static const attn_port_info sglu_ports[] = {
    ATTN_IN("x", "B,N,C", FLOAT, ATTN_PORT_DIFF, "tokens"),
    ATTN_IN("w_1", "F,C", FLOAT, ATTN_PORT_DIFF, "input projection"),
    ATTN_IN("w_2", "F,C", FLOAT, ATTN_PORT_DIFF, "the other factor"),
    ATTN_IN("w_3", "C,F", FLOAT, ATTN_PORT_DIFF, "output projection"),
    ATTN_OUT("o", "B,N,C", FLOAT, ATTN_PORT_DIFF, "(x w_1 * x w_2) w_3"),
};

static sglu sglu_setup(const attn_call *call)
{
    return (sglu){attn_dim(call, "B") * attn_dim(call, "N"), attn_dim(call, "C"), attn_dim(call, "F"), attn_f32(call->t[S_1]),
                  attn_f32(call->t[S_2]), attn_f32(call->t[S_3])};
}

static attn_status sglu_op_forward(attn_call *call)
{
    sglu s = sglu_setup(call);
    return sglu_forward(call, &s, attn_f32(call->t[S_X]), attn_f32(call->t[S_O]));
}

static attn_status sglu_op_backward(attn_call *call)
{
    sglu s = sglu_setup(call);
    return sglu_backward(call, &s, attn_f32(call->t[S_X]), attn_f32(call->grad[S_O]), attn_f32(call->grad[S_X]),
                         attn_f32(call->grad[S_1]), attn_f32(call->grad[S_2]), attn_f32(call->grad[S_3]));
}

const attn_op_class attn_op_tnl_sglu = {
    .info = {.name = "tnl.sglu",
             .title = "TransNormerLLM: simple gated linear unit",
             .summary = "A feed-forward layer without any activation: the product of two projections, projected back.",
             .paper = PAPER,
             .differentiable = 1,
             ATTN_TABLE_NO_PARAMS(sglu_ports)},
    .forward = sglu_op_forward,
    .backward = sglu_op_backward,
};

/* ---- tnl.srmsnorm ---- */

static const attn_param_info norm_param_table[] = {EPS_PARAM};

enum { N_X, N_O };

static const attn_port_info norm_ports[] = {
    ATTN_IN("x", "...,C", FLOAT, ATTN_PORT_DIFF, "rows, of any rank"),
    ATTN_OUT("o", "...,C", FLOAT, ATTN_PORT_DIFF, "x / sqrt(mean(x^2) + eps)"),
};

static int64_t norm_rows(const attn_call *call)
{
    int64_t width = attn_dim(call, "C");
    return width > 0 ? attn_tensor_count(call->t[N_X]) / width : 0;
}

static attn_status norm_forward(attn_call *call)
{
    const tnl_params *p = call->params;
    attn_norm_forward(ATTN_NORM_RMS, call->threads, norm_rows(call), attn_dim(call, "C"), p->eps, attn_f32(call->t[N_X]), NULL, NULL,
                      attn_f32(call->t[N_O]));
    return ATTN_OK;
}

static attn_status norm_backward(attn_call *call)
{
    const tnl_params *p = call->params;
    return attn_norm_backward(ATTN_NORM_RMS, call->arena, call->threads, norm_rows(call), attn_dim(call, "C"), p->eps,
                              attn_f32(call->t[N_X]), NULL, attn_f32(call->grad[N_O]), attn_f32(call->grad[N_X]), NULL, NULL);
}

const attn_op_class attn_op_tnl_srmsnorm = {
    .info = {.name = "tnl.srmsnorm",
             .title = "TransNormerLLM: simple RMS norm",
             .summary = "Rows divided by their root mean square, without weights.",
             .paper = PAPER,
             .differentiable = 1,
             ATTN_TABLE(norm_param_table, norm_ports)},
    .params_size = sizeof(tnl_params),
    .forward = norm_forward,
    .backward = norm_backward,
};

/* ---- tnl.lrpe ---- */

static const attn_param_info lrpe_param_table[] = {OFFSET_PARAM};

enum { L_X, L_THETA, L_O };

static const attn_port_info lrpe_ports[] = {
    ATTN_IN("x", "B,H,N,d", FLOAT, ATTN_PORT_DIFF, "queries or keys"),
    ATTN_IN("theta", "H,d", FLOAT, ATTN_PORT_DIFF, "angle per token of each channel"),
    ATTN_OUT("o", "B,H,N,2*d", FLOAT, ATTN_PORT_DIFF, "cosine channels, then sine channels"),
};

static attn_status lrpe_op_forward(attn_call *call)
{
    const tnl_params *p = call->params;
    int64_t batch = attn_dim(call, "B"), heads = attn_dim(call, "H"), n = attn_dim(call, "N"), d = attn_dim(call, "d");
    double *scratch;
    ATTN_TRY(lrpe_scratch(call, heads, d, &scratch));
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t h = 0; h < heads; h++) {
        for (int64_t b = 0; b < batch; b++) {
            lrpe_head l = lrpe_at(n, d, p->offset, attn_f32(call->t[L_THETA]), scratch, h);
            int64_t at = (b * heads + h) * n * d;
            lrpe_forward(&l, attn_f32(call->t[L_X]) + at, d, attn_f32(call->t[L_O]) + 2 * at);
        }
    }
    return ATTN_OK;
}

static attn_status lrpe_op_backward(attn_call *call)
{
    const tnl_params *p = call->params;
    int64_t batch = attn_dim(call, "B"), heads = attn_dim(call, "H"), n = attn_dim(call, "N"), d = attn_dim(call, "d");
    double *scratch;
    float *grad_x = attn_f32(call->grad[L_X]), *grad_theta = attn_f32(call->grad[L_THETA]);
    ATTN_TRY(lrpe_scratch(call, heads, d, &scratch));
    if (grad_x == NULL) {
        ATTN_TRY(attn_take_f32(call, batch * heads * n * d, &grad_x));
    }
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t h = 0; h < heads; h++) {
        double *sum = lrpe_sum(scratch, h, d);
        memset(sum, 0, (size_t)d * sizeof *sum);
        for (int64_t b = 0; b < batch; b++) {
            lrpe_head l = lrpe_at(n, d, p->offset, attn_f32(call->t[L_THETA]), scratch, h);
            int64_t at = (b * heads + h) * n * d;
            lrpe_backward(&l, attn_f32(call->t[L_X]) + at, d, attn_f32(call->grad[L_O]) + 2 * at, grad_x + at, d, sum);
        }
        for (int64_t c = 0; c < d && grad_theta != NULL; c++) {
            grad_theta[h * d + c] = (float)sum[c];
        }
    }
    return ATTN_OK;
}

const attn_op_class attn_op_tnl_lrpe = {
    .info = {.name = "tnl.lrpe",
             .title = "TransNormerLLM: linearised relative positions",
             .summary = "Each channel times the cosine and times the sine of its angle at the token's position: products of queries and keys "
                        "then depend on their distance. Doubles the width; angles are learned.",
             .paper = PAPER,
             .differentiable = 1,
             ATTN_TABLE(lrpe_param_table, lrpe_ports)},
    .params_size = sizeof(tnl_params),
    .forward = lrpe_op_forward,
    .backward = lrpe_op_backward,
};

/* ---- tnl.model ---- */

static const attn_param_info model_param_table[] = {
    HEADS_PARAM,
    ATTN_P_LIST(INTS, "lrpe_layers", tnl_params, lrpe_layers, "[0]", 0, INFINITY, 0, 0, "layers that have LRPE, in the order of theta"),
    ATTN_P_BOOL("scale_embedding", tnl_params, scale_embedding, "true", "embeddings are multiplied by sqrt(C)"),
    ATTN_P_CHOICE("schedule", tnl_params, schedule, "geometric", "geometric|linear", "decay schedule, as in lightning.slopes"),
    ACT_PARAM,
    EPS_PARAM,
};

enum { M_TOKENS, M_EMBED, M_QKVU, M_O_W, M_1, M_2, M_3, M_THETA, M_HEAD, M_O };

static const attn_port_info model_ports[] = {
    ATTN_IN("tokens", "B,N", INT, 0, "token ids"),
    ATTN_IN("embed", "V,C", FLOAT, ATTN_PORT_DIFF, "token embeddings"),
    ATTN_IN("w_qkvu", "L,4*E,C", FLOAT, ATTN_PORT_DIFF, "weights of the layers, as in tnl"),
    ATTN_IN("w_o", "L,C,E", FLOAT, ATTN_PORT_DIFF, "output projections of the layers"),
    ATTN_IN("w_1", "L,F,C", FLOAT, ATTN_PORT_DIFF, "input projections of their gated units"),
    ATTN_IN("w_2", "L,F,C", FLOAT, ATTN_PORT_DIFF, "the other factors"),
    ATTN_IN("w_3", "L,C,F", FLOAT, ATTN_PORT_DIFF, "output projections of the gated units"),
    ATTN_IN("theta", "Lr,Ht,dt", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "LRPE angles of the layers in lrpe_layers"),
    ATTN_IN("lm_head", "V,C", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "output projection; absent: embed"),
    ATTN_OUT("o", "B,N,V", FLOAT, ATTN_PORT_DIFF, "logits"),
};

/* Index of a layer's angles; -1 when it has none. */
static int64_t lrpe_index(const tnl_params *p, int64_t layer_index)
{
    for (int i = 0; i < p->lrpe_layers.count; i++) {
        if (p->lrpe_layers.items[i] == layer_index) {
            return i;
        }
    }
    return -1;
}

static attn_status model_bind(attn_call *call)
{
    const tnl_params *p = call->params;
    const attn_tensor *theta = call->t[M_THETA];
    int64_t layers = attn_dim(call, "L"), e = attn_dim(call, "E");
    ATTN_TRY(check_heads(e, p->heads));
    if ((theta != NULL ? theta->shape[0] : 0) != p->lrpe_layers.count) {
        return attn_fail(ATTN_ERR_SHAPE, "theta holds the angles of %lld layers, lrpe_layers lists %d",
                         (long long)(theta != NULL ? theta->shape[0] : 0), p->lrpe_layers.count);
    }
    if (theta != NULL && (theta->shape[1] != p->heads || theta->shape[2] != e / p->heads)) {
        return attn_fail(ATTN_ERR_SHAPE, "theta is [%lld, %lld, %lld], expected [layers, heads, E/heads] = [%d, %lld, %lld]",
                         (long long)theta->shape[0], (long long)theta->shape[1], (long long)theta->shape[2], p->lrpe_layers.count,
                         (long long)p->heads, (long long)(e / p->heads));
    }
    for (int i = 0; i < p->lrpe_layers.count; i++) {
        if (p->lrpe_layers.items[i] >= layers || lrpe_index(p, p->lrpe_layers.items[i]) != i) {
            return attn_fail(ATTN_ERR_ARGUMENT, "lrpe_layers[%d] = %lld: expected different layers below L = %lld", i,
                             (long long)p->lrpe_layers.items[i], (long long)layers);
        }
    }
    return ATTN_OK;
}

typedef struct model {
    int64_t layers, rows, c, e, f, vocabulary, angles; /* angles: of one layer */
    float factor;
    float *slopes; /* [layers][heads] */
    const int64_t *tokens;
    const float *head;
} model;

static attn_status model_setup(attn_call *call, model *m)
{
    const tnl_params *p = call->params;
    *m = (model){.layers = attn_dim(call, "L"), .rows = attn_dim(call, "B") * attn_dim(call, "N"), .c = attn_dim(call, "C"),
                 .e = attn_dim(call, "E"), .f = attn_dim(call, "F"), .vocabulary = attn_dim(call, "V"), .angles = attn_dim(call, "E"),
                 .tokens = attn_i64(call->t[M_TOKENS])};
    m->factor = p->scale_embedding ? (float)sqrt((double)m->c) : 1.0f;
    m->head = attn_f32(call->t[call->t[M_HEAD] != NULL ? M_HEAD : M_EMBED]);
    ATTN_TRY(attn_take_f32(call, m->layers * p->heads, &m->slopes));
    for (int64_t l = 0; l < m->layers; l++) {
        attn_lightning_slopes(p->schedule, p->heads, l, m->layers, 1e-5, m->slopes + l * p->heads);
    }
    for (int64_t r = 0; r < m->rows; r++) {
        if (m->tokens[r] < 0 || m->tokens[r] >= m->vocabulary) {
            return attn_fail(ATTN_ERR_ARGUMENT, "tokens holds %lld, expected 0 ... %lld", (long long)m->tokens[r],
                             (long long)(m->vocabulary - 1));
        }
    }
    return ATTN_OK;
}

static layer model_layer(const attn_call *call, const model *m, int64_t l)
{
    const tnl_params *p = call->params;
    int64_t lrpe = lrpe_index(p, l), weights = m->f * m->c, d = m->e / p->heads;
    return (layer){.core = {.batch = attn_dim(call, "B"), .n = attn_dim(call, "N"), .rows = m->rows, .c = m->c, .e = m->e, .heads = p->heads,
                            .d = d, .key = lrpe >= 0 ? 2 * d : d, .block = 64, .act = p->act, .eps = p->eps,
                            .w_qkvu = attn_f32(call->t[M_QKVU]) + l * 4 * m->e * m->c, .w_o = attn_f32(call->t[M_O_W]) + l * m->c * m->e,
                            .slope = m->slopes + l * p->heads, .theta = lrpe >= 0 ? attn_f32(call->t[M_THETA]) + lrpe * m->angles : NULL},
                   .sglu = {m->rows, m->c, m->f, attn_f32(call->t[M_1]) + l * weights, attn_f32(call->t[M_2]) + l * weights,
                            attn_f32(call->t[M_3]) + l * weights}};
}

static void embed(const attn_call *call, const model *m, float *x)
{
    const float *table = attn_f32(call->t[M_EMBED]);
    for (int64_t r = 0; r < m->rows; r++) {
        for (int64_t c = 0; c < m->c; c++) {
            x[r * m->c + c] = m->factor * table[m->tokens[r] * m->c + c];
        }
    }
}

/* The residual stream before each layer and after the last: xs [layers + 1] pointers, which may all be the same. */
static attn_status run_layers(attn_call *call, const model *m, float **xs)
{
    embed(call, m, xs[0]);
    for (int64_t l = 0; l < m->layers; l++) {
        layer y = model_layer(call, m, l);
        ATTN_TRY(layer_forward(call, &y, xs[l], xs[l + 1], NULL));
    }
    return ATTN_OK;
}

static attn_status model_forward(attn_call *call)
{
    const tnl_params *p = call->params;
    model m;
    ATTN_TRY(model_setup(call, &m));
    float *x, **xs = attn_arena_array(call->arena, (size_t)m.layers + 1, sizeof *xs);
    ATTN_TRY(attn_take_f32(call, m.rows * m.c, &x));
    if (xs == NULL) {
        return attn_fail_memory((size_t)(m.layers + 1) * sizeof *xs);
    }
    for (int64_t l = 0; l <= m.layers; l++) {
        xs[l] = x;
    }
    ATTN_TRY(run_layers(call, &m, xs));
    attn_norm_forward(ATTN_NORM_RMS, call->threads, m.rows, m.c, p->eps, x, NULL, NULL, x);
    return attn_linear_forward(call->arena, call->threads, m.rows, m.c, m.vocabulary, x, m.head, NULL, attn_f32(call->t[M_O]));
}

static float *slice(const attn_tensor *grad, int64_t at) { return grad != NULL ? attn_f32(grad) + at : NULL; }

static attn_status model_backward(attn_call *call)
{
    const tnl_params *p = call->params;
    model m;
    ATTN_TRY(model_setup(call, &m));
    int64_t count = m.rows * m.c, weights = m.f * m.c;
    float *memory, *grad, *normed, **xs = attn_arena_array(call->arena, (size_t)m.layers + 1, sizeof *xs);
    ATTN_TRY(attn_take_f32(call, (m.layers + 1) * count, &memory));
    ATTN_TRY(attn_take_f32(call, count, &grad));
    ATTN_TRY(attn_take_f32(call, count, &normed));
    if (xs == NULL) {
        return attn_fail_memory((size_t)(m.layers + 1) * sizeof *xs);
    }
    for (int64_t l = 0; l <= m.layers; l++) {
        xs[l] = memory + l * count;
    }
    ATTN_TRY(run_layers(call, &m, xs));
    attn_norm_forward(ATTN_NORM_RMS, call->threads, m.rows, m.c, p->eps, xs[m.layers], NULL, NULL, normed);
    float *grad_embed = attn_f32(call->grad[M_EMBED]);
    ATTN_TRY(attn_linear_backward(call->arena, call->threads, m.rows, m.c, m.vocabulary, normed, m.head, attn_f32(call->grad[M_O]), grad,
                                  call->t[M_HEAD] != NULL ? attn_f32(call->grad[M_HEAD]) : grad_embed, NULL));
    ATTN_TRY(attn_norm_backward(ATTN_NORM_RMS, call->arena, call->threads, m.rows, m.c, p->eps, xs[m.layers], NULL, grad, normed, NULL,
                                NULL));
    memcpy(grad, normed, (size_t)count * sizeof *grad);
    for (int64_t l = m.layers - 1; l >= 0; l--) {
        layer y = model_layer(call, &m, l);
        int64_t lrpe = lrpe_index(p, l);
        layer_gradients to = {{NULL, slice(call->grad[M_QKVU], l * 4 * m.e * m.c), slice(call->grad[M_O_W], l * m.c * m.e),
                               lrpe >= 0 ? slice(call->grad[M_THETA], lrpe * m.angles) : NULL, NULL},
                              slice(call->grad[M_1], l * weights), slice(call->grad[M_2], l * weights), slice(call->grad[M_3], l * weights)};
        ATTN_TRY(layer_backward(call, &y, xs[l], grad, grad, &to));
    }
    for (int64_t r = 0; r < m.rows && grad_embed != NULL; r++) {
        for (int64_t c = 0; c < m.c; c++) {
            grad_embed[m.tokens[r] * m.c + c] += m.factor * grad[r * m.c + c];
        }
    }
    return ATTN_OK;
}

static attn_status model_cost(attn_call *call, attn_cost *cost)
{
    const tnl_params *p = call->params;
    double rows = (double)(attn_dim(call, "B") * attn_dim(call, "N")), c = (double)attn_dim(call, "C"), e = (double)attn_dim(call, "E");
    double d = e / (double)p->heads;
    for (int64_t l = 0; l < attn_dim(call, "L"); l++) {
        double key = lrpe_index(p, l) >= 0 ? 2 * d : d;
        cost->flops += rows * (10 * c * e + (double)p->heads * (4 * key * d + 64 * (key + d)) + 6 * c * (double)attn_dim(call, "F"));
    }
    cost->flops += 2 * rows * c * (double)attn_dim(call, "V");
    return ATTN_OK;
}

const attn_op_class attn_op_tnl_model = {
    .info = {.name = "tnl.model",
             .title = "A TransNormerLLM model, from tokens to logits",
             .summary = "Scaled embeddings, tnl layers with the decay of their depth, a last norm, and logits by the embedding or lm_head.",
             .paper = PAPER,
             .differentiable = 1,
             ATTN_TABLE(model_param_table, model_ports)},
    .params_size = sizeof(tnl_params),
    .bind = model_bind,
    .forward = model_forward,
    .backward = model_backward,
    .cost = model_cost,
};
