/* Exact attention, backward, with recomputed probabilities: for each block of keys, all query blocks that see it. The gradients of a
 * block's keys and values stay in cache meanwhile; those of the queries are added in the order of the key blocks.
 *
 * A task is one key/value head, or a fixed share of its keys when there are few heads; shares then have query gradients of their
 * own, which are added in order. Neither depends on the number of threads.
 */
#include "exec/dense.h"

#include <math.h>
#include <omp.h>
#include <string.h>

#define BLOCK_K 128
#define BLOCK_Q 96 /* a multiple of the kernels' tile heights */
#define ENOUGH_TASKS 8

typedef struct backward {
    const dense_problem *p;
    const attn_tensor *grad_o;
    const attn_dense_gradients *to;
    int64_t d_pad, shares;
    float *lse2, *delta;   /* [B*H*N] */
    float *grad_q;         /* [shares][B,H,N,D] */
    double *slopes;        /* [tasks][group] */
} backward;

typedef struct worker {
    float *q, *grad_o;         /* [BLOCK_Q][d_pad], [BLOCK_Q][dv_pad] */
    float *kt, *k, *vt;        /* packed for the scores, rows times scale, packed for dP */
    float *p, *ds, *slope;     /* [BLOCK_Q][BLOCK_K]; slope: derivative of the soft cap */
    float *grad_k, *grad_v;    /* [BLOCK_K][d_pad], [BLOCK_K][dv_pad] */
    float *rows;
} worker;

/* lse in base 2 (+inf for a row that sees nothing, so that its probabilities are 0) and delta = grad_o . o. */
static void row_constants(const backward *w, const attn_tensor *o, const attn_tensor *lse, int64_t row, float *scratch)
{
    const dense_problem *p = w->p;
    int64_t b = row / (p->heads * p->n), h = row / p->n % p->heads, n = row % p->n;
    float value = ((const float *)lse->data)[b * lse->stride[0] + h * lse->stride[1] + n * lse->stride[2]];
    w->lse2[row] = value == -INFINITY ? INFINITY : (float)((double)value * ATTN_LOG2E);
    attn_dense_load_row(p, scratch, o, b, h, n, p->dv, 1);
    attn_dense_load_row(p, scratch + p->dv, w->grad_o, b, h, n, p->dv, 1);
    double sum = 0;
    for (int64_t c = 0; c < p->dv; c++) {
        sum += (double)scratch[c] * (double)scratch[p->dv + c];
    }
    w->delta[row] = (float)sum;
}

static void load_rows(const dense_problem *p, float *to, const attn_tensor *t, int64_t b, int64_t h, int64_t first, int64_t count,
                      int64_t pad, float factor)
{
    for (int64_t r = 0; r < count; r++, to += pad) {
        attn_dense_load_row(p, to, t, b, h, first + r, t->shape[3], factor);
        memset(to + t->shape[3], 0, (size_t)(pad - t->shape[3]) * sizeof *to);
    }
}

/* Probabilities of rows [from, to) of a query block into x->p; the soft cap's derivative into x->slope. */
static void probabilities(const backward *w, worker *x, int64_t b, int64_t h, int64_t n0, int64_t from, int64_t to, int64_t key,
                          int64_t count)
{
    const dense_problem *p = w->p;
    const attn_tile_kernels *kernels = p->kernels;
    kernels->product(to - from, count, p->d, x->q + from * w->d_pad, w->d_pad, 1, x->kt, kernels->nr, p->d * kernels->nr,
                     x->p + from * BLOCK_K, BLOCK_K, 0);
    for (int64_t r = from; r < to; r++) {
        float *row = x->p + r * BLOCK_K;
        int64_t begin, end;
        if (p->settings.softcap > 0) {
            kernels->softcap(row, count, (float)p->settings.softcap);
            for (int64_t j = 0; j < count; j++) {
                float share = row[j] / (float)p->settings.softcap;
                x->slope[r * BLOCK_K + j] = 1 - share * share;
            }
            kernels->scale(row, count, (float)ATTN_LOG2E);
        }
        if (attn_dense_needs_adjust(p)) {
            attn_dense_shift(p, row, b, h, n0 + r, key, count);
        }
        attn_dense_visible(p, b, n0 + r, &begin, &end);
        attn_dense_mask_row(row, key, count, begin, end);
        kernels->exp2_row(row, count, w->lse2[(b * p->heads + h) * p->n + n0 + r]);
    }
}

/* Sums that only biases and slopes need, from dS before the soft cap's derivative. */
static void score_gradients(const backward *w, worker *x, int64_t b, int64_t h, int64_t n0, int64_t r, int64_t key, int64_t keys,
                            double *slopes)
{
    const dense_problem *p = w->p;
    const float *ds = x->ds + r * BLOCK_K;
    const attn_tensor *bias = w->to->bias;
    if (bias != NULL) {
        float *to = (float *)(void *)(uintptr_t)attn_dense_row(bias, bias->shape[0] == 1 ? 0 : b, bias->shape[1] == 1 ? 0 : h, n0 + r);
        for (int64_t j = 0; j < keys; j++) {
            to[(key + j) * bias->stride[3]] += ds[j];
        }
    }
    if (slopes != NULL) {
        int64_t i = n0 + r + (p->m - p->n);
        double sum = 0;
        for (int64_t j = 0; j < keys; j++) {
            sum -= fabs((double)(i - (key + j))) * (double)ds[j];
        }
        *slopes += sum;
    }
}

/* One query block against the loaded key block. */
static void query_block(const backward *w, worker *x, int64_t b, int64_t h, int64_t n0, int64_t rows, int64_t key, int64_t keys,
                        float *grad_q, double *slopes)
{
    const dense_problem *p = w->p;
    const attn_tile_kernels *kernels = p->kernels;
    int64_t from = rows, to = 0, nr = kernels->nr, count = attn_ceil_div(keys, nr) * nr;
    for (int64_t r = 0; r < rows; r++) {
        int64_t begin, end;
        attn_dense_visible(p, b, n0 + r, &begin, &end);
        if (begin < end && begin < key + keys && end > key) {
            from = attn_min_i64(from, r);
            to = r + 1;
        }
    }
    if (from >= to) {
        return;
    }
    int64_t some = to - from;
    load_rows(p, x->q + from * w->d_pad, &p->in->q, b, h, n0 + from, some, w->d_pad,
              (float)(p->base2 ? p->scale * ATTN_LOG2E : p->scale));
    load_rows(p, x->grad_o + from * p->dv_pad, w->grad_o, b, h, n0 + from, some, p->dv_pad, 1);
    probabilities(w, x, b, h, n0, from, to, key, count);
    kernels->product(some, count, p->dv, x->grad_o + from * p->dv_pad, p->dv_pad, 1, x->vt, nr, p->dv * nr, x->ds + from * BLOCK_K,
                     BLOCK_K, 0);
    for (int64_t r = from; r < to; r++) {
        kernels->grad_row(x->ds + r * BLOCK_K, x->p + r * BLOCK_K, count, w->delta[(b * p->heads + h) * p->n + n0 + r]);
        if (w->to->bias != NULL || slopes != NULL) {
            score_gradients(w, x, b, h, n0, r, key, keys, slopes);
        }
        for (int64_t j = 0; j < count && p->settings.softcap > 0; j++) {
            x->ds[r * BLOCK_K + j] *= x->slope[r * BLOCK_K + j];
        }
    }
    if (w->to->v != NULL) {
        kernels->product(keys, p->dv_pad, some, x->p + from * BLOCK_K, 1, BLOCK_K, x->grad_o + from * p->dv_pad, p->dv_pad, nr,
                         x->grad_v, p->dv_pad, 1);
    }
    if (w->to->k != NULL) {
        kernels->product(keys, w->d_pad, some, x->ds + from * BLOCK_K, 1, BLOCK_K, x->q + from * w->d_pad, w->d_pad, nr, x->grad_k,
                         w->d_pad, 1);
    }
    if (grad_q != NULL) {
        kernels->product(some, p->d, keys, x->ds + from * BLOCK_K, BLOCK_K, 1, x->k, w->d_pad, nr, grad_q + (n0 + from) * p->d, p->d,
                         1);
    }
}

static void key_block(const backward *w, worker *x, int64_t pair, int64_t share, int64_t key, double *slopes)
{
    const dense_problem *p = w->p;
    int64_t b = pair / p->kv_heads, kv = pair % p->kv_heads, keys = attn_min_i64(BLOCK_K, p->m - key);
    attn_dense_pack_transposed(p, x->kt, p->kernels->nr, &p->in->k, NULL, b, kv, key, keys, x->rows);
    attn_dense_pack_transposed(p, x->vt, p->kernels->nr, &p->in->v, NULL, b, kv, key, keys, x->rows);
    load_rows(p, x->k, &p->in->k, b, kv, key, keys, w->d_pad, (float)p->scale);
    memset(x->grad_k, 0, (size_t)(keys * w->d_pad) * sizeof(float));
    memset(x->grad_v, 0, (size_t)(keys * p->dv_pad) * sizeof(float));
    for (int64_t g = 0; g < p->group; g++) {
        int64_t h = kv * p->group + g, head = b * p->heads + h;
        float *grad_q = w->grad_q != NULL ? w->grad_q + (share * p->batch * p->heads + head) * p->n * p->d : NULL;
        for (int64_t n0 = 0; n0 < p->n; n0 += BLOCK_Q) {
            query_block(w, x, b, h, n0, attn_min_i64(BLOCK_Q, p->n - n0), key, keys, grad_q, slopes != NULL ? slopes + g : NULL);
        }
    }
    for (int64_t j = 0; j < keys; j++) {
        if (w->to->k != NULL) {
            /* q was scaled for scores in base 2 */
            p->kernels->scale(x->grad_k + j * w->d_pad, p->d, p->base2 ? (float)ATTN_LN2 : 1.0f);
            attn_dense_store_row(w->to->k, b, kv, key + j, x->grad_k + j * w->d_pad, p->d);
        }
        if (w->to->v != NULL) {
            attn_dense_store_row(w->to->v, b, kv, key + j, x->grad_v + j * p->dv_pad, p->dv);
        }
    }
}

static attn_status workers_create(const backward *w, worker **workers, int threads, attn_arena *arena)
{
    const dense_problem *p = w->p;
    int64_t sizes[] = {BLOCK_Q * w->d_pad,   BLOCK_Q * p->dv_pad, BLOCK_K * p->d,       BLOCK_K * w->d_pad,
                       BLOCK_K * p->dv,      BLOCK_Q * BLOCK_K,   BLOCK_Q * BLOCK_K,    BLOCK_Q * BLOCK_K,
                       BLOCK_K * w->d_pad,   BLOCK_K * p->dv_pad, 16 * attn_max_i64(p->d, p->dv)};
    *workers = attn_arena_array(arena, (size_t)threads, sizeof **workers);
    for (int t = 0; t < threads && *workers != NULL; t++) {
        worker *x = &(*workers)[t];
        float **parts[] = {&x->q, &x->grad_o, &x->kt, &x->k, &x->vt, &x->p, &x->ds, &x->slope, &x->grad_k, &x->grad_v, &x->rows};
        for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
            *parts[i] = attn_arena_array(arena, (size_t)sizes[i], sizeof(float));
            if (*parts[i] == NULL) {
                return attn_fail_memory((size_t)sizes[i] * sizeof(float));
            }
        }
    }
    return *workers != NULL ? ATTN_OK : attn_fail_memory((size_t)threads * sizeof **workers);
}

/* grad_sinks[h] = - sum over batch and rows of p_sink * delta */
static void sink_gradients(const backward *w)
{
    const dense_problem *p = w->p;
    const attn_tensor *to = w->to->sinks, *sinks = p->in->sinks;
    for (int64_t h = 0; h < p->heads; h++) {
        double sum = 0, sink = (double)((const float *)sinks->data)[h * sinks->stride[0]];
        for (int64_t b = 0; b < p->batch; b++) {
            for (int64_t n = 0; n < p->n; n++) {
                int64_t row = (b * p->heads + h) * p->n + n;
                sum -= exp2(sink * ATTN_LOG2E - (double)w->lse2[row]) * (double)w->delta[row];
            }
        }
        ((float *)to->data)[h * to->stride[0]] = (float)sum;
    }
}

static void slope_gradients(const backward *w)
{
    const dense_problem *p = w->p;
    const attn_tensor *to = w->to->slopes;
    for (int64_t h = 0; h < p->heads; h++) {
        double sum = 0;
        for (int64_t b = 0; b < p->batch; b++) {
            for (int64_t share = 0; share < w->shares; share++) {
                int64_t task = (b * p->kv_heads + h / p->group) * w->shares + share;
                sum += w->slopes[task * p->group + h % p->group];
            }
        }
        ((float *)to->data)[h * to->stride[0]] = (float)sum;
    }
}

static void clear(const attn_tensor *t)
{
    for (int64_t b = 0; b < t->shape[0]; b++) {
        for (int64_t h = 0; h < t->shape[1]; h++) {
            for (int64_t n = 0; n < t->shape[2]; n++) {
                float *row = (float *)(void *)(uintptr_t)attn_dense_row(t, b, h, n);
                for (int64_t c = 0; c < t->shape[3]; c++) {
                    row[c * t->stride[3]] = 0;
                }
            }
        }
    }
}

static attn_status run(backward *w, const attn_tensor *o, const attn_tensor *lse, attn_arena *arena, int threads)
{
    const dense_problem *p = w->p;
    int64_t pairs = p->batch * p->kv_heads, rows = p->batch * p->heads * p->n, blocks = attn_ceil_div(p->m, BLOCK_K);
    w->shares = pairs >= ENOUGH_TASKS ? 1 : attn_max_i64(1, attn_min_i64(blocks, attn_ceil_div(ENOUGH_TASKS, pairs)));
    w->d_pad = attn_ceil_div(p->d, p->kernels->vw) * p->kernels->vw;
    int64_t tasks = pairs * w->shares, per_share = attn_ceil_div(blocks, w->shares);
    w->lse2 = attn_arena_array(arena, (size_t)rows, 2 * sizeof(float));
    w->grad_q = w->to->q != NULL ? attn_arena_array(arena, (size_t)(rows * w->shares), (size_t)p->d * sizeof(float)) : NULL;
    w->slopes = w->to->slopes != NULL ? attn_arena_array(arena, (size_t)(tasks * p->group), sizeof(double)) : NULL;
    if (w->lse2 == NULL || (w->to->q != NULL && w->grad_q == NULL) || (w->to->slopes != NULL && w->slopes == NULL)) {
        return attn_fail_memory((size_t)(rows * w->shares * p->d) * sizeof(float));
    }
    w->delta = w->lse2 + rows;
    if (w->slopes != NULL) {
        memset(w->slopes, 0, (size_t)(tasks * p->group) * sizeof(double));
    }
    if (w->to->bias != NULL) {
        clear(w->to->bias);
    }
    worker *workers;
    ATTN_TRY(workers_create(w, &workers, threads, arena));
    /* Heads or batch items that share a bias add to the same gradient: one after the other then. */
    const attn_tensor *bias = w->to->bias;
    int shared_bias = bias != NULL && ((bias->shape[0] == 1 && p->batch > 1) || (bias->shape[1] == 1 && p->heads > 1));
    int main_threads = shared_bias ? 1 : threads;
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        row_constants(w, o, lse, row, workers[omp_get_thread_num()].p);
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(main_threads)
    for (int64_t task = 0; task < tasks; task++) {
        int64_t pair = task / w->shares, share = task % w->shares;
        worker *x = &workers[omp_get_thread_num()];
        for (int64_t g = 0; g < p->group && w->grad_q != NULL; g++) {
            int64_t head = pair / p->kv_heads * p->heads + pair % p->kv_heads * p->group + g;
            memset(w->grad_q + (share * p->batch * p->heads + head) * p->n * p->d, 0, (size_t)(p->n * p->d) * sizeof(float));
        }
        for (int64_t block = share * per_share; block < attn_min_i64(blocks, (share + 1) * per_share); block++) {
            key_block(w, x, pair, share, block * BLOCK_K, w->slopes != NULL ? w->slopes + task * p->group : NULL);
        }
    }
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < (w->to->q != NULL ? rows : 0); row++) {
        float *sum = w->grad_q + row * p->d;
        for (int64_t share = 1; share < w->shares; share++) {
            p->kernels->axpy(sum, w->grad_q + (share * rows + row) * p->d, p->d, 1);
        }
        attn_dense_store_row(w->to->q, row / (p->heads * p->n), row / p->n % p->heads, row % p->n, sum, p->d);
    }
    if (w->to->slopes != NULL) {
        slope_gradients(w);
    }
    if (w->to->sinks != NULL) {
        sink_gradients(w);
    }
    return ATTN_OK;
}

static attn_status check_gradient(const char *name, const char *what, const attn_tensor *gradient, const attn_tensor *input)
{
    if (gradient == NULL) {
        return ATTN_OK;
    }
    if (input == NULL) {
        return attn_fail(ATTN_ERR_ARGUMENT, "%s: there is no such input", name);
    }
    return attn_dense_check_f32(name, gradient, what, input->ndim, input->shape);
}

attn_status attn_dense_backward(const attn_dense_settings *settings, const attn_dense_inputs *inputs, const attn_tensor *o,
                                const attn_tensor *lse, const attn_tensor *grad_o, const attn_dense_gradients *gradients,
                                const attn_exec *exec)
{
    dense_problem p;
    attn_scratch scratch;
    ATTN_TRY(attn_dense_check(&p, settings, inputs));
    const int64_t o_shape[] = {p.batch, p.heads, p.n, p.dv};
    ATTN_TRY(attn_dense_check_tensor("o", o, "[B,H,N,Dv]", 4, o_shape, 1));
    ATTN_TRY(attn_dense_check_f32("lse", lse, "[B,H,N]", 3, o_shape));
    ATTN_TRY(attn_dense_check_tensor("grad_o", grad_o, "[B,H,N,Dv]", 4, o_shape, 1));
    ATTN_TRY(check_gradient("grad_q", "[B,H,N,D]", gradients->q, &inputs->q));
    ATTN_TRY(check_gradient("grad_k", "[B,Hkv,M,D]", gradients->k, &inputs->k));
    ATTN_TRY(check_gradient("grad_v", "[B,Hkv,M,Dv]", gradients->v, &inputs->v));
    ATTN_TRY(check_gradient("grad_bias", "the shape of bias", gradients->bias, inputs->bias));
    ATTN_TRY(check_gradient("grad_slopes", "[H]", gradients->slopes, inputs->slopes));
    ATTN_TRY(check_gradient("grad_sinks", "[H]", gradients->sinks, inputs->sinks));
    if (inputs->k.dtype == ATTN_I8 || inputs->v.dtype == ATTN_I8) {
        return attn_fail(ATTN_ERR_DTYPE, "int8 keys and values have no gradients");
    }
    ATTN_TRY(attn_scratch_begin(&scratch, exec));
    backward w = {.p = &p, .grad_o = grad_o, .to = gradients};
    attn_status status = ATTN_OK;
    if (p.batch * p.kv_heads > 0) {
        status = run(&w, o, lse, scratch.arena, attn_exec_threads(exec));
    }
    attn_scratch_end(&scratch);
    return status;
}
