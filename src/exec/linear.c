/* Linear attention in chunks: what sweeps share, the forward sweep, and the recurrent form. */
#include "exec/linear_work.h"

#include <math.h>
#include <omp.h>
#include <string.h>

#define CHUNK 48 /* tokens: whole tiles of 6 or 4 rows and of 16 columns */
/* Tokens of a chunk with decay by feature: pairs go through their features one by one, so few should; the state is as much work for
 * each token in chunks of any size. */
#define FADED 16
#define SLICE 12 /* rows of the state that are written together */

static int64_t chunk_of(const attn_linattn *x)
{
    int64_t chunk = attn_min_i64(x->chunk == 0 ? CHUNK : x->chunk, x->decays != NULL ? FADED : 256);
    return attn_max_i64(1, attn_min_i64(chunk > CHUNK && x->map == NULL ? chunk - chunk % CHUNK : chunk, x->m));
}

static int64_t width_of(const attn_linattn *x) { return x->map != NULL ? x->map->width(x->d) : x->d; }

size_t attn_linear_work_floats(const attn_linattn *x)
{
    int64_t c = chunk_of(x), mp = attn_linear_padded(c), dp = attn_linear_padded(x->d), vp = attn_linear_padded(x->dv), f = width_of(x), fp = attn_linear_padded(f);
    return (size_t)(2 * c * dp + 2 * c * vp + (x->d + x->dv) * mp + 3 * c * mp + 4 * mp + 3 * c * fp + f * vp + x->dv * fp +
                    c * attn_max_i64(vp, fp) + 2 * fp + 64);
}

static float *take(float **memory, int64_t count)
{
    float *taken = *memory;
    *memory += count;
    return taken;
}

void attn_linear_work_init(attn_linear_work *w, const attn_linattn *x, float *memory)
{
    memset(memory, 0, attn_linear_work_floats(x) * sizeof(float));
    *w = (attn_linear_work){.x = x, .tile = attn_tile_kernels_get(), .kernel = attn_linear_kernels_get()};
    int64_t c = w->chunk = chunk_of(x), f = w->width = width_of(x);
    w->mp = attn_linear_padded(c);
    w->dp = attn_linear_padded(x->d);
    w->vp = attn_linear_padded(x->dv);
    w->fp = attn_linear_padded(f);
    w->outer = x->map != NULL ? 1 : x->scale;
    w->row = (double *)(void *)take(&memory, 2 * w->mp);
    w->in = take(&memory, w->mp);
    w->out = take(&memory, w->mp);
    w->own_q = take(&memory, c * w->dp);
    w->own_k = take(&memory, c * w->dp);
    w->own_v = take(&memory, c * w->vp);
    w->own_g = take(&memory, c * w->vp);
    w->kt = take(&memory, x->d * w->mp);
    w->vt = take(&memory, x->dv * w->mp);
    w->s = take(&memory, c * w->mp);
    w->p = take(&memory, c * w->mp);
    w->decay = take(&memory, c * w->mp);
    w->pq = take(&memory, c * w->fp);
    w->pk = take(&memory, c * w->fp);
    w->back = take(&memory, c * w->fp);
    w->state = take(&memory, f * w->vp);
    w->turned = take(&memory, x->dv * w->fp);
    w->o = take(&memory, c * attn_max_i64(w->vp, w->fp));
    w->totals = take(&memory, w->fp);
    w->sums = take(&memory, w->fp);
}

/* Rows low ... count - 1 of a chunk, through f unless NULL; the rows before are zero. */
static void load_rows(float *to, int64_t ld, const float *from, int64_t width, int64_t low, int64_t count, const attn_row_function *f)
{
    const attn_row_kernels *kernels = ATTN_KERNEL_SELECT(attn_row_kernels_table, attn_isa_current());
    for (int64_t r = 0; r < low; r++) {
        memset(to + r * ld, 0, (size_t)width * sizeof(float));
    }
    for (int64_t r = low; r < count; r++) {
        if (f != NULL) {
            kernels->function(*f, from + r * width, NULL, width, to + r * ld);
        } else {
            memcpy(to + r * ld, from + r * width, (size_t)width * sizeof(float));
        }
    }
}

void attn_linear_load(attn_linear_work *w, int64_t first, int64_t count, const float *q, const float *k, const float *v,
                      const float *g)
{
    const attn_linattn *x = w->x;
    int64_t shift = first - (x->causal ? x->m - x->n : 0); /* the query of the chunk's first token */
    w->count = count;
    w->low = attn_min_i64(count, attn_max_i64(0, -shift));
    if (q != NULL && w->in_place && w->low == 0 && x->rows == NULL) {
        w->q = q + shift * x->d;
        w->ldq = x->d;
    } else if (q != NULL) {
        load_rows(w->own_q, w->dp, q + shift * x->d, x->d, w->low, count, x->rows);
        w->q = w->own_q;
        w->ldq = w->dp;
    }
    if (g != NULL && w->vp == x->dv && w->low == 0) {
        w->g = g + shift * x->dv;
    } else if (g != NULL) {
        load_rows(w->own_g, w->vp, g + shift * x->dv, x->dv, w->low, count, NULL);
        w->g = w->own_g;
    }
    if (k != NULL && w->in_place && x->rows == NULL) {
        w->k = k + first * x->d;
        w->ldk = x->d;
    } else if (k != NULL) {
        load_rows(w->own_k, w->dp, k + first * x->d, x->d, 0, count, x->rows);
        w->k = w->own_k;
        w->ldk = w->dp;
    }
    if (v != NULL && w->vp == x->dv) {
        w->v = v + first * x->dv;
    } else if (v != NULL) {
        load_rows(w->own_v, w->vp, v + first * x->dv, x->dv, 0, count, NULL);
        w->v = w->own_v;
    }
}

void attn_linear_decays(attn_linear_work *w, int64_t b, int64_t h, int64_t first)
{
    const attn_linattn *x = w->x;
    const float *logs = x->log_decay != NULL ? x->log_decay + (b * x->heads + h) * x->m + first : NULL;
    double lambda = x->slope != NULL ? exp(-(double)x->slope[h]) : 1, sum = 1;
    float inner = x->map != NULL ? 1.0f : (float)x->scale;
    if (x->decays != NULL) {
        w->decays = x->decays + ((b * x->heads + h) * x->m + first) * w->width;
        for (int64_t i = 0; i < w->count; i++) {
            w->in[i] = (float)w->outer;
            w->out[i] = 1;
        }
        return;
    }
    for (int64_t i = 0; i < w->count; i++) {
        double keep = logs != NULL ? exp((double)logs[i]) : lambda;
        float *decay = w->decay + i * w->mp;
        sum *= keep;
        w->in[i] = (float)(sum * w->outer);
        for (int64_t j = 0; j < i; j++) {
            w->row[j] *= keep;
            w->row[j] = w->row[j] < 1e-37 ? 0 : w->row[j];
            decay[j] = (float)w->row[j] * inner;
        }
        w->row[i] = 1;
        decay[i] = inner;
        memset(decay + i + 1, 0, (size_t)(w->mp - i - 1) * sizeof(float));
    }
    for (int64_t i = 0; i < w->count; i++) {
        w->out[i] = (float)w->row[i];
    }
    w->total = (float)sum;
}

static void features(attn_linear_work *w, const float *rows, int64_t ld, const float *factor, float *to)
{
    for (int64_t r = 0; r < w->count; r++, rows += ld) {
        float *phi = to + r * w->fp;
        if (w->x->map != NULL) {
            w->x->map->expand(w->x->d, w->x->scale, rows, phi);
            if (factor[r] != 1.0f) {
                w->tile->scale(phi, w->width, factor[r]);
            }
        } else {
            w->tile->load_row(phi, rows, ATTN_F32, w->width, factor[r]);
        }
    }
}

void attn_linear_features(attn_linear_work *w, int with_q, int with_k)
{
    if (with_q) {
        features(w, w->q, w->ldq, w->in, w->pq);
        memset(w->pq, 0, (size_t)(w->low * w->fp) * sizeof(float));
    }
    if (with_k) {
        features(w, w->k, w->ldk, w->out, w->pk);
    }
}

void attn_linear_decay_state(attn_linear_work *w)
{
    if (w->x->decays != NULL) {
        for (int64_t f = 0; f < w->width; f++) {
            w->tile->scale(w->state + f * w->vp, w->vp, w->totals[f]);
        }
    } else if (w->total != 1) {
        w->tile->scale(w->state, w->width * w->vp, w->total);
    }
}

void attn_linear_fade_in(attn_linear_work *w, float *rows)
{
    w->kernel->fade(w->count, w->width, rows, w->fp, w->decays, w->width, 0, w->totals);
}

void attn_linear_fade_out(attn_linear_work *w, float *rows)
{
    /* From the last token back: each by the decays after it. */
    w->kernel->fade(w->count, w->width, rows + (w->count - 1) * w->fp, -w->fp, w->decays + w->count * w->width, -w->width, 1, NULL);
}

void attn_linear_weights_rows(attn_linear_work *w, int64_t r, int with_slope)
{
    const attn_linattn *x = w->x;
    int64_t end = attn_min_i64(w->count, r + ATTN_LINEAR_STRIPE);
    float *s = w->s + r * w->mp;
    w->tile->product(end - r, end, x->d, w->q + r * w->ldq, w->ldq, 1, w->kt, w->mp, w->tile->nr, s, w->mp, 0);
    for (int64_t i = r; i < end; i++, s += w->mp) {
        float *slope = w->p + i * w->mp;
        const float *decay = w->decay + i * w->mp;
        if (x->map != NULL) {
            w->tile->scale(s, end, (float)x->scale);
            x->map->pair(end, s, with_slope ? slope : NULL);
            if (with_slope) {
                w->tile->scale(slope, end, (float)x->scale);
                w->kernel->multiply(slope, slope, decay, end);
            }
        } else if (with_slope) {
            memcpy(slope, decay, (size_t)end * sizeof(float));
        }
        w->kernel->multiply(s, s, decay, end);
    }
}

void attn_linear_weights(attn_linear_work *w, int with_slope)
{
    w->tile->pack_transposed(w->kt, w->mp, w->k, ATTN_F32, w->ldk, w->count, w->x->d);
    for (int64_t r = 0; r < w->count; r += ATTN_LINEAR_STRIPE) {
        attn_linear_weights_rows(w, r, with_slope);
    }
}

void attn_linear_copy(float *to, int64_t ld_to, const float *from, int64_t ld_from, int64_t rows, int64_t columns)
{
    for (int64_t r = 0; r < rows; r++) {
        memcpy(to + r * ld_to, from + r * ld_from, (size_t)columns * sizeof(float));
    }
}

static void fetch(attn_ahead *ahead, const float *rows, int64_t first, int64_t count, int64_t width)
{
    if (rows != NULL) {
        attn_ahead_add(ahead, rows + first * width, count * width);
    }
}

void attn_linear_ahead(attn_linear_work *w, int64_t first, int shares, const attn_linear_rows *rows)
{
    const attn_linattn *x = w->x;
    int64_t count = first >= 0 ? attn_min_i64(w->chunk, x->m - first) : 0, query = attn_max_i64(0, first - (x->m - x->n));
    int64_t queries = x->causal && count > 0 ? first + count - (x->m - x->n) - query : 0;
    w->ahead = (attn_ahead){.shares = shares};
    fetch(&w->ahead, rows->k, first, count, x->d);
    fetch(&w->ahead, rows->to_k, first, count, x->d);
    fetch(&w->ahead, rows->v, first, count, x->dv);
    fetch(&w->ahead, rows->to_v, first, count, x->dv);
    fetch(&w->ahead, rows->q, query, queries, x->d);
    fetch(&w->ahead, rows->to_q, query, queries, x->d);
    fetch(&w->ahead, rows->g, query, queries, x->dv);
    fetch(&w->ahead, rows->decays, first, count, w->width);
}

/* state = total * state + pk^T v, and the sums of features likewise */
static void advance(attn_linear_work *w)
{
    static const float one = 1;
    attn_linear_decay_state(w);
    if (w->x->sums != NULL) {
        if (w->x->decays != NULL) {
            w->kernel->multiply(w->sums, w->sums, w->totals, w->width);
        } else if (w->total != 1) {
            w->tile->scale(w->sums, w->width, w->total);
        }
        w->tile->product(1, w->width, w->count, &one, 0, 0, w->pk, w->fp, w->tile->nr, w->sums, w->fp, 1);
    }
    for (int64_t f = 0; f < w->width; f += SLICE) {
        int64_t rows = attn_min_i64(SLICE, w->width - f);
        attn_ahead_share(&w->ahead);
        w->tile->product(rows, w->x->dv, w->count, w->pk + f, 1, w->fp, w->v, w->vp, w->tile->nr, w->state + f * w->vp, w->vp, 1);
    }
}

/* The sum of weights of query i of a head (that of query `at` among all) is known: o [dv] is divided by it. */
static void finish(const attn_linattn *x, float sum, int64_t i, int64_t at, float *o)
{
    double by = (double)sum + x->sums->eps;
    float factor = attn_linear_visible(x, i) > 0 ? (float)(1 / by) : 0;
    if (x->sums->sums != NULL) {
        x->sums->sums[at] = sum;
    }
    if (!x->sums->divide) {
        return;
    }
    if (factor == 0 || isnormal(factor)) {
        attn_tile_kernels_get()->scale(o, x->dv, factor);
        return;
    }
    for (int64_t c = 0; c < x->dv; c++) {
        o[c] = (float)((double)o[c] / by);
    }
}

/* The state starts at zero when `fresh`; the last one is needed only when `keep`. */
static void forward_head(attn_linear_work *w, int64_t b, int64_t h, int fresh, int keep, const float *q, const float *k,
                         const float *v, float *o)
{
    const attn_linattn *x = w->x;
    int64_t made = 0, shift = x->causal ? x->m - x->n : 0;
    const float *decays = x->decays != NULL ? x->decays + (b * x->heads + h) * x->m * w->width : NULL;
    int shares = (int)((x->causal ? 3 * attn_ceil_div(w->chunk, ATTN_LINEAR_STRIPE) : 0) + attn_ceil_div(w->width, SLICE));
    int64_t queries_before = (b * x->heads + h) * x->n;
    const attn_linear_rows rows = {.q = q, .k = k, .v = v, .g = o, .decays = decays};
    w->in_place = 1;
    if (x->causal && x->n > x->m) {
        memset(o, 0, (size_t)((x->n - x->m) * x->dv) * sizeof(float));
        if (x->sums != NULL && x->sums->sums != NULL) {
            memset(x->sums->sums + queries_before, 0, (size_t)(x->n - x->m) * sizeof(float));
        }
    }
    for (int64_t first = 0; first < x->m; first += w->chunk) {
        int64_t count = attn_min_i64(w->chunk, x->m - first);
        attn_linear_ahead(w, first + w->chunk, shares, &rows);
        attn_linear_load(w, first, count, x->causal ? q : NULL, k, v, NULL);
        if (made != count || x->log_decay != NULL || x->decays != NULL) {
            attn_linear_decays(w, b, h, first);
            made = count;
        }
        int queries = x->causal && w->low < count, read = queries && !(fresh && first == 0);
        int write = !x->causal || keep || first + count < x->m;
        attn_linear_features(w, read || x->decays != NULL, write || x->decays != NULL);
        if (x->decays != NULL) {
            w->kernel->faded_scores(count, w->width, w->pq, w->pk, w->fp, w->decays, w->width, w->s, w->mp);
            attn_linear_fade_in(w, w->pq);
            attn_linear_fade_out(w, w->pk);
        } else if (queries) {
            w->tile->pack_transposed(w->kt, w->mp, w->k, ATTN_F32, w->ldk, count, x->d);
        }
        for (int64_t r = 0; r < count && queries; r += ATTN_LINEAR_STRIPE) {
            int64_t end = attn_min_i64(count, r + ATTN_LINEAR_STRIPE), low = attn_max_i64(r, w->low);
            if (low >= end) {
                continue;
            }
            int64_t query = first - shift + low;
            float *to = o + query * x->dv;
            if (x->decays == NULL) {
                attn_linear_weights_rows(w, r, 0);
            }
            attn_ahead_share(&w->ahead);
            w->tile->product(end - low, x->dv, end, w->s + low * w->mp, w->mp, 1, w->v, w->vp, w->tile->nr, to, x->dv, 0);
            attn_ahead_share(&w->ahead);
            if (read) {
                w->tile->product(end - low, x->dv, w->width, w->pq + low * w->fp, w->fp, 1, w->state, w->vp, w->tile->nr, to, x->dv, 1);
                attn_ahead_share(&w->ahead);
            }
            for (int64_t i = low; i < end && x->sums != NULL; i++, query++, to += x->dv) {
                float sum = w->kernel->sum(w->s + i * w->mp, end) + (read ? w->tile->dot(w->pq + i * w->fp, w->sums, w->width) : 0);
                finish(x, sum, query, queries_before + query, to);
            }
        }
        if (write) {
            advance(w);
        }
        while (w->ahead.share < shares) {
            attn_ahead_share(&w->ahead);
        }
    }
    for (int64_t first = 0; first < x->n && !x->causal; first += w->chunk) {
        attn_linear_load(w, first, attn_min_i64(w->chunk, x->n - first), q, NULL, NULL, NULL);
        attn_linear_decays(w, b, h, 0);
        attn_linear_features(w, 1, 0);
        w->tile->product(w->count, x->dv, w->width, w->pq, w->fp, 1, w->state, w->vp, w->tile->nr, o + first * x->dv, x->dv, 0);
        for (int64_t i = 0; i < w->count && x->sums != NULL; i++) {
            finish(x, w->tile->dot(w->pq + i * w->fp, w->sums, w->width), first + i, queries_before + first + i, o + (first + i) * x->dv);
        }
    }
}

/* ---- By pairs ---- */

static double pair_operations(const attn_linattn *x)
{
    double pairs = (double)x->n * (double)x->m;
    if (x->causal) {
        int64_t full = attn_max_i64(0, attn_min_i64(x->n, x->m)); /* queries that see a key; the last one sees m */
        pairs = (double)full * ((double)x->m - (double)(full - 1) / 2);
    }
    return 2 * pairs * (double)(x->d + x->dv + (x->sums != NULL));
}

static double chunk_operations(const attn_linattn *x)
{
    double inside = x->causal ? (double)x->n * (double)chunk_of(x) / 2 : 0, columns = (double)(x->dv + (x->sums != NULL));
    return 2 * (inside * ((double)x->d + columns) + (double)(x->n + x->m) * (double)width_of(x) * columns);
}

int attn_linattn_by_pairs(const attn_linattn *x)
{
    return x->map != NULL && x->slope == NULL && x->log_decay == NULL && x->decays == NULL && pair_operations(x) <= chunk_operations(x);
}

double attn_linattn_flops(const attn_linattn *x)
{
    return (double)(x->batch * x->heads) * (attn_linattn_by_pairs(x) ? pair_operations(x) : chunk_operations(x));
}

void attn_linear_pair_weights(const attn_linattn *x, int64_t first, int64_t rows, int64_t key, int64_t count, const float *q,
                              int64_t ldq, const float *kt, float *s, float *slope)
{
    const attn_tile_kernels *tile = attn_tile_kernels_get();
    int64_t ld = ATTN_LINEAR_PAIR_KEYS;
    tile->product(rows, count, x->d, q, ldq, 1, kt, ld, tile->nr, s, ld, 0);
    for (int64_t r = 0; r < rows; r++, s += ld) {
        int64_t seen = attn_max_i64(0, attn_min_i64(count, attn_linear_visible(x, first + r) - key));
        tile->scale(s, seen, (float)x->scale);
        x->map->pair(seen, s, slope);
        memset(s + seen, 0, (size_t)(count - seen) * sizeof *s);
        if (slope != NULL) {
            tile->scale(slope, seen, (float)x->scale);
            memset(slope + seen, 0, (size_t)(count - seen) * sizeof *slope);
            slope += ld;
        }
    }
}

#define PAIR_PART (4 * ATTN_LINEAR_PAIR_ROWS) /* queries of a task */

static size_t pair_floats(const attn_linattn *x)
{
    return (size_t)(ATTN_LINEAR_PAIR_KEYS * (x->d + attn_linear_padded(x->dv) + ATTN_LINEAR_PAIR_ROWS) + PAIR_PART + 64);
}

/* Some queries of head i against all keys. */
static void pair_queries(const attn_linattn *x, float *memory, int64_t i, int64_t first, int64_t end, const float *q, const float *k,
                         const float *v, float *o)
{
    const attn_tile_kernels *tile = attn_tile_kernels_get();
    int64_t vp = attn_linear_padded(x->dv), ld = ATTN_LINEAR_PAIR_KEYS;
    float *kt = memory, *rows_v = kt + ld * x->d, *s = rows_v + ld * vp, *sums = s + ld * ATTN_LINEAR_PAIR_ROWS;
    memset(sums, 0, PAIR_PART * sizeof *sums);
    memset(o + first * x->dv, 0, (size_t)((end - first) * x->dv) * sizeof *o);
    for (int64_t key = 0; key < attn_linear_visible(x, end - 1); key += ld) {
        int64_t keys = attn_min_i64(ld, attn_linear_visible(x, end - 1) - key);
        tile->pack_transposed(kt, ld, k + key * x->d, ATTN_F32, x->d, keys, x->d);
        attn_linear_copy(rows_v, vp, v + key * x->dv, x->dv, keys, x->dv);
        for (int64_t r = first; r < end; r += ATTN_LINEAR_PAIR_ROWS) {
            int64_t rows = attn_min_i64(ATTN_LINEAR_PAIR_ROWS, end - r);
            int64_t count = attn_min_i64(keys, attn_linear_visible(x, r + rows - 1) - key);
            if (count > 0) {
                attn_linear_pair_weights(x, r, rows, key, count, q + r * x->d, x->d, kt, s, NULL);
                tile->product(rows, x->dv, count, s, ld, 1, rows_v, vp, tile->nr, o + r * x->dv, x->dv, 1);
                for (int64_t j = 0; j < rows && x->sums != NULL; j++) {
                    sums[r - first + j] += attn_linear_kernels_get()->sum(s + j * ld, count);
                }
            }
        }
    }
    for (int64_t r = first; r < end && x->sums != NULL; r++) {
        finish(x, sums[r - first], r, i * x->n + r, o + r * x->dv);
    }
}

static attn_status pairs_forward(const attn_linattn *x, attn_arena *arena, int threads, const float *q, const float *k,
                                 const float *v, float *o)
{
    size_t each = pair_floats(x);
    attn_arena_mark mark = attn_arena_get_mark(arena);
    float *memory = attn_arena_array(arena, (size_t)threads * each, sizeof(float));
    if (memory == NULL) {
        return attn_fail_memory((size_t)threads * each * sizeof(float));
    }
    memset(memory, 0, (size_t)threads * each * sizeof(float));
    int64_t parts = attn_ceil_div(x->n, PAIR_PART);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t task = 0; task < x->batch * x->heads * parts; task++) {
        int64_t i = task / parts, first = task % parts * PAIR_PART, kv = i / x->heads * x->kv_heads + i % x->heads / (x->heads / x->kv_heads);
        pair_queries(x, memory + (size_t)omp_get_thread_num() * each, i, first, attn_min_i64(x->n, first + PAIR_PART), q + i * x->n * x->d,
                     k + kv * x->m * x->d, v + kv * x->m * x->dv, o + i * x->n * x->dv);
    }
    attn_arena_release(arena, mark);
    return ATTN_OK;
}

attn_status attn_linattn_forward(const attn_linattn *shape, attn_arena *arena, int threads, const float *q, const float *k,
                                 const float *v, const float *state_in, float *o, float *state_out)
{
    const attn_linattn x = *shape;
    if (state_in == NULL && state_out == NULL && (x.sums == NULL || x.sums->last == NULL) && attn_linattn_by_pairs(&x)) {
        return pairs_forward(&x, arena, threads, q, k, v, o);
    }
    size_t each = attn_linear_work_floats(&x);
    attn_arena_mark mark = attn_arena_get_mark(arena);
    float *memory = attn_arena_array(arena, (size_t)threads * each, sizeof(float));
    if (memory == NULL) {
        return attn_fail_memory((size_t)threads * each * sizeof(float));
    }
#pragma omp parallel num_threads(threads)
    {
        attn_linear_work w;
        attn_linear_work_init(&w, &x, memory + (size_t)omp_get_thread_num() * each);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < x.batch * x.heads; i++) {
            int64_t b = i / x.heads, h = i % x.heads, kv = b * x.kv_heads + h / (x.heads / x.kv_heads);
            memset(w.state, 0, (size_t)(w.width * w.vp) * sizeof(float));
            memset(w.sums, 0, (size_t)w.width * sizeof(float));
            if (state_in != NULL) {
                attn_linear_copy(w.state, w.vp, state_in + i * w.width * x.dv, x.dv, w.width, x.dv);
            }
            forward_head(&w, b, h, state_in == NULL, state_out != NULL || (x.sums != NULL && x.sums->last != NULL), q + i * x.n * x.d, k + kv * x.m * x.d, v + kv * x.m * x.dv,
                         o + i * x.n * x.dv);
            if (x.sums != NULL && x.sums->last != NULL) {
                memcpy(x.sums->last + i * w.width, w.sums, (size_t)w.width * sizeof(float));
            }
            if (state_out != NULL) {
                attn_linear_copy(state_out + i * w.width * x.dv, x.dv, w.state, w.vp, w.width, x.dv);
            }
        }
    }
    attn_arena_release(arena, mark);
    return ATTN_OK;
}

attn_status attn_linattn_decode(const attn_linattn *shape, attn_arena *arena, int threads, const float *q, const float *k,
                                const float *v, const float *state_in, float *state, float *o)
{
    const attn_linattn x = *shape;
    const attn_linear_kernels *kernel = attn_linear_kernels_get();
    int64_t width = width_of(&x);
    attn_arena_mark mark = attn_arena_get_mark(arena);
    float *memory = attn_arena_array(arena, (size_t)threads * (size_t)(2 * width), sizeof(float));
    if (memory == NULL) {
        return attn_fail_memory((size_t)threads * (size_t)(2 * width) * sizeof(float));
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < x.batch * x.heads; i++) {
        int64_t h = i % x.heads, kv = i / x.heads * x.kv_heads + h / (x.heads / x.kv_heads);
        float *pq = memory + (int64_t)omp_get_thread_num() * 2 * width, *pk = pq + width;
        float *own = state + i * width * x.dv;
        size_t bytes = (size_t)(width * x.dv) * sizeof *own;
        if (state_in == NULL) {
            memset(own, 0, bytes);
        } else if (state_in != state) {
            memcpy(own, state_in + i * width * x.dv, bytes);
        }
        double constant = x.slope != NULL ? exp(-(double)x.slope[h]) : 1;
        float outer = x.map != NULL ? 1.0f : (float)x.scale;
        for (int64_t t = 0; t < x.m; t++) {
            const float *query = q + (i * x.n + t) * x.d, *key = k + (kv * x.m + t) * x.d;
            double keep = x.log_decay != NULL ? exp((double)x.log_decay[i * x.m + t]) : constant;
            if (x.map != NULL) {
                x.map->expand(x.d, x.scale, query, pq);
                x.map->expand(x.d, x.scale, key, pk);
                key = pk;
            } else {
                for (int64_t c = 0; c < x.d; c++) {
                    pq[c] = query[c] * outer;
                }
            }
            const float *decays = x.decays != NULL ? x.decays + (i * x.m + t) * width : NULL;
            kernel->step(width, x.dv, own, x.dv, keep, decays, pq, key, v + (kv * x.m + t) * x.dv, o + (i * x.n + t) * x.dv);
        }
    }
    attn_arena_release(arena, mark);
    return ATTN_OK;
}
