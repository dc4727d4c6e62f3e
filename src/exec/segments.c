/* Attention over several lists of keys. A task is a block of query rows of one key/value head. */
#include "exec/segments.h"
#include "exec/softmax.h"
#include "kernel/tile.h"

#include <omp.h>
#include <string.h>

#define BLOCK_Q 384 /* rows of a task: so many that packing keys again for each of them costs little */
#define BLOCK_K 512 /* keys of a step; a multiple of every panel width */
#define ROWS 48     /* rows that go through a step together: a multiple of the kernels' tile heights */

typedef struct problem {
    const attn_segments *s;
    const attn_tile_kernels *kernels;
    int64_t rows; /* of a key/value head: its query heads one after the other */
    int64_t dv_pad;
    float *o, *lse, *shares;
    int weighted; /* any of these is wanted */
} problem;

/* The scores' bias goes through the product: one more channel, which is 1 in every query. */
typedef struct worker {
    float *q;        /* [BLOCK_Q][d + 1] */
    float *k, *v;    /* keys in panels [BLOCK_K * (d + 1)], values [BLOCK_K][dv_pad] */
    float *rows;     /* [nr][d]: listed keys on their way into a panel */
    float *s, *o;    /* [ROWS][BLOCK_K], [BLOCK_Q][dv_pad] */
    float *m, *l;    /* [BLOCK_Q]; l: of the list at hand only */
    float *alpha;    /* [ROWS] */
    float *m_of, *l_of; /* [BLOCK_Q][count]: m and l as each list left them */
} worker;

static int64_t row_of(const attn_segment *g, int64_t i) { return g->index != NULL ? g->index[i] : i; }

/* Keys [first, first + keys) of a list, in panels. Columns past them get a bias of -inf up to whole vectors. */
static void pack_keys(const problem *p, worker *w, const attn_segment *g, const float *k, int64_t first, int64_t keys)
{
    int64_t d = p->s->d, nr = p->kernels->nr;
    for (int64_t j = 0; j < keys; j += nr) {
        int64_t some = attn_min_i64(nr, keys - j);
        float *panel = w->k + j * (d + 1), *bias = panel + d * nr;
        const float *from = k + (first + j) * d;
        if (some < nr) {
            memset(panel, 0, (size_t)((d + 1) * nr) * sizeof *panel);
        }
        for (int64_t i = 0; i < some && (g->index != NULL || g->factor != NULL); i++) {
            p->kernels->load_row(w->rows + i * d, k + row_of(g, first + j + i) * d, ATTN_F32, d,
                                 g->factor != NULL ? g->factor[first + j + i] : 1);
            from = w->rows;
        }
        p->kernels->pack_transposed(panel, nr, from, ATTN_F32, d, some, d);
        for (int64_t i = 0; i < nr; i++) {
            bias[i] = i >= some ? -INFINITY : g->bias != NULL ? (float)((double)g->bias[first + j + i] * ATTN_LOG2E) : 0;
        }
    }
}

/* The values of these keys: as they lie, or together. */
static const float *take_values(const problem *p, worker *w, const attn_segment *g, const float *v, int64_t first, int64_t keys)
{
    int64_t dv = p->s->dv;
    if (g->index == NULL && dv == p->dv_pad) {
        return v + first * dv;
    }
    for (int64_t i = 0; i < keys; i++) {
        float *to = w->v + i * p->dv_pad;
        memcpy(to, v + row_of(g, first + i) * dv, (size_t)dv * sizeof *to);
        memset(to + dv, 0, (size_t)(p->dv_pad - dv) * sizeof *to);
    }
    return w->v;
}

/* Keys [first, first + keys) of a list. */
typedef struct step {
    int64_t segment, first, keys;
    int with_bias;
    const float *v;
} step;

/* All rows of a task against one step of keys; `row`: the number of the first one. */
static void attend_step(const problem *p, worker *w, int64_t row, int64_t rows, const step *x)
{
    const attn_tile_kernels *kernels = p->kernels;
    int64_t d = p->s->d, count = attn_ceil_div(x->keys, kernels->vw) * kernels->vw;
    for (int64_t r = 0; r < rows; r += ROWS) {
        int64_t some = attn_min_i64(ROWS, rows - r);
        kernels->product(some, count, d + (x->with_bias || count > x->keys), w->q + r * (d + 1), d + 1, 1, w->k, kernels->nr,
                         (d + 1) * kernels->nr, w->s, BLOCK_K, 0);
        for (int64_t i = 0; i < some && p->s->hook != NULL; i++) {
            p->s->hook(p->s->user, w->s + i * BLOCK_K, row + r + i, x->segment, x->first, x->keys);
        }
        if (p->weighted) {
            kernels->softmax(some, w->s, BLOCK_K, count, w->m + r, w->l + r, w->alpha);
        }
        if (p->o == NULL) {
            continue;
        }
        for (int64_t i = 0; i < some; i++) {
            if (w->alpha[i] != 1.0f) {
                kernels->scale(w->o + (r + i) * p->dv_pad, p->dv_pad, w->alpha[i]);
            }
        }
        kernels->product(some, p->dv_pad, x->keys, w->s, BLOCK_K, 1, x->v, p->dv_pad, kernels->nr, w->o + r * p->dv_pad, p->dv_pad, 1);
    }
}

/* One list: its sum starts at 0 under the maximum so far. */
static void attend_segment(const problem *p, worker *w, int64_t row, int64_t rows, int64_t pair, int64_t segment)
{
    const attn_segments *s = p->s;
    const attn_segment *g = &s->segments[segment];
    int64_t b = pair / s->kv_heads, h = pair % s->kv_heads;
    const float *k = g->k + b * g->k_stride[0] + h * g->k_stride[1];
    const float *v = p->o != NULL ? g->v + b * g->v_stride[0] + h * g->v_stride[1] : NULL;
    memset(w->l, 0, (size_t)rows * sizeof *w->l);
    for (int64_t first = 0; first < g->keys; first += BLOCK_K) {
        int64_t keys = attn_min_i64(BLOCK_K, g->keys - first);
        pack_keys(p, w, g, k, first, keys);
        step x = {segment, first, keys, g->bias != NULL, p->o != NULL ? take_values(p, w, g, v, first, keys) : NULL};
        attend_step(p, w, row, rows, &x);
    }
    for (int64_t r = 0; r < rows; r++) {
        w->m_of[r * s->count + segment] = w->m[r];
        w->l_of[r * s->count + segment] = w->l[r];
    }
}

/* The lists' sums under the final maximum, and what follows from them. */
static void finish_row(const problem *p, worker *w, int64_t r, int64_t row)
{
    int64_t count = p->s->count;
    const float *m = w->m_of + r * count, *l = w->l_of + r * count;
    double total = 0, top = (double)w->m[r];
    for (int64_t i = 0; i < count; i++) {
        total += l[i] != 0 ? (double)l[i] * exp2((double)m[i] - top) : 0;
    }
    double inverse = total != 0 ? 1 / total : 0;
    for (int64_t i = 0; i < count && p->shares != NULL; i++) {
        p->shares[row * count + i] = l[i] != 0 ? (float)((double)l[i] * exp2((double)m[i] - top) * inverse) : 0;
    }
    if (p->lse != NULL) {
        p->lse[row] = total == 0 ? -INFINITY : (float)((top + log2(total)) * ATTN_LN2);
    }
    if (p->o != NULL) {
        p->kernels->load_row(p->o + row * p->s->dv, w->o + r * p->dv_pad, ATTN_F32, p->s->dv, (float)inverse);
    }
}

static attn_status workers_create(const problem *p, worker **workers, attn_arena *arena, int threads)
{
    int64_t d = p->s->d, nr = p->kernels->nr, count = p->s->count;
    int64_t sizes[] = {BLOCK_Q * (d + 1), BLOCK_K * (d + 1), BLOCK_K * p->dv_pad, nr * d, ROWS * BLOCK_K, BLOCK_Q * p->dv_pad,
                       BLOCK_Q, BLOCK_Q, ROWS, BLOCK_Q * count, BLOCK_Q * count};
    *workers = attn_arena_array(arena, (size_t)threads, sizeof **workers);
    for (int t = 0; t < threads && *workers != NULL; t++) {
        worker *w = &(*workers)[t];
        float **parts[] = {&w->q, &w->k, &w->v, &w->rows, &w->s, &w->o, &w->m, &w->l, &w->alpha, &w->m_of, &w->l_of};
        for (size_t i = 0; i < sizeof sizes / sizeof sizes[0] && *workers != NULL; i++) {
            *parts[i] = attn_arena_array(arena, (size_t)sizes[i], sizeof(float));
            *workers = *parts[i] != NULL ? *workers : NULL;
        }
    }
    return *workers != NULL ? ATTN_OK : attn_fail_memory((size_t)(BLOCK_Q * (d + p->dv_pad + 2 * count)) * sizeof(float));
}

attn_status attn_segments_forward(const attn_segments *s, float *o, float *lse, float *shares, attn_arena *arena, int threads)
{
    const attn_tile_kernels *kernels = attn_tile_kernels_get();
    problem p = {.s = s, .kernels = kernels, .o = o, .lse = lse, .shares = shares, .weighted = o != NULL || lse != NULL || shares != NULL,
                 .rows = s->kv_heads > 0 ? s->heads / s->kv_heads * s->n : 0,
                 .dv_pad = attn_ceil_div(s->dv, kernels->vw) * kernels->vw};
    int64_t blocks = attn_ceil_div(p.rows, BLOCK_Q);
    float factor = (float)(s->scale * ATTN_LOG2E);
    worker *workers;
    attn_arena_mark mark = attn_arena_get_mark(arena);
    ATTN_TRY(workers_create(&p, &workers, arena, threads));
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t task = 0; task < s->batch * s->kv_heads * blocks; task++) {
        worker *w = &workers[omp_get_thread_num()];
        int64_t pair = task / blocks, first = task % blocks * BLOCK_Q, rows = attn_min_i64(BLOCK_Q, p.rows - first);
        for (int64_t r = 0; r < rows; r++) {
            float *q = w->q + r * (s->d + 1);
            kernels->load_row(q, s->q + (pair * p.rows + first + r) * s->d, ATTN_F32, s->d, factor);
            q[s->d] = 1;
            w->m[r] = -INFINITY;
        }
        memset(w->o, 0, (size_t)(rows * p.dv_pad) * sizeof *w->o);
        for (int64_t i = 0; i < s->count; i++) {
            attend_segment(&p, w, pair * p.rows + first, rows, pair, i);
        }
        for (int64_t r = 0; r < rows; r++) {
            finish_row(&p, w, r, pair * p.rows + first + r);
        }
    }
    attn_arena_release(arena, mark);
    return ATTN_OK;
}
