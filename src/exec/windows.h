/* Attention of the blocks of an image over a window of the image each: all queries of a block share the window, the block plus a halo.
 * A window's keys are gathered once per key head into a panel that all query heads of the group read. Slots outside the image hold a zero
 * key and value, or are left out. 2-D relative positions are two tables, multiplied with the queries and added by index.
 *
 * Window slot (a, b) of block (R, C) is the pixel (R*bh - hh + a, C*bw - hw + b). Query (i, j) of the block is at the pixel
 * (R*bh + i*sh, C*bw + j*sw); its relative index for slot (a, b) is (a - i*ph + wh - 1, b - j*pw + ww - 1).
 */
#ifndef ATTN_EXEC_WINDOWS_H
#define ATTN_EXEC_WINDOWS_H

#include "core/internal.h"

/* [B, heads, tokens, width] with unit stride in the last axis. */
typedef struct attn_windows_view {
    float *data;
    int64_t batch, head, token; /* strides */
} attn_windows_view;

typedef struct attn_windows {
    int64_t batch, heads, kv_heads, d, dv;
    int64_t grid[2], block[2], halo[2], stride[2], step[2];
    double scale;
    int scale_relative; /* relative terms are multiplied by scale too */
    int masked;         /* slots outside the image are left out */
    attn_windows_view q, k, v, o;
    float *lse;         /* [B, heads, output tokens]; may be NULL in forward */
    const float *rel_h, *rel_w; /* [2wh-1, d], [2ww-1, d], or both NULL */
    const float *pad_k, *pad_v; /* [kv_heads, d], [kv_heads, dv]: what slots outside the image hold; NULL: zeros, as with tables */
} attn_windows;

/* The grid of queries: ceil(grid / stride). */
static inline int64_t attn_windows_out(const attn_windows *w, int axis) { return attn_ceil_div(w->grid[axis], w->stride[axis]); }
static inline int64_t attn_windows_extent(const attn_windows *w, int axis) { return w->block[axis] + 2 * w->halo[axis]; }

/* Fills o and lse. ATTN_ERR_MEMORY. */
attn_status attn_windows_forward(const attn_windows *w, attn_arena *arena, int threads);

/* grad_q is overwritten, the others are added to; each may be NULL (data NULL). rel gradients [2wh-1, d], [2ww-1, d]. */
typedef struct attn_windows_gradients {
    attn_windows_view o; /* incoming */
    attn_windows_view q, k, v;
    float *rel_h, *rel_w, *pad_k, *pad_v;
} attn_windows_gradients;

attn_status attn_windows_backward(const attn_windows *w, const attn_windows_gradients *grad, attn_arena *arena, int threads);

#endif
