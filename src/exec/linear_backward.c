/* Gradients of linear attention: a forward sweep that rebuilds the states gives those of q, a backward sweep over what later tokens
 * sent back gives those of k and v. */
#include "exec/linear_work.h"

#include <omp.h>
#include <string.h>

typedef struct head {
    int64_t b, h;
    const float *q, *k, *v, *g;
    float *grad_q, *grad_k, *grad_v, *grad_state;
} head;

/* p: gradients of the products q.k of the chunk's pairs. */
static void pair_gradients(attn_linear_work *w)
{
    const attn_linattn *x = w->x;
    attn_linear_weights(w, 1);
    w->tile->pack_transposed(w->vt, w->mp, w->v, ATTN_F32, w->vp, w->count, x->dv);
    for (int64_t r = 0; r < w->count; r += ATTN_LINEAR_STRIPE) {
        int64_t end = attn_min_i64(w->count, r + ATTN_LINEAR_STRIPE);
        float stripe[ATTN_LINEAR_STRIPE * 256];
        w->tile->product(end - r, end, x->dv, w->g + r * w->vp, w->vp, 1, w->vt, w->mp, w->tile->nr, stripe, 256, 0);
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
            w->tile->scale(back, w->width, factor[r]);
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
    if (s->causal) {
        pair_gradients(w);
        for (int64_t r = 0; r < w->count; r += ATTN_LINEAR_STRIPE) {
            int64_t end = attn_min_i64(w->count, r + ATTN_LINEAR_STRIPE);
            w->tile->product(end - r, s->d, end, w->p + r * w->mp, w->mp, 1, w->k, w->dp, w->tile->nr, w->o + r * w->dp, w->dp, 0);
        }
        add_rows(to, w->o, w->dp, s->d, w->low, w->count);
    }
    w->tile->product(w->count, w->width, s->dv, w->g, w->vp, 1, w->turned, w->fp, w->tile->nr, w->back, w->fp, 0);
    contract(w, w->q, w->in, w->low, to);
}

static void prepare(attn_linear_work *w, const head *x, int64_t first, int64_t count, int64_t *made)
{
    if (*made != count || w->x->log_decay != NULL) {
        w->count = count;
        attn_linear_decays(w, x->b, x->h, first);
        *made = count;
    }
}

static void forward_sweep(attn_linear_work *w, const head *x, const float *state_in)
{
    const attn_linattn *s = w->x;
    int64_t made = 0;
    memset(w->turned, 0, (size_t)(s->dv * w->fp) * sizeof(float));
    for (int64_t f = 0; f < w->width && state_in != NULL; f++) {
        for (int64_t c = 0; c < s->dv; c++) {
            w->turned[c * w->fp + f] = state_in[f * s->dv + c];
        }
    }
    for (int64_t first = 0; first < s->m; first += w->chunk) {
        int64_t count = attn_min_i64(w->chunk, s->m - first);
        attn_linear_load(w, first, count, s->causal ? x->q : NULL, x->k, x->v, s->causal ? x->g : NULL);
        prepare(w, x, first, count, &made);
        if (s->causal && w->low < count) {
            query_gradients(w, x, first);
        }
        attn_linear_features(w, 0, 1);
        w->tile->scale(w->turned, s->dv * w->fp, w->total);
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
    w->tile->scale(w->state, w->width * w->vp, w->total);
    w->tile->product(w->width, w->x->dv, w->count, w->pq, 1, w->fp, w->g, w->vp, w->tile->nr, w->state, w->vp, 1);
}

/* grad_k and grad_v of the loaded chunk; `state` holds what later chunks sent back. */
static void key_gradients(attn_linear_work *w, const head *x, int64_t first)
{
    const attn_linattn *s = w->x;
    float *to_k = x->grad_k + first * s->d, *to_v = x->grad_v + first * s->dv;
    attn_linear_features(w, 0, 1);
    w->tile->product(w->count, s->dv, w->width, w->pk, w->fp, 1, w->state, w->vp, w->tile->nr, w->o, w->vp, 0);
    for (int64_t r = 0; r < w->count && s->causal; r += ATTN_LINEAR_STRIPE) {
        /* Columns r ... of the weights are read by the rows from r on. */
        int64_t columns = attn_min_i64(ATTN_LINEAR_STRIPE, w->count - r);
        w->tile->product(columns, s->dv, w->count - r, w->s + r * w->mp + r, 1, w->mp, w->g + r * w->vp, w->vp, w->tile->nr,
                         w->o + r * w->vp, w->vp, 1);
    }
    add_rows(to_v, w->o, w->vp, s->dv, 0, w->count);
    for (int64_t r = 0; r < w->count && s->causal; r += ATTN_LINEAR_STRIPE) {
        int64_t columns = attn_min_i64(ATTN_LINEAR_STRIPE, w->count - r);
        w->tile->product(columns, s->d, w->count - r, w->p + r * w->mp + r, 1, w->mp, w->q + r * w->dp, w->dp, w->tile->nr,
                         w->o + r * w->dp, w->dp, 0);
    }
    if (s->causal) {
        add_rows(to_k, w->o, w->dp, s->d, 0, w->count);
    }
    w->tile->pack_transposed(w->turned, w->fp, w->state, ATTN_F32, w->vp, w->width, s->dv);
    w->tile->product(w->count, w->width, s->dv, w->v, w->vp, 1, w->turned, w->fp, w->tile->nr, w->back, w->fp, 0);
    contract(w, w->k, w->out, 0, to_k);
}

static void backward_sweep(attn_linear_work *w, const head *x)
{
    const attn_linattn *s = w->x;
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
        attn_linear_load(w, first, count, s->causal ? x->q : NULL, x->k, x->v, s->causal ? x->g : NULL);
        prepare(w, x, first, count, &made);
        if (s->causal) {
            pair_gradients(w);
        }
        key_gradients(w, x, first);
        if (s->causal) {
            attn_linear_features(w, 1, 0);
            receive(w);
        }
    }
    for (int64_t f = 0; f < w->width && x->grad_state != NULL; f++) {
        memcpy(x->grad_state + f * s->dv, w->state + f * w->vp, (size_t)s->dv * sizeof(float));
    }
}

static void clear(float *x, int64_t count)
{
    if (x != NULL) {
        memset(x, 0, (size_t)count * sizeof(float));
    }
}

attn_status attn_linattn_backward(const attn_linattn *shape, attn_arena *arena, int threads, const float *q, const float *k,
                                  const float *v, const float *state_in, const float *grad_o, float *grad_q, float *grad_k,
                                  float *grad_v, float *grad_state)
{
    const attn_linattn x = *shape;
    int64_t group = x.heads / x.kv_heads, keys = x.batch * x.kv_heads * x.m;
    size_t each = attn_linear_work_floats(&x), spare = (size_t)(keys * ((grad_k ? 0 : x.d) + (grad_v ? 0 : x.dv)));
    attn_arena_mark mark = attn_arena_get_mark(arena);
    float *memory = attn_arena_array(arena, (size_t)threads * each + spare, sizeof(float));
    if (memory == NULL) {
        return attn_fail_memory(((size_t)threads * each + spare) * sizeof(float));
    }
    int keys_wanted = grad_k != NULL || grad_v != NULL || grad_state != NULL;
    float *unused = memory + (size_t)threads * each;
    float *to_k = grad_k != NULL ? grad_k : unused, *to_v = grad_v != NULL ? grad_v : unused + (grad_k ? 0 : keys * x.d);
    clear(grad_q, x.batch * x.heads * x.n * x.d);
    clear(to_k, keys * x.d);
    clear(to_v, keys * x.dv);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t kv = 0; kv < x.batch * x.kv_heads; kv++) {
        for (int64_t j = 0; j < group; j++) {
            int64_t b = kv / x.kv_heads, h = kv % x.kv_heads * group + j, i = b * x.heads + h;
            attn_linear_work w;
            attn_linear_work_init(&w, &x, memory + (size_t)omp_get_thread_num() * each);
            head one = {.b = b, .h = h, .q = q + i * x.n * x.d, .k = k + kv * x.m * x.d, .v = v + kv * x.m * x.dv,
                        .g = grad_o + i * x.n * x.dv, .grad_q = grad_q != NULL ? grad_q + i * x.n * x.d : NULL,
                        .grad_k = to_k + kv * x.m * x.d, .grad_v = to_v + kv * x.m * x.dv,
                        .grad_state = grad_state != NULL ? grad_state + i * w.width * x.dv : NULL};
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
