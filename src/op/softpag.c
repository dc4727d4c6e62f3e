/* SoftPAG and HeadHunter (arXiv:2506.10978): guidance for diffusion models by a weaker prediction in which chosen attention heads
 * are perturbed. The map of a perturbed head moves by a factor u from its softmax towards a target (identity, uniform, ...).
 *
 * No map is formed: most targets are ordinary attention followed by a correction per row, from the row's log-sum-exp and the logit
 * on the diagonal. Only "max" and "log_linear" look at all logits again, as they come by in a sweep over the keys (exec/segments.h).
 */
#include "exec/heads.h"
#include "exec/segments.h"
#include "exec/softmax.h"
#include "kernel/tile.h"
#include "op/class.h"

#include <string.h>

enum { TARGET_IDENTITY, TARGET_UNIFORM, TARGET_QUERY_MEAN, TARGET_MAX, TARGET_TEMPERATURE };
enum { PATH_LINEAR, PATH_SLERP, PATH_HELLINGER, PATH_LOG_LINEAR };

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

/* Head `at` of all batch items' heads; lse: of the whole call, or NULL. */
static head head_at(const attn_call *call, int64_t at, float *lse)
{
    const softpag_params *p = call->params;
    int64_t heads = attn_dim(call, "H"), kv_heads = attn_dim(call, "Hkv"), n = attn_dim(call, "N"), m = attn_dim(call, "M");
    int64_t d = attn_dim(call, "D"), dv = attn_dim(call, "Dv"), kv = at / heads * kv_heads + at % heads / (heads / kv_heads);
    return (head){n, m, d, dv, attn_default_scale(p->scale, d), attn_f32(call->t[Q]) + at * n * d, attn_f32(call->t[K]) + kv * m * d,
                  attn_f32(call->t[V]) + kv * m * dv, attn_f32(call->t[O]) + at * n * dv, lse != NULL ? lse + at * n : NULL};
}

static int is_perturbed(const attn_call *call, int64_t at)
{
    return call->t[HEADS] == NULL || attn_bool(call->t[HEADS])[at % attn_dim(call, "H")];
}

/* The queries that move: those of `tokens` for target query_mean, all for the others. */
static void moving_rows(const attn_call *call, int64_t range[2])
{
    const softpag_params *p = call->params;
    int limited = p->target == TARGET_QUERY_MEAN && p->tokens.items != NULL;
    range[0] = limited ? p->tokens.items[0] : 0;
    range[1] = limited ? p->tokens.items[1] : attn_dim(call, "N");
}

/* Whether something of the ordinary output remains in perturbed heads. */
static int needs_attention(const attn_call *call)
{
    const softpag_params *p = call->params;
    int64_t range[2];
    moving_rows(call, range);
    return p->path != PATH_LOG_LINEAR && (p->u < 1 || range[0] > 0 || range[1] < attn_dim(call, "N"));
}

static attn_tensor matrix(const float *data, int64_t rows, int64_t columns)
{
    return attn_tensor_make((void *)(uintptr_t)data, ATTN_F32, 4, (int64_t[]){1, 1, rows, columns});
}

static attn_dense_settings settings_with(double scale)
{
    attn_dense_settings settings;
    attn_dense_defaults(&settings);
    settings.scale = scale;
    return settings;
}

/* Ordinary attention of `rows` queries of a head. */
static attn_status attend(attn_call *call, const head *x, const float *q, int64_t rows, double scale, float *o, float *lse)
{
    attn_dense_settings settings = settings_with(scale);
    attn_dense_inputs in = {.q = matrix(q, rows, x->d), .k = matrix(x->k, x->m, x->d), .v = matrix(x->v, x->m, x->dv)};
    attn_tensor to = matrix(o, rows, x->dv), lse_view = attn_tensor_make(lse, ATTN_F32, 3, (int64_t[]){1, 1, rows});
    attn_exec exec = {.threads = call->threads, .arena = call->arena};
    return attn_dense_forward(&settings, &in, &to, lse != NULL ? &lse_view : NULL, &exec);
}

/* A sweep over all scores of a head, times `scale`. */
static attn_status sweep(attn_call *call, const head *x, double scale, attn_segment_hook *hook, void *user, float *o, float *lse)
{
    attn_segment keys = {.keys = x->m, .k = x->k, .v = x->v};
    attn_segments s = {1, 1, 1, x->n, x->d, x->dv, scale, x->q, 1, &keys, hook, user};
    return attn_segments_forward(&s, o, lse, NULL, call->arena, call->threads);
}

/* ---- Targets and paths ---- */

/* o = (1-u) o + u t */
static void mix(double u, float *o, const float *t, int64_t count)
{
    const attn_tile_kernels *kernels = attn_tile_kernels_get();
    if (u == 1) {
        memcpy(o, t, (size_t)count * sizeof *o);
    } else {
        kernels->scale(o, count, (float)(1 - u));
        kernels->axpy(o, t, count, (float)u);
    }
}

/* The mean of rows [first, end). sums: scratch of `width`. */
static void mean_row(const float *rows, int64_t first, int64_t end, int64_t width, double *sums, float *mean)
{
    memset(sums, 0, (size_t)width * sizeof *sums);
    for (int64_t i = first; i < end; i++) {
        for (int64_t c = 0; c < width; c++) {
            sums[c] += (double)rows[i * width + c];
        }
    }
    for (int64_t c = 0; c < width; c++) {
        mean[c] = (float)(sums[c] / (double)(end - first));
    }
}

static double diagonal_logit(const head *x, int64_t i)
{
    double sum = 0;
    for (int64_t c = 0; c < x->d; c++) {
        sum += (double)x->q[i * x->d + c] * (double)x->k[i * x->d + c];
    }
    return sum * x->scale;
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
    const attn_tile_kernels *kernels = attn_tile_kernels_get();
    kernels->scale(x->o + i * x->dv, x->dv, (float)(rest / total));
    kernels->axpy(x->o + i * x->dv, x->v + i * x->dv, x->dv, (float)((own - rest * a) / total));
}

/* The strongest key of each row, the first one on ties. */
typedef struct strongest {
    float *top;
    int64_t *key;
} strongest;

static void see_strongest(void *user, float *scores, int64_t row, int64_t segment, int64_t first, int64_t keys)
{
    strongest *x = user;
    (void)segment;
    for (int64_t j = 0; (j += attn_segment_next_above(scores + j, keys - j, x->top[row])) < keys;) {
        x->top[row] = scores[j];
        x->key[row] = first + j;
    }
}

static attn_status find_strongest(attn_call *call, const head *x, int64_t **keys)
{
    strongest user = {attn_scratch_f32(call, x->n), attn_arena_array(call->arena, (size_t)x->n, sizeof(int64_t))};
    if (user.top == NULL || user.key == NULL) {
        return attn_fail_memory((size_t)x->n * (sizeof(float) + sizeof(int64_t)));
    }
    for (int64_t i = 0; i < x->n; i++) {
        user.top[i] = -INFINITY;
        user.key[i] = 0;
    }
    *keys = user.key;
    return sweep(call, x, ATTN_SEGMENTS_UNSCALED, see_strongest, &user, NULL, NULL);
}

/* Scores on the log-linear path, in base 2. */
typedef struct log_linear {
    const float *lse;
    double share, diagonal;
} log_linear;

static void bend(void *user, float *scores, int64_t row, int64_t segment, int64_t first, int64_t keys)
{
    const log_linear *x = user;
    float least = (float)(x->share * ((double)x->lse[row] * ATTN_LOG2E + log2(FLOOR)));
    (void)segment;
    for (int64_t j = 0; j < keys; j++) {
        scores[j] = scores[j] < least ? least : scores[j];
    }
    if (row >= first && row < first + keys) {
        scores[row - first] += (float)x->diagonal;
    }
}

static attn_status log_linear_head(attn_call *call, const head *x)
{
    const softpag_params *p = call->params;
    float *lse;
    ATTN_TRY(attn_take_f32(call, x->n, &lse));
    ATTN_TRY(sweep(call, x, x->scale, NULL, NULL, NULL, lse));
    log_linear user = {lse, 1 - p->u, p->u * log2((1 - AWAY * (double)(x->n - 1) + AWAY) / AWAY)};
    return sweep(call, x, (1 - p->u) * x->scale, bend, &user, x->o, NULL);
}

/* What the rows of a head move to on the linear path: row i to row i of `rows`, to row index[i], or all of them to row 0. */
typedef struct target_rows {
    const float *rows;
    const int64_t *index;
    int one;
} target_rows;

static attn_status find_target(attn_call *call, const head *x, const int64_t range[2], target_rows *t)
{
    const softpag_params *p = call->params;
    int64_t width = attn_max_i64(x->d, x->dv), *keys;
    float *row, *other;
    double *sums = attn_arena_array(call->arena, (size_t)width, sizeof *sums);
    ATTN_TRY(attn_take_f32(call, 2 * width, &row));
    if (sums == NULL) {
        return attn_fail_memory((size_t)width * sizeof *sums);
    }
    *t = (target_rows){.rows = x->v};
    switch (p->target) {
    case TARGET_UNIFORM:
        mean_row(x->v, 0, x->m, x->dv, sums, row);
        *t = (target_rows){.rows = row, .one = 1};
        return ATTN_OK;
    case TARGET_QUERY_MEAN:
        mean_row(x->q, range[0], range[1], x->d, sums, row + width);
        *t = (target_rows){.rows = row, .one = 1};
        return attend(call, x, row + width, 1, x->scale, row, NULL);
    case TARGET_MAX:
        ATTN_TRY(find_strongest(call, x, &keys));
        t->index = keys;
        return ATTN_OK;
    case TARGET_TEMPERATURE:
        ATTN_TRY(attn_take_f32(call, x->n * x->dv, &other));
        t->rows = other;
        return attend(call, x, x->q, x->n, x->scale / p->tau, other, NULL);
    default: return ATTN_OK;
    }
}

static attn_status perturb_head(attn_call *call, const head *x)
{
    const softpag_params *p = call->params;
    int linear = p->path == PATH_LINEAR || p->u == 1; /* all paths end in the target */
    int64_t range[2];
    target_rows t = {0};
    if (!linear && p->path == PATH_LOG_LINEAR) {
        return log_linear_head(call, x);
    }
    moving_rows(call, range);
    if (linear) {
        ATTN_TRY(find_target(call, x, range, &t));
    }
#pragma omp parallel for num_threads(call->threads)
    for (int64_t i = range[0]; i < range[1]; i++) {
        if (linear) {
            mix(p->u, x->o + i * x->dv, t.rows + (t.one ? 0 : t.index != NULL ? t.index[i] : i) * x->dv, x->dv);
        } else {
            root_path_row(p, x, i);
        }
    }
    return ATTN_OK;
}

static attn_status softpag_forward(attn_call *call)
{
    const softpag_params *p = call->params;
    int64_t all = attn_dim(call, "B") * attn_dim(call, "H"), n = attn_dim(call, "N");
    int moves = p->u > 0 && n > 0 && attn_dim(call, "M") > 0;
    attn_dense_settings settings = settings_with(p->scale);
    attn_dense_inputs in = {.q = *call->t[Q], .k = *call->t[K], .v = *call->t[V]};
    attn_exec exec = {.threads = call->threads, .arena = call->arena};
    float *lse;
    ATTN_TRY(attn_take_f32(call, all * n, &lse));
    attn_tensor lse_view = attn_tensor_make(lse, ATTN_F32, 3, call->t[Q]->shape);
    if (!moves || needs_attention(call)) {
        ATTN_TRY(attn_dense_forward(&settings, &in, call->t[O], &lse_view, &exec));
    } else if (call->t[HEADS] != NULL) {
        ATTN_TRY(attn_heads_forward(&settings, &in, attn_bool(call->t[HEADS]), 0, call->t[O], NULL, &exec));
    }
    for (int64_t at = 0; at < all && moves; at++) {
        attn_arena_mark mark = attn_arena_get_mark(call->arena);
        head x = head_at(call, at, lse);
        if (is_perturbed(call, at)) {
            ATTN_TRY(perturb_head(call, &x));
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

static void add(float *to, const float *from, int64_t count)
{
    if (to != NULL) {
        attn_tile_kernels_get()->axpy(to, from, count, 1);
    }
}

/* Gradients of ordinary attention, added to grad_q, grad_k, grad_v (each may be NULL). */
static attn_status attend_backward(attn_call *call, const head *x, const float *q, int64_t rows, double scale, const float *grad_o,
                                   float *grad_q, float *grad_k, float *grad_v)
{
    float *part, *o;
    ATTN_TRY(attn_take_f32(call, rows * x->d + x->m * (x->d + x->dv), &part));
    ATTN_TRY(attn_take_f32(call, rows * (x->dv + 1), &o));
    float *part_k = part + rows * x->d, *part_v = part_k + x->m * x->d, *lse = o + rows * x->dv;
    ATTN_TRY(attend(call, x, q, rows, scale, o, lse));
    attn_dense_settings settings = settings_with(scale);
    attn_dense_inputs in = {.q = matrix(q, rows, x->d), .k = matrix(x->k, x->m, x->d), .v = matrix(x->v, x->m, x->dv)};
    attn_tensor o_view = matrix(o, rows, x->dv), g_view = matrix(grad_o, rows, x->dv);
    attn_tensor lse_view = attn_tensor_make(lse, ATTN_F32, 3, (int64_t[]){1, 1, rows});
    attn_tensor to_q = matrix(part, rows, x->d), to_k = matrix(part_k, x->m, x->d), to_v = matrix(part_v, x->m, x->dv);
    attn_dense_gradients gradients = {.q = &to_q, .k = &to_k, .v = &to_v};
    attn_exec exec = {.threads = call->threads, .arena = call->arena};
    ATTN_TRY(attn_dense_backward(&settings, &in, &o_view, &lse_view, &g_view, &gradients, &exec));
    add(grad_q, part, rows * x->d);
    add(grad_k, part_k, x->m * x->d);
    add(grad_v, part_v, x->m * x->dv);
    return ATTN_OK;
}

/* The gradient that goes through the mean of the queries in the range. */
static attn_status query_mean_backward(attn_call *call, const head *x, const head_gradients *g, const int64_t range[2], const float *scaled)
{
    int64_t width = attn_max_i64(x->d, x->dv), rows = range[1] - range[0];
    double *sums = attn_arena_array(call->arena, (size_t)width, sizeof *sums);
    float *q;
    ATTN_TRY(attn_take_f32(call, 3 * width, &q));
    if (sums == NULL) {
        return attn_fail_memory((size_t)width * sizeof *sums);
    }
    float *grad_q = q + width, *grad_o = grad_q + width;
    mean_row(x->q, range[0], range[1], x->d, sums, q);
    mean_row(scaled, range[0], range[1], x->dv, sums, grad_o);
    attn_tile_kernels_get()->scale(grad_o, x->dv, (float)rows);
    memset(grad_q, 0, (size_t)x->d * sizeof *grad_q);
    ATTN_TRY(attend_backward(call, x, q, 1, x->scale, grad_o, grad_q, g->k, g->v));
    attn_tile_kernels_get()->scale(grad_q, x->d, 1 / (float)rows);
    for (int64_t i = range[0]; i < range[1]; i++) {
        add(g->q != NULL ? g->q + i * x->d : NULL, grad_q, x->d);
    }
    return ATTN_OK;
}

/* The gradient that goes through the target map; scaled: u times that of the output. */
static attn_status target_backward(attn_call *call, const head *x, const head_gradients *g, const int64_t range[2], const float *scaled)
{
    const softpag_params *p = call->params;
    int64_t *keys;
    if (p->target == TARGET_QUERY_MEAN) {
        return query_mean_backward(call, x, g, range, scaled);
    }
    if (p->target == TARGET_TEMPERATURE) {
        return attend_backward(call, x, x->q, x->n, x->scale / p->tau, scaled, g->q, g->k, g->v);
    }
    if (g->v == NULL) {
        return ATTN_OK;
    }
    if (p->target == TARGET_IDENTITY) {
        add(g->v, scaled, x->n * x->dv);
    } else if (p->target == TARGET_MAX) { /* the map is constant */
        ATTN_TRY(find_strongest(call, x, &keys));
        for (int64_t i = 0; i < x->n; i++) {
            add(g->v + keys[i] * x->dv, scaled + i * x->dv, x->dv);
        }
    } else {
        double *sums = attn_arena_array(call->arena, (size_t)x->dv, sizeof *sums);
        float *row;
        ATTN_TRY(attn_take_f32(call, x->dv, &row));
        if (sums == NULL) {
            return attn_fail_memory((size_t)x->dv * sizeof *sums);
        }
        mean_row(scaled, 0, x->n, x->dv, sums, row);
        for (int64_t j = 0; j < x->m; j++) {
            attn_tile_kernels_get()->axpy(g->v + j * x->dv, row, x->dv, (float)((double)x->n / (double)x->m));
        }
    }
    return ATTN_OK;
}

/* to = factor * from, for rows inside of a range, and times `outside` for the others. */
static void scale_rows(const head *x, const float *from, const int64_t range[2], double inside, double outside, float *to)
{
    for (int64_t i = 0; i < x->n; i++) {
        float factor = (float)(i >= range[0] && i < range[1] ? inside : outside);
        attn_tile_kernels_get()->load_row(to + i * x->dv, from + i * x->dv, ATTN_F32, x->dv, factor);
    }
}

static attn_status head_backward(attn_call *call, const head *x, double u, const head_gradients *g)
{
    int64_t range[2];
    float *scaled;
    ATTN_TRY(attn_take_f32(call, x->n * x->dv, &scaled));
    moving_rows(call, range);
    if (u < 1 || range[0] > 0 || range[1] < x->n) {
        scale_rows(x, g->o, range, 1 - u, 1, scaled);
        ATTN_TRY(attend_backward(call, x, x->q, x->n, x->scale, scaled, g->q, g->k, g->v));
    }
    scale_rows(x, g->o, range, u, 0, scaled);
    return u > 0 ? target_backward(call, x, g, range, scaled) : ATTN_OK;
}

static float *offset(float *base, int64_t by) { return base != NULL ? base + by : NULL; }

static attn_status softpag_backward(attn_call *call)
{
    const softpag_params *p = call->params;
    int64_t all = attn_dim(call, "B") * attn_dim(call, "H");
    if (p->path != PATH_LINEAR) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "gradients exist for path = linear only");
    }
    if (attn_dim(call, "N") == 0 || attn_dim(call, "M") == 0) {
        return ATTN_OK;
    }
    for (int64_t at = 0; at < all; at++) {
        head x = head_at(call, at, NULL);
        head_gradients g = {attn_f32(call->grad[O]) + at * x.n * x.dv, offset(attn_f32(call->grad[Q]), at * x.n * x.d),
                            offset(attn_f32(call->grad[K]), x.k - attn_f32(call->t[K])),
                            offset(attn_f32(call->grad[V]), x.v - attn_f32(call->t[V]))};
        attn_arena_mark mark = attn_arena_get_mark(call->arena);
        ATTN_TRY(head_backward(call, &x, is_perturbed(call, at) ? p->u : 0, &g));
        attn_arena_release(call->arena, mark);
    }
    return ATTN_OK;
}

/* Sweeps over all scores: with their values (1), without (1/2 at equal widths). */
static attn_status softpag_cost(attn_call *call, attn_cost *cost)
{
    const softpag_params *p = call->params;
    double pairs = (double)attn_dim(call, "B") * (double)attn_dim(call, "N") * (double)attn_dim(call, "M");
    double d = (double)attn_dim(call, "D"), dv = (double)attn_dim(call, "Dv"), scores = 0, values = 0;
    for (int64_t h = 0; h < attn_dim(call, "H"); h++) {
        int known = call->t[HEADS] == NULL || call->t[HEADS]->data != NULL;
        int moves = p->u > 0 && (!known || is_perturbed(call, h)), exact = !moves || needs_attention(call);
        int bent = moves && p->path == PATH_LOG_LINEAR && p->u < 1, warm = moves && p->target == TARGET_TEMPERATURE;
        scores += exact + 2 * bent + warm + (moves && p->target == TARGET_MAX);
        values += exact + bent + warm;
    }
    *cost = (attn_cost){.flops = 2 * pairs * (scores * d + values * dv), .pairs = pairs * scores};
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
    .cost = softpag_cost,
};
