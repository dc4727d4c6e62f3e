/* Flash attention over lists of key blocks, backward: for each block of keys, the query blocks that list it (the transposed plan). The
 * gradients of a block's keys and values stay in cache meanwhile; those of the queries are added in the order of the key blocks.
 *
 * A task is one key/value head, or a share of its key blocks with about the same number of entries when there are few heads; shares
 * have query gradients of their own, which are added in order. Neither depends on the number of threads.
 */
#include "exec/blocks.h"

#include <omp.h>
#include <string.h>

#define KEYS 128 /* of a tile */
#define ROWS 128
#define ENOUGH_TASKS 8

typedef struct backward {
    const dense_problem *p;
    const attn_plan_layout *y;
    const attn_dense_gradients *to;
    exec_backward rows;
    int64_t shares;
    int64_t *column_start; /* per list: [columns + 1] into transposed */
    int64_t *transposed;   /* [entries] of all lists: entry numbers by column, then by row */
    int32_t *row_of;       /* [entries]: query block of an entry */
    int64_t *share_start;  /* [B*Hkv][shares + 1]: key blocks of each share */
    float *grad_q;         /* [shares][B,H,N,d_pad] */
} backward;

typedef struct worker {
    float *kt, *k, *vt;     /* keys packed for the scores (times scale, in base 2), rows times scale; values packed for dP */
    float *p, *ds, *slope;  /* [ROWS][KEYS]; slope: derivative of the soft cap */
    float *grad_k, *grad_v; /* [KEYS][d_pad], [KEYS][dv_pad] */
} worker;

/* Keys (or values) times a factor, as rows and transposed in panels of nr. */
static void pack(const backward *w, const attn_tensor *t, int64_t b, int64_t h, int64_t first, int64_t count, float *rows, int64_t pad,
                 float factor, float *panels)
{
    const dense_problem *p = w->p;
    int64_t nr = p->kernels->nr, width = t->shape[3];
    for (int64_t j = 0; j < count; j++) {
        attn_dense_load_row(p, rows + j * pad, t, b, h, first + j, width, factor);
        memset(rows + j * pad + width, 0, (size_t)(pad - width) * sizeof *rows);
    }
    for (int64_t j = 0; j < count; j += nr, panels += width * nr) {
        int64_t some = attn_min_i64(nr, count - j);
        if (some < nr) {
            memset(panels, 0, (size_t)(width * nr) * sizeof *panels);
        }
        p->kernels->pack_transposed(panels, nr, rows + j * pad, ATTN_F32, pad, some, width);
    }
}

/* The rows [*from, *to) of n0 ... n0 + rows - 1 that causality, windows and lengths let see any of the keys; cut: not all see all. */
static int visible_rows(const dense_problem *p, int64_t b, int64_t n0, int64_t rows, int64_t key, int64_t keys, int64_t *from,
                        int64_t *to)
{
    int cut = 0;
    *from = rows;
    *to = 0;
    for (int64_t r = 0; r < rows; r++) {
        int64_t begin, end;
        attn_dense_visible(p, b, n0 + r, &begin, &end);
        if (begin < end && begin < key + keys && end > key) {
            *from = attn_min_i64(*from, r);
            *to = r + 1;
        }
        cut |= begin > key || end < key + keys;
    }
    return cut;
}

static void probabilities(const backward *w, worker *x, int64_t b, int64_t h, int64_t n, int64_t rows, int64_t key, int64_t keys,
                          int64_t inside, int64_t list, int32_t mask, int cut)
{
    const dense_problem *p = w->p;
    const attn_tile_kernels *kernels = p->kernels;
    const float *lse2 = w->rows.lse2 + (b * p->heads + h) * p->n + n;
    int64_t count = attn_ceil_div(keys, kernels->vw) * kernels->vw;
    kernels->product(rows, count, p->d, attn_exec_row(&w->rows.q, b, h, n), w->rows.q.row, 1, x->kt, kernels->nr, p->d * kernels->nr,
                     x->p, KEYS, 0);
    for (int64_t r = 0; r < rows; r++) {
        float *row = x->p + r * KEYS;
        if (p->settings.softcap > 0) {
            kernels->softcap(row, keys, (float)p->settings.softcap);
            for (int64_t j = 0; j < keys; j++) {
                float share = row[j] / (float)p->settings.softcap;
                x->slope[r * KEYS + j] = 1 - share * share;
            }
            kernels->scale(row, keys, (float)ATTN_LOG2E);
        }
        if (attn_dense_needs_adjust(p)) {
            attn_dense_shift(p, row, b, h, n + r, key, keys);
        }
        if (cut) {
            int64_t begin, end;
            attn_dense_visible(p, b, n + r, &begin, &end);
            attn_dense_mask_row(row, key, keys, begin, end);
        }
        if (mask != ATTN_PLAN_FULL) {
            attn_layout_mask(w->y, list, mask, row, n + r + (p->m - p->n), (n + r) % w->y->shape.block_q, key, inside, keys);
        }
        kernels->exp2_row(row, keys, lse2[r]);
    }
}

/* Some rows of a query block against the loaded keys. */
static void query_rows(const backward *w, worker *x, int64_t b, int64_t h, int64_t n0, int64_t rows, int64_t key, int64_t keys,
                       int64_t inside, int64_t list, int32_t mask, float *grad_q)
{
    const dense_problem *p = w->p;
    const attn_tile_kernels *kernels = p->kernels;
    int64_t from, to, nr = kernels->nr;
    int cut = visible_rows(p, b, n0, rows, key, keys, &from, &to);
    if (from >= to) {
        return;
    }
    int64_t n = n0 + from, some = to - from, count = attn_ceil_div(keys, kernels->vw) * kernels->vw;
    const float *grad_o = attn_exec_row(&w->rows.grad_o, b, h, n), *q = attn_exec_row(&w->rows.q, b, h, n);
    const float *delta = w->rows.delta + (b * p->heads + h) * p->n + n;
    probabilities(w, x, b, h, n, some, key, keys, inside, list, mask, cut);
    kernels->product(some, count, p->dv, grad_o, w->rows.grad_o.row, 1, x->vt, nr, p->dv * nr, x->ds, KEYS, 0);
    for (int64_t r = 0; r < some; r++) {
        kernels->grad_row(x->ds + r * KEYS, x->p + r * KEYS, keys, delta[r]);
        for (int64_t j = 0; j < keys && p->settings.softcap > 0; j++) {
            x->ds[r * KEYS + j] *= x->slope[r * KEYS + j];
        }
    }
    if (w->to->v != NULL) {
        kernels->product(keys, p->dv_pad, some, x->p, 1, KEYS, grad_o, w->rows.grad_o.row, nr, x->grad_v, p->dv_pad, 1);
    }
    if (w->to->k != NULL) {
        kernels->product(keys, w->rows.d_pad, some, x->ds, 1, KEYS, q, w->rows.q.row, nr, x->grad_k, w->rows.d_pad, 1);
    }
    if (grad_q != NULL) {
        kernels->product(some, w->rows.d_pad, keys, x->ds, KEYS, 1, x->k, w->rows.d_pad, nr, grad_q + n * w->rows.d_pad,
                         w->rows.d_pad, 1);
    }
}

/* The next query block, while this one is computed. */
static void prefetch_queries(const backward *w, int64_t b, int64_t h, int64_t n0, const float *grad_q)
{
    const dense_problem *p = w->p;
    int64_t rows = attn_min_i64(attn_min_i64(ROWS, w->y->shape.block_q), p->n - n0), d_pad = w->rows.d_pad;
    attn_exec_prefetch(attn_exec_row(&w->rows.q, b, h, n0), w->rows.q.row, rows, d_pad);
    attn_exec_prefetch(attn_exec_row(&w->rows.grad_o, b, h, n0), w->rows.grad_o.row, rows, p->dv);
    if (grad_q != NULL) {
        attn_exec_prefetch(grad_q + n0 * d_pad, d_pad, rows, d_pad);
    }
}

/* Keys key ... key+keys-1 of one key block against all query blocks that list it. */
static void key_tile(const backward *w, worker *x, int64_t pair, int64_t share, int64_t column, int64_t key, int64_t keys)
{
    const dense_problem *p = w->p;
    const attn_plan_layout *y = w->y;
    int64_t b = pair / p->kv_heads, kv = pair % p->kv_heads, d_pad = w->rows.d_pad, heads = p->batch * p->heads;
    /* x->k holds the keys times scale and log2 e for a moment */
    pack(w, &p->in->v, b, kv, key, keys, x->grad_v, p->dv_pad, 1, x->vt);
    pack(w, &p->in->k, b, kv, key, keys, x->k, d_pad, (float)(p->base2 ? p->scale * ATTN_LOG2E : p->scale), x->kt);
    if (p->base2) {
        p->kernels->scale(x->k, keys * d_pad, (float)ATTN_LN2);
    }
    memset(x->grad_k, 0, (size_t)(keys * d_pad) * sizeof(float));
    memset(x->grad_v, 0, (size_t)(keys * p->dv_pad) * sizeof(float));
    for (int64_t g = 0; g < p->group; g++) {
        int64_t h = kv * p->group + g, list = attn_layout_list(y, p, b, h);
        const int64_t *start = w->column_start + list * (y->columns + 1) + column;
        float *grad_q = w->grad_q != NULL ? w->grad_q + (share * heads + b * p->heads + h) * p->n * d_pad : NULL;
        for (int64_t i = start[0]; i < start[1]; i++) {
            int64_t e = w->transposed[i], n0 = w->row_of[e] * y->shape.block_q;
            int64_t last = attn_min_i64(p->n, n0 + y->shape.block_q);
            if (i + 1 < start[1]) {
                prefetch_queries(w, b, h, w->row_of[w->transposed[i + 1]] * y->shape.block_q, grad_q);
            }
            for (int64_t n = n0; n < last; n += ROWS) {
                query_rows(w, x, b, h, n, attn_min_i64(ROWS, last - n), key, keys, key - column * y->shape.block_k, list, y->mask[e],
                           grad_q);
            }
        }
    }
    for (int64_t j = 0; j < keys; j++) {
        if (w->to->k != NULL) {
            p->kernels->scale(x->grad_k + j * d_pad, p->d, (float)p->scale);
            attn_dense_store_row(w->to->k, b, kv, key + j, x->grad_k + j * d_pad, p->d);
        }
        if (w->to->v != NULL) {
            attn_dense_store_row(w->to->v, b, kv, key + j, x->grad_v + j * p->dv_pad, p->dv);
        }
    }
}

static attn_status transpose(backward *w, attn_arena *arena)
{
    const attn_plan_layout *y = w->y;
    int64_t lists = y->shape.batch * y->shape.heads, entries = y->start[lists * y->rows];
    w->column_start = attn_arena_array(arena, (size_t)lists, (size_t)(y->columns + 1) * sizeof(int64_t));
    w->transposed = attn_arena_array(arena, (size_t)entries + 1, sizeof(int64_t));
    w->row_of = attn_arena_array(arena, (size_t)entries + 1, sizeof(int32_t));
    if (w->column_start == NULL || w->transposed == NULL || w->row_of == NULL) {
        return attn_fail_memory((size_t)entries * (sizeof(int64_t) + sizeof(int32_t)));
    }
    for (int64_t list = 0; list < lists; list++) {
        int64_t *start = w->column_start + list * (y->columns + 1), sum = y->start[list * y->rows];
        memset(start, 0, (size_t)(y->columns + 1) * sizeof *start);
        for (int64_t r = 0; r < y->rows; r++) {
            for (int64_t e = y->start[list * y->rows + r]; e < y->start[list * y->rows + r + 1]; e++) {
                w->row_of[e] = (int32_t)r;
                start[y->column[e]]++;
            }
        }
        for (int64_t c = 0; c <= y->columns; c++) {
            int64_t here = start[c];
            start[c] = sum;
            sum += here;
        }
        for (int64_t e = y->start[list * y->rows]; e < y->start[(list + 1) * y->rows]; e++) {
            w->transposed[start[y->column[e]]++] = e;
        }
        for (int64_t c = y->columns; c > 0; c--) {
            start[c] = start[c - 1];
        }
        start[0] = y->start[list * y->rows];
    }
    return ATTN_OK;
}

/* Cut the key blocks of each key/value head in shares of about the same work. */
static attn_status cut_shares(backward *w, attn_arena *arena)
{
    const dense_problem *p = w->p;
    const attn_plan_layout *y = w->y;
    int64_t pairs = p->batch * p->kv_heads;
    w->shares = pairs >= ENOUGH_TASKS ? 1 : attn_max_i64(1, attn_min_i64(y->columns, attn_ceil_div(ENOUGH_TASKS, pairs)));
    w->share_start = attn_arena_array(arena, (size_t)(pairs * (w->shares + 1)), sizeof(int64_t));
    if (w->share_start == NULL) {
        return attn_fail_memory((size_t)(pairs * (w->shares + 1)) * sizeof(int64_t));
    }
    for (int64_t pair = 0; pair < pairs; pair++) {
        int64_t *start = w->share_start + pair * (w->shares + 1), done = 0, total = 0, share = 1;
        for (int pass = 0; pass < 2; pass++) {
            for (int64_t c = 0; c < y->columns; c++) {
                int64_t here = 1; /* loading the block counts as one entry */
                for (int64_t g = 0; g < p->group; g++) {
                    int64_t list = attn_layout_list(y, p, pair / p->kv_heads, pair % p->kv_heads * p->group + g);
                    const int64_t *at = w->column_start + list * (y->columns + 1) + c;
                    here += at[1] - at[0];
                }
                if (pass == 0) {
                    total += here;
                } else {
                    while (share < w->shares && done * w->shares >= total * share) {
                        start[share++] = c;
                    }
                    done += here;
                }
            }
        }
        start[0] = 0;
        while (share <= w->shares) {
            start[share++] = y->columns;
        }
    }
    return ATTN_OK;
}

static attn_status workers_create(const backward *w, worker **workers, int threads, attn_arena *arena)
{
    const dense_problem *p = w->p;
    int64_t sizes[] = {KEYS * p->d, KEYS * w->rows.d_pad, KEYS * p->dv, ROWS * KEYS,
                       ROWS * KEYS, ROWS * KEYS,          KEYS * w->rows.d_pad, KEYS * p->dv_pad};
    *workers = attn_arena_array(arena, (size_t)threads, sizeof **workers);
    for (int t = 0; t < threads && *workers != NULL; t++) {
        worker *x = &(*workers)[t];
        float **parts[] = {&x->kt, &x->k, &x->vt, &x->p, &x->ds, &x->slope, &x->grad_k, &x->grad_v};
        for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
            *parts[i] = attn_arena_array(arena, (size_t)sizes[i], sizeof(float));
            if (*parts[i] == NULL) {
                return attn_fail_memory((size_t)sizes[i] * sizeof(float));
            }
        }
    }
    return *workers != NULL ? ATTN_OK : attn_fail_memory((size_t)threads * sizeof **workers);
}

static attn_status run(backward *w, const attn_tensor *o, const attn_tensor *lse, const attn_tensor *grad_o, attn_arena *arena,
                       int threads)
{
    const dense_problem *p = w->p;
    const attn_plan_layout *y = w->y;
    int64_t pairs = p->batch * p->kv_heads, rows = p->batch * p->heads * p->n, size = y->shape.block_k;
    worker *workers;
    ATTN_TRY(attn_exec_backward_begin(&w->rows, p, o, lse, grad_o, arena, threads));
    ATTN_TRY(transpose(w, arena));
    ATTN_TRY(cut_shares(w, arena));
    int64_t d_pad = w->rows.d_pad, tasks = pairs * w->shares;
    if (w->to->q != NULL) {
        w->grad_q = attn_arena_array(arena, (size_t)(rows * w->shares), (size_t)d_pad * sizeof(float));
        if (w->grad_q == NULL) {
            return attn_fail_memory((size_t)(rows * w->shares * d_pad) * sizeof(float));
        }
    }
    ATTN_TRY(workers_create(w, &workers, threads, arena));
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t task = 0; task < tasks; task++) {
        int64_t pair = task / w->shares, share = task % w->shares;
        const int64_t *start = w->share_start + pair * (w->shares + 1) + share;
        worker *x = &workers[omp_get_thread_num()];
        for (int64_t g = 0; g < p->group && w->grad_q != NULL; g++) {
            int64_t head = pair / p->kv_heads * p->heads + pair % p->kv_heads * p->group + g;
            memset(w->grad_q + (share * p->batch * p->heads + head) * p->n * d_pad, 0, (size_t)(p->n * d_pad) * sizeof(float));
        }
        for (int64_t c = start[0]; c < start[1]; c++) {
            int64_t last = attn_min_i64(p->m, (c + 1) * size);
            for (int64_t key = c * size; key < last; key += KEYS) {
                key_tile(w, x, pair, share, c, key, attn_min_i64(KEYS, last - key));
            }
        }
    }
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < (w->to->q != NULL ? rows : 0); row++) {
        float *sum = w->grad_q + row * d_pad;
        for (int64_t share = 1; share < w->shares; share++) {
            p->kernels->axpy(sum, w->grad_q + (share * rows + row) * d_pad, p->d, 1);
        }
        attn_dense_store_row(w->to->q, row / (p->heads * p->n), row / p->n % p->heads, row % p->n, sum, p->d);
    }
    if (w->to->sinks != NULL) {
        attn_exec_sink_gradients(&w->rows, p, w->to->sinks);
    }
    return ATTN_OK;
}

attn_status attn_blocks_backward(const attn_plan_layout *layout, const attn_dense_settings *settings,
                                 const attn_dense_inputs *inputs, const attn_tensor *o, const attn_tensor *lse,
                                 const attn_tensor *grad_o, const attn_dense_gradients *gradients, const attn_exec *exec)
{
    dense_problem p;
    attn_scratch scratch;
    ATTN_TRY(attn_dense_check(&p, settings, inputs));
    ATTN_TRY(attn_layout_check_backward(layout, &p, o, lse, grad_o, gradients));
    if (p.batch * p.kv_heads == 0) {
        return ATTN_OK;
    }
    ATTN_TRY(attn_scratch_begin(&scratch, exec));
    backward w = {.p = &p, .y = layout, .to = gradients};
    attn_status status = run(&w, o, lse, grad_o, scratch.arena, attn_exec_threads(exec));
    attn_scratch_end(&scratch);
    return status;
}
