/* What the executors over plans share: checks, masks of single blocks, constants of the backward pass. */
#include "exec/blocks.h"

#include <string.h>

attn_status attn_layout_check(const attn_plan_layout *y, const dense_problem *p)
{
    const attn_plan_shape *s = &y->shape;
    if (s->n != p->n || s->m != p->m) {
        return attn_fail(ATTN_ERR_SHAPE, "the plan is for N = %lld and M = %lld, the tensors have N = %lld and M = %lld", (long long)s->n,
                         (long long)s->m, (long long)p->n, (long long)p->m);
    }
    if (s->batch != 1 && s->batch != p->batch) {
        return attn_fail(ATTN_ERR_SHAPE, "the plan has %lld batch items, expected 1 or B = %lld", (long long)s->batch,
                         (long long)p->batch);
    }
    if (s->heads != 1 && s->heads != p->heads && s->heads != p->kv_heads) {
        return attn_fail(ATTN_ERR_SHAPE, "the plan has %lld heads, expected 1, Hkv = %lld or H = %lld", (long long)s->heads,
                         (long long)p->kv_heads, (long long)p->heads);
    }
    return ATTN_OK;
}

static attn_status check_gradient(const char *name, const attn_tensor *gradient, const attn_tensor *input)
{
    return gradient != NULL ? attn_dense_check_f32(name, gradient, "the shape of its input", input->ndim, input->shape) : ATTN_OK;
}

attn_status attn_layout_check_backward(const attn_plan_layout *y, const dense_problem *p, const attn_tensor *o, const attn_tensor *lse,
                                       const attn_tensor *grad_o, const attn_dense_gradients *to)
{
    const int64_t shape[] = {p->batch, p->heads, p->n, p->dv};
    ATTN_TRY(attn_layout_check(y, p));
    ATTN_TRY(attn_dense_check_tensor("o", o, "[B,H,N,Dv]", 4, shape, 1));
    ATTN_TRY(attn_dense_check_f32("lse", lse, "[B,H,N]", 3, shape));
    ATTN_TRY(attn_dense_check_tensor("grad_o", grad_o, "[B,H,N,Dv]", 4, shape, 1));
    ATTN_TRY(check_gradient("grad_q", to->q, &p->in->q));
    ATTN_TRY(check_gradient("grad_k", to->k, &p->in->k));
    ATTN_TRY(check_gradient("grad_v", to->v, &p->in->v));
    if (to->sinks != NULL) {
        if (p->in->sinks == NULL) {
            return attn_fail(ATTN_ERR_ARGUMENT, "grad_sinks: there is no such input");
        }
        ATTN_TRY(check_gradient("grad_sinks", to->sinks, p->in->sinks));
    }
    if (to->bias != NULL || to->slopes != NULL) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "sparse attention has no gradients of bias and slopes");
    }
    if (p->in->k.dtype == ATTN_I8 || p->in->v.dtype == ATTN_I8) {
        return attn_fail(ATTN_ERR_DTYPE, "int8 keys and values have no gradients");
    }
    return ATTN_OK;
}

/* Four bits as masks of four floats. */
#define LANES(x) {(x) & 1 ? ~0u : 0, (x) & 2 ? ~0u : 0, (x) & 4 ? ~0u : 0, (x) & 8 ? ~0u : 0}
static const uint32_t lanes[16][4] = {LANES(0), LANES(1), LANES(2),  LANES(3),  LANES(4),  LANES(5),  LANES(6),  LANES(7),
                                      LANES(8), LANES(9), LANES(10), LANES(11), LANES(12), LANES(13), LANES(14), LANES(15)};

/* -inf where a bit is 0; `at` is the number of the first bit. */
static void mask_bits(float *s, const uint8_t *bits, int64_t at, int64_t count)
{
    int64_t j = 0;
    for (; at % 4 == 0 && j + 4 <= count; j += 4, at += 4) {
        const uint32_t *keep = lanes[bits[at >> 3] >> (at & 4) & 15];
        uint32_t x[4];
        memcpy(x, s + j, sizeof x);
        for (int i = 0; i < 4; i++) {
            x[i] = (x[i] & keep[i]) | (0xff800000u & ~keep[i]);
        }
        memcpy(s + j, x, sizeof x);
    }
    for (; j < count; j++, at++) {
        if (!(bits[at >> 3] >> (at & 7) & 1)) {
            s[j] = -INFINITY;
        }
    }
}

void attn_layout_mask(const attn_plan_layout *y, int64_t list, int32_t mask, float *s, int64_t position, int64_t query, int64_t first,
                      int64_t key, int64_t count)
{
    if (mask == ATTN_PLAN_RULE) {
        const attn_plan_rule *rule = &y->rules[list];
        int64_t begin, end, seen = attn_min_i64(count, rule->sinks - first); /* sinks in this block */
        attn_rule_range(rule, position, y->shape.m, &begin, &end);
        if (seen > 0) {
            for (int64_t j = 0; j < count; j++) {
                if (!attn_rule_sees(rule, position, first + j)) {
                    s[j] = -INFINITY;
                }
            }
        } else {
            attn_dense_mask_row(s, first, count, begin, end);
        }
    } else if (mask >= 0) {
        mask_bits(s, y->bits + mask * y->bitmap_bytes, query * y->shape.block_k + key, count);
    }
}

/* f32 rows of a whole number of vectors: as they lie, or copied. */
static attn_status rows_of(exec_rows *to, const dense_problem *p, const attn_tensor *t, int64_t pad, attn_arena *arena, int threads)
{
    int64_t heads = t->shape[1], n = t->shape[2], width = t->shape[3], count = t->shape[0] * heads * n;
    if (t->dtype == ATTN_F32 && t->stride[3] == 1 && width == pad) {
        *to = (exec_rows){t->data, t->stride[0], t->stride[1], t->stride[2]};
        return ATTN_OK;
    }
    float *copy = attn_arena_array(arena, (size_t)count, (size_t)pad * sizeof(float));
    if (copy == NULL) {
        return attn_fail_memory((size_t)(count * pad) * sizeof(float));
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < count; i++) {
        attn_dense_load_row(p, copy + i * pad, t, i / (heads * n), i / n % heads, i % n, width, 1);
        memset(copy + i * pad + width, 0, (size_t)(pad - width) * sizeof(float));
    }
    *to = (exec_rows){copy, heads * n * pad, n * pad, pad};
    return ATTN_OK;
}

attn_status attn_exec_backward_begin(exec_backward *w, const dense_problem *p, const attn_tensor *o, const attn_tensor *lse,
                                     const attn_tensor *grad_o, attn_arena *arena, int threads)
{
    int64_t rows = p->batch * p->heads * p->n;
    w->d_pad = attn_ceil_div(p->d, p->kernels->vw) * p->kernels->vw;
    ATTN_TRY(rows_of(&w->q, p, &p->in->q, w->d_pad, arena, threads));
    ATTN_TRY(rows_of(&w->grad_o, p, grad_o, p->dv_pad, arena, threads));
    w->lse2 = attn_arena_array(arena, (size_t)rows, 2 * sizeof(float));
    float *scratch = attn_arena_array(arena, (size_t)p->dv_pad, sizeof(float));
    if (w->lse2 == NULL || scratch == NULL) {
        return attn_fail_memory((size_t)rows * 2 * sizeof(float));
    }
    w->delta = w->lse2 + rows;
    for (int64_t row = 0; row < rows; row++) {
        int64_t b = row / (p->heads * p->n), h = row / p->n % p->heads, n = row % p->n;
        float value = ((const float *)lse->data)[b * lse->stride[0] + h * lse->stride[1] + n * lse->stride[2]];
        w->lse2[row] = value == -INFINITY ? INFINITY : (float)((double)value * ATTN_LOG2E);
        attn_dense_load_row(p, scratch, o, b, h, n, p->dv, 1);
        const float *g = attn_exec_row(&w->grad_o, b, h, n);
        double sum = 0;
        for (int64_t c = 0; c < p->dv; c++) {
            sum += (double)scratch[c] * (double)g[c];
        }
        w->delta[row] = (float)sum;
    }
    return ATTN_OK;
}

void attn_exec_sink_gradients(const exec_backward *w, const dense_problem *p, const attn_tensor *to)
{
    const attn_tensor *sinks = p->in->sinks;
    for (int64_t h = 0; h < p->heads; h++) {
        double sum = 0, sink = (double)((const float *)sinks->data)[h * sinks->stride[0]];
        for (int64_t b = 0; b < p->batch; b++) {
            for (int64_t n = 0; n < p->n; n++) {
                int64_t row = (b * p->heads + h) * p->n + n;
                sum -= exp2(sink * ATTN_LOG2E - (double)w->lse2[row]) * (double)w->delta[row];
            }
        }
        ((float *)to->data)[h * to->stride[0]] = (float)sum;
    }
}
