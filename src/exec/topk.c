/* Attention to the largest scores of each query. A task computes all scores of a few rows, finds each row's limit (guessed from a sample,
 * then exactly among what passes), and attends to what is kept: by fetching the listed values where they are few, or by a whole product with
 * zeros elsewhere where they are many.
 *
 * float32 scores that lie closer together than their rounding errors are computed again in double, so that the choice is that of exact
 * arithmetic; so are sums of probabilities that vanish in float32. */
#include "exec/topk.h"
#include "exec/dense.h"
#include "kernel/select.h"

#include <float.h>
#include <omp.h>
#include <string.h>

#define STRIP 393216         /* scores that a task holds, about */
#define MOST_ROWS 48         /* rows of a task where keys are few */
#define VALUES_STEP 512      /* keys of a step of the product with values, so that they are in cache for all rows */
#define GATHER_COST 3        /* how much more a listed value costs than one of a whole product */
#define SAMPLE 512           /* scores that the first guess is made of, in runs of 4 */
#define DECODE_PART 1024     /* keys of a task when there are few rows */
#define DECODE_SCORES 16777216 /* scores held at a time then */
#define VANISHING 1e-30f     /* sums of float32 probabilities below this have lost digits */

typedef struct topk {
    const dense_problem *p;
    const attn_select_kernels *select;
    int64_t top_k, stack; /* stack: query heads of a list */
    int shared;
    int64_t *indices; /* NULL: not wanted */
    const attn_tensor *o, *lse;
    int64_t rows, queries, ld; /* rows and queries of a task; distance of two rows of scores */
    float *k, *v;              /* packed [B*Hkv][m_pad * D] and [B*Hkv][M][dv_pad]; NULL: read as they lie */
    int64_t m_pad;
} topk;

typedef struct worker {
    float *s, *q, *o, *m, *l; /* rows */
    float *sums, *part;       /* [ld] */
    float *values;            /* [ld] candidates, then what is kept */
    int32_t *at, *places;     /* [ld] */
    double *exact, *copy;     /* [M] */
    double *lse;              /* of each head of a list, in base e */
    float *row, *pack;        /* [max(D, Dv)]; DENSE_PACK_ROWS of them */
} worker;

/* The rows of one choice: query n of heads h0 ..., whose scores are s, s + step, ... */
typedef struct list {
    int64_t b, h0, n, count; /* count: visible keys */
    float *s, *q;
    int64_t step, q_step;
} list;

static int64_t visible(const dense_problem *p, int64_t n)
{
    return p->settings.causal ? attn_max_i64(0, attn_min_i64(p->m, n + p->m - p->n + 1)) : p->m;
}

/* ---- Exact choices among few ---- */

/* The k-th largest of count numbers (1 <= k <= count, no NaN), which are reordered. */
static double kth_largest(double *x, int64_t count, int64_t k)
{
    int64_t low = 0, high = count - 1, want = k - 1;
    while (low < high) {
        double pivot = x[low + (high - low) / 2];
        int64_t i = low, j = high;
        while (i <= j) {
            while (x[i] > pivot) {
                i++;
            }
            while (x[j] < pivot) {
                j--;
            }
            if (i <= j) {
                double swap = x[i];
                x[i++] = x[j];
                x[j--] = swap;
            }
        }
        if (want <= j) {
            high = j;
        } else if (want >= i) {
            low = i;
        } else {
            break;
        }
    }
    return x[want];
}

/* Places of the k largest of x, ascending, ties to the lower one; returns how many. copy: scratch of count. *limit: the least kept. */
static int64_t keep_largest(const double *x, int64_t count, int64_t k, double *copy, int32_t *kept, double *limit)
{
    int64_t used = 0, ties = k;
    *limit = -INFINITY;
    if (count > k) {
        memcpy(copy, x, (size_t)count * sizeof *copy);
        *limit = kth_largest(copy, count, k);
        for (int64_t j = 0; j < count; j++) {
            ties -= x[j] > *limit;
        }
    }
    for (int64_t j = 0; j < count; j++) {
        if (x[j] > *limit || count <= k || (x[j] == *limit && ties-- > 0)) {
            kept[used++] = (int32_t)j;
        }
    }
    return used;
}

static double number(double x) { return isnan(x) ? -INFINITY : x; }

static double dot_exact(const float *a, const float *b, int64_t count)
{
    double sum = 0;
    for (int64_t c = 0; c < count; c++) {
        sum += (double)a[c] * (double)b[c];
    }
    return sum;
}

/* What the choice goes by, for key j, in double. */
static double exact_value(const topk *t, worker *w, const list *g, int64_t j)
{
    const dense_problem *p = t->p;
    double sum = 0;
    float *k = w->row, *q = w->row + p->d;
    attn_dense_load_row(p, k, &p->in->k, g->b, g->h0 / p->group, j, p->d, 1);
    for (int64_t i = 0; i < t->stack; i++) {
        attn_dense_load_row(p, q, &p->in->q, g->b, g->h0 + i, g->n, p->d, 1);
        double s = p->scale * dot_exact(q, k, p->d);
        sum = t->shared ? sum + exp(s - w->lse[i]) : s;
    }
    return number(sum);
}

/* ---- The choice ---- */

/* The probabilities of a list's heads summed over the heads, into w->sums. */
static void sum_heads(const topk *t, worker *w, const list *g)
{
    const attn_tile_kernels *kernels = t->p->kernels;
    int64_t padded = attn_ceil_div(g->count, kernels->vw) * kernels->vw;
    memset(w->sums, 0, (size_t)g->count * sizeof *w->sums);
    for (int64_t i = 0; i < t->stack; i++) {
        float m = -INFINITY, l = 0, alpha;
        memcpy(w->part, g->s + i * g->step, (size_t)g->count * sizeof *w->part);
        attn_dense_mask_row(w->part, 0, padded, 0, g->count);
        kernels->softmax(1, w->part, padded, padded, &m, &l, &alpha);
        w->lse[i] = ((double)m + log2((double)l)) * ATTN_LN2;
        kernels->axpy(w->sums, w->part, g->count, attn_softmax_inverse(l));
    }
}

/* A number that a few more than k of x are likely not below. */
static float guess_limit(const topk *t, worker *w, const float *x, int64_t count, int64_t k)
{
    if (count < 2 * SAMPLE || k > count / 2) {
        return -INFINITY;
    }
    for (int64_t i = 0; i < SAMPLE / 4; i++) {
        memcpy(w->values + 4 * i, x + count / (SAMPLE / 4) * i, 4 * sizeof *x);
    }
    int64_t numbers = t->select->compress(w->values, SAMPLE, -INFINITY, NULL, w->values, w->at);
    double share = (double)k / (double)count * (double)SAMPLE;
    int64_t rank = (int64_t)(share + 3 * sqrt(share)) + 4;
    return rank < numbers ? t->select->kth(w->values, numbers, rank) : -INFINITY;
}

/* How far apart two values near that of key j must be for float32 to have told them apart. */
static float uncertainty(const topk *t, worker *w, const list *g, int64_t j, float value)
{
    const dense_problem *p = t->p;
    double most = 0;
    attn_dense_load_row(p, w->row, &p->in->k, g->b, g->h0 / p->group, j, p->d, 1);
    for (int64_t i = 0; i < t->stack; i++) {
        const float *q = g->q + i * g->q_step;
        most = fmax(most, (double)p->kernels->dot(q, q, p->d));
    }
    double error = 2 * (double)FLT_EPSILON * sqrt((double)p->d * most * (double)p->kernels->dot(w->row, w->row, p->d));
    if (t->shared) {
        error = (double)value * fmin(0.5, ATTN_LN2 * error + 4 * (double)FLT_EPSILON);
    }
    return error < (double)INFINITY ? (float)error : 0;
}

/* Of n candidates, those above `high` and the best of those from `low` to `high`, k in all. */
static void settle(const topk *t, worker *w, const list *g, int64_t n, int64_t k, float low, float high)
{
    int64_t inside = 0, above = 0, kept = 0, best = 0;
    double limit;
    for (int64_t i = 0; i < n; i++) {
        if (w->values[i] > high) {
            above++;
        } else if (w->values[i] >= low) {
            w->exact[inside++] = exact_value(t, w, g, w->at[i]);
        }
    }
    int64_t chosen = keep_largest(w->exact, inside, k - above, w->copy, w->places, &limit);
    inside = 0;
    for (int64_t i = 0; i < n; i++) {
        if (w->values[i] > high) {
            w->at[kept++] = w->at[i];
        } else if (w->values[i] >= low) {
            if (best < chosen && w->places[best] == inside) {
                w->at[kept++] = w->at[i];
                best++;
            }
            inside++;
        }
    }
}

/* Where float32 has no digits left: all values in double, from the scores. */
static void choose_vanishing(const topk *t, worker *w, const list *g)
{
    double limit;
    for (int64_t j = 0; j < g->count; j++) {
        double sum = 0;
        for (int64_t i = 0; i < t->stack; i++) {
            sum += exp((double)g->s[i * g->step + j] * ATTN_LN2 - w->lse[i]);
        }
        w->exact[j] = number(sum);
    }
    keep_largest(w->exact, g->count, t->top_k, w->copy, w->at, &limit);
}

/* The places that are kept, ascending, into w->at; returns how many. */
static int64_t choose(const topk *t, worker *w, const list *g)
{
    const attn_select_kernels *select = t->select;
    int64_t k = attn_min_i64(t->top_k, g->count), n;
    if (t->shared && k < g->count) {
        sum_heads(t, w, g);
    }
    int32_t *at = w->at;
    if (k == g->count) {
        for (int64_t j = 0; j < k; j++) {
            at[j] = (int32_t)j;
        }
        return k;
    }
    const float *x = t->shared ? w->sums : g->s;
    float limit = guess_limit(t, w, x, g->count, k);
    n = select->compress(x, g->count, limit, NULL, w->values, w->at);
    if (n < k && limit > -INFINITY) {
        limit = -INFINITY;
        n = select->compress(x, g->count, limit, NULL, w->values, w->at);
    }
    if (n < k) { /* the rest is no number */
        int64_t spare = k - n;
        n = 0;
        for (int64_t j = 0; j < g->count; j++) {
            if (!isnan(x[j]) || spare-- > 0) {
                w->at[n++] = (int32_t)j;
            }
        }
        return n;
    }
    float least = select->kth(w->values, n, k);
    if (t->shared && least < VANISHING) {
        choose_vanishing(t, w, g);
        return k;
    }
    int64_t place = 0;
    while (w->values[place] != least) {
        place++;
    }
    float error = uncertainty(t, w, g, w->at[place], least), low = least - error, high = least + error;
    if (low < limit) {
        n = select->compress(x, g->count, low, NULL, w->values, w->at);
    }
    int64_t passing = select->compress(w->values, n, low, w->at, w->values, w->at);
    if (passing > k) {
        settle(t, w, g, passing, k, low, high);
    }
    return k;
}

/* ---- Attention to what is kept ---- */

/* Whether the values are multiplied whole, with zeros where nothing is kept. */
static int whole_product(const topk *t, int64_t count) { return t->k != NULL && t->top_k >= count / GATHER_COST; }

/* One row's softmax over its kept scores: 2^(s - m) into w->values. */
static void kept_softmax(const topk *t, worker *w, const float *s, int64_t kept, float *m, float *l)
{
    const attn_tile_kernels *kernels = t->p->kernels;
    int64_t padded = attn_ceil_div(kept, kernels->vw) * kernels->vw;
    float alpha, *values = w->values;
    const int32_t *at = w->at;
    for (int64_t i = 0; i < kept; i++) {
        values[i] = s[at[i]];
    }
    for (int64_t i = kept; i < padded; i++) {
        values[i] = -INFINITY;
    }
    *m = -INFINITY;
    *l = 0;
    if (kept > 0) {
        kernels->softmax(1, w->values, padded, padded, m, l, &alpha);
    }
}

/* Chooses for a list and attends: at once, or, with `whole`, by leaving probabilities in the rows of scores. */
static void run_list(const topk *t, worker *w, const list *g, int64_t row, int whole, int64_t columns)
{
    const dense_problem *p = t->p;
    int64_t kept = choose(t, w, g), lists = p->heads / t->stack;
    for (int64_t i = 0; i < (t->indices != NULL ? t->top_k : 0); i++) {
        t->indices[((g->b * lists + g->h0 / t->stack) * p->n + g->n) * t->top_k + i] = i < kept ? w->at[i] : -1;
    }
    int64_t kv = g->h0 / p->group;
    for (int64_t i = 0; i < t->stack && t->o != NULL; i++) {
        float *s = g->s + i * g->step;
        kept_softmax(t, w, s, kept, &w->m[row + i], &w->l[row + i]);
        if (whole) {
            memset(s, 0, (size_t)columns * sizeof *s);
            const int32_t *at = w->at;
            const float *values = w->values;
            for (int64_t j = 0; j < kept; j++) {
                s[at[j]] = values[j];
            }
            continue;
        }
        const attn_tensor *v = &p->in->v;
        if (t->v != NULL) {
            t->select->gather_values(w->o, w->values, w->at, kept, t->v + (g->b * p->kv_heads + kv) * p->m * p->dv_pad, ATTN_F32, p->dv_pad,
                                      p->dv);
        } else {
            t->select->gather_values(w->o, w->values, w->at, kept, attn_dense_row(v, g->b, kv, 0), v->dtype, v->stride[2], p->dv);
        }
        attn_dense_finish_row(p, t->o, t->lse, g->b, g->h0 + i, g->n, w->o, w->m[row + i], w->l[row + i]);
    }
}

/* Scores of the queries n ... n + queries - 1 of heads h0 ... h0 + stack - 1, query by query, against `columns` keys. */
static void score_rows(const topk *t, worker *w, int64_t b, int64_t h0, int64_t n, int64_t queries, int64_t columns)
{
    const dense_problem *p = t->p;
    int64_t rows = queries * t->stack, nr = p->kernels->nr, pair = b * p->kv_heads + h0 / p->group;
    for (int64_t r = 0; r < rows; r++) {
        attn_dense_load_row(p, w->q + r * p->d, &p->in->q, b, h0 + r % t->stack, n + r / t->stack, p->d, (float)(p->scale * ATTN_LOG2E));
    }
    p->kernels->product(rows, columns, p->d, w->q, p->d, 1, t->k + pair * t->m_pad * p->d, nr, p->d * nr, w->s, t->ld, 0);
}

static void run_rows(const topk *t, worker *w, int64_t b, int64_t h0, int64_t n)
{
    const dense_problem *p = t->p;
    int64_t queries = attn_min_i64(t->queries, p->n - n), rows = queries * t->stack, count = visible(p, n + queries - 1);
    int64_t columns = attn_ceil_div(count, p->kernels->vw) * p->kernels->vw, kv = h0 / p->group;
    int whole = whole_product(t, count);
    score_rows(t, w, b, h0, n, queries, columns);
    for (int64_t i = 0; i < queries; i++) {
        list g = {.b = b, .h0 = h0, .n = n + i, .count = visible(p, n + i), .s = w->s + i * t->stack * t->ld, .step = t->ld,
                  .q = w->q + i * t->stack * p->d, .q_step = p->d};
        run_list(t, w, &g, i * t->stack, whole, columns);
    }
    if (!whole || t->o == NULL) {
        return;
    }
    const float *v = t->v != NULL ? t->v + (b * p->kv_heads + kv) * p->m * p->dv_pad
                                  : (const float *)(const void *)attn_dense_row(&p->in->v, b, kv, 0);
    int64_t ldv = t->v != NULL ? p->dv_pad : p->in->v.stride[2];
    memset(w->o, 0, (size_t)(rows * p->dv_pad) * sizeof *w->o);
    for (int64_t j = 0; j < count; j += VALUES_STEP) {
        p->kernels->product(rows, p->dv_pad, attn_min_i64(VALUES_STEP, count - j), w->s + j, t->ld, 1, v + j * ldv, ldv, p->kernels->nr, w->o,
                            p->dv_pad, 1);
    }
    for (int64_t r = 0; r < rows; r++) {
        attn_dense_finish_row(p, t->o, t->lse, b, h0 + r % t->stack, n + r / t->stack, w->o + r * p->dv_pad, w->m[r], w->l[r]);
    }
}

static attn_status workers_create(const topk *t, worker **workers, int64_t score_rows, int threads, attn_arena *arena)
{
    const dense_problem *p = t->p;
    worker *made = attn_arena_array(arena, (size_t)threads, sizeof *made);
    for (int i = 0; i < threads && made != NULL; i++) {
        worker *w = &made[i];
        size_t room = (size_t)t->ld;
        w->s = attn_arena_array(arena, (size_t)(score_rows * t->ld) + 1, sizeof(float));
        w->q = attn_arena_array(arena, (size_t)t->rows, (size_t)p->d * sizeof(float));
        w->o = attn_arena_array(arena, (size_t)t->rows, (size_t)p->dv_pad * sizeof(float));
        w->m = attn_arena_array(arena, (size_t)t->rows, 2 * sizeof(float));
        w->sums = attn_arena_array(arena, room, 3 * sizeof(float));
        w->at = attn_arena_array(arena, room, 2 * sizeof(int32_t));
        w->exact = attn_arena_array(arena, room, 2 * sizeof(double));
        w->lse = attn_arena_array(arena, (size_t)t->stack, sizeof(double));
        w->row = attn_arena_array(arena, 2, (size_t)attn_max_i64(p->d, p->dv) * sizeof(float));
        w->pack = attn_arena_array(arena, DENSE_PACK_ROWS, (size_t)attn_max_i64(p->d, p->dv) * sizeof(float));
        if (w->s == NULL || w->q == NULL || w->o == NULL || w->m == NULL || w->sums == NULL || w->at == NULL || w->exact == NULL ||
            w->lse == NULL || w->row == NULL || w->pack == NULL) {
            made = NULL;
            break;
        }
        w->l = w->m + t->rows;
        w->part = w->sums + room;
        w->values = w->part + room;
        w->places = w->at + room;
        w->copy = w->exact + room;
    }
    *workers = made;
    return made != NULL ? ATTN_OK : attn_fail_memory((size_t)threads * (size_t)(score_rows * t->ld) * sizeof(float));
}

/* Keys, and values where they cannot be read as they lie, packed. */
static attn_status pack(topk *t, const worker *workers, int values, int threads, attn_arena *arena)
{
    const dense_problem *p = t->p;
    int64_t pairs = p->batch * p->kv_heads, chunks = attn_ceil_div(p->m, DENSE_BLOCK_K);
    int copied = values && !attn_dense_values_as_they_lie(p);
    t->k = attn_arena_array(arena, (size_t)(pairs * t->m_pad), (size_t)p->d * sizeof(float));
    t->v = copied ? attn_arena_array(arena, (size_t)(pairs * p->m), (size_t)p->dv_pad * sizeof(float)) : NULL;
    if (t->k == NULL || (copied && t->v == NULL)) {
        return attn_fail_memory((size_t)(pairs * t->m_pad * (p->d + p->dv)) * sizeof(float));
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < pairs * chunks; i++) {
        int64_t pair = i / chunks, b = pair / p->kv_heads, kv = pair % p->kv_heads, first = i % chunks * DENSE_BLOCK_K;
        int64_t count = attn_min_i64(DENSE_BLOCK_K, p->m - first);
        attn_dense_pack_transposed(p, t->k + (pair * t->m_pad + first) * p->d, p->kernels->nr, &p->in->k, NULL, b, kv, first, count,
                                   workers[omp_get_thread_num()].pack);
        if (copied) {
            attn_dense_pack_rows(p, t->v + (pair * p->m + first) * p->dv_pad, &p->in->v, NULL, b, kv, first, count, p->dv_pad);
        }
    }
    return ATTN_OK;
}

/* Many rows. */
static attn_status run_tiled(topk *t, attn_arena *arena, int threads)
{
    const dense_problem *p = t->p;
    worker *workers;
    ATTN_TRY(workers_create(t, &workers, t->rows, threads, arena));
    ATTN_TRY(pack(t, workers, t->o != NULL, threads, arena));
    int64_t units = p->batch * (p->heads / t->stack), chunks = attn_ceil_div(p->n, t->queries);
    /* Head by head, so that its keys and values stay in the caches; late chunks first: under causality they are the long ones. */
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < units * chunks; i++) {
        int64_t unit = i / chunks, per = p->heads / t->stack;
        run_rows(t, &workers[omp_get_thread_num()], unit / per, unit % per * t->stack, (chunks - 1 - i % chunks) * t->queries);
    }
    return ATTN_OK;
}

/* Few rows over many keys: these are read once, as they lie, by all rows of their key/value head. */
static attn_status run_decode(topk *t, attn_arena *arena, int threads)
{
    const dense_problem *p = t->p;
    int64_t rows = p->group * p->n, pairs = p->batch * p->kv_heads, parts = attn_ceil_div(p->m, DECODE_PART);
    int64_t together = attn_max_i64(1, attn_min_i64(pairs, DECODE_SCORES / (rows * t->ld))), lists = rows / t->stack;
    worker *workers;
    ATTN_TRY(workers_create(t, &workers, 0, threads, arena));
    float *scores = attn_arena_array(arena, (size_t)(together * rows), (size_t)t->ld * sizeof(float));
    float *q = attn_arena_array(arena, (size_t)(together * rows), (size_t)p->d * sizeof(float));
    if (scores == NULL || q == NULL) {
        return attn_fail_memory((size_t)(together * rows * t->ld) * sizeof(float));
    }
    const attn_tensor *k = &p->in->k;
#pragma omp parallel num_threads(threads)
    for (int64_t first = 0; first < pairs; first += together) {
        int64_t some = attn_min_i64(together, pairs - first);
        worker *w = &workers[omp_get_thread_num()];
#pragma omp for schedule(static)
        for (int64_t i = 0; i < some * rows; i++) {
            int64_t pair = first + i / rows, r = i % rows;
            attn_dense_load_row(p, q + i * p->d, &p->in->q, pair / p->kv_heads, pair % p->kv_heads * p->group + r / p->n, r % p->n, p->d,
                                (float)(p->scale * ATTN_LOG2E));
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < some * parts; i++) {
            int64_t pair = first + i / parts, begin = i % parts * DECODE_PART;
            p->decode->scores(scores + i / parts * rows * t->ld + begin, t->ld, q + i / parts * rows * p->d, p->d, rows,
                                      attn_dense_row(k, pair / p->kv_heads, pair % p->kv_heads, begin), k->dtype, 0, k->stride[2],
                                      attn_min_i64(DECODE_PART, p->m - begin), p->d);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < some * lists; i++) {
            /* row r: query r % N of head r / N of the group */
            int64_t pair = first + i / lists, n = i % lists % p->n, head = i % lists / p->n * t->stack, r = head * p->n + n;
            list g = {.b = pair / p->kv_heads, .h0 = pair % p->kv_heads * p->group + head, .n = n, .count = visible(p, n),
                      .s = scores + (i / lists * rows + r) * t->ld, .step = p->n * t->ld,
                      .q = q + (i / lists * rows + r) * p->d, .q_step = p->n * p->d};
            run_list(t, w, &g, 0, 0, 0);
        }
    }
    return ATTN_OK;
}

static attn_status begin(topk *t, dense_problem *p, const attn_topk_settings *settings, const attn_dense_inputs *inputs, int shared)
{
    attn_dense_settings plain;
    attn_dense_defaults(&plain);
    plain.causal = settings->causal;
    plain.scale = settings->scale;
    ATTN_TRY(attn_dense_check(p, &plain, inputs));
    int64_t nr = p->kernels->nr, mr = p->kernels->mr;
    if (p->m > INT32_MAX - 2 * DENSE_BLOCK_K) {
        return attn_fail(ATTN_ERR_SHAPE, "M = %lld keys, expected fewer than 2^31", (long long)p->m);
    }
    *t = (topk){.p = p, .select = attn_select_kernels_get(), .top_k = settings->top_k, .stack = shared ? p->group : 1, .shared = shared};
    t->m_pad = attn_ceil_div(p->m, nr) * nr;
    /* Rows do not begin a power of two apart, where they would fight for the same lines of the cache; room for a sample. */
    t->ld = attn_max_i64(t->m_pad, SAMPLE) + 3 * ATTN_SELECT_SLACK;
    t->rows = attn_max_i64(mr, attn_min_i64(MOST_ROWS, STRIP / t->ld) / mr * mr);
    t->queries = attn_max_i64(1, t->rows / attn_max_i64(1, t->stack));
    t->rows = attn_max_i64(t->rows, t->stack);
    return ATTN_OK;
}

attn_status attn_topk_forward(const attn_topk_settings *settings, const attn_dense_inputs *inputs, int64_t *indices, const attn_tensor *o,
                              const attn_tensor *lse, const attn_exec *exec)
{
    topk t;
    dense_problem p;
    attn_scratch scratch;
    ATTN_TRY(begin(&t, &p, settings, inputs, settings->share_group));
    if (p.batch * p.heads * p.n == 0) {
        return ATTN_OK;
    }
    t.indices = indices;
    t.o = o;
    t.lse = lse;
    ATTN_TRY(attn_scratch_begin(&scratch, exec));
    int threads = attn_exec_threads(exec);
    attn_status status = attn_dense_is_decode(&p) ? run_decode(&t, scratch.arena, threads) : run_tiled(&t, scratch.arena, threads);
    attn_scratch_end(&scratch);
    return status;
}

/* ---- Blocks ---- */

/* The probabilities of some rows summed over each block of keys, added to importance: in float32 for each key, or in double. */
static void add_importance(const topk *t, worker *w, int64_t n, int64_t rows, int64_t columns, int64_t block_k, int exact, double *importance)
{
    const attn_tile_kernels *kernels = t->p->kernels;
    int64_t most = visible(t->p, n + rows - 1);
    memset(w->sums, 0, (size_t)columns * sizeof *w->sums);
    for (int64_t r = 0; r < rows; r++) {
        float *s = w->s + r * t->ld, m = -INFINITY, l = 0, alpha;
        int64_t count = visible(t->p, n + r);
        attn_dense_mask_row(s, 0, columns, 0, count);
        memcpy(w->part, s, (size_t)columns * sizeof *s);
        kernels->softmax(1, w->part, columns, columns, &m, &l, &alpha);
        if (!exact) {
            kernels->axpy(w->sums, w->part, columns, attn_softmax_inverse(l));
            continue;
        }
        double lse = (double)m + log2((double)l);
        for (int64_t j = 0; j < count; j++) {
            importance[j / block_k] += exp2((double)s[j] - lse);
        }
    }
    for (int64_t j = 0; j < most && !exact; j++) {
        importance[j / block_k] += (double)w->sums[j];
    }
}

/* The kept blocks of keys of one block of queries. */
static void run_block(const topk *t, worker *w, int64_t b, int64_t h, int64_t first, int64_t last, int64_t block_k, double *importance,
                      int64_t *to)
{
    const dense_problem *p = t->p;
    int64_t seen = visible(p, last - 1), blocks = attn_ceil_div(seen, block_k), kept = 0;
    double limit = 0;
    for (int exact = 0; exact < 2 && limit < (double)VANISHING; exact++) {
        memset(importance, 0, (size_t)blocks * sizeof *importance);
        for (int64_t n = first; n < last; n += t->queries) {
            int64_t rows = attn_min_i64(t->queries, last - n);
            int64_t columns = attn_ceil_div(visible(p, n + rows - 1), p->kernels->vw) * p->kernels->vw;
            if (columns > 0) {
                score_rows(t, w, b, h, n, rows, columns);
                add_importance(t, w, n, rows, columns, block_k, exact, importance);
            }
        }
        for (int64_t c = 0; c < blocks; c++) {
            importance[c] = isnan(importance[c]) ? 0 : importance[c];
        }
        if (p->settings.causal && blocks > 0) {
            importance[blocks - 1] = INFINITY; /* the diagonal block */
        }
        kept = keep_largest(importance, blocks, t->top_k, w->copy, w->at, &limit);
        limit = blocks <= t->top_k ? 1 : limit;
    }
    for (int64_t i = 0; i < t->top_k; i++) {
        to[i] = i < kept ? w->at[i] : -1;
    }
}

attn_status attn_topk_blocks(const attn_topk_settings *settings, const attn_dense_inputs *inputs, int64_t block_q, int64_t block_k,
                             int64_t *kept, const attn_exec *exec)
{
    topk t;
    dense_problem p;
    attn_scratch scratch;
    worker *workers;
    ATTN_TRY(begin(&t, &p, settings, inputs, 0));
    int64_t nq = attn_ceil_div(p.n, block_q), tasks = p.batch * p.heads * nq;
    if (tasks == 0) {
        return ATTN_OK;
    }
    ATTN_TRY(attn_scratch_begin(&scratch, exec));
    int threads = attn_exec_threads(exec);
    attn_status status = workers_create(&t, &workers, t.rows, threads, scratch.arena);
    if (status == ATTN_OK) {
        status = pack(&t, workers, 0, threads, scratch.arena);
    }
    if (status == ATTN_OK) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
        for (int64_t i = 0; i < tasks; i++) {
            int64_t head = i % (p.batch * p.heads), block = nq - 1 - i / (p.batch * p.heads);
            worker *w = &workers[omp_get_thread_num()];
            run_block(&t, w, head / p.heads, head % p.heads, block * block_q, attn_min_i64(p.n, (block + 1) * block_q), block_k, w->exact,
                      kept + (head * nq + block) * t.top_k);
        }
    }
    attn_scratch_end(&scratch);
    return status;
}
