/* Linear layers: y = x w^T + bias, as most frameworks store them. */
#ifndef ATTN_LAYER_LINEAR_H
#define ATTN_LAYER_LINEAR_H

#include "core/internal.h"

/* Rows that go through linear layers together where nothing keeps all of their inputs or outputs. */
#define ATTN_LINEAR_SPAN 1024

/* x [rows, in], w [out, in], bias [out] or NULL, y [rows, out]. ATTN_ERR_MEMORY. */
attn_status attn_linear_forward(attn_arena *arena, int threads, int64_t rows, int64_t in, int64_t out, const float *x,
                                const float *w, const float *bias, float *y);
/* From grad_y [rows, out]: grad_x [rows, in] is overwritten; grad_w [out, in] and grad_bias [out] are added to. Each may be
 * NULL; w is read only for grad_x, x only for grad_w. ATTN_ERR_MEMORY. */
attn_status attn_linear_backward(attn_arena *arena, int threads, int64_t rows, int64_t in, int64_t out, const float *x,
                                 const float *w, const float *grad_y, float *grad_x, float *grad_w, float *grad_bias);
/* The same, but grad_x is added to. */
attn_status attn_linear_backward_add(attn_arena *arena, int threads, int64_t rows, int64_t in, int64_t out, const float *x,
                                     const float *w, const float *grad_y, float *grad_x, float *grad_w, float *grad_bias);
/* to [columns], unless NULL, += sums over rows, ld apart: a line of columns at a time, row by row. */
void attn_linear_add_columns(int threads, int64_t rows, int64_t columns, const float *from, int64_t ld, float *to);

#endif
