/* Attention in neighbourhoods of a grid, backward, with recomputed probabilities: tiles of queries as in the forward,
 * with more queries to a unit, since gradients of keys and values are sums over its queries. They are added up in the
 * box of a task, and then, task after task, in the tensors.
 *
 * The tasks of a key/value head are cut in shares when there are few heads. Shares that see the same keys run one after
 * the other, always in the same order; they have only the gradients of bias and extra keys of their own. Nothing
 * depends on the number of threads. */
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
    int64_t *phase;           /* [shares] */
    float *extra_k, *extra_v; /* [pairs][shares][extra][d], [extra][dv], or NULL */
    double *bias;             /* [pairs][shares][group][bias_count], or NULL */
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
                 {&x->k, w->columns > 0 ? 1 : keys * d_pad},
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

/* Probabilities (or given weights) of a row into p, their score gradients into ds: of keys [from, to) of a piece, the
 * first at p[0]. */
static void fill(const backward *b, worker *x, const grid_task *t, int64_t head, int64_t r, const grid_piece *piece, int64_t from, int64_t to,
                 float *p, float *ds)
{
    const grid_work *w = &b->work;
    const attn_grid *g = w->g;
    const grid_row *row = &x->rows[r];
    int64_t slots = (head * w->n + row->token) * b->window, columns = grid_column_of(w, t, to) - grid_column_of(w, t, from);
    if (b->kind == SCORES) {
        attn_grid_slots(w, t, row, piece, from, to, (float *)(uintptr_t)b->grad_scores + slots, ds, 1);
    } else if (b->kind == VALUES) {
        attn_grid_slots(w, t, row, piece, from, to, (float *)(uintptr_t)b->weights + slots, p, 1);
        if (b->grad_weights != NULL) {
            attn_grid_slots(w, t, row, piece, from, to, b->grad_weights + slots, ds, 0);
        }
    } else {
        if (g->bias != NULL) {
            attn_grid_bias(w, t, row, piece, from, to, (float *)(uintptr_t)g->bias + head % g->heads * (int64_t)w->bias_count, p,
                           (float)ATTN_LOG2E, 0);
        }
        const float *bounds = x->hidden ? x->bounds + (row->place[2] - t->query[2][0]) * grid_bounds_length(w, STEP) : NULL;
        attn_grid_mask(w, t, row, piece, from, columns, bounds, p);
        w->kernels->exp2_row(p, columns, x->lse2[r]);
        w->kernels->grad_row(ds, p, columns, x->delta[r]);
    }
    if (b->bias != NULL) {
        attn_grid_bias(w, t, row, piece, from, to, x->bias + (size_t)(head % w->group) * w->bias_count, ds, 1, 1);
    }
}

/* A unit of queries against a piece: register tile after register tile with the keys that it sees, then all for the
 * sums over queries. */
static void unit(const backward *b, worker *x, const grid_task *t, int64_t pair, int64_t head, int64_t r0, int64_t count,
                 const grid_piece *piece)
{
    const grid_work *w = &b->work;
    const attn_tile_kernels *kernels = w->kernels;
    const attn_grid *g = w->g;
    int64_t vw = kernels->vw, nr = kernels->nr, column = x->rows[r0].column, across = grid_task_extent(t, 2);
    int64_t begin = (w->columns > 0 ? 0 : piece->first % vw) - grid_column_of(w, t, piece->first); /* where key 0 would be */
    for (int64_t i = 0, some; i < count; i += some) {
        int64_t r = r0 + i, from, to;
        some = attn_min_i64(w->height, count - i);
        attn_grid_seen(t, x->rows + r, some, piece, &from, &to);
        if (from >= to) {
            continue;
        }
        int64_t at = i * STEP + begin + grid_column_of(w, t, from);
        if (b->kind == FUSED) {
            attn_grid_products(w, t, some, x->scaled + r * g->d, g->d, g->d, x->kt, from, to, column, x->p + at, STEP);
        }
        if (b->kind != SCORES) {
            attn_grid_products(w, t, some, x->grad_o + r * w->dv_pad, w->dv_pad, g->dv, x->vt, from, to, column, x->ds + at, STEP);
        }
        for (int64_t j = 0; j < some; j++) {
            fill(b, x, t, head, r + j, piece, from, to, x->p + at + j * STEP, x->ds + at + j * STEP);
        }
        if (b->to->q != NULL) {
            attn_grid_add(w, t, some, x->ds + at, STEP, from, to, column, x->k, g->k, pair, w->d_pad, x->grad_q + r * w->d_pad);
        }
    }
    grid_part part = grid_part_begin(piece, count);
    while (attn_grid_part_next(&part, t, x->rows + r0, count, piece)) {
        int64_t r = r0 + part.first, run = w->columns > 0 ? across : part.to - part.from, keys = w->columns > 0 ? w->columns : run;
        for (int64_t key = part.from; key < part.to; key += run) {
            int64_t at = part.first * STEP + begin + grid_column_of(w, t, key), to = key + column;
            if (b->to->v != NULL || b->extra_v != NULL) {
                kernels->product(keys, w->dv_pad, part.rows, x->p + at, 1, STEP, x->grad_o + r * w->dv_pad, w->dv_pad, nr,
                                 x->grad_v + to * w->dv_pad, w->dv_pad, 1);
            }
            if (b->to->k != NULL || b->extra_k != NULL) {
                kernels->product(keys, w->d_pad, part.rows, x->ds + at, 1, STEP, x->q + r * w->d_pad, w->d_pad, nr,
                                 x->grad_k + to * w->d_pad, w->d_pad, 1);
            }
        }
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
            x->delta[r] = w->kernels->dot(b->o + at * g->dv, b->grad_o + at * g->dv, g->dv);
            x->lse2[r] = b->lse[at] == -INFINITY ? INFINITY : (float)((double)b->lse[at] * ATTN_LOG2E);
        }
    }
    memset(x->grad_q, 0, (size_t)(rows * w->d_pad) * sizeof *x->grad_q);
}

/* Rows of sums, `pad` numbers each, added to the gradients of the keys of a task's box, and to those of its share for
 * the extra ones. */
static void add_box(const backward *b, const grid_task *t, int64_t pair, int64_t share, const float *sums, int64_t width, int64_t pad,
                    float factor, float *to, float *extra)
{
    const grid_work *w = &b->work;
    int64_t keys = grid_task_keys(t), more = w->g->extra;
    int64_t run = width == pad && w->axis[2].a.dilation * w->axis[2].key_step == 1 ? grid_task_extent(t, 2) : 1; /* neighbours together */
    for (int64_t j = 0; j < keys && to != NULL; j += run) {
        w->kernels->axpy(to + (pair * w->m + attn_grid_key_token(w, t, j)) * width, sums + j * pad, run * width, factor);
    }
    for (int64_t j = 0; j < more && extra != NULL; j++) {
        w->kernels->axpy(extra + ((pair * b->shares + share) * more + j) * width, sums + (grid_extra_first(w, t) + j) * pad, width, factor);
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
            int64_t ahead = end;
            grid_walk walk;
            attn_grid_walk_begin(&walk, t, all);
            for (int first = 1; (pieces = attn_grid_walk_next(&walk, w, t, grid_step(w, t, STEP), x->pieces)) > 0; first = 0) {
                for (int64_t r = 0, count; r < rows; r += count) {
                    count = attn_grid_unit(w, x->rows + r, rows - r);
                    for (int64_t i = 0; i < pieces; i++) {
                        unit(b, x, t, pair, head, r, count, &x->pieces[i]);
                    }
                    if (b->kind == FUSED && first) {
                        attn_grid_ahead_rows(w, t, x->rows + r, count, g->q + head * w->n * g->d, g->d);
                        attn_grid_ahead_rows(w, t, x->rows + r, count, b->o + head * w->n * g->dv, g->dv);
                        attn_grid_ahead_rows(w, t, x->rows + r, count, b->grad_o + head * w->n * g->dv, g->dv);
                        attn_grid_ahead_keys(w, t, &ahead, count, rows, pair);
                    }
                }
            }
            for (int64_t r = 0; r < rows && b->to->q != NULL; r++) {
                w->kernels->load_row(b->to->q + (head * w->n + x->rows[r].token) * g->d, x->grad_q + r * w->d_pad, ATTN_F32, g->d,
                                     (float)g->scale);
            }
        }
    }
    add_box(b, t, pair, share, x->grad_k, g->d, w->d_pad, (float)g->scale, b->to->k, b->extra_k);
    add_box(b, t, pair, share, x->grad_v, g->dv, w->dv_pad, 1, b->to->v, b->extra_v);
    for (int64_t i = 0; b->bias != NULL && i < w->group * (int64_t)w->bias_count; i++) {
        b->bias[(pair * b->shares + share) * w->group * (int64_t)w->bias_count + i] += (double)x->bias[i];
    }
}

/* to [pairs][count] = sum over shares of from [pairs][shares][count]. */
static void sum_shares(const backward *b, float *to, const float *from, int64_t count)
{
    for (int64_t pair = 0; to != NULL && pair < b->work.pairs; pair++) {
        memset(to + pair * count, 0, (size_t)count * sizeof *to);
        for (int64_t share = 0; share < b->shares; share++) {
            b->work.kernels->axpy(to + pair * count, from + (pair * b->shares + share) * count, count, 1);
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
    if (b->to->extra_k != NULL) {
        ATTN_TRY(zeros(arena, &b->extra_k, parts * g->extra * g->d));
    }
    if (b->to->extra_v != NULL) {
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

static int64_t share_begin(const backward *b, int64_t share) { return b->work.task_count * share / b->shares; }

/* Whether tasks of two shares, the first one before the second, see the same keys. Tasks come by dilation groups, which
 * have none in common. */
static int share_keys(const backward *b, int64_t first, int64_t second)
{
    const grid_task *tasks = b->work.tasks;
    for (int64_t i = share_begin(b, second); i < share_begin(b, second + 1); i++) {
        for (int64_t j = share_begin(b, first + 1) - 1; j >= share_begin(b, first); j--) {
            int common = 1, group = 1;
            for (int a = 0; a < 3; a++) {
                group &= tasks[i].group[a] == tasks[j].group[a];
                common &= tasks[i].key[a][0] < tasks[j].key[a][1] && tasks[j].key[a][0] < tasks[i].key[a][1];
            }
            if (!group) {
                break;
            }
            if (common) {
                return 1;
            }
        }
    }
    return 0;
}

/* Shares that see the same keys run one after the other: each in the first phase in which no share before it sees its
 * keys. */
static attn_status share_out(backward *b, attn_arena *arena)
{
    b->shares = attn_max_i64(1, attn_min_i64(b->work.task_count, attn_ceil_div(ENOUGH_TASKS, b->work.pairs)));
    b->phase = attn_arena_array(arena, (size_t)b->shares, sizeof *b->phase);
    if (b->phase == NULL) {
        return attn_fail_memory((size_t)b->shares * sizeof *b->phase);
    }
    for (int64_t i = 0; i < b->shares; i++) {
        b->phase[i] = 0;
        for (int64_t j = 0; j < i; j++) {
            if (b->phase[j] == b->phase[i] && share_keys(b, j, i)) {
                b->phase[i]++;
                j = -1;
            }
        }
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
    int narrow = b->kind == FUSED && g->bias == NULL && g->extra == 0 && g->d % attn_tile_kernels_get()->vw == 0;
    ATTN_TRY(attn_grid_work_create(w, g, UNIT, narrow, arena));
    ATTN_TRY(share_out(b, arena));
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
#pragma omp parallel for schedule(static) num_threads(team)
    for (int64_t i = 0; i < w->pairs; i++) {
        if (b->to->k != NULL) {
            memset(b->to->k + i * w->m * g->d, 0, (size_t)(w->m * g->d) * sizeof(float));
        }
        if (b->to->v != NULL) {
            memset(b->to->v + i * w->m * g->dv, 0, (size_t)(w->m * g->dv) * sizeof(float));
        }
    }
    for (int64_t phase = 0; phase < b->shares; phase++) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
        for (int64_t i = 0; i < parts; i++) {
            int64_t share = i % b->shares;
            for (int64_t t = share_begin(b, share); b->phase[share] == phase && t < share_begin(b, share + 1); t++) {
                run_task(b, &workers[omp_get_thread_num()], &w->tasks[t], i / b->shares, share);
            }
        }
    }
    sum_shares(b, b->to->extra_k, b->extra_k, g->extra * g->d);
    sum_shares(b, b->to->extra_v, b->extra_v, g->extra * g->dv);
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
