/* Gradients of linear attention: a forward sweep that rebuilds the states gives those of q, a backward sweep over what later tokens
 * sent back gives those of k and v. */
#include "exec/linear_work.h"

#include <omp.h>
#include <string.h>

typedef struct head {
    int64_t b, h;
    const float *q, *k, *v, *g;
    float *grad_q, *grad_k, *grad_v, *grad_state;
    int added; /* grad_k and grad_v hold what other heads gave */
} head;

static void clear(float *x, int64_t count)
{
    if (x != NULL) {
        memset(x, 0, (size_t)count * sizeof(float));
    }
}

/* p: gradients of the chunk's pairs by q.k, or with decay by feature by what decays of phi(q).phi(k). */
static void pair_gradients(attn_linear_work *w)
{
    const attn_linattn *x = w->x;
    w->tile->pack_transposed(w->vt, w->mp, w->v, ATTN_F32, w->vp, w->count, x->dv);
    if (x->decays != NULL) {
        w->tile->product(w->count, w->count, x->dv, w->g, w->vp, 1, w->vt, w->mp, w->tile->nr, w->p, w->mp, 0);
        return;
    }
    attn_linear_weights(w, 1);
    for (int64_t r = 0; r < w->count; r += ATTN_LINEAR_STRIPE) {
        int64_t end = attn_min_i64(w->count, r + ATTN_LINEAR_STRIPE);
        float stripe[ATTN_LINEAR_STRIPE * 256];
        w->tile->product(end - r, end, x->dv, w->g + r * w->vp, w->vp, 1, w->vt, w->mp, w->tile->nr, stripe, 256, 0);
        attn_ahead_share(&w->ahead);
        for (int64_t i = r; i < end; i++) {
            float *p = w->p + i * w->mp;
            w->kernel->multiply(p, p, stripe + (i - r) * 256, end);
        }
    }
}

/* to [rows][d] += the gradient of the features w->back, times factor[row]. */
static void contract(attn_linear_work *w, const float *rows, const float *factor, int64_t low, float *to)
{
    const attn_linattn *x = w->x;
    for (int64_t r = low; r < w->count; r++) {
        float *back = w->back + r * w->fp;
        if (x->map != NULL) {
            if (factor[r] != 1.0f) {
                w->tile->scale(back, w->width, factor[r]);
            }
            x->map->expand_back(x->d, x->scale, rows + r * w->dp, back, to + r * x->d);
        } else {
            w->tile->axpy(to + r * x->d, back, x->d, factor[r]);
        }
    }
}

static void add_rows(float *to, const float *from, int64_t ld, int64_t width, int64_t low, int64_t count)
{
    for (int64_t r = low; r < count; r++) {
        for (int64_t c = 0; c < width; c++) {
            to[r * width + c] += from[r * ld + c];
        }
    }
}

/* grad_q of the loaded chunk; `turned` holds the transposed state before it. */
static void query_gradients(attn_linear_work *w, const head *x, int64_t first)
{
    const attn_linattn *s = w->x;
    float *to = x->grad_q + (first - (s->causal ? s->m - s->n : 0)) * s->d;
    clear(to + w->low * s->d, (w->count - w->low) * s->d);
    if (s->causal) {
        pair_gradients(w);
    }
    if (s->causal && s->decays == NULL) {
        for (int64_t r = 0; r < w->count; r += ATTN_LINEAR_STRIPE) {
            int64_t end = attn_min_i64(w->count, r + ATTN_LINEAR_STRIPE);
            w->tile->product(end - r, s->d, end, w->p + r * w->mp, w->mp, 1, w->k, w->ldk, w->tile->nr, w->o + r * w->dp, w->dp, 0);
            attn_ahead_share(&w->ahead);
        }
        add_rows(to, w->o, w->dp, s->d, w->low, w->count);
    }
    w->tile->product(w->count, w->width, s->dv, w->g, w->vp, 1, w->turned, w->fp, w->tile->nr, w->back, w->fp, 0);
    if (s->decays != NULL) {
        attn_linear_fade_in(w, w->back);
        w->kernel->faded_sums(w->count, w->width, w->p, w->mp, 1, w->pk, w->fp, w->decays, w->width, w->back, w->fp);
    }
    contract(w, w->q, w->in, w->low, to);
}

static void prepare(attn_linear_work *w, const head *x, int64_t first, int64_t count, int64_t *made)
{
    if (*made != count || w->x->log_decay != NULL || w->x->decays != NULL) {
        w->count = count;
        attn_linear_decays(w, x->b, x->h, first);
        *made = count;
    }
}

/* Stripes of a chunk. */
static int stripes(const attn_linear_work *w) { return (int)attn_ceil_div(w->chunk, ATTN_LINEAR_STRIPE); }

static void forward_sweep(attn_linear_work *w, const head *x, const float *state_in)
{
    const attn_linattn *s = w->x;
    const attn_linear_rows rows = {.q = x->q, .to_q = x->grad_q, .k = x->k, .v = x->v, .g = x->g};
    int64_t made = 0;
    memset(w->turned, 0, (size_t)(s->dv * w->fp) * sizeof(float));
    clear(x->grad_q, s->causal ? attn_max_i64(0, s->n - s->m) * s->d : 0); /* queries before the keys */
    for (int64_t f = 0; f < w->width && state_in != NULL; f++) {
        for (int64_t c = 0; c < s->dv; c++) {
            w->turned[c * w->fp + f] = state_in[f * s->dv + c];
        }
    }
    for (int64_t first = 0; first < s->m; first += w->chunk) {
        int64_t count = attn_min_i64(w->chunk, s->m - first);
        attn_linear_ahead(w, first + w->chunk, 2 * stripes(w), &rows);
        attn_linear_load(w, first, count, s->causal ? x->q : NULL, x->k, x->v, s->causal ? x->g : NULL);
        prepare(w, x, first, count, &made);
        attn_linear_features(w, s->decays != NULL, 1);
        if (s->causal && w->low < count) {
            query_gradients(w, x, first);
        }
        if (s->decays != NULL) {
            attn_linear_fade_in(w, w->pq);
            attn_linear_fade_out(w, w->pk);
            for (int64_t c = 0; c < s->dv; c++) {
                w->kernel->multiply(w->turned + c * w->fp, w->turned + c * w->fp, w->totals, w->width);
            }
        } else {
            w->tile->scale(w->turned, s->dv * w->fp, w->total);
        }
        w->tile->product(s->dv, w->width, count, w->v, 1, w->vp, w->pk, w->fp, w->tile->nr, w->turned, w->fp, 1);
    }
    for (int64_t first = 0; first < s->n && !s->causal; first += w->chunk) {
        attn_linear_load(w, first, attn_min_i64(w->chunk, s->n - first), x->q, NULL, NULL, x->g);
        attn_linear_decays(w, x->b, x->h, 0);
        query_gradients(w, x, first);
    }
}

/* state = total * state + pq^T g */
static void receive(attn_linear_work *w)
{
    attn_linear_decay_state(w);
    w->tile->product(w->width, w->x->dv, w->count, w->pq, 1, w->fp, w->g, w->vp, w->tile->nr, w->state, w->vp, 1);
}

/* grad_k and grad_v of the loaded chunk; `state` holds what later chunks sent back. */
static void key_gradients(attn_linear_work *w, const head *x, int64_t first)
{
    const attn_linattn *s = w->x;
    float *to_k = x->grad_k + first * s->d, *to_v = x->grad_v + first * s->dv;
    clear(to_k, x->added ? 0 : w->count * s->d);
    clear(to_v, x->added ? 0 : w->count * s->dv);
    attn_linear_features(w, s->decays != NULL, 1);
    if (s->decays != NULL) {
        w->kernel->faded_scores(w->count, w->width, w->pq, w->pk, w->fp, w->decays, w->width, w->s, w->mp);
        attn_linear_fade_out(w, w->pk);
    }
    w->tile->product(w->count, s->dv, w->width, w->pk, w->fp, 1, w->state, w->vp, w->tile->nr, w->o, w->vp, 0);
    for (int64_t r = 0; r < w->count && s->causal; r += ATTN_LINEAR_STRIPE) {
        /* Columns r ... of the weights are read by the rows from r on. */
        int64_t columns = attn_min_i64(ATTN_LINEAR_STRIPE, w->count - r);
        w->tile->product(columns, s->dv, w->count - r, w->s + r * w->mp + r, 1, w->mp, w->g + r * w->vp, w->vp, w->tile->nr,
                         w->o + r * w->vp, w->vp, 1);
        attn_ahead_share(&w->ahead);
    }
    add_rows(to_v, w->o, w->vp, s->dv, 0, w->count);
    for (int64_t r = 0; r < w->count && s->causal && s->decays == NULL; r += ATTN_LINEAR_STRIPE) {
        int64_t columns = attn_min_i64(ATTN_LINEAR_STRIPE, w->count - r);
        w->tile->product(columns, s->d, w->count - r, w->p + r * w->mp + r, 1, w->mp, w->q + r * w->ldq, w->ldq, w->tile->nr,
                         w->o + r * w->dp, w->dp, 0);
        attn_ahead_share(&w->ahead);
    }
    if (s->causal && s->decays == NULL) {
        add_rows(to_k, w->o, w->dp, s->d, 0, w->count);
    }
    w->tile->pack_transposed(w->turned, w->fp, w->state, ATTN_F32, w->vp, w->width, s->dv);
    w->tile->product(w->count, w->width, s->dv, w->v, w->vp, 1, w->turned, w->fp, w->tile->nr, w->back, w->fp, 0);
    if (s->decays != NULL) {
        /* The queries after a key, from the last token back. */
        int64_t last = w->count - 1;
        attn_linear_fade_out(w, w->back);
        w->kernel->faded_sums(w->count, w->width, w->p + last * (w->mp + 1), -1, -w->mp, w->pq + last * w->fp, -w->fp,
                              w->decays + w->count * w->width, -w->width, w->back + last * w->fp, -w->fp);
    }
    contract(w, w->k, w->out, 0, to_k);
}

static void backward_sweep(attn_linear_work *w, const head *x)
{
    const attn_linattn *s = w->x;
    const attn_linear_rows rows = {.q = x->q, .k = x->k, .to_k = x->grad_k, .v = x->v, .to_v = x->grad_v, .g = x->g};
    int64_t made = 0, chunks = attn_ceil_div(s->m, w->chunk);
    memset(w->state, 0, (size_t)(w->width * w->vp) * sizeof(float));
    for (int64_t first = 0; first < s->n && !s->causal; first += w->chunk) {
        attn_linear_load(w, first, attn_min_i64(w->chunk, s->n - first), x->q, NULL, NULL, x->g);
        attn_linear_decays(w, x->b, x->h, 0);
        attn_linear_features(w, 1, 0);
        receive(w);
    }
    for (int64_t i = chunks - 1; i >= 0; i--) {
        int64_t first = i * w->chunk, count = attn_min_i64(w->chunk, s->m - first);
        attn_linear_ahead(w, first - w->chunk, 3 * stripes(w), &rows);
        attn_linear_load(w, first, count, s->causal ? x->q : NULL, x->k, x->v, s->causal ? x->g : NULL);
        prepare(w, x, first, count, &made);
        if (s->causal) {
            pair_gradients(w);
        }
        key_gradients(w, x, first);
        if (s->causal) {
            attn_linear_features(w, 1, 0);
            if (s->decays != NULL) {
                attn_linear_fade_in(w, w->pq);
            }
            receive(w);
        }
    }
    for (int64_t f = 0; f < w->width && x->grad_state != NULL; f++) {
        memcpy(x->grad_state + f * s->dv, w->state + f * w->vp, (size_t)s->dv * sizeof(float));
    }
}

/* ---- By pairs ---- */

typedef struct pair_work {
    float *kt, *vt;            /* [d][keys], [dv][keys] */
    float *k;                  /* [keys][dp] */
    float *q, *g;              /* [rows][dp], [rows][vp] */
    float *s, *slope, *grad_s; /* [rows][keys] */
} pair_work;

static size_t pair_floats(const attn_linattn *x)
{
    int64_t dp = attn_linear_padded(x->d), vp = attn_linear_padded(x->dv);
    return (size_t)(ATTN_LINEAR_PAIR_KEYS * (x->d + x->dv + dp + 3 * ATTN_LINEAR_PAIR_ROWS) + ATTN_LINEAR_PAIR_ROWS * (dp + vp) + 64);
}

static pair_work pair_work_of(const attn_linattn *x, float *memory)
{
    int64_t dp = attn_linear_padded(x->d), vp = attn_linear_padded(x->dv), keys = ATTN_LINEAR_PAIR_KEYS, rows = ATTN_LINEAR_PAIR_ROWS;
    pair_work w = {.kt = memory};
    w.vt = w.kt + x->d * keys;
    w.k = w.vt + x->dv * keys;
    w.q = w.k + keys * dp;
    w.g = w.q + rows * dp;
    w.s = w.g + rows * vp;
    w.slope = w.s + rows * keys;
    w.grad_s = w.slope + rows * keys;
    return w;
}

/* One head: all queries against all keys. Gradients are added to; grad_q may be NULL. */
static void pair_head(const attn_linattn *x, const pair_work *w, const head *t)
{
    const attn_tile_kernels *tile = attn_tile_kernels_get();
    const attn_linear_kernels *kernel = attn_linear_kernels_get();
    int64_t dp = attn_linear_padded(x->d), vp = attn_linear_padded(x->dv), ld = ATTN_LINEAR_PAIR_KEYS;
    for (int64_t key = 0; key < x->m; key += ld) {
        int64_t keys = attn_min_i64(ld, x->m - key);
        tile->pack_transposed(w->kt, ld, t->k + key * x->d, ATTN_F32, x->d, keys, x->d);
        tile->pack_transposed(w->vt, ld, t->v + key * x->dv, ATTN_F32, x->dv, keys, x->dv);
        attn_linear_copy(w->k, dp, t->k + key * x->d, x->d, keys, x->d);
        for (int64_t r = 0; r < x->n; r += ATTN_LINEAR_PAIR_ROWS) {
            int64_t rows = attn_min_i64(ATTN_LINEAR_PAIR_ROWS, x->n - r);
            int64_t count = attn_min_i64(keys, attn_linear_visible(x, r + rows - 1) - key);
            if (count <= 0) {
                continue;
            }
            attn_linear_copy(w->q, dp, t->q + r * x->d, x->d, rows, x->d);
            attn_linear_copy(w->g, vp, t->g + r * x->dv, x->dv, rows, x->dv);
            attn_linear_pair_weights(x, r, rows, key, count, w->q, dp, w->kt, w->s, w->slope);
            tile->product(rows, count, x->dv, w->g, vp, 1, w->vt, ld, tile->nr, w->grad_s, ld, 0);
            for (int64_t i = 0; i < rows; i++) {
                kernel->multiply(w->grad_s + i * ld, w->grad_s + i * ld, w->slope + i * ld, count);
            }
            if (t->grad_q != NULL) {
                tile->product(rows, x->d, count, w->grad_s, ld, 1, w->k, dp, tile->nr, t->grad_q + r * x->d, x->d, 1);
            }
            tile->product(count, x->d, rows, w->grad_s, 1, ld, w->q, dp, tile->nr, t->grad_k + key * x->d, x->d, 1);
            tile->product(count, x->dv, rows, w->s, 1, ld, w->g, vp, tile->nr, t->grad_v + key * x->dv, x->dv, 1);
        }
    }
}

attn_status attn_linattn_backward(const attn_linattn *shape, attn_arena *arena, int threads, const float *q, const float *k,
                                  const float *v, const float *state_in, const float *grad_o, float *grad_q, float *grad_k,
                                  float *grad_v, float *grad_state)
{
    const attn_linattn x = *shape;
    int64_t group = x.kv_heads > 0 ? x.heads / x.kv_heads : 0, keys = x.batch * x.kv_heads * x.m;
    int by_pairs = state_in == NULL && grad_state == NULL && attn_linattn_by_pairs(&x);
    size_t each = by_pairs ? pair_floats(&x) : attn_linear_work_floats(&x), spare = (size_t)(keys * ((grad_k ? 0 : x.d) + (grad_v ? 0 : x.dv)));
    attn_arena_mark mark = attn_arena_get_mark(arena);
    float *memory = attn_arena_array(arena, (size_t)threads * each + spare, sizeof(float));
    if (memory == NULL) {
        return attn_fail_memory(((size_t)threads * each + spare) * sizeof(float));
    }
    int keys_wanted = grad_k != NULL || grad_v != NULL || grad_state != NULL;
    float *unused = memory + (size_t)threads * each;
    float *to_k = grad_k != NULL ? grad_k : unused, *to_v = grad_v != NULL ? grad_v : unused + (grad_k ? 0 : keys * x.d);
    if (by_pairs) {
        memset(memory, 0, (size_t)threads * each * sizeof(float)); /* what pads rows is read */
    }
    if (by_pairs || group == 0) {
        clear(grad_q, x.batch * x.heads * x.n * x.d);
        clear(to_k, keys * x.d);
        clear(to_v, keys * x.dv);
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t kv = 0; kv < x.batch * x.kv_heads; kv++) {
        for (int64_t j = 0; j < group; j++) {
            int64_t b = kv / x.kv_heads, h = kv % x.kv_heads * group + j, i = b * x.heads + h;
            float *own = memory + (size_t)omp_get_thread_num() * each;
            head one = {.b = b, .h = h, .q = q + i * x.n * x.d, .k = k + kv * x.m * x.d, .v = v + kv * x.m * x.dv,
                        .g = grad_o + i * x.n * x.dv, .grad_q = grad_q != NULL ? grad_q + i * x.n * x.d : NULL,
                        .grad_k = to_k + kv * x.m * x.d, .grad_v = to_v + kv * x.m * x.dv,
                        .grad_state = grad_state, .added = j > 0};
            if (by_pairs) {
                pair_work pairs = pair_work_of(&x, own);
                pair_head(&x, &pairs, &one);
                continue;
            }
            attn_linear_work w;
            attn_linear_work_init(&w, &x, own);
            one.grad_state = grad_state != NULL ? grad_state + i * w.width * x.dv : NULL;
            if (grad_q != NULL) {
                forward_sweep(&w, &one, state_in != NULL ? state_in + i * w.width * x.dv : NULL);
            }
            if (keys_wanted) {
                backward_sweep(&w, &one);
            }
        }
    }
    attn_arena_release(arena, mark);
    return ATTN_OK;
}
