/* Attention of the heads that tokens chose: for each head the queries that chose it are one list of rows. */
#include "op/moh.h"

#include "kernel/tile.h"

#include <string.h>

/* One token at a time: of each head the row of that token, if it has one. Causal, so that its end tells it. */
static attn_status decode(attn_call *call, const moh_lists *x)
{
    int64_t n = attn_dim(call, "N"), before = attn_dim(call, "M") - n;
    attn_stairs_head *room = attn_arena_array(call->arena, (size_t)x->lists.count, sizeof *room);
    if (room == NULL) {
        return attn_fail_memory((size_t)x->lists.count * sizeof *room);
    }
    attn_stairs_steps steps = attn_stairs_steps_begin(&x->stairs, room);
    for (int64_t i = 0; i < n; i++) {
        ATTN_TRY(attn_stairs_steps_next(&steps, attn_max_i64(0, i + before + 1), call->arena, call->threads));
    }
    return ATTN_OK;
}

attn_status attn_moh_attend(attn_call *call, const uint8_t *mask, const attn_tensor *q, const attn_tensor *k, const attn_tensor *v,
                            double scale, int causal, int token_by_token, moh_lists *to)
{
    int64_t batch = attn_dim(call, "B"), heads = attn_dim(call, "H"), kv_heads = attn_dim(call, "Hkv"), n = attn_dim(call, "N");
    int64_t m = attn_dim(call, "M"), d = attn_dim(call, "D"), dv = attn_dim(call, "Dv"), all = batch * heads;
    ATTN_TRY(attn_lists_create(&to->lists, call->arena, call->threads, batch, n, heads, mask));
    const int64_t *first = to->lists.first, *token = to->lists.token;
    int64_t rows = first[all], *end = attn_arena_array(call->arena, (size_t)rows, sizeof *end);
    attn_stairs_head *list = attn_arena_array(call->arena, (size_t)all, sizeof *list);
    to->o = attn_scratch_f32(call, rows * dv);
    to->lse = attn_scratch_f32(call, rows);
    if (list == NULL || end == NULL || to->o == NULL || to->lse == NULL) {
        return attn_fail_memory((size_t)(rows * dv) * sizeof(float));
    }
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t bh = 0; bh < all; bh++) {
        int64_t kv = bh / heads * kv_heads + bh % heads / (heads / kv_heads), start = first[bh], count = first[bh + 1] - start;
        for (int64_t r = start; r < start + count; r++) {
            end[r] = causal ? attn_max_i64(0, attn_min_i64(m, token[r] + m - n + 1)) : m;
        }
        list[bh] = (attn_stairs_head){.rows = count, .kv = kv, .q = attn_f32(q) + bh * n * d, .q_row = token + start, .end = end + start,
                                      .k = attn_f32(k) + kv * m * d, .v = attn_f32(v) + kv * m * dv, .o = to->o + start * dv, .lse = to->lse + start};
    }
    to->stairs = (attn_stairs){.keys = m, .d = d, .dv = dv, .kv_count = batch * kv_heads, .head_count = all, .scale = scale, .heads = list};
    return token_by_token ? decode(call, to) : attn_stairs_forward(&to->stairs, call->arena, call->threads);
}

void attn_moh_scatter(const attn_call *call, moh_lists *x, const float *gates, float *o)
{
    const attn_tile_kernels *kernels = attn_tile_kernels_get();
    int64_t heads = attn_dim(call, "H"), n = attn_dim(call, "N"), dv = x->stairs.dv;
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t bh = 0; bh < x->lists.count; bh++) {
        int64_t r = x->lists.first[bh], last = x->lists.first[bh + 1];
        for (int64_t i = 0; i < n; i++) {
            float *to = o + (bh * n + i) * dv;
            if (r < last && x->lists.token[r] == i) {
                if (gates != NULL) {
                    kernels->scale(x->o + r * dv, dv, gates[(bh / heads * n + i) * heads + bh % heads]);
                }
                memcpy(to, x->o + r++ * dv, (size_t)dv * sizeof *to);
            } else {
                memset(to, 0, (size_t)dv * sizeof *to);
            }
        }
    }
}

float *attn_moh_gather_gradient(attn_call *call, const moh_lists *x, const attn_tensor *grad_o)
{
    int64_t n = attn_dim(call, "N"), dv = x->stairs.dv, count = x->lists.first[x->lists.count];
    float *rows = attn_scratch_f32(call, count * dv);
    if (rows != NULL && grad_o == NULL) {
        memset(rows, 0, (size_t)(count * dv) * sizeof *rows);
    }
    for (int64_t bh = 0; bh < x->lists.count && rows != NULL && grad_o != NULL; bh++) {
        int64_t first = x->lists.first[bh];
        attn_rows_gather(call->threads, dv, attn_f32(grad_o) + bh * n * dv, x->lists.token + first, x->lists.first[bh + 1] - first,
                         rows + first * dv);
    }
    return rows;
}

attn_status attn_moh_attend_back(attn_call *call, const moh_lists *x, const float *gates, float *grad_rows, float *grad_gates, int q, int k,
                                 int v)
{
    const int64_t *first = x->lists.first, *token = x->lists.token;
    int64_t heads = attn_dim(call, "H"), n = attn_dim(call, "N"), d = x->stairs.d, dv = x->stairs.dv, all = x->lists.count;
    attn_stairs_gradient *gradients = attn_arena_array(call->arena, (size_t)all, sizeof *gradients);
    float *rows_q = attn_scratch_f32(call, first[all] * d), *grad_q = attn_f32(call->grad[q]);
    if (gradients == NULL || rows_q == NULL) {
        return attn_fail_memory((size_t)(first[all] * d) * sizeof(float));
    }
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t bh = 0; bh < all; bh++) {
        for (int64_t r = first[bh]; r < first[bh + 1]; r++) {
            int64_t at = (bh / heads * n + token[r]) * heads + bh % heads;
            double sum = 0;
            for (int64_t c = 0; c < dv; c++) {
                sum += (double)grad_rows[r * dv + c] * (double)x->o[r * dv + c];
                grad_rows[r * dv + c] *= gates != NULL ? gates[at] : 1.0f;
            }
            grad_gates[at] += (float)sum;
        }
        gradients[bh] = (attn_stairs_gradient){.grad_o = grad_rows + first[bh] * dv, .q = rows_q + first[bh] * d};
    }
    if (grad_q == NULL && call->grad[k] == NULL && call->grad[v] == NULL) {
        return ATTN_OK;
    }
    ATTN_TRY(attn_stairs_backward(&x->stairs, gradients, attn_f32(call->grad[k]), attn_f32(call->grad[v]), call->arena, call->threads));
    for (int64_t bh = 0; bh < all && grad_q != NULL; bh++) { /* what is not in the lists is 0 already */
        attn_rows_scatter_add(call->threads, d, rows_q + first[bh] * d, token + first[bh], first[bh + 1] - first[bh], grad_q + bh * n * d);
    }
    return ATTN_OK;
}

void attn_moh_cost(const attn_call *call, int64_t active, int causal, attn_cost *cost)
{
    int64_t n = attn_dim(call, "N"), m = attn_dim(call, "M");
    double keys = 0;
    for (int64_t i = 0; i < n; i++) {
        keys += causal ? (double)attn_max_i64(0, i + m - n + 1) : (double)m;
    }
    cost->pairs = (double)active * keys * (double)attn_dim(call, "B");
    cost->flops = 2 * cost->pairs * (double)(attn_dim(call, "D") + attn_dim(call, "Dv"));
}
