/* Attention in neighbourhoods of a grid, backward, with recomputed probabilities: tiles of queries as in the forward, with more queries
 * to a unit, since gradients of keys and values are sums over its queries. They are added up in the box of a task, and then, task after
 * task, in the tensors.
 *
 * The tasks of a key/value head are cut in shares when there are few heads; shares have gradients of their own, which are added in
 * order. Neither depends on the number of threads. */
#include "exec/grid_work.h"

#include <omp.h>
#include <string.h>

#define UNIT 24
#define STEP 256
#define ENOUGH_TASKS 8

typedef enum grid_kind { FUSED, SCORES, VALUES } grid_kind;

typedef struct backward {
    grid_work work;
    grid_kind kind;
    int64_t window, shares;
    const attn_grid_gradients *to;
    const float *o, *lse, *grad_o;
    const float *grad_scores, *weights; /* [batch, heads, N, window] */
    float *grad_weights;
    float *k, *v;             /* [pairs][shares][M][d], [M][dv] */
    float *extra_k, *extra_v; /* [pairs][shares][extra][d], [extra][dv] */
    double *bias;             /* [pairs][shares][group][bias_count] */
} backward;

typedef struct worker {
    float *kt, *k, *vt, *grad_k, *grad_v, *scratch, *bounds, *bias;
    float *q, *scaled, *grad_o, *grad_q; /* rows of a tile */
    float *lse2, *delta;
    float *p, *ds; /* [UNIT][STEP] */
    grid_row *rows;
    grid_piece *pieces;
    int hidden;
} worker;

static attn_status worker_create(const backward *b, worker *x, attn_arena *arena)
{
    const grid_work *w = &b->work;
    const attn_grid *g = w->g;
    size_t keys = (size_t)attn_max_i64(w->box_keys, 1), total = 0;
    size_t d = (size_t)g->d, d_pad = (size_t)w->d_pad, dv = (size_t)g->dv, dv_pad = (size_t)w->dv_pad;
    const struct {
        float **to;
        size_t count;
    } parts[] = {{&x->kt, keys * d},
                 {&x->k, keys * d_pad},
                 {&x->vt, keys * dv},
                 {&x->grad_k, keys * d_pad},
                 {&x->grad_v, keys * dv_pad},
                 {&x->scratch, (size_t)w->kernels->nr * (size_t)attn_max_i64(g->d, g->dv)},
                 {&x->bounds, (size_t)(w->tile_x * grid_bounds_length(w, STEP))},
                 {&x->bias, b->bias != NULL ? (size_t)w->group * w->bias_count : 1},
                 {&x->q, GRID_ROWS * d_pad},
                 {&x->scaled, GRID_ROWS * d},
                 {&x->grad_o, GRID_ROWS * dv_pad},
                 {&x->grad_q, GRID_ROWS * d_pad},
                 {&x->lse2, GRID_ROWS},
                 {&x->delta, GRID_ROWS},
                 {&x->p, UNIT * STEP},
                 {&x->ds, UNIT * STEP}};
    x->rows = attn_arena_array(arena, GRID_ROWS, sizeof *x->rows);
    x->pieces = attn_arena_array(arena, STEP, sizeof *x->pieces);
    int failed = x->rows == NULL || x->pieces == NULL;
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        *parts[i].to = attn_arena_array(arena, parts[i].count, sizeof(float));
        failed |= *parts[i].to == NULL;
        total += parts[i].count;
    }
    return failed ? attn_fail_memory(total * sizeof(float)) : ATTN_OK;
}

/* C [count][columns] = A [count][width] times keys [first, ...) of packed panels. */
static void products(const grid_work *w, const float *a, int64_t lda, int64_t count, int64_t width, const float *panels, int64_t first,
                     int64_t columns, float *c)
{
    int64_t nr = w->kernels->nr, inside = first % nr, head = inside > 0 ? attn_min_i64(columns, nr - inside) : 0;
    if (head > 0) {
        w->kernels->product(count, head, width, a, lda, 1, panels + (first - inside) * width + inside, nr, nr * width, c, STEP, 0);
    }
    if (head < columns) {
        w->kernels->product(count, columns - head, width, a, lda, 1, panels + (first + head) * width, nr, nr * width, c + head, STEP, 0);
    }
}

/* Probabilities (or given weights) into x->p; their score gradients into x->ds. */
static void fill(const backward *b, worker *x, const grid_task *t, int64_t head, int64_t r, int64_t count, const grid_union *u,
                 const grid_piece *piece, int64_t from, int64_t to)
{
    const grid_work *w = &b->work;
    const attn_grid *g = w->g;
    int64_t vw = w->kernels->vw, first = from / vw * vw, columns = attn_ceil_div(to - first, vw) * vw, lead = from - first;
    if (b->kind == FUSED) {
        products(w, x->scaled + r * g->d, g->d, count, g->d, x->kt, first, columns, x->p);
    }
    if (b->kind != SCORES) {
        products(w, x->grad_o + r * w->dv_pad, w->dv_pad, count, g->dv, x->vt, first, columns, x->ds);
    }
    for (int64_t i = 0; i < count; i++) {
        const grid_row *row = &x->rows[r + i];
        float *p = x->p + i * STEP, *ds = x->ds + i * STEP;
        int64_t slots = (head * w->n + row->token) * b->window;
        if (b->kind == SCORES) {
            attn_grid_slots(w, t, row, piece, from, to, (float *)(uintptr_t)b->grad_scores + slots, ds + lead, 1);
        } else if (b->kind == VALUES) {
            attn_grid_slots(w, t, row, piece, from, to, (float *)(uintptr_t)b->weights + slots, p + lead, 1);
            if (b->grad_weights != NULL) {
                attn_grid_slots(w, t, row, piece, from, to, b->grad_weights + slots, ds + lead, 0);
            }
        } else {
            const float *bounds = x->hidden ? x->bounds + (row->place[2] - t->query[2][0]) * grid_bounds_length(w, STEP) : NULL;
            if (g->bias != NULL) {
                attn_grid_bias(w, t, row, piece, from, to,
                               (float *)(uintptr_t)g->bias + head % g->heads * (int64_t)w->bias_count, p + lead, (float)ATTN_LOG2E, 0);
            }
            attn_grid_mask(w, t, row, piece, first, columns, from, to, bounds, u->alike, p);
            w->kernels->exp2_row(p, columns, x->lse2[r + i]);
            w->kernels->grad_row(ds, p, columns, x->delta[r + i]);
        }
        if (b->bias != NULL) {
            attn_grid_bias(w, t, row, piece, from, to, x->bias + (size_t)(head % w->group) * w->bias_count, ds + lead, 1, 1);
        }
    }
}

static void unit(const backward *b, worker *x, const grid_task *t, int64_t head, int64_t r, int64_t count, const grid_piece *piece)
{
    const grid_work *w = &b->work;
    const attn_tile_kernels *kernels = w->kernels;
    grid_union u = attn_grid_union(x->rows + r, count);
    int64_t from, to, nr = kernels->nr;
    grid_part(t, &u, piece, &from, &to);
    if (from >= to) {
        return;
    }
    fill(b, x, t, head, r, count, &u, piece, from, to);
    const float *p = x->p + from % kernels->vw, *ds = x->ds + from % kernels->vw;
    if (b->v != NULL) {
        kernels->product(to - from, w->dv_pad, count, p, 1, STEP, x->grad_o + r * w->dv_pad, w->dv_pad, nr,
                         x->grad_v + from * w->dv_pad, w->dv_pad, 1);
    }
    if (b->k != NULL) {
        kernels->product(to - from, w->d_pad, count, ds, 1, STEP, x->q + r * w->d_pad, w->d_pad, nr, x->grad_k + from * w->d_pad,
                         w->d_pad, 1);
    }
    if (b->to->q != NULL) {
        kernels->product(count, w->d_pad, to - from, ds, STEP, 1, x->k + from * w->d_pad, w->d_pad, nr, x->grad_q + r * w->d_pad,
                         w->d_pad, 1);
    }
}

static void load_rows(const backward *b, worker *x, int64_t head, int64_t rows)
{
    const grid_work *w = &b->work;
    const attn_grid *g = w->g;
    for (int64_t r = 0; r < rows; r++) {
        int64_t at = head * w->n + x->rows[r].token;
        if (b->kind != VALUES) {
            float *q = x->q + r * w->d_pad;
            memcpy(q, g->q + at * g->d, (size_t)g->d * sizeof *q);
            memset(q + g->d, 0, (size_t)(w->d_pad - g->d) * sizeof *q);
            w->kernels->load_row(x->scaled + r * g->d, q, ATTN_F32, g->d, (float)(g->scale * ATTN_LOG2E));
        }
        if (b->kind != SCORES) {
            float *grad = x->grad_o + r * w->dv_pad;
            memcpy(grad, b->grad_o + at * g->dv, (size_t)g->dv * sizeof *grad);
            memset(grad + g->dv, 0, (size_t)(w->dv_pad - g->dv) * sizeof *grad);
        }
        if (b->kind == FUSED) {
            double sum = 0;
            for (int64_t c = 0; c < g->dv; c++) {
                sum += (double)b->o[at * g->dv + c] * (double)b->grad_o[at * g->dv + c];
            }
            x->delta[r] = (float)sum;
            x->lse2[r] = b->lse[at] == -INFINITY ? INFINITY : (float)((double)b->lse[at] * ATTN_LOG2E);
        }
    }
    memset(x->grad_q, 0, (size_t)(rows * w->d_pad) * sizeof *x->grad_q);
}

/* Add the gradients of a task's box to those of its share. */
static void add_box(const backward *b, const worker *x, const grid_task *t, int64_t share)
{
    const grid_work *w = &b->work;
    const attn_grid *g = w->g;
    int64_t keys = grid_task_keys(t), extra = grid_extra_first(w, t);
    for (int64_t j = 0; j < keys; j++) {
        int64_t token = share * w->m + attn_grid_key_token(w, t, j);
        if (b->k != NULL) {
            w->kernels->axpy(b->k + token * g->d, x->grad_k + j * w->d_pad, g->d, 1);
        }
        if (b->v != NULL) {
            w->kernels->axpy(b->v + token * g->dv, x->grad_v + j * w->dv_pad, g->dv, 1);
        }
    }
    for (int64_t j = 0; j < g->extra; j++) {
        if (b->k != NULL) {
            w->kernels->axpy(b->extra_k + (share * g->extra + j) * g->d, x->grad_k + (extra + j) * w->d_pad, g->d, 1);
        }
        if (b->v != NULL) {
            w->kernels->axpy(b->extra_v + (share * g->extra + j) * g->dv, x->grad_v + (extra + j) * w->dv_pad, g->dv, 1);
        }
    }
    if (b->bias != NULL) {
        int64_t count = w->group * (int64_t)w->bias_count;
        for (int64_t i = 0; i < count; i++) {
            b->bias[share * count + i] += (double)x->bias[i];
        }
    }
}

static void run_task(const backward *b, worker *x, const grid_task *t, int64_t pair, int64_t share)
{
    const grid_work *w = &b->work;
    const attn_grid *g = w->g;
    int64_t tiles = attn_grid_tiles(w, t);
    size_t keys = (size_t)(grid_extra_first(w, t) + attn_ceil_div(g->extra, w->kernels->nr) * w->kernels->nr);
    grid_packing key = {0}, value = {0};
    if (b->kind == FUSED) {
        attn_grid_pack_extra(w, t, pair, g->extra_k, g->d, w->d_pad, x->k, x->kt, x->scratch);
        attn_grid_pack_extra(w, t, pair, g->extra_v, g->dv, w->dv_pad, NULL, x->vt, x->scratch);
    }
    memset(x->grad_k, 0, keys * (size_t)w->d_pad * sizeof(float));
    memset(x->grad_v, 0, keys * (size_t)w->dv_pad * sizeof(float));
    if (b->bias != NULL) {
        memset(x->bias, 0, (size_t)w->group * w->bias_count * sizeof(float));
    }
    x->hidden = attn_grid_bounds(w, t, grid_bounds_length(w, STEP), x->bounds);
    for (int64_t tile = 0; tile < tiles; tile++) {
        int64_t rows = attn_grid_tile(w, t, tile, x->rows), pieces;
        grid_union all = attn_grid_union(x->rows, rows);
        int64_t end = grid_tile_end(t, &all);
        if (b->kind != VALUES) {
            attn_grid_pack(w, t, &key, end, pair, g->k, g->d, w->d_pad, x->k, x->kt, x->scratch);
        }
        if (b->kind != SCORES) {
            attn_grid_pack(w, t, &value, end, pair, g->v, g->dv, w->dv_pad, NULL, x->vt, x->scratch);
        }
        for (int64_t h = 0; h < w->group; h++) {
            int64_t head = pair / g->kv_heads * g->heads + pair % g->kv_heads * w->group + h;
            load_rows(b, x, head, rows);
            grid_walk walk;
            attn_grid_walk_begin(&walk, t, all);
            while ((pieces = attn_grid_walk_next(&walk, w, t, STEP, x->pieces)) > 0) {
                for (int64_t r = 0; r < rows; r += w->unit) {
                    for (int64_t i = 0; i < pieces; i++) {
                        unit(b, x, t, head, r, attn_min_i64(w->unit, rows - r), &x->pieces[i]);
                    }
                }
            }
            for (int64_t r = 0; r < rows && b->to->q != NULL; r++) {
                w->kernels->load_row(b->to->q + (head * w->n + x->rows[r].token) * g->d, x->grad_q + r * w->d_pad, ATTN_F32, g->d,
                                     (float)g->scale);
            }
        }
    }
    add_box(b, x, t, pair * b->shares + share);
}

/* to [pairs][count] = factor * sum over shares of from [pairs][shares][count]. */
static void sum_shares(const backward *b, float *to, const float *from, int64_t count, float factor, int threads)
{
    const grid_work *w = &b->work;
    int64_t block = 4096, blocks = attn_ceil_div(count, block);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < (to != NULL ? w->pairs * blocks : 0); i++) {
        int64_t pair = i / blocks, at = i % blocks * block, some = attn_min_i64(block, count - at);
        float *sum = to + pair * count + at;
        memset(sum, 0, (size_t)some * sizeof *sum);
        for (int64_t share = 0; share < b->shares; share++) {
            w->kernels->axpy(sum, from + (pair * b->shares + share) * count + at, some, factor);
        }
    }
}

static void sum_bias(const backward *b)
{
    const grid_work *w = &b->work;
    const attn_grid *g = w->g;
    int64_t count = (int64_t)w->bias_count;
    for (int64_t i = 0; i < g->heads * count; i++) {
        int64_t h = i / count;
        double sum = 0;
        for (int64_t batch = 0; batch < g->batch; batch++) {
            for (int64_t share = 0; share < b->shares; share++) {
                int64_t at = (batch * g->kv_heads + h / w->group) * b->shares + share;
                sum += b->bias[(at * w->group + h % w->group) * count + i % count];
            }
        }
        b->to->bias[i] = (float)sum;
    }
}

static attn_status zeros(attn_arena *arena, float **to, int64_t count)
{
    *to = attn_arena_array(arena, (size_t)attn_max_i64(count, 1), sizeof(float));
    if (*to == NULL) {
        return attn_fail_memory((size_t)count * sizeof(float));
    }
    memset(*to, 0, (size_t)count * sizeof(float));
    return ATTN_OK;
}

static attn_status sums_create(backward *b, attn_arena *arena)
{
    const grid_work *w = &b->work;
    const attn_grid *g = w->g;
    int64_t parts = w->pairs * b->shares;
    if (b->kind != VALUES && (b->to->k != NULL || b->to->extra_k != NULL)) {
        ATTN_TRY(zeros(arena, &b->k, parts * w->m * g->d));
        ATTN_TRY(zeros(arena, &b->extra_k, parts * g->extra * g->d));
    }
    if (b->kind != SCORES && (b->to->v != NULL || b->to->extra_v != NULL)) {
        ATTN_TRY(zeros(arena, &b->v, parts * w->m * g->dv));
        ATTN_TRY(zeros(arena, &b->extra_v, parts * g->extra * g->dv));
    }
    if (b->to->bias != NULL) {
        size_t count = (size_t)(parts * w->group) * w->bias_count;
        b->bias = attn_arena_array(arena, count, sizeof(double));
        if (b->bias == NULL) {
            return attn_fail_memory(count * sizeof(double));
        }
        memset(b->bias, 0, count * sizeof(double));
    }
    return ATTN_OK;
}

static attn_status run(backward *b, const attn_grid *g, attn_arena *arena, int threads)
{
    grid_work *w = &b->work;
    if (g->batch * g->kv_heads == 0) {
        if (b->to->bias != NULL) {
            size_t count = (size_t)g->heads;
            for (int i = 0; i < g->rank; i++) {
                count *= (size_t)(2 * g->axis[i].reach - 1);
            }
            memset(b->to->bias, 0, count * sizeof(float));
        }
        return ATTN_OK;
    }
    attn_arena_mark mark = attn_arena_get_mark(arena);
    ATTN_TRY(attn_grid_work_create(w, g, UNIT, UNIT, 0, arena));
    b->shares = attn_max_i64(1, attn_min_i64(w->task_count, attn_ceil_div(ENOUGH_TASKS, w->pairs)));
    ATTN_TRY(sums_create(b, arena));
    int64_t parts = w->pairs * b->shares;
    int team = (int)attn_min_i64(threads, parts);
    worker *workers = attn_arena_array(arena, (size_t)team, sizeof *workers);
    if (workers == NULL) {
        return attn_fail_memory((size_t)team * sizeof *workers);
    }
    for (int i = 0; i < team; i++) {
        ATTN_TRY(worker_create(b, &workers[i], arena));
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
    for (int64_t i = 0; i < parts; i++) {
        int64_t share = i % b->shares;
        for (int64_t t = w->task_count * share / b->shares; t < w->task_count * (share + 1) / b->shares; t++) {
            run_task(b, &workers[omp_get_thread_num()], &w->tasks[t], i / b->shares, share);
        }
    }
    sum_shares(b, b->to->k, b->k, w->m * g->d, (float)g->scale, threads);
    sum_shares(b, b->to->v, b->v, w->m * g->dv, 1, threads);
    if (g->extra > 0) {
        sum_shares(b, b->to->extra_k, b->extra_k, g->extra * g->d, (float)g->scale, threads);
        sum_shares(b, b->to->extra_v, b->extra_v, g->extra * g->dv, 1, threads);
    }
    if (b->to->bias != NULL) {
        sum_bias(b);
    }
    attn_arena_release(arena, mark);
    return ATTN_OK;
}

attn_status attn_grid_backward(const attn_grid *grid, attn_arena *arena, int threads, const float *o, const float *lse,
                               const float *grad_o, const attn_grid_gradients *to)
{
    backward b = {.kind = FUSED, .to = to, .o = o, .lse = lse, .grad_o = grad_o};
    return run(&b, grid, arena, threads);
}

attn_status attn_grid_scores_backward(const attn_grid *grid, int64_t window, attn_arena *arena, int threads,
                                      const float *grad_scores, const attn_grid_gradients *to)
{
    backward b = {.kind = SCORES, .window = window, .to = to, .grad_scores = grad_scores};
    attn_grid g = *grid;
    g.extra = 0;
    g.dv = 1;
    return run(&b, &g, arena, threads);
}

attn_status attn_grid_values_backward(const attn_grid *grid, int64_t window, attn_arena *arena, int threads, const float *w,
                                      const float *grad_o, float *grad_w, const attn_grid_gradients *to)
{
    backward b = {.kind = VALUES, .window = window, .to = to, .weights = w, .grad_o = grad_o, .grad_weights = grad_w};
    attn_grid g = *grid;
    g.extra = 0;
    g.d = 1;
    g.bias = NULL;
    return run(&b, &g, arena, threads);
}
