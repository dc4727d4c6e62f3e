/* The router of Branch-Attend-Mix: who uses which expert, with what weight. */
#include "op/bam.h"

#include "kernel/tile.h"
#include "layer/linear.h"

#include <string.h>

attn_status attn_bam_route(attn_call *call, bam_choice *r, int64_t width, const float *x, const float *w)
{
    int64_t pairs = r->tokens * r->experts;
    uint8_t *mask = attn_arena_array(call->arena, (size_t)pairs, 1);
    r->p = attn_scratch_f32(call, pairs);
    r->indices = attn_arena_array(call->arena, (size_t)(r->tokens * r->chosen), sizeof(int64_t));
    r->lse = attn_arena_array(call->arena, (size_t)r->tokens, sizeof(double));
    if (mask == NULL || r->p == NULL || r->lse == NULL || r->indices == NULL) {
        return attn_fail_memory((size_t)(pairs + 2 * r->tokens) * sizeof(int64_t));
    }
    ATTN_TRY(attn_linear_forward(call->arena, call->threads, r->tokens, width, r->experts, x, w, NULL, r->p));
    memset(mask, r->chosen == 0, (size_t)pairs);
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t t = 0; t < r->tokens; t++) {
        int64_t *own = r->indices + t * r->chosen;
        attn_top_k(r->experts, r->chosen, r->p + t * r->experts, own);
        for (int64_t i = 0; i < r->chosen; i++) {
            mask[t * r->experts + own[i]] = 1;
        }
        r->lse[t] = attn_softmax_row(r->experts, r->p + t * r->experts);
    }
    return attn_lists_create(&r->lists, call->arena, call->threads, 1, r->tokens, r->experts, mask);
}

void attn_bam_write_choice(const bam_choice *r, int applied, attn_tensor *gates, attn_tensor *indices)
{
    int64_t count = r->tokens * r->experts;
    if (gates != NULL && (!applied || r->chosen == 0)) {
        memcpy(gates->data, r->p, (size_t)count * sizeof(float));
    } else if (gates != NULL) {
        memset(gates->data, 0, (size_t)count * sizeof(float));
        for (int64_t i = 0; i < r->tokens * r->chosen; i++) {
            int64_t at = i / r->chosen * r->experts + r->indices[i];
            attn_f32(gates)[at] = r->p[at];
        }
    }
    if (indices != NULL && r->chosen > 0) {
        memcpy(indices->data, r->indices, (size_t)(r->tokens * r->chosen) * sizeof(int64_t));
    }
}

const float *attn_bam_rows(const attn_call *call, const bam_choice *r, int64_t e, int64_t width, const float *x, float *rows)
{
    if (bam_count(r, e) == r->tokens) {
        return x;
    }
    attn_rows_gather(call->threads, width, x, bam_list(r, e), bam_count(r, e), rows);
    return rows;
}

void attn_bam_weigh(const attn_call *call, const bam_choice *r, int64_t e, int64_t first, int64_t count, int64_t width, float *rows)
{
    const attn_tile_kernels *kernels = attn_tile_kernels_get();
    const int64_t *list = bam_list(r, e) + first;
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t i = 0; i < count; i++) {
        kernels->scale(rows + i * width, width, r->p[list[i] * r->experts + e]);
    }
}

float *attn_bam_gradient(attn_call *call, const attn_tensor *grad, int64_t count)
{
    if (grad != NULL) {
        return attn_f32(grad);
    }
    float *scratch = attn_scratch_f32(call, count);
    if (scratch != NULL) {
        memset(scratch, 0, (size_t)count * sizeof *scratch);
    }
    return scratch;
}
