/* Flow attention forward, in tiles of tokens that stay in the caches.
 *
 * All that the flows need from other tokens are sums of rows: over all tokens, or in the causal form over the tokens before a tile and,
 * inside it, sums over the lower and the upper triangle of the tile's own products q.k, which the output needs anyway. Sums over a tile are
 * f32, those over tiles double. With <a, b> = sum of (a + eps)(b + eps), a row's product with a sum S is x.(S + eps) + eps * sum(S + eps).
 */
#include "op/flow.h"

#include "kernel/decode.h"

#include <omp.h>
#include <string.h>

#define TILE 48  /* tokens: whole tiles of 6 or 4 rows and of 16 columns */
#define NEAR 131072 /* mapped numbers of both sides that stay in the second-level cache, so that they are kept instead of mapped twice */
#define STRIPE 6 /* rows that share their last visible column */

/* Sums of rows, two for the keys and two for the queries: plain, and each row by its count over its flow. */
enum { PLAIN, SHARED, SUMS };

/* One side: queries or keys of a head. */
typedef struct side {
    const float *x;        /* [count][d], not mapped */
    int64_t count, kept;   /* kept: rows of `mapped` that stay; 0: only the current tile is there */
    float *mapped;         /* [kept or TILE][dp] */
    float *rows;           /* the current tile in it */
    double *sum[SUMS];     /* [d] */
    float *base;           /* [SUMS + 1][dp]: the sums plus eps, and ones */
    double total[SUMS];    /* sum of (sum + eps) */
    float *recent;         /* [SUMS][dp]: of the current tile */
    float *dots;           /* [SUMS + 1][TILE]: rows of the tile times base */
    float *weights;        /* [SUMS][TILE]: 1, and count over flow */
    float *inside;         /* [SUMS][TILE]: sums over the triangle by row, the second weighted by the other side's weights */
} side;

typedef struct work {
    const attn_flow *f;
    const attn_tile_kernels *tile;
    const attn_decode_kernels *decode;
    int64_t dp, vp;
    side q, k;
    float *kt, *lower, *upper; /* [d][TILE], [TILE][TILE] */
    float *flow;               /* [n]: I of each query (without causal) */
    float *numbers;            /* [TILE] */
    float *values;             /* [TILE][vp]: competition * v */
    float *state;              /* [d][vp] */
    attn_ahead ahead;          /* of the next tile */
} work;

static int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }

/* Of a side of `count` rows. */
static int64_t kept(const attn_flow *f, int64_t count) { return f->causal || (f->n + f->m) * padded(f->d) > NEAR ? 0 : count; }

static size_t work_floats(const attn_flow *f)
{
    int64_t dp = padded(f->d), vp = padded(f->dv), stored = kept(f, f->n) + kept(f, f->m);
    return (size_t)((stored > 0 ? stored : 2 * TILE) * dp + 2 * (2 * SUMS * dp + (2 * SUMS + 1) * dp + (3 * SUMS + 1) * TILE) +
                    f->d * TILE + 2 * TILE * TILE + (f->causal ? 0 : padded(f->n)) + TILE + TILE * vp + f->d * vp);
}

static float *take(float **memory, int64_t count)
{
    float *taken = *memory;
    *memory += count;
    return taken;
}

static void side_init(side *s, int64_t kept_rows, int64_t dp, float **memory)
{
    s->kept = kept_rows;
    for (int i = 0; i < SUMS; i++) {
        s->sum[i] = (double *)(void *)take(memory, 2 * dp);
    }
    s->mapped = take(memory, (kept_rows > 0 ? kept_rows : TILE) * dp);
    s->base = take(memory, (SUMS + 1) * dp);
    s->recent = take(memory, SUMS * dp);
    s->dots = take(memory, (SUMS + 1) * TILE);
    s->weights = take(memory, SUMS * TILE);
    s->inside = take(memory, SUMS * TILE);
    for (int64_t c = 0; c < TILE; c++) {
        s->weights[c] = 1;
    }
}

static void work_init(work *w, const attn_flow *f, float *memory)
{
    memset(memory, 0, work_floats(f) * sizeof(float)); /* what pads rows is read */
    *w = (work){.f = f, .tile = attn_tile_kernels_get(), .decode = attn_decode_kernels_get(), .dp = padded(f->d), .vp = padded(f->dv)};
    side_init(&w->q, kept(f, f->n), w->dp, &memory);
    side_init(&w->k, kept(f, f->m), w->dp, &memory);
    w->kt = take(&memory, f->d * TILE);
    w->lower = take(&memory, TILE * TILE);
    w->upper = take(&memory, TILE * TILE);
    w->flow = take(&memory, f->causal ? 0 : padded(f->n));
    w->numbers = take(&memory, TILE);
    w->values = take(&memory, TILE * w->vp);
    w->state = take(&memory, f->d * w->vp);
}

/* base and total of one sum from its double. */
static void settle(const work *w, side *s, int which)
{
    double eps = w->f->eps;
    s->total[which] = (double)w->f->d * eps;
    for (int64_t c = 0; c < w->f->d; c++) {
        s->base[which * w->dp + c] = (float)(s->sum[which][c] + eps);
        s->total[which] += s->sum[which][c];
    }
}

static void side_begin(const work *w, side *s, const float *x, int64_t count)
{
    s->x = x;
    s->count = count;
    for (int i = 0; i < SUMS; i++) {
        memset(s->sum[i], 0, (size_t)w->f->d * sizeof(double));
        settle(w, s, i);
    }
    for (int64_t c = 0; c < w->f->d; c++) {
        s->base[SUMS * w->dp + c] = 1;
    }
}

static int64_t left(int64_t count, int64_t first) { return attn_min_i64(TILE, count - first); }

/* The tile of rows from `first` on, mapped; again: for the second time. Its number of rows. */
static int64_t map_rows(const work *w, side *s, int64_t first, int again)
{
    const attn_flow *f = w->f;
    int64_t count = left(s->count, first), rows = f->d == w->dp ? 1 : count, width = count * f->d / rows;
    s->rows = s->mapped + (s->kept > 0 ? first * w->dp : 0);
    for (int64_t r = 0; r < (again && s->kept > 0 ? 0 : rows); r++) {
        attn_flow_map(f->kernel, s->x + first * f->d + r * width, s->rows + r * w->dp, width);
    }
    return count;
}

/* Add the tile's rows, weighted, to sums low ... high - 1. */
static void gather(const work *w, side *s, int64_t count, int low, int high)
{
    memset(s->recent, 0, (size_t)(SUMS * w->dp) * sizeof(float));
    w->decode->values(s->recent, w->dp, s->weights + low * TILE, TILE, high - low, s->rows, ATTN_F32, 0, w->dp, count, w->dp);
    for (int i = low; i < high; i++) {
        for (int64_t c = 0; c < w->f->d; c++) {
            s->sum[i][c] += (double)s->recent[(i - low) * w->dp + c];
        }
    }
}

/* dots: the tile's rows times base low ... high - 1. */
static void project(const work *w, side *s, const float *base, int64_t count, int bases)
{
    w->decode->scores(s->dots, TILE, base, w->dp, bases, s->rows, ATTN_F32, 0, w->dp, count, w->dp);
}

/* rows of values times weights: what the state and the output of a tile read. */
static void weigh_values(const work *w, const float *v, const float *weights, int64_t count)
{
    for (int64_t j = 0; j < count; j++) {
        w->tile->load_row(w->values + j * w->vp, v + j * w->f->dv, ATTN_F32, w->f->dv, weights[j]);
    }
}

/* state += the tile's keys times values. */
static void advance(work *w, int64_t count)
{
    for (int64_t c = 0; c < w->f->d; c += 2 * STRIPE) {
        w->tile->product(attn_min_i64(2 * STRIPE, w->f->d - c), w->f->dv, count, w->k.rows + c, 1, w->dp, w->values, w->vp, w->tile->nr,
                         w->state + c * w->vp, w->vp, 1);
        attn_ahead_share(&w->ahead);
    }
}

/* ---- Normal form ---- */

static void sum_keys(work *w)
{
    side *k = &w->k;
    for (int64_t j = 0; j < k->count; j += TILE) {
        gather(w, k, map_rows(w, k, j, 0), PLAIN, SHARED);
    }
    settle(w, k, PLAIN);
}

/* The flows of a tile's rows, from their products with the other side's plain sum: weights of the rows, and flow unless NULL. */
static void share(const work *w, side *s, const side *other, int64_t count, float *flow)
{
    for (int64_t r = 0; r < count; r++) {
        float through = (float)((double)s->dots[r] + w->f->eps * other->total[PLAIN]);
        s->weights[SHARED * TILE + r] = 1 / through;
        if (flow != NULL) {
            flow[r] = through;
        }
    }
}

static void sum_queries(work *w)
{
    side *q = &w->q;
    for (int64_t i = 0; i < q->count; i += TILE) {
        int64_t count = map_rows(w, q, i, 0);
        project(w, q, w->k.base, count, 1);
        share(w, q, &w->k, count, w->flow + i);
        gather(w, q, count, PLAIN, SUMS);
    }
    settle(w, q, PLAIN);
    settle(w, q, SHARED);
}

/* The shared sum of keys, and state = the sum of keys times competition * values. The softmax over all sources goes by tiles: whatever came
 * before is scaled down when the largest flow grows. */
static void collect(work *w, const float *v, float *competition)
{
    const attn_flow *f = w->f;
    side *k = &w->k;
    float top = -INFINITY;
    double sum = 0;
    memset(w->state, 0, (size_t)(f->d * w->vp) * sizeof(float));
    for (int64_t j = 0; j < f->m; j += TILE) {
        int64_t count = map_rows(w, k, j, 1), next = j + count, more = left(f->m, next);
        float before = top;
        uint8_t clipped;
        w->ahead = (attn_ahead){.shares = (int)attn_ceil_div(f->d, 2 * STRIPE)};
        attn_ahead_add(&w->ahead, k->x + next * f->d, more * f->d);
        attn_ahead_add(&w->ahead, v + next * f->dv, more * f->dv);
        project(w, k, w->q.base, count, SUMS);
        share(w, k, &w->q, count, NULL);
        gather(w, k, count, SHARED, SUMS);
        for (int64_t r = 0; r < count; r++) {
            w->numbers[r] = (float)attn_flow_limit((double)k->dots[SHARED * TILE + r] + f->eps * w->q.total[SHARED], f->clamp, &clipped);
            top = w->numbers[r] > top ? w->numbers[r] : top;
        }
        if (competition != NULL) {
            memcpy(competition + j, w->numbers, (size_t)count * sizeof(float));
        }
        if (top > before && sum > 0) {
            double keep = exp((double)before - (double)top);
            sum *= keep;
            w->tile->scale(w->state, f->d * w->vp, (float)keep);
        }
        for (int64_t r = 0; r < count; r++) {
            w->numbers[r] = (w->numbers[r] - top) * 1.44269504f;
        }
        w->tile->exp2_row(w->numbers, count, 0);
        for (int64_t r = 0; r < count; r++) {
            sum += (double)w->numbers[r];
        }
        weigh_values(w, v + j * f->dv, w->numbers, count);
        advance(w, count);
    }
    settle(w, k, SHARED);
    double each = (double)f->m / sum;
    w->tile->scale(w->state, f->d * w->vp, (float)each);
    for (int64_t j = 0; j < f->m && competition != NULL; j++) {
        competition[j] = (competition[j] - top) * 1.44269504f;
    }
    if (competition != NULL) {
        w->tile->exp2_row(competition, f->m, 0);
        w->tile->scale(competition, f->m, (float)each);
    }
}

/* Allocations, and each query's share of the state. */
static void hand_out(work *w, float *o, float *allocation)
{
    const attn_flow *f = w->f;
    side *q = &w->q;
    double ratio = (double)f->n / (double)f->m;
    for (int64_t i = 0; i < f->n; i += TILE) {
        int64_t count = map_rows(w, q, i, 1), next = i + count, more = left(f->n, next);
        w->ahead = (attn_ahead){.shares = TILE / STRIPE};
        attn_ahead_add(&w->ahead, q->x + next * f->d, more * f->d);
        attn_ahead_add(&w->ahead, o + next * f->dv, more * f->dv);
        project(w, q, w->k.base + SHARED * w->dp, count, 1);
        for (int64_t r = 0; r < count; r++) {
            w->numbers[r] = (float)(((double)q->dots[r] + f->eps * w->k.total[SHARED]) * ratio);
        }
        attn_linear_kernels_get()->sigmoid(w->numbers, w->numbers, count);
        for (int64_t r = 0; r < count; r += STRIPE) {
            w->tile->product(attn_min_i64(STRIPE, count - r), f->dv, f->d, q->rows + r * w->dp, w->dp, 1, w->state, w->vp, w->tile->nr,
                             o + (i + r) * f->dv, f->dv, 0);
            attn_ahead_share(&w->ahead);
        }
        for (int64_t r = 0; r < count; r++) {
            w->tile->scale(o + (i + r) * f->dv, f->dv, w->numbers[r] / w->flow[i + r]);
        }
        if (allocation != NULL) {
            memcpy(allocation + i, w->numbers, (size_t)count * sizeof(float));
        }
    }
}

static void normal_head(work *w, const float *v, float *o, float *competition, float *allocation)
{
    sum_keys(w);
    sum_queries(w);
    collect(w, v, competition);
    hand_out(w, o, allocation);
}

/* ---- Causal form ---- */

/* The softmax over the sources so far, relative to the largest. */
typedef struct prefix {
    double top, sum;
} prefix;

static double share_of(prefix *p, double x)
{
    double e = 1;
    if (x > p->top) {
        p->sum *= exp(p->top - x);
        p->top = x;
    } else {
        e = exp(x - p->top);
    }
    p->sum += e;
    return e / p->sum;
}

/* lower and upper: products of the tile's queries (rows) with its keys up to the query, and from it on. */
static void triangles(work *w, int64_t count)
{
    w->tile->pack_transposed(w->kt, TILE, w->k.rows, ATTN_F32, w->dp, count, w->f->d);
    for (int64_t r = 0; r < count; r += STRIPE) {
        w->tile->product(attn_min_i64(STRIPE, count - r), count, w->f->d, w->q.rows + r * w->dp, w->dp, 1, w->kt, TILE, w->tile->nr,
                         w->upper + r * TILE, TILE, 0);
        attn_ahead_share(&w->ahead);
    }
    for (int64_t r = 0; r < count; r++) {
        float *lower = w->lower + r * TILE, *upper = w->upper + r * TILE;
        memcpy(lower, upper, (size_t)(r + 1) * sizeof(float));
        memset(lower + r + 1, 0, (size_t)(TILE - r - 1) * sizeof(float));
        memset(upper, 0, (size_t)r * sizeof(float));
    }
}

/* inside[which]: for each query the sum of its row of the lower triangle, for each key that of its column of the upper one, weighted by the
 * other side's weights. */
static void sum_triangles(work *w, int64_t count, int which)
{
    float *columns = w->k.inside + which * TILE;
    w->decode->scores(w->q.inside + which * TILE, TILE, w->k.weights + which * TILE, TILE, 1, w->lower, ATTN_F32, 0, TILE, count, TILE);
    memset(columns, 0, TILE * sizeof(float));
    w->decode->values(columns, TILE, w->q.weights + which * TILE, TILE, 1, w->upper, ATTN_F32, 0, TILE, count, TILE);
}

/* A row's flow through the other side's sum up to its own place; ones: eps times the sum of the other side's rows inside the tile. */
static double flow_of(const work *w, const side *s, const side *other, int which, int64_t r, double ones)
{
    return (double)s->dots[which * TILE + r] + (double)s->inside[which * TILE + r] + w->f->eps * (other->total[which] + ones);
}

/* numbers: competition of the tile's sources; q.weights[PLAIN]: allocation over incoming flow, to be reset to ones. */
static void tile_flows(work *w, int64_t first, int64_t count, prefix *softmax, float *allocation)
{
    side *q = &w->q, *k = &w->k;
    double ones_q = 0, ones_k = 0;
    project(w, q, k->base, count, SUMS + 1);
    project(w, k, q->base, count, SUMS + 1);
    triangles(w, count);
    sum_triangles(w, count, PLAIN);
    for (int64_t r = 0; r < count; r++) {
        float t = (float)(first + r + 1);
        ones_q += (double)q->dots[SUMS * TILE + r];
        ones_k += (double)k->dots[SUMS * TILE + r];
        q->weights[SHARED * TILE + r] = t / (float)flow_of(w, q, k, PLAIN, r, ones_k);
        k->weights[SHARED * TILE + r] = t / (float)flow_of(w, k, q, PLAIN, r, ones_q);
    }
    sum_triangles(w, count, SHARED);
    ones_q = ones_k = 0;
    for (int64_t r = 0; r < count; r++) {
        double t = (double)(first + r + 1);
        uint8_t clipped;
        ones_q += (double)q->dots[SUMS * TILE + r] * (double)q->weights[SHARED * TILE + r];
        ones_k += (double)k->dots[SUMS * TILE + r] * (double)k->weights[SHARED * TILE + r];
        allocation[r] = (float)(flow_of(w, q, k, SHARED, r, ones_k) / t);
        w->numbers[r] = (float)(t * share_of(softmax, attn_flow_limit(flow_of(w, k, q, SHARED, r, ones_q) / t, w->f->clamp, &clipped)));
    }
    attn_linear_kernels_get()->sigmoid(allocation, allocation, count);
    for (int which = PLAIN; which < SUMS; which++) {
        side *s = which == PLAIN ? q : k;
        gather(w, s, count, PLAIN, SUMS);
        settle(w, s, PLAIN);
        settle(w, s, SHARED);
    }
}

static void causal_head(work *w, const float *v, float *o, float *competition, float *allocation)
{
    const attn_flow *f = w->f;
    prefix softmax = {-INFINITY, 0};
    float own[TILE];
    memset(w->state, 0, (size_t)(f->d * w->vp) * sizeof(float));
    for (int64_t first = 0; first < f->n; first += TILE) {
        int64_t count = left(f->n, first), next = first + count, more = left(f->n, next);
        float *to = o + first * f->dv, *allotted = allocation != NULL ? allocation + first : own;
        w->ahead = (attn_ahead){.shares = 3 * TILE / STRIPE};
        attn_ahead_add(&w->ahead, w->q.x + next * f->d, more * f->d);
        attn_ahead_add(&w->ahead, w->k.x + next * f->d, more * f->d);
        attn_ahead_add(&w->ahead, v + next * f->dv, more * f->dv);
        attn_ahead_add(&w->ahead, o + next * f->dv, more * f->dv);
        map_rows(w, &w->q, first, 0);
        map_rows(w, &w->k, first, 0);
        tile_flows(w, first, count, &softmax, allotted);
        weigh_values(w, v + first * f->dv, w->numbers, count);
        for (int64_t r = 0; r < count; r += STRIPE) {
            int64_t rows = attn_min_i64(STRIPE, count - r);
            w->tile->product(rows, f->dv, r + rows, w->lower + r * TILE, TILE, 1, w->values, w->vp, w->tile->nr, to + r * f->dv, f->dv, 0);
            attn_ahead_share(&w->ahead);
            if (first > 0) {
                w->tile->product(rows, f->dv, f->d, w->q.rows + r * w->dp, w->dp, 1, w->state, w->vp, w->tile->nr, to + r * f->dv, f->dv, 1);
            }
            attn_ahead_share(&w->ahead);
        }
        for (int64_t r = 0; r < count; r++) {
            w->tile->scale(to + r * f->dv, f->dv, allotted[r] * w->q.weights[SHARED * TILE + r] / (float)(first + r + 1));
        }
        if (competition != NULL) {
            memcpy(competition + first, w->numbers, (size_t)count * sizeof(float));
        }
        advance(w, count);
    }
}

attn_status attn_flow_forward(attn_call *call, const attn_flow *f, const float *q, const float *k, const float *v, float *o,
                              float *competition, float *allocation)
{
    size_t each = work_floats(f);
    int64_t heads = f->batch * f->heads;
    float *memory;
    int threads = (int)attn_max_i64(1, attn_min_i64(call->threads, heads));
    ATTN_TRY(attn_take_f32(call, threads * (int64_t)each, &memory));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        work w;
        work_init(&w, f, memory + (size_t)omp_get_thread_num() * each);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < heads; i++) {
            side_begin(&w, &w.q, q + i * f->n * f->d, f->n);
            side_begin(&w, &w.k, attn_flow_kv(f, k, i, f->d), f->m);
            (f->causal ? causal_head : normal_head)(&w, attn_flow_kv(f, v, i, f->dv), o + i * f->n * f->dv,
                                                    competition != NULL ? competition + i * f->m : NULL,
                                                    allocation != NULL ? allocation + i * f->n : NULL);
        }
    }
    return ATTN_OK;
}
