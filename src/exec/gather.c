/* Exact softmax attention over lists of keys, forward and backward. Listed rows are read where they lie when a few query rows share a
 * list, as in decoding; for more rows, and backward, they are copied together a few at a time and then computed with as if they were the
 * whole cache. Each is read once for all query rows of its list.
 *
 * Backward: a task is one key/value head, or a fixed share of its query blocks when there are few heads, with gradients of keys and values
 * of its own that are added in order; neither depends on the number of threads.
 */
#include "exec/blocks.h"

#include <omp.h>
#include <string.h>

#define STEP 128     /* keys of a step; a multiple of all vector widths */
#define MOST_ROWS 64 /* query rows computed together */
#define FEW_ROWS 4   /* so few that copying would take longer */
#define PART 512     /* entries of a task when there are few lists */
#define ENOUGH_TASKS 16

typedef struct gather {
    const dense_problem *p;
    const attn_plan_layout *y;
    int64_t stack;  /* query heads that share a list */
    int64_t units;  /* B * (H / stack) */
    int64_t chunk;  /* queries of a block computed together */
    int64_t chunks; /* per block */
    int64_t parts;  /* of each list; merged by their log-sum-exp */
    int64_t most;   /* rows of a task */
} gather;

typedef struct worker {
    float *q, *k, *v, *s, *o, *m, *l, *alpha;
    float *grad_o, *ds; /* backward only */
} worker;

/* Row r of a task is query n0 + r % count of head h0 + r / count. */
typedef struct rows {
    int64_t b, h0, n0, count, rows, list;
    int64_t first, last; /* entries */
} rows;

static gather gather_of(const dense_problem *p, const attn_plan_layout *y)
{
    gather w = {.p = p, .y = y, .stack = y->shape.heads == p->heads ? 1 : attn_max_i64(1, p->group)};
    /* A group larger than a task's rows is taken head by head. */
    w.stack = w.stack > MOST_ROWS ? 1 : w.stack;
    w.units = p->batch * (p->heads / w.stack);
    w.chunk = attn_max_i64(1, attn_min_i64(attn_min_i64(y->shape.block_q, p->n), MOST_ROWS / w.stack));
    w.chunks = attn_ceil_div(attn_min_i64(y->shape.block_q, p->n), w.chunk);
    w.parts = 1;
    w.most = w.chunk * w.stack;
    return w;
}

static rows rows_of(const gather *w, int64_t unit, int64_t block, int64_t chunk)
{
    const dense_problem *p = w->p;
    const attn_plan_layout *y = w->y;
    int64_t per = p->heads / w->stack;
    rows x = {.b = unit / per, .h0 = unit % per * w->stack, .n0 = block * y->shape.block_q + chunk * w->chunk};
    x.list = attn_layout_list(y, p, x.b, x.h0);
    x.count = attn_min_i64(w->chunk, attn_min_i64(p->n, (block + 1) * y->shape.block_q) - x.n0);
    x.rows = attn_max_i64(x.count, 0) * w->stack;
    x.first = y->start[x.list * y->rows + block];
    x.last = y->start[x.list * y->rows + block + 1];
    return x;
}

/* Listed rows lie anywhere, so that the machine does not foresee them: ask for them some entries ahead. */
#define ENTRIES_AHEAD 16
static void fetch_ahead(const attn_tensor *t, int64_t b, int64_t kv, int64_t key)
{
    /* Into L2: a core waits for many more lines there than in L1. */
    attn_prefetch_ahead(attn_dense_row(t, b, kv, key), 0, 1, t->stride[3] == 1 ? (size_t)t->shape[3] * attn_dtype_size(t->dtype) : 1);
}

/* `keys` entries from `first` on, of a list that ends at `last`. */
static void load_keys(const gather *w, worker *x, const rows *g, int64_t first, int64_t keys, int64_t last)
{
    const dense_problem *p = w->p;
    int64_t kv = g->h0 / p->group;
    for (int64_t j = 0; j < keys; j++) {
        int64_t key = w->y->column[first + j];
        if (first + j + ENTRIES_AHEAD < last) {
            int64_t ahead = w->y->column[first + j + ENTRIES_AHEAD];
            fetch_ahead(&p->in->k, g->b, kv, ahead);
            fetch_ahead(&p->in->v, g->b, kv, ahead);
        }
        attn_dense_load_row(p, x->k + j * p->d, &p->in->k, g->b, kv, key, p->d, attn_dense_row_scale(p->in->k_scale, g->b, kv, key));
        attn_dense_load_row(p, x->v + j * p->dv, &p->in->v, g->b, kv, key, p->dv, attn_dense_row_scale(p->in->v_scale, g->b, kv, key));
    }
}

/* What lies between the products and the softmax: soft cap and what is added, then masks. slope: the soft cap's derivative or NULL. */
static void finish_scores(const gather *w, float *s, const rows *g, int64_t r, int64_t first, int64_t keys, float *slope)
{
    const dense_problem *p = w->p;
    const attn_plan_layout *y = w->y;
    int64_t n = g->n0 + r % g->count, h = g->h0 + r / g->count, begin, end;
    const int32_t *column = y->column + first, *mask = y->mask + first;
    if (attn_dense_needs_adjust(p)) {
        for (int64_t j = 0; j < keys; j++) {
            if (slope != NULL) {
                float raw = s[j];
                p->kernels->softcap(&raw, 1, (float)p->settings.softcap);
                float share = raw / (float)p->settings.softcap;
                slope[j] = 1 - share * share;
            }
            attn_dense_adjust(p, s + j, g->b, h, n, column[j], 1);
        }
    }
    attn_dense_visible(p, g->b, n, &begin, &end);
    for (int64_t j = 0; j < keys && (column[0] < begin || column[keys - 1] >= end); j++) {
        if (column[j] < begin || column[j] >= end) {
            s[j] = -INFINITY;
        }
    }
    for (int64_t j = 0; j < keys; j++) {
        if (mask[j] != ATTN_PLAN_FULL) {
            attn_layout_mask(y, g->list, mask[j], s + j, n + (p->m - p->n), n % y->shape.block_q, column[j], 0, 1);
        }
    }
}

static void load_queries(const gather *w, float *q, const rows *g, float factor)
{
    for (int64_t r = 0; r < g->rows; r++) {
        attn_dense_load_row(w->p, q + r * w->p->d, &w->p->in->q, g->b, g->h0 + r / g->count, g->n0 + r % g->count, w->p->d, factor);
    }
}

/* The beginnings of lists; the kernels ask for what follows. */
static void fetch_first(const gather *w, const rows *g, int64_t first, int64_t last)
{
    for (int64_t j = first; j < attn_min_i64(last, first + ENTRIES_AHEAD); j++) {
        fetch_ahead(&w->p->in->k, g->b, g->h0 / w->p->group, w->y->column[j]);
        fetch_ahead(&w->p->in->v, g->b, g->h0 / w->p->group, w->y->column[j]);
    }
}

/* int8 of several queries is converted. */
static int reads_in_place(const dense_problem *p, const rows *g)
{
    int whole = p->in->k.dtype == ATTN_I8 || p->in->v.dtype == ATTN_I8;
    return g->rows <= FEW_ROWS && (!whole || p->n == 1) && attn_dense_rows_lie_together(p);
}

/* Entries [first, last) for all rows of g: o, m and l of the worker. */
static void attend(const gather *w, worker *x, const rows *g, int64_t first, int64_t last)
{
    const dense_problem *p = w->p;
    const attn_tile_kernels *kernels = p->kernels;
    const int in_place = reads_in_place(p, g);
    load_queries(w, x->q, g, (float)(p->base2 ? p->scale * ATTN_LOG2E : p->scale));
    memset(x->o, 0, (size_t)(g->rows * p->dv_pad) * sizeof(float));
    if (in_place) {
        fetch_first(w, g, first, last);
    }
    for (; first < last; first += STEP) {
        int64_t keys = attn_min_i64(STEP, last - first), count = attn_ceil_div(keys, kernels->vw) * kernels->vw;
        const dense_keys listed = {.b = g->b, .kv = g->h0 / p->group, .count = keys, .list = w->y->column + first, .entries = last - first,
                                   .rounded = g->last - g->first >= DENSE_ROUNDED_KEYS};
        if (in_place) {
            attn_dense_scores_in_place(p, x->s, STEP, x->q, g->rows, &listed);
        } else {
            load_keys(w, x, g, first, keys, last);
            p->decode->scores(x->s, STEP, x->q, p->d, g->rows, x->k, ATTN_F32, 0, p->d, keys, p->d);
        }
        for (int64_t r = 0; r < g->rows; r++) {
            finish_scores(w, x->s + r * STEP, g, r, first, keys, NULL);
            for (int64_t j = keys; j < count; j++) {
                x->s[r * STEP + j] = -INFINITY;
            }
        }
        kernels->softmax(g->rows, x->s, STEP, count, x->m, x->l, x->alpha);
        for (int64_t r = 0; r < g->rows; r++) {
            if (x->alpha[r] != 1.0f) {
                kernels->scale(x->o + r * p->dv_pad, p->dv, x->alpha[r]);
            }
        }
        if (in_place) {
            attn_dense_values_in_place(p, x->o, x->s, STEP, g->rows, &listed);
        } else {
            p->decode->values(x->o, p->dv_pad, x->s, STEP, g->rows, x->v, ATTN_F32, 0, p->dv, keys, p->dv);
        }
    }
}

static attn_status workers_create(const gather *w, worker **workers, int threads, int backward, attn_arena *arena)
{
    const dense_problem *p = w->p;
    *workers = attn_arena_array(arena, (size_t)threads, sizeof **workers);
    for (int t = 0; t < threads && *workers != NULL; t++) {
        worker *x = &(*workers)[t];
        int64_t sizes[] = {MOST_ROWS * p->d, STEP * p->d, STEP * p->dv, MOST_ROWS * STEP, MOST_ROWS * p->dv_pad,
                           MOST_ROWS,        MOST_ROWS,   MOST_ROWS,    backward ? MOST_ROWS * p->dv : 0, backward ? 2 * MOST_ROWS * STEP : 0};
        float **parts[] = {&x->q, &x->k, &x->v, &x->s, &x->o, &x->m, &x->l, &x->alpha, &x->grad_o, &x->ds};
        for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
            *parts[i] = attn_arena_array(arena, (size_t)sizes[i] + 1, sizeof(float));
            if (*parts[i] == NULL) {
                return attn_fail_memory((size_t)sizes[i] * sizeof(float));
            }
        }
    }
    return *workers != NULL ? ATTN_OK : attn_fail_memory((size_t)threads * sizeof **workers);
}

/* Few lists, as in decoding: each is cut in parts. */
static attn_status run_parts(const gather *w, worker *workers, const attn_tensor *o, const attn_tensor *lse, attn_arena *arena, int threads)
{
    const dense_problem *p = w->p;
    int64_t tasks = w->units * w->y->rows * w->chunks, step = w->most * (p->dv_pad + 2);
    float *states = attn_arena_array(arena, (size_t)(tasks * w->parts), (size_t)step * sizeof(float));
    if (states == NULL) {
        return attn_fail_memory((size_t)(tasks * w->parts * step) * sizeof(float));
    }
#pragma omp parallel num_threads(threads)
    {
        worker *x = &workers[omp_get_thread_num()];
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < tasks * w->parts; i++) {
            int64_t task = i / w->parts, part = i % w->parts, block = task / w->chunks % w->y->rows;
            rows g = rows_of(w, task / w->chunks / w->y->rows, block, task % w->chunks);
            worker own = *x;
            own.o = states + i * step;
            own.m = own.o + w->most * p->dv_pad;
            own.l = own.m + w->most;
            for (int64_t r = 0; r < g.rows; r++) {
                own.m[r] = -INFINITY;
                own.l[r] = 0;
            }
            int64_t first = attn_min_i64(g.last, g.first + part * PART);
            attend(w, &own, &g, first, part == w->parts - 1 ? g.last : attn_min_i64(g.last, first + PART));
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; task++) {
            rows g = rows_of(w, task / w->chunks / w->y->rows, task / w->chunks % w->y->rows, task % w->chunks);
            for (int64_t r = 0; r < g.rows; r++) {
                float shift;
                int64_t h = g.h0 + r / g.count;
                const float *first = states + task * w->parts * step, *m = first + w->most * p->dv_pad + r;
                double sum = attn_dense_merge_parts(p, h, first + r * p->dv_pad, m, m + w->most, step, w->parts, x->o, &shift);
                attn_dense_finish_row(p, o, lse, g.b, h, g.n0 + r % g.count, x->o, shift, (float)sum);
            }
        }
    }
    return ATTN_OK;
}

static attn_status run(gather *w, const attn_tensor *o, const attn_tensor *lse, attn_arena *arena, int threads)
{
    const dense_problem *p = w->p;
    const attn_plan_layout *y = w->y;
    int64_t tasks = w->units * y->rows * w->chunks, longest = 0;
    worker *workers;
    ATTN_TRY(workers_create(w, &workers, threads, 0, arena));
    if (tasks < ENOUGH_TASKS) {
        for (int64_t row = 0; row < y->shape.batch * y->shape.heads * y->rows; row++) {
            longest = attn_max_i64(longest, y->start[row + 1] - y->start[row]);
        }
        w->parts = attn_max_i64(1, attn_ceil_div(longest, PART));
        return run_parts(w, workers, o, lse, arena, threads);
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t task = 0; task < tasks; task++) {
        worker *x = &workers[omp_get_thread_num()];
        rows g = rows_of(w, task / w->chunks / y->rows, task / w->chunks % y->rows, task % w->chunks);
        for (int64_t r = 0; r < g.rows; r++) {
            attn_dense_begin_row(p, g.h0 + r / g.count, &x->m[r], &x->l[r]);
        }
        attend(w, x, &g, g.first, g.last);
        for (int64_t r = 0; r < g.rows; r++) {
            attn_dense_finish_row(p, o, lse, g.b, g.h0 + r / g.count, g.n0 + r % g.count, x->o + r * p->dv_pad, x->m[r], x->l[r]);
        }
    }
    return ATTN_OK;
}

static attn_status check(dense_problem *p, const attn_plan_layout *layout, const attn_dense_settings *settings,
                         const attn_dense_inputs *inputs)
{
    ATTN_TRY(attn_dense_check(p, settings, inputs));
    if (layout->shape.block_k != 1) {
        return attn_fail(ATTN_ERR_ARGUMENT, "the plan has blocks of %lld keys, expected lists of single keys", (long long)layout->shape.block_k);
    }
    return attn_layout_check(layout, p);
}

attn_status attn_gather_forward(const attn_plan_layout *layout, const attn_dense_settings *settings,
                                const attn_dense_inputs *inputs, const attn_tensor *o, const attn_tensor *lse, const attn_exec *exec)
{
    dense_problem p;
    attn_scratch scratch;
    ATTN_TRY(check(&p, layout, settings, inputs));
    ATTN_TRY(attn_dense_check_tensor("o", o, "[B,H,N,Dv]", 4, (int64_t[]){p.batch, p.heads, p.n, p.dv}, 1));
    if (lse != NULL) {
        ATTN_TRY(attn_dense_check_f32("lse", lse, "[B,H,N]", 3, (int64_t[]){p.batch, p.heads, p.n}));
    }
    if (p.batch * p.heads * p.n == 0) {
        return ATTN_OK;
    }
    ATTN_TRY(attn_scratch_begin(&scratch, exec));
    gather w = gather_of(&p, layout);
    attn_status status = run(&w, o, lse, scratch.arena, attn_exec_threads(exec));
    attn_scratch_end(&scratch);
    return status;
}

/* ---- Backward ---- */

typedef struct backward {
    gather g;
    exec_backward rows;
    const attn_dense_gradients *to;
    int64_t shares, per_share; /* query blocks of a share */
    float *grad_k, *grad_v;    /* [B*Hkv][shares][M][D], [..][Dv] */
} backward;

static void backward_rows(const backward *w, worker *x, const rows *g, float *grad_k, float *grad_v)
{
    const dense_problem *p = w->g.p;
    const attn_tile_kernels *kernels = p->kernels;
    const float *lse2 = w->rows.lse2, *delta = w->rows.delta;
    float *slopes = p->settings.softcap > 0 ? x->ds + MOST_ROWS * STEP : NULL;
    load_queries(&w->g, x->q, g, (float)(p->base2 ? p->scale * ATTN_LOG2E : p->scale));
    for (int64_t r = 0; r < g->rows; r++) {
        memcpy(x->grad_o + r * p->dv, attn_exec_row(&w->rows.grad_o, g->b, g->h0 + r / g->count, g->n0 + r % g->count),
               (size_t)p->dv * sizeof(float));
    }
    float *grad_q = x->o; /* [rows][d]: x->o has room for the wider of the two */
    memset(grad_q, 0, (size_t)(g->rows * w->rows.d_pad) * sizeof(float));
    for (int64_t first = g->first; first < g->last; first += STEP) {
        int64_t keys = attn_min_i64(STEP, g->last - first);
        load_keys(&w->g, x, g, first, keys, g->last);
        p->decode->scores(x->s, STEP, x->q, p->d, g->rows, x->k, ATTN_F32, 0, p->d, keys, p->d);
        p->decode->scores(x->ds, STEP, x->grad_o, p->dv, g->rows, x->v, ATTN_F32, 0, p->dv, keys, p->dv);
        for (int64_t r = 0; r < g->rows; r++) {
            float *s = x->s + r * STEP, *ds = x->ds + r * STEP, *slope = slopes != NULL ? slopes + r * STEP : NULL;
            int64_t row = (g->b * p->heads + g->h0 + r / g->count) * p->n + g->n0 + r % g->count;
            finish_scores(&w->g, s, g, r, first, keys, slope);
            kernels->exp2_row(s, keys, lse2[row]);
            kernels->grad_row(ds, s, keys, delta[row]);
            for (int64_t j = 0; j < keys; j++) {
                int64_t key = w->g.y->column[first + j];
                if (slope != NULL) {
                    ds[j] *= slope[j];
                }
                if (s[j] == 0) {
                    continue;
                }
                if (grad_v != NULL) {
                    kernels->axpy(grad_v + key * p->dv, x->grad_o + r * p->dv, p->dv, s[j]);
                }
                if (grad_k != NULL) {
                    kernels->axpy(grad_k + key * p->d, x->q + r * p->d, p->d, ds[j] * (p->base2 ? (float)ATTN_LN2 : 1.0f));
                }
            }
        }
        if (w->to->q != NULL) {
            p->decode->values(grad_q, w->rows.d_pad, x->ds, STEP, g->rows, x->k, ATTN_F32, 0, p->d, keys, p->d);
        }
    }
    for (int64_t r = 0; r < g->rows && w->to->q != NULL; r++) {
        kernels->scale(grad_q + r * w->rows.d_pad, p->d, (float)p->scale);
        attn_dense_store_row(w->to->q, g->b, g->h0 + r / g->count, g->n0 + r % g->count, grad_q + r * w->rows.d_pad, p->d);
    }
}

static void add_shares(const backward *w, const attn_tensor *to, const float *from, int64_t width, int threads)
{
    const dense_problem *p = w->g.p;
    int64_t pairs = p->batch * p->kv_heads;
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < pairs * p->m; i++) {
        int64_t pair = i / p->m, key = i % p->m;
        float *sum = (float *)(uintptr_t)(from + (pair * w->shares * p->m + key) * width);
        for (int64_t share = 1; share < w->shares; share++) {
            p->kernels->axpy(sum, sum + share * p->m * width, width, 1);
        }
        attn_dense_store_row(to, pair / p->kv_heads, pair % p->kv_heads, key, sum, width);
    }
}

static attn_status run_backward(backward *w, const attn_tensor *o, const attn_tensor *lse, const attn_tensor *grad_o, attn_arena *arena,
                                int threads)
{
    const dense_problem *p = w->g.p;
    const attn_plan_layout *y = w->g.y;
    int64_t pairs = p->batch * p->kv_heads, units = w->g.units / pairs;
    ATTN_TRY(attn_exec_backward_begin(&w->rows, p, o, lse, grad_o, arena, threads));
    w->shares = attn_max_i64(1, attn_min_i64(y->rows, attn_ceil_div(ENOUGH_TASKS / 2, pairs)));
    w->per_share = attn_ceil_div(y->rows, w->shares);
    size_t copies = (size_t)(pairs * w->shares * p->m);
    w->grad_k = w->to->k != NULL ? attn_arena_array(arena, copies, (size_t)p->d * sizeof(float)) : NULL;
    w->grad_v = w->to->v != NULL ? attn_arena_array(arena, copies, (size_t)p->dv * sizeof(float)) : NULL;
    if ((w->to->k != NULL && w->grad_k == NULL) || (w->to->v != NULL && w->grad_v == NULL)) {
        return attn_fail_memory(copies * (size_t)(p->d + p->dv) * sizeof(float));
    }
    worker *workers;
    dense_problem wide = *p;
    wide.dv_pad = attn_max_i64(p->dv_pad, w->rows.d_pad);
    gather sizes = w->g;
    sizes.p = &wide;
    ATTN_TRY(workers_create(&sizes, &workers, threads, 1, arena));
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t task = 0; task < pairs * w->shares; task++) {
        int64_t pair = task / w->shares, share = task % w->shares;
        float *grad_k = w->grad_k != NULL ? w->grad_k + task * p->m * p->d : NULL;
        float *grad_v = w->grad_v != NULL ? w->grad_v + task * p->m * p->dv : NULL;
        if (grad_k != NULL) {
            memset(grad_k, 0, (size_t)(p->m * p->d) * sizeof(float));
        }
        if (grad_v != NULL) {
            memset(grad_v, 0, (size_t)(p->m * p->dv) * sizeof(float));
        }
        for (int64_t block = share * w->per_share; block < attn_min_i64(y->rows, (share + 1) * w->per_share); block++) {
            for (int64_t i = 0; i < units * w->g.chunks; i++) {
                rows g = rows_of(&w->g, pair * units + i / w->g.chunks, block, i % w->g.chunks);
                backward_rows(w, &workers[omp_get_thread_num()], &g, grad_k, grad_v);
            }
        }
    }
    if (w->to->k != NULL) {
        add_shares(w, w->to->k, w->grad_k, p->d, threads);
    }
    if (w->to->v != NULL) {
        add_shares(w, w->to->v, w->grad_v, p->dv, threads);
    }
    if (w->to->sinks != NULL) {
        attn_exec_sink_gradients(&w->rows, p, w->to->sinks);
    }
    return ATTN_OK;
}

attn_status attn_gather_backward(const attn_plan_layout *layout, const attn_dense_settings *settings,
                                 const attn_dense_inputs *inputs, const attn_tensor *o, const attn_tensor *lse,
                                 const attn_tensor *grad_o, const attn_dense_gradients *gradients, const attn_exec *exec)
{
    dense_problem p;
    attn_scratch scratch;
    ATTN_TRY(check(&p, layout, settings, inputs));
    ATTN_TRY(attn_layout_check_backward(layout, &p, o, lse, grad_o, gradients));
    if (p.batch * p.kv_heads == 0) {
        return ATTN_OK;
    }
    ATTN_TRY(attn_scratch_begin(&scratch, exec));
    backward w = {.g = gather_of(&p, layout), .to = gradients};
    attn_status status = run_backward(&w, o, lse, grad_o, scratch.arena, attn_exec_threads(exec));
    attn_scratch_end(&scratch);
    return status;
}
