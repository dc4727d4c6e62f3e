/* What the grid executor's forward and backward share: how the work is cut, the keys of a task, and who sees what.
 *
 * The axes become z, y, x (1-D grids are all y). A task is one dilation group's queries of a strip: some neighbouring
 * x, all y (or a part of the slowest axis). All keys that they see form a box, copied row-major, so that the keys of a
 * few neighbouring queries are a run of the box per z: whole rows of it, of which only both ends of each row are
 * hidden. */
#ifndef ATTN_EXEC_GRID_WORK_H
#define ATTN_EXEC_GRID_WORK_H

#include "exec/dense.h"
#include "exec/grid.h"

#define GRID_ROWS 96 /* queries of a tile, at most */
#define GRID_STEP 512 /* keys that all queries of a tile go through together */

typedef struct grid_axis {
    attn_grid_axis a;
    int64_t query_step, key_step, bias_step; /* distance of neighbours, in tokens or numbers */
} grid_axis;

/* In places of one dilation group: queries [from, to) and the keys [from, to) that they see, per axis. */
typedef struct grid_task {
    int64_t group[3], query[3][2], key[3][2];
} grid_task;

typedef struct grid_work {
    const attn_grid *g;
    const attn_tile_kernels *kernels;
    grid_axis axis[3];
    int64_t n, m;           /* tokens */
    int64_t d_pad, dv_pad, group, pairs;
    int64_t unit, height;   /* queries that go through keys together, and those of them that take the same keys */
    int64_t tile_y, tile_x; /* extents of a tile of queries */
    int64_t block;          /* queries of a row of the tile that may form a unit with those below them */
    int64_t columns;        /* that a unit takes of each row of the box, in whole vectors; 0: rows whole */
    grid_task *tasks;
    int64_t task_count;
    int64_t box_keys;  /* the most keys of a task, extra ones included, in whole panels */
    int64_t box_width; /* the most keys of a row of a box */
    size_t bias_count; /* numbers of a head's bias */
} grid_work;

/* A query of a tile; its window is relative to the task's box. column: the first one that its unit takes. */
typedef struct grid_row {
    int64_t token, place[3], start[3], end[3], block, column;
} grid_row;

/* A run of keys of the box with one z; z = -1: extra keys. */
typedef struct grid_piece {
    int64_t z, first, last;
} grid_piece;

/* What rows see together: z and y ranges. */
typedef struct grid_union {
    int64_t start[2], end[2];
} grid_union;

/* Units of at most `unit` queries, or of those whose scores are computed together. Small windows are cheaper when
 * units, then of few neighbouring x, take some columns of wide boxes; narrow: that is allowed. */
attn_status attn_grid_work_create(grid_work *w, const attn_grid *grid, int64_t unit, int narrow, attn_arena *arena);

static inline int64_t grid_task_extent(const grid_task *t, int axis) { return t->key[axis][1] - t->key[axis][0]; }
/* Keys of the box, and where extra ones begin. */
static inline int64_t grid_task_keys(const grid_task *t)
{
    return grid_task_extent(t, 0) * grid_task_extent(t, 1) * grid_task_extent(t, 2);
}
static inline int64_t grid_extra_first(const grid_work *w, const grid_task *t)
{
    return attn_ceil_div(grid_task_keys(t), w->kernels->nr) * w->kernels->nr;
}

/* What has been packed of a task's box. Packing follows the tiles, so that what a tile reads first is still in
 * cache. */
typedef struct grid_packing {
    int64_t key, left, token; /* the next key; keys left in its row of the box, and the token before it */
} grid_packing;

/* Ask memory, while a unit of `count` rows is computed, for what the next tile will need: rows of a tensor [N][width]
 * that belong to the queries below, and with columns (packing whole boxes waits little) the unit's share of keys and
 * values from *key on, which is moved. */
void attn_grid_ahead_rows(const grid_work *w, const grid_task *t, const grid_row *rows, int64_t count, const float *tensor, int64_t width);
void attn_grid_ahead_keys(const grid_work *w, const grid_task *t, int64_t *key, int64_t count, int64_t rows, int64_t pair);
/* Keys of the box up to `to` and a panel's end, of key/value head `pair` of `from`: as rows [keys][pad], zero-padded,
 * into `rows`, and transposed in panels of nr keys into `panels`; either may be NULL. scratch: [nr][width]. With
 * columns, panels are rows of the box, and `rows` is not written. */
void attn_grid_pack(const grid_work *w, const grid_task *t, grid_packing *packing, int64_t to, int64_t pair, const float *from,
                    int64_t width, int64_t pad, float *rows, float *panels, float *scratch);
/* Keys of a box that a step of `most` columns holds. */
static inline int64_t grid_step(const grid_work *w, const grid_task *t, int64_t most)
{
    return w->columns > 0 ? most / w->columns * grid_task_extent(t, 2) : most;
}
/* Where a key of the box stands among the columns of a unit, which may leave out some of each row. */
static inline int64_t grid_column_of(const grid_work *w, const grid_task *t, int64_t key)
{
    return w->columns > 0 ? key / grid_task_extent(t, 2) * w->columns : key;
}
/* The same for extra keys, at once. */
void attn_grid_pack_extra(const grid_work *w, const grid_task *t, int64_t pair, const float *extra, int64_t width, int64_t pad,
                          float *rows, float *panels, float *scratch);
/* Keys that a tile reads lie before this one. */
static inline int64_t grid_tile_end(const grid_task *t, const grid_union *tile)
{
    int64_t height = t->key[1][1] - t->key[1][0], width = t->key[2][1] - t->key[2][0];
    return tile->start[0] < tile->end[0] ? ((tile->end[0] - 1) * height + tile->end[1]) * width : 0;
}

/* Token of a key of the box. */
int64_t attn_grid_key_token(const grid_work *w, const grid_task *t, int64_t key);

/* The queries of tile number `tile` of a task, block after block; returns how many. */
int64_t attn_grid_tiles(const grid_work *w, const grid_task *t);
int64_t attn_grid_tile(const grid_work *w, const grid_task *t, int64_t tile, grid_row *rows);
/* How many of the next `count` rows form a unit. */
int64_t attn_grid_unit(const grid_work *w, const grid_row *rows, int64_t count);

grid_union attn_grid_union(const grid_row *rows, int64_t count);

/* The next keys that a tile goes through, at most `step` columns. */
typedef struct grid_walk {
    grid_union tile;
    int64_t z, at;
} grid_walk;
void attn_grid_walk_begin(grid_walk *walk, const grid_task *t, grid_union tile);
int64_t attn_grid_walk_next(grid_walk *walk, const grid_work *w, const grid_task *t, int64_t step, grid_piece *pieces);

/* The keys [*from, *to) of a piece that a row sees, but for x; *from >= *to: none. */
static inline void grid_row_keys(const grid_task *t, const grid_row *row, const grid_piece *piece, int64_t *from, int64_t *to)
{
    *from = piece->first;
    *to = piece->last;
    if (piece->z >= 0) {
        int64_t width = grid_task_extent(t, 2), base = piece->z * grid_task_extent(t, 1);
        int seen = piece->z >= row->start[0] && piece->z < row->end[0];
        *from = attn_max_i64(*from, (base + row->start[1]) * width);
        *to = seen ? attn_min_i64(*to, (base + row->end[1]) * width) : *from;
    }
}

/* The keys that any of some rows sees, but for x. */
void attn_grid_seen(const grid_task *t, const grid_row *rows, int64_t count, const grid_piece *piece, int64_t *from, int64_t *to);

/* Keys [from, to) of a piece, and rows [first, first + rows) of a unit that see all of them but for x. A unit's rows
 * have one z. */
typedef struct grid_part {
    int64_t from, to, first, rows;
} grid_part;
static inline grid_part grid_part_begin(const grid_piece *piece, int64_t count)
{
    return (grid_part){.from = piece->first, .to = piece->first, .first = count};
}
/* The next part of a piece for a unit of `count` rows; 0 at the end. */
int attn_grid_part_next(grid_part *part, const grid_task *t, const grid_row *rows, int64_t count, const grid_piece *piece);

/* c [count][ldc] = a [count][width] times keys [from, to) of packed panels, the first at c[0], those before it in its
 * vector before that. Units that take columns of the box begin with `column`. */
void attn_grid_products(const grid_work *w, const grid_task *t, int64_t count, const float *a, int64_t lda, int64_t width, const float *panels,
                        int64_t from, int64_t to, int64_t column, float *c, int64_t ldc);
/* to [count][pad] += s [count][lds] times rows of the same keys: packed ones, or, with columns, from tensor
 * [pairs][M][pad] where they lie. */
void attn_grid_add(const grid_work *w, const grid_task *t, int64_t count, const float *s, int64_t lds, int64_t from, int64_t to, int64_t column,
                   const float *rows, const float *tensor, int64_t pair, int64_t pad, float *to_rows);

/* -inf for what a row does not see of a piece's keys [first, first + count). bounds: of the row's x, from
 * attn_grid_bounds, or NULL when it sees whole rows. */
void attn_grid_mask(const grid_work *w, const grid_task *t, const grid_row *row, const grid_piece *piece, int64_t first, int64_t count,
                    const float *bounds, float *s);

/* For each x of a strip: +inf for keys of a row of the box (or of its unit's columns) that it sees, -inf for others,
 * repeated. Returns whether any is hidden. Each of the tile_x tables holds grid_bounds_length() numbers. */
static inline int64_t grid_bounds_length(const grid_work *w, int64_t step) { return w->box_width + step + w->kernels->nr; }
int attn_grid_bounds(const grid_work *w, const grid_task *t, int64_t length, float *bounds);

/* The runs of consecutive visible keys of a row within [from, to) of a piece; slot: of the first one in the row's
 * window. */
typedef struct grid_run {
    int64_t key, count, slot, bias;
    int64_t y, y_end; /* the walk's own */
} grid_run;
grid_run attn_grid_run_begin(const grid_task *t, const grid_row *row, const grid_piece *piece, int64_t from, int64_t to);
int attn_grid_run_next(grid_run *run, const grid_work *w, const grid_task *t, const grid_row *row, const grid_piece *piece,
                       int64_t from, int64_t to);

/* s += factor * bias by offset on the visible keys of [from, to), s[0] belongs to `from`; or with `back` the bias +=
 * factor * s. */
void attn_grid_bias(const grid_work *w, const grid_task *t, const grid_row *row, const grid_piece *piece, int64_t from, int64_t to,
                    float *bias, float *s, float factor, int back);
/* The visible keys of [from, to) between s and the slots of a row's window; back: from the slots, zeros elsewhere. */
void attn_grid_slots(const grid_work *w, const grid_task *t, const grid_row *row, const grid_piece *piece, int64_t from, int64_t to,
                     float *slots, float *s, int back);

#endif
