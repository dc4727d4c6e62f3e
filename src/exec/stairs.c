/* Attention of lists of query rows with an end each. Tasks are blocks of rows (forward) or key/value heads (backward). */
#include "exec/stairs.h"
#include "exec/softmax.h"

#include "kernel/tile.h"

#include <math.h>
#include <omp.h>
#include <string.h>

#define BLOCK_Q 192
#define BLOCK_K 512 /* keys of a step; a multiple of every panel width */
#define ROWS 48    /* rows that share a step's keys while a panel of them is in L1, where all see them all */
#define BACK_K 128
#define STRIP 32 /* rows that share one slice of the relative tables, backward */

typedef struct problem {
    const attn_stairs *stairs;
    const attn_tile_kernels *kernels;
    int64_t d, dv, d_pad, dv_pad, keys, keys_pad, rel_pad;
    float factor;    /* of q, for scores in base 2 */
    int relative;
    float *k, *v;    /* [kv][keys_pad * d] packed, [kv][keys][dv_pad] or NULL: as they lie */
    float *rel;      /* [head][rel_pad * d] packed tables */
    float *rel_bias; /* [head][rel_pad], times factor */
} problem;

static int64_t up(int64_t count, int64_t unit) { return attn_ceil_div(count, unit) * unit; }

/* rows of `width` numbers, transposed in panels of nr; what lies past the last row is zero up to `padded` rows. */
static void pack(const attn_tile_kernels *kernels, float *to, const float *from, int64_t stride, int64_t rows, int64_t padded,
                 int64_t width)
{
    int64_t nr = kernels->nr;
    for (int64_t j = 0; j < padded; j += nr, to += width * nr) {
        int64_t count = attn_max_i64(0, attn_min_i64(nr, rows - j));
        if (count < nr) {
            memset(to, 0, (size_t)(width * nr) * sizeof *to);
        }
        if (count > 0) {
            kernels->pack_transposed(to, nr, from + j * stride, ATTN_F32, stride, count, width);
        }
    }
}

static void pad_rows(float *to, const float *from, int64_t rows, int64_t width, int64_t pad, float factor)
{
    for (int64_t r = 0; r < rows; r++, to += pad, from += width) {
        for (int64_t c = 0; c < width; c++) {
            to[c] = factor * from[c];
        }
        memset(to + width, 0, (size_t)(pad - width) * sizeof *to);
    }
}

static attn_status problem_create(problem *p, const attn_stairs *s, attn_arena *arena, int threads, int with_values)
{
    const attn_tile_kernels *kernels = attn_tile_kernels_get();
    *p = (problem){.stairs = s, .kernels = kernels, .d = s->d, .dv = s->dv, .d_pad = up(s->d, kernels->vw),
                   .dv_pad = up(s->dv, kernels->vw), .keys = s->keys, .keys_pad = up(s->keys, kernels->nr),
                   .factor = (float)(s->scale * ATTN_LOG2E)};
    for (int64_t h = 0; h < s->head_count; h++) {
        p->relative |= s->heads[h].rel_emb != NULL || s->heads[h].rel_bias != NULL;
        /* A slice may reach a panel past the keys. */
        p->rel_pad = attn_max_i64(p->rel_pad, up(s->heads[h].rel_count, kernels->nr) + BLOCK_K + 2 * kernels->nr);
    }
    int64_t rel_heads = p->relative ? s->head_count : 0, own_v = with_values && p->dv != p->dv_pad ? s->kv_count : 0;
    p->k = attn_arena_array(arena, (size_t)(s->kv_count * p->keys_pad * p->d), sizeof(float));
    p->v = attn_arena_array(arena, (size_t)(own_v * p->keys * p->dv_pad), sizeof(float));
    p->rel = attn_arena_array(arena, (size_t)(rel_heads * p->rel_pad * (p->d + 1)), sizeof(float));
    if (p->k == NULL || p->v == NULL || p->rel == NULL) {
        return attn_fail_memory((size_t)(s->kv_count * p->keys_pad * (p->d + p->dv_pad)) * sizeof(float));
    }
    p->rel_bias = p->rel + rel_heads * p->rel_pad * p->d;
    p->v = own_v > 0 ? p->v : NULL;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t h = 0; h < s->head_count; h++) {
        const attn_stairs_head *head = &s->heads[h];
        if (h == 0 || head->kv != s->heads[h - 1].kv) {
            pack(kernels, p->k + head->kv * p->keys_pad * p->d, head->k, p->d, p->keys, p->keys_pad, p->d);
            if (p->v != NULL) {
                pad_rows(p->v + head->kv * p->keys * p->dv_pad, head->v, p->keys, p->dv, p->dv_pad, 1);
            }
        }
        if (head->rel_emb != NULL) {
            pack(kernels, p->rel + h * p->rel_pad * p->d, head->rel_emb, head->rel_stride, head->rel_count, p->rel_pad, p->d);
        }
        for (int64_t i = 0; i < p->rel_pad && head->rel_bias != NULL; i++) {
            p->rel_bias[h * p->rel_pad + i] = i < head->rel_count ? p->factor * head->rel_bias[i * head->rel_bias_stride] : 0.0f;
        }
    }
    return ATTN_OK;
}

/* The first table row of a slice for rows up to position `last` and keys from `low`, down to a whole panel. */
static int64_t slice_begin(const problem *p, const attn_stairs_head *head, int64_t low, int64_t last)
{
    int64_t nr = p->kernels->nr;
    return (head->zero + low - last) / nr * nr;
}

/* s [rows][lds] += the relative terms of rows [r, r+rows) and keys [low, low+count). slice: [rows][slice width]. */
static void add_relative(const problem *p, int64_t h, int64_t r, int64_t rows, const float *rel_q, int64_t low, int64_t count, float *s,
                         int64_t lds, float *slice)
{
    const attn_stairs_head *head = &p->stairs->heads[h];
    int64_t nr = p->kernels->nr, begin = slice_begin(p, head, low, head->first + r + rows - 1);
    int64_t width = up(head->zero + low + count - (head->first + r) - begin, nr);
    if (head->rel_emb != NULL) {
        p->kernels->product(rows, width, p->d, rel_q, p->d, 1, p->rel + h * p->rel_pad * p->d + begin * p->d, nr, p->d * nr, slice,
                            width, 0);
    }
    for (int64_t i = 0; i < rows; i++) {
        int64_t at = head->zero + low - (head->first + r + i);
        if (head->rel_emb != NULL) {
            p->kernels->axpy(s + i * lds, slice + i * width + at - begin, count, 1);
        }
        if (head->rel_bias != NULL) {
            p->kernels->axpy(s + i * lds, p->rel_bias + h * p->rel_pad + at, count, 1);
        }
    }
}

static void mask_tail(float *s, int64_t low, int64_t count, int64_t end)
{
    for (int64_t j = attn_max_i64(0, end - low); j < count; j++) {
        s[j] = -INFINITY;
    }
}

/* ---- Forward ---- */

typedef struct worker {
    float *q, *rel_q, *o, *s, *slice, *m, *l, *alpha;
} worker;

/* Rows [r, r+rows) of the block that starts at row `first` of head h, against keys from `block`. */
static void attend(const problem *p, worker *w, int64_t h, int64_t first, int64_t r, int64_t rows, int64_t block)
{
    const attn_stairs_head *head = &p->stairs->heads[h];
    const attn_tile_kernels *kernels = p->kernels;
    const int64_t *end = head->end + first + r;
    int64_t high = 0, inner = INT64_MAX, nr = kernels->nr;
    for (int64_t i = 0; i < rows; i++) {
        high = attn_max_i64(high, end[i]);
        inner = attn_min_i64(inner, end[i]);
    }
    high = attn_min_i64(high, block + BLOCK_K);
    if (block >= high) {
        return;
    }
    int64_t count = up(high - block, nr), keys = attn_min_i64(count, p->keys - block);
    kernels->product(rows, count, p->d, w->q + r * p->d, p->d, 1, p->k + (head->kv * p->keys_pad + block) * p->d, nr, p->d * nr, w->s,
                     BLOCK_K, 0);
    if (p->relative) {
        add_relative(p, h, first + r, rows, w->rel_q + r * p->d, block, count, w->s, BLOCK_K, w->slice);
    }
    for (int64_t i = 0; i < rows && inner < block + count; i++) {
        mask_tail(w->s + i * BLOCK_K, block, count, end[i]);
    }
    kernels->softmax(rows, w->s, BLOCK_K, count, w->m + r, w->l + r, w->alpha);
    for (int64_t i = 0; i < rows; i++) {
        if (w->alpha[i] != 1.0f) {
            kernels->scale(w->o + (r + i) * p->dv_pad, p->dv_pad, w->alpha[i]);
        }
    }
    const float *v = p->v != NULL ? p->v + (head->kv * p->keys + block) * p->dv_pad : head->v + block * p->dv;
    kernels->product(rows, p->dv_pad, keys, w->s, BLOCK_K, 1, v, p->dv_pad, nr, w->o + r * p->dv_pad, p->dv_pad, 1);
}

static void forward_block(const problem *p, worker *w, int64_t h, int64_t first)
{
    const attn_stairs_head *head = &p->stairs->heads[h];
    int64_t rows = attn_min_i64(BLOCK_Q, head->rows - first), last = 0;
    pad_rows(w->q, head->q + first * p->d, rows, p->d, p->d, p->factor);
    if (head->rel_emb != NULL) {
        pad_rows(w->rel_q, head->rel_q + first * p->d, rows, p->d, p->d, p->factor);
    }
    for (int64_t r = 0; r < rows; r++) {
        float *o = w->o + r * p->dv_pad;
        memset(o, 0, (size_t)p->dv_pad * sizeof *o);
        w->m[r] = -INFINITY;
        w->l[r] = 0;
        if (head->own_k != NULL) {
            w->m[r] = p->kernels->dot(w->q + r * p->d, head->own_k + (first + r) * p->d, p->d);
            w->l[r] = 1;
            memcpy(o, head->own_v + (first + r) * p->dv, (size_t)p->dv * sizeof *o);
        }
        last = attn_max_i64(last, head->end[first + r]);
    }
    for (int64_t block = 0; block < last; block += BLOCK_K) {
        /* Where ends lie inside the step, and with slices of relative tables, a tile's height at a time. */
        for (int64_t r = 0, some; r < rows; r += some) {
            some = attn_min_i64(ROWS, rows - r);
            for (int64_t i = 0; i < some; i++) {
                if (p->relative || head->end[first + r + i] < block + BLOCK_K) {
                    some = attn_min_i64(p->kernels->mr, rows - r);
                }
            }
            attend(p, w, h, first, r, some, block);
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        float *o = w->o + r * p->dv_pad;
        p->kernels->scale(o, p->dv_pad, attn_softmax_inverse(w->l[r]));
        memcpy(head->o + (first + r) * p->dv, o, (size_t)p->dv * sizeof *o);
        if (head->lse != NULL) {
            head->lse[first + r] = attn_softmax_lse(w->m[r], w->l[r]);
        }
    }
}

/* `count` arrays of floats for each of `threads` workers, which are structs of just these pointers. */
static attn_status workers_create(float **workers, const int64_t *sizes, int count, int threads, attn_arena *arena)
{
    for (int i = 0; i < count * threads; i++) {
        workers[i] = attn_arena_array(arena, (size_t)sizes[i % count], sizeof(float));
        if (workers[i] == NULL) {
            return attn_fail_memory((size_t)sizes[i % count] * sizeof(float));
        }
    }
    return ATTN_OK;
}

static attn_status forward(const attn_stairs *s, attn_arena *arena, int threads)
{
    problem p;
    ATTN_TRY(problem_create(&p, s, arena, threads, 1));
    int64_t mr = p.kernels->mr, slice = mr * (BLOCK_K + mr + 3 * p.kernels->nr), blocks = 0, task = 0;
    int64_t sizes[] = {BLOCK_Q * p.d, BLOCK_Q * p.d, BLOCK_Q * p.dv_pad, ROWS * BLOCK_K, p.relative ? slice : 1, BLOCK_Q, BLOCK_Q, ROWS};
    for (int64_t h = 0; h < s->head_count; h++) {
        blocks += attn_ceil_div(s->heads[h].rows, BLOCK_Q);
    }
    worker *workers = attn_arena_array(arena, (size_t)threads, sizeof *workers);
    int64_t *tasks = attn_arena_array(arena, (size_t)blocks, 2 * sizeof *tasks);
    if (workers == NULL || tasks == NULL) {
        return attn_fail_memory((size_t)blocks * 2 * sizeof *tasks);
    }
    ATTN_TRY(workers_create((float **)workers, sizes, (int)(sizeof(worker) / sizeof(float *)), threads, arena));
    for (int64_t h = 0; h < s->head_count; h++) {
        /* The last blocks see most keys: they come first. */
        for (int64_t b = attn_ceil_div(s->heads[h].rows, BLOCK_Q) - 1; b >= 0; b--, task++) {
            tasks[2 * task] = h;
            tasks[2 * task + 1] = b * BLOCK_Q;
        }
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < blocks; t++) {
        forward_block(&p, &workers[omp_get_thread_num()], tasks[2 * t], tasks[2 * t + 1]);
    }
    return ATTN_OK;
}

attn_status attn_stairs_forward(const attn_stairs *stairs, attn_arena *arena, int threads)
{
    attn_arena_mark mark = attn_arena_get_mark(arena);
    attn_status status = forward(stairs, arena, threads);
    attn_arena_release(arena, mark);
    return status;
}

/* ---- Backward ---- */

typedef struct back_worker {
    float *q, *rel_q, *grad_o; /* [BLOCK_Q][d_pad] times factor, the same, [BLOCK_Q][dv_pad] */
    float *k, *vt;             /* [BACK_K][d_pad] times scale; packed values */
    float *p, *ds;             /* [BLOCK_Q][BACK_K] */
    float *grad_k, *grad_v;    /* [BACK_K][d_pad], [BACK_K][dv_pad] */
    float *slice, *rel, *add;  /* [STRIP][width] twice over; [width][d_pad]; sums to add */
} back_worker;

typedef struct backward_state {
    const problem *p;
    const attn_stairs_gradient *gradients;
    float *const *lse2, *const *delta; /* per head */
    float *grad_k, *grad_v;
} backward_state;

/* Gradients of the relative terms from dS of rows [from, to) of the block at `first`. */
static void relative_gradients(const backward_state *b, back_worker *w, int64_t h, int64_t first, int64_t from, int64_t to, int64_t key,
                               int64_t keys)
{
    const problem *p = b->p;
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
        if (head->rel_emb == NULL) {
            continue;
        }
        if (g->rel_q != NULL) {
            for (int64_t j = low; j < high; j++) {
                pad_rows(w->rel + (j - low) * p->d_pad, head->rel_emb + (begin + j) * head->rel_stride, 1, p->d, p->d_pad,
                         (float)p->stairs->scale);
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
    const problem *p = b->p;
    const attn_stairs_head *head = &p->stairs->heads[h];
    const attn_stairs_gradient *g = &b->gradients[h];
    const attn_tile_kernels *kernels = p->kernels;
    int64_t block = attn_min_i64(BLOCK_Q, head->rows - first), from = block, to = 0, nr = kernels->nr, count = up(keys, nr);
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
    pad_rows(w->q + from * p->d_pad, head->q + (first + from) * p->d, some, p->d, p->d_pad, p->factor);
    pad_rows(w->grad_o + from * p->dv_pad, g->grad_o + (first + from) * p->dv, some, p->dv, p->dv_pad, 1);
    kernels->product(some, count, p->d, w->q + from * p->d_pad, p->d_pad, 1, p->k + (head->kv * p->keys_pad + key) * p->d, nr,
                     p->d * nr, w->p + from * BACK_K, BACK_K, 0);
    if (p->relative) {
        if (head->rel_emb != NULL) {
            pad_rows(w->rel_q + from * p->d_pad, head->rel_q + (first + from) * p->d, some, p->d, p->d_pad, p->factor);
        }
        for (int64_t r = from; r < to; r += STRIP) {
            int64_t rows = attn_min_i64(STRIP, to - r);
            if (head->rel_emb != NULL) { /* unpadded rows for the product */
                pad_rows(w->add, head->rel_q + (first + r) * p->d, rows, p->d, p->d, p->factor);
            }
            add_relative(p, h, first + r, rows, w->add, key, count, w->p + r * BACK_K, BACK_K, w->slice);
        }
    }
    for (int64_t r = from; r < to; r++) {
        mask_tail(w->p + r * BACK_K, key, count, head->end[first + r]);
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

/* Heads [h0, h1) share keys and values. */
static void back_group(const backward_state *b, back_worker *w, int64_t h0, int64_t h1)
{
    const problem *p = b->p;
    const attn_stairs_head *head = &p->stairs->heads[h0];
    for (int64_t key = 0; key < p->keys; key += BACK_K) {
        int64_t keys = attn_min_i64(BACK_K, p->keys - key), at = head->kv * p->keys + key;
        pack(p->kernels, w->vt, head->v + key * p->dv, p->dv, keys, up(keys, p->kernels->nr), p->dv);
        pad_rows(w->k, head->k + key * p->d, keys, p->d, p->d_pad, (float)p->stairs->scale);
        memset(w->grad_k, 0, (size_t)(keys * p->d_pad) * sizeof(float));
        memset(w->grad_v, 0, (size_t)(keys * p->dv_pad) * sizeof(float));
        for (int64_t h = h0; h < h1; h++) {
            for (int64_t first = 0; first < p->stairs->heads[h].rows; first += BLOCK_Q) {
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
    for (int64_t h = h0; h < h1; h++) {
        float *emb = b->gradients[h].rel_emb;
        if (emb != NULL) {
            p->kernels->scale(emb, p->stairs->heads[h].rel_count * p->d, (float)ATTN_LN2);
        }
    }
}

/* lse in base 2, delta = grad_o . o, and all that concerns a row's own key; the gradients that are added to later start here. */
static void back_rows(const problem *p, const attn_stairs_head *head, const attn_stairs_gradient *g, float *lse2, float *delta)
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
    problem p;
    ATTN_TRY(problem_create(&p, s, arena, threads, 0));
    int64_t width = BACK_K + STRIP + 4 * p.kernels->nr, rel = p.relative ? 1 : 0;
    int64_t sizes[] = {BLOCK_Q * p.d_pad, rel * BLOCK_Q * p.d_pad, BLOCK_Q * p.dv_pad, BACK_K * p.d_pad, BACK_K * p.dv,
                       BLOCK_Q * BACK_K, BLOCK_Q * BACK_K, BACK_K * p.d_pad, BACK_K * p.dv_pad, rel * STRIP * width,
                       rel * width * p.d_pad, rel * STRIP * p.d};
    back_worker *workers = attn_arena_array(arena, (size_t)threads, sizeof *workers);
    float **rows = attn_arena_array(arena, (size_t)s->head_count, 2 * sizeof *rows);
    int64_t *groups = attn_arena_array(arena, (size_t)s->head_count + 1, sizeof *groups), group_count = 0;
    if (workers == NULL || rows == NULL || groups == NULL) {
        return attn_fail_memory((size_t)s->head_count * 2 * sizeof *rows);
    }
    ATTN_TRY(workers_create((float **)workers, sizes, (int)(sizeof(back_worker) / sizeof(float *)), threads, arena));
    for (int64_t h = 0; h < s->head_count; h++) {
        int64_t count = s->heads[h].rows;
        rows[h] = attn_arena_array(arena, (size_t)count, 2 * sizeof(float));
        if (rows[h] == NULL) {
            return attn_fail_memory((size_t)count * 2 * sizeof(float));
        }
        rows[s->head_count + h] = rows[h] + count;
        if (h == 0 || s->heads[h].kv != s->heads[h - 1].kv) {
            groups[group_count++] = h;
        }
    }
    groups[group_count] = s->head_count;
    backward_state b = {&p, gradients, rows, rows + s->head_count, grad_k, grad_v};
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t h = 0; h < s->head_count; h++) {
        back_rows(&p, &s->heads[h], &gradients[h], b.lse2[h], b.delta[h]);
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < group_count; i++) {
        back_group(&b, &workers[omp_get_thread_num()], groups[i], groups[i + 1]);
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
