/* SoftPAG and HeadHunter (arXiv:2506.10978): guidance for diffusion models by a weaker prediction in which chosen attention heads
 * are perturbed. The map of a perturbed head moves by a factor u from its softmax towards a target (identity, uniform, ...).
 *
 * No map is formed: most targets are ordinary attention followed by a correction per row, from the row's log-sum-exp and the logit
 * on the diagonal. Only "max" and "log_linear" look at all logits again, a block of queries at a time.
 */
#include "layer/gemm.h"
#include "op/class.h"
#include <attn/dense.h>

#include <string.h>

enum { TARGET_IDENTITY, TARGET_UNIFORM, TARGET_QUERY_MEAN, TARGET_MAX, TARGET_TEMPERATURE };
enum { PATH_LINEAR, PATH_SLERP, PATH_HELLINGER, PATH_LOG_LINEAR };

#define ROW_BLOCK 64
#define FLOOR 1e-12 /* of a probability on the log-linear path */
#define AWAY 1e-6   /* what the identity keeps off the diagonal on that path */

typedef struct softpag_params {
    double u, tau, scale;
    int64_t target, path;
    attn_ints tokens;
} softpag_params;

static const attn_param_info softpag_param_table[] = {
    ATTN_P_FLOAT("u", softpag_params, u, "1.0", 0, 1, "strength: 0 ordinary attention, 1 the target map"),
    ATTN_P_CHOICE("target", softpag_params, target, "identity", "identity|uniform|query_mean|max|temperature",
                  "the map that perturbed heads move to"),
    ATTN_P_CHOICE("path", softpag_params, path, "linear", "linear|slerp|hellinger|log_linear",
                  "how to go there; all but linear need target identity"),
    ATTN_P_FLOAT_OPEN("tau", softpag_params, tau, "1.0", 0, 1, INFINITY, 0, "temperature of target temperature"),
    ATTN_P_LIST(INTS, "tokens", softpag_params, tokens, "null", 0, INFINITY, 2, 2,
                "query range [lo, hi) of target query_mean (default: all)"),
    ATTN_P_SCALE_POSITIVE(softpag_params, scale),
};

enum { Q, K, V, HEADS, O };

static const attn_port_info softpag_ports[] = {
    ATTN_IN("q", "B,H,N,D", FLOAT, ATTN_PORT_DIFF, "queries"),
    ATTN_IN("k", "B,Hkv,M,D", FLOAT, ATTN_PORT_DIFF, "keys"),
    ATTN_IN("v", "B,Hkv,M,Dv", FLOAT, ATTN_PORT_DIFF, "values"),
    ATTN_IN("heads", "H", BOOL, ATTN_PORT_OPTIONAL, "query heads to perturb (absent: all)"),
    ATTN_OUT("o", "B,H,N,Dv", FLOAT, ATTN_PORT_DIFF, "the attention output"),
};

static attn_status softpag_bind(attn_call *call)
{
    const softpag_params *p = call->params;
    int64_t n = attn_dim(call, "N"), m = attn_dim(call, "M");
    if (p->path != PATH_LINEAR && p->target != TARGET_IDENTITY) {
        return attn_fail(ATTN_ERR_ARGUMENT, "path slerp, hellinger and log_linear need target = identity");
    }
    if (p->target == TARGET_IDENTITY && n != m) {
        return attn_fail(ATTN_ERR_SHAPE, "target identity needs as many keys as queries (N = %lld, M = %lld)", (long long)n,
                         (long long)m);
    }
    if (p->tokens.items != NULL && !(p->tokens.items[0] < p->tokens.items[1] && p->tokens.items[1] <= n)) {
        return attn_fail(ATTN_ERR_ARGUMENT, "tokens = [%lld, %lld]: expected 0 <= lo < hi <= N = %lld",
                         (long long)p->tokens.items[0], (long long)p->tokens.items[1], (long long)n);
    }
    return ATTN_OK;
}

/* ---- One head of one batch item ---- */

typedef struct head {
    int64_t n, m, d, dv;
    double scale;
    const float *q, *k, *v;
    float *o, *lse;
} head;

static head head_at(const attn_call *call, int64_t b, int64_t h, float *lse)
{
    const softpag_params *p = call->params;
    int64_t heads = attn_dim(call, "H"), kv_heads = attn_dim(call, "Hkv"), n = attn_dim(call, "N"), m = attn_dim(call, "M");
    int64_t d = attn_dim(call, "D"), dv = attn_dim(call, "Dv"), kv = b * kv_heads + h / (heads / kv_heads), at = b * heads + h;
    return (head){n, m, d, dv, attn_default_scale(p->scale, d), attn_f32(call->t[Q]) + at * n * d,
                  attn_f32(call->t[K]) + kv * m * d, attn_f32(call->t[V]) + kv * m * dv, attn_f32(call->t[O]) + at * n * dv, lse};
}

static attn_tensor matrix(const float *data, int64_t rows, int64_t columns)
{
    return attn_tensor_make((void *)(uintptr_t)data, ATTN_F32, 4, (int64_t[]){1, 1, rows, columns});
}

/* Ordinary attention of `rows` queries of a head. */
static attn_status attend(attn_call *call, const head *x, const float *q, int64_t rows, double scale, float *o, float *lse)
{
    attn_dense_settings settings;
    attn_dense_defaults(&settings);
    settings.scale = scale;
    attn_dense_inputs in = {.q = matrix(q, rows, x->d), .k = matrix(x->k, x->m, x->d), .v = matrix(x->v, x->m, x->dv)};
    attn_tensor to = matrix(o, rows, x->dv), lse_view = attn_tensor_make(lse, ATTN_F32, 3, (int64_t[]){1, 1, rows});
    attn_exec exec = {.threads = call->threads, .arena = call->arena};
    return attn_dense_forward(&settings, &in, &to, lse != NULL ? &lse_view : NULL, &exec);
}

/* Gradients of ordinary attention, added to grad_q, grad_k, grad_v (each may be NULL). */
static attn_status attend_backward(attn_call *call, const head *x, const float *q, int64_t rows, double scale, const float *o,
                                   const float *lse, const float *grad_o, float *grad_q, float *grad_k, float *grad_v)
{
    float *part = attn_scratch_f32(call, rows * x->d + x->m * (x->d + x->dv));
    if (part == NULL) {
        return attn_fail_memory((size_t)(rows * x->d) * sizeof(float));
    }
    float *part_k = part + rows * x->d, *part_v = part_k + x->m * x->d;
    attn_dense_settings settings;
    attn_dense_defaults(&settings);
    settings.scale = scale;
    attn_dense_inputs in = {.q = matrix(q, rows, x->d), .k = matrix(x->k, x->m, x->d), .v = matrix(x->v, x->m, x->dv)};
    attn_tensor o_view = matrix(o, rows, x->dv), g_view = matrix(grad_o, rows, x->dv);
    attn_tensor lse_view = attn_tensor_make((void *)(uintptr_t)lse, ATTN_F32, 3, (int64_t[]){1, 1, rows});
    attn_tensor to_q = matrix(part, rows, x->d), to_k = matrix(part_k, x->m, x->d), to_v = matrix(part_v, x->m, x->dv);
    attn_dense_gradients gradients = {.q = &to_q, .k = &to_k, .v = &to_v};
    attn_exec exec = {.threads = call->threads, .arena = call->arena};
    ATTN_TRY(attn_dense_backward(&settings, &in, &o_view, &lse_view, &g_view, &gradients, &exec));
    for (int64_t i = 0; i < rows * x->d && grad_q != NULL; i++) {
        grad_q[i] += part[i];
    }
    for (int64_t i = 0; i < x->m * x->d && grad_k != NULL; i++) {
        grad_k[i] += part_k[i];
    }
    for (int64_t i = 0; i < x->m * x->dv && grad_v != NULL; i++) {
        grad_v[i] += part_v[i];
    }
    return ATTN_OK;
}

static double diagonal_logit(const head *x, int64_t i)
{
    double sum = 0;
    for (int64_t c = 0; c < x->d; c++) {
        sum += (double)x->q[i * x->d + c] * (double)x->k[i * x->d + c];
    }
    return sum * x->scale;
}

/* o = (1-u) o + u t for one row. */
static void mix_row(float *o, const float *t, int64_t count, double u)
{
    for (int64_t c = 0; c < count; c++) {
        o[c] = (float)((1 - u) * (double)o[c] + u * (double)t[c]);
    }
}

static void mean_value(const head *x, float *mean)
{
    for (int64_t c = 0; c < x->dv; c++) {
        double sum = 0;
        for (int64_t j = 0; j < x->m; j++) {
            sum += (double)x->v[j * x->dv + c];
        }
        mean[c] = x->m > 0 ? (float)(sum / (double)x->m) : 0;
    }
}

/* The range of target query_mean and the mean query of it. */
static void mean_query(const attn_call *call, const head *x, int64_t range[2], float *mean)
{
    const softpag_params *p = call->params;
    range[0] = p->tokens.items != NULL ? p->tokens.items[0] : 0;
    range[1] = p->tokens.items != NULL ? p->tokens.items[1] : x->n;
    for (int64_t c = 0; c < x->d; c++) {
        double sum = 0;
        for (int64_t i = range[0]; i < range[1]; i++) {
            sum += (double)x->q[i * x->d + c];
        }
        mean[c] = (float)(sum / (double)(range[1] - range[0]));
    }
}

/* The paths through square roots of probabilities: slerp (arc) and hellinger (chord). */
static void root_path_row(const softpag_params *p, const head *x, int64_t i)
{
    double a = fmin(1, exp(diagonal_logit(x, i) - (double)x->lse[i])), c1 = p->u, c2 = 1 - p->u;
    if (p->path == PATH_SLERP) {
        double angle = acos(sqrt(a));
        if (angle >= 1e-4) {
            c1 = sin(p->u * angle) / sin(angle);
            c2 = sin((1 - p->u) * angle) / sin(angle);
        }
    }
    double e = c1 + c2 * sqrt(a), own = e * e, rest = c2 * c2, total = rest * (1 - a) + own;
    float *o = x->o + i * x->dv;
    const float *v = x->v + i * x->dv;
    for (int64_t c = 0; c < x->dv; c++) {
        o[c] = (float)((rest * ((double)o[c] - a * (double)v[c]) + own * (double)v[c]) / total);
    }
}

/* Logits of `rows` queries from `first` on against all keys, [rows, m]. */
static attn_status logits_of(attn_call *call, const head *x, int64_t first, int64_t rows, float *logits)
{
    return attn_gemm(call->arena, call->threads, 0, 1, rows, x->m, x->d, (float)x->scale, x->q + first * x->d, x->d, x->k, x->d, 0,
                     logits, x->m);
}

static void max_row(const softpag_params *p, const head *x, int64_t i, const float *logits)
{
    int64_t best = 0;
    for (int64_t j = 1; j < x->m; j++) {
        best = logits[j] > logits[best] ? j : best;
    }
    mix_row(x->o + i * x->dv, x->v + best * x->dv, x->dv, p->u);
}

/* Probabilities of the log-linear path in place of the logits. */
static void log_linear_row(const softpag_params *p, const head *x, int64_t i, float *logits)
{
    double own = 1 - AWAY * (double)(x->n - 1) + AWAY, diagonal = p->u * log(own / AWAY), top = -INFINITY, sum = 0;
    for (int64_t j = 0; j < x->m; j++) {
        double s = (1 - p->u) * fmax((double)logits[j] - (double)x->lse[i], log(FLOOR)) + (j == i ? diagonal : 0);
        logits[j] = (float)s;
        top = fmax(top, s);
    }
    for (int64_t j = 0; j < x->m; j++) {
        double weight = exp((double)logits[j] - top);
        logits[j] = (float)weight;
        sum += weight;
    }
    for (int64_t j = 0; j < x->m; j++) {
        logits[j] = (float)((double)logits[j] / sum);
    }
}

/* The targets that look at every logit. */
static attn_status by_rows(attn_call *call, const head *x)
{
    const softpag_params *p = call->params;
    float *logits = attn_scratch_f32(call, ROW_BLOCK * x->m);
    if (logits == NULL) {
        return attn_fail_memory((size_t)(ROW_BLOCK * x->m) * sizeof(float));
    }
    for (int64_t first = 0; first < x->n; first += ROW_BLOCK) {
        int64_t rows = attn_min_i64(ROW_BLOCK, x->n - first);
        ATTN_TRY(logits_of(call, x, first, rows, logits));
#pragma omp parallel for num_threads(call->threads)
        for (int64_t r = 0; r < rows; r++) {
            if (p->target == TARGET_MAX) {
                max_row(p, x, first + r, logits + r * x->m);
            } else {
                log_linear_row(p, x, first + r, logits + r * x->m);
            }
        }
        if (p->path == PATH_LOG_LINEAR) {
            ATTN_TRY(attn_gemm(call->arena, call->threads, 0, 0, rows, x->dv, x->m, 1, logits, x->m, x->v, x->dv, 0,
                               x->o + first * x->dv, x->dv));
        }
    }
    return ATTN_OK;
}

/* With u = 1 nothing of the ordinary output remains. */
static int needs_attention(const softpag_params *p)
{
    return p->u < 1 || p->target == TARGET_QUERY_MEAN;
}

static attn_status perturb(attn_call *call, const head *x)
{
    const softpag_params *p = call->params;
    float *row = attn_scratch_f32(call, x->dv + x->d);
    int64_t range[2];
    if (row == NULL) {
        return attn_fail_memory((size_t)(x->dv + x->d) * sizeof(float));
    }
    if (p->u == 0 || x->n == 0 || x->m == 0) {
        return ATTN_OK;
    }
    if (p->target == TARGET_IDENTITY && p->u == 1) {
        memcpy(x->o, x->v, (size_t)(x->n * x->dv) * sizeof(float));
        return ATTN_OK;
    }
    if (p->path == PATH_SLERP || p->path == PATH_HELLINGER) {
        for (int64_t i = 0; i < x->n; i++) {
            root_path_row(p, x, i);
        }
        return ATTN_OK;
    }
    if (p->path == PATH_LOG_LINEAR || p->target == TARGET_MAX) {
        return by_rows(call, x);
    }
    switch (p->target) {
    case TARGET_UNIFORM:
        mean_value(x, row);
        for (int64_t i = 0; i < x->n; i++) {
            mix_row(x->o + i * x->dv, row, x->dv, p->u);
        }
        return ATTN_OK;
    case TARGET_QUERY_MEAN:
        mean_query(call, x, range, row + x->dv);
        ATTN_TRY(attend(call, x, row + x->dv, 1, x->scale, row, NULL));
        for (int64_t i = range[0]; i < range[1]; i++) {
            mix_row(x->o + i * x->dv, row, x->dv, p->u);
        }
        return ATTN_OK;
    case TARGET_TEMPERATURE: {
        float *sharp = attn_scratch_f32(call, x->n * x->dv);
        if (sharp == NULL) {
            return attn_fail_memory((size_t)(x->n * x->dv) * sizeof(float));
        }
        ATTN_TRY(attend(call, x, x->q, x->n, x->scale / p->tau, sharp, NULL));
        for (int64_t i = 0; i < x->n; i++) {
            mix_row(x->o + i * x->dv, sharp + i * x->dv, x->dv, p->u);
        }
        return ATTN_OK;
    }
    default: /* identity, linear */
        for (int64_t i = 0; i < x->n; i++) {
            mix_row(x->o + i * x->dv, x->v + i * x->dv, x->dv, p->u);
        }
        return ATTN_OK;
    }
}

static attn_status softpag_forward(attn_call *call)
{
    const softpag_params *p = call->params;
    int64_t batch = attn_dim(call, "B"), heads = attn_dim(call, "H");
    const uint8_t *perturbed = attn_bool(call->t[HEADS]);
    float *lse = attn_scratch_f32(call, attn_dim(call, "N"));
    if (lse == NULL) {
        return attn_fail_memory((size_t)attn_dim(call, "N") * sizeof(float));
    }
    for (int64_t i = 0; i < batch * heads; i++) {
        head x = head_at(call, i / heads, i % heads, lse);
        int change = perturbed == NULL || perturbed[i % heads];
        attn_arena_mark mark = attn_arena_get_mark(call->arena);
        if (!change || needs_attention(p)) {
            ATTN_TRY(attend(call, &x, x.q, x.n, x.scale, x.o, lse));
        } else {
            memset(x.o, 0, (size_t)(x.n * x.dv) * sizeof(float));
        }
        if (change) {
            ATTN_TRY(perturb(call, &x));
        }
        attn_arena_release(call->arena, mark);
    }
    return ATTN_OK;
}

/* ---- Backward: the linear path ---- */

typedef struct head_gradients {
    const float *o;
    float *q, *k, *v;
} head_gradients;

static float *offset(float *base, int64_t by) { return base != NULL ? base + by : NULL; }

/* u times the gradient that goes through the target map. */
static attn_status target_backward(attn_call *call, const head *x, const head_gradients *g, float *scaled)
{
    const softpag_params *p = call->params;
    int64_t range[2];
    for (int64_t i = 0; i < x->n * x->dv; i++) {
        scaled[i] = (float)(p->u * (double)g->o[i]);
    }
    switch (p->target) {
    case TARGET_IDENTITY:
        for (int64_t i = 0; i < x->n * x->dv && g->v != NULL; i++) {
            g->v[i] += scaled[i];
        }
        return ATTN_OK;
    case TARGET_UNIFORM:
        for (int64_t c = 0; c < x->dv && g->v != NULL; c++) {
            double sum = 0;
            for (int64_t i = 0; i < x->n; i++) {
                sum += (double)scaled[i * x->dv + c];
            }
            for (int64_t j = 0; j < x->m; j++) {
                g->v[j * x->dv + c] += (float)(sum / (double)x->m);
            }
        }
        return ATTN_OK;
    case TARGET_MAX: {
        /* The map is constant: the gradient goes to the value that each row picked. */
        float *logits = attn_scratch_f32(call, ROW_BLOCK * x->m);
        if (logits == NULL) {
            return attn_fail_memory((size_t)(ROW_BLOCK * x->m) * sizeof(float));
        }
        for (int64_t first = 0; first < x->n && g->v != NULL; first += ROW_BLOCK) {
            int64_t rows = attn_min_i64(ROW_BLOCK, x->n - first);
            ATTN_TRY(logits_of(call, x, first, rows, logits));
            for (int64_t r = 0; r < rows; r++) {
                const float *row = logits + r * x->m;
                int64_t best = 0;
                for (int64_t j = 1; j < x->m; j++) {
                    best = row[j] > row[best] ? j : best;
                }
                for (int64_t c = 0; c < x->dv; c++) {
                    g->v[best * x->dv + c] += scaled[(first + r) * x->dv + c];
                }
            }
        }
        return ATTN_OK;
    }
    case TARGET_TEMPERATURE: {
        float *o = attn_scratch_f32(call, x->n * (x->dv + 1));
        if (o == NULL) {
            return attn_fail_memory((size_t)(x->n * (x->dv + 1)) * sizeof(float));
        }
        float *lse = o + x->n * x->dv;
        ATTN_TRY(attend(call, x, x->q, x->n, x->scale / p->tau, o, lse));
        return attend_backward(call, x, x->q, x->n, x->scale / p->tau, o, lse, scaled, g->q, g->k, g->v);
    }
    default: { /* query_mean */
        float *q = attn_scratch_f32(call, 2 * x->d + 2 * x->dv + 1);
        if (q == NULL) {
            return attn_fail_memory((size_t)(2 * (x->d + x->dv)) * sizeof(float));
        }
        float *grad_q = q + x->d, *o = grad_q + x->d, *grad_o = o + x->dv, *lse = grad_o + x->dv;
        mean_query(call, x, range, q);
        for (int64_t c = 0; c < x->dv; c++) {
            double sum = 0;
            for (int64_t i = range[0]; i < range[1]; i++) {
                sum += (double)scaled[i * x->dv + c];
            }
            grad_o[c] = (float)sum;
        }
        memset(grad_q, 0, (size_t)x->d * sizeof *grad_q);
        ATTN_TRY(attend(call, x, q, 1, x->scale, o, lse));
        ATTN_TRY(attend_backward(call, x, q, 1, x->scale, o, lse, grad_o, grad_q, g->k, g->v));
        for (int64_t i = range[0]; i < range[1] && g->q != NULL; i++) {
            for (int64_t c = 0; c < x->d; c++) {
                g->q[i * x->d + c] += grad_q[c] / (float)(range[1] - range[0]);
            }
        }
        return ATTN_OK;
    }
    }
}

static attn_status head_backward(attn_call *call, const head *x, int change, const head_gradients *g)
{
    const softpag_params *p = call->params;
    double u = change ? p->u : 0;
    int64_t range[2] = {0, x->n};
    float *scaled = attn_scratch_f32(call, x->n * x->dv), *o = attn_scratch_f32(call, x->n * x->dv);
    if (scaled == NULL || o == NULL) {
        return attn_fail_memory((size_t)(x->n * x->dv) * sizeof(float));
    }
    if (change && p->target == TARGET_QUERY_MEAN && p->tokens.items != NULL) {
        range[0] = p->tokens.items[0];
        range[1] = p->tokens.items[1];
    }
    int partial = range[0] > 0 || range[1] < x->n; /* rows outside the range keep their full gradient */
    if (u < 1 || partial) {
        for (int64_t i = 0; i < x->n; i++) {
            double share = i >= range[0] && i < range[1] ? 1 - u : 1;
            for (int64_t c = 0; c < x->dv; c++) {
                scaled[i * x->dv + c] = (float)(share * (double)g->o[i * x->dv + c]);
            }
        }
        ATTN_TRY(attend(call, x, x->q, x->n, x->scale, o, x->lse));
        ATTN_TRY(attend_backward(call, x, x->q, x->n, x->scale, o, x->lse, scaled, g->q, g->k, g->v));
    }
    return u > 0 ? target_backward(call, x, g, scaled) : ATTN_OK;
}

static attn_status softpag_backward(attn_call *call)
{
    const softpag_params *p = call->params;
    int64_t batch = attn_dim(call, "B"), heads = attn_dim(call, "H"), kv_heads = attn_dim(call, "Hkv");
    int64_t n = attn_dim(call, "N"), m = attn_dim(call, "M"), d = attn_dim(call, "D"), dv = attn_dim(call, "Dv");
    const uint8_t *perturbed = attn_bool(call->t[HEADS]);
    if (p->path != PATH_LINEAR) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "gradients exist for path = linear only");
    }
    float *lse = attn_scratch_f32(call, n);
    if (lse == NULL) {
        return attn_fail_memory((size_t)n * sizeof(float));
    }
    for (int64_t i = 0; i < batch * heads; i++) {
        int64_t h = i % heads, kv = i / heads * kv_heads + h / (heads / kv_heads);
        head x = head_at(call, i / heads, h, lse);
        head_gradients g = {attn_f32(call->grad[O]) + i * n * dv, offset(attn_f32(call->grad[Q]), i * n * d),
                            offset(attn_f32(call->grad[K]), kv * m * d), offset(attn_f32(call->grad[V]), kv * m * dv)};
        attn_arena_mark mark = attn_arena_get_mark(call->arena);
        ATTN_TRY(head_backward(call, &x, perturbed == NULL || perturbed[h], &g));
        attn_arena_release(call->arena, mark);
    }
    return ATTN_OK;
}

const attn_op_class attn_op_softpag = {
    .info = {.name = "softpag",
             .title = "Perturbed attention heads for guidance",
             .summary = "Attention in which chosen heads move by a factor u from their softmax map towards a target map. A diffusion model "
                        "is guided away from the prediction made with it (softpag.guide). Costs ordinary attention and a "
                        "correction per row; with u = 1 and target identity or uniform no attention at all.",
             .paper = "arXiv:2506.10978",
             .differentiable = 1,
             ATTN_TABLE(softpag_param_table, softpag_ports)},
    .params_size = sizeof(softpag_params),
    .bind = softpag_bind,
    .forward = softpag_forward,
    .backward = softpag_backward,
};

/* ---- softpag.guide ---- */

typedef struct guide_params {
    double perturb_scale, guidance_scale;
} guide_params;

static const attn_param_info guide_param_table[] = {
    ATTN_P_FLOAT("perturb_scale", guide_params, perturb_scale, "3.0", -INFINITY, INFINITY, "how far away from the perturbed prediction"),
    ATTN_P_FLOAT("guidance_scale", guide_params, guidance_scale, "0.0", -INFINITY, INFINITY,
                 "classifier-free guidance, with uncond only"),
};

enum { GUIDE_COND, GUIDE_PERTURBED, GUIDE_UNCOND, GUIDE_O };

static const attn_port_info guide_ports[] = {
    ATTN_IN("cond", "...", FLOAT, 0, "prediction with the condition"),
    ATTN_IN("perturbed", "...", FLOAT, 0, "prediction with perturbed heads"),
    ATTN_IN("uncond", "...", FLOAT, ATTN_PORT_OPTIONAL, "prediction without the condition"),
    ATTN_OUT("o", "...", FLOAT, 0, "the guided prediction"),
};

static attn_status guide_bind(attn_call *call)
{
    const attn_tensor *cond = call->t[GUIDE_COND];
    for (int port = GUIDE_PERTURBED; port <= GUIDE_UNCOND; port++) {
        const attn_tensor *other = call->t[port];
        if (other != NULL &&
            (other->ndim != cond->ndim || memcmp(other->shape, cond->shape, (size_t)cond->ndim * sizeof cond->shape[0]) != 0)) {
            return attn_fail(ATTN_ERR_SHAPE, "%s and cond differ in shape", guide_ports[port].name);
        }
    }
    return ATTN_OK;
}

static attn_status guide_forward(attn_call *call)
{
    const guide_params *p = call->params;
    const float *cond = attn_f32(call->t[GUIDE_COND]), *perturbed = attn_f32(call->t[GUIDE_PERTURBED]);
    const float *uncond = attn_f32(call->t[GUIDE_UNCOND]);
    for (int64_t i = 0; i < attn_tensor_count(call->t[GUIDE_COND]); i++) {
        double c = (double)cond[i];
        double base = uncond != NULL ? (double)uncond[i] + p->guidance_scale * (c - (double)uncond[i]) : c;
        attn_f32(call->t[GUIDE_O])[i] = (float)(base + p->perturb_scale * (c - (double)perturbed[i]));
    }
    return ATTN_OK;
}

const attn_op_class attn_op_softpag_guide = {
    .info = {.name = "softpag.guide",
             .title = "Perturbed attention heads: combine predictions",
             .summary = "Move the conditional prediction away from the perturbed one, with or without classifier-free guidance.",
             .paper = "arXiv:2506.10978",
             ATTN_TABLE(guide_param_table, guide_ports)},
    .params_size = sizeof(guide_params),
    .bind = guide_bind,
    .forward = guide_forward,
};

/* ---- softpag.select: one expansion step of HeadHunter ---- */

enum { METHOD_MEAN, METHOD_HARMONIC, METHOD_THRESHOLD };

typedef struct select_params {
    int64_t top_k, method;
    double pick_min, laion_min;
} select_params;

static const attn_param_info select_param_table[] = {
    ATTN_P_INT("top_k", select_params, top_k, NULL, 1, 1e6, "heads to add"),
    ATTN_P_CHOICE("method", select_params, method, "mean", "mean|harmonic|threshold",
                  "mean score; harmonic mean with clip; clip among heads that pass both minima"),
    ATTN_P_FLOAT("pick_min", select_params, pick_min, "20", -INFINITY, INFINITY, "least mean score (threshold)"),
    ATTN_P_FLOAT("laion_min", select_params, laion_min, "6", -INFINITY, INFINITY, "least mean laion (threshold)"),
};

enum { SELECT_SCORE, SELECT_SELECTED, SELECT_CLIP, SELECT_LAION, SELECT_VALUE, SELECT_HEADS, SELECT_UPDATED };

static const attn_port_info select_ports[] = {
    ATTN_IN("score", "L,H,M", FLOAT, 0, "objective of each candidate head on each prompt-seed pair"),
    ATTN_IN("selected", "L,H", BOOL, 0, "heads selected before"),
    ATTN_IN("clip", "L,H,M", FLOAT, ATTN_PORT_OPTIONAL, "second objective (harmonic, threshold)"),
    ATTN_IN("laion", "L,H,M", FLOAT, ATTN_PORT_OPTIONAL, "third objective (threshold)"),
    ATTN_OUT("value", "L,H", FLOAT, 0, "the ranking value"),
    ATTN_OUT("heads", "top_k,2", INT, 0, "layer and head, best first; -1 when candidates run out"),
    ATTN_OUT("selected", "L,H", BOOL, 0, "heads selected now"),
};

static attn_status select_bind(attn_call *call)
{
    const select_params *p = call->params;
    if (p->method != METHOD_MEAN && call->t[SELECT_CLIP] == NULL) {
        return attn_fail(ATTN_ERR_ARGUMENT, "method harmonic and threshold need input clip");
    }
    if (p->method == METHOD_THRESHOLD && call->t[SELECT_LAION] == NULL) {
        return attn_fail(ATTN_ERR_ARGUMENT, "method threshold needs input laion");
    }
    if (attn_dim(call, "M") < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "score needs at least one prompt-seed pair");
    }
    attn_set_dim(call, "top_k", p->top_k);
    return ATTN_OK;
}

static double mean_of(const attn_tensor *scores, int64_t i, int64_t m)
{
    double sum = 0;
    for (int64_t j = 0; j < m && scores != NULL; j++) {
        sum += (double)attn_f32(scores)[i * m + j];
    }
    return sum / (double)m;
}

/* The best candidate that is left (lowest index on ties), -1 when there is none. */
static int64_t best_candidate(const double *value, const uint8_t *taken, int64_t count)
{
    int64_t best = -1;
    for (int64_t i = 0; i < count; i++) {
        if (!taken[i] && (best < 0 || value[i] > value[best])) {
            best = i;
        }
    }
    return best;
}

static attn_status select_forward(attn_call *call)
{
    const select_params *p = call->params;
    int64_t heads = attn_dim(call, "H"), count = attn_dim(call, "L") * heads, m = attn_dim(call, "M");
    double *value = attn_arena_array(call->arena, (size_t)count, sizeof *value);
    uint8_t *taken = attn_arena_alloc(call->arena, (size_t)count), *selected = attn_bool(call->t[SELECT_UPDATED]);
    if (value == NULL || taken == NULL) {
        return attn_fail_memory((size_t)count * sizeof *value);
    }
    for (int64_t i = 0; i < count; i++) {
        double score = mean_of(call->t[SELECT_SCORE], i, m), clip = mean_of(call->t[SELECT_CLIP], i, m);
        int passes = p->method != METHOD_THRESHOLD ||
                     (score >= p->pick_min && mean_of(call->t[SELECT_LAION], i, m) >= p->laion_min);
        value[i] = p->method == METHOD_MEAN       ? score
                   : p->method == METHOD_HARMONIC ? (score + clip > 0 ? 2 * score * clip / (score + clip) : 0)
                   : passes                       ? clip
                                                  : -INFINITY;
        selected[i] = attn_bool(call->t[SELECT_SELECTED])[i] != 0;
        taken[i] = selected[i] || !passes;
        attn_f32(call->t[SELECT_VALUE])[i] = (float)value[i];
    }
    for (int64_t r = 0; r < p->top_k; r++) {
        int64_t best = best_candidate(value, taken, count);
        attn_i64(call->t[SELECT_HEADS])[2 * r] = best >= 0 ? best / heads : -1;
        attn_i64(call->t[SELECT_HEADS])[2 * r + 1] = best >= 0 ? best % heads : -1;
        if (best >= 0) {
            taken[best] = selected[best] = 1;
        }
    }
    return ATTN_OK;
}

const attn_op_class attn_op_softpag_select = {
    .info = {.name = "softpag.select",
             .title = "HeadHunter: one expansion step",
             .summary = "Rank candidate heads by an objective measured with each of them perturbed, and add the best to the selected set.",
             .paper = "arXiv:2506.10978",
             ATTN_TABLE(select_param_table, select_ports)},
    .params_size = sizeof(select_params),
    .bind = select_bind,
    .forward = select_forward,
};

/* ---- softpag.hunt: the greedy loop on a quadratic objective ---- */

typedef struct hunt_params {
    int64_t heads, top_k, rounds;
} hunt_params;

static const attn_param_info hunt_param_table[] = {
    ATTN_P_INT("heads", hunt_params, heads, NULL, 1, INFINITY, "heads per layer"),
    ATTN_P_INT("top_k", hunt_params, top_k, NULL, 1, 1e6, "heads added per round"),
    ATTN_P_INT("rounds", hunt_params, rounds, NULL, 1, 1e6, "rounds"),
};

enum { HUNT_GAIN, HUNT_PAIR, HUNT_HEADS, HUNT_SELECTED, HUNT_VALUE };

static const attn_port_info hunt_ports[] = {
    ATTN_IN("gain", "M,all", FLOAT, 0, "gain of each head (flat l*H + h) on each prompt-seed pair"),
    ATTN_IN("pair", "all,all", FLOAT, 0, "symmetric pair terms; the diagonal is ignored"),
    ATTN_OUT("heads", "rounds,top_k,2", INT, 0, "layer and head added in each round; -1 when none is left"),
    ATTN_OUT("selected", "L,H", BOOL, 0, "the final set"),
    ATTN_OUT("value", "rounds", FLOAT, 0, "mean objective of the set after each round"),
};

static attn_status hunt_bind(attn_call *call)
{
    const hunt_params *p = call->params;
    int64_t all = attn_dim(call, "all");
    if (all % p->heads != 0) {
        return attn_fail(ATTN_ERR_ARGUMENT, "heads = %lld does not divide the %lld columns of gain", (long long)p->heads,
                         (long long)all);
    }
    if (attn_dim(call, "M") < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "gain needs at least one row");
    }
    attn_set_dim(call, "L", all / p->heads);
    attn_set_dim(call, "H", p->heads);
    attn_set_dim(call, "rounds", p->rounds);
    attn_set_dim(call, "top_k", p->top_k);
    return ATTN_OK;
}

static attn_status hunt_forward(attn_call *call)
{
    const hunt_params *p = call->params;
    int64_t all = attn_dim(call, "all"), m = attn_dim(call, "M");
    const float *pair = attn_f32(call->t[HUNT_PAIR]);
    uint8_t *selected = attn_bool(call->t[HUNT_SELECTED]);
    double *gain = attn_arena_array(call->arena, (size_t)all, sizeof *gain);
    double *value = attn_arena_array(call->arena, (size_t)all, sizeof *value);
    uint8_t *taken = attn_arena_alloc(call->arena, (size_t)all);
    if (gain == NULL || value == NULL || taken == NULL) {
        return attn_fail_memory((size_t)all * sizeof *gain);
    }
    for (int64_t i = 0; i < all; i++) {
        gain[i] = 0;
        selected[i] = taken[i] = 0;
        for (int64_t j = 0; j < m; j++) {
            gain[i] += (double)attn_f32(call->t[HUNT_GAIN])[j * all + i] / (double)m;
        }
    }
    double objective = 0;
    for (int64_t round = 0; round < p->rounds; round++) {
        for (int64_t i = 0; i < all; i++) { /* what head i would add to the set as it was before this round */
            value[i] = gain[i];
            for (int64_t j = 0; j < all; j++) {
                value[i] += selected[j] && j != i ? (double)pair[i * all + j] : 0;
            }
        }
        int64_t *heads = attn_i64(call->t[HUNT_HEADS]) + round * p->top_k * 2;
        for (int64_t r = 0; r < p->top_k; r++) {
            int64_t best = best_candidate(value, taken, all);
            heads[2 * r] = best >= 0 ? best / p->heads : -1;
            heads[2 * r + 1] = best >= 0 ? best % p->heads : -1;
            if (best < 0) {
                continue;
            }
            objective += gain[best];
            for (int64_t j = 0; j < all; j++) {
                objective += selected[j] ? (double)pair[best * all + j] : 0;
            }
            taken[best] = selected[best] = 1;
        }
        attn_f32(call->t[HUNT_VALUE])[round] = (float)objective;
    }
    return ATTN_OK;
}

const attn_op_class attn_op_softpag_hunt = {
    .info = {.name = "softpag.hunt",
             .title = "HeadHunter: the greedy loop on a quadratic objective",
             .summary = "Rounds of ranking all remaining heads with the selected set and adding the best top_k, on a closed-form objective "
                        "with pair terms: for studying how many rounds a search needs.",
             .paper = "arXiv:2506.10978",
             ATTN_TABLE(hunt_param_table, hunt_ports)},
    .params_size = sizeof(hunt_params),
    .bind = hunt_bind,
    .forward = hunt_forward,
};
