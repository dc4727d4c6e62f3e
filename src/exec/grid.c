/* Attention in neighbourhoods of a grid, forward. As the dense executor: online softmax over steps of keys that stay in cache while the
 * queries of a tile go through them. Each register tile of neighbouring queries takes only the rows of the box that one of them
 * sees, so that what is computed beyond the windows is one or two positions per axis; masks are minima with ready rows. For small windows
 * boxes are wide, so that keys are copied less often, and register tiles take some columns of each row, values where they lie. */
#include "exec/grid_work.h"

#include <omp.h>
#include <string.h>

#define LEAST_UNIT 4 /* fewer queries together see fewer keys that some do not need, up to a point */

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
    unsigned char started[GRID_ROWS]; /* by the first row of a unit: it has seen keys */
    int hidden; /* some of the strip's queries do not see whole rows of the box */
} worker;

/* Part of a step that a unit takes: keys [from, to) from column `column` on. */
typedef struct part {
    int64_t from, to, column;
} part;

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

/* Scores of rows [r, r + count) with keys [first, first + columns) of the box; first a multiple of vw. */
static void products(const forward *f, const worker *x, int64_t r, int64_t count, int64_t first, int64_t columns, float *s)
{
    const attn_tile_kernels *kernels = f->work.kernels;
    int64_t nr = kernels->nr, d = f->work.g->d, inside = first % nr;
    const float *q = x->q + r * d, *panel = x->k + (first - inside) * d;
    if (inside > 0) {
        int64_t head = attn_min_i64(columns, nr - inside);
        kernels->product(count, head, d, q, d, 1, panel + inside, nr, nr * d, s, GRID_STEP, 0);
        columns -= head;
        s += head;
        panel += nr * d;
    }
    if (columns > 0) {
        kernels->product(count, columns, d, q, d, 1, panel, nr, nr * d, s, GRID_STEP, 0);
    }
}

/* Fill the scores of a unit for one part, ready for the softmax; or write them out; or take the weights. */
static void fill(const forward *f, worker *x, const grid_task *t, int64_t head, int64_t r, int64_t count, const grid_union *u,
                 const grid_piece *piece, const part *at, int64_t first, int64_t columns)
{
    const grid_work *w = &f->work;
    int64_t length = grid_bounds_length(w, GRID_STEP), lead = at->from - first;
    if (f->kind != VALUES) {
        products(f, x, r, count, first, columns, x->s + at->column);
    }
    for (int64_t i = 0; i < count; i++) {
        grid_row *row = &x->rows[r + i];
        float *s = x->s + i * GRID_STEP + at->column;
        int64_t slots = (head * w->n + row->token) * f->window;
        if (f->kind == VALUES) {
            attn_grid_slots(w, t, row, piece, at->from, at->to, (float *)(uintptr_t)f->weights + slots, s + lead, 1);
            continue;
        }
        if (w->g->bias != NULL) {
            attn_grid_bias(w, t, row, piece, at->from, at->to, (float *)(uintptr_t)w->g->bias + head % w->g->heads * (int64_t)w->bias_count,
                           s + lead, f->kind == FUSED ? (float)ATTN_LOG2E : 1, 0);
        }
        if (f->kind == SCORES) {
            attn_grid_slots(w, t, row, piece, at->from, at->to, f->scores + slots, s + lead, 0);
        } else {
            const float *bounds = x->hidden ? x->bounds + (row->place[2] - t->query[2][0]) * length : NULL;
            attn_grid_mask(w, t, row, piece, first, columns, at->from, at->to, bounds, u->alike, s);
        }
    }
}

/* The same for a piece in whole rows of the box, of which the unit takes some columns: score by score [rows][columns]. Returns how many. */
static int64_t narrow_products(const forward *f, const worker *x, const grid_task *t, int64_t r, int64_t count, const part *at)
{
    const grid_work *w = &f->work;
    int64_t d = w->g->d, width = grid_task_extent(t, 2), lines = (at->to - at->from) / width;
    const float *panels = x->k + at->from * d + attn_grid_column(w, t, x->rows[r].place[2]);
    for (int64_t c = 0; c < w->columns; c += w->kernels->vw) {
        w->kernels->product_apart(count, lines, d, x->q + r * d, d, panels + c, width, width * d, x->s + at->column + c, GRID_STEP,
                                  w->columns);
    }
    return lines * w->columns;
}

/* Values read where they lie. */
static void narrow_values(const forward *f, const worker *x, const grid_task *t, int64_t head, int64_t r, int64_t count, const part *at, int add)
{
    const grid_work *w = &f->work;
    const attn_grid *g = w->g;
    const grid_axis *y = &w->axis[1];
    int64_t pair = head / g->heads * g->kv_heads + head % g->heads / w->group, dv = g->dv;
    int64_t token = attn_grid_key_token(w, t, at->from) + attn_grid_column(w, t, x->rows[r].place[2]);
    w->kernels->product_runs(count, dv, (at->to - at->from) / grid_task_extent(t, 2), w->columns, x->s + at->column, GRID_STEP,
                             g->v + (pair * w->m + token) * dv, dv, y->a.dilation * y->key_step * dv, x->o + r * dv, dv, add);
}

/* One register tile of queries against the pieces of a step. */
static void attend(const forward *f, worker *x, const grid_task *t, int64_t head, int64_t r, int64_t count, int64_t pieces)
{
    const grid_work *w = &f->work;
    const attn_tile_kernels *kernels = w->kernels;
    grid_union u = attn_grid_union(x->rows + r, count);
    part parts[GRID_STEP];
    int64_t used = 0, columns = 0, vw = kernels->vw;
    for (int64_t i = 0; i < pieces; i++) {
        part *at = &parts[used];
        grid_part(t, &u, &x->pieces[i], &at->from, &at->to);
        if (at->from < at->to && w->columns > 0) {
            at->column = columns;
            columns += narrow_products(f, x, t, r, count, at);
            used++;
        } else if (at->from < at->to) {
            int64_t first = at->from / vw * vw, some = attn_ceil_div(at->to - first, vw) * vw;
            at->column = columns;
            fill(f, x, t, head, r, count, &u, &x->pieces[i], at, first, some);
            at->column += at->from - first;
            columns += some;
            used++;
        }
    }
    if (columns == 0 || f->kind == SCORES) {
        return;
    }
    for (int64_t i = 0; i < count && w->columns > 0 && x->hidden; i++) {
        const float *bounds = x->bounds + (x->rows[r + i].place[2] - t->query[2][0]) * grid_bounds_length(w, GRID_STEP);
        kernels->limit(x->s + i * GRID_STEP, bounds, columns);
    }
    int add = f->kind == VALUES || x->started[r]; /* to the sums so far; o is zero before */
    if (f->kind == FUSED) {
        kernels->softmax(count, x->s, GRID_STEP, columns, x->m + r, x->l + r, x->alpha);
        for (int64_t i = 0; i < count && add; i++) {
            if (x->alpha[i] != 1.0f) {
                kernels->scale(x->o + (r + i) * w->dv_pad, w->dv_pad, x->alpha[i]);
            }
        }
    }
    x->started[r] = 1;
    for (int64_t i = 0; i < used && w->columns > 0; i++) {
        narrow_values(f, x, t, head, r, count, &parts[i], add || i > 0);
    }
    for (int64_t i = 0; i < used && w->columns == 0; i++) {
        kernels->product(count, w->dv_pad, parts[i].to - parts[i].from, x->s + parts[i].column, GRID_STEP, 1,
                         x->v + parts[i].from * w->dv_pad, w->dv_pad, kernels->nr, x->o + r * w->dv_pad, w->dv_pad,
                         add || i > 0);
    }
}

/* What the unit below these rows, a tile further on, reads and writes. */
static void ask_ahead(const forward *f, const worker *x, const grid_task *t, int64_t head, int64_t r, int64_t count)
{
    const grid_work *w = &f->work;
    const attn_grid *g = w->g;
    const grid_axis *y = &w->axis[1];
    if (f->kind == FUSED && x->rows[r].place[1] + w->tile_y < t->query[1][1]) {
        int64_t at = head * w->n + x->rows[r].token + w->tile_y * y->a.dilation * y->query_step, next = w->axis[2].a.dilation * w->axis[2].query_step;
        attn_prefetch_ahead(g->q + at * g->d, (ptrdiff_t)(next * g->d) * (ptrdiff_t)sizeof(float), count, (size_t)g->d * sizeof(float));
        attn_prefetch_ahead(f->o + at * g->dv, (ptrdiff_t)(next * g->dv) * (ptrdiff_t)sizeof(float), count, (size_t)g->dv * sizeof(float));
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
    /* With units that take columns of the box, steps are of whole rows, and units end where rows of the tile do. */
    int64_t across = attn_max_i64(1, grid_task_extent(t, 2)), line = 0, step = w->columns > 0 ? GRID_STEP / w->columns * across : GRID_STEP;
    int64_t queries = w->columns > 0 ? t->query[2][1] - t->query[2][0] : GRID_ROWS;
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
        if (w->columns > 0) {
            attn_grid_pack_rows(w, t, &line, end / across, pair, g->k, g->d, x->k);
        } else if (f->kind != VALUES) {
            attn_grid_pack(w, t, &keys, end, pair, g->k, g->d, g->d, NULL, x->k, x->scratch);
        }
        if (f->kind != SCORES && w->columns == 0) {
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
            memset(x->started, 0, sizeof x->started);
            grid_walk walk;
            attn_grid_walk_begin(&walk, t, all);
            while ((pieces = attn_grid_walk_next(&walk, w, t, step, x->pieces)) > 0) {
                for (int64_t r = 0, count; r < rows; r += count) {
                    count = attn_min_i64(attn_min_i64(w->unit, rows - r), queries - r % queries);
                    attend(f, x, t, head, r, count, pieces);
                    ask_ahead(f, x, t, head, r, count);
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
    int64_t mr = attn_tile_kernels_get()->mr;
    int narrow = f->kind == FUSED && grid->bias == NULL && grid->extra == 0 && grid->dv % attn_tile_kernels_get()->vw == 0;
    ATTN_TRY(attn_grid_work_create(w, grid, attn_min_i64(LEAST_UNIT, mr), mr, narrow, arena));
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
