/* Rows of tokens and the heads in them. */
#ifndef ATTN_LAYER_HEADS_H
#define ATTN_LAYER_HEADS_H

#include <stdint.h>

/* `heads` heads of `d` numbers lie side by side in rows of `width` numbers, from column `column` on: [batch * n][width]. */
typedef struct attn_head_rows {
    int64_t batch, n, heads, d, width, column;
} attn_head_rows;

/* to [batch][heads][n][d] */
void attn_heads_split(const attn_head_rows *shape, int threads, const float *rows, float *to);
/* from [batch][heads][n][d] into the rows' columns */
void attn_heads_join(const attn_head_rows *shape, int threads, const float *from, float *rows);

/* to[i] += from[i] */
void attn_add_f32(int threads, int64_t count, float *to, const float *from);

#endif
