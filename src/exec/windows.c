/* Window attention. A task is one block of one key head: its window as a panel, the block's queries of all heads of the group as rows.
 * Slots outside the image that are all alike, because there are no relative tables, are one key with its number as weight. Big windows
 * go through the online softmax a few window rows at a time. Backward works on stripes of blocks, each with its own sum of
 * key and value gradients; how the image is cut into stripes does not depend on the threads. */
#include "exec/windows.h"
#include "exec/softmax.h"

#include "kernel/tile.h"

#include <math.h>
#include <omp.h>
#include <string.h>

#define STEP_KEYS 512  /* keys of a step of the online softmax: whole window rows, at least one */
#define ROWS 24        /* query rows that go through a step together */
#define BACK_ROWS 64   /* in backward, where each pass of rows adds to the gradients of all keys */
#define MOST_STRIPES 8 /* of the image in backward */
#define TASKS_AHEAD 2  /* what one task asks for comes too late for the next */
#define RUNS 8         /* of neighbouring tasks per thread */

typedef struct problem {
    const attn_windows *w;
    const attn_tile_kernels *kernels;
    int64_t group, d_pad, dv_pad, rows;
    int64_t blocks[2], window[2], out[2], per_block; /* queries of a whole block */
    int64_t step_rows, step_keys; /* window rows of a step; its keys, up to whole panels */
    int64_t rel_count[2], rel_pad[2];
    float *rel[2];      /* packed tables [rel_pad * d], times their factor */
    float *rel_rows[2]; /* the same as rows [rel_pad][d_pad], for backward */
    float factor;       /* of the scores, in base 2 */
    int all_slots;      /* slots outside the image are keys one by one */
} problem;

static int64_t up(int64_t count, int64_t unit) { return attn_ceil_div(count, unit) * unit; }

static void pack(const attn_tile_kernels *kernels, float *to, const float *from, int64_t stride, int64_t rows, int64_t width)
{
    int64_t nr = kernels->nr;
    for (int64_t j = 0; j < rows; j += nr, to += width * nr) {
        kernels->pack_transposed(to, nr, from + j * stride, ATTN_F32, stride, attn_min_i64(nr, rows - j), width);
    }
}

static attn_status make_tables(problem *p, attn_arena *arena)
{
    const attn_windows *w = p->w;
    const float *tables[2] = {w->rel_h, w->rel_w};
    float factor = (float)(ATTN_LOG2E * (w->scale_relative ? w->scale : 1));
    for (int axis = 0; axis < 2 && w->rel_h != NULL; axis++) {
        int64_t padded = p->rel_pad[axis];
        float *rows = attn_arena_array(arena, (size_t)padded, (size_t)p->d_pad * sizeof *rows);
        p->rel[axis] = attn_arena_array(arena, (size_t)up(padded, p->kernels->nr), (size_t)w->d * sizeof(float));
        if (rows == NULL || p->rel[axis] == NULL) {
            return attn_fail_memory((size_t)(padded * p->d_pad) * sizeof *rows);
        }
        memset(rows, 0, (size_t)(padded * p->d_pad) * sizeof *rows);
        for (int64_t r = 0; r < p->rel_count[axis]; r++) {
            p->kernels->load_row(rows + r * p->d_pad, tables[axis] + r * w->d, ATTN_F32, w->d, factor);
        }
        pack(p->kernels, p->rel[axis], rows, p->d_pad, padded, w->d);
        p->rel_rows[axis] = rows;
    }
    return ATTN_OK;
}

static attn_status make_problem(problem *p, const attn_windows *w, int64_t rows, attn_arena *arena)
{
    const attn_tile_kernels *kernels = attn_tile_kernels_get();
    *p = (problem){.w = w, .kernels = kernels, .group = w->heads / w->kv_heads, .d_pad = up(w->d, kernels->vw),
                   .dv_pad = up(w->dv, kernels->vw), .per_block = 1, .factor = (float)(w->scale * ATTN_LOG2E),
                   .all_slots = !w->masked && w->rel_h != NULL};
    int64_t most[2];
    for (int axis = 0; axis < 2; axis++) {
        p->blocks[axis] = attn_ceil_div(w->grid[axis], w->block[axis]);
        p->window[axis] = attn_windows_extent(w, axis);
        p->out[axis] = attn_windows_out(w, axis);
        p->per_block *= attn_min_i64(attn_ceil_div(w->block[axis], w->stride[axis]), p->out[axis]);
        p->rel_count[axis] = w->rel_h != NULL ? 2 * p->window[axis] - 1 : 0;
        p->rel_pad[axis] = up(p->rel_count[axis], kernels->vw);
        most[axis] = p->all_slots ? p->window[axis] : attn_min_i64(p->window[axis], w->grid[axis]);
    }
    int64_t all = p->per_block * p->group;
    p->rows = attn_min_i64(up(attn_ceil_div(all, attn_ceil_div(all, rows)), kernels->mr), all); /* alike in all passes */
    p->step_rows = attn_max_i64(1, STEP_KEYS / most[1]);
    p->step_keys = up(attn_min_i64(p->step_rows, most[0]) * most[1] + 1, kernels->nr);
    return make_tables(p, arena);
}

/* ---- One block ---- */

/* A block's part of its window: rows [top, bottom) and columns [left, right), in the image unless all slots are keys. */
typedef struct window {
    int64_t y, x; /* pixel of slot (0, 0) */
    int64_t top, bottom, left, right;
    int64_t outside; /* slots that are one key, after the last row */
} window;

/* A query row of a block: head of the group, place in the block, output token. */
typedef struct query {
    int64_t head, i, j, token;
} query;

typedef struct worker {
    query *at;             /* [rows] */
    float *rows;           /* a step's keys as rows, before packing [step_keys][d_pad] */
    float *k, *v;          /* panels of a step, and its values [step_keys][dv_pad] */
    float *q, *o, *m, *l, *alpha; /* [rows] rows */
    float *s, *rel[2];     /* [rows][step_keys], [rows][rel_pad] */
    /* Backward only. */
    float *v_packed, *ds, *grad_o, *dq, *dk, *dv, *grad_rel[2];
} worker;

static window window_of(const problem *p, int64_t block)
{
    const attn_windows *w = p->w;
    window at = {.y = block / p->blocks[1] * w->block[0] - w->halo[0], .x = block % p->blocks[1] * w->block[1] - w->halo[1],
                 .bottom = p->window[0], .right = p->window[1]};
    if (!p->all_slots) {
        at.top = attn_max_i64(0, -at.y);
        at.left = attn_max_i64(0, -at.x);
        at.bottom = attn_min_i64(at.bottom, w->grid[0] - at.y);
        at.right = attn_min_i64(at.right, w->grid[1] - at.x);
        at.outside = w->masked ? 0 : p->window[0] * p->window[1] - (at.bottom - at.top) * (at.right - at.left);
    }
    return at;
}

/* Keys of window rows [first, end); the last step has the one for all slots outside too. */
static int64_t keys_of(const window *at, int64_t first, int64_t end)
{
    return (end - first) * (at->right - at->left) + (end == at->bottom && at->outside > 0);
}

static void load_rows(const problem *p, float *to, int64_t pad, const float *from, int64_t stride, int64_t rows, int64_t width, float factor)
{
    if (width == pad && stride == width) {
        p->kernels->load_row(to, from, ATTN_F32, rows * width, factor);
        return;
    }
    for (int64_t r = 0; r < rows; r++, to += pad, from += stride) {
        p->kernels->load_row(to, from, ATTN_F32, width, factor);
        memset(to + width, 0, (size_t)(pad - width) * sizeof *to);
    }
}

static float *row_of(const attn_windows_view *view, int64_t b, int64_t h, int64_t token)
{
    return view->data + b * view->batch + h * view->head + token * view->token;
}

/* Window rows [first, end) of keys or values as rows of `pad` numbers, zero rows up to `padded`; `outside` (NULL: zeros) is what slots
 * outside the image hold. */
static void gather(const problem *p, const attn_windows_view *from, const float *outside, int64_t b, int64_t h, const window *at,
                   int64_t first, int64_t end, int64_t padded, int64_t width, int64_t pad, float factor, float *to)
{
    const int64_t *grid = p->w->grid;
    int64_t left = attn_max_i64(at->left, -at->x), right = attn_min_i64(at->right, grid[1] - at->x);
    int64_t before = (left - at->left) * pad, after = (at->right - right) * pad, across = (at->right - at->left) * pad;
    float *stop = to + padded * pad;
    for (int64_t a = first; a < end; a++, to += across) {
        int64_t y = at->y + a;
        if (y < 0 || y >= grid[0]) {
            memset(to, 0, (size_t)across * sizeof *to);
            continue;
        }
        memset(to, 0, (size_t)before * sizeof *to);
        load_rows(p, to + before, pad, row_of(from, b, h, y * grid[1] + at->x + left), from->token, right - left, width, factor);
        memset(to + across - after, 0, (size_t)after * sizeof *to);
    }
    memset(to, 0, (size_t)(stop - to) * sizeof *to);
    if (end == at->bottom && at->outside > 0 && outside != NULL) {
        p->kernels->load_row(to, outside + h * width, ATTN_F32, width, factor);
    }
}

/* Queries of the block that lie in the image, for one head: rows * columns. */
static void block_queries(const problem *p, int64_t block, int64_t count[2])
{
    const attn_windows *w = p->w;
    int64_t corner[2] = {block / p->blocks[1] * w->block[0], block % p->blocks[1] * w->block[1]};
    for (int axis = 0; axis < 2; axis++) {
        count[axis] = attn_ceil_div(attn_min_i64(w->block[axis], w->grid[axis] - corner[axis]), w->stride[axis]);
    }
}

/* Query rows first ... of a block: where they are, they themselves (not scaled), and their products with the relative tables. */
static void load_queries(const problem *p, worker *t, int64_t b, int64_t kv, int64_t block, const int64_t count[2], int64_t first,
                         int64_t rows)
{
    const attn_windows *w = p->w;
    int64_t y = block / p->blocks[1] * (w->block[0] / w->stride[0]), x = block % p->blocks[1] * (w->block[1] / w->stride[1]);
    query at = {.head = first / (count[0] * count[1]), .i = first / count[1] % count[0], .j = first % count[1]};
    for (int64_t r = 0; r < rows;) {
        int64_t run = attn_min_i64(rows - r, count[1] - at.j);
        at.token = (y + at.i) * p->out[1] + x + at.j;
        load_rows(p, t->q + r * p->d_pad, p->d_pad, row_of(&w->q, b, kv * p->group + at.head, at.token), w->q.token, run, w->d, 1);
        for (int64_t end = r + run; r < end; r++, at.j++, at.token++) {
            t->at[r] = at;
        }
        at.j = 0;
        at.i++;
        if (at.i == count[0]) {
            at.i = 0;
            at.head++;
        }
    }
    for (int axis = 0; axis < 2 && p->rel[axis] != NULL; axis++) {
        p->kernels->product(rows, p->rel_pad[axis], w->d, t->q, p->d_pad, 1, p->rel[axis], p->kernels->nr, w->d * p->kernels->nr,
                            t->rel[axis], p->rel_pad[axis], 0);
    }
}

/* Where slot (0, 0) lies in a query's row of the relative tables. */
static int64_t relative_base(const problem *p, int axis, int64_t place) { return p->window[axis] - 1 - place * p->w->step[axis]; }

/* Keys of a step that go through the panels: all, or all but a single one beyond whole vectors, as in windows of 7 x 7. */
static int64_t packed_keys(const problem *p, int64_t keys)
{
    int64_t vw = p->kernels->vw;
    return keys > vw && keys % vw == 1 ? keys - 1 : up(keys, vw);
}

/* Scores of some rows in base 2 over window rows [first, end): s [rows][step_keys], columns past the keys -inf. */
static void score(const problem *p, worker *t, int64_t rows, const window *at, int64_t first, int64_t end)
{
    const attn_tile_kernels *kernels = p->kernels;
    int64_t across = at->right - at->left, keys = keys_of(at, first, end), padded = up(keys, kernels->vw), packed = packed_keys(p, keys);
    kernels->product(rows, packed, p->w->d, t->q, p->d_pad, 1, t->k, kernels->nr, p->w->d * kernels->nr, t->s, p->step_keys, 0);
    float weight = end == at->bottom && at->outside > 0 ? log2f((float)at->outside) : 0;
    for (int64_t r = 0; r < rows; r++) {
        float *s = t->s + r * p->step_keys;
        if (packed < keys) {
            s[packed] = kernels->dot(t->q + r * p->d_pad, t->rows + packed * p->d_pad, p->w->d);
        }
        s[keys - 1] += weight;
        for (int64_t i = keys; i < padded; i++) {
            s[i] = -INFINITY;
        }
        if (p->rel[0] == NULL) {
            continue;
        }
        const float *by_row = t->rel[0] + r * p->rel_pad[0] + relative_base(p, 0, t->at[r].i);
        const float *by_column = t->rel[1] + r * p->rel_pad[1] + relative_base(p, 1, t->at[r].j) + at->left;
        for (int64_t a = first; a < end; a++, s += across) {
            float up_by = by_row[a];
            for (int64_t c = 0; c < across; c++) {
                s[c] += up_by + by_column[c];
            }
        }
    }
}

/* A step's keys in t->rows and packed, its values in t->v, both with zero rows up to `padded`. */
static void load_step(const problem *p, worker *t, int64_t b, int64_t kv, const window *at, int64_t first, int64_t end, int64_t padded)
{
    const attn_windows *w = p->w;
    gather(p, &w->k, w->pad_k, b, kv, at, first, end, padded, w->d, p->d_pad, p->factor, t->rows);
    pack(p->kernels, t->k, t->rows, p->d_pad, packed_keys(p, keys_of(at, first, end)), w->d);
    gather(p, &w->v, w->pad_v, b, kv, at, first, end, padded, w->dv, p->dv_pad, 1, t->v);
}

/* Ask for pixels [low, high) of a rectangle that is `columns` wide; `first` is its corner, `across` the width of the image. */
static void prefetch_pixels(const attn_windows_view *of, int64_t b, int64_t h, int64_t first, int64_t columns, int64_t across, int64_t width,
                            int64_t low, int64_t high)
{
    while (low < high) {
        int64_t x = low % columns, some = attn_min_i64(columns - x, high - low);
        int whole = of->token == width; /* the run is one piece */
        attn_prefetch_ahead(row_of(of, b, h, first + low / columns * across + x), (ptrdiff_t)(of->token * (int64_t)sizeof(float)),
                            whole ? 1 : some, (size_t)(whole ? some * width : width) * sizeof(float));
        low += some;
    }
}

/* What a coming task reads and writes, and how much of it was asked for: rectangles of keys and of queries. */
typedef struct ahead {
    int64_t b, kv, share, shares;
    int64_t key, key_columns, keys, query, query_columns, queries; /* corner (a token), width and pixels */
} ahead;

static ahead look_ahead(const problem *p, int64_t task, int64_t shares)
{
    const attn_windows *w = p->w;
    int64_t blocks = p->blocks[0] * p->blocks[1], pair = task / blocks, block = task % blocks, count[2];
    window at = window_of(p, block);
    int64_t top = attn_max_i64(0, at.y + at.top), left = attn_max_i64(0, at.x + at.left);
    ahead a = {.b = pair / w->kv_heads, .kv = pair % w->kv_heads, .shares = shares, .key = top * w->grid[1] + left,
               .key_columns = attn_min_i64(w->grid[1], at.x + at.right) - left};
    a.keys = (attn_min_i64(w->grid[0], at.y + at.bottom) - top) * a.key_columns;
    block_queries(p, block, count);
    a.query = block / p->blocks[1] * (w->block[0] / w->stride[0]) * p->out[1] + block % p->blocks[1] * (w->block[1] / w->stride[1]);
    a.query_columns = count[1];
    a.queries = count[0] * count[1];
    return a;
}

/* Ask for a share: no hardware prefetcher follows windows, and the machine waits when too much is asked for at once. */
static void prefetch_share(const problem *p, ahead *a)
{
    const attn_windows *w = p->w;
    if (a->share == a->shares || a->b >= w->batch) {
        return;
    }
    int64_t low = a->keys * a->share / a->shares, high = a->keys * (a->share + 1) / a->shares;
    prefetch_pixels(&w->k, a->b, a->kv, a->key, a->key_columns, w->grid[1], w->d, low, high);
    prefetch_pixels(&w->v, a->b, a->kv, a->key, a->key_columns, w->grid[1], w->dv, low, high);
    low = a->queries * a->share / a->shares, high = a->queries * (a->share + 1) / a->shares;
    for (int64_t h = a->kv * p->group; h < (a->kv + 1) * p->group; h++) {
        prefetch_pixels(&w->q, a->b, h, a->query, a->query_columns, p->out[1], w->d, low, high);
        prefetch_pixels(&w->o, a->b, h, a->query, a->query_columns, p->out[1], w->dv, low, high);
    }
    a->share++;
}

static void attend(const problem *p, worker *t, int64_t task)
{
    const attn_windows *w = p->w;
    const attn_tile_kernels *kernels = p->kernels;
    int64_t blocks = p->blocks[0] * p->blocks[1], block = task % blocks, b = task / blocks / w->kv_heads, kv = task / blocks % w->kv_heads;
    window at = window_of(p, block);
    int64_t count[2], all;
    block_queries(p, block, count);
    all = p->group * count[0] * count[1];
    int single = at.bottom - at.top <= p->step_rows; /* one step holds the whole window: it is gathered once for all rows */
    /* A share is asked for before each part of a pass. */
    ahead coming = look_ahead(p, task + TASKS_AHEAD, single ? 3 * attn_ceil_div(all, p->rows) : 0);
    for (int64_t row = 0; row < all; row += p->rows) {
        int64_t rows = attn_min_i64(p->rows, all - row);
        load_queries(p, t, b, kv, block, count, row, rows);
        for (int64_t r = 0; r < rows; r++) {
            t->m[r] = -INFINITY;
            t->l[r] = 0;
        }
        for (int64_t first = at.top; first < at.bottom; first += p->step_rows) {
            int64_t end = attn_min_i64(first + p->step_rows, at.bottom), keys = keys_of(&at, first, end);
            if (!single || row == 0) {
                load_step(p, t, b, kv, &at, first, end, attn_max_i64(keys, packed_keys(p, keys)));
            }
            prefetch_share(p, &coming);
            score(p, t, rows, &at, first, end);
            prefetch_share(p, &coming);
            kernels->softmax(rows, t->s, p->step_keys, up(keys, kernels->vw), t->m, t->l, t->alpha);
            for (int64_t r = 0; r < rows && first > at.top; r++) {
                if (t->alpha[r] != 1.0f) {
                    kernels->scale(t->o + r * p->dv_pad, p->dv_pad, t->alpha[r]);
                }
            }
            prefetch_share(p, &coming);
            kernels->product(rows, p->dv_pad, keys, t->s, p->step_keys, 1, t->v, p->dv_pad, kernels->nr, t->o, p->dv_pad, first > at.top);
        }
        for (int64_t r = 0; r < rows; r++) {
            int64_t head = kv * p->group + t->at[r].head, token = t->at[r].token;
            kernels->load_row(row_of(&w->o, b, head, token), t->o + r * p->dv_pad, ATTN_F32, w->dv, 1 / t->l[r]);
            if (w->lse != NULL) {
                w->lse[(b * w->heads + head) * p->out[0] * p->out[1] + token] = attn_softmax_lse(t->m[r], t->l[r]);
            }
        }
    }
}

static attn_status make_workers(const problem *p, worker **workers, attn_arena *arena, int threads, int backward)
{
    worker *made = attn_arena_array(arena, (size_t)threads, sizeof *made);
    size_t keys = (size_t)p->step_keys, d = (size_t)p->d_pad, dv = (size_t)p->dv_pad, rel0 = (size_t)p->rel_pad[0],
           rel1 = (size_t)p->rel_pad[1], slack = (size_t)p->kernels->nr, rows = (size_t)p->rows;
    size_t each = keys * (2 * d + dv) + rows * (d + dv + 3 + keys + rel0 + rel1) + slack * (d + dv);
    size_t more = backward ? keys * (3 * dv + 2 * d) + rows * (keys + dv + d + rel0 + rel1) + slack * dv : 0;
    for (int i = 0; i < threads && made != NULL; i++) {
        float *at = attn_arena_array(arena, each + more, sizeof *at);
        made[i].at = attn_arena_array(arena, rows, sizeof(query));
        if (at == NULL || made[i].at == NULL) {
            made = NULL;
            break;
        }
        worker *t = &made[i];
        t->rows = at, at += keys * d;
        t->k = at, at += (keys + slack) * d;
        t->v = at, at += (keys + slack) * dv;
        t->q = at, at += rows * d;
        t->o = at, at += rows * dv;
        t->m = at, at += rows;
        t->l = at, at += rows;
        t->alpha = at, at += rows;
        t->s = at, at += rows * keys;
        t->rel[0] = at, at += rows * rel0;
        t->rel[1] = at, at += rows * rel1;
        if (backward) {
            t->v_packed = at, at += (keys + slack) * dv;
            t->ds = at, at += rows * keys;
            t->grad_o = at, at += rows * dv;
            t->dq = at, at += rows * d;
            t->dk = at, at += keys * d;
            t->dv = at, at += keys * dv;
            t->grad_rel[0] = at, at += rows * rel0;
            t->grad_rel[1] = at, at += rows * rel1;
        }
    }
    *workers = made;
    return made != NULL ? ATTN_OK : attn_fail_memory((each + more) * sizeof(float));
}

attn_status attn_windows_forward(const attn_windows *w, attn_arena *arena, int threads)
{
    problem p;
    worker *workers;
    if (w->heads == 0) {
        return ATTN_OK;
    }
    ATTN_TRY(make_problem(&p, w, ROWS, arena));
    ATTN_TRY(make_workers(&p, &workers, arena, threads, 0));
    int64_t blocks = p.blocks[0] * p.blocks[1], tasks = w->batch * w->kv_heads * blocks;
    /* Long runs: what a task asks for is for the same thread. */
    int64_t run = attn_ceil_div(tasks, RUNS * threads);
#pragma omp parallel for schedule(dynamic, run) num_threads(threads) if (threads > 1 && tasks > 4)
    for (int64_t i = 0; i < tasks; i++) {
        attend(&p, &workers[omp_get_thread_num()], i);
    }
    return ATTN_OK;
}

/* ---- Backward ---- */

/* Some rows of blocks of one key head, with sums of their own: keys' and values' gradients of the image rows that their windows reach, and
 * the tables'. */
typedef struct stripe {
    int64_t first_block_row, end_block_row, top, bottom;
    float *dk, *dv, *rel[2], *pad_k, *pad_v;
} stripe;

static void load_gradients(const problem *p, worker *t, const attn_windows_gradients *grad, int64_t b, int64_t kv, int64_t rows)
{
    int64_t dv = p->w->dv;
    for (int64_t r = 0; r < rows; r++) {
        query q = t->at[r];
        int64_t head = kv * p->group + q.head;
        const float *from = row_of(&grad->o, b, head, q.token), *o = row_of(&p->w->o, b, head, q.token);
        memcpy(t->grad_o + r * p->dv_pad, from, (size_t)dv * sizeof(float));
        memset(t->grad_o + r * p->dv_pad + dv, 0, (size_t)(p->dv_pad - dv) * sizeof(float));
        t->alpha[r] = p->kernels->dot(from, o, dv);
        t->m[r] = (float)((double)p->w->lse[(b * p->w->heads + head) * p->out[0] * p->out[1] + q.token] * ATTN_LOG2E);
    }
}

/* Sums of ds over the columns and over the rows of the window, placed in the tables' order; ds of one step is added. */
static void sum_relative(const problem *p, worker *t, int64_t rows, const window *at, int64_t first, int64_t end)
{
    int64_t across = at->right - at->left;
    for (int64_t r = 0; r < rows; r++) {
        query q = t->at[r];
        const float *ds = t->ds + r * p->step_keys;
        float *by_row = t->grad_rel[0] + r * p->rel_pad[0] + relative_base(p, 0, q.i);
        float *by_column = t->grad_rel[1] + r * p->rel_pad[1] + relative_base(p, 1, q.j) + at->left;
        for (int64_t a = first; a < end; a++, ds += across) {
            float sum = 0;
            for (int64_t c = 0; c < across; c++) {
                sum += ds[c];
                by_column[c] += ds[c];
            }
            by_row[a] += sum;
        }
    }
}

/* Add rows of a step's key or value gradients to the stripe's sum, and that of the slots outside the image to `outside`; either may be
 * NULL. */
static void scatter(const problem *p, const stripe *to, float *sum, float *outside, const float *from, const window *at, int64_t first,
                    int64_t end, int64_t pad)
{
    int64_t across = at->right - at->left, columns = p->w->grid[1];
    int64_t left = attn_max_i64(at->left, -at->x), right = attn_min_i64(at->right, columns - at->x);
    for (int64_t a = first; a < end && sum != NULL; a++) {
        int64_t y = at->y + a;
        if (y >= to->top && y < to->bottom) {
            p->kernels->axpy(sum + ((y - to->top) * columns + at->x + left) * pad, from + ((a - first) * across + left - at->left) * pad,
                             (right - left) * pad, 1);
        }
    }
    if (outside != NULL && end == at->bottom && at->outside > 0) {
        p->kernels->axpy(outside, from + (end - first) * across * pad, pad, 1);
    }
}

static void back_block(const problem *p, worker *t, const attn_windows_gradients *grad, const stripe *to, int64_t b, int64_t kv,
                       int64_t block)
{
    const attn_tile_kernels *kernels = p->kernels;
    window at = window_of(p, block);
    int64_t count[2], nr = kernels->nr, d = p->w->d;
    block_queries(p, block, count);
    int64_t all = p->group * count[0] * count[1];
    int single = at.bottom - at.top <= p->step_rows;
    for (int64_t row = 0; row < all; row += p->rows) {
        int64_t rows = attn_min_i64(p->rows, all - row);
        load_queries(p, t, b, kv, block, count, row, rows);
        load_gradients(p, t, grad, b, kv, rows);
        memset(t->dq, 0, (size_t)(rows * p->d_pad) * sizeof(float));
        for (int axis = 0; axis < 2 && p->rel[0] != NULL; axis++) {
            memset(t->grad_rel[axis], 0, (size_t)(rows * p->rel_pad[axis]) * sizeof(float));
        }
        for (int64_t first = at.top; first < at.bottom; first += p->step_rows) {
            int64_t end = attn_min_i64(first + p->step_rows, at.bottom);
            int64_t keys = keys_of(&at, first, end), padded = up(keys, kernels->vw);
            if (!single || row == 0) {
                load_step(p, t, b, kv, &at, first, end, padded);
                pack(kernels, t->v_packed, t->v, p->dv_pad, padded, p->w->dv);
            }
            score(p, t, rows, &at, first, end);
            kernels->product(rows, padded, p->w->dv, t->grad_o, p->dv_pad, 1, t->v_packed, nr, p->w->dv * nr, t->ds, p->step_keys, 0);
            for (int64_t r = 0; r < rows; r++) {
                float *s = t->s + r * p->step_keys, *ds = t->ds + r * p->step_keys;
                kernels->exp2_row(s, padded, t->m[r]);
                kernels->grad_row(ds, s, padded, t->alpha[r]);
            }
            if (to->dv != NULL || to->pad_v != NULL) {
                kernels->product(keys, p->dv_pad, rows, t->s, 1, p->step_keys, t->grad_o, p->dv_pad, nr, t->dv, p->dv_pad, 0);
                scatter(p, to, to->dv, to->pad_v, t->dv, &at, first, end, p->dv_pad);
            }
            /* t->rows holds the keys times factor (scale in base 2); ATTN_LN2 undoes the base at the end. */
            kernels->product(rows, p->d_pad, keys, t->ds, p->step_keys, 1, t->rows, p->d_pad, nr, t->dq, p->d_pad, 1);
            if (to->dk != NULL || to->pad_k != NULL) {
                kernels->product(keys, p->d_pad, rows, t->ds, 1, p->step_keys, t->q, p->d_pad, nr, t->dk, p->d_pad, 0);
                scatter(p, to, to->dk, to->pad_k, t->dk, &at, first, end, p->d_pad);
            }
            if (p->rel[0] != NULL) {
                sum_relative(p, t, rows, &at, first, end);
            }
        }
        for (int axis = 0; axis < 2 && p->rel[0] != NULL; axis++) {
            int64_t entries = p->rel_count[axis];
            kernels->product(rows, p->d_pad, entries, t->grad_rel[axis], p->rel_pad[axis], 1, p->rel_rows[axis], p->d_pad, nr, t->dq,
                             p->d_pad, 1);
            kernels->product(entries, p->d_pad, rows, t->grad_rel[axis], 1, p->rel_pad[axis], t->q, p->d_pad, nr, to->rel[axis], p->d_pad,
                             1);
        }
        for (int64_t r = 0; r < rows && grad->q.data != NULL; r++) {
            query q = t->at[r];
            kernels->load_row(row_of(&grad->q, b, kv * p->group + q.head, q.token), t->dq + r * p->d_pad, ATTN_F32, d, (float)ATTN_LN2);
        }
    }
}

static attn_status make_stripes(const problem *p, const attn_windows_gradients *grad, stripe **stripes, int64_t per_pair, attn_arena *arena)
{
    const attn_windows *w = p->w;
    int64_t total = w->batch * w->kv_heads * per_pair;
    stripe *made = attn_arena_array(arena, (size_t)total, sizeof *made);
    for (int64_t i = 0; i < total && made != NULL; i++) {
        int64_t s = i % per_pair;
        stripe *to = &made[i];
        *to = (stripe){.first_block_row = p->blocks[0] * s / per_pair, .end_block_row = p->blocks[0] * (s + 1) / per_pair};
        to->top = attn_max_i64(0, to->first_block_row * w->block[0] - w->halo[0]);
        to->bottom = attn_min_i64(w->grid[0], to->end_block_row * w->block[0] + w->halo[0]);
        size_t pixels = (size_t)((to->bottom - to->top) * w->grid[1]), d = (size_t)p->d_pad, dv = (size_t)p->dv_pad;
        size_t tables = w->rel_h != NULL ? (size_t)(p->rel_count[0] + p->rel_count[1]) * d : 0;
        size_t count = (grad->k.data != NULL ? pixels * d : 0) + (grad->v.data != NULL ? pixels * dv : 0) + tables + d + dv;
        float *at = attn_arena_array(arena, count + 1, sizeof *at);
        if (at == NULL) {
            return attn_fail_memory(count * sizeof *at);
        }
        memset(at, 0, count * sizeof *at);
        if (tables > 0) {
            to->rel[0] = at, at += (size_t)p->rel_count[0] * d;
            to->rel[1] = at, at += (size_t)p->rel_count[1] * d;
        }
        to->pad_k = grad->pad_k != NULL ? at : NULL, at += d;
        to->pad_v = grad->pad_v != NULL ? at : NULL, at += dv;
        if (grad->k.data != NULL) {
            to->dk = at, at += pixels * d;
        }
        to->dv = grad->v.data != NULL ? at : NULL;
    }
    *stripes = made;
    return made != NULL ? ATTN_OK : attn_fail_memory((size_t)total * sizeof *made);
}

/* Add the stripes of a key head in order. */
static void add_stripes(const problem *p, const attn_windows_gradients *grad, const stripe *stripes, int64_t count, int64_t b, int64_t kv)
{
    int64_t columns = p->w->grid[1];
    for (int64_t s = 0; s < count; s++) {
        const stripe *from = &stripes[s];
        for (int64_t i = 0; i < (from->bottom - from->top) * columns; i++) {
            int64_t token = from->top * columns + i;
            if (from->dk != NULL) {
                p->kernels->axpy(row_of(&grad->k, b, kv, token), from->dk + i * p->d_pad, p->w->d, (float)p->w->scale);
            }
            if (from->dv != NULL) {
                p->kernels->axpy(row_of(&grad->v, b, kv, token), from->dv + i * p->dv_pad, p->w->dv, 1);
            }
        }
    }
}

attn_status attn_windows_backward(const attn_windows *w, const attn_windows_gradients *grad, attn_arena *arena, int threads)
{
    problem p;
    worker *workers;
    stripe *stripes;
    int64_t pairs = w->batch * w->kv_heads;
    if (w->heads == 0 || pairs == 0) {
        return ATTN_OK;
    }
    ATTN_TRY(make_problem(&p, w, BACK_ROWS, arena));
    ATTN_TRY(make_workers(&p, &workers, arena, threads, 1));
    int64_t per_pair = pairs >= MOST_STRIPES ? 1 : attn_min_i64(p.blocks[0], MOST_STRIPES / pairs);
    ATTN_TRY(make_stripes(&p, grad, &stripes, per_pair, arena));
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < pairs * per_pair; i++) {
        int64_t pair = i / per_pair;
        for (int64_t block = stripes[i].first_block_row * p.blocks[1]; block < stripes[i].end_block_row * p.blocks[1]; block++) {
            back_block(&p, &workers[omp_get_thread_num()], grad, &stripes[i], pair / w->kv_heads, pair % w->kv_heads, block);
        }
    }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t pair = 0; pair < pairs; pair++) {
        add_stripes(&p, grad, stripes + pair * per_pair, per_pair, pair / w->kv_heads, pair % w->kv_heads);
    }
    for (int64_t i = 0; i < pairs * per_pair; i++) {
        int64_t kv = i / per_pair % w->kv_heads;
        if (grad->pad_k != NULL) {
            p.kernels->axpy(grad->pad_k + kv * w->d, stripes[i].pad_k, w->d, (float)w->scale);
        }
        if (grad->pad_v != NULL) {
            p.kernels->axpy(grad->pad_v + kv * w->dv, stripes[i].pad_v, w->dv, 1);
        }
    }
    float *tables[2] = {grad->rel_h, grad->rel_w};
    float factor = (float)(w->scale_relative ? w->scale : 1);
    for (int64_t i = 0; i < pairs * per_pair && w->rel_h != NULL; i++) {
        for (int axis = 0; axis < 2; axis++) {
            for (int64_t r = 0; r < p.rel_count[axis] && tables[axis] != NULL; r++) {
                p.kernels->axpy(tables[axis] + r * w->d, stripes[i].rel[axis] + r * p.d_pad, w->d, factor);
            }
        }
    }
    return ATTN_OK;
}
