/* How the grid executor cuts its work, copies keys, and finds what queries see. */
#include "exec/grid_work.h"

#include <string.h>

enum { Z, Y, X };

/* A key costs about as much to pack as this many products with a query. */
#define PACK_COST 6.0
#define ENOUGH_TASKS 16
#define ROW_COST 5.0   /* the same for keys that are transposed where they lie, and values that are not copied */
#define MOST_APART 16  /* queries across such a tile: wider ones copy less, but their keys leave the cache */
#define HEIGHT_COST 0.1 /* of some queries together besides their products, in queries */
#define FEW_COST 1.3    /* the same with few registers: the sums of a few queries wait for each other */
#define LEAST_HEIGHT 4  /* fewer queries together see fewer keys that some do not need, up to a point */

/* ---- Axes ---- */

static void place_axes(grid_work *w)
{
    static const int64_t zero = 0, one = 1;
    const attn_grid *g = w->g;
    int64_t query_step = 1, key_step = 1, bias_step = 1;
    int axis = g->rank == 1 ? Y : X; /* one axis alone becomes y: neighbouring queries then share rows of one key */
    w->axis[Z] = w->axis[Y] = w->axis[X] = (grid_axis){.a = {1, 1, 0, 1, &zero, &one, 1}};
    for (int i = g->rank - 1; i >= 0; i--) {
        const attn_grid_axis *a = &g->axis[i];
        w->axis[axis--] = (grid_axis){*a, query_step, key_step, bias_step};
        query_step *= a->n;
        key_step *= a->m;
        bias_step *= 2 * a->reach - 1;
    }
    w->n = query_step;
    w->m = key_step;
    w->bias_count = (size_t)bias_step;
}

/* Places of the queries of a dilation group. */
static void query_places(const attn_grid_axis *a, int64_t group, int64_t *from, int64_t *to)
{
    int64_t shift = a->first - group, d = a->dilation;
    /* Smallest p with p*d >= shift, and the same for shift + n; shift may be negative. */
    *from = shift >= 0 ? attn_ceil_div(shift, d) : -(-shift / d);
    shift += a->n;
    *to = shift >= 0 ? attn_ceil_div(shift, d) : -(-shift / d);
}

static int64_t query_number(const attn_grid_axis *a, int64_t group, int64_t place) { return place * a->dilation + group - a->first; }

/* Places that the queries [from, to) of a group see together. */
static void seen_places(const attn_grid_axis *a, int64_t group, int64_t from, int64_t to, int64_t seen[2])
{
    int64_t low = INT64_MAX, high = INT64_MIN;
    for (int64_t p = from; p < to; p++) {
        int64_t i = query_number(a, group, p);
        if (a->start[i] < a->end[i]) {
            low = attn_min_i64(low, a->start[i]);
            high = attn_max_i64(high, a->end[i]);
        }
    }
    seen[0] = low < high ? low : 0;
    seen[1] = low < high ? high : 0;
}

/* ---- How to cut ---- */

/* Mean number of places that runs of `count` queries see. */
static double mean_extent(const attn_grid_axis *a, int64_t count)
{
    int64_t from, to, runs = 0, sum = 0;
    query_places(a, 0, &from, &to);
    for (int64_t p = from; p < to && runs < 256; p += count, runs++) {
        int64_t seen[2];
        seen_places(a, 0, p, attn_min_i64(to, p + count), seen);
        sum += seen[1] - seen[0];
    }
    return runs > 0 ? (double)sum / (double)runs : 0;
}

/* Products that each query takes in tiles of tile_y rows of `block` queries, `height` of which take the same keys: rows
 * of `width` keys in `planes`. */
static double tile_cost(const grid_work *w, int64_t height, int64_t tile_y, int64_t block, double width, double planes)
{
    const attn_grid_axis *a = &w->axis[Y].a;
    int64_t from, to, queries = 0, vw = w->kernels->vw;
    double sum = 0, half = 0.5 * (double)vw, each = w->kernels->nr > 2 * vw ? HEIGHT_COST : FEW_COST;
    query_places(a, 0, &from, &to);
    to = attn_min_i64(to, from + 512);
    for (int64_t y = from; y < to; y += tile_y) {
        int64_t rows = attn_min_i64(tile_y, to - y) * block;
        for (int64_t r = 0; r < rows; r += height) {
            int64_t seen[2], own[2], last = attn_min_i64(rows, r + height) - 1;
            seen_places(a, 0, y + r / block, y + last / block + 1, seen);
            seen_places(a, 0, y + r / block, y + r / block + 1, own);
            /* Scores go by whole vectors, values key by key; rows of keys that not all see are masked. */
            double more = ((int64_t)ceil(width) % vw == 0 ? 0 : half) + (seen[1] - seen[0] > own[1] - own[0] ? half : 0);
            sum += ((double)(seen[1] - seen[0]) * width + more) * planes * ((double)(last + 1 - r) + each);
        }
        queries += rows;
    }
    return queries > 0 ? sum / (double)queries : 0;
}

/* Columns of the box, in whole vectors, that any `block` neighbouring x see together; 0 when they cannot be told
 * apart. */
static int64_t block_columns(const grid_work *w, int64_t block)
{
    const attn_grid_axis *a = &w->axis[X].a;
    int64_t from, to, most = 1, vw = w->kernels->vw;
    query_places(a, 0, &from, &to);
    for (int64_t p = from; p < to; p++) {
        int64_t seen[2];
        seen_places(a, 0, p, attn_min_i64(to, p + block), seen);
        most = attn_max_i64(most, seen[1] - seen[0]);
    }
    most = attn_ceil_div(most, vw) * vw;
    return most <= attn_min_i64(a->m, GRID_STEP) ? most : 0;
}

static void choose_tile(grid_work *w, int64_t unit, int narrow)
{
    int64_t from, to, y_from, y_to;
    query_places(&w->axis[X].a, 0, &from, &to);
    query_places(&w->axis[Y].a, 0, &y_from, &y_to);
    double best = INFINITY, z = mean_extent(&w->axis[Z].a, 1), own_y = mean_extent(&w->axis[Y].a, 1);
    double all_y = mean_extent(&w->axis[Y].a, y_to - y_from);
    double packs = attn_max_i64(y_to - y_from, 1) > 1 ? 2 : all_y * z; /* keys of a column packed per query of it */
    w->unit = w->height = w->tile_x = w->tile_y = w->block = 1;
    w->columns = 0;
    for (int64_t x = 1; x <= attn_min_i64(48, attn_max_i64(1, to - from)); x++) {
        double width = mean_extent(&w->axis[X].a, x), pack = packs * width / (double)x;
        int64_t most = attn_max_i64(1, GRID_ROWS / x), least = attn_max_i64(1, GRID_ROWS / 2 / x);
        for (int64_t height = w->kernels->mr; height >= attn_min_i64(LEAST_HEIGHT, w->kernels->mr); height -= 2) {
            int64_t columns = narrow && x % height == 0 && x <= MOST_APART ? block_columns(w, height) : 0;
            for (int apart = 0; apart <= (columns > 0); apart++) {
                int64_t block = apart ? height : x;
                double across = apart ? (double)columns : width, copies = pack * (apart ? ROW_COST : PACK_COST);
                /* Unless even queries alone cost more. */
                for (int64_t y = least; y <= most && own_y * across * z + copies < best; y++) {
                    double cost = tile_cost(w, height, y, block, across, z) + copies;
                    if (cost < best * 0.999) {
                        best = cost;
                        w->height = height;
                        w->unit = attn_max_i64(height, unit / height * height);
                        w->tile_y = y;
                        w->tile_x = x;
                        w->block = block;
                        w->columns = apart ? columns : 0;
                    }
                }
            }
        }
    }
}

/* Queries of the slowest axis that a task takes: many, so that windows that reach beyond them count little, but not so
 * many that there are few tasks. */
static int64_t choose_chunk(const grid_work *w, int axis)
{
    const attn_grid_axis *a = &w->axis[axis].a;
    double window = mean_extent(a, 1), volume = 1, others = (double)w->pairs;
    int64_t tile = axis == Y ? w->tile_y : 1;
    for (int i = 0; i < 3; i++) {
        int64_t from, to;
        query_places(&w->axis[i].a, 0, &from, &to);
        volume *= mean_extent(&w->axis[i].a, 1);
        others *= (double)(w->axis[i].a.dilation * (i == X ? attn_ceil_div(to - from, w->tile_x) : 1));
    }
    double width = mean_extent(&w->axis[X].a, w->tile_x), count = (double)a->n / (double)a->dilation;
    int64_t chunk = attn_max_i64(256, (int64_t)(4 * window));
    while (chunk > tile && others * ceil(count / (double)chunk) < ENOUGH_TASKS &&
           PACK_COST * width / (double)w->tile_x * (1 + 2 * window / (double)chunk) < 0.1 * volume) {
        chunk /= 2;
    }
    return attn_ceil_div(chunk, tile) * tile;
}

static void add_tasks(grid_work *w, const int64_t group[3], int axis, int64_t chunk)
{
    int64_t from[3], to[3];
    for (int i = 0; i < 3; i++) {
        query_places(&w->axis[i].a, group[i], &from[i], &to[i]);
        if (from[i] >= to[i]) {
            return;
        }
    }
    for (int64_t x = from[X]; x < to[X]; x += w->tile_x) {
        for (int64_t c = from[axis]; c < to[axis]; c += chunk) {
            if (w->tasks != NULL) {
                grid_task *t = &w->tasks[w->task_count];
                for (int i = 0; i < 3; i++) {
                    t->group[i] = group[i];
                    t->query[i][0] = i == X ? x : i == axis ? c : from[i];
                    t->query[i][1] = i == X ? attn_min_i64(x + w->tile_x, to[X]) : i == axis ? attn_min_i64(c + chunk, to[i]) : to[i];
                    seen_places(&w->axis[i].a, group[i], t->query[i][0], t->query[i][1], t->key[i]);
                }
                if (w->columns > 0) { /* boxes hold a unit's columns */
                    t->key[X][0] = attn_min_i64(t->key[X][0], attn_max_i64(0, t->key[X][1] - w->columns));
                    t->key[X][1] = attn_max_i64(t->key[X][1], t->key[X][0] + w->columns);
                }
                w->box_keys = attn_max_i64(w->box_keys, grid_extra_first(w, t));
                w->box_width = attn_max_i64(w->box_width, grid_task_extent(t, X));
            }
            w->task_count++;
        }
    }
}

attn_status attn_grid_work_create(grid_work *w, const attn_grid *grid, int64_t unit, int narrow, attn_arena *arena)
{
    const attn_tile_kernels *kernels = attn_tile_kernels_get();
    int64_t vw = kernels->vw, nr = kernels->nr;
    *w = (grid_work){.g = grid, .kernels = kernels, .d_pad = attn_ceil_div(grid->d, vw) * vw,
                     .dv_pad = attn_ceil_div(grid->dv, vw) * vw, .group = grid->heads / grid->kv_heads,
                     .pairs = grid->batch * grid->kv_heads};
    place_axes(w);
    choose_tile(w, unit, narrow && w->axis[X].a.dilation == 1 && grid->rank > 1);
    int axis = w->axis[Z].a.n > 1 ? Z : Y;
    int64_t chunk = choose_chunk(w, axis);
    for (int pass = 0; pass < 2; pass++) {
        w->task_count = 0;
        for (int64_t i = 0; i < w->axis[Z].a.dilation * w->axis[Y].a.dilation * w->axis[X].a.dilation; i++) {
            int64_t x = w->axis[X].a.dilation, y = w->axis[Y].a.dilation;
            add_tasks(w, (int64_t[]){i / (x * y), i / x % y, i % x}, axis, chunk);
        }
        if (pass == 0) {
            w->tasks = attn_arena_array(arena, (size_t)w->task_count + 1, sizeof *w->tasks);
            if (w->tasks == NULL) {
                return attn_fail_memory((size_t)w->task_count * sizeof *w->tasks);
            }
        }
    }
    w->box_keys += attn_ceil_div(grid->extra, nr) * nr;
    return ATTN_OK;
}

/* ---- Keys ---- */

int64_t attn_grid_key_token(const grid_work *w, const grid_task *t, int64_t key)
{
    int64_t token = 0;
    for (int i = 2; i >= 0; i--) {
        int64_t extent = grid_task_extent(t, i), place = t->key[i][0] + key % extent;
        token += (place * w->axis[i].a.dilation + t->group[i]) * w->axis[i].key_step;
        key /= extent;
    }
    return token;
}

/* The next keys, at most `most`, that lie side by side; their first token. */
static int64_t next_run(const grid_work *w, const grid_task *t, grid_packing *p, int64_t most, int64_t *token)
{
    int64_t step = w->axis[X].a.dilation * w->axis[X].key_step;
    if (p->left == 0) {
        p->left = grid_task_extent(t, X);
        p->token = attn_grid_key_token(w, t, p->key);
    }
    int64_t count = step == 1 ? attn_min_i64(p->left, most) : 1;
    *token = p->token;
    p->token += count * step;
    p->left -= count;
    p->key += count;
    return count;
}

void attn_grid_ahead_rows(const grid_work *w, const grid_task *t, const grid_row *rows, int64_t count, const float *tensor, int64_t width)
{
    const grid_axis *y = &w->axis[Y];
    for (int64_t i = 0; i < count && rows[i].place[Y] + w->tile_y < t->query[Y][1]; i++) {
        int64_t token = rows[i].token + w->tile_y * y->a.dilation * y->query_step;
        attn_prefetch_ahead(tensor + token * width, 0, 1, (size_t)width * sizeof *tensor);
    }
}

void attn_grid_ahead_keys(const grid_work *w, const grid_task *t, int64_t *key, int64_t count, int64_t rows, int64_t pair)
{
    const attn_grid *g = w->g;
    int64_t across = grid_task_extent(t, X), end = attn_min_i64(grid_task_keys(t), *key + w->tile_y * across * count / rows);
    for (int64_t run; w->columns > 0 && *key < end; *key += run) {
        int64_t at = pair * w->m + attn_grid_key_token(w, t, *key);
        run = attn_min_i64(end - *key, across - *key % across);
        attn_prefetch_ahead(g->k + at * g->d, 0, 1, (size_t)(run * g->d) * sizeof(float));
        attn_prefetch_ahead(g->v + at * g->dv, 0, 1, (size_t)(run * g->dv) * sizeof(float));
    }
}

/* Some rows of keys or values, from number `key` of the box and `i` of its panel on. memcpy would copy runs of this
 * length byte by byte. */
static void pack_rows(const grid_work *w, const float *from, int64_t count, int64_t width, int64_t pad, int64_t key, int64_t i, float *rows,
                      float *scratch)
{
    if (rows != NULL && width == pad) {
        w->kernels->load_row(rows + key * pad, from, ATTN_F32, count * width, 1);
    }
    for (int64_t r = 0; r < count && rows != NULL && width < pad; r++) {
        memcpy(rows + (key + r) * pad, from + r * width, (size_t)width * sizeof *rows);
        memset(rows + (key + r) * pad + width, 0, (size_t)(pad - width) * sizeof *rows);
    }
    if (scratch != NULL) {
        w->kernels->load_row(scratch + i * width, from, ATTN_F32, count * width, 1);
    }
}

static void pack_panel(const grid_work *w, int64_t first, int64_t count, int64_t width, float *panels, float *scratch)
{
    int64_t nr = w->kernels->nr;
    if (panels != NULL) {
        memset(scratch + count * width, 0, (size_t)((nr - count) * width) * sizeof *scratch);
        w->kernels->pack_transposed(panels + first * width, nr, scratch, ATTN_F32, width, nr, width);
    }
}

void attn_grid_pack(const grid_work *w, const grid_task *t, grid_packing *packing, int64_t to, int64_t pair, const float *from,
                    int64_t width, int64_t pad, float *rows, float *panels, float *scratch)
{
    int64_t nr = w->kernels->nr, keys = grid_task_keys(t), across = grid_task_extent(t, X);
    for (; w->columns > 0 && panels != NULL && packing->key < to; packing->key += across) {
        w->kernels->pack_transposed(panels + packing->key * width, across,
                                    from + (pair * w->m + attn_grid_key_token(w, t, packing->key)) * width, ATTN_F32, width, across, width);
    }
    while (w->columns == 0 && packing->key < to) {
        int64_t first = packing->key, count = attn_min_i64(nr, keys - first);
        for (int64_t i = 0, token, run; i < count; i += run) {
            run = next_run(w, t, packing, count - i, &token);
            pack_rows(w, from + (pair * w->m + token) * width, run, width, pad, first + i, i, rows, panels != NULL ? scratch : NULL);
        }
        pack_panel(w, first, count, width, panels, scratch);
    }
}

void attn_grid_pack_extra(const grid_work *w, const grid_task *t, int64_t pair, const float *extra, int64_t width, int64_t pad,
                          float *rows, float *panels, float *scratch)
{
    int64_t nr = w->kernels->nr, first = grid_extra_first(w, t), all = w->g->extra;
    for (int64_t j = 0; j < all; j += nr) {
        int64_t count = attn_min_i64(nr, all - j);
        pack_rows(w, extra + (pair * all + j) * width, count, width, pad, first + j, 0, rows, panels != NULL ? scratch : NULL);
        pack_panel(w, first + j, count, width, panels, scratch);
    }
}

/* ---- Queries ---- */

/* The first of the columns that the unit of query x (a place) takes. */
static int64_t column_at(const grid_work *w, const grid_task *t, int64_t x)
{
    int64_t first = x - (x - t->query[X][0]) % w->block, seen[2];
    seen_places(&w->axis[X].a, t->group[X], first, attn_min_i64(first + w->block, t->query[X][1]), seen);
    return w->columns == 0 ? 0 : attn_max_i64(0, attn_min_i64(seen[0] - t->key[X][0], grid_task_extent(t, X) - w->columns));
}

int64_t attn_grid_tiles(const grid_work *w, const grid_task *t)
{
    return (t->query[Z][1] - t->query[Z][0]) * attn_ceil_div(t->query[Y][1] - t->query[Y][0], w->tile_y);
}

int64_t attn_grid_tile(const grid_work *w, const grid_task *t, int64_t tile, grid_row *rows)
{
    int64_t columns = attn_ceil_div(t->query[Y][1] - t->query[Y][0], w->tile_y), count = 0;
    int64_t z = t->query[Z][0] + tile / columns, y0 = t->query[Y][0] + tile % columns * w->tile_y, y1 = attn_min_i64(y0 + w->tile_y, t->query[Y][1]);
    for (int64_t x0 = t->query[X][0], x1, block = 0; x0 < t->query[X][1]; x0 = x1, block++) {
        x1 = attn_min_i64(x0 + w->block, t->query[X][1]);
        int64_t column = column_at(w, t, x0);
        for (int64_t i = 0; i < (y1 - y0) * (x1 - x0); i++) {
            grid_row *row = &rows[count++];
            *row = (grid_row){.place = {z, y0 + i / (x1 - x0), x0 + i % (x1 - x0)}, .block = block, .column = column};
            for (int a = 0; a < 3; a++) {
                int64_t number = query_number(&w->axis[a].a, t->group[a], row->place[a]);
                row->token += number * w->axis[a].query_step;
                row->start[a] = w->axis[a].a.start[number] - t->key[a][0];
                row->end[a] = w->axis[a].a.end[number] - t->key[a][0];
                if (row->start[a] >= row->end[a]) {
                    row->start[a] = row->end[a] = 0;
                }
            }
        }
    }
    return count;
}

int64_t attn_grid_unit(const grid_work *w, const grid_row *rows, int64_t count)
{
    int64_t most = attn_min_i64(w->unit, count), lines = w->columns > 0 ? w->unit / w->block : w->unit, unit = 1;
    while (unit < most && rows[unit].block == rows[0].block && rows[unit].place[Y] < rows[0].place[Y] + lines) {
        unit++;
    }
    return unit;
}

grid_union attn_grid_union(const grid_row *rows, int64_t count)
{
    grid_union u = {.start = {INT64_MAX, INT64_MAX}};
    for (int64_t r = 0; r < count; r++) {
        const grid_row *row = &rows[r];
        for (int i = 0; i < 2; i++) {
            if (row->start[i] < row->end[i]) {
                u.start[i] = attn_min_i64(u.start[i], row->start[i]);
                u.end[i] = attn_max_i64(u.end[i], row->end[i]);
            }
        }
    }
    for (int i = 0; i < 2; i++) {
        u.start[i] = attn_min_i64(u.start[i], u.end[i]);
    }
    return u;
}

void attn_grid_seen(const grid_task *t, const grid_row *rows, int64_t count, const grid_piece *piece, int64_t *from, int64_t *to)
{
    *from = INT64_MAX;
    *to = INT64_MIN;
    for (int64_t i = 0; i < count; i++) {
        int64_t first, last;
        grid_row_keys(t, &rows[i], piece, &first, &last);
        if (first < last) {
            *from = attn_min_i64(*from, first);
            *to = attn_max_i64(*to, last);
        }
    }
}

int attn_grid_part_next(grid_part *part, const grid_task *t, const grid_row *rows, int64_t count, const grid_piece *piece)
{
    int64_t width = grid_task_extent(t, X), base = piece->z * grid_task_extent(t, Y), r = part->first + part->rows;
    if (piece->z >= 0 && (piece->z < rows[0].start[Z] || piece->z >= rows[0].end[Z])) {
        return 0;
    }
    do {
        if (r >= count) { /* on to the next line where a row's window begins or ends */
            if (part->to >= piece->last) {
                return 0;
            }
            part->from = part->to;
            part->to = piece->last;
            for (int64_t i = 0; i < count && piece->z >= 0; i++) {
                int64_t start = (base + rows[i].start[Y]) * width, end = (base + rows[i].end[Y]) * width;
                part->to = start > part->from ? attn_min_i64(part->to, start) : part->to;
                part->to = end > part->from ? attn_min_i64(part->to, end) : part->to;
            }
            r = 0;
        }
        int64_t y = piece->z < 0 ? 0 : part->from / width - base;
        while (r < count && piece->z >= 0 && (y < rows[r].start[Y] || y >= rows[r].end[Y])) {
            r++;
        }
        part->first = r;
        while (r < count && (piece->z < 0 || (y >= rows[r].start[Y] && y < rows[r].end[Y]))) {
            r++;
        }
        part->rows = r - part->first;
    } while (part->rows == 0);
    return 1;
}

void attn_grid_walk_begin(grid_walk *walk, const grid_task *t, grid_union tile)
{
    *walk = (grid_walk){.tile = tile, .z = grid_task_keys(t) > 0 ? tile.start[0] : tile.end[0]};
    walk->at = (walk->z * grid_task_extent(t, Y) + tile.start[1]) * grid_task_extent(t, X);
}

int64_t attn_grid_walk_next(grid_walk *walk, const grid_work *w, const grid_task *t, int64_t step, grid_piece *pieces)
{
    int64_t vw = w->columns > 0 ? 1 : w->kernels->vw, width = grid_task_extent(t, X), height = grid_task_extent(t, Y), room = step, count = 0;
    int64_t extra = grid_extra_first(w, t);
    if (walk->z >= walk->tile.end[0] && walk->z >= 0) {
        walk->z = -1;
        walk->at = extra;
    }
    while (walk->z < walk->tile.end[0]) {
        int64_t end = walk->z < 0 ? extra + w->g->extra : (walk->z * height + walk->tile.end[1]) * width;
        int64_t low = walk->at / vw * vw, last = attn_min_i64(end, low + room);
        /* No slivers: a piece that does not fit waits for the next step. */
        if (last <= walk->at || (count > 0 && last < end)) {
            if (walk->at < end) {
                break;
            }
        } else {
            pieces[count++] = (grid_piece){walk->z, walk->at, last};
            room -= attn_ceil_div(last, vw) * vw - low;
            walk->at = last;
            if (last < end) {
                break;
            }
        }
        if (walk->z < 0) {
            break;
        }
        walk->z++;
        walk->at = (walk->z * height + walk->tile.start[1]) * width;
    }
    /* Queries that see none of the grid's keys still see the extra ones. */
    return count == 0 && walk->z >= 0 && walk->z >= walk->tile.end[0] ? attn_grid_walk_next(walk, w, t, step, pieces) : count;
}

/* ---- Products ---- */

void attn_grid_products(const grid_work *w, const grid_task *t, int64_t count, const float *a, int64_t lda, int64_t width, const float *panels,
                        int64_t from, int64_t to, int64_t column, float *c, int64_t ldc)
{
    const attn_tile_kernels *kernels = w->kernels;
    int64_t vw = kernels->vw, nr = kernels->nr, across = grid_task_extent(t, X), first = from / vw * vw;
    for (int64_t j = 0; j < w->columns; j += vw) {
        kernels->product_apart(count, (to - from) / across, width, a, lda, panels + from * width + column + j, across, across * width, c + j, ldc,
                               w->columns);
    }
    c -= from - first;
    for (int64_t some; w->columns == 0 && first < to; first += some, c += some) { /* to the end of a panel, then the other ones */
        int64_t inside = first % nr;
        some = inside > 0 ? attn_min_i64(to - first, nr - inside) : to - first;
        kernels->product(count, some, width, a, lda, 1, panels + (first - inside) * width + inside, nr, nr * width, c, ldc, 0);
    }
}

void attn_grid_add(const grid_work *w, const grid_task *t, int64_t count, const float *s, int64_t lds, int64_t from, int64_t to, int64_t column,
                   const float *rows, const float *tensor, int64_t pair, int64_t pad, float *to_rows)
{
    const grid_axis *y = &w->axis[Y];
    if (w->columns > 0) {
        w->kernels->product_runs(count, pad, (to - from) / grid_task_extent(t, X), w->columns, s, lds,
                                 tensor + (pair * w->m + attn_grid_key_token(w, t, from) + column) * pad, pad, y->a.dilation * y->key_step * pad,
                                 to_rows, pad, 1);
    } else {
        w->kernels->product(count, pad, to - from, s, lds, 1, rows + from * pad, pad, w->kernels->nr, to_rows, pad, 1);
    }
}

/* ---- Masks ---- */

int attn_grid_bounds(const grid_work *w, const grid_task *t, int64_t length, float *bounds)
{
    const grid_axis *x = &w->axis[X];
    int64_t width = w->columns > 0 ? w->columns : grid_task_extent(t, X);
    int hidden = 0;
    for (int64_t p = t->query[X][0]; p < t->query[X][1]; p++, bounds += length) {
        int64_t i = query_number(&x->a, t->group[X], p), first = t->key[X][0] + column_at(w, t, p);
        int64_t start = x->a.start[i] - first, end = x->a.end[i] - first;
        hidden |= start > 0 || end < width;
        for (int64_t j = 0; j < attn_min_i64(width, length); j++) {
            bounds[j] = j >= start && j < end ? INFINITY : -INFINITY;
        }
        for (int64_t j = width; j < length; j++) {
            bounds[j] = bounds[j - width];
        }
    }
    return hidden;
}

void attn_grid_mask(const grid_work *w, const grid_task *t, const grid_row *row, const grid_piece *piece, int64_t first, int64_t count,
                    const float *bounds, float *s)
{
    int64_t from, to;
    if (piece->z >= 0 && bounds != NULL) {
        w->kernels->limit(s, bounds + (w->columns > 0 ? 0 : first % grid_task_extent(t, X)), count);
    }
    grid_row_keys(t, row, piece, &from, &to);
    int64_t zero = grid_column_of(w, t, first), low = grid_column_of(w, t, from) - zero, high = grid_column_of(w, t, to) - zero;
    if (low > 0 || high < count) {
        attn_dense_mask_row(s, 0, count, low, high);
    }
}

/* ---- Runs of visible keys ---- */

grid_run attn_grid_run_begin(const grid_task *t, const grid_row *row, const grid_piece *piece, int64_t from, int64_t to)
{
    int64_t width = grid_task_extent(t, X), base = piece->z * grid_task_extent(t, Y);
    int seen = piece->z >= row->start[Z] && piece->z < row->end[Z] && row->start[X] < row->end[X] && from < to;
    grid_run run = {.y = 0, .y_end = 0};
    if (seen) {
        run.y = attn_max_i64(row->start[Y], from / width - base);
        run.y_end = attn_min_i64(row->end[Y], (to - 1) / width + 1 - base);
    }
    return run;
}

int attn_grid_run_next(grid_run *run, const grid_work *w, const grid_task *t, const grid_row *row, const grid_piece *piece,
                       int64_t from, int64_t to)
{
    int64_t width = grid_task_extent(t, X), base = piece->z * grid_task_extent(t, Y);
    while (run->y < run->y_end) {
        int64_t y = run->y, line = (base + y) * width;
        int64_t low = attn_max_i64(from, line + row->start[X]), high = attn_min_i64(to, line + row->end[X]);
        /* With one x, all y lie in a row. */
        if (width == 1 && w->axis[Y].bias_step == 1) {
            low = attn_max_i64(from, line);
            high = attn_min_i64(to, base + run->y_end);
            run->y = run->y_end;
        } else {
            run->y++;
        }
        if (low < high) {
            int64_t window_x = row->end[X] - row->start[X], window_y = row->end[Y] - row->start[Y], x = low - line;
            const int64_t place[] = {piece->z, y, x};
            run->key = low;
            run->count = high - low;
            run->slot = ((piece->z - row->start[Z]) * window_y + y - row->start[Y]) * window_x + x - row->start[X];
            run->bias = 0;
            for (int i = 0; i < 3; i++) {
                run->bias += (place[i] + t->key[i][0] - row->place[i] + w->axis[i].a.reach - 1) * w->axis[i].bias_step;
            }
            return 1;
        }
    }
    return 0;
}

void attn_grid_bias(const grid_work *w, const grid_task *t, const grid_row *row, const grid_piece *piece, int64_t from, int64_t to,
                    float *bias, float *s, float factor, int back)
{
    if (piece->z < 0) {
        return;
    }
    grid_run run = attn_grid_run_begin(t, row, piece, from, to);
    while (attn_grid_run_next(&run, w, t, row, piece, from, to)) {
        float *table = bias + run.bias, *at = s + run.key - from;
        w->kernels->axpy(back ? table : at, back ? at : table, run.count, factor);
    }
}

void attn_grid_slots(const grid_work *w, const grid_task *t, const grid_row *row, const grid_piece *piece, int64_t from, int64_t to,
                     float *slots, float *s, int back)
{
    if (back) {
        memset(s, 0, (size_t)(to - from) * sizeof *s);
    }
    grid_run run = attn_grid_run_begin(t, row, piece, from, to);
    while (attn_grid_run_next(&run, w, t, row, piece, from, to)) {
        float *at = s + run.key - from, *slot = slots + run.slot;
        memcpy(back ? at : slot, back ? slot : at, (size_t)run.count * sizeof *s);
    }
}
