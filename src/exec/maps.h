/* Exact attention over few keys whose map is of interest (cross-attention over a text): rows of the map come out as they are computed, a
 * block of queries at a time, and the map is stored by nobody who does not want it. Callers loop over maps and blocks, on any threads.
 */
#ifndef ATTN_EXEC_MAPS_H
#define ATTN_EXEC_MAPS_H

#include "core/internal.h"
#include "kernel/tile.h"

/* Queries of a block. */
#define ATTN_MAPS_ROWS 48

typedef struct attn_maps {
    int64_t count, group;     /* maps; `group` of them share keys and values */
    int64_t n, keys, d, dv;
    double scale;
    const float *q, *k, *v; /* [count,n,d], [count/group,keys,d], [count/group,keys,dv] */
    /* By attn_maps_begin: */
    const attn_tile_kernels *kernels;
    int64_t ld;                    /* of rows of the map: keys up to whole vectors */
    int64_t keys_pad, d_pad, dv_pad; /* keys up to whole panels, channels up to whole vectors */
    float *k_panels, *v_rows, *k_rows, *v_panels; /* the last two: backward only */
    struct attn_maps_worker *workers;
} attn_maps;

/* Pack keys and values (few), and take scratch for each thread. ATTN_ERR_MEMORY. */
attn_status attn_maps_begin(attn_maps *m, int backward, attn_arena *arena, int threads);

/* Rows [first, first + rows) of a map, [rows][ld], valid until the thread's next call; o [count,n,dv] gets its rows (NULL: not
 * wanted). keys >= 1, rows <= ATTN_MAPS_ROWS. */
const float *attn_maps_forward(const attn_maps *m, int64_t map, int64_t first, int64_t rows, float *o);

/* Backward in two steps for the rows of the last attn_maps_forward() of this thread: first the gradient of the map [rows][ld]
 * that comes from grad_o ([count,n,dv], NULL: zero), for the caller to add to; then what follows from it: grad_q [count,n,d] is set;
 * grad_k [keys,d] and grad_v [keys,dv] are added to for keys from `freeze` on. Each may be NULL. */
float *attn_maps_gradient(const attn_maps *m, int64_t map, int64_t first, int64_t rows, const float *grad_o);
void attn_maps_backward(const attn_maps *m, int64_t map, int64_t first, int64_t rows, const float *grad_o, int64_t freeze, float *grad_q,
                        float *grad_k, float *grad_v);

#endif
