/* Rotary positions (arXiv:2104.09864). */
#ifndef ATTN_LAYER_ROPE_H
#define ATTN_LAYER_ROPE_H

#include "core/internal.h"

/* cos and sin of position * base^(-2j/dim), positions first ... first + count - 1: table[count][2][dim/2], from angles in double.
 * dim is even. ATTN_ERR_MEMORY. */
attn_status attn_rope_table(attn_arena *arena, int64_t first, int64_t count, int64_t dim, double base, float **table);

/* Rotate the first dim channels of x in place by a row of the table, backwards when `inverse` (which is also the gradient). Pairs
 * are (j, j + dim/2), or (2j, 2j + 1) when interleaved. */
void attn_rope_apply(const float *table_row, int64_t dim, int interleaved, int inverse, float *x);

#endif
