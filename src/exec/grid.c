/* Attention in neighbourhoods of a grid, forward. As the dense executor: online softmax over steps of keys that stay in
 * cache while the queries of a tile go through them. Each register tile of neighbouring queries takes only the rows of
 * the box that one of them sees, so that what is computed beyond the windows is one or two positions per axis; masks
 * are minima with ready rows. For small windows boxes are wide, so that keys are copied less often, and register tiles
 * take some columns of each row, values where they lie. */
#include "exec/grid_work.h"

#include <omp.h>
#include <string.h>

typedef enum grid_kind { FUSED, SCORES, VALUES } grid_kind;

typedef struct forward {
    grid_work work;
    grid_kind kind;
    int64_t window;      /* slots of a query */
    float *o, *lse;
    float *scores;       /* [batch, heads, N, window] */
    const float *weights; /* the same */
} forward;

typedef struct worker {
    float *k, *v, *scratch, *bounds; /* keys in panels, values in rows */
    float *q, *o, *s, *m, *l, *alpha;
    grid_row *rows;
    grid_piece *pieces;
    int hidden; /* some of the strip's queries do not see whole rows of the box */
} worker;

static attn_status worker_create(const forward *f, worker *x, attn_arena *arena)
{
    const grid_work *w = &f->work;
    const attn_grid *g = w->g;
    size_t keys = (size_t)attn_max_i64(w->box_keys, 1);
    int64_t length = grid_bounds_length(w, GRID_STEP);
    x->k = attn_arena_array(arena, keys, (size_t)g->d * sizeof(float));
    x->v = attn_arena_array(arena, w->columns > 0 ? 1 : keys, (size_t)w->dv_pad * sizeof(float));
    x->scratch = attn_arena_array(arena, (size_t)w->kernels->nr, (size_t)attn_max_i64(g->d, g->dv) * sizeof(float));
    x->bounds = attn_arena_array(arena, (size_t)(w->tile_x * length), sizeof(float));
    x->q = attn_arena_array(arena, GRID_ROWS, (size_t)g->d * sizeof(float));
    x->o = attn_arena_array(arena, GRID_ROWS, (size_t)w->dv_pad * sizeof(float));
    x->s = attn_arena_array(arena, (size_t)w->unit * GRID_STEP, sizeof(float));
    x->m = attn_arena_array(arena, 3 * GRID_ROWS, sizeof(float));
    x->rows = attn_arena_array(arena, GRID_ROWS, sizeof *x->rows);
    x->pieces = attn_arena_array(arena, GRID_STEP, sizeof *x->pieces);
    if (x->k == NULL || x->v == NULL || x->scratch == NULL || x->bounds == NULL || x->q == NULL || x->o == NULL || x->s == NULL ||
        x->m == NULL || x->rows == NULL || x->pieces == NULL) {
        return attn_fail_memory(keys * (size_t)(g->d + w->dv_pad) * sizeof(float));
    }
    x->l = x->m + GRID_ROWS;
    x->alpha = x->l + GRID_ROWS;
    return ATTN_OK;
}

/* Make the scores of a row ready for the softmax; or write them out; or take the weights: keys [from, to) of a piece,
 * the first at s[lead]. */
static void fill(const forward *f, const worker *x, const grid_task *t, int64_t head, const grid_row *row, const grid_piece *piece,
                 int64_t from, int64_t to, float *s, int64_t lead, int64_t columns)
{
    const grid_work *w = &f->work;
    int64_t slots = (head * w->n + row->token) * f->window;
    if (f->kind == VALUES) {
        attn_grid_slots(w, t, row, piece, from, to, (float *)(uintptr_t)f->weights + slots, s + lead, 1);
        return;
    }
    if (w->g->bias != NULL) {
        attn_grid_bias(w, t, row, piece, from, to, (float *)(uintptr_t)w->g->bias + head % w->g->heads * (int64_t)w->bias_count, s + lead,
                       f->kind == FUSED ? (float)ATTN_LOG2E : 1, 0);
    }
    if (f->kind == SCORES) {
        attn_grid_slots(w, t, row, piece, from, to, f->scores + slots, s + lead, 0);
    } else {
        const float *bounds = x->hidden ? x->bounds + (row->place[2] - t->query[2][0]) * grid_bounds_length(w, GRID_STEP) : NULL;
        attn_grid_mask(w, t, row, piece, from - lead, columns, bounds, s);
    }
}

/* A unit of queries against the pieces of a step. */
static void attend(const forward *f, worker *x, const grid_task *t, int64_t pair, int64_t head, int64_t r, int64_t count, int64_t pieces)
{
    const grid_work *w = &f->work;
    const attn_tile_kernels *kernels = w->kernels;
    int64_t from[GRID_STEP], to[GRID_STEP], at[GRID_STEP], used = 0, vw = kernels->vw, d = w->g->d, column = x->rows[r].column;
    for (int64_t i = 0; i < pieces; i++) {
        attn_grid_seen(t, x->rows + r, count, &x->pieces[i], &from[i], &to[i]);
        if (from[i] < to[i]) {
            int64_t lead = w->columns > 0 ? 0 : from[i] % vw, some = grid_column_of(w, t, to[i]) - grid_column_of(w, t, from[i]);
            some = attn_ceil_div(lead + some, vw) * vw;
            at[i] = used + lead;
            if (f->kind != VALUES) {
                attn_grid_products(w, t, count, x->q + r * d, d, d, x->k, from[i], to[i], column, x->s + at[i], GRID_STEP);
            }
            for (int64_t j = 0; j < count; j++) {
                fill(f, x, t, head, &x->rows[r + j], &x->pieces[i], from[i], to[i], x->s + j * GRID_STEP + used, lead, some);
            }
            used += some;
        }
    }
    if (used == 0 || f->kind == SCORES) {
        return;
    }
    if (f->kind == FUSED) {
        kernels->softmax(count, x->s, GRID_STEP, used, x->m + r, x->l + r, x->alpha);
        for (int64_t i = 0; i < count; i++) {
            if (x->alpha[i] != 1.0f) {
                kernels->scale(x->o + (r + i) * w->dv_pad, w->dv_pad, x->alpha[i]);
            }
        }
    }
    for (int64_t i = 0; i < pieces; i++) {
        if (from[i] < to[i]) {
            attn_grid_add(w, t, count, x->s + at[i], GRID_STEP, from[i], to[i], column, x->v, w->g->v, pair, w->dv_pad, x->o + r * w->dv_pad);
        }
    }
}

static void finish(const forward *f, worker *x, int64_t head, int64_t rows)
{
    const grid_work *w = &f->work;
    for (int64_t r = 0; r < rows && f->kind != SCORES; r++) {
        float l = x->l[r];
        int64_t at = head * w->n + x->rows[r].token;
        w->kernels->load_row(f->o + at * w->g->dv, x->o + r * w->dv_pad, ATTN_F32, w->g->dv,
                             f->kind == FUSED ? attn_softmax_inverse(l) : 1);
        if (f->lse != NULL) {
            f->lse[at] = attn_softmax_lse(x->m[r], l);
        }
    }
}

static void run_task(const forward *f, worker *x, const grid_task *t, int64_t pair)
{
    const grid_work *w = &f->work;
    const attn_grid *g = w->g;
    float factor = (float)(f->kind == FUSED ? g->scale * ATTN_LOG2E : g->scale);
    grid_packing keys = {0}, values = {0};
    if (f->kind == FUSED) {
        attn_grid_pack_extra(w, t, pair, g->extra_k, g->d, g->d, NULL, x->k, x->scratch);
        attn_grid_pack_extra(w, t, pair, g->extra_v, g->dv, w->dv_pad, x->v, NULL, NULL);
    }
    x->hidden = attn_grid_bounds(w, t, grid_bounds_length(w, GRID_STEP), x->bounds);
    int64_t tiles = attn_grid_tiles(w, t);
    for (int64_t tile = 0; tile < tiles; tile++) {
        int64_t rows = attn_grid_tile(w, t, tile, x->rows);
        grid_union all = attn_grid_union(x->rows, rows);
        int64_t end = grid_tile_end(t, &all);
        if (f->kind != VALUES) {
            attn_grid_pack(w, t, &keys, end, pair, g->k, g->d, g->d, NULL, x->k, x->scratch);
        }
        if (f->kind != SCORES) {
            attn_grid_pack(w, t, &values, end, pair, g->v, g->dv, w->dv_pad, x->v, NULL, NULL);
        }
        for (int64_t h = 0; h < w->group; h++) {
            int64_t head = pair / g->kv_heads * g->heads + pair % g->kv_heads * w->group + h, pieces;
            for (int64_t r = 0; r < rows; r++) {
                if (f->kind != VALUES) {
                    w->kernels->load_row(x->q + r * g->d, g->q + (head * w->n + x->rows[r].token) * g->d, ATTN_F32, g->d, factor);
                }
                x->m[r] = -INFINITY;
                x->l[r] = 0;
            }
            memset(x->o, 0, (size_t)(rows * w->dv_pad) * sizeof *x->o);
            int64_t ahead = end;
            grid_walk walk;
            attn_grid_walk_begin(&walk, t, all);
            for (int first = 1; (pieces = attn_grid_walk_next(&walk, w, t, grid_step(w, t, GRID_STEP), x->pieces)) > 0; first = 0) {
                for (int64_t r = 0, count; r < rows; r += count) {
                    count = attn_grid_unit(w, x->rows + r, rows - r);
                    attend(f, x, t, pair, head, r, count, pieces);
                    if (f->kind == FUSED && first) {
                        attn_grid_ahead_rows(w, t, x->rows + r, count, g->q + head * w->n * g->d, g->d);
                        attn_grid_ahead_rows(w, t, x->rows + r, count, f->o + head * w->n * g->dv, g->dv);
                        attn_grid_ahead_keys(w, t, &ahead, count, rows, pair);
                    }
                }
            }
            finish(f, x, head, rows);
        }
    }
}

static attn_status run(forward *f, const attn_grid *grid, attn_arena *arena, int threads)
{
    if (grid->batch * grid->kv_heads == 0) {
        return ATTN_OK;
    }
    grid_work *w = &f->work;
    attn_arena_mark mark = attn_arena_get_mark(arena);
    int narrow = f->kind == FUSED && grid->bias == NULL && grid->extra == 0 && grid->dv % attn_tile_kernels_get()->vw == 0;
    ATTN_TRY(attn_grid_work_create(w, grid, 1, narrow, arena));
    int64_t tasks = w->pairs * w->task_count;
    threads = (int)attn_min_i64(threads, attn_max_i64(tasks, 1));
    worker *workers = attn_arena_array(arena, (size_t)threads, sizeof *workers);
    if (workers == NULL) {
        return attn_fail_memory((size_t)threads * sizeof *workers);
    }
    for (int i = 0; i < threads; i++) {
        ATTN_TRY(worker_create(f, &workers[i], arena));
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < tasks; i++) {
        run_task(f, &workers[omp_get_thread_num()], &w->tasks[i % w->task_count], i / w->task_count);
    }
    attn_arena_release(arena, mark);
    return ATTN_OK;
}

attn_status attn_grid_forward(const attn_grid *grid, attn_arena *arena, int threads, float *o, float *lse)
{
    forward f = {.kind = FUSED, .o = o, .lse = lse};
    return run(&f, grid, arena, threads);
}

attn_status attn_grid_scores(const attn_grid *grid, int64_t window, attn_arena *arena, int threads, float *scores)
{
    forward f = {.kind = SCORES, .window = window, .scores = scores};
    attn_grid g = *grid;
    g.extra = 0;
    g.dv = 1;
    return run(&f, &g, arena, threads);
}

attn_status attn_grid_values(const attn_grid *grid, int64_t window, attn_arena *arena, int threads, const float *w, float *o)
{
    forward f = {.kind = VALUES, .window = window, .weights = w, .o = o};
    attn_grid g = *grid;
    g.extra = 0;
    g.d = 1;
    return run(&f, &g, arena, threads);
}
