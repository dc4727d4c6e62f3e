/* Based (arXiv:2402.18668): global linear attention whose weights are the second-order Taylor expansion of exp, exact attention in a tiny
 * window, and gated short convolutions. The state of the linear part is a dial between the recall of attention and the speed of
 * recurrences. exec/linear.h computes it: pairs inside a chunk by their score s as 1 + s + s^2/2, chunks by features. The window is in
 * based_window.c.
 */
#include "exec/linear.h"
#include "kernel/linear.h"
#include "kernel/tile.h"
#include "layer/activation.h"
#include "layer/conv.h"
#include "layer/heads.h"
#include "layer/linear.h"
#include "op/class.h"

#include <omp.h>
#include <string.h>

#define PAPER "arXiv:2402.18668"
#define CHUNK 128

/* ---- Features: phi(x) = 1 | sqrt(scale) x | scale/sqrt(2) x_i^2 and scale x_i x_j for i < j, row by row ---- */

static int64_t packed_width(int64_t d) { return 1 + d + d * (d + 1) / 2; }

static void expand(int64_t d, double scale, const float *x, float *phi)
{
    attn_linear_kernels_get()->taylor_features(d, scale, x, phi);
}

static void expand_back(int64_t d, double scale, const float *x, const float *grad_phi, float *grad_x)
{
    attn_linear_kernels_get()->taylor_features_back(d, scale, x, grad_phi, grad_x);
}

static void pair_weights(int64_t count, float *s, float *slope) { attn_linear_kernels_get()->taylor(s, slope, count); }

static const attn_feature_map taylor = {packed_width, expand, expand_back, pair_weights};

/* ---- The core ---- */

typedef struct core {
    int64_t batch, heads, kv_heads, n, m, d, dv;
    int causal, normalize;
    double scale, eps;
} core;

/* more: further columns of values. */
static attn_linattn shape_of(const core *c, int64_t more)
{
    return (attn_linattn){.batch = c->batch, .heads = c->heads, .kv_heads = c->kv_heads, .n = c->n, .m = c->m, .d = c->d, .dv = c->dv + more,
                          .causal = c->causal, .chunk = CHUNK, .scale = c->scale, .map = &taylor};
}

/* Values with a column of ones, so that the row sums come out of the same products. */
static attn_status widen(attn_call *call, const core *c, const float *v, float **wide)
{
    int64_t rows = c->batch * c->kv_heads * c->m;
    ATTN_TRY(attn_take_f32(call, rows * (c->dv + 1), wide));
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        memcpy(*wide + r * (c->dv + 1), v + r * c->dv, (size_t)c->dv * sizeof *v);
        (*wide)[r * (c->dv + 1) + c->dv] = 1;
    }
    return ATTN_OK;
}

/* 0 for a query that sees no key. */
static float reciprocal(const core *c, float z) { return z == 0 ? 0 : (float)(1 / ((double)z + c->eps)); }

/* o [B,H,N,Dv], z [B,H,N] */
static attn_status core_forward(attn_call *call, const core *c, const float *q, const float *k, const float *v, float *o, float *z)
{
    attn_linattn_sums sums = {z, NULL, c->normalize, c->eps};
    attn_linattn shape = shape_of(c, 0);
    shape.sums = &sums;
    return attn_linattn_forward(&shape, call->arena, call->threads, q, k, v, NULL, o, NULL);
}

/* Gradients are overwritten; each may be NULL. */
static attn_status core_backward(attn_call *call, const core *c, const float *q, const float *k, const float *v, const float *o,
                                 const float *z, const float *grad_o, float *grad_q, float *grad_k, float *grad_v)
{
    float *wide, *grad_sums, *grad_wide;
    int64_t rows = c->batch * c->heads * c->n, keys = c->batch * c->kv_heads * c->m;
    const attn_tile_kernels *kernels = attn_tile_kernels_get();
    attn_linattn shape = shape_of(c, 1);
    ATTN_TRY(widen(call, c, v, &wide));
    ATTN_TRY(attn_take_f32(call, rows * (c->dv + 1), &grad_sums));
    ATTN_TRY(attn_take_f32(call, keys * (c->dv + 1), &grad_wide));
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        float factor = c->normalize ? reciprocal(c, z[r]) : 1, *to = grad_sums + r * (c->dv + 1);
        for (int64_t i = 0; i < c->dv; i++) {
            to[i] = factor * grad_o[r * c->dv + i];
        }
        to[c->dv] = c->normalize ? -factor * kernels->dot(grad_o + r * c->dv, o + r * c->dv, c->dv) : 0;
    }
    ATTN_TRY(attn_linattn_backward(&shape, call->arena, call->threads, q, k, wide, NULL, grad_sums, grad_q, grad_k, grad_wide, NULL));
    for (int64_t r = 0; r < keys && grad_v != NULL; r++) {
        memcpy(grad_v + r * c->dv, grad_wide + r * (c->dv + 1), (size_t)c->dv * sizeof *grad_v);
    }
    return ATTN_OK;
}

static double core_flops(const core *c)
{
    attn_linattn shape = shape_of(c, 1);
    return attn_linattn_flops(&shape);
}

/* ---- based ---- */

typedef struct based_params {
    int64_t causal, normalize, layout, expand, kernel, heads, feature_dim;
    double scale, eps;
} based_params;

#define CAUSAL_PARAM ATTN_P_BOOL("causal", based_params, causal, "true", "key j is visible to query i only if j <= i + M - N")
#define NORMALIZE_PARAM ATTN_P_BOOL("normalize", based_params, normalize, "true", "divide by the row sum")
#define EPS_PARAM ATTN_P_FLOAT("eps", based_params, eps, "1e-12", 0, INFINITY, "added to the row sum")

static const attn_param_info based_param_table[] = {CAUSAL_PARAM, ATTN_P_SCALE_POSITIVE(based_params, scale), NORMALIZE_PARAM, EPS_PARAM};

enum { Q, K, V, O, Z };

static const attn_port_info based_ports[] = {
    ATTN_IN("q", "B,H,N,D", FLOAT, ATTN_PORT_DIFF, "queries, of the small feature dimension"),
    ATTN_IN("k", "B,Hkv,M,D", FLOAT, ATTN_PORT_DIFF, "keys"),
    ATTN_IN("v", "B,Hkv,M,Dv", FLOAT, ATTN_PORT_DIFF, "values"),
    ATTN_OUT("o", "B,H,N,Dv", FLOAT, ATTN_PORT_DIFF, "the attention output"),
    ATTN_OUT("z", "B,H,N", FLOAT, 0, "row sums of the weights, before eps"),
};

static core core_of(const attn_call *call)
{
    const based_params *p = call->params;
    return (core){.batch = attn_dim(call, "B"), .heads = attn_dim(call, "H"), .kv_heads = attn_dim(call, "Hkv"), .n = attn_dim(call, "N"),
                  .m = attn_dim(call, "M"), .d = attn_dim(call, "D"), .dv = attn_dim(call, "Dv"), .causal = (int)p->causal,
                  .normalize = (int)p->normalize, .scale = attn_default_scale(p->scale, attn_dim(call, "D")), .eps = p->eps};
}

static attn_status based_forward(attn_call *call)
{
    core c = core_of(call);
    return core_forward(call, &c, attn_f32(call->t[Q]), attn_f32(call->t[K]), attn_f32(call->t[V]), attn_f32(call->t[O]),
                        attn_f32(call->t[Z]));
}

static attn_status based_backward(attn_call *call)
{
    core c = core_of(call);
    return core_backward(call, &c, attn_f32(call->t[Q]), attn_f32(call->t[K]), attn_f32(call->t[V]), attn_f32(call->t[O]),
                         attn_f32(call->t[Z]), attn_f32(call->grad[O]), attn_f32(call->grad[Q]), attn_f32(call->grad[K]),
                         attn_f32(call->grad[V]));
}

static attn_status based_cost(attn_call *call, attn_cost *cost)
{
    core c = core_of(call);
    cost->flops = core_flops(&c);
    return ATTN_OK;
}

const attn_op_class attn_op_based = {
    .info = {.name = "based",
             .title = "Taylor linear attention",
             .summary = "Linear attention with weights 1 + s + s^2/2, the second-order expansion of exp(s): sharper than first-order feature maps, "
                        "with a fixed state of 1 + D + D(D+1)/2 rows. For models trained with it; D is small (16). Costs about "
                        "4*N*F*Dv operations per head, linear in the length.",
             .paper = PAPER,
             .differentiable = 1,
             ATTN_TABLE(based_param_table, based_ports)},
    .params_size = sizeof(based_params),
    .forward = based_forward,
    .backward = based_backward,
    .cost = based_cost,
};

/* ---- based.decode ---- */

enum { LAYOUT_PACKED, LAYOUT_FULL };

static const attn_param_info decode_param_table[] = {
    ATTN_P_SCALE_POSITIVE(based_params, scale), NORMALIZE_PARAM, EPS_PARAM,
    ATTN_P_CHOICE("layout", based_params, layout, "packed", "packed|full", "of the state: pairs once, or all D*D products"),
};

enum { D_Q, D_K, D_V, D_KV, D_K_STATE, D_O, D_KV_OUT, D_K_OUT };

static const attn_port_info decode_ports[] = {
    ATTN_IN("q", "B,H,N,D", FLOAT, 0, "queries of the new tokens"),
    ATTN_IN("k", "B,Hkv,N,D", FLOAT, 0, "their keys"),
    ATTN_IN("v", "B,Hkv,N,Dv", FLOAT, 0, "their values"),
    ATTN_IN("kv_state", "B,Hkv,Fin,Dv", FLOAT, ATTN_PORT_OPTIONAL, "sum of features times values (absent: zero)"),
    ATTN_IN("k_state", "B,Hkv,Fin", FLOAT, ATTN_PORT_OPTIONAL, "sum of features"),
    ATTN_OUT("o", "B,H,N,Dv", FLOAT, 0, "the attention output"),
    ATTN_OUT("kv_state", "B,Hkv,F,Dv", FLOAT, 0, "the state after these tokens"),
    ATTN_OUT("k_state", "B,Hkv,F", FLOAT, 0, "sum of the features after these tokens"),
};

static int64_t state_width(const attn_call *call)
{
    const based_params *p = call->params;
    int64_t d = attn_dim(call, "D");
    return p->layout == LAYOUT_FULL ? 1 + d + d * d : packed_width(d);
}

static attn_status decode_bind(attn_call *call)
{
    if ((call->t[D_KV] == NULL) != (call->t[D_K_STATE] == NULL)) {
        return attn_fail(ATTN_ERR_ARGUMENT, "%s is missing: kv_state and k_state go together", call->t[D_KV] == NULL ? "kv_state" : "k_state");
    }
    if (call->t[D_KV] != NULL && attn_dim(call, "Fin") != state_width(call)) {
        return attn_fail(ATTN_ERR_SHAPE, "kv_state has %lld rows, expected %lld for D = %lld", (long long)attn_dim(call, "Fin"),
                         (long long)state_width(call), (long long)attn_dim(call, "D"));
    }
    if (attn_dim(call, "N") < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "q has no tokens");
    }
    attn_set_dim(call, "F", state_width(call));
    return ATTN_OK;
}

static void expand_full(int64_t d, double scale, const float *x, float *phi)
{
    float linear = (float)sqrt(scale), square = (float)(scale * sqrt(0.5));
    *phi++ = 1;
    for (int64_t i = 0; i < d; i++) {
        *phi++ = linear * x[i];
    }
    for (int64_t i = 0; i < d; i++) {
        for (int64_t j = 0; j < d; j++) {
            *phi++ = square * x[i] * x[j];
        }
    }
}

/* One key head's tokens: the state passes through the caches once per token, updated before its queries read it. phi: scratch
 * [2][F]. */
static void decode_head(attn_call *call, const core *c, int64_t f, int64_t i, float *phi)
{
    const based_params *p = call->params;
    const attn_tile_kernels *kernels = attn_tile_kernels_get();
    const attn_linear_kernels *linear = attn_linear_kernels_get();
    int64_t group = c->heads / c->kv_heads;
    float *state = attn_f32(call->t[D_KV_OUT]) + i * f * c->dv, *sums = attn_f32(call->t[D_K_OUT]) + i * f;
    void (*features)(int64_t, double, const float *, float *) = p->layout == LAYOUT_FULL ? expand_full : expand;
    if (call->t[D_KV] != NULL) {
        memcpy(state, attn_f32(call->t[D_KV]) + i * f * c->dv, (size_t)(f * c->dv) * sizeof *state);
        memcpy(sums, attn_f32(call->t[D_K_STATE]) + i * f, (size_t)f * sizeof *sums);
    } else {
        memset(state, 0, (size_t)(f * c->dv) * sizeof *state);
        memset(sums, 0, (size_t)f * sizeof *sums);
    }
    for (int64_t t = 0; t < c->n; t++) {
        features(c->d, c->scale, attn_f32(call->t[D_K]) + (i * c->n + t) * c->d, phi);
        kernels->axpy(sums, phi, f, 1);
        for (int64_t e = 0; e < f && group == 0; e++) {
            kernels->axpy(state + e * c->dv, attn_f32(call->t[D_V]) + (i * c->n + t) * c->dv, c->dv, phi[e]);
        }
        for (int64_t g = 0; g < group; g++) {
            int64_t row = (i * group + g) * c->n + t; /* query heads of a key head are consecutive, across the batch too */
            float *query = phi + f, *o = attn_f32(call->t[D_O]) + row * c->dv;
            features(c->d, c->scale, attn_f32(call->t[D_Q]) + row * c->d, query);
            if (g == 0) {
                linear->step(f, c->dv, state, c->dv, 1, NULL, query, phi, attn_f32(call->t[D_V]) + (i * c->n + t) * c->dv, o);
            } else {
                linear->read(f, c->dv, state, c->dv, query, o);
            }
            double z = c->eps;
            for (int64_t e = 0; e < f; e++) {
                z += (double)query[e] * (double)sums[e];
            }
            if (c->normalize) {
                kernels->scale(o, c->dv, (float)(1 / z));
            }
        }
    }
}

static attn_status decode_forward(attn_call *call)
{
    const based_params *p = call->params;
    int64_t f = state_width(call);
    core c = {.batch = attn_dim(call, "B"), .heads = attn_dim(call, "H"), .kv_heads = attn_dim(call, "Hkv"), .n = attn_dim(call, "N"),
              .d = attn_dim(call, "D"), .dv = attn_dim(call, "Dv"), .normalize = (int)p->normalize,
              .scale = attn_default_scale(p->scale, attn_dim(call, "D")), .eps = p->eps};
    int64_t heads = c.batch * c.kv_heads, each = 2 * f;
    float *phi;
    ATTN_TRY(attn_take_f32(call, call->threads * each, &phi));
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1 && heads > 1)
    for (int64_t i = 0; i < heads; i++) {
        decode_head(call, &c, f, i, phi + omp_get_thread_num() * each);
    }
    return ATTN_OK;
}

static attn_status decode_cost(attn_call *call, attn_cost *cost)
{
    double tokens = (double)(attn_dim(call, "B") * attn_dim(call, "N")), state = (double)(state_width(call) * (attn_dim(call, "Dv") + 1));
    cost->flops = 2 * tokens * state * (double)(attn_dim(call, "Hkv") + attn_dim(call, "H"));
    cost->bytes = 8 * tokens * state * (double)attn_dim(call, "Hkv");
    return ATTN_OK;
}

const attn_op_class attn_op_based_decode = {
    .info = {.name = "based.decode",
             .title = "Taylor linear attention token by token",
             .summary = "The causal form of based evaluated as a recurrence, for generation: F*(Dv + 1) numbers per key head are the state, "
                        "whatever the context.",
             .paper = PAPER,
             ATTN_TABLE(decode_param_table, decode_ports)},
    .params_size = sizeof(based_params),
    .bind = decode_bind,
    .forward = decode_forward,
    .cost = decode_cost,
};

/* ---- based.conv ---- */

static const attn_param_info conv_param_table[] = {
    ATTN_P_INT("expand", based_params, expand, "4", 1, INFINITY, "width of the input projection, in C; E*C is even"),
    ATTN_P_INT("kernel", based_params, kernel, "3", 1, INFINITY, "taps of the filters"),
};

enum { C_X, C_IN_W, C_IN_B, C_CONV_W, C_CONV_B, C_OUT_W, C_OUT_B, C_STATE, C_O, C_STATE_OUT };

static const attn_port_info conv_ports[] = {
    ATTN_IN("x", "B,N,C", FLOAT, ATTN_PORT_DIFF, "tokens"),
    ATTN_IN("in_w", "W,C", FLOAT, ATTN_PORT_DIFF, "input projection, W = expand * C"),
    ATTN_IN("in_b", "W", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "its bias"),
    ATTN_IN("conv_w", "I,K", FLOAT, ATTN_PORT_DIFF, "a causal filter per inner channel, I = W/2; the last tap meets the current token"),
    ATTN_IN("conv_b", "I", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "its bias"),
    ATTN_IN("out_w", "C,I", FLOAT, ATTN_PORT_DIFF, "output projection"),
    ATTN_IN("out_b", "C", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "its bias"),
    ATTN_IN("state", "B,I,Ks", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "the K-1 filter inputs before x, oldest first (absent: zero)"),
    ATTN_OUT("o", "B,N,C", FLOAT, ATTN_PORT_DIFF, "the layer's output"),
    ATTN_OUT("state", "B,I,Kout", FLOAT, 0, "the K-1 filter inputs after x"),
};

static attn_status conv_bind(attn_call *call)
{
    const based_params *p = call->params;
    int64_t c = attn_dim(call, "C"), width = attn_dim(call, "W");
    if (p->expand * c % 2 != 0) {
        return attn_fail(ATTN_ERR_ARGUMENT, "expand = %lld times C = %lld is odd, expected an even number", (long long)p->expand, (long long)c);
    }
    if (width != p->expand * c || attn_dim(call, "I") != width / 2) {
        return attn_fail(ATTN_ERR_SHAPE, "in_w has %lld and conv_w %lld rows, expected expand * C = %lld and half of it", (long long)width,
                         (long long)attn_dim(call, "I"), (long long)(p->expand * c));
    }
    if (attn_dim(call, "K") != p->kernel) {
        return attn_fail(ATTN_ERR_SHAPE, "conv_w has %lld taps, expected kernel = %lld", (long long)attn_dim(call, "K"), (long long)p->kernel);
    }
    if (call->t[C_STATE] != NULL && attn_dim(call, "Ks") != p->kernel - 1) {
        return attn_fail(ATTN_ERR_SHAPE, "state holds %lld tokens, expected kernel - 1 = %lld", (long long)attn_dim(call, "Ks"),
                         (long long)(p->kernel - 1));
    }
    attn_set_dim(call, "Kout", p->kernel - 1);
    return ATTN_OK;
}

typedef struct conv {
    int64_t batch, n, rows, c, inner, kept; /* kept: K - 1 */
    attn_conv1d filter;
    float *u1, *u2, *y, *mixed; /* [rows, I] each; mixed = silu(y) * u2 */
    float *state;               /* [B, kept, I]: the filter inputs before x */
} conv;

/* [B, I, kept] to [B, kept, I], or back. */
static void turn_state(const conv *c, const float *from, float *to, int back)
{
    for (int64_t b = 0; b < c->batch; b++) {
        for (int64_t i = 0; i < c->inner; i++) {
            for (int64_t t = 0; t < c->kept; t++) {
                int64_t by_channel = (b * c->inner + i) * c->kept + t, by_token = (b * c->kept + t) * c->inner + i;
                to[back ? by_channel : by_token] = from[back ? by_token : by_channel];
            }
        }
    }
}

static attn_status conv_begin(attn_call *call, conv *c)
{
    *c = (conv){.batch = attn_dim(call, "B"), .n = attn_dim(call, "N"), .c = attn_dim(call, "C"), .inner = attn_dim(call, "I"),
                .kept = attn_dim(call, "K") - 1};
    c->rows = c->batch * c->n;
    int64_t count = c->batch * c->kept * c->inner;
    ATTN_TRY(attn_take_f32(call, count + 1, &c->state));
    memset(c->state, 0, (size_t)count * sizeof *c->state);
    if (call->t[C_STATE] != NULL) {
        turn_state(c, attn_f32(call->t[C_STATE]), c->state, 0);
    }
    c->filter = (attn_conv1d){.sequences = c->batch, .length = c->n, .channels = c->inner, .taps = c->kept + 1, .sets = 1,
                              .w = attn_f32(call->t[C_CONV_W]), .bias = attn_f32(call->t[C_CONV_B]), .state = c->state};
    return ATTN_OK;
}

/* What the output projection reads, for tokens x [batch, n, c]. */
static attn_status conv_inner(attn_call *call, conv *c, const float *x)
{
    const float *w = attn_f32(call->t[C_IN_W]), *bias = attn_f32(call->t[C_IN_B]);
    ATTN_TRY(attn_take_f32(call, c->rows * c->inner, &c->u1));
    ATTN_TRY(attn_take_f32(call, c->rows * c->inner, &c->u2));
    ATTN_TRY(attn_take_f32(call, c->rows * c->inner, &c->y));
    ATTN_TRY(attn_take_f32(call, c->rows * c->inner, &c->mixed));
    ATTN_TRY(attn_linear_forward(call->arena, call->threads, c->rows, c->c, c->inner, x, w, bias, c->u1));
    ATTN_TRY(attn_linear_forward(call->arena, call->threads, c->rows, c->c, c->inner, x, w + c->inner * c->c,
                                 bias != NULL ? bias + c->inner : NULL, c->u2));
    attn_conv1d_forward(&c->filter, call->threads, c->u1, c->y);
    attn_activation_forward(ATTN_ACTIVATION_SILU, call->threads, c->rows * c->inner, c->y, c->mixed);
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t i = 0; i < c->rows * c->inner; i++) {
        c->mixed[i] *= c->u2[i];
    }
    return ATTN_OK;
}

/* The last K-1 filter inputs take the place of those before them. */
static void pass_state(const conv *c)
{
    size_t bytes = (size_t)c->inner * sizeof *c->state;
    for (int64_t b = 0; b < c->batch; b++) {
        float *state = c->state + b * c->kept * c->inner;
        for (int64_t t = 0; t < c->kept; t++) {
            int64_t at = c->n - c->kept + t; /* negative: in the old state */
            memmove(state + t * c->inner, at >= 0 ? c->u1 + (b * c->n + at) * c->inner : state + (c->kept + at) * c->inner, bytes);
        }
    }
}

/* Spans of tokens, or of whole short sequences, one after another, so that what is between the projections stays small. */

static attn_status conv_forward(attn_call *call)
{
    conv c;
    ATTN_TRY(conv_begin(call, &c));
    int64_t together = attn_max_i64(1, ATTN_LINEAR_SPAN / attn_max_i64(1, c.n));
    for (int64_t b = 0; b < c.batch; b += together) {
        for (int64_t first = 0; first < c.n; first += ATTN_LINEAR_SPAN) {
            conv part = c;
            int64_t row = b * c.n + first;
            part.filter.sequences = part.batch = attn_min_i64(together, c.batch - b);
            part.filter.length = part.n = attn_min_i64(ATTN_LINEAR_SPAN, c.n - first);
            part.filter.state = part.state = c.state + b * c.kept * c.inner;
            part.rows = part.batch * part.n;
            attn_arena_mark mark = attn_arena_get_mark(call->arena);
            ATTN_TRY(conv_inner(call, &part, attn_f32(call->t[C_X]) + row * c.c));
            pass_state(&part);
            ATTN_TRY(attn_linear_forward(call->arena, call->threads, part.rows, c.inner, c.c, part.mixed, attn_f32(call->t[C_OUT_W]),
                                         attn_f32(call->t[C_OUT_B]), attn_f32(call->t[C_O]) + row * c.c));
            attn_arena_release(call->arena, mark);
        }
    }
    turn_state(&c, c.state, attn_f32(call->t[C_STATE_OUT]), 1);
    return ATTN_OK;
}

static attn_status conv_backward(attn_call *call)
{
    conv c;
    float *gm, *gy, *gu, *gu1, *gstate = NULL;
    ATTN_TRY(conv_begin(call, &c));
    ATTN_TRY(conv_inner(call, &c, attn_f32(call->t[C_X])));
    int64_t count = c.rows * c.inner;
    ATTN_TRY(attn_take_f32(call, count, &gm));
    ATTN_TRY(attn_take_f32(call, count, &gy));
    ATTN_TRY(attn_take_f32(call, count, &gu1));
    ATTN_TRY(attn_take_f32(call, 2 * count, &gu));
    if (call->grad[C_STATE] != NULL) {
        ATTN_TRY(attn_take_f32(call, c.batch * c.kept * c.inner + 1, &gstate));
    }
    ATTN_TRY(attn_linear_backward(call->arena, call->threads, c.rows, c.inner, c.c, c.mixed, attn_f32(call->t[C_OUT_W]),
                                  attn_f32(call->grad[C_O]), gm, attn_f32(call->grad[C_OUT_W]), attn_f32(call->grad[C_OUT_B])));
    for (int64_t i = 0; i < count; i++) {
        double slope, f = attn_activation_at(ATTN_ACTIVATION_SILU, (double)c.y[i], &slope);
        gu[(i / c.inner * 2 + 1) * c.inner + i % c.inner] = (float)((double)gm[i] * f);
        gy[i] = (float)((double)(gm[i] * c.u2[i]) * slope);
    }
    ATTN_TRY(attn_conv1d_backward(&c.filter, call->arena, call->threads, c.u1, gy, gu1, gstate, attn_f32(call->grad[C_CONV_W]),
                                  attn_f32(call->grad[C_CONV_B])));
    for (int64_t r = 0; r < c.rows; r++) {
        memcpy(gu + r * 2 * c.inner, gu1 + r * c.inner, (size_t)c.inner * sizeof *gu);
    }
    if (gstate != NULL) {
        turn_state(&c, gstate, attn_f32(call->grad[C_STATE]), 1);
    }
    return attn_linear_backward(call->arena, call->threads, c.rows, c.c, 2 * c.inner, attn_f32(call->t[C_X]), attn_f32(call->t[C_IN_W]), gu,
                                attn_f32(call->grad[C_X]), attn_f32(call->grad[C_IN_W]), attn_f32(call->grad[C_IN_B]));
}

static attn_status conv_cost(attn_call *call, attn_cost *cost)
{
    double rows = (double)(attn_dim(call, "B") * attn_dim(call, "N")), inner = (double)attn_dim(call, "I"), c = (double)attn_dim(call, "C");
    cost->flops = rows * inner * (6 * c + 2 * (double)attn_dim(call, "K"));
    return ATTN_OK;
}

const attn_op_class attn_op_based_conv = {
    .info = {.name = "based.conv",
             .title = "Based: gated short convolution",
             .summary = "Tokens are projected to two halves; one passes through a causal filter of a few taps and gates the other. The state of "
                        "generation is the filter's last inputs.",
             .paper = PAPER,
             .differentiable = 1,
             ATTN_TABLE(conv_param_table, conv_ports)},
    .params_size = sizeof(based_params),
    .bind = conv_bind,
    .forward = conv_forward,
    .backward = conv_backward,
    .cost = conv_cost,
};

/* ---- based.layer ---- */

static const attn_param_info layer_param_table[] = {
    ATTN_P_INT("heads", based_params, heads, NULL, 1, INFINITY, "attention heads"),
    ATTN_P_INT("feature_dim", based_params, feature_dim, NULL, 1, INFINITY, "width of queries and keys of a head"),
    CAUSAL_PARAM,
};

enum { L_X, L_Q, L_K, L_V, L_O_W, L_O };

static const attn_port_info layer_ports[] = {
    ATTN_IN("x", "B,N,C", FLOAT, ATTN_PORT_DIFF, "tokens"),
    ATTN_IN("w_q", "Eq,C", FLOAT, ATTN_PORT_DIFF, "query projection, heads contiguous"),
    ATTN_IN("w_k", "Eq,C", FLOAT, ATTN_PORT_DIFF, "key projection"),
    ATTN_IN("w_v", "Ev,C", FLOAT, ATTN_PORT_DIFF, "value projection"),
    ATTN_IN("w_o", "C,Ev", FLOAT, ATTN_PORT_DIFF, "output projection"),
    ATTN_OUT("o", "B,N,C", FLOAT, ATTN_PORT_DIFF, "the layer's output"),
};

static attn_status layer_setup(const attn_call *call, core *c)
{
    const based_params *p = call->params;
    int64_t eq = attn_dim(call, "Eq"), ev = attn_dim(call, "Ev"), n = attn_dim(call, "N");
    if (eq != p->heads * p->feature_dim || ev % p->heads != 0 || ev < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "w_q and w_v have %lld and %lld rows, expected heads * feature_dim = %lld and a multiple of heads = %lld",
                         (long long)eq, (long long)ev, (long long)(p->heads * p->feature_dim), (long long)p->heads);
    }
    *c = (core){.batch = attn_dim(call, "B"), .heads = p->heads, .kv_heads = p->heads, .n = n, .m = n, .d = p->feature_dim,
                .dv = ev / p->heads, .causal = (int)p->causal, .normalize = 1, .scale = attn_default_scale(NAN, p->feature_dim),
                .eps = 1e-12};
    return ATTN_OK;
}

static attn_status layer_bind(attn_call *call)
{
    core c;
    return layer_setup(call, &c);
}

/* Heads of `width` in rows of tokens. */
static attn_head_rows heads_of(const core *c, int64_t width)
{
    return (attn_head_rows){c->batch, c->n, c->heads, width, c->heads * width, 0};
}

typedef struct layer_work {
    float *in[3], *o, *z, *rows; /* q, k, v by head; the attention's output by head, its row sums, its output as rows */
} layer_work;

static int64_t layer_width(const core *c, int which) { return which < 2 ? c->d : c->dv; }

static attn_status layer_inner(attn_call *call, const core *c, layer_work *w)
{
    int64_t rows = c->batch * c->n, most = attn_max_i64(c->d, c->dv) * c->heads;
    float *spare;
    ATTN_TRY(attn_take_f32(call, rows * most, &spare));
    for (int i = 0; i < 3; i++) {
        int64_t width = layer_width(c, i);
        ATTN_TRY(attn_take_f32(call, rows * c->heads * width, &w->in[i]));
        ATTN_TRY(attn_linear_forward(call->arena, call->threads, rows, attn_dim(call, "C"), c->heads * width, attn_f32(call->t[L_X]),
                                     attn_f32(call->t[L_Q + i]), NULL, spare));
        attn_head_rows heads = heads_of(c, width);
        attn_heads_split(&heads, call->threads, spare, w->in[i]);
    }
    ATTN_TRY(attn_take_f32(call, rows * c->heads * c->dv, &w->o));
    ATTN_TRY(attn_take_f32(call, rows * c->heads * c->dv, &w->rows));
    ATTN_TRY(attn_take_f32(call, rows * c->heads, &w->z));
    ATTN_TRY(core_forward(call, c, w->in[0], w->in[1], w->in[2], w->o, w->z));
    attn_head_rows out = heads_of(c, c->dv);
    attn_heads_join(&out, call->threads, w->o, w->rows);
    return ATTN_OK;
}

static attn_status layer_forward(attn_call *call)
{
    core c;
    layer_work w;
    ATTN_TRY(layer_setup(call, &c));
    ATTN_TRY(layer_inner(call, &c, &w));
    return attn_linear_forward(call->arena, call->threads, c.batch * c.n, c.heads * c.dv, attn_dim(call, "C"), w.rows,
                               attn_f32(call->t[L_O_W]), NULL, attn_f32(call->t[L_O]));
}

static attn_status layer_backward(attn_call *call)
{
    core c;
    layer_work w;
    float *grad_rows, *grad_heads, *grads[3], *spare, *more, *grad_x = attn_f32(call->grad[L_X]);
    ATTN_TRY(layer_setup(call, &c));
    ATTN_TRY(layer_inner(call, &c, &w));
    int64_t rows = c.batch * c.n, width = attn_dim(call, "C"), most = attn_max_i64(c.d, c.dv) * c.heads;
    ATTN_TRY(attn_take_f32(call, rows * c.heads * c.dv, &grad_rows));
    ATTN_TRY(attn_take_f32(call, rows * c.heads * c.dv, &grad_heads));
    ATTN_TRY(attn_take_f32(call, rows * most, &spare));
    ATTN_TRY(attn_take_f32(call, rows * width, &more));
    for (int i = 0; i < 3; i++) {
        ATTN_TRY(attn_take_f32(call, rows * c.heads * layer_width(&c, i), &grads[i]));
    }
    ATTN_TRY(attn_linear_backward(call->arena, call->threads, rows, c.heads * c.dv, width, w.rows, attn_f32(call->t[L_O_W]),
                                  attn_f32(call->grad[L_O]), grad_rows, attn_f32(call->grad[L_O_W]), NULL));
    attn_head_rows out = heads_of(&c, c.dv);
    attn_heads_split(&out, call->threads, grad_rows, grad_heads);
    ATTN_TRY(core_backward(call, &c, w.in[0], w.in[1], w.in[2], w.o, w.z, grad_heads, grads[0], grads[1], grads[2]));
    for (int i = 0; i < 3; i++) {
        int64_t own = layer_width(&c, i);
        attn_head_rows heads = heads_of(&c, own);
        attn_heads_join(&heads, call->threads, grads[i], spare);
        ATTN_TRY(attn_linear_backward(call->arena, call->threads, rows, width, c.heads * own, attn_f32(call->t[L_X]),
                                      attn_f32(call->t[L_Q + i]), spare, grad_x != NULL ? more : NULL, attn_f32(call->grad[L_Q + i]), NULL));
        if (grad_x != NULL) {
            attn_add_f32(call->threads, rows * width, grad_x, more);
        }
    }
    return ATTN_OK;
}

static attn_status layer_cost(attn_call *call, attn_cost *cost)
{
    core c;
    ATTN_TRY(layer_setup(call, &c));
    cost->flops = core_flops(&c) + 4 * (double)(c.batch * c.n * attn_dim(call, "C")) * (double)(c.heads * (c.d + c.dv));
    return ATTN_OK;
}

const attn_op_class attn_op_based_layer = {
    .info = {.name = "based.layer",
             .title = "A layer of Taylor linear attention",
             .summary = "based between projections, without positions: the global half of Based.",
             .paper = PAPER,
             .differentiable = 1,
             ATTN_TABLE(layer_param_table, layer_ports)},
    .params_size = sizeof(based_params),
    .bind = layer_bind,
    .forward = layer_forward,
    .backward = layer_backward,
    .cost = layer_cost,
};
