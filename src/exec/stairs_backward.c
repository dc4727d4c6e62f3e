/* Attention of lists of query rows, backward. Tasks are groups of heads with the same keys and values. */
#include "exec/stairs_work.h"

#include <math.h>
#include <omp.h>
#include <string.h>

#define BACK_K 128
#define STRIP 32 /* rows that share one slice of the relative tables */

typedef struct back_worker {
    float *q, *rel_q, *grad_o; /* [STAIRS_BLOCK_Q][d_pad] times factor, the same, [STAIRS_BLOCK_Q][dv_pad] */
    float *k, *vt;             /* [BACK_K][d_pad] times scale; packed values */
    float *p, *ds;             /* [STAIRS_BLOCK_Q][BACK_K] */
    float *grad_k, *grad_v;    /* [BACK_K][d_pad], [BACK_K][dv_pad] */
    float *slice, *rel, *add;  /* [STRIP][width] twice over; [width][d_pad]; sums to add */
} back_worker;

typedef struct backward_state {
    const stairs_problem *p;
    const attn_stairs_gradient *gradients;
    float *const *lse2, *const *delta; /* per head */
    float *grad_k, *grad_v;
} backward_state;

/* Gradients of the relative terms from dS of rows [from, to) of the block at `first`. */
static void relative_gradients(const backward_state *b, back_worker *w, int64_t h, int64_t first, int64_t from, int64_t to, int64_t key,
                               int64_t keys)
{
    const stairs_problem *p = b->p;
    const attn_stairs_head *head = &p->stairs->heads[h];
    const attn_stairs_gradient *g = &b->gradients[h];
    for (int64_t r = from; r < to; r += STRIP) {
        int64_t rows = attn_min_i64(STRIP, to - r), begin = head->zero + key - (head->first + first + r + rows - 1);
        int64_t width = keys + rows - 1;
        memset(w->slice, 0, (size_t)(rows * width) * sizeof(float));
        for (int64_t i = 0; i < rows; i++) {
            /* Pairs that are masked have dS = 0; their table rows may not exist, so only visible ones are written. */
            int64_t count = attn_min_i64(keys, head->end[first + r + i] - key);
            memcpy(w->slice + i * width + rows - 1 - i, w->ds + (r + i) * BACK_K, (size_t)attn_max_i64(0, count) * sizeof(float));
        }
        int64_t low = attn_max_i64(0, -begin), high = attn_min_i64(width, head->rel_count - begin);
        if (g->rel_bias != NULL) {
            for (int64_t i = 0; i < rows; i++) {
                p->kernels->axpy(g->rel_bias + begin + low, w->slice + i * width + low, high - low, (float)p->stairs->scale);
            }
        }
        if (g->rel_q != NULL) {
            for (int64_t j = low; j < high; j++) {
                attn_stairs_pad(p->kernels, w->rel + (j - low) * p->d_pad, head->rel_emb + (begin + j) * head->rel_stride, 1, p->d,
                                p->d_pad, (float)p->stairs->scale);
            }
            p->kernels->product(rows, p->d, high - low, w->slice + low, width, 1, w->rel, p->d_pad, p->kernels->nr,
                                g->rel_q + (first + r) * p->d, p->d, 1);
        }
        if (g->rel_emb != NULL) {
            p->kernels->product(high - low, p->d, rows, w->slice + low, 1, width, w->rel_q + r * p->d_pad, p->d_pad, p->kernels->nr,
                                g->rel_emb + (begin + low) * p->d, p->d, 1);
        }
    }
}

/* A block of rows of head h against the loaded keys. */
static void back_block(const backward_state *b, back_worker *w, int64_t h, int64_t first, int64_t key, int64_t keys)
{
    const stairs_problem *p = b->p;
    const attn_stairs_head *head = &p->stairs->heads[h];
    const attn_stairs_gradient *g = &b->gradients[h];
    const attn_tile_kernels *kernels = p->kernels;
    int64_t block = attn_min_i64(STAIRS_BLOCK_Q, head->rows - first), from = block, to = 0, nr = kernels->nr, count = stairs_up(keys, nr);
    for (int64_t r = 0; r < block; r++) {
        if (head->end[first + r] > key) {
            from = attn_min_i64(from, r);
            to = r + 1;
        }
    }
    if (from >= to) {
        return;
    }
    int64_t some = to - from;
    attn_stairs_queries(p, head, first + from, some, p->d_pad, w->q + from * p->d_pad);
    attn_stairs_pad(p->kernels, w->grad_o + from * p->dv_pad, g->grad_o + (first + from) * p->dv, some, p->dv, p->dv_pad, 1);
    kernels->product(some, count, p->d, w->q + from * p->d_pad, p->d_pad, 1, p->k + (p->place[head->kv] * p->keys_pad + key) * p->d, nr,
                     p->d * nr, w->p + from * BACK_K, BACK_K, 0);
    if (p->relative) {
        attn_stairs_pad(kernels, w->rel_q + from * p->d_pad, head->q + (first + from) * p->d, some, p->d, p->d_pad, p->factor);
    }
    for (int64_t r = from; r < to && p->relative; r += STRIP) {
        int64_t rows = attn_min_i64(STRIP, to - r);
        /* unpadded rows for the product */
        attn_stairs_pad(kernels, w->add, head->q + (first + r) * p->d, rows, p->d, p->d, p->factor);
        attn_stairs_add_relative(p, h, first + r, rows, w->add, key, count, w->p + r * BACK_K, BACK_K, w->slice);
    }
    for (int64_t r = from; r < to; r++) {
        stairs_mask_tail(w->p + r * BACK_K, key, count, head->end[first + r]);
        kernels->exp2_row(w->p + r * BACK_K, count, b->lse2[h][first + r]);
    }
    kernels->product(some, count, p->dv, w->grad_o + from * p->dv_pad, p->dv_pad, 1, w->vt, nr, p->dv * nr, w->ds + from * BACK_K,
                     BACK_K, 0);
    for (int64_t r = from; r < to; r++) {
        kernels->grad_row(w->ds + r * BACK_K, w->p + r * BACK_K, count, b->delta[h][first + r]);
    }
    kernels->product(keys, p->dv_pad, some, w->p + from * BACK_K, 1, BACK_K, w->grad_o + from * p->dv_pad, p->dv_pad, nr, w->grad_v,
                     p->dv_pad, 1);
    kernels->product(keys, p->d_pad, some, w->ds + from * BACK_K, 1, BACK_K, w->q + from * p->d_pad, p->d_pad, nr, w->grad_k,
                     p->d_pad, 1);
    if (g->q != NULL) {
        kernels->product(some, p->d, keys, w->ds + from * BACK_K, BACK_K, 1, w->k, p->d_pad, nr, g->q + (first + from) * p->d, p->d,
                         1);
    }
    if (p->relative && (g->rel_q != NULL || g->rel_emb != NULL || g->rel_bias != NULL)) {
        relative_gradients(b, w, h, first, from, to, key, keys);
    }
}

static void back_group(const backward_state *b, back_worker *w, const stairs_group *group)
{
    const stairs_problem *p = b->p;
    const attn_stairs_head *head = &p->stairs->heads[group->head];
    for (int64_t key = 0; key < p->keys; key += BACK_K) {
        int64_t keys = attn_min_i64(BACK_K, p->keys - key), at = head->kv * p->keys + key;
        attn_stairs_pack(p->kernels, w->vt, head->v + key * p->dv, p->dv, keys, stairs_up(keys, p->kernels->nr), p->dv);
        attn_stairs_pad(p->kernels, w->k, head->k + key * p->d, keys, p->d, p->d_pad, (float)p->stairs->scale);
        memset(w->grad_k, 0, (size_t)(keys * p->d_pad) * sizeof(float));
        memset(w->grad_v, 0, (size_t)(keys * p->dv_pad) * sizeof(float));
        for (int64_t h = group->head; h < group->next; h++) {
            for (int64_t first = 0; first < p->stairs->heads[h].rows; first += STAIRS_BLOCK_Q) {
                back_block(b, w, h, first, key, keys);
            }
        }
        for (int64_t j = 0; j < keys; j++) {
            /* q was scaled for scores in base 2. */
            for (int64_t c = 0; c < p->d && b->grad_k != NULL; c++) {
                b->grad_k[(at + j) * p->d + c] = (float)ATTN_LN2 * w->grad_k[j * p->d_pad + c];
            }
            for (int64_t c = 0; c < p->dv && b->grad_v != NULL; c++) {
                b->grad_v[(at + j) * p->dv + c] = w->grad_v[j * p->dv_pad + c];
            }
        }
    }
    for (int64_t h = group->head; h < group->next; h++) {
        float *emb = b->gradients[h].rel_emb;
        if (emb != NULL) {
            p->kernels->scale(emb, p->stairs->heads[h].rel_count * p->d, (float)ATTN_LN2);
        }
    }
}

/* lse in base 2, delta = grad_o . o, and all that concerns a row's own key; the gradients that are added to later start here. */
static void back_rows(const stairs_problem *p, const attn_stairs_head *head, const attn_stairs_gradient *g, float *lse2, float *delta)
{
    for (int64_t r = 0; r < head->rows; r++) {
        const float *grad = g->grad_o + r * p->dv, *o = head->o + r * p->dv, *q = head->q + r * p->d;
        double sum = 0;
        for (int64_t c = 0; c < p->dv; c++) {
            sum += (double)grad[c] * (double)o[c];
        }
        delta[r] = (float)sum;
        lse2[r] = head->lse[r] == -INFINITY ? INFINITY : (float)((double)head->lse[r] * ATTN_LOG2E);
        float *to = g->q != NULL ? g->q + r * p->d : NULL;
        if (to != NULL) {
            memset(to, 0, (size_t)p->d * sizeof *to);
        }
        if (head->own_k == NULL) {
            continue;
        }
        const float *k = head->own_k + r * p->d, *v = head->own_v + r * p->dv;
        double score = 0, along = 0;
        for (int64_t c = 0; c < p->d; c++) {
            score += (double)q[c] * (double)k[c];
        }
        for (int64_t c = 0; c < p->dv; c++) {
            along += (double)grad[c] * (double)v[c];
        }
        double share = exp(score * p->stairs->scale - (double)head->lse[r]), slope = share * (along - sum) * p->stairs->scale;
        for (int64_t c = 0; c < p->d; c++) {
            if (to != NULL) {
                to[c] = (float)(slope * (double)k[c]);
            }
            if (g->own_k != NULL) {
                g->own_k[r * p->d + c] = (float)(slope * (double)q[c]);
            }
        }
        for (int64_t c = 0; c < p->dv && g->own_v != NULL; c++) {
            g->own_v[r * p->dv + c] = (float)(share * (double)grad[c]);
        }
    }
    if (g->rel_q != NULL) {
        memset(g->rel_q, 0, (size_t)(head->rows * p->d) * sizeof(float));
    }
    if (g->rel_emb != NULL) {
        memset(g->rel_emb, 0, (size_t)(head->rel_count * p->d) * sizeof(float));
    }
    if (g->rel_bias != NULL) {
        memset(g->rel_bias, 0, (size_t)head->rel_count * sizeof(float));
    }
}

static attn_status backward(const attn_stairs *s, const attn_stairs_gradient *gradients, float *grad_k, float *grad_v,
                            attn_arena *arena, int threads)
{
    stairs_problem p;
    ATTN_TRY(attn_stairs_prepare(&p, s, 1, arena, threads));
    attn_stairs_pack_groups(&p, 0, p.group_count, threads);
    int64_t width = BACK_K + STRIP + 4 * p.kernels->nr, rel = p.relative ? 1 : 0;
    int64_t sizes[] = {STAIRS_BLOCK_Q * p.d_pad, rel * STAIRS_BLOCK_Q * p.d_pad, STAIRS_BLOCK_Q * p.dv_pad, BACK_K * p.d_pad, BACK_K * p.dv,
                       STAIRS_BLOCK_Q * BACK_K, STAIRS_BLOCK_Q * BACK_K, BACK_K * p.d_pad, BACK_K * p.dv_pad, rel * STRIP * width,
                       rel * width * p.d_pad, rel * STRIP * p.d};
    back_worker *workers = attn_arena_array(arena, (size_t)threads, sizeof *workers);
    float **rows = attn_arena_array(arena, (size_t)s->head_count, 2 * sizeof *rows);
    if (workers == NULL || rows == NULL) {
        return attn_fail_memory((size_t)s->head_count * 2 * sizeof *rows);
    }
    ATTN_TRY(attn_stairs_workers((float **)workers, sizes, (int)(sizeof(back_worker) / sizeof(float *)), threads, arena));
    for (int64_t h = 0; h < s->head_count; h++) {
        int64_t count = s->heads[h].rows;
        rows[h] = attn_arena_array(arena, (size_t)count, 2 * sizeof(float));
        if (rows[h] == NULL) {
            return attn_fail_memory((size_t)count * 2 * sizeof(float));
        }
        rows[s->head_count + h] = rows[h] + count;
    }
    backward_state b = {&p, gradients, rows, rows + s->head_count, grad_k, grad_v};
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t h = 0; h < s->head_count; h++) {
        back_rows(&p, &s->heads[h], &gradients[h], b.lse2[h], b.delta[h]);
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < p.group_count; i++) {
        back_group(&b, &workers[omp_get_thread_num()], &p.groups[i]);
    }
    return ATTN_OK;
}

attn_status attn_stairs_backward(const attn_stairs *stairs, const attn_stairs_gradient *gradients, float *grad_k, float *grad_v,
                                 attn_arena *arena, int threads)
{
    attn_arena_mark mark = attn_arena_get_mark(arena);
    attn_status status = backward(stairs, gradients, grad_k, grad_v, arena, threads);
    attn_arena_release(arena, mark);
    return status;
}
