/* Rows of tokens and the heads in them. */
#ifndef ATTN_LAYER_HEADS_H
#define ATTN_LAYER_HEADS_H

#include "core/internal.h"

/* `heads` heads of `d` numbers lie side by side in rows of `width` numbers, from column `column` on: [batch * n][width]. */
typedef struct attn_head_rows {
    int64_t batch, n, heads, d, width, column;
} attn_head_rows;

/* to [batch][heads][n][d] */
void attn_heads_split(const attn_head_rows *shape, int threads, const float *rows, float *to);
/* from [batch][heads][n][d] into the rows' columns */
void attn_heads_join(const attn_head_rows *shape, int threads, const float *from, float *rows);

/* The same for `count` rows from `first` on alone: `rows` holds only these. */
void attn_heads_split_some(const attn_head_rows *shape, int threads, int64_t first, int64_t count, const float *rows, float *to);
void attn_heads_join_some(const attn_head_rows *shape, int threads, int64_t first, int64_t count, const float *from, float *rows);

/* to [batch][heads][n][d] = the columns of x w^T + bias (or NULL), x [batch * n][in], w [width][in]. ATTN_ERR_MEMORY. */
attn_status attn_heads_project(const attn_head_rows *shape, attn_arena *arena, int threads, int64_t in, const float *x, const float *w,
                               const float *bias, float *to);
/* y [batch * n][out] = rows w^T + bias, where `from` [batch][heads][n][d] fills the rows, w [out][width]. ATTN_ERR_MEMORY. */
attn_status attn_heads_output(const attn_head_rows *shape, attn_arena *arena, int threads, int64_t out, const float *from, const float *w,
                              const float *bias, float *y);

/* to[i] += from[i] */
void attn_add_f32(int threads, int64_t count, float *to, const float *from);

#endif
