/* Exact attention over few keys (agents, captions, short sequences): all of them are one step of the softmax, so nothing is carried
 * from step to step: queries are read where they lie and results are written where they belong. */
#include "exec/dense.h"

#include <omp.h>
#include <string.h>

#define MOST_KEYS 128
#define EDGE_TILES 2 /* tiles of rows that go through the keys together where these differ */

int attn_dense_is_short(const dense_problem *p)
{
    return p->m <= MOST_KEYS;
}

typedef struct worker {
    int64_t pair; /* whose keys and values are packed: of a batch item and a key/value head */
    int64_t m_pad;
    float *k, *v; /* keys in panels [m_pad * D], times the factor of the scores; values [M][dv_pad], or NULL: used as they lie */
    float *q, *s, *o, *m, *l, *alpha; /* DENSE_ROWS of D, m_pad, Dv, 1, 1 and 1 */
    float *rows;                      /* DENSE_PACK_ROWS of D */
} worker;

/* Some rows of a head and where they are read from and written to. */
typedef struct part {
    int64_t b, h, n, rows;
    int64_t low, high; /* keys outside of these none of them sees; low a multiple of the panel width */
    int same;          /* all of them see all of these keys */
    const float *q;
    float *o;
    int64_t ldq, ldo;
} part;

static int whole_rows(const attn_tensor *t)
{
    return t->dtype == ATTN_F32 && t->stride[3] == 1;
}

/* Packing is worth a few rows of queries, so each thread does it for itself. */
static void pack(const dense_problem *p, worker *w, int64_t pair)
{
    int64_t b = pair / p->kv_heads, h = pair % p->kv_heads;
    attn_dense_pack_transposed(p, w->k, p->kernels->nr, &p->in->k, p->in->k_scale, b, h, 0, p->m, w->rows);
    p->kernels->scale(w->k, w->m_pad * p->d, (float)(p->base2 ? p->scale * ATTN_LOG2E : p->scale));
    if (w->v != NULL) {
        attn_dense_pack_rows(p, w->v, &p->in->v, p->in->v_scale, b, h, 0, p->m, p->dv_pad);
    }
    w->pair = pair;
}

/* Both ends of the visible keys move on from row to row. */
static void find_keys(const dense_problem *p, part *a)
{
    int64_t first_high, last_low;
    attn_dense_visible(p, a->b, a->n, &a->low, &first_high);
    attn_dense_visible(p, a->b, a->n + a->rows - 1, &last_low, &a->high);
    a->low = attn_min_i64(a->low, p->m) / p->kernels->nr * p->kernels->nr;
    a->same = last_low <= a->low && first_high >= a->high;
}

static void softmax(const dense_problem *p, worker *w, const part *a, int64_t count)
{
    int64_t low = a->low, high = a->high;
    for (int64_t r = 0; r < a->rows; r++) {
        float *s = w->s + r * w->m_pad;
        if (attn_dense_needs_adjust(p)) {
            attn_dense_adjust(p, s, a->b, a->h, a->n + r, a->low, count);
        }
        if (!a->same) {
            attn_dense_visible(p, a->b, a->n + r, &low, &high);
        }
        attn_dense_mask_row(s, a->low, count, low, high);
        attn_dense_begin_row(p, a->h, &w->m[r], &w->l[r]);
    }
    p->kernels->softmax(a->rows, w->s, w->m_pad, count, w->m, w->l, w->alpha);
    for (int64_t r = 0; r < a->rows; r++) {
        p->kernels->scale(w->s + r * w->m_pad, a->high - a->low, attn_softmax_inverse(w->l[r]));
    }
}

static void attend(const dense_problem *p, worker *w, const part *a, const attn_tensor *o, const attn_tensor *lse)
{
    const attn_tile_kernels *kernels = p->kernels;
    int64_t nr = kernels->nr, keys = attn_max_i64(0, a->high - a->low);
    int64_t count = attn_ceil_div(keys, kernels->vw) * kernels->vw;
    if (keys > 0) {
        const float *v = w->v != NULL ? w->v + a->low * p->dv_pad
                                      : (const float *)(const void *)attn_dense_row(&p->in->v, a->b, a->h / p->group, a->low);
        kernels->product(a->rows, count, p->d, a->q, a->ldq, 1, w->k + a->low * p->d, nr, p->d * nr, w->s, w->m_pad, 0);
        softmax(p, w, a, count);
        kernels->product(a->rows, p->dv, keys, w->s, w->m_pad, 1, v, w->v != NULL ? p->dv_pad : p->in->v.stride[2], nr, a->o, a->ldo, 0);
    }
    for (int64_t r = 0; r < a->rows; r++) {
        if (keys == 0) {
            memset(a->o + r * a->ldo, 0, (size_t)p->dv * sizeof *a->o);
            attn_dense_begin_row(p, a->h, &w->m[r], &w->l[r]);
        }
        if (a->o == w->o) {
            attn_dense_store_row(o, a->b, a->h, a->n + r, a->o + r * a->ldo, p->dv);
        }
        if (lse != NULL) {
            attn_dense_store_lse(lse, a->b, a->h, a->n + r, w->m[r], w->l[r]);
        }
    }
}

/* Queries n ... end of a head. */
static void attend_rows(const dense_problem *p, worker *w, int64_t head, int64_t n, int64_t end, const attn_tensor *o,
                        const attn_tensor *lse)
{
    const attn_tensor *q = &p->in->q;
    part a = {.b = head / p->heads, .h = head % p->heads, .n = n};
    for (; a.n < end; a.n += a.rows) {
        a.rows = attn_min_i64(DENSE_ROWS, end - a.n);
        find_keys(p, &a);
        if (!a.same) {
            a.rows = attn_min_i64(EDGE_TILES * p->kernels->mr, a.rows);
            find_keys(p, &a);
        }
        a.q = whole_rows(q) ? (const float *)(const void *)attn_dense_row(q, a.b, a.h, a.n) : w->q;
        a.ldq = whole_rows(q) ? q->stride[2] : p->d;
        for (int64_t r = 0; r < a.rows && !whole_rows(q); r++) {
            attn_dense_load_row(p, w->q + r * p->d, q, a.b, a.h, a.n + r, p->d, 1);
        }
        a.o = whole_rows(o) ? (float *)(uintptr_t)attn_dense_row(o, a.b, a.h, a.n) : w->o;
        a.ldo = whole_rows(o) ? o->stride[2] : p->dv;
        attend(p, w, &a, o, lse);
    }
}

static attn_status workers_create(const dense_problem *p, worker **workers, int threads, attn_arena *arena)
{
    worker *made = attn_arena_array(arena, (size_t)threads, sizeof *made);
    int copied = !attn_dense_values_as_they_lie(p);
    int64_t m_pad = attn_ceil_div(p->m, p->kernels->nr) * p->kernels->nr;
    for (int t = 0; t < threads && made != NULL; t++) {
        worker *w = &made[t];
        w->pair = -1;
        w->m_pad = m_pad;
        w->k = attn_arena_array(arena, (size_t)m_pad, (size_t)p->d * sizeof(float));
        w->v = copied ? attn_arena_array(arena, (size_t)p->m, (size_t)p->dv_pad * sizeof(float)) : NULL;
        w->q = attn_arena_array(arena, DENSE_ROWS, (size_t)p->d * sizeof(float));
        w->s = attn_arena_array(arena, DENSE_ROWS, (size_t)m_pad * sizeof(float));
        w->o = attn_arena_array(arena, DENSE_ROWS, (size_t)p->dv * sizeof(float));
        w->m = attn_arena_array(arena, 3 * DENSE_ROWS, sizeof(float));
        w->rows = attn_arena_array(arena, DENSE_PACK_ROWS, (size_t)p->d * sizeof(float));
        if (w->k == NULL || (copied && w->v == NULL) || w->q == NULL || w->s == NULL || w->o == NULL || w->m == NULL || w->rows == NULL) {
            made = NULL;
            break;
        }
        w->l = w->m + DENSE_ROWS;
        w->alpha = w->l + DENSE_ROWS;
    }
    *workers = made;
    int64_t floats = (m_pad + DENSE_ROWS) * (p->d + p->dv) + DENSE_ROWS * m_pad;
    return made != NULL ? ATTN_OK : attn_fail_memory((size_t)threads * (size_t)floats * sizeof(float));
}

attn_status attn_dense_short(const dense_problem *p, const attn_tensor *o, const attn_tensor *lse, attn_arena *arena, int threads)
{
    worker *workers;
    int64_t heads = p->batch * p->heads, blocks = attn_ceil_div(p->n, DENSE_BLOCK_Q);
    ATTN_TRY(workers_create(p, &workers, threads, arena));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < heads * blocks; i++) {
        worker *w = &workers[omp_get_thread_num()];
        int64_t head = i / blocks, first = i % blocks * DENSE_BLOCK_Q;
        if (w->pair != head / p->group) {
            pack(p, w, head / p->group);
        }
        attend_rows(p, w, head, first, attn_min_i64(first + DENSE_BLOCK_Q, p->n), o, lse);
    }
    return ATTN_OK;
}
