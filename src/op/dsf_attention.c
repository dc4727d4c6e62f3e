/* Linear and normalised attention of the dynamical systems framework (arXiv:2405.15731), in chunks: within a chunk masked products
 * of features, between chunks the running sum of v phi(k)^T. Denominators are applied at the output. Features that are as many as the
 * channels go through exec/linear.h, those of Taylor maps are made chunk by chunk here. And the conversion of architectures to the
 * matrices of the general system.
 */
#include "exec/linear.h"
#include "kernel/tile.h"
#include "layer/activation.h"
#include "layer/gemm.h"
#include "layer/heads.h"
#include "layer/linear.h"
#include "op/dsf.h"

#include <float.h>
#include <omp.h>
#include <string.h>

#define DIFF ATTN_PORT_DIFF
#define MAYBE (ATTN_PORT_DIFF | ATTN_PORT_OPTIONAL)
#define CHUNK 64

enum { PHI_IDENTITY, PHI_ELU1, PHI_TAYLOR };
enum { ETA_NONE, ETA_SUM, ETA_EXP, ETA_SOFTPLUS, ETA_SIGMOID };

typedef struct features {
    int64_t phi, order, d, count;
    double root; /* sqrt(scale) of the Taylor map */
} features;

static attn_status features_setup(int64_t phi, int64_t order, double scale, int64_t d, features *f)
{
    *f = (features){phi, order, d, d, sqrt(attn_default_scale(scale, d))};
    if (phi == PHI_TAYLOR) {
        int64_t power = 1;
        f->count = 1;
        for (int64_t p = 1; p <= order; p++) {
            if (d > 0 && power > INT64_C(100000000) / d) {
                return attn_fail(ATTN_ERR_ARGUMENT, "order = %lld with D = %lld makes too many features", (long long)order, (long long)d);
            }
            power *= d;
            f->count += power;
        }
    }
    return ATTN_OK;
}

static void features_forward(const features *f, const float *x, float *to)
{
    if (f->phi != PHI_TAYLOR) {
        for (int64_t i = 0; i < f->d; i++) {
            to[i] = f->phi == PHI_ELU1 ? (float)attn_activation_at(ATTN_ACTIVATION_ELU1, (double)x[i], NULL) : x[i];
        }
        return;
    }
    int64_t size = 1;
    to[0] = 1;
    for (int64_t p = 1; p <= f->order; p++, size *= f->d) {
        float *next = to + size;
        double factor = f->root / sqrt((double)p);
        for (int64_t i = 0; i < size; i++) {
            float before = (float)((double)to[i] * factor);
            for (int64_t c = 0; c < f->d; c++) {
                next[i * f->d + c] = before * x[c];
            }
        }
        to = next;
    }
}

/* to [d] is added to; grad [count] is used up. */
static void features_backward(const features *f, const float *x, const float *value, float *grad, float *to)
{
    if (f->phi != PHI_TAYLOR) {
        for (int64_t i = 0; i < f->d; i++) {
            double slope = 1;
            if (f->phi == PHI_ELU1) {
                attn_activation_at(ATTN_ACTIVATION_ELU1, (double)x[i], &slope);
            }
            to[i] += (float)((double)grad[i] * slope);
        }
        return;
    }
    int64_t at = f->count, power = 1;
    for (int64_t p = 1; p <= f->order; p++) {
        power *= f->d;
    }
    for (int64_t p = f->order; p >= 1 && f->d > 0; p--, power /= f->d) {
        at -= power;
        int64_t below = power / f->d;
        float factor = (float)(f->root / sqrt((double)p));
        for (int64_t i = 0; i < below; i++) {
            const float *g = grad + at + i * f->d;
            float before = factor * value[at - below + i], sum = 0;
            for (int64_t c = 0; c < f->d; c++) {
                sum += g[c] * x[c];
                to[c] += g[c] * before;
            }
            grad[at - below + i] += factor * sum;
        }
    }
}

/* ---- dsf.attention ---- */

typedef struct attention_params {
    int64_t phi, order, eta, decode;
    double scale;
} attention_params;

#define ATTENTION_ENTRIES(S)                                                                                                   \
    ATTN_P_CHOICE("phi", S, phi, "identity", "identity|elu1|taylor", "feature map of queries and keys"),                       \
    ATTN_P_INT("order", S, order, "2", 0, 64, "of phi = taylor"),                                                              \
    ATTN_P_SCALE_POSITIVE(S, scale),                                                                                           \
    ATTN_P_CHOICE("eta", S, eta, "none", "none|sum|exp|softplus|sigmoid", "denominator; the last three are functions of n")

static const attn_param_info attention_param_table[] = {
    ATTENTION_ENTRIES(attention_params),
    ATTN_P_BOOL("decode", attention_params, decode, "false", "token by token with running sums; the result is the same"),
};

enum { Q, K, V, N_PRE, O, H_LAST, Z_LAST };

static const attn_port_info attention_ports[] = {
    ATTN_IN("q", "B,H,N,D", FLOAT, DIFF, "queries"),
    ATTN_IN("k", "B,Hkv,N,D", FLOAT, DIFF, "keys"),
    ATTN_IN("v", "B,Hkv,N,Dv", FLOAT, DIFF, "values"),
    ATTN_IN("n", "B,H,N", FLOAT, MAYBE, "denominator before its function, for a learned eta"),
    ATTN_OUT("o", "B,H,N,Dv", FLOAT, DIFF, "output"),
    ATTN_OUT("h_last", "B,H,Dv,F", FLOAT, 0, "running sum of v phi(k)^T after the last token"),
    ATTN_OUT("z_last", "B,H,F", FLOAT, ATTN_PORT_OPTIONAL, "running sum of phi(k), for eta = sum"),
};

static double eta_of(int64_t eta, double n, double *slope)
{
    switch (eta) {
    case ETA_EXP: *slope = exp(n); return *slope;
    case ETA_SOFTPLUS: return attn_activation_at(ATTN_ACTIVATION_SOFTPLUS, n, slope);
    case ETA_SIGMOID: return attn_activation_at(ATTN_ACTIVATION_SIGMOID, n, slope);
    default: *slope = 0; return 1;
    }
}

static attn_status check_eta(int64_t eta, int has_n)
{
    return eta >= ETA_EXP && !has_n ? attn_fail(ATTN_ERR_ARGUMENT, "eta = exp, softplus and sigmoid need the input n") : ATTN_OK;
}

static attn_status attention_bind(attn_call *call)
{
    const attention_params *p = call->params;
    features f;
    ATTN_TRY(check_eta(p->eta, call->t[N_PRE] != NULL));
    ATTN_TRY(features_setup(p->phi, p->order, p->scale, attn_dim(call, "D"), &f));
    attn_set_dim(call, "F", f.count);
    if (p->eta != ETA_SUM) {
        attn_drop_output(call, Z_LAST);
    }
    return ATTN_OK;
}

/* ---- Features as many as channels ---- */

/* phi of all rows: x itself, or made in scratch memory. */
static attn_status plain_features(attn_call *call, const attn_tensor *x, const float **to)
{
    const attention_params *p = call->params;
    int64_t count = attn_tensor_count(x);
    float *made;
    *to = attn_f32(x);
    if (p->phi == PHI_ELU1) {
        ATTN_TRY(attn_take_f32(call, count, &made));
        attn_activation_forward(ATTN_ACTIVATION_ELU1, call->threads, count, attn_f32(x), made);
        *to = made;
    }
    return ATTN_OK;
}

static attn_linattn plain_shape(const attn_call *call)
{
    return (attn_linattn){.batch = attn_dim(call, "B"), .heads = attn_dim(call, "H"), .kv_heads = attn_dim(call, "Hkv"),
                          .n = attn_dim(call, "N"), .m = attn_dim(call, "N"), .d = attn_dim(call, "D"), .dv = attn_dim(call, "Dv"),
                          .causal = 1, .scale = 1};
}

static int64_t kv_head(const attn_linattn *x, int64_t bh)
{
    return bh / x->heads * x->kv_heads + bh % x->heads / (x->heads / x->kv_heads);
}

#define FOLD 64 /* keys that are added up by themselves before they go into a long sum */

/* z [3][D]: what is folded, the whole sum so far, what is not folded yet. */
static void take_in(const attn_tile_kernels *kernels, float *z, const float *key, float factor, int64_t d, int64_t t)
{
    if (t % FOLD == 0) {
        memcpy(z, z + d, (size_t)d * sizeof *z);
        memset(z + 2 * d, 0, (size_t)d * sizeof *z);
    }
    kernels->axpy(z + 2 * d, key, d, factor);
    for (int64_t c = 0; c < d; c++) {
        z[d + c] = z[c] + z[2 * d + c];
    }
}

/* Denominators [B*H][N]; z [B*H][3][D] is zeroed first, its middle left as the sums of all keys. */
static void plain_denominators(const attn_call *call, const attn_linattn *x, const float *fq, const float *fk, float *z, double *eta)
{
    const attention_params *p = call->params;
    const attn_tile_kernels *kernels = attn_tile_kernels_get();
    memset(z, 0, (size_t)(x->batch * x->heads * 3 * x->d) * sizeof *z);
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t bh = 0; bh < x->batch * x->heads; bh++) {
        const float *key = fk + kv_head(x, bh) * x->n * x->d, *query = fq + bh * x->n * x->d;
        float *own = z + bh * 3 * x->d;
        for (int64_t t = 0; t < x->n; t++) {
            double slope, *to = eta + bh * x->n + t;
            if (p->eta == ETA_SUM) {
                take_in(kernels, own, key + t * x->d, 1, x->d, t);
                *to = (double)kernels->dot(own + x->d, query + t * x->d, x->d);
            } else {
                *to = p->eta == ETA_NONE ? 1 : eta_of(p->eta, (double)attn_f32(call->t[N_PRE])[bh * x->n + t], &slope);
            }
        }
    }
}

static void divide(float *x, int64_t count, double by)
{
    float factor = (float)(1 / by);
    if (isfinite(factor) && fabsf(factor) > FLT_MIN) {
        attn_tile_kernels_get()->scale(x, count, factor);
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        x[i] = (float)((double)x[i] / by);
    }
}

/* Token by token: the sums of scores in a pass of their own. */
static attn_status plain_decode(attn_call *call, const attn_linattn *x, float *state, float *last)
{
    const float *fq, *fk;
    float *z, *o = attn_f32(call->t[O]);
    int64_t heads = x->batch * x->heads;
    double *eta = attn_arena_array(call->arena, (size_t)(heads * x->n), sizeof *eta);
    ATTN_TRY(attn_take_f32(call, heads * 3 * x->d, &z));
    ATTN_TRY(plain_features(call, call->t[Q], &fq));
    ATTN_TRY(plain_features(call, call->t[K], &fk));
    if (eta == NULL) {
        return attn_fail_memory((size_t)(heads * x->n) * sizeof *eta);
    }
    ATTN_TRY(attn_linattn_decode(x, call->arena, call->threads, fq, fk, attn_f32(call->t[V]), NULL, state, o));
    if (last != NULL) {
        plain_denominators(call, x, fq, fk, z, eta);
        for (int64_t row = 0; row < heads * x->n; row++) {
            divide(o + row * x->dv, x->dv, eta[row]);
        }
        for (int64_t bh = 0; bh < heads; bh++) {
            memcpy(last + bh * x->d, z + (bh * 3 + 1) * x->d, (size_t)x->d * sizeof *z);
        }
    }
    return ATTN_OK;
}

static attn_status plain_forward(attn_call *call)
{
    static const attn_row_function elu1 = ATTN_ROW_ELU1;
    const attention_params *p = call->params;
    attn_linattn x = plain_shape(call);
    int64_t all = x.batch * x.heads;
    float *state, *last = p->eta == ETA_SUM ? attn_f32(call->t[Z_LAST]) : NULL, *o = attn_f32(call->t[O]);
    attn_linattn_sums sums = {NULL, last, 1, 0};
    ATTN_TRY(attn_take_f32(call, all * x.d * x.dv, &state));
    if (p->decode) {
        ATTN_TRY(plain_decode(call, &x, state, last));
    } else {
        x.rows = p->phi == PHI_ELU1 ? &elu1 : NULL;
        x.sums = p->eta == ETA_SUM ? &sums : NULL;
        ATTN_TRY(attn_linattn_forward(&x, call->arena, call->threads, attn_f32(call->t[Q]), attn_f32(call->t[K]), attn_f32(call->t[V]), NULL, o,
                                      state));
    }
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t bh = 0; bh < all; bh++) {
        for (int64_t row = bh * x.n; row < (p->eta >= ETA_EXP ? (bh + 1) * x.n : 0); row++) {
            double slope;
            divide(o + row * x.dv, x.dv, eta_of(p->eta, (double)attn_f32(call->t[N_PRE])[row], &slope));
        }
        for (int64_t s = 0; s < x.d; s++) {
            for (int64_t c = 0; c < x.dv; c++) {
                attn_f32(call->t[H_LAST])[(bh * x.dv + c) * x.d + s] = state[(bh * x.d + s) * x.dv + c];
            }
        }
    }
    return ATTN_OK;
}

/* What the sum of scores as denominator adds, with slopes d(loss)/d(denominator) of one head. z [3][D] is scratch. */
static void sum_backward(const attn_linattn *x, const double *slopes, const float *fq, const float *fk, float *z, float *dq, float *dk)
{
    const attn_tile_kernels *kernels = attn_tile_kernels_get();
    memset(z, 0, (size_t)(3 * x->d) * sizeof *z);
    for (int64_t t = 0; t < x->n; t++) {
        take_in(kernels, z, fk + t * x->d, 1, x->d, t);
        kernels->axpy(dq + t * x->d, z + x->d, x->d, (float)slopes[t]);
    }
    memset(z, 0, (size_t)(3 * x->d) * sizeof *z);
    for (int64_t t = x->n - 1; t >= 0; t--) {
        take_in(kernels, z, fq + t * x->d, (float)slopes[t], x->d, x->n - 1 - t);
        kernels->axpy(dk + t * x->d, z + x->d, x->d, 1);
    }
}

static attn_status plain_backward(attn_call *call)
{
    const attention_params *p = call->params;
    attn_linattn x = plain_shape(call);
    int64_t all = x.batch * x.heads, size_q = x.n * x.d;
    const float *fq, *fk, *v = attn_f32(call->t[V]), *o = attn_f32(call->t[O]), *go = attn_f32(call->grad[O]);
    float *dq = attn_f32(call->grad[Q]), *dk = attn_f32(call->grad[K]), *g, *z, *shared;
    double *eta = attn_arena_array(call->arena, (size_t)(all * x.n), sizeof *eta);
    ATTN_TRY(dq != NULL ? ATTN_OK : attn_take_f32(call, all * size_q, &dq));
    ATTN_TRY(dk != NULL ? ATTN_OK : attn_take_f32(call, x.batch * x.kv_heads * size_q, &dk));
    ATTN_TRY(attn_take_f32(call, p->eta == ETA_SUM ? all * size_q : 0, &shared));
    ATTN_TRY(attn_take_f32(call, all * x.n * x.dv, &g));
    ATTN_TRY(attn_take_f32(call, all * 3 * x.d, &z));
    ATTN_TRY(plain_features(call, call->t[Q], &fq));
    ATTN_TRY(plain_features(call, call->t[K], &fk));
    if (eta == NULL) {
        return attn_fail_memory((size_t)(all * x.n) * sizeof *eta);
    }
    plain_denominators(call, &x, fq, fk, z, eta);
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t row = 0; row < all * x.n; row++) {
        double slope, along = p->eta != ETA_NONE ? (double)attn_tile_kernels_get()->dot(go + row * x.dv, o + row * x.dv, x.dv) : 0;
        memcpy(g + row * x.dv, go + row * x.dv, (size_t)x.dv * sizeof *g);
        divide(g + row * x.dv, x.dv, eta[row]);
        eta[row] = -along / eta[row];
        if (p->eta >= ETA_EXP && call->grad[N_PRE] != NULL) {
            eta_of(p->eta, (double)attn_f32(call->t[N_PRE])[row], &slope);
            attn_f32(call->grad[N_PRE])[row] = (float)(eta[row] * slope);
        }
    }
    ATTN_TRY(attn_linattn_backward(&x, call->arena, call->threads, fq, fk, v, NULL, g, dq, dk, attn_f32(call->grad[V]), NULL));
    if (p->eta == ETA_SUM) {
        memset(shared, 0, (size_t)(all * size_q) * sizeof *shared);
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
        for (int64_t bh = 0; bh < all; bh++) {
            sum_backward(&x, eta + bh * x.n, fq + bh * size_q, fk + kv_head(&x, bh) * size_q, z + bh * 3 * x.d,
                         dq + bh * size_q, shared + bh * size_q);
        }
        for (int64_t bh = 0; bh < all; bh++) {
            attn_add_f32(call->threads, size_q, dk + kv_head(&x, bh) * size_q, shared + bh * size_q);
        }
    }
    for (int i = Q; i <= K && p->phi == PHI_ELU1; i++) {
        if (call->grad[i] != NULL) {
            attn_activation_backward(ATTN_ACTIVATION_ELU1, call->threads, attn_tensor_count(call->t[i]), attn_f32(call->t[i]),
                                     i == Q ? dq : dk, attn_f32(call->grad[i]));
        }
    }
    return ATTN_OK;
}

/* ---- Taylor features ---- */

/* One head: values have a column of ones more (width = Dv + 1) when the sum of scores is the denominator. */
typedef struct head {
    int64_t n, d, dv, width, chunk;
    features f;
    const float *q, *k, *v;
    float *fq, *fk, *vx, *s, *out, *state, *g, *part; /* chunks of features, values, scores, results; [F][width]; gradients */
} head;

static attn_status head_memory(attn_arena *arena, head *x)
{
    int64_t f = x->f.count, c = CHUNK;
    int64_t sizes[] = {c * f, c * f, c * x->width, c * c, c * x->width, f * x->width, c * x->width, c * f};
    float **parts[] = {&x->fq, &x->fk, &x->vx, &x->s, &x->out, &x->state, &x->g, &x->part};
    for (int i = 0; i < 8; i++) {
        *parts[i] = attn_arena_array(arena, (size_t)sizes[i], sizeof(float));
        if (*parts[i] == NULL) {
            return attn_fail_memory((size_t)sizes[i] * sizeof(float));
        }
    }
    memset(x->state, 0, (size_t)(f * x->width) * sizeof(float));
    return ATTN_OK;
}

static int64_t load_chunk(head *x, int64_t first)
{
    int64_t count = attn_min_i64(x->chunk, x->n - first);
    for (int64_t i = 0; i < count; i++) {
        features_forward(&x->f, x->q + (first + i) * x->d, x->fq + i * x->f.count);
        features_forward(&x->f, x->k + (first + i) * x->d, x->fk + i * x->f.count);
        memcpy(x->vx + i * x->width, x->v + (first + i) * x->dv, (size_t)x->dv * sizeof(float));
        if (x->width > x->dv) {
            x->vx[i * x->width + x->dv] = 1;
        }
    }
    return count;
}

static void mask_upper(float *s, int64_t count, int lower)
{
    for (int64_t i = 0; i < count; i++) {
        for (int64_t j = 0; j < count; j++) {
            if (lower ? j < i : j > i) {
                s[i * count + j] = 0;
            }
        }
    }
}

/* out [count][width] of the loaded chunk; then the state takes the chunk in. */
static attn_status chunk_forward(attn_arena *arena, head *x, int64_t count)
{
    int64_t f = x->f.count, w = x->width;
    ATTN_TRY(attn_gemm(arena, 1, 0, 1, count, count, f, 1, x->fq, f, x->fk, f, 0, x->s, count));
    mask_upper(x->s, count, 0);
    ATTN_TRY(attn_gemm(arena, 1, 0, 0, count, w, count, 1, x->s, count, x->vx, w, 0, x->out, w));
    ATTN_TRY(attn_gemm(arena, 1, 0, 0, count, w, f, 1, x->fq, f, x->state, w, 1, x->out, w));
    return attn_gemm(arena, 1, 1, 0, f, w, count, 1, x->fk, f, x->vx, w, 1, x->state, w);
}

static attn_status head_setup(const attn_call *call, int64_t bh, head *x)
{
    const attention_params *p = call->params;
    int64_t heads = attn_dim(call, "H"), kv_heads = attn_dim(call, "Hkv"), n = attn_dim(call, "N"), d = attn_dim(call, "D");
    int64_t dv = attn_dim(call, "Dv"), kv = bh / heads * kv_heads + bh % heads / (heads / kv_heads);
    *x = (head){.n = n, .d = d, .dv = dv, .width = p->eta == ETA_SUM ? dv + 1 : dv, .chunk = p->decode ? 1 : CHUNK,
                .q = attn_f32(call->t[Q]) + bh * n * d, .k = attn_f32(call->t[K]) + kv * n * d, .v = attn_f32(call->t[V]) + kv * n * dv};
    return features_setup(p->phi, p->order, p->scale, d, &x->f);
}

/* 1/eta of a row: from the sum in its last column, or from n. */
static double denominator(const attn_call *call, const head *x, int64_t bh, int64_t t, const float *out, double *slope)
{
    const attention_params *p = call->params;
    *slope = 0;
    if (p->eta == ETA_SUM) {
        return (double)out[x->dv];
    }
    return p->eta == ETA_NONE ? 1 : eta_of(p->eta, (double)attn_f32(call->t[N_PRE])[bh * x->n + t], slope);
}

/* Where the gradients of each query head go: [B*H][N][...]. */
typedef struct back_memory {
    float *q, *k, *v;
} back_memory;

static attn_status head_forward(attn_call *call, attn_arena *arena, int64_t bh, const back_memory *to)
{
    (void)to;
    head x;
    ATTN_TRY(head_setup(call, bh, &x));
    ATTN_TRY(head_memory(arena, &x));
    for (int64_t first = 0; first < x.n; first += x.chunk) {
        int64_t count = load_chunk(&x, first);
        ATTN_TRY(chunk_forward(arena, &x, count));
        for (int64_t i = 0; i < count; i++) {
            double slope, eta = denominator(call, &x, bh, first + i, x.out + i * x.width, &slope);
            for (int64_t c = 0; c < x.dv; c++) {
                attn_f32(call->t[O])[(bh * x.n + first + i) * x.dv + c] = (float)((double)x.out[i * x.width + c] / eta);
            }
        }
    }
    for (int64_t s = 0; s < x.f.count; s++) {
        for (int64_t c = 0; c < x.dv; c++) {
            attn_f32(call->t[H_LAST])[(bh * x.dv + c) * x.f.count + s] = x.state[s * x.width + c];
        }
        if (call->t[Z_LAST] != NULL) {
            attn_f32(call->t[Z_LAST])[bh * x.f.count + s] = x.state[s * x.width + x.dv];
        }
    }
    return ATTN_OK;
}

/* Heads in parallel, each thread with an arena of its own. */
static attn_status each_head(attn_call *call, attn_status (*work)(attn_call *, attn_arena *, int64_t, const back_memory *),
                             const back_memory *to)
{
    attn_status status = ATTN_OK;
#pragma omp parallel num_threads(call->threads) if (call->threads > 1)
    {
        attn_arena *arena;
        attn_status mine = attn_arena_create(&arena, 0);
#pragma omp for schedule(dynamic, 1)
        for (int64_t bh = 0; bh < attn_dim(call, "B") * attn_dim(call, "H"); bh++) {
            if (mine == ATTN_OK) {
                mine = work(call, arena, bh, to);
                attn_arena_reset(arena);
            }
        }
        attn_arena_destroy(arena);
        if (mine != ATTN_OK) {
#pragma omp critical(dsf_status)
            status = mine;
        }
    }
    return status == ATTN_ERR_MEMORY ? attn_fail(ATTN_ERR_MEMORY, "out of memory in a thread of dsf.attention") : status;
}

static attn_status attention_forward(attn_call *call)
{
    const attention_params *p = call->params;
    return p->phi == PHI_TAYLOR ? each_head(call, head_forward, NULL) : plain_forward(call);
}

static attn_status head_backward(attn_call *call, attn_arena *arena, int64_t bh, const back_memory *to)
{
    head x;
    ATTN_TRY(head_setup(call, bh, &x));
    ATTN_TRY(head_memory(arena, &x));
    const attention_params *p = call->params;
    int64_t f = x.f.count, w = x.width;
    float *full = attn_arena_array(arena, (size_t)(x.n * w), sizeof(float)), *dq = to->q + bh * x.n * x.d;
    float *dk = to->k + bh * x.n * x.d, *dv = to->v + bh * x.n * x.dv, *gv = attn_arena_array(arena, (size_t)(CHUNK * w), sizeof(float));
    if (full == NULL || gv == NULL) {
        return attn_fail_memory((size_t)(x.n * w) * sizeof(float));
    }
    /* Forwards: gradients of the undivided results, and of the queries. */
    for (int64_t first = 0; first < x.n; first += x.chunk) {
        int64_t count = load_chunk(&x, first);
        float *g = full + first * w;
        ATTN_TRY(attn_gemm(arena, 1, 0, 1, count, count, f, 1, x.fq, f, x.fk, f, 0, x.s, count));
        mask_upper(x.s, count, 0);
        ATTN_TRY(attn_gemm(arena, 1, 0, 0, count, w, count, 1, x.s, count, x.vx, w, 0, x.out, w));
        ATTN_TRY(attn_gemm(arena, 1, 0, 0, count, w, f, 1, x.fq, f, x.state, w, 1, x.out, w));
        for (int64_t i = 0; i < count; i++) {
            const float *go = attn_f32(call->grad[O]) + (bh * x.n + first + i) * x.dv;
            double slope, eta = denominator(call, &x, bh, first + i, x.out + i * w, &slope), along = 0;
            for (int64_t c = 0; c < x.dv; c++) {
                along += (double)go[c] * (double)x.out[i * w + c] / eta;
                g[i * w + c] = (float)((double)go[c] / eta);
            }
            if (p->eta == ETA_SUM) {
                g[i * w + x.dv] = (float)(-along / eta);
            } else if (call->grad[N_PRE] != NULL && p->eta != ETA_NONE) {
                attn_f32(call->grad[N_PRE])[bh * x.n + first + i] = (float)(-along / eta * slope);
            }
        }
        ATTN_TRY(attn_gemm(arena, 1, 0, 1, count, count, w, 1, g, w, x.vx, w, 0, x.s, count));
        mask_upper(x.s, count, 0);
        ATTN_TRY(attn_gemm(arena, 1, 0, 0, count, f, count, 1, x.s, count, x.fk, f, 0, x.part, f));
        ATTN_TRY(attn_gemm(arena, 1, 0, 1, count, f, w, 1, g, w, x.state, w, 1, x.part, f));
        for (int64_t i = 0; i < count; i++) {
            features_backward(&x.f, x.q + (first + i) * x.d, x.fq + i * f, x.part + i * f, dq + (first + i) * x.d);
        }
        ATTN_TRY(attn_gemm(arena, 1, 1, 0, f, w, count, 1, x.fk, f, x.vx, w, 1, x.state, w));
    }
    /* Backwards: keys and values; the state now sums phi(q) g^T of later chunks. */
    memset(x.state, 0, (size_t)(f * w) * sizeof(float));
    for (int64_t first = (x.n - 1) / x.chunk * x.chunk; first >= 0 && x.n > 0; first -= x.chunk) {
        int64_t count = load_chunk(&x, first);
        const float *g = full + first * w;
        ATTN_TRY(attn_gemm(arena, 1, 0, 1, count, count, f, 1, x.fk, f, x.fq, f, 0, x.s, count));
        mask_upper(x.s, count, 1);
        ATTN_TRY(attn_gemm(arena, 1, 0, 0, count, w, count, 1, x.s, count, g, w, 0, gv, w));
        ATTN_TRY(attn_gemm(arena, 1, 0, 0, count, w, f, 1, x.fk, f, x.state, w, 1, gv, w));
        ATTN_TRY(attn_gemm(arena, 1, 0, 1, count, count, w, 1, x.vx, w, g, w, 0, x.s, count));
        mask_upper(x.s, count, 1);
        ATTN_TRY(attn_gemm(arena, 1, 0, 0, count, f, count, 1, x.s, count, x.fq, f, 0, x.part, f));
        ATTN_TRY(attn_gemm(arena, 1, 0, 1, count, f, w, 1, x.vx, w, x.state, w, 1, x.part, f));
        for (int64_t i = 0; i < count; i++) {
            memcpy(dv + (first + i) * x.dv, gv + i * w, (size_t)x.dv * sizeof(float));
            features_backward(&x.f, x.k + (first + i) * x.d, x.fk + i * f, x.part + i * f, dk + (first + i) * x.d);
        }
        ATTN_TRY(attn_gemm(arena, 1, 1, 0, f, w, count, 1, x.fq, f, g, w, 1, x.state, w));
    }
    return ATTN_OK;
}

static attn_status attention_backward(attn_call *call)
{
    const attention_params *p = call->params;
    if (p->phi != PHI_TAYLOR) {
        return plain_backward(call);
    }
    int64_t heads = attn_dim(call, "H"), kv_heads = attn_dim(call, "Hkv"), all = attn_dim(call, "B") * heads, n = attn_dim(call, "N");
    int64_t d = attn_dim(call, "D"), dv = attn_dim(call, "Dv");
    attn_status status = ATTN_OK;
    back_memory m = {attn_dsf_gradient(call, call->grad[Q], all * n * d, &status),
                     attn_dsf_gradient(call, NULL, all * n * d, &status),
                     attn_dsf_gradient(call, NULL, all * n * dv, &status)};
    ATTN_TRY(status);
    ATTN_TRY(each_head(call, head_backward, &m));
    for (int64_t bh = 0; bh < all; bh++) {
        int64_t kv = bh / heads * kv_heads + bh % heads / (heads / kv_heads);
        for (int64_t i = 0; i < n * d && call->grad[K] != NULL; i++) {
            attn_f32(call->grad[K])[kv * n * d + i] += m.k[bh * n * d + i];
        }
        for (int64_t i = 0; i < n * dv && call->grad[V] != NULL; i++) {
            attn_f32(call->grad[V])[kv * n * dv + i] += m.v[bh * n * dv + i];
        }
    }
    return ATTN_OK;
}

static attn_status attention_cost(attn_call *call, attn_cost *cost)
{
    const attention_params *p = call->params;
    attn_linattn shape = plain_shape(call);
    features f;
    ATTN_TRY(features_setup(p->phi, p->order, p->scale, shape.d, &f));
    shape.d = f.count;
    shape.chunk = p->decode ? 1 : p->phi == PHI_TAYLOR ? CHUNK : 0;
    cost->flops = attn_linattn_flops(&shape);
    return ATTN_OK;
}

const attn_op_class attn_op_dsf_attention = {
    .info = {.name = "dsf.attention",
             .title = "Linear and normalised attention",
             .summary = "Causal attention without softmax: features of queries and keys, and a denominator that is the sum of scores (linear "
                        "attention), a learned positive number (normalised attention), or none. Taylor features approach softmax with growing "
                        "order. Linear in the length; the state is Dv times the number of features.",
             .paper = "arXiv:2405.15731",
             .differentiable = 1,
             ATTN_TABLE(attention_param_table, attention_ports)},
    .params_size = sizeof(attention_params),
    .bind = attention_bind,
    .forward = attention_forward,
    .backward = attention_backward,
    .cost = attention_cost,
};

/* ---- dsf.matrices ---- */

enum { ARCH_ATTENTION, ARCH_S6, ARCH_QLSTM, ARCH_RGLRU };

typedef struct matrices_params {
    int64_t arch, phi, order, eta, reversed;
    double scale, c;
} matrices_params;

static const attn_param_info matrices_param_table[] = {
    ATTN_P_CHOICE("arch", matrices_params, arch, NULL, "attention|s6|qlstm|rglru", "the architecture whose inputs are given"),
    ATTENTION_ENTRIES(matrices_params),
    ATTN_P_BOOL("reversed", matrices_params, reversed, "true", "of qlstm"),
    ATTN_P_FLOAT("c", matrices_params, c, "8.0", 0, INFINITY, "of rglru"),
};

enum { M_Q, M_K, M_V, M_N, M_U, M_DT, M_DT_BIAS, M_A_LOG, M_B, M_C, M_SKIP, M_X, M_W, M_BIAS, M_ALPHA, M_R, M_G, M_A, M_LAM, M_BM, M_CM, M_DM };

#define GIVEN ATTN_PORT_OPTIONAL
static const attn_port_info matrices_ports[] = {
    ATTN_IN("q", "B,1,N,D", FLOAT, GIVEN, "attention: queries of one head"),
    ATTN_IN("k", "B,1,N,D", FLOAT, GIVEN, "attention: keys"),
    ATTN_IN("v", "B,1,N,d", FLOAT, GIVEN, "attention: values"),
    ATTN_IN("n", "B,1,N", FLOAT, GIVEN, "attention: denominator before its function"),
    ATTN_IN("u", "B,N,d", FLOAT, GIVEN, "s6: input"),
    ATTN_IN("dt", "B,N,1|d", FLOAT, GIVEN, "s6: step size"),
    ATTN_IN("dt_bias", "1|d", FLOAT, GIVEN, "s6: added to dt"),
    ATTN_IN("A_log", "1|d,1|S", FLOAT, GIVEN, "s6: log of the decay rates"),
    ATTN_IN("b", "B,N,S", FLOAT, GIVEN, "s6: input directions"),
    ATTN_IN("c", "B,N,S", FLOAT, GIVEN, "s6: output directions"),
    ATTN_IN("skip", "d", FLOAT, GIVEN, "s6: direct path"),
    ATTN_IN("x", "B,N,d", FLOAT, GIVEN, "qlstm, rglru: input"),
    ATTN_IN("w_gates", "3*d,d", FLOAT, GIVEN, "qlstm: gates"),
    ATTN_IN("b_gates", "3*d", FLOAT, GIVEN, "qlstm: their biases"),
    ATTN_IN("alpha", "1", FLOAT, GIVEN, "qlstm: exponent of the reversed decay"),
    ATTN_IN("r", "B,N,d", FLOAT, GIVEN, "rglru: recurrence gate"),
    ATTN_IN("g", "B,N,d", FLOAT, GIVEN, "rglru: input gate"),
    ATTN_IN("a_param", "d", FLOAT, GIVEN, "rglru: decay"),
    ATTN_OUT("lam", "B,N,T", FLOAT, 0, "diagonal of the transition"),
    ATTN_OUT("bm", "B,N,T,d", FLOAT, 0, "input matrices"),
    ATTN_OUT("cm", "B,N,d,T", FLOAT, 0, "output matrices"),
    ATTN_OUT("dm", "B,N,d,d", FLOAT, 0, "direct paths"),
};

static attn_status need(const attn_call *call, int first, int last)
{
    for (int port = first; port <= last; port++) {
        if (call->t[port] == NULL) {
            return attn_fail(ATTN_ERR_ARGUMENT, "%s is missing for this arch", matrices_ports[port].name);
        }
    }
    return ATTN_OK;
}

static attn_status matrices_bind(attn_call *call)
{
    const matrices_params *p = call->params;
    int64_t states = 1;
    features f;
    switch (p->arch) {
    case ARCH_ATTENTION:
        ATTN_TRY(need(call, M_Q, M_V));
        ATTN_TRY(check_eta(p->eta, call->t[M_N] != NULL));
        ATTN_TRY(features_setup(p->phi, p->order, p->scale, attn_dim(call, "D"), &f));
        states = f.count;
        break;
    case ARCH_S6:
        ATTN_TRY(need(call, M_U, M_DT));
        ATTN_TRY(need(call, M_A_LOG, M_C));
        states = attn_dim(call, "S");
        break;
    case ARCH_QLSTM:
        ATTN_TRY(need(call, M_X, p->reversed ? M_ALPHA : M_BIAS));
        break;
    default:
        ATTN_TRY(need(call, M_X, M_X));
        ATTN_TRY(need(call, M_R, M_A));
        break;
    }
    attn_set_dim(call, "T", attn_dim(call, "d") * states);
    return ATTN_OK;
}

typedef struct system_at {
    int64_t row, d, states;
    float *lam, *bm, *cm, *dm;
} system_at;

/* Entry (channel, state) of one token: decay, input and output factor. */
static void put(const system_at *m, int64_t c, int64_t s, double lam, double in, double out)
{
    int64_t at = c * m->states + s, size = m->d * m->states;
    m->lam[m->row * size + at] = (float)lam;
    m->bm[(m->row * size + at) * m->d + c] = (float)in;
    m->cm[(m->row * m->d + c) * size + at] = (float)out;
}

static attn_status attention_matrices(attn_call *call, system_at *m)
{
    const matrices_params *p = call->params;
    int64_t n = attn_dim(call, "N"), rows = attn_dim(call, "B") * n, d = attn_dim(call, "D");
    attn_status status = ATTN_OK;
    features f;
    ATTN_TRY(features_setup(p->phi, p->order, p->scale, d, &f));
    float *fq = attn_dsf_floats(call, f.count, &status), *fk = attn_dsf_floats(call, f.count, &status);
    double *sum = attn_arena_array(call->arena, (size_t)f.count, sizeof *sum), before = 1;
    ATTN_TRY(status);
    if (sum == NULL) {
        return attn_fail_memory((size_t)f.count * sizeof *sum);
    }
    for (m->row = 0; m->row < rows; m->row++) {
        double slope, eta = p->eta >= ETA_EXP ? eta_of(p->eta, (double)attn_f32(call->t[M_N])[m->row], &slope) : 1;
        features_forward(&f, attn_f32(call->t[M_Q]) + m->row * d, fq);
        features_forward(&f, attn_f32(call->t[M_K]) + m->row * d, fk);
        for (int64_t s = 0; s < f.count; s++) {
            sum[s] = (m->row % n == 0 ? 0 : sum[s]) + (double)fk[s];
        }
        if (p->eta == ETA_SUM) {
            eta = 0;
            for (int64_t s = 0; s < f.count; s++) {
                eta += (double)fq[s] * sum[s];
            }
        }
        for (int64_t i = 0; i < m->d * f.count; i++) {
            int64_t s = i % f.count;
            put(m, i / f.count, s, m->row % n == 0 ? 1 : before / eta, (double)fk[s] / eta, (double)fq[s]);
        }
        before = eta;
    }
    return ATTN_OK;
}

static attn_status matrices_forward(attn_call *call)
{
    const matrices_params *p = call->params;
    int64_t rows = attn_dim(call, "B") * attn_dim(call, "N"), d = attn_dim(call, "d"), size = attn_dim(call, "T");
    system_at m = {0, d, d > 0 ? size / d : 1, attn_f32(call->t[M_LAM]), attn_f32(call->t[M_BM]), attn_f32(call->t[M_CM]), attn_f32(call->t[M_DM])};
    memset(m.bm, 0, (size_t)(rows * size * d) * sizeof(float));
    memset(m.cm, 0, (size_t)(rows * size * d) * sizeof(float));
    memset(m.dm, 0, (size_t)(rows * d * d) * sizeof(float));
    if (p->arch == ARCH_ATTENTION) {
        return attention_matrices(call, &m);
    }
    attn_status status = ATTN_OK;
    float *pre = attn_dsf_floats(call, p->arch == ARCH_QLSTM ? rows * 3 * d : 0, &status);
    ATTN_TRY(status);
    if (p->arch == ARCH_QLSTM) {
        ATTN_TRY(attn_linear_forward(call->arena, call->threads, rows, d, 3 * d, attn_f32(call->t[M_X]), attn_f32(call->t[M_W]),
                                     attn_f32(call->t[M_BIAS]), pre));
    }
    for (m.row = 0; m.row < rows; m.row++) {
        for (int64_t c = 0; c < d; c++) {
            int64_t at = m.row * d + c;
            if (p->arch == ARCH_QLSTM) {
                const float *gates = pre + m.row * 3 * d + c;
                double alpha = p->reversed ? fmax((double)attn_f32(call->t[M_ALPHA])[0], 0) : 0;
                double lam = p->reversed ? exp(-alpha * attn_softplus((double)gates[0])) : attn_sigmoid((double)gates[0]);
                put(&m, c, 0, lam, attn_sigmoid((double)gates[d]), attn_sigmoid((double)gates[2 * d]));
            } else if (p->arch == ARCH_RGLRU) {
                double log_a = -p->c * attn_softplus((double)attn_f32(call->t[M_A])[c]) * attn_sigmoid((double)attn_f32(call->t[M_R])[at]);
                put(&m, c, 0, exp(log_a), sqrt(-expm1(2 * log_a)) * attn_sigmoid((double)attn_f32(call->t[M_G])[at]), 1);
            } else {
                const attn_tensor *dt = call->t[M_DT], *bias = call->t[M_DT_BIAS], *rate = call->t[M_A_LOG];
                double step = (double)attn_f32(dt)[dt->shape[2] > 1 ? at : m.row];
                step = attn_softplus(step + (bias != NULL ? (double)attn_f32(bias)[bias->shape[0] > 1 ? c : 0] : 0));
                for (int64_t s = 0; s < m.states; s++) {
                    int64_t entry = (rate->shape[0] > 1 ? c : 0) * rate->shape[1] + (rate->shape[1] > 1 ? s : 0);
                    put(&m, c, s, exp(-step * exp((double)attn_f32(rate)[entry])), step * (double)attn_f32(call->t[M_B])[m.row * m.states + s],
                        (double)attn_f32(call->t[M_C])[m.row * m.states + s]);
                }
                m.dm[at * d + c] = call->t[M_SKIP] != NULL ? attn_f32(call->t[M_SKIP])[c] : 0.0f;
            }
        }
    }
    return ATTN_OK;
}

const attn_op_class attn_op_dsf_matrices = {
    .info = {.name = "dsf.matrices",
             .title = "An architecture as matrices of the general system",
             .summary = "Writes attention, S6, the qLSTM or RG-LRU as the transition, input, output and direct matrices that dsf takes, to compare "
                        "them term by term.",
             .paper = "arXiv:2405.15731",
             ATTN_TABLE(matrices_param_table, matrices_ports)},
    .params_size = sizeof(matrices_params),
    .bind = matrices_bind,
    .forward = matrices_forward,
};
