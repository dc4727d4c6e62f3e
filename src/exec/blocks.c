/* Flash attention over lists of key blocks, forward. As the dense executor, with the steps of the online softmax made of the blocks
 * that a row lists: neighbouring full blocks join, and only blocks that a mask cuts are masked. */
#include "exec/blocks.h"

#include <omp.h>
#include <string.h>

#define STEP 256      /* keys of a step */
#define TASK_ROWS 128 /* query rows of a task */

/* Keys of one list entry, or of several in a row, within a step. */
typedef struct segment {
    int64_t first, keys; /* key numbers */
    int64_t inside;      /* place of `first` in its block */
    int32_t mask;
    const float *k;
} segment;

typedef struct blocks {
    const dense_problem *p;
    const attn_plan_layout *y;
    int64_t panel, block_floats; /* packed keys: width of a panel, size of a block */
    float *k, *v;                /* k [B*Hkv][columns][block_floats]; v [B*Hkv][M][dv_pad] or NULL: as they lie */
    uint8_t *used;               /* [B*Hkv][columns] */
    int64_t *order;              /* tasks, the long ones first */
} blocks;

typedef struct worker {
    float *q, *s, *o, *m, *l, *alpha, *rows;
    int64_t *begin, *end;
    int64_t all_begin, all_end; /* the keys that all rows of the task see */
    segment *segments, *next; /* of this step, and of the one after it */
} worker;

static const float *values(const blocks *w, int64_t pair, int64_t key)
{
    const dense_problem *p = w->p;
    return w->v != NULL ? w->v + (pair * p->m + key) * p->dv_pad
                        : (const float *)(const void *)attn_dense_row(&p->in->v, pair / p->kv_heads, pair % p->kv_heads, key);
}

static int64_t value_stride(const blocks *w) { return w->v != NULL ? w->p->dv_pad : w->p->in->v.stride[2]; }

static void pack_block(const blocks *w, int64_t pair, int64_t column, float *rows)
{
    const dense_problem *p = w->p;
    int64_t b = pair / p->kv_heads, h = pair % p->kv_heads, size = w->y->shape.block_k;
    int64_t first = column * size, count = attn_min_i64(size, p->m - first);
    float *to = w->k + (pair * w->y->columns + column) * w->block_floats;
    attn_dense_pack_transposed(p, to, w->panel, &p->in->k, p->in->k_scale, b, h, first, count, rows);
    if (w->v != NULL) {
        attn_dense_pack_rows(p, w->v + (pair * p->m + first) * p->dv_pad, &p->in->v, p->in->v_scale, b, h, first, count, p->dv_pad);
    }
}

/* The columns that any row of a key/value head lists. */
static void mark_used(const blocks *w)
{
    const dense_problem *p = w->p;
    const attn_plan_layout *y = w->y;
    memset(w->used, 0, (size_t)(p->batch * p->kv_heads * y->columns));
    for (int64_t b = 0; b < p->batch; b++) {
        for (int64_t h = 0; h < p->heads; h++) {
            uint8_t *used = w->used + (b * p->kv_heads + h / p->group) * y->columns;
            int64_t list = attn_layout_list(y, p, b, h);
            for (int64_t e = y->start[list * y->rows]; e < y->start[(list + 1) * y->rows]; e++) {
                used[y->column[e]] = 1;
            }
        }
    }
}

static attn_status blocks_create(blocks *w, attn_arena *arena)
{
    const dense_problem *p = w->p;
    int64_t vw = p->kernels->vw, nr = p->kernels->nr, size = w->y->shape.block_k;
    size_t pairs = (size_t)(p->batch * p->kv_heads);
    w->panel = attn_min_i64(nr, attn_ceil_div(size, vw) * vw);
    w->block_floats = attn_ceil_div(size, w->panel) * w->panel * p->d;
    w->k = attn_arena_array(arena, pairs * (size_t)w->y->columns, (size_t)w->block_floats * sizeof(float));
    w->v = attn_dense_values_as_they_lie(p) ? NULL : attn_arena_array(arena, pairs * (size_t)p->m, (size_t)p->dv_pad * sizeof(float));
    w->used = attn_arena_array(arena, pairs, (size_t)w->y->columns);
    if (w->k == NULL || w->used == NULL || (w->v == NULL && !attn_dense_values_as_they_lie(p))) {
        return attn_fail_memory(pairs * (size_t)(w->y->columns * w->block_floats) * sizeof(float));
    }
    mark_used(w);
    return ATTN_OK;
}

static attn_status workers_create(const blocks *w, worker **workers, int threads, attn_arena *arena)
{
    const dense_problem *p = w->p;
    worker *made = attn_arena_array(arena, (size_t)threads, sizeof *made);
    for (int t = 0; t < threads && made != NULL; t++) {
        worker *x = &made[t];
        x->q = attn_arena_array(arena, TASK_ROWS, (size_t)p->d * sizeof(float));
        x->s = attn_arena_array(arena, DENSE_ROWS * STEP, sizeof(float));
        x->o = attn_arena_array(arena, TASK_ROWS, (size_t)p->dv_pad * sizeof(float));
        x->m = attn_arena_array(arena, 3 * TASK_ROWS, sizeof(float));
        x->rows = attn_arena_array(arena, DENSE_PACK_ROWS, (size_t)p->d * sizeof(float));
        x->begin = attn_arena_array(arena, 2 * TASK_ROWS, sizeof(int64_t));
        x->segments = attn_arena_array(arena, 2 * STEP, sizeof(segment));
        if (x->q == NULL || x->s == NULL || x->o == NULL || x->m == NULL || x->rows == NULL || x->begin == NULL ||
            x->segments == NULL) {
            made = NULL;
            break;
        }
        x->l = x->m + TASK_ROWS;
        x->alpha = x->l + TASK_ROWS;
        x->end = x->begin + TASK_ROWS;
        x->next = x->segments + STEP;
    }
    *workers = made;
    return made != NULL ? ATTN_OK : attn_fail_memory((size_t)threads * TASK_ROWS * (size_t)(p->d + p->dv) * sizeof(float));
}

static int seen_by_all(const worker *x, const segment *g) { return x->all_begin <= g->first && g->first + g->keys <= x->all_end; }

/* The part of a segment that rows [r, r + rows) can see: its first `*keys` keys; masked: whether some row sees less of them. */
static int visible_part(const worker *x, const segment *g, int64_t r, int64_t rows, int64_t *keys)
{
    int64_t low = INT64_MAX, high = 0, inner_low = 0, inner_high = INT64_MAX;
    for (int64_t i = r; i < r + rows; i++) {
        if (x->begin[i] < x->end[i]) {
            low = attn_min_i64(low, x->begin[i]);
            high = attn_max_i64(high, x->end[i]);
        }
        inner_low = attn_max_i64(inner_low, x->begin[i]);
        inner_high = attn_min_i64(inner_high, x->end[i]);
    }
    *keys = low < g->first + g->keys ? attn_min_i64(g->keys, high - g->first) : 0;
    return inner_low > g->first || inner_high < g->first + *keys;
}

/* Scores of one segment that are not plain products: bias, soft caps and the like, keys past its end, and what the masks hide. */
static void adjust_scores(const blocks *w, const worker *x, const segment *g, float *s, int64_t b, int64_t h, int64_t list, int64_t n0,
                          int64_t r, int64_t rows, int64_t keys, int64_t count, int cut)
{
    const dense_problem *p = w->p;
    const attn_plan_layout *y = w->y;
    for (int64_t i = r; i < r + rows; i++, s += STEP) {
        int64_t n = n0 + i;
        if (attn_dense_needs_adjust(p)) {
            attn_dense_adjust(p, s, b, h, n, g->first, keys);
        }
        for (int64_t j = keys; j < count; j++) {
            s[j] = -INFINITY;
        }
        if (cut) {
            attn_dense_mask_row(s, g->first, keys, x->begin[i], x->end[i]);
        }
        if (g->mask != ATTN_PLAN_FULL) {
            attn_layout_mask(y, list, g->mask, s, n + (p->m - p->n), n % y->shape.block_q, g->first, g->inside, keys);
        }
    }
}

/* A few rows against the segments of a step. */
static void attend(const blocks *w, worker *x, int64_t b, int64_t h, int64_t list, int64_t n0, int64_t r, int64_t rows, int64_t segments)
{
    const dense_problem *p = w->p;
    const attn_tile_kernels *kernels = p->kernels;
    int64_t at = 0, vw = kernels->vw, columns[STEP], lengths[STEP];
    int adjusted = attn_dense_needs_adjust(p);
    for (int64_t i = 0; i < segments; i++) {
        const segment *g = &x->segments[i];
        int64_t keys = g->keys;
        int cut = !seen_by_all(x, g) && visible_part(x, g, r, rows, &keys);
        lengths[i] = attn_max_i64(keys, 0);
        columns[i] = at;
        if (keys <= 0) {
            continue;
        }
        int64_t count = attn_ceil_div(keys, vw) * vw;
        kernels->product(rows, count, p->d, x->q + r * p->d, p->d, 1, g->k, w->panel, w->panel * p->d, x->s + at, STEP, 0);
        if (adjusted || cut || count > keys || g->mask != ATTN_PLAN_FULL) {
            adjust_scores(w, x, g, x->s + at, b, h, list, n0, r, rows, keys, count, cut);
        }
        at += count;
    }
    if (at == 0) {
        return;
    }
    kernels->softmax(rows, x->s, STEP, at, x->m + r, x->l + r, x->alpha);
    for (int64_t a = 0; a < rows; a++) {
        if (x->alpha[a] != 1.0f) {
            kernels->scale(x->o + (r + a) * p->dv_pad, p->dv_pad, x->alpha[a]);
        }
    }
    int64_t pair = b * p->kv_heads + h / p->group;
    for (int64_t i = 0; i < segments; i++) {
        int64_t first = x->segments[i].first;
        if (lengths[i] > 0) {
            kernels->product(rows, p->dv_pad, lengths[i], x->s + columns[i], STEP, 1, values(w, pair, first), value_stride(w),
                             kernels->nr, x->o + r * p->dv_pad, p->dv_pad, 1);
        }
    }
}

/* The next segments of a row, at most STEP columns: entry *e, from key *inside of its block on. */
static int64_t next_step(const blocks *w, worker *x, int64_t pair, int64_t last, int64_t *e, int64_t *inside)
{
    const dense_problem *p = w->p;
    const attn_plan_layout *y = w->y;
    int64_t size = y->shape.block_k, vw = p->kernels->vw, room = STEP, count = 0;
    int joins = size % p->kernels->nr == 0;
    while (*e < last) {
        int64_t column = y->column[*e], first = column * size + *inside;
        int64_t rest = attn_min_i64(size, p->m - column * size) - *inside, keys = attn_min_i64(rest, STEP);
        int64_t padded = attn_ceil_div(keys, vw) * vw;
        if (padded > room) {
            break;
        }
        segment *before = count > 0 ? &x->next[count - 1] : NULL;
        if (joins && before != NULL && before->mask == ATTN_PLAN_FULL && y->mask[*e] == ATTN_PLAN_FULL &&
            before->first + before->keys == first) {
            before->keys += keys;
        } else {
            x->next[count++] = (segment){first, keys, *inside, y->mask[*e],
                                             w->k + (pair * y->columns + column) * w->block_floats + *inside * p->d};
        }
        room -= padded;
        *inside += keys;
        if (keys == rest) {
            *inside = 0;
            ++*e;
        }
    }
    return count;
}

/* Bring a share of the next step's keys and values near while this step is computed: lists jump where no hardware prefetcher follows. */
static void prefetch_share(const blocks *w, const worker *x, int64_t pair, int64_t segments, int64_t share, int64_t shares)
{
    const dense_problem *p = w->p;
    for (int64_t i = 0; i < segments; i++) {
        const segment *g = &x->next[i];
        int64_t first = g->keys * share / shares, count = g->keys * (share + 1) / shares - first;
        attn_exec_prefetch(g->k + first * p->d, p->d, count, p->d);
        attn_exec_prefetch(values(w, pair, g->first + first), value_stride(w), count, p->dv);
    }
}

/* Whether every row of a task sees all keys of a step. */
static int nothing_hidden(const worker *x, int64_t segments)
{
    int free = 1;
    for (int64_t i = 0; i < segments && free; i++) {
        free = x->segments[i].mask == ATTN_PLAN_FULL && seen_by_all(x, &x->segments[i]);
    }
    return free;
}

static void run_task(const blocks *w, worker *x, int64_t b, int64_t h, int64_t block, int64_t part, const attn_tensor *o,
                     const attn_tensor *lse)
{
    const dense_problem *p = w->p;
    const attn_plan_layout *y = w->y;
    int64_t n0 = block * y->shape.block_q + part * TASK_ROWS, list = attn_layout_list(y, p, b, h), row = list * y->rows + block;
    int64_t rows = attn_min_i64(attn_min_i64(TASK_ROWS, (block + 1) * y->shape.block_q - n0), p->n - n0);
    float factor = (float)(p->base2 ? p->scale * ATTN_LOG2E : p->scale);
    x->all_begin = 0;
    x->all_end = p->m;
    for (int64_t r = 0; r < rows; r++) {
        attn_dense_load_row(p, x->q + r * p->d, &p->in->q, b, h, n0 + r, p->d, factor);
        attn_dense_visible(p, b, n0 + r, &x->begin[r], &x->end[r]);
        x->all_begin = attn_max_i64(x->all_begin, x->begin[r]);
        x->all_end = attn_min_i64(x->all_end, x->end[r]);
        attn_dense_begin_row(p, h, &x->m[r], &x->l[r]);
    }
    memset(x->o, 0, (size_t)(attn_max_i64(rows, 0) * p->dv_pad) * sizeof(float));
    int64_t e = y->start[row], inside = 0, pair = b * p->kv_heads + h / p->group, mr = p->kernels->mr;
    int64_t coming = next_step(w, x, pair, y->start[row + 1], &e, &inside);
    while (coming > 0) {
        int64_t segments = coming;
        segment *swap = x->segments;
        x->segments = x->next;
        x->next = swap;
        coming = next_step(w, x, pair, y->start[row + 1], &e, &inside);
        /* Where nothing is hidden, so many rows that a block serves several tiles while it is in L1; else a tile follows the mask. */
        int64_t height = nothing_hidden(x, segments) ? DENSE_ROWS : mr;
        for (int64_t r = 0; r < rows; r += height) {
            prefetch_share(w, x, pair, coming, r / height, attn_ceil_div(rows, height));
            attend(w, x, b, h, list, n0, r, attn_min_i64(height, rows - r), segments);
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        attn_dense_finish_row(p, o, lse, b, h, n0 + r, x->o + r * p->dv_pad, x->m[r], x->l[r]);
    }
}

/* Query blocks of all lists by falling length, so that no long one comes last: a counting sort over powers of two. */
static attn_status order_tasks(blocks *w, int64_t parts, attn_arena *arena)
{
    const dense_problem *p = w->p;
    const attn_plan_layout *y = w->y;
    int64_t tasks = p->batch * p->heads * y->rows, count[65] = {0};
    w->order = attn_arena_array(arena, (size_t)(tasks * parts), sizeof(int64_t));
    if (w->order == NULL) {
        return attn_fail_memory((size_t)(tasks * parts) * sizeof(int64_t));
    }
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t i = 0; i < tasks; i++) {
            int64_t head = i / y->rows, row = attn_layout_list(y, p, head / p->heads, head % p->heads) * y->rows + i % y->rows;
            int64_t class = 0;
            for (int64_t length = y->start[row + 1] - y->start[row]; length > 0; length >>= 1) {
                class++;
            }
            for (int64_t part = 0; part < parts; part++) {
                if (pass == 0) {
                    count[64 - class]++;
                } else {
                    w->order[count[64 - class]++] = i * parts + part;
                }
            }
        }
        for (int64_t c = 0, sum = 0; c < 65 && pass == 0; c++) {
            int64_t here = count[c];
            count[c] = sum;
            sum += here;
        }
    }
    return ATTN_OK;
}

static attn_status run(blocks *w, const attn_tensor *o, const attn_tensor *lse, attn_arena *arena, int threads)
{
    const dense_problem *p = w->p;
    const attn_plan_layout *y = w->y;
    int64_t parts = attn_ceil_div(attn_min_i64(y->shape.block_q, p->n), TASK_ROWS), tasks = p->batch * p->heads * y->rows * parts;
    int64_t packs = p->batch * p->kv_heads * y->columns;
    worker *workers;
    ATTN_TRY(blocks_create(w, arena));
    ATTN_TRY(order_tasks(w, parts, arena));
    ATTN_TRY(workers_create(w, &workers, threads, arena));
#pragma omp parallel num_threads(threads)
    {
        worker *x = &workers[omp_get_thread_num()];
#pragma omp for schedule(static)
        for (int64_t i = 0; i < packs; i++) {
            if (w->used[i]) {
                pack_block(w, i / y->columns, i % y->columns, x->rows);
            }
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < tasks; i++) {
            int64_t task = w->order[i] / parts, head = task / y->rows;
            run_task(w, x, head / p->heads, head % p->heads, task % y->rows, w->order[i] % parts, o, lse);
        }
    }
    return ATTN_OK;
}

attn_status attn_blocks_forward(const attn_plan_layout *layout, const attn_dense_settings *settings,
                                const attn_dense_inputs *inputs, const attn_tensor *o, const attn_tensor *lse, const attn_exec *exec)
{
    dense_problem p;
    attn_scratch scratch;
    ATTN_TRY(attn_dense_check(&p, settings, inputs));
    ATTN_TRY(attn_layout_check(layout, &p));
    ATTN_TRY(attn_dense_check_tensor("o", o, "[B,H,N,Dv]", 4, (int64_t[]){p.batch, p.heads, p.n, p.dv}, 1));
    if (lse != NULL) {
        ATTN_TRY(attn_dense_check_f32("lse", lse, "[B,H,N]", 3, (int64_t[]){p.batch, p.heads, p.n}));
    }
    if (p.batch * p.heads * p.n == 0) {
        return ATTN_OK;
    }
    ATTN_TRY(attn_scratch_begin(&scratch, exec));
    blocks w = {.p = &p, .y = layout};
    attn_status status = run(&w, o, lse, scratch.arena, attn_exec_threads(exec));
    attn_scratch_end(&scratch);
    return status;
}
