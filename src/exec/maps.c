#include "exec/maps.h"
#include "exec/softmax.h"

#include <omp.h>
#include <string.h>

typedef struct attn_maps_worker {
    float *p, *dp;       /* [ATTN_MAPS_ROWS][ld] */
    float *m, *l, *alpha;
    float *q, *grad_o;   /* [ATTN_MAPS_ROWS] of whole vectors, where rows are not */
} worker;

static worker *own_worker(const attn_maps *m) { return &m->workers[omp_get_thread_num()]; }

static int64_t up(int64_t count, int64_t unit) { return attn_ceil_div(count, unit) * unit; }

/* Rows times `factor` with zeros up to `pad`. */
static void pad_rows(const attn_maps *m, float *to, const float *from, int64_t rows, int64_t width, int64_t pad, float factor)
{
    for (int64_t r = 0; r < rows; r++, to += pad, from += width) {
        m->kernels->load_row(to, from, ATTN_F32, width, factor);
        for (int64_t c = width; c < pad; c++) {
            to[c] = 0;
        }
    }
}

/* Rows of keys, transposed in panels, times `factor`; keys beyond the last are zeros. */
static void pack_panels(const attn_maps *m, float *to, const float *from, int64_t width, float factor)
{
    int64_t nr = m->kernels->nr;
    memset(to, 0, (size_t)(m->keys_pad * width) * sizeof *to);
    for (int64_t j = 0; j < m->keys; j += nr) {
        m->kernels->pack_transposed(to + j * width, nr, from + j * width, ATTN_F32, width, attn_min_i64(nr, m->keys - j), width);
    }
    m->kernels->scale(to, m->keys_pad * width, factor);
}

static attn_status take(attn_arena *arena, int64_t count, float **out)
{
    *out = attn_arena_array(arena, (size_t)count, sizeof **out);
    return *out != NULL ? ATTN_OK : attn_fail_memory((size_t)count * sizeof **out);
}

attn_status attn_maps_begin(attn_maps *m, int backward, attn_arena *arena, int threads)
{
    m->kernels = attn_tile_kernels_get();
    m->ld = up(m->keys, m->kernels->vw), m->keys_pad = up(m->keys, m->kernels->nr), m->d_pad = up(m->d, m->kernels->vw), m->dv_pad = up(m->dv, m->kernels->vw);
    int64_t texts = m->group > 0 ? m->count / m->group : 0, back = backward ? texts : 0;
    ATTN_TRY(take(arena, texts * m->keys_pad * m->d, &m->k_panels));
    ATTN_TRY(take(arena, texts * m->keys * m->dv_pad, &m->v_rows));
    ATTN_TRY(take(arena, back * m->keys * m->d_pad, &m->k_rows));
    ATTN_TRY(take(arena, back * m->keys_pad * m->dv, &m->v_panels));
    m->workers = attn_arena_array(arena, (size_t)threads, sizeof *m->workers);
    if (m->workers == NULL) {
        return attn_fail_memory((size_t)threads * sizeof *m->workers);
    }
    for (int t = 0; t < threads; t++) {
        worker *w = &m->workers[t];
        ATTN_TRY(take(arena, ATTN_MAPS_ROWS * m->ld, &w->p));
        ATTN_TRY(take(arena, backward ? ATTN_MAPS_ROWS * m->ld : 0, &w->dp));
        ATTN_TRY(take(arena, 3 * ATTN_MAPS_ROWS, &w->m));
        ATTN_TRY(take(arena, ATTN_MAPS_ROWS * m->d_pad, &w->q));
        ATTN_TRY(take(arena, ATTN_MAPS_ROWS * m->dv_pad, &w->grad_o));
        w->l = w->m + ATTN_MAPS_ROWS;
        w->alpha = w->l + ATTN_MAPS_ROWS;
    }
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < texts; i++) {
        const float *k = m->k + i * m->keys * m->d, *v = m->v + i * m->keys * m->dv;
        pack_panels(m, m->k_panels + i * m->keys_pad * m->d, k, m->d, (float)(m->scale * ATTN_LOG2E));
        pad_rows(m, m->v_rows + i * m->keys * m->dv_pad, v, m->keys, m->dv, m->dv_pad, 1);
        if (backward) {
            pad_rows(m, m->k_rows + i * m->keys * m->d_pad, k, m->keys, m->d, m->d_pad, (float)m->scale);
            pack_panels(m, m->v_panels + i * m->keys_pad * m->dv, v, m->dv, 1);
        }
    }
    return ATTN_OK;
}

const float *attn_maps_forward(const attn_maps *m, int64_t map, int64_t first, int64_t rows, float *o)
{
    const attn_tile_kernels *kernels = m->kernels;
    worker *w = own_worker(m);
    int64_t text = map / m->group;
    kernels->product(rows, m->ld, m->d, m->q + (map * m->n + first) * m->d, m->d, 1, m->k_panels + text * m->keys_pad * m->d, kernels->nr,
                     m->d * kernels->nr, w->p, m->ld, 0);
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t j = m->keys; j < m->ld; j++) {
            w->p[r * m->ld + j] = -INFINITY;
        }
        w->m[r] = -INFINITY;
        w->l[r] = 0;
    }
    kernels->softmax(rows, w->p, m->ld, m->ld, w->m, w->l, w->alpha);
    for (int64_t r = 0; r < rows; r++) {
        kernels->scale(w->p + r * m->ld, m->ld, attn_softmax_inverse(w->l[r]));
    }
    if (o != NULL) {
        kernels->product(rows, m->dv, m->keys, w->p, m->ld, 1, m->v_rows + text * m->keys * m->dv_pad, m->dv_pad, kernels->nr,
                         o + (map * m->n + first) * m->dv, m->dv, 0);
    }
    return w->p;
}

float *attn_maps_gradient(const attn_maps *m, int64_t map, int64_t first, int64_t rows, const float *grad_o)
{
    worker *w = own_worker(m);
    if (grad_o == NULL) {
        memset(w->dp, 0, (size_t)(rows * m->ld) * sizeof *w->dp);
    } else {
        m->kernels->product(rows, m->ld, m->dv, grad_o + (map * m->n + first) * m->dv, m->dv, 1,
                            m->v_panels + map / m->group * m->keys_pad * m->dv, m->kernels->nr, m->dv * m->kernels->nr, w->dp, m->ld, 0);
    }
    return w->dp;
}

/* Rows for the right side of a product, which reads whole vectors. */
static const float *whole_rows(const attn_maps *m, float *scratch, const float *from, int64_t rows, int64_t width, int64_t pad)
{
    if (width == pad) {
        return from;
    }
    pad_rows(m, scratch, from, rows, width, pad, 1);
    return scratch;
}

void attn_maps_backward(const attn_maps *m, int64_t map, int64_t first, int64_t rows, const float *grad_o, int64_t freeze, float *grad_q,
                        float *grad_k, float *grad_v)
{
    const attn_tile_kernels *kernels = m->kernels;
    worker *w = own_worker(m);
    int64_t at = map * m->n + first, ld = m->ld, moving = m->keys - freeze;
    for (int64_t r = 0; r < rows; r++) {
        float *dp = w->dp + r * ld;
        kernels->grad_row(dp, w->p + r * ld, ld, kernels->dot(w->p + r * ld, dp, ld)); /* p is 0 past the keys */
    }
    if (grad_q != NULL) {
        kernels->product(rows, m->d, m->keys, w->dp, ld, 1, m->k_rows + map / m->group * m->keys * m->d_pad, m->d_pad, kernels->nr,
                         grad_q + at * m->d, m->d, 0);
    }
    if (grad_k != NULL && moving > 0) {
        const float *q = whole_rows(m, w->q, m->q + at * m->d, rows, m->d, m->d_pad);
        for (int64_t r = 0; r < rows; r++) {
            kernels->scale(w->dp + r * ld, ld, (float)m->scale);
        }
        kernels->product(moving, m->d, rows, w->dp + freeze, 1, ld, q, m->d_pad, kernels->nr, grad_k + freeze * m->d, m->d, 1);
    }
    if (grad_v != NULL && grad_o != NULL && moving > 0) {
        const float *g = whole_rows(m, w->grad_o, grad_o + at * m->dv, rows, m->dv, m->dv_pad);
        kernels->product(moving, m->dv, rows, w->p + freeze, 1, ld, g, m->dv_pad, kernels->nr, grad_v + freeze * m->dv, m->dv, 1);
    }
}
