/* Exact attention over few keys (agents, captions): all of them are one step of the softmax, so nothing is carried from step to step:
 * queries are read where they lie and results are written where they belong. */
#include "exec/dense.h"

#include <omp.h>
#include <string.h>

#define MOST_KEYS 128
#define ROWS 48         /* query rows that go through the keys together: a multiple of the kernels' tile heights */
#define TASK_ROWS 192
#define LOAD_ROWS 16 /* what attn_dense_pack_transposed() needs room for */

int attn_dense_is_short(const dense_problem *p, const attn_tensor *o)
{
    const attn_dense_settings *s = &p->settings;
    int all_visible = !s->causal && s->window[0] < 0 && s->window[1] < 0 && p->in->key_length == NULL;
    return all_visible && p->m > 0 && p->m <= MOST_KEYS && p->in->q.dtype == ATTN_F32 && p->in->q.stride[3] == 1 &&
           o->dtype == ATTN_F32 && o->stride[3] == 1;
}

/* Keys [B*Hkv][m_pad * D] in panels, times the factor of the scores, and values [B*Hkv][M][dv_pad]. */
typedef struct packed {
    int64_t m_pad;
    float *k, *v;
} packed;

typedef struct worker {
    float *s, *m, *l, *alpha, *rows; /* [ROWS][m_pad], [ROWS] each, [LOAD_ROWS][max(D, Dv)] */
} worker;

static void pack(const dense_problem *p, const packed *kv, int64_t pair, float *rows)
{
    int64_t b = pair / p->kv_heads, h = pair % p->kv_heads;
    float *k = kv->k + pair * kv->m_pad * p->d;
    attn_dense_pack_transposed(p, k, &p->in->k, p->in->k_scale, b, h, 0, p->m, rows);
    p->kernels->scale(k, kv->m_pad * p->d, (float)(p->base2 ? p->scale * ATTN_LOG2E : p->scale));
    attn_dense_pack_rows(p, kv->v + pair * p->m * p->dv_pad, &p->in->v, p->in->v_scale, b, h, 0, p->m, p->dv_pad);
}

/* Queries n ... n+rows of a head. */
static void attend(const dense_problem *p, const packed *kv, worker *w, int64_t b, int64_t h, int64_t n, int64_t rows, const attn_tensor *o,
                   const attn_tensor *lse)
{
    const attn_tile_kernels *kernels = p->kernels;
    int64_t pair = b * p->kv_heads + h / p->group, nr = kernels->nr, count = attn_ceil_div(p->m, kernels->vw) * kernels->vw;
    const float *q = (const float *)(const void *)attn_dense_row(&p->in->q, b, h, n);
    float *to = (float *)o->data + b * o->stride[0] + h * o->stride[1] + n * o->stride[2];
    kernels->product(rows, count, p->d, q, p->in->q.stride[2], 1, kv->k + pair * kv->m_pad * p->d, nr, p->d * nr, w->s, kv->m_pad, 0);
    for (int64_t r = 0; r < rows; r++) {
        float *s = w->s + r * kv->m_pad;
        if (attn_dense_needs_adjust(p)) {
            attn_dense_adjust(p, s, b, h, n + r, 0, count);
        }
        for (int64_t j = p->m; j < count; j++) {
            s[j] = -INFINITY;
        }
        attn_dense_begin_row(p, h, &w->m[r], &w->l[r]);
    }
    kernels->softmax(rows, w->s, kv->m_pad, count, w->m, w->l, w->alpha);
    for (int64_t r = 0; r < rows; r++) {
        kernels->scale(w->s + r * kv->m_pad, p->m, w->l[r] > 0 ? 1 / w->l[r] : w->l[r] == 0 ? 0 : NAN);
    }
    kernels->product(rows, p->dv, p->m, w->s, kv->m_pad, 1, kv->v + pair * p->m * p->dv_pad, p->dv_pad, nr, to, o->stride[2], 0);
    for (int64_t r = 0; r < rows && lse != NULL; r++) {
        ((float *)lse->data)[b * lse->stride[0] + h * lse->stride[1] + (n + r) * lse->stride[2]] =
            w->l[r] == 0 ? -INFINITY : (float)(((double)w->m[r] + log2((double)w->l[r])) * ATTN_LN2);
    }
}

static attn_status workers_create(const dense_problem *p, const packed *kv, worker **workers, int threads, attn_arena *arena)
{
    worker *made = attn_arena_array(arena, (size_t)threads, sizeof *made);
    for (int t = 0; t < threads && made != NULL; t++) {
        worker *w = &made[t];
        w->s = attn_arena_array(arena, ROWS, (size_t)kv->m_pad * sizeof(float));
        w->m = attn_arena_array(arena, 3 * ROWS, sizeof(float));
        w->rows = attn_arena_array(arena, LOAD_ROWS, (size_t)attn_max_i64(p->d, p->dv) * sizeof(float));
        if (w->s == NULL || w->m == NULL || w->rows == NULL) {
            made = NULL;
            break;
        }
        w->l = w->m + ROWS;
        w->alpha = w->l + ROWS;
    }
    *workers = made;
    return made != NULL ? ATTN_OK : attn_fail_memory((size_t)threads * ROWS * (size_t)kv->m_pad * sizeof(float));
}

attn_status attn_dense_short(const dense_problem *p, const attn_tensor *o, const attn_tensor *lse, attn_arena *arena, int threads)
{
    packed kv = {.m_pad = attn_ceil_div(p->m, p->kernels->nr) * p->kernels->nr};
    worker *workers;
    int64_t pairs = p->batch * p->kv_heads, blocks = attn_ceil_div(p->n, TASK_ROWS);
    kv.k = attn_arena_array(arena, (size_t)(pairs * kv.m_pad), (size_t)p->d * sizeof(float));
    kv.v = attn_arena_array(arena, (size_t)(pairs * p->m), (size_t)p->dv_pad * sizeof(float));
    if (kv.k == NULL || kv.v == NULL) {
        return attn_fail_memory((size_t)(pairs * kv.m_pad * (p->d + p->dv_pad)) * sizeof(float));
    }
    ATTN_TRY(workers_create(p, &kv, &workers, threads, arena));
#pragma omp parallel num_threads(threads)
    {
        worker *w = &workers[omp_get_thread_num()];
#pragma omp for schedule(static)
        for (int64_t i = 0; i < pairs; i++) {
            pack(p, &kv, i, w->rows);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < p->batch * p->heads * blocks; i++) {
            int64_t first = i % blocks * TASK_ROWS, end = attn_min_i64(first + TASK_ROWS, p->n), head = i / blocks;
            for (int64_t n = first; n < end; n += ROWS) {
                attend(p, &kv, w, head / p->heads, head % p->heads, n, attn_min_i64(ROWS, end - n), o, lse);
            }
        }
    }
    return ATTN_OK;
}
