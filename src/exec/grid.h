/* Attention in neighbourhoods of a 1-D, 2-D or 3-D grid (arXiv:2403.04690): each query sees a box of keys, given per
 * axis by tables, so that windows may slide, stand still for groups of queries, be cut or shifted at borders, and be
 * dilated.
 *
 * Tokens lie row-major. All tensors are contiguous f32: q [batch, heads, N, d], k [batch, kv_heads, M, d], v [batch,
 * kv_heads, M, dv], o [batch, heads, N, dv], lse [batch, heads, N], N and M the products of the axes' extents. Query
 * head h reads key/value head h / (heads / kv_heads). Memory beyond the tensors does not depend on the window. Results
 * do not depend on threads. */
#ifndef ATTN_EXEC_GRID_H
#define ATTN_EXEC_GRID_H

#include "core/internal.h"

/* Position x of the keys belongs to dilation group x mod dilation and stands at place x div dilation in it. Query i
 * stands at key position first + i (which may lie outside of the keys), and sees places start[i] ... end[i] - 1 of its
 * own group; none when start >= end. Windows lie within the group. */
typedef struct attn_grid_axis {
    int64_t n, m; /* queries, keys */
    int64_t first, dilation;
    const int64_t *start, *end; /* [n] */
    int64_t reach; /* with bias: offsets from query to key lie in -(reach - 1) ... reach - 1 */
} attn_grid_axis;

typedef struct attn_grid {
    int rank; /* 1 ... 3 */
    attn_grid_axis axis[3];
    int64_t batch, heads, kv_heads, d, dv;
    int64_t extra; /* more keys, that every query sees */
    double scale;
    const float *q, *k, *v;
    const float *bias;             /* [heads, 2 reach_1 - 1, ...], added by offset (in places), or NULL */
    const float *extra_k, *extra_v; /* [batch, kv_heads, extra, d], [batch, kv_heads, extra, dv] */
} attn_grid;

/* Where gradients go; overwritten, NULL: not wanted. */
typedef struct attn_grid_gradients {
    float *q, *k, *v, *bias, *extra_k, *extra_v;
} attn_grid_gradients;

/* A query that sees nothing gets o = 0 and lse = -inf. lse may be NULL. ATTN_ERR_MEMORY, in all of these. */
attn_status attn_grid_forward(const attn_grid *grid, attn_arena *arena, int threads, float *o, float *lse);
attn_status attn_grid_backward(const attn_grid *grid, attn_arena *arena, int threads, const float *o, const float *lse,
                               const float *grad_o, const attn_grid_gradients *to);

/* The halves, when all windows hold `window` keys; extra keys have no part in them. Slot j of a query is key j of its
 * window, row-major. scores [batch, heads, N, window] = scale q.k + bias. */
attn_status attn_grid_scores(const attn_grid *grid, int64_t window, attn_arena *arena, int threads, float *scores);
attn_status attn_grid_scores_backward(const attn_grid *grid, int64_t window, attn_arena *arena, int threads,
                                      const float *grad_scores, const attn_grid_gradients *to);
/* o = sum over the window of w v; q and k are not read. */
attn_status attn_grid_values(const attn_grid *grid, int64_t window, attn_arena *arena, int threads, const float *w, float *o);
/* grad_w may be NULL. */
attn_status attn_grid_values_backward(const attn_grid *grid, int64_t window, attn_arena *arena, int threads, const float *w,
                                      const float *grad_o, float *grad_w, const attn_grid_gradients *to);

#endif
