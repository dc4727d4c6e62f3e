/* Exact attention for few query rows over many keys: memory-bound, so keys and values are read once, as they lie, by all query heads
 * of their group. The keys are split in parts (whatever the number of threads and the batch) that are merged by their log-sum-exp. */
#include "core/barrier.h"
#include "exec/dense.h"

#include <math.h>
#include <omp.h>
#include <string.h>

#define MOST_ROWS 16
#define MOST_PART 1024 /* keys of a part */
#define STEP 256       /* keys of a step of the online softmax; a multiple of all vector widths */

int attn_dense_rows_lie_together(const dense_problem *p)
{
    return (p->in->k.stride[3] == 1 || p->d == 1) && (p->in->v.stride[3] == 1 || p->dv == 1);
}

int attn_dense_is_decode(const dense_problem *p) { return p->group * p->n <= MOST_ROWS && attn_dense_rows_lie_together(p); }

/* One part of one key/value head: o [rows][dv_pad] not normalised, m and l in base 2; top: the key of the largest score. */
typedef struct part_state {
    float *o, *m, *l;
    int64_t *top;
} part_state;

/* int8 only: scores or weights times the scales of the keys, or of their values. */
static void scale_keys(const dense_problem *p, float *s, int64_t lds, int64_t rows, const attn_tensor *scales, const dense_keys *y)
{
    if (scales != NULL) {
        const float *by = (const float *)scales->data + y->b * scales->stride[0] + y->kv * scales->stride[1] + y->first * scales->stride[2];
        p->decode->scale_keys(s, lds, rows, by, scales->stride[2], y->list, y->count);
    }
}

void attn_dense_scores_in_place(const dense_problem *p, float *s, int64_t lds, const float *q, int64_t rows, const dense_keys *y)
{
    const attn_tensor *k = &p->in->k;
    const void *from = attn_dense_row(k, y->b, y->kv, y->first);
    if (y->list != NULL) {
        p->decode->scores_listed(s, lds, q, p->d, rows, from, k->dtype, y->rounded, k->stride[2], y->list, y->count, y->entries, p->d);
    } else {
        p->decode->scores(s, lds, q, p->d, rows, from, k->dtype, y->rounded, k->stride[2], y->count, p->d);
    }
    scale_keys(p, s, lds, rows, p->in->k_scale, y);
}

void attn_dense_values_in_place(const dense_problem *p, float *o, float *s, int64_t lds, int64_t rows, const dense_keys *y)
{
    const attn_tensor *v = &p->in->v;
    const void *from = attn_dense_row(v, y->b, y->kv, y->first);
    scale_keys(p, s, lds, rows, p->in->v_scale, y);
    if (y->list != NULL) {
        p->decode->values_listed(o, p->dv_pad, s, lds, rows, from, v->dtype, y->rounded, v->stride[2], y->list, y->count, y->entries, p->dv);
    } else {
        p->decode->values(o, p->dv_pad, s, lds, rows, from, v->dtype, y->rounded, v->stride[2], y->count, p->dv);
    }
}

/* Where a step raised a row's maximum, its first key with that score. */
static void find_top(part_state *state, const float *before, const float *scores, int64_t rows, int64_t first)
{
    for (int64_t r = 0; r < rows; r++) {
        if (state->m[r] > before[r]) {
            int64_t j = 0;
            while (scores[r * STEP + j] != state->m[r]) {
                j++;
            }
            state->top[r] = first + j;
        }
    }
}

static void attend_step(const dense_problem *p, const float *q, float *s, part_state *state, const dense_keys *some)
{
    const attn_tile_kernels *kernels = p->kernels;
    int64_t b = some->b, kv = some->kv, first = some->first, keys = some->count;
    int64_t rows = p->group * p->n, count = attn_ceil_div(keys, kernels->vw) * kernels->vw;
    float alpha[MOST_ROWS];
    attn_dense_scores_in_place(p, s, STEP, q, rows, some);
    for (int64_t r = 0; r < rows; r++) {
        float *row = s + r * STEP;
        int64_t h = kv * p->group + r / p->n, n = r % p->n, begin, end;
        if (attn_dense_needs_adjust(p)) {
            attn_dense_adjust(p, row, b, h, n, first, keys);
        }
        attn_dense_visible(p, b, n, &begin, &end);
        attn_dense_mask_row(row, first, count, begin, attn_min_i64(end, first + keys));
    }
    if (state->top != NULL) {
        float before[MOST_ROWS], scores[MOST_ROWS * STEP];
        memcpy(before, state->m, (size_t)rows * sizeof *before);
        memcpy(scores, s, (size_t)(rows * STEP) * sizeof *scores);
        kernels->softmax(rows, s, STEP, count, state->m, state->l, alpha);
        find_top(state, before, scores, rows, first);
    } else {
        kernels->softmax(rows, s, STEP, count, state->m, state->l, alpha);
    }
    for (int64_t r = 0; r < rows; r++) {
        if (alpha[r] != 1.0f) {
            kernels->scale(state->o + r * p->dv_pad, p->dv, alpha[r]);
        }
    }
    attn_dense_values_in_place(p, state->o, s, STEP, rows, some);
}

/* Keys of a part: a few parts at least, so that threads finish together although a model has one or three key/value heads. */
static int64_t part_of(const dense_problem *p)
{
    int64_t keys = attn_ceil_div(attn_ceil_div(p->m * attn_min_i64(p->kv_heads, 8), 8), 64) * 64;
    return attn_min_i64(attn_max_i64(keys, 64), MOST_PART);
}

double attn_dense_merge_parts(const dense_problem *p, int64_t h, const float *o, const float *m, const float *l, int64_t step, int64_t count,
                              float *merged, float *shift)
{
    float top, sink_l;
    attn_dense_begin_row(p, h, &top, &sink_l);
    float sink_m = top;
    for (int64_t i = 0; i < count; i++) {
        top = m[i * step] > top ? m[i * step] : top;
    }
    *shift = top == -INFINITY ? 0 : top;
    double sum = sink_l > 0 ? exp2((double)sink_m - (double)*shift) : 0;
    memset(merged, 0, (size_t)p->dv_pad * sizeof *merged);
    for (int64_t i = 0; i < count; i++) {
        double weight = exp2((double)m[i * step] - (double)*shift);
        if (weight != 0 || isnan(l[i * step])) { /* scores that are no numbers have no maximum */
            sum += weight * (double)l[i * step];
            p->kernels->axpy(merged, o + i * step, p->dv, (float)weight);
        }
    }
    return sum;
}

/* The key of the largest score of all parts, the first one on ties; -1 when the row sees none. */
static int64_t merge_top(const part_state *parts, int64_t count, int64_t row)
{
    int64_t top = -1;
    float score = -INFINITY;
    for (int64_t i = 0; i < count; i++) {
        if (parts[i].m[row] > score) {
            score = parts[i].m[row];
            top = parts[i].top[row];
        }
    }
    return top;
}

attn_status attn_dense_decode(const dense_problem *p, const attn_tensor *o, const attn_tensor *lse, attn_arena *arena, int threads)
{
    int64_t pairs = p->batch * p->kv_heads, rows = p->group * p->n, part = part_of(p), parts = attn_ceil_div(p->m, part);
    int64_t step = rows * (p->dv_pad + 2);
    part_state *states = attn_arena_array(arena, (size_t)(pairs * parts), sizeof *states);
    float *memory = attn_arena_array(arena, (size_t)(pairs * parts), (size_t)step * sizeof(float));
    /* Of each thread: queries, scores, results. */
    int64_t own_floats = attn_ceil_div(rows * (p->d + STEP) + p->dv_pad, 16) * 16;
    float *own = attn_arena_array(arena, (size_t)threads, (size_t)own_floats * sizeof(float));
    int64_t *tops = p->top != NULL ? attn_arena_array(arena, (size_t)(pairs * parts * rows), sizeof *tops) : NULL;
    if ((p->top != NULL && tops == NULL) || states == NULL || memory == NULL || own == NULL) {
        return attn_fail_memory((size_t)(pairs * parts * rows * p->dv_pad) * sizeof(float));
    }
    float factor = (float)(p->base2 ? p->scale * ATTN_LOG2E : p->scale);
    attn_barrier barrier;
    attn_barrier_init(&barrier, threads);
    /* Keys that no query sees are not read: the queries' ranges begin and end in order. */
#pragma omp parallel num_threads(threads)
    {
        int64_t thread = omp_get_thread_num(), team = omp_get_num_threads(), loaded = -1;
        float *s = own + thread * own_floats, *q = s + rows * STEP, *result = q + rows * p->d;
        for (int64_t i = pairs * parts * thread / team; i < pairs * parts * (thread + 1) / team; i++) {
            int64_t pair = i / parts, b = pair / p->kv_heads, kv = pair % p->kv_heads, low, high, unused;
            part_state *state = &states[i];
            float *to = memory + i * step;
            for (int64_t r = 0; r < rows && pair != loaded; r++) {
                attn_dense_load_row(p, q + r * p->d, &p->in->q, b, kv * p->group + r / p->n, r % p->n, p->d, factor);
            }
            loaded = pair;
            *state = (part_state){to, to + rows * p->dv_pad, to + rows * (p->dv_pad + 1), tops != NULL ? tops + i * rows : NULL};
            memset(state->o, 0, (size_t)(rows * p->dv_pad) * sizeof(float));
            for (int64_t r = 0; r < rows; r++) {
                state->m[r] = -INFINITY;
                state->l[r] = 0;
            }
            attn_dense_visible(p, b, 0, &low, &unused);
            attn_dense_visible(p, b, p->n - 1, &unused, &high);
            const int rounded = high - low >= DENSE_ROUNDED_KEYS;
            low = attn_max_i64(low, i % parts * part);
            high = attn_min_i64(high, (i % parts + 1) * part);
            for (int64_t first = low; first < high; first += STEP) {
                attend_step(p, q, s, state,
                            &(dense_keys){.b = b, .kv = kv, .first = first, .count = attn_min_i64(STEP, high - first), .rounded = rounded});
            }
        }
        attn_barrier_wait(&barrier, (int)team);
        for (int64_t i = pairs * rows * thread / team; i < pairs * rows * (thread + 1) / team; i++) {
            int64_t pair = i / rows, r = i % rows, b = pair / p->kv_heads, h = pair % p->kv_heads * p->group + r / p->n;
            const part_state *first = &states[pair * parts];
            float shift;
            double sum = attn_dense_merge_parts(p, h, first->o + r * p->dv_pad, first->m + r, first->l + r, step, parts, result, &shift);
            p->kernels->scale(result, p->dv, sum == 0 ? 0 : (float)(1 / sum));
            attn_dense_store_row(o, b, h, r % p->n, result, p->dv);
            if (lse != NULL) {
                ((float *)lse->data)[b * lse->stride[0] + h * lse->stride[1] + r % p->n * lse->stride[2]] =
                    sum == 0 ? -INFINITY : (float)(((double)shift + log2(sum)) * ATTN_LN2);
            }
            if (p->top != NULL) {
                ((int64_t *)p->top->data)[b * p->top->stride[0] + h * p->top->stride[1] + r % p->n * p->top->stride[2]] =
                    merge_top(states + pair * parts, parts, r);
            }
        }
        attn_barrier_wait(&barrier, (int)team);
    }
    return ATTN_OK;
}
