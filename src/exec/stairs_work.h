/* What the passes over lists of query rows share: groups of heads, packed keys and tables, and rows of queries. */
#ifndef ATTN_EXEC_STAIRS_WORK_H
#define ATTN_EXEC_STAIRS_WORK_H

#include "exec/softmax.h"
#include "exec/stairs.h"
#include "kernel/decode.h"
#include "kernel/tile.h"

#define STAIRS_BLOCK_Q ATTN_STAIRS_BLOCK
#define STAIRS_BLOCK_K 512 /* keys of a step; a multiple of every panel width */
#define STAIRS_FEW 16      /* rows of a group that read keys and values as they lie */

/* Heads [head, next) have the same keys and values; no row of theirs sees more than `end` keys. */
typedef struct stairs_group {
    int64_t head, next, end;
    int few; /* so few rows that nothing is packed for them (and there are channels) */
} stairs_group;

/* Rows [low, low+rows) of a table of relative positions, those that the rows of a head reach, packed like keys; heads of several batch
 * items share one. What lies past the table is zero. */
typedef struct stairs_table {
    int64_t head, low, rows;
    float *emb, *bias; /* bias in base 2 */
} stairs_table;

typedef struct stairs_problem {
    const attn_stairs *stairs;
    const attn_tile_kernels *kernels;
    const attn_decode_kernels *decode;
    int64_t d, dv, d_pad, dv_pad, keys, keys_pad, group_count, table_count;
    float factor;    /* of q, for scores in base 2 */
    int relative;
    stairs_group *groups;
    stairs_table *tables;
    int64_t *table; /* of each head */
    int64_t room;   /* groups whose packed keys there is memory for at a time */
    int64_t *place; /* [kv]: where in it a group lies */
    float *k, *v;   /* [room][keys_pad * d] packed, [room][keys][dv_pad] or NULL: as they lie */
} stairs_problem;

static inline int64_t stairs_up(int64_t count, int64_t unit) { return attn_ceil_div(count, unit) * unit; }

/* Everything but what attn_stairs_pack_groups() packs. backward: there is room for all groups; values are not packed. */
attn_status attn_stairs_prepare(stairs_problem *problem, const attn_stairs *stairs, int backward, attn_arena *arena, int threads);
/* The keys and values of groups [first, next), at most `room` of them, in place of those before; with group 0 also the tables. */
void attn_stairs_pack_groups(stairs_problem *problem, int64_t first, int64_t next, int threads);

/* rows of `width` numbers, transposed in panels of nr; what lies past the last row is zero up to `padded` rows. */
void attn_stairs_pack(const attn_tile_kernels *kernels, float *to, const float *from, int64_t stride, int64_t rows, int64_t padded,
                      int64_t width);
/* to [rows][pad] = factor * from [rows][width], zero-padded. */
void attn_stairs_pad(const attn_tile_kernels *kernels, float *to, const float *from, int64_t rows, int64_t width, int64_t pad, float factor);
/* Rows [first, first+rows) of a head's queries for the content term, times the problem's factor: to [rows][pad]. */
void attn_stairs_queries(const stairs_problem *problem, const attn_stairs_head *head, int64_t first, int64_t rows, int64_t pad, float *to);
/* s [rows][lds] += the relative terms of rows [r, r+rows) of head h and keys [low, low+count), in base 2. rel_q [rows][d] times the factor.
 * slice: room for rows * (count + rows + 2 * nr). */
void attn_stairs_add_relative(const stairs_problem *problem, int64_t h, int64_t r, int64_t rows, const float *rel_q, int64_t low,
                              int64_t count, float *s, int64_t lds, float *slice);

/* -inf from key `end` on; s[j] belongs to key low + j. */
static inline void stairs_mask_tail(float *s, int64_t low, int64_t count, int64_t end)
{
    for (int64_t j = attn_max_i64(0, end - low); j < count; j++) {
        s[j] = -INFINITY;
    }
}

/* `count` arrays of floats for each of `threads` workers, which are structs of just these pointers. */
attn_status attn_stairs_workers(float **workers, const int64_t *sizes, int count, int threads, attn_arena *arena);

/* Rows [first, first + rows) of head h before their first key: queries times the problem's factor, q [rows][d], and the state, o
 * [rows][dv_pad]. Then one row's results after the last. */
void attn_stairs_begin_rows(const stairs_problem *problem, int64_t h, int64_t first, int64_t rows, float *q, float *o, float *m, float *l);
void attn_stairs_finish_row(const stairs_problem *problem, const attn_stairs_head *head, int64_t row, float *o, float m, float l);

/* stairs_decode.c: the few rows of a group over its keys. scratch: attn_stairs_few_size() floats. */
int64_t attn_stairs_few_size(const stairs_problem *problem);
void attn_stairs_few(const stairs_problem *problem, const stairs_group *group, float *scratch);

#endif
