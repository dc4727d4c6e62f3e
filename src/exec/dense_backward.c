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

#define BLOCK_K 384 /* keys of a block at most: the more, the less often queries are read and their gradients added to */
#define LEAST_BLOCK_K 128
#define BLOCK_Q 96 /* a multiple of GROUP */
#define GROUP 24   /* rows or keys that go through a product together; a multiple of the kernels' tile heights */
#define ENOUGH_TASKS 8

typedef struct backward {
    const dense_problem *p;
    const attn_tensor *grad_o;
    const attn_dense_gradients *to;
    int64_t d_pad, block_k, shares;
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

/* What the rows of a query block see of a key block: keys [begin, end) counted from its first one, and the rows [from, to) that see any. */
typedef struct visible_rows {
    int64_t begin[BLOCK_Q], end[BLOCK_Q], from, to;
} visible_rows;

static void find_visible(const dense_problem *p, visible_rows *see, int64_t b, int64_t n0, int64_t rows, int64_t key, int64_t keys)
{
    see->from = see->to = 0;
    for (int64_t r = 0; r < rows; r++) {
        int64_t begin, end;
        attn_dense_visible(p, b, n0 + r, &begin, &end);
        begin = attn_max_i64(begin - key, 0);
        end = attn_min_i64(end - key, keys);
        if (begin < end) {
            see->from = see->to == 0 ? r : see->from;
            see->to = r + 1;
        } else {
            begin = end = 0;
        }
        see->begin[r] = begin;
        see->end[r] = end;
    }
}

/* How many rows from `first` on go through the products together, and the columns [low, high) that any of them sees, rounded to
 * panels and vectors: GROUP rows, and more as long as their columns are the same. */
static int64_t rows_together(const attn_tile_kernels *kernels, const visible_rows *see, int64_t first, int64_t *low, int64_t *high)
{
    int64_t count = 0;
    *low = *high = 0;
    for (int64_t next = first; next < see->to; next += GROUP) {
        int64_t some = attn_min_i64(GROUP, see->to - next), begin = BLOCK_K, end = 0;
        for (int64_t r = next; r < next + some; r++) {
            if (see->begin[r] < see->end[r]) {
                begin = attn_min_i64(begin, see->begin[r]);
                end = attn_max_i64(end, see->end[r]);
            }
        }
        begin = attn_min_i64(begin, end) / kernels->nr * kernels->nr;
        end = attn_ceil_div(end, kernels->vw) * kernels->vw;
        if (count == 0) {
            *low = begin;
            *high = end;
        } else if (begin != *low || end != *high) {
            break;
        }
        count += some;
    }
    return count;
}

/* The same for keys: how many from `first` on, and the rows [low, high) that see any of them. */
static int64_t keys_together(const visible_rows *see, int64_t first, int64_t keys, int64_t *low, int64_t *high)
{
    int64_t count = 0;
    *low = *high = 0;
    for (int64_t next = first; next < keys; next += GROUP) {
        int64_t some = attn_min_i64(GROUP, keys - next), from = see->from, to = see->to;
        while (from < to && (see->begin[from] >= next + some || see->end[from] <= next)) {
            from++;
        }
        while (to > from && (see->begin[to - 1] >= next + some || see->end[to - 1] <= next)) {
            to--;
        }
        if (count == 0) {
            *low = from;
            *high = to;
        } else if (from != *low || to != *high) {
            break;
        }
        count += some;
    }
    return count;
}

/* Probabilities of row r in columns [low, high), from its products with the keys; the soft cap's derivative into x->slope. */
static void probabilities(const backward *w, worker *x, const visible_rows *see, int64_t b, int64_t h, int64_t n0, int64_t r,
                          int64_t key, int64_t low, int64_t high)
{
    const dense_problem *p = w->p;
    const attn_tile_kernels *kernels = p->kernels;
    float *row = x->p + r * BLOCK_K + low, *slope = x->slope + r * BLOCK_K + low;
    int64_t count = high - low;
    if (p->settings.softcap > 0) {
        kernels->softcap(row, count, (float)p->settings.softcap);
        for (int64_t j = 0; j < count; j++) {
            float share = row[j] / (float)p->settings.softcap;
            slope[j] = 1 - share * share;
        }
        kernels->scale(row, count, (float)ATTN_LOG2E);
    }
    if (attn_dense_needs_adjust(p)) {
        attn_dense_shift(p, row, b, h, n0 + r, key + low, count);
    }
    attn_dense_mask_row(row, low, count, see->begin[r], see->end[r]);
    kernels->exp2_row(row, count, w->lse2[(b * p->heads + h) * p->n + n0 + r]);
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

/* P and dS of `some` rows from `first` on, 0 outside columns [low, high). */
static void score_rows(const backward *w, worker *x, const visible_rows *see, int64_t b, int64_t h, int64_t n0, int64_t first,
                       int64_t some, int64_t key, int64_t low, int64_t high, double *slopes)
{
    const dense_problem *p = w->p;
    const attn_tile_kernels *kernels = p->kernels;
    int64_t nr = kernels->nr, count = high - low, at = first * BLOCK_K + low;
    kernels->product(some, count, p->d, x->q + first * w->d_pad, w->d_pad, 1, x->kt + low * p->d, nr, p->d * nr, x->p + at, BLOCK_K, 0);
    kernels->product(some, count, p->dv, x->grad_o + first * p->dv_pad, p->dv_pad, 1, x->vt + low * p->dv, nr, p->dv * nr, x->ds + at,
                     BLOCK_K, 0);
    for (int64_t r = first; r < first + some; r++) {
        float *row = x->p + r * BLOCK_K, *ds = x->ds + r * BLOCK_K;
        probabilities(w, x, see, b, h, n0, r, key, low, high);
        kernels->grad_row(ds + low, row + low, count, w->delta[(b * p->heads + h) * p->n + n0 + r]);
        memset(row, 0, (size_t)low * sizeof *row);
        memset(ds, 0, (size_t)low * sizeof *ds);
        memset(row + high, 0, (size_t)(w->block_k - high) * sizeof *row);
        memset(ds + high, 0, (size_t)(w->block_k - high) * sizeof *ds);
        if (w->to->bias != NULL || slopes != NULL) {
            score_gradients(w, x, b, h, n0, r, key, attn_min_i64(high, p->m - key), slopes);
        }
        for (int64_t j = low; j < high && p->settings.softcap > 0; j++) {
            ds[j] *= x->slope[r * BLOCK_K + j];
        }
    }
}

/* One query block against the loaded key block. Rows see different keys where a mask's edge crosses the block: each product leaves out
 * what none of the rows, or keys, that it takes together needs. */
static void query_block(const backward *w, worker *x, int64_t b, int64_t h, int64_t n0, int64_t rows, int64_t key, int64_t keys,
                        float *grad_q, double *slopes)
{
    const dense_problem *p = w->p;
    const attn_tile_kernels *kernels = p->kernels;
    int64_t nr = kernels->nr, some, low, high;
    visible_rows see;
    find_visible(p, &see, b, n0, rows, key, keys);
    if (see.from >= see.to) {
        return;
    }
    load_rows(p, x->q + see.from * w->d_pad, &p->in->q, b, h, n0 + see.from, see.to - see.from, w->d_pad,
              (float)(p->base2 ? p->scale * ATTN_LOG2E : p->scale));
    load_rows(p, x->grad_o + see.from * p->dv_pad, w->grad_o, b, h, n0 + see.from, see.to - see.from, p->dv_pad, 1);
    for (int64_t r = see.from; r < see.to; r += some) {
        some = rows_together(kernels, &see, r, &low, &high);
        score_rows(w, x, &see, b, h, n0, r, some, key, low, high, slopes);
        if (grad_q != NULL) {
            kernels->product(some, p->d, attn_min_i64(high, keys) - low, x->ds + r * BLOCK_K + low, BLOCK_K, 1, x->k + low * w->d_pad,
                             w->d_pad, nr, grad_q + (n0 + r) * p->d, p->d, 1);
        }
    }
    for (int64_t j = 0; j < keys; j += some) {
        some = keys_together(&see, j, keys, &low, &high);
        int64_t at = low * BLOCK_K + j;
        if (w->to->v != NULL && low < high) {
            kernels->product(some, p->dv_pad, high - low, x->p + at, 1, BLOCK_K, x->grad_o + low * p->dv_pad, p->dv_pad, nr,
                             x->grad_v + j * p->dv_pad, p->dv_pad, 1);
        }
        if (w->to->k != NULL && low < high) {
            kernels->product(some, w->d_pad, high - low, x->ds + at, 1, BLOCK_K, x->q + low * w->d_pad, w->d_pad, nr,
                             x->grad_k + j * w->d_pad, w->d_pad, 1);
        }
    }
}

static void key_block(const backward *w, worker *x, int64_t pair, int64_t share, int64_t key, double *slopes)
{
    const dense_problem *p = w->p;
    int64_t b = pair / p->kv_heads, kv = pair % p->kv_heads, keys = attn_min_i64(w->block_k, p->m - key);
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

/* Blocks of about equal size, and shares of them; returns how many blocks. */
static int64_t share_keys(backward *w, int64_t pairs)
{
    int64_t m = w->p->m, shares = attn_min_i64(attn_ceil_div(ENOUGH_TASKS, pairs), attn_ceil_div(m, LEAST_BLOCK_K));
    int64_t parts = attn_max_i64(1, attn_max_i64(shares, attn_ceil_div(m, BLOCK_K)));
    w->block_k = attn_ceil_div(attn_ceil_div(m, parts), 64) * 64; /* whole panels */
    int64_t blocks = w->block_k > 0 ? attn_ceil_div(m, w->block_k) : 0;
    w->shares = attn_max_i64(1, attn_min_i64(shares, blocks));
    return blocks;
}

static attn_status run(backward *w, const attn_tensor *o, const attn_tensor *lse, attn_arena *arena, int threads)
{
    const dense_problem *p = w->p;
    int64_t pairs = p->batch * p->kv_heads, rows = p->batch * p->heads * p->n;
    int64_t blocks = share_keys(w, pairs);
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
            key_block(w, x, pair, share, block * w->block_k, w->slopes != NULL ? w->slopes + task * p->group : NULL);
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
